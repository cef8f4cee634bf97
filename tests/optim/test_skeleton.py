import subprocess
import sys

import pytest
import torch
from torch import nn

import muonlab
from muonlab.errors import InputError
from muonlab.optim import OPTIMIZERS, AdamWOptions, MuonOptions, Schedule, applied_lr, build_optimizer, set_lr


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(50, 32),
        nn.Linear(32, 96),
        nn.LayerNorm(96),
        nn.GELU(),
        nn.Linear(96, 32, bias=False),
        nn.Linear(32, 50),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, first: int = 0) -> list[float]:
    losses = []
    for update in range(first, first + updates):
        x = torch.randint(0, 50, (64,), generator=torch.Generator().manual_seed(update))
        loss = nn.functional.cross_entropy(model(x), (x * 7 + 3) % 50)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_import_muonlab_loads_nothing_beyond_torch():
    code = "import sys, torch; a = set(sys.modules); import muonlab; print([m for m in set(sys.modules) - a if not m.startswith('muonlab')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_registered_optimizer_lowers_the_loss_and_tells_its_routing(name):
    entry = OPTIMIZERS[name]
    model = small_model()
    optimizer = build_optimizer(model, entry.options(lr=entry.lr_center))
    losses = train(model, optimizer, 30)
    assert losses[-1] < 0.9 * losses[0]
    rows = optimizer.routing().rows
    assert {row["name"] for row in rows} == {name for name, _ in model.named_parameters()}
    assert {row["kind"] for row in rows} == {"embedding", "hidden", "head", "vector"}


def test_learning_rate_and_decay_are_knobs_of_every_kind():
    options = MuonOptions(lr=1.0, embedding_lr=2.0, head_lr=3.0, vector_lr=4.0, weight_decay=0.5)
    optimizer = build_optimizer(small_model(), options)
    assert applied_lr(optimizer) == {"hidden": 1.0, "embedding": 2.0, "head": 3.0, "vector": 4.0}
    set_lr(optimizer, 0.5)
    assert applied_lr(optimizer) == {"hidden": 0.5, "embedding": 1.0, "head": 1.5, "vector": 2.0}
    set_lr(optimizer, 0.25)
    assert applied_lr(optimizer)["hidden"] == 0.25
    decay = {group["kind"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {"hidden": 0.5, "embedding": 0.0, "head": 0.5, "vector": 0.0}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "class"])
def test_saving_and_loading_in_mid_run_equals_the_uninterrupted_run(name, tmp_path):
    options = OPTIMIZERS[name].options(lr=OPTIMIZERS[name].lr_center)
    whole, resumed = small_model(), small_model()
    losses = train(whole, build_optimizer(whole, options), 8)
    optimizer = build_optimizer(resumed, options)
    train(resumed, optimizer, 4)
    torch.save({"model": resumed.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    fresh = small_model(seed=9)
    optimizer = build_optimizer(fresh, options)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    fresh.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(fresh, optimizer, 4, first=4) == losses[4:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters()))


def test_adamw_equals_torch_adamw_to_fp32_rounding():
    ours, theirs = small_model(), small_model()
    a = build_optimizer(ours, AdamWOptions(lr=1e-3, embedding_weight_decay=0.1, vector_weight_decay=0.1))
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    torch.manual_seed(0)
    for _ in range(100):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=3e-7)


def test_misspelt_option_names_the_nearest_one():
    with pytest.raises(InputError, match="nesterov"):
        muonlab.Muon(small_model(), nestrov=False)


def test_schedule_reaches_peak_after_warmup_and_final_at_the_last_update():
    for kind in ("cosine", "linear", "exponential", "step", "wsd"):
        factors = [Schedule(kind=kind, warmup=0.1, final=0.1).factor(u, 100) for u in range(100)]
        assert factors[0] == 0.1
        assert factors[10] == 1.0
        assert factors[-1] == pytest.approx(0.1)
        assert factors[10:] == sorted(factors[10:], reverse=True)
