"""The prose lint and the counts: findings in a tree that breaks the rule, and a tree that keeps it."""

from pathlib import Path

import counts
import prose
import pytest

ROOT = Path(__file__).parents[2]
GOOD = '"""Sum of two numbers."""\n\n\ndef add(a, b):\n    """Return `none` + b."""\n    return a + b\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for package in prose.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "good.py").write_text(GOOD * 20)
    (tmp_path / "README.md").write_text("# Title\n\nOne paragraph.\n\n```\n\nWhat is code\n```\n")
    return tmp_path


def test_good_text_passes(tree: Path, capsys: pytest.CaptureFixture) -> None:
    assert prose.main(tree) == 0
    assert "prose: kernels: 0 of 21 first lines" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ["What a rank holds.", "Whether it is right.", "None of the ranks.", "Ranks that nobody uses.", "Rows held to it."],
)  # fmt: skip
def test_a_clumsy_first_line_is_reported(
    tree: Path, capsys: pytest.CaptureFixture, line: str
) -> None:
    (tree / "model" / "bad.py").write_text(f'\n\nclass A:\n    """{line}"""\n' * 3)
    assert prose.main(tree) == 1
    out = capsys.readouterr().out
    assert f"in the first line: {line}" in out and "model/bad.py:3: " in out


def test_one_in_a_hundred_is_allowed(tree: Path) -> None:
    (tree / "model" / "bad.py").write_text('"""What a rank holds."""\n')
    assert prose.main(tree) == 0
    (tree / "model" / "worse.py").write_text('"""What a rank holds."""\n')
    assert prose.main(tree) == 1


@pytest.mark.parametrize(
    "code", ["def roll_call():\n    pass\n", "def f(young):\n    pass\n", "beside = 1\n", "class once:\n    pass\n"]
)  # fmt: skip
def test_an_invented_name_is_reported(tree: Path, capsys: pytest.CaptureFixture, code: str) -> None:
    (tree / "bench" / "bad.py").write_text(code)
    assert prose.main(tree) == 1
    assert "bench/bad.py:1: " in capsys.readouterr().out


def test_a_module_with_an_invented_name_is_reported(tree: Path) -> None:
    (tree / "tests" / "words.py").write_text(GOOD)
    assert prose.main(tree) == 1


def test_a_readme_is_read(tree: Path, capsys: pytest.CaptureFixture) -> None:
    (tree / "kernels" / "README.md").write_text("## What it is\n\n- Nothing else.\n" + "\nA.\n" * 5)
    assert prose.main(tree) == 1
    out = capsys.readouterr().out
    assert "kernels/README.md:1: 'What'" in out and "kernels/README.md:3: 'Nothing'" in out


def test_counts(tree: Path, capsys: pytest.CaptureFixture) -> None:
    counts.main(tree)
    out = capsys.readouterr().out
    assert "lines: model: 120\n" in out and "lines: product: 600; tests: 120\n" in out
    assert "files: model: 1\n" in out and "files: 6 in 6 folders, at most 1\n" in out
    assert "prose: 0 of 128 first lines" in out
