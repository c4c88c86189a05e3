"""Named sizes as data: the fields in which each differs from its configuration's defaults."""

from transformers import PreTrainedConfig

from .configuration_bert import CustomBertConfig
from .configuration_blip2 import CustomBlip2Config
from .configuration_elmo import CustomElmoConfig
from .configuration_gpt2 import CustomGPT2Config
from .configuration_transformer import CustomTransformerConfig
from .configuration_word2vec import CustomWord2VecConfig

# The tokenizers that are trained here have the end token first.
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
_SMALL = {"n_positions": 256, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0, **_ENDS}
# As small as a GPT can be drawn matrix by matrix: ids (4, 16), states (4, 16, 64), scores (4, 4, 16, 16). Weights start
# at one over the square root of the width, so that words count beside the sinusoids.
_NOTES = {
    "n_positions": 16,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "activation_function": "relu",
    "position_embedding_type": "sinusoidal",
    "tie_word_embeddings": False,
    "initializer_range": 0.125,
    "vocab_size": 1024,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.0,
    **_ENDS,
}
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
        "patch_size": 8,
        "initializer_range": 0.08,
    },
}

# The same tower, a Q-Former and a language model of its width.
_BLIP2_MINI = {
    "vision_config": _BERT_VISION_MINI["vision_config"],
    "qformer_config": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 64,
        "vocab_size": 1024,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.08,
        "use_qformer_text_input": True,
        "bos_token_id": 1,
    },
    "text_config": {
        "model_type": "custom_gpt2",
        "n_embd": 128,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 1024,
        **_ENDS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.08,
    },
    "num_query_tokens": 8,
    "image_text_hidden_size": 64,
    "initializer_range": 0.08,
    "label_smoothing": 0.0,
    "frozen_modules": [],
}

_TRANSFORMER_MINI = {
    "d_model": 256,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 1024,
    "max_position_embeddings": 256,
    "vocab_size": 1024,
}
# Of the paper (table 3), which drops more out of the big one.
_TRANSFORMER_BIG = {
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "dropout": 0.3,
}

# No bounds of cells and outputs, so that torch's own LSTM runs.
_ELMO_MINI = {
    "vocab_size": 8192,
    "cell_size": 512,
    "projection_size": 128,
    "cell_clip": None,
    "proj_clip": None,
    "filters": ((1, 16), (2, 16), (3, 32), (4, 64), (5, 64), (6, 64)),
    "num_highway_layers": 1,
}
_LSTM_MINI = {
    "input_type": "words",
    "bidirectional": False,
    "cell_size": 512,
    "projection_size": None,
    "cell_clip": None,
    "proj_clip": None,
    "vocab_size": 1024,
    "lstm_dropout": 0.1,
    "tie_word_embeddings": True,
}

_BLIP2_VIT_G = {
    "qformer_config": {"vocab_size": 30523, "bos_token_id": 30522, "use_qformer_text_input": True},
    "image_token_index": 50256,
}

PRESETS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    # Small enough to learn on two processor cores.
    "gpt2-mini": (CustomGPT2Config, {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1024, **_SMALL}),
    "gpt2-notes": (CustomGPT2Config, _NOTES),
    "bert-mini": (CustomBertConfig, _BERT_MINI),
    "bert-vision-mini": (CustomBertConfig, _BERT_VISION_MINI),
    "blip2-mini": (CustomBlip2Config, _BLIP2_MINI),
    "transformer-mini": (CustomTransformerConfig, _TRANSFORMER_MINI),
    "elmo-mini": (CustomElmoConfig, _ELMO_MINI),
    "lstm-mini": (CustomElmoConfig, _LSTM_MINI),
    "word2vec-mini": (CustomWord2VecConfig, {}),
    "cbow-mini": (CustomWord2VecConfig, {"objective": "cbow"}),
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
    # The published first stage (Li et al. 2023): ViT-g and a BERT-base of a Q-Former; GPT-2 for the language model.
    "blip2-vit-g": (CustomBlip2Config, _BLIP2_VIT_G),
    # The published sizes (Vaswani et al. 2017, table 3).
    "transformer-base": (CustomTransformerConfig, {}),
    "transformer-big": (CustomTransformerConfig, _TRANSFORMER_BIG),
    # The published sizes (Peters et al. 2018, section 3.2, and the smaller ones released with it).
    "elmo": (CustomElmoConfig, {}),
    "elmo-medium": (CustomElmoConfig, {"cell_size": 2048, "projection_size": 256, "num_highway_layers": 1}),
    "elmo-small": (CustomElmoConfig, {"cell_size": 1024, "projection_size": 128, "num_highway_layers": 1}),
    # The published size (Mikolov et al. 2013b, section 3): a billion words of news, of which 692,000 differ.
    "word2vec-news": (
        CustomWord2VecConfig,
        {"vocab_size": 692_001, "hidden_size": 300, "subsample_threshold": 1e-5},
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
