"""Names, options and plug-ins: what is there is found, what is not is explained, what fails takes nothing else down."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from bpkit.cli import main, plugins
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.installation.distribution import DISTRIBUTION
from bpkit.installation.doctor import examine
from bpkit.learn.trained import TrainedPolicy
from bpkit.policy import Policy, PolicyConfig, PolicyError
from bpkit.registry import discovery, hookspecs
from bpkit.registry.discovery import HOOK_OF, build, registry
from bpkit.registry.hookspecs import hook_arguments
from bpkit.registry.plugin_choice import NO_AUTOLOAD, PLUGINS, choice_of, plugin_flags
from bpkit.registry.policy_folder import read_policy_file
from bpkit.registry.resolve import parse_spec, resolve_policy
from bpkit.testing import TinyPair
from bpkit.types import Feature

if TYPE_CHECKING:
    from torch import Tensor

    from bpkit.policy import State
    from bpkit.registry.discovery import Registry
    from bpkit.types import Context

BUILT_IN = {
    "adaedl",
    "adaptive_verification",
    "joint",
    "bandit",
    "batch_ema",
    "batch_table",
    "blockpilot",
    "confidence",
    "delayed_tree",
    "eesd",
    "ema",
    "exp3",
    "fixed",
    "forecast",
    "goodput",
    "ldlp",
    "ldlp_threshold",
    "onnx",
    "portfolio",
    "priority",
    "schedule",
    "sequoia",
    "source_bandit",
    "specdecpp",
    "svip",
    "tapout",
    "threshold",
    "tree",
    "turbospec",
    "ucb",
}

POLICY = """
from bpkit.policy import Policy, PolicyConfig

class MineConfig(PolicyConfig):
    size: int = 3
    label: str = "a"

class Mine(Policy):
    Config = MineConfig
    wants = frozenset()

    def select(self, state, context):
        return context.full(self.config.size)
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EntryPoint]]:
    """Makes importable plug-ins, each with a distribution of its own, and forgets them afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def make(module: str, text: str, *, name: str | None = None, distribution: str | None = None) -> EntryPoint:
        (tmp_path / f"{module}.py").write_text(text)
        made.append(module)
        dist = distribution or f"{module}-dist"
        info = tmp_path / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[bpkit]\n{name or module} = {module}\n")
        (point,) = (p for p in entry_points(group="bpkit", name=name or module) if p.dist and p.dist.name == dist)
        return point

    yield make
    registry.cache_clear()  # who asked for the registry of the process meanwhile was given these as well
    for module in made:
        sys.modules.pop(module, None)


def registers(policy: str, target: str) -> str:
    return (
        "from bpkit.registry.hookspecs import hookimpl\n\n"
        "@hookimpl\n"
        "def bpkit_register_policies(register):\n"
        f"    register({policy!r}, {target!r}, summary='One of mine.')\n"
    )


# What is there.


def test_the_built_in_policies_and_drafters_come_through_entry_points_of_this_distribution() -> None:
    known = build()
    assert set(known.policies) == BUILT_IN
    assert set(known.drafters) == {
        "block-diffusion",
        "autoregressive",
        "ngram",
        "early-exit",
        "ensemble",
        "last-pass",
        "hierarchy",
    }
    assert set(known.observers) == {"jsonl", "prometheus"}
    assert known.failures == {}
    for entry in (*known.policies.values(), *known.drafters.values(), *known.observers.values()):
        assert entry.distribution == DISTRIBUTION
        assert entry.summary.endswith(".")


@pytest.mark.parametrize("name", sorted(BUILT_IN - {"onnx"}))  # which needs a file
def test_every_built_in_policy_loads_with_its_defaults(name: str) -> None:
    policy = resolve_policy(name)
    config = registry().policies[name].load_config()
    assert config is type(policy).Config
    trained = isinstance(policy, TrainedPolicy) and policy.folder is not None  # its defaults are those stored there
    defaults = config(**read_policy_file(policy.folder).options) if trained else config()  # type: ignore[attr-defined]
    assert policy.config.model_dump() == defaults.model_dump()
    assert not policy.config.model_fields_set
    assert all(field.description for field in config.model_fields.values()), "`bpkit policies` shows them"


def test_a_strangers_plug_in_is_found_beside_the_built_in_ones(plug_in: Callable[..., EntryPoint]) -> None:
    plug_in("stranger_mine", POLICY + registers("mine", "stranger_mine:Mine"), name="stranger")
    known = build()
    assert set(known.policies) == {*BUILT_IN, "mine"}
    entry = known.policies["mine"]
    assert (entry.plugin, entry.distribution, entry.summary) == ("stranger", "stranger_mine-dist", "One of mine.")
    made = entry.load()()
    assert repr(made) == "Mine(size=3, label='a')"


def test_a_module_that_two_distributions_name_alike_is_one_plug_in_and_ours(
    plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = POLICY + registers("mine", "named_twice:Mine")
    former = plug_in("named_twice", text, distribution="another")
    now = plug_in("named_twice", text, distribution=DISTRIBUTION)
    for points in ([former, now], [now, former]):
        known = build(points)
        assert [plugin.distribution for plugin in known.plugins.values()] == [DISTRIBUTION]
        assert known.policies["mine"].distribution == DISTRIBUTION
        assert (known.failures, known.conflicts) == ({}, {})


def test_a_plug_in_may_register_a_factory_and_drafters(plug_in: Callable[..., EntryPoint]) -> None:
    text = (
        POLICY
        + "\nfrom bpkit.registry.hookspecs import hookimpl\n\n"
        + "@hookimpl\ndef bpkit_register_policies(register):\n"
        + "    register('made', lambda size=7: Mine(size=size), summary='Made.')\n\n"
        + "@hookimpl\ndef bpkit_register_drafters(register):\n"
        + "    register('none', 'stranger_factory:Nothing.load', summary='Nothing.')\n\n"
        + "class Nothing:\n    @classmethod\n    def load(cls, path, target):\n        return (path, target)\n"
    )
    known = build([plug_in("stranger_factory", text)])
    assert repr(known.policies["made"].load()(size=9)) == "Mine(size=9, label='a')"
    assert known.drafters["none"].load()("p", "t") == ("p", "t")


# What fails.


def test_a_plug_in_that_cannot_be_imported_is_reported_by_name_and_takes_nothing_else_down(
    plug_in: Callable[..., EntryPoint],
) -> None:
    points = [
        plug_in("a_broken", "raise RuntimeError('no such device')"),
        plug_in("b_missing", "import surely_not_installed_anywhere"),
        plug_in("c_right", POLICY + registers("mine", "c_right:Mine")),
        plug_in("d_syntax", "def (:"),
    ]
    known = build(points)
    assert set(known.policies) == {"mine"}
    assert known.failures["a_broken"] == "RuntimeError: no such device"
    assert known.failures["b_missing"].startswith("ModuleNotFoundError: No module named 'surely_not_installed_")
    assert known.failures["d_syntax"].startswith("SyntaxError: ")
    assert len(known.failures) == 3


def test_a_plug_in_that_exits_on_import_takes_nothing_else_down(plug_in: Callable[..., EntryPoint]) -> None:
    points = [
        plug_in("a_exits", "import sys\nsys.exit('licence expired')"),
        plug_in("c_stays", POLICY + registers("mine", "c_stays:Mine")),
    ]
    known = build(points)
    assert set(known.policies) == {"mine"}
    assert "licence expired" in known.failures["a_exits"]


def test_a_plug_in_whose_hook_raises_registers_nothing(plug_in: Callable[..., EntryPoint]) -> None:
    text = (
        "from bpkit.registry.hookspecs import hookimpl\n\n@hookimpl\ndef bpkit_register_policies(register):\n"
        "    register('half', 'nowhere:Half', summary='Half.')\n    raise LookupError('the other half')\n"
    )
    known = build([plug_in("half_way", text), plug_in("right", POLICY + registers("mine", "right:Mine"))])
    assert known.failures == {"half_way": "LookupError: the other half"}
    assert set(known.policies) == {"mine"}


def test_a_broken_plug_in_is_named_when_its_policy_is_asked_for(
    plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = build([plug_in("clever", "raise RuntimeError('no such device')")])
    monkeypatch.setattr(discovery, "registry", lambda: known)
    with pytest.raises(PolicyError, match=r"no policy 'clever'.*Plug-in 'clever' could not be loaded \(RuntimeError"):
        resolve_policy("clever")


def test_a_name_that_two_plug_ins_claim_is_nobodys_and_the_error_says_how_to_settle_it(
    plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        plug_in("one", POLICY + registers("mine", "one:Mine"), distribution="first-dist"),
        plug_in("two", POLICY + registers("mine", "two:Mine"), distribution="second-dist"),
        plug_in("other", POLICY + registers("other", "other:Mine")),
    ]
    known = build(points)
    assert set(known.policies) == {"other"}
    monkeypatch.setattr(discovery, "registry", lambda: known)
    with pytest.raises(PolicyError, match=r"'mine' is registered twice: .*'second-dist'.*'first-dist'") as caught:
        resolve_policy("mine")
    assert "disable one with `--plugin no:two` or `--plugin no:one`, or uninstall one" in str(caught.value)
    for name, left in (("one", "two"), ("two", "one")):
        settled = build(points, choice_of([f"no:{name}"], {}))
        assert settled.policies["mine"].plugin == left
        assert settled.conflicts == {}


def test_three_that_claim_one_name_are_all_named(plug_in: Callable[..., EntryPoint]) -> None:
    known = build([plug_in(name, POLICY + registers("mine", f"{name}:Mine")) for name in ("a_one", "b_two", "c_three")])
    ((key, claimed),) = known.conflicts.items()
    assert key == ("policy", "mine")
    assert [entry.plugin for entry in claimed] == ["c_three", "b_two", "a_one"]
    assert "mine" not in known.policies


def test_a_policy_and_a_drafter_may_share_a_name(plug_in: Callable[..., EntryPoint]) -> None:
    text = registers("both", "builtins:dict") + registers("both", "builtins:dict").replace("policies", "drafters")
    known = build([plug_in("shares", text)])
    assert (set(known.policies), set(known.drafters), known.failures) == ({"both"}, {"both"}, {})


def test_two_distributions_may_use_one_name_for_their_entry_point(plug_in: Callable[..., EntryPoint]) -> None:
    points = [
        plug_in("mine_one", POLICY + registers("one", "mine_one:Mine"), name="same", distribution="first-dist"),
        plug_in("mine_two", POLICY + registers("two", "mine_two:Mine"), name="same", distribution="second-dist"),
    ]
    known = build(points)
    assert set(known.policies) == {"one", "two"}
    assert known.failures == {}


def test_a_target_that_cannot_be_imported_fails_only_when_used_and_says_whose_it_is(
    plug_in: Callable[..., EntryPoint],
) -> None:
    known = build([plug_in("late", registers("late", "surely_not_there:Late"))])
    assert set(known.policies) == {"late"}
    with pytest.raises(PolicyError, match=r"'late' of distribution 'late-dist' points at 'surely_not_there:Late', whi"):
        known.policies["late"].load()


# Hooks, as pluggy calls them.


def marked(function: str, *, mark: str = "@hookimpl") -> str:
    return f"from bpkit.registry.hookspecs import hookimpl\n\n{mark}\n{function}\n"


def command_of(name: str) -> str:
    return f"    app.command({name!r})(lambda: print({name!r}))"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "def bpkit_register_policies(register):\n    register('x', 'm:X', summary='X.')",
            [r"bpkit_register_policies is not marked as a hook: put @bpkit.hookimpl before it"],
        ),
        (
            marked("def bpkit_register_polices(register): pass"),
            [
                r"no hook 'bpkit_register_polices'",
                r"Did you mean 'bpkit_register_policies'\?",
                "bpkit_register_commands",
            ],
        ),
        (
            marked("def bpkit_register_policies(registry): pass"),
            [r"bpkit_register_policies\(registry\) Argument\(s\) {'registry'}"],
        ),
        (
            marked("def policies(app): pass", mark="@hookimpl(specname='bpkit_register_policies')"),
            [r"'bpkit_register_policies'.*policies\(app\) Argument\(s\) {'app'}"],
        ),
        (
            marked("def bpkit_register_policies(register):\n    yield", mark="@hookimpl(wrapper=True)"),
            [r"bpkit_register_policies is a wrapper"],
        ),
        (
            marked("def bpkit_register_policies(register):\n    yield", mark="@hookimpl(hookwrapper=True)"),
            [r"bpkit_register_policies is a wrapper"],
        ),
        (
            marked("def bpkit_register_policies(register): register('a b', 'm:X', summary='X.')"),
            [r"'a b' is no name of a policy"],
        ),
        (
            marked("def bpkit_register_policies(register): register('ab', 'm', summary='X.')"),
            [r"target 'm' of policy 'ab' is neither 'module:Class' nor callable"],
        ),
        (
            marked(
                "def bpkit_register_observers(register):\n"
                "    register('ab', 'm:X', summary='X.')\n    register('ab', 'm:Y', summary='Y.')"
            ),
            [r"registers observer 'ab' twice"],
        ),
    ],
    ids=["unmarked", "unknown", "argument", "specname", "wrapper", "hookwrapper", "name", "target", "twice"],
)
def test_a_plug_in_whose_hooks_will_not_do_fails_and_takes_nobody_along(
    plug_in: Callable[..., EntryPoint], text: str, says: list[str]
) -> None:
    known = build([plug_in("wrong", text), plug_in("fine", POLICY + registers("mine", "fine:Mine"))])
    assert set(known.policies) == {"mine"}
    assert set(known.failures) == {"wrong"}
    for pattern in says:
        assert re.search(pattern, known.failures["wrong"]), known.failures["wrong"]
    assert known.observers == {}
    assert not known.manager.has_plugin("wrong")


def test_a_helper_and_an_imported_specification_need_no_mark(plug_in: Callable[..., EntryPoint]) -> None:
    text = "from bpkit.registry.hookspecs import bpkit_register_drafters\n\ndef bpkit_size():\n    return 4\n"
    assert build([plug_in("helpful", text + registers("mine", "m:Mine"))]).failures == {}


def test_specname_optional_hooks_and_optional_arguments_are_honoured(plug_in: Callable[..., EntryPoint]) -> None:
    text = (
        marked("def mine(register): register('by_name', 'm:X', summary='X.')",
               mark="@hookimpl(specname='bpkit_register_policies')")
        + marked("def bpkit_register_later(anything): raise LookupError", mark="@hookimpl(optionalhook=True)")
        + marked("def bpkit_register_drafters(register, quick=True): register(f'd{quick}', 'm:X', summary='X.')")
        + marked("def bpkit_register_observers(): pass")
    )  # fmt: skip
    known = build([plug_in("modern", text)])
    assert known.failures == {}
    assert (set(known.policies), set(known.drafters)) == ({"by_name"}, {"dTrue"})


def test_hooks_are_called_in_the_order_of_pluggy(plug_in: Callable[..., EntryPoint]) -> None:
    """`tryfirst`, then those registered last, then `trylast`: as a manager of pluggy's own calls them."""
    marks = {"a": "@hookimpl", "b": "@hookimpl(tryfirst=True)", "c": "@hookimpl", "d": "@hookimpl(trylast=True)"}
    marks["e"] = "@hookimpl(tryfirst=True)"
    points = []
    for name, mark in marks.items():
        hook = f"def bpkit_register_policies(register):\n    register({name!r}, 'm:X', summary='')"
        points.append(plug_in(f"{name}_order", marked(hook, mark=mark)))
    known = build(points)
    called: list[str] = []
    known.manager.hook.bpkit_register_policies(register=lambda name, target, *, summary: called.append(name))
    assert list(known.policies) == called == ["e", "b", "c", "a", "d"]


def test_plug_ins_of_bpkit_itself_are_registered_first_and_called_last(plug_in: Callable[..., EntryPoint]) -> None:
    plug_in("aardvark", POLICY + registers("mine", "aardvark:Mine"))
    assert build().calls("bpkit_register_policies")[0].plugin_name == "aardvark"


def test_of_a_plug_in_that_fails_in_one_hook_nothing_counts(plug_in: Callable[..., EntryPoint]) -> None:
    text = registers("half", "m:X") + marked("def bpkit_register_observers(register): raise SystemExit('no licence')")
    known = build([plug_in("halves", text)])
    assert (known.policies, known.failures) == ({}, {"halves": "SystemExit: no licence"})


def test_commands_come_in_the_order_of_calls_and_a_name_is_given_once(
    plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        plug_in("a_command", marked(f"def bpkit_register_commands(app):\n{command_of('one')}")),
        plug_in("b_command", marked(f"def bpkit_register_commands(app):\n{command_of('half')}\n{command_of('bench')}")),
        plug_in("c_command", marked(f"def bpkit_register_commands(app):\n{command_of('three')}")),
        plug_in("d_command", marked("def bpkit_register_commands(app):\n    app.callback()(lambda: None)")),
    ]
    known = build(points)
    monkeypatch.setattr(main, "registry", lambda: known)
    app = main.build_app()
    names = [command.name for command in app.registered_commands if command.name]
    assert names[-2:] == ["three", "one"]
    assert "half" not in names
    assert known.failures["b_command"] == "its commands: ValueError: command 'bench' is there already, of bpkit itself"
    assert "replaced the options before the command" in known.failures["d_command"]


# Which plug-ins are wanted.


@pytest.mark.parametrize(
    ("flags", "variable", "disabled", "named"),
    [
        ([], "", {}, {}),
        (["no:a"], "", {"a": "--plugin no:a"}, {}),
        ([], "no:a, b,", {"a": f"{PLUGINS}=no:a"}, {"b": f"{PLUGINS}=b"}),
        (["a"], "no:a", {}, {"a": "--plugin a"}),
        (["no:b"], "b", {"b": "--plugin no:b"}, {}),
        (["no:a", "a"], "", {}, {"a": "--plugin a"}),
        (["no:"], "", {}, {}),
    ],
)
def test_the_last_word_on_a_plug_in_counts(
    flags: list[str], variable: str, disabled: dict[str, str], named: dict[str, str]
) -> None:
    choice = choice_of(flags, {PLUGINS: variable})
    assert (choice.disabled, choice.named) == (disabled, named)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--plugin", "no:a", "policies"], ["no:a"]),
        (["--debug", "--plugin=no:a", "--plugin", "b", "generate", "--plugin", "c"], ["no:a", "b"]),
        (["policies", "--plugin", "a"], []),
        (["--plugin"], []),
        (["--", "--plugin", "a"], []),
        ([], []),
    ],
)
def test_plugin_is_read_before_the_command_and_not_after(arguments: list[str], found: list[str]) -> None:
    assert plugin_flags(arguments) == found


def test_a_disabled_plug_in_is_not_even_imported_and_its_policy_says_who_disabled_it(
    plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = plug_in("unwanted", "raise RuntimeError('imported')\n" + registers("mine", "unwanted:Mine"))
    known = build([point], choice_of(["no:unwanted"], {}))
    assert (known.failures, known.disabled) == ({}, {"unwanted": "--plugin no:unwanted"})
    assert known.manager.is_blocked("unwanted")
    monkeypatch.setattr(discovery, "registry", lambda: known)
    with pytest.raises(
        PolicyError, match=r"no policy 'mine'.*'unwanted', which may have it, is disabled by --plugin no:"
    ):
        resolve_policy("mine")


def test_of_two_plug_ins_of_one_name_each_can_be_disabled(plug_in: Callable[..., EntryPoint]) -> None:
    points = [
        plug_in("same_one", registers("one", "m:X"), name="same", distribution="first-dist"),
        plug_in("same_two", registers("two", "m:X"), name="same", distribution="second-dist"),
    ]
    assert set(build(points, choice_of(["no:first-dist:same"], {})).policies) == {"two"}
    assert set(build(points, choice_of(["no:second-dist:same"], {})).policies) == {"one"}
    assert set(build(points, choice_of(["no:same"], {})).policies) == set()


def test_without_autoload_bpkits_own_and_named_ones_are_there(plug_in: Callable[..., EntryPoint]) -> None:
    for name in ("stranger_a", "stranger_b"):
        plug_in(name, registers(name, "m:X"))
    known = build(choice=choice_of(["stranger_b"], {NO_AUTOLOAD: "1"}))
    assert set(known.policies) == {*BUILT_IN, "stranger_b"}
    assert known.disabled == {"stranger_a": NO_AUTOLOAD}
    assert set(build(choice=choice_of([], {NO_AUTOLOAD: "0"})).policies) == {*BUILT_IN, "stranger_a", "stranger_b"}


def test_a_module_that_is_not_installed_is_a_plug_in_if_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uninstalled_one.py").write_text(POLICY + registers("mine", "uninstalled_one:Mine"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    by_variable = build([], choice_of([], {PLUGINS: "uninstalled_one"}))
    assert "ModuleNotFoundError" in by_variable.failures["uninstalled_one"], "the current folder is for flags"
    known = build([], choice_of(["uninstalled_one"], {}))
    entry = known.policies["mine"]
    assert (entry.plugin, entry.distribution) == ("uninstalled_one", "")
    assert repr(entry.load()()) == "Mine(size=3, label='a')"
    sys.modules.pop("uninstalled_one")


def test_a_name_to_disable_that_no_plug_in_has_is_kept(plug_in: Callable[..., EntryPoint]) -> None:
    known = build([plug_in("there", registers("mine", "m:X"))], choice_of(["no:their", "no:there"], {}))
    assert known.unheard == {"their": "--plugin no:their"}


def bpkit(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from bpkit.cli.main import main; main()", *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=variables)


def test_the_command_line_leaves_plug_ins_out_and_loads_modules(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        POLICY + registers("mine", "theirs:Mine") + marked(f"def bpkit_register_commands(app):\n{command_of('greet')}")
    )
    listed = json.loads(bpkit("--plugin", "no:bandit", "--plugin=theirs", "policies", "--json", cwd=tmp_path).stdout)
    names = {policy["name"] for policy in listed["policies"]}
    assert "mine" in names
    assert not names & {"bandit", "ucb"}
    assert listed["disabled"] == {"bandit": "--plugin no:bandit"}
    (mine,) = (policy for policy in listed["policies"] if policy["name"] == "mine")
    assert (mine["plugin"], mine["distribution"], mine["version"]) == ("theirs", None, None)
    assert bpkit("--plugin", "theirs", "greet", cwd=tmp_path).stdout == "greet\n"
    asked = bpkit("policies", "bandit", cwd=tmp_path, BPKIT_PLUGINS="no:bandit")
    assert asked.returncode == 2
    assert "Plug-in 'bandit', which may have it, is disabled by BPKIT_PLUGINS=no:bandit." in asked.stderr
    missing = bpkit("--plugin", "surely_not_there", "policies", cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith(
        "Error: --plugin surely_not_there: plug-in 'surely_not_there' could not be loaded ("
    )
    warned = bpkit("--plugin", "no:bandid", "drafters", cwd=tmp_path)
    assert warned.returncode == 0
    assert warned.stderr == "Warning: --plugin no:bandid: there is no plug-in 'bandid'. Did you mean 'bandit'?\n"


def test_processes_of_a_command_choose_the_same_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGINS, "one")
    main.pass_on(["no:bandit"])
    assert choice_of([]).disabled == {"bandit": f"{PLUGINS}=no:bandit"}
    assert set(choice_of([]).named) == {"one"}


def test_commands_work_while_two_plug_ins_claim_the_default_policy(tmp_path: Path) -> None:
    (tmp_path / "rude.py").write_text(POLICY + registers("fixed", "rude:Mine"))
    listed = bpkit("--plugin", "rude", "policies", cwd=tmp_path)
    assert listed.returncode == 0
    assert "policy 'fixed' is registered twice" in " ".join(listed.stdout.split())
    asked = bpkit("--plugin", "rude", "generate", "x", cwd=tmp_path)
    assert asked.returncode == 2
    assert "disable one with `--plugin no:rude` or `--plugin no:fixed`" in asked.stderr


def test_the_doctor_names_what_is_claimed_twice_failed_or_left_out(
    plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [plug_in(name, registers("mine", "m:X")) for name in ("claims_one", "claims_two")]
    points += [plug_in("crashes", "1 / 0"), plug_in("unwanted_one", "1 / 0"), plug_in("works", registers("b", "m:X"))]
    known = build(points, choice_of(["no:unwanted_one"], {}))
    monkeypatch.setattr(discovery, "registry", lambda: known)
    found = {finding.name: finding for finding in examine() if finding.section == "bpkit"}
    assert found["plug-ins"].value == "claims_one, claims_two, works"
    states = {
        name: finding.state
        for name, finding in found.items()
        if name not in ("version", "distribution", "shipped pair")
    }
    assert states == {
        "plug-ins": "ok", "policy mine": "broken", "plug-in crashes": "broken", "plug-in unwanted_one": "missing"
    }  # fmt: skip
    assert "no:claims_one" in found["policy mine"].advice
    assert "no:crashes" in found["plug-in crashes"].advice


# The lists.


def test_every_hook_is_listed_with_its_arguments_and_plug_ins_in_the_order_of_calls(
    plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    early = marked("def bpkit_register_policies(register): pass", mark="@hookimpl(tryfirst=True)")
    known = build([plug_in("first", early), plug_in("second", registers("b", "m:X")), plug_in("third", "1 / 0")])
    monkeypatch.setattr(plugins, "registry", lambda: known)
    listed = json.loads(CliRunner().invoke(main.build_app(), ["hooks", "--json"]).stdout)
    assert listed["schema_version"] == 1
    specified = {name: list(arguments) for name, arguments in hook_arguments().items()}
    assert {hook["name"]: hook["arguments"] for hook in listed["hooks"]} == specified
    assert set(HOOK_OF.values()) < set(specified)
    policies = next(hook for hook in listed["hooks"] if hook["name"] == "bpkit_register_policies")
    assert [(one["plugin"], one["tryfirst"]) for one in policies["implementations"]] == [
        ("first", True),
        ("second", False),
    ]
    assert policies["implementations"][1] == {
        "plugin": "second",
        "module": "second",
        "distribution": "second-dist",
        "version": "1.0",
        "function": "second:bpkit_register_policies",
        "tryfirst": False,
        "trylast": False,
    }
    assert listed["failures"] == {"third": "ZeroDivisionError: division by zero"}
    assert [plugin["plugin"] for plugin in listed["plugins"]] == ["first", "second", "third"]
    shown = CliRunner().invoke(main.build_app(), ["hooks", "bpkit_register_policies"]).stdout
    assert "bpkit_register_drafters" not in shown
    assert "not loaded third" in shown


def test_a_hook_that_is_not_there_is_told_the_nearest() -> None:
    result = CliRunner().invoke(main.build_app(), ["hooks", "bpkit_register_policy"])
    assert result.exit_code == 2
    assert "Did you mean 'bpkit_register_policies'?" in result.stderr


def test_every_hook_says_what_it_is_for() -> None:
    for name in hook_arguments():
        assert inspect.getdoc(getattr(hookspecs, name)), name


def test_policies_as_json_say_what_is_trained_and_ships() -> None:
    listed = json.loads(CliRunner().invoke(main.build_app(), ["policies", "--json"]).stdout)
    assert listed["schema_version"] == 1
    found = {policy["name"]: policy for policy in listed["policies"]}
    assert {name for name, policy in found.items() if policy["trainable"]} == {
        "blockpilot", "delayed_tree", "forecast", "ldlp", "ldlp_threshold", "specdecpp"
    }  # fmt: skip
    assert found["specdecpp"]["weights"] == ["specdecpp", "specdecpp-autoregressive"]
    assert found["fixed"]["weights"] == []
    assert (found["fixed"]["distribution"], found["fixed"]["version"]) == (DISTRIBUTION, version(DISTRIBUTION))


def test_drafters_list_their_options(pair: TinyPair) -> None:
    listed = json.loads(CliRunner().invoke(main.build_app(), ["drafters", "--json"]).stdout)
    options = {drafter["name"]: drafter["options"] for drafter in listed["drafters"]}
    assert {name: option["default"] for name, option in options["ngram"].items()} == {
        "max_ngram": 3, "min_ngram": 1, "block_size": 8, "branches": 1
    }  # fmt: skip
    assert all(option["description"] for drafter in options.values() for option in drafter.values())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("ngram:max_gram=4", r"drafter 'ngram': unknown option 'max_gram'. Accepted options: max_ngram=3, min_ngram=1"),
        ("ngram:max_ngram=many", r"drafter 'ngram': option 'max_ngram': .*integer"),
        ("ngram:max_ngram=1,min_ngram=2", r"drafter 'ngram': min_ngram 2 is above max_ngram 1"),
        ("block-diffusion:depth=3", r"unknown option 'depth'. Accepted options: path='', revision=None"),
        ("autoregressive:block_size=0", r"option 'block_size': .*greater than or equal to 1"),
    ],
)
def test_a_wrong_option_of_a_drafter_is_named(pair: TinyPair, spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        resolve_drafter(spec, pair.target)


def test_options_of_a_drafter_arrive_as_they_are_meant(pair: TinyPair, tiny_folder: Path) -> None:
    ngram: Any = resolve_drafter("ngram:max_ngram=4,block_size=6", pair.target)
    assert (list(ngram.sizes), ngram.trained_block_size) == ([4, 3, 2, 1], 6)
    assert list(resolve_drafter("ngram:2", pair.target).sizes) == [2, 1]  # type: ignore[attr-defined]
    folder = str(tiny_folder / "assistant")
    for spec in (f"autoregressive:{folder},block_size=5", {"name": "autoregressive", "path": folder, "block_size": 5}):
        assistant = resolve_drafter(spec, pair.target)
        assert (assistant.name, assistant.trained_block_size) == (folder, 5)


# Names and options.


@pytest.fixture
def known() -> Registry:
    return build()


@pytest.mark.parametrize(
    ("wrong", "near"), [("fixd", "fixed"), ("treshold", "threshold"), ("bandits", "bandit"), ("Fixed", "fixed")]
)
def test_an_unknown_name_lists_the_known_ones_and_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(PolicyError) as caught:
        resolve_policy(wrong)
    said = str(caught.value)
    assert f"no policy {wrong!r}. Did you mean {near!r}?" in said
    assert ", ".join(sorted(BUILT_IN)) in said


def test_a_name_like_nothing_gets_no_guess(known: Registry) -> None:
    with pytest.raises(PolicyError) as caught:
        known.find("drafter", "xyzzy")
    assert f"there is no drafter 'xyzzy'. Known: {', '.join(sorted(known.drafters))}." in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("fixed", "Fixed(block_size=None)"),
        ("fixed:4", "Fixed(block_size=4)"),
        ("fixed:block_size=4", "Fixed(block_size=4)"),
        ({"name": "fixed", "block_size": 4}, "Fixed(block_size=4)"),
        ({"name": "fixed"}, "Fixed(block_size=None)"),
        ("threshold:0.6", "Threshold(threshold=0.6, block_size=None)"),
        ("threshold:0.6,block_size=8", "Threshold(threshold=0.6, block_size=8)"),
        ("threshold: threshold = 0.6 , block_size = 8", "Threshold(threshold=0.6, block_size=8)"),
        ({"name": "threshold", "threshold": 0.6}, "Threshold(threshold=0.6, block_size=None)"),
    ],
)
def test_a_policy_is_made_from_a_string_or_a_mapping(spec: object, text: str) -> None:
    assert repr(resolve_policy(spec)) == text  # type: ignore[arg-type]


def test_a_mapping_is_not_changed_by_resolving_it() -> None:
    spec = {"name": "fixed", "block_size": 4}
    resolve_policy(spec)
    assert spec == {"name": "fixed", "block_size": 4}


def test_an_instance_is_taken_as_it_is() -> None:
    class Own(Policy):
        wants = frozenset()

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(2)

    own = Own()
    assert resolve_policy(own) is own


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fixed:block_sise=4", [r"unknown option 'block_sise'", r"Accepted options: block_size=None"]),
        ({"name": "fixed", "size": 4, "blok": 1}, [r"unknown option 'size'", r"unknown option 'blok'"]),
        ("fixed:0", [r"option 'block_size': .*greater than or equal to 1"]),
        ("fixed:many", [r"option 'block_size': .*integer", r"Accepted options: block_size=None"]),
        ("threshold:1.5", [r"option 'threshold': .*less than or equal to 1", r"threshold=0.4, block_size=None"]),
        ({"block_size": 4}, [r"policy \{'block_size': 4\}: a mapping needs a key 'name'"]),
    ],
)
def test_a_wrong_option_is_named_and_the_accepted_ones_are_listed(spec: object, says: list[str]) -> None:
    for pattern in says:
        with pytest.raises(PolicyError, match=pattern):
            resolve_policy(spec)  # type: ignore[arg-type]


def test_a_value_for_a_policy_without_options_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plain.py"
    file.write_text(POLICY.replace("    Config = MineConfig\n", "").replace("self.config.size", "2"))
    assert repr(resolve_policy(f"{file}:Mine")) == "Mine()"
    with pytest.raises(PolicyError, match="takes no options"):
        resolve_policy(f"{file}:Mine:4")
    with pytest.raises(PolicyError, match=r"unknown option 'size'.*Accepted options: none"):
        resolve_policy(f"{file}:Mine:size=4")


def test_options_are_frozen_once_validated() -> None:
    policy = resolve_policy("fixed:4")
    with pytest.raises(ValueError, match="frozen"):
        policy.config.block_size = 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("ngram", {"name": "ngram"}),
        ("ngram:max_ngram=4", {"name": "ngram", "max_ngram": "4"}),
        ("a:b", {"name": "a", "": "b"}),
        ("a:b,c=d", {"name": "a", "": "b", "c": "d"}),
        ("a:", {"name": "a"}),
        ("./x/mine.py:Mine", {"name": "./x/mine.py:Mine"}),
        ("./x/mine.py:Mine:3,label=b", {"name": "./x/mine.py:Mine", "": "3", "label": "b"}),
        ("/x:y/mine.py:Mine", {"name": "/x:y/mine.py:Mine"}),
    ],
)
def test_the_written_form_splits_into_name_and_options(text: str, spec: dict[str, str]) -> None:
    assert parse_spec(text) == spec


# Policies in files.


def test_a_policy_in_a_file_is_made_with_and_without_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my policy.py").write_text(POLICY)
    monkeypatch.chdir(tmp_path)
    assert repr(resolve_policy("./my policy.py:Mine")) == "Mine(size=3, label='a')"
    assert repr(resolve_policy("./my policy.py:Mine:5")) == "Mine(size=5, label='a')"
    assert repr(resolve_policy("./my policy.py:Mine:label=b,size=5")) == "Mine(size=5, label='b')"
    assert repr(resolve_policy({"name": f"{tmp_path}/my policy.py:Mine", "size": 6})) == "Mine(size=6, label='a')"


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "changing.py"
    file.write_text(POLICY)
    assert resolve_policy(f"{file}:Mine").config.model_dump()["size"] == 3
    file.write_text(POLICY.replace("size: int = 3", "size: int = 1234"))
    assert resolve_policy(f"{file}:Mine").config.model_dump()["size"] == 1234


def test_two_files_of_one_name_do_not_disturb_each_other(tmp_path: Path) -> None:
    files = [tmp_path / folder / "same.py" for folder in ("a", "b")]
    for size, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(POLICY.replace("size: int = 3", f"size: int = {10 + size}"))
    policies = [resolve_policy(f"{file}:Mine") for file in files]
    assert [p.config.model_dump()["size"] for p in policies] == [10, 11]


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (None, "Mine", r"no file '.*theirs.py'"),
        ("raise OSError('disk')", "Mine", r"theirs.py cannot be imported: OSError: disk"),
        ("x = (", "Mine", r"theirs.py cannot be imported: SyntaxError"),
        (POLICY, "Yours", r"has no policy class 'Yours'; it has: Mine"),
        (POLICY, "MineConfig", r"has no policy class 'MineConfig'; it has: Mine"),
        ("x = 1", "Mine", r"has no policy class 'Mine'; it has: none"),
    ],
)
def test_a_file_that_will_not_do_is_explained(tmp_path: Path, text: str | None, name: str, says: str) -> None:
    if text is not None:
        (tmp_path / "theirs.py").write_text(text)
    with pytest.raises(PolicyError, match=says):
        resolve_policy(f"{tmp_path}/theirs.py:{name}")


def test_a_policy_that_forgets_wants_or_is_none_is_refused(
    tmp_path: Path, plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "speechless.py").write_text(POLICY.replace("    wants = frozenset()\n", ""))
    with pytest.raises(PolicyError, match=r"Mine does not say which features it wants: add a class attribute `wants"):
        resolve_policy(f"{tmp_path}/speechless.py:Mine")
    text = registers("dict", "builtins:dict")
    known = build([plug_in("no_policy", text)])
    monkeypatch.setattr(discovery, "registry", lambda: known)
    with pytest.raises(PolicyError, match=r"policy 'dict' is not a bpkit.Policy but a dict"):
        resolve_policy("dict")


def test_a_subclass_config_is_validated_with_its_own_rules() -> None:
    class Narrow(PolicyConfig):
        size: int = 1

    class Own(Policy):
        Config = Narrow
        wants = frozenset()

        def select(self, state: State, context: Context) -> Tensor:
            return context.full(self.config.size)  # type: ignore[attr-defined]

    assert Own(size=4).config == Narrow(size=4)
    with pytest.raises(PolicyError, match=r"policy 'Own': option 'size'.*Accepted options: size=1"):
        Own(size="many")


# Light imports.


@pytest.mark.parametrize(
    "code",
    [
        "import bpkit",
        "import bpkit; dir(bpkit); bpkit.Policy; bpkit.Feature; bpkit.hookimpl; bpkit.Context",
        "from bpkit.registry.discovery import registry; assert len(registry().policies) >= 6; registry().failures",
        "from bpkit.registry.discovery import registry\n[e.load_config()() for e in registry().policies.values()]",
        "import bpkit.policy, bpkit.types, bpkit.registry.hookspecs, bpkit.draft.plugin",
    ],
    ids=["bpkit", "its names", "the registry", "the options", "what plug-ins import"],
)
def test_neither_torch_nor_transformers_is_imported(code: str) -> None:
    check = "\nimport sys\nheavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_imported_and_an_unknown_one_is_an_attribute_error() -> None:
    import bpkit

    for name in bpkit.__all__:
        assert getattr(bpkit, name) is not None
        assert name in dir(bpkit)
    with pytest.raises(AttributeError, match="no attribute 'Polisy'"):
        _ = bpkit.Polisy


# What a class may say wrongly.


def _select(self: Policy, state: State, context: Context) -> Tensor:
    return context.full(1)


@pytest.mark.parametrize(
    ("wants", "message"),
    [
        ("anchor_entropy", r"Wrong.wants is a text; name features in a set: wants = frozenset\({'anchor_entropy'}\)"),
        (["anchor_entrpy"], r"Wrong.wants names 'anchor_entrpy', which is no feature. Did you mean 'anchor_entropy'\?"),
        ({"k"}, r"Wrong.wants names 'k', which is no feature. Features: prefill_hidden, "),
    ],
)
def test_wants_that_name_no_features_are_told_where_the_class_is_made(wants: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        type("Wrong", (Policy,), {"wants": wants, "select": _select})


@pytest.mark.parametrize("wants", [["anchor_entropy"], ("anchor_entropy",), {"anchor_entropy"}])
def test_wants_may_be_any_collection(wants: object) -> None:
    made = type("Fine", (Policy,), {"wants": wants, "select": _select})()
    assert made.wants == frozenset({Feature.ANCHOR_ENTROPY})


def test_a_policy_without_select_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"policy Idle must define select\(self, state, context\)"):
        type("Idle", (Policy,), {"wants": frozenset()})()


def test_a_constructor_that_takes_no_config_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from bpkit import Policy\n\nclass Own(Policy):\n    wants = frozenset()\n"
        "    def __init__(self): pass\n    def select(self, state, context): return context.full(2)\n",
        encoding="utf-8",
    )
    with pytest.raises(PolicyError, match=r"policy Own cannot be made: leave its __init__ out, or let it be"):
        resolve_policy(f"{file}:Own")


def test_a_grid_of_what_is_no_option_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"Steep.grid names 'sise', which is no option; the options are: size"):
        type("Steep", (PolicyConfig,), {"__annotations__": {"size": int}, "size": 1, "grid": {"sise": (1, 2)}})
