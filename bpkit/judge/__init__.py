"""Honest comparison of policies by wall clock: interleaved runs, paired intervals, texts compared with plain decoding.

A bench: `prompts` -> `decoders` -> `measure` -> `figures` (measurements to groups) -> `report` (JSON, tables), `plot`.
"""
