"""The registry of polynomial coefficients for the polar factor: what each set is, and what it guarantees.

One step maps every singular value by the odd polynomial `p(s) = a*s + b*s**3 + c*s**5`; a set is the list of steps.
`band`, `slope` and `diverges_above` are properties of the composite map in exact arithmetic; tests prove each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from muonlab.errors import InputError, unknown

Step = tuple[float, float, float]
Coefficients = str | Sequence[Sequence[float]]


class Iteration(NamedTuple):
    """What is to be computed, with nothing left to look up."""

    steps: tuple[Step, ...]
    preconditioned: bool = False
    """Scale the rows first (`polar.precondition`)."""
    sturdy: bool = False
    """See `CoefficientSet.sturdy`; steps of one's own are not known to be."""


@dataclass(frozen=True, kw_only=True)
class CoefficientSet:
    """A named sequence of steps (a, b, c), with its properties in exact arithmetic at its default steps and safety factor."""

    name: str
    steps: tuple[Step, ...]
    """The steps in order, without a safety factor."""
    default_steps: int
    """How many steps are made when `ns_steps` is not given."""
    more: bool
    """True: any number of steps is meaningful (a prefix of the list; the last step repeats). False: exactly the list."""
    safety: float | None = None
    """Default safety factor f: the steps act on s / f, (a/f, b/f^3, c/f^5), so that a singular value that rounding pushed
    above 1 stays in the interval that they were made for. None: the set has a margin of its own."""
    band: tuple[float, float, float]
    """(from, low, high): singular values in [from, 1] end in [low, high]."""
    slope: float
    """Derivative of the composite map at 0: how fast small singular values grow."""
    safe_up_to: float
    """Singular values up to this keep their sign and stay bounded: the margin that rounding has."""
    diverges_above: float
    """Singular values above this escape to infinity when the last step is repeated."""
    preconditioned: bool = False
    """Made for rows scaled by `polar.precondition`."""
    sturdy: bool = False
    """Blocks of three and two of its steps stay within 1.2 times the error of single steps in half precision, on log-spaced
    spectra and on those of real directions (`benchmarks/gram_blocks.py`)."""
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

_SETS = (
    CoefficientSet(
        name="keller",
        sturdy=True,
        steps=(_KELLER,),
        default_steps=5,
        more=True,
        band=(0.01, 0.6818, 1.1344),
        slope=484.9,
        safe_up_to=1.2637,
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
        band=(0.01, 0.9777, 1.0318),
        slope=492.7,
        safe_up_to=1.3246,
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
        band=(0.01, 0.8641, 1.1236),
        slope=929.3,
        safe_up_to=1.0218,
        diverges_above=1.0218,
        source="Amsel et al., The Polar Express, https://arxiv.org/abs/2505.16932",
    ),
    CoefficientSet(
        name="polar_express_1.02",
        steps=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        default_steps=5,
        more=False,
        band=(0.001, 0.8588, 1.1412),
        slope=989.5,
        safe_up_to=1.0218,
        diverges_above=1.0218,
        source="the five steps recomputed with a safety factor of 1.02: karpathy/nanochat, modded-nanogpt, microsoft/dion",
    ),
    CoefficientSet(
        name="cans",
        steps=(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        default_steps=5,
        more=False,
        safety=1.02,
        band=(0.01, 0.8368, 1.1134),
        slope=950.1,
        safe_up_to=1.0216,
        diverges_above=1.0216,
        source="Grishina et al., CANS, https://arxiv.org/abs/2506.10935; numbers as in NVIDIA-NeMo/Emerging-Optimizers",
    ),
    CoefficientSet(
        name="cubic",
        steps=((1.5, -0.5, 0.0),),
        default_steps=15,
        more=True,
        band=(0.003, 0.8975, 1.0000001),
        slope=437.9,
        safe_up_to=1.7320,
        diverges_above=2.2360,
        source="Newton-Schulz; Higham, Functions of Matrices, 2008, section 8.3",
    ),
    CoefficientSet(
        name="cubic5",
        sturdy=True,
        steps=(
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        default_steps=5,
        more=False,
        # As published the first step changes the sign of singular values above 1.0035, less than one rounding of bf16.
        safety=1.01,
        band=(0.01, 0.8077, 1.3001),
        slope=113.5,
        safe_up_to=1.0135,
        diverges_above=1.1947,
        source="How much orthogonalization does Muon need?, https://arxiv.org/abs/2606.00371",
    ),
    CoefficientSet(
        name="deepseek",
        steps=(_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        default_steps=10,
        more=False,
        band=(0.001, 0.9999, 1.0006),
        slope=79263.0,
        safe_up_to=1.2637,
        diverges_above=1.2637,
        source="DeepSeek-V4, eight steps of keller and two that converge; numbers as in NVIDIA-NeMo/Emerging-Optimizers",
    ),
    CoefficientSet(
        name="aol4",
        steps=(
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        default_steps=4,
        more=False,
        band=(0.01, 0.9409, 1.0501),
        slope=147.2,
        safe_up_to=1.1042,
        diverges_above=1.1042,
        preconditioned=True,
        source="Turbo-Muon, https://arxiv.org/abs/2512.04632, current numbers of thib-s/flash-newton-schulz",
    ),
)

COEFFICIENTS: dict[str, CoefficientSet] = {entry.name: entry for entry in _SETS}


def with_safety(steps: Sequence[Step], safety: float) -> tuple[Step, ...]:
    """The same polynomials on s / `safety`, the form of the Polar Express paper."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in steps)


def resolve(coefficients: Coefficients, ns_steps: int | None = None) -> Iteration:
    """The iteration of a named set or of a list of steps.

    Args:
        coefficients: a name of `COEFFICIENTS`; a name with a safety factor of one's own (`"polar_express@1.05"`); one step
            (a, b, c) or (a, b), repeated; or a list of steps, used as it is.
        ns_steps: number of steps; None means the set's own (a single step of one's own is repeated 5 times).
    """
    if ns_steps is not None and ns_steps < 1:
        raise InputError(f"ns_steps must be at least 1, got {ns_steps}")
    if not isinstance(coefficients, str):
        return Iteration(_custom(coefficients, ns_steps))
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
        # Where the list can go on, its last step is the limit of the sequence: it converges from both sides, without a margin.
        steps = with_safety(steps[:-1], safety) + steps[-1:] if entry.more else with_safety(steps, safety)
    return Iteration(tuple(steps[min(i, len(steps) - 1)] for i in range(count)), entry.preconditioned, entry.sturdy)


def margin(coefficients: Coefficients) -> float:
    """The largest singular value that is safe (see `CoefficientSet.safe_up_to`); infinity for steps of one's own."""
    if not isinstance(coefficients, str):
        return float("inf")
    name, _, factor = coefficients.partition("@")
    entry = named(name)
    return entry.safe_up_to * (_safety(coefficients, factor) / (entry.safety or 1.0) if factor else 1.0)


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
