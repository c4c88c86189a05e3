"""From files to blocks of ids, and the refusal of files that cannot be trained on."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from training.args import TableArguments
from training.data import (
    check_token_ids,
    collate_blocks,
    embedded_corpus,
    find_files,
    load_files,
    load_tables,
    load_text,
    split_held_out,
    token_stream,
    tokenize_blocks,
)
from training.file_rows import check_table_file, check_text_file
from training.preflight import ROW, check_columns, row_of_the_data
from training.tokenizer import train_tokenizer

TEXTS = ["One is the first.\n", 'Two, "quoted",\nwith a line break.\n', "Drei: Grüße, 数, 🙂\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS * 5), "bpe", 320)


def test_embedded_corpus_repeats_no_paragraph():
    paragraphs = [" ".join(paragraph.split()) for text in embedded_corpus()["text"] for paragraph in text.split("\n\n")]
    assert len(paragraphs) > 1000
    assert len(set(paragraphs)) == len(paragraphs)


def test_held_out_text_is_not_trained_on():
    splits = load_text(seed=1)
    train = set(splits["train"]["text"])
    assert len(splits["validation"]) == 8
    assert train.isdisjoint(splits["validation"]["text"])
    assert len(train) + 8 == len(embedded_corpus())
    assert load_text(seed=1)["validation"]["text"] == splits["validation"]["text"]
    assert load_text(seed=2)["validation"]["text"] != splits["validation"]["text"]


def test_few_long_documents_give_their_ends():
    text = "".join(f"line {i}\n" for i in range(100))
    splits = split_held_out(datasets.Dataset.from_dict({"text": [text]}), "text", 0.2, seed=0)
    (head,), (tail,) = splits["train"]["text"], splits["validation"]["text"]
    assert head + tail == text
    assert head.endswith("\n") and 0.75 * len(text) < len(head) <= 0.8 * len(text)


def write(folder, ending):
    path = folder / f"data{ending}"
    frame = pd.DataFrame({"text": TEXTS})
    if ending in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    elif ending == ".parquet":
        frame.to_parquet(path)
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    elif ending == ".json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    else:
        path.write_text("".join(TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_rows_of_every_format_load(tmp_path, ending, streaming):
    rows = load_files([str(write(tmp_path, ending))], streaming)
    assert [row["text"] for row in rows] == TEXTS


def test_text_files_of_a_folder_are_a_row_each(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.txt").write_text("b\n\nb\n", encoding="utf-8")
    (tmp_path / "inner" / "a.md").write_text("a\n", encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert load_files([str(tmp_path)])["text"] == ["b\n\nb\n", "a\n"]


def test_validation_files_are_used_as_they_are(tmp_path):
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    train.write_text("train\n", encoding="utf-8")
    held_out.write_text("held out\n", encoding="utf-8")
    splits = load_text(files=[str(train)], validation_files=[str(held_out)])
    assert splits["train"]["text"] == ["train\n"] and splits["validation"]["text"] == ["held out\n"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b" \n\t\n", ["is empty"]),
        (b"good\nbad \xe9 byte", ["not UTF-8", "0xe9", "line 2", "byte 5", "iconv"]),
        (b"x" * (1 << 20) + b"\nab\xff", ["line 2", "byte 3"]),
        ("cut off é".encode()[:-1], ["middle of a UTF-8 character"]),
    ],
    ids=["empty", "blank", "latin1", "second chunk", "cut"],
)
def test_bad_text_file_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        check_text_file(str(path))
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_character_across_chunks_is_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"x" * ((1 << 20) - 1) + "é".encode())
    check_text_file(str(path))


def test_bad_paths_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "b.csv").write_text("text\nb\n", encoding="utf-8")
    (tmp_path / "c.doc").write_text("c", encoding="utf-8")
    (tmp_path / "nothing").mkdir()
    for paths, word in [
        (["missing.txt"], "does not exist"),
        (["c.doc"], "unknown ending"),
        (["a.txt", "b.csv"], "different formats"),
        (["nothing"], "holds no data file"),
    ]:
        with pytest.raises(ValueError, match=word):
            find_files([str(tmp_path / path) for path in paths])


def test_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no column `body`; its columns are text"):
        load_text(files=[str(write(tmp_path, ".csv"))], column="body")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}, {"text": None}], ["row 1 ", "no text in column `text`"]),
        ([{"text": 1}, {"text": 2}], ["column `text` holds int64", "--text_column"]),
    ],
    ids=["missing", "numbers"],
)
def test_column_without_text_is_refused(tmp_path, rows, words):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_text(files=[str(path)])
    assert all(word in str(error.value) for word in words)


def test_stream_without_held_out_text_is_refused():
    with pytest.raises(ValueError, match="--validation_files"):
        load_text(streaming=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_blocks_are_the_documents_with_end_tokens(tokenizer, streaming):
    rows = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3]})
    rows = rows.to_iterable_dataset() if streaming else rows
    blocks = list(tokenize_blocks(rows, tokenizer, "text", block_size=7, vocab_size=len(tokenizer)))
    stream = [i for text in TEXTS for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert all(list(block) == ["input_ids"] for block in blocks)
    assert np.concatenate([block["input_ids"] for block in blocks]).tolist() == stream[: len(stream) // 7 * 7]


def test_ids_are_taken_as_they_are(tokenizer):
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6, 7]]})
    blocks = tokenize_blocks(rows, tokenizer, "text", block_size=3, vocab_size=8)
    assert blocks["input_ids"] == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_id_outside_the_vocabulary_names_its_row(tokenizer, streaming):
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 1200 + [[3, 8]]})
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(ValueError, match="row 1200 .* token id 8, .* vocabulary of 8"):
        list(tokenize_blocks(rows, tokenizer, "text", block_size=2, vocab_size=8))


def test_negative_id_and_empty_row():
    check_token_ids([[], [0]], 1, rows=[0, 1])
    with pytest.raises(ValueError, match="row 4 .* token id -1"):
        check_token_ids([[0], [0, -1]], 1, rows=[3, 4])


def test_text_that_fills_no_block_is_refused(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["short"]})
    with pytest.raises(ValueError, match="fills no block of 64"):
        tokenize_blocks(rows, tokenizer, "text", block_size=64, vocab_size=len(tokenizer))


def test_token_stream_starts_each_document_with_the_end_token(tokenizer):
    rows = [{"text": text} for text in TEXTS]
    stream = token_stream(rows, tokenizer, "text").tolist()
    assert stream == [i for text in TEXTS for i in [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]]


def test_collated_labels_are_the_ids():
    batch = collate_blocks([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert torch.equal(batch["labels"], batch["input_ids"]) and batch["labels"] is not batch["input_ids"]


BROKEN_TABLES = {
    "few fields": ("t.csv", "a,b\n1,2\n\n3\n", ["row 1 (line 4)", "1 fields", "header has 2"]),
    "many fields": ("t.tsv", "a\tb\n1\t2\n1\t2\t3\n", ["row 1 (line 3)", "3 fields"]),
    "open quote": ("t.csv", 'a,b\n"1\n2",2\n3,"4\n5,6\n', ["row 1 (line 4)", "unbalanced quote"]),
    "quote closed by another": ("t.csv", 'a,b\n1,"2\n3,"4"\n', ["row 0 (line 2)", "unbalanced quote"]),
    "header only": ("t.csv", "a,b\n", ["no rows"]),
    "jsonl": ("t.jsonl", '{"a": 1}\n\n{"a": \n', ["row 1 (line 3)", "not JSON"]),
    "json": ("t.json", '[{"a": 1}, {"a": ', ["cannot be read as json"]),
    "text": ("t.txt", "a\n", ["plain text"]),
}


@pytest.mark.parametrize("kind", BROKEN_TABLES)
def test_broken_table_is_refused_by_file_and_row(tmp_path, kind):
    name, content, words = BROKEN_TABLES[kind]
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_tables(TableArguments(files=[str(path)]), None, 0)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_quotes_that_are_right_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n"x, ""y""\nz",2\n5" disk,3\n', encoding="utf-8")
    check_table_file(str(path))
    assert load_files([str(path)])["a"] == ['x, "y"\nz', '5" disk']


def numbered(folder, name, count):
    path = folder / name
    path.write_text("text,n\n" + "".join(f"row {i},{i}\n" for i in range(count)), encoding="utf-8")
    return [str(path)]


def test_tables_are_split_and_limited_by_seed(tmp_path):
    arguments = TableArguments(files=numbered(tmp_path, "t.csv", 40), validation_fraction=0.25, max_train_rows=20)
    splits = load_tables(arguments, None, seed=1)
    train, validation = splits["train"]["n"], splits["validation"]["n"]
    assert len(train) == 20 and len(validation) == 10 and set(train).isdisjoint(validation)
    assert load_tables(arguments, None, seed=1)["train"]["n"] == train
    assert load_tables(arguments, None, seed=2)["validation"]["n"] != validation
    # Rows that were drawn know where they stood.
    for rows in splits.values():
        assert [row_of_the_data(rows, index) for index in range(len(rows))] == rows["n"]


def test_splits_that_are_given_stay_as_they_are(tmp_path):
    paths = [numbered(tmp_path, f"{name}.csv", count) for name, count in (("a", 5), ("b", 3), ("c", 2))]
    splits = load_tables(TableArguments(files=paths[0], validation_files=paths[1], test_files=paths[2]), None, 0)
    assert {name: rows["n"] for name, rows in splits.items()} == {
        "train": [0, 1, 2, 3, 4],
        "validation": [0, 1, 2],
        "test": [0, 1],
    }
    assert all(ROW not in rows.column_names for rows in splits.values())


def test_tables_of_the_hub_keep_their_splits(monkeypatch):
    rows = datasets.Dataset.from_dict({"n": list(range(10))})
    hub = datasets.DatasetDict(train=rows, test=rows, unlabelled=rows)
    monkeypatch.setattr("training.data.load_dataset", lambda *_: hub)
    splits = load_tables(TableArguments(dataset_name="someone/data"), None, 0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 9, "validation": 1, "test": 10}
    with pytest.raises(ValueError, match="no split `train`; it has test"):
        del hub["train"], hub["unlabelled"]
        load_tables(TableArguments(dataset_name="someone/data"), None, 0)


def test_tables_of_nothing_are_the_embedded_ones():
    rows = datasets.Dataset.from_dict({"n": list(range(20))})
    splits = load_tables(TableArguments(), lambda: rows, 0)
    assert sorted([*splits["train"]["n"], *splits["validation"]["n"]]) == list(range(20))
    assert TableArguments().description("words") == "words"
    assert TableArguments(files=["a/b.csv"]).description("words") == "local rows: `b.csv`"
    with pytest.raises(ValueError, match="one row cannot be split"):
        load_tables(TableArguments(), lambda: rows.select([0]), 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"validation_fraction": 1.0}, "--validation_fraction is 1.0"),
        ({"max_length": 3}, "--max_length is 3"),
        ({"max_train_rows": 0}, "--max_train_rows is 0"),
        ({"test_files": ["t.csv"]}, "Name --files"),
    ],
)
def test_table_arguments_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        TableArguments(**fields)


@pytest.mark.parametrize("value", [None, "", " \t", []], ids=["none", "empty", "blank", "list"])
def test_row_with_nothing_in_a_column_is_refused(value):
    other = ["x"] if value == [] else "x"
    rows = datasets.Dataset.from_dict({"a": [other, other, value, value], "b": [1, 2, 3, 4]})
    check_columns(rows, {"b_column": "b"})
    with pytest.raises(ValueError, match="row 2 of the test split has nothing in column `a`"):
        check_columns(rows, {"b_column": "b", "a_column": "a"}, "the test split")
    # After a choice of rows, the place in it.
    with pytest.raises(ValueError, match="row 1 of the data"):
        check_columns(rows.select([1, 2]), {"a_column": "a"})
    # Of rows that know where they stood, that place.
    with pytest.raises(ValueError, match="row 7 of the data"):
        check_columns(rows.add_column(ROW, [9, 8, 7, 6]), {"a_column": "a"})


def test_number_that_is_missing_is_refused():
    rows = datasets.Dataset.from_dict({"a": [1.0, float("nan")]})
    with pytest.raises(ValueError, match="row 1 of the data has nothing in column `a`"):
        check_columns(rows, {"a_column": "a"})


def test_missing_column_names_the_flag_and_hides_our_own():
    rows = datasets.Dataset.from_dict({"a": [1], ROW: [0]})
    with pytest.raises(ValueError, match="no column `b`; its columns are a. Name the right one with --b_column."):
        check_columns(rows, {"b_column": "b"})
