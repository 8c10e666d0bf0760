"""Counts on the host, features on the device: what a step reads, and that nothing is mixed, on a simulated device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bpkit import Context, Policy, SpeculativeDecoder
from bpkit.decode.clock import ClockFaultWarning, CostClock, WallClock
from bpkit.decode.drafter import Drafter, Proposal
from bpkit.decode.features import draft_features
from bpkit.decode.host import to_host
from bpkit.decode.slot_target import SlotTarget
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import State
from bpkit.registry.discovery import registry
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.testing.simulated_device import DEVICE, SimulatedDevice
from bpkit.trace.cost import CostTable
from bpkit.types import Draft, Feature

PROMPT = "1, 2, 3, 1, 2, 3, 1, 2,"
TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "reads.json"
NEEDED = 2
WITH_WEIGHTS = {"blockpilot", "delayed_tree", "forecast", "ldlp", "ldlp_threshold", "specdecpp", "onnx"}
"""They need weights for the pair: `bpkit check` runs them on the device, with fresh ones, in test_check.py."""


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice() as device:
        yield device


def test_one_read_brings_all_that_lies_on_the_device(device: SimulatedDevice) -> None:
    values = [torch.tensor([True, False]), torch.arange(3), torch.rand(2, 3), torch.tensor([1.5], dtype=torch.bfloat16)]
    host = torch.arange(2)
    read = to_host([device.tensor(values[0]), host, *map(device.tensor, values[1:])])
    assert device.reads == 1
    assert read[1] is host
    for one, other in zip([read[0], *read[2:]], values, strict=True):
        assert one.dtype == other.dtype
        assert one.device.type == "cpu"
        assert one.equal(other)
    assert to_host([host])[0] is host
    assert device.reads == 1


def test_operands_on_two_devices_and_hidden_reads_are_found(device: SimulatedDevice) -> None:
    there, here = device.tensor(torch.arange(3)), torch.arange(3)
    assert there.device == (there + 1).device == torch.arange(2, device="cuda").device == DEVICE
    with pytest.raises(RuntimeError, match=r"same device.*aten::add"):
        there + here
    assert device.reads == 0
    assert (there * 2).tolist() == [0, 2, 4]
    assert int(there[1]) == 1
    assert bool((there > 5).any()) is False
    assert there[there > 0].device == DEVICE
    assert device.reads == 4
    there + 1, there + torch.tensor(2)  # a number of the host is no operand
    assert device.reads == 4


DRAFTERS = ("block-diffusion", "autoregressive", "n-gram")


def drafter_of(pair: TinyPair, name: str) -> Drafter:
    made: dict[str, Drafter] = {
        "block-diffusion": pair.block_diffusion(),
        "autoregressive": pair.autoregressive(),
        "n-gram": NgramDrafter(),
    }
    return made[name]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_steps_of_every_policy_read_the_device_twice_at_most(
    pair: TinyPair, device: SimulatedDevice, drafter: str
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    host = SpeculativeDecoder(pair.target, drafter_of(pair, drafter), "fixed:1", tokenizer=pair.tokenizer)
    plain, moved = tuple(host.generate(PROMPT, **options).tokens[0].tolist()), device.decoder(host)
    tried = 0
    for name in sorted(registry().policies.keys() - WITH_WEIGHTS):
        wants = resolve_policy(name).wants
        if wants - host.drafter.provides:
            continue
        decoder = moved.with_policy(name)
        reads = device.count(decoder, PROMPT, **options)
        asks = drafter == "autoregressive" and type(decoder.policy).extend is not Policy.extend
        assert reads.tokens == plain, name
        assert max(reads.steps) <= (decoder.spec.trained_block_size + 1 if asks else NEEDED), (name, reads)
        tried += 1
    assert tried >= 6


def test_the_committed_table_has_every_policy_and_no_step_with_more_than_two_reads() -> None:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    assert {row["policy"] for row in rows} == set(registry().policies) - {"onnx"}
    assert all(row["texts_equal"] for row in rows)
    assert max(row["most"] for row in rows if not row["asks_after_every_token"]) <= NEEDED
    assert all(row["steps"] > 0 for row in rows)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_texts_on_the_device_are_those_of_the_host(pair: TinyPair, device: SimulatedDevice, rule: str) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "temperature": 0.9,
        "seed": 2,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
    }
    host = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:5", tokenizer=pair.tokenizer, rule=rule)
    moved = device.decoder(host)
    assert device.count(moved.with_policy("fixed:5"), PROMPT, **options).tokens == tuple(
        host.generate(PROMPT, **options).tokens[0].tolist()
    )


def test_what_a_target_gives_on_several_devices_comes_to_that_of_its_tokens(
    pair: TinyPair, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = pair.ids(PROMPT)
    session = SlotTarget(pair.target, rows=1, capacity=64, slots=1, feature_layers=(0, 2), keep_hidden=True)
    original = session._call

    def split(*given: Any, **more: Any) -> Any:
        output = original(*given, **more)
        output.logits = device.tensor(output.logits)
        output.hidden_states = [
            state if i != 1 or state is None else device.tensor(state) for i, state in enumerate(output.hidden_states)
        ]
        return output

    monkeypatch.setattr(session, "_call", split)
    with torch.inference_mode():
        output = session.prefill(ids, [ids.shape[1]], last=True)
    assert output.features is not None
    assert output.last_hidden is not None
    assert {output.logits.device.type, output.features.device.type, output.last_hidden.device.type} == {"cpu"}
    assert output.features.shape[-1] == 2 * pair.target.config.hidden_size


class Scalars(Policy):
    """Mixes counts with numbers of tokens, as a rule of a few lines would."""

    wants = frozenset({Feature.ANCHOR_ENTROPY, Feature.DRAFT_PROBABILITY, Feature.DRAFT_TOKENS})

    def begin(self, context: Context) -> State:
        return {"size": context.full(6)}

    def select(self, state: State, context: Context) -> Tensor:
        sure = (context[Feature.ANCHOR_ENTROPY] < 2.0) & (context.position > 1)
        return torch.where(sure, state["size"], context.full(4))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        assert len(draft[Feature.DRAFT_TOKENS].tolist()[0]) == int(draft.draft_length)
        return (draft[Feature.DRAFT_PROBABILITY] > 0.01).sum(dim=1).minimum(draft.draft_length)


class Vectors(Policy):
    """Decides from a hidden state without `predict`: right, and one more read."""

    wants = frozenset({Feature.LAST_HIDDEN})

    def select(self, state: State, context: Context) -> Tensor:
        return 4 + (context[Feature.LAST_HIDDEN].mean(dim=1) > 0).long()


class Predicts(Vectors):
    """The same with it."""

    def predict(self, features: Any) -> dict[str, Tensor]:
        if Feature.LAST_HIDDEN not in features:
            return {}
        assert features[Feature.LAST_HIDDEN].device == DEVICE
        return {"mean": features[Feature.LAST_HIDDEN].mean(dim=1)}

    def select(self, state: State, context: Context) -> Tensor:
        return 4 + (self.predicted(context)["mean"] > 0).long()


@pytest.mark.parametrize(("policy", "reads"), [(Scalars, 2), (Vectors, 2), (Predicts, 1)])
def test_a_strangers_policy_needs_no_thought_of_devices(
    pair: TinyPair, device: SimulatedDevice, policy: type[Policy], reads: int
) -> None:
    host = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:1", tokenizer=pair.tokenizer)
    moved = device.decoder(host)
    counted = device.count(moved.with_policy(policy()), PROMPT, max_new_tokens=8, temperature=0)
    assert set(counted.steps) == {reads}


def test_each_drafted_token_is_looked_at_once(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def counting(proposal: Proposal, wants: frozenset[Feature]) -> dict[Feature, Tensor]:
        looked.append(proposal.tokens.shape[1])
        return draft_features(proposal, wants)

    monkeypatch.setattr("bpkit.decode.proposed.draft_features", counting)
    decoder = SpeculativeDecoder(pair.target, pair.autoregressive(), "threshold:0.0,block_size=12", strict=True)
    made = decoder.generate(pair.ids(PROMPT), max_new_tokens=16, temperature=0)
    drafted = sum(int(step.draft_length) for step in made.steps)
    assert max(int(step.draft_length) for step in made.steps) == 11
    assert sum(looked) == drafted
    assert max(looked) == 1


def test_a_drafters_distribution_is_the_same_token_by_token_as_at_once(pair: TinyPair) -> None:
    seen: list[dict[str, list[float]]] = []

    class Looks(Policy):
        wants = frozenset({Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY, Feature.DRAFT_HIDDEN})
        asks = True

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(6)

        def extend(self, state: State, draft: Draft) -> Tensor:
            return draft.draft_length > 0

        def truncate(self, state: State, draft: Draft) -> Tensor:
            seen.append({name: draft[name].flatten().tolist() for name in self.wants})
            return draft.draft_length

    class LooksOnce(Looks):
        extend = Policy.extend

    for policy in (Looks(), LooksOnce()):
        SpeculativeDecoder(pair.target, pair.autoregressive(), policy, strict=True).generate(
            pair.ids(PROMPT), max_new_tokens=12, temperature=1.0, seed=1
        )
    half = len(seen) // 2
    assert half > 1
    assert seen[:half] == seen[half:]


# Clocks


SHORT = CostTable(
    name="up to 4",
    draft={2: 0.1, 4: 0.2},
    verify={1: {64: 1.0, 640: 1.0}, 4: {64: 1.5, 640: 1.5}},
    rest=0.1,
)


def test_a_cost_model_without_an_answer_cannot_end_a_generation(pair: TinyPair) -> None:
    host = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:1")
    wanted = host.generate(pair.ids(PROMPT), max_new_tokens=12, temperature=0).tokens
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:8", clock=CostClock(SHORT))
    with pytest.warns(ClockFaultWarning, match=r"clock CostClock cannot price a step \(CostError: ") as told:
        made = decoder.generate(pair.ids(PROMPT), max_new_tokens=12, temperature=0)
    assert made.tokens.equal(wanted)
    assert len([warning for warning in told if warning.category is ClockFaultWarning]) == 1
    assert made.clock_faults == sum(int(step.block_size) == 8 for step in made.steps) > 1
    assert all(0 < step.seconds.total < 1 for step in made.steps), "the measured time"
    assert made.fallbacks == 0


def test_a_clock_that_stops_cannot_end_a_generation(pair: TinyPair) -> None:
    class Stops(WallClock):
        readings = 0

        def now(self) -> float:
            self.readings += 1
            if self.readings > 8:
                raise OSError("the clock stopped")
            return super().now()

    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", clock=Stops(torch.device("cpu")))
    with pytest.warns(ClockFaultWarning, match="OSError: the clock stopped"):
        made = decoder.generate(pair.ids(PROMPT), max_new_tokens=8, temperature=0)
    assert made.tokens.shape == (1, 8)


def test_a_clock_waits_only_for_its_own_device_and_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    other = torch.device("cuda:1")
    WallClock(other).now()
    WallClock(torch.device("cpu"), wait=True).now()
    assert waited == []
    WallClock(other).waiting().now()
    assert waited == [other]
    assert not WallClock(other).tells_parts
    assert WallClock(other, wait=True).tells_parts
    assert WallClock(torch.device("cpu")).tells_parts


def test_near_ties_of_reduced_precision_are_counted(pair: TinyPair) -> None:
    import copy

    half = copy.deepcopy(pair.target).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoders = {
            dtype: SpeculativeDecoder(target, NgramDrafter(), "fixed:4", tokenizer=pair.tokenizer)
            for dtype, target in (("float32", pair.target), ("bfloat16", half))
        }
        ties = {
            dtype: sum(
                decoder.generate(text, max_new_tokens=24, temperature=0).near_ties
                for text in ("x = ", PROMPT, "def f(a):", "The quick")
            )
            for dtype, decoder in decoders.items()
        }
    assert ties["float32"] == 0
    assert ties["bfloat16"] > 0
