"""The recorded scores: each row names a script and a recipe that exist, and README and records say the same."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from training import reproduce
from training.args import parse_arguments

ROOT = Path(__file__).parent.parent
RECORDS = sorted((ROOT / "hub_cards" / "metrics").glob("*.json"))


@pytest.mark.parametrize("name", reproduce.ROWS)
def test_row_is_understood_by_its_script(name):
    row = reproduce.ROWS[name]
    script = __import__(f"training.{row.script}", fromlist=["ARGUMENTS"])
    recipe = str(reproduce.RECIPES / row.recipe)
    files = [word for flag, names in row.files.items() for word in (f"--{flag}", *names.split())]
    parts = parse_arguments(script.ARGUMENTS, [recipe, *files, *row.flags], "")
    expected = row.files["files"].split() if row.files else None
    assert any(part.files == expected for part in parts if hasattr(part, "files"))


def test_row_goes_on_from_an_earlier_one_without_stock():
    names = list(reproduce.ROWS)
    for name, row in reproduce.ROWS.items():
        if row.after is not None:
            assert names.index(row.after) < names.index(name) and not row.has_stock
            # A tagger goes on from the language models of another script.
            assert reproduce.ROWS[row.after].script in (row.script, "run_elmo")


def record(folder, name, **systems):
    result = {"title": name, "metric": "accuracy", "literature": "0.9 by others"}
    result |= {system: {"metrics": {"accuracy": score}} for system, score in systems.items()}
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_table_shows_what_is_recorded(tmp_path):
    record(tmp_path, "sst2", ours=0.91, stock=0.9)
    record(tmp_path, "easy_vqa", ours=0.95)
    several = json.loads((tmp_path / "sst2.json").read_text())
    several["ours"]["seeds"] = {"42": {}, "1": {}, "2": {}}
    (tmp_path / "sst2.json").write_text(json.dumps(several))
    rows = reproduce.table(tmp_path).splitlines()[2:]
    assert rows == [
        "| sst2 | accuracy | 0.910 | 0.900 | 0.9 by others; means of 3 seeds |",
        "| easy_vqa | accuracy | 0.950 |  | 0.9 by others |",
    ]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What was run, each run replaced by one that writes the same score of any metric, or a lower one for stock."""
    found = []

    def train(command, check):
        found.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        score = 0.5 if "--stock" in command else 0.75
        metrics = {row.metric: score for row in reproduce.ROWS.values() if f"training/recipes/{row.recipe}" in command}
        (folder / "metrics.json").write_text(json.dumps(metrics))

    (tmp_path / "data").mkdir()
    monkeypatch.setattr(reproduce.subprocess, "run", train)
    monkeypatch.setattr(reproduce, "METRICS", tmp_path / "metrics")
    return found


def reproduce_only(folder, *names):
    arguments = ["--data", str(folder / "data"), "--checkpoint", str(folder / "minilm")]
    reproduce.main([*arguments, "--only", *names, "--output_dir", str(folder / "runs")])


def test_both_contenders_run_alike_and_are_recorded(tmp_path, commands, capsys):
    (tmp_path / "data" / "sentiment").mkdir()
    for file in reproduce.ROWS["sst2"].files.values():
        (tmp_path / "data" / file).touch()
    reproduce_only(tmp_path, "sst2", "sst5")
    ours, stock = ([word for word in command if not word.startswith(str(tmp_path / "runs"))] for command in commands)
    assert [*ours[:-1], "--stock", ours[-1]] == stock
    result = json.loads((tmp_path / "metrics" / "sst2.json").read_text())
    assert (result["ours"]["metrics"], result["stock"]["metrics"]) == ({"accuracy": 0.75}, {"accuracy": 0.5})
    assert str(tmp_path) not in json.dumps(result)
    assert "sst5: left out, because" in capsys.readouterr().out


def test_several_seeds_are_averaged_and_kept(tmp_path, commands, monkeypatch):
    row = replace(reproduce.ROWS["tatoeba"], files={}, seeds=(3, 4, 5))
    monkeypatch.setitem(reproduce.ROWS, "tatoeba", row)
    reproduce_only(tmp_path, "tatoeba")
    seeds = [command[command.index("--seed") + 1] for command in commands]
    assert seeds == ["3", "4", "5"] * 2 and len({command[-1] for command in commands}) == 6
    assert [("--stock" in command) for command in commands] == [False] * 3 + [True] * 3
    assert not any("--model_name_or_path" in command for command in commands)
    result = json.loads((tmp_path / "metrics" / "tatoeba.json").read_text())
    for system, score in (("ours", 0.75), ("stock", 0.5)):
        assert result[system]["metrics"] == {"test BLEU": score}
        assert result[system]["seeds"] == dict.fromkeys("345", {"test BLEU": score})


def test_second_stage_goes_on_from_the_first(tmp_path, commands):
    """Neither needs a file, and the record shows the folder as it is by default."""
    reproduce_only(tmp_path, "blip2_digits_1", "blip2_digits_2")
    first, second = commands
    folder = first[first.index("--output_dir") + 1]
    assert "--model_name_or_path" not in first
    assert second[second.index("--model_name_or_path") + 1] == folder != second[second.index("--output_dir") + 1]
    result = json.loads((tmp_path / "metrics" / "blip2_digits_2.json").read_text())
    assert result["ours"] == {
        "command": "python -m training.run_blip2 training/recipes/blip2_digits_2.yaml --model_name_or_path "
        "runs/reproduce/blip2_digits_1-ours",
        "metrics": {"exact match": 0.75},
    }
    assert "stock" not in result


def test_missing_folder_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: --data .*nowhere is no folder"):
        reproduce.main(["--data", str(tmp_path / "nowhere"), "--checkpoint", "bert"])


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record_names_its_command_and_no_machine(path):
    result = json.loads(path.read_text())
    row = reproduce.ROWS[path.stem]
    for system in ("ours", "stock") if row.has_stock else ("ours",):
        command = result[system]["command"]
        assert f"training.{row.script} training/recipes/{row.recipe}" in command
        assert not re.search(r"(?<!DATA)(?<!recipes)(?<!training)/(tmp|work|home)/", command)
        assert row.metric in result[system]["metrics"]


def test_readme_shows_the_scores_that_are_kept():
    assert RECORDS
    assert reproduce.table() in (ROOT / "README.md").read_text()
