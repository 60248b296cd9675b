"""Files: whole or not at all, put together in place, and folders that are tried before the work."""

import errno
import json
import os
from pathlib import Path

import pytest

from lynx_learn.errors import OptionError
from lynx_learn.files import (
    RunFolder,
    check_empty,
    check_target,
    check_writable,
    compact_json,
    staged,
    write_atomically,
)


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", b"one")
    write_atomically(tmp_path / "new" / "file", b"two")
    assert files(tmp_path) == ["new/file"]
    assert (tmp_path / "new" / "file").read_bytes() == b"two"


def test_a_link_stays_one_and_what_it_points_at_is_written(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small_disk / "file")
    for data in (b"one", b"two"):
        check_target(tmp_path / "link")
        write_atomically(tmp_path / "link", data)
        assert (small_disk / "file").read_bytes() == data
    assert (tmp_path / "link").is_symlink()
    assert files(small_disk) == ["file"]


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(
    kind: BaseException, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise kind

    write_atomically(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        for name in ("file", "other"):
            with pytest.raises(type(kind)):
                write_atomically(tmp_path / name, b"new content")
    assert files(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    write_atomically(small_disk / "file", b"old" * 10_000)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(small_disk / "file", b"new" * 200_000)
    assert error.value.errno == errno.ENOSPC
    assert files(small_disk) == ["file"]
    assert (small_disk / "file").read_bytes() == b"old" * 10_000


def test_what_cannot_be_written_into_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "deep")
    # /proc takes no folders of anybody's, root's neither.
    for place, reason in (
        (tmp_path / "file", "it is a file"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "nowhere", ""),
        (Path("/proc/lynx"), ""),
    ):
        for check in (check_writable, check_empty, lambda folder: check_target(folder / "name")):
            with pytest.raises(OptionError, match=rf"cannot be written into \({reason}.*choose another place") as error:
                check(place)
            assert "\n" not in str(error.value)
    with pytest.raises(OptionError, match="it is a folder"):
        check_target(tmp_path)
    assert files(tmp_path) == ["file"]
    os.mkfifo(tmp_path / "pipe")
    for special in (Path("/dev/null"), tmp_path / "pipe"):  # which a new file would stand in the place of
        with pytest.raises(OptionError, match="it is no regular file"):
            check_target(special)


def test_a_fresh_disk_and_remains_of_an_interrupted_run_count_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".saving-abc.part").mkdir()
    (tmp_path / ".options.json.part").write_text("{")
    check_empty(tmp_path)
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(OptionError, match="is not empty"):
        check_empty(tmp_path)


def test_staged_files_reach_another_disk(small_disk: Path, tmp_path: Path) -> None:
    """A mount point, or a symlink to one: a folder beside it lies on another file system, from which nothing can be renamed."""
    (tmp_path / "link").symlink_to(small_disk)
    for place in (small_disk, tmp_path / "link"):
        (place / "a").write_text("old")
        with staged(place) as part:
            (part / "deep").mkdir()
            (part / "a").write_text("new")
            (part / "deep" / "b").write_text("b")
        assert files(small_disk) == ["a", "deep/b"]
        assert (small_disk / "a").read_text() == "new"


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_put_in_place_after_an_exception(kind: BaseException, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("old")
    for place in (tmp_path / "there", tmp_path / "new"):
        with pytest.raises(type(kind)):  # noqa: PT012, SIM117
            with staged(place) as part:
                (part / "a").write_text("new")
                raise kind
    assert files(tmp_path) == ["there/a"]
    assert (tmp_path / "there" / "a").read_text() == "old"
    assert not (tmp_path / "new").exists()


def test_a_run_folder_is_gone_on_with_by_the_same_run_only(tmp_path: Path) -> None:
    same = {"tokens": 3, "layers": ("a", "b")}
    run = RunFolder(tmp_path / "run", same, "a run")
    assert not (tmp_path / "run").exists()
    run.put("deep/a.json", b"1")
    assert files(tmp_path) == ["run/deep/a.json", "run/options.json"]
    RunFolder(tmp_path / "run", same, "a run").put_json("b.json", [1])
    for other, named in (
        ({"tokens": 4, "layers": ["a"]}, "tokens, layers"),
        ({**same, "new": 1}, "new"),
        ({"tokens": 3}, "layers"),
    ):
        with pytest.raises(
            OptionError, match=rf"holds a run with other {named} \(see options.json\): choose another --out"
        ):
            RunFolder(tmp_path / "run", other, "a run")
    (tmp_path / "run" / "options.json").unlink()
    with pytest.raises(OptionError, match="is not empty and holds no run"):
        RunFolder(tmp_path / "run", same, "a run")


def test_figures_are_rows_and_lists_of_numbers_lines() -> None:
    row = {"method": "learned", "bytes": 0.5, "by_source": {"code": [1.0, 2.0]}}
    value = {"name": 'ä "x"', "numbers": list(range(2000)), "rows": [row] * 30, "none": {}, "0.01": [[], None, True]}
    text = compact_json(value)
    assert json.loads(text) == value
    lines = text.splitlines()
    assert lines.count(f"    {json.dumps(row)},") == 29
    assert len(lines) == 38
