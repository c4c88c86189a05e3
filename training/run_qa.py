"""Train or fine-tune a model that answers a question with a piece of a paragraph (SQuAD 1 and 2).

Examples:
  # from nothing, on gaps in sentences of the language reference
  python -m training.run_qa --output_dir runs/qa

  # fine-tune a checkpoint on your own files, of columns `id`, `question`, `context` and `answers`
  python -m training.run_qa --model_name_or_path bert-base-uncased --files train.parquet --output_dir runs/mine

  # from a recipe, with one value changed
  python -m training.run_qa training/recipes/qa_squad2.yaml --files train.parquet \\
    --model_name_or_path bert-base-uncased --learning_rate 3e-5

An answer is {"text": [...], "answer_start": [...]} in one column or, flat, columns `answer` and `answer_start`; empty
where there is none. The output folder gets `predictions.json` and `nbest_predictions.json` of the held-out questions.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    set_seed,
)

from training.args import ModelArguments, RunArguments, TableArguments, parse_arguments, user_errors
from training.embedded_tasks import embedded_questions
from training.groups import load_grouped_tables
from training.preflight import (
    Quarantine,
    check_examples,
    check_precision,
    check_run,
    prepare_padding,
    prepare_padding_of,
)
from training.qa_metrics import score_answers
from training.qa_rows import START, read_questions
from training.qa_windows import find_answers, make_windows
from training.runs import (
    FINE_TUNING_DEFAULTS,
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

WINDOW = 384
DEFAULTS = {**FINE_TUNING_DEFAULTS, "preset": "bert-mini", "output_dir": "runs/qa", "max_length": WINDOW}
EMBEDDED = "questions for gaps in Python's language reference (`pydoc_data.topics`)"


@dataclass
class QuestionArguments:
    """Where questions and answers stand, and how answers are found."""

    question_column: str = field(default="question", metadata={"help": "column that holds the question"})
    context_column: str = field(default="context", metadata={"help": "column that holds the paragraph"})
    answers_column: str | None = field(
        default=None, metadata={"help": "column that holds the answers; else `answers`, or `answer` if that is there"}
    )
    id_column: str = field(default="id", metadata={"help": "column that names the question; else its row"})
    doc_stride: int = field(default=128, metadata={"help": "tokens that neighbouring windows of a paragraph share"})
    max_question_length: int = field(default=64, metadata={"help": "tokens of a question; longer ones are cut"})
    n_best_size: int = field(default=20, metadata={"help": "candidates to keep for each question"})
    max_answer_length: int = field(default=30, metadata={"help": "tokens of the longest answer to give"})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "by how much no answer must beat the best one to be given"}
    )

    def __post_init__(self):
        for name in ("max_question_length", "n_best_size", "max_answer_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)} but must be at least 1.")
        if self.doc_stride < 0:
            raise ValueError(f"--doc_stride is {self.doc_stride} but must be at least 0 tokens.")


@dataclass
class Questions:
    """A split ready to be trained on and scored: its rows, the windows of its paragraphs, and how to find answers."""

    rows: Dataset
    windows: Dataset
    args: QuestionArguments
    allow_none: bool

    @property
    def inputs(self) -> Dataset:
        """The windows without what no model reads."""
        return self.windows.remove_columns(["row", "offsets", "cls"])

    def answer(self, logits: tuple[np.ndarray, np.ndarray]) -> tuple[list[str], list[list[dict]]]:
        """Answers and candidates to start and end scores, each (windows, T)."""
        args = self.args
        return find_answers(
            self.windows,
            *logits[:2],
            self.rows["context"],
            args.n_best_size,
            args.max_answer_length,
            self.allow_none,
            args.null_score_diff_threshold,
        )

    def compute_metrics(self, evaluation) -> dict[str, float]:
        """What the Trainer calls with its predictions."""
        return score_answers(self.answer(evaluation.predictions)[0], self.rows["answers"])


def load_questions(
    data_args: TableArguments, args: QuestionArguments, seed: int, quarantine: Quarantine
) -> DatasetDict:
    """Splits `train`, `validation` and perhaps `test`. A paragraph, or a document of ours, is in one of them only."""
    column = args.context_column if data_args.dataset_name or data_args.files else "title"
    answers = (args.answers_column,) if args.answers_column else ("answers", "answer", START)
    columns = (args.question_column, args.context_column, *answers)
    splits = load_grouped_tables(data_args, embedded_questions, "context_column", column, seed, quarantine, columns)
    names = (args.question_column, args.context_column, args.answers_column, args.id_column)
    return DatasetDict(
        {split: read_questions(rows, split, *names, quarantine.origin(split)) for split, rows in splits.items()}
    )


def window_length(data_args: TableArguments, args: QuestionArguments, config, tokenizer) -> int:
    """Tokens of a window: as asked for or, of the default, no more than the model has positions.

    Raises:
        ValueError: when question and shared tokens leave no room for new ones.
    """
    length = data_args.max_length
    if length == WINDOW:
        length = min(length, config.max_position_embeddings)
    check_length("max_length", length, config)
    room = length - args.max_question_length - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= args.doc_stride:
        raise ValueError(
            f"a window of {length} tokens has room for {max(room, 0)} of the paragraph beside a question of "
            f"{args.max_question_length}, no more than the {args.doc_stride} that neighbours share. Lower --doc_stride "
            "or --max_question_length, or raise --max_length."
        )
    return length


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot pad, and pad on the right, where no place in a paragraph moves."""
    prepare_padding(tokenizer)
    tokenizer.padding_side = "right"


def prepare(
    model_args: ModelArguments, data_args: TableArguments, args: QuestionArguments, training_args: RunArguments
) -> tuple[CustomTrainer, dict[str, Questions]]:
    """Load, check and tokenize the data, and build tokenizer, model and trainer. Nothing is trained yet."""
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=5e-4)
    quarantine = Quarantine(data_args.quarantine, training_args.process_index == 0)
    rows = load_questions(data_args, args, training_args.seed, quarantine)
    quarantine.finish()
    tokenizer = prepare_tokenizer(
        model_args,
        training_args,
        lambda: (row[name] for row in rows["train"] for name in ("context", "question")),
        "wordpiece",
    )
    check_tokenizer(tokenizer)
    config = prepare_config(model_args, tokenizer)
    length = window_length(data_args, args, config, tokenizer)
    prepare_padding_of(config, tokenizer)
    model = prepare_model(AutoModelForQuestionAnswering, model_args, config)
    check_run(model, training_args)
    allow_none = any(start < 0 for split in rows for start in rows[split][START])
    splits, cut = {}, {}
    for split in rows:
        with training_args.main_process_first(desc="tokenizing"):
            windows, cut[split] = make_windows(
                rows[split], tokenizer, length, args.doc_stride, args.max_question_length
            )
        splits[split] = Questions(rows[split], windows, args, allow_none)
        # A window that is bad is a mistake of ours, not of a row.
        check_examples(splits[split].inputs, vocab_size=config.vocab_size, max_length=length, where=f"{split} windows")
    if any(cut.values()) and training_args.process_index == 0:
        counts = ", ".join(f"{count} of {split}" for split, count in cut.items() if count)
        print(f"questions longer than {args.max_question_length} tokens, whose ends are not read: {counts}")
    trainer = CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"].inputs,
        eval_dataset=splits["validation"].inputs,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=splits["validation"].compute_metrics,
        callbacks=callbacks(training_args),
    )
    return trainer, splits


def measure(trainer: CustomTrainer, splits: dict[str, Questions]) -> dict[str, float]:
    """Numbers of the validation data and, where there is one, of the test data; writes the answers beside them."""
    metrics = {}
    for split, prefix in (("validation", ""), ("test", "test_")):
        if split not in splits:
            continue
        questions = splits[split]
        # Of each split against its own answers, which the Trainer knows of validation only.
        trainer.compute_metrics = None
        logits = trainer.predict(questions.inputs).predictions
        answers, candidates = questions.answer(logits)
        scores = score_answers(answers, questions.rows["answers"])
        metrics |= {f"test {name}" if prefix else name: value for name, value in scores.items()}
        if trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            for name, values in (("predictions", answers), ("nbest_predictions", candidates)):
                text = json.dumps(dict(zip(questions.rows["id"], values, strict=True)), indent=2, ensure_ascii=False)
                (folder / f"{prefix}{name}.json").write_text(text + "\n", encoding="utf-8")
    return metrics


ARGUMENTS = (ModelArguments, TableArguments, QuestionArguments, RunArguments)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        arguments = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        trainer, splits = prepare(*arguments)
    train(trainer)
    data_args, args = arguments[1:3]
    metrics = measure(trainer, splits)
    finish(
        trainer, data_args.description(EMBEDDED), metrics, max_length=data_args.max_length, doc_stride=args.doc_stride
    )


if __name__ == "__main__":
    main()
