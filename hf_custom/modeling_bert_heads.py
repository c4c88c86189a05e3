"""The heads of BERT: pre-training, language models, classifiers of sequences, tokens, spans and choices, and those that
read an image with the text.

Classes, parameter names, arguments and numbers are those of stock `bert`; the last two are ours. Each runs the model of
`modeling_bert.py` and adds a layer or two.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .attention import RepeatsNoHeads
from .checks import (
    check_answer_positions,
    check_labels,
    check_sequence_labels,
    input_shape,
)
from .configuration_bert import CustomBertConfig
from .dropout import Dropout
from .layers import get_activation
from .losses import logits_and_loss, next_token_labels, sequence_classification_loss
from .matmul import project
from .modeling_bert import CustomBertModel, CustomBertPreTrainedModel
from .ops import (
    padding_of,
)
from .outputs import PreTrainingOutput
from .packing import cache_on_request

logger = logging.get_logger(__name__)


class CustomBertPredictionHeadTransform(nn.Module):
    """What happens to a state before it is compared with the word embeddings."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = get_activation(config.hidden_act, "hidden_act")
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.transform_act_fn(project(self.dense, hidden_states)))


class CustomBertLMPredictionHead(nn.Module):
    """Logits of the vocabulary, with the word embeddings as weights."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.transform = CustomBertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.decoder, self.transform(hidden_states))


class CustomBertPreTrainingHeads(nn.Module):
    """The heads of pre-training: of masked (or next) tokens, and of whether one sentence follows another."""

    def __init__(self, config: CustomBertConfig, has_predictions: bool = True, has_relationship: bool = True):
        super().__init__()
        if has_predictions:
            self.predictions = CustomBertLMPredictionHead(config)
        if has_relationship:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class CustomBertMLPClassifier(nn.Module):
    """Classifier with one hidden layer: (B, D) -> (B, L)."""

    def __init__(self, config: CustomBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.classifier_hidden_size)
        self.act = get_activation(config.hidden_act, "hidden_act")
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.out_proj = nn.Linear(config.classifier_hidden_size, config.num_labels)

    def forward(self, pooled_output: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(self.act(self.dense(pooled_output))))


def make_classifier(config: CustomBertConfig) -> nn.Module:
    """A linear map to the labels, or an MLP where the configuration has `classifier_hidden_size`."""
    if config.classifier_hidden_size is None:
        return nn.Linear(config.hidden_size, config.num_labels)
    return CustomBertMLPClassifier(config)


class CustomBertPreTrainedHead(CustomBertPreTrainedModel):
    """What the heads share: the vocabulary's logits and their loss, and the loss of classes."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CustomBertLMPredictionHead):
            init.zeros_(module.bias)

    def get_output_embeddings(self) -> nn.Module | None:
        predictions = getattr(getattr(self, "cls", None), "predictions", None)
        return None if predictions is None else predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def _logits_and_loss(self, hidden_states, labels, logits_to_keep, return_logits, kwargs):
        """Of predicting `labels` (B, T) where they stand."""
        head = self.cls.predictions
        return logits_and_loss(
            self,
            head,
            hidden_states,
            labels,
            self.config.vocab_size,
            logits_to_keep,
            return_logits,
            # The host's loss of causal models would shift labels that are shifted already.
            labels if self.loss_type == "ForCausalLM" else None,
            (head.transform, head.decoder),
            **kwargs,
        )

    def _text_and_labels(self, outputs, labels, attention_mask, shape):
        """States of the text without the patches (B, T, D), and the labels that do not stand at padding."""
        is_padding = padding_of(attention_mask, shape)
        if labels is not None and is_padding is not None:
            labels = labels.masked_fill(is_padding.to(labels.device), -100)
        return outputs.last_hidden_state[:, : shape[1]], labels

    def _class_loss(self, logits, labels, num_items_in_batch, problem_type="single_label_classification"):
        """The loss of a classifier of whole sequences, `None` without labels."""
        if labels is None:
            return None
        return sequence_classification_loss(logits, labels.to(logits.device), problem_type, num_items_in_batch)


class CustomBertForPreTraining(CustomBertPreTrainedHead):
    """The two tasks of pre-training: masked tokens, and whether the second sentence follows the first."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        # The class name matches no loss of the host's.
        self.loss_type = "ForMaskedLM"
        self.bert = CustomBertModel(config)
        self.cls = CustomBertPreTrainingHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        next_sentence_label: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PreTrainingOutput:
        """Compute logits (B, T, V) of the tokens and (B, 2) of the relationship, and the sum of their losses.

        Args:
            labels: (B, T), the tokens that masks hide; -100 elsewhere.
            next_sentence_label: (B,), 0 where the second sentence follows the first, 1 where it is another. Under
                `num_items_in_batch` a row counts with its share of the labelled tokens, so that micro-batches add up.
            return_logits: compute the tokens' logits; training with `labels` does not unless told to.
        """
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, shape, self.config.vocab_size, "labels", "vocab_size")
        if next_sentence_label is not None:
            check_labels(next_sentence_label.view(-1), shape[:1], 2, "next_sentence_label", "number of relationships")
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            **kwargs,
        )
        states, labels = self._text_and_labels(outputs, labels, attention_mask, shape)
        logits, loss = self._logits_and_loss(states, labels, 0, return_logits, kwargs)
        relationship_logits = self.cls.seq_relationship(outputs.pooler_output)
        if next_sentence_label is not None:
            relationship_loss = self._relationship_loss(relationship_logits, next_sentence_label, labels, kwargs)
            loss = relationship_loss if loss is None else loss + relationship_loss
        return PreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=relationship_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _relationship_loss(self, logits, next_sentence_label, labels, kwargs):
        next_sentence_label, items = next_sentence_label.view(-1).to(logits.device), kwargs.get("num_items_in_batch")
        if items is None or labels is None:
            return nn.functional.cross_entropy(logits.float(), next_sentence_label)
        shares = (labels != -100).sum(-1) / torch.as_tensor(items, device=logits.device)
        losses = nn.functional.cross_entropy(logits.float(), next_sentence_label, reduction="none")
        return (losses * shares).sum()


class CustomBertForMaskedLM(CustomBertPreTrainedHead):
    """Masked language model: the tokens that masks hide, read from both sides and, with images, from the patches."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        if config.is_decoder:
            logger.warning("masked tokens are read from both sides, but `is_decoder` is True: each sees the past only.")
        self.bert = CustomBertModel(config, add_pooling_layer=False)
        self.cls = CustomBertPreTrainingHeads(config, has_relationship=False)
        self.post_init()

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
        labels: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Compute logits (B, T, V) and, given `labels`, the loss of the masked tokens.

        Args:
            labels: (B, T), the tokens that masks hide; -100 elsewhere. Labels at padding are ignored.
            return_logits: compute logits at all. Training with labels does not unless told to: the loss needs those of
                labelled positions only, and not all at once.
            kwargs: `label_smoothing` and `z_loss` reach `linear_cross_entropy`.
        """
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, shape, self.config.vocab_size, "labels", "vocab_size")
        kwargs |= {"use_cache": False}
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            pixel_values=pixel_values,
            **kwargs,
        )
        states, labels = self._text_and_labels(outputs, labels, attention_mask, shape)
        logits, loss = self._logits_and_loss(states, labels, 0, return_logits, kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CustomBertForCausalLM(RepeatsNoHeads, CustomBertPreTrainedHead, GenerationMixin):
    """Language model, for `is_decoder`: the next token's logits."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        if not config.is_decoder:
            logger.warning("`is_decoder` is False, so each token sees those after it. Set `is_decoder=True` to write.")
        self.bert = CustomBertModel(config, add_pooling_layer=False)
        self.cls = CustomBertPreTrainingHeads(config, has_relationship=False)
        self.post_init()

    @cache_on_request
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
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        head_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        """Compute logits (B, T, V) and, given `labels`, the loss of predicting each token from those before it.

        Args:
            labels: (B, T), usually `input_ids` itself; they are shifted inside. -100 is ignored, and so is a label
                that padding would have to predict.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for those indices.
            return_logits: compute them at all. Training with labels does not unless told to: the loss needs none.
            kwargs: `label_smoothing` and `z_loss` reach `linear_cross_entropy`.
        """
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, shape, self.config.vocab_size, "labels", "vocab_size")
            labels = next_token_labels(labels, attention_mask, kwargs.pop("shift_labels", None))
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            head_mask=head_mask,
            **kwargs,
        )
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, return_logits, kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


class CustomBertForNextSentencePrediction(CustomBertPreTrainedHead):
    """Whether the second sentence follows the first."""

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        self.bert = CustomBertModel(config)
        self.cls = CustomBertPreTrainingHeads(config, has_predictions=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NextSentencePredictorOutput:
        """Compute logits (B, 2) and the loss of `labels` (B,): 0 where the second sentence follows, 1 where not."""
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            labels = labels.view(-1)
            check_labels(labels, shape[:1], 2, "labels", "number of relationships")
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.cls.seq_relationship(outputs.pooler_output)
        return NextSentencePredictorOutput(
            loss=self._class_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CustomBertForSequenceClassification(CustomBertPreTrainedHead):
    """Classifier of one sentence or of a pair."""

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = CustomBertModel(config)
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.classifier = make_classifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Compute logits (B, L) for L labels and the loss of `config.problem_type`, found from `labels` when unset.

        Args:
            labels: (B,) class indices, or reals (B,) or (B, L) for regression, or zeros and ones (B, L).
            num_items_in_batch: number of labels over all accumulated micro-batches, as the Trainer passes it.
        """
        if labels is not None:
            check_sequence_labels(labels, input_shape(input_ids, inputs_embeds)[0], self.config)
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        return SequenceClassifierOutput(
            loss=self._class_loss(logits, labels, num_items_in_batch, self.config.problem_type),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CustomBertForVisualQuestionAnswering(CustomBertForSequenceClassification):
    """Answers to questions about an image, as classes: the classifier of sequences, of a model with `vision_config`."""


class CustomBertForMultipleChoice(CustomBertPreTrainedHead):
    """A score for each of several choices, each read with the question in a sequence of its own."""

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        self.bert = CustomBertModel(config)
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """Compute scores (B, C) of C choices, whose inputs are (B, C, T), and the loss of `labels` (B,)."""
        shape = input_shape(input_ids, inputs_embeds)
        if len(shape) < 3:
            raise ValueError("the input needs an axis of choices: (batch, choices, length).")
        *lead, num_choices, _ = shape
        if labels is not None:
            check_labels(labels, lead, num_choices, "labels", "number of choices")
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
            None if batch is None else batch.flatten(0, 1)
            for batch in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, num_choices)
        return MultipleChoiceModelOutput(
            loss=self._class_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CustomBertForTokenClassification(CustomBertPreTrainedHead):
    """Classifier of each token."""

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = CustomBertModel(config, add_pooling_layer=False)
        self.dropout = Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Compute logits (B, T, L) and, given `labels` (B, T) with -100 ignored, the cross-entropy."""
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, shape, self.num_labels, "labels", "num_labels")
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state[:, : shape[1]]))
        loss = self.loss_function(logits, labels, self.config, **kwargs) if labels is not None else None
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CustomBertForQuestionAnswering(CustomBertPreTrainedHead):
    """Extractive question answering: a score for each token to start and to end the answer."""

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        self.bert = CustomBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Compute two logits a token, (B, T) each, and the mean of the two losses.

        Args:
            start_positions, end_positions: (B,), token indices; those beyond the sequence are ignored.
        """
        shape = input_shape(input_ids, inputs_embeds)
        for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
            if positions is not None:
                check_answer_positions(positions, shape[0], name)
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state[:, : shape[1]]
        # The loss compares all positions, so that padding is the same for it on every path.
        is_padding = padding_of(attention_mask, shape)
        if is_padding is not None:
            hidden_states = hidden_states.masked_fill(is_padding[..., None], 0.0)
        start_logits, end_logits = self.qa_outputs(hidden_states).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CustomBertForImageTextRetrieval(CustomBertPreTrainedHead):
    """Image-text matching: whether a text belongs to an image, by which the texts of an image can be ranked."""

    def __init__(self, config: CustomBertConfig):
        super().__init__(config)
        self.bert = CustomBertModel(config)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Compute logits (B, 2) of each text with its image, the second for a match, and the loss of `labels` (B,)."""
        if labels is not None:
            check_labels(labels, input_shape(input_ids, inputs_embeds)[:1], 2, "labels", "number of classes")
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            **kwargs,
        )
        logits = self.itm_head(outputs.pooler_output)
        return SequenceClassifierOutput(
            loss=self._class_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
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
]
