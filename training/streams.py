"""Where in a stream a run stands, so that one that is resumed stands there again."""

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState


class StreamPosition(TrainerCallback, ExportableState):
    """Counts the passes over a data set without a length, and keeps with each checkpoint in which pass it was made.

    The host takes such a data set for one epoch of `max_steps` steps. A run that is resumed after the stream has ended
    once looks for all its steps in the first pass, finds too few, and goes on from the beginning of the second one,
    wherever it stood.

    Args:
        number: of the pass, from 0.
        begun_at: updates that were made before it.
    """

    def __init__(self, number: int = -1, begun_at: int = 0):
        self.number, self.begun_at = number, begun_at
        self._goes_on = False

    def state(self) -> dict:
        return {"args": {"number": self.number, "begun_at": self.begun_at}, "attributes": {}}

    def on_epoch_begin(self, args, state, control, **kwargs):
        if not self._goes_on:
            self.number, self.begun_at = self.number + 1, state.global_step
        self._goes_on = False

    def resume(self, state: TrainerState, accumulation: int, host_s: tuple[int, int]) -> tuple[int, int]:
        """The pass in which a run begins, and the batches of it that were trained on.

        Args:
            state: of the checkpoint, or a fresh one.
            accumulation: batches of an update.
            host_s: what the host makes of it; also the result for a checkpoint that says nothing.
        """
        name = type(self).__name__
        stored = state.stateful_callbacks.get(name) if state.global_step else None
        stored = stored[0] if isinstance(stored, list) else stored
        known = stored["args"] if stored else {"number": -1, "begun_at": 0}
        self.number, self.begun_at, self._goes_on = int(known["number"]), int(known["begun_at"]), bool(stored)
        # The host expects to find what it updates with every checkpoint.
        state.stateful_callbacks[name] = self.state()
        return (self.number, (state.global_step - self.begun_at) * accumulation) if stored else host_s
