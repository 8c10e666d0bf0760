"""vLLM's HTTP server with our scheduler in its engine's process: policies by request, and metrics of both."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bpkit_vllm.options import REQUEST_KEY

from tests.vllm.conftest import CONCURRENCY
from tests.vllm.engine import METHODS, TARGET

NAMED = (None, "fixed:6", "fixed:1", "goodput", "no_such_policy")


class Server:
    """A running server, on this machine alone."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        (folder / "metrics").mkdir()
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics")}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
        options = {"policy": "fixed:4", "observers": ["prometheus", f"jsonl:{folder / 'steps.jsonl'}"]}
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", TARGET, "--served-model-name", "shipped"]
        command += ["--host", "127.0.0.1", "--port", self.address.rpartition(":")[2], "--dtype", "float32"]
        command += [
            "--distributed-executor-backend",
            "uni",
            "--enforce-eager",
            "--max-model-len",
            "512",
            "--max-num-seqs",
            "32",
        ]
        command += ["--speculative-config", json.dumps(METHODS["dflash"])]
        command += ["--scheduler-cls", "bpkit_vllm.PolicyScheduler"]
        command += ["--additional-config", json.dumps({"bpkit": options})]
        self.said = folder / "server.log"
        with self.said.open("w") as log:
            self.process = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
        self.log = folder / "steps.jsonl"

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            if self.process.poll() is not None:
                pytest.fail(f"the server ended: {self.said.read_text()[-3000:]}")
            try:
                self.get("/health")
                return
            except urllib.error.URLError:
                time.sleep(0.2)
        pytest.fail(f"the server did not start: {self.said.read_text()[-3000:]}")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def complete(self, prompt: list[int], policy: str | None) -> list[int]:
        """Token ids of an answer."""
        asked: dict[str, Any] = {"model": "shipped", "prompt": prompt, "max_tokens": 32, "temperature": 0}
        asked |= {"ignore_eos": True, "return_token_ids": True}
        if policy is not None:
            asked["vllm_xargs"] = {REQUEST_KEY: policy}
        request = urllib.request.Request(
            self.address + "/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return tokens

    def metric(self, name: str) -> float:
        """The sum of a counter over its labels."""
        lines = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert lines, f"/metrics has no {name}"
        return sum(map(float, lines))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    try:
        made.wait()
        yield made
    finally:
        made.close()


def test_requests_over_http_name_their_policies(server: Server, plain: dict[int, list[list[int]]]) -> None:
    prompts = CONCURRENCY[8]
    policies = [NAMED[place % len(NAMED)] for place in range(len(prompts))]
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(server.complete, prompts, policies))
    assert found == plain[8]
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    served = [line["policy"] for line in lines if line["event"] == "prefill"]
    assert sorted(served) == sorted("fixed:4" if name in (None, "no_such_policy") else name for name in policies)
    steps = [line for line in lines if line["event"] == "step"]
    drafted, accepted = (sum(line[name] for line in steps) for name in ("verify_length", "num_accepted"))
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") == drafted > 0
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") == accepted > 0
    assert server.metric("bpkit_drafted_tokens_total") > 0
    assert server.said.read_text().count("there is no policy 'no_such_policy'") == 1
