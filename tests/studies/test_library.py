"""The packaged studies say what the seeds' documents say; every expected number here was copied from those by hand."""

import math
from dataclasses import replace

import pytest
import torch

from muonlab.models import Transformer
from muonlab.optim.registry import build_optimizer
from muonlab.studies.format import library, read_file
from muonlab.studies.study import Cell, Study, read_study
from muonlab.training.config import optimizer_name, with_vocabulary

CELLS = {
    # seed 000: 3 optimizers x 3 losses, and AdamW
    "losses": 12,
    "optimizer-rates": 4 * 6,
    # seed 001
    "exp9": 7,
    "exp9-muon-lr": 7,
    "exp9-adam-lr": 11,
    "exp9-adam-suite": 7,
    "exp9-momentum": 3,
    "exp9-optimal": 15,
    "exp9-defaults": 2,
    "exp9-two-rates": 2 * 4 * 3,
    # seed 002: 3 x 2 x 3
    "grid18": 18,
    "grid18-rivals": 5 * 2 * 6,
    # seed 003
    "hybrid": 3 * 4,
    "width-scaling": 3 * 4,
    "strategies": 5 * 3,
    "momentum-warmup": 6,
    "warmdown": 2 * 6 + 2,
    "range-test": 2 * 9 + 2 * 5 + 2,
    # seed 004: AdamW, whole matrices, 1024, 512, 256, 192
    "block-size": 6,
    "block-rates": 5 * 3,
    "block-period": 2 + 4 * 3,
    # asked for
    "schedules": 2 * 3 * 6 + 6,
    "warmup": 2 * 5,
    "attention": 2 * 5,
    "activations": 2 * 5,
}
TWO_VERSIONS = {
    "losses",
    "exp9",
    "exp9-muon-lr",
    "exp9-adam-lr",
    "exp9-adam-suite",
    "exp9-momentum",
    "exp9-optimal",
    "exp9-defaults",
    "grid18",
    "hybrid",
    "block-size",
}
SEED_001 = sorted(name for name in TWO_VERSIONS if name.startswith("exp9"))


def cell(study: Study, name: str) -> Cell:
    return next(entry for entry in study.cells if entry.name == name)


def along(study: Study, case: str, axis: str) -> list[object]:
    return [entry.values[axis] for entry in study.cells if entry.case == case]


def last_share(study: Study, name: str) -> float:
    """The learning rate of the last update as a share of the largest one."""
    config = cell(study, name).config
    updates = config.training.updates
    factors = [config.schedule.factor(update, updates) for update in range(updates)]
    return factors[-1] / max(factors)


def routing(config) -> dict[str, dict]:
    small = replace(config.model, vocab_size=256, d_model=64, n_layers=1, n_heads=2, d_ff=64)
    return {row["name"]: row for row in build_optimizer(Transformer(small), config.optimizer).routing().rows}


def test_the_library_holds_the_studies_of_the_seeds_and_those_they_asked_for():
    assert set(library()) == set(CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_every_version_and_scale_reads_and_has_the_cells_of_its_source(name):
    _, file = read_file(name)
    assert set(file.versions) == ({"as-published", "corrected"} if name in TWO_VERSIONS else set())
    assert {"micro"} <= set(file.scales) <= {"micro", "enwik8"}
    for version in file.versions or [None]:
        for scale in ("full", *file.scales):
            study = read_study(name, version=version, scale=scale)
            assert len(study.cells) == CELLS[name]
            configs = [entry.config.model_copy(update={"name": ""}) for entry in study.cells]
            twice = [a for a in range(len(configs)) for b in range(a) if configs[a] == configs[b]]
            assert not twice, f"{study.cells[twice[0]].name} is the same run as another cell"


@pytest.mark.parametrize("name", CELLS)
def test_every_study_says_what_it_asks_where_it_comes_from_and_has_a_reference(name):
    _, file = read_file(name)
    assert file.question.endswith((".", "?"))
    assert file.source
    assert file.notes
    assert file.reference
    assert file.source.startswith("new") or "seed 00" in file.source
    if file.versions:
        assert file.default == "corrected"
    quick = read_study(name, quick=True)
    assert 2 <= len(quick.cells) <= CELLS[name]


@pytest.mark.parametrize("name", CELLS)
def test_the_micro_scale_has_100_updates_of_enwik8_on_one_thread_and_keeps_cells_axes_and_schedules(name):
    _, file = read_file(name)
    for version in file.versions or [None]:
        full, micro = (read_study(name, version=version, scale=scale) for scale in ("full", "micro"))
        assert [entry.name for entry in micro.cells] == [entry.name for entry in full.cells]
        observed = {axis.name for axis in file.axes if axis.observed}  # block sizes shrink with the matrices
        assert [a for a in micro.axes if a.name not in observed] == [a for a in full.axes if a.name not in observed]
        for large, small in zip(full.cells, micro.cells, strict=True):
            training, model = small.config.training, small.config.model
            assert training.updates >= 100
            assert training.threads == 1
            assert small.config.data.corpus == "enwik8"
            assert small.config.data.max_documents is None
            assert training.micro_batch_size * training.accumulation * model.seq_len <= 2048
            assert model.vocab_size == 0
            assert model.d_model <= 256
            assert {"tune", "report"} <= set(training.eval_splits)
            a, b = large.config.schedule, small.config.schedule
            assert replace(a, momentum_warmup=0) == replace(b, momentum_warmup=0)
            assert (a.momentum_warmup > 0) == (b.momentum_warmup > 0)
            assert type(large.config.optimizer) is type(small.config.optimizer)


def test_losses_crosses_three_optimizers_and_adamw_with_three_losses():
    study = read_study("losses")
    expected = {"": (0.0, 0.0), "_smoothing": (0.1, 0.0), "_focal": (0.0, 2.0)}
    for optimizer in ("muon", "lion", "sophia", "adamw"):
        for loss, numbers in expected.items():
            entry = cell(study, optimizer + loss)
            assert (entry.config.loss.label_smoothing, entry.config.loss.focal_gamma) == numbers
            assert entry.group == optimizer
    # seed 000, table "Training Efficiency": the four cells that were run
    published = {entry.name: entry.published for entry in study.cells if entry.published}
    assert published == {
        "muon": {"loss": 4.6801, "accuracy": 0.2543, "perplexity": 107.78, "minutes": 1.5},
        "muon_smoothing": {"loss": 4.7497, "minutes": 1.6},
        "lion_focal": {"loss": 6.7205, "minutes": 1.3},
        "sophia_smoothing": {"loss": 6.3123, "minutes": 2.4},
    }


def test_losses_as_published_is_three_quarters_of_a_cosine_without_warm_up():
    study = read_study("losses", version="as-published")
    assert {entry.config.training.updates for entry in study.cells} == {125}
    # 500 // 3 = 166 updates to the first restart; the floor is 1 % of Muon's rate
    expected = 0.01 + 0.99 * (1 + math.cos(math.pi * 124 / 165)) / 2
    assert last_share(study, "muon") == pytest.approx(expected, abs=1e-6)
    assert cell(study, "muon").config.schedule.factor(0, 125) == 1.0
    assert [cell(study, name).config.optimizer.lr for name in ("muon", "lion", "sophia", "adamw")] == [
        0.01,
        0.001,
        0.01,
        0.001,
    ]


def test_exp9_has_the_seeds_names_and_settings():
    study = read_study("exp9")
    names = "muon_baseline adam_baseline adam_higher_lr adam_lower_lr muon_only muon_constant_lr adam_constant_lr"
    assert [entry.name for entry in study.cells] == names.split()
    rates = {entry.name: entry.config.optimizer.lr for entry in study.cells}
    assert rates == {
        "muon_baseline": 0.01,
        "adam_baseline": 0.001,
        "adam_higher_lr": 0.002,
        "adam_lower_lr": 0.0005,
        "muon_only": 0.02,
        "muon_constant_lr": 0.01,
        "adam_constant_lr": 0.001,
    }
    config = cell(study, "muon_baseline").config
    model = config.model
    assert (model.d_model, model.n_heads, model.n_layers, model.d_ff, model.seq_len) == (384, 8, 6, 1536, 512)
    assert (model.n_experts, model.top_k, model.load_balancing) == (8, 2, 0.01)
    assert config.optimizer.embedding_lr == config.optimizer.vector_lr == 0.001
    training = config.training
    assert (training.updates, training.micro_batch_size, training.accumulation, training.clip_norm) == (1000, 24, 4, 1)
    assert (config.schedule.kind, config.schedule.warmup, config.schedule.final) == ("cosine", 0.05, 0.1)
    assert cell(study, "muon_constant_lr").config.schedule.kind == "constant"
    assert [entry.name for entry in read_study("exp9", quick=True).cells] == ["muon_baseline", "adam_baseline"]


def test_exp9_as_published_ends_its_cosine_at_0_905_of_the_peak_and_corrected_at_0_1():
    published, corrected = (read_study("exp9-optimal", version=version) for version in ("as-published", "corrected"))
    assert last_share(published, "muon_optimal") == pytest.approx(0.905, abs=0.002)
    assert last_share(published, "muon_linear_decay") == pytest.approx(0.81, abs=0.005)
    assert last_share(published, "muon_step_decay") == 1.0
    assert last_share(corrected, "muon_optimal") == pytest.approx(0.1)
    assert last_share(corrected, "muon_linear_decay") == pytest.approx(0.1)
    assert last_share(corrected, "muon_step_decay") == pytest.approx(0.5**3)
    schedule = cell(published, "muon_optimal").config.schedule
    warming = [schedule.factor(update, 125) for update in range(25)]  # 5 % of 500: a fifth of the 125 updates made
    assert warming == pytest.approx([(update + 1) / 25 for update in range(25)])


@pytest.mark.parametrize(
    ("name", "updates"),
    [
        ("exp9", 250),
        ("exp9-muon-lr", 50),
        ("exp9-adam-lr", 50),
        ("exp9-adam-suite", 125),
        ("exp9-momentum", 125),
        ("exp9-optimal", 125),
        ("exp9-defaults", 125),
    ],
)
def test_as_published_runs_of_seed_001_are_a_quarter_of_the_corrected_ones(name, updates):
    for version, factor, stretch in (("as-published", 1, 4.0), ("corrected", 4, 1.0)):
        for entry in read_study(name, version=version).cells:
            assert entry.config.training.updates == factor * updates
            assert entry.config.schedule.stretch == stretch
            assert entry.config.training.accumulation == 4


@pytest.mark.parametrize("name", SEED_001)
def test_as_published_muon_of_seed_001_has_no_decay_and_orthogonalises_routers(name):
    for version in ("as-published", "corrected"):
        for entry in read_study(name, version=version).cells:
            rows = routing(entry.config)
            router, hidden = rows["blocks.0.feed_forward.router.weight"], rows["blocks.0.feed_forward.experts.up"]
            embedding, vector = rows["embedding.weight"], rows["norm.weight"]
            muon = hidden["rule"] == "muon"
            if version == "as-published":
                decay = {"exp9-defaults new_defaults": 0.2}.get(f"{name} {entry.name}")
                decay = decay or float(entry.name.rpartition("wd_")[2] if "wd_" in entry.name else 0.1)
                assert router["rule"] == hidden["rule"]
                assert hidden["weight_decay"] == router["weight_decay"] == (0.0 if muon else decay)
                assert embedding["weight_decay"] == vector["weight_decay"] == decay
                assert router["lr"] == hidden["lr"]
            else:
                assert router["rule"] == ("muon" if entry.name == "muon_only" else "adamw")
                assert hidden["weight_decay"] > 0
                assert vector["weight_decay"] == 0
            assert embedding["rule"] == ("muon" if (entry.name, version) == ("muon_only", "corrected") else "adamw")
            assert vector["rule"] == "adamw"


def test_both_sweeps_of_seed_001_have_its_learning_rates_and_losses():
    muon = read_study("exp9-muon-lr")
    assert along(muon, "muon", "lr") == [0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
    for entry in muon.cells:  # the source's AdamW leg: a tenth of Muon's rate
        options = entry.config.optimizer
        assert options.embedding_lr == options.vector_lr == pytest.approx(options.lr / 10)
    adam = read_study("exp9-adam-lr")
    rates = [0.0001, 0.0002, 0.0003, 0.0005, 0.0007, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01]
    assert along(adam, "adam", "lr") == rates
    assert [entry.published["loss"] for entry in muon.cells] == [6.0220, 5.8858, 5.8145, 5.7649, 5.7488, 5.7200, 5.7491]
    losses = [8.5076, 7.6188, 7.3329, 7.0318, 6.8148, 6.7262, 6.8494, 6.9987, 7.3445, 7.4220, 7.4575]
    assert [entry.published["loss"] for entry in adam.cells] == losses
    assert cell(adam, "adam lr=0.001").published["accuracy"] == 0.1518
    assert cell(adam, "adam lr=0.0001").published["accuracy"] == 0.0896


def test_suites_of_seed_001_hold_its_tables():
    adam = {entry.name: entry.published for entry in read_study("exp9-adam-suite").cells}
    assert {name: numbers["loss"] for name, numbers in adam.items()} == {
        "adam_constant_lr_optimal": 5.5477,
        "adam_no_warmup": 5.5887,
        "adam_warmup_0.1": 5.7280,
        "adam_optimal": 5.7521,
        "adam_optimal_wd_0.2": 5.7733,
        "adam_optimal_wd_0.05": 5.8084,
        "adam_linear_decay": 5.8106,
    }
    assert adam["adam_constant_lr_optimal"] == {
        "loss": 5.5477,
        "best_loss": 5.5477,
        "accuracy": 0.2212,
        "minutes": 1.80,
    }
    # column "Final Loss" of the suite of 15
    suite = {entry.name: entry.published for entry in read_study("exp9-optimal").cells}
    assert {name: numbers["loss"] for name, numbers in suite.items()} == {
        "muon_optimal_wd_0.2": 5.1686,
        "muon_momentum_0.85": 5.1893,
        "muon_optimal_ns10": 5.2021,
        "muon_optimal_wd_0.05": 5.2064,
        "muon_optimal": 5.2007,
        "muon_momentum_0.92": 5.1920,
        "muon_optimal_ns3": 5.1966,
        "muon_optimal_no_nesterov": 5.1977,
        "muon_no_warmup": 5.2676,
        "muon_linear_decay": 5.2301,
        "muon_lr_0.09_momentum_0.9": 5.2339,
        "muon_warmup_0.1": 5.2296,
        "muon_lr_0.1_momentum_0.9": 5.2518,
        "muon_step_decay": 5.2518,
        "adam_baseline": 5.7517,
    }
    assert suite["muon_optimal_ns10"] == {"loss": 5.2021, "best_loss": 5.1779, "accuracy": 0.2539, "minutes": 2.10}
    momentum = {entry.values["momentum"]: entry.published for entry in read_study("exp9-momentum").cells}
    assert momentum[0.9] == {"loss": 5.1930, "best_loss": 5.1875, "accuracy": 0.2559, "minutes": 2.00}
    assert (momentum[0.97]["loss"], momentum[0.99]["loss"]) == (5.2865, 5.3544)
    old, new = read_study("exp9-defaults").cells
    assert (old.published["loss"], old.published["accuracy"]) == (5.72, 0.201)
    assert (new.published["loss"], new.published["accuracy"]) == (5.20, 0.255)
    assert (new.config.optimizer.lr, new.config.optimizer.momentum, new.config.optimizer.weight_decay) == (
        0.07,
        0.9,
        0.2,
    )


def test_the_optimal_suite_changes_one_thing_at_a_time_once_corrected_and_momentum_too_as_published():
    changed = ("muon_no_warmup", "muon_warmup_0.1", "muon_linear_decay", "muon_step_decay")
    for version, momentum in (("as-published", 0.95), ("corrected", 0.9)):
        study = read_study("exp9-optimal", version=version)
        assert {cell(study, name).config.optimizer.momentum for name in changed} == {momentum}
        assert cell(study, "muon_optimal").config.optimizer.momentum == 0.9
        assert cell(study, "muon_optimal_ns3").config.optimizer.ns_steps == 3
        assert cell(study, "muon_optimal_ns10").config.optimizer.ns_steps == 10
        assert not cell(study, "muon_optimal_no_nesterov").config.optimizer.nesterov
        assert cell(study, "muon_lr_0.1_momentum_0.9").config.optimizer.lr == 0.1


def test_grid18_is_the_seeds_grid_with_its_ranking():
    study = read_study("grid18")
    grid = [(e.values["lr"], e.values["momentum"], e.values["ns_steps"]) for e in study.cells]
    assert grid == [(lr, mom, ns) for lr in (1 / 32, 1 / 16, 1 / 8) for mom in (7 / 8, 15 / 16) for ns in (4, 8, 16)]
    ranking = sorted(study.cells, key=lambda entry: entry.published["loss"])
    order = [(entry.values["lr"], entry.values["momentum"], entry.values["ns_steps"]) for entry in ranking]
    assert order[:10] == [
        (1 / 32, 7 / 8, 4),
        (1 / 32, 15 / 16, 4),
        (1 / 32, 7 / 8, 16),
        (1 / 32, 7 / 8, 8),
        (1 / 32, 15 / 16, 8),
        (1 / 32, 15 / 16, 16),
        (1 / 16, 7 / 8, 4),
        (1 / 16, 7 / 8, 8),
        (1 / 16, 7 / 8, 16),
        (1 / 16, 15 / 16, 4),
    ]
    assert order[-1] == (1 / 8, 15 / 16, 8)
    best, worst = ranking[0].published, ranking[-1].published
    assert (best["loss"], best["perplexity"], best["accuracy"]) == (4.3998, 81.44, 0.3550)
    assert best["minutes"] * 60 == pytest.approx(131.3, abs=0.01)
    assert (worst["loss"], worst["perplexity"], worst["accuracy"]) == (5.9199, 372.39, 0.2004)
    for entry in study.cells:  # every published perplexity is the exponential of its loss, so no digit was mistyped
        assert entry.published["perplexity"] == pytest.approx(math.exp(entry.published["loss"]), rel=2e-4)
        assert entry.config.tokens_per_update * entry.config.training.updates == 1500 * 32 * 256


def test_grid18_as_published_makes_750_updates_without_decay_of_hidden_matrices():
    study = read_study("grid18", version="as-published")
    config = study.cells[0].config
    assert config.tokens_per_update * config.training.updates == 1500 * 32 * 256
    assert (config.training.updates, config.training.accumulation) == (750, 2)
    progress = (749 - 75) / (1499 - 75)
    assert last_share(study, study.cells[0].name) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    assert config.optimizer.weight_decay == 0
    assert config.optimizer.embedding_weight_decay == 0.1


@pytest.mark.parametrize("name", ["optimizer-rates", "grid18-rivals", "hybrid", "strategies", "block-rates"])
def test_new_comparisons_give_every_optimizer_the_same_number_of_trials(name):
    study = read_study(name)
    trials = [sum(entry.group == group for entry in study.cells) for group in {entry.group for entry in study.cells}]
    assert len(set(trials)) == 1
    assert len(trials) >= 3


def test_hybrid_has_the_guides_learning_rates():
    study = read_study("hybrid")
    config = cell(study, "hybrid lr=0.02").config
    options = config.optimizer
    assert (options.lr, options.embedding_lr, options.head_lr) == (0.02, 0.2, 0.004)
    assert (options.betas, options.eps, options.weight_decay) == ((0.8, 0.95), 1e-10, 0.0)
    assert options.width_scaling
    assert options.min_dim == 16
    momenta = [config.schedule.momentum(update, options.momentum) for update in (0, 150, 300, 799)]
    assert momenta == pytest.approx([0.85, 0.90, 0.95, 0.95])
    factors = [config.schedule.factor(update, 800) for update in (0, 600, 799)]
    assert factors == [1.0, 1.0, 0.0]
    only = cell(study, "adamw_only lr=0.002").config.optimizer
    assert (only.embedding_lr, only.head_lr, only.betas) == (0.2, 0.004, (0.8, 0.95))
    micro = cell(read_study("hybrid", scale="micro"), "adamw_only lr=0.002").config.optimizer
    scale = (128 / 768) ** -0.5  # AdamW's options do not scale by width themselves
    assert (micro.embedding_lr, micro.head_lr) == pytest.approx((0.2 * scale, 0.004 * scale), rel=1e-2)
    printed = cell(read_study("hybrid", version="as-published"), "hybrid lr=0.02").config.optimizer
    assert (printed.coefficients, printed.scale, printed.nesterov) == ("cubic", "none", False)


def test_range_test_holds_both_ends_that_the_guides_range_misses():
    study = read_study("range-test")
    published = along(study, "muon_as_published", "lr")
    assert published[0] == 1e-8
    assert published[-1] == pytest.approx(1e-8 * 1.01**999, rel=0.02)
    assert max(published) < 0.004  # the lowest rate that the guide recommends
    assert along(study, "muon", "lr")[0] == 1e-4
    assert along(study, "muon", "lr")[-1] == 1.0
    assert along(study, "adamw", "lr")[0] == 1e-5
    assert along(study, "adamw", "lr")[-1] == 0.1
    assert {c.config.schedule.kind for c in study.cells if c.values} == {"constant"}
    ramp = cell(study, "muon_ramp").config
    assert ramp.optimizer.lr * ramp.schedule.factor(0, 100) == pytest.approx(1e-6)
    assert ramp.schedule.factor(99, 100) == 1.0


def test_block_sizes_are_the_seeds_and_an_eighth_of_them_at_the_micro_scale():
    sizes = {"muon_full": None, "block_1024": 1024, "block_512": 512, "block_256": 256, "block_192": 192}
    study, micro = read_study("block-size"), read_study("block-size", scale="micro")
    assert cell(study, "adamw").config.optimizer.lr == 1e-3
    for name, size in sizes.items():
        options = cell(study, name).config.optimizer
        assert (options.block_size, options.lr, options.weight_decay) == (size, 1e-3, 0.1)
        assert cell(micro, name).config.optimizer.block_size == (size // 8 if size else None)
    for large, small in zip(study.cells, micro.cells, strict=True):
        assert (large.config.model.d_model, large.config.model.d_ff) == (1024, 4864)
        assert (small.config.model.d_model * 8, small.config.model.d_ff * 8) == (1024, 4864)
        assert (large.config.training.updates, large.config.training.micro_batch_size) == (10_000, 8)
    period = read_study("block-period")
    assert sorted(set(along(period, "period", "block_period"))) == [2, 5, 10, 20]
    assert {entry.config.optimizer.block_size for entry in period.cells if entry.case == "period"} == {256}


def test_schedules_and_warm_ups_are_tried_under_both_optimizers():
    study = read_study("schedules")
    kinds = {"constant", "cosine", "linear", "exponential", "step", "wsd"}
    for case in ("muon", "adamw", "muon_momentum"):
        assert {entry.config.schedule.kind for entry in study.cells if entry.case == case} == kinds
    warm = read_study("warmup")
    assert along(warm, "muon", "warmup") == along(warm, "adamw", "warmup") == [0.0, 0.02, 0.05, 0.1, 0.2]
    down = read_study("warmdown")
    assert along(down, "muon", "decay") == along(down, "adamw", "decay") == [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    for name in ("schedules", "warmup", "warmdown", "attention", "activations"):
        micro = read_study(name, scale="micro")
        assert {entry.config.training.updates for entry in micro.cells} == {100}


def test_activation_variants_have_the_same_number_of_parameters():
    for scale in ("full", "micro"):
        study = read_study("activations", scale=scale)
        sizes = set()
        for entry in study.cells:
            with torch.device("meta"):
                model = Transformer(replace(entry.config.model, vocab_size=256))
            sizes.add(sum(parameter.numel() for parameter in model.parameters()))
        assert len(sizes) == 1
        activations = {entry.config.model.activation for entry in study.cells}
        assert activations == {"silu", "gelu", "relu2", "swiglu", "geglu"}


def test_attention_variants_are_the_same_under_both_optimizers():
    study = read_study("attention")
    forms = {}
    for optimizer in ("muon", "adamw"):
        own = [entry.config.model for entry in study.cells if entry.group == optimizer]
        forms[optimizer] = [(model.qk_norm, model.n_kv_heads) for model in own]
    assert forms["muon"] == forms["adamw"] == [(False, None), (True, None), (False, 2), (False, 1), (True, 2)]


def test_a_best_loss_is_given_where_the_seed_states_one_and_is_at_most_the_final_one():
    given = {}
    for name in SEED_001:
        for one in read_study(name).cells:
            if one.published and "best_loss" in one.published:
                given.setdefault(name, []).append(one)
                assert one.published["best_loss"] <= one.published["loss"]
    counts = {name: len(cells) for name, cells in given.items()}
    assert counts == {"exp9": 2, "exp9-adam-lr": 11, "exp9-adam-suite": 7, "exp9-momentum": 3, "exp9-muon-lr": 7, "exp9-optimal": 15}  # fmt: skip
    assert cell(read_study("exp9-optimal"), "muon_momentum_0.85").published["best_loss"] == 5.158


def test_published_numbers_belong_to_the_version_that_does_what_the_source_did():
    for name in TWO_VERSIONS - {"hybrid", "block-size"}:
        assert read_study(name, version="as-published").published_applies
        assert not read_study(name, version="corrected").published_applies
        assert not read_study(name, version="as-published", scale="micro").published_applies


@pytest.mark.parametrize(
    "name", ["exp9", "exp9-defaults", "exp9-momentum", "exp9-muon-lr", "exp9-optimal", "grid18", "losses"]
)
@pytest.mark.parametrize("scale", ["full", "micro"])
def test_as_published_query_key_and_value_are_one_matrix_and_corrected_three(name, scale):
    views = {}
    for version in ("as-published", "corrected"):
        study = read_study(name, version=version, scale=scale)
        config = next(entry.config for entry in study.cells if optimizer_name(entry.config.optimizer) == "muon")
        with torch.device("meta"):
            model = Transformer(with_vocabulary(config).model)
        rows = build_optimizer(model, config.optimizer).routing().rows
        views[version] = {row["view"] for row in rows if row["name"].endswith("qkv.weight")}
    assert views["as-published"] == {"matrix"}
    assert all("split" in view for view in views["corrected"])
