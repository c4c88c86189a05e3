"""Configuration of the encoder-decoder Transformer: the names of the host's encoder-decoders, the paper's defaults."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_base import SIZE_LIMITS, CustomConfig


@strict
class CustomTransformerConfig(CustomConfig):
    """Configuration of the Transformer family (Vaswani et al. 2017, "Attention Is All You Need").

    Defaults give the paper's base model, whose source and target share a vocabulary of about 37,000 byte pairs.

    Args:
        vocab_size: entries of the source's vocabulary, and of the target's where they share one.
        decoder_vocab_size: entries of the target's vocabulary; `None` means `vocab_size`.
        share_encoder_decoder_embeddings: source and target share one vocabulary and one table.
        tie_word_embeddings: the table of the target is the output projection as well (section 3.4). With both, one
            matrix serves all three.
        norm_first: normalise the input of each sublayer, with a last norm after each stack, instead of its sum with
            the output as published.
        dropout: of the embeddings and of each sublayer's output.
        activation_dropout: between the two maps of the feed-forward layers.
        scale_embedding: multiply embeddings by the square root of `d_model` (section 3.4).
        max_position_embeddings: positions of the fixed sinusoids, the longest source and the longest target.
        label_smoothing: share of the training target spread evenly over the vocabulary (section 5.4). The loss of an
            evaluation is that of the labels alone.
        decoder_start_token_id: what stands before the first token of the target.
        loss_chunk_size: tokens whose logits are in memory together while the training loss is computed; `None` chooses
            by device. The loss is the same for all.
    """

    model_type = "custom_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "intermediate_size": "encoder_ffn_dim",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    base_model_tp_plan = {
        f"{part}.layers.*.{layer}": style
        for part in ("encoder", "decoder")
        for layer, style in {
            "self_attn.q_proj": "colwise",
            "self_attn.k_proj": "colwise",
            "self_attn.v_proj": "colwise",
            "self_attn.out_proj": "rowwise",
            "cross_attn.q_proj": "colwise",
            "cross_attn.k_proj": "colwise",
            "cross_attn.v_proj": "colwise",
            "cross_attn.out_proj": "rowwise",
            "mlp.fc1": "colwise",
            "mlp.fc2": "rowwise",
        }.items()
        if part == "decoder" or not layer.startswith("cross_attn")
    }
    probabilities: ClassVar = ("dropout", "attention_dropout", "activation_dropout", "label_smoothing")
    positive: ClassVar = ("layer_norm_eps", "initializer_range")
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_transformer.CustomTransformerConfig",
        "AutoModel": "modeling_transformer.CustomTransformerModel",
        "AutoModelForSeq2SeqLM": "modeling_transformer.CustomTransformerForSeq2SeqLM",
    }

    vocab_size: int = 37000
    decoder_vocab_size: int | None = None
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    d_model: int = 512
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    norm_first: bool = False
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    scale_embedding: bool = True
    max_position_embeddings: int = 1024
    label_smoothing: float | int = 0.1
    loss_chunk_size: int | None = None
    use_cache: bool = True
    is_encoder_decoder: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 1
    decoder_start_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.decoder_vocab_size is None:
            self.decoder_vocab_size = self.vocab_size
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        limits = {
            "decoder_vocab_size": SIZE_LIMITS["vocab_size"],
            "decoder_layers": SIZE_LIMITS["num_hidden_layers"],
            "decoder_attention_heads": SIZE_LIMITS["num_attention_heads"],
            "decoder_ffn_dim": SIZE_LIMITS["intermediate_size"],
        }
        for name, limit in limits.items():
            self._check_size(name, getattr(self, name), limit)
        if self.d_model % self.decoder_attention_heads:
            raise ValueError(
                f"`decoder_attention_heads` ({self.decoder_attention_heads}) does not divide `d_model` "
                f"({self.d_model}). Choose a number of heads that does."
            )
        if self.d_model % 2:
            raise ValueError(
                f"sinusoidal positions pair sines with cosines, so `d_model` ({self.d_model}) must be even."
            )
        if self.share_encoder_decoder_embeddings and self.decoder_vocab_size != self.vocab_size:
            raise ValueError(
                f"`decoder_vocab_size` is {self.decoder_vocab_size} but `vocab_size` is {self.vocab_size}, and the "
                "two share one table. Set `share_encoder_decoder_embeddings=False` for two vocabularies."
            )
        if not self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder` is False, but this model is one. Leave the field out.")


__all__ = ["CustomTransformerConfig"]
