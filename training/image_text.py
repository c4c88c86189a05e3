"""Questions about images, and whether a text belongs to one: the rows, what to predict, and how well it is done."""

import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from training.image_tables import ImageRows, places_of
from training.images import decode_images
from training.masking import random_numbers

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
YES_OR_NO = ("yes", "no")
# Label of a row whose answer the model does not have: no prediction equals it, and it has no loss.
NO_LABEL = -100
# Draws after which a pair keeps its own text: its image goes with nearly all texts.
MOST_DRAWS = 20


def digit_questions(digit: int, other: int) -> list[tuple[str, str]]:
    """Questions about a digit, `other` being one that it is not."""
    questions = [
        ("which digit is it?", DIGITS[digit]),
        ("is it even?", YES_OR_NO[digit % 2]),
        ("is it larger than four?", YES_OR_NO[digit <= 4]),
    ]
    return questions + [(f"is it a {DIGITS[number]}?", YES_OR_NO[number != digit]) for number in (digit, other)]


def embedded_digits(task: str) -> ImageRows:
    """The handwritten digits that scikit-learn carries, with questions or captions made by rule."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(0)
    columns, sources = defaultdict(list), []
    for pixels, digit in zip(digits.images, digits.target.tolist(), strict=True):
        stream = io.BytesIO()
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(stream, "png")
        other = int(digit + rng.integers(1, 10)) % 10
        if task == "matching":
            rows = [{"caption": f"a handwritten {DIGITS[digit]}"}]
        else:
            rows = [{"question": question, "answer": answer} for question, answer in digit_questions(digit, other)]
        for row in rows:
            sources.append(stream.getvalue())
            for column, value in row.items():
                columns[column].append(value)
    return ImageRows(Dataset.from_dict(columns), sources, places_of(sources, "the digits of scikit-learn"))


def find_answers(answers: Sequence[str], most: int | None) -> list[str]:
    """The distinct answers, the `most` frequent of them, in order of frequency and then of the alphabet."""
    counts = Counter(answers)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:most]


def answers_of_questions(questions: Sequence[str], answers: Sequence[str]) -> dict[str, str]:
    """The most frequent answer to each question, of several the first in the alphabet."""
    counts = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        counts[question].append(answer)
    return {question: find_answers(found, 1)[0] for question, found in counts.items()}


def score_answers(predicted: np.ndarray, labels: np.ndarray, answers: Sequence[str]) -> dict[str, float]:
    """Share of correct predictions: of all rows, of those whose answer is yes or no, and of the others."""
    is_correct = predicted == labels
    is_yes_or_no = np.array([answer.lower() in YES_OR_NO for answer in answers])
    metrics = {"accuracy": is_correct.mean()}
    for name, part in (("yes or no", is_yes_or_no), ("other answers", ~is_yes_or_no)):
        if part.any():
            metrics[f"accuracy of {name}"] = is_correct[part].mean()
    return {name: float(value) for name, value in metrics.items()}


def draw_pairs(images: np.ndarray, texts: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of which half belong together: for each row its own text or that of another, and 1 or 0.

    The other text is none that any row gives to the same image.

    Args:
        images: (N,), which image each row has.
        texts: (N,), which text each row has.

    Returns:
        Texts (N,) and labels (N,).
    """
    count, width = len(texts), texts.max() + 1
    own = np.unique(images * width + texts)
    open_rows = generator.permutation(count)[: count // 2]
    drawn, labels = texts.copy(), np.ones(count, dtype=np.int64)
    for _ in range(MOST_DRAWS):
        drawn[open_rows] = texts[generator.integers(0, count, len(open_rows))]
        is_own = np.isin(images[open_rows] * width + drawn[open_rows], own)
        labels[open_rows[~is_own]] = 0
        open_rows = open_rows[is_own]
    drawn[open_rows] = texts[open_rows]
    return drawn, labels


class ImageTextRows(torch.utils.data.Dataset):
    """Rows of token ids, the number of an image, and a label. Equal texts are tokenized once.

    Args:
        encoded: the distinct texts, as the tokenizer gives them.
        texts: (N,), which of them each row has.
        images: (N,), which image each row has.
        labels: (N,).
    """

    def __init__(self, encoded: dict[str, list], texts: np.ndarray, images: np.ndarray, labels: np.ndarray):
        self.encoded, self.texts, self.images, self.labels = encoded, texts, images, labels

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict:
        return self.pair(self.texts[row], self.images[row]) | {"labels": int(self.labels[row])}

    def pair(self, text: int, image: int) -> dict:
        """Any text with any image, without a label."""
        return {name: values[text] for name, values in self.encoded.items()} | {"image": int(image)}


class MatchingRows(ImageTextRows):
    """Pairs of image and text, half of which belong together, others in each epoch: a function of seed, epoch and row.

    Args:
        own_texts: (N,), which text each row has in the data.
        fixed: the same pairs in each epoch, to compare one evaluation with the next.
    """

    def __init__(self, encoded: dict[str, list], own_texts: np.ndarray, images: np.ndarray, seed: int, fixed: bool):
        super().__init__(encoded, own_texts, images, np.ones_like(own_texts))
        self.own_texts, self.seed = own_texts, seed
        # In shared memory, since a worker that lives on has its own copy of everything else.
        self.epoch = torch.full((), -1 if fixed else 0).share_memory_()
        self.drawn_epoch = None
        self.draw()

    def start_epoch(self, epoch: int) -> None:
        """Draw new pairs."""
        self.epoch.fill_(epoch)

    def draw(self) -> None:
        self.drawn_epoch = self.epoch.item()
        generator = random_numbers(self.seed, self.drawn_epoch + 1)
        self.texts, self.labels = draw_pairs(self.images, self.own_texts, generator)

    def __getitem__(self, row: int) -> dict:
        if self.drawn_epoch != self.epoch.item():
            self.draw()
        return super().__getitem__(row)


def number_distinct(values: Sequence) -> tuple[list, np.ndarray]:
    """The distinct values, first come first, and which of them each value is: (N,)."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return list(numbers), np.array([numbers[value] for value in values], dtype=np.int64)


def number_across(splits: dict[str, Sequence]) -> tuple[list, dict[str, np.ndarray]]:
    """The distinct values of all splits, and by split which of them each value is."""
    distinct, numbers = number_distinct([value for values in splits.values() for value in values])
    ends = np.cumsum([len(values) for values in splits.values()])[:-1]
    return distinct, dict(zip(splits, np.split(numbers, ends), strict=True))


def decode_splits(
    splits: dict[str, ImageRows], image_processor: BaseImageProcessor, shape: tuple[int, int]
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """The distinct images of all splits as (N, 3, height, width) of bytes, and by split which of them each row has."""
    sources, images = number_across({name: split.sources for name, split in splits.items()})
    places = {source: place for split in splits.values() for source, place in split.places.items()}
    pixels = decode_images(sources, places, image_processor, shape)
    if shared := set(images["train"]) & set(images.get("test", [])):
        print(f"{len(shared)} images are both in the training and in the test data")
    return pixels, images


def encode_texts(
    texts: list[str] | list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list]:
    """Token ids of texts or of pairs of texts, and what else the tokenizer gives. Says how many were cut."""
    columns = list(zip(*texts, strict=True)) if isinstance(texts[0], tuple) else [texts]
    encoded = tokenizer(*(list(column) for column in columns), truncation=True, max_length=max_length)
    cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings or [])
    if cut:
        print(f"{cut} of {len(texts)} distinct texts are longer than {max_length} tokens and were cut (--max_length)")
    return dict(encoded)


def recall_of_texts(scores: np.ndarray, belongs: np.ndarray, counts: Sequence[int]) -> dict[str, float]:
    """Share of images with one of their own texts among the best k, and what chance gives.

    A text that ties with an image's own stands before it.

    Args:
        scores: (I, C) of each image with each text.
        belongs: (I, C), true where a text is the image's own; each image has one.
        counts: the values of k.
    """
    best = np.where(belongs, scores, -np.inf).max(1, keepdims=True)
    rank = ((scores >= best) & ~belongs).sum(1)
    others, total = (~belongs).sum(1), belongs.shape[1]
    metrics = {}
    for k in counts:
        chance = [1 - math.comb(int(wrong), k) / math.comb(total, k) if k <= total else 1.0 for wrong in others]
        metrics |= {f"recall@{k}": float((rank < k).mean()), f"recall@{k} by chance": float(np.mean(chance))}
    return metrics
