"""The command line: streams, exit codes, one-paragraph errors, and no torch where none is needed."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from bpkit import __version__
from bpkit.cli import generate as generate_command
from bpkit.cli import main, models, options, outputs
from bpkit.cli.outputs import Outputs
from bpkit.config import Config
from bpkit.installation.distribution import DISTRIBUTION
from bpkit.policy import PolicyError
from bpkit.registry.discovery import Registry, build
from bpkit.registry.hookspecs import hookimpl

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random `target` and `drafter`."""
    from bpkit.testing import tiny_pair

    folder = tmp_path_factory.mktemp("pair")
    tiny_pair(folder)
    return folder


@pytest.fixture
def run() -> Run:
    """Run the command line in this process."""

    def invoke(*arguments: str, **more: Any) -> Result:
        return CliRunner().invoke(main.build_app(), list(arguments), prog_name="bpkit", **more)

    return invoke


def on(pair: Path) -> list[str]:
    return ["--target", str(pair / "target"), "--drafter", str(pair / "drafter"), "--threads", "1"]


def paragraph(result: Result) -> str:
    """The error, which is one line on stderr and no traceback."""
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return str(result.stderr)


# Listing


def test_version_and_help(run: Run) -> None:
    versions = run("--version").stdout.splitlines()
    assert versions[0] == f"bpkit {__version__}"
    assert [line.split()[0] for line in versions[1:]] == ["Python", "torch", "transformers"]
    shown = run("--help")
    assert shown.exit_code == 0
    for word in ("generate", "policies", "drafters", "bench", "demo", "train", "Exit codes", "130"):
        assert word in shown.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["policies"], ["policies", "--json"], ["drafters"], ["bench", "--help"]]
)
def test_looking_around_imports_neither_torch_nor_transformers(arguments: list[str]) -> None:
    program = (
        "import sys, bpkit.cli.main\n"
        f"sys.argv = ['bpkit', *{arguments!r}]\n"
        "try: bpkit.cli.main.main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'lightning', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_policies_as_json_hold_options_defaults_and_origin(run: Run) -> None:
    listed = json.loads(run("policies", "--json").stdout)
    fixed = next(p for p in listed["policies"] if p["name"] == "fixed")
    assert fixed["options"]["block_size"]["default"] is None
    assert "anchor included" in fixed["options"]["block_size"]["description"]
    assert fixed["summary"]
    assert fixed["distribution"] == DISTRIBUTION


def test_tables_are_plain_text_without_a_terminal(run: Run) -> None:
    shown = run("policies").stdout + run("drafters").stdout + run("policies", "threshold").stdout
    assert "\x1b" not in shown
    for word in ("threshold=", "ngram", "block-diffusion", DISTRIBUTION):
        assert word in shown


def test_a_policy_that_is_not_there_is_an_input_error(run: Run) -> None:
    result = run("policies", "tresholt")
    assert result.exit_code == 2
    assert "'threshold'" in paragraph(result)


def test_plugins_that_failed_are_shown_by_name_with_the_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = build()
    broken.failures["strange"] = "ImportError: no module named [stranger]"
    monkeypatch.setattr("bpkit.cli.plugins.registry", lambda: broken)
    assert "strange: ImportError: no module named [stranger]" in run("policies").stdout
    assert json.loads(run("policies", "--json").stdout)["failures"] == broken.failures


# Plug-in commands


class _Hello:
    @staticmethod
    @hookimpl
    def bpkit_register_commands(app: typer.Typer) -> None:
        @app.command()
        def hello() -> None:
            raise ValueError("hello is no command for you")


class _Broken:
    @staticmethod
    @hookimpl
    def bpkit_register_commands(app: typer.Typer) -> None:
        app.command("half")(lambda: None)
        raise RuntimeError("not today")


def _with_plugins(**plugins: object) -> Registry:
    made = build([])
    for name, plugin in plugins.items():
        made.manager.register(plugin, name)
    return made


def test_plugins_add_commands_and_a_broken_one_takes_no_other_down(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _with_plugins(broken=_Broken(), hello=_Hello())
    monkeypatch.setattr(main, "registry", lambda: made)
    result = run("hello")
    assert (result.exit_code, paragraph(result)) == (2, "Error: hello is no command for you\n")
    assert "not today" in made.failures["broken"]
    assert run("half").exit_code == 2


def test_plugins_that_cannot_be_looked_for_are_an_error_before_any_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable() -> Registry:
        raise PolicyError("no metadata can be read")

    monkeypatch.setattr(main, "registry", unreadable)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "Error: no metadata can be read\n"


# generate


def test_the_text_is_that_of_the_decoder_whatever_the_policy(run: Run, pair: Path) -> None:
    from bpkit import SpeculativeDecoder

    decoder = SpeculativeDecoder.from_pretrained(str(pair / "target"), str(pair / "drafter"), "fixed:1", device="cpu")
    expected = decoder.generate("x = ", max_new_tokens=24, temperature=1.0, seed=3).text
    for policy in ("fixed:4", "threshold:0.1"):
        options = ["--max-new-tokens", "24", "--temperature", "1", "--seed", "3", "--policy", policy]
        result = run("generate", "x = ", *on(pair), *options)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"{expected}\n"
        assert result.stderr == ""


def test_prompts_come_from_argument_file_or_stdin(run: Run, pair: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("a + b", encoding="utf-8")
    rest = [*on(pair), "--max-new-tokens", "6"]
    texts = {
        run("generate", "a + b", *rest).stdout,
        run("generate", "--file", str(file), *rest).stdout,
        run("generate", *rest, input="a + b\n").stdout,
        run("generate", "-", *rest, input="a + b").stdout,
    }
    assert len(texts) == 1
    assert len(texts.pop()) > 1


def test_stats_go_to_stderr(run: Run, pair: Path) -> None:
    result = run("generate", "x", *on(pair), "--max-new-tokens", "9", "--policy", "fixed:4", "--stats")
    assert result.exit_code == 0
    for part in ("9 tokens in", "acceptance length", "target", "seed none (greedy)", "fallbacks 0", "/3"):
        assert part in result.stderr
    assert "tokens" not in result.stdout


def test_stop_strings_end_the_text(run: Run, pair: Path) -> None:
    whole = run("generate", "x", *on(pair), "--max-new-tokens", "20").stdout
    stopped = run("generate", "x", *on(pair), "--max-new-tokens", "20", "--stop", whole[3:5]).stdout
    assert stopped == whole[: whole.index(whole[3:5]) + 2] + "\n"


def test_flags_win_over_the_config(run: Run, pair: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"target: {pair / 'target'}\ndrafter: {pair / 'drafter'}\npolicy: {{name: fixed, block_size: 2}}\n"
        "sampling: {max_new_tokens: 5}\nruntime: {threads: 1}\n",
        encoding="utf-8",
    )
    result = run("generate", "x", "--config", str(file), "--stats")
    assert "5 tokens" in result.stderr
    assert "/1" in result.stderr
    result = run("generate", "x", "--config", str(file), "--stats", "--max-new-tokens", "7", "--policy", "fixed:5")
    assert "7 tokens" in result.stderr
    assert "/4" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--policy", "fixd"], "'fixed'"),
        (["x", "--policy", "fixed:blok=3"], "block_size"),
        (["x", "--top-p", "3"], "--top-p"),
        (["x", "--rule", "best"], "'coupled' or 'rejection'"),
        (["x", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["x", "--config", "."], ".: it is a folder; name a file"),
        (["--file", "."], ".: it is a folder; name a file"),
        (["x", "--device", "abacus"], "--device abacus cannot be used here"),
        (["x", "--file", "nowhere.txt"], "not both"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["x", "--target", "./nowhere", "--drafter", "ngram"], "./nowhere"),
        ([""], "empty"),
    ],
)
def test_bad_input_is_a_paragraph_and_exit_code_2(run: Run, arguments: list[str], said: str) -> None:
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert said in paragraph(result)


def test_unknown_options_and_commands_are_exit_code_2(run: Run) -> None:
    assert run("generate", "x", "--polcy", "fixed").exit_code == 2
    assert run("generat").exit_code == 2


def _raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it


def test_a_failure_at_run_time_is_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_decoder", _raising(RuntimeError("CUDA is\nout of memory")))
    result = run("generate", "x")
    assert result.exit_code == 1
    assert paragraph(result).startswith("Error: RuntimeError: CUDA is out of memory")
    assert "bpkit doctor --report" in result.stderr
    monkeypatch.setattr(models, "load_decoder", _raising(OSError("the disk is locked")))
    result = run("generate", "x")
    assert (result.exit_code, paragraph(result)) == (1, "Error: the disk is locked\n")


def test_only_debug_shows_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_decoder", _raising(ValueError("no such thing")))
    assert "Traceback" not in run("generate", "x").stderr
    for arguments in (["--debug", "generate", "x"], ["generate", "--debug", "x"], ["generate", "x", "--debug"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert "no such thing" in result.stderr
    assert "Traceback" not in run("generate", "--", "--debug").stderr


def test_an_interruption_ends_with_a_line_and_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_decoder", _raising(KeyboardInterrupt()))
    result = run("generate", "x")
    assert result.exit_code == 130
    assert paragraph(result).startswith("Interrupted. ")


def test_a_chat_is_decoded_as_the_template_of_the_tokenizer_has_it(run: Run, pair: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    arguments = [*on(pair), "--max-new-tokens", "8"]
    refused = run("generate", "a + b", "--chat", *arguments)
    assert refused.exit_code == 2
    assert "no chat template" in paragraph(refused)
    chatty = tmp_path / "target"
    shutil.copytree(pair / "target", chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{% if add_generation_prompt %} x{% endif %}"
    )
    tokenizer.save_pretrained(chatty)
    arguments[1] = str(chatty)
    plain = run("generate", "user: a + b; x", *arguments)
    assert plain.exit_code == 0, plain.stderr
    assert run("generate", "a + b", "--chat", *arguments).stdout == plain.stdout
    assert run("generate", "a + b", *arguments).stdout != plain.stdout
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "a + b", "chat": true}\n{"prompt": "user: a + b; x"}\n', encoding="utf-8")
    assert run("generate", "--prompts", str(prompts), "--out", str(out), *arguments).exit_code == 0
    asked, typed = (json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines())
    assert asked == typed


def test_a_template_whose_text_is_read_as_other_tokens_is_refused(pair: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    from bpkit.decode.chat import as_chat

    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert as_chat(tokenizer, "a + b", "tiny") == "a + b"
    backend = tokenizer.backend_tokenizer
    first = backend.id_to_token(5)
    backend.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 5)])
    with pytest.raises(ValueError, match="tiny adds special tokens to what its chat template makes"):
        as_chat(tokenizer, "a + b", "tiny")


def test_a_drafter_learns_from_answers_to_messages_as_they_are_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch, pair: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    from transformers import AutoTokenizer

    seen: dict[str, Any] = {}
    monkeypatch.setattr("bpkit.learn.training.drafter.train_drafter", lambda target, out, **more: seen.update(more))
    chatty, prompts = tmp_path / "target", tmp_path / "prompts.jsonl"
    shutil.copytree(pair / "target", chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "<{{ messages[0].content }}>"
    tokenizer.save_pretrained(chatty)
    prompts.write_text('{"prompt": "a + b", "chat": true}\n{"prompt": "a + b"}\n', encoding="utf-8")
    arguments = ("--out", str(tmp_path / "drafter"), "--prompts", str(prompts), "--mask-token", "7")
    result = run("train", "drafter", "--target", str(chatty), *arguments)
    assert result.exit_code == 0, result.stderr
    assert seen["prompts"] == ["<a + b>", "a + b"]
    assert seen["mask_token_id"] == 7


def test_models_that_are_no_folders_are_announced_or_refused_offline(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from bpkit.cli.models import announce_downloads, models_on_the_hub
    from bpkit.config import Config

    def asked(target: str | None, drafter: Any) -> list[tuple[str, str]]:
        return list(models_on_the_hub(Config(target=target, drafter=drafter)))

    assert asked(str(tmp_path), "ngram:max_ngram=4") == []
    assert asked(None, None) == []
    assert asked("a/b", "c/d") == [("--target", "a/b"), ("--drafter", "c/d")]
    assert asked("a/b", {"name": "autoregressive", "path": "c/d"}) == [("--target", "a/b"), ("--drafter", "c/d")]
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    announce_downloads(Config(target="a/b"))
    assert capsys.readouterr().err == "Looking for 'a/b' on the Hugging Face Hub ...\n"
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    result = run("generate", "x", "--target", "nobody/has-this", "--drafter", "ngram")
    assert result.exit_code == 2
    assert "--target nobody/has-this" in paragraph(result)
    assert "HF_HUB_OFFLINE" in result.stderr


def test_without_a_prompt_the_error_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="--file FILE"):
        generate_command.read_prompt(None, None)


# train


def test_training_without_lightning_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("train", "drafter", "--target", "somewhere", "--out", str(tmp_path), "--prompts", "prompts.jsonl")
    assert result.exit_code == 1
    assert "pip install 'block-policy-kit[train]'" in paragraph(result)


def test_a_drafter_is_trained_on_prompts_of_ones_own(run: Run, tmp_path: Path) -> None:
    result = run("train", "drafter", "--target", "somewhere", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "--prompts FILE" in paragraph(result)
    assert '{"prompt": ' in paragraph(result)


def test_the_defaults_shown_are_those_of_the_recipes() -> None:
    pytest.importorskip("lightning")
    from bpkit.cli import train
    from bpkit.learn.training.answers import DrafterRun
    from bpkit.learn.training.drafter import train_drafter
    from bpkit.learn.training.model import ModelRun
    from recipes.pair import commands
    from recipes.pair.target import train_target

    for command, takes in (
        (commands.train_target, (train_target, ModelRun)),
        (train.drafter, (train_drafter, DrafterRun)),
    ):
        shown = inspect.signature(command).parameters
        for name, parameter in (pair for one in takes for pair in inspect.signature(one).parameters.items()):
            if name in shown and parameter.default is not parameter.empty and name != "batch_size":
                assert shown[name].default == parameter.default, name


@pytest.mark.parametrize(("kind", "recipe"), [("block-diffusion", "drafter"), ("autoregressive", "assistant")])
def test_the_kind_of_drafter_chooses_the_recipe(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, recipe: str
) -> None:
    pytest.importorskip("lightning")
    from bpkit.learn.training.answers import DrafterRun

    seen: dict[str, dict[str, Any]] = {}
    for name in ("drafter", "assistant"):
        monkeypatch.setattr(
            f"bpkit.learn.training.{name}.train_{name}",
            lambda target, out, name=name, **more: seen.update({name: more}),
        )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n', encoding="utf-8")
    arguments = ["--target", "t", "--out", str(tmp_path / "out"), "--prompts", str(prompts), "--kind", kind]
    arguments += ["--minutes", "2", "--steps", "7", "--devices", "2", "--no-resume", "--new-tokens", "9"]
    result = run("train", "drafter", *arguments)
    assert result.exit_code == 0, result.stderr
    (given,) = seen.values()
    assert list(seen) == [recipe]
    assert given["prompts"] == ["x"]
    assert given["run"] == DrafterRun(max_steps=7, max_minutes=2.0, devices=2, resume=False, new_tokens=9)


# Options that commands share.


def test_a_command_takes_a_group_of_options_as_the_object_that_they_settle(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("sampling: {temperature: 0.5, top_k: 3}\n", encoding="utf-8")
    app = typer.Typer(add_completion=False)

    @app.command()
    @options.takes(config=options.settings(options.MODELS | options.SAMPLING), files=outputs.figures)
    def show(name: str, *, config: Config, files: Outputs, loud: bool = False) -> None:
        typer.echo(f"{name} {config.sampling.temperature} {config.sampling.top_k} {files.figures} {loud}")

    names = [parameter.name for parameter in typer.main.get_command(app).params]
    assert names == ["name", *options.MODELS, *options.SAMPLING, "json", "loud"]
    done = CliRunner().invoke(app, ["me", "--config", str(file), "--top-k", "4", "--json", f"{tmp_path}/x.json"])
    assert done.stdout == f"me 0.5 4 {tmp_path}/x.json False\n"
    refused = CliRunner().invoke(app, ["me", "--json", f"{tmp_path}/nowhere/x.json"])
    assert "there is no folder" in str(refused.exception)
    assert "--temperature" in str(CliRunner().invoke(app, ["me", "--temperature", "-1"]).exception)
