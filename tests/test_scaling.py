"""The benchmark of a second process: what it compares trains alike, and its figures are what they are called."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.processes import run_script
from training.benchmarks import scaling
from training.benchmarks.scaling import CONTENDERS, JOINT, check_alike, distance, environment_of, summarize, work


def spec_of(folder, contender, **more) -> dict:
    shape = {"preset": "gpt2-mini", "device": "cpu", "steps": 3, "batch_size": 2, "length": 16, "has_proof": True}
    return {**shape, "contender": vars(contender), "folder": str(folder), **more}


def main(argv: list[str]) -> None:
    work(json.loads(argv[0]))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    folder.mkdir()
    work(spec_of(folder, CONTENDERS["one"]))
    return folder


def test_run_of_one_process_trains_and_times_all_steps_but_the_first(one):
    result = json.loads((one / "result.json").read_text())
    weights = load_file(one / "after.safetensors")
    # The first sets things up, and the last has no next one.
    assert len(result["steps"]) == 1 and result["steps"][0] > 0
    assert result["gradient_bytes"] == sum(value.nbytes for value in weights.values())
    assert distance(one, one) == 0
    start = load_file(one / "before.safetensors")
    assert all(not torch.equal(weights[name], value) for name, value in start.items() if name.endswith("c_fc.weight"))


def test_run_that_ends_elsewhere_is_refused(one, tmp_path):
    shutil.copytree(one, tmp_path / "one")
    shutil.copytree(one, tmp_path / "weak")
    assert check_alike(tmp_path, {"weak": "one"}) == {"weak": 0.0}
    weights, start = load_file(one / "after.safetensors"), load_file(one / "before.safetensors")
    # A hundredth of the way back.
    save_file(
        {name: value + 0.01 * (start[name] - value) for name, value in weights.items()},
        tmp_path / "weak" / "after.safetensors",
    )
    assert distance(tmp_path / "weak", one) == pytest.approx(0.01, rel=1e-2)
    with pytest.raises(SystemExit, match="two processes do not train as one"):
        check_alike(tmp_path, {"weak": "one"})


def test_figures_are_what_they_are_called():
    seconds = {"one": [1.0, 2.0, 9.0], "weak": [2.5], "weak, silent": [2.0], "strong": [1.25], "strong, silent": [1.0]}
    found = summarize(seconds, batch_size=4, length=100)
    assert found["one"] == {"step": 2.0, "tokens_per_second": 200.0}
    assert found["weak"] == pytest.approx({"step": 2.5, "tokens_per_second": 320.0, "efficiency": 0.8, "exchange": 0.2})
    assert found["strong"] == pytest.approx(
        {"step": 1.25, "tokens_per_second": 320.0, "efficiency": 0.8, "exchange": 0.2}
    )


def test_one_process_sees_neither_a_group_nor_a_second_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    alone, other = environment_of(0, 1, "cuda"), environment_of(1, 2, "cuda")
    assert "WORLD_SIZE" not in alone and "RANK" not in alone and alone["CUDA_VISIBLE_DEVICES"] == "3"
    assert (other["RANK"], other["LOCAL_RANK"], other["CUDA_VISIBLE_DEVICES"]) == ("1", "1", "3,5")
    assert environment_of(0, 1, "cpu")["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "3"], "two processes share it"),
        (["--steps", "2"], "a median needs"),
        (["--device", "cuda"], "needs two GPUs"),
    ],
)
def test_arguments_that_cannot_work_are_refused(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        scaling.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_as_one_unless_they_are_silent(one, tmp_path):
    shutil.copytree(one, tmp_path / "one")
    for name, contender in {"joint": JOINT, **CONTENDERS}.items():
        if name != "one":
            (tmp_path / name).mkdir()
            spec = spec_of(tmp_path / name, contender)
            run = run_script(main, [json.dumps(spec)], tmp_path / f"log {name}", contender.processes)
            assert run.codes == [0] * contender.processes, run.all_text
    check_alike(tmp_path, {"weak": "joint", "strong": "one"})
    for name in ("weak", "strong"):
        assert distance(tmp_path / f"{name}, silent", tmp_path / name) > 0.1


@pytest.mark.slow
def test_benchmark_writes_what_it_prints(tmp_path, capsys):
    scaling.main(
        ["--preset", "gpt2-mini", "--rounds", "1", "--steps", "3", "--batch_size", "2", "--length", "16"]
        + ["--output", str(tmp_path)]
    )
    content = json.loads((tmp_path / "scaling-gpt2-mini-cpu.json").read_text())
    out = capsys.readouterr().out
    for name, row in content["scaling"].items():
        assert f"{row['tokens_per_second']:,.0f} tokens/s" in out, name
    assert max(content["distances"].values()) <= scaling.TOLERANCE
    assert {name: len(values) for name, values in content["seconds"].items()} == dict.fromkeys(CONTENDERS, 1)


@pytest.mark.slow
def test_process_that_fails_ends_the_run_with_what_it_said(tmp_path):
    with pytest.raises(SystemExit, match="process . of 2 failed:\n(.|\n)*nowhere"):
        scaling.run(spec_of(tmp_path / "weak", CONTENDERS["weak"], preset="nowhere"))
