"""State taken over from other implementations: the next update must be the one they would have made."""

import pytest
import torch
from torch import nn

from muonlab import Muon
from muonlab.errors import InputError
from muonlab.optim import import_state


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {"a": nn.Linear(16, 12, bias=False), "b": nn.Linear(12, 16, bias=False), "norm": nn.LayerNorm(16)}
    )


def fill(*modules, seed):
    for i, params in enumerate(zip(*(module.parameters() for module in modules))):
        for param in params:
            param.grad = matrix(*param.shape, seed=100 * seed + i)


def test_a_run_with_torch_muon_and_adamw_continues_here():
    theirs, ours = model(), model()
    matrices, vectors = [theirs["a"].weight, theirs["b"].weight], list(theirs["norm"].parameters())
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(vectors, lr=0.02, weight_decay=0.0)
    for seed in range(10):
        fill(theirs, seed=seed)
        muon.step()
        adamw.step()
    ours.load_state_dict(theirs.state_dict())
    optimizer = Muon(ours, convention="torch", lr=0.02, betas=(0.9, 0.999))
    import_state(optimizer, muon.state_dict(), "torch", ["a.weight", "b.weight"])
    import_state(optimizer, adamw.state_dict(), "torch", list(ours["norm"].parameters()))
    for seed in range(10, 20):
        fill(theirs, ours, seed=seed)
        muon.step()
        adamw.step()
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=5e-3)


def momenta(updates):
    """Averaged and added-up momentum of both matrices after some updates."""
    average = [torch.zeros(12, 16), torch.zeros(16, 12)]
    added = [torch.zeros(12, 16), torch.zeros(16, 12)]
    for seed in range(updates):
        for i in range(2):
            gradient = matrix(*average[i].shape, seed=100 * seed + i)
            average[i] = 0.95 * average[i] + 0.05 * gradient
            added[i] = 0.95 * added[i] + gradient
    return average, added


def saved(source, average, added):
    moments = {"exp_avg": torch.ones(16), "exp_avg_sq": torch.full((16,), 2.0)}
    if source == "keller":
        return {
            "state": {i: {"momentum_buffer": average[i]} for i in range(2)} | {2: {**moments, "step": 7}},
            "param_groups": [{"params": [0, 1], "momentum": 0.95}, {"params": [2]}],
        }
    if source == "moonlight":
        state = {i: {"use_muon": True, "momentum_buffer": added[i]} for i in range(2)}
        state[2] = {"use_muon": False, "step": 7, "moment1": moments["exp_avg"], "moment2": moments["exp_avg_sq"]}
        return {"state": state, "param_groups": [{"params": [0, 1, 2], "momentum": 0.95}]}
    if source == "nanochat":
        state = {
            i: {"momentum_buffer": average[i][None], "second_momentum_buffer": torch.ones(1, 1, 1)} for i in range(2)
        }
        groups = [{"params": [0], "momentum": 0.95}, {"params": [1], "momentum": 0.95}, {"params": [2]}]
        return {"state": state | {2: {**moments, "step": 7}}, "param_groups": groups}
    state = {i: {"momentum": added[i]} for i in range(2)}
    state[2] = {"momentum": moments["exp_avg"], "variance": moments["exp_avg_sq"]}
    return {"state": state, "param_groups": [{"params": [0, 1], "mu": 0.95, "step": 7}, {"params": [2], "step": 7}]}


@pytest.mark.parametrize("source", ["keller", "moonlight", "nanochat", "dion"])
@pytest.mark.parametrize("heavy_ball", [False, True])
def test_momentum_is_rescaled_between_averages_and_sums(source, heavy_ball):
    average, added = momenta(5)
    module = model()
    optimizer = Muon(module, heavy_ball=heavy_ball)
    import_state(optimizer, saved(source, average, added), source, ["a.weight", "b.weight", "norm.weight"])
    for i, name in enumerate("ab"):
        buffer = optimizer.state[module[name].weight]["momentum_buffer"]
        torch.testing.assert_close(buffer, (added if heavy_ball else average)[i])
    state = optimizer.state[module["norm"].weight]
    assert state["step"].item() == 7
    torch.testing.assert_close(state["exp_avg"], torch.ones(16))
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((16,), 2.0))
    assert module["norm"].bias not in optimizer.state
    fill(module, seed=9)
    optimizer.step()


def test_names_in_the_saved_groups_are_enough():
    module = model()
    theirs = torch.optim.Muon([("a.weight", module["a"].weight), ("b.weight", module["b"].weight)])
    fill(module, seed=1)
    theirs.step()
    optimizer = Muon(module)
    import_state(optimizer, theirs.state_dict(), "torch")
    torch.testing.assert_close(
        optimizer.state[module["b"].weight]["momentum_buffer"], theirs.state[module["b"].weight]["momentum_buffer"]
    )


@pytest.mark.parametrize(
    ("source", "params", "words"),
    [
        ("kellr", ["a.weight"], "did you mean 'keller'"),
        ("keller", ["a.weight", "b.weight"], "3 parameters, but 2 were named"),
        ("keller", ["b.weight", "a.weight", "a.weigth"], "did you mean 'a.weight'"),
        ("keller", None, "does not name its parameters"),
        ("keller", ["a.weight", "norm.weight", "b.weight"], "has shape"),
    ],
)
def test_an_order_that_does_not_fit_is_refused_and_changes_nothing(source, params, words):
    optimizer = Muon(model())
    state = saved("keller", *momenta(1))
    state["state"][1] = {"momentum_buffer": torch.ones(5, 5), "exp_avg": torch.ones(5, 5)}
    with pytest.raises(InputError, match=words):
        import_state(optimizer, state, source, params)
    assert not optimizer.state
