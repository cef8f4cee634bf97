"""Where Triton's kernels run in tests: on a GPU as they are, elsewhere in Triton's interpreter; skips what has neither.

Import it before any module with kernels: Triton reads its environment when it is imported.
"""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import numpy

        if tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
            pytest.skip("Triton's interpreter needs numpy < 2.4", allow_module_level=True)
    except ImportError:
        pytest.skip("Triton's interpreter needs numpy", allow_module_level=True)
DEVICE = torch.device("cuda" if GPU else "cpu")
