"""word2vec in the frame of the Trainer: a step is some chunks of text, whose updates change the tables as they come."""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from training.guards import NonFiniteError
from training.trainer import CustomTrainer
from training.word_pairs import Corpus, Sampler
from training.word_updates import (
    CBOW_GROUP,
    CBOW_NOISE,
    SKIP_GRAM_GROUP,
    SKIP_GRAM_NOISE,
    CbowUpdate,
    SkipGramUpdate,
    Tables,
    cbow_updates,
    skip_gram_updates,
    words_per_update,
)

# Of draws that are the same each time.
FIXED_EPOCH = 2**32 - 1
SHAPES = {"skip_gram": (SKIP_GRAM_GROUP, SKIP_GRAM_NOISE), "cbow": (CBOW_GROUP, CBOW_NOISE)}


class Chunks(Dataset):
    """Chunks of a corpus by number.

    Args:
        corpus: a text as ids.
        size: words of a chunk, about.
        held_out: share of the chunks that is left out, at the end of the text.

    Attributes:
        held_out: their numbers.
        epoch: which draws depend on.
    """

    def __init__(self, corpus: Corpus, size: int, held_out: float = 0.0):
        self.corpus = corpus
        self.ends = corpus.chunks(size)
        self.starts = np.append(0, self.ends[:-1])
        self.epoch = 0
        left_out = round(held_out * len(self.ends))
        if held_out and len(self.ends) > 1:
            left_out = max(left_out, 1)
        self.length = len(self.ends) - left_out
        self.held_out = range(self.length, len(self.ends))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, int]:
        # By the checksum a resumed run knows its text.
        return {"chunk": int(number), "checksum": zlib.crc32(self.words(number)[0].tobytes())}

    def words(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a chunk's words, and where its sentences end in them."""
        start, end = self.starts[number], self.ends[number]
        ends = self.corpus.ends
        first, last = np.searchsorted(ends, (start, end), side="right")
        return self.corpus.ids[start:end], ends[first:last] - start

    def collate(self, rows: list[dict[str, int]]) -> dict:
        """A batch: `center_ids`, all words of its chunks, by which the Trainer counts; and which chunks they are."""
        words = [self.words(row["chunk"])[0] for row in rows]
        return {
            "center_ids": torch.from_numpy(np.concatenate(words)),
            "chunks": [row["chunk"] for row in rows],
        }


class NewDrawsEachEpoch(TrainerCallback):
    """Tells the chunks which epoch it is, also in the middle of one that is resumed."""

    def __init__(self, chunks: Chunks):
        self.chunks = chunks

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.chunks.epoch = int(state.epoch)


class ChunkUpdates:
    """Draws chunks and updates tables with them.

    With one thread everything comes in its order and a run is the same each time; the next chunk is drawn by another
    thread meanwhile. With several, each draws and updates the same tables without locks (Recht et al. 2011,
    "Hogwild!"), as the C code and gensim do: faster, and no two runs are quite the same.

    Args:
        config: of the model.
        counts: (V,) how often each word stands in the text, without the unknown one.
        learning_rate: the highest.
    """

    def __init__(self, config, chunks: Chunks, counts: np.ndarray, seed: int, learning_rate: float, threads: int = 1):
        self.config, self.chunks, self.threads = config, chunks, threads
        group_size, num_shared = SHAPES[config.objective]
        self.sampler = Sampler.of(config, counts, num_shared, group_size, seed)
        self.num_words = words_per_update(config, counts, group_size, learning_rate)
        self.pool: ThreadPoolExecutor | None = None

    def updates(self, epoch: int, chunk: int) -> list[SkipGramUpdate] | list[CbowUpdate]:
        """The updates of a chunk."""
        config = self.config
        draw = self.sampler.draw(*self.chunks.words(chunk), epoch, chunk)
        if not len(draw.words):
            return []
        fixed = (draw, config.window_size, config.num_negatives, config.unk_token_id)
        if config.objective == "cbow":
            return list(cbow_updates(*fixed, config.whole_cbow_error, self.num_words))
        whole, groups = skip_gram_updates(*fixed), self.num_words // draw.group_size
        return [whole[start : start + groups] for start in range(0, len(draw.noise), groups)]

    def _apply(self, updates: list, tables: Tables, learning_rate: float) -> tuple[float, int]:
        """Update the tables; loss and number of examples of the first update."""
        loss, count = 0.0, 0
        for index, update in enumerate(updates):
            found = update.apply(tables, learning_rate, with_loss=index == 0)
            if found is not None:
                loss, count = float(found), update.num_examples
        return loss, count

    def run(self, tables: Tables, epoch: int, chunks: list[int], learning_rate: float) -> float:
        """Update the tables with chunks; an estimate of the loss of a pair (skip-gram) or word (CBOW)."""
        results = self._run_threads if self.threads > 1 else self._run_in_order
        losses, counts = zip(*results(tables, epoch, chunks, learning_rate), strict=True)
        return sum(losses) / max(sum(counts), 1)

    def _run_in_order(self, tables, epoch, chunks, learning_rate) -> Iterator[tuple[float, int]]:
        if self.pool is None:
            self.pool = ThreadPoolExecutor(1, thread_name_prefix="draw")
        job = self.pool.submit(self.updates, epoch, chunks[0])
        for following in (*chunks[1:], None):
            updates = job.result()
            if following is not None:
                job = self.pool.submit(self.updates, epoch, following)
            yield self._apply(updates, tables, learning_rate)

    def _run_threads(self, tables, epoch, chunks, learning_rate) -> Iterator[tuple[float, int]]:
        # A core each; torch's own threads beneath them would only wait for each other.
        own, _ = torch.get_num_threads(), torch.set_num_threads(1)
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="update")
        try:
            yield from self.pool.map(
                lambda chunk: self._apply(self.updates(epoch, chunk), tables, learning_rate), chunks
            )
        finally:
            torch.set_num_threads(own)

    def loss(self, tables: Tables, chunks: list[int], epoch: int = FIXED_EPOCH, most: int | None = None) -> float:
        """Mean loss of a pair (skip-gram) or word (CBOW) of chunks, of the first `most` updates of each. The tables
        stay as they are."""
        total, count = 0.0, 0
        for chunk in chunks:
            for update in self.updates(epoch, chunk)[:most]:
                # A step of length 0.
                total += float(update.apply(tables, 0.0, with_loss=True))
                count += update.num_examples
        return total / max(count, 1)

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None


class _InPlace(torch.optim.Optimizer):
    """Holds the learning rate for the schedule; the tables have changed before its step."""

    def __init__(self, parameters, learning_rate: float):
        super().__init__(parameters, {"lr": learning_rate})

    def step(self, closure=None):
        return None


class Word2VecTrainer(CustomTrainer):
    """Trainer whose step draws and applies the updates of its chunks.

    Args:
        counts: (V,) how often each word stands in the text.
        update_threads: see `ChunkUpdates`.

    Raises:
        ValueError: for settings that gradients are needed for, or several processes.
    """

    def __init__(self, model, args, chunks: Chunks, counts: np.ndarray, update_threads: int = 1, **kwargs):
        _check_settings(args)
        callbacks = [*kwargs.pop("callbacks", ()), NewDrawsEachEpoch(chunks)]
        super().__init__(model, args, train_dataset=chunks, data_collator=chunks.collate, callbacks=callbacks, **kwargs)
        self.updates = ChunkUpdates(model.config, chunks, counts, args.seed, args.learning_rate, update_threads)

    @property
    def tables(self) -> Tables:
        model = self.accelerator.unwrap_model(self.model)
        return Tables(model.word2vec.embeddings.weight.data, model.output_embeddings.weight.data)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = _InPlace(self.model.parameters(), self.args.learning_rate)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self._start_clock()
        loss = self.updates.run(self.tables, self.train_dataset.epoch, inputs["chunks"], self._get_learning_rate())
        if not np.isfinite(loss):
            raise NonFiniteError(
                f"the loss of step {self.state.global_step + 1} is {loss}: its updates were too long. Start again with "
                "a lower --learning_rate, or go on from the last checkpoint with --resume."
            )
        return torch.tensor(loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """What a step's loss would be now; the guards ask for it."""
        loss = torch.tensor(self.updates.loss(self.tables, inputs["chunks"], self.train_dataset.epoch, most=1))
        return (loss, {}) if return_outputs else loss

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.updates.close()


def _check_settings(args) -> None:
    """Refuse what the updates, which have no gradients, leave undone."""
    if args.world_size > 1:
        raise ValueError(
            "word2vec trains in one process, whose threads share its tables. Start it without a launcher and pass "
            "--update_threads."
        )
    if args.device.type != "cpu":
        raise ValueError("word2vec trains on a processor. Leave out --use_cpu false.")
    for name, allowed in (("gradient_accumulation_steps", 1), ("weight_decay", 0.0), ("bf16", False), ("fp16", False)):
        if getattr(args, name) != allowed:
            raise ValueError(
                f"--{name} is {getattr(args, name)} but word2vec's updates have no use for it. Leave it out."
            )


__all__ = ["ChunkUpdates", "Chunks", "NewDrawsEachEpoch", "Word2VecTrainer"]
