"""The scripts at the top of the repository, by the names users know."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHERS = {"load_dataset": "prepare", "train": "train", "demo": "demo", "bench": "bench", "debug": "inspect"}


def launch(name: str, *words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *words], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(("name", "command"), LAUNCHERS.items())
def test_help_shows_examples(name: str, command: str) -> None:
    done = launch(name, "--help")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(f"usage: flowt2i {command}") and "examples:" in done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_docstring_shows_a_command(name: str) -> None:
    assert f"python {name}.py" in (ROOT / f"{name}.py").read_text()


def test_a_mistake_is_one_line_and_exit_2() -> None:
    done = launch("train", "--config", "quikstart")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "quickstart" in done.stderr


def test_debug_without_an_argument_takes_the_newest_dataset(tmp_path: Path) -> None:
    assert launch("debug", folder=tmp_path).returncode == 2  # none there: argparse asks for one
    for name in ("older", "newer"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "dataset.json").write_text("{}")
    os.utime(tmp_path / "data" / "older" / "dataset.json", (1, 1))
    done = launch("debug", folder=tmp_path)
    assert done.returncode == 2 and "newer" in done.stderr and "older" not in done.stderr
