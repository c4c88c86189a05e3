"""Classification as a user runs it: labels, weights and scores checked exactly, whole runs, and refusals."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from matplotlib import pyplot as plt
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, EvalPrediction

import hf_custom
from training import run_classification
from training.args import TableArguments, parse_arguments, read_recipe
from training.labels import WeightedLoss, amounts, balanced_weights, class_numbers, find_classes
from training.plots import plot_confusion_matrix
from training.preflight import ROW
from training.run_classification import embedded_topics, score_amounts, score_classes
from training.tokenizer import train_tokenizer

RECIPES = "training/recipes/classification_{}.yaml"
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


@pytest.fixture(autouse=True)
def _stock_stays_stock():
    yield
    hf_custom.register(replace_stock=False)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder that stands for a published BERT."""
    folder = tmp_path_factory.mktemp("stock")
    tokenizer = train_tokenizer(iter([" ".join(WORDS)] * 3), "wordpiece", 300)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table(path, rows, label, seed=0):
    """Rows of words whose first one decides the label."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 10, (rows, 6))
    frame = pd.DataFrame(
        {
            "text": [" ".join(WORDS[i] for i in row[: 3 + row[5] % 3]) for row in drawn],
            "other": [WORDS[row[4]] for row in drawn],
            "label": [label(int(row[0])) for row in drawn],
        }
    )
    frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def arguments(stock, output, *flags):
    argv = ["--model_name_or_path", str(stock), "--output_dir", str(output), "--max_length", "16", "--use_cpu"]
    return [*argv, "--learning_rate", "3e-3", "--logging_steps", "2", *flags]


@pytest.fixture(scope="module")
def run(stock, tmp_path_factory):
    """The folder of a run with three labels, one of them rare, and a test split."""
    folder = tmp_path_factory.mktemp("run")
    label = ["low", "low", "low", "low", "mid", "mid", "mid", "mid", "mid", "rare"].__getitem__
    files = [table(folder / f"{split}.tsv", rows, label, rows) for split, rows in (("train", 300), ("test", 90))]
    flags = ["--files", files[0], "--test_files", files[1], "--class_weights", "balanced"]
    run_classification.main(
        arguments(stock, folder / "out", *flags, "--num_train_epochs", "8", "--early_stopping_patience", "3")
    )
    return folder


def test_run_learns_and_leaves_all(run):
    output = run / "out"
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics) == {"accuracy", "macro F1", "Matthews correlation"}
    assert metrics["accuracy"] > 0.9
    card = (output / "README.md").read_text()
    for words in ["local rows: `train.tsv`", "test, 90 rows", "rows to train on | 270", "confusion_matrix.png"]:
        assert words in card
    assert (output / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "low", "1": "mid", "2": "rare"}
    assert config["label2id"] == {"low": 0, "mid": 1, "rare": 2}


def test_saved_model_scores_as_the_run_did(run):
    """On the test split, one row at a time."""
    output = run / "out"
    pipe = transformers.pipeline("text-classification", model=str(output), device="cpu")
    assert isinstance(pipe.model, hf_custom.CustomBertForSequenceClassification)
    frame = pd.read_csv(run / "test.tsv", sep="\t")
    hits = [pipe(text)[0]["label"] == label for text, label in zip(frame["text"], frame["label"], strict=True)]
    assert json.loads((output / "metrics.json").read_text())["accuracy"] == pytest.approx(np.mean(hits))


def test_resumed_run_equals_the_straight_one(stock, tmp_path):
    file = table(tmp_path / "rows.csv", 60, lambda word: word % 2)
    flags = ["--files", file, "--per_device_train_batch_size", "8", "--save_strategy", "steps", "--save_steps", "5"]
    for name, more in (("straight", []), ("again", ["--resume_from_checkpoint", f"{tmp_path}/straight/checkpoint-10"])):
        run_classification.main(arguments(stock, tmp_path / name, *flags, "--num_train_epochs", "2", *more))
    straight, again = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "again"))
    for key, weight in straight.items():
        assert torch.equal(weight, again[key]), key


def test_pairs_and_amounts(stock, tmp_path):
    file = table(tmp_path / "rows.csv", 80, lambda word: word / 4)
    output = tmp_path / "out"
    flags = ["--second_text_column", "other", "--classifier_hidden_size", "12", "--num_train_epochs", "25"]
    run_classification.main(arguments(stock, output, "--files", file, "--validation_files", file, *flags))
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics) == {"mean squared error", "Pearson correlation"}
    assert metrics["Pearson correlation"] > 0.5 and metrics["mean squared error"] < 0.6
    config = json.loads((output / "config.json").read_text())
    assert (config["problem_type"], config["classifier_hidden_size"]) == ("regression", 12)
    assert not (output / "confusion_matrix.png").exists()
    assert AutoModelForSequenceClassification.from_pretrained(output).classifier.out_proj.weight.shape == (1, 12)


def prepare(*argv):
    return run_classification.prepare(
        *parse_arguments(run_classification.ARGUMENTS, list(argv), "", **run_classification.DEFAULTS)
    )


def test_rows_are_tokenized_as_pairs_and_cut(stock, tmp_path):
    file = table(tmp_path / "rows.csv", 30, lambda word: word % 2)
    flags = arguments(stock, tmp_path / "out", "--files", file, "--second_text_column", "other")
    prepared = prepare(*flags, "--max_length", "6")
    tokenizer = prepared.trainer.processing_class
    splits = run_classification.load_tables(TableArguments(files=[file]), embedded_topics, 42)
    for row, given in zip(prepared.rows["train"], splits["train"], strict=True):
        expected = tokenizer(given["text"], given["other"], truncation=True, max_length=6)
        assert {**expected, "labels": given["label"]} == row
        assert len(row["input_ids"]) <= 6 and 1 in row["token_type_ids"]
    batch = next(iter(prepared.trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] == max(map(len, prepared.rows["train"]["input_ids"]))


def test_amounts_choose_the_best_by_their_error(stock, tmp_path):
    file = table(tmp_path / "rows.csv", 30, lambda word: word / 4)
    flags = arguments(stock, tmp_path / "out", "--files", file, "--early_stopping_patience", "2")
    args = prepare(*flags).trainer.args
    assert (args.metric_for_best_model, args.greater_is_better) == ("mse", False)
    file = table(tmp_path / "classes.csv", 30, lambda word: word % 2)
    args = prepare(*flags, "--files", file).trainer.args
    assert (args.metric_for_best_model, args.greater_is_better) == ("accuracy", True)


def test_smoke_recipe_runs_from_nothing(tmp_path):
    output = tmp_path / "smoke"
    run_classification.main([RECIPES.format("smoke"), "--output_dir", str(output)])
    assert set(json.loads((output / "metrics.json").read_text())) == set(run_classification.CLASS_METRICS.values())
    assert "scored on | validation" in (output / "README.md").read_text()


@pytest.mark.parametrize("name", ["smoke", "sst2", "sst5"])
def test_recipe_is_understood(name):
    fields = read_recipe(RECIPES.format(name))
    parts = parse_arguments(run_classification.ARGUMENTS, [RECIPES.format(name)], "", **run_classification.DEFAULTS)
    for key, value in fields.items():
        assert getattr(next(part for part in parts if hasattr(part, key)), key) == value


def test_embedded_topics_are_six_and_share_no_paragraph():
    rows = embedded_topics()
    assert len(set(rows["label"])) == 6 and len(rows) > 500
    assert len(set(rows["text"])) == len(rows)


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([10, 9, 10, 2, 9, 2] * 2, ["2", "9", "10"]),
        (["b", "a", "b", "a"], ["a", "b"]),
        ([True, False] * 3, ["False", "True"]),
    ],
)
def test_classes_are_sorted_by_value(values, classes):
    rows = Dataset.from_dict({"label": values})
    assert find_classes(rows, "label") == classes
    assert [classes[number] for number in class_numbers(rows, "label", classes, "")] == [str(v) for v in values]


def test_classes_of_the_hub_keep_their_order():
    features = Features({"label": ClassLabel(names=["pos", "neg"])})
    rows = Dataset.from_dict({"label": [1, 1, 0]}, features=features)
    classes = find_classes(rows, "label")
    assert classes == ["pos", "neg"] and class_numbers(rows, "label", classes, "") == [1, 1, 0]
    # A file may give the same labels by name.
    assert class_numbers(Dataset.from_dict({"label": ["neg", "pos"]}), "label", classes, "") == [1, 0]


def test_hidden_labels_of_a_test_split_are_left_out(monkeypatch, capsys):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = {split: Dataset.from_dict({"text": ["x"], "label": [0]}, features=features) for split in ("train", "test")}
    rows["validation"] = rows["train"]
    rows["test"] = Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features)
    monkeypatch.setattr(run_classification, "load_tables", lambda *_: datasets.DatasetDict(rows))
    splits = run_classification.load_rows(TableArguments(), run_classification.ClassificationArguments(), 0)
    assert set(splits) == {"train", "validation"} and "hidden" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a"] * 4, "`a` in all rows"),
        ([f"text {i}" for i in range(9)], "9 different values in 9 rows"),
        ([[1], [2]], "not labels"),
    ],
)
def test_column_that_holds_no_labels_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        find_classes(Dataset.from_dict({"label": values}), "label")


def test_bad_label_of_a_drawn_row_is_found_where_it_stood():
    rows = Dataset.from_dict({"label": ["a", "c"], "y": [1.0, float("inf")], ROW: [5, 8]})
    with pytest.raises(ValueError, match="row 8 of the data has the label `c`.*those have a, b. Remove the row"):
        class_numbers(rows, "label", ["a", "b"], "the data")
    with pytest.raises(ValueError, match="row 8 of the data has inf"):
        amounts(rows, "y", "the data")


def test_amounts_are_finite_numbers():
    assert amounts(Dataset.from_dict({"y": [1, 2]}), "y", "") == [1.0, 2.0]
    with pytest.raises(ValueError, match="row 1 of the data has inf in column `y`"):
        amounts(Dataset.from_dict({"y": [1.0, float("inf")]}), "y", "the data")
    with pytest.raises(ValueError, match="holds string, but --regression"):
        amounts(Dataset.from_dict({"y": ["1"]}), "y", "the data")


def test_balanced_weights_count_classes_alike():
    numbers = [0] * 6 + [1] * 3 + [3]
    weights = balanced_weights(numbers, 4)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 0, 10 / 3])
    assert weights[torch.tensor(numbers)].mean().item() == pytest.approx(1)


def test_weighted_loss_is_the_same_however_rows_are_cut():
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(12, 3, generator=generator), torch.tensor([0.5, 1.0, 3.0])
    labels = torch.arange(12) % 3
    loss = WeightedLoss(weights)
    expected = (cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()
    assert torch.allclose(loss({"logits": logits}, labels), expected)
    parts = [loss({"logits": logits[i : i + 5]}, labels[i : i + 5], torch.tensor(12)) for i in (0, 5, 10)]
    assert torch.allclose(sum(parts), expected)


def test_accumulated_steps_weigh_as_one_batch(stock, tmp_path):
    """Through the host's Trainer: gradients of four micro-batches are those of one batch."""
    file = table(tmp_path / "rows.csv", 40, lambda word: int(word == 0))
    norms = []
    for size, steps in ((16, 1), (4, 4)):
        flags = f"--class_weights balanced --per_device_train_batch_size {size} --gradient_accumulation_steps {steps}"
        argv = arguments(stock, tmp_path / f"{size}", "--files", file, *flags.split())
        prepared = prepare(*argv, "--max_steps", "1", "--save_strategy", "no", "--logging_steps", "1")
        prepared.trainer.train()
        line = next(entry for entry in prepared.trainer.state.log_history if "loss" in entry)
        norms.append((line["loss"], line["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_scores_of_classes_exactly():
    logits = np.array([[2, 1, 0], [2, 1, 0], [0, 1, 0], [0, 1, 0]])
    scores = score_classes(EvalPrediction(logits, np.array([0, 1, 1, 1])))
    # F1: 2/3 of class 0, 4/5 of class 1, and nothing of class 2.
    assert scores["accuracy"] == 0.75 and scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 3)
    assert scores["matthews_correlation"] == pytest.approx(2 / np.sqrt(2 * 2 * 3 * 1))


def test_scores_of_amounts_exactly():
    scores = score_amounts(EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0])))
    assert scores["mse"] == pytest.approx(1 / 3)
    assert scores["pearson_correlation"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1])
    assert score_amounts(EvalPrediction(np.ones((2, 1)), np.array([1.0, 2.0])))["pearson_correlation"] == 0.0


def test_confusion_matrix_picture_shows_counts(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    plot_confusion_matrix(np.array([[3, 1], [0, 0]]), ["cost $", "free"], tmp_path / "matrix.png", "title")
    (axes, *_) = kept[0].axes
    assert [text.get_text() for text in axes.texts] == ["3", "1", "0", "0"]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("correct label", "predicted label")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


FILES = {
    "good.csv": "text,other,label\n" + "alpha,beta,a\nbeta,alpha,b\n" * 10,
    "empty.csv": "text,label\nalpha,a\nbeta,b\n  ,a\n",
    "unseen.csv": "text,label\nalpha,a\nbeta,c\n",
    "broken.csv": "text,label\nalpha,a\nbeta\n",
    "numbers.csv": "text,label\n1,a\n2,b\n",
    "amounts.csv": "text,label\nalpha,0.5\nbeta,1.5\ngamma,2.5\n",
}
# Arguments that cannot work ($ is the folder of the files above), and words that the one line of refusal must hold.
MISTAKES = {
    "column": ("--files $/good.csv --text_column body", ["no column `body`", "text, other, label", "--text_column"]),
    "label": ("--files $/good.csv --label_column y", ["no column `y`", "--label_column"]),
    "second": ("--files $/good.csv --second_text_column b", ["no column `b`", "--second_text_column"]),
    "empty": ("--files $/good.csv --validation_files $/empty.csv", ["row 2 of the validation split", "`text`"]),
    "empty drawn": ("--files $/empty.csv --validation_fraction 0.5", ["row 2 of the data", "`text`"]),
    "unseen": ("--files $/good.csv --test_files $/unseen.csv", ["row 1 of the test split", "label `c`", "a, b"]),
    "broken": ("--files $/broken.csv", ["broken.csv", "row 1 (line 3)"]),
    "numbers": ("--files $/numbers.csv", ["`text` holds int64", "--text_column"]),
    "weights": ("--class_weights rare", ["--class_weights is 'rare'"]),
    "weights of amounts": ("--class_weights balanced --regression", ["--class_weights", "--regression"]),
    "weights of floats": ("--files $/amounts.csv --class_weights balanced", ["--class_weights", "`label`"]),
    "words as amounts": ("--files $/good.csv --regression", ["string, but --regression"]),
    "hidden size": ("--files $/good.csv --stock --classifier_hidden_size 8", ["--classifier_hidden_size", "--stock"]),
    "length": ("--files $/good.csv --max_length 65", ["--max_length is 65", "64 positions"]),
    "metric": ("--files $/good.csv --metric_for_best_model f1", ["--metric_for_best_model is 'f1'", "macro_f1"]),
    "classifier": ("--model_name_or_path $run --files $/good.csv", ["not one of 2 labels"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line(kind, tmp_path, stock, run):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    flags, words = MISTAKES[kind]
    flags = flags.replace("$run", str(run / "out")).replace("$", str(tmp_path)).split()
    with pytest.raises(SystemExit) as exit_:
        run_classification.main([*arguments(stock, tmp_path / "out"), *flags])
    message = str(exit_.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "model.safetensors").exists()
