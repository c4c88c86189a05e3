"""The command `hf-custom`, and what a folder is checked for before it would leave."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import MODELS, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import hf_custom
from hf_custom import cli
from hf_custom.cards import CardRecord
from hf_custom.folders import whole_folder
from hf_custom.hub import ALLOWED, SECRETS, find_secret, plan_upload, save_model_folder, stamp_weights

ROOT = Path(__file__).parent.parent
CAUSAL = next(row for row in MODELS if row.name == "CustomGPT2ForCausalLM")
RECORD = CardRecord("tiny", "three lines", metrics={"tiny": {"loss": 1.5}})


@pytest.fixture
def folder(tmp_path):
    return save_model_folder(tmp_path / "model", CAUSAL.build(), tokenizer(), RECORD)


def run(*words):
    cli.main([str(word) for word in words])


def error_of(*words):
    """The one line that a mistake ends with."""
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def test_command_is_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"hf-custom": "hf_custom.cli:main"}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    out = capsys.readouterr().out
    assert end.value.code == 0 and f"examples:\n  hf-custom {command} " in out


def test_examples_are_understood():
    parser = cli.build_parser()
    assert list(cli.COMMANDS) == ["push", "export", "convert", "card", "inspect", "look", "serve"]
    for name, command in cli.COMMANDS.items():
        for example in command.examples:
            assert parser.parse_args([name, *example.split()]).run is command.run


def test_dry_run_lists_what_would_leave(folder, capsys):
    (folder / "checkpoint-1").mkdir()
    (folder / "train.log").write_text("loss 1.0")
    run("push", folder, "me/tiny", "--dry-run")
    out = capsys.readouterr().out
    sent, left_out = out.split("left out: ")
    assert left_out == "checkpoint-1/, train.log\nnothing was sent\n"
    names = [line.split()[0] for line in sent.splitlines()[:-1]]
    assert set(names) == {path.name for path in folder.iterdir()} - {"checkpoint-1", "train.log"}
    size = sum((folder / name).stat().st_size for name in names)
    assert f"{len(names)} files, {size:,} bytes" in sent


def test_export_writes_what_stock_reads(folder, tmp_path, capsys):
    run("export", folder, tmp_path / "stock")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "stock")
    assert model.state_dict().keys() == AutoModelForCausalLM.from_pretrained(folder).state_dict().keys()
    assert type(AutoTokenizer.from_pretrained(tmp_path / "stock")).__name__ == "GPT2Tokenizer"
    assert "is not an empty folder" in error_of("export", folder, tmp_path / "stock")
    run("export", folder, tmp_path / "stock", "--overwrite")


def test_export_of_what_stock_cannot_express_is_refused(tmp_path):
    model = CAUSAL.build(position_embedding_type="rope")
    save_model_folder(tmp_path / "rope", model, tokenizer(), RECORD)
    assert "position_embedding_type" in error_of("export", tmp_path / "rope", tmp_path / "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["rope"]


def test_convert_writes_a_model(tmp_path):
    run("convert", ROOT / "tests" / "fixtures" / "openai_gpt2", tmp_path / "ours")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is hf_custom.CustomGPT2ForCausalLM
    assert "of no known format" in error_of("convert", ROOT / "LICENSE", tmp_path / "other")


def test_card_is_rendered_again(folder, capsys):
    (folder / "README.md").unlink()
    run("card", folder)
    assert "| tiny | 1.5 |" in (folder / "README.md").read_text()
    run("card", folder, "--repository", "me/tiny", "--revision", "3f2a90c")
    assert '("me/tiny", revision="3f2a90c"' in capsys.readouterr().out


def test_inspect_describes(folder, capsys):
    run("inspect", folder, "--batch-size", 2, "--length", 16, "--dtype", "bfloat16")
    out = capsys.readouterr().out
    assert "CustomGPT2ForCausalLM" in out and f"{CAUSAL.build().num_parameters():,}" in out


def test_serve_gets_the_options_behind_the_model(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "serve", lambda *arguments: calls.append(arguments))
    run("serve", "me/tiny", "--port", "9000", "--device", "cpu")
    assert calls == [("me/tiny", ["--port", "9000", "--device", "cpu"])]


MISTAKES = {
    "no folder": (("push", "nowhere", "me/tiny"), "nowhere is no folder"),
    "no model": (("inspect", ROOT / "tests"), "has no config.json"),
    "no record": (("card", ROOT / "tests" / "fixtures"), "has no config.json"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line(kind):
    words, message = MISTAKES[kind]
    assert message in error_of(*words)


def test_traceback_is_there_on_request(monkeypatch):
    monkeypatch.setenv("HF_CUSTOM_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run("push", "nowhere", "me/tiny")


# --- What may leave ---


def test_folder_without_record_needs_to_be_told(folder):
    (folder / "card.json").unlink()
    assert "has no card.json" in error_of("push", folder, "me/tiny", "--dry-run")
    run("push", folder, "me/tiny", "--dry-run", "--without-card")


def spoil_json(folder):
    (folder / "tokenizer_config.json").write_text("{")


SPOILED = {
    "token in the configuration": (
        lambda f: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), "note": "hf_" + "Ab1" * 12})
        ),
        "config.json holds what looks like a Hugging Face token",
    ),
    "token in the code": (
        lambda f: (f / "ops.py").write_text(f'KEY = "sk-{"a1" * 20}"\n'),
        "ops.py holds what looks like an OpenAI or Anthropic key",
    ),
    "token in a picture": (
        lambda f: (f / "curve.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"tEXt hf_" + b"Ab1" * 12),
        "curve.png holds what looks like a Hugging Face token",
    ),
    "broken JSON": (spoil_json, "tokenizer_config.json is no JSON"),
    "broken code": (lambda f: (f / "ops.py").write_text("def"), "ops.py cannot be read as py"),
    "a pickle by another name": (lambda f: (f / "vocab.txt").write_bytes(b"\x80\x04\x95"), "vocab.txt cannot be read"),
    "a picture that is none": (lambda f: (f / "curve.png").write_bytes(b"\x80\x04\x95"), "curve.png is no PNG"),
    "weights that are none": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04\x95" * 40),
        "model.safetensors is no safetensors file",
    ),
    "pickles alone": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "holds its weights as pickles alone",
    ),
    "a link out": (
        lambda f: ((f / "ops.py").unlink(), (f / "ops.py").symlink_to(__file__)),
        "ops.py is a link to .*test_cli.py, outside",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_folder_is_not_pushed(kind, folder):
    spoil, message = SPOILED[kind]
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message):
        plan_upload(folder)


def test_own_token_is_found_whatever_it_looks_like(folder):
    (folder / "README.md").write_text("my correct horse battery")
    plan_upload(folder)
    with pytest.raises(ValueError, match="README.md holds what looks like your own token"):
        plan_upload(folder, tokens=("correct horse battery",))


EXAMPLES = {
    "a Hugging Face token": "hf_" + "aB3" * 11,
    "a GitHub token": "ghp_" + "a1" * 18,
    "an OpenAI or Anthropic key": "sk-ant-" + "a1" * 16,
    "an AWS key": "AKIA" + "A1" * 8,
    "a Google key": "AIza" + "a" * 35,
    "a Slack token": "xoxb-" + "1" * 24,
    "a private key": "-----BEGIN RSA PRIVATE KEY-----",
}


def test_each_kind_of_secret_is_found():
    assert EXAMPLES.keys() == SECRETS.keys()
    for owner, secret in EXAMPLES.items():
        assert find_secret(f'{{"a": "{secret}"}}'.encode()) == owner
    # What looks alike in code and vocabularies.
    assert find_secret(b"hf_custom hf_hub_download task-aware self_attention_mask_of_the_decoder sk-learn") is None


def test_stamp_says_what_wrote_the_weights_and_changes_none(folder, tmp_path):
    source, target = folder / "model.safetensors", tmp_path / "stamped.safetensors"
    stamp_weights(source, target)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt", "transformers": transformers.__version__, "torch": torch.__version__}
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    stamp_weights(target, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == target.read_bytes()


def test_shards_that_no_index_names_stay(folder):
    (folder / "model-00001-of-00002.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert plan_upload(folder).left_out == ["model-00001-of-00002.safetensors"]


def test_only_kinds_of_the_table_leave(folder):
    for name in (
        ".env",
        "training_args.bin",
        "optimizer.pt",
        "rows.csv",
        "trainer_state.json",
        "notes.txt",
        "a.safetensors.tmp",
    ):
        (folder / name).write_bytes(b"x")
    plan = plan_upload(folder)
    assert len(plan.left_out) == 7
    assert {kind for _, kind, _ in plan.files} <= set(ALLOWED.values())


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "there"
    with pytest.raises(RuntimeError), whole_folder(target) as draft:
        (draft / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(target) as draft:
        (draft / "a").write_text("first")
    with pytest.raises(FileExistsError, match="is not an empty folder"), whole_folder(target):
        pass
    with pytest.raises(RuntimeError), whole_folder(target, overwrite=True) as draft:
        raise RuntimeError
    assert (target / "a").read_text() == "first"
    with whole_folder(target, overwrite=True) as draft:
        (draft / "b").write_text("second")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "b"]
