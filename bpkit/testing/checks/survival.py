"""Hard cases: the shortest prompts and outputs, drafts that are longer, shorter or not there at all."""

from __future__ import annotations

from collections.abc import Iterator

from bpkit.policy import PolicyError
from bpkit.testing.checks.answers import Kind
from bpkit.testing.checks.determinism import ends
from bpkit.testing.checks.lossless import compare_with_plain
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.runs import Player, Run
from bpkit.testing.checks.stage import LARGEST, NGRAM, PROMPTS, Case, stage
from bpkit.testing.checks.subject import Subject

REPEATING = "abcabcabcabc"
"""An n-gram drafter finds drafts in it, though seldom for what the tiny target makes of it."""


def survival(subject: Subject, out: Findings) -> None:
    """Decode every hard case; a fault counts if the usual runs did not have it already."""
    known = {(fault.method, fault.kind) for _, fault in subject.faults}
    subject.clean()
    tried = 0
    for what, player, case in _cases(subject, out):
        run = player.play(case)
        tried += 1
        if run.fault is not None:
            if (run.fault.method, run.fault.kind) not in known:
                _tell(subject, what, run, out)
            known.add((run.fault.method, run.fault.kind))
        else:
            compare_with_plain(subject.name, run, stage().plain(case), out)
    out.said = f"{tried} hard cases"


def _cases(subject: Subject, out: Findings) -> Iterator[tuple[str, Player, Case]]:
    """What is hard about it, a policy at work, and the case."""
    for drafter in ends(subject.clean()):
        player = subject.player(drafter)
        for what, case in _short(subject.seed):
            yield what, player, case
        widest = Case(PROMPTS[3], 1.0, subject.seed, 7, max_new_tokens=8)
        above = f"drafts of {LARGEST} positions, twice the trained block size, whatever `select` says"
        yield above, subject.player(drafter, force=LARGEST), widest
        yield "no drafts, whatever `select` says", subject.player(drafter, force=1), widest
    try:
        player = subject.player(NGRAM)
    except PolicyError as error:
        out.note(f"not tried with an n-gram drafter: {error}")
        return
    for stream, text in enumerate((REPEATING, "qz", "aaaaaaaaaaaaaaaa")):
        what = "an n-gram drafter, which proposes fewer tokens than asked, or none"
        yield what, player, Case(text, 1.0, subject.seed, stream)


def _short(seed: int) -> Iterator[tuple[str, Case]]:
    """Cases of which one policy decodes all, one after the other."""
    sampled = Case(PROMPTS[1], 1.0, seed, 5, max_new_tokens=8)
    tokens = stage().plain(sampled).tokens
    yield "a prompt of one token", Case("x", 1.0, seed, 6, max_new_tokens=8)
    yield "an output that ends with its first token", Case(PROMPTS[1], 1.0, seed, 5, eos=tokens[0])
    yield "an output that ends with its second token", Case(PROMPTS[1], 1.0, seed, 5, eos=tokens[1])
    for most in (1, 2, 3):
        yield f"room for {most} new token{'s' if most > 1 else ''}", Case(PROMPTS[1], 1.0, seed, 5, max_new_tokens=most)
    yield "a request after those", sampled


def _tell(subject: Subject, what: str, run: Run, out: Findings) -> None:
    fault = run.fault
    assert fault is not None
    expected: dict[Kind, str] = {"size": "a decision in range", "feature": "features that are there to be read"}
    out.fail(
        f"decoded a hard case, {what}: {run}",
        f"{subject.name}.{fault.method} gives {expected.get(fault.kind, 'an answer')} here too",
        fault.text,
    )
