"""BLIP-2's vision tower: a ViT with a class token, as in EVA-CLIP (Fang et al. 2022; Li et al. 2023, section 3.1).

An image is cut into patches, each a vector by a convolution whose stride is its kernel; positions are learned and
interpolated for other resolutions; blocks are pre-norm. Parameter names, arguments and numbers are those of the stock
`blip_2_vision_model`, whose checkpoints load here.

Where it differs from stock: images of another shape than the model's are refused by name or interpolated on request,
and may be other than square; weights start so that they train.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import eager_attention_forward, implementation_for, layer_head_masks, mask_heads
from .checks import OwnShardsOnly, check_pixels, check_sequence_labels
from .configuration_blip2 import CustomBlip2VisionConfig
from .layers import get_activation, project_activated
from .losses import sequence_classification_loss
from .matmul import project
from .ops import merge_heads, split_heads
from .parallel import Divisible


class CustomBlip2VisionEmbeddings(nn.Module):
    """Patches (B, P, D) of an image behind a class token, with learned positions: (B, 1 + P, D)."""

    def __init__(self, config: CustomBlip2VisionConfig):
        super().__init__()
        self.config = config
        width, patch_shape = config.hidden_size, config.patch_shape
        rows, columns = config.grid
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch_shape, stride=patch_shape)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + rows * columns, width))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        config = self.config
        check_pixels(pixel_values, config.patch_shape, None if interpolate_pos_encoding else config.image_shape)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid = tuple(patches.shape[-2:])
        patches = patches.flatten(2).transpose(1, 2)  # (B, P, D)
        class_token = self.class_embedding.expand(len(patches), -1, -1).to(patches.dtype)
        positions = self.position_embedding if grid == config.grid else self.interpolate_pos_encoding(grid)
        return torch.cat((class_token, patches), dim=1) + positions.to(patches.dtype)

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> torch.Tensor:
        """Positions (1, 1 + rows · columns, D) for another grid of patches, by bicubic interpolation."""
        class_position, positions = self.position_embedding.split((1, self.position_embedding.shape[1] - 1), dim=1)
        image = positions.unflatten(1, self.config.grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        image = nn.functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        return torch.cat((class_position, image.flatten(2).transpose(1, 2)), dim=1)


class CustomBlip2VisionAttention(nn.Module):
    """Multi-head attention of all patches to all, with one projection for queries, keys and values."""

    is_causal = False

    def __init__(self, config: CustomBlip2VisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, head_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        projections = project(self.qkv, hidden_states).chunk(3, dim=-1)
        query, key, value = (split_heads(states, self.head_dim) for states in projections)  # (B, H, T, K)
        implementation = implementation_for(self.config._attn_implementation)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask=None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output, attn_weights = mask_heads(attn_output, attn_weights, head_mask)
        return project(self.projection, merge_heads(attn_output)), attn_weights


class CustomBlip2VisionMLP(nn.Module):
    """Position-wise feed-forward layer."""

    def __init__(self, config: CustomBlip2VisionConfig):
        super().__init__()
        self.activation_fn = get_activation(config.hidden_act, "hidden_act")
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project_activated(self.activation_fn, project(self.fc1, hidden_states), self.fc2)


class CustomBlip2VisionLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then + feed-forward(norm(x))."""

    def __init__(self, config: CustomBlip2VisionConfig):
        super().__init__()
        self.self_attn = CustomBlip2VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CustomBlip2VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, head_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.layer_norm1(hidden_states), head_mask, **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class CustomBlip2VisionEncoder(nn.Module):
    """The blocks, one after another."""

    def __init__(self, config: CustomBlip2VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList([CustomBlip2VisionLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor, head_masks: tuple, **kwargs) -> torch.Tensor:
        for layer, head_mask in zip(self.layers, head_masks, strict=True):
            # Tensors that may need a gradient are positional, where checkpointing looks for them.
            hidden_states = layer(hidden_states, head_mask, **kwargs)
        return hidden_states


class CustomBlip2VisionPreTrainedModel(Divisible, OwnShardsOnly, PreTrainedModel):
    """What every class of the vision tower declares to the host, and how weights start."""

    config: CustomBlip2VisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CustomBlip2VisionEmbeddings", "CustomBlip2VisionLayer"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": CustomBlip2VisionLayer, "attentions": CustomBlip2VisionAttention}
    _auto_class = "AutoModel"
    # The rest of a whole BLIP-2 checkpoint, from which the tower alone is loaded.
    _keys_to_ignore_on_load_unexpected = [r"^(qformer|language_model|language_projection|query_tokens)"]

    def __init__(self, config: CustomBlip2VisionConfig, *inputs, **kwargs):
        if config.model_type in CustomBlip2VisionConfig.stock_model_types:
            raise TypeError(
                f"{type(self).__name__} needs a CustomBlip2VisionConfig but got a stock {type(config).__name__}. "
                "Convert it: `CustomBlip2VisionConfig.from_dict(config.to_dict())`."
            )
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CustomBlip2VisionEmbeddings):
            init.trunc_normal_(module.class_embedding, mean=0.0, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embedding, mean=0.0, std=self.config.initializer_range)


class CustomBlip2VisionModel(CustomBlip2VisionPreTrainedModel):
    """The tower without a head."""

    def __init__(self, config: CustomBlip2VisionConfig):
        super().__init__(config)
        self.embeddings = CustomBlip2VisionEmbeddings(config)
        self.encoder = CustomBlip2VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Compute the states (B, 1 + P, D) of class token and patches, and the class token's, normed twice as in stock.

        Args:
            pixel_values: (B, 3, height, width), normalised by the image processor.
            interpolate_pos_encoding: take images of another size than `config.image_size`.
            head_mask: (H,) or (L, H), 1 for heads to keep and 0 for heads to drop, or other factors; or five axes
                (L, B, H, 1, 1).
        """
        # Taken by `capture_outputs`; a kernel must not see them.
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)
        head_masks = layer_head_masks(head_mask, self.encoder.layers, self.config, (len(pixel_values), 1))
        hidden_states = self.encoder(self.embeddings(pixel_values, interpolate_pos_encoding), head_masks, **kwargs)
        hidden_states = self.post_layernorm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.post_layernorm(hidden_states[:, 0])
        )


class CustomBlip2VisionForImageClassification(CustomBlip2VisionPreTrainedModel):
    """Classifier of images, reading the class token."""

    def __init__(self, config: CustomBlip2VisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = CustomBlip2VisionModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Compute logits (B, L) for L labels and the loss of `config.problem_type`, found from `labels` when unset.

        Args:
            labels: (B,) class indices, or reals (B,) or (B, L) for regression, or zeros and ones (B, L).
            num_items_in_batch: number of labels over all accumulated micro-batches, as the Trainer passes it.
        """
        if labels is not None:
            check_sequence_labels(labels, len(pixel_values), self.config)
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            loss = sequence_classification_loss(logits, labels.to(logits.device), problem_type, num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "CustomBlip2VisionForImageClassification",
    "CustomBlip2VisionModel",
    "CustomBlip2VisionPreTrainedModel",
]
