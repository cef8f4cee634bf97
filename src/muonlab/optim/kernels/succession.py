"""Launches that begin while the one before them on their stream ends: programmatic dependent launch, compute capability 9.0.

Kernels that take `EARLY` call `follow` before they touch memory. A launch that does not get `options` follows its predecessor
in the usual way, whatever that one was launched with.
"""

# A kernel's arguments are Triton's values, which have no types in Python.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import os
from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl

ALLOWED = True
"""Whether launches may begin early at all."""


def options(device: torch.device) -> Mapping[str, bool]:
    """Arguments of a launch that may begin early, as far as the device knows how to."""
    able = ALLOWED and device.type == "cuda" and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1"
    if able and torch.cuda.get_device_capability(device) >= (9, 0):
        return MappingProxyType({"EARLY": True, "launch_pdl": True})
    return MappingProxyType({})


@triton.jit
def follow(EARLY: tl.constexpr):
    """Waits until the launch before has ended and all it wrote is visible; then lets the next one begin.

    Every program has to come here: the next launch relies on this one having waited for those before.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
