"""How fast is one update of muonlab against a plain PyTorch loop over the same model?

Both sides make whole updates (forward, loss, backward, clipping, AdamW, learning-rate schedule) on the same batch. The
plain side is written here with nothing but torch: nn.Linear, nn.RMSNorm, scaled_dot_product_attention, F.grouped_mm over
all experts at once, F.cross_entropy, AdamW(fused=True), eager and through torch.compile. It takes muonlab's weights, and
before anything is timed both losses must agree: it is the same model. All contestants of a model take turns in one
process, so that a busy machine slows all of them; what counts is the median of the ratios within a round. Processor time
beside it leaves out what other processes took (only of use with one thread: waiting threads spin).

    python benchmarks/training.py
    python benchmarks/training.py --device cuda --models moe-79m dense-128 gpt-124m
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.diagnostics.flops import token_flops
from muonlab.models import MODELS, ModelOptions, Transformer
from muonlab.models.ops import head_stats
from muonlab.optim.registry import build_optimizer
from muonlab.training.config import from_dict, resolve_machine, to_plain
from muonlab.training.config import replace as replace_config
from muonlab.training.update import Update

MICRO = replace(MODELS["micro"], vocab_size=2048)
SIZES: dict[str, tuple[ModelOptions, int, int]] = {
    # model, sequences of an update on CPU, and on CUDA
    "micro": (MICRO, 8, 32),
    "dense-128": (MODELS["dense-128"], 4, 32),
    "micro-moe": (replace(MICRO, n_experts=8, top_k=2), 8, 32),
    "moe-79m": (MODELS["moe-79m"], 2, 24),
    "moe-107m": (MODELS["moe-107m"], 2, 24),
    "gpt-124m": (MODELS["gpt-124m"], 1, 16),
    "qwen-385m": (MODELS["qwen-385m"], 1, 8),
}
LR, WEIGHT_DECAY, CLIP, UPDATES = 1e-3, 0.1, 1.0, 10_000

Step = Callable[[int], Tensor]
"""Makes update number i and returns its loss, on the device."""
Times = dict[tuple[str, str], list[float]]
"""(side, program) -> seconds per update, one for each round."""


def main() -> int:
    options = read_options()
    torch.set_num_threads(options.threads)
    print(f"{device_name(options.device)}, {options.threads} threads, torch {torch.__version__}")
    results = []
    for name in options.models:
        torch.compiler.reset()
        results.append(measure(name, options))
        print_result(results[-1])
    best = {result["model"]: result["best_ratio"]["median"] for result in results if result["best_ratio"]}
    print(
        "best of muonlab / best of plain PyTorch: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in best.items())
    )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps({**machine(options), "results": results}, indent=1) + "\n", encoding="utf-8"
        )
        print(options.output)
    return 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time of one update: muonlab against a plain PyTorch loop.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["micro", "dense-128", "micro-moe"], choices=SIZES)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides")
    parser.add_argument("--rounds", type=int, default=11, help="turns of every contestant")
    parser.add_argument("--updates", type=int, help="updates in a turn (default: 1 on CPU, 10 on CUDA)")
    parser.add_argument(
        "--programs", nargs="+", choices=["eager", "compile", "graph"], help="default: all of the device"
    )
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of the GPU, for MFU (H100: 989e12 in bf16)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    options.updates = options.updates or (10 if cuda else 1)
    options.programs = options.programs or ["eager", "compile", *(["graph"] if cuda else [])]
    return options


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    model_options, *sequences = SIZES[name]
    rows = sequences[options.device == "cuda"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model_options.vocab_size, (rows, model_options.seq_len + 1), generator=generator)
    tokens = tokens.to(options.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    agreement = check_same_loss(model_options, inputs, targets)

    contestants: dict[tuple[str, str], Step] = {}
    for program in options.programs:
        contestants["muonlab", program] = ours(model_options, program, inputs, targets)
        if program != "graph":
            contestants["plain", program] = plain(model_options, program, inputs, targets)
    first: dict[tuple[str, str], float] = {}
    failed: dict[tuple[str, str], str] = {}
    for key, step in list(contestants.items()):
        try:
            first[key] = timed(step, 0, 1)  # compilation included
            timed(step, 1, 2)
        except Exception as error:
            failed[key] = str(error).strip().splitlines()[0]
            del contestants[key]
    times: Times = {key: [] for key in contestants}
    processor: Times = {key: [] for key in contestants}
    for turn in range(options.rounds):
        for key in list(times) if turn % 2 == 0 else reversed(times):
            start = time.process_time()
            times[key].append(timed(contestants[key], 3 + turn * options.updates, options.updates))
            processor[key].append(time.process_time() - start)
    count = tokens.shape[0] * model_options.seq_len

    def row(side: str, program: str) -> dict[str, Any]:
        mine, peer = (side, program), peer_of(program, times)
        rate = count / statistics.median(times[mine])
        against = (
            {}
            if side == "plain"
            else {
                "ratio_to_plain": ratio(times[mine], times.get(peer)),
                "processor_ratio_to_plain": None
                if options.device == "cuda"
                else ratio(processor[mine], processor.get(peer)),
            }
        )
        return {
            "side": side,
            "program": program,
            "seconds_per_update": spread(times[mine]),
            "tokens_per_second": rate,
            "mfu": token_flops(model_options).training * rate / options.peak_flops
            if options.device == "cuda"
            else None,
            "first_update_seconds": first[mine],
            **against,
        }

    return {
        "model": name,
        "sequences": rows,
        "seq_len": model_options.seq_len,
        "vocab_size": model_options.vocab_size,
        "loss_difference_before": agreement,
        "training_flops_per_token": token_flops(model_options).training,
        "rounds": options.rounds,
        "updates_in_a_turn": options.updates,
        "contestants": [row(*key) for key in times],
        "failed": [{"side": side, "program": program, "message": text} for (side, program), text in failed.items()],
        "best_ratio": ratio(fastest(times, "muonlab"), fastest(times, "plain")),
    }


def timed(step: Step, start: int, updates: int) -> float:
    """Seconds per update."""
    synchronize()
    begin = time.perf_counter()
    for index in range(start, start + updates):
        loss = step(index)
    synchronize()
    seconds = (time.perf_counter() - begin) / updates
    if not math.isfinite(loss.item()):
        raise SystemExit(f"the loss of update {start + updates - 1} is {loss.item()}: nothing worth timing")
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peer_of(program: str, times: Times) -> tuple[str, str]:
    """The plain contestant of the same program; a CUDA graph meets the compiled loop."""
    return "plain", program if program != "graph" else "compile" if ("plain", "compile") in times else "eager"


def fastest(times: Times, side: str) -> list[float] | None:
    return min((values for key, values in times.items() if key[0] == side), key=statistics.median, default=None)


def ratio(ours: list[float] | None, theirs: list[float] | None) -> dict[str, float] | None:
    return spread([a / b for a, b in zip(ours, theirs, strict=True)]) if ours and theirs else None


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "quartile_low": low, "quartile_high": high}


# --- muonlab ----------------------------------------------------------------------------------------------------------


def ours(options: ModelOptions, program: str, inputs: Tensor, targets: Tensor) -> Step:
    config = from_dict(
        {
            "model": to_plain(options),
            "optimizer": {"name": "adamw", "lr": LR, "weight_decay": WEIGHT_DECAY},
            "training": {
                "updates": UPDATES,
                "micro_batch_size": len(inputs),
                "clip_norm": CLIP,
                "program": program,
                "device": inputs.device.type,
                "threads": torch.get_num_threads(),
            },
        }
    )
    config = resolve_machine(replace_config(config, schedule={"warmup": 0.0}))
    torch.manual_seed(1)
    model = Transformer(config.model).to(inputs.device)
    update = Update(model, build_optimizer(model, config.optimizer), config)
    return lambda index: update(index, inputs, targets, None)[0]


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def plain(options: ModelOptions, program: str, inputs: Tensor, targets: Tensor) -> Step:
    torch.manual_seed(1)
    model = Plain(options).to(inputs.device)
    model.load_state_dict(Transformer(options).state_dict())
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES, eta_min=0.1 * LR)
    objective = model if program == "eager" else torch.compile(model, dynamic=False)

    def step(index: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(inputs):
            loss = objective(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        return loss.detach()

    return step


def autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


class Plain(nn.Module):
    """The transformer of muonlab as one would write it in an afternoon; parameters have the same names."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        self.embedding = nn.Embedding(options.vocab_size, options.d_model)
        self.blocks = nn.ModuleList(PlainBlock(options) for _ in range(options.n_layers))
        self.norm = nn.RMSNorm(options.d_model, eps=options.norm_eps)
        self.head = None if options.tied_head else nn.Linear(options.d_model, options.vocab_size, bias=False)
        self.dropout = nn.Dropout(options.dropout)
        frequency = options.rope_base ** (-torch.arange(0, options.head_dim, 2) / options.head_dim)
        angle = torch.outer(torch.arange(options.seq_len), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)  # [B, T, d]
        if self.options.embedding_scale:
            x = x * math.sqrt(self.options.d_model)
        x, auxiliary = self.dropout(x), 0.0
        for block in self.blocks:
            x, balance = block(x, self.cos, self.sin)
            auxiliary = auxiliary + balance
        x = self.dropout(self.norm(x))
        logits = F.linear(x, self.embedding.weight if self.head is None else self.head.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) + auxiliary


class PlainBlock(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(options.d_model, eps=options.norm_eps)
        self.attention = PlainAttention(options)
        self.feed_forward_norm = nn.RMSNorm(options.d_model, eps=options.norm_eps)
        self.feed_forward = PlainExperts(options) if options.n_experts else PlainFeedForward(options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | float]:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        y, balance = self.feed_forward(self.feed_forward_norm(x))
        return x + self.dropout(y), balance


class PlainAttention(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        d, kv = options.d_model, options.kv_heads * options.head_dim
        if options.fused_qkv:
            self.qkv = nn.Linear(d, d + 2 * kv, bias=options.qkv_bias)
        else:
            self.query, self.key, self.value = (nn.Linear(d, n, bias=options.qkv_bias) for n in (d, kv, kv))
        self.output = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        options, kv = self.options, self.options.kv_heads * self.options.head_dim
        if options.fused_qkv:
            parts = self.qkv(x).split([options.d_model, kv, kv], -1)
        else:
            parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (y.unflatten(-1, (-1, options.head_dim)).transpose(1, 2) for y in parts)  # [B, heads, T, D]
        if options.qk_norm:
            q, k = (F.rms_norm(y, y.shape[-1:], eps=options.norm_eps) for y in (q, k))
        y = F.scaled_dot_product_attention(
            turned(q, cos, sin),
            turned(k, cos, sin),
            v,
            is_causal=True,
            dropout_p=options.dropout if self.training else 0.0,
            enable_gqa=options.kv_heads != options.n_heads,
        )
        return self.output(y.transpose(1, 2).flatten(2))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, heads, T, D], cos and sin [T, D / 2]."""
    cos, sin = cos[: x.shape[-2]].to(x.dtype), sin[: x.shape[-2]].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swiglu": F.silu,
    "gelu": F.gelu,
    "geglu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}


class PlainFeedForward(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.act = ACTIVATIONS[options.activation]
        self.up = nn.Linear(options.d_model, options.d_ff, bias=False)
        self.gate = nn.Linear(options.d_model, options.d_ff, bias=False) if options.gated else None
        self.down = nn.Linear(options.d_ff, options.d_model, bias=False)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(self.dropout(hidden)), 0.0


class PlainExperts(nn.Module):
    """Tokens sorted by expert, one grouped matmul for all experts, results added back with their gates."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        e, d, f = options.n_experts, options.d_model, options.d_ff
        self.act = ACTIVATIONS[options.activation]
        self.router = nn.Linear(d, e, bias=False)
        self.experts = nn.ParameterDict({"up": torch.empty(e, f, d), "down": torch.empty(e, d, f)})
        if options.gated:
            self.experts["gate"] = torch.empty(e, f, d)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        options, tokens = self.options, x.flatten(0, 1)  # [N, d]
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(tokens.float())
        if self.training and options.router_noise:
            logits = logits + options.router_noise * torch.randn_like(logits)
        top, chosen = logits.topk(options.top_k, -1)
        expert, order = chosen.flatten().sort()  # [N · k]
        ends = torch.searchsorted(expert, torch.arange(options.n_experts, device=x.device), right=True)
        load = ends.diff(prepend=ends.new_zeros(1)) / expert.numel()
        dtype = torch.bfloat16 if x.is_cuda else x.dtype

        # torch 2.13 multiplies groups in fp32 on CPU but cannot trace that
        grouped_mm = F.grouped_mm if x.is_cuda else torch.compiler.disable(F.grouped_mm)

        def grouped(rows: Tensor, weight: Tensor) -> Tensor:
            return grouped_mm(rows.to(dtype), weight.to(dtype).transpose(1, 2), offs=ends.int())

        source = order // options.top_k
        rows = tokens[source]
        up = grouped(rows, self.experts["up"])
        hidden = self.act(up) if not options.gated else self.act(grouped(rows, self.experts["gate"])) * up
        y = grouped(self.dropout(hidden), self.experts["down"])
        y = y * top.softmax(-1).flatten()[order, None].to(dtype)
        y = torch.zeros_like(tokens, dtype=dtype).index_add(0, source, y).view(x.shape)
        balance = options.n_experts * (load * logits.softmax(-1).mean(0)).sum()
        z = logits.logsumexp(-1).square().mean() if options.router_z_loss else 0.0
        return y, options.load_balancing * balance + options.router_z_loss * z


@torch.no_grad()
def check_same_loss(options: ModelOptions, inputs: Tensor, targets: Tensor) -> float:
    """|plain - muonlab| in nats with the same weights and no dropout; stops the program if the models differ."""
    torch.manual_seed(0)
    model = Transformer(options).to(inputs.device).eval()
    peer = Plain(options).to(inputs.device).eval()
    peer.load_state_dict(model.state_dict())
    with autocast(inputs):
        theirs = peer(inputs, targets).item()
        output = model(inputs)
        stats = head_stats(output.hidden.flatten(0, 1), model.head_weight, targets.flatten())
    mine = ((stats.lse - stats.target_logit).mean() + output.auxiliary_loss).item()
    if abs(mine - theirs) > (0.02 if inputs.is_cuda else 1e-4):
        raise SystemExit(f"the two models differ: a loss of {mine:.6f} (muonlab) and {theirs:.6f} (plain)")
    return abs(mine - theirs)


# --- printing ---------------------------------------------------------------------------------------------------------


def print_result(result: dict[str, Any]) -> None:
    sizes = f"{result['sequences']} x {result['seq_len']} tokens, vocabulary {result['vocab_size']:,}"
    print(f"\n{result['model']}: {sizes}, median of {result['rounds']} rounds (quartiles)")
    for row in result["contestants"]:
        text = f"  {row['side']:8s} {row['program']:8s} {interval(row['seconds_per_update'], 1e3, 2)} ms"
        text += f"  {row['tokens_per_second']:10,.0f} tokens/s"
        text += f"  MFU {row['mfu']:6.2%}" if row["mfu"] is not None else ""
        if row.get("ratio_to_plain"):
            text += f"  {interval(row['ratio_to_plain'])} of plain"
        if row.get("processor_ratio_to_plain"):
            text += f", {interval(row['processor_ratio_to_plain'])} in processor time"
        print(text, flush=True)
    for row in result["failed"]:
        print(f"  {row['side']:8s} {row['program']:8s} failed: {row['message'][:160]}", flush=True)


def interval(values: dict[str, float], unit: float = 1.0, digits: int = 3) -> str:
    middle, low, high = (f"{unit * values[key]:.{digits}f}" for key in ("median", "quartile_low", "quartile_high"))
    return f"{middle} ({low}-{high})"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def machine(options: argparse.Namespace) -> dict[str, Any]:
    def git(*words: str) -> str:
        call = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        return call.stdout.strip()

    return {
        "benchmark": "training",
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD")
        + (" dirty" if git("status", "--porcelain", "--", "../src") else ""),
        "device": device_name(options.device),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
