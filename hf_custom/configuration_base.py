"""What every configuration of this package shares: strict fields, early refusal of bad values, the Hub's `auto_map`.

No torch here: a configuration can be read and checked on a machine that will never run the model.
"""

import difflib
from dataclasses import fields
from typing import ClassVar

from transformers.configuration_utils import PreTrainedConfig

# Upper bounds by standard name. Far above any published model, far below what would exhaust a machine's memory before
# the first tensor is filled: a slipped digit is refused while it is still a number.
SIZE_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**12,
    "max_position_embeddings": 2**27,
    "intermediate_size": 2**20,
    "num_labels": 2**20,
    "loss_chunk_size": 2**24,
}
MAX_PARAMETERS = 2 * 10**12

# Keys of the host and of old checkpoints that resemble a field without being a misspelling of it.
LOOK_ALIKES = frozenset({"cls_token_id", "mask_token_id", "sep_token_id", "tie_encoder_decoder"})


class CustomConfig(PreTrainedConfig):
    """Base of the package's configurations.

    A subclass declares its fields and what is allowed for them: `stock_model_types` (types whose JSON loads here
    silently), `choices` (values by field), `probabilities` and `positive` (fields that lie in [0, 1], or above 0),
    `fewest_layers`; and `auto_classes` (which class in which file serves which Auto class; the registry and the
    `auto_map` of a saved model both read it).

    Raises:
        ValueError: for a value out of range, or a key that looks like a misspelt field.
    """

    stock_model_types: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    probabilities: ClassVar[tuple[str, ...]] = ()
    positive: ClassVar[tuple[str, ...]] = ()
    fewest_layers: ClassVar[int] = 1
    auto_classes: ClassVar[dict[str, str]] = {}

    def __post_init__(self, **kwargs):
        self._refuse_misspelt_keys(kwargs)
        # The label maps are built from `num_labels` by the host, so it is bounded before they are.
        self._check_size("num_labels", kwargs.get("num_labels"), SIZE_LIMITS["num_labels"])
        # A stock JSON would otherwise leave its `model_type` on the instance, and the host keys conversions on it.
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def _refuse_misspelt_keys(self, kwargs):
        names = {field.name for field in fields(self)} | set(self.attribute_map) | {"num_labels"}
        for key in kwargs:
            if key in names or key in LOOK_ALIKES or key.startswith("_"):
                continue
            close = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.8)
            if close:
                raise ValueError(
                    f"{type(self).__name__} has no field `{key}`; did you mean `{close[0]}`? "
                    f"To add an attribute of that name, set it after construction: `config.{key} = ...`."
                )

    def _check_size(self, field, value, limit):
        """Refuse a size that is not an integer from 1 (0 for labels) to `limit`; `None` means derived or absent."""
        if value is None:
            return
        lowest = {"num_labels": 0, "num_hidden_layers": self.fewest_layers}.get(field, 1)
        if not isinstance(value, int) or not lowest <= value <= limit:
            raise ValueError(
                f"`{field}` is {value!r} but must be an integer from {lowest} to {limit:,}. "
                f"Correct `{field}` in the configuration."
            )

    def validate_architecture(self):
        """Check every value that the type of its field does not. Called at construction and again by the model, which
        sees changes made in between."""
        for name, limit in SIZE_LIMITS.items():
            if hasattr(self, name):
                self._check_size(self.attribute_map.get(name, name), getattr(self, name), limit)
        if hasattr(self, "hidden_size"):
            self._check_transformer()
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r} but must be one of {', '.join(map(repr, allowed))}."
                )
        for name in self.probabilities:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r} but a probability lies between 0 and 1.")
        for name in self.positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)!r} but must be greater than 0.")

    def _check_transformer(self):
        """Refuse a width that the heads do not divide, and a stack of layers that no machine holds."""
        width, heads = self.hidden_size, self.num_attention_heads
        width_field, heads_field, layers_field = (
            self.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        if width % heads:
            raise ValueError(
                f"`{heads_field}` ({heads}) does not divide `{width_field}` ({width}). "
                f"Choose a number of heads that does, for instance {_nearest_divisor(width, heads)}."
            )
        positions = getattr(self, "max_position_embeddings", 0)
        vocab_size = getattr(self, "vocab_size", 0)
        parameters = 12 * self.num_hidden_layers * width**2 + (vocab_size + positions) * width
        if parameters > MAX_PARAMETERS:
            raise ValueError(
                f"this configuration describes about {parameters:,} parameters, more than {MAX_PARAMETERS:,}. "
                f"Reduce `{layers_field}`, `{width_field}`" + (" or `vocab_size`." if vocab_size else ".")
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") in cls.stock_model_types:
            config_dict = cls._adopt(config_dict)
        return config_dict, kwargs

    @classmethod
    def _adopt(cls, config_dict: dict) -> dict:
        """The dictionary of a stock configuration as one of this class."""
        return {**config_dict, "model_type": cls.model_type}

    def save_pretrained(self, save_directory, **kwargs):
        # The host writes the entry of the saved class alone; a repository should open under every Auto class it has.
        self.auto_map = {**(getattr(self, "auto_map", None) or {}), **self.auto_classes}
        super().save_pretrained(save_directory, **kwargs)


def _nearest_divisor(width, heads):
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - heads), n))


__all__ = ["CustomConfig"]
