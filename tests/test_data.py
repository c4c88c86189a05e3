"""From files to blocks of ids, and the refusal of files that cannot be trained on."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from training.data import (
    check_text_file,
    check_token_ids,
    collate_blocks,
    embedded_corpus,
    find_files,
    load_files,
    load_text,
    split_held_out,
    token_stream,
    tokenize_blocks,
)
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
