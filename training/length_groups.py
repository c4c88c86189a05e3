"""Batches of rows of similar length in an order that the seed and the epoch alone decide."""

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroups(LengthGroupedSampler):
    """The host's groups, drawn anew for each epoch from a generator of their own.

    The host draws from the global one, so that the order depends on what the model drew before, as dropout does: two
    models would not see the same batches.

    Args:
        batch_size: rows of a batch, over all accumulated micro-batches.
        lengths: of the rows.
        seed: of the run.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, also one that is resumed."""
        self.epoch = epoch

    def __iter__(self):
        # An odd factor, so that neighbouring seeds share no epoch.
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()
