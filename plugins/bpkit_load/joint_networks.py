"""The decisions of `joint` as networks, for files: the rule of `PositionPrices.best`, and the counts it goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bpkit.export.core import Core, Port, decision, following, given, margin
from bpkit.export.graph import count
from bpkit.export.position_costs import widths_of
from bpkit_load.confidence import BOUNDS, KEPT, SUREST, WEIGHT, ConfidenceCounts
from bpkit_load.positions import LEAST

ROW_RANGES = 16
"""Ranges of the number of rows that have a rate of their own: 1, 2-3, 4-7, ..."""
RATES = Port("rates", (ROW_RANGES, 2), "float32", "tokens and seconds of the last steps with 1, 2-3, 4-7, ... rows")
RATE = Port("rate", (1,), "float32", "tokens that a second is worth")
DRAFTING = Port("drafting", (1,), "float32", "seconds of the draft, 0 without one")
SECONDS = Port("seconds", (1,), "float32", "of the step")


@dataclass(frozen=True)
class JointFacts:
    """What the networks are made from.

    Attributes:
        config: of the policy. sizes: block sizes from 2 on, ascending. snapped: block size of 0, 1, ... drafted tokens.
        counts: names of counts by position that decisions go by, in pairs. priors: of each pair's chances.
        newcomers: share of steps in which a row is new, at first, and the weight of a step in it.
        confidence: None where drafts are verified whole.
    """

    config: Any
    sizes: list[int]
    snapped: list[int]
    counts: tuple[str, ...]
    priors: tuple[float, ...]
    newcomers: tuple[float, float]
    confidence: ConfidenceCounts | None

    @property
    def width(self) -> int:
        """Longest draft."""
        return self.sizes[-1] - 1


def running_product(values: Tensor) -> Tensor:
    """Product of a row up to each place, [batch, width]. By doubling, so that equal rows stay equal."""
    reach = 1
    while reach < values.shape[1]:
        ones = torch.ones_like(values[:, :reach])
        values = values * torch.cat([ones, values[:, :-reach]], dim=1)
        reach *= 2
    return values


class LikeliestPositions(nn.Module):
    """The likeliest positions of all rows first, and what the first 0, 1, ... of them yield and cost by width.

    Args:
        widths: padded widths of a pass that are compared, from 1. width: longest draft.
    """

    widths: Tensor
    none: Tensor

    def __init__(self, widths: list[int], width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("widths", torch.tensor(widths))
        self.register_buffer("none", torch.zeros(len(widths), 1))

    def forward(self, survival: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Chances and places of the likeliest positions first, float64 and int64 [count]; which fit in a width, bool
        [widths, count]; and tokens and positions of the first 0, 1, ..., float64 and int64 [widths, 1 + count].

        Args:
            survival: float64 [batch, width].
        """
        chances, order = torch.sort(survival.reshape(-1), descending=True)  # of equals the first first
        within = ((order % self.width)[None] < (self.widths - 1)[:, None]) & (chances > LEAST)[None]
        tokens = torch.cat([self.none.double(), torch.where(within, chances[None], 0.0)], dim=1).cumsum(dim=1)
        counts = torch.cat([self.none.long(), torch.where(within, 1, 0)], dim=1).cumsum(dim=1)
        return chances, order, within, tokens, counts

    def price(self, prices: Tensor, counts: Tensor) -> Tensor:
        """Of so many positions, float64 [widths, any], in a table [widths, positions]; infinite of more than it has."""
        most = count(prices[0] >= 0) - 1
        return torch.where(counts <= most, prices.gather(1, torch.minimum(counts, most)), torch.inf)

    def chosen(self, likeliest: tuple[Tensor, ...], gains: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The best of them, as `PositionPrices.best`.

        Args:
            likeliest: what `forward` gives.
            gains: tokens less what their time is worth, float64 [widths, 1 + count].

        Returns:
            Positions of each row, int64 [batch]; the place of the width, and positions of all rows, int64 []; how clear
            the choice is, float64 []: how far ahead of the next that is another, or what it takes of what it leaves;
            and the places of the choice and the next best in `gains`, int64 [2].
        """
        chances, order, within, tokens, counts = likeliest
        flat, ranks = gains.reshape(-1), count(tokens[0] >= 0)
        place = flat.argmax(dim=0)
        choice, last = place // ranks, place % ranks
        inside = within[choice]
        taken = inside & (torch.where(chances >= 0, 1, 0).cumsum(dim=0) <= last)
        rows = torch.where(chances >= 0, 0, 0).scatter(0, order, torch.where(taken, 1, 0))
        same = ((tokens - tokens[choice, last]).abs() < 1e-9) & (counts == counts[choice, last])
        others = torch.where(same, -torch.inf, gains).reshape(-1)
        apart = torch.where(taken, chances, 1.0).min() - torch.where(inside & ~taken, chances, 0.0).max()
        clear = torch.minimum(flat.max() - others.max(), apart).clamp(max=1.0)
        near = torch.stack([place, others.argmax(dim=0)])
        return rows.reshape(-1, self.width).sum(dim=1), choice, counts[choice, last], clear, near


class JointSelection(nn.Module):
    """`select` of a bound `joint`."""

    snapped: Tensor
    before: Tensor
    widths: Tensor
    rows: Tensor

    def __init__(self, facts: JointFacts, widths: list[int]) -> None:
        super().__init__()
        self.facts = facts
        self.likeliest = LikeliestPositions(widths, facts.width)
        self.register_buffer("snapped", torch.tensor(facts.snapped))
        self.register_buffer("before", torch.tril(torch.ones(facts.width, facts.width)) > 0)
        self.register_buffer("widths", torch.tensor(widths))
        self.register_buffer("rows", 2 ** torch.arange(ROW_RANGES))

    def chances(self, hits: Tensor, tries: Tensor, pool: Tensor, prior: float) -> Tensor:
        """As `Joint.chances`: float64 [batch, width], of the counts of rows and of all rows [2, width].

        A rate leans on the one before it, a line through what came before: rate_k = own_k + lean_k rate_(k-1).
        """
        weight, leaned = self.facts.config.weight, self.facts.config.prior_weight
        logs = (leaned / (pool[1] + leaned)).log().cumsum(dim=0)
        leans = torch.where(self.before, logs[:, None] - logs[None], -torch.inf).exp()
        own = pool[0] / (pool[1] + leaned)
        rates = (leans * own[None]).sum(dim=1) + prior * logs.exp()
        return running_product((hits.double() + weight * rates) / (tries.double() + weight))

    def forward(
        self,
        position: Tensor,
        pool: Tensor,
        rates: Tensor,
        newcomers: Tensor,
        catch_up: Tensor,
        draft_prices: Tensor,
        verify_prices: Tensor,
        accepted: Tensor,
        tested: Tensor,
        kept: Tensor | None = None,
        offered: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`block_size`, `rate`, `drafting`, `seconds`, `next_newcomers`, `margin`."""
        first, pace = self.facts.newcomers
        newcomers = newcomers + pace * (torch.where(position == 1, 1.0, 0.0).max() - first - newcomers)
        catch_up, verify_prices, pool = catch_up.double(), verify_prices.double(), pool.double()
        now, usual = catch_up[:1], catch_up[1:]
        before = usual + (now - usual).clamp(min=0) * (newcomers + first).double()
        draft_prices = draft_prices.double() + torch.where(self.widths > 1, before, 0.0)[:, None]
        likeliest = self.likeliest(self.chances(accepted, tested, pool[:2], self.facts.priors[0]))
        _, order, within, tokens, counts = likeliest
        draft, verify = self.likeliest.price(draft_prices, counts), self.likeliest.price(verify_prices, counts)
        rate = self.rate(count(position > 0), rates.double(), tokens, draft + verify)
        rounding = torch.full_like(tokens, 0.5)
        if kept is not None and offered is not None:
            chances = self.chances(kept, offered, pool[2:], self.facts.priors[1]).reshape(-1)[order]
            mean = torch.cat([torch.zeros_like(tokens[:, :1]), torch.where(within, chances[None], 0.0)], dim=1).cumsum(
                1
            )
            verified = mean.round()
            rounding = 0.5 - (mean - verified).abs()
            verify = self.likeliest.price(verify_prices, torch.where(mean >= 0, verified, 0.0).long())
        drafted, choice, taken, clear, near = self.likeliest.chosen(likeliest, tokens - rate * (verify + draft))
        verifying = verify_prices[choice, taken]
        drafting = torch.where(taken > 0, draft_prices[choice, taken] - before + now, 0.0)
        clear = torch.minimum(clear, rounding.reshape(-1)[near].min())
        return (
            self.snapped[drafted],
            rate.float(),
            drafting.float(),
            (drafting + verifying).float(),
            newcomers,
            clear.float().expand(position.shape[0]),
        )

    def rate(self, rows: Tensor, rates: Tensor, tokens: Tensor, seconds: Tensor) -> Tensor:
        """What a second is worth, float64 [1]: of the last steps with about as many rows, or the best of this one."""
        yielded, spent = rates[count(rows >= self.rows) - 1]
        best = ((rows + tokens) / seconds).max()
        return torch.where(spent > 0, yielded / spent.clamp(min=1e-30), best)[None]


class JointTruncation(nn.Module):
    """`truncate` of a bound `joint`."""

    bounds: Tensor
    places: Tensor
    nothing: Tensor

    def __init__(self, facts: JointFacts, widths: list[int]) -> None:
        super().__init__()
        assert facts.confidence is not None
        self.width = facts.width
        self.likeliest = LikeliestPositions(widths, facts.width)
        self.chances = CalibratedChances(facts.confidence)
        self.register_buffer("bounds", torch.tensor(BOUNDS, dtype=torch.float64))
        self.register_buffer("places", torch.arange(facts.width))
        self.register_buffer("nothing", torch.zeros(1, facts.width))

    def forward(
        self,
        probability: Tensor,
        draft_length: Tensor,
        odds: Tensor,
        counts: Tensor,
        rate: Tensor,
        drafting: Tensor,
        prices: Tensor,
    ) -> tuple[Tensor, ...]:
        """`verify_length`, `seconds`, `confidence_range`, `margin`."""
        nothing = self.nothing.expand(draft_length.shape[0], self.width)
        padded = torch.cat([probability, nothing], dim=1)[:, : self.width].double()
        ranges = count(padded[..., None] >= self.bounds)
        there = self.places < draft_length[:, None]
        accepted, expected, tested = odds.double()[..., None].unbind(dim=1)
        share = torch.where(tested > 0, expected / tested.clamp(min=1e-30), 0.5)
        stands = (accepted + WEIGHT * share) / (expected + WEIGHT * share)
        falls = (tested - accepted + WEIGHT * (1 - share)) / (tested - expected + WEIGHT * (1 - share))
        shift = stands / falls
        chance = self.chances(counts.double(), ranges)
        chance = chance * shift / (1 - chance + chance * shift)
        survival = running_product(torch.where(there, chance, 0.0))
        prices = prices.double()
        likeliest = self.likeliest(survival)
        *_, tokens, positions = likeliest
        gains = tokens - rate.double() * self.likeliest.price(prices, positions)
        kept, choice, taken, clear, _ = self.likeliest.chosen(likeliest, gains)
        seconds = drafting.double() + prices[choice, taken]
        return (
            kept,
            seconds.float(),
            torch.where(there, ranges + 1, 0).float(),
            clear.float().expand(draft_length.shape[0]),
        )


class CalibratedChances(nn.Module):
    """`ConfidenceCounts.chances` of drafted tokens."""

    expected: Tensor
    first: Tensor

    def __init__(self, confidence: ConfidenceCounts) -> None:
        super().__init__()
        self.register_buffer("expected", torch.tensor(confidence.expected))
        self.register_buffer("first", torch.tensor(confidence.depth * (len(BOUNDS) + 1)))

    def forward(self, counts: Tensor, ranges: Tensor) -> Tensor:
        """float64 [batch, width], of counts float64 [2, depths, ranges] and ranges int64 [batch, width]."""
        accepted, tested = counts
        broad = (accepted.sum(dim=0) + WEIGHT * self.expected) / (tested.sum(dim=0) + WEIGHT)
        chances = ((accepted + WEIGHT * broad) / (tested + WEIGHT)).clamp(max=SUREST)
        of_tokens: Tensor = chances.reshape(-1)[self.first + ranges]
        return of_tokens


class JointObservation(nn.Module):
    """`observe` of a bound `joint`."""

    places: Tensor
    rows: Tensor
    nothing: Tensor

    def __init__(self, facts: JointFacts) -> None:
        super().__init__()
        self.config, self.counts = facts.config, len(facts.counts)
        self.register_buffer("places", torch.arange(facts.width))
        self.register_buffer("rows", 2 ** torch.arange(ROW_RANGES))
        if facts.confidence is not None:
            self.chances = CalibratedChances(facts.confidence)
            self.register_buffer("nothing", torch.zeros(facts.confidence.accepted.size))

    def forward(
        self,
        num_accepted: Tensor,
        verify_length: Tensor,
        draft_length: Tensor,
        pool: Tensor,
        rates: Tensor,
        seconds: Tensor,
        accepted: Tensor,
        tested: Tensor,
        kept: Tensor | None = None,
        offered: Tensor | None = None,
        ranges: Tensor | None = None,
        odds: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The same after the step, without `seconds`: `pool`, `rates`, `accepted`, ..."""
        config, known = self.config, [accepted, tested]
        ends = [num_accepted, torch.minimum(num_accepted + 1, draft_length)]
        if kept is not None and offered is not None:
            known += [kept, offered]
            ends += [verify_length, torch.minimum(verify_length + 1, draft_length)]
        counted = [self.before(end) for end in ends]
        rows = count(num_accepted >= 0)
        now = (self.rows == self.rows[count(rows >= self.rows) - 1])[:, None]
        yielded = torch.cat([(num_accepted.sum() + rows)[None].float(), seconds])
        learned = (
            pool * config.pool_discount + torch.stack([each.sum(dim=0) for each in counted]),
            torch.where(now, rates * config.rate_discount + yielded, rates),
            *(before * config.discount + each for before, each in zip(known, counted, strict=True)),
        )
        if ranges is None or odds is None or counts is None:
            return learned
        looked = self.before(torch.minimum(num_accepted + 1, verify_length))
        return learned + self.calibrated(counted[0], looked, ranges, odds, counts)

    def before(self, end: Tensor) -> Tensor:
        """1 at the positions before an end int64 [batch], else 0: float32 [batch, width]."""
        return torch.where(self.places < end[:, None], 1.0, 0.0)

    def calibrated(
        self, stood: Tensor, looked: Tensor, ranges: Tensor, odds: Tensor, counts: Tensor
    ) -> tuple[Tensor, ...]:
        """As `ConfidenceCounts.observe`: `confidence_range`, `odds`, `confidence_counts`."""
        known = torch.where(ranges > 0, looked, 0.0)
        place = (ranges - 1).clamp(min=0).long()
        expected = (self.chances(counts.double(), place) * known).sum(dim=1)
        stood = stood * known
        row = torch.stack([stood.sum(dim=1), expected.float(), known.sum(dim=1)], dim=1)
        flat = (self.chances.first + place).reshape(-1)
        added = [self.nothing.scatter_add(0, flat, values.reshape(-1)) for values in (stood, known)]
        kept = torch.where(known.sum() > 0, KEPT, 1.0)
        return ranges * 0, odds * self.config.discount + row, counts * kept + torch.stack(added).reshape(counts.shape)


COUNTED = {
    "accepted": "drafted tokens of this row that stood, by place in the draft, fading",
    "tested": "those of which all before them stood",
    "kept": "drafted tokens of this row that were verified, likewise",
    "offered": "those of which all before them were",
}


def cores(facts: JointFacts) -> dict[str, Core]:
    """Of a bound policy, by file stem."""
    widths, width = widths_of(facts.sizes).tolist(), facts.width
    draft, verify = given("joint_draft_seconds", len(widths)), given("joint_verify_seconds", len(widths))
    counts = tuple(Port(name, ("batch", width), "float32", COUNTED[name]) for name in facts.counts)
    pool = Port("pool", (len(counts), width), "float32", f"{', '.join(facts.counts)} of all rows")
    newcomers = Port("newcomers", (1,), "float32", "share of steps in which a row is new, less its first guess")
    clear = margin("the least of how far the choice is ahead of another, in tokens, and chances at the cut are apart")
    found = {
        "select": Core(
            "select",
            JointSelection(facts, widths),
            (given("position"), pool, RATES, newcomers, given("catch_up_seconds"), draft, verify, *counts),
            (decision("select"), RATE, DRAFTING, SECONDS, following(newcomers), clear),
        )
    }
    learned = (pool, RATES, *counts)
    confidence: tuple[Port, ...] = ()
    if facts.confidence is not None:
        ranges = Port("confidence_range", ("batch", width), "float32", "of each drafted token's probability, from 1")
        odds = Port("odds", ("batch", 3), "float32", "accepted, expected and tested tokens of this row")
        of_all = Port(
            "confidence_counts", (2, *facts.confidence.shape), "float32", "accepted, tested by place and probability"
        )
        confidence = (ranges, odds, of_all)
        found["truncate"] = Core(
            "truncate",
            JointTruncation(facts, widths),
            (given("draft_probability"), given("draft_length"), odds, of_all, RATE, DRAFTING, verify),
            (decision("truncate"), SECONDS, ranges, clear),
        )
    found["observe"] = Core(
        "observe",
        JointObservation(facts),
        (*map(given, ("num_accepted", "verify_length", "draft_length")), pool, RATES, SECONDS, *counts, *confidence),
        tuple(map(following, (*learned, *confidence))),
        margin="",
    )
    return found
