"""Exact match and F1 of answers, as SQuAD defines them (Rajpurkar et al. 2016, section 6.1, and 2018, section 5).

Both compare words without case, punctuation and articles, take the best of the correct answers, and are in percent. A
question without an answer is right when the answer given is empty, and else wrong by both measures.
"""

import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """The answer in lower case, without punctuation and articles, single-spaced."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same after normalization, else 0."""
    return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words that both share, each as often as it stands in both."""
    predicted, correct = normalize(prediction).split(), normalize(answer).split()
    if not predicted or not correct:
        return float(predicted == correct)
    shared = sum((Counter(predicted) & Counter(correct)).values())
    return 2 * shared / (len(predicted) + len(correct))


def score_answers(predictions: list[str], answers: list[list[str]]) -> dict[str, float]:
    """Mean exact match and F1 in percent, of all questions and of those with and without an answer.

    Args:
        predictions: one answer a question; empty for none.
        answers: the correct answers of each question; empty for none.
    """
    groups: dict[str, list[tuple[float, float]]] = {"": [], "HasAns ": [], "NoAns ": []}
    for prediction, correct in zip(predictions, answers, strict=True):
        # An answer of nothing but articles and punctuation cannot be matched by words.
        choices = [answer for answer in correct if normalize(answer)] or [""]
        scores = max(exact_match(prediction, answer) for answer in choices), max(f1(prediction, a) for a in choices)
        groups[""].append(scores)
        groups["HasAns " if correct else "NoAns "].append(scores)
    metrics = {}
    for group, scores in groups.items():
        for name, values in zip(("exact match", "f1"), zip(*scores, strict=True), strict=False):
            metrics[group + name] = 100 * sum(values) / len(values)
    # Of questions without an answer both are the same number.
    metrics.pop("NoAns f1", None)
    if "NoAns exact match" not in metrics:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("HasAns")}
    return metrics
