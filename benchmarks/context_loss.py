"""Loss on masked tokens by the context that a model sees, and by the position in it.

    python benchmarks/context_loss.py runs/m2-2k runs/bert-512 --documents test.jsonl.xz --output results/context.json

Documents are cut to their first L tokens, L being the longest of --contexts; shorter ones are left out. A fixed share
of their tokens becomes [MASK], chosen once a document. For each context c they are cut into L / c windows of c tokens:
every context predicts the same tokens, and a model that uses what is far away predicts them better in a longer one.
Windows have neither [CLS] nor [SEP] and are always full: a window shorter than the model's length is seen without
padding, also by models that take padding for text and were trained at their full length alone. A model that takes
fewer tokens than a context is left out there.

Loss is in nats over the tokenizer's entries, in fp32 of logits that on CUDA come from bf16 (autocast); its standard
error is over documents. Contexts see the same documents, so that the differences between them are surer than that.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import write_figures
from numpy.typing import NDArray
from tqdm import tqdm
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from bert import load
from bert.data.readers import TEXT_DOCUMENTS, BrokenRecord, ReadProgress, file_kind, read_records
from bert.data.tokenizer import fingerprint
from bert.errors import DataError, RecipeError
from bert.files import save_figure
from bert.inference import BATCH_TOKENS, LoadedModel

BINS = 16  # of positions in a window

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """What is to be predicted, whatever the context."""

    ids: NDArray[np.int64]  # (documents, tokens)
    chosen: NDArray[np.bool_]  # the same: which of them are masked


def parse_contexts(text: str) -> list[int]:
    """Return the contexts of "128,512", rising, each once.

    Raises:
        RecipeError: one is no number, too short, or does not divide the longest.
    """
    try:
        contexts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise RecipeError(f"--contexts {text}: give tokens with commas between, such as 128,512,2048") from None
    for context in contexts:
        if context < BINS:
            raise RecipeError(f"--contexts {text}: {context} is less than {BINS} tokens, the positions told apart")
        if contexts[-1] % context:
            raise RecipeError(f"--contexts {text}: {context} does not divide the longest, {contexts[-1]}")
    return contexts


def names_of(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or as many last parts as tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def texts(arguments: argparse.Namespace) -> Iterator[str]:
    for path in arguments.documents:
        for text in read_records(path, ReadProgress(), arguments.text_column, arguments.text_documents):
            if isinstance(text, BrokenRecord):
                raise DataError(f"{path}, {text.place}: {text.reason}")
            yield text


def choose(ordinary: NDArray[np.bool_], rate: float, seed: int, document: int) -> NDArray[np.bool_]:
    """Choose a share of a document's ordinary tokens (at least one) by seed and the document's number alone."""
    places = np.flatnonzero(ordinary)
    count = max(1, round(rate * len(places)))
    chosen = np.zeros(len(ordinary), bool)
    chosen[np.random.default_rng((seed, document)).choice(places, count, replace=False)] = True
    return chosen


def read_documents(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, length: int) -> Documents:
    """Read the first documents of at least `length` tokens, cut them, and choose what is masked.

    Raises:
        DataError: a file cannot be read, or there is no such document.
    """
    special = np.array(tokenizer.all_special_ids)
    ids: list[NDArray[np.int64]] = []
    chosen: list[NDArray[np.bool_]] = []
    seen = 0
    with tqdm(total=arguments.num_documents, unit=" docs", desc=f"documents of {length:,} tokens") as bar:
        for text in texts(arguments):
            seen += 1
            if len(text) < length:  # a token has a character at least: the short ones need no tokenisation
                continue
            row = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length], np.int64)
            ordinary = ~np.isin(row, special)  # an [UNK] is no word to predict
            if len(row) < length or not ordinary.any():
                continue
            ids.append(row)
            chosen.append(choose(ordinary, arguments.mask_rate, arguments.seed, seen - 1))
            bar.update()
            if len(ids) == arguments.num_documents:
                break
    if not ids:
        files = ", ".join(path.name for path in arguments.documents)
        raise DataError(
            f"none of the {seen:,} documents in {files} has {length:,} tokens: give longer ones, or shorter --contexts"
        )
    return Documents(np.stack(ids), np.stack(chosen))


def predict(
    model: LoadedModel,
    documents: Documents,
    context: int,
    batch_tokens: int,
    progress: Callable[[int], Any] = lambda _: None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return each masked token's loss in nats, and whether it was the likeliest, in the order of the documents.

    Args:
        model: what predicts.
        documents: (documents, tokens).
        context: tokens of a window.
        batch_tokens: most tokens of a batch; a single window may have more.
        progress: called with the number of tokens of each finished batch.
    """
    ids, chosen = (values.reshape(-1, context) for values in (documents.ids, documents.chosen))
    masked = np.where(chosen, model.tokenizer.mask_token_id, ids)
    windows = max(1, batch_tokens // context)
    losses, right = [], []
    for begin in range(0, len(ids), windows):
        part = slice(begin, begin + windows)
        if chosen[part].any():
            logits = model.logits_at(masked[part], np.argwhere(chosen[part]))
            words = torch.from_numpy(ids[part][chosen[part]]).to(logits.device)
            losses.append(F.cross_entropy(logits, words, reduction="none").cpu().numpy())
            right.append((logits.argmax(-1) == words).cpu().numpy())
        progress(ids[part].size)
    return np.concatenate(losses), np.concatenate(right)


def summary(
    losses: NDArray[np.float32], right: NDArray[np.bool_], chosen: NDArray[np.bool_], context: int
) -> dict[str, Any]:
    """The figures of one model in one context, of what `predict` returns."""
    document, place = chosen.nonzero()
    exact = losses.astype(np.float64)
    number = len(chosen)
    means = np.bincount(document, exact, number) / chosen.sum(1)
    bins = place % context * BINS // context
    sums, counts = np.bincount(bins, exact, BINS), np.bincount(bins, minlength=BINS)
    return {
        "loss": float(exact.mean()),
        "accuracy": float(right.mean()),
        "standard_error": float(means.std(ddof=1) / np.sqrt(number)) if number > 1 else None,
        "documents": number,
        "masked_tokens": len(losses),
        "by_position": {
            "edges": [context * edge / BINS for edge in range(BINS + 1)],
            "loss": [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)],
        },
    }


def measure(arguments: argparse.Namespace, contexts: Sequence[int]) -> dict[str, Any]:
    """Run all models on all contexts that they take.

    Raises:
        RecipeError: a model or the documents cannot be read, or no model takes any of the contexts.
    """
    paths = list(dict.fromkeys(arguments.models))
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    by_tokenizer: dict[str, Documents] = {}
    for name, path in zip(names_of(paths), paths, strict=True):
        model = load(path, tokenizer=arguments.tokenizer, device=arguments.device)
        taken = [context for context in contexts if context <= model.max_length]
        for context in contexts[len(taken) :]:
            log.warning("%s takes %d tokens: left out at a context of %d", name, model.max_length, context)
            left_out.append({"model": name, "context": context, "max_length": model.max_length})
        if not taken:
            continue
        tokenizer = fingerprint(model.tokenizer)
        if tokenizer not in by_tokenizer:
            if by_tokenizer:
                log.warning("%s has another tokenizer: its losses do not compare with those before it", name)
            by_tokenizer[tokenizer] = read_documents(arguments, model.tokenizer, contexts[-1])
        documents = by_tokenizer[tokenizer]
        for context in taken:
            with tqdm(total=documents.ids.size, unit=" tokens", unit_scale=True, desc=f"{name}, {context}") as bar:
                losses, right = predict(model, documents, context, arguments.batch_tokens, bar.update)
            rows.append({"model": name, "context": context, **summary(losses, right, documents.chosen, context)})
    if not rows:
        raise RecipeError(f"no model takes {contexts[0]} tokens, the shortest of --contexts")
    return {"rows": rows, "left_out": left_out}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss against context, and against the position in each model's largest context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.add_subplot(1, 2, 1, xlabel="context in tokens", ylabel="loss in nats", xscale="log")
    within = figure.add_subplot(1, 2, 2, xlabel="position in the window", ylabel="loss in nats")
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        errors = [row["standard_error"] or 0 for row in own]
        axes.errorbar(
            [row["context"] for row in own],
            [row["loss"] for row in own],
            errors,
            marker="o",
            capsize=3,
            label=name,
        )
        edges, losses = (own[-1]["by_position"][key] for key in ("edges", "loss"))
        middles = [(begin + end) / 2 for begin, end in pairwise(edges)]
        drawn = [np.nan if loss is None else loss for loss in losses]
        within.plot(middles, drawn, marker="o", label=f"{name}, {own[-1]['context']:,} tokens")
    ticks = sorted({row["context"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    for panel in (axes, within):
        panel.grid(alpha=0.3)
        panel.legend()
    save_figure(figure, path)


def check(arguments: argparse.Namespace) -> None:
    """Raise RecipeError for what cannot work, before models are loaded."""
    if not 0 < arguments.mask_rate <= 1:
        raise RecipeError(f"--mask-rate {arguments.mask_rate}: give a share of the tokens, such as 0.15")
    for option, least in (("num_documents", 1), ("batch_tokens", 1), ("seed", 0)):
        if getattr(arguments, option) < least:
            raise RecipeError(f"--{option.replace('_', '-')} must be at least {least}")
    for path in arguments.documents:
        if not path.is_file():
            raise DataError(f"--documents {path}: there is no such file")
        file_kind(path)
    if arguments.output and arguments.output.suffix != ".json":
        raise RecipeError(f"--output {arguments.output}: its name must end in .json; the picture goes beside it")
    try:
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--output {arguments.output}: its folder cannot be made: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="what bert.load reads")
    parser.add_argument(
        "--documents", type=Path, nargs="+", required=True, metavar="FILE",
        help="what bert.embed reads: .jsonl, .csv, .txt (plain, .gz, .xz or .zst) or .parquet",
    )  # fmt: skip
    parser.add_argument("--text-column", default="text", help="field or column with the text (%(default)s)")
    parser.add_argument(
        "--text-documents", choices=TEXT_DOCUMENTS, default="paragraph", help="a document of a .txt (%(default)s)"
    )
    parser.add_argument("--tokenizer", help="of the models (default: their own)")
    parser.add_argument("--contexts", default="128,512,2048", help="tokens, each dividing the longest (%(default)s)")
    parser.add_argument("--num-documents", type=int, default=500, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--mask-rate", type=float, default=0.15, help="share of tokens to predict (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these tokens (%(default)s)")
    parser.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N", help="tokens of a batch at most (%(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--output", type=Path, help="write the figures to this .json, and a picture beside it")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        contexts = parse_contexts(arguments.contexts)
        check(arguments)
        figures = measure(arguments, contexts)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = figures["rows"]
    print(
        f"{rows[0]['documents']:,} documents of {contexts[-1]:,} tokens, {rows[0]['masked_tokens']:,} of them masked, "
        f"the same in every context"
    )
    print(f"{'model':<40} {'context':>8} {'loss':>8} {'std. error':>10} {'accuracy':>9}")
    for row in rows:
        spread = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        print(f"{row['model']:<40} {row['context']:>8,} {row['loss']:8.4f} {spread:>10} {row['accuracy']:9.4f}")
    if arguments.output:
        settings = {"tokens": contexts[-1], "mask_rate": arguments.mask_rate, "seed": arguments.seed}
        write_figures(arguments.output, {"kind": "context_loss", **settings, **figures})
        draw(rows, arguments.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
