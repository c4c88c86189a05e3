"""Word vectors in files, and how good they are: both formats of word2vec, similarities and analogies, beside gensim."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import WORD2VEC
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

from hf_custom import CustomWord2VecConfig, CustomWord2VecForPreTraining, CustomWord2VecModel
from hf_custom.modeling_word2vec import vocabulary_digest, words_of_tokenizer
from training.word_evaluation import WordVectors, score_analogies, score_word_pairs, spearman
from training.word_evaluation import main as evaluation_main
from training.word_pairs import make_tokenizer
from training.word_vectors import BrokenVectors, export_vectors, import_vectors, read_vectors, write_vectors
from training.word_vectors import main as vectors_main

VOCAB = WORD2VEC["vocab_size"]
UNKNOWN = VOCAB - 1
WORDS = [f"word{number}" for number in range(UNKNOWN)]

each_format = pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])


def build(model_class, **fields):
    """A tiny model with wide weights; the vector of unknown words stays zero."""
    model = model_class(CustomWord2VecConfig(**{**WORD2VEC, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
            parameter[UNKNOWN] = 0
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("word2vec")
    build(CustomWord2VecForPreTraining, vocabulary_sha256=vocabulary_digest([*WORDS, "<unk>"])).save_pretrained(path)
    make_tokenizer(WORDS).save_pretrained(path)
    return path


# --- Files of vectors ---


def some_vectors(count=7, length=5):
    vectors = np.random.default_rng(0).standard_normal((count, length)).astype(np.float32)
    vectors[0] = [0.1, -0.0, 1e-30, 3.4e38, 1 / 3]
    return ["the", "naïve", "日本", "a-b", "x", "'", "z9"][:count], vectors


@each_format
def test_vectors_come_back_bit_by_bit(tmp_path, binary):
    words, vectors = some_vectors()
    write_vectors(tmp_path / "v", words, vectors, binary)
    found, again = read_vectors(tmp_path / "v", binary)
    assert found == words and again.dtype == np.float32
    assert again.tobytes() == vectors.tobytes()


@each_format
def test_gensim_reads_ours_and_we_read_theirs(tmp_path, binary):
    keyed = pytest.importorskip("gensim.models", reason="gensim is not installed").KeyedVectors
    words, vectors = some_vectors()
    write_vectors(tmp_path / "ours", words, vectors, binary)
    theirs = keyed.load_word2vec_format(str(tmp_path / "ours"), binary=binary)
    assert theirs.index_to_key == words and theirs.vectors.tobytes() == vectors.tobytes()
    theirs.save_word2vec_format(str(tmp_path / "theirs"), binary=binary)
    found, again = read_vectors(tmp_path / "theirs", binary)
    assert found == words and again.tobytes() == vectors.tobytes()


@each_format
def test_model_is_exported_and_imported(folder, tmp_path, capsys, binary):
    flags, file = ["--binary"] * binary, str(tmp_path / "v")
    vectors_main(["export", str(folder), file, *flags])
    assert "40 vectors" in capsys.readouterr().out
    vectors_main(["import", file, str(tmp_path / "model"), *flags, "--lower_case"])
    before, after = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(tmp_path / "model")
    assert torch.equal(after.embeddings.weight, before.embeddings.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert after.most_similar("WORD3", tokenizer=tokenizer) == before.most_similar("word3", tokenizer=tokenizer)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocabulary_sha256"]


def test_vector_of_unknown_words_is_not_exported_and_stays_zero_when_imported(folder, tmp_path):
    export_vectors(
        AutoModelForPreTraining.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), tmp_path / "v"
    )
    assert "<unk>" not in read_vectors(tmp_path / "v")[0]
    write_vectors(tmp_path / "w", ["a", "<unk>", "b"], np.ones((3, 2)))
    model, tokenizer = import_vectors(tmp_path / "w")
    assert words_of_tokenizer(tokenizer) == ["a", "b", "<unk>"]
    assert model.embeddings.weight.tolist() == [[1, 1], [1, 1], [0, 0]]


def binary_file(*parts):
    return b"".join(part if isinstance(part, bytes) else np.float32(part).tobytes() for part in parts)


@pytest.mark.parametrize(
    ("content", "binary", "words"),
    [
        (b"", False, ["line 1", "number of words"]),
        (b"the 0.1 0.2\na 1 2\n", False, ["line 1", "GloVe"]),
        (b"2 0\na\nb\n", False, ["line 1"]),
        (b"2 2\na 1 2\nb 1\n", False, ["line 3", "1 numbers", "'b'", "2"]),
        (b"2 2\na 1 2\nb 1 2 3\n", False, ["line 3", "3 numbers"]),
        (b"2 2\na 1 2\nb 1 x\n", False, ["line 3", "'b'"]),
        (b"2 2\na 1 2\nb 1 nan\n", False, ["line 3", "finite"]),
        (b"2 2\na 1 2\na 3 4\n", False, ["line 3", "'a'", "again"]),
        (b"3 2\na 1 2\nb 3 4.000\n", False, ["ends after 2 of 3"]),
        (b"1 2\na 1 2\nb 3 4\n", False, ["line 3", "more than the 1"]),
        (b"2 2\n\xff\xfe 1 2\nb 3 4\n", False, ["line 2", "UTF-8"]),
        (b"2 2\n 1 2\nb 3 4\n", False, ["line 2", "empty"]),
        (b"999999 300\na 1 2\n", False, ["too few", "--binary"]),
        (binary_file(b"2 2\na ", 1, 2, b"\nb "), True, ["too few"]),
        (binary_file(b"2 2\nlonger ", 1, 2, b"\nb ", 3), True, ["word 2", "within its vector", "1 of 2"]),
        (binary_file(b"2 2\nmuchlongerword ", 1, 2), True, ["word 2", "1 of 2"]),
        (binary_file(b"2 2\na ", 1, 2, b"\n\xff ", 3, 4), True, ["word 2", "UTF-8"]),
        (binary_file(b"2 2\na ", 1, 2, b"\na ", 3, 4), True, ["word 2", "again"]),
        (binary_file(b"2 2\na ", 1, float("inf"), b"\nb ", 3, 4), True, ["word 1", "finite"]),
        (binary_file(b"1 2\na ", 1, 2, b"\nb ", 3, 4), True, None),
        (b"1 2\n" + b"x" * 20_000, True, ["word 1", "--binary"]),
    ],
)
def test_broken_files_are_refused(tmp_path, content, binary, words):
    file = tmp_path / "vectors"
    file.write_bytes(content)
    if words is None:
        # What stands behind the last vector of a binary file is not looked at, as by others.
        assert read_vectors(file, binary)[0] == ["a"]
        return
    with pytest.raises(BrokenVectors) as error:
        read_vectors(file, binary)
    assert all(word in str(error.value) for word in (*words, "vectors"))


def test_vectors_without_line_breaks_are_read(tmp_path):
    (tmp_path / "v").write_bytes(binary_file(b"2 2\na ", 1, 2, b"b ", 3, 4))
    words, vectors = read_vectors(tmp_path / "v", binary=True)
    assert words == ["a", "b"] and vectors.tolist() == [[1, 2], [3, 4]]


@each_format
def test_words_with_spaces_are_not_written(tmp_path, binary):
    with pytest.raises(ValueError, match="word 2.*'b c'"):
        write_vectors(tmp_path / "v", ["a", "b c"], np.ones((2, 2)), binary)
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import", "nowhere.bin", "out"], ["nowhere.bin", "does not exist"]),
        (["export", "nowhere", "v.txt"], []),
    ],
)
def test_command_ends_with_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        vectors_main(arguments)
    assert str(error.value).startswith("error: ") and all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


# --- Scores ---


def test_spearman_matches_scipy():
    generator = np.random.default_rng(0)
    for first, second in (
        (generator.random(50), generator.random(50)),
        (generator.integers(0, 5, 50), generator.integers(0, 4, 50)),
        (np.arange(9), -np.arange(9)),
    ):
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(3), np.arange(3)))


def question_files(folder, words):
    generator = np.random.default_rng(0)
    pairs = folder / "pairs.tsv"
    lines = [
        f"{a}\t{b.upper()}\t{value:.2f}" for (a, b), value in zip(words, generator.random(len(words)), strict=True)
    ]
    pairs.write_text("# a comment\n" + "\n".join([*lines, "word1\tnobody\t3.0"]) + "\n")
    questions = folder / "questions.txt"
    rows = generator.choice(WORDS[:20], (60, 4))
    questions.write_text(": first\n" + "\n".join(map(" ".join, rows[:30])) + "\nword1 a b c\n: second\n")
    with questions.open("a") as stream:
        stream.write("\n".join(" ".join(row).upper() for row in rows[30:]) + "\n")
    return pairs, questions


@pytest.mark.parametrize("restrict", [None, 15])
def test_scores_match_gensim(tmp_path, restrict):
    keyed = pytest.importorskip("gensim.models", reason="gensim is not installed").KeyedVectors
    # Few dimensions, so that some questions are answered right.
    model = build(CustomWord2VecModel, hidden_size=2)
    pairs, questions = question_files(tmp_path, [(WORDS[i], WORDS[(7 * i + 3) % 40]) for i in range(40)])
    theirs = keyed(2)
    theirs.add_vectors(WORDS, model.embeddings.weight[:UNKNOWN].detach().numpy())
    ours = WordVectors.of(model, make_tokenizer(WORDS))
    found = score_word_pairs(ours, pairs)
    _, expected, unknown = theirs.evaluate_word_pairs(str(pairs))
    assert found.value == pytest.approx(expected.statistic, abs=1e-6)
    assert 100 * found.skipped / (found.used + found.skipped) == pytest.approx(unknown)
    scores = score_analogies(ours, questions, restrict)
    expected, sections = theirs.evaluate_word_analogies(str(questions), restrict_vocab=restrict or 300_000)
    assert scores["total"].value == pytest.approx(expected) and 0 < expected < 1
    for section in sections[:-1]:
        right, wrong = len(section["correct"]), len(section["incorrect"])
        assert scores[section["section"]].used == right + wrong
        assert scores[section["section"]].value == pytest.approx(right / (right + wrong))
    assert scores["first"].skipped >= 1


@pytest.mark.data
def test_published_questions_are_read_as_by_gensim(data_folder):
    keyed = pytest.importorskip("gensim.models", reason="gensim is not installed").KeyedVectors
    files = [Path(data_folder) / "w2v" / name for name in ("wordsim353.tsv", "simlex999.tsv", "questions-words.txt")]
    words = list(dict.fromkeys(word.lower() for file in files for word in file.read_text().split() if word.isalpha()))
    vectors = torch.randn(len(words), 20)
    ours = WordVectors(words, torch.nn.functional.normalize(vectors, dim=1))
    theirs = keyed(20)
    theirs.add_vectors(words, vectors.numpy())
    for file, count in zip(files[:2], (353, 999), strict=True):
        score, (_, expected, _) = score_word_pairs(ours, file), theirs.evaluate_word_pairs(str(file))
        assert score.used + score.skipped == count and score.used > 340
        assert score.value == pytest.approx(expected.statistic, abs=1e-6)
    scores = score_analogies(ours, files[2], 400)
    expected, _ = theirs.evaluate_word_analogies(str(files[2]), restrict_vocab=400)
    assert scores["total"].value == pytest.approx(expected) and scores["total"].used > 0
    assert scores["total"].used + scores["total"].skipped == 19544


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("pairs", "word1\tword2\n", ["line 1", "2 fields"]),
        ("pairs", "#\nword1\tword2\tmuch\n", ["line 2", "'much'"]),
        ("pairs", "no\tbody\t1\n", ["no pair"]),
        ("questions", "word1 word2 word3 word4\n", ["line 1", "section"]),
        ("questions", ": a\nword1 word2 word3\n", ["line 2", "3 fields"]),
        ("questions", ": a\nno bo dy xy\n", ["no question"]),
        ("questions", b": a\n\xff\xfe\n", ["UTF-8"]),
    ],
)
def test_bad_question_files_are_refused(tmp_path, kind, content, words):
    file = tmp_path / "file.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    vectors = WordVectors.of(build(CustomWord2VecModel), make_tokenizer(WORDS))
    with pytest.raises(ValueError) as error:
        (score_word_pairs if kind == "pairs" else score_analogies)(vectors, file)
    assert all(word in str(error.value) for word in ("file.txt", *words))


def test_evaluation_command(folder, tmp_path, capsys):
    pairs, questions = question_files(tmp_path, [(WORDS[i], WORDS[i + 1]) for i in range(30)])
    evaluation_main([str(folder), "--word_pairs", str(pairs), "--analogies", str(questions)])
    printed = capsys.readouterr().out
    assert "pairs spearman: " in printed and "pairs pairs: 30" in printed and "questions accuracy: " in printed
    with pytest.raises(SystemExit, match="^error: .*--word_pairs"):
        evaluation_main([str(folder)])
