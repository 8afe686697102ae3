"""Fill in masked words: `python -m bert.fill_mask CHECKPOINT "The sun is [MASK]."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from bert.composer_models import MaskedLanguageModel
from bert.errors import DataError, RecipeError
from bert.trained import load_trained

Prediction = list[tuple[str, float]]  # words with their probabilities, the likeliest first


def fill_masks(
    model: MaskedLanguageModel, tokenizer: PreTrainedTokenizerFast, text: str, *, top: int = 5
) -> list[Prediction]:
    """Predict the words that stand at each mask of a text.

    A model whose mixers see padding gets the text padded to the length that it was trained at, which is what they know.

    Args:
        model: a masked language model in evaluation mode.
        tokenizer: its tokenizer.
        text: text with at least one mask token.
        top: predictions a mask.

    Raises:
        DataError: there is no mask, or the text is too long.
    """
    config = model.model.config
    limit = getattr(config, "max_sequence_length", None) or config.max_position_embeddings
    padding = "do_not_pad" if getattr(config, "leaves_padding_out", True) else "max_length"
    encoded = tokenizer(text, padding=padding, max_length=limit, return_tensors="pt")
    ids = encoded["input_ids"]
    if ids.shape[1] > limit:
        raise DataError(f"the text has {ids.shape[1]} tokens, the model takes {limit}")
    masks = ids == tokenizer.mask_token_id
    if not masks.any():
        raise DataError(f"there is no {tokenizer.mask_token} in: {text}")
    with torch.inference_mode():
        hidden = model.model.base_model(input_ids=ids, attention_mask=encoded["attention_mask"])[0]
        logits = model.model.predict(hidden[masks])[:, : len(tokenizer)]  # the padding of the vocabulary is no word
        likeliest = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    return [
        [(tokenizer.decode([word]), probability) for word, probability in zip(words, probabilities, strict=True)]
        for words, probabilities in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bert.fill_mask", description="Fill in masked words.")
    parser.add_argument("checkpoint", help="a checkpoint saved by main.py, or its folder")
    parser.add_argument("text", nargs="+", help="texts, each with at least one [MASK]")
    parser.add_argument("--tokenizer", help="name or path (default: the copy in the training data's folder)")
    parser.add_argument("--top", type=int, default=5, help="predictions a mask (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        trained = load_trained(arguments.checkpoint)
        tokenizer = trained.tokenizer(arguments.tokenizer)
        for text in arguments.text:
            print(text)  # noqa: T201
            for prediction in fill_masks(trained.model, tokenizer, text, top=arguments.top):
                print("   ", "  ".join(f"{word} {probability:.2f}" for word, probability in prediction))  # noqa: T201
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
