"""What a policy keeps across requests can be saved as JSON and taken up again."""

from __future__ import annotations

import json
from typing import Any

from bpkit.decode.guard import kind_of
from bpkit.testing.checks.determinism import first_difference
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.runs import Player
from bpkit.testing.checks.stage import AGREEABLE
from bpkit.testing.checks.subject import Subject

BEFORE = 3
"""Requests decoded before the memory is saved; those after it are compared."""


def memory(subject: Subject, out: Findings) -> None:
    """Decode, save, restore into a fresh policy, and let both go on."""
    clean = subject.clean()
    drafter = AGREEABLE if AGREEABLE in clean else next(iter(clean))
    player, did = subject.player(drafter), f"decoded {BEFORE} requests (drafter {drafter})"
    for case in subject.cases[:BEFORE]:
        player.play(case)
    saved = _saved(subject.name, player, did, out)
    if saved is None:
        return
    restored = subject.player(drafter)
    restored.decoder.requests = player.decoder.requests  # so that requests to come are of the same number
    if saved:
        try:
            restored.policy.load_state_dict(saved)
        except Exception as error:
            out.fail(
                f"{did}, then handed what state_dict() gave, read back from JSON, to load_state_dict of a fresh policy",
                f"{subject.name}.load_state_dict takes what {subject.name}.state_dict gave",
                f"it raised {type(error).__name__}: {error}",
            )
            return
    _compare(subject, player, restored, saved, did, out)


def _saved(name: str, player: Player, did: str, out: Findings) -> dict[str, Any] | None:
    """What `state_dict` gives, through JSON and back; None if it is none."""
    expected = f"{name}.state_dict returns a dict of plain JSON values: text, finite numbers, true, false, null, lists"
    done = f"{did}, then called {name}.state_dict()"
    try:
        saved = player.policy.state_dict()
        if not isinstance(saved, dict):
            out.fail(done, expected, f"it returned {kind_of(saved)}")
            return None
        read: dict[str, Any] = json.loads(json.dumps(saved, allow_nan=False))
    except Exception as error:
        out.fail(done, expected, f"{type(error).__name__}: {error}")
        return None
    return read


def _compare(
    subject: Subject, player: Player, restored: Player, saved: dict[str, Any], did: str, out: Findings
) -> None:
    decisions = 0
    for case in subject.cases[BEFORE:]:
        first, second = player.play(case), restored.play(case)
        parted = first_difference(first, second)
        if parted is not None:
            where, one, other = parted
            if saved:
                fresh = "a fresh policy that was given its memory"
                advice = "state_dict lacks something that decisions go by"
            else:
                fresh = "a fresh policy"
                advice = "it remembers something, and state_dict() is empty: return it there, or keep it in `state`"
            out.fail(
                f"{did}, then one more with the same policy and with {fresh}: {case}",
                f"{subject.name} decides the same in both: all that outlives a request is in state_dict()",
                f"{where} was {one} in the one and {other} in the other: {advice}",
            )
            return
        decisions += len(first.decisions)
    kept = f"a memory of {len(json.dumps(saved))} bytes" if saved else "no memory"
    out.said = f"{kept}; {decisions} later decisions the same"
