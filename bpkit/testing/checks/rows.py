"""Rows of a batch: a decision does not depend on the requests beside it, and the state of a request goes with it.

Requests that were decoded one by one are laid side by side, in a batch that requests join and leave. Before every call
the policy is copied, and the copy is asked about each request alone, with the state that the request has had alone:
both must decide the same. So what is compared is one decision, given the same memory: a policy may well learn from one
request what it uses for another. Of a policy whose rows share a budget the copy is asked about the same batch in
another order instead.

Decisions at random: alone and in the batch a policy is given generators in the same state. One draw that serves all
rows gives the same decision; draws for each row do not. Where a call drew and differs, the question is put many
times, with other states of the generator, and the means are compared: that finds neighbours that matter much.
"""

from __future__ import annotations

import torch

from bpkit.testing.checks.batch import Batch, BatchOfSharingRows
from bpkit.testing.checks.batched_requests import batched
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.setup import tiny_setup

SCRIPT = ((0, 1, 2), (0, 1, 2), (2, 0, 1), (2, 1), (2, 1, 3), (3, 2, 1), (3, 1), (1, 3, 4), (4, 3, 1), (4, 1), (1, 4))
"""Which requests are in the batch at every step: first three, then in another order, then some leave and some join."""


def rows(policy: CheckedPolicy, out: Findings) -> None:
    """Lay the usual recordings of every drafter side by side."""
    compared = drawn = 0
    for drafter, recordings in policy.clean().items():
        requests = [made for each in recordings if (made := batched(each)).steps]
        if len(requests) < 3:
            continue
        bound = tiny_setup().decoder(drafter, policy.fresh(drafter)).policy
        batch = (BatchOfSharingRows if bound.joint else Batch)(bound, requests, drafter, out)
        with torch.inference_mode():
            batch.go_through(SCRIPT)
        compared, drawn = compared + batch.compared, drawn + batch.drawn
        if batch.uncopyable:
            out.note(
                f"{policy.name} cannot be copied ({batch.uncopyable}): it was itself asked about each request alone"
            )
        if out.failures:
            break  # other drafters would show the same
    if not compared and not drawn and not out.failures:
        raise Skip("too few requests had steps to be laid side by side")
    out.said = f"{compared} decisions and states, of requests alone and in a batch that others join and leave"
    if drawn:
        out.note(f"{drawn} decisions drew for each row by itself: compared by the means of many draws, not one by one")
