"""Bad input is refused before work starts, by an exception that names the field, the row and the remedy."""

import tracemalloc

import pytest
import torch
from tiny import BERT, BERT_WITH_IMAGES, GPT2, LABELS, MODELS, VISION, VOCAB, name_of
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, GPT2Config

from hf_custom import (
    CustomBertConfig,
    CustomBlip2Config,
    CustomBlip2ForConditionalGeneration,
    CustomBlip2ForImageTextRetrieval,
    CustomBlip2ForPreTraining,
    CustomBlip2QFormerConfig,
    CustomBlip2QFormerModel,
    CustomBlip2VisionConfig,
    CustomBlip2VisionModel,
    CustomGPT2Config,
)

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

# --- BLIP-2 ---

QFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
    "encoder_hidden_size": VISION["hidden_size"],
    "use_qformer_text_input": True,
    "bos_token_id": 98,
}
# Two queries an image, whose token is the last of the vocabulary.
IMAGE_TOKEN = VOCAB - 1
BLIP2 = {
    "vision_config": VISION,
    "qformer_config": QFORMER,
    "text_config": {**GPT2, "model_type": "custom_gpt2"},
    "num_query_tokens": 2,
    "image_token_index": IMAGE_TOKEN,
}
WRITER, FIRST_STAGE, SCORER = (
    CustomBlip2ForConditionalGeneration,
    CustomBlip2ForPreTraining,
    CustomBlip2ForImageTextRetrieval,
)


def call_blip2(model_class, fields=None, **inputs):
    return lambda: model_class(CustomBlip2Config(**{**BLIP2, **(fields or {})})).eval()(**inputs)


def call_qformer(num_columns, *args, fields=None, **kwargs):
    embeds = torch.zeros(3, num_columns, QFORMER["hidden_size"])
    kwargs = {"encoder_hidden_states": torch.zeros(3, 4, VISION["hidden_size"]), **kwargs}
    return lambda: CustomBlip2QFormerModel(CustomBlip2QFormerConfig(**{**QFORMER, **(fields or {})}))(
        embeds, *args, **kwargs
    )


def with_image_tokens(*counts, length=5):
    """Texts, each of which begins with so many tokens of images."""
    return torch.where(torch.arange(length) < torch.tensor(counts)[:, None], IMAGE_TOKEN, 1)


IMAGES = {"pixel_values": torch.zeros(3, 3, *VISION["image_size"])}
PROMPT = {"input_ids": with_image_tokens(2, 2, 2)}
FORWARD |= {
    "BLIP-2 image tokens few": (
        call_blip2(WRITER, input_ids=with_image_tokens(2, 1, 2), **IMAGES),
        ValueError,
        ("row 1 of `input_ids` has 1 image tokens", "all rows have 5", "3 images of 2 queries need 6", "processor"),
    ),
    "BLIP-2 image tokens many": (
        call_blip2(WRITER, input_ids=with_image_tokens(2, 2, 3), **IMAGES),
        ValueError,
        ("row 2 of `input_ids` has 3 image tokens", "all rows have 7"),
    ),
    "BLIP-2 image without a place": (
        call_blip2(WRITER, input_ids=with_image_tokens(2, 2, 0), **IMAGES),
        ValueError,
        ("row 2 of `input_ids` has 0 image tokens", "need 6"),
    ),
    "BLIP-2 place without an image": (
        call_blip2(WRITER, **PROMPT, pixel_values=IMAGES["pixel_values"][:2]),
        ValueError,
        ("all rows have 6", "2 images of 2 queries need 4"),
    ),
    "BLIP-2 without image token": (
        call_blip2(WRITER, {"image_token_index": None}, **PROMPT, **IMAGES),
        ValueError,
        ("no `image_token_index`", "Set it"),
    ),
    "BLIP-2 states of another tower": (
        call_blip2(WRITER, **PROMPT, vision_hidden_states=torch.zeros(3, 7, 8)),
        ValueError,
        ("`vision_hidden_states` has shape (3, 7, 8)", "24", "`last_hidden_state`"),
    ),
    "BLIP-2 states of one image": (
        call_blip2(FIRST_STAGE, input_ids=ids(3, 5), vision_hidden_states=torch.zeros(7, 24)),
        ValueError,
        ("`vision_hidden_states` has shape (7, 24)", "(batch, 1 + patches, 24)"),
    ),
    "BLIP-2 features and images": (
        call_blip2(WRITER, **PROMPT, **IMAGES, mm_encoder_outputs={"image": torch.zeros(3, 2, 32)}),
        ValueError,
        ("`mm_encoder_outputs`", "Leave out the images"),
    ),
    "BLIP-2 both texts": (
        call_blip2(WRITER, **PROMPT, **IMAGES, inputs_embeds=torch.zeros(3, 5, 32)),
        ValueError,
        ("exactly one", "`input_ids`", "`inputs_embeds`"),
    ),
    "BLIP-2 id beyond": (
        call_blip2(WRITER, input_ids=ids_with(VOCAB, 1), **IMAGES),
        ValueError,
        (f"`input_ids` holds {VOCAB} in row 1", *VOCABULARY),
    ),
    "BLIP-2 mask of other columns": (
        call_blip2(WRITER, **PROMPT, **IMAGES, attention_mask=ones(3, 4)),
        ValueError,
        ("(3, 4)", "(3, 5)", "tokenizer"),
    ),
    "BLIP-2 label beyond": (
        call_blip2(WRITER, **PROMPT, **IMAGES, labels=ids_with(VOCAB, 1)),
        ValueError,
        (f"`labels` holds {VOCAB} in row 1", "`vocab_size` is 99", *LABEL),
    ),
    "BLIP-2 label negative": (
        call_blip2(WRITER, **PROMPT, **IMAGES, labels=ids_with(-1, 2, (3, 2))),
        ValueError,
        ("`labels` holds -1 in row 2", *LABEL),
    ),
    "BLIP-2 labels of other rows": (
        call_blip2(WRITER, **PROMPT, **IMAGES, labels=ids(2, 5)),
        ValueError,
        ("`labels` has shape (2, 5)", "(3, 5)"),
    ),
    "BLIP-2 labels of more columns": (
        call_blip2(WRITER, **PROMPT, **IMAGES, labels=ids(3, 6)),
        ValueError,
        ("`labels` has shape (3, 6)", "(3, 5)"),
    ),
    "BLIP-2 text too long": (
        call_blip2(WRITER, input_ids=with_image_tokens(2, 2, 2, length=65), **IMAGES),
        ValueError,
        TOO_LONG,
    ),
    "BLIP-2 fewer texts than images": (
        call_blip2(FIRST_STAGE, input_ids=ids(2, 5), **IMAGES),
        ValueError,
        ("3 images but 2 texts", "one text an image"),
    ),
    "BLIP-2 pairs without texts": (call_blip2(FIRST_STAGE, **IMAGES), ValueError, ("`input_ids` is missing", "pairs")),
    "BLIP-2 scores without texts": (call_blip2(SCORER, **IMAGES), ValueError, ("`input_ids` is missing", "tokenizer")),
    "BLIP-2 fewer texts than images to match": (
        call_blip2(SCORER, input_ids=ids(2, 5), use_image_text_matching_head=True, **IMAGES),
        ValueError,
        ("3 images but 2 texts", "matching head", "one text an image"),
    ),
    "BLIP-2 text too long for the Q-Former": (
        call_blip2(FIRST_STAGE, input_ids=ids(3, 9), **IMAGES),
        ValueError,
        ("row 0 needs position 8", "`max_position_embeddings` is 8", "Truncate"),
    ),
    "BLIP-2 id beyond for the Q-Former": (
        call_blip2(SCORER, {"image_token_index": None}, input_ids=ids_with(VOCAB, 1), **IMAGES),
        ValueError,
        (f"`input_ids` holds {VOCAB} in row 1", f"vocabulary of {VOCAB}"),
    ),
    "Q-Former without text": (
        call_qformer(5, 2, fields={"use_qformer_text_input": False}),
        ValueError,
        ("3 columns behind the 2 queries", "`use_qformer_text_input=True`"),
    ),
    "Q-Former of an unknown mode": (
        call_qformer(5, 2, attention_mode="causal"),
        ValueError,
        ("`attention_mode` is 'causal'", "bidirectional, unimodal, multimodal_causal"),
    ),
    "Q-Former with more queries than columns": (call_qformer(5, 6), ValueError, ("`query_length` is 6", "5 columns")),
    "Q-Former with queries below none": (call_qformer(5, -1), ValueError, ("`query_length` is -1", "5 columns")),
    "Q-Former without an image": (
        call_qformer(5, 2, encoder_hidden_states=None),
        ValueError,
        ("`encoder_hidden_states`", "`image_key_values`", "`query_length=0`"),
    ),
    "Q-Former with a mask of other columns": (
        call_qformer(5, 2, attention_mask=ones(3, 3)),
        ValueError,
        ("`attention_mask` has shape (3, 3)", "(3, 5)"),
    ),
    "Q-Former with a mask of another number": (
        call_qformer(5, 2, attention_mask=ones(3, 5) + ids_with(1, 2)),
        ValueError,
        ("`attention_mask` holds 2 in row 2",),
    ),
    "Q-Former with an image of another width": (
        call_qformer(5, 2, encoder_hidden_states=torch.zeros(3, 4, 8)),
        ValueError,
        ("`encoder_hidden_states` has shape (3, 4, 8)", "(batch, length, 24)", "`encoder_hidden_size`"),
    ),
    "Q-Former with an image without rows": (
        call_qformer(5, 2, encoder_hidden_states=torch.zeros(4, 24)),
        ValueError,
        ("`encoder_hidden_states` has shape (4, 24)", "(batch, length, 24)"),
    ),
    "Q-Former with fewer images than rows": (
        call_qformer(5, 2, encoder_hidden_states=torch.zeros(2, 4, 24)),
        ValueError,
        ("2 images but 3 rows",),
    ),
    "Q-Former with an image mask of other columns": (
        call_qformer(5, 2, encoder_attention_mask=ones(3, 5)),
        ValueError,
        ("`encoder_attention_mask` has shape (3, 5)", "(3, 4)"),
    ),
}
FORWARD |= {
    f"BLIP-2 {model_class.__name__} images {what}": (
        call_blip2(model_class, **PROMPT, **images),
        ValueError,
        ("exactly one", "`pixel_values`", "`vision_hidden_states`"),
    )
    for model_class in (WRITER, FIRST_STAGE, SCORER)
    for what, images in [("neither", {}), ("both", {**IMAGES, "vision_hidden_states": torch.zeros(3, 7, 24)})]
}


def test_text_behind_cached_queries_comes_alone():
    model = CustomBlip2QFormerModel(CustomBlip2QFormerConfig(**QFORMER)).eval()
    image, embeds = torch.zeros(3, 4, VISION["hidden_size"]), torch.zeros(3, 4, QFORMER["hidden_size"])
    cached = model(embeds[:, :2], encoder_hidden_states=image, use_cache=True).past_key_values
    for mode, num_queries in (("bidirectional", 0), ("unimodal", 0), ("multimodal_causal", 2)):
        assert_refused(
            lambda mode=mode, num_queries=num_queries: model(
                embeds, num_queries, None, image, attention_mode=mode, past_key_values=cached
            ),
            ValueError,
            ("`past_key_values`", "`query_length=0`", "`attention_mode='multimodal_causal'`"),
        )


def test_cached_queries_are_refused_while_checkpointing():
    model = CustomBlip2QFormerModel(CustomBlip2QFormerConfig(**QFORMER)).eval()
    image, embeds = torch.zeros(3, 4, VISION["hidden_size"]), torch.zeros(3, 4, QFORMER["hidden_size"])
    cached = model(embeds[:, :2], encoder_hidden_states=image, use_cache=True).past_key_values
    call = {"query_length": 0, "attention_mode": "multimodal_causal", "past_key_values": cached}
    model.gradient_checkpointing_enable()
    model(embeds[:, 2:], **call)
    words = ("`past_key_values`", "while checkpointing", "queries and text together")
    assert_refused(lambda: model.train()(embeds[:, 2:], **call), ValueError, words)


@pytest.mark.parametrize("inputs", [{}, PROMPT], ids=["image alone", "prompt"])
def test_generation_without_image_token_is_refused(inputs):
    model = WRITER(CustomBlip2Config(**{**BLIP2, "image_token_index": None})).eval()
    words = ("no `image_token_index`", "Set it", "processor")
    assert_refused(lambda: model.generate(**IMAGES, **inputs, max_new_tokens=2), ValueError, words)


@pytest.mark.parametrize(
    ("model_class", "qformer", "words"),
    [
        (SCORER, {"use_qformer_text_input": False}, ("Retrieval", "`use_qformer_text_input` is False", "Set it")),
        (FIRST_STAGE, {"use_qformer_text_input": False}, ("PreTraining", "`use_qformer_text_input` is False")),
        (FIRST_STAGE, {"bos_token_id": None}, ("`bos_token_id` is not set", "Add a token", "`qformer_config`")),
    ],
)
def test_class_of_the_first_stage_says_what_its_configuration_lacks(model_class, qformer, words):
    config = CustomBlip2Config(**{**BLIP2, "qformer_config": {**QFORMER, **qformer}})
    assert_refused(lambda: model_class(config), ValueError, words)


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
QFORMER_CONFIGS = [
    ({"num_attention_heads": 5}, ValueError, ("`num_attention_heads` (5)", "`hidden_size` (16)")),
    ({"cross_attention_frequency": 0}, ValueError, ("`cross_attention_frequency` is 0", "from 1")),
    ({"encoder_hidden_size": 0}, ValueError, ("`encoder_hidden_size` is 0", "from 1")),
    ({"num_hidden_layers": 0}, ValueError, ("`num_hidden_layers` is 0", "from 1")),
    ({"hidden_dropout_prob": 1.5}, ValueError, ("`hidden_dropout_prob` is 1.5", "between 0 and 1")),
    ({"layer_norm_eps": 0.0}, ValueError, ("`layer_norm_eps` is 0.0", "greater than 0")),
]
BLIP2_CONFIGS = [
    ({"text_config": BertConfig()}, ValueError, ("`text_config` is of type 'bert'", "custom_gpt2, gpt2, opt, t5")),
    ({"frozen_modules": ["vision_tower"]}, ValueError, ("`frozen_modules` names 'vision_tower'", "vision_model, ")),
    ({"num_query_tokens": 0}, ValueError, ("`num_query_tokens` is 0", "from 1")),
    ({"image_text_hidden_size": 0}, ValueError, ("`image_text_hidden_size` is 0", "from 1")),
    ({"itm_loss_weight": -1}, ValueError, ("`itm_loss_weight` is -1", "0 or more")),
    ({f"it{name}_loss_weight": 0 for name in "cmg"}, ValueError, ("all three loss weights are 0", "Raise one")),
    *(
        (
            {"qformer_config": CustomBlip2QFormerConfig(**{**QFORMER, "bos_token_id": token})},
            ValueError,
            (f"`bos_token_id` is {token}", "`vocab_size` is 99", "`qformer_config`"),
        )
        for token in (VOCAB, -1)
    ),
    ({"itc_temperature": 0.0}, ValueError, ("`itc_temperature` is 0.0", "greater than 0")),
    ({"label_smoothing": 1.5}, ValueError, ("`label_smoothing` is 1.5", "between 0 and 1")),
    ({"loss_chunk_size": 0}, ValueError, ("`loss_chunk_size` is 0", "from 1")),
]
# (configuration, its tiny fields, the model, what to change, exception, words of its message).
EVERY_CONFIG = [
    (config_class, base, model_class, *row)
    for config_class, base, model_class, rows in [
        (CustomGPT2Config, GPT2, ROWS[LM].model_class, CONFIGS),
        (CustomBertConfig, BERT, ROWS[MASKED].model_class, BERT_CONFIGS),
        (CustomBlip2VisionConfig, VISION, CustomBlip2VisionModel, TOWER_CONFIGS),
        (CustomBlip2QFormerConfig, QFORMER, CustomBlip2QFormerModel, QFORMER_CONFIGS),
        (CustomBlip2Config, BLIP2, WRITER, BLIP2_CONFIGS),
    ]
    for row in rows
]
# The host builds a label map of that length: long enough to show were it built, not to exhaust the machine.
ONLY_AT_CONSTRUCTION = [
    (CustomGPT2Config, GPT2, None, {"num_labels": 2 * 10**6}, ValueError, ("`num_labels` is 2000000",)),
    (CustomBertConfig, BERT_WITH_IMAGES, None, {"is_decoder": True}, ValueError, ("`vision_config`", "`is_decoder`")),
    (
        CustomBlip2Config,
        BLIP2,
        None,
        {"text_config": {"model_type": "llama"}},
        ValueError,
        ("`text_config` is of type 'llama'", "one of custom_gpt2, gpt2, opt, t5", "`text_config['model_type']`"),
    ),
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


@pytest.mark.parametrize(
    ("model_class", "stock"),
    [
        (CustomBlip2VisionModel, Blip2VisionConfig),
        (CustomBlip2QFormerModel, Blip2QFormerConfig),
        (WRITER, Blip2Config),
        (FIRST_STAGE, Blip2Config),
    ],
)
def test_stock_configuration_of_blip2_is_refused_with_its_conversion(model_class, stock):
    words, config = (model_class.__name__, stock.__name__, "from_dict(config.to_dict())"), stock()
    assert_refused_empty_handed(lambda: model_class(config), TypeError, words)


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
