"""Every registered policy over rows: each row is decided for as if alone, whatever lies beside it and beyond it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from bpkit_bandit.eesd import Eesd
from torch import Tensor

from bpkit.learn import TrainedPolicy
from bpkit.policy import Policy, State, overrides
from bpkit.registry.discovery import registry
from bpkit.registry.resolve import resolve_policy
from bpkit.testing.checks.records import some_rows
from bpkit.trace.cost import CostTable
from bpkit.types import Context, Draft, Plan
from tests.random_rows import SHIPPED, random_context, random_draft, random_step, row_of, state_of

DRAWS = Eesd
"""Draws for each row by itself: how lengths are distributed is tested with the policy."""
OTHERS = (
    "portfolio",  # without a cost model
    "confidence:schedule=heuristic_transient",
    "ema:warmup=0,interval=1,across_requests=false",
    "goodput:across_requests=true",
    "tapout:bandit=thompson,reward=time",
    "forecast:truncate=true,decision=0",
    "ldlp_threshold:keep=longer",
)


SHARING = sorted(
    name for name, entry in registry().policies.items() if name != "onnx" and getattr(entry.load(), "joint", False)
)
COST = CostTable.model_validate(
    {
        "draft": {16: 0.4},
        "verify": {size: 1 + 0.02 * size for size in range(1, 17)},
        "rows": {
            4: {"draft": {16: 0.8}, "verify": {b: 1 + 0.2 * b for b in range(1, 17)}, "padding": {"verify": 0.02}}
        },
    }
)


def specs() -> Iterator[str]:
    yield from sorted(registry().policies.keys() - {"onnx", *SHARING})
    yield from OTHERS
    for name in ("blockpilot", "forecast_truncate", "ldlp_threshold", "specdecpp"):
        yield f"onnx:{name}"


@pytest.fixture(params=specs())
def policy(request: pytest.FixtureRequest) -> Policy:
    if request.param.startswith("onnx:"):
        pytest.importorskip("onnxruntime")
    made = resolve_policy(request.param)
    made.bind(SHIPPED)
    return made


@pytest.mark.parametrize("padding_is_nan", [False, True])
@torch.inference_mode()
def test_rows_are_decided_for_as_each_alone(policy: Policy, padding_is_nan: bool) -> None:
    random = torch.Generator().manual_seed(3)
    alone = [row_alone(policy) for _ in range(4)]
    state = policy.begin(context := random_context(4, policy.wants, random))
    states = [one.begin(row_of(context, row)) for row, one in enumerate(alone)]
    names = state.keys()
    for turn in range(6):
        alone = [row_alone(policy) for _ in alone]  # with what the policy has learned from all of them
        turn_of_rows(policy, alone, state, states, random, padding_is_nan)
        assert state.keys() == names, "begin makes every name, else rows that begin cannot be put beside others"
        for row, single in enumerate(states):
            for name, value in state_of(state, [row]).items():
                assert torch.allclose(value.double(), single[name].double(), rtol=1e-5, atol=1e-6), (turn, name)
        # Some leave, others change places, one begins.
        order = [3, 0, 2]
        joining = random_context(1, policy.wants, random)
        states = [*(states[row] for row in order), row_alone(policy).begin(row_of(joining, 0))]
        begun = policy.begin(joining)
        state = {name: torch.cat([value, begun[name]]) for name, value in state_of(state, order).items()}


@pytest.mark.parametrize("spec", [*SHARING, "adaptive_verification:when=before"])
@pytest.mark.parametrize("cost", [COST, None])
@torch.inference_mode()
def test_rows_that_share_do_not_know_their_places(spec: str, cost: CostTable | None) -> None:
    policy, places, random = resolve_policy(spec), [2, 0, 3, 1], torch.Generator().manual_seed(7)
    policy.bind(SHIPPED, cost)
    state = policy.begin(random_context(4, policy.wants, random))
    for _ in range(8):
        context = random_context(4, policy.wants, random)
        context.row_ids = (0, 1, 2, 3)
        other, moved = copy.deepcopy(policy), state_of(state, places)
        turned = some_rows(context, places, random.get_state())
        assert isinstance(turned, Context)
        sizes = sizes_of(policy.select(state, context))
        assert sizes_of(other.select(moved, turned)).equal(sizes[places])
        widths = sizes - 1
        if int(widths.max()):
            draft = random_draft(context, sizes, widths.tolist(), policy.wants, random)
            turned_draft = some_rows(draft, places, random.get_state())
            assert isinstance(turned_draft, Draft)
            widths = policy.truncate(state, draft)
            assert other.truncate(moved, turned_draft).equal(widths[places])
        else:
            draft = random_draft(context, sizes, [0] * 4, policy.wants, random)
        policy.observe(state, random_step(draft, widths, 0.4, random))


def turn_of_rows(
    policy: Policy,
    alone: list[Policy],
    state: State,
    states: list[State],
    random: torch.Generator,
    padding_is_nan: bool,
) -> None:
    """Ask about all rows and about each alone; the states of both learn from the step."""
    rows = len(states)
    context = random_context(rows, policy.wants, random)
    sizes = sizes_of(policy.select(state, context))
    assert (sizes.shape, sizes.dtype) == ((rows,), torch.int64)
    answers = [int(sizes_of(one.select(states[row], row_of(context, row)))) for row, one in enumerate(alone)]
    if not isinstance(policy, DRAWS):
        assert sizes.tolist() == answers
    # Drafters may propose less than was asked, and one row has no draft at all.
    proposed = [int(torch.randint(min(size, 32), (), generator=random)) for size in sizes.tolist()]
    proposed[rows - 1] = 0
    proposed[0] = max(int(sizes[0]) - 1, 0)
    draft = random_draft(context, sizes, proposed, policy.wants, random, padding_is_nan)
    widths = draft.draft_length
    if draft.tokens.shape[1]:
        for method in [name for name in ("extend", "truncate") if overrides(policy, name)]:
            decided = getattr(policy, method)(state, draft)
            for row, one in enumerate(alone):
                if proposed[row]:
                    assert decided[row] == getattr(one, method)(states[row], row_of(draft, row)), (method, row)
                else:
                    assert decided[row] == 0, "there is nothing to verify, or to go on with"
            widths = decided if method == "truncate" else widths
    step = random_step(draft, widths, 0.1 * rows, random)
    policy.observe(state, step)
    for row, one in enumerate(alone):
        one.observe(states[row], row_of(step, row))


def sizes_of(answer: Tensor | Plan) -> Tensor:
    return answer.block_size if isinstance(answer, Plan) else answer


def row_alone(policy: Policy) -> Policy:
    """The policy itself, or a copy where it learns for all."""
    return copy.deepcopy(policy) if overrides(policy, "state_dict") else policy


@torch.inference_mode()
@pytest.mark.parametrize("name", ["forecast:decision=0", "ldlp", "specdecpp"])
def test_networks_see_nothing_of_padding(name: str) -> None:
    """What `predict` makes of rows together, as the runtime calls it, decides as without it."""
    policy = resolve_policy(name)
    policy.bind(SHIPPED)
    assert isinstance(policy, TrainedPolicy)
    random = torch.Generator().manual_seed(5)
    context = random_context(3, policy.wants, random)
    state = policy.begin(context)
    sizes = policy.select(state, context)
    context.predictions = policy.predict(context.features)
    assert policy.select(state, context).tolist() == sizes.tolist()
    draft = random_draft(context, sizes, [int(sizes[0]) - 1, 1, 0], policy.wants, random)
    widths = policy.truncate(state, draft)
    draft.predictions = policy.predict(draft.features)
    assert policy.truncate(state, draft).tolist() == widths.tolist()


@torch.inference_mode()
def test_specdecpp_decides_for_many_rows_as_for_few() -> None:
    policy = resolve_policy("specdecpp:threshold=0.7")
    policy.bind(SHIPPED)
    random = torch.Generator().manual_seed(7)
    context = random_context(32, policy.wants, random)
    draft = random_draft(context, context.full(8), [7] * 32, policy.wants, random)
    widths = policy.truncate({}, draft).tolist()
    assert widths == [int(policy.truncate({}, row_of(draft, row))) for row in range(32)]
    assert len(set(widths)) > 2
