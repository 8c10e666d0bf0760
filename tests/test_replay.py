"""Replay and the live decoder do the same, step for step, for every policy and every kind of drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bpkit.decode.clock import CostClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import Drafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import Policy, PolicyError
from bpkit.prompts import Prompt, choose_prompts
from bpkit.registry.discovery import registry
from bpkit.registry.resolve import PolicyLike
from bpkit.testing import TinyPair
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.collect import TraceOptions, Tracer, generation_options
from bpkit.trace.collect.job import describe, run_job
from bpkit.trace.collect.recompute import Recompute
from bpkit.trace.cost import CostTable
from bpkit.trace.oracle.paths import fixed_path
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.trace.store.joined import open_trace
from bpkit.trace.store.manifest import TraceError
from bpkit.types import OF_THE_TARGET, Context, Draft, Feature, Step, work_of

if TYPE_CHECKING:
    from tests.conftest import ShippedPair

COST = CostTable(
    draft={size: 0.001 + 0.0001 * size for size in range(2, 33)},
    catch_up={2: 1e-4, 8: 3e-4, 64: 1e-3},
    features=dict.fromkeys(range(2, 33), 0.0001),
    verify={width: {16: 0.005 + 0.0003 * width, 256: 0.006 + 0.0004 * width} for width in range(1, 34)},
    rest=2e-4,
)
OF_THE_CONTEXT = OF_THE_TARGET - {Feature.PREFILL_HIDDEN} | {Feature.TARGET_FEATURES}
"""Features of the target that a trace holds only if it was asked to."""
TEXTS = ("f(x) = 2 * x", "abc abc abc abc ", "Q: 1+1?\nA:")
OF_THE_SHIPPED_PAIR = [
    *("blockpilot", "forecast", "forecast:truncate=true", "ldlp", "ldlp_threshold", "specdecpp"),
    *("fixed:5", "threshold:0.1,block_size=9", "bandit:2+5+11", "joint"),
]
"""Policies with weights of the pair, and one of each other kind. All others decide for the tiny pair."""


class Curious(Policy):
    """Decides by everything that it can see, its own random numbers and time included."""

    wants = frozenset(
        {
            Feature.PREFILL_HIDDEN,
            Feature.PREFILL_LOGITS,
            Feature.LAST_HIDDEN,
            Feature.ANCHOR_EMBEDDING,
            Feature.ANCHOR_LOG_PROBABILITY,
            Feature.ANCHOR_ENTROPY,
            Feature.DRAFT_TOKENS,
            Feature.DRAFT_PROBABILITY,
            Feature.DRAFT_ENTROPY,
            Feature.DRAFT_HIDDEN,
        }
    )

    wants_optional = frozenset({Feature.TARGET_FEATURES})

    def begin(self, context: Context) -> dict[str, Any]:
        first = context["prefill_hidden"].sum() + context["prefill_logits"].topk(3).values.sum()
        return {"sum": first.double()[None], "seconds": torch.zeros(1).double()}

    def select(self, state: Any, context: Context) -> Tensor:
        near = state["sum"].abs().frac() + context["last_hidden"].double().mean(dim=1).abs().frac()
        near = near + context["anchor_embedding"].double().sum(dim=1).abs() + context["anchor_entropy"].double()
        near = near - context["anchor_log_probability"].double()
        if Feature.TARGET_FEATURES in context.features:
            near = near + context["target_features"].double().mean(dim=1).abs()
        drawn = torch.rand(1, generator=context.generator).double()
        late = (state["seconds"] * 1000).frac()
        size: Tensor = 1 + ((near + drawn + late).frac() * 9).long()
        return size

    def truncate(self, state: Any, draft: Draft) -> Tensor:
        sure = draft["draft_probability"].double() - 0.2 * draft["draft_entropy"].double()
        seen = sure + 0.01 * draft["draft_hidden"].double().mean(dim=-1) + 0.001 * (draft["draft_tokens"] % 7)
        kept: Tensor = (seen > -0.5).long().cumprod(dim=1).sum(dim=1)
        return kept

    def observe(self, state: Any, step: Step) -> None:
        state["sum"] = state["sum"] + step.num_accepted
        state["seconds"] = state["seconds"] + step.seconds.total


class EveryOther(Policy):
    """With autoregressive drafters, ends drafts in the midst; between them, long stretches without drafts."""

    wants = frozenset({Feature.DRAFT_PROBABILITY})

    def begin(self, context: Context) -> dict[str, Any]:
        return {"step": context.full(0)}

    def select(self, state: Any, context: Context) -> Tensor:
        state["step"] = state["step"] + 1
        return context.full(1 if int(state["step"]) % 5 in (1, 2, 3) else 7)

    def extend(self, state: Any, draft: Draft) -> Tensor:
        return (draft.draft_length < 3) | (draft["draft_probability"][:, -1] > 0.3)


def drafters(pair: TinyPair) -> dict[str, Drafter]:
    return {
        "block-diffusion": pair.block_diffusion(),
        "autoregressive": pair.autoregressive(),
        "early-exit": pair.early_exit(),
        "n-gram": NgramDrafter(),
        "agreeable": pair.agreeable(),
    }


def fitting(decoder: SpeculativeDecoder, policies: Sequence[PolicyLike | type[Policy]]) -> list[Any]:
    """Those that the drafter can serve."""
    found = []
    for policy in policies:
        try:
            decoder.with_policy(made(policy))
        except PolicyError:
            continue
        found.append(policy)
    return found


def made(policy: Any) -> Any:
    return policy() if isinstance(policy, type) else policy


def check(decoder: SpeculativeDecoder, policy: Any, traces: list[PromptTrace], options: TraceOptions) -> int:
    """Run all prompts in order under both; returns the number of steps."""
    live = SpeculativeDecoder(
        decoder.target,
        decoder.drafter,
        made(policy),
        clock=CostClock(COST),
        strict=True,
        max_block_size=max(options.block_sizes),
    )
    replayer = Replayer(live.spec, made(policy), COST, seed=options.seed, strict=True)
    count = 0
    for trace in traces:
        prompt = torch.tensor(trace.prompt_tokens).long()[None]
        result = live.run(prompt, stream_id=trace.index, **generation_options(options)).finish()
        replayed = replayer.run(trace)
        assert result.tokens[0].tolist() == trace.output_tokens.tolist()
        for name in ("block_size", "draft_length", "verify_length", "num_accepted"):
            assert getattr(replayed, name).tolist() == [int(getattr(step, name)) for step in result.steps], name
        seconds = [step.seconds.total for step in result.steps]
        assert replayed.seconds(COST) == pytest.approx(sum(seconds), rel=1e-12)
        assert replayed.tokens == sum(step.tokens.shape[1] for step in result.steps)
        count += replayed.steps
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("block-diffusion", 0.0),
        ("block-diffusion", 1.0),
        ("autoregressive", 0.0),
        ("autoregressive", 1.0),
        ("early-exit", 1.0),
        ("n-gram", 0.0),
        ("agreeable", 1.0),
    ],
)
def test_replay_is_the_live_decoder_step_for_step_on_a_tiny_pair(pair: TinyPair, kind: str, temperature: float) -> None:
    decoder = SpeculativeDecoder(pair.target, drafters(pair)[kind], "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions(
        tuple(range(2, 11)),
        14,
        {"temperature": temperature},
        None if temperature == 0 else 5,
        OF_THE_CONTEXT | ({Feature.DRAFT_HIDDEN} & decoder.drafter.provides),
    )
    tracer = Tracer(decoder, options)
    traces = [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(TEXTS[:2])]
    policies = fitting(decoder, [*registry().policies, "fixed:1", "fixed:7", Curious, EveryOther])
    assert len(policies) >= 5
    for policy in policies:
        assert check(decoder, policy, traces, options) > 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_is_the_live_decoder_step_for_step_on_the_shipped_pair(shipped: ShippedPair, temperature: float) -> None:
    decoder = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:6", tokenizer=shipped.tokenizer)
    options = TraceOptions(
        tuple(range(2, 17)),
        24,
        {"temperature": temperature},
        None if temperature == 0 else 5,
        OF_THE_CONTEXT | {Feature.DRAFT_HIDDEN},
    )
    tracer = Tracer(decoder, options)
    one_of_each_domain = list(enumerate(choose_prompts(None, [], 2)))[1::2]
    traces = [tracer.trace(i, prompt) for i, prompt in one_of_each_domain]
    assert temperature == 0 or min(trace.output_length for trace in traces) < 24, "a text that ends by itself"
    policies = fitting(decoder, OF_THE_SHIPPED_PAIR)
    assert policies == OF_THE_SHIPPED_PAIR
    for policy in policies:
        assert check(decoder, policy, traces, options) > 0


def test_the_sure_share_of_a_draft_is_charged(pair: TinyPair) -> None:
    """`features` are paid by those that want them, and by nobody else."""
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)
    trace = Tracer(decoder, TraceOptions((2, 4), 12)).trace(0, Prompt("a", "tiny", TEXTS[0]))
    plain = Replayer(decoder.spec, "fixed:4", COST).run(trace)
    sure = Replayer(decoder.spec, "threshold:0,block_size=4", COST).run(trace)
    assert plain.block_size.tolist() == sure.block_size.tolist() == [4] * plain.steps
    assert sure.seconds(COST) - plain.seconds(COST) == pytest.approx(1e-4 * plain.steps)
    assert not plain.work[0].features
    assert sure.work[0].features


def test_decision_time_is_measured_beside_the_modelled_time() -> None:
    trace = synthetic_prompt(0)
    spec = _spec()
    slow = Replayer(spec, _Sleepy(), COST).run(trace)
    quick = Replayer(spec, "fixed:4", COST).run(trace)
    assert np.median(slow.step_seconds) > 2e-3 > np.median(quick.step_seconds)
    assert slow.begin_seconds > 2e-3
    assert slow.seconds(COST) == pytest.approx(quick.seconds(COST))


class _Sleepy(Policy):
    wants = frozenset()

    def begin(self, context: Context) -> dict[str, Any]:
        import time

        time.sleep(0.002)
        return {}

    def select(self, state: Any, context: Context) -> Tensor:
        self.begin(context)
        return context.full(4)


@pytest.mark.parametrize("kind", ["block-diffusion", "autoregressive", "n-gram"])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_the_walk_of_a_fixed_size_is_its_replay(kind: str, block_size: int) -> None:
    """What the oracles compare with, and what the loop does, are the same."""
    traces = (synthetic_prompt(0), synthetic_prompt(1, max_new_tokens=60), synthetic_prompt(2, output_length=1))
    for trace in traces:
        path = fixed_path(trace, work_of(kind), COST, block_size)
        replayed = Replayer(replace(_spec(), drafter_kind=kind, work=work_of(kind)), f"fixed:{block_size}", COST).run(
            trace
        )
        for name in ("position", "block_size", "verify_length", "num_accepted"):
            assert getattr(path, name).tolist() == getattr(replayed, name).tolist(), name
        assert path.seconds == pytest.approx(replayed.seconds(COST), rel=1e-12)


def _spec() -> Any:
    from bpkit.types import DecoderSpec

    return DecoderSpec("target", "drafter", "block-diffusion", 8, 8, 8, 100)


def test_a_block_size_that_was_not_traced_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(TraceError, match=r"block size 5 was asked for.*1\+2\+3\+4\+6\+8.*--block-sizes 2-8"):
        Replayer(_spec(), "fixed:5", COST).run(synthetic_prompt(0))


def test_a_feature_that_the_trace_lacks_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(PolicyError, match=r"Curious wants .*draft_hidden.*--features draft_hidden.*--recompute"):
        Replayer(_spec(), Curious(), COST).run(synthetic_prompt(0))


def test_missing_features_are_computed_again_from_the_models(pair: TinyPair, tmp_path: Path) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)
    extra = OF_THE_CONTEXT | {Feature.DRAFT_HIDDEN}
    prompts = [Prompt(str(i), "tiny", text) for i, text in enumerate(TEXTS)]
    replays = []
    for name, features in (("bare", frozenset()), ("full", extra)):
        options = TraceOptions(tuple(range(2, 11)), 20, {"temperature": 1.0}, 3, features)
        run_job(tmp_path / name, describe(decoder, prompts, options), prompts, Tracer(decoder, options))
        trace = open_trace(tmp_path / name)
        replayer = Replayer(trace.spec, Curious(), COST, seed=3, strict=True, fill=Recompute(decoder, trace.manifest))
        replays.append([replayer.run(prompt) for prompt in trace])
    for bare, full in zip(*replays, strict=True):
        assert bare.block_size.tolist() == full.block_size.tolist()
        assert bare.verify_length.tolist() == full.verify_length.tolist()


def test_features_are_not_computed_again_from_other_models(pair: TinyPair, tmp_path: Path) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)
    manifest = describe(decoder, [Prompt("a", "b", "c")], TraceOptions((2, 3)))
    other = SpeculativeDecoder(pair.assistant, pair.autoregressive(), "fixed:4", tokenizer=pair.tokenizer)
    with pytest.raises(TraceError, match="the target is not the one that was traced"):
        Recompute(other, manifest)
