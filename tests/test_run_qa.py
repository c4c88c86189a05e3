"""Question answering: the rows, the windows, the search for answers, the measure, and the script as a user runs it."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering

import hf_custom
from training import run_qa
from training.args import TableArguments
from training.embedded_tasks import embedded_questions
from training.groups import load_grouped_tables, split_by_group
from training.qa_metrics import exact_match, f1, normalize, score_answers
from training.qa_rows import read_questions
from training.qa_windows import answer_tokens, best_spans, cut_questions, find_answers, make_windows
from training.tokenizer import train_tokenizer

SMOKE = str(Path(__file__).parent.parent / "training" / "recipes" / "qa_smoke.yaml")
OUT = (-1, -1)
CONTEXTS = [
    f"In {1900 + i} the river {name} froze over." for i, name in enumerate(["Avon", "Cam", "Dee", "Exe", "Fal"])
]


@pytest.fixture(autouse=True)
def _stock_stays_stock():
    yield
    hf_custom.register(replace_stock=False)


def question_rows():
    """Two questions on each of five paragraphs, and one that has no answer on each."""
    rows = []
    for context in CONTEXTS:
        year, river = context.split()[1], context.split()[4]
        for question, text in ((f"When did {river} freeze?", year), ("What froze?", river), ("Who froze?", None)):
            answers = (
                {"text": [text], "answer_start": [context.index(text)]} if text else {"text": [], "answer_start": []}
            )
            rows.append({"id": f"q{len(rows)}", "question": question, "context": context, "answers": answers})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for row in question_rows() for text in (row["context"], row["question"])]
    return train_tokenizer(iter(texts * 5), "wordpiece", 300)


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tokenizer):
    """A folder that stands for a published BERT."""
    folder = tmp_path_factory.mktemp("stock")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    BertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_answers_are_normalized_as_published():
    assert normalize("  The  Eiffel-Tower, a   TOWER!") == "eiffeltower tower"
    assert normalize("another theory") == "another theory"
    assert exact_match("the cat.", "Cat") == 1 and exact_match("cats", "cat") == 0


def test_f1_counts_shared_words():
    # Two of three words given are right, and two of the four wanted were given: 2 * 2 / (3 + 4).
    assert f1("big red house", "red house on hill") == pytest.approx(4 / 7)
    # A word that stands twice in one and once in the other is shared once: 2 * 1 / (2 + 1).
    assert f1("x x", "x") == pytest.approx(2 / 3)
    assert f1("", "") == 1 and f1("x", "") == 0 and f1("the", "x") == 0


def test_score_takes_the_best_answer_and_breaks_down():
    predictions = ["red house", "", "cat", ""]
    answers = [["a red house on the hill", "mouse"], ["dog"], [], []]
    metrics = score_answers(predictions, answers)
    # Question 1: no exact match, best F1 of 2*2/(2+4) and 0; 2: missed; 3: invented; 4: right.
    assert metrics == pytest.approx(
        {
            "exact match": 25.0,
            "f1": 100 * (2 / 3 + 1) / 4,
            "HasAns exact match": 0.0,
            "HasAns f1": 100 / 3,
            "NoAns exact match": 50.0,
        }
    )


def test_without_unanswerable_questions_nothing_is_broken_down():
    assert score_answers(["cat"], [["the cat"]]) == {"exact match": 100.0, "f1": 100.0}


def test_answer_tokens_need_the_whole_answer():
    offsets = np.array([OUT, OUT, OUT, (10, 13), (14, 18), (18, 19), OUT])
    assert answer_tokens(offsets, 14, 18) == (4, 4)
    assert answer_tokens(offsets, 10, 19) == (3, 5)
    assert answer_tokens(offsets, 15, 17) == (4, 4)
    assert answer_tokens(offsets, 8, 13) is None and answer_tokens(offsets, 14, 20) is None
    assert answer_tokens(np.array([OUT, OUT]), 0, 1) is None


def test_windows_hold_the_answer_or_point_to_the_first_token(tokenizer):
    filler = "the river froze over . " * 8
    context = filler + "1904 " + filler
    rows = Dataset.from_dict(
        {"question": ["When did it freeze?"] * 2, "context": [context] * 2, "answer": ["1904 the river", ""]}
        | {"answer_start": [len(filler), -1]}
    )
    windows, cut = make_windows(rows, tokenizer, max_length=40, doc_stride=10, max_question_length=20)
    assert cut == 0 and len(windows) > 4 and set(windows["row"]) == {0, 1}
    hits, covered = 0, set()
    for window in windows:
        ids, (start, end) = window["input_ids"], (window["start_positions"], window["end_positions"])
        assert len(ids) <= 40 and ids[window["cls"]] == tokenizer.cls_token_id
        inside = [pair for pair in window["offsets"] if pair != list(OUT)]
        whole = inside[0][0] <= len(filler) and len(filler) + 14 <= inside[-1][1]
        if window["row"] == 0:
            covered |= {place for first, last in inside for place in range(first, last)}
        if window["row"] == 0 and whole:
            hits += 1
            assert context[window["offsets"][start][0] : window["offsets"][end][1]] == "1904 the river"
        else:
            assert start == end == window["cls"] == 0
    assert hits >= 1
    # No character but spaces is outside of all windows.
    assert {place for place, letter in enumerate(context) if letter != " "} <= covered


def test_long_questions_are_cut(tokenizer):
    questions, cut = cut_questions(["river froze over", "river"], tokenizer, 2)
    assert questions == ["river froze", "river"] and cut == 1


def test_best_spans_are_ordered_short_and_forward():
    offsets = np.array([OUT, (0, 2), (3, 5), (6, 8), OUT])
    start = np.array([9.0, 1.0, 3.0, 2.0, 9.0])
    end = np.array([9.0, 5.5, 1.0, 4.0, 9.0])
    # Of tokens 1 to 3: 2-3 scores 7, 1-1 scores 6.5, 3-3 scores 6, 1-3 (5) is too long, 2-2 scores 4, 1-2 scores 2.
    expected = [(7.0, 3, 8), (6.5, 0, 2), (6.0, 6, 8), (4.0, 3, 5), (2.0, 0, 5)]
    assert best_spans(start, end, offsets, n_best=20, longest=2) == expected
    assert best_spans(start, end, offsets, n_best=20, longest=3)[3] == (5.0, 0, 8)
    # With one start and one end to choose from, both of them the best, the end comes before the start.
    assert best_spans(start, end, offsets, n_best=1, longest=2) == []


def windows_of_one_question():
    """Two windows of "ab cd ef": tokens [CLS] and two words each, the middle word in both."""
    return Dataset.from_dict({"row": [0, 0], "cls": [0, 0], "offsets": [[OUT, (0, 2), (3, 5)], [OUT, (3, 5), (6, 8)]]})


def test_answer_is_the_best_of_all_windows():
    # Padded by one place, as a batch with a longer row is.
    start = np.array([[1.0, 0.0, 3.0, -100.0], [2.0, 4.0, 0.0, -100.0]])
    end = np.array([[1.0, 0.0, 3.0, -100.0], [2.0, 1.0, 4.0, -100.0]])
    answers, candidates = find_answers(windows_of_one_question(), start, end, ["ab cd ef"])
    assert answers == ["cd ef"]
    # "cd" scores 6 in the first window and 5 in the second; no answer scores the least of 2 and 4.
    listed = [(item["text"], item["score"]) for item in candidates[0]]
    assert listed == [("cd ef", 8.0), ("cd", 6.0), ("ef", 4.0), ("ab cd", 3.0), ("", 2.0), ("ab", 0.0)]
    chances = [item["probability"] for item in candidates[0]]
    assert sum(chances) == pytest.approx(1) and chances[0] / chances[1] == pytest.approx(np.exp(2))


@pytest.mark.parametrize(("threshold", "answer"), [(-6.5, ""), (-5.5, "cd ef")])
def test_threshold_decides_between_answer_and_none(threshold, answer):
    start = np.array([[2.0, 0.0, 3.0], [1.0, 4.0, 0.0]])
    end = np.array([[2.0, 0.0, 3.0], [1.0, 1.0, 4.0]])
    # No answer scores 2, the best answer 8: the difference is -6.
    arguments = windows_of_one_question(), start, end, ["ab cd ef"]
    assert find_answers(*arguments, null_threshold=threshold)[0] == [answer]
    answers, candidates = find_answers(*arguments, null_threshold=threshold, allow_none=False)
    assert answers == ["cd ef"] and "" not in {item["text"] for item in candidates[0]}


def test_held_out_groups_share_nothing(tmp_path):
    rows = Dataset.from_list(question_rows())
    splits = split_by_group(rows, "context", 0.2, seed=3)
    assert len(splits["validation"]) == 3 and len(set(splits["validation"]["context"])) == 1
    assert set(splits["train"]["context"]).isdisjoint(splits["validation"]["context"])
    file = write_rows(tmp_path / "rows.jsonl", question_rows())
    args = TableArguments(files=[file], validation_fraction=0.4, max_train_rows=4)
    splits = load_grouped_tables(args, embedded_questions, "context_column", "context", seed=0)
    assert len(splits["train"]) == 4 and len(splits["validation"]) == 6
    assert set(splits["train"]["context"]).isdisjoint(splits["validation"]["context"])
    with pytest.raises(ValueError, match="column `context` is the same in all rows.*--validation_files"):
        split_by_group(rows.select(range(3)), "context", 0.5, seed=0)


def test_embedded_questions_are_answered_where_they_say():
    rows = embedded_questions()
    read = read_questions(rows, "train")
    empty = sum(not answers for answers in read["answers"])
    assert len(rows) > 300 and 0.1 < empty / len(rows) < 0.3
    for row in read:
        if not row["answers"]:
            assert row["answer_start"] == -1
    assert rows[:] == embedded_questions()[:]


def test_flat_answers_read_as_nested_ones():
    nested = question_rows()
    flat = []
    for row in nested:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        flat.append({key: row[key] for key in ("id", "question", "context")})
        flat[-1] |= {"answer": texts[0] if texts else "", "answer_start": str(starts[0]) if starts else ""}
    assert read_questions(Dataset.from_list(flat), "train")[:] == read_questions(Dataset.from_list(nested), "train")[:]


def test_smoke_recipe_leaves_answers_and_numbers(tmp_path):
    output = tmp_path / "smoke"
    run_qa.main([SMOKE, "--output_dir", str(output)])
    answers, candidates = (json.loads((output / f"{n}predictions.json").read_text()) for n in ("", "nbest_"))
    rows = {row["id"]: row for row in embedded_questions()}
    assert answers.keys() == candidates.keys() and len(answers) > 20
    for name, answer in answers.items():
        assert answer in rows[name]["context"] and answer in {item["text"] for item in candidates[name]}
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == score_answers(list(answers.values()), [rows[name]["answers"]["text"] for name in answers])


def test_fine_tunes_a_stock_checkpoint_on_files(stock, tmp_path):
    """Enough steps to learn the rows by heart, so that a label or an offset that is off by one shows."""
    file, output = write_rows(tmp_path / "rows.jsonl", question_rows()), tmp_path / "mine"
    flags = (
        "--num_train_epochs 60 --max_length 48 --doc_stride 8 --max_question_length 12 --use_cpu --learning_rate 0.005 "
        "--per_device_train_batch_size 15 --save_strategy no --eval_strategy no --warmup_steps 0 --disable_tqdm True"
    )
    names = ["--files", file, "--validation_files", file, "--test_files", file]
    run_qa.main(["--model_name_or_path", stock, *names, "--output_dir", str(output), *flags.split()])
    model = AutoModelForQuestionAnswering.from_pretrained(output)
    assert type(model).__name__ == "CustomBertForQuestionAnswering"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["f1"] > 90 and metrics["HasAns f1"] > 90 and metrics["NoAns exact match"] == 100
    assert metrics["test f1"] == metrics["f1"]
    assert (output / "test_predictions.json").read_text() == (output / "predictions.json").read_text()


def changed(index, **fields):
    rows = question_rows()
    rows[index] |= fields
    return rows


# Rows and flags that cannot work, and words that the one line of refusal must hold.
MISTAKES = {
    "start": (
        changed(4, answers={"text": ["Cam"], "answer_start": [2]}),
        "",
        ["row 4 of the", "'Cam' at character 2", "answer_start"],
    ),
    "outside": (changed(4, answers={"text": ["Cam"], "answer_start": [-15]}), "", ["row 4 of", "at character -15"]),
    "lengths": (changed(3, answers={"text": ["Cam"], "answer_start": [1, 2]}), "", ["row 3 of", "1 answers but 2"]),
    "question": (changed(2, question=" "), "", ["row 2 of", "nothing in column `question`"]),
    "twice": (changed(1, id="q0"), "--validation_files $", ["id 'q0' 2 times", "`id`"]),
    "column": (question_rows(), "--question_column ask", ["no column `ask`", "--question_column"]),
    "context": (question_rows(), "--context_column text", ["no column `text`", "--context_column"]),
    "answers": (question_rows(), "--answers_column reply", ["no column `reply`", "--answers_column"]),
    "room": (question_rows(), "--max_length 60", ["60 tokens", "neighbours share", "--doc_stride"]),
    "length": (question_rows(), "--max_length 65", ["--max_length is 65", "64 positions"]),
    "stride": (question_rows(), "--doc_stride -1", ["--doc_stride is -1"]),
    "n best": (question_rows(), "--n_best_size 0", ["--n_best_size is 0"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line(kind, stock, tmp_path):
    rows, flags, words = MISTAKES[kind]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "out"
    arguments = ["--model_name_or_path", stock, "--files", file, *flags.replace("$", file).split()]
    with pytest.raises(SystemExit) as exit_:
        run_qa.main([*arguments, "--output_dir", str(output), "--use_cpu"])
    message = str(exit_.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message
    assert not output.exists()


def test_default_window_fits_the_model(stock, tmp_path, capsys):
    """384 tokens by default, but the model has 64 positions; the windows are of 64."""
    file = write_rows(tmp_path / "rows.jsonl", question_rows())
    model, data, questions, training = run_qa.parse_arguments(
        (run_qa.ModelArguments, TableArguments, run_qa.QuestionArguments, run_qa.RunArguments),
        ["--model_name_or_path", stock, "--files", file, "--doc_stride", "8", "--max_question_length", "3"],
        "",
        **run_qa.DEFAULTS | {"output_dir": str(tmp_path / "out"), "use_cpu": True},
    )
    assert data.max_length == 384
    _, splits = run_qa.prepare(model, data, questions, training)
    assert max(map(len, splits["train"].windows["input_ids"])) <= 64
    # Of 15 questions each third is short; the rest lose their last word.
    out = capsys.readouterr().out
    assert "questions longer than 3 tokens, whose ends are not read: 4 of train, 1 of validation" in out, out
