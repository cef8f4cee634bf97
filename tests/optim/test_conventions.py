"""Muon against the installed torch.optim.Muon, and against the arithmetic of other implementations written out plainly."""

import math

import pytest
import torch
from torch import nn

from muonlab import Muon
from muonlab.errors import InputError
from muonlab.optim import CONVENTIONS, MuonOptions, convert_lr, orthogonalize
from muonlab.optim.coefficients import resolve
from muonlab.optim.scaling import SCALES, scale_factor, update_rms

SHAPES = [(48, 24), (24, 48), (32, 32), (16, 64)]
KELLER = [(3.4445, -4.7750, 2.0315)] * 5
EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def iterate(x, steps, dtype, margin=1.0, eps=1e-7):
    """The iteration as those implementations have it: cast, transpose, divide by the norm, three products a step."""
    tall = x.shape[0] > x.shape[1]
    x = x.to(dtype)
    x = x.T if tall else x
    x = x / (x.norm() * margin + eps)
    for a, b, c in steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class Reference:
    """One matrix under one implementation's arithmetic: `update(gradient)` changes `weight`."""

    def __init__(self, name, weight, dtype):
        self.name, self.weight, self.dtype = name, weight.clone(), dtype
        self.momentum, self.second = torch.zeros_like(weight), None
        self.lr, self.decay = {
            "torch": (1e-3, 0.1),
            "keller": (0.02, 0.0),
            "moonlight": (1e-3, 0.1),
            "dion": (0.01, 0.01),
            "exp9": (0.02, 0.0),
            "nanochat": (0.02, 0.2),
        }[name]

    def update(self, gradient):
        rows, cols = self.weight.shape
        if self.name in ("moonlight", "dion"):
            self.momentum = 0.95 * self.momentum + gradient
            direction = gradient + 0.95 * self.momentum if self.name == "moonlight" else self.momentum
        else:
            self.momentum = 0.95 * self.momentum + 0.05 * gradient
            direction = 0.05 * gradient + 0.95 * self.momentum
        if self.name == "nanochat":
            self.update_nanochat(direction)
            return
        steps, margin = (EXPRESS, 1.01) if self.name == "dion" else (KELLER, 1.0)
        o = iterate(direction, steps, self.dtype, margin)
        scale = {"moonlight": 0.2 * math.sqrt(max(rows, cols)), "dion": math.sqrt(rows / cols)}
        self.weight *= 1 - self.lr * self.decay
        self.weight -= self.lr * scale.get(self.name, max(1, rows / cols) ** 0.5) * o

    def update_nanochat(self, direction):
        rows, cols = self.weight.shape
        direction = direction.to(self.dtype).float()
        direction = direction * (direction.norm() / rows**0.5 / direction.norm(dim=1, keepdim=True))
        o = iterate(direction, EXPRESS, self.dtype, 1.01, 1e-6)
        o = o * (min(rows, cols) ** 0.5 / o.norm())
        mean = o.square().mean(1 if rows >= cols else 0, keepdim=True)
        self.second = (torch.zeros_like(mean) if self.second is None else self.second) * 0.9 + 0.1 * mean
        scaled = o * self.second.clamp(min=1e-10).rsqrt()
        o = scaled * (o.norm() / scaled.norm())
        lr = self.lr * max(1, rows / cols) ** 0.5
        self.weight -= lr * o + lr * self.decay * self.weight * (o * self.weight >= 0)


def gradients(shape, updates, seed=0):
    """Noise around a fixed direction, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator)
    return [mean + torch.randn(shape, generator=generator) for _ in range(updates)]


def weights(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.3


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_convention_reproduces_its_implementation_after_100_updates(convention, dtype, bound):
    params = [nn.Parameter(weights(shape)) for shape in SHAPES]
    references = [Reference(convention, weights(shape), getattr(torch, dtype)) for shape in SHAPES]
    optimizer = Muon(params, convention=convention, dtype=dtype)
    for step in zip(*(gradients(shape, 100) for shape in SHAPES)):
        for param, reference, gradient in zip(params, references, step):
            param.grad = gradient
            reference.update(gradient)
        optimizer.step()
    for param, reference in zip(params, references):
        moved = (reference.weight - weights(param.shape)).norm()
        assert (param.detach() - reference.weight).norm() / moved < bound


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.8},
        {"adjust_lr_fn": "match_rms_adamw", "lr": 0.01, "weight_decay": 0.5},
        {"adjust_lr_fn": "original", "ns_steps": 3},
        {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 7, "eps": 1e-5},
    ],
)
def test_replacing_the_import_of_torch_muon_changes_nothing_but_rounding(options):
    ours = [nn.Parameter(weights(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(weights(shape)) for shape in SHAPES]
    a, b = Muon(ours, **options, dtype="bfloat16"), torch.optim.Muon(theirs, **options)
    for step in zip(*(gradients(shape, 100) for shape in SHAPES)):
        for p, q, gradient in zip(ours, theirs, step):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        moved = (q.detach() - weights(q.shape)).norm()
        assert (p.detach() - q.detach()).norm() / moved < 2e-2


def test_arguments_and_defaults_are_those_of_torch_muon():
    import inspect

    ours, theirs = inspect.signature(Muon).parameters, inspect.signature(torch.optim.Muon).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    group = Muon([nn.Parameter(weights((8, 8)))]).param_groups[0]
    reference = torch.optim.Muon([nn.Parameter(weights((8, 8)))]).param_groups[0]
    for name in ("lr", "weight_decay", "momentum", "nesterov"):
        assert group[name] == reference[name]
    assert resolve(group["coefficients"], group["ns_steps"]).steps == (reference["ns_coefficients"],) * 5
    assert Muon([nn.Parameter(weights((8, 8)))], coefficients="aol4").param_groups[0]["ns_steps"] is None


def test_averaged_and_added_up_momentum_give_the_same_directions():
    params = [[nn.Parameter(weights((12, 20)).double())] for _ in range(2)]
    for nesterov in (True, False):
        optimizers = [Muon(p, heavy_ball=h, nesterov=nesterov, norm_eps=0.0) for p, h in zip(params, (True, False))]
        for gradient in gradients((12, 20), 30):
            for (param,), optimizer in zip(params, optimizers):
                param.grad = gradient.double()
                optimizer.step()
        torch.testing.assert_close(params[0][0], params[1][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (7, 300)])
def test_the_rms_of_an_orthogonal_matrix_is_one_over_the_root_of_its_longer_side(shape):
    o = orthogonalize(torch.randn(shape, dtype=torch.float64), method="svd")
    for name in SCALES:
        rms = (scale_factor(name, *shape) * o).square().mean().sqrt()
        assert rms.item() == pytest.approx(update_rms(name, *shape), rel=1e-12)


@pytest.mark.parametrize("shape", [(48, 24), (24, 48), (32, 32)])
def test_converted_learning_rates_move_a_matrix_equally_far(shape):
    def distance(convention, lr):
        param = nn.Parameter(weights(shape))
        param.grad = gradients(shape, 1)[0]
        # The same coefficients everywhere: what is converted is the scale.
        options = {"coefficients": "keller", "normuon_beta": None, "equilibrate_rows": False, "renormalize": False}
        optimizer = Muon([param], convention=convention, lr=lr, weight_decay=0.0, dtype="float32", **options)
        optimizer.step()
        return (param.detach() - weights(shape)).norm().item()

    for from_ in CONVENTIONS:
        for to in CONVENTIONS:
            lr = convert_lr(0.02, from_, to, shape)
            assert distance(to, lr) == pytest.approx(distance(from_, 0.02), rel=1e-3)
    assert convert_lr(1.0, "keller", "moonlight", (64, 64)) == pytest.approx(1 / 1.6)


def test_converting_can_make_up_for_smaller_singular_values():
    x = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    keller, express = orthogonalize(x, "keller", dtype="float32").norm(), orthogonalize(x, dtype="float32").norm()
    lr = convert_lr(1.0, "keller", "dion", (128, 512), coefficients_too=True)
    alike = convert_lr(1.0, "keller", "dion", (128, 512))
    assert lr / alike == pytest.approx((keller / express).item(), abs=0.03)


def test_unknown_conventions_are_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'moonlight'"):
        MuonOptions.of("moonligt")
    with pytest.raises(InputError, match="did you mean 'keller'"):
        convert_lr(1.0, "keler", "torch", (2, 2))
