"""FSDP2 over two processes without a GPU: it divides the model, saves in parts, resumes to the bit, exports whole."""

import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import HubStrategy

from tests.faults.lab import PREEMPTED, Lab
from tests.faults.processes import at_update, die, free_port, run_script, signal_self
from training import run_clm
from training.checkpointing import MANIFEST, CheckpointError, checkpoints, newest_verified, seal, verify
from training.sharding import METADATA, MODEL_FILE, MODEL_FOLDER, PARTS, WHOLE
from training.trainer import CustomTrainer

ROOT = Path(__file__).parent.parent
PLAN = yaml.safe_load((ROOT / "training" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
# Of the plan's names, those under which the launcher hands them on by another one.
RENAMED = {"FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
OPTIMIZER_FOLDER = "optimizer_0"
SLOW = pytest.mark.slow


def shard(**changes):
    """What `accelerate launch` with the plan sets for each process before a script begins."""
    settings = {name.upper(): str(value) for name, value in PLAN.items()} | changes

    def set_up(rank: int) -> None:
        names = {RENAMED.get(name, name): value for name, value in settings.items()}
        os.environ.update(names, ACCELERATE_USE_FSDP="true")

    return set_up


def both(*actions):
    def act(rank: int) -> None:
        for action in actions:
            action(rank)

    return act


class Runs:
    """Runs of two processes in folders of their own."""

    def __init__(self, root: Path):
        self.root, self._numbers = root, itertools.count()
        # Six steps, a checkpoint every second one, with dropout.
        self.flags = [*Lab(root / "lab").flags("clm"), "--per_device_train_batch_size", "2"]

    def __call__(self, *flags, sabotage=None, is_sharded=True, folder=None, code=0, **changes):
        """The folder of a run that ends with `code`, and what its processes said."""
        folder = folder or self.root / str(next(self._numbers))
        set_up = both(*([shard(**changes)] if is_sharded else []), *([sabotage] if sabotage else []))
        logs = self.root / f"log-{next(self._numbers)}"
        run = run_script(run_clm.main, [*self.flags, "--output_dir", str(folder), *flags], logs, 2, set_up, 90)
        assert run.codes == [code] * 2 or (code is None and 0 not in run.codes), (run.codes, run.all_text[-3000:])
        return folder, run

    def copy(self, folder: Path, *without: str) -> Path:
        """A copy of a run's folder, without some of what is in it."""
        copy = self.root / str(next(self._numbers))
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*without))
        return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def note_shards(folder: Path):
    """Before the first update each process writes down what it holds."""

    def note(rank: int) -> None:
        def write(optimizer) -> None:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            found = {
                "sharded": all(isinstance(weight, DTensor) for weight in weights),
                "own": sum(weight.to_local().numel() for weight in weights),
                "all": sum(weight.numel() for weight in weights),
            }
            (folder / f"{rank}.json").write_text(json.dumps(found))

        at_update(1, write)

    return note


@pytest.fixture(scope="module")
def straight(runs, tmp_path_factory):
    """An uninterrupted run, and what each of its processes held."""
    notes = tmp_path_factory.mktemp("notes")
    folder, _ = runs(sabotage=note_shards(notes))
    return folder, [json.loads((notes / f"{rank}.json").read_text()) for rank in (0, 1)]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same(folder: Path, other: Path) -> None:
    """Both runs ended with the same weights, to the bit."""
    weights, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_each_process_holds_its_half(straight):
    _, notes = straight
    assert all(note["sharded"] for note in notes)
    # Rows are divided, of which an odd one goes to the first.
    assert sum(note["own"] for note in notes) == notes[0]["all"] == notes[1]["all"]
    assert all(0.45 < note["own"] / note["all"] < 0.55 for note in notes)


def test_checkpoint_holds_the_parts_of_every_process(straight, tmp_path):
    folder, _ = straight
    found = checkpoints(folder)
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-6"]
    parts = {f"{kind}/{name}" for kind in (MODEL_FOLDER, OPTIMIZER_FOLDER) for name in ("__0_0.distcp", "__1_0.distcp")}
    for path in found:
        assert parts <= verify(path)["files"].keys()
        assert not list(path.glob("*.safetensors"))
    for part in sorted(parts):
        shutil.copytree(folder, tmp_path / part, symlinks=True)
        file = tmp_path / part / "checkpoint-6" / part
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        newest, skipped = newest_verified(tmp_path / part)
        assert newest.name == "checkpoint-4" and file.name in skipped[0][1]


def test_killed_run_goes_on_to_the_bit(runs, straight):
    folder, run = runs(sabotage=lambda rank: at_update(5, die), code=-signal.SIGKILL)
    assert run.steps == 4
    _, again = runs("--resume", folder=folder)
    assert "going on from" in again.all_text
    assert_same(folder, straight[0])


@SLOW
def test_export_is_an_ordinary_checkpoint_as_plain_data_parallelism_leaves_it(runs, straight):
    folder, _ = straight
    plain, _ = runs(is_sharded=False)
    assert losses(folder) == pytest.approx(losses(plain), abs=1e-5)
    weights, expected = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, atol=1e-5), name
    # Only who holds the whole model scores it without an evaluation in training.
    assert {path.name for path in plain.iterdir()} - {path.name for path in folder.iterdir()} == {
        "README.md",
        "card.json",
    }
    assert {path.name for path in folder.iterdir()} < {path.name for path in plain.iterdir()}
    assert (folder / "config.json").read_text() == (plain / "config.json").read_text()
    assert (folder / "modeling_gpt2.py").read_text() == (plain / "modeling_gpt2.py").read_text()


def test_export_is_what_the_parts_hold(straight):
    folder, _ = straight
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # The project's code and none of torch's; a weight with two names once.
    assert (folder / "modeling_gpt2.py").is_file() and not list(folder.glob("_*.py"))
    assert model.state_dict().keys() - load_file(folder / "model.safetensors").keys() == {"lm_head.weight"}
    # As torch reads the parts, in one process that knows of no other.
    gathered = {"model": {name: torch.empty_like(value) for name, value in model.state_dict().items()}}
    dcp.load(gathered, checkpoint_id=folder / "checkpoint-6" / MODEL_FOLDER, no_dist=True)
    assert gathered["model"].keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(gathered["model"][name], value), name


# --- What a checkpoint may hold ---


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_parts(folder: Path, **values) -> Path:
    """A checkpoint as FSDP saves it, of one process."""
    state = {"weight": torch.arange(6.0).reshape(2, 3), **values}
    for name in (MODEL_FOLDER, OPTIMIZER_FOLDER):
        (folder / name).mkdir(parents=True)
        dcp.save(state, storage_writer=FileSystemWriter(folder / name), no_dist=True)
    seal(folder, 1, {})
    return folder


def change_table(folder: Path, change) -> None:
    file = folder / MODEL_FOLDER / METADATA
    table = pickle.loads(file.read_bytes())
    change(table)
    file.write_bytes(pickle.dumps(table))


def change_places(folder: Path, **changes) -> None:
    def change(table) -> None:
        table.storage_data = {key: replace(place, **changes) for key, place in table.storage_data.items()}

    change_table(folder, change)


def write_value(folder: Path, content: bytes) -> None:
    """Other bytes in the place of the weight."""
    (folder / MODEL_FOLDER / "other.distcp").write_bytes(content)
    change_places(folder, relative_path="other.distcp", offset=0, length=len(content))


def archive(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def packed(value) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive(value))) as plain, zipfile.ZipFile(stream, "w") as small:
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    return stream.getvalue()


HOSTILE = {
    "table": (
        lambda folder, trap: (folder / MODEL_FOLDER / METADATA).write_bytes(pickle.dumps(trap)),
        "is no table of contents of torch: it asks for posix.mkdir",
    ),
    "table of another class": (
        lambda folder, trap: (folder / OPTIMIZER_FOLDER / METADATA).write_bytes(pickle.dumps({})),
        "is no table of contents",
    ),
    "cut table": (
        lambda folder, trap: os.truncate(folder / MODEL_FOLDER / METADATA, 40),
        "is no table of contents",
    ),
    "deep in the table": (
        lambda folder, trap: change_table(folder, lambda table: setattr(table, "planner_data", {"x": trap})),
        "it asks for posix.mkdir",
    ),
    "value": (lambda folder, trap: write_value(folder, archive(trap)), "there is more than data"),
    "bare pickle": (lambda folder, trap: write_value(folder, pickle.dumps(trap)), "is no archive of torch"),
    "bomb": (lambda folder, trap: write_value(folder, packed(torch.zeros(2**16))), "would grow"),
    "file elsewhere": (
        lambda folder, trap: change_places(folder, relative_path="../other.distcp"),
        "names '../other.distcp' in pytorch_model_fsdp_0/.metadata, outside",
    ),
    "file nowhere": (lambda folder, trap: change_places(folder, relative_path="other.distcp"), "is not there as it"),
    "transformed": (
        lambda folder, trap: change_places(folder, transform_descriptors=["zstd"]),
        "is not there as it was written",
    ),
    "not finite": (
        lambda folder, trap: write_value(folder, archive(torch.tensor([1.0, float("nan")]))),
        "has numbers in weight that are not finite",
    ),
    "no tensor": (lambda folder, trap: write_value(folder, archive("text")), "something other than a tensor in weight"),
    "whole model": (
        lambda folder, trap: (folder / MODEL_FILE).write_bytes(archive({"weight": trap})),
        "holds pytorch_model_fsdp.bin, in which there is more than data",
    ),
    "whole model of NaN": (
        lambda folder, trap: (folder / MODEL_FILE).write_bytes(archive({"weight": torch.tensor([float("inf")])})),
        "has numbers in weight that are not finite",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_parts_are_refused_and_nothing_is_executed(kind, tmp_path):
    folder, marker = write_parts(tmp_path / "checkpoint-1"), tmp_path / "executed"
    spoil, message = HOSTILE[kind]
    spoil(folder, Trap(marker))
    # Who can write there can write the manifest too.
    (folder / MANIFEST).unlink()
    seal(folder, 1, {})
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        verify(folder)
    assert not marker.exists()


def test_parts_with_values_of_an_optimizer_pass(tmp_path):
    values = {"lr": 1e-3, "betas": (0.9, 0.95), "foreach": None, "name": "adam", "step": torch.tensor(3.0)}
    assert verify(write_parts(tmp_path / "checkpoint-1", **values))["step"] == 1
    assert verify(write_parts(tmp_path / "checkpoint-2", half=torch.zeros(3, dtype=torch.bfloat16)))


def test_value_that_runs_code_is_refused(tmp_path):
    """torch reads what is no tensor without a limit on what it may be."""
    with pytest.raises(CheckpointError, match="in which there is more than data"):
        verify(write_parts(tmp_path / "checkpoint-1", lr=Trap(tmp_path / "executed")))
    assert not (tmp_path / "executed").exists()


def test_checkpoint_in_parts_is_not_pushed(tmp_path):
    """It holds no model that anybody could load."""
    folder = write_parts(tmp_path / "checkpoint-1")
    # Whoever goes on asks the trainer for more than its strategy.
    trainer = SimpleNamespace(args=SimpleNamespace(hub_strategy=HubStrategy.EVERY_SAVE))
    assert CustomTrainer._push(trainer, folder, 1) is None
    shutil.rmtree(folder / MODEL_FOLDER)
    with pytest.raises(AttributeError, match="push_in_progress"):
        CustomTrainer._push(trainer, folder, 1)


# --- Runs that something happens to ---


@SLOW
def test_run_that_is_asked_to_end_saves_its_parts_and_goes_on_to_the_bit(runs, straight):
    folder, run = runs(sabotage=lambda rank: at_update(3, signal_self(signal.SIGTERM)), code=PREEMPTED)
    assert run.steps == 3 and "checkpoint-3" in [path.name for path in checkpoints(folder)]
    runs("--resume", folder=folder)
    assert_same(folder, straight[0])


@SLOW
def test_state_that_is_gathered_to_save_it_gives_the_same(runs, straight):
    """Accelerate's other kind of checkpoint: one file, written by the first process."""
    whole = {"FSDP_STATE_DICT_TYPE": WHOLE}
    folder, _ = runs(sabotage=lambda rank: at_update(5, die), code=-signal.SIGKILL, **whole)
    assert (folder / "checkpoint-2" / MODEL_FILE).is_file()
    _, run = runs("--resume", folder=folder, code=1)
    assert "was saved by FSDP, as FULL_STATE_DICT, but this run is one by FSDP, as SHARDED" in run.last_line
    runs("--resume", folder=folder, **whole)
    assert_same(folder, straight[0])


@SLOW
def test_checkpoint_in_parts_is_not_resumed_by_a_run_that_is_not_sharded(runs, straight):
    folder = runs.copy(straight[0])
    _, run = runs("--resume", folder=folder, is_sharded=False, code=1)
    assert "saved by FSDP, as SHARDED_STATE_DICT, but this run is one without FSDP" in run.last_line
    assert "with `fsdp_state_dict_type: SHARDED_STATE_DICT`" in run.last_line and run.steps == 0


@SLOW
def test_hostile_parts_are_passed_over_when_a_run_is_resumed(runs, straight):
    folder = runs.copy(straight[0], "model.safetensors")
    marker = folder.parent / "executed"
    newest = folder / "checkpoint-6"
    (newest / MODEL_FOLDER / METADATA).write_bytes(pickle.dumps(Trap(marker)))
    manifest = json.loads((newest / MANIFEST).read_text())
    seal(newest, manifest["step"], manifest["run"])
    _, run = runs("--resume", folder=folder)
    assert not marker.exists() and "checkpoint-6 holds pytorch_model_fsdp_0/.metadata" in run.all_text
    assert_same(folder, straight[0])


@SLOW
def test_parts_without_room_leave_the_checkpoint_before(runs, straight):
    def fill(rank: int) -> None:
        if rank == 1:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            at_update(4, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1])))

    folder, run = runs(sabotage=fill, code=None)
    assert "checkpoint-4 was not saved" in run.all_text and "What was saved before is whole" in run.all_text
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    runs("--resume", folder=folder)
    assert_same(folder, straight[0])


@SLOW
def test_gradient_that_is_not_finite_in_one_half_stops_all_before_the_update(runs):
    def spoil(rank: int) -> None:
        plain, calls = CustomTrainer.compute_loss, itertools.count(1)

        def compute_loss(self, *args, **kwargs):
            loss = plain(self, *args, **kwargs)
            return loss * float("nan") if rank == 1 and next(calls) == 3 else loss

        CustomTrainer.compute_loss = compute_loss

    folder, run = runs(sabotage=spoil, code=1)
    assert run.steps == 2 and "rank 1" in run.all_text and "The weights are as before this step" in run.all_text
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"] and verify(folder / "checkpoint-2")


@SLOW
def test_best_checkpoint_in_parts_is_loaded_at_the_end_and_verified(runs):
    # The worst is the first.
    flags = ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "--greater_is_better", "true"]
    folder, _ = runs(*flags, "--metric_for_best_model", "eval_loss")
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    gathered = {"model": {name: torch.empty_like(value) for name, value in model.state_dict().items()}}
    dcp.load(gathered, checkpoint_id=Path(state["best_model_checkpoint"]) / MODEL_FOLDER, no_dist=True)
    assert all(torch.equal(gathered["model"][name], value) for name, value in model.state_dict().items())


@SLOW
def test_best_checkpoint_that_is_hostile_is_not_loaded(runs, straight):
    """A checkpoint's state names it, and it may lie anywhere."""
    folder, marker = runs.copy(straight[0]), runs.root / "executed by the best"
    hostile = folder / "elsewhere" / MODEL_FOLDER
    hostile.mkdir(parents=True)
    (hostile / METADATA).write_bytes(pickle.dumps(Trap(marker)))
    newest = folder / "checkpoint-6"
    state = json.loads((newest / "trainer_state.json").read_text())
    state |= {"best_model_checkpoint": str(hostile.parent), "best_global_step": 1, "best_metric": -1.0}
    (newest / "trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / MANIFEST).read_text())
    seal(newest, manifest["step"], manifest["run"])
    flags = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "2"]
    _, run = runs("--resume", *flags, "--metric_for_best_model", "eval_loss", folder=folder, code=1)
    assert "has no manifest.json" in run.last_line and not marker.exists()


@SLOW
def test_plan_is_runnable_as_documented(runs, straight, tmp_path):
    """Through Accelerate's launcher, from the file in the repository."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    command += ["--config_file", "training/accelerate/fsdp2.yaml", "-m", "training.run_clm", *runs.flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoint-6" / MODEL_FOLDER / METADATA).is_file()
    assert_same(tmp_path / "out", straight[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PARTS, WHOLE])
def test_killed_run_on_gpus_goes_on_to_the_bit(kind, tmp_path):
    """The same on as many GPUs as there are: `pytest -m gpu -n 0 tests/test_sharding.py`."""
    count, flags = torch.cuda.device_count(), Lab(tmp_path / "lab").flags("clm")
    flags = [flag for flag in flags if flag != "--use_cpu"] + [
        "--use_cpu",
        "false",
        "--per_device_train_batch_size",
        "2",
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "training/accelerate/fsdp2.yaml"]
    launch += ["--num_processes", str(count), "--fsdp_state_dict_type", kind, "-m", "training.run_clm", *flags]

    def run(folder: Path, *more: str) -> None:
        command = [*launch, "--output_dir", str(folder), *more]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]

    run(tmp_path / "straight")
    shutil.copytree(
        tmp_path / "straight", tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoint-6", "*.safetensors")
    )
    run(tmp_path / "cut", "--resume")
    assert_same(tmp_path / "cut", tmp_path / "straight")
