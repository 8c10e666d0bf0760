"""Observers: told of every step, in order, and never in the way; a step log, and metrics that are really scraped."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bpkit_jsonl.observer import SCHEMA_VERSION, JsonLines
from bpkit_prometheus.observer import Prometheus
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from bpkit import SpeculativeDecoder
from bpkit.cli import main
from bpkit.config import settle
from bpkit.decode.guard import PolicyFault
from bpkit.decode.observers import (
    Ending,
    ObservedRequest,
    Observer,
    ObserverConfig,
    ObserverFaultWarning,
    resolve_observer,
)
from bpkit.installation.distribution import DISTRIBUTION
from bpkit.policy import Policy, PolicyError
from bpkit.testing import TinyPair
from bpkit.types import Context, Prefill, Record, Seconds, Step, Work

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "observers.md").read_text(encoding="utf-8")
WANTED = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3}


class Diary(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, Any, Any]] = []

    def begin(self, request: ObservedRequest) -> None:
        self.told.append(("begin", request, None))

    def record(self, request: ObservedRequest, record: Record) -> None:
        self.told.append(("record", request, record))

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        self.told.append(("end", request, ending))

    def close(self) -> None:
        self.told.append(("close", None, None))

    @property
    def events(self) -> list[str]:
        return [event for event, _, _ in self.told]

    @property
    def records(self) -> list[Record]:
        return [what for event, _, what in self.told if event == "record"]

    @property
    def endings(self) -> list[Ending]:
        return [what for event, _, what in self.told if event == "end"]


def decoder_of(pair: TinyPair, *observers: Any, policy: Any = "fixed:5", **options: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(
        pair.target, pair.agreeable(), policy, tokenizer=pair.tokenizer, observers=list(observers), **options
    )


# What is told.


def test_a_generation_is_told_from_begin_to_end_with_the_records_of_the_result(pair: TinyPair) -> None:
    diary = Diary()
    result = decoder_of(pair, diary).generate("x = ", **WANTED)
    assert diary.events == ["begin", *["record"] * (1 + len(result.steps)), "end"]
    assert diary.records[0] is result.prefill
    assert all(told is step for told, step in zip(diary.records[1:], result.steps, strict=True))
    (ending,) = diary.endings
    assert ending == Ending(
        complete=True,
        num_tokens=result.tokens.shape[1],
        num_steps=len(result.steps),
        seconds=result.seconds,
        fallbacks=0,
        near_ties=result.near_ties,
    )
    assert result.observer_faults == 0
    assert result.observer_seconds > 0


def test_the_request_says_what_is_decoded_and_how(pair: TinyPair) -> None:
    diary = Diary()
    decoder = decoder_of(pair, diary)
    decoder.generate("x = ", stream_id=7, **WANTED)
    decoder.with_policy({"name": "threshold", "threshold": 0.5}).generate("x", max_new_tokens=3, temperature=0.0)
    first, second = (request for event, request, _ in diary.told if event == "begin")
    assert (first.policy, first.policy_repr) == ("fixed:5", "Fixed(block_size=5)")
    assert (first.drafter, first.drafter_kind) == ("agreeable", "autoregressive")
    assert (first.prompt_length, first.max_new_tokens) == (4, 24)
    assert (first.temperature, first.seed, first.stream_id) == (1.0, 3, 7)
    assert (first.rule, first.clock, first.trained_block_size, first.max_block_size) == ("coupled", "WallClock", 8, 16)
    assert (second.policy, second.temperature, second.seed) == ("threshold:threshold=0.5", 0.0, None)
    assert second.number != first.number
    assert {request.number for _, request, _ in diary.told} == {first.number, second.number}


def test_every_way_of_decoding_is_observed(pair: TinyPair) -> None:
    diary = Diary()
    decoder = decoder_of(pair, diary)
    list(decoder.stream("x", max_new_tokens=5))
    decoder.run("x", max_new_tokens=5).finish()
    pair.target.generate(pair.ids("x"), custom_generate=decoder, max_new_tokens=5)
    pair.target.generate(pair.ids("x"), custom_generate=decoder, max_new_tokens=5, policy="fixed:3")
    decoder.with_policy(None, pair.agreeable(0.9)).generate("x", max_new_tokens=5)
    assert [ending.complete for ending in diary.endings] == [True] * 5
    assert [r.policy for event, r, _ in diary.told if event == "begin"] == ["fixed:5"] * 3 + ["fixed:3", "fixed:5"]


def test_generations_that_overlap_are_told_apart(pair: TinyPair) -> None:
    diary = Diary()
    decoder = decoder_of(pair, diary)
    runs = [decoder.run("x", max_new_tokens=9), decoder.run("y = 3", max_new_tokens=9)]
    for run in runs:
        next(run)
    results = [run.finish() for run in runs]
    numbers = [request.number for event, request, _ in diary.told if event == "begin"]
    for number, result in zip(numbers, results, strict=True):
        of_one = [what for event, request, what in diary.told if event == "record" and request.number == number]
        assert of_one == [result.prefill, *result.steps]


def test_text_and_decisions_are_those_of_an_unobserved_decoder(pair: TinyPair) -> None:
    plain = decoder_of(pair, policy="bandit").generate("x = ", **WANTED)
    observed = decoder_of(pair, Diary(), policy="bandit").generate("x = ", **WANTED)
    assert observed.text == plain.text
    assert observed.tokens.tolist() == plain.tokens.tolist()


def test_nobody_is_told_of_a_run_that_was_never_read(pair: TinyPair) -> None:
    diary = Diary()
    decoder_of(pair, diary).run("x", max_new_tokens=5).close()
    assert diary.told == []


# Time.


class Standing:
    """A clock that only observers advance."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        return measured


class Slow(Observer):
    """Takes a thousand seconds each time."""

    def __init__(self, clock: Standing) -> None:
        super().__init__()
        self.clock = clock

    def begin(self, request: ObservedRequest) -> None:
        self.clock.time += 1000

    def record(self, request: ObservedRequest, record: Record) -> None:
        self.clock.time += 1000


def test_the_time_of_observers_is_in_no_steps_seconds(pair: TinyPair) -> None:
    clock = Standing()
    result = decoder_of(pair, Slow(clock), clock=clock).generate("x = ", **WANTED)
    assert clock.time == 1000 * (2 + len(result.steps))
    assert result.seconds.total == 0.0


# Faults.


class Faulty(Observer):
    """Fails in one method."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.calls = {"begin": 0, "record": 0, "end": 0, "close": 0}
        self.method = method

    def _called(self, method: str) -> None:
        self.calls[method] += 1
        if method == self.method:
            raise OSError("the disk is full")

    def begin(self, request: ObservedRequest) -> None:
        self._called("begin")

    def record(self, request: ObservedRequest, record: Record) -> None:
        self._called("record")

    def end(self, request: ObservedRequest, ending: Ending) -> None:
        self._called("end")

    def close(self) -> None:
        self._called("close")


@pytest.mark.parametrize("method", ["begin", "record", "end"])
def test_an_observer_that_fails_is_warned_of_once_and_left_out(pair: TinyPair, method: str) -> None:
    expected = decoder_of(pair).generate("x = ", **WANTED).text
    faulty, diary = Faulty(method), Diary()
    decoder = decoder_of(pair, faulty, diary)
    with pytest.warns(ObserverFaultWarning, match=rf"Faulty\.{method}: OSError: the disk is full.*left out") as caught:
        results = [decoder.generate("x = ", **WANTED) for _ in range(2)]
    assert len(caught) == 1
    assert [(r.text, r.observer_faults) for r in results] == [(expected, 1)] * 2
    assert faulty.calls[method] == 1
    assert [ending.complete for ending in diary.endings] == [True, True]
    decoder.close()
    assert faulty.calls["close"] == 1, "it is closed all the same"


def test_an_interrupt_is_no_fault_of_an_observer(pair: TinyPair) -> None:
    class Impatient(Observer):
        def record(self, request: ObservedRequest, record: Record) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder_of(pair, Impatient()).generate("x", max_new_tokens=5)


def test_closing_closes_all_and_decoding_goes_on_unobserved(pair: TinyPair) -> None:
    faulty, diary = Faulty("close"), Diary()
    decoder = decoder_of(pair, faulty, diary)
    with pytest.warns(ObserverFaultWarning, match=r"Faulty\.close"):
        decoder.close()
    decoder.close()
    assert diary.events == ["close"]
    assert decoder.generate("x", max_new_tokens=3).tokens.shape[1] == 3
    assert diary.events == ["close"]


def test_observers_that_were_made_are_closed_if_a_later_one_is_refused(pair: TinyPair) -> None:
    diary = Diary()
    with pytest.raises(PolicyError, match="no observer 'jsonll'"):
        decoder_of(pair, diary, "jsonll:path=x")
    assert diary.events == ["close"]


# Generations that do not end.


def test_a_run_that_is_given_up_ends_for_observers_when_it_is_closed(pair: TinyPair) -> None:
    diary = Diary()
    run = decoder_of(pair, diary).run("x = ", **WANTED)
    read = [next(run) for _ in range(3)]
    assert diary.endings == []
    run.close()
    run.close()
    (ending,) = diary.endings
    tokens = sum(record.tokens.shape[1] for record in read)
    assert (ending.complete, ending.num_steps, ending.num_tokens) == (False, 2, tokens)
    with pytest.raises(ValueError, match="closed before its end"):
        run.finish()


def test_a_stream_that_is_not_read_to_its_end_ends_for_observers(pair: TinyPair) -> None:
    diary = Diary()
    stream: Any = decoder_of(pair, diary).stream("x = ", **{**WANTED, "max_new_tokens": 300})
    next(stream)
    stream.close()
    assert [ending.complete for ending in diary.endings] == [False]


def test_a_run_that_is_forgotten_ends_for_observers(pair: TinyPair) -> None:
    diary = Diary()
    for record in decoder_of(pair, diary).run("x = ", **WANTED):
        if isinstance(record, Step):
            break
    gc.collect()
    assert [ending.complete for ending in diary.endings] == [False]


def test_a_run_that_is_read_and_then_closed_ended_whole(pair: TinyPair) -> None:
    diary = Diary()
    with decoder_of(pair, diary).run("x", max_new_tokens=5) as run:
        result = run.finish()
    assert [ending.complete for ending in diary.endings] == [True]
    assert run.finish().tokens.tolist() == result.tokens.tolist()


class Raising(Policy):
    """Decides twice, then fails."""

    wants = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.decided = 0

    def select(self, state: dict[str, Any], context: Context) -> torch.Tensor:
        self.decided += 1
        if self.decided > 2:
            raise LookupError("no more")
        return context.full(4)

    def observe(self, state: dict[str, Any], step: Step) -> None:
        if self.decided > 2:
            raise LookupError("nothing learned")


def test_a_generation_that_fails_ends_incomplete(pair: TinyPair) -> None:
    diary = Diary()
    with pytest.raises(PolicyFault):
        decoder_of(pair, diary, policy=Raising(), strict=True).generate("x = ", **WANTED)
    (ending,) = diary.endings
    assert (ending.complete, ending.num_steps) == (False, 2)


@pytest.mark.filterwarnings("ignore::bpkit.decode.guard.PolicyFaultWarning")
def test_the_ending_counts_faults_that_are_in_no_step(pair: TinyPair) -> None:
    diary = Diary()
    result = decoder_of(pair, diary, policy=Raising()).generate("x = ", **WANTED)
    in_steps = sum(step.fallbacks for step in result.steps)
    assert diary.endings[0].fallbacks == result.fallbacks == in_steps + 1  # the last `observe` is in none


# Names and options.


def test_an_observer_is_made_from_a_name_a_mapping_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    for spec in (f"jsonl:{file}", f"jsonl:path={file},tokens=true", {"name": "jsonl", "path": file}):
        made = resolve_observer(spec)
        assert isinstance(made, JsonLines)
        assert made.config.path == file
        assert made.config.tokens == ("tokens" in str(spec))
        made.close()
    own = tmp_path / "own.py"
    own.write_text("from bpkit.decode.observers import Observer\n\nclass Own(Observer):\n    pass\n")
    made = resolve_observer(f"{own}:Own")
    assert repr(made) == "Own()"
    assert resolve_observer(made) is made


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("jsnol:path=x", r"no observer 'jsnol'. Did you mean 'jsonl'\? Known: jsonl, prometheus"),
        ("jsonl", r"observer 'jsonl': option 'path': Field required. Accepted options: path, tokens=False"),
        ("jsonl:path=x,token=1", r"observer 'jsonl': unknown option 'token'. Accepted options: path, tokens=False"),
        ({"path": "x"}, r"observer \{'path': 'x'\}: a mapping needs a key 'name'"),
        ("prometheus", r"say where to read it: port=9464, or textfile=bpkit.prom"),
        ("prometheus:port=high", r"option 'port': .*integer"),
        ("prometheus:textfile=bpkit.txt", r"'bpkit.txt' does not end in .prom"),
        ("./nowhere.py:Own", r"there is no file './nowhere.py' \(observer"),
    ],
)
def test_an_observer_that_cannot_be_made_says_why(spec: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        resolve_observer(spec)


def test_options_of_observers_are_frozen() -> None:
    class Options(ObserverConfig):
        path: str = "a"

    options = Options()
    with pytest.raises(ValueError, match="frozen"):
        options.path = "b"


def test_observers_and_their_plug_ins_import_no_torch() -> None:
    code = (
        "import sys, bpkit.decode.observers, bpkit_jsonl.observer, bpkit_prometheus.observer\n"
        "from bpkit.registry.discovery import registry\n"
        "for e in registry().observers.values(): e.load_config(); e.load()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'prometheus_client'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The step log.


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_log_says_what_the_result_says(pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    decoder = decoder_of(pair, f"jsonl:path={file},tokens=true", policy="threshold:0.2")
    result = decoder.generate("x = ", **WANTED)
    decoder.close()
    first, *steps, last = lines(file)
    assert [first["event"], *(s["event"] for s in steps), last["event"]] == ["prefill", *["step"] * len(steps), "end"]
    assert {(line["schema_version"], line["log"], line["request"]) for line in lines(file)} == {
        (SCHEMA_VERSION, first["log"], first["request"])
    }
    assert (first["policy"], first["prompt_length"], first["seed"]) == ("threshold:0.2", 4, 3)
    tokens = [*first["tokens"], *(token for step in steps for token in step["tokens"])]
    assert tokens == result.tokens[0].tolist()
    for number, (line, step) in enumerate(zip(steps, result.steps, strict=True)):
        names = ("block_size", "draft_length", "verify_length", "num_accepted", "acceptance_length")
        assert {name: line[name] for name in names} == {name: int(getattr(step, name)) for name in names}
        assert (line["step"], line["row"], line["position"]) == (number, 0, step.position)
        assert sum(line["seconds"].values()) == pytest.approx(step.seconds.total)
    assert (last["complete"], last["num_tokens"], last["num_steps"]) == (True, len(tokens), len(steps))


def test_without_being_asked_the_log_holds_no_tokens(pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    decoder_of(pair, f"jsonl:{file}").generate("x = ", **WANTED)
    assert not any("tokens" in line for line in lines(file))


def test_each_line_is_there_before_the_next_step(pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    for count, _ in enumerate(decoder_of(pair, f"jsonl:{file}").run("x = ", **WANTED), start=1):
        assert sum(line["event"] != "end" for line in lines(file)) == count


def test_a_log_is_appended_to_by_observers_that_can_be_told_apart(pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    decoders = [decoder_of(pair, f"jsonl:{file}") for _ in range(2)]
    runs = [decoder.run("x", max_new_tokens=40) for decoder in decoders]
    for run in (*runs, *runs):
        next(run)
    runs[0].finish()
    runs[1].close()
    endings = {line["log"]: line["complete"] for line in lines(file) if line["event"] == "end"}
    assert sorted(endings.values()) == [False, True]


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "steps.jsonl"):
        with pytest.raises(PolicyError, match=re.escape(f"cannot append to '{path}'")):
            resolve_observer({"name": "jsonl", "path": path})


def test_every_key_of_the_log_is_documented_and_no_other(pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    decoder_of(pair, f"jsonl:{file},tokens=true").generate("x = ", **WANTED)
    written: set[tuple[str, str]] = {(line["event"], key) for line in lines(file) for key in line}
    documented = set()
    section = DOCS.partition("## JSON lines")[2]
    for names, kinds in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([a-z, ]+) \|", section, re.MULTILINE):
        for name in re.findall(r"\w+", names):
            events = ("prefill", "step", "end") if kinds == "all" else kinds.split(", ")
            documented |= {(event, name) for event in events}
    assert documented == written


# Prometheus.


@pytest.fixture
def served() -> Iterator[Prometheus]:
    made = Prometheus(port=0)
    yield made
    made.close()


def scrape(port: int | None) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Samples by name and labels, as a Prometheus server would read them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return samples(answer.read().decode())


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_scraped_is_what_the_steps_say(pair: TinyPair, served: Prometheus) -> None:
    decoder = decoder_of(pair, served, policy="threshold:0.2")
    results = [decoder.generate("x = ", **WANTED), decoder.generate("y", max_new_tokens=17, temperature=0.0)]
    run = decoder.run("z", max_new_tokens=9)
    prefill = next(run)
    run.close()
    steps = [step for result in results for step in result.steps]
    found = scrape(served.port)

    def value(name: str, **labels: Any) -> float:
        given = {"policy": "threshold:0.2", "drafter": "agreeable", **{k: str(v) for k, v in labels.items()}}
        return found[f"bpkit_{name}", tuple(sorted(given.items()))]

    assert value("requests_total", outcome="complete") == 2
    assert value("requests_total", outcome="given_up") == 1
    assert value("prompt_tokens_total") == 4 + 1 + 1
    assert value("tokens_total") == 24 + 17 + prefill.tokens.numel()
    assert value("steps_total") == len(steps)
    lengths = {"drafted": "draft_length", "verified": "verify_length", "accepted": "num_accepted"}
    for what, name in lengths.items():
        of_steps = [int(getattr(step, name)) for step in steps]
        assert value(f"{what}_tokens_total") == sum(of_steps) > 0
        for position in range(1, max(of_steps) + 1):
            expected = sum(length >= position for length in of_steps)
            assert value(f"{what}_tokens_by_position_total", position=position) == expected
        beyond = {"policy": "threshold:0.2", "drafter": "agreeable", "position": str(max(of_steps) + 1)}
        assert (f"bpkit_{what}_tokens_by_position_total", tuple(sorted(beyond.items()))) not in found
    assert value("verified_tokens_total") < value("drafted_tokens_total")
    assert value("decision_seconds_count") == len(steps)
    assert value("decision_seconds_sum") == pytest.approx(sum(step.seconds.policy for step in steps))
    for phase in ("draft", "verify", "policy", "rest"):
        spent = sum(getattr(step.seconds, phase) for step in steps)
        assert value("step_seconds_sum", phase=phase) == pytest.approx(spent)
    prefills = [*(result.prefill for result in results), prefill]
    assert value("prefill_seconds_total") == pytest.approx(sum(record.seconds.total for record in prefills))
    assert value("near_ties_total") == sum(result.near_ties for result in results) + sum(prefill.near_ties)


def test_policies_of_one_decoder_have_series_of_their_own(pair: TinyPair, served: Prometheus) -> None:
    decoder = decoder_of(pair, served)
    decoder.generate("x", max_new_tokens=5)
    decoder.with_policy("fixed:3").generate("x", max_new_tokens=5)
    found = scrape(served.port)
    policies = {dict(labels)["policy"] for name, labels in found if name == "bpkit_steps_total"}
    assert policies == {"fixed:5", "fixed:3"}


@pytest.mark.filterwarnings("ignore::bpkit.decode.guard.PolicyFaultWarning")
def test_all_fallbacks_are_counted(pair: TinyPair, served: Prometheus) -> None:
    result = decoder_of(pair, served, policy=Raising()).generate("x = ", **WANTED)
    found = scrape(served.port)
    assert result.fallbacks > 2
    assert found["bpkit_fallbacks_total", (("drafter", "agreeable"), ("policy", "Raising"))] == result.fallbacks


def test_the_text_file_is_written_whole_at_the_start_and_after_each_generation(pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "bpkit.prom"
    decoder = decoder_of(pair, f"prometheus:textfile={file}")
    assert file.exists()
    labels = (("drafter", "agreeable"), ("policy", "fixed:5"))
    for count in (1, 2):
        result = decoder.generate("x = ", **WANTED)
        found = samples(file.read_text(encoding="utf-8"))
        assert found["bpkit_steps_total", labels] == count * len(result.steps)
    assert [path.name for path in tmp_path.iterdir()] == ["bpkit.prom"], "nothing half-written is left"


def test_a_text_file_or_port_that_cannot_be_had_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"cannot write textfile '.*nowhere/bpkit.prom'"):
        Prometheus(textfile=tmp_path / "nowhere" / "bpkit.prom")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PolicyError, match=rf"cannot listen at 127.0.0.1:{port} .*try another port"):
            Prometheus(port=port)


def test_a_closed_observer_serves_no_more() -> None:
    made = Prometheus(port=0)
    assert scrape(made.port) == {}
    made.close()
    made.close()
    with pytest.raises(OSError, match="refused"):
        scrape(made.port)


def test_one_record_of_many_rows_says_what_its_rows_say_one_by_one(tmp_path: Path) -> None:
    requests = [of_a_request(number, policy) for number, policy in ((1, "a"), (2, "b"), (3, "a"))]
    drafted, verified, stood = torch.tensor([5, 0, 7]), torch.tensor([4, 0, 7]), torch.tensor([2, 0, 7])
    tokens, ids = torch.arange(24).view(3, 8), (1, 2, 3)
    first = Prefill(tokens[:, :1], Seconds(rest=0.5), (0, 1, 0), ids, (False,) * 3)
    step = Step(drafted + 1, drafted, verified, stood, tokens, stood, Seconds(policy=0.1), 2, (1, 0, 1), ids)
    told = []
    for together in (True, False):
        file, registry = tmp_path / f"{together}.jsonl", CollectorRegistry()
        observers = [Prometheus(registry=registry), JsonLines(path=file, tokens=True)]
        for observer in observers:
            for request in requests:
                observer.begin(request)
            for record in (first, step):
                if together:
                    observer.record_rows(requests, record)
                else:
                    Observer.record_rows(observer, requests, record)
            for request in requests:
                observer.end(request, Ending(True, 9, 1, Seconds(), 2, 0))
            observer.close()
        log = [{k: v for k, v in line.items() if k not in ("log", "time")} for line in lines(file)]
        told.append((log, samples(generate_latest(registry).decode())))
    (log, found), (log_of_each, found_of_each) = told
    assert log == log_of_each
    assert [line["tokens"] for line in log[3:6]] == [[0, 1, 2], [8], list(range(16, 24))]
    once = {"fallbacks", "decision_seconds", "step_seconds", "prefill_seconds"}  # of a pass, not of each row
    differ = {
        name for name, labels in found if "_created" not in name and found[name, labels] != found_of_each[name, labels]
    }
    assert {re.sub("_(total|sum|count|bucket)$", "", name.removeprefix("bpkit_")) for name in differ} == once
    for_a = (("drafter", "drafter"), ("policy", "a"))
    assert found["bpkit_decision_seconds_count", for_a] == 1
    assert found["bpkit_fallbacks_total", for_a] == 2
    assert found["bpkit_steps_total", for_a] == 2


def of_a_request(number: int, policy: str) -> ObservedRequest:
    return ObservedRequest(
        number, policy, "", "target", "drafter", "n-gram", 8, 8, "rejection", "WallClock", 3, 9, 0.0, None, 0
    )


def test_shared_metrics_are_in_the_default_registry_and_observers_share_them(pair: TinyPair) -> None:
    labels, counted = {"policy": "fixed:7", "drafter": "agreeable"}, []
    for _ in range(2):
        decoder = decoder_of(pair, "prometheus:shared=true", policy="fixed:7")
        counted.append(len(decoder.generate("x = ", **WANTED).steps))
        assert REGISTRY.get_sample_value("bpkit_steps_total", labels) == sum(counted)
        decoder.close()


def test_shared_metrics_of_several_processes_are_added_up(tmp_path: Path) -> None:
    code = (
        "from bpkit.decode.observers import Ending, ObservedRequest, resolve_observer\n"
        "from bpkit.types import Seconds\n"
        "made = resolve_observer('prometheus:shared=true')\n"
        "one = ObservedRequest(1, 'a', '', 't', 'd', 'n-gram', 8, 8, 'rejection', 'WallClock', 3, 9, 0.0, None, 0)\n"
        "made.begin(one)\nmade.end(one, Ending(True, 9, 1, Seconds(), 0, 0))\n"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]
    labels = {"policy": "a", "drafter": "d"}
    assert registry.get_sample_value("bpkit_requests_total", {**labels, "outcome": "complete"}) == 2
    assert registry.get_sample_value("bpkit_prompt_tokens_total", labels) == 6


def test_metrics_go_into_a_registry_of_ones_own_once(pair: TinyPair) -> None:
    mine = CollectorRegistry()
    result = decoder_of(pair, Prometheus(registry=mine)).generate("x = ", **WANTED)
    labels = {"policy": "fixed:5", "drafter": "agreeable"}
    assert mine.get_sample_value("bpkit_steps_total", labels) == len(result.steps)
    with pytest.raises(ValueError, match="bpkit_requests"):
        Prometheus(registry=mine)


def test_without_prometheus_client_the_extra_is_named() -> None:
    code = (
        "import sys\nsys.modules['prometheus_client'] = None\n"
        "from bpkit.decode.observers import resolve_observer\n"
        "try: resolve_observer('prometheus:port=0')\nexcept ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'block-policy-kit[prometheus]'" in done.stdout


def test_every_metric_is_documented_with_its_labels_and_no_other(pair: TinyPair, served: Prometheus) -> None:
    decoder_of(pair, served).generate("x = ", **WANTED)
    exposed = {}
    for family in served.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"policy", "drafter", "le"}
        exposed[name] = (family.type, labels)
    section = DOCS.partition("## Prometheus")[2].partition("## JSON lines")[0]
    rows = re.findall(r"^\| `(bpkit_\w+)` \| (\w+) \|([^|]*)\|", section, re.MULTILINE)
    assert {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows} == exposed
    queried = set(re.findall(r"bpkit_\w+", "".join(re.findall(r"```promql\n(.*?)```", section, re.DOTALL))))
    assert queried <= {*exposed, "bpkit_decision_seconds_sum", "bpkit_step_seconds_sum"}


# The command line.


def command(tiny_folder: Path, *arguments: str) -> Any:
    models = ["--target", str(tiny_folder / "target"), "--drafter", str(tiny_folder / "drafter"), "--threads", "1"]
    return CliRunner().invoke(main.build_app(), [arguments[0], *models, *arguments[1:]], prog_name="bpkit")


def test_generate_observes_with_flags_and_by_config(tiny_folder: Path, tmp_path: Path) -> None:
    flags = [f"jsonl:path={tmp_path / 'a.jsonl'}", f"prometheus:textfile={tmp_path / 'a.prom'}"]
    result = command(
        tiny_folder, "generate", "x", "--max-new-tokens", "6", "--observe", flags[0], "--observe", flags[1]
    )
    assert result.exit_code == 0, result.stderr
    assert lines(tmp_path / "a.jsonl")[-1]["complete"] is True
    assert "bpkit_steps_total" in (tmp_path / "a.prom").read_text()
    config = tmp_path / "c.yaml"
    observer = {"name": "jsonl", "path": str(tmp_path / "b.jsonl")}
    config.write_text(yaml.safe_dump({"observers": [observer], "sampling": {"max_new_tokens": 6}}))
    assert command(tiny_folder, "generate", "x", "--config", str(config)).exit_code == 0
    assert lines(tmp_path / "b.jsonl")[-1]["num_tokens"] == 6
    assert settle(config, {"observers": flags}).observers == flags


def test_bench_observes_every_contestant(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "x = 1"}) + "\n")
    log = tmp_path / "bench.jsonl"
    result = command(
        tiny_folder, "bench", "--prompts", str(prompts), "--max-new-tokens", "6", "--policy", "fixed:3",
        "--policy", "fixed:4", "--observe", f"jsonl:{log}",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    policies = {line["policy"] for line in lines(log) if line["event"] == "prefill"}
    assert {"fixed:3", "fixed:4"} <= policies


def test_an_observer_that_will_not_do_is_told_before_any_model_is_read(tmp_path: Path) -> None:
    observe = f"jsonl:path={tmp_path}"
    arguments = ["generate", "x", "--target", "no/such-model", "--drafter", "ngram", "--observe", observe]
    result = CliRunner().invoke(main.build_app(), arguments, prog_name="bpkit")
    assert result.exit_code == 2
    assert f"cannot append to '{tmp_path}'" in result.stderr


def test_a_failing_observer_is_one_line_on_stderr(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from bpkit.decode.observers import Observer\n\nclass Own(Observer):\n"
        "    def record(self, request, record):\n        raise OSError('the disk is full')\n"
    )
    with warnings.catch_warnings():
        result = command(tiny_folder, "generate", "x", "--max-new-tokens", "6", "--observe", f"{file}:Own")
    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Warning: observer Own.record: OSError: the disk is full; Own is left out")


def test_observers_are_listed_with_their_options() -> None:
    listed = json.loads(CliRunner().invoke(main.build_app(), ["observers", "--json"]).stdout)
    assert {entry["name"] for entry in listed["observers"]} == {"jsonl", "prometheus"}
    (jsonl,) = (entry for entry in listed["observers"] if entry["name"] == "jsonl")
    assert jsonl["options"]["path"]["required"] is True
    assert (jsonl["plugin"], jsonl["distribution"]) == ("jsonl", DISTRIBUTION)
    for entry in listed["observers"]:
        assert all(option["description"] for option in entry["options"].values())


def test_the_first_record_is_that_of_the_prompt(pair: TinyPair) -> None:
    diary = Diary()
    decoder_of(pair, diary).generate("x", max_new_tokens=4)
    assert isinstance(diary.records[0], Prefill)
    assert all(isinstance(record, Step) for record in diary.records[1:])
