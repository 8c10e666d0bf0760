"""From runs of many rows to figures. A run is one set of prompts in one repeat; intervals resample runs, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bpkit.judge.statistics import Bootstrap, Totals, interval, totals_of
from bpkit.judge.wall_clock.decoders import LOOP, TRANSFORMERS
from bpkit.judge.wall_clock.figures import by_source, differences, shares
from bpkit.judge.wall_clock.rows.decoders import RunOutcome, Text
from bpkit.registry.resolve import parse_spec


@dataclass(frozen=True, slots=True)
class RowsMeasurement:
    """What one decoder did with one set of prompts, by its number, at one batch size in one repeat."""

    decoder: str
    batch_size: int
    part: int
    repeat: int
    outcome: RunOutcome


class RowsFigures:
    """What was measured, by batch size and decoder.

    Args:
        reference: each prompt's text alone, by plain decoding in the loop.
        policies: names as typed.
        comparable: whether transformers' texts must be those of the loop; not when sampling.
        seed: of the bootstrap.
    """

    def __init__(
        self,
        measurements: Sequence[RowsMeasurement],
        *,
        reference: Mapping[str, Text],
        policies: Sequence[str],
        comparable: bool = True,
        seed: int,
    ) -> None:
        self.policies, self.comparable, self.seed = policies, comparable, seed
        self.reference = {prompt: [text] for prompt, text in reference.items()}
        self.runs: dict[int, dict[str, list[RunOutcome]]] = {}
        """In the same order for every decoder of a batch size."""
        for one in sorted(measurements, key=lambda one: (one.batch_size, one.repeat, one.part)):
            self.runs.setdefault(one.batch_size, {}).setdefault(one.decoder, []).append(one.outcome)

    def as_json(self) -> dict[str, Any]:
        """A group for each batch size."""
        return {str(size): self._group(runs) for size, runs in self.runs.items()}

    def _group(self, runs: Mapping[str, Sequence[RunOutcome]]) -> dict[str, Any]:
        totals = {name: totals_of_runs(outcomes) for name, outcomes in runs.items()}
        bootstrap = Bootstrap(len(runs[LOOP]), self.seed) if len(runs[LOOP]) > 1 else None
        entries = {name: self._entry(name, runs[name], runs[LOOP], totals, bootstrap) for name in runs}
        policies = {name: entries[name] for name in self.policies}
        fixed = [name for name in policies if parse_spec(name)["name"] == "fixed"]
        return {
            "runs": len(runs[LOOP]),
            "plain": entries[LOOP],
            "transformers": entries[TRANSFORMERS],
            "policies": policies,
            "best_fixed": max(fixed, key=lambda name: policies[name]["tokens_per_second"], default=None),
        }

    def _entry(
        self,
        name: str,
        outcomes: Sequence[RunOutcome],
        plain: Sequence[RunOutcome],
        totals: Mapping[str, Totals],
        bootstrap: Bootstrap | None,
    ) -> dict[str, Any]:
        """What is said of one decoder at one batch size."""
        mine = totals[name]
        entry: dict[str, Any] = {
            "tokens_per_second": mine.rate,
            "tokens_per_second_interval": interval(mine.rates(bootstrap)) if bootstrap else None,
        }
        for to, other in (("plain", totals[LOOP]), ("transformers", totals[TRANSFORMERS])):
            ratios = mine.rates(bootstrap) / other.rates(bootstrap) if bootstrap else None
            entry[f"ratio_to_{to}"] = mine.rate / other.rate
            entry[f"ratio_to_{to}_interval"] = None if ratios is None else interval(ratios)
        return {
            **entry,
            "steps_ratio_to_plain": steps_ratio(outcomes, plain),
            "prefill_share": prefill_share(outcomes),
            "acceptance_length": acceptance_length(outcomes),
            **self._about_texts(name, outcomes),
            "share": shares(outcomes),
            "fallbacks": sum(outcome.fallbacks for outcome in outcomes),
            "tokens": int(mine.tokens.sum()),
            "seconds": float(mine.seconds.sum()),
            "passes": int(mine.steps.sum()),
            **by_source([outcome.sources for outcome in outcomes]),
        }

    def _about_texts(self, name: str, outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
        """How many prompts have the text that they have alone, in all repeats, and which have not."""
        texts: dict[str, list[Text]] = {}
        for outcome in outcomes:
            for prompt, text in outcome.texts.items():
                texts.setdefault(prompt, []).append(text)
        ties = sum(len(text.near_ties) for repeats in texts.values() for text in repeats)
        if name == TRANSFORMERS and not self.comparable:
            return {"texts": len(texts), "texts_equal": None, "different_prompts": [], "near_ties": ties}
        different = differences(texts, self.reference, self.reference)
        return {
            "texts": len(texts),
            "texts_equal": len(texts) - len(different),
            "different_prompts": different,
            "near_ties": ties,
        }


def totals_of_runs(outcomes: Sequence[RunOutcome]) -> Totals:
    """Tokens, target passes and seconds of each run."""
    return totals_of([(outcome.tokens, outcome.passes, outcome.seconds) for outcome in outcomes])


def acceptance_length(outcomes: Sequence[RunOutcome]) -> float | None:
    """Tokens of steps over steps of rows; the first token of an output is no step's."""
    steps = sum(outcome.row_steps for outcome in outcomes)
    tokens = sum(len(text.tokens) - 1 for outcome in outcomes for text in outcome.texts.values())
    return tokens / steps if steps else None


def prefill_share(outcomes: Sequence[RunOutcome]) -> float | None:
    """Share of the time that reading prompts took; None where it cannot be told."""
    known = [outcome.prefill_seconds for outcome in outcomes if outcome.prefill_seconds is not None]
    return sum(known) / sum(outcome.seconds for outcome in outcomes) if len(known) == len(outcomes) else None


def steps_ratio(outcomes: Sequence[RunOutcome], plain: Sequence[RunOutcome]) -> float | None:
    """Tokens a second over those of plain decoding, reading prompts left out, which is the same for all."""
    rates = []
    for runs in (outcomes, plain):
        share, seconds = prefill_share(runs), sum(outcome.seconds for outcome in runs)
        if share is None:
            return None
        rates.append(sum(outcome.tokens for outcome in runs) / (seconds * (1 - share)))
    return rates[0] / rates[1]
