"""Computes the draft features that a policy wants, and nothing else."""

from __future__ import annotations

from torch import Tensor

from bpkit.drafters.base import Proposal
from bpkit.types import Feature


def draft_features(proposal: Proposal, wants: frozenset[Feature]) -> dict[Feature, Tensor]:
    """Features of a proposal, each [1, count, ...]; see `Feature` for their meaning."""
    if proposal.features is not None:
        return {name: value for name, value in proposal.features.items() if name in wants}
    features: dict[Feature, Tensor] = {}
    if Feature.DRAFT_TOKENS in wants:
        features[Feature.DRAFT_TOKENS] = proposal.tokens
    if Feature.DRAFT_HIDDEN in wants and proposal.hidden is not None:
        features[Feature.DRAFT_HIDDEN] = proposal.hidden
    if proposal.scores is not None and wants & {Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY}:
        log_p = proposal.scores.log_softmax(dim=-1)
        if Feature.DRAFT_PROBABILITY in wants:
            features[Feature.DRAFT_PROBABILITY] = log_p.gather(-1, proposal.tokens[..., None])[..., 0].exp()
        if Feature.DRAFT_ENTROPY in wants:
            # Tokens that a processor ruled out have log p = -inf and no share in the entropy.
            features[Feature.DRAFT_ENTROPY] = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(dim=-1)
    return features
