"""Does a file decide as the policy does? Every row of a trace says, at batch sizes that the file was not traced at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.export.core import DECIDES, TREE, Core, Export, Method, features_of
from bpkit.export.inputs import Given, Inputs
from bpkit.policy import Policy, PolicyError, State
from bpkit.trace.load import ClosedLoop
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import offered
from bpkit.trace.server import ServerReplayer
from bpkit.types import OF_THE_DRAFT, Context, CostModel, DecoderSpec, Draft, Feature, Plan, Step

Run = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""Runs an ONNX file: outputs by name from inputs by name."""

BATCHES = (1, 2, 7, 64)
"""Batch sizes that rows are run at in turn, none of them that of the example the graph was traced with."""
SHOWN = 3
MOST_GOLDEN = 7
"""Rows of a golden batch that is decided as a whole."""
AT_ONCE = 256
PREFILL = (Feature.PREFILL_HIDDEN, Feature.PREFILL_LOGITS)


@dataclass
class Comparison:
    """What rows of one file gave: a `schema.Agreement` and more.

    Attributes:
        rows, agree, within_tolerance: counts of rows. largest_difference: of float outputs.
        wrong: descriptions of the first rows that differ beyond the tolerance.
        golden: inputs of a few rows of one batch, chosen so that decisions differ.
    """

    rows: int = 0
    agree: int = 0
    within_tolerance: int = 0
    largest_difference: float = 0.0
    wrong: list[str] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    golden: Given | None = None
    variety: int = 0

    def add(self, core: Core, given: Given, answer: Tensor | Plan, run: Run) -> None:
        """Rows of one batch, cut into batches of the sizes of `BATCHES`."""
        wanted, answers = _computed(core, given), _by_name(core, answer)
        decided = answers[DECIDES[core.method]]
        turns, left = cycle(BATCHES), torch.arange(len(decided))
        while len(left):
            size = next(turns)
            rows, left = left[:size], left[size:]
            self.batch_sizes = sorted({*self.batch_sizes, len(rows)})
            part = {port.name: _rows_of(given[port.name], port.shape, rows) for port in core.inputs}
            got = run({name: value.numpy() for name, value in part.items()})
            of_part = [{name: value[rows] for name, value in values.items()} for values in (wanted, answers)]
            self._compare(core, of_part[0], of_part[1], got)
        self._choose_golden(core, given, decided, wanted[core.margin])

    def add_whole(self, core: Core, given: Given, answer: Tensor | Plan, run: Run) -> None:
        """Rows that are decided together."""
        wanted, got = _computed(core, given), run({name: value.numpy() for name, value in given.items()})
        answers = _by_name(core, answer)
        decided = answers[DECIDES[core.method]]
        self.batch_sizes = sorted({*self.batch_sizes, len(decided)})
        self._compare(core, wanted, answers, got)
        kinds = len(set(decided.tolist()))
        if len(decided) <= MOST_GOLDEN and kinds > self.variety and wanted[core.margin].min() > 10 * core.tolerance:
            self.variety, self.golden = kinds, given

    def add_learned(self, core: Core, given: Given, learned: State, rows: int, run: Run) -> None:
        """What `observe` keeps: a step in which every value is the policy's agrees in all its rows."""
        got = run({name: value.numpy() for name, value in given.items()})
        self.rows += rows
        self.batch_sizes = sorted({*self.batch_sizes, rows})
        wrong = []
        for name, value in got.items():
            expected = learned[name.removeprefix("next_")].numpy()
            self.largest_difference = max(self.largest_difference, float(np.abs(value - expected).max()))
            if not np.allclose(value, expected, rtol=core.tolerance, atol=core.tolerance):
                wrong.append(name)
        self.agree += 0 if wrong else rows
        if wrong and len(self.wrong) < SHOWN:
            self.wrong.append(f"{', '.join(wrong)} after a step of {rows} rows")
        if 1 < rows <= MOST_GOLDEN and (self.golden is None or rows > self.variety):
            self.variety, self.golden = rows, given

    def _compare(
        self, core: Core, wanted: dict[str, Tensor], answers: dict[str, Tensor], got: dict[str, NDArray[Any]]
    ) -> None:
        name = DECIDES[core.method]
        decided, rows = answers[name], len(answers[name])
        equal = [(got[of] == value.numpy()).reshape(rows, -1).all(axis=1) for of, value in answers.items()]
        same = np.logical_and.reduce(equal)
        close = wanted[core.margin].numpy() < core.tolerance
        self.rows += len(decided)
        self.agree += int(same.sum())
        self.within_tolerance += int((~same & close).sum())
        for row in np.flatnonzero(~same & ~close)[:SHOWN]:
            margin = float(wanted[core.margin][row])
            what = f"{name} {got[name][row]} where the policy says {int(decided[row])}"
            if got[name][row] == int(decided[row]):
                what = f"another tree of {name} {got[name][row]} than the policy"
            self.wrong.append(f"{what} (margin {margin:.3g})")
        for port in core.outputs:
            if port.dtype == "float32" and got[port.name].size:
                difference = np.abs(got[port.name] - wanted[port.name].numpy())
                self.largest_difference = max(self.largest_difference, float(difference.max()))

    def _choose_golden(self, core: Core, given: Given, decided: Tensor, margin: Tensor) -> None:
        clear = (margin > 10 * core.tolerance).nonzero()[:, 0]
        kinds = {int(decided[row]): int(row) for row in clear}
        if len(clear) and min(len(kinds), 4) > self.variety:
            self.variety = min(len(kinds), 4)
            rows = torch.tensor(sorted(list(kinds.values())[:4]))
            self.golden = {port.name: _rows_of(given[port.name], port.shape, rows) for port in core.inputs}


def _computed(core: Core, given: Given) -> dict[str, Tensor]:
    """What the module gives, by name."""
    with torch.inference_mode():
        values = core.module(*(given[port.name] for port in core.inputs))
    return dict(zip((port.name for port in core.outputs), values, strict=True))


def _by_name(core: Core, answer: Tensor | Plan) -> dict[str, Tensor]:
    """What the policy answers, by the output that says it."""
    if not isinstance(answer, Plan):
        return {DECIDES[core.method]: answer}
    trees = {name: getattr(answer, name) for name in TREE if getattr(answer, name) is not None}
    return {DECIDES[core.method]: answer.block_size, **trees}


def compare(
    policy: Policy,
    what: Export,
    runs: Mapping[str, Run],
    inputs: Mapping[str, Inputs],
    prompts: Sequence[PromptTrace],
    spec: DecoderSpec,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Comparison]:
    """Compare every file of a policy with the policy on every row of some prompts.

    Policies whose rows share state are compared at every step of a server that decodes the prompts, 1, 2, 7 and 64 at
    once, and after it.

    Raises:
        PolicyError: a row is decided otherwise although it was not close.
    """
    found, cores = {name: Comparison() for name in what.cores}, what.cores
    if what.state is not None:
        _compare_served(_Compared(policy, what, runs, inputs, found), prompts, spec, progress)
        return _agreed(found)
    # Prompts that make one batch: many where each is one row, else one, whose positions are rows.
    size = AT_ONCE if any(core.method == "begin" for core in cores.values()) else 1
    for group in (prompts[start : start + size] for start in range(0, len(prompts), size)):
        for name, source, state, answer in _questions(policy, cores, group, spec):
            if (source.context if isinstance(source, Draft) else source).batch_size:
                found[name].add(cores[name], inputs[name](source, state), answer, runs[name])
        for _ in group:
            progress()
    return _agreed(found)


def _agreed(found: dict[str, Comparison]) -> dict[str, Comparison]:
    for name, result in found.items():
        if not result.rows:
            raise PolicyError(f"the trace has no row to try {name}.onnx on: name one with longer outputs")
        if result.wrong:
            more = result.rows - result.agree - result.within_tolerance
            raise PolicyError(
                f"{name}.onnx decides otherwise than the policy on {more} of {result.rows} rows: "
                f"{'; '.join(result.wrong[:SHOWN])}; nothing was exported"
            )
    return found


def _questions(
    policy: Policy, cores: dict[str, Core], prompts: Sequence[PromptTrace], spec: DecoderSpec
) -> Iterator[tuple[str, Context | Draft, State, Tensor | Plan]]:
    """Each core with what it is asked about a group of prompts, and what the policy's own method answers."""
    names = {core.method: name for name, core in cores.items()}
    # A policy that sees no use in asking reads nothing, but its file does.
    wants, state = policy.wants | features_of(cores.values()), State()
    if "begin" in names:
        context = at_begin(prompts, spec, wants)
        state = policy.begin(context)
        yield names["begin"], context, {}, policy.select(state, context)
        return
    (prompt,) = prompts
    rows = at_select(prompt, spec, wants)
    state = policy.begin(rows)
    answer = policy.select(state, rows)
    if "select" in names:
        yield names["select"], rows, state, answer
    sizes = answer.block_size if isinstance(answer, Plan) else answer
    if "truncate" in names:
        traced = set(prompt.drafts.block_sizes.tolist())
        for size in sorted(set(sizes.tolist()) & traced):
            draft = at_truncate(prompt, rows, size, wants)
            yield names["truncate"], draft, state, policy.truncate(state, draft)
            if "extend" in names:
                for count in range(1, size - 1):
                    begun = draft.first(count)
                    yield names["extend"], begun, state, policy.extend(state, begun)


class _Compared(Policy):
    """A bound policy, whose files are asked beside it and must say the same."""

    wants = frozenset()

    def __init__(
        self,
        policy: Policy,
        what: Export,
        runs: Mapping[str, Run],
        inputs: Mapping[str, Inputs],
        found: dict[str, Comparison],
    ) -> None:
        super().__init__()
        self.policy, self.export, self.runs, self.inputs, self.found = policy, what, runs, inputs, found
        self.names = {core.method: name for name, core in what.cores.items()}
        self.wants = policy.wants | features_of(what.cores.values())  # type: ignore[misc]
        self.joint = policy.joint  # type: ignore[misc]

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        """It is bound."""

    def begin(self, context: Context) -> State:
        return self.policy.begin(context)

    def select(self, state: State, context: Context) -> Tensor | Plan:
        answer: Tensor | Plan = self._decided("select", state, context)
        return answer

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if "truncate" not in self.names:
            return self.policy.truncate(state, draft)
        verify_length: Tensor = self._decided("truncate", state, draft)
        return verify_length

    def observe(self, state: State, step: Step) -> None:
        given = self._given("observe", state, step)
        self.policy.observe(state, step)
        name = self.names["observe"]
        learned, rows = self._state(state), len(step.num_accepted)
        self.found[name].add_learned(self.export.cores[name], given, learned, rows, self.runs[name])

    def _decided(self, method: Method, state: State, source: Context | Draft) -> Any:
        given, name = self._given(method, state, source), self.names[method]
        answer = getattr(self.policy, method)(state, source)
        self.found[name].add_whole(self.export.cores[name], given, answer, self.runs[name])
        return answer

    def _given(self, method: Method, state: State, source: Context | Draft | Step) -> Given:
        """What the file takes, before the policy learns or changes anything."""
        given = self.inputs[self.names[method]](source, self._state(state))
        return {name: value.clone() for name, value in given.items()}

    def _state(self, state: State) -> State:
        assert self.export.state is not None
        return {**state, **self.export.state(state)}


class _AnyTime:
    """Costs of a server whose time nobody asks for; the policy knows its own."""

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        return 1.0

    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        return 1.0


def _compare_served(
    compared: _Compared,
    prompts: Sequence[PromptTrace],
    spec: DecoderSpec,
    progress: Callable[[], None],
) -> None:
    missing = compared.wants - offered(prompts[0])
    if missing:
        raise PolicyError(
            f"the trace does not hold {', '.join(sorted(missing))}, which the files read: trace it "
            f"({' '.join(f'--features {name}' for name in sorted(missing))}), or choose options that do without"
        )
    for rows in BATCHES:
        requests = max(len(prompts), 2 * rows) if rows > 1 else len(prompts)
        served = ServerReplayer(spec, compared, _AnyTime(), strict=True)
        served.serve(prompts, [place % len(prompts) for place in range(requests)], ClosedLoop(rows))
    for _ in prompts:
        progress()


def _rows_of(value: Tensor, shape: tuple[str | int, ...], rows: Tensor) -> Tensor:
    return value[rows] if shape and shape[0] == "batch" else value


def at_begin(prompts: Sequence[PromptTrace], spec: DecoderSpec, wants: frozenset[Feature]) -> Context:
    """The contexts of `begin`, a row for each prompt."""
    features = {
        name: torch.tensor(np.stack([p.features[name] if name in PREFILL else p.features[name][0] for p in prompts]))
        for name in wants - OF_THE_DRAFT
    }
    lengths = torch.tensor([prompt.prompt_length for prompt in prompts])
    limits = torch.tensor([prompt.max_new_tokens for prompt in prompts])
    return Context(spec, torch.zeros_like(lengths), limits, lengths, torch.Generator(), features)


def at_select(prompt: PromptTrace, spec: DecoderSpec, wants: frozenset[Feature]) -> Context:
    """The contexts of `select`, a row for each position at which a draft may begin."""
    rows = prompt.drafts.rows
    features = {name: torch.tensor(prompt.features[name][:rows]) for name in wants - OF_THE_DRAFT - {*PREFILL}}
    position = torch.arange(1, rows + 1)
    return Context(
        spec, position, prompt.max_new_tokens - position, prompt.prompt_length + position, torch.Generator(), features
    )


def at_truncate(prompt: PromptTrace, context: Context, block_size: int, wants: frozenset[Feature]) -> Draft:
    """The drafts of one block size, a row for each position."""
    drafts, width = prompt.drafts, block_size - 1
    column = drafts.column(block_size)
    features = {
        name: torch.tensor(np.nan_to_num(drafts.features[name][:, column, :width]))
        for name in wants & OF_THE_DRAFT
        if name in drafts.features
    }
    tokens = torch.tensor(drafts.tokens[:, column, :width]).long().clamp(min=0)
    if Feature.DRAFT_TOKENS in wants:
        features[Feature.DRAFT_TOKENS] = tokens
    length = torch.tensor(drafts.draft_length[:, column]).long()
    return Draft(context, context.full(block_size), length, tokens, features=features)
