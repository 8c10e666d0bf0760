"""Honest comparison of policies by wall clock: interleaved runs, paired intervals, texts compared with plain decoding.

A bench: `decoders` -> `bench` (interleaved runs) -> `figures` (groups of them) -> `report` (JSON, tables, picture).
"""
