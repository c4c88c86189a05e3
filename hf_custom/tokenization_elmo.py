"""Words as ELMo reads them: one token a word, by the ids of its bytes or by its number in a vocabulary."""

import os
import re
from pathlib import Path

import torch
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import PaddingStrategy

from .configuration_elmo import TEXT_BEGINS, TEXT_ENDS, WORD_BEGINS, WORD_ENDS, WORD_IS_OVER

VOCABULARY_FILE = "vocab.txt"
WORD_OR_SIGN = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


def read_vocabulary(file: str | os.PathLike) -> list[str]:
    """The words of a file, one a line, in UTF-8.

    Raises:
        ValueError: for a line without a word and a word that stands there twice.
    """
    # By line ends alone: other separators may be words of a published vocabulary.
    words = Path(file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    lines = {}
    for number, word in enumerate(words, start=1):
        if not word.strip():
            raise ValueError(f"line {number} of {file} has no word. Give a word in each line.")
        if word in lines:
            raise ValueError(f"{file} has the word {word!r} in lines {lines[word]} and {number}. Remove one of them.")
        lines[word] = number
    return words


class CustomElmoTokenizer(PreTrainedTokenizer):
    """Splits a text at blanks and gives each word its characters or its number, between the signs of begin and end.

    Args:
        vocab_file: a word a line. Characters need none; what language models predict is numbered by it.
        input_type: what `input_ids` holds: `characters`, (T, C) for T words, so that no word is unknown; or `words`,
            (T), with `unk_token` for a word that is not in the vocabulary.
        max_characters_per_token: C, of which two are the signs of a word's begin and end; what is longer is cut.
        split_punctuation: make words of signs that stand at the end of others. Published models read text in which
            they stand apart already.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | None = None,
        input_type: str = "characters",
        max_characters_per_token: int = 50,
        split_punctuation: bool = False,
        bos_token: str = "<S>",
        eos_token: str = "</S>",
        unk_token: str = "<UNK>",
        pad_token: str = "<PAD>",
        **kwargs,
    ):
        if input_type not in ("characters", "words"):
            raise ValueError(f"`input_type` is {input_type!r} but must be 'characters' or 'words'.")
        specials = [str(token) for token in (pad_token, unk_token, bos_token, eos_token) if token is not None]
        words = list(dict.fromkeys(specials)) if vocab_file is None else read_vocabulary(vocab_file)
        self.words = words
        self.numbers = {word: number for number, word in enumerate(words)}
        self.input_type = input_type
        self.max_characters_per_token = max_characters_per_token
        self.split_punctuation = split_punctuation
        super().__init__(
            input_type=input_type,
            max_characters_per_token=max_characters_per_token,
            split_punctuation=split_punctuation,
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {**self.numbers, **self.added_tokens_encoder}

    def tokenize(self, text: str, **kwargs) -> list[str]:
        return WORD_OR_SIGN.findall(text) if self.split_punctuation else text.split()

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.numbers.get(token, self.numbers.get(str(self.unk_token)))

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return sum(token is not None for token in (self.bos_token, self.eos_token))

    def characters_of(self, word: str) -> list[int]:
        """Ids (C,) of a word's bytes between the signs of its begin and end; those of a text are one sign each."""
        size = self.max_characters_per_token
        signs = {self.bos_token: [TEXT_BEGINS], self.eos_token: [TEXT_ENDS]}
        content = signs.get(word) or [1 + byte for byte in word.encode("utf-8", "ignore")[: size - 2]]
        ids = [WORD_BEGINS, *content, WORD_ENDS]
        return ids + [WORD_IS_OVER] * (size - len(ids))

    def encode_words(self, words: list[str]) -> list:
        """What the model reads of some words."""
        if self.input_type == "characters":
            return [self.characters_of(word) for word in words]
        return self.convert_tokens_to_ids(words)

    def _encode_plus(
        self,
        text,
        text_pair=None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=None,
        max_length: int | None = None,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors=None,
        return_special_tokens_mask: bool = False,
        **kwargs,
    ) -> BatchEncoding:
        if text_pair is not None:
            raise ValueError("ELMo reads one text at a time, but `text_pair` was passed. Join the two, or encode each.")
        is_batch = not isinstance(text, str) and (not is_split_into_words or not text or not isinstance(text[0], str))
        rows, ends = [], [token for token in (self.bos_token, self.eos_token) if token is not None]
        for item in text if is_batch else [text]:
            words = self.tokenize(item) if isinstance(item, str) else list(item)
            if truncation_strategy is not None and truncation_strategy.value != "do_not_truncate":
                words = words[: max_length - (len(ends) if add_special_tokens else 0)]
            if add_special_tokens:
                words = [*ends[:1], *words, *ends[1:]]
            rows.append(self.encode_words(words))
        encoded = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if return_special_tokens_mask:
            count = len(ends) if add_special_tokens else 0
            marks = ([1] * min(count, 1), [1] * max(count - 1, 0))
            encoded["special_tokens_mask"] = [[*marks[0], *[0] * (len(row) - count), *marks[1]] for row in rows]
        if padding_strategy != PaddingStrategy.DO_NOT_PAD:
            encoded = self.pad(encoded, padding_strategy.value, max_length, pad_to_multiple_of, padding_side)
        if not is_batch and return_tensors is None:
            encoded = {name: value[0] for name, value in encoded.items()}
        return BatchEncoding(dict(encoded), tensor_type=return_tensors)

    def pad(
        self,
        encoded_inputs,
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors=None,
        verbose: bool = True,
    ) -> BatchEncoding:
        if self.input_type == "words":
            return super().pad(
                encoded_inputs,
                padding,
                max_length,
                pad_to_multiple_of,
                padding_side,
                return_attention_mask,
                return_tensors,
                verbose,
            )
        if not isinstance(encoded_inputs, dict | BatchEncoding):
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        rows = encoded_inputs["input_ids"]
        length = max(map(len, rows))
        if padding in ("max_length", PaddingStrategy.MAX_LENGTH) and max_length is not None:
            length = max(length, max_length)
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        is_left = (padding_side or self.padding_side) == "left"

        def fill(lists, *size, value=0):
            filled = torch.full((len(rows), length, *size), value)
            for index, row in enumerate(lists):
                filled[index, length - len(row) if is_left else 0 :][: len(row)] = torch.as_tensor(row)
            return filled

        padded = dict(encoded_inputs)
        padded["input_ids"] = fill(rows, self.max_characters_per_token)
        padded["attention_mask"] = fill(padded.get("attention_mask", [[1] * len(row) for row in rows]))
        if "special_tokens_mask" in padded:
            padded["special_tokens_mask"] = fill(padded["special_tokens_mask"], value=1)
        if str(return_tensors) not in ("pt", "TensorType.PYTORCH"):
            padded = {name: item.tolist() if isinstance(item, torch.Tensor) else item for name, item in padded.items()}
        return BatchEncoding(padded, tensor_type=return_tensors)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = VOCABULARY_FILE if filename_prefix is None else f"{filename_prefix}-{VOCABULARY_FILE}"
        file = Path(save_directory, name)
        file.write_text("".join(f"{word}\n" for word in self.words), encoding="utf-8")
        return (str(file),)


__all__ = ["CustomElmoTokenizer", "read_vocabulary"]
