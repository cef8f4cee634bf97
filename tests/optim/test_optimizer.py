"""The optimizer as torch users know it: groups, schedulers, scaler, closures, checkpoints, odd inputs."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from muonlab import Muon
from muonlab.errors import InputError
from muonlab.optim import AdamWOptions, LionOptions, MuonOptions, Override, build_optimizer, set_lr

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(50, 32),
        nn.Linear(32, 96),
        nn.LayerNorm(96),
        nn.GELU(),
        nn.Linear(96, 32, bias=False),
        nn.Linear(32, 50),
    )


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def run(model, optimizer, updates, first=0):
    for update in range(first, first + updates):
        gradients(model, update)
        optimizer.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def matrix(*shape, seed=0):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


VARIANTS = {
    "plain": {},
    "normuon": {"normuon_beta": 0.95},
    "tiles": {"block_size": 20, "block_period": 3, "normuon_beta": 0.95, "idle": "fade"},
    "bf16 momentum": {"momentum_dtype": "bfloat16"},
    "8-bit momentum": {"momentum_dtype": "int8", "block_size": 20},
    "gradients": {"mars_gamma": 0.025, "laprop_beta": 0.99, "cautious_update": True},
    "entries": {"sign_momentum": True, "normuon_axis": "entries", "normuon_beta": 0.95},
    "sums": {"normuon_axis": "sum", "normuon_beta": 0.0, "row_fraction": 0.5, "decay_form": "l2"},
    "fading": {"idle": "fade"},
    "lion": {"fallback": "lion"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_in_mid_run_equals_the_uninterrupted_run(options, dtype, tmp_path):
    whole, first = small_model().to(dtype), small_model().to(dtype)
    run(whole, Muon(whole, **options), 8)
    optimizer = Muon(first, **options)
    run(first, optimizer, 4)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")

    second = small_model(seed=9).to(dtype)
    optimizer = Muon(second, **{**options, "lr": 123.0})
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for index, state in saved["optimizer"]["state"].items():
        param = [param for group in optimizer.param_groups for param in group["params"]][index]
        for name, value in state.items():
            assert optimizer.state[param][name].dtype == value.dtype
            assert torch.equal(optimizer.state[param][name], value)
    run(second, optimizer, 4, first=4)
    assert same(whole, second)


def test_a_state_saved_before_an_option_existed_is_loaded_with_the_option_as_it_is_now():
    model = small_model()
    optimizer = Muon(model, idle="fade")
    run(model, optimizer, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("idle", None)
    optimizer.load_state_dict(saved)
    assert {group["idle"] for group in optimizer.param_groups if group["rule"] == "muon"} == {"fade"}
    run(model, optimizer, 1)


def test_state_survives_safetensors(tmp_path):
    model = small_model()
    optimizer = Muon(model)
    run(model, optimizer, 2)
    saved = optimizer.state_dict()
    flat = {f"{index}.{name}": value for index, state in saved["state"].items() for name, value in state.items()}
    save_file(flat, tmp_path / "state.safetensors")
    state = {}
    for key, value in load_file(tmp_path / "state.safetensors").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    other = copy.deepcopy(model)
    loaded = Muon(other)
    loaded.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    run(model, optimizer, 2, first=2)
    run(other, loaded, 2, first=2)
    assert same(model, other)


def test_a_deep_copy_and_a_pickle_go_on_alone():
    import pickle

    model = small_model()
    optimizer = Muon(model)
    run(model, optimizer, 2)
    other, copied = copy.deepcopy((model, optimizer))
    again = pickle.loads(pickle.dumps(optimizer))
    again.add_param_group({"params": [matrix(8, 8)]})
    run(model, optimizer, 2, first=2)
    assert not same(model, other)
    run(other, copied, 2, first=2)
    assert same(model, other)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("LambdaLR", {"lr_lambda": lambda update: 0.5**update}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 10, "cycle_momentum": False}),
        ("CosineAnnealingLR", {"T_max": 5}),
    ],
)
def test_torch_schedulers_drive_every_group(scheduler, options):
    model = small_model()
    optimizer = Muon(model, lr=0.1)
    schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options)
    seen = []
    for update in range(4):
        gradients(model, update)
        optimizer.step()
        schedule.step()
        seen.append({group["lr"] for group in optimizer.param_groups})
    assert all(len(rates) == 1 for rates in seen)
    assert len(set.union(*seen)) > 1


def test_a_tensor_learning_rate_is_live_and_equals_the_number():
    a, b = small_model(), small_model()
    lr = torch.tensor(0.1)
    live, plain = Muon(a, lr=lr, dtype="float32"), Muon(b, lr=0.1, dtype="float32")
    assert all(group["lr"] is lr for group in live.param_groups)
    run(a, live, 2)
    run(b, plain, 2)
    lr.fill_(0.01)
    set_lr(plain, 0.1)
    run(a, live, 2, first=2)
    run(b, plain, 2, first=2)
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    set_lr(live, 0.5)
    assert all(group["lr"] is lr for group in live.param_groups)
    assert lr.item() == pytest.approx(0.005)
    saved = live.state_dict()
    lr.fill_(7.0)
    live.load_state_dict(saved)
    assert all(group["lr"] is lr for group in live.param_groups)


def test_the_gradient_scaler_unscales_and_skips():
    a, b = small_model(), small_model()
    scaled, plain = Muon(a), Muon(b)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(0))
    for model, optimizer in ((a, scaled), (b, plain)):
        loss = model(x).square().mean()
        if optimizer is scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    assert same(a, b)
    before = copy.deepcopy(a)
    scaled.zero_grad()
    scaler.scale(a(x).sum() * float("inf")).backward()
    scaler.step(scaled)
    assert same(a, before)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    model = small_model()
    optimizer = Muon(model)
    x = torch.arange(10)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_groups_added_later_are_routed_like_given_ones():
    optimizer = Muon([matrix(8, 8)], lr=0.1)
    later, vector = matrix(8, 8, seed=1), matrix(8, seed=2)
    optimizer.add_param_group({"params": [later, vector], "lr": 0.5, "ns_steps": 3})
    assert [(group["rule"], group["lr"]) for group in optimizer.param_groups] == [
        ("muon", 0.1),
        ("muon", 0.5),
        ("adamw", 0.5),
    ]
    assert optimizer.param_groups[1]["ns_steps"] == 3
    for param in (later, vector):
        param.grad = torch.ones_like(param)
    before = later.detach().clone()
    optimizer.step()
    assert not torch.equal(later.detach(), before)
    overridden = Muon(small_model(), overrides=(Override(name="1.weight", lr=0.5),))
    overridden.add_param_group({"params": [later]})
    assert overridden.param_groups[-1]["lr"] == 1e-3


def test_a_group_that_cannot_be_added_leaves_the_optimizer_as_it_was():
    vector = matrix(8)
    optimizer = Muon([matrix(8, 8), vector])
    for group, words in (
        (
            {"params": [matrix(8, 8, seed=1), vector]},
            r"parameter 1 \[8\] of the added group belongs to the optimizer already",
        ),
        ({"params": [matrix(8, 8, seed=1)], "ns_stepz": 3}, "did you mean 'ns_steps'"),
        ({"params": [matrix(8, 8, seed=1)], "lr": -1.0}, "lr must be a number >= 0"),
    ):
        with pytest.raises(InputError, match=words):
            optimizer.add_param_group(group)
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


def test_groups_in_keller_jordans_form_are_understood():
    head, hidden, gain = matrix(32, 8), matrix(8, 8), matrix(8)
    groups = [
        {"params": [head, gain], "lr": 3e-4, "betas": (0.8, 0.95), "weight_decay": 0.01, "use_muon": False},
        {"params": [hidden], "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0, "use_muon": True},
    ]
    optimizer = Muon(groups, convention="keller")
    adamw, muon = optimizer.param_groups
    assert (adamw["rule"], adamw["lr"], adamw["betas"], adamw["weight_decay"]) == ("adamw", 3e-4, (0.8, 0.95), 0.01)
    assert (muon["rule"], muon["lr"], muon["momentum"], muon["weight_decay"]) == ("muon", 0.02, 0.9, 0.0)


def test_an_empty_group_among_others_is_no_mistake():
    optimizer = Muon([{"params": []}, {"params": [matrix(8, 8)]}])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_overrides_reach_named_parameters_and_groups_of_them():
    model = small_model()
    override = Override(name="1.*", lr=0.5)
    for params in (model.named_parameters(), [{"params": list(model.named_parameters())}]):
        rates = {row["name"]: row["lr"] for row in Muon(params, overrides=(override,)).routing().rows}
        assert (rates["1.weight"], rates["1.bias"], rates["4.weight"]) == (0.5, 0.5, 1e-3)


def test_named_parameters_keep_their_names():
    model = small_model()
    rows = Muon(model.named_parameters()).routing().rows
    assert {row["name"] for row in rows} == {name for name, _ in model.named_parameters()}


def test_stacks_of_matrices_equal_their_slices_and_a_part_of_a_stack_equals_the_whole():
    whole = matrix(6, 12, 20)
    parts = [nn.Parameter(part.detach().clone()) for part in (whole[:2], whole[2:6])]
    slices = [nn.Parameter(part.detach().clone()) for part in whole]
    a, b, c = Muon([whole]), Muon(parts), Muon(slices)
    for seed in range(5):
        whole.grad = matrix(6, 12, 20, seed=10 + seed).detach()
        parts[0].grad, parts[1].grad = whole.grad[:2].clone(), whole.grad[2:].clone()
        for i, part in enumerate(slices):
            part.grad = whole.grad[i].clone()
        for optimizer in (a, b, c):
            optimizer.step()
    assert torch.equal(whole, torch.cat([part.detach() for part in parts]))
    assert torch.equal(whole, torch.stack([part.detach() for part in slices]))


def test_the_workspace_does_not_change_the_result_and_bounds_the_memory():
    models = [nn.Sequential(*[nn.Linear(24, 24, bias=False) for _ in range(5)]) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    sizes = (1, 2 * 16 * 24 * 24, 1 << 30)
    for model, size in zip(models, sizes):
        run(model, Muon(model, max_workspace_bytes=size, dtype="float32"), 3)
        for p, q in zip(model.parameters(), models[0].parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_step_holds_at_most_a_quarter_of_the_matrices_in_extra_memory():
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(64)])
    optimizer = Muon(model)
    run(model, optimizer, 1)
    gradients(model, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= 0.25 * 4 * sum(param.numel() for param in model.parameters())


def test_skip_nonfinite_leaves_everything_as_it_was_and_off_lets_nan_through():
    for bad in (float("nan"), float("inf")):
        model = small_model()
        optimizer = Muon(model, skip_nonfinite=True, normuon_beta=0.95)
        run(model, optimizer, 2)
        reference, untouched = copy.deepcopy((model, optimizer))
        gradients(model, 2)
        model[4].weight.grad[3, 5] = bad
        optimizer.step()
        assert same(model, reference)
        run(model, optimizer, 2, first=3)
        run(reference, untouched, 2, first=3)
        assert same(model, reference)
    model = small_model()
    gradients(model, 0)
    model[4].weight.grad[3, 5] = float("nan")
    Muon(model).step()
    assert torch.isnan(model[4].weight).any()
    assert torch.isfinite(model[1].weight).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_floating_dtype_of_parameters_is_updated_as_well_as_it_can_be_stored(dtype):
    exact, rounded = small_model().double(), small_model().to(dtype)
    exact.load_state_dict(rounded.state_dict())
    a, b = (
        Muon(module, lr=0.05, dtype="float32", normuon_beta=0.9, cautious_decay=True) for module in (exact, rounded)
    )
    for update in range(5):
        gradients(rounded, update)
        for p, q in zip(exact.parameters(), rounded.parameters()):
            p.grad = q.grad.double()
        a.step()
        b.step()
    for p, q in zip(exact.parameters(), rounded.parameters()):
        assert (p - q).norm() <= 8 * torch.finfo(dtype).eps * p.norm() + 1e-4


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    zero=st.booleans(),
    block=st.sampled_from([None, 1, 3, 8]),
)
def test_any_shapes_move_against_the_gradient_and_by_no_more_than_they_should(shapes, zero, block):
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for i, param in enumerate(params):
        param.grad = torch.zeros(param.shape) if zero else matrix(*param.shape, seed=i).detach()
    optimizer = Muon(params, lr=1.0, scale="none", block_size=block, coefficients="polar_express", norm_eps=0.0)
    optimizer.step()
    for param in params:
        if zero:
            assert not param.any()
        else:
            assert (param * param.grad).sum() < 0
            tiles = 1 if block is None else -(-param.shape[0] // block) * -(-param.shape[1] // block)
            assert param.norm() <= 1.2 * (min(param.shape) * tiles) ** 0.5


def test_gradients_in_another_memory_order_are_read_rightly():
    a, b = matrix(12, 20), matrix(12, 20)
    a.grad = matrix(12, 20, seed=1).detach()
    b.grad = a.grad.T.contiguous().T
    Muon([a]).step()
    Muon([b]).step()
    assert torch.equal(a, b)
    model, other = small_model(), small_model()
    gradients(model, 0)
    for p, q in zip(model.parameters(), other.parameters()):
        q.grad = p.grad.T.contiguous().T if p.ndim == 2 else p.grad
    for module in (model, other):
        build_optimizer(module, AdamWOptions()).step()
    assert same(model, other)


def test_parameters_that_lie_transposed_in_memory_are_updated_in_place():
    a = matrix(12, 20)
    b = nn.Parameter(a.detach().T.contiguous().T)
    a.grad = b.grad = matrix(12, 20, seed=1).detach()
    where = b.data_ptr()
    Muon([a]).step()
    Muon([b]).step()
    assert b.data_ptr() == where
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_compiled_step_equals_the_eager_one():
    models = [small_model(), small_model()]
    optimizers = [Muon(model, dtype="float32", idle="move") for model in models]
    compiled = torch.compile(optimizers[1].step, backend="aot_eager")
    for update in range(3):
        for model in models:
            gradients(model, update)
        optimizers[0].step()
        compiled()
    for p, q in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"idle": "fade", "normuon_beta": 0.9, "equilibrate_rows": True, "renormalize": True},
        {"skip_nonfinite": True, "cautious_decay": True, "block_size": 20, "heavy_ball": True},
        {"coefficients": "aol4", "momentum_dtype": "bfloat16", "fallback": "lion"},
        {"method": "gram", "lr": torch.tensor(0.1)},
        {"block_size": 20, "block_period": 2, "idle": "fade", "normuon_beta": 0.9, "method": "mud"},
        {
            "mars_gamma": 0.025,
            "laprop_beta": 0.99,
            "cautious_update": True,
            "nuclear_scale": True,
            "skip_nonfinite": True,
        },
        {"sign_momentum": True, "normuon_axis": "entries", "normuon_beta": 0.9, "momentum_dtype": "int8"},
        {"normuon_axis": "norm", "normuon_beta": 0.9, "fixed_norm": True, "stiefel": True},
        {"normuon_axis": "sum", "normuon_beta": 0.9, "row_fraction": 0.5, "decay_form": "independent"},
    ],
)
def test_a_step_never_asks_a_device_for_a_value(options):
    """Tensors without data cannot be asked: any host sync in the step would raise here."""
    with torch.device("meta"):
        model = small_model()
    optimizer = Muon(model, **options)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Muon([]), "empty list"),
        (lambda: Muon(nn.Identity()), "no parameters"),
        (lambda: Muon([{"params": []}, {"params": []}]), "no parameters"),
        (lambda: Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]), "complex"),
        (lambda: Muon([matrix(4, 4)] * 2), "given twice"),
        (lambda: Muon([{"params": p} for p in [matrix(4, 4)] * 2]), "given twice"),
        (lambda: Muon(small_model(), lr=torch.tensor(0.1), width_scaling=True), "give lr as a number"),
        (lambda: Muon([matrix(4, 4)], overrides=(Override(name="x"),)), "matches no parameter"),
        (lambda: Muon([{"params": [matrix(4, 4)], "momentun": 0.9}]), "did you mean 'momentum'"),
        (lambda: Muon([{"lr": 0.1}]), "needs the key 'params'"),
        (lambda: Muon(["weight"]), "not a parameter"),
        (lambda: Muon([matrix(4, 4)], adjust_lr_fn="match_rms_adam"), "did you mean 'match_rms_adamw'"),
        (lambda: Muon([matrix(4, 4)], ns_coefficients=(1.5, -0.5)), "three numbers"),
        (lambda: Muon([matrix(4, 4)], lr=torch.ones(2)), "one number"),
        (lambda: Muon([matrix(4, 4)], lr=-1.0), "lr must be a number >= 0"),
        (lambda: Muon([matrix(4, 4)], lr=float("nan")), "lr must be a number >= 0"),
        (lambda: Muon([matrix(4, 4)], momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (lambda: Muon([matrix(4, 4)], nestrov=True), "did you mean 'nesterov'"),
        (lambda: MuonOptions(block_period=4), "no effect without block_size"),
        (lambda: MuonOptions(block_size=4, block_period=4, momentum_dtype="int8"), "use momentum_dtype bfloat16"),
        (lambda: MuonOptions(block_size=0), "at least 1"),
        (lambda: MuonOptions(method="gram", dtype="bfloat16"), "not accurate enough"),
        (lambda: MuonOptions(coefficients="cans@1.0"), "safety factor of at least"),
        (lambda: MuonOptions(scale="muonlight"), "did you mean 'moonlight'"),
        (lambda: MuonOptions(idle="stop"), "unknown idle"),
        (lambda: MuonOptions(coefficients="you", ns_steps=4), "exactly 5 steps"),
        (lambda: MuonOptions(betas=(0.9, 1.0)), "betas must lie in"),
    ],
)
def test_bad_options_are_refused_in_one_line_that_names_them(make, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=words) as error:
            make()
    assert "\n" not in str(error.value)


def test_a_sparse_gradient_is_refused_by_name_before_anything_moves():
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(10, 8, sparse=True))
    optimizer = Muon(model)
    before = copy.deepcopy(model)
    model[0].weight.grad = torch.ones(8, 8)
    model[1](torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"'1.weight' is sparse"):
        optimizer.step()
    assert same(model, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    "build",
    [
        Muon,
        lambda model: build_optimizer(model, LionOptions()),
        lambda model: Muon(model, normuon_beta=0.9, normuon_axis="entries"),
    ],
)
@pytest.mark.parametrize("name", ["4.weight", "5.bias"])
@pytest.mark.parametrize("grown", [True, False])
def test_state_of_another_shape_than_its_parameter_is_refused_by_name_before_anything_moves(name, grown, build):
    model = small_model()
    optimizer = build(model)
    run(model, optimizer, 2)
    param = model.get_parameter(name)
    rows = len(param)
    param.grad = None
    param.data = torch.cat([param.data, param.data]) if grown else param.data[: rows // 2].clone()
    gradients(model, 2)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    words = rf"^(momentum_buffer|exp_avg) of '{name}' has shape \({rows},.*, the parameter \({len(param)},.*: delete its state"
    with pytest.raises(InputError, match=words) as error:
        optimizer.step()
    assert "\n" not in str(error.value)
    assert same(model, before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    optimizer.state.pop(param)
    optimizer.step()
    assert not torch.equal(param, before.get_parameter(name))


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_one_state_tensor_of_another_shape_is_refused(key):
    model = small_model()
    optimizer = Muon(model)
    run(model, optimizer, 1)
    state = optimizer.state[model.get_parameter("5.bias")]
    state[key] = state[key][:5].clone()
    with pytest.raises(InputError, match=rf"^{key} of '5.bias' has shape \(5,\), the parameter \(50,\)"):
        optimizer.step()


@pytest.mark.parametrize("name", ["4.weight", "5.bias"])
def test_a_gradient_from_before_its_parameter_grew_is_refused_by_name_before_anything_moves(name):
    model = small_model()
    optimizer = Muon(model)
    gradients(model, 0)
    param = model.get_parameter(name)
    rows = len(param)
    param.data = torch.cat([param.data, param.data])
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=rf"gradient of '{name}' has shape \({rows},.*, the parameter \({2 * rows},"):
        optimizer.step()
    assert same(model, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "of another model"),
        (lambda: nn.Sequential(nn.Linear(8, 16)), "'0.weight' has shape|0.weight has shape"),
        (lambda: nn.ModuleDict({"x": nn.Linear(8, 8)}), "'0.weight' where this optimizer has 'x.weight'"),
    ],
)
def test_the_state_of_another_model_is_refused_and_nothing_changes(other, words):
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = Muon(model)
    run(model, optimizer, 1)
    target = other()
    receiver = Muon(target, lr=0.5)
    with pytest.raises(InputError, match=words):
        receiver.load_state_dict(optimizer.state_dict())
    assert not receiver.state
    assert receiver.param_groups[0]["lr"] == 0.5


def test_the_state_of_a_vector_of_another_length_is_refused_and_nothing_changes():
    model, target = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    target[0].bias = nn.Parameter(torch.zeros(5))
    optimizer, receiver = Muon(model), Muon(target)
    run(model, optimizer, 1)
    with pytest.raises(InputError, match=r"0.bias has shape \(8,\) where this optimizer has \(5,\)"):
        receiver.load_state_dict(optimizer.state_dict())
    assert not receiver.state


def test_hooks_of_one_optimizer_and_of_all_see_every_step_and_a_profiler_its_range():
    param = nn.Parameter(matrix(4, 6))
    optimizer, seen = Muon([param]), []

    def hook(name):
        return lambda owner, args, kwargs: seen.append((name, owner is optimizer))

    def step():
        seen.clear()
        param.grad = matrix(4, 6, seed=1)
        optimizer.step()
        return [name for name, own in seen if own]

    assert step() == []
    handles = [optimizer.register_step_pre_hook(hook("before")), optimizer.register_step_post_hook(hook("after"))]
    assert step() == ["before", "after"]
    for handle in handles:
        handle.remove()
    handles = [
        register_optimizer_step_pre_hook(hook("all, before")),
        register_optimizer_step_post_hook(hook("all, after")),
    ]
    assert step() == ["all, before", "all, after"]
    for handle in handles:
        handle.remove()
    assert step() == []
    with torch.profiler.profile() as profile:
        step()
    assert "Optimizer.step#Muon.step" in [event.key for event in profile.key_averages()]


def test_a_closure_computes_gradients_and_the_step_leaves_gradient_mode_as_it_was():
    param = nn.Parameter(matrix(4, 6))
    optimizer = Muon([param])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    before = param.detach().clone()
    with torch.no_grad():
        assert optimizer.step(closure) == (before**2).sum()
        assert not torch.is_grad_enabled()
    optimizer.step()
    assert torch.is_grad_enabled()
    assert param.requires_grad
    assert not torch.equal(param, before)
