"""Policies for many rows: each original's rule with worked numbers, and all of them in a decoder."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from bpkit_load.batch_table import BatchTable

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.policy import Policy, PolicyError
from bpkit.registry.discovery import build
from bpkit.registry.resolve import parse_spec, resolve_policy, written
from bpkit.testing import TinyPair
from bpkit.types import Context
from tests.records import bound, context, decoder

KINDS: dict[str, type[Policy]] = {"batch_table": BatchTable}


def running(rows: int, batch: int | None = None) -> Context:
    """A context beside which so many rows run."""
    now = context(rows if batch is None else batch)
    now.running = rows
    return now


# all ------------------------------------------------------------------------------------------------------------


def test_options_load_without_torch() -> None:
    modules = ", ".join(kind.__module__ for kind in KINDS.values())
    code = f"import {modules}, sys; assert not {{'torch', 'numpy'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_names_load_their_classes() -> None:
    policies = build([EntryPoint("load", "bpkit_load", "bpkit")]).policies
    assert {name: policies[name].load() for name in KINDS} == KINDS
    assert {name: policies[name].load_config() for name in KINDS} == {n: kind.Config for n, kind in KINDS.items()}


@pytest.mark.parametrize("spec", ["batch_table", "batch_table:1:5+2:3+3:1"])
@pytest.mark.parametrize("kind", ["block_diffusion", "autoregressive"])
def test_rows_run_without_faults(pair: TinyPair, spec: str, kind: str) -> None:
    prompts = [pair.ids(text) for text in ("def f(x):", "1, 2, 3, 1, 2,", "a b a b", "x = 1", "y")]
    policy = resolve_policy(spec)
    made, plain = (
        SpeculativeDecoder(pair.target, getattr(pair, kind)(), p, strict=True).generate(
            prompts, batch_size=3, max_new_tokens=16
        )
        for p in (policy, "fixed:1")
    )
    assert [each.tokens.tolist() for each in made] == [each.tokens.tolist() for each in plain]


# batch_table ----------------------------------------------------------------------------------------------------


def test_batch_table_looks_up_as_vllm_does() -> None:
    """Ranges (1-16: 3), (32-128: 2), (256-2048: 0) in drafted tokens; gaps have that of the range before."""
    policy = bound(BatchTable(table="1:4+32:3+256:1"))
    drafted = {
        rows: int(policy.select({}, running(rows, 1))) - 1 for rows in (1, 16, 17, 31, 32, 128, 129, 255, 256, 4096)
    }
    assert drafted == {1: 3, 16: 3, 17: 3, 31: 3, 32: 2, 128: 2, 129: 2, 255: 2, 256: 0, 4096: 0}


def test_batch_table_gives_all_rows_one_size_that_the_decoder_has() -> None:
    assert bound(BatchTable()).select({}, running(5)).tolist() == [4] * 5
    assert bound(BatchTable(), decoder(largest=6)).select({}, running(2)).tolist() == [6, 6]


def test_tables_are_read_as_text_and_mapping_and_written_as_text() -> None:
    for given in ("1:8+4:4+16:1", "16:1; 1:8; 4:4", {4: 4, 1: 8, 16: 1}, {"1": "8", "4": "4", "16": "1"}):
        table = BatchTable(table=given).config.table
        assert [*table.items()] == [(1, 8), (4, 4), (16, 1)]
    typed = written({"name": "batch_table", "table": {1: 8, 4: 4}})
    assert typed == "batch_table:table=1:8+4:4"
    assert resolve_policy(parse_spec(typed)).config.table == {1: 8, 4: 4}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("2:8", "begin at 1"),
        ("8", "1:8"),
        ("1:8+1:4", "twice"),
        ("1:0", "greater"),
        ("1:x", "integer"),
        ({}, "begin at 1"),
    ],
)
def test_a_wrong_table_is_refused(wrong: object, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        BatchTable(table=wrong)
