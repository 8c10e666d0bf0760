"""`forecast`: decisions against brute force, labels by hand, and the whole policy on a tiny pair."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from bpkit_forecast.networks import After, Before, Truncation
from bpkit_forecast.policy import VECTORS, Forecast, ForecastConfig
from bpkit_forecast.training import ForecastModule, ForecastOptions
from torch import nn

from bpkit.decode.clock import CostClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.learn.config import LearnedConfig
from bpkit.learn.gains import Gains
from bpkit.learn.networks import BestSize, Standard
from bpkit.learn.training.learned import hazard_labels
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import CostTable, flat
from bpkit.types import Context, DecoderSpec

SIZES = [2, 3, 4, 5, 6]
COST = CostTable(
    draft={size: 0.5 + 0.05 * size for size in SIZES},
    verify={width: {64: 2 + 0.3 * width, 640: 3 + 0.5 * width} for width in range(1, 8)},
    rest=0.1,
)
FACTS: dict[str, Any] = {
    "block_sizes": SIZES,
    "yields": [1.6, 2.0, 2.2, 2.3, 2.35],
    "curves": {"steps": [2.4, 3.3, 3.65, 4.0, 4.35, 4.7], "verify": [2.3, 2.6, 2.9, 3.2, 3.5, 3.8]},
    "outlook": [[0.5, 0.9, 1.2, 1.3, 1.3], [0.1, 0.1, 0.1, 0.1, 0.1], [1.0, 2.0, 3.0, 4.0, 5.0]],
    "inputs": 10,
    "hidden": 8,
    "dropout": 0.1,
}
SPEC = DecoderSpec("target", "drafter", "block-diffusion", 6, 6, 8, 100)


def chances(seed: int, rows: int) -> torch.Tensor:
    """Random survival, [rows, sizes, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, len(SIZES), SIZES[-1] - 1, generator=generator).pow(0.4).cumprod(dim=-1)


def expected(stands: torch.Tensor) -> Any:
    """Tokens expected to stand by size, [rows, sizes]."""
    inside = torch.arange(1, SIZES[-1]) < torch.tensor(SIZES)[:, None]
    return (stands * inside).sum(dim=-1).numpy()


@pytest.mark.parametrize("cost", [COST, None])
@pytest.mark.parametrize("rate", [0.5, 1.0, 1.6])
def test_the_size_is_the_one_that_gains_most_at_the_going_speed(cost: CostTable | None, rate: float) -> None:
    gains = Gains(FACTS, SIZES, cost, LearnedConfig(rate=rate, margin=0.0, decision=0.0))
    stands, lengths = chances(1, 40), torch.randint(10, 600, (40,), generator=torch.Generator().manual_seed(0))
    chosen = gains.best_sizes(expected(stands), lengths.tolist()).tolist()
    for row in range(40):
        at = -(-int(lengths[row]) // 64) * 64
        values = {}
        for column, size in enumerate([1, *SIZES]):
            if cost is None:
                seconds = FACTS["curves"]["steps"][column]
            else:
                seconds = cost.seconds("verify", size, at) + cost.rest
                seconds += cost.seconds("draft", size, at) if size > 1 else 0.0
            tokens = 1 + (float(stands[row, column - 1, : size - 1].sum()) if size > 1 else 0.0)
            values[size] = tokens - gains.rho * seconds
        assert values[chosen[row]] == pytest.approx(max(values.values()), abs=1e-5)
    assert len(set(chosen)) > 1


def test_rho_is_the_speed_of_the_best_fixed_size() -> None:
    gains = Gains(FACTS, SIZES, None, LearnedConfig(rate=0.8, margin=0.0, decision=0.0))
    speeds = [tokens / seconds for tokens, seconds in zip(FACTS["yields"], FACTS["curves"]["steps"][1:], strict=True)]
    assert gains.rho == pytest.approx(0.8 * max(speeds))
    assert SIZES[gains.floor] == SIZES[speeds.index(max(speeds))] == 4


def test_a_margin_keeps_the_best_fixed_size_unless_another_promises_more() -> None:
    stands, lengths = chances(2, 60), torch.full((60,), 100)
    free = Gains(FACTS, SIZES, COST, LearnedConfig(rate=1.0, margin=0.0, decision=0.0))
    bound = Gains(FACTS, SIZES, COST, LearnedConfig(rate=1.0, margin=100.0, decision=0.0))
    kept, chosen = (set(g.best_sizes(expected(stands), lengths.tolist()).tolist()) for g in (bound, free))
    assert kept <= {1, SIZES[bound.floor]}
    assert chosen - {1, SIZES[free.floor]}


def test_nothing_is_drafted_where_nothing_would_stand() -> None:
    gains = Gains(FACTS, SIZES, COST, LearnedConfig(rate=1.0, margin=0.0, decision=0.0))
    assert gains.best_sizes(np.zeros((2, len(SIZES))), [50, 400]).tolist() == [1, 1]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    gains = Gains(FACTS, SIZES, COST, LearnedConfig(rate=1.0, margin=0.0, decision=0.0))
    tokens, lengths = expected(chances(3, 8)), [20, 90, 150, 300, 400, 500, 600, 64]
    alone = [int(gains.best_sizes(tokens[i : i + 1], lengths[i : i + 1])[0]) for i in range(8)]
    assert gains.best_sizes(tokens, lengths).tolist() == alone


def test_what_is_exported_chooses_as_what_is_live() -> None:
    config = LearnedConfig(rate=0.9, margin=0.1, decision=0.0)
    gains = Gains(FACTS, SIZES, COST, config)
    tokens, lengths = chances(4, 60), torch.arange(10, 610, 10).tolist()
    exported = BestSize(nn.Identity(), FACTS, gains.columns, config)
    steps = torch.tensor([gains.curves(n).steps for n in lengths])
    stands = torch.tensor(expected(tokens))
    sizes, *_ = exported(stands, steps, torch.tensor(gains.curves(256).steps))
    assert sizes.tolist() == gains.best_sizes(stands.numpy(), lengths).tolist()
    assert len(set(sizes.tolist())) > 2


def test_verified_is_what_pays_for_itself() -> None:
    torch.manual_seed(1)
    after = After(5, 5)
    nn.init.normal_(after.bias)
    after.weight.data = torch.tensor([0.7, -0.3, 0.2])
    truncation, rho = Truncation(after, FACTS, [0, 1, 2, 3, 4], 1.0), 0.5
    probability, entropy = torch.rand(6, 5), torch.rand(6, 5)
    probability[0, 0], probability[1, 1] = 0.0, 1.0
    size, length = torch.tensor([6, 6, 2, 4, 5, 6]), torch.tensor([5, 5, 1, 3, 4, 3])
    verify = torch.tensor([FACTS["curves"]["verify"]] * 6)
    with torch.no_grad():
        gains = truncation.gains(probability, entropy, size, length, verify, rho)
    for row in range(6):
        odds, so_far, stands, total, by_hand = 0.0, 0.0, 1.0, 0.0, [0.0]
        for k in range(int(length[row])):
            p = min(max(float(probability[row, k]), 1e-6), 1 - 1e-6)
            so_far += math.log(p)
            odds = 0.7 * (math.log(p) - math.log1p(-p)) - 0.3 * float(entropy[row, k]) + 0.2 * so_far
            stands /= 1 + math.exp(-odds - float(after.bias[int(size[row]) - 2, k].detach()))
            total += stands
            by_hand.append(total - rho * 0.3 * (k + 1))
        assert gains[row, : len(by_hand)].tolist() == pytest.approx(by_hand, abs=1e-5)
        assert int(gains[row].argmax()) == by_hand.index(max(by_hand))


def test_the_first_layer_takes_over_the_standardisation() -> None:
    torch.manual_seed(0)
    network, standard = Before(10, SIZES, 8, 0.3).eval(), Standard(10)
    x = torch.randn(6, 10) * 3 + 1
    standard.fit(torch.randn(20, 10) * 2 - 1)
    wanted = network(standard(x))
    network.take_raw_inputs(standard)
    torch.testing.assert_close(network(x), wanted)


def test_tokens_are_the_chances_of_those_that_a_size_drafts() -> None:
    torch.manual_seed(0)
    network = Before(10, SIZES, 8, 0.3).eval()
    nn.init.normal_(network.of_size)
    x = torch.randn(6, 10)
    stands = network.logits(x).sigmoid().cumprod(dim=-1)
    wanted = torch.stack([stands[:, i, : size - 1].sum(dim=-1) for i, size in enumerate(SIZES)], dim=1)
    torch.testing.assert_close(network(x), wanted)


def test_choosing_pays_where_forecasts_differ_and_costs_do_too() -> None:
    gains = Gains(FACTS, SIZES, COST, LearnedConfig(rate=1.0, margin=0.0, decision=0.0))
    by_hand = []
    for row in FACTS["outlook"]:
        seconds = [COST.seconds("verify", size, 256) + COST.seconds("draft", size, 256) for size in SIZES]
        plain = COST.seconds("verify", 1, 256)
        values = [tokens - gains.rho * (s - plain) for tokens, s in zip(row, seconds, strict=True)]
        by_hand.append(max(0.0, *values) - values[gains.floor])
    worth = sum(by_hand) / 3 / gains.rho  # seconds a step
    assert Gains(FACTS, SIZES, COST, LearnedConfig(rate=1.0, margin=0.0, decision=0.99 * worth)).asks
    assert not Gains(FACTS, SIZES, COST, LearnedConfig(rate=1.0, margin=0.0, decision=1.01 * worth)).asks


def test_nobody_is_asked_where_every_step_costs_the_same() -> None:
    gains = Gains(FACTS, SIZES, flat(COST), LearnedConfig(rate=1.0, margin=0.0, decision=1e-6))
    assert not gains.asks
    assert SIZES[gains.floor] == 6
    policy = Forecast.trained(ForecastConfig(), FACTS, Forecast.untrained(ForecastConfig()).build(FACTS), SPEC)
    policy.bind(SPEC, flat(COST))
    assert not policy.wants
    position, remaining, length = torch.tensor([[5], [100], [40]])
    context = Context(SPEC, position, remaining, length, torch.Generator())
    assert policy.select({}, context).tolist() == [6]


def test_labels_stop_at_the_first_token_that_fell_and_at_the_end_of_the_output() -> None:
    accepted = torch.tensor([[0, 1, 1, 3, 3]], dtype=torch.int16)  # of block sizes 2 .. 6
    stands, counts = hazard_labels(accepted, torch.tensor([9]), SIZES)
    assert counts[0].tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert (stands * counts)[0].tolist() == [
        [0] * 5,
        [1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]
    _, at_the_end = hazard_labels(accepted, torch.tensor([3]), SIZES)
    assert at_the_end[0, -1].tolist() == [1, 1, 1, 0, 0]  # the fourth was cut off, not refused


@pytest.mark.parametrize("truncate", [False, True])
def test_a_tiny_pair_decodes_the_same_text_and_training_learns(pair: TinyPair, truncate: bool) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", max_block_size=6)
    tracer = Tracer(
        SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer),
        TraceOptions(tuple(SIZES), 24, features=frozenset(VECTORS)),
    )
    traces = [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(("abc abc ab", "x = y + 1"))]
    config = ForecastConfig(truncate=truncate)
    module = ForecastModule(Forecast.untrained(config), decoder.spec, COST, ForecastOptions(hidden=16))
    examples = [module.examples(trace) for trace in traces]
    data = {name: torch.cat([e[name] for e in examples]) for name in examples[0]}
    module.prepare(data)
    before = float(module.loss(data).detach())
    optimizer = torch.optim.AdamW(module.networks.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        module.loss(data).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(module.eval().loss(data).detach()) < 0.6 * before
    policy = module.finished()
    live = SpeculativeDecoder(
        pair.target, pair.block_diffusion(), policy, clock=CostClock(COST), max_block_size=6, strict=True
    )
    prompt = pair.ids("x = y + 1")
    result = live.generate(prompt, max_new_tokens=24, temperature=0.0)
    plain = decoder.generate(prompt, max_new_tokens=24, temperature=0.0, policy="fixed:1")
    assert result.tokens.tolist() == plain.tokens.tolist()


def test_both_networks_have_the_shapes_that_the_facts_say() -> None:
    networks = Forecast.untrained(ForecastConfig()).build(FACTS)
    assert isinstance(networks["before"], nn.Module)
    assert networks["before"](torch.zeros(3, 10)).shape == (3, 5)
    after = networks["after"]
    assert isinstance(after, After)
    assert after(torch.full((2, 5), 0.5), torch.ones(2, 5), after.bias[[0, 4]]).shape == (2, 5)
