"""Makes the host's Auto classes know this package's families, and steers stock checkpoints here on request."""

from importlib import import_module

import transformers
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_bert import CustomBertConfig
from .configuration_blip2 import CustomBlip2Config, CustomBlip2QFormerConfig, CustomBlip2VisionConfig
from .configuration_elmo import CustomElmoConfig
from .configuration_gpt2 import CustomGPT2Config
from .configuration_transformer import CustomTransformerConfig
from .configuration_word2vec import CustomWord2VecConfig
from .processing_blip2 import CustomBlip2Processor
from .tokenization_elmo import CustomElmoTokenizer

# One row a family: configuration, and tokenizer or none. Which class serves which Auto class is said by the
# configuration itself, in `auto_classes`.
FAMILIES: tuple[tuple[type[PreTrainedConfig], type[PreTrainedTokenizerBase] | None], ...] = (
    (CustomGPT2Config, GPT2Tokenizer),
    (CustomBertConfig, BertTokenizer),
    (CustomBlip2VisionConfig, None),
    (CustomBlip2QFormerConfig, None),
    (CustomBlip2Config, None),
    (CustomTransformerConfig, GPT2Tokenizer),
    (CustomElmoConfig, CustomElmoTokenizer),
    (CustomWord2VecConfig, PreTrainedTokenizerFast),
)

PROCESSORS = {CustomBlip2Config: CustomBlip2Processor}
# Those whose code a saved folder needs beside it.
OWN_TOKENIZERS = (CustomElmoTokenizer,)


def _load(reference: str) -> type:
    """The class that `auto_classes` names as `file.Class`."""
    module, name = reference.split(".")
    return getattr(import_module(f".{module}", __package__), name)


def register(replace_stock: bool | None = None) -> None:
    """Register every family with the Auto classes. Importing the package does so once; calling again changes nothing.

    Args:
        replace_stock: `True` makes `AutoModel*.from_pretrained` of a stock checkpoint (`gpt2`, `bert`) give the class
            of this package, in scripts that do not know it; `False` gives stock back; `None` leaves that as it is.
    """
    for config_class, tokenizer_class in FAMILIES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        if tokenizer_class is not None:
            AutoTokenizer.register(config_class, tokenizer_class, exist_ok=True)
        if tokenizer_class in OWN_TOKENIZERS:
            tokenizer_class.register_for_auto_class()
        config_class.register_for_auto_class()
        for auto_name, reference in config_class.auto_classes.items():
            if auto_name != "AutoConfig":
                model_class = _load(reference)
                getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
                model_class.register_for_auto_class(auto_name)
            if auto_name == "AutoModelForCausalLM":
                # Registration does not reach this table, by which the Trainer knows whose labels smoothing must shift.
                MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__
        if config_class in PROCESSORS:
            AutoProcessor.register(config_class, PROCESSORS[config_class], exist_ok=True)
            PROCESSORS[config_class].register_for_auto_class()
        if replace_stock is not None:
            _steer_stock(config_class, replace_stock)


def _steer_stock(config_class: type[PreTrainedConfig], replace: bool) -> None:
    for model_type in config_class.stock_model_types:
        if replace:
            CONFIG_MAPPING.register(model_type, config_class, exist_ok=True)
        else:
            # The host can add an entry but not take it back; without ours it falls through to its own table.
            CONFIG_MAPPING._extra_content.pop(model_type, None)


__all__ = ["FAMILIES", "register"]
