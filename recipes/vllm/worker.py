"""A process with one vLLM engine, which serves when it is asked and waits for the next line otherwise.

`recipes.vllm.engines` starts it: `python -m recipes.vllm.worker`. Lines are JSON:

    in   {"arguments": {...}}                                   of `vllm.LLM`
    out  {"ready": true}
    in   {"policy": SPEC or null, "prompts": [{"text": ..., "chat": BOOL}], "levels": [ROWS, ...], "per_row": N,
          "options": {...}}
    out  {"digests": [...], "tokens": N, "seconds": S, "window": {"tokens": N, "seconds": S}, ...}    or {"error": TEXT}
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from bpkit_vllm.local_engine import EngineRun, LocalEngine

from bpkit.prompts import Prompt
from bpkit.trace.load import ChangingLoad, ClosedLoop

Reply = dict[str, Any]


def serve(engine: LocalEngine, asked: Mapping[str, Any], tokenized: Any) -> Reply:
    """Serve prompts under one policy, and say what came of it."""
    scheduler, levels = engine.scheduler, asked["levels"]
    if asked["policy"] is not None:
        scheduler.use(asked["policy"])
    prompts = [tokenized(prompt["text"], prompt["chat"]) for prompt in asked["prompts"]]
    load = ClosedLoop(levels[0]) if len(levels) == 1 else ChangingLoad(tuple(levels), asked["per_row"])
    decisions = getattr(scheduler, "decision_seconds", None)
    if decisions is not None:
        decisions.clear()
    scheduler.steps.clear()
    scheduler.begin_run()
    run = engine.serve(prompts, load, asked["options"])
    rows, tokens = np.array(scheduler.yielded).T
    verified = np.array([step[3] for step in scheduler.steps])  # of all steps but the last
    begin, end = window(run, rows, levels[0]) if len(levels) == 1 else (0, len(rows))
    return {
        "digests": [digest(of_request) for of_request in run.tokens],
        "tokens": run.num_tokens,
        "seconds": run.seconds,
        "window": {
            "tokens": int(tokens[begin:end].sum()),
            "seconds": run.ends[end - 1] - (run.ends[begin - 1] if begin else 0.0),
            "steps": end - begin,
        },
        "verified_per_token": float(verified.sum() / max(tokens[:-1].sum(), 1)),
        "decision_us": 1e6 * float(np.mean(decisions)) if decisions else None,
        "decision_us_median": 1e6 * float(np.median(decisions)) if decisions else None,
    }


def window(run: EngineRun, rows: Any, concurrency: int) -> tuple[int, int]:
    """The steps of a closed loop in which all rows decode or begin: from the first to where no request is left."""
    filled = np.flatnonzero(rows == concurrency)
    missing = np.flatnonzero((np.array(run.live) < concurrency) & (np.array(run.left) == 0))
    begin, end = int(filled[0]) if len(filled) else 0, int(missing[0]) if len(missing) else len(rows)
    return (begin, end) if end > begin else (0, len(rows))


def digest(tokens: Sequence[int]) -> str:
    """What tells texts apart."""
    return hashlib.sha256(np.array(tokens, np.int64).tobytes()).hexdigest()[:12]


def main() -> None:
    """Answer line by line. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(reply: Reply) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    engine = LocalEngine(json.loads(sys.stdin.readline())["arguments"])
    answer({"ready": True})

    @cache
    def tokenized(text: str, chat: bool) -> list[int]:
        return engine.token_ids(Prompt("", "", text, chat=chat))

    for line in sys.stdin:
        try:
            answer(serve(engine, json.loads(line), tokenized))
        except ValueError as error:  # a policy that cannot serve here; anything else ends the process
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
