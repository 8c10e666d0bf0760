"""What a policy is made of: the Policy class, what it remembers across requests, and stop rules."""

from __future__ import annotations

from bpkit.policy.memory import PolicyMemory, RememberingPolicy, fade
from bpkit.policy.policy import Policy, PolicyConfig, PolicyError, State, overrides, validated
from bpkit.policy.stop_rules import StopRule

__all__ = [
    "Policy",
    "PolicyConfig",
    "PolicyError",
    "PolicyMemory",
    "RememberingPolicy",
    "State",
    "StopRule",
    "fade",
    "overrides",
    "validated",
]
