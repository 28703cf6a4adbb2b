"""Files: whole or not at all, and no name that was read from a file leads out of its folder."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlpool.files import confined, read_json, replacing, sha256, write_json, write_text

PARTS = st.sampled_from(
    ["..", ".", "", "a", "b.txt", "out", "file", "dangling", "circle", "C:", "con\\x", "a\0b", "\ud800", "ä" * 200,
     "x" * 256]
)  # fmt: skip
NAMES = st.one_of(
    st.lists(PARTS, min_size=1, max_size=6).map("/".join),
    st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts)),
    st.text(st.characters(), max_size=40),
    st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2) | st.binary(max_size=3),
)
OURS = st.lists(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,30}", fullmatch=True), min_size=1, max_size=4).map(
    "/".join
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with links that lead out of it, to nothing, in a circle and to itself."""
    root = tmp_path_factory.mktemp("confined")
    folder = root / "folder"
    (folder / "a").mkdir(parents=True)
    (root / "outside").mkdir()
    (root / "secret").write_text("s")
    (folder / "b.txt").write_text("b")
    (folder / "out").symlink_to(root / "outside")
    (folder / "file").symlink_to("../secret")
    (folder / "dangling").symlink_to("../nothing")
    (folder / "circle").symlink_to("circle")
    return folder


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES)
@example("../x")
@example("/etc/passwd")
@example("out/x")
@example("file")
@example("a/../../x")
@example("C:/x")
@example("..\\x")
def test_a_hostile_name_is_refused_or_inside(folder, name):
    before = sorted(folder.parent.rglob("*"))
    try:
        path = confined(folder, name, "manifest.json")
    except ValueError as error:
        assert "manifest.json names the file" in str(error)  # noqa: PT017
        assert "expected a name inside" in str(error)  # noqa: PT017
        assert len(str(error)) < 700  # noqa: PT017
    else:
        assert path != folder
        assert path.resolve().is_relative_to(folder.resolve())
        assert not {"..", "."} & set(path.relative_to(folder).parts)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "", ".", "..", "a/", "a//b", "./a", "a/../b", "out/x", "out", "file", "dangling",
     "circle/x", "C:/x", "c:x", "a\\b", "\\\\host\\share", "a\0", "\ud800", "x" * 256, "a/" * 2000 + "a", None, 7,
     ["a"]],
)  # fmt: skip
def test_these_names_are_refused(folder, name):
    with pytest.raises(ValueError, match=r"(?s)expected a name inside .*folder"):
        confined(folder, name)


@settings(max_examples=100, deadline=None)
@given(OURS)
def test_an_ordinary_name_is_taken(name):
    if not any(part in ("..", ".") for part in name.split("/")):
        assert confined("/nowhere/at/all", name) == Path("/nowhere/at/all") / name


def test_links_of_the_hub_cache_and_inside_the_folder_are_taken(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "other.json").symlink_to("config.json")
    assert read_json(confined(snapshot, "config.json")) == {}
    assert confined(snapshot, "other.json").is_file()
    (snapshot / "bad.json").symlink_to("../../elsewhere")
    with pytest.raises(ValueError, match="a link out of it"):
        confined(snapshot, "bad.json")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_what_fails_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"ä": 1})
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        _write_and_fail(path)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_bytes() == before == '{\n  "ä": 1\n}\n'.encode()
    assert os.listdir(path.parent) == ["a.json"]


def _write_and_fail(path: Path) -> None:
    with replacing(path) as new:
        new.write_text("half")
        raise ZeroDivisionError


def _write_forever(path: Path) -> None:
    for i in range(10**9):
        write_text(path, str(i % 10) * 200_000)


def test_kill_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "0" * 200_000)
    for seconds in (0.05, 0.08, 0.11):
        process = multiprocessing.get_context("fork").Process(target=_write_forever, args=(path,))
        process.start()
        process.join(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        text = path.read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1


def test_mode_and_links_stay(tmp_path):
    target, link = tmp_path / "real.txt", tmp_path / "link.txt"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("real.txt")
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_an_output_that_cannot_be(tmp_path):
    (tmp_path / "link").symlink_to("nothing/at/all")
    with pytest.raises(FileNotFoundError, match="is a link to nothing/at/all, which is not there"):
        write_text(tmp_path / "link", "x")
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        write_text(tmp_path, "x")


def test_what_a_kill_left_long_ago_is_swept(tmp_path):
    old, recent = tmp_path / ".a.host.1.0.new.txt", tmp_path / ".a.host.2.0.new.txt"
    for path in (old, recent):
        path.write_text("half")
    os.utime(old, (1, 1))
    write_text(tmp_path / "a.txt", "x")
    assert sorted(os.listdir(tmp_path)) == [recent.name, "a.txt"]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "Expecting property name"), (b"", "Expecting value"), (b"[]", r"holds \[\], expected a JSON dict"),
     (b"null", "holds None, expected a JSON dict"), (b"\xff\xfe{}", "no UTF-8|surrog|valid JSON"),
     (b"[" * 100_000, "nested too deep"), (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit")],
)  # fmt: skip
def test_broken_json_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path, advice="copy it again")
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith("copy it again")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
