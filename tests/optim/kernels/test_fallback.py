"""What the fast step leaves alone, and what it says then."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from muonlab import Muon
from muonlab.optim import kernels


def optimizer_with(**options: object) -> Muon:
    param = nn.Parameter(torch.randn(16, 24))
    param.grad = torch.randn(16, 24)
    return Muon([param], **options)


def test_parameters_on_a_cpu_are_left_to_the_plain_path() -> None:
    optimizer = optimizer_with()
    work = [(group, list(group["params"])) for group in optimizer.param_groups]
    assert kernels.step(optimizer, work, optimizer._state) is work


def test_a_capture_without_a_step_before_says_that_it_holds_the_slower_path(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_with()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    work: Any = [(group, [SimpleNamespace(is_cuda=True)]) for group in optimizer.param_groups]
    with pytest.warns(UserWarning, match="slower: make a step of this kind before the capture"):
        assert kernels.step(optimizer, work, optimizer._state) is work


def test_triton_is_not_imported_by_the_package_nor_its_kernels_by_a_step_on_a_cpu() -> None:
    code = (
        "import sys, torch, muonlab; early = 'triton' in sys.modules; p = torch.nn.Parameter(torch.ones(8, 8));"
        "p.grad = torch.ones(8, 8); muonlab.Muon([p]).step();"
        "sys.exit(early or 'muonlab.optim.kernels.fused' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_option_that_the_kernels_do_not_know_is_named_and_not_ignored() -> None:
    assert kernels._obstacle(optimizer_with(normuon_beta=0.95).param_groups) == "the option normuon_beta=0.95"
    assert kernels._obstacle(optimizer_with(momentum_dtype="int8").param_groups) == "the option momentum_dtype='int8'"
    groups = optimizer_with().param_groups
    groups[0]["an_option_of_tomorrow"] = 1
    assert kernels._obstacle(groups) == "the option an_option_of_tomorrow=1"


def test_every_option_of_a_plain_muon_is_known() -> None:
    options = optimizer_with(block_size=8, heavy_ball=True, cautious_decay=True, scaled_decay=True, norm_eps=1e-7)
    for group in options.param_groups:
        unknown = set(group) - set(kernels._FOLLOWED) - set(kernels._NEUTRAL)
        assert not unknown


def test_double_precision_and_one_rate_for_each_matrix_are_named() -> None:
    double = nn.Parameter(torch.randn(16, 24, dtype=torch.float64))
    assert "float64" in str(kernels._obstacle(Muon([double]).param_groups))
    groups = optimizer_with().param_groups
    groups[0]["lr"] = torch.ones(3, 1, 1)
    assert kernels._obstacle(groups) == "one lr for each matrix"
