"""Pre-training of ELMo and of LSTM language models, and taggers on top: the rows, the batches, the scripts."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import ELMO, LSTM_LM, VOCAB, widen
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForPreTraining, AutoModelForTokenClassification, AutoTokenizer

from hf_custom import CustomElmoConfig, CustomElmoForCausalLM, CustomElmoForPreTraining, CustomElmoTokenizer
from training import run_elmo, run_token_classification
from training.run_elmo import score_stream
from training.tokenizer import train_tokenizer
from training.words import Lexicon, WordCollator, encode_tagged, sentences, word_rows

RECIPES = Path(__file__).parent.parent / "training" / "recipes"
BILM, LM = str(RECIPES / "elmo_smoke.yaml"), str(RECIPES / "lstm_smoke.yaml")
TAGGED = [
    {"tokens": ["Ada", "Lovelace", "met", "Babbage", "in", "London"], "tags": "B-PER I-PER O B-PER O B-LOC".split()},
    {"tokens": ["London", "is", "large"], "tags": "B-LOC O O".split()},
    {"tokens": ["nobody", "met", "Ada"], "tags": "O O B-PER".split()},
]
FEW = ("--max_steps", "2", "--disable_tqdm", "true")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of sixty short sentences."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    things = ("cat", "dog", "owl", "hen", "fox")
    lines = (f"The {things[i % 5]} saw {i} {things[i % 3]}s." for i in range(60))
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def bilm(tmp_path_factory):
    """A folder of `run_elmo`, trained on the embedded corpus and on words beside it."""
    folder = tmp_path_factory.mktemp("bilm")
    words = write(folder / "words.jsonl", TAGGED * 3)
    run_elmo.main([BILM, "--words_files", words, "--output_dir", str(folder / "out"), *FEW])
    return folder / "out"


# --- Rows and batches ---


def test_text_is_cut_into_sentences_and_rows():
    text = 'A heading\n\nIt was\nlate. "Why?" he asked. Dr. No left.\nAll of it,\n  e.g. this.'
    expected = ["A heading", 'It was late. "Why?" he asked.', "Dr.", "No left.", "All of it, e.g. this."]
    assert list(sentences(text))[0] == expected[0] and list(sentences(text))[-1] == expected[-1]
    assert " ".join(sentences(text)) == " ".join(text.split()).replace("late. ", "late. ")
    reader = CustomElmoTokenizer(split_punctuation=True)
    rows = list(word_rows(["One two three four. Five six."], reader, 3))
    assert rows == [["One", "two", "three"], ["four", "."], ["Five", "six", "."]]


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_batch_is_what_the_tokenizer_gives_and_labels_are_numbers(kind):
    reader = train_tokenizer(iter(["the cat sat on the mat", "the dog"]), kind, 300)
    lexicon, texts = Lexicon(reader), ["the cat sat", "a dog"]
    rows = [{"input_ids": lexicon.index(text.split())} for text in texts]
    batch, expected = WordCollator(lexicon, predicts_words=True)(rows), reader(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    assert torch.equal(mask, expected["attention_mask"])
    assert torch.equal(batch["input_ids"][mask.bool()], expected["input_ids"][mask.bool()])
    numbers = reader.get_vocab()
    labels = [[reader.bos_token_id, *(numbers[word] for word in ("the", "cat", "sat")), reader.eos_token_id]]
    labels.append([reader.bos_token_id, reader.unk_token_id, numbers["dog"], reader.eos_token_id, -100])
    assert batch["labels"].tolist() == labels


def test_most_frequent_words_are_the_vocabulary_in_an_order_of_their_own():
    texts = ["b b b a a c d e"] + [f"w{index}" for index in range(400)]
    first, again = (train_tokenizer(iter(part), "words", 300) for part in (texts, texts[::-1]))
    assert first.get_vocab() == again.get_vocab() and len(first) == 300
    assert first.convert_ids_to_tokens([0, 1, 2, 3, 4, 5]) == ["<PAD>", "<UNK>", "<S>", "</S>", "b", "a"]


def test_tagged_rows_have_a_label_a_word():
    lexicon = Lexicon(CustomElmoTokenizer())
    encoded, cut = encode_tagged(Dataset.from_list(TAGGED), lexicon, ["O", "B-LOC", "B-PER", "I-PER"], 6)
    assert cut == 1 and encoded["labels"][:2] == [[-100, 2, 3, 0, 2, -100], [-100, 1, 0, 0, -100]]
    assert encoded["input_ids"][1] == [0, 6, 7, 8, 5]
    batch = WordCollator(lexicon)([encoded[0], encoded[1]])
    assert batch["labels"].tolist()[1] == [-100, 1, 0, 0, -100, -100]


# --- Scripts ---


def test_smoke_run_trains_both_directions_and_can_be_opened(bilm):
    metrics = metrics_of(bilm)
    assert metrics.keys() == {"perplexity", "forward perplexity", "backward perplexity"}
    both = math.sqrt(metrics["forward perplexity"] * metrics["backward perplexity"])
    assert math.isclose(metrics["perplexity"], both, rel_tol=1e-4) and 1 < both < 1000
    history = json.loads((bilm / "trainer_state.json").read_text())["log_history"]
    assert {"forward_loss", "backward_loss"} <= history[0].keys()
    # Words are counted, not their characters.
    assert history[1]["num_input_tokens_seen"] <= 2 * 8 * 18
    model, reader = AutoModelForPreTraining.from_pretrained(bilm), AutoTokenizer.from_pretrained(bilm)
    assert type(model) is CustomElmoForPreTraining and type(reader) is CustomElmoTokenizer
    assert len(reader) == model.config.vocab_size == 512 and reader.split_punctuation
    outputs = model(**reader("It was good.", return_tensors="pt"))
    assert outputs.logits.shape == outputs.backward_logits.shape == (1, 6, 512)
    card = (bilm / "README.md").read_text()
    assert f"{metrics['perplexity']:.4g}" in card and "ELMo" in card


def test_scored_perplexity_is_that_of_all_words(bilm, text):
    """Of a score by batches of unequal size, against one text at a time."""
    argv = ["--output_dir", str(bilm.parent / "scored"), "--model_name_or_path", str(bilm), "--files", text]
    argv += ["--validation_fraction", "0.5"]
    arguments = run_elmo.parse_arguments(run_elmo.ARGUMENTS, argv, "", **{**run_elmo.DEFAULTS, "preset": "elmo-mini"})
    trainer = run_elmo.prepare(*arguments)
    trainer.args.per_device_eval_batch_size = 7
    found, model = run_elmo.measure(trainer), trainer.model.eval()
    nats = count = 0
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        words = len(row["input_ids"]) - 1
        nats, count = nats + model(**batch).forward_loss.item() * words, count + words
    assert math.isclose(found["forward perplexity"], math.exp(nats / count), rel_tol=1e-4)


def test_language_model_trains_writes_and_is_scored_with_its_state(text, tmp_path):
    run_elmo.main([LM, "--files", text, "--output_dir", str(tmp_path), *FEW])
    metrics = metrics_of(tmp_path)
    assert metrics.keys() == {"perplexity", "word perplexity", "bits per byte"}
    assert 1 < metrics["perplexity"] < 1000 and metrics["perplexity"] < metrics["word perplexity"]
    model, reader = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(model) is CustomElmoForCausalLM
    ids = model.generate(**reader("It was", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert ids.shape[1] == reader("It was", return_tensors="pt")["input_ids"].shape[1] + 5


@torch.no_grad()
def test_score_reads_the_whole_text_before_each_token():
    model = widen(CustomElmoForCausalLM(CustomElmoConfig(**LSTM_LM))).eval()
    ids = torch.randint(0, VOCAB, (23,))
    expected = nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum").item()
    for chunk in (1, 5, 100):
        score = score_stream(model, ids, num_bytes=50, chunk=chunk)
        assert math.isclose(score.nats, expected, rel_tol=1e-5) and score.tokens == 22


def test_tagger_goes_on_from_the_language_models(bilm, tmp_path):
    rows = write(tmp_path / "rows.jsonl", TAGGED * 10)
    argv = ["--files", rows, "--model_name_or_path", str(bilm), "--output_dir", str(tmp_path / "out"), *FEW]
    run_token_classification.main([*argv, "--task_fields", "classifier_lstm_size=8,freeze_bilm=true"])
    metrics = metrics_of(tmp_path / "out")
    assert {"f1", "accuracy"} <= metrics.keys()
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert model.config.freeze_bilm and model.tagger.hidden_size == 8 and model.config.num_labels == 4
    kept, trained = load_file(bilm / "model.safetensors"), model.state_dict()
    name = "elmo.forward_lstm.layers.0.lstm.weight_ih_l0"
    assert torch.equal(kept[name], trained[name])
    assert trained["elmo.scalar_mix.weights"].abs().sum() > 0
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model(**reader("Ada met nobody", return_tensors="pt")).logits.shape == (1, 5, 4)


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_tagger_without_language_models_starts_from_nothing(kind, tmp_path):
    rows = write(tmp_path / "rows.jsonl", TAGGED * 10)
    fields = f"num_hidden_layers=0,projection_size=8,input_type={kind},classifier_lstm_size=8"
    argv = ["--files", rows, "--preset", "elmo-mini", "--config_overrides", fields, "--output_dir", str(tmp_path / "o")]
    run_token_classification.main([*argv, *FEW])
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "o")
    assert not model.elmo.forward_lstm.layers and model.config.input_type == kind


def test_resumed_run_ends_with_the_same_weights(text, tmp_path):
    flags = [
        BILM,
        "--files",
        text,
        "--max_steps",
        "4",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--disable_tqdm",
        "true",
    ]
    run_elmo.main([*flags, "--output_dir", str(tmp_path / "a")])
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "b" / "checkpoint-2")
    run_elmo.main([*flags, "--output_dir", str(tmp_path / "b"), "--resume"])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- Mistakes ---


def test_one_word_is_a_corpus(tmp_path):
    (tmp_path / "one.txt").write_text("word\n" * 3)
    argv = [BILM, "--files", str(tmp_path / "one.txt"), "--validation_files", str(tmp_path / "one.txt")]
    run_elmo.main([*argv, "--output_dir", str(tmp_path / "out"), *FEW])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 5
    assert metrics_of(tmp_path / "out")["perplexity"] < 10


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "both"], ("--task", "'both'", "bilm, lm")),
        (["--files", "$empty"], ("empty.txt is empty",)),
        (["--task", "lm", "--words_files", "$rows"], ("--words_files", "--task bilm")),
        (["--words_files", "$rows", "--tokens_column", "words"], ("`words`", "--tokens_column")),
        (["--preset", "gpt2-mini", "--config_overrides", "n_layer=1"], ("gpt2-mini", "no ELMo", "elmo-mini")),
        (["--streaming", "true"], ("--streaming",)),
        (["--config_overrides", "cell_sizes=3"], ("`cell_sizes`", "`cell_size`")),
        (["--tokenizer_name", "$other"], ("the model reads characters", "gives words")),
        (["--tokenizer_name", "$bpe"], ("the model reads characters", "pieces of words")),
        (["--files", "nowhere.txt"], ("nowhere.txt",)),
    ],
    ids=str,
)
def test_mistake_ends_in_one_line(flags, words, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    train_tokenizer(iter(["the cat"]), "words", 300).save_pretrained(tmp_path / "other")
    train_tokenizer(iter(["the cat"] * 3), "bpe", 300).save_pretrained(tmp_path / "bpe")
    known = {"$empty": "empty.txt", "$other": "other", "$bpe": "bpe"}
    paths = {name: str(tmp_path / file) for name, file in known.items()}
    paths["$rows"] = write(tmp_path / "rows.jsonl", TAGGED)
    argv = [paths.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as exit_:
        run_elmo.main([BILM, *argv, "--output_dir", str(tmp_path / "out")])
    message = str(exit_.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_vocabulary_of_another_model_is_refused(bilm, tmp_path):
    reader = train_tokenizer(iter(["some other words"]), "characters", 300)
    reader.save_pretrained(tmp_path / "reader")
    argv = ["--model_name_or_path", str(bilm), "--tokenizer_name", str(tmp_path / "reader"), *FEW]
    with pytest.raises(SystemExit, match=r"vocabulary has 7 words but the model's `vocab_size` is 512"):
        run_elmo.main([*argv, "--output_dir", str(tmp_path / "out")])


def test_bad_row_of_words_is_set_aside(text, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [*TAGGED, {"tokens": [], "tags": []}])
    argv = [BILM, "--files", text, "--words_files", rows, "--output_dir", str(tmp_path / "out"), *FEW]
    with pytest.raises(SystemExit, match="row 3 of the rows of words"):
        run_elmo.main(argv)
    run_elmo.main([*argv, "--quarantine", str(tmp_path / "bad.jsonl")])
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1


def test_words_are_read_by_number_on_request(text, tmp_path):
    fields = "cell_size=32,projection_size=16,input_type=words,tie_word_embeddings=true"
    run_elmo.main([BILM, "--files", text, "--config_overrides", fields, "--output_dir", str(tmp_path), *FEW])
    model = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.elmo.embeddings.weight
    assert ELMO["input_type"] == model.config.input_type == "words"
