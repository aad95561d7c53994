"""One file per command: `add(commands)` says what it takes, `run(args)` does it. Heavy imports happen inside `run`."""
