"""The picture of `bench-digits`: images by plain decoding and with the last pass, and passes by window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.digits.command import best_row
from recipes.digits.model import LEVELS, SIDE


def plot_digits(report: dict[str, Any], path: Path) -> None:
    """Write it; the suffix says the format. Needs matplotlib."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    shown = report["images"]
    figure = Figure(figsize=(7, 5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 2])
    above, below = parts
    axes = above.subplots(2, len(shown))
    for row, (name, label) in enumerate({"plain": "plain", "last_pass": "last pass"}.items()):
        for column, image in enumerate(shown):
            one = axes[row][column]
            pixels = [image[name][i : i + SIDE] for i in range(0, SIDE * SIDE, SIDE)]
            one.imshow(pixels, cmap="gray_r", vmin=0, vmax=LEVELS - 1)
            one.set(xticks=[], yticks=[])
            if column == 0:
                one.set_ylabel(label, fontsize=8)
            if row == 1:
                one.set_xlabel(f"{image['passes']} passes", fontsize=7)
    curves = below.subplots()
    windows = report["settings"]["windows"]
    for arm, said in report["arms"].items():
        best = [best_row(report["rows"], arm, window) for window in windows]
        low, high = zip(*(row["ratio_interval"] for row in best), strict=True)
        curves.plot(windows, [row["ratio"] for row in best], marker="o", label=said)
        curves.fill_between(windows, low, high, alpha=0.15)
    curves.axhline(1, color="grey", linewidth=0.8)
    curves.set(xlabel="drafted tokens", ylabel="passes of plain decoding over passes", xticks=windows)
    curves.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
