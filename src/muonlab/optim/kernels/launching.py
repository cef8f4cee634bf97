"""Launching kernels, or compiling all that some launches may need at once: one by one, compilers take most of a first step."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
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
    """Compiles what `launches` launch, on all processors; what fails will fail again where it is used."""
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None or products.INTERPRETED:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, mode(pool, ignore_errors=True):
        token = _compiling.set(True)
        try:
            for each in launches:
                each()
        finally:
            _compiling.reset(token)
