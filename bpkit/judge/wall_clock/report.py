"""The report of a bench: what its JSON holds, the tables on the terminal, and what they say in words.

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
                      tokens, seconds and steps
    against           NAME -> an entry; identical_text is null when sampling, where other decoders draw other noise
    best_fixed        the fastest `fixed:*`, or null

Rates are ratios of sums. `*_interval` is [low, high]: 95%, paired bootstrap over prompts.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from bpkit.judge.tables import Row, Table, bracketed, print_sentences

PHASES = ("target", "drafter", "policy", "other")
"""Where time goes: target passes, drafting, the policy's decisions, everything else."""
HEAD = (
    "decoding",
    "tokens/s",
    "speed-up",
    "acceptance\nlength",
    "same\ntext",
    "time %: target/\ndrafter/policy/other",
    "fall-\nbacks",
)


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


def _row(name: str, entry: dict[str, Any], speedup: str, length: str, fallbacks: str, style: str | None = None) -> Row:
    rate = f"{entry['tokens_per_second']:.1f} {bracketed(entry['tokens_per_second_interval'], '.1f')}"
    same = {None: "-", True: "yes", False: "NO"}[entry["identical_text"]]
    share = entry["share"]
    time = "-" if share is None else "/".join(f"{100 * share[phase]:.0f}" for phase in PHASES)
    return Row((name, rate, speedup, length, same, time, fallbacks), style)


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
