"""`torch.compile` as it is on a machine without a compiler: it fails when what it made is called."""

from typing import Any


def no_compiler(*_: Any, **__: Any) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long story")

    return call
