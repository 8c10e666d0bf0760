"""Policies by wall clock: interleaved runs of every decoder on every prompt."""
