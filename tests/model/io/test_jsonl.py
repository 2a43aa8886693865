"""JSON Lines files: errors name the bad line, and a failed write leaves the old file."""

import errno
import json
import os
import resource
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimini.model.io.json_files import (
    TEMPORARY,
    atomic_file,
    read_json,
    read_rows,
    write_json,
    write_rows,
    write_text,
)

QUESTIONS = {"question": str, "answer": str}


def in_child(check: Callable[[], None]) -> None:
    """Run `check` in a forked process, because its resource limits must not apply to the test process."""
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the check failed in the child: its traceback is above"


@given(rows=st.lists(
    st.dictionaries(st.text(st.characters(codec="utf-8")),
                    st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(st.characters(codec="utf-8")), min_size=1),
    min_size=1))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_rows_come_back_as_they_went(rows: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", iter(rows))
        assert read_rows(Path(folder) / "rows.jsonl", {}) == rows


def test_json_and_text_come_back_and_make_their_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "deep" / "a.json", {"a": [1, 2.5, None, "é\u2028"]})
    assert read_json(tmp_path / "new" / "deep" / "a.json") == {"a": [1, 2.5, None, "é\u2028"]}
    write_text(tmp_path / "a.txt", "line\r\nü\n")
    assert (tmp_path / "a.txt").read_bytes() == "line\r\nü\n".encode()


BAD_FILES = {
    "empty file": (b"", "rows.jsonl: expected at least one row, got an empty file"),
    "blank lines only": (b"\n \n", "rows.jsonl: expected at least one row"),
    "cut line": (b'{"question": "q", "answer": "1"}\n{"question": "q', "line 2: malformed JSON"),
    "not an object": (b"[1, 2]\n", "line 1: expected an object, got a list"),
    "no answer": (b'\n{"question": "q"}\n', "line 2, field 'answer': expected a string, got no such field"),
    "null answer": (b'{"question": "q", "answer": null}', "line 1, field 'answer': expected a string, got null"),
    "number as answer": (b'{"question": "q", "answer": 42}', "field 'answer': expected a string, got an integer: 42"),
    "blank answer": (b'{"question": "q", "answer": " "}', "line 1, field 'answer': expected text"),
    "blank question": (b'{"question": "", "answer": "1"}', "line 1, field 'question': expected text"),
    "not UTF-8": (b'{"question": "\xff", "answer": "1"}', "line 1: not UTF-8"),
    "NaN": (b'{"question": "q", "answer": "1", "x": NaN}', "line 1: malformed JSON: NaN"),
    "too deep": (b"[" * 100_000, "line 1: malformed JSON: nested too deeply"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", "line 1: malformed JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_row_is_named(case: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[case]
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_rows(tmp_path / "rows.jsonl", QUESTIONS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [(int, 3, True), (int, 3, 3.0), (float, 3, True), (float, 0.5, "0.5"), (bool, True, 1), (list, [1], {}), (dict, {}, [])],
    ids=str,
)  # fmt: skip
def test_types_are_exact(kind: type, good: object, bad: object, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"x": good}])
    assert read_rows(tmp_path / "rows.jsonl", {"x": kind}) == [{"x": good}]
    write_rows(tmp_path / "rows.jsonl", [{"x": good}, {"x": bad}])
    with pytest.raises(ValueError, match="line 2, field 'x'"):
        read_rows(tmp_path / "rows.jsonl", {"x": kind})


def test_a_response_may_be_empty_and_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"response": ""}\r\n\r\n')
    assert read_rows(tmp_path / "rows.jsonl", {"response": str}) == [{"response": ""}]


def test_a_missing_file_and_malformed_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        read_rows(tmp_path / "gone.jsonl", {})
    (tmp_path / "a.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"a\.json: malformed JSON: .*line 2"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}], ids=str)
def test_what_json_cannot_hold_is_named_and_the_old_file_stays(
    value: object, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 2: not writable as JSON"):
        write_rows(tmp_path / "rows.jsonl", [{"a": 1}, {"a": value}])
    assert read_rows(tmp_path / "rows.jsonl", {}) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"], "a temporary file was left"


def test_a_lone_surrogate_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl: not writable as UTF-8"):
        write_rows(tmp_path / "rows.jsonl", [{"a": "\ud800"}])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit of 64 KiB on files, which fails in the middle of a file like a full disk."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])

    def check() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        with pytest.raises(
            OSError, match="cannot write: .*the file that was there is unchanged.*rows.jsonl"
        ):
            write_rows(path, ({"a": "x" * 1000} for _ in range(1000)))

    in_child(check)
    assert read_rows(path, {}) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"], "a temporary file was left"


def test_no_permission_leaves_the_old_file() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        folder = Path(name)
        write_rows(folder / "rows.jsonl", [{"a": 1}])
        folder.chmod(0o555)

        def check() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)  # root may write anywhere
            with pytest.raises(
                PermissionError, match="cannot write: Permission denied; the file that was there"
            ):
                write_rows(folder / "rows.jsonl", [{"a": 2}])
            with pytest.raises(PermissionError, match="no file was left.*new.json"):
                write_json(folder / "new.json", {})

        in_child(check)
        assert json.loads((folder / "rows.jsonl").read_text()) == {"a": 1}
        folder.chmod(0o755)


def test_a_binary_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    chunk = bytes(range(256)) * 4096  # 1 MiB
    with atomic_file(path) as file:
        for _ in range(8):
            file.write(chunk)
        assert not path.exists(), "not before it is whole"
        (temporary,) = tmp_path.iterdir()
        assert TEMPORARY.fullmatch(temporary.name), "what a killed writer leaves is recognised"
    assert path.read_bytes() == chunk * 8 and list(tmp_path.iterdir()) == [path]

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(OSError, match="cannot write: .*file that was there is unchanged.*bin"):
            with atomic_file(path) as file:
                file.writelines([chunk] * 8)

    in_child(full_disk)
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == chunk * 8 and list(tmp_path.iterdir()) == [path]


def test_the_bytes_and_the_name_reach_the_disk_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave the new name with no bytes behind it."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append("folder flushed" if target == tmp_path else "file flushed")
        if target != tmp_path:
            assert target.read_bytes() == b"bytes", "what Python buffers is written before"
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    with atomic_file(tmp_path / "file") as file:
        file.write(b"bytes")
    assert done == ["file flushed", "renamed", "folder flushed"]


def test_a_file_system_that_cannot_flush_a_folder_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}") == str(tmp_path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


def test_a_file_where_a_folder_should_be_is_a_clear_error(tmp_path: Path) -> None:
    write_text(tmp_path / "runs", "a file")
    with pytest.raises(OSError, match="cannot write: .*no file was left.*rows.jsonl"):
        write_rows(tmp_path / "runs" / "rows.jsonl", [{"a": 1}])
    with pytest.raises(IsADirectoryError, match="cannot write"):
        write_text(tmp_path, "text")


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])
    pid = os.fork()
    if pid == 0:

        def rows():
            yield {"a": "x" * 100_000}
            os.kill(os.getpid(), 9)

        write_rows(path, rows())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert read_rows(path, {}) == [{"a": 1}]


def test_a_link_keeps_pointing_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "elsewhere" / "rows.jsonl")
    write_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    assert (tmp_path / "rows.jsonl").is_symlink()
    assert read_rows(tmp_path / "elsewhere" / "rows.jsonl", {}) == [{"a": 1}]
