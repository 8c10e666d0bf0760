"""The README of an exported policy: what an engineer in another language needs to know."""

from __future__ import annotations

from bpkit.export.schema import ExportedPolicy, Network, Tensor

WHEN = {
    "begin": "once for each request, after prefill",
    "select": "before each draft",
    "extend": "while an autoregressive drafter drafts, after each token",
    "truncate": "after each draft, before it is verified",
    "observe": "after each step, to learn from it",
}


def readme(policy: ExportedPolicy) -> str:
    """Markdown."""
    decoder = policy.decoder
    parts = [
        f"# {policy.name}",
        policy.summary,
        f"A block-size policy for speculative decoding, trained for target `{decoder.target}` (hidden size "
        f"{decoder.hidden_size}, vocabulary {decoder.vocab_size}) with drafter `{decoder.drafter}` "
        f"({decoder.drafter_kind}, trained block size {decoder.trained_block_size}). Any runtime of ONNX can run it; "
        "`policy.json` says the same for machines, with rows to try it by.",
        *(_section(file, network) for file, network in policy.networks.items()),
        "## Good to know",
        _notes(policy),
    ]
    return "\n\n".join(parts) + "\n"


def _section(file: str, network: Network) -> str:
    rows = [f"## {file}", f"Asked {WHEN[network.method]}. Opset {network.opset}, {network.bytes:,} bytes, float32."]
    rows.append("| | name | type | shape | meaning |\n|---|---|---|---|---|")
    rows[-1] += "".join(_row("in", tensor) for tensor in network.inputs)
    rows[-1] += "".join(_row("out", tensor) for tensor in network.outputs)
    return "\n\n".join(rows)


def _row(kind: str, tensor: Tensor) -> str:
    shape = ", ".join(map(str, tensor.shape))
    return f"\n| {kind} | `{tensor.name}` | {tensor.dtype} | [{shape}] | {tensor.meaning} |"


def _notes(policy: ExportedPolicy) -> str:
    notes = [
        "`block_size` counts the anchor, so that a drafter drafts `block_size - 1` tokens; 1 means no draft.",
        f"If a score is not finite, use block size {policy.default_block_size}. Any decision gives the same text.",
    ]
    if policy.drafts is not None:
        notes.append(f"Every draft has block size {policy.drafts}.")
    if policy.state:
        names = ", ".join(f"`{name}`" for name in policy.state)
        notes.append(
            f"Keep {names} of each request from the output of that name (or of that name after `next_`) to the next "
            "call that takes it; it begins as zeros where `begin` does not give it. Without an axis `batch` it is one "
            "for all requests."
        )
    if policy.curves is not None:
        notes.append(
            "The `_seconds` inputs are what steps cost on your device; `curves` in `policy.json` has those of the "
            "device of training."
        )
    checked = sum(found.rows for found in policy.validation.values())
    differ = sum(found.within_tolerance for found in policy.validation.values())
    notes.append(
        f"onnxruntime decided as the original did on {checked - differ:,} of {checked:,} rows of a trace"
        + (f"; the other {differ} were near ties." if differ else ".")
    )
    return "\n".join(f"- {note}" for note in notes)
