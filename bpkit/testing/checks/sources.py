"""Several sources of drafts: a policy may name one for each row, and one that names none drafts from the first."""

from __future__ import annotations

from collections import Counter

from bpkit.policy import PolicyError
from bpkit.testing.checks import setup
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.recorder import Recording, raised
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.setup import SOURCES, TOGETHER, Case
from bpkit.testing.checks.usual import compare_with_plain

TEXTS = ("abcabcabcabc", "x = 1", "aaaaaaaaaaaa")
"""In some of them a store of n-grams finds drafts."""


def sources(policy: CheckedPolicy, out: Findings) -> None:
    """Decode with a model and a store of n-grams in one decoder; a fault counts if usual recordings did not have it."""
    try:
        recorder = policy.recorder(SOURCES)
    except PolicyError as error:
        raise Skip(f"it does not serve a decoder with several sources of drafts: {error}") from error
    except Exception as error:
        if any(fault.method == "bind" for _, fault in policy.faults):  # which has its own check
            raise Skip("the policy cannot be bound; mend that first") from error
        out.fail(
            "bound the policy to a decoder with several sources of drafts",
            f"{policy.name}.bind raises PolicyError for a decoder that the policy cannot serve, and nothing else",
            raised(error),
        )
        return
    cases = [Case(text, float(place % 2), policy.seed, place) for place, text in enumerate(TEXTS)]
    recordings = [recorder.record(case) for case in cases]
    if not policy.fails_in_batches:
        recordings += recorder.record_together(cases, TOGETHER)
    known = {(fault.method, fault.kind) for _, fault in policy.faults}
    for recording in recordings:
        fault = recording.fault
        if fault is None:
            compare_with_plain(policy.name, recording, setup.plain(recording.case), out)
        elif (fault.method, fault.kind) not in known:
            known.add((fault.method, fault.kind))
            names = ", ".join(f"{place} {source.kind}" for place, source in enumerate(recorder.decoder.spec.sources))
            out.fail(
                f"decoded with several sources of drafts ({names}): {recording}",
                f"{policy.name}.{fault.method} answers here too: `select` returns block sizes, or a bpkit.Plan of "
                "`block_size` and `source`, each int64 [batch], whose sources are places in `decoder.sources`",
                fault.text,
            )
    out.said = f"{len(recordings)} generations with two sources; steps: {_drafted(recordings)}"


def _drafted(recordings: list[Recording]) -> str:
    """Who drafted how often."""
    made = Counter(
        int(step.source) if int(step.draft_length) else -1
        for recording in recordings
        if recording.made is not None
        for step in recording.made.steps
    )
    named = {-1: "no draft", 0: "from the model", 1: "from the store"}
    return ", ".join(f"{made[place]} {what}" for place, what in named.items())
