"""Plain decoding by vLLM, once for all tests, and engines that share this process one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.vllm.engine import Engine, token_prompts

PROMPTS = token_prompts(40)
"""Prompts 0 to 31 run together; those from 32 on alone or eight at a time, to save time."""
CONCURRENCY = {1: PROMPTS[32:36], 8: PROMPTS[24:40], 32: PROMPTS[:32]}


@pytest.fixture(scope="session")
def plain() -> dict[int, list[list[int]]]:
    """Texts of plain decoding, by concurrency."""
    with engine() as vllm:
        return {
            concurrency: vllm.run(prompts, concurrency=concurrency).texts
            for concurrency, prompts in CONCURRENCY.items()
        }


@contextmanager
def engine(*arguments: Any, **options: Any) -> Iterator[Engine]:
    """An engine that gives back what it holds, whatever happens."""
    made = Engine(*arguments, **options)
    try:
        yield made
    finally:
        made.close()
