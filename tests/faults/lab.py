"""Where faults are injected: data, scripts and flags, runs that a fault starts from, and what counts as survived."""

import hashlib
import itertools
import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

from training import run_classification, run_clm, run_image_text, run_mlm
from training.checkpointing import MANIFEST, checkpoints, seal
from training.tokenizer import train_tokenizer

from . import own_script
from .processes import POLL_SECONDS, Run, Sabotage, at_update, die, run_script

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
WEIGHTS = "model.safetensors"
STEPS, SAVE_STEPS = 6, 2
# Exit status of a run that was asked to end and can be resumed (`EX_TEMPFAIL` of sysexits.h).
PREEMPTED = 75
TEXT_ROWS = 60
# Script and recipe by name.
SCRIPTS = {
    "clm": (run_clm.main, "clm_smoke.yaml"),
    "mlm": (run_mlm.main, "mlm_smoke.yaml"),
    "classification": (run_classification.main, "classification_smoke.yaml"),
    "image_text": (run_image_text.main, "vqa_smoke.yaml"),
    "own": (own_script.main, None),
}


class Lost(Exception):
    """A run that did not survive its fault, and how it ended."""


def expect(holds: bool, otherwise: str) -> None:
    """Grade a run as lost unless something holds."""
    if not holds:
        raise Lost(otherwise)


def weights_hash(folder: Path) -> str:
    """SHA-256 over the tensors in `model.safetensors`, in the order of their names."""
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    digest = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        start, end = header[name]["data_offsets"]
        digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}".encode() + data[start:end])
    return digest.hexdigest()


def seal_again(checkpoint: Path) -> None:
    """Make the manifest agree with the files: who can write to a checkpoint can write its manifest."""
    if (checkpoint / MANIFEST).is_file():
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        seal(checkpoint, manifest["step"], manifest["run"])


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def die_when_saved(checkpoint: Path) -> Callable[..., None]:
    """An action that ends the process, but not before the checkpoint is sealed, which may go on beside training."""

    def wait_and_die(_) -> None:
        for _ in range(200):
            if (checkpoint / MANIFEST).is_file() and not list(checkpoint.parent.glob(".saving/*")):
                break
            time.sleep(POLL_SECONDS)
        die()

    return wait_and_die


@dataclass
class Lab:
    """A folder to work in, and what has been run in it to start from.

    Args:
        root: an empty folder.
    """

    root: Path
    _numbers: itertools.count = field(default_factory=itertools.count)
    _straight: dict[tuple, str] = field(default_factory=dict)
    _interrupted: Path | None = None

    def __post_init__(self):
        self.root.mkdir(parents=True, exist_ok=True)
        # The words come as a table, so that a row can be broken; a tenth is held out by the script.
        self.rows = [{"text": topics[name][:600]} for name in sorted(topics)[:TEXT_ROWS]]
        self.text = write_rows(self.root / "text.jsonl", self.rows)
        self.tokenizer = self.root / "tokenizer"
        train_tokenizer((row["text"] for row in self.rows), "bpe", 320).save_pretrained(self.tokenizer)

    def folder(self) -> Path:
        """A path for an output folder of its own."""
        return self.root / f"run-{next(self._numbers)}" / "out"

    def flags(self, script: str) -> list[str]:
        """Six steps of the smoke recipe on the lab's own text, with a checkpoint every second one."""
        recipe = SCRIPTS[script][1]
        flags = [] if recipe is None else [str(RECIPES / recipe)]
        flags += f"--max_steps {STEPS} --save_strategy steps --save_steps {SAVE_STEPS} --use_cpu".split()
        flags += "--eval_strategy no --logging_steps 1 --disable_tqdm true --report_to none".split()
        if script in ("clm", "mlm"):
            flags += ["--files", str(self.text)]
        if script == "clm":
            flags += ["--tokenizer_name", str(self.tokenizer)]
        return flags

    def run(
        self,
        output_dir: Path,
        *flags: str,
        script: str = "clm",
        count: int = 1,
        sabotage: Sabotage | None = None,
        limit: float = 60.0,
        may_hang: bool = False,
    ) -> Run:
        """Run a script with the lab's flags, then `flags`, which override them.

        Raises:
            Lost: when it had to be cut.
        """
        argv = [*self.flags(script), "--output_dir", str(output_dir), *map(str, flags)]
        logs = output_dir.parent / f"log-{next(self._numbers)}"
        run = run_script(SCRIPTS[script][0], argv, logs, count, sabotage, limit)
        expect(may_hang or not run.is_hung, f"a hang, cut after {limit:.0f} s")
        return run

    def straight(self, *flags: str, script: str = "clm", count: int = 1) -> str:
        """Hash of the weights that the uninterrupted run ends with."""
        key = (script, count, flags)
        if key not in self._straight:
            folder = self.folder()
            run = self.run(folder, *flags, script=script, count=count)
            expect(run.codes == [0] * count, f"the run without a fault failed: {run.last_line}")
            self._straight[key] = weights_hash(folder)
        return self._straight[key]

    def interrupted(self) -> Path:
        """Output folder, to be changed at will, of a run killed in step 5 with checkpoints of steps 2 and 4."""
        if self._interrupted is None:
            folder = self.folder()
            run = self.run(folder, sabotage=lambda rank: at_update(5, die_when_saved(folder / "checkpoint-4")))
            expect(run.code == -9 and run.steps == 4, f"the run could not be interrupted: {run.last_line}")
            self._interrupted = folder
        found = [path.name for path in checkpoints(self._interrupted)]
        expect(found == ["checkpoint-2", "checkpoint-4"], f"the interrupted run left {found}")
        copy = self.folder()
        shutil.copytree(self._interrupted, copy)
        return copy

    def resumed(
        self,
        output_dir: Path,
        steps_before: int,
        *flags: str,
        says: tuple[str, ...] = (),
        most_again: int = SAVE_STEPS,
        script: str = "clm",
        count: int = 1,
        straight_flags: tuple[str, ...] = (),
    ) -> str:
        """Resume a run and compare it with the uninterrupted one.

        Args:
            steps_before: updates that the interrupted run made.
            says: regular expressions that the output must match.
            most_again: steps that may be made a second time.
            straight_flags: those of `flags` that the uninterrupted run has too.

        Returns:
            The outcome in words.

        Raises:
            Lost: when it fails, ends with other weights, repeats too much or leaves something unsaid.
        """
        run = self.run(output_dir, "--resume", *straight_flags, *flags, script=script, count=count)
        expect(run.codes == [0] * count, f"resuming failed: {run.last_line}")
        return self.same_as_straight(run, output_dir, steps_before, says, most_again, script, count, straight_flags)

    def same_as_straight(self, run, output_dir, steps_before, says, most_again, script, count, straight_flags) -> str:
        """The grade of a resumed run that ended well; arguments and result as of `resumed`."""
        again = steps_before + run.steps - STEPS
        same = weights_hash(output_dir) == self.straight(*straight_flags, script=script, count=count)
        expect(same, f"other weights than the uninterrupted run, {again} steps made again")
        expect(again >= 0, f"{-again} steps of {STEPS} were never made")
        expect(again <= most_again, f"exact, but {again} steps made again where {most_again} may be")
        for pattern in says:
            expect(bool(re.search(pattern, run.all_text)), f"exact, but the output does not say {pattern!r}")
        return f"exact; {again} steps made again"

    def refused(self, run: Run, *words: str, steps: int = 0) -> str:
        """Grade a run that should not have begun.

        Args:
            words: regular expressions that the message must match.
            steps: updates that it may have made.
        """
        expect(run.code != 0, f"went on in silence for {run.steps} steps")
        expect(run.steps <= steps, f"ended after {run.steps} steps: {run.last_line}")
        for word in words:
            expect(bool(re.search(word, run.last_line)), f"refused without saying {word!r}: {run.last_line}")
        return f"refused: {run.last_line}"
