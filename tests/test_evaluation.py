"""The evaluation: figures worked out by hand, effects that were planted, and the files that come out."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bpkit.cli.main import build_app
from bpkit.judge.evaluation import evaluate
from bpkit.judge.evaluation.bounds import describe_choices, steps_beside
from bpkit.judge.evaluation.page import html_report
from bpkit.judge.evaluation.tables import print_evaluation
from bpkit.judge.statistics import Bootstrap, shares_of_gap
from bpkit.judge.tables import Table, TableRow
from bpkit.policy import PolicyError
from bpkit.testing.traces import synthetic_prompts
from bpkit.trace.cost import CostTable, flat, linear, write_cost
from bpkit.trace.oracle.paths import FixedChoice, fixed_path, oracle_step_truncate
from bpkit.trace.records import DraftTable, PromptTrace
from bpkit.trace.store.manifest import Manifest, ModelFacts, TraceError
from bpkit.trace.store.storage import TraceWriter
from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION, DecoderSpec, Feature, work_of

SPEC = DecoderSpec("target", "drafter", BLOCK_DIFFUSION, 4, 4, hidden_size=1, vocab_size=64)
BY_HAND = CostTable(
    name="by hand", unit="plain steps", draft={2: 0.5, 4: 1.0}, verify={1: 1.0, 2: 1.5, 3: 1.75, 4: 2.0}
)
"""A step of block size 1, 2, 4 takes 1, 2, 3."""

POLICIES = '''
import time
from bpkit import Feature, Policy

class ByPrompt(Policy):
    """4 where the planted feature says that drafts stand, else 1."""
    wants = frozenset({Feature.PREFILL_HIDDEN})
    def begin(self, context):
        return {"size": 1 + 3 * (context[Feature.PREFILL_HIDDEN][:, 0] > 0).long()}
    def select(self, state, context):
        return state["size"]

class FirstOnly(Policy):
    """4 on the first prompt that it ever meets, then 1."""
    wants = frozenset()
    def __init__(self, config=None, **options):
        super().__init__(config, **options)
        self.met = 0
    def begin(self, context):
        self.met += 1
        return {}
    def select(self, state, context):
        return context.full(4 if self.met == 1 else 1)
    def state_dict(self):
        return {"met": self.met}

class Slow(Policy):
    wants = frozenset()
    def select(self, state, context):
        time.sleep(0.001)
        return context.full(4)

class Hasty(Policy):
    """Ends every draft after two tokens."""
    wants = frozenset()
    def select(self, state, context):
        return context.full(4)
    def extend(self, state, draft):
        return draft.draft_length < 2

class Broken(Policy):
    wants = frozenset()
    def select(self, state, context):
        raise RuntimeError("no")
'''


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    path = tmp_path_factory.mktemp("policies") / "planted.py"
    path.write_text(POLICIES, encoding="utf-8")
    return lambda name: f"{path}:{name}"


def crafted(index: int, *, stands: bool, domain: str | None = None, length: int = 13) -> PromptTrace:
    """A prompt whose drafts stand whole, or not at all; the prefill feature says which.

    Of 12 tokens that steps decide, sizes 1, 2 and 4 take 12, 6 and 3 steps where drafts stand, else 12 each. That is
    12, 12 and 9 by hand, or 12, 24 and 36.
    """
    rows = length - 1
    left = (rows - 1 - np.arange(rows))[:, None]
    lengths = np.broadcast_to(np.array([1, 3], np.int32), (rows, 2)).copy()
    accepted = np.minimum(lengths, left) if stands else np.zeros((rows, 2))
    return PromptTrace(
        index=index,
        id=f"p{index}",
        domain=domain or ("stands" if stands else "falls"),
        max_new_tokens=100,
        prompt_tokens=np.zeros(5, np.int32),
        output_tokens=np.ones(length, np.int32),
        prefill_top_tokens=np.arange(64, dtype=np.int32),
        prefill_top_log_probabilities=np.zeros(64, np.float32),
        prefill_entropy=1.0,
        near_ties=np.zeros(0, np.int32),
        drafts=DraftTable(
            block_sizes=np.array([2, 4], np.int32),
            draft_length=lengths,
            num_accepted=accepted.astype(np.int32),
            tokens=np.ones((rows, 2, 3), np.int32),
        ),
        features={Feature.PREFILL_HIDDEN: np.array([1.0 if stands else -1.0], np.float32)},
    )


def half_and_half(count: int) -> list[PromptTrace]:
    return [crafted(i, stands=i % 2 == 0) for i in range(count)]


def judged(prompts: list[PromptTrace], policies: dict[str, str], **options: Any) -> dict[str, Any]:
    """Everything under the costs by hand."""
    return judged_under(BY_HAND, prompts, policies, **options)["cost_models"]["by hand"]  # type: ignore[no-any-return]


def judged_under(
    cost: CostTable, prompts: list[PromptTrace], policies: dict[str, str], **options: Any
) -> dict[str, Any]:
    return evaluate(prompts, SPEC, policies, [cost], **{"permutations": 0, "seed": 1, **options})


# Figures by hand


def test_figures_of_crafted_prompts(policy: Callable[[str], str]) -> None:
    result = judged(half_and_half(40), {"fixed:4": "fixed:4", "by prompt": policy("ByPrompt")})
    group = result["overall"]
    assert (group["prompts"], group["tokens"]) == (16, 16 * 12)
    # 9 and 36 at size 4, 12 and 24 at size 2, 12 and 12 at size 1: plain decoding is best over all.
    assert group["best_fixed"]["block_size"] == 1
    assert group["best_fixed"]["tokens_per_second"] == pytest.approx(1.0)
    assert group["fixed"]["4"]["tokens_per_second"] == pytest.approx(24 / 45)
    assert group["fixed"]["4"]["acceptance_length"] == pytest.approx(24 / 15)
    assert group["fixed"]["4"]["acceptance_length_per_prompt"] == pytest.approx((4 + 1) / 2)
    assert group["oracle"]["prompt"]["tokens_per_second"] == pytest.approx(24 / 21)
    assert group["oracle"]["prompt"]["acceptance_length"] == pytest.approx(24 / 15)
    fixed = group["policies"]["fixed:4"]
    assert fixed["tokens_per_second_ratio"]["value"] == pytest.approx(24 / 45)
    low, high = fixed["tokens_per_second_ratio"]["interval"]
    assert low < 24 / 45 < high
    assert fixed["gap_share"]["value"] == pytest.approx((24 / 45 - 1) / (24 / 21 - 1))
    assert fixed["options"] == {"block_size": 4, "source": 0}


def test_a_planted_effect_is_found_whole(policy: Callable[[str], str]) -> None:
    group = judged(half_and_half(40), {"by prompt": policy("ByPrompt")})["overall"]
    planted = group["policies"]["by prompt"]
    assert planted["tokens_per_second_ratio"]["value"] == pytest.approx(24 / 21)
    assert planted["tokens_per_second_ratio"]["interval"][0] > 1
    # No choice of steps does better than 4 where drafts stand and 1 where they fall: it takes the whole gap.
    assert planted["gap_share"]["value"] == pytest.approx(1)
    assert planted["gap_share"]["interval"] == pytest.approx([1, 1])
    assert (planted["memory"], planted["tuned"], planted["fallbacks"]) == (False, False, 0)


def test_whoever_does_what_the_best_fixed_size_does_is_exactly_as_fast() -> None:
    result = judged(half_and_half(40), {"fixed:1": "fixed:1"})
    for group in (result["overall"], *result["domains"].values()):
        same = group["policies"]["fixed:1"]["tokens_per_second_ratio"]
        assert same["value"] == pytest.approx(1, abs=1e-12)
        assert same["interval"] == pytest.approx([1, 1], abs=1e-12)


def test_no_share_is_given_where_there_may_be_no_gap() -> None:
    stands = [crafted(i, stands=True) for i in range(20)]
    group = judged(stands, {"fixed:2": "fixed:2"})["overall"]
    assert group["best_fixed"]["block_size"] == 4
    assert group["gap"]["interval"] == pytest.approx([0, 0], abs=1e-12)
    share = group["policies"]["fixed:2"]["gap_share"]
    assert (share["value"], share["interval"]) == (None, None)
    assert "touches zero" in share["reason"]
    # One prompt in 20 with something to gain is missing from more than 2.5% of the resamples.
    rare = [crafted(i, stands=i > 0) for i in range(20)]
    found = judged(rare, {"fixed:2": "fixed:2"}, split=(0.0, 0.05, 0.95), seed=0)["overall"]
    assert found["gap"]["tokens_per_second"] > 0.01
    assert found["policies"]["fixed:2"]["gap_share"]["value"] is None


def test_domains_have_figures_of_their_own_and_share_the_best_fixed_size(policy: Callable[[str], str]) -> None:
    domains = judged(half_and_half(40), {"fixed:4": "fixed:4"})["domains"]
    assert list(domains) == ["stands", "falls"]
    for domain, own, ratio, at_four in (("stands", 4, 12 / 9, 12 / 9), ("falls", 1, 1.0, 12 / 36)):
        group = domains[domain]
        assert group["prompts"] == 8
        assert group["best_fixed"]["block_size"] == 1
        assert group["best_fixed_of_domain"]["block_size"] == own
        assert group["best_fixed_of_domain"]["tokens_per_second_ratio"]["value"] == pytest.approx(ratio)
        assert group["policies"]["fixed:4"]["tokens_per_second_ratio"]["value"] == pytest.approx(at_four)


def test_nothing_is_chosen_on_test_prompts() -> None:
    # Validation prompts are told by their ids; make drafts stand on them alone, against all test prompts.
    probe = judged_under(BY_HAND, half_and_half(40), {})["split"]
    chosen_on = set(probe["validation"])
    prompts = [crafted(i, stands=f"p{i}" in chosen_on, domain="one" if i % 2 else "two") for i in range(40)]
    again = judged_under(BY_HAND, prompts, {}, seed=1)
    if set(again["split"]["validation"]) != chosen_on:  # the domains' names do not matter, their members do
        pytest.fail("the split is not what it was")
    group = again["cost_models"]["by hand"]["overall"]
    assert group["best_fixed"]["block_size"] == 4
    assert group["best_fixed"]["tokens_per_second"] == pytest.approx(1 / 3)


# Memory


def test_policies_with_memory_are_judged_in_several_orders(policy: Callable[[str], str]) -> None:
    prompts = half_and_half(30)
    report = judged_under(BY_HAND, prompts, {"first": policy("FirstOnly")}, orders=5, seed=7)
    first = report["cost_models"]["by hand"]["overall"]["policies"]["first"]
    assert first["memory"] is True
    assert first["orders"] == [7, 8, 9, 10, 11]
    test = [int(prompt_id[1:]) for prompt_id in report["split"]["test"]]
    ratios = []
    for seed in first["orders"]:
        met_first = test[random.Random(seed).sample(range(len(test)), len(test))[0]]
        all_plain = 12 * len(test)
        ratios.append(all_plain / (all_plain - 12 + (9 if met_first % 2 == 0 else 36)))
    assert len(set(ratios)) == 2, "choose another seed: both kinds of prompts must come first"
    assert first["tokens_per_second_ratio"]["value"] == pytest.approx(np.mean(ratios))
    assert first["tokens_per_second_ratio"]["interval"] == pytest.approx([min(ratios), max(ratios)])
    low, high = first["tokens_per_second_ratio"]["interval_over_prompts"]
    assert low < np.mean(ratios) < high
    # In each domain: the prompt that came first is counted where it belongs.
    domains = report["cost_models"]["by hand"]["domains"]
    for domain, at_four, slower in (("stands", 9, False), ("falls", 36, True)):
        figure = domains[domain]["policies"]["first"]["tokens_per_second_ratio"]
        plain = 12 * domains[domain]["prompts"]
        met = plain / (plain - 12 + at_four)
        assert figure["interval"] == pytest.approx([met, 1] if slower else [1, met])


def test_real_learners_begin_afresh_in_each_order() -> None:
    reports = [judged_under(BY_HAND, half_and_half(24), {"ucb": "ucb"}, orders=2, tune=False) for _ in range(2)]
    one, two = (r["cost_models"]["by hand"]["overall"]["policies"]["ucb"] for r in reports)
    assert one["tokens_per_second_ratio"] == two["tokens_per_second_ratio"]
    assert one["options"]["block_sizes"] == [1, 2, 4]


# Time that decisions take


def test_decision_time_is_charged_in_seconds_only(policy: Callable[[str], str]) -> None:
    seconds = BY_HAND.model_copy(update={"name": "seconds", "unit": "seconds"})
    scale = 1e-3  # a step of size 4 takes 3 ms, and the policy a third of that on top
    fast = CostTable(
        name="seconds",
        unit="seconds",
        draft={size: scale * value for size, value in seconds.draft.items()},
        verify={size: scale * value for size, value in seconds.verify.items()},  # type: ignore[operator]
    )
    prompts = [crafted(i, stands=True) for i in range(10)]
    report = evaluate(prompts, SPEC, {"slow": policy("Slow")}, [BY_HAND, fast], permutations=0)
    free, paid = (report["cost_models"][name] for name in ("by hand", "seconds"))
    assert (free["decision_time_charged"], paid["decision_time_charged"]) == (False, True)
    assert free["overall"]["policies"]["slow"]["tokens_per_second_ratio"]["value"] == pytest.approx(1)
    assert free["overall"]["policies"]["slow"]["decision_share"] is None
    slow = paid["overall"]["policies"]["slow"]
    spent = slow["decision_seconds_per_step"]
    assert spent > 1e-3
    total = 3 * (3e-3 + spent) + slow["decision_seconds_per_prompt"]  # three steps of 3 ms
    assert slow["tokens_per_second"] == pytest.approx(12 / total)
    assert slow["decision_share"] == pytest.approx(1 - 9e-3 / total)
    assert any("not in seconds" in note for note in report["notes"])


# The bootstrap


def test_resamples_are_paired_and_reproducible() -> None:
    bootstrap = Bootstrap(5, seed=3)
    assert (bootstrap.weights.sum(axis=1) == 5).all()
    assert (bootstrap.weights == Bootstrap(5, seed=3).weights).all()
    assert (bootstrap.weights != Bootstrap(5, seed=4).weights).any()
    tokens = np.arange(1.0, 6.0)
    assert bootstrap.ratios(3 * tokens, tokens) == pytest.approx(3)
    # What a resample says is what its prompts say.
    row = bootstrap.weights[0].astype(int)
    drawn = np.repeat(tokens, row)
    assert bootstrap.ratios(tokens, np.ones(5))[0] == drawn.sum() / 5


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        tokens, seconds = rng.gamma(9, 1, 80), rng.gamma(9, 2, 80)
        low, high = np.quantile(Bootstrap(80, trial).ratios(tokens, seconds), [0.025, 0.975])
        covered += low < 0.5 < high
    assert 0.90 <= covered / 200 <= 0.99


def test_shares_skip_resamples_without_a_gap() -> None:
    rates, fixed, oracle = (np.array(values) for values in ([3.0, 1.5], [2.0, 1.0], [4.0, 1.0]))
    assert shares_of_gap(rates, fixed, oracle).tolist() == [0.5]


# Tables


def test_a_table_says_the_same_on_terminals_and_pages(tmp_path: Path) -> None:
    rows = [TableRow(("a[b]", "1.5 (1.0..2.0)")), TableRow(("<i>", "2"), "green")]
    table = Table("[t]", ("who", "tokens\nper step"), [rows, [TableRow(("bound", "3"), "dim")]])
    page = table.html()
    assert "<th>tokens per step</th>" in page
    assert "<td>a[b]</td><td>1.5 (1.0..2.0)</td>" in page
    assert "<td>&lt;i&gt;</td>" in page
    assert page.count('<tr class="dim">') == 1
    for width in (12, 80):  # columns stand closer and names fold; figures stay whole
        console = Console(file=(tmp_path / "out").open("w", encoding="utf-8"), width=width)
        console.print(table)
        console.file.close()
        printed = (tmp_path / "out").read_text(encoding="utf-8")
        assert all(len(line.rstrip()) <= width for line in printed.splitlines())
        assert "(1.0..2.0)" in printed
    assert "a[b]" in printed
    assert "[t]" in printed


# Where the oracle differs


def test_choices_of_the_oracle_are_counted_by_position() -> None:
    prompt = crafted(0, stands=True, length=13)
    path = oracle_step_truncate(prompt, SPEC.work, BY_HAND)
    said = describe_choices(FixedChoice(2), [steps_beside(FixedChoice(2), prompt, path)])
    assert said["block_size"] == {"4": 3}
    assert said["verify_length"] == {"3": 3}
    assert said["differs"] == {"block_size": 1.0, "verify_length": 1.0, "either": 1.0}
    assert [(s["start"], s["end"], s["steps"]) for s in said["positions"]] == [(0, 2, 1), (4, 6, 1), (8, 10, 1)]
    same = describe_choices(FixedChoice(4), [steps_beside(FixedChoice(4), prompt, path)])
    assert same["differs"] == {"block_size": 0.0, "verify_length": 0.0, "either": 0.0}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_best_fixed_size_does_not_differ_from_itself_where_the_limit_cuts_it_short(size: int) -> None:
    prompt = dataclasses.replace(crafted(0, stands=True, length=12), max_new_tokens=12)
    path = fixed_path(prompt, SPEC.work, BY_HAND, size)
    assert describe_choices(FixedChoice(size), [steps_beside(FixedChoice(size), prompt, path)])["differs"] == {
        "block_size": 0,
        "verify_length": 0,
        "either": 0,
    }
    assert size != 4 or path.verify_length.tolist() == [3, 3, 2]


# Where the gap is


def test_where_the_time_goes_of_crafted_prompts() -> None:
    # Half of the prompts take 9, 12 or 9 at size 4, size 1 or best, the others 36, 12 or 12.
    group = judged(half_and_half(40), {"fixed:4": "fixed:4"})["overall"]
    nothing = dict.fromkeys(("verified_too_little", "features", "deciding"), 0.0)
    assert group["policies"]["fixed:4"]["regret"] == pytest.approx(
        {
            **nothing,
            "drafted_too_small": 0,
            "drafted_too_large": 12 / 45,
            "verified_too_much": 12 / 45,
            "oracle": 21 / 45,
        }
    )
    assert group["best_fixed"]["regret"] == pytest.approx(
        {**nothing, "drafted_too_small": 3 / 24, "drafted_too_large": 0, "verified_too_much": 0, "oracle": 21 / 24}
    )


def test_where_the_time_goes_is_not_known_of_drafts_that_were_not_traced(
    policy: Callable[[str], str], tmp_path: Path
) -> None:
    spec = dataclasses.replace(SPEC, drafter_kind=AUTOREGRESSIVE, work=work_of(AUTOREGRESSIVE))
    report = evaluate(
        half_and_half(20), spec, {"hasty": policy("Hasty"), "fixed:2": "fixed:2"}, [BY_HAND], permutations=0
    )
    hasty, fixed = report["cost_models"]["by hand"]["overall"]["policies"].values()
    assert list(hasty["regret"]) == ["reason"]
    assert "block size 3 is not traced" in hasty["regret"]["reason"]
    assert "oracle" in fixed["regret"]
    console = Console(file=(tmp_path / "out").open("w", encoding="utf-8"), width=100)
    print_evaluation(report, console)
    console.file.close()
    assert "Where hasty loses time is not known" in (tmp_path / "out").read_text(encoding="utf-8")
    html_report(report)


# The bound of confidences


def test_what_confidences_could_win_is_bounded_for_greedy_traces() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    sampled = synthetic_prompts(30, output_length=24, max_new_tokens=24)
    greedy = [dataclasses.replace(p, drafts=dataclasses.replace(p.drafts, match_probability=None)) for p in sampled]
    one, two = (evaluate(greedy, SYNTHETIC, {}, [COST, flat(COST)], permutations=0) for _ in range(2))
    assert one["cost_models"] == two["cost_models"]
    for result in one["cost_models"].values():
        assert 0 < result["confidences"]["tokens"] <= 12 * 2000
        assert 0.7 <= result["confidences"]["factor"] <= 1.3
        for group in (result["overall"], *result["domains"].values()):
            rate = group["bounds"]["confidences"]["tokens_per_second"]
            assert 0 < rate <= group["oracle"]["step_truncate"]["tokens_per_second"]
    without = evaluate(greedy, SYNTHETIC, {}, [COST], permutations=0, split=(0.0, 0.4, 0.6))  # nothing to learn from
    for report in (evaluate(sampled, SYNTHETIC, {}, [COST], permutations=0), without):
        result = report["cost_models"]["made up"]
        assert (result["confidences"], result["overall"]["bounds"]) == (None, {})


# Whom a trace cannot serve, and what else can go wrong


def test_who_cannot_be_served_is_an_error_or_left_out() -> None:
    prompts = half_and_half(20)
    with pytest.raises(PolicyError, match="draft_probability"):
        judged(prompts, {"threshold": "threshold"})
    with pytest.raises(TraceError, match="block size 3"):
        judged(prompts, {"fixed:3": "fixed:3"})
    report = judged_under(BY_HAND, prompts, {"threshold": "threshold", "fixed:2": "fixed:2"}, leave_out=True)
    assert list(report["left_out"]) == ["threshold"]
    assert list(report["cost_models"]["by hand"]["overall"]["policies"]) == ["fixed:2"]


def test_outputs_that_end_in_a_loop_are_counted_beside_the_figures() -> None:
    prompts = [crafted(i, stands=True, length=70 if i % 4 else 20) for i in range(20)]  # all tokens are the same
    report = judged_under(BY_HAND, prompts, {"fixed:2": "fixed:2"})
    looping = {prompt.id for prompt in prompts if len(prompt.output_tokens) == 70}
    among_test = len(looping & set(report["split"]["test"]))
    assert 0 < among_test < len(report["split"]["test"])
    assert report["loops"] == {"overall": among_test, "stands": among_test}
    assert any(f"{among_test} of 8 test prompts have an output that ends in a loop" in note for note in report["notes"])


def test_what_a_reader_should_know_is_noted(policy: Callable[[str], str], recwarn: pytest.WarningsRecorder) -> None:
    prompts = half_and_half(20)
    prompts = [dataclasses.replace(p, near_ties=np.array([3], np.int32)) for p in prompts]
    prompts.append(crafted(99, stands=True, length=1))
    report = judged_under(BY_HAND, prompts, {"broken": policy("Broken")})
    broken = report["cost_models"]["by hand"]["overall"]["policies"]["broken"]
    assert broken["fallbacks"] > 0
    said = " ".join(report["notes"])
    for part in (
        "Few test prompts (overall 8, stands 4, falls 4)",
        "8 of 8 test prompts have near ties",
        "1 prompts are left out",
        "mended",
    ):
        assert part in said


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompt is left for validation"):
        judged(half_and_half(2), {})
    with pytest.raises(ValueError, match="second token"):
        judged([crafted(0, stands=True, length=1)], {})
    with pytest.raises(ValueError, match="names of their own"):
        evaluate(half_and_half(20), SPEC, {}, [BY_HAND, BY_HAND])


# Everything, from a trace on disk

SYNTHETIC = DecoderSpec("target", "drafter", BLOCK_DIFFUSION, 8, 8, hidden_size=8, vocab_size=64)
COST = CostTable(
    name="made up",
    draft={2: 0.002, 8: 0.003},
    verify={1: 0.005, 2: 0.0055, 4: 0.006, 8: 0.009},
    features={8: 0.0002},
    rest=0.0005,
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 made-up prompts at sizes 2 to 8."""
    prompts = synthetic_prompts(40, output_length=24, max_new_tokens=24)
    folder = tmp_path_factory.mktemp("trace") / "trace"
    manifest = Manifest(
        target=ModelFacts(name="target", fingerprint=None),
        drafter=ModelFacts(name="drafter", fingerprint=None),
        drafter_kind=BLOCK_DIFFUSION,
        trained_block_size=8,
        hidden_size=8,
        vocab_size=64,
        dtype="float32",
        sampling={"temperature": 1.0},
        max_new_tokens=24,
        seed=0,
        block_sizes=(2, 3, 4, 6, 8),
        features=(),
        prompt_ids=tuple(prompt.id for prompt in prompts),
        prompts_fingerprint="0",
    )
    writer = TraceWriter(folder, manifest)
    for prompt in prompts:
        writer.write(prompt)
    writer.finish()
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def outcome(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    """What the command prints, its JSON and its page."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("outcome")
    write_cost(COST, folder / "cost.json")
    files = ["--cost", folder / "cost.json", "--json", folder / "eval.json", "--report", folder / "report.html"]
    chosen = ["--policy", "fixed:4", "--policy", "threshold:0.3", "--policy", "bandit:discount=1"]
    result = run(trace, *files, *chosen, "--orders", 2, "--permutations", 5)
    assert result.exit_code == 0, result.stderr
    report = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    return result.stdout, report, (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_json_has_its_paths(outcome: tuple[str, dict[str, Any], str]) -> None:
    report = outcome[1]
    assert list(report["cost_models"]) == ["made up", "flat", "linear"]
    for result in report["cost_models"].values():
        assert list(result["domains"]) == ["easy", "hard"]
        for group in (result["overall"], *result["domains"].values()):
            for bound in (group["best_fixed"], *(group["oracle"][o] for o in ("prompt", "step", "step_truncate"))):
                assert bound["tokens_per_second"] > 0
                assert bound["acceptance_length"] >= 1
            assert "distributions" in group["oracle"]  # the trace was sampled
            assert list(group["policies"]) == ["fixed:4", "threshold:0.3", "bandit:discount=1"]
            for entry in (group["best_fixed"], *group["policies"].values()):
                assert sum(entry["regret"].values()) == pytest.approx(1)
                assert min(entry["regret"].values()) >= 0
                oracle = group["oracle"]["step_truncate"]["tokens_per_second"]
                if not entry.get("memory"):  # several orders: a mean of rates is not the rate of sums
                    assert entry["regret"]["oracle"] == pytest.approx(entry["tokens_per_second"] / oracle)
            for entry in group["policies"].values():
                for figure in ("tokens_per_second_ratio", "acceptance_length", "gap_share"):
                    low, high = entry[figure]["interval"]
                    assert low <= high
        assert (result["learnable"]["permutations"], result["learnable"]["prompts"]) == (5, 16 + 8)
    parts = [report["split"][part] for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [16, 8, 16]
    assert report["provenance"]["trace"]["sampling"] == {"temperature": 1.0}
    assert report["provenance"]["costs"]["made up"]["verify"]["1"] == 0.005


def test_bounds_are_bounds_and_tuning_is_told(outcome: tuple[str, dict[str, Any], str]) -> None:
    for result in outcome[1]["cost_models"].values():
        for group in (result["overall"], *result["domains"].values()):
            rate = {name: entry["tokens_per_second"] for name, entry in group["oracle"].items()}
            assert group["best_fixed"]["tokens_per_second"] <= rate["prompt"] <= rate["step"] <= rate["step_truncate"]
            assert all(p["tokens_per_second"] < rate["step_truncate"] for p in group["policies"].values())
        threshold = result["overall"]["policies"]["threshold:0.3"]
        assert threshold["tuned"]
        assert threshold["options"]["threshold"] == 0.3
        assert set(threshold["tuning"]["chosen"]) <= {"block_size"}
        assert result["overall"]["policies"]["bandit:discount=1"]["memory"]


def test_the_table_says_the_same(outcome: tuple[str, dict[str, Any], str]) -> None:
    printed, report, _ = outcome
    for part in (
        "made up costs (16 test prompts)",
        "flat costs",
        "linear costs",
        "oracle.step_truncate (bound)",
        "made up costs, time that the step oracle does not take",
        "easy",
    ):
        assert part in printed
    ratio = report["cost_models"]["flat"]["overall"]["policies"]["fixed:4"]["tokens_per_second_ratio"]
    assert f"{ratio['value']:.3f} ({ratio['interval'][0]:.3f}..{ratio['interval'][1]:.3f})" in printed


def test_the_page_is_whole_by_itself(outcome: tuple[str, dict[str, Any], str]) -> None:
    page = outcome[2]
    assert "<script" not in page
    assert "@import" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1 + 3 * 4  # acceptance length; ratios, costs, regret and choices under each cost model
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    for part in ("gap_share", "oracle.distributions", "Made by: bpkit", "viewport", "fingerprint"):
        assert part in page


def test_a_page_of_odd_names_is_escaped_and_groups_without_policies_do(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    prompts = [crafted(i, stands=i % 2 == 0, domain="<b>") for i in range(20)]
    report = judged_under(BY_HAND, prompts, {})
    page = html_report(report)
    assert "<b>" not in page
    print_evaluation(report, Console(file=(tmp_path / "out").open("w", encoding="utf-8"), width=100))


def test_the_policies_by_default_are_those_that_the_trace_can_serve(trace: Path) -> None:
    result = run(trace, "--no-tune", "--orders", 1, "--permutations", 0, "--limit", 8)
    assert result.exit_code == 0, result.stderr
    assert "Left out: schedule: block size" in result.stdout
    assert "No cost model was given" in result.stdout
    assert "plain step" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "0.5,0.5"], "sum to 1"),
        (["--split", "a,b,c"], "three numbers"),
        (["--policy", "fixd"], "Did you mean 'fixed'?"),
        (["--policy", "fixed:5"], "block size 5"),
        (["--policy", "fixed:4", "--policy", "fixed:4"], "more than once"),
        (["--cost", "nowhere.json"], "nowhere.json"),
        (["--report", "report.pdf"], ".html"),
        (["--json", "no/such/folder/e.json"], "no folder"),
    ],
)
def test_bad_input_is_told(trace: Path, arguments: list[str], said: str) -> None:
    result = run(trace, "--permutations", 0, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_trace_that_is_none_is_told(tmp_path: Path) -> None:
    result = run(tmp_path / "nothing")
    assert result.exit_code == 2
    assert "bpkit trace" in result.stderr


def test_flat_and_linear_costs_come_from_the_given_one() -> None:
    report = evaluate(
        synthetic_prompts(12, output_length=16, max_new_tokens=16),
        SYNTHETIC,
        {"svip": "svip:h=0.6,block_size=8"},
        [COST, flat(COST), linear(COST)],
        permutations=0,
    )
    models = report["cost_models"]
    assert models["flat"]["curves"]["step"] == [pytest.approx(0.005)] * 6
    assert models["linear"]["curves"]["verify"][-1] == pytest.approx(0.005 * 1.7)
    # Replayed once, priced three times: the same steps everywhere.
    lengths = {m["overall"]["policies"]["svip"]["acceptance_length"]["value"] for m in models.values()}
    assert len(lengths) == 1
