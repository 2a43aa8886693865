"""The GPU checklist names every test that needs a GPU."""

import ast
from pathlib import Path

from phimini.stages.run.gpu_checklist import CHECKS, checklist

ROOT = Path(__file__).parents[3]


def gpu_tests() -> set[str]:
    return {
        f"{file.relative_to(ROOT)}::{node.name}"
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d).startswith("pytest.mark.gpu") for d in node.decorator_list)
    }


def test_every_gpu_test_is_on_the_list_and_every_entry_exists() -> None:
    listed = [test for check in CHECKS for test in check.tests]
    assert len(listed) == len(set(listed))
    assert set(listed) == gpu_tests() and listed


def test_the_list_says_what_to_run_and_how_it_was_checked() -> None:
    page = checklist()
    for check in CHECKS:
        assert check.command in page and check.without_a_gpu in page


def test_no_pytest_command_forks_ranks_from_the_process_that_has_started_cuda() -> None:
    """`make test` does: `run_ranks` refuses once a test before it has used the GPU."""
    for check in CHECKS:
        assert "make test" not in check.command
        for command in check.command.split("; "):
            if command.startswith("pytest ") and "-m gpu" not in command:
                for file in command.split()[1:]:
                    assert "run_ranks" not in (ROOT / file).read_text(), file
