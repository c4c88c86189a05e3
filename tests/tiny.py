"""The table that the conformance suite runs over: one row a model class, with a tiny configuration and its inputs.

A new family is added here, by rows in `MODELS` and in `OPTIONS`, and by nothing else. Classes that read text alone or
with an image have a second row in `VARIANTS`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GPT2Tokenizer

import hf_custom
from hf_custom.configuration_bert import CustomBertConfig
from hf_custom.configuration_elmo import CustomElmoConfig
from hf_custom.configuration_gpt2 import CustomGPT2Config
from hf_custom.configuration_transformer import CustomTransformerConfig

BATCH, LENGTH, VOCAB, LABELS = 3, 11, 99, 3
# Of the target of an encoder-decoder, whose source has `LENGTH` tokens.
TARGET_LENGTH = 7

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

BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "type_vocab_size": 3,
    "bos_token_id": 97,
    "eos_token_id": 97,
    "pad_token_id": 98,
    "num_labels": LABELS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {**BERT, "is_decoder": True}
# Images of two rows and three columns of patches.
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": (8, 12),
    "patch_size": 4,
}
BERT_WITH_IMAGES = {**BERT, "vision_config": VISION}

TRANSFORMER = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 97,
    "eos_token_id": 97,
    "pad_token_id": 98,
    "decoder_start_token_id": 97,
    "dropout": 0.0,
}


# Words in both directions.
ELMO = {
    "vocab_size": VOCAB,
    "input_type": "words",
    "num_hidden_layers": 2,
    "cell_size": 32,
    "projection_size": 16,
    "cell_clip": None,
    "proj_clip": None,
    "bos_token_id": 97,
    "eos_token_id": 97,
    "pad_token_id": 98,
    "num_labels": LABELS,
    "lstm_dropout": 0.0,
    "classifier_dropout": 0.0,
}
# Without sequences, so that the conformance suite has nothing to run over it; its own tests do the same.
WORD2VEC = {
    "vocab_size": 41,
    "hidden_size": 12,
    "objective": "cbow",
    "window_size": 3,
    "num_negatives": 4,
    "subsample_threshold": 0.02,
}
LSTM_LM = {**ELMO, "bidirectional": False, "tie_word_embeddings": True}
# Ids of characters in a word.
CHARACTERS = 8


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
    # What to vary instead of all `OPTIONS` of the configuration, for a head on a body that another row varies.
    head_options: tuple[dict, ...] | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        return self.model_class.__name__ + self.variant

    @property
    def options(self) -> list[dict]:
        """Fields to vary, one at a time."""
        return OPTIONS[self.config_class] if self.head_options is None else list(self.head_options)

    @property
    def positions(self) -> list[dict]:
        """Those of them that vary the positions."""
        return [option for option in self.options if not option or "position_embedding_type" in option]

    @property
    def has_cache(self) -> bool:
        return self.fields.get("is_decoder", self.config_class is CustomGPT2Config)

    @property
    def num_patches(self) -> int:
        """Patches of an image behind the text, the class token included."""
        vision_config = self.config().vision_config if "vision_config" in self.fields else None
        return 0 if vision_config is None else 1 + math.prod(vision_config.grid)

    def config(self, **overrides):
        """The configuration, with some fields replaced, each by its own name or by the host's standard one."""
        overrides = {self.config_class.attribute_map.get(name, name): value for name, value in overrides.items()}
        return self.config_class(**{**self.fields, **overrides})

    def build(self, **overrides):
        """The model with wide weights, in evaluation mode."""
        attn_implementation = overrides.pop("attn_implementation", "sdpa")
        model = self.model_class._from_config(self.config(**overrides), attn_implementation=attn_implementation)
        return widen(model).eval()

    def inputs(self, batch: int = BATCH, length: int = LENGTH, padding: str | None = None) -> dict[str, torch.Tensor]:
        """Ids without special tokens and, for `padding` left or right, a mask that shortens every row but the first.

        An image a row comes with them where the model reads any.
        """
        lead = (batch,) if self.num_choices is None else (batch, self.num_choices)
        input_ids = torch.randint(0, VOCAB - 2, (*lead, length))
        images = {}
        if "vision_config" in self.fields:
            images["pixel_values"] = torch.randn(batch, 3, *VISION["image_size"])
        if padding is None:
            return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}
        rows = input_ids.view(-1, length).shape[0]
        lengths = torch.tensor([length - 2 * row % (length - 1) for row in range(rows)])
        columns = torch.arange(length)
        mask = columns < lengths[:, None] if padding == "right" else columns >= length - lengths[:, None]
        mask = mask.view_as(input_ids)
        return {"input_ids": input_ids.masked_fill(~mask, VOCAB - 1), "attention_mask": mask.long(), **images}

    def indexed_inputs(self, padding: str | None = None) -> dict[str, torch.Tensor]:
        """The inputs and, for a class that takes one, the last real position of each sequence."""
        inputs = self.inputs(padding=padding)
        if self.index_argument is not None:
            inputs[self.index_argument] = (inputs["attention_mask"] * torch.arange(LENGTH)).argmax(-1)
        return inputs

    def mask_of(self, output: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Which tokens of an output are real."""
        return inputs["attention_mask"].bool()

    @property
    def id_arguments(self) -> tuple[str, ...]:
        """Arguments that hold ids; labels of tokens are shaped as the last."""
        return ("input_ids",)

    @property
    def reads_characters(self) -> bool:
        """Whether ids name characters, which no vocabulary numbers."""
        return False

    @staticmethod
    def embedding_width(model) -> int:
        """Width of the vectors of ids."""
        return model.config.hidden_size

    @staticmethod
    def resize(model, size: int) -> None:
        """Give the vocabulary another size."""
        model.resize_token_embeddings(size)

    @staticmethod
    def alone(inputs: dict[str, torch.Tensor], index: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """One sequence of the inputs without its padding, and its image."""
        ids = inputs["input_ids"][index][inputs["attention_mask"][index].bool()]
        found = {"input_ids": ids.view(*(1 for _ in index), -1)}
        if "pixel_values" in inputs:
            found["pixel_values"] = inputs["pixel_values"][index][None]
        return found


@dataclass(frozen=True)
class TinySeq2Seq(TinyModel):
    """A model with two streams: a source of `LENGTH` tokens and a target of `TARGET_LENGTH`."""

    def inputs(self, batch: int = BATCH, length: int = LENGTH, padding: str | None = None) -> dict[str, torch.Tensor]:
        """Both streams; of the target every row but the last is shortened, always on the right."""
        inputs = super().inputs(batch, length, padding)
        target = super().inputs(batch, TARGET_LENGTH, None if padding is None else "right")
        return {**inputs, **{f"decoder_{name}": tensor.flip(0) for name, tensor in target.items()}}

    @staticmethod
    def resize(model, size):
        model.resize_token_embeddings(size)
        if not model.config.share_encoder_decoder_embeddings:
            model.resize_decoder_token_embeddings(size)

    def mask_of(self, output, inputs):
        return inputs["attention_mask" if output.startswith("encoder") else "decoder_attention_mask"].bool()

    @property
    def id_arguments(self):
        return ("input_ids", "decoder_input_ids")

    def alone(self, inputs, index):
        masks = {name: inputs[name.replace("input_ids", "attention_mask")].bool() for name in self.id_arguments}
        return {name: inputs[name][index][mask[index]][None] for name, mask in masks.items()}


@dataclass(frozen=True)
class TinyElmo(TinyModel):
    """A recurrent model, without attention; of characters, the ids have one more axis."""

    @property
    def reads_characters(self):
        return self.fields["input_type"] == "characters"

    @staticmethod
    def embedding_width(model):
        return model.get_input_embeddings().embedding_dim

    def inputs(self, batch: int = BATCH, length: int = LENGTH, padding: str | None = None) -> dict[str, torch.Tensor]:
        inputs = super().inputs(batch, length, padding)
        if self.reads_characters:
            ids = torch.randint(1, VOCAB, (batch, length, CHARACTERS))
            inputs["input_ids"] = ids * inputs["attention_mask"][..., None]
        return inputs

    @staticmethod
    def alone(inputs, index):
        return {"input_ids": inputs["input_ids"][index][inputs["attention_mask"][index].bool()][None]}


def widen(model, std: float = 0.2):
    """Draw every parameter with standard deviation `std`: at the usual 0.02 a wrong activation would go unseen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = re.search(r"(ln_\w+|norm\d?)\.weight$", name, re.IGNORECASE)
            torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=std)
    return model


def tokenizer(**kwargs) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB` entries: a token each for printable ASCII, space, line end and "th"."""
    symbols = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "th", "<|endoftext|>", "<|pad|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return GPT2Tokenizer(vocab=vocab, merges=[("t", "h")], pad_token="<|pad|>", **kwargs)


def _ids(batch, length):
    return torch.randint(0, VOCAB, (batch, length))


def _masked(batch, length):
    """Labels of masked tokens: every third position has none."""
    return _ids(batch, length).masked_fill(torch.arange(length) % 3 == 1, -100)


def _classes(count):
    """Labels of sequences, of `count` classes."""
    return lambda b, t: {"labels": torch.randint(0, count, (b,))}


def _answer(batch, length):
    return {name: torch.randint(0, length, (batch,)) for name in ("start_positions", "end_positions")}


UNTIED = {"tie_word_embeddings": False}
ROPE = {"position_embedding_type": "rope"}
MLP = {"classifier_hidden_size": 24}
WITHOUT_TOWER = {"vision_config": {**VISION, "num_hidden_layers": 0}}

MODELS = [
    TinyModel(hf_custom.CustomGPT2Model, CustomGPT2Config, GPT2, lambda b, t: {}, head_options=({}, ROPE)),
    TinyModel(
        hf_custom.CustomGPT2ForCausalLM, CustomGPT2Config, GPT2, lambda b, t: {"labels": _ids(b, t)}, is_generative=True
    ),
    TinyModel(
        hf_custom.CustomGPT2ForSequenceClassification,
        CustomGPT2Config,
        GPT2,
        lambda b, t: {"labels": torch.randint(0, LABELS, (b,))},
        head_options=({},),
    ),
    TinyModel(
        hf_custom.CustomGPT2ForTokenClassification,
        CustomGPT2Config,
        GPT2,
        lambda b, t: {"labels": torch.randint(0, LABELS, (b, t))},
        head_options=({},),
    ),
    TinyModel(
        hf_custom.CustomGPT2ForQuestionAnswering,
        CustomGPT2Config,
        GPT2,
        lambda b, t: {"start_positions": torch.randint(0, t, (b,)), "end_positions": torch.randint(0, t, (b,))},
        head_options=({},),
    ),
    TinyModel(
        hf_custom.CustomGPT2DoubleHeadsModel,
        CustomGPT2Config,
        GPT2,
        lambda b, t: {"labels": torch.randint(0, VOCAB, (b, 2, t)), "mc_labels": torch.randint(0, 2, (b,))},
        num_choices=2,
        index_argument="mc_token_ids",
        head_options=({}, ROPE, UNTIED),
    ),
    TinyModel(hf_custom.CustomBertModel, CustomBertConfig, BERT, lambda b, t: {}),
    TinyModel(
        hf_custom.CustomBertForPreTraining,
        CustomBertConfig,
        BERT,
        lambda b, t: {"labels": _masked(b, t), "next_sentence_label": torch.randint(0, 2, (b,))},
        head_options=({}, UNTIED),
    ),
    TinyModel(
        hf_custom.CustomBertForMaskedLM,
        CustomBertConfig,
        BERT,
        lambda b, t: {"labels": _masked(b, t)},
        head_options=({}, UNTIED),
    ),
    TinyModel(
        hf_custom.CustomBertForCausalLM,
        CustomBertConfig,
        DECODER,
        lambda b, t: {"labels": _ids(b, t)},
        is_generative=True,
    ),
    TinyModel(hf_custom.CustomBertForNextSentencePrediction, CustomBertConfig, BERT, _classes(2), head_options=({},)),
    TinyModel(
        hf_custom.CustomBertForSequenceClassification,
        CustomBertConfig,
        BERT,
        _classes(LABELS),
        head_options=({}, MLP),
    ),
    TinyModel(
        hf_custom.CustomBertForMultipleChoice, CustomBertConfig, BERT, _classes(2), num_choices=2, head_options=({},)
    ),
    TinyModel(
        hf_custom.CustomBertForTokenClassification,
        CustomBertConfig,
        BERT,
        lambda b, t: {"labels": torch.randint(0, LABELS, (b, t))},
        head_options=({},),
    ),
    TinyModel(hf_custom.CustomBertForQuestionAnswering, CustomBertConfig, BERT, _answer, head_options=({},)),
    TinyModel(
        hf_custom.CustomBertForVisualQuestionAnswering,
        CustomBertConfig,
        BERT_WITH_IMAGES,
        _classes(LABELS),
        head_options=({}, MLP, {"position_embedding_type": "relative_key_query"}, ROPE),
    ),
    TinyModel(
        hf_custom.CustomBertForImageTextRetrieval,
        CustomBertConfig,
        {**BERT, **WITHOUT_TOWER},
        _classes(2),
        head_options=({},),
    ),
]
VARIANTS = [
    TinyModel(
        hf_custom.CustomBertForMaskedLM,
        CustomBertConfig,
        BERT_WITH_IMAGES,
        lambda b, t: {"labels": _masked(b, t)},
        head_options=({}, WITHOUT_TOWER),
        variant="-with-images",
    ),
]
# Encoder-decoders, for the tests that know of a source and a target.
SEQ2SEQ = [
    TinySeq2Seq(hf_custom.CustomTransformerModel, CustomTransformerConfig, TRANSFORMER, lambda b, t: {}),
    TinySeq2Seq(
        hf_custom.CustomTransformerForSeq2SeqLM,
        CustomTransformerConfig,
        TRANSFORMER,
        lambda b, t: {"labels": _ids(b, TARGET_LENGTH)},
        is_generative=True,
    ),
]

# Without attention, for the tests that do not look at it.
CLIPPED = {"cell_clip": 0.5, "proj_clip": 0.3}
BY_CHARACTERS = {
    **ELMO,
    "input_type": "characters",
    "max_characters_per_token": CHARACTERS,
    "character_embedding_size": 5,
    "filters": [[1, 4], [3, 6]],
}
RECURRENT = [
    TinyElmo(hf_custom.CustomElmoModel, CustomElmoConfig, ELMO, lambda b, t: {}),
    TinyElmo(
        hf_custom.CustomElmoModel,
        CustomElmoConfig,
        BY_CHARACTERS,
        lambda b, t: {},
        head_options=({}, CLIPPED),
        variant="-by-characters",
    ),
    TinyElmo(
        hf_custom.CustomElmoForPreTraining,
        CustomElmoConfig,
        ELMO,
        lambda b, t: {"labels": _ids(b, t)},
        head_options=({}, {"tie_word_embeddings": True}, {"bidirectional": False}),
    ),
    TinyElmo(
        hf_custom.CustomElmoForCausalLM,
        CustomElmoConfig,
        LSTM_LM,
        lambda b, t: {"labels": _ids(b, t)},
        is_generative=True,
        head_options=({}, UNTIED, CLIPPED, {"projection_size": None}),
    ),
    TinyElmo(
        hf_custom.CustomElmoForTokenClassification,
        CustomElmoConfig,
        ELMO,
        lambda b, t: {"labels": torch.randint(0, LABELS, (b, t))},
        head_options=({}, {"classifier_lstm_size": 7}, {"classifier_embeddings": True}),
    ),
]

# Fields to vary, one at a time, on every model whose configuration has them. `position_embedding_type` is ours; the
# rest are stock's.
OPTIONS = {
    CustomElmoConfig: [
        {},
        CLIPPED,
        {"bidirectional": False},
        {"use_skip_connections": False},
        {"projection_size": None},
        {"do_layer_norm": True},
        {"pooling_type": "max"},
        {"pooling_type": "ends"},
    ],
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
        {"projection_layout": "linear"},
        UNTIED,
    ],
    CustomBertConfig: [
        {},
        {"position_embedding_type": "sinusoidal"},
        {"position_embedding_type": "rope"},
        {"position_embedding_type": "relative_key"},
        {"position_embedding_type": "relative_key_query"},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"layer_norm_eps": 0.1},
        {"chunk_size_feed_forward": 4},
        UNTIED,
    ],
    CustomTransformerConfig: [
        {},
        {"norm_first": True},
        {"share_encoder_decoder_embeddings": False},
        {"scale_embedding": False},
        {"activation_function": "gelu"},
        {"layer_norm_eps": 0.1},
        UNTIED,
    ],
}


def name_of(value) -> str:
    """Test id of a row or of an option."""
    if isinstance(value, TinyModel):
        return value.name
    if isinstance(value, dict):
        return "-".join(f"{key}={name_of(item)}" for key, item in value.items()) or "default"
    return str(value)
