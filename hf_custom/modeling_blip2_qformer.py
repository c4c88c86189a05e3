"""BLIP-2's Querying Transformer (Li et al. 2023, "BLIP-2", section 3.1): learned queries that read an image.

A BERT over queries and, where wanted, a text behind them. Both share the self-attention; the queries alone attend to
the image, in every second layer; each has feed-forward layers of its own. What queries and text see of each other is
the attention mode of the call (figure 2 of the paper). Parameter names, arguments and numbers are those of the stock
`blip_2_qformer`.

Where it differs from stock: the three attention modes, of which stock has the first; padding of the text is not
computed; keys and values of an image may be projected once for several calls, and those of the queries kept for a text
that goes on from them; bad input is refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import eager_attention_forward, implementation_for, layer_head_masks, mask_heads
from .checks import OwnShardsOnly, check_attention_mask, check_encoder, check_ids, check_positions
from .configuration_blip2 import CustomBlip2QFormerConfig
from .dropout import Dropout
from .matmul import project
from .modeling_bert import CustomBertIntermediate, CustomBertOutput, CustomBertSelfOutput
from .ops import first_attended, is_traced, merge_heads, split_heads
from .outputs import QFormerOutput
from .packing import TAKE_LENGTHS, Packing
from .parallel import Divisible

# What queries and text see of each other: all; nothing; the text sees the queries and its own past, the queries see
# themselves (figure 2).
ATTENTION_MODES = ("bidirectional", "unimodal", "multimodal_causal")


class CustomBlip2TextEmbeddings(nn.Module):
    """Words and positions of a text, behind the queries where there are any; the norm is the Q-Former's."""

    def __init__(self, config: CustomBlip2QFormerConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        query_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) -> (B, Q + T, D).

        Args:
            position_ids: (B, T) or (1, T); counted from the first real token of a row when not given.
            query_embeds: (B, Q, D).
            attention_mask: (B, T) of the text, 1 for real tokens.
        """
        if input_ids is None:
            return query_embeds
        check_ids(input_ids, self.config.vocab_size, "input_ids")
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
            if attention_mask is not None:
                position_ids = (position_ids - first_attended(attention_mask)[:, None]).clamp(min=0)
        check_positions(position_ids, self.config.max_position_embeddings, "max_position_embeddings")
        embeddings = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        if query_embeds is None:
            return embeddings
        return torch.cat((query_embeds.to(embeddings.dtype), embeddings), dim=1)


@dataclass(eq=False)
class TextPacking:
    """Rows of queries and text without the padding of the text, all queries before all texts: (1, rows · Q + total, D).

    So each kind is one block for the layers of its own. Attention wants each row's tokens together.

    Attributes:
        text: the packed texts.
        num_queries: Q, of each row; 0 for text alone.
        num_cached: queries of each row that are cached, whose keys and values come before those of the texts.
        places: (rows · (Q + cached) + total,), where each token stands when each row's are together.
        order: the inverse, which token stands where.
        attention_arguments: for attention of those.
    """

    text: Packing
    num_queries: int
    num_cached: int
    places: torch.Tensor
    order: torch.Tensor
    attention_arguments: dict

    @classmethod
    def of(cls, attention_mask, num_queries, num_cached):
        """Of a mask (B, T) of the texts, or `None` when there is no padding; of rows without any text likewise."""
        is_real = attention_mask.bool()
        indices = is_real.flatten().nonzero().squeeze(-1)
        lengths = is_real.sum(-1)
        if len(indices) == is_real.numel() or not bool(lengths.all()):
            return None
        text = Packing.of_lengths(lengths, tuple(is_real.shape), indices)
        ahead = num_queries + num_cached
        rows = Packing.of_lengths(lengths + ahead, tuple(is_real.shape))
        device, batch = is_real.device, len(lengths)
        # Of each row its queries, then its text.
        starts = rows.cu_seq_lens[:-1].long()
        query_places = starts[:, None] + torch.arange(ahead, device=device)
        text_rows = torch.arange(batch, device=device).repeat_interleave(lengths, output_size=len(indices))
        text_places = torch.arange(len(indices), device=device) + (text_rows + 1) * ahead
        places = torch.cat((query_places.flatten(), text_places))
        order = torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=device))
        queries = text if num_cached else rows
        return cls(text, num_queries, num_cached, places, order, queries.attention_arguments(rows))

    def unpad(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, Q + T, D) -> (1, B · Q + total, D)."""
        queries, text = hidden_states[:, : self.num_queries], hidden_states[:, self.num_queries :]
        return torch.cat((queries.flatten(0, 1).unsqueeze(0), self.text.unpad(text)), dim=1)

    def repad(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, B · Q + total, D) -> (B, Q + T, D), with zeros at padding."""
        batch = self.text.shape[0]
        queries, text = tokens.split((batch * self.num_queries, tokens.shape[1] - batch * self.num_queries), dim=1)
        return torch.cat((queries.view(batch, self.num_queries, tokens.shape[-1]), self.text.repad(text)), dim=1)

    def together(self, query, key, value) -> tuple[torch.Tensor, ...]:
        """Queries before texts, (1, H, N, K) each, as row after row."""
        # Behind cached queries the texts are all that asks, row after row already.
        query = query if self.num_cached else query.index_select(2, self.order)
        return query, key.index_select(2, self.order), value.index_select(2, self.order)

    def apart(self, tokens: torch.Tensor) -> torch.Tensor:
        """Row after row (1, N, H, K) as queries before texts."""
        return tokens if self.num_cached else tokens.index_select(1, self.places)


class CustomBlip2QFormerMultiHeadAttention(nn.Module):
    """Multi-head attention of queries and text to each other or, as `is_cross_attention`, of queries to an image."""

    is_causal = False

    def __init__(self, config: CustomBlip2QFormerConfig, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross_attention = is_cross_attention
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        key_width = config.encoder_hidden_size if is_cross_attention else config.hidden_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_width, config.hidden_size)
        self.value = nn.Linear(key_width, config.hidden_size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: TextPacking | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = split_heads(project(self.query, hidden_states), self.head_dim)  # (B, H, T, K)
        if not self.is_cross_attention:
            key, value = self.key_value(hidden_states)
            if packing is not None:
                key, value = self._behind_cached(past_key_values, key, value)
                query, key, value = packing.together(query, key, value)
            elif past_key_values is not None:
                key, value = self._cached_first(past_key_values, key, value)

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
        if packing is not None:
            attn_output = packing.apart(attn_output)
        attn_output, attn_weights = mask_heads(attn_output, attn_weights, head_mask)
        return merge_heads(attn_output), attn_weights

    def key_value(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, S, K) of (B, S, D)."""
        return tuple(split_heads(project(layer, states), self.head_dim) for layer in (self.key, self.value))

    def _cached_first(self, past_key_values, key, value):
        """Keys and values of queries, to be kept; or of a text behind kept ones, which stay as they are."""
        if past_key_values.get_seq_length(self.layer_idx) == 0:
            return past_key_values.update(key, value, self.layer_idx)
        layer = past_key_values.layers[self.layer_idx]
        return torch.cat((layer.keys, key), dim=2), torch.cat((layer.values, value), dim=2)

    def _behind_cached(self, past_key_values, *states):
        """Keys and values of packed texts (1, H, total, K) behind those of all rows' queries."""
        if past_key_values is None:
            return states
        layer = past_key_values.layers[self.layer_idx]
        cached = (kept.transpose(0, 1).flatten(1, 2).unsqueeze(0) for kept in (layer.keys, layer.values))
        return tuple(torch.cat(pair, dim=2) for pair in zip(cached, states, strict=True))


class CustomBlip2QFormerAttention(nn.Module):
    """Attention and its output: norm(x + attention(x))."""

    def __init__(self, config: CustomBlip2QFormerConfig, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.attention = CustomBlip2QFormerMultiHeadAttention(config, layer_idx, is_cross_attention)
        self.output = CustomBertSelfOutput(config)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        attn_output, _ = self.attention(hidden_states, *args, **kwargs)
        return self.output(attn_output, hidden_states)


class CustomBlip2QFormerLayer(GradientCheckpointingLayer):
    """Self-attention of all, attention of queries to the image where the layer has it, a feed-forward layer each."""

    def __init__(self, config: CustomBlip2QFormerConfig, layer_idx: int):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = CustomBlip2QFormerAttention(config, layer_idx)
        if layer_idx % config.cross_attention_frequency == 0:
            self.crossattention = CustomBlip2QFormerAttention(config, layer_idx, is_cross_attention=True)
        if config.use_qformer_text_input:
            self.intermediate = CustomBertIntermediate(config)
            self.output = CustomBertOutput(config)
        self.intermediate_query = CustomBertIntermediate(config)
        self.output_query = CustomBertOutput(config)

    @property
    def has_cross_attention(self) -> bool:
        """Whether the queries attend to the image in this layer."""
        return hasattr(self, "crossattention")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_key: torch.Tensor | None = None,
        image_value: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        query_length: int = 0,
        packing: TextPacking | None = None,
        past_key_values: Cache | None = None,
        self_attention_arguments: dict | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Of a batch (B, Q + T, D), or of a packed one (1, B · Q + total, D).

        Args:
            image_key, image_value: (B, H, S, K), for the queries of a layer with cross-attention.
            query_length: Q, of each row.
        """
        hidden_states = self.attention(
            hidden_states,
            attention_mask,
            past_key_values=past_key_values,
            packing=packing,
            head_mask=head_mask,
            **(self_attention_arguments or {}),
            **kwargs,
        )
        num_queries = query_length if packing is None else query_length * packing.text.shape[0]
        outputs = []
        if num_queries:
            queries = hidden_states[:, :num_queries]
            if self.has_cross_attention:
                rows = queries if packing is None else queries.view(-1, query_length, queries.shape[-1])
                image = (image_mask, image_key, image_value)
                queries = self.crossattention(rows, *image, head_mask=head_mask, **kwargs).view(queries.shape)
            outputs.append(self._in_chunks(queries, self.intermediate_query, self.output_query))
        if num_queries < hidden_states.shape[1]:
            outputs.append(self._in_chunks(hidden_states[:, num_queries:], self.intermediate, self.output))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _in_chunks(self, hidden_states, intermediate, output):
        """A feed-forward layer (B, T, D) -> (B, T, D), each position by itself."""
        length = self.chunk_size_feed_forward or hidden_states.shape[1]
        chunks = hidden_states.split(length, dim=1)
        states = [output(intermediate(chunk), chunk, intermediate.intermediate_act_fn) for chunk in chunks]
        return torch.cat(states, dim=1) if len(states) > 1 else states[0]


class CustomBlip2QFormerEncoder(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: CustomBlip2QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList([CustomBlip2QFormerLayer(config, i) for i in range(config.num_hidden_layers)])

    def forward(
        self, hidden_states, attention_mask, image_key_values, image_mask, head_masks, **kwargs
    ) -> torch.Tensor:
        for index, (layer, head_mask) in enumerate(zip(self.layer, head_masks, strict=True)):
            # Tensors that may need a gradient are positional, where checkpointing looks for them.
            image_key, image_value = image_key_values.get(index, (None, None))
            image = (image_key, image_value, image_mask)
            hidden_states = layer(hidden_states, attention_mask, *image, head_mask, **kwargs)
        return hidden_states


class CustomBlip2QFormerPreTrainedModel(Divisible, OwnShardsOnly, PreTrainedModel):
    """What the Q-Former declares to the host, and how weights start."""

    config: CustomBlip2QFormerConfig
    base_model_prefix = "qformer"
    main_input_name = "query_embeds"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CustomBlip2TextEmbeddings", "CustomBlip2QFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # In float32, which the flash kernels do not take.
    _supports_flash_attn = False
    _supports_flex_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": CustomBlip2QFormerLayer,
        "attentions": OutputRecorder(CustomBlip2QFormerMultiHeadAttention, layer_name=".attention.attention", index=1),
        "cross_attentions": OutputRecorder(
            CustomBlip2QFormerMultiHeadAttention, layer_name=".crossattention.attention", index=1
        ),
    }
    _auto_class = "AutoModel"
    # The rest of a whole BLIP-2 checkpoint, from which the Q-Former alone is loaded.
    _keys_to_ignore_on_load_unexpected = [
        r"^(vision_model|language_model|language_projection|query_tokens|embeddings|vision_projection|text_projection)",
        r"^itm_head",
    ]

    def __init__(self, config: CustomBlip2QFormerConfig, *inputs, **kwargs):
        if config.model_type in CustomBlip2QFormerConfig.stock_model_types:
            raise TypeError(
                f"{type(self).__name__} needs a CustomBlip2QFormerConfig but got a stock {type(config).__name__}. "
                "Convert it: `CustomBlip2QFormerConfig.from_dict(config.to_dict())`."
            )
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)


class CustomBlip2QFormerModel(CustomBlip2QFormerPreTrainedModel):
    """The Q-Former, which has no embeddings of its own: queries and text come embedded."""

    def __init__(self, config: CustomBlip2QFormerConfig):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.encoder = CustomBlip2QFormerEncoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> None:
        return None

    def image_key_values(self, image_embeds: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (B, H, S, K) of images (B, S, D') by layer, to pass to several calls."""
        image_embeds = image_embeds.to(self.layernorm.weight.dtype)
        return {
            index: layer.crossattention.attention.key_value(image_embeds)
            for index, layer in enumerate(self.encoder.layer)
            if layer.has_cross_attention
        }

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        query_embeds: torch.FloatTensor,
        query_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_mode: str = "bidirectional",
        image_key_values: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QFormerOutput:
        """Compute the states (B, Q + T, D) of queries and text. Those of padding are zero on the unpadded path.

        Args:
            query_embeds: (B, Q + T, D), queries before text.
            query_length: Q; all are queries when not given.
            attention_mask: (B, Q + T), 1 for what is attended to; with a cache (B, S + T), cached queries first.
            encoder_hidden_states: (B, S, D'), the image that queries read.
            encoder_attention_mask: (B, S).
            attention_mode: `bidirectional`, `unimodal` or `multimodal_causal`, what queries and text see of each other.
            image_key_values: of `self.image_key_values`, instead of `encoder_hidden_states`.
            past_key_values: queries that the text goes on from, from a call with `use_cache=True`.
            head_mask: (H,) or (L, H), 1 for heads to keep and 0 for heads to drop, or other factors, in attention to
                the image too.
        """
        shape = tuple(query_embeds.shape[:2])
        query_length = shape[1] if query_length is None else query_length
        encoder = (encoder_hidden_states, encoder_attention_mask)
        self._check_inputs(query_embeds, query_length, attention_mask, attention_mode, past_key_values, *encoder)
        head_masks = layer_head_masks(head_mask, self.encoder.layer, self.config)
        dtype = self.layernorm.weight.dtype
        if query_length and image_key_values is None:
            if encoder_hidden_states is None:
                raise ValueError(
                    "the queries read an image, but neither `encoder_hidden_states` nor `image_key_values` was passed. "
                    "Pass the states of the vision tower, or `query_length=0` for text alone."
                )
            image_key_values = self.image_key_values(encoder_hidden_states)
        embeddings = self.dropout(self.layernorm(query_embeds.to(dtype)))
        packing = None
        if not use_cache:
            packing = self._find_packing(attention_mask, shape, query_length, attention_mode, past_key_values, kwargs)
        mask = image_mask = None
        # For kernels that need no mask to know: of text alone or behind cached queries.
        self_attention_arguments = {"is_causal": attention_mode == "multimodal_causal" and not query_length}
        if packing is not None:
            embeddings = packing.unpad(embeddings)
            self_attention_arguments |= packing.attention_arguments
        else:
            mask = self._make_mask(embeddings, query_length, attention_mask, attention_mode, past_key_values)
        if encoder_attention_mask is not None and query_length:
            image_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=query_embeds[:, :query_length].to(dtype),
                attention_mask=encoder_attention_mask,
                # Read for its shape.
                encoder_hidden_states=next(iter(image_key_values.values()))[0][:, 0],
            )
        is_checkpointing = self.gradient_checkpointing and self.training
        if use_cache and past_key_values is None and not is_checkpointing:
            past_key_values = DynamicCache(config=self.config)
        outputs = self._encode(
            embeddings,
            mask,
            image_key_values or {},
            image_mask,
            head_masks,
            query_length=query_length,
            packing=packing,
            past_key_values=past_key_values,
            self_attention_arguments=self_attention_arguments,
            return_dict=True,
            **kwargs,
        )
        if packing is not None:
            outputs.last_hidden_state = packing.repad(outputs.last_hidden_state)
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(packing.repad(states) for states in outputs.hidden_states)
        outputs.pooler_output = outputs.last_hidden_state[:, 0]
        outputs.past_key_values = past_key_values if use_cache else None
        return QFormerOutput(**outputs)

    def _check_inputs(self, query_embeds, query_length, attention_mask, attention_mode, past_key_values, *encoder):
        encoder_hidden_states, encoder_attention_mask = encoder
        batch, length = query_embeds.shape[:2]
        if attention_mode not in ATTENTION_MODES:
            raise ValueError(f"`attention_mode` is {attention_mode!r} but must be one of {', '.join(ATTENTION_MODES)}.")
        if not 0 <= query_length <= length:
            raise ValueError(f"`query_length` is {query_length} but `query_embeds` has {length} columns.")
        if encoder_hidden_states is not None:
            check_encoder(encoder_hidden_states, encoder_attention_mask, has_cross_attention=True)
            width = self.config.encoder_hidden_size
            if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != width:
                raise ValueError(
                    f"`encoder_hidden_states` has shape {tuple(encoder_hidden_states.shape)} but (batch, length, "
                    f"{width}) is needed, as `encoder_hidden_size` says."
                )
            if len(encoder_hidden_states) != batch:
                raise ValueError(f"there are {len(encoder_hidden_states)} images but {batch} rows of queries.")
        if query_length < length and not self.config.use_qformer_text_input:
            raise ValueError(
                f"`query_embeds` has {length - query_length} columns behind the {query_length} queries, but this "
                "Q-Former reads no text. Set `use_qformer_text_input=True` in its configuration."
            )
        if past_key_values is not None and self.gradient_checkpointing and self.training:
            raise ValueError("`past_key_values` cannot be used while checkpointing. Pass queries and text together.")
        has_cached = past_key_values is not None and past_key_values.get_seq_length() > 0
        if has_cached and (query_length or attention_mode != "multimodal_causal"):
            raise ValueError(
                "`past_key_values` holds the queries, from which a text goes on. Pass the text alone, with "
                "`query_length=0` and `attention_mode='multimodal_causal'`."
            )
        if not torch.compiler.is_compiling():
            check_attention_mask(attention_mask, batch, length, past_key_values)

    def _find_packing(self, attention_mask, shape, query_length, attention_mode, past_key_values, kwargs):
        """How to leave out the padding of the text, or `None` for the ordinary path."""
        has_cache = past_key_values is not None and past_key_values.get_seq_length() > 0
        is_possible = (
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.ndim == 2
            and query_length < shape[1]
            and self.config._attn_implementation in TAKE_LENGTHS
            # Of the causal texts those behind cached queries, and of the queries those that see the text.
            and (has_cache if attention_mode == "multimodal_causal" else past_key_values is None)
            and not (attention_mode == "unimodal" and query_length)
            and not kwargs.get("output_attentions", self.config.output_attentions)
            and not is_traced()
        )
        if not is_possible or not bool(attention_mask[:, : -(shape[1] - query_length)].all()):
            return None
        num_cached = past_key_values.get_seq_length() if has_cache else 0
        return TextPacking.of(attention_mask[:, query_length + num_cached :], query_length, num_cached)

    def _make_mask(self, embeddings, query_length, attention_mask, attention_mode, past_key_values):
        """The mask (B, 1, T, S) of self-attention, as the implementation wants it."""
        masking = {"config": self.config, "inputs_embeds": embeddings, "attention_mask": attention_mask}
        is_joint = 0 < query_length < embeddings.shape[1]
        if attention_mode == "multimodal_causal" and not query_length:
            return create_causal_mask(**masking, past_key_values=past_key_values)
        if attention_mode == "bidirectional" or not is_joint:
            return create_bidirectional_mask(**masking)

        def sees(batch, head, query, key):
            is_query, is_queried = query < query_length, key < query_length
            if attention_mode == "unimodal":
                return is_query == is_queried
            return is_queried | (~is_query & (key <= query))

        return create_bidirectional_mask(**masking, and_mask_function=sees)

    @capture_outputs
    def _encode(
        self, hidden_states, attention_mask, image_key_values, image_mask, head_masks, past_key_values, **kwargs
    ) -> QFormerOutput:
        """The layers, of a padded batch or of a packed one."""
        # Taken by `capture_outputs`; a kernel must not see them.
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)
        is_checkpointing = self.gradient_checkpointing and self.training
        hidden_states = self.encoder(
            hidden_states,
            attention_mask,
            image_key_values,
            image_mask,
            head_masks,
            past_key_values=None if is_checkpointing else past_key_values,
            **kwargs,
        )
        return QFormerOutput(last_hidden_state=hidden_states)


__all__ = ["CustomBlip2QFormerModel", "CustomBlip2QFormerPreTrainedModel", "CustomBlip2TextEmbeddings"]
