"""The registry of polynomial coefficients for the polar factor: what each set is, and what it guarantees.

One step maps every singular value by the odd polynomial `p(s) = a*s + b*s**3 + c*s**5`; a set is the list of steps.
`band`, `slope` and `diverges_above` are properties of the composite map in exact arithmetic; tests prove each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from muonlab.errors import InputError, unknown

Step = tuple[float, float, float]
Coefficients = str | Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class CoefficientSet:
    """A named sequence of steps (a, b, c), with its properties in exact arithmetic at its default number of steps."""

    name: str
    steps: tuple[Step, ...]
    """The steps in order, without a safety factor."""
    default_steps: int
    """How many steps are made when `ns_steps` is not given."""
    more: bool
    """True: any number of steps is meaningful (a prefix of the list; the last step repeats). False: exactly the list."""
    safety: float | None = None
    """Default safety factor: the steps before the last listed one act on s / safety, so that rounding may push a singular
    value above 1 without leaving the interval that the polynomial was made for. None: the set has its own margin."""
    band: tuple[float, float, float]
    """(from, low, high): singular values in [from, 1] end in [low, high]."""
    slope: float
    """Derivative of the composite map at 0: how fast small singular values grow."""
    diverges_above: float
    """Singular values above this escape to infinity when the steps go on."""
    preconditioned: bool = False
    """True: made for inputs whose rows were scaled by AOL (`polar.aol_scale`) instead of the Frobenius norm."""
    source: str

    @property
    def cubic(self) -> bool:
        """True if no step has a fifth-order term: two products a step instead of three."""
        return all(c == 0.0 for _, _, c in self.steps)

    def flops(self, m: int, n: int, ns_steps: int | None = None) -> int:
        """Floating-point operations of the matrix products for one m x n matrix with the standard method."""
        m, n = min(m, n), max(m, n)
        per_step = 4 * m * m * n + (0 if self.cubic else 2 * m**3)
        return (ns_steps or self.default_steps) * per_step + (2 * m * m * n if self.preconditioned else 0)


_KELLER: Step = (3.4445, -4.7750, 2.0315)

COEFFICIENTS: dict[str, CoefficientSet] = {
    entry.name: entry
    for entry in (
        CoefficientSet(
            name="keller",
            steps=(_KELLER,),
            default_steps=5,
            more=True,
            band=(0.01, 0.6818, 1.1344),
            slope=484.9,
            diverges_above=1.2637,
            source="Keller Jordan, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon",
        ),
        CoefficientSet(
            name="you",
            steps=(
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            default_steps=5,
            more=False,
            band=(0.01, 0.9778, 1.0318),
            slope=492.7,
            diverges_above=1.3246,
            source="Jiacheng You, https://x.com/YouJiacheng/status/1893704552689303901; microsoft/dion",
        ),
        CoefficientSet(
            name="polar_express",
            steps=(
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                (1.875, -1.25, 0.375),
            ),
            default_steps=5,
            more=True,
            safety=1.02,
            band=(0.01, 0.8645, 1.1237),
            slope=929.2,
            diverges_above=1.02,
            source="Amsel et al., The Polar Express, https://arxiv.org/abs/2505.16932",
        ),
    )
}


def with_safety(steps: Sequence[Step], safety: float) -> tuple[Step, ...]:
    """The same polynomials on s / `safety`: (a/f, b/f^3, c/f^5), the form of the Polar Express paper."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in steps)


def resolve(coefficients: Coefficients, ns_steps: int | None = None) -> tuple[Step, ...]:
    """The concrete steps of a named set or of a list of them.

    Args:
        coefficients: a name of `COEFFICIENTS`; a name with a safety factor of one's own (`"polar_express@1.05"`); one step
            (a, b, c) or (a, b), repeated; or a list of steps, used as it is.
        ns_steps: number of steps; None means the set's own (a single step of one's own is repeated 5 times).
    """
    if ns_steps is not None and ns_steps < 1:
        raise InputError(f"ns_steps must be at least 1, got {ns_steps}")
    if not isinstance(coefficients, str):
        return _custom(coefficients, ns_steps)
    name, _, factor = coefficients.partition("@")
    entry = named(name)
    safety = entry.safety
    if factor:
        if safety is None:
            raise InputError(f"coefficients {coefficients!r}: {name} has its own margin and takes no safety factor")
        safety = _safety(coefficients, factor)
    count = entry.default_steps if ns_steps is None else ns_steps
    if not entry.more and count != len(entry.steps):
        raise InputError(
            f"coefficients {name!r} are a schedule of exactly {len(entry.steps)} steps, got ns_steps={count}; "
            "for another number use 'polar_express' or 'keller', or give a list of steps"
        )
    steps = entry.steps
    if safety is not None:
        # The listed last step is the limit of the sequence: it converges from both sides and needs no margin.
        steps = with_safety(steps[:-1], safety) + steps[-1:] if entry.more else with_safety(steps, safety)
    return tuple(steps[min(i, len(steps) - 1)] for i in range(count))


def named(name: str) -> CoefficientSet:
    """The registered set of this name; InputError with the nearest name otherwise."""
    if name not in COEFFICIENTS:
        raise unknown("coefficients", name, COEFFICIENTS)
    return COEFFICIENTS[name]


def _safety(coefficients: str, factor: str) -> float:
    try:
        safety = float(factor)
    except ValueError:
        raise InputError(f"coefficients {coefficients!r}: the safety factor {factor!r} is not a number") from None
    if not 1.0 <= safety <= 1.5:
        raise InputError(f"coefficients {coefficients!r}: the safety factor must lie in [1, 1.5], got {safety}")
    return safety


def _custom(coefficients: Sequence[Sequence[float]], ns_steps: int | None) -> tuple[Step, ...]:
    rows = list(coefficients)
    if rows and isinstance(rows[0], (int, float)):
        return (_step(rows),) * (ns_steps or 5)  # type: ignore[arg-type]  # a single step: checked one line above
    steps = tuple(_step(row) for row in rows)
    if not steps:
        raise InputError("coefficients must hold at least one step (a, b, c)")
    if ns_steps is not None and ns_steps != len(steps):
        raise InputError(f"coefficients hold {len(steps)} steps but ns_steps is {ns_steps}; leave ns_steps out")
    return steps


def _step(row: Sequence[float]) -> Step:
    values = tuple(float(value) for value in row)
    if len(values) == 2:
        values = (*values, 0.0)
    if len(values) != 3:
        raise InputError(f"a step of the iteration is (a, b, c) or (a, b), got {tuple(row)}")
    return values[0], values[1], values[2]
