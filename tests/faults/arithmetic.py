"""Numbers that go wrong, and settings that cannot work (faults 24-30)."""

import functools
import json
import math
import re
import struct
from pathlib import Path

import torch

from hf_custom import CustomGPT2ForCausalLM
from training import run_clm

from .lab import STEPS, WEIGHTS, Lab, checkpoints, die_when_saved, expect, write_rows
from .processes import at_update

# A weight of the smoke model is far below this unless an update destroyed it.
LARGEST_SANE_WEIGHT = 100.0
# Three batches of the smoke recipe make an epoch.
SHORT_ROWS, SHORT_TEXT = 10, 200


def fsdp_on_processors(lab: Lab) -> str:
    run = lab.run(lab.folder(), "--fsdp", "full_shard", count=2)
    return lab.refused(run, "fsdp")


def nan_loss_at(step: int) -> None:
    """One loss that is NaN, and with it all gradients."""
    plain, calls = CustomGPT2ForCausalLM.forward, iter(range(1, 1000))

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        outputs = plain(self, *args, **kwargs)
        if self.training and next(calls) == step:
            outputs.loss = outputs.loss * math.nan
        return outputs

    CustomGPT2ForCausalLM.forward = forward


def nan_loss(lab: Lab) -> str:
    folder = lab.folder()
    first = lab.run(folder, sabotage=lambda rank: nan_loss_at(4))
    expect(first.code != 0, f"went on in silence for {first.steps} steps")
    expect(first.steps == 3, f"stopped after {first.steps} updates where step 4 has the NaN: {first.last_line}")
    expect(bool(re.search("finite|nan", first.last_line, re.IGNORECASE)), f"unclear end: {first.last_line}")
    words = lab.resumed(folder, first.steps)
    skipped = lab.run(lab.folder(), "--on_nonfinite", "skip", sabotage=lambda rank: nan_loss_at(4))
    expect(skipped.code == 0, f"--on_nonfinite skip: {skipped.last_line}")
    expect(skipped.steps == STEPS - 1, f"--on_nonfinite skip: {skipped.steps} updates of {STEPS}, one of them skipped")
    counted = re.search(r"(skipped|left out)\D*\b1\b|\b1\b[^\n]*(skipped|left out)", skipped.all_text)
    expect(bool(counted), "--on_nonfinite skip: the skipped update is not counted in the output")
    return f"stopped before the update; {words}; or skipped and counted"


def largest_weight(checkpoint: Path) -> float:
    """Infinite where one is not a number."""
    content = (checkpoint / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    data = content[8 + length :]
    values = [abs(value) for (value,) in struct.iter_unpack("<f", data)]
    return math.inf if any(math.isnan(value) for value in values) else max(values)


def divergence(lab: Lab) -> str:
    """The rate is 0 in the first step, by the warm-up, so that there is a good checkpoint."""
    folder = lab.folder()
    flags = "--learning_rate 1e6 --save_steps 1 --max_steps 12".split()
    run = lab.run(folder, *flags)
    expect(run.code != 0, f"went on in silence for {run.steps} steps")
    expect(run.steps < 12, f"all updates were made: {run.last_line}")
    expect(bool(re.search("diverge|finite|loss", run.last_line, re.IGNORECASE)), f"unclear end: {run.last_line}")
    good = [path.name for path in checkpoints(folder) if largest_weight(path) < LARGEST_SANE_WEIGHT]
    left = ", ".join(path.name for path in checkpoints(folder))
    expect(bool(good), f"stopped after {run.steps} updates, but no good checkpoint is left ({left})")
    return f"stopped after {run.steps} updates; {good[-1]} is good"


def no_labels(lab: Lab) -> str:
    folder = lab.folder()
    ids = [row % 50 for row in range(20)]
    file = write_rows(lab.root / "unlabelled.jsonl", [{"input_ids": ids, "labels": [-100] * 20}] * 30)
    return lab.refused(lab.run(folder, "--files", file, script="own"), "label")


def fp16_on_processor(lab: Lab) -> str:
    return lab.refused(lab.run(lab.folder(), "--fp16"), "fp16")


def masked_run_in_epoch(lab: Lab) -> str:
    """Of so little text that the run is in the midst of its second epoch."""
    short = [{"text": row["text"][:SHORT_TEXT]} for row in lab.rows[:SHORT_ROWS]]
    flags = ("--files", str(write_rows(lab.root / "short.jsonl", short)))
    folder = lab.folder()
    first = lab.run(
        folder, *flags, script="mlm", sabotage=lambda rank: at_update(5, die_when_saved(folder / "checkpoint-4"))
    )
    expect(first.code == -9, f"was not killed: {first.last_line}")
    epoch = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())["epoch"]
    expect(epoch > 1 and epoch % 1 > 0, f"epoch {epoch:.2f} is not in the midst of the second: no fault of the run")
    return f"epoch {epoch:.2f}: " + lab.resumed(folder, first.steps, script="mlm", straight_flags=flags)


def mixed_dtypes(lab: Lab) -> str:
    def sabotage(rank: int) -> None:
        plain = run_clm.prepare_model

        def prepare_model(*args, **kwargs):
            model = plain(*args, **kwargs)
            model.transformer.h[0].mlp.to(torch.bfloat16)
            return model

        run_clm.prepare_model = prepare_model

    run = lab.run(lab.folder(), sabotage=sabotage)
    return "handled" if run.code == 0 else lab.refused(run, r"transformer\.h\.0\.mlp|bfloat16")
