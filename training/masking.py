"""Masks for a masked language model (Devlin et al. 2019, section 3.1), new in each epoch and yet the same in each run.

A mask is a pure function of seed, epoch and row number. So neither the number of processes and workers nor a resumed
run changes any of them.
"""

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

# Of the chosen tokens, the share that becomes the mask token and the share that becomes another token.
SHARE_MASKED = 0.8
SHARE_RANDOM = 0.1
IGNORED = -100


def random_numbers(seed: int, *keys: int) -> np.random.Generator:
    """The stream of random numbers that belongs to `keys`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *keys))))


def choose_tokens(
    maskable: np.ndarray, continues: np.ndarray | None, probability: float, generator: np.random.Generator
) -> np.ndarray:
    """Positions to predict, in order: the share `probability` of the maskable ones, rounded at random, at least one.

    Args:
        maskable: (T,), whether a token may be chosen.
        continues: (T,), whether a token goes on with the word before it, so that both are chosen or neither;
            `None` chooses each token by itself.
    """
    positions = np.flatnonzero(maskable)
    count = max(1, int(probability * len(positions) + generator.random()))
    if continues is None:
        return np.sort(generator.permutation(positions)[:count])
    # A piece behind a special token starts a word: its own beginning is not in this row.
    starts = ~continues[positions] | (np.diff(positions, prepend=-2) > 1)
    words = np.split(positions, np.flatnonzero(starts)[1:])
    chosen = []
    for word in generator.permutation(len(words)):
        # A word too long for what is left is passed over, lest more than the share be chosen.
        if not chosen or len(chosen) + len(words[word]) <= count:
            chosen.extend(words[word])
    return np.sort(np.array(chosen))


class Masker:
    """Masks rows of ids as the tokenizer's special tokens and words ask for.

    Args:
        whole_words: choose all pieces of a word or none (WordPiece only).

    Raises:
        ValueError: when the tokenizer lacks a token that is needed or tells no words apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, whole_words: bool):
        for name in ("mask", "cls", "sep", "pad"):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise ValueError(
                    f"the tokenizer has no `{name}_token`, which masked language modelling needs. "
                    "Use a checkpoint such as BERT, or leave the tokenizer out to have one trained."
                )
        if not 0 < probability < 1:
            raise ValueError(f"--mlm_probability is {probability} but a share lies between 0 and 1.")
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.probability = probability
        self.mask_id = tokenizer.mask_token_id
        self.special = np.zeros(len(tokenizer), dtype=bool)
        self.special[tokenizer.all_special_ids] = True
        self.ordinary = np.flatnonzero(~self.special)
        self.continues = np.array([piece.startswith("##") for piece in pieces]) if whole_words else None
        if whole_words and not self.continues.any():
            raise ValueError("--whole_word_masking needs a WordPiece tokenizer, whose pieces within words start in ##.")

    def __call__(self, ids: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Masked ids and labels, (T,) each. `ids` must hold a token that is not special."""
        continues = None if self.continues is None else self.continues[ids]
        chosen = choose_tokens(~self.special[ids], continues, self.probability, generator)
        masked, labels = ids.copy(), np.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        fate = generator.random(len(chosen))
        others = generator.choice(self.ordinary, len(chosen))
        masked[chosen] = np.where(
            fate < SHARE_MASKED, self.mask_id, np.where(fate < SHARE_MASKED + SHARE_RANDOM, others, ids[chosen])
        )
        return masked, labels


class MaskedRows(torch.utils.data.Dataset):
    """Rows of `input_ids`, masked as they are read, with `labels`.

    Args:
        rows: with `input_ids` and whatever else the model takes.
        fixed: the same masks in each epoch, to compare one evaluation with the next.
    """

    def __init__(self, rows: Dataset, masker: Masker, seed: int, fixed: bool = False):
        self.rows = rows.with_format("numpy")
        self.masker = masker
        self.seed = seed
        # In shared memory, since a worker that lives on has its own copy of everything else.
        self.epoch = torch.full((), -1 if fixed else 0).share_memory_()

    # Not named `set_epoch`, which the host's data loader calls in some setups only (not where it skips batches or
    # shards them), and for evaluation too.
    def start_epoch(self, epoch: int) -> None:
        """Draw new masks."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[int(index)]
        generator = random_numbers(self.seed, self.epoch.item() + 1, int(index))
        input_ids, labels = self.masker(row["input_ids"].astype(np.int64), generator)
        row = {name: value.tolist() for name, value in row.items()}
        return {**row, "input_ids": input_ids.tolist(), "labels": labels.tolist()}


class NewMasksEachEpoch(TrainerCallback):
    """Tells the rows which epoch it is, also in the middle of one that is resumed."""

    def __init__(self, rows: MaskedRows):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.start_epoch(int(state.epoch))
