"""`trees-summary`: what trees gain over chains at equal numbers of nodes, under costs and live."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from bpkit.decode.clock import ClockFaultWarning
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.draft.best_first import best_first
from bpkit.progress import NoProgress
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.collect.job import describe, run_job
from bpkit.trace.cost import CostError, CostTable, flat
from bpkit.trace.oracle.paths import best_fixed
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from recipes.trees.drafts import MOST, THRESHOLDS, KeptDrafts, kept
from recipes.trees.nodes import NODES, at_most, on_average
from recipes.trees.replays import replays_of
from recipes.trees.rules import rules_of
from recipes.trees.speed import SpeedCase, choose, on_trees, speeds
from recipes.trees.summary import Live, live_figures, summarise
from tests.test_tree_oracle import TREE_SPEC, WORK, random_prompt
from tests.test_tree_traces import COST, TEXTS, branching

SIZES = (2, 3, 4, 5, 6)


def prompts(count: int, start: int = 0) -> list[PromptTrace]:
    made = [random_prompt(start + i, 30, SIZES, branches=3) for i in range(count)]
    return [
        replace(prompt, index=i, id=f"{start + i}", domain=("one", "other")[i % 2]) for i, prompt in enumerate(made)
    ]


@pytest.fixture(scope="module")
def drafts() -> tuple[list[KeptDrafts], list[KeptDrafts]]:
    return list(kept(prompts(6), 3)), list(kept(prompts(6, start=50), 3))


# Equal numbers of nodes


def test_drafts_that_are_cut_by_their_chances_are_counted() -> None:
    """Steps and nodes above a threshold, walked one by one."""
    (prompt,) = prompts(1)
    (found,) = kept([prompt], 2)
    candidates, most = prompt.drafts.candidates, found.room
    assert candidates is not None
    for place in (0, 60, 130, 239):
        least, row, steps, nodes = THRESHOLDS[place], 0, 0, 0
        while row < prompt.drafts.rows:
            chances = candidates.chances[row, -1, :, :2].astype(float).tolist()
            at, depth, reached = -1, 0, {-1: 1.0}
            for node, one in enumerate(best_first(chances, MOST)):
                reached[node] = reached[one.parent] * one.chance
                if reached[node] > least:
                    nodes += 1
                    if one.parent == at and one.rank == candidates.ranks[row, -1, one.position]:
                        at, depth = node, depth + 1
            row, steps = row + 1 + min(depth, int(most[row])), steps + 1
        assert found.trees[:, place].tolist() == [steps, nodes]
    for column, size in enumerate(SIZES):
        whole = found.chains[:, column, -1].tolist()
        fixed = Replayer(TREE_SPEC.with_branches(1), f"fixed:{size}", COST).run(prompt)
        assert whole == [fixed.steps, fixed.steps * (size - 1)]
    assert found.chains[:, :, 0].tolist() == [[30] * 5, [0] * 5], "no chance is above 1"


def test_traces_without_candidates_are_refused_and_outputs_without_steps_left_out() -> None:
    with pytest.raises(ValueError, match="traces of --drafter block-diffusion:branches=16"):
        list(kept([synthetic_prompt(0)], 4))
    (prompt,) = prompts(1)
    assert list(kept([replace(prompt, output_tokens=prompt.output_tokens[:1])], 3)) == []


def test_rules_choose_among_drafts_that_can_be_made(drafts: tuple[list[KeptDrafts], list[KeptDrafts]]) -> None:
    rules = rules_of(drafts[0], 3)
    assert [*rules["chain"].choices(4)] == [*SIZES]
    assert [*rules["best_first"].choices(3)] == [4, 5, 6]
    assert [*rules["best_first"].choices(9)] == [6]
    shapes = rules["delayed"].choices(6)
    assert [2, 0, 3] in shapes
    assert all(trunk + count * length <= 6 and trunk + length <= 5 for count, trunk, length in shapes)
    assert {count for count, _, _ in rules_of(drafts[0], 2)["delayed"].choices(9)} == {2}
    one = drafts[1][0]
    for name, rule in rules.items():
        for choice in rule.choices(8):
            accepted = [rule.accepted(one, choice, nodes) for nodes in (1, 8)]
            assert bool((accepted[1] <= one.room).all()), name
            if name != "delayed":
                assert accepted[0].max() <= 1
    chain = rules["chain"].accepted(one, 4, 2)
    assert chain.tolist() == np.minimum(prompts(1, start=50)[0].drafts.num_accepted[:, 2], 2).tolist()


@pytest.mark.parametrize("size", [4, 6, 12])
def test_best_first_trees_are_those_of_fixed_sizes(size: int) -> None:
    made = prompts(3)
    rule = rules_of(list(kept(made, 3)), 3)["best_first"]
    for prompt, one in zip(made, kept(made, 3), strict=True):
        replayed = Replayer(TREE_SPEC, f"fixed:{size}", COST).run(prompt)
        accepted = rule.accepted(one, min(size, 6), size - 1)
        assert accepted[replayed.position - 1].tolist() == replayed.num_accepted.tolist()


def test_figures_at_equal_numbers_of_nodes(drafts: tuple[list[KeptDrafts], list[KeptDrafts]]) -> None:
    validation, test = drafts
    found = at_most(validation, test, 3, nodes=NODES, seed=0)
    assert [*found] == ["4", "8", "16", "32"]
    tokens = sum(one.tokens for one in test)
    for count, entry in found.items():
        chain, oracle = entry["chain"]["acceptance_length"], entry["best_nodes"]["acceptance_length"]
        assert 1 < chain < oracle
        assert entry["best"] in entry["trees"]
        assert entry["chain"]["interval"][0] <= chain <= entry["chain"]["interval"][1]
        for name, tree in entry["trees"].items():
            length = tree["acceptance_length"]
            assert chain * 0.8 < length < oracle, name
            assert tree["gain_percent"]["value"] == pytest.approx(100 * (length / chain - 1))
            assert tree["gap_share"] == pytest.approx((length - chain) / (oracle - chain))
            assert tree["by_domain"].keys() == tree["gain_percent"]["by_domain"].keys() == {"one", "other"}
        steps = tokens / entry["trees"]["best_first"]["acceptance_length"]
        assert steps == pytest.approx(round(steps)), count
    lengths = [entry["trees"]["best_first"]["acceptance_length"] for entry in found.values()]
    assert lengths == sorted(lengths)


def test_policies_that_verify_so_many_nodes_are_rules_too(drafts: tuple[list[KeptDrafts], list[KeptDrafts]]) -> None:
    parts = prompts(6), prompts(6, start=50)
    replays = replays_of(*parts, TREE_SPEC, None, (4, 8), NoProgress())
    found = at_most(*drafts, 3, nodes=(4, 8), seed=0, replays=replays)
    for count, entry in found.items():
        tree = entry["trees"]["tree"]
        assert tree["chosen"] == f"tree:nodes={count}"
        replayer = Replayer(TREE_SPEC, tree["chosen"], flat(COST))
        replayed = [replayer.run(prompt) for prompt in parts[1]]
        tokens, steps = (sum(getattr(one, name) for one in replayed) for name in ("tokens", "steps"))
        assert tree["acceptance_length"] == pytest.approx(tokens / steps)
        assert {int(most) for one in replayed for most in one.verify_length[:-3]} == {int(count)}


def test_nothing_is_chosen_on_test_prompts(drafts: tuple[list[KeptDrafts], list[KeptDrafts]]) -> None:
    validation, test = drafts

    def chosen(of: list[KeptDrafts]) -> list[Any]:
        found, cut = at_most(validation, of, 3, nodes=(4, 8), seed=0), on_average(validation, of, nodes=(4,), seed=0)
        return [
            *((entry["best"], *(tree["chosen"] for tree in entry["trees"].values())) for entry in found.values()),
            *((one["block_size"], one["threshold"]) for one in (cut["4"]["chain"], cut["4"]["trees"])),
        ]

    assert chosen(test) == chosen(test[:2]) == chosen(validation)


def test_steps_with_so_many_nodes_on_average(drafts: tuple[list[KeptDrafts], list[KeptDrafts]]) -> None:
    validation, test = drafts
    own = on_average(validation, validation, nodes=(2, 4, 8), seed=0)
    for count, entry in own.items():
        for name in ("chain", "trees"):
            assert int(count) * 0.7 < entry[name]["verified_nodes"] <= int(count) or name == "chain"
        ratio = entry["trees"]["acceptance_length"] / entry["chain"]["acceptance_length"]
        assert entry["gain_percent"]["value"] == pytest.approx(100 * (ratio - 1))
    lengths = [entry["trees"]["acceptance_length"] for entry in own.values()]
    assert lengths == sorted(lengths)
    assert on_average(validation, test, nodes=(4,), seed=0)["4"]["trees"]["verified_nodes"] == pytest.approx(4, rel=0.4)


# Under costs


def case(costs: list[Any]) -> SpeedCase:
    return SpeedCase(prompts(4), prompts(4, start=50), TREE_SPEC, None, costs, 2, 0, NoProgress())


def test_methods_are_chosen_on_validation_and_judged_on_test_prompts() -> None:
    drafting = dict.fromkeys(range(2, 7), 1e-4)
    cheap, dear = (
        CostTable(name=name, draft=drafting, verify={width: 0.01 + more * width for width in range(1, 19)}, rest=1e-4)
        for name, more in (("cheap", 1e-6), ("dear", 0.05))
    )
    found = speeds(case([cheap, dear]), {"threshold": ["threshold:0.1"]}, {"fixed": ["fixed:2", "fixed:4", "fixed:16"]})
    assert found.keys() == {"cheap", "dear"}
    for name, cost in (("cheap", cheap), ("dear", dear)):
        entry = found[name]
        best = best_fixed(prompts(4), WORK, cost)
        assert entry["best_fixed_chain"]["block_size"] == best.block_size
        assert entry["chains"].keys() == {"goodput", "threshold"}
        assert entry["trees"].keys() == {"fixed", "sequoia", "tree"}
        assert entry["trees"]["fixed"]["by_domain"].keys() == {"one", "other"}
        assert entry["decision_time_charged"]
        bound = entry["oracles"]["tree"]["tokens_per_second"]
        assert all(one["tokens_per_second"] < bound for one in entry["trees"].values())
    assert found["cheap"]["trees"]["fixed"]["policy"] == "fixed:16"
    assert found["dear"]["trees"]["fixed"]["policy"] == "fixed:2"


def test_specs_without_a_price_are_passed_over() -> None:
    short = COST.model_copy(update={"name": "short", "verify": dict.fromkeys(range(1, 9), 0.01)})
    methods = {"fixed": ["fixed:4", "fixed:16"]}
    with pytest.warns(ClockFaultWarning, match="no verify cost for verify width 16"):
        assert choose(case([short]), methods, TREE_SPEC) == {"short": {"fixed": "fixed:4"}}
    with pytest.raises(CostError), pytest.warns(ClockFaultWarning):
        choose(case([short]), {"fixed": ["fixed:16"]}, TREE_SPEC)


def test_methods_fit_the_drafter() -> None:
    assert on_trees(5) == {
        "fixed": ["fixed:3", "fixed:4", "fixed:5"],
        "sequoia": ["sequoia"],
        "tree": ["tree", "tree:block_size=5"],
    }
    assert on_trees(64)["fixed"][-1] == "fixed:64"
    assert on_trees(256)["tree"][:2] == ["tree", "tree:block_size=9"]


# Live, and the summary


def bench(**speed: float) -> dict[str, Any]:
    """Measurements of two prompts under each policy, at so many tokens a second."""
    named = {name.replace("_", ":").replace("of:chains", "@block-diffusion"): rate for name, rate in speed.items()}
    rows = [
        {"contestant": name, "prompt": prompt, "tokens": 10, "seconds": 10 / rate}
        for name, rate in named.items()
        for prompt in ("a", "b")
    ]
    overall = {"policies": {name: {"identical_text": True} for name in named}}
    return {"measurements": rows, "settings": {"seed": 0}, "machine": {"cpu": "c"}, "overall": overall}


def test_the_best_chain_is_the_fastest_of_the_bench() -> None:
    report = bench(tree=30.0, fixed_4of_chains=20.0, fixed_8of_chains=25.0, fixed_8=99.0)
    chains = ["fixed:4@block-diffusion", "fixed:8@block-diffusion"]
    found = live_figures(Live(report, "tree", chains))
    assert found["best_chain"] == "fixed:8@block-diffusion"
    assert found["ratio_to_best_chain"]["value"] == pytest.approx(1.2)
    assert found["ratio_to_best_chain"]["interval"] == pytest.approx([1.2, 1.2])
    assert found["ratio_to_each_chain"]["fixed:4@block-diffusion"]["value"] == pytest.approx(1.5)
    with pytest.raises(ValueError, match="run without other: name them"):
        live_figures(Live(report, "other", chains))
    with pytest.raises(ValueError, match="run without chains: name them with --policy, chains such as fixed:6@"):
        live_figures(Live(report, "tree", []))


def test_the_headline_is_of_the_rule_that_validation_chose() -> None:
    def figures(value: float) -> dict[str, Any]:
        trees = {"sequoia": {"gain_percent": {"value": 99.0}}, "best_first": {"gain_percent": {"value": value}}}
        nodes = {"at_most": {"4": {"best": "best_first", "trees": trees}}}
        return {"nodes": nodes, "speed": {"h200": {"trees": {"tree": {"tokens_per_second_ratio": {"value": 1.1}}}}}}

    live = Live(bench(tree=30.0, fixed_4=20.0), "tree", ["fixed:4"])
    found = summarise({"greedy": figures(5.0), "sampled": figures(7.0)}, {"sampled": live})
    assert found["headline"] == {
        "case": "greedy",
        "acceptance_gain_percent": {"4": 5.0},
        "acceptance_gain_percent_by_case": {"greedy": {"4": 5.0}, "sampled": {"4": 7.0}},
        "modelled_ratio_to_best_chain": {"greedy": {"h200": {"tree": 1.1}}, "sampled": {"h200": {"tree": 1.1}}},
        "live_ratio_to_best_chain": {"sampled": pytest.approx(1.5)},
    }
    assert "live" not in found["cases"]["greedy"]


# The command


def test_the_command_writes_one_file(pair: TinyPair, tmp_path: Path, recipe: Callable[..., Result]) -> None:
    decoder = SpeculativeDecoder(pair.target, branching(pair, 3), "fixed:4", tokenizer=pair.tokenizer)
    options = TraceOptions(tuple(range(2, decoder.spec.trained_block_size + 1)), 12)
    for part in ("validation", "test"):
        texts = [Prompt(f"{part}-{i}", "tiny", text) for i, text in enumerate(TEXTS)]
        run_job(tmp_path / part, describe(decoder, texts, options), texts, Tracer(decoder, options))
    (tmp_path / "cost.json").write_text(COST.model_dump_json())
    measured = bench(tree=30.0, fixed_4of_chains=20.0, goodputof_chains=40.0, fixed_9=50.0)
    (tmp_path / "live.json").write_text(json.dumps(measured))
    out = tmp_path / "out.json"
    given = ["--validation", f"tiny={tmp_path / 'validation'}", "--test", f"tiny={tmp_path / 'test'}"]
    more = ["--cost", f"mine={tmp_path / 'cost.json'}", "--orders", "1"]
    trees = ["--tree", "tree=tree", "--tree", "fixed=fixed:8"]
    live = ["--live", f"tiny={tmp_path / 'live.json'}"]
    chains = ["--chain", "goodput=goodput", "--chain", "threshold=threshold"]
    command = ("trees-summary", *given, "--json", str(out))
    result = recipe(*command, *more, *trees, *live, *chains)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_bytes())
    assert report["headline"]["case"] == "tiny"
    assert report["headline"]["acceptance_gain_percent"].keys() == {"4", "8", "16", "32"}
    assert report["headline"]["live_ratio_to_best_chain"]["tiny"] == pytest.approx(1.5)
    assert report["headline"]["modelled_ratio_to_best_chain"]["tiny"]["mine"].keys() == {"fixed", "sequoia", "tree"}
    tiny = report["cases"]["tiny"]
    assert tiny["settings"]["branches"] == 3
    assert tiny["settings"]["prompts"] == {"validation": 3, "test": 3}
    assert tiny["nodes"].keys() == {"at_most", "on_average"}
    assert recipe(*command[:-2], "--json", str(out), "--branches", "2", "--limit", "1").exit_code == 0
    assert json.loads(out.read_bytes())["cases"]["tiny"]["speed"] == {}
    wrong = recipe(*command[:-4], "--test", f"other={tmp_path / 'test'}", "--json", str(out))
    assert wrong.exit_code != 0
    assert "--validation and --test name different cases" in wrong.output
    assert "write a name and what it is of" in recipe(*command, "--cost", "mine").output
