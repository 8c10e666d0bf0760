"""The policies of an engine: the configured one, and those that requests name."""

from __future__ import annotations

import warnings
from itertools import count
from typing import Any

from bpkit.assets import model_name
from bpkit.decode.guard import PolicyFaultWarning
from bpkit.policy import Policy, PolicyError
from bpkit.registry.resolve import resolve_policy, written
from bpkit.types import CostModel, DecoderSpec, Feature
from bpkit_vllm.options import REQUEST_KEY, EngineError, EngineOptions, Spec, wanted_features
from bpkit_vllm.records import Records
from bpkit_vllm.refuse import check_policy, drafter_kind
from bpkit_vllm.request_policy import check_named_by_request
from bpkit_vllm.rows import EngineRows

MOST = 16
"""Policies with running requests at a time, beside those of the options."""


class EnginePolicies:
    """Which policy decides for which request.

    Args:
        config: `VllmConfig`. provided: features that policies can read in this mode.

    Attributes:
        computed: of these, what the policies of the options read.
        active: policies that have running requests.
        records: the observers.
        rows_of: of each request that runs or waits.
        refused: requests that named a policy that cannot serve them, and have the configured one.

    Raises:
        EngineError, PolicyError: a policy of the options cannot be used here.
    """

    def __init__(self, config: Any, options: EngineOptions, provided: frozenset[Feature]) -> None:
        self.config, self.options, self.provided = config, options, provided
        self.computed = provided & (wanted_features(options) | {Feature.DRAFT_TOKENS})
        self.spec, self.cost = decoder_spec(config), _cost_model(options.cost)
        self.rows_of: dict[str, EngineRows] = {}
        self.refused = 0
        self.records, self._numbers = Records(options.observers), count(1)
        self._warned: set[str] = set()
        self._known: dict[str, EngineRows] = {}
        for spec in (*options.policies, options.policy):
            self.default = self._made(spec)
        self._kept = set(self._known)

    @property
    def active(self) -> list[EngineRows]:
        return [rows for rows in self._known.values() if not rows.idle]

    @property
    def seconds(self) -> float:
        """That decisions took so far, of policies that have no requests now, too."""
        return sum(rows.seconds for rows in self._known.values())

    def use(self, spec: Spec | Policy) -> None:
        """Requests to come that name no policy have this one. Raises PolicyError."""
        self.default = self._made(spec)
        self._kept.add(self.default.text)

    def _made(self, spec: Spec | Policy) -> EngineRows:
        text = written(spec)
        if isinstance(spec, Policy) and text in self._known:
            text = f"{text} ({len(self._known)})"  # another of the same class, which may have running requests
        if text not in self._known:
            policy = resolve_policy(spec)
            check_policy(policy, text, self.provided, self.config)
            if policy.wants - self.computed:
                raise EngineError(
                    f"policy {text!r} reads {', '.join(sorted(policy.wants - self.computed))}, which nobody read when "
                    "vLLM started: list the policy under `policies` in the options of the engine"
                )
            policy.bind(self.spec, self.cost)
            limit = self.options.max_decision_us
            self._known[text] = EngineRows(
                text,
                policy,
                self.spec,
                provided=self.computed,
                seed=self.options.seed,
                max_decision=None if limit is None else limit / 1e6,
                records=self.records,
                numbers=self._numbers,
            )
        return self._known[text]

    def summary(self, *, last: bool = False) -> None:
        """A line for each policy in vLLM's log, if it is time."""
        self.records.summary(self._known, last=last)

    def close(self) -> None:
        """The engine stops."""
        self.summary(last=True)
        self.records.close()

    # Requests

    def admit(self, request: Any) -> None:
        """A request arrives; what it names is made if it must be, and refused if it cannot be."""
        if request.request_id in self.rows_of:
            return
        arguments = getattr(request.sampling_params, "extra_args", None) or {}
        self.rows_of[request.request_id] = self._named(arguments.get(REQUEST_KEY))

    def _named(self, text: Any) -> EngineRows:
        if text is None:
            return self.default
        if text in self._known:
            return self._known[text]
        try:
            check_named_by_request(text)
            self._forget_idle()
            if len(self._known) - len(self._kept) >= MOST:
                raise PolicyError(f"{MOST} other policies have running requests: try again later")
            return self._made(text)
        except Exception as error:  # of a request, which must not end the engine
            self.refused += 1
            if str(text) not in self._warned and len(self._warned) < MOST:
                self._warned.add(str(text))
                message = f"{REQUEST_KEY} {text!r}: {error}; policy {self.default.text!r} decides instead (said once)"
                warnings.warn(message, PolicyFaultWarning, stacklevel=2)
            return self.default

    def _forget_idle(self) -> None:
        used = {id(rows) for rows in self.rows_of.values()}
        for text, rows in [*self._known.items()]:
            if text not in self._kept and id(rows) not in used:
                del self._known[text]

    def park(self, request_id: str) -> None:
        """A request was preempted, and will run again."""
        if rows := self.rows_of.get(request_id):
            rows.park(request_id)

    def end(self, request_id: str, *, given_up: bool) -> None:
        """A request ended. The row of one that ended by itself is let go of with the step."""
        rows = self.rows_of.pop(request_id, None)
        if rows is not None:
            rows.forget(request_id)
            if given_up:
                rows.drop(request_id)


def decoder_spec(config: Any) -> DecoderSpec:
    """What policies learn about vLLM's models. Raises EngineError for a drafter of another kind."""
    model, speculative = config.model_config, config.speculative_config
    most = config.num_speculative_tokens + 1
    drafter = getattr(speculative, "draft_model_config", None)
    trained = getattr(getattr(drafter, "hf_config", None), "block_size", None) or most
    return DecoderSpec(
        target=model_name(str(model.model)),
        drafter=model_name(str(speculative.model or speculative.method)),
        drafter_kind=drafter_kind(config),
        trained_block_size=min(int(trained), most),
        max_block_size=most,
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        verify_rule="rejection",
        device=str(config.device_config.device),
    )


def _cost_model(name: str | None) -> CostModel | None:
    if name is None:
        return None
    from bpkit.trace.cost import read_cost

    return read_cost(name)
