"""Copies of what a policy is handed, and what differs from them later."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bpkit.types import Context, Draft, Feature, Step

Given = Context | Draft | Step
"""What methods of a policy are handed, beside the state."""


def generator_of(given: Given | None) -> torch.Generator | None:
    """The policy's random numbers, where they are at hand."""
    context = given.context if isinstance(given, Draft) else given
    return context.generator if isinstance(context, Context) else None


def copied(given: Given) -> Given:
    """A copy with tensors of its own and plain features."""
    if isinstance(given, Step):
        return given.clone()
    features = {name: value.clone() for name, value in _plain(given.features).items()}
    if isinstance(given, Draft):
        context = copied(given.context)
        assert isinstance(context, Context)
        return Draft(
            context,
            given.block_size.clone(),
            given.draft_length.clone(),
            given.tokens.clone(),
            None if given.logits is None else given.logits.clone(),
            features,
            _predictions(given),
        )
    return dataclasses.replace(
        given,
        position=given.position.clone(),
        remaining=given.remaining.clone(),
        context_length=given.context_length.clone(),
        features=features,
        predictions=_predictions(given),
    )


def _predictions(given: Context | Draft) -> dict[str, Tensor] | None:
    return None if given.predictions is None else {name: value.clone() for name, value in given.predictions.items()}


def _plain(features: Mapping[Feature, Tensor]) -> dict[Feature, Tensor]:
    """The features without a note of this reading."""
    return dict(dict.items(features)) if isinstance(features, dict) else dict(features)


def named(given: Given, prefix: str = "") -> dict[str, Any]:
    """Fields and features by the names that an author writes."""
    own = prefix or {Context: "context", Draft: "draft", Step: "step"}[type(given)]
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(given):
        value = getattr(given, entry.name)
        if isinstance(value, Context):
            found.update(named(value, f"{own}.context"))
        elif entry.name == "features":
            found.update({f"{own}[{str(name)!r}]": tensor for name, tensor in _plain(value).items()})
        elif entry.name == "predictions":
            found.update({f"{own}.predictions[{name!r}]": tensor for name, tensor in (value or {}).items()})
        else:
            found[f"{own}.{entry.name}"] = value
    return found


def differences(before: Given, now: Given) -> list[tuple[str, str, str]]:
    """What differs, with both values as text."""
    was, is_now = named(before), named(now)
    missing = object()
    return [
        (name, _shown(was.get(name, "nothing")), _shown(is_now.get(name, "nothing")))
        for name in was | is_now
        if not same(was.get(name, missing), is_now.get(name, missing))
    ]


def same(one: Any, other: Any) -> bool:
    """Equal values; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other))


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    text = str(value.tolist())
    return text if len(text) <= 60 else f"{text[:57]}..."
