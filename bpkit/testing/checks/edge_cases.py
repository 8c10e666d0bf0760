"""The shortest prompts and outputs, drafts that are longer than trained, shorter than asked, or not there at all."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bpkit.policy import PolicyError
from bpkit.testing.checks import setup
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.recorder import CallRecorder, Recording
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.setup import LARGEST, NGRAM, PROMPTS, TOGETHER, Case
from bpkit.testing.checks.usual import compare_with_plain

REPEATING = "abcabcabcabc"
"""An n-gram drafter finds drafts in it, though seldom for what the tiny target makes of it."""
_EXPECTED = {"size": "a decision in range", "feature": "features that are there to be read"}


def survival(policy: CheckedPolicy, out: Findings) -> None:
    """Decode every edge case; a fault counts if the usual recordings did not have it already."""
    known = {(fault.method, fault.kind) for _, fault in policy.faults}
    tried = 0
    for what, recording in _recordings(policy, out):
        tried += 1
        fault = recording.fault
        if fault is None:
            compare_with_plain(policy.name, recording, setup.plain(recording.case), out)
        elif (fault.method, fault.kind) not in known:
            known.add((fault.method, fault.kind))
            out.fail(
                f"decoded an edge case, {what}: {recording}",
                f"{policy.name}.{fault.method} gives {_EXPECTED.get(fault.kind, 'an answer')} here too",
                fault.text,
            )
    out.said = f"{tried} edge cases"


def _recordings(policy: CheckedPolicy, out: Findings) -> Iterator[tuple[str, Recording]]:
    """What is hard about it, and what the policy made of it."""
    for drafter in policy.ends():
        yield from _alone_and_together(policy, policy.recorder(drafter), list(_short(policy.seed)))
        widest = Case(PROMPTS[3], 1.0, policy.seed, 7, max_new_tokens=8)
        above = policy.recorder(drafter, force=lambda sizes: torch.full_like(sizes, LARGEST))
        yield (
            f"drafts of {LARGEST} positions, twice the trained block size, whatever `select` says",
            above.record(widest),
        )
        yield "no drafts, whatever `select` says", policy.recorder(drafter, force=torch.ones_like).record(widest)
    try:
        recorder = policy.recorder(NGRAM)
    except PolicyError as error:
        out.note(f"not tried with an n-gram drafter: {error}")
        return
    what = "an n-gram drafter, which proposes fewer tokens than asked, or none"
    texts = enumerate((REPEATING, "qz", "aaaaaaaaaaaaaaaa"))
    yield from _alone_and_together(policy, recorder, [(what, Case(t, 1.0, policy.seed, stream)) for stream, t in texts])


def _alone_and_together(
    policy: CheckedPolicy, recorder: CallRecorder, cases: list[tuple[str, Case]]
) -> Iterator[tuple[str, Recording]]:
    """One after the other and, if `rows` found nothing, in a batch."""
    for what, case in cases:
        yield what, recorder.record(case)
    if not policy.fails_in_batches:
        together = recorder.record_together([case for _, case in cases], TOGETHER)
        yield from zip((what for what, _ in cases), together, strict=True)


def _short(seed: int) -> Iterator[tuple[str, Case]]:
    """Cases of which one policy decodes all, one after the other."""
    sampled = Case(PROMPTS[1], 1.0, seed, 5, max_new_tokens=8)
    tokens = setup.plain(sampled).tokens
    yield "a prompt of one token", Case("x", 1.0, seed, 6, max_new_tokens=8)
    yield "an output that ends with its first token", Case(PROMPTS[1], 1.0, seed, 5, eos_token_id=tokens[0])
    yield "an output that ends with its second token", Case(PROMPTS[1], 1.0, seed, 5, eos_token_id=tokens[1])
    for most in (1, 2, 3):
        yield f"room for {most} new token{'s' if most > 1 else ''}", Case(PROMPTS[1], 1.0, seed, 5, max_new_tokens=most)
    yield "a request after those", sampled
