"""Look at a prepared dataset: the same as `flowt2i inspect`; without an argument the newest one under data/.

python debug.py data/scenes
"""

import sys
from pathlib import Path

from flowt2i.cli import main

if __name__ == "__main__":
    datasets = sorted(Path("data").glob("*/dataset.json"), key=lambda path: path.stat().st_mtime)
    newest = [str(path.parent) for path in datasets[-1:]]
    sys.exit(main(["inspect", *(sys.argv[1:] or newest)]))
