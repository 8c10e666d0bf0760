"""Policies compared: by wall clock, by replay of a trace, and by the time that their decisions take."""
