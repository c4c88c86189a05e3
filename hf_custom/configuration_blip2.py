"""BLIP-2 configurations: the stock fields with the stock defaults, then our own."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config, OPTConfig, T5Config
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_base import SIZE_LIMITS, CustomConfig
from .configuration_gpt2 import CustomGPT2Config

# The language models that BLIP-2 can be given, by model type: ours, and stock ones.
TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config_class.model_type: config_class for config_class in (CustomGPT2Config, GPT2Config, OPTConfig, T5Config)
}


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
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """How tensor parallelism divides the layers, where there are any."""
        plan = {"self_attn.qkv": "fused_qkv_colwise", "self_attn.projection": "rowwise"}
        plan |= {"mlp.fc1": "colwise", "mlp.fc2": "rowwise"}
        return {f"encoder.layers.*.{name}": style for name, style in plan.items()} if self.num_hidden_layers else None

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


@strict
class CustomBlip2QFormerConfig(CustomConfig):
    """Configuration of BLIP-2's Querying Transformer (Li et al. 2023, "BLIP-2", section 3.1).

    Defaults give the Q-Former of `Salesforce/blip2-opt-2.7b`, a BERT-base whose queries read images.

    Args:
        cross_attention_frequency: every how many layers, from the first, the queries attend to the image.
        encoder_hidden_size: width of the vision tower's states.
        use_qformer_text_input: whether texts go through it too, which have feed-forward layers of their own.
        bos_token_id: token that a text to be written begins with, in place of the classifier's; pre-training needs it.
    """

    model_type = "custom_blip2_qformer"
    base_config_key = "qformer_config"
    stock_model_types: ClassVar = ("blip_2_qformer",)
    probabilities: ClassVar = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    positive: ClassVar = ("layer_norm_eps", "initializer_range")
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_blip2.CustomBlip2QFormerConfig",
        "AutoModel": "modeling_blip2_qformer.CustomBlip2QFormerModel",
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    use_qformer_text_input: bool = False

    bos_token_id: int | None = None

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism divides the layers."""
        plan = {}
        for attention in ("attention", "crossattention"):
            plan |= {f"{attention}.attention.{name}": "colwise" for name in ("query", "key", "value")}
            plan[f"{attention}.output.dense"] = "rowwise"
        for kind in ("_query", "") if self.use_qformer_text_input else ("_query",):
            plan |= {f"intermediate{kind}.dense": "colwise", f"output{kind}.dense": "rowwise"}
        return {f"encoder.layer.*.{name}": style for name, style in plan.items()}

    def validate_architecture(self):
        super().validate_architecture()
        self._check_size("cross_attention_frequency", self.cross_attention_frequency, SIZE_LIMITS["num_hidden_layers"])
        self._check_size("encoder_hidden_size", self.encoder_hidden_size, SIZE_LIMITS["hidden_size"])


@strict
class CustomBlip2Config(CustomConfig):
    """Configuration of BLIP-2 (Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image
    Encoders and Large Language Models"): vision tower, Q-Former and language model.

    The JSON of any stock `blip-2` checkpoint loads here. Without `text_config` the language model is our GPT-2.

    Args:
        text_config: of the language model; its `model_type` is `custom_gpt2`, `gpt2`, `opt` or `t5`.
        num_query_tokens: number of learned queries, which stand for an image in the language model.
        image_text_hidden_size: size of the vectors in which images and texts are compared.
        image_token_index: id of the tokens in a text that the queries of an image replace.
        initializer_range: standard deviation of fresh queries and projections. Stock starts with queries of zero, which
            do not train.
        frozen_modules: parts that are not trained, the large ones as in the paper; they stay in evaluation mode.
        itc_loss_weight, itm_loss_weight, itg_loss_weight: of the three losses of the first stage: image-text
            contrast, image-text matching and image-grounded text generation.
        itc_temperature: of the contrast at the start; it is learned.
        label_smoothing: share of the targets of contrast and generation that is spread evenly.
        loss_chunk_size: tokens whose logits are in memory together while a loss is computed; `None` chooses by device.
    """

    model_type = "custom_blip2"
    attribute_map: ClassVar = {"image_token_id": "image_token_index"}
    stock_model_types: ClassVar = ("blip-2",)
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(CustomGPT2Config),
        "vision_config": SubConfigSpec(CustomBlip2VisionConfig),
        "qformer_config": SubConfigSpec(CustomBlip2QFormerConfig),
    }
    probabilities: ClassVar = ("label_smoothing",)
    positive: ClassVar = ("initializer_range", "itc_temperature")
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_blip2.CustomBlip2Config",
        "AutoModel": "modeling_blip2.CustomBlip2Model",
        "AutoModelForImageTextToText": "modeling_blip2.CustomBlip2ForConditionalGeneration",
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    image_token_index: int | None = None
    initializer_factor: float = 1.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    frozen_modules: list[str] | tuple[str, ...] = ("vision_model", "language_model")
    itc_loss_weight: float | int = 1.0
    itm_loss_weight: float | int = 1.0
    itg_loss_weight: float | int = 1.0
    itc_temperature: float = 0.07
    label_smoothing: float | int = 0.1
    loss_chunk_size: int | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            model_type = fields.pop("model_type", CustomGPT2Config.model_type)
            self.text_config = self._text_config_class(model_type)(**fields)
        # Stock stores it; here it follows from the language model.
        kwargs.pop("use_decoder_only_language_model", None)
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = self.text_config.is_encoder_decoder

    @staticmethod
    def _text_config_class(model_type):
        if model_type not in TEXT_CONFIGS:
            raise ValueError(
                f"`text_config` is of type {model_type!r}, but the language model is one of {', '.join(TEXT_CONFIGS)}. "
                "Set `text_config['model_type']`."
            )
        return TEXT_CONFIGS[model_type]

    @property
    def use_decoder_only_language_model(self) -> bool:
        """Whether the language model reads image and text in one stream, as a GPT does and a T5 does not."""
        return not self.text_config.is_encoder_decoder

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The host would leave a dictionary that was passed to `from_pretrained` as it is.
        parts = {name: kwargs.pop(name) for name in cls.sub_configs_defaults if isinstance(kwargs.get(name), dict)}
        return super().from_dict({**config_dict, **parts}, **kwargs)

    @classmethod
    def _adopt(cls, config_dict):
        # Stock leaves out the type of the language model where it is OPT.
        text_config = {"model_type": OPTConfig.model_type, **(config_dict.get("text_config") or {})}
        return {**super()._adopt(config_dict), "text_config": text_config}

    def validate_architecture(self):
        super().validate_architecture()
        self._check_size("num_query_tokens", self.num_query_tokens, 2**16)
        self._check_size("image_text_hidden_size", self.image_text_hidden_size, SIZE_LIMITS["hidden_size"])
        self._text_config_class(self.text_config.model_type)
        # As in stock: the Q-Former reads the states of this vision tower and of no other.
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        parts = ("vision_model", "query_tokens", "qformer", "language_projection", "language_model")
        for name in self.frozen_modules:
            if name not in parts:
                raise ValueError(f"`frozen_modules` names {name!r}, but the parts are {', '.join(parts)}.")
        for name in ("itc_loss_weight", "itm_loss_weight", "itg_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)!r} but a weight is 0 or more.")
        if not (self.itc_loss_weight or self.itm_loss_weight or self.itg_loss_weight):
            raise ValueError("all three loss weights are 0, so nothing would be learned. Raise one of them.")
        bos_token_id, vocab_size = self.qformer_config.bos_token_id, self.qformer_config.vocab_size
        if bos_token_id is not None and not 0 <= bos_token_id < vocab_size:
            raise ValueError(
                f"`bos_token_id` is {bos_token_id} but the Q-Former's `vocab_size` is {vocab_size}. Correct one "
                "of them in `qformer_config`."
            )


__all__ = ["CustomBlip2Config", "CustomBlip2QFormerConfig", "CustomBlip2VisionConfig"]
