"""Train or fine-tune a model that tags words: named entities (tags like B-PER, I-PER and O) or one tag a word.

Examples:
  # from nothing, on code and terms that the language reference marks
  python -m training.run_token_classification --output_dir runs/entities

  # fine-tune a checkpoint on your own files, of columns `tokens` and `tags`
  python -m training.run_token_classification --model_name_or_path bert-base-uncased --files train.jsonl \\
    --validation_files dev.jsonl --test_files test.jsonl --output_dir runs/mine

  # from a recipe, with one value changed
  python -m training.run_token_classification training/recipes/token_classification_wnut17.yaml --files train.jsonl \\
    --model_name_or_path bert-base-uncased --learning_rate 3e-5
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from training.args import ModelArguments, RunArguments, TableArguments, parse_arguments, user_errors
from training.data import load_tables
from training.embedded_tasks import embedded_entities
from training.groups import load_grouped_tables
from training.preflight import (
    ROW,
    Quarantine,
    check_examples,
    check_precision,
    check_run,
    prepare_padding,
    prepare_padding_of,
)
from training.runs import (
    FINE_TUNING_DEFAULTS,
    callbacks,
    check_length,
    choose_learning_rate,
    finish,
    input_type_of,
    parse_overrides,
    prepare_config,
    prepare_model,
    prepare_tokenizer,
    train,
)
from training.tagging import IGNORED, encode_words, find_labels, read_tags, score_tags
from training.trainer import CustomTrainer
from training.words import Lexicon, WordCollator, encode_tagged

DEFAULTS = {**FINE_TUNING_DEFAULTS, "preset": "bert-mini", "output_dir": "runs/token_classification"}
EMBEDDED = "code and terms marked in Python's language reference (`pydoc_data.topics`)"
TAGS_COLUMNS = ("tags", "ner_tags")


@dataclass
class TaggingArguments:
    """What of the data holds words and tags."""

    tokens_column: str = field(default="tokens", metadata={"help": "column that holds the words of a row, a list"})
    tags_column: str | None = field(
        default=None, metadata={"help": "column that holds a tag for each word; else `tags` or `ner_tags`"}
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "train on every sub-token of a word, not on its first alone"}
    )
    task_fields: str | None = field(
        default=None,
        metadata={"help": "fields of the configuration for this task, of a checkpoint too, as `freeze_bilm=true`"},
    )


def find_tags_column(rows: Dataset, column: str | None) -> str:
    """The column that is named, or the usual one that the data has."""
    return column or next((name for name in TAGS_COLUMNS if name in rows.column_names), TAGS_COLUMNS[0])


def make_compute_metrics(labels: list[str]) -> Callable:
    """What the Trainer calls with the predicted labels, (N, T), and the correct ones, `IGNORED` where none counts."""

    def compute_metrics(evaluation) -> dict[str, float]:
        predicted, correct = evaluation
        kept = [row != IGNORED for row in correct]
        names = np.array(labels, dtype=object)
        tags = [
            [names[row[keep]].tolist() for row, keep in zip(part, kept, strict=True)] for part in (predicted, correct)
        ]
        return score_tags(*tags)

    return compute_metrics


def load_rows(
    data_args: TableArguments, tagging: TaggingArguments, seed: int, quarantine: Quarantine | None = None
) -> DatasetDict:
    """Splits `train`, `validation` and perhaps `test` with columns `tokens` and `tags`."""
    quarantine = quarantine or Quarantine()
    if data_args.dataset_name or data_args.files:
        columns = {tagging.tokens_column, *TAGS_COLUMNS, tagging.tags_column}
        splits = load_tables(data_args, embedded_entities, seed, quarantine, columns)
    else:
        splits = load_grouped_tables(data_args, embedded_entities, "tokens_column", "document", seed, quarantine)
    column = find_tags_column(splits["train"], tagging.tags_column)
    return DatasetDict(
        {
            split: read_tags(rows, split, tagging.tokens_column, column, quarantine.origin(split))
            for split, rows in splits.items()
        }
    )


def prepare_labels(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, labels: list[str], task_fields: str | None = None
) -> tuple[PreTrainedConfig, list[str]]:
    """The configuration with the labels in it, and the labels, in the order of a checkpoint that has the same."""
    config = prepare_config(model_args, tokenizer, **parse_overrides(task_fields))
    known = [config.id2label[number] for number in range(config.num_labels)]
    labels = known if set(known) == set(labels) else labels
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    return config, labels


def prepare(
    model_args: ModelArguments, data_args: TableArguments, tagging: TaggingArguments, training_args: RunArguments
) -> tuple[CustomTrainer, DatasetDict]:
    """Load, check and tokenize the data, and build tokenizer, model and trainer. Nothing is trained yet."""
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=5e-4)
    quarantine = Quarantine(data_args.quarantine, training_args.process_index == 0)
    splits = load_rows(data_args, tagging, training_args.seed, quarantine)
    labels = find_labels(splits, tagging.label_all_tokens, quarantine.origins)
    kind = input_type_of(model_args) or "wordpiece"
    tokenizer = prepare_tokenizer(
        model_args, training_args, lambda: (" ".join(words) for words in splits["train"]["tokens"]), kind
    )
    config, labels = prepare_labels(model_args, tokenizer, labels, tagging.task_fields)
    check_length("max_length", data_args.max_length, config)
    prepare_padding(tokenizer)
    prepare_padding_of(config, tokenizer)
    model = prepare_model(AutoModelForTokenClassification, model_args, config, "tags")
    check_run(model, training_args)
    encoded, cut = DatasetDict(), {}
    # A token a word: sub-tokens have no part in it.
    lexicon = Lexicon(tokenizer) if hasattr(tokenizer, "encode_words") else None
    if lexicon is not None:
        # Words, not their characters.
        training_args.include_num_input_tokens_seen = "non_padding"
    for split, rows in splits.items():
        with training_args.main_process_first(desc="tokenizing"):
            # Scored by the word, however it is trained.
            every = tagging.label_all_tokens and split == "train"
            if lexicon is None:
                found, cut[split] = encode_words(rows, tokenizer, labels, data_args.max_length, every)
            else:
                found, cut[split] = encode_tagged(rows, lexicon, labels, data_args.max_length)
        encoded[split] = check_examples(
            found,
            vocab_size=config.vocab_size if lexicon is None else len(lexicon),
            num_labels=len(labels),
            max_length=data_args.max_length,
            where=quarantine.origin(split),
        ).remove_columns(ROW)
    quarantine.finish()
    if any(cut.values()) and training_args.process_index == 0:
        counts = ", ".join(f"{count} of {split}" for split, count in cut.items() if count)
        print(f"rows longer than {data_args.max_length} tokens, whose last words are not read: {counts}")
    trainer = CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer) if lexicon is None else WordCollator(lexicon),
        compute_metrics=make_compute_metrics(labels),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=callbacks(training_args),
    )
    return trainer, encoded


def measure(trainer: CustomTrainer, encoded: DatasetDict) -> dict[str, float]:
    """Numbers of the validation data and, where there is one, of the test data."""
    metrics = {}
    for split, prefix in (("validation", ""), ("test", "test ")):
        if split in encoded:
            output = trainer.predict(encoded[split])
            scores = trainer.compute_metrics((output.predictions, output.label_ids))
            metrics |= {f"{prefix}{name}": value for name, value in scores.items()}
    return metrics


ARGUMENTS = (ModelArguments, TableArguments, TaggingArguments, RunArguments)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        arguments = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        trainer, encoded = prepare(*arguments)
    train(trainer)
    data_args = arguments[1]
    finish(trainer, data_args.description(EMBEDDED), measure(trainer, encoded), max_length=data_args.max_length)


if __name__ == "__main__":
    main()
