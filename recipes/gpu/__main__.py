"""`python -m recipes.gpu`, by `make gpu`: what bpkit does on a GPU, in at most eight minutes and without network.

Sections run one after the other, each in its share of the time, and the JSON is written anew after every figure: a run
that is cut off keeps what it has. Needs what bpkit needs; where onnxruntime is not installed a line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from bpkit.installation.machine import describe_machine
from recipes.gpu.clock import Deadline
from recipes.gpu.exported import exported
from recipes.gpu.loop import loop
from recipes.gpu.sizes import TINY, Sizes
from recipes.gpu.steps import steps
from recipes.gpu.texts import texts

SCHEMA_VERSION = 1
Section = Callable[[Sizes, torch.device, Deadline], Iterator[dict[str, Any]]]
SECTIONS: dict[str, tuple[Section, float]] = {
    "steps": (steps, 0.3),
    "texts": (texts, 0.35),
    "loop": (loop, 0.2),
    "exported": (exported, 0.15),
}
"""With their shares of the time. What a section leaves goes to those after it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write. Exit code 1 if a text differs, or a section failed."""
    given = _parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = given.tiny or device.type == "cpu"
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "machine": describe_machine(device),
        "sizes": "tiny" if tiny else "whole",
        "capture": "real" if device.type == "cuda" else "all but the capture itself",
        "sections": {},
    }
    if tiny:
        said = "there is no GPU" if device.type == "cpu" else "--tiny was given"
        print(f"{said}: tiny sizes, whose times mean nothing; on a GPU this measures the shape of Qwen3-4B", flush=True)
    measure(report, TINY if tiny else Sizes(), device, given.seconds, given.sections, given.json)
    sections = report["sections"]
    if given.json:
        print(f"wrote {given.json}")
    faults = [section["error"] for section in sections.values()]
    faults += [row.get("error") or row.get("differ") for section in sections.values() for row in section["rows"]]
    if any(faults):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument("--seconds", type=float, default=460.0, help="for all sections; by default 460")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS], help="by default all")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as without a GPU")
    return parser


def measure(
    report: dict[str, Any],
    sizes: Sizes,
    device: torch.device,
    seconds: float,
    names: Sequence[str],
    file: Path | None,
) -> None:
    """Run sections, adding what they find to the report, which is written to the file after every row."""
    left, shares = Deadline(seconds), sum(SECTIONS[name][1] for name in names)
    for name in names:
        section, share = SECTIONS[name]
        deadline = Deadline(left.left * share / shares)
        shares -= share
        entry: dict[str, Any] = {"rows": [], "error": None, "cut": False, "seconds": 0.0}
        report["sections"][name] = entry
        started = time.monotonic()
        print(f"\n{name}", flush=True)
        try:
            for row in section(sizes, device, deadline):
                entry["rows"].append(row)
                print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
                _write(report, file)
        except Exception as error:  # the other sections are worth having
            entry["error"] = f"{type(error).__name__}: {error}"
            print(f"  failed: {entry['error']}", flush=True)
        entry["cut"], entry["seconds"] = not deadline, time.monotonic() - started
        if device.type == "cuda":
            torch.cuda.empty_cache()
        _write(report, file)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(report: dict[str, Any], file: Path | None) -> None:
    """All of it, at once: whoever reads the file finds a whole one."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        part.replace(file)


if __name__ == "__main__":
    main()
