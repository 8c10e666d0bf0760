"""Two policies that learn the best block size while they run: `bandit` (Thompson sampling) and `ucb`."""

from __future__ import annotations

from bpkit.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "bandit",
        "bpkit_bandit.thompson:Thompson",
        summary="Learns tokens per second of every block size; Thompson sampling picks one before each draft.",
        config="bpkit_bandit.learner:BanditConfig",
    )
    register(
        "ucb",
        "bpkit_bandit.ucb:UCB",
        summary="Learns tokens per second of every block size; the upper confidence bound picks one before each draft.",
        config="bpkit_bandit.ucb:UCBConfig",
    )
