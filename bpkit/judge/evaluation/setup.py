"""What all parts of an evaluation share: what a pass over the trace says, its split, and the prompts that are held."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.evaluation.splits import Split, SplitRule, split_prompts
from bpkit.judge.loops import ends_in_loop
from bpkit.judge.sources import source_names
from bpkit.judge.statistics import Floats, Ints, Totals
from bpkit.progress import Progress
from bpkit.trace.cost import NamedCost
from bpkit.trace.oracle.paths import FixedChoice, fixed_choices, fixed_path
from bpkit.trace.oracle.plan import waiting_source
from bpkit.trace.records import PromptTrace
from bpkit.types import DecoderSpec, DraftWork, Feature


@dataclass(frozen=True)
class TraceSummary:
    """Of all prompts whose output has at least two tokens: in the others nothing is left to decide.

    Attributes:
        places: of the prompts in the trace.
        choices: plain decoding, and every traced block size of every source.
        tokens: that steps yield, float64 [prompts].
        steps, seconds: of each fixed choice, float64 [prompts, choices]; seconds by cost model.
        features: `prefill_hidden` and `prefill_entropy`, float64 [prompts, dims].
        near_ties: output positions that another verify width might decide otherwise, int64 [prompts].
        loops: whether the output ends in a loop, bool [prompts].
        left_out: prompts with shorter outputs.
        sampled: whether the trace knows the chance of a match, of each source.
    """

    places: list[int]
    ids: list[str]
    domains: list[str]
    choices: tuple[FixedChoice, ...]
    tokens: Floats
    steps: Floats
    seconds: dict[str, Floats]
    features: Floats
    near_ties: Ints
    loops: NDArray[np.bool_]
    left_out: int
    sampled: tuple[bool, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """1 and every traced block size, of any source."""
        return tuple(sorted({choice.block_size for choice in self.choices}))

    def fixed(self, cost: str, prompts: Sequence[int], choice: FixedChoice | None = None) -> Totals:
        """A fixed choice on some prompts; without one each prompt at the one that was fastest on it."""
        rows = np.asarray(prompts, np.int64)
        seconds = self.seconds[cost][rows]
        columns = seconds.argmin(axis=1) if choice is None else self.choices.index(choice)
        return Totals(self.tokens[rows], self.steps[rows, columns], self.seconds[cost][rows, columns])

    def best_fixed(self, cost: str, prompts: Sequence[int], source: int | None = None) -> FixedChoice:
        """The choice with the most tokens per second on these prompts, of one source or of all; the first of equals."""
        seconds = self.seconds[cost][np.asarray(prompts, np.int64)].sum(axis=0)
        among = [place for place, one in enumerate(self.choices) if source in (None, one.source) or one.block_size == 1]
        return self.choices[min(among, key=seconds.__getitem__)]


@dataclass(frozen=True)
class Setup:
    """What all parts of an evaluation share.

    Attributes:
        spec: of the decoder that the trace stands for. trace_seed: for the policies' own random numbers.
        costs: by name.
        seed: of split, orders, bootstrap and permutations.
        validation, test: prompts in memory; the first in a mixed order, the second in the trace's.
    """

    spec: DecoderSpec
    trace_seed: int | None
    costs: Mapping[str, NamedCost]
    seed: int
    progress: Progress
    summary: TraceSummary
    split: Split
    validation: Sequence[PromptTrace]
    test: Sequence[PromptTrace]

    @property
    def names(self) -> tuple[str, ...]:
        """What the sources of drafts are called."""
        return source_names(self.spec)

    @property
    def works(self) -> tuple[DraftWork, ...]:
        """Of the sources."""
        return tuple(source.work for source in self.spec.sources)

    @property
    def no_oracle(self) -> str:
        """Why the best choice of each step cannot be searched for; empty if it can."""
        try:
            waiting_source(self.works)
        except ValueError as error:
            return str(error)
        return ""


def prepare(
    prompts: Sequence[PromptTrace],
    spec: DecoderSpec,
    cost_models: Sequence[NamedCost],
    *,
    trace_seed: int | None,
    seed: int,
    rule: SplitRule,
    second_test: bool,
    filled: Callable[[PromptTrace], PromptTrace],
    progress: Progress,
) -> Setup:
    """Read the trace, split it, and hold what will be needed again, `filled`. Raises ValueError, CostError."""
    costs = {cost.name: cost for cost in cost_models}
    if len(costs) < len(cost_models) or not costs:
        raise ValueError(f"cost models need names of their own: {', '.join(c.name for c in cost_models) or 'none'}")
    summary = summarise_trace(prompts, spec, costs, progress)
    split = split_prompts(summary.ids, summary.domains, seed=seed, rule=rule)
    if second_test:
        split = split.exchanged()
    for part in ("validation", "test"):
        if not getattr(split, part):
            raise ValueError(
                f"no prompt is left for {part} ({len(summary.ids)} prompts, split "
                f"{','.join(f'{f:g}' for f in split.fractions)}): trace more prompts, or split otherwise"
            )
    mixed = list(split.validation)
    random.Random(seed).shuffle(mixed)
    progress.start("reading prompts", len(mixed) + len(split.test))
    held = []
    for i in (*mixed, *split.test):
        held.append(filled(prompts[summary.places[i]]))
        progress.tick()
    validation, test = held[: len(mixed)], held[len(mixed) :]
    return Setup(spec, trace_seed, costs, seed, progress, summary, split, validation, test)


def summarise_trace(
    prompts: Sequence[PromptTrace], spec: DecoderSpec, costs: Mapping[str, NamedCost], progress: Progress
) -> TraceSummary:
    """Read every prompt once; none is kept.

    Raises:
        ValueError: no prompt has an output of two tokens, or prompts were traced at different sizes.
        CostError: a cost model lacks a traced size.
    """
    rows: list[tuple[Any, ...]] = []
    progress.start("fixed sizes", len(prompts))
    for place, prompt in enumerate(prompts):
        if prompt.decided_by_steps:
            rows.append((place, *_summarise(prompt, spec, costs)))
        progress.tick()
    if not rows:
        raise ValueError("no output of this trace has a second token: there is nothing to decide; trace longer outputs")
    places, ids, domains, choices, tokens, steps, seconds, features, near_ties, loops, sampled = map(
        list, zip(*rows, strict=True)
    )
    if len(set(choices)) > 1:
        raise ValueError("the prompts were traced at different block sizes: no one size can be compared over them")
    return TraceSummary(
        places=places,
        ids=ids,
        domains=domains,
        choices=choices[0],
        tokens=np.array(tokens, np.float64),
        steps=np.array(steps, np.float64),
        seconds=dict(zip(costs, np.array(seconds).swapaxes(0, 1), strict=True)),
        features=np.stack(features),
        near_ties=np.array(near_ties),
        loops=np.array(loops),
        left_out=len(prompts) - len(rows),
        sampled=tuple(all(known) for known in zip(*sampled, strict=True)),
    )


def _summarise(prompt: PromptTrace, spec: DecoderSpec, costs: Mapping[str, NamedCost]) -> tuple[Any, ...]:
    """What `TraceSummary` holds of one prompt, in its order."""
    works = [source.work for source in spec.sources]
    choices = fixed_choices(prompt, len(works))
    paths = [[fixed_path(prompt, works, cost, *choice) for choice in choices] for cost in costs.values()]
    hidden = prompt.features.get(Feature.PREFILL_HIDDEN, np.zeros(0, np.float32))
    return (
        prompt.id,
        prompt.domain,
        choices,
        prompt.decided_by_steps,
        [path.steps for path in paths[0]],
        [[path.seconds for path in found] for found in paths],
        np.append(hidden.astype(np.float64), prompt.prefill_entropy),
        len(prompt.near_ties),
        ends_in_loop(prompt.output_tokens.tolist()),
        [drafts.match_probability is not None for drafts in prompt.sources],
    )
