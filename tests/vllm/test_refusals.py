"""What policies and vLLM cannot do together ends the start, by name and with what to change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from bpkit_vllm import refuse
from bpkit_vllm.options import EngineError, read_options
from bpkit_vllm.policies import EnginePolicies
from bpkit_vllm.refuse import check_engine, provided_features
from torch import Tensor
from vllm.engine.arg_utils import EngineArgs

from bpkit import Policy
from bpkit.policy import State
from bpkit.types import Context, Draft
from tests.vllm.engine import METHODS, TARGET, Engine


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    """vLLM's configuration with each drafter."""
    common: dict[str, Any] = {"model": TARGET, "dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    return {
        name: EngineArgs(**common, speculative_config=dict(given), async_scheduling=False).create_engine_config()
        for name, given in METHODS.items()
    }


def start(config: Any, given: Any, *, is_async: bool = False) -> None:
    """What a scheduler does with its configuration when it is made."""
    options = read_options(given)
    check_engine(config, options, is_async=is_async)
    EnginePolicies(config, options, provided_features(config, is_async=is_async)).close()


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A copy with other values, by dotted names."""
    made = copy.copy(config)
    for path, value in changes.items():
        part, _, name = path.rpartition(".")
        if part:
            setattr(made, part, copy.copy(getattr(made, part)))
        setattr(getattr(made, part) if part else made, name, value)
    return made


WORKER = {"parallel_config.worker_cls": "bpkit_vllm.FeatureWorker"}


def test_what_is_refused_below_is_served_otherwise(configs: dict[str, Any]) -> None:
    for config in configs.values():
        start(config, {"bpkit": {"policy": "fixed:4", "policies": ["goodput", "ucb"]}})
    start(changed(configs["dflash"], WORKER), {"bpkit": {"policy": "threshold:0.4", "policies": ["svip"]}})
    asynchronous = changed(configs["dflash"], {"scheduler_config.async_scheduling": True})
    start(asynchronous, {"bpkit": {"policy": "fixed:4"}}, is_async=True)


@pytest.mark.parametrize(
    ("changes", "is_async", "message"),
    [
        ({}, True, "AsyncPolicyScheduler with asynchronous scheduling off: name --scheduler-cls bpkit_vllm.PolicyS"),
        (
            {"scheduler_config.async_scheduling": True},
            False,
            "asynchronous scheduling on: name --scheduler-cls bpkit_vllm.AsyncPolicyScheduler, or .*--no-async-sched",
        ),
        ({"speculative_config": None}, False, "nothing to decide on without a drafter.*--speculative-config"),
        (
            {"speculative_config.num_speculative_tokens_per_batch_size": [(1, 4, 3)]},
            False,
            "num_speculative_tokens_per_batch_size decides draft lengths as well.*name policy batch_table",
        ),
        (
            {"speculative_config.enable_adaptive_verification": True},
            False,
            "enable_adaptive_verification cuts drafts as well.*name policy adaptive_verification",
        ),
        ({"parallel_config.data_parallel_size": 2}, False, "data parallelism.*run one engine for each replica"),
        ({"parallel_config.pipeline_parallel_size": 2}, False, "pipeline parallelism.*use tensor parallelism"),
        ({"speculative_config.method": "suffix"}, False, "speculative method 'suffix' was not tried.*dflash"),
    ],
)
def test_configurations_of_vllm(configs: dict[str, Any], changes: dict[str, Any], is_async: bool, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        start(changed(configs["dflash"], changes), {"bpkit": {"policy": "fixed:4"}}, is_async=is_async)


@pytest.mark.parametrize(
    ("method", "changes", "policy", "message"),
    [
        ("dflash", {}, "threshold:0.4", "reads draft_probability: that is there with --no-async-sched.* --worker-cls"),
        ("ngram", WORKER, "threshold:0.4", "n-gram drafts have no distribution; take a drafter that is a model"),
        (
            "dflash",
            {**WORKER, "speculative_config.draft_sample_method": "probabilistic"},
            "threshold:0.4",
            "would bias the text; draft_sample_method='greedy'",
        ),
        ("dflash", WORKER, "priority", "reads source_match.*no mode of vLLM gives that; bpkit's own decoder does"),
        ("draft_model", WORKER, "forecast", "reads .*target_features.*only DFlash drafters read layers of the target"),
        ("dflash", {}, "exp3", "must be told of each step before it chooses.*use one without that, such as bandit"),
    ],
)
def test_policies_that_a_mode_cannot_serve(
    configs: dict[str, Any], method: str, changes: dict[str, Any], policy: str, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        start(changed(configs[method], changes), {"bpkit": {"policy": policy}})


class EndsDrafts(Policy):
    """Decides token by token whether a draft goes on."""

    wants = frozenset()

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(4)

    def extend(self, state: State, draft: Draft) -> Tensor:
        return draft.draft_length > 0


def test_a_policy_that_ends_drafts_token_by_token(configs: dict[str, Any]) -> None:
    policies = EnginePolicies(configs["draft_model"], read_options({"bpkit": {"policy": "fixed:4"}}), frozenset())
    with pytest.raises(EngineError, match=r"ends drafts token by token \(`extend`\), and vLLM makes whole drafts"):
        policies.use(EndsDrafts())


def test_features_need_the_first_model_runner(configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(configs["dflash"], WORKER)
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    with pytest.raises(EngineError, match=r"reads draft_entropy.* VLLM_USE_V2_MODEL_RUNNER=0"):
        start(config, {"bpkit": {"policy": "svip"}})


def test_features_need_the_synchronous_mode(configs: dict[str, Any]) -> None:
    config = changed(configs["dflash"], {**WORKER, "scheduler_config.async_scheduling": True})
    with pytest.raises(EngineError, match=r"--no-async-scheduling --scheduler-cls bpkit_vllm.PolicyScheduler"):
        start(config, {"bpkit": {"policy": "threshold:0.4"}}, is_async=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, 'name a policy in vLLM\'s own configuration: --additional-config .*"fixed:4"'),
        ({"bpkit": {}}, "policy.*the options are: policy, policies, cost, max_decision_us"),
        ({"bpkit": {"policy": "fixed:4", "polices": []}}, "polices"),
        ({"bpkit": {"policy": "fixed:4", "max_decision_us": 0}}, "max_decision_us"),
        ({"bpkit": {"policy": "fixd:4"}}, "there is no policy 'fixd'"),
        ({"bpkit": {"policy": "fixed:4", "cost": "nowhere.json"}}, "nowhere.json"),
        ({"bpkit": {"policy": "fixed:4", "observers": ["jsnl:x"]}}, "jsnl"),
    ],
)
def test_options(configs: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        start(configs["dflash"], given)


def test_versions_that_it_was_not_run_with(configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refuse, "installed_version", lambda: "0.33.1")
    with pytest.raises(EngineError, match=r'vLLM 0\.33\.1 is not among the versions .*0\.32.*"untested": true'):
        start(configs["dflash"], {"bpkit": {"policy": "fixed:4"}})
    start(configs["dflash"], {"bpkit": {"policy": "fixed:4", "untested": True}})


def test_an_engine_does_not_start_with_what_is_refused() -> None:
    with pytest.raises(EngineError, match="reads draft_probability"):
        Engine("dflash", {"policy": "threshold:0.4"})
