"""What the drafter's confidences could win at most: choices that know those of drafts of all sizes before drafting.

A logistic regression gives S_b(k), the chance that the first k tokens of the draft at size b stand. Each step takes the
size and width of the largest `1 + sum over k <= v of S_b(k) - price * (draft(b) + verify(v + 1) + rest)`, or no draft,
`1 - price * plain step`, where that is more. What a draft must catch up with is left out: it would only wait longer.
Of several sources of drafts it knows the first alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.oracle.paths import Path, walk
from bpkit.trace.oracle.plan import Float64, StepChoice, step_table
from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel, DraftWork, Feature

CONFIDENCES = (Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY)
FROM_A_PROMPT = 2000
"""Drafted tokens to learn from, at most; a prompt has tens of thousands, alike."""
LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True)
class Calibration:
    """Chances that drafted tokens stand, by a scikit-learn classifier that was fitted to so many tokens."""

    model: Any
    tokens: int

    def survival(self, prompt: PromptTrace) -> Float64:
        """Chance that the first k drafted tokens stand: float64 [rows, sizes, width], k from 1; 0 beyond the draft."""
        width = int(prompt.drafts.draft_length.max(initial=0))
        known = _known(prompt)[:, :, :width]
        there = np.arange(width) < prompt.drafts.draft_length[:, :, None]
        stands = np.zeros(there.shape)
        if there.any():
            stands[there] = self.model.predict_proba(known[there])[:, 1]
        return np.asarray(np.cumprod(stands, axis=2), np.float64)


def has_confidences(prompt: PromptTrace) -> bool:
    """Whether a trace holds what is needed: the confidences of greedy drafts."""
    return prompt.drafts.match_probability is None and all(name in prompt.drafts.features for name in CONFIDENCES)


def calibrate(prompts: Iterable[PromptTrace], seed: int) -> Calibration | None:
    """Learn from prompts which drafted tokens stand; None if all did, or none.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    samples = [_sample(prompt, rng) for prompt in prompts]
    if not samples:
        return None
    known, stands = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    if len(np.unique(stands)) < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return Calibration(model.fit(known, stands), len(stands))


class Informed:
    """One prompt under one cost model, with its `Calibration.survival`."""

    def __init__(self, prompt: PromptTrace, work: DraftWork, cost: CostModel, survival: Float64) -> None:
        self.prompt, self.work, self.cost = prompt, work, cost
        self.table = step_table(prompt, work, cost, truncate=True)
        none = np.zeros((*survival.shape[:2], 1))
        self.expected: Float64 = np.concatenate([none, np.cumsum(survival, axis=2)], axis=2)
        """Drafted tokens that stand, of the first v, [rows, sizes, width + 1]."""

    def path(self, price: float) -> Path:
        """The steps where a second is worth `price` tokens, about what is reached."""
        table, steps = self.table, self.table.sources[0]
        gain = self.expected - price * steps.draft
        flat = gain.reshape(len(gain), -1)
        size, verified = np.divmod(flat.argmax(axis=1), gain.shape[2])  # the first of equals
        drafts = flat.max(axis=1) > -price * table.no_draft
        chosen = np.where(drafts[:, None], np.stack([steps.block_sizes[size], verified], axis=1), (1, 0)).tolist()
        return walk(self.prompt, self.work, self.cost, lambda position, waiting: StepChoice(0, *chosen[position - 1]))


def _known(prompt: PromptTrace) -> Float64:
    """What is known of each drafted token, float64 [rows, sizes, width, 5]; anything where nothing was drafted."""
    drafts = prompt.drafts
    probability, entropy = (np.nan_to_num(drafts.features[name].astype(np.float64)) for name in CONFIDENCES)
    probability = probability.clip(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    log = np.log(probability)
    size = np.broadcast_to(drafts.block_sizes[None, :, None], log.shape)
    place = np.broadcast_to(np.arange(log.shape[2]), log.shape)
    return np.stack([log - np.log1p(-probability), entropy, log.cumsum(axis=2), size, place], axis=3)


def _sample(prompt: PromptTrace, rng: np.random.Generator) -> tuple[Float64, NDArray[np.bool_]]:
    """What is known of some drafted tokens before which all stand, [tokens, 5], and whether they stand, [tokens]."""
    drafts = prompt.drafts
    accepted, length = drafts.num_accepted[:, :, None], drafts.draft_length[:, :, None]
    room = (prompt.output_length - 1 - np.arange(1, drafts.rows + 1))[:, None, None]
    place = np.arange(drafts.tokens.shape[2])
    # Of the output's last token is not known whether a draft of it matched: it comes either way.
    told = np.flatnonzero((place <= accepted) & (place < np.minimum(length, room)))
    chosen = rng.choice(told, min(FROM_A_PROMPT, len(told)), replace=False)
    stands = np.broadcast_to(place < accepted, drafts.tokens.shape).ravel()[chosen]
    return _known(prompt).reshape(drafts.tokens.size, -1)[chosen], stands
