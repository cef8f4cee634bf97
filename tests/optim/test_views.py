"""Views share the memory of the parameter, and optimizing a view is optimizing its parts as parameters of their own."""

import pytest
import torch
from torch import nn

from muonlab import Muon, orthogonalize
from muonlab.errors import InputError
from muonlab.optim.scaling import scale_factor
from muonlab.optim.views import describe, matrices, shapes

VIEWS = {
    "transpose": ((12, 20), (("transpose",),)),
    "experts transposed": ((3, 12, 20), (("transpose",),)),
    "conv": ((12, 4, 3, 3), (("conv", 1),)),
    "conv grouped": ((12, 4, 3, 3), (("conv", 3),)),
    "conv transposed": ((12, 4, 3, 3), (("conv_transpose", 2),)),
    "split uneven": ((20, 12), (("split", 0, (10, 6, 4)),)),
    "split columns": ((12, 20), (("split", 1, (15, 5)),)),
    "rows that take turns": ((20, 12), (("interleaved", 2),)),
    "heads": ((20, 12), (("heads", 0, 5),)),
    "heads of columns": ((12, 20), (("heads", 1, 5),)),
    "tiles even": ((12, 20), (("tiles", 4),)),
    "tiles ragged": ((13, 22), (("tiles", 5),)),
    "tiles of experts": ((3, 13, 22), (("tiles", 5),)),
    "all of it": ((24, 13), (("split", 0, (12, 8, 4)), ("heads", 0, 4), ("tiles", 3))),
}


def entries(stacks):
    return sum(stack.numel() for stack in stacks)


@pytest.mark.parametrize(("shape", "view"), VIEWS.values(), ids=VIEWS.keys())
def test_a_view_covers_every_entry_once_and_writes_through(shape, view):
    x = torch.zeros(shape)
    stacks = matrices(x, view)
    assert entries(stacks) == x.numel()
    for stack in stacks:
        stack += 1
    assert torch.equal(x, torch.ones(shape))
    assert [tuple(stack.shape) for stack in stacks] == shapes(shape, view)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_outputs_by_inputs_times_kernel_in_every_memory_format(channels_last):
    x = torch.randn(8, 4, 3, 5)
    gradient = torch.randn(8, 4, 3, 5)
    param = x.to(memory_format=torch.channels_last) if channels_last else x
    (stack,) = matrices(param, (("conv", 1),))
    (of_gradient,) = matrices(gradient, (("conv", 1),), param)
    stack.copy_(of_gradient)
    assert torch.equal(param, gradient)
    assert torch.linalg.svdvals(stack[0]).allclose(torch.linalg.svdvals(gradient.flatten(1)), atol=1e-5)


def test_a_grouped_convolution_is_one_matrix_a_group():
    x = torch.randn(6, 2, 3)
    (stack,) = matrices(x, (("conv", 3),))
    assert torch.equal(stack, x.flatten(1).view(3, 2, 6))


@pytest.mark.parametrize(
    ("shape", "view", "words"),
    [
        ((20, 12), (("split", 0, (10, 5)),), "does not add up to the 20 rows"),
        ((20, 12), (("interleaved", 3),), "cannot take turns among 3"),
        ((20, 12), (("heads", 0, 7),), "cannot be divided into heads of 7"),
        ((20, 12), (("tiles", 0),), "at least 1"),
    ],
)
def test_a_view_that_does_not_fit_is_refused(shape, view, words):
    with pytest.raises(InputError, match=words):
        shapes(shape, view)


def test_views_are_described_in_one_line():
    assert describe(()) == "matrix"
    assert describe((("split", 0, (2, 1)), ("tiles", 8))) == "split 0 (2, 1) > tiles 8"


def layer(rows, cols, seed=0):
    torch.manual_seed(seed)
    module = nn.Linear(cols, rows, bias=False)
    module.weight.grad = torch.randn(rows, cols)
    return module


def moved(optimizer, param):
    before = param.detach().clone()
    optimizer.step()
    return before - param.detach()


@pytest.mark.parametrize("size", [20, 64])
def test_tiles_as_large_as_the_matrix_are_full_orthogonalisation(size):
    whole, tiled = layer(12, 20), layer(12, 20)
    a = moved(Muon(whole, dtype="float32"), whole.weight)
    b = moved(Muon(tiled, dtype="float32", block_size=size), tiled.weight)
    assert torch.equal(a, b)


def test_every_tile_ragged_ones_too_is_orthogonalised_and_scaled_as_a_matrix_of_its_own():
    module = layer(13, 22)
    gradient = module.weight.grad.clone()
    optimizer = Muon(module, lr=1.0, weight_decay=0.0, momentum=0.0, dtype="float32", block_size=5, min_dim=1)
    update = moved(optimizer, module.weight)
    for i in range(0, 13, 5):
        for j in range(0, 22, 5):
            tile = gradient[i : i + 5, j : j + 5]
            expected = orthogonalize(tile, dtype="float32") * scale_factor("moonlight", *tile.shape)
            torch.testing.assert_close(update[i : i + 5, j : j + 5], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["keller", "moonlight", "spectral", "none"])
def test_fused_projections_equal_separate_ones_scale_included(scale):
    fused = layer(32, 24)
    parts = [nn.Parameter(part.clone()) for part in fused.weight.detach().split([16, 8, 8])]
    for part, gradient in zip(parts, fused.weight.grad.split([16, 8, 8])):
        part.grad = gradient.clone()
    options = {"lr": 0.1, "scale": scale, "dtype": "float32", "coefficients": "keller", "idle": "move", "norm_eps": 0.0}
    a = Muon(fused, overrides=(_override(split=(16, 8, 8)),), **options)
    b = Muon(parts, weight_decay=0.1, **options)
    for _ in range(3):
        a.step()
        b.step()
    torch.testing.assert_close(fused.weight.detach(), torch.cat([part.detach() for part in parts]), rtol=0, atol=1e-6)


def _override(**fields):
    from muonlab.optim import Override

    return Override(**fields)


def test_heads_of_uneven_grouped_queries_equal_separate_heads():
    fused = layer(48, 24)  # 8 query heads of 4 rows, 2 key heads, 2 value heads
    gradient = fused.weight.grad.clone()
    override = _override(split=(32, 8, 8), head_dim=4)
    optimizer = Muon(fused, lr=1.0, weight_decay=0.0, momentum=0.0, dtype="float32", min_dim=1, overrides=(override,))
    update = moved(optimizer, fused.weight)
    for head in range(12):
        rows = slice(4 * head, 4 * head + 4)
        expected = orthogonalize(gradient[rows], dtype="float32") * scale_factor("moonlight", 4, 24)
        torch.testing.assert_close(update[rows], expected, rtol=0, atol=1e-5)


def test_a_module_may_bring_its_own_split():
    marked, overridden = layer(32, 24), layer(32, 24)
    marked.row_split = (16, 8, 8)
    a = moved(Muon(marked, dtype="float32"), marked.weight)
    b = moved(Muon(overridden, dtype="float32", overrides=(_override(split=(16, 8, 8)),)), overridden.weight)
    assert torch.equal(a, b)


def test_a_fused_conv1d_of_transformers_splits_along_its_outputs():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(24, 16)
    conv.weight.grad = torch.randn(16, 24)
    gradient = conv.weight.grad.T.clone()
    override = _override(name="weight", split=(8, 8, 8))
    optimizer = Muon(conv, lr=1.0, weight_decay=0.0, momentum=0.0, dtype="float32", overrides=(override,))
    update = moved(optimizer, conv.weight).T
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        expected = orthogonalize(gradient[rows], dtype="float32") * scale_factor("moonlight", 8, 16)
        torch.testing.assert_close(update[rows], expected, rtol=0, atol=1e-5)


def test_the_full_matrix_comes_back_every_block_period_with_its_own_learning_rate():
    module, full, tiled = layer(12, 20), layer(12, 20), layer(12, 20)
    options = {"momentum": 0.0, "weight_decay": 0.0, "dtype": "float32"}
    optimizer = Muon(module, lr=1.0, block_size=8, block_period=3, block_lr=0.25, **options)
    of_full = moved(Muon(full, lr=1.0, **options), full.weight)
    of_tiles = moved(Muon(tiled, lr=0.25, block_size=8, **options), tiled.weight)
    for update in range(7):
        expected = of_full if update % 3 == 0 else of_tiles
        torch.testing.assert_close(moved(optimizer, module.weight), expected, rtol=0, atol=2e-6)


def test_a_conv1d_of_transformers_moves_as_the_linear_layer_that_it_is():
    from transformers.pytorch_utils import Conv1D

    linear = layer(24, 16)
    conv = Conv1D(24, 16)
    conv.weight.data.copy_(linear.weight.T)
    conv.weight.grad = linear.weight.grad.T.clone()
    conv.bias.grad = torch.zeros(24)
    for scale in ("keller", "moonlight", "spectral"):
        a, b = Muon(linear, scale=scale, dtype="float32"), Muon(conv, scale=scale, dtype="float32")
        a.step()
        b.step()
        torch.testing.assert_close(conv.weight.detach(), linear.weight.detach().T, rtol=0, atol=1e-6)


def test_gate_and_up_that_take_turns_are_two_matrices():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=2)
    torch.manual_seed(0)
    stack = GptOssExperts(config)
    for param in stack.parameters():
        param.data.normal_()
        param.grad = torch.randn(param.shape)
    gradient = stack.gate_up_proj.grad.mT.clone()  # [2, 48, 16], rows of gate and up in turns
    optimizer = Muon(stack, lr=1.0, weight_decay=0.0, momentum=0.0, dtype="float32")
    update = moved(optimizer, stack.gate_up_proj).mT
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        expected = orthogonalize(gradient[:, rows], dtype="float32") * scale_factor("moonlight", 24, 16)
        torch.testing.assert_close(update[:, rows], expected, rtol=0, atol=1e-5)
