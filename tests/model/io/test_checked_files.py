"""Files whose damage is noticed: any changed byte, missing or additional rows, and files that may only become longer."""

from pathlib import Path

import pytest

from phimini.model.io.checked_files import check_file, describe_file, read_sealed, write_sealed
from phimini.model.io.json_files import write_rows


def test_any_flipped_bit_of_a_sealed_file_is_refused(tmp_path: Path) -> None:
    path, content = (
        tmp_path / "a.json",
        {"steps": 3, "rate": 1e-07, "name": "é", "of": [1, {"x": None}]},
    )
    write_sealed(path, content)
    assert read_sealed(path) == content
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=r"a\.json: .*: the file is damaged"):
                read_sealed(path)


def test_a_sealed_file_under_another_name_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", {"x": 1})
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"b\.json: .*: the file is damaged"):
        read_sealed(tmp_path / "b.json")


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"sha256": 1}'])
def test_a_file_that_was_not_sealed_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: .*: the file is damaged"):
        read_sealed(tmp_path / "a.json")


def test_a_change_to_a_described_file_is_named_with_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"n": i} for i in range(4)])
    described = describe_file(path)
    assert described["bytes"] == 4 * 9 and described["rows"] == 4
    check_file(path, described)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"2", b"3"))
    with pytest.raises(ValueError, match=r"rows\.jsonl: its content has changed .*: expected sha256 \w{12}, got \w{12}"):  # fmt: skip
        check_file(path, described)
    check_file(path, described, content=False)  # sizes alone
    path.write_bytes(whole[:18])
    for content in (True, False):
        with pytest.raises(ValueError, match=r"rows\.jsonl: has 18 bytes in 2 rows, expected 36 bytes in 4 rows: the file is damaged"):  # fmt: skip
            check_file(path, described, content=content)
    path.unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl: this file is missing; expected 36 bytes in 4 rows"):  # fmt: skip
        check_file(path, described)


def test_a_file_that_became_longer_is_compared_up_to_its_former_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"1\n2\n")
    described = describe_file(path)
    path.write_bytes(b"1\n2\n3\n")
    check_file(path, described, prefix=True)
    assert describe_file(path, 4) == described
    for damaged in (b"1\n", b"1\n3\n3\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: "):
            check_file(path, described, prefix=True)
