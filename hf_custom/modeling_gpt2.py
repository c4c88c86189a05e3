"""GPT-2 with Conv1D projections (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

A decoder of pre-norm blocks: causal self-attention, optional attention over an encoder, feed-forward, each added to the
residual stream. Parameter names, arguments and numbers are those of the stock `gpt2`, whose checkpoints load here.

Where it differs from stock: positions are counted from the attention mask when none are given, so left padding needs no
care; positions may be sinusoidal or rotary; `reorder_and_upcast_attn` works with every attention implementation; the
initial weights of the residual projections really shrink with depth; every loss honours `num_items_in_batch`; heads can
be masked; bad input is refused by name.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
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
    upcast_attention,
)
from .checks import (
    OwnShardsOnly,
    check_answer_positions,
    check_attention_mask,
    check_encoder,
    check_ids,
    check_labels,
    check_positions,
    check_sequence_labels,
    input_shape,
)
from .configuration_gpt2 import CustomGPT2Config
from .dropout import Dropout
from .layers import (
    PROJECTIONS,
    SequenceSummary,
    convert_on_load,
    get_activation,
    get_projection,
    project_activated,
)
from .losses import logits_and_loss, next_token_labels, sequence_classification_loss
from .ops import (
    apply_rotary,
    last_attended,
    merge_heads,
    padding_of,
    positions_from_mask,
    rotary_positions,
    sinusoidal_positions,
    split_heads,
)
from .outputs import DoubleHeadsModelOutput
from .packing import cache_on_request, choose_packing
from .parallel import Divisible


class CustomGPT2Attention(nn.Module):
    """Multi-head attention over the sequence itself or, as `is_cross_attention`, over an encoder's states."""

    def __init__(self, config: CustomGPT2Config, is_cross_attention: bool = False, layer_idx: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross_attention = is_cross_attention
        self.is_causal = not is_cross_attention
        self.head_dim = config.hidden_size // config.num_attention_heads

        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1

        width = config.hidden_size
        if is_cross_attention:
            self.q_attn = get_projection(config, width, width)
            self.c_attn = get_projection(config, 2 * width, width)
        else:
            self.c_attn = get_projection(config, 3 * width, width)
        self.c_proj = get_projection(config, width, width, is_residual_projection=True)
        self.attn_dropout = Dropout(config.attn_pdrop)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.is_cross_attention:
            query = split_heads(self.q_attn(hidden_states), self.head_dim)  # (B, H, T, K)
            key, value = self._encoder_key_value(encoder_hidden_states, past_key_values)
        else:
            projections = self.c_attn(hidden_states).chunk(3, dim=-1)
            query, key, value = (split_heads(states, self.head_dim) for states in projections)
            if position_embeddings is not None:
                query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
            if past_key_values is not None:
                cache = getattr(past_key_values, "self_attention_cache", past_key_values)
                key, value = cache.update(key, value, self.layer_idx)

        implementation = implementation_for(self.config._attn_implementation)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if self.config.reorder_and_upcast_attn:
            attention_interface = upcast_attention(attention_interface, implementation)
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output, attn_weights = mask_heads(attn_output, attn_weights, head_mask)
        return self.resid_dropout(self.c_proj(merge_heads(attn_output))), attn_weights

    def _encoder_key_value(self, encoder_hidden_states, past_key_values):
        """Keys and values (B, H, S, K) of the encoder, projected once a sequence when there is a cache."""
        is_cached = past_key_values is not None and past_key_values.is_updated.get(self.layer_idx)
        if is_cached:
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        projections = self.c_attn(encoder_hidden_states).chunk(2, dim=-1)
        key, value = (split_heads(states, self.head_dim) for states in projections)
        if past_key_values is not None:
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return key, value


class CustomGPT2MLP(nn.Module):
    """Position-wise feed-forward layer."""

    def __init__(self, config: CustomGPT2Config):
        super().__init__()
        width = config.hidden_size
        inner = config.n_inner if config.n_inner is not None else 4 * width
        self.act = get_activation(config.activation_function, "activation_function")
        self.c_fc = get_projection(config, inner, width)
        self.c_proj = get_projection(config, width, inner, is_residual_projection=True)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(project_activated(self.act, self.c_fc(hidden_states), self.c_proj))


class CustomGPT2Block(GradientCheckpointingLayer):
    """x + attention(norm(x)), then + attention over the encoder where there is one, then + feed-forward."""

    def __init__(self, config: CustomGPT2Config, layer_idx: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = CustomGPT2Attention(config, layer_idx=layer_idx)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        if config.add_cross_attention:
            self.crossattention = CustomGPT2Attention(config, is_cross_attention=True, layer_idx=layer_idx)
            self.ln_cross_attn = nn.LayerNorm(width, eps=eps)
        self.mlp = CustomGPT2MLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        encoder_lengths: dict | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attn_output, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            head_mask=head_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        if encoder_hidden_states is not None:
            # Without the other keywords: they describe the decoder's sequence, not the encoder's.
            attn_output, _ = self.crossattention(
                self.ln_cross_attn(hidden_states),
                past_key_values=past_key_values,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                head_mask=head_mask,
                **(encoder_lengths or {}),
            )
            hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class CustomGPT2PreTrainedModel(Divisible, OwnShardsOnly, PreTrainedModel):
    """What every GPT-2 class declares to the host, and how weights start."""

    config: CustomGPT2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CustomGPT2Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": CustomGPT2Block,
        "attentions": OutputRecorder(CustomGPT2Attention, layer_name=".attn", index=1),
        "cross_attentions": OutputRecorder(CustomGPT2Attention, layer_name=".crossattention", index=1),
    }
    # Every class ships its code when saved; the registry names the Auto class of those that have one.
    _auto_class = "AutoModel"
    # Causal masks that old checkpoints stored as buffers.
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$", r"crossattention\.(masked_)?bias$"]

    def __init__(self, config: CustomGPT2Config, *inputs, **kwargs):
        if config.model_type in CustomGPT2Config.stock_model_types:
            raise TypeError(
                f"{type(self).__name__} needs a CustomGPT2Config but got a stock {type(config).__name__}. "
                "Convert it: `CustomGPT2Config.from_dict(config.to_dict())`."
            )
        # Fields may have changed since the configuration was made; refuse before any tensor is allocated.
        config.validate_architecture()
        if config.projection_layout == "linear":
            convert_on_load(config.model_type, ("c_attn", "c_fc", "c_proj", "q_attn"))
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, tuple(PROJECTIONS.values())):
            std = self.config.initializer_range
            if module.is_residual_projection:
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)

    def _logits_and_loss(self, hidden_states, labels, attention_mask, logits_to_keep, return_logits, kwargs):
        """Of predicting each token from those before it."""
        shift_labels = kwargs.pop("shift_labels", None)
        if labels is not None:
            shift_labels = next_token_labels(labels, attention_mask, shift_labels)
        return logits_and_loss(
            self,
            self.lm_head,
            hidden_states,
            labels,
            self.config.vocab_size,
            logits_to_keep,
            return_logits,
            shift_labels,
            **kwargs,
        )


class CustomGPT2Model(CustomGPT2PreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: CustomGPT2Config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([CustomGPT2Block(config, layer_idx=i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Module):
        self.wte = new_embeddings

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Compute the last hidden state (B, T, D); zero at padding, unless a cache or attention weights are asked for.

        Args:
            input_ids: (B, T), or (..., T), whose leading axes are kept in the output.
            attention_mask: (B, S), 1 for tokens to attend to, S = cached + T; or a ready mask (B, 1, T, S).
            token_type_ids: shaped as `input_ids`; looked up in the word embeddings and added, as in GPT.
            position_ids: shaped as `input_ids`; counted from `attention_mask` when not given. Without a mask, those
                that restart mark packed documents, as the host's `cu_seq_lens_q` does.
            inputs_embeds: (B, T, D), instead of `input_ids`.
            encoder_hidden_states: (B, S', D), read by the blocks of a model with `add_cross_attention`.
            encoder_attention_mask: (B, S').
            head_mask: (H,) or (L, H), factors of the heads, 0 to drop one; or stock's five axes (`layer_head_masks`).
        """
        output_shape = (*input_shape(input_ids, inputs_embeds), self.config.hidden_size)
        if encoder_hidden_states is not None:
            check_encoder(encoder_hidden_states, encoder_attention_mask, self.config.add_cross_attention)
        if token_type_ids is not None:
            check_ids(token_type_ids, self.config.vocab_size, "token_type_ids")
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size, "input_ids")
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        input_ids, token_type_ids, position_ids = (
            ids if ids is None else ids.flatten(end_dim=-2) for ids in (input_ids, token_type_ids, position_ids)
        )
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 3:
            attention_mask = attention_mask.flatten(end_dim=-2)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if not torch.compiler.is_compiling():
            check_attention_mask(attention_mask, *tokens.shape[:2], past_key_values)
        encoder = (encoder_hidden_states, encoder_attention_mask)
        packing, attention_mask, position_ids, mask_positions = choose_packing(
            self.config, tokens, attention_mask, position_ids, past_key_values, use_cache, encoder, kwargs
        )
        if position_ids is None:
            position_ids = self._count_positions(tokens, attention_mask, past_key_values)
        if self.config.position_embedding_type == "learned":
            check_positions(position_ids, self.config.max_position_embeddings, "n_positions")
        kwargs["head_masks"] = layer_head_masks(head_mask, self.h, self.config, tokens.shape[:2], packing)
        causal_mask = cross_mask = encoder_lengths = None
        if packing is not None:
            input_ids, inputs_embeds, token_type_ids, position_ids = (
                packing.unpad(batch) for batch in (input_ids, inputs_embeds, token_type_ids, position_ids)
            )
            kwargs.update(packing.attention_arguments())
            if encoder_hidden_states is not None:
                encoder_hidden_states, encoder_lengths = packing.unpad_encoder(*encoder)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if packing is None:
            # From the caller's positions and cache alone: positions that restart, without a cache, mark documents.
            masking = {"config": self.config, "inputs_embeds": inputs_embeds}
            causal_mask = create_causal_mask(
                **masking, attention_mask=attention_mask, past_key_values=past_key_values, position_ids=mask_positions
            )
            if encoder_hidden_states is not None:
                cross_mask = create_bidirectional_mask(
                    **masking, attention_mask=encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
                )
        hidden_states, position_embeddings = self._embed(inputs_embeds, token_type_ids, position_ids)
        outputs = self._decode(
            hidden_states,
            past_key_values,
            causal_mask,
            encoder_hidden_states,
            encoder_attention_mask=cross_mask,
            encoder_lengths=encoder_lengths,
            position_embeddings=position_embeddings,
            use_cache=use_cache,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        if packing is not None:
            packing.repad_outputs(outputs)
        outputs.last_hidden_state = outputs.last_hidden_state.view(output_shape)
        return outputs

    @capture_outputs
    def _decode(
        self, hidden_states, past_key_values, causal_mask, encoder_hidden_states, head_masks, use_cache, **kwargs
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The blocks and the last norm, of a padded batch (B, T, D) or of a packed one (1, total, D)."""
        # Taken by `capture_outputs`; a kernel must not see them.
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and self.config.add_cross_attention:
            if not isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        is_checkpointing = self.gradient_checkpointing and self.training
        for block, head_mask in zip(self.h, head_masks, strict=True):
            # Tensors that may need a gradient are positional, where checkpointing looks for them.
            hidden_states = block(
                hidden_states,
                None if is_checkpointing else past_key_values,
                causal_mask,
                encoder_hidden_states,
                head_mask,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _embed(self, inputs_embeds, token_type_ids, position_ids):
        """Input of the first block (B, T, D), and the cosines and sines for all of them when positions are rotary."""
        config, hidden_states, position_embeddings = self.config, inputs_embeds, None
        if config.position_embedding_type == "learned":
            hidden_states = hidden_states + self.wpe(position_ids)
        elif config.position_embedding_type == "sinusoidal":
            hidden_states = hidden_states + sinusoidal_positions(position_ids, config.hidden_size).to(
                hidden_states.dtype
            )
        else:
            head_size = config.hidden_size // config.num_attention_heads
            position_embeddings = rotary_positions(position_ids, head_size, config.rope_theta)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        return self.drop(hidden_states), position_embeddings

    def _count_positions(self, tokens, attention_mask, past_key_values):
        """Positions of the new tokens, (B, T) or (1, T): the attended tokens before each, else all before it."""
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        new = torch.arange(tokens.shape[1], device=tokens.device) + past_length
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return positions_from_mask(attention_mask)[:, new]
        return new.unsqueeze(0)


class CustomGPT2ForCausalLM(RepeatsNoHeads, CustomGPT2PreTrainedModel, GenerationMixin):
    """Language model: the next token's logits, weights tied to the word embeddings."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: CustomGPT2Config):
        super().__init__(config)
        self.transformer = CustomGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @cache_on_request
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        """Compute logits (B, T, V) and, given `labels`, the loss of predicting each token from those before it.

        Args:
            labels: (B, T), usually `input_ids` itself; they are shifted inside. -100 is ignored, and so is a label
                that padding would have to predict.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for those indices.
            return_logits: compute them at all. Training with labels does not unless told to: the loss needs none.
            kwargs: `label_smoothing` and `z_loss` reach `linear_cross_entropy`.
        """
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, shape, self.config.vocab_size, "labels", "vocab_size")
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            head_mask=head_mask,
            **kwargs,
        )
        logits, loss = self._logits_and_loss(
            outputs.last_hidden_state, labels, attention_mask, logits_to_keep, return_logits, kwargs
        )
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


class CustomGPT2DoubleHeadsModel(RepeatsNoHeads, CustomGPT2PreTrainedModel, GenerationMixin):
    """Language model with a multiple-choice head beside it (Radford et al. 2018, section 3.2)."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: CustomGPT2Config):
        super().__init__(config)
        # The class name matches no loss of the host's; naming it makes the Trainer count shifted labels.
        self.loss_type = "ForCausalLM"
        self.transformer = CustomGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.multiple_choice_head = SequenceSummary(config, num_classes=1)
        self.post_init()

    @cache_on_request
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mc_token_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        mc_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        return_logits: bool | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DoubleHeadsModelOutput:
        """Compute logits (B, C, T, V) and scores (B, C) of C choices, and their two losses.

        Args:
            input_ids: (B, C, T).
            mc_token_ids: (B, C), the position whose state stands for the choice; the last one when not given.
            labels: (B, C, T), shifted inside; -100 is ignored.
            mc_labels: (B,), the right choice.
            return_logits: compute the language model's logits; training with `labels` does not unless told to.
        """
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, shape, self.config.vocab_size, "labels", "vocab_size")
        if mc_labels is not None:
            check_labels(mc_labels, shape[:-2], shape[-2], "mc_labels", "number of choices")
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            head_mask=head_mask,
            **kwargs,
        )
        logits, loss = self._logits_and_loss(
            outputs.last_hidden_state, labels, attention_mask, 0, return_logits, kwargs
        )
        mc_logits = self.multiple_choice_head(outputs.last_hidden_state, mc_token_ids, attention_mask).squeeze(-1)
        mc_loss = None
        if mc_labels is not None:
            mc_loss = nn.functional.cross_entropy(mc_logits.view(-1, mc_logits.shape[-1]), mc_labels.view(-1))
        return DoubleHeadsModelOutput(
            loss=loss,
            mc_loss=mc_loss,
            logits=logits,
            mc_logits=mc_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CustomGPT2ForSequenceClassification(CustomGPT2PreTrainedModel):
    """Classifier of whole sequences, reading the last token, the only one that has seen all others."""

    def __init__(self, config: CustomGPT2Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = CustomGPT2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @cache_on_request
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Compute logits (B, L) for L labels and the loss of `config.problem_type`, found from `labels` when unset.

        Args:
            labels: (B,) class indices, or reals (B,) or (B, L) for regression, or zeros and ones (B, L).
            num_items_in_batch: number of labels over all accumulated micro-batches, as the Trainer passes it.
        """
        batch_size = input_shape(input_ids, inputs_embeds)[0]
        if labels is not None:
            check_sequence_labels(labels, batch_size, self.config)
        last_token = self._last_tokens(input_ids, attention_mask, batch_size)
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.score(hidden_states[torch.arange(batch_size, device=hidden_states.device), last_token])
        loss = None
        if labels is not None:
            loss = sequence_classification_loss(
                logits, labels.to(logits.device), self.config.problem_type, num_items_in_batch
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_tokens(self, input_ids, attention_mask, batch_size):
        """Where each row ends: its last token that is not `pad_token_id`, as in stock; else by the mask; else -1."""
        if self.config.pad_token_id is not None and input_ids is not None:
            return last_attended(input_ids != self.config.pad_token_id)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return last_attended(attention_mask)
        if batch_size > 1 and self.config.pad_token_id is None:
            raise ValueError(
                "the rows of this batch may end at different places, but `config.pad_token_id` is not set and no "
                "`attention_mask` was passed. Set `model.config.pad_token_id = tokenizer.pad_token_id`."
            )
        return -1


class CustomGPT2ForTokenClassification(CustomGPT2PreTrainedModel):
    """Classifier of each token."""

    def __init__(self, config: CustomGPT2Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = CustomGPT2Model(config)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @cache_on_request(returns_cache=False)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Compute logits (B, T, L) and, given `labels` (B, T) with -100 ignored, the cross-entropy."""
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, shape, self.num_labels, "labels", "num_labels")
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = self.loss_function(logits, labels, self.config, **kwargs) if labels is not None else None
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CustomGPT2ForQuestionAnswering(CustomGPT2PreTrainedModel):
    """Extractive question answering: a score for each token to start and to end the answer."""

    def __init__(self, config: CustomGPT2Config):
        super().__init__(config)
        self.transformer = CustomGPT2Model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @cache_on_request(returns_cache=False)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Compute two logits a token, (B, T) each, and the mean of the two losses.

        Args:
            start_positions, end_positions: (B,), token indices; those beyond the sequence are ignored.
        """
        shape = input_shape(input_ids, inputs_embeds)
        for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
            if positions is not None:
                check_answer_positions(positions, shape[0], name)
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        # The loss compares all positions, so that padding is the same for it on every path.
        is_padding = padding_of(attention_mask, shape)
        hidden_states = outputs.last_hidden_state
        if is_padding is not None:
            hidden_states = hidden_states.masked_fill(is_padding[..., None], 0.0)
        start_logits, end_logits = self.qa_outputs(hidden_states).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "CustomGPT2DoubleHeadsModel",
    "CustomGPT2ForCausalLM",
    "CustomGPT2ForQuestionAnswering",
    "CustomGPT2ForSequenceClassification",
    "CustomGPT2ForTokenClassification",
    "CustomGPT2Model",
    "CustomGPT2PreTrainedModel",
]
