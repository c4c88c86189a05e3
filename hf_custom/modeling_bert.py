"""BERT (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers"), with image patches on request.

An encoder of post-norm layers over the sum of word, segment and position embeddings: self-attention, optional attention
over an encoder, feed-forward, each added to its input and normalised. Parameter names, arguments and numbers are those
of the stock `bert`, whose checkpoints load here. With `vision_config` the patches of an image follow the text in one
stream (Kim et al. 2021, "ViLT"), told apart by a modality embedding.

Where it differs from stock: padding is not computed; positions begin at each row's first real token, so left padding
needs no care, and the pooler reads that token; positions may be sinusoidal, rotary or relative, with every attention
implementation but the flash kernels for the last; the masked-LM head reads labelled positions alone; every loss honours
`num_items_in_batch`; heads can be masked; bad input is refused by name.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import eager_attention_forward, implementation_for, layer_head_masks, mask_heads
from .checks import (
    OwnShardsOnly,
    check_attention_mask,
    check_encoder,
    check_ids,
    check_positions,
    check_token_types,
    input_shape,
)
from .configuration_bert import CustomBertConfig
from .dropout import Dropout
from .layers import Table, get_activation, project_activated
from .matmul import project
from .modeling_blip2_vision import CustomBlip2VisionModel
from .ops import (
    apply_rotary,
    first_attended,
    last_attended,
    merge_heads,
    relative_position_scores,
    rotary_positions,
    sinusoidal_positions,
    split_heads,
)
from .packing import choose_packing
from .parallel import Divisible

if TYPE_CHECKING:
    # Never run: the host ships the files that it reads here, and a model on the Hub should bring its heads.
    from .modeling_bert_heads import CustomBertForMaskedLM  # noqa: F401

# Rows of the table of modalities.
TEXT, IMAGE = 0, 1


class CustomBertEmbeddings(nn.Module):
    """The sum of what a token is, which segment it is in and where it stands; norm and dropout apart, so that other
    tokens can join before them."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        if config.position_embedding_type == "absolute":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        if config.vision_config is not None:
            self.modality_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        token_type_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor,
    ) -> torch.Tensor:
        """(B, T) -> (B, T, D)."""
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            embeddings = embeddings + self.token_type_embeddings.weight[0]
        else:
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if self.config.position_embedding_type == "absolute":
            embeddings = embeddings + self.position_embeddings(position_ids)
        elif self.config.position_embedding_type == "sinusoidal":
            positions = sinusoidal_positions(position_ids, self.config.hidden_size)
            embeddings = embeddings + positions.to(embeddings.dtype)
        return embeddings

    def join(self, embeddings: torch.Tensor, patches: torch.Tensor | None) -> torch.Tensor:
        """Text (B, T, D) and, behind it, the patches of an image (B, P, D), each marked by its modality."""
        modalities = self.modality_type_embeddings.weight
        embeddings = embeddings + modalities[TEXT]
        return embeddings if patches is None else torch.cat((embeddings, patches + modalities[IMAGE]), dim=1)

    def normalize(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.LayerNorm(embeddings))


class CustomBertMultiHeadAttention(nn.Module):
    """Multi-head attention over the sequence itself or, as `is_cross_attention`, over an encoder's states."""

    def __init__(self, config: CustomBertConfig, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross_attention = is_cross_attention
        self.is_causal = config.is_decoder and not is_cross_attention
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.is_relative = not is_cross_attention and config.position_embedding_type.startswith("relative")
        if self.is_relative:
            self.distance_embedding = Table(2 * config.max_position_embeddings - 1, self.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = split_heads(project(self.query, hidden_states), self.head_dim)  # (B, H, T, K)
        columns = None
        if self.is_cross_attention:
            key, value = self._encoder_key_value(encoder_hidden_states, past_key_values)
        else:
            key, value = self._key_value(hidden_states)
            if position_embeddings is not None:
                query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
            if past_key_values is not None:
                cache = getattr(past_key_values, "self_attention_cache", past_key_values)
                if self.is_relative:
                    # Before the update: a static cache counts on in the same tensor.
                    columns = torch.arange(query.shape[2], device=query.device) + cache.get_seq_length(self.layer_idx)
                key, value = cache.update(key, value, self.layer_idx)
        if self.is_relative:
            kwargs["position_bias"] = self._position_bias(query, key, columns, **kwargs)

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
        return merge_heads(attn_output), attn_weights

    def _key_value(self, states):
        """Keys and values (B, H, S, K) of (B, S, D)."""
        return tuple(split_heads(project(layer, states), self.head_dim) for layer in (self.key, self.value))

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

    def _position_bias(self, query, key, columns, position_ids, cu_seq_lens_q=None, **kwargs):
        """What relative positions add to the scores (B, H, T, S) or, of packed sequences, the function giving it.

        Args:
            columns: (T,), of the queries among the cached tokens; `None` without a cache.
        """
        has_key_term = self.config.position_embedding_type == "relative_key_query"
        options = {"distances": self.distance_embedding(), "has_key_term": has_key_term, "scaling": self.scaling}
        if cu_seq_lens_q is not None:
            return partial(relative_position_scores, **options)
        query_positions = key_positions = position_ids
        if columns is not None:
            # The positions of what is cached are not known any more; columns have the same differences.
            query_positions = columns.unsqueeze(0)
            key_positions = torch.arange(key.shape[2], device=key.device).unsqueeze(0)
        return relative_position_scores(query, key, query_positions, key_positions, **options)


class CustomBertSelfOutput(nn.Module):
    """Projection, dropout and the norm of the sum with the input."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(project(self.dense, hidden_states)) + residual)


class CustomBertAttention(nn.Module):
    """Attention and its output, of a layer's first half."""

    def __init__(self, config: CustomBertConfig, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.self = CustomBertMultiHeadAttention(config, layer_idx, is_cross_attention)
        self.output = CustomBertSelfOutput(config)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        attn_output, _ = self.self(hidden_states, *args, **kwargs)
        return self.output(attn_output, hidden_states)


class CustomBertIntermediate(nn.Module):
    """First half of the feed-forward layer; its activation is computed with the second half, which recomputes it."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = get_activation(config.hidden_act, "hidden_act")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.dense, hidden_states)


class CustomBertOutput(nn.Module):
    """Second half of the feed-forward layer, dropout and the norm of the sum with the input."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor, act: nn.Module) -> torch.Tensor:
        hidden_states = project_activated(act, hidden_states, self.dense)
        return self.LayerNorm(self.dropout(hidden_states) + residual)


class CustomBertLayer(GradientCheckpointingLayer):
    """norm(x + attention(x)), the same over the encoder where there is one, then norm(x + feed-forward(x))."""

    def __init__(self, config: CustomBertConfig, layer_idx: int):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = CustomBertAttention(config, layer_idx)
        if config.add_cross_attention:
            self.crossattention = CustomBertAttention(config, layer_idx, is_cross_attention=True)
        self.intermediate = CustomBertIntermediate(config)
        self.output = CustomBertOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_lengths: dict | None = None,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.attention(
            hidden_states, attention_mask, past_key_values=past_key_values, head_mask=head_mask, **kwargs
        )
        if encoder_hidden_states is not None:
            # Without the other keywords: they describe the decoder's sequence, not the encoder's.
            hidden_states = self.crossattention(
                hidden_states,
                encoder_attention_mask,
                encoder_hidden_states,
                past_key_values=past_key_values,
                head_mask=head_mask,
                **(encoder_lengths or {}),
            )
        if self.chunk_size_feed_forward:
            chunks = hidden_states.split(self.chunk_size_feed_forward, dim=1)
            return torch.cat([self.feed_forward(chunk) for chunk in chunks], dim=1)
        return self.feed_forward(hidden_states)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D), each position by itself."""
        return self.output(self.intermediate(hidden_states), hidden_states, self.intermediate.intermediate_act_fn)


class CustomBertEncoder(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.layer = nn.ModuleList([CustomBertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor, *args, head_masks: tuple, **kwargs) -> torch.Tensor:
        for layer, head_mask in zip(self.layer, head_masks, strict=True):
            # Tensors that may need a gradient are positional, where checkpointing looks for them.
            hidden_states = layer(hidden_states, *args, head_mask, **kwargs)
        return hidden_states


class CustomBertPooler(nn.Module):
    """The first real token's state, projected: (B, T, D) -> (B, D)."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        first_token = hidden_states[:, 0]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            rows = torch.arange(len(hidden_states), device=hidden_states.device)
            first_token = hidden_states[rows, first_attended(attention_mask)]
        return self.activation(self.dense(first_token))


class CustomBertPreTrainedModel(Divisible, OwnShardsOnly, PreTrainedModel):
    """What every BERT class declares to the host, how weights start, and what the heads share."""

    config: CustomBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CustomBertEmbeddings", "CustomBertLayer", "CustomBlip2VisionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": CustomBertLayer,
        "attentions": OutputRecorder(CustomBertMultiHeadAttention, layer_name=".attention.self", index=1),
        "cross_attentions": OutputRecorder(CustomBertMultiHeadAttention, layer_name=".crossattention.self", index=1),
    }
    _auto_class = "AutoModel"
    # What old checkpoints stored: a buffer, and the table that relative positions do not read.
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$", r"embeddings\.position_embeddings\.weight$"]

    def __init__(self, config: CustomBertConfig, *inputs, **kwargs):
        if config.model_type in CustomBertConfig.stock_model_types:
            raise TypeError(
                f"{type(self).__name__} needs a CustomBertConfig but got a stock {type(config).__name__}. "
                "Convert it: `CustomBertConfig.from_dict(config.to_dict())`."
            )
        # Fields may have changed since the configuration was made; refuse before any tensor is allocated.
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)


class CustomBertModel(CustomBertPreTrainedModel):
    """The encoder (or, as `is_decoder`, the decoder) without a head."""

    def __init__(self, config: CustomBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = CustomBertEmbeddings(config)
        if config.vision_config is not None:
            self.vision_model = CustomBlip2VisionModel(config.vision_config)
            self.vision_projection = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        self.encoder = CustomBertEncoder(config)
        self.pooler = CustomBertPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, new_embeddings: nn.Module):
        self.embeddings.word_embeddings = new_embeddings

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Compute the last hidden state (B, T, D), or (B, T + P, D) with the patches of images behind the text.

        States at padding are zero, unless a cache or attention weights are asked for.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 1 for tokens to attend to, S = cached + T; or a ready mask (B, 1, T, S). Of the text
                alone: patches are always attended to.
            token_type_ids: (B, T), the segment of each token; 0 when not given.
            position_ids: (B, T) or (1, T); counted from the first real token of a row when not given. Without a mask,
                those that restart mark packed documents, as the host's `cu_seq_lens_q` does.
            inputs_embeds: (B, T, D), instead of `input_ids`.
            encoder_hidden_states: (B, S', D), read by the layers of a decoder with `add_cross_attention`.
            encoder_attention_mask: (B, S').
            pixel_values: (B, 3, height, width), an image a row, for a model with `vision_config`.
            interpolate_pos_encoding: take images of another size than the configuration's.
            head_mask: (H,) or (L, H), factors of the heads, 0 to drop one; or stock's five axes (`layer_head_masks`).
        """
        config = self.config
        shape = self._check_inputs(input_ids, inputs_embeds, token_type_ids, attention_mask, past_key_values)
        if encoder_hidden_states is not None:
            check_encoder(encoder_hidden_states, encoder_attention_mask, config.add_cross_attention)
        use_cache = bool(use_cache) and config.is_decoder
        tokens, patches, text_mask = input_ids if inputs_embeds is None else inputs_embeds, None, attention_mask
        if pixel_values is not None:
            patches = self._embed_image(pixel_values, interpolate_pos_encoding, shape)
            position_ids, attention_mask = self._join_image(tokens, attention_mask, position_ids, patches)
            tokens = attention_mask
        encoder = (encoder_hidden_states, encoder_attention_mask)
        packing, attention_mask, position_ids, mask_positions = choose_packing(
            config, tokens, attention_mask, position_ids, past_key_values, use_cache, encoder, kwargs
        )
        if position_ids is None:
            position_ids = self._count_positions(tokens, attention_mask, past_key_values)
        if config.position_embedding_type not in ("sinusoidal", "rope"):
            # Patches have positions of their own; only distances reach from them to the text.
            looked_up = position_ids[:, : shape[1]] if config.position_embedding_type == "absolute" else position_ids
            check_positions(looked_up, config.max_position_embeddings, "max_position_embeddings")
        kwargs["head_masks"] = layer_head_masks(head_mask, self.encoder.layer, config, tokens.shape[:2], packing)
        encoder_lengths = None
        if config.vision_config is not None:
            # Text and patches are joined before padding is left out.
            text = self.embeddings(input_ids, inputs_embeds, token_type_ids, position_ids[:, : shape[1]])
            input_ids, token_type_ids, inputs_embeds = None, None, self.embeddings.join(text, patches)
        if packing is not None:
            input_ids, inputs_embeds, token_type_ids, position_ids = (
                packing.unpad(batch) for batch in (input_ids, inputs_embeds, token_type_ids, position_ids)
            )
            kwargs.update(packing.attention_arguments())
            if encoder_hidden_states is not None:
                encoder_hidden_states, encoder_lengths = packing.unpad_encoder(*encoder)
        if config.vision_config is None:
            inputs_embeds = self.embeddings(input_ids, inputs_embeds, token_type_ids, position_ids)
        masks = (None, None)
        if packing is None:
            masks = self._make_masks(inputs_embeds, attention_mask, past_key_values, mask_positions, encoder)
        outputs = self._encode(
            self.embeddings.normalize(inputs_embeds),
            masks[0],
            encoder_hidden_states,
            masks[1],
            past_key_values=past_key_values,
            encoder_lengths=encoder_lengths,
            use_cache=use_cache,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        if packing is not None:
            packing.repad_outputs(outputs)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(outputs.last_hidden_state, text_mask if past_key_values is None else None)
        return BaseModelOutputWithPoolingAndCrossAttentions(pooler_output=pooled, **outputs)

    def _check_inputs(self, input_ids, inputs_embeds, token_type_ids, attention_mask, past_key_values):
        """Refuse what cannot be computed; the shape (B, T) of the rest."""
        is_relative = self.config.position_embedding_type.startswith("relative")
        if is_relative and "flash" in self.config._attn_implementation:
            raise ValueError(
                f"`position_embedding_type` {self.config.position_embedding_type!r} adds to the scores of attention, "
                f"which {self.config._attn_implementation!r} cannot. Use `attn_implementation='sdpa'`."
            )
        shape = input_shape(input_ids, inputs_embeds)
        if len(shape) != 2:
            raise ValueError(f"the input has shape {shape} but (batch, length) is needed. Flatten the leading axes.")
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size, "input_ids")
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        if token_type_ids is not None:
            check_token_types(token_type_ids, self.config.type_vocab_size)
        if not torch.compiler.is_compiling():
            check_attention_mask(attention_mask, *shape, past_key_values)
        return shape

    def _embed_image(self, pixel_values, interpolate_pos_encoding, shape):
        """The projected patches (B, P, D) of an image a row."""
        if self.config.vision_config is None:
            raise ValueError(
                "`pixel_values` was passed to a model that reads text alone. Build it with `vision_config` in the "
                "configuration."
            )
        if len(pixel_values) != shape[0]:
            raise ValueError(f"there are {len(pixel_values)} images but {shape[0]} texts. Pass one image a text.")
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True)
        return project(self.vision_projection, outputs.last_hidden_state)

    def _join_image(self, tokens, attention_mask, position_ids, patches):
        """Positions and mask of text and patches in one stream, (B, T + P) each: patches go on counting."""
        batch, length = tokens.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones((batch, length), dtype=torch.long, device=patches.device)
        if attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` has {attention_mask.ndim} dimensions, but with an image it covers the text alone. "
                "Pass the mask (B, T) that the tokenizer returned."
            )
        if position_ids is None:
            position_ids = self._count_positions(tokens, attention_mask, None)
        position_ids = position_ids.expand(batch, -1)
        last = position_ids.take_along_dim(last_attended(attention_mask)[:, None], dim=1)
        is_empty = attention_mask.sum(-1, keepdim=True) == 0
        behind = torch.arange(patches.shape[1], device=patches.device) + (last + 1).masked_fill(is_empty, 0)
        ones = attention_mask.new_ones((batch, patches.shape[1]))
        return torch.cat((position_ids, behind), dim=1), torch.cat((attention_mask, ones), dim=1)

    def _make_masks(self, inputs_embeds, attention_mask, past_key_values, position_ids, encoder):
        """The masks of self-attention and of attention over the encoder, as the implementation wants them."""
        masking = {"config": self.config, "inputs_embeds": inputs_embeds}
        if self.config.is_decoder:
            # From the caller's positions and cache alone: positions that restart, without a cache, mark documents.
            mask = create_causal_mask(
                **masking, attention_mask=attention_mask, past_key_values=past_key_values, position_ids=position_ids
            )
        else:
            documents = None
            if attention_mask is None and position_ids is not None:
                documents = find_packed_sequence_indices(position_ids.expand(len(inputs_embeds), -1))
            together = None if documents is None else packed_sequence_mask_function(documents)
            mask = create_bidirectional_mask(**masking, attention_mask=attention_mask, and_mask_function=together)
        cross_mask = None
        if encoder[0] is not None:
            cross_mask = create_bidirectional_mask(
                **masking, attention_mask=encoder[1], encoder_hidden_states=encoder[0]
            )
        return mask, cross_mask

    @capture_outputs
    def _encode(
        self,
        hidden_states,
        attention_mask,
        encoder_hidden_states,
        encoder_attention_mask,
        past_key_values,
        use_cache,
        position_ids,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The layers, of a padded batch (B, T, D) or of a packed one (1, total, D)."""
        # Taken by `capture_outputs`; a kernel must not see them.
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)
        config = self.config
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None and config.add_cross_attention:
            if not isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=config))
        if config.position_embedding_type == "rope":
            head_size = config.hidden_size // config.num_attention_heads
            kwargs["position_embeddings"] = rotary_positions(position_ids, head_size, config.rope_theta)
        is_checkpointing = self.gradient_checkpointing and self.training
        hidden_states = self.encoder(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values=None if is_checkpointing else past_key_values,
            position_ids=position_ids,
            **kwargs,
        )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None
        )

    def _count_positions(self, tokens, attention_mask, past_key_values):
        """Positions of the new tokens, (B, T) or (1, T): columns, from the first that is real in each row."""
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        columns = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0) + past_length
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return (columns - first_attended(attention_mask)[:, None]).clamp(min=0)
        return columns


__all__ = ["CustomBertModel", "CustomBertPreTrainedModel"]
