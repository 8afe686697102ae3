"""Pretrain a recipe: composer [-n DEVICES] main.py yamls/pretrain/m2-base.yaml [key=value ...]."""

import sys

from bert.recipe.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
