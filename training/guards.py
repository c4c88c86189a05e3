"""Guards of a run: a non-finite or diverging step ends it before the update, a hanging process within a time-out.

    trainer = Trainer(...)
    attach_guards(trainer)

Loss and gradient norm are those that the Trainer computes anyway. Reading them costs one transfer from the device a
step, after the host (with its default `logging_nan_inf_filter`) has waited for the same loss, and one sum of two
numbers over the processes, which talk through processors. Measured on a processor: 0.13 ms a step for everything here
and the watch for signals together, and 0.09 ms more for each sum between two processes of a machine.

Clipping is taken over where it is plain: the host multiplies every gradient by `max_norm / norm`, so that after a norm
of NaN all of them are NaN and none is the first. The two functions of torch called here are those which
`clip_grad_norm_` consists of, with the reading between them; the numbers are the same.
"""

import faulthandler
import json
import math
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from training.preemption import control_group, is_distributed, is_training, sum_over_ranks

logger = logging.get_logger(__name__)

NONFINITE_ACTIONS = ("stop", "skip")
# EX_UNAVAILABLE of sysexits.h: a process on which this one relies does not answer.
STALLED = 69
# Kinds of training whose gradients are not whole tensors before the update, or updated already.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.XLA, DistributedType.MEGATRON_LM)


class NonFiniteError(ArithmeticError):
    """Loss or gradient of a step is infinite or not a number."""


class DivergenceError(ArithmeticError):
    """The loss has left the range in which training began."""


class LostProcessError(RuntimeError):
    """Another process of the run is gone."""


class StepMeter:
    """What a step yields before its update: loss and gradient norm, read once and the same on every process.

    It stands in for three methods of one trainer, and hands on to them.

    Attributes:
        loss: mean over the processes of the step's loss; NaN where any is.
        norm: gradient norm before clipping; NaN where any process has that.
        inputs: the last micro-batch and its number of items, for who computes its loss again.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._host_step, trainer.training_step = trainer.training_step, self._training_step
        self._host_clip, trainer._clip_grad_norm = trainer._clip_grad_norm, self._clip_grad_norm
        self._host_norm, trainer._get_grad_norm = trainer._get_grad_norm, self._get_grad_norm
        self._is_plain: bool | None = None
        self._begin()

    @classmethod
    def of(cls, trainer: Trainer) -> "StepMeter":
        """The one meter of a trainer."""
        owner = getattr(trainer.training_step, "__self__", None)
        return owner if isinstance(owner, cls) else cls(trainer)

    def _begin(self):
        self._losses: list[torch.Tensor] = []
        self._labels: list[torch.Tensor | None] = []
        self.own_losses: list[float] = []
        self.own_norm: float | None = None
        self.loss = self.norm = None
        self.inputs = None

    @property
    def has_scaler(self) -> bool:
        """Whether gradients of fp16 are scaled; infinite ones are then a matter of course, and the scaler's to skip."""
        return self.trainer.accelerator.scaler is not None

    def _training_step(self, model, inputs, num_items_in_batch=None):
        if self.loss is not None:
            self._begin()
        loss = self._host_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        self._labels.append(_labels_of(inputs, getattr(self.trainer, "_loss_shifts_labels", False)))
        self.inputs = inputs, num_items_in_batch
        return loss

    def _clip_grad_norm(self, model):
        if not self._check_plain(model):
            return self._host_clip(model)
        norm = self._total_norm(model)
        if math.isfinite(self.own_norm) or self.has_scaler:
            clip_grads_with_norm_(model.parameters(), self.trainer.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and self._check_plain(model):
            return self._total_norm(model)
        grad_norm = self._host_norm(model, grad_norm=grad_norm)
        if self.own_norm is None:
            self._read(grad_norm)
        return grad_norm

    def _check_plain(self, model) -> bool:
        """Whether clipping is the host's own, of whole gradients."""
        if self._is_plain is None:
            is_sharded = self.trainer.accelerator.distributed_type in SHARDED
            is_host_s = type(self.trainer)._clip_grad_norm is Trainer._clip_grad_norm
            has_shards = any(isinstance(p.grad, DTensor) for p in model.parameters())
            self._is_plain = is_host_s and not is_sharded and not has_shards
        return self._is_plain

    def _total_norm(self, model) -> torch.Tensor:
        self.trainer.accelerator.unscale_gradients()
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        self._read(norm)
        return norm

    def _read(self, norm) -> None:
        """Wait for the device, once, for the numbers of this process."""
        if norm is None:
            # DeepSpeed before its first update.
            norm = 0.0
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self._losses[0].device)
        *self.own_losses, self.own_norm = torch.stack([*(loss.float() for loss in self._losses), norm]).tolist()

    def agree(self) -> None:
        """Fill `loss` and `norm`. Every process must call it; a second call in a step costs nothing."""
        if self.loss is None:
            size = dist.get_world_size() if is_distributed() else 1
            total_loss, total_norm = sum_over_ranks([sum(self.own_losses), self.own_norm])
            self.loss, self.norm = total_loss / size, total_norm / size

    def reports(self, model) -> list[dict]:
        """What each process knows of a step that went wrong, in the order of ranks. Every process must call it."""
        parameters = self.trainer.accelerator.unwrap_model(model).named_parameters()
        named = (name for name, value in parameters if value.grad is not None and not _is_finite(value.grad))
        counts = [None if labels is None else (int(labels.ne(-100).sum()), labels.numel()) for labels in self._labels]
        own = {"losses": self.own_losses, "norm": self.own_norm, "labels": counts, "parameter": next(named, None)}
        if not is_distributed():
            return [own]
        reports = [None] * dist.get_world_size()
        dist.all_gather_object(reports, own, group=control_group())
        return reports


def _is_finite(gradient: torch.Tensor) -> bool:
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(torch.isfinite(local).all())


def _labels_of(inputs, is_shifted: bool) -> torch.Tensor | None:
    """The labels that count, of any shape, or `None`."""
    if not hasattr(inputs, "get"):
        return None
    labels = inputs.get("shift_labels")
    if labels is None and isinstance(labels := inputs.get("labels"), torch.Tensor) and is_shifted:
        labels = labels[..., 1:]
    return labels if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else None


def _last_checkpoint(trainer: Trainer) -> str:
    if hasattr(trainer, "finish_saving"):
        trainer.finish_saving()
    args = trainer.args
    folder = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    return f"The last checkpoint is {folder}." if folder else "There is no checkpoint yet."


class FiniteGuard(TrainerCallback):
    """Stops before the update of a step whose loss or gradient norm is not finite, or leaves that update out.

    A left out update changes neither weights nor the optimizer's state; the step counts, and the schedule goes on.
    All processes do the same. Under fp16 an infinite gradient is the scaler's matter, which leaves such updates out by
    itself; a loss that is not finite is reported. DeepSpeed updates within the backward pass, so there the error comes
    after the update, though before any checkpoint of it.

    Args:
        trainer: the one to guard; add the guard to its callbacks, or use `attach_guards`.
        action: "stop" or "skip".
        max_in_a_row: for "skip": that many left out updates without a good one between them stop the run.

    Attributes:
        skipped: updates left out so far.

    Raises:
        NonFiniteError: from `train()`, on every process.
    """

    def __init__(self, trainer: Trainer, action: str = "stop", max_in_a_row: int = 5):
        if action not in NONFINITE_ACTIONS:
            raise ValueError(f"`action` is {action!r} but must be one of {', '.join(NONFINITE_ACTIONS)}.")
        if max_in_a_row < 1:
            raise ValueError(f"`max_in_a_row` is {max_in_a_row} but must be at least 1.")
        self.meter = StepMeter.of(trainer)
        self.action, self.max_in_a_row = action, max_in_a_row
        self.skipped = self.in_a_row = 0

    def on_train_begin(self, args, state, control, **kwargs):
        control_group(args.ddp_timeout_delta)
        self.skipped = self.in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        meter = self.meter
        meter.agree()
        if math.isfinite(meter.loss) and (math.isfinite(meter.norm) or meter.has_scaler):
            self.in_a_row = 0
            return
        message = _describe(meter.reports(model), state.global_step + 1)
        self.in_a_row += 1
        if self.action == "stop":
            settle_checkpoint(meter.trainer)
            last = _last_checkpoint(meter.trainer)
            raise NonFiniteError(f"{message} The weights are as before this step. {last}")
        # An optimizer passes over a parameter without gradient, its decay and its state included.
        optimizer.zero_grad()
        self.skipped += 1
        if self.in_a_row >= self.max_in_a_row:
            settle_checkpoint(meter.trainer)
            raise NonFiniteError(
                f"{message} {self.in_a_row} updates in a row were left out, and {self.skipped} in all. "
                f"{_last_checkpoint(meter.trainer)}"
            )
        if state.is_world_process_zero:
            logger.warning(f"{message} Its update was left out; {self.skipped} so far.")


def _describe(reports: list[dict], step: int) -> str:
    """One sentence for each thing known of a step that is not finite."""
    is_one = len(reports) == 1
    parts = []
    for rank, report in enumerate(reports):
        where = "" if is_one else f" on rank {rank}"
        for index, (loss, count) in enumerate(zip(report["losses"], report["labels"], strict=True)):
            if math.isfinite(loss) and not (count and count[0] == 0):
                continue
            which = f" of micro-batch {index + 1} of {len(report['losses'])}" if len(report["losses"]) > 1 else ""
            part = f"the loss{which} is {loss:.4g}{where}"
            if count is not None:
                part += f" with {count[0]} of {count[1]} labels"
            if count and count[0] == 0:
                part += " (all are -100, so a mean over labels divides by zero: look at the rows of this batch)"
            parts.append(part)
    norms = sorted({f"{report['norm']:.4g}" for report in reports})
    losses = [f"{sum(report['losses']):.4g}" for report in reports]
    parts = parts or [f"the loss is {', '.join(losses)}"]
    name = next((report["parameter"] for report in reports if report["parameter"]), None)
    gradient = "every gradient is finite" if name is None else f"`{name}` is the first with a non-finite gradient"
    return f"step {step}: {'; '.join(parts)}; the gradient norm is {', '.join(norms)}; {gradient}."


@dataclass
class Evidence:
    """What the weights after a step are judged by: its last micro-batch, and what the losses were before the update."""

    step: int
    inputs: tuple
    own_losses: list[float]
    loss: float

    @classmethod
    def of(cls, trainer: Trainer, meter: StepMeter) -> "Evidence | None":
        """That of the last step, if there was one since the start."""
        if meter.inputs is None or meter.loss is None:
            return None
        return cls(trainer.state.global_step, meter.inputs, meter.own_losses, meter.loss)


class DivergenceGuard(TrainerCallback):
    """Stops when the loss is far above that of the first steps, and lets no checkpoint of such weights be written.

    The rule: the limit is `factor` times the largest loss among the first `first_steps` steps, or among those so far;
    at least `factor` times 1. A step above it is not counted among the first. `patience` steps above it in a row stop
    the run before their last update. A single hard batch passes; a loss that drifts up slowly is caught too, since the
    limit does not follow it. After a resume the first steps are those of this start. The loss is taken for one that is
    positive and of the order of 1, as cross-entropy; for others leave the guard out or choose `factor`.

    A bad update shows in the next step's loss, when its weights may be saved already. So a checkpoint gets its name
    only when that loss, or one soon after it, is at most the limit; until then it waits aside (`CustomTrainer` lets
    it). Where no next step comes, at the end of training or before a pre-emption, and for a trainer that cannot wait,
    the loss of the last micro-batch is computed once more with the new weights instead: where it is above the limit,
    which it was not before the update, the run stops and the former checkpoints stay. That costs one forward pass.
    While the loss itself is above the limit no checkpoint is written.

    A loss that is not finite is `FiniteGuard`'s matter in a step, and this one's before a checkpoint.

    Args:
        trainer: the one to guard; add the guard to its callbacks, or use `attach_guards`.

    Raises:
        DivergenceError: from `train()`, on every process.
    """

    def __init__(self, trainer: Trainer, factor: float = 3.0, first_steps: int = 20, patience: int = 3):
        for name, value, least in (("factor", factor, 1), ("first_steps", first_steps, 1), ("patience", patience, 1)):
            if value < least:
                raise ValueError(f"`{name}` is {value} but must be at least {least}.")
        self.trainer, self.meter = trainer, StepMeter.of(trainer)
        self.factor, self.first_steps, self.patience = factor, first_steps, patience
        self._save_checkpoint, trainer._save_checkpoint = trainer._save_checkpoint, self._save_if_sound
        self._forget()

    def _forget(self):
        self._seen = self.above = 0
        self._reference: float | None = None
        self._checked_step = -1
        # What the checkpoint that waits for the next loss can be judged by without it.
        self._waiting: Evidence | None = None

    @property
    def limit(self) -> float:
        return math.inf if self._reference is None else self.factor * max(1.0, self._reference)

    def on_train_begin(self, args, state, control, **kwargs):
        control_group(args.ddp_timeout_delta)
        self._forget()
        self._checked_step = state.global_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.meter.agree()
        loss = self.meter.loss
        if not math.isfinite(loss):
            return
        if loss <= self.limit:
            self.above = 0
            self._place()
            if self._seen < self.first_steps:
                self._seen += 1
                self._reference = max(loss, -math.inf if self._reference is None else self._reference)
            return
        self.above += 1
        if self.above >= self.patience:
            self._stop(f"step {state.global_step + 1}: the loss is {loss:.4g}", f"for {self.above} steps")

    def _place(self) -> None:
        if self._waiting is not None:
            self._waiting = None
            self.trainer.place_checkpoint()

    def _stop(self, what: str, since: str):
        if self._waiting is not None:
            self._waiting = None
            self.trainer.drop_checkpoint()
        raise DivergenceError(
            f"{what}, {since} above {self.limit:.4g}, which is {self.factor:g} times that of the first steps. "
            f"{_last_checkpoint(self.trainer)} Go on from it with a smaller learning rate, or a longer warm-up."
        )

    def _save_if_sound(self, *args, **kwargs):
        # After a loss that is not finite nothing can be said of the weights either.
        if self.above or not math.isfinite(self.meter.loss or 0.0):
            if self.trainer.is_world_process_zero():
                logger.warning(
                    f"no checkpoint at step {self.trainer.state.global_step}: the loss {self.meter.loss:.4g} "
                    f"is above {self.limit:.4g}."
                )
            return None
        can_wait, evidence = hasattr(self.trainer, "place_checkpoint"), Evidence.of(self.trainer, self.meter)
        is_last = self.trainer.control.should_training_stop
        if is_last or not can_wait:
            self.check_update()
        self._save_checkpoint(*args, **kwargs)
        if can_wait and (is_last or evidence is None):
            self.trainer.place_checkpoint()
        elif can_wait:
            self._waiting = evidence

    def settle(self) -> None:
        """Judge the checkpoint that waits, if one does, without the loss of a next step. Every process must call it."""
        if self._waiting is not None:
            self._judge(self._waiting)
            self._place()

    def on_train_end(self, args, state, control, **kwargs):
        self.settle()
        # Nothing to compare with where the host has put the best model in the place of the last.
        if not self.above and not (args.load_best_model_at_end and state.best_model_checkpoint):
            self.check_update()

    def check_update(self) -> None:
        """Refuse weights under which the last micro-batch has a loss above the limit, unlike before the update."""
        evidence = Evidence.of(self.trainer, self.meter)
        if evidence is not None and evidence.step != self._checked_step:
            self._judge(evidence)

    def _judge(self, evidence: "Evidence") -> None:
        self._checked_step = evidence.step
        before, size = evidence.own_losses[-1], dist.get_world_size() if is_distributed() else 1
        after = self._loss_again(*evidence.inputs)
        # The step's loss, had every micro-batch fared as the last. One without labels says nothing.
        share = after / before if before > 0 else 1.0 + 0.0 * after
        projected = sum_over_ranks([sum(evidence.own_losses) * share])[0] / size
        if math.isfinite(evidence.loss) and not projected <= self.limit:
            self._stop(
                f"step {evidence.step}: its update took the loss from {evidence.loss:.4g} to {projected:.4g}",
                "which is",
            )

    def _loss_again(self, inputs, num_items) -> float:
        """Loss of a micro-batch, scaled as in training; nothing is left changed by it."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        was_training, device = model.training, trainer.args.device
        model.eval()
        # A loss may draw random numbers.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            inputs = trainer._prepare_inputs(inputs)
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=num_items).mean()
        model.train(was_training)
        # As the host does: a loss that was given the number of items is the micro-batch's share already.
        knows_items = trainer.model_accepts_loss_kwargs and num_items is not None
        is_share = knows_items or trainer.compute_loss_func is not None
        return loss.item() if is_share else loss.item() / trainer.current_gradient_accumulation_steps


def settle_checkpoint(trainer: Trainer) -> None:
    """Have the checkpoint that waits for the next step's loss judged now. Every process must call it.

    Raises:
        DivergenceError: when its weights are not sound.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, DivergenceGuard):
            callback.settle()


def is_in_doubt(trainer: Trainer) -> bool:
    """Whether the last losses were above the limit, so that the checkpoint that waits may be of diverged weights."""
    return any(
        callback.above for callback in trainer.callback_handler.callbacks if isinstance(callback, DivergenceGuard)
    )


def attach_guards(
    trainer: Trainer, nonfinite: str = "stop", max_in_a_row: int = 5, divergence_factor: float | None = 3.0
) -> None:
    """Give a trainer, stock or not, both guards and, where it is one process of several, the watch for a hanging one.

    Args:
        nonfinite: what to do with a step that is not finite, "stop" or "skip".
        max_in_a_row: steps left out in a row that stop a run which skips.
        divergence_factor: how far above the first steps' loss is divergence; `None` for no such guard.
    """
    trainer.add_callback(FiniteGuard(trainer, nonfinite, max_in_a_row))
    if divergence_factor is not None:
        trainer.add_callback(DivergenceGuard(trainer, divergence_factor))
    trainer.add_callback(StallWatch())


def apply_timeout(args: TrainingArguments) -> None:
    """Make `--ddp_timeout` hold on every device type.

    `TrainingArguments._setup_devices` hands the time-out to accelerate for GPUs and DeepSpeed and leaves it out on the
    branch of `use_cpu`, where processes then wait for torch's default of 30 minutes. Call it when the arguments are
    made: their `__post_init__` sets the devices up.
    """
    if args.ddp_timeout < 1:
        raise ValueError(f"--ddp_timeout is {args.ddp_timeout} but must be at least 1 second.")
    # Reading the device makes the group, if nothing did before.
    if args.device is not None and is_distributed():
        # torch has no public name for it; the group exists before anybody could pass another time-out.
        dist.distributed_c10d._set_pg_timeout(args.ddp_timeout_delta, dist.group.WORLD)


@dataclass
class _Beat:
    """What a process publishes of itself."""

    tick: int
    step: int
    silent: float
    waits: bool
    where: str
    is_done: bool


# Where a process stands that waits for others: (end of the file's folder or name, functions or all).
WAITING_PLACES = (
    ("torch/distributed/", None),
    ("torch/nn/parallel/distributed.py", None),
    # The exchange of gradients runs inside the backward pass.
    ("torch/autograd/graph.py", ("_engine_run_backward",)),
    # The first numbers that the host reads from a device whose queue holds an exchange.
    ("transformers/trainer.py", ("_run_epoch", "_maybe_log_save_evaluate")),
    ("training/guards.py", ("_read",)),
)


class StallWatch(TrainerCallback):
    """Ends every process when one hangs or is gone, and names it and the line where it stands.

    A hanging process shows in the others as a wait without end inside the backward pass, so no barrier between steps
    would ever see it. Instead a thread in each process publishes, every few seconds, how long its training has not
    moved and in which line, through the store that the processes met by. The first process reads all of them. Where
    one has not moved for `limit` seconds, it is named who stands anywhere but in a wait for others, or who publishes
    nothing any more; every process prints that and exits with code 69, without unwinding, since the thread that trains
    cannot be reached.

    Training is not slowed: it counts events, and the thread wakes 20 times within the limit, or every 5 seconds where
    that is more often.

    Args:
        limit: seconds; 0.8 of `--ddp_timeout` by default, so that a name is found before the collectives give up. One
            step, one evaluation batch and one checkpoint must each be quicker.
    """

    def __init__(self, limit: float | None = None):
        self.limit = limit
        self._events = self._step = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._watch: _Watch | None = None

    def _move(self, args, state, control, **kwargs):
        self._events += 1
        self._step = state.global_step

    on_epoch_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = _move
    on_epoch_end = on_prediction_step = on_evaluate = on_save = on_log = _move

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop()
        if not is_distributed():
            return
        limit = self.limit or 0.8 * args.ddp_timeout
        # A connection of its own: the other one is locked while training waits on it. torch has no public name for it.
        store = dist.distributed_c10d._get_default_store().clone()
        self._stop = threading.Event()
        self._watch = _Watch(self, dist.PrefixStore("stall_watch", store), limit, self._stop, threading.get_ident())
        self._thread = threading.Thread(target=self._watch.run, name="stall watch", daemon=True)
        self._thread.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self) -> None:
        """End the watch."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def lost_processes(trainer: Trainer) -> str | None:
    """After an error of a collective: who publishes nothing any more, in words, or `None` where all are there.

    It takes a few of the watch's intervals, at most 20 seconds.
    """
    watches = [callback._watch for callback in trainer.callback_handler.callbacks if isinstance(callback, StallWatch)]
    if not is_distributed() or not watches or watches[0] is None:
        return None
    watch = watches[0]

    def ticks(store) -> list[int]:
        names = [f"beat/{rank}" for rank in range(watch.size)]
        return [json.loads(store.get(name))["tick"] if store.check([name]) else 0 for name in names]

    try:
        # The watch's own connection is in use by its thread.
        store = dist.PrefixStore("stall_watch", watch.store.underlying_store.clone())
        store.set_timeout(timedelta(seconds=max(1.0, watch.interval)))
        before = ticks(store)
        time.sleep(4 * watch.interval)
        after = ticks(store)
    except (dist.DistError, RuntimeError):
        return "rank 0, or the launcher, by whose store the processes met, does not answer any more"
    lost = [f"rank {rank}" for rank in range(watch.size) if before[rank] == after[rank] and rank != watch.rank]
    return f"{' and '.join(lost)} died or lost the connection" if lost else None


class _Watch:
    """The thread of a `StallWatch` and its view of the other processes."""

    def __init__(self, callback: StallWatch, store, limit: float, stop: threading.Event, trained_by: int):
        self.callback, self.store, self.limit, self.stop = callback, store, limit, stop
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.interval = min(5.0, max(0.1, limit / 20))
        self.trained_by = trained_by
        now = time.monotonic()
        self.moved, self.events = now, callback._events
        self.tick, self.until = 0, 0.0
        # By rank: its last beat, and when that arrived.
        self.beats: dict[int, tuple[_Beat | None, float]] = {rank: (None, now) for rank in range(self.size)}

    def run(self) -> None:
        self.store.set_timeout(timedelta(seconds=max(1.0, self.interval)))
        while True:
            # An error of `train()` that the script caught leaves the event unset.
            is_done = self.stop.wait(self.interval) or not is_training(sys._current_frames().get(self.trained_by))
            try:
                self._publish(is_done)
                verdict = None if is_done else self._look()
            except RuntimeError as error:
                # What torch raises where a connection broke; a run that is over needs no verdict.
                verdict = f"the store of the processes does not answer any more: {error}"
            if is_done or self.stop.is_set():
                return
            if verdict:
                self._end(verdict)

    def _publish(self, is_done: bool) -> None:
        now = time.monotonic()
        if self.callback._events != self.events:
            self.moved, self.events = now, self.callback._events
        self.tick += 1
        waits, where = _position(self.trained_by)
        beat = _Beat(self.tick, self.callback._step, now - self.moved, waits, where, is_done)
        self.store.set(f"beat/{self.rank}", json.dumps(beat.__dict__))

    def _look(self) -> str | None:
        """Who hangs, in words, if anybody does."""
        if self.store.check(["verdict"]):
            until, verdict = self.store.get("verdict").decode().split(" ", maxsplit=1)
            self.until = float(until)
            return verdict
        # All follow the first, so the store has work in proportion to the processes, not to their square.
        ranks = range(self.size) if self.rank == 0 else (0,)
        now = time.monotonic()
        for rank in ranks:
            if self.store.check([f"beat/{rank}"]):
                beat = _Beat(**json.loads(self.store.get(f"beat/{rank}")))
                last, arrived = self.beats[rank]
                self.beats[rank] = (beat, arrived if last is not None and last.tick == beat.tick else now)
        states = {rank: (self.beats[rank][0], now - self.beats[rank][1]) for rank in ranks}
        verdict = judge(states, self.limit) if self.rank == 0 else name_gone(states, self.limit)
        if verdict:
            # All leave at one time: whoever sees another go first would fail with a message of its own.
            self.until = time.time() + 3 * self.interval
            self.store.set("verdict", f"{self.until} {verdict}")
        return verdict

    def _end(self, verdict: str) -> None:
        print(f"rank {self.rank} ends: {verdict}", file=sys.stderr, flush=True)
        if f"rank {self.rank} " in verdict:
            faulthandler.dump_traceback(sys.stderr)
        time.sleep(min(max(0.0, self.until - time.time()), 3 * self.interval))
        os._exit(STALLED)


def name_gone(states: dict[int, tuple[_Beat | None, float]], limit: float) -> str | None:
    """Who publishes nothing any more, in words, or `None`. Arguments as of `judge`."""
    ages = {rank: age for rank, (beat, age) in states.items() if age > limit and not (beat and beat.is_done)}
    words = [f"rank {rank} has given no sign for {age:.0f} s: dead or stopped" for rank, age in ages.items()]
    return "; ".join(words) or None


def judge(states: dict[int, tuple[_Beat | None, float]], limit: float) -> str | None:
    """Who hangs, in words, or `None`.

    Args:
        states: of every rank, its last beat (`None`: none yet) and for how many seconds no new one came.
        limit: seconds without a move.
    """
    if gone := name_gone(states, limit):
        return gone
    beats = {rank: beat for rank, (beat, _) in states.items() if beat is not None and not beat.is_done}
    if not any(beat.silent > limit for beat in beats.values()):
        return None
    still = {rank: beat for rank, beat in beats.items() if beat.silent > limit / 2}
    # Where all wait, they wait for different things: each is named.
    named = {rank: beat for rank, beat in still.items() if not beat.waits} or still
    silent = statistics.median(beat.silent for beat in named.values())
    places = "; ".join(f"rank {rank} hangs after step {beat.step} in {beat.where}" for rank, beat in named.items())
    return f"{places}; no step was made for {silent:.0f} s (--ddp_timeout)"


def _position(thread: int) -> tuple[bool, str]:
    """Whether a thread waits for other processes, and where it stands."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return False, "no frame"
    file, function = Path(frame.f_code.co_filename).as_posix(), frame.f_code.co_name
    waits = any(part in file and (names is None or function in names) for part, names in WAITING_PLACES)
    return waits, f"{Path(file).name}:{frame.f_lineno} `{function}`"
