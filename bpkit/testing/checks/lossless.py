"""The text is that of plain decoding, and the runtime never had to overrule the policy."""

from __future__ import annotations

from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.runs import Run, difference
from bpkit.testing.checks.stage import Plain, stage
from bpkit.testing.checks.subject import Subject


def lossless(subject: Subject, out: Findings) -> None:
    """Compare the usual runs with plain decoding. Decisions out of range and undeclared features are other checks'."""
    for run, fault in subject.faults:
        if fault.kind not in ("raised", "answer"):
            continue
        done = "bound the policy to a decoder" if fault.method == "bind" else f"decoded with {run}"
        out.fail(
            f"{done}, faults of the policy being errors",
            f"{subject.name}.{fault.method} returns what the Policy protocol says",
            f"{fault.text}; in use the runtime would overrule it, warn, and decode at another speed than intended",
            drafter=run.drafter,
        )
    ended = [run for runs in subject.usual.values() for run in runs if run.tokens is not None]
    for run in ended:
        compare_with_plain(subject.name, run, stage().plain(run.case), out)
    tokens = sum(len(run.tokens or ()) for run in ended)
    out.said = (
        f"{len(ended)} generations, {tokens} tokens, temperatures 0 and 1, drafters {', '.join(subject.drafters)}"
    )


def compare_with_plain(name: str, run: Run, plain: Plain, out: Findings, *, exact: bool = True) -> None:
    """Tell where the tokens of a run that came to its end part from plain decoding.

    Args:
        exact: whether logits of one position agree between verify widths but for near ties, as in float32.
    """
    assert run.tokens is not None
    parted = difference(run.tokens, plain)
    if parted is None:
        return
    place, close = parted
    if close or not exact:
        why = "where the two best are too close to call" if close else "which rounding explains in reduced precision"
        out.note(f"{run}: another token {place}, {why}; not compared from there on")
        return
    out.fail(
        f"decoded with {run}, under policy {name}",
        f"the {len(plain.tokens)} tokens of plain decoding (`fixed:1`), with {_around(plain.tokens, place)} from token "
        f"{place} on",
        f"{len(run.tokens)} tokens, with {_around(run.tokens, place)} from there on",
        drafter=run.drafter,
    )


def _around(tokens: tuple[int, ...], place: int) -> str:
    return str(list(tokens[place : place + 4])) if place < len(tokens) else "no token"
