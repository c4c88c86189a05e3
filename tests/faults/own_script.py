"""Somebody's own script, around rows of ids and labels as they come: `check_examples`, `CustomTrainer`, no more."""

from dataclasses import dataclass, field

import torch
from datasets import Dataset

from hf_custom import CustomGPT2Config, CustomGPT2ForCausalLM
from training.args import RunArguments, parse_arguments, user_errors
from training.preflight import check_examples
from training.runs import train
from training.trainer import CustomTrainer

VOCAB_SIZE, POSITIONS = 64, 32


@dataclass
class RowArguments:
    """What to train on."""

    files: list[str] = field(default_factory=list, metadata={"help": "jsonl with `input_ids` and `labels`"})
    quarantine: str | None = field(default=None, metadata={"help": "file for bad rows"})


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows to a batch: ids padded with 0, labels with -100; each (B, T)."""

    def filled(name: str, value: int) -> torch.Tensor:
        tensors = [torch.tensor(row[name], dtype=torch.int64) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids, lengths = filled("input_ids", 0), [len(row["input_ids"]) for row in rows]
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": filled("labels", -100)}


def main(argv: list[str]) -> None:
    with user_errors():
        data, args = parse_arguments((RowArguments, RunArguments), argv, __doc__, learning_rate=1e-3)
        rows = check_examples(
            Dataset.from_json(data.files), vocab_size=VOCAB_SIZE, max_length=POSITIONS, quarantine=data.quarantine
        )
        config = CustomGPT2Config(vocab_size=VOCAB_SIZE, n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2)
        trainer = CustomTrainer(CustomGPT2ForCausalLM(config), args, train_dataset=rows, data_collator=pad)
    train(trainer)
    trainer.save_model()
