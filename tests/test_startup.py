"""`flowt2i --help` waits for nothing that it does not need: seen in what is imported, not in seconds."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "transformers", "diffusers", "datasets", "gradio", "pyarrow", "PIL", "pydantic", "matplotlib", "tokenizers", "pandas", "scipy"}


def imported(*words: str) -> set[str]:
    """Top-level modules that are there after a command."""
    return modules_after(f"from flowt2i.cli import main\ntry:\n    main({list(words)!r})\nexcept SystemExit as end:\n    assert not end.code\n")


def modules_after(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys\nprint('MODULES', *sys.modules)"], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()[1:]}


@pytest.mark.parametrize("words", [["--help"], [], ["--version"]])
def test_help_needs_argparse_alone(words):
    assert not imported(*words) & HEAVY


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "bench", "demo", "doctor", "export", "inspect", "models", "verify-resume"])
def test_help_of_a_command_needs_no_torch(command):
    assert not imported(command, "--help") & (HEAVY - {"pydantic"})


def test_drawing_and_training_load_no_library_that_they_may_not_need():
    """A model of the built-in text encoder and pixels needs neither transformers nor diffusers; reading data needs no `datasets`."""
    assert not modules_after("import flowt2i.pipeline, flowt2i.training.loop") & {
        "transformers",
        "diffusers",
        "datasets",
        "gradio",
        "matplotlib",
        "wandb",
        "pandas",
    }
