"""Two processes of one machine train as one process does with the joint batch: same script, same flags."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import assert_gradients_near, assert_near, gradients_of
from safetensors.torch import load_file
from tiny import MODELS
from torch.distributed.fsdp import fully_shard

from training import run_clm

ROOT = Path(__file__).parent.parent
# Without dropout, which draws other numbers in each process; and a batch for two to divide.
FLAGS = [
    str(ROOT / "training" / "recipes" / "clm_smoke.yaml"),
    *("--config_overrides", "n_embd=32,n_layer=2,n_head=2,resid_pdrop=0.0,embd_pdrop=0.0"),
    *("--max_steps", "6"),
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launchers() -> dict[str, list[str]]:
    port = str(free_port())
    return {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
        "accelerate": [
            *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port),
            *("--config_file", "training/accelerate/ddp.yaml"),
        ],
    }


def train(launcher: str, batch_size: int, output_dir: Path) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """The result of a run of several processes."""
    command = [*launchers()[launcher], "-m", "training.run_clm", *FLAGS, *flags_of(batch_size, output_dir)]
    # One thread each: two processes share the cores, and so does the one that they are compared with.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result_of(output_dir)


def flags_of(batch_size: int, output_dir: Path) -> list[str]:
    return ["--per_device_train_batch_size", str(batch_size), "--output_dir", str(output_dir)]


def result_of(output_dir: Path) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses by step, final weights and number of processes of the run that left a folder."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    card = (output_dir / "README.md").read_text()
    processes = next(int(line.split("|")[2]) for line in card.splitlines() if line.startswith("| processes |"))
    return (
        [entry["loss"] for entry in history if "loss" in entry],
        load_file(output_dir / "model.safetensors"),
        processes,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one") / "out"
    run_clm.main([*FLAGS, *flags_of(4, output_dir)])
    return result_of(output_dir)


# The second starts processes by the first.
@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "accelerate"])
def test_two_processes_train_as_one(launcher, alone, tmp_path):
    losses, weights, processes = train(launcher, 2, tmp_path / "out")
    expected_losses, expected_weights, _ = alone
    assert processes == 2 and len(losses) == 6
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert losses[-1] < losses[0]
    for name, weight in expected_weights.items():
        assert torch.allclose(weights[name], weight, atol=1e-4), name


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "head of its own"])
def test_sharded_weights_give_loss_and_gradients_of_whole_ones(is_tied, tmp_path):
    """FSDP2 gathers a weight for its module's call, so that a loss which reads the weight may find a shard."""
    model = MODELS[1].build(tie_word_embeddings=is_tied).train()
    inputs = MODELS[1].inputs(padding="right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = model(**inputs).loss
    expected_gradients = gradients_of(model, expected)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.transformer.h, *([] if is_tied else [model.lm_head]), model):
            fully_shard(part, mesh=mesh)
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    finally:
        torch.distributed.destroy_process_group()
    assert_near(loss, expected, 1e-6, scale_floor=0.0)
    assert_gradients_near(gradients, expected_gradients)
