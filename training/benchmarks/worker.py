"""One contender in a process of its own: builds its model, then works when it is told to.

Commands come a line each on the standard input, answers as a line of JSON on the standard output: `proof` saves what
the contender computes, so that it can be compared; `round` does the work and says how long it took; `memory` does it
once more and says how much memory it had at most.
"""

import json
import sys
import time

import torch

from training.benchmarks.measure import peak_memory, reset_peak, synchronize
from training.benchmarks.pairs import Caption, Pretrain
from training.benchmarks.translate import Translate
from training.benchmarks.workloads import Decode, Encode, Loss, Train, TrainMasked, Workload

WORKLOADS = {
    "train": Train,
    "mlm": TrainMasked,
    "encode": Encode,
    "sentences": Encode,
    "decode": Decode,
    "loss": Loss,
    "pretrain": Pretrain,
    "caption": Caption,
    "translate": Translate,
}


def answer(workload: Workload, command: str, spec: dict) -> dict:
    device = spec["device"]
    if command == "proof":
        path = f"{spec['proofs']}.pt"
        torch.save({name: tensor.cpu() for name, tensor in workload.proof().items()}, path)
        return {"path": path}
    if command == "memory":
        reset_peak(device)
    synchronize(device)
    start = time.perf_counter()
    workload.round()
    synchronize(device)
    elapsed = time.perf_counter() - start
    if command == "memory":
        return {"peak": peak_memory(device) - workload.start_memory, "process": peak_memory(device)}
    return {"seconds": elapsed}


def main() -> None:
    # The answers have the standard output for themselves.
    out, sys.stdout = sys.stdout, sys.stderr
    spec = json.loads(sys.stdin.readline())
    workload = WORKLOADS[spec["workload"]](spec)
    for command in sys.stdin:
        torch.manual_seed(0)
        print(json.dumps(answer(workload, command.strip(), spec)), file=out, flush=True)


if __name__ == "__main__":
    main()
