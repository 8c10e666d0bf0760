"""The metrics: their names, help and labels. Those with a draft position count from 1, the token after the anchor."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

LABELS = ("policy", "drafter")
DECISION_BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
STEP_BUCKETS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Every metric, in one registry.

    Raises:
        ValueError: the registry has metrics of these names already.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"bpkit_{name}", text, (*LABELS, *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"bpkit_{name}", text, (*LABELS, *labels), registry=registry, buckets=buckets)

        self.requests = counter("requests", "Generations that ended, read to their end or given up.", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read.")
        self.tokens = counter("tokens", "Output tokens, those that prefill decides included.")
        self.steps = counter("steps", "Turns of the loop: draft, verify.")
        self.drafted = counter("drafted_tokens", "Tokens that the drafter proposed.")
        self.verified = counter("verified_tokens", "Drafted tokens that the target checked.")
        self.accepted = counter("accepted_tokens", "Drafted tokens that stand, without the last token of a step.")
        self.drafted_at, self.verified_at, self.accepted_at = (
            counter(f"{what}_tokens_by_position", f"{what.title()} tokens by their position in the draft.", "position")
            for what in ("drafted", "verified", "accepted")
        )
        self.steps_by, self.verified_by, self.accepted_by = (
            counter(f"{what}_by_source", f"{said}, by the place of the source that drafted, or none.", "source")
            for what, said in (
                ("steps", "Turns of the loop"),
                ("verified_tokens", "Verified tokens"),
                ("accepted_tokens", "Accepted tokens"),
            )
        )
        self.fallbacks = counter("fallbacks", "Faults of the policy that the runtime mended.")
        self.near_ties = counter("near_ties", "Output tokens whose best two scores were nearly alike.")
        self.prefill_seconds = counter("prefill_seconds", "Seconds of prefill, the policy's beginning included.")
        self.decision = histogram("decision_seconds", "Seconds that the policy took, per step.", DECISION_BUCKETS)
        self.step = histogram("step_seconds", "Seconds of a step, by phase.", STEP_BUCKETS, "phase")
