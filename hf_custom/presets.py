"""Named sizes as data: the fields in which each differs from its configuration's defaults."""

from transformers import PreTrainedConfig

from .configuration_gpt2 import CustomGPT2Config

_SMALL = {"n_positions": 256, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}

PRESETS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    # Small enough to learn on two processor cores.
    "gpt2-mini": (CustomGPT2Config, {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1024, **_SMALL}),
    # The published sizes (Radford et al. 2019, table 2).
    "gpt2": (CustomGPT2Config, {}),
    "gpt2-medium": (CustomGPT2Config, {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": (CustomGPT2Config, {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": (CustomGPT2Config, {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
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
