"""How much padding changes the outputs at real tokens: with the mask that leaves it out, and without, as published.

The same random texts are padded to several lengths. Weights are drawn at random (seed 0), or are those of a run.

    python benchmarks/padding_effect.py --output results/padding_effect.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from machine import write_figures

from bert.modeling import M2BertForMaskedLM
from bert.recipe.builders import build_model
from bert.recipe.schema import load_config
from bert.trained import load_trained

RECIPE = Path(__file__).parents[1] / "yamls" / "pretrain" / "m2-demo.yaml"
TEXTS = 64
TOKENS = 32  # of each text
PAD_ID = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a run's folder or .pt (default: m2-demo's model, drawn at random)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    wrapped = load_trained(arguments.checkpoint).model if arguments.checkpoint else build_model(load_config(RECIPE))
    model = wrapped.model.eval()
    assert isinstance(model, M2BertForMaskedLM)
    limit = model.config.max_sequence_length
    ids = torch.randint(5, model.config.vocab_size, (TEXTS, TOKENS))
    rows = []
    for mask_padding in (False, True):
        model.config.mask_padding = mask_padding
        reference = predict(model, ids, TOKENS)
        for width in (TOKENS + 1, TOKENS + 8, 2 * TOKENS, limit):
            logits = predict(model, ids, width)
            row = {
                "mask_padding": mask_padding,
                "tokens": TOKENS,
                "padded_to": width,
                "relative_change": ((logits - reference).norm() / reference.norm()).item(),
                "largest_change": (logits - reference).abs().max().item(),
                "other_best_word": (logits.argmax(-1) != reference.argmax(-1)).float().mean().item(),
            }
            rows.append(row)
            print(
                f"mask_padding {mask_padding!s:5}  {TOKENS} tokens padded to {width:>3}: logits change by "
                f"{row['relative_change']:.1e} of their norm, {row['other_best_word']:.1%} of the likeliest words"
            )
    if arguments.output:
        checkpoint = Path(arguments.checkpoint).name if arguments.checkpoint else None
        write_figures(arguments.output, {"recipe": RECIPE.stem, "checkpoint": checkpoint, "rows": rows})


@torch.inference_mode()
def predict(model: M2BertForMaskedLM, ids: torch.Tensor, width: int) -> torch.Tensor:
    """Return the logits at the real tokens of texts padded to `width`."""
    padded = torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=PAD_ID)
    mask = (torch.arange(width) < ids.shape[1]).long().expand(len(ids), -1)
    return model(padded, mask).logits[:, : ids.shape[1]]


if __name__ == "__main__":
    main()
