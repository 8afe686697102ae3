"""Retrieval on pairs of query and document: nDCG@10, recall@10, for BM25 and for models at several truncations.

    python -m bert.data.pairs --source 'articles/*.jsonl.xz' --out data/pairs
    python benchmarks/retrieval.py data/pairs/test.jsonl --model runs/m2 --model runs/m2-embeddings --output r.json

Each query has one right document among all of the file. BM25 (bm25s, `pip install bm25s`) sees the whole documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_figures
from tqdm import tqdm

from bert import load
from bert.embeddings.data import Pairs
from bert.files import save_figure

TOP = 10
TRUNCATIONS = (128, 512)
LONG = 2000  # tokens


def scores(ranks: np.ndarray) -> dict[str, float]:
    """nDCG@10 and recall@10 of the ranks (from 0) of the one right document of each query."""
    found = ranks < TOP
    return {
        "ndcg_at_10": float(np.where(found, 1 / np.log2(ranks + 2.0), 0).mean()),
        "recall_at_10": float(found.mean()),
    }


def dense_ranks(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The rank of document i for query i; documents that score the same count as before it."""
    similarity = queries @ documents.T
    own = np.diag(similarity)[:, None]
    return (similarity >= own).sum(1) - 1


def require_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise SystemExit(f"BM25 needs bm25s ({error}): pip install bm25s, or leave it out with --no-bm25") from None
    return bm25s


def bm25_ranks(queries: list[str], documents: list[str]) -> np.ndarray:
    """The ranks by BM25, from 0; past the end where the right document is not among the first ten."""
    bm25s = require_bm25s()
    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents, stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries, stopwords="en", show_progress=False)
    found, values = index.retrieve(tokens, k=min(TOP, len(documents)), show_progress=False)
    hits = (np.asarray(found) == np.arange(len(queries))[:, None]) & (np.asarray(values) > 0)
    return np.where(hits.any(1), hits.argmax(1), len(documents))


def model_rows(path: str, arguments: argparse.Namespace, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    model = load(path, tokenizer=arguments.tokenizer, device=arguments.device)
    queries, documents = ([pair[side] for pair in pairs] for side in (0, 1))
    full = min(model.max_length, arguments.max_length or model.max_length)
    rows = []
    for length in sorted({min(length, full) for length in (*TRUNCATIONS, full)}):
        options = {"max_length": length, "pooling": arguments.pooling, "batch_tokens": arguments.batch_tokens}
        asked = model.encode(queries, **options)
        with tqdm(total=len(documents), unit=" docs", desc=f"{path}, {length} tokens") as bar:
            answers = model.encode(documents, progress=bar.update, **options)
        rows.append({"model": path, "tokens": length, **scores(dense_ranks(asked, answers))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="JSONL of query and document")
    parser.add_argument("--model", action="append", default=[], help="what bert.load reads; may be given several times")
    parser.add_argument("--tokenizer", help="of the models (default: their own)")
    parser.add_argument("--pooling", help="mean or first (default: as the model was fine-tuned, else mean)")
    parser.add_argument("--max-length", type=int, help="in place of the models' full length")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="default: %(default)s")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--no-bm25", action="store_true", help="leave BM25 out")
    parser.add_argument("--output", type=Path, help="write the figures as JSON, and a picture beside it")
    arguments = parser.parse_args()

    pairs = Pairs(arguments.pairs).rows
    rows: list[dict[str, Any]] = []
    if not arguments.no_bm25:
        rows.append({"model": "BM25", "tokens": None, **scores(bm25_ranks(*map(list, zip(*pairs, strict=True))))})
    long = None
    if arguments.model:
        tokenizer = load(arguments.model[0], tokenizer=arguments.tokenizer, device="cpu").tokenizer
        encoded = tokenizer([document for _, document in pairs], verbose=False)["input_ids"]
        long = sum(len(ids) > LONG for ids in encoded)
    for path in [None, *arguments.model]:
        rows += model_rows(path, arguments, pairs) if path else []
        if arguments.output:  # after each: a model may take an hour
            named = [{**row, "model": Path(row["model"]).name} for row in rows]
            figures = {"documents": len(pairs), "documents_over_2000_tokens": long, "rows": named}
            write_figures(arguments.output, figures)
            draw(named, arguments.output.with_suffix(".png"))
    print(
        f"{len(pairs):,} queries, as many documents"
        + (f", {long:,} of over {LONG:,} tokens" if arguments.model else "")
    )
    print(f"{'model':<40} {'tokens':>8} {'nDCG@10':>8} {'recall@10':>10}")
    for row in rows:
        print(
            f"{Path(row['model']).name:<40} {row['tokens'] or 'all':>8} {row['ndcg_at_10']:8.3f} "
            f"{row['recall_at_10']:10.3f}"
        )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens of a document", ylabel="nDCG@10", xscale="log")
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [(row["tokens"], row["ndcg_at_10"]) for row in rows if row["model"] == name]
        if own[0][0] is None:
            axes.axhline(own[0][1], color="grey", linestyle="--", label=name)
        else:
            axes.plot(*zip(*own, strict=True), marker="o", label=name)
    ticks = sorted({row["tokens"] for row in rows if row["tokens"]})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
