"""Bad rows and settings that cannot work: refused by row before the first step, or set aside and counted."""

import base64
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from test_images import picture

import hf_custom
from training import (
    preflight,
    run_blip2,
    run_classification,
    run_clm,
    run_elmo,
    run_image_text,
    run_mlm,
    run_qa,
    run_token_classification,
    run_word2vec,
)
from training.args import parse_arguments
from training.blip2_rows import PromptCollator
from training.data import load_files, load_text, tokenize_blocks
from training.preflight import (
    ROW,
    Origin,
    Quarantine,
    check_dtypes,
    check_examples,
    check_precision,
    prepare_padding,
    storable,
)
from training.qa_rows import read_questions
from training.tagging import find_labels, read_tags
from training.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


def lines(*rows):
    """JSON lines; bytes stay as they are."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def text_rows(count=24):
    return [{"text": f"{WORDS[i % 10]} {i}"} for i in range(count)]


def with_bad(row, at, rows=None):
    """Good rows with a bad one among them."""
    rows = text_rows() if rows is None else rows
    return lines(*rows[:at], row, *rows[at:])


ANSWERS = [{"answers": {"text": ["a"], "answer_start": [i]}} for i in range(6)]
CSV = "text,n\n" + "".join(f"word {i},{i}\n" for i in range(30))
# Name and content of a file, the bad row, the kind of fault, words of the refusal, and the row as it is set aside.
FILES = {
    "broken json": ("r.jsonl", with_bad(b'{"text": "a', 3), 3, "not JSON", ["row 3 (line 4)"], '{"text": "a'),
    "blank lines": ("r.jsonl", b"\n\n" + with_bad(b"{", 5), 5, "not JSON", ["row 5 (line 8)"], "{"),
    "same name": ("r.jsonl", with_bad(b'{"text": "a", "text": "b"}', 3), 3, "not JSON", ["row 3 ", "'text'"], None),
    "huge number": ("r.jsonl", with_bad(b'{"text": 1e999}', 3), 3, "not JSON", ["row 3 ", "1e999"], None),
    "no object": ("r.jsonl", with_bad(["a"], 2), 2, "not an object", ["row 2 ", "is a list"], '["a"]'),
    "latin1 json": (
        "r.jsonl",
        with_bad(b'{"text": "Gr\xfc\xdfe"}', 7),
        7,
        "not UTF-8",
        ["row 7 (line 8)", "0xfc is its byte 13", "iconv"],
        {"base64": base64.b64encode(b'{"text": "Gr\xfc\xdfe"}').decode()},
    ),
    "half a pair": ("r.jsonl", with_bad(b'{"text": "\\ud83d"}', 1), 1, "not UTF-8", ["row 1 "], '{"text": "\\ud83d"}'),
    "drift": (
        "r.jsonl",
        with_bad({"text": 5}, 700, text_rows(900)),
        700,
        "type drift",
        ["row 700 (line 701)", "has a number in column `text`, which has text in row 0"],
        '{"text": 5}',
    ),
    "drift at the start": ("r.jsonl", with_bad({"text": [1]}, 0), 0, "type drift", ["row 0 ", "a list of"], None),
    "drift inside": (
        "r.jsonl",
        with_bad({"answers": {"text": ["a"], "answer_start": ["x"]}}, 4, ANSWERS),
        4,
        "type drift",
        ["row 4 ", "a list of text in column `answers.answer_start`, which has a list of a number"],
        None,
    ),
    "json list": (
        "r.json",
        json.dumps([*text_rows(), {"text": 1}]).encode(),
        24,
        "type drift",
        ["row 24 has a number"],
        '{"text": 1}',
    ),
    "fields": (
        "r.csv",
        b"text,n\na,1\nb\nc,3\n",
        1,
        "wrong number of fields",
        ["row 1 (line 3)", "1 fields but the header has 2"],
        "b",
    ),
    "open quote": (
        "r.csv",
        b'text,n\na,1\n"b,2\nc,3\n"d\nd",4\n',
        1,
        "unbalanced quote",
        ["row 1 (line 3)", "unbalanced quote"],
        '"b,2',
    ),
    "latin1 csv": (
        "r.csv",
        b"text,n\na,1\n\xe9,2\n",
        1,
        "not UTF-8",
        ["row 1 (line 3)", "0xe9 is its byte 1"],
        {"base64": base64.b64encode(b"\xe9,2").decode()},
    ),
    "drift in csv": (
        "r.csv",
        (CSV + "more,many\n").encode(),
        30,
        "type drift",
        ["row 30 (line 32)", "has text in column `n`, which has a number in row 0", "JSON lines"],
        "more,many",
    ),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def aside(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", FILES)
def test_bad_row_of_a_file_is_refused_by_number_or_set_aside(kind, tmp_path, capsys):
    name, content, bad, reason, words, raw = FILES[kind]
    path, out = tmp_path / name, tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_files([str(path)])
    assert all(word in str(error.value) for word in [str(path), "--quarantine FILE", *words]), error.value

    quarantine = Quarantine(str(out))
    origin = quarantine.origin("train")
    rows = load_files([str(path)], origin=origin)
    assert not out.exists()
    quarantine.finish()
    (record,) = aside(out)
    assert (record["file"], record["row"], record["reason"]) == (str(path), bad, reason)
    assert raw is None or record["content"] == raw
    total = dict(origin.files)[str(path)]
    assert capsys.readouterr().out.strip() == f"quarantine: 1 of {total} rows set aside in {out}: 1 {reason}"
    # The others are all there, and know where they stood.
    assert rows[ROW][:] == [row for row in range(total) if row != bad]
    streamed = load_files([str(path)], streaming=True, origin=Quarantine(str(out)).origin("train"))
    assert list(streamed) == rows.remove_columns(ROW).to_list()
    assert len(list((tmp_path / "cache" / "without_bad_rows").iterdir())) == 1


def test_rows_after_an_open_quote_are_read(tmp_path):
    path = tmp_path / "r.csv"
    path.write_bytes(FILES["open quote"][1])
    rows = load_files([str(path)], origin=Quarantine(str(tmp_path / "bad.jsonl")).origin("train"))
    assert rows["text"] == ["a", "c", "d\nd"] and rows["n"] == [1, 3, 4]


def test_columns_that_are_not_trained_on_may_drift(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = [{"text": f"a {i}", "note": i} for i in range(30)]
    path.write_bytes(lines(*rows, {"text": "b", "note": "n"}))
    splits = load_text(files=[str(path)])
    assert len(splits["train"]) + len(splits["validation"]) == 31


def test_csv_column_of_numbers_and_words_is_text_through_the_whole_file(tmp_path):
    """The host takes the kind of the first 10,000 rows for all."""
    path = tmp_path / "r.csv"
    path.write_text("a\n" + "1\n" * 10_500 + "one\n" * 1000)
    values = load_files([str(path)])["a"]
    assert values[0] == "1" and values[-1] == "one"


def test_rows_of_several_files_are_found_in_their_own(tmp_path):
    first, second, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "bad.jsonl"
    first.write_bytes(with_bad(b"{", 2))
    second.write_bytes(with_bad({"text": " "}, 4))
    for flags, words in (([second, first], ["a.jsonl: row 2 "]), ([first], ["a.jsonl: row 2 "])):
        with pytest.raises(ValueError) as error:
            load_text(files=list(map(str, flags)))
        assert all(word in str(error.value) for word in words)
    quarantine = Quarantine(str(out))
    splits = load_text(files=[str(first), str(second)], quarantine=quarantine)
    quarantine.finish()
    assert [(record["file"], record["row"]) for record in aside(out)] == [(str(first), 2), (str(second), 4)]
    assert sorted([*splits["train"][ROW], *splits["validation"][ROW]]) == [i for i in range(50) if i not in (2, 29)]
    # Where rows were left out before it, a row that is refused still has its own number.
    origin = Origin("the data", Quarantine(), quarantine.origin("train").files, [2])
    assert origin.say(29) == f"row 29 of the data ({second}, row 4)"
    assert [origin.number(index) for index in (0, 1, 2, 28)] == [0, 1, 3, 29]
    assert origin.numbers(4).tolist() == [0, 1, 3, 4]


def test_text_files_that_cannot_be_read_are_set_aside(tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in (("a.txt", b"good\n"), ("b.txt", b"\xe9\n"), ("c.txt", b" \n"), ("d.txt", b"too\n")):
        (tmp_path / "in" / name).write_bytes(content)
    out = tmp_path / "out" / "bad.jsonl"
    quarantine = Quarantine(str(out))
    assert load_files([str(tmp_path / "in")], origin=quarantine.origin("train"))["text"] == ["good\n", "too\n"]
    quarantine.finish()
    assert [(record["file"][-5:], record["reason"]) for record in aside(out)] == [
        ("b.txt", "not UTF-8"),
        ("c.txt", "empty"),
    ]


def test_quarantine_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(lines(*text_rows(3)))
    with pytest.raises(ValueError, match="is a folder"):
        Quarantine(str(tmp_path))
    for own in (tmp_path / "r.jsonl", tmp_path / "in" / "bad.jsonl"):
        with pytest.raises(ValueError, match="lies in the data"):
            load_files([str(tmp_path)], origin=Quarantine(str(own)).origin("train"))
    (tmp_path / "r.jsonl").write_bytes(b"{\n{\n")
    with pytest.raises(ValueError, match="no row of .*r.jsonl is left"):
        load_files([str(tmp_path / "r.jsonl")], origin=Quarantine(str(tmp_path / "q")).origin("train"))


def test_other_processes_leave_out_the_same_and_write_nothing(tmp_path, capsys):
    path, out = tmp_path / "r.jsonl", tmp_path / "bad.jsonl"
    path.write_bytes(with_bad(b"{", 2))
    found = []
    for is_main in (False, True):
        quarantine = Quarantine(str(out), is_main)
        found.append(load_files([str(path)], origin=quarantine.origin("train"))[:])
        quarantine.finish()
        assert out.exists() == is_main and bool(capsys.readouterr().out) == is_main
    assert found[0] == found[1]
    assert [file.name for file in tmp_path.iterdir() if "bad" in file.name] == ["bad.jsonl"]


GOOD = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [-100, 2, 9]}
CLASS = {"input_ids": [1, 2, 3], "labels": 1}
PLACE = {"input_ids": [1, 2, 3], "start_positions": 0, "end_positions": 2}
# A good row, what makes it bad, the kind of fault, and words of the refusal.
EXAMPLES = {
    "id": (GOOD, {"input_ids": [1, 10, 3]}, "id outside the vocabulary", ["token id 10", "vocabulary of 10"]),
    "negative id": (GOOD, {"input_ids": [1, -2, 3]}, "id outside the vocabulary", ["token id -2"]),
    "missing id": (GOOD, {"input_ids": [1, None, 3]}, "id outside the vocabulary", ["holds what is no token id"]),
    "empty": (GOOD, {"input_ids": [], "attention_mask": [], "labels": []}, "empty", ["nothing in column `input_ids`"]),
    "missing": (GOOD, {"input_ids": None}, "empty", ["nothing in column `input_ids`"]),
    "long": ({"input_ids": [1] * 4}, {"input_ids": [1] * 5}, "too long", ["5 tokens", "the 4 that"]),
    "ragged": (GOOD, {"attention_mask": [1, 1]}, "ragged", ["3 `input_ids` but 2 `attention_mask`"]),
    "ragged labels": (GOOD, {"labels": [1] * 4}, "ragged", ["3 `input_ids` but 4 `labels`"]),
    "label": (GOOD, {"labels": [-100, 2, 10]}, "label out of range", ["label 10", "0 to 9"]),
    "negative label": (GOOD, {"labels": [-1, 2, 3]}, "label out of range", ["label -1"]),
    "ignored": (GOOD, {"labels": [-100] * 3}, "nothing to learn", ["-100 for all"]),
    "class": (CLASS, {"labels": 3}, "label out of range", ["label 3", "0 to 2"]),
    "hidden class": (CLASS, {"labels": -1}, "label out of range", ["label -1"]),
    "amount": ({**CLASS, "labels": 0.5}, {"labels": float("nan")}, "label out of range", ["nan in column `labels`"]),
    "place": (PLACE, {"end_positions": 3}, "position out of range", ["3 in column `end_positions`", "0 to 2"]),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_bad_example_is_refused_by_number_or_set_aside(kind, streaming, tmp_path, capsys, monkeypatch):
    good, change, reason, words = EXAMPLES[kind]
    monkeypatch.setattr(preflight, "BATCH_ROWS", 8)
    rows = datasets.Dataset.from_list([good] * 1003 + [{**good, **change}] + [good] * 5)
    bad, rows = rows[1003], rows.to_iterable_dataset() if streaming else rows
    limits = {"vocab_size": 10, "max_length": 4, "num_labels": 3 if good is CLASS else None}
    with pytest.raises(ValueError) as error:
        list(check_examples(rows, **limits))
    assert all(word in str(error.value) for word in ["row 1003 of the data", *words]), error.value

    out = tmp_path / "bad.jsonl"
    kept = check_examples(rows, **limits, quarantine=str(out))
    for _ in range(2 if streaming else 1):
        assert list(kept) == [datasets.Dataset.from_list([good])[0]] * 1008
    (record,) = aside(out)
    assert (record["file"], record["row"], record["reason"]) == ("the data", 1003, reason)
    assert record["content"] == (storable(bad))
    counted = "1 rows set aside" if streaming else "1 of 1009 rows set aside"
    assert f"{counted} in {out}: 1 {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("value", [["a", 2], "b", [None, 2.5]], ids=["mixed", "text", "half"])
def test_stream_of_unknown_columns_is_checked(value, tmp_path):
    def rows():
        yield from ({"input_ids": [1, 2]} if i != 7 else {"input_ids": value} for i in range(12))

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(ValueError, match="row 7 of the data (has another kind of value|holds what is no token id)"):
        list(check_examples(stream, vocab_size=4))
    out = tmp_path / "bad.jsonl"
    assert list(check_examples(stream, vocab_size=4, quarantine=str(out))) == [{"input_ids": [1, 2]}] * 11
    assert [(record["row"], record["content"]) for record in aside(out)] == [(7, {"input_ids": value})]


def test_splits_of_the_hub_are_told_apart(monkeypatch, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "", "b"]})
    monkeypatch.setattr("training.data.load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows, test=rows))
    with pytest.raises(ValueError, match=r"row 1 of the data \(someone/data, train\) has no text in column `text`"):
        load_text("someone/data")
    quarantine = Quarantine(str(tmp_path / "bad.jsonl"))
    assert {name: len(part) for name, part in load_text("someone/data", quarantine=quarantine).items()} == {
        "train": 2,
        "validation": 2,
    }
    assert [record["file"] for record in quarantine.records] == ["someone/data, train", "someone/data, validation"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "no column `input_ids`; its columns are text"),
        ({"input_ids": ["a"]}, "column `input_ids` of the data holds list"),
        ({"input_ids": 3}, "column `input_ids` of the data holds int"),
        ({"input_ids": [3], "labels": "a"}, "column `labels` of the data holds string"),
    ],
)
def test_columns_of_another_kind_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        check_examples(datasets.Dataset.from_list([row]), vocab_size=4)


def test_rows_that_all_have_no_label_are_refused_even_with_a_quarantine(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [1], "labels": [-100]}] * 3)
    with pytest.raises(ValueError, match="no row of the data is left: all 3 are bad"):
        check_examples(rows, vocab_size=4, quarantine=str(tmp_path / "bad.jsonl"))
    assert not (tmp_path / "bad.jsonl").exists()


def test_what_json_cannot_hold_is_set_aside_all_the_same():
    content = {"a": b"\xff", "b": float("inf"), "c": "\ud83d", "d": [None, 1.5, b"x"], "e": "y" * (1 << 21)}
    found = json.loads(json.dumps(storable(content), ensure_ascii=False).encode())
    assert found | {"e": ""} == {"a": {"base64": "/w=="}, "b": "inf", "c": "\\ud83d", "d": [None, 1.5, "x"], "e": ""}
    assert len(found["e"]) == 1 << 20


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders that stand for a published BERT and for a published GPT-2, which has no padding token."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = train_tokenizer(iter([" ".join(WORDS)] * 3), "wordpiece", 300)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    tokenizer = train_tokenizer(iter([" ".join(WORDS)] * 3), "bpe", 300)
    tokenizer.pad_token = None
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=end, eos_token_id=end
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder


IDS = [{"input_ids": [i % 20 + 1] * 40} for i in range(24)]
LABELLED = [{"text": WORDS[i % 10], "label": "ab"[i % 2]} for i in range(24)]
TAGGED = [{"tokens": WORDS[:3], "tags": ["O", "B-X", "O"]} for _ in range(24)]
ASKED = [
    {"id": f"q{i}", "question": "which?", "context": f"alpha {i}", "answers": {"text": ["alpha"], "answer_start": [0]}}
    for i in range(24)
]
IMAGES = [{"image": picture(i), "question": WORDS[i % 3], "answer": "ab"[i % 2]} for i in range(24)]
BERT, GPT2 = "--model_name_or_path $bert --max_length 16", "--model_name_or_path $gpt2 --block_size 16"
READER = "--model_name_or_path $bert --max_length 32 --doc_stride 2 --max_question_length 4"
SMALL = "--config_overrides hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"
VISION = f"{SMALL} --vocab_size 300 --max_length 16"
BLIP2 = "--max_length 16"
WITH_SAME = "--validation_files $good"
# Script, its flags, good rows, the bad row, the kind of fault, words of the refusal beside the row's number.
SCRIPTS = {
    "clm empty": (run_clm, GPT2, text_rows(), {"text": " "}, "empty", ["no text in column `text`"]),
    "clm no text": (run_clm, GPT2, text_rows(), {"text": None}, "empty", ["no text in column `text`"]),
    "clm id": (run_clm, GPT2, IDS, {"input_ids": [1, 999]}, "id outside the vocabulary", ["token id 999"]),
    "clm empty ids": (run_clm, GPT2, IDS, {"input_ids": []}, "empty", ["`input_ids`"]),
    "clm broken": (run_clm, GPT2, text_rows(), b"{", "not JSON", ["(line 14)"]),
    "clm drift": (run_clm, GPT2, text_rows(), {"text": 1}, "type drift", ["a number"]),
    "clm stream": (
        run_clm,
        f"{GPT2} {WITH_SAME} --streaming --max_steps 1",
        text_rows(),
        b'{"text": "\xff"}',
        "not UTF-8",
        ["(line 14)"],
    ),
    "mlm empty": (run_mlm, "--model_name_or_path $bert --block_size 16", text_rows(), {"text": ""}, "empty", []),
    "class empty": (run_classification, BERT, LABELLED, {"text": "\t", "label": "a"}, "empty", ["column `text`"]),
    "class drift": (run_classification, BERT, LABELLED, {"text": "a", "label": 3}, "type drift", ["column `label`"]),
    "class broken": (run_classification, BERT, LABELLED, b'{"text"', "not JSON", ["(line 14)"]),
    "amount": (
        run_classification,
        f"{BERT} --regression",
        [{"text": word, "label": 0.5} for word in WORDS * 2],
        b'{"text": "a", "label": Infinity}',
        "label out of range",
        ["has inf in column `label`"],
    ),
    "tags": (run_token_classification, BERT, TAGGED, {"tokens": ["a"], "tags": ["O", "O"]}, "ragged", ["1 words"]),
    "no words": (run_token_classification, BERT, TAGGED, {"tokens": [], "tags": []}, "empty", ["column `tokens`"]),
    "half": (run_token_classification, BERT, TAGGED, {"tokens": ["a"], "tags": [None]}, "empty", ["lacks a word"]),
    "answer": (
        run_qa,
        READER,
        ASKED,
        {**ASKED[0], "id": "x", "answers": {"text": ["alpha"], "answer_start": [2]}},
        "answer not in its paragraph",
        ["at character 2"],
    ),
    "image": (run_image_text, VISION, IMAGES, {**IMAGES[0], "image": b"bad"}, "unreadable image", ["cannot be read"]),
    "no image": (run_image_text, VISION, IMAGES, {**IMAGES[0], "image": None}, "empty", ["no image"]),
    "no answer": (run_image_text, VISION, IMAGES, {**IMAGES[0], "answer": ""}, "empty", ["column `answer`"]),
    "blip2": (
        run_blip2,
        f"{BLIP2} --task vqa",
        IMAGES,
        {**IMAGES[0], "image": b"\x89PNG"},
        "unreadable image",
        ["cannot be read"],
    ),
}


def write(path, rows, bad=None, at=13):
    rows = rows if bad is None else [*rows[:at], bad, *rows[at:]]
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_bytes(lines(*rows))
    return str(path)


def script_arguments(script, flags, files, folder, checkpoints, *more):
    for name, value in (("$good", folder / "good.jsonl"), ("$", f"{checkpoints}/")):
        flags = flags.replace(name, str(value))
    named = [*flags.split(), "--files", *files, "--output_dir", str(folder / "out"), "--use_cpu", *more]
    return [*named, "--report_to", "none"]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_script_refuses_a_bad_row_or_sets_it_aside(kind, tmp_path, checkpoints, capsys):
    script, flags, rows, bad, reason, words = SCRIPTS[kind]
    has_images = script in (run_image_text, run_blip2)
    file = write(tmp_path / f"rows.{'parquet' if has_images else 'jsonl'}", rows, bad)
    write(tmp_path / "good.jsonl", [] if has_images else rows)
    with pytest.raises(SystemExit) as exit_:
        script.main(script_arguments(script, flags, [file], tmp_path, checkpoints))
    message = str(exit_.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in ["row 13 ", "rows.", *words]), message
    assert not list(tmp_path.glob("out/*.safetensors"))

    out = tmp_path / "bad.jsonl"
    capsys.readouterr()
    argv = script_arguments(script, flags, [file], tmp_path, checkpoints, "--quarantine", str(out))
    script.prepare(*parse_arguments(script.ARGUMENTS, argv, "", **script.DEFAULTS))
    (record,) = aside(out)
    assert (record["file"], record["row"], record["reason"]) == (file, 13, reason)
    if isinstance(bad, dict) and not has_images:
        content = record["content"]
        assert (json.loads(content) if isinstance(content, str) else content) == bad
    total = len(rows) + 1 + (len(rows) if "$good" in flags else 0)
    said = [line for line in capsys.readouterr().out.splitlines() if "quarantine: " in line]
    assert said == [f"quarantine: 1 of {total} rows set aside in {out}: 1 {reason}"]


def test_quarantined_image_rows_are_not_trained_on(tmp_path, checkpoints):
    """In a folder of pictures with their table, as anyone has them; the label that only a test row has goes too."""
    for number, row in enumerate(IMAGES):
        content = row["image"] if number != 13 else row["image"][:40]
        (tmp_path / f"{number}.png").write_bytes(content)
    table = [{"file_name": f"{i}.png", "question": "q", "answer": "ab"[i % 2]} for i in range(24)]
    write(tmp_path / "metadata.jsonl", [*table, {"file_name": "none.png", "question": "q", "answer": "a"}])
    out = tmp_path.with_suffix(".bad")
    argv = script_arguments(
        run_image_text, VISION, [str(tmp_path)], tmp_path, checkpoints, "--quarantine", str(out), "--max_steps", "1"
    )
    run = run_image_text.prepare(*parse_arguments(run_image_text.ARGUMENTS, argv, "", **run_image_text.DEFAULTS))
    places = {(record["row"], record["reason"]) for record in aside(out)}
    assert places == {(13, "unreadable image"), (24, "unreadable image")}
    assert [record["content"]["image"] for record in aside(out)] == [str(tmp_path / f) for f in ("13.png", "none.png")]
    kept = [place for rows in run.splits.values() for place in rows.stood]
    assert sorted(row for _, row in kept) == [row for row in range(24) if row != 13]
    run.trainer.train()


def test_questions_and_tags_that_are_set_aside_leave_the_rows(tmp_path):
    quarantine = Quarantine(str(tmp_path / "bad.jsonl"))
    wrong = {**ASKED[1], "answers": {"text": ["alpha"], "answer_start": [3]}}
    read = read_questions(
        datasets.Dataset.from_list([ASKED[0], wrong, ASKED[2]]), "train", origin=quarantine.origin("a")
    )
    assert read["id"] == ["q0", "q2"]
    rows = datasets.Dataset.from_list([*TAGGED[:2], {"tokens": ["a"], "tags": []}, {"tokens": ["a"], "tags": ["O"]}])
    read = read_tags(rows, "train", "tokens", "tags", quarantine.origin("b"))
    assert read[ROW] == [0, 1, 3]
    other = read_tags(
        datasets.Dataset.from_list([TAGGED[0], {"tokens": ["a"], "tags": ["I-X"]}]), "t", "tokens", "tags"
    )
    splits = datasets.DatasetDict(train=read, test=other)
    assert find_labels(splits, False, {"test": quarantine.origin("c")}) == ["O", "B-X"]
    assert splits["test"][ROW] == [0]
    assert [(record["row"], record["reason"]) for record in quarantine.records] == [
        (1, "answer not in its paragraph"),
        (2, "empty"),
        (1, "unknown label"),
    ]


def test_label_of_a_test_row_that_no_training_row_has_is_set_aside(tmp_path, checkpoints):
    files = write(tmp_path / "a.jsonl", LABELLED), write(tmp_path / "b.jsonl", LABELLED, {"text": "x", "label": "c"})
    out = tmp_path / "bad.jsonl"
    more = ["--test_files", files[1], "--quarantine", str(out)]
    argv = script_arguments(run_classification, BERT, files[:1], tmp_path, checkpoints, *more)
    parts = parse_arguments(run_classification.ARGUMENTS, argv, "", **run_classification.DEFAULTS)
    run = run_classification.prepare(*parts)
    (record,) = aside(out)
    assert (record["file"], record["row"], record["reason"]) == (files[1], 13, "unknown label")
    assert len(run.rows["test"]) == 24 and ROW not in run.rows["test"].column_names
    assert run.rows["test"]["labels"] == [0, 1] * 12


def test_tokenized_blocks_do_not_hold_what_was_set_aside(tmp_path, checkpoints):
    file = write(tmp_path / "rows.jsonl", IDS, {"input_ids": [1, 999] * 20})
    argv = script_arguments(run_clm, GPT2, [file], tmp_path, checkpoints, "--quarantine", str(tmp_path / "bad.jsonl"))
    run = run_clm.prepare(*parse_arguments(run_clm.ARGUMENTS, argv, "", **run_clm.DEFAULTS))
    ids = np.concatenate([np.array(rows["input_ids"]) for rows in (run.trainer.train_dataset,)])
    assert ids.size > 600 and ids.max() == 20


def test_stream_is_checked_as_it_comes(tmp_path, checkpoints):
    file = write(tmp_path / "rows.jsonl", IDS, {"input_ids": [1, 999]})
    good = write(tmp_path / "good.jsonl", IDS)
    more = ["--streaming", "--max_steps", "2", "--validation_files", good]
    argv = script_arguments(run_clm, GPT2, [file], tmp_path, checkpoints, *more)
    run = run_clm.prepare(*parse_arguments(run_clm.ARGUMENTS, argv, "", **run_clm.DEFAULTS))
    with pytest.raises(ValueError, match=r"row 13 of the data \(.*rows.jsonl\) holds token id 999"):
        list(run.trainer.train_dataset)
    out = tmp_path / "bad.jsonl"
    argv += ["--quarantine", str(out)]
    run = run_clm.prepare(*parse_arguments(run_clm.ARGUMENTS, argv, "", **run_clm.DEFAULTS))
    assert aside(out) == []
    for _ in range(2):
        blocks = [block["input_ids"] for block in run.trainer.train_dataset]
        assert len(blocks) == 24 * 40 // 16 and np.max(blocks) == 20
    assert [(record["file"], record["row"]) for record in aside(out)] == [(file, 13)]


@pytest.mark.parametrize(
    "script", [run_clm, run_mlm, run_classification, run_token_classification, run_qa, run_elmo, run_word2vec]
)
def test_half_precision_on_a_processor_is_refused(script, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        script.main(["--fp16", "--use_cpu", "--output_dir", str(tmp_path / "out")])
    message = str(exit_.value)
    assert message.startswith("error: --fp16 (`fp16`) is set") and "--bf16" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [run_image_text, run_blip2])
def test_half_precision_on_a_processor_is_refused_with_images(script, tmp_path):
    with pytest.raises(SystemExit, match="^error: --fp16_full_eval "):
        script.main(["--fp16_full_eval", "--use_cpu", "--output_dir", str(tmp_path / "out")])


def test_precision_that_a_processor_has_is_not_refused(tmp_path):
    check_precision(transformers.TrainingArguments(str(tmp_path), bf16=True, use_cpu=True))


def tiny_gpt2():
    config = hf_custom.CustomGPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    return hf_custom.CustomGPT2ForCausalLM(config)


def test_parameters_of_mixed_dtype_are_named():
    model = tiny_gpt2()
    check_dtypes(model)
    check_dtypes(tiny_gpt2().to(torch.bfloat16))
    model.transformer.h[1].mlp.to(torch.bfloat16)
    with pytest.raises(ValueError) as error:
        check_dtypes(model)
    words = ["transformer.h.1.mlp.c_fc.weight` and 3 more in torch.bfloat16", "model.to(torch.float32)"]
    assert all(word in str(error.value) for word in words), error.value
    # What the class keeps wide for its own reasons is no mistake.
    model = tiny_gpt2().to(torch.bfloat16)
    model._keep_in_fp32_modules = ["ln_f"]
    model.transformer.ln_f.float()
    check_dtypes(model)
    model._keep_in_fp32_modules = None
    with pytest.raises(ValueError, match="ln_f.weight"):
        check_dtypes(model)


def test_weights_in_float16_are_not_trained():
    model = tiny_gpt2().half()
    with pytest.raises(ValueError, match="wte.weight` is to be trained in torch.float16"):
        check_dtypes(model)
    check_dtypes(model.requires_grad_(False))


def test_end_of_text_is_a_label_also_where_it_fills_up_rows(checkpoints):
    """Padding is told by its place and not by its id."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints / "gpt2")
    assert tokenizer.pad_token is None
    prepare_padding(tokenizer)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    rows = datasets.Dataset.from_dict({"text": ["alpha beta", "gamma"] * 10})
    blocks = tokenize_blocks(rows, tokenizer, "text", 8, len(tokenizer))
    batch = run_clm.collate_blocks(list(blocks))
    assert (batch["labels"] == end).sum() == (batch["input_ids"] == end).sum() >= 15
    collator = PromptCollator(tokenizer, torch.zeros(1, 3, 2, 2), transformers.BlipImageProcessorPil(), 5, 2)
    rows = [{"prompt": [1] * n, "target": [2] * n + [end], "image": 0} for n in (1, 3)]
    labels = collator(rows)["labels"]
    assert labels.tolist() == [[-100] * 3 + [2, end] + [-100] * 4, [-100] * 5 + [2] * 3 + [end]]


@pytest.mark.parametrize("script", [run_classification, run_token_classification, run_qa], ids=lambda s: s.__name__)
def test_tokenizer_without_padding_works(script, tmp_path, checkpoints):
    rows = {run_classification: LABELLED, run_token_classification: TAGGED, run_qa: ASKED}[script]
    flags = (READER if script is run_qa else BERT).replace("$bert", "$gpt2") + " --max_steps 1 --eval_strategy no"
    argv = script_arguments(script, flags, [write(tmp_path / "rows.jsonl", rows)], tmp_path, checkpoints)
    prepared = script.prepare(*parse_arguments(script.ARGUMENTS, argv, "", **script.DEFAULTS))
    trainer = prepared.trainer if script is run_classification else prepared[0]
    assert trainer.model.config.pad_token_id == trainer.processing_class.eos_token_id is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_tokenizer_without_padding_and_end_is_refused(checkpoints):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints / "gpt2")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no padding token .* --tokenizer_name"):
        prepare_padding(tokenizer)


def test_seconds_are_measured(capsys):
    preflight.main(["--rows", "500"])
    out = capsys.readouterr().out
    assert "500 tokenized rows: " in out and "500 lines of JSON: " in out


@pytest.mark.slow
def test_two_processes_leave_out_the_same_rows(tmp_path):
    """Each finds the bad rows for itself; one writes and prints. A step with other rows would end in another model."""
    rows = [{"text": f"{WORDS[i % 10]} and {WORDS[i % 7]} {i} " * 12} for i in range(60)]
    file, out = write(tmp_path / "rows.jsonl", rows, {"text": 5}), tmp_path / "bad.jsonl"
    smoke = str(ROOT / "training" / "recipes" / "clm_smoke.yaml")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    flags = ["--files", file, "--quarantine", str(out), "--output_dir", str(tmp_path / "out"), "--vocab_size", "300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [*launcher, "-m", "training.run_clm", smoke, *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [record["row"] for record in aside(out)] == [13]
    assert result.stdout.count("quarantine: 1 of 61 rows set aside") == 1
    copies = list((tmp_path / "home" / "datasets" / "without_bad_rows").iterdir())
    assert [len(copy.read_text().splitlines()) for copy in copies] == [60]
