"""An evaluation of decoders with several sources of drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bpkit.judge.evaluation import evaluate
from bpkit.judge.evaluation.page import html_report
from bpkit.judge.evaluation.tables import print_evaluation
from bpkit.learn.training.validation import Validation
from bpkit.registry.resolve import resolve_policy
from bpkit.testing.traces import synthetic_prompts
from bpkit.trace.cost import CostTable
from bpkit.trace.records import DraftTable, PromptTrace
from bpkit.types import AUTOREGRESSIVE, BLOCK_DIFFUSION, NGRAM, DecoderSpec, SourceSpec, work_of

MODEL = SourceSpec("model", BLOCK_DIFFUSION, 4, 4, work_of(BLOCK_DIFFUSION))
STORE = SourceSpec("n-gram", NGRAM, 6, 6, work_of(NGRAM))
ASSISTANT = SourceSpec("assistant", AUTOREGRESSIVE, 4, 4, work_of(AUTOREGRESSIVE))
CURVE: dict[str, Any] = {"verify": {1: 1.0, 6: 1.1}, "unit": "plain steps"}
COST = CostTable(name="made", draft={2: 0.3, 4: 0.4}, **CURVE).with_sources([CostTable(draft={6: 0.01}, **CURVE)])


def spec_of(*others: SourceSpec) -> DecoderSpec:
    return DecoderSpec("target", "model", BLOCK_DIFFUSION, 4, 4, hidden_size=8, vocab_size=64, others=others)


def store_of(prompt: PromptTrace) -> DraftTable:
    """A store that finds something at every fourth position of easy prompts, all of which stands, and else nothing."""
    rows, sizes = prompt.drafts.rows, (2, 6)
    found = (np.arange(rows) % 4 == 0) & (prompt.domain == "easy")
    length = np.where(found[:, None], np.array(sizes) - 1, 0)
    room = (rows - np.arange(1, rows + 1))[:, None]
    return DraftTable(
        block_sizes=np.array(sizes, np.int32),
        draft_length=length.astype(np.int32),
        num_accepted=np.minimum(length, room).astype(np.int32),
        tokens=np.zeros((rows, 2, 5), np.int32),
        match_length=np.where(found, 3, 0).astype(np.int32),
    )


def prompts_of(second: Callable[[PromptTrace], DraftTable]) -> list[PromptTrace]:
    made = synthetic_prompts(24, output_length=20, max_new_tokens=20, block_sizes=(2, 4))  # type: ignore[arg-type]
    return [replace(prompt, others=(second(prompt),)) for prompt in made]


POLICIES = {
    "fixed:4": "fixed:4",
    "store": "fixed:6,source=1",
    "store as trained": "fixed:source=1",
}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return evaluate(prompts_of(store_of), spec_of(STORE), POLICIES, [COST], permutations=0)


def test_fixed_choices_are_of_every_source_and_size(report: dict[str, Any]) -> None:
    group = report["cost_models"]["made"]["overall"]
    assert list(group["fixed"]) == ["1", "model:2", "model:4", "n-gram:2", "n-gram:6"]
    best, rates = group["best_fixed"], {name: entry["tokens_per_second"] for name, entry in group["fixed"].items()}
    assert (best["source"], best["block_size"]) == ("n-gram", 6)
    assert rates["n-gram:6"] == max(rates.values()) == best["tokens_per_second"]
    alone = group["best_fixed_of_source"]
    assert {name: entry["block_size"] for name, entry in alone.items()} == {"model": 4, "n-gram": 6}
    assert alone["model"]["tokens_per_second"] == rates["model:4"]
    # Where the store finds nothing the model is better.
    hard = report["cost_models"]["made"]["domains"]["hard"]
    assert hard["best_fixed_of_domain"]["source"] != "n-gram"
    assert hard["fixed"]["n-gram:6"]["tokens_per_second"] == hard["fixed"]["1"]["tokens_per_second"]


def test_replay_of_a_fixed_policy_is_what_its_choice_is(report: dict[str, Any]) -> None:
    group = report["cost_models"]["made"]["overall"]
    for policy, choice in (("fixed:4", "model:4"), ("store", "n-gram:6"), ("store as trained", "n-gram:6")):
        found = group["policies"][policy]
        assert found["tokens_per_second"] == pytest.approx(group["fixed"][choice]["tokens_per_second"], rel=1e-12)
    assert group["policies"]["store"]["regret"] == pytest.approx(group["best_fixed"]["regret"])
    assert sum(group["policies"]["fixed:4"]["regret"].values()) == pytest.approx(1)
    assert group["policies"]["fixed:4"]["regret"]["other_source"] > 0


def test_shares_of_steps_and_tokens_are_told_by_source(report: dict[str, Any]) -> None:
    of = {n: p["sources"] for n, p in report["cost_models"]["made"]["domains"]["easy"]["policies"].items()}
    assert of["fixed:4"]["steps"] == {"no draft": 0, "model": 1, "n-gram": 0}
    # Each of its drafts yields six tokens, after which it finds nothing twice.
    assert of["store"]["steps"]["n-gram"] == pytest.approx(1 / 3, abs=0.1)
    assert of["store"]["tokens"]["n-gram"] > 0.7
    assert of["store"]["tokens"]["model"] == 0
    for one in of.values():
        assert sum(one["steps"].values()) == pytest.approx(1) == sum(one["tokens"].values())


def test_the_oracle_chooses_among_sources_and_is_a_bound(report: dict[str, Any]) -> None:
    result = report["cost_models"]["made"]
    group, chosen = result["overall"], result["oracle_choices"]
    oracle = group["oracle"]
    assert oracle["step_truncate"]["tokens_per_second"] >= oracle["step"]["tokens_per_second"]
    assert oracle["step"]["tokens_per_second"] > 1.05 * group["best_fixed"]["tokens_per_second"]
    assert chosen["best_fixed"] == "n-gram:6"
    assert set(chosen["source"]) == {"no draft", "model", "n-gram"}
    assert sum(chosen["source"].values()) == chosen["steps"]
    assert 0 < chosen["differs"]["source"] <= chosen["differs"]["either"]
    assert "distributions" not in oracle
    assert any("n-gram drafts from no distribution" in note for note in report["notes"])
    assert result["curves_of_source"]["n-gram"]["draft"] == [0.0, 0.01, 0.01]


def test_settings_table_and_page_name_the_sources(report: dict[str, Any]) -> None:
    assert [source["drafter"] for source in report["settings"]["sources"]] == ["model", "n-gram"]
    assert report["settings"]["block_sizes"] == [1, 2, 4, 6]
    console = Console(file=StringIO(), width=200)
    print_evaluation(report, console)
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue()
    for said in ("best fixed: n-gram:6", "model alone: 4", "other source", "by source, ", "n-gram:6 in the source"):
        assert said in printed
    page = html_report(report)
    for said in ("target with model and n-gram", "n-gram alone: 6", "Which source drafted"):
        assert said in page


def test_with_two_sources_that_wait_there_is_no_step_oracle_and_the_rest_stays() -> None:
    cost = CostTable(name="made", draft={4: 0.4}, **CURVE).with_sources([CostTable(draft={4: 0.5}, **CURVE)])
    prompts, spec = prompts_of(lambda prompt: prompt.drafts), spec_of(ASSISTANT)
    report = evaluate(prompts, spec, {"fixed:4": "fixed:4"}, [cost], permutations=0)
    result = report["cost_models"]["made"]
    group = result["overall"]
    assert list(group["oracle"]) == ["prompt"]
    assert group["gap"] is result["oracle_choices"] is group["policies"]["fixed:4"]["gap_share"]["value"] is None
    assert "sources 0 and 1" in group["best_fixed"]["regret"]["reason"]
    assert any("oracle.step" in note and "sources 0 and 1" in note for note in report["notes"])
    print_evaluation(report, Console(file=StringIO()))
    assert "oracle.prompt" in html_report(report)


def test_training_is_compared_with_the_best_source_and_size() -> None:
    judge = Validation(spec_of(STORE), COST, []).judge
    found = judge(resolve_policy("fixed:6,source=1"), prompts_of(store_of), lambda: None)  # type: ignore[arg-type]
    assert (found["best_fixed"]["source"], found["best_fixed"]["block_size"]) == (1, 6)
    assert found["best_fixed"]["tokens_per_second"] == pytest.approx(found["tokens_per_second_without_decisions"])
