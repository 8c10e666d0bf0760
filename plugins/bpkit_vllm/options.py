"""What is written in vLLM's `additional_config` under `bpkit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bpkit.files import faults
from bpkit.policy import PolicyError
from bpkit.registry.resolve import resolve_policy
from bpkit.types import Feature

KEY = "bpkit"
"""Of `additional_config`."""
REQUEST_KEY = "bpkit_policy"
"""Of `vllm_xargs`, with which a request names its policy."""
Spec = str | dict[str, Any]


class EngineError(PolicyError):
    """vLLM as it was started cannot do what was asked for; the message says what to change."""


class EngineOptions(BaseModel):
    """Options of bpkit in vLLM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Spec = Field(description="of requests that name none: `fixed:4`, a folder of a trained policy, a mapping")
    policies: tuple[Spec, ...] = Field(
        default=(), description="further ones whose features are computed too, and which requests may name"
    )
    cost: str | None = Field(
        default=None, description="cost model: a file of `bpkit calibrate --engine vllm`, a preset"
    )
    max_decision_us: float | None = Field(
        default=None,
        gt=0,
        description="microseconds a step that a policy may take; a slower one is left out for a while",
    )
    observers: tuple[Spec, ...] = Field(default=(), description="observers of steps, such as jsonl:steps.jsonl")
    seed: int = Field(default=0, description="of the policies' own random numbers")
    untested: bool = Field(default=False, description="run with a vLLM outside the tested versions")


def read_options(additional_config: Any) -> EngineOptions:
    """The options in vLLM's `additional_config`. Raises EngineError that names each fault."""
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        raise EngineError(
            'name a policy in vLLM\'s own configuration: --additional-config \'{"bpkit": {"policy": "fixed:4"}}\''
        )
    try:
        return EngineOptions.model_validate(given)
    except ValidationError as error:
        known = ", ".join(EngineOptions.model_fields)
        raise EngineError(f"additional_config[{KEY!r}]: {faults(error)}; the options are: {known}") from None


def wanted_features(options: EngineOptions) -> frozenset[Feature]:
    """What the policies of the options read, that which they only use if it is there included. Raises PolicyError."""
    policies = [resolve_policy(spec) for spec in (options.policy, *options.policies)]
    return frozenset().union(*(policy.wants | policy.wants_optional for policy in policies))
