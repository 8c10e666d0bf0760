"""What makes the shipped pair, and what measures bpkit itself: a plug-in for a checkout, not in the wheel.

`bpkit --plugin recipes COMMAND`, run in the root of the repository. README.md lists the commands.
"""

from __future__ import annotations

import typer

from bpkit import hookimpl


@hookimpl
def bpkit_register_commands(app: typer.Typer) -> None:
    """Add the commands of all recipes."""
    from recipes.digits.command import bench_digits
    from recipes.fold.command import bench_fold
    from recipes.load.command import load_prompts, load_summary, load_table
    from recipes.modelled.command import bench_model
    from recipes.pair.commands import drafter_prompts, policy_prompts, train_target
    from recipes.peers.command import bench_peers
    from recipes.reads.command import bench_reads
    from recipes.real.command import real_prompts, real_summary
    from recipes.rows.command import bench_rows
    from recipes.sources.command import sources_summary
    from recipes.sweep.command import sweep
    from recipes.tracing.command import bench_trace
    from recipes.trees.command import trees_summary
    from recipes.vllm.command import bench_vllm, vllm_replay, vllm_summary

    making = (train_target, drafter_prompts, policy_prompts, real_prompts, load_prompts)
    measuring = (bench_trace, bench_model, bench_reads, bench_rows, bench_fold, bench_peers, bench_digits)
    summaries = (real_summary, sources_summary, trees_summary, load_table, load_summary, vllm_replay, vllm_summary)
    for command in (*making, sweep, *summaries, *measuring, bench_vllm):
        app.command()(command)
