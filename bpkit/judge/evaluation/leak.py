"""Trained policies are not judged on prompts that they have seen. Their folders say which those are: `prompts.json`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bpkit.judge.evaluation.candidate import Candidate
from bpkit.learn.trained import TrainedPolicy
from bpkit.learn.training.prompts import PROMPTS, labels
from bpkit.policy import PolicyError
from bpkit.registry.resolve import PolicyLike
from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel, DecoderSpec


class SeenPrompts(BaseModel):
    """What `prompts.json` says.

    Attributes:
        train, validation: ids of prompts.
        fingerprints: of their tokens, in the same order; folders of earlier versions have none.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    train: list[str]
    validation: list[str]
    fingerprints: dict[str, list[str]] = {}

    @property
    def by_tokens(self) -> bool:
        """How prompts can be compared; by id if False."""
        return {"train", "validation"} <= self.fingerprints.keys()

    def among(self, prompts: Sequence[PromptTrace], part: str) -> list[str]:
        """Ids of those prompts that are in a part, `train` or `validation`."""
        known = set(self.fingerprints[part] if self.by_tokens else getattr(self, part))
        keys = labels(prompts, "fingerprint" if self.by_tokens else "id")
        return [prompt.id for prompt, key in zip(prompts, keys, strict=True) if key in known]


@dataclass(frozen=True)
class Leak:
    """Prompts of an evaluation, by id, that a policy has seen.

    Attributes:
        folder: of the policy.
        trained_on: of the evaluation's test and validation prompts, by these names.
        chosen_on: test prompts that its epoch and options were chosen on.
        by_tokens: how prompts were compared; by id if False.
    """

    folder: Path
    trained_on: Mapping[str, list[str]]
    chosen_on: list[str]
    by_tokens: bool

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        compared_by = "tokens" if self.by_tokens else "id"
        return {"trained_on": self.trained_on, "chosen_on": {"test": self.chosen_on}, "compared_by": compared_by}

    def __str__(self) -> str:
        """What it has seen, to go on from "policy NAME"."""
        trained_on = [_some(ids, part) for part, ids in self.trained_on.items() if ids]
        said = [f"was trained on {' and '.join(trained_on)}"] if trained_on else []
        if self.chosen_on:
            said.append(f"was chosen on {_some(self.chosen_on, 'test')}")
        how = "" if self.by_tokens else f" (compared by id: {self.folder / PROMPTS} holds no fingerprints)"
        return ", and ".join(said) + how


def _some(ids: Sequence[str], part: str) -> str:
    return f"{len(ids)} of the {part} prompts ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def find_leaks(
    policies: Mapping[str, PolicyLike],
    evaluated: Mapping[str, Sequence[PromptTrace]],
    spec: DecoderSpec,
    cost: CostModel,
) -> tuple[dict[str, Leak], list[str]]:
    """What each trained policy has seen of the `validation` and `test` prompts of an evaluation.

    Its own validation prompts may be among those of the evaluation: both choose by them. Decoder and cost model are
    for binding it: which of several shipped folders a policy takes depends on the decoder.

    Returns:
        the policies that have seen some, and the names of those that do not say.

    Raises:
        PolicyError: a `prompts.json` is damaged.
    """
    leaks, silent = {}, []
    for name, policy in policies.items():
        folder = _folder(policy, spec, cost)
        if folder is None:
            continue
        try:
            seen = SeenPrompts.model_validate_json((folder / PROMPTS).read_bytes())
        except FileNotFoundError:
            silent.append(name)
            continue
        except (OSError, ValidationError):
            raise PolicyError(
                f"{folder / PROMPTS} cannot be read as a list of prompts: copy or train the folder again, or delete "
                "that file if it does not matter which prompts the policy has seen"
            ) from None
        trained_on = {part: seen.among(evaluated[part], "train") for part in ("test", "validation")}
        chosen_on = seen.among(evaluated["test"], "validation")
        if chosen_on or any(trained_on.values()):
            leaks[name] = Leak(folder, trained_on, chosen_on, seen.by_tokens)
    return leaks, silent


def _folder(policy: PolicyLike, spec: DecoderSpec, cost: CostModel) -> Path | None:
    """Of a trained policy. A policy that cannot be made or bound is no leak: that is told where it is used."""
    try:
        made = Candidate(policy).make()
    except PolicyError:
        return None
    if not isinstance(made, TrainedPolicy):
        return None
    with contextlib.suppress(Exception):
        made.bind(spec, cost)
    return made.folder


def refusal(name: str, leak: Leak) -> str:
    """What is wrong, and how to mend it."""
    return (
        f"policy {name} {leak}: its figures would be too good. Evaluate with the --split and --seed that it was "
        f"trained with (`command` in {leak.folder / 'provenance.json'}), or on a trace of other prompts; with "
        "--allow-leak it is judged all the same, and the result says so"
    )


def leak_notes(leaks: Mapping[str, Leak], silent: Sequence[str]) -> list[str]:
    """What a reader of the figures should know."""
    said = [f"LEAK: policy {name} {leak}. Its figures are too good." for name, leak in leaks.items()]
    return said + [
        f"Policy {name} does not say which prompts it was trained on (no {PROMPTS} in its folder): whether it has seen "
        "test prompts is unknown."
        for name in silent
    ]
