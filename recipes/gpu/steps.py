"""Section `steps`: what a pass takes as it is and captured, beside the time that reading its weights takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bpkit.decode.attention import NAME
from bpkit.decode.capture import Capture
from bpkit.decode.serving import session_class
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.block_diffusion import BlockDiffusionDrafter, BlockDiffusionSession
from recipes.gpu.clock import Deadline, bandwidth, milliseconds
from recipes.gpu.models import head_bytes, random_pair, weight_bytes
from recipes.gpu.sizes import Sizes

Row = dict[str, Any]


@torch.inference_mode()
def steps(sizes: Sizes, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """Verification by batch and width, drafts by batch, verification with grouped attention, and over a long context.

    Rows hold from `context - batch + 1` to `context` tokens, so that passes have masks. `floor_ms` is the time in which
    the weights of a pass are read at the measured bandwidth; keys and values are not in it.
    """
    rate = bandwidth(device)
    yield {"what": "bandwidth", "gigabytes_per_second": rate / 1e9}
    drafter = random_pair(sizes, device)
    target = drafter.target
    floors = {
        "verify": 1e3 * weight_bytes(target) / rate,
        "draft": 1e3 * (weight_bytes(drafter.model) + head_bytes(target)) / rate,
    }
    for batch in sizes.batch_sizes:
        for made in (_verify(drafter, sizes, batch, deadline), _draft(drafter, sizes, batch, deadline)):
            for row in made:
                yield _beside(row, floors[row["what"]])
    last, usual = sizes.widths[-1:], target.config._attn_implementation
    far = replace(sizes, context=sizes.long_context)
    try:
        for attention in (usual, NAME if usual != NAME else "sdpa"):
            target.set_attn_implementation(attention)
            rows = chain(
                *(_verify(drafter, sizes, batch, deadline, last) for batch in sizes.batch_sizes if attention != usual),
                _verify(drafter, far, 1, deadline, last),
            )
            for row in rows:
                yield _beside({**row, "attention": attention}, floors["verify"])
    finally:
        target.set_attn_implementation(usual)


def _beside(row: Row, floor: float) -> Row:
    row["floor_ms"] = floor
    if row.get("captured_ms"):
        row["eager_over_captured"] = row["eager_ms"] / row["captured_ms"]
        row["floor_over_captured"] = floor / row["captured_ms"]
    return row


def _verify(
    drafter: BlockDiffusionDrafter,
    sizes: Sizes,
    batch: int,
    deadline: Deadline,
    widths: Sequence[int] | None = None,
) -> Iterator[Row]:
    target, kind = drafter.target, session_class(drafter.target)
    device = target.device
    session: Any = kind(
        target,
        rows=batch,
        slots=batch,
        capacity=sizes.context + 2 * max(sizes.widths),
        feature_layers=drafter.feature_layers,
        keep_hidden=False,
    )
    held = _lengths(sizes.context, batch)
    part = max(1, 2048 // batch)  # activations of whole prompts are large
    for start in range(0, sizes.context, part):
        counts = [max(0, min(part, length - start)) for length in held]
        session.prefill(_tokens(target, batch, max(counts)), counts, last=False)
    graphs = Capture("on", target, target, kind).target
    for width in widths or sizes.widths:
        if not deadline:
            return
        tokens, counts = _tokens(target, batch, width), [width] * batch

        def verify(tokens: Tensor = tokens, counts: list[int] = counts) -> None:
            session.verify(tokens, counts)
            session.rollback(counts)

        row: Row = {"what": "verify", "batch": batch, "width": width, "context": sizes.context}
        yield {**row, **_both(session, graphs, verify, device, sizes.repeats)}


def _draft(drafter: BlockDiffusionDrafter, sizes: Sizes, batch: int, deadline: Deadline) -> Iterator[Row]:
    if not deadline:
        return
    device, model = drafter.target.device, drafter.model
    held = _lengths(sizes.context, batch)
    prompts = _tokens(drafter.target, batch, sizes.context)
    text = RunningText(
        [
            RowText(prompts[row : row + 1, :length], sizes.context + 8 * (sizes.repeats + 9))
            for row, length in enumerate(held)
        ]
    )
    session = drafter.begin(text)
    size = len(sizes.feature_layers) * model.config.hidden_size
    features = torch.randn((batch, sizes.context, size), device=device, dtype=model.dtype)

    def draw(logits: Tensor, counts: object) -> tuple[Tensor, Tensor]:
        return logits.argmax(dim=-1), logits

    def draft(count: int = 2) -> None:
        """After so many new tokens of each row."""
        session.advance([features[row, :count] for row in range(batch)])
        session.draft([sizes.block_size] * batch, draw, None)  # type: ignore[arg-type]

    session.advance([features[row, :length] for row, length in enumerate(held)])
    session.draft([sizes.block_size] * batch, draw, None)  # type: ignore[arg-type]
    capture = Capture("on", drafter.target, drafter.target, session_class(drafter.target))
    capture.attach(None, drafter, session)
    graphs, session.graphs = session.graphs, None
    row: Row = {"what": "draft", "batch": batch, "width": sizes.block_size, "context": sizes.context}
    yield {**row, **_both(session, graphs, draft, device, sizes.repeats)}


def _both(
    session: Any | BlockDiffusionSession,
    graphs: Any,
    call: Callable[[], None],
    device: torch.device,
    repeats: int,
) -> Row:
    """A call as it is, and out of graphs; why not, where that failed."""
    session.graphs = None
    row: Row = {"eager_ms": milliseconds(call, device, repeats)}
    session.graphs = graphs
    try:
        row["capture_ms"] = milliseconds(call, device, 1, warm=0)
        row["captured_ms"] = milliseconds(call, device, repeats)
    except (RuntimeError, ValueError) as error:
        row["error"] = f"{type(error).__name__}: {error}"
    finally:
        session.graphs = None
    return row


def _lengths(context: int, batch: int) -> list[int]:
    return [max(1, context - row) for row in range(batch)]


def _tokens(target: Any, batch: int, width: int) -> Tensor:
    return torch.randint(2, target.config.vocab_size, (batch, width), device=target.device)
