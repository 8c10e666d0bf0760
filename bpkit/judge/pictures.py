"""How pictures of reports look. Needs matplotlib where one is drawn. Each is narrow enough to be read on a phone."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 6.2
"""Inches; with letters of `STYLE` that leaves them readable at 360 pixels."""
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "bpkit"}
DOMAINS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
LINES = ("-", "--", ":", "-.")
"""Of sources, where there are several."""
ABOVE: dict[str, Any] = {"frameon": False, "fontsize": 10, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
"""Where a legend stands."""
INK, POLICY, ORACLE, FIXED = "#333333", "#0072b2", "#8a8a8a", "#d55e00"


def data_uri(figure: Figure) -> str:
    """A picture as it stands in an `img` element, as SVG: the same text for the same figures."""
    import matplotlib as mpl

    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def draw(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes one below the other: one, or an array of several."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, 1, **options)


def short(name: str, most: int = 26) -> str:
    """A name that fits beside a picture."""
    return name if len(name) <= most else name[: most - 3] + "..."
