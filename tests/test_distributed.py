"""Two processes of one machine train as one process does with the joint batch: same script, same flags."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
# Without dropout, which draws other numbers in each process; and a batch for two to divide.
FLAGS = [
    "training/recipes/clm_smoke.yaml",
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
        "one": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
        "accelerate": [
            *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port),
            *("--config_file", "training/accelerate/ddp.yaml"),
        ],
    }


def train(launcher: str, batch_size: int, output_dir: Path) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses by step, final weights and number of processes of a run."""
    command = [*launchers()[launcher], "-m", "training.run_clm", *FLAGS]
    command += ["--per_device_train_batch_size", str(batch_size), "--output_dir", str(output_dir)]
    # One thread each: two processes share the cores, and so does the one that they are compared with.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
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
    return train("one", 4, tmp_path_factory.mktemp("one") / "out")


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_train_as_one(launcher, alone, tmp_path):
    losses, weights, processes = train(launcher, 2, tmp_path / "out")
    expected_losses, expected_weights, _ = alone
    assert processes == 2 and len(losses) == 6
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert losses[-1] < losses[0]
    for name, weight in expected_weights.items():
        assert torch.allclose(weights[name], weight, atol=1e-4), name
