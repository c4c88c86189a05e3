"""Masked language model training as a user runs it: what it leaves, that it resumes exactly, how it refuses."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, EvalPrediction

import hf_custom
from training import run_mlm
from training.args import parse_arguments, read_recipe
from training.tokenizer import train_tokenizer

RECIPES = "training/recipes/mlm_{}.yaml"
WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(autouse=True)
def _stock_stays_stock():
    yield
    hf_custom.register(replace_stock=False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of documents in which a word tells the next one."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(24):
        sentences = [
            f"{WORDS[i % 10]} {WORDS[(i + 1) % 10]} {WORDS[(i + 2) % 10]}." for i in range(number, number + 12)
        ]
        (folder / f"{number:02}.txt").write_text(" ".join(sentences), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder that stands for a published BERT."""
    folder = tmp_path_factory.mktemp("stock")
    tokenizer = train_tokenizer(iter([" ".join(WORDS) + "."] * 3), "wordpiece", 300)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.set_seed(0)
    transformers.BertForPreTraining(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(texts, stock, output, *flags):
    common = "--block_size 32 --use_cpu --num_train_epochs 3 --logging_steps 1 --save_strategy steps --save_steps 7"
    rate = "--learning_rate 5e-3 --per_device_train_batch_size 4"
    run_mlm.main(
        ["--model_name_or_path", str(stock), "--files", str(texts), "--output_dir", str(output)]
        + [*common.split(), *rate.split(), *flags]
    )
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def straight(texts, stock, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "straight"
    losses, weights = run(texts, stock, output, "--save_total_limit", "9")
    return output, losses, weights


def test_run_learns_and_leaves_all(straight):
    output, losses, _ = straight
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics) == {"masked token loss", "masked token accuracy", "perplexity"}
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["masked token loss"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert {"README.md", "loss_curve.png", "tokenizer.json"} <= {file.name for file in output.iterdir()}
    assert "mlm_probability | 0.15" in (output / "README.md").read_text()
    assert isinstance(AutoModelForMaskedLM.from_pretrained(output), hf_custom.CustomBertForMaskedLM)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resumed_run_equals_the_straight_one(texts, stock, straight, tmp_path, workers):
    """From the middle of the second epoch, bit for bit, and with workers that live on."""
    output, losses, weights = straight
    checkpoint = output / "checkpoint-21"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert 1 < state["epoch"] < 2
    flags = ["--resume_from_checkpoint", str(checkpoint), "--dataloader_num_workers", workers]
    flags += ["--dataloader_persistent_workers", "True"] if workers != "0" else []
    again, resumed = run(texts, stock, tmp_path / "again", *flags)
    assert again == losses
    for key, weight in weights.items():
        assert torch.equal(weight, resumed[key]), key


def test_seed_changes_the_masks(texts, stock, straight, tmp_path):
    losses, _ = run(texts, stock, tmp_path / "other", "--seed", "7", "--max_steps", "2")
    assert losses != straight[1][:2]


def prepare(texts, stock, output, *flags):
    """The trainer of a run that has not begun."""
    argv = ["--model_name_or_path", str(stock), "--files", str(texts), "--output_dir", str(output), "--use_cpu"]
    return run_mlm.prepare(*parse_arguments(run_mlm.ARGUMENTS, [*argv, *flags], "", **run_mlm.DEFAULTS))


def test_each_epoch_trains_on_its_own_masks(texts, stock, tmp_path, monkeypatch):
    flags = "--block_size 32 --num_train_epochs 3 --eval_strategy no --save_strategy no --dataloader_num_workers 1"
    trainer = prepare(texts, stock, tmp_path / "out", *flags.split(), "--dataloader_persistent_workers", "True")
    seen, step = [], trainer.training_step

    def watched(model, inputs, *rest):
        rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True)
        seen.extend(ids[:length] for ids, length in rows)
        return step(model, inputs, *rest)

    monkeypatch.setattr(trainer, "training_step", watched)
    trainer.train()
    dataset = trainer.train_dataset
    assert len(seen) == 3 * len(dataset)
    for epoch in range(3):
        dataset.start_epoch(epoch)
        expected = [dataset[index]["input_ids"] for index in range(len(dataset))]
        assert sorted(expected) == sorted(seen[epoch * len(dataset) : (epoch + 1) * len(dataset)])
    assert sorted(seen[: len(dataset)]) != sorted(expected)


def by_hand(trainer):
    """Loss and accuracy of the held-out tokens, one row at a time."""
    losses, hits = [], []
    for row in (trainer.eval_dataset[index] for index in range(len(trainer.eval_dataset))):
        labels = torch.tensor(row["labels"])
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids") if name in row}
        with torch.no_grad():
            outputs = trainer.model.eval()(**inputs)
        logits = (outputs.logits if "logits" in outputs else outputs.prediction_logits)[0][labels != -100]
        losses.append(cross_entropy(logits, labels[labels != -100], reduction="none"))
        hits.append(logits.argmax(-1) == labels[labels != -100])
    return torch.cat(losses).mean().item(), torch.cat(hits).float().mean().item()


@pytest.mark.parametrize("flags", [(), ("--next_sentence",)], ids=["segments", "pairs"])
def test_metrics_are_of_all_tokens_and_stay_the_same(texts, stock, tmp_path, flags):
    """However the rows are put in batches."""
    flags = (*flags, "--block_size", "32", "--validation_fraction", "0.4", "--per_device_eval_batch_size", "5")
    trainer = prepare(texts, stock, tmp_path / "out", *flags)
    loss, accuracy = by_hand(trainer)
    for _ in range(2):
        metrics = run_mlm.measure(trainer)
        assert metrics["masked token loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["masked token accuracy"] == pytest.approx(accuracy)


def test_metrics_exactly():
    labels = np.array([[-100, 3, -100], [1, -100, 2]])
    predicted = np.array([[9, 3, 9], [0, 9, 2]])
    losses = np.array([[0.0, 1.0, 0.0], [2.0, 0.0, 6.0]])
    answers = (np.array([0, 1]), np.array([0, 0]))
    alone = run_mlm.compute_metrics(EvalPrediction((predicted, losses), labels))
    assert alone == {"masked_token_loss": 3.0, "masked_token_accuracy": 2 / 3, "perplexity": math.exp(3.0)}
    both = run_mlm.compute_metrics(EvalPrediction((predicted, losses, answers[0]), (labels, answers[1])))
    assert both == {**alone, "next_sentence_accuracy": 0.5}


def test_next_sentence_run(texts, stock, tmp_path):
    output = tmp_path / "pairs"
    _, weights = run(texts, stock, output, "--next_sentence", "--whole_word_masking", "--max_steps", "4")
    assert "cls.seq_relationship.weight" in weights
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 <= metrics["next sentence accuracy"] <= 1
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["CustomBertForPreTraining"]


def test_stock_class_scores_alike(texts, stock, tmp_path):
    """The same rows and masks."""
    flags = ("--block_size", "32", "--validation_fraction", "0.4")
    ours = prepare(texts, stock, tmp_path / "ours", *flags)
    theirs = prepare(texts, stock, tmp_path / "stock", *flags, "--stock")
    assert type(theirs.model) is transformers.BertForMaskedLM
    assert run_mlm.measure(theirs) == pytest.approx(run_mlm.measure(ours), rel=1e-5)


def test_smoke_recipe_runs_from_nothing(tmp_path):
    output = tmp_path / "smoke"
    run_mlm.main([RECIPES.format("smoke"), "--output_dir", str(output)])
    # An untrained model of 512 entries is near uniform, and four steps change little.
    assert 400 < json.loads((output / "metrics.json").read_text())["perplexity"] < 560


@pytest.mark.parametrize("name", ["smoke", "mini"])
def test_recipe_is_understood(name):
    fields = read_recipe(RECIPES.format(name))
    parts = parse_arguments(run_mlm.ARGUMENTS, [RECIPES.format(name)], "")
    for key, value in fields.items():
        assert getattr(next(part for part in parts if hasattr(part, key)), key) == value


MISTAKES = {
    "stream": ("--streaming --max_steps 1", ["--streaming"]),
    "probability": ("--mlm_probability 1.5", ["--mlm_probability is 1.5"]),
    "block": ("--block_size 65", ["--block_size is 65", "64 positions"]),
    "small block": ("--block_size 4", ["--block_size is 4"]),
    "one document": ("--files $/one.txt --next_sentence --block_size 32", ["--next_sentence", "fewer than two"]),
    "ids": ("--files $/ids.jsonl", ["no column `text`", "cannot be masked"]),
    "tokenizer": ("--tokenizer_name $/bpe", ["no `mask_token`"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line(kind, tmp_path, stock):
    (tmp_path / "one.txt").write_text("One two. Three four.\n" * 30, encoding="utf-8")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2]}\n' * 30, encoding="utf-8")
    train_tokenizer(iter(WORDS), "bpe", 300).save_pretrained(tmp_path / "bpe")
    flags, words = MISTAKES[kind]
    arguments = ["--model_name_or_path", str(stock), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    with pytest.raises(SystemExit) as exit_:
        run_mlm.main([*arguments, *flags.replace("$", str(tmp_path)).split()])
    message = str(exit_.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message
