"""The captured update on a CUDA device: the same arithmetic as eager, the schedule followed exactly."""

import pytest
import torch
from runs import tiny

from muonlab.training.loop import resolve, run
from muonlab.training.programs import Program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODELS = {
    "dense": {},
    "mixture": {"n_experts": 4, "top_k": 2},
    "every expert": {"n_experts": 4, "top_k": 4},
    "random": {"n_experts": 4, "top_k": 2, "dropout": 0.1, "router_noise": 0.1},
}


def trained(tmp_path, program, model="dense", **training):
    options = {"device": "cuda", "precision": "fp32", "program": program, "updates": 24, "eval_every": 12, **training}
    config = tiny(
        name=program,
        model=MODELS[model],
        training=options,
        schedule={"kind": "cosine", "momentum_warmup": 10},
    )
    return config, run(config, directory=tmp_path / f"{program}-{model}")


def test_in_bf16_the_captured_update_gives_the_losses_of_the_eager_one(tmp_path):
    _, eager = trained(tmp_path, "eager", accumulation=3, precision="bf16")
    _, graph = trained(tmp_path, "graph", accumulation=3, precision="bf16")
    assert graph["program"] == "graph", graph["program_notice"]
    losses = [[row["loss"] for row in metrics["history"]["train"]] for metrics in (eager, graph)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("model", ["dense", "mixture"])
def test_the_captured_update_gives_the_losses_of_the_eager_one(model, accumulation, tmp_path):
    _, eager = trained(tmp_path, "eager", model, accumulation=accumulation)
    _, graph = trained(tmp_path, "graph", model, accumulation=accumulation)
    assert graph["program"] == "graph", graph["program_notice"]
    losses = [[row["loss"] for row in metrics["history"]["train"]] for metrics in (eager, graph)]
    assert losses[0][:6] == pytest.approx(losses[1][:6], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # fp16 iterations and routing amplify rounding


def test_a_replay_follows_the_scheduled_learning_rate_exactly(tmp_path):
    config, metrics = trained(tmp_path, "graph")
    drawn = [config.optimizer.lr * config.schedule.factor(update, 24) for update in range(24)]
    assert [row["lr"]["hidden"] for row in metrics["history"]["train"]] == pytest.approx(drawn, rel=1e-6)


def test_dropout_and_router_noise_differ_between_updates_and_repeat_between_runs():
    """On one batch, with weights that stay where they are, the losses show the draws alone. Inputs and targets are views."""
    options = {"device": "cuda", "precision": "fp32", "program": "graph", "updates": 24}
    losses = []
    for _ in range(2):
        config = resolve(tiny(model=MODELS["random"], optimizer={"lr": 1e-12}, training=options))[0]
        update = Program(config).update
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.model.vocab_size, (4, 33), generator=generator).cuda()
        losses.append([update(i, tokens[:, :-1], tokens[:, 1:], None)[0].item() for i in range(8)])
        assert update.program == "graph", update.notice
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len({round(loss, 5) for loss in losses[0]}) == 8


def test_an_update_that_cannot_be_captured_still_draws_says_why_and_trains():
    options = {"device": "cuda", "precision": "fp32", "program": "graph", "updates": 24}
    config = resolve(tiny(model=MODELS["random"], training=options))[0]
    program = Program(config)
    program.update.on_phase = lambda name: torch.cuda.synchronize()
    tokens = torch.randint(config.model.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0)).cuda()
    losses = [program.update(i, tokens[:, :-1], tokens[:, 1:], None)[0].item() for i in range(24)]
    assert program.update.program == "compile"
    assert "no CUDA graph (CUDA error" in (program.update.notice or "")
    assert losses[-1] < losses[0] - 0.3


# Where rounding can send a token to another expert, gradients jump: in bf16 every token visits all.
@pytest.mark.parametrize(
    ("model", "precision"), [("dense", "fp32"), ("mixture", "fp32"), ("dense", "bf16"), ("every expert", "bf16")]
)
def test_the_compiled_program_makes_the_gradients_of_the_eager_one(model, precision):
    found = []
    for program in ("eager", "compile"):
        options = {"device": "cuda", "precision": precision, "program": program, "accumulation": 2}
        config = resolve(tiny(model=MODELS[model], training=options))[0]
        made = Program(config)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.model.vocab_size, (8, 33), generator=generator).cuda()
        made.update(0, tokens[:, :-1], tokens[:, 1:], None)
        assert made.update.program == program, made.update.notice
        found.append({name: parameter.grad for name, parameter in made.model.named_parameters()})
    for name, grad in found[0].items():
        error = (grad - found[1][name]).norm() / grad.norm()
        assert error < (1e-3 if precision == "fp32" else 5e-2), name


def test_auto_is_the_graph_on_cuda(tmp_path):
    _, metrics = trained(tmp_path, "auto", precision="bf16")
    assert metrics["program"] == "graph"
    assert metrics["seconds"]["compilation"] > 0


def test_fp16_scales_the_loss_and_trains_like_bf16(tmp_path):
    _, half = trained(tmp_path, "auto", precision="fp16")
    _, brain = trained(tmp_path / "b", "eager", precision="bf16")
    assert half["program"] == "eager"
    assert half["status"] == "finished"
    last = [metrics["final"]["tune"]["cross_entropy"] for metrics in (half, brain)]
    assert last[0] == pytest.approx(last[1], rel=0.05)


def test_sophias_extra_pass_goes_beside_the_captured_update(tmp_path):
    options = {"device": "cuda", "precision": "fp32", "program": "graph", "updates": 24, "eval_every": 12}
    config = tiny(optimizer={"name": "sophia", "lr": 3e-3, "curvature_every": 4}, training=options)
    metrics = run(config, directory=tmp_path / "run")
    assert metrics["program"] == "graph", metrics["program_notice"]
    first = metrics["history"]["eval"][0]["cross_entropy"]
    assert metrics["final"]["tune"]["cross_entropy"] < first - 0.3


def test_a_captured_run_stopped_and_resumed_ends_where_one_that_was_not_does(tmp_path):
    config, whole = trained(tmp_path / "whole", "graph", checkpoint_every=8)
    seen = []
    first = run(config, directory=tmp_path / "parts", on_event=seen.append, should_stop=lambda: len(seen) > 6)
    assert first["status"] == "interrupted"
    rest = run(config, directory=tmp_path / "parts")
    assert rest["final"]["tune"]["cross_entropy"] == pytest.approx(whole["final"]["tune"]["cross_entropy"], rel=1e-2)
    assert [row["update"] for row in rest["history"]["train"]] == list(range(1, 25))
