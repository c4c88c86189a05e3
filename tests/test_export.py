"""Exported folders: stock alone reads them and gives the numbers of the model here; what it cannot say is refused."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from parity import assert_same_weights, with_positions
from reference import assert_outputs_near, real_outputs
from safetensors.torch import load_file
from test_processing_blip2 import image, image_processor
from tiny import BERT, GPT2, LENGTH, MODELS, RECURRENT, SEQ2SEQ, UNTIED, name_of, tokenizer, widen
from transformers import Blip2Processor, GPT2LMHeadModel

import hf_custom
from hf_custom import attention
from hf_custom.export import FAMILIES, ONLY_OF_CLASS, STOCK_CLASSES, WITHOUT_STOCK, export_to_stock

ROWS = {row.name.removeprefix("Custom"): row for row in MODELS if row.name in STOCK_CLASSES}
LM, BASE = ROWS["GPT2ForCausalLM"], ROWS["BertModel"]
QUERIES, IMAGE = 2, 96
SQUARE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
}
QFORMER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "encoder_hidden_size": 24,
}
OPT = {
    "vocab_size": 99,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "eos_token_id": None,
    "model_type": "opt",
}
T5 = {
    "vocab_size": 99,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "eos_token_id": None,
    "decoder_start_token_id": 0,
    "model_type": "t5",
}
TEXTS = {"custom_gpt2": {**GPT2, "model_type": "custom_gpt2", "eos_token_id": None}, "opt": OPT, "t5": T5}

# --- The models, and what each must give ---

# Wide tied weights mostly repeat the last token.
LIVELY = {**UNTIED, "eos_token_id": None}
# Name: row and fields. Stock's span classifier has a score for each label.
TEXT_MODELS = {name: (row, {"num_labels": 2} if "BertForQuestion" in name else {}) for name, row in ROWS.items()} | {
    "GPT2ForCausalLM untied": (LM, LIVELY),
    "GPT2ForCausalLM options": (
        LM,
        {
            **LIVELY,
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "n_inner": 48,
            "activation_function": "relu",
            "layer_norm_epsilon": 0.1,
        },
    ),
    "BertForCausalLM untied": (ROWS["BertForCausalLM"], LIVELY),
    "BertModel options": (BASE, {"hidden_act": "relu", "layer_norm_eps": 0.1, "chunk_size_feed_forward": 1}),
}
# What stock pools of a BERT is the first column, padding or not.
POOLED = ("BertModel", "PreTraining", "NextSentencePrediction", "BertForSequenceClassification", "MultipleChoice")
# Name: class, language model, fields.
IMAGE_MODELS = {
    "Blip2ForConditionalGeneration custom_gpt2": ("ForConditionalGeneration", "custom_gpt2"),
    "Blip2ForConditionalGeneration opt": ("ForConditionalGeneration", "opt"),
    "Blip2ForConditionalGeneration t5": ("ForConditionalGeneration", "t5"),
    "Blip2Model custom_gpt2": ("Model", "custom_gpt2"),
    "Blip2ForImageTextRetrieval": ("ForImageTextRetrieval", "custom_gpt2"),
    "Blip2VisionModel": ("VisionModel", None),
    "Blip2QFormerModel": ("QFormerModel", None),
}
# The stock Auto class that gives the class; none does for the others.
AUTO = {
    "GPT2Model": "AutoModel",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "GPT2ForSequenceClassification": "AutoModelForSequenceClassification",
    "GPT2ForTokenClassification": "AutoModelForTokenClassification",
    "GPT2ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "BertModel": "AutoModel",
    "BertForPreTraining": "AutoModelForPreTraining",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertLMHeadModel": "AutoModelForCausalLM",
    "BertForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "BertForMultipleChoice": "AutoModelForMultipleChoice",
    "BertForTokenClassification": "AutoModelForTokenClassification",
    "BertForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Blip2Model": "AutoModel",
    "Blip2QFormerModel": "AutoModel",
    "Blip2ForConditionalGeneration": "AutoModelForImageTextToText",
    "Blip2ForImageTextRetrieval": "AutoModelForZeroShotImageClassification",
}

# Each folder by the Auto class and by the class that its configuration names; prints the names that are as expected.
SCRIPT = """
import sys
sys.modules["hf_custom"] = None  # importing it fails from here on, installed or not
import traceback
from pathlib import Path
import torch
import transformers
cases, tests = map(Path, sys.argv[1:])
sys.path.append(str(tests))
from reference import assert_near, at_real_positions


def run(case, root):
    folder, class_name = root / case["folder"], case["class_name"]
    assert transformers.AutoConfig.from_pretrained(folder).architectures == [class_name]
    loader = getattr(transformers, case["auto_name"] or class_name)
    model, report = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model) is getattr(transformers, class_name)
    assert model.config.dtype == torch.float32 and not model.training
    for inputs, mask, outputs in case["calls"]:
        found = model(**inputs)
        for name, expected in outputs.items():
            pair = [tensor if mask is None else at_real_positions(tensor, mask) for tensor in (found[name], expected)]
            assert_near(*pair, 1e-5, name)
    for inputs, tokens in case["generations"]:
        assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), tokens)


for name, case in torch.load(cases).items():
    try:
        run(case, cases.parent)
        print(name)
    except Exception:
        print(name, traceback.format_exc(), file=sys.stderr)
"""


def build_blip2(name, text=None, **changes):
    """With wide weights and nothing frozen."""
    qformer_config = {**QFORMER, "use_qformer_text_input": name in ("ForImageTextRetrieval", "ForPreTraining")}
    if name in ("VisionModel", "VisionForImageClassification"):
        config = hf_custom.CustomBlip2VisionConfig(**{**SQUARE, **changes})
    elif name == "QFormerModel":
        config = hf_custom.CustomBlip2QFormerConfig(**qformer_config)
    else:
        config = hf_custom.CustomBlip2Config(
            vision_config={**SQUARE, **changes.pop("vision_config", {})},
            qformer_config={**qformer_config, "bos_token_id": 97},
            text_config={**TEXTS[text or "custom_gpt2"], **changes.pop("text_config", {})},
            num_query_tokens=QUERIES,
            image_text_hidden_size=8,
            image_token_index=None if name == "ForImageTextRetrieval" else IMAGE,
            frozen_modules=[],
            **changes,
        )
    return widen(getattr(hf_custom, f"CustomBlip2{name}")(config)).eval()


def build(name):
    if name in TEXT_MODELS:
        row, options = TEXT_MODELS[name]
        return row.build(**options)
    return build_blip2(*IMAGE_MODELS[name])


def tensors_of(outputs):
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def to_the_left(tensors, mask):
    """The tensors (..., T) with the sequences of a left-padded `mask` moved to the first columns."""
    columns = (torch.arange(LENGTH) + mask.argmax(-1, keepdim=True)) % LENGTH
    return {name: tensor.gather(-1, columns) for name, tensor in tensors.items()}


def text_calls(name, model):
    """(inputs for stock, mask, expected outputs), padded on either side."""
    row, calls = TEXT_MODELS[name][0], []
    for padding in ("left", "right"):
        inputs = row.indexed_inputs(padding)
        outputs, mask = tensors_of(model(**inputs)), inputs["attention_mask"]
        calls.append((with_positions(inputs), mask, outputs))
        if padding == "left" and any(part in name for part in POOLED):
            # Of the same sequences, with their padding where stock does not read it.
            of_rows = {name: value for name, value in outputs.items() if LENGTH not in value.shape}
            calls[-1] = (to_the_left(inputs, mask), None, of_rows)
    return calls


def image_inputs(padding, is_joint=True):
    ids, mask = torch.randint(2, 90, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    if is_joint:
        ids[:, :QUERIES] = IMAGE
    for row in (1, 2):
        ids[row, -2 * row :], mask[row, -2 * row :] = 98, 0
        if padding == "left":
            ids[row], mask[row] = ids[row].roll(2 * row), mask[row].roll(2 * row)
    return {"pixel_values": torch.randn(3, 3, 8, 8), "input_ids": ids, "attention_mask": mask}


def image_calls(name, model):
    if name == "Blip2VisionModel":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
        return [(inputs, None, tensors_of(model(**inputs)))]
    if name == "Blip2QFormerModel":
        inputs = {"query_embeds": torch.randn(2, 5, 32), "encoder_hidden_states": torch.randn(2, 6, 24)}
        return [(inputs, None, tensors_of(model(**inputs)))]
    if name == "Blip2ForImageTextRetrieval":
        # Stock reads the first column, so padding is on the right.
        inputs = image_inputs("right", is_joint=False)
        return [
            ({**inputs, "use_image_text_matching_head": is_joint}, None, {"logits_per_image": logits})
            for is_joint in (False, True)
            for logits in [model(**inputs, use_image_text_matching_head=is_joint).logits_per_image]
        ]
    calls = []
    for padding in ("left", "right"):
        inputs = image_inputs(padding)
        given = {"decoder_input_ids": torch.randint(2, 90, (3, 4))} if name.endswith("t5") else {}
        for_stock = with_positions(inputs) if name.endswith("gpt2") else inputs
        mask = None if name.endswith("t5") else inputs["attention_mask"]
        calls.append(({**for_stock, **given}, mask, {"logits": model(**inputs, **given).logits}))
    return calls


def generations_of(name, model):
    if name in TEXT_MODELS and not TEXT_MODELS[name][0].is_generative:
        return []
    if name in IMAGE_MODELS and "ForConditionalGeneration" not in name:
        return []
    inputs = TEXT_MODELS[name][0].inputs(padding="left") if name in TEXT_MODELS else image_inputs("left")
    return [(inputs, model.generate(**inputs, max_new_tokens=12, do_sample=False))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of every model, and the names of those that a process without this package finds as expected."""
    transformers.set_seed(0)
    root, cases = tmp_path_factory.mktemp("exported"), {}
    for name in EVERY:
        model = build(name)
        class_name = STOCK_CLASSES[type(model).__name__]
        export_to_stock(model, root / name)
        with torch.no_grad():
            calls = (text_calls if name in TEXT_MODELS else image_calls)(name, model)
        cases[name] = {
            "folder": name,
            "class_name": class_name,
            "auto_name": AUTO.get(class_name),
            "calls": calls,
            "generations": generations_of(name, model),
        }
    torch.save(cases, root / "cases.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "cache")}
    command = [sys.executable, "-I", "-c", SCRIPT, str(root / "cases.pt"), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    return root, run.stdout.splitlines(), run.stderr


EVERY = [*TEXT_MODELS, *IMAGE_MODELS]
each_case = pytest.mark.parametrize("name", EVERY)


@each_case
def test_stock_alone_gives_the_same_numbers(name, exported):
    _, passed, errors = exported
    assert name in passed, errors


def own_fields(model_type):
    """Those of the configuration here that the stock one does not declare."""
    ours = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    return {item.name for item in fields(ours)} - {item.name for item in fields(FAMILIES[model_type].config_class)}


@each_case
def test_folder_is_stock_and_nothing_else(name, exported):
    folder = exported[0] / name
    model_class = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    generation = {"generation_config.json"} if model_class.can_generate() else set()
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"} | generation
    for path in folder.glob("*.json"):
        assert "ustom" not in path.read_text() and "auto_map" not in path.read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == model_class.config_class.model_type
    families = {family.config_class.model_type: ours for ours, family in FAMILIES.items()}
    for part in [config, *(value for value in config.values() if isinstance(value, dict) and "model_type" in value)]:
        if part["model_type"] in families:
            model_type = families[part["model_type"]]
            assert not part.keys() & (own_fields(model_type) - FAMILIES[model_type].undeclared.keys())


# --- The tables and the code ---


def test_every_class_is_in_one_table():
    classes = {name for name in hf_custom.__all__ if isinstance(getattr(hf_custom, name), type)}
    classes = {name for name in classes if issubclass(getattr(hf_custom, name), transformers.PreTrainedModel)}
    classes -= {name for name in classes if "PreTrainedModel" in name}
    assert classes == STOCK_CLASSES.keys() | WITHOUT_STOCK.keys()
    assert not STOCK_CLASSES.keys() & WITHOUT_STOCK.keys()
    assert ONLY_OF_CLASS.keys() <= STOCK_CLASSES.keys()
    assert all(hasattr(transformers, name) for name in STOCK_CLASSES.values())
    built = {type(build(name)).__name__ for name in EVERY}
    assert built == STOCK_CLASSES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_ours_has_its_rule(model_type):
    family = FAMILIES[model_type]
    assert own_fields(model_type) == family.only.keys() | set(family.dropped) | family.undeclared.keys()


# --- There and back ---

# What a stock checkpoint may say, beside what its class declares.
SAID = {
    "GPT2ForTokenClassification": {
        "classifier_dropout": 0.3,
        "id2label": {0: "A", 1: "B"},
        "label2id": {"A": 0, "B": 1},
    },
    "GPT2DoubleHeadsModel": {"summary_last_dropout": 0.2, "summary_activation": "tanh"},
    "GPT2LMHeadModel": {"n_ctx": 64, "task_specific_params": {"text-generation": {"max_length": 50}}, **UNTIED},
    "BertForSequenceClassification": {"problem_type": "multi_label_classification", "classifier_dropout": 0.3},
    "BertForQuestionAnswering": {"num_labels": 2},
    "BertModel": {"position_embedding_type": "absolute", "chunk_size_feed_forward": 4},
}


def stock_model(class_name):
    stock_class = getattr(transformers, class_name)
    said = SAID.get(class_name, {})
    if class_name == "Blip2VisionModel":
        config = transformers.Blip2VisionConfig(**SQUARE, **said)
    elif class_name == "Blip2QFormerModel":
        config = transformers.Blip2QFormerConfig(**QFORMER, **said)
    elif class_name.startswith("Blip2"):
        qformer_config = {**QFORMER, "use_qformer_text_input": "Retrieval" in class_name}
        text_config = T5 if class_name == "Blip2Model" else {**GPT2, "model_type": "gpt2"}
        parts = {"vision_config": SQUARE, "qformer_config": qformer_config, "text_config": text_config}
        config = transformers.Blip2Config(**parts, num_query_tokens=QUERIES, image_token_index=IMAGE)
    else:
        family = dict(GPT2 if class_name.startswith("GPT2") else BERT)
        # Fields of ours that stock would keep without knowing them.
        family.pop("classifier_dropout", None)
        if "id2label" in said:
            family.pop("num_labels")
        config = stock_class.config_class(**{**family, **said, "is_decoder": class_name == "BertLMHeadModel"})
    return widen(stock_class(config))


@pytest.mark.parametrize("name", STOCK_CLASSES)
def test_there_and_back_changes_nothing(name, tmp_path):
    class_name = STOCK_CLASSES[name]
    stock_model(class_name).save_pretrained(tmp_path / "first")
    # Loading writes the type of the weights into the configurations of the parts, for stock as for ours.
    getattr(transformers, class_name).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "stock")
    ours = getattr(hf_custom, name).from_pretrained(tmp_path / "first")
    export_to_stock(ours, tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("stock", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[weight], after[weight]) for weight in before)
    for path in (tmp_path / "stock").glob("*.json"):
        before, after = (json.loads((tmp_path / folder / path.name).read_text()) for folder in ("stock", "back"))
        if path.name == "config.json" and before["model_type"] == "bert":
            # Checkpoints of stock until its version 5 have it.
            before.setdefault("position_embedding_type", "absolute")
        assert before == after
    assert len(list((tmp_path / "stock").iterdir())) == len(list((tmp_path / "back").iterdir()))


@pytest.mark.parametrize("name", ["GPT2ForCausalLM", "Blip2ForConditionalGeneration custom_gpt2", "BertModel"])
def test_package_registered_in_place_of_stock_exports_stock(name, exported, tmp_path):
    hf_custom.register(replace_stock=True)
    folder = export_to_stock(build(name), tmp_path / "folder")
    assert (folder / "config.json").read_text() == (exported[0] / name / "config.json").read_text()


def test_blip2_loaded_from_its_own_folder_is_exported(tmp_path):
    """Whose parts have an `auto_map` and names of classes too."""
    model = build_blip2("ForConditionalGeneration")
    model.language_model.config.architectures = ["CustomGPT2ForCausalLM"]
    model.save_pretrained(tmp_path / "ours")
    model = type(model).from_pretrained(tmp_path / "ours")
    model.config.text_config.auto_map = dict(model.config.text_config.auto_classes)
    folder = export_to_stock(model, tmp_path / "folder")
    text = (folder / "config.json").read_text()
    assert "ustom" not in text and "auto_map" not in text
    assert json.loads(text)["text_config"]["architectures"] == ["GPT2LMHeadModel"]
    assert_same_weights(transformers.Blip2ForConditionalGeneration.from_pretrained(folder), model)


# --- Weights ---


@pytest.mark.parametrize("options", [{}, UNTIED], ids=name_of)
def test_ties_stay(options, tmp_path):
    export_to_stock(LM.build(**options), tmp_path / "folder")
    assert ("lm_head.weight" in load_file(tmp_path / "folder/model.safetensors")) == bool(options)
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "folder")
    assert (stock.lm_head.weight is stock.transformer.wte.weight) == (not options)


def test_weights_that_stock_would_tie_are_refused_when_they_differ(tmp_path):
    model = LM.build()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    export_to_stock(model, tmp_path / "equal")
    assert "lm_head.weight" not in load_file(tmp_path / "equal/model.safetensors")
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    with pytest.raises(ValueError, match="`tie_word_embeddings` is True.*`lm_head.weight`.*`transformer.wte.weight`"):
        export_to_stock(model, tmp_path / "folder")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays(dtype, tmp_path):
    for name, model in {"text": LM.build(reorder_and_upcast_attn=True), "image": build_blip2("Model", "opt")}.items():
        model.save_pretrained(tmp_path / "ours")
        model = type(model).from_pretrained(tmp_path / "ours", dtype=dtype)
        export_to_stock(model, tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        stock = getattr(transformers, STOCK_CLASSES[type(model).__name__]).from_pretrained(tmp_path / name)
        # In half a BLIP-2 some are float32, which the host decides again.
        assert_same_weights(stock, model)


def test_shards_are_loaded_by_stock(tmp_path):
    model = LM.build()
    folder = export_to_stock(model, tmp_path / "folder", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    stock, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(stock, model)


def test_weights_are_not_copied(monkeypatch, tmp_path):
    model = build_blip2("ForConditionalGeneration")
    written = {}
    save = transformers.modeling_utils.safe_save_file

    def spy(tensors, *args, **kwargs):
        written.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", spy)
    export_to_stock(model, tmp_path / "folder")
    weights = model.state_dict()
    assert written and written == {name: weights[name].data_ptr() for name in written}


@pytest.mark.parametrize("name", ["GPT2DoubleHeadsModel", "Blip2ForConditionalGeneration custom_gpt2"])
def test_model_stays_as_it_is(name, tmp_path):
    model = build(name).train()
    next(model.parameters()).requires_grad_(False)
    generation = model.generation_config
    generation.max_new_tokens = 7
    config, config_object, settings = copy.deepcopy(model.config.to_dict()), model.config, generation.to_dict()
    state = [(name, weight, weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()]
    values, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    folder = export_to_stock(model, tmp_path / "folder")
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert model.config is config_object and model.config.to_dict() == config
    assert model.generation_config is generation and generation.to_dict() == settings
    now = [(name, weight, weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()]
    assert all(
        one[0] == other[0] and one[1] is other[1] and one[2:] == other[2:]
        for one, other in zip(state, now, strict=True)
    )
    assert all(torch.equal(values[name], weight) for name, weight in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_labels_and_problem_type_survive(tmp_path):
    names = {0: "no", 1: "perhaps", 2: "yes"}
    model = ROWS["BertForSequenceClassification"].build(
        id2label=names, label2id={v: k for k, v in names.items()}, problem_type="multi_label_classification"
    )
    config = transformers.AutoConfig.from_pretrained(export_to_stock(model, tmp_path / "folder"))
    assert config.id2label == names and config.problem_type == "multi_label_classification"
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (98, 97, 97)


def test_model_loaded_with_its_code_is_exported(tmp_path):
    """Whose configuration and class are of other modules, and whose configuration has an `auto_map`."""
    LM.build().save_pretrained(tmp_path / "ours")
    remote = transformers.dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_gpt2.CustomGPT2ForCausalLM", str(tmp_path / "ours")
    ).from_pretrained(tmp_path / "ours")
    assert type(remote) is not type(LM.build()) and remote.config.auto_map
    folder = export_to_stock(remote, tmp_path / "folder")
    assert "auto_map" not in (folder / "config.json").read_text()
    assert_same_weights(GPT2LMHeadModel.from_pretrained(folder), remote)
    # Its attention is that of its own code, and the package keeps that of its own.
    code = sys.modules[type(remote).__module__.replace("modeling_gpt2", "attention")]
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    assert functions["varlen"] is attention.varlen_attention_forward is not code.varlen_attention_forward
    assert functions[code.implementation_for("sdpa")] is code.varlen_attention_forward
    assert functions[attention.implementation_for("varlen")] is attention.varlen_attention_forward


# --- PEFT ---


def with_adapter():
    peft = pytest.importorskip("peft", reason="needs the extra `peft`: pip install hf_custom[peft]")
    model = peft.get_peft_model(LM.build(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    return widen(model, 0.05)


def test_merged_model_is_exported(tmp_path):
    model = with_adapter().eval()
    inputs = LM.inputs(padding="right")
    expected = real_outputs(model, inputs)
    folder = export_to_stock(model.merge_and_unload(), tmp_path / "folder")
    assert_outputs_near(real_outputs(GPT2LMHeadModel.from_pretrained(folder), inputs), expected)


@pytest.mark.parametrize("part", ["whole", "inner"])
def test_unmerged_adapters_are_refused(part, tmp_path):
    model = with_adapter()
    with pytest.raises(ValueError, match="adapters of PEFT.*merge_and_unload"):
        export_to_stock(model if part == "whole" else model.base_model.model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


# --- What is refused, before anything is written ---

GPT2_LM, BERT_CLASSIFIER = "GPT2ForCausalLM", "BertForSequenceClassification"
BLIP2_WRITER = "ForConditionalGeneration"
REFUSED = {
    "gpt2 rope": (lambda: LM.build(position_embedding_type="rope"), "`position_embedding_type` is 'rope'.*'learned'"),
    "gpt2 sinusoidal": (lambda: LM.build(position_embedding_type="sinusoidal"), "`position_embedding_type`"),
    "bert rope": (
        lambda: BASE.build(position_embedding_type="rope"),
        "`position_embedding_type` is 'rope'.*'absolute'",
    ),
    "bert sinusoidal": (lambda: BASE.build(position_embedding_type="sinusoidal"), "`position_embedding_type`"),
    "bert relative": (lambda: BASE.build(position_embedding_type="relative_key"), "is 'relative_key'"),
    "bert relative both": (lambda: BASE.build(position_embedding_type="relative_key_query"), "'relative_key_query'"),
    "bert images": (lambda: BASE.build(vision_config=SQUARE), "`vision_config`"),
    "bert classifier": (
        lambda: ROWS[BERT_CLASSIFIER].build(classifier_hidden_size=16),
        "`classifier_hidden_size` is 16.*None",
    ),
    "bert span labels": (lambda: ROWS["BertForQuestionAnswering"].build(), "`num_labels` is 3.* 2"),
    "choices summary": (lambda: ROWS["GPT2DoubleHeadsModel"].build(summary_type="mean"), "`summary_type` is 'mean'"),
    "image shape": (lambda: build_blip2("VisionModel", image_size=(8, 12)), r"`image_size` is \[8, 12\].*square"),
    "patch shape": (lambda: build_blip2("VisionModel", patch_size=(4, 2)), r"`patch_size` is \[4, 2\]"),
    "blip2 image": (
        lambda: build_blip2(BLIP2_WRITER, vision_config={"image_size": (8, 12)}),
        "`vision_config.image_size`",
    ),
    "blip2 text": (
        lambda: build_blip2(BLIP2_WRITER, text_config={"position_embedding_type": "rope"}),
        "`text_config.position_embedding_type` is 'rope'",
    ),
    "visual questions": (
        lambda: next(row for row in MODELS if row.name.endswith("VisualQuestionAnswering")).build(),
        "CustomBertForVisualQuestionAnswering has no stock counterpart.*save_pretrained",
    ),
    "bert retrieval": (
        lambda: next(row for row in MODELS if row.name.endswith("BertForImageTextRetrieval")).build(),
        "CustomBertForImageTextRetrieval has no stock counterpart.*save_pretrained",
    ),
    "image classes": (
        lambda: build_blip2("VisionForImageClassification"),
        "CustomBlip2VisionForImageClassification has no stock counterpart.*model.vision_model",
    ),
    "first stage": (
        lambda: build_blip2("ForPreTraining"),
        "CustomBlip2ForPreTraining has no stock counterpart.*CustomBlip2ForImageTextRetrieval",
    ),
    "stock": (lambda: stock_model("GPT2Model"), "GPT2Model has no stock counterpart.*CustomGPT2Model"),
    "extra weight": (
        lambda: with_weight(LM.build(), "bias_of_mine"),
        "stock has no weight `bias_of_mine`.*lost",
    ),
    "missing weight": (lambda: ROWS["BertForMaskedLM"].build().bert, "no weight `pooler.dense.bias`, `pooler.dense.w"),
    "wrong shape": (
        lambda: with_field(LM.build(), "vocab_size", 98),
        r"`lm_head.weight` has shape \(99, 32\).*\(98, 32\)|`transformer.wte.weight` has shape \(99, 32\)",
    ),
    "meta": (lambda: LM.build().to("meta"), "is not in memory"),
    "wrapped": (lambda: torch.nn.DataParallel(LM.build()), "DataParallel wraps the model.*`model.module`"),
    "quantized": (lambda: with_attribute(LM.build(), "hf_quantizer", object()), r"quantized.*dequantize\(\)"),
}


def with_attribute(model, name, value):
    setattr(model, name, value)
    return model


# The families that stock lacks.
REFUSED |= {
    row.name: (row.build, f"{row.model_class.__name__} has no stock counterpart.*save_pretrained")
    for row in SEQ2SEQ + RECURRENT
}
REFUSED |= {
    name: (
        lambda name=name: getattr(hf_custom, name)(hf_custom.CustomWord2VecConfig(vocab_size=9, hidden_size=4)),
        f"{name} has no stock counterpart.*training.word_vectors export",
    )
    for name in ("CustomWord2VecModel", "CustomWord2VecForPreTraining")
}


def with_weight(model, name):
    model.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    return model


def with_field(model, name, value):
    setattr(model.config, name, value)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_stock_cannot_express_is_refused(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        export_to_stock(make(), tmp_path / "folder" / "deep")
    assert not list(tmp_path.iterdir())


def test_every_rule_is_tried():
    messages = " ".join(message for _, message in REFUSED.values())
    rules = [name for family in FAMILIES.values() for name in family.only]
    rules += [name for rule in ONLY_OF_CLASS.values() for name in rule] + list(WITHOUT_STOCK)
    assert all(rule in messages for rule in rules)


# --- The folder ---


def test_folder_is_replaced_only_on_request(tmp_path):
    folder = tmp_path / "folder"
    assert export_to_stock(LM.build(), folder) == folder
    (folder / "old").write_text("old")
    with pytest.raises(FileExistsError, match="folder"):
        export_to_stock(LM.build(), folder)
    assert (folder / "old").is_file()
    export_to_stock(LM.build(), str(folder), overwrite=True)
    assert not (folder / "old").exists() and (folder / "model.safetensors").is_file()


def test_failure_leaves_what_was(monkeypatch, tmp_path):
    folder = export_to_stock(LM.build(), tmp_path / "folder")
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(transformers.GPT2Tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        export_to_stock(LM.build(), folder, tokenizer(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (folder / "model.safetensors").read_bytes() == before


# --- Tokenizer and processor ---


def test_tokenizer_is_loaded_by_stock(tmp_path):
    folder = export_to_stock(LM.build(), tmp_path / "folder", tokenizer())
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == expected
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("the cat").input_ids == tokenizer()("the cat").input_ids


@pytest.mark.parametrize("num_query_tokens", [QUERIES, None])
def test_processor_becomes_that_of_stock(num_query_tokens, tmp_path):
    ours = hf_custom.CustomBlip2Processor(image_processor(), tokenizer(), num_query_tokens=num_query_tokens)
    vocabulary = len(ours.tokenizer)
    folder = export_to_stock(build_blip2(BLIP2_WRITER), tmp_path / "folder", ours)
    assert not list(folder.glob("*.py"))
    for path in folder.glob("*.json"):
        assert "ustom" not in path.read_text() and "auto_map" not in path.read_text(), path.name
    loaded = transformers.AutoProcessor.from_pretrained(folder)
    assert type(loaded) is Blip2Processor and loaded.num_query_tokens == num_query_tokens
    found, expected = (reader(image(), "the cat", return_tensors="pt") for reader in (loaded, ours))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(ours.tokenizer) == vocabulary


class OwnTokenizer(transformers.GPT2Tokenizer):
    """Of nobody's but this test."""


@pytest.mark.parametrize("is_part", [False, True])
def test_tokenizer_with_code_of_its_own_is_refused(is_part, tmp_path):
    own = OwnTokenizer(vocab=tokenizer().get_vocab(), merges=[])
    if is_part:
        own = hf_custom.CustomBlip2Processor(image_processor(), own, num_query_tokens=QUERIES)
    with pytest.raises(ValueError, match="OwnTokenizer is no class of stock"):
        export_to_stock(LM.build(), tmp_path / "folder", own)
    assert not list(tmp_path.iterdir())
