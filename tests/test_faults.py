"""The faults that a run must survive, injected and graded; and that the grades can be bad."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults import __main__ as command
from tests.faults import lab as laboratory
from tests.faults.checkpoint_damage import HOSTILE, fill_with_nan, flip_bit
from tests.faults.lab import STEPS, Lab, Lost, weights_hash, write_rows
from tests.faults.processes import at_update, die, hang, run_script, signal_self
from tests.faults.rows import bad_row
from tests.faults.table import FAULTS, Outcome, grade

ROOT = Path(__file__).parent.parent
# Told in seconds: a save cut short, a flipped bit, nothing to resume, a plan that would be another.
QUICK = (3, 12, 15, 24)
OTHERS = tuple(fault.number for fault in FAULTS if fault.number not in QUICK)


def outcomes_of(numbers: tuple[int, ...], folder: Path, limit: float) -> dict[int, dict]:
    """What the table says of some faults, by number; from a process that has not run anything else."""
    command = [sys.executable, "-m", "tests.faults", "--json", folder / "faults.json", "--only", *map(str, numbers)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    assert result.returncode in (0, 1), result.stderr[-3000:]
    found = json.loads((folder / "faults.json").read_text())["faults"]
    assert [outcome["number"] for outcome in found] == sorted(numbers)
    return {outcome["number"]: outcome for outcome in found}


@pytest.fixture(scope="module")
def quick_outcomes(tmp_path_factory):
    return outcomes_of(QUICK, tmp_path_factory.mktemp("quick"), 120)


@pytest.fixture(scope="module")
def other_outcomes(tmp_path_factory):
    return outcomes_of(OTHERS, tmp_path_factory.mktemp("others"), 1200)


@pytest.mark.parametrize("number", QUICK)
def test_fault_is_survived(number, quick_outcomes):
    assert quick_outcomes[number]["survived"], quick_outcomes[number]["outcome"]


def test_readme_shows_the_recorded_table():
    results = json.loads((ROOT / "tests" / "faults" / "results.json").read_text())
    assert [found["number"] for found in results["faults"]] == [fault.number for fault in FAULTS]
    assert [found["fault"] for found in results["faults"]] == [fault.title for fault in FAULTS]
    assert results["survived"] == sum(found["survived"] for found in results["faults"])
    assert command.brief(results) in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", OTHERS)
def test_other_fault_is_survived(number, other_outcomes):
    assert other_outcomes[number]["survived"], other_outcomes[number]["outcome"]


def test_table_has_each_number_once():
    assert [fault.number for fault in FAULTS] == list(range(1, 41))


# From here on: the harness itself, on a script that is no more than its updates.
def toy(argv: list[str]) -> None:
    """Makes `--updates`, prints `--words`, leaves weights that `--seed` decides, and ends with `--status`."""
    flags = dict(zip(argv[:-1], argv[1:], strict=True))
    folder = Path(flags["--output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    for _ in range(int(flags.get("--updates", STEPS))):
        weight.grad = torch.ones(2)
        optimizer.step()
    print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"))
    if "--words" in flags:
        print(flags["--words"])
    save_file({"weight": torch.full((2,), float(flags.get("--seed", 0)))}, folder / "model.safetensors")
    sys.exit(int(flags.get("--status", 0)))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    for script in ("clm", "own"):
        monkeypatch.setitem(laboratory.SCRIPTS, script, (toy, None))
    return Lab(tmp_path / "lab")


# Flags of a resumed toy run that made 4 updates before, and what its grade must be.
RESUMED = {
    "exact": ("--updates 4", None),
    "other weights": ("--updates 4 --seed 1", "other weights"),
    "steps lost": ("--updates 1", "1 steps of 6 were never made"),
    "too many again": ("--updates 6", "exact, but 4 steps made again where 2 may be"),
    "failed": ("--updates 4 --status 3", "resuming failed"),
    "silent": ("--updates 4 --words nothing", "does not say 'checkpoint-4'"),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_run_is_graded(kind, lab):
    flags, words = RESUMED[kind]
    arguments = lab.folder(), 4, *flags.split(), *([] if "--words" in flags else ["--words", "checkpoint-4"])
    if words is None:
        assert lab.resumed(*arguments, says=("checkpoint-4",)) == "exact; 2 steps made again"
    else:
        with pytest.raises(Lost, match=words):
            lab.resumed(*arguments, says=("checkpoint-4",))


def test_hang_is_cut_and_lost(lab):
    start, folder = time.perf_counter(), lab.folder()

    def sabotage(rank):
        (folder.parent / "pid").write_text(str(os.getpid()))
        # A process that hangs may also ignore all signals but one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        at_update(2, hang)

    with pytest.raises(Lost, match="a hang, cut after 1 s"):
        lab.run(folder, sabotage=sabotage, limit=1.0)
    assert time.perf_counter() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder.parent / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("action", "code"), [(die, -signal.SIGKILL), (signal_self(signal.SIGTERM), -signal.SIGTERM)], ids=["kill", "term"]
)
def test_signal_ends_the_run_in_the_midst_of_a_step(action, code, lab):
    run = lab.run(lab.folder(), sabotage=lambda rank: at_update(3, action))
    assert run.code == code and run.steps == 2


def test_sabotage_ends_with_its_process(lab):
    plain = torch.optim.AdamW.step
    lab.run(lab.folder(), sabotage=lambda rank: at_update(1, die))
    assert torch.optim.AdamW.step is plain


def test_processes_know_their_places(tmp_path):
    def sabotage(rank):
        if rank == 1:
            at_update(1, die)

    run = run_script(toy, ["--output_dir", str(tmp_path / "out")], tmp_path / "logs", 2, sabotage)
    assert run.codes == [0, -signal.SIGKILL] and run.steps == STEPS
    assert "rank 0 of 2" in run.text[0] and run.text[1] == ""


REFUSALS = {
    "said": ("--status 1 --updates 0 --words error:row_13", None),
    "silent": ("", "went on in silence for 6 steps"),
    "late": ("--status 1 --updates 2 --words error:row_13", "ended after 2 steps"),
    "unclear": ("--status 1 --updates 0 --words error:no", "refused without saying 'row_13'"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusal_is_graded(kind, lab):
    flags, words = REFUSALS[kind]
    run = lab.run(lab.folder(), *flags.split())
    if words is None:
        assert lab.refused(run, "row_13") == "refused: error:row_13"
    else:
        with pytest.raises(Lost, match=words):
            lab.refused(run, "row_13")


def test_bad_row_that_is_trained_on_is_lost(lab):
    with pytest.raises(Lost, match="went on in silence"):
        bad_row({"input_ids": []})(lab)


def test_fault_that_cannot_be_injected_is_lost(lab):
    def inject(lab):
        (lab.root / "none").read_text()

    found = grade(replace(FAULTS[0], inject=inject), lab)
    assert not found.survived and "could not be injected" in found.outcome


def test_hash_is_of_the_tensors_alone(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    files = {
        "same": tensors,
        "other order": dict(reversed(tensors.items())),
        "one bit": {**tensors, "a": torch.nextafter(tensors["a"], torch.tensor(9.0))},
        "other shape": {**tensors, "b": torch.ones(3, 2)},
        "other name": {"a": tensors["a"], "c": tensors["b"]},
    }
    hashes = {}
    for name, content in files.items():
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors", {"note": name})
        hashes[name] = weights_hash(tmp_path / name)
    assert hashes["same"] == hashes["other order"]
    assert len(set(hashes.values())) == 4


def test_damage_is_done(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    flip_bit("model.safetensors")(tmp_path)
    after = (tmp_path / "model.safetensors").read_bytes()
    assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1
    fill_with_nan(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes()[-4:] == b"\0\0\xc0\x7f"


@pytest.mark.parametrize("name", ["optimizer archive", "optimizer pickle"])
def test_trap_springs_where_it_is_loaded_carelessly(name, tmp_path):
    marker = tmp_path / "executed"
    HOSTILE[name](tmp_path, marker)
    if name == "optimizer pickle":
        pickle.loads((tmp_path / "optimizer.pt").read_bytes())
    else:
        torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert marker.is_dir()


def test_table_is_printed_with_its_outcomes():
    outcome = Outcome(7, "fault", "how", "want", "a | b\nc " + "x" * 300, False, 1.25)
    lines = command.table([outcome]).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| 7 | fault | how | a / b c xxx")
    assert lines[2].endswith("… | no | 1.2 |") and lines[2].count("|") == 7


def test_unknown_number_ends_in_one_line(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "41"])
    assert "no fault has number 41; they go from 1 to 40" in capsys.readouterr().err


def test_rows_are_written_a_line_each(tmp_path):
    rows = [{"text": "a\nb"}, {"text": "ü"}]
    lines = write_rows(tmp_path / "rows.jsonl", rows).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
