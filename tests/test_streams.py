"""Streams: a run that is interrupted in one goes on to the bit, and not in another one."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset
from datasets.iterable_dataset import ArrowExamplesIterable
from safetensors.torch import load_file
from transformers import TrainerState

import hf_custom
from tests.faults.lab import Lab, write_rows
from tests.faults.processes import at_update, die, run_script
from training import fingerprints, run_clm
from training.args import DataArguments, RunArguments, parse_arguments
from training.checkpointing import CheckpointError, checkpoints
from training.data import collate_blocks
from training.fingerprints import data_fingerprint
from training.streams import StreamPosition
from training.trainer import CustomTrainer

SLOW = pytest.mark.slow
# 22 rows in two files: six batches a pass, of which the last is short; two passes and the beginning of a third.
ROWS, STEPS = 22, 14


def write_files(folder: Path) -> list[str]:
    ids = torch.randint(32, (ROWS, 8), generator=torch.Generator().manual_seed(1)).tolist()
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    for file, rows in zip(files, (ids[:10], ids[10:]), strict=True):
        file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return [str(file) for file in files]


def stream_of(files: list[str], buffer: int | None = 0) -> IterableDataset | Dataset:
    """Rows of the files, drawn from a buffer; `None`: in a table."""
    stream = load_dataset("json", data_files=files, split="train", streaming=buffer is not None)
    return stream.shuffle(seed=3, buffer_size=buffer) if buffer else stream


def build_model():
    """Tiny, with dropout."""
    torch.manual_seed(0)
    config = hf_custom.CustomGPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return hf_custom.CustomGPT2ForCausalLM(config)


def build_trainer(folder, stream, **arguments) -> CustomTrainer:
    arguments = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": [],
        **arguments,
    }
    args = RunArguments(output_dir=str(folder), **arguments)
    return CustomTrainer(build_model(), args, collate_blocks, train_dataset=stream)


# Options of the trainer, the buffer for shuffling, and the steps after which a run is taken up again: within the first
# pass, at its end, within the second one, at its end and after it.
KINDS = {
    "in order": ({}, 0, (3, 6, 8, 12, 13)),
    "shuffled": ({}, 10, (3, 6, 13)),
    "accumulated": ({"gradient_accumulation_steps": 4}, 5, (1, 2)),
    "saved by pass": ({"save_strategy": "epoch", "gradient_accumulation_steps": 4}, 5, (1, 2)),
    "workers": ({"dataloader_num_workers": 2}, 5, (3, 6, 8)),
    "workers that stay": ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, 5, (6, 8)),
    # Rows of which all are known, with the same trouble.
    "workers that stay, no stream": (
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        None,
        (6, 8),
    ),
}
QUICK = ("shuffled", "accumulated")


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=SLOW) for kind in KINDS if kind not in QUICK)])
def test_run_goes_on_to_the_bit_wherever_in_its_stream_it_stood(kind, tmp_path):
    arguments, buffer, steps = KINDS[kind]
    arguments = {"max_steps": 5, **arguments} if "gradient_accumulation_steps" in arguments else arguments
    stream = stream_of(write_files(tmp_path), buffer)
    trainer = build_trainer(tmp_path / "straight", stream, **arguments)
    trainer.train()
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for step in steps:
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        torch.manual_seed(step)
        again = build_trainer(folder, stream_of(write_files(tmp_path), buffer), **arguments)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == trainer.state.global_step
        for name, value in again.model.state_dict().items():
            assert torch.equal(value, expected[name]), (step, name)


def main(argv: list[str]) -> None:
    """A run as above, in a process of its own: output folder, files, and what a script is told."""
    folder, *files = argv[:3]
    trainer = build_trainer(folder, stream_of(files, 10), per_device_train_batch_size=2)
    trainer.train(resume_from_checkpoint="--resume" in argv)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@SLOW
@pytest.mark.parametrize("count", [1, 2])
def test_killed_run_of_a_shuffled_stream_goes_on_to_the_bit(count, tmp_path):
    """In the second pass; two processes read it in turns, by way of the first."""
    files, numbers = write_files(tmp_path), itertools.count()

    def run(folder: Path, *flags: str, sabotage=None):
        logs = tmp_path / f"log-{next(numbers)}"
        return run_script(main, [str(folder), *files, *flags], logs, count, sabotage, limit=60)

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert run(straight).codes == [0] * count
    step = 9 if count == 2 else 14
    killed = run(cut, sabotage=lambda rank: at_update(step, die))
    assert killed.codes == [-signal.SIGKILL] * count and checkpoints(cut)
    resumed = run(cut, "--resume")
    assert resumed.codes == [0] * count and "going on from" in resumed.all_text, resumed.all_text
    assert 0 < resumed.steps < STEPS
    weights, expected = load_file(cut / "model.safetensors"), load_file(straight / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@SLOW
@pytest.mark.parametrize("count", [1, 2])
def test_killed_script_on_a_stream_goes_on_to_the_bit_and_not_on_another_one(count, tmp_path):
    """Text to blocks, an optimizer with accumulation, data workers, and a pass that ends within the run."""
    lab = Lab(tmp_path / "lab")
    text = write_rows(tmp_path / "text.jsonl", lab.rows[: 4 * count])
    flags = [*lab.flags("clm"), "--files", str(text), "--validation_files", str(lab.text), "--streaming"]
    flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "12"]
    flags += ["--shuffle_buffer", "10", "--dataloader_num_workers", "1", "--save_total_limit", "2"]
    numbers = itertools.count()

    def run(folder: Path, *more: str, sabotage=None):
        argv = [*flags, "--output_dir", str(folder), *more]
        return run_script(run_clm.main, argv, tmp_path / f"log-{next(numbers)}", count, sabotage, limit=90)

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert run(straight).codes == [0] * count
    state = json.loads((straight / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["StreamPosition"]["args"]["number"] > 0
    killed = run(cut, sabotage=lambda rank: at_update(9, die))
    assert killed.codes == [-signal.SIGKILL] * count
    change(str(text), 30, b"*")
    refused = run(cut, "--resume")
    assert refused.code == 1 and "the training data changed" in refused.last_line and refused.steps == 0
    write_rows(text, lab.rows[: 4 * count])
    resumed = run(cut, "--resume")
    assert resumed.codes == [0] * count and "going on from" in resumed.all_text, resumed.all_text
    weights, expected = load_file(cut / "model.safetensors"), load_file(straight / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


# --- Which stream it is ---


def change(file: str, start: int, content: bytes) -> None:
    """Other bytes in the place of some; as many, at the same time."""
    times = Path(file).stat()
    with open(file, "r+b") as stream:
        stream.seek(start, 2 if start < 0 else 0)
        stream.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def of_addresses(*addresses: str) -> IterableDataset:
    """A stream of remote files, of which nothing is read."""
    return IterableDataset(ArrowExamplesIterable(lambda **_: iter(()), {"files": list(addresses)}))


def test_stream_is_known_by_its_files_its_steps_and_its_first_rows(tmp_path):
    (tmp_path / "moved").mkdir()
    files, moved = write_files(tmp_path), write_files(tmp_path / "moved")
    stream = stream_of(files)
    assert data_fingerprint(stream) == data_fingerprint(stream_of(files)) == data_fingerprint(stream_of(moved))
    others = [
        stream_of(files[::-1]),
        stream_of(files[:1]),
        stream_of(files, 10),
        stream_of(files, 11),
        stream.shuffle(seed=4, buffer_size=10),
        # Not to be seen in the first rows, and not in the settings.
        stream.take(20),
        stream.take(15),
        stream.map(lambda row: {"input_ids": row["input_ids"][:4]}),
        stream.map(lambda row: {"input_ids": row["input_ids"][:5]}),
        interleave_datasets([stream_of(files[:1]), stream_of(files[1:])]),
        of_addresses("hf://datasets/corpus@1a2b/rows.parquet"),
        of_addresses("hf://datasets/corpus@3c4d/rows.parquet"),
    ]
    prints = {data_fingerprint(other) for other in others} | {data_fingerprint(stream)}
    assert len(prints) == len(others) + 1
    # Past the first rows, of the same size and at the same time.
    change(files[1], -4, b"7")
    assert data_fingerprint(stream_of(files)) not in prints


def test_table_that_is_streamed_is_known_by_its_rows():
    rows = [{"input_ids": [row]} for row in range(9)]
    streams = [Dataset.from_list(some).to_iterable_dataset() for some in (rows, rows, [*rows[:-1], rows[0]])]
    same, again, other = map(data_fingerprint, streams)
    assert same == again != other


def test_stream_that_comes_once_is_not_read():
    left = iter([{"input_ids": [row]} for row in range(3)])
    stream = IterableDataset.from_generator(lambda: left)
    assert data_fingerprint(stream) == data_fingerprint(IterableDataset.from_generator(lambda: left))
    assert len(list(stream)) == 3
    assert data_fingerprint(left) == "streamed"


@pytest.mark.parametrize(("start", "is_seen"), [(3, True), (-3, True), (40, False)])
def test_large_file_is_known_by_its_ends_and_size(start, is_seen, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE_FILE", 50)
    monkeypatch.setattr(fingerprints, "END_OF_FILE", 10)
    # The row that it makes would be seen.
    monkeypatch.setattr(fingerprints, "FIRST_ROWS", 0)
    file = tmp_path / "text.txt"

    def seen(content: str) -> str:
        file.write_text(content)
        return data_fingerprint(load_dataset("text", data_files=[str(file)], split="train", streaming=True))

    before = seen("a" * 80)
    change(str(file), start, b"b")
    assert (seen(file.read_text()) != before) == is_seen
    assert seen("a" * 81) != before


def test_run_is_not_resumed_on_a_stream_that_changed(tmp_path):
    files = write_files(tmp_path)
    build_trainer(tmp_path / "out", stream_of(files), max_steps=1).train()
    change(files[1], -4, b"7")
    again = build_trainer(tmp_path / "out", stream_of(files), max_steps=2)
    with pytest.raises(CheckpointError, match="the training data changed. Run it as it was, or pass --force_resume"):
        again.train(resume_from_checkpoint=True)
    forced = build_trainer(tmp_path / "out", stream_of(files), max_steps=2, force_resume=True)
    forced.train(resume_from_checkpoint=True)
    assert forced.state.global_step == 2


def test_checkpoint_that_does_not_say_its_pass_is_resumed_as_the_host_does():
    position, state = StreamPosition(), TrainerState(global_step=5)
    assert position.resume(state, 2, (0, 10)) == (0, 10)
    assert state.stateful_callbacks["StreamPosition"] == {"args": {"number": -1, "begun_at": 0}, "attributes": {}}
    state.stateful_callbacks["StreamPosition"]["args"] = {"number": 1, "begun_at": 3}
    assert position.resume(state, 2, (0, 10)) == (1, 4)
    # Which then is the one that begins; the next is another.
    position.on_epoch_begin(None, state, None)
    assert (position.number, position.begun_at) == (1, 3)
    position.on_epoch_begin(None, state, None)
    assert (position.number, position.begun_at) == (2, 5)


# --- By flags ---


def test_stream_is_shuffled_by_flag(tmp_path):
    lab = Lab(tmp_path / "lab")
    flags = [
        *lab.flags("clm"),
        "--streaming",
        "--validation_files",
        str(lab.text),
        "--output_dir",
        str(tmp_path / "out"),
    ]

    def rows(*more: str) -> list:
        run = run_clm.prepare(*parse_arguments(run_clm.ARGUMENTS, [*flags, *more], "", **run_clm.DEFAULTS))
        return [list(row["input_ids"]) for row in run.trainer.train_dataset]

    plain, shuffled = rows(), rows("--shuffle_buffer", "20")
    assert plain != shuffled and sorted(plain) == sorted(shuffled)
    assert shuffled == rows("--shuffle_buffer", "20") != rows("--shuffle_buffer", "20", "--data_seed", "1")


@pytest.mark.parametrize("given", [{"shuffle_buffer": 5}, {"shuffle_buffer": -1, "streaming": True}])
def test_buffer_without_a_stream_is_refused(given):
    with pytest.raises(ValueError, match="--shuffle_buffer is .* Pass --streaming with it"):
        DataArguments(**given)
