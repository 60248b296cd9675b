"""Hardware as a YAML file describes it, read strictly."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError


@dataclass(frozen=True)
class Devices:
    """Devices that hold the experts between them and read side by side.

    Attributes:
        devices: how many.
        spare: experts for which each device has room beyond its own, for replicas.
        read: bytes per second that one reads from its memory.
        macs: multiply-adds per second of one.
        weight_bytes: bytes of one weight.
    """

    devices: int
    spare: int
    read: float
    macs: float
    weight_bytes: float


@dataclass(frozen=True)
class Chiplets:
    """Compute dies in a ring, each with a memory channel of its own.

    Attributes:
        dies: how many.
        channel: bytes per second of one memory channel.
        link: bytes per second from a die to the next.
        macs: multiply-adds per second of one die.
        memory: bytes on a die for weights.
        slices: pieces that an expert is cut into to be streamed; a multiple of `dies`.
        slack: pauses that a request may make for each token, where requests wait for company.
        weight_bytes: bytes of one weight, and of one value of a hidden state.
    """

    dies: int
    channel: float
    link: float
    macs: float
    memory: float
    slices: int
    slack: float
    weight_bytes: float


@dataclass(frozen=True)
class Helpers:
    """Machines that hold the experts between them, reached by radio from where the rest of the model runs.

    Attributes:
        helpers: how many.
        bandwidth: hertz of one helper's channel, which the tokens of a step share equally.
        nearest, farthest: metres to them.
        loss_at_km: path loss at 1 km, in dB; `loss_per_decade`: dB more for ten times the distance.
        noise: dBm per hertz.
        most_power: dBm that a sender has at most.
        delay: seconds in which a token must be at a helper and its answer back.
        value_bits: bits of one value of a hidden state.
    """

    helpers: int
    bandwidth: float
    nearest: float
    farthest: float
    loss_at_km: float
    loss_per_decade: float
    noise: float
    most_power: float
    delay: float
    value_bits: int


Hardware = Devices | Chiplets | Helpers
KINDS: dict[str, type[Hardware]] = {"devices": Devices, "chiplets": Chiplets, "helpers": Helpers}
SIGNED = {"noise", "most_power"}
MAY_BE_ZERO = {"spare", "slack"}


def read_hardware(path: Path) -> Hardware:
    """The hardware that a file describes: `kind`, one of KINDS, and every attribute of that class.

    Raises:
        OptionError: the file is not there, is no such YAML, or holds an unknown, missing or unusable value; named.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OptionError(f"--hardware {path} cannot be read ({reason}): expected YAML, as in data/hardware") from None
    kind = found.pop("kind", None) if isinstance(found, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise OptionError(f"--hardware {path} has the kind {kind}: expected `kind:` {', '.join(KINDS)}")
    made = KINDS[kind]
    types = {field.name: field.type for field in dataclasses.fields(made)}
    if unknown := sorted(map(str, found.keys() - types.keys())):
        raise OptionError(
            f"--hardware {path} has the unknown {', '.join(unknown)}: {kind} are described by {', '.join(types)}"
        )
    if missing := sorted(types.keys() - found.keys()):
        raise OptionError(
            f"--hardware {path} lacks {', '.join(missing)}: {kind} are described by all of {', '.join(types)}"
        )
    for name, value in found.items():
        if fault := _fault(name, types[name], value):
            raise OptionError(f"--hardware {path}: {name} {value!r} is not usable: expected {fault}")
    hardware = made(**found)
    if isinstance(hardware, Chiplets) and hardware.slices % hardware.dies:
        raise OptionError(
            f"--hardware {path}: slices {hardware.slices} is not usable: expected a multiple of the {hardware.dies} dies"
        )
    if isinstance(hardware, Helpers) and hardware.nearest > hardware.farthest:
        raise OptionError(f"--hardware {path}: nearest {hardware.nearest:g} is not usable: expected at most farthest")
    return hardware


def _fault(name: str, kind: Any, value: Any) -> str | None:
    """What was expected in place of a value; None: it can be used."""
    least = "" if name in SIGNED else " of 0 or more" if name in MAY_BE_ZERO else " above 0"
    if kind is int:
        usable, expected = type(value) is int, f"a whole number{least}"
    else:
        usable, expected = type(value) in (int, float) and math.isfinite(value), f"a number{least}, as 25.6e+9"
    if usable and name not in SIGNED:
        usable = value >= 0 if name in MAY_BE_ZERO else value > 0
    return None if usable else expected
