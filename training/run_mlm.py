"""Train or fine-tune a masked language model (BERT) on your text.

Examples:
  # from nothing, on the embedded corpus
  python -m training.run_mlm --output_dir runs/mlm --num_train_epochs 10

  # go on from a stock checkpoint with your own files
  python -m training.run_mlm --model_name_or_path bert-base-uncased --files my_texts/ --output_dir runs/mine \\
    --num_train_epochs 3

  # as BERT was trained at first: with next sentence prediction; as later: with whole words masked
  python -m training.run_mlm --next_sentence --output_dir runs/pairs
  python -m training.run_mlm --whole_word_masking --output_dir runs/words

  # from a recipe, with one value changed
  python -m training.run_mlm training/recipes/mlm_mini.yaml --learning_rate 5e-4

  # two processes on one machine
  torchrun --nproc_per_node 2 -m training.run_mlm training/recipes/mlm_mini.yaml
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    DataCollatorForTokenClassification,
    EvalPrediction,
    set_seed,
)

from training import runs
from training.args import DataArguments, ModelArguments, RunArguments, parse_arguments, user_errors
from training.data import load_text
from training.masking import IGNORED, MaskedRows, Masker, NewMasksEachEpoch
from training.preflight import Quarantine, check_examples, check_precision, check_run
from training.runs import (
    callbacks,
    check_length,
    choose_learning_rate,
    finish,
    prepare_config,
    prepare_model,
    prepare_tokenizer,
    train,
)
from training.segments import tokenize_pairs, tokenize_segments
from training.trainer import CustomTrainer

# Where these differ from the host's own: a run from nothing should learn, log and be scored without a flag.
DEFAULTS = {
    **runs.DEFAULTS,
    "output_dir": "runs/mlm",
    "preset": "bert-mini",
    "vocab_size": 4096,
    "block_size": 128,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "num_train_epochs": 10,
    "eval_strategy": "epoch",
}


@dataclass
class MaskingArguments:
    """What to predict."""

    mlm_probability: float = field(default=0.15, metadata={"help": "share of the tokens to predict"})
    whole_word_masking: bool = field(default=False, metadata={"help": "choose all pieces of a word or none"})
    next_sentence: bool = field(
        default=False, metadata={"help": "predict too whether the second segment of a row follows the first"}
    )


ARGUMENTS = (ModelArguments, DataArguments, MaskingArguments, RunArguments)


def scores_of_tokens(logits: torch.Tensor | tuple, labels: torch.Tensor | tuple) -> tuple[torch.Tensor, ...]:
    """What the metrics need of a batch of logits, which are too many to keep.

    Returns:
        The likeliest token and the loss in nats of each position, (B, T) each, and with next sentence prediction the
        likelier answer, (B,). The loss is 0 where nothing is predicted.
    """
    tokens, sentences = (logits, None) if isinstance(logits, torch.Tensor) else (logits[0], logits[1])
    targets = labels if isinstance(labels, torch.Tensor) else labels[0]
    losses = nn.functional.cross_entropy(
        tokens.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none"
    )
    scores = tokens.argmax(-1), losses
    return scores if sentences is None else (*scores, sentences.argmax(-1))


def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
    """Over all predicted tokens: the host's `eval_loss` is a mean of means, and the sum of both losses of a pair."""
    predicted, losses, *answers = evaluation.predictions
    targets, *correct = evaluation.label_ids if answers else (evaluation.label_ids,)
    chosen = targets != IGNORED
    loss = float(losses[chosen].astype(np.float64).mean())
    metrics = {
        "masked_token_loss": loss,
        "masked_token_accuracy": float((predicted == targets)[chosen].mean()),
        "perplexity": math.exp(loss),
    }
    if answers:
        metrics["next_sentence_accuracy"] = float((answers[0] == correct[0].reshape(-1)).mean())
    return metrics


def prepare(
    model_args: ModelArguments, data_args: DataArguments, masking_args: MaskingArguments, training_args: RunArguments
) -> CustomTrainer:
    """Load, check and tokenize the data, and build tokenizer, model and trainer. Nothing is trained yet."""
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=1e-3)
    if data_args.streaming:
        raise ValueError("--streaming does not go with masks that are drawn by row number. Leave it out.")
    if data_args.block_size < 8:
        raise ValueError(f"--block_size is {data_args.block_size} but a row needs at least 8 tokens here.")
    quarantine = Quarantine(data_args.quarantine, training_args.process_index == 0)
    texts = load_text(
        dataset_name=data_args.dataset_name,
        dataset_config=data_args.dataset_config,
        files=data_args.files,
        validation_files=data_args.validation_files,
        column=data_args.text_column,
        validation_fraction=data_args.validation_fraction,
        seed=training_args.seed,
        quarantine=quarantine,
    )
    quarantine.finish()
    column = data_args.text_column
    if column not in texts["train"].column_names:
        raise ValueError(f"the data has no column `{column}`, and token ids cannot be masked. Give text.")
    tokenizer = prepare_tokenizer(model_args, training_args, lambda: iter(texts["train"][column]), "wordpiece")
    masker = Masker(tokenizer, masking_args.mlm_probability, masking_args.whole_word_masking)
    config = prepare_config(model_args, tokenizer)
    check_length("block_size", data_args.block_size, config)
    auto_class = AutoModelForPreTraining if masking_args.next_sentence else AutoModelForMaskedLM
    model = prepare_model(auto_class, model_args, config)
    check_run(model, training_args)
    if masking_args.next_sentence:
        training_args.label_names = ["labels", "next_sentence_label"]

    def rows(split: str) -> MaskedRows:
        arguments = texts[split], tokenizer, column, data_args.block_size
        with training_args.main_process_first(desc="tokenizing"):
            if masking_args.next_sentence:
                found = tokenize_pairs(*arguments, seed=training_args.seed, num_proc=data_args.num_proc)
            else:
                found = tokenize_segments(*arguments, num_proc=data_args.num_proc)
        # A segment that is bad is a mistake of ours or of the tokenizer, not of a row.
        check_examples(
            found, vocab_size=config.vocab_size, max_length=data_args.block_size, where=f"the {split} segments"
        )
        return MaskedRows(found, masker, training_args.seed, fixed=split != "train")

    training_rows = rows("train")
    return CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=training_rows,
        eval_dataset=rows("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=scores_of_tokens,
        callbacks=[NewMasksEachEpoch(training_rows), *callbacks(training_args)],
    )


def measure(trainer: CustomTrainer) -> dict[str, float]:
    """Numbers of the held-out text."""
    evaluation = trainer.evaluate()
    names = ("masked_token_loss", "masked_token_accuracy", "perplexity", "next_sentence_accuracy")
    return {name.replace("_", " "): evaluation[f"eval_{name}"] for name in names if f"eval_{name}" in evaluation}


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        model_args, data_args, masking_args, training_args = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        trainer = prepare(model_args, data_args, masking_args, training_args)
    train(trainer)
    finish(
        trainer,
        data_args.description,
        measure(trainer),
        block_size=data_args.block_size,
        mlm_probability=masking_args.mlm_probability,
        whole_word_masking=masking_args.whole_word_masking,
        next_sentence=masking_args.next_sentence,
    )


if __name__ == "__main__":
    main()
