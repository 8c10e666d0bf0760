"""An exported policy in Python, with onnxruntime and numpy and without bpkit.

python policy.py exported/forecast
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported
import onnxruntime

Values = dict[str, NDArray[Any]]
DECIDES = {"begin": "block_size", "select": "block_size", "extend": "go_on", "truncate": "verify_length"}


class Policy:
    """The networks of a folder, by when they are asked: begin, select, extend, truncate."""

    def __init__(self, folder: Path) -> None:
        self.description = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        self.networks: dict[str, dict[str, Any]] = {}
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the networks are small: more threads only make them slower
        for file, network in self.description["networks"].items():
            data = (folder / file).read_bytes()
            if hashlib.sha256(data).hexdigest() != network["sha256"]:
                raise ValueError(f"{folder / file} is not the file that policy.json describes")
            self.networks[network["method"]] = network
            self.sessions[network["method"]] = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"]
            )

    def ask(self, method: str, given: Mapping[str, ArrayLike]) -> Values:
        """All outputs of a network by name; what it does not take is ignored."""
        network = self.networks[method]
        names = [tensor["name"] for tensor in network["outputs"]]
        inputs = {t["name"]: np.asarray(given[t["name"]], t["dtype"]) for t in network["inputs"]}
        return dict(zip(names, self.sessions[method].run(names, inputs), strict=True))

    def decide(self, method: str, given: Mapping[str, ArrayLike], state: Values) -> NDArray[Any] | None:
        """A decision for each row, and what to remember of the requests in `state`; None if a score is not finite.

        After None draft `default_block_size`, go on drafting, or verify the whole draft: the text is the same.
        """
        outputs = self.ask(method, {**given, **state})
        if not all(np.isfinite(value).all() for value in outputs.values()):
            return None
        kept = {name.removeprefix("next_"): value for name, value in outputs.items()}
        state.update({name: kept[name] for name in self.description["state"] if name in kept})
        return outputs[DECIDES[method]]

    def check(self) -> None:
        """Try the rows that came with the files: whoever gets other numbers has another runtime, or a broken one."""
        for method, network in self.networks.items():
            outputs = self.ask(method, network["golden"]["inputs"])
            for name, expected in network["golden"]["outputs"].items():
                tolerance = network["tolerance"] if outputs[name].dtype == np.float32 else 0
                np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=tolerance, err_msg=f"{method} {name}")


def cost_curves(block_sizes: list[int], draft: list[float], verify: list[float], rest: float, rows: int) -> Values:
    """The `_seconds` inputs of a device, here the same at every context length.

    Args:
        draft: seconds of drafting each block size above 1.
        verify: seconds of a target pass over 1, 2, ... positions, up to the largest block size.
        rest: seconds of everything else in a step.
    """
    sizes = [size for size in block_sizes if size > 1]
    steps = [verify[0] + rest, *(d + verify[size - 1] + rest for d, size in zip(draft, sizes, strict=True))]
    return {
        "step_seconds": np.tile(steps, (rows, 1)),
        "verify_seconds": np.tile(verify, (rows, 1)),
        "typical_step_seconds": np.array(steps),
    }


def main() -> None:
    """Check a policy, then decide for two devices; golden rows stand for what the models compute."""
    policy = Policy(Path(sys.argv[1]))
    policy.check()
    print(f"{policy.description['name']}: every golden row agrees")
    sizes = policy.description["block_sizes"]
    drafted, positions = [size for size in sizes if size > 1], range(1, max(sizes) + 1)
    for device, slope in (("wide passes are cheap", 0.0001), ("wide passes are dear", 0.004)):
        print(f"where {device}:")
        for method, network in policy.networks.items():
            rows = network["golden"]["inputs"]
            batch = len(next(iter(rows.values())))
            draft = [0.002 + 0.0001 * size for size in drafted]
            curves = cost_curves(sizes, draft, [0.02 + slope * width for width in positions], 0.001, batch)
            state: Values = {}  # one for each batch of requests, from begin to end
            decision = policy.decide(method, {**rows, **curves}, state)
            print(f"  {method}: {DECIDES[method]} {decision if decision is None else decision.tolist()}")


if __name__ == "__main__":
    main()
