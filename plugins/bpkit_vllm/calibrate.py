"""What steps of vLLM cost: fitted from its own, while it serves under random draft lengths. This imports no vLLM."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch

from bpkit.assets import drafter_path, model_name, model_path, shipped
from bpkit.files import utc
from bpkit.installation.machine import describe_machine
from bpkit.prompts import Prompt
from bpkit.trace.cost.engine import EngineSettings
from bpkit.trace.cost.packed import PackedCost
from bpkit.trace.cost.packed_fit import EngineSteps, Passes, fit_packed, held_out_steps
from bpkit.trace.cost.random_sizes import RandomSizes
from bpkit.trace.cost.table import Measured
from bpkit.trace.load import ClosedLoop
from bpkit_vllm.local_engine import LocalEngine
from bpkit_vllm.options import KEY, EngineError
from bpkit_vllm.refuse import WORKER
from bpkit_vllm.versions import installed_version

SCHEDULER = "bpkit_vllm.timed_scheduler.TimedPolicyScheduler"
REQUESTS_A_ROW = 1.5
"""Requests of a run for each that runs at once: rows end one by one, and others join."""
FEWEST_REQUESTS = 3
STEPS_OF_EACH = 400
"""Steps at each concurrency that are enough."""
LONGEST_NGRAM_DRAFT = 10
_PASSES: dict[str, Passes] = {"ngram": "none", "suffix": "none", "dflash": "one"}
"""Of vLLM's methods; others take a pass for each token."""


def calibrate(
    prompts: Sequence[Prompt], settings: EngineSettings, progress: Callable[[str, int, int], None]
) -> PackedCost:
    """As `bpkit.trace.cost.engine.CalibratesEngine` says. Steps are synchronous: a step and its draft follow the last.

    Raises:
        EngineError: vLLM is not installed, or a drafter is named that it needs to be told more about.
        CostError: too little could be measured.
    """
    arguments = engine_arguments(settings)
    machine, started = describe_machine(torch.device("cpu")), time.time()
    engine = LocalEngine(arguments)
    config = engine.config
    largest = config.num_speculative_tokens + 1
    engine.scheduler.use(RandomSizes(largest))
    ended = _measure(engine, [engine.token_ids(prompt) for prompt in prompts], settings, progress)
    timed = engine.scheduler.steps
    steps, passes = EngineSteps.of(timed), _PASSES.get(config.speculative_config.method, "each")
    cost = fit_packed(steps, passes)
    modelled, half = steps.modelled(cost), len(steps) // 2
    early, late = (steps.seconds[part].sum() / modelled[part].sum() for part in (slice(half), slice(half, None)))
    target, drafter = (str(name) for name in (config.model_config.model, config.speculative_config.model or "ngram"))
    measured = Measured(
        target=model_name(target),
        drafter=model_name(drafter),
        drafter_kind=config.speculative_config.method,
        device=str(config.device_config.device),
        machine=machine,
        threads=torch.get_num_threads(),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        rule="rejection",
        options=dict(settings.options),
        command=settings.command,
        started=utc(started),
        seconds=round(time.time() - started, 3),
        steps=len(steps),
        prompts=len(prompts),
        rounds=int(steps.run.max()),
        ended=ended,
        worst_spread=None,
        modelled_over_measured=round(float(modelled.sum() / steps.seconds.sum()), 4),
        drift=round(float(late / early) - 1, 4),
        held_out=held_out_steps(steps, passes, settings.concurrency),
        engine=f"vllm {installed_version()}",
    )
    said = f"{measured.target} with {measured.drafter} ({measured.drafter_kind}) in {measured.engine}"
    where = f"{machine['gpu'] or machine['cpu']}, {measured.dtype}, {measured.threads} thread(s)"
    return cost.model_copy(update={"description": f"{said} on {where}", "measured": measured})


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, for measuring. Raises EngineError."""
    ours: dict[str, Any] = {"scheduler_cls": SCHEDULER, "additional_config": {KEY: {"policy": "fixed:1"}}}
    if clash := sorted(settings.arguments.keys() & {*ours, "async_scheduling"}):
        raise EngineError(f"--engine-args: {', '.join(clash)} is what is measured with here: leave it out")
    return {**model_arguments(settings), **ours}


def model_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for one step at a time, the given ones before those that follow from target and drafter.

    Raises EngineError.
    """
    made: dict[str, Any] = {
        "model": model_path(settings.target or shipped("target")),
        "max_num_seqs": max(settings.concurrency),
        "enable_prefix_caching": False,  # prompts come again, and are read each time
        "async_scheduling": False,
        "worker_cls": WORKER,  # DFlash drafts of vLLM on CPUs are right with it
        "seed": settings.seed,
    }
    if "speculative_config" not in settings.arguments:
        made["speculative_config"] = _drafter(settings)
    return {**made, **settings.arguments}


def _drafter(settings: EngineSettings) -> dict[str, Any]:
    """vLLM's `speculative_config`. Raises EngineError."""
    from transformers import PreTrainedConfig

    most = None if settings.max_block_size is None else settings.max_block_size - 1
    if settings.drafter == "ngram":
        lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}  # as bpkit's own n-grams
        return {"method": "ngram", "num_speculative_tokens": most or LONGEST_NGRAM_DRAFT, **lookup}
    path = drafter_path(settings.drafter or "", settings.target or str(shipped("target")), "drafter")
    config, _ = PreTrainedConfig.get_config_dict(path)
    if not any("dflash" in name.lower() for name in config.get("architectures") or ()):
        raise EngineError(
            f"drafter {path!r} is no DFlash drafter: say how vLLM drafts with it, --engine-args "
            '\'{"speculative_config": {"method": "draft_model", "model": "...", "num_speculative_tokens": 7}}\''
        )
    return {"method": "dflash", "model": path, "num_speculative_tokens": most or config["block_size"] - 1}


def _measure(
    engine: LocalEngine,
    prompts: Sequence[Sequence[int]],
    settings: EngineSettings,
    progress: Callable[[str, int, int], None],
) -> str:
    """Run at each concurrency in turn, that with the fewest steps first; why it ended."""
    rng, scheduler = random.Random(settings.seed), engine.scheduler
    for concurrency in (1, max(settings.concurrency)):  # first calls allocate and choose kernels
        engine.serve(rng.choices(prompts, k=concurrency), ClosedLoop(concurrency), {**settings.options})
    scheduler.steps.clear()
    done, deadline = Counter(dict.fromkeys(settings.concurrency, 0)), time.monotonic() + 60 * settings.max_minutes
    whole = STEPS_OF_EACH * len(settings.concurrency)
    for _ in count():
        concurrency = min(done, key=lambda number: (done[number], number))
        if done[concurrency] >= STEPS_OF_EACH:
            return f"{STEPS_OF_EACH} steps were measured at each concurrency"
        if time.monotonic() > deadline:
            return f"{settings.max_minutes:g} minutes were over"
        before = len(scheduler.steps)
        progress(f"{concurrency} at once", min(sum(done.values()), whole), whole)
        requests = max(FEWEST_REQUESTS, int(REQUESTS_A_ROW * concurrency))
        scheduler.begin_run()
        engine.serve(rng.choices(prompts, k=requests), ClosedLoop(concurrency), settings.options)
        done[concurrency] += len(scheduler.steps) - before
    raise AssertionError("measuring has an end")
