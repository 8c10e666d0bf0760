"""What a measured table says of how it was measured, and how well each figure is known."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Cell(BaseModel):
    """How well one figure of a measured table is known.

    Attributes:
        phase, size: as in `CostModel.seconds`; `rest` has size 1.
        context_length: mean of the samples', or None where all context lengths are taken together.
        count: samples.
        seconds: 10% trimmed mean. standard_error: of it, in seconds.
        variation: coefficient of variation of the samples (standard deviation / mean), outliers included.
        quartiles: 25th and 75th percentile of the samples, in seconds; None for differences of two means.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    phase: str
    size: int
    context_length: int | None = None
    count: int
    seconds: float
    standard_error: float | None
    variation: float | None = None
    quartiles: tuple[float, float] | None = None

    @property
    def spread(self) -> float:
        """Standard error as a share of the figure; infinite where it is not known."""
        if self.standard_error is None or not self.seconds:
            return float("inf")
        return self.standard_error / abs(self.seconds)


class Measured(BaseModel):
    """What a measured table was measured on, and how.

    Attributes:
        machine: processor, cores, GPU, versions, load average before measuring.
        threads: of torch. dtype: of the target.
        options: of generation.
        started: UTC. seconds: that the measuring took.
        steps, prompts, rounds: that were measured; a round goes over all prompts.
        ended: why measuring ended.
        worst_spread: largest relative standard error of the figures that were waited for.
        modelled_over_measured: the table's price of all measured steps, over the time that they took.
        drift: how much slower than the table's price the second half of the steps was than the first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    drafter: str
    drafter_kind: str
    device: str
    machine: dict[str, str | int | float | None]
    threads: int
    dtype: str
    rule: str
    options: dict[str, Any]
    command: str | None
    started: str
    seconds: float
    steps: int
    prompts: int
    rounds: int
    ended: str
    worst_spread: float
    modelled_over_measured: float
    drift: float
