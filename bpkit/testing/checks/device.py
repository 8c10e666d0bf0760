"""The policy works where the models are: nothing of it stays behind on the host, and it reads the device seldom."""

from __future__ import annotations

import functools
from statistics import mean

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import overrides
from bpkit.testing.checks import setup
from bpkit.testing.checks.checked_policy import CheckedPolicy
from bpkit.testing.checks.report import Findings
from bpkit.testing.simulated_device import DEVICE, SimulatedDevice

CASES = 2
"""Usual cases that are decoded once more, one greedy and one sampled."""
NEEDED = 2
"""Reads of a step at most: one after a draft that the policy wants to see, one after verification."""

SIMULATED = SimulatedDevice()


@functools.cache
def _decoder(drafter: str) -> SpeculativeDecoder:
    """Its models are copied to the device once."""
    return SIMULATED.decoder(setup.decoder(drafter, "fixed:1"))


def device(policy: CheckedPolicy, out: Findings) -> None:
    """Decode some usual cases on a simulated device."""
    said = []
    for drafter, usual in policy.clean().items():
        steps: list[int] = []
        with SIMULATED:
            decoder = _decoder(drafter).with_policy(policy.fresh(drafter))
            for recording in usual[:CASES]:
                try:
                    steps += SIMULATED.count(decoder, recording.case.prompt, **recording.case.options()).steps
                except Exception as error:
                    out.fail(
                        f"decoded with {recording}, models on a simulated device ({DEVICE})",
                        f"{policy.name} decides there as on the host",
                        f"{type(error).__name__}: {error}. Counts and numbers of single tokens are on the host, hidden "
                        "states, embeddings and logits on `decoder.device`: move networks there in `bind`, and use "
                        "them in `predict`",
                        drafter=drafter,
                    )
                    break
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
