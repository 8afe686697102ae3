"""Fill in masked words: `python -m bert.fill_mask MODEL "The sun is [MASK]."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bert.errors import DataError, RecipeError, exit_code
from bert.files import write_json
from bert.inference import Prediction, load
from bert.provenance import provenance


def read_texts(path: Path) -> list[str]:
    """Return the lines of a file that are not blank.

    Raises:
        DataError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--texts {path} cannot be read: {error}") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise DataError(f"--texts {path} has no text, one a line")
    return texts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for a mistake in what was given, 4 for a full disk."""
    parser = argparse.ArgumentParser(prog="python -m bert.fill_mask", description="Fill in masked words.")
    parser.add_argument("model", help="a run's folder or checkpoint, or a Hugging Face folder")
    parser.add_argument("text", nargs="*", help="texts, each with at least one [MASK]")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="more texts, one a line")
    parser.add_argument("--tokenizer", help="name or path (default: the model's own copy)")
    parser.add_argument("--top", type=int, default=5, help="predictions a mask (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the predictions to this file")
    arguments = parser.parse_intermixed_args(argv)  # texts may follow options, although there may be none
    try:
        texts = arguments.text + (read_texts(arguments.texts) if arguments.texts else [])
        if not texts:
            raise RecipeError("there is no text: give some, or a file with --texts")
        model = load(arguments.model, tokenizer=arguments.tokenizer, device=arguments.device)
        filled: list[list[Prediction]] = []
        for text in texts:
            print(text)  # noqa: T201
            filled += model.fill_mask([text], top=arguments.top)
            for prediction in filled[-1]:
                print("   ", "  ".join(f"{word} {probability:.2f}" for word, probability in prediction))  # noqa: T201
        if arguments.output:
            _write(arguments.output, arguments.model, texts, filled)
    except (RecipeError, OSError) as error:
        return exit_code(error, "the file was not written")
    return 0


def _write(path: Path, model: str, texts: list[str], filled: list[list[Prediction]]) -> None:
    rows = [
        {
            "text": text,
            "masks": [[{"word": word, "probability": share} for word, share in prediction] for prediction in masks],
        }
        for text, masks in zip(texts, filled, strict=True)
    ]
    write_json(path, {"kind": "fill_mask", **provenance(), "model": Path(model).name, "texts": rows})


if __name__ == "__main__":
    sys.exit(main())
