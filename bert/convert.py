"""Convert checkpoints: `python -m bert.convert SOURCE DEST [--to huggingface|original|onnx] [--verify]`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert.checkpoint import load_original, read_state_dict, to_original
from bert.configuration import M2BertConfig
from bert.data.tokenizer import load_tokenizer
from bert.errors import CheckpointError, RecipeError
from bert.export import onnx
from bert.export.folder import FOREIGN_FIELDS, Model, difference, load_exported, write_folder
from bert.modeling import M2BertForMaskedLM, M2BertForSequenceClassification
from bert.safe_loading import load_checkpoint_file
from bert.trained import LATEST_NAME, has_record, load_trained

log = logging.getLogger(__name__)

FORMATS = ("huggingface", "original", "onnx")
SUFFIXES = {".pt": "original", ".onnx": "onnx"}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
TOLERANCES = {"huggingface": 1e-5, "original": 1e-5, "onnx": 1e-4}
FINETUNED = "monarch-mixer-bert fine-tuned"  # bert.glue.model.FINETUNED, without importing the sweep


@dataclass
class Source:
    """A model that was read, and what its source says about it."""

    model: Model
    tokenizer_name: str | None = None  # a folder; None: the source has none
    origin: dict[str, Any] = field(default_factory=dict)  # for the model card
    notes: list[str] = field(default_factory=list)  # names that were left out, one a line

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
        config_file: JSON with the model's fields, for a file that does not bring them. Default: NAME.config.json
            beside the file, which a conversion to the original format writes.
        task: "mlm" or "classification"; None: what the weights show.
        tokenizer: name or path of the tokenizer; None: the source's own.

    Raises:
        RecipeError: there is no such source, it would run code, or a name or shape does not fit.
    """
    if path.is_dir() and not (path / LATEST_NAME).exists():
        found = _read_folder(path, task)
    else:
        file = path / LATEST_NAME if path.is_dir() else path
        content = load_checkpoint_file(file)
        if has_record(content):
            return _read_run(path, tokenizer)
        if isinstance(content, Mapping) and content.get("kind") == FINETUNED:
            found = _read_finetuned(content)
        else:
            found = _read_original(file, content, config_file, task)
    if tokenizer is not None:
        load_tokenizer(tokenizer)
        found.tokenizer_name = tokenizer
    return found


def _read_run(path: Path, tokenizer: str | None) -> Source:
    trained = load_trained(path)
    model = trained.model.model
    if not isinstance(model, M2BertForMaskedLM):
        raise RecipeError(f"{path} holds {trained.record['model']['name']}, which is Hugging Face's own and no M2-BERT")
    trained.tokenizer(tokenizer)  # an error where it is another one
    record = trained.record
    origin = {"source": "a run of monarch-mixer-bert", "recipe": record["recipe"], "versions": record.get("versions")}
    origin["metrics"] = _last_evaluation((path if path.is_dir() else path.parent) / "metrics.jsonl")
    return Source(model, tokenizer or trained.tokenizer_folder(), origin)


def _last_evaluation(path: Path) -> dict[str, Any]:
    """The last evaluation that a run wrote down; empty where there is none."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    evaluations = [line for line in lines if line.get("event") == "eval"]
    return {name: value for name, value in evaluations[-1].items() if name != "event"} if evaluations else {}


def _read_finetuned(content: Mapping[str, Any]) -> Source:
    section, weights = content["model"], content["weights"]
    if section["name"] not in ("m2_bert", "attention_bert"):
        raise RecipeError("this fine-tuned model is Hugging Face's own and no M2-BERT")
    fields = M2BertConfig.from_recipe(dict(section["config"]))
    fields.num_labels = len(weights["classifier.weight"])
    model = M2BertForSequenceClassification(fields)
    _load_strictly(model, weights, "the fine-tuned model")
    metadata = json.loads(content["metadata"])
    notes = ["pooling is not recorded in a fine-tuned file: first token; set pool_all in config.json for the mean"]
    origin = {"source": f"a fine-tuning job on {metadata.get('task')}", "metrics": metadata.get("metrics")}
    return Source(model.eval(), None, origin, notes)


def _read_folder(path: Path, task: str | None) -> Source:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds neither {LATEST_NAME} of a run nor a config.json")
    files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not files:
        raise CheckpointError(f"{path} has no weights: one file, {' or '.join(WEIGHT_FILES)}")
    content = load_checkpoint_file(files[0])
    config = _read_config(path / "config.json")
    if any(name.startswith("bert.encoder.layers.") for name in content):
        kind = M2BertForSequenceClassification if "classifier.weight" in content else M2BertForMaskedLM
        try:
            model: Model = kind(M2BertConfig(**config))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path / 'config.json'}: {error}") from error
        _load_strictly(model, content, str(files[0]))
        found = Source(model.eval(), origin={"source": "a Hugging Face folder of monarch-mixer-bert"})
    else:
        found = _from_original(content, config, task, "a folder with the original M2 names")
    if any((path / name).is_file() for name in TOKENIZER_FILES):
        found.tokenizer_name = str(path)
    return found


def _read_original(file: Path, content: Any, config_file: Path | None, task: str | None) -> Source:
    beside = _config_beside(file)
    if config_file is None and beside.is_file():
        config_file = beside
        log.info("configuration: %s", beside)
    config = {} if config_file is None else _read_config(config_file)
    return _from_original(content, config, task, "an original M2 checkpoint")


def _from_original(content: Any, config: Mapping[str, Any], task: str | None, source: str) -> Source:
    state = read_state_dict(content)
    if task is None:
        task = "classification" if "classifier.weight" in state else "mlm"
    model = load_original(state, config, task)
    return Source(model, origin={"source": source})


def _config_beside(file: Path) -> Path:
    return file.with_name(f"{file.stem}.config.json")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no file {path}") from None
    except ValueError as error:
        raise RecipeError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no fields of a model")
    return {name: value for name, value in content.items() if name not in FOREIGN_FIELDS}


def _load_strictly(model: Model, weights: Mapping[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit its configuration; nothing was converted: {error}") from error


def convert(
    source: Source, destination: Path, to: str, *, verify: bool = False, overwrite: bool = False
) -> float | None:
    """Write a model in another format, whole or not at all.

    Args:
        source: what `read_source` gave; not to be used afterwards.
        destination: a folder ("huggingface") or a file.
        to: one of FORMATS.
        verify: whether to read the result and run both models on the same inputs, before it gets its name.
        overwrite: whether a destination that exists may be replaced.

    Returns:
        The largest difference of logits, relative to the largest logit where that is over 1; None without `verify`.

    Raises:
        RecipeError: the destination exists, or the models differ by more than TOLERANCES; then nothing is written.
    """
    if to == "onnx":
        onnx.check_installed()
    taken = destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))
    if taken and not overwrite:
        raise RecipeError(f"{destination} exists: give another name, or --overwrite")
    if taken and destination.is_dir() is not (to == "huggingface"):
        raise RecipeError(f"{destination} is {'a folder' if destination.is_dir() else 'a file'}: give another name")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as name:
        temporary = Path(name) / destination.name
        inputs = _inputs(source.model)
        expected = [_logits(source.model, *pair) for pair in inputs] if verify else []
        _write(source, temporary, to)
        largest = None
        if verify:
            found = [_run(source, temporary, to, *pair) for pair in inputs]
            # Not by Python's max, which loses a NaN that comes second.
            largest = torch.tensor([difference(a, b) for a, b in zip(found, expected, strict=True)]).max().item()
            if not largest <= TOLERANCES[to]:
                raise CheckpointError(f"the result differs by {largest:.1e}, over {TOLERANCES[to]:.0e}: not kept")
        # A file's companions first: the destination's own name says that all is there.
        for companion in temporary.parent.iterdir():
            if companion != temporary:
                os.replace(companion, destination.parent / companion.name)
        if destination.is_dir():
            shutil.rmtree(destination)
        os.replace(temporary, destination)
    return largest


def _write(source: Source, path: Path, to: str) -> None:
    if to == "huggingface":
        path.mkdir()
        tokenizer = None if source.tokenizer_name is None else load_tokenizer(source.tokenizer_name)
        write_folder(path, source.model, tokenizer, origin=source.origin)
    elif to == "original":
        state = {f"model.{name}": value for name, value in to_original(source.model).items()}
        torch.save({"state": {"model": state}}, path)
        fields = source.model.config.to_dict()
        text = json.dumps({key: value for key, value in fields.items() if key not in FOREIGN_FIELDS}, indent=2) + "\n"
        _config_beside(path).write_text(text, encoding="utf-8")
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
        config = _read_config(_config_beside(path))
        return _logits(load_original(path, config, source.task), ids, mask)
    return _logits(load_exported(path, type(source.model).__name__), ids, mask)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 for anything that was not converted."""
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
    parser.add_argument("--license", help="identifier for the model card, such as apache-2.0")
    parser.add_argument("--verify", action="store_true", help="run both models on the same inputs and compare")
    parser.add_argument("--overwrite", action="store_true", help="replace a destination that exists")
    arguments = parser.parse_args(argv)
    to = arguments.to or SUFFIXES.get(arguments.destination.suffix, "huggingface")
    try:
        source = read_source(arguments.source, arguments.config, arguments.task, arguments.tokenizer)
        if arguments.license:
            source.origin["license"] = arguments.license
        for note in source.notes:
            sys.stderr.write(f"note: {note}\n")
        if to == "huggingface" and source.tokenizer_name is None:
            sys.stderr.write("note: no tokenizer is written, for the source has none: --tokenizer names one\n")
        largest = convert(source, arguments.destination, to, verify=arguments.verify, overwrite=arguments.overwrite)
    except RecipeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if largest is not None:
        sys.stdout.write(f"largest difference {largest:.1e} (tolerance {TOLERANCES[to]:.0e})\n")
    sys.stdout.write(f"{arguments.destination} ({to})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
