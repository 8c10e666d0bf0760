"""Models that the tests share, made once in a session, and plain decoding to compare with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typer.testing import CliRunner, Result

from bpkit.assets import shipped as shipped_folder
from bpkit.cli.main import build_app
from bpkit.decode.noise import GumbelNoise
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.registry.discovery import choose_plugins
from bpkit.testing import TinyPair, tiny_pair

# What runs inside vLLM has an environment of its own, which `make vllm` makes.
_vllm = find_spec("vllm")
collect_ignore = [] if _vllm and _vllm.origin else ["vllm"]

torch.set_num_threads(1)
# Each process of a parallel run has a core of its own: models of tests, and of programs that they start, would run on
# all cores otherwise and wait for each other.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker[2:]) % len(_cores)]})
# Tables are as wide as for a file, wherever the tests run: several processes inherit the terminal's width.
os.environ.pop("COLUMNS", None)

NEAR_TIE = 1e-4


class ShippedPair:
    """The pair that ships with bpkit, float32 on the CPU."""

    def __init__(self) -> None:
        folder = str(shipped_folder("target"))
        self.target: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.drafter = BlockDiffusionDrafter.load(str(shipped_folder("drafter")), self.target)


@dataclass(frozen=True)
class Plain:
    """What plain decoding gives: tokens, and the gap between the best two scores at each of them."""

    tokens: list[int]
    gaps: list[float]

    def near_tie_where_it_differs(self, tokens: Tensor) -> bool:
        """False if `tokens`, int64 [1, count], are the same; True if they part at a near tie. Anything else fails."""
        other = tokens[0].tolist()
        for i, (ours, theirs) in enumerate(zip(self.tokens, other, strict=False)):
            if ours != theirs:
                assert self.gaps[i] < NEAR_TIE, f"token {i} is {theirs}, plain decoding has {ours}, gap {self.gaps[i]}"
                return True
        assert len(other) == len(self.tokens), f"{len(other)} tokens, plain decoding has {len(self.tokens)}"
        return False


class PlainDecoding:
    """Plain decoding with noise, as slow and as independent of the runtime as can be: no cache, no blocks."""

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        prompt: Tensor,
        *,
        max_new_tokens: int,
        processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
        seed: int | None = None,
        stream_id: int = 0,
        ends: Sequence[int] = (),
        stop: Callable[[Tensor], bool] = lambda ids: False,
    ) -> Plain:
        ids, gaps = prompt, []
        for t in range(max_new_tokens):
            scores = model(ids, use_cache=False).logits[:, -1].float()
            scores = LogitsProcessorList(processors)(ids, scores)
            if seed is not None:
                noise = GumbelNoise(seed, stream_id, scores.shape[-1], scores.device)
                noise.forget_before(t)  # those before are not needed
                scores = scores + noise.at(t, 1)
            best = scores.topk(2)
            gaps.append(float(best.values[0, 0] - best.values[0, 1]))
            ids = torch.cat([ids, best.indices[:, :1]], dim=1)
            if int(ids[0, -1]) in ends or stop(ids):
                break
        return Plain(ids[0, prompt.shape[1] :].tolist(), gaps)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models are small, and a bench or a training that chose more threads would slow every test after it tenfold."""
    torch.set_num_threads(1)


@pytest.fixture
def recipe() -> Iterator[Callable[..., Result]]:
    """Run a command of `recipes` in this process, as `bpkit --plugin recipes` does."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(build_app(["--plugin", "recipes"]), list(map(str, arguments)), prog_name="bpkit")

    yield invoke
    choose_plugins(())


@pytest.fixture(scope="session")
def pair() -> TinyPair:
    return tiny_pair()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny pair's `target`, `drafter` and `assistant`."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pair(folder)
    return folder


@pytest.fixture(scope="session")
def shipped() -> ShippedPair:
    """The shipped pair. An installation without it fails the tests that need it."""
    return ShippedPair()


@pytest.fixture(scope="session")
def plain() -> PlainDecoding:
    return PlainDecoding()
