"""Train a tokenizer with the `tokenizers` library and save it as a class that stock Transformers knows.

python -m training.tokenizer --output_dir runs/tokenizer --vocab_size 4096 --files my_text.txt
"""

import argparse
import base64
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_custom.conversion import ENCODINGS
from hf_custom.tokenization_elmo import CustomElmoTokenizer
from training.data import load_text
from training.preflight import Quarantine

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding as of GPT-2 (Radford et al. 2019, section 2.2): no unknown token, ever."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return GPT2Tokenizer(
        tokenizer_object=tokenizer,
        unk_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
    )


def train_ended_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The same, which closes every text with the end token, as an encoder-decoder reads and writes it."""
    tokenizer = train_byte_level_bpe(texts, vocab_size)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}",
        pair=f"$A {END_OF_TEXT} $B {END_OF_TEXT}",
        special_tokens=[(END_OF_TEXT, tokenizer.eos_token_id)],
    )
    return tokenizer


def train_wordpiece(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """WordPiece on lower-cased words as of BERT (Devlin et al. 2019, section 3)."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=BERT_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(BERT_TOKENS.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The library numbers pieces in the order of a hash map, another one each time (tokenizers issue 1794).
    pieces = sorted(set(tokenizer.get_vocab()) - set(BERT_TOKENS.values()))
    vocabulary = {piece: index for index, piece in enumerate([*BERT_TOKENS.values(), *pieces])}
    tokenizer.model = models.WordPiece(vocabulary, unk_token=BERT_TOKENS["unk_token"])
    separator, classifier = (
        (BERT_TOKENS[name], tokenizer.token_to_id(BERT_TOKENS[name])) for name in ("sep_token", "cls_token")
    )
    tokenizer.post_processor = processors.BertProcessing(separator, classifier)
    return BertTokenizer(tokenizer_object=tokenizer, **BERT_TOKENS)


def train_words(texts: Iterator[str], vocab_size: int, input_type: str) -> CustomElmoTokenizer:
    """The most frequent words of a text for ELMo, which reads each by its characters or by its number."""
    tokenizer = CustomElmoTokenizer(input_type=input_type, split_punctuation=True)
    counts = Counter(word for text in texts for word in tokenizer.tokenize(text))
    for word in tokenizer.words:
        counts.pop(word, None)
    # Of words that are as frequent, the order of the alphabet says which is the last.
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    words = [*tokenizer.words, *ordered[: vocab_size - len(tokenizer.words)]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
        return CustomElmoTokenizer(str(file), input_type=input_type, split_punctuation=True)


TRAINERS = {
    "bpe": train_byte_level_bpe,
    "ended-bpe": train_ended_bpe,
    "wordpiece": train_wordpiece,
    "characters": partial(train_words, input_type="characters"),
    "words": partial(train_words, input_type="words"),
}
# The bytes, or the characters of a text, and the special tokens must have room.
SMALLEST_VOCABULARY = 300


def train_tokenizer(texts: Iterator[str], kind: str = "bpe", vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `kind` on `texts`.

    Raises:
        ValueError: for an unknown kind or a vocabulary too small for its alphabet.
    """
    if kind not in TRAINERS:
        raise ValueError(f"tokenizer kind {kind!r} is unknown. Use one of {', '.join(TRAINERS)}.")
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} is too small; use at least {SMALLEST_VOCABULARY}.")
    return TRAINERS[kind](texts, vocab_size)


def tiktoken_ranks(tokenizer: PreTrainedTokenizerFast) -> dict[bytes, int]:
    """The bytes of every token of a byte-level BPE but the special ones, and its rank: the pair that makes the token of
    lowest rank is merged first.

    Raises:
        ValueError: for a tokenizer of another kind.
    """
    bytes_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    special = tokenizer.get_added_vocab()
    vocabulary = {token: rank for token, rank in tokenizer.get_vocab().items() if token not in special}
    if not set(bytes_of) <= set(vocabulary):
        raise ValueError(
            "tiktoken merges bytes, but this tokenizer has no token for each of them. Train one of kind 'bpe'."
        )
    return {bytes(bytes_of[symbol] for symbol in token): rank for token, rank in vocabulary.items()}


def to_tiktoken(tokenizer: PreTrainedTokenizerFast, name: str = "own"):
    """The `tiktoken.Encoding` that gives the ids of a byte-level BPE trained here; text is split by GPT-2's pattern."""
    try:
        import tiktoken
    except ImportError:
        raise ImportError("tiktoken is not installed. Run `pip install tiktoken`.") from None
    pattern, special = ENCODINGS["r50k_base"].pattern, tokenizer.get_added_vocab()
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=tiktoken_ranks(tokenizer), special_tokens=special)


def write_tiktoken(tokenizer: PreTrainedTokenizerFast, file: str | Path) -> None:
    """The ranks in tiktoken's own format: a token in base64, a space and its rank, a line each."""
    ranks = sorted(tiktoken_ranks(tokenizer).items(), key=lambda item: item[1])
    Path(file).write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to save the tokenizer in")
    kinds = "byte-level BPE (ended: with the end token behind each text) or WordPiece"
    parser.add_argument("--kind", choices=list(TRAINERS), default="bpe", help=kinds)
    parser.add_argument("--vocab_size", type=int, default=4096, help="entries of the vocabulary")
    parser.add_argument("--files", nargs="+", help="text files or folders; the embedded corpus when not given")
    parser.add_argument("--dataset_name", help="a data set of the Hub instead of files")
    parser.add_argument("--text_column", default="text", help="column that holds the text")
    parser.add_argument("--quarantine", metavar="FILE", help="set bad rows aside there instead of refusing the data")
    parser.add_argument("--tiktoken", metavar="FILE", help="write its ranks for tiktoken too (byte-level BPE)")
    args = parser.parse_args(argv)
    try:
        quarantine = Quarantine(args.quarantine)
        data = {"dataset_name": args.dataset_name, "files": args.files, "column": args.text_column}
        rows = load_text(**data, quarantine=quarantine)["train"]
        tokenizer = train_tokenizer((row[args.text_column] for row in rows), args.kind, args.vocab_size)
        quarantine.finish()
        if args.tiktoken is not None:
            write_tiktoken(tokenizer, args.tiktoken)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    tokenizer.save_pretrained(args.output_dir)
    print(f"{len(tokenizer)} entries in {Path(args.output_dir)}")


if __name__ == "__main__":
    main()
