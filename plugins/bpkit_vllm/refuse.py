"""What does not go together is refused at start, by name, with what to change."""

from __future__ import annotations

from typing import Any

from bpkit.policy import Policy, overrides
from bpkit.types import (
    AUTOREGRESSIVE,
    BLOCK_DIFFUSION,
    NGRAM,
    OF_THE_ANCHOR,
    OF_THE_DISTRIBUTION,
    OF_THE_DRAFT,
    Feature,
)
from bpkit_vllm.options import EngineError, EngineOptions
from bpkit_vllm.versions import TESTED, installed_version, is_tested

SYNCHRONOUS, ASYNCHRONOUS = "bpkit_vllm.PolicyScheduler", "bpkit_vllm.AsyncPolicyScheduler"
WORKER = "bpkit_vllm.FeatureWorker"
METHODS = {
    BLOCK_DIFFUSION: ("dflash",),
    AUTOREGRESSIVE: ("draft_model", "eagle", "eagle3", "mtp"),
    NGRAM: ("ngram",),
}
"""vLLM's methods by the kind of drafter that they are. Of these, eagle, eagle3 and mtp were not run."""
OF_DRAFT_MODELS = OF_THE_DISTRIBUTION | {Feature.DRAFT_HIDDEN}
FROM_WORKER = (
    OF_DRAFT_MODELS
    | OF_THE_ANCHOR
    | {Feature.LAST_HIDDEN, Feature.PREFILL_HIDDEN, Feature.ANCHOR_EMBEDDING, Feature.TARGET_FEATURES}
)
"""Features that `FeatureWorker` sends to the scheduler."""


def check_engine(config: Any, options: EngineOptions, *, is_async: bool) -> None:
    """Refuse configurations of vLLM under which policies cannot decide.

    Args:
        config: `VllmConfig`. is_async: whether the scheduler class is the asynchronous one.

    Raises:
        EngineError: for the first that is found.
    """
    found = installed_version()
    if not is_tested(found) and not options.untested:
        raise EngineError(
            f"vLLM {found} is not among the versions that bpkit was run with ({', '.join(TESTED)}.*): install one of "
            'these, or set "untested": true beside "policy" and check that texts stay what they are without bpkit'
        )
    if config.scheduler_config.async_scheduling != is_async:
        now, right = (ASYNCHRONOUS, SYNCHRONOUS) if is_async else (SYNCHRONOUS, ASYNCHRONOUS)
        mode = "off" if is_async else "on"
        raise EngineError(
            f"scheduler {now} with asynchronous scheduling {mode}: name --scheduler-cls {right}, or switch it "
            f"{'on (--async-scheduling)' if is_async else 'off (--no-async-scheduling)'}"
        )
    speculative = config.speculative_config
    if speculative is None:
        raise EngineError("there is nothing to decide on without a drafter: give vLLM a --speculative-config")
    if speculative.num_speculative_tokens_per_batch_size:
        raise EngineError(
            "num_speculative_tokens_per_batch_size decides draft lengths as well: leave it out of the speculative "
            "config, and name policy batch_table for such a table"
        )
    if speculative.enable_adaptive_verification:
        raise EngineError(
            "enable_adaptive_verification cuts drafts as well: leave it out of the speculative config, or name policy "
            "adaptive_verification and leave it to that"
        )
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1:
        raise EngineError(
            "data parallelism inside one engine wants the same draft length in all ranks, and policies decide in each "
            "by itself: run one engine for each replica"
        )
    if parallel.pipeline_parallel_size > 1:
        raise EngineError("pipeline parallelism is not supported: use tensor parallelism")
    if config.model_config.is_diffusion:
        raise EngineError("diffusion models draft without an anchor, and block sizes do not apply")


def check_policy(policy: Policy, text: str, provided: frozenset[Feature], config: Any) -> None:
    """Refuse a policy that this engine cannot serve.

    Args:
        text: the policy as it was written. provided: features that there are.

    Raises:
        EngineError: it says which mode can.
    """
    if overrides(policy, "extend") and not overrides(policy, "truncate"):
        raise EngineError(
            f"policy {text!r} ends drafts token by token (`extend`), and vLLM makes whole drafts: use one that decides "
            "by `select` and `truncate`"
        )
    if policy.in_order:
        raise EngineError(
            f"policy {text!r} must be told of each step before it chooses for the next (`in_order`), and vLLM plans "
            "the next step first: use one without that, such as bandit, ucb or goodput"
        )
    missing = policy.wants - provided
    if missing:
        raise EngineError(f"policy {text!r} reads {', '.join(sorted(missing))}: {_where(missing, config)}")


def provided_features(config: Any, *, is_async: bool) -> frozenset[Feature]:
    """What policies can read in this mode."""
    if is_async:
        return frozenset()
    own = frozenset({Feature.DRAFT_TOKENS})
    has_worker = "bpkit_vllm" in str(config.parallel_config.worker_cls)
    found = own | FROM_WORKER if has_worker and not config.use_v2_model_runner else own
    speculative = config.speculative_config
    if drafter_kind(config) == NGRAM or speculative.use_local_argmax_reduction or speculative.use_heterogeneous_vocab:
        found -= OF_DRAFT_MODELS
    if speculative.method != "dflash":  # it reads the target's layers
        found -= {Feature.TARGET_FEATURES}
    if config.lora_config is not None:  # they are computed by the head once more, which LoRA may adapt
        found -= OF_THE_ANCHOR
    return found - OF_THE_DRAFT if _is_sampled(config) else found


def drafter_kind(config: Any) -> str:
    """The label of vLLM's drafter. Raises EngineError for one whose drafts have another shape."""
    method = config.speculative_config.method
    for kind, methods in METHODS.items():
        if method in methods:
            return kind
    known = ", ".join(name for methods in METHODS.values() for name in methods)
    raise EngineError(f"speculative method {method!r} was not tried with policies; known are {known}")


def _where(missing: frozenset[Feature], config: Any) -> str:
    """Which mode has these features."""
    if _is_sampled(config) and missing & OF_THE_DRAFT:
        return (
            "to cut drafts by what was drawn would bias the text; draft_sample_method='greedy' in the speculative "
            "config lets policies read it"
        )
    if missing & OF_DRAFT_MODELS and drafter_kind(config) == NGRAM:
        return "n-gram drafts have no distribution; take a drafter that is a model"
    for option in ("use_local_argmax_reduction", "use_heterogeneous_vocab"):
        if missing & OF_DRAFT_MODELS and getattr(config.speculative_config, option):
            return f"under {option} the drafter's distribution is not there; leave that out of the speculative config"
    if Feature.TARGET_FEATURES in missing and config.speculative_config.method != "dflash":
        return "only DFlash drafters read layers of the target (method dflash)"
    if missing & OF_THE_ANCHOR and config.lora_config is not None:
        return "it is not there with LoRA; leave that off"
    if missing <= FROM_WORKER | {Feature.DRAFT_TOKENS}:
        return (
            f"that is there with --no-async-scheduling --scheduler-cls {SYNCHRONOUS} --worker-cls {WORKER} and "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )
    return "no mode of vLLM gives that; bpkit's own decoder does"


def _is_sampled(config: Any) -> bool:
    """Whether drafts are drawn at random."""
    return bool(config.speculative_config.draft_sample_method == "probabilistic")
