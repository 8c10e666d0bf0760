"""Policies that each do one thing wrong, for the tests of `bpkit check`. What is wrong stands in the class name."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from bpkit_mlp.ldlp import Ldlp
from torch import Tensor, nn

from bpkit import Policy
from bpkit.learn import LearnedPolicy
from bpkit.policy import State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, FeatureNotWanted, Plan, Step


class Four(Policy):
    """Nothing is wrong with this one; the others derive from it."""

    wants = frozenset()

    def select(self, state: State, context: Context) -> Tensor | Plan:
        return context.full(4)


# lossless


class Raises(Four):
    def select(self, state: State, context: Context) -> Tensor:
        if int(context.position[0]) > 3:
            raise ArithmeticError("no idea")
        return context.full(4)


class BindRaises(Four):
    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        raise ArithmeticError("not bound")


class NotANumber(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return context.full(4) * float("nan")


class OneNumber(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return torch.tensor(4)


class PlainInt(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return 4  # type: ignore[return-value]


class TruthValues(Four):
    def truncate(self, state: State, draft: Draft) -> Tensor:
        return draft.draft_length > 2


class StateIsNone(Four):
    def begin(self, context: Context) -> State:
        return None  # type: ignore[return-value]


# sizes


class TooLarge(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return context.full(99)


class Nothing(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return context.full(0)


class Half(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return context.full(5) / 2


class MoreThanDrafted(Four):
    def truncate(self, state: State, draft: Draft) -> Tensor:
        return draft.draft_length + 1


class NoSuchSource(Four):
    def select(self, state: State, context: Context) -> Plan:
        return Plan(context.full(4), context.full(1))


# sources


class CountsFromOne(Four):
    def select(self, state: State, context: Context) -> Plan:
        last = len(context.spec.sources)
        return Plan(context.full(4), context.full(last if last > 1 else 0))


class PlanOfNumbers(Four):
    def select(self, state: State, context: Context) -> Plan | Tensor:
        several = len(context.spec.sources) > 1
        return Plan(context.full(4), 1) if several else context.full(4)  # type: ignore[arg-type]


class PlanOfOneRow(Four):
    def select(self, state: State, context: Context) -> Plan | Tensor:
        several = len(context.spec.sources) > 1
        return Plan(context.full(4), torch.tensor([[1]])) if several else context.full(4)


class TruthOfSources(Four):
    def select(self, state: State, context: Context) -> Plan | Tensor:
        several = len(context.spec.sources) > 1
        return Plan(context.full(4), context.full(1) > 0) if several else context.full(4)


class Alternates(Four):
    """Nothing is wrong with this one: it drafts from the sources in turn, by the position."""

    def select(self, state: State, context: Context) -> Plan:
        return Plan(context.full(4), context.position % len(context.spec.sources))


# features


class Undeclared(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return context.full(4) + (context["anchor_entropy"] > 1).long()


class UndeclaredAndQuiet(Four):
    def select(self, state: State, context: Context) -> Tensor:
        try:
            return context.full(4) + (context["last_hidden"].sum(dim=1) > 0).long()
        except FeatureNotWanted:
            return context.full(4)


class WrongPlace(Four):
    wants = frozenset({Feature.PREFILL_LOGITS})

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(4) + (context["prefill_logits"].sum(dim=1) > 0).long()


class NeverReads(Four):
    wants = frozenset({Feature.DRAFT_ENTROPY})


# mutation


class WritesToDraft(Four):
    def truncate(self, state: State, draft: Draft) -> Tensor:
        return draft.draft_length.clamp_(max=2)


class WritesToFeature(Four):
    wants = frozenset({Feature.DRAFT_PROBABILITY})

    def truncate(self, state: State, draft: Draft) -> Tensor:
        draft["draft_probability"].mul_(0.5)
        return draft.draft_length


class ReplacesFeature(Four):
    wants = frozenset({Feature.DRAFT_PROBABILITY})

    def truncate(self, state: State, draft: Draft) -> Tensor:
        features: Any = draft.features
        features["draft_probability"] = draft["draft_probability"] * 0.5
        return draft.draft_length


class WritesToStep(Four):
    def observe(self, state: State, step: Step) -> None:
        step.num_accepted.add_(1)


class WritesToContextLater(Four):
    def begin(self, context: Context) -> State:
        return {"steps": context.position}  # 0, and the runtime's own

    def observe(self, state: State, step: Step) -> None:
        state["steps"].add_(1)


# determinism


class GlobalRandomness(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return context.full(random.randint(2, 8))


# rows


class MeanOfTheBatch(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return context.full(2 + int(context.context_length.float().mean()) % 6)


class MeanOverPadding(Four):
    wants = frozenset({Feature.DRAFT_PROBABILITY})

    def select(self, state: State, context: Context) -> Tensor:
        return 2 + context.context_length % 7

    def truncate(self, state: State, draft: Draft) -> Tensor:
        sure = draft["draft_probability"].mean(dim=1) > 0.5
        return draft.draft_length.where(sure, draft.draft_length.clamp(max=1))


class CountsPadding(Four):
    """Lacks `torch.minimum(..., draft.draft_length)`: all drafts have three tokens, unless an engine mixes lengths."""

    wants = frozenset({Feature.DRAFT_PROBABILITY})

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return (draft["draft_probability"].cumprod(dim=1) > 0).sum(dim=1)


class ListInState(Four):
    def begin(self, context: Context) -> State:
        return {"sizes": [4]}


class BatchAxisMissing(Four):
    def begin(self, context: Context) -> State:
        return {"size": torch.tensor([4])}


class OneRow(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return torch.tensor([4])


class OneNumberOnly(Four):
    def select(self, state: State, context: Context) -> Tensor:
        return context.full(min(4, int(context.remaining)))


class NumbersRequests(Four):
    """Gives rows places in the batch."""

    def begin(self, context: Context) -> State:
        return {"place": torch.arange(context.batch_size)}

    def select(self, state: State, context: Context) -> Tensor:
        place: Tensor = state["place"]
        return 2 + place


class StateMadeLate(Four):
    """Counts steps under a name that `begin` did not make."""

    def select(self, state: State, context: Context) -> Tensor:
        steps: Tensor = state.get("steps", context.full(0))
        return 2 + steps

    def observe(self, state: State, step: Step) -> None:
        state["steps"] = (state.get("steps", torch.zeros_like(step.block_size)) + 1).clamp(max=6)


class AveragesTheBatch(Four):
    """What a request learns is of all that ran beside it."""

    def begin(self, context: Context) -> State:
        return {"average": context.position.double()}

    def observe(self, state: State, step: Step) -> None:
        state["average"] = step.position.double().mean().expand(len(step.position))


class PredictsTogether(Four):
    """Its network looks at a request beside the mean of all."""

    wants = frozenset({Feature.LAST_HIDDEN})

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        hidden = features[Feature.LAST_HIDDEN]
        return {"above": (hidden - hidden.mean(dim=0)).sum(dim=1)}

    def select(self, state: State, context: Context) -> Tensor:
        return 4 + (self.predicted(context)["above"] > 0).long()


class ExtendsByTheFirst(Four):
    """All requests draft on while the first one does."""

    wants = frozenset({Feature.DRAFT_TOKENS})

    def extend(self, state: State, draft: Draft) -> Tensor:
        return (draft["draft_tokens"][:1, -1] % 2 == 0).expand(len(draft.draft_length))


class RandomTogether(Four):
    """Draws for each row, and lets the number of rows decide how large."""

    def select(self, state: State, context: Context) -> Tensor:
        rows = context.batch_size
        return 2 + torch.randint(0, 2, (rows,), generator=context.generator) + 4 * (rows > 1)


class JointByPlace(Four):
    joint = True

    def select(self, state: State, context: Context) -> Tensor:
        return 2 + torch.arange(context.batch_size)


# overlap


class KeepsSizeOnSelf(Four):
    """Though `begin` resets it, the size is that of whichever request came last."""

    size: int

    def begin(self, context: Context) -> State:
        self.size = 8
        return {}

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.size)

    def observe(self, state: State, step: Step) -> None:
        self.size = int(step.acceptance_length[0]) + 2


class CachesOnSelf(Four):
    """Nothing is wrong with it: what it keeps on `self` is no request's."""

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.known: dict[int, int] = {}

    def select(self, state: State, context: Context) -> Tensor:
        lengths = context.context_length.tolist()
        return context.position.new_tensor([self.known.setdefault(length, 2 + length % 5) for length in lengths])


class PlansOnSelf(Four):
    """All requests take from the plan of the last one."""

    plan: list[int]

    def begin(self, context: Context) -> State:
        self.plan = [4] * 12
        return {}

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.plan.pop())


# memory


class ForgetsToSave(Four):
    """Keeps a count across requests, and says nothing of it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.requests = 0

    def begin(self, context: Context) -> State:
        self.requests += 1
        return {}

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(2 + self.requests % 6)


class SavesTensor(ForgetsToSave):
    def state_dict(self) -> dict[str, Any]:
        return {"requests": torch.tensor(self.requests)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.requests = int(state["requests"])


class SavesHalf(ForgetsToSave):
    def state_dict(self) -> dict[str, Any]:
        return {"requests": self.requests // 2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.requests = int(state["requests"])


class CannotLoad(ForgetsToSave):
    def state_dict(self) -> dict[str, Any]:
        return {"requests": self.requests}


# survival


class TrainedSizeOnly(Four):
    def truncate(self, state: State, draft: Draft) -> Tensor:
        return torch.arange(8)[draft.draft_length]


class DividesByDrafted(Four):
    def observe(self, state: State, step: Step) -> None:
        for accepted, drafted in zip(step.num_accepted.tolist(), step.draft_length.tolist(), strict=True):
            assert accepted / drafted <= 1


class NeedsAStep(Four):
    def begin(self, context: Context) -> State:
        return {"steps": context.full(0)}

    def observe(self, state: State, step: Step) -> None:
        state["steps"] = state["steps"] + 1

    def end(self, state: State) -> None:
        assert all(1 / steps for steps in state["steps"].tolist())


class LongPromptsOnly(Four):
    def begin(self, context: Context) -> State:
        if int(context.context_length.min()) < 4:
            raise ArithmeticError("too short")
        return {}


# device


class StaysOnTheHost(Four):
    """Its weights are made on the host, whatever the decoder's device."""

    wants = frozenset({Feature.LAST_HIDDEN})

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.weight = torch.ones(decoder.hidden_size)

    def select(self, state: State, context: Context) -> Tensor:
        return 4 + (context[Feature.LAST_HIDDEN] @ self.weight > 0).long()


# export


class DecidesOtherwise(Ldlp):
    """Its files draft what the forecast says; it drafts at most two positions."""

    def select(self, state: State, context: Context) -> Tensor:
        return super().select(state, context).clamp(max=2)


# No weights


class NetworkTooWide(LearnedPolicy):
    wants = frozenset({Feature.LAST_HIDDEN})

    def network(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs + 1, outputs)


# Not bad


class SizeInState(Four):
    """Each request keeps a size of its own."""

    def begin(self, context: Context) -> State:
        return {"size": 2 + context.context_length % 7}

    def select(self, state: State, context: Context) -> Tensor:
        size: Tensor = state["size"]
        return size


class Learned(LearnedPolicy):
    """In a file of one's own, with a network and no more."""

    wants = frozenset({Feature.LAST_HIDDEN, Feature.ANCHOR_ENTROPY})

    def network(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs)
