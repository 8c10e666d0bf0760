"""Cost files: JSON that is checked key by key, and written at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bpkit.files import write_json
from bpkit.trace.cost.figures import CostError
from bpkit.trace.cost.named import NamedCost
from bpkit.trace.cost.packed import PackedCost
from bpkit.trace.cost.presets import PRESETS
from bpkit.trace.cost.roofline import DeviceSpeed, DraftPass, Experts, ModelPass, Roofline
from bpkit.trace.cost.table import CostTable

EXAMPLE = '{"verify": {"1": 1.0, "2": 1.1, "4": 1.3}}'


def read_cost(path_or_preset: str | Path) -> NamedCost:
    """Read a cost file, or make a preset by its name; or several with `+` between them, each of a source of drafts.

    A file is a table, with `"kind": "roofline"` a `Roofline`, or with `"kind": "packed"` a `PackedCost`.

    Raises:
        CostError: the file is no cost model; the message names file, key and what to write there.
        FileNotFoundError: there is neither such a file nor such a preset.
    """
    if str(path_or_preset) in PRESETS:
        return PRESETS[str(path_or_preset)]
    file = Path(path_or_preset)
    if "+" in str(file) and not file.is_file():
        first, *others = map(read_cost, str(file).split("+"))
        if any(type(other) is not type(first) for other in others):
            raise CostError(f"{file} joins tables with formulas: join tables alone, or `roofline` files alone")
        return first.with_sources(others)
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no cost file {str(path_or_preset)!r}, and no preset of that name; the presets are: "
            f"{', '.join(PRESETS)}; `bpkit calibrate --out {file.name}` measures one"
        )
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CostError(f"{file} is not valid JSON ({error}); a cost model looks like {EXAMPLE}") from None
    if not isinstance(stated, dict):
        raise CostError(f"{file} must hold an object such as {EXAMPLE}, not a {type(stated).__name__}")
    try:
        kind = _KINDS.get(stated.get("kind"), CostTable)
        return kind.model_validate({"name": file.stem, **stated})
    except ValidationError as error:
        raise CostError(f"{file}: {'; '.join(_fault(fault, kind) for fault in error.errors())}") from None


def write_cost(cost: NamedCost, path: str | Path) -> None:
    """Write a cost file at once: whoever reads it sees the old file or the whole new one."""
    write_json(Path(path), cost)


_KINDS: dict[Any, type[NamedCost]] = {"roofline": Roofline, "packed": PackedCost}
_PARTS: dict[str, type[BaseModel]] = {
    "device": DeviceSpeed,
    "target": ModelPass,
    "draft": DraftPass,
    "sources": DraftPass,
    "experts": Experts,
}
"""Of a roofline."""
_HOW_TO_MEND = {
    "missing": f"is missing: give the cost of target passes by verified positions, such as {EXAMPLE}",
    "too_short": f"is empty: give at least one figure, such as {EXAMPLE}",
    "greater_than": "must be above 0",
    "greater_than_equal": "must not be negative",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "dict_type": 'must hold figures by size, such as {"2": 0.1, "4": 0.2}',
    "less_than_equal": "must be 1 or less",
    "literal_error": "is another than this version of bpkit knows",
}


def _fault(fault: Any, kind: type[NamedCost]) -> str:
    """One fault of a cost file: key, what is wrong, what is there."""
    place = [str(part) for part in fault["loc"] if part not in ("one figure", "by context length")]
    value = "" if isinstance(fault["input"], (dict, list)) else f", not {fault['input']!r}"
    if place[-1] == "[key]":
        where, bound = ".".join(place[:-1]), fault.get("ctx", {}).get("ge")
        return f"{where}: keys must be whole numbers{'' if bound is None else f' from {bound}'}{value}"
    if fault["type"] == "missing":
        value = ""
    if fault["type"] == "extra_forbidden":
        parts = [_PARTS[name] for name in place[:-1] if name in _PARTS and kind is Roofline]
        keys = [kind, *parts][-1].model_fields
        return f"{'.'.join(place)} is not a key of a cost model; the keys are: {', '.join(keys)}"
    if fault["type"] == "missing" and kind is not CostTable:
        return f"{'.'.join(place)} is missing"
    said = _HOW_TO_MEND.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    return f"{'.'.join(place)} {said}{value}"
