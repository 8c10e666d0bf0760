"""The policy works where the models are: nothing of it stays behind on the host, and it reads the device seldom."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from statistics import mean

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import overrides
from bpkit.testing.checks import setup
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.setup import Case
from bpkit.testing.simulated_device import DEVICE, SimulatedDevice
from bpkit.types import Step

NEEDED = 2
"""Reads of a step at most: one after a draft that the policy wants to see, one after verification."""

SIMULATED = SimulatedDevice()


@functools.cache
def _decoder(drafter: str) -> SpeculativeDecoder:
    """Its models are copied to the device once."""
    return SIMULATED.decoder(setup.decoder(drafter, "fixed:1"))


def device(policy: CheckedPolicy, out: Findings) -> None:
    """Decode a greedy and a sampled request in a batch, and the longer one to its end alone, on a simulated device."""
    said = []
    greedy, sampled, *_ = policy.cases
    cases = [greedy, dataclasses.replace(sampled, max_new_tokens=greedy.max_new_tokens // 2)]
    most = 1 if policy.fails_in_batches else len(cases)
    for drafter in policy.clean():
        steps: list[int] = []
        with SIMULATED:
            decoder = _decoder(drafter).with_policy(policy.fresh(drafter))
            try:
                _decode(decoder, cases, most, steps)
            except Exception as error:
                listed = ", ".join(case.short for case in cases)
                out.fail(
                    f"decoded {listed}, {most} at a time, drafter {drafter}, models on a simulated device ({DEVICE})",
                    f"{policy.name} decides there as on the host",
                    f"{type(error).__name__}: {error}. Counts and numbers of single tokens are on the host, hidden "
                    "states, embeddings and logits on `decoder.device`: move networks there in `bind`, and use "
                    "them in `predict`",
                    drafter=drafter,
                )
        # A policy that is asked after each token takes a read each.
        asks = decoder.spec.work.may_end_early and overrides(decoder.policy, "extend")
        if steps:
            said.append(f"{mean(steps):.1f} with drafter {drafter}")
            if max(steps) > NEEDED and not asks:
                out.note(
                    f"up to {max(steps)} reads of the device in a step with drafter {drafter}, where {NEEDED} do: "
                    "return what networks make of features from `predict`, and read it with `self.predicted(...)`"
                )
    out.said = f"reads of the device a step: {', '.join(said)}"


def _decode(decoder: SpeculativeDecoder, cases: Sequence[Case], most: int, reads: list[int]) -> None:
    """Decode, `most` at a time, and note how often the host waited for the device in each step."""
    before = SIMULATED.reads
    for record in decoder.run_many([case.as_prompt() for case in cases], batch_size=most):
        if isinstance(record, Step):
            reads.append(SIMULATED.reads - before)
        before = SIMULATED.reads
