"""vLLM's schedulers with draft lengths that policies decide. Importing this imports vLLM."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from bpkit_vllm.features import StepFeatures
from bpkit_vllm.options import read_options
from bpkit_vllm.policies import EnginePolicies
from bpkit_vllm.refuse import check_engine, provided_features
from bpkit_vllm.rows import EngineRows, PlannedRows

logger = init_logger(__name__)

RUNNING = RequestStatus.RUNNING
NO_ROWS = PlannedRows([], [], [])


class _Decided(Scheduler):
    """Asks policies for the lengths of drafts, and how much of them to verify; all else is vLLM's.

    vLLM drafts one number of tokens for all requests of a step: the largest that any row chose. Of the others, what is
    beyond their choice is not verified.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_async, options = isinstance(self, AsyncScheduler), read_options(self.vllm_config.additional_config)
        check_engine(self.vllm_config, options, is_async=is_async)
        provided = provided_features(self.vllm_config, is_async=is_async)
        self.policies = EnginePolicies(self.vllm_config, options, provided)
        self._features: StepFeatures | None = None
        self._planned: dict[int, tuple[float, list[tuple[EngineRows, PlannedRows]]]] = {}
        self._ended = 0.0
        self.decision_seconds: deque[float] = deque(maxlen=4096)
        """Of the last steps: all that is added to vLLM's own scheduling, policies included."""
        self._added = 0.0

    def use(self, policy: Any) -> None:
        """Requests to come that name no policy are decided for by this one. Raises PolicyError."""
        self.policies.use(policy)

    # A step

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        for rows in self.policies.active:
            if rows.waiting:
                rows.begin_late(self._features)
        planned = [(rows, rows.truncate(self._features)) for rows in self.policies.active]
        self._added += time.perf_counter() - started
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self._planned[id(output)] = started, planned
        return output

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        started = time.perf_counter()
        scheduled = scheduler_output.num_scheduled_tokens
        if scheduled:
            lengths = [rows.select(scheduled, self._features) for rows in self._with_newcomers(scheduled)]
            scheduler_output.num_spec_tokens_to_schedule = min(self.num_spec_tokens, max(lengths, default=0))
        self._added += time.perf_counter() - started
        super()._update_after_schedule(scheduler_output)

    def _with_newcomers(self, scheduled: dict[str, int]) -> list[EngineRows]:
        """The policies, after requests whose prompts end in this step began."""
        new: dict[EngineRows, list[Request]] = {}
        for name, tokens in scheduled.items():
            rows = self.policies.rows_of[name]
            if name not in rows:
                request = self.requests[name]
                length = request.num_tokens + request.num_output_placeholders
                if request.num_computed_tokens + tokens >= length:
                    new.setdefault(rows, []).append(request)
        for rows, requests in new.items():
            rows.join(requests, self._features)
        return self.policies.active

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        now = time.perf_counter()
        begun, planned = self._planned.pop(id(scheduler_output), (now, []))
        seconds, self._ended = now - max(begun, self._ended), now
        verified, scheduled = scheduler_output.scheduled_spec_decode_tokens, scheduler_output.num_scheduled_tokens
        plans = dict(planned)
        for rows in self.policies.active:  # those that began in this step included, which may have ended in it
            rows.observe(plans.get(rows, NO_ROWS), scheduled, verified, seconds)
            ended = [place for place, request in enumerate(rows.requests) if request.status != RUNNING]
            if ended:
                rows.leave(ended)
        self._features = None
        self.policies.summary()
        self._added += time.perf_counter() - now
        if scheduled:
            self.decision_seconds.append(self._added)
            self._added = 0.0
        return outputs

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        super().update_draft_token_ids(draft_token_ids)
        self._features = StepFeatures.sent_with(draft_token_ids)

    # Requests come and go

    def add_request(self, request: Request) -> None:
        self.policies.admit(request)
        super().add_request(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        given_up = request.status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)
        self.policies.end(request.request_id, given_up=given_up)
        return super()._free_request(request, *args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.policies.park(request.request_id)
        super()._preempt_request(request, *args, **kwargs)

    def shutdown(self) -> None:
        self.policies.close()
        super().shutdown()


class PolicyScheduler(_Decided):
    """For synchronous scheduling: policies can read features that `FeatureWorker` sends."""


class AsyncPolicyScheduler(_Decided, AsyncScheduler):
    """For asynchronous scheduling: two steps are in flight, and policies read no features."""
