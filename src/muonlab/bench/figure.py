"""The roofline: how many operations per second at how many operations per byte, under what the machine can do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muonlab.files import replacing


class Point(NamedTuple):
    """One measurement."""

    label: str
    intensity: float
    """Operations per byte that it must move."""
    flops_per_second: float
    """The operations that it needs, over the time it took: work that another algorithm would save does not count."""


def attainable(intensity: float, rates: Mapping[str, float]) -> float:
    """Operations per second at an intensity where copying and multiplying overlap perfectly."""
    return min(rates["matmul_flops_per_second"], intensity * rates["copy_bytes_per_second"])


def draw_roofline(path: Path, points: Sequence[Point], rates: Mapping[str, float], title: str) -> None:
    """A PNG at `path`: both roofs as measured, and a mark for every point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    ridge = rates["matmul_flops_per_second"] / rates["copy_bytes_per_second"]
    low = min([ridge / 30, *(p.intensity / 2 for p in points)])
    high = max([ridge * 30, *(p.intensity * 2 for p in points)])
    corners = [low, ridge, high]
    axes.plot(
        corners, [attainable(x, rates) / 1e12 for x in corners], color="black", linewidth=1.5, label="measured roof"
    )
    for index, point in enumerate(points):
        marker = "osD^vP*Xhp"[index // 10 % 10]
        axes.plot(point.intensity, point.flops_per_second / 1e12, marker, color=f"C{index % 10}", label=point.label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("necessary operations per byte")
    axes.set_ylabel("necessary operations, 10¹² per second")
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
