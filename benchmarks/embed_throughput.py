"""Throughput of `encode` on long documents against sentence-transformers with Hugging Face's BERT, in one run.

    pip install sentence-transformers
    python benchmarks/embed_throughput.py --documents docs.jsonl --text-column document --tokenizer vocab.txt

Both have the width and depth of BERT-base and random weights (or ours is --model, anything that bert.load reads). Each
reads the documents' first --max-length tokens as far as it can: ours as one sequence, BERT its 512 (what
sentence-transformers does with a long document), or all of them in pieces of 512 whose vectors' mean is the document's.
Ours with 512 tokens is there too. Time is from text to vectors, tokenisation included; who begins alternates by block.
Both get batches of as many tokens, and on CUDA bf16: ours by autocast, BERT's weights themselves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import write_figures
from transformers import BertConfig, BertModel
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from bert import load
from bert.composer_models import build_masked_lm
from bert.data.readers import BrokenRecord, ReadProgress, read_records
from bert.data.tokenizer import load_tokenizer
from bert.inference import LoadedModel
from bert.provenance import versions
from bert.recipe.schema import load_config

RECIPE = Path(__file__).parents[1] / "yamls/pretrain/m2-base-2k.yaml"
BERT_LENGTH = 512
Encode = Callable[[list[str]], np.ndarray]


def our_model(arguments: argparse.Namespace) -> LoadedModel:
    """--model, or the recipe's with random weights."""
    if arguments.model:
        return load(arguments.model, tokenizer=arguments.tokenizer, device=arguments.device)
    recipe = load_config(RECIPE, [f"max_seq_len={arguments.max_length}"])
    sizes = {
        "hidden_size": arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "intermediate_size": 4 * arguments.hidden,
    }
    model = build_masked_lm(
        recipe.model.name, {**recipe.model.config, **sizes}, train_mask_rate=0.3, eval_mask_rate=0.15
    )
    network = model.model.eval().to(arguments.device)
    return LoadedModel(network, load_tokenizer(arguments.tokenizer), torch.device(arguments.device))


def sentence_transformer(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, folder: str) -> Any:
    """BERT of the given size with random weights, mean pooling, vectors of length 1."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Normalize, Pooling, Transformer
    except ImportError as error:
        raise SystemExit(f"{error}; this benchmark needs: pip install sentence-transformers") from None
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        intermediate_size=4 * arguments.hidden,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = {"torch_dtype": torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32}
    words = Transformer(folder, max_seq_length=BERT_LENGTH, model_args=options)
    modules = [words, Pooling(words.get_word_embedding_dimension(), "mean"), Normalize()]
    return SentenceTransformer(modules=modules, device=arguments.device)


def long_documents(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The file's first documents of at least --min-tokens tokens."""
    found: list[str] = []
    for text in read_records(arguments.documents, ReadProgress(), arguments.text_column, "paragraph"):
        if isinstance(text, BrokenRecord):
            raise SystemExit(f"{arguments.documents}, {text.place}: {text.reason}")
        if len(found) == arguments.num_documents:
            break
        # A token has a character at least: the short ones need no tokenisation.
        if (
            len(text) >= arguments.min_tokens
            and len(tokenizer(text, verbose=False)["input_ids"]) >= arguments.min_tokens
        ):
            found.append(text)
    if not found:
        raise SystemExit(f"{arguments.documents} has no document of {arguments.min_tokens} tokens or more")
    return found


def pieces(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> list[str]:
    """The text of the first `length` tokens, cut where BERT's input is full."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    offsets = offsets[: length - 2]
    room = BERT_LENGTH - 2
    parts = [offsets[begin : begin + room] for begin in range(0, len(offsets), room)]
    return [text[part[0][0] : part[-1][1]] for part in parts if part]


def peers(arguments: argparse.Namespace, ours: LoadedModel, folder: str) -> dict[str, Encode]:
    """Name -> texts to one vector each. What cuts documents to pieces is not timed: see `measure`."""
    other = sentence_transformer(arguments, ours.tokenizer, folder)
    batch = max(1, arguments.batch_tokens // BERT_LENGTH)

    def encode(length: int) -> Encode:
        return lambda texts: ours.encode(texts, max_length=length, batch_tokens=arguments.batch_tokens)

    def truncated(texts: list[str]) -> np.ndarray:
        return other.encode(texts, batch_size=batch, show_progress_bar=False)

    def whole(documents: list[list[str]]) -> np.ndarray:
        vectors = truncated([piece for document in documents for piece in document])
        ends = np.cumsum([len(document) for document in documents])
        return np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])])

    length = min(arguments.max_length, ours.max_length)
    return {
        f"ours, {length} tokens": encode(length),
        f"ours, {BERT_LENGTH} tokens": encode(min(BERT_LENGTH, length)),
        f"sentence-transformers, BERT, {BERT_LENGTH} tokens": truncated,
        f"sentence-transformers, BERT, {length} tokens in pieces of {BERT_LENGTH}": whole,
    }


def measure(arguments: argparse.Namespace, ours: LoadedModel, texts: list[str], folder: str) -> list[dict[str, Any]]:
    """Encode all documents with all, block by block; return a row each."""
    encoders = peers(arguments, ours, folder)
    tokenizer, length = ours.tokenizer, min(arguments.max_length, ours.max_length)
    cut = [pieces(tokenizer, text, length) for text in texts]
    sizes = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    piece_tokens = sum(min(len(ids), BERT_LENGTH) for row in cut for ids in tokenizer(row, verbose=False)["input_ids"])
    short = sum(min(size, BERT_LENGTH) for size in sizes)
    tokens = dict(zip(encoders, (sum(min(size, length) for size in sizes), short, short, piece_tokens), strict=True))
    rows = {name: {"name": name, "tokens": tokens[name], "wall_s": 0.0, "cpu_s": 0.0} for name in encoders}
    warm_up = texts if arguments.device.startswith("cuda") else texts[:1]
    for name, encode in encoders.items():
        encode((cut if "pieces" in name else texts)[: min(arguments.block, len(warm_up))])
    for number, begin in enumerate(range(0, len(texts), arguments.block)):
        for name in list(encoders)[:: -1 if number % 2 else 1]:
            documents: list[Any] = (cut if "pieces" in name else texts)[begin : begin + arguments.block]
            wall, cpu = time.perf_counter(), time.process_time()
            vectors = encoders[name](documents)
            rows[name]["wall_s"] += time.perf_counter() - wall
            rows[name]["cpu_s"] += time.process_time() - cpu
            assert vectors.shape == (len(documents), ours.hidden_size) and np.isfinite(vectors).all()
        print(f"{min(begin + arguments.block, len(texts)):,} of {len(texts):,} documents", flush=True)
    for row in rows.values():
        row["documents_per_s"] = len(texts) / row["wall_s"]
        row["tokens_per_s"] = row["tokens"] / row["wall_s"]
        if not arguments.device.startswith("cuda"):
            row["documents_per_cpu_s"] = len(texts) / row["cpu_s"]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, required=True, help="what bert.embed reads")
    parser.add_argument("--text-column", default="text", help="default: %(default)s")
    parser.add_argument("--num-documents", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--min-tokens", type=int, default=2000, help="of a document (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--model", help="ours, in place of random weights")
    parser.add_argument("--tokenizer", help="name or path; without --model: required")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a document (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of random weights (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=768, help="of random weights (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a batch, of all (default: %(default)s)")
    parser.add_argument("--block", type=int, default=32, help="documents until another one's turn (%(default)s)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if not arguments.model and not arguments.tokenizer:
        parser.error("random weights need --tokenizer")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    ours = our_model(arguments)
    sizes = ours.network.config  # those of --model, where it is given
    arguments.hidden, arguments.layers = sizes.hidden_size, sizes.num_hidden_layers
    texts = long_documents(arguments, ours.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, ours, texts, folder)
    print(f"{'':<70} {'documents/s':>12} {'tokens/s':>10}")
    for row in rows:
        print(f"{row['name']:<70} {row['documents_per_s']:12.3f} {row['tokens_per_s']:10,.0f}")
    if arguments.output:
        figures = {
            "on": arguments.device,
            "threads": torch.get_num_threads(),
            "documents": len(texts),
            "hidden_size": arguments.hidden,
            "layers": arguments.layers,
            "weights": Path(arguments.model).name if arguments.model else "random",
            "batch_tokens": arguments.batch_tokens,
            "peer": versions(["sentence-transformers", "transformers"]),
            "rows": rows,
        }
        write_figures(arguments.output, figures)


if __name__ == "__main__":
    main()
