"""`joint`: its rule by hand and against every other choice, what it counts, and its files."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpkit_load.confidence import BOUNDS, DEPTHS, KEPT, ODDS, RANGE, SUREST, WEIGHT
from bpkit_load.joint import FIRST_NEWCOMERS, NEWCOMERS, Joint
from bpkit_load.positions import PositionPrices

from bpkit.decode.clock import CostClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import Policy, PolicyError
from bpkit.prompts import Prompt
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import CostTable, read_cost
from bpkit.trace.records import PromptTrace
from bpkit.types import Context, CostModel, Draft, Feature, Step
from tests.records import bound, decoder, step


def running(rows: int, *, position: int = 2, length: int = 40) -> Context:
    """Rows in the midst of their outputs."""
    place = torch.full((rows,), position)
    return Context(decoder(), place, place + 100, place * 0 + length, torch.Generator())


def probable(context: Context, rows: list[list[float]]) -> Draft:
    """Drafts by the drafter's probability of each token."""
    width, length = max(map(len, rows)), torch.tensor([len(row) for row in rows])
    features = {Feature.DRAFT_PROBABILITY: torch.tensor([row + [0.0] * (width - len(row)) for row in rows])}
    return Draft(context, length + 1, length, torch.zeros(len(rows), width, dtype=torch.long), features=features)


def batched(
    verify: dict[int, float], rows: int, *, padding: float | None = None, **phases: dict[int, float]
) -> CostTable:
    """A cost model of so many rows, whose prices are the same at every context length."""
    table: dict[str, Any] = {"draft": phases.get("draft", {max(verify): 0.0}), "verify": verify, "rest": 0.0}
    table["catch_up"] = phases.get("catch_up", {})
    of_rows = table if padding is None else {**table, "padding": {"verify": padding}}
    return CostTable.model_validate({**table, "rows": {rows: of_rows} if rows > 1 else {}})


def prices(cost: CostModel | None, rows: int, sizes: list[int], slope: float = 0.1) -> PositionPrices:
    return PositionPrices(cost, sizes, rows, 40, features=False, slope=slope)


# the rule -------------------------------------------------------------------------------------------------------


def test_packed_positions_go_to_the_rows_that_are_likeliest_to_use_them() -> None:
    """Two plain steps cost 2; a further position costs 1/2, whoever has it: chances above rate / 2 pay."""
    packed = prices(None, 2, [2, 3, 4], slope=0.5)
    survival = np.array([[0.9, 0.8, 0.7], [0.6, 0.3, 0.1]])
    for rate, taken in ((0.1, [3, 3]), (0.5, [3, 2]), (0.7, [3, 1]), (1.3, [3, 0]), (1.5, [2, 0]), (1.9, [0, 0])):
        assert packed.best(survival, rate).counts.tolist() == taken
    assert packed.best(survival, 1.5).width == 3
    assert packed.best(survival, 1.5).seconds == pytest.approx(3.0)
    assert packed.best(survival, 1.9).width == 1


def test_a_padded_pass_costs_what_its_widest_row_does() -> None:
    """Both rows pay for a width of 4; then the likely row takes it whole, the other what is likely at all."""
    padded = prices(batched({1: 1.0, 2: 1.5, 4: 2.5}, 2), 2, [2, 4])
    survival = np.array([[0.9, 0.8, 0.7], [0.2, 0.01, 0.001]])
    # gains over no draft: width 2: 1.1 - 0.5 rate, width 4: 2.611 - 1.5 rate
    assert padded.best(survival, 1.0).counts.tolist() == [3, 1]
    assert padded.best(survival, 1.6).counts.tolist() == [1, 1]
    assert padded.best(survival, 2.3).counts.tolist() == [0, 0]
    assert padded.best(survival, 1.6).seconds == pytest.approx(1.5)


def test_a_draft_is_paid_for_before_it_is_made() -> None:
    cost = batched({1: 1.0, 4: 1.0}, 2, draft={4: 1.0})
    survival = np.full((2, 3), 0.5)
    assert prices(cost, 2, [4]).best(survival, 2.0, before=0.0).counts.tolist() == [3, 3], "3 tokens for a second"
    assert prices(cost, 2, [4]).best(survival, 2.0, before=0.6).counts.tolist() == [0, 0], "for 1.6 seconds"
    assert prices(cost, 2, [4]).best(survival, 9.0).counts.tolist() == [3, 3], "it is made"


def test_tokens_that_were_not_drafted_are_never_verified() -> None:
    cheaper = batched({1: 1.0, 4: 1.0}, 2, padding=0.4)
    survival = np.array([[0.5, 0.0, 0.0], [0.5, 0.25, 0.125]])
    assert prices(cheaper, 2, [4]).best(survival, 0.1).counts.tolist() == [1, 3]


def chances(numbers: random.Random, rows: int, width: int) -> np.ndarray:
    """Falling chances, some of them of rows that are alike."""
    kinds = [np.cumprod([numbers.uniform(0.3, 1) for _ in range(width)]) for _ in range(max(1, rows * 2 // 3))]
    return np.array([kinds[row] if row < len(kinds) else numbers.choice(kinds) for row in range(rows)])


def random_cost(numbers: random.Random, rows: int, price: float) -> CostModel:
    """Of passes whose positions cost about so much, with padding as dear, half as dear or free."""
    slope = numbers.uniform(0, price)
    verify = {b: 1 + slope * b + price * b * rows for b in (1, 2, 3, 4, 6)}
    drafting = sorted(numbers.uniform(0, price) for _ in range(4))
    draft = dict(zip((2, 3, 4, 6), drafting, strict=True))
    return batched(verify, rows, draft=draft, padding=numbers.choice((None, price / 2, price)))


def test_no_other_choice_of_positions_is_better() -> None:
    numbers, found = random.Random(5), set()
    for _ in range(150):
        rows, sizes = numbers.choice((2, 3)), [2, 3, 4]
        price = numbers.uniform(0.01, 0.4)
        table, survival = prices(random_cost(numbers, rows, price), rows, sizes), chances(numbers, rows, 3)
        rate, before = numbers.uniform(0.1, 0.9) / price, numbers.choice((None, 0.1))

        def gain(counts: tuple[int, ...], given: Any = (table, survival, rate, before)) -> float:
            table, survival, rate, before = given
            place = table.widths.tolist().index(max(counts) + 1)
            seconds = table.verify[place, sum(counts)]
            if before is not None and any(counts):
                seconds += table.drafting[place, sum(counts)] + before
            return float(sum(survival[row, :k].sum() for row, k in enumerate(counts)) - rate * seconds)

        taken = tuple(table.best(survival, rate, before=before).counts.tolist())
        assert gain(taken) == pytest.approx(max(map(gain, itertools.product(range(4), repeat=rows))))
        found.add(taken)
    assert len(found) > 10


# before the draft -----------------------------------------------------------------------------------------------


def test_rates_of_rows_and_of_all_by_hand() -> None:
    policy = bound(Joint(block_sizes="1-4", discount=0.5, weight=2, pool_discount=0.8, prior=0.6, prior_weight=1))
    state = policy.begin(running(2))
    policy.select(state, running(2))
    for verified, accepted in (([3, 3], [1, 3]), ([2, 0], [0, 0])):
        policy.observe(state, step(verified, accepted))
    assert state["counts"][:, 0].tolist() == [[0.5, 0, 0], [0.5, 0.5, 0.5]]
    assert state["counts"][:, 1].tolist() == [[1.5, 0.5, 0], [0.5, 0.5, 0.5]]
    assert policy.pool[0] == pytest.approx([1.6, 0.8, 0.8])
    assert policy.pool[1] == pytest.approx([2.6, 1.6, 0.8])
    first = (1.6 + 0.6) / 3.6
    second = (0.8 + first) / 2.6
    third = (0.8 + second) / 1.8
    own = [(0.5 + 2 * first) / 3.5, 2 * second / 2.5, third]
    assert policy.chances(state)[0][0] == pytest.approx(np.cumprod(own))


def test_a_second_is_worth_the_tokens_of_late_with_about_as_many_rows() -> None:
    policy = bound(Joint(block_sizes="1+4", confidences=False, rate_discount=0.5, slope=0.5))
    of_three, of_two = policy.begin(running(3)), policy.begin(running(2))
    policy.select(of_three, running(3))
    spent = policy._seconds
    policy.observe(of_three, step([3, 3, 3], [3, 0, 1]))
    assert policy.rates == {2: (7.0, spent)}
    policy.select(of_two, running(2))
    policy.observe(of_two, step([3, 3], [0, 0]))
    assert policy.rates == {2: (0.5 * 7 + 2, pytest.approx(0.5 * spent + policy._seconds))}, "2 and 3 rows share one"
    assert policy.rate(2, policy.prices(2, 40), policy.chances(of_two)[0], 0.0) == pytest.approx(
        5.5 / (0.5 * spent + policy._seconds)
    )


def test_sizes_that_a_table_lacks_for_so_many_rows_are_not_chosen() -> None:
    def table(largest: int) -> dict[str, Any]:
        return {"draft": {2: 0.1, largest: 0.2}, "verify": {1: 1.0, 2: 1.1, largest: 1.2}}

    cost = CostTable.model_validate({**table(8), "rows": {4: table(4)}})
    policy = Joint(block_sizes="1-8", confidences=False)
    policy.bind(decoder(8), cost)
    assert policy.select(policy.begin(running(1)), running(1)).tolist() == [8]
    assert policy.select(policy.begin(running(4)), running(4)).tolist() == [4] * 4


def test_nothing_is_drafted_where_it_does_not_pay_and_it_is_tried_again() -> None:
    policy, sizes = bound(Joint(block_sizes="1-4", confidences=False, slope=0.6)), []
    state = policy.begin(running(4))
    for _ in range(150):
        size = policy.select(state, running(4))
        policy.observe(state, step((size - 1).tolist(), [0] * 4, block_size=size.tolist()))
        sizes.append(int(size.max()))
    assert sizes[0] > 1
    assert sizes[-20:].count(1) > 15
    free = bound(Joint(block_sizes="1-4", slope=0.0))
    assert free.select(free.begin(running(4)), running(4)).tolist() == [4] * 4


def test_prompts_of_rows_that_join_are_caught_up_with_in_part() -> None:
    """A prompt takes 0.4 s to catch up with, 3 positions 0.03 s."""
    cost = batched({1: 1.0, 4: 1.4}, 2, draft={4: 0.1}, catch_up={1: 0.01, 3: 0.03, 40: 0.4})
    policy = bound(Joint(block_sizes="1+4", confidences=False, prior=0.9), cost=cost)
    state = policy.begin(running(2, position=1))
    assert state["waiting"].tolist() == [39, 39], "features of the prompt, before the anchor"
    asked: list[float | None] = []
    best = PositionPrices.best

    def noted(self: PositionPrices, survival: np.ndarray, rate: float, **more: Any) -> object:
        asked.append(more["before"])
        return best(self, survival, rate, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PositionPrices, "best", noted)
        policy.select(state, running(2, position=1))
    share = FIRST_NEWCOMERS + NEWCOMERS * (1 - FIRST_NEWCOMERS)
    table = policy.prices(2, 40)
    usual, all_of_it = table.catch_up(3), table.catch_up(39)
    assert all_of_it > usual > 0
    assert asked == [pytest.approx(usual + (all_of_it - usual) * share)] * len(asked)
    assert policy._drafting == pytest.approx(0.1 + all_of_it), "but the step takes all of it"
    policy.observe(state, step([3, 3], [2, 0]))
    assert state["waiting"].tolist() == [3, 1]
    policy.observe(state, step([0, 0], [0, 0]))
    assert state["waiting"].tolist() == [4, 2]


def test_a_decoder_without_sizes_to_choose_drafts_nothing() -> None:
    policy = bound(Joint(), decoder(largest=1))
    state = policy.begin(running(2))
    assert policy.select(state, running(2)).tolist() == [1, 1]
    policy.observe(state, step([0, 0], [0, 0]))
    with pytest.raises(PolicyError, match="no block size above 1"):
        policy.export()


def test_an_engine_that_reads_prompts_in_the_same_passes_is_not_what_files_are_compared_with() -> None:
    with pytest.raises(PolicyError, match="mixes them"):
        bound(Joint(), cost=read_cost("h200-4b")).export()


# after the draft ------------------------------------------------------------------------------------------------


def test_calibration_counts_by_hand() -> None:
    policy = bound(Joint(block_sizes="1-4", discount=0.5))
    state = policy.begin(running(2))
    policy.select(state, running(2))
    draft = probable(running(2), [[0.95, 0.45, 0.2], [0.95]])
    policy.truncate(state, draft)
    places = np.searchsorted(BOUNDS, [0.95, 0.45, 0.2], side="right").tolist()
    assert state[RANGE].tolist() == [places, [places[0], -1, -1]]
    policy.observe(state, step([2, 1], [1, 1]))
    depth = np.searchsorted(DEPTHS, [0, 1], side="right").tolist()
    accepted, tested = policy.confidence.accepted, policy.confidence.tested
    assert tested[depth[0], places[0]] == accepted[depth[0], places[0]] == 2, "two first tokens stood"
    assert tested[depth[1], places[1]] == 1
    assert accepted[depth[1], places[1]] == 0, "the second fell, the third was not looked at"
    assert tested.sum() == 3
    middle = {place: ((0, *BOUNDS)[place] + (*BOUNDS, 1)[place]) / 2 for place in places}
    assert state[ODDS][0].tolist() == pytest.approx([1, middle[places[0]] + middle[places[1]], 2])
    broad = (2 + WEIGHT * middle[places[0]]) / (2 + WEIGHT)
    assert policy.confidence.chances()[depth[0], places[0]] == pytest.approx((2 + WEIGHT * broad) / (2 + WEIGHT))
    assert policy.confidence.chances().max() <= SUREST
    policy.truncate(state, probable(running(2), [[0.95], [0.95]]))
    policy.observe(state, step([1, 1], [0, 0]))
    assert accepted[depth[0], places[0]] == pytest.approx(2 * KEPT)
    assert tested[depth[0], places[0]] == pytest.approx(2 * KEPT + 2)


def test_sure_tokens_are_verified_and_a_row_that_fails_has_lower_chances() -> None:
    policy = bound(Joint(block_sizes="1-4", slope=0.4, discount=0.9))
    state = policy.begin(running(2))
    policy.select(state, running(2))
    sure, unsure = [0.99, 0.99, 0.99], [0.05, 0.05, 0.05]
    assert policy.truncate(state, probable(running(2), [sure, unsure])).tolist() == [3, 0]
    for _ in range(20):
        policy.truncate(state, probable(running(2), [sure, sure]))
        policy.observe(state, step([3, 3], [3, 0]))
    probability, length = np.array([sure, sure]), np.array([3, 3])
    stands, falls = policy.confidence.survival(state, probability, length)
    assert (stands > falls + 0.1).all()


def test_state_moves_with_its_row() -> None:
    """What a row is like is told by its state alone: rows that change places change sizes and widths with them."""
    policy = bound(Joint(block_sizes="1-6", slope=0.3))
    state = policy.begin(running(3))
    for _ in range(12):
        policy.select(state, running(3))
        policy.truncate(state, probable(running(3), [[0.9] * 5, [0.6] * 5, [0.3] * 5]))
        policy.observe(state, step([5, 5, 5], [5, 1, 0]))
    order = [2, 0, 1]
    moved = {name: value[order] for name, value in state.items()}
    sizes, turned = policy.select(state, running(3)), policy.select(moved, running(3))
    assert turned.tolist() == sizes[order].tolist()
    assert len(set(sizes.tolist())) > 1
    rows = [[0.9] * 5, [0.6] * 5, [0.3] * 5]
    kept = policy.truncate(state, probable(running(3), rows))
    assert policy.truncate(moved, probable(running(3), [rows[row] for row in order])).tolist() == kept[order].tolist()


# files ----------------------------------------------------------------------------------------------------------

LOADED = CostTable.model_validate(
    {
        "draft": {2: 0.2, 6: 0.3},
        "verify": {1: 1.0, 6: 1.5},
        "rest": 0.1,
        "catch_up": {1: 0.01, 40: 0.2},
        "rows": {
            4: {"draft": {2: 0.3, 6: 0.5}, "verify": {1: 1.3, 6: 3.0}, "rest": 0.2},
            16: {"draft": {2: 0.3, 6: 0.5}, "verify": {1: 2.0, 6: 9.0}, "rest": 0.2},
        },
    }
)


@pytest.fixture(scope="module")
def traces(pair: TinyPair) -> list[PromptTrace]:
    drafting = SpeculativeDecoder(
        pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer, max_block_size=6
    )
    tracer = Tracer(drafting, TraceOptions((2, 3, 4, 5, 6), 16, features=frozenset({Feature.DRAFT_PROBABILITY})))
    return [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(("abc abc ab", "x = y + 1"))]


def decided(pair: TinyPair, policy: Policy, cost: CostModel | None, batch_size: int) -> list[tuple[list[int], ...]]:
    """Sizes and verified widths of every step."""
    clock = None if cost is None else CostClock(cost)
    serving = SpeculativeDecoder(
        pair.target, pair.block_diffusion(), policy, strict=True, max_block_size=6, clock=clock
    )
    prompts = [pair.ids(text) for text in ("def f(x):", "1, 2, 3, 1, 2,", "a b a b", "x = 1", "y", "z z", "q = 3")]
    records = serving.run_many(prompts, batch_size=batch_size, max_new_tokens=20)
    return [(each.block_size.tolist(), each.verify_length.tolist()) for each in records if isinstance(each, Step)]


@pytest.mark.parametrize("options", [{}, {"confidences": False, "slope": 0.2}])
def test_files_decide_as_the_policy_on_served_traces_and_live(
    pair: TinyPair, traces: list[PromptTrace], tmp_path: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip("onnxscript")
    from bpkit.export.write import export_policy

    spec = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", max_block_size=6).spec
    made = export_policy(
        Joint(block_sizes="1-6", **options), traces, spec, tmp_path, name="joint", summary="Tried.", cost=LOADED
    )
    assert set(made.networks) == {"select.onnx", "observe.onnx"} | ({"truncate.onnx"} if not options else set())
    for agreement in made.validation.values():
        assert agreement.agree + agreement.within_tolerance == agreement.rows > 50
        assert agreement.batch_sizes[-1] == 64
    for cost, batch_size in itertools.product((None, LOADED), (1, 3, 7)):
        loaded = resolve_policy({"name": "onnx", "path": str(tmp_path)})
        assert loaded.joint
        ours = decided(pair, Joint(block_sizes="1-6", **options), cost, batch_size)
        assert decided(pair, loaded, cost, batch_size) == ours
        assert len(ours) > 10


def test_the_graph_takes_the_positions_that_the_policy_takes() -> None:
    """On random chances, prices and rates, padded and not, from 1 to 64 rows."""
    pytest.importorskip("onnxscript")
    from bpkit_load.joint_networks import LikeliestPositions
    from torch import nn

    from bpkit.export.convert import to_onnx
    from bpkit.export.core import Core, Port, decision, given, margin
    from bpkit.export.session import open_session

    numbers, sizes, width = random.Random(1), [2, 3, 4, 6], 5
    likeliest = LikeliestPositions([1, *sizes], width)

    class Rule(nn.Module):
        def forward(
            self, survival: torch.Tensor, rate: torch.Tensor, seconds: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            found = likeliest(survival.double())
            *_, tokens, positions = found
            gains = tokens - rate.double() * likeliest.price(seconds.double(), positions)
            counts, choice, taken, clear, _ = likeliest.chosen(found, gains)
            return counts, (choice + taken * 0)[None], clear.float().expand(survival.shape[0])

    core = Core(
        "truncate",
        Rule(),
        (
            Port("survival", ("batch", width), "float32", "chances"),
            Port("rate", (1,), "float32", "rate"),
            given("joint_verify_seconds", len(sizes) + 1),
        ),
        (decision("truncate"), Port("place", (1,), "int64", "of the width"), margin("as ever")),
    )
    graph, seen = open_session(to_onnx(core)), set()
    for turn in range(120):
        rows = numbers.choice((1, 2, 3, 8, 17, 64))
        price = numbers.uniform(0.01, 0.4)
        cost = None if turn % 4 == 0 else random_cost(numbers, rows, price)
        table, survival = prices(cost, rows, sizes), chances(numbers, rows, width).astype(np.float32)
        rate = np.float32(numbers.uniform(0.1, 0.9) / (0.1 if cost is None else price))
        exact = np.minimum(table.verify, 1e9).astype(np.float32)
        table.verify = np.where(np.isfinite(table.verify), exact, np.inf).astype(np.float64)
        taken = table.best(survival.astype(np.float64), float(rate))
        got = graph.run({"survival": survival, "rate": np.array([rate]), "joint_verify_seconds": exact})
        assert got["verify_length"].tolist() == taken.counts.tolist() or got["margin"][0] < 1e-9
        seen.add(tuple(taken.counts.tolist()))
    assert len(seen) > 50
