"""A process that traces prompts one at a time with the bpkit that it finds, and says how long each took.

`recipes.tracing.earlier` starts it in another checkout. It uses only what earlier versions have: the first line that it
reads says what is traced with what, every further line is the number of a prompt.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer each line with one of JSON."""
    import torch

    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.prompts import Prompt
    from bpkit.trace.collect import GENERATE_WITH, TraceOptions, Tracer
    from bpkit.trace.collect.job import describe
    from bpkit.trace.store.storage import TraceWriter

    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    torch.set_num_threads(asked["threads"])
    decoder = SpeculativeDecoder.from_pretrained(
        asked["target"], asked["drafter"], f"fixed:{GENERATE_WITH}", dtype=asked["dtype"], device=asked["device"]
    )
    prompts = [Prompt(*prompt) for prompt in asked["prompts"]]
    sizes = tuple(asked["block_sizes"])
    options = TraceOptions(sizes, asked["max_new_tokens"], asked["sampling"], asked["seed"])
    tracer = Tracer(decoder, options)
    with tempfile.TemporaryDirectory() as folder:
        writer = TraceWriter(Path(folder) / "trace", describe(decoder, prompts, options))
        tracer.trace(0, prompts[0])  # first calls allocate: not counted
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            index = int(line)
            started = time.perf_counter()
            trace = tracer.trace(index, prompts[index])
            writer.write(trace)
            seconds = time.perf_counter() - started
            print(json.dumps({"seconds": seconds, "tokens": len(trace.output_tokens)}), flush=True)


if __name__ == "__main__":
    main()
