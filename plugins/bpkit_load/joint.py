"""One budget over all rows: block sizes by what rows accept, verified widths by calibrated confidences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError

from bpkit.export.prices import priced
from bpkit.files import faults
from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.sizes import BlockSizesWithNoDraft
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step
from bpkit_load.joint_memory import JointMemory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from bpkit.export.core import Export
    from bpkit_load.confidence import ConfidenceCounts
    from bpkit_load.positions import PositionPrices

    Floats = NDArray[np.float64]

COUNTS = ("accepted", "tested", "kept", "offered")
"""What is counted by position in the draft: tokens that stand, of those that such reach; tokens that are verified, of
those that such reach."""
SURELY = 1.0
"""That a token is verified, before any was left out."""
FEW = 0.02
"""Rows that join in a step, up to which their prompts do not count."""
USUAL = 3
"""Positions that wait for a draft where no row is new, at most."""
FIRST_NEWCOMERS, NEWCOMERS = 0.05, 0.02
"""Share of steps in which a row is new, at first, and the weight of a step in it."""


class JointConfig(PolicyConfig):
    """Options of `joint`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "confidences": (False, True),
        "discount": (0.8, 0.9, 0.95),
        "weight": (2.0, 4.0, 8.0),
    }

    block_sizes: BlockSizesWithNoDraft = Field(
        default=tuple(range(1, 17)), description="sizes to choose from: a list, or text such as 1-8+16; 1 is always one"
    )
    confidences: bool = Field(default=True, description="choose widths by the drafter's probabilities, if it has some")
    discount: float = Field(default=0.9, gt=0, le=1, description="weight of a row's past after each of its steps")
    weight: float = Field(default=4.0, gt=0, description="drafted tokens that what all rows accept counts for in one")
    pool_discount: float = Field(default=0.99, gt=0, lt=1, description="weight of what all rows accepted, likewise")
    prior: float = Field(default=0.7, gt=0, lt=1, description="acceptance rate to expect before any is seen")
    prior_weight: float = Field(default=6.0, gt=0, description="drafted tokens that the prior counts for")
    rate_discount: float = Field(default=0.95, ge=0, lt=1, description="weight of the past in tokens per second")
    slope: float = Field(
        default=0.05, ge=0, description="cost of a further position, in plain steps, where there is no cost model"
    )


class Joint(Policy):
    """Drafts and verifies the positions of all rows that are worth their time.

    A step takes the positions with the highest chances of being reached, of all rows together, as far as they pay:

        argmax over widths w and counts m of   sum of the m highest S_rk with k < w  -  rate * seconds(w, m)

    S_rk is the chance that the first k tokens of row r's draft stand. `rate` is what a second is worth: the tokens per
    second of the last steps with about as many rows, by the prices below. `seconds` is the cost model's price of a step
    of so many rows, as wide as the widest of them, with m drafted tokens.

    - `select`, before the draft: S_rk is the product of the row's own acceptance rates by position. They are of
      discounted counts that lean on those of all rows, which lean on the position before and, at the first, on `prior`.
      Where drafts are cut short by `truncate`, a token that was left out does not stand, and the target's pass is
      priced by the positions that are verified in the mean, by rates of the same kind.
      The price has the draft in it, and what it must catch up with: the prompt of a row that joined counts in the share
      of steps in which one joins, because not to draft now only puts it off. A row without a position drafts nothing.
    - `truncate`, after it: S_rk is the product of the drafter's probabilities, calibrated by counts
      (`ConfidenceCounts`), and the price is that of verifying.

    Where the cost model's engine reads prompts in the same passes (`mixes_prompts`), the price of a pass is its mean
    over the numbers of prompts that join, and what they add is not counted in the rate.
    """

    Config = JointConfig
    wants = frozenset()
    joint = True
    config: JointConfig
    pool: Floats
    confidence: ConfidenceCounts
    newcomers: float
    rates: dict[int, tuple[float, float]]

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        if self.config.confidences:
            self.wants_optional = frozenset({Feature.DRAFT_PROBABILITY})  # type: ignore[misc]

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        import numpy as np

        from bpkit.export.position_costs import KeptCosts
        from bpkit_load.positions import PositionPrices

        self.cost, self.work = cost, decoder.work
        self.sizes = priced(cost, (size for size in self.config.block_sizes if size <= decoder.max_block_size))
        self.width = max(self.sizes, default=1) - 1
        self.snapped = np.array([1, *(min(b for b in self.sizes if b > length) for length in range(1, self.width + 1))])
        self._places = np.arange(self.width)
        self.mixes = getattr(cost, "mixes_prompts", False)
        self.forget()
        self._rate, self._drafting, self._seconds = 0.0, 0.0, 0.0
        self.costs = KeptCosts(
            PositionPrices, cost, self.sizes, features=bool(self.wants_optional), slope=self.config.slope
        )

    # Decisions

    def begin(self, context: Context) -> State:
        like, rows = context.position, context.batch_size
        first = [self.work.first(length - 1) for length in context.context_length.tolist()]
        state = {"counts": like.new_zeros(rows, len(COUNTS), self.width).double(), "waiting": like.new_tensor(first)}
        return {**state, **self.confidence.begin(context)}

    def select(self, state: State, context: Context) -> Tensor:
        lengths = context.context_length.numpy()
        self._note_newcomers(context.position.numpy() == 1, lengths)
        if not self.sizes:
            return context.full(1)
        prices = self.prices(len(lengths), int(lengths.max()))
        survival, kept = self.chances(state)
        waiting = int(state["waiting"].numpy().max())
        catch_up, usual = prices.catch_up(waiting), prices.catch_up(min(waiting, USUAL))
        before = usual + max(0.0, catch_up - usual) * self.newcomers
        rate = self.rate(len(lengths), prices, survival, before)
        chosen = prices.best(survival, rate, before=before, kept=kept)
        self._rate = rate
        self._drafting = chosen.drafting - before + catch_up if chosen.width > 1 else 0.0
        self._seconds = self._drafting + chosen.seconds
        return context.position.new_tensor(self.snapped[chosen.counts])

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if Feature.DRAFT_PROBABILITY not in draft.features or not self.config.confidences:
            return draft.draft_length
        probability = draft[Feature.DRAFT_PROBABILITY].numpy()
        survival = self.confidence.survival(state, probability, draft.draft_length.numpy())
        # Of the rows that are there now: in engines that plan ahead, some may have ended since `select`.
        chosen = self.prices(len(survival), int(draft.context.context_length.numpy().max())).best(survival, self._rate)
        self._seconds = self._drafting + chosen.seconds
        return draft.draft_length.new_tensor(chosen.counts)

    def chances(self, state: State) -> tuple[Floats, Floats | None]:
        """That the first k tokens of a draft stand and are verified, and that they are verified: [rows, longest draft].

        The second is None where drafts are not cut short.
        """
        import numpy as np

        counts, weight = state["counts"].numpy(), self.config.weight
        pairs, priors = (slice(0, 4, 2), slice(1, 4, 2)), [self.config.prior, SURELY]
        if not self.wants_optional:
            pairs, priors = (slice(0, 1), slice(1, 2)), priors[:1]
        rates = [self._pooled(2 * place, prior) for place, prior in enumerate(priors)]
        own = (counts[:, pairs[0]] + weight * np.array(rates)) / (counts[:, pairs[1]] + weight)
        chances = np.cumprod(own, axis=2)
        return chances[:, 0], chances[:, 1] if len(rates) > 1 else None

    def _pooled(self, place: int, rate: float) -> list[float]:
        """Rates of all rows by position: hits in this row of the pool, tries in the next."""
        weight, found = self.config.prior_weight, []
        for hits, tries in zip(*self.pool[place : place + 2].tolist(), strict=True):
            rate = (hits + weight * rate) / (tries + weight)
            found.append(rate)
        return found

    def rate(self, rows: int, prices: PositionPrices, survival: Floats, before: float) -> float:
        """What a second is worth: tokens per second lately, with about as many rows."""
        tokens, seconds = self.rates.get(rows.bit_length(), (0.0, 0.0))
        return tokens / seconds if seconds > 0 else prices.best_rate(survival, before=before)

    def prices(self, rows: int, context_length: int) -> PositionPrices:
        """What steps of so many rows cost."""
        beside = 0.0, 0
        if self.joined > FEW:  # in steps of a fifth, so that prices are not made again and again
            beside = 2 ** (round(4 * math.log2(self.joined)) / 4), round(self.prompts / self.joined / 32) * 32
        return self.costs.of(rows, context_length, beside)

    def _note_newcomers(self, new: Any, lengths: Any) -> None:
        """Note which rows are new, bool [rows], and their tokens."""
        count = int(new.sum())
        self.newcomers += NEWCOMERS * ((count > 0) - self.newcomers)
        if self.mixes:
            self.joined += NEWCOMERS * (count - self.joined)
            self.prompts += NEWCOMERS * ((int(lengths[new].sum()) if count else 0) - self.prompts)

    # Learning

    def observe(self, state: State, step: Step) -> None:
        import numpy as np

        if not self.sizes:
            return
        accepted, verified, drafted = (
            counts.numpy() for counts in (step.num_accepted, step.verify_length, step.draft_length)
        )
        tested, offered = np.minimum(accepted + 1, drafted), np.minimum(verified + 1, drafted)
        counted = self._places < np.array([accepted, tested, verified, offered]).T[:, :, None]
        counts = state["counts"].numpy()
        counts *= self.config.discount
        counts += counted
        self.pool *= self.config.pool_discount
        self.pool += counted.sum(axis=0)
        self.confidence.observe(state, counted[:, 0], counted[:, 1] & counted[:, 2])
        self._count_rate(len(accepted), float(accepted.sum()))
        waiting = state["waiting"].numpy()
        if drafted.any():  # rows that do not draft are read along
            waiting[:] = accepted + 1 if self.work.reads == "features" else int(self.work.waits)
        elif self.work.waits:
            waiting += 1

    def _count_rate(self, rows: int, accepted: float) -> None:
        tokens, seconds = self.rates.get(rows.bit_length(), (0.0, 0.0))
        kept = self.config.rate_discount
        self.rates[rows.bit_length()] = kept * tokens + accepted + rows, kept * seconds + self._seconds

    # Memory

    def state_dict(self) -> dict[str, Any]:
        """What all rows taught, as plain JSON values; empty if nothing was learned."""
        if not self.rates:
            return {}
        counted = self.confidence
        return JointMemory(
            pool=self.pool.tolist(),
            accepted=counted.accepted.tolist(),
            tested=counted.tested.tolist(),
            newcomers=self.newcomers,
            joined=self.joined,
            prompts=self.prompts,
            rates=self.rates,
        ).model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. Raises PolicyError if it is of other sizes; the memory then stays."""
        import numpy as np

        if not state:
            self.forget()
            return
        try:
            known = JointMemory.model_validate(state)
            tables = [np.array(table, np.float64) for table in (known.pool, known.accepted, known.tested)]
        except (ValidationError, ValueError) as error:
            why = faults(error) if isinstance(error, ValidationError) else error
            raise PolicyError(f"this is no memory of Joint ({why})") from None
        shapes = [self.pool.shape, self.confidence.shape, self.confidence.shape]
        if [table.shape for table in tables] != shapes:
            raise PolicyError(
                f"this is no memory of this Joint: counts of {tables[0].shape[-1]} positions, where its sizes need "
                f"{self.width}; bind it with the sizes that it learned with"
            )
        self.pool, *counts = tables
        self.confidence.take(*counts)
        self.newcomers, self.joined, self.prompts, self.rates = (
            known.newcomers,
            known.joined,
            known.prompts,
            dict(known.rates),
        )

    def forget(self) -> None:
        """Know what is known before the first request."""
        import numpy as np

        from bpkit_load.confidence import ConfidenceCounts

        self.pool = np.zeros((len(COUNTS), self.width))
        self.confidence = ConfidenceCounts(self.width, self.config.discount)
        self.newcomers, self.joined, self.prompts = FIRST_NEWCOMERS, 0.0, 0.0
        self.rates = {}

    # Export

    def export(self) -> Export:
        """`select`, `truncate` if `confidences` is set, and `observe`.

        Raises:
            PolicyError: there is nothing to choose, or the cost model's engine reads prompts in the same passes.
        """
        from bpkit.export.core import Export
        from bpkit_load.joint_networks import JointFacts, cores

        if not self.sizes:
            raise PolicyError("policy 'joint' has no block size above 1 to choose here: name others (block_sizes)")
        if self.mixes:
            raise PolicyError(
                "files of policy 'joint' are compared with prices of passes that read no prompts beside, and this cost "
                "model's engine mixes them: export without --cost, or with costs of `bpkit calibrate`"
            )
        facts = JointFacts(
            self.config,
            self.sizes,
            self.snapped.tolist(),
            self._counted(),
            (self.config.prior, SURELY),
            (FIRST_NEWCOMERS, NEWCOMERS),
            self.confidence if self.config.confidences else None,
        )
        return Export(cores(facts), [1, *self.sizes], slope=self.config.slope, state=self.exported_state)

    def _counted(self) -> tuple[str, ...]:
        """The counts that decisions go by."""
        return COUNTS if self.wants_optional else COUNTS[:2]

    def exported_state(self, state: State) -> State:
        """What its networks take of the rows' state and of all rows, by their names: float32."""
        import torch

        from bpkit_load.confidence import ODDS, RANGE
        from bpkit_load.joint_networks import ROW_RANGES

        rates = torch.zeros(ROW_RANGES, 2)
        for place, known in self.rates.items():
            rates[place - 1] = torch.tensor(known)
        shared = {
            "pool": torch.tensor(self.pool[: len(self._counted())].tolist()),
            "rates": rates,
            "newcomers": torch.tensor([self.newcomers - FIRST_NEWCOMERS]),
            "confidence_counts": torch.tensor([self.confidence.accepted.tolist(), self.confidence.tested.tolist()]),
            "rate": torch.tensor([self._rate]),
            "drafting": torch.tensor([self._drafting]),
            "seconds": torch.tensor([self._seconds]),
        }
        rows = {name: state["counts"][:, place].clone() for place, name in enumerate(self._counted())}
        of_confidence = {"confidence_range": state[RANGE] + 1, "odds": state[ODDS].clone()}
        return {name: value.float() for name, value in {**shared, **rows, **of_confidence}.items()}
