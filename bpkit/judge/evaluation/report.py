"""What an evaluation's JSON says beside its figures: terms, costs, notes. `docs/evaluation.md` lists its keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bpkit.judge.evaluation.setup import Setup
from bpkit.judge.statistics import Ints
from bpkit.trace.cost import NamedCost
from bpkit.trace.oracle.paths import FixedChoice
from bpkit.types import DecoderSpec

FEW = 20
"""Test prompts below which intervals are too narrow to be believed."""
UNEVEN = 2.0
"""Times that the plain mean of decision times may exceed the trimmed one before a note says so."""

DEFINITIONS = {
    "tokens_per_second": (
        "Tokens that steps yield over seconds of steps, sums over prompts. Prefill and the first token, which it "
        "decides, are left out on both sides. Where a cost model is in plain steps, so are its seconds."
    ),
    "seconds": (
        "What the cost model says of each step; for policies also their decision time, as measured during replay on "
        "the machine that evaluates: the 10% trimmed mean of all steps, times the steps, and of all `begin` calls, "
        "times the prompts. Best fixed size and oracles are charged no decision time."
    ),
    "best_fixed": (
        "The one block size, of all traced ones and 1, with the most tokens/s on the validation prompts of all domains."
    ),
    "best_fixed_of_domain": "The same, chosen on the validation prompts of the domain alone.",
    "tokens_per_second_ratio": "Tokens/s over those of the best fixed size on the same prompts.",
    "acceptance_length": "Tokens of steps over steps. `acceptance_length_per_prompt`: mean of the prompts' own.",
    "oracle.prompt": "A bound: each prompt at its own best fixed size, known afterwards.",
    "oracle.step": "A bound: the best block size for each step, known afterwards.",
    "oracle.step_truncate": "A bound: the best block size and verify length for each step, known afterwards.",
    "oracle.distributions": (
        "A bound for sampled traces: the best expectation of a chooser that knows the distributions of target and "
        "drafter along the text, but not the noise."
    ),
    "bounds.confidences": (
        "What the drafter's confidences could win if those of drafts of all sizes were known before drafting, which "
        "they are not: for each step the block size and verify length of most expected tokens less the worth of their "
        "time. Expectations are a logistic regression's from training prompts; what a second is worth is `factor` "
        "times the best fixed size's tokens/s, chosen on validation prompts. Charged neither decisions nor features. "
        "An estimate of a bound, for greedy traces."
    ),
    "regret": (
        "Where the time goes that oracle.step_truncate does not take, as shares of the policy's own seconds, all "
        "orders together. Of each step Q(b, v) - V, where V is the least time from there to the end and Q(b, v) that "
        "after drafting at its block size and verifying its verify length; these sum to the policy's seconds less the "
        "oracle's. `verified_too_much` and `verified_too_little`: Q(b, v) less the least Q at the same block size. "
        "`drafted_too_small` (no draft included) and `drafted_too_large`: that least Q less V. `features` and "
        "`deciding`: what the policy is charged for them. `oracle`: the rest, which the oracle takes too. Only "
        "`reason` where drafts were ended at lengths that were not traced."
    ),
    "gap_share": (
        "(policy - best fixed) / (oracle.step_truncate - best fixed) in tokens/s. Null where the interval of the gap "
        "itself touches zero."
    ),
    "interval": (
        "95%, paired bootstrap over test prompts: all that are compared, on the same resampled prompts. For policies "
        "with a memory: from the lowest to the highest of several recorded orders of the test prompts, which says "
        "nothing of other prompts; `interval_over_prompts` does."
    ),
    "memory": "Policies with a memory begin the test prompts without one, in each order.",
    "orders": "Seeds of the orders: `random.Random(seed).sample(range(n), n)` over the test prompts of the split.",
    "oracle_choices": (
        "What oracle.step_truncate chooses on all test prompts, by output tokens decided before the step. `differs`: "
        "share of steps with another block size, or another number of verified drafted tokens, than the best fixed "
        "size. Where choices cost the same, it takes no draft, then the smaller block, then the shorter verification."
    ),
    "learnable": (
        "On train and validation prompts: whether the block size can be chosen per prompt from the target's hidden "
        "state and entropy after prefill, against the same with features dealt out anew among prompts."
    ),
}


DEFINITIONS_OF_SOURCES = {
    "source": (
        "Where a draft comes from: one of the drafters of the decoder. A fixed choice is a source and a block size, "
        "written SOURCE:SIZE; `best_fixed` and the oracles choose among all of them."
    ),
    "best_fixed_of_source": "The block size of one source alone, or 1, that is chosen as `best_fixed` is.",
    "sources": (
        "Of a policy, all orders together: shares of the steps in which each source drafted something, and of the "
        "tokens that these steps yield, the last of each step included."
    ),
    "other_source": (
        "Of `regret`: both the policy and the oracle draft there, from different sources; the least Q at the policy's "
        "source and block size, less V."
    ),
}


DEFINITIONS_OF_TREES = {
    "oracle.tree": (
        "A bound: the best block size and the best nodes of its tree for each step, known afterwards. Those lie on one "
        "path, that of the output's own tokens, as far as each is among the candidates. `gap`, `gap_share`, `regret` "
        "and `oracle_choices` are of it, in place of oracle.step_truncate; `verify_length` there counts nodes."
    ),
    "verified_too_much": (
        "Of `regret`: also what nodes took that do not lie on the path that was found; what that path alone would have "
        "taken is then split as that of a chain."
    ),
}


def describe_cost(cost: NamedCost, choices: Sequence[FixedChoice], names: Sequence[str]) -> dict[str, Any]:
    """A cost model: its unit, and what a step costs by block size at a middle context length.

    `curves` are of the first source; where there are several, `curves_of_source` has those of each.
    """
    sizes = [[c.block_size for c in choices if c.source == place or c.block_size == 1] for place in range(len(names))]
    described = {
        "unit": cost.unit,
        "description": cost.description,
        "source": cost.source,
        "decision_time_charged": cost.unit == "seconds",
        "curves": _curves(cost, sizes[0]),
    }
    if len(names) > 1:
        described["curves_of_source"] = {
            name: _curves(cost.of_source(place), sizes[place]) for place, name in enumerate(names)
        }
    return described


def _curves(cost: NamedCost, sizes: Sequence[int]) -> dict[str, Any]:
    at = cost.middle_context
    return {
        "context_length": at,
        "block_size": list(sizes),
        "draft": [0.0 if size == 1 else cost.seconds("draft", size, at) for size in sizes],
        "verify": [cost.seconds("verify", size, at) for size in sizes],
        "rest": cost.seconds("rest", 1, at),
        "step": [cost.step(size, at) for size in sizes],
        "break_even": {str(size): cost.break_even(size, at) for size in sizes if size > 1},
        "target_efficiency": {str(size): cost.target_efficiency(size, at) for size in sizes},
    }


def notes_of_sources(setup: Setup) -> list[str]:
    """Which bounds are not there because there are several sources."""
    if len(setup.names) == 1:
        return []
    said = ["Several sources of drafts: bound.confidences knows the confidences of one, and is left out."]
    if setup.no_oracle:
        said.append(
            f"oracle.step and oracle.step_truncate are left out, and with them where time is lost: {setup.no_oracle}."
        )
    elif any(setup.summary.sampled) and not all(setup.summary.sampled):
        lacking = [name for name, known in zip(setup.names, setup.summary.sampled, strict=True) if not known]
        said.append(f"oracle.distributions is left out: {', '.join(lacking)} drafts from no distribution.")
    return said


def notes_of_trees(spec: DecoderSpec) -> list[str]:
    """What policies on trees are compared with."""
    if all(source.branches == 1 for source in spec.sources):
        return []
    return [
        f"Policies draft trees of up to {max(source.branches for source in spec.sources)} branches. Fixed sizes are "
        "those of chains, the drafts without branches, and so are all bounds but oracle.tree. Of sources whose trees "
        "were traced node by node, as of stores, they are those of the trees."
    ]


def notes(results: Mapping[str, Any], near_ties: Ints, loops: Mapping[str, int], without_steps: int) -> list[str]:
    """What a reader should know before believing the figures."""
    first = next(iter(results.values()))
    counts = {title: group["prompts"] for title, group in {"overall": first["overall"], **first["domains"]}.items()}
    few = [f"{title} {count}" for title, count in counts.items() if count < FEW]
    said = [f"Few test prompts ({', '.join(few)}): intervals from fewer than {FEW} are too narrow."] if few else []
    if near_ties.any():
        said.append(
            f"{int((near_ties > 0).sum())} of {len(near_ties)} test prompts have near ties ({int(near_ties.sum())} "
            "output tokens): live decoding may write another text there, and take other steps."
        )
    if loops["overall"]:
        where = ", ".join(f"{domain} {count}" for domain, count in loops.items() if count and domain != "overall")
        said.append(
            f"{loops['overall']} of {len(near_ties)} test prompts have an output that ends in a loop ({where}), which "
            "inflates acceptance."
        )
    if without_steps:
        said.append(f"{without_steps} prompts are left out: their output has one token, so no step decides anything.")
    mended: Counter[str] = Counter()
    uneven: dict[str, None] = {}
    for cost, result in results.items():
        if not result["decision_time_charged"]:
            said.append(f"{cost}: in {result['unit']}, not in seconds; decision time is measured but not charged.")
        for name, policy in result["overall"]["policies"].items():
            mended[name] += policy["fallbacks"]
            usual, mean = policy["decision_seconds_per_step"], policy["decision_seconds_per_step_untrimmed"]
            if mean > UNEVEN * usual > 0:
                uneven[name] = None
    said += [
        f"Policy {name} made {count} decisions that had to be mended (`fallbacks`); the figures are of the mended ones."
        for name, count in mended.items()
        if count
    ]
    if uneven:
        said.append(
            f"A few decisions took so long that the mean decision time is over {UNEVEN:g} times the trimmed one that "
            f"is charged ({', '.join(uneven)}): the machine was busy, or these policies work in bursts."
        )
    return said
