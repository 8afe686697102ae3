"""Convert checkpoints: `python -m bert.convert SOURCE DEST [--to huggingface|original|onnx] [--verify]`."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from bert.checkpoint import Model, load_any, load_original, read_config, save_original
from bert.configuration import FOREIGN_FIELDS, UNSUPPORTED, WITHOUT_EFFECT, M2BertConfig
from bert.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from bert.errors import CheckpointError, DataError, RecipeError, exit_code, nearest
from bert.exact_loading import checked_weights
from bert.export import onnx
from bert.export.card import read_card
from bert.export.folder import MODELING_FILE, difference, load_exported, write_folder
from bert.modeling import M2BertForMaskedLM
from bert.safe_loading import load_checkpoint_file
from bert.trained import (
    FINETUNED,
    LATEST_NAME,
    WEIGHT_FILES,
    check_vocabulary,
    folder_pooling,
    has_record,
    load_trained,
)

FORMATS = ("huggingface", "original", "onnx")
SUFFIXES = {".pt": "original", ".onnx": "onnx"}
TOLERANCES = {"huggingface": 1e-5, "original": 1e-5, "onnx": 1e-4}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx")
OWN_MODELS = ("m2_bert", "attention_bert")


@dataclass
class Source:
    """A model that was read, and what its source says about it."""

    model: Model
    tokenizer_name: str | None = None  # a folder; None: the source has none
    pooling: str = "mean"  # of its vectors, or "first"
    origin: dict[str, Any] = field(default_factory=dict)  # for the model card
    notes: list[str] = field(default_factory=list)  # names that were left out, one a line
    files: list[Path] = field(default_factory=list)  # what it was read from: no destination may be or hold any of it

    @property
    def task(self) -> str:
        """Return "mlm" or "classification"."""
        return "mlm" if isinstance(self.model, M2BertForMaskedLM) else "classification"


def read_source(
    path: Path, config_file: Path | None = None, task: str | None = None, tokenizer: str | None = None
) -> Source:
    """Read a model from any of the formats, wholly, without running what a file brings.

    Args:
        path: a run's folder or a checkpoint of it; a fine-tuned job's file; a Hugging Face folder (ours, or one of the
            published models' with config.json and weights by the original's names); an original checkpoint.
        config_file: JSON with the fields of an original checkpoint's model, where it does not bring them.
        task: "mlm" or "classification"; None: what the weights show.
        tokenizer: name or path of the tokenizer; None: the source's own.

    Raises:
        RecipeError: there is no such source, it would run code, a name or shape does not fit, or the tokenizer named
            has more entries than the model.
    """
    found = _read(path, config_file, task, tokenizer)
    found.files = [path, *(path / name for name in (LATEST_NAME, "config.json", *WEIGHT_FILES))]
    return found


def _read(path: Path, config_file: Path | None, task: str | None, tokenizer: str | None) -> Source:
    is_folder = path.is_dir() and not (path / LATEST_NAME).exists()
    file = path / LATEST_NAME if path.is_dir() else path
    content = {} if is_folder else load_checkpoint_file(file)
    finetuned = isinstance(content, Mapping) and content.get("kind") == FINETUNED
    if config_file is not None and (is_folder or finetuned or has_record(content)):
        raise RecipeError(f"--config is for an original checkpoint: {path} says itself what its model is")
    if has_record(content):
        return _read_run(path, content, tokenizer)
    if is_folder:
        found = _read_folder(path, task)
    elif finetuned:
        found = _read_finetuned(file, content)
    else:
        config = {} if config_file is None else read_config(config_file)
        found = Source(load_any(file, config, task, str(file)), origin={"source": "an original M2 checkpoint"})
        found.notes += [f"{config_file}: {note}" for note in _unknown_fields(config)]
    if tokenizer is not None:
        check_vocabulary(load_tokenizer(tokenizer), found.model.config.vocab_size)
        found.tokenizer_name = tokenizer
    return found


def _unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Say of each field that no model has it; those of the original code without effect here are known."""
    own, others = M2BertConfig.field_names(), PretrainedConfig().to_dict()
    known = {*own, *others, *FOREIGN_FIELDS, *UNSUPPORTED, *WITHOUT_EFFECT, "num_labels", "id2label", "label2id"}
    hints = {name: nearest(name, own) for name in config if name not in known}
    return [
        f"'{name}' is no field of a model and has no effect" + (f": {hint}" if hint.startswith("did") else "")
        for name, hint in hints.items()
    ]


def _read_run(path: Path, content: Mapping[str, Any], tokenizer: str | None) -> Source:
    trained = load_trained(path)
    model = trained.model.model
    if not isinstance(model, M2BertForMaskedLM):
        raise RecipeError(f"{path} holds {trained.record['model']['name']}, which is Hugging Face's own and no M2-BERT")
    record = trained.record
    found = Source(model, pooling="first" if record.get("pooling") == "first" else "mean")
    try:
        found.tokenizer_name = tokenizer or trained.tokenizer_folder()
    except DataError as error:
        found.notes.append(str(error))
    else:
        trained.tokenizer(found.tokenizer_name)  # an error where it is another one
    found.origin = {
        "source": "a run of monarch-mixer-bert",
        **{name: record.get(name) for name in ("recipe", "data", "versions")},
        "metrics": _last_evaluation(trained.file.resolve().parent / "metrics.jsonl", _batch_of(content)),
    }
    return found


def _batch_of(content: Mapping[str, Any]) -> float:
    """The batch after which a run's checkpoint was saved; infinity where it does not say."""
    try:
        return float(content["state"]["timestamp"]["Timestamp"]["batch"])
    except (LookupError, TypeError, ValueError):
        return math.inf


def _last_evaluation(path: Path, batch: float) -> dict[str, Any]:
    """The last evaluation that a run wrote down until `batch`; empty where there is none."""
    found: dict[str, Any] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = dict(json.loads(line))
                if values.pop("event") == "eval" and values["batch"] <= batch:
                    found = values
            except (LookupError, TypeError, ValueError, RecursionError):
                continue  # torn by a kill
    return found


def _read_finetuned(file: Path, content: Mapping[str, Any]) -> Source:
    try:
        section = content["model"]
        name, fields = section["name"], dict(section["config"] if section["name"] in OWN_MODELS else {})
        weights = checked_weights(content["weights"], str(file))
        metadata = dict(json.loads(content["metadata"]))
        num_labels = weights["classifier.weight"].shape[0]
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not the whole file of a fine-tuning job ({error!r})") from error
    if name not in OWN_MODELS:
        raise CheckpointError(f"{file}: this fine-tuned model is Hugging Face's own and no M2-BERT")
    notes = []
    if "pooling" not in section:
        notes.append(f"{file} does not say how it pools: by the first token; set pool_all in config.json for the mean")
    fields |= {"num_labels": num_labels, "pool_all": section.get("pooling") == "mean"}
    labels = metadata.get("labels")
    if isinstance(labels, list) and len(labels) == num_labels:
        names = [str(name) for name in labels]
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = load_any(weights, fields, "classification", str(file))
    origin = {"source": f"a fine-tuning job on {metadata.get('task')}", "metrics": metadata.get("metrics")}
    return Source(model, origin=origin, notes=notes)


def _read_folder(path: Path, task: str | None) -> Source:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds neither {LATEST_NAME} of a run nor a config.json")
    files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not files:
        raise CheckpointError(f"{path} has no weights: one file, {' or '.join(WEIGHT_FILES)}")
    model = load_any(files[0], read_config(path / "config.json"), task, str(path))
    found = Source(model, pooling=folder_pooling(path), origin={"source": "a Hugging Face folder", **read_card(path)})
    if any((path / name).is_file() for name in TOKENIZER_FILES):
        found.tokenizer_name = str(path)
    return found


def convert(
    source: Source, destination: Path, to: str, *, verify: bool = False, overwrite: bool = False
) -> float | None:
    """Write a model in another format, whole or not at all.

    Args:
        source: what `read_source` gave; not to be used afterwards.
        destination: a folder ("huggingface") or a file.
        to: one of FORMATS.
        verify: whether to read the result and run both models on the same inputs, before it gets its name.
        overwrite: whether a file, or a folder that an earlier conversion wrote, may be replaced.

    Returns:
        The largest difference of logits, relative to the largest logit where that is over 1; None without `verify`.

    Raises:
        RecipeError: the destination exists and may not be replaced, or the models differ by more than TOLERANCES; then
            nothing is written.
    """
    if to == "onnx":
        onnx.check_installed()
    if destination.exists():
        _check_destination(source, destination, to, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as name:
        temporary = Path(name) / destination.name
        inputs = _inputs(source.model)
        expected = [_logits(source.model, *pair) for pair in inputs] if verify else []
        _write(source, temporary, to)
        largest = None
        if verify:
            found = [_run(source, temporary, to, *pair) for pair in inputs]
            differences = [difference(a, b) for a, b in zip(found, expected, strict=True)]
            largest = torch.tensor(differences).max().item()  # NaN where one is: Python's max may pass it over
            if not largest <= TOLERANCES[to]:
                raise CheckpointError(f"the result differs by {largest:.1e}, over {TOLERANCES[to]:.0e}: not kept")
        _put_in_place(temporary, destination)
    return largest


def _check_destination(source: Source, destination: Path, to: str, overwrite: bool) -> None:
    """Raise RecipeError where a destination that exists may not be replaced."""
    is_folder = destination.is_dir()
    if is_folder is not (to == "huggingface"):
        raise RecipeError(f"{destination} is {'a folder' if is_folder else 'a file'}: give another name")
    place = destination.resolve()
    if any(file.resolve().is_relative_to(place) for file in source.files if file.exists()):
        raise RecipeError(f"{destination} is the source, or holds it: give another name")
    if is_folder and not any(destination.iterdir()):
        return
    # Overwriting deletes a whole folder: only one that a conversion wrote, never a run's or somebody's files.
    if is_folder and not _is_export(destination):
        raise RecipeError(f"{destination} is a folder that no conversion wrote, and is not replaced: give another name")
    if not overwrite:
        raise RecipeError(f"{destination} exists: give another name, or --overwrite")


def _is_export(folder: Path) -> bool:
    """Say whether a folder is what a conversion writes, and no run keeps its checkpoints there."""
    has_model = any((folder / name).is_file() for name in ("model.safetensors", f"{MODELING_FILE}.py"))
    is_run = os.path.lexists(folder / LATEST_NAME) or any(folder.glob("ep*-ba*"))
    return (folder / "config.json").is_file() and has_model and not is_run


def _put_in_place(temporary: Path, destination: Path) -> None:
    """Give what lies at `temporary`, in a hidden folder beside it, the destination's name.

    A file takes another's place at once. No call replaces a folder that is not empty: the old one goes into the hidden
    folder first, and whoever is killed between the two renamings finds both there, whole.
    """
    if not destination.is_dir():
        if companions := [path for path in temporary.parent.iterdir() if path != temporary]:
            # A second file, of a large ONNX model: the first is not to be read with another's.
            destination.unlink(missing_ok=True)
        for path in companions:
            os.replace(path, destination.parent / path.name)
        os.replace(temporary, destination)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        os.rename(destination, old)
        os.rename(temporary, destination)
    except BaseException:  # an interruption too: what lies in the hidden folder is deleted
        if os.path.lexists(old) and not os.path.lexists(destination):
            os.rename(old, destination)
        raise


def _write(source: Source, path: Path, to: str) -> None:
    if to == "huggingface":
        path.mkdir()
        tokenizer = None if source.tokenizer_name is None else load_tokenizer(source.tokenizer_name)
        if tokenizer is not None:
            check_vocabulary(tokenizer, source.model.config.vocab_size)
        write_folder(path, source.model, tokenizer, pooling=source.pooling, origin=source.origin)
    elif to == "original":
        save_original(source.model, path)
    else:
        onnx.export_onnx(source.model, path)


def _inputs(model: Model) -> list[tuple[Tensor, Tensor]]:
    """Ids and masks of three batches: the longest length (up to 512), an odd one with padding, and a short one."""
    config = model.config
    longest = min(config.max_sequence_length or 512, 512)
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for batch, length in ((2, longest), (3, max(1, longest // 2 - 1 + longest // 2 % 2)), (1, 1)):
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, (length + 1) // 2 :] = 0
        pairs.append((ids, mask))
    return pairs


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        output = model(input_ids=ids, attention_mask=mask)
    return (output.logits if "logits" in output else output.sentence_embedding).float()


def _run(source: Source, path: Path, to: str, ids: Tensor, mask: Tensor) -> Tensor:
    if to == "onnx":
        return onnx.run_onnx(path, ids, mask)
    if to == "original":
        return _logits(load_original(path, {}, source.task), ids, mask)
    return _logits(load_exported(path, type(source.model).__name__), ids, mask)


def _identifier(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", text):
        raise argparse.ArgumentTypeError("an identifier such as apache-2.0")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0; 2 for what cannot be converted, 4 for a full disk, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m bert.convert", description="Convert an M2-BERT checkpoint.")
    parser.add_argument(
        "source",
        type=Path,
        help="a run's folder or checkpoint, a fine-tuned file, a Hugging Face folder, or an original M2 checkpoint",
    )
    parser.add_argument("destination", type=Path, help="a folder (huggingface), NAME.pt (original) or NAME.onnx")
    parser.add_argument("--to", choices=FORMATS, help="default: by the destination's suffix, else huggingface")
    parser.add_argument("--config", type=Path, help="JSON with the fields of an original checkpoint's model")
    parser.add_argument("--task", choices=("mlm", "classification"), help="default: what the weights show")
    parser.add_argument("--tokenizer", help="name or path, where the source has none or it was moved")
    parser.add_argument("--license", type=_identifier, help="identifier for the model card, such as apache-2.0")
    parser.add_argument("--verify", action="store_true", help="run both models on the same inputs and compare")
    parser.add_argument("--overwrite", action="store_true", help="replace a destination that exists")
    arguments = parser.parse_args(argv)
    to = arguments.to or SUFFIXES.get(arguments.destination.suffix, "huggingface")
    try:
        if to == "huggingface" and arguments.destination.suffix in WEIGHT_SUFFIXES:
            raise RecipeError(f"{arguments.destination}: give the name of a folder; model.safetensors will be in it")
        source = read_source(arguments.source, arguments.config, arguments.task, arguments.tokenizer)
        if arguments.license:
            source.origin["license"] = arguments.license
        for note in source.notes:
            sys.stderr.write(f"note: {note}\n")
        if to == "huggingface" and source.tokenizer_name is None:
            sys.stderr.write("note: no tokenizer is written, for the source has none: --tokenizer names one\n")
        largest = convert(source, arguments.destination, to, verify=arguments.verify, overwrite=arguments.overwrite)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: {arguments.destination} is what it was, or the new one, whole\n")
        return 130
    except (RecipeError, OSError, RuntimeError, SafetensorError) as error:
        return exit_code(error, "nothing was converted: make room and give the same command again")
    if largest is not None:
        sys.stdout.write(f"largest difference {largest:.1e} (tolerance {TOLERANCES[to]:.0e})\n")
    sys.stdout.write(f"{arguments.destination} ({to})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
