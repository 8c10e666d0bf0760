"""BlockPilot's published form on raw logits, with random weights, against its exact fold into the head.

The JSON:

    command, machine, settings     sizes, states, calls, threads, seed, seconds of folding
    raw, folded, folded_cold       p50_ms, p99_ms and calls of one decision; `cold`: the first call after one of the raw
                                   form, which pushed the weights out of the caches, as a prefill does
    raw_over_folded, raw_over_folded_cold      ratios with interval and quartiles
    weights                        numbers that a decision of each form reads, and their ratio: what arithmetic explains
    decisions                      states, how many are clear and how many within the tolerance, how many of each agree,
                                   largest_difference of scores, sizes_chosen

Weights and hidden states are random: latencies do not depend on them, and that the decisions are the same is algebra.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from bpkit_mlp.blockpilot import DEPTH, DROPOUT, BlockPilot, BlockPilotConfig
from bpkit_mlp.networks import ResidualMLP
from torch import Tensor, nn

from bpkit.installation.machine import describe_machine
from bpkit.judge.latency.timing import percentile, ratio
from bpkit.judge.wall_clock.threads import use_threads
from bpkit.progress import NoProgress, Progress
from bpkit.types import Context, DecoderSpec, Feature

SCHEMA_VERSION = 1
TOLERANCE = 1e-4
"""Largest difference of scores that rounding is let to explain."""
HEAD_SCALE = 0.02
"""Deviation of the head's weights, as models are initialised."""
SIZES = [14, 15, 16, 17, 18]
"""Block sizes of the published choice."""
STATES_AT_ONCE = 64


@dataclass(frozen=True)
class FoldSettings:
    """What is folded, and how often it is asked.

    Attributes:
        vocab_size, hidden_size: of the head. width: neurons of each layer of the policy.
        states: random hidden states on which decisions are compared.
        rounds: each has one call of the raw form, one cold call of the folded one, and `warm` more of it.
        threads: of torch while calls are timed; folding takes all that there are.
    """

    vocab_size: int = 151_936
    hidden_size: int = 2560
    width: int = 2048
    states: int = 256
    rounds: int = 50
    warm: int = 20
    threads: int = 1
    seed: int = 0
    device: str = "cpu"


def bench_fold(settings: FoldSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Make, fold, compare and time, and return the report as plain JSON values."""
    ticker = progress or NoProgress()
    machine, usual = describe_machine(torch.device(settings.device)), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        ticker.start("random weights", 1)
        head, raw, hidden = made(settings)
        ticker.start("folding in float64", 1)
        started = time.perf_counter()
        folded = raw.folded(head)
        folded.bind(raw.decoder)
        seconds = time.perf_counter() - started
    with torch.inference_mode():
        decisions = compare(raw, folded, head, hidden)
        logits = head(hidden[:STATES_AT_ONCE])
        del head  # what is left reads 1.2 GB of weights itself, at the size that was published
        try:
            use_threads(settings.threads)
            spent = timed(raw, folded, logits, hidden[:STATES_AT_ONCE], settings, ticker)
        finally:
            use_threads(usual)
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine,
        "settings": {**asdict(settings), "block_sizes": SIZES, "seconds_of_folding": seconds},
        **{name: in_milliseconds(times) for name, times in spent.items()},
        "raw_over_folded": ratio(spent["raw"], spent["folded"], settings.seed),
        "raw_over_folded_cold": ratio(spent["raw"], spent["folded_cold"], settings.seed),
        "weights": weights(settings),
        "decisions": decisions,
    }


def made(settings: FoldSettings) -> tuple[nn.Linear, BlockPilot, Tensor]:
    """A head, the published policy on its logits, and hidden states [states, hidden]; all random."""
    device = torch.device(settings.device)
    spec = DecoderSpec(
        target="random head",
        drafter="none",
        drafter_kind="block-diffusion",
        trained_block_size=16,
        max_block_size=max(SIZES),
        hidden_size=settings.hidden_size,
        vocab_size=settings.vocab_size,
    )
    mlp = ResidualMLP(settings.vocab_size, settings.width, len(SIZES), depth=DEPTH, dropout=DROPOUT)
    config = BlockPilotConfig(input="logits", width=settings.width)
    facts = {"inputs": settings.vocab_size, "sizes": SIZES}
    raw = BlockPilot.trained(config, facts, {"normalisation": nn.Identity(), "mlp": mlp}, spec)
    del mlp  # `trained` copied it
    raw.bind(spec)
    head = nn.Linear(settings.hidden_size, settings.vocab_size, bias=False).requires_grad_(False)
    nn.init.normal_(head.weight, std=HEAD_SCALE)
    return head.to(device), raw, torch.randn(settings.states, settings.hidden_size).to(device)


def compare(raw: BlockPilot, folded: BlockPilot, head: nn.Linear, hidden: Tensor) -> dict[str, Any]:
    """Decisions of both on every hidden state; a state is clear where the best score leads by more than rounding."""
    found = {"clear": 0, "clear_agree": 0, "within_tolerance": 0, "within_tolerance_agree": 0}
    difference, chosen = 0.0, set()
    for start in range(0, len(hidden), STATES_AT_ONCE):
        part = hidden[start : start + STATES_AT_ONCE]
        scores, other = raw.scores(head(part)), folded.scores(part)
        best = scores.topk(2, dim=-1).values
        clear, same = best[:, 0] - best[:, 1] > TOLERANCE, scores.argmax(-1) == other.argmax(-1)
        for name, rows in (("clear", clear), ("within_tolerance", ~clear)):
            found[name] += int(rows.sum())
            found[f"{name}_agree"] += int((rows & same).sum())
        difference = max(difference, float((scores - other).abs().max()))
        chosen |= {SIZES[place] for place in scores.argmax(-1).tolist()}
    return {
        **found,
        "states": len(hidden),
        "tolerance": TOLERANCE,
        "largest_difference": difference,
        "sizes_chosen": sorted(chosen),
    }


def timed(
    raw: BlockPilot, folded: BlockPilot, logits: Tensor, hidden: Tensor, settings: FoldSettings, progress: Progress
) -> dict[str, np.ndarray]:
    """Nanoseconds of `begin` on one row: `raw` and `folded_cold` [rounds, 1], `folded` [rounds, warm]."""
    of_raw = [_context(raw, Feature.PREFILL_LOGITS, row) for row in logits[:, None].unbind()]
    of_folded = [_context(folded, Feature.PREFILL_HIDDEN, row) for row in hidden[:, None].unbind()]
    progress.start("timing", settings.rounds)
    found: dict[str, list[list[int]]] = {"raw": [], "folded_cold": [], "folded": []}
    for number in range(-1, settings.rounds):  # the first round warms up
        context = of_folded[number % len(of_folded)]
        times = {
            "raw": [_call(raw, of_raw[number % len(of_raw)])],
            "folded_cold": [_call(folded, context)],
            "folded": [_call(folded, context) for _ in range(settings.warm)],
        }
        if number >= 0:
            for name, each in times.items():
                found[name].append(each)
            progress.tick()
    return {name: np.array(rows) for name, rows in found.items()}


def _context(policy: BlockPilot, feature: Feature, row: Tensor) -> Context:
    zero = torch.zeros(1, dtype=torch.int64, device=row.device)
    return Context(policy.decoder, zero, zero + 100, zero + 100, torch.Generator(), {feature: row})


def _call(policy: BlockPilot, context: Context) -> int:
    """Nanoseconds of a decision that the host can read."""
    started = time.perf_counter_ns()
    policy.begin(context)["block_size"].tolist()
    return time.perf_counter_ns() - started


def in_milliseconds(times: np.ndarray) -> dict[str, Any]:
    """p50, p99 and how many."""
    return {"p50_ms": percentile(times, 50) / 1e3, "p99_ms": percentile(times, 99) / 1e3, "calls": int(times.size)}


def weights(settings: FoldSettings) -> dict[str, Any]:
    """Numbers that each form reads for a decision, biases left out."""
    rest = settings.width * (settings.width + len(SIZES))
    raw, folded = (inputs * settings.width + rest for inputs in (settings.vocab_size, settings.hidden_size))
    return {"raw": raw, "folded": folded, "ratio": raw / folded}
