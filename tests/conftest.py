"""Shared by all tests: a cache of its own, few threads, no network."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """$MUONLAB_HOME of the whole test run: nothing of the user's cache is read or written."""
    before = os.environ.get("MUONLAB_HOME")
    os.environ["MUONLAB_HOME"] = str(tmp_path_factory.mktemp("muonlab-home"))
    yield
    if before is None:
        del os.environ["MUONLAB_HOME"]
    else:
        os.environ["MUONLAB_HOME"] = before


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that sets the number of threads leaves it as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
