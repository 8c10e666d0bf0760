"""Prompts of one or several traces, in parts that never mix: what is trained on, and what validates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpkit.trace.fingerprint import fingerprint_values
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Fill, offered
from bpkit.trace.store.manifest import TraceError
from bpkit.trace.store.storage import Trace
from bpkit.types import Feature

PROMPTS = "prompts.json"
"""In the folder of a trained policy: which prompts it has seen. `bpkit evaluate` reads it."""
_MUST_AGREE = ("drafter_kind", "trained_block_size", "hidden_size", "vocab_size", "block_sizes")


class _Lazy(Sequence[PromptTrace]):
    """Prompts that are read when they are asked for.

    Attributes:
        ids, domains: of all prompts.
    """

    ids: list[str]
    domains: list[str]

    def _read(self, place: int) -> PromptTrace:
        raise NotImplementedError

    @property
    def prompt_fingerprints(self) -> list[str]:
        """Of the tokens of all prompts."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: Any) -> Any:
        chosen = range(len(self))[place]
        return [self._read(p) for p in chosen] if isinstance(chosen, range) else self._read(chosen)


class Chain(_Lazy):
    """Sequences of prompts, one after the other."""

    def __init__(self, parts: Sequence[Sequence[PromptTrace]]) -> None:
        self._parts = parts
        self._places = [(part, place) for part in parts for place in range(len(part))]
        self.ids = [label for part in parts for label in labels(part, "id")]
        self.domains = [label for part in parts for label in labels(part, "domain")]

    def _read(self, place: int) -> PromptTrace:
        part, at = self._places[place]
        return part[at]

    @property
    def prompt_fingerprints(self) -> list[str]:
        return [found for part in self._parts for found in fingerprints(part)]


class Part(_Lazy):
    """Some prompts of one trace.

    Args:
        fill: adds `features` where the trace lacks them.
        features: that are wanted of every prompt.
    """

    def __init__(
        self,
        trace: Trace,
        places: Sequence[int],
        *,
        fill: Fill | None = None,
        features: frozenset[Feature] = frozenset(),
    ) -> None:
        self.trace, self.places, self.fill, self.features = trace, list(places), fill, features
        self.ids = [trace.ids[place] for place in places]
        self.domains = [trace.domains[place] for place in places]

    def _read(self, place: int) -> PromptTrace:
        prompt = self.trace[self.places[place]]
        missing = self.features - offered(prompt)
        return self.fill(prompt, missing) if missing and self.fill is not None else prompt

    @property
    def prompt_fingerprints(self) -> list[str]:
        return [self.trace.prompt_fingerprints[place] for place in self.places]


def labels(prompts: Sequence[PromptTrace], name: str) -> list[str]:
    """`id` or `domain` of all prompts; read only where the sequence does not know them."""
    known = getattr(prompts, f"{name}s", None)
    return list(known) if known is not None else [str(getattr(prompt, name)) for prompt in prompts]


def fingerprints(prompts: Sequence[PromptTrace]) -> list[str]:
    """Of the tokens of each prompt, whatever its id; prompts are read only where the sequence does not know them."""
    known = getattr(prompts, "prompt_fingerprints", None)
    return list(known) if known is not None else [fingerprint_values(p.prompt_tokens.tolist()) for p in prompts]


def prompt_record(parts: Mapping[str, Sequence[PromptTrace]]) -> dict[str, Any]:
    """What `prompts.json` says: ids by part, and under `fingerprints` those of the tokens in the same order."""
    ids = {part: labels(prompts, "id") for part, prompts in parts.items()}
    return {**ids, "fingerprints": {part: fingerprints(prompts) for part, prompts in parts.items()}}


def joined(traces: Sequence[Any]) -> Sequence[PromptTrace]:
    """One sequence of prompts from prompts or from traces."""
    if len(traces) and not isinstance(traces[0], PromptTrace):
        return Chain(traces)
    return traces


def check_alike(traces: Sequence[Trace]) -> None:
    """Raise TraceError unless all traces are of the same models and block sizes; sampling may differ."""
    first = traces[0]
    for other in traces[1:]:
        different = [
            f"{name.replace('_', ' ')} {getattr(first.manifest, name)}, not {getattr(other.manifest, name)}"
            for name in _MUST_AGREE
            if getattr(first.manifest, name) != getattr(other.manifest, name)
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


def first_of_each(trace: Trace, places: Sequence[int], limit: int | None) -> list[int]:
    """The first `limit` of the places in each domain; places ascend."""
    by_domain: dict[str, list[int]] = {}
    for place in places:
        by_domain.setdefault(trace.domains[place], []).append(place)
    return sorted(place for of_domain in by_domain.values() for place in of_domain[:limit])
