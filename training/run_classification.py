"""Fine-tune a model that classifies sentences or pairs of them, or that gives them a number.

Examples:
  # from nothing: which part of the language reference is this paragraph from?
  python -m training.run_classification --output_dir runs/topics --num_train_epochs 10

  # your own rows: sentiment, entailment of a pair, similarity as a number
  python -m training.run_classification --model_name_or_path bert-base-uncased --output_dir runs/sentiment \\
    --files train.tsv --validation_files dev.tsv --test_files test.tsv --text_column sentence
  python -m training.run_classification --model_name_or_path bert-base-uncased --output_dir runs/entailment \\
    --files train.tsv --text_column premise --second_text_column hypothesis
  python -m training.run_classification --model_name_or_path bert-base-uncased --output_dir runs/similarity \\
    --files pairs.csv --text_column a --second_text_column b --label_column score --regression

  # labels of unequal frequency; stop when the held-out score no longer rises
  python -m training.run_classification --files rows.csv --class_weights balanced --early_stopping_patience 2

  # two processes on one machine
  torchrun --nproc_per_node 2 -m training.run_classification --output_dir runs/topics
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef, mean_squared_error
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from training import runs
from training.args import ModelArguments, RunArguments, TableArguments, parse_arguments, user_errors
from training.data import load_tables
from training.labels import (
    WeightedLoss,
    amounts,
    balanced_weights,
    class_numbers,
    find_classes,
    finite_amounts,
    known_labels,
    label_type,
)
from training.plots import plot_confusion_matrix
from training.preflight import (
    ROW,
    Origin,
    Quarantine,
    check_columns,
    check_examples,
    check_precision,
    check_run,
    prepare_padding,
    prepare_padding_of,
)
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
from training.trainer import CustomTrainer

DEFAULTS = {
    **runs.FINE_TUNING_DEFAULTS,
    "output_dir": "runs/classification",
    "preset": "bert-mini",
    "vocab_size": 4096,
    "metric_for_best_model": "accuracy",
}
# Names in the card of what `eval_` reports.
CLASS_METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "matthews_correlation": "Matthews correlation"}
AMOUNT_METRICS = {"mse": "mean squared error", "pearson_correlation": "Pearson correlation"}
EMBEDDED = "paragraphs of Python's language reference (`pydoc_data.topics`), labelled with its six longest parts"
CONFUSION_MATRIX = "confusion_matrix.png"


@dataclass
class ClassificationArguments:
    """What to classify, and how."""

    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    second_text_column: str | None = field(default=None, metadata={"help": "column of the second text of a pair"})
    label_column: str = field(default="label", metadata={"help": "column that holds the label"})
    regression: bool = field(default=False, metadata={"help": "labels are amounts; so they are if they are floats"})
    class_weights: str = field(default="none", metadata={"help": "`balanced` makes rare labels count as common ones"})
    classifier_hidden_size: int | None = field(
        default=None, metadata={"help": "width of a hidden layer in the classifier of our classes; none without"}
    )

    def __post_init__(self):
        if self.class_weights not in ("none", "balanced"):
            raise ValueError(f"--class_weights is {self.class_weights!r}. Use none or balanced.")
        if self.regression and self.class_weights != "none":
            raise ValueError("--class_weights weighs classes, but --regression has none. Leave one of them out.")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that must be there, by their flags."""
        columns = {"text_column": self.text_column, "label_column": self.label_column}
        if self.second_text_column is not None:
            columns["second_text_column"] = self.second_text_column
        return columns


ARGUMENTS = (ModelArguments, TableArguments, ClassificationArguments, RunArguments)


def embedded_topics() -> Dataset:
    """Paragraphs of the six longest topics of the language reference in `text`, the topic's name in `label`.

    A paragraph that stands in two of them has no label and is left out, as is a line that is no sentence.
    """
    from pydoc_data.topics import topics

    longest = sorted(topics, key=lambda topic: (-len(topics[topic]), topic))[:6]
    paragraphs = {}
    for topic in longest:
        found = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", topics[topic]))
        paragraphs[topic] = dict.fromkeys(paragraph for paragraph in found if len(paragraph.split()) > 5)
    times = Counter(paragraph for found in paragraphs.values() for paragraph in found)
    rows = [{"text": text, "label": topic} for topic, found in paragraphs.items() for text in found if times[text] == 1]
    return Dataset.from_list(rows)


@dataclass
class Run:
    """A prepared training run: the trainer, the classes (`None` for regression) and the rows of each split."""

    trainer: CustomTrainer
    classes: list[str] | None
    rows: dict[str, Dataset]

    @property
    def scored_split(self) -> str:
        return "test" if "test" in self.rows else "validation"


def score_classes(evaluation: EvalPrediction) -> dict[str, float]:
    """The F1 of a class that is neither there nor predicted counts as 0."""
    predicted, correct = evaluation.predictions.argmax(-1), evaluation.label_ids
    classes = range(evaluation.predictions.shape[-1])
    return {
        "accuracy": float(accuracy_score(correct, predicted)),
        "macro_f1": float(f1_score(correct, predicted, labels=classes, average="macro", zero_division=0)),
        "matthews_correlation": float(matthews_corrcoef(correct, predicted)),
    }


def score_amounts(evaluation: EvalPrediction) -> dict[str, float]:
    """The correlation of what is constant is undefined, and 0 here."""
    predicted, correct = evaluation.predictions.reshape(-1), evaluation.label_ids.reshape(-1)
    is_constant = predicted.std() == 0 or correct.std() == 0
    return {
        "mse": float(mean_squared_error(correct, predicted)),
        "pearson_correlation": 0.0 if is_constant else float(np.corrcoef(predicted, correct)[0, 1]),
    }


def origin_of_split(quarantine: Quarantine, split: str) -> Origin:
    """Where the rows of a split stood: in the data, where training and validation rows were drawn from the same."""
    origin = quarantine.origin(split)
    is_drawn = split != "test" and quarantine.origin("train") is quarantine.origin("validation")
    origin.words = "the data" if is_drawn else f"the {split} split"
    return origin


def load_rows(
    data_args: TableArguments, task: ClassificationArguments, seed: int, quarantine: Quarantine | None = None
) -> DatasetDict:
    """The splits, with the columns checked. A test split whose labels are hidden, as the Hub does, is left out."""
    quarantine = quarantine or Quarantine()
    splits = load_tables(data_args, embedded_topics, seed, quarantine, task.columns.values())
    for split in list(splits):
        rows = splits[split] = check_columns(splits[split], task.columns, origin_of_split(quarantine, split))
        for flag in ("text_column", "second_text_column"):
            column = task.columns.get(flag)
            kind = None if column is None else label_type(rows, column)
            if kind is not None and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"column `{column}` holds {kind}, not text. Name another with --{flag}.")
    label = splits["train"].features[task.label_column]
    if "test" in splits and isinstance(label, ClassLabel) and set(splits["test"][task.label_column]) == {-1}:
        print("the labels of the test split are hidden, so the validation split is scored")
        del splits["test"]
    return splits


def number_labels(
    splits: DatasetDict, task: ClassificationArguments, quarantine: Quarantine
) -> tuple[list[str] | None, dict[str, list]]:
    """The classes, `None` for regression, and the label of each row of each split as a number.

    Rows with a label that cannot be one leave the splits.
    """
    column, rows = task.label_column, splits["train"]
    origins = {split: origin_of_split(quarantine, split) for split in splits}
    if task.regression or pa.types.is_floating(label_type(rows, column)):
        if task.class_weights != "none":
            raise ValueError(f"--class_weights weighs classes, but column `{column}` holds amounts. Leave it out.")
        for split, origin in origins.items():
            splits[split] = finite_amounts(splits[split], column, origin)
        return None, {split: amounts(rows, column, origins[split].words) for split, rows in splits.items()}
    classes = find_classes(rows, column)
    for split, origin in origins.items():
        splits[split] = known_labels(splits[split], column, classes, origin)
    return classes, {
        split: class_numbers(rows, column, classes, origins[split].words) for split, rows in splits.items()
    }


def check_best_metric(training_args: RunArguments, classes: list[str] | None) -> None:
    """Choose the metric of the best model, or refuse one that is not measured."""
    if classes is None and training_args.metric_for_best_model == DEFAULTS["metric_for_best_model"]:
        training_args.metric_for_best_model, training_args.greater_is_better = "mse", False
    known = ["loss", *(AMOUNT_METRICS if classes is None else CLASS_METRICS)]
    name = training_args.metric_for_best_model
    if name is not None and name.removeprefix("eval_") not in known:
        raise ValueError(f"--metric_for_best_model is {name!r} but what is measured is {', '.join(known)}.")
    if name is not None and name.removeprefix("eval_") == "mse":
        training_args.greater_is_better = False


def prepare_task_config(
    model_args: ModelArguments,
    task: ClassificationArguments,
    tokenizer: PreTrainedTokenizerBase,
    classes: list[str] | None,
) -> PreTrainedConfig:
    """The configuration with the classes' names in it."""
    if classes is None:
        fields = {"num_labels": 1, "problem_type": "regression"}
    else:
        names = dict(enumerate(classes))
        fields = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        fields["problem_type"] = "single_label_classification"
    if task.classifier_hidden_size is not None:
        if model_args.stock:
            raise ValueError("--classifier_hidden_size is of our classes, but --stock asks for the host's.")
        fields["classifier_hidden_size"] = task.classifier_hidden_size
    return prepare_config(model_args, tokenizer, **fields)


def prepare(
    model_args: ModelArguments, data_args: TableArguments, task: ClassificationArguments, training_args: RunArguments
) -> Run:
    """Load, check and tokenize the rows, and build tokenizer, model and trainer. Nothing is trained yet."""
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=5e-4)
    quarantine = Quarantine(data_args.quarantine, training_args.process_index == 0)
    splits = load_rows(data_args, task, training_args.seed, quarantine)
    classes, labels = number_labels(splits, task, quarantine)
    check_best_metric(training_args, classes)
    text_columns = [column for flag, column in task.columns.items() if flag != "label_column"]
    tokenizer = prepare_tokenizer(
        model_args,
        training_args,
        lambda: (text for column in text_columns for text in splits["train"][column]),
        "wordpiece",
    )
    prepare_padding(tokenizer)
    config = prepare_task_config(model_args, task, tokenizer, classes)
    prepare_padding_of(config, tokenizer)
    check_length("max_length", data_args.max_length, config)
    model = prepare_model(AutoModelForSequenceClassification, model_args, config, "labels")
    check_run(model, training_args)
    num_labels = None if classes is None else len(classes)

    def tokenized(split: str) -> Dataset:
        def tokenize(batch, indices):
            encoded = tokenizer(*(batch[column] for column in text_columns), truncation=True, max_length=limit)
            return {**encoded, "labels": [numbers[index] for index in indices]}

        limit, numbers = data_args.max_length, labels[split]
        # Not the places of rows, by which bad ones are named.
        names = [name for name in splits[split].column_names if name != ROW]
        with training_args.main_process_first(desc="tokenizing"):
            found = splits[split].map(tokenize, batched=True, with_indices=True, remove_columns=names, desc=split)
        origin = origin_of_split(quarantine, split)
        found = check_examples(
            found, vocab_size=config.vocab_size, num_labels=num_labels, max_length=limit, where=origin
        )
        return found.remove_columns([ROW] if ROW in found.column_names else [])

    rows = {split: tokenized(split) for split in splits}
    quarantine.finish()
    loss = None
    if task.class_weights == "balanced":
        loss = WeightedLoss(balanced_weights(labels["train"], len(classes)), training_args.label_smoothing_factor)
    trainer = CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=loss,
        compute_metrics=score_amounts if classes is None else score_classes,
        callbacks=callbacks(training_args),
    )
    return Run(trainer, classes, rows)


def measure(run: Run) -> tuple[dict[str, float], dict[str, str], dict[str, object]]:
    """Metrics of the test split (or of the held-out one), pictures, and what the card shows beside them."""
    rows, trainer = run.rows[run.scored_split], run.trainer
    predictions, correct, scores = trainer.predict(rows, metric_key_prefix="eval")
    names = AMOUNT_METRICS if run.classes is None else CLASS_METRICS
    metrics = {name: scores[f"eval_{key}"] for key, name in names.items()}
    shown = {"rows to train on": len(run.rows["train"]), "scored on": f"{run.scored_split}, {len(rows)} rows"}
    if run.classes is None:
        return metrics, {}, shown
    # Of the commonest training label, which a classifier must beat.
    commonest = int(np.bincount(run.rows["train"]["labels"]).argmax())
    shown["accuracy of the commonest label"] = f"{np.mean(correct == commonest):.4f}"
    if trainer.is_world_process_zero():
        matrix = confusion_matrix(correct, predictions.argmax(-1), labels=range(len(run.classes)))
        path = Path(trainer.args.output_dir) / CONFUSION_MATRIX
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_confusion_matrix(matrix, run.classes, path, f"{path.parent.name}, {run.scored_split} split")
    return metrics, {CONFUSION_MATRIX: "Confusion matrix"}, shown


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        model_args, data_args, task, training_args = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        run = prepare(model_args, data_args, task, training_args)
    train(run.trainer)
    metrics, pictures, shown = measure(run)
    shown |= {"max_length": data_args.max_length, "class_weights": task.class_weights}
    finish(run.trainer, data_args.description(EMBEDDED), metrics, pictures, **shown)


if __name__ == "__main__":
    main()
