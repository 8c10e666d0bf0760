"""A worker for vLLM's V1 model runner that sends what policies read of the models along with the drafted tokens.

Importing this imports vLLM. It was run on CPUs, in one process and in a process of its own. The same class on a GPU,
over vLLM's GPU worker, and with tensor parallelism, where every rank computes the features and vLLM reads those of the
first, was only read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.platforms import current_platform
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from bpkit.decode.features import anchor_statistics
from bpkit.decode.host import to_host
from bpkit.types import OF_THE_ANCHOR, OF_THE_DISTRIBUTION, OF_THE_DRAFT, Feature
from bpkit_vllm.features import ATTRIBUTE
from bpkit_vllm.options import KEY, EngineError, read_options, wanted_features
from bpkit_vllm.records import log
from bpkit_vllm.refuse import FROM_WORKER, provided_features

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

OF_HIDDEN = frozenset({Feature.LAST_HIDDEN, Feature.PREFILL_HIDDEN})
_WATCHED = ("propose", "_sample_draft_tokens", "_greedy_sample")
"""Methods of drafters, of which the second is replaced by one that does what the third does."""


class FeatureWorker(PlatformWorker):
    """vLLM's worker, which computes the features that policies of `additional_config` want, and no others.

    Without policies it computes none. A fault of vLLM's DFlash drafts on CPUs is mended in any case.

    `take_draft_token_ids` gives them with the tokens, as `bpkit_features`: float32 arrays by the name of a feature,
    first axis as `req_ids`. What is said of a request whose prompt is not read to its end means nothing.

    Raises:
        EngineError: in `load_model`; the drafter is of a kind whose drafts cannot be watched.
    """

    features: _Features | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        _mend_context_keys(getattr(self.model_runner, "drafter", None))
        if wanted := self._wanted():
            self.features = _Features(self.model_runner, wanted)

    def _wanted(self) -> frozenset[Feature]:
        """What policies read, of what there is in this mode. What else they need, the scheduler refuses by name."""
        config = self.vllm_config
        if config.speculative_config is None or KEY not in (config.additional_config or ()):
            return frozenset()
        provided = provided_features(config, is_async=config.scheduler_config.async_scheduling)
        return wanted_features(read_options(config.additional_config)) & provided & FROM_WORKER

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.features is None:
            return super().sample_tokens(grammar_output)
        self.features.begin()
        passed = self.model_runner.execute_model_state
        output = super().sample_tokens(grammar_output)
        if passed is not None:
            self.features.read_target(passed, output.sampled_token_ids)
        return output

    @torch.inference_mode()
    def take_draft_token_ids(self) -> Any:
        drafts = super().take_draft_token_ids()
        if self.features is not None and drafts is not None:
            setattr(drafts, ATTRIBUTE, self.features.take(drafts.draft_token_ids))
        return drafts


def _mend_context_keys(drafter: Any) -> None:
    """Let each layer of a DFlash drafter norm the context's keys by weights of its own, where vLLM does not.

    vLLM norms the keys of all layers in one call, with a row of weights for each layer. In 0.32 the operation for CPUs
    takes the first row for all, so that drafts are worse than the drafter's own. Texts are the same either way.
    """
    model = getattr(getattr(drafter, "model", None), "model", None)
    weights = getattr(model, "_k_norm_weights", None)
    if weights is None or weights.shape[0] == 1:
        return
    model = cast("Any", model)
    kernel, epsilon = _custom_ops.rms_norm, model._rms_norm_eps

    def of_each_layer(keys: Tensor) -> Tensor:
        normed = torch.empty_like(keys)
        for layer, out, weight in zip(keys, normed, weights, strict=True):
            kernel(out, layer, weight, epsilon)
        return normed

    like = torch.ones(len(weights), 1, 1, weights.shape[1], dtype=weights.dtype, device=weights.device)
    if not torch.allclose(model._normalize_context_k(like), of_each_layer(like)):
        log.warning("bpkit: vLLM norms the DFlash drafter's context keys by the first layer's weights; mended")
        model._normalize_context_k = of_each_layer


def _refuse_other_sampling(kind: type, wanted: frozenset[Feature]) -> None:
    """Raise EngineError for drafters that do not choose their tokens as vLLM's drafters of one kind or the other do."""
    usual = SpecDecodeBaseProposer
    own = [name for name in _WATCHED if getattr(kind, name, None) is not getattr(usual, name)]
    if own:
        raise EngineError(
            f"policies read {', '.join(sorted(wanted))}, and drafter {kind.__name__} has its own {', '.join(own)}, "
            "which bpkit does not know: use method dflash or draft_model"
        )


class _Features:
    """Watches one model runner. A step is: `begin`, its drafter's passes, `read_target`, `take`.

    Args:
        runner: vLLM's V1 model runner, with its models.
        wanted: some of `FROM_WORKER`.
    """

    def __init__(self, runner: Any, wanted: frozenset[Feature]) -> None:
        self.runner = runner
        self.of_drafts, self.of_target = wanted & OF_THE_DRAFT, wanted - OF_THE_DRAFT
        self.drafted: list[dict[Feature, Tensor]] = []
        """Of the passes of this step's draft: [requests * tokens of a pass, ...]."""
        self.target: dict[Feature, Tensor] = {}
        if self.of_drafts:
            self.drafter = runner.drafter
            _refuse_other_sampling(type(self.drafter), self.of_drafts)
            self.drafter._sample_draft_tokens = self._sample

    def begin(self) -> None:
        self.target, self.drafted = {}, []

    def _sample(self, hidden: Tensor, sampling_metadata: Any) -> tuple[Tensor, None]:
        """The drafter's best tokens, as it would choose them, from logits that are read before they are dropped."""
        logits = self.drafter.model.compute_logits(hidden)
        tokens = logits.argmax(dim=-1)
        found: dict[Feature, Tensor] = {}
        if self.of_drafts & OF_THE_DISTRIBUTION:
            scores = logits.float()
            log_p = scores - scores.logsumexp(dim=-1, keepdim=True)
            if Feature.DRAFT_PROBABILITY in self.of_drafts:
                found[Feature.DRAFT_PROBABILITY] = log_p.gather(-1, tokens[:, None])[:, 0].exp()
            if Feature.DRAFT_ENTROPY in self.of_drafts:
                found[Feature.DRAFT_ENTROPY] = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(dim=-1)
        if Feature.DRAFT_HIDDEN in self.of_drafts:
            found[Feature.DRAFT_HIDDEN] = hidden.float()
        self.drafted.append(found)
        return tokens, None

    def read_target(self, passed: Any, sampled: Sequence[Sequence[int]]) -> None:
        """Features of the position that decided the last token of each request.

        Args:
            passed: vLLM's `ExecuteModelState` of the step.
            sampled: tokens that the step decided, of each request; none of one whose prompt is not read to its end.
        """
        if not self.of_target:
            return
        last = [max(len(tokens), 1) - 1 for tokens in sampled]
        if passed.spec_decode_metadata is not None:  # a request has a position for each drafted token, and one more
            counts = [drafted + 1 for drafted in passed.spec_decode_metadata.num_draft_tokens]
            first = accumulate(counts[:-1], initial=0)
            last = [start + place for start, place in zip(first, last, strict=True)]
        else:
            last = list(range(len(sampled)))
        states = passed.sample_hidden_states
        at = torch.tensor(last, device=states.device)
        hidden = states[at]
        self.target = dict.fromkeys(self.of_target & OF_HIDDEN, hidden.float())
        anchors = torch.tensor([tokens[-1] if tokens else 0 for tokens in sampled], device=states.device)
        if Feature.TARGET_FEATURES in self.of_target:
            layers = [layer[_token_of(passed)[at]] for layer in passed.aux_hidden_states]
            self.target[Feature.TARGET_FEATURES] = torch.cat(layers, dim=-1).float()
        if Feature.ANCHOR_EMBEDDING in self.of_target:
            self.target[Feature.ANCHOR_EMBEDDING] = self.runner.model.embed_input_ids(anchors).float()
        if self.of_target & OF_THE_ANCHOR:
            # Sampling may have changed the logits of the pass in place.
            logits = self.runner.model.compute_logits(hidden)
            log_probability, entropy = anchor_statistics(logits, anchors)
            both = {Feature.ANCHOR_LOG_PROBABILITY: log_probability, Feature.ANCHOR_ENTROPY: entropy}
            self.target.update({name: value for name, value in both.items() if name in self.of_target})

    def take(self, drafts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """All of the step, as arrays. Of drafts that no pass made, such as near the longest text, features are NaN."""
        width = max(map(len, drafts), default=0)
        found = {**self.target, **self._of_drafts(len(drafts), width)}
        self.begin()
        values = to_host(list(found.values()))
        return {str(name): value.numpy() for name, value in zip(found, values, strict=True)}

    def _of_drafts(self, rows: int, width: int) -> Mapping[Feature, Tensor]:
        """[rows, width, ...] each."""
        made: dict[Feature, Tensor] = {}
        for name in self.of_drafts:
            parts = [passed[name] for passed in self.drafted]
            shape = (rows, width, self.drafter.hidden_size)[: 3 if name is Feature.DRAFT_HIDDEN else 2]
            if sum(len(part) for part in parts) != rows * width:
                made[name] = torch.full(shape, torch.nan)
            elif len(parts) == 1:  # whole blocks, of one request after the other
                made[name] = parts[0].view(shape)
            else:
                made[name] = torch.stack(parts, dim=1) if parts else torch.empty(shape)
        return made


def _token_of(passed: Any) -> Tensor:
    """Which token of the pass each position is whose output was sampled, int [positions]."""
    if passed.spec_decode_metadata is not None:
        return cast("Tensor", passed.spec_decode_metadata.logits_indices)
    return cast("Tensor", passed.spec_decode_common_attn_metadata.query_start_loc[1:] - 1)
