"""Bad input is refused before work starts, by an exception that names the field, the row and the remedy."""

import tracemalloc

import pytest
import torch
from tiny import BERT, BERT_WITH_IMAGES, GPT2, LABELS, MODELS, VISION, VOCAB, name_of
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, Blip2VisionConfig, GPT2Config

from hf_custom import CustomBertConfig, CustomBlip2VisionConfig, CustomBlip2VisionModel, CustomGPT2Config

ROWS = {row.name.removeprefix("CustomGPT2"): row for row in MODELS}
LM, SEQUENCE, TOKEN, QA, CHOICE = (
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "DoubleHeadsModel",
)
N_POSITIONS = GPT2["n_positions"]


def ids(*shape):
    return torch.zeros(shape, dtype=torch.long)


def ids_with(value, row, shape=(3, 5)):
    tensor = ids(*shape)
    tensor[row].view(-1)[-1] = value
    return tensor


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


def call(head, *args, fields=None, **kwargs):
    return lambda: ROWS[head].build(**fields or {})(*args, **kwargs)


def call_cached(cached, *args, **kwargs):
    def run():
        model = ROWS[LM].build()
        return model(*args, past_key_values=model(ids(2, cached), use_cache=True).past_key_values, **kwargs)

    return run


def call_classifier(problem_type, labels, **fields):
    return call(SEQUENCE, ids(3, 5), labels=labels, fields={"problem_type": problem_type, **fields})


ENCODER = {"encoder_hidden_states": torch.zeros(3, 6, GPT2["n_embd"]), "fields": {"add_cross_attention": True}}
TOO_LONG = ("`n_positions` is 64", "Truncate", "position_embedding_type='rope'")
VOCABULARY = (f"vocabulary of {VOCAB}", "resize_token_embeddings")

# (call, exception, words of its message) by name.
FORWARD = {
    "too long": (call(LM, ids(2, N_POSITIONS + 1)), ValueError, (*TOO_LONG, "position 64")),
    "too long embeddings": (call(LM, inputs_embeds=torch.zeros(2, 65, 32)), ValueError, TOO_LONG),
    "too long with cache": (call_cached(60, ids(2, 5)), ValueError, TOO_LONG),
    "too long with cache and mask": (call_cached(60, ids(2, 5), attention_mask=ones(2, 65)), ValueError, TOO_LONG),
    "position beyond": (call(LM, ids(1, 2), position_ids=torch.tensor([[3, 64]])), ValueError, TOO_LONG),
    "id beyond": (call(LM, ids_with(VOCAB, 1)), ValueError, (f"`input_ids` holds {VOCAB} in row 1", *VOCABULARY)),
    "id negative": (call(LM, ids_with(-1, 2)), ValueError, ("`input_ids` holds -1 in row 2", *VOCABULARY)),
    "id with cache": (call_cached(3, ids_with(VOCAB, 1, (2, 1))), ValueError, ("in row 1", *VOCABULARY)),
    "token type beyond": (
        call(LM, ids(3, 5), token_type_ids=ids_with(VOCAB, 1)),
        ValueError,
        (f"`token_type_ids` holds {VOCAB} in row 1",),
    ),
    "id real": (call(LM, ids(3, 5).float()), TypeError, ("`input_ids`", "float32", "`inputs_embeds`")),
    "mask of other rows": (call(LM, ids(3, 5), attention_mask=ones(2, 5)), ValueError, ("(2, 5)", "(3, 5)")),
    "mask of other columns": (call(LM, ids(3, 5), attention_mask=ones(3, 4)), ValueError, ("(3, 4)", "(3, 5)")),
    "mask too wide": (call(LM, ids(3, 5), attention_mask=ones(3, 6)), ValueError, ("(3, 6)", "(3, 5)")),
    "mask without rows": (call(LM, ids(3, 5), attention_mask=ones(5)), ValueError, ("`attention_mask`", "(3, 5)")),
    "mask without the cached": (
        call_cached(4, ids(2, 1), attention_mask=ones(2, 1)),
        ValueError,
        ("`attention_mask` has shape (2, 1)", "(2, 5)", "4 cached tokens", "tokenizer"),
    ),
    "mask of choices": (call(CHOICE, ids(3, 2, 5), attention_mask=ones(3, 5)), ValueError, ("(3, 5)", "(6, 5)")),
    "encoder mask of other rows": (
        call(LM, ids(3, 5), **ENCODER, encoder_attention_mask=ones(4, 6)),
        ValueError,
        ("`encoder_attention_mask`", "(4, 6)", "(3, 6)"),
    ),
    "encoder mask of other columns": (
        call(LM, ids(3, 5), **ENCODER, encoder_attention_mask=ones(3, 5)),
        ValueError,
        ("`encoder_attention_mask`", "(3, 5)", "(3, 6)"),
    ),
    "mask of another number": (
        call(LM, ids(3, 5), attention_mask=ones(3, 5) + ids_with(1, 2)),
        ValueError,
        ("`attention_mask` holds 2 in row 2", "(B, 1, T, S)"),
    ),
    "mask of fractions": (
        call(LM, ids(3, 5), attention_mask=ones(3, 5) - 0.5 * ids_with(1, 1)),
        ValueError,
        ("`attention_mask` holds 0.5 in row 1", "(B, 1, T, S)"),
    ),
    "mask to add": (
        call(LM, ids(3, 5), attention_mask=torch.zeros(3, 5).masked_fill(ids_with(1, 1).bool(), float("-inf"))),
        ValueError,
        ("`attention_mask` holds -inf in row 1", "(B, 1, T, S)"),
    ),
    "no cross attention": (
        call(LM, ids(3, 5), encoder_hidden_states=torch.zeros(3, 6, 32)),
        ValueError,
        ("`encoder_hidden_states`", "`add_cross_attention=True`"),
    ),
    "rows of unknown end": (
        call(SEQUENCE, ids(2, 5), fields={"pad_token_id": None}),
        ValueError,
        ("`config.pad_token_id`", "`attention_mask`", "tokenizer.pad_token_id"),
    ),
}
FORWARD |= {
    f"{head} {what}": (call(head, *args, **kwargs), ValueError, ("exactly one", "`input_ids`", "`inputs_embeds`"))
    for head, row in ROWS.items()
    for what, args, kwargs in [
        ("both", (ids(*[2] * (2 if row.num_choices is None else 3)),), {"inputs_embeds": torch.zeros(2, 2, 32)}),
        ("neither", (), {}),
        ("neither, labelled", (), row.draw_labels(2, 5)),
    ]
}

DOCUMENTS = torch.tensor([0, 2, 5])
ADD_UP = ("must add up to it", "Start with 0")
# (arguments besides (1, 5) ids, words of the message) by name.
PACKED = {
    "lengths end short": ({"cu_seq_lens_q": DOCUMENTS[:-1]}, ("from 0 to 2", "5 tokens", *ADD_UP)),
    "lengths end beyond": ({"cu_seq_lens_q": torch.tensor([0, 2, 6])}, ("from 0 to 6", "5 tokens", *ADD_UP)),
    "lengths start above zero": ({"cu_seq_lens_q": DOCUMENTS[1:]}, ("from 2 to 5", "5 tokens", *ADD_UP)),
    "lengths fall": ({"cu_seq_lens_q": torch.tensor([0, 4, 2, 5])}, ("from 0 to 5 and falls on the way", *ADD_UP)),
    "lengths real": ({"cu_seq_lens_q": DOCUMENTS.float()}, ("`cu_seq_lens_q`", "float32", "row of integers")),
    "lengths in rows": ({"cu_seq_lens_q": DOCUMENTS[None]}, ("`cu_seq_lens_q` has shape (1, 3)", "row of integers")),
    "lengths of nothing": ({"cu_seq_lens_q": DOCUMENTS[:1]}, ("`cu_seq_lens_q` has shape (1,)", "row of integers")),
    "lengths of other keys": (
        {"cu_seq_lens_q": DOCUMENTS, "cu_seq_lens_k": torch.tensor([0, 3, 5])},
        ("`cu_seq_lens_k` differs from `cu_seq_lens_q`", "Pass the same tensor"),
    ),
    "lengths with padding": (
        {"cu_seq_lens_q": DOCUMENTS, "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])},
        ("`attention_mask` has padding in row 0", "leave it out"),
    ),
    "positions restart under a mask": (
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "attention_mask": ones(1, 5)},
        ("`position_ids` begin again at token 2 of row 0", "Leave out `attention_mask`"),
    ),
}
FORWARD |= {
    f"{what}, {implementation}": (
        call(LM, ids(1, 5), use_cache=False, fields={"attn_implementation": implementation}, **arguments),
        ValueError,
        words,
    )
    for what, (arguments, words) in PACKED.items()
    for implementation in ("sdpa", "eager")
    # The other implementations leave positions to the host, which does not compare them with the mask.
    if "cu_seq_lens_q" in arguments or implementation == "sdpa"
}

LABEL = ("-100 to be ignored", "Correct the label")
LABELS_OF = {
    LM: (ids(3, 5), {"labels": ((3, 5), VOCAB, "`vocab_size` is 99")}),
    TOKEN: (ids(3, 5), {"labels": ((3, 5), LABELS, "`num_labels` is 3")}),
    SEQUENCE: (ids(3, 5), {"labels": ((3,), LABELS, "`num_labels` is 3")}),
    CHOICE: (
        ids(3, 2, 5),
        {"labels": ((3, 2, 5), VOCAB, "`vocab_size` is 99"), "mc_labels": ((3,), 2, "`number of choices` is 2")},
    ),
}
for head, (input_ids, targets) in LABELS_OF.items():
    fields = {"problem_type": "single_label_classification"} if head == SEQUENCE else None
    for name, (shape, classes, says) in targets.items():

        def labelled(labels, head=head, input_ids=input_ids, name=name, fields=fields):
            return call(head, input_ids, fields=fields, **{name: labels})

        FORWARD |= {
            f"{head} {name} beyond": (
                labelled(ids_with(classes, 1, shape)),
                ValueError,
                (f"`{name}` holds {classes} in row 1", says, *LABEL),
            ),
            f"{head} {name} negative": (
                labelled(ids_with(-1, 2, shape)),
                ValueError,
                (f"`{name}` holds -1 in row 2", says, *LABEL),
            ),
            f"{head} {name} real": (labelled(ids(*shape).float()), TypeError, (f"`{name}`", "float32", "`.long()`")),
            f"{head} {name} of other rows": (
                labelled(ids(2, *shape[1:])),
                ValueError,
                (f"`{name}` has shape", str((2, *shape[1:])), str(shape)),
            ),
            f"{head} {name} of other columns": (labelled(ids(*shape, 4)), ValueError, (f"`{name}` has shape",)),
        }
FORWARD |= {
    f"{QA} {name} {what}": (
        call(QA, ids(3, 5), **{"start_positions": ids(3), "end_positions": ids(3), name: positions}),
        error,
        (f"`{name}`", *words),
    )
    for name in ("start_positions", "end_positions")
    for what, positions, error, words in [
        ("real", ids(3).float(), TypeError, ("float32",)),
        ("of other rows", ids(2), ValueError, ("(2,)", "(3,)")),
        ("of tokens", ids(3, 5), ValueError, ("(3, 5)", "(3,)")),
        ("negative", ids_with(-1, 2, (3,)), ValueError, ("-1 in row 2",)),
    ]
}
FORWARD |= {
    "regression of other rows": (
        call_classifier("regression", torch.zeros(2), num_labels=1),
        ValueError,
        ("`labels` has shape (2,)", "(3, 1)", "`num_labels`"),
    ),
    "regression of other columns": (
        call_classifier("regression", torch.zeros(3)),
        ValueError,
        ("`labels` has shape (3,)", "(3, 3)", "`num_labels`"),
    ),
    "multi-label of other columns": (
        call_classifier("multi_label_classification", torch.zeros(3, 2)),
        ValueError,
        ("`labels` has shape (3, 2)", "(3, 3)", "`num_labels`"),
    ),
    "multi-label beyond": (
        call_classifier("multi_label_classification", torch.tensor([[0, 1, 0], [0, 2, 0], [1, 1, 1.0]])),
        ValueError,
        ("`labels` holds 2", "row 1"),
    ),
    "labels found to be multi-label": (
        call_classifier(None, torch.zeros(3)),
        ValueError,
        ("multi_label_classification", "(3, 3)", "`num_labels`"),
    ),
}

# --- BERT ---

BERT_MODEL, BERT_LM, MASKED = "CustomBertModel", "CustomBertForCausalLM", "CustomBertForMaskedLM"
BERT_CHOICE = "CustomBertForMultipleChoice"
BERT_TOO_LONG = ("`max_position_embeddings` is 64", "Truncate", "position_embedding_type='rope'", "row 0")
BERT_ENCODER = {"encoder_hidden_states": torch.zeros(3, 6, BERT["hidden_size"])}
FORWARD |= {
    "BERT too long": (call(BERT_MODEL, ids(2, 65)), ValueError, BERT_TOO_LONG),
    "BERT too long, relative": (
        call(BERT_MODEL, ids(2, 65), fields={"position_embedding_type": "relative_key"}),
        ValueError,
        BERT_TOO_LONG,
    ),
    "BERT id beyond": (call(BERT_MODEL, ids_with(VOCAB, 1)), ValueError, ("in row 1", *VOCABULARY)),
    "BERT token type beyond": (
        call(BERT_MODEL, ids(3, 5), token_type_ids=ids_with(3, 1)),
        ValueError,
        ("`token_type_ids` holds 3 in row 1", "`type_vocab_size` is 3", "from 0 to 2", "leave them out"),
    ),
    "BERT token type negative": (
        call(BERT_MODEL, ids(3, 5), token_type_ids=ids_with(-1, 2)),
        ValueError,
        ("`token_type_ids` holds -1 in row 2",),
    ),
    "BERT mask of other columns": (
        call(BERT_MODEL, ids(3, 5), attention_mask=ones(3, 4)),
        ValueError,
        ("(3, 4)", "(3, 5)", "tokenizer"),
    ),
    "BERT input of one row": (call(BERT_MODEL, ids(5)), ValueError, ("shape (5,)", "(batch, length)")),
    "BERT input of choices": (call(BERT_MODEL, ids(3, 2, 5)), ValueError, ("(3, 2, 5)", "Flatten the leading axes")),
    "BERT choices without an axis": (call(BERT_CHOICE, ids(5, 2)), ValueError, ("axis of choices", "(batch, choices")),
    "BERT choices of one row": (call(BERT_CHOICE, ids(5)), ValueError, ("axis of choices", "(batch, choices")),
    "BERT no cross attention": (
        call(BERT_LM, ids(3, 5), **BERT_ENCODER),
        ValueError,
        ("`encoder_hidden_states`", "`add_cross_attention=True`"),
    ),
    "BERT encoder mask of other columns": (
        call(
            BERT_LM, ids(3, 5), fields={"add_cross_attention": True}, encoder_attention_mask=ones(3, 5), **BERT_ENCODER
        ),
        ValueError,
        ("`encoder_attention_mask`", "(3, 5)", "(3, 6)"),
    ),
}
BERT_LABELS = {
    MASKED: (ids(3, 5), "labels", (3, 5), VOCAB, "`vocab_size` is 99"),
    BERT_LM: (ids(3, 5), "labels", (3, 5), VOCAB, "`vocab_size` is 99"),
    BERT_CHOICE: (ids(3, 2, 5), "labels", (3,), 2, "`number of choices` is 2"),
    "CustomBertForPreTraining": (ids(3, 5), "next_sentence_label", (3,), 2, "`number of relationships` is 2"),
    "CustomBertForNextSentencePrediction": (ids(3, 5), "labels", (3,), 2, "`number of relationships` is 2"),
    "CustomBertForTokenClassification": (ids(3, 5), "labels", (3, 5), LABELS, "`num_labels` is 3"),
    "CustomBertForSequenceClassification": (ids(3, 5), "labels", (3,), LABELS, "`num_labels` is 3"),
    "CustomBertForImageTextRetrieval": (ids(3, 5), "labels", (3,), 2, "`number of classes` is 2"),
}
for head, (input_ids, name, shape, classes, says) in BERT_LABELS.items():
    FORWARD |= {
        f"{head} {name} {what}": (call(head, input_ids, **{name: labels}), ValueError, (f"`{name}`", *words))
        for what, labels, words in [
            ("beyond", ids_with(classes, 1, shape), (f"holds {classes} in row 1", says, *LABEL)),
            ("negative", ids_with(-1, 2, shape), ("holds -1 in row 2", says, *LABEL)),
            ("of other rows", ids(2, *shape[1:]), (str((2, *shape[1:])), str(shape))),
        ]
    }
FORWARD |= {
    f"BERT {name} {what}": (
        call(
            "CustomBertForQuestionAnswering",
            ids(3, 5),
            **{"start_positions": ids(3), "end_positions": ids(3), name: positions},
        ),
        ValueError,
        (f"`{name}`", *words),
    )
    for name in ("start_positions", "end_positions")
    for what, positions, words in [
        ("of other rows", ids(2), ("(2,)", "(3,)")),
        ("negative", ids_with(-1, 2, (3,)), ("-1 in row 2",)),
    ]
}


def assert_refused(run, error, words):
    with pytest.raises(error) as caught:
        run()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize(("run", "error", "words"), FORWARD.values(), ids=FORWARD)
def test_bad_tensor_is_refused(run, error, words):
    assert_refused(run, error, words)


class NoTensors(TorchFunctionMode):
    """Fails at the first tensor."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was reached")


# (fields, exception, words of its message): refused by the configuration and, set later, by the model.
CONFIGS = [
    ({"n_head": 5}, ValueError, ("`n_head` (5)", "`n_embd` (32)", "for instance 4")),
    ({"position_embedding_type": "alibi"}, ValueError, ("`position_embedding_type`", "'alibi'", "'rope'")),
    ({"summary_type": "max"}, ValueError, ("`summary_type`", "'max'", "'mean'")),
    ({"n_head": 32, "position_embedding_type": "rope"}, ValueError, ("even", "it is 1", "Change `n_head`")),
    ({"n_embd": 33, "n_head": 3, "position_embedding_type": "sinusoidal"}, ValueError, ("`n_embd` (33)", "even")),
    ({"n_layer": 1e6}, Exception, ("'n_layer'", "expected int")),
    ({"n_layer": 10**6}, ValueError, ("`n_layer` is 1000000", "10,000")),
    ({"n_layer": 0}, ValueError, ("`n_layer` is 0", "from 1")),
    ({"vocab_size": 10**12}, ValueError, ("`vocab_size` is 1000000000000",)),
    ({"n_positions": 10**12}, ValueError, ("`n_positions` is 1000000000000",)),
    ({"n_embd": 10**7}, ValueError, ("`n_embd` is 10000000",)),
    ({"n_inner": 10**12}, ValueError, ("`n_inner` is 1000000000000",)),
    ({"n_layer": 9000, "n_embd": 2**16}, ValueError, ("parameters", "Reduce", "`n_layer`", "`n_embd`")),
    ({"resid_pdrop": 1.5}, ValueError, ("`resid_pdrop` is 1.5", "between 0 and 1")),
    ({"embd_pdrop": -1}, ValueError, ("`embd_pdrop` is -1", "between 0 and 1")),
    ({"attn_pdrop": float("nan")}, ValueError, ("`attn_pdrop` is nan", "between 0 and 1")),
    ({"summary_first_dropout": 2}, ValueError, ("`summary_first_dropout`", "between 0 and 1")),
    ({"summary_last_dropout": 2}, ValueError, ("`summary_last_dropout`", "between 0 and 1")),
    ({"classifier_dropout": -0.1}, ValueError, ("`classifier_dropout`", "between 0 and 1")),
    ({"layer_norm_epsilon": -1e-5}, ValueError, ("`layer_norm_epsilon` is -1e-05", "greater than 0")),
    ({"initializer_range": float("nan")}, ValueError, ("`initializer_range` is nan", "greater than 0")),
    ({"rope_theta": 0}, ValueError, ("`rope_theta` is 0", "greater than 0")),
    ({"loss_chunk_size": 0}, ValueError, ("`loss_chunk_size` is 0", "from 1")),
    ({"loss_chunk_size": -1}, ValueError, ("`loss_chunk_size` is -1", "from 1")),
]
BERT_CONFIGS = [
    ({"num_attention_heads": 5}, ValueError, ("`num_attention_heads` (5)", "`hidden_size` (32)", "for instance 4")),
    ({"position_embedding_type": "learned"}, ValueError, ("`position_embedding_type`", "'learned'", "'relative_key'")),
    ({"num_attention_heads": 32, "position_embedding_type": "rope"}, ValueError, ("even", "it is 1")),
    (
        {"hidden_size": 33, "num_attention_heads": 3, "position_embedding_type": "sinusoidal"},
        ValueError,
        ("`hidden_size` (33)", "even"),
    ),
    ({"num_hidden_layers": 0}, ValueError, ("`num_hidden_layers` is 0", "from 1")),
    ({"type_vocab_size": 0}, ValueError, ("`type_vocab_size` is 0", "from 1")),
    ({"classifier_hidden_size": 0}, ValueError, ("`classifier_hidden_size` is 0", "from 1")),
    ({"loss_chunk_size": 0}, ValueError, ("`loss_chunk_size` is 0", "from 1")),
    ({"intermediate_size": 10**12}, ValueError, ("`intermediate_size` is 1000000000000",)),
    ({"hidden_dropout_prob": 1.5}, ValueError, ("`hidden_dropout_prob` is 1.5", "between 0 and 1")),
    ({"attention_probs_dropout_prob": -1}, ValueError, ("`attention_probs_dropout_prob` is -1", "between 0 and 1")),
    ({"classifier_dropout": 2}, ValueError, ("`classifier_dropout` is 2", "between 0 and 1")),
    ({"layer_norm_eps": 0.0}, ValueError, ("`layer_norm_eps` is 0.0", "greater than 0")),
    ({"rope_theta": 0}, ValueError, ("`rope_theta` is 0", "greater than 0")),
    ({"add_cross_attention": True}, ValueError, ("`add_cross_attention`", "Set `is_decoder=True`")),
]
TOWER_CONFIGS = [
    ({"num_attention_heads": 5}, ValueError, ("`num_attention_heads` (5)", "`hidden_size` (24)", "for instance 4")),
    ({"num_hidden_layers": -1}, ValueError, ("`num_hidden_layers` is -1", "from 0")),
    ({"patch_size": 5}, ValueError, ("`patch_size` (5)", "`image_size`", "no patch")),
    ({"image_size": (8, 12, 3)}, Exception, ("image_size",)),
    ({"image_size": 0}, ValueError, ("`image_size` is 0", "from 1")),
    ({"patch_size": 0}, ValueError, ("`patch_size` is 0", "from 1")),
    ({"image_size": 10**9}, ValueError, ("`image_size` is 1000000000",)),
    ({"attention_dropout": 1.5}, ValueError, ("`attention_dropout` is 1.5", "between 0 and 1")),
    ({"initializer_range": 0.0}, ValueError, ("`initializer_range` is 0.0", "greater than 0")),
]
# (configuration, its tiny fields, the model, what to change, exception, words of its message).
EVERY_CONFIG = [
    (config_class, base, model_class, *row)
    for config_class, base, model_class, rows in [
        (CustomGPT2Config, GPT2, ROWS[LM].model_class, CONFIGS),
        (CustomBertConfig, BERT, ROWS[MASKED].model_class, BERT_CONFIGS),
        (CustomBlip2VisionConfig, VISION, CustomBlip2VisionModel, TOWER_CONFIGS),
    ]
    for row in rows
]
# The host builds a label map of that length: long enough to show were it built, not to exhaust the machine.
ONLY_AT_CONSTRUCTION = [
    (CustomGPT2Config, GPT2, None, {"num_labels": 2 * 10**6}, ValueError, ("`num_labels` is 2000000",)),
    (CustomBertConfig, BERT_WITH_IMAGES, None, {"is_decoder": True}, ValueError, ("`vision_config`", "`is_decoder`")),
]
each_config = ("config_class", "base", "model_class", "fields", "error", "words")
ONE_MEGABYTE = 2**20


def assert_refused_empty_handed(run, error, words):
    """Refused without a tensor and with less than a megabyte of Python objects."""
    tracemalloc.start()
    try:
        with NoTensors():
            assert_refused(run, error, words)
        assert tracemalloc.get_traced_memory()[1] < ONE_MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(each_config, EVERY_CONFIG + ONLY_AT_CONSTRUCTION)
def test_bad_configuration_is_refused_before_memory_is_taken(config_class, base, model_class, fields, error, words):
    assert_refused_empty_handed(lambda: config_class(**{**base, **fields}), error, words)


@pytest.mark.parametrize(each_config, EVERY_CONFIG)
def test_field_changed_later_is_refused_before_memory_is_taken(config_class, base, model_class, fields, error, words):
    config = config_class(**base)

    def build():
        for name, value in fields.items():
            setattr(config, name, value)
        model_class(config)

    assert_refused_empty_handed(build, error, words)


@pytest.mark.parametrize(
    ("head", "fields", "words"),
    [
        (LM, {"activation_function": "gelu_newer"}, ("`activation_function`", "'gelu_newer'", "'gelu_new'")),
        (LM, {"activation_function": "?"}, ("`activation_function`", "Known", "relu")),
        (MASKED, {"hidden_act": "gelu_newer"}, ("`hidden_act`", "'gelu_newer'", "'gelu_new'")),
        (CHOICE, {"summary_activation": "tahn"}, ("`summary_activation`", "'tahn'", "'tanh'")),
        (CHOICE, {"summary_type": "attn"}, ("`summary_type='attn'`", "'cls_index'")),
    ],
)
def test_unknown_part_is_refused_by_the_model(head, fields, words):
    assert_refused(lambda: ROWS[head].build(**fields), ValueError, words)


@pytest.mark.parametrize("row", MODELS, ids=name_of)
def test_stock_configuration_is_refused_with_its_conversion(row):
    stock = {CustomGPT2Config: GPT2Config, CustomBertConfig: BertConfig}[row.config_class]
    words = (row.name, stock.__name__, "from_dict(config.to_dict())")
    assert_refused_empty_handed(lambda: row.model_class(stock()), TypeError, words)


def test_stock_configuration_of_the_tower_is_refused_with_its_conversion():
    words = ("CustomBlip2VisionModel", "Blip2VisionConfig", "from_dict(config.to_dict())")
    assert_refused_empty_handed(lambda: CustomBlip2VisionModel(Blip2VisionConfig()), TypeError, words)


@pytest.mark.parametrize("row", MODELS, ids=name_of)
def test_good_input_is_not_refused(row):
    """The longest sequence, the last id and ignored labels pass."""
    inputs = row.inputs(length=N_POSITIONS)
    inputs["input_ids"][..., -1] = VOCAB - 1
    labels = row.draw_labels(3, N_POSITIONS)
    if "labels" in labels:
        labels["labels"][0] = -100
    outputs = row.build()(**inputs, **labels)
    assert not labels or outputs.loss.isfinite()
