"""A generator of structured text: JSON, tables, logs and configuration with random schemas.

Real structured output repeats its own shape, and that is what makes it predictable. So each document draws a
*schema* (field names, field types, constants) and then writes record after record in one *layout*. The layouts
and the field names are split in two: `TRAIN` ones make training text, `HELD_OUT` ones make prompts that no
training text resembles in template or vocabulary of fields.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

Value = str | int | float | bool

TRAIN_FIELDS = (
    "id name city status price count email country total rating active created updated role level score team region "
    "code color size weight height width owner group kind category title author year month amount balance currency "
    "host port path method user session request duration bytes source target node cluster version branch build stage "
    "retries timeout priority queue worker shard offset limit page language latitude longitude altitude temperature "
    "humidity pressure speed distance product order customer quantity discount tax department manager salary phone"
).split()
HELD_OUT_FIELDS = (
    "sensor voltage ticket assignee severity invoice vendor warehouse shelf container replica tenant bucket mirror "
    "driver vehicle mileage gate flight seat lane pump valve batch recipe grade pupil ward nurse canal lock ferry"
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


# --- layouts used for training ------------------------------------------------------------------------------


def json_lines(rng: random.Random, names: list[str], count: int) -> str:
    """One compact JSON object a line."""
    return "\n".join(json.dumps(row) for row in _rows(_schema(rng, names), count))


def json_pretty(rng: random.Random, names: list[str], count: int) -> str:
    """An indented JSON array of objects."""
    rows = list(_rows(_schema(rng, names), max(3, count // 3)))
    return json.dumps({rng.choice(names) + "s": rows}, indent=2)


def csv_table(rng: random.Random, names: list[str], count: int) -> str:
    """Comma, semicolon or tab separated values with a header."""
    fields, sep = _schema(rng, names), rng.choice([",", ";", "\t"])
    lines = [sep.join(_plain(v) for v in row.values()) for row in _rows(fields, count)]
    return "\n".join([sep.join(f.name for f in fields), *lines])


def markdown_table(rng: random.Random, names: list[str], count: int) -> str:
    """A pipe table as Markdown writes it."""
    fields = _schema(rng, names)
    head = ["| " + " | ".join(f.name for f in fields) + " |", "|" + "---|" * len(fields)]
    return "\n".join(head + ["| " + " | ".join(map(_plain, row.values())) + " |" for row in _rows(fields, count)])


def key_value_log(rng: random.Random, names: list[str], count: int) -> str:
    """A timestamp, a level and key=value pairs on each line."""
    fields, time = _schema(rng, names), _times(rng, rng.choice(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S"]))
    level = rng.choice(["INFO", "level=info", "[info]"])
    return "\n".join(
        f"{time(i)} {level} " + " ".join(f"{k}={_plain(v)}" for k, v in row.items())
        for i, row in enumerate(_rows(fields, count))
    )


def access_log(rng: random.Random, names: list[str], count: int) -> str:
    """A web server's access log in the common log format."""
    time, paths = _times(rng, "%d/%b/%Y:%H:%M:%S +0000"), [f"/{a}/{b}" for a, b in zip(names, names[3:], strict=False)]
    paths = rng.sample(paths, min(3, len(paths)))
    host = f"10.0.{rng.randint(0, 255)}."
    return "\n".join(
        f'{host}{rng.randint(1, 9)} - - [{time(i)}] "GET {rng.choice(paths)} HTTP/1.1" '
        f"{rng.choice([200, 200, 200, 404])} {rng.randint(100, 999)}"
        for i in range(count)
    )


def yaml_list(rng: random.Random, names: list[str], count: int) -> str:
    """A YAML list of mappings under one key."""
    fields, lines = _schema(rng, names), [rng.choice(names) + "s:"]
    for row in _rows(fields, max(3, count // 2)):
        for i, (k, v) in enumerate(row.items()):
            lines.append(f"  {'- ' if i == 0 else '  '}{k}: {_plain(v)}")
    return "\n".join(lines)


def ini_sections(rng: random.Random, names: list[str], count: int) -> str:
    """An INI file: numbered sections with the same keys."""
    fields, section = _schema(rng, names), rng.choice(names)
    return "\n\n".join(
        f"[{section}.{i + 1}]\n" + "\n".join(f"{k} = {_plain(v)}" for k, v in row.items())
        for i, row in enumerate(_rows(fields, max(3, count // 2)))
    )


def sql_inserts(rng: random.Random, names: list[str], count: int) -> str:
    """INSERT statements into one table."""
    fields, table = _schema(rng, names), rng.choice(names) + "s"
    columns = ", ".join(f.name for f in fields)
    return "\n".join(
        f"INSERT INTO {table} ({columns}) VALUES ({', '.join(_sql(v) for v in row.values())});"
        for row in _rows(fields, max(3, count // 2))
    )


def _sql(value: Value) -> str:
    return f"'{value}'" if isinstance(value, str) else _plain(value).upper()


def xml_records(rng: random.Random, names: list[str], count: int) -> str:
    """XML elements with one child element for each field."""
    fields, tag = _schema(rng, names), rng.choice(names)
    lines = [f"<{tag}s>"]
    for row in _rows(fields, max(3, count // 3)):
        lines += [f"  <{tag}>", *(f"    <{k}>{_plain(v)}</{k}>" for k, v in row.items()), f"  </{tag}>"]
    return "\n".join([*lines, f"</{tag}s>"])


def aligned_table(rng: random.Random, names: list[str], count: int) -> str:
    """Columns padded with blanks, as command-line tools print them."""
    fields = _schema(rng, names)
    rows = [[f.name.upper() for f in fields]] + [[_plain(v) for v in r.values()] for r in _rows(fields, count)]
    widths = [max(len(row[c]) for row in rows) + 2 for c in range(len(fields))]
    return "\n".join("".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def bracket_log(rng: random.Random, names: list[str], count: int) -> str:
    """A log with a bracketed component and a sentence that repeats."""
    fields, time = _schema(rng, names), _times(rng, "%H:%M:%S")
    a, b = fields[0], fields[1]
    verb = rng.choice(["started", "finished", "checked", "sent", "stored"])
    return "\n".join(
        f"[{time(i)}] [{a.name}] {verb} {b.name} {_plain(b.values(i))} for {a.name} {_plain(a.values(i))}"
        for i in range(count)
    )


# --- layouts kept out of training ---------------------------------------------------------------------------


def http_blocks(rng: random.Random, names: list[str], count: int) -> str:
    """Blocks of `Header-Name: value` lines parted by dashes."""
    fields = _schema(rng, names)
    blocks = ("\n".join(f"X-{k.title()}: {_plain(v)}" for k, v in row.items()) for row in _rows(fields, count))
    return "\n--\n".join(blocks)


def tuple_list(rng: random.Random, names: list[str], count: int) -> str:
    """A literal list of parenthesised tuples."""
    fields, var = _schema(rng, names), rng.choice(names)
    rows = ("    (" + ", ".join(repr(v) for v in row.values()) + ")," for row in _rows(fields, count))
    return f"{var}_rows = [\n" + "\n".join(rows) + "\n]"


def arrow_events(rng: random.Random, names: list[str], count: int) -> str:
    """Numbered events: `#12 a=1 -> b=2`."""
    fields = _schema(rng, names)
    start = rng.randint(1, 400)
    return "\n".join(
        f"#{start + i} " + " -> ".join(f"{k}:{_plain(v)}" for k, v in row.items())
        for i, row in enumerate(_rows(fields, count))
    )


def nested_json(rng: random.Random, names: list[str], count: int) -> str:
    """JSON objects that nest the record under a key of its own, one a line."""
    fields, outer, key = _schema(rng, names), rng.choice(names), rng.choice(names)
    start = rng.randint(1, 400)
    return "\n".join(
        json.dumps({outer: start + i, key: {"data": row}}, separators=(",", ":"))
        for i, row in enumerate(_rows(fields, count))
    )


def bulleted(rng: random.Random, names: list[str], count: int) -> str:
    """A report of bullet points with the same three parts."""
    fields, head = _schema(rng, names), rng.choice(names)
    return f"{head.title()} report\n" + "\n".join(
        "* " + "; ".join(f"{k} is {_plain(v)}" for k, v in row.items()) for row in _rows(fields, count)
    )


Layout = Callable[[random.Random, list[str], int], str]
TRAIN: tuple[Layout, ...] = (
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
HELD_OUT: tuple[Layout, ...] = (http_blocks, tuple_list, arrow_events, nested_json, bulleted)


def documents(count: int, *, seed: int, held_out: bool = False) -> Iterator[str]:
    """Yield `count` structured documents of 4 to 30 records, the same for the same seed.

    `held_out=True` uses layouts and field names that never occur with `held_out=False`.
    """
    rng = random.Random(seed)
    layouts, fields = (HELD_OUT, HELD_OUT_FIELDS) if held_out else (TRAIN, TRAIN_FIELDS)
    for i in range(count):
        names = rng.sample(fields, min(14, len(fields)))
        yield layouts[i % len(layouts)](rng, names, rng.randint(8, 30))


def held_out_prompts(count: int, *, seed: int = 2026) -> Iterator[str]:
    """Yield openings of held-out documents: complete lines, 240 characters or a little more."""
    for text in documents(count, seed=seed, held_out=True):
        end = text.find("\n", 240)
        yield text[: end + 1] if end != -1 else text + "\n"
