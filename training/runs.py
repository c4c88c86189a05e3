"""What the training scripts do alike: find tokenizer and model, train, and finish with curve, numbers and card."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

import hf_custom
from hf_custom.cards import CardRecord
from hf_custom.presets import preset_config
from training.args import ModelArguments, RunArguments
from training.checkpointing import CheckpointError, NotSavedError
from training.guards import DivergenceError, LostProcessError, NonFiniteError
from training.plots import plot_loss_curve
from training.preemption import exit_if_preempted
from training.tokenizer import train_tokenizer
from training.trainer import CustomTrainer

# Where these differ from the host's own: a run should learn, log and be scored without a flag.
DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
}
# Of a checkpoint that learns a task (Devlin et al. 2019, appendix A.3).
FINE_TUNING_DEFAULTS = {
    **DEFAULTS,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
}
LEARNING_RATE_OF_CHECKPOINTS = 5e-5
# What ends a run for a reason that one line says; any other error in training is a defect, whose traceback is wanted.
ENDS = (CheckpointError, NotSavedError, NonFiniteError, DivergenceError, LostProcessError)


def prepare_tokenizer(
    model_args: ModelArguments,
    training_args: RunArguments,
    texts: Callable[[], Iterator[str]] | None,
    kind: str,
    folder: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, that of the checkpoint, or a new one of `kind` trained on the training text.

    Args:
        texts: gives the training text; `None` when the data is token ids already.
        folder: for a new one; the output folder when not given.
    """
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    if texts is None:
        raise ValueError("the data is token ids already. Name the tokenizer that made them with --tokenizer_name.")
    folder = folder or training_args.output_dir
    # One process trains it and the others read it, so that all have the same.
    with training_args.main_process_first(desc="tokenizer"):
        if training_args.process_index == 0:
            train_tokenizer(texts(), kind, model_args.vocab_size).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def parse_overrides(text: str | None) -> dict:
    """`a=1,b=rope` as a dictionary, each value read as YAML reads it."""
    pairs = [item.partition("=") for item in text.split(",")] if text else []
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ValueError(f"--config_overrides has {key + equals + value!r}; write `field=value,field=value`.")
    return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def prepare_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, **fields) -> PreTrainedConfig:
    """The configuration of the checkpoint, or of a preset with the tokenizer's vocabulary.

    Args:
        fields: what the task needs of it (`num_labels`, say).
    """
    checkpoint = model_args.model_name_or_path
    if checkpoint is not None:
        if model_args.config_overrides:
            raise ValueError(
                "--config_overrides changes a --preset, but a checkpoint was named. Leave one of them out."
            )
        hf_custom.register(replace_stock=not model_args.stock)
        config = AutoConfig.from_pretrained(checkpoint, **fields)
    elif model_args.stock:
        raise ValueError("--stock trains the host's class of a checkpoint. Name one with --model_name_or_path.")
    else:
        tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        fields = {"vocab_size": len(tokenizer), **tokens, **fields, **parse_overrides(model_args.config_overrides)}
        config = preset_config(model_args.preset, **fields)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries but the model's `vocab_size` is {config.vocab_size}. "
            "Use the tokenizer of the checkpoint."
        )
    return config


def input_type_of(model_args: ModelArguments) -> str | None:
    """What a new ELMo reads, `characters` or `words`; `None` of a checkpoint and of another model."""
    if model_args.model_name_or_path is not None:
        return None
    overrides = parse_overrides(model_args.config_overrides)
    return getattr(preset_config(model_args.preset, **overrides), "input_type", None)


def check_length(flag: str, length: int, config: PreTrainedConfig) -> None:
    """Refuse rows longer than the model's positions."""
    # A recurrent model has no end of positions.
    positions = getattr(config, "max_position_embeddings", length)
    if length > positions:
        raise ValueError(f"--{flag} is {length} but the model has {positions} positions. Use no more than that.")


def choose_learning_rate(model_args: ModelArguments, training_args: RunArguments, from_nothing: float) -> None:
    """Where none is named: a checkpoint's is BERT's own, and a model from nothing needs a larger one."""
    if training_args.learning_rate is None:
        is_checkpoint = model_args.model_name_or_path is not None
        training_args.learning_rate = LEARNING_RATE_OF_CHECKPOINTS if is_checkpoint else from_nothing


def prepare_model(
    model_class: type, model_args: ModelArguments, config: PreTrainedConfig, classes: str | None = None
) -> PreTrainedModel:
    """A model class, or that of `config` under an Auto class, with the checkpoint's weights or from nothing.

    Args:
        classes: what a classifier's classes are called, for the message about a checkpoint that has another number.
    """
    checkpoint, attention = model_args.model_name_or_path, {"attn_implementation": model_args.attn_implementation}
    if checkpoint is None:
        # An Auto class has the one, a model class the other.
        name = "from_config" if hasattr(model_class, "from_config") else "_from_config"
        return getattr(model_class, name)(config, **attention)
    try:
        return model_class.from_pretrained(checkpoint, config=config, **attention)
    except RuntimeError as error:
        if classes is None or "mismatch" not in str(error):
            raise
        raise ValueError(
            f"the classifier in {checkpoint} is not one of {config.num_labels} {classes}. "
            "Name a checkpoint without a classifier, as pre-training leaves it."
        ) from None


def callbacks(training_args: RunArguments) -> list[TrainerCallback]:
    """Early stopping, where it is asked for."""
    patience = training_args.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def train(trainer: CustomTrainer) -> None:
    """Train from the start, from the checkpoint that is named or, with --resume, from the newest whole one in the
    folder. What cannot be resumed, and what guards stop, ends the script with one line; pre-emption with code 75."""
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint or trainer.args.resume)
    except ENDS as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    exit_if_preempted(trainer)


def finish(
    trainer: CustomTrainer,
    data: str,
    metrics: dict[str, float],
    pictures: dict[str, str] | None = None,
    sample: str | None = None,
    **shown,
) -> None:
    """Save the model with its code, draw the curve, write the numbers and the card.

    Called by every process; the model must have been scored before.

    Args:
        data: what it was trained on, in words.
        metrics: of the held-out data, by name.
        pictures: titles by file name, of pictures in the output folder to show in the card.
        sample: text that the model wrote, for the card.
        shown: arguments to show in the card beside the Trainer's.
    """
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        _write_results(trainer, data, metrics, pictures or {}, sample, shown)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.end_workers()
    # A process that ends early takes its connections with it, and the others down.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _write_results(trainer, data, metrics, pictures, sample, shown):
    """Curve, numbers and card, in the output folder."""
    output_dir = Path(trainer.args.output_dir)
    name = output_dir.name
    plot_loss_curve(trainer.state.log_history, output_dir / "loss_curve.png", name)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for metric, value in metrics.items():
        print(f"held-out {metric}: {value:.4f}")
    # A card describes classes of this package, whose code is beside it.
    if metrics and hasattr(trainer.model.config, "auto_classes"):
        trainer.card = CardRecord(
            name,
            data,
            metrics={name: metrics},
            training=trainer.shown_arguments(**shown),
            curve="loss_curve.png",
            pictures=pictures,
            sample=sample,
        )
        trainer.create_model_card()


def is_sharded(trainer: CustomTrainer) -> bool:
    """Whether no process holds the whole model."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
