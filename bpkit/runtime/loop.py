"""The loop: prefill, then select, draft, truncate, verify, observe until something says stop.

It yields a record for each turn. Streaming, traces, timing tables and progress bars consume the records.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from bpkit.runtime.clock import Watch
from bpkit.runtime.request import Request
from bpkit.types import Prefill, Record


@torch.inference_mode()
def decode(request: Request) -> Generator[Record]:
    """Generate; the tokens of the records, joined, are the output. Shapes carry the batch axis, 1 for now."""
    target, drafter, policy, rule = request.target, request.drafter, request.policy, request.rule

    watch = Watch(request.clock)
    output = target.prefill(request.prompt)
    watch.lap("verify")
    verdict = rule.verify(output.logits, request.no_draft(), 0, request.prompt)
    tokens, stopped = request.stopping.cut(request.prompt, verdict.tokens)
    ids = torch.cat([request.prompt, tokens], dim=1)  # int64 [1, length]; the last is the anchor
    drafter.advance(ids, output.features)
    watch.lap("rest")
    policy.begin(request.context(ids, output, first=True))
    watch.lap("policy")
    yield Prefill(tokens, request.clock.charge(watch.take(), None), verdict.near_ties(1))

    while not stopped:
        watch.resume()
        context = request.context(ids, output)
        block_size = policy.select(context)  # int64 [1]
        watch.lap("policy")
        waiting = drafter.waiting
        draft = request.draft(context, block_size, ids, watch)
        verify_length = request.verify_length(draft, ids)
        watch.lap("policy")
        output = target.verify(torch.cat([ids[:, -1:], draft.tokens[:, :verify_length]], dim=1))
        watch.lap("verify")
        verdict = rule.verify(output.logits, draft, verify_length, ids)
        tokens, stopped = request.stopping.cut(ids, verdict.tokens)  # int64 [1, num_accepted + 1]
        target.rollback(verify_length + 1 - tokens.shape[1])
        output = output.first(tokens.shape[1])
        drafter.advance(tokens, output.features)
        step = request.step(draft, waiting, verify_length, ids, tokens, verdict, watch)
        ids = torch.cat([ids, tokens], dim=1)
        policy.observe(step)
        watch.lap("policy")  # charged to the next step: this one's record is made
        yield step
    policy.end()
