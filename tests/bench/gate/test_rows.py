"""Rows keep what was measured, say where, and refuse what they cannot mean."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phimini.bench.gate.environment import environment, slug_of
from phimini.bench.gate.rows import Band, Row, SchemaError, read, read_all, write


def make_row(**changes: Any) -> Row:
    settings: dict[str, Any] = dict(
        bench="kernels", case={"op": "rope", "T": 64}, provider="phimini", unit="ms", samples=[4.0, 1.0, 2.0, 3.0],
        reference="eager", reference_samples=[8.0, 1.0, 4.0, 3.0], peak_bytes=7, error=1e-7, info={"gb_s": 1.5},
    )  # fmt: skip
    return Row(**settings | changes)


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written = [make_row(), make_row(provider="eager", reference=None, reference_samples=[])]
    write(path, written, [{"reason": "first"}])
    got, blessings = read_all(path)
    assert got == [dataclasses.replace(r, environment=environment()) for r in written]
    assert blessings == [{"reason": "first"}]
    line = json.loads(path.read_text().splitlines()[1])
    assert line["value"] == {"p20": 1.6, "p50": 2.5, "p80": 3.4} and line["ratio"]["p50"] == 0.75
    again = tmp_path / "again.jsonl"
    write(again, got, blessings)
    assert again.read_bytes() == path.read_bytes()


def test_quantiles_and_the_ratio_round_by_round() -> None:
    row = make_row()
    assert row.value == Band(p20=1.6, p50=2.5, p80=3.4)
    # rounds: 1/2, 1, 1/2, 1; the ratio of the medians would be 2.5 / 3.5
    assert row.ratio == Band(p20=0.5, p50=0.75, p80=1.0)
    assert row.key == "kernels:T=64,op=rope:phimini:ms" and len(row.samples) == 4
    assert Band.of([3.0]) == Band(p20=3.0, p50=3.0, p80=3.0)


def test_a_wrong_result_has_no_value() -> None:
    row = make_row(correct=False, samples=[], reference_samples=[], error=float("nan"))
    assert (row.value, row.ratio, row.error, row.reference) == (None, None, None, "eager")
    assert (row.samples, row.ratios) == ([], [])
    with pytest.raises(ValueError, match="expected samples if and only if correct, got 4"):
        make_row(correct=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unit": "s"}, "unit: expected one of .*'ms'.*got 's'"),
        ({"samples": []}, "samples if and only if correct, got 0"),
        ({"samples": [1.0, 2.0, 3.0]}, "reference_samples: expected 3 of the same rounds, got 4"),
        ({"samples": [1.0, 0.0, 1.0, 1.0]}, r"positive finite numbers, got \[.*0.0.*\]"),
        ({"samples": [1.0, float("nan"), 1.0, 1.0]}, r"positive finite numbers, got \[.*nan.*\]"),
        (
            {"reference_samples": [1.0, 1.0, 1.0, 0.0]},
            r"reference_samples: .*positive finite numbers, got \[.*0.0.*\]",
        ),
        ({"reference": None}, "expected reference and reference_samples together"),
        ({"reference_samples": []}, "expected reference and reference_samples together"),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_samples_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_row(**changes)
    assert str(caught.value).startswith("row kernels, {'op': 'rope', 'T': 64}, phimini")


def test_two_rows_with_one_key_are_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [make_row()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="one row per key, got several of kernels:T=64,op=rope"):
        write(path, [make_row(), make_row(peak_bytes=8)])
    with pytest.raises(ValueError, match="rows.jsonl: row 2: not writable as JSON"):
        write(path, [make_row(info={"x": float("inf")})])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not an object": (lambda row: 3, "expected an object, got 3"),
    "kind": (lambda row: row | {"kind": "rows"}, "kind: expected environment, row or blessing, got 'rows'"),
    "field missing": (lambda row: {k: v for k, v in row.items() if k != "unit"}, r"lacks \['unit'\]"),
    "field unknown": (lambda row: row | {"colour": 1}, r"has \['colour'\] too"),
    "type": (lambda row: row | {"unit": 4}, "field 'unit': expected str, got 4"),
    "number": (lambda row: row | {"samples": [1.0, "2", 3.0, 4.0]}, r"samples: .*got \[1.0, '2'"),
    "rounds": (lambda row: row | {"samples": [1.0]}, "reference_samples: expected 1 of the same rounds, got 4"),
    "bool for int": (lambda row: row | {"peak_bytes": True}, "'peak_bytes': expected int or null, got True"),
    "environment": (lambda row: row | {"environment": "ab"}, "expected the id of an earlier line, got ab"),
    "environment's id": (lambda row: row | {"environment": [1]}, r"expected the id of an earlier line, got \[1\]"),
    "unit": (lambda row: row | {"unit": "parsecs"}, "unit: expected one of .*'ms'.*, got 'parsecs'"),
    "huge number": (lambda row: row | {"samples": [10**400] * 4}, "samples: expected positive finite numbers"),
    "bool for number": (lambda row: row | {"samples": [True] * 4}, r"positive finite numbers, got \[True"),
    "path for a bench": (lambda row: row | {"bench": "../../x"}, "bench: expected a word .* got '../../x'"),
    "wrong with samples": (lambda row: row | {"correct": False}, "samples if and only if correct, got 4"),
    "name": (lambda row: row | {"provider": "\ud800"}, "expected printable names"),
    "run to run": (lambda row: row | {"run_to_run": 1e308}, "run_to_run: expected a share of at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [make_row()])
    lines = path.read_text().splitlines()
    change, message = DAMAGE[damage]
    path.write_text(f"{lines[0]}\n\n{json.dumps(change(json.loads(lines[1])))}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 3")  # the blank line counts


@pytest.mark.parametrize(
    ("field", "value"), [("id", [1]), ("id", None), ("slug", "../.."), ("slug", "")]
)
def test_a_damaged_environment_is_named(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [make_row()])
    first, second = path.read_text().splitlines()
    path.write_text(f"{json.dumps(json.loads(first) | {field: value})}\n{second}\n")
    with pytest.raises(ValueError, match=f"line 1, environment.* {field}|'{field}'"):
        read(path)


def test_a_file_with_two_rows_of_one_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [make_row()])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second}\n{second}\n")
    with pytest.raises(ValueError, match="line 3: expected one row per key, got several"):
        read(path)


def test_another_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [make_row()])
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 1'))
    with pytest.raises(SchemaError, match="line 1: schema: expected 2, got 1"):
        read(path)


def test_the_environment_says_where() -> None:
    here = environment()
    assert here.threads == torch.get_num_threads() and here.versions["torch"] == torch.__version__
    assert here.device and here.slug == slug_of(here.device)
    assert here.commit is None or len(here.commit) == 40
    same = dataclasses.replace(here, commit="other", dirty=not here.dirty, date="1999-01-01")
    assert here.changes(same) == []
    others: list[dict[str, Any]] = [{"threads": 64}, {"power_cap_w": 350.0}, {"driver": "1"}, {"device": "x"},
                                    {"versions": here.versions | {"torch": "1"}}]  # fmt: skip
    for other in others:
        (change,) = here.changes(dataclasses.replace(here, **other))
        assert change.startswith(next(iter(other)) if "versions" not in other else "torch was")
    assert slug_of("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
