"""Several sources of drafts in one decoder: the text stays plain decoding's, live and in replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpkit_prometheus.observer import Prometheus
from prometheus_client import CollectorRegistry
from torch import Tensor
from typer.testing import CliRunner

from bpkit.cli.generate import describe
from bpkit.cli.main import build_app
from bpkit.decode.clock import CostClock, price
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import EachRow, Offer, Proposal, proposed
from bpkit.decode.sources import Sources, sources_of
from bpkit.decode.text import RunningText
from bpkit.draft.ngram import NgramDrafter
from bpkit.judge.sources import counts_of_steps
from bpkit.judge.wall_clock.decoders import PolicyDecoder
from bpkit.policy import Policy, PolicyConfig, PolicyError
from bpkit.prompts import Prompt
from bpkit.registry.resolve import each_drafter
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.collect.job import describe as describe_job
from bpkit.trace.collect.job import run_job
from bpkit.trace.cost import CostError, CostTable, read_cost, write_cost
from bpkit.trace.replay import Replayer
from bpkit.trace.store.joined import JoinedTrace, open_trace
from bpkit.trace.store.manifest import TraceError
from bpkit.types import OF_THE_SOURCES, Context, Draft, Feature, Plan, Step, Work, of_source

TEXTS = ("f(x) = 2 * x", "a, b, a, b, a, ", "Once", '{"a": 1, "a": 1,')
PROMPTS = [Prompt(f"p{i}", f"domain {i % 2}", text) for i, text in enumerate(TEXTS)]
SIZES = (2, 3, 5)
COST = CostTable(
    draft={2: 0.3, 5: 0.5},
    catch_up={2: 0.1, 8: 0.4},
    verify={1: 1.0, 5: 1.2},
    rest=0.1,
    sources=(
        CostTable(draft={5: 0.01}, verify={1: 1.0, 5: 1.2}, rest=0.1),
        CostTable(draft={2: 0.2, 5: 0.9}, catch_up={2: 0.2, 8: 0.3}, verify={1: 1.0, 5: 1.2}, rest=0.1),
    ),
)


class Chance(Policy):
    """Draws source and block size of each row, and notes what it knew."""

    wants = OF_THE_SOURCES

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config)
        self.seen: list[tuple[Any, ...]] = []

    def select(self, state: Any, context: Context) -> Plan:
        rows, sources = context.batch_size, context.spec.sources
        source = torch.randint(len(sources), (rows,), generator=context.generator)
        size = torch.randint(1, 6, (rows,), generator=context.generator)
        known = [context[name].tolist() for name in sorted(OF_THE_SOURCES)]
        self.seen.append((int(context.position[0]), source.tolist(), size.tolist(), *known))
        return Plan(size, source)

    def truncate(self, state: Any, draft: Draft) -> Tensor:
        return (draft.draft_length - (draft.source == 1).long()).clamp(min=0)


def sources(pair: TinyPair) -> list[Any]:
    return [pair.block_diffusion(), NgramDrafter(block_size=5), pair.agreeable()]


def decoder_of(pair: TinyPair, policy: Any = None, **options: Any) -> SpeculativeDecoder:
    given = {"tokenizer": pair.tokenizer, "strict": True, "max_block_size": 5, **options}
    return SpeculativeDecoder(pair.target, sources(pair), policy or Chance(), **given)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_that_of_plain_decoding(pair: TinyPair, rule: str, temperature: float) -> None:
    """One row and four, which draft from different sources in one step."""
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    plain = decoder_of(pair, "fixed:1").generate(list(TEXTS), batch_size=1, **options)
    decoder = decoder_of(pair, rule=rule)
    many = decoder.generate(list(TEXTS), batch_size=4, **options)
    alone = [decoder.generate(text, stream_id=place, **options) for place, text in enumerate(TEXTS)]
    if rule == "coupled" or temperature == 0:
        for ours in (many, alone):
            assert [one.tokens.tolist() for one in ours] == [one.tokens.tolist() for one in plain]
    mixed = [step for one in many for step, _ in one.records if isinstance(step, Step) and len(step.row_ids) > 1]
    assert any(len(set(step.source[step.draft_length > 0].tolist())) > 1 for step in mixed)
    assert sum(int(step.num_accepted[step.source == 2].sum()) for step in mixed) > 0
    assert {int(step.source) for one in alone for step in one.steps} == {0, 1, 2}


def traces_of(pair: TinyPair, folder: Path, **sampling: float) -> JoinedTrace:
    """Traces of all sources, one with the outputs of the other."""
    for place, source in enumerate(sources(pair)):
        decoder = SpeculativeDecoder(pair.target, source, "fixed:4", tokenizer=pair.tokenizer)
        seed = 1 if sampling.get("temperature") else None
        options = TraceOptions(
            SIZES, 20, sampling or {"temperature": 0.0}, seed, outputs_of=str(folder / "0") if place else None
        )
        run_job(folder / str(place), describe_job(decoder, PROMPTS, options), PROMPTS, Tracer(decoder, options))
    opened = open_trace(folder)
    assert isinstance(opened, JoinedTrace)
    return opened


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_replay_decides_as_the_decoder_does(pair: TinyPair, sampling: dict[str, float], tmp_path: Path) -> None:
    """Steps, sources, what policies know and what steps cost are the same, at sizes that were traced."""

    class Traced(Chance):
        def select(self, state: Any, context: Context) -> Plan:
            plan = super().select(state, context)
            return Plan(torch.where(plan.block_size == 4, 5, plan.block_size), plan.source)

    trace = traces_of(pair, tmp_path, **sampling)
    live, replayed = Traced(), Traced()
    decoder = decoder_of(pair, live, clock=CostClock(COST))
    replayer = Replayer(trace.spec, replayed, COST, seed=trace.manifest.seed, strict=True)
    options = {"max_new_tokens": 20, "temperature": 0.0, **sampling, "seed": trace.manifest.seed}
    for prompt, text in zip(trace, TEXTS, strict=True):
        generation = decoder.generate(text, stream_id=prompt.index, **options)
        walked = replayer.run(prompt)
        for name in ("position", "source", "block_size", "draft_length", "verify_length", "num_accepted"):
            assert [int(getattr(step, name)) for step in generation.steps] == getattr(walked, name).tolist(), name
        assert [step.seconds.total for step in generation.steps] == pytest.approx(
            [price(COST, work).total for work in walked.work]
        )
    assert live.seen == replayed.seen
    assert {source for _, (source,), *_ in live.seen} == {0, 1, 2}
    matches = [match for _, _, _, match, *_ in live.seen]
    assert any(row[1] > 0 for (row,) in matches)


def test_offers_matches_and_success_are_what_they_say(pair: TinyPair) -> None:
    policy = Chance()
    generation = decoder_of(pair, policy).generate("a, b, a, b, a, ", max_new_tokens=20, temperature=0)
    success = [0.5, 0.5, 0.5]
    for step, (position, _, _, match, offer, share, known, support) in zip(generation.steps, policy.seen, strict=True):
        assert int(step.position) == position
        assert known == [pytest.approx(success)]
        assert (share, support) == ([[1.0, float(offer[0][1] > 0), 1.0]], [[0, 0, 0]])
        assert offer[0][0] == offer[0][2] == 4
        assert match[0][0] == match[0][2] == 0
        assert (offer[0][1] > 0) == (match[0][1] > 0)
        source, count = int(step.source), int(step.verify_length)
        if int(step.block_size) > 1 and source == 1:
            assert int(step.draft_length) == min(int(step.block_size) - 1, offer[0][1])
        agreed = step.offer_agreed
        assert agreed is not None
        assert agreed[0, [0, 2]].tolist() == [-1, -1]
        assert 0 <= int(agreed[0, 1]) <= min(offer[0][1], int(step.acceptance_length))
        if source == 1 and count:
            assert int(agreed[0, 1]) >= int(step.num_accepted)
        if count:
            success[source] += 0.2 * (int(step.num_accepted) / count - success[source])


def test_a_source_that_was_idle_reads_what_it_missed(pair: TinyPair, tmp_path: Path) -> None:
    """What waits for a model grows by the tokens that another source yielded, live and in replay."""

    class InTurn(Policy):
        wants = frozenset()

        def select(self, state: Any, context: Context) -> Plan:
            turn = int(context.position) % 3
            return Plan(context.full(5), context.full(0 if turn == 0 else 2))

    decoder = decoder_of(pair, InTurn())
    rows = decoder.rows("f(x) = 2 * x", max_new_tokens=24, temperature=0)
    assert [source.work.waits for source in decoder.spec.sources] == [True, False, True]
    generation = decoder.generate("f(x) = 2 * x", max_new_tokens=24, temperature=0)
    assert {int(step.source) for step in generation.steps} == {0, 2}
    assert len(rows.drafter.session.sessions) == 3
    trace = traces_of(pair, tmp_path)
    walked = Replayer(trace.spec, InTurn(), COST, strict=True).run(trace[0])
    waited, expected = walked.prompt_length if hasattr(walked, "prompt_length") else trace[0].prompt_length, []
    for source, accepted in zip(walked.source.tolist(), walked.num_accepted.tolist(), strict=True):
        if source == 0:
            expected.append(waited)
            waited = accepted + 1
        else:
            waited += accepted + 1
    assert [work.waiting for work in walked.work if work.source == 0] == expected


def test_bad_plans_are_mended_or_told(pair: TinyPair) -> None:
    class Bad(Policy):
        wants = frozenset()
        plan: Any = None

        def select(self, state: Any, context: Context) -> Any:
            return type(self).plan

    def told(block_size: Any, source: Any) -> str:
        Bad.plan = Plan(block_size, source)
        with pytest.raises(Exception, match=r"Bad\.select") as found:
            decoder_of(pair, Bad()).generate("x", max_new_tokens=6)
        with pytest.warns(UserWarning, match="said once"):
            mended = decoder_of(pair, Bad(), strict=False).generate("x", max_new_tokens=6, temperature=0)
        plain = decoder_of(pair, "fixed:1").generate("x", max_new_tokens=6, temperature=0)
        assert torch.equal(mended.tokens, plain.tokens)
        return str(found.value)

    one = torch.tensor([3])
    assert "[3] for sources, of which there are 3, numbered from 0" in told(one, torch.tensor([3]))
    assert "[-1] for sources" in told(one, torch.tensor([-1]))
    assert "shape [2]" in told(one, torch.tensor([0, 1]))
    assert "an int (1)" in told(one, 1)
    assert "above 5" in told(torch.tensor([9]), torch.tensor([2]))


def test_policies_that_name_no_source_draft_from_the_first(pair: TinyPair) -> None:
    many = decoder_of(pair, "fixed:4").generate("f(x) = 2 * x", max_new_tokens=20, temperature=0)
    alone = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)
    one = alone.generate("f(x) = 2 * x", max_new_tokens=20, temperature=0)
    assert [step.num_accepted.tolist() for step in many.steps] == [step.num_accepted.tolist() for step in one.steps]
    assert {int(step.source) for step in many.steps} == {0}


def test_fixed_drafts_from_the_source_that_it_is_told(pair: TinyPair) -> None:
    steps = decoder_of(pair, "fixed:4,source=1").generate("f(x) = 2 * x", max_new_tokens=20, temperature=0).steps
    assert {int(step.source) for step in steps} == {1}
    trained = decoder_of(pair, "fixed:source=2")
    assert repr(trained.policy) == "Fixed(block_size=None, source=2)"
    assert int(trained.generate("x", max_new_tokens=8, temperature=0).steps[0].block_size) == (
        trained.spec.sources[2].trained_block_size
    )
    with pytest.raises(PolicyError, match="3 sources of drafts, numbered from 0, and option `source` is 3"):
        decoder_of(pair, "fixed:source=3")


def test_drafters_are_named_in_a_list_or_in_one_text(pair: TinyPair) -> None:
    assert each_drafter("ngram:max_ngram=4+ngram") == ["ngram:max_ngram=4", "ngram"]
    assert each_drafter(["ngram", {"name": "ngram"}]) == ["ngram", {"name": "ngram"}]
    assert each_drafter("ngram:x=1+2+ngram") == ["ngram:x=1+2", "ngram"]
    assert each_drafter("folder+1") == ["folder+1"]
    assert each_drafter("ngram+nggram") == ["ngram", "nggram"]
    for written in ("ngram:max_ngram=4+ngram", ["ngram:max_ngram=4", "ngram"]):
        decoder = SpeculativeDecoder(pair.target, written, "fixed:4")
        first, second = sources_of(decoder.drafter)
        assert (list(first.sizes), list(second.sizes)) == ([4, 3, 2, 1], [3, 2, 1])  # type: ignore[attr-defined]
        assert decoder.spec.drafter_kind == "n-gram"
        assert len(decoder.spec.sources) == 2
    with pytest.raises(ValueError, match="no drafter was given"):
        Sources([])
    with pytest.raises(ValueError, match="all of them in one list"):
        Sources([Sources([NgramDrafter(), NgramDrafter()]), NgramDrafter()])


def test_calls_with_other_drafters_are_kept_apart(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, "ngram", "fixed:4", tokenizer=pair.tokenizer)
    several = decoder._for_call(None, "ngram+ngram:max_ngram=2")
    assert len(several.spec.sources) == 2
    assert decoder._for_call(None, ["ngram", "ngram:max_ngram=2"]) is several
    assert decoder._for_call(None, "ngram") is decoder


def test_what_cannot_be_traced_is_refused(pair: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several drafters: trace each by itself"):
        Tracer(decoder_of(pair, "fixed:4"), TraceOptions(SIZES))
    drafter = NgramDrafter()
    drafter.depends_on_steps = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no trace holds that"):
        Tracer(SpeculativeDecoder(pair.target, drafter, "fixed:4"), TraceOptions(SIZES))


def test_no_source_is_traced_where_one_cannot_be(tiny_folder: Path, tmp_path: Path) -> None:
    given = ["--target", str(tiny_folder / "target"), "--drafter", "ngram+last-pass", "--limit", "1"]
    result = CliRunner().invoke(build_app(), ["trace", "--out", str(tmp_path / "trace"), *given])
    assert result.exit_code == 2
    assert "no trace holds that" in result.stderr
    assert not (tmp_path / "trace").exists()


def test_traces_of_other_outputs_are_not_joined(pair: TinyPair, tmp_path: Path) -> None:
    decoder = SpeculativeDecoder(pair.target, NgramDrafter(), "fixed:4", tokenizer=pair.tokenizer)
    for name, tokens in (("a", 8), ("b", 9)):
        options = TraceOptions(SIZES, tokens)
        run_job(tmp_path / name, describe_job(decoder, PROMPTS, options), PROMPTS, Tracer(decoder, options))
    with pytest.raises(TraceError, match=r"max_new_tokens: 8, not 9.*--outputs-of"):
        open_trace(f"{tmp_path}/a+{tmp_path}/b")
    both = open_trace(f"{tmp_path}/a+{tmp_path}/a")
    assert [len(prompt.sources) for prompt in both] == [2] * len(PROMPTS)
    np.testing.assert_array_equal(both[0].drafts.tokens, both[0].others[0].tokens)


def test_a_cost_table_prices_each_source(tmp_path: Path) -> None:
    assert of_source(COST, 0) is COST
    assert of_source(COST, 2).seconds("draft", 3, 0) == 0.9
    with pytest.raises(CostError, match=r"prices 3 source\(s\) of drafts, and source 3 was asked for"):
        of_source(COST, 3)
    free = CostTable(verify={1: 1.0, 5: 1.0})
    assert of_source(free, 2) is free
    work = Work(5, 1, 5, 10, rows=2, drafted=9, verified=8)
    assert work.drafts[0].drafted == 9
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_cost(CostTable(draft={5: 0.5}, verify={1: 1.0, 5: 1.5}), first)
    write_cost(CostTable(draft={5: 0.1}, verify={1: 7.0, 5: 9.0}, rest=3.0), second)
    joined = read_cost(f"{first}+{second}").table()
    assert (joined.of_source(1).seconds("draft", 5, 0), joined.of_source(1).seconds("verify", 5, 0)) == (0.1, 1.5)
    assert joined.of_source(1).rest == 0
    wider = COST.with_sources([CostTable(draft={8: 0.1}, verify={1: 7.0, 5: 9.0, 8: 9.5})])
    for source in range(4):  # passes wider than the first table's are the other's
        assert [wider.of_source(source).seconds("verify", width, 0) for width in (5, 8)] == [1.2, 9.5]
    write_cost(joined, tmp_path / "both.json")
    again = read_cost(tmp_path / "both.json").table()
    assert again.sources == joined.sources
    mixed = Work(5, 0, 5, 10, rows=1, source=1)
    assert price(joined, mixed).total == pytest.approx(0.1 + 1.5)


def test_a_cost_model_of_one_source_says_so() -> None:
    class Plain:
        def seconds(self, phase: str, size: int, context_length: int) -> float:
            return 1.0

    with pytest.raises(ValueError, match="prices drafts of source 0 only, and source 1"):
        price(Plain(), Work(3, 1, 3, 9, source=1))


def test_features_that_a_source_does_not_have_are_nan(pair: TinyPair) -> None:
    seen: list[Tensor] = []

    class Sees(Chance):
        wants = OF_THE_SOURCES | {Feature.DRAFT_PROBABILITY, Feature.DRAFT_TOKENS}

        def truncate(self, state: Any, draft: Draft) -> Tensor:
            for row, source in enumerate(draft.source.tolist()):
                known = draft[Feature.DRAFT_PROBABILITY][row, : int(draft.draft_length[row])]
                if len(known):
                    seen.append(known)
                    assert bool(known.isnan().all()) == (source == 1)
            return draft.draft_length

    decoder_of(pair, Sees()).generate(list(TEXTS), batch_size=4, max_new_tokens=20, temperature=0)
    assert len(seen) > 10


def test_observers_and_reports_tell_which_source_drafted(pair: TinyPair, tmp_path: Path) -> None:
    file, registry = tmp_path / "steps.jsonl", CollectorRegistry()
    decoder = decoder_of(pair, Chance(), observers=[f"jsonl:{file}", Prometheus(registry=registry)])
    result = decoder.generate("a, b, a, b, a, ", max_new_tokens=30, temperature=0)
    logged = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert logged[0]["drafter"].count(" + ") == 2
    steps = [line for line in logged if line["event"] == "step"]
    assert [line["source"] for line in steps] == [int(step.source) for step in result.steps]

    counts = counts_of_steps(decoder.spec, result.steps)
    assert sum(steps for steps, _ in counts.values()) == len(result.steps)
    assert sum(tokens for _, tokens in counts.values()) == result.tokens.shape[1] - 1
    labels = {"policy": "Chance", "drafter": logged[0]["drafter"]}
    for place, (name, (steps_of, tokens)) in zip(("none", "0", "1", "2"), counts.items(), strict=True):
        found = registry.get_sample_value("bpkit_steps_by_source_total", {**labels, "source": place}) or 0
        stood = registry.get_sample_value("bpkit_accepted_tokens_by_source_total", {**labels, "source": place}) or 0
        assert (found, found + stood) == (steps_of, tokens), name
    assert len([steps for steps, _ in counts.values() if steps]) > 2
    said = describe(result, 1.0, decoder.spec)
    assert any(line.startswith("by source, % of steps / % of their tokens: no draft ") for line in said)

    ours = PolicyDecoder("chance", decoder, {"temperature": 0, "max_new_tokens": 30}, 0)
    assert dict(ours.run(pair.ids("a, b, a, b, a, "), 0).sources).keys() == counts.keys()


def test_a_store_that_makes_no_offers_is_not_asked(pair: TinyPair) -> None:
    class Silent:
        def advance(self, features: Any) -> None: ...

        def draft(self, block_size: int, draw: Any, go_on: Any) -> Proposal:
            return proposed(Offer([5] * (block_size - 1)))

    class Mute(NgramDrafter):
        def begin(self, text: RunningText) -> EachRow:
            return EachRow(text, lambda row: Silent())

    policy = Chance()
    decoder = SpeculativeDecoder(pair.target, [Mute(), NgramDrafter()], policy, tokenizer=pair.tokenizer, strict=True)
    made = decoder.generate("a, b, a, b, a, ", max_new_tokens=12, temperature=0)
    plain = decoder_of(pair, "fixed:1").generate("a, b, a, b, a, ", max_new_tokens=12, temperature=0)
    assert torch.equal(made.tokens, plain.tokens)
    assert all(int(step.offer_agreed[0, 0]) == -1 for step in made.steps if step.offer_agreed is not None)
    options = TraceOptions(SIZES, 8)
    traced = Tracer(SpeculativeDecoder(pair.target, Mute(), "fixed:4", tokenizer=pair.tokenizer), options)
    assert traced.trace(0, PROMPTS[0]).drafts.match_length is None
