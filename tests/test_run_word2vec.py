"""The script that trains word2vec: runs whole, learns, resumes exactly, and refuses what cannot be learned from."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

from hf_custom.cli import main as cli_main
from training import run_word2vec
from training.args import parse_arguments
from training.word_pairs import make_tokenizer
from training.word_trainer import ChunkUpdates

SMOKE = str(Path(__file__).parent.parent / "training" / "recipes" / "word2vec_smoke.yaml")
QUIET = ("--disable_tqdm", "true")
SUBJECTS = (["cat", "dog", "cow", "hen"], ["red", "blue", "green", "pink"], ["one", "two", "six", "ten"])


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Sentences of four words, all of one subject."""
    generator = random.Random(0)
    lines = [" ".join(generator.choices(generator.choice(SUBJECTS), k=4)) for _ in range(1500)]
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def run(folder, *arguments, recipe=SMOKE):
    run_word2vec.main([recipe, "--output_dir", str(folder), *QUIET, *arguments])
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder of the smoke recipe, on the embedded corpus."""
    return run(tmp_path_factory.mktemp("smoke") / "out")


def test_run_leaves_a_model_that_others_load(smoke, capsys):
    metrics = json.loads((smoke / "metrics.json").read_text())
    assert 2 < metrics["loss"] < 6 * 0.6932
    card = (smoke / "README.md").read_text()
    for word in ("word2vec (Mikolov", f"{metrics['loss']:.4g}", "skip_gram", "loss_curve.png", "A sample"):
        assert word in card
    model, tokenizer = AutoModel.from_pretrained(smoke), AutoTokenizer.from_pretrained(smoke)
    assert len(tokenizer) == model.config.vocab_size and model.config.window_size == 3
    found = model.most_similar("python", tokenizer=tokenizer, topn=3)
    assert len(found) == 3 and all(isinstance(word, str) for word, _ in found)
    log = json.loads((smoke / "trainer_state.json").read_text())["log_history"]
    assert all(entry["tokens_per_second"] > 0 for entry in log if "loss" in entry)
    cli_main(["push", str(smoke), "me/words", "--dry-run"])
    printed = capsys.readouterr().out
    assert "modeling_word2vec.py" in printed and "tokenizer.json" in printed and "nothing was sent" in printed


@pytest.mark.parametrize(
    ("preset", "threads"), [("word2vec-mini", "1"), ("cbow-mini", "1"), ("word2vec-mini", "2"), ("cbow-mini", "2")]
)
def test_words_of_a_subject_come_together(topics, tmp_path, preset, threads):
    arguments = ["--files", topics, "--split_lines", "true", "--preset", preset, "--update_threads", threads]
    sizes = ["--config_overrides", "hidden_size=16,subsample_threshold=0", "--chunk_words", "500"]
    folder = run(tmp_path / "out", *arguments, *sizes, "--num_train_epochs", "12", "--validation_fraction", "0")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for words in SUBJECTS:
        for word in words:
            near = {found for found, _ in model.most_similar(word, topn=3, tokenizer=tokenizer)}
            assert near == set(words) - {word}


def test_run_is_the_same_each_time(smoke, tmp_path):
    assert_same(smoke, run(tmp_path / "again"))
    other = weights(run(tmp_path / "other", "--seed", "7"))
    assert not torch.equal(other["output_embeddings.weight"], weights(smoke)["output_embeddings.weight"])


@pytest.mark.parametrize("threads", ["1", "2"])
def test_each_epoch_draws_every_chunk_anew(topics, tmp_path, monkeypatch, threads):
    seen, updates = [], ChunkUpdates.updates

    def spy(self, epoch, chunk):
        seen.append((epoch, chunk))
        return updates(self, epoch, chunk)

    monkeypatch.setattr(ChunkUpdates, "updates", spy)
    arguments = ["--split_lines", "true", "--chunk_words", "1500", "--num_train_epochs", "2"]
    trainer = run_word2vec.prepare(
        *parse_arguments(
            run_word2vec.ARGUMENTS,
            [SMOKE, "--output_dir", str(tmp_path), "--files", topics, *arguments, "--update_threads", threads, *QUIET],
            "",
            **run_word2vec.DEFAULTS,
        )
    ).trainer
    trainer.train()
    # The guards ask for the last step's loss once more.
    assert set(seen) == {(epoch, chunk) for epoch in (0, 1) for chunk in range(len(trainer.train_dataset))}
    assert len(trainer.train_dataset) > 2


@pytest.mark.parametrize("stop", [1, 3], ids=["in the first epoch", "in the second"])
def test_resumed_run_is_the_straight_run(topics, tmp_path, stop):
    arguments = ["--files", topics, "--split_lines", "true", "--chunk_words", "1500", "--num_train_epochs", "3"]
    saving = ["--save_strategy", "steps", "--save_steps", str(stop)]
    straight = run(tmp_path / "straight", *arguments, *saving, "--save_total_limit", "99")
    # A run that was interrupted after its first checkpoint.
    cut = tmp_path / "cut"
    cut.mkdir()
    (straight / f"checkpoint-{stop}").rename(cut / f"checkpoint-{stop}")
    run(cut, *arguments, *saving, "--resume")
    assert_same(straight, cut)
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (straight, cut)]
    assert states[0]["global_step"] == states[1]["global_step"] > stop
    losses = [[entry.get("loss") for entry in state["log_history"]] for state in states]
    assert losses[0] == losses[1]


def test_resume_with_another_text_is_refused(topics, tmp_path):
    first = ["--split_lines", "true", "--chunk_words", "1500", "--save_strategy", "steps", "--save_steps", "1"]
    folder = run(tmp_path / "out", "--files", topics, *first)
    other = tmp_path / "other.txt"
    text = Path(topics).read_text()
    other.write_text("dog" + text[3:])
    assert text[:3] != "dog"
    with pytest.raises(SystemExit, match="^error: .*training data changed"):
        run(folder, "--files", str(other), *first, "--resume")


def test_training_goes_on_from_a_model(topics, smoke, tmp_path):
    """With its words: those of another text that it does not know are left out."""
    text = tmp_path / "text.txt"
    text.write_text("the class of an object is a string that the user never saw\n" * 40)
    folder = run(
        tmp_path / "out",
        "--model_name_or_path",
        str(smoke),
        "--files",
        str(text),
        recipe=recipe_without_preset(tmp_path),
    )
    before, after = weights(smoke), weights(folder)
    assert before["word2vec.embeddings.weight"].shape == after["word2vec.embeddings.weight"].shape
    moved = (before["word2vec.embeddings.weight"] != after["word2vec.embeddings.weight"]).any(1)
    assert 2 < moved.sum() < 15


def recipe_without_preset(folder):
    lines = [line for line in Path(SMOKE).read_text().splitlines() if not line.startswith("config_overrides")]
    (folder / "recipe.yaml").write_text("\n".join(lines) + "\n")
    return str(folder / "recipe.yaml")


def test_scores_of_files_are_in_the_metrics(topics, tmp_path):
    pairs, questions = tmp_path / "animals.tsv", tmp_path / "q.txt"
    pairs.write_text("cat\tdog\t9\ncat\tred\t1\nred\tblue\t8\ncow\tten\t2\nno\tbody\t5\n")
    questions.write_text(": all\ncat dog red blue\ncat dog one two\n")
    arguments = ["--files", topics, "--split_lines", "true", "--chunk_words", "500", "--num_train_epochs", "6"]
    scored = ["--word_pairs", str(pairs), "--analogies", str(questions), "--validation_fraction", "0"]
    folder = run(tmp_path / "out", *arguments, "--config_overrides", "hidden_size=16,subsample_threshold=0", *scored)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["animals spearman"] > 0.5 and metrics["animals pairs"] == 4 and metrics["q questions"] == 2
    assert "loss" not in metrics


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("", (), ["text.txt"]),
        ("  \n \n", (), ["text"]),
        ("word " * 50, (), ["one word alone", "'word'"]),
        ("a b c d e f\n", (), ["--min_count 5", "leaves 0 of 6"]),
        ("a b " * 9, ("--min_count", "0"), ["--min_count is 0"]),
        ("a b " * 9, ("--config_overrides", "window_size=0"), ["`window_size` is 0"]),
        ("a b " * 9, ("--config_overrides", "num_negatives=0"), ["`num_negatives` is 0"]),
        ("a b " * 9, ("--config_overrides", "hidden_size=-1"), ["`hidden_size` is -1"]),
        ("a b " * 9, ("--config_overrides", "window=2"), ["`window_size`"]),
        ("a b " * 9, ("--preset", "gpt2-mini"), ["word2vec-mini"]),
        ("a b " * 9, ("--update_threads", "0"), ["--update_threads is 0"]),
        ("a b " * 9, ("--chunk_words", "0"), ["--chunk_words"]),
        ("a b " * 9, ("--split", "letters"), ["--split", "whitespace"]),
        ("a b " * 9, ("--validation_fraction", "1"), ["--validation_fraction"]),
        ("a b " * 9, ("--word_pairs", "nowhere.tsv"), ["nowhere.tsv", "--word_pairs"]),
        ("a b " * 9, ("--gradient_accumulation_steps", "2"), ["--gradient_accumulation_steps is 2"]),
        ("a b " * 9, ("--bf16", "true"), ["--bf16"]),
        ("a b " * 9, ("--text_column", "words"), ["words", "--text_column"]),
    ],
)
def test_mistake_ends_the_script_with_one_line(tmp_path, content, arguments, words):
    file = tmp_path / "text.txt"
    file.write_text(content)
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "out", "--files", str(file), *arguments)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_rows_are_refused_or_put_aside(tmp_path, capsys):
    file, aside = tmp_path / "rows.jsonl", tmp_path / "bad.jsonl"
    rows = [{"text": "a b c d " * 20}, {"text": ""}, {"text": "b c a d " * 20}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="^error: .*rows.jsonl.*text"):
        run(tmp_path / "out", "--files", str(file))
    run(tmp_path / "out", "--files", str(file), "--quarantine", str(aside))
    assert len(aside.read_text().splitlines()) == 1 and "160 words" in capsys.readouterr().out


def test_vocabulary_that_disagrees_with_the_weights_ends_the_script(topics, smoke, tmp_path):
    model = AutoModelForPreTraining.from_pretrained(smoke)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(["cat", "dog"]).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="^error: .*vocab_size"):
        arguments = ["--model_name_or_path", str(tmp_path / "model"), "--files", topics]
        run(tmp_path / "out", *arguments, recipe=recipe_without_preset(tmp_path))


def test_updates_that_are_too_long_stop_the_run(topics, tmp_path):
    with pytest.raises(SystemExit, match="^error: .*(loss|learning rate)"):
        run(tmp_path / "out", "--files", topics, "--split_lines", "true", "--learning_rate", "1e38")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        run_word2vec.main(["--help"])
    printed = capsys.readouterr().out
    assert "python -m training.run_word2vec --output_dir" in printed and "--update_threads" in printed
