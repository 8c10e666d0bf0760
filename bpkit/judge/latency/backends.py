"""A policy twice: as it is in torch, and its exported networks asked by onnxruntime, as policy `onnx` asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.export.convert import OPSETS, to_onnx
from bpkit.export.core import DECIDES, Core, Export, Exportable, Method, features_of
from bpkit.export.load import Loaded
from bpkit.export.policy import Onnx, OnnxConfig
from bpkit.export.schema import Golden
from bpkit.export.session import open_session
from bpkit.export.write import description
from bpkit.judge.latency.questions import TIMED, Question, Timed
from bpkit.judge.latency.timing import Ask
from bpkit.learn.trained import TrainedPolicy
from bpkit.policy import Policy, PolicyError, State, overrides, validated
from bpkit.registry.resolve import parse_spec, resolve_policy
from bpkit.types import DecoderSpec, Draft, Feature

TORCH, ONNXRUNTIME = "torch", "onnxruntime"
AnyPolicy = TypeVar("AnyPolicy", bound=Policy)


def exported_here(export: Export, spec: DecoderSpec, provider: str) -> Onnx:
    """Policy `onnx` over networks that are exported now, without a folder, from a policy that is bound to `spec`."""
    data = {f"{stem}.onnx": to_onnx(core) for stem, core in export.cores.items()}
    sessions = {core.method: open_session(data[f"{stem}.onnx"], provider) for stem, core in export.cores.items()}
    nothing = dict.fromkeys(export.cores, Golden(inputs={}, outputs={}))
    here: Any = {"name": "exported_here", "policy": "exported_here", "summary": "", "options": {}, "validation": {}}
    loaded = Loaded(description(export, data, spec, OPSETS[0], nothing, **here), sessions)
    return Onnx(validated(OnnxConfig, {"provider": provider}, owner="onnx"), loaded=loaded)


@dataclass
class Backends:
    """One policy under the backends that it has.

    Attributes:
        name: as it was named. policies: by backend, bound.
        cores: by method; empty for a policy that is not exportable, whose own methods are timed in torch alone.
        why_not: why there is no onnxruntime, if there is none.
    """

    name: str
    policies: dict[str, Policy]
    cores: dict[Method, Core] = field(default_factory=dict)
    why_not: str | None = None

    @property
    def methods(self) -> tuple[Timed, ...]:
        """What is timed: what the networks decide, or what the policy defines; what it learns; and whole steps."""
        own = self.policies[TORCH]
        decides = self.cores or [method for method in DECIDES if overrides(own, method)]
        also = [name for name in ("observe", "step") if name == "step" or overrides(own, name)]
        return tuple(method for method in TIMED if method in (*decides, *also))

    def serving(self, method: Timed) -> dict[str, Policy]:
        """The backends that have this method."""
        both = method != "observe" or method in self.cores
        return {name: self.policies[name] for name in (self.policies if both else [TORCH])}

    @property
    def wants(self) -> frozenset[Feature]:
        """Of all backends."""
        return frozenset().union(*(policy.wants for policy in self.policies.values()))

    @property
    def comparable(self) -> bool:
        """Whether both decide alike at any time: not if they learn from all rows; `bpkit export` compares these."""
        return "observe" not in self.cores

    @property
    def asks(self) -> bool:
        """Whether torch computes the networks at all: a policy may decide once for all that asking does not pay."""
        own = self.policies[TORCH]
        return features_of(self.cores.values()) <= own.wants | own.wants_optional


def backends_of(
    spec: str, decoder: SpeculativeDecoder, *, provider: str = "cpu", weights: Path | None = None
) -> Backends:
    """Both backends of the policy that a spec names.

    Args:
        spec: a policy, exported here; or `onnx:FOLDER`, which is compared with the policy that it was exported from.
        weights: trained folder that `onnx:FOLDER` was exported from, by default what ships.

    Raises:
        PolicyError: one of them cannot be used.
    """
    parsed = parse_spec(spec)
    if parsed["name"] == "onnx":
        parsed.setdefault("provider", provider)
        exported = resolve_policy(parsed)
        assert isinstance(exported, Onnx)
        origin = _origin(exported, weights)
        cores = _export(resolve_policy(origin), decoder).cores
        policies = {TORCH: _bound(resolve_policy(origin), decoder), ONNXRUNTIME: _bound(exported, decoder)}
        return Backends(spec, policies, {core.method: core for core in cores.values()})
    policies = {TORCH: _bound(resolve_policy(spec), decoder)}
    try:
        export = _export(resolve_policy(spec), decoder)  # another object: its networks stay as and where they are
        policies[ONNXRUNTIME] = _bound(exported_here(export, decoder.spec, provider), decoder)
    except PolicyError as error:
        return Backends(spec, policies, why_not=str(error))
    return Backends(spec, policies, {core.method: core for core in export.cores.values()})


def _origin(exported: Onnx, weights: Path | None) -> Mapping[str, Any]:
    """The policy that a folder was exported from."""
    description = exported.loaded.description
    options = {name: value for name, value in description.options.items() if name != "weights"}
    origin = {"name": description.policy, **options}
    return origin if weights is None else {**origin, "weights": str(weights)}


def _export(policy: Policy, decoder: SpeculativeDecoder) -> Export:
    if not isinstance(policy, Exportable):
        trained = "" if isinstance(policy, TrainedPolicy) else ", and has no trained networks"
        raise PolicyError(f"policy {type(policy).__name__} is not exportable{trained}")
    return _bound(policy, decoder).export()


def _bound(policy: AnyPolicy, decoder: SpeculativeDecoder) -> AnyPolicy:
    """Bound as the decoder binds it."""
    decoder.with_policy(policy)
    return policy


def decide(policy: Policy, method: Method, question: Question) -> Tensor:
    """What a policy decides, asked in the order of the loop: [batch]."""
    state = prepared(policy, method, question)
    decided = ask(policy, method, state, question)
    made: Tensor = policy.select(decided, question.begin) if method == "begin" else decided
    return made


def prepared(policy: Policy, method: Timed, question: Question) -> State:
    """The state that `method` finds."""
    state = {} if method == "begin" else policy.begin(question.begin)
    if method in ("extend", "truncate", "observe") and question.context is not None:
        policy.select(state, question.context)
    return state


def ask(policy: Policy, method: Timed, state: State, question: Question) -> Any:
    """One call of a method: the state for `begin`, the decision for others, nothing for `observe`."""
    source: Any = question.source(method)
    return policy.begin(source) if method == "begin" else getattr(policy, method)(state, source)


def asker(policy: Policy, method: Timed, made: Sequence[Question]) -> Ask:
    """Calls a method of the policy, or all that a step asks of it, with the batches in turn."""
    states = [prepared(policy, method, batch) for batch in made]
    if method == "step":
        steps = [whole_step(policy, batch) for batch in made]
        return lambda number: steps[number % len(made)](states[number % len(made)])
    return lambda number: ask(policy, method, states[number % len(made)], made[number % len(made)])


def whole_step(policy: Policy, question: Question) -> Callable[[State], None]:
    """All that a step asks of a policy, in the order of the loop; it is given the state."""
    context, draft, step = question.context, question.draft, question.step
    assert context is not None
    assert step is not None
    grown: list[Draft] = []
    if draft is not None and overrides(policy, "extend") and context.spec.work.may_end_early:
        grown = [draft.first(count) for count in range(1, draft.tokens.shape[1] + 1)]

    def go(state: State) -> None:
        policy.select(state, context)
        for so_far in grown:
            policy.extend(state, so_far)
        if draft is not None:
            policy.truncate(state, draft)
        policy.observe(state, step)

    return go
