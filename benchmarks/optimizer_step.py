"""Time, memory and error of one optimizer step on CPU, beside torch.optim.Muon and torch.optim.AdamW.

    python benchmarks/optimizer_step.py -o benchmarks/results/optimizer_step.json

measures everything: the matrices of `moe-79m` and `qwen-385m` at full depth on two cores at the coefficients and precision of
torch.optim.Muon, all their parameters beside torch's Muon and AdamW together, the extra memory of a step, the time to construct
the optimizer for a billion parameters, and every choice that is faster or more exact, with its error against fp64. It needs
about 8 GB and, on two cores, half an hour; `--layers 2` is a quick look.

Two optimizers take turns on the same parameters and gradients in one process; a ratio is the median over neighbouring steps,
because the speed of a machine drifts. Where others compute beside it, `--threads 1 --cpu-time` leaves out what they took.
torch.optim.Muon knows matrices only, so it gets the experts of a stack one by one.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from muonlab import Muon, orthogonalize
from muonlab.models.presets import MODELS
from muonlab.models.transformer import Transformer

Row = dict[str, Any]
CPU_TIME = False
LIMITS = {"ratio": 1.05, "extra_memory": 0.25, "seconds": 2.0}
KELLER = {"coefficients": "keller", "dtype": "bfloat16", "scale": "keller"}
CHOICES: dict[str, dict[str, Any]] = {
    "keller, 5 steps, bf16": {"coefficients": "keller", "dtype": "bfloat16"},
    "keller, 5 steps, fp32": {"coefficients": "keller", "dtype": "float32"},
    "keller, 5 steps, gram, fp32": {"coefficients": "keller", "method": "gram", "dtype": "float32"},
    "keller, 3 steps, bf16": {"coefficients": "keller", "ns_steps": 3, "dtype": "bfloat16"},
    "polar_express, 5 steps, bf16": {"coefficients": "polar_express", "dtype": "bfloat16"},
    "polar_express, 4 steps, bf16": {"coefficients": "polar_express", "ns_steps": 4, "dtype": "bfloat16"},
    "polar_express, gram, fp32": {"coefficients": "polar_express", "method": "gram", "dtype": "float32"},
    "you, 5 steps, bf16": {"coefficients": "you", "dtype": "bfloat16"},
    "cubic5, bf16": {"coefficients": "cubic5", "dtype": "bfloat16"},
    "aol4, bf16": {"coefficients": "aol4", "dtype": "bfloat16"},
    "mud, fp32": {"method": "mud", "dtype": "float32"},
    "polar_express, tiles of 192, bf16": {"coefficients": "polar_express", "dtype": "bfloat16", "block_size": 192},
    "polar_express, bf16, int8 momentum": {
        "coefficients": "polar_express",
        "dtype": "bfloat16",
        "momentum_dtype": "int8",
    },
}


def parameters(model: str, layers: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """(hidden matrices, everything else) of a preset, with gradients; `layers`: cut to so many."""
    options = MODELS[model]
    if layers is not None:
        options = replace(options, n_layers=min(layers, options.n_layers))
    with torch.device("meta"):
        transformer = Transformer(options)
    muon = {row["name"] for row in Muon(transformer).routing().rows if row["rule"] == "muon"}
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, param in transformer.named_parameters():
        target = hidden if name in muon else rest
        target.append(nn.Parameter(torch.randn(param.shape) * 0.02))
        target[-1].grad = torch.randn(param.shape)
    return hidden, rest


def as_matrices(params: list[Tensor]) -> list[Tensor]:
    """The same memory, with stacks as single matrices."""
    result = []
    for param in params:
        assert param.grad is not None
        pairs = (
            zip(param.detach().unbind(0), param.grad.unbind(0)) if param.ndim == 3 else [(param.detach(), param.grad)]
        )
        for value, grad in pairs:
            result.append(nn.Parameter(value))
            result[-1].grad = grad
    return result


def compare(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> Row:
    """Seconds of both, the median of the ratios of neighbouring steps and their quartiles."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def seconds(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def clock() -> float:
    return time.process_time() if CPU_TIME else time.perf_counter()


def extra_memory(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Row:
    """Peak memory of one step above what is there before it, as a fraction of the matrices in fp32; and bytes of state."""
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]  # set once the profiler has run
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    entries = sum(param.numel() for param in params)
    state = sum(value.numel() * value.element_size() for own in optimizer.state.values() for value in own.values())
    return {"extra_memory": peak / (4 * entries), "extra_bytes": peak, "state_bytes_per_entry": state / entries}


def errors(orthogonal: Callable[[Tensor], Tensor], exact_steps: Callable[[Tensor], Tensor] | None) -> Row:
    """Relative distances from fp64 on a matrix whose singular values span three decades.

    `rounding`: to the same polynomials in fp64. `polar`: to the exact polar factor.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(384, 384, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(1536, 384, generator=generator, dtype=torch.float64))[0]
    x = (u * torch.logspace(0, -3, 384, dtype=torch.float64)) @ v.T
    exact, result = u @ v.T, orthogonal(x.float()).double()
    row = {"polar": ((result - exact).norm() / exact.norm()).item()}
    if exact_steps is not None:
        same = exact_steps(x)
        row["rounding"] = ((result - same).norm() / same.norm()).item()
    return row


def errors_of_torch() -> Row:
    step = (3.4445, -4.7750, 2.0315)
    return errors(
        lambda x: _zeropower_via_newtonschulz(x, step, 5, 1e-7), lambda x: orthogonalize(x, "keller", dtype="float64")
    )


def errors_of(options: dict[str, Any]) -> Row:
    own = {name: options[name] for name in ("coefficients", "ns_steps", "method", "dtype") if name in options}
    steps = {name: own[name] for name in ("coefficients", "ns_steps") if name in own}
    mud = own.get("method") == "mud"
    return errors(
        lambda x: orthogonalize(x, **own), None if mud else lambda x: orthogonalize(x, **steps, dtype="float64")
    )


def measure(model: str, layers: int | None, repeats: int, choices: bool) -> list[Row]:
    """All rows of one model."""
    hidden, rest = parameters(model, layers)
    theirs = torch.optim.Muon(as_matrices(hidden))
    ours = Muon(hidden, **KELLER)
    same = {"model": model, "what": "Muon, matrices, same arithmetic", **compare(ours.step, theirs.step, repeats)}
    same.update(extra_memory(ours, hidden))
    del ours
    rows = [same]
    report(rows[-1])
    rows.append({"model": model, "what": "Muon + AdamW, all parameters", **compare_all(hidden, rest, theirs, repeats)})
    report(rows[-1])
    if not choices:
        return rows
    torchs = errors_of_torch()
    rows.append({"model": model, "what": "torch.optim.Muon itself", "ratio": 1.0, **torchs})
    report(rows[-1])
    for name, options in CHOICES.items():
        optimizer = Muon(hidden, **{**KELLER, **options})
        row = {"model": model, "what": name, **compare(optimizer.step, theirs.step, max(3, repeats // 2))}
        row.update(errors_of(options))
        # Tiles are another optimizer, whose tiles are as exact; a choice counts if no error is larger than torch's own.
        row["counts"] = (
            all(row[kind] <= 1.01 * torchs[kind] for kind in torchs if kind in row) and "block_size" not in options
        )
        rows.append(row)
        report(row)
    return rows


def compare_all(hidden: list[Tensor], rest: list[Tensor], muon: torch.optim.Optimizer, repeats: int) -> Row:
    """Our step on all parameters beside those of torch's Muon and AdamW together."""
    adamw = torch.optim.AdamW(rest)
    hybrid = Muon([{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}], **KELLER)
    return compare(hybrid.step, lambda: (muon.step(), adamw.step()), repeats)


def construction() -> Row:
    """Seconds to build the optimizer for a model of a billion parameters on the meta device."""
    with torch.device("meta"):
        model = Transformer(replace(MODELS["gpt-124m"], d_model=2048, d_ff=8192, n_layers=20, n_heads=16))
    count = sum(param.numel() for param in model.parameters())
    return {
        "model": f"{count / 1e9:.2f}e9",
        "what": "construction, meta device",
        "seconds": seconds(lambda: Muon(model)),
    }


def report(row: Row) -> None:
    numbers = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    print(f"{row['model']:<10} {row['what']:<36} {'  '.join(numbers)}", flush=True)


def verdicts(rows: list[Row]) -> list[str]:
    """A line for every limit: what was measured, and whether it holds."""
    lines = []
    for row in rows:
        if row["what"] not in ("Muon, matrices, same arithmetic", "construction, meta device"):
            continue
        for key, limit in LIMITS.items():
            if key in row:
                word = "holds" if row[key] <= limit else "FAILS"
                lines.append(f"{word}: {row['model']}, {row['what']}: {key} {row[key]:.4g} (at most {limit})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["moe-79m", "qwen-385m"], choices=list(MODELS))
    parser.add_argument("--choices", nargs="*", default=["moe-79m"], help="models on which all choices are timed")
    parser.add_argument(
        "--layers", type=int, default=None, help="cut the models to so many layers (memory ratios grow)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="processor time; means something on one thread")
    parser.add_argument("-o", "--json", type=Path, default=None)
    arguments = parser.parse_args()
    globals()["CPU_TIME"] = arguments.cpu_time
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    settings = {
        "threads": arguments.threads,
        "cpu_time": arguments.cpu_time,
        "layers": arguments.layers,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "load_before": os.getloadavg()[0],
    }
    rows: list[Row] = []
    for model in arguments.models:
        rows += measure(model, arguments.layers, arguments.repeats, model in arguments.choices)
    rows.append(construction())
    report(rows[-1])
    lines = verdicts(rows)
    print("\n".join(lines))
    if arguments.json is not None:
        settings |= {"limits": LIMITS, "verdicts": lines, "rows": rows}
        arguments.json.write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
