"""Questions and answers as SQuAD has them, or flat: read and check them."""

from collections import Counter

from datasets import Dataset

from training.preflight import ROW, Origin, check_columns, leave_out, row_of_the_data

START = "answer_start"


def read_answers(row: dict, column: str) -> tuple[list[str], list[int]]:
    """Texts and starts of a row's answers: both of one column, or flat with the starts in their own."""
    value = row[column]
    if isinstance(value, dict):
        texts, starts = value["text"], value[START]
        texts, starts = ([v] if isinstance(v, str | int) else list(v or []) for v in (texts, starts))
        return texts, starts
    start = row[START]
    return ([value], [-1 if start in (None, "") else int(start)]) if value else ([], [])


def fault_of_answers(context: str, texts: list[str], starts: list[int], column: str) -> tuple[str, str, str] | None:
    """Kind, problem and remedy of answers that do not stand where they say."""
    if len(texts) != len(starts):
        return "ragged", f"has {len(texts)} answers but {len(starts)} starts in `{column}`", "Give each answer one."
    for text, start in zip(texts, starts, strict=True):
        found = context[start : start + len(text)] if start >= 0 else ""
        if not text or found != text:
            return (
                "answer not in its paragraph",
                f"has answer {text[:60]!r} at character {start}, where the paragraph has {found[:60]!r}",
                f"Correct `{START}`; it counts characters from 0.",
            )
    return None


def read_questions(
    rows: Dataset,
    split: str,
    question_column: str = "question",
    context_column: str = "context",
    answers_column: str | None = None,
    id_column: str = "id",
    origin: Origin | None = None,
) -> Dataset:
    """Columns `id`, `question`, `context`, all `answers`, the first as `answer` and `answer_start` (-1 for none).

    Args:
        origin: says what becomes of bad rows; without it the first is refused.

    Raises:
        ValueError: for a missing column, and for a row with an answer that does not stand where it says.
    """
    origin = origin or Origin(f"the {split} data")
    where = origin.words
    rows = check_columns(rows, {"question_column": question_column, "context_column": context_column}, origin)
    flat = "answer" in rows.column_names and "answers" not in rows.column_names
    column = answers_column or ("answer" if flat else "answers")
    nested = isinstance(rows.features.get(column), dict)
    names = [column] if nested or column not in rows.column_names else [column, START]
    absent = [name for name in names if name not in rows.column_names]
    if absent or (nested and {"text", START} - set(rows.features[column])):
        raise ValueError(
            f"{where} has no column `{(absent or [column])[0]}` with answers; its columns are "
            f"{', '.join(name for name in rows.column_names if name != ROW)}. Give `answers` with `text` and "
            f"`{START}` in it, or `answer` and `{START}`, or name the column with --answers_column."
        )
    read, bad = [], []
    for index, row in enumerate(rows):
        place = row_of_the_data(rows, index)
        context = row[context_column]
        texts, starts = read_answers(row, column)
        fault = fault_of_answers(context, texts, starts, column)
        if fault is not None:
            origin.reject(place, *fault, {name: value for name, value in row.items() if name != ROW})
            bad.append(index)
            continue
        answer, start = (texts[0], starts[0]) if texts else ("", -1)
        name = str(row.get(id_column, place))
        fields = {"id": name, "question": row[question_column], "context": context}
        read.append({**fields, "answers": texts, "answer": answer, START: start})
    leave_out(rows, bad, origin)
    (name, count), *_ = Counter(row["id"] for row in read).most_common(1)
    if count > 1:
        raise ValueError(f"{where} has id {name!r} {count} times in `{id_column}`. Give each question its own.")
    return Dataset.from_list(read)
