"""What a machine is and what it could do: its rates, measured in the same run as everything that is compared with them."""

import platform
import sys
import time
from typing import Any

import torch

from muonlab.bench.timing import milliseconds
from muonlab.errors import InputError
from muonlab.training.tracking import versions

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 operations per second that vendors state for a chip; the first name found in the device's name counts."""


def device_of(name: str) -> torch.device:
    """The device to measure on; InputError where torch does not see it."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise InputError(f"--device is {name!r}; known: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {name!r}; benchmarks run on cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda but torch sees no such device here; use cpu or auto")
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def stated_peak(name: str) -> float | None:
    """bf16 operations per second that the vendor states for a device of this name; None where that is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """What a reader of a result must know: the device, the versions, the commit, the command."""
    return {
        "device": device_name(device),
        "threads": threads,
        "stated_peak_flops": stated_peak(device_name(device)) if device.type == "cuda" else None,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["muonlab", *sys.argv[1:]]),
        "versions": versions(),
    }


def measure_rates(spec: dict[str, Any]) -> dict[str, float]:
    """Bytes per second of a large copy, read and write, and operations per second of a large product: bf16 on CUDA, fp32 on
    a CPU. spec: device, threads, quick."""
    device = torch.device(spec["device"])
    cuda = device.type == "cuda"
    torch.set_num_threads(spec["threads"])
    entries, side = (1 << 28, 8192) if cuda else (1 << 24, 1024)
    if spec.get("quick"):
        entries, side = entries >> 4, side // 4
    source = torch.randn(entries, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device, 10)["alone_ms"]["median"]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    product = milliseconds(lambda: a @ b, device, 10)["alone_ms"]["median"]
    return {
        "copy_bytes_per_second": 8 * entries / copy * 1e3,
        "matmul_flops_per_second": 2 * side**3 / product * 1e3,
        "copied_bytes": 8 * entries,
        "matmul_side": side,
    }
