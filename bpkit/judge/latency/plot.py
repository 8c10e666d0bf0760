"""A picture of a latency bench. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpkit.judge.latency.backends import ONNXRUNTIME, TORCH
from bpkit.judge.latency.table import methods

COLOURS = {TORCH: "#ee6677", ONNXRUNTIME: "#4477aa"}


def plot_latency(report: dict[str, Any], path: Path) -> None:
    """Write the picture, a panel for each batch size; the suffix says the format."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    settings, machine = report["settings"], report["machine"]
    sizes, rows = settings["batch_sizes"], list(methods(report))
    figure = Figure(figsize=(3 + 3 * len(sizes), 2 + 0.6 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        _panel(axes, rows, str(size))
    panels[0].set_yticks(range(len(rows)), [f"{name}\n{method}" for name, method, _ in rows], fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.05), ncols=2)
    figure.suptitle(
        f"decision latency on {machine['gpu'] or machine['cpu']}, {settings['threads']['decisions']} thread; "
        "dot p50, line to p99",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _panel(axes: Any, rows: list[tuple[str, str, dict[str, Any]]], size: str) -> None:
    """A dot for each backend of each method."""
    for backend, colour in COLOURS.items():
        shown = [(place, entry[backend]) for place, (_, _, entry) in enumerate(rows) if backend in entry]
        offset = -0.15 if backend == TORCH else 0.15
        places = [place + offset for place, _ in shown]
        low = [of["p50_us"][size] for _, of in shown]
        high = [of["p99_us"][size] for _, of in shown]
        axes.hlines(places, low, high, color=colour, lw=1)
        axes.plot(low, places, "o", color=colour, ms=5, label=backend)
    axes.set_xscale("log")
    axes.set_xlabel("microseconds")
    axes.set_title(f"batch {size}", fontsize=10)
    axes.grid(axis="x", lw=0.3)
    axes.spines[["top", "right"]].set_visible(False)
