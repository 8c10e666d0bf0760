"""Run networks in OpenVINO or tract: `run_cases.py RUNTIME < cases.json > outputs.json`. Needs numpy and the runtime.

A case is a file, inputs by name and the names of the outputs; a tensor is its dtype, its shape and its values, flat.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Run = Callable[[dict[str, Any], list[str]], list[Any]]


@cache
def openvino(file: str) -> Run:
    """On the CPU; without the hint it computes in bfloat16 where the processor can."""
    core = importlib.import_module("openvino").Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = core.compile_model(core.read_model(file), "CPU", options)

    def run(inputs: dict[str, Any], outputs: list[str]) -> list[Any]:
        found = model(inputs)
        return [found[name] for name in outputs]

    return run


@cache
def tract(file: str) -> Run:
    """Axes by name, as the file has them."""
    model = importlib.import_module("tract").onnx().load(file).into_model()
    takes = [model.input_name(i) for i in range(model.input_count())]
    facts = [str(model.output_fact(i)) for i in range(model.output_count())]
    runnable = model.into_runnable()

    def run(inputs: dict[str, Any], outputs: list[str]) -> list[Any]:
        # Outputs are in the order of the file; tract gives them names of its own.
        for name, fact in zip(outputs, facts, strict=True):
            if fact.lower().endswith("tdim"):
                raise TypeError(
                    f"{name} has tract's type for axes, as all that was cast to int64, and its Python package cannot "
                    "read that: count by torch.where(mask, 1, 0).sum(dim=1), without .long() and .to()"
                )
        return [value.to_numpy() for value in runnable.run([inputs[name] for name in takes])]

    return run


def main() -> None:
    """One answer for each case; what goes wrong is an answer too."""
    open_model = {"openvino": openvino, "tract": tract}[sys.argv[1]]
    answers: list[dict[str, Any]] = []
    for case in json.load(sys.stdin):
        inputs = {n: np.array(t["values"], t["dtype"]).reshape(t["shape"]) for n, t in case["inputs"].items()}
        try:
            found = map(np.asarray, open_model(case["file"])(inputs, case["outputs"]))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}".split("\n\n")[0]})
            continue
        answers.append(
            {
                name: {"dtype": str(value.dtype), "shape": value.shape, "values": value.ravel().tolist()}
                for name, value in zip(case["outputs"], found, strict=True)
            }
        )
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
