"""A draft as it grows: features of each part are computed once, and the host reads each part once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.decode.drafter import Proposal
from bpkit.decode.features import draft_features
from bpkit.decode.guard import GuardedPolicy
from bpkit.decode.host import to_host_with
from bpkit.decode.text import counts
from bpkit.types import ON_THE_HOST, Context, Draft, Feature


class Proposed:
    """What was proposed so far: whole blocks at once, or token after token.

    Attributes:
        width: positions so far, of the row that has most.
    """

    def __init__(
        self,
        context: Context,
        block_size: Tensor,
        source: Tensor,
        wants: frozenset[Feature],
        policy: GuardedPolicy,
        device: torch.device,
    ) -> None:
        self.context, self.block_size, self.wants, self.policy = context, block_size, wants, policy
        self.source, self.device = source, device
        self.width = 0
        self._lengths = [0] * context.batch_size
        self._tokens: list[Tensor] = []
        self._features: list[dict[Feature, Tensor]] = []
        self._predictions: list[dict[str, Tensor] | None] = []

    def add(self, proposal: Proposal) -> None:
        """Take in further tokens; if the policy wants anything of them, read it from the device in one copy."""
        width = proposal.tokens.shape[1]
        if width == 0 and self._tokens:
            return
        features = draft_features(proposal, self.wants)
        for name in features.keys() - ON_THE_HOST:  # networks are with the target
            features[name] = features[name].to(self.device)
        # Networks need not take a draft of no tokens.
        predictions = self.policy.predict(features) if width else None
        _, features, predictions = to_host_with((), features, predictions)
        self._tokens.append(proposal.tokens)
        self._features.append(features)
        self._predictions.append(predictions)
        self.width += width
        self._lengths = [length + count for length, count in zip(self._lengths, proposal.counts, strict=True)]

    def draft(self) -> Draft:
        """All of it, as the policy sees it."""
        predictions = [part for part in self._predictions if part is not None]
        whole = len(predictions) == len(self._predictions)
        return Draft(
            self.context,
            self.block_size,
            counts(self._lengths),
            _joined(self._tokens),
            features={name: _joined([part[name] for part in self._features]) for name in self._features[0]},
            predictions={name: _joined([p[name] for p in predictions]) for name in predictions[0]} if whole else None,
            source=self.source,
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
