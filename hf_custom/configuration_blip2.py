"""BLIP-2 configurations: the stock fields with the stock defaults, then our own."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_base import CustomConfig


@strict
class CustomBlip2VisionConfig(CustomConfig):
    """Configuration of BLIP-2's vision tower, a ViT (Dosovitskiy et al. 2021; Li et al. 2023, "BLIP-2", section 3.1).

    Defaults give the tower of `Salesforce/blip2-opt-2.7b`, with one exception: weights start with a standard deviation
    of 0.02, where stock's 1e-10 is meant for loading and does not train.

    Args:
        num_hidden_layers: 0 leaves the patch embeddings and the last norm, as a text model with patches needs them
            (Kim et al. 2021, "ViLT").
        image_size: height and width of an image, or both as (height, width).
        patch_size: height and width of a patch, likewise; it divides the image's.
        qkv_bias: whether queries, keys and values have a bias. That of the keys moves all scores of a query alike and
            changes nothing; it is there for the checkpoints.
    """

    model_type = "custom_blip2_vision_model"
    base_config_key = "vision_config"
    stock_model_types: ClassVar = ("blip_2_vision_model",)
    probabilities: ClassVar = ("attention_dropout",)
    positive: ClassVar = ("layer_norm_eps", "initializer_range")
    fewest_layers: ClassVar = 0
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_blip2.CustomBlip2VisionConfig",
        "AutoModel": "modeling_blip2_vision.CustomBlip2VisionModel",
        "AutoModelForImageClassification": "modeling_blip2_vision.CustomBlip2VisionForImageClassification",
    }

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    qkv_bias: bool = True

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return _pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (patch_height, patch_width) = self.image_shape, self.patch_shape
        return height // patch_height, width // patch_width

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("image_size", "patch_size"):
            sizes = _pair(getattr(self, name))
            if len(sizes) != 2:
                raise ValueError(f"`{name}` is {getattr(self, name)!r} but is a size, or a height and a width.")
            for size in sizes:
                self._check_size(name, size, 2**16)
        if any(size % patch for size, patch in zip(self.image_shape, self.patch_shape, strict=True)):
            raise ValueError(
                f"`patch_size` ({self.patch_size}) does not divide `image_size` ({self.image_size}), so some pixels "
                "would belong to no patch. Change one of them."
            )


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


__all__ = ["CustomBlip2VisionConfig"]
