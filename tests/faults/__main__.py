"""Inject every fault into a run of the scripts, and print what became of each.

python -m tests.faults
python -m tests.faults --only 1 11 40 --json faults.json
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import datasets
import matplotlib.pyplot  # noqa: F401 - so that no run has to
import torch
import transformers

from .lab import Lab
from .table import FAULTS, Fault, Outcome, grade

WIDEST_OUTCOME, WIDEST_BRIEF = 160, 90


def shortened(words: str, width: int = WIDEST_OUTCOME) -> str:
    """One cell of a table."""
    words = " ".join(words.split()).replace("|", "/")
    return words if len(words) <= width else words[: width - 1] + "…"


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = ["| # | fault | how injected | outcome | survived | seconds |", "| --- | --- | --- | --- | --- | --- |"]
    for found in outcomes:
        cells = (found.number, found.fault, found.how, shortened(found.outcome), "yes" if found.survived else "no")
        lines.append(f"| {' | '.join(map(str, cells))} | {found.seconds:.1f} |")
    return "\n".join(lines)


def brief(results: dict) -> str:
    """The README's table of a results file: what was injected and, in a few words, what became of it."""
    lines = ["| # | fault | survived | outcome |", "| --- | --- | --- | --- |"]
    for found in results["faults"]:
        words = shortened(found["outcome"], WIDEST_BRIEF)
        lines.append(f"| {found['number']} | {found['fault']} | {'yes' if found['survived'] else 'no'} | {words} |")
    return "\n".join([*lines, "", f"{results['survived']} of {results['of']} faults survived."])


def grade_in(folder: Path, number: int) -> Outcome:
    """Grade one fault in a lab of its own."""
    return grade(next(fault for fault in FAULTS if fault.number == number), Lab(folder))


def grades(faults: list[Fault], folder: Path, jobs: int) -> Iterator[Outcome]:
    """Outcomes as they come. One job shares the runs that faults start from; several make them anew for each."""
    if jobs == 1:
        lab = Lab(folder / "lab")
        for fault in faults:
            yield grade(fault, lab)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        work = [pool.submit(grade_in, folder / f"lab-{fault.number}", fault.number) for fault in faults]
        for job in as_completed(work):
            yield job.result()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the faults; all when not given")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes here too")
    parser.add_argument("--folder", type=Path, help="keep the runs in this folder, which must be new")
    args = parser.parse_args(argv)
    unknown = set(args.only or ()) - {fault.number for fault in FAULTS}
    if unknown:
        parser.error(f"no fault has number {', '.join(map(str, sorted(unknown)))}; they go from 1 to {len(FAULTS)}.")
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs} but must be at least 1.")
    if args.folder is not None and args.folder.exists():
        parser.error(f"--folder {args.folder} exists. Name a new one.")
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    faults = [fault for fault in FAULTS if args.only is None or fault.number in args.only]
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        for found in grades(faults, folder, args.jobs):
            outcomes.append(found)
            verdict = "survived" if found.survived else "LOST"
            place = f"[{len(outcomes)}/{len(faults)}]"
            print(f"{place} {found.number} {found.fault}: {verdict}, {found.outcome} ({found.seconds} s)", flush=True)
    outcomes.sort(key=lambda found: found.number)
    survived = sum(found.survived for found in outcomes)
    print(f"\n{table(outcomes)}\n\n{survived} of {len(outcomes)} faults survived")
    if args.json is not None:
        content = {"survived": survived, "of": len(outcomes), "faults": [asdict(found) for found in outcomes]}
        args.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if survived == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
