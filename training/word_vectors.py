"""Word vectors in the two formats of the word2vec C code, which gensim and others read and write.

  python -m training.word_vectors export runs/word2vec vectors.bin --binary
  python -m training.word_vectors import vectors.bin runs/imported --binary

Both begin with a line of the number of words and the length of a vector. Text then has a word and its numbers a line;
binary a word, a space and its numbers as float32 in the order of the machine, with or without a line break after them.
Text is written with as many digits as bring each float32 back.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_custom.configuration_word2vec import CustomWord2VecConfig
from hf_custom.loading import load_model
from hf_custom.modeling_word2vec import (
    CustomWord2VecModel,
    check_vocabulary,
    vocabulary_digest,
    words_of_tokenizer,
)
from training.word_pairs import SPLITS, UNKNOWN, make_tokenizer

# Longer, and what is read as a word is no word: the file is cut or of another format.
LONGEST_WORD = 10_000
HEADER = "the number of words and the length of a vector"


class BrokenVectors(ValueError):
    """A file of word vectors that cannot be read."""


def write_vectors(file: str | Path, words: list[str], vectors: np.ndarray, binary: bool = False) -> None:
    """Write words and their vectors (V, D).

    Raises:
        ValueError: for a word that the format cannot hold. Nothing is written then.
    """
    for number, word in enumerate(words, 1):
        if not word or any(sign.isspace() for sign in word):
            raise ValueError(
                f"word {number} is {word!r}, but the word2vec formats part words at white space. Leave such words out."
            )
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    with open(file, "wb") as stream:
        stream.write(f"{len(vectors)} {vectors.shape[1]}\n".encode())
        for word, vector in zip(words, vectors, strict=True):
            if binary:
                stream.write(word.encode() + b" " + vector.tobytes() + b"\n")
            else:
                stream.write(f"{word} {' '.join(map(str, vector))}\n".encode())


def read_vectors(file: str | Path, binary: bool = False) -> tuple[list[str], np.ndarray]:
    """Words and vectors (V, D), float32.

    Raises:
        BrokenVectors: naming the line, or of a binary file the word, that is wrong.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. Check the path.")
    with open(file, "rb") as stream:
        count, length = _read_header(stream.readline(LONGEST_WORD), file)
        _check_size(file, count, length, binary)
        rows = _binary_rows(stream, file, count, length) if binary else _text_rows(stream, file, length)
        vectors, places = np.empty((count, length), dtype=np.float32), {}
        place = "word" if binary else "line"
        for number, (word, vector) in enumerate(rows):
            where = f"{file}, {place} {number + 1 if binary else number + 2}"
            if number == count:
                raise BrokenVectors(f"{where}: a word more than the {count} of the first line. Correct the first line.")
            if word in places:
                raise BrokenVectors(f"{where}: {word!r} stands there again. Leave one of the two out.")
            if not np.isfinite(vector).all():
                raise BrokenVectors(f"{where}: a number of {word!r} is not finite. Make the file again.")
            places[word] = number
            vectors[number] = vector
    if len(places) < count:
        raise BrokenVectors(f"{file} ends after {len(places)} of {count} words. Fetch or write it again.")
    return list(places), vectors


def _read_header(line: bytes, file: Path) -> tuple[int, int]:
    fields = line.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields) and all(int(field) > 0 for field in fields):
        return int(fields[0]), int(fields[1])
    begin = line[:40].decode("utf-8", "replace").strip()
    raise BrokenVectors(
        f"{file}, line 1: {begin!r} is not {HEADER}. Write the two numbers there, as for vectors of GloVe, or name a "
        "file of the word2vec format."
    )


def _check_size(file: Path, count: int, length: int, binary: bool) -> None:
    """Refuse a header that promises more than the file can hold, before memory is taken for it."""
    fewest = count * (length * 4 + 2) if binary else count * (length * 2 + 1)
    if file.stat().st_size < fewest:
        raise BrokenVectors(
            f"{file} has {file.stat().st_size:,} bytes, too few for {count:,} vectors of {length} numbers as line 1 "
            f"says{'' if binary else ', of text'}. Fetch or write it again"
            + (", or leave out --binary." if binary else ", or pass --binary.")
        )


def _text_rows(stream, file: Path, length: int) -> Iterator[tuple[str, np.ndarray]]:
    for number, line in enumerate(stream, 2):
        word, *fields = line.rstrip(b"\r\n").rstrip(b" ").split(b" ")
        word = _decode(word, f"{file}, line {number}")
        if len(fields) != length:
            raise BrokenVectors(
                f"{file}, line {number}: {len(fields)} numbers after {word[:40]!r} where line 1 says {length}. "
                "Correct the line, or pass --binary for a binary file."
            )
        try:
            yield word, np.array(fields, dtype=np.float32)
        except ValueError:
            raise BrokenVectors(f"{file}, line {number}: what follows {word[:40]!r} are not all numbers.") from None


def _binary_rows(stream, file: Path, count: int, length: int) -> Iterator[tuple[str, np.ndarray]]:
    size = 4 * length
    for number in range(1, count + 1):
        where, word = f"{file}, word {number}", bytearray()
        while (sign := stream.read(1)) != b" ":
            if not sign:
                raise BrokenVectors(f"{where}: the file ends there, after {number - 1} of {count} words.")
            # Some writers end a vector with a line break and some do not.
            if sign != b"\n" or word:
                word += sign
            if len(word) > LONGEST_WORD:
                raise BrokenVectors(f"{where}: no word ends there. Leave out --binary for a file of text.")
        content = stream.read(size)
        if len(content) < size:
            raise BrokenVectors(f"{where}: the file ends within its vector, after {number - 1} of {count} words.")
        yield _decode(bytes(word), where), np.frombuffer(content, dtype=np.float32)


def _decode(word: bytes, where: str) -> str:
    try:
        text = word.decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenVectors(f"{where}: {word[:40]!r} is not UTF-8. Save the file as UTF-8.") from None
    if not text:
        raise BrokenVectors(f"{where}: the word is empty.")
    return text


def export_vectors(
    model: CustomWord2VecModel, tokenizer: PreTrainedTokenizerBase, file: str | Path, binary: bool = False
) -> int:
    """Write the input vectors of a model, the most frequent word first, without the unknown word; how many."""
    model = getattr(model, "word2vec", model)
    words = words_of_tokenizer(tokenizer)
    check_vocabulary(words, model.config, "the tokenizer")
    known = [index for index in range(len(words)) if index != model.config.unk_token_id]
    vectors = model.embeddings.weight.detach().float()[known].numpy()
    write_vectors(file, [words[index] for index in known], vectors, binary)
    return len(known)


def import_vectors(
    file: str | Path, binary: bool = False, split: str = "whitespace", lower_case: bool = False
) -> tuple[CustomWord2VecModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer of a file of word vectors. Its vector of `<unk>`, where it has one, is not read: that
    of unknown words is zero here.

    Args:
        split, lower_case: how the tokenizer cuts text into words; see `make_tokenizer`.
    """
    words, vectors = read_vectors(file, binary)
    if UNKNOWN in words:
        vectors = np.delete(vectors, words.index(UNKNOWN), axis=0)
        words.remove(UNKNOWN)
    tokenizer = make_tokenizer(words, split, lower_case)
    config = CustomWord2VecConfig(
        vocab_size=len(words) + 1,
        hidden_size=vectors.shape[1],
        vocabulary_sha256=vocabulary_digest([*words, UNKNOWN]),
    )
    model = CustomWord2VecModel(config)
    with torch.no_grad():
        model.embeddings.weight[:-1] = torch.from_numpy(vectors)
    return model.eval(), tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the vectors of a model")
    export.add_argument("model", help="folder of a word2vec model and its tokenizer")
    export.add_argument("file", help="where to write")
    read = commands.add_parser("import", help="make a model of vectors")
    read.add_argument("file", help="vectors in the text or binary format")
    read.add_argument("folder", help="where to save model and tokenizer")
    read.add_argument("--split", choices=SPLITS, default="whitespace", help="how text is cut into words (%(default)s)")
    read.add_argument("--lower_case", action="store_true", help="the words are of lower-cased text")
    for command in (export, read):
        command.add_argument("--binary", action="store_true", help="the binary format; else text")
    args = parser.parse_args(argv)
    try:
        if args.command == "export":
            model = load_model(args.model)
            if not isinstance(getattr(model, "word2vec", model), CustomWord2VecModel):
                raise ValueError(f"{args.model} holds a {type(model).__name__}. Name a word2vec model.")
            count = export_vectors(model, AutoTokenizer.from_pretrained(args.model), args.file, args.binary)
            print(f"{count} vectors in {args.file}")
        else:
            model, tokenizer = import_vectors(args.file, args.binary, args.split, args.lower_case)
            model.save_pretrained(args.folder)
            tokenizer.save_pretrained(args.folder)
            print(f"{len(tokenizer) - 1} words in {args.folder}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
