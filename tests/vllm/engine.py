"""vLLM in this process, with or without our scheduler: requests go in at a given concurrency, token ids come out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from bpkit_vllm.options import REQUEST_KEY
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.triton_utils import dispatcher

from bpkit.assets import prompts, shipped

TARGET = str(shipped("target"))
METHODS: dict[str, dict[str, Any]] = {
    "dflash": {"method": "dflash", "model": str(shipped("drafter")), "num_speculative_tokens": 15},
    "ngram": {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "draft_model": {"method": "draft_model", "model": str(shipped("assistant")), "num_speculative_tokens": 5},
}
METRICS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def token_prompts(count: int) -> list[list[int]]:
    """The shipped prompts as token ids, of all kinds in turn, and of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    kinds = [prompts(name) for name in ("maths", "code", "structured")]
    mixed = [prompt["prompt"] for several in zip(*kinds, strict=False) for prompt in several]
    return [tokenizer(text)["input_ids"] for text in (mixed * (1 + count // len(mixed)))[:count]]


@dataclass
class Served:
    """What a run gave.

    Attributes:
        texts: token ids of each request, in the order of the prompts.
        metrics: vLLM's counters of speculative decoding, of this run alone.
    """

    texts: list[list[int]]
    metrics: dict[str, int]
    steps: int = 0


class Engine:
    """An engine over the shipped target in float32.

    Args:
        method: of `METHODS`, or None for plain decoding.
        bpkit: options as in `additional_config`, which name our scheduler; None leaves vLLM as it is.
        options: of `vllm.LLM`.

    Attributes:
        log: where a test has its steps written.
    """

    log: Path

    def __init__(self, method: str | None = None, bpkit: dict[str, Any] | None = None, **options: Any) -> None:
        if method is not None:
            options = {"speculative_config": METHODS[method], **options}
        if bpkit is not None:
            options = {"scheduler_cls": "bpkit_vllm.PolicyScheduler", "additional_config": {"bpkit": bpkit}, **options}
        given = {"max_model_len": 512, "max_num_seqs": 32, "seed": 0, **options}
        with _kernels_once():
            self.llm = LLM(TARGET, dtype="float32", enforce_eager=True, disable_log_stats=False, **given)

    @property
    def core(self) -> Any:
        """vLLM's `EngineCore`."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        """Ours, or vLLM's."""
        return self.core.scheduler

    def run(
        self,
        given: Sequence[Sequence[int]],
        *,
        concurrency: int,
        max_tokens: int = 32,
        policies: Sequence[str | None] = (None,),
        after_step: Callable[[int], Sequence[int]] = lambda step: (),
    ) -> Served:
        """Answer prompts, so many at a time; the next enters when one ends.

        Args:
            policies: that requests name, in turn; None names none.
            after_step: given the number of a step, indices of requests to abort.
        """
        before, waiting = self._metrics(), deque(range(len(given)))
        texts: list[list[int]] = [[] for _ in given]
        running: set[int] = set()
        steps = 0
        while waiting or running:
            while waiting and len(running) < concurrency:
                index = waiting.popleft()
                running.add(index)
                self._add(index, given[index], max_tokens, policies[index % len(policies)])
            for output in self.llm.llm_engine.step():
                index = int(output.request_id)
                texts[index] = list(output.outputs[0].token_ids)
                if output.finished:
                    running.discard(index)
            steps += 1
            for index in running.intersection(after_step(steps)):
                self.llm.llm_engine.abort_request([str(index)])
                running.discard(index)
        self.llm.llm_engine.step()  # the scheduler says which requests ended
        after = self._metrics()
        return Served(texts, {name: after[name] - before[name] for name in METRICS}, steps)

    def _add(self, index: int, tokens: Sequence[int], max_tokens: int, policy: str | None) -> None:
        named = None if policy is None else {REQUEST_KEY: policy}
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=named)
        self.llm.llm_engine.add_request(str(index), {"prompt_token_ids": list(tokens)}, sampling)

    def _metrics(self) -> dict[str, int]:
        found = dict.fromkeys(METRICS, 0)
        for metric in self.llm.get_metrics():
            name = metric.name.removeprefix("vllm:spec_decode_")
            if name in found:
                found[name] = int(metric.value)
        return found

    def counter(self, name: str) -> int:
        """One of vLLM's counters, since the engine started."""
        return sum(int(metric.value) for metric in self.llm.get_metrics() if metric.name == name)

    def close(self) -> None:
        """Give back what it holds, so that another engine may start in this process."""
        self.llm.llm_engine.engine_core.shutdown()


_registered: list[bool] = []


@contextmanager
def _kernels_once() -> Iterator[None]:
    """vLLM puts its CPU kernels in place for each engine, and stumbles over numba the second time."""
    original = dispatcher.register_kernels
    if _registered:
        dispatcher.register_kernels = lambda overrides: None
    try:
        yield
    finally:
        dispatcher.register_kernels = original
        _registered.append(True)
