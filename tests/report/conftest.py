"""The generator of run directories, by name: test files are imported without packages."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fake():
    spec = importlib.util.spec_from_file_location("fake_runs", Path(__file__).with_name("fake_runs.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def comparison(fake, tmp_path_factory):
    """A finished comparison with one diverged trial; read-only for tests."""
    from muonlab.report import write_comparison

    root = tmp_path_factory.mktemp("comparison")
    fake.fake_comparison(root, ("muon", "adamw"), diverged={("adamw", 2)})
    write_comparison(root)
    return root
