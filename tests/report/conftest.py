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


@pytest.fixture(scope="session")
def study(fake, tmp_path_factory):
    """A finished study with a diverged run and published numbers; read-only for tests."""
    from muonlab.report import write_study

    root = tmp_path_factory.mktemp("study")
    cells, axes, options = fake.STUDIES["core"]()
    fake.fake_study(root, cells, axes, **options)
    write_study(root)
    return root


@pytest.fixture(scope="session")
def grid(fake, tmp_path_factory):
    """A finished study of 18 cells over three axes; read-only for tests."""
    from muonlab.report import write_study

    root = tmp_path_factory.mktemp("grid")
    cells, axes, options = fake.STUDIES["grid"]()
    fake.fake_study(root, cells, axes, updates=40, seeds=(1, 2), **options)
    write_study(root)
    return root
