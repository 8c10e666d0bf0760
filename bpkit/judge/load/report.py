"""What the JSON of an evaluation under load says beside its figures: terms, settings and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from bpkit.judge.described import describe_policies, describe_spec
from bpkit.judge.load.figures import CaseFigures, CaseRuns
from bpkit.judge.load.setup import POLICIES, LoadSetup
from bpkit.judge.statistics import LEVEL

DEFINITIONS = {
    "tokens_per_second": (
        "Output tokens of the engine over simulated seconds, in which prompts are read and policies decide. Of a "
        "closed loop: from when all rows run until one is missing because no request is left; of other loads: of the "
        "whole run. First tokens count where reading prompts has a price. Geometric mean over seeds."
    ),
    "tokens_per_second_per_request": "Output tokens over seconds from arrival to end, sums over requests.",
    "best_fixed": (
        "The one block size with the most of what is `compared`, chosen afterwards for each load on the same requests: "
        "none that is set in advance does better. It is charged no decision time."
    ),
    "compared": (
        "What ratios are of: `tokens_per_second`, or for arrivals, whose rate says how many tokens there are, "
        "`tokens_per_second_per_request`."
    ),
    "tokens_per_second_ratio": "What is `compared`, over that of the best fixed size; geometric mean over seeds.",
    "interval": (
        "95%, Student's t of the logarithms of the seeds' ratios. Each seed has prompts, an order and arrivals of its "
        "own, the same for all that are compared, and no prompt is in two seeds."
    ),
    "bound.clairvoyant": (
        "Who knows what every drafted token is worth, and chooses drafts and widths of all rows together: the fastest "
        "of several plans, each of which allocates every step as well as can be. A strong plan, not a proven bound. "
        "Served for the first seeds only, and charged no decision time."
    ),
    "bound.distributions": "The same for who knows the chances of drafted tokens but not the noise; of sampled traces.",
    "least_seconds": "Of all steps of a run, mean over seeds: proven that nobody who knows as much takes less.",
    "regret": (
        "Where a policy's time goes that the first bound does not take, as shares of the policy's own time in the "
        "window, mean over the bound's seeds: drafted or verified too much or too little in the sum of all rows, or "
        "for the wrong rows (`by_row`); `deciding`; `elsewhere`, the rest of the difference; and of sampled traces "
        "`not_knowable`, what the clairvoyant is faster by than the bound that does not know the noise. `together` is "
        "their sum. Only `reason` where drafts were ended at lengths that were not traced."
    ),
    "gap_share": (
        "(policy - best fixed) / (bound - best fixed) on the bound's seeds, of the first bound of the load; null where "
        "the gap is below 1% of the best fixed size, or its interval touches zero."
    ),
    "ttft": "Time to first token, from arrival: waiting and reading the prompt. Mean, median and 99th percentile.",
    "tpot": "Time per output token after the first, of each request: from its first token to its end.",
    "goodput": "Requests whose time per output token is within the limit: their share, and their number a second.",
    "acceptance_by_position": (
        "By position in the draft: of the drafted tokens that were verified after none was rejected, the share that "
        "stands."
    ),
    "drafted_per_token": "Drafted tokens for each output token of steps.",
    "verified_per_token": "Positions of the target, anchors included and padding left out, for each output token.",
    "wasted_per_token": "Those of them that yielded nothing.",
    "decision_us": (
        "Microseconds of a step's decisions, for all rows together, as charged: the median of the last ones about as "
        "many rows, measured on the machine that simulates. Null where they were not charged."
    ),
}


def load_report(setup: LoadSetup, cases: Iterable[CaseRuns]) -> dict[str, Any]:
    """Plain JSON values.

    Args:
        cases: the runs of each load; loads without a complete seed are left out.
    """
    loads = {
        case.name: CaseFigures(setup, case, runs).as_json()
        for case, runs in zip(setup.cases, cases, strict=True)
        if runs
    }
    return {
        "schema_version": 1,
        "definitions": DEFINITIONS,
        "settings": _settings(setup),
        "notes": _notes(setup, loads),
        "loads": loads,
    }


def _settings(setup: LoadSetup) -> dict[str, Any]:
    domains = [prompt.domain for prompt in setup.prompts]
    return {
        **describe_spec(setup.spec),
        "cost": {"name": setup.cost.name, "description": setup.cost.description, "source": setup.cost.source},
        "unit": setup.cost.unit,
        "prices_prefill": setup.cost.prices_prefill,
        "policies": describe_policies(setup.policies),
        "fixed": list(setup.fixed),
        "prompts": {domain: domains.count(domain) for domain in dict.fromkeys(domains)},
        "seed": setup.seed,
        "seeds": setup.seeds,
        "bound_seeds": setup.bound_seeds,
        "shares": [[setup.prompts[place].id for place in share] for share in setup.shares],
        "max_tokens": setup.max_tokens,
        "mixes_passes": setup.mixed,
        "decision_time_charged": setup.charged,
        "slo_tpot": setup.slo_tpot,
        "level": LEVEL,
    }


def _notes(setup: LoadSetup, loads: dict[str, Any]) -> list[str]:
    said = []
    if not setup.cost.prices_prefill:
        said.append(
            "The cost model has no price for reading prompts (`prefill`), so that it takes no time here: times to "
            "first token are of waiting alone. `bpkit calibrate` measures it."
        )
    if setup.charges_decisions and not setup.charged:
        said.append(f"Costs are in {setup.cost.unit}, not in seconds: decision time is not charged.")
    if setup.spec.others and setup.bound_seeds:
        said.append("Several sources of drafts: the bounds know drafts of one source, and are left out.")
    if setup.spec.branches > 1:
        said.append(
            f"Drafts are trees of up to {setup.spec.branches} branches: the bounds know chains, and are left out."
        )
    if setup.seeds < 2:
        said.append("One seed says nothing of the spread: there are no intervals.")
    short = [name for name, load in loads.items() if load["seeds"] < setup.seeds]
    missing = [case.name for case in setup.cases if case.name not in loads]
    if short or missing:
        said.append(
            "Interrupted: "
            + ", ".join([*(f"{name} has fewer seeds" for name in short), *(f"{name} is missing" for name in missing)])
            + "."
        )
    mended: Counter[str] = Counter()
    for load in loads.values():
        mended.update({name: entry["fallbacks"] for name, entry in load[POLICIES].items()})
    said += [
        f"Policy {name} made {count} decisions that had to be mended (`fallbacks`); the figures are of the mended ones."
        for name, count in mended.items()
        if count
    ]
    return said
