"""Serve the web page: the same as `flowt2i demo`.

python demo.py --model runs/quickstart
"""

import sys

from flowt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
