"""word2vec configuration: the sizes of its tables, and how words and their contexts become examples."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_base import MAX_PARAMETERS, CustomConfig

# Upper bounds of sizes that the model has in itself.
LARGEST_WINDOW, MOST_NEGATIVES = 1000, 10_000
# What gensim calls our fields.
GENSIM_NAMES = {
    "vector_size": "hidden_size",
    "window": "window_size",
    "negative": "num_negatives",
    "sample": "subsample_threshold",
    "ns_exponent": "noise_exponent",
    "sg": "objective",
}


@strict
class CustomWord2VecConfig(CustomConfig):
    """Configuration of word2vec (Mikolov et al. 2013a, "Efficient Estimation of Word Representations in Vector Space";
    2013b, "Distributed Representations of Words and Phrases and their Compositionality").

    Words are numbered from the most frequent one on. One id stands for every unknown word and for padding, and its
    vector is zero.

    Args:
        vocab_size: rows of each table, that of unknown words among them.
        hidden_size: length of a vector.
        objective: `skip_gram` predicts each word around a word from it, `cbow` a word from the mean of those around it.
        window_size: most words on either side; for each word the window is drawn from 1 to this (2013a, section 3.2).
        num_negatives: noise words for each word that is predicted (2013b, equation 4).
        noise_exponent: noise words are drawn in proportion to frequency to this power (2013b, section 2.2).
        subsample_threshold: share of the text above which a word is left out at random, as the C code does it; 0 keeps
            all.
        whole_cbow_error: each word around gets the whole error of their mean, as in the C code, to which the usual
            learning rates are tuned; otherwise its derivative, which is the error over the number of words.
        initializer_range: input vectors start uniform between plus and minus this over `hidden_size`; output vectors
            start at zero.
        unk_token_id: the last id when not given.
        vocabulary_sha256: of the words in the order of their ids; a tokenizer with others is refused.
    """

    model_type = "custom_word2vec"
    choices: ClassVar = {"objective": ("skip_gram", "cbow")}
    positive: ClassVar = ("initializer_range",)
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_word2vec.CustomWord2VecConfig",
        "AutoModel": "modeling_word2vec.CustomWord2VecModel",
        "AutoModelForPreTraining": "modeling_word2vec.CustomWord2VecForPreTraining",
    }

    vocab_size: int = 71291
    hidden_size: int = 100
    objective: str = "skip_gram"
    window_size: int = 5
    num_negatives: int = 5
    noise_exponent: float | int = 0.75
    subsample_threshold: float | int = 1e-3
    whole_cbow_error: bool = True
    initializer_range: float | int = 1.0
    unk_token_id: int | None = None
    vocabulary_sha256: str | None = None

    def __post_init__(self, **kwargs):
        for name in kwargs.keys() & GENSIM_NAMES.keys():
            raise ValueError(f"CustomWord2VecConfig has no field `{name}`; it is `{GENSIM_NAMES[name]}` here.")
        super().__post_init__(**kwargs)
        if self.unk_token_id is None:
            self.unk_token_id = self.vocab_size - 1

    def validate_architecture(self):
        super().validate_architecture()
        self._check_size("window_size", self.window_size, LARGEST_WINDOW)
        self._check_size("num_negatives", self.num_negatives, MOST_NEGATIVES)
        if self.subsample_threshold < 0:
            raise ValueError(
                f"`subsample_threshold` is {self.subsample_threshold!r} but a share of the text is not negative. Use "
                "about 0.001, or 0 to keep every word."
            )
        if self.unk_token_id is not None and not 0 <= self.unk_token_id < self.vocab_size:
            raise ValueError(
                f"`unk_token_id` is {self.unk_token_id} but ids lie between 0 and {self.vocab_size - 1}. Leave it out "
                "for the last."
            )

    def _check_transformer(self):
        """There are no heads and no layers; two tables must fit a machine."""
        parameters = 2 * self.vocab_size * self.hidden_size
        if parameters > MAX_PARAMETERS:
            raise ValueError(
                f"this configuration describes {parameters:,} parameters, more than {MAX_PARAMETERS:,}. Reduce "
                "`vocab_size` or `hidden_size`."
            )


__all__ = ["CustomWord2VecConfig"]
