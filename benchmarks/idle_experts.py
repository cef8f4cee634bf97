"""What to do with experts that received no token: validation loss of a small mixture under each `idle` policy of Muon.

    python benchmarks/idle_experts.py --seeds 6 --json benchmarks/results/idle_experts.json

64 experts a layer, one expert a token, 64 tokens an update: more than half of the experts are idle in an update. Runs of the same
seed start from the same weights and see the same batches, so differences are paired. Takes five minutes on one core.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from muonlab.data import DataOptions, Dataset, batch, evaluation_windows, prepare
from muonlab.models.options import ModelOptions
from muonlab.models.transformer import Transformer
from muonlab.optim import MuonOptions, Schedule, build_optimizer, set_lr

POLICIES = ("skip", "fade", "move")
WINDOW = 64


def model(vocab_size: int) -> Transformer:
    return Transformer(
        ModelOptions(
            vocab_size=vocab_size,
            seq_len=WINDOW,
            d_model=64,
            n_layers=2,
            n_heads=4,
            d_ff=128,
            activation="relu2",
            qk_norm=True,
            tied_head=False,
            init_std=0.08,
            n_experts=64,
            top_k=1,
            load_balancing=0.01,
        )
    )


def cross_entropy(
    network: Transformer, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    output = network(inputs)
    loss = F.cross_entropy((output.hidden @ network.head_weight.T).flatten(0, 1), targets.flatten())
    return loss + output.auxiliary_loss, torch.stack([loss.detach(), (output.expert_load == 0).float().mean()])


def train(dataset: Dataset, policy: str, seed: int, updates: int, lr: float) -> dict[str, float]:
    """Validation cross-entropy (nats per token) after training, and the mean fraction of idle experts."""
    torch.manual_seed(seed)
    network = model(dataset.vocab_size)
    optimizer = build_optimizer(network, MuonOptions(lr=lr, idle=policy, embedding_lr=0.01, head_lr=0.01))
    schedule, idle = Schedule(), 0.0
    for update in range(updates):
        set_lr(optimizer, schedule.factor(update, updates))
        inputs, targets, _ = batch(dataset.train, WINDOW, 1, seed, update)
        objective, numbers = cross_entropy(network, inputs, targets)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        idle += numbers[1].item() / updates
    network.eval()
    inputs, targets, _ = evaluation_windows(dataset.tune, WINDOW, 16_384)
    with torch.no_grad():
        losses = [cross_entropy(network, x, y)[1][0].item() for x, y in zip(inputs.split(16), targets.split(16))]
    return {"cross_entropy": statistics.mean(losses), "idle": idle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = prepare(DataOptions(corpus="pydoc", vocab_size=512), progress=False)
    runs = {
        policy: [train(dataset, policy, seed, arguments.updates, arguments.lr) for seed in range(arguments.seeds)]
        for policy in POLICIES
    }
    for policy in POLICIES:
        pairs = zip(runs[policy], runs["skip"])
        differences = [run["cross_entropy"] - base["cross_entropy"] for run, base in pairs]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        mean = statistics.mean(run["cross_entropy"] for run in runs[policy])
        idle = statistics.mean(run["idle"] for run in runs[policy])
        print(
            f"{policy:<5} {mean:.4f} nats, {idle:.0%} idle, {statistics.mean(differences):+.4f} ± {error:.4f} against skip"
        )
    if arguments.json is not None:
        settings = {"updates": arguments.updates, "lr": arguments.lr, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**settings, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
