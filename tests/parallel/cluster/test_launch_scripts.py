"""The scripts, word for word; and that bash runs them as meant, with stand-ins for srun and torchrun."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from phimini.parallel.cluster.job_scripts import LaunchSettings, render_slurm, render_torchrun
from phimini.stages.cli import main

COMMAND = ("recipe", "tiny", "out=runs/it's a $HOME; `run`")
ENVIRONMENT = """\
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron's overlap of tensor-parallel communication needs it
export PYTORCH_ALLOC_CONF=expandable_segments:True  # packed batches differ in size: less fragmentation
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a rank whose peer died ends instead of hanging
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder says which collective hung
export TORCH_FR_BUFFER_SIZE=2000  # collectives the flight recorder remembers
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # ranks that start again meet in a new store, not in the one of the failed attempt
export NCCL_DEBUG=WARN  # NCCL says why it gave up
export NCCL_IB_TIMEOUT=22  # InfiniBand retries for about a minute before an error
export NCCL_IB_QPS_PER_CONNECTION=4  # several paths through the fabric per connection
export NVTE_FWD_LAYERNORM_SM_MARGIN=16  # leaves SMs to communication that overlaps
export NVTE_BWD_LAYERNORM_SM_MARGIN=16  # leaves SMs to communication that overlaps
export PYTHONFAULTHANDLER=1  # a crash prints Python's stack
"""

SLURM = """\
#!/bin/bash
# sbatch this file: 16 x 8 = 128 ranks
#SBATCH --job-name=phimini
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

source .venv/bin/activate

{ENVIRONMENT}export OMP_NUM_THREADS=12
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
id="phimini-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
launch=(
    srun --cpus-per-task=96 --kill-on-bad-exit=1
    torchrun
    --nnodes 16 --rdzv-backend c10d --rdzv-endpoint "$head:29500"
    --nproc-per-node 8
    --shutdown-timeout 290
    --numa-binding node
)
"${launch[@]}" --rdzv-id "$id-doctor" --max-restarts 0 -m phimini.stages.cli doctor --dist tensor=4 'out=runs/my run'
exec "${launch[@]}" --rdzv-id "$id-run" --max-restarts 3 -m phimini.stages.cli recipe phi4_mini_reasoning tensor_parallel=4 context_parallel=1 'out=runs/my run'
"""

TORCHRUN = """\
#!/bin/bash
# HEAD=<first node> bash this file, on every node: 2 x 4 = 8 ranks
set -euo pipefail

{ENVIRONMENT}export OMP_NUM_THREADS=12

head="${HEAD:?set it to the name of the first node: HEAD=<first node> bash this file, on every node}"
id="phimini"
launch=(
    torchrun
    --nnodes 2 --rdzv-backend c10d --rdzv-endpoint "$head:29500"
    --nproc-per-node 4
    --shutdown-timeout 290
)
"${launch[@]}" --rdzv-id "$id-doctor" --max-restarts 0 -m phimini.stages.cli doctor --dist out=runs/tiny
exec "${launch[@]}" --rdzv-id "$id-run" --max-restarts 3 -m phimini.stages.cli recipe tiny
"""


def rendered(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["launch", *arguments]) == 0
    return capsys.readouterr().out


def test_slurm_script(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["nodes=16", "partition=gpu", "interface=ib0"]
    words += [
        "--",
        "recipe",
        "phi4_mini_reasoning",
        "tensor_parallel=4",
        "context_parallel=1",
        "out=runs/my run",
    ]
    expected = SLURM.replace("{ENVIRONMENT}", ENVIRONMENT)
    assert rendered(["slurm", *words], capsys) == expected


def test_a_word_that_the_command_would_refuse_is_refused_when_the_script_is_printed() -> None:
    assert main(["launch", "slurm", "--", "recipe", "tiny", "sede=1"]) == 2
    assert main(["launch", "slurm", "--", "sft", "tinny"]) == 2


def test_torchrun_script(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["nodes=2", "gpus=4", "numa=false", "venv=none", "--", "recipe", "tiny"]
    expected = TORCHRUN.replace("{ENVIRONMENT}", ENVIRONMENT)
    assert rendered(["torchrun", *words], capsys) == expected


SETTINGS = {
    "plain": {},
    "one node": dict(nodes=1, numa=False, doctor=False),
    "everything": dict(
        nodes=16, interface="ib0", partition="gpu,spare", account="a.b", time="2-0", name="x_1.b-c",
        venv="my env's $HOME", save_seconds=5, max_restarts=0,
    ),
}  # fmt: skip
SBATCH = {
    "job-name": r"\w[\w.-]*", "nodes": r"[1-9]\d*", "ntasks-per-node": "1", "gpus-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*", "time": r"(\d+-)?\d+(:\d+){0,2}", "partition": r"[\w.,-]+", "account": r"[\w.-]+",
    "signal": r"TERM@\d+", "output": r"\S+", "open-mode": "append", "exclusive": None, "requeue": None,
}  # fmt: skip
"""Options of sbatch(1) with their forms; None for a flag."""


def check_sbatch_header(script: str) -> dict[str, str | None]:
    """Return the options that sbatch would read, checked as `sbatch --test-only` does: it reads to the first command."""
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash", "sbatch refuses a file that names no interpreter"
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options: dict[str, str | None] = {}
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            assert number < first_command, f"sbatch would ignore {line!r}"
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line)
            assert match, line
            name, value = match.groups()
            assert name in SBATCH and name not in options, line
            form = SBATCH[name]
            assert value is None if form is None else value and re.fullmatch(form, value), line
            options[name] = value
    return options


@pytest.mark.parametrize("render", [render_slurm, render_torchrun])
@pytest.mark.parametrize("name", SETTINGS)
def test_bash_accepts_the_script(render: Any, name: str, tmp_path: Path) -> None:
    text = render(LaunchSettings(command=COMMAND, **SETTINGS[name]))
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "{" not in re.sub(r"\$\{[^}]*\}", "", text), "no template syntax is left"


@pytest.mark.parametrize("name", SETTINGS)
def test_sbatch_accepts_the_header(name: str) -> None:
    options = check_sbatch_header(render_slurm(LaunchSettings(command=COMMAND, **SETTINGS[name])))
    optional = {"partition", "account"} - SETTINGS[name].keys()
    assert options.keys() == SBATCH.keys() - optional
    assert int(options["cpus-per-task"] or 0) == 12 * int(options["gpus-per-node"] or 0)


def test_the_header_check_finds_faults() -> None:
    good = render_slurm(LaunchSettings(command=COMMAND))
    for old, new in [
        ("#SBATCH --nodes=1", "#SBATCH --nodes=one"),
        ("#SBATCH --nodes=1", "#SBATCH --node=1"),
        ("#SBATCH --nodes=1", "set -e\n#SBATCH --nodes=1"),
        ("#!/bin/bash", "# no shell"),
    ]:
        assert old in good
        with pytest.raises(AssertionError):
            check_sbatch_header(good.replace(old, new))


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run_script(
    text: str, folder: Path, *, fail: str = "nothing", **environment: str
) -> tuple[int, list[list[str]], str]:
    """Exit status, the words of every torchrun that was started, and stderr; one whose words contain `fail` fails."""
    (folder / "bin").mkdir(exist_ok=True)
    log = folder / "log"
    log.unlink(missing_ok=True)
    python = (
        "import json, os, sys; print(json.dumps([os.environ['NCCL_IB_TIMEOUT'], *sys.argv[1:]]))"
    )
    record = f'python3 -c "{python}" "$@" >> {log}\n'
    stand_in(folder / "bin", "torchrun", record + f'if [[ "$*" == *"{fail}"* ]]; then exit 3; fi')
    stand_in(folder / "bin", "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    # The second name comes late: who stopped reading at the first would end scontrol, and with pipefail the job.
    stand_in(folder / "bin", "scontrol", "echo first; sleep 0.1; echo second")
    script = folder / "job.sh"
    script.write_text(text)
    done = subprocess.run(
        ["bash", script],
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
    )
    started = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, started, done.stderr


def test_slurm_runs_the_doctor_and_then_the_command(tmp_path: Path) -> None:
    text = render_slurm(LaunchSettings(nodes=2, venv=None, command=COMMAND))
    environment = {"SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "7"}
    status, started, stderr = run_script(text, tmp_path, **environment)
    assert status == 0, stderr
    doctor, run = started
    assert doctor[-5:] == ["0", "-m", "phimini.stages.cli", "doctor", "--dist"]
    assert run[-6:] == ["3", "-m", "phimini.stages.cli", *COMMAND], "words survive bash"
    for words in started:
        assert words[0] == "22", "exported to the ranks"
        assert words[words.index("--rdzv-endpoint") + 1] == "first:29500"
    identities = [words[words.index("--rdzv-id") + 1] for words in started]
    assert identities == ["phimini-7-0-doctor", "phimini-7-0-run"]


def test_a_sick_rank_stops_the_job_before_the_command(tmp_path: Path) -> None:
    text = render_torchrun(LaunchSettings(venv=None, command=COMMAND))
    status, started, _ = run_script(text, tmp_path, fail="doctor")
    assert status == 3 and len(started) == 1
    status, started, _ = run_script(text, tmp_path, fail="recipe")
    assert status == 3 and len(started) == 2, "the command's status is the job's"
    without = render_torchrun(LaunchSettings(venv=None, command=COMMAND, doctor=False))
    status, started, _ = run_script(without, tmp_path)
    assert status == 0 and [words[-3] for words in started] == ["recipe"]


def test_several_nodes_by_hand_need_a_head(tmp_path: Path) -> None:
    text = render_torchrun(LaunchSettings(nodes=2, venv=None, command=COMMAND))
    status, started, stderr = run_script(text, tmp_path)
    assert status != 0 and not started and "HEAD: set it to the name of the first node" in stderr
    status, started, _ = run_script(text, tmp_path, HEAD="n1")
    assert status == 0 and started[0][started[0].index("--rdzv-endpoint") + 1] == "n1:29500"


def test_sigterm_for_the_script_reaches_torchrun(tmp_path: Path) -> None:
    """The script becomes torchrun, which then passes the signal on to its ranks."""
    text = render_torchrun(LaunchSettings(venv=None, command=COMMAND, doctor=False))
    (tmp_path / "bin").mkdir()
    stand_in(
        tmp_path / "bin",
        "torchrun",
        'trap "exit 42" TERM; echo ready; while :; do sleep 0.05; done',
    )
    process = subprocess.Popen(
        ["bash", "-c", text],
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.wait(10) == 42
    process.stdout.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "launch: got nothing; expected one of torchrun"),
        (["pbs", "--", "recipe"], "launch: got pbs; expected one of torchrun"),
        (["slurm", "nodes=2"], "no command"),
        (
            ["slurm", "nodes=two", "--", "recipe"],
            "launch nodes: expected a whole number from 1 to 100000, got 'two'",
        ),
        (
            ["slurm", "nodes=0", "--", "recipe"],
            "launch nodes: expected a whole number from 1 to 100000, got 0",
        ),
        (["slurm", "node=2", "--", "recipe"], "unknown 'node=2'; did you mean nodes"),
        (["slurm", "time=none", "--", "recipe"], "time='none': expected Slurm's form"),
        (
            ["slurm", "venv=", "--", "recipe"],
            "launch venv: expected text that is not empty or none, got ''",
        ),
        (["slurm", "time=soon", "--", "recipe"], "expected Slurm's form"),
        (["slurm", "name=a b", "--", "recipe"], "expected letters"),
        (["slurm", "name=-a", "--", "recipe"], "expected letters"),
        (
            ["slurm", "port=70000", "--", "recipe"],
            "launch port: expected a whole number from 1 to 65535, got 70000",
        ),
        (["slurm", "partition=a\n#SBATCH --x", "--", "recipe"], "expected one word"),
        (["slurm", "numa=yes", "--", "recipe"], "launch numa: expected true or false, got 'yes'"),
    ],
    ids=lambda v: "" if isinstance(v, list) else v[:24],
)
def test_bad_settings_are_explained(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["launch", *words]) == 2
    assert message in capsys.readouterr().err
