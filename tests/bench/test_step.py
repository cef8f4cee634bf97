"""`bench step`: what a row holds, and that it says which program ran and who is missing."""

import json
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from muonlab.bench import peers, step
from muonlab.bench.floor import adamw_work, muon_work
from muonlab.bench.parameter_sets import SETS
from muonlab.bench.session import Session, run_all, run_step
from muonlab.errors import InputError

RATES = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e10}


def row_of(peer, **changes):
    (spec,) = step.specs(["tiny"], [peer], "cpu", 1, 2)
    return step.measure({**spec, **changes})


def test_a_row_names_its_call_its_dtypes_and_the_program_that_ran():
    row = row_of("muonlab")
    assert row["program"] == "torch"  # no CUDA graph on a CPU
    assert row["call"] == "muonlab.Muon(params, lr=0.01, weight_decay=0.1)"
    assert (row["matrices"], row["parameters"]) == (12, 2 * (4 * 64 * 64 + 2 * 64 * 128))
    assert row["gradients_stay"]["alone_ms"]["median"] > 0
    assert row["gradients_fresh"]["alone_ms"]["median"] > 0
    assert row["extra_bytes"] is None
    assert "fp32" in row["dtypes"]


@pytest.mark.parametrize(("peer", "work"), [("torch-muon", muon_work), ("torch-adamw", adamw_work)])
def test_the_floor_of_a_row_is_that_of_its_rule_and_set(peer, work):
    row = step.with_floor({"set": "tiny", **row_of(peer)}, RATES)
    assert row["floor_ms"] == pytest.approx(1e3 * work(SETS["tiny"]).seconds(RATES))
    median = row["gradients_stay"]["alone_ms"]["median"]
    assert row["gradients_stay_over_floor"] == pytest.approx(median / row["floor_ms"])
    assert "graph_alone_over_floor" not in row


class Watched(torch.optim.SGD):
    """Notes what every step sees."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.seen = []

    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        grad = params[0].grad
        self.seen.append((grad.data_ptr(), grad.flatten()[0].item(), self.param_groups[0]["lr"]))


def test_fresh_gradients_are_elsewhere_and_under_another_learning_rate_at_every_step():
    params = [nn.Parameter(torch.zeros(4, 4))]
    optimizer = Watched(params, lr=1.0)
    step.fresh(optimizer, params, [[torch.zeros(4, 4)], [torch.ones(4, 4)]], torch.device("cpu"), 2)
    places, values, rates = zip(*optimizer.seen)
    assert all(a != b for a, b in pairwise(places))
    assert all(a != b for a, b in pairwise(values))
    assert rates == pytest.approx([1 / (1 + i) for i in range(3 + 2 + 2)])


def test_gradients_that_stay_have_other_values_in_the_same_place_at_every_step():
    params = [nn.Parameter(torch.zeros(4, 4))]
    params[0].grad = torch.zeros(4, 4)
    optimizer = Watched(params, lr=1.0)
    step.staying(optimizer, params, [[torch.zeros(4, 4)], [torch.ones(4, 4)]], torch.device("cpu"), 2)
    places, values, _ = zip(*optimizer.seen)
    assert len(set(places)) == 1
    assert all(a != b for a, b in pairwise(values))


def test_the_state_of_an_optimizer_is_counted_in_bytes_once():
    params = [nn.Parameter(torch.zeros(4, 4))]
    params[0].grad = torch.ones(4, 4)
    optimizer = torch.optim.Adam(params)
    optimizer.step()
    assert step.state_bytes(optimizer) == 2 * 64 + 4  # two averages and a count
    assert step.state_bytes(object()) == 0


# --- peers ------------------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_one_line_with_what_to_install():
    row = row_of("dion")
    assert row["skipped"] == "dion is not installed; pip install git+https://github.com/microsoft/dion"
    assert "gradients_stay" not in row
    assert "floor_ms" in step.with_floor({"set": "tiny", **row}, RATES)


def test_a_package_of_the_same_name_that_is_something_else_is_not_the_peer(tmp_path, monkeypatch):
    (tmp_path / "muon.py").write_text("particle = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "muon", raising=False)
    assert "muon is not installed" in row_of("keller")["skipped"]


def test_a_peer_that_can_be_imported_is_measured(tmp_path, monkeypatch):
    (tmp_path / "muon.py").write_text("import torch\nclass SingleDeviceMuon(torch.optim.SGD):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "muon", raising=False)
    row = row_of("keller")
    assert row["program"] == "as shipped"
    assert row["gradients_fresh"]["alone_ms"]["median"] > 0


def test_the_written_out_peers_orthogonalise():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8, 16))]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.randn_like(param)
    stack = peers.CompiledStack.__new__(peers.CompiledStack)
    stack.groups, stack.buffers = [[p] for p in params], [torch.zeros(1, *p.shape) for p in params]
    stack.update = peers._stacked_update
    stack.step()
    for param, old in zip(params, before, strict=True):
        sigma = torch.linalg.svdvals((old * (1 - 0.001) - param.detach()) / 0.01)
        assert sigma.min() > 0.6
        assert sigma.max() < 1.3


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_result_holds_machine_versions_rates_and_all_rows(tmp_path):
    said = []
    session = Session("step", "cpu", 1, tmp_path / "step.json", quick=True, say=said.append)
    run_step(session, ["tiny"], ["muonlab", "torch-adamw", "dion"], 2)
    result = json.loads((tmp_path / "step.json").read_text())
    assert {"schema", "benchmark", "device", "threads", "date", "command", "versions", "rates", "rows"} <= set(result)
    assert {"commit", "torch", "python", "muonlab"} <= set(result["versions"])
    assert result["rates"]["copy_bytes_per_second"] > 0 < result["rates"]["matmul_flops_per_second"]
    assert [row["peer"] for row in result["rows"]] == ["muonlab", "torch-adamw", "dion"]
    assert (tmp_path / "step.png").exists()
    assert any("dion is not installed" in str(line) for line in said)


@pytest.mark.parametrize(
    ("sets", "names", "message"),
    [(["moe"], ["muonlab"], "parameter set 'moe'"), (["tiny"], ["torch-moun"], "did you mean 'torch-muon'")],
)
def test_a_wrong_name_is_found_before_anything_is_measured(sets, names, message, tmp_path):
    session = Session("step", "cpu", 1, None, quick=True, say=lambda line: pytest.fail(f"said {line}"))
    with pytest.raises(InputError, match=message):
        run_step(session, sets, names, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(InputError, match="torch sees no such device"):
        Session("step", "cuda", 1, None, quick=True, say=print)


def test_everything_in_one_command_leaves_a_file_for_each_part_that_worked(tmp_path, monkeypatch):
    monkeypatch.setattr("muonlab.bench.session.PEERS", ["muonlab"])
    monkeypatch.setattr("muonlab.bench.session.run_profile", None)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    said = []
    written = run_all("cpu", 1, tmp_path, quick=True, say=said.append)
    assert [path.name for path in written] == ["step.json", "train.json", "train_peers.json"]
    assert all(json.loads(path.read_text())["rows"] for path in written)
    assert any(str(line).startswith("profile failed: TypeError") for line in said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_our_row_names_the_graph_and_counts_its_memory():
    (spec,) = step.specs(["tiny"], ["muonlab"], "cuda", 1, 5)
    row = step.measure(spec)
    assert row["program"] == "graph"
    assert row["extra_bytes"] > 0
    assert row["graph_alone"] is not None
