"""BLIP-2's vision tower against stock's with the same weights, saved folders, its classifier, and how it runs."""

import json
import logging

import pytest
import torch
from reference import (
    assert_gradients_near,
    assert_near,
    assert_outputs_near,
    gradients_of,
    weighted_sum,
)
from tiny import LABELS, name_of, widen
from transformers import (
    AutoModelForImageClassification,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    Blip2VisionModel,
    set_seed,
)

from hf_custom import CustomBlip2VisionConfig, CustomBlip2VisionForImageClassification, CustomBlip2VisionModel

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
# Of images 24 pixels high and 8 wide: a grid of 6 x 2 patches.
OBLONG = {"image_size": [24, 8]}
IMPLEMENTATIONS = ["eager", "sdpa"]
each_implementation = pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
each_bias = pytest.mark.parametrize("qkv_bias", [True, False])


def build(model_class=CustomBlip2VisionModel, attn_implementation="sdpa", **fields):
    """The model with wide weights, in evaluation mode."""
    config = CustomBlip2VisionConfig(**{**FIELDS, **fields})
    return widen(model_class._from_config(config, attn_implementation=attn_implementation)).eval()


def build_classifier(**fields):
    return build(CustomBlip2VisionForImageClassification, **{"num_labels": LABELS, **fields})


def stock_of(model):
    """Stock with the same weights."""
    declared = Blip2VisionConfig().to_dict().keys() - {"model_type", "transformers_version", "architectures"}
    config = Blip2VisionConfig(**{name: value for name, value in model.config.to_dict().items() if name in declared})
    stock = Blip2VisionModel._from_config(config, attn_implementation=model.config._attn_implementation)
    stock.load_state_dict(model.state_dict(), strict=True)
    return stock.eval()


def images(height=12, width=12, batch=2):
    return torch.randn(batch, 3, height, width)


def all_outputs(model, pixel_values, **kwargs):
    """Tensors by name, and the members of tuples as `name.index`."""
    found = {}
    for name, output in model(pixel_values, **kwargs).items():
        members = output if isinstance(output, tuple) else [output]
        found |= {f"{name}.{i}": member for i, member in enumerate(members)}
    return found


def asked_of(model):
    return {"output_hidden_states": True, "output_attentions": model.config._attn_implementation == "eager"}


# --- Parity ---

OPTIONS = [{}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}, {"num_hidden_layers": 0}]


@pytest.mark.parametrize("option", OPTIONS, ids=name_of)
@each_bias
@each_implementation
def test_tower_matches_stock(attn_implementation, qkv_bias, option):
    ours = build(attn_implementation=attn_implementation, qkv_bias=qkv_bias, **option)
    stock, pixel_values = stock_of(ours), images()
    outputs, expected = (all_outputs(model, pixel_values, **asked_of(ours)) for model in (ours, stock))
    assert_outputs_near(outputs, expected)
    layers = ours.config.num_hidden_layers
    assert f"hidden_states.{layers}" in outputs or layers == 0
    assert (f"attentions.{layers - 1}" in outputs) == (attn_implementation == "eager" and layers > 0)
    gradients = [gradients_of(model, weighted_sum(found)) for model, found in ((ours, outputs), (stock, expected))]
    assert_gradients_near(*gradients)
    assert len(gradients[0]) == len(list(ours.parameters()))


@pytest.mark.parametrize("size", [(12, 12), (20, 20), (8, 8), (16, 24), (4, 36)], ids=str)
@each_implementation
def test_interpolated_positions_match_stock(attn_implementation, size):
    ours = build(attn_implementation=attn_implementation)
    stock, pixel_values = stock_of(ours), images(*size)
    options = {**asked_of(ours), "interpolate_pos_encoding": True}
    if size == (4, 36):
        # As many patches as the model's grid has, in another shape: the positions are not those of the grid.
        assert not torch.allclose(ours.embeddings.interpolate_pos_encoding((1, 9)), ours.embeddings.position_embedding)
    outputs, expected = (all_outputs(model, pixel_values, **options) for model in (ours, stock))
    assert_outputs_near(outputs, expected)
    gradients = [gradients_of(model, weighted_sum(found)) for model, found in ((ours, outputs), (stock, expected))]
    assert_gradients_near(*gradients)


@each_implementation
def test_attention_dropout_follows_the_seed(attn_implementation):
    model = build(attn_implementation=attn_implementation, attention_dropout=0.5)
    pixel_values = images()
    expected = model(pixel_values).last_hidden_state
    outputs = []
    for seed in (1, 1, 2):
        set_seed(seed)
        outputs.append(model.train()(pixel_values).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    assert not torch.allclose(outputs[0], expected, atol=1e-3)
    assert torch.equal(model.eval()(pixel_values).last_hidden_state, expected)


# --- Shapes of images ---


def test_oblong_grid_is_cut_row_by_row():
    model = build(**OBLONG)
    pixel_values = images(24, 8)
    embeddings = model.embeddings(pixel_values)
    assert embeddings.shape == (2, 13, 32)
    weight, bias = model.embeddings.patch_embedding.weight.double(), model.embeddings.patch_embedding.bias.double()
    positions, patches = model.embeddings.position_embedding[0].double(), pixel_values.double()
    for b in range(2):
        assert_near(embeddings[b, 0], model.embeddings.class_embedding[0, 0] + positions[0])
        for row in range(6):
            for column in range(2):
                patch = patches[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                expected = (weight * patch).sum((1, 2, 3)) + bias + positions[1 + 2 * row + column]
                assert_near(embeddings[b, 1 + 2 * row + column], expected)


def test_oblong_patches_are_cut():
    model = build(image_size=(12, 8), patch_size=(6, 2))
    pixel_values = images(12, 8)
    assert model.embeddings(pixel_values).shape == (2, 9, 32)
    changed = pixel_values.clone()
    changed[:, :, 6:, 2:4] += 1.0
    is_changed = (model.embeddings(pixel_values) != model.embeddings(changed)).any(-1)
    assert is_changed.nonzero().tolist() == [[0, 6], [1, 6]]


@pytest.mark.parametrize("size", [(24, 8), (12, 16)], ids=str)
@each_implementation
def test_oblong_grid_is_interpolated_on_request(attn_implementation, size):
    """Like a grid of the other size whose positions are torch's bicubic picture of these."""
    model = build(attn_implementation=attn_implementation, **OBLONG)
    other = build(attn_implementation=attn_implementation, image_size=size)
    grid = (size[0] // 4, size[1] // 4)
    state = model.state_dict()
    table = state["embeddings.position_embedding"]
    picture = table[0, 1:].view(6, 2, 32).permute(2, 0, 1)[None]
    picture = torch.nn.functional.interpolate(picture, size=grid, mode="bicubic", align_corners=False)
    state["embeddings.position_embedding"] = torch.cat((table[:, :1], picture[0].flatten(1).t()[None]), dim=1)
    other.load_state_dict(state)
    pixel_values = images(*size)
    outputs = all_outputs(model, pixel_values, interpolate_pos_encoding=True)
    assert_outputs_near(outputs, all_outputs(other, pixel_values))


def test_request_to_interpolate_changes_nothing_at_the_size_of_the_model():
    model, pixel_values = build(**OBLONG), images(24, 8)
    expected = model(pixel_values).last_hidden_state
    assert torch.equal(model(pixel_values, interpolate_pos_encoding=True).last_hidden_state, expected)


BAD_IMAGES = {
    "grey": (torch.zeros(2, 1, 12, 12), {}, ValueError, ("`pixel_values`", "1 channels", "RGB")),
    "channels last": (torch.zeros(2, 12, 12, 3), {}, ValueError, ("`pixel_values`", "12 channels", "RGB")),
    "single": (torch.zeros(3, 12, 12), {}, ValueError, ("`pixel_values` has shape (3, 12, 12)", "(batch, 3")),
    "bytes": (torch.zeros(2, 3, 12, 12).byte(), {}, TypeError, ("`pixel_values`", "uint8", "image processor")),
    "uncut": (
        torch.zeros(2, 3, 12, 14),
        {"interpolate_pos_encoding": True},
        ValueError,
        ("patches of 4 x 4 pixels must divide", "Resize"),
    ),
    "empty": (torch.zeros(2, 3, 0, 12), {"interpolate_pos_encoding": True}, ValueError, ("(2, 3, 0, 12)", "Resize")),
    "other size": (
        torch.zeros(2, 3, 16, 12),
        {},
        ValueError,
        ("16 x 12 pixels", "12 x 12", "`interpolate_pos_encoding=True`"),
    ),
}


@pytest.mark.parametrize(("pixel_values", "kwargs", "error", "words"), BAD_IMAGES.values(), ids=BAD_IMAGES)
@pytest.mark.parametrize("make", [build, build_classifier], ids=["tower", "classifier"])
def test_bad_image_is_refused(make, pixel_values, kwargs, error, words):
    with pytest.raises(error) as caught:
        make()(pixel_values, **kwargs)
    assert all(word in str(caught.value) for word in words), caught.value


# --- Saved folders ---


@each_bias
def test_stock_folder_loads_and_goes_back(qkv_bias, tmp_path, caplog):
    stock, pixel_values = stock_of(build(qkv_bias=qkv_bias)), images()
    expected = stock(pixel_values).last_hidden_state
    stock.save_pretrained(tmp_path / "stock")
    with caplog.at_level(logging.WARNING):
        ours, report = CustomBlip2VisionModel.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values()), report
    assert not caplog.records
    assert_near(ours(pixel_values).last_hidden_state, expected)
    ours.save_pretrained(tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stored["model_type"] == "custom_blip2_vision_model"
    back, report = Blip2VisionModel.from_pretrained(tmp_path / "ours", config=stock.config, output_loading_info=True)
    assert not any(report.values()), report
    assert_near(back(pixel_values).last_hidden_state, expected)


def whole_blip2():
    """A tiny BLIP-2: tower, Q-Former and language model."""
    config = Blip2Config(
        vision_config=FIELDS,
        qformer_config={
            "vocab_size": 20,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "encoder_hidden_size": 32,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": 20,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
        },
        num_query_tokens=3,
    )
    return widen(Blip2ForConditionalGeneration(config)).eval()


def test_tower_of_a_whole_checkpoint_loads_in_silence(tmp_path, caplog):
    whole, pixel_values = whole_blip2(), images()
    whole.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        config = CustomBlip2VisionConfig(**FIELDS)
        ours, report = CustomBlip2VisionModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(report.values()), report
    assert not caplog.records
    assert_near(ours(pixel_values).last_hidden_state, whole.vision_model(pixel_values).last_hidden_state)


def test_configuration_of_a_whole_checkpoint_gives_the_towers(tmp_path):
    whole_blip2().save_pretrained(tmp_path)
    config = CustomBlip2VisionConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in FIELDS} == FIELDS
    assert type(CustomBlip2VisionModel.from_pretrained(tmp_path)) is CustomBlip2VisionModel


@pytest.mark.parametrize("make", [build, build_classifier], ids=["tower", "classifier"])
def test_saved_model_loads_with_its_shapes(make, tmp_path):
    model, pixel_values = make(**OBLONG), images(24, 8)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.image_shape == (24, 8)
    assert torch.equal(loaded(pixel_values)[0], model(pixel_values)[0])


# --- The classifier ---

PROBLEMS = {
    "single_label_classification": (lambda b: torch.randint(0, LABELS, (b,)), torch.nn.functional.cross_entropy),
    "multi_label_classification": (
        lambda b: torch.randint(0, 2, (b, LABELS)).float(),
        torch.nn.functional.binary_cross_entropy_with_logits,
    ),
    "regression": (lambda b: torch.randn(b, LABELS), torch.nn.functional.mse_loss),
}
each_problem = pytest.mark.parametrize("problem_type", PROBLEMS)


@each_problem
def test_classifier_reads_the_class_token(problem_type):
    model, pixel_values = build_classifier(problem_type=problem_type), images(batch=5)
    draw_labels, loss_of = PROBLEMS[problem_type]
    labels = draw_labels(5)
    outputs = model(pixel_values, labels=labels)
    pooled = model.vision_model(pixel_values).pooler_output.double()
    logits = pooled @ model.classifier.weight.double().t() + model.classifier.bias.double()
    assert_near(outputs.logits, logits)
    assert_near(outputs.loss, loss_of(logits, labels.double() if labels.is_floating_point() else labels), 1e-6)
    assert model(pixel_values).loss is None


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type"),
    [
        (torch.tensor([0, 2]), 3, "single_label_classification"),
        (torch.tensor([[0.0, 1, 1], [1, 0, 0]]), 3, "multi_label_classification"),
        (torch.tensor([0.5, 2]), 1, "regression"),
    ],
)
def test_problem_is_found_from_the_labels(labels, num_labels, problem_type):
    model = build_classifier(num_labels=num_labels)
    assert model(images(), labels=labels).loss.isfinite()
    assert model.config.problem_type == problem_type


@each_problem
def test_losses_of_micro_batches_add_up(problem_type):
    model, pixel_values = build_classifier(problem_type=problem_type), images(batch=6)
    labels = PROBLEMS[problem_type][0](6)
    whole = model(pixel_values, labels=labels).loss
    expected = gradients_of(model, whole)
    items = torch.tensor(labels.numel())
    parts = [
        model(pixel_values[rows], labels=labels[rows], num_items_in_batch=items).loss
        for rows in (slice(0, 1), slice(1, 6))
    ]
    assert_near(sum(parts), whole, 1e-6)
    assert_gradients_near(gradients_of(model, sum(parts)), expected)


def test_bad_label_is_refused_by_its_row():
    with pytest.raises(ValueError, match=r"`labels` holds 3 in row 1, but `num_labels` is 3"):
        build_classifier(problem_type="single_label_classification")(images(), labels=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"`labels` has shape \(3,\) but \(2,\) is needed"):
        build_classifier(problem_type="single_label_classification")(images(), labels=torch.tensor([0, 1, 2]))


def test_auto_class_gives_the_classifier(tmp_path):
    build_classifier().save_pretrained(tmp_path)
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is CustomBlip2VisionForImageClassification


def test_tower_loads_into_the_classifier(tmp_path):
    tower = build()
    tower.save_pretrained(tmp_path)
    model, report = CustomBlip2VisionForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"} and not report["unexpected_keys"]
    pixel_values = images()
    assert torch.equal(model.vision_model(pixel_values).last_hidden_state, tower(pixel_values).last_hidden_state)


# --- How it starts and runs ---

STD = 0.02
WIDE = {"hidden_size": 96, "intermediate_size": 160, "image_size": 64, "num_labels": 40}


def from_scratch(config):
    return CustomBlip2VisionForImageClassification(config)


def from_meta(config):
    with torch.device("meta"):
        model = CustomBlip2VisionForImageClassification(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    return model


@pytest.mark.parametrize("make", [from_scratch, from_meta])
def test_weights_start_so_that_they_train(make):
    model = make(CustomBlip2VisionConfig(**{**FIELDS, **WIDE}))
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        if name.endswith("bias"):
            assert not values.any(), name
        elif "norm" in name:
            assert (values == 1).all(), name
        else:
            error = 5 * STD / (2 * values.numel()) ** 0.5
            assert abs(values.std(correction=0) - STD) < error, name
            assert abs(values.mean()) < 5 * STD / values.numel() ** 0.5, name
    assert model(images(64, 64)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["class_embedding", "position_embedding"])
def test_missing_table_is_drawn_anew(name, tmp_path):
    model = build(**{**WIDE, "num_labels": 2})
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith(name)}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, report = CustomBlip2VisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {f"embeddings.{name}"}
    values = getattr(loaded.embeddings, name)
    assert abs(values.std(correction=0) - STD) < 5 * STD / (2 * values.numel()) ** 0.5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model, pixel_values = build_classifier(attention_dropout=0.2).train(), images()
    labels, found = torch.tensor([0, 2]), []
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        runs, projection = [], model.vision_model.encoder.layers[0].mlp.fc1
        hook = projection.register_forward_hook(lambda *args, runs=runs: runs.append(1))
        set_seed(1)
        loss = model(pixel_values, labels=labels).loss
        found.append((loss.detach(), gradients_of(model, loss)))
        hook.remove()
        assert len(runs) == 1 + is_checkpointing
    assert torch.equal(found[0][0], found[1][0])
    assert_gradients_near(found[1][1], found[0][1], 1e-6)


@each_implementation
def test_compiled_tower_gives_the_same_in_one_graph(attn_implementation):
    model, pixel_values = build_classifier(attn_implementation=attn_implementation), images()
    labels = torch.tensor([0, 2])
    model.config.problem_type = "single_label_classification"
    expected = model(pixel_values, labels=labels)
    expected_gradients = gradients_of(model, expected.loss)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = compiled(pixel_values, labels=labels)
    assert_near(outputs.logits, expected.logits)
    assert_gradients_near(gradients_of(model, outputs.loss), expected_gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_implementation
def test_half_precision_is_near_float32(attn_implementation, dtype):
    model, pixel_values = build_classifier(attn_implementation=attn_implementation), images()
    expected = model(pixel_values, output_hidden_states=True)
    outputs = model.to(dtype)(pixel_values, output_hidden_states=True)
    assert outputs.logits.dtype == outputs.hidden_states[-1].dtype == dtype
    error = (outputs.logits.float() - expected.logits).norm() / expected.logits.norm()
    assert error < 16 * torch.finfo(dtype).eps
    model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
