"""Translation: pairs and their tokens, batches that two models share, translations and scores, and the script."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import SEQ2SEQ, tokenizer, widen
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

import hf_custom
from hf_custom.cards import snippet
from hf_custom.folders import TARGET_TOKENIZER
from hf_custom.hub import plan_upload
from training import run_translation
from training.args import TableArguments, parse_arguments
from training.embedded_tasks import HOW_MANY_NUMBERS, embedded_numbers, number_in_words
from training.length_groups import LengthGroups
from training.preflight import Quarantine
from training.tokenizer import train_tokenizer
from training.translation import (
    SOURCE,
    TARGET,
    PairArguments,
    encode_pairs,
    load_pairs,
    score_translations,
    translate,
)

pytest.importorskip("sacrebleu", reason="the extra `translation` is not installed")
SMOKE = str(Path(__file__).parent.parent / "training" / "recipes" / "translation_smoke.yaml")
WRITER = SEQ2SEQ[1]
PAIRS = [("one two", "eins zwei"), ("two", "zwei"), ("three one", "drei eins"), ("four", "vier")] * 5


def write_table(path, rows=PAIRS, columns=("en", "de")):
    lines = ["\t".join(columns), *("\t".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def columns(**kwargs):
    return PairArguments(source_column="en", target_column="de", **kwargs)


# --- The embedded task ---


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"), (7, "seven"), (13, "thirteen"), (40, "forty"), (42, "forty-two"), (100, "one hundred"),
        (219, "two hundred nineteen"), (1000, "one thousand"), (1042, "one thousand forty-two"),
        (300_000, "three hundred thousand"), (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
    ],
)  # fmt: skip
def test_number_is_read_in_english(number, words):
    assert number_in_words(number) == words


def test_embedded_numbers_are_different_and_the_same_each_time():
    rows = embedded_numbers()
    assert len(rows) == HOW_MANY_NUMBERS == len(set(rows[SOURCE])) == len(set(rows[TARGET]))
    assert rows[:] == embedded_numbers()[:]
    assert all(number_in_words(int(row[SOURCE].replace(",", ""))) == row[TARGET] for row in rows.select(range(99)))
    lengths = Counter(len(source.replace(",", "")) for source in rows[SOURCE])
    assert set(lengths) == {1, 2, 3, 4, 5, 6} and lengths[1] == 10 and lengths[2] >= 85


# --- Pairs ---


def test_any_two_columns_are_a_pair(tmp_path):
    path = write_table(tmp_path / "a.tsv", [(a, b, "x") for a, b in PAIRS], ("en", "de", "note"))
    held_out = write_table(tmp_path / "b.tsv", PAIRS[:2])
    splits = load_pairs(TableArguments(files=[path], validation_files=[held_out]), columns(), seed=0)
    assert list(zip(splits["train"][SOURCE], splits["train"][TARGET], strict=True)) == PAIRS
    assert splits["validation"][:] == {SOURCE: ["one two", "two"], TARGET: ["eins zwei", "zwei"]}
    turned = PairArguments(source_column="de", target_column="en")
    splits = load_pairs(TableArguments(files=[path], validation_files=[held_out]), turned, seed=0)
    assert splits["validation"][SOURCE] == ["eins zwei", "zwei"]


def test_languages_in_one_column_are_found_by_a_dot(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"translation": {"en": a, "de": b}}) + "\n" for a, b in PAIRS))
    pairs = PairArguments(source_column="translation.en", target_column="translation.de")
    splits = load_pairs(TableArguments(files=[str(path)]), pairs, seed=0)
    found = [pair for rows in splits.values() for pair in zip(rows[SOURCE], rows[TARGET], strict=True)]
    assert Counter(found) == Counter(PAIRS)


def test_parallel_files_are_read_line_by_line(tmp_path):
    # A form feed and a line separator stand within lines.
    sources = ["one\x0cone", "two\u2028two", "three", "four\r"] * 2
    files = [write_lines(tmp_path / "a.en", sources)]
    targets = [write_lines(tmp_path / "a.de", ["eins", "zwei", "drei", "vier"] * 2)]
    splits = load_pairs(TableArguments(files=files), PairArguments(target_files=targets), seed=0)
    found = {pair for rows in splits.values() for pair in zip(rows[SOURCE], rows[TARGET], strict=True)}
    assert found == {("one\x0cone", "eins"), ("two\u2028two", "zwei"), ("three", "drei"), ("four", "vier")}
    data = TableArguments(files=files, validation_files=files, test_files=files)
    pairs = PairArguments(target_files=targets, validation_target_files=targets, test_target_files=targets)
    splits = load_pairs(data, pairs, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "validation": 8, "test": 8}


def test_empty_side_is_refused_or_set_aside(tmp_path):
    path = write_table(tmp_path / "a.tsv", [*PAIRS, ("five", " ")])
    with pytest.raises(ValueError, match=r"row 20 of .*has nothing in column `de`"):
        load_pairs(TableArguments(files=[path], validation_files=[path]), columns(), seed=0)
    quarantine = Quarantine(str(tmp_path / "bad.jsonl"))
    held_out = write_table(tmp_path / "b.tsv")
    splits = load_pairs(TableArguments(files=[path], validation_files=[held_out]), columns(), 0, quarantine)
    quarantine.finish()
    (record,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert len(splits["train"]) == 20 and (record["row"], record["reason"]) == (20, "empty")


def test_empty_line_of_parallel_files_is_named(tmp_path):
    files = [write_lines(tmp_path / "a.en", ["one", "", "three"])]
    targets = [write_lines(tmp_path / "a.de", ["eins", "zwei", "drei"])]
    data = TableArguments(files=files, validation_files=files)
    with pytest.raises(ValueError, match=r"row 1 of .*a\.en.* has nothing in column `source`"):
        load_pairs(data, PairArguments(target_files=targets, validation_target_files=targets), seed=0)


WRONG_FLAGS = {
    "no such column": (
        "--files {table} --source_column fr --target_column de",
        "no column `fr`; its columns are en, de",
    ),
    "one column": ("--files {table} --source_column en --target_column en", "both 'en'. Name two"),
    "numbers": ("--files {numbers} --source_column en --target_column de", "column `de` holds .*int.*--target_column"),
    "a line too many": ("--files {lines} --target_files {more}", "has 4 lines but .*more.txt has 5"),
    "one side": (
        "--files {lines} --target_files {lines} --test_files {lines}",
        "--test_files was given without --test_t",
    ),
    "the other side": ("--target_files {lines}", "--target_files was given without --files"),
    "no file": ("--files {lines} --target_files lost.txt", "text file lost.txt does not exist"),
    "no rows": ("--files {header} --source_column en --target_column de", "has a header but no rows"),
    "one pair": ("--files {one} --source_column en --target_column de", "one row cannot be split"),
    "nothing": ("--files {empty} --target_files {empty}", "empty.txt is empty. Give a file"),
    "no beam": ("--num_beams 0", "--num_beams is 0 but at least 1"),
    "another family": ("--preset bert-mini --config_overrides hidden_size=32", "'bert-mini' is no encoder-decoder"),
    "pre-norm Marian": ("--stock --config_overrides norm_first=true", "Marian, which normalises sums alone"),
    "beyond the positions": ("--max_length 500", "--max_length is 500 but the model has 256 positions"),
    "everything too long": (
        "--files {long} --source_column en --target_column de --max_length 4",
        "every pair has more",
    ),
    "one tokenizer": ("--separate_vocabularies --tokenizer_name {tokenizer}", "no sub-folder target_tokenizer"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_mistake_ends_in_one_line(case, tmp_path):
    flags, message = WRONG_FLAGS[case]
    rows = [{"en": "one", "de": number} for number in range(20)]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "{tokenizer}" in flags:
        train_tokenizer(iter(["one two"]), "ended-bpe", 300).save_pretrained(tmp_path / "tokenizer")
    paths = {
        "table": write_table(tmp_path / "table.tsv"),
        "long": write_table(tmp_path / "long.tsv", [("one two three four five", "eins")] * 20),
        "numbers": str(tmp_path / "numbers.jsonl"),
        "lines": write_lines(tmp_path / "lines.txt", ["one", "two", "three", "four"]),
        "more": write_lines(tmp_path / "more.txt", ["eins", "zwei", "drei", "vier", "fünf"]),
        "empty": write_lines(tmp_path / "empty.txt", []),
        "header": write_table(tmp_path / "header.tsv", []),
        "one": write_table(tmp_path / "one.tsv", PAIRS[:1]),
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    output = tmp_path / "out"
    arguments = [SMOKE, "--output_dir", str(output)]
    if "--config_overrides" not in flags:
        arguments += ["--config_overrides", "d_model=32"]
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as ended:
        run_translation.main([*arguments, *flags.format(**paths).split()])
    assert "\n" not in str(ended.value)
    assert not list(output.glob("*.safetensors"))


def test_missing_sacrebleu_is_said_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(SystemExit, match=r"not installed. Run `pip install 'hf_custom\[translation\]'`"):
        run_translation.main([SMOKE, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- Tokens ---


@pytest.fixture(scope="module")
def readers():
    """A tokenizer of both sides, and one of the target alone."""
    both = train_tokenizer(iter([text for pair in PAIRS for text in pair]), "ended-bpe", 300)
    return both, train_tokenizer(iter([target for _, target in PAIRS]), "ended-bpe", 300)


def test_both_sides_end_with_the_end_token(readers, tmp_path):
    both, own = readers
    both.save_pretrained(tmp_path)
    rows = Dataset.from_dict({SOURCE: [pair[0] for pair in PAIRS], TARGET: [pair[1] for pair in PAIRS]})
    for reader, target in ((both, None), (both, own), (AutoTokenizer.from_pretrained(tmp_path), None)):
        encoded, count = encode_pairs(rows, reader, target, 64, is_cut=False)
        assert count == 0
        for row, (source, wanted) in zip(encoded, PAIRS, strict=True):
            assert row["input_ids"][-1] == reader.eos_token_id == row["labels"][-1]
            assert reader.decode(row["input_ids"], skip_special_tokens=True) == source
            assert (target or reader).decode(row["labels"], skip_special_tokens=True) == wanted
            assert row["length"] == max(len(row["input_ids"]), len(row["labels"]))


def test_long_pairs_are_left_out_of_training_and_cut_elsewhere(readers):
    reader, _ = readers
    rows = Dataset.from_dict({SOURCE: ["one two three four", "two"], TARGET: ["eins", "zwei"]})
    longest = len(reader("two")["input_ids"]) + 1
    encoded, count = encode_pairs(rows, reader, None, longest, is_cut=False)
    assert (len(encoded), count) == (1, 1) and encoded["input_ids"] == [reader("two")["input_ids"]]
    encoded, count = encode_pairs(rows, reader, None, longest, is_cut=True)
    assert (len(encoded), count) == (2, 0)
    assert len(encoded[0]["input_ids"]) == longest and encoded[0]["input_ids"][-1] == reader.eos_token_id


# --- Batches ---


def test_length_groups_depend_on_seed_and_epoch_alone():
    lengths = [(7 * i) % 23 + 1 for i in range(100)]

    def order(seed=1, epoch=0, draws=0):
        groups = LengthGroups(4, lengths, seed)
        groups.set_epoch(epoch)
        torch.rand(draws)
        return list(groups)

    assert order() == order(draws=5) and sorted(order()) == list(range(100))
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6
    spread = [max(part) - min(part) for part in ([lengths[i] for i in order()[k : k + 4]] for k in range(4, 100, 4))]
    assert sum(spread) / len(spread) < 4
    # The order is the host's for the generator's numbers.
    generator = torch.Generator().manual_seed(1_000_003)
    assert order() == list(LengthGroupedSampler(4, lengths=lengths, generator=generator))


def prepared(tmp_path, *flags):
    arguments = [SMOKE, "--output_dir", str(tmp_path), *flags]
    return run_translation.prepare(
        *parse_arguments(run_translation.ARGUMENTS, arguments, "", **run_translation.DEFAULTS)
    )


def epochs(trainer):
    """Batches of two epochs, with random numbers drawn between them as a model draws them."""
    loader = trainer.get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            torch.rand(3 + epoch)
            yield batch["input_ids"], batch["labels"]


def test_stock_has_the_size_the_batches_and_the_smoothing_of_ours(tmp_path):
    ours, stock = prepared(tmp_path / "ours"), prepared(tmp_path / "stock", "--stock")
    assert type(stock.trainer.model) is MarianMTModel
    assert type(ours.trainer.model) is hf_custom.CustomTransformerForSeq2SeqLM
    assert ours.trainer.model.num_parameters() == stock.trainer.model.num_parameters(only_trainable=True)
    batches = list(epochs(ours.trainer))
    set_seed(7)
    for (ids, labels), (stock_ids, stock_labels) in zip(batches, epochs(stock.trainer), strict=True):
        assert torch.equal(ids, stock_ids) and torch.equal(labels, stock_labels)
    assert len(batches) == 16 and not torch.equal(batches[0][0][:, :3], batches[8][0][:, :3])
    for name in ("dropout", "activation_function", "scale_embedding", "decoder_start_token_id", "decoder_ffn_dim"):
        assert getattr(ours.trainer.model.config, name) == getattr(stock.trainer.model.config, name), name
    assert stock.trainer.model.config.init_std == ours.trainer.model.config.initializer_range
    # One smooths in its loss, the other by the Trainer.
    assert (ours.trainer.model.config.label_smoothing, ours.trainer.args.label_smoothing_factor) == (0.1, 0.0)
    assert stock.trainer.args.label_smoothing_factor == 0.1 == ours.smoothing == stock.smoothing
    assert ours.trainer.args.lr_scheduler_type == stock.trainer.args.lr_scheduler_type == "inverse_sqrt"


# --- Translations and scores ---


@pytest.mark.parametrize("num_beams", [1, 3])
def test_translations_stand_in_the_order_of_their_sources(num_beams, capsys):
    reader = tokenizer()
    # Few positions, so that a batch's longest source does not say how long the translations of the others may be.
    model = WRITER.build(eos_token_id=None, max_position_embeddings=20).train()
    texts = ["a", "that hat is on the cat", "it", "the hat on it", "no"]
    options = {"num_beams": num_beams, "do_sample": False, "no_repeat_ngram_size": 1}
    together = translate(model, reader, texts, 18, batch_size=2, desc="trying", **options)
    alone = [translate(model, reader, [text], 18, **options)[0] for text in texts]
    assert together == alone and len(set(together)) > 2
    assert model.training and "trying: 100%" in capsys.readouterr().err


def test_sources_are_cut_and_translations_end_at_the_positions():
    reader, model = tokenizer(), WRITER.build(eos_token_id=None, max_position_embeddings=20)
    (found,) = translate(model, reader, ["that hat " * 40], 16, do_sample=False)
    (cut,) = translate(model, reader, [reader.decode(reader("that hat " * 40)["input_ids"][:16])], 16, do_sample=False)
    assert found == cut


def test_scores_are_those_of_sacrebleu():
    import sacrebleu

    translations, references = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "the dog barks"]
    scores, signature = score_translations(translations, references)
    assert scores["BLEU"] == sacrebleu.corpus_bleu(translations, [references]).score
    assert scores["chrF"] == sacrebleu.corpus_chrf(translations, [references]).score
    assert 0 < scores["BLEU"] < 100 and "tok:13a" in signature
    assert score_translations(references, references)[0] == pytest.approx({"BLEU": 100.0, "chrF": 100.0})


# --- The script ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that the script made, with two vocabularies and a test split."""
    folder = tmp_path_factory.mktemp("runs")
    table = write_table(folder / "pairs.tsv")
    flags = ["--files", table, "--validation_files", table, "--test_files", table, "--source_column", "en"]
    flags += ["--target_column", "de", "--separate_vocabularies", "--output_dir", str(folder / "mine")]
    run_translation.main([SMOKE, *flags])
    return folder / "mine", flags


def test_run_leaves_model_scores_translations_and_card(trained, capsys):
    folder, _ = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics) == ["BLEU", "chrF", "test BLEU", "test chrF"]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: translation" in card and "| BLEU signature | nrefs:1|" in card and "→ " in card
    assert "| length_penalty | 0.6 |" in card and "| label_smoothing | 0.1 |" in card
    for name in ("translations.json", "test_translations.json"):
        rows = json.loads((folder / name).read_text())
        assert [(row[SOURCE], row[TARGET]) for row in rows] == PAIRS
    references = [target for _, target in PAIRS]
    scores, _ = score_translations([row["translation"] for row in rows], references)
    assert scores == pytest.approx({"BLEU": metrics["test BLEU"], "chrF": metrics["test chrF"]})


def test_saved_model_decodes_as_it_was_scored(trained):
    folder, _ = trained
    reader, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    writer = AutoTokenizer.from_pretrained(folder, subfolder=TARGET_TOKENIZER)
    assert (model.generation_config.num_beams, model.generation_config.length_penalty) == (2, 0.6)
    row = json.loads((folder / "translations.json").read_text())[0]
    inputs = reader(row[SOURCE], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=inputs["input_ids"].shape[1] + 50)
    assert writer.decode(tokens[0], skip_special_tokens=True).strip() == row["translation"]
    assert reader.get_vocab() != writer.get_vocab()


def test_second_tokenizer_is_in_the_card_and_leaves_with_the_model(trained):
    folder, _ = trained
    code = snippet(folder, "me/mine", "3f2a90c")
    assert f'AutoTokenizer.from_pretrained("me/mine", revision="3f2a90c", subfolder="{TARGET_TOKENIZER}")' in code
    names = {name: kind for name, kind, _ in plan_upload(folder).files}
    assert names[f"{TARGET_TOKENIZER}/tokenizer.json"] == names["tokenizer.json"] == "tokenizer"
    assert not any("translations" in name for name in names)


def test_second_tokenizer_may_not_lead_elsewhere(trained, tmp_path):
    folder = tmp_path / "copy"
    widen(WRITER.build()).save_pretrained(folder)
    (folder / TARGET_TOKENIZER).mkdir()
    (folder / TARGET_TOKENIZER / "tokenizer.json").symlink_to(trained[0] / "tokenizer.json")
    with pytest.raises(ValueError, match="is a link to"):
        plan_upload(folder)


def test_checkpoint_goes_on_with_its_two_vocabularies(trained, tmp_path):
    folder, flags = trained
    flags = [*flags[: flags.index("--separate_vocabularies")], "--output_dir", str(tmp_path / "more")]
    recipe = json.dumps(
        {"max_steps": 1, "warmup_steps": 0, "max_length": 32, "num_beams": 1, "use_cpu": True, "save_strategy": "no"}
    )
    (tmp_path / "recipe.json").write_text(recipe)
    run_translation.main([str(tmp_path / "recipe.json"), "--model_name_or_path", str(folder), *flags])
    for name in ("", TARGET_TOKENIZER):
        before, after = (AutoTokenizer.from_pretrained(path / name) for path in (folder, tmp_path / "more"))
        assert before.get_vocab() == after.get_vocab() and before(["one"]) == after(["one"])
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (folder, tmp_path / "more"))
    assert before.config.decoder_vocab_size == after.config.decoder_vocab_size
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_vocabulary_that_disagrees_with_the_weights_is_refused(trained, tmp_path):
    folder, flags = trained
    large = train_tokenizer(iter([f"{chr(i) * 3} {i} " * 3 for i in range(300, 600)]), "ended-bpe", 600)
    large.save_pretrained(tmp_path / "large")
    large.save_pretrained(tmp_path / "larger" / TARGET_TOKENIZER)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "larger")
    flags = [*flags[: flags.index("--separate_vocabularies")], "--model_name_or_path", str(folder)]
    flags += ["--use_cpu", "true", "--output_dir", str(tmp_path / "out"), "--max_length", "32"]
    for name, message in (
        ("large", "error: the tokenizer has 600 entries but the model's `vocab_size` is"),
        ("larger", "error: the target's tokenizer has 600 entries but the model's `decoder_vocab_size` is"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_translation.main([*flags, "--tokenizer_name", str(tmp_path / name)])


def test_corpus_of_one_word_is_translated(tmp_path):
    table = write_table(tmp_path / "one.tsv", [("one", "eins")] * 20)
    flags = ["--files", table, "--source_column", "en", "--target_column", "de", "--learning_rate", "0.01"]
    flags += ["--num_beams", "1", "--max_steps", "30", "--output_dir", str(tmp_path / "mine")]
    run_translation.main([SMOKE, *flags, "--validation_fraction", "0.1"])
    translations = json.loads((tmp_path / "mine" / "translations.json").read_text())
    assert translations[0]["translation"].startswith("eins")


def test_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    """Batches grouped by length, after an interruption in an epoch."""
    flags = [SMOKE, "--num_train_epochs", "2", "--max_steps", "-1", "--save_strategy", "steps", "--save_steps", "3"]
    flags += ["--config_overrides", "d_model=32,encoder_layers=1,decoder_layers=1,dropout=0.2", "--validation_fraction"]
    flags += ["0.001", "--save_total_limit", "9"]
    run_translation.main([*flags, "--output_dir", str(tmp_path / "whole")])
    for path in (tmp_path / "whole").glob("checkpoint-*"):
        if path.name != "checkpoint-3":
            path.rename(tmp_path / path.name)
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    (tmp_path / "whole" / "model.safetensors").unlink()
    run_translation.main([*flags, "--output_dir", str(tmp_path / "whole"), "--resume"])
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_numbers_are_learned(tmp_path):
    flags = ["--output_dir", str(tmp_path / "numbers"), "--num_train_epochs", "12", "--save_strategy", "no"]
    flags += ["--config_overrides", "d_model=128,encoder_layers=2,decoder_layers=2,encoder_ffn_dim=512"]
    flags += ["--vocab_size", "320", "--use_cpu", "true"]
    run_translation.main(flags)
    assert json.loads((tmp_path / "numbers" / "metrics.json").read_text())["BLEU"] > 80
