"""What a step's launches wait for, on streams that remember nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests import interpreted  # noqa: F401  # Triton, or a skip

from muonlab.optim.kernels import tables


class Stream:
    """`done` has what has run when all that was launched here has run."""

    def __init__(self) -> None:
        self.done: frozenset[str] = frozenset()

    def record_event(self) -> frozenset[str]:
        return self.done

    def wait_event(self, event: frozenset[str]) -> None:
        self.done |= event


@pytest.mark.parametrize("current", [None, *range(tables.LANES)])
@pytest.mark.parametrize("lengths", [(6, 3, 3, 5), (3, 0, 0, 0), (0, 0, 3, 0), (0, 0, 0, 2), (0, 0, 0, 0)], ids=str)
def test_lanes_keep_their_order_and_wait_for_no_other_but_the_first_pass(
    lengths: tuple[int, ...], current: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stream is the current one, even one of the lanes'."""
    from muonlab.optim.kernels import fused

    passes, products, small = fused._PASS, fused._PRODUCT, fused._SMALL
    streams = [{priority: Stream() for priority in (passes, products, small)} for _ in lengths]
    here = Stream() if current is None else streams[current][passes]
    running = here
    before: dict[str, frozenset[str]] = {}

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        nonlocal running
        running = stream
        yield
        running = here

    def run(name: str) -> None:
        before[name] = running.done
        running.done |= {name}

    def named(lane: int) -> list[str]:
        return [f"{lane}.{turn}" for turn in range(lengths[lane])]

    plan = object.__new__(fused.FusedStep)
    plan._device = torch.device("cuda")
    plan._lanes = [
        [((passes, products, passes)[turn % 3], lambda name=name: run(name)) for turn, name in enumerate(named(lane))]
        for lane in range(tables.LANES)
    ]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(fused, "_streams", lambda device: streams)
    plan._launch()
    assert here.done == {name for lane in range(tables.LANES) for name in named(lane)}
    for lane in range(tables.LANES):
        others = {"0.0"} if 0 < lane < tables.HEAVY else set()
        for turn, name in enumerate(named(lane)):
            assert before[name] == {*named(lane)[:turn], *others}
