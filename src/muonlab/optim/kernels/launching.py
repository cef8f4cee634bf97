"""Launching kernels, or compiling all that some launches may need at once: one by one, compilers take most of a first step."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, ContextVar
from typing import Any

import triton
from triton.runtime import Autotuner

from muonlab.optim.kernels import products

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def launch(kernel: Any, grid: Any, *arguments: Any, **flags: Any) -> None:
    """`kernel[grid](*arguments, **flags)`; inside `compile_together` it is compiled instead, with every configuration that
    tuning could choose."""
    if not _compiling.get():
        kernel[grid](*arguments, **flags)
    elif isinstance(kernel, Autotuner):
        named = dict(zip(kernel.arg_names, arguments))
        for config in products.fitting(kernel.configs, named):
            chosen = config.all_kwargs()
            config.pre_hook({**named, **flags, **chosen})
            kernel.fn.warmup(*arguments, grid=(1,), **flags, **chosen)
    else:
        kernel.warmup(*arguments, grid=(1,), **flags)


def compile_together(launches: Iterable[Callable[[], object]]) -> None:
    """Compiles what `launches` launch, on all processors. What fails fails again where it is used, or is no candidate there."""
    if not products.INTERPRETED and hasattr(triton, "AsyncCompileMode"):
        with suppress(Exception):
            # A context of its own: Triton's mode must not meet a user's, nor outlive an interruption.
            Context().run(_compile, launches)


def _compile(launches: Iterable[Callable[[], object]]) -> None:
    _compiling.set(True)
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for each in launches:
            each()
