"""Questions about images and texts that belong to them: pairs, scores, and the script as a user runs it."""

import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BertConfig, BertModel

import hf_custom
from tests.test_images import picture, write_pair
from training import run_image_text
from training.args import ModelArguments, RunArguments, parse_arguments, read_recipe
from training.image_text import (
    DIGITS,
    NO_LABEL,
    MatchingRows,
    answers_of_questions,
    digit_questions,
    draw_pairs,
    embedded_digits,
    encode_texts,
    find_answers,
    recall_of_texts,
    score_answers,
)
from training.plots import plot_image_grid
from training.run_image_text import ImageTextArguments, keep_known_answers
from training.tokenizer import train_tokenizer

RECIPES = Path(__file__).parent.parent / "training" / "recipes"
SMOKE = str(RECIPES / "vqa_smoke.yaml")
NAMES = ["vqa_easy.yaml", "matching_digits.yaml", "vqa_smoke.yaml"]


@pytest.fixture(autouse=True)
def _stock_stays_stock():
    yield
    hf_custom.register(replace_stock=False)


def test_questions_about_a_digit_are_true():
    assert digit_questions(4, 7) == [
        ("which digit is it?", "four"),
        ("is it even?", "yes"),
        ("is it larger than four?", "no"),
        ("is it a four?", "yes"),
        ("is it a seven?", "no"),
    ]
    assert dict(digit_questions(9, 0)) == {
        "which digit is it?": "nine",
        "is it even?": "no",
        "is it larger than four?": "yes",
        "is it a nine?": "yes",
        "is it a zero?": "no",
    }


def test_embedded_questions_are_balanced():
    rows = embedded_digits("vqa")
    assert len(rows) == 5 * 1797 and len(set(rows.sources)) == 1797
    answers = Counter(rows.rows["answer"])
    assert abs(answers["yes"] - answers["no"]) < 0.02 * len(rows)
    by_question = Counter(zip(rows.rows["question"], rows.rows["answer"], strict=True))
    for digit in DIGITS:
        yes, no = (by_question[f"is it a {digit}?", answer] for answer in ("yes", "no"))
        assert 0.8 < yes / no < 1.25, digit
    captions = embedded_digits("matching")
    assert len(captions) == 1797 and set(captions.rows["caption"]) == {f"a handwritten {digit}" for digit in DIGITS}


def test_answers_are_sorted_by_frequency():
    found = ["b", "a", "c", "c", "b", "c"]
    assert find_answers(found, None) == ["c", "b", "a"] and find_answers(found, 2) == ["c", "b"]
    assert find_answers(["b", "a"], 1) == ["a"]
    assert answers_of_questions(["q", "q", "q", "r"], ["x", "y", "y", "z"]) == {"q": "y", "r": "z"}


def test_unknown_answer_counts_as_wrong():
    predicted, labels = np.array([0, 1, 0, 2]), np.array([0, 0, NO_LABEL, 2])
    scores = score_answers(predicted, labels, ["yes", "No", "purple", "red"])
    assert scores == {"accuracy": 0.5, "accuracy of yes or no": 0.5, "accuracy of other answers": 0.5}
    assert "accuracy of other answers" not in score_answers(predicted, labels, ["yes"] * 4)


def test_half_of_the_pairs_belong_together():
    texts, images = np.random.default_rng(0).integers(0, 10, 1001), np.arange(1001)
    drawn, labels = draw_pairs(images, texts, np.random.default_rng(1))
    assert (labels == 0).sum() == 500
    np.testing.assert_array_equal(drawn == texts, labels == 1)
    # Which text is offered tells nothing: all are as frequent among both kinds.
    frequencies = [np.bincount(drawn[labels == label], minlength=10) / (labels == label).sum() for label in (0, 1)]
    assert np.abs(frequencies[0] - frequencies[1]).max() < 0.08


def test_no_pair_is_false_by_mistake():
    """An image with several texts is not told that another of them does not belong."""
    images, texts = np.repeat(np.arange(30), 3), np.tile(np.arange(3), 30)
    texts[-3:] = [3, 4, 5]
    own = set(zip(images, texts, strict=True))
    for seed in range(5):
        drawn, labels = draw_pairs(images, texts, np.random.default_rng(seed))
        belongs = [pair in own for pair in zip(images, drawn, strict=True)]
        assert belongs == (labels == 1).tolist() and 0 in labels


def test_pairs_depend_on_seed_and_epoch_alone():
    encoded = {"input_ids": [[number] for number in range(4)]}
    images, texts = np.arange(40), np.arange(40) % 4

    def read(rows):
        return [(row["image"], row["input_ids"], row["labels"]) for row in (rows[i] for i in range(40))]

    train = MatchingRows(encoded, texts, images, 0, fixed=False)
    first = read(train)
    for image, ids, label in first:
        assert label == (ids == [image % 4])
    train.start_epoch(1)
    second = read(train)
    assert second != first
    again = MatchingRows(encoded, texts, images, 0, fixed=False)
    assert read(again) == first
    again.start_epoch(1)
    assert [again[i]["input_ids"] for i in reversed(range(40))] == [ids for _, ids, _ in reversed(second)]
    held_out = MatchingRows(encoded, texts, images, 0, fixed=True)
    assert read(held_out) not in (first, second) and read(held_out) == read(held_out)
    assert read(MatchingRows(encoded, texts, images, 1, fixed=False)) != first


def test_workers_that_live_on_learn_the_epoch():
    encoded = {"input_ids": [[number] for number in range(4)]}
    rows = MatchingRows(encoded, np.arange(40) % 4, np.arange(40), 0, fixed=False)
    loader = torch.utils.data.DataLoader(rows, 8, num_workers=1, persistent_workers=True, collate_fn=list)
    first = [row["labels"] for batch in loader for row in batch]
    rows.start_epoch(1)
    second = [row["labels"] for batch in loader for row in batch]
    assert second == [rows[i]["labels"] for i in range(40)] != first


def test_training_pairs_change_by_epoch(tmp_path, monkeypatch):
    """The script tells its rows the epoch."""
    epochs = []
    monkeypatch.setattr(MatchingRows, "start_epoch", lambda self, epoch: epochs.append((self.epoch.item(), epoch)))
    flags = "--task matching --max_steps 17 --eval_steps 100"
    run_image_text.main([SMOKE, *flags.split(), "--output_dir", str(tmp_path / "out")])
    assert epochs == [(0, 0), (0, 1), (0, 2)]


def test_recall_counts_the_best_own_text():
    scores = np.array([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    belongs = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    metrics = recall_of_texts(scores, belongs, (1, 2, 5))
    assert metrics["recall@1"] == pytest.approx(1 / 3) and metrics["recall@2"] == pytest.approx(2 / 3)
    assert metrics["recall@1 by chance"] == pytest.approx((1 / 4 + 2 / 4 + 1 / 4) / 3)
    assert metrics["recall@2 by chance"] == pytest.approx((1 / 2 + (1 - math.comb(2, 2) / math.comb(4, 2)) + 1 / 2) / 3)
    assert metrics["recall@5"] == metrics["recall@5 by chance"] == 1.0


def test_long_texts_are_cut_and_counted(capsys):
    tokenizer = train_tokenizer(iter(["one two three"]), "wordpiece", 300)
    encoded = encode_texts([("one two", "three"), ("one", "two")], tokenizer, 5)
    assert [len(ids) for ids in encoded["input_ids"]] == [5, 5] and encoded["token_type_ids"][1] == [0, 0, 0, 1, 1]
    assert "1 of 2 distinct texts" in capsys.readouterr().out


def test_rare_answers_leave_the_training_rows(tmp_path, capsys):
    rows = {"train": embedded_digits("vqa").select(range(50)), "test": embedded_digits("vqa").select(range(50, 100))}
    answers = keep_known_answers(rows, ImageTextArguments(num_answers=2))
    assert set(answers) == {"yes", "no"} and len(rows["train"]) == 40 and len(rows["test"]) == 50
    printed = capsys.readouterr().out
    assert "10 of 50 training rows dropped" in printed and "10 of 50 test rows count as wrong" in printed


def test_grid_has_a_place_for_each_image(tmp_path):
    for count in (1, 5):
        pixels = np.zeros((count, 3, 4, 4), dtype=np.uint8)
        plot_image_grid(pixels, ["costs $1 or $2"] * count, [True] * count, tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder that the smoke recipe leaves."""
    folder = tmp_path_factory.mktemp("run") / "smoke"
    run_image_text.main([SMOKE, "--output_dir", str(folder)])
    return folder


def test_run_leaves_model_processor_numbers_and_picture(smoke):
    files = {file.name for file in smoke.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"} <= files
    assert (smoke / "predictions.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((smoke / "metrics.json").read_text())
    parts = [metrics[f"accuracy of {name}"] for name in ("yes or no", "other answers")]
    # Four of five questions are answered by yes or no.
    assert metrics["accuracy"] == pytest.approx(0.8 * parts[0] + 0.2 * parts[1])
    assert 0.35 < metrics["accuracy from the question alone"] < 0.6
    assert "predictions.png" in (smoke / "README.md").read_text()


def test_saved_model_answers(smoke):
    model = hf_custom.CustomBertForVisualQuestionAnswering.from_pretrained(smoke).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(smoke), AutoImageProcessor.from_pretrained(smoke)
    pixels = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    inputs = {**tokenizer("is it even?", return_tensors="pt"), **processor(pixels, return_tensors="pt")}
    with torch.no_grad():
        answer = model.config.id2label[int(model(**inputs).logits.argmax())]
    assert answer in {"yes", "no", *DIGITS}


def test_digits_match_their_captions(tmp_path):
    output = tmp_path / "out"
    flags = "--task matching --max_steps 3 --gradient_accumulation_steps 2"
    run_image_text.main([SMOKE, *flags.split(), "--output_dir", str(output)])
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics) == ["accuracy", *(f"recall@{k}{how}" for k in (1, 5) for how in ("", " by chance"))]
    assert metrics["recall@1 by chance"] == pytest.approx(0.1) and metrics["recall@5 by chance"] == pytest.approx(0.5)
    model = hf_custom.CustomBertForImageTextRetrieval.from_pretrained(output)
    assert model.config.id2label == {0: "no match", 1: "match"}
    assert (output / "predictions.png").exists()


def write_colours(folder, name, count, seed):
    """Images of one colour each, the question for it, and its name."""
    rng = np.random.default_rng(seed)
    rows, colours = [], {"red": (230, 20, 20), "blue": (20, 20, 230)}
    for number in range(count):
        answer = list(colours)[number % 2]
        pixels = np.clip(np.array(colours[answer]) + rng.integers(-20, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        rows.append({"image": stream.getvalue(), "question": "which colour is it?", "answer": answer})
    pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    return str(folder / f"{name}.parquet")


def test_learns_what_only_the_image_tells(tmp_path):
    files, test_files = (write_colours(tmp_path, name, 64, seed) for seed, name in enumerate(["train", "test"]))
    flags = "--max_steps 40 --eval_strategy no --learning_rate 3e-3 --max_train_rows 999"
    run_image_text.main(
        [SMOKE, "--files", files, "--test_files", test_files, "--output_dir", str(tmp_path / "out"), *flags.split()]
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.95
    assert metrics["accuracy from the question alone"] == 0.5


def test_text_checkpoint_gets_the_patches_of_the_preset(tmp_path):
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    stock = BertModel(config)
    stock.save_pretrained(tmp_path / "stock")
    train_tokenizer(iter(["which digit is it"]), "wordpiece", 300).save_pretrained(tmp_path / "stock")
    output = tmp_path / "out"
    arguments = [SMOKE, "--model_name_or_path", str(tmp_path / "stock"), "--output_dir", str(output)]
    # A rate of nothing leaves the checkpoint's weights as they are.
    recipe = {key: value for key, value in read_recipe(SMOKE).items() if key != "config_overrides"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    run_image_text.main([str(tmp_path / "recipe.json"), *arguments[1:], "--learning_rate", "0"])
    model = hf_custom.CustomBertForVisualQuestionAnswering.from_pretrained(output)
    assert model.config.vision_config.image_shape == (64, 64)
    ours, theirs = model.state_dict(), stock.state_dict()
    kept = [key for key in theirs if f"bert.{key}" in ours and not key.startswith("pooler")]
    assert "encoder.layer.0.attention.self.query.weight" in kept
    for key in kept:
        assert torch.equal(ours[f"bert.{key}"], theirs[key]), key


def test_checkpoint_with_other_answers_is_refused(smoke, tables, tmp_path):
    arguments = ["--model_name_or_path", str(smoke), "--files", str(tables / "good.parquet"), "--max_length", "16"]
    with pytest.raises(SystemExit) as exit_:
        run_image_text.main([*arguments, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    message = str(exit_.value)
    assert message.startswith("error: the classifier in") and "2 answers" in message and "\n" not in message


# Arguments that cannot work ($ is a folder with the tables below), and words that the one line of refusal must hold.
MISTAKES = {
    "task": ("--task caption", ["task"]),
    "answers": ("--num_answers 1", ["--num_answers is 1"]),
    "length": ("--max_length 999", ["--max_length is 999", "positions"]),
    "stock": ("--stock --model_name_or_path $", ["--stock"]),
    "text preset": ("--preset bert-mini", ["reads text alone"]),
    "no caption": ("--task matching --files $/rows.parquet --caption_column words", ["`words`", "--caption_column"]),
    "one answer": ("--files $/same.parquet", ["every row", "'a'", "--answer_column"]),
    "one caption": ("--task matching --files $/same.parquet --caption_column answer", ["same text"]),
    "broken image": ("--files $/broken.parquet", ["row 1 of", "broken.parquet", "cannot be read"]),
    "no images": ("--files $/train.tsv", ["no column `image`", "--images"]),
    "lone images": ("--images $/train_images.parquet", ["--images", "--files"]),
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_pair(folder)
    images = [picture(seed) for seed in range(6)]
    good = {"image": images, "question": list("qqqqqq"), "answer": list("ababab")}
    pd.DataFrame(good).to_parquet(folder / "good.parquet")
    pd.DataFrame(good).drop(columns="question").to_parquet(folder / "rows.parquet")
    pd.DataFrame({**good, "answer": list("aaaaaa")}).to_parquet(folder / "same.parquet")
    pd.DataFrame({**good, "image": [images[0], b"broken", *images[2:]]}).to_parquet(folder / "broken.parquet")
    return folder


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line(kind, tmp_path, tables, capsys):
    flags, words = MISTAKES[kind]
    arguments = flags.replace("$", str(tables)).split()
    with pytest.raises(SystemExit) as exit_:
        run_image_text.main([*arguments, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    # The parser prints what is no choice of a flag by itself.
    message = str(exit_.value) if str(exit_.value) != "2" else capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in message and "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_rows_without_an_image_are_skipped_on_request(tmp_path, tables, capsys):
    arguments = ["--files", str(tables / "broken.parquet"), "--skip_missing_images", "--output_dir", str(tmp_path)]
    parts = parse_arguments(run_image_text.ARGUMENTS, [*arguments, "--use_cpu"], "", **run_image_text.DEFAULTS)
    run = run_image_text.prepare(*parts)
    assert sum(map(len, run.splits.values())) == 5
    assert "1 of 6 rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_understood(name):
    recipe = str(RECIPES / name)
    parts = parse_arguments((ModelArguments, ImageTextArguments, RunArguments), [recipe], "")
    for key, value in read_recipe(recipe).items():
        owner = next(part for part in parts if hasattr(part, key))
        assert getattr(owner, key) == value


def test_help_shows_both_tasks(capsys):
    with pytest.raises(SystemExit):
        run_image_text.main(["--help"])
    text = capsys.readouterr().out
    assert "--task matching" in text and "--images images.parquet" in text
