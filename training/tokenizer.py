"""Train a tokenizer with the `tokenizers` library and save it as a class that stock Transformers knows.

python -m training.tokenizer --output_dir runs/tokenizer --vocab_size 4096 --files my_text.txt
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from training.data import load_text

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


TRAINERS = {"bpe": train_byte_level_bpe, "wordpiece": train_wordpiece}
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to save the tokenizer in")
    parser.add_argument("--kind", choices=list(TRAINERS), default="bpe", help="byte-level BPE or WordPiece")
    parser.add_argument("--vocab_size", type=int, default=4096, help="entries of the vocabulary")
    parser.add_argument("--files", nargs="+", help="text files or folders; the embedded corpus when not given")
    parser.add_argument("--dataset_name", help="a data set of the Hub instead of files")
    parser.add_argument("--text_column", default="text", help="column that holds the text")
    args = parser.parse_args(argv)
    try:
        rows = load_text(dataset_name=args.dataset_name, files=args.files, column=args.text_column)["train"]
        texts = (row[args.text_column] for row in rows)
        tokenizer = train_tokenizer(texts, args.kind, args.vocab_size)
    except ValueError as error:
        sys.exit(f"error: {error}")
    tokenizer.save_pretrained(args.output_dir)
    print(f"{len(tokenizer)} entries in {Path(args.output_dir)}")


if __name__ == "__main__":
    main()
