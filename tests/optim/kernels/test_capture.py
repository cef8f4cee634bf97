"""Capturing a CUDA graph beside whatever else the process does."""

import gc
from collections.abc import Callable

import pytest
import torch

from muonlab.optim.kernels.capture import capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def garbage_with_a_graph() -> None:
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        torch.zeros(1, device="cuda")
    cycle: list[object] = [graph]
    cycle.append(cycle)


def test_garbage_that_holds_another_graph_does_not_spoil_a_capture() -> None:
    gc.collect()
    total = torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    garbage_with_a_graph()
    with capture(graph):
        for _ in range(20_000):
            [].append([])  # enough new objects for a collection
        total += 1
    graph.replay()
    assert total.item() == 1
    assert gc.isenabled()


def captured(launch: Callable[[], object]) -> None:
    with capture(torch.cuda.CUDAGraph()):
        torch.rand(4, device="cuda")
        launch()


def test_after_a_capture_that_failed_streams_and_draws_are_as_before() -> None:
    here = torch.cuda.current_stream()
    torch.cuda.manual_seed(0)
    expected = torch.rand(4, device="cuda")
    with pytest.raises(RuntimeError, match="capturing"):
        captured(torch.cuda.synchronize)
    assert torch.cuda.current_stream() == here
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


def test_what_was_raised_inside_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        captured(lambda: 1 // 0)
