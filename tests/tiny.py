"""The table that the conformance suite runs over: one row a model class, with a tiny configuration and its inputs.

A new family is added here, by rows in `MODELS` and in `OPTIONS`, and by nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GPT2Tokenizer

import hf_custom
from hf_custom.configuration_gpt2 import CustomGPT2Config

BATCH, LENGTH, VOCAB, LABELS = 3, 11, 99, 3

GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 97,
    "eos_token_id": 97,
    "pad_token_id": 98,
    "num_labels": LABELS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "summary_first_dropout": 0.0,
    "classifier_dropout": 0.0,
}


@dataclass(frozen=True)
class TinyModel:
    """A model class, the fields of its tiny configuration and how to draw labels for inputs of shape (B, T)."""

    model_class: type
    config_class: type
    fields: dict
    draw_labels: Callable[[int, int], dict[str, torch.Tensor]]
    num_choices: int | None = None
    # The argument that names the position standing for a sequence; the last one, padding or not, when not passed.
    index_argument: str | None = None
    is_generative: bool = False

    @property
    def name(self) -> str:
        return self.model_class.__name__

    def config(self, **overrides):
        return self.config_class(**{**self.fields, **overrides})

    def build(self, **overrides):
        """The model with wide weights, in evaluation mode."""
        attn_implementation = overrides.pop("attn_implementation", "sdpa")
        model = self.model_class._from_config(self.config(**overrides), attn_implementation=attn_implementation)
        return widen(model).eval()

    def inputs(self, batch: int = BATCH, length: int = LENGTH, padding: str | None = None) -> dict[str, torch.Tensor]:
        """Ids without special tokens and, for `padding` left or right, a mask that shortens every row but the first."""
        lead = (batch,) if self.num_choices is None else (batch, self.num_choices)
        input_ids = torch.randint(0, VOCAB - 2, (*lead, length))
        if padding is None:
            return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        rows = input_ids.view(-1, length).shape[0]
        lengths = torch.tensor([length - 2 * row % (length - 1) for row in range(rows)])
        columns = torch.arange(length)
        mask = columns < lengths[:, None] if padding == "right" else columns >= length - lengths[:, None]
        mask = mask.view_as(input_ids)
        return {"input_ids": input_ids.masked_fill(~mask, VOCAB - 1), "attention_mask": mask.long()}

    def indexed_inputs(self, padding: str | None = None) -> dict[str, torch.Tensor]:
        """The inputs and, for a class that takes one, the last real position of each sequence."""
        inputs = self.inputs(padding=padding)
        if self.index_argument is not None:
            inputs[self.index_argument] = (inputs["attention_mask"] * torch.arange(LENGTH)).argmax(-1)
        return inputs


def widen(model, std: float = 0.2):
    """Draw every parameter with standard deviation `std`: at the usual 0.02 a wrong activation would go unseen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=std)
    return model


def tokenizer(**kwargs) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB` entries: a token each for printable ASCII, space, line end and "th"."""
    symbols = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "th", "<|endoftext|>", "<|pad|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return GPT2Tokenizer(vocab=vocab, merges=[("t", "h")], pad_token="<|pad|>", **kwargs)


def _ids(batch, length):
    return torch.randint(0, VOCAB, (batch, length))


MODELS = [
    TinyModel(hf_custom.CustomGPT2Model, CustomGPT2Config, GPT2, lambda b, t: {}),
    TinyModel(
        hf_custom.CustomGPT2ForCausalLM, CustomGPT2Config, GPT2, lambda b, t: {"labels": _ids(b, t)}, is_generative=True
    ),
    TinyModel(
        hf_custom.CustomGPT2ForSequenceClassification,
        CustomGPT2Config,
        GPT2,
        lambda b, t: {"labels": torch.randint(0, LABELS, (b,))},
    ),
    TinyModel(
        hf_custom.CustomGPT2ForTokenClassification,
        CustomGPT2Config,
        GPT2,
        lambda b, t: {"labels": torch.randint(0, LABELS, (b, t))},
    ),
    TinyModel(
        hf_custom.CustomGPT2ForQuestionAnswering,
        CustomGPT2Config,
        GPT2,
        lambda b, t: {"start_positions": torch.randint(0, t, (b,)), "end_positions": torch.randint(0, t, (b,))},
    ),
    TinyModel(
        hf_custom.CustomGPT2DoubleHeadsModel,
        CustomGPT2Config,
        GPT2,
        lambda b, t: {"labels": torch.randint(0, VOCAB, (b, 2, t)), "mc_labels": torch.randint(0, 2, (b,))},
        num_choices=2,
        index_argument="mc_token_ids",
    ),
]

# Fields to vary, one at a time, on every model whose configuration has them. `position_embedding_type` is ours; the
# rest are stock's.
OPTIONS = {
    CustomGPT2Config: [
        {},
        {"position_embedding_type": "sinusoidal"},
        {"position_embedding_type": "rope"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 48},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"layer_norm_epsilon": 0.1},
        {"tie_word_embeddings": False},
    ]
}


def name_of(value) -> str:
    """Test id of a row or of an option."""
    if isinstance(value, TinyModel):
        return value.name
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items()) or "default"
    return str(value)
