"""Computes the features that a policy wants, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bpkit.decode.drafter import Proposal
from bpkit.decode.target import TargetOutput
from bpkit.decode.verify import Verdict
from bpkit.types import OF_THE_ANCHOR, Feature


def draft_features(proposal: Proposal, wants: frozenset[Feature]) -> dict[Feature, Tensor]:
    """Features of a proposal, each [rows, width, ...]; see `Feature` for their meaning."""
    if proposal.features is not None:
        return {name: value for name, value in proposal.features.items() if name in wants}
    features: dict[Feature, Tensor] = {}
    if Feature.DRAFT_TOKENS in wants:
        features[Feature.DRAFT_TOKENS] = proposal.tokens
    if Feature.DRAFT_HIDDEN in wants and proposal.hidden is not None:
        features[Feature.DRAFT_HIDDEN] = proposal.of_tokens(proposal.hidden)
    if proposal.scores is not None and wants & {Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY}:
        log_p = proposal.scores.log_softmax(dim=-1)
        if Feature.DRAFT_PROBABILITY in wants:
            features[Feature.DRAFT_PROBABILITY] = proposal.at_tokens(log_p).exp()
        if Feature.DRAFT_ENTROPY in wants:
            # Tokens that a processor ruled out have log p = -inf and no share in the entropy.
            features[Feature.DRAFT_ENTROPY] = proposal.of_tokens(-(log_p.exp() * log_p.clamp(min=-1e30)).sum(dim=-1))
    return features


def target_features(
    output: TargetOutput,
    verdict: Verdict,
    wants: frozenset[Feature],
    *,
    first: bool,
    embed: Callable[[Tensor], Tensor],
) -> dict[Feature, Tensor]:
    """Features of the position that decided the anchor, each [batch, ...], on the device of the target.

    Args:
        verdict: says which position that is, on the device: the host need not know it yet.
        first: whether it was prefill.
        embed: the target's embedding.
    """
    if output.known is not None:  # of positions of the text
        return {name: _at(value, verdict.num_accepted) for name, value in output.known.items() if name in wants}
    place = verdict.last_column
    features: dict[Feature, Tensor] = {}
    anchor = _at(verdict.tokens, verdict.num_accepted)
    if output.last_hidden is not None:
        if Feature.LAST_HIDDEN in wants:
            features[Feature.LAST_HIDDEN] = _at(output.last_hidden, place)
        if first and Feature.PREFILL_HIDDEN in wants:
            features[Feature.PREFILL_HIDDEN] = _at(output.last_hidden, place)
    if first and Feature.PREFILL_LOGITS in wants:
        features[Feature.PREFILL_LOGITS] = _at(output.logits, place).float()
    if Feature.TARGET_FEATURES in wants and output.features is not None:
        features[Feature.TARGET_FEATURES] = _at(output.features, place)
    if Feature.ANCHOR_EMBEDDING in wants:
        features[Feature.ANCHOR_EMBEDDING] = embed(anchor)
    if wants & OF_THE_ANCHOR:
        log_probability, entropy = anchor_statistics(_at(output.logits, place), anchor)
        if Feature.ANCHOR_LOG_PROBABILITY in wants:
            features[Feature.ANCHOR_LOG_PROBABILITY] = log_probability
        if Feature.ANCHOR_ENTROPY in wants:
            features[Feature.ANCHOR_ENTROPY] = entropy
    return features


def _at(values: Tensor, place: Tensor) -> Tensor:
    """One position of each row: [rows, positions, ...] -> [rows, ...]."""
    if len(place) == 1:
        return values.index_select(1, place)[:, 0]
    return values[torch.arange(len(place), device=place.device), place]


def anchor_statistics(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of each distribution, in nats.

    Args:
        logits: raw, [rows, vocab]. tokens: int64 [rows].
    """
    log_p = logits.float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(dim=-1)
    return log_p.gather(-1, tokens[:, None])[:, 0], entropy
