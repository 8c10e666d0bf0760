"""The loop: prefill, then select, draft, truncate, verify, observe until something says stop; for one row or many.

It yields a record for each turn. Streaming, traces, timing tables and progress bars consume the records.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from bpkit.decode.admission import Admission
from bpkit.decode.guard import GuardedPolicy
from bpkit.decode.rows import Rows
from bpkit.decode.target import TargetOutput
from bpkit.types import Prefill, Record, Step


@torch.inference_mode()
def decode(admission: Admission, policy: GuardedPolicy) -> Generator[Record]:
    """Generate; the tokens of the records of a row, joined, are its output. Rows join and leave between steps.

    What the models give is on the device. What was decided is read once a turn, in `settle`, which appends it to the
    running text that target, drafter and rule share.
    """
    running: Rows | None = None
    while running or not admission.done:
        for new, output, features in admission.read(len(running or ())):
            record = begin(new, policy, output, features)
            new.leave(after=len(running or ()))
            if running and new:
                running.join(new)
            running = running or new
            yield record
        if running:
            turn = step(running, policy)
            running.leave()
            yield turn


def begin(rows: Rows, policy: GuardedPolicy, output: TargetOutput, features: list[Tensor] | None) -> Prefill:
    """Decide the first token of rows whose prompts were read."""
    nothing = [0] * len(rows)
    decided = rows.settle(output.last(), rows.rule.verify(output.logits, rows.no_draft(), nothing), nothing)
    rows.drafter.advance(features)
    policy.begin(rows.offered(decided.context))
    return rows.prefill(decided)


def step(rows: Rows, policy: GuardedPolicy) -> Step:
    """One turn of all rows."""
    assert rows.context is not None
    draft, width = rows.cut(rows.draft(*policy.select(rows.offered(rows.context))), policy)
    output = rows.verify(draft, width)
    decided = rows.settle(output, rows.rule.verify(output.logits, draft, width), width)
    rows.advance(output, draft, decided, width)
    record = rows.step(draft, width, decided)
    policy.observe(record)
    return record
