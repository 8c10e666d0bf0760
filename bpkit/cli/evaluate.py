"""`bpkit evaluate`: judge policies on a trace, on prompts that nothing was chosen on."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpkit.cli import completion, options, outputs
from bpkit.cli.errors import require
from bpkit.cli.outputs import Outputs, command_line
from bpkit.config import Config
from bpkit.files import utc
from bpkit.policy import PolicyError
from bpkit.prompts import read_prompts

if TYPE_CHECKING:
    from bpkit.judge.evaluation.splits import SplitRule
    from bpkit.registry.resolve import PolicyLike
    from bpkit.trace.cost import NamedCost
    from bpkit.trace.store.joined import AnyTrace

DEFAULT_SPLIT = "0.4,0.2,0.4"
SPLIT_HELP = "Shares of train, validation and test prompts; or a file of prompts, of which each says its `split`."
_how = partial(typer.Option, rich_help_panel="How to judge")


@options.takes(files=outputs.figures_and_page, config=options.settings(options.MODELS | options.PLACE))
def evaluate(
    trace: Annotated[
        Path,
        typer.Argument(
            help="Folder that `bpkit trace` made; or several of the same outputs with `+` between them, each a source "
            "of drafts.",
            metavar="TRACE",
        ),
    ],
    cost: Annotated[
        str | None,
        typer.Option(
            help="What steps cost: a file of `bpkit calibrate` or your own, or a preset. Flat and linear costs are "
            "judged by as well; without this option only flat ones, which know no time.",
            metavar="FILE|PRESET",
            autocompletion=completion.presets,
        ),
    ] = None,
    policy: options.PolicySpecs = None,
    *,
    files: Outputs,
    seed: Annotated[int, _how(help="Of split, orders and intervals.")] = 0,
    split: Annotated[str, _how(help=SPLIT_HELP, metavar="A,B,C|FILE")] = DEFAULT_SPLIT,
    orders: Annotated[int, _how(help="Orders of the test prompts for policies with a memory.", min=1)] = 8,
    no_tune: Annotated[bool, _how("--no-tune", help="Take policies as they are given.")] = False,
    permutations: Annotated[
        int, _how(help="Of the test whether a size per prompt is learnable; 0: none.", min=0)
    ] = 200,
    second_test: Annotated[
        bool,
        _how(
            "--second-test",
            help="Judge on the prompts left for training, and leave the test prompts alone: a second test set for "
            "policies that were trained on other prompts, to be opened once.",
        ),
    ] = False,
    allow_leak: Annotated[
        bool,
        _how(
            "--allow-leak",
            help="Judge a trained policy also on prompts that it was trained or chosen on; the result says so.",
        ),
    ] = False,
    branches: Annotated[
        int | None,
        _how(
            "--branches",
            help="Of a trace of drafts with branches, how many of them at most; 1 judges policies on chains.",
            min=1,
        ),
    ] = None,
    limit: Annotated[int | None, _how(help="Prompts of each domain, the first ones; all by default.", min=1)] = None,
    recompute: options.Recompute = False,
    config: Config,
) -> None:
    """Judge policies on a trace, by prompts that nothing was chosen on.

    Tokens/s against the best fixed size, and the share of what could be gained. Prompts are split. Options that you
    leave open are tuned on validation prompts, where the best fixed size is chosen too; all figures are of test
    prompts. Nothing is decoded: policies are replayed, and a cost model says what each step takes. Without `--policy`,
    or one in `--config`, all are judged that the trace can serve.

    `bpkit evaluate TRACE --cost cost.json --report report.html`

    `bpkit evaluate TRACE --cost cost.json --policy threshold --policy bandit:discount=0.99 --json eval.json`

    Next: `bpkit bench` tries the best of them by wall clock.
    """
    require("pyarrow", extra="traces", purpose="A trace")
    if permutations:
        require("sklearn", extra="traces", purpose="The permutation test")
    rule = parse_split(split)
    named = options.named_policies(policy or [], config)
    from bpkit.cli.models import load_decoder, quiet_libraries
    from bpkit.judge.evaluation import evaluate as judge
    from bpkit.learn.training.prompts import Part
    from bpkit.trace.collect.recompute import Recompute
    from bpkit.trace.store.joined import open_trace

    quiet_libraries()
    opened = open_trace(trace, branches)
    costs = cost_models(cost, max(opened.manifest.block_sizes))
    started = time.time()
    fill = Recompute(load_decoder(config, "fixed"), opened.manifest) if recompute else None
    with files.pending() as bar:
        result = judge(
            Part(opened, range(len(opened)), limit=limit),
            opened.spec,
            named or all_policies(),
            costs,
            seed=seed,
            split=rule,
            orders=orders,
            tune=not no_tune,
            permutations=permutations,
            second_test=second_test,
            leave_out=not named,
            allow_leaks=allow_leak,
            trace_seed=opened.manifest.seed,
            fill=fill,
            progress=bar,
        )
    if cost is None:
        result["notes"].insert(
            0,
            "No cost model was given, so every step counts the same and only acceptance length matters: give --cost "
            "with a file of `bpkit calibrate` to see which policy is fast.",
        )
    result["provenance"] = provenance(opened, costs, started)
    from bpkit.judge.evaluation.page import html_report
    from bpkit.judge.evaluation.tables import print_evaluation

    files.deliver(result, print_evaluation, page=html_report)


def parse_split(text: str) -> SplitRule:
    """Three fractions, or the part of each prompt by its id, from a file of prompts. Raises ValueError.

    >>> parse_split("0.5, 0.25, 0.25")
    (0.5, 0.25, 0.25)
    """
    from bpkit.judge.evaluation.splits import checked_fractions

    if Path(text).is_file():
        return {prompt.id: prompt.split for prompt in read_prompts(Path(text))}

    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--split {text}: write three numbers that sum to 1, such as {DEFAULT_SPLIT}, or name a file of prompts"
        ) from None
    return checked_fractions(parts)


def all_policies() -> dict[str, PolicyLike]:
    """All registered policies whose names alone are enough."""
    from bpkit.registry.discovery import registry
    from bpkit.registry.resolve import resolve_policy

    enough: dict[str, PolicyLike] = {}
    for name in sorted(registry().policies):
        with suppress(PolicyError):
            resolve_policy(name)
            enough[name] = name
    return enough


def cost_models(given: str | None, largest: int) -> list[NamedCost]:
    """The given cost model, under the name `measured` if it was measured, and the two made from it."""
    from bpkit.trace.cost import CostTable, flat, linear, read_cost

    if given is None:
        plain = CostTable(name="a plain step", unit="plain steps", verify={1: 1.0, largest: 1.0})
        return [flat(plain)]
    cost = read_cost(given)
    if isinstance(cost, CostTable) and cost.measured is not None:
        cost = cost.model_copy(update={"name": "measured"})
    elif cost.name in ("flat", "linear"):
        cost = cost.model_copy(update={"name": f"given ({cost.name})"})
    return [cost, flat(cost), linear(cost)]


def provenance(trace: AnyTrace, costs: list[NamedCost], started: float) -> dict[str, Any]:
    """What made the figures."""
    import torch

    from bpkit.installation.machine import describe_machine

    return {
        "command": command_line(),
        "started": utc(started),
        "seconds": time.time() - started,
        "machine": describe_machine(torch.device("cpu")),
        "trace": trace.manifest.model_dump(mode="json", exclude={"prompt_ids"}),
        "costs": {cost.name: cost.model_dump(mode="json", exclude={"spread"}) for cost in costs},
    }
