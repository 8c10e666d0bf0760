"""Honest comparison of policies by wall clock: interleaved runs, paired intervals, texts compared with plain decoding.

`prompts` -> `contestants` -> `measure` (rows) -> `statistics` (rows to groups) -> `report` (JSON), `table`, `plot`.
"""
