"""Fill in masked words: `python -m bert.fill_mask MODEL "The sun is [MASK]."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bert.errors import RecipeError
from bert.inference import load


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bert.fill_mask", description="Fill in masked words.")
    parser.add_argument("model", help="a run's folder or checkpoint, or a Hugging Face folder")
    parser.add_argument("text", nargs="+", help="texts, each with at least one [MASK]")
    parser.add_argument("--tokenizer", help="name or path (default: the model's own copy)")
    parser.add_argument("--top", type=int, default=5, help="predictions a mask (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    arguments = parser.parse_args(argv)
    try:
        model = load(arguments.model, tokenizer=arguments.tokenizer, device=arguments.device)
        for text in arguments.text:
            print(text)  # noqa: T201
            for prediction in model.fill_mask([text], top=arguments.top)[0]:
                print("   ", "  ".join(f"{word} {probability:.2f}" for word, probability in prediction))  # noqa: T201
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
