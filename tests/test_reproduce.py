"""The recorded scores: each row names a script and a recipe that exist, and README and records say the same."""

import json
import re
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
    files = [word for flag, file in row.files.items() for word in (f"--{flag}", file)]
    parts = parse_arguments(script.ARGUMENTS, [recipe, *files, *row.flags], "")
    assert any(part.files == [row.files["files"]] for part in parts if hasattr(part, "files"))


def record(folder, name, **systems):
    result = {"title": name, "metric": "accuracy", "literature": "0.9 by others"}
    result |= {system: {"metrics": {"accuracy": score}} for system, score in systems.items()}
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_table_shows_what_is_recorded(tmp_path):
    record(tmp_path, "sst2", ours=0.91, stock=0.9)
    record(tmp_path, "easy_vqa", ours=0.95)
    rows = reproduce.table(tmp_path).splitlines()[2:]
    assert rows == [
        "| sst2 | accuracy | 0.910 | 0.900 | 0.9 by others |",
        "| easy_vqa | accuracy | 0.950 |  | 0.9 by others |",
    ]


def test_both_contenders_run_alike_and_are_recorded(tmp_path, monkeypatch, capsys):
    """The runs themselves are replaced by one that writes the scores it was asked for."""
    commands = []

    def train(command, check):
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"accuracy": 0.5 if "--stock" in command else 0.75}))

    (tmp_path / "data" / "sentiment").mkdir(parents=True)
    for file in reproduce.ROWS["sst2"].files.values():
        (tmp_path / "data" / file).touch()
    monkeypatch.setattr(reproduce.subprocess, "run", train)
    monkeypatch.setattr(reproduce, "METRICS", tmp_path / "metrics")
    arguments = ["--data", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "minilm")]
    reproduce.main([*arguments, "--only", "sst2", "sst5", "--output_dir", str(tmp_path / "runs")])
    ours, stock = ([word for word in command if not word.startswith(str(tmp_path / "runs"))] for command in commands)
    assert [*ours[:-1], "--stock", ours[-1]] == stock
    result = json.loads((tmp_path / "metrics" / "sst2.json").read_text())
    assert (result["ours"]["metrics"], result["stock"]["metrics"]) == ({"accuracy": 0.75}, {"accuracy": 0.5})
    assert str(tmp_path) not in json.dumps(result)
    assert "sst5: left out, because" in capsys.readouterr().out


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
