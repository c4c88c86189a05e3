"""A bad step ends a run before its update; a hanging or dead process ends it within the time-out, with its name."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_preemption import build_model, build_trainer, run_ranks, weights_hash
from transformers import TrainerCallback, TrainingArguments

from training.guards import (
    STALLED,
    DivergenceError,
    DivergenceGuard,
    FiniteGuard,
    NonFiniteError,
    StallWatch,
    _Beat,
    apply_timeout,
    attach_guards,
    judge,
)
from training.trainer import CustomTrainer

SAVE = {"save_strategy": "steps", "save_steps": 1}


class Spoil(TrainerCallback):
    """Puts a value into one gradient, as the backward pass of those steps leaves it."""

    def __init__(self, steps, value=math.nan, name="transformer.h.0.ln_1.weight"):
        self.steps, self.value, self.name = steps, value, name
        self.step = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parameter = model.get_parameter(self.name)
        parameter.register_hook(lambda gradient: gradient + self.value if self.step in self.steps else gradient)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1


class Weights(TrainerCallback):
    """Hash of the weights, and of the optimizer's state, before each update and after it."""

    def __init__(self):
        self.before, self.after = [], []

    def look(self, into, model, optimizer):
        states = [value for _, state in sorted(optimizer.state_dict()["state"].items()) for value in state.values()]
        into.append((weights_hash(model), [value.tolist() for value in states]))

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.look(self.before, model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.look(self.after, model, optimizer)


@pytest.mark.parametrize("clip", [0.3, 0.0], ids=["clipped", "unclipped"])
def test_guarded_run_has_the_weights_and_the_log_of_the_stock_one(clip, tmp_path):
    runs = []
    for is_guarded in (False, True):
        trainer = build_trainer(tmp_path / str(is_guarded), max_grad_norm=clip, logging_steps=1, **SAVE)
        if is_guarded:
            attach_guards(trainer)
        trainer.train()
        lines = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        runs.append((weights_hash(trainer.model), lines))
    assert runs[0] == runs[1] and len(runs[0][1]) == 6
    # Clipping has something to do.
    assert all(norm > 0.3 for _, norm in runs[0][1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_gradient_stops_before_the_update_and_is_named(value, tmp_path):
    weights = Weights()
    trainer = build_trainer(tmp_path, Spoil([3], value), weights, **SAVE)
    attach_guards(trainer)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    message = str(error.value)
    for word in ("step 3: the loss is 3.", f"norm is {value}", "`transformer.h.0.ln_1.weight`", "checkpoint-2."):
        assert word in message
    assert weights_hash(trainer.model) == weights.before[2][0] == weights.after[1][0]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_left_out_update_changes_neither_weights_nor_optimizer(tmp_path, caplog):
    weights = Weights()
    trainer = build_trainer(tmp_path, Spoil([2, 5]), weights)
    attach_guards(trainer, "skip", max_in_a_row=2)
    trainer.train()
    assert trainer.state.global_step == 6
    same = [before == after for before, after in zip(weights.before, weights.after, strict=True)]
    assert same == [False, True, False, False, True, False]
    guard = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, FiniteGuard))
    assert guard.skipped == 2 and "update was left out; 2 so far" in caplog.text


def test_bad_steps_in_a_row_stop_a_run_that_skips(tmp_path):
    trainer = build_trainer(tmp_path, Spoil([1, 3, 4, 5]))
    attach_guards(trainer, "skip", max_in_a_row=3)
    with pytest.raises(NonFiniteError, match=r"step 5: .* 3 updates in a row .* 4 in all. There is no checkpoint yet"):
        trainer.train()


def test_batch_without_labels_is_said_to_have_none(tmp_path):
    trainer = build_trainer(tmp_path, gradient_accumulation_steps=1)
    # The mean over the labels of the batch, as most losses outside this package.
    trainer.model_accepts_loss_kwargs = False
    trainer.train_dataset = [{**row, "labels": [-100] * 8} for row in trainer.train_dataset]
    attach_guards(trainer)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan with 0 of 28 labels \(all are -100"):
        trainer.train()


def test_micro_batch_is_named(tmp_path):
    trainer = build_trainer(tmp_path)
    compute, calls = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(None)
        return compute(*args, **kwargs) * (math.inf if len(calls) == 4 else 1.0)

    trainer.compute_loss = compute_loss
    attach_guards(trainer)
    with pytest.raises(NonFiniteError, match="step 2: the loss of micro-batch 2 of 2 is inf with 28 of 28 labels"):
        trainer.train()


def test_scaled_gradients_of_fp16_may_overflow(tmp_path):
    trainer = build_trainer(tmp_path, Spoil([2], math.inf), max_steps=3)
    attach_guards(trainer)
    # What stands for fp16 here, where the scaler (which a processor has not) would leave the update out.
    trainer.accelerator.scaler = object()
    guard = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, FiniteGuard))
    guard.meter.own_norm = math.inf
    guard.meter.agree = lambda: setattr(guard.meter, "loss", 1.0) or setattr(guard.meter, "norm", math.inf)
    guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    guard.meter.agree = lambda: setattr(guard.meter, "loss", math.nan)
    with pytest.raises(NonFiniteError):
        guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize("every", [1, 100])
def test_rate_of_a_million_stops_within_a_few_steps_and_saves_nothing_of_it(every, tmp_path):
    """The second update is the bad one; the first has no rate yet."""
    trainer = build_trainer(
        tmp_path, learning_rate=1e6, warmup_steps=1, max_steps=30, save_strategy="steps", save_steps=every
    )
    attach_guards(trainer)
    start = weights_hash(trainer.model)
    with pytest.raises((DivergenceError, NonFiniteError), match="above 1.* 3 times|loss .* is nan"):
        trainer.train()
    assert trainer.state.global_step <= 5
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert saved == ({"checkpoint-1"} if every == 1 else set())
    if saved:
        assert weights_hash(type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")) == start


def test_divergence_in_the_last_update_is_found(tmp_path):
    trainer = build_trainer(tmp_path, learning_rate=1e6, max_steps=1)
    attach_guards(trainer)
    with pytest.raises(DivergenceError, match="step 1: its update took the loss from 3"):
        trainer.train()


def scale_losses(trainer, factors):
    """Multiply what the guard hears of by one factor a step."""
    guard = DivergenceGuard(trainer)
    trainer.add_callback(guard)
    agree = guard.meter.agree

    def agree_scaled():
        agree()
        guard.meter.loss *= factors[trainer.state.global_step]

    guard.meter.agree = agree_scaled
    return guard


def test_hard_batch_passes_and_nothing_is_saved_meanwhile(tmp_path, caplog):
    trainer = build_trainer(tmp_path, **SAVE)
    scale_losses(trainer, [1, 1, 5, 5, 1, 1])
    trainer.train()
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint-*")) == ["1", "2", "5", "6"]
    assert "no checkpoint at step 3: the loss 1" in caplog.text


def test_nothing_is_saved_after_a_left_out_loss(tmp_path):
    """Weights that are not finite give such a loss too, and would be the newest checkpoint."""
    trainer = build_trainer(tmp_path, **SAVE)
    host = trainer.training_step
    trainer.training_step = lambda *args: host(*args) * (math.nan if trainer.state.global_step == 3 else 1.0)
    attach_guards(trainer, "skip")
    trainer.train()
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint-*")) == ["1", "2", "3", "5", "6"]


def test_loss_that_stays_up_stops(tmp_path):
    trainer = build_trainer(tmp_path, **SAVE)
    scale_losses(trainer, [1, 1, 1, 4, 5, 6])
    with pytest.raises(DivergenceError, match="step 6: the loss is .*, for 3 steps above 1.*checkpoint-3. Go on"):
        trainer.train()


def test_check_before_a_checkpoint_leaves_the_run_as_it_was(tmp_path):
    """Though a loss may draw random numbers, as one with dropout does here outside of training too."""

    class AlwaysDrop(torch.nn.Dropout):
        def forward(self, hidden_states):
            return torch.nn.functional.dropout(hidden_states, 0.1, training=True)

    runs = []
    for is_guarded in (False, True):
        model = build_model()
        model.transformer.drop = AlwaysDrop()
        trainer = build_trainer(tmp_path / str(is_guarded), model=model, **SAVE)
        if is_guarded:
            trainer.add_callback(DivergenceGuard(trainer))
        trainer.train()
        runs.append(weights_hash(trainer.model))
    assert runs[0] == runs[1]


class Watch(TrainerCallback):
    """Checkpoints that have their name when a step begins and before its update; and a failure on request."""

    def __init__(self, fail_in=None):
        self.begin, self.update, self.fail_in = {}, {}, fail_in

    def names(self, args):
        self.trainer.finish_saving()
        return "".join(sorted(path.name[-1] for path in Path(args.output_dir).glob("checkpoint-*")))

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin[state.global_step + 1] = self.names(args)
        if state.global_step + 1 == self.fail_in:
            raise MemoryError("none left")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.update[state.global_step + 1] = self.names(args)


def build_waiting(folder, *callbacks, **arguments):
    """A trainer whose checkpoints wait for their judgement, its watch, and the passes made to judge without a step."""
    watch, passes = Watch(arguments.pop("fail_in", None)), []
    trainer = build_trainer(folder, *callbacks, watch, trainer_class=CustomTrainer, **{**SAVE, **arguments})
    watch.trainer = trainer
    guard = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DivergenceGuard))
    again = guard._loss_again

    def count(*evidence):
        passes.append(trainer.state.global_step)
        watch.judged = weights_hash(trainer.model)
        return again(*evidence)

    guard._loss_again = count
    return trainer, watch, passes


def test_checkpoint_gets_its_name_when_the_next_loss_is_known(tmp_path):
    trainer, watch, passes = build_waiting(tmp_path, save_steps=2)
    trainer.train()
    assert watch.begin == {1: "", 2: "", 3: "", 4: "2", 5: "2", 6: "24"}
    assert watch.update == {1: "", 2: "", 3: "2", 4: "2", 5: "24", 6: "24"}
    # Nothing but the last one, after which no step comes, costs a forward pass.
    assert passes == [6] and watch.names(trainer.args) == "246"


def test_checkpoint_after_a_bad_update_never_gets_its_name(tmp_path):
    trainer, watch, _ = build_waiting(tmp_path, learning_rate=1e6, warmup_steps=2, max_steps=30)
    with pytest.raises((DivergenceError, NonFiniteError), match="checkpoint-1. Go on from it|checkpoint-1.$"):
        trainer.train()
    assert trainer.state.global_step >= 2 and watch.names(trainer.args) == "1"


def test_checkpoint_waits_while_batches_are_hard(tmp_path):
    trainer, watch, passes = build_waiting(tmp_path, save_steps=2)
    guard = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DivergenceGuard))
    agree = guard.meter.agree

    def agree_scaled():
        if guard.meter.loss is None:
            agree()
            guard.meter.loss *= [1, 1, 5, 5, 1, 1][trainer.state.global_step]

    guard.meter.agree = agree_scaled
    trainer.train()
    # No fourth, and the second only after the fifth loss.
    assert watch.update == {1: "", 2: "", 3: "", 4: "", 5: "2", 6: "2"} and passes == [6]


def test_step_that_is_not_finite_has_the_waiting_checkpoint_judged(tmp_path):
    trainer, watch, passes = build_waiting(tmp_path, Spoil([3]))
    with pytest.raises(NonFiniteError, match=r"step 3: .*checkpoint-2\."):
        trainer.train()
    assert watch.names(trainer.args) == "12" and passes == [2]


def test_failure_of_another_kind_keeps_the_waiting_checkpoint(tmp_path):
    trainer, watch, _ = build_waiting(tmp_path, fail_in=4)
    with pytest.raises(MemoryError):
        trainer.train()
    assert watch.begin[4] == "12" and watch.names(trainer.args) == "123"


def test_failure_while_the_loss_is_high_drops_the_waiting_checkpoint(tmp_path):
    trainer, watch, _ = build_waiting(tmp_path, save_steps=2, fail_in=4)
    guard = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DivergenceGuard))
    agree = guard.meter.agree

    def agree_scaled():
        if guard.meter.loss is None:
            agree()
            guard.meter.loss *= 5 if trainer.state.global_step == 2 else 1

    guard.meter.agree = agree_scaled
    with pytest.raises(MemoryError):
        trainer.train()
    assert watch.begin[4] == "" and watch.names(trainer.args) == ""


class StopAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize("best", [False, True])
def test_checkpoint_is_judged_at_the_end_when_no_step_came(best, tmp_path):
    """By its own weights, though those of an earlier checkpoint take their place."""
    more = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    weights = Weights()
    trainer, watch, passes = build_waiting(tmp_path, StopAfterSave(), weights, **(more if best else {}))
    trainer.train()
    assert trainer.state.global_step == 4 and passes == [4] and watch.names(trainer.args) == "1234"
    assert watch.judged == weights.after[3][0] and (weights_hash(trainer.model) == weights.after[0][0]) == best


@pytest.mark.parametrize(
    "make",
    [
        lambda trainer: FiniteGuard(trainer, "ignore"),
        lambda trainer: FiniteGuard(trainer, "skip", 0),
        lambda trainer: DivergenceGuard(trainer, 0.5),
        lambda trainer: DivergenceGuard(trainer, patience=0),
    ],
)
def test_wrong_argument_is_refused_with_its_name(make, tmp_path):
    with pytest.raises(ValueError, match="^`(action|max_in_a_row|factor|patience)` is .* but must be"):
        make(build_trainer(tmp_path))


def test_timeout_below_a_second_is_refused(tmp_path):
    args = TrainingArguments(tmp_path, ddp_timeout=0, use_cpu=True)
    with pytest.raises(ValueError, match="--ddp_timeout is 0"):
        apply_timeout(args)


def beat(silent=0.0, waits=False, where="file.py:1 `f`", is_done=False):
    return _Beat(tick=1, step=4, silent=silent, waits=waits, where=where, is_done=is_done)


# What ranks publish and how old it is, and who is named.
CASES = {
    "all move": ([(beat(), 0), (beat(), 0)], None),
    "a slow step": ([(beat(9), 0), (beat(9), 0)], None),
    "one hangs, one waits for it": ([(beat(11, True), 0), (beat(10.5), 0)], "1"),
    "the one that hangs moved a little later": ([(beat(11, True), 0), (beat(9), 0)], "1"),
    "one is gone, one waits for it": ([(beat(11, True), 0), (beat(3), 11)], "1"),
    "one never came": ([(beat(3), 0), (None, 11)], "1"),
    "each waits for the other": ([(beat(11, True), 0), (beat(11, True), 0)], "01"),
    "one has finished": ([(beat(3), 0), (beat(50, is_done=True), 50)], None),
}


@pytest.mark.parametrize("case", CASES)
def test_who_hangs(case):
    states, named = CASES[case]
    verdict = judge(dict(enumerate(states)), limit=10)
    assert (verdict is None) if named is None else all(f"rank {rank} " in verdict for rank in named)
    if named and len(named) == 1:
        assert f"rank {1 - int(named)} " not in verdict


class At(TrainerCallback):
    """Does something at the start of a step, on the last rank."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            self.act()


def hang_in_the_user_s_code():
    time.sleep(60)


def train_badly(folder, act, ddp_timeout, with_watch=True):
    trainer = build_trainer(folder, At(2, act), ddp_timeout=ddp_timeout)
    apply_timeout(trainer.args)
    if with_watch:
        trainer.add_callback(StallWatch())
    trainer.train()


def train_with_one_bad_rank(folder, action):
    trainer = build_trainer(folder, gradient_accumulation_steps=1, ddp_timeout=20, **SAVE)
    # The loss of one rank alone, without a gradient: nothing in the exchange of gradients would tell the others.
    step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        is_bad = trainer.args.process_index == 1 and trainer.state.global_step in (2, 4)
        return loss + math.inf if is_bad else loss

    trainer.training_step = training_step
    attach_guards(trainer, action)
    try:
        trainer.train()
    finally:
        found = {"hash": weights_hash(trainer.model), "step": trainer.state.global_step}
        (folder / f"found-{trainer.args.process_index}").write_text(json.dumps(found))


def test_rank_that_hangs_ends_all_within_the_time_out_and_is_named(tmp_path):
    start = time.monotonic()
    found = run_ranks(train_badly, tmp_path, hang_in_the_user_s_code, 4, timeout=20)
    assert time.monotonic() - start < 10
    assert [code for code, _ in found] == [STALLED, STALLED], found
    for rank, (_, errors) in enumerate(found):
        assert f"rank {rank} ends: rank 1 hangs after step 2 in test_guards.py:" in errors, errors
        assert "`hang_in_the_user_s_code`" in errors and "rank 0 hangs" not in errors
    # Only who hangs shows its stack.
    assert "most recent call first" in found[1][1] and "most recent call first" not in found[0][1]


def test_all_ranks_stop_alike_where_one_has_a_bad_loss(tmp_path):
    found = run_ranks(train_with_one_bad_rank, tmp_path, "stop")
    states = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(2)]
    assert [code for code, _ in found] == [1, 1] and states[0] == states[1] and states[0]["step"] == 2
    for _, errors in found:
        assert "NonFiniteError: step 3: the loss is inf on rank 1 with 28 of 28 labels" in errors
        assert "every gradient is finite" in errors and "checkpoint-2." in errors


@pytest.mark.slow
def test_all_ranks_skip_alike_where_one_has_a_bad_loss(tmp_path):
    found = run_ranks(train_with_one_bad_rank, tmp_path, "skip")
    states = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(2)]
    assert [code for code, _ in found] == [0, 0] and states[0] == states[1] and states[0]["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("with_watch", [True, False])
def test_rank_that_is_killed_ends_the_others(with_watch, tmp_path):
    start = time.monotonic()
    found = run_ranks(train_badly, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL), 6, with_watch, timeout=30)
    assert time.monotonic() - start < 12
    assert found[1][0] == -signal.SIGKILL and found[0][0] not in (0, None, -signal.SIGKILL), found


@pytest.mark.slow
def test_rank_that_is_stopped_is_named(tmp_path):
    """It can say nothing of itself any more."""
    found = run_ranks(train_badly, tmp_path, lambda: os.kill(os.getpid(), signal.SIGSTOP), 4, timeout=8)
    assert found[0][0] == STALLED and "rank 1 has given no sign for" in found[0][1]


SCRIPT = """
import os, signal, sys
from pathlib import Path
from test_guards import hang_in_the_user_s_code, train_badly
acts = {"hang": hang_in_the_user_s_code, "die": lambda: os.kill(os.getpid(), signal.SIGKILL)}
train_badly(Path(sys.argv[1]), acts[sys.argv[2]], 5)
"""
# What the launcher's errors must hold.
ENDS = {
    "hang": ["rank 0 ends: rank 1 hangs after step 2 in test_guards.py:"],
    "die": ["Signal 9 (SIGKILL) received by PID", "rank      : 1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("act", ENDS)
def test_launcher_ends_too(act, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}", "OMP_NUM_THREADS": "1"}
    command += [str(tmp_path / "script.py"), str(tmp_path / "run"), act]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode != 0
    for words in ENDS[act]:
        assert words in found.stderr, found.stderr[-3000:]


def hold_the_first_rank(folder):
    trainer = build_trainer(folder, ddp_timeout=4)
    apply_timeout(trainer.args)
    if trainer.args.process_index == 1:
        time.sleep(9)
        sys.exit(0)
    start = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1))
    finally:
        (folder / "seconds").write_text(str(time.monotonic() - start))


@pytest.mark.slow
def test_time_out_holds_on_processors(tmp_path):
    found = run_ranks(hold_the_first_rank, tmp_path, timeout=30)
    assert found[0][0] == 1 and 3 < float((tmp_path / "seconds").read_text()) < 8, found


def test_time_out_reaches_the_group(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("training.guards.is_distributed", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda timeout, group: seen.append(timeout))
    apply_timeout(TrainingArguments(tmp_path, ddp_timeout=77, use_cpu=True))
    assert seen == [timedelta(seconds=77)]
