"""Evaluation on a fixed set of windows: always next-token cross-entropy, whatever was optimised."""

import math

import torch

from muonlab.data import Dataset, evaluation_windows
from muonlab.models import Transformer
from muonlab.models.head import head_stats
from muonlab.training.losses import cross_entropy
from muonlab.training.update import Precision


class Evaluator:
    """Cross-entropy (nats per token), bits per byte, perplexity and accuracy of a model on one held-out split.

    The windows are fixed: non-overlapping, spread evenly over the split, the same for every run on this data.
    """

    def __init__(
        self, dataset: Dataset, split: str, seq_len: int, tokens: int, batch_size: int, chunk_bytes: int
    ) -> None:
        self.inputs, self.targets, self.document_ids = evaluation_windows(getattr(dataset, split), seq_len, tokens)
        self.bytes_per_token = dataset.bytes_per_token(split)
        self.split, self.batch_size, self.chunk_bytes = split, batch_size, chunk_bytes

    @torch.no_grad()
    def __call__(self, model: Transformer, precision: Precision) -> dict[str, float | str]:
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for start in range(0, len(self.inputs), self.batch_size):
            rows = slice(start, start + self.batch_size)
            ids = None if self.document_ids is None else self.document_ids[rows].to(device)
            with precision.autocast():
                hidden = model(self.inputs[rows].to(device), document_ids=ids).hidden
                targets = self.targets[rows].to(device).flatten()
                stats = head_stats(hidden.flatten(0, 1), model.head_weight, targets, self.chunk_bytes)
            total += cross_entropy(stats).double().sum()
            correct += stats.correct.sum()
        model.train(training)
        count = self.targets.numel()
        nats = total.item() / count
        return {
            "split": self.split,
            "cross_entropy": nats,
            "bits_per_byte": nats / math.log(2) / self.bytes_per_token,
            "perplexity": math.exp(min(nats, 700.0)),
            "accuracy": correct.item() / count,
        }
