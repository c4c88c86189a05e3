"""What the suites that compare a family with stock share: pairs of models, agreement, folders, generation."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from reference import assert_gradients_near, assert_near, assert_outputs_near, gradients_of, real_outputs, weighted_sum


@dataclass(frozen=True)
class Pair:
    """A stock class, the row of our class in tiny.MODELS, and the fields and labels that pose one problem to both."""

    stock_class: type
    row: Any
    fields: dict
    draw_labels: Any

    def build(self, **options):
        """Ours with wide weights, and stock with the same."""
        fields = {**self.fields, **options}
        attn_implementation = fields.pop("attn_implementation", "eager")
        ours = self.row.build(**fields, attn_implementation=attn_implementation)
        config = self.stock_class.config_class(**{**self.row.fields, **fields})
        stock = self.stock_class._from_config(config, attn_implementation=attn_implementation).eval()
        stock.load_state_dict(ours.state_dict(), strict=True)
        return ours, stock


def pair(stock_name, row, fields=None, draw_labels=None):
    return Pair(getattr(transformers, stock_name), row, fields or {}, draw_labels or row.draw_labels)


def draw_encoder(rows, width):
    """States of another model, the last of them padding in every row but the first."""
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[1:, -2:] = 0
    return {"encoder_hidden_states": torch.randn(rows, 5, width), "encoder_attention_mask": mask}


def with_positions(inputs):
    """The same, with the positions that stock does not count itself."""
    mask = inputs["attention_mask"].flatten(end_dim=-2)
    return {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def assert_agree(ours, stock, inputs, labels, stock_inputs=None, stock_labels=None, **asked):
    """Outputs, hidden states and attention maps at real positions; losses; the gradient of every parameter."""
    stock_inputs = with_positions(inputs) if stock_inputs is None else stock_inputs
    stock_labels = labels if stock_labels is None else stock_labels
    is_eager = ours.config._attn_implementation == "eager"
    asked = {"output_hidden_states": True, "output_attentions": is_eager, **asked}
    outputs = real_outputs(ours, inputs, **asked)
    expected_outputs = real_outputs(stock, stock_inputs, **asked)
    assert_outputs_near(outputs, expected_outputs)
    if labels:
        outputs, expected_outputs = ours.train()(**inputs, **labels), stock.train()(**stock_inputs, **stock_labels)
        names = [name for name in expected_outputs if name.endswith("loss")]
        for name in names:
            assert_near(outputs[name], expected_outputs[name], 1e-6, name, scale_floor=0.0)
        objective, expected = (sum(found[name] for name in names) for found in (outputs, expected_outputs))
    else:
        objective, expected = weighted_sum(outputs), weighted_sum(expected_outputs)
    assert_gradients_near(gradients_of(ours, objective), gradients_of(stock, expected))


# --- Saved folders ---


def load_fully(model_class, folder):
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert {name: list(keys) for name, keys in report.items() if keys} == {}
    return model


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


# --- Generation ---

DECODING = {
    "greedy": {"do_sample": False, "max_new_tokens": 64},
    "beam": {"do_sample": False, "max_new_tokens": 20, "num_beams": 4},
    "sample": {"do_sample": True, "max_new_tokens": 20, "temperature": 1.5, "top_k": 30, "top_p": 0.9},
}


def assert_generate_alike(ours, stock, inputs, stock_cache=None, **decoding):
    given = {} if stock_cache is None else {"past_key_values": stock_cache}
    transformers.set_seed(1)
    expected = stock.generate(**inputs, **given, **decoding)
    transformers.set_seed(1)
    assert torch.equal(ours.generate(**inputs, **decoding), expected)
    return expected
