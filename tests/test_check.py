"""`check_policy`, its checks one by one, the pytest fixtures and `bpkit check`."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from bpkit import Policy, PolicyError
from bpkit.cli.main import build_app
from bpkit.decode.guard import GuardedPolicy
from bpkit.decode.verify import Coupled, Verdict
from bpkit.registry.discovery import registry
from bpkit.registry.policy_folder import shipped_folders
from bpkit.testing import PolicyCheckError, check_policy, policy_checks
from bpkit.testing.checks import checked_policy, setup
from bpkit.testing.checks import report as check_report
from bpkit.testing.checks.check import report_on
from bpkit.testing.checks.fresh_weights import FreshWeights
from bpkit.testing.checks.report import Findings
from bpkit.testing.checks.setup import AGREEABLE, ASSISTANT, COST, DFLASH
from bpkit.types import Draft

bad: Any = importlib.import_module("bad_policies")  # beside this file, which is no package
BAD_FILE = Path(bad.__file__)
NAMES = [check.name for check in policy_checks()]

WRONG: list[tuple[str, type[Policy], list[str]]] = [
    ("lossless", bad.Raises, ["Raises.select", "ArithmeticError: no idea", "drafter block-diffusion", "'x = 1'"]),
    ("lossless", bad.BindRaises, ["BindRaises.bind", "ArithmeticError: not bound"]),
    ("lossless", bad.NotANumber, ["NotANumber.select", "returned [nan]"]),
    ("lossless", bad.OneNumber, ["OneNumber.select", "shape [] for a batch of 1"]),
    ("lossless", bad.PlainInt, ["PlainInt.select", "returned an int (4), not int64"]),
    ("lossless", bad.TruthValues, ["TruthValues.truncate", "dtype torch.bool"]),
    ("lossless", bad.StateIsNone, ["StateIsNone.begin", "returned None, not a dict"]),
    ("sizes", bad.TooLarge, ["TooLarge.select", "returned [99]", "here 16", "trained block size 8"]),
    ("sizes", bad.Nothing, ["Nothing.select", "returned [0]"]),
    ("sizes", bad.Half, ["Half.select", "[2.5], which are not whole numbers"]),
    ("sizes", bad.MoreThanDrafted, ["MoreThanDrafted.truncate", "returned [4] where [3] tokens were drafted"]),
    ("sizes", bad.NoSuchSource, ["NoSuchSource.select", "[1] for sources, of which there are 1", "decoder.sources"]),
    ("sources", bad.CountsFromOne, ["CountsFromOne.select", "[2] for sources, of which there are 2, numbered from 0"]),
    ("sources", bad.PlanOfNumbers, ["PlanOfNumbers.select", "source of its Plan", "an int (1)"]),
    ("sources", bad.PlanOfOneRow, ["PlanOfOneRow.select", "source of its Plan", "shape [1, 1] for a batch of 1"]),
    ("sources", bad.TruthOfSources, ["TruthOfSources.select", "source of its Plan", "dtype torch.bool"]),
    ("features", bad.Undeclared, ["Undeclared.select", "'anchor_entropy', which `wants` does not name"]),
    ("features", bad.UndeclaredAndQuiet, ["UndeclaredAndQuiet.select", "'last_hidden'"]),
    ("features", bad.WrongPlace, ["WrongPlace.select", "prefill features to `begin`"]),
    ("features", bad.NeverReads, ["NeverReads", "no method ever read 'draft_entropy'"]),
    ("mutation", bad.WritesToDraft, ["WritesToDraft.truncate", "draft.draft_length", "was [3] and is [2]"]),
    ("mutation", bad.WritesToFeature, ["WritesToFeature.truncate", "draft['draft_probability']"]),
    ("mutation", bad.ReplacesFeature, ["ReplacesFeature.truncate", "draft['draft_probability']"]),
    ("mutation", bad.WritesToStep, ["WritesToStep.observe", "step.num_accepted", "was [0] and is [1]"]),
    ("mutation", bad.WritesToContextLater, ["WritesToContextLater.observe", "context.position (handed to `begin`)"]),
    ("determinism", bad.GlobalRandomness, ["GlobalRandomness", "answer 1 of select", "`context.generator`"]),
    ("rows", bad.MeanOfTheBatch, ["MeanOfTheBatch.select", "as alone", "'def f(a, b):' at temperature 1"]),
    ("rows", bad.MeanOverPadding, ["MeanOverPadding.truncate", "padding"]),
    (
        "rows",
        bad.CountsPadding,
        ["returned [3, 3, 3] where [1, 2, 3]", "use torch.minimum(answer, draft.draft_length)"],
    ),
    ("rows", bad.ListInState, ["ListInState.begin", "state['sizes'] is a list, not a tensor"]),
    ("rows", bad.BatchAxisMissing, ["BatchAxisMissing.begin", "state['size'] has shape [1] for 3 requests"]),
    ("rows", bad.OneRow, ["OneRow.select", "shape [1] for a batch of 3"]),
    (
        "rows",
        bad.OneNumberOnly,
        ["OneNumberOnly.select", "any number of requests at once", "it raised"],
    ),
    ("rows", bad.NumbersRequests, ["NumbersRequests.begin", "state['place'] = [0], as alone", "is [1]"]),
    ("rows", bad.StateMadeLate, ["StateMadeLate.select", "make every name of the state in `begin`"]),
    (
        "rows",
        bad.AveragesTheBatch,
        ["AveragesTheBatch.observe", "state['average'] = [", "as alone", "reduce over the last"],
    ),
    ("rows", bad.PredictsTogether, ["PredictsTogether.select", "that request 4, as alone", "it answered 5 for it"]),
    ("rows", bad.RandomTogether, ["RandomTogether.select", "standard errors away"]),
    ("rows", bad.JointByPlace, ["JointByPlace.select", "for the same requests in reverse", "[4, 3, 2]"]),
    (
        "overlap",
        bad.KeepsSizeOnSelf,
        ["drafter block-diffusion", "'def f(a, b):'", "answer 1 of select (step 1) is [8]", "was [3]", "self.size"],
    ),
    ("overlap", bad.PlansOnSelf, ["the answer of select", "IndexError", "the dict that `begin` returns", "self.plan"]),
    ("memory", bad.ForgetsToSave, ["ForgetsToSave", "state_dict() is empty", "answer 1 of select"]),
    ("memory", bad.SavesTensor, ["SavesTensor.state_dict", "Tensor is not JSON serializable"]),
    ("memory", bad.SavesHalf, ["SavesHalf", "state_dict lacks something"]),
    ("memory", bad.CannotLoad, ["CannotLoad.load_state_dict", "keeps no memory across requests"]),
    ("survival", bad.TrainedSizeOnly, ["TrainedSizeOnly.truncate", "drafts of 16 positions", "IndexError"]),
    ("survival", bad.DividesByDrafted, ["DividesByDrafted.observe", "no drafts", "ZeroDivisionError"]),
    ("survival", bad.NeedsAStep, ["NeedsAStep.end", "ends with its first token", "ZeroDivisionError"]),
    (
        "survival",
        bad.LongPromptsOnly,
        ["LongPromptsOnly.begin", "a prompt of one token", "ArithmeticError: too short"],
    ),
    ("device", bad.StaysOnTheHost, ["StaysOnTheHost", "simulated device (cuda:0)", "same device", "in `bind`"]),
    ("export", bad.DecidesOtherwise, ["DecidesOtherwise", "decides otherwise than the policy", "onnxruntime"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("check", "policy", "essentials"), WRONG, ids=[kind.__name__ for _, kind, _ in WRONG])
def test_a_fault_fails_its_own_check_and_no_other(
    check: str, policy: type[Policy], essentials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_policy, "USUAL", (DFLASH,))  # the one that drafts fastest; all are met below
    report = report_on(policy)
    assert [result.name for result in report.failed] == [check], str(report)
    text = str(report)
    for essential in essentials:
        assert essential in text
    with pytest.raises(PolicyCheckError) as raised:
        report.raise_for_failures()
    assert str(raised.value) == text


def test_every_check_has_a_policy_that_fails_it() -> None:
    informative = {"timing"}
    assert {check for check, _, _ in WRONG} == set(NAMES) - informative


def test_other_tokens_than_those_of_plain_decoding_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Coupled.verify

    def trusting(self: Coupled, logits: Tensor, draft: Draft, width: Sequence[int]) -> Verdict:
        verdict = original(self, logits, draft, width)
        if len(width) > 1 or width[0] < 2:
            return verdict
        tokens = torch.cat([draft.tokens[:, :1], verdict.tokens[:, :1]], dim=1)
        return Verdict(tokens, torch.tensor([1]), torch.zeros_like(tokens, dtype=torch.bool))

    monkeypatch.setattr(Coupled, "verify", trusting)
    result = report_on("fixed:4", skip=set(NAMES) - {"lossless"})["lossless"]
    assert result.state == "failed"
    assert "tokens of plain decoding (`fixed:1`)" in str(result)


def rows_of(policy: Any) -> check_report.Result:
    return report_on(policy, skip=set(NAMES) - {"rows"})["rows"]


def test_other_tokens_beside_others_than_alone_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Coupled.verify

    def swapping(self: Coupled, logits: Tensor, draft: Draft, width: Sequence[int]) -> Verdict:
        verdict = original(self, logits, draft, width)
        return verdict if len(width) == 1 else verdict._replace(tokens=verdict.tokens.flip(0))

    monkeypatch.setattr(Coupled, "verify", swapping)
    monkeypatch.setattr(checked_policy, "USUAL", (DFLASH,))
    result = rows_of("fixed:4")
    assert result.state == "failed"
    assert "at most 5 new tokens, beside others in a batch" in str(result)
    assert "tokens of plain decoding (`fixed:1`)" in str(result)


def test_state_that_does_not_move_with_its_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_policy, "USUAL", (DFLASH,))
    assert rows_of(bad.SizeInState).state == "passed"
    original = GuardedPolicy.keep
    monkeypatch.setattr(GuardedPolicy, "keep", lambda self, rows: original(self, sorted(rows)))
    result = rows_of(bad.SizeInState)
    assert result.state == "failed"
    assert "called SizeInState.select for a batch" in str(result)


def test_requests_join_and_leave_and_their_order_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noting(bad.SizeInState):
        batches: ClassVar[list[tuple[int, ...]]] = []

        def select(self, state: Any, context: Any) -> Any:
            if context.batch_size == context.running > 1:
                self.batches.append(context.row_ids)
            return super().select(state, context)

    monkeypatch.setattr(checked_policy, "USUAL", (DFLASH,))
    assert rows_of(Noting).state == "passed"
    batches = [tuple(row - min(Noting.batches[0]) for row in rows) for rows in dict.fromkeys(Noting.batches)]
    assert {row for rows in batches for row in rows} == {0, 1, 2, 3, 4}
    assert any(list(rows) != sorted(rows) for rows in batches)


def test_an_early_end_of_another_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_policy, "USUAL", (ASSISTANT,))
    result = rows_of(bad.ExtendsByTheFirst)
    assert result.state == "failed"
    assert "called ExtendsByTheFirst.extend for a batch" in str(result)


def test_one_that_cannot_be_copied_is_asked_itself() -> None:
    class Locked(bad.Four):
        def bind(self, decoder: Any, cost: Any = None) -> None:
            self.lock = threading.Lock()

    result = rows_of(Locked)
    assert result.state == "passed"
    assert "Locked cannot be copied (TypeError" in result.notes[0]


BUILT_IN = sorted(set(registry().policies) - {"onnx"})


def drafters_for(name: str) -> tuple[str, ...]:
    """One of the usual drafters for each policy, by turns; two for those that end drafts in the midst.

    Those with trained weights are for block diffusion.
    """
    if getattr(registry().policies[name].load(), "extend", Policy.extend) is not Policy.extend:
        return (DFLASH, AGREEABLE)
    return (DFLASH,) if shipped_folders(name) else (setup.USUAL[BUILT_IN.index(name) % len(setup.USUAL)],)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_policies_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every drafter, each gives the text of plain decoding: tests/test_lossless.py."""
    monkeypatch.setattr(checked_policy, "USUAL", drafters_for(name))
    report = check_policy(name)
    exportable = report["export"].state == "passed"
    assert exportable == hasattr(registry().policies[name].load(), "export")
    remembers = report["overlap"].state == "skipped"
    assert remembers == ("no memory" not in report["memory"].said)
    assert not remembers or "memory across requests" in report["overlap"].said
    assert all(result.state == "passed" for result in report.results if result.name not in ("export", "overlap"))


def test_one_that_chooses_among_sources_is_checked_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_policy, "USUAL", (DFLASH,))
    report = check_policy(bad.Alternates, skip=["survival", "memory", "export"])
    assert re.search(r"0 no draft|[1-9]\d* no draft, [1-9]\d* from the model, [1-9]", report["sources"].said)
    needs = check_policy("fixed:4,source=1", skip=["survival"])
    assert needs.drafters == (setup.SOURCES,)
    assert "this decoder has one source" in dict(needs.left_out)[DFLASH]
    assert needs["export"].state == "skipped"


@pytest.mark.slow
def test_an_exported_policy_passes(tmp_path: Path) -> None:
    from bpkit.export.write import export_policy
    from bpkit.learn.trained import TrainedPolicy
    from bpkit.registry.resolve import resolve_policy

    named = resolve_policy("ldlp")
    assert isinstance(named, TrainedPolicy)
    fresh = FreshWeights(named).policy(DFLASH)
    spec = setup.decoder(DFLASH, "fixed").spec
    traces = setup.traces(DFLASH, frozenset(fresh.wants))
    export_policy(fresh, traces, spec, tmp_path / "out", name="tiny", summary="Tiny.", cost=COST)
    report = check_policy(f"onnx:{tmp_path / 'out'}")
    assert report.drafters == (DFLASH,)
    assert "made for another decoder" in dict(report.left_out)[AGREEABLE]


@pytest.mark.slow
def test_a_learned_policy_in_a_file_passes() -> None:
    report = check_policy(f"{BAD_FILE}:Learned", skip=["survival", "memory", "determinism"])
    assert report["features"].said == "declared and read: anchor_entropy, last_hidden"
    assert report["export"].state == "passed"


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpkit.testing.checks.repeated.NEEDED", ("onnx_of_another_name",))
    result = check_policy("ldlp", skip=set(NAMES) - {"export"})["export"]
    assert (result.state, result.said) == (
        "skipped",
        "onnx_of_another_name not installed: pip install 'block-policy-kit[export]'",
    )
    monkeypatch.setitem(sys.modules, "bpkit.learn.training.policy_module", None)
    with pytest.raises(PolicyError, match=r"its trainer, which needs .*: pip install 'block-policy-kit\[train\]'$"):
        check_policy("ldlp")


def test_one_that_is_for_other_models_says_how_to_check_it() -> None:
    with pytest.raises(PolicyError, match=r"trained block size 16 there, 8 here.*--shipped"):
        check_policy("onnx:forecast")


def test_a_policy_may_be_given_in_any_form(tmp_path: Path) -> None:
    skip = set(NAMES) - {"sizes"}
    for given in (
        "fixed:3",
        {"name": "fixed", "block_size": 3},
        registry().policies["fixed"].load()(block_size=3),
        f"{BAD_FILE}:Four",
        bad.Four,
    ):
        report = check_policy(given, skip=skip)
        assert report["sizes"].said == ("block sizes 3" if "Four" not in report.policy else "block sizes 4")
    with pytest.raises(PolicyError, match="there is no policy 'fixt'"):
        check_policy("fixt")
    with pytest.raises(ValueError, match="no check 'speed' to skip; the checks are: lossless, "):
        check_policy(bad.Four, skip=["speed"])


def test_an_instance_is_left_alone() -> None:
    policy = bad.SavesHalf()
    with pytest.raises(PolicyCheckError):
        check_policy(policy, skip=set(NAMES) - {"memory"})
    assert policy.requests == 0


def test_checks_can_be_called_one_by_one() -> None:
    checks = {check.name: check for check in policy_checks()}
    assert checks["sizes"](bad.TooLarge.__base__ or bad.Four).state == "passed"
    with pytest.raises(PolicyCheckError, match=r"returned \[99\]"):
        checks["sizes"](bad.TooLarge)
    assert checks["export"](bad.Four).state == "skipped"


def test_global_generators_are_left_as_they_were() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_policy("bandit", skip=set(NAMES) - {"sizes"})
    assert torch.equal(before, torch.get_rng_state())


def test_a_cache_on_self_is_no_fault() -> None:
    result = report_on(bad.CachesOnSelf, skip=set(NAMES) - {"overlap"})["overlap"]
    assert (result.state, result.notes) == ("passed", ())
    assert int(result.said.split()[0]) > 10


def test_a_request_on_self_is_found_with_every_drafter_there() -> None:
    result = report_on(bad.KeepsSizeOnSelf, skip=set(NAMES) - {"overlap"})["overlap"]
    [failure] = result.failures
    assert "drafter agreeable" in failure.did
    assert "self.size" in failure.got
    assert report_on(bad.SavesHalf, skip=set(NAMES) - {"overlap"})["overlap"].state == "skipped"


def test_one_mistake_is_told_once() -> None:
    told = report_on(bad.WritesToFeature, skip=set(NAMES) - {"mutation"})["mutation"]
    assert len(told.failures) == 1
    assert "drafter block-diffusion" in told.failures[0].did
    assert re.fullmatch(r"the same with drafters autoregressive, agreeable, and \d+ times more", told.failures[0].also)
    assert f"also:            {told.failures[0].also}" in str(told)
    assert not told.notes
    [raised] = report_on(bad.Raises, skip=set(NAMES) - {"lossless"})["lossless"].failures
    assert raised.also == "the same with drafters autoregressive, agreeable"


def test_different_mistakes_are_told_apart() -> None:
    found = Findings()
    for number in range(3):
        found.fail("asked", "an answer", f"none [{number}, 2.5]")
    found.fail("asked", "an answer", "it raised ValueError", drafter="one")
    found.fail("asked", "an answer", "it raised ValueError", drafter="one")
    assert [(made.got, made.also) for made in found.failures] == [
        ("none [0, 2.5]", "the same 2 times more"),
        ("it raised ValueError", "the same once more"),
    ]


def test_a_network_at_fault_is_told_once_and_drafters_are_not_blamed() -> None:
    with pytest.raises(PolicyError) as raised:
        check_policy(f"{BAD_FILE}:NetworkTooWide")
    assert str(raised.value).startswith("policy NetworkTooWide cannot be checked, because no weights for the tiny pair")
    assert str(raised.value).count("cannot take float32") == 1
    assert "drafter" not in str(raised.value)


def test_times_are_measured_and_slow_decisions_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sleeps(bad.Four):
        def select(self, state: Any, context: Any) -> Any:
            import time

            time.sleep(0.002)
            return context.full(8)

    timing = {check.name: check for check in policy_checks()}["timing"]
    result = timing(Sleeps)
    shown = float(result.said.split("select ")[1].split(" ms")[0])
    assert shown >= 2
    assert "a step of the tiny pair takes" in result.said
    for step, slow in ((1e-3, True), (1e3, False)):
        monkeypatch.setattr(setup, "step_seconds", lambda drafter, step=step: step)
        result = timing(Sleeps)
        assert result.state == "passed"
        assert any("a call of `select` takes longer than a whole step" in note for note in result.notes) == slow


# Where and how it runs


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_neither_pytest_is_needed_nor_torch_loaded_by_listing(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["pytest"] = None
from bpkit.testing import policy_checks, PolicyCheckError
assert len(policy_checks()) == {len(NAMES)}
import bpkit.cli.check
assert "torch" not in sys.modules
from bpkit.testing import check_policy
print(check_policy("fixed:4", skip={sorted(set(NAMES) - {"sizes"})!r}))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 checks passed" in done.stdout


def test_fixtures_import_no_torch(tmp_path: Path) -> None:
    done = python(
        "import sys, bpkit.testing.fixtures; assert not {'torch', 'transformers'} & set(sys.modules)", tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_fixtures_are_there_in_anybodys_tests(tmp_path: Path) -> None:
    (tmp_path / "my_policy.py").write_text(
        "from bpkit import Policy\n\n\nclass Mine(Policy):\n    wants = frozenset()\n\n"
        "    def select(self, state, context):\n        return context.full(99)\n"
    )
    (tmp_path / "test_mine.py").write_text(
        "from my_policy import Mine\n\n\n"
        "def test_pair(bpkit_pair):\n    assert bpkit_pair.ids('ab').shape == (1, 2)\n\n\n"
        f"def test_other(bpkit_check):\n    assert bpkit_check('fixed:4', skip={NAMES[1:]!r}).ok\n\n\n"
        "def test_mine(bpkit_check):\n    bpkit_check(Mine)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "Mine.select" in done.stdout
    assert "it returned [99]" in done.stdout


# The command


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command line in this process."""
    return lambda *arguments: CliRunner().invoke(build_app(), list(arguments), prog_name="bpkit")


def skipping(*kept: str) -> list[str]:
    return [word for name in NAMES if name not in kept for word in ("--skip", name)]


def test_the_command_says_what_is_wrong(run: Callable[..., Result]) -> None:
    result = run("check", f"{BAD_FILE}:TooLarge", *skipping("sizes", "lossless"))
    assert result.exit_code == 1
    assert "failed sizes" in result.stdout
    assert "what was done:" in result.stdout
    assert "TooLarge.select" in result.stdout
    assert "[99]" in result.stdout


def test_the_command_passes_a_good_policy(run: Callable[..., Result]) -> None:
    result = run("check", "fixed:5", "--json", "--seed", "3", *skipping("sizes"))
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["ok"], said["seed"], said["policy"]) == (True, 3, "Fixed(block_size=5)")
    assert [check["state"] for check in said["results"]] == ["passed"]


def test_the_command_lists_the_checks(run: Callable[..., Result]) -> None:
    assert [row["name"] for row in json.loads(run("check", "--list", "--json").stdout)] == NAMES
    assert "onnxruntime" in run("check", "--list").stdout


def test_the_policy_may_come_from_a_config(run: Callable[..., Result], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("policy: {name: fixed, block_size: 6}\nsampling: {seed: 4}\n")
    said = json.loads(run("check", "--config", str(config), "--json", *skipping("sizes")).stdout)
    assert (said["policy"], said["seed"]) == ("Fixed(block_size=6)", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a policy to check"),
        (["fixt"], "there is no policy 'fixt'"),
        (["fixed", "--skip", "speed"], "there is no check 'speed'"),
        (["fixed", "--shipped", "--drafter", "ngram"], "leave out --target and --drafter"),
    ],
)
def test_bad_input_is_explained(run: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = run("check", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.slow
def test_real_models_are_decoded_with_as_well(run: Callable[..., Result], tiny_folder: Path) -> None:
    models = ["--target", str(tiny_folder / "target"), "--drafter", str(tiny_folder / "drafter"), "--json"]
    said = json.loads(run("check", "threshold", *models, *skipping("sizes")).stdout)
    assert [result["name"] for result in said["results"]] == ["sizes", "models"]
    assert said["results"][1]["state"] == "passed"
    assert "a step under this policy takes" in said["results"][1]["notes"][0]
    result = run("check", f"{BAD_FILE}:Raises", *models, *skipping("sizes"))
    assert result.exit_code == 1
    failed = json.loads(result.stdout)["results"][1]
    assert failed["failures"][0]["got"] == "it raised ArithmeticError: no idea"


@pytest.mark.slow
def test_an_exported_policy_is_checked_with_the_pair_that_it_is_for(run: Callable[..., Result]) -> None:
    result = run("check", "onnx:forecast", "--shipped", "--json")
    assert result.exit_code == 0, result.output
    assert [check["state"] for check in json.loads(result.stdout)["results"]] == ["skipped", "passed"]
