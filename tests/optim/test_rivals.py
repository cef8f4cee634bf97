"""AdamW, Lion, SGD and Sophia-G against installed optimizers, closed forms and the definition of their estimator."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from muonlab import Lion, SophiaG
from muonlab.errors import InputError
from muonlab.optim import (
    OPTIMIZERS,
    AdamWOptions,
    ClassOptions,
    LionOptions,
    MuonOptions,
    SGDOptions,
    SophiaGOptions,
    build_optimizer,
    set_lr,
)
from muonlab.optim.rules import bias_correction


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 300), nn.LayerNorm(300), nn.GELU(), nn.Linear(300, 50))


def gradients(seed, *models):
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*(model.parameters() for model in models)):
        gradient = torch.randn(params[0].shape, generator=generator) * 10.0 ** -(seed % 5)
        for param in params:
            param.grad = gradient.to(param.dtype)


def decay_everything(**options):
    return {"embedding_weight_decay": 0.1, "vector_weight_decay": 0.1, "weight_decay": 0.1, **options}


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        (
            AdamWOptions(**decay_everything(lr=1e-2)),
            lambda p: torch.optim.AdamW(p, 1e-2, (0.9, 0.95), weight_decay=0.1),
        ),
        (
            AdamWOptions(**decay_everything(lr=1e-2, betas=(0.9, 0.999), eps=1e-6)),
            lambda p: torch.optim.AdamW(p, 1e-2, (0.9, 0.999), 1e-6, weight_decay=0.1),
        ),
        (
            SGDOptions(lr=0.1, weight_decay=0.0, nesterov=True),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        ),
        (SGDOptions(lr=0.1, weight_decay=0.0, momentum=0.0), lambda p: torch.optim.SGD(p, 0.1)),
    ],
)
def test_100_updates_equal_those_of_torch_to_rounding(options, reference):
    ours, theirs = small_model(), small_model()
    a, b = build_optimizer(ours, options), reference(theirs.parameters())
    for seed in range(100):
        gradients(seed, ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["l2", "independent", "lr_squared"])
def test_every_form_of_decay_is_a_knob_of_every_optimizer(form):
    ours, theirs = small_model(), small_model()
    a = build_optimizer(ours, AdamWOptions(**decay_everything(lr=1e-2, decay_form=form)))
    plain = {"lr": 1e-2, "betas": (0.9, 0.95)}
    if form == "l2":
        b = torch.optim.Adam(theirs.parameters(), weight_decay=0.1, **plain)
    else:
        times = {"independent": 1 / 1e-2, "lr_squared": 1e-2}[form]
        b = torch.optim.AdamW(theirs.parameters(), weight_decay=0.1 * times, **plain)
    for seed in range(20):
        gradients(seed, ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_the_bias_correction_is_exact_where_fp32_would_cancel():
    for beta in (0.9, 0.999, 0.99999):
        for step in (1.0, 10.0, 1e4):
            exact = 1 - beta**step
            assert bias_correction(beta, torch.tensor(step)).item() == pytest.approx(exact, rel=1e-6)
            assert bias_correction(torch.tensor(beta), torch.tensor(step)).item() == pytest.approx(exact, rel=2e-2)
    assert bias_correction(0.0, torch.tensor(3.0)).item() == 1.0


def test_lion_is_the_sign_of_its_interpolation():
    ours, plain = small_model(), small_model()
    optimizer = build_optimizer(ours, LionOptions(**decay_everything(lr=1e-2, betas=(0.9, 0.99))))
    means = [torch.zeros_like(param) for param in plain.parameters()]
    for seed in range(20):
        gradients(seed, ours, plain)
        optimizer.step()
        with torch.no_grad():
            for param, mean in zip(plain.parameters(), means):
                update = (0.9 * mean + 0.1 * param.grad).sign()
                mean.mul_(0.99).add_(0.01 * param.grad)
                param.mul_(1 - 1e-2 * 0.1).sub_(1e-2 * update)
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert (p - q).abs().gt(1e-5).float().mean() < 1e-4  # a sign may turn where the interpolation rounds to zero


def test_lion_and_sophia_are_drop_in_classes():
    for cls in (Lion, SophiaG):
        for params in (small_model(), small_model().parameters()):
            optimizer = cls(params, lr=1e-3)
            assert {row["rule"] for row in optimizer.routing().rows} == {cls.__name__.removesuffix("G").lower()}


def test_sophia_clips_at_one_and_divides_by_curvature_where_it_is_large():
    param = nn.Parameter(torch.zeros(4))
    optimizer = SophiaG([param], lr=1.0, betas=(0.0, 0.0), rho=0.5, weight_decay=0.0)
    optimizer.update_curvature(lambda: (param * torch.tensor([0.0, 1.0, 2.0, 4.0])).sum().backward(), tokens=8)
    torch.testing.assert_close(optimizer.state[param]["hessian"], 8 * torch.tensor([0.0, 1.0, 4.0, 16.0]))
    param.grad = torch.tensor([0.3, 2.0, -32.0, -32.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-1.0, -0.5, 1.0, 0.5]))


def test_the_estimator_has_the_gauss_newton_diagonal_as_its_mean():
    """Gradients on labels drawn from the model: E[tokens * g * g] is the diagonal of J^T (diag(p) - p p^T) J."""
    torch.manual_seed(0)
    tokens, width, classes = 6, 3, 4
    x = torch.randn(tokens, width)
    layer = nn.Linear(width, classes, bias=False)
    p = layer(x).softmax(-1).detach()
    exact = torch.einsum("tc,td->cd", p * (1 - p), x.square()) / tokens
    samples = 4000
    optimizer = SophiaG(layer, betas=(0.9, 1 - 1 / samples))
    total = torch.zeros(classes, width)

    def closure():
        labels = torch.distributions.Categorical(logits=layer(x)).sample()
        nn.functional.cross_entropy(layer(x), labels).backward()

    for _ in range(samples):
        optimizer.update_curvature(closure, tokens=tokens)
        total = optimizer.state[layer.weight]["hessian"]
    weight = 1 - (1 - 1 / samples) ** samples  # of all samples together in the average
    assert ((total / weight - exact).abs() / exact).max() < 0.2


def test_curvature_over_micro_batches_is_that_of_the_whole_batch():
    """A known mistake elsewhere: with accumulation the loss is divided by the steps and the estimate by their square."""
    torch.manual_seed(0)
    x, labels = torch.randn(8, 5), torch.randint(0, 4, (8,))
    layers = [nn.Linear(5, 4), nn.Linear(5, 4)]
    layers[1].load_state_dict(layers[0].state_dict())
    whole, parts = (SophiaG(layer, betas=(0.9, 0.0)) for layer in layers)
    whole.update_curvature(lambda: nn.functional.cross_entropy(layers[0](x), labels).backward(), tokens=8)

    def micro_batches():
        for inputs, targets in zip(x.chunk(4), labels.chunk(4)):
            (nn.functional.cross_entropy(layers[1](inputs), targets) / 4).backward()

    parts.update_curvature(micro_batches, tokens=8)
    for p, q in zip(layers[0].parameters(), layers[1].parameters()):
        torch.testing.assert_close(whole.state[p]["hessian"], parts.state[q]["hessian"])


def test_an_estimate_leaves_gradients_and_momentum_alone_even_when_it_fails():
    model = small_model()
    optimizer = SophiaG(model)
    gradients(0, model)
    kept = [param.grad for param in model.parameters()]
    optimizer.update_curvature(lambda: model(torch.arange(10)).sum().backward(), tokens=10)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), kept))

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.update_curvature(fails, tokens=10)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), kept))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "class"])
def test_embedding_head_and_vector_learning_rates_are_knobs_of_every_optimizer(name):
    options = OPTIMIZERS[name].options(lr=1.0, embedding_lr=2.0, head_lr=3.0, vector_lr=4.0)
    rates = {row["kind"]: row["lr"] for row in build_optimizer(small_model(), options).routing().rows}
    assert rates == {"hidden": 1.0, "embedding": 2.0, "head": 3.0, "vector": 4.0}


OTHERS = {
    "torch.optim.Adam": {"betas": (0.8, 0.9)},
    "torch.optim.NAdam": {"betas": (0.8, 0.9)},
    "torch.optim.Adagrad": {"initial_accumulator_value": 0.1},
    "torch.optim.RMSprop": {"alpha": 0.9, "momentum": 0.5},
    "transformers.Adafactor": {"relative_step": False, "scale_parameter": False},
}


@pytest.mark.parametrize(("path", "arguments"), OTHERS.items(), ids=OTHERS.keys())
def test_any_optimizer_by_import_path_is_that_class_with_a_learning_rate_for_every_kind(path, arguments):
    """Equal to the class itself on groups made by hand, also when it was saved and loaded in mid-run."""
    if path.startswith("transformers"):
        pytest.importorskip("transformers")
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    rates = {"hidden": 1e-2, "embedding": 1e-3, "head": 2e-3, "vector": 5e-3}
    own = {f"{kind}_lr": rate for kind, rate in rates.items() if kind != "hidden"}
    options = ClassOptions(class_path=path, lr=rates["hidden"], weight_decay=0.1, arguments=arguments, **own)
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, options)
    assert type(optimizer) is cls
    assert {row["kind"]: row["lr"] for row in optimizer.routing().rows} == rates
    table = {"0": ("embedding", 0.0), "1": ("hidden", 0.1), "4": ("head", 0.1)}
    groups = [
        {
            "params": [param],
            "lr": rates[kind if param.ndim > 1 else "vector"],
            "weight_decay": decay if param.ndim > 1 else 0.0,
        }
        for (name, param) in theirs.named_parameters()
        for kind, decay in [table.get(name.split(".")[0], ("vector", 0.0))]
    ]
    reference = cls(groups, **arguments)
    for seed in range(6):
        if seed == 3:
            saved = optimizer.state_dict()
            optimizer = build_optimizer(ours, replace(options, lr=7.0))
            optimizer.load_state_dict(saved)
        set_lr(optimizer, 1 / (seed + 1))
        set_lr(reference, 1 / (seed + 1))
        gradients(seed, ours, theirs)
        optimizer.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: ClassOptions(class_path="Adam"), "package.module.Name"),
        (lambda: ClassOptions(class_path="torch.optim.Adamm"), "cannot be imported"),
        (lambda: ClassOptions(class_path="nowhere.Adam"), "cannot be imported"),
        (lambda: ClassOptions(class_path="muonlab.Lion"), "has options of its own"),
        (lambda: ClassOptions(cautious_decay=True), "cautious_decay has no effect"),
        (lambda: ClassOptions(skip_nonfinite=True), "skip_nonfinite has no effect"),
        (lambda: ClassOptions(decay_form="l2"), "decay_form has no effect"),
        (lambda: ClassOptions(class_path="torch.nn.Linear"), "not a torch.optim.Optimizer"),
        (lambda: ClassOptions(class_path="torch.optim.Adam", arguments={"beta": 1}), "refused its arguments"),
        (lambda: SophiaGOptions(rho=0.0), "rho must be a number > 0"),
        (lambda: SophiaGOptions(curvature_every=0), "at least 1"),
        (lambda: SGDOptions(momentum=1.5), "momentum must lie in"),
        (lambda: LionOptions(betas=(0.9,)), "two numbers"),
    ],
)
def test_bad_rival_options_are_refused_with_the_reason(options, words):
    with pytest.raises(InputError, match=words):
        build_optimizer(small_model(), options())


def test_options_of_no_registered_optimizer_are_refused():
    class Other(MuonOptions):
        pass

    with pytest.raises(InputError, match="no optimizer is registered for options of type Other"):
        build_optimizer(small_model(), Other())
