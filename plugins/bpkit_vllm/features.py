"""Features of a step as the worker sent them, and how rows find theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bpkit.types import Feature

ATTRIBUTE = "bpkit_features"
"""Of vLLM's `DraftTokenIds`: arrays by the name of a feature, first axis as its `req_ids`."""


class StepFeatures:
    """Of the requests that took part in a step.

    Args:
        request_ids: in the order of the arrays. arrays: by feature, [requests, ...].
    """

    def __init__(self, request_ids: Sequence[str], arrays: Mapping[str, Any]) -> None:
        self.place = dict(zip(request_ids, range(len(request_ids)), strict=True))
        self.arrays = arrays

    @classmethod
    def none(cls) -> Self:
        """Of no request."""
        return cls((), {})

    @classmethod
    def sent_with(cls, drafts: Any) -> Self | None:
        """What came with vLLM's draft tokens, if anything did."""
        arrays = getattr(drafts, ATTRIBUTE, None)
        return cls(drafts.req_ids, arrays) if arrays else None

    def of_target(self, request_ids: Sequence[str], names: Collection[Feature]) -> dict[Feature, Tensor]:
        """Features of the last token of each request, [requests, ...]; NaN of a request that is not known."""
        return {name: self._rows(self.arrays[name], request_ids) for name in names if name in self.arrays}

    def of_draft(
        self, requests: Sequence[Any], request_ids: Sequence[str], length: Sequence[int], names: Collection[Feature]
    ) -> dict[Feature, Tensor]:
        """Features of drafted tokens, [requests, longest draft].

        Args:
            requests: vLLM's, which hold the tokens; and their ids.
            length: drafted tokens of each.
        """
        width, found = max(length), dict[Feature, Tensor]()
        for name in names:
            if name is Feature.DRAFT_TOKENS:
                tokens = [request.spec_token_ids for request in requests]
                padded = [[*row[:count], *[0] * (width - count)] for row, count in zip(tokens, length, strict=True)]
                found[name] = torch.tensor(padded)
            elif name in self.arrays:
                found[name] = self._rows(self.arrays[name], request_ids)[:, :width]
        return found

    def _rows(self, array: Any, request_ids: Sequence[str]) -> Tensor:
        places = [self.place.get(name, -1) for name in request_ids]
        if -1 not in places:
            return torch.from_numpy(array[places])
        rows = np.full((len(places), *array.shape[1:]), np.nan, array.dtype)
        known = [i for i, place in enumerate(places) if place >= 0]
        rows[known] = array[[places[i] for i in known]]
        return torch.from_numpy(rows)
