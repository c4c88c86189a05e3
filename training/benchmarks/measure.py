"""What a machine can do and what a process took: rates to compare with, peak memory, medians."""

import platform
import resource
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch

MEGABYTE = 2**20


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work, device: str, repeats: int = 7) -> float:
    """Median time of `work()`, after two calls that warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def matrix_rates(device: str) -> dict[str, float]:
    """Best measured rate of a matrix product by type, in FLOP/s: of torch's own product and of oneDNN's on a CPU."""
    from hf_custom.matmul import times

    size = 8192 if device == "cuda" else 2048
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        fastest = min(seconds(lambda a=a, b=b: torch.mm(a, b), device), seconds(lambda a=a, b=b: times(a, b), device))
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / fastest
    return rates


def memory_bandwidth(device: str) -> float:
    """Bytes a second that a sum over an array far beyond the caches reads."""
    array = torch.ones(2**31 // 4 if device == "cuda" else 2**29 // 4, device=device)
    return array.nbytes / seconds(array.sum, device)


def machine(device: str) -> dict:
    """Device, threads, versions, and the rates that every result is compared with."""
    # Here, because stock's contenders read this file too and are to have nothing of the package in memory.
    from hf_custom.cards import processor

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "matrix_flops": matrix_rates(device),
        "bandwidth": memory_bandwidth(device),
    }


def memory_now(device: str) -> int:
    """Bytes in use: allocated on the GPU, or resident."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: str) -> None:
    """Forget the peak so far. A system that cannot forget it keeps the highest since the start."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field):
    """Bytes of a field of this process's status on Linux, else `None`."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == f"{field}:"), None)
