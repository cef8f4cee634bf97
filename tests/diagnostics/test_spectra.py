"""Measurements of matrices against matrices whose answer is known."""

import math

import pytest
import torch
from torch import nn

from muonlab import Muon
from muonlab.diagnostics.spectra import spectrum, watched_step


def with_singular_values(values, n=20):
    generator = torch.Generator().manual_seed(0)
    m = len(values)
    u = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))[0]
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


def test_a_spectrum_is_what_the_matrix_was_made_of():
    values = [4.0, 2.0, 2.0, 1.0, 0.5]
    found = spectrum(torch.stack([with_singular_values(values), with_singular_values(values).flip(0)]))
    energy = [value**2 for value in values]
    shares = [value / sum(energy) for value in energy]
    expected = {
        "largest": 4.0,
        "median": 2.0,
        "smallest": 0.5,
        "stable_rank": sum(energy) / 16,
        "entropy": -sum(p * math.log(p) for p in shares) / math.log(5),
        "orthogonality_error": math.sqrt(sum((value - 1) ** 2 for value in energy) / 5),
    }
    assert {name: value.tolist() for name, value in found.items()} == {
        name: pytest.approx([value] * 2) for name, value in expected.items()
    }


def test_orthogonal_and_rank_one_matrices_are_the_ends_of_every_scale():
    flat, one = spectrum(with_singular_values([1.0] * 8)), spectrum(with_singular_values([3.0, 0.0, 0.0]))
    assert [flat[k].item() for k in ("stable_rank", "entropy", "orthogonality_error")] == pytest.approx([8.0, 1.0, 0.0])
    assert [one[k].item() for k in ("stable_rank", "entropy", "largest")] == pytest.approx([1.0, 0.0, 3.0], abs=1e-6)


def test_a_watched_step_is_the_step_and_says_what_it_did():
    models = [nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 24, bias=False)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Muon(model, lr=0.1, weight_decay=0.0, method="svd", nesterov=False) for model in models]
    for i, params in enumerate(zip(*(model.parameters() for model in models))):
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(i))
    rows = watched_step(optimizers[0])
    optimizers[1].step()
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models)))
    assert [(row["name"], row["shape"]) for row in rows] == [("0.weight", [36, 24]), ("1.weight", [24, 36])]
    for row, layer in zip(rows, models[0]):
        assert row["update_rms"] == pytest.approx(0.1 * 0.2, rel=1e-3)  # moonlight
        assert row["relative_update"] == pytest.approx(0.02 * (36 * 24) ** 0.5 / layer.weight.norm().item(), rel=1e-3)
        assert row["cosine"] == pytest.approx(1.0, abs=1e-4)
        assert row["update_stable_rank"] == pytest.approx(24, rel=1e-3)
        assert row["update_orthogonality_error"] < 1e-3


def test_views_and_stacks_are_watched_matrix_by_matrix():
    class Experts(nn.Module):
        is_expert_stack = True

        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 24, 16))

    model = nn.ModuleDict({"experts": Experts(), "qkv": nn.Linear(16, 32, bias=False)})
    model["qkv"].row_split = (16, 8, 8)
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    rows = watched_step(Muon(model, dtype="float32", weight_decay=0.0))
    assert [(row["name"], row["shape"], row["matrices"]) for row in rows] == [
        ("experts.up", [24, 16], 3),
        ("qkv.weight", [16, 16], 1),
        ("qkv.weight", [8, 16], 1),
        ("qkv.weight", [8, 16], 1),
    ]
    assert all(0.8 < row["update_largest"] < 1.2 for row in rows)
