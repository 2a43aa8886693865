"""A wheel built from the repository holds every package and runs from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ["kernels", "model", "parallel", "stages", "bench"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    source = (
        folder / "source"
    )  # setuptools leaves a build folder, and would ship what is stale in it
    for name in LAYERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-deps", "-w", folder, source],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = folder.glob("phimini-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_every_package_and_nothing_else(unpacked: Path) -> None:
    shipped = {str(p.relative_to(unpacked / "phimini")) for p in unpacked.rglob("phimini/**/*") if p.is_file()}  # fmt: skip
    found = [p for f in LAYERS for p in [*(ROOT / f).rglob("*.py"), ROOT / f / "py.typed"]]
    found += (ROOT / "bench" / "baselines").rglob("*.json*")
    found += [p for f in LAYERS for p in (ROOT / f).rglob("templates/*")]
    found += (ROOT / "parallel" / "cluster").glob("*.sh.j2")
    assert ROOT / "stages/report/templates/report.html.j2" in found
    assert {p for p in shipped if not p.endswith(".pyc")} == {
        str(p.relative_to(ROOT)) for p in found
    }
    outside = [p.name for p in unpacked.iterdir() if p.name != "phimini"]
    assert len(outside) == 1 and outside[0].endswith(".dist-info")


def test_the_installed_command_runs_from_any_folder(unpacked: Path, tmp_path: Path) -> None:
    """Writes a data set from the wheel's code: no file of the checkout is needed."""
    code = (
        "import sys, phimini.kernels as k; print(k.__file__); "
        "from phimini.stages.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "distill", "tiny", "out=run", "distill.num_problems=20",
         "distill.num_prompts=10", "distill.num_heldout=21", "distill.num_validation=21"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(unpacked)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.splitlines()[0].startswith(str(unpacked))
    assert (tmp_path / "run" / "distill" / "rollouts.jsonl").exists()


def test_pytest_finds_the_plugin_of_the_wheel_without_loading_torch(
    unpacked: Path, tmp_path: Path
) -> None:
    """A project that lists the plugin in its conftest.py too still gets it once."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["phimini.bench.gate.pytest_plugin"]\n')
    (tmp_path / "test_plain.py").write_text(
        "import sys, pytest\n"
        "@pytest.mark.bench\n"
        "def test_plain(request):\n"
        "    assert request.config.getoption('--bench-save') is None\n"
        "    import phimini.bench.gate.pytest_plugin as plugin\n"
        f"    assert plugin.__file__.startswith({str(unpacked)!r})\n"
        "    assert 'torch' not in sys.modules\n"
    )
    for left_out in ("", "conftest.py"):
        (tmp_path / left_out).unlink() if left_out else None
        process = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "--strict-markers", "-c", "/dev/null", "--rootdir", tmp_path,
             tmp_path],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(unpacked)}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
