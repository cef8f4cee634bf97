"""Published variants of Muon, each against its own algorithm written out for one matrix in fp64."""

import math

import pytest
import torch
from torch import nn

from muonlab import Muon, orthogonalize
from muonlab.errors import InputError
from muonlab.optim import MuonOptions
from muonlab.optim.polar import decorrelated

SHAPES = [(12, 20), (20, 12), (16, 16)]
LR, MU = 0.1, 0.9


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(shape, update):
    return random(*shape, seed=99) + random(*shape, seed=update)


def ours(shape, updates=12, **options):
    """The weight after some updates, alone and in a stack of three whose first it is."""
    results = []
    for lead in ((), (3,)):
        param = nn.Parameter(random(*lead, *shape, seed=7).clone() if lead else random(3, *shape, seed=7)[0].clone())
        plain = {
            "lr": LR,
            "momentum": MU,
            "weight_decay": 0.0,
            "scale": "none",
            "coefficients": "polar_express",
            "norm_eps": 0.0,
        }
        optimizer = Muon([param], **{**plain, **options})
        for update in range(updates):
            one = gradient(shape, update)
            param.grad = torch.stack([one, 2 * one, one.flip(0)]) if lead else one
            optimizer.step()
        results.append(param.detach()[0] if lead else param.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    return results[0]


def theirs(shape, rule, updates=12):
    """The weight after `rule(weight, gradient, memory) -> weight`; `memory` is a dictionary of its own."""
    weight, memory = random(3, *shape, seed=7)[0], {}
    for update in range(updates):
        weight = rule(weight, gradient(shape, update), memory)
    return weight


def nesterov(g, memory):
    m = memory["m"] = MU * memory.get("m", 0 * g) + (1 - MU) * g
    return (1 - MU) * g + MU * m


def msign(x):
    return orthogonalize(x, "polar_express")


def adamuon(w, g, memory):
    """https://arxiv.org/abs/2507.11005, version 2: orthogonalised signs, entrywise second moment, RMS 0.2."""
    o = msign(nesterov(g, memory).sign())
    v = memory["v"] = 0.95 * memory.get("v", 0 * g) + 0.05 * o**2
    o = o / v.sqrt()
    return w - LR * 0.2 * math.sqrt(o.numel()) / o.norm() * o


def namo(w, g, memory):
    """https://arxiv.org/abs/2602.17080: one adaptive step size a matrix."""
    d = nesterov(g, memory)
    v = memory["v"] = 0.95 * memory.get("v", 0.0) + 0.05 * g.norm() ** 2
    return w - LR * d.norm() / math.sqrt(v) * msign(d)


def adago(w, g, memory):
    """https://arxiv.org/abs/2509.02981: the gradient's norm over the root of the sum of all squared norms."""
    d = nesterov(g, memory)
    v = memory["v"] = memory.get("v", 0.0) + g.norm() ** 2
    return w - LR * max(0.01, g.norm() / math.sqrt(v)) * msign(d)


def polargrad(w, g, memory):
    """https://arxiv.org/abs/2505.21799: times the nuclear norm, here from exact singular values."""
    d = nesterov(g, memory)
    u, s, vh = torch.linalg.svd(d, full_matrices=False)
    return w - LR * s.sum() * (u @ vh)


def cautious_muon(w, g, memory):
    """https://arxiv.org/abs/2411.16085: entries against the gradient are dropped, the others enlarged by what that took."""
    o = msign(nesterov(g, memory))
    mask = (o * g > 0).double()
    return w - LR * o * mask / mask.mean()


def mars(w, g, memory):
    """https://arxiv.org/abs/2411.10438: c = g + gamma mu / (1 - mu) (g - g_before)."""
    c = g + 0.025 * MU / (1 - MU) * (g - memory.get("g", 0 * g))
    memory["g"] = g
    return w - LR * msign(nesterov(c, memory))


def muonlaprop(w, g, memory):
    """https://arxiv.org/abs/2002.04839 in front of Muon."""
    v = memory["v"] = 0.99 * memory["v"] + 0.01 * g**2 if "v" in memory else g**2
    return w - LR * msign(nesterov(g / v.sqrt(), memory))


def dion2(w, g, memory, second=False):
    """https://arxiv.org/abs/2512.16928: a quarter of the rows (columns of a tall matrix), with error feedback."""
    if w.shape[0] > w.shape[1]:
        return dion2(w.T, g.T, memory).T
    m = memory["m"] = memory.get("m", 0 * g) + g
    rows = m.abs().sum(1).topk(math.ceil(w.shape[0] / 4)).indices
    o = torch.zeros_like(w)
    o[rows] = msign(m[rows])
    m[rows] *= MU
    return w - LR * o


def hyperball(w, g, memory):
    """MuonHyperball of Emerging-Optimizers: steps of `lr` times the norm, and back onto the sphere."""
    radius = memory.setdefault("r", w.norm())
    o = msign(nesterov(g, memory))
    w = w - LR * radius * o / o.norm()
    return w * radius / w.norm()


def spel(w, g, memory):
    """https://arxiv.org/abs/2601.21487: msign(w - lr msign(direction)), with decay before."""
    return msign((1 - LR * 0.1) * w - LR * msign(nesterov(g, memory)))


def mud(w, g, memory):
    """https://arxiv.org/abs/2603.17970: one triangular solve."""
    d = nesterov(g, memory)
    d = d.T if w.shape[0] > w.shape[1] else d
    q = d / d.norm(dim=1, keepdim=True)
    q = torch.linalg.inv((q @ q.T).tril()) @ q
    q = q / q.norm(dim=1, keepdim=True)
    return w - LR * (q.T if w.shape[0] > w.shape[1] else q)


def scion(w, g, memory):
    """https://arxiv.org/abs/2502.07529: a step towards a corner of the spectral ball, averaged momentum, no Nesterov."""
    m = memory["m"] = MU * memory.get("m", 0 * g) + (1 - MU) * g
    return (1 - LR) * w - LR * math.sqrt(w.shape[0] / w.shape[1]) * msign(m)


def muon_l2(w, g, memory):
    return w - LR * msign(nesterov(g + 0.1 * w, memory))


def muon_independent(w, g, memory):
    return (1 - 0.1) * w - LR * msign(nesterov(g, memory))


def muon_lr_squared(w, g, memory):
    return (1 - LR**2 * 0.1) * w - LR * msign(nesterov(g, memory))


VARIANTS = {
    adamuon: {
        "sign_momentum": True,
        "normuon_axis": "entries",
        "normuon_beta": 0.95,
        "scale": "moonlight",
    },
    namo: {"normuon_axis": "norm", "normuon_beta": 0.95},
    adago: {"normuon_axis": "sum", "normuon_beta": 0.0},
    polargrad: {"nuclear_scale": True, "method": "svd"},
    cautious_muon: {"cautious_update": True},
    mars: {"mars_gamma": 0.025},
    muonlaprop: {"laprop_beta": 0.99},
    dion2: {"row_fraction": 0.25},
    hyperball: {"fixed_norm": True},
    spel: {"stiefel": True, "weight_decay": 0.1},
    mud: {"method": "mud"},
    scion: {"scale": "spectral", "nesterov": False, "weight_decay": 1.0},
    muon_l2: {"decay_form": "l2", "weight_decay": 0.1},
    muon_independent: {"decay_form": "independent", "weight_decay": 0.1},
    muon_lr_squared: {"decay_form": "lr_squared", "weight_decay": 0.1},
}


@pytest.mark.parametrize("rule", VARIANTS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_variant_is_its_published_algorithm(rule, shape):
    torch.testing.assert_close(ours(shape, **VARIANTS[rule]), theirs(shape, rule), rtol=1e-6, atol=1e-6)


def test_all_rows_of_dion2_are_heavy_ball_muon():
    a = ours((12, 20), row_fraction=1.0)
    b = ours((12, 20), heavy_ball=True, nesterov=False)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_normuon_over_chosen_rows_leaves_the_averages_of_the_others_alone():
    """NorDion2 (Dion3) of microsoft/dion."""

    def nordion2(w, g, memory):
        m = memory["m"] = memory.get("m", 0 * g) + g
        v = memory.setdefault("v", torch.zeros(len(w), 1, dtype=torch.float64))
        rows = m.abs().sum(1).topk(4).indices
        o = msign(m[rows])
        m[rows] *= MU
        v[rows] = 0.95 * v[rows] + 0.05 * o.square().mean(1, keepdim=True)
        scaled = o / v[rows].sqrt()
        step = torch.zeros_like(w)
        step[rows] = scaled * o.norm() / scaled.norm()
        return w - LR * step

    result = ours((12, 20), row_fraction=4 / 12, normuon_beta=0.95)
    torch.testing.assert_close(result, theirs((12, 20), nordion2), rtol=1e-5, atol=1e-5)  # its averages are fp32


def test_row_norm_control_is_muon_on_a_weight_normalised_layer():
    """Muown (https://arxiv.org/abs/2605.10797): Muon for directions, Adam for the lengths of rows, by torch's own weight_norm."""
    layer = nn.Linear(12, 20, bias=False, dtype=torch.float64)
    direction = layer.weight.detach().clone()
    length, x = direction.norm(dim=1, keepdim=True), random(30, 12)
    nn.utils.parametrizations.weight_norm(layer)
    optimizer = Muon(layer, lr=LR, momentum=MU, weight_decay=0.0, scale="none", betas=(0.9, 0.95), nesterov=False)
    momentum, first, second = torch.zeros_like(direction), torch.zeros_like(length), torch.zeros_like(length)
    for update in range(1, 6):
        optimizer.zero_grad()
        layer(x).pow(3).sum().backward()
        optimizer.step()

        unit = direction / direction.norm(dim=1, keepdim=True)
        g = (3 * (x @ (length * unit).T) ** 2).T @ x
        along = (g * unit).sum(1, keepdim=True)
        momentum = MU * momentum + (1 - MU) * (length / direction.norm(dim=1, keepdim=True)) * (g - unit * along)
        first, second = 0.9 * first + 0.1 * along, 0.95 * second + 0.05 * along**2
        length = length - LR * (first / (1 - 0.9**update)) / ((second / (1 - 0.95**update)).sqrt() + 1e-8)
        direction = direction - LR * msign(momentum)
        expected = length * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_rows_that_are_orthonormal_already_are_a_fixed_point_of_mud_and_rows_of_zeros_stay():
    q = torch.linalg.qr(random(20, 12))[0].T
    torch.testing.assert_close(decorrelated(q), q, rtol=0, atol=1e-12)
    q[3] = 0
    torch.testing.assert_close(decorrelated(q), q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [options for rule, options in VARIANTS.items() if "weight_decay" not in options],
    ids=lambda o: next(iter(o)),
)
def test_every_variant_leaves_an_idle_matrix_bit_for_bit_alone(options):
    param = nn.Parameter(random(3, 12, 20).float())
    optimizer = Muon([param], idle="skip", lr=0.1, **options)
    for update in range(4):
        param.grad = random(3, 12, 20, seed=update).float()
        if update > 1:
            param.grad[1] = 0
            before = param[1].detach().clone()
            state = {k: v.clone() for k, v in optimizer.state[param].items()}
        optimizer.step()
        if update > 1:
            assert torch.equal(param[1].detach(), before)
            for name, value in optimizer.state[param].items():
                parts = (tensor if tensor.ndim == 3 else tensor.view(3, -1) for tensor in (value, state[name]))
                now, then = parts
                assert torch.equal(now[1], then[1]), name
                assert not torch.equal(now[0], then[0]), name
    assert torch.isfinite(param).all()


def test_8_bit_momentum_takes_a_quarter_of_the_memory_and_loses_little_direction():
    params = [nn.Parameter(torch.zeros(64, 128)) for _ in range(2)]
    options = {"lr": 0.02, "weight_decay": 0.0, "dtype": "float32"}
    small, full = Muon(params[:1], momentum_dtype="int8", **options), Muon(params[1:], **options)
    for update in range(100):
        for param in params:
            param.grad = gradient((64, 128), update).float() * torch.logspace(-3, 0, 64)[:, None]
        small.step()
        full.step()
    state, reference = small.state[params[0]], full.state[params[1]]["momentum_buffer"]
    held = sum(value.numel() * value.element_size() for value in state.values())
    assert held <= reference.numel() * 4 * 0.26
    restored = state["momentum_buffer"] * state["momentum_scale"].view(64, 1)
    assert (restored - reference).norm() / reference.norm() < 0.03
    assert torch.nn.functional.cosine_similarity(*(param.detach().flatten() for param in params), dim=0) > 0.999


def test_8_bit_momentum_of_experts_heads_and_tiles_is_that_of_separate_matrices():
    whole = nn.Parameter(random(3, 12, 20, seed=1).float())
    parts = [nn.Parameter(part.clone()) for part in whole.detach()]
    for options in ({}, {"block_size": 8}):
        a, b = (Muon(params, momentum_dtype="int8", dtype="float32", **options) for params in ([whole], parts))
        for update in range(3):
            whole.grad = random(3, 12, 20, seed=update).float()
            for part, grad in zip(parts, whole.grad):
                part.grad = grad
            a.step()
            b.step()
        torch.testing.assert_close(whole.detach(), torch.stack([part.detach() for part in parts]), rtol=0, atol=1e-6)


def test_averages_of_tiles_and_of_whole_matrices_that_take_turns_are_kept_apart():
    options = {
        "lr": 0.1,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "normuon_beta": 0.9,
        "scale": "none",
        "dtype": "float32",
    }
    param, full, tiles = (nn.Parameter(torch.zeros(12, 20)) for _ in range(3))
    optimizer = Muon([param], block_size=8, block_period=3, **options)
    references = [Muon([full], **options), Muon([tiles], block_size=8, **options)]
    for update in range(7):
        which = 0 if update % 3 == 0 else 1
        other = (full, tiles)[which]
        param.grad = other.grad = random(12, 20, seed=update).float()
        before = param.detach().clone(), other.detach().clone()
        optimizer.step()
        references[which].step()
        torch.testing.assert_close(param.detach() - before[0], other.detach() - before[1], rtol=0, atol=1e-6)


def test_a_fading_matrix_counts_updates_of_tiles_and_of_the_whole_alike():
    """What an idle matrix does depends on when it had its last gradient, not on which of its tiles had one."""
    param = nn.Parameter(torch.zeros(2, 12, 20))
    optimizer = Muon(
        [param], lr=1.0, weight_decay=0.0, scale="none", idle="fade", block_size=8, block_period=3, dtype="float32"
    )
    param.grad = random(2, 12, 20).float()
    param.grad[:, :8, :8] = 0  # one tile of matrices that are not idle
    optimizer.step()
    for update in range(1, 8):
        param.grad = random(2, 12, 20, seed=update).float()
        param.grad[1] = 0
        before, buffer = param.detach().clone(), optimizer.state[param]["momentum_buffer"].clone()
        optimizer.step()
        assert optimizer.state[param]["idle"].tolist() == [0, update]
        moved = (before - param.detach())[1]
        direction = 0.95**2 * buffer[1]
        whole = update % 3 == 0
        tiles = [direction] if whole else [t for band in direction.split([8, 4]) for t in band.split([8, 8, 4], 1)]
        parts = [moved] if whole else [t for band in moved.split([8, 4]) for t in band.split([8, 8, 4], 1)]
        for tile, part in zip(tiles, parts, strict=True):
            torch.testing.assert_close(
                part, 0.95**update * orthogonalize(tile, "keller", dtype="float32"), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"row_fraction": 0.0}, r"row_fraction must lie in \(0, 1\]"),
        ({"row_fraction": 0.5, "sign_momentum": True}, "not with sign_momentum"),
        ({"row_fraction": 0.5, "normuon_axis": "norm"}, "not with normuon_axis='norm'"),
        ({"mars_gamma": -1.0}, "mars_gamma must be a number >= 0"),
        ({"laprop_beta": 1.0}, r"laprop_beta must lie in \[0, 1\)"),
        ({"normuon_axis": "entires"}, "did you mean 'entries'"),
        ({"decay_form": "L2"}, "did you mean 'l2'"),
        ({"momentum_dtype": "int4"}, "did you mean 'int8'"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        MuonOptions(**options)
