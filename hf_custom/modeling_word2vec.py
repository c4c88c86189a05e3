"""word2vec: a vector for each word, learned by telling the words around a word from noise.

Mikolov et al. 2013a, "Efficient Estimation of Word Representations in Vector Space" (skip-gram and CBOW, sections 3.1
and 3.2); 2013b, "Distributed Representations of Words and Phrases and their Compositionality" (negative sampling,
equation 4). `CustomWord2VecModel` is the table of input vectors, which is what people keep; the table of output
vectors and the loss are in `CustomWord2VecForPreTraining`, which says what is computed. Training of many words a second
does the same sums with larger products, and without autograd.

Shape letters: B batch, T words, D vector, V vocabulary, P pairs, C context words of a pair, K negatives.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .checks import OwnShardsOnly, check_attention_mask, check_ids, input_shape
from .configuration_word2vec import CustomWord2VecConfig
from .losses import negative_sampling_loss
from .outputs import Word2VecPreTrainingOutput

NEAR_MATCHES = 3


def vocabulary_digest(words: Iterable[str]) -> str:
    """SHA-256 of words in the order of their ids. No word holds a line break."""
    return hashlib.sha256("\n".join(words).encode("utf-8", "surrogatepass")).hexdigest()


def check_vocabulary(words: list[str], config: CustomWord2VecConfig, origin: str) -> None:
    """Refuse words that are not those of the weights' rows.

    Args:
        words: in the order of their ids, the unknown word among them.
        origin: file or object that they come from, for the message.
    """
    if len(words) != config.vocab_size:
        raise ValueError(
            f"{origin} has {len(words)} words but the weights have `vocab_size` {config.vocab_size} rows. Use the "
            "tokenizer that was saved with them."
        )
    if config.vocabulary_sha256 is not None and vocabulary_digest(words) != config.vocabulary_sha256:
        raise ValueError(
            f"{origin} has as many words as the weights have rows, but others or in another order "
            "(`vocabulary_sha256`). Use the tokenizer that was saved with them."
        )


def words_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words of a tokenizer in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def context_mean(vectors: torch.Tensor, mask: torch.Tensor, whole_error: bool) -> torch.Tensor:
    """Mean (P, D) of those vectors (P, C, D) where `mask` (P, C) is true; zero where none is.

    Args:
        whole_error: the gradient of each vector is that of the mean, not divided by their number.
    """
    mask = mask.unsqueeze(-1).to(vectors.dtype)
    total = (vectors * mask).sum(1)
    mean = total / mask.sum(1).clamp(min=1)
    # The value of the mean with the gradient of the sum.
    return total + (mean - total).detach() if whole_error else mean


class CustomWord2VecPreTrainedModel(OwnShardsOnly, PreTrainedModel):
    """What both classes declare to the host, how vectors start, and that a saved vocabulary belongs to them."""

    config: CustomWord2VecConfig
    base_model_prefix = "word2vec"
    _no_split_modules = []
    # Without attention, any implementation will do; the scripts ask for this one.
    _supports_sdpa = True
    # Every class ships its code when saved; the registry names the Auto class of those that have one.
    _auto_class = "AutoModel"

    def __init__(self, config: CustomWord2VecConfig, *inputs, **kwargs):
        # Fields may have changed since the configuration was made; refuse before any tensor is allocated.
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            bound = self.config.initializer_range / self.config.hidden_size
            init.uniform_(module.weight, -bound, bound)
            if not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[self.config.unk_token_id])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As the host.

        Raises:
            ValueError: when the folder's `tokenizer.json` has other words than the weights have rows.
        """
        model = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        file = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "", "tokenizer.json")
        loaded = model[0] if isinstance(model, tuple) else model
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            vocabulary = {**content["model"]["vocab"], **added}
            check_vocabulary(sorted(vocabulary, key=vocabulary.get), loaded.config, str(file))
        return model


class CustomWord2VecModel(CustomWord2VecPreTrainedModel):
    """A vector for each word."""

    def __init__(self, config: CustomWord2VecConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, new_embeddings: nn.Module):
        self.embeddings = new_embeddings

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Look up the vectors (B, T, D) of words; zero for unknown ones and where the mask is 0.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 for words.
            inputs_embeds: (B, T, D), instead of `input_ids`.
        """
        shape = input_shape(input_ids, inputs_embeds)
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size, "input_ids")
            inputs_embeds = self.embeddings(input_ids)
        if attention_mask is not None:
            check_attention_mask(attention_mask, shape[0], shape[-1])
            inputs_embeds = inputs_embeds * attention_mask.unsqueeze(-1).to(inputs_embeds.dtype)
        return BaseModelOutput(last_hidden_state=inputs_embeds)

    @torch.no_grad()
    def unit_vectors(self) -> torch.Tensor:
        """Input vectors (V, D) of length 1; zero stays zero."""
        return nn.functional.normalize(self.embeddings.weight.detach().float(), dim=-1)

    @torch.no_grad()
    def most_similar(
        self,
        positive: int | str | Iterable[int | str],
        negative: int | str | Iterable[int | str] = (),
        topn: int = 10,
        restrict_vocab: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[tuple[int | str, float]]:
        """The words nearest to the mean of unit vectors, those of `negative` taken with a minus (3CosAdd; Mikolov et
        al. 2013, "Linguistic Regularities in Continuous Space Word Representations", section 4).

        Args:
            positive: ids or, with `tokenizer`, words.
            restrict_vocab: search among that many of the first, which are the most frequent, alone.

        Returns:
            Words (ids without `tokenizer`) and cosines, the nearest first; none of those that were asked for.

        Raises:
            ValueError: for an unknown word, which is named with near matches, or an id outside the vocabulary.
        """
        if topn < 1 or (restrict_vocab is not None and restrict_vocab < 1):
            raise ValueError("`topn` and `restrict_vocab` count words and must be at least 1.")
        positive, negative = (self._ids(words, tokenizer) for words in (positive, negative))
        if not positive and not negative:
            raise ValueError("no word was given. Name at least one in `positive`.")
        vectors, asked = self.unit_vectors(), torch.tensor(positive + negative, device=self.device)
        signs = torch.tensor([1.0] * len(positive) + [-1.0] * len(negative), device=self.device)
        target = nn.functional.normalize(signs @ vectors[asked], dim=0)
        cosines = vectors[:restrict_vocab] @ target
        never = torch.tensor([*positive, *negative, self.config.unk_token_id], device=self.device)
        cosines[never[never < len(cosines)]] = -torch.inf
        best = cosines.topk(min(topn, len(cosines)))
        words = None if tokenizer is None else words_of_tokenizer(tokenizer)
        return [
            (index if words is None else words[index], value)
            for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if value != -torch.inf
        ]

    def analogy(
        self, a: int | str, b: int | str, c: int | str, topn: int = 1, **options
    ) -> list[tuple[int | str, float]]:
        """What is to `c` as `b` is to `a`: the words nearest to b - a + c. `options` are those of `most_similar`."""
        return self.most_similar([b, c], [a], topn, **options)

    @torch.no_grad()
    def similarity(
        self, first: int | str, second: int | str, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> float:
        """Cosine of two words' vectors."""
        ids = self._ids([first, second], tokenizer)
        rows = nn.functional.normalize(self.embeddings.weight[ids].float(), dim=-1)
        return float(rows[0] @ rows[1])

    def _ids(self, words, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
        """Ids of ids or words."""
        words = [words] if isinstance(words, int | str) else list(words)
        if tokenizer is not None:
            check_vocabulary(words_of_tokenizer(tokenizer), self.config, "the tokenizer")
        ids = []
        for word in words:
            if isinstance(word, str):
                ids.append(self._id_of_word(word, tokenizer))
            elif 0 <= word < self.config.vocab_size:
                ids.append(int(word))
            else:
                raise ValueError(
                    f"id {word} is outside the vocabulary: ids lie between 0 and {self.config.vocab_size - 1}."
                )
        return ids

    def _id_of_word(self, word: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
        if tokenizer is None:
            raise TypeError(f"{word!r} is a word, which the model alone does not know. Pass `tokenizer`, or ids.")
        vocabulary = tokenizer.get_vocab()
        normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        form = word if normalizer is None or word in vocabulary else normalizer.normalize_str(word)
        if form in vocabulary and vocabulary[form] != self.config.unk_token_id:
            return vocabulary[form]
        near = difflib.get_close_matches(form, vocabulary, n=NEAR_MATCHES)
        raise ValueError(
            f"the word {word!r} is unknown: it was not in the text, or too rare there."
            + (f" Near it are {', '.join(map(repr, near))}." if near else " Use another one.")
        )


class CustomWord2VecForPreTraining(CustomWord2VecPreTrainedModel):
    """Input and output vectors, and the loss of negative sampling."""

    main_input_name = "center_ids"

    def __init__(self, config: CustomWord2VecConfig):
        super().__init__(config)
        self.word2vec = CustomWord2VecModel(config)
        # Its rows are the output vectors.
        self.output_embeddings = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output_embeddings

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.output_embeddings = new_embeddings

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        center_ids: torch.LongTensor,
        context_ids: torch.LongTensor,
        negative_ids: torch.LongTensor,
        context_mask: torch.Tensor | None = None,
        negative_weights: torch.Tensor | None = None,
        **kwargs,
    ) -> Word2VecPreTrainingOutput:
        """The mean over pairs of -log σ(u·v) - Σ_k log σ(-u·v_k) (Mikolov et al. 2013b, equation 4), with u an input
        vector or a mean of some, v the output vector of the word to predict and v_k those of noise.

        Noise that is the word to predict does not count, as in the C code.

        Args:
            center_ids: (P,).
            context_ids: skip-gram: (P,), the word to predict from the centre. CBOW: (P, C), the words to predict the
                centre from.
            negative_ids: (P, K).
            context_mask: (P, C), CBOW alone: 1 for words, 0 for padding.
            negative_weights: (P, K), how much each noise word counts; 1 when not given.
        """
        is_cbow = self.config.objective == "cbow"
        self._check_pairs(center_ids, context_ids, negative_ids, context_mask, is_cbow)
        embeddings, outputs = self.word2vec.embeddings, self.output_embeddings.weight
        if is_cbow:
            mask = torch.ones_like(context_ids) if context_mask is None else context_mask
            inputs, predicted = context_mean(embeddings(context_ids), mask, self.config.whole_cbow_error), center_ids
        else:
            inputs, predicted = embeddings(center_ids), context_ids
        positive = (inputs * outputs[predicted]).sum(-1)  # (P,)
        negative = torch.einsum("pd,pkd->pk", inputs, outputs[negative_ids])
        weights = (negative_ids != predicted[:, None]).to(negative.dtype)
        if negative_weights is not None:
            weights = weights * negative_weights
        loss = negative_sampling_loss(positive, negative, weights) / len(center_ids)
        return Word2VecPreTrainingOutput(loss=loss, logits=torch.cat([positive[:, None], negative], 1))

    def _check_pairs(self, center_ids, context_ids, negative_ids, context_mask, is_cbow):
        """Refuse ids of shapes or values that do not go together."""
        pairs = len(center_ids)
        needed = f"({pairs}, C)" if is_cbow else f"({pairs},)"
        if center_ids.ndim != 1 or pairs == 0:
            raise ValueError(f"`center_ids` has shape {tuple(center_ids.shape)} but (P,) is needed, P at least 1.")
        if context_ids.ndim != 1 + is_cbow or len(context_ids) != pairs:
            raise ValueError(
                f"`context_ids` has shape {tuple(context_ids.shape)} but `objective` {self.config.objective!r} needs "
                f"{needed}."
            )
        if negative_ids.ndim != 2 or len(negative_ids) != pairs:
            raise ValueError(f"`negative_ids` has shape {tuple(negative_ids.shape)} but ({pairs}, K) is needed.")
        if context_mask is not None and context_mask.shape != context_ids.shape:
            raise ValueError(
                f"`context_mask` has shape {tuple(context_mask.shape)} but that of `context_ids` is "
                f"{tuple(context_ids.shape)}."
            )
        for name, ids in (("center_ids", center_ids), ("context_ids", context_ids), ("negative_ids", negative_ids)):
            check_ids(ids, self.config.vocab_size, name)


__all__ = [
    "CustomWord2VecForPreTraining",
    "CustomWord2VecModel",
    "CustomWord2VecPreTrainedModel",
    "check_vocabulary",
    "vocabulary_digest",
    "words_of_tokenizer",
]
