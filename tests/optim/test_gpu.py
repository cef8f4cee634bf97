"""The plain torch path on a CUDA device: the same updates, no host sync, and a step that can be captured."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from muonlab import Muon, orthogonalize
from muonlab.models import ModelOptions, Transformer
from muonlab.optim import OPTIMIZERS, build_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(50, 32), nn.Linear(32, 96), nn.LayerNorm(96), nn.Linear(96, 32, bias=False), nn.Linear(32, 50)
    )


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        value = torch.randn(param.shape, generator=generator).to(param)
        if param.grad is None:
            param.grad = value
        else:
            param.grad.copy_(value)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "class"])
def test_updates_on_the_device_equal_those_on_the_cpu(name):
    here, there = small_model(), small_model().cuda()
    extra = {"dtype": "float32"} if name == "muon" else {}
    options = OPTIMIZERS[name].options(lr=1e-2, **extra)
    optimizers = [build_optimizer(model, options) for model in (here, there)]
    for update in range(20):
        for model, optimizer in zip((here, there), optimizers):
            gradients(model, update)
            optimizer.step()
    for p, q in zip(here.parameters(), there.parameters()):
        close = (p - q.cpu()).abs() <= 1e-4 + 1e-4 * p.abs()
        assert close.double().mean() >= (0.999 if name == "lion" else 1.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precision_iterations_are_as_exact_as_stated(dtype):
    x = torch.randn(8, 256, 1024, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(x.double(), dtype="float64")
    o = orthogonalize(x.cuda(), dtype=dtype).double().cpu()
    bound = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 1e-4}[dtype]
    assert (o - exact).norm() / exact.norm() < bound
    assert orthogonalize(x.cuda()).dtype == torch.float16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_nonfinite": True, "normuon_beta": 0.95, "idle": "fade"},
        {"method": "mud", "momentum_dtype": "int8", "normuon_axis": "entries", "normuon_beta": 0.95},
        {"mars_gamma": 0.025, "laprop_beta": 0.99, "cautious_update": True, "nuclear_scale": True},
        {"row_fraction": 0.5, "normuon_axis": "sum", "normuon_beta": 0.0, "decay_form": "l2"},
        {"fixed_norm": True, "stiefel": True, "block_size": 24, "block_period": 2},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.filterwarnings("ignore:the fast GPU step does not cover")
def test_a_step_does_not_wait_for_the_device(options):
    model = small_model().cuda()
    optimizer = Muon(model, **options)
    gradients(model, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["muon", "adamw", "lion", "sophia", "sgd"])
def test_a_captured_step_replays_as_eager_ones_and_follows_a_live_learning_rate(name):
    eager = small_model().cuda()
    captured = copy.deepcopy(eager)
    optimizers = [build_optimizer(model, OPTIMIZERS[name].options(lr=0.01)) for model in (eager, captured)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")

    def step(i, update):
        gradients((eager, captured)[i], update)
        optimizers[i].step()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for update in range(3):
            step(0, update)
            step(1, update)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gradients(captured, 3)
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for update in range(3, 8):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(0.01 / update)
        step(0, update)
        gradients(captured, update)
        graph.replay()
    for p, q in zip(eager.parameters(), captured.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_qk_clip_is_captured_with_forward_backward_and_step():
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=40, seq_len=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, fused_qkv=True
    )
    eager = Transformer(replace(options, init_std=1.0)).cuda()
    captured = copy.deepcopy(eager)
    models = (eager, captured)
    optimizers = [Muon(model, lr=torch.tensor(1e-3, device="cuda"), qk_clip=5.0, dtype="float32") for model in models]
    tokens = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(1)).cuda()

    def update(i):
        optimizers[i].zero_grad(set_to_none=True)
        models[i](tokens).hidden.square().mean().backward()
        optimizers[i].step()

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            update(0)
            update(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    optimizers[1].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        update(1)
    for _ in range(5):
        update(0)
        graph.replay()
    for p, q in zip(eager.parameters(), captured.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    eager(tokens)
    assert max(block.attention.logit_meter.largest.max().item() for block in eager.blocks) < 5.0 * 1.2


def test_state_moves_with_the_parameters_it_is_loaded_for():
    here = small_model()
    optimizer = Muon(here)
    gradients(here, 0)
    optimizer.step()
    there = copy.deepcopy(here).cuda()
    loaded = Muon(there)
    loaded.load_state_dict(optimizer.state_dict())
    assert {value.device.type for state in loaded.state.values() for value in state.values()} == {"cuda"}
    gradients(there, 1)
    loaded.step()
