"""Capturing a CUDA graph: nothing else in the process may spoil it, and where it fails, nothing else is spoiled."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@contextmanager
def capture(graph: "torch.cuda.CUDAGraph", stream: "torch.cuda.Stream | None" = None) -> Iterator[None]:
    """Records what is launched inside, by default on a stream of torch's, into `graph`.

    Raises what was raised inside, or what ended the capture; the current stream and the device's generator are as before.
    """
    here = torch.cuda.current_stream()
    collects = gc.isenabled()
    gc.disable()  # a collection that destroys another graph spoils a capture under way
    cause: Exception | None = None
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                yield
            except Exception as error:
                cause = error
                raise
    except Exception:
        torch.cuda.set_stream(here)
        with suppress(Exception):
            _end_draws()
        if cause is not None:
            raise cause from None
        raise
    finally:
        if collects:
            gc.enable()


def _end_draws() -> None:
    """After a capture that could not be ended the generator takes every draw for a captured one; the end of another helps."""
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
