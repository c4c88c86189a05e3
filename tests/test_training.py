"""The training scripts as a user runs them: what they leave, and how they refuse a mistake."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import hf_custom
from training import (
    quickstart,
    run_blip2,
    run_classification,
    run_clm,
    run_elmo,
    run_image_text,
    run_mlm,
    run_qa,
    run_token_classification,
    run_translation,
    run_word2vec,
)
from training.args import DataArguments, ModelArguments, parse_arguments, read_recipe
from training.tokenizer import train_tokenizer
from training.trainer import CustomTrainer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "training" / "recipes").iterdir())
SMOKE = str(ROOT / "training" / "recipes" / "clm_smoke.yaml")
PLANS = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _stock_stays_stock():
    yield
    hf_custom.register(replace_stock=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder that the smoke recipe leaves."""
    folder = tmp_path_factory.mktemp("run") / "smoke"
    run_clm.main([SMOKE, "--output_dir", str(folder), "--save_strategy", "steps", "--save_steps", "2"])
    return folder


def test_run_leaves_model_code_card_curve_and_numbers(smoke):
    files = {file.name for file in smoke.iterdir()}
    assert {"model.safetensors", "modeling_gpt2.py", "README.md", "loss_curve.png", "tokenizer.json"} <= files
    metrics = json.loads((smoke / "metrics.json").read_text())
    card = ModelCard.load(smoke / "README.md")
    on_card = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert on_card == metrics and set(metrics) == {"perplexity", "bits per byte"}
    # An untrained model of 512 entries is near uniform, and four steps change little.
    assert 300 < metrics["perplexity"] < 520
    assert f"{metrics['perplexity']:.4g}" in card.text
    assert (smoke / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_run_logs_tokens_per_second(smoke):
    history = json.loads((smoke / "trainer_state.json").read_text())["log_history"]
    lines = [entry for entry in history if "loss" in entry]
    assert len(lines) == 4 and all(entry["tokens_per_second"] > 0 for entry in lines)
    assert [entry["num_input_tokens_seen"] for entry in lines] == [256, 512, 768, 1024]
    assert any("eval_loss" in entry for entry in history)


def test_saved_model_loads_and_continues(smoke):
    model = AutoModelForCausalLM.from_pretrained(smoke)
    tokenizer = AutoTokenizer.from_pretrained(smoke)
    assert type(model) is hf_custom.CustomGPT2ForCausalLM and type(tokenizer) is transformers.GPT2Tokenizer
    ids = model.generate(**tokenizer("The statement", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == len(tokenizer("The statement")["input_ids"]) + 3


def test_resumed_run_equals_the_straight_one(smoke, tmp_path):
    checkpoint = str(smoke / "checkpoint-2")
    run_clm.main([SMOKE, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", checkpoint])
    straight, resumed = (load_file(folder / "model.safetensors") for folder in (smoke, tmp_path / "again"))
    assert straight.keys() == resumed.keys()
    for key, weight in straight.items():
        assert torch.equal(weight, resumed[key]), key


def test_predictions_keep_the_order_of_rows_where_training_groups_by_length(tmp_path):
    config = hf_custom.CustomGPT2Config(
        vocab_size=64, n_embd=8, n_layer=1, n_head=1, n_positions=32, num_labels=12, bos_token_id=0, eos_token_id=0
    )
    config.pad_token_id = 0
    rows = Dataset.from_list([{"input_ids": [1] * (1 + 5 * i % 12), "labels": i} for i in range(12)])
    args = TrainingArguments(
        tmp_path, per_device_eval_batch_size=2, train_sampling_strategy="group_by_length", use_cpu=True, report_to=[]
    )
    collator = DataCollatorWithPadding(train_tokenizer(iter(["one two"]), "bpe", 300))
    trainer = CustomTrainer(hf_custom.CustomGPT2ForSequenceClassification(config), args, data_collator=collator)
    assert trainer.predict(rows).label_ids.tolist() == list(range(12))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder that stands for the published `gpt2`."""
    folder = tmp_path_factory.mktemp("stock")
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    train_tokenizer(iter(["one two three four\n"]), "bpe", 300).save_pretrained(folder)
    return folder


def test_fine_tunes_a_stock_checkpoint_on_files(stock, tmp_path):
    """As the README says, with a stock folder in place of the name `gpt2`."""
    texts = tmp_path / "my_texts"
    texts.mkdir()
    (texts / "a.txt").write_text("one two three four\n" * 80, encoding="utf-8")
    flags = "--num_train_epochs 2 --block_size 32 --use_cpu --warmup_steps 0 --learning_rate 0.01 --logging_steps 1"
    output = tmp_path / "mine"
    run_clm.main(
        ["--model_name_or_path", str(stock), "--files", str(texts), "--output_dir", str(output), *flags.split()]
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model) is hf_custom.CustomGPT2ForCausalLM
    losses = [
        entry["loss"]
        for entry in json.loads((output / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert losses[-1] < losses[0]
    assert "local text: `my_texts`" in (output / "README.md").read_text()


def test_streams_files(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"row {i} of the text"}) + "\n" for i in range(200)), encoding="utf-8")
    output = tmp_path / "out"
    files = ["--files", str(text), "--validation_files", str(text), "--streaming"]
    run_clm.main([SMOKE, *files, "--vocab_size", "300", "--max_steps", "2", "--output_dir", str(output)])
    assert set(json.loads((output / "metrics.json").read_text())) == {"loss"}


def test_ids_train_without_a_tokenizer_of_ours(smoke, tmp_path):
    ids = tmp_path / "ids.jsonl"
    rows = [{"input_ids": list(range(i % 7, 64))} for i in range(60)]
    ids.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output = tmp_path / "out"
    run_clm.main([SMOKE, "--files", str(ids), "--tokenizer_name", str(smoke), "--output_dir", str(output)])
    assert set(json.loads((output / "metrics.json").read_text())) == {"loss"}


BAD_FILES = {
    "empty.txt": b"",
    "latin1.txt": "Grüße\n".encode("latin1") * 100,
    "rows.csv": b"body\nx\n",
    "ids.jsonl": b'{"input_ids": [1, 2, 3]}\n' * 40 + b'{"input_ids": [9999]}\n',
    "typo.yaml": b"learning_rat: 1.0\n",
    "broken.json": b"{",
}
# Arguments that cannot work ($ is the folder of the files above), and words that the one line of refusal must hold.
MISTAKES = {
    "empty": ("--files $/empty.txt", ["empty.txt is empty"]),
    "encoding": ("--files $/latin1.txt", ["not UTF-8", "line 1", "iconv"]),
    "column": ("--files $/rows.csv", ["no column `text`", "body", "--text_column"]),
    "missing": ("--files nowhere.txt", ["nowhere.txt does not exist"]),
    "block": ("--block_size 9999", ["--block_size is 9999", "256 positions"]),
    "override": ("--config_overrides n_heads=3", ["n_heads", "did you mean `n_head`"]),
    "divisor": ("--config_overrides n_head=5", ["`n_head` (5) does not divide"]),
    "item": ("--config_overrides n_head", ["field=value"]),
    "preset": ("--preset gpt3", ["'gpt3' is unknown", "gpt2-mini"]),
    "stream": ("--streaming", ["--max_steps"]),
    "fraction": ("--validation_fraction 2", ["--validation_fraction is 2.0"]),
    "recipe": ("$/typo.yaml", ["learning_rat", "Did you mean `learning_rate`?"]),
    "broken recipe": ("$/broken.json", ["cannot be read"]),
    "no recipe": ("$/none.yaml", ["No such file"]),
    "ids": (
        "--files $/ids.jsonl --tokenizer_name $tokenizer --block_size 4",
        ["row 40 ", "token id 9999", "vocabulary of"],
    ),
    "ids without tokenizer": ("--files $/ids.jsonl", ["--tokenizer_name"]),
    "override of a checkpoint": ("--model_name_or_path $tokenizer --config_overrides n_head=4", ["--config_overrides"]),
    "checkpoint": ("--model_name_or_path $/none", ["none"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line(kind, tmp_path, smoke):
    flags, words = MISTAKES[kind]
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    arguments = flags.replace("$tokenizer", str(smoke)).replace("$", str(tmp_path)).split()
    with pytest.raises(SystemExit) as exit_:
        run_clm.main([*arguments, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    message = str(exit_.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_mistake_ends_the_program_itself(monkeypatch):
    """As `python -m` runs it; Python prints the text of such an end without a traceback."""
    monkeypatch.setattr(sys, "argv", ["run_clm", "--files", "nowhere.txt"])
    monkeypatch.delitem(sys.modules, "training.run_clm")
    with pytest.raises(SystemExit, match="^error: .*nowhere.txt"):
        runpy.run_module("training.run_clm", run_name="__main__")


def test_help_shows_how_to_launch(capsys):
    with pytest.raises(SystemExit):
        run_clm.main(["--help"])
    text = capsys.readouterr().out
    for word in ["torchrun --nproc_per_node 2", *(f"training/accelerate/{plan.name}" for plan in PLANS), "--files"]:
        assert word in text


# Script by the start of its recipes' names.
SCRIPTS = {
    "clm": run_clm,
    "mlm": run_mlm,
    "classification": run_classification,
    "token_classification": run_token_classification,
    "qa": run_qa,
    "translation": run_translation,
    "vqa": run_image_text,
    "matching": run_image_text,
    "blip2": run_blip2,
    "elmo": run_elmo,
    "lstm": run_elmo,
    "word2vec": run_word2vec,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_is_understood(recipe):
    fields = read_recipe(str(recipe))
    script = next(script for start, script in SCRIPTS.items() if recipe.name.startswith(start))
    parts = parse_arguments(script.ARGUMENTS, [str(recipe)], "")
    for key, value in fields.items():
        owner = next(part for part in parts if hasattr(part, key))
        assert getattr(owner, key) == value


def test_flags_override_the_recipe():
    arguments = [SMOKE, "--max_steps", "7", "--vocab_size", "333"]
    model, _, training = parse_arguments((ModelArguments, DataArguments, TrainingArguments), arguments, "")
    assert (model.vocab_size, training.max_steps, training.per_device_train_batch_size) == (333, 7, 4)


def test_launch_plans_are_what_accelerate_reads():
    kinds = {plan.stem: str(load_config_from_file(str(plan)).distributed_type.value) for plan in PLANS}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
    fsdp = yaml.safe_load((ROOT / "training" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_transformer_layer_cls_to_wrap"] in hf_custom.CustomGPT2PreTrainedModel._no_split_modules


def test_quickstart_runs_whole_and_says_when_it_loses(tmp_path, capsys):
    status = quickstart.main([SMOKE, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert status == 1 and "did NOT beat both baselines" in printed and "equal logits" in printed
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(rows) == ["gpt2-mini", "bigram model, same tokenizer", "xz of the held-out text"]
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    for row in rows.values():
        assert f"{row['bits per byte']:.4g}" in card
    assert {path.name for path in (tmp_path / "out" / "model").iterdir()} >= {"loss_curve.png", "ops.py", "config.json"}


def test_quickstart_does_not_stream():
    with pytest.raises(SystemExit, match="^error: the quickstart counts its whole text"):
        quickstart.main(["--streaming"])


def test_quickstart_wins_by_the_numbers(monkeypatch, tmp_path):
    """The exit status follows the table, not the run."""
    rows = {
        "gpt2-mini": {"perplexity": 2.0, "bits per byte": 1.0},
        "bigram": {"bits per byte": 1.1},
        "xz": {"bits per byte": 2.0},
    }
    score = quickstart.TextScore(1.0, 1, 1)
    monkeypatch.setattr(quickstart, "measure", lambda run: (rows, score))
    monkeypatch.setattr(quickstart, "check_runs_alone", lambda *arguments: None)
    assert quickstart.main([SMOKE, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]) == 0


def test_readme_python_runs(smoke, stock):
    """With local folders in place of the published and of the trained model."""
    text = (ROOT / "README.md").read_text().replace('"gpt2"', repr(str(stock)))
    blocks = re.findall(r"```python\n(.*?)```", text.replace("runs/quickstart/model", str(smoke)), flags=re.DOTALL)
    classes = []
    for block in blocks:
        variables = {}
        exec(block, variables)
        classes.append(type(variables["model"]))
    causal = hf_custom.CustomGPT2ForCausalLM
    assert classes == [causal, causal, causal, hf_custom.CustomBertForVisualQuestionAnswering]


@pytest.mark.parametrize("page", ["README.md", "docs/classics.md", "docs/distributed.md"])
def test_commands_of_a_page_exist(page):
    """Scripts, files and recipes that it names are there."""
    text = (ROOT / page).read_text()
    for path in re.findall(r"`((?:docs|hf_custom|hub_cards|tests|training)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for name, path in re.findall(r"`(\w+)[\w.]*` in `([\w/.]+)`", text):
        assert name in (ROOT / path).read_text(), f"{name} in {path}"
