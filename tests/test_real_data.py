"""Real text and the published GPT-2 vocabulary, where a folder of them is given: pytest -m data --data FOLDER."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Tokenizer

import hf_custom
from training import run_clm
from training.data import check_text_file, load_files

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
