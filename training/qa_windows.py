"""From questions and paragraphs to windows of tokens with the answer's place, and from scores of places to answers."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

# Offset of a token that is not of the paragraph.
OUTSIDE = (-1, -1)


def cut_questions(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> tuple[list[str], int]:
    """The questions with no more than `longest` tokens each, and how many had to be cut."""
    encoded = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    cut = [
        question[: offsets[longest - 1][1]] if len(offsets) > longest else question
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]
    return cut, sum(len(offsets) > longest for offsets in encoded["offset_mapping"])


def answer_tokens(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """First and last token of the characters `start` to `end`, or nothing where the window does not hold them whole.

    Args:
        offsets: characters of each token, (T, 2), `OUTSIDE` where it is not of the paragraph.
    """
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or offsets[inside[0], 0] > start or offsets[inside[-1], 1] < end:
        return None
    touched = inside[(offsets[inside, 1] > start) & (offsets[inside, 0] < end)]
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def make_windows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int, max_question_length: int
) -> tuple[Dataset, int]:
    """Windows of `max_length` tokens, each the question and a part of its paragraph, and how many questions were cut.

    Neighbours share `doc_stride` tokens. A window that does not hold the whole answer points to its [CLS] token, or to
    its first where there is none. Columns beside the model's: `row` of the question, `offsets` (T, 2) and `cls`.

    Args:
        rows: with `question`, `context`, `answer` and `answer_start`, the start -1 where there is no answer.
    """
    questions, num_cut = cut_questions(rows["question"], tokenizer, max_question_length)

    def encode(batch, indices):
        encoded = tokenizer(
            [questions[index] for index in indices],
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        samples, offset_mapping = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        windows = defaultdict(list, dict(encoded))
        for window, (sample, spans) in enumerate(zip(samples, offset_mapping, strict=True)):
            parts = encoded.sequence_ids(window)
            offsets = np.array([span if part == 1 else OUTSIDE for span, part in zip(spans, parts, strict=True)])
            ids, start = encoded["input_ids"][window], batch["answer_start"][sample]
            cls = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            place = answer_tokens(offsets, start, start + len(batch["answer"][sample])) if start >= 0 else None
            first, last = place or (cls, cls)
            for name, value in (("start_positions", first), ("end_positions", last), ("cls", cls)):
                windows[name].append(value)
            windows["row"].append(indices[sample])
            windows["offsets"].append(offsets.tolist())
        return dict(windows)

    names = rows.column_names
    return rows.map(encode, batched=True, with_indices=True, remove_columns=names, desc="tokenizing"), num_cut


def best_spans(
    start: np.ndarray, end: np.ndarray, offsets: np.ndarray, n_best: int, longest: int
) -> list[tuple[float, int, int]]:
    """The best spans of a window as (score, first character, character after the last), best first.

    Only spans of the paragraph that end where they start or later and have at most `longest` tokens.

    Args:
        start, end: scores of the tokens, (T,).
        offsets: characters of each token, (T, 2).
    """
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    starts = inside[np.argsort(-start[inside], kind="stable")[:n_best]]
    ends = inside[np.argsort(-end[inside], kind="stable")[:n_best]]
    length = ends[None, :] - starts[:, None] + 1
    scores = np.where((length >= 1) & (length <= longest), start[starts][:, None] + end[ends][None, :], -np.inf)
    order = np.argsort(-scores, axis=None, kind="stable")[:n_best]
    pairs = [(float(scores.flat[index]), *np.unravel_index(index, scores.shape)) for index in order]
    return [
        (score, int(offsets[starts[i], 0]), int(offsets[ends[j], 1])) for score, i, j in pairs if np.isfinite(score)
    ]


def find_answers(
    windows: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    contexts: Sequence[str],
    n_best: int = 20,
    max_answer_length: int = 30,
    allow_none: bool = True,
    null_threshold: float = 0.0,
) -> tuple[list[str], list[list[dict]]]:
    """The answer to each question, and its candidates with score and probability, best first.

    No answer, the empty string, scores as the [CLS] tokens of the window where they score least. It is given where it
    beats the best span by more than `null_threshold`.

    Args:
        start_logits, end_logits: (windows, at least T), padded on the right.
        contexts: the paragraph of each question.
        allow_none: whether a question may have no answer.
    """
    spans = [[] for _ in contexts]
    null_scores = np.full(len(contexts), np.inf)
    columns = zip(windows["row"], windows["offsets"], windows["cls"], start_logits, end_logits, strict=True)
    for row, offsets, cls, start, end in columns:
        null_scores[row] = min(null_scores[row], start[cls] + end[cls])
        spans[row] += best_spans(start, end, np.array(offsets), n_best, max_answer_length)
    answers, candidates = [], []
    for context, found, null_score in zip(contexts, spans, null_scores, strict=True):
        # Neighbouring windows give a span twice; the better of the two stands for it.
        unique = {}
        for score, first, last in sorted(found, key=lambda span: -span[0]):
            unique.setdefault((first, last), (score, context[first:last]))
        best = list(unique.values())[:n_best]
        none = allow_none and (not best or null_score - best[0][0] > null_threshold)
        answers.append(best[0][1] if best and not none else "")
        listed = sorted([*best, (float(null_score), "")] if allow_none else best, key=lambda item: -item[0])
        scores = np.array([score for score, _ in listed])
        chances = np.exp(scores - scores.max()) if listed else scores
        candidates.append(
            [
                {"text": text, "score": score, "probability": float(chance)}
                for (score, text), chance in zip(listed, chances / chances.sum(), strict=True)
            ]
        )
    return answers, candidates
