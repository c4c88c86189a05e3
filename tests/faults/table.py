"""The table of faults, and the grade of each."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from . import arithmetic, checkpoint_damage, crashes, rows
from .checkpoint_damage import falls_back, flip_bit, remove, truncate
from .lab import Lab, Lost
from .rows import bad_row, padding_token, several


@dataclass(frozen=True)
class Fault:
    """What goes wrong, how it is made to, and what must come of it.

    Attributes:
        inject: breaks a run and gives the outcome in words.

    Raises:
        Lost: by `inject`, when what is wanted did not come.
    """

    number: int
    title: str
    how: str
    want: str
    inject: Callable[[Lab], str]


@dataclass(frozen=True)
class Outcome:
    """What became of a run with a fault."""

    number: int
    fault: str
    how: str
    want: str
    outcome: str
    survived: bool
    seconds: float


BROKEN_LINE = rb'{"text": "row 13 has words'
BAD_BYTES = b'{"text": "row 13 has \xff\xfe words"}'

FAULTS = (
    Fault(
        1,
        "kill -9 in mid-step",
        "SIGKILL before update 5, and before update 6 of slow steps",
        "resume exact",
        crashes.killed_in_step,
    ),
    Fault(
        2,
        "kill while saving, after the weights",
        "SIGKILL before optimizer.pt of the second checkpoint",
        "fall back, exact",
        crashes.killed_after_weights,
    ),
    Fault(
        3,
        "kill while saving, after the optimizer",
        "SIGKILL after optimizer.pt of the second checkpoint",
        "fall back, exact",
        crashes.killed_after_optimizer,
    ),
    Fault(
        4,
        "kill during rotation",
        "SIGKILL after one file of the old checkpoint is removed; one checkpoint kept",
        "at least one good checkpoint left",
        crashes.killed_in_rotation,
    ),
    Fault(
        5,
        "disk full while saving",
        "limit on file size from step 4 on, below the weights and below the optimizer",
        "old one kept, clear error",
        crashes.full_disk,
    ),
    Fault(
        6,
        "truncated weights",
        "half of model.safetensors",
        "fall back",
        falls_back((truncate("model.safetensors"), "model.safetensors")),
    ),
    Fault(
        7,
        "truncated optimizer",
        "half of optimizer.pt",
        "fall back",
        falls_back((truncate("optimizer.pt"), "optimizer.pt")),
    ),
    Fault(
        8,
        "optimizer missing",
        "optimizer.pt removed",
        "refuse or fall back, said",
        falls_back((remove("optimizer.pt"), "optimizer.pt")),
    ),
    Fault(
        9,
        "scheduler or random state missing",
        "scheduler.pt removed; rng_state.pth removed",
        "refuse or fall back, said",
        falls_back((remove("scheduler.pt"), "scheduler.pt"), (remove("rng_state.pth"), "rng_state.pth")),
    ),
    Fault(
        10,
        "broken trainer_state.json",
        "half of the file",
        "fall back",
        falls_back((truncate("trainer_state.json"), "trainer_state.json")),
    ),
    Fault(
        11,
        "one flipped bit in the weights",
        "in the middle of model.safetensors",
        "caught by the manifest",
        falls_back((flip_bit("model.safetensors"), "model.safetensors")),
    ),
    Fault(
        12,
        "one flipped bit in the optimizer",
        "in the middle of optimizer.pt",
        "caught by the manifest",
        falls_back((flip_bit("optimizer.pt"), "optimizer.pt")),
    ),
    Fault(
        13,
        "checkpoint full of NaN",
        "every weight, with a manifest that agrees",
        "fall back",
        falls_back((checkpoint_damage.fill_with_nan, "finite")),
    ),
    Fault(14, "empty checkpoint folder", "checkpoint-6 made empty", "skip", checkpoint_damage.empty_checkpoint),
    Fault(15, "resume asked, none there", "new output folder", "start fresh, said", checkpoint_damage.no_checkpoint),
    Fault(
        16,
        "SIGTERM, SIGINT",
        "sent to itself before the third update",
        "saved, exact, exit status 75",
        crashes.sigterm,
    ),
    Fault(
        17,
        "SIGTERM with the host's just-in-time saving",
        "the same with --enable_jit_checkpoint",
        "saved, exact, exit status 75",
        crashes.sigterm_just_in_time,
    ),
    Fault(
        18,
        "SIGTERM skewed between two processes",
        "0.5 s apart, either first, steps of 0.2 s",
        "saved, exact, exit status 75, no hang",
        crashes.skewed_signals,
    ),
    Fault(19, "SIGUSR1", "sent to itself before the third update", "saved, exact, exit status 75", crashes.sigusr1),
    Fault(
        20,
        "one of two processes dies",
        "SIGKILL before the fifth update, of either; --ddp_timeout 10",
        "all end within the time-out, named; restart exact",
        crashes.rank_dies,
    ),
    Fault(
        21,
        "one of two processes hangs",
        "sleep before the fifth update, of either; --ddp_timeout 10",
        "all end within the time-out, named; restart exact",
        crashes.rank_hangs,
    ),
    Fault(
        22,
        "resumed with another number of processes",
        "one process, then two",
        "refused or exact, said",
        crashes.other_number_of_processes,
    ),
    Fault(
        23,
        "data set changed between runs",
        "text of one row replaced",
        "refused",
        checkpoint_damage.changed_data,
    ),
    Fault(
        24,
        "FSDP that would silently become DDP",
        "--fsdp full_shard --use_cpu, two processes",
        "refused",
        arithmetic.fsdp_on_processors,
    ),
    Fault(
        25,
        "one NaN loss",
        "loss of step 4 times NaN",
        "stopped before the update; last good checkpoint kept",
        arithmetic.nan_loss,
    ),
    Fault(
        26,
        "learning rate 1e6",
        "--learning_rate 1e6",
        "stopped before the update; last good checkpoint kept",
        arithmetic.divergence,
    ),
    Fault(27, "all labels -100", "in every row of a script of one's own", "refused", arithmetic.no_labels),
    Fault(28, "fp16 on a processor", "--fp16 --use_cpu", "refused", arithmetic.fp16_on_processor),
    Fault(
        29,
        "masked-LM run resumed in mid-epoch",
        "SIGKILL before the fifth update, in the second epoch",
        "exact",
        arithmetic.masked_run_in_epoch,
    ),
    Fault(
        30,
        "parameters of mixed dtype",
        "one MLP in bfloat16",
        "named, refused or handled",
        arithmetic.mixed_dtypes,
    ),
    Fault(
        31,
        "token id out of range",
        "row 13 of ids, for run_clm and for a script of one's own",
        "row number, before step 1",
        several(
            bad_row({"input_ids": [9999] * 80}, "9999", script="clm", good=rows.id_row),
            bad_row(rows.ids([1, rows.VOCAB_SIZE, 1]), str(rows.VOCAB_SIZE)),
        ),
    ),
    Fault(
        32,
        "label out of range",
        "row 13 of a script of one's own",
        "row number, before step 1",
        bad_row(rows.LABEL_OUT_OF_RANGE, "label"),
    ),
    Fault(
        33,
        "row longer than the model's positions",
        "row 13 of a script of one's own",
        "row number, before step 1",
        bad_row(rows.ROW_TOO_LONG, str(rows.POSITIONS)),
    ),
    Fault(
        34,
        "empty or ragged row",
        "row 13 of a script of one's own: no ids; fewer labels than ids",
        "row number, before step 1",
        several(bad_row(rows.EMPTY_ROW), bad_row(rows.RAGGED_ROW)),
    ),
    Fault(
        35,
        "no padding token",
        "tokenizer without one",
        "works; end of text is still learned",
        padding_token(None),
    ),
    Fault(
        36,
        "padding token = end token",
        "tokenizer with both the same",
        "works; end of text is still learned",
        padding_token(rows.END_OF_TEXT),
    ),
    Fault(
        37,
        "broken JSONL",
        "line of row 13 cut off",
        "row number, quarantine counted",
        bad_row(BROKEN_LINE, script="clm", good=rows.text_row),
    ),
    Fault(
        38,
        "bad UTF-8",
        "two bytes in row 13",
        "row number, quarantine counted",
        bad_row(BAD_BYTES, script="clm", good=rows.text_row),
    ),
    Fault(
        39,
        "type drift; corrupt image",
        "text of row 13 a number; image of row 13 cut off",
        "row number, quarantine counted",
        several(bad_row({"text": 13}, script="clm", good=rows.text_row), rows.corrupt_image),
    ),
    Fault(
        40,
        "hostile checkpoint",
        "pickles that run code, ../ shard, link, zip bombs; each with a manifest that agrees",
        "refused, nothing executed",
        checkpoint_damage.hostile_checkpoint,
    ),
)


def grade(fault: Fault, lab: Lab) -> Outcome:
    """Inject a fault and say what became of the run. What the harness needs and does not find counts as lost."""
    start = time.perf_counter()
    try:
        words, survived = fault.inject(lab), True
    except Lost as loss:
        words, survived = str(loss), False
    except OSError as error:
        words, survived = f"could not be injected: {error}", False
    seconds, words = round(time.perf_counter() - start, 1), words.replace(f"{lab.root}/", "")
    return Outcome(fault.number, fault.title, fault.how, fault.want, words, survived, seconds)
