"""`Muon.step()` as shipped on a GPU: the graph, what moves between steps, a user's own capture, fallbacks."""

import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from muonlab import Muon
from muonlab.optim import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = ((300, 256), (256, 300), (4, 64, 96), (33, 40), (33,), (64,))


def build(**options: object) -> Muon:
    torch.manual_seed(0)
    return Muon([nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES], **options)


def params_of(optimizer: Muon) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def plain(optimizer: Muon) -> Muon:
    """The same optimizer on torch's path."""
    kernels._plans.setdefault(optimizer, kernels._Plans()).refused = "test"
    return optimizer


def assert_close(ours: Muon, theirs: Muon) -> None:
    for mine, other in zip(params_of(ours), params_of(theirs)):
        assert float((mine - other).norm() / other.norm()) < 1e-4


def new_gradients(ours: Muon, theirs: Muon) -> None:
    for mine, other in zip(params_of(ours), params_of(theirs)):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()


def test_replays_follow_fresh_gradients_and_a_scheduled_learning_rate() -> None:
    ours, theirs = build(), plain(build())
    for step in range(5):
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + step)
        new_gradients(ours, theirs)
        ours.step()
        theirs.step()
    assert kernels._plans[ours].made == 1
    assert kernels._plans[ours].refused is None
    assert_close(ours, theirs)


def test_a_host_far_ahead_of_the_device_changes_nothing_that_earlier_steps_read() -> None:
    ours, theirs = build(), plain(build())
    rates = [0.02 if step % 3 == 0 else 1e-4 for step in range(21)]
    gradients = [[torch.randn_like(param) for param in params_of(ours)] for _ in rates]

    def steps(optimizer: Muon, first: int, last: int) -> None:
        for rate, own in zip(rates[first:last], gradients[first:last]):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for param, grad in zip(params_of(optimizer), own):
                param.grad = grad.clone()
            optimizer.step()

    steps(ours, 0, 1)
    torch.cuda._sleep(1_000_000_000)  # half a second and more
    steps(ours, 1, 9)
    assert not torch.cuda.current_stream().query()
    steps(ours, 9, 21)
    steps(theirs, 0, 21)
    assert kernels._plans[ours].made == 1
    assert_close(ours, theirs)


def test_gradients_that_vanish_appear_or_change_layout_are_noticed() -> None:
    ours, theirs = build(), plain(build())
    for step in range(6):
        new_gradients(ours, theirs)
        for optimizer in (ours, theirs):
            params = params_of(optimizer)
            if step < 2:
                params[1].grad = None
            if step == 4:
                params[4].grad = None
            if step >= 3 and params[0].grad is not None:
                params[0].grad = params[0].grad.mT.contiguous().mT
        ours.step()
        theirs.step()
    assert kernels._plans[ours].refused is None
    assert_close(ours, theirs)


def test_a_parameter_whose_storage_is_replaced_is_updated_where_it_now_is() -> None:
    ours, theirs = build(), plain(build())
    for step in range(4):
        if step == 2:
            for param in params_of(ours):
                param.data = param.data.clone()
        new_gradients(ours, theirs)
        ours.step()
        theirs.step()
    assert_close(ours, theirs)


def test_a_users_own_capture_follows_live_learning_rates_and_gradients_at_other_addresses() -> None:
    ours = build(lr=torch.tensor(0.02, device="cuda"))
    theirs = plain(build(lr=torch.tensor(0.02, device="cuda")))
    new_gradients(ours, theirs)
    ours.step()
    theirs.step()
    for param in params_of(ours):
        param.grad = torch.zeros_like(param)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(3):
        for mine, other in zip(params_of(ours), params_of(theirs)):
            assert mine.grad is not None
            mine.grad.normal_()
            other.grad = mine.grad.clone()
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"].fill_(0.02 / (2 + step))
        graph.replay()
        theirs.step()
    assert_close(ours, theirs)


def test_live_options_that_become_numbers_again_are_followed() -> None:
    ours, theirs = build(weight_decay=0.5), plain(build(weight_decay=0.5))
    live = torch.tensor(0.03, device="cuda")
    for step, decay in enumerate((0.5, live, 0.0, live, 0.25)):
        new_gradients(ours, theirs)
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["weight_decay"] = decay
                group["lr"] = live if step == 3 else 0.02
        ours.step()
        theirs.step()
    assert kernels._plans[ours].refused is None
    assert_close(ours, theirs)


def test_the_same_steps_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        optimizer = build()
        for step in range(3):
            torch.manual_seed(step)
            for param in params_of(optimizer):
                param.grad = torch.randn_like(param)
            optimizer.step()
        results.append([param.detach().clone() for param in params_of(optimizer)])
    assert all(torch.equal(first, second) for first, second in zip(*results))


def said_in_two_steps(ours: Muon, theirs: Muon) -> list[str]:
    """Warnings; both optimizers must come to the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            new_gradients(ours, theirs)
            ours.step()
            theirs.step()
    assert_close(ours, theirs)
    return [str(warning.message) for warning in caught]


def test_an_option_without_a_kernel_steps_through_torch_and_says_so_once() -> None:
    ours, theirs = build(normuon_beta=0.95), plain(build(normuon_beta=0.95))
    (line,) = said_in_two_steps(ours, theirs)
    assert "normuon_beta" in line


def test_a_step_whose_graph_has_no_memory_steps_through_torch_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from muonlab.optim.kernels import fused

    def full(plan: fused.FusedStep) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB.")

    monkeypatch.setattr(fused.FusedStep, "_launch", full)
    ours, theirs = build(), plain(build())
    (line,) = said_in_two_steps(ours, theirs)
    assert "OutOfMemoryError" in line


def test_workspace_stays_within_its_bound() -> None:
    params = [nn.Parameter(torch.randn(512, 1024, device="cuda")) for _ in range(40)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Muon(params, max_workspace_bytes=32 << 20)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    kernels._plans[optimizer].current = None
    torch.cuda.synchronize()
    assert before - torch.cuda.memory_allocated() < 48 << 20


def test_sums_in_fp16_that_a_model_allows_itself_are_not_the_optimizers() -> None:
    torch.manual_seed(0)
    grad = torch.randn(896, 2048, device="cuda")
    results = []
    allowed = torch.backends.cuda.matmul.allow_fp16_accumulation
    try:
        for allow in (False, True):
            torch.backends.cuda.matmul.allow_fp16_accumulation = allow
            param = nn.Parameter(torch.zeros_like(grad))
            param.grad = grad.clone()
            Muon([param], lr=1.0, weight_decay=0.0).step()
            results.append(param.detach())
            assert torch.backends.cuda.matmul.allow_fp16_accumulation == allow
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = allowed
    assert torch.equal(*results)


def test_the_first_step_compiles_nothing_that_was_not_compiled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from muonlab.optim.kernels import elementwise, fused, products

    kernels_ = [products.gram_kernel.fn, products.symmetric_kernel.fn, *vars(elementwise).values()]
    for kernel in kernels_:
        if hasattr(kernel, "device_caches"):
            kernel.device_caches.clear()  # as in a new process
    late: list[str] = []
    together = fused.compile_together

    def counted(launches: Iterable[Callable[[], object]]) -> None:
        together(launches)
        monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: late.append(event["repr"]))

    monkeypatch.setattr(fused, "compile_together", counted)
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((320, 648), (648, 320), (24, 40), (33,))]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Muon(params)
    optimizer.step()
    assert kernels._plans[optimizer].refused is None
    assert late == []
