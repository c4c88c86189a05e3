"""Projections as `nn.Linear`, weights converted on the way, and models divided among processes by the host's plans."""

import copy
import inspect
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from parity import assert_same_weights, load_fully
from peft import LoraConfig, PeftModel, get_peft_model
from reference import assert_gradients_near, assert_near, gradients_of
from safetensors.torch import load_file
from test_distributed import free_port
from tiny import BATCH, BERT_WITH_IMAGES, LENGTH, MODELS, VARIANTS, VISION, widen
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.distributed import DistributedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_custom
from hf_custom import (
    CustomBertConfig,
    CustomBlip2Config,
    CustomBlip2ForConditionalGeneration,
    CustomBlip2QFormerConfig,
    CustomBlip2VisionConfig,
    CustomGPT2Config,
    CustomGPT2ForCausalLM,
    CustomGPT2Model,
    export_to_stock,
    layers,
)

ROOT = Path(__file__).parent.parent
ROWS = {row.name: row for row in MODELS + VARIANTS}
LM = ROWS["CustomGPT2ForCausalLM"]
LINEAR = {"projection_layout": "linear"}
CROSS = {"add_cross_attention": True}
IMAGE_ID, NUM_QUERIES = 96, 4


def blip2_config(**text_fields) -> CustomBlip2Config:
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return CustomBlip2Config(
        vision_config=CustomBlip2VisionConfig(**VISION),
        qformer_config=CustomBlip2QFormerConfig(**qformer, **dropout, vocab_size=99, encoder_hidden_size=24),
        text_config=LM.config(**text_fields),
        num_query_tokens=NUM_QUERIES,
        image_token_id=IMAGE_ID,
    )


def gpt2_inputs(padding="right"):
    inputs = LM.inputs(padding=padding)
    return inputs, {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def cross_inputs():
    inputs, labels = gpt2_inputs("left")
    mask = torch.ones(BATCH, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {**inputs, "encoder_hidden_states": torch.randn(BATCH, 5, 32), "encoder_attention_mask": mask}, labels


def masked_inputs(name):
    row = ROWS[name]
    return row.inputs(padding="right"), row.draw_labels(BATCH, LENGTH)


def blip2_inputs():
    ids = torch.randint(0, 90, (2, 9))
    ids[:, :NUM_QUERIES] = IMAGE_ID
    images = torch.randn(2, 3, *VISION["image_size"])
    return {"pixel_values": images, "input_ids": ids}, {"labels": ids.masked_fill(ids == IMAGE_ID, -100)}


@dataclass(frozen=True)
class Case:
    """A model that is divided, and what it reads."""

    model_class: type
    config: object
    draw_inputs: object
    blocks: str
    plan: str | dict = "auto"
    is_generative: bool = False

    def build(self):
        torch.manual_seed(1)
        return widen(self.model_class._from_config(self.config, attn_implementation="sdpa")).eval()


GPT2_VOCABULARY = {"transformer.wte": "embedding_rowwise", "lm_head": "colwise_gather_output"}
BERT_VOCABULARY = {
    "bert.embeddings.word_embeddings": "embedding_rowwise",
    "cls.predictions.bias": "colwise",
    "cls.predictions.decoder": "colwise_gather_output",
}
BERT_CLASS, MLM = hf_custom.CustomBertForMaskedLM, ROWS["CustomBertForMaskedLM"]
RELATIVE = {"position_embedding_type": "relative_key_query"}


def cases() -> dict[str, Case]:
    return {
        "gpt2": Case(CustomGPT2ForCausalLM, LM.config(**LINEAR), gpt2_inputs, "transformer.h", is_generative=True),
        "gpt2 vocabulary": Case(
            CustomGPT2ForCausalLM, LM.config(**LINEAR), gpt2_inputs, "transformer.h", plan=GPT2_VOCABULARY
        ),
        "gpt2 cross": Case(
            CustomGPT2ForCausalLM,
            LM.config(**LINEAR, **CROSS, position_embedding_type="rope"),
            cross_inputs,
            "transformer.h",
            is_generative=True,
        ),
        "bert": Case(BERT_CLASS, MLM.config(), lambda: masked_inputs(MLM.name), "bert.encoder.layer"),
        "bert vocabulary": Case(
            BERT_CLASS, MLM.config(), lambda: masked_inputs(MLM.name), "bert.encoder.layer", plan=BERT_VOCABULARY
        ),
        "bert images": Case(
            BERT_CLASS,
            VARIANTS[0].config(**RELATIVE),
            lambda: masked_inputs(VARIANTS[0].name),
            "bert.encoder.layer",
        ),
        "blip2": Case(
            CustomBlip2ForConditionalGeneration, blip2_config(**LINEAR), blip2_inputs, "language_model.transformer.h"
        ),
    }


PROCESSES, STEPS, NEW_TOKENS = 2, 3, 8
# What cannot be divided: a model, the plan asked for, and what the refusal says.
REFUSED = {
    "conv1d": (LM.model_class, lambda: LM.config(), {"tp_size": 2}, "`projection_layout` is 'conv1d'"),
    "conv1d in a whole": (
        CustomBlip2ForConditionalGeneration,
        blip2_config,
        {"tp_size": 2},
        "`projection_layout` of `language_model` is 'conv1d'",
    ),
    "gpt2 heads": (LM.model_class, lambda: LM.config(n_head=1, **LINEAR), {"tp_size": 2}, "`n_head` is 1, which 2"),
    "bert heads": (BERT_CLASS, lambda: MLM.config(num_attention_heads=1), {"tp_size": 2}, "`num_attention_heads` is 1"),
    "gpt2 stages": (LM.model_class, lambda: LM.config(**LINEAR), {"pp_size": 2}, "Set `pp_size=1`"),
    "bert stages": (BERT_CLASS, lambda: MLM.config(), {"pp_size": 2}, "Set `pp_size=1`"),
}


# --- What each process does ---


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def observe(model, case: Case, inputs: dict, labels: dict) -> dict:
    """What a model computes, alone or divided, in the form of the whole."""
    shapes = []
    hook = model.get_submodule(f"{case.blocks}.0").register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape[:2]))
    )
    with torch.no_grad():
        found = {"logits": model(**inputs).logits}
    if case.is_generative:
        found["tokens"] = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        static = (
            {"cache_implementation": "static", "disable_compile": True} if "encoder_hidden_states" not in inputs else {}
        )
        found["beams"] = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=3, eos_token_id=None, **static
        )
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs, **labels).loss
        loss.backward()
        losses.append(loss.detach())
        if "gradients" not in found:
            found["gradients"] = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    hook.remove()
    found["shapes"] = [shapes[0], shapes[-1]]
    found["losses"] = torch.stack(losses)
    found["weights"] = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return found


def divide(case: Case, folder: Path) -> tuple[object, dict]:
    plan = {"tp_plan": "auto"}
    if case.plan != "auto":
        plan = {"distributed_config": DistributedConfig(tp_size=PROCESSES, tp_plan=case.plan)}
    model, report = case.model_class.from_pretrained(folder, output_loading_info=True, **plan)
    return model, {name: list(keys) for name, keys in report.items() if keys}


def work(folder: Path) -> None:
    """One process of several: each case divided, from what the test has saved; then what is refused."""
    torch.set_num_threads(1)
    rank, given, found = os.environ["RANK"], torch.load(folder / "given.pt"), {}
    for name, case in cases().items():
        model, report = divide(case, folder / name)
        shards = [key for key, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        model.save_pretrained(folder / f"{name} again")
        found[name] = {"report": report, "shards": shards, **observe(model, case, *given[name])}
    refusals = {}
    for name, (model_class, _, sizes, _) in REFUSED.items():
        try:
            model_class.from_pretrained(folder / name, distributed_config=DistributedConfig(**sizes))
        except ValueError as error:
            refusals[name] = str(error)
    torch.save((found, refusals), folder / f"found-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# --- The same as one process ---


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """What one process computes and what each of several does, by case; their refusals; and the folder of all."""
    folder, expected, given = tmp_path_factory.mktemp("divided"), {}, {}
    for name, case in cases().items():
        torch.manual_seed(2)
        given[name] = case.draw_inputs()
        model = case.build()
        model.save_pretrained(folder / name)
        expected[name] = observe(model, case, *given[name])
    for name, (model_class, config, *_) in REFUSED.items():
        model_class(config()).save_pretrained(folder / name)
    torch.save(given, folder / "given.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(PROCESSES), "PYTHONPATH": str(ROOT)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(folder)]
    ranks = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(PROCESSES)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, env=rank, **pipes) for rank in ranks]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, outputs[0][-3000:] + outputs[1][-3000:]
    found = [torch.load(folder / f"found-{rank}.pt") for rank in range(PROCESSES)]
    return expected, [results for results, _ in found], [refusals for _, refusals in found], folder


each_case = pytest.mark.parametrize("name", cases())


@each_case
def test_divided_model_computes_what_the_whole_does(name, divided):
    expected, found, *_ = divided
    for rank in range(PROCESSES):
        actual, whole_model = found[rank][name], expected[name]
        assert actual["report"] == {} and actual["shards"]
        assert actual["shapes"] == whole_model["shapes"]
        assert_near(actual["logits"], whole_model["logits"], name="logits")
        assert_near(actual["losses"], whole_model["losses"], 1e-6, "losses", scale_floor=0.0)
        assert_gradients_near(actual["gradients"], whole_model["gradients"])
        for weight, tensor in whole_model["weights"].items():
            assert_near(actual["weights"][weight], tensor, name=weight)
        for tokens in {"tokens", "beams"} & whole_model.keys():
            assert torch.equal(actual[tokens], whole_model[tokens])


def test_padded_batch_is_divided_without_its_padding(divided):
    _, found, *_ = divided
    num_tokens = int(gpt2_inputs()[0]["attention_mask"].sum())
    assert num_tokens < BATCH * LENGTH and found[0]["gpt2"]["shapes"] == [(BATCH, LENGTH), (1, num_tokens)]


@each_case
def test_divided_model_saves_the_whole_checkpoint(name, divided):
    *_, folder = divided
    saved, again = (load_file(folder / kind / "model.safetensors") for kind in (name, f"{name} again"))
    # The host writes a tied weight twice, once it has gathered its shards.
    ties = cases()[name].build().all_tied_weights_keys
    assert saved.keys() <= again.keys() and again.keys() - saved.keys() <= set(ties)
    for key in again:
        assert torch.equal(again[key], saved[ties[key] if key not in saved else key]), key
    load_fully(cases()[name].model_class, folder / f"{name} again")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused_by_name(name, divided):
    *_, refusals, _ = divided
    for rank in range(PROCESSES):
        assert REFUSED[name][-1] in refusals[rank][name]


# --- Plans ---


def parts_of(config, model) -> list[tuple[str, nn.Module]]:
    """The linear maps of the layers, of which each has heads or inner units on one side."""
    return [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | nn.Embedding) and any(piece.isdigit() for piece in name.split("."))
    ]


PLANNED = {
    **{f"{row.name}": (row.model_class, row.config()) for row in MODELS if row.config_class is CustomBertConfig},
    **{row.name: (row.model_class, row.config(**LINEAR)) for row in MODELS if row.config_class is CustomGPT2Config},
    "cross-attention": (CustomGPT2Model, LM.config(**LINEAR, **CROSS)),
    "bert cross-attention": (hf_custom.CustomBertModel, MLM.config(is_decoder=True, **CROSS)),
    "relative": (hf_custom.CustomBertModel, MLM.config(**RELATIVE)),
    "images": (hf_custom.CustomBertModel, CustomBertConfig(**BERT_WITH_IMAGES)),
    "blip2": (CustomBlip2ForConditionalGeneration, blip2_config(**LINEAR)),
    "reader of text": (
        hf_custom.CustomBlip2QFormerModel,
        CustomBlip2QFormerConfig(
            num_hidden_layers=2, hidden_size=24, num_attention_heads=2, use_qformer_text_input=True
        ),
    ),
}


@pytest.mark.parametrize("name", PLANNED)
def test_plan_divides_every_projection_of_the_layers(name):
    model_class, config = PLANNED[name]
    with torch.device("meta"):
        model = model_class(config)
    divided = {part.replace("*", digit) for part in model.tp_plan for digit in "012"}
    projections = {part for part, _ in parts_of(config, model)}
    assert projections and projections <= divided
    names = {part for part, _ in model.named_modules()}
    assert all(any(part.replace("*", digit) in names for digit in "012") for part in model.tp_plan)


@pytest.mark.parametrize("row", [LM, MLM], ids=lambda row: row.name)
def test_pipeline_plan_names_parts_and_what_they_pass_on(row):
    model = row.build().base_model
    plan = row.config().base_model_pp_plan
    assert model.pp_plan == plan
    # In the order of the computation, each reading what the one before has written or the caller gives.
    children = [name for name, _ in model.named_children() if name in plan]
    assert children == list(plan)
    calls = []
    for name in plan:
        part = getattr(model, name)
        for stage in part if isinstance(part, nn.ModuleList) else [part]:
            stage.register_forward_hook(lambda module, args, output, name=name: calls.append((name, args, output)))
    model(row.inputs()["input_ids"])
    assert list(dict.fromkeys(name for name, *_ in calls)) == list(plan)
    for name, (inputs, outputs) in plan.items():
        part = getattr(model, name)
        part = part[0] if isinstance(part, nn.ModuleList) else part
        takes = inspect.signature(part.forward).parameters
        if not isinstance(part, nn.Embedding | nn.LayerNorm):
            assert set(inputs) <= takes.keys() or "args" in takes
        found = [output for called, _, output in calls if called == name]
        assert len(outputs) == 1 and all(output.shape == (BATCH, LENGTH, 32) for output in found)


def test_conv1d_has_no_plan():
    assert LM.config().base_model_tp_plan is None and LM.build().tp_plan == {}


# --- Layouts ---


def transposed(model, tensors: dict) -> dict:
    """Tensors by parameter name in the layout of the files."""
    names = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, layers.Linear)}
    return {name: tensor.t() if name in names else tensor for name, tensor in tensors.items()}


def stock_folder(tmp_path, **fields) -> Path:
    config = GPT2LMHeadModel.config_class(**{k: v for k, v in LM.fields.items() if k != "num_labels"}, **fields)
    widen(GPT2LMHeadModel(config)).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.mark.parametrize("fields", [{}, CROSS], ids=["self", "cross"])
def test_stock_checkpoint_gives_its_numbers_in_the_linear_layout(fields, tmp_path):
    folder = stock_folder(tmp_path, **fields)
    stock = GPT2LMHeadModel.from_pretrained(folder)
    model, report = CustomGPT2ForCausalLM.from_pretrained(folder, **LINEAR, output_loading_info=True)
    assert not any(report.values())
    projections = {name.split(".")[-1] for name, part in model.named_modules() if type(part) is layers.Linear}
    assert projections == {"c_attn", "c_proj", "c_fc"} | ({"q_attn"} if fields else set())
    assert not any(isinstance(part, layers.Conv1D) for part in model.modules())
    inputs = {"input_ids": LM.inputs()["input_ids"]}
    if fields:
        inputs["encoder_hidden_states"] = torch.randn(BATCH, 5, 32)
    outputs, expected = model(**inputs, labels=inputs["input_ids"]), stock(**inputs, labels=inputs["input_ids"])
    assert_near(outputs.logits, expected.logits)
    assert_near(outputs.loss, expected.loss, 1e-6, scale_floor=0.0)
    actual = transposed(model, gradients_of(model, outputs.loss))
    assert_gradients_near(actual, gradients_of(stock, expected.loss))
    length = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 98}
    assert torch.equal(model.generate(**inputs, **length), stock.generate(**inputs, **length))


LAYOUTS = ("conv1d", "linear")


@pytest.mark.parametrize("fields", [{}, CROSS, {"tie_word_embeddings": False}], ids=["self", "cross", "untied"])
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_loads_from_every_other_and_saves_the_same_file(source, target, fields, tmp_path):
    model = LM.build(projection_layout=source, **fields)
    model.save_pretrained(tmp_path / "source")
    loaded, report = CustomGPT2ForCausalLM.from_pretrained(
        tmp_path / "source", projection_layout=target, output_loading_info=True
    )
    assert not any(report.values()) and loaded.config.projection_layout == target
    assert_same_weights(loaded, model)
    inputs = LM.inputs(padding="left")
    assert_near(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path / "target")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("source", "target")]
    assert files[0].keys() == files[1].keys() and files[0]["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    # Without the language model's head, and with it missing.
    base = CustomGPT2Model.from_pretrained(tmp_path / "target", projection_layout=source)
    assert_same_weights(base, model.transformer)
    base.save_pretrained(tmp_path / "base")
    whole_model, report = CustomGPT2ForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    assert_same_weights(whole_model.transformer, model.transformer)


def test_layout_is_saved_and_read_again(tmp_path):
    model = LM.build(**LINEAR)
    model.save_pretrained(tmp_path)
    assert CustomGPT2Config.from_pretrained(tmp_path).projection_layout == "linear"
    assert type(load_fully(CustomGPT2ForCausalLM, tmp_path).transformer.h[0].mlp.c_fc) is layers.Linear
    for layout, layer in layers.PROJECTIONS.items():
        assert CustomGPT2Config.from_pretrained(tmp_path, projection_layout=layout).projection_layout == layout
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, projection_layout=layout)
        assert type(loaded.transformer.h[0].mlp.c_fc) is layer


def test_wrong_checkpoint_of_a_projection_is_reported(tmp_path):
    LM.build(n_inner=40).save_pretrained(tmp_path)
    _, report = CustomGPT2ForCausalLM.from_pretrained(
        tmp_path, **LINEAR, n_inner=48, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in report["mismatched_keys"]} == {
        f"transformer.h.{layer}.mlp.{name}"
        for layer in range(3)
        for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight")
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_state_dict_is_the_same_for_both_layouts(source, target, assign, tmp_path):
    """As the Trainer resumes: from the file, past `from_pretrained`."""
    model, other = LM.build(projection_layout=source), LM.build(projection_layout=target)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    result = other.load_state_dict(weights, strict=False, assign=assign)
    assert result.missing_keys == ["lm_head.weight"] and not result.unexpected_keys
    other.tie_weights()
    assert all(parameter.is_contiguous() for parameter in other.parameters())
    assert_same_weights(other, model)
    inputs = LM.inputs()
    assert_near(other(**inputs).logits, model(**inputs).logits)


def test_state_dict_holds_the_parameters_themselves():
    model = LM.build(**LINEAR)
    projection = model.transformer.h[1].attn.c_proj
    model.state_dict()["transformer.h.1.attn.c_proj.weight"][3, 5] = 7.0
    assert projection.weight[5, 3] == 7.0


def test_shards_and_half_precision_keep_the_weights(tmp_path):
    model = LM.build(**LINEAR).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = CustomGPT2ForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_same_weights(loaded, model)


def test_blip2_loads_its_language_model_in_either_layout(tmp_path):
    model = widen(CustomBlip2ForConditionalGeneration(blip2_config(**LINEAR))).eval()
    model.save_pretrained(tmp_path / "linear")
    loaded = load_fully(CustomBlip2ForConditionalGeneration, tmp_path / "linear")
    assert_same_weights(loaded, model)
    config = CustomBlip2Config.from_pretrained(tmp_path / "linear")
    config.text_config.projection_layout = "conv1d"
    other = CustomBlip2ForConditionalGeneration.from_pretrained(tmp_path / "linear", config=config)
    inputs, _ = blip2_inputs()
    assert_near(other(**inputs).logits, model(**inputs).logits)


def test_export_is_the_stock_checkpoint(tmp_path):
    model = LM.build(**LINEAR)
    export_to_stock(model, tmp_path / "stock")
    stock, report = GPT2LMHeadModel.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values()) and not hasattr(stock.config, "projection_layout")
    inputs = LM.inputs()
    assert_near(model(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_of_a_folder_loads_it_in_either_layout(layout, tmp_path):
    model = LM.build(**LINEAR)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "parallel.py").is_file()
    own = get_class_from_dynamic_module("modeling_gpt2.CustomGPT2ForCausalLM", tmp_path)
    assert own is not CustomGPT2ForCausalLM and own.__module__.startswith("transformers_modules.")
    config = get_class_from_dynamic_module("configuration_gpt2.CustomGPT2Config", tmp_path).from_pretrained(tmp_path)
    config.projection_layout = layout
    loaded, report = own.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(report.values())
    projection = loaded.transformer.h[0].mlp.c_fc
    assert isinstance(projection, nn.Linear) == (layout == "linear")
    assert type(projection).__module__.startswith("transformers_modules.")
    inputs = LM.inputs()
    assert_near(loaded(**inputs).logits, model(**inputs).logits)
    # And after it this package's own class still does.
    assert_same_weights(load_fully(CustomGPT2ForCausalLM, tmp_path), model)


@pytest.mark.parametrize("value", ["rows", "Linear", None, 1])
def test_layout_that_does_not_exist_is_refused(value):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match="projection_layout"):
        LM.config(projection_layout=value)


def test_weights_start_with_the_statistics_of_conv1d():
    model = CustomGPT2Model(LM.config(n_embd=96, n_layer=4, initializer_range=0.03, **LINEAR))
    for block in model.h:
        for projection, std in (
            (block.attn.c_attn, 0.03),
            (block.mlp.c_fc, 0.03),
            (block.attn.c_proj, 0.03 / 8**0.5),
            (block.mlp.c_proj, 0.03 / 8**0.5),
        ):
            assert projection.weight.std().item() == pytest.approx(std, rel=0.05)
            assert not projection.bias.any()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_adapters_take_every_projection_and_merge(tmp_path):
    model, inputs = LM.build(**LINEAR), LM.inputs()
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert sum(name.endswith("c_attn") for name in adapted.targeted_module_names) == 3
    assert len(adapted.targeted_module_names) == 12
    expected = adapted.eval()(**inputs).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert_near(PeftModel.from_pretrained(base, tmp_path / "adapter")(**inputs).logits, expected)
    merged = adapted.merge_and_unload()
    assert_near(merged(**inputs).logits, expected)
    merged.save_pretrained(tmp_path / "merged")
    assert_near(load_fully(CustomGPT2ForCausalLM, tmp_path / "merged")(**inputs).logits, expected)


def test_weights_and_their_shards_are_exchanged(tmp_path):
    """As FSDP2 does, whose shards are of the parameters, and Accelerate, which puts shards in their place."""
    model, other = LM.build(**LINEAR), LM.build(**LINEAR)
    inputs = LM.inputs()
    expected, logits = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(**inputs).logits
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.transformer.h, model, *other.transformer.h, other):
            fully_shard(part, mesh=mesh)
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        shards = {
            name: distribute_tensor(found[name], shard.device_mesh, shard.placements)
            for name, shard in other.state_dict().items()
        }
        other.load_state_dict(shards, assign=True)
        assert_near(other(**inputs).logits, logits)
    finally:
        torch.distributed.destroy_process_group()


def test_compiles_as_one_graph():
    model, inputs = LM.build(n_layer=1, **LINEAR), LM.inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(compiled(**inputs, use_cache=False).logits, model(**inputs).logits)


def test_zero_3_is_refused(monkeypatch):
    monkeypatch.setattr(layers, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="projection_layout='conv1d'"):
        CustomGPT2Model(LM.config(**LINEAR))
    CustomGPT2Model(LM.config())


if __name__ == "__main__":
    work(Path(sys.argv[1]))
