"""Hardware files: those of the repository are read, and what cannot be used is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from flows import one_line

from lynx_learn.errors import OptionError
from lynx_learn.hardware.described import KINDS, read_hardware

FILES = sorted((Path(__file__).parents[1] / "data" / "hardware").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_of_the_repository_are_read(file: Path) -> None:
    found = read_hardware(file)
    assert type(found).__name__.lower() == file.stem.split("-")[0]
    assert file.read_text().count("\n#") >= 3  # where its values are from


def test_there_is_one_of_each_kind() -> None:
    assert {type(read_hardware(file)) for file in FILES} == set(KINDS.values())


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("devices-8", {"kind": "toaster"}, "has the kind toaster: expected `kind:` devices, chiplets, helpers"),
        ("devices-8", {"kind": ["devices"]}, r"has the kind \['devices'\]"),
        ("devices-8", {"raed": 1.0}, "has the unknown raed: devices are described by devices, spare, read"),
        ("devices-8", {"read": None}, "lacks read: devices are described by all of devices"),
        ("devices-8", {"read": "3e12"}, "read '3e12' is not usable: expected a number above 0, as 25.6e\\+9"),
        ("devices-8", {"read": float("nan")}, "read nan is not usable"),
        ("devices-8", {"devices": 2.0}, "devices 2.0 is not usable: expected a whole number above 0"),
        ("devices-8", {"devices": True}, "devices True is not usable"),
        ("devices-8", {"spare": -1}, "spare -1 is not usable: expected a whole number of 0 or more"),
        ("chiplets-4", {"slices": 6}, "slices 6 is not usable: expected a multiple of the 4 dies"),
        ("helpers-8", {"nearest": 900}, "nearest 900 is not usable: expected at most farthest"),
        ("helpers-8", {"noise": "low"}, "noise 'low' is not usable: expected a number, as"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(name: str, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    values = yaml.safe_load(next(file for file in FILES if file.stem == name).read_text())
    values = {key: value for key, value in (values | change).items() if value is not None}
    file = tmp_path / "hardware.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(OptionError, match=reason) as error:
        read_hardware(file)
    assert "--hardware" in one_line(error)


@pytest.mark.parametrize("text", ["", "- devices", "kind: [", "\0", "3"])
def test_no_hardware_at_all(text: str, tmp_path: Path) -> None:
    file = tmp_path / "hardware.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match="--hardware") as error:
        read_hardware(file)
    one_line(error)
    with pytest.raises(OptionError, match="No such file"):
        read_hardware(tmp_path / "missing.yaml")


def test_what_may_be_zero_or_negative_is() -> None:
    by_name = {file.stem: read_hardware(file) for file in FILES}
    assert by_name["helpers-8"].noise < 0  # type: ignore[union-attr]
