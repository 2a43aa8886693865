"""The planted mistakes of `mutations.py`: that they still apply, and, by name, that the tests catch them all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, caught_by, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_mutation_applies(mutation: Mutation) -> None:
    compile(mutated(mutation), mutation.file, "exec")


def test_there_are_enough_with_names_of_their_own() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 20


def test_source_that_cannot_run_is_not_called_caught() -> None:
    failed = "FAILED tests/test_x.py::test_y[(3, 8)]"
    assert caught_by(1, f"E   AssertionError: loss: 1 > 0\n{failed}") is not None
    assert caught_by(1, f"E   NameError: name 'z' is not defined\n{failed}") is None
    assert caught_by(0, "1 passed") is None


@pytest.mark.optin
@pytest.mark.skipif(not os.environ.get("PHIMINI_MUTATIONS"), reason="PHIMINI_MUTATIONS=1 runs them")
def test_the_tests_catch_every_mutation() -> None:
    script = Path(__file__).parents[1] / "support" / "kernels" / "mutations.py"
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
