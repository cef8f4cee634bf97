"""Time and memory of `Muon.step()` on a GPU, beside its peers and the physical floor measured in the same run.

    python benchmarks/step_gpu.py --sets moe-79m qwen-0.5b llama-1b -o benchmarks/results/step_gpu.json

Hidden matrices only, fp32 parameters and gradients, 5 steps. Each step is timed in two ways: `alone`, waiting for the device
before and after (a host that is slower than the device shows), and `in a row`, 30 steps without waiting. `fresh` has other
gradient tensors and another learning rate at every step, as after `zero_grad(set_to_none=True)` under a scheduler.
"""

import argparse
import json
import statistics
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muonlab import Muon
from muonlab.optim import kernels
from muonlab.optim.coefficients import resolve

Shape = tuple[int, int]
SETS: dict[str, list[Shape]] = {
    "moe-79m": [(1536, 384)] * 48 + [(384, 1536)] * 48 + [(1152, 384)] * 6 + [(384, 384)] * 6 + [(8, 384)] * 6,
    "qwen-0.5b": [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)] * 24,
    "llama-1b": [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)] * 16,
}
STEPS = resolve("polar_express").steps


def parameters(shapes: Sequence[Shape], device: str) -> list[nn.Parameter]:
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


def timed(step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of one step: alone (median), of its host part alone, and in a row of `repeats`."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    alone, host = [], []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - began))
        end.record()
        torch.cuda.synchronize()
        alone.append(start.elapsed_time(end))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return {
        "alone_ms": statistics.median(alone),
        "host_ms": statistics.median(host),
        "in_a_row_ms": start.elapsed_time(end) / repeats,
    }


def ceilings() -> dict[str, float]:
    """Measured rates: a large copy in TB/s (read and written), an 8192^3 fp16 product in TFLOP/s."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), 10)["alone_ms"]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    product = timed(lambda: a @ a, 10)["alone_ms"]
    return {"copy_tbs": 8 * (1 << 28) / copy / 1e9, "product_tflops": 2 * 8192**3 / product / 1e9}


def floor_ms(shapes: Sequence[Shape], rates: dict[str, float]) -> float:
    """One pass over gradient, momentum and parameter (20 bytes an entry), and 6 m^2 n + 14 m^3 operations a matrix."""
    bytes_ = 20 * sum(rows * cols for rows, cols in shapes)
    flops = sum(6 * min(s) ** 2 * max(s) + 14 * min(s) ** 3 for s in shapes)
    return bytes_ / rates["copy_tbs"] / 1e9 + flops / rates["product_tflops"] / 1e9


def ours(shapes: Sequence[Shape], repeats: int) -> list[dict[str, Any]]:
    params = parameters(shapes, "cuda")
    optimizer = Muon(params, lr=0.01, weight_decay=0.1, scale="moonlight", coefficients="polar_express")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() + 4 * sum(param.numel() for param in params)  # momentum is no extra
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    plans = kernels._plans[optimizer]
    common = {
        "program": plans.refused or "graph",
        "extra_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
        "first_step_s": first,
    }
    rows = [{"name": "muonlab", **timed(optimizer.step, repeats), **common}]
    if plans.current is not None:
        rows.append({"name": "muonlab, its graph alone", **timed(plans.current._graph.replay, repeats)})
    others = [[torch.randn_like(param) * 1e-3 for param in params] for _ in range(2)]
    count = 0

    def fresh() -> None:
        nonlocal count
        count += 1
        for param, grad in zip(params, others[count % 2]):
            param.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + count)
        optimizer.step()

    return [*rows, {"name": "muonlab, fresh gradients", **timed(fresh, repeats)}]


def batched_quintic(shapes: Sequence[Shape]) -> Callable[[], None]:
    """The iteration alone as batched cuBLAS products, without momentum or application."""
    counts = Counter((min(shape), max(shape)) for shape in shapes)
    stacks = [torch.randn(count, *shape, device="cuda").half() * 1e-3 for shape, count in counts.items()]

    def run() -> None:
        for stack in stacks:
            x = stack
            for a, b, c in STEPS:
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)

    return run


def compiled_stack(params: Sequence[nn.Parameter]) -> Callable[[], None]:
    """What a careful user writes: same shapes stacked, one compiled function for the whole update, copied back."""
    groups: dict[torch.Size, list[nn.Parameter]] = {}
    for param in params:
        groups.setdefault(param.shape, []).append(param)
    buffers = {shape: torch.zeros(len(group), *shape, device="cuda") for shape, group in groups.items()}

    @torch.compile(fullgraph=True, dynamic=False)
    def update(grads: Tensor, values: Tensor, buffer: Tensor) -> None:
        buffer.lerp_(grads, 0.05)
        direction = grads.lerp(buffer, 0.95)
        tall = direction.shape[-2] > direction.shape[-1]
        x = direction.mT if tall else direction
        x = (x / x.norm(dim=(-2, -1), keepdim=True)).half()
        for a, b, c in STEPS:
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        values.mul_(1 - 0.001).sub_((x.mT if tall else x) * 0.01)

    @torch.no_grad()
    def step() -> None:
        for shape, group in groups.items():
            values = torch.stack(list(group))
            update(torch.stack([param.grad for param in group if param.grad is not None]), values, buffers[shape])
            torch._foreach_copy_(group, list(values.unbind(0)))

    return step


def peers(shapes: Sequence[Shape], repeats: int, wanted: Sequence[str]) -> list[dict[str, Any]]:
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "AdamW(fused)": lambda: torch.optim.AdamW(parameters(shapes, "cuda"), fused=True).step,
        "batched quintic, cuBLAS": lambda: batched_quintic(shapes),
        "compiled stack": lambda: compiled_stack(parameters(shapes, "cuda")),
        "torch.optim.Muon": lambda: torch.optim.Muon(parameters(shapes, "cuda")).step,
    }
    rows = []
    for name in wanted:
        rows.append({"name": name, **timed(makers[name](), max(5, repeats // 3))})
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--repeats", type=int, default=30)
    names = ("AdamW(fused)", "batched quintic, cuBLAS", "compiled stack", "torch.optim.Muon")
    parser.add_argument("--peers", nargs="*", default=list(names), choices=names)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; benchmarks/optimizer_step.py measures on a CPU")
    torch.manual_seed(0)
    rates = ceilings()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "dtype": "fp32 parameters, gradients and momentum; fp16 iterations",
        "rates": rates,
        "sets": {},
    }
    for name in arguments.sets:
        floor = floor_ms(SETS[name], rates)
        rows = [*ours(SETS[name], arguments.repeats), *peers(SETS[name], arguments.repeats, arguments.peers)]
        result["sets"][name] = {"floor_ms": floor, "rows": rows}
        print(f"\n{name}: {len(SETS[name])} matrices, floor {floor:.2f} ms")
        for row in rows:
            extra = f"  {row['extra_gb']:.2f} GB extra, {row['program']}" if "program" in row else ""
            print(
                f"  {row['name']:28} alone {row['alone_ms']:8.2f}  in a row {row['in_a_row_ms']:8.2f}"
                f"  host {row['host_ms']:6.2f} ms{extra}"
            )
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        torch.cuda.empty_cache()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
