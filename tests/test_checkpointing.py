"""Checkpoints: sealed, verified, rotated, and refused when they are not what was written or not of this run."""

import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from training import run_clm
from training.checkpointing import (
    MANIFEST,
    REMOVING,
    SAVING,
    CheckpointError,
    Sealer,
    check_same_run,
    checkpoints,
    clean,
    describe_run,
    newest_verified,
    put_in_place,
    read_manifest,
    remove,
    rotate,
    seal,
    verify,
)
from training.fingerprints import data_fingerprint

RUN = {"data": "a1", "processes": 1}


def write(folder, step, weight=1.0):
    """A checkpoint of one weight, sealed."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.full((4,), weight)}, path / "model.safetensors")
    torch.save({"step": torch.tensor(step)}, path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    seal(path, step, RUN)
    return path


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def reseal(folder, **changes):
    """As somebody would who can write a manifest as well."""
    (folder / MANIFEST).unlink()
    seal(folder, 2, RUN)
    content = json.loads((folder / MANIFEST).read_text())
    content["files"].update(changes)
    (folder / MANIFEST).write_text(json.dumps(content))


def compress(file):
    """The same archive, stored so that it grows when it is read."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + bytes(2**20))


def poison(folder):
    save_file({"weight": torch.tensor([1.0, float("nan")])}, folder / "model.safetensors")
    reseal(folder)


def link_out(folder):
    (folder / "optimizer.pt").rename(folder.parent / "elsewhere.pt")
    (folder / "optimizer.pt").symlink_to(folder.parent / "elsewhere.pt")


def grow(folder):
    compress(folder / "optimizer.pt")
    reseal(folder)


def pickle_by_name(folder):
    (folder / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    reseal(folder)


def shard_elsewhere(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "../x.safetensors"}}')
    reseal(folder)


SPOILED = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "has no manifest.json"),
    "broken manifest": (lambda f: (f / MANIFEST).write_text("{"), "has a broken manifest.json"),
    "empty manifest": (lambda f: (f / MANIFEST).write_text("[]"), "has a broken manifest.json"),
    "missing file": (lambda f: (f / "optimizer.pt").unlink(), "lacks optimizer.pt"),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]),
        "bytes of model.safetensors where",
    ),
    "bit in the weights": (
        lambda f: flip_bit(f / "model.safetensors"),
        "has another model.safetensors than was written",
    ),
    "bit in the optimizer": (lambda f: flip_bit(f / "optimizer.pt"), "has another optimizer.pt than was written"),
    "added pickle": (lambda f: (f / "scheduler.pt").write_bytes(b"\x80\x04"), "holds scheduler.pt, which was not"),
    "not finite": (poison, "has numbers in weight that are not finite"),
    "link out": (link_out, "holds a link, optimizer.pt"),
    "growing archive": (grow, "holds optimizer.pt, which would grow"),
    "bare pickle": (pickle_by_name, "holds optimizer.pt, which is no archive of torch"),
    "shard elsewhere": (shard_elsewhere, "'../x.safetensors', outside its folder"),
    "file elsewhere": (
        lambda f: reseal(f, **{"../checkpoint-1/optimizer.pt": {"bytes": 1, "sha256": ""}}),
        "names '../checkpoint-1/optimizer.pt', outside",
    ),
}


def test_every_file_is_on_the_disk_before_the_manifest_that_names_it(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve()))
    folder = write(tmp_path, 1)
    names = [path.name for path in flushed]
    assert names == ["model.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST, "checkpoint-1"]
    put_in_place(folder, tmp_path / "checkpoint-9")
    assert flushed[-1] == tmp_path


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_checkpoint_is_left_for_the_one_before(kind, tmp_path):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    assert verify(bad)["step"] == 2
    spoil, message = SPOILED[kind]
    spoil(bad)
    with pytest.raises(CheckpointError, match=message):
        verify(bad)
    folder, skipped = newest_verified(tmp_path)
    assert folder == good and [name for name, _ in skipped] == ["checkpoint-2"]


def test_newest_is_that_of_the_highest_step(tmp_path):
    for step in (9, 10, 2):
        write(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 9, 10, 11)]
    folder, skipped = newest_verified(tmp_path)
    assert folder.name == "checkpoint-10" and skipped == [("checkpoint-11", skipped[0][1])]
    assert newest_verified(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize(
    ("limit", "protected", "left"),
    [
        (None, (), [1, 2, 3, 4]),
        (2, (), [3, 4]),
        (1, (), [4]),
        (2, ("checkpoint-1",), [1, 4]),
        (1, ("checkpoint-2",), [2, 4]),
        (3, (None,), [2, 3, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(limit, protected, left, tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoint-5").mkdir()
    rotate(tmp_path, limit, tuple(name and str(tmp_path / name) for name in protected))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (*left, 5)]
    assert not (tmp_path / REMOVING).exists()


def test_killed_in_the_middle_of_a_removal_nothing_half_is_left(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpointing.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "checkpoint-1")
    monkeypatch.undo()
    (tmp_path / SAVING / "checkpoint-2").mkdir(parents=True)
    assert newest_verified(tmp_path) == (
        (tmp_path / "checkpoint-1") if (tmp_path / "checkpoint-1").exists() else None,
        [],
    )
    clean(tmp_path)
    assert not (tmp_path / SAVING).exists() and not (tmp_path / REMOVING).exists()


def test_checkpoint_takes_the_place_of_one_of_its_name(tmp_path):
    old, draft = write(tmp_path, 1), write(tmp_path / SAVING, 1, weight=2.0)
    put_in_place(draft, old)
    assert load_file(old / "model.safetensors")["weight"][0] == 2 and verify(old)
    assert not draft.exists()


ROWS = [{"text": f"row {i}", "ids": list(range(i))} for i in range(25)]


def test_fingerprint_is_of_the_rows_and_their_order():
    data = Dataset.from_list(ROWS)
    same = Dataset.from_list(ROWS + ROWS[:1]).select(range(25))
    assert data_fingerprint(data) == data_fingerprint(same) == data_fingerprint(Dataset.from_list(ROWS))
    others = [ROWS[::-1], ROWS[:-1], [*ROWS[:-1], {"text": "row 24", "ids": [0, *range(2, 25)]}]]
    prints = {data_fingerprint(Dataset.from_list(rows)) for rows in others} | {
        data_fingerprint(data),
        data_fingerprint(data.shuffle(seed=1)),
        data_fingerprint(data.rename_column("ids", "input_ids")),
    }
    assert len(prints) == 6
    assert data_fingerprint(ROWS) != data_fingerprint(ROWS[::-1])


ARGS = {
    "world_size": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "seed": 42,
    "data_seed": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 2}, "`processes` changed: 1 then, 2 now"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size` changed: 8 then, 4 now"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` changed: 1 then, 2 now"),
        ({"seed": 1}, "`seed` changed: 42 then, 1 now"),
    ],
)
def test_another_run_is_refused(change, message, tmp_path):
    data = Dataset.from_list(ROWS)
    folder = write(tmp_path, 1)
    seal(folder, 1, describe_run(SimpleNamespace(**ARGS), data))
    manifest = read_manifest(folder)
    check_same_run(folder, manifest, describe_run(SimpleNamespace(**ARGS), data))
    with pytest.raises(CheckpointError, match=message):
        check_same_run(folder, manifest, describe_run(SimpleNamespace(**{**ARGS, **change}), data))
    with pytest.raises(CheckpointError, match="the training data changed. Run it as it was, or pass --force_resume"):
        check_same_run(folder, manifest, describe_run(SimpleNamespace(**ARGS), data.select(range(24))))


def test_error_while_sealing_is_raised_by_the_next_wait():
    def fail():
        raise OSError("no room")

    sealer, done = Sealer(), []
    sealer.start(fail)
    sealer.start(lambda: done.append(1))
    with pytest.raises(OSError, match="no room"):
        sealer.wait()
    sealer.start(lambda: done.append(2))
    sealer.wait()
    sealer.wait()
    assert done == [1, 2]


# --- In a run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Flags of a run of four steps with a checkpoint a step, and its folder."""
    folder = tmp_path_factory.mktemp("run") / "out"
    flags = [
        "training/recipes/clm_smoke.yaml",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--save_total_limit",
        "3",
    ]
    flags += ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end"]
    run_clm.main([*flags, "--output_dir", str(folder)])
    return flags, folder


def test_checkpoints_of_a_run_are_sealed_and_nothing_else_is_left(run):
    _, folder = run
    found = checkpoints(folder)
    assert [verify(path)["step"] for path in found] == [2, 3, 4]
    assert not (folder / SAVING).exists() and not (folder / REMOVING).exists()
    state = json.loads((found[-1] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{state['best_global_step']}")


def test_resumed_run_falls_back_says_so_and_ends_alike(run, capsys):
    flags, folder = run
    final = load_file(folder / "model.safetensors")
    flip_bit(folder / "checkpoint-4" / "model.safetensors")
    (folder / "checkpoint-3" / "scheduler.pt").unlink()
    run_clm.main([*flags, "--output_dir", str(folder), "--resume"])
    out = capsys.readouterr().out
    assert "checkpoint-4 has another model.safetensors than was written; it is left out" in out
    assert "checkpoint-3 lacks scheduler.pt; it is left out" in out
    assert f"--resume: going on from {folder / 'checkpoint-2'}" in out
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in final.items())


def test_run_with_other_batches_is_not_resumed_unless_forced(run, capsys):
    flags, folder = run
    other = [*flags, "--output_dir", str(folder), "--resume", "--per_device_train_batch_size", "2"]
    with pytest.raises(SystemExit, match="`per_device_train_batch_size` changed: 4 then, 2 now"):
        run_clm.main(other)
    run_clm.main([*other, "--force_resume"])


def test_checkpoint_that_is_named_must_be_whole(run):
    flags, folder = run
    named = folder / "checkpoint-4"
    (named / "optimizer.pt").unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="checkpoint-4 lacks optimizer.pt. Name another one"):
        run_clm.main([*flags, "--output_dir", str(folder), "--resume_from_checkpoint", str(named)])


def test_processes_that_see_different_checkpoints_do_not_go_on(run, monkeypatch):
    flags, folder = run
    monkeypatch.setattr("training.trainer.gather_object", lambda own: [*own, "elsewhere/checkpoint-1"])
    with pytest.raises(SystemExit, match="different checkpoints, .*checkpoint-. and elsewhere/checkpoint-1"):
        run_clm.main([*flags, "--output_dir", str(folder), "--resume", "--force_resume"])
