"""The spec of an experiment: a TOML file whose values may be lists, and all combinations of them are tried.

`docs/experiments.md` explains it; `examples/experiments` has some.
"""

from __future__ import annotations

import hashlib
import itertools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from kvmmig.errors import KvmmigError
from kvmmig.monitor.policies import PolicyChoice
from kvmmig.qmp.messages import QMPError
from kvmmig.transport.registry import transport_for
from kvmmig.units import CPUS, DURATION, MEMORY, parse_count, parse_duration, parse_rate, parse_size

Value: TypeAlias = str | int | float
Values: TypeAlias = Value | list[Value]
NONE = "none"
#: A trial's own directory, in a target: ``file:{directory}/guest.img``.
DIRECTORY = "{directory}"


class BadSpec(KvmmigError):
    """A spec that can't be read, or asks for what can't be."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    pass


class GuestPart(_Part, frozen=True, kw_only=True):
    """What is moved."""

    guest: str | list[str] = "dirtier"
    memory: Values = "256MiB"
    cpus: Values = 1
    #: How long it runs before it is moved.
    warm_up: Values = "1s"
    #: A toy guest's parameters.
    settings: Mapping[str, Values] = {}


class MigrationPart(_Part, frozen=True, kw_only=True):
    """How it is moved."""

    to: str | list[str]
    bandwidth: Values = NONE
    policy: str | list[str] = "combined"
    downtime_limit: Values = "300ms"
    timeout: Values = "60s"
    cancel_after: Values = NONE


class HostPart(_Part, frozen=True, kw_only=True):
    """What else the host has to do."""

    #: Processes that do nothing but use a CPU.
    busy: Values = 0


class PlotPart(_Part, frozen=True, kw_only=True):
    """A picture of the results."""

    name: str
    x: str
    y: str
    #: A line for each value of this column.
    by: str = ""
    log: bool = False
    #: Draw what the geometric model of pre-copy says over the figures.
    model: Literal["", "geometric"] = ""
    #: Mark where the dirty rate reaches the rate of sending.
    knee: bool = False


class Spec(_Part, frozen=True, kw_only=True):
    """A whole experiment."""

    name: str
    about: str = ""
    repeats: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    guest: GuestPart = GuestPart()
    migration: MigrationPart
    host: HostPart = HostPart()
    plot: list[PlotPart] = []

    @property
    def axes(self) -> dict[str, list[Value]]:
        """Every parameter of a trial, with the values that it takes."""
        axes: dict[str, Any] = {}
        for part in (self.guest, self.migration, self.host):
            axes |= {name: value for name, value in msgspec.to_builtins(part).items() if name != "settings"}
        axes |= {f"set.{name}": value for name, value in self.guest.settings.items()}
        return {name: value if isinstance(value, list) else [value] for name, value in axes.items()}

    @property
    def varied(self) -> list[str]:
        """The parameters that take more than one value."""
        return [name for name, values in self.axes.items() if len(values) > 1]


@dataclass(frozen=True)
class Trial:
    """One point of the grid, once: its parameters as they were written, and which repeat it is."""

    parameters: Mapping[str, Value]
    repeat: int

    @property
    def key(self) -> str:
        """What tells it from every other trial, in any order of the spec: 12 hexadecimal digits."""
        said = msgspec.json.encode(sorted(self.parameters.items())) + str(self.repeat).encode()
        return hashlib.sha256(said).hexdigest()[:12]

    def text(self, name: str) -> str:
        """A parameter as text."""
        return str(self.parameters[name])

    @property
    def settings(self) -> dict[str, str]:
        """The toy guest's parameters."""
        return {
            name.removeprefix("set."): str(value)
            for name, value in self.parameters.items()
            if name.startswith("set.")
        }

    def seconds(self, name: str) -> float | None:
        """A parameter that is a duration; None where it is none."""
        text = self.text(name)
        return None if text == NONE else parse_duration(text, DURATION)

    def check(self) -> None:
        """Raise `ValueError`, with the parameter's name, for one that can't be."""
        checks: dict[str, Callable[[str], object]] = {
            "memory": lambda text: parse_size(text, MEMORY),
            "cpus": lambda text: parse_count(text, CPUS),
            "busy": int,
            "bandwidth": lambda text: text == NONE or parse_rate(text),
            "policy": PolicyChoice,
            "to": lambda text: transport_for(text.replace(DIRECTORY, "/tmp")),
            **dict.fromkeys(
                ("warm-up", "downtime-limit", "timeout", "cancel-after"),
                lambda text: text == NONE or parse_duration(text, DURATION),
            ),
        }
        for name, check in checks.items():
            try:
                check(self.text(name))
            except (ValueError, QMPError, KvmmigError) as error:
                raise ValueError(f"{name}: {error}") from error


def read_spec(path: Path) -> Spec:
    """Read and check a spec. Raises `BadSpec`, a sentence that names the file and the place in it."""
    try:
        with path.open("rb") as file:
            spec = msgspec.convert(tomllib.load(file), Spec)
    except OSError as error:
        raise BadSpec(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSpec(f"{path} is no TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise BadSpec(f"{path}: {error}") from error
    for trial in trials_of(spec):
        try:
            trial.check()
        except ValueError as error:
            raise BadSpec(f"{path}: {error}") from error
    return spec


def trials_of(spec: Spec) -> list[Trial]:
    """All trials: first each point once, then each again, so that a drift of the host strikes all alike."""
    axes = spec.axes
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [Trial(point, repeat) for repeat in range(spec.repeats) for point in points]
