"""Named sizes as data: the fields in which each differs from its configuration's defaults."""

from transformers import PreTrainedConfig

from .configuration_bert import CustomBertConfig
from .configuration_gpt2 import CustomGPT2Config

_SMALL = {"n_positions": 256, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
_BERT_MINI = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 256,
    "vocab_size": 1024,
}
# Text and patches of small images; the patches have a few layers of their own before they join the words. Weights start
# wide, as for a model so narrow they should: about one over the square root of its width.
_BERT_VISION_MINI = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "vocab_size": 1024,
    "initializer_range": 0.08,
    "vision_config": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": 64,
        "patch_size": 16,
        "initializer_range": 0.08,
    },
}

PRESETS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    # Small enough to learn on two processor cores.
    "gpt2-mini": (CustomGPT2Config, {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1024, **_SMALL}),
    "bert-mini": (CustomBertConfig, _BERT_MINI),
    "bert-vision-mini": (CustomBertConfig, _BERT_VISION_MINI),
    # The published sizes (Radford et al. 2019, table 2).
    "gpt2": (CustomGPT2Config, {}),
    "gpt2-medium": (CustomGPT2Config, {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": (CustomGPT2Config, {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": (CustomGPT2Config, {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    # The published sizes (Devlin et al. 2019, section 3).
    "bert-base": (CustomBertConfig, {}),
    "bert-large": (
        CustomBertConfig,
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
}


def preset_config(name: str, **overrides) -> PreTrainedConfig:
    """The configuration of a preset, with fields changed by `overrides`.

    Raises:
        ValueError: for a name that is no preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown. Use one of {', '.join(PRESETS)}.")
    config_class, fields = PRESETS[name]
    return config_class(**{**fields, **overrides})


__all__ = ["PRESETS", "preset_config"]
