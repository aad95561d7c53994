"""Prepare captioned images for training: the same as `flowt2i prepare`.

python load_dataset.py scenes --out data/scenes
"""

import sys

from flowt2i.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
