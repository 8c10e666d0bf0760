"""The YAML config that names target, drafter, policy, sampling and runtime for every command.

    target: Qwen/Qwen3-4B
    drafter: z-lab/Qwen3-4B-DFlash-b16
    policy: {name: threshold, threshold: 0.6}
    observers: [{name: jsonl, path: steps.jsonl}]
    sampling: {max_new_tokens: 200, temperature: 0.7, top_p: 0.9, seed: 1}
    runtime: {dtype: bfloat16, device: cuda}

Every key may be left out. Unknown keys are errors, and command-line flags win over the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bpkit.names import did_you_mean


class ConfigError(ValueError):
    """A config file or a flag cannot be used; the message says which key, where, and what is accepted."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sampling(_Section):
    """How tokens are chosen. What is left out follows the target's own generation config."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """0 is greedy decoding."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    """0 keeps every token."""
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    def options(self, *, max_new_tokens: int, temperature: float | None = None) -> dict[str, Any]:
        """Options for `SpeculativeDecoder.generate`, with these defaults, without the seed.

        Args:
            max_new_tokens: output tokens at most. temperature: None leaves it to the target's generation config.
        """
        given = self.model_dump(exclude={"seed"}, exclude_none=True)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, **given}
        if options["temperature"] is None:
            del options["temperature"]
        return options


def _switched(value: Any) -> Any:
    """YAML reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Runtime(_Section):
    """Where and how the models run."""

    rule: Literal["coupled", "rejection"] = "coupled"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """None: float32 on a CPU, the checkpoint's own on a GPU, which is also what `auto` means."""
    device: str | None = None
    """None: a GPU if there is one."""
    drafter_device: str | None = None
    """Where drafters with a model work; None: where the target is."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Of torch. `auto`: torch's own choice, and in the bench the best count that it finds."""
    capture: Annotated[Literal["auto", "off", "on"], BeforeValidator(_switched)] = "auto"
    """Whether passes are captured in CUDA graphs. `auto`: where there is CUDA and the models allow it."""
    products: Literal["torch", "onednn", "auto"] = "torch"
    """What multiplies matrices in linear layers in float32 on a CPU; `onednn` keeps a second copy of the weights."""
    cost: str | None = None
    """What steps cost here, for policies that weigh it: a file of `bpkit calibrate`, or a preset."""


_SECTIONS: dict[str, type[_Section]] = {"sampling": Sampling, "runtime": Runtime}


class Config(_Section):
    """Everything that a config file may say."""

    target: str | None = None
    """Folder or Hub name; a relative folder is relative to where the command runs."""
    drafter: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    """As `target`, or a registered name with options; or several, the sources that a policy chooses among."""
    policy: str | dict[str, Any] | None = None
    """`name`, `name:value`, `name:key=value,...`, or a mapping with `name` and options."""
    observers: list[str | dict[str, Any]] | None = None
    """What `generate` and `bench` tell of every step, each as a policy is written. Flags replace the list."""
    sampling: Sampling = Sampling()
    runtime: Runtime = Runtime()


def settle(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """The config of a command: the file's, overridden by the flags that were given.

    Args:
        flags: laid out as the file; a flag that is None was not given.

    Raises:
        ConfigError: unknown key or bad value, naming key, file or flag, and the known keys.
        FileNotFoundError: there is no such file.
    """
    stated = load(file).model_dump(exclude_unset=True) if file is not None else {}
    for name, value in flags.items():
        if isinstance(value, Mapping):
            stated[name] = {**stated.get(name, {}), **{k: v for k, v in value.items() if v is not None}}
        elif value is not None:
            stated[name] = value
    return _validated(stated, lambda place: f"--{place[-1].replace('_', '-')}", "")


def load(file: Path) -> Config:
    """Read a config file. Raises ConfigError, or FileNotFoundError."""
    try:
        stated = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no config file {str(file)!r}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not a text file ({error})") from None
    stated = {} if stated is None else stated
    if not isinstance(stated, dict):
        raise ConfigError(f"{file} must hold keys and values such as 'policy: fixed:8', not a {type(stated).__name__}")
    return _validated(stated, ".".join, f" in {file}")


def _validated(stated: dict[Any, Any], label: Callable[[list[str]], str], where: str) -> Config:
    """The config that was stated; `label` writes the keys that lead to a fault. Raises ConfigError."""
    try:
        return Config(**{str(key): value for key, value in stated.items()})
    except ValidationError as error:
        faults: dict[str, str] = {}  # one for each place: a union reports each of its members
        for fault in error.errors():
            # Without pydantic's names of the members of unions.
            section = _SECTIONS.get(str(fault["loc"][0]), Config) if len(fault["loc"]) > 1 else Config
            place = [str(key) for key in fault["loc"][: 1 if section is Config else 2]]
            name = label(place)
            if fault["type"] == "extra_forbidden":
                faults.setdefault(name, f"unknown key {name!r}{where}{_unknown(place, section)}")
            else:
                said = f"{fault['msg'][:1].lower()}{fault['msg'][1:]}"
                faults.setdefault(name, f"{name}{where}: {said}, got {fault['input']!r}")
        raise ConfigError("; ".join(faults.values())) from None


def _unknown(place: list[str], section: type[_Section]) -> str:
    others = {name: other for name, other in _SECTIONS.items() if other is not section}
    elsewhere = [name for name, other in others.items() if place[-1] in other.model_fields]
    if elsewhere:
        return f". Did you mean {elsewhere[0]}.{place[-1]}?"
    hint = did_you_mean(place[-1], section.model_fields)
    return f".{hint} Known keys{' there' if len(place) > 1 else ''}: {', '.join(section.model_fields)}"
