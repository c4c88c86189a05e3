"""Rows that cannot be trained on, and tokens that end or fill a text (faults 31-39)."""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from hf_custom import CustomGPT2ForCausalLM
from training.tokenizer import END_OF_TEXT

from .lab import Lab, expect, write_rows
from .own_script import POSITIONS, VOCAB_SIZE
from .processes import Run

# Place of the bad row, and how many rows there are.
BAD, ROWS = 13, 40
NAMES_ROW = rf"row {BAD}\b"


def _quarantined(lab: Lab, run: Run, aside: Path, bad: int) -> str:
    """Grade a run that was to put its bad rows aside and go on."""
    expect(run.code == 0, f"refused well, but --quarantine fails: {run.last_line}")
    expect(aside.is_file(), "refused well, but --quarantine wrote no file")
    lines = [line for line in aside.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    expect(len(lines) == bad, f"refused well, but --quarantine wrote {len(lines)} rows where {bad} are bad")
    said = re.search(rf"\b{bad}\b[^\n]*(quarantine|{re.escape(aside.name)})", run.all_text)
    expect(bool(said), "rows were put aside without being counted in the output")
    return f"{bad} put aside by --quarantine"


def bad_row(
    row: dict | str | bytes | Callable, *words: str, script: str = "own", good: Callable[[int], dict] | None = None
) -> Callable[[Lab], str]:
    """A fault that puts one bad row among good ones, which is refused by its number and put aside on request.

    Args:
        row: the bad one, or the bytes of its line.
        words: regular expressions that the message must match beside the row's number.
        good: the other rows by their number.
    """
    good = good or (lambda number: {"input_ids": [number % 50 + 1] * 20, "labels": [number % 50 + 1] * 20})

    def inject(lab: Lab) -> str:
        lines = [json.dumps(good(number)).encode() for number in range(ROWS)]
        lines[BAD] = row if isinstance(row, bytes) else json.dumps(row).encode()
        folder = lab.folder()
        folder.parent.mkdir(parents=True)
        file, aside = folder.parent / "rows.jsonl", folder.parent / "aside.jsonl"
        file.write_bytes(b"\n".join(lines) + b"\n")
        words_of_refusal = lab.refused(lab.run(folder, "--files", file, script=script), NAMES_ROW, *words)
        again = lab.run(folder, "--files", file, "--quarantine", aside, script=script)
        return f"{words_of_refusal}; {_quarantined(lab, again, aside, 1)}"

    return inject


def several(*injections: Callable[[Lab], str]) -> Callable[[Lab], str]:
    """A fault of several forms, all of which must be survived."""
    return lambda lab: "; ".join(inject(lab) for inject in injections)


def ids(values: list[int]) -> dict:
    return {"input_ids": values, "labels": values}


# A classifier whose tokenizer pads only if it is told to.
CLASSIFIER = "--preset gpt2-mini --config_overrides n_embd=32,n_layer=2,n_head=2".split()
# Of the script for own rows.
LABEL_OUT_OF_RANGE = {"input_ids": [1] * 20, "labels": [1] * 19 + [VOCAB_SIZE]}
ROW_TOO_LONG = ids([1] * (POSITIONS + 1))
EMPTY_ROW = ids([])
RAGGED_ROW = {"input_ids": [1] * 20, "labels": [1] * 17}


def text_row(number: int) -> dict:
    return {"text": f"row {number} has words such as these, and some more of them. " * 12}


def id_row(number: int) -> dict:
    return {"input_ids": [number % 50 + 1] * 80}


def count_ends_in_labels(file: Path, end: int) -> None:
    """Write how many labels of the batches so far ask for the end of a text."""
    plain, found = CustomGPT2ForCausalLM.forward, []

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        if kwargs.get("labels") is not None:
            found.append(int((kwargs["labels"] == end).sum()))
            file.write_text(str(sum(found)))
        return plain(self, *args, **kwargs)

    CustomGPT2ForCausalLM.forward = forward


def padding_token(name: str | None) -> Callable[[Lab], str]:
    """A fault of the tokenizer: its token for padding is missing, or is the one that ends a text."""

    def inject(lab: Lab) -> str:
        folder = lab.folder()
        tokenizer, ends = folder.parent / "tokenizer", folder.parent / "ends"
        shutil.copytree(lab.tokenizer, tokenizer)
        file = tokenizer / "tokenizer_config.json"
        settings = {key: value for key, value in json.loads(file.read_text()).items() if key != "pad_token"}
        file.write_text(json.dumps(settings | ({} if name is None else {"pad_token": name})))
        end = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"][END_OF_TEXT]
        flags = ("--tokenizer_name", tokenizer)
        run = lab.run(folder, *flags, sabotage=lambda rank: count_ends_in_labels(ends, end))
        expect(run.code == 0, f"failed: {run.last_line}")
        count = int(ends.read_text())
        expect(count > 0, "no label asks for the end of a text, so none is learned")
        # Rows of unequal length, which have to be padded.
        classified = lab.run(folder.parent / "classes", *flags, *CLASSIFIER, script="classification")
        expect(classified.code == 0, f"rows of unequal length: {classified.last_line}")
        return f"trained; {count} labels ask for the end of a text"

    return inject


def corrupt_image(lab: Lab) -> str:
    folder = lab.folder()
    pictures = folder.parent / "pictures"
    pictures.mkdir(parents=True)
    for number in range(ROWS):
        Image.new("L", (8, 8), 6 * number).save(pictures / f"{number}.png")
    (pictures / f"{BAD}.png").write_bytes((pictures / f"{BAD}.png").read_bytes()[:40])
    rows = [
        {"file_name": f"{number}.png", "question": "is it light?", "answer": "yes" if number > 20 else "no"}
        for number in range(ROWS)
    ]
    write_rows(pictures / "metadata.jsonl", rows)
    aside = folder.parent / "aside.jsonl"
    words = lab.refused(lab.run(folder, "--files", pictures, script="image_text"), NAMES_ROW)
    again = lab.run(folder, "--files", pictures, "--quarantine", aside, script="image_text")
    return f"{words}; {_quarantined(lab, again, aside, 1)}"
