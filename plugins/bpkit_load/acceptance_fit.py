"""The chance that a drafted token stands, by the drafter's probability of it: a logistic curve that serving fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FIRST_BIAS = 1.5
"""Log-odds that are expected of any token before the first fit, as in vLLM: a chance of 0.82."""
FEWEST, RIDGE = 50, 1e-3
"""Tokens of a position that a fit needs, and what is added to its information, as in vLLM."""
SUREST = 1e-6
"""Probabilities are kept so far from 0 and 1, so that their odds are finite."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class AcceptanceFit(BaseModel):
    """For position i of a draft, chance = sigmoid(weight_i log(q / (1 - q)) + bias_i), q the drafter's probability.

    Every few steps each position takes one Newton step of logistic regression on what was tested since the last. A fit
    on few tokens, or one by which a surer drafter is right less often, is not taken. This is how vLLM estimates
    acceptance for drafters without a confidence head (pull request 52228).

    Attributes:
        weight, bias: by position.
        information: of each position, sums over tested tokens of p (1 - p) times x x, x and 1, x the log-odds.
        gradient: sums of (stood - p) times x and 1. tested: tokens in these sums.
        steps: in these sums. fits: so far.
    """

    model_config = ConfigDict(extra="forbid")

    weight: list[Finite]
    bias: list[Finite]
    information: list[tuple[Finite, Finite, Finite]]
    gradient: list[tuple[Finite, Finite]]
    tested: list[Annotated[int, Field(ge=0)]]
    steps: Annotated[int, Field(ge=0)] = 0
    fits: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def fresh(cls, width: int) -> AcceptanceFit:
        """Of so many positions, before anything is known."""
        return cls(
            weight=[0.0] * width,
            bias=[FIRST_BIAS] * width,
            information=[(0.0, 0.0, 0.0)] * width,
            gradient=[(0.0, 0.0)] * width,
            tested=[0] * width,
        )

    def chances(self, odds: Floats) -> Floats:
        """Chance that each token stands if all before it do, from log-odds: float64 [batch, width] both."""
        import numpy as np  # here, so that options can be listed without it

        found: Floats = 1 / (1 + np.exp(-(odds * self.weight + self.bias)))
        return found

    def add(self, odds: Floats, stood: NDArray[np.bool_], tested: NDArray[np.bool_]) -> None:
        """Count the tokens of a step: bool [batch, width], whether each stands and whether it was tested."""
        import numpy as np  # here, so that options can be listed without it

        chance = self.chances(odds)
        spread, wrong = chance * (1 - chance) * tested, (stood - chance) * tested
        information = np.stack(((spread * odds * odds).sum(0), (spread * odds).sum(0), spread.sum(0)), axis=-1)
        gradient = np.stack(((wrong * odds).sum(0), wrong.sum(0)), axis=-1)
        self.information = [*map(tuple, (information + self.information).tolist())]
        self.gradient = [*map(tuple, (gradient + self.gradient).tolist())]
        self.tested = (tested.sum(0) + self.tested).tolist()
        self.steps += 1

    def fit(self) -> None:
        """Take one Newton step from what was counted, and count anew."""
        for place, ((xx, x, one), (by_x, by_one)) in enumerate(zip(self.information, self.gradient, strict=True)):
            xx, one = xx + RIDGE, one + RIDGE
            determinant = xx * one - x * x
            weight = self.weight[place] + (one * by_x - x * by_one) / determinant
            if self.tested[place] >= FEWEST and weight >= 0:
                self.weight[place], self.bias[place] = weight, self.bias[place] + (xx * by_one - x * by_x) / determinant
        fresh = self.fresh(len(self.weight))
        self.information, self.gradient, self.tested = fresh.information, fresh.gradient, fresh.tested
        self.steps, self.fits = 0, self.fits + 1


def log_odds(probability: Floats, width: int) -> Floats:
    """log(q / (1 - q)) of a draft's first tokens, 0 where there are none or q is not known: float64 [batch, width]."""
    import numpy as np  # here, so that options can be listed without it

    found = np.zeros((len(probability), width))
    q = np.clip(np.nan_to_num(probability[:, :width].astype(np.float64), nan=0.5), SUREST, 1 - SUREST)
    found[:, : q.shape[1]] = np.log(q / (1 - q))
    return found
