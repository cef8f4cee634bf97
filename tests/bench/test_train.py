"""`bench train` and `bench profile`: the numbers' arithmetic, and that a row names the program that really ran."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.no_compiler import no_compiler
from torch import nn

from muonlab.bench import profile, train
from muonlab.bench.plain import LR, Plain, PlainUpdate, check_same_loss, optimizers_of
from muonlab.bench.session import Session, run_profile, run_train
from muonlab.diagnostics.flops import token_flops
from muonlab.errors import InputError
from muonlab.training import programs

RATES = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e12}


def measured(contestants, model="tiny"):
    spec = {"model": model, "device": "cpu", "threads": 1, "rounds": 2, "updates": 1, "contestants": contestants}
    return {**spec, **train.measure(spec)}


def ours(program="eager", optimizer="adamw"):
    return {"side": "muonlab", "program": program, "optimizer": optimizer}


def test_rows_hold_speed_split_and_utilisation_of_active_flops():
    result = measured([ours(), {**ours(), "side": "plain"}])
    rows = train.with_utilisation(result, RATES, 2e12)
    assert [row["side"] for row in rows] == ["muonlab", "plain"]
    for row in rows:
        assert row["tokens_per_update"] == 2 * 32
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds_per_update"]["median"])
        flops = row["tokens_per_second"] * token_flops(train.CASES["tiny"].model).training
        assert row["mfu_of_measured"] == pytest.approx(flops / 1e12)
        assert row["mfu_of_stated"] == pytest.approx(flops / 2e12)
        assert set(row["split_ms"]) == {"forward", "backward", "optimizer"}
        assert all(value > 0 for value in row["split_ms"].values())
        assert (row["asked"], row["program"], row["notice"]) == ("eager", "eager", None)
    assert set(rows[0]["ratio_to_plain"]) == {"median", "quartile_low", "quartile_high"}
    assert rows[1]["ratio_to_plain"] is None
    assert result["loss_difference_before"] < 1e-4


def test_a_mixture_counts_the_experts_that_a_token_visits():
    case = train.CASES["moe-79m"]
    assert token_flops(case.model).training * 24 * 4 * 512 == pytest.approx(
        11.14e12, rel=0.01
    )  # as measured for the seed


def test_after_a_fallback_the_row_says_eager_and_why(monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)
    result = measured([ours("compile"), {**ours("compile"), "side": "plain"}])
    rows = {row["side"]: row for row in train.with_utilisation(result, RATES, None)}
    assert (rows["muonlab"]["asked"], rows["muonlab"]["program"]) == ("compile", "eager")
    assert rows["muonlab"]["notice"] == "torch.compile failed (no compiler here); operations run one by one"
    assert rows["plain"]["failed"] == "RuntimeError: no compiler here"
    programs.forget()


def test_the_plain_model_takes_smaller_micro_batches_where_memory_does_not_hold_its_logits(monkeypatch):
    class Large(train.PlainUpdate):
        def __call__(self, inputs, targets):
            if len(inputs) // self.accumulation > 1 and self.optimizers[0].state:
                raise torch.OutOfMemoryError("no memory for two sequences beside the state")
            return super().__call__(inputs, targets)

    monkeypatch.setattr(train, "PlainUpdate", Large)
    result = measured([ours(), {**ours(), "side": "plain"}])
    rows = {row["side"]: row for row in train.with_utilisation(result, RATES, None)}
    assert (rows["muonlab"]["micro_batch_size"], rows["muonlab"]["accumulation"]) == (2, 1)
    assert (rows["plain"]["micro_batch_size"], rows["plain"]["accumulation"]) == (1, 2)
    assert rows["plain"]["seconds_per_update"]["median"] > 0
    monkeypatch.setitem(train.CASES, "tiny", replace(train.CASES["tiny"], cpu=(3, 1)))
    (row,) = measured([{**ours(), "side": "plain"}])["contestants"]
    assert (row["micro_batch_size"], row["accumulation"]) == (1, 3)


def test_a_second_run_is_timed_in_the_program_of_the_first(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    (row,) = train.with_utilisation(measured([ours("compile", "muon")]), RATES, None)
    assert row["program"] == "compile"
    assert row["second_run_ready_seconds"] > 0
    programs.forget()


def test_a_group_that_failed_as_a_whole_is_a_failed_row_for_each_contestant():
    spec = {"model": "tiny", "device": "cpu", "threads": 1, "contestants": [ours(), ours("compile")], "failed": "died"}
    rows = train.with_utilisation(spec, RATES, None)
    assert [(row["program"], row["failed"]) for row in rows] == [("eager", "died"), ("compile", "died")]


def test_contestants_take_turns_on_a_cpu_and_are_alone_on_cuda():
    arguments = (["tiny"], ["eager", "compile"], ["muon"])
    assert [len(spec["contestants"]) for spec in train.specs(*arguments, "cpu", 1, 1, 1)] == [4]
    on_cuda = train.specs(["tiny"], ["eager", "graph"], ["muon"], "cuda", 1, 1, 1)
    assert [[c["side"], c["program"]] for spec in on_cuda for c in spec["contestants"]] == [
        ["muonlab", "eager"],
        ["plain", "eager"],
        ["muonlab", "graph"],
    ]


def test_every_row_that_has_a_process_of_its_own_finds_compilers_caches_empty(monkeypatch):
    session = Session("train", "cpu", 1, None, quick=True, say=lambda _: None)
    places = []

    def rows(measure, specs, *_):
        (spec,) = specs
        places.append([os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")])
        assert not any(Path(place).exists() for place in places[-1])
        return [{**spec, "failed": "not measured"}]

    monkeypatch.setattr(session, "isolate", True)
    monkeypatch.setattr(session, "begin", lambda: None)
    monkeypatch.setattr(session, "rows", rows)
    row = {"model": "tiny", **ours()}
    monkeypatch.setattr(train, "specs", lambda *_: [row, row])
    before = dict(os.environ)
    run_train(session, ["tiny"], ["eager"], ["muon"], 1, 1)
    assert len({place for pair in places for place in pair}) == 4
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["tinny"], ["eager"], ["muon"], "cpu"), "did you mean 'tiny'"),
        ((["tiny"], ["eagre"], ["muon"], "cpu"), "did you mean 'eager'"),
        ((["tiny"], ["eager"], ["moun"], "cpu"), "did you mean 'muon'"),
        ((["tiny"], ["graph"], ["muon"], "cpu"), "needs a CUDA device"),
    ],
)
def test_wrong_names_and_programs_are_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        train.specs(*arguments, 1, 1, 1)
    with pytest.raises(InputError, match=message):
        profile.specs(*arguments, 1, 1)


# --- the plain side ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "micro-moe"])
def test_the_plain_model_is_the_same_model(model):
    options = train.CASES[model].model
    tokens = torch.randint(options.vocab_size, (1, 33), generator=torch.Generator().manual_seed(0))
    assert check_same_loss(options, tokens[:, :-1], tokens[:, 1:]) < 1e-4


@pytest.mark.parametrize(("name", "classes"), [("adamw", ["AdamW"]), ("muon", ["Muon", "AdamW"])])
def test_the_plain_optimizers_hold_every_parameter_once_and_do_not_decay_embeddings(name, classes):
    model = Plain(train.CASES["tiny"].model)
    optimizers, _ = optimizers_of(model, name, 0.1)
    assert [type(optimizer).__name__ for optimizer in optimizers] == classes
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(param) for group in groups for param in group["params"]]
    assert sorted(held) == sorted(id(param) for param in model.parameters())
    decay = {id(param): group["weight_decay"] for group in groups for param in group["params"]}
    assert decay[id(model.embedding.weight)] == decay[id(model.norm.weight)] == 0.0
    assert decay[id(model.head.weight)] == decay[id(model.blocks[0].attention.output.weight)] == 0.1


def test_torchs_muon_updates_every_expert_of_a_stack_as_a_matrix_of_its_own():
    options = replace(train.CASES["tiny"].model, n_experts=4, top_k=2)
    update = PlainUpdate(options, {"program": "eager", "optimizer": "muon"}, torch.device("cpu"), 1, 0.1, 1e9)
    stacks = [parameter for parameter in update.model.parameters() if parameter.ndim == 3]
    before = [stack.detach().clone() for stack in stacks]
    tokens = torch.randint(options.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    update(tokens[:, :-1], tokens[:, 1:])
    assert len(stacks) == 2 * options.n_layers
    first = [stack.grad.clone() for stack in stacks]
    for stack, old in zip(stacks, before):
        alone = [nn.Parameter(expert.clone()) for expert in old]
        for expert, grad in zip(alone, stack.grad):
            expert.grad = grad.clone()
        rule = {"lr": LR["muon"], "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        torch.optim.Muon(alone, **rule).step()
        torch.testing.assert_close(stack, torch.stack(list(alone)))
        assert not torch.equal(stack, old)
    with torch.no_grad():
        for stack, old in zip(stacks, before):
            stack.copy_(old)
    update(tokens[:, :-1], tokens[:, 1:])  # the rest of the model has moved a little
    for stack, grad in zip(stacks, first):
        assert 0.5 < stack.grad.norm() / grad.norm() < 1.5  # not the sum of both updates' gradients


# --- profile ----------------------------------------------------------------------------------------------------------


def test_gaps_are_what_lies_between_the_union_of_kernels():
    spans = [(0.0, 10.0, "a"), (4.0, 6.0, "inside a"), (15.0, 20.0, "b"), (18.0, 30.0, "c"), (31.0, 32.0, "d")]
    found = profile.gaps(reversed(spans), updates=2)
    assert found["busy_ms"] == pytest.approx((10 + 15 + 1) / 2 * 1e-3)
    assert found["idle_ms"] == pytest.approx((5 + 1) / 2 * 1e-3)
    assert found["gaps"][0] == {"ms": pytest.approx(5e-3), "after": "a", "before": "b"}
    assert found["gaps"][1]["after"] == "c"
    assert profile.gaps([], 1) == {"busy_ms": 0.0, "idle_ms": 0.0, "gaps": []}


def test_kernels_add_up_by_name_per_update():
    table = profile.by_kernel([(0.0, 10.0, "a"), (10.0, 12.0, "b"), (20.0, 30.0, "a"), (30.0, 32.0, "b")], updates=2)
    assert [row["name"] for row in table] == ["a", "b"]
    assert table[0] == {"name": "a", "ms": pytest.approx(0.01), "launches": 1, "share": pytest.approx(20 / 24)}
    assert sum(row["share"] for row in table) == pytest.approx(1.0)


def test_a_profile_and_a_training_result_are_written_with_the_program_that_ran(tmp_path):
    session = Session("profile", "cpu", 1, tmp_path / "profile.json", quick=True, say=lambda _: None)
    run_profile(session, ["tiny"], ["eager"], ["muon"], 2)
    (row,) = json.loads((tmp_path / "profile.json").read_text())["rows"]
    assert row["program"] == "eager"
    assert sum(kernel["share"] for kernel in row["kernels"]) == pytest.approx(1.0)
    assert {"aten::mm", "aten::bmm"} & {kernel["name"] for kernel in row["kernels"]}
    session = Session("train", "cpu", 1, tmp_path / "train.json", quick=True, say=lambda _: None)
    run_train(session, ["tiny"], ["eager"], ["adamw"], 2, 1)
    result = json.loads((tmp_path / "train.json").read_text())
    assert [row["program"] for row in result["rows"]] == ["eager", "eager"]
    assert (tmp_path / "train.png").exists()
    assert (tmp_path / "profile.png").exists()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_captured_update_is_split_by_events_inside_its_graph():
    contestants = [{"side": "muonlab", "program": "graph", "optimizer": "muon"}]
    spec = {"model": "tiny", "device": "cuda", "threads": 1, "rounds": 3, "updates": 3, "contestants": contestants}
    (row,) = train.with_utilisation({**spec, **train.measure(spec)}, RATES, None)
    assert row["program"] == "graph", row["notice"]
    assert row["split_failed"] is None
    assert set(row["split_ms"]) == {"forward", "backward", "optimizer"}
    assert all(value > 0 for value in row["split_ms"].values())
    assert row["second_run_ready_seconds"] is not None
    assert row["peak_bytes"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_kernels_and_gaps_are_found():
    (spec,) = profile.specs(["tiny"], ["eager"], ["muon"], "cuda", 1, 3)
    row = profile.measure(spec)
    assert row["busy_ms"] > 0
    assert row["launches"] > 10
