"""Which parts of a BLIP-2 train: the frozen ones, adapters of a frozen one, and what is saved of those that train."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import assert_gradients_near, assert_near, gradients_of
from safetensors.torch import load_file
from tiny import BERT, GPT2, VISION, widen

from hf_custom import (
    CustomBlip2Config,
    CustomBlip2ForConditionalGeneration,
    CustomBlip2ForPreTraining,
    CustomBlip2Model,
)

WRITER, FIRST_STAGE = CustomBlip2ForConditionalGeneration, CustomBlip2ForPreTraining
DEFAULT = ("vision_model", "language_model")
IMAGE = 96
QFORMER = {
    "vocab_size": BERT["vocab_size"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 97,
}
TIED = "language_model.lm_head.weight"
each_stage = pytest.mark.parametrize("model_class", [WRITER, CustomBlip2Model, FIRST_STAGE])


def build(model_class=WRITER, dropout=0.0, **fields):
    """With dropout in the frozen parts alone."""
    config = CustomBlip2Config(
        vision_config={**VISION, "attention_dropout": dropout},
        qformer_config={**QFORMER, "use_qformer_text_input": model_class is FIRST_STAGE},
        text_config={**GPT2, "n_layer": 1, "resid_pdrop": dropout, "embd_pdrop": dropout},
        num_query_tokens=2,
        image_text_hidden_size=8,
        image_token_index=None if model_class is FIRST_STAGE else IMAGE,
        **fields,
    )
    return widen(model_class(config))


def pairs(model_class=WRITER):
    ids = torch.randint(2, 90, (3, 6))
    if model_class is FIRST_STAGE:
        return {"pixel_values": torch.randn(3, 3, *VISION["image_size"]), "input_ids": ids}
    ids[:, :2] = IMAGE
    return {"pixel_values": torch.randn(3, 3, *VISION["image_size"]), "input_ids": ids, "labels": ids}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_in(name, parts):
    return name.split(".")[0] in parts


def assert_frozen(model, parts):
    """All weights of these parts and no others; these stay in evaluation mode while the model trains."""
    names = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in names if not is_in(name, parts)}
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == mode
        for name, module in model.named_modules():
            assert module.training == (mode and not is_in(name, parts)), name


@each_stage
def test_large_parts_are_frozen_unless_told_otherwise(model_class, tmp_path):
    model = build(model_class)
    assert_frozen(model, DEFAULT)
    gradients = gradients_of(model, model(**pairs(model_class)).loss)
    assert gradients.keys() == trained(model)
    model.save_pretrained(tmp_path)
    assert_frozen(model_class.from_pretrained(tmp_path), DEFAULT)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_frozen(loaded, DEFAULT)
    # By the configuration as it was saved, or as told.
    assert_frozen(model_class.from_pretrained(tmp_path, frozen_modules=[]), ())


@pytest.mark.parametrize("parts", [(), ("vision_model",), ("vision_model", "qformer"), ("language_projection",)])
def test_named_parts_are_frozen(parts):
    assert_frozen(build(frozen_modules=list(parts)), parts)


def test_queries_may_be_frozen():
    model = build(frozen_modules=["query_tokens"])
    assert trained(model) == {name for name, _ in model.named_parameters()} - {"query_tokens"}


@each_stage
def test_frozen_parts_drop_nothing(model_class):
    """So what they give may be kept from step to step."""
    batch, losses = pairs(model_class), []
    for dropout in (0.5, 0.0):
        torch.manual_seed(1)
        model = build(model_class, dropout).train()
        losses.append(model(**batch).loss)
    assert torch.equal(*losses)
    torch.manual_seed(1)
    assert not torch.equal(build(model_class, 0.5, frozen_modules=[]).train()(**batch).loss, losses[0])


# --- Adapters ---


@pytest.mark.parametrize("adapts_whole", [False, True])
def test_adapters_of_a_frozen_language_model_train(adapts_whole):
    """Those of the language model alone, beside the parts that train, or of the whole model, where they alone do."""
    model, batch = build(dropout=0.5), pairs()
    others = trained(model)
    targets = r".*language_model\..*c_attn" if adapts_whole else ["c_attn"]
    adapters = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False)
    if adapts_whole:
        get_peft_model(model, adapters).train()
        others = set()
    else:
        model.language_model = get_peft_model(model.language_model, adapters)
        model.train()
    added = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert added and trained(model) == others | added
    # Its dropout is in training too.
    assert all(module.training for module in model.language_model.modules())
    assert not any(module.training for module in model.vision_model.modules())
    gradients = gradients_of(model, model(**batch).loss)
    assert gradients.keys() == trained(model)
    assert all(gradients[name].any() for name in added)
    assert added <= model.trained_state_dict().keys()
    model.eval()
    assert not any(module.training for module in model.modules())


# --- What is saved of those that train ---


@each_stage
def test_trained_weights_are_those_that_train(model_class):
    model = build(model_class)
    state, tied = model.trained_state_dict(), set()
    if model_class is FIRST_STAGE:
        # Each under both of its names.
        tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    # Those of frozen parts' buffers that are stored come along.
    buffers = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    assert state.keys() == trained(model) | tied | buffers
    for name, tensor in state.items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert TIED not in state


@each_stage
@torch.no_grad()
def test_folder_of_the_trained_weights_restores_the_model(model_class, tmp_path):
    model = build(model_class).eval()
    model.save_pretrained(tmp_path, state_dict=model.trained_state_dict())
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == trained(model)
    torch.manual_seed(7)
    fresh = build(model_class).eval()
    # The frozen parts come from where they came before.
    for part in DEFAULT:
        if hasattr(model, part):
            getattr(fresh, part).load_state_dict(getattr(model, part).state_dict())
    assert any(not torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    report = fresh.load_state_dict(stored, strict=False)
    assert not report.unexpected_keys
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    batch, outputs = pairs(model_class), []
    for found in (model, fresh):
        torch.manual_seed(1)
        outputs.append(found(**batch).loss)
    assert torch.equal(*outputs)


def test_queries_learn_to_steer_a_frozen_language_model():
    model = build().train()
    before = {name: weight.clone() for name, weight in model.language_model.state_dict().items()}
    batch, losses = pairs(), []
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in model.language_model.state_dict().items())


def test_micro_batches_checkpoints_and_compiled_graphs_give_the_gradient_of_the_batch():
    model, batch = build().train(), pairs()
    gradients = gradients_of(model, model(**batch).loss)
    count, sums = (batch["labels"][:, 1:] != -100).sum(), 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        sums = sums + model(**part, num_items_in_batch=count).loss
    assert_gradients_near(gradients_of(model, sums), gradients)
    model.gradient_checkpointing_enable()
    assert_gradients_near(gradients_of(model, model(**batch).loss), gradients)
    model.gradient_checkpointing_disable()
    inputs = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    inputs["attention_mask"][1, -2:] = 0
    del inputs["labels"]
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    is_real = inputs["attention_mask"].bool()
    assert_near(compiled(**inputs).logits[is_real], model(**inputs).logits[is_real])
