"""`bpkit calibrate`: measure what steps cost on this device, or show a cost model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bpkit.cli import completion, options
from bpkit.cli.outputs import Outputs, command_line
from bpkit.cli.terminal import console
from bpkit.config import Config
from bpkit.prompts import Prompt

if TYPE_CHECKING:
    from rich.console import Console

    from bpkit.judge.tables import Table
    from bpkit.trace.cost import CostTable, NamedCost
    from bpkit.trace.cost.engine import EngineSettings

DEFAULT_NEW_TOKENS = 128
DEFAULT_SPREAD, DEFAULT_MINUTES = 2.0, 10.0
_how_long = partial(typer.Option, rich_help_panel="How long, and what")
_engine = partial(typer.Option, rich_help_panel="Another engine")


@options.takes(
    texts=options.prompts(),
    config=options.settings(
        options.MODELS
        | options.SAMPLING
        | options.seed("Of the order of prompts and of sampling noise; by default 0.")
        | options.RULE
        | options.PLACE
        | options.PRODUCTS
        | options.threads()
    ),
)
def calibrate(
    out: Annotated[Path | None, typer.Option(help="Write the cost model here, as JSON.", metavar="FILE")] = None,
    show: Annotated[
        str | None,
        typer.Option(
            help="Measure nothing: print this cost file or preset.",
            metavar="FILE|PRESET",
            autocompletion=completion.presets,
        ),
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="Measure nothing: list cost models made from published figures.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the costs here (.png, .svg or .pdf).", metavar="FILE")] = None,
    max_block_size: Annotated[
        int | None,
        _how_long(
            help="Largest block size and verify width; by default the drafter's trained block size.", metavar="N"
        ),
    ] = None,
    spread: Annotated[
        float,
        _how_long(
            help="Measure until every draft and target pass is known to this many per cent (standard error / mean).",
            min=0.01,
            metavar="PERCENT",
        ),
    ] = DEFAULT_SPREAD,
    max_minutes: Annotated[float, _how_long(help="But no longer than this.", min=0.0, metavar="M")] = DEFAULT_MINUTES,
    rounds: Annotated[int | None, _how_long(help="And no more rounds over the prompts.", min=1, metavar="N")] = None,
    batch_sizes: Annotated[
        str | None,
        _how_long(
            help="Numbers of prompts to decode at once, with commas: what a step of several rows costs. One row is "
            "always measured, and by default no other; of an engine 1,2,4,8,16,32.",
            metavar="N,N,..",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        _engine(
            help="Time the steps of this engine instead of bpkit's, such as `vllm` where that is installed.",
            metavar="NAME",
            autocompletion=completion.engines,
        ),
    ] = None,
    engine_args: Annotated[
        str | None, _engine(help="Options of the engine, as it calls them: a JSON object.", metavar="JSON")
    ] = None,
    *,
    texts: list[Prompt],
    config: Config,
) -> None:
    """Measure what drafts and target passes cost on this device.

    Writes a JSON file for replay, oracles and policies that plan by time (`--cost`). Requests run in the ordinary loop
    under a policy that draws block sizes and verify widths at random. Measure with the number of threads, the sampling
    and the context lengths that you will decode with, on a machine that does nothing else. Greedy unless a temperature
    is given; `--threads auto` is torch's own choice here.

    `bpkit calibrate --out cost.json --plot cost.png`

    `bpkit calibrate --batch-sizes 1,2,4,8,16 --out cost.json`

    `bpkit calibrate --engine vllm --out cost.json`

    `bpkit calibrate --show cost.json`

    Next: `bpkit evaluate TRACE --cost cost.json`
    """
    if list_presets:
        return print_presets()
    if show is None and out is None:
        raise ValueError(
            "say where to write the cost model: --out cost.json; or --show FILE to print one, or --list-presets"
        )
    if engine is None and engine_args is not None:
        raise ValueError("--engine-args are options of an engine: name it with --engine")
    from bpkit.trace.cost import read_cost, write_cost
    from bpkit.trace.cost.plot import plot_cost

    sizes = numbers_of_rows("1" if batch_sizes is None else batch_sizes)
    files = Outputs(out if show is None else None, plot=plot)
    cost: NamedCost
    if show is not None:
        cost = read_cost(show)
    elif engine is not None:
        from bpkit.registry.discovery import registry

        measure_engine = registry().find("engine", engine).load()
        in_its_words = _engine_settings(
            config, sizes if batch_sizes else None, max_block_size, max_minutes, engine_args
        )
        with files.pending() as bar:
            cost = measure_engine(texts, in_its_words, bar.show)
    else:
        from bpkit.cli.models import in_chat, load_decoder
        from bpkit.trace.cost.calibrate import CalibrationSettings
        from bpkit.trace.cost.calibrate import calibrate as measure

        settings = CalibrationSettings(
            max_block_size=max_block_size,
            spread=spread / 100,
            max_minutes=max_minutes,
            rounds=rounds,
            batch_sizes=sizes,
            options=config.sampling.options(max_new_tokens=DEFAULT_NEW_TOKENS, temperature=0.0),
            seed=config.sampling.seed or 0,
            command=command_line(),
        )
        with files.pending() as bar:
            decoder = load_decoder(config, "fixed")
            cost = measure(decoder, in_chat(decoder, texts), settings, bar.show)
    files.deliver(
        cost,
        lambda cost, shown: print_cost(cost.table(), shown),
        lambda cost, path: plot_cost(cost.table(), path),
        write=lambda path, cost: write_cost(cost, path),
    )


def _engine_settings(
    config: Config, sizes: tuple[int, ...] | None, max_block_size: int | None, max_minutes: float, arguments: str | None
) -> EngineSettings:
    """What an engine is asked to measure. Raises ValueError for what it would not heed."""
    from bpkit.trace.cost.engine import CONCURRENCY, EngineSettings

    if given := sorted(config.runtime.model_dump(exclude_defaults=True)):
        raise ValueError(
            f"{', '.join('--' + name.replace('_', '-') for name in given)}: an engine is told such things in its own "
            'words, as in --engine-args \'{"dtype": "float32"}\''
        )
    if not isinstance(config.drafter, str | None) or "+" in (config.drafter or ""):
        raise ValueError("--drafter: an engine has one drafter: name one folder, or `ngram`")
    try:
        read = json.loads(arguments or "{}")
    except ValueError as error:
        raise ValueError(f"--engine-args is not valid JSON ({error})") from None
    if not isinstance(read, dict):
        raise ValueError(f'--engine-args must be an object such as {{"dtype": "float32"}}, not a {type(read).__name__}')
    return EngineSettings(
        target=config.target,
        drafter=config.drafter,
        arguments=read,
        concurrency=sizes or CONCURRENCY,
        max_block_size=max_block_size,
        options=config.sampling.options(max_new_tokens=DEFAULT_NEW_TOKENS, temperature=0.0),
        max_minutes=max_minutes,
        seed=config.sampling.seed or 0,
        command=command_line(),
    )


def numbers_of_rows(text: str) -> tuple[int, ...]:
    """Batch sizes, ascending and each once. Raises ValueError for anything else.

    >>> numbers_of_rows("8, 1,2")
    (1, 2, 8)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--batch-sizes {text!r}: write whole numbers from 1 with commas between them, such as 1,2,4,8"
        )
    return tuple(sorted({int(part) for part in parts}))


def print_presets() -> None:
    """Names of the presets, with what they say and where it comes from."""
    from rich.markup import escape

    from bpkit.trace.cost.presets import PRESETS

    shown = console()
    for name, cost in PRESETS.items():
        shown.print(f"[bold]{escape(name)}[/bold] (in {cost.unit})")
        shown.print(escape(f"  {cost.description}"), soft_wrap=True)
        shown.print(escape(f"  Source: {cost.source}"), soft_wrap=True)


def print_cost(cost: CostTable, shown: Console) -> None:
    """Costs by size at the context length in the middle, and below what the table leaves out."""
    from rich.markup import escape

    from bpkit.judge.tables import Table, TableRow

    at, largest_block = cost.middle_context, cost.largest_block_size or cost.largest_width
    where = f", context length {at}" if isinstance(cost.verify[1], dict) else ""
    unit = "ms" if cost.unit == "seconds" else cost.unit
    head = ["size", "draft", "verify", "step", "T(1)/T(v)", "break-even\nacceptance length"]
    head += ["spread %\ndraft/verify"] if cost.spread else []
    known = {(cell.phase, cell.size): cell.spread for cell in cost.spread if cell.context_length is None}
    rows = []
    for size in sorted({1, *cost.draft, *cost.verify}):
        row = [str(size), "-", "-", "-", "-", "-"]
        if 1 < size <= largest_block:
            row[1] = _figure(cost, cost.seconds("draft", size, at))
        if size <= cost.largest_width:
            row[2], row[4] = _figure(cost, cost.seconds("verify", size, at)), f"{cost.target_efficiency(size):.2f}"
        if size <= min(largest_block, cost.largest_width):
            row[3], row[5] = _figure(cost, cost.step(size)), f"{cost.break_even(size):.2f}"
        row.append("/".join(f"{100 * known[p, size]:.1f}" if (p, size) in known else "-" for p in ("draft", "verify")))
        rows.append(TableRow(row[: len(head)]))
    shown.print(Table(f"{cost.name} ({unit}{where})", head, [rows]))
    for place, other in enumerate(cost.sources, 1):
        drafts = ", ".join(f"{size}: {_figure(cost, more)}" for size, more in other.draft.items()) or "nothing"
        whose = f"source {place}" + (f" ({other.measured.drafter})" if other.measured else "")
        shown.print(escape(f"Drafts of {whose}, by block size: {drafts}."), soft_wrap=True)
    if cost.rows:
        shown.print(_rows_table(cost))
    for sentence in sentences(cost):
        shown.print(escape(sentence), soft_wrap=True)


def _rows_table(cost: CostTable) -> Table:
    """Steps of several rows that all have one block size."""
    from bpkit.judge.tables import Table, TableRow

    largest = min(cost.largest_block_size or cost.largest_width, cost.largest_width)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size < largest] + [largest]
    held_out = cost.measured.held_out if cost.measured is not None else None
    head = ["rows", *(f"block\nsize {size}" for size in sizes), "plain step\na row"]
    head += ["error %\nheld out"] if held_out is not None else []
    lines = []
    for rows in (1, *sorted(cost.rows)):
        steps = [cost.step(size, rows=rows) for size in sizes]
        error = held_out.by_rows.get(rows) if held_out is not None else None
        row = [str(rows), *(_figure(cost, step) for step in steps), _figure(cost, steps[0] / rows)]
        lines.append(TableRow([*row, "-" if error is None else f"{100 * error:.1f}"][: len(head)]))
    unit = "ms" if cost.unit == "seconds" else cost.unit
    return Table(f"steps of all rows together ({unit}, context length {cost.middle_context})", head, [lines])


def sentences(cost: CostTable) -> list[str]:
    """What the table does not show, and how it was measured."""
    catching_up = ", ".join(f"{size}: {_figure(cost, more)}" for size, more in cost.catch_up.items())
    reading = ", ".join(f"{tokens}: {_figure(cost, more)}" for tokens, more in cost.prefill.items())
    features = [f"{_figure(cost, more)} at block size {size}" for size, more in cost.features.items()]
    contexts = sorted(cost.verify[1]) if isinstance(cost.verify[1], dict) else []
    said = [
        f"A step is a draft with one position waiting, a target pass over all of it, and the rest of a step "
        f"({_figure(cost, cost.rest)}).",
        f"Catching up, by waiting positions: {catching_up}." if catching_up else "",
        f"Probabilities and entropies of a draft: {' to '.join(features[:: max(len(features) - 1, 1)])}."
        if features
        else "",
        f"Reading prompts, by tokens of a pass: {reading}." if reading else "",
        f"Context lengths that plain steps have figures for: {', '.join(map(str, contexts))}." if contexts else "",
        cost.description,
        f"Source: {cost.source}" if cost.source else "",
    ]
    if cost.measured is not None:
        m = cost.measured
        load = m.machine.get("load_average")
        busy = f", load average {load:.1f} at the start" if isinstance(load, float) else ""
        spread = m.worst_spread
        worst = "one figure has a single sample" if spread is None else f"worst spread {100 * spread:.1f}%"
        worst = f"the engine was {m.engine}" if m.engine else worst
        said += [
            f"{m.steps} steps of {m.prompts} prompts in {m.seconds / 60:.1f} minutes; ended because {m.ended}; {worst}"
            f"{busy}.",
            f"The table's price of all these steps is {100 * m.modelled_over_measured:.1f}% of the time that they took "
            f"(outliers are trimmed). From their first half to the second, like work took {100 * m.drift:+.1f}% time.",
            *_held_out(cost),
        ]
    return [sentence for sentence in said if sentence]


def _held_out(cost: CostTable) -> list[str]:
    """How well steps of several rows are priced."""
    if not cost.rows or cost.measured is None:
        return []
    found = cost.measured.held_out
    if found is None:
        return ["There were too few runs of several rows to hold some out: how well they are priced is not known."]
    between = found.between_error
    never = "" if between is None else f", by {100 * between:.1f}% at numbers of rows that nothing was fitted to"
    return [
        f"Held out: {found.steps} steps of {found.mixes} mixes of rows. Prices made from other runs are off by "
        f"{100 * found.mean_error:.1f}% in the mean mix{never}; noise alone would make {100 * found.noise:.1f}%. "
        f"{100 * found.within_tenth:.0f}% of the mixes are within 10%; the worst, {100 * found.worst_error:+.1f}%, is "
        f"{found.worst_mix}. Single steps, noise included, are off by {100 * found.step_error:.1f}% (median)."
    ]


def _figure(cost: CostTable, value: float) -> str:
    return f"{1000 * value:.3f}" if cost.unit == "seconds" else f"{value:.3f}"
