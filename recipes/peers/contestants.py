"""Who takes part: plain decoding twice, peers by name with options, and policies of bpkit with drafters."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bpkit.names import did_you_mean
from bpkit.registry.resolve import parse_spec, resolve_policy

LOOP, GENERATE = "bpkit plain", "transformers generate"
"""The two ways of plain decoding, which always take part."""
DFLASH, ASSISTANT = "dflash", "assistant"
"""Kinds of draft models that are given; `ngram` needs none."""
NGRAM = "ngram"
GET_FLASHSPEC = (
    "flashspec needs an environment of its own: `python -m venv FOLDER`, `FOLDER/bin/pip install torch` (the version "
    "that constraints.txt names), `FOLDER/bin/pip install flashspec==0.3.1`; then --flashspec-python FOLDER/bin/python"
)


@dataclass(frozen=True)
class Contestant:
    """One that decodes.

    Attributes:
        name: as reported.
        library: of `worker.LIBRARIES`. settings: what that reads.
        process: contestants with the same share one.
        interpreter: of the environment that has the library.
    """

    name: str
    library: str
    settings: Mapping[str, Any]
    process: str
    interpreter: str = sys.executable


@dataclass(frozen=True)
class Peer:
    """A way of another library.

    Attributes:
        options: what may be set; the first is what a bare value sets.
        draft: the kind of its draft model.
        defaults: of what has to be set.
    """

    library: str
    options: tuple[str, ...]
    draft: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


PEERS = {
    "transformers-assisted": Peer(
        "transformers",
        ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        ASSISTANT,
    ),
    "transformers-lookup": Peer(
        "transformers",
        ("prompt_lookup_num_tokens", "max_matching_ngram_size"),
        defaults={"prompt_lookup_num_tokens": 10},
    ),
    "transformers-dflash": Peer("transformers", ("block_size",), DFLASH),
    "flashspec-model": Peer("flashspec", ("gamma",), ASSISTANT),
    "flashspec": Peer("flashspec", ("drafter_strategy",), ASSISTANT),
}


def plain_ones(products: str = "torch") -> list[Contestant]:
    """Plain decoding by bpkit's loop and by transformers.

    Args:
        products: of all contestants of bpkit, as `SpeculativeDecoder` takes them.
    """
    generate: dict[str, Any] = {"way": "transformers", "options": {}, "draft": None}
    return [
        Contestant(GENERATE, "transformers", generate, GENERATE),
        Contestant(LOOP, "bpkit", {"policy": None, "products": products}, "bpkit"),
    ]


def peer(spec: str, drafts: Mapping[str, str], flashspec_python: str | None) -> Contestant | str:
    """A peer as typed, such as `transformers-lookup:4`; or why it cannot take part.

    Raises:
        ValueError: no such peer or option.
    """
    options = parse_spec(spec)
    name = str(options.pop("name"))
    if name not in PEERS:
        raise ValueError(f"there is no peer {name!r}.{did_you_mean(name, PEERS)} The peers are: {', '.join(PEERS)}")
    known = PEERS[name]
    if "" in options:
        options[known.options[0]] = options.pop("")
    if unknown := options.keys() - set(known.options):
        raise ValueError(f"peer {spec}: unknown option {', '.join(unknown)}; it takes {', '.join(known.options)}")
    if known.draft is not None and known.draft not in drafts:
        return f"it needs --{known.draft}, the folder of a drafter for this target"
    interpreter = sys.executable
    if known.library == "flashspec":
        if flashspec_python is None:
            return GET_FLASHSPEC
        interpreter = flashspec_python
    values = {**known.defaults, **{option: number(value) for option, value in options.items()}}
    settings = {"way": name, "options": values, "draft": drafts.get(known.draft or "")}
    return Contestant(spec, known.library, settings, name, interpreter)


def number(text: str) -> int | float | str:
    """A number where a text is one.

    >>> number("4"), number("0.5"), number("heuristic")
    (4, 0.5, 'heuristic')
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def own(spec: str, drafts: Mapping[str, str], costs: Mapping[str, str], products: str = "torch") -> list[Contestant]:
    """`POLICY@DRAFTER` as typed, or POLICY with every draft model and n-grams.

    DRAFTER is `dflash`, `assistant`, or what `bpkit --drafter` takes. Raises ValueError (PolicyError) for others.
    """
    policy, _, drafter = spec.partition("@")
    resolve_policy(policy)  # a mistyped one is told before any weights are read
    if drafter in (DFLASH, ASSISTANT) and drafter not in drafts:
        raise ValueError(f"--policy {spec}: give --{drafter}, the folder of a drafter for this target")
    made = []
    for kind in [drafter] if drafter else [*drafts, NGRAM]:
        drafter = drafts.get(kind, kind)
        settings = {"policy": policy, "drafter": drafter, "cost": costs.get(kind), "products": products}
        made.append(Contestant(f"{policy}@{kind}", "bpkit", settings, "bpkit"))
    return made


def is_own(name: str) -> bool:
    """Whether a contestant is a policy of bpkit, by its name."""
    return "@" in name


def line_up(
    peers: Sequence[str],
    policies: Sequence[str],
    drafts: Mapping[str, str],
    costs: Mapping[str, str],
    flashspec_python: str | None,
    products: str = "torch",
) -> tuple[list[Contestant], dict[str, str]]:
    """All that take part, and why others do not.

    Raises:
        ValueError: something typed is unknown, or given twice.
    """
    found, left_out = plain_ones(products), {}
    for spec in peers:
        made = peer(spec, drafts, flashspec_python)
        if isinstance(made, str):
            left_out[spec] = made
        else:
            found.append(made)
    for spec in policies:
        found += own(spec, drafts, costs, products)
    names = [one.name for one in found]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"given more than once: {', '.join(sorted(repeated))}")
    return found, left_out
