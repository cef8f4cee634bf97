"""Properties of the polar factor, against the singular value decomposition in fp64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import InputError
from muonlab.optim import orthogonalize
from muonlab.optim.coefficients import COEFFICIENTS, resolve
from muonlab.optim.polar import precondition

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(m, n, spectrum, seed=0):
    u = torch.linalg.qr(random(m, m, seed=seed))[0][:, : len(spectrum)]
    v = torch.linalg.qr(random(n, n, seed=seed + 1))[0][:, : len(spectrum)]
    return (u * spectrum) @ v.mT


def by_svd(x, steps):
    """The scalar polynomials applied to the singular values of the normalised matrix."""
    u, s, vh = torch.linalg.svd(x / x.norm(), full_matrices=False)
    for a, b, c in steps:
        s = s * (a + s * s * (b + s * s * c))
    return (u * s) @ vh


@pytest.mark.parametrize("name", [name for name in COEFFICIENTS if name != "aol4"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_iterating_the_matrix_is_iterating_its_singular_values(name, shape):
    x = random(*shape)
    expected = by_svd(x, resolve(name).steps)
    torch.testing.assert_close(orthogonalize(x, name), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(orthogonalize(x, name, method="gram"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_values_of_random_matrices_lie_in_the_band(name):
    start, low, high = COEFFICIENTS[name].band
    x = with_spectrum(32, 48, torch.linspace(start * 8, 1, 32, dtype=torch.float64))  # norm below 8: all above `start`
    s = torch.linalg.svdvals(orthogonalize(x, name))
    assert s.min() >= low - (0.25 if name == "aol4" else 1e-9)  # row scaling may lower the smallest singular values
    assert s.max() <= high + 1e-9


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
def test_the_update_never_ascends_even_when_the_input_is_nearly_of_rank_one(name, dtype, noise):
    for seed in range(5):
        u, v = random(48, 1, seed=seed), random(1, 64, seed=seed + 100)
        x = (u @ v / (u.norm() * v.norm()) + noise * random(48, 64, seed=seed + 200) / 55).float()
        o = orthogonalize(x, name, dtype=dtype).float()
        along = (u.float().mT @ o @ v.float().mT / (u.norm() * v.norm())).item()
        assert along > 0.6
        assert (x * o).sum() > 0


@pytest.mark.parametrize("method", ["standard", "gram", "svd", "mud"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 9, 4), (1, 1), (1, 8), (8, 1), (2, 1, 1)])
def test_a_stack_is_its_matrices_one_by_one(method, shape):
    x = random(*shape, dtype=torch.float32)
    whole = orthogonalize(x, dtype="float32", method=method)
    assert whole.shape == x.shape
    for index in itertools.product(*(range(size) for size in shape[:-2])):
        one = orthogonalize(x[index], dtype="float32", method=method)
        torch.testing.assert_close(whole[index], one, rtol=0, atol=3e-5)


def test_a_stack_of_large_matrices_equals_the_loop_bit_for_bit():
    x = random(3, 96, 256, dtype=torch.float32)
    for dtype in ("float32", "bfloat16"):
        whole = orthogonalize(x, dtype=dtype)
        assert all(torch.equal(whole[i], orthogonalize(x[i], dtype=dtype)) for i in range(3))


@pytest.mark.parametrize("method", ["standard", "gram", "svd"])
def test_orthogonal_changes_of_basis_and_transposition_pass_through(method):
    x = random(12, 20)
    u, v = torch.linalg.qr(random(12, 12, seed=1))[0], torch.linalg.qr(random(20, 20, seed=2))[0]
    o = orthogonalize(x, method=method)
    torch.testing.assert_close(orthogonalize(u @ x @ v, method=method), u @ o @ v, rtol=0, atol=1e-10)
    torch.testing.assert_close(orthogonalize(x.mT, method=method), o.mT, rtol=0, atol=1e-12)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(x[:, order], method=method), o[:, order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("method", ["standard", "gram", "svd"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_zero_padding_changes_nothing_but_rounding(name, method, shape):
    x = random(2, *shape)
    padded = torch.nn.functional.pad(x, (0, 7, 0, 7))
    o = orthogonalize(padded, name, method=method)
    torch.testing.assert_close(o[:, : shape[0], : shape[1]], orthogonalize(x, name, method=method), rtol=0, atol=1e-9)
    assert not o[:, shape[0] :].any()
    assert not o[:, :, shape[1] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-8, 1e8, 1e19, 1e30])
def test_positive_scale_of_the_input_does_not_matter(dtype, scale):
    x = random(3, 24, 40, dtype=dtype)
    expected = orthogonalize(x, dtype=dtype)
    torch.testing.assert_close(orthogonalize(x * scale, dtype=dtype), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("work", ["float16", "bfloat16"])
def test_half_precision_iterations_see_tiny_and_huge_fp32_gradients(work):
    x = random(24, 40, dtype=torch.float32)
    expected = orthogonalize(x, dtype=work)
    for scale in (2.0**-100, 2.0**100):  # powers of two: exactly the same mantissas
        torch.testing.assert_close(orthogonalize(x * scale, dtype=work), expected, rtol=0, atol=4e-2)


@pytest.mark.parametrize("method", ["standard", "gram", "svd", "mud"])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_zero_in_gives_exact_zero_out(name, method):
    for dtype in DTYPES:
        x = torch.zeros(2, 6, 9, dtype=dtype)
        x[1] = random(6, 9).to(dtype)
        work = "float32" if dtype == torch.bfloat16 and method == "gram" else "auto"
        o = orthogonalize(x, name, method=method, dtype=work)
        assert torch.equal(o[0], torch.zeros_like(o[0]))
        assert torch.isfinite(o).all()
        assert o[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["standard", "gram", "svd", "mud"])
def test_a_matrix_that_is_not_finite_becomes_nan_and_its_neighbours_do_not(bad, method):
    x = random(3, 6, 9, dtype=torch.float32)
    x[1, 2, 3] = bad
    o = orthogonalize(x, method=method, dtype="float32")
    assert torch.isnan(o[1]).any()
    assert torch.isfinite(o[[0, 2]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["standard", "gram", "svd", "mud"])
@pytest.mark.parametrize("tall", [False, True])
def test_the_input_is_never_changed(dtype, method, tall):
    x = random(2, 12, 20).to(dtype)
    x = x.mT if tall else x
    before = x.clone()
    for work in ("auto", "float32", "float16", "float64"):
        orthogonalize(x, dtype=work, method=method)
        orthogonalize(x, dtype=work, method=method, eps=1e-7)
        orthogonalize(x, "aol4", dtype=work, method=method)
    assert torch.equal(x, before)


def test_directions_without_signal_stay_without_signal():
    x = with_spectrum(32, 64, torch.ones(8, dtype=torch.float64)).float()
    for method in ("standard", "gram"):
        s = torch.linalg.svdvals(orthogonalize(x, dtype="float32", method=method))
        assert s[:8].min() > 0.8
        assert s[8:].max() < 1e-3
    exact = orthogonalize(x, method="svd")
    torch.testing.assert_close(torch.linalg.svdvals(exact), torch.tensor([1.0] * 8 + [0.0] * 24), rtol=0, atol=1e-5)


def test_rank_deficient_input_in_bf16_keeps_its_subspace():
    x = with_spectrum(64, 128, torch.ones(16, dtype=torch.float64)).float()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    u, vh = u[:, :16], vh[:16]
    o = orthogonalize(x, dtype="bfloat16").float()
    torch.testing.assert_close(u.mT @ o @ vh.mT, u.mT @ (u @ vh) @ vh.mT, rtol=0, atol=0.2)


@pytest.mark.parametrize("name", ["keller", "you", "polar_express", "cubic5"])
@pytest.mark.parametrize("decades", [0, 3, 7])
def test_rounding_errors_stay_within_the_known_size_of_each_precision(name, decades):
    x = with_spectrum(64, 256, torch.logspace(0, -decades, 64, dtype=torch.float64)).float()
    exact = orthogonalize(x, name, dtype="float64")
    bounds = {("standard", "float32"): 1e-4, ("gram", "float32"): 2e-4, ("standard", "float16"): 0.05}
    bounds |= {("gram", "float16"): 0.05, ("standard", "bfloat16"): 0.35}
    for (method, dtype), bound in bounds.items():
        o = orthogonalize(x, name, method=method, dtype=dtype)
        assert (o.double() - exact).norm() / exact.norm() < bound, (method, dtype)


@pytest.mark.parametrize(
    ("name", "steps"), [(name, None) for name in COEFFICIENTS if name != "aol4"] + [("polar_express", 8), ("keller", 2)]
)
@pytest.mark.parametrize("shape", [(32, 128), (96, 768)])
def test_gram_in_fp16_is_as_exact_as_the_standard_iteration_for_every_spectrum(name, steps, shape):
    """Far from square, down to singular values of 1e-7, where one restart alone gives twice the error, or NaN for ten steps."""
    for decades in (0, 1, 3, 7):
        x = with_spectrum(*shape, torch.logspace(0, -decades, shape[0], dtype=torch.float64)).float()
        exact = orthogonalize(x, name, steps, dtype="float64")
        errors = {
            method: ((orthogonalize(x, name, steps, method, "float16").double() - exact).norm() / exact.norm()).item()
            for method in ("standard", "gram")
        }
        assert errors["gram"] < 1.1 * errors["standard"] + 0.015
        if shape[0] == 96 and name != "deepseek" and steps != 8:
            assert errors["gram"] < 0.03


def test_the_exact_method_is_the_nearest_semi_orthogonal_matrix():
    x = random(5, 20, 12)
    o = orthogonalize(x, method="svd")
    torch.testing.assert_close(o.mT @ o, torch.eye(12, dtype=torch.float64).expand(5, 12, 12), rtol=0, atol=1e-12)
    h = o.mT @ x
    torch.testing.assert_close(h, h.mT, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(h).min() > 0


def test_preconditioned_rows_have_singular_values_of_at_most_one():
    for x in (random(24, 40), with_spectrum(24, 40, torch.logspace(0, -3, 24, dtype=torch.float64))):
        assert torch.linalg.svdvals(precondition(x)).max() <= 1 + 1e-12
    x = random(4, 6)
    x[1] = 0
    assert torch.equal(precondition(x)[1], torch.zeros(6, dtype=torch.float64))


def test_unsafe_combinations_and_wrong_inputs_are_refused_with_the_reason():
    x = random(4, 6, dtype=torch.float32)
    with pytest.raises(InputError, match="not accurate enough"):
        orthogonalize(x, method="gram", dtype="bfloat16")
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(InputError, match="safety factor of at least"):
            orthogonalize(x, "polar_express@1", dtype=dtype)
    orthogonalize(x, "polar_express@1", dtype="float32")
    with pytest.raises(InputError, match="did you mean 'gram'"):
        orthogonalize(x, method="gramm")
    with pytest.raises(InputError, match="did you mean 'float64'"):
        orthogonalize(x, dtype="float61")
    with pytest.raises(InputError, match="float32 or float64"):
        orthogonalize(x, dtype=torch.int8)
    for wrong in (torch.ones(3), torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(InputError, match=r"\[\.\.\., m, n\]"):
            orthogonalize(wrong)


def test_empty_stacks_and_empty_matrices_stay_empty():
    for shape in ((0, 4, 6), (4, 0), (0, 6)):
        for method in ("standard", "gram", "svd", "mud"):
            assert orthogonalize(torch.zeros(shape), method=method).shape == shape


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
def test_every_shape_and_scale_gives_singular_values_below_the_band_and_a_descent(m, n, seed, exponent):
    x = random(m, n, seed=seed, dtype=torch.float32) * 10.0**exponent
    o = orthogonalize(x, dtype="float32")
    assert torch.linalg.svdvals(o).max() < 1.124
    assert (o.double() * x.double()).sum() > 0


def test_compiled_equals_eager():
    x = random(2, 12, 20, dtype=torch.float32)
    compiled = torch.compile(lambda t: orthogonalize(t, dtype="float32"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), orthogonalize(x, dtype="float32"), rtol=0, atol=1e-6)
