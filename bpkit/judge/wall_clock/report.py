"""The report of a bench: what its JSON holds, the tables on the terminal, what they say in words, and a picture.

    machine       cpu, cores, gpu, threads (by decoder), threads_tried (tokens/s by decoder and count), versions
    settings      models, policies as given, options, seed, order of prompts, seconds that the runs took
    overall       a group: all prompts
    domains       DOMAIN -> a group
    without_loops overall and domains again, without the prompts whose plain output ends in a loop; null if none is left
    measurements  every run: contestant, prompt, repeat, tokens, steps, seconds

A group:

    prompts, loops    how many prompts, and how many of them have a plain output that ends in a loop
    plain             source (the faster way of plain decoding overall), tokens_per_second(_interval), ...; others: the
                      other way
    policies          NAME -> an entry: tokens_per_second, speedup (over plain), acceptance_length (tokens of steps /
                      steps), acceptance_length_per_prompt (mean of the prompts' own), identical_text (to plain's, on
                      all prompts and repeats), different_prompts, share of time, fallbacks, near_ties, and the sums
                      tokens, seconds and steps; of several sources of drafts `sources`, shares of steps and of the
                      tokens that these yield, by the source that drafted
    against           NAME -> an entry; identical_text is null when sampling, where other decoders draw other noise
    best_fixed        the fastest `fixed:*`, or null

Rates are ratios of sums. `*_interval` is [low, high]: 95%, paired bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bpkit.judge.sources import told
from bpkit.judge.tables import Table, TableRow, bracketed, print_sentences

PHASES = {"target": "#4477aa", "drafter": "#ee6677", "policy": "#ccbb44", "other": "#bbbbbb"}
"""Where time goes, target passes, drafting, the policy's decisions and everything else, and its colours."""
HEAD = (
    "decoding",
    "tokens/s",
    "speed-up",
    "acceptance\nlength",
    "same\ntext",
    "time %: target/\ndrafter/policy/other",
    "fall-\nbacks",
)
COLOURS = tuple(f"C{i}" for i in range(10) if i != 7)  # C7 is grey, as plain decoding is


def entries(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Policies and peers of a group, by name."""
    return {**group["policies"], **group["against"]}


def groups(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups of a report by title: `overall` first, then the domains if there are several."""
    domains = report["domains"] if len(report["domains"]) > 1 else {}
    return {"overall": report["overall"], **domains}


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print all groups, those without loops where they differ, and the sentences about them."""
    for title, group in groups(report).items():
        console.print(group_table(title, group))
    rest = report["without_loops"]["overall"]
    if rest is not None and report["overall"]["loops"]:
        console.print(group_table("overall, without the prompts whose plain output loops", rest))
    print_sentences(what_was_measured(report), console)


def group_table(title: str, group: dict[str, Any]) -> Table:
    """One group as a table."""
    count, looping, plain = group["prompts"], group["loops"], group["plain"]
    loops = f", of which {looping} loop{'s' * (looping == 1)}" if looping else ""
    best = max((entry["tokens_per_second"] for entry in group["policies"].values()), default=None)
    ways = []
    for entry in (plain, *plain["others"]):
        speedup = f"{entry['tokens_per_second'] / plain['tokens_per_second']:.2f}x"
        ways.append(_row(f"plain ({entry['source']})", entry, speedup, "1.00", "-"))
    others = []
    for name, entry in entries(group).items():
        ours, length = name in group["policies"], entry["acceptance_length"]
        speedup = f"{entry['speedup']:.2f}x {bracketed(entry['speedup_interval'], '.2f')}"
        fallbacks = str(entry["fallbacks"]) if ours else "-"
        style = "green" if ours and entry["tokens_per_second"] == best else None
        others.append(_row(name, entry, speedup, "-" if length is None else f"{length:.2f}", fallbacks, style))
    return Table(f"{title} ({count} {'prompt' if count == 1 else 'prompts'}{loops})", HEAD, [ways, others])


def _row(
    name: str, entry: dict[str, Any], speedup: str, length: str, fallbacks: str, style: str | None = None
) -> TableRow:
    rate = f"{entry['tokens_per_second']:.1f} {bracketed(entry['tokens_per_second_interval'], '.1f')}"
    same = {None: "-", True: "yes", False: "NO"}[entry["identical_text"]]
    share = entry["share"]
    time = "-" if share is None else "/".join(f"{100 * share[phase]:.0f}" for phase in PHASES)
    return TableRow((name, rate, speedup, length, same, time, fallbacks), style)


def what_was_measured(report: dict[str, Any]) -> list[str]:
    """Sentences that say what the figures are."""
    machine, settings, overall = report["machine"], report["settings"], report["overall"]
    options = dict(settings["options"])
    temperature, new_tokens = options.pop("temperature"), options.pop("max_new_tokens")
    mode = "greedy" if temperature == 0 else f"temperature {temperature}, rule {settings['rule']}"
    more = "".join(f", {name} {value}" for name, value in options.items())
    plain = overall["plain"]
    others = "".join(
        f", the faster way ({o['source']}: {o['tokens_per_second']:.1f} tokens/s)" for o in plain["others"]
    )
    threads = machine["threads"]
    counts = sorted(set(threads.values()))
    said = f"{counts[0]}" if len(counts) == 1 else ", ".join(f"{name} {n}" for name, n in threads.items())
    load = machine["load_average"]
    busy = f", load average {load:.1f} at the start" if load is not None else ""
    return [
        f"Wall clock of whole generate calls; prompts: {overall['prompts']}, interleaved runs of each: "
        f"{settings['repeats']}; at most {new_tokens} new tokens, {mode}{more}, {settings['dtype']}, "
        f"seed {settings['seed']}.",
        f"Plain decoding is {plain['source']}{others}. Speed-ups are ratios of sums; in brackets: "
        "95% paired bootstrap over prompts.",
        f"{overall['loops']} of {overall['prompts']} plain outputs end in a loop, which inflates acceptance; "
        "the JSON has all figures without them too.",
        f"Machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, threads: "
        f"{said}{busy}.",
        *_about_sampling(settings),
        *_about_texts(overall),
        *about_sources(overall["policies"]),
    ]


def _about_sampling(settings: dict[str, Any]) -> list[str]:
    if settings["options"]["temperature"] == 0:
        return []
    said = []
    if settings["rule"] != "coupled":
        said.append(f"Under rule {settings['rule']!r} the text depends on the policy: it cannot be the same.")
    if settings["against"]:
        said.append("Other decoders draw other noise when sampling: their texts are not compared.")
    return said


def _about_texts(group: dict[str, Any]) -> list[str]:
    plain = group["plain"]
    everyone = {e["source"]: e for e in (plain, *plain["others"])} | entries(group)
    ties = [f"{name} {entry['near_ties']}" for name, entry in everyone.items() if entry["near_ties"]]
    said = [f"Near ties, where another verify width might choose otherwise: {', '.join(ties)}."] if ties else []
    for name, entry in everyone.items():
        different = entry["different_prompts"]
        if different:
            after = sum(d["near_tie"] for d in different)
            said.append(
                f"{name}: the text differs on {len(different)} prompt(s), after a near tie on {after} of them "
                f"({', '.join(d['id'] for d in different[:5])}{', ...' if len(different) > 5 else ''})."
            )
    return said


def about_sources(policies: Mapping[str, dict[str, Any]]) -> list[str]:
    """Who drafted, where there are several sources: % of steps / % of the tokens that they yield."""
    said = [f"{name}: {told(entry['sources'])}" for name, entry in policies.items() if "sources" in entry]
    return [f"By source, % of steps / % of their tokens: {'; '.join(said)}."] if said else []


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Write a picture: speed by decoder and domain, and where the time goes. The suffix says the format."""
    from matplotlib.figure import Figure  # an optional dependency, and no pyplot: it would look for a display

    figure = Figure(figsize=(11, 8), layout="constrained")
    speed, share = figure.subplots(2, 1, height_ratios=(3, 2))
    _speeds(speed, report)
    _shares(share, report["overall"])
    settings, machine = report["settings"], report["machine"]
    figure.suptitle(
        f"{settings['target']} with {settings['drafter']} on {machine['gpu'] or machine['cpu']}, "
        f"{report['overall']['prompts']} prompts",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _bars(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"plain": group["plain"], **entries(group)}


def _speeds(axes: Any, report: dict[str, Any]) -> None:
    """Tokens per second, a cluster of bars for each group, with 95% intervals."""
    shown = groups(report)
    names = list(_bars(report["overall"]))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        bars = [_bars(group)[name] for group in shown.values()]
        rates = [bar["tokens_per_second"] for bar in bars]
        # A ratio of sums may lie outside its bootstrap interval when there are very few prompts.
        low = [max(r - b["tokens_per_second_interval"][0], 0) for r, b in zip(rates, bars, strict=True)]
        high = [max(b["tokens_per_second_interval"][1] - r, 0) for r, b in zip(rates, bars, strict=True)]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(shown))]
        colour = "#888888" if name == "plain" else COLOURS[(i - 1) % len(COLOURS)]
        axes.bar(places, rates, width * 0.92, yerr=[low, high], label=name, color=colour, error_kw={"lw": 1})
    axes.set_xticks(range(len(shown)), [f"{title}\n({group['prompts']} prompts)" for title, group in shown.items()])
    axes.set_ylabel("tokens/s (95% interval over prompts)")
    axes.legend(fontsize=8, ncols=min(len(names), 6), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _shares(axes: Any, group: dict[str, Any]) -> None:
    """Shares of the wall-clock time, a stacked bar for each decoder that tells them apart."""
    bars = {name: bar["share"] for name, bar in _bars(group).items() if bar["share"] is not None}
    left = [0.0] * len(bars)
    for phase, colour in PHASES.items():
        widths = [100 * share[phase] for share in bars.values()]
        axes.barh(list(bars), widths, left=left, label=phase, color=colour)
        left = [x + w for x, w in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of wall-clock time, overall (%)")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
