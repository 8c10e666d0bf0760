"""`jsonl`: every step as a line of JSON."""

from __future__ import annotations

from bpkit.registry.hookspecs import Register, hookimpl


@hookimpl
def bpkit_register_observers(register: Register) -> None:
    register(
        "jsonl",
        "bpkit_jsonl.observer:JsonLines",
        summary="A line of JSON for the prompt, each step and the end of every generation, appended to a file.",
        config="bpkit_jsonl.observer:JsonLinesConfig",
    )
