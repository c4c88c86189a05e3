"""Signals end training after the step they fall in, on every process, with nothing lost and a code that says so."""

import hashlib
import os
import signal
import socket
import sys
import threading
import time

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_custom
from training.preemption import PREEMPTED, SIGNALS, Preemption, exit_if_preempted

STEPS, ROWS = 6, 16


def build_model():
    """Tiny, with dropout, so that a resumed run must find its random state again."""
    torch.manual_seed(0)
    config = hf_custom.CustomGPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return hf_custom.CustomGPT2ForCausalLM(config)


def rows(count=ROWS):
    ids = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def build_trainer(folder, *callbacks, model=None, trainer_class=Trainer, **arguments):
    """Two epochs of three steps by default."""
    arguments = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": [],
        **arguments,
    }
    return trainer_class(
        model or build_model(),
        TrainingArguments(folder, **arguments),
        train_dataset=rows(24),
        eval_dataset=rows(4),
        callbacks=list(callbacks),
    )


def weights_hash(model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


class Signal(TrainerCallback):
    """Sends this process a signal at an event of a step."""

    def __init__(self, event, step, number):
        self.event, self.step, self.number = event, step, number

    def __getattribute__(self, name):
        if name != super().__getattribute__("event"):
            return super().__getattribute__(name)
        return self.send

    def send(self, args, state, control, **kwargs):
        # The handler of Python runs before the next line.
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def _handlers():
    """A pre-empted process keeps its handlers, since it is to end; this one is not. SIGINT is what it usually is, also
    where these tests run in the background of a shell, which ignores it for them."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    trainer = build_trainer(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return weights_hash(trainer.model)


# Event, step counted before it, signal: where training must stop.
MOMENTS = {
    "before the first step": ("on_train_begin", 0, signal.SIGTERM, 1),
    "in mid-accumulation": ("on_substep_end", 1, signal.SIGUSR1, 2),
    "before an update": ("on_pre_optimizer_step", 1, signal.SIGINT, 2),
    "at an epoch's end": ("on_pre_optimizer_step", 2, signal.SIGTERM, 3),
    "while evaluating": ("on_prediction_step", 2, signal.SIGTERM, 3),
    "while saving": ("on_save", 2, signal.SIGTERM, 3),
    "in the last step": ("on_pre_optimizer_step", 5, signal.SIGTERM, 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_signal_saves_the_step_it_falls_in_and_the_resumed_run_is_exact(moment, straight, tmp_path, capsys):
    event, step, number, stop = MOMENTS[moment]
    extra = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    callback = Preemption()
    trainer = build_trainer(tmp_path, callback, Signal(event, step, number), **extra)
    former = signal.getsignal(number)
    trainer.train()
    assert callback.is_preempted and trainer.state.global_step == stop
    with pytest.raises(SystemExit) as exit_:
        exit_if_preempted(trainer)
    assert exit_.value.code == PREEMPTED == 75
    said = capsys.readouterr().err
    for word in (signal.Signals(number).name, f"step {stop} of {STEPS}", f"checkpoint-{stop}", "--resume"):
        assert word in said
    assert signal.getsignal(number) is signal.SIG_IGN
    callback.restore()
    assert signal.getsignal(number) is former
    checkpoint = tmp_path / f"checkpoint-{stop}"
    resumed = build_trainer(tmp_path / "again", Preemption(), **extra)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    exit_if_preempted(resumed)
    assert resumed.state.global_step == STEPS and weights_hash(resumed.model) == straight


def test_without_a_signal_nothing_changes(straight, tmp_path):
    former = {number: signal.getsignal(number) for number in SIGNALS}
    trainer = build_trainer(tmp_path, Preemption())
    trainer.train()
    exit_if_preempted(trainer)
    assert weights_hash(trainer.model) == straight and not list(tmp_path.glob("checkpoint-*"))
    assert {number: signal.getsignal(number) for number in SIGNALS} == former


def test_stop_in_mid_epoch_neither_evaluates_nor_saves_as_at_its_end(tmp_path):
    saves = []
    extra = {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
    trainer = build_trainer(tmp_path, Preemption(), Signal("on_pre_optimizer_step", 1, signal.SIGTERM), **extra)
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: (saves.append(trainer.state.global_step), save(*args))
    trainer.train()
    assert saves == [2] and not any("eval_loss" in entry for entry in trainer.state.log_history)


def test_evaluation_that_is_due_comes_after_the_save_and_is_kept(tmp_path):
    """With one checkpoint kept and the best loaded at the end, the host would delete the newest."""
    extra = {name: "steps" for name in ("eval_strategy", "save_strategy")}
    extra |= {"eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    events = []

    class Order(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            events.append(("evaluate", state.global_step))
            # The first evaluation stays the best.
            kwargs["metrics"]["eval_loss"] = float(state.global_step)

        def on_save(self, args, state, control, **kwargs):
            events.append(("save", state.global_step))

    trainer = build_trainer(tmp_path, Preemption(), Signal("on_substep_end", 3, signal.SIGTERM), Order(), **extra)
    trainer.train()
    assert events == [("evaluate", 2), ("save", 2), ("save", 4), ("evaluate", 4), ("save", 4)]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    text = (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()
    assert text.count('"eval_runtime"') == 2 and '"best_global_step": 2' in text


def test_signal_after_the_last_step_acts_as_usual(tmp_path):
    former = signal.getsignal(signal.SIGINT)
    trainer = build_trainer(
        tmp_path, Preemption(), Signal("on_save", STEPS, signal.SIGINT), save_strategy="steps", save_steps=STEPS
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is former and (tmp_path / f"checkpoint-{STEPS}").is_dir()


def test_second_interrupt_ends_at_once(tmp_path):
    class Twice(Signal):
        def send(self, *args, **kwargs):
            super().send(*args, **kwargs)
            super().send(*args, **kwargs)

    trainer = build_trainer(tmp_path, Preemption(), Twice("on_pre_optimizer_step", 1, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1


def test_late_signal_of_another_process_does_not_kill_this_one_on_its_way_out(tmp_path):
    callback = Preemption()
    trainer = build_trainer(tmp_path, callback, Signal("on_substep_end", 1, signal.SIGUSR1))
    trainer.train()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="75"):
        exit_if_preempted(trainer)
    os.kill(os.getpid(), signal.SIGTERM)


def test_signal_after_an_error_of_training_acts_as_usual(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise OSError("disk")

    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="disk"):
        build_trainer(tmp_path, Preemption(), Fail()).train()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former


def test_outside_the_main_thread_it_says_that_it_cannot(tmp_path, caplog):
    trainer = build_trainer(tmp_path, Preemption(), max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1 and "outside the main thread" in caplog.text


def test_message_does_not_promise_a_checkpoint_that_is_not_there(tmp_path):
    callback = Preemption()
    trainer = build_trainer(tmp_path, callback)
    callback.step, callback.signals = 3, [signal.SIGTERM]
    assert "no checkpoint was written for that step; the newest is none" in callback.message(
        trainer.args, trainer.state
    )
    (tmp_path / "checkpoint-3").mkdir()
    trainer.args.save_only_model = True
    assert "from which no run resumes exactly" in callback.message(trainer.args, trainer.state)


class Skewed(Signal):
    """Each rank is signalled in a step, by so many seconds later, or not at all."""

    def __init__(self, delays, *rest):
        self.delays = delays
        super().__init__(*rest)

    def send(self, args, state, control, **kwargs):
        time.sleep(0.02)
        delay = self.delays[args.process_index]
        if state.global_step == self.step and delay is not None:
            threading.Timer(delay, os.kill, (os.getpid(), self.number)).start()


def run_ranks(target, folder, *arguments, timeout=60) -> list[tuple[int, str]]:
    """Exit code and errors of two processes that run `target(folder, *arguments)`; none outlives the test.

    Without a launcher, which would hide their exit codes; forked, so that nothing is imported again.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def run(rank):
        os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
        errors = os.open(folder / f"errors-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(errors, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        target(folder, *arguments)

    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    until = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
        process.join()
    return [(process.exitcode, (folder / f"errors-{rank}").read_text()) for rank, process in enumerate(processes)]


def train_skewed(folder, delays, checkpoint=None):
    signals = Skewed(delays, "on_pre_optimizer_step", 1, signal.SIGTERM)
    trainer = build_trainer(
        folder, Preemption(), signals, max_steps=40, gradient_accumulation_steps=1, ddp_timeout=20, seed=3
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    (folder / f"hash-{trainer.args.process_index}").write_text(weights_hash(trainer.model))
    if any(delay is not None for delay in delays):
        # The later signal reaches a process that has trained to its end.
        time.sleep(0.7)
    exit_if_preempted(trainer)


def test_ranks_signalled_half_a_second_apart_stop_after_the_same_step(tmp_path):
    found = run_ranks(train_skewed, tmp_path, [0.0, 0.5])
    assert [code for code, _ in found] == [PREEMPTED, PREEMPTED], found
    checkpoints = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert len(checkpoints) == 1 and "SIGTERM" in found[0][1] and checkpoints[0] in found[0][1]
    assert 2 <= int(checkpoints[0].split("-")[1]) < 20 and "pre-empted" not in found[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("delays", [[None, 0.0], [0.5, 0.0]])
def test_ranks_resume_to_the_weights_of_the_straight_run(delays, tmp_path):
    straight = run_ranks(train_skewed, tmp_path / "straight", [None, None])
    assert [code for code, _ in straight] == [0, 0], straight
    found = run_ranks(train_skewed, tmp_path / "run", delays)
    assert [code for code, _ in found] == [PREEMPTED, PREEMPTED], found
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    resumed = run_ranks(train_skewed, tmp_path / "run", [None, None], str(checkpoint))
    assert [code for code, _ in resumed] == [0, 0], resumed
    for rank in range(2):
        assert (tmp_path / "run" / f"hash-{rank}").read_text() == (tmp_path / "straight" / "hash-0").read_text()


class SlowRows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        time.sleep(0.01)
        return rows(24)[index]


def test_data_worker_lets_the_signal_to_all_processes_pass(tmp_path):
    """Schedulers signal the workers too, and a worker that dies takes the step with it."""
    workers = []

    class ToAll(Signal):
        def send(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                workers.extend(child.pid for child in torch.multiprocessing.active_children())
                for pid in (*workers, os.getpid()):
                    os.kill(pid, self.number)

    trainer = build_trainer(
        tmp_path, Preemption(), ToAll("on_step_end", 1, signal.SIGTERM), dataloader_num_workers=1, max_steps=3
    )
    trainer.train_dataset = SlowRows()
    trainer.train()
    assert workers and trainer.state.global_step == 2 and (tmp_path / "checkpoint-2").is_dir()
