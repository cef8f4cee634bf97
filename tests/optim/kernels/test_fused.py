"""The kernels against fp64 and against the plain step: on a GPU as they are, elsewhere in Triton's interpreter."""

import itertools
from typing import Any

import pytest
import torch
from tests.interpreted import DEVICE, GPU
from torch import Tensor, nn

from muonlab import Muon
from muonlab.optim import kernels
from muonlab.optim.coefficients import resolve
from muonlab.optim.kernels import tables

SPECTRA = (0.0, -1.0, -3.0, -5.0, -7.0)
# An interpreted program takes milliseconds for what a GPU does in nanoseconds.
SHAPES = ((384, 1536), (1792, 896), (128, 300)) if GPU else ((24, 40), (40, 24))
SHAPE, OTHER = ((256, 300), (4, 64, 96)) if GPU else ((24, 40), (2, 16, 24))


class Fused:
    """Steps an optimizer through `FusedStep` whatever the device."""

    def __init__(self, optimizer: Muon) -> None:
        from muonlab.optim.kernels.fused import FusedStep

        self.optimizer, self.make, self.plan, self.plans = optimizer, FusedStep, None, 0

    @torch.no_grad()
    def step(self) -> None:
        groups, states = self.optimizer.param_groups, self.optimizer.state
        gradients = self.plan and self.plan.gradients(groups, states)
        if gradients is None:
            self.plan = self.make(groups, states, self.optimizer._state)
            self.plans += 1
            gradients = self.plan.gradients(groups, states)
        assert self.plan.run(gradients)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Muon.step()` takes the plain path."""
    monkeypatch.setattr(kernels, "step", lambda optimizer, work, state, keep=None: work)


def polynomial(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The standard iteration, normalised in fp64 and iterated in `dtype`."""
    x = x.double() / x.double().norm()
    wide = (x.mT if x.shape[0] > x.shape[1] else x).to(dtype)
    for a, b, c in resolve("polar_express").steps:
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.mT if x.shape[0] > x.shape[1] else wide).double()


def log_spaced(rows: int, cols: int, decades: float) -> Tensor:
    size = min(rows, cols)
    u = torch.linalg.qr(torch.randn(rows, size, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, size, dtype=torch.float64))[0]
    return ((u * torch.logspace(0, decades, size, dtype=torch.float64)) @ v.mT).float().to(DEVICE)


def params_like(shapes: tuple[tuple[int, ...], ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(DEVICE)) for shape in shapes]


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_the_update_is_at_most_that_of_the_standard_fp16_iteration_and_never_above_3_percent(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(1)
    params = [nn.Parameter(torch.zeros(shape, device=DEVICE)) for _ in SPECTRA]
    for param, decades in zip(params, SPECTRA):
        param.grad = 1e-3 * log_spaced(*shape, decades)
    options = {"coefficients": "polar_express", "scale": "none", "momentum": 0.0, "nesterov": False}
    Fused(Muon(params, lr=1.0, weight_decay=0.0, norm_eps=0.0, **options)).step()
    for param, decades in zip(params, SPECTRA):
        assert param.grad is not None
        exact = polynomial(param.grad, torch.float64)
        error = relative(-param.data.double(), exact)
        assert error <= 1.2 * relative(polynomial(param.grad, torch.float16), exact) + 1e-4, decades
        assert error <= 0.03 or min(shape) < 100, decades


@pytest.mark.parametrize("blocks", [(1, 1, 1, 1, 1), (2, 1, 1, 1), (3, 1, 1), (3, 2)])
@pytest.mark.parametrize("shape", ((300, 712), (1200, 300)) if GPU else ((24, 40), (40, 24)))
def test_steps_in_blocks_of_any_length_make_the_same_polynomial(
    shape: tuple[int, int], blocks: tuple[int, ...]
) -> None:
    from muonlab.optim.kernels import iteration

    count, (rows, cols), m = 3, shape, min(shape)
    matrices = [log_spaced(rows, cols, decades) for decades in (0.0, -1.0, -3.0)]
    x = torch.zeros(count, rows, tables.pitch_of(cols), dtype=torch.float16, device=DEVICE)
    x[:, :, :cols] = torch.stack(matrices)
    scale = 1 / torch.linalg.vector_norm(x.float(), dim=(1, 2))
    section = iteration.Section(x, torch.zeros_like(x), cols, 0)
    work = iteration.Workspace.allocate(count, m, x.dtype, DEVICE)
    (result,) = iteration.iterate([section], work, resolve("polar_express").steps, blocks, scale)
    for made, matrix in zip(result.x[:, :, :cols].double() * scale[:, None, None], matrices):
        assert relative(made, polynomial(matrix, torch.float64)) < (0.03 if m >= 128 else 0.06)


@pytest.mark.parametrize("change", ["clear", "pop", "replace"])
@pytest.mark.usefixtures("plain")
def test_state_that_is_replaced_is_noticed(change: str) -> None:
    params = params_like((SHAPE, OTHER))
    fused = Fused(Muon(params, lr=0.02))
    for param in params:
        param.grad = torch.randn_like(param)
    fused.step()
    state = fused.optimizer.state
    if change == "clear":
        state.clear()
    elif change == "pop":
        state.pop(params[0])
    else:
        state[params[0]] = {name: torch.zeros_like(value) for name, value in state[params[0]].items()}
    fused.step()
    assert fused.plans == 2
    assert fused.optimizer.state[params[0]]["momentum_buffer"].any()


@pytest.mark.usefixtures("plain")
def test_a_step_after_a_replay_of_a_users_capture_reads_its_own_gradients() -> None:
    ours, theirs = params_like((SHAPE,)), params_like((SHAPE,))
    fused, twin = Fused(Muon(ours, lr=0.02)), Fused(Muon(theirs, lr=0.02))
    for mine, other in zip(ours, theirs):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    fused.step(), twin.step()
    plan = fused.plan
    assert plan is not None
    plan._captured.append(([], plan._pointers.clone()))
    plan._pointers.zero_()  # what a replay leaves: the addresses of its capture
    fused.step(), twin.step()
    for mine, other in zip(ours, theirs):
        assert torch.equal(mine, other)


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "heavy ball, no nesterov, cautious": {"heavy_ball": True, "nesterov": False, "cautious_decay": True},
    "tiles": {"block_size": 16, "scaled_decay": True},
    "bf16 momentum, idle moves": {"momentum_dtype": "bfloat16", "idle": "move"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("plain")
def test_steps_equal_the_plain_ones_for_moving_transposed_vanishing_and_idle_gradients(name: str) -> None:
    shapes = (SHAPE, SHAPE[::-1], OTHER, (16, 20), (33,), (64,))
    ours, theirs = params_like(shapes), params_like(shapes)
    fused = Fused(Muon(ours, lr=0.02, **OPTIONS[name]))
    plain = Muon(theirs, lr=0.02, dtype="float32", **OPTIONS[name])
    for step in range(3):
        torch.manual_seed(10 + step)
        for i, (mine, other) in enumerate(zip(ours, theirs)):
            # Norms that jump by a factor of 1e6, an idle expert, rows without a gradient, another layout.
            grad = torch.randn(mine.shape).to(DEVICE) * 1e-6**step
            if i == 0 and step == 1:
                grad = grad.mT.contiguous().mT
            if i == 1:
                grad[:8] = 0
            if i == 2:
                grad[1] = 0
            mine.grad, other.grad = grad, grad.clone()
            if i in (3, 5) and step == 2:
                mine.grad = other.grad = None
        for group in (*fused.optimizer.param_groups, *plain.param_groups):
            group["lr"] = 0.02 / (1 + step)
        fused.step()
        plain.step()
    for mine, other in zip(ours, theirs):
        assert relative(mine.data, other.data) < 2e-4
        for key, value in plain.state[other].items():
            assert relative(fused.optimizer.state[mine][key].float(), value.float()) < (
                0.01 if "bf16" in name else 1e-5
            )


@pytest.mark.parametrize("shape", ((300, 712), (257, 257), (420, 330)) if GPU else ((33, 70), (41, 41), (50, 37)))
def test_products_of_ragged_tiles_are_right_and_write_nothing_but_their_matrices(shape: tuple[int, int]) -> None:
    from muonlab.optim.kernels import iteration

    torch.manual_seed(4)
    count, (rows, cols), m = 3, shape, min(shape)
    buffers = []

    def bank(height: int, width: int) -> Tensor:
        pitch = tables.pitch_of(width)
        flat = torch.full((count * height * pitch + 512,), 7.0, dtype=torch.float16, device=DEVICE)
        inner = flat[256:-256].view(count, height, pitch)
        buffers.append((flat, inner[:, :, width:]))
        return inner

    def symmetric(rest: bool = False) -> iteration.Symmetric:
        diagonal = torch.full((count, m), 7.0, device=DEVICE)
        return iteration.Symmetric(bank(m, m), diagonal, bank(m, m) if rest else None)

    def whole(s: iteration.Symmetric) -> Tensor:
        off = s.off[:, :, :m].float()
        assert (off.diagonal(dim1=1, dim2=2) == 0).all()
        return off + torch.diag_embed(s.diagonal)

    x, y = bank(rows, cols), bank(rows, cols)
    x[:, :, :cols] = (torch.randn(count, rows, cols) / (rows * cols) ** 0.5).to(DEVICE)
    section = iteration.Section(x, y, cols, 0)
    gram, half, factor, operand = symmetric(rest=True), symmetric(rest=True), symmetric(), symmetric()
    scale = torch.tensor([1.0, 0.5, 2.0], device=DEVICE)
    before = 1 + 1e-2 * torch.rand(count, m, device=DEVICE)
    ratios = torch.full((count, m), 7.0, device=DEVICE)
    iteration._gram(section, gram, scale, before, keep_rest=True)
    iteration._symmetric(gram, gram, factor, False, 2 / iteration.GAIN**2, -3 / iteration.GAIN, 1.5)
    iteration._symmetric(factor, gram, half, True)
    made = operand.whole(ratios)
    iteration._symmetric(gram, gram, made, True, 2 / iteration.GAIN**2, -3 / iteration.GAIN, 1.5, before=before)
    iteration._multiply(made.off, section)

    own = x[:, :, :cols].double() * scale[:, None, None]
    known = own * (before[:, :, None] if rows <= cols else before[:, None, :])
    r = known @ known.mT if rows <= cols else known.mT @ known
    w = 1.5 * torch.eye(m, dtype=torch.float64, device=DEVICE) - 3 * r + 2 * r @ r
    assert relative(whole(gram) / iteration.GAIN, r) < 5e-4
    assert relative(whole(factor), w) < 5e-4
    assert relative(whole(half) / iteration.GAIN, w @ r) < 5e-4
    assert half.rest is not None
    exact = whole(half) + half.rest[:, :, :m].float() / 2048
    assert relative(exact.tril() / iteration.GAIN, (w @ r).tril()) < 1e-4
    stored = made.off[:, :, :m].double()
    assert relative(stored, w * before[:, None, :]) < 5e-4
    diagonal = (stored.diagonal(dim1=1, dim2=2) * ratios) / before
    assert relative(diagonal, w.diagonal(dim1=1, dim2=2)) < 1e-5
    result = y[:, :, :cols].double() * scale[:, None, None]
    result *= ratios[:, :, None] if rows <= cols else ratios[:, None, :]
    assert relative(result, w @ known if rows <= cols else known @ w) < 1e-3
    for flat, padding in buffers:
        assert (torch.cat((flat[:256], flat[-256:], padding.flatten())) == 7).all()


def test_a_matrix_with_a_nan_becomes_nan_and_its_neighbour_does_not() -> None:
    params = params_like((SHAPE, SHAPE))
    for param in params:
        param.grad = torch.randn_like(param)
    params[0].grad[0, 0] = torch.nan
    fused = Fused(Muon(params, lr=0.1))
    fused.step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all()


def test_the_size_of_the_gradient_does_not_matter_over_60_decades() -> None:
    results = []
    for size in (1e-30, 1.0, 1e30):
        (param,) = params_like((SHAPE,))
        torch.manual_seed(3)
        param.grad = torch.randn(SHAPE).to(DEVICE) * size
        Fused(Muon([param], lr=0.1, weight_decay=0.0, norm_eps=0.0)).step()
        results.append(param.data.clone())
    assert relative(results[0], results[1]) < 1e-4
    assert relative(results[2], results[1]) < 1e-4


def test_new_addresses_need_no_new_plan_and_a_new_layout_does() -> None:
    (param,) = params_like((SHAPE,))
    fused = Fused(Muon([param], lr=0.1))
    for grad in (torch.randn_like(param), torch.randn_like(param), None, torch.randn_like(param)):
        param.grad = grad
        fused.step()
    assert fused.plans == 1
    param.grad = torch.randn_like(param).mT.contiguous().mT
    fused.step()
    assert fused.plans == 2


def test_an_update_that_is_not_to_be_kept_changes_nothing_and_the_next_one_counts() -> None:
    params = params_like((SHAPE, (33,)))
    fused = Fused(Muon(params, lr=0.1))
    for param in params:
        param.grad = torch.randn_like(param)
    fused.step()
    values = [param.detach().clone() for param in params]
    states = [{k: v.clone() for k, v in fused.optimizer.state[param].items()} for param in params]
    gradients = fused.plan.gradients(fused.optimizer.param_groups, fused.optimizer.state)
    fused.plan.run(gradients, torch.tensor(False, device=DEVICE))
    for param, value, state in zip(params, values, states):
        assert torch.equal(param, value)
        assert all(torch.equal(fused.optimizer.state[param][name], old) for name, old in state.items())
    fused.plan.run(gradients, torch.tensor(True, device=DEVICE))
    assert not any(torch.equal(param, value) for param, value in zip(params, values))


def test_loaded_state_is_used() -> None:
    ours, theirs = params_like((SHAPE, (33,))), params_like((SHAPE, (33,)))
    first, second = Fused(Muon(ours, lr=0.1)), Fused(Muon(theirs, lr=0.1))
    for step in range(3):
        for mine, other in zip(ours, theirs):
            torch.manual_seed(step)
            mine.grad = torch.randn(mine.shape).to(DEVICE)
            other.grad = mine.grad.clone()
        first.step()
        if step < 2:
            second.step()
        if step == 1:  # a detour that loading has to undo
            saved = {"state": first.optimizer.state_dict(), "params": [param.detach().clone() for param in ours]}
            second.step()
            second.optimizer.load_state_dict(saved["state"])
            for param, value in zip(theirs, saved["params"]):
                param.data.copy_(value)
    second.step()
    for mine, other in zip(ours, theirs):
        assert relative(other.data, mine.data) < 1e-6


def test_kernels_that_do_not_agree_with_torch_are_refused_before_anything_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from muonlab.optim.kernels import iteration

    (param,) = params_like((SHAPE,))
    param.grad = torch.randn_like(param)
    before = param.detach().clone()
    multiply = iteration._multiply
    monkeypatch.setattr(iteration, "_multiply", lambda q, section: multiply(q.mT.roll(1, 1), section))
    with pytest.raises(kernels.Unsupported, match="do not agree with torch"):
        Fused(Muon([param])).step()
    assert torch.equal(param, before)


def test_whatever_ends_a_plan_or_its_capture_is_one_line_and_not_an_error_of_another_kind() -> None:
    from muonlab.optim.kernels import fused

    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried\nand more"), AssertionError()):
        with pytest.raises(kernels.Unsupported) as caught, fused._refusing():
            raise error
        assert len(str(caught.value).splitlines()) == 1
        assert type(error).__name__ in str(caught.value)
    with pytest.raises(kernels.Unsupported, match=r"^as it is$"), fused._refusing():
        raise kernels.Unsupported("as it is")


@pytest.mark.parametrize("change", ["other data", "other strides", "other dtype", "other strides of the parameter"])
def test_a_tensor_that_changes_in_place_is_noticed(change: str) -> None:
    param, _ = params = params_like((SHAPE, (33,)))
    fused = Fused(Muon(params, lr=0.1))
    for each in params:
        each.grad = torch.randn_like(each)
    fused.step()
    before, grad = param.detach().clone(), param.grad
    assert grad is not None
    if change == "other data":
        grad.data = torch.full_like(grad, torch.nan)
    elif change == "other strides":
        grad.data = grad.data.mT.contiguous().mT
    elif change == "other dtype":
        grad.data = grad.data.view(torch.int32).bfloat16()
    else:
        param.data = torch.as_strided(param.data, SHAPE, (1, SHAPE[0]))
        before = param.detach().clone()
    assert param.grad is grad
    fused.step()
    assert fused.plans == (1 if change == "other data" else 2)
    assert param.isnan().all() if change == "other data" else not torch.equal(param, before)


def test_state_of_other_parameters_may_come_and_go_and_costs_no_plan() -> None:
    params = params_like((SHAPE, (33,)))
    fused = Fused(Muon(params, lr=0.1))
    other = nn.Parameter(torch.zeros(3))
    for step in range(3):
        if step == 1:
            fused.optimizer.state[other] = {"exp_avg": torch.zeros(3)}
        elif step == 2:
            fused.optimizer.state.pop(other)
        for param in params:
            param.grad = torch.randn_like(param)
        before = [param.detach().clone() for param in params]
        fused.step()
        assert not any(torch.equal(param, value) for param, value in zip(params, before))
    assert fused.plans == 1


def test_hyper_parameters_that_change_reach_the_device_whatever_numbers_they_are() -> None:
    ours, theirs = params_like((SHAPE, (33,))), params_like((SHAPE, (33,)))
    fused, twin = Fused(Muon(ours, lr=0.1)), Fused(Muon(theirs, lr=0.1))
    for lr in (0.1, 1, torch.tensor(0.25), 0.0):
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for group in fused.optimizer.param_groups:
            group["lr"] = lr
        for group in twin.optimizer.param_groups:
            group["lr"] = float(lr)
        before = [mine.detach().clone() for mine in ours]
        fused.step()
        twin.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs))
        assert all(torch.equal(mine, value) for mine, value in zip(ours, before)) == (lr == 0.0)
    assert fused.plans == 1


@pytest.mark.parametrize("index", [0, 1])
def test_a_parameter_that_outgrew_its_state_is_refused(index: int) -> None:
    params = params_like((SHAPE, (33,)))
    fused = Fused(Muon(params, lr=0.1))
    for param in params:
        param.grad = torch.randn_like(param)
    fused.step()
    params[index].grad = None
    params[index].data = torch.cat([params[index].data] * 2)
    params[index].grad = torch.randn_like(params[index])
    with pytest.raises(kernels.Unsupported, match="another shape"):
        fused.step()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("change", ["the parameter", "the gradient", "the parameter, then a gradient like it"])
def test_a_tensor_that_shrinks_in_place_is_noticed(change: str, index: int) -> None:
    params = params_like((SHAPE, (33,)))
    fused = Fused(Muon(params, lr=0.1))
    for each in params:
        each.grad = torch.randn_like(each)
    fused.step()
    param = params[index]
    shrunk = param.grad if change == "the gradient" else param
    assert shrunk is not None
    before = shrunk.data_ptr(), shrunk.stride()
    shrunk.data = shrunk.data[: len(shrunk) // 2]
    assert (shrunk.data_ptr(), shrunk.stride()) == before
    if "then" in change:
        param.grad = torch.randn_like(param)
    assert fused.plan.gradients(fused.optimizer.param_groups, fused.optimizer.state) is None


@pytest.mark.parametrize("part", ["parameter", "gradient"])
@pytest.mark.parametrize("change", ["other rows and columns", "other gaps"])
def test_a_tensor_that_keeps_its_address_and_its_size_but_not_its_layout_is_noticed(change: str, part: str) -> None:
    rows, cols = SHAPE
    (param,) = params_like((SHAPE,))
    param.grad = torch.randn_like(param)
    around = torch.randn(2 * rows, 2 * cols, device=DEVICE)
    tensor = param if part == "parameter" else param.grad
    other = around.flatten()[: 2 * rows * cols].view(2 * rows, cols)
    tensor.data = other[:rows] if change == "other rows and columns" else around[:rows, :cols]
    fused = Fused(Muon([param], lr=0.1))
    fused.step()
    before = tensor.data_ptr(), tensor.numel()
    tensor.data = other[:, : cols // 2] if change == "other rows and columns" else around[::2, :cols]
    assert (tensor.data_ptr(), tensor.numel()) == before
    assert fused.plan.gradients(fused.optimizer.param_groups, fused.optimizer.state) is None


def test_coefficients_made_for_scaled_rows_step_through_torch() -> None:
    groups = Muon([nn.Parameter(torch.zeros(8, 8))], coefficients="aol4").param_groups
    assert kernels._obstacle(groups) == "coefficients made for scaled rows ('aol4')"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the interpreter has no bfloat16 products")
def test_in_bfloat16_the_error_is_at_most_that_of_the_standard_bfloat16_iteration() -> None:
    params = [nn.Parameter(torch.zeros(512, 1024, device=DEVICE)) for _ in SPECTRA]
    for param, decades in zip(params, SPECTRA):
        param.grad = 1e-3 * log_spaced(512, 1024, decades)
    options = {"coefficients": "polar_express", "scale": "none", "momentum": 0.0, "nesterov": False}
    Fused(Muon(params, lr=1.0, weight_decay=0.0, norm_eps=0.0, dtype="bfloat16", **options)).step()
    for param, decades in zip(params, SPECTRA):
        assert param.grad is not None
        exact = polynomial(param.grad, torch.float64)
        error = relative(-param.data.double(), exact)
        assert error <= 1.2 * relative(polynomial(param.grad, torch.bfloat16), exact) + 1e-3, decades


def test_whatever_tiles_are_chosen_nothing_is_read_that_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tune` fills the workspace with NaN first."""
    from muonlab.optim.kernels import iteration, products

    m, n = (320, 648) if GPU else (40, 72)
    steps = resolve("polar_express").steps
    kernels_ = (products.gram_kernel, products.symmetric_kernel)
    choices = [products.fitting(kernel.configs, names) for kernel, names in zip(kernels_, ({"m": m, "n": n}, {"m": m}))]
    for chosen in itertools.product(*choices):
        for kernel, config in zip(kernels_, chosen):
            monkeypatch.setattr(kernel, "configs", [config])
        work = iteration.Workspace.allocate(2, m, torch.float16, DEVICE)
        x, y = (torch.zeros(2, m, n, dtype=torch.float16, device=DEVICE) for _ in range(2))
        scale = torch.ones(2, device=DEVICE)
        for blocks in ((1, 1, 1, 1, 1), (2, 1, 1, 1), (3, 1, 1), (3, 2)):
            error = iteration.tune([iteration.Section(x, y, n, 0)], work, steps, blocks, scale)
            assert error < 0.02, (blocks, *(config.kwargs for config in chosen))


def test_tiles_that_read_what_rounding_took_are_never_larger_than_those_that_wrote_it() -> None:
    from muonlab.optim.kernels import products

    for m in (8, 64, 65, 384, 512, 513, 4096):
        gram = products.fitting(products.gram_kernel.configs, {"m": m, "n": 2 * m})
        symmetric = products.fitting(products.symmetric_kernel.configs, {"m": m})
        writers, readers = ([c.kwargs["BLOCK"] for c in configs] for configs in (gram + symmetric, symmetric))
        assert max(readers) <= min(writers), m


@pytest.mark.parametrize("readers", ["small", "large"])
def test_tiles_that_read_what_was_not_written_do_not_pass_although_tuning_tried_larger_ones(
    readers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuning runs all candidates: the larger one leaves what the smaller one, R's here, does not write."""
    import triton

    from muonlab.optim.kernels import iteration, products

    small, large = (64, 128) if GPU else (16, 32)
    m, n = (256, 600) if GPU else (32, 48)

    def choose(kernel: Any, hook: Any, wanted: int) -> None:
        turns = itertools.cycle((small, large))

        def bench(call: Any, quantiles: Any) -> list[float]:
            call()
            return [float(next(turns) != wanted)] * 3

        depth, stages = (64, 3) if GPU else (16, 1)
        configs = [
            triton.Config({"BLOCK": block, "DEPTH": depth}, num_warps=4, num_stages=stages, pre_hook=hook)
            for block in (small, large)
        ]
        monkeypatch.setattr(kernel, "configs", configs)
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setattr(kernel, "early_config_prune", lambda configs, *_, **__: configs)
        monkeypatch.setitem(kernel.__dict__, "do_bench", bench)

    choose(products.gram_kernel, products._tile_gram, small)
    choose(products.symmetric_kernel, products._tile_symmetric, {"small": small, "large": large}[readers])
    work = iteration.Workspace.allocate(1, m, torch.float16, DEVICE)
    x, y = (torch.zeros(1, m, n, dtype=torch.float16, device=DEVICE) for _ in range(2))
    sections, steps = [iteration.Section(x, y, n, 0)], resolve("polar_express").steps
    error = iteration.tune(sections, work, steps, (3, 1, 1), torch.ones(1, device=DEVICE))
    assert (error < 0.02) == (readers == "small")
