"""`python -m flowt2i` is `flowt2i`."""

from flowt2i.cli import run

run()
