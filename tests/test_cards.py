"""Model cards: every number from `card.json`, no empty section, valid metadata, and snippets that run."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from test_processing_blip2 import image_processor, make
from test_remote_code import QFORMER
from tiny import GPT2, LABELS, MODELS, SEQ2SEQ, VISION, VOCAB, tokenizer, widen
from transformers import DataCollatorForLanguageModeling, TrainingArguments

import hf_custom
from hf_custom.cards import MARK, RECORD, CardRecord, render_card, snippet
from hf_custom.hub import save_model_folder
from training.plots import plot_loss_curve
from training.tokenizer import train_tokenizer
from training.trainer import CustomTrainer

ROWS = {row.name: row for row in MODELS + SEQ2SEQ}
HISTORY = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 1.7}]
RECORD_OF_ALL = CardRecord(
    "tiny",
    "three lines of text",
    metrics={"tiny": {"accuracy": 0.8712345, "loss": 12.0}, "chance": {"accuracy": 1 / 3}},
    training={"learning_rate": 3e-4, "steps": 12, "tokens per second (median)": "1,234"},
    curve="curve.png",
    pictures={"matrix.png": "Confusion matrix"},
    sample="It was what it was.",
    datasets=["someone/lines"],
    base_model="someone/tiny-base",
)

# Runs each folder's snippet there, where the package cannot be imported; prints what each printed.
RUN = """
import contextlib, io, json, os, sys, warnings
sys.modules["hf_custom"] = None
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
found = {}
for folder, code in json.load(open(sys.argv[1])).items():
    os.chdir(folder)
    out = io.StringIO()
    names = {}
    with contextlib.redirect_stdout(out):
        exec(code, names)
    found[folder] = [out.getvalue(), type(names["model"]).__name__]
print(json.dumps(found))
"""


def words():
    """A tokenizer with a mask."""
    return train_tokenizer(iter(["It was good. What was good? The soup was good."]), "wordpiece", 300)


def build(name):
    """A model and what reads its inputs."""
    if name == "CustomBlip2ForConditionalGeneration":
        processor = make(num_query_tokens=2)
        config = hf_custom.CustomBlip2Config(
            vision_config=VISION,
            qformer_config=QFORMER,
            text_config={**GPT2, "vocab_size": VOCAB + 1, "model_type": "custom_gpt2"},
            num_query_tokens=2,
            image_token_index=processor.image_token_id,
        )
        return widen(hf_custom.CustomBlip2ForConditionalGeneration(config)), processor
    if name == "CustomBlip2VisionForImageClassification":
        config = hf_custom.CustomBlip2VisionConfig(**VISION, num_labels=LABELS)
        return widen(hf_custom.CustomBlip2VisionForImageClassification(config)), image_processor()
    if name.startswith("CustomBert"):
        reader = words()
        model = ROWS[name].build(vocab_size=len(reader), pad_token_id=0)
        return model, reader
    return ROWS[name].build(), tokenizer()


# What the snippet prints, by class.
PRINTED = {
    "CustomGPT2ForCausalLM": r"It was.*",
    "CustomGPT2ForSequenceClassification": r"LABEL_[0-2]\n",
    "CustomBertModel": r"torch.Size\(\[1, \d+, 32\]\)\n",
    "CustomBertForMaskedLM": r".+\n",
    "CustomBertForSequenceClassification": r"LABEL_[0-2]\n",
    "CustomBertForTokenClassification": r"\['LABEL_[0-2]'.*\]\n",
    "CustomBertForQuestionAnswering": r".*\n",
    "CustomBertForImageTextRetrieval": r"",
    "CustomBertForVisualQuestionAnswering": r"",
    "CustomBlip2VisionForImageClassification": r"LABEL_[0-2]\n",
    "CustomBlip2ForConditionalGeneration": r".*\n",
    "CustomTransformerForSeq2SeqLM": r".*\n",
}


def save(folder, model, reader, record):
    for picture in ("curve.png", "matrix.png"):
        plot_loss_curve(HISTORY, folder.parent / picture, "tiny")
    pictures = [folder.parent / name for name in ("curve.png", "matrix.png")]
    return save_model_folder(folder, model, reader, record, pictures)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each class, with its card."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("cards")
    return {name: save(root / name, *build(name), RECORD_OF_ALL) for name in PRINTED}


@pytest.fixture(scope="module")
def printed(folders, tmp_path_factory):
    """What the snippets of the cards printed, and the class of each model."""
    scratch = tmp_path_factory.mktemp("snippets")
    codes = {str(folder): code_of((folder / "README.md").read_text()) for folder in folders.values()}
    (scratch / "codes.json").write_text(json.dumps(codes))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "home")}
    command = [sys.executable, "-I", "-c", RUN, str(scratch / "codes.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def code_of(card):
    return re.search(r"```python\n(.*?)\n```", card, re.DOTALL).group(1)


each_class = pytest.mark.parametrize("name", PRINTED)


@each_class
def test_snippet_runs_without_the_package(name, folders, printed):
    out, model_class = printed[str(folders[name])]
    assert model_class == name
    assert re.fullmatch(PRINTED[name], out, re.DOTALL)


@each_class
def test_metadata_holds_the_measured_numbers(name, folders):
    data = ModelCard.load(folders[name] / "README.md").data
    assert {result.metric_type: result.metric_value for result in data.eval_results} == RECORD_OF_ALL.metrics["tiny"]
    assert (data.license, data.library_name, data.base_model) == ("apache-2.0", "transformers", "someone/tiny-base")
    assert data.datasets == ["someone/lines"] and "custom_code" in data.tags


def numbers(value):
    """Every number in a JSON value, and those in its strings."""
    if isinstance(value, dict):
        return {number for item in value.values() for number in numbers(item)}
    if isinstance(value, list):
        return {number for item in value for number in numbers(item)}
    if isinstance(value, str):
        return {value}
    return {str(value), f"{value:.4g}"} if isinstance(value, int | float) else set()


def test_every_number_in_a_table_is_in_the_record(folders):
    for folder in folders.values():
        recorded = numbers(json.loads((folder / RECORD).read_text()))
        rows = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| ")]
        cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")[1:]]
        found = [cell for cell in cells if re.search(r"\d", cell)]
        assert len(found) == 6 and set(found) <= recorded


def test_no_section_is_empty_and_no_space_is_wasted(folders):
    for folder in folders.values():
        text = ModelCard.load(folder / "README.md").text
        sections = re.split(r"^#+ .*$", text, flags=re.MULTILINE)
        assert len(sections) == 6 and all(section.strip() for section in sections)
        assert "\n\n\n" not in text and MARK in text and "None" not in text and not re.search("{[{%]", text)
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (folder / picture).is_file()


def test_snippet_pins_the_commit_that_is_named(folders):
    code = snippet(folders["CustomGPT2ForCausalLM"], "me/tiny", "3f2a90c")
    assert code.count('("me/tiny", revision="3f2a90c", trust_remote_code=True)') == 2
    code = snippet(folders["CustomBertForImageTextRetrieval"], "me/tiny", "3f2a90c")
    assert code.count('"me/tiny", revision="3f2a90c"') == 3


def test_record_round_trips(tmp_path):
    RECORD_OF_ALL.save(tmp_path)
    assert CardRecord.load(tmp_path) == RECORD_OF_ALL


def test_card_without_results_says_so_where_it_is_asked_for(folders, tmp_path):
    folder = folders["CustomGPT2ForCausalLM"]
    record = replace(RECORD_OF_ALL, metrics={}, curve=None, pictures={})
    folder = save(tmp_path / "model", *build("CustomGPT2ForSequenceClassification"), RECORD_OF_ALL)
    record.save(folder)
    card = render_card(folder, with_results=False)
    assert card.data.eval_results is None and "No results on held-out data were recorded." in card.text
    with pytest.raises(ValueError, match="no `metrics` of 'tiny'. Evaluate the model"):
        render_card(folder)


WRONG = {
    "not a number": ({"metrics": {"tiny": {"loss": float("nan")}}}, "loss of 'tiny' is nan, no number"),
    "text": ({"metrics": {"tiny": {"loss": "low"}}}, "loss of 'tiny' is 'low', no number"),
    "of another model": ({"metrics": {"other": {"loss": 1.0}}}, "no `metrics` of 'tiny'"),
    "picture": ({"curve": "lost.png"}, "shows lost.png, which is not there"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_record_is_refused(kind, tmp_path):
    fields, message = WRONG[kind]
    model, reader = build("CustomGPT2ForCausalLM")
    record = replace(RECORD_OF_ALL, **{"curve": None, "pictures": {}, **fields})
    with pytest.raises((ValueError, OSError), match=message):
        save_model_folder(tmp_path / "model", model, reader, record)
    # Nothing half-written.
    assert list(tmp_path.iterdir()) == []


def test_record_with_a_strange_field_is_refused(tmp_path):
    (tmp_path / RECORD).write_text('{"name": "tiny", "data": "text", "metric": {}}')
    with pytest.raises(ValueError, match="unknown field 'metric'"):
        CardRecord.load(tmp_path)
    (tmp_path / RECORD).write_text('{"name": "tiny"}')
    with pytest.raises(ValueError, match="lacks the field 'data'"):
        CardRecord.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no card.json"):
        CardRecord.load(tmp_path / "elsewhere")


def test_trainer_of_an_own_script_writes_the_card_of_its_last_evaluation(tmp_path):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4]}] * 4)
    args = TrainingArguments(tmp_path / "mine", max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    trainer = CustomTrainer(
        ROWS["CustomGPT2ForCausalLM"].build(),
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer(),
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    )
    trainer.train()
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card(dataset="someone/lines", finetuned_from="someone/base", license="mit")
    data = ModelCard.load(Path(args.output_dir) / "README.md").data
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [("loss", loss)]
    assert (data.model_name, data.license, data.base_model, data.datasets) == (
        "mine",
        "mit",
        "someone/base",
        ["someone/lines"],
    )


def test_trainer_keeps_no_pickle_and_no_token(tmp_path):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4]}] * 4)
    token = "hf_" + "a1" * 17
    args = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[], save_steps=1, hub_token=token)
    trainer = CustomTrainer(
        ROWS["CustomGPT2ForCausalLM"].build(),
        args,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    )
    trainer.train()
    trainer.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"training_args.json", "trainer_state.json", "optimizer.pt"}
    assert not [path for path in files if path.name == "training_args.bin" or token.encode() in path.read_bytes()]
    assert args.hub_token == token and json.loads((tmp_path / "training_args.json").read_text())["max_steps"] == 1


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategy_that_pushes_pickles_is_refused(strategy, tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[], push_to_hub=True, hub_strategy=strategy)
    with pytest.raises(ValueError, match="optimizer's state as a pickle"):
        CustomTrainer(ROWS["CustomGPT2ForCausalLM"].build(), args)
