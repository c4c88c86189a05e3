"""Folders of strangers: what is refused before it is read, what is never run, and what must not be missing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_remote_code import BLIP2, WRITER, build_blip2
from tiny import BERT, GPT2, MODELS, SEQ2SEQ, widen
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import hf_custom
from hf_custom.loading import find_model_class, load_config, load_model, stored_tensors
from hf_custom.registry import FAMILIES

CAUSAL = next(row for row in MODELS if row.name == "CustomGPT2ForCausalLM")


@pytest.fixture
def folder(tmp_path):
    CAUSAL.build().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("row", MODELS + SEQ2SEQ, ids=lambda row: row.name)
def test_model_comes_back_as_its_class(row, tmp_path):
    model = row.build()
    model.save_pretrained(tmp_path)
    # Code that would run if anything trusted it.
    for file in tmp_path.glob("*.py"):
        file.write_text("raise SystemExit('run')")
    loaded = load_model(tmp_path)
    assert type(loaded) is row.model_class
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("model_class", BLIP2, ids=lambda model_class: model_class.__name__)
def test_blip2_comes_back_as_its_class(model_class, tmp_path):
    build_blip2(model_class).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is model_class


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        (GPT2LMHeadModel(GPT2Config(**GPT2)), hf_custom.CustomGPT2ForCausalLM),
        (BertForMaskedLM(BertConfig(**BERT)), hf_custom.CustomBertForMaskedLM),
    ],
    ids=["gpt2", "bert"],
)
def test_stock_folder_gives_the_class_of_ours(stock, ours, tmp_path):
    widen(stock).eval().save_pretrained(tmp_path)
    model = load_model(tmp_path).eval()
    assert type(model) is ours
    ids = torch.randint(0, 97, (2, 7))
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


def test_every_class_of_the_package_is_found():
    names = [
        name for name in hf_custom.__all__ if name.startswith("Custom") and hasattr(getattr(hf_custom, name), "forward")
    ]
    classes = [getattr(hf_custom, name) for name in names if not name.endswith("PreTrainedModel")]
    assert len(classes) > 20
    for model_class in classes:
        config = model_class.config_class(architectures=[model_class.__name__])
        assert find_model_class(config) is model_class


def test_configuration_without_a_class_gives_the_model_without_a_head():
    for config_class, _ in FAMILIES:
        assert find_model_class(config_class()).__name__.endswith("Model")


def test_missing_weight_is_an_error_unless_it_may_start_fresh(folder):
    with pytest.raises(ValueError, match="lacks 1 weights of CustomGPT2ForSequenceClassification.*`score.weight`"):
        load_model(folder, model_class=hf_custom.CustomGPT2ForSequenceClassification)
    model = load_model(folder, model_class=hf_custom.CustomGPT2ForSequenceClassification, allow_missing=True)
    assert model.score.weight.shape[1] == 32


def name_shard(folder, name):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    edit(index, weight_map={**content["weight_map"], first: name})


def only_pickles(folder):
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def cut_shard(folder):
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def drop_weight(folder):
    file = next(file for file in folder.glob("*.safetensors") if "transformer.ln_f.bias" in load_file(file))
    tensors = load_file(file)
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, file, {"format": "pt"})


HOSTILE = {
    "shard above the folder": (lambda f: name_shard(f, "../x.safetensors"), "'../x.safetensors', outside its folder"),
    "shard of the system": (lambda f: name_shard(f, "/etc/passwd"), "'/etc/passwd', outside its folder"),
    "shard that is missing": (lambda f: name_shard(f, "lost.safetensors"), "lost.safetensors is missing"),
    "no map": (lambda f: edit(f / "model.safetensors.index.json", weight_map=[]), "no `weight_map`"),
    "pickles alone": (only_pickles, r"pickles alone \(pytorch_model.bin\)"),
    "truncated": (cut_shard, "is no safetensors file"),
    "weight that is missing": (drop_weight, "lacks 1 weights.*`transformer.ln_f.bias`"),
    "a billion labels": (lambda f: edit(f / "config.json", num_labels=10**9), "`num_labels` is 1000000000"),
    "a billion words": (lambda f: edit(f / "config.json", vocab_size=10**9), "`vocab_size` is 1000000000"),
    "more layers than weights": (
        lambda f: edit(f / "config.json", n_layer=60),
        "describes .* parameters but its files",
    ),
    "unknown family": (
        lambda f: edit(f / "config.json", model_type="llama"),
        "`model_type` is 'llama', which is none of",
    ),
    "unknown class": (lambda f: edit(f / "config.json", architectures=["Evil"]), "`architectures` names 'Evil'"),
    "broken configuration": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    "configuration of another kind": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_folder_is_refused(kind, folder):
    spoil, message = HOSTILE[kind]
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message):
        load_model(folder)


@pytest.mark.parametrize("kind", ["shard above the folder", "shard of the system", "no map"])
def test_auto_class_refuses_shards_elsewhere_too(kind, folder):
    spoil, message = HOSTILE[kind]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_huge_configuration_is_not_read(folder):
    # No bytes are written: the file is a hole.
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**27 + 1)
    with pytest.raises(ValueError, match="more than any such file"):
        load_config(folder)


def test_nested_configuration_is_of_the_closed_list(tmp_path):
    build_blip2(WRITER).save_pretrained(tmp_path)
    text_config = json.loads((tmp_path / "config.json").read_text())["text_config"]
    edit(tmp_path / "config.json", text_config={**text_config, "model_type": "llama"})
    with pytest.raises(ValueError, match="`text_config` is of type 'llama'"):
        load_model(tmp_path)


def test_name_that_is_a_file_is_no_repository(folder):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_config(folder / "config.json")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_config("./nowhere")


def test_headers_tell_shapes_and_types(folder):
    stored = stored_tensors(folder)
    weights = CAUSAL.build().state_dict()
    weights.pop("lm_head.weight")
    assert {name: shape for name, (shape, _) in stored.items()} == {name: tuple(w.shape) for name, w in weights.items()}
    assert {dtype for _, dtype in stored.values()} == {"F32"}


def test_folder_with_a_link_in_the_way_of_the_cache_loads(folder, tmp_path):
    """The Hub's cache keeps files elsewhere and links to them."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert type(load_model(folder)) is CAUSAL.model_class
