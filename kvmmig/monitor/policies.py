"""Policies by name, with their parameters: what ``x-kvmmig-set-policy`` chooses from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvmmig.migration.policy import (
    AutoConverge,
    DowntimeLimit,
    FirstOf,
    MaxRounds,
    NoProgress,
    Policy,
    RateAdaptive,
    Saving,
)
from kvmmig.qmp import QMPError
from kvmmig.units import RATE, ROUNDS, SHRINK, Range


@dataclass(frozen=True, slots=True)
class NamedPolicy:
    """One policy that can be chosen. ``parameters`` has each one's default, its range and what it means."""

    name: str
    description: str
    parameters: Mapping[str, tuple[float, Range, str]]
    make: Callable[[Mapping[str, float]], Policy]


_ROUNDS = (30, ROUNDS, "rounds at the most")
_PATIENCE = (3, ROUNDS, "rounds that may leave no less than the best one")
_SHRINK = (0.95, SHRINK, "a round makes progress when it leaves less than this share of the best one")

POLICIES = (
    NamedPolicy(
        "combined",
        "downtime-limit or max-rounds, whichever is first",
        {"rounds": _ROUNDS},
        lambda given: FirstOf(DowntimeLimit(), MaxRounds(int(given["rounds"]))),
    ),
    NamedPolicy(
        "downtime-limit",
        "stops when what is left fits into the migration parameter downtime-limit; never, if it never does",
        {},
        lambda given: DowntimeLimit(),
    ),
    NamedPolicy(
        "max-rounds",
        "stops after so many rounds, whatever is left",
        {"rounds": _ROUNDS},
        lambda given: MaxRounds(int(given["rounds"])),
    ),
    NamedPolicy(
        "no-progress",
        "stops when what is left fits into downtime-limit, or when the rounds no longer shrink",
        {"patience": _PATIENCE, "shrink": _SHRINK},
        lambda given: FirstOf(DowntimeLimit(), NoProgress(int(given["patience"]), given["shrink"])),
    ),
    NamedPolicy(
        "saving",
        "few live rounds, so that what is saved is whole soon, and small; until a policy is chosen, what is "
        "only stored goes by it",
        {"rounds": (4, ROUNDS, "rounds at the most")},
        lambda given: Saving(rounds=int(given["rounds"])),
    ),
    NamedPolicy(
        "rate-adaptive",
        "sends each round at the last dirty rate + 50 Mbit/s (Clark et al., NSDI 2005)",
        {
            "minimum": (100e6 / 8, RATE, "bytes a second, of the first round"),
            "maximum": (500e6 / 8, RATE, "bytes a second; it stops when it would need more"),
        },
        lambda given: RateAdaptive(given["minimum"], given["maximum"]),
    ),
    NamedPolicy(
        "auto-converge",
        "slows the vCPUs down, as the cpu-throttle parameters say, until downtime-limit can be kept",
        {"rounds": _ROUNDS},
        lambda given: FirstOf(DowntimeLimit(), AutoConverge(), MaxRounds(int(given["rounds"]))),
    ),
)
_BY_NAME = {policy.name: policy for policy in POLICIES}


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """A policy's name and the parameters that were given. Raises `QMPError` for one that can't be."""

    name: str = "combined"
    given: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in _BY_NAME:
            raise QMPError(f"there is no policy {self.name!r}; there are {', '.join(_BY_NAME)}")
        known = _BY_NAME[self.name].parameters
        for name, value in self.given.items():
            if name not in known:
                right = f"it has {', '.join(known)}" if known else "it has none of its own"
                raise QMPError(f"the policy {self.name} has no parameter {name!r}; {right}")
            default, within, _ = known[name]
            if value not in within or (isinstance(default, int) and value != int(value)):
                whole = "a whole number of " if isinstance(default, int) else ""
                raise QMPError(f"the policy {self.name} can't have {value:g} as {name}; use {whole}{within}")
        minimum, maximum = (self.parameters.get(name, 0.0) for name in ("minimum", "maximum"))
        if minimum > maximum:
            raise QMPError(f"the policy {self.name} needs a minimum that is not above its maximum")

    @property
    def parameters(self) -> dict[str, float]:
        """All its parameters with the values that they have."""
        defaults = {name: value for name, (value, _, _) in _BY_NAME[self.name].parameters.items()}
        return {**defaults, **self.given}

    def build(self) -> Policy:
        """A new policy object: one serves one migration."""
        return _BY_NAME[self.name].make(self.parameters)
