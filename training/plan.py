"""What a training step needs of each GPU, on paper: memory, time and communication of every way to divide the work.

Examples:
  # GPT-2 on one H100, the batch of the scripts
  python -m training.plan --model gpt2

  # GPT-2 XL on eight A100, rows of 1,024 tokens
  python -m training.plan --model gpt2-xl --gpus 8 --gpu a100 --batch_size 4 --length 1024

  # a saved model on another machine: memory in GB, peak in TFLOP/s, link of one GPU in GB/s and direction
  python -m training.plan --model runs/clm --gpus 4 --memory 24 --tflops 121 --bandwidth 32

  # two nodes, one way to divide, everything in a file
  python -m training.plan --model gpt2-xl --gpus 16 --strategy fsdp --json plan.json

Memory is what PyTorch holds at the fullest moment of a step, within 10% of what was counted on processors
(tests/test_plan.py); no GPU was measured. The CUDA context, the libraries' workspaces and fragmentation come out of
--reserve. Time is floating-point work at --share of the peak, and bytes at the link's whole rate; reading data, saving
and the optimizer's update are not counted.
"""

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_custom.inspection import (
    BFLOAT16,
    FLOAT32,
    MASKED_SHARE,
    activation_bytes,
    build_empty,
    memory_table,
    readable,
)
from hf_custom.loading import load_config
from hf_custom.presets import PRESETS, preset_config
from training.args import user_errors


@dataclass(frozen=True)
class Device:
    """An accelerator as its vendor's data sheet has it.

    Attributes:
        memory: GB, of 10^9 bytes.
        bfloat16, float32: peak of dense products, TFLOP/s. The first is half of what a sheet gives "with sparsity"; the
            second is without TF32, which torch leaves off.
        link: GB/s from one device to another of the same machine in one direction, half of what a sheet gives for both.
    """

    memory: float
    bfloat16: float
    float32: float
    link: float


# NVIDIA's and AMD's data sheets of A100 (80 GB and 40 GB SXM), H100 SXM, H200 SXM, HGX B200, L4, L40S, A10 and
# Instinct MI300X. Cards without NVLink have the rate of PCIe 4.0 x16.
DEVICES = {
    "a10": Device(24, 125, 31.2, 32),
    "a100": Device(80, 312, 19.5, 300),
    "a100-40gb": Device(40, 312, 19.5, 300),
    "b200": Device(180, 2250, 75, 900),
    "h100": Device(80, 989, 67, 450),
    "h200": Device(141, 989, 67, 450),
    "l4": Device(24, 121, 30.3, 32),
    "l40s": Device(48, 362, 91.6, 32),
    "mi300x": Device(192, 1307, 163.4, 448),
}
# Between machines: one 400 Gbit/s adapter a GPU (NVIDIA's data sheets of DGX H100 and DGX B200).
NETWORK = 50.0
GPUS_OF_A_MACHINE = 8
# Of the peak, in useful work: Chowdhery et al. 2022, table 3, report 0.46 for PaLM and 0.21 to 0.33 for older models.
SHARE = 0.4
# Kept free for the CUDA context, workspaces and fragmentation.
RESERVE = 0.1
MOST_ROWS = 1 << 16


@dataclass(frozen=True)
class Strategy:
    """A way to divide a step.

    Attributes:
        config: file for `accelerate launch`; `None` for one process.
        is_sharded: weights, gradients and optimizer state are divided, each block gathered when it runs and let go
            behind it (FSDP2 with `reshard_after_forward`, ZeRO stage 3).
        is_checkpointed: blocks keep their input alone and compute the rest again in the backward pass.
    """

    title: str
    config: str | None = None
    is_sharded: bool = False
    is_checkpointed: bool = False


STRATEGIES = {
    "one": Strategy("one GPU"),
    "one-checkpointing": Strategy("one GPU, activation checkpointing", is_checkpointed=True),
    "ddp": Strategy("DDP", "ddp"),
    "ddp-checkpointing": Strategy("DDP, activation checkpointing", "ddp", is_checkpointed=True),
    "fsdp": Strategy("FSDP2 / ZeRO-3", "fsdp2", is_sharded=True),
    "fsdp-checkpointing": Strategy("FSDP2 / ZeRO-3, activation checkpointing", "fsdp2", True, True),
}
# Script and the name of its length argument, by the end of the name of a model class.
SCRIPTS = {
    "ForCausalLM": ("run_clm", "block_size"),
    "ForMaskedLM": ("run_mlm", "block_size"),
    "ForSequenceClassification": ("run_classification", "max_length"),
    "ForTokenClassification": ("run_token_classification", "max_length"),
    "ForQuestionAnswering": ("run_qa", "max_length"),
}
# What is trained where a configuration names no class with a loss.
DEFAULT_CLASSES = {"custom_gpt2": "CustomGPT2ForCausalLM", "custom_bert": "CustomBertForMaskedLM"}


@dataclass(frozen=True)
class Work:
    """One step of one GPU: rows and tokens of a micro-batch, how many of these, and the type of products."""

    batch_size: int = 8
    length: int = 1024
    accumulation: int = 1
    is_bfloat16: bool = True
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length

    @property
    def itemsize(self) -> int:
        return 2 if self.is_bfloat16 else 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. The parts are each at their largest and not all at one time, so `peak` is below their sum.

    Attributes:
        buffers: what the strategy adds (gathered blocks, buckets), copies that autocast makes, and states that a
            backward pass works on.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    buffers: int
    peak: int


@dataclass(frozen=True)
class Estimate:
    """One strategy.

    Attributes:
        sent_bytes: that each GPU sends in a step; as many come in.
        step_seconds: with communication hidden behind computation as far as it goes; `seconds_without_overlap` is the
            other bound.
        largest_batch: rows of a micro-batch that fit; 0 for none.
    """

    strategy: str
    memory: Memory
    fits: bool
    largest_batch: int
    flops: float
    compute_seconds: float
    sent_bytes: int
    communication_seconds: float
    step_seconds: float
    seconds_without_overlap: float
    tokens_per_second: float
    command: str


class ModelSizes:
    """Sizes of a model that planning reads, counted on the meta device.

    Raises:
        ValueError: for an architecture without a formula of its activations.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.model = build_empty(config)
        self.parameters = _count(self.model.parameters())
        blocks = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if activation_bytes(self.model, 1, 8) is None or not blocks:
            raise ValueError(
                f"{type(self.model).__name__} has no formula for what a step keeps. "
                "Plan a GPT-2 or a BERT that reads text, without relative positions."
            )
        self.block_class = type(blocks[0]).__name__
        self.layers = len(blocks)
        self.block = max(_count(block.parameters()) for block in blocks)
        # The widest states inside a block: the feed-forward layer's, or queries, keys and values in one.
        self.widest = max(max(weight.shape) for weight in blocks[0].parameters() if weight.dim() == 2)
        self.width = config.hidden_size

    @cached_property
    def head(self) -> int:
        """Numbers in the projection to the vocabulary; 0 without one."""
        output = self.model.get_output_embeddings()
        return 0 if output is None else output.weight.numel()

    @cached_property
    def tables(self) -> int:
        """Numbers in tables of embeddings, from which rows are taken, that are not the projection too."""
        tied = self.model.get_output_embeddings()
        tables = [module.weight for module in self.model.modules() if isinstance(module, nn.Embedding)]
        return sum(table.numel() for table in tables if tied is None or table is not tied.weight)

    @cached_property
    def has_shared_bias(self) -> bool:
        """Whether the projection's bias has a second name elsewhere, as in a masked BERT. Accelerate's FSDP2 puts the
        two into different groups, which torch 2.13 refuses."""
        output = self.model.get_output_embeddings()
        bias = getattr(output, "bias", None)
        parameters = (parameter for _, parameter in self.model.named_parameters(remove_duplicate=False))
        return bias is not None and sum(parameter is bias for parameter in parameters) > 1

    @cached_property
    def _shallow(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The same with one layer and with two."""
        found = []
        for layers in (1, 2):
            config = copy.deepcopy(self.config)
            config.num_hidden_layers = layers
            found.append(build_empty(config))
        return tuple(found)

    def layer_activations(self, work: Work) -> int:
        """Bytes that one block keeps: what a model of two keeps more than a model of one."""
        one, two = (
            activation_bytes(model, work.batch_size, work.length, work.is_bfloat16, work.device)
            for model in self._shallow
        )
        return two - one

    def parts(self, work: Work) -> dict[str, int]:
        """Bytes of training on one GPU by part, from `memory_table`."""
        rows = memory_table(self.model, batch_size=work.batch_size, length=work.length, device=work.device)
        use = BFLOAT16 if work.is_bfloat16 else FLOAT32
        return {row.part: row.bytes for row in rows if row.use == use}


def _count(tensors: Iterable) -> int:
    return sum(tensor.numel() for tensor in tensors)


# --- Memory ---


def memory(sizes: ModelSizes, strategy: Strategy, gpus: int, work: Work) -> Memory:
    """Bytes of one GPU in a step after the first, and the fullest moment of it.

    Weights, gradients, AdamW, kept activations and logits are those of `hf_custom.inspection.memory_table`. Four
    moments can be the fullest; at each, what is there beside weights and optimizer state:

        in the loss: all activations; the head's gradient, its product and a chunk of logits
        first block of the backward pass: all activations, the head's gradient, the block's states
        last block of it: that block's activations, the gradients of all others, the block's states
        at its end: all gradients, and that of the table of tokens, which a tied head adds to its own

    The states of a block on the way back are three of its widest and one of its width. Under accumulation gradients
    are there from the second micro-batch on, through all four.

    DDP holds each gradient once more, in the bucket that is sent (`gradient_as_bucket_view` is off in Accelerate).
    Sharding divides weights, gradients and optimizer state by the number of GPUs (Rajbhandari et al. 2020, "ZeRO",
    section 5) and holds in the type of products what is outside the blocks, two blocks (that at work and the next,
    which comes meanwhile) and on the way back a block's gradients twice, whole and in the order to divide. ZeRO-3 of
    DeepSpeed has besides the buckets that its own configuration sets.
    """
    parts, size = sizes.parts(work), work.itemsize
    sharded, divisor = strategy.is_sharded, gpus if strategy.is_sharded else 1
    layer, activations = _activations(sizes, strategy, work, parts["activations"])

    weights, optimizer, gradients = (-(-parts[name] // divisor) for name in ("weights", "AdamW", "gradients"))
    head = 4 * sizes.head
    states = work.tokens * size * (3 * sizes.widest + sizes.width)
    loss = parts.get("logits of the loss", 0)
    loss += loss // 2 * work.is_bfloat16 + (size * sizes.head * (1 + work.is_bfloat16) if work.device == "cuda" else 0)
    gathered = size * (sizes.parameters - sizes.layers * sizes.block + 2 * sizes.block) if sharded else 0
    buckets = parts["gradients"] if strategy.config == "ddp" and not sharded else 0
    copies = 0 if sharded else parts.get("copies of weights", 0)
    # Sharded gradients are divided at the last micro-batch alone, and whole until then.
    is_repeated = work.accumulation > 1
    held = is_repeated * (size * sizes.parameters if sharded else gradients)
    # Sharded, what was divided of one block is there until the next is divided, when the states have gone; that one's
    # own gradients are among those held, where any are.
    block = size * sizes.block if sharded else 0
    way_back = max(states + block, block * (1 if is_repeated else 2)) + gathered

    blocks = (sizes.layers - 1) * 4 * sizes.block // divisor
    last_layer = layer + (activations // sizes.layers if strategy.is_checkpointed else 0)
    moments = (
        held + activations + head + loss + gathered + copies,
        held + activations + (layer if strategy.is_checkpointed else 0) + head + copies + states + gathered,
        max(held, blocks) + last_layer + head + copies // sizes.layers + way_back,
        max(held, gradients) + head * (1 + is_repeated) + gathered,
    )
    return Memory(
        weights,
        max(held, gradients),
        optimizer,
        activations + (layer if strategy.is_checkpointed else 0),
        head + loss,
        way_back + buckets + copies,
        weights + optimizer + buckets + max(moments),
    )


def _activations(sizes, strategy, work, total):
    """Bytes that a block keeps, and what is kept of the whole forward pass."""
    layer = sizes.layer_activations(work)
    if strategy.is_sharded and work.is_bfloat16 and sizes.config.model_type == "custom_gpt2":
        # FSDP2 gathers tables and norms in bfloat16 too, and so is GPT-2's residual stream: two inputs of norms.
        layer -= 2 * 2 * work.tokens * sizes.width
        total -= 2 * 2 * work.tokens * sizes.width * sizes.layers
    if strategy.is_checkpointed:
        total -= sizes.layers * (layer - 4 * work.tokens * sizes.width)
    return layer, total


# --- Time ---


def model_flops(sizes: ModelSizes, work: Work) -> float:
    """Operations of a step on one GPU: 6 a parameter and token (Kaplan et al. 2020, "Scaling Laws", section 2.1), and
    12 · L · D · T a token for attention (Chowdhery et al. 2022, "PaLM", appendix B, all T² scores counted).

    A table's rows are taken, not multiplied, so that it does not count; the vocabulary's projection counts for the
    tokens with a label.
    """
    inside = sizes.parameters - sizes.tables - sizes.head
    labelled = 1.0 if sizes.model.can_generate() else MASKED_SHARE
    each = 6 * (inside + labelled * sizes.head) + 12 * sizes.layers * sizes.width * work.length
    return float(each * work.tokens * work.accumulation)


def sent_bytes(sizes: ModelSizes, strategy: Strategy, gpus: int, work: Work) -> tuple[int, int]:
    """Bytes that each GPU sends in the forward passes of a step, and in the backward passes.

    DDP: a ring all-reduce of the float32 gradients, 2 · (N - 1) / N of them (Rajbhandari et al. 2020, section 7.1),
    once a step. Sharded: gathering takes (N - 1) / N of the weights and dividing the gradients as much (section 7.2),
    in the type of products. Blocks are gathered in each direction, what is outside them once, and gradients divided at
    the last micro-batch.
    """
    if gpus == 1:
        return 0, 0
    share, size = (gpus - 1) / gpus, work.itemsize
    if not strategy.is_sharded:
        return 0, round(2 * share * 4 * sizes.parameters)
    blocks = sizes.layers * sizes.block
    forward = work.accumulation * share * size * sizes.parameters
    backward = work.accumulation * share * size * blocks + share * size * sizes.parameters
    return round(forward), round(backward)


def estimate(
    name: str,
    sizes: ModelSizes,
    gpus: int,
    work: Work,
    device: Device,
    *,
    share: float = SHARE,
    reserve: float = RESERVE,
    network: float = NETWORK,
    gpus_of_a_machine: int = GPUS_OF_A_MACHINE,
    source: tuple[str, str] = ("--model_name_or_path", "MODEL"),
) -> Estimate:
    """One strategy of `STRATEGIES` on so many GPUs.

    A third of the operations is in the forward pass. DDP sends behind the backward pass; sharding gathers behind both
    and divides behind the backward pass; the time of a pass is the larger of the two. Over several machines a ring goes
    at the rate of the network.

    Args:
        source: flag and value that tell a script the model, for the command.
    """
    strategy = STRATEGIES[name]
    used = 1 if strategy.config is None else gpus
    fits_in = partial(_fits, sizes, strategy, used, limit=(1 - reserve) * device.memory * 1e9)
    needed = memory(sizes, strategy, used, work)
    flops = model_flops(sizes, work)
    rate = share * 1e12 * (device.bfloat16 if work.is_bfloat16 else device.float32)
    forward, backward = flops / rate / 3, flops / rate * 2 / 3
    if strategy.is_checkpointed:
        backward += forward
    link = 1e9 * (network if used > gpus_of_a_machine else device.link)
    sent = sent_bytes(sizes, strategy, used, work)
    sending = [count / link for count in sent]
    seconds = max(forward, sending[0]) + max(backward, sending[1])
    return Estimate(
        name,
        needed,
        fits_in(work),
        _largest_batch(fits_in, work),
        flops,
        forward + backward,
        sum(sent),
        sum(sending),
        seconds,
        forward + backward + sum(sending),
        used * work.tokens * work.accumulation / seconds,
        launch_command(sizes, strategy, used, work, source, gpus_of_a_machine),
    )


def _fits(sizes, strategy, gpus, work, limit):
    return memory(sizes, strategy, gpus, work).peak <= limit


def _largest_batch(fits_in, work):
    """Rows of the largest micro-batch that fits, by halving."""
    low, high = 0, MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits_in(replace(work, batch_size=middle)) else (low, middle - 1)
    return low


def best(estimates: list[Estimate]) -> Estimate | None:
    """The fastest that fits, of equals the first, which is the plainest; `None` if none fits."""
    return min((found for found in estimates if found.fits), key=lambda found: found.step_seconds, default=None)


# --- What to run ---


def launch_command(
    sizes: ModelSizes,
    strategy: Strategy,
    gpus: int,
    work: Work,
    source: tuple[str, str],
    gpus_of_a_machine: int = GPUS_OF_A_MACHINE,
) -> str:
    """The command that trains so; on each of several machines it is given with its own --machine_rank."""
    name = type(sizes.model).__name__
    script, length = next((row for end, row in SCRIPTS.items() if name.endswith(end)), SCRIPTS["ForMaskedLM"])
    words = ["python"]
    if strategy.config is not None:
        is_zero = strategy.is_sharded and sizes.has_shared_bias
        config = "deepspeed_zero3" if is_zero else strategy.config
        words = ["accelerate", "launch", "--config_file", f"training/accelerate/{config}.yaml"]
        words += ["--num_processes", str(gpus)]
        if gpus > gpus_of_a_machine:
            machines = -(-gpus // gpus_of_a_machine)
            words += ["--num_machines", str(machines), "--machine_rank", "0"]
            words += ["--main_process_ip", "HOST", "--main_process_port", "29500"]
        if strategy.is_sharded and not is_zero:
            words += ["--fsdp_transformer_layer_cls_to_wrap", sizes.block_class]
    words += ["-m", f"training.{script}", *source]
    if source[0] == "--preset":
        words += ["--vocab_size", str(sizes.config.vocab_size)]
    words += ["--per_device_train_batch_size", str(work.batch_size), f"--{length}", str(work.length)]
    if work.accumulation > 1:
        words += ["--gradient_accumulation_steps", str(work.accumulation)]
    words += ["--bf16"] * work.is_bfloat16 + ["--gradient_checkpointing"] * strategy.is_checkpointed
    return shlex.join(words)


def find_model(name: str) -> tuple[PreTrainedConfig, tuple[str, str]]:
    """The configuration of a folder, a preset or a repository of the Hub, and the scripts' flag for it."""
    if name in PRESETS and not Path(name).is_dir():
        config, source = preset_config(name), ("--preset", name)
    else:
        config, source = load_config(name), ("--model_name_or_path", name)
    if not any(known.endswith(tuple(SCRIPTS)) or "LMHead" in known for known in config.architectures or ()):
        default = DEFAULT_CLASSES.get(config.model_type)
        config.architectures = config.architectures if default is None else [default]
    return config, source


# --- The command line ---


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m training.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="preset, folder of a saved model, or repository of the Hub")
    add("--gpus", type=int, default=1, help="how many (%(default)s)")
    add("--gpu", help=f"{', '.join(DEVICES)}; h100 when nothing is said")
    add("--memory", type=float, help="GB of a GPU, of 10^9 bytes, in place of the table's")
    add("--tflops", type=float, help="its peak in the type of --precision, TFLOP/s")
    add("--bandwidth", type=float, help="of its link to its neighbours, GB/s in one direction")
    add("--network", type=float, default=NETWORK, help="of one GPU between machines, GB/s (%(default)s)")
    add("--gpus_of_a_machine", type=int, default=GPUS_OF_A_MACHINE, help="beyond which a ring takes it (%(default)s)")
    add("--batch_size", type=int, default=8, help="rows of a GPU and micro-batch (%(default)s)")
    add("--length", type=int, help="tokens of a row; else as many as the model has positions")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of a step (%(default)s)")
    add("--precision", default="bfloat16", choices=("bfloat16", "float32"), help="type of products (%(default)s)")
    add("--strategy", nargs="+", choices=STRATEGIES, help="only these")
    add("--share", type=float, default=SHARE, help="of the peak that is reached (%(default)s)")
    add("--reserve", type=float, default=RESERVE, help="of the memory that is kept free (%(default)s)")
    add("--json", metavar="FILE", help="write all of it there")
    return parser


def choose_device(args: argparse.Namespace) -> Device:
    """The row of the table, with what flags say in its place."""
    given = {"memory": args.memory, "bandwidth": args.bandwidth, "tflops": args.tflops}
    for name, value in given.items():
        if value is not None and value <= 0:
            raise ValueError(f"--{name} is {value} but must be above 0.")
    if args.gpu is None and any(given.values()):
        missing = [name for name, value in given.items() if value is None and (name != "bandwidth" or args.gpus > 1)]
        if missing:
            raise ValueError(f"a GPU that is not in the table needs --{missing[0]} too. Give it, or name one by --gpu.")
    name = args.gpu or "h100"
    if name not in DEVICES:
        raise ValueError(f"--gpu {name} is not in the table: {', '.join(DEVICES)}. Or give --memory, --tflops.")
    device = DEVICES[name]
    peak = args.tflops or getattr(device, args.precision)
    return replace(
        device,
        memory=args.memory or device.memory,
        link=args.bandwidth or device.link,
        **{args.precision: peak},
    )


def _check(args: argparse.Namespace) -> None:
    for name in ("gpus", "batch_size", "gradient_accumulation_steps", "gpus_of_a_machine"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)} but must be at least 1.")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share is {args.share} but a share of the peak lies above 0 and up to 1.")
    if not 0 <= args.reserve < 1:
        raise ValueError(f"--reserve is {args.reserve} but a share to keep free lies from 0 to below 1.")
    if args.network <= 0:
        raise ValueError(f"--network is {args.network} but must be above 0.")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such folder. Make it first.")
    for name in args.strategy or ():
        if args.gpus == 1 and STRATEGIES[name].config is not None:
            raise ValueError(
                f"--strategy {name} divides work among GPUs, of which there is one. Pass --gpus 2 or more."
            )


def plan(args: argparse.Namespace) -> tuple[ModelSizes, Work, Device, list[Estimate]]:
    """What was asked for and an estimate for each strategy.

    Raises:
        OSError, ValueError: for a model that is not found or has no formula, or a size out of range.
    """
    _check(args)
    device = choose_device(args)
    config, source = find_model(args.model)
    sizes = ModelSizes(config)
    length = getattr(config, "max_position_embeddings", None) or 512 if args.length is None else args.length
    work = Work(args.batch_size, length, args.gradient_accumulation_steps, args.precision == "bfloat16")
    names = args.strategy or [name for name, row in STRATEGIES.items() if (row.config is None) == (args.gpus == 1)]
    options = {"share": args.share, "reserve": args.reserve, "network": args.network}
    options |= {"gpus_of_a_machine": args.gpus_of_a_machine, "source": source}
    return sizes, work, device, [estimate(name, sizes, args.gpus, work, device, **options) for name in names]


def describe(args: argparse.Namespace, sizes: ModelSizes, work: Work, device: Device, found: list[Estimate]) -> str:
    """The tables in words."""
    peak = getattr(device, args.precision)
    lines = [
        f"{args.model}: {type(sizes.model).__name__}, {sizes.parameters:,} parameters",
        f"{args.gpus} x {args.gpu or ('h100' if args.memory is None else 'GPU')}: {device.memory:g} GB, "
        f"{peak:g} TFLOP/s in {args.precision}, {device.link:g} GB/s to a neighbour",
        f"micro-batch of {work.batch_size} x {work.length} tokens a GPU, {work.accumulation} a step",
        "",
        f"Memory of a GPU (fits: the peak leaves {args.reserve:.0%} of it free; parts are not at one time)",
    ]
    parts = ("weights", "gradients", "optimizer", "activations", "loss", "buffers", "peak")
    rows = [("strategy", *parts, "fits", "largest batch")]
    for row in found:
        cells = [readable(getattr(row.memory, part)) for part in parts]
        rows.append((row.strategy, *cells, "yes" if row.fits else "no", str(row.largest_batch)))
    lines += _align(rows)
    lines += ["", f"Time of a step ({args.share:.0%} of the peak; from communication all hidden to none)"]
    rows = [("strategy", "computation", "sent by a GPU", "communication", "step", "tokens a second")]
    for row in found:
        step = f"{_duration(row.step_seconds)} to {_duration(row.seconds_without_overlap)}"
        times = (_duration(row.compute_seconds), readable(row.sent_bytes), _duration(row.communication_seconds), step)
        rows.append((row.strategy, *times, f"{row.tokens_per_second:,.0f}"))
    lines += _align(rows)
    chosen = best(found)
    if chosen is not None:
        lines += ["", f"Take {STRATEGIES[chosen.strategy].title}:", f"  {chosen.command}"]
    return "\n".join(lines)


def _align(rows):
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def as_record(args: argparse.Namespace, sizes: ModelSizes, work: Work, device: Device, found: list[Estimate]) -> dict:
    """The plan as JSON has it: numbers in bytes and seconds."""
    chosen = best(found)
    return {
        "model": args.model,
        "model_class": type(sizes.model).__name__,
        "parameters": sizes.parameters,
        "gpus": args.gpus,
        "device": asdict(device),
        "share_of_peak": args.share,
        "work": asdict(work),
        "strategies": [asdict(row) for row in found],
        "chosen": None if chosen is None else chosen.strategy,
    }


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with user_errors():
        sizes, work, device, found = plan(args)
        if args.json is not None:
            text = json.dumps(as_record(args, sizes, work, device, found), indent=2)
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    print(describe(args, sizes, work, device, found))
    if best(found) is None:
        least = min(found, key=lambda row: row.memory.peak)
        remedy = f"--batch_size {least.largest_batch}" if least.largest_batch else "more GPUs, or shorter rows"
        sys.exit(f"nothing fits; the least is {least.strategy} with {readable(least.memory.peak)}. Try {remedy}.")


if __name__ == "__main__":
    main()
