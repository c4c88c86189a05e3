"""Train or fine-tune a causal language model on your text.

Examples:
  # from nothing, on the embedded corpus
  python -m training.run_clm --output_dir runs/clm --max_steps 500

  # fine-tune a stock checkpoint on your own files
  python -m training.run_clm --model_name_or_path gpt2 --files my_texts/ --output_dir runs/mine --num_train_epochs 3

  # from a recipe, with one value changed
  python -m training.run_clm training/recipes/clm_mini.yaml --learning_rate 5e-4

  # the small GPT of the notes, and what it expects after a text: every token's probability
  python -m training.run_clm training/recipes/clm_notes.yaml --prompts "The class of" "a list"

  # two processes on one machine, GPUs or (with --use_cpu) processors
  torchrun --nproc_per_node 2 -m training.run_clm training/recipes/clm_mini.yaml
  accelerate launch --config_file training/accelerate/ddp.yaml -m training.run_clm training/recipes/clm_mini.yaml

  # a stream, in random order, whose run goes on where it was interrupted
  python -m training.run_clm --files rows.jsonl --validation_files held_out.jsonl --streaming --shuffle_buffer 1000 \\
    --max_steps 10000 --save_strategy steps --save_steps 500 --resume

  # models that do not fit one GPU; the first also divides among processors, where there is no GPU, with --use_cpu
  accelerate launch --config_file training/accelerate/fsdp2.yaml -m training.run_clm \\
    training/recipes/clm_mini.yaml
  accelerate launch --config_file training/accelerate/deepspeed_zero3.yaml -m training.run_clm \\
    training/recipes/clm_mini.yaml
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from training import runs
from training.args import DataArguments, ModelArguments, RunArguments, parse_arguments, user_errors
from training.data import collate_blocks, load_text, token_stream, tokenize_blocks
from training.metrics import TextScore, score_text
from training.next_token import write_next_tokens
from training.preflight import Quarantine, check_examples, check_precision, check_run
from training.runs import (
    callbacks,
    check_length,
    choose_learning_rate,
    finish,
    is_sharded,
    prepare_config,
    prepare_model,
    prepare_tokenizer,
    train,
)
from training.trainer import CustomTrainer

# Where these differ from the host's own: a run from nothing should learn, log and be scored without a flag.
DEFAULTS = {
    **runs.DEFAULTS,
    "output_dir": "runs/clm",
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "eval_strategy": "steps",
    "eval_steps": 100,
}


@dataclass
class TextArguments(DataArguments):
    """What to train on, and what to show of the finished model."""

    prompts: list[str] | None = field(
        default=None, metadata={"help": "texts after which every token's probability is written to next_tokens.tsv"}
    )


@dataclass
class Run:
    """A prepared training run: the trainer and the texts behind its blocks."""

    trainer: CustomTrainer
    tokenizer: PreTrainedTokenizerBase
    texts: DatasetDict | IterableDatasetDict
    data: DataArguments

    @property
    def model(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @cached_property
    def held_out_text(self) -> str:
        return "".join(row[self.data.text_column] for row in self.texts["validation"])

    @cached_property
    def held_out_ids(self) -> torch.Tensor:
        """The held-out text as one row of ids (N,)."""
        return token_stream(self.texts["validation"], self.tokenizer, self.data.text_column)

    def score(self) -> TextScore:
        """Score of every token of the held-out text."""
        num_bytes = len(self.held_out_text.encode())
        return score_text(self.model, self.held_out_ids, num_bytes, self.data.block_size, progress=True)


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: RunArguments) -> Run:
    """Load, check and tokenize the data, and build tokenizer, model and trainer. Nothing is trained yet."""
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=1e-3)
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("a stream has no length, so the run needs one: pass --max_steps.")
    quarantine = Quarantine(data_args.quarantine, training_args.process_index == 0)
    texts = load_text(
        dataset_name=data_args.dataset_name,
        dataset_config=data_args.dataset_config,
        files=data_args.files,
        validation_files=data_args.validation_files,
        column=data_args.text_column,
        validation_fraction=data_args.validation_fraction,
        streaming=data_args.streaming,
        seed=training_args.seed,
        quarantine=quarantine,
    )
    column, rows = data_args.text_column, texts["train"]
    training_text = (lambda: (row[column] for row in rows)) if column in rows.column_names else None
    tokenizer = prepare_tokenizer(model_args, training_args, training_text, "bpe")
    if tokenizer.eos_token_id is None:
        name = model_args.tokenizer_name or model_args.model_name_or_path
        raise ValueError(f"tokenizer {name} has no end token (`eos_token`) to close a document with.")
    config = prepare_config(model_args, tokenizer)
    check_length("block_size", data_args.block_size, config)
    model = prepare_model(AutoModelForCausalLM, model_args, config)
    check_run(model, training_args)
    for split, rows in texts.items():
        if "input_ids" in rows.column_names:
            texts[split] = check_examples(rows, vocab_size=model.config.vocab_size, where=quarantine.origin(split))
    quarantine.finish()

    def blocks(split: str) -> Dataset | IterableDataset:
        with training_args.main_process_first(desc="tokenizing"):
            return tokenize_blocks(
                texts[split],
                tokenizer,
                data_args.text_column,
                data_args.block_size,
                model.config.vocab_size,
                data_args.num_proc,
            )

    train_blocks = blocks("train")
    if data_args.shuffle_buffer:
        seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        train_blocks = train_blocks.shuffle(seed=seed, buffer_size=data_args.shuffle_buffer)
    trainer = CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=blocks("validation") if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        data_collator=collate_blocks,
        callbacks=callbacks(training_args),
    )
    return Run(trainer, tokenizer, texts, data_args)


def measure(run: Run) -> dict[str, float]:
    """Numbers of the held-out text: of every token of it or, where that is out of reach, of the evaluation's blocks."""
    trainer = run.trainer
    if is_sharded(trainer) or run.data.streaming or run.data.text_column not in run.texts["validation"].column_names:
        # No process holds the whole model, or nobody the text.
        evaluation = trainer.evaluate(eval_dataset=trainer.eval_dataset) if trainer.eval_dataset is not None else {}
        return {"loss": evaluation["eval_loss"]} if evaluation else {}
    if not trainer.is_world_process_zero():
        return {}
    score = run.score()
    return {"perplexity": score.perplexity, "bits per byte": score.bits_per_byte}


def show_next_tokens(run: Run) -> None:
    """What the finished model expects after each prompt, in the output folder."""
    prompts, trainer = run.data.prompts, run.trainer
    if prompts and trainer.is_world_process_zero() and not is_sharded(trainer):
        write_next_tokens(run.model, run.tokenizer, prompts, Path(trainer.args.output_dir) / "next_tokens.tsv")


ARGUMENTS = (ModelArguments, TextArguments, RunArguments)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        arguments = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        run = prepare(*arguments)
    train(run.trainer)
    metrics = measure(run)
    show_next_tokens(run)
    finish(run.trainer, run.data.description, metrics, block_size=run.data.block_size)


if __name__ == "__main__":
    main()
