"""Names, options and plug-ins: what is there is found, what is not is explained, what fails takes nothing else down."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bpkit import registry as registry_module
from bpkit.policy import Policy, PolicyConfig, PolicyError
from bpkit.policy_folder import read_policy_file
from bpkit.registry import build, find, parse_spec, registry, resolve_policy
from bpkit.trained import TrainedPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from bpkit.policy import State
    from bpkit.registry import Registry
    from bpkit.types import Context

BUILT_IN = {
    "adaedl",
    "bandit",
    "blockpilot",
    "confidence",
    "eesd",
    "ema",
    "exp3",
    "fixed",
    "forecast",
    "goodput",
    "ldlp",
    "ldlp_threshold",
    "onnx",
    "schedule",
    "specdecpp",
    "svip",
    "tapout",
    "threshold",
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
    for module in made:
        sys.modules.pop(module, None)


def registers(policy: str, target: str) -> str:
    return (
        "from bpkit.hookspecs import hookimpl\n\n"
        "@hookimpl\n"
        "def bpkit_register_policies(register):\n"
        f"    register({policy!r}, {target!r}, summary='One of mine.')\n"
    )


# What is there.


def test_the_built_in_policies_and_drafters_come_through_entry_points_of_this_distribution() -> None:
    known = build()
    assert set(known.policies) == BUILT_IN
    assert set(known.drafters) == {"block-diffusion", "autoregressive", "ngram"}
    assert known.failures == {}
    for entry in (*known.policies.values(), *known.drafters.values()):
        assert entry.distribution == "bpkit"
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


def test_a_plug_in_may_register_a_factory_and_drafters(plug_in: Callable[..., EntryPoint]) -> None:
    text = (
        POLICY
        + "\nfrom bpkit.hookspecs import hookimpl\n\n"
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
        "from bpkit.hookspecs import hookimpl\n\n@hookimpl\ndef bpkit_register_policies(register):\n"
        "    register('half', 'nowhere:Half', summary='Half.')\n    raise LookupError('the other half')\n"
    )
    known = build([plug_in("half_way", text), plug_in("right", POLICY + registers("mine", "right:Mine"))])
    assert known.failures == {"half_way": "LookupError: the other half"}
    assert set(known.policies) == {"mine"}


def test_a_hook_that_does_not_exist_is_reported_by_name(plug_in: Callable[..., EntryPoint]) -> None:
    text = "from bpkit.hookspecs import hookimpl\n\n@hookimpl\ndef bpkit_register_polices(register):\n    pass\n"
    known = build([plug_in("typo", text)])
    assert "bpkit_register_polices" in known.failures["typo"]


def test_a_broken_plug_in_is_named_when_its_policy_is_asked_for(
    plug_in: Callable[..., EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = build([plug_in("clever", "raise RuntimeError('no such device')")])
    monkeypatch.setattr(registry_module, "registry", lambda: known)
    with pytest.raises(PolicyError, match=r"no policy 'clever'.*Plug-in 'clever' could not be loaded \(RuntimeError"):
        resolve_policy("clever")


def test_two_plug_ins_that_claim_one_name_are_an_error_naming_both_distributions(
    plug_in: Callable[..., EntryPoint],
) -> None:
    points = [
        plug_in("one", POLICY + registers("mine", "one:Mine"), distribution="first-dist"),
        plug_in("two", POLICY + registers("mine", "two:Mine"), distribution="second-dist"),
    ]
    with pytest.raises(PolicyError, match=r"'mine' is registered twice.*'first-dist'.*'second-dist'.*uninstall one"):
        build(points)


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
        find(known.drafters, "xyzzy", what="drafter")
    assert "there is no drafter 'xyzzy'. Known: autoregressive, block-diffusion, ngram." in str(caught.value)


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
        ({"block_size": 4}, [r"needs a 'name', as in \{'name': 'fixed'\}", r"'block_size': 4"]),
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
    monkeypatch.setattr(registry_module, "registry", lambda: known)
    with pytest.raises(PolicyError, match=r"policy 'dict' is not a bpkit.Policy but a dict"):
        resolve_policy("dict")


def test_a_subclass_config_is_validated_with_its_own_rules() -> None:
    class Narrow(PolicyConfig):
        size: int = 1

    class Own(Policy):
        Config = Narrow
        wants = frozenset()

    assert Own(size=4).config == Narrow(size=4)
    with pytest.raises(PolicyError, match=r"policy 'Own': option 'size'.*Accepted options: size=1"):
        Own(size="many")


# Light imports.


@pytest.mark.parametrize(
    "code",
    [
        "import bpkit",
        "import bpkit; dir(bpkit); bpkit.Policy; bpkit.Feature; bpkit.hookimpl; bpkit.Context",
        "from bpkit.registry import registry; assert len(registry().policies) >= 6; registry().failures",
        "from bpkit.registry import registry\nfor e in registry().policies.values(): e.load_config()().model_dump()",
        "import bpkit.policy, bpkit.types, bpkit.hookspecs, bpkit.drafters.plugin",
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
