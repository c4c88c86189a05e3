"""Trained tokenizers: nothing is lost, and the saved class is one that stock Transformers knows."""

import json

import pytest
import transformers
from transformers import AutoTokenizer

from training.data import embedded_corpus
from training.tokenizer import END_OF_TEXT, PADDING, main, train_tokenizer

STRANGE = "Grüße, 数学 🙂\n\n  two  spaces\tand\0zero 'quoted'"


@pytest.fixture(scope="module")
def texts():
    return embedded_corpus()["text"][:10]


def test_bpe_round_trips_any_text(texts):
    tokenizer = train_tokenizer(iter(texts), "bpe", 600)
    assert len(tokenizer) == 600
    for text in [STRANGE, texts[0]]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_bpe_merges_what_is_frequent(texts):
    tokenizer = train_tokenizer(iter(texts), "bpe", 600)
    text = "the statement"
    assert len(tokenizer(text)["input_ids"]) < len(text) / 2


def test_bpe_special_tokens(texts):
    tokenizer = train_tokenizer(iter(texts), "bpe", 600)
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer.pad_token == PADDING and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer(END_OF_TEXT)["input_ids"] == [tokenizer.eos_token_id]


def test_wordpiece_frames_sentences(texts):
    tokenizer = train_tokenizer(iter(texts), "wordpiece", 600)
    first, second = tokenizer("The statement", "a class")["input_ids"], tokenizer("xyz \U0001f642")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(first)[0] == "[CLS]"
    assert [token for token in tokenizer.convert_ids_to_tokens(first) if token == "[SEP]"] == ["[SEP]", "[SEP]"]
    assert tokenizer.unk_token_id in second and tokenizer.mask_token_id is not None
    assert tokenizer.decode(first, skip_special_tokens=True) == "the statement a class"


@pytest.mark.parametrize(("kind", "stock"), [("bpe", "GPT2Tokenizer"), ("wordpiece", "BertTokenizer")])
def test_saved_tokenizer_is_a_stock_class(tmp_path, texts, kind, stock):
    tokenizer = train_tokenizer(iter(texts), kind, 600)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is getattr(transformers, stock)
    for text in [STRANGE, texts[1]]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_bpe_training_twice_gives_the_same(texts):
    first, second = (train_tokenizer(iter(texts), "bpe", 600).get_vocab() for _ in range(2))
    assert first == second


def test_wordpiece_ids_are_in_order(texts):
    vocabulary = train_tokenizer(iter(texts), "wordpiece", 600).get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.get)
    assert pieces[:5] == ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
    assert len(pieces) == 600 and pieces[5:] == sorted(pieces[5:])


def test_bad_requests_are_refused(texts):
    with pytest.raises(ValueError, match="kind 'unigram' is unknown"):
        train_tokenizer(iter(texts), "unigram", 600)
    with pytest.raises(ValueError, match="at least 300"):
        train_tokenizer(iter(texts), "bpe", 100)


def test_command_line(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("one two three\n" * 40, encoding="utf-8")
    main(["--files", str(tmp_path / "text.txt"), "--vocab_size", "300", "--output_dir", str(tmp_path / "out")])
    assert "entries in" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([0]) == END_OF_TEXT
    with pytest.raises(SystemExit, match="^error: data file .* does not exist"):
        main(["--files", "missing.txt", "--output_dir", str(tmp_path)])


def test_command_line_sets_bad_rows_aside(tmp_path, capsys):
    rows = [json.dumps({"text": f"one two three {number}"}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{"]), encoding="utf-8")
    arguments = ["--files", str(tmp_path / "rows.jsonl"), "--vocab_size", "300", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"row 40 \(line 41\) is not JSON.*--quarantine FILE"):
        main(arguments)
    assert not (tmp_path / "out").exists()
    main([*arguments, "--quarantine", str(tmp_path / "bad.jsonl")])
    assert "1 of 41 rows set aside" in capsys.readouterr().out
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == 40
    assert (tmp_path / "out" / "tokenizer.json").exists()
