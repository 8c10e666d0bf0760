"""What the usual recordings show by themselves: the text, decisions in range, features read, nothing changed."""

from __future__ import annotations

from bpkit.testing.checks import setup
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.recorder import Recording
from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.setup import LARGEST, Plain
from bpkit.types import Feature


def lossless(policy: CheckedPolicy, out: Findings) -> None:
    """The text is that of plain decoding, and the runtime never had to overrule the policy."""
    for recording, fault in policy.faults:
        if fault.kind in ("raised", "answer"):  # decisions out of range and undeclared features are other checks'
            done = "bound the policy to a decoder" if fault.method == "bind" else f"decoded with {recording}"
            out.fail(
                f"{done}, faults of the policy being errors",
                f"{policy.name}.{fault.method} returns what the Policy protocol says",
                f"{fault.text}; in use the runtime would overrule it, warn, and decode at another speed than intended",
                drafter=recording.drafter,
            )
    ended = [recording for made in policy.usual.values() for recording in made if recording.made is not None]
    for recording in ended:
        compare_with_plain(policy.name, recording, setup.plain(recording.case), out)
    tokens = sum(len(recording.tokens) for recording in ended)
    out.said = f"{len(ended)} generations, {tokens} tokens, temperatures 0 and 1, drafters {', '.join(policy.drafters)}"


def compare_with_plain(name: str, recording: Recording, plain: Plain, out: Findings, *, exact: bool = True) -> None:
    """Tell where the tokens of a generation that came to its end part from plain decoding.

    `exact` says that logits of one position agree between verify widths but for near ties, as in float32.
    """
    tokens, wanted = recording.tokens, plain.tokens
    if tokens == wanted:
        return
    both = min(len(tokens), len(wanted))
    place = next((i for i in range(both) if tokens[i] != wanted[i]), both)
    close = place < both and place in plain.near_ties
    if close or (place < both and not exact):
        why = "where the two best are too close to call" if close else "which rounding explains in reduced precision"
        out.note(f"{recording}: another token {place}, {why}; not compared from there on")
        return
    here, there = (str(list(text[place : place + 4])) if place < len(text) else "no token" for text in (tokens, wanted))
    out.fail(
        f"decoded with {recording}, under policy {name}",
        f"the {len(wanted)} tokens of plain decoding (`fixed:1`), with {there} from token {place} on",
        f"{len(tokens)} tokens, with {here} from there on",
        drafter=recording.drafter,
    )


_RANGES = {
    "select": f"block sizes from 1 (no draft) to decoder.max_block_size, here {LARGEST}, in whole numbers, and sources "
    "that are places in decoder.sources",
    "truncate": "lengths from 0 to draft.draft_length, in whole numbers",
}


def sizes(policy: CheckedPolicy, out: Findings) -> None:
    """Decisions are in range without being clamped."""
    for recording, fault in policy.faults:
        if fault.kind == "size":
            trained = setup.drafters()[recording.drafter].trained_block_size
            out.fail(
                f"asked {policy.name}.{fault.method} while decoding with {recording} (trained block size {trained})",
                _RANGES[fault.method],
                fault.text,
                drafter=recording.drafter,
            )
    decisions = [made for recordings in policy.usual.values() for each in recordings for made in each.decisions]
    selected, verified = (
        sorted({_size(method, number) for method, answer in decisions if method == name for number in answer})
        for name in _RANGES
    )
    out.said = f"block sizes {_range(selected)}" + (f", verified lengths {_range(verified)}" if verified else "")


def _size(method: str, answer: int | tuple[int, ...]) -> int:
    """The block size of a Plan's pair; how many nodes of a tree are kept."""
    if isinstance(answer, int):
        return answer
    return len(answer) if method == "truncate" else answer[0]


def _range(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return str(*numbers) or "none"
    return f"{numbers[0]} .. {numbers[-1]}"


def features(policy: CheckedPolicy, out: Findings) -> None:
    """`wants` is what the policy reads."""
    clean, recorders = not policy.faults, policy.recorders
    wanted = {str(name) for recorder in recorders.values() for name in recorder.policy.wants}
    optional = {str(name) for recorder in recorders.values() for name in recorder.policy.wants_optional} - wanted
    read = {name for recorder in recorders.values() for names in recorder.read.values() for name in names}
    for drafter, recorder in recorders.items():
        for method, missed in recorder.missed.items():
            # An optional one may be missing with this drafter; what the policy did about it is seen elsewhere.
            for name in sorted(missed - optional):
                out.fail(
                    f"watched what {policy.name}.{method} reads, drafter {drafter}",
                    f"features that `wants` declares ({', '.join(sorted(wanted)) or 'none'}), where they are given",
                    f"it reads {name!r}{_why_missing(name, wanted)}",
                    drafter=drafter,
                )
    if clean:
        for name in sorted(wanted - read):
            out.fail(
                f"decoded {len(policy.cases)} prompts with each drafter ({', '.join(policy.drafters)})",
                f"{policy.name} reads every feature of its `wants`, because each is computed at every step",
                f"no method ever read {name!r}: take it out of `wants`, or into `wants_optional` if it is rarely used",
            )
        for name in sorted(optional - read):
            out.note(f"{name!r} of wants_optional was never read")
    out.said = f"declared and read: {', '.join(sorted(read)) or 'none'}"


def _why_missing(name: str, wanted: set[str]) -> str:
    if name in wanted:
        return ", which is not there: draft features are given to `truncate` and `extend`, prefill features to `begin`"
    if name in [*Feature]:
        return ", which `wants` does not name, so that it is not computed: add it to `wants`"
    return ", and there is no such feature: see bpkit.Feature"


def mutation(policy: CheckedPolicy, out: Findings) -> None:
    """The policy writes to its own state and to nothing else that it is handed."""
    calls = sum(len(recording.calls) for recordings in policy.usual.values() for recording in recordings)
    if not calls:
        raise Skip("no method of the policy was ever called; mend the other failures first")
    for drafter, recorder in policy.recorders.items():
        for method, change in recorder.changes:
            out.fail(
                f"called {policy.name}.{method} while decoding, drafter {drafter}",
                "contexts, drafts and steps stay as they were: they are the runtime's, `state` alone is the policy's",
                f"{change}: work on a copy (`.clone()`)",
                drafter=drafter,
            )
    out.said = f"{calls} calls looked at, before and after"
