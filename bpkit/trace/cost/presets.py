"""Cost models made from published figures, by name. They are relative: the unit is a plain decoding step."""

from __future__ import annotations

from bpkit.trace.cost.table import CostTable

DFLASH_SPEEDUP, DFLASH_ACCEPTANCE_LENGTH, DFLASH_BLOCK_SIZE = 4.91, 6.54, 16

_DFLASH_STEP = DFLASH_ACCEPTANCE_LENGTH / DFLASH_SPEEDUP
"""Plain steps that a step at block size 16 takes: it yields 6.54 tokens and is 4.91 times as fast a token."""

PRESETS: dict[str, CostTable] = {
    table.name: table
    for table in (
        CostTable(
            name="dflash-h200-qwen3-4b",
            description=(
                "Derived: a step at block size 16 takes 6.54 / 4.91 = 1.33 plain steps (T=0; at T=1 the published "
                "5.69 / 4.24 = 1.34 agree). Assumed: a target pass costs the same at any width up to 16, so that "
                "all of the 0.33 is drafting, and a draft costs the same at any block size; neither was published. "
                "With nothing to save by a smaller block, the largest is the best fixed size."
            ),
            source=(
                "DFlash, arXiv 2602.06036: Qwen3-4B with its block-size-16 drafter on an H200, speed-up 4.91x at "
                "acceptance length 6.54 (T=0), 4.24x at 5.69 (T=1)"
            ),
            unit="plain steps",
            draft={DFLASH_BLOCK_SIZE: _DFLASH_STEP - 1},
            verify={1: 1.0, DFLASH_BLOCK_SIZE: 1.0},
        ),
    )
}
