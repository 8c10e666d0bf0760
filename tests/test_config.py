"""The YAML config: what it accepts, how it explains what it does not, and that flags win."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpkit.config import Config, ConfigError, Sampling, load, settle

FULL = """
target: some/target
drafter: {name: ngram, max_ngram: 4}
policy: {name: threshold, threshold: 0.6}
sampling: {max_new_tokens: 20, temperature: 0.7, top_p: 0.9, top_k: 40, repetition_penalty: 1.1, seed: 5}
runtime: {rule: rejection, dtype: bfloat16, device: cpu, threads: 2}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "bpkit.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_every_key_is_read(tmp_path: Path) -> None:
    config = load(written(tmp_path, FULL))
    assert config.drafter == {"name": "ngram", "max_ngram": 4}
    assert config.policy == {"name": "threshold", "threshold": 0.6}
    assert config.sampling == Sampling(
        max_new_tokens=20, temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=5
    )
    assert (config.runtime.rule, config.runtime.threads) == ("rejection", 2)


def test_an_empty_file_is_the_default_config(tmp_path: Path) -> None:
    assert load(written(tmp_path, "# nothing yet\n")) == Config()


def test_flags_win_and_flags_not_given_do_not(tmp_path: Path) -> None:
    flags = {
        "target": None,
        "policy": "fixed:4",
        "sampling": {"seed": 9, "top_p": None},
        "runtime": {"threads": "auto"},
    }
    config = settle(written(tmp_path, FULL), flags)
    assert config.target == "some/target"
    assert config.policy == "fixed:4"
    assert (config.sampling.seed, config.sampling.top_p) == (9, 0.9)
    assert (config.runtime.threads, config.runtime.dtype) == ("auto", "bfloat16")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("polcy: fixed", ["'polcy'", "'policy'", "target, drafter, policy"]),
        ("sampling: {temprature: 1}", ["'sampling.temprature'", "'temperature'", "max_new_tokens"]),
        ("runtime: {rule: best}", ["runtime.rule", "'coupled' or 'rejection'", "'best'"]),
        ("runtime: {threads: 0}", ["runtime.threads", "0"]),
        ("sampling: {top_p: 3}", ["sampling.top_p", "less than or equal to 1"]),
        ("sampling: 3", ["sampling", "3"]),
        ("policy: [1", ["not valid YAML", "line 1"]),
        ("- a\n- b", ["keys and values", "list"]),
    ],
)
def test_a_fault_names_file_key_and_what_is_accepted(tmp_path: Path, text: str, said: list[str]) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    for part in [str(file), *said]:
        assert part in str(caught.value)


def test_a_bad_flag_is_named_as_a_flag() -> None:
    with pytest.raises(ConfigError, match=r"--max-new-tokens: .*greater than or equal to 1, got 0"):
        settle(None, {"sampling": {"max_new_tokens": 0}})


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, "foo: 1\nbar: 2"))
    assert "'foo'" in str(caught.value)
    assert "'bar'" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_options_for_generate_hold_what_was_said_and_defaults() -> None:
    assert Sampling().options(max_new_tokens=7) == {"max_new_tokens": 7}
    assert Sampling().options(max_new_tokens=7, temperature=0.0) == {"max_new_tokens": 7, "temperature": 0.0}
    said = Sampling(max_new_tokens=3, temperature=0.5, top_k=4, seed=1)
    assert said.options(max_new_tokens=7, temperature=0.0) == {"max_new_tokens": 3, "temperature": 0.5, "top_k": 4}


@pytest.mark.parametrize(
    ("text", "meant"), [("max_new_tokens: 3", "sampling.max_new_tokens"), ("sampling: {device: cpu}", "runtime.device")]
)
def test_a_key_in_the_wrong_place_is_told_its_own(text: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"Did you mean {meant}\?"):
        load(written(tmp_path, text))
