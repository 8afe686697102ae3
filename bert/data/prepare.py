"""The command line of data preparation: `python -m bert.data.prepare --help`; the work is in `preparation`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bert.data.embedded import SPLITS as EMBEDDED_SPLITS
from bert.data.packing import LAYOUTS
from bert.data.preparation import PrepareSettings, open_source, prepare
from bert.data.readers import TEXT_DOCUMENTS
from bert.data.sources import EMBEDDED, HUB_PREFIX
from bert.data.tokenizer import fingerprint, load_tokenizer, train_wordpiece
from bert.errors import DataError, RecipeError, storage_failure
from bert.files import is_remote

__all__ = ["PrepareSettings", "main", "prepare"]

log = logging.getLogger(__name__)

_TOKENIZER_TRAINING_CHARACTERS = 200_000_000


_EXAMPLES = """\
examples:
  # the built-in text, with a vocabulary trained on it: both splits, in half a minute
  python -m bert.data.prepare --source embedded --out data/demo --train-tokenizer 4096

  # C4, as in the paper's recipe: a training and a validation split (streamed; stop and rerun as you like)
  python -m bert.data.prepare --source hub:allenai/c4 --hub-config en --split-name train \\
      --out data/c4 --tokenizer bert-base-uncased --seq-len 128 --workers 32
  python -m bert.data.prepare --source hub:allenai/c4 --hub-config en --split-name validation \\
      --out data/c4 --tokenizer bert-base-uncased --seq-len 128 --workers 32

  # your own files, one document a sample, uploaded to S3
  python -m bert.data.prepare --source 'corpus/*.jsonl.zst' --text-column body --layout truncate \\
      --out s3://bucket/corpus --tokenizer path/to/vocab.txt

A recipe then reads a split with data_local: OUT (or data_remote: s3://...) and split: train.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bert.data.prepare",
        description="Tokenise text into MDS shards for pretraining. A run that was stopped, however it was, goes on "
        "when the same command is given again; the result is the same for any number of workers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = PrepareSettings(source=(), out="", tokenizer="")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--source",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help=f"'{EMBEDDED}' (English text that comes with Python), '{HUB_PREFIX}NAME' (a Hugging Face Hub dataset), "
        "or files, folders and globs: .txt, .jsonl, .json (one object a line), .csv, plain or .gz/.xz/.zst; .parquet",
    )
    text.add_argument("--text-column", default=default.text_column, help="field or column with the text (%(default)s)")
    text.add_argument(
        "--text-documents",
        choices=TEXT_DOCUMENTS,
        default=default.text_documents,
        help="what is a document in a .txt file; paragraphs are separated by blank lines (%(default)s)",
    )
    text.add_argument(
        "--hub-config", metavar="NAME", help="configuration of the Hub dataset, such as 'en' of allenai/c4"
    )
    text.add_argument("--hub-split", metavar="NAME", help="split of the Hub dataset (the same as --split-name)")
    text.add_argument(
        "--max-broken",
        type=int,
        default=default.max_broken,
        metavar="N",
        help="skip up to N records that are not UTF-8, not JSON or have no text, instead of stopping (%(default)s)",
    )
    tokens = parser.add_argument_group("tokens")
    which = tokens.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", help="Hub name, folder, tokenizer.json or WordPiece vocab.txt")
    which.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="SIZE",
        help="train a WordPiece vocabulary on the source; goes to OUT/tokenizer",
    )
    tokens.add_argument(
        "--seq-len", type=int, default=default.seq_len, metavar="N", help="tokens in a sample (%(default)s)"
    )
    tokens.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=default.layout,
        help="concat: documents joined by [SEP], cut into windows of exactly SEQ_LEN that begin with [CLS]; "
        "truncate: the beginning of each document is a sample, as in the paper's run (%(default)s)",
    )
    tokens.add_argument(
        "--max-chars", type=int, metavar="N", help="cut documents to N characters first (the paper's run: 4000)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", required=True, help="local folder, or remote URI: s3://, gs://, oci://, azure://, hf://, ..."
    )
    output.add_argument(
        "--split-name", help=f"folder in OUT (train; for '{EMBEDDED}' both {' and '.join(EMBEDDED_SPLITS)} are made)"
    )
    output.add_argument("--staging", help="local folder for what goes to a remote OUT (in ./.prepare-staging)")
    output.add_argument(
        "--compression",
        default=default.compression,
        help="of the shards: zstd, zstd:LEVEL, gz, br, ... or 'none' (%(default)s)",
    )
    output.add_argument(
        "--part-characters",
        type=int,
        default=default.part_characters,
        metavar="N",
        help="text in one part; a killed run loses at most one (%(default)s)",
    )
    output.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that tokenise; 0: none (%(default)s)",
    )
    return parser


def _trained_tokenizer(settings: PrepareSettings, vocab_size: int) -> str:
    """Train a tokenizer on the source's documents, save it in `OUT/tokenizer`, and return that path."""
    if is_remote(settings.out):
        raise DataError("--train-tokenizer needs a local --out; train there first, then give --tokenizer OUT/tokenizer")
    settings.check()
    log.info("training a vocabulary of %s on %s", f"{vocab_size:,}", " ".join(settings.source))
    texts, size = [], 0
    for text in open_source(settings).documents():
        texts.append(text)
        size += len(text)
        if size >= _TOKENIZER_TRAINING_CHARACTERS:
            break
    tokenizer = train_wordpiece(texts, vocab_size)
    folder = Path(settings.out) / "tokenizer"
    if folder.exists():
        if fingerprint(load_tokenizer(str(folder))) != fingerprint(tokenizer):
            raise DataError(f"{folder} holds another tokenizer; choose another --out, or remove {settings.out}")
    else:
        temporary = folder.with_name(f".tokenizer-{os.getpid()}.tmp")
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    return str(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 for a mistake in what was given, 4 for a full or failing disk, 130 for Ctrl-C.
    """
    options = vars(_parser().parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    split_name, vocab_size = options.pop("split_name"), options.pop("train_tokenizer")
    both = options["source"] == [EMBEDDED] and split_name is None
    splits = EMBEDDED_SPLITS if both else (split_name or "train",)
    if options["compression"] == "none":
        options["compression"] = None
    try:
        settings = PrepareSettings(**options, split_name=splits[0], progress_bar=True)
        if vocab_size is not None:
            settings = replace(settings, tokenizer=_trained_tokenizer(settings, vocab_size))
        for split in splits:
            log.info("preparing %s/%s", settings.out.rstrip("/"), split)
            prepare(replace(settings, split_name=split))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        failure = storage_failure(error)
        if failure is None:
            raise
        print(f"error: {failure}; whole parts are kept: make room and run the same command again", file=sys.stderr)  # noqa: T201
        return 4
    except KeyboardInterrupt:
        print("\nstopped; whole parts are kept: run the same command again to go on", file=sys.stderr)  # noqa: T201
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
