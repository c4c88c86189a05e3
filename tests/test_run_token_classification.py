"""Tagging of words: the rows, the labels of sub-tokens, the measure, and the script as a user runs it."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForTokenClassification, BertConfig, BertForTokenClassification, BertModel

import hf_custom
from training import run_token_classification
from training.args import TableArguments
from training.embedded_tasks import embedded_entities, tag_words
from training.run_token_classification import TaggingArguments, load_rows, make_compute_metrics
from training.tagging import IGNORED, encode_words, find_labels, read_tags, score_tags
from training.tokenizer import train_tokenizer

SMOKE = str(Path(__file__).parent.parent / "training" / "recipes" / "token_classification_smoke.yaml")
ROWS = [
    {"tokens": ["Ada", "Lovelace", "met", "Babbage", "in", "London", "."], "tags": "B-PER I-PER O B-PER O B-LOC O"},
    {"tokens": ["London", "is", "large", "."], "tags": "B-LOC O O O"},
    {"tokens": ["nobody", "met", "Ada", "Babbage"], "tags": "O O B-PER I-PER"},
    {"tokens": ["in", "London", "Ada", "is", "large"], "tags": "O B-LOC B-PER O O"},
]
ROWS = [{"tokens": row["tokens"], "tags": row["tags"].split()} for row in ROWS]
LABELS = ["O", "B-LOC", "B-PER", "I-PER"]


@pytest.fixture(autouse=True)
def _stock_stays_stock():
    yield
    hf_custom.register(replace_stock=False)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    """Knows all words but `Lovelace` and `Babbage`, which have three sub-tokens each."""
    words = {word for row in ROWS for word in row["tokens"]} - {"Lovelace", "Babbage"}
    pieces = ["love", "##la", "##ce", "bab", "##ba", "##ge"]
    tokenizer = train_tokenizer(iter([" ".join(sorted(words))] * 5), "wordpiece", 300)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return tokenizer


def save_stock(folder, tokenizer, model_class, **fields):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, **fields,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tokenizer):
    """A folder that stands for a published BERT."""
    return save_stock(tmp_path_factory.mktemp("stock"), tokenizer, BertModel)


def test_marks_become_tags_and_vanish():
    words, tags = tag_words('Use "a.b" or *soft keyword*, see **PEP 8** ("*" too); 2 * 3.')
    assert list(zip(words, tags, strict=True)) == [
        ("Use", "O"), ("a", "B-CODE"), (".", "I-CODE"), ("b", "I-CODE"), ("or", "O"), ("soft", "B-TERM"),
        ("keyword", "I-TERM"), (",", "O"), ("see", "O"), ("PEP", "B-TERM"), ("8", "I-TERM"), ("(", "O"),
        ("*", "B-CODE"), ("too", "O"), (")", "O"), (";", "O"), ("2", "O"), ("*", "O"), ("3", "O"), (".", "O"),
    ]  # fmt: skip


def test_embedded_entities_are_held_out_by_document():
    rows = embedded_entities()
    assert len(rows) > 500
    assert {tag for tags in rows["tags"] for tag in tags} == {"O", "B-CODE", "I-CODE", "B-TERM", "I-TERM"}
    splits = load_rows(TableArguments(), TaggingArguments(), seed=1)
    documents = {" ".join(row["tokens"]): row["document"] for row in rows}
    train, validation = ({documents[" ".join(words)] for words in splits[name]["tokens"]} for name in splits)
    assert train.isdisjoint(validation) and len(validation) == round(0.1 * len(train | validation))
    assert load_rows(TableArguments(), TaggingArguments(), seed=1)["validation"][:] == splits["validation"][:]
    assert load_rows(TableArguments(), TaggingArguments(), seed=2)["validation"][:] != splits["validation"][:]


def test_numbers_of_named_tags_are_read():
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    kind = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = [{"tokens": row["tokens"], "ner_tags": [names.index(tag) for tag in row["tags"]]} for row in ROWS]
    read = read_tags(Dataset.from_list(rows, features=kind), "train", "tokens", "ner_tags")
    assert read["tags"][:] == [row["tags"] for row in ROWS] and read["tokens"][:] == [row["tokens"] for row in ROWS]


def test_labels_are_sorted_with_o_first():
    splits = DatasetDict(train=read_tags(Dataset.from_list(ROWS), "train", "tokens", "tags"))
    assert find_labels(splits, label_all_tokens=False) == LABELS
    # The rest of a word may be inside an entity of which no second word was seen.
    assert find_labels(splits, label_all_tokens=True) == ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (False, [IGNORED, 2, 3, IGNORED, IGNORED, 0, 2, IGNORED, IGNORED, 0, 1, 0, IGNORED]),
        (True, [IGNORED, 2, 3, 3, 3, 0, 2, 3, 3, 0, 1, 0, IGNORED]),
    ],
    ids=["first", "all"],
)
def test_first_token_of_a_word_carries_its_label(tokenizer, every, expected):
    rows = Dataset.from_list(ROWS[:1])
    encoded, cut = encode_words(rows, tokenizer, LABELS, 32, every)
    pieces = tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"])
    assert pieces[1:6] == ["ada", "love", "##la", "##ce", "met"]
    assert encoded[0]["labels"] == expected and cut == 0


def test_long_rows_lose_their_last_words(tokenizer):
    encoded, cut = encode_words(Dataset.from_list(ROWS), tokenizer, LABELS, 7, False)
    # Rows of 11, 4, 6 and 5 tokens beside the two special ones.
    assert cut == 2 and [len(ids) for ids in encoded["input_ids"]] == [7, 6, 7, 7]
    assert encoded[0]["labels"] == [IGNORED, 2, 3, IGNORED, IGNORED, 0, IGNORED]


def test_scores_by_hand():
    correct = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    guess = [["B-PER", "I-PER", "O", "O"], ["I-LOC", "B-PER"]]
    # Found: PER right; LOC missed in row 0; in row 1 LOC right, but not in IOB2, and PER invented.
    assert score_tags(guess, correct) == pytest.approx(
        {
            "precision": 2 / 3,
            "recall": 2 / 3,
            "f1": 2 / 3,
            "strict f1": 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3),
            "f1 LOC": 2 / 3,
            "f1 PER": 2 / 3,
            "accuracy": 3 / 6,
        }
    )


def test_tags_that_are_no_entities_have_an_accuracy_alone():
    assert score_tags([["NOUN", "VERB"]], [["NOUN", "ADJ"]]) == {"accuracy": 0.5}


def test_ignored_places_are_not_scored():
    correct = np.array([[IGNORED, 2, 3, 0, IGNORED], [IGNORED, 1, IGNORED, IGNORED, IGNORED]])
    guess = np.array([[1, 2, 3, 0, 1], [3, 1, 2, 2, 2]])
    metrics = make_compute_metrics(LABELS)((guess, correct))
    assert metrics == {name: 1.0 for name in ("f1", "precision", "recall", "strict f1", "f1 LOC", "f1 PER", "accuracy")}


def test_smoke_recipe_leaves_labels_and_numbers(tmp_path, capsys):
    output = tmp_path / "smoke"
    run_token_classification.main([SMOKE, "--output_dir", str(output)])
    config = json.loads((output / "config.json").read_text())
    labels = ["O", "B-CODE", "B-TERM", "I-CODE", "I-TERM"]
    assert [config["id2label"][str(number)] for number in range(5)] == labels
    assert config["label2id"] == {label: number for number, label in enumerate(labels)}
    metrics = json.loads((output / "metrics.json").read_text())
    assert {"f1", "precision", "recall", "accuracy", "f1 CODE", "f1 TERM"} <= set(metrics)
    assert capsys.readouterr().out.count("rows longer than 64 tokens, whose last words are not read") == 1


def test_fine_tunes_a_stock_checkpoint_on_files(stock, tmp_path):
    """Enough steps to learn the rows by heart, so that a label at the wrong place shows."""
    rows = [{"tokens": row["tokens"], "ner_tags": row["tags"]} for row in ROWS]
    file, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "mine"
    flags = (
        "--num_train_epochs 60 --max_length 32 --use_cpu --learning_rate 0.01 --label_all_tokens --disable_tqdm True "
        "--save_strategy no --eval_strategy no"
    )
    names = ["--files", file, "--validation_files", file, "--test_files", file]
    run_token_classification.main(["--model_name_or_path", stock, *names, "--output_dir", str(output), *flags.split()])
    model = AutoModelForTokenClassification.from_pretrained(output)
    assert type(model).__name__ == "CustomBertForTokenClassification" and model.config.num_labels == 5
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["f1"] == metrics["test f1"] == metrics["accuracy"] == 1


def run_on(checkpoint, folder):
    file = write_rows(folder / "rows.jsonl", ROWS)
    names = ["--model_name_or_path", checkpoint, "--files", file, "--validation_files", file]
    flags = ["--max_steps", "1", "--max_length", "32", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no"]
    run_token_classification.main([*names, *flags, "--output_dir", str(folder / "out")])


def test_tagger_keeps_its_own_numbers(tokenizer, tmp_path):
    names = dict(enumerate(["I-PER", "O", "B-PER", "B-LOC"]))
    tagger = save_stock(tmp_path / "tagger", tokenizer, BertForTokenClassification, id2label=names)
    run_on(tagger, tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {str(k): names[k] for k in names}


def test_rows_are_scored_by_the_word_however_trained(stock, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = run_token_classification.parse_arguments(
        (
            run_token_classification.ModelArguments,
            TableArguments,
            TaggingArguments,
            run_token_classification.RunArguments,
        ),
        ["--model_name_or_path", stock, "--files", file, "--validation_files", file, "--label_all_tokens"],
        "",
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        max_length=32,
    )
    trainer, encoded = run_token_classification.prepare(*arguments)
    counts = [sum(label != IGNORED for label in encoded["validation"][row]["labels"]) for row in range(len(ROWS))]
    assert counts == [len(row["tokens"]) for row in ROWS]
    assert sum(label != IGNORED for label in trainer.train_dataset[0]["labels"]) == len(ROWS[0]["tokens"]) + 4


def test_tagger_of_other_tags_is_refused(tokenizer, tmp_path):
    tagger = save_stock(tmp_path / "tagger", tokenizer, BertForTokenClassification, num_labels=3)
    with pytest.raises(SystemExit, match="^error: the classifier in .*tagger is not one of 4 tags"):
        run_on(tagger, tmp_path)


def changed(index, **fields):
    rows = [dict(row) for row in ROWS]
    rows[index] |= fields
    return rows


# Rows and flags that cannot work ($ is a file of good rows), and words that the one line of refusal must hold.
MISTAKES = {
    "lengths": (changed(2, tags=["O"]), "--validation_files $", ["row 2 of the train data", "4 words", "1 tags"]),
    "lengths of drawn rows": (changed(2, tags=["O"]), "", ["row 2 of the ", "4 words", "1 tags"]),
    "empty": (changed(1, tokens=[], tags=[]), "--validation_files $", ["row 1 of", "nothing in column `tokens`"]),
    "half": (changed(1, tags=["O", None, "O", "O"]), "--validation_files $", ["row 1 of", "lacks a word or a tag"]),
    "unknown": (ROWS[1:2] * 2, "--validation_files $", ["row 0 of the validation data", "'B-PER'", "B-LOC, O"]),
    "odd": (changed(1, tags=["LOC", "O", "O", "O"]), "--validation_files $", ["tag 'LOC'", "`B-NAME`"]),
    "numbers": (changed(0, tags=[0] * 7)[:1] * 2, "--validation_files $", ["column `tags`", "ClassLabel"]),
    "text": ([{"tokens": "a b", "tags": "O O"}] * 2, "--validation_files $", ["column `tokens`", "list of words"]),
    "tokens": (ROWS, "--tokens_column words", ["no column `words`", "--tokens_column"]),
    "tags": (ROWS, "--tags_column labels", ["no column `labels`", "--tags_column"]),
    "no tags": ([{"tokens": ["a"]}] * 2, "", ["no column `tags`", "--tags_column"]),
    "length": (ROWS, "--max_length 65", ["--max_length is 65", "64 positions"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line(kind, stock, tmp_path):
    rows, flags, words = MISTAKES[kind]
    file, good = write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "good.jsonl", ROWS)
    output = tmp_path / "out"
    arguments = ["--model_name_or_path", stock, "--files", file, *flags.replace("$", good).split()]
    with pytest.raises(SystemExit) as exit_:
        run_token_classification.main([*arguments, "--output_dir", str(output), "--use_cpu"])
    message = str(exit_.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message
    assert not output.exists()
