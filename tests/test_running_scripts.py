"""The job scripts of docs/running.md do what the page says: run as they stand, with stand-ins for what this machine has not."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUIET

from flowt2i.verify_resume import compare

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def script(word: str) -> str:
    """The one bash script of the page that holds a word."""
    found = [block for block in re.findall(r"```bash\n(#!/bin/bash.*?)```", (ROOT / "docs" / "running.md").read_text(), re.S) if word in block]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def words(scenes_data, tiny) -> list[str]:
    """What `train` is really run with, whatever a script asks for: a tiny model and 60 steps."""
    return ["train", "--config", "quickstart", "--data", str(scenes_data), *tiny, *QUIET, "--train.steps", "60", "--train.checkpoint_every", "5"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> Path:
    """The same without a stop, to compare with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run([sys.executable, "-m", "flowt2i.cli", *words, "--out", run], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run


@pytest.fixture
def place(words, tmp_path):
    """A folder with stand-ins on its PATH."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    train = f"cd {ROOT} && exec {sys.executable} -m flowt2i.cli {' '.join(words)} --resume latest --out {tmp_path}/run"
    log = f'echo "$@" >> {tmp_path}/scontrol.log; echo here'
    for name, body in {"srun": 'exec "$@"', "scontrol": log, "torchrun": train, "flowt2i": train, "sleep": ""}.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here"}
    return tmp_path, {**os.environ, **job, "PATH": f"{bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def start(text: str, place) -> subprocess.Popen:
    folder, env = place
    (folder / "job.sh").write_text(text)
    return subprocess.Popen(["bash", "job.sh"], cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for_steps(folder: Path, number: int, process: subprocess.Popen) -> None:
    log, end = folder / "run" / "log.jsonl", time.monotonic() + 300
    while not log.exists() or log.read_text().count("\n") < number:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def test_slurm(place, whole):
    folder, _ = place
    job = start(script("#SBATCH"), place)
    wait_for_steps(folder, 8, job)
    os.kill(job.pid, signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
    assert job.wait(300) == 3
    assert (folder / "scontrol.log").read_text().splitlines() == ["show hostnames here", "requeue 7"]
    assert start(script("#SBATCH"), place).wait(300) == 0  # what the requeued job does
    assert "requeue" not in (folder / "scontrol.log").read_text().splitlines()[2:]
    assert compare(whole, folder / "run")["equal"]


def test_the_loop_starts_again_after_a_kill(place, whole):
    folder, _ = place
    job = start(script("while true"), place)
    wait_for_steps(folder, 12, job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    if not children.exists():
        job.terminate()
        pytest.skip("needs Linux's /proc")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert job.wait(300) == 0
    assert compare(whole, folder / "run")["equal"]


def test_the_loop_ends_when_it_is_stopped(place):
    folder, _ = place
    job = start(script("while true"), place)
    wait_for_steps(folder, 8, job)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(300) == 3
