"""Train or fine-tune a causal language model on your text.

Examples:
  # from nothing, on the embedded corpus
  python -m training.run_clm --output_dir runs/clm --max_steps 500

  # fine-tune a stock checkpoint on your own files
  python -m training.run_clm --model_name_or_path gpt2 --files my_texts/ --output_dir runs/mine --num_train_epochs 3

  # from a recipe, with one value changed
  python -m training.run_clm training/recipes/clm_mini.yaml --learning_rate 5e-4

  # two processes on one machine, GPUs or (with --use_cpu) processors
  torchrun --nproc_per_node 2 -m training.run_clm training/recipes/clm_mini.yaml
  accelerate launch --config_file training/accelerate/ddp.yaml -m training.run_clm training/recipes/clm_mini.yaml

  # models that do not fit one GPU
  accelerate launch --config_file training/accelerate/fsdp2.yaml -m training.run_clm \\
    training/recipes/clm_mini.yaml
  accelerate launch --config_file training/accelerate/deepspeed_zero3.yaml -m training.run_clm \\
    training/recipes/clm_mini.yaml
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

import hf_custom
from hf_custom.presets import preset_config
from training.args import DataArguments, ModelArguments, parse_arguments, user_errors
from training.data import collate_blocks, load_text, token_stream, tokenize_blocks
from training.metrics import TextScore, score_text
from training.plots import plot_loss_curve
from training.tokenizer import train_tokenizer
from training.trainer import CustomTrainer

# Where these differ from the host's own: a run from nothing should learn, log and be scored without a flag.
DEFAULTS = {
    "output_dir": "runs/clm",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
}
# Training arguments that a model card shows.
SHOWN_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
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

    def shown_arguments(self) -> dict[str, object]:
        """The training arguments of the card."""
        shown = {name: getattr(self.trainer.args, name) for name in SHOWN_ARGUMENTS}
        world = self.trainer.args.world_size
        rates = [entry["tokens_per_second"] for entry in self.trainer.state.log_history if "tokens_per_second" in entry]
        return {
            **shown,
            "lr_scheduler_type": str(shown["lr_scheduler_type"].value),
            "block_size": self.data.block_size,
            "steps": self.trainer.state.global_step,
            "processes": world,
            "device": self.trainer.args.device.type,
            "tokens per second (median)": f"{sorted(rates)[len(rates) // 2]:,.0f}" if rates else "not measured",
        }


def prepare_tokenizer(model_args: ModelArguments, texts, data_args: DataArguments, training_args: TrainingArguments):
    """The tokenizer that is named, that of the checkpoint, or a new one trained on the training text."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {name} has no end token (`eos_token`) to close a document with.")
        return tokenizer
    if data_args.text_column not in texts["train"].column_names:
        raise ValueError("the data is token ids already. Name the tokenizer that made them with --tokenizer_name.")
    folder = training_args.output_dir
    # One process trains it and the others read it, so that all have the same.
    with training_args.main_process_first(desc="tokenizer"):
        if training_args.process_index == 0:
            rows = texts["train"]
            text = (row[data_args.text_column] for row in rows)
            train_tokenizer(text, "bpe", model_args.vocab_size).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def prepare_model(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """A checkpoint as our class, or a preset from nothing with the tokenizer's vocabulary."""
    checkpoint = model_args.model_name_or_path
    if checkpoint is not None:
        if model_args.config_overrides:
            raise ValueError(
                "--config_overrides changes a --preset, but a checkpoint was named. Leave one of them out."
            )
        hf_custom.register(replace_stock=True)
        config = AutoConfig.from_pretrained(checkpoint)
    else:
        tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        fields = {"vocab_size": len(tokenizer), **tokens, **parse_overrides(model_args.config_overrides)}
        config = preset_config(model_args.preset, **fields)
    vocab_size, positions = config.vocab_size, config.max_position_embeddings
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries but the model's `vocab_size` is {vocab_size}. "
            "Use the tokenizer of the checkpoint."
        )
    if block_size > positions:
        raise ValueError(
            f"--block_size is {block_size} but the model has {positions} positions. Use no more than that."
        )
    attention = {"attn_implementation": model_args.attn_implementation}
    if checkpoint is not None:
        return AutoModelForCausalLM.from_pretrained(checkpoint, config=config, **attention)
    return AutoModelForCausalLM.from_config(config, **attention)


def parse_overrides(text: str | None) -> dict:
    """`a=1,b=rope` as a dictionary, each value read as YAML reads it."""
    pairs = [item.partition("=") for item in text.split(",")] if text else []
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ValueError(f"--config_overrides has {key + equals + value!r}; write `field=value,field=value`.")
    return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Run:
    """Load, check and tokenize the data, and build tokenizer, model and trainer. Nothing is trained yet."""
    set_seed(training_args.seed)
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("a stream has no length, so the run needs one: pass --max_steps.")
    texts = load_text(
        dataset_name=data_args.dataset_name,
        dataset_config=data_args.dataset_config,
        files=data_args.files,
        validation_files=data_args.validation_files,
        column=data_args.text_column,
        validation_fraction=data_args.validation_fraction,
        streaming=data_args.streaming,
        seed=training_args.seed,
    )
    tokenizer = prepare_tokenizer(model_args, texts, data_args, training_args)
    model = prepare_model(model_args, tokenizer, data_args.block_size)

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

    trainer = CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=blocks("train"),
        eval_dataset=blocks("validation") if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        data_collator=collate_blocks,
    )
    return Run(trainer, tokenizer, texts, data_args)


def finish(run: Run) -> None:
    """Save the model with its code, score it on the whole held-out text, draw the curve and write the card."""
    trainer, output_dir = run.trainer, Path(run.trainer.args.output_dir)
    trainer.save_model()
    trainer.save_state()
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if is_sharded or run.data.streaming or run.data.text_column not in run.texts["validation"].column_names:
        # No process holds the whole model, or nobody the text: the evaluation of the blocks has to do.
        evaluation = trainer.evaluate(eval_dataset=trainer.eval_dataset) if trainer.eval_dataset is not None else {}
        metrics = {"loss": evaluation["eval_loss"]} if evaluation else {}
    elif trainer.is_world_process_zero():
        score = run.score()
        metrics = {"perplexity": score.perplexity, "bits per byte": score.bits_per_byte}
    if not trainer.is_world_process_zero():
        return
    name = output_dir.name
    plot_loss_curve(trainer.state.log_history, output_dir / "loss_curve.png", name)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for metric, value in metrics.items():
        print(f"held-out {metric}: {value:.4f}")
    if metrics:
        trainer.card_fields = {
            "name": name,
            "data": run.data.description,
            "metrics": {name: metrics},
            "training": run.shown_arguments(),
            "curve": "loss_curve.png",
        }
        trainer.create_model_card()


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        arguments = parse_arguments((ModelArguments, DataArguments, TrainingArguments), argv, __doc__, **DEFAULTS)
        run = prepare(*arguments)
    run.trainer.train(resume_from_checkpoint=run.trainer.args.resume_from_checkpoint)
    finish(run)


if __name__ == "__main__":
    main()
