"""A kept program: the run that takes it over has the numbers of one in a fresh process, bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from runs import tiny, without_times
from tests.no_compiler import no_compiler
from torch import Tensor

from muonlab.training import programs
from muonlab.training.config import from_dict, replace
from muonlab.training.loop import Loop, resolve, run, run_id
from muonlab.training.programs import Program, new_model, optimizer_key, program_key, reset_in_place, tensors
from muonlab.training.tracking import RunDirectory
from muonlab.training.update import Captured, Update

NOISY = {"n_experts": 4, "top_k": 2, "dropout": 0.1, "router_noise": 0.1}


@pytest.fixture(autouse=True)
def nothing_kept():
    torch.set_num_threads(1)  # as the tiny run asks for: `loop` leaves that to `run`, and sums depend on it
    programs.forget()
    yield
    programs.forget()


@pytest.fixture
def compiles_by_tracing(monkeypatch):
    """torch.compile without its code generation: graphs and guards are the same, and seconds shorter."""
    compile_ = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **{**options, "backend": "aot_eager"}))


def train(config, folder, program):
    """A run by a program that another run has used."""
    config, dataset = resolve(config)
    program.restart(config)
    return loop(config, dataset, folder, program)


def loop(config, dataset, folder, program, should_stop=lambda: False):
    identity = run_id(config, dataset.checksum)
    files = RunDirectory(folder, identity)
    try:
        return Loop(config, dataset, identity, files, None, program).train(should_stop, False)
    finally:
        files.close()


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "sophia", "sgd", "class"])
@pytest.mark.parametrize("model", [{}, NOISY], ids=["dense", "mixture"])
def test_a_run_that_takes_a_program_over_equals_one_of_its_own(model, optimizer, tmp_path):
    first = tiny(model=model, optimizer={"lr": 0.05}, training={"updates": 3})
    second = tiny(seed=5, model=model, optimizer={"name": optimizer, "lr": 3e-3}, schedule={"momentum_warmup": 4})
    program = Program(resolve(first)[0])
    train(first, tmp_path / "first", program)
    taken_over = train(second, tmp_path / "second", program)
    assert without_times(taken_over) == without_times(run(second, directory=tmp_path / "alone"))


def test_compiled_programs_are_reused_and_nothing_is_compiled_twice(compiles_by_tracing, tmp_path):
    compiled = {"program": "compile"}
    run(tiny(training=compiled), directory=tmp_path / "first")
    traced = frames()
    second = tiny(
        seed=2,
        optimizer={"name": "adamw", "lr": 0.004},
        schedule={"kind": "linear"},
        training={**compiled, "updates": 6, "eval_every": 3},
    )
    taken_over = run(second, directory=tmp_path / "second")
    assert frames() == traced
    assert taken_over["seconds"]["compilation"] == 0
    assert taken_over["program"] == "compile"
    programs.forget()
    alone = run(second, directory=tmp_path / "alone")
    assert alone["seconds"]["compilation"] > 0
    assert without_times(taken_over) == without_times(alone)


def test_head_and_loss_compiled_with_the_model_as_on_cuda_are_not_compiled_again(compiles_by_tracing, tmp_path):
    configs = [resolve(tiny(seed=seed, optimizer={"lr": seed / 50}))[0] for seed in (1, 2)]
    program = Program(configs[0])
    program.update.micro_step._whole = torch.compile(program.update.micro_step._plain, dynamic=False)
    train(configs[0], tmp_path / "first", program)
    traced = frames()
    train(configs[1], tmp_path / "second", program)
    assert traced > 0
    assert frames() == traced


def frames() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["eager", "compile"])
def test_a_second_run_equals_the_same_run_in_a_fresh_process(program, tmp_path):
    training = {"program": program, "updates": 4}
    run(tiny(training=training), directory=tmp_path / "first")
    second = tiny(seed=3, optimizer={"lr": 0.007, "momentum": 0.9, "weight_decay": 0.3}, training=training)
    here = run(second, directory=tmp_path / "second")
    code = (
        "import json, sys\nfrom muonlab.training.config import from_dict\nfrom muonlab.training.loop import run\n"
        "run(from_dict(json.loads(sys.argv[1])), directory=sys.argv[2])"
    )
    arguments = [json.dumps(second.to_dict()), str(tmp_path / "elsewhere")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    there = run(second, directory=tmp_path / "elsewhere")  # finds it finished
    assert without_times(here) == without_times(there)
    assert here["program"] == program


def test_a_stopped_run_goes_on_bit_for_bit_in_a_program_that_another_run_used(compiles_by_tracing, tmp_path):
    config = tiny(training={"program": "compile"})
    whole = run(config, directory=tmp_path / "whole")
    rows = []
    assert run(config, directory=tmp_path / "parts", on_event=rows.append, should_stop=lambda: len(rows) > 4)[
        "status"
    ] == ("interrupted")
    run(replace(config, seed=9, optimizer={"lr": 0.1}), directory=tmp_path / "other")
    assert without_times(run(config, directory=tmp_path / "parts")) == without_times(whole)


def test_a_diverged_run_leaves_nothing_in_the_program(compiles_by_tracing, tmp_path):
    program = {"program": "compile", "clip_norm": 0.0}
    wild = tiny(optimizer={"name": "sgd", "lr": 1e20}, training=program)
    assert run(wild, directory=tmp_path / "wild")["status"] == "diverged"
    calm = tiny(optimizer={"name": "sgd", "lr": 0.1}, training=program)
    taken_over = run(calm, directory=tmp_path / "calm")
    programs.forget()
    assert without_times(taken_over) == without_times(run(calm, directory=tmp_path / "alone"))


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2, "name": "other"},
        {"optimizer": {"name": "adamw"}},
        {"schedule": {"kind": "linear", "momentum_warmup": 3}},
        {"training": {"updates": 99, "eval_every": 9, "checkpoint_every": 9, "divergence_bound": 9.0}},
    ],
)
def test_runs_that_differ_in_what_is_read_at_every_update_share_a_program(changes):
    assert program_key(tiny(**changes)) == program_key(tiny())


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"n_layers": 3}},
        {"loss": {"z_loss": 0.1}},
        {"data": {"document_mask": True}},
        {"training": {"micro_batch_size": 2}},
        {"training": {"accumulation": 2}},
        {"training": {"clip_norm": 0.5}},
        {"training": {"precision": "bf16"}},
        {"training": {"program": "compile"}},
        {"training": {"threads": 2}},
    ],
)
def test_runs_that_differ_in_what_is_compiled_do_not(changes):
    assert program_key(tiny(**changes)) != program_key(tiny())


def test_a_capture_is_shared_between_learning_rates_momenta_and_decays_only():
    muon = optimizer_key(tiny())
    live = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.0, "vector_lr": 0.1, "head_weight_decay": 0.2}
    assert optimizer_key(tiny(optimizer=live)) == muon
    baked = [{"ns_steps": 3}, {"nesterov": False}, {"betas": (0.8, 0.9)}, {"scale": "keller"}, {"block_size": 16}]
    assert muon not in [optimizer_key(tiny(optimizer=options)) for options in baked]
    blocks = [optimizer_key(tiny(optimizer={"block_size": 16, "block_lr": lr})) for lr in (None, 0.1, 0.2)]
    assert blocks[1] == blocks[2] != blocks[0]
    assert optimizer_key(from_dict({"optimizer": "class"})) is None


# --- a captured update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"normuon_beta": 0.95}, {"idle": "fade"}, {"block_size": 16, "block_lr": 0.03}], ids=str
)
def test_an_optimizer_reset_in_place_keeps_its_tensors_and_steps_as_a_new_one(options):
    """The part of a graph's reuse that a CPU can show: live options and zeroed state in the old tensors."""
    changed = {"lr": 0.004, "momentum": 0.8, "weight_decay": 0.3, "vector_lr": 0.001}
    old, new = (
        resolve(tiny(optimizer={**options, **more}, schedule={"momentum_warmup": 5}))[0] for more in ({}, changed)
    )
    reused, alone = Program(old), Program(new)
    used, fresh = live(reused.update), live(alone.update)
    for index in range(3):
        step(used, index, old)
    places = addresses(used.optimizer)
    with torch.no_grad():
        for tensor, first in zip(tensors(reused.model), tensors(new_model(new)), strict=True):
            tensor.copy_(first)
    reset_in_place(used.optimizer, Program(new).optimizer)
    again = live(Update(reused.model, used.optimizer, new, used))
    for index in range(4):
        assert torch.equal(step(again, index, new), step(fresh, index, new))
    assert addresses(again.optimizer) == places
    for ours, theirs in zip(tensors(reused.model), tensors(alone.model), strict=True):
        assert torch.equal(ours, theirs)


def live(update: Update) -> Update:
    update._make_live()
    return update


def step(update: Update, index: int, config) -> Tensor:
    tokens = torch.randint(
        config.model.vocab_size, (config.training.micro_batch_size, 33), generator=torch.Generator().manual_seed(index)
    )
    return update(index, tokens[:, :-1], tokens[:, 1:], None)


def addresses(optimizer: torch.optim.Optimizer) -> list[int]:
    """Where everything lies that a captured step would read and write, besides parameters and gradients."""
    values = [value for group in optimizer.param_groups for value in group.values()]
    values += [value for state in optimizer.state.values() for value in state.values()]
    return [value.data_ptr() for value in values if isinstance(value, Tensor)]


def test_every_live_option_is_a_tensor_where_a_graph_is_to_read_it():
    options = {"block_size": 16, "block_lr": 0.03}
    update = live(Program(resolve(tiny(optimizer=options))[0]).update)
    groups = update.optimizer.param_groups
    assert all(isinstance(group[name], Tensor) for group in groups for name in ("lr", "weight_decay"))
    hidden = [group for group in groups if group["rule"] == "muon"]
    assert all(isinstance(group[name], Tensor) for group in hidden for name in ("momentum", "block_lr"))


class HostGraph:
    """What a CUDA graph does, on a CPU: nothing at capture, the same work on the same memory at every replay."""

    made = 0

    def capture(self, update: Update) -> None:
        HostGraph.made += 1
        self.update = update
        self.places = self.memory()

    def memory(self) -> list[int]:
        return [*addresses(self.update.optimizer), *(tensor.data_ptr() for tensor in tensors(self.update.model))]

    def replay(self) -> None:
        assert self.memory() == self.places, "a graph would read memory that nobody fills"
        captured = self.update._captured
        captured.result.copy_(self.update._execute(captured.inputs, captured.targets, captured.document_ids))


@pytest.fixture
def host_graphs(monkeypatch):
    """Captures on a CPU, so that all but the capture itself can be tested here."""

    def capture(self: Update, inputs, targets, document_ids):
        graph = HostGraph()
        ids = None if document_ids is None else document_ids.clone()
        result = torch.empty(3 + len(self.kinds), dtype=torch.float64)
        self._captured = Captured(graph, inputs.clone(), targets.clone(), ids, result)
        graph.capture(self)

    def warm_up(self: Update, *batch):
        if self._captured is None and self.calls <= 2:
            return self._execute(*batch)
        return replay(self, *batch)

    replay = Update._replay
    monkeypatch.setattr(HostGraph, "made", 0)
    monkeypatch.setattr(Update, "_capture", capture)
    monkeypatch.setattr(Update, "_replay", warm_up)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)


def captured_run(config, folder, program=None, **more):
    config, dataset = resolve(config)
    config = replace(config, training={"program": "graph"})
    if program is None:
        program = Program(config)
    else:
        program.restart(config)
    return program, loop(config, dataset, folder, program, **more)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sophia", "lion"])
def test_a_captured_update_is_taken_over_with_other_rates_and_seed(optimizer, host_graphs, tmp_path):
    first = tiny(model=NOISY, optimizer={"name": optimizer, "lr": 0.01})
    second = tiny(
        seed=4,
        model=NOISY,
        optimizer={"name": optimizer, "lr": 0.003, "weight_decay": 0.4},
        schedule={"kind": "linear", "momentum_warmup": 3},
        training={"updates": 7},
    )
    program, _ = captured_run(first, tmp_path / "first")
    _, taken_over = captured_run(second, tmp_path / "second", program)
    assert HostGraph.made == 1
    assert taken_over["seconds"]["compilation"] == 0
    _, alone = captured_run(second, tmp_path / "alone")
    assert HostGraph.made == 2
    assert without_times(taken_over) == without_times(alone)


def test_another_optimizer_gets_a_capture_of_its_own(host_graphs, tmp_path):
    program, _ = captured_run(tiny(), tmp_path / "muon")
    config = tiny(optimizer={"name": "adamw", "lr": 0.01})
    _, taken_over = captured_run(config, tmp_path / "adamw", program)
    assert HostGraph.made == 2
    _, alone = captured_run(config, tmp_path / "alone")
    assert without_times(taken_over) == without_times(alone)


def test_a_checkpoint_loaded_into_a_captured_program_is_captured_anew(host_graphs, tmp_path):
    config = tiny(training={"updates": 12, "eval_every": 6})
    program, whole = captured_run(config, tmp_path / "whole")
    asked = iter(range(100))
    _, stopped = captured_run(config, tmp_path / "parts", program, should_stop=lambda: next(asked) == 6)
    assert stopped["status"] == "interrupted"
    captured_run(replace(config, seed=8), tmp_path / "other", program)
    assert HostGraph.made == 1
    _, resumed = captured_run(config, tmp_path / "parts", program)
    assert HostGraph.made == 2
    assert without_times(resumed) == without_times(whole)


def test_a_schedule_of_whole_and_tiled_updates_is_not_captured_and_says_so(host_graphs, tmp_path):
    _, metrics = captured_run(tiny(optimizer={"block_size": 16, "block_period": 2}), tmp_path / "run")
    assert metrics["program"] == "compile"
    assert "block_period" in metrics["program_notice"]
    assert HostGraph.made == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_second_run_replays_the_graph_of_the_first(tmp_path):
    gpu = {"device": "cuda", "precision": "fp32", "program": "graph", "updates": 24, "eval_every": 12}
    run(tiny(training=gpu), directory=tmp_path / "first")
    second = tiny(seed=4, optimizer={"lr": 0.005, "momentum": 0.9, "weight_decay": 0.3}, training=gpu)
    taken_over = run(second, directory=tmp_path / "second")
    programs.forget()
    alone = run(second, directory=tmp_path / "alone")
    assert taken_over["program"] == alone["program"] == "graph"
    assert taken_over["seconds"]["compilation"] == 0 < alone["seconds"]["compilation"]
    assert taken_over["peak_memory_bytes"] > 0
    losses = [[row["loss"] for row in metrics["history"]["train"]] for metrics in (taken_over, alone)]
    assert losses[0][:6] == pytest.approx(losses[1][:6], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_program_in_use_is_nobody_elses(compiles_by_tracing):
    config, _ = resolve(tiny(training={"program": "compile"}))
    first = programs.take(config)
    second = programs.take(config)
    assert second is not first
    programs.keep(first)
    assert programs.take(config) is first


def test_at_most_a_few_programs_are_kept_and_eager_ones_not_at_all():
    for seq_len in range(8, 8 + 2 * programs.KEPT):
        config, _ = resolve(tiny(model={"seq_len": seq_len}, training={"program": "compile"}))
        programs.keep(programs.take(config))
    assert len(programs._kept) == programs.KEPT
    programs.forget()
    programs.keep(programs.take(resolve(tiny())[0]))
    assert not programs._kept


def test_a_process_may_compile_more_shapes_than_torch_allows_a_function(monkeypatch):
    compile_ = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options, backend="eager"))
    traced = []
    for seq_len in range(8, 19):
        config, _ = resolve(tiny(model={"seq_len": seq_len, "n_layers": 1}, training={"program": "compile"}))
        program = programs.take(config)
        tokens = torch.zeros(4, seq_len, dtype=torch.int64)
        program.update(0, tokens, tokens, None)
        assert program.update.notice is None
        traced.append(frames())
    assert len(set(traced)) == len(traced)


def test_a_failure_to_compile_is_one_line_and_stays_known_to_the_next_run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", no_compiler)
    for seed in (1, 2):
        metrics = run(tiny(seed=seed, training={"program": "compile"}), directory=tmp_path / str(seed))
        assert metrics["program"] == "eager"
        assert metrics["program_notice"] == "torch.compile failed (no compiler here); operations run one by one"
    eager = run(tiny(seed=2), directory=tmp_path / "eager")
    assert metrics["history"]["train"][-1]["loss"] == eager["history"]["train"][-1]["loss"]


def test_a_backward_pass_that_does_not_compile_falls_back_too(monkeypatch, tmp_path):
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("backward does not compile")

    def broken(model, **_):
        def call(*arguments, **named):
            output = model(*arguments, **named)
            return output._replace(hidden=Breaks.apply(output.hidden))

        return call

    monkeypatch.setattr(torch, "compile", broken)
    accumulated = {"accumulation": 2, "micro_batch_size": 2}
    metrics = run(tiny(training={"program": "compile", **accumulated}), directory=tmp_path / "run")
    assert "backward does not compile" in metrics["program_notice"]
    eager = run(tiny(training=accumulated), directory=tmp_path / "eager")
    losses = [[row["loss"] for row in m["history"]["train"]] for m in (metrics, eager)]
    assert losses[0] == losses[1]
