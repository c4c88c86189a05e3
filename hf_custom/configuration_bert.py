"""BERT configuration: the stock fields with the stock defaults, then our own."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_base import SIZE_LIMITS, CustomConfig
from .configuration_blip2 import CustomBlip2VisionConfig


@strict
class CustomBertConfig(CustomConfig):
    """Configuration of the BERT family (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers").

    Defaults give BERT-base, uncased. The JSON of any stock `bert` checkpoint loads here.

    Args:
        type_vocab_size: number of segments, told apart by `token_type_ids`.
        is_decoder: each token sees those before it only, and generation has a cache.
        add_cross_attention: give each layer of a decoder an attention over `encoder_hidden_states`.
        position_embedding_type: `absolute` (BERT's own, a learned vector a position), `sinusoidal` (Vaswani et al.
            2017, section 3.5), `rope` (Su et al. 2021, "RoFormer"), `relative_key` (Shaw et al. 2018, equation 4) or
            `relative_key_query` (Huang et al. 2020, "Improve Transformer Models with Better Relative Position
            Embeddings", method 4). Sinusoids and rotations have no parameters and no length limit.
        rope_theta: base of the rotary angles.
        classifier_dropout: dropout before a classifier; `None` means `hidden_dropout_prob`.
        classifier_hidden_size: width of a hidden layer in the classifiers of whole sequences; `None` for none, as in
            stock.
        loss_chunk_size: tokens whose logits are in memory together while the training loss is computed; `None` chooses
            by device. The loss is the same for all.
        vision_config: of the vision tower whose patches join the text in one stream; `None` for text alone.
    """

    model_type = "custom_bert"
    keys_to_ignore_at_inference = ["past_key_values"]
    stock_model_types: ClassVar = ("bert",)
    sub_configs_defaults: ClassVar = {"vision_config": SubConfigSpec(CustomBlip2VisionConfig, optional=True)}
    choices: ClassVar = {
        "position_embedding_type": ("absolute", "sinusoidal", "rope", "relative_key", "relative_key_query")
    }
    probabilities: ClassVar = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    positive: ClassVar = ("layer_norm_eps", "initializer_range", "rope_theta")
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_bert.CustomBertConfig",
        "AutoModel": "modeling_bert.CustomBertModel",
        "AutoModelForPreTraining": "modeling_bert_heads.CustomBertForPreTraining",
        "AutoModelForMaskedLM": "modeling_bert_heads.CustomBertForMaskedLM",
        "AutoModelForCausalLM": "modeling_bert_heads.CustomBertForCausalLM",
        "AutoModelForNextSentencePrediction": "modeling_bert_heads.CustomBertForNextSentencePrediction",
        "AutoModelForSequenceClassification": "modeling_bert_heads.CustomBertForSequenceClassification",
        "AutoModelForMultipleChoice": "modeling_bert_heads.CustomBertForMultipleChoice",
        "AutoModelForTokenClassification": "modeling_bert_heads.CustomBertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_bert_heads.CustomBertForQuestionAnswering",
        "AutoModelForVisualQuestionAnswering": "modeling_bert_heads.CustomBertForVisualQuestionAnswering",
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
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | int | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    position_embedding_type: str = "absolute"
    rope_theta: float | int = 10000.0
    classifier_hidden_size: int | None = None
    loss_chunk_size: int | None = None
    vision_config: dict | PreTrainedConfig | None = None

    base_model_pp_plan = {
        "embeddings": (["input_ids"], ["hidden_states"]),
        "encoder": (["hidden_states", "attention_mask"], ["hidden_states"]),
    }

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism divides the layers."""
        plan = {"intermediate.dense": "colwise", "output.dense": "rowwise"}
        for attention in ("attention", "crossattention") if self.add_cross_attention else ("attention",):
            plan |= {f"{attention}.self.{name}": "colwise" for name in ("query", "key", "value")}
            plan[f"{attention}.output.dense"] = "rowwise"
        if self.position_embedding_type.startswith("relative"):
            plan["attention.self.distance_embedding"] = "whole_table"
        return {f"encoder.layer.*.{name}": style for name, style in plan.items()}

    @property
    def classifier_dropout_prob(self) -> float:
        """Dropout before a classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The host would leave a dictionary that was passed to `from_pretrained` as it is.
        if isinstance(kwargs.get("vision_config"), dict):
            config_dict = {**config_dict, "vision_config": kwargs.pop("vision_config")}
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        self._check_size("type_vocab_size", self.type_vocab_size, SIZE_LIMITS["vocab_size"])
        self._check_size("classifier_hidden_size", self.classifier_hidden_size, SIZE_LIMITS["intermediate_size"])
        self._check_size("loss_chunk_size", self.loss_chunk_size, SIZE_LIMITS["loss_chunk_size"])
        if not 0 <= self.classifier_dropout_prob <= 1:
            raise ValueError(
                f"`classifier_dropout` is {self.classifier_dropout!r} but a probability lies between 0 and 1."
            )
        head_size = self.hidden_size // self.num_attention_heads
        if self.position_embedding_type == "rope" and head_size % 2:
            raise ValueError(
                "rotary positions turn pairs of coordinates, so the head size hidden_size / num_attention_heads must "
                f"be even, but it is {head_size}. Change `num_attention_heads` or `hidden_size`."
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"sinusoidal positions pair sines with cosines, so `hidden_size` ({self.hidden_size}) must be even."
            )
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError(
                "`add_cross_attention` gives a decoder its attention over an encoder, but `is_decoder` is False. "
                "Set `is_decoder=True`."
            )
        if self.vision_config is not None and self.is_decoder:
            raise ValueError(
                "`vision_config` joins text and patches in one stream, in which all see all, but `is_decoder` is True. "
                "Leave out one of them."
            )


__all__ = ["CustomBertConfig"]
