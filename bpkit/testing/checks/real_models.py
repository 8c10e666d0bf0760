"""The same put to real models: is it lossless, is it overruled, what does a decision take beside a step?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.guard import PolicyFault
from bpkit.policy import Policy
from bpkit.prompts import Prompt
from bpkit.testing.checks.recorder import CallRecorder, Recording
from bpkit.testing.checks.report import Findings, Result
from bpkit.testing.checks.setup import TOGETHER, Case, plainly
from bpkit.testing.checks.surroundings import undisturbed
from bpkit.testing.checks.timing import beside_a_step, micro
from bpkit.testing.checks.usual import compare_with_plain

NAME, SUMMARY = "models", "lossless with the models that were named, and what a decision takes beside their steps"
MAX_NEW_TOKENS = 32
TEMPERATURES = (0.0, 1.0)


@undisturbed()
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
    plain, checked = decoder.with_policy("fixed:1"), decoder.with_policy(policy)
    checked.strict = True
    spec, name, out = checked.spec, type(policy).__name__, Findings()
    recorder = CallRecorder(checked, spec.drafter, blamed=PolicyFault)
    exact = decoder.target.dtype == torch.float32
    recordings: list[Recording] = []
    steps: list[float] = []
    for recording in _recordings(recorder, prompts, seed):
        if recording.made is None:
            assert recording.fault is not None
            out.fail(
                f"decoded with target {spec.target}, {recording}, faults of the policy being errors",
                f"{name}.{recording.fault.method} returns what the Policy protocol says",
                recording.fault.text,
            )
            return out.result(NAME, SUMMARY)
        compare_with_plain(name, recording, plainly(plain, recording.case), out, exact=exact)
        if not recording.beside:
            steps += [step.seconds.total - step.seconds.policy for step in recording.made.steps]
        recordings.append(recording)
        progress()
    if steps:
        taken, slow = beside_a_step(recordings, median(steps))
        out.note(f"{taken}; a step under this policy takes {micro(median(steps))} without its decisions")
        out.notes += slow
    tokens = sum(len(recording.tokens) for recording in recordings)
    out.said = f"{len(recordings)} generations, {tokens} tokens, target {spec.target}, drafter {spec.drafter}"
    return out.result(NAME, SUMMARY)


def _recordings(recorder: CallRecorder, prompts: Sequence[Prompt], seed: int) -> Iterator[Recording]:
    """Greedy ones alone, sampled ones in a batch."""
    greedy, sampled = (
        [Case(prompt.text, temperature, seed, place, MAX_NEW_TOKENS) for place, prompt in enumerate(prompts)]
        for temperature in TEMPERATURES
    )
    yield from map(recorder.record, greedy)
    yield from recorder.record_together(sampled, TOGETHER)
