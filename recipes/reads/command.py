"""`bpkit --plugin recipes bench-reads`: how often a step reads the device, by policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bpkit.cli import options
from bpkit.cli.errors import nothing_written, when_interrupted
from bpkit.cli.terminal import console, progress_bar, say

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.registry.resolve import PolicyLike

DEFAULT_LIMIT, DEFAULT_NEW_TOKENS = 1, 16


def bench_reads(
    context: typer.Context,
    policy: options.PolicySpecs = None,
    domain: options.Domains = None,
    limit: options.Limit = None,
    prompts: options.Prompts = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all figures here.", metavar="FILE")] = None,
    # `options.settled` reads these from the context: flags win over the config file.
    target: options.Target = None,
    drafter: options.Drafter = None,
    config: options.ConfigFile = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling noise; by default 0.", metavar="N")] = None,
    rule: options.Rule = None,
    cost: options.Cost = None,
) -> None:
    """Count how often a step reads the device, by policy.

    At each such point the host waits for the device, and the device then for the host. Models run on a simulated
    device, so no GPU is needed; operands on two devices are an error there as on a GPU, and texts are compared with
    plain decoding. By default all policies that are installed, with each drafter that ships.

    `bpkit --plugin recipes bench-reads --json reads.json`

    `bpkit --plugin recipes bench-reads --policy ./my_policy.py:Cautious --temperature 1`
    """
    settled = options.settled(context)
    from bpkit.files import check_writable, write_json
    from bpkit.prompts import choose_prompts
    from bpkit.registry.discovery import registry
    from recipes.reads.count import count_reads

    if json is not None:
        check_writable(json)
    names = policy or [name for name in registry().policies if name != "onnx"]
    policies: dict[str, PolicyLike] = dict(zip(names, names, strict=True))
    texts = choose_prompts(prompts, domain or [], limit, shipped_limit=DEFAULT_LIMIT)
    chosen: dict[str, Any] = {
        "max_new_tokens": settled.sampling.max_new_tokens or DEFAULT_NEW_TOKENS,
        "temperature": settled.sampling.temperature or 0.0,
        "seed": settled.sampling.seed or 0,
    }
    decoders = _decoders(settled)
    with when_interrupted(nothing_written(json)), progress_bar() as bar:
        report = count_reads(decoders, policies, texts, chosen, progress=bar)
    if json is not None:
        write_json(json, report)
    print_reads(report, console())
    if json is not None:
        say(f"wrote {json}")


def _decoders(settled: Any) -> list[SpeculativeDecoder]:
    """One for the drafter that was named, or for each of those that ship."""
    from bpkit.cli.models import load_decoder

    first = load_decoder(settled, "fixed:1")
    if settled.drafter is not None or settled.target is not None:
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
