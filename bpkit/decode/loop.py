"""The loop: prefill, then select, draft, truncate, verify, observe until something says stop.

It yields a record for each turn. Streaming, traces, timing tables and progress bars consume the records.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from bpkit.decode.request import Request
from bpkit.types import Record


@torch.inference_mode()
def decode(request: Request) -> Generator[Record]:
    """Generate; the tokens of the records, joined, are the output. Tensors carry the batch axis, 1 for now.

    What the models give is on the device. What was decided is read once a turn, in `settle`, which appends it to the
    running text that target, drafter and rule share.
    """
    target, drafter, policy, rule = request.target, request.drafter, request.policy, request.rule

    output = target.prefill(**request.inputs)
    decided = request.settle(output.last(), rule.verify(output.logits, request.no_draft(), 0))
    drafter.advance(output.features)
    policy.begin(decided.context)
    yield request.prefill(decided)

    context = decided.without_prefill()
    while not decided.stopped:
        draft = request.draft(context, policy.select(context))
        width = request.width(draft, policy.truncate(draft))
        output = target.verify(draft.tokens[:, :width])
        decided = request.settle(output, rule.verify(output.logits, draft, width))
        target.rollback([width - count for count in decided.num_accepted])
        drafter.advance(output.features_of(max(decided.num_accepted) + 1))
        step = request.step(draft, width, decided)
        policy.observe(step)
        yield step
        context = decided.context
    policy.end()
