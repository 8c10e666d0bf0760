"""Making traces: outputs once, and every draft that could have been made."""

from __future__ import annotations

from bpkit.trace.collect.tracer import GENERATE_WITH, PARTS, TraceOptions, Tracer, generation_options

__all__ = ["GENERATE_WITH", "PARTS", "TraceOptions", "Tracer", "generation_options"]
