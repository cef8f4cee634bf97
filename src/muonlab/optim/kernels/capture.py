"""Capturing a CUDA graph: nothing else in the process may spoil it, and where it fails, nothing else is spoiled."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch


@contextmanager
def capture(graph: "torch.cuda.CUDAGraph") -> Iterator[None]:
    """Records what is launched inside, on a stream that all captures on the current device share, into `graph`.

    Raises what was raised inside, or what ended the capture; the current stream and the device's generator are as before.
    """
    here = torch.cuda.current_stream()
    stream = _stream(torch.cuda.current_device())
    collects = gc.isenabled()
    gc.disable()  # a collection that destroys another graph spoils a capture under way
    cause: BaseException | None = None
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                yield
            except BaseException as error:
                cause = error
                raise
    except BaseException:
        torch.cuda.set_stream(here)
        with suppress(Exception):
            _end_draws(stream)
        if cause is not None:
            raise cause from cause.__cause__
        raise
    finally:
        if collects:
            gc.enable()


def _end_draws(stream: "torch.cuda.Stream") -> None:
    """After a capture that could not be ended the generator takes every draw for a captured one; the end of another helps."""
    torch.cuda.synchronize(stream.device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device=stream.device)


@cache
def _stream(device: int) -> Any:
    # torch's own lies on the device of the first capture; a new one each time would cost a workspace of cuBLAS's.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
