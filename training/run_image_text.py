"""Train or fine-tune a BERT that reads a text and the patches of an image in one stream.

`--task vqa` answers a question about the image by one of the answers of the training data; `--task matching` says
whether a text, a caption or a question with its answer, belongs to the image.

Examples:
  # from nothing, on handwritten digits and questions about them
  python -m training.run_image_text --output_dir runs/vqa

  # on your own files: questions that name an image by its id, and a table of the images
  python -m training.run_image_text --files questions.tsv --images images.parquet --test_files test.tsv \\
    --test_images test_images.parquet --output_dir runs/mine

  # a folder of pictures whose metadata.csv has the columns file_name and caption
  python -m training.run_image_text --task matching --files pictures/ --output_dir runs/captions

  # a checkpoint of text alone, with the patches of --preset beside its words
  python -m training.run_image_text --model_name_or_path bert-base-uncased --files questions.parquet \\
    --learning_rate 5e-5

  # from a recipe, with one value changed
  python -m training.run_image_text training/recipes/matching_digits.yaml --learning_rate 3e-4
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import hf_custom
from hf_custom.presets import preset_config
from training import runs
from training.args import ModelArguments, RunArguments, parse_arguments, user_errors
from training.image_tables import ImageRows, ImageTableArguments, load_image_rows
from training.image_text import (
    NO_LABEL,
    ImageTextRows,
    MatchingRows,
    answers_of_questions,
    decode_splits,
    embedded_digits,
    encode_texts,
    find_answers,
    number_across,
    recall_of_texts,
    score_answers,
)
from training.images import ImageTextCollator, image_shape, prepare_image_processor
from training.masking import NewMasksEachEpoch
from training.plots import plot_image_grid
from training.preflight import Quarantine, check_precision, check_run, prepare_padding
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

# A model from nothing, so a higher rate than of a checkpoint that learns a task.
DEFAULTS = {
    **runs.FINE_TUNING_DEFAULTS,
    "preset": "bert-vision-mini",
    "output_dir": "runs/image_text",
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "max_length": 64,
}
EMBEDDED = "the handwritten digits of scikit-learn (`load_digits`), with texts made by rule"
MODELS = {"vqa": "CustomBertForVisualQuestionAnswering", "matching": "CustomBertForImageTextRetrieval"}
MATCHING_LABELS = ["no match", "match"]
# Images whose texts are ranked, each against all texts of the others.
RANKED_IMAGES = 200
PICTURED_IMAGES = 12


@dataclass
class ImageTextArguments(ImageTableArguments):
    """What to learn, and where the data has it."""

    task: str = field(default="vqa", metadata={"help": "vqa or matching", "choices": list(MODELS)})
    question_column: str = field(default="question", metadata={"help": "column that holds the question"})
    answer_column: str = field(default="answer", metadata={"help": "column that holds its answer"})
    caption_column: str = field(
        default="caption",
        metadata={"help": "column that holds the text to match; without it a question and its answer are the text"},
    )
    num_answers: int | None = field(
        default=None, metadata={"help": "learn only this many answers, the most frequent; else all"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task not in MODELS:
            raise ValueError(f"--task is {self.task!r}. Use one of {', '.join(MODELS)}.")
        if self.num_answers is not None and self.num_answers < 2:
            raise ValueError(f"--num_answers is {self.num_answers} but there must be at least 2 answers.")

    def text_columns(self, rows: Dataset) -> dict[str, str]:
        """The columns to train on, by the flag that names each."""
        questions = {"question_column": self.question_column, "answer_column": self.answer_column}
        has_questions = set(questions.values()) <= set(rows.column_names)
        if self.task == "vqa" or (has_questions and self.caption_column not in rows.column_names):
            return questions
        return {"caption_column": self.caption_column}


@dataclass
class Run:
    """A prepared training run: the trainer and what its rows were made of."""

    trainer: CustomTrainer
    args: ImageTextArguments
    splits: dict[str, ImageRows]
    rows: dict[str, ImageTextRows]
    texts: list
    answers: list[str]

    @property
    def model(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def scored(self) -> str:
        """The split that the finished model is scored on."""
        return "test" if "test" in self.rows else "validation"


def texts_of(rows: ImageRows, args: ImageTextArguments) -> list:
    """The text of each row: a question, a caption, or a question and its answer."""
    names = list(args.text_columns(rows.rows).values())[: 1 if args.task == "vqa" else None]
    columns = [[str(value) for value in rows.rows[name]] for name in names]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def answers_of(rows: ImageRows, args: ImageTextArguments) -> list[str]:
    return [str(answer) for answer in rows.rows[args.answer_column]]


def keep_known_answers(splits: dict[str, ImageRows], args: ImageTextArguments) -> list[str]:
    """The answers to learn. Drops training rows with another, and says what becomes of the rows that have one.

    Raises:
        ValueError: when there is nothing to choose from.
    """
    found = answers_of(splits["train"], args)
    answers = find_answers(found, args.num_answers)
    if len(answers) < 2:
        raise ValueError(
            f"every row of column `{args.answer_column}` answers {answers[0]!r}. Name another with --answer_column."
        )
    known = set(answers)
    kept = [row for row, answer in enumerate(found) if answer in known]
    if len(kept) < len(found):
        print(f"{len(found) - len(kept)} of {len(found)} training rows dropped: not among {len(answers)} answers")
        splits["train"] = splits["train"].select(kept)
    for name in splits.keys() - {"train"}:
        unknown = sum(answer not in known for answer in answers_of(splits[name], args))
        if unknown:
            print(f"{unknown} of {len(splits[name])} {name} rows count as wrong: training has no such answer")
    return answers


def prepare_rows(
    splits: dict[str, ImageRows],
    args: ImageTextArguments,
    tokenizer: PreTrainedTokenizerBase,
    answers: list[str],
    images: dict[str, np.ndarray],
    seed: int,
) -> tuple[dict[str, ImageTextRows], list]:
    """Rows of token ids by split, and the distinct texts behind them."""
    by_row = {name: texts_of(split, args) for name, split in splits.items()}
    texts, numbers = number_across(by_row)
    if args.task == "matching" and len(set(by_row["train"])) < 2:
        raise ValueError("all rows have the same text, so none fails to match. Name another with --caption_column.")
    encoded = encode_texts(texts, tokenizer, args.max_length)
    rows = {}
    for name, own in numbers.items():
        if args.task == "matching":
            rows[name] = MatchingRows(encoded, own, images[name], seed, fixed=name != "train")
        else:
            label = {answer: number for number, answer in enumerate(answers)}
            labels = np.array([label.get(answer, NO_LABEL) for answer in answers_of(splits[name], args)])
            rows[name] = ImageTextRows(encoded, own, images[name], labels)
    return rows, texts


def prepare_vision_config(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, labels: list[str]
) -> PreTrainedConfig:
    """The configuration; a checkpoint of text alone gets the patches of the preset."""
    fields = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = prepare_config(model_args, tokenizer, **fields)
    if model_args.model_name_or_path is not None and getattr(config, "vision_config", config) is None:
        vision_config = preset_config(model_args.preset).vision_config
        if vision_config is None:
            raise ValueError(f"the checkpoint reads text alone, and so does preset {model_args.preset!r}.")
        config = prepare_config(model_args, tokenizer, vision_config=vision_config, **fields)
    return config


def build_model(task: str, model_args: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """Our class for the task, which an Auto class need not know, with the checkpoint's weights or from nothing."""
    return prepare_model(getattr(hf_custom, MODELS[task]), model_args, config, "answers")


def argmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def compute_accuracy(evaluation) -> dict[str, float]:
    predicted, labels = evaluation
    return {"accuracy": float((predicted == labels).mean())}


def prepare(model_args: ModelArguments, args: ImageTextArguments, training_args: RunArguments) -> Run:
    """Load and check the data, decode the images, and build tokenizer, model and trainer. Nothing is trained yet."""
    if model_args.stock:
        raise ValueError("--stock: the host has no BERT that reads images. Leave it out.")
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=5e-4)
    # The Trainer would take the number of an image for a column that no model reads.
    training_args.remove_unused_columns = False
    quarantine = Quarantine(args.quarantine, training_args.process_index == 0)
    embedded = partial(embedded_digits, args.task)
    splits = load_image_rows(args, args.text_columns, embedded, training_args.seed, quarantine)
    quarantine.finish()
    answers = keep_known_answers(splits, args) if args.task == "vqa" else []

    def training_text() -> Iterator[str]:
        for text in texts_of(splits["train"], args):
            yield text if isinstance(text, str) else " ".join(text)

    tokenizer = prepare_tokenizer(model_args, training_args, training_text, "wordpiece")
    prepare_padding(tokenizer)
    config = prepare_vision_config(model_args, tokenizer, answers or MATCHING_LABELS)
    check_length("max_length", args.max_length, config)
    image_processor = prepare_image_processor(model_args.model_name_or_path, config)
    pixels, images = decode_splits(splits, image_processor, image_shape(config))
    rows, texts = prepare_rows(splits, args, tokenizer, answers, images, training_args.seed)
    model = build_model(args.task, model_args, config)
    check_run(model, training_args)
    if training_args.process_index == 0:
        image_processor.save_pretrained(training_args.output_dir)
    trainer = CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=ImageTextCollator(tokenizer, pixels, image_processor),
        compute_metrics=compute_accuracy,
        preprocess_logits_for_metrics=argmax,
        callbacks=callbacks(training_args) + ([NewMasksEachEpoch(rows["train"])] if args.task == "matching" else []),
    )
    return Run(trainer, args, splits, rows, texts, answers)


def draw_images(rows: ImageTextRows, count: int, seed: int) -> np.ndarray:
    """Up to `count` of the rows' images, drawn with `seed`."""
    return np.random.default_rng(seed).permutation(np.unique(rows.images))[:count]


@torch.no_grad()
def score_all_pairs(run: Run, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """How much more the model takes each text to belong to each image than not to: (I, C)."""
    rows, args = run.rows[run.scored], run.trainer.args
    model = run.model.eval()
    # By text, so that a batch has texts of one length.
    pairs = [rows.pair(text, image) for text in texts for image in images]
    size, scores = args.per_device_eval_batch_size, []
    for start in range(0, len(pairs), size):
        batch = run.trainer.data_collator(pairs[start : start + size])
        logits = model(**{name: values.to(args.device) for name, values in batch.items()}).logits.float()
        scores.append((logits[:, 1] - logits[:, 0]).cpu())
    return torch.cat(scores).view(len(texts), len(images)).t().numpy()


def picture_predictions(run: Run, images: np.ndarray, titles: list[str], is_correct: np.ndarray, path: Path) -> None:
    """Show some images with what was predicted for each."""
    if run.trainer.is_world_process_zero():
        plot_image_grid(run.trainer.data_collator.pixels[images].numpy(), titles, is_correct.tolist(), path)


def measure_answers(run: Run, picture: Path) -> dict[str, float]:
    """How many questions of the scored split are answered right, beside who sees the question alone."""
    rows, split = run.rows[run.scored], run.splits[run.scored]
    predicted = run.trainer.predict(rows).predictions
    questions, answers = texts_of(split, run.args), answers_of(split, run.args)
    metrics = score_answers(predicted, rows.labels, answers)
    train_split = run.splits["train"]
    usual = answers_of_questions(texts_of(train_split, run.args), answers_of(train_split, run.args))
    guesses = [usual.get(question, run.answers[0]) for question in questions]
    metrics["accuracy from the question alone"] = float(
        np.mean([a == b for a, b in zip(guesses, answers, strict=True)])
    )
    shown = [
        int(np.random.default_rng((run.trainer.args.seed, image)).choice(np.flatnonzero(rows.images == image)))
        for image in draw_images(rows, PICTURED_IMAGES, run.trainer.args.seed)
    ]
    titles = [f"{questions[row]}\n{run.answers[predicted[row]]} (true: {answers[row]})" for row in shown]
    picture_predictions(run, rows.images[shown], titles, predicted[shown] == rows.labels[shown], picture)
    return metrics


def measure_matching(run: Run, picture: Path) -> dict[str, float]:
    """How many pairs of the scored split are told apart and, where one process has the model, texts ranked by image."""
    rows = run.rows[run.scored]
    predicted = run.trainer.predict(rows).predictions
    metrics = {"accuracy": float((predicted == rows.labels).mean())}
    if is_sharded(run.trainer):
        return metrics
    images = draw_images(rows, RANKED_IMAGES, run.trainer.args.seed)
    is_drawn = np.isin(rows.images, images)
    texts = np.unique(rows.own_texts[is_drawn])
    pairs = set(zip(rows.images[is_drawn], rows.own_texts[is_drawn], strict=True))
    belongs = np.array([[(image, text) in pairs for text in texts] for image in images])
    scores = score_all_pairs(run, images, texts)
    best = scores.argmax(1)
    names = [text if isinstance(text, str) else " ".join(text) for text in (run.texts[text] for text in texts)]
    shown = images[:PICTURED_IMAGES]
    titles = [f"{names[best[i]]}\n(true: {names[belongs[i].argmax()]})" for i in range(len(shown))]
    picture_predictions(run, shown, titles, belongs[np.arange(len(shown)), best[: len(shown)]], picture)
    return metrics | recall_of_texts(scores, belongs, (1, 5))


ARGUMENTS = (ModelArguments, ImageTextArguments, RunArguments)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        arguments = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        run = prepare(*arguments)
    train(run.trainer)
    picture = Path(run.trainer.args.output_dir) / "predictions.png"
    metrics = (measure_answers if run.args.task == "vqa" else measure_matching)(run, picture)
    pictures = {picture.name: f"Predictions for images of the {run.scored} data"} if picture.exists() else {}
    finish(run.trainer, run.args.description(EMBEDDED), metrics, pictures, task=run.args.task)


if __name__ == "__main__":
    main()
