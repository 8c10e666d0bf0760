"""The Policy class: one object that decides block sizes. A whole policy is one method:

>>> from bpkit.policy import Policy
>>> class Eight(Policy):
...     wants = frozenset()
...
...     def select(self, state, context):
...         return context.full(8)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bpkit.names import did_you_mean
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, Any]
"""A policy's memory of the running requests: tensors with the batch axis first. The runtime owns it."""


class PolicyError(ValueError):
    """A policy or its options cannot be used; the message says what to change."""


class PolicyConfig(BaseModel):
    """Base of every `Policy.Config`: frozen, and unknown options are errors.

    Class attributes:
        grid: options worth tuning, and the values to try. `bpkit evaluate` tries them on validation prompts, all
            combinations of those that the user has not set. Of `block_size`, only values that the trace holds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Raises PolicyError if `grid` names what is no option."""
        for name in cls.grid:
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields) or "none"
                raise PolicyError(f"{cls.__name__}.grid names {name!r}, which is no option; the options are: {known}")


class Policy:
    """Decides how much to draft (`select`) and how much of the draft to verify (`truncate`).

    Any decision gives the same text; a policy can only change the speed. Nothing about a single request may
    live on `self`: it belongs into the dict that `begin` returns, which the runtime hands to every later call.

    A row of the batch is one running request. Each call decides for all rows that it is handed; requests begin and end
    between steps, and rows of the state come, go and change places with them. So a row is decided for by itself.

    Class attributes:
        Config: a `PolicyConfig` with the options and their defaults.
        wants: features the policy reads. Required: write `wants = frozenset()` if there are none.
        wants_optional: features it uses where the drafter can provide them.
        joint: True if rows of a batch share a budget: a row's decision may then depend on the others, though not on
            their order. `select` and `truncate` are handed all running rows of the step, as always.
        in_order: True if `observe` must be told of a step before `select` is asked for the next, because what `select`
            leaves in the state is what `observe` reads. Engines that select ahead of the running step refuse it.
    """

    Config: ClassVar[type[PolicyConfig]] = PolicyConfig
    wants: ClassVar[frozenset[Feature]]
    wants_optional: ClassVar[frozenset[Feature]] = frozenset()
    joint: ClassVar[bool] = False
    in_order: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for attribute in ("wants", "wants_optional"):
            given = vars(cls).get(attribute)
            if isinstance(given, (str, list, tuple, set, frozenset)):  # else a property, or for `__init__` to refuse
                setattr(cls, attribute, _features(given, f"{cls.__name__}.{attribute}"))

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        """Take a ready config, or options to validate. Raises PolicyError."""
        kind = type(self)
        if not isinstance(getattr(self, "wants", None), frozenset):
            raise PolicyError(
                f"policy {kind.__name__} does not say which features it wants: add a class attribute "
                "`wants = frozenset()`, or name members of bpkit.Feature in it"
            )
        if kind.select is Policy.select:
            raise PolicyError(f"policy {kind.__name__} must define select(self, state, context), as in bpkit.Policy")
        self.config = config if config is not None else validated(self.Config, options, owner=type(self).__name__)

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        """Called once, before the first request. Raise PolicyError if the policy cannot serve this decoder."""

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        """What the policy's networks make of features, for policies that have some; the base class makes nothing.

        It is called on the decoder's device, with the wanted features of the anchor (each [batch, ...]) after every
        target pass, and with those of drafted tokens (each [batch, positions, ...]) after a draft. What it returns
        comes to the host in the copy that also brings the tokens, so that a decision costs no wait of its own, and is
        read there with `self.predicted(context)` and `self.predicted(draft)`.

        Args:
            features: only those that are known at this point. A draft may be handed over in pieces, so each position
                is predicted by itself.

        Returns:
            By names of the policy's own: tensors [batch, ...], of drafts [batch, positions, ...].
        """
        return {}

    def predicted(self, known: Context | Draft) -> Mapping[str, Tensor]:
        """What `predict` made of the features of a context or a draft, on the host.

        Where the runtime has not asked `predict`, it is asked here, which costs a wait for the device.
        """
        if known.predictions is not None:
            return known.predictions
        return {name: value.cpu() for name, value in self.predict(known.features).items()}

    def begin(self, context: Context) -> State:
        """Requests start, after prefill: the rows of `context` and no others.

        Returns:
            Their state: tensors with the batch axis first, under every name that later calls write.
        """
        return {}

    def select(self, state: State, context: Context) -> Tensor | Any:
        """The block size of the next draft, anchor included: int64 [batch], from 1 (no draft) upwards.

        Where the decoder has several sources of drafts (`context.spec.sources`), a `bpkit.Plan` also names the source;
        block sizes alone are drafted by source 0. Of one that drafts trees it may also say which.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(self, state, context)")

    def extend(self, state: State, draft: Draft) -> Tensor:
        """Autoregressive drafters only: go on drafting after this token? bool [batch]."""
        return draft.draft_length > 0

    def truncate(self, state: State, draft: Draft) -> Tensor:
        """How many drafted tokens to verify, the first of the draft: int64 [batch], 0 .. `draft.draft_length`.

        Where drafts are trees (`draft.parents`) the first tokens are the best, and a mask, bool like `draft.parents`,
        may say which to verify instead; none of them without the tokens before it on its path.
        """
        return draft.draft_length

    def observe(self, state: State, step: Step) -> None:
        """A step of all running rows ended; learn from it. The time of a step is of all rows together."""

    def end(self, state: State) -> None:
        """Requests ended by themselves, whose rows of the state these are; a chance to save what was learned."""

    def state_dict(self) -> dict[str, Any]:
        """Memory across requests as plain JSON values; empty if there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if state:
            raise PolicyError(f"policy {type(self).__name__} keeps no memory across requests, but was given one")

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.config.model_dump().items())
        return f"{type(self).__name__}({options})"


def _features(given: Iterable[str], where: str) -> frozenset[Feature]:
    """Features by their names. Raises PolicyError for a name that is none."""
    if isinstance(given, str):
        raise PolicyError(
            f"{where} is a text; name features in a set: {where.rpartition('.')[2]} = frozenset({{{given!r}}})"
        )
    for name in given:
        if name not in [*Feature]:
            said = f"{where} names {str(name)!r}, which is no feature.{did_you_mean(str(name), Feature)}"
            raise PolicyError(f"{said} Features: {', '.join(Feature)}")
    return frozenset(map(Feature, given))


def overrides(policy: Policy, method: str) -> bool:
    """Whether the policy defines `method` itself, so that the runtime must call it."""
    return getattr(type(policy), method) is not getattr(Policy, method)


Options = TypeVar("Options", bound=BaseModel)


def validated(config: type[Options], options: dict[str, Any], *, owner: str, what: str = "policy") -> Options:
    """Build `config` from options of a policy, or of `what`.

    Raises:
        PolicyError: names each bad option and lists the accepted ones.
    """
    try:
        return config(**options)
    except ValidationError as error:
        fields = config.model_fields
        accepted = ", ".join(n if f.is_required() else f"{n}={f.default!r}" for n, f in fields.items()) or "none"
        faults = []
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            unknown = fault["type"] == "extra_forbidden"
            place = f"option {name!r}: " if name else ""  # the options together have none
            said = fault["msg"].removeprefix("Value error, ")
            faults.append(f"unknown option {name!r}" if unknown else f"{place}{said}")
        raise PolicyError(f"{what} {owner!r}: {'; '.join(faults)}. Accepted options: {accepted}") from None
