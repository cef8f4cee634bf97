"""The captured update on a CUDA device: the same arithmetic as eager, the schedule followed exactly."""

import pytest
import torch
from runs import tiny

from muonlab.training.loop import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODELS = {
    "dense": {},
    "mixture": {"n_experts": 4, "top_k": 2},
    "random": {"n_experts": 4, "top_k": 2, "dropout": 0.1, "router_noise": 0.1},
}


def trained(tmp_path, program, model="dense", lr=0.02, **training):
    options = {"device": "cuda", "precision": "fp32", "program": program, "updates": 24, "eval_every": 12, **training}
    config = tiny(
        name=program,
        model=MODELS[model],
        optimizer={"lr": lr},
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


def test_dropout_and_router_noise_differ_between_updates_and_repeat_between_runs(tmp_path):
    """With weights that stay where they are the losses show the draws alone: sums of gradients may have any order."""
    runs = [trained(tmp_path / name, "graph", "random", lr=1e-12)[1] for name in "ab"]
    _, without = trained(tmp_path / "c", "graph", "mixture", lr=1e-12)
    first, second, quiet = ([row["loss"] for row in run["history"]["train"]] for run in (*runs, without))
    assert first == pytest.approx(second, rel=1e-6)
    noise = [a - b for a, b in zip(first, quiet)]
    assert len({round(each, 6) for each in noise}) == len(noise)


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
