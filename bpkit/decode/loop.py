"""The loop: prefill, then select, draft, truncate, verify, observe until something says stop.

It yields a record for each turn. Streaming, traces, timing tables and progress bars consume the records.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from bpkit.decode.host import to_host
from bpkit.decode.request import Request
from bpkit.types import Prefill, Record


@torch.inference_mode()
def decode(request: Request) -> Generator[Record]:
    """Generate; the tokens of the records, joined, are the output. Shapes carry the batch axis, 1 for now.

    `ids` and what the models give are on the device; what was decided of them is read once a turn, in `settle`.
    """
    target, drafter, policy, rule = request.target, request.drafter, request.policy, request.rule

    watch = request.watch
    watch.resume()
    output = target.prefill(request.prompt, **request.inputs)
    watch.lap("verify")
    verdict = rule.verify(output.logits, request.no_draft(), 0, request.prompt)
    watch.lap("rest")
    decided = request.settle(output.last(), verdict, request.prompt, first=True)
    ids = torch.cat([request.prompt, verdict.tokens], dim=1)  # int64 [1, length]; the last is the anchor
    drafter.advance(torch.cat([*to_host([request.prompt]), decided.tokens], dim=1), output.features)
    watch.lap("rest")
    policy.begin(decided.context)
    watch.lap("policy")
    yield Prefill(decided.tokens, request.clock.charge(watch.take(), None), decided.near_ties)
    decided = decided.without_prefill()

    while not decided.stopped:
        watch.resume()
        context = decided.context
        block_size = policy.select(context)  # int64 [1]
        watch.lap("policy")
        waiting = drafter.waiting
        draft = request.draft(context, block_size, ids)
        verify_length = request.verify_length(draft, ids)
        watch.lap("policy")
        output = target.verify(torch.cat([ids[:, -1:], draft.tokens[:, :verify_length]], dim=1))
        watch.lap("verify")
        verdict = rule.verify(output.logits, draft, verify_length, ids)
        decided = request.settle(output, verdict, ids)
        count = decided.tokens.shape[1]  # num_accepted + 1
        target.rollback(verify_length + 1 - count)
        drafter.advance(decided.tokens, output.features_of(count))
        step = request.step(draft, waiting, verify_length, ids, decided)
        ids = torch.cat([ids, verdict.tokens[:, :count]], dim=1)
        policy.observe(step)
        watch.lap("policy")  # charged to the next step: this one's record is made
        yield step
    policy.end()
