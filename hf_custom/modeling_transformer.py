"""The encoder-decoder Transformer (Vaswani et al. 2017, "Attention Is All You Need").

The encoder's layers are self-attention and a position-wise feed-forward layer; the decoder's have attention over the
encoder's states between the two. Embeddings are scaled by the square root of the width, fixed sinusoids are added, and
each sublayer's sum with its input is normalised (or, by `norm_first`, its input). One matrix may serve the source, the
target and the output.

Padded sources and targets are each computed on real tokens only; in training the loss is computed without logits.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import (
    RepeatsNoHeads,
    eager_attention_forward,
    implementation_for,
    layer_head_masks,
    mask_heads,
)
from .checks import (
    OwnShardsOnly,
    check_attention_mask,
    check_encoder,
    check_ids,
    check_labels,
    check_positions,
    input_shape,
)
from .configuration_transformer import CustomTransformerConfig
from .dropout import Dropout
from .layers import get_activation, project_activated
from .losses import logits_and_loss
from .matmul import project
from .ops import merge_heads, positions_from_mask, sinusoidal_positions, split_heads
from .packing import LENGTH_ARGUMENTS, cache_on_request, choose_packing
from .parallel import Divisible


class CustomTransformerSinusoids(nn.Module):
    """The table of fixed position vectors, (number of positions, D) (section 3.5)."""

    def __init__(self, num_positions: int, hidden_size: int):
        super().__init__()
        # Never saved; `_init_weights` fills it.
        self.register_buffer("table", torch.empty(num_positions, hidden_size), persistent=False)

    def values(self) -> torch.Tensor:
        """What the table holds, in float32."""
        return sinusoidal_positions(torch.arange(len(self.table), device=self.table.device), self.table.shape[1])

    def forward(self, position_ids: torch.LongTensor) -> torch.Tensor:
        """(B, T) -> (B, T, D)."""
        return self.table[position_ids]


class CustomTransformerAttention(nn.Module):
    """Multi-head attention over the sequence itself or, as `is_cross_attention`, over an encoder's states."""

    def __init__(
        self,
        config: CustomTransformerConfig,
        num_heads: int,
        layer_idx: int,
        is_causal: bool = False,
        is_cross_attention: bool = False,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.is_cross_attention = is_cross_attention
        self.num_attention_heads = num_heads
        self.head_dim = config.d_model // num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.dropout = Dropout(config.attention_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = split_heads(project(self.q_proj, hidden_states), self.head_dim)  # (B, H, T, K)
        if self.is_cross_attention:
            key, value = self._encoder_key_value(encoder_hidden_states, past_key_values)
        else:
            key, value = self._key_value(hidden_states)
            if past_key_values is not None:
                key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)

        implementation = implementation_for(self.config._attn_implementation)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output, attn_weights = mask_heads(attn_output, attn_weights, head_mask)
        return project(self.out_proj, merge_heads(attn_output)), attn_weights

    def _key_value(self, states):
        """Keys and values (B, H, S, K) of (B, S, D)."""
        return tuple(split_heads(project(layer, states), self.head_dim) for layer in (self.k_proj, self.v_proj))

    def _encoder_key_value(self, encoder_hidden_states, past_key_values):
        """Keys and values (B, H, S, K) of the encoder, projected once a sequence when there is a cache."""
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self._key_value(encoder_hidden_states)
        if past_key_values is not None:
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return key, value


class CustomTransformerMLP(nn.Module):
    """Position-wise feed-forward layer (section 3.3)."""

    def __init__(self, config: CustomTransformerConfig, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, intermediate_size)
        self.act = get_activation(config.activation_function, "activation_function")
        self.dropout = Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(intermediate_size, config.d_model)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = project(self.fc1, hidden_states)
        if self.dropout.p and self.training:
            return project(self.fc2, self.dropout(self.act(hidden_states)))
        return project_activated(self.act, hidden_states, self.fc2)


class CustomTransformerLayer(GradientCheckpointingLayer):
    """What the layers of encoder and decoder share: how a sublayer is added to the residual stream."""

    def __init__(self, config: CustomTransformerConfig, intermediate_size: int):
        super().__init__()
        self.norm_first = config.norm_first
        self.mlp = CustomTransformerMLP(config, intermediate_size)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def add(self, norm: nn.Module, sublayer: nn.Module, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """norm(x + sublayer(x)) (section 3.1) or, as `norm_first`, x + sublayer(norm(x)): (B, T, D)."""
        output = sublayer(norm(hidden_states) if self.norm_first else hidden_states, *args, **kwargs)
        if isinstance(output, tuple):
            # Of attention, whose weights are recorded where it is called.
            output = output[0]
        hidden_states = hidden_states + self.dropout(output)
        return hidden_states if self.norm_first else norm(hidden_states)


class CustomTransformerEncoderLayer(CustomTransformerLayer):
    """Self-attention, then feed-forward."""

    def __init__(self, config: CustomTransformerConfig, layer_idx: int):
        super().__init__(config, config.encoder_ffn_dim)
        self.self_attn = CustomTransformerAttention(config, config.encoder_attention_heads, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.add(
            self.self_attn_layer_norm,
            self.self_attn,
            hidden_states,
            attention_mask=attention_mask,
            head_mask=head_mask,
            **kwargs,
        )
        return self.add(self.final_layer_norm, self.mlp, hidden_states)


class CustomTransformerDecoderLayer(CustomTransformerLayer):
    """Causal self-attention, attention over the encoder's states, then feed-forward."""

    def __init__(self, config: CustomTransformerConfig, layer_idx: int):
        super().__init__(config, config.decoder_ffn_dim)
        heads = config.decoder_attention_heads
        self.self_attn = CustomTransformerAttention(config, heads, layer_idx, is_causal=True)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.cross_attn = CustomTransformerAttention(config, heads, layer_idx, is_cross_attention=True)
        self.cross_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_lengths: dict | None = None,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.add(
            self.self_attn_layer_norm,
            self.self_attn,
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            head_mask=head_mask,
            **kwargs,
        )
        # Without the other keywords: they describe the target, not the source.
        hidden_states = self.add(
            self.cross_attn_layer_norm,
            self.cross_attn,
            hidden_states,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            head_mask=cross_attn_head_mask,
            **(encoder_lengths or {}),
        )
        return self.add(self.final_layer_norm, self.mlp, hidden_states)


class CustomTransformerPreTrainedModel(Divisible, OwnShardsOnly, PreTrainedModel):
    """What every class declares to the host, and how weights start."""

    config: CustomTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CustomTransformerEncoderLayer", "CustomTransformerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _auto_class = "AutoModel"

    def __init__(self, config: CustomTransformerConfig, *inputs, **kwargs):
        # Fields may have changed since the configuration was made; refuse before any tensor is allocated.
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CustomTransformerSinusoids):
            init.copy_(module.table, module.values())


class CustomTransformerStack(CustomTransformerPreTrainedModel):
    """What encoder and decoder share: the table of embeddings, positions, and a stack of layers."""

    def __init__(self, config: CustomTransformerConfig, vocab_size: int, num_layers: int, layer_class: type[nn.Module]):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(vocab_size, config.d_model)
        self.embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.embed_positions = CustomTransformerSinusoids(config.max_position_embeddings, config.d_model)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList([layer_class(config, layer_idx=i) for i in range(num_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps) if config.norm_first else None
        self.gradient_checkpointing = False

    def _check_inputs(self, input_ids, inputs_embeds, attention_mask, past_key_values, prefix=""):
        """Refuse what cannot be computed."""
        shape = input_shape(input_ids, inputs_embeds)
        if len(shape) != 2:
            raise ValueError(f"the input has shape {shape} but (batch, length) is needed. Flatten the leading axes.")
        if input_ids is not None:
            check_ids(input_ids, self.embed_tokens.num_embeddings, f"{prefix}input_ids")
        if not torch.compiler.is_compiling():
            check_attention_mask(attention_mask, *shape, past_key_values)

    def _count_positions(self, tokens, attention_mask, past_length=0):
        """Positions of the new tokens, (B, T) or (1, T): the attended tokens before each, else all before it."""
        new = torch.arange(tokens.shape[1], device=tokens.device) + past_length
        is_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        position_ids = positions_from_mask(attention_mask)[:, new] if is_mask else new.unsqueeze(0)
        check_positions(position_ids, self.config.max_position_embeddings, "max_position_embeddings", "")
        return position_ids

    def _embed(self, input_ids, inputs_embeds, position_ids):
        """Scaled embeddings with their positions: (B, T, D)."""
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return self.dropout(inputs_embeds * self.embed_scale + self.embed_positions(position_ids))

    def _head_masks(self, tokens, packing, **head_masks):
        """For each layer what it multiplies the heads of its attentions by."""
        shape, heads = tokens.shape[:2], self.layers[0].self_attn
        masks = [layer_head_masks(mask, self.layers, heads, shape, packing, name) for name, mask in head_masks.items()]
        return list(zip(*masks, strict=True))

    def _run_layers(self, hidden_states, *args, head_masks, **kwargs):
        # Taken by `capture_outputs`; a kernel must not see them.
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)
        for layer, masks in zip(self.layers, head_masks, strict=True):
            # Tensors that may need a gradient are positional, where checkpointing looks for them.
            hidden_states = layer(hidden_states, *args, *masks, **kwargs)
        return hidden_states if self.layer_norm is None else self.layer_norm(hidden_states)


class CustomTransformerEncoder(CustomTransformerStack):
    """The stack that reads the source."""

    _can_record_outputs = {
        "hidden_states": CustomTransformerEncoderLayer,
        "attentions": OutputRecorder(CustomTransformerAttention, layer_name=".self_attn", index=1),
    }

    def __init__(self, config: CustomTransformerConfig):
        super().__init__(config, config.vocab_size, config.encoder_layers, CustomTransformerEncoderLayer)
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Compute the last hidden state (B, S, D); zero at padding, unless attention weights are asked for.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S), 1 for tokens to attend to; positions are counted from it.
            inputs_embeds: (B, S, D), instead of `input_ids`.
            head_mask: (H,) or (L, H), factors of the heads, 0 to drop one; or stock's five axes (`layer_head_masks`).
        """
        self._check_inputs(input_ids, inputs_embeds, attention_mask, None)
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        position_ids = self._count_positions(tokens, attention_mask)
        packing, *_ = choose_packing(self.config, tokens, attention_mask, None, None, None, (None, None), kwargs)
        if packing is not None:
            input_ids, inputs_embeds, position_ids = map(packing.unpad, (input_ids, inputs_embeds, position_ids))
            kwargs.update(packing.attention_arguments())
        hidden_states, mask = self._embed(input_ids, inputs_embeds, position_ids), None
        if packing is None:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        head_masks = self._head_masks(tokens, packing, head_mask=head_mask)
        outputs = self._encode(hidden_states, mask, head_masks=head_masks, return_dict=True, **kwargs)
        if packing is not None:
            packing.repad_outputs(outputs)
        return outputs

    @capture_outputs
    def _encode(self, hidden_states, attention_mask, **kwargs) -> BaseModelOutput:
        """The layers, of a padded batch (B, S, D) or of a packed one (1, total, D)."""
        return BaseModelOutput(last_hidden_state=self._run_layers(hidden_states, attention_mask, **kwargs))


class CustomTransformerDecoder(CustomTransformerStack):
    """The stack that writes the target."""

    _can_record_outputs = {
        "hidden_states": CustomTransformerDecoderLayer,
        "attentions": OutputRecorder(CustomTransformerAttention, layer_name=".self_attn", index=1),
        "cross_attentions": OutputRecorder(CustomTransformerAttention, layer_name=".cross_attn", index=1),
    }

    def __init__(self, config: CustomTransformerConfig):
        super().__init__(config, config.decoder_vocab_size, config.decoder_layers, CustomTransformerDecoderLayer)
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        head_mask: torch.Tensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Compute the last hidden state (B, T, D); zero at padding, unless a cache or attention weights are asked for.

        Args:
            input_ids: (B, T), each the token before the one to predict.
            attention_mask: (B, P), 1 for tokens to attend to, P = cached + T; or a ready mask (B, 1, T, P).
            encoder_hidden_states: (B, S, D).
            encoder_attention_mask: (B, S).
            inputs_embeds: (B, T, D), instead of `input_ids`.
            head_mask, cross_attn_head_mask: as the encoder's, of self-attention and of that over the source.
        """
        if encoder_hidden_states is None:
            raise ValueError("the decoder reads `encoder_hidden_states`, but none were passed. Run the encoder first.")
        check_encoder(encoder_hidden_states, encoder_attention_mask, True)
        self._check_inputs(input_ids, inputs_embeds, attention_mask, past_key_values, "decoder_")
        past_key_values = self._wrap_cache(past_key_values, use_cache)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = self._count_positions(tokens, attention_mask, past_length)
        encoder = (encoder_hidden_states, encoder_attention_mask)
        packing, *_ = choose_packing(
            self.config, tokens, attention_mask, None, past_key_values, use_cache, encoder, kwargs
        )
        causal_mask = cross_mask = encoder_lengths = None
        if packing is not None:
            input_ids, inputs_embeds, position_ids = map(packing.unpad, (input_ids, inputs_embeds, position_ids))
            kwargs.update(packing.attention_arguments())
            encoder_hidden_states, encoder_lengths = packing.unpad_encoder(*encoder)
        hidden_states = self._embed(input_ids, inputs_embeds, position_ids)
        if packing is None:
            masking = {"config": self.config, "inputs_embeds": hidden_states}
            cache = None if past_key_values is None else past_key_values.self_attention_cache
            causal_mask = create_causal_mask(**masking, attention_mask=attention_mask, past_key_values=cache)
            cross_mask = create_bidirectional_mask(
                **masking, attention_mask=encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
            )
        outputs = self._decode(
            hidden_states,
            causal_mask,
            encoder_hidden_states,
            cross_mask,
            past_key_values=past_key_values,
            encoder_lengths=encoder_lengths,
            head_masks=self._head_masks(
                tokens, packing, decoder_head_mask=head_mask, cross_attn_head_mask=cross_attn_head_mask
            ),
            return_dict=True,
            **kwargs,
        )
        outputs.past_key_values = past_key_values if use_cache else None
        if packing is not None:
            packing.repad_outputs(outputs)
        return outputs

    def _wrap_cache(self, past_key_values, use_cache):
        """The cache of both attentions, a new one where it is asked for and there is none."""
        if past_key_values is None and not use_cache:
            return None
        if isinstance(past_key_values, EncoderDecoderCache):
            return past_key_values
        own = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        return EncoderDecoderCache(own, DynamicCache(config=self.config))

    @capture_outputs
    def _decode(self, *args, past_key_values, **kwargs) -> BaseModelOutputWithPastAndCrossAttentions:
        """The layers, of a padded batch (B, T, D) or of a packed one (1, total, D)."""
        is_checkpointing = self.gradient_checkpointing and self.training
        cache = None if is_checkpointing else past_key_values
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self._run_layers(*args, past_key_values=cache, **kwargs)
        )


class CustomTransformerModel(CustomTransformerPreTrainedModel):
    """Encoder and decoder without a head."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: CustomTransformerConfig):
        super().__init__(config)
        self.encoder = CustomTransformerEncoder(config)
        self.decoder = CustomTransformerDecoder(config)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As the host, for which `tie_word_embeddings` means all or nothing; one table of source and target has a field
        of its own."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys) if self.config.share_encoder_decoder_embeddings else {}

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, new_embeddings: nn.Module):
        self.encoder.embed_tokens = new_embeddings
        if self.config.share_encoder_decoder_embeddings:
            self.decoder.embed_tokens = new_embeddings

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As the host, of the source's table, which may be the target's too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.share_encoder_decoder_embeddings:
            self.config.decoder_vocab_size = self.config.vocab_size
        return embeddings

    def resize_decoder_token_embeddings(self, new_num_tokens: int) -> nn.Embedding:
        """Resize the target's table, where the source has one of its own."""
        if self.config.share_encoder_decoder_embeddings:
            raise ValueError("source and target share one table. Use `resize_token_embeddings`.")
        self.decoder.embed_tokens = self._get_resized_embeddings(self.decoder.embed_tokens, new_num_tokens)
        self.config.decoder_vocab_size = new_num_tokens
        return self.decoder.embed_tokens

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        head_mask: torch.Tensor | None = None,
        decoder_head_mask: torch.Tensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """Compute the decoder's last hidden state (B, T, D), zero at padding unless a cache or attention weights are
        asked for.

        Args:
            input_ids: (B, S), the source.
            attention_mask: (B, S), 1 for tokens to attend to.
            decoder_input_ids: (B, T), each the token before the one to predict.
            decoder_attention_mask: (B, cached + T).
            encoder_outputs: of an earlier call, instead of the source.
            inputs_embeds, decoder_inputs_embeds: (B, S, D) and (B, T, D), not yet scaled, instead of the ids.
            head_mask, decoder_head_mask, cross_attn_head_mask: (H,) or (L, H), factors of the heads of the encoder, of
                the decoder, and of the decoder over the source; 0 drops a head.
        """
        if any(kwargs.get(name) is not None for name in LENGTH_ARGUMENTS):
            raise ValueError(
                "`cu_seq_lens_q` says where packed documents begin, but which source a target belongs to is said by "
                "its row alone. Pass a row a pair, padded, with both masks."
            )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "the decoder has nothing to read. Pass `decoder_input_ids`, or `labels` to a "
                "`CustomTransformerForSeq2SeqLM`, which shifts them."
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                head_mask=head_mask,
                return_dict=True,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        outputs = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            head_mask=decoder_head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class CustomTransformerForSeq2SeqLM(RepeatsNoHeads, CustomTransformerPreTrainedModel, GenerationMixin):
    """Translation and the like: the target's next token, given the source and the tokens before it."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CustomTransformerConfig):
        super().__init__(config)
        # The class name matches no loss of the host's. This one takes labels that stand where they are predicted.
        self.loss_type = "ForMaskedLM"
        if not config.share_encoder_decoder_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
        self.model = CustomTransformerModel(config)
        self.lm_head = nn.Linear(config.d_model, config.decoder_vocab_size, bias=False)
        self.post_init()

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As the host, of the source's table and, where they are one, of the target's and the output projection."""
        if not self.config.share_encoder_decoder_embeddings:
            return self.model.resize_token_embeddings(*args, **kwargs)
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.decoder_vocab_size = self.config.vocab_size
        return embeddings

    def resize_decoder_token_embeddings(self, new_num_tokens: int) -> nn.Embedding:
        """Resize the target's table and the output projection, where the source has a table of its own."""
        self.model.resize_decoder_token_embeddings(new_num_tokens)
        self.lm_head = self._get_resized_lm_head(self.lm_head, new_num_tokens)
        self.tie_weights()
        return self.model.decoder.embed_tokens

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """The start token, then all labels (B, T) but the last; padding for -100."""
        if self.config.decoder_start_token_id is None or self.config.pad_token_id is None:
            raise ValueError(
                "labels are shifted behind `decoder_start_token_id`, and `pad_token_id` stands for -100, but the "
                f"configuration has {self.config.decoder_start_token_id} and {self.config.pad_token_id}. Set both."
            )
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    @cache_on_request
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        head_mask: torch.Tensor | None = None,
        decoder_head_mask: torch.Tensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """Compute logits (B, T, V) and, given `labels`, the loss.

        Args:
            input_ids: (B, S), the source.
            attention_mask: (B, S), 1 for tokens to attend to.
            decoder_input_ids: (B, T), each the token before the one to predict; made from `labels` when not given.
            decoder_attention_mask: (B, cached + T).
            encoder_outputs: of an earlier call, instead of the source.
            inputs_embeds, decoder_inputs_embeds: (B, S, D) and (B, T, D), not yet scaled, instead of the ids.
            labels: (B, T), the target; -100 is ignored.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for those indices.
            return_logits: compute them at all. Training with labels does not unless told to: the loss needs none.
            head_mask, decoder_head_mask, cross_attn_head_mask: (H,) or (L, H), factors of the heads of the encoder, of
                the decoder, and of the decoder over the source; 0 drops a head.
            kwargs: `label_smoothing` (in training `config.label_smoothing` when not given) and `z_loss` reach
                `linear_cross_entropy`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            check_labels(labels, labels.shape, self.config.decoder_vocab_size, "labels", "decoder_vocab_size")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if decoder_attention_mask is None and past_key_values is None:
                # What follows the last label of a row is the context of none.
                decoder_attention_mask = (labels != -100).flip(-1).cumsum(-1).flip(-1).clamp(max=1)
        elif labels is not None:
            shape = input_shape(decoder_input_ids, decoder_inputs_embeds)
            check_labels(labels, shape, self.config.decoder_vocab_size, "labels", "decoder_vocab_size")
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            head_mask=head_mask,
            decoder_head_mask=decoder_head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            return_dict=True,
            **kwargs,
        )
        if self.training:
            kwargs = {"label_smoothing": self.config.label_smoothing, **kwargs}
        logits, loss = logits_and_loss(
            self,
            self.lm_head,
            outputs.last_hidden_state,
            labels,
            self.config.decoder_vocab_size,
            logits_to_keep,
            return_logits,
            **kwargs,
        )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


__all__ = [
    "CustomTransformerForSeq2SeqLM",
    "CustomTransformerModel",
    "CustomTransformerPreTrainedModel",
]
