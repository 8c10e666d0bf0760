"""The same policies inside vLLM, by the clock: closed loops and a load that changes, one pinned thread."""
