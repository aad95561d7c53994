"""Train a model: the same as `flowt2i train`, as a script for `torchrun`.

python train.py --config stability --data data/mine
torchrun --nproc-per-node 2 train.py --config stability --data data/mine
"""

import sys

from flowt2i.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
