"""vLLM's schedulers with a note of what each step did and how long it took. Importing this imports vLLM."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from bpkit_vllm.scheduler import PolicyScheduler


class TimedScheduler(Scheduler):
    """vLLM's own, synchronous, with a note of each step.

    Attributes:
        run: a number that the steps to come are noted with.
        steps: the columns of `bpkit.trace.cost.packed_fit.EngineSteps` of each; the last of a run is not among them.
        yielded: of each, rows that decoded, and the tokens that they yielded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run, self.steps = 0, list[tuple[float, ...]]()
        self.yielded: list[tuple[int, int]] = []
        self._open: tuple[tuple[int, ...], float, float] | None = None

    @property
    def decided(self) -> float:
        """Seconds that policies took so far."""
        return 0.0

    def begin_run(self) -> None:
        """The steps to come are of another run. One that is open ended long ago, or not at all."""
        self.run, self._open = self.run + 1, None
        self.yielded.clear()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        now, decided = time.perf_counter(), self.decided
        if self._open is not None:
            counts, began, before = self._open
            self.steps.append((*counts, now - began - (decided - before)))
        output = super().schedule(*args, **kwargs)
        done = output.total_num_scheduled_tokens > 0
        self._open = (self._counts(output), now, decided) if done else None
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        requests = [self.requests[name] for name in scheduler_output.num_scheduled_tokens]
        before = [request.num_output_tokens for request in requests]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        more = [request.num_output_tokens - had for request, had in zip(requests, before, strict=True) if had]
        self.yielded.append((len(more), sum(more)))
        return outputs

    def _counts(self, output: Any) -> tuple[int, ...]:
        drafts, longest, decoding, verified = output.scheduled_spec_decode_tokens, 0, 0, 0
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.requests[name]
            longest = max(longest, request.num_tokens)
            if request.num_output_tokens and tokens == 1 + len(drafts.get(name, ())):
                decoding, verified = decoding + 1, verified + tokens
        rows, prompts = len(output.num_scheduled_tokens), output.total_num_scheduled_tokens - verified
        return self.run, rows, decoding, verified, prompts, output.num_spec_tokens_to_schedule, longest


class TimedPolicyScheduler(TimedScheduler, PolicyScheduler):
    """bpkit's, synchronous, with a note of each step, whose time is without the policies' decisions."""

    @property
    def decided(self) -> float:
        """Seconds that policies took so far."""
        return self.policies.seconds
