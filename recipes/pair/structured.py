"""A generator of structured text: JSON, tables, logs and configuration with random schemas.

Real structured output repeats its own shape, and that is what makes it predictable. So each document draws a
*schema* (field names, field types, constants) and then writes record after record in one *layout*. Every layout has
formats for training and others (separators, indents, timestamps, keywords) that are kept out of it, to see how models
do on formats that they do not know.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

Value = str | int | float | bool

FIELDS = (
    "id name city status price count email country total rating active created updated role level score team region "
    "code color size weight height width owner group kind category title author year month amount balance currency "
    "host port path method user session request duration bytes source target node cluster version branch build stage "
    "retries timeout priority queue worker shard offset limit page language latitude longitude altitude temperature "
    "humidity pressure speed distance product order customer quantity discount tax department manager salary phone"
).split()
_NAMES = (
    "Alice Bruno Chen Dana Elif Farid Greta Hugo Ines Jonas Kira Liam Mona Nils Olga Pavel Rosa Sven Tara Uma"
).split()
_CITIES = (
    "Berlin Lyon Porto Oslo Turin Ghent Riga Cork Bergen Malmo Graz Split Varna Lodz Brno Kyoto Lima Quito"
).split()
_STATES = (
    ("ok", "error", "pending"),
    ("active", "inactive"),
    ("open", "closed", "merged"),
    ("low", "medium", "high"),
    ("queued", "running", "done", "failed"),
    ("red", "green", "blue"),
    ("GET", "POST", "PUT"),
    ("INFO", "WARN", "ERROR"),
)
_START = datetime(2021, 1, 1)


@dataclass(frozen=True)
class Field:
    """One column: its name and how the value of record *i* follows from what came before."""

    name: str
    values: Callable[[int], Value]


def _field(rng: random.Random, name: str) -> Field:
    """Draw what a column holds. Most kinds are partly predictable: counters, constants, short cycles."""
    base, stride = rng.randint(0, 900), rng.choice([1, 1, 1, 2, 5, 10])
    states = rng.choice(_STATES)
    names, cities = rng.sample(_NAMES, 4), rng.sample(_CITIES, 3)
    constants: list[Value] = [rng.randint(1, 99), rng.choice(_CITIES), True, False, rng.choice(states)]
    constant = rng.choice(constants)
    favourite = rng.choice(states)
    kinds: tuple[Callable[[int], Value], ...] = (
        lambda i: base + stride * i,
        lambda i: constant,
        lambda i: constant,
        lambda i: states[i % len(states)],
        lambda i: favourite if rng.random() < 0.8 else rng.choice(states),
        lambda i: rng.choice(names),
        lambda i: rng.choice(cities),
        lambda i: rng.randint(1, 99),
        lambda i: round(rng.uniform(0, 100), 1),
        lambda i: rng.random() < 0.8,
        lambda i: f"{name[:3]}-{base + stride * i}",
    )
    return Field(name, rng.choice(kinds))


def _schema(rng: random.Random, names: tuple[str, ...] | list[str]) -> list[Field]:
    return [_field(rng, name) for name in rng.sample(list(names), rng.randint(3, 6))]


def _rows(fields: list[Field], count: int) -> Iterator[dict[str, Value]]:
    for i in range(count):
        yield {field.name: field.values(i) for field in fields}


def _times(rng: random.Random, pattern: str) -> Callable[[int], str]:
    start = _START + timedelta(minutes=rng.randint(0, 2_000_000))
    delta = timedelta(seconds=rng.choice([1, 5, 10, 30, 60]))
    return lambda i: (start + i * delta).strftime(pattern)


def _plain(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def json_lines(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """One JSON object a line, compact if held out."""
    marks = (",", ":") if held_out else (", ", ": ")
    return "\n".join(json.dumps(row, separators=marks) for row in _rows(_schema(rng, names), count))


def json_pretty(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """An indented JSON array of objects under one key."""
    rows = list(_rows(_schema(rng, names), max(3, count // 3)))
    return json.dumps({rng.choice(names) + "s": rows}, indent=4 if held_out else 2)


def csv_table(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """Separated values with a header."""
    fields, sep = _schema(rng, names), _option(rng, held_out, [",", ";", "\t"], ["|"])
    lines = [sep.join(_plain(v) for v in row.values()) for row in _rows(fields, count)]
    return "\n".join([sep.join(f.name for f in fields), *lines])


def markdown_table(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """A pipe table as Markdown writes it."""
    fields, rule = _schema(rng, names), ":--|" if held_out else "---|"
    head = ["| " + " | ".join(f.name for f in fields) + " |", "|" + rule * len(fields)]
    return "\n".join(head + ["| " + " | ".join(map(_plain, row.values())) + " |" for row in _rows(fields, count)])


def key_value_log(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """A timestamp, a level and key=value pairs on each line."""
    fields = _schema(rng, names)
    pattern = _option(rng, held_out, ["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S"], ["%d/%b/%Y:%H:%M:%S"])
    time = _times(rng, pattern)
    level = _option(rng, held_out, ["INFO", "level=info", "[info]"], ["level=warn"])
    return "\n".join(
        f"{time(i)} {level} " + " ".join(f"{k}={_plain(v)}" for k, v in row.items())
        for i, row in enumerate(_rows(fields, count))
    )


def access_log(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """A web server's access log in the common log format."""
    time, paths = _times(rng, "%d/%b/%Y:%H:%M:%S +0000"), [f"/{a}/{b}" for a, b in zip(names, names[3:], strict=False)]
    paths = rng.sample(paths, min(3, len(paths)))
    host = f"{'172.16' if held_out else '10.0'}.{rng.randint(0, 255)}."
    request = ("POST", "HTTP/2.0") if held_out else ("GET", "HTTP/1.1")
    return "\n".join(
        f'{host}{rng.randint(1, 9)} - - [{time(i)}] "{request[0]} {rng.choice(paths)} {request[1]}" '
        f"{rng.choice([200, 200, 200, 404])} {rng.randint(100, 999)}"
        for i in range(count)
    )


def yaml_list(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """A YAML list of mappings under one key."""
    fields, lines = _schema(rng, names), [rng.choice(names) + "s:"]
    indent = "    " if held_out else "  "
    for row in _rows(fields, max(3, count // 2)):
        for i, (k, v) in enumerate(row.items()):
            lines.append(f"{indent}{'- ' if i == 0 else '  '}{k}: {_plain(v)}")
    return "\n".join(lines)


def ini_sections(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """An INI file: numbered sections with the same keys."""
    fields, section = _schema(rng, names), rng.choice(names)
    equals = "=" if held_out else " = "
    return "\n\n".join(
        f"[{section}.{i + 1}]\n" + "\n".join(f"{k}{equals}{_plain(v)}" for k, v in row.items())
        for i, row in enumerate(_rows(fields, max(3, count // 2)))
    )


def sql_inserts(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """Statements that insert into one table."""
    fields, table = _schema(rng, names), rng.choice(names) + "s"
    columns, verb = ", ".join(f.name for f in fields), "REPLACE" if held_out else "INSERT"
    return "\n".join(
        f"{verb} INTO {table} ({columns}) VALUES ({', '.join(_sql(v) for v in row.values())});"
        for row in _rows(fields, max(3, count // 2))
    )


def _sql(value: Value) -> str:
    return f"'{value}'" if isinstance(value, str) else _plain(value).upper()


def xml_records(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """XML elements with one child element for each field."""
    fields, tag = _schema(rng, names), rng.choice(names)
    root, indent = ("list", "    ") if held_out else (f"{tag}s", "  ")
    lines = [f"<{root}>"]
    for row in _rows(fields, max(3, count // 3)):
        children = (f"{2 * indent}<{k}>{_plain(v)}</{k}>" for k, v in row.items())
        lines += [f"{indent}<{tag}>", *children, f"{indent}</{tag}>"]
    return "\n".join([*lines, f"</{root}>"])


def aligned_table(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """Columns padded with blanks, as command-line tools print them."""
    fields = _schema(rng, names)
    head = [f.name if held_out else f.name.upper() for f in fields]
    rows = [head] + [[_plain(v) for v in r.values()] for r in _rows(fields, count)]
    widths = [max(len(row[c]) for row in rows) + (4 if held_out else 2) for c in range(len(fields))]
    return "\n".join("".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def bracket_log(rng: random.Random, names: list[str], count: int, held_out: bool) -> str:
    """A log with a bracketed component and a sentence that repeats."""
    fields, time = _schema(rng, names), _times(rng, "%H:%M:%S")
    a, b = fields[0], fields[1]
    verb = _option(rng, held_out, ["started", "finished", "checked", "sent", "stored"], ["moved", "deleted"])
    heads = ((f"[{a.name}]", f"[{time(i)}]")[:: 1 if held_out else -1] for i in range(count))
    return "\n".join(
        f"{' '.join(head)} {verb} {b.name} {_plain(b.values(i))} for {a.name} {_plain(a.values(i))}"
        for i, head in enumerate(heads)
    )


def _option(rng: random.Random, held_out: bool, training: list[str], kept_out: list[str]) -> str:
    return rng.choice(kept_out if held_out else training)


LAYOUTS: tuple[Callable[[random.Random, list[str], int, bool], str], ...] = (
    json_lines,
    json_pretty,
    csv_table,
    markdown_table,
    key_value_log,
    access_log,
    yaml_list,
    ini_sections,
    sql_inserts,
    xml_records,
    aligned_table,
    bracket_log,
)
"""Each writes a document in one of the formats for training, or in a format that is kept out of training."""


def documents(count: int, *, seed: int, held_out: bool = False) -> Iterator[str]:
    """Yield `count` structured documents of 8 to 30 records (fewer where a record takes several lines).

    The same seed gives the same documents. `held_out=True` uses formats that never occur with `held_out=False`.
    """
    rng = random.Random(seed)
    for i in range(count):
        names = rng.sample(FIELDS, 14)
        yield LAYOUTS[i % len(LAYOUTS)](rng, names, rng.randint(8, 30), held_out)


PROMPT_SEED = 2026
"""No training run may use it: the shipped prompts come from it."""


def openings(count: int, *, held_out: bool) -> Iterator[str]:
    """Yield openings of documents that training never saw: complete lines, 240 characters or a little more.

    With `held_out=False` the formats are those of training and only the schemas are new; with `held_out=True` the
    formats are new too.
    """
    for text in documents(count, seed=PROMPT_SEED, held_out=held_out):
        end = text.find("\n", 240)
        yield text[: end + 1] if end != -1 else text + "\n"
