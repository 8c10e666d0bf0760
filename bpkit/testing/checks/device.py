"""The policy works where the models are: nothing of it stays behind on the host, and it reads the device seldom."""

from __future__ import annotations

from statistics import mean

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import overrides
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.stage import stage
from bpkit.testing.checks.subject import Subject
from bpkit.testing.simulated_device import DEVICE, SimulatedDevice

CASES = 2
"""Usual cases that are decoded once more, one greedy and one sampled."""
NEEDED = 2
"""Reads of a step at most: one after a draft that the policy wants to see, one after verification."""


def device(subject: Subject, out: Findings) -> None:
    """Decode some usual cases on a simulated device."""
    said = []
    for drafter, runs in subject.clean().items():
        with SimulatedDevice() as simulated:
            moved = simulated.decoder(stage().decoder(drafter, "fixed:1"))
            decoder = moved.with_policy(subject.fresh(drafter))
            steps: list[int] = []
            for run in runs[:CASES]:
                try:
                    reads = simulated.count(decoder, run.case.prompt, **run.case.options())
                except Exception as error:
                    _failed(subject.name, str(run), error, drafter, out)
                    break
                steps += reads.steps
        if steps:
            said.append(f"{mean(steps):.1f} with drafter {drafter}")
            if max(steps) > NEEDED and not _asks_token_by_token(decoder):
                out.note(
                    f"up to {max(steps)} reads of the device in a step with drafter {drafter}, where {NEEDED} do: "
                    "return what networks make of features from `predict`, and read it with `self.predicted(...)`"
                )
    out.said = f"reads of the device a step: {', '.join(said)}"


def _asks_token_by_token(decoder: SpeculativeDecoder) -> bool:
    """Whether drafting must ask the policy after each token, which takes a read each."""
    return decoder.spec.work.may_end_early and overrides(decoder.policy, "extend")


def _failed(name: str, run: str, error: Exception, drafter: str, out: Findings) -> None:
    out.fail(
        f"decoded with {run}, models on a simulated device ({DEVICE})",
        f"{name} decides there as on the host",
        f"{type(error).__name__}: {error}. Counts and numbers of single tokens are on the host, hidden states, "
        "embeddings and logits on `decoder.device`: move networks there in `bind`, and use them in `predict`",
        drafter=drafter,
    )
