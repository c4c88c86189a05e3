"""Model outputs that the host lacks."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class DoubleHeadsModelOutput(ModelOutput):
    """Output of a language model with a multiple-choice head (Radford et al. 2018, section 3.2).

    Shapes, with C choices: `loss` and `mc_loss` are scalars, `logits` (B, C, T, V), `mc_logits` (B, C). The two losses
    are returned apart, as in stock: add them with the weight of your choice.
    """

    loss: torch.FloatTensor | None = None
    mc_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    mc_logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """Output of masked language modelling and next sentence prediction together (Devlin et al. 2019, section 3.1).

    Shapes: `loss` is the scalar sum of the losses that labels were given for, `prediction_logits` (B, T, V) or `None`,
    `seq_relationship_logits` (B, 2).
    """

    loss: torch.FloatTensor | None = None
    prediction_logits: torch.FloatTensor | None = None
    seq_relationship_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class QFormerOutput(ModelOutput):
    """Output of the Q-Former (Li et al. 2023, "BLIP-2", section 3.1).

    Shapes: `last_hidden_state` (B, Q + T, D), queries before text; `pooler_output` (B, D), the first of them.
    `past_key_values` holds the keys and values of the queries, for a text that goes on from them.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class Blip2PreTrainingOutput(ModelOutput):
    """Output of BLIP-2's first stage (Li et al. 2023, section 3.2).

    Shapes: `loss` is the weighted sum of the three losses, scalars each: `itc_loss` of image-text contrast, `itm_loss`
    of image-text matching, `itg_loss` of image-grounded text generation, `None` where its weight is 0.
    `logits_per_image` (B, B') and `logits_per_text` (B, B') are similarities over the temperature, with the B' texts or
    images of all processes; `itm_logits` (3B, 2) of the pairs, of those with another image and those with another text;
    `image_embeds` (B, Q, E) and `text_embeds` (B, E) have length 1.
    """

    loss: torch.FloatTensor | None = None
    itc_loss: torch.FloatTensor | None = None
    itm_loss: torch.FloatTensor | None = None
    itg_loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None


@dataclass
class ElmoModelOutput(ModelOutput):
    """Output of ELMo (Peters et al. 2018, section 3).

    Shapes, with both directions beside each other in D: `last_hidden_state` (B, T, D) is the mix of all layers or, of a
    model without a mix, the last one; `pooler_output` (B, D) pools it over the words of a row; `hidden_states` are the
    layers, the word vectors first. `past_key_values` holds the state of every layer after the last word.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ElmoPreTrainingOutput(ModelOutput):
    """Output of the two language models of ELMo (Peters et al. 2018, section 3.1).

    Shapes: `loss` is the mean of the scalars `forward_loss` and `backward_loss`, or the first of a model without the
    second; `logits` (B, T, V) are of the word after, `backward_logits` of the word before.
    """

    loss: torch.FloatTensor | None = None
    forward_loss: torch.FloatTensor | None = None
    backward_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    backward_logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class Word2VecPreTrainingOutput(ModelOutput):
    """Output of word2vec with negative sampling (Mikolov et al. 2013b, equation 4).

    Shapes: `loss` is a scalar; `logits` (P, 1 + K) are the scores of the word to predict and of the noise after it.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
