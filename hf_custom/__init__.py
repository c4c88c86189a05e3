"""GPT-2, BERT, BLIP-2 and what they came from, readable and drop-in: a plugin for Hugging Face Transformers.

Importing it registers them.
"""

from .configuration_bert import CustomBertConfig
from .configuration_blip2 import CustomBlip2Config, CustomBlip2QFormerConfig, CustomBlip2VisionConfig
from .configuration_elmo import CustomElmoConfig
from .configuration_gpt2 import CustomGPT2Config
from .configuration_transformer import CustomTransformerConfig
from .configuration_word2vec import CustomWord2VecConfig
from .export import export_to_stock
from .hub import push_to_hub as _push_to_hub
from .loading import load_model
from .modeling_bert import CustomBertModel, CustomBertPreTrainedModel
from .modeling_bert_heads import (
    CustomBertForCausalLM,
    CustomBertForImageTextRetrieval,
    CustomBertForMaskedLM,
    CustomBertForMultipleChoice,
    CustomBertForNextSentencePrediction,
    CustomBertForPreTraining,
    CustomBertForQuestionAnswering,
    CustomBertForSequenceClassification,
    CustomBertForTokenClassification,
    CustomBertForVisualQuestionAnswering,
)
from .modeling_blip2 import CustomBlip2ForConditionalGeneration, CustomBlip2Model, CustomBlip2PreTrainedModel
from .modeling_blip2_qformer import CustomBlip2QFormerModel, CustomBlip2QFormerPreTrainedModel
from .modeling_blip2_retrieval import CustomBlip2ForImageTextRetrieval, CustomBlip2ForPreTraining
from .modeling_blip2_vision import (
    CustomBlip2VisionForImageClassification,
    CustomBlip2VisionModel,
    CustomBlip2VisionPreTrainedModel,
)
from .modeling_elmo import (
    CustomElmoForCausalLM,
    CustomElmoForPreTraining,
    CustomElmoForTokenClassification,
    CustomElmoModel,
    CustomElmoPreTrainedModel,
)
from .modeling_gpt2 import (
    CustomGPT2DoubleHeadsModel,
    CustomGPT2ForCausalLM,
    CustomGPT2ForQuestionAnswering,
    CustomGPT2ForSequenceClassification,
    CustomGPT2ForTokenClassification,
    CustomGPT2Model,
    CustomGPT2PreTrainedModel,
)
from .modeling_transformer import (
    CustomTransformerForSeq2SeqLM,
    CustomTransformerModel,
    CustomTransformerPreTrainedModel,
)
from .modeling_word2vec import (
    CustomWord2VecForPreTraining,
    CustomWord2VecModel,
    CustomWord2VecPreTrainedModel,
)
from .processing_blip2 import CustomBlip2Processor
from .registry import register
from .tokenization_elmo import CustomElmoTokenizer

__version__ = "0.1.0"

register()

# Here and not in the modeling files, whose copies on the Hub run without the code that renders a card.
for _base in (
    CustomGPT2PreTrainedModel,
    CustomBertPreTrainedModel,
    CustomBlip2VisionPreTrainedModel,
    CustomBlip2QFormerPreTrainedModel,
    CustomBlip2PreTrainedModel,
    CustomTransformerPreTrainedModel,
    CustomElmoPreTrainedModel,
    CustomWord2VecPreTrainedModel,
):
    _base.push_to_hub = _push_to_hub

__all__ = [
    "CustomBertConfig",
    "CustomBertForCausalLM",
    "CustomBertForImageTextRetrieval",
    "CustomBertForMaskedLM",
    "CustomBertForMultipleChoice",
    "CustomBertForNextSentencePrediction",
    "CustomBertForPreTraining",
    "CustomBertForQuestionAnswering",
    "CustomBertForSequenceClassification",
    "CustomBertForTokenClassification",
    "CustomBertForVisualQuestionAnswering",
    "CustomBertModel",
    "CustomBertPreTrainedModel",
    "CustomBlip2Config",
    "CustomBlip2ForConditionalGeneration",
    "CustomBlip2ForImageTextRetrieval",
    "CustomBlip2ForPreTraining",
    "CustomBlip2Model",
    "CustomBlip2PreTrainedModel",
    "CustomBlip2Processor",
    "CustomBlip2QFormerConfig",
    "CustomBlip2QFormerModel",
    "CustomBlip2QFormerPreTrainedModel",
    "CustomBlip2VisionConfig",
    "CustomBlip2VisionForImageClassification",
    "CustomBlip2VisionModel",
    "CustomBlip2VisionPreTrainedModel",
    "CustomElmoConfig",
    "CustomElmoForCausalLM",
    "CustomElmoForPreTraining",
    "CustomElmoForTokenClassification",
    "CustomElmoModel",
    "CustomElmoPreTrainedModel",
    "CustomElmoTokenizer",
    "CustomGPT2Config",
    "CustomGPT2DoubleHeadsModel",
    "CustomGPT2ForCausalLM",
    "CustomGPT2ForQuestionAnswering",
    "CustomGPT2ForSequenceClassification",
    "CustomGPT2ForTokenClassification",
    "CustomGPT2Model",
    "CustomGPT2PreTrainedModel",
    "CustomTransformerConfig",
    "CustomTransformerForSeq2SeqLM",
    "CustomTransformerModel",
    "CustomTransformerPreTrainedModel",
    "CustomWord2VecConfig",
    "CustomWord2VecForPreTraining",
    "CustomWord2VecModel",
    "CustomWord2VecPreTrainedModel",
    "export_to_stock",
    "load_model",
    "register",
]
