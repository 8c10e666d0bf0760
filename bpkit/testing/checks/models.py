"""The same put to real models: is it lossless, is it overruled, what does a decision take beside a step?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.guard import PolicyFault
from bpkit.policy import Policy
from bpkit.prompts import Prompt
from bpkit.testing.checks.answers import Fault
from bpkit.testing.checks.lossless import compare_with_plain
from bpkit.testing.checks.report import Findings, Result
from bpkit.testing.checks.runs import Run
from bpkit.testing.checks.stage import Case, plainly
from bpkit.testing.checks.timing import medians, micro, note_slow
from bpkit.testing.checks.witness import Witness

NAME, SUMMARY = "models", "lossless with the models that were named, and what a decision takes beside their steps"
MAX_NEW_TOKENS = 32
TEMPERATURES = (0.0, 1.0)


def check_models(
    decoder: SpeculativeDecoder,
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """Decode prompts under a policy with its own weights, and compare with plain decoding.

    Args:
        decoder: target and drafter; its own policy is not asked. policy: not bound yet.

    Raises:
        PolicyError: the policy cannot serve this decoder.
    """
    begun, out = time.perf_counter(), Findings()
    plain = decoder.with_policy("fixed:1")
    checked = SpeculativeDecoder(
        decoder.target,
        decoder.drafter,
        policy,
        tokenizer=decoder.tokenizer,
        clock=decoder.clock,
        strict=True,
        max_block_size=decoder.spec.max_block_size,
        cost=decoder.cost,
    )
    witness = Witness(policy, checked.spec.max_block_size)
    exact = decoder.target.dtype == torch.float32
    runs: list[Run] = []
    steps: list[float] = []
    for place, prompt in enumerate(prompts):
        for temperature in TEMPERATURES:
            case = Case(prompt.text, temperature, seed, place, MAX_NEW_TOKENS)
            run = _decode(checked, witness, case, steps, out)
            if run is None:
                return out.result(NAME, SUMMARY, time.perf_counter() - begun)
            compare_with_plain(type(policy).__name__, run, plainly(plain, case), out, exact=exact)
            runs.append(run)
            progress()
    if steps:
        out.note(f"{medians(runs)}; a step under this policy takes {micro(median(steps))} without its decisions")
        note_slow(runs, median(steps), out)
    out.said = (
        f"{len(runs)} generations, {sum(len(run.tokens or ()) for run in runs)} tokens, target {checked.spec.target}, "
        f"drafter {checked.spec.drafter}"
    )
    return out.result(NAME, SUMMARY, time.perf_counter() - begun)


def _decode(decoder: SpeculativeDecoder, witness: Witness, case: Case, steps: list[float], out: Findings) -> Run | None:
    """A generation and the seconds of its steps; None if the policy ended it."""
    run = Run(decoder.spec.drafter, case)
    try:
        made = decoder.generate(case.prompt, **case.options())
    except PolicyFault as error:
        fault = witness.fault or Fault("a method", "raised", str(error))
        name = type(decoder.policy).__name__
        out.fail(
            f"decoded with target {decoder.spec.target}, {run}, faults of the policy being errors",
            f"{name}.{fault.method} returns what the Policy protocol says",
            fault.text,
        )
        return None
    run.tokens, run.calls = tuple(made.tokens[0].tolist()), witness.take()
    steps += [step.seconds.total - step.seconds.policy for step in made.steps]
    return run
