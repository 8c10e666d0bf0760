"""`bpkit --plugin recipes bench-reads`: how often a step reads the device, by policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from bpkit.cli import options, outputs
from bpkit.cli.outputs import Outputs
from bpkit.config import Config
from bpkit.prompts import Prompt

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.registry.resolve import PolicyLike

DEFAULT_LIMIT, DEFAULT_NEW_TOKENS = 1, 16


@options.takes(
    texts=options.prompts(DEFAULT_LIMIT),
    files=outputs.figures,
    config=options.settings(
        options.MODELS
        | {name: options.SAMPLING[name] for name in ("max_new_tokens", "temperature")}
        | options.seed("Of the sampling noise; by default 0.")
        | options.RULE
        | options.COST
    ),
)
def bench_reads(
    policy: options.PolicySpecs = None,
    *,
    texts: list[Prompt],
    files: Outputs,
    config: Config,
) -> None:
    """Count how often a step reads the device, by policy.

    At each such point the host waits for the device, and the device then for the host. Models run on a simulated
    device, so no GPU is needed; operands on two devices are an error there as on a GPU, and texts are compared with
    plain decoding. By default all policies that are installed, with each drafter that ships.

    `bpkit --plugin recipes bench-reads --json reads.json`

    `bpkit --plugin recipes bench-reads --policy ./my_policy.py:Cautious --temperature 1`
    """
    from bpkit.cli.models import in_chat
    from bpkit.registry.discovery import registry
    from recipes.reads.count import count_reads

    names = policy or [name for name in registry().policies if name != "onnx"]
    policies: dict[str, PolicyLike] = dict(zip(names, names, strict=True))
    chosen: dict[str, Any] = {
        "max_new_tokens": config.sampling.max_new_tokens or DEFAULT_NEW_TOKENS,
        "temperature": config.sampling.temperature or 0.0,
        "seed": config.sampling.seed or 0,
    }
    decoders = _decoders(config)
    with files.pending() as bar:
        report = count_reads(decoders, policies, in_chat(decoders[0], texts), chosen, progress=bar)
    files.deliver(report, print_reads)


def _decoders(config: Config) -> list[SpeculativeDecoder]:
    """One for the drafter that was named, or for each of those that ship."""
    from bpkit.cli.models import load_decoder

    first = load_decoder(config, "fixed:1")
    if config.drafter is not None or config.target is not None:
        return [first]
    return [first, first.with_policy("fixed:1", "autoregressive"), first.with_policy("fixed:1", "ngram")]


def print_reads(report: dict[str, Any], out: Console) -> None:
    """A row for each policy and drafter."""
    table = Table(title="reads of the device a step", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("drafter")
    table.add_column("policy", style="bold")
    for name in ("mean", "most", "steps", "same text"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        most = f"{row['most']}{' *' if row['asks_after_every_token'] else ''}"
        equal = "yes" if row["texts_equal"] else "NO"
        table.add_row(row["drafter"], row["policy"], f"{row['mean']:.2f}", most, str(row["steps"]), equal)
    out.print(table)
    if any(row["asks_after_every_token"] for row in report["rows"]):
        out.print("* the drafter asks this policy after every token whether to go on, which takes a read each")
    for drafter, policies in report["left_out"].items():
        out.print(f"{drafter} cannot serve {', '.join(policies)} (the reasons are in the JSON)")
