"""Pre-emption: a signal ends training after the step it falls in, with a checkpoint and an exit code that says so.

A scheduler that wants a machine back sends a signal some seconds before it kills. Stock Trainer ignores all but
SIGTERM, and that only with `enable_jit_checkpoint`: it saves, takes one more step that is lost, returns as after a
finished run (exit code 0), and hangs when two processes see the signal in different steps, since it never asks the
others. Here the handler sets a flag and nothing else; after each step the processes add their flags up, and where one
is set, all save that step and stop.

    trainer = Trainer(..., callbacks=[Preemption()])
    trainer.train(resume_from_checkpoint=...)
    exit_if_preempted(trainer)

The sum goes over a group of processes of its own that talk through processors (gloo), so a GPU is never waited for: the
processes only meet once a step, after they queued its work. Between two processes of one machine it takes about
0.1 ms.

Known limits. A launcher waits for its processes before it kills them, `torchrun` 30 seconds: step and checkpoint must
fit in. It also exits with code 1 whatever its processes said; `training/launch/torchrun.py` does neither. A signal sent
to the whole process group while an evaluation runs with data workers ends those workers, and with them the run, which
then resumes from the last checkpoint.
"""

import functools
import os
import random
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging

logger = logging.get_logger(__name__)

# EX_TEMPFAIL of sysexits.h: "temporary failure, the user is invited to retry".
PREEMPTED = 75
# Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

# Group on processors by the default group that has the same members.
_control_groups: WeakKeyDictionary = WeakKeyDictionary()


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def control_group(timeout: timedelta | None = None) -> "dist.ProcessGroup | None":
    """The group through which processors agree; `None` for one process alone.

    The first call makes it, so every process must take part in that one.
    """
    if not is_distributed():
        return None
    world = dist.group.WORLD
    if world not in _control_groups:
        _control_groups[world] = dist.new_group(backend="gloo", timeout=timeout)
    return _control_groups[world]


def sum_over_ranks(values: list[float]) -> list[float]:
    """Each of `values` added up over the processes; the same numbers on each of them. Every process must call it."""
    group = control_group()
    if group is None:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.tolist()


def is_training(frame) -> bool:
    """Whether a frame of Python was called from within the host's `train()`."""
    while frame is not None and frame.f_code is not Trainer.train.__code__:
        frame = frame.f_back
    return frame is not None


def random_state() -> dict:
    """The state of every generator that training draws from in this process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])


class Preemption(TrainerCallback):
    """Saves and stops after the step in which any process received SIGTERM, SIGINT or SIGUSR1.

    With accumulation a step ends at the optimizer's update. During evaluation and saving the signal waits. A signal
    that comes after the last step's end acts as if this callback were not there, when training is over. A second
    SIGINT ends the process at once, as usual.

    What is due at that step is done in this order: the log line, the checkpoint, then the evaluation, with the
    checkpoint written again to hold its result. Whoever kills during the evaluation takes only that: an evaluation
    draws random numbers (a data loader its seed), so it is made to leave the random state as it found it, and the run
    that goes on without it is still the same to the bit.

    Attributes:
        step: the one after which training stopped; `None` where it was not pre-empted.
        signals: those that any process received.
    """

    def __init__(self):
        self._former: dict[int, object] = {}
        self._forget()

    def _forget(self):
        self.step: int | None = None
        self.signals: list[signal.Signals] = []
        self._received: set[int] = set()
        self._is_over = False
        self._evaluation_due = False
        self._best = None
        self._random_state: dict | None = None

    @property
    def is_preempted(self) -> bool:
        return self.step is not None

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.restore()
        self._forget()
        control_group(args.ddp_timeout_delta)
        if threading.current_thread() is not threading.main_thread():
            logger.warning("Training outside the main thread: Python lets it handle no signals, so none will save it.")
            return
        self._former = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if getattr(train_dataloader, "num_workers", 0) > 0:
            # accelerate's loader hands on to the one that it wraps.
            loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
            loader.worker_init_fn = functools.partial(_shelter_worker, loader.worker_init_fn)

    def _on_signal(self, number, frame):
        if not self._is_over and not is_training(frame):
            # An error ended `train()` without its last event.
            self.restore()
            signal.raise_signal(number)
            return
        is_repeated = number in self._received
        self._received.add(number)
        if is_repeated and (number == signal.SIGINT or self._is_over):
            self.restore()
            signal.raise_signal(number)
        elif number == signal.SIGINT:
            # Of the functions that write, this one alone may be called in the middle of another.
            os.write(2, b"\nstopping after this step; press again to stop at once and lose it\n")

    def on_step_end(self, args, state, control, **kwargs):
        counts = sum_over_ranks([float(number in self._received) for number in SIGNALS])
        self.signals = [number for number, count in zip(SIGNALS, counts, strict=True) if count]
        if self.signals:
            self.step = state.global_step
            self._evaluation_due, control.should_evaluate = control.should_evaluate, False
            control.should_log = control.should_save = control.should_training_stop = True
        self._random_state = random_state() if control.should_evaluate else None

    def on_epoch_end(self, args, state, control, **kwargs):
        """The host comes here also from the middle of an epoch, and would evaluate and save as at its end."""
        if self.is_preempted:
            is_whole = float(state.epoch).is_integer()
            control.should_evaluate = self._evaluation_due or (control.should_evaluate and is_whole)
            control.should_save = control.should_evaluate
            control.should_log = False
        self._random_state = random_state() if control.should_evaluate else None

    def on_evaluate(self, args, state, control, **kwargs):
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Before its last act the host loads the best model and, with `save_total_limit` 1, deletes every other
        checkpoint: the newest too. Neither happens where it knows of no best one."""
        if self.is_preempted and "train_runtime" in (logs or {}):
            self._best, state.best_model_checkpoint = state.best_model_checkpoint, None

    def on_train_end(self, args, state, control, **kwargs):
        if self.is_preempted:
            # The handlers stay: another process's signal may reach this one late, and must not kill it on its way out.
            state.best_model_checkpoint, self._is_over = self._best, True
            return
        self.restore()
        for number in sorted(self._received):
            signal.raise_signal(number)

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._former.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former = {}

    def ignore(self) -> None:
        """Let no signal reach this process any more, which is about to exit."""
        for number in self._former:
            signal.signal(number, signal.SIG_IGN)

    def message(self, args, state) -> str:
        """What was saved where, and how to go on."""
        names = " and ".join(signal.Signals(number).name for number in self.signals)
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.step}"
        if not folder.is_dir():
            newest = get_last_checkpoint(args.output_dir)
            saved = f"no checkpoint was written for that step; the newest is {newest or 'none'}"
        elif args.save_only_model:
            saved = f"{folder} holds the model alone (--save_only_model), from which no run resumes exactly"
        else:
            saved = f"saved in {folder}"
        return (
            f"pre-empted by {names} after step {self.step} of {state.max_steps}: {saved}. "
            "Run the same command with --resume to go on."
        )


def exit_if_preempted(trainer: Trainer) -> None:
    """After `train()`: exit with code 75 on every process where a `Preemption` stopped it, else do nothing.

    The first process says on stderr what was saved where.
    """
    callbacks = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Preemption)]
    callback = next((callback for callback in callbacks if callback.is_preempted), None)
    if callback is None:
        return
    if trainer.is_world_process_zero():
        print(callback.message(trainer.args, trainer.state), file=sys.stderr, flush=True)
    # A launcher that sees the first process leave sends SIGTERM to the others, whose code would then be another.
    callback.ignore()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    sys.exit(PREEMPTED)


def _shelter_worker(inner, worker_id: int) -> None:
    """Start of a data worker: let the first signal of a kind pass, which is meant for the run; a second one acts.

    Schedulers signal every process of a job. A worker that dies of it takes the step down with it.
    """
    for number in SIGNALS:
        signal.signal(number, _let_one_pass)
    if inner is not None:
        inner(worker_id)


def _let_one_pass(number, frame):
    signal.signal(number, signal.SIG_DFL)
