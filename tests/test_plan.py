"""What the plan says a step holds and sends is what a step holds and sends, counted while one runs."""

import json
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import launch_command_parser
from tiny import BERT, GPT2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import hf_custom
from hf_custom.inspection import memory_table
from hf_custom.presets import PRESETS
from training import plan, run_clm, run_mlm
from training.args import parse_arguments
from training.plan import DEVICES, STRATEGIES, ModelSizes, Work, best, estimate, memory, model_flops, sent_bytes

# Of the measured peak, below the 10% that the plan promises, so that a part left out is seen. Not to be widened.
TOLERANCE = 0.07
# A few million parameters, so that they, and the states of a few hundred tokens, are both seen.
GPT2_MINI = hf_custom.CustomGPT2Config(
    vocab_size=1024, n_positions=256, n_embd=256, n_layer=4, n_head=4, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
)
BERT_MINI = hf_custom.CustomBertConfig(**PRESETS["bert-mini"][1])
GPT2_MINI.architectures, BERT_MINI.architectures = ["CustomGPT2ForCausalLM"], ["CustomBertForMaskedLM"]
SIZES, BERT_SIZES = ModelSizes(GPT2_MINI), ModelSizes(BERT_MINI)
MINI = plan.find_model("gpt2-mini")[0]
STEPS = 2
SLOW = pytest.mark.slow
ROOT = Path(__file__).parent.parent


class Traffic(TorchDispatchMode):
    """Bytes that collectives were given and gave, by name."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name, *_ = str(function).split(".")
        if namespace == "c10d":
            sizes = [sum(t.numel() * t.itemsize for t in _tensors(value)) for value in args[:2]]
            self.bytes[name] = self.bytes.get(name, 0) + max(sizes)
        return function(*args, **(kwargs or {}))


def _tensors(value):
    return [value] if isinstance(value, torch.Tensor) else value if isinstance(value, list) else []


def divide(model, kind, work):
    """The model as Accelerate would wrap it, in a group whose other processes are not there."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if work.is_bfloat16:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, output_dtype=torch.bfloat16)
    for block in model.transformer.h:
        fully_shard(block, reshard_after_forward=True, **options)
    tail = [model.transformer.ln_f, model.get_input_embeddings(), model.get_output_embeddings()]
    fully_shard(tail, reshard_after_forward=False, **options)
    return fully_shard(model, **options)


def step(model, optimizer, batch, work):
    """A training step as Trainer does it: micro-batches that send once, update, gradients let go."""
    for i in range(work.accumulation):
        is_last = i == work.accumulation - 1
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(is_last)
        waits = model.no_sync() if hasattr(model, "no_sync") and not is_last else nullcontext()
        with waits, torch.autocast("cpu", torch.bfloat16, enabled=work.is_bfloat16):
            loss = model(**batch).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(config, strategy, work, kind=None):
    """Peak of live bytes in a step after the first, and the traffic of it, counted by torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model = getattr(hf_custom, config.architectures[0])(config).train()
        if strategy.is_checkpointed:
            model.gradient_checkpointing_enable()
        wrapped = model if kind is None else divide(model, kind, work)
        # Without `foreach`, which the fused update of a GPU does not need: it holds copies.
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids = torch.randint(0, config.vocab_size, (work.batch_size, work.length))
        labels = ids.clone()
        if not model.can_generate():
            is_masked = torch.arange(work.length) % 20 < 3
            labels = labels.masked_fill(~is_masked, -100)
        for _ in range(STEPS):
            with record_function("step"), Traffic() as traffic:
                step(wrapped, optimizer, {"input_ids": ids, "labels": labels}, work)
    events = profiler.profiler.kineto_results.events()
    start = max(event.start_ns() for event in events if event.name() == "step")
    live = peak = 0
    for moment, count in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += count
        peak = max(peak, live) if moment >= start else peak
    return peak, traffic.bytes


@pytest.fixture
def group(request):
    """A process group of this process alone, for DDP, or of four of which three are not there."""
    if request.param == "ddp":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield request.param
    dist.destroy_process_group()


def on_cpu(**fields):
    return Work(**{"device": "cpu", "is_bfloat16": False, **fields})


# --- Memory ---


@pytest.mark.parametrize(
    ("config", "name", "work"),
    [
        pytest.param(GPT2_MINI, "one", on_cpu(batch_size=4, length=128), id="gpt2"),
        pytest.param(GPT2_MINI, "one", on_cpu(batch_size=1, length=192, accumulation=2), id="gpt2-accumulation"),
        pytest.param(BERT_MINI, "one", on_cpu(batch_size=1, length=128), id="bert"),
        pytest.param(GPT2_MINI, "one", on_cpu(batch_size=1, length=32), id="gpt2-few", marks=SLOW),
        pytest.param(GPT2_MINI, "one", on_cpu(batch_size=4, length=128, is_bfloat16=True), id="bf16", marks=SLOW),
        pytest.param(GPT2_MINI, "one-checkpointing", on_cpu(batch_size=4, length=128), id="checkpointing", marks=SLOW),
        pytest.param(BERT_MINI, "one", on_cpu(batch_size=4, length=256), id="bert-more", marks=SLOW),
        pytest.param(BERT_MINI, "one-checkpointing", on_cpu(batch_size=4, length=128), id="bert-check", marks=SLOW),
    ],
)
def test_peak_is_what_a_step_holds(config, name, work):
    strategy = STRATEGIES[name]
    measured, _ = measure(config, strategy, work)
    assert memory(ModelSizes(config), strategy, 1, work).peak == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("group", "name", "work"),
    [
        ("fsdp", "fsdp", on_cpu(batch_size=1, length=32, accumulation=2)),
        pytest.param("ddp", "ddp", on_cpu(batch_size=2, length=128), marks=SLOW),
        pytest.param("fsdp", "fsdp", on_cpu(batch_size=1, length=32), marks=SLOW),
        pytest.param("fsdp", "fsdp", on_cpu(batch_size=4, length=128), marks=SLOW),
        pytest.param("fsdp", "fsdp", on_cpu(batch_size=4, length=128, is_bfloat16=True), marks=SLOW),
        pytest.param("fsdp", "fsdp-checkpointing", on_cpu(batch_size=4, length=128), marks=SLOW),
    ],
    indirect=["group"],
)
def test_divided_work_holds_and_sends_what_is_said(group, name, work):
    """Memory of one of four, and the bytes that its collectives handled: of a gathering and of a division it sends all
    but its own quarter, in a ring all-reduce twice that."""
    strategy, sizes, gpus = STRATEGIES[name], ModelSizes(GPT2_MINI), 4
    measured, traffic = measure(GPT2_MINI, strategy, work, group)
    assert memory(sizes, strategy, gpus, work).peak == pytest.approx(measured, rel=TOLERANCE)
    sent = sum(sent_bytes(sizes, strategy, gpus, work))
    if group == "ddp":
        assert sent == 2 * traffic["allreduce_"] * 3 // 4
    else:
        # FSDP2 may fetch what is outside the blocks once more, ahead of a use that does not come.
        more = work.itemsize * (sizes.parameters - sizes.layers * sizes.block)
        counted = (traffic["_allgather_base_"] + traffic["_reduce_scatter_base_"]) * 3 // 4
        assert sent <= counted <= sent + more


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_parts_are_those_of_inspection(precision):
    work = Work(2, 64, is_bfloat16=precision == "bfloat16")
    rows = memory_table(GPT2_MINI, batch_size=2, length=64, device="cuda")
    of = {row.part: row.bytes for row in rows if row.use.endswith(precision)}
    alone, divided = (memory(SIZES, STRATEGIES[name], 8, work) for name in ("ddp", "fsdp"))
    assert (alone.weights, alone.gradients, alone.optimizer) == (of["weights"], of["gradients"], of["AdamW"])
    assert alone.activations == of["activations"]
    assert [8 * part for part in (divided.weights, divided.gradients, divided.optimizer)] == pytest.approx(
        [of["weights"], of["gradients"], of["AdamW"]], rel=1e-5
    )
    assert alone.loss >= of["logits of the loss"] + 4 * GPT2_MINI.vocab_size * GPT2_MINI.n_embd
    assert (
        divided.peak
        < alone.peak
        <= sum((alone.weights, alone.optimizer, alone.gradients)) + sum((alone.activations, alone.loss, alone.buffers))
    )


def test_more_of_anything_takes_more_and_sharding_and_checkpointing_take_less():
    def peak(name, gpus=8, **fields):
        return memory(SIZES, STRATEGIES[name], gpus, replace(Work(8, 128), **fields)).peak

    assert peak("ddp") > peak("fsdp") > peak("fsdp", gpus=16) and peak("ddp") == peak("ddp", gpus=2)
    assert peak("one") < peak("ddp")
    for name in STRATEGIES:
        assert peak(name) < peak(name, batch_size=16) and peak(name) < peak(name, length=256)
        assert peak(name) <= peak(name, accumulation=2) == peak(name, accumulation=4)
        if not name.endswith("checkpointing"):
            assert peak(f"{name}-checkpointing") < peak(name)


# --- Time ---


def test_flops_of_gpt2_are_the_papers():
    """6 operations a parameter and token without the table of positions, 12 · L · D · T for attention: of 124M and
    1,024 tokens 0.855 GFLOP a token, by hand."""
    config = hf_custom.CustomGPT2Config(architectures=["GPT2LMHeadModel"])
    each = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert model_flops(ModelSizes(config), Work(2, 1024)) == 2 * 1024 * each
    assert model_flops(ModelSizes(config), Work(2, 1024, accumulation=3)) == 6 * 1024 * each


def test_flops_of_a_masked_model_count_its_head_for_masked_tokens():
    head = 1024 * 256
    outside = head + (256 + 2) * 256
    each = 6 * (BERT_SIZES.parameters - outside + 0.15 * head) + 12 * 4 * 256 * 100
    assert model_flops(BERT_SIZES, Work(1, 100)) == pytest.approx(100 * each, rel=1e-12)


def test_time_is_operations_over_rate_and_bytes_over_link():
    work, device = Work(4, 128), replace(DEVICES["a100"], link=1e-3)
    options = {"share": 0.5, "gpus_of_a_machine": 4}
    found = {name: estimate(name, SIZES, 4, work, device, **options) for name in STRATEGIES}
    seconds = model_flops(SIZES, work) / 156e12
    assert found["one"].step_seconds == found["one"].seconds_without_overlap == pytest.approx(seconds)
    assert found["one-checkpointing"].step_seconds == pytest.approx(seconds * 4 / 3)
    ddp, fsdp = found["ddp"], found["fsdp"]
    # The link is so slow that it decides: DDP sends behind the backward pass, sharding behind both.
    assert ddp.communication_seconds == pytest.approx(2 * 0.75 * 4 * SIZES.parameters / 1e6)
    assert ddp.step_seconds == pytest.approx(seconds / 3 + ddp.communication_seconds)
    assert fsdp.step_seconds == pytest.approx(fsdp.communication_seconds)
    assert ddp.seconds_without_overlap == pytest.approx(seconds + ddp.communication_seconds)
    assert ddp.tokens_per_second == pytest.approx(4 * 4 * 128 / ddp.step_seconds)
    # Over two machines it is the network that decides.
    far = estimate("ddp", SIZES, 8, work, device, network=2e-3, **options)
    assert far.communication_seconds == pytest.approx(2 * 7 / 8 * 4 * SIZES.parameters / 2e6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_largest_batch_fits_and_one_more_does_not(name):
    device = replace(DEVICES["l4"], memory=0.3)
    rows = estimate(name, SIZES, 8, Work(8, 128), device).largest_batch
    assert rows > 1
    for batch_size, fits in ((rows, True), (rows + 1, False)):
        found = estimate(name, SIZES, 8, Work(batch_size, 128), device)
        assert found.fits is fits and (found.memory.peak <= 0.9 * 0.3e9) is fits


def test_best_is_the_fastest_that_fits_and_of_equals_the_plainest():
    found = [estimate(name, SIZES, 8, Work(8, 128), DEVICES["h100"]) for name in ("ddp", "fsdp", "ddp-checkpointing")]
    fast = [replace(row, step_seconds=seconds) for row, seconds in zip(found, (2.0, 1.0, 1.0), strict=True)]
    assert best(fast).strategy == "fsdp"
    assert best([fast[0], replace(fast[1], fits=False), fast[2]]).strategy == "ddp-checkpointing"
    assert best([replace(row, fits=False) for row in fast]) is None


def test_devices_are_plausible():
    for name, device in DEVICES.items():
        assert 20 <= device.memory <= 200 and 100 <= device.bfloat16 <= 2500 and 30 <= device.link <= 900, name
        assert device.float32 < device.bfloat16 / 3


# --- The command ---


def run(capsys, *argv):
    plan.main(list(argv))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "script"),
    [
        (["--model", "gpt2-mini", "--gradient_accumulation_steps", "2"], run_clm),
        (["--model", "bert-mini", "--gpus", "4", "--length", "64", "--precision", "float32"], run_mlm),
        (["--model", "gpt2", "--gpus", "16", "--strategy", "fsdp-checkpointing"], run_clm),
    ],
)
def test_command_is_understood(argv, script, capsys):
    args = plan.build_parser().parse_args(argv)
    words = shlex.split(run(capsys, *argv).splitlines()[-1])
    if args.gpus > 1:
        launcher = launch_command_parser().parse_args(words[2:])
        assert launcher.num_processes == args.gpus and (ROOT / launcher.config_file).is_file()
        assert launcher.num_machines == (2 if args.gpus == 16 else None)
        assert launcher.fsdp_transformer_layer_cls_to_wrap == ("CustomGPT2Block" if args.gpus == 16 else None)
        name, rest = launcher.training_script, launcher.training_script_args
    else:
        assert words[:2] == ["python", "-m"]
        name, rest = words[2], words[3:]
    assert name == script.__name__
    # A processor has no bfloat16 by Trainer's own check of the machine.
    rest = [word for word in rest if word != "--bf16"]
    model, data, *_, training = parse_arguments(script.ARGUMENTS, [*rest, "--use_cpu"], "")
    config, _ = plan.find_model(args.model)
    assert (model.preset, model.vocab_size) == (args.model, config.vocab_size)
    assert data.block_size == (args.length or config.max_position_embeddings)
    assert training.per_device_train_batch_size == 8
    assert training.gradient_accumulation_steps == args.gradient_accumulation_steps
    assert training.gradient_checkpointing == (args.strategy is not None)


def test_masked_model_is_sharded_by_deepspeed(capsys):
    """Because Accelerate's grouping of FSDP2 is refused; should it once be accepted, the plan may take it."""
    argv = ["--model", "bert-mini", "--gpus", "4", "--strategy", "fsdp"]
    launcher = launch_command_parser().parse_args(shlex.split(run(capsys, *argv).splitlines()[-1])[2:])
    assert launcher.config_file.endswith("deepspeed_zero3.yaml") and (ROOT / launcher.config_file).is_file()
    assert launcher.fsdp_transformer_layer_cls_to_wrap is None and launcher.training_script == "training.run_mlm"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        options = {"mesh": init_device_mesh("cpu", (4,))}
        model = hf_custom.CustomBertForMaskedLM(hf_custom.CustomBertConfig(**BERT))
        fully_shard([model.get_input_embeddings(), model.get_output_embeddings()], **options)
        fully_shard(model, **options)
        ids = torch.zeros(1, 4, dtype=torch.long)
        with pytest.raises(ValueError, match="bias' is shared with a parameter"):
            model(input_ids=ids, labels=ids)
    finally:
        dist.destroy_process_group()


def test_plan_names_every_strategy_and_writes_them(capsys, tmp_path):
    out = run(capsys, "--model", "gpt2-mini", "--gpus", "8", "--gpu", "a100", "--json", str(tmp_path / "plan.json"))
    record = json.loads((tmp_path / "plan.json").read_text())
    divided = [name for name, row in STRATEGIES.items() if row.config]
    assert [row["strategy"] for row in record["strategies"]] == divided and record["chosen"] == "ddp"
    for name in divided:
        assert sum(line.split()[0] == name for line in out.splitlines() if line) == 2
    assert record["device"]["memory"] == 80 and record["parameters"] == ModelSizes(MINI).parameters
    assert all(row["memory"]["peak"] > 0 and row["step_seconds"] > 0 for row in record["strategies"])


def test_saved_model_is_planned_from_its_folder(capsys, tmp_path):
    fields = {**GPT2, "n_layer": 2, "num_labels": 5}
    hf_custom.CustomGPT2ForSequenceClassification(hf_custom.CustomGPT2Config(**fields)).save_pretrained(tmp_path)
    out = run(capsys, "--model", str(tmp_path), "--length", "32")
    assert "CustomGPT2ForSequenceClassification" in out
    assert f"-m training.run_classification --model_name_or_path {tmp_path}" in out and "--max_length 32" in out
    hf_custom.CustomBertModel(hf_custom.CustomBertConfig(**BERT)).save_pretrained(tmp_path / "bare")
    assert "CustomBertForMaskedLM" in run(capsys, "--model", str(tmp_path / "bare"))


def test_what_does_not_fit_is_said_with_a_remedy(capsys):
    argv = ["--model", "gpt2-mini", "--memory", "0.2", "--tflops", "10", "--batch_size", "64"]
    with pytest.raises(SystemExit, match="nothing fits; the least is one-checkpointing .* Try --batch_size"):
        plan.main(argv)
    assert "no" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="more GPUs, or shorter rows"):
        plan.main([*argv[:3], "0.01", *argv[4:]])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model", "./nowhere"], "nowhere is no folder"),
        (["--model", "blip2-mini"], "has no formula"),
        (["--model", "gpt2-mini", "--length", "512"], "`length` is 512"),
        (["--model", "gpt2-mini", "--length", "0"], "`length` is 0"),
        (["--model", "gpt2-mini", "--gpus", "0"], "--gpus is 0"),
        (["--model", "gpt2-mini", "--gpu", "h900"], "h900 is not in the table"),
        (["--model", "gpt2-mini", "--memory", "24"], "needs --tflops too"),
        (["--model", "gpt2-mini", "--gpus", "2", "--memory", "24", "--tflops", "9"], "needs --bandwidth too"),
        (["--model", "gpt2-mini", "--tflops", "-1"], "--tflops is -1"),
        (["--model", "gpt2-mini", "--network", "0"], "--network is 0"),
        (["--model", "gpt2-mini", "--strategy", "ddp"], "--strategy ddp divides"),
        (["--model", "gpt2-mini", "--share", "1.5"], "--share is 1.5"),
        (["--model", "gpt2-mini", "--reserve", "1"], "--reserve is 1"),
        (["--model", "gpt2-mini", "--json", "no/such/folder/plan.json"], "there is no such folder"),
    ],
)
def test_mistake_is_one_line(argv, named):
    with pytest.raises(SystemExit, match=named) as end:
        plan.main(argv)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    text = capsys.readouterr().out
    assert text.count("python -m training.plan --model") == 4 and "--bandwidth" in text
