"""GPT-2, readable and drop-in: a plugin for Hugging Face Transformers. Importing it registers its classes."""

from .configuration_gpt2 import CustomGPT2Config
from .modeling_gpt2 import (
    CustomGPT2DoubleHeadsModel,
    CustomGPT2ForCausalLM,
    CustomGPT2ForQuestionAnswering,
    CustomGPT2ForSequenceClassification,
    CustomGPT2ForTokenClassification,
    CustomGPT2Model,
    CustomGPT2PreTrainedModel,
)
from .registry import register

__version__ = "0.1.0"

register()

__all__ = [
    "CustomGPT2Config",
    "CustomGPT2DoubleHeadsModel",
    "CustomGPT2ForCausalLM",
    "CustomGPT2ForQuestionAnswering",
    "CustomGPT2ForSequenceClassification",
    "CustomGPT2ForTokenClassification",
    "CustomGPT2Model",
    "CustomGPT2PreTrainedModel",
    "register",
]
