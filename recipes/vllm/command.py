"""Commands on policies inside vLLM: measure them by the clock, sum up, and compare with what a replay predicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bpkit.cli.errors import when_interrupted
from bpkit.cli.evaluate_load import parse_numbers
from bpkit.cli.outputs import portable
from bpkit.cli.terminal import progress_bar, say
from bpkit.files import check_writable, write_json
from recipes.real.command import named_files

METHODS = ("plain", "vllm_table", "batch_table", "joint", "joint@features", "turbospec", "goodput")


def bench_vllm(
    out: Annotated[Path, typer.Option("--json", help="Where the figures go; the runs beside it.", metavar="FILE")],
    prompts: Annotated[
        Path,
        typer.Option(help="JSONL with splits `validation` and `test`: of `load-prompts`.", exists=True, dir_okay=False),
    ],
    cost: Annotated[
        Path, typer.Option(help="Cost file of `bpkit calibrate --engine vllm`.", exists=True, dir_okay=False)
    ],
    target: Annotated[str | None, typer.Option(help="As for `bpkit calibrate --engine vllm`.", metavar="MODEL")] = None,
    drafter: Annotated[str | None, typer.Option(help="Likewise: a DFlash drafter, or `ngram`.", metavar="NAME")] = None,
    engine_args: Annotated[str, typer.Option(help="Options of vLLM: a JSON object.", metavar="JSON")] = "{}",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside the fixed lengths: a policy, `NAME@features` with the drafter's probabilities, `plain`, or "
            "`vllm_table`; repeat.",
            metavar="NAME",
        ),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Of closed loops.", metavar="N,N,...")] = "1,2,4,8,16,32",
    changing: Annotated[
        str, typer.Option(help="Levels of a load that changes.", metavar="N,N,...")
    ] = "1,2,4,8,16,32,16,8,4,2,1",
    repetitions: Annotated[int, typer.Option(help="Blocks of each load, each with other prompts.", min=1)] = 3,
    per_row: Annotated[float, typer.Option(help="Requests of a closed loop for each row.", min=1.0)] = 2.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of each request.", min=2)] = 64,
    minutes: Annotated[
        float | None, typer.Option(help="No block begins later, but that each load has one.", min=0.0)
    ] = None,
    core: Annotated[int | None, typer.Option(help="That all engines run on, one at a time.", min=0)] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and orders.", min=0)] = 0,
) -> None:
    """Measure policies inside vLLM, by the clock.

    All methods take turns on the same prompts: fixed lengths, a table of the best of them by batch size, tuned on
    validation prompts, as a policy and as vLLM's own, and policies. Engines are processes of which one works at a time,
    pinned to one core with one thread. Runs are kept as they end: the same command goes on where it was interrupted.

    `bpkit --plugin recipes bench-vllm --prompts load/pair.jsonl --cost cost.json --core 1 --json pair.json`
    """
    from bpkit_vllm.calibrate import model_arguments
    from bpkit_vllm.local_engine import check_installed
    from bpkit_vllm.versions import installed_version

    from bpkit.installation.machine import available_cores, cpu_name
    from bpkit.prompts import read_prompts
    from bpkit.trace.cost.engine import EngineSettings
    from recipes.vllm.measure import Bench, BenchPlan, RunFile, best_table
    from recipes.vllm.summary import SCHEMA_VERSION, summarise, texts_of

    check_installed()
    check_writable(out, suffixes=(".json",))
    rows = tuple(parse_numbers(concurrency, "--concurrency", int, "1,4,16"))
    levels = tuple(parse_numbers(changing, "--changing", int, "1,4,16,4,1")) if changing else ()
    on_cpu = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": True, "max_num_batched_tokens": 2048}
    given = EngineSettings(
        target, drafter, {**on_cpu, **json.loads(engine_args)}, tuple(sorted({*rows, *levels})), seed=seed
    )
    plan = BenchPlan(
        methods=tuple(method or METHODS),
        base=model_arguments(given),
        cost=str(cost.absolute()),
        concurrency=rows,
        changing=levels,
        repetitions=repetitions,
        per_row=per_row,
        options={"max_new_tokens": max_new_tokens, "temperature": 0.0},
        seed=seed,
        minutes=minutes,
        core=core,
    )
    runs = RunFile(out.with_suffix(".runs.jsonl"), plan.stated())
    kept = f"The runs until then are in {runs.path}: the same command goes on."
    with when_interrupted(kept), progress_bar() as bar:
        bench = Bench(plan, read_prompts(prompts), runs, bar.show)
        bench.run()
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": portable(sys.argv[1:]),
        "engine": f"vllm {installed_version()}",
        "machine": {"cpu": cpu_name(), "cores": available_cores(), "pinned_to": core},
        "settings": {name: value for name, value in plan.stated().items() if name not in ("base", "cost")},
        "table": {str(rows): size for rows, size in best_table(runs.runs).items()},
        **texts_of(runs.runs),
        "loads": summarise(runs.runs),
    }
    write_json(out, report)
    say(f"wrote {out}: {report['texts_equal']} of {report['texts']} texts are those of plain decoding")
    for load, of in report["loads"].items():
        found = ", ".join(f"{name} {entry['ratio']:.3f}" for name, entry in of.get("methods", {}).items())
        say(f"{load}: best {of.get('best_fixed')}; {found}")


def vllm_replay(
    runs: Annotated[Path, typer.Argument(help="Runs of `bench-vllm`.", exists=True, dir_okay=False)],
    trace: Annotated[Path, typer.Option(help="Of the same prompts and numbers of new tokens.", metavar="TRACE")],
    cost: Annotated[
        Path, typer.Option(help="Cost file of `bpkit calibrate --engine vllm`.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Option("--json", help="Where the figures go.", metavar="FILE")],
    max_tokens: Annotated[
        int, typer.Option(help="Positions of a step at most: vLLM's `max_num_batched_tokens`.", min=1)
    ] = 2048,
) -> None:
    """Predict runs of `bench-vllm` by replay.

    Needs no vLLM. Each run is served again on a simulated server, the same requests under the same load.

    `bpkit --plugin recipes vllm-replay pair.runs.jsonl --trace TRACE --cost cost.json --json pair_replay.json`
    """
    from bpkit.cli.models import quiet_libraries
    from bpkit.trace.cost import read_cost
    from bpkit.trace.store.joined import open_trace
    from recipes.vllm.measure import best_table
    from recipes.vllm.replay import Simulated, predicted_runs, predictions

    check_writable(out, suffixes=(".json",))
    quiet_libraries()
    first, *done = (json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines())
    opened, used = open_trace(trace), {name for run in predicted_runs(done) for name in run["prompts"]}
    prompts = {name: opened[place] for place, name in enumerate(opened.ids) if name in used}
    per_row = first["plan"]["changing_per_row"]
    engine = Simulated(prompts, opened.spec, read_cost(cost), per_row, best_table(done), max_tokens)
    with progress_bar() as bar:
        found = predictions(done, engine, bar.show)
    write_json(out, {"command": portable(sys.argv[1:]), **found})
    say(f"wrote {out}")
    say(json.dumps(found["headline"], indent=2))


def vllm_summary(
    out: Annotated[Path, typer.Option("--json", help="Where all of it goes.", metavar="FILE")],
    run: Annotated[list[str], typer.Option(help="JSON of `bench-vllm`, by name; repeat.", metavar="NAME=FILE")],
    replay: Annotated[
        list[str] | None, typer.Option(help="JSON of `vllm-replay`, by the same name; repeat.", metavar="NAME=FILE")
    ] = None,
    policy: Annotated[str, typer.Option(help="That the headline is of.", metavar="NAME")] = "joint",
) -> None:
    """Sum up what policies are worth inside vLLM.

    `bpkit --plugin recipes vllm-summary --run pair=pair.json --replay pair=pair_replay.json --json vllm.json`
    """
    from recipes.vllm.summary import SCHEMA_VERSION, headline

    check_writable(out, suffixes=(".json",))
    reports = {name: json.loads(file.read_bytes()) for name, file in named_files(run).items()}
    replays = {name: json.loads(file.read_bytes()) for name, file in named_files(replay or []).items()}
    said = headline(reports, policy)
    write_json(
        out,
        {
            "schema_version": SCHEMA_VERSION,
            "command": portable(sys.argv[1:]),
            "headline": {**said, "replay": {name: of["headline"] for name, of in replays.items()}},
            "runs": reports,
            "replays": replays,
        },
    )
    say(f"wrote {out}")
    say(json.dumps(said, indent=2))
