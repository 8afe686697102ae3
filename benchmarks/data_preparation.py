"""How close does `prepare` with N workers come to N times the `tokenizers` library alone in one process?

    python benchmarks/data_preparation.py --source corpus.jsonl.xz --tokenizer vocab.txt --workers 2

The library tokenises documents that are already in memory, on one thread (`encode_batch_fast`, the faster of its two
ways, is what counts; `encode_batch` is shown beside it). `prepare` does everything: it starts its processes, reads and
decompresses the same documents, tokenises, packs, compresses and writes. The two take turns, and medians are
compared, so that a machine that slows down slows both. On a machine that others use at the same time, N processes
get less than N times what one gets; the ratio of CPU seconds, also printed, is then the one to look at: it is what
the ratio would be on N idle cores for which the main process and its N workers compete.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the library starts its threads

from machine import write_figures
from tokenizers import Tokenizer

from bert.data.preparation import PrepareSettings, open_source, prepare
from bert.data.tokenizer import backend_json, load_tokenizer

BATCH = 64  # documents in one call of the library


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that `work` takes, and the CPU seconds of it and of the processes that it started."""
    started, before = time.perf_counter(), os.times()
    work()
    seconds, after = time.perf_counter() - started, os.times()
    return seconds, sum(after[:4]) - sum(before[:4])


def library_pass(encode: Callable[..., list], texts: list[str]) -> int:
    """Tokenise all `texts`; return the number of tokens."""
    batches = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
    return sum(len(e) for batch in batches for e in encode(batch, add_special_tokens=False))


def limited(texts: Iterator[str], characters: int) -> list[str]:
    """Return the first documents, up to about so many characters."""
    chosen, size = [], 0
    for text in texts:
        chosen.append(text)
        size += len(text)
        if size >= characters:
            break
    return chosen


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", default=["embedded"])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layout", default="concat")
    parser.add_argument("--megabytes", type=float, default=24, help="text used, in millions of characters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    backend = Tokenizer.from_str(backend_json(load_tokenizer(options.tokenizer)))
    settings = PrepareSettings(options.source, "unused", options.tokenizer)
    texts = limited(open_source(settings).documents(), int(options.megabytes * 1e6))
    times: dict[str, list[tuple[float, float]]] = {"encode_batch": [], "encode_batch_fast": [], "prepare": []}
    tokens = library_pass(backend.encode_batch_fast, texts)  # also warms up
    with tempfile.TemporaryDirectory() as folder:
        # The documents in the same form as the source's first file, so that reading costs what it costs there.
        corpus = Path(folder) / "corpus.jsonl.xz"
        write_xz(corpus, texts)
        for number in range(options.rounds + 1):
            out = Path(folder) / f"out-{number}"
            run = PrepareSettings(
                [str(corpus)], str(out), options.tokenizer, workers=options.workers, layout=options.layout
            )
            seconds = timed(functools.partial(prepare, run))
            shutil.rmtree(out)
            if number == 0:  # imports, file cache
                continue
            times["prepare"].append(seconds)
            times["encode_batch_fast"].append(timed(lambda: library_pass(backend.encode_batch_fast, texts)))
            times["encode_batch"].append(timed(lambda: library_pass(backend.encode_batch, texts)))
            print(
                f"round {number}: "
                + ", ".join(f"{name} {values[-1][0]:.2f} s (CPU {values[-1][1]:.2f})" for name, values in times.items())
            )

    speed = {name: tokens / statistics.median(wall for wall, _ in values) for name, values in times.items()}
    cpu = {name: statistics.median(cpu for _, cpu in values) for name, values in times.items()}
    ratio = speed["prepare"] / (options.workers * speed["encode_batch_fast"])
    cpu_ratio = cpu["encode_batch_fast"] / cpu["prepare"]
    for name, value in speed.items():
        print(f"{name:<20}{value:>12,.0f} tokens/s{cpu[name]:>10.2f} CPU s")
    print(f"prepare with {options.workers} workers: {ratio:.2f} of {options.workers} x one-process speed (target 0.80)")
    print(f"CPU seconds of the library / of prepare: {cpu_ratio:.2f}; load of the machine: {os.getloadavg()[0]:.1f}")
    result = {
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "tokens_per_second": speed,
        "cpu_seconds": cpu,
        "load_average": os.getloadavg(),
        "seconds_and_cpu_seconds": times,
        "tokens": tokens,
        "documents": len(texts),
    }
    if options.output:
        write_figures(options.output, result)


def write_xz(path: Path, texts: list[str]) -> None:
    """Write `texts` as compressed JSON lines."""
    import lzma

    with lzma.open(path, "wt", encoding="utf-8", preset=3) as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


if __name__ == "__main__":
    main()
