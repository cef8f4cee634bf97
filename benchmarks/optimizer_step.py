"""Time, memory and error of one optimizer step, beside torch.optim.Muon and torch.optim.AdamW, on CPU.

    python benchmarks/optimizer_step.py --models moe-79m qwen-385m --threads 2 --json optimizer_step.json

Every pair is timed alternately in one process and reported as the median of the ratios of neighbours, because the speed of a
shared machine drifts; where others compute beside it, use `--threads 1 --cpu-time`. torch.optim.Muon takes matrices only, so stacks of experts are given to it one by one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from muonlab import Muon, orthogonalize
from muonlab.models.presets import MODELS
from muonlab.models.transformer import Transformer

CPU_TIME = False
KELLER = {"coefficients": "keller", "dtype": "bfloat16", "scale": "keller"}
CHOICES = {
    "keller, 5 steps, bf16": {"coefficients": "keller", "dtype": "bfloat16"},
    "keller, 5 steps, fp32": {"coefficients": "keller", "dtype": "float32"},
    "polar_express, 5 steps, bf16": {"coefficients": "polar_express", "dtype": "bfloat16"},
    "polar_express, 4 steps, bf16": {"coefficients": "polar_express", "ns_steps": 4, "dtype": "bfloat16"},
    "you, 5 steps, bf16": {"coefficients": "you", "dtype": "bfloat16"},
    "cubic5, bf16": {"coefficients": "cubic5", "dtype": "bfloat16"},
    "keller, 3 steps, bf16": {"coefficients": "keller", "ns_steps": 3, "dtype": "bfloat16"},
    "aol4, bf16": {"coefficients": "aol4", "dtype": "bfloat16"},
    "polar_express, gram, fp32": {"coefficients": "polar_express", "method": "gram", "dtype": "float32"},
    "polar_express, tiles of 192, bf16": {"coefficients": "polar_express", "dtype": "bfloat16", "block_size": 192},
}


def parameters(model: str, layers: int) -> tuple[list[Tensor], list[Tensor]]:
    """(hidden matrices, everything else) of a preset cut to `layers` layers, with gradients."""
    options = MODELS[model]
    with torch.device("meta"):
        transformer = Transformer(replace(options, n_layers=min(layers, options.n_layers)))
    muon = {row["name"] for row in Muon(transformer).routing().rows if row["rule"] == "muon"}
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, param in transformer.named_parameters():
        target = hidden if name in muon else rest
        target.append(nn.Parameter(torch.randn(param.shape) * 0.02))
        target[-1].grad = torch.randn(param.shape)
    return hidden, rest


def copies(params: list[Tensor], split: bool) -> list[Tensor]:
    """Independent copies with the same gradients; `split`: stacks as single matrices."""
    result = []
    for param in params:
        assert param.grad is not None
        pairs = zip(param.unbind(0), param.grad.unbind(0)) if split and param.ndim == 3 else [(param, param.grad)]
        for value, grad in pairs:
            result.append(nn.Parameter(value.detach().clone()))
            result[-1].grad = grad.clone()
    return result


def ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of both and the median of the ratios of neighbouring runs."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def seconds(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def clock() -> float:
    return time.process_time() if CPU_TIME else time.perf_counter()


def errors(options: dict[str, object]) -> dict[str, float]:
    """Relative distances from fp64 on a matrix whose singular values span three decades.

    `rounding`: to the same polynomials in fp64. `polar`: to the exact polar factor.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(384, 384, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(1536, 384, generator=generator, dtype=torch.float64))[0]
    x = (u * torch.logspace(0, -3, 384, dtype=torch.float64)) @ v.T
    options = {name: value for name, value in options.items() if name != "block_size"}
    result = orthogonalize(x.float(), **options).double()  # type: ignore[arg-type]  # options of orthogonalize by name
    exact = u @ v.T
    same = orthogonalize(x, **{**options, "dtype": "float64", "method": "standard"})  # type: ignore[arg-type]
    return {
        "rounding": ((result - same).norm() / same.norm()).item(),
        "polar": ((result - exact).norm() / exact.norm()).item(),
    }


def extra_memory(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> float:
    """Peak memory of one step above what is there before it, as a fraction of the fp32 matrices."""
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]  # set once the profiler has run
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / (4 * sum(param.numel() for param in params))


def measure(model: str, layers: int, repeats: int, choices: bool) -> list[dict[str, object]]:
    hidden, rest = parameters(model, layers)
    theirs = torch.optim.Muon(copies(hidden, split=True))
    ours = Muon(copies(hidden, split=False), **KELLER)
    rows: list[dict[str, object]] = [
        {"model": model, "what": "Muon, matrices, same arithmetic", **ratio(ours.step, theirs.step, repeats)}
    ]
    rows[0]["extra_memory"] = extra_memory(ours, hidden)
    if rest:
        adamw = torch.optim.AdamW(copies(rest, split=False))
        groups = [{"params": copies(hidden, split=False)}, {"params": copies(rest, split=False), "use_muon": False}]
        hybrid = Muon(groups, **KELLER)
        both = ratio(hybrid.step, lambda: (theirs.step(), adamw.step()), repeats)
        rows.append({"model": model, "what": "Muon + AdamW, all parameters", **both})
    for name, options in CHOICES.items() if choices else ():
        optimizer = Muon(copies(hidden, split=False), **{**KELLER, **options})
        timed = ratio(optimizer.step, theirs.step, max(1, repeats // 2))
        rows.append({"model": model, "what": name, **timed, **errors(options)})
        print(line(rows[-1]), flush=True)
    return rows


def construction() -> float:
    """Seconds to build the optimizer for a model of a billion parameters on the meta device."""
    with torch.device("meta"):
        model = Transformer(replace(MODELS["gpt-124m"], d_model=2048, d_ff=8192, n_layers=20, n_heads=16))
    return seconds(lambda: Muon(model))


def line(row: dict[str, object]) -> str:
    numbers = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    return f"{row['model']:<10} {row['what']:<36} {'  '.join(numbers)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["moe-79m", "qwen-385m"])
    parser.add_argument("--layers", type=int, default=2, help="layers of each model that are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of processor time; means something on one thread"
    )
    parser.add_argument("--choices", action="store_true", help="also time faster and more accurate settings")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    globals()["CPU_TIME"] = arguments.cpu_time
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for model in arguments.models:
        rows += measure(model, arguments.layers, arguments.repeats, arguments.choices)
    rows.append({"model": "1e9", "what": "construction, meta device", "seconds": construction()})
    print("\n".join(line(row) for row in rows))
    if arguments.json is not None:
        settings = {"threads": arguments.threads, "cpu_time": arguments.cpu_time, "layers": arguments.layers}
        arguments.json.write_text(json.dumps({**settings, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
