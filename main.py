"""Pretrain a recipe: composer [-n DEVICES] main.py yamls/pretrain/m2-base.yaml [key=value ...]."""

import sys

from bert.recipe.stopping import end_with_launcher
from bert.recipe.train import main

if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main(sys.argv[1:]))
