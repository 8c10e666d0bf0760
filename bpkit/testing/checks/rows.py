"""Rows of a batch: a decision does not depend on the requests beside it, and the state of a request goes with it.

Requests that were decoded one by one are laid side by side, in a batch that requests join and leave. Before every call
the policy is copied, and the copy is asked about each request alone, with the state that the request has had alone:
both must decide the same. So what is compared is one decision, given the same memory: a policy may well learn from one
request what it uses for another.

Decisions at random: alone and in the batch a policy is given generators in the same state. One draw that serves all
rows gives the same decision; draws for each row do not. Where a call drew and differs, the question is put many
times, with other states of the generator, and the means are compared: that finds neighbours that matter much.
"""

from __future__ import annotations

import torch

from bpkit.testing.checks import tapes
from bpkit.testing.checks.batch import Batch
from bpkit.testing.checks.joint import Joint
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.stage import stage
from bpkit.testing.checks.subject import Subject

SCRIPT = ((0, 1, 2), (0, 1, 2), (2, 0, 1), (2, 1), (2, 1, 3), (3, 2, 1), (3, 1), (1, 3, 4), (4, 3, 1), (4, 1), (1, 4))
"""Which requests are in the batch at every step: first three, then in another order, then some leave and some join."""


def rows(subject: Subject, out: Findings) -> None:
    """Lay the usual runs of every drafter side by side."""
    compared = drawn = 0
    for drafter, runs in subject.clean().items():
        found = [tape for run in runs if (tape := tapes.tape_of(run)) is not None]
        if len(found) < 3:
            continue
        policy = subject.fresh(drafter)
        stage().decoder(drafter, policy)  # binds it
        batch = (Joint if policy.joint else Batch)(policy, found, subject.name, drafter, out)
        with torch.inference_mode():
            batch.go_through(SCRIPT)
        compared, drawn = compared + batch.compared, drawn + batch.drawn
        if not batch.copies:
            out.note(f"{subject.name} cannot be copied ({batch.why}): it was itself asked about each request alone")
        if out.failures:
            break  # other drafters would show the same
    if not compared and not drawn and not out.failures:
        raise Skip("too few requests had steps to be laid side by side")
    out.said = f"{compared} decisions and states, of requests alone and in a batch that others join and leave"
    if drawn:
        out.note(f"{drawn} decisions drew for each row by itself: compared by the means of many draws, not one by one")
