"""Policies by wall clock: interleaved runs of everybody on every prompt."""
