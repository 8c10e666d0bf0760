"""Prompts of one or several traces, in parts that never mix: what is trained on, and what validates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpkit.trace.fingerprint import fingerprint_values
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Fill, offered
from bpkit.trace.store.joined import AnyTrace, JoinedTrace
from bpkit.trace.store.manifest import TraceError
from bpkit.trace.store.storage import Trace
from bpkit.types import Feature

PROMPTS = "prompts.json"
"""In the folder of a trained policy: which prompts it has seen. `bpkit evaluate` reads it."""
_MUST_AGREE = ("drafter_kind", "trained_block_size", "hidden_size", "vocab_size", "block_sizes")


class Prompts(Sequence[PromptTrace]):
    """Prompts of other sequences, read when they are asked for.

    Args:
        places: of each prompt, the sequence that has it and its place there.
    """

    def __init__(self, places: Sequence[tuple[Sequence[PromptTrace], int]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[p] for p in range(*place.indices(len(self)))]
        source, there = self._places[place]
        return source[there]

    def labels(self, name: str) -> list[str]:
        """As the function `labels`."""
        known = {key: labels(source, name) for key, source in {id(s): s for s, _ in self._places}.items()}
        return [known[id(source)][place] for source, place in self._places]


class Part(Prompts):
    """Some prompts of one trace.

    Args:
        limit: most prompts of each domain, the first ones.
        fill: adds `features` where the trace lacks them.
        features: that are wanted of every prompt.
    """

    def __init__(
        self,
        trace: AnyTrace,
        places: Sequence[int],
        *,
        limit: int | None = None,
        fill: Fill | None = None,
        features: frozenset[Feature] = frozenset(),
    ) -> None:
        by_domain: dict[str, list[int]] = {}
        for place in places:
            by_domain.setdefault(trace.domains[place], []).append(place)
        self.trace, self.fill, self.features = trace, fill, features
        self.places = sorted(place for of_domain in by_domain.values() for place in of_domain[:limit])
        super().__init__([(trace, place) for place in self.places])

    def __getitem__(self, place: Any) -> Any:
        prompt = super().__getitem__(place)
        if self.fill is None or isinstance(place, slice):
            return prompt
        missing = self.features - offered(prompt)
        return self.fill(prompt, missing) if missing else prompt


def labels(prompts: Sequence[PromptTrace], name: str) -> list[str]:
    """`id`, `domain` or `fingerprint` (of the tokens) of all prompts; they are read only if they are in no trace."""
    if isinstance(prompts, Prompts):
        return prompts.labels(name)
    if isinstance(prompts, (Trace, JoinedTrace)):
        known = {"id": "ids", "domain": "domains", "fingerprint": "prompt_fingerprints"}
        return list(getattr(prompts, known[name]))
    if name == "fingerprint":
        return [fingerprint_values(prompt.prompt_tokens.tolist()) for prompt in prompts]
    return [getattr(prompt, name) for prompt in prompts]


def prompt_record(parts: Mapping[str, Sequence[PromptTrace]]) -> dict[str, Any]:
    """What `prompts.json` says: ids by part, and under `fingerprints` those of the tokens in the same order."""
    ids, fingerprints = ({p: labels(prompts, name) for p, prompts in parts.items()} for name in ("id", "fingerprint"))
    return {**ids, "fingerprints": fingerprints}


def joined(traces: Sequence[Any]) -> Sequence[PromptTrace]:
    """One sequence of prompts from prompts or from traces."""
    if not len(traces) or isinstance(traces[0], PromptTrace):
        return traces
    return Prompts([(trace, place) for trace in traces for place in range(len(trace))])


def check_alike(traces: Sequence[AnyTrace]) -> None:
    """Raise TraceError unless all traces are of the same models and block sizes; sampling may differ."""
    first = traces[0]
    for other in traces[1:]:
        different = [
            f"{name.replace('_', ' ')} {ours}, not {theirs}"
            for name in _MUST_AGREE
            if (ours := getattr(first.manifest, name)) != (theirs := getattr(other.manifest, name))
        ]
        for role in ("target", "drafter"):
            ours, theirs = getattr(first.manifest, role), getattr(other.manifest, role)
            if ours.fingerprint != theirs.fingerprint:
                different.append(f"{role} {ours.name} ({ours.fingerprint}), not {theirs.name} ({theirs.fingerprint})")
        if different:
            raise TraceError(
                f"{first.path} and {other.path} cannot be trained on together ({'; '.join(different)}): trace the same "
                "pair at the same block sizes"
            )


def fingerprint_part(part: Part) -> str:
    """Of what the trace holds and which of its prompts are taken, not of when and where it was made."""
    aside = {"complete", "command", "versions", "machine"}
    facts = part.trace.manifest.model_dump(mode="json", exclude=aside)
    return fingerprint_values([facts, part.places, sorted(part.features)])
