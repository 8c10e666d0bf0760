"""The report of a comparison with peers: what its JSON holds, the tables on the terminal, and what they say in words.

    command       as it was typed
    machine       cpu, cores, threads (by contestant), threads_tried (tokens/s by contestant and count)
    versions      process -> library -> version
    settings      target, contestants with what was set, max_new_tokens, prompts, seconds that all took
    headline      fastest_peer, fastest_policy, policy_over_peer: chosen on the prompts that they are compared on
    left_out      who could not take part, and what was said: the error's text, or what is missing
    overall       a group: all prompts
    domains       DOMAIN -> a group
    without_loops a group without the prompts whose plain output ends in a loop; null if there are none, or no others
    measurements  every run: contestant, prompt, tokens, seconds, steps, step_tokens

A group: `prompts`; `loops`, how many of them have a plain output that ends in a loop; and `contestants`, NAME -> an
entry: tokens_per_second, over_generate and over_plain (its rate over that of transformers' plain `generate` and of
bpkit's plain loop), acceptance_length (tokens of steps / steps; the pass over the prompt is none), equal_texts (to the
plain loop's) and different_prompts, loops (its own outputs), and the sums tokens, seconds and steps. Rates are ratios
of sums. `*_interval` is [low, high]: 95%, paired bootstrap over prompts.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from bpkit.judge.tables import Table, TableRow, bracketed, print_sentences
from recipes.peers.contestants import GENERATE, LOOP, is_own

HEAD = (
    "decoding",
    "tokens/s",
    f"over\n{GENERATE}",
    f"over\n{LOOP}",
    "acceptance\nlength",
    "same\ntext",
    "loops",
    "threads",
)


def print_peers(report: dict[str, Any], console: Console) -> None:
    """Print all groups and what is to be known about them."""
    threads, domains = report["machine"]["threads"], report["domains"]
    console.print(group_table("overall", report["overall"], threads))
    for title, group in domains.items() if len(domains) > 1 else ():
        console.print(group_table(title, group, threads))
    if report["without_loops"] is not None:
        console.print(group_table("without the prompts whose plain output loops", report["without_loops"], threads))
    print_sentences(sentences(report), console)


def group_table(title: str, group: dict[str, Any], threads: dict[str, int]) -> Table:
    """One group as a table: plain decoding, peers, policies, each from fast to slow; the fastest of all is green."""
    entries = group["contestants"]
    order = sorted(entries, key=lambda name: -entries[name]["tokens_per_second"])
    sections: list[list[TableRow]] = [[], [], []]
    for name in order:
        part = 0 if name in (GENERATE, LOOP) else 1 + is_own(name)
        sections[part].append(_row(name, entries[name], group["prompts"], threads[name], best=name == order[0]))
    count = f"{group['prompts']} prompt{'s' * (group['prompts'] != 1)}, plain outputs that loop: {group['loops']}"
    return Table(f"{title} ({count})", HEAD, sections)


def _row(name: str, entry: dict[str, Any], prompts: int, threads: int, *, best: bool) -> TableRow:
    over = [
        f"{entry[key]:.2f}x {bracketed(entry[f'{key}_interval'], '.2f')}" for key in ("over_generate", "over_plain")
    ]
    length = entry["acceptance_length"]
    cells = (
        name,
        f"{entry['tokens_per_second']:.1f} {bracketed(entry['tokens_per_second_interval'], '.1f')}",
        *over,
        "-" if length is None else f"{length:.2f}",
        f"{100 * entry['equal_texts'] / prompts:.0f}%",
        str(entry["loops"]),
        str(threads),
    )
    return TableRow(cells, "green" if best else None)


def sentences(report: dict[str, Any]) -> list[str]:
    """What the figures are."""
    machine, settings, overall = report["machine"], report["settings"], report["overall"]
    load = machine["load_average"]
    busy = f", load average {load:.1f} at the start" if load is not None else ""
    different = [
        f"{name}: the text differs on {len(entry['different_prompts'])} prompt(s), after a near tie on "
        f"{sum(one['near_tie'] for one in entry['different_prompts'])} of them."
        for name, entry in overall["contestants"].items()
        if entry["different_prompts"]
    ]
    return [
        *headline(report["headline"]),
        f"Wall clock of whole calls in processes of their own, in turn on each prompt ({overall['prompts']}); "
        f"greedy, float32, at most {settings['max_new_tokens']} new tokens. In brackets: 95% paired bootstrap "
        "over prompts.",
        f"{overall['loops']} of {overall['prompts']} plain outputs end in a loop, which inflates acceptance.",
        f"Machine: {machine['cpu']}, {machine['cores']} cores{busy}. Versions: {versions(report)}.",
        *different,
        *(f"Left out: {name}: {why}" for name, why in report["left_out"].items()),
    ]


def headline(found: dict[str, Any]) -> list[str]:
    """The fastest policy over the fastest peer, where there are both."""
    if "policy_over_peer" not in found:
        return []
    ratio = f"{found['policy_over_peer']:.2f}x {bracketed(found['policy_over_peer_interval'], '.2f')}"
    return [
        f"The fastest policy, {found['fastest_policy']}, has {ratio} the rate of the fastest peer, "
        f"{found['fastest_peer']}; both were chosen on these prompts."
    ]


def versions(report: dict[str, Any]) -> str:
    """Every version of every library that some process has."""
    found = {f"{library} {number}" for of in report["versions"].values() for library, number in of.items()}
    return ", ".join(sorted(found))
