"""Measure speed and memory on this machine: the same as `flowt2i bench`.

python bench.py --config quickstart
"""

import sys

from flowt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
