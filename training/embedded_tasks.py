"""Tasks made by rule, so that every script learns something without the network.

Two are made of the language reference and take its own marks as truth: what stands in "double quotes" is code, what
stands in *asterisks* a term. One translates numbers into words.
"""

import random
import re
from collections.abc import Iterator

from datasets import Dataset

from training.data import embedded_corpus

# Code, or a term in one or two asterisks. Code comes first, for it may hold asterisks.
MARKED = re.compile(r'"(?P<code>[^"]+)"|(?<!\w)\*\*?(?P<term>[^*\s][^*]*)\*\*?')
WORD = re.compile(r"\w+|[^\w\s]")
# A gap to ask for: the version of a note, or a name in code that is more than punctuation.
GAP = re.compile(r'(?<=in version )\d\.\d+|(?<=")[\w.]{2,40}(?=")')
SENTENCE_END = re.compile(r"(?<=\.) +(?=[A-Z])")
# Words of prose, below which a paragraph is a heading or a line of code.
FEWEST_WORDS = 6
# Characters of a sentence to ask about, so that the question is short beside its paragraph.
LONGEST_SENTENCE = 200
# Share of the questions that are put to a paragraph without the answer.
UNANSWERABLE = 0.25
# Numbers to write in words, of one to six digits.
HOW_MANY_NUMBERS, MOST_DIGITS = 6000, 6
BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def prose(text: str) -> Iterator[str]:
    """The paragraphs of a document that are sentences, each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split()).removeprefix("* ")
        if line.endswith((".", ":")) and len(line.split()) >= FEWEST_WORDS and ">>>" not in line and "::=" not in line:
            yield line


def tag_words(paragraph: str) -> tuple[list[str], list[str]]:
    """Words of a paragraph without its marks, and what the marks said of each: `CODE`, `TERM` or nothing."""
    tokens, tags = [], []

    def take(text: str, entity: str | None) -> None:
        words = WORD.findall(text)
        tokens.extend(words)
        tags.extend("O" if entity is None else f"{'I' if i else 'B'}-{entity}" for i in range(len(words)))

    end = 0
    for mark in MARKED.finditer(paragraph):
        take(paragraph[end : mark.start()], None)
        take(mark["code"] or mark["term"], "CODE" if mark["code"] else "TERM")
        end = mark.end()
    take(paragraph[end:], None)
    return tokens, tags


def embedded_entities() -> Dataset:
    """Words of the reference with `CODE` and `TERM` tags: columns `document`, `tokens` and `tags`."""
    rows = []
    for document, text in enumerate(embedded_corpus()["text"]):
        for paragraph in prose(text):
            tokens, tags = tag_words(paragraph)
            if set(tags) != {"O"}:
                rows.append({"document": document, "tokens": tokens, "tags": tags})
    return Dataset.from_list(rows)


def embedded_questions() -> Dataset:
    """Questions for the name or the version that fills a gap in a sentence, in the columns of SQuAD.

    Some questions are put to the next paragraph of the document, where the answer does not stand.
    """
    random_ = random.Random(0)
    rows = []
    for document, text in enumerate(embedded_corpus()["text"]):
        paragraphs = list(prose(text))
        for number, paragraph in enumerate(paragraphs):
            start, asked = 0, set()
            for sentence in SENTENCE_END.split(paragraph):
                start = paragraph.index(sentence, start)
                gap = next((gap for gap in GAP.finditer(sentence) if gap[0] not in asked), None)
                if gap is None or len(sentence) > LONGEST_SENTENCE:
                    continue
                asked.add(gap[0])
                other = paragraphs[(number + 1) % len(paragraphs)]
                answerable = gap[0] in other or random_.random() >= UNANSWERABLE
                rows.append(
                    {
                        "id": str(len(rows)),
                        "title": str(document),
                        "context": paragraph if answerable else other,
                        "question": f"What fills the gap: {sentence[: gap.start()]}...{sentence[gap.end() :]}",
                        "answers": {
                            "text": [gap[0]] if answerable else [],
                            "answer_start": [start + gap.start()] if answerable else [],
                        },
                    }
                )
    return Dataset.from_list(rows)


def number_in_words(number: int) -> str:
    """A whole number below a million as it is read in English: `1,042` is `one thousand forty-two`."""
    if number >= 1000:
        rest = number % 1000
        return f"{number_in_words(number // 1000)} thousand" + (f" {number_in_words(rest)}" if rest else "")
    if number >= 100:
        rest = number % 100
        return f"{BELOW_TWENTY[number // 100]} hundred" + (f" {number_in_words(rest)}" if rest else "")
    if number >= 20:
        rest = number % 10
        return TENS[number // 10 - 2] + (f"-{BELOW_TWENTY[rest]}" if rest else "")
    return BELOW_TWENTY[number]


def embedded_numbers() -> Dataset:
    """Different numbers in digits, `source`, and in words, `target`; as many of each length as there are."""
    random_ = random.Random(0)
    numbers: dict[int, None] = {}
    while len(numbers) < HOW_MANY_NUMBERS:
        digits = random_.randint(1, MOST_DIGITS)
        numbers[random_.randrange(10**digits)] = None
    return Dataset.from_list([{"source": f"{number:,}", "target": number_in_words(number)} for number in numbers])
