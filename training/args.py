"""Arguments of the scripts: dataclasses with a help string each, from flags, from one recipe, or from both."""

import argparse
import difflib
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, TrainingArguments

from training.guards import NONFINITE_ACTIONS, apply_timeout


@dataclass
class DataArguments:
    """What to train on. With nothing named: Python's language reference, which needs no network."""

    dataset_name: str | None = field(default=None, metadata={"help": "data set of the Hub"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    files: list[str] | None = field(
        default=None, metadata={"help": "local files or folders: txt, md, csv, tsv, json, jsonl or parquet"}
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "held-out files; else a share is split"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    validation_fraction: float = field(default=0.1, metadata={"help": "share of the text to hold out"})
    streaming: bool = field(default=False, metadata={"help": "read the data as it is needed (needs --max_steps)"})
    shuffle_buffer: int = field(
        default=0, metadata={"help": "rows of a stream among which the next is drawn; 0 for their own order"}
    )
    block_size: int = field(default=256, metadata={"help": "tokens in a training row"})
    num_proc: int | None = field(default=None, metadata={"help": "processes that tokenize"})
    quarantine: str | None = field(
        default=None, metadata={"help": "file for bad rows, which are then left out and counted; else one is refused"}
    )

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction is {self.validation_fraction} but a share lies between 0 and 1.")
        if self.shuffle_buffer < 0 or (self.shuffle_buffer and not self.streaming):
            raise ValueError(
                f"--shuffle_buffer is {self.shuffle_buffer} but counts rows of a stream, drawn from at random. Pass "
                "--streaming with it; other data is always shuffled."
            )
        if self.block_size < 2:
            raise ValueError(f"--block_size is {self.block_size} but a row needs at least 2 tokens.")

    @property
    def description(self) -> str:
        """The data in words, for the model card."""
        if self.dataset_name:
            return f"the data set `{self.dataset_name}`" + (f" ({self.dataset_config})" if self.dataset_config else "")
        if self.files:
            return "local text: " + ", ".join(f"`{Path(file).name}`" for file in self.files)
        return "Python's language reference (`pydoc_data.topics`), each paragraph once"


@dataclass
class TableArguments:
    """Rows of named columns to train on. With nothing named: a data set made of Python's language reference."""

    dataset_name: str | None = field(default=None, metadata={"help": "data set of the Hub"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    files: list[str] | None = field(
        default=None, metadata={"help": "local files or folders: csv, tsv, json, jsonl or parquet"}
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "held-out files; else a share is split"})
    test_files: list[str] | None = field(default=None, metadata={"help": "files for the score of the finished model"})
    validation_fraction: float = field(default=0.1, metadata={"help": "share of the rows to hold out"})
    max_length: int = field(default=128, metadata={"help": "tokens of a row; longer ones are cut"})
    max_train_rows: int | None = field(default=None, metadata={"help": "rows to train on, drawn with the seed"})
    quarantine: str | None = field(
        default=None, metadata={"help": "file for bad rows, which are then left out and counted; else one is refused"}
    )

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction is {self.validation_fraction} but a share lies between 0 and 1.")
        if self.max_length < 4:
            raise ValueError(f"--max_length is {self.max_length} but a row needs at least 4 tokens.")
        if self.max_train_rows is not None and self.max_train_rows < 1:
            raise ValueError(f"--max_train_rows is {self.max_train_rows} but must be at least 1 row.")
        if (self.validation_files or self.test_files) and not (self.files or self.dataset_name):
            raise ValueError("--validation_files or --test_files were given without rows to train on. Name --files.")

    def description(self, embedded: str) -> str:
        """The data in words, for the model card.

        Args:
            embedded: what it is when nothing is named.
        """
        if self.dataset_name:
            return f"the data set `{self.dataset_name}`" + (f" ({self.dataset_config})" if self.dataset_config else "")
        if self.files:
            return "local rows: " + ", ".join(f"`{Path(file).name}`" for file in self.files)
        return embedded


@dataclass
class ModelArguments:
    """What to train: a checkpoint to go on from, or a named size to start from nothing."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to fine-tune, stock (`gpt2`) or ours; else start from --preset"}
    )
    preset: str = field(default="gpt2-mini", metadata={"help": "named size of a model that starts from nothing"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "fields to change in it, as `n_layer=4,position_embedding_type=rope`"}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager, flex_attention, flash_attention_2"}
    )
    stock: bool = field(
        default=False, metadata={"help": "train the host's own class of the checkpoint, to compare with ours"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer, when it is not the checkpoint's"})
    vocab_size: int = field(default=1024, metadata={"help": "size of the tokenizer trained when none is named"})


@dataclass
class RunArguments(TrainingArguments):
    """How to train: the host's own arguments, and what it lacks."""

    learning_rate: float | None = field(
        default=None, metadata={"help": "highest learning rate; chosen for a checkpoint or a new model when not given"}
    )
    resume: bool = field(
        default=False,
        metadata={"help": "go on from the newest whole checkpoint in the output folder, if there is one"},
    )
    force_resume: bool = field(
        default=False,
        metadata={"help": "resume also with other data, batches or processes than the checkpoint's run had"},
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={"help": "a step whose loss or gradient is not finite: stop before its update, or skip the update"},
    )
    save_trained_only: bool = field(
        default=False,
        metadata={"help": "checkpoints without the weights of frozen parts, which the next start reads where it did"},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "evaluations without a better one after which to stop; keeps the best model"}
    )

    def __post_init__(self):
        if self.on_nonfinite not in NONFINITE_ACTIONS:
            raise ValueError(f"--on_nonfinite is {self.on_nonfinite!r} but must be {' or '.join(NONFINITE_ACTIONS)}.")
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(
                    f"--early_stopping_patience is {self.early_stopping_patience} but must be at least 1 evaluation."
                )
            self.load_best_model_at_end = True
        super().__post_init__()
        apply_timeout(self)


def read_recipe(path: str) -> dict:
    """A JSON or YAML file of arguments."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        recipe = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {path} is not a table of argument names and values.")
    return recipe


def parse_arguments(dataclasses, argv: list[str] | None, description: str, **defaults):
    """One object for each of `dataclasses` from `argv`, whose first word may name a recipe that flags then override.

    Args:
        defaults: values that differ from the dataclasses' own.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(
        dataclasses, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        recipe = read_recipe(argv.pop(0))
        known = {action.dest for action in parser._actions}
        for key in recipe:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                raise ValueError(
                    f"the recipe's `{key}` is no argument." + (f" Did you mean `{close[0]}`?" if close else "")
                )
        defaults |= recipe
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(args=argv)


@contextmanager
def user_errors():
    """End the script with one line for a mistake in arguments or data. Wrap preparation only: an error in training is
    a defect, and its traceback is wanted. `HF_CUSTOM_TRACEBACK=1` shows it here too."""
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        if os.environ.get("HF_CUSTOM_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
