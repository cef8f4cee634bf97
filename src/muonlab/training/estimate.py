"""How long a run would take here, from a few updates of it on random tokens."""

import time
from typing import Any

import torch

from muonlab.models import Transformer
from muonlab.optim.registry import build_optimizer
from muonlab.training.config import RunConfig, resolve_machine, with_vocabulary
from muonlab.training.update import Update


def seconds_per_update(config: RunConfig[Any], updates: int = 3) -> float:
    """Median wall-clock seconds of one update on this machine, after one that is not counted.

    A vocabulary that the tokenizer would decide is taken from `data.vocab_size`. No data is read.
    """
    config = resolve_machine(with_vocabulary(config))
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.training.threads)
    device = torch.device(config.training.device)
    model = Transformer(config.model).to(device)
    update = Update(model, build_optimizer(model, config.optimizer), config)
    sequences = config.training.accumulation * config.training.micro_batch_size
    tokens = torch.randint(config.model.vocab_size, (sequences, config.model.seq_len + 1), device=device)
    times: list[float] = []
    while len(times) < updates:
        counted, index = update.ready and update.calls > 0, update.calls
        start = time.perf_counter()
        update(index, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)[0].item()
        times += [time.perf_counter() - start] if counted else []
    return sorted(times)[updates // 2]
