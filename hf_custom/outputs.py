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
