"""ELMo (Peters et al. 2018, "Deep Contextualized Word Representations") and LSTM language models.

A word is read by its characters (Kim et al. 2015) or looked up; a stack of LSTM layers reads the words from left to
right, another one from right to left, and each predicts the word that it would read next. A task takes a weighted mean
of all layers. Published weights give the published vectors, all layers of them.

Only real tokens are computed, wherever the padding stands, left padding too: an LSTM must not walk over it. Documents
that are packed in one row, by positions that restart or the host's `cu_seq_lens_*`, start from an empty state each.
What a model has read is in its state, a cache of the same size for a text of any length; there is no limit of positions
and there are no attention weights.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from transformers import initialization as init
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, TokenClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .checks import OwnShardsOnly, check_attention_mask, check_ids, check_labels, input_shape
from .configuration_elmo import NUM_CHARACTERS, WORD_IS_OVER, CustomElmoConfig
from .dropout import Dropout
from .losses import linear_cross_entropy, logits_and_loss, next_token_labels
from .lstm import State, TimeOrder, run_lstm
from .matmul import project
from .ops import first_attended, last_attended, padding_of
from .outputs import ElmoModelOutput, ElmoPreTrainingOutput
from .packing import LENGTH_ARGUMENTS, cache_on_request, find_packing, refuse_restart, unpadding

# A highway layer starts as the identity, almost (Srivastava et al. 2015, section 2.2).
CARRY_BIAS = -2.0


def order_by_time(attention_mask, position_ids, shape, device, kwargs, has_state=False) -> TimeOrder:
    """The sequences of a batch (B, T): what the mask leaves of its rows, or the documents that its rows hold.

    Args:
        kwargs: of the call; the host's `cu_seq_lens_*` and `max_length_*` are taken out.
        has_state: rows go on from a state, so that they are one sequence each.
    """
    lengths = {name: kwargs.pop(name, None) for name in LENGTH_ARGUMENTS}
    if isinstance(attention_mask, torch.Tensor):
        attention_mask = attention_mask[:, -shape[1] :]
    if has_state:
        packing = None if attention_mask is None else unpadding(attention_mask)
    else:
        refuse_restart(attention_mask, position_ids)
        packing = find_packing(attention_mask, position_ids, shape, lengths)
    return TimeOrder.of(packing, shape, device)


class CustomElmoCache(Cache):
    """Output and cell of every layer after the last word of each row, forward layers first, and how many were read.

    The host's cache of recurrent states, which counts no words; generation asks for their number when it goes on.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[LinearAttentionLayer(number_of_states=2) for _ in range(num_layers)])
        self.num_words = 0

    @property
    def is_compileable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_words

    def reset(self):
        super().reset()
        self.num_words = 0

    def read(self, layer_idx: int) -> State | None:
        """Outputs (B, P) and cells (B, H), or `None` before the first word."""
        layer = self.layers[layer_idx]
        return (layer.recurrent_states[0], layer.recurrent_states[1]) if layer.has_previous_state[0] else None

    def write(self, layer_idx: int, state: State, rows: torch.Tensor, batch_size: int) -> None:
        """Keep the state (S, ...) of some `rows` (S,). No gradient goes back through it."""
        layer, old = self.layers[layer_idx], self.read(layer_idx)
        for index, new in enumerate(state):
            kept = new.new_zeros(batch_size, new.shape[1]) if old is None else old[index].to(new.dtype)
            layer.recurrent_states[index] = kept.index_copy(0, rows, new.detach())
            layer.is_recurrent_states_initialized[index] = layer.has_previous_state[index] = True
        layer.device = rows.device


class CustomElmoHighway(nn.Module):
    """g · relu(W x) + (1 - g) · x with the gate g = sigmoid(V x) (Srivastava et al. 2015, equation 3)."""

    def __init__(self, size: int):
        super().__init__()
        self.carry = nn.Linear(size, size)
        self.carry.is_highway_gate = True
        self.transform = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lerp(x, project(self.transform, x).relu(), project(self.carry, x).sigmoid())


class CustomElmoCharacterEmbeddings(nn.Module):
    """Word vectors from characters: convolutions, the maximum over the word, highway layers, a projection.

    Kim et al. 2015, sections 2.2 and 2.3; Jozefowicz et al. 2016, section 3.1. A word that stands in the batch more
    than once is computed once.
    """

    def __init__(self, config: CustomElmoConfig):
        super().__init__()
        self.widest = max(width for width, _ in config.filters)
        self.character_embeddings = nn.Embedding(NUM_CHARACTERS, config.character_embedding_size)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.character_embedding_size, count, width) for width, count in config.filters
        )
        total = sum(count for _, count in config.filters)
        self.activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[config.char_cnn_activation]()
        self.highways = nn.ModuleList(CustomElmoHighway(total) for _ in range(config.num_highway_layers))
        self.projection = nn.Linear(total, config.direction_size)

    def forward(self, character_ids: torch.Tensor) -> torch.Tensor:
        """(N, C) -> (N, P)."""
        words, places = torch.unique(character_ids, dim=0, return_inverse=True)
        # Past the longest word every window holds padding alone, so that one of the widest stands for the others.
        longest = int((words != WORD_IS_OVER).any(0).nonzero().max()) + 1
        characters = self.character_embeddings(words[:, : longest + self.widest]).transpose(1, 2)
        x = torch.cat([self.activation(conv(characters).amax(-1)) for conv in self.convolutions], dim=-1)
        for highway in self.highways:
            x = highway(x)
        return project(self.projection, x).index_select(0, places)


def make_embeddings(config: CustomElmoConfig) -> nn.Module:
    """Word vectors (N, P) from characters or from the numbers of words."""
    if config.input_type == "characters":
        return CustomElmoCharacterEmbeddings(config)
    return nn.Embedding(config.vocab_size, config.direction_size)


class CustomElmoLayer(GradientCheckpointingLayer):
    """One LSTM layer of one direction."""

    def __init__(self, config: CustomElmoConfig, has_skip_connection: bool):
        super().__init__()
        self.clips = (config.cell_clip, config.proj_clip)
        self.has_skip_connection = has_skip_connection
        self.dropout = Dropout(config.lstm_dropout)
        self.lstm = nn.LSTM(config.direction_size, config.cell_size, proj_size=config.projection_size or 0)

    def forward(self, x: torch.Tensor, state: State | None, batch_sizes: list[int]) -> tuple[torch.Tensor, State]:
        """(N, P) -> (N, P), words ordered by time, and the state after each sequence."""
        outputs, state = run_lstm(self.lstm, self.dropout(x), batch_sizes, state, *self.clips)
        return (outputs + x if self.has_skip_connection else outputs), state


class CustomElmoLSTM(nn.Module):
    """The layers of one direction."""

    def __init__(self, config: CustomElmoConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            CustomElmoLayer(config, config.use_skip_connections and index > 0)
            for index in range(config.num_hidden_layers)
        )

    def forward(self, x: torch.Tensor, order: TimeOrder, cache: Cache | None, first_layer: int) -> list[torch.Tensor]:
        """Outputs (N, P) of every layer; states are read from and written to the cache, from `first_layer` on."""
        outputs = []
        for index, layer in enumerate(self.layers, start=first_layer):
            state = None if cache is None else cache.read(index)
            if state is not None:
                state = tuple(part.index_select(0, order.rows) for part in state)
            x, state = layer(x, state, order.batch_sizes)
            if cache is not None:
                cache.write(index, state, order.rows, order.shape[0])
            outputs.append(x)
        return outputs


class CustomElmoScalarMix(nn.Module):
    """γ · Σ softmax(w)_j · h_j over the layers j (Peters et al. 2018, equation 1).

    With `do_layer_norm` the h_j are normalised first, each word by itself (Ba et al. 2016). The authors' code takes
    mean and variance over all words of a batch, which makes the vectors of a text depend on its neighbours.
    """

    def __init__(self, config: CustomElmoConfig):
        super().__init__()
        self.do_layer_norm = config.do_layer_norm
        self.weights = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, layers: list[torch.Tensor]) -> torch.Tensor:
        if self.do_layer_norm:
            layers = [nn.functional.layer_norm(layer, layer.shape[-1:]) for layer in layers]
        shares = self.weights.softmax(0).to(layers[0].dtype)
        mixed = sum(share * layer for share, layer in zip(shares, layers, strict=True))
        return self.gamma.to(mixed.dtype) * mixed


class CustomElmoPreTrainedModel(OwnShardsOnly, PreTrainedModel):
    """What every ELMo class declares to the host, how weights start, and what is frozen."""

    config: CustomElmoConfig
    base_model_prefix = "elmo"
    supports_gradient_checkpointing = True
    # A state cannot go back to an earlier word.
    _is_stateful = True
    _no_split_modules = ["CustomElmoLayer", "CustomElmoCharacterEmbeddings"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _auto_class = "AutoModel"

    def __init__(self, config: CustomElmoConfig, *inputs, **kwargs):
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        # The host makes every parameter that it loads a trainable one.
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def freeze(self):
        """Take the language models and the embeddings out of training where `config.freeze_bilm` says so."""
        if self.config.freeze_bilm:
            for part in self._language_models():
                part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_bilm:
            for part in self._language_models():
                part.eval()
        return self

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        if self.config.input_type == "characters" and new_num_tokens is not None:
            raise ValueError(
                "this model reads words by their characters, whose number is fixed, so it has no embeddings of words "
                "to resize. Train the layer that predicts words anew, with the vocabulary of your choice."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _language_models(self):
        base = getattr(self, self.base_model_prefix, self)
        parts = (getattr(base, name, None) for name in ("embeddings", "forward_lstm", "backward_lstm"))
        return [part for part in parts if part is not None]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv1d):
            # Inputs and outputs of the same scale (LeCun et al. 1998, section 4.6).
            fan_in = module.weight[0].numel()
            init.normal_(module.weight, mean=0.0, std=fan_in**-0.5)
            if module.bias is not None:
                init.constant_(module.bias, CARRY_BIAS if getattr(module, "is_highway_gate", False) else 0.0)
        elif isinstance(module, nn.LSTM):
            for name, weight in module.named_parameters():
                if weight.ndim == 2:
                    init.xavier_uniform_(weight)
                else:
                    init.zeros_(weight)
                    if name.startswith("bias_ih"):
                        # A new layer forgets little (Jozefowicz et al. 2015, section 2.2).
                        forget = torch.zeros_like(weight)
                        forget[module.hidden_size : 2 * module.hidden_size] = 1.0
                        init.copy_(weight, forget)
        elif isinstance(module, CustomElmoScalarMix):
            init.zeros_(module.weights)
            init.ones_(module.gamma)


class CustomElmoModel(CustomElmoPreTrainedModel):
    """The language models without their heads, and the mix of their layers.

    Args:
        add_scalar_mix: mix the layers; else the last one is given.
    """

    def __init__(self, config: CustomElmoConfig, add_scalar_mix: bool = True):
        super().__init__(config)
        self.embeddings = make_embeddings(config)
        self.forward_lstm = CustomElmoLSTM(config)
        self.backward_lstm = CustomElmoLSTM(config) if config.bidirectional else None
        self.scalar_mix = CustomElmoScalarMix(config) if add_scalar_mix else None
        self.gradient_checkpointing = False
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.embeddings, "character_embeddings", self.embeddings)

    def set_input_embeddings(self, new_embeddings: nn.Module):
        if self.config.input_type == "characters":
            self.embeddings.character_embeddings = new_embeddings
        else:
            self.embeddings = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: CustomElmoCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ElmoModelOutput:
        """Compute the mix of the layers (B, T, D), zero at padding.

        Args:
            input_ids: (B, T, C) ids of characters or, of a model that reads words, (B, T).
            past_key_values: states to go on from. The backward layers go on too, from the first word of the rows
                before, as the published vectors were computed.
            attention_mask: (B, T), 1 for real words; columns before them are not read.
            position_ids: (B, T); without a mask, those that restart mark packed documents. Not read otherwise.
            inputs_embeds: (B, T, P) word vectors, instead of `input_ids`.
            use_cache: return the states; the default is that of the configuration in a model of one direction.
        """
        shape = self._check_input(input_ids, inputs_embeds)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if attention_mask is not None:
            # A mask of the new words alone says as much as one of all.
            is_new = tuple(attention_mask.shape) == shape
            check_attention_mask(attention_mask, *shape, None if is_new else past_key_values)
        has_state = past_key_values is not None and self._check_state(past_key_values, shape[0])
        order = order_by_time(attention_mask, position_ids, shape, tokens.device, kwargs, has_state)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.config.bidirectional
        if use_cache and past_key_values is None:
            past_key_values = CustomElmoCache(self.config.num_hidden_layers * (2 if self.config.bidirectional else 1))
        tokens = order.take(tokens)
        layers = self._read(self.embeddings(tokens) if inputs_embeds is None else tokens, order, past_key_values)
        if past_key_values is not None:
            past_key_values.num_words += shape[1]
        mixed = layers[-1] if self.scalar_mix is None else self.scalar_mix(layers)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        last_hidden_state = order.put(mixed)
        return ElmoModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=None if self.scalar_mix is None else self._pool(last_hidden_state, attention_mask),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(order.put(layer) for layer in layers) if output_hidden_states else None,
        )

    def _check_input(self, input_ids, inputs_embeds):
        """Shape (B, T) of the input, refused where it is not what the model reads."""
        shape = input_shape(input_ids, inputs_embeds)
        if input_ids is None:
            return shape
        if self.config.input_type == "words":
            check_ids(input_ids, self.config.vocab_size, "input_ids")
            return shape
        if input_ids.ndim != 3 or shape[-1] != self.config.max_characters_per_token:
            raise ValueError(
                f"`input_ids` has shape {shape}, but this model reads words by their characters: (batch, words, "
                f"{self.config.max_characters_per_token}). Use the tokenizer that belongs to it."
            )
        check_ids(input_ids, self.get_input_embeddings().num_embeddings, "input_ids")
        return shape[:2]

    @staticmethod
    def _check_state(state, batch_size):
        """Whether a state has been written, refused where it is of another kind or batch."""
        if not isinstance(state, CustomElmoCache):
            raise TypeError(
                f"`past_key_values` is a {type(state).__name__}, but what an LSTM has read is in a CustomElmoCache. "
                "Pass the one that a call with `use_cache=True` returned, or none."
            )
        if state.get_seq_length() == 0:
            return False
        rows = len(state.read(0)[0]) if state.layers else batch_size
        if rows != batch_size:
            raise ValueError(
                f"`past_key_values` holds the state of {rows} rows but the batch has {batch_size}. Go on with the rows "
                "that it was made of, or leave it out."
            )
        return True

    def _read(self, words, order, cache):
        """All layers (N, D) from word vectors (N, P), ordered by time."""
        forward = [words, *self.forward_lstm(words, order, cache, 0)]
        if self.backward_lstm is None:
            return forward
        outputs = self.backward_lstm(words[order.reversal], order, cache, self.config.num_hidden_layers)
        backward = [words, *(output[order.reversal] for output in outputs)]
        return [torch.cat(pair, dim=-1) for pair in zip(forward, backward, strict=True)]

    def _pool(self, hidden_states, attention_mask):
        """One vector a row: (B, T, D) -> (B, D)."""
        is_padding = padding_of(attention_mask, hidden_states.shape[:-1])
        is_real = (
            torch.ones_like(hidden_states[..., 0]) if is_padding is None else (~is_padding).to(hidden_states.dtype)
        )
        if self.config.pooling_type == "mean":
            return hidden_states.sum(1) / is_real.sum(-1, keepdim=True).clamp(min=1)
        if self.config.pooling_type == "max":
            lowest = torch.finfo(hidden_states.dtype).min
            return hidden_states.masked_fill(is_real[..., None] == 0, lowest).amax(1)
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        size = self.config.direction_size
        ends = [hidden_states[rows, last_attended(is_real), :size]]
        if self.config.bidirectional:
            ends.append(hidden_states[rows, first_attended(is_real), size:])
        return torch.cat(ends, dim=-1)


class CustomElmoForPreTraining(CustomElmoPreTrainedModel):
    """The two language models, which share the layer that predicts a word (Peters et al. 2018, section 3.1)."""

    _tied_weights_keys = {"lm_head.weight": "elmo.embeddings.weight"}

    def __init__(self, config: CustomElmoConfig):
        super().__init__(config)
        # The class name matches no loss of the host's; with this the Trainer counts the words that are predicted.
        self.loss_type = "ForCausalLM"
        self.elmo = CustomElmoModel(config, add_scalar_mix=False)
        self.dropout = Dropout(config.lstm_dropout)
        self.lm_head = nn.Linear(config.direction_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head = new_embeddings

    @cache_on_request
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: CustomElmoCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ElmoPreTrainingOutput:
        """Compute the logits of the word after and of the word before and, given `labels`, the mean of both losses.

        Args:
            labels: (B, T), the words' own numbers in the vocabulary; -100 is ignored, and so is a label that padding
                would have to predict. Both losses are divided by the number of words that have a labelled word after.
            return_logits: compute logits at all. Training with labels does not unless told to: the loss needs none.
        """
        outputs = self.elmo(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states = self.dropout(outputs.last_hidden_state).split(self.config.direction_size, dim=-1)
        losses = [None, None]
        if labels is not None:
            check_labels(labels, states[0].shape[:2], self.config.vocab_size, "labels", "vocab_size")
            before = nn.functional.pad(labels[:, :-1], (1, 0), value=-100)
            if position_ids is not None and attention_mask is None:
                before = before.masked_fill(position_ids == 0, -100)
            targets = [next_token_labels(labels, attention_mask, found) for found in (None, before)]
            if num_items_in_batch is None:
                num_items_in_batch = (targets[0] != -100).sum()
            losses = [
                linear_cross_entropy(
                    state.flatten(0, 1), self.lm_head, target.flatten(), num_items_in_batch, self.config.loss_chunk_size
                )
                for state, target in zip(states, targets[: len(states)], strict=True)
            ]
            losses += [None] * (2 - len(losses))
        if return_logits is None:
            return_logits = labels is None or not self.training
        logits = [project(self.lm_head, state) for state in states] if return_logits else []
        given = [loss for loss in losses if loss is not None]
        return ElmoPreTrainingOutput(
            loss=sum(given) / len(given) if given else None,
            forward_loss=losses[0],
            backward_loss=losses[1],
            logits=logits[0] if logits else None,
            backward_logits=logits[1] if len(logits) > 1 else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class CustomElmoForCausalLM(CustomElmoPreTrainedModel, GenerationMixin):
    """LSTM language model over the tokens of any tokenizer (Zaremba et al. 2014, "Recurrent Neural Network
    Regularization")."""

    _tied_weights_keys = {"lm_head.weight": "elmo.embeddings.weight"}

    def __init__(self, config: CustomElmoConfig):
        super().__init__(config)
        if config.bidirectional or config.input_type != "words":
            raise ValueError(
                f"a language model that generates reads words from left to right, but `input_type` is "
                f"{config.input_type!r} and `bidirectional` is {config.bidirectional}. Use `input_type='words'` and "
                "`bidirectional=False`."
            )
        self.elmo = CustomElmoModel(config, add_scalar_mix=False)
        self.dropout = Dropout(config.lstm_dropout)
        self.lm_head = nn.Linear(config.direction_size, config.vocab_size)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The host would make a cache of keys and values; without one, the model makes its own."""
        return False

    @cache_on_request
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: CustomElmoCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Compute logits (B, T, V) and, given `labels`, the loss of predicting each token from those before it.

        Args:
            past_key_values: the state after the tokens before, as a call with `use_cache=True` returns it: a long text
                is read chunk by chunk.
            attention_mask: (B, S), 1 for real tokens, of the new ones or of all since the state was empty.
            labels: (B, T), usually `input_ids` itself; they are shifted inside. -100 is ignored, and so is a label
                that padding would have to predict.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for those indices.
            return_logits: compute them at all. Training with labels does not unless told to: the loss needs none.
            kwargs: `label_smoothing` and `z_loss` reach `linear_cross_entropy`.
        """
        shape = input_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, shape, self.config.vocab_size, "labels", "vocab_size")
        outputs = self.elmo(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        shift_labels = kwargs.pop("shift_labels", None)
        if labels is not None:
            shift_labels = next_token_labels(labels, attention_mask, shift_labels)
        logits, loss = logits_and_loss(
            self,
            self.lm_head,
            self.dropout(outputs.last_hidden_state),
            labels,
            self.config.vocab_size,
            logits_to_keep,
            return_logits,
            shift_labels,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class CustomElmoForTokenClassification(CustomElmoPreTrainedModel):
    """Classifier of each word from the mix of the layers, with an LSTM of the task's own between them or without."""

    def __init__(self, config: CustomElmoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.elmo = CustomElmoModel(config)
        size, units = config.hidden_size, config.classifier_lstm_size
        self.word_vectors = make_embeddings(config) if config.classifier_embeddings else None
        if self.word_vectors is not None:
            size += config.direction_size
        self.dropout = Dropout(config.classifier_dropout)
        self.tagger = nn.LSTM(size, units, bidirectional=True) if units else None
        self.classifier = nn.Linear(2 * units if units else size, config.num_labels)
        self.post_init()

    @cache_on_request(returns_cache=False)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Compute logits (B, T, L) and, given `labels` (B, T) with -100 ignored, the cross-entropy."""
        if self.word_vectors is not None and input_ids is None:
            raise ValueError("`classifier_embeddings` read `input_ids`, but `inputs_embeds` was given. Pass ids.")
        outputs = self.elmo(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        shape = tuple(hidden_states.shape[:2])
        order = order_by_time(attention_mask, position_ids, shape, hidden_states.device, kwargs)
        words = order.take(hidden_states)
        if self.word_vectors is not None:
            words = torch.cat((words, self.word_vectors(order.take(input_ids))), dim=-1)
        words = self.dropout(words)
        if self.tagger is not None:
            words = self.dropout(self.tagger(PackedSequence(words, torch.tensor(order.batch_sizes)))[0].data)
        logits = order.put(self.classifier(words))
        loss = None
        if labels is not None:
            check_labels(labels, shape, self.num_labels, "labels", "num_labels")
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = [
    "CustomElmoCache",
    "CustomElmoForCausalLM",
    "CustomElmoForPreTraining",
    "CustomElmoForTokenClassification",
    "CustomElmoModel",
    "CustomElmoPreTrainedModel",
]
