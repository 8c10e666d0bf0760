"""Decisions are in range without being clamped."""

from __future__ import annotations

from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.stage import LARGEST, stage
from bpkit.testing.checks.subject import Subject

_EXPECTED = {
    "select": f"block sizes from 1 (no draft) to decoder.max_block_size, here {LARGEST}, in whole numbers",
    "truncate": "lengths from 0 to draft.draft_length, in whole numbers",
}


def sizes(subject: Subject, out: Findings) -> None:
    """Every block size and verified length of the usual runs."""
    for run, fault in subject.faults:
        if fault.kind == "size":
            out.fail(
                f"asked {subject.name}.{fault.method} while decoding with {run} (trained block size "
                f"{stage().drafters[run.drafter].trained_block_size})",
                _EXPECTED[fault.method],
                fault.text,
                drafter=run.drafter,
            )
    found: dict[str, set[int]] = {"select": set(), "truncate": set()}
    for runs in subject.usual.values():
        for run in runs:
            for method, answer in run.decisions:
                if method in found:
                    found[method].update(answer)
    out.said = f"block sizes {_range(found['select'])}"
    if found["truncate"]:
        out.said += f", verified lengths {_range(found['truncate'])}"


def _range(numbers: set[int]) -> str:
    if not numbers:
        return "none"
    return f"{min(numbers)} .. {max(numbers)}" if len(numbers) > 1 else str(*numbers)
