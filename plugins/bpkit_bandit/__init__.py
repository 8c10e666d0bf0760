"""Policies that learn while they run: which block size is the best, how far drafts stand, or which rule to stop by."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_policies(register: Register) -> None:
    register(
        "bandit",
        "bpkit_bandit.bandit:Thompson",
        summary="Learns tokens per second of every block size; Thompson sampling picks one before each draft.",
        config="bpkit_bandit.bandit:BanditConfig",
    )
    register(
        "ucb",
        "bpkit_bandit.bandit:UCB",
        summary="Learns tokens per second of every block size; the upper confidence bound picks one before each draft.",
        config="bpkit_bandit.bandit:UCBConfig",
    )
    register(
        "source_bandit",
        "bpkit_bandit.source_bandit:SourceBandit",
        summary="Learns tokens per second of every source and block size; Thompson sampling picks before each draft.",
        config="bpkit_bandit.source_bandit:SourceBanditConfig",
    )
    register(
        "exp3",
        "bpkit_bandit.exp3:Exp3",
        summary="Draws a block size before each draft by exponential weights of what each has cost so far.",
        config="bpkit_bandit.exp3:Exp3Config",
    )
    register(
        "eesd",
        "bpkit_bandit.eesd:Eesd",
        summary="Draws the draft length token by token from what is known of the acceptance rate.",
        config="bpkit_bandit.eesd:EesdConfig",
    )
    register(
        "tapout",
        "bpkit_bandit.tapout:TapOut",
        summary="Learns which stop rule (fixed, confidence, SVIP, AdaEDL) earns the most; picks one before each draft.",
        config="bpkit_bandit.tapout:TapOutConfig",
    )
