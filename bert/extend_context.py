"""Make a model take longer texts: `python -m bert.extend_context MODEL LENGTH --mode keep-taps --out DIR`.

Three things in an M2-BERT are tied to its length: the table of positions, and of each filter the learned position
features (z) and the times that its decay goes by. Nothing else changes, so the rest is copied as it is. By mode:

keep-taps    the old filter exactly (bit for bit) on the old lags, continued past them; the position table repeats, as
             in the long-context M2 models. On texts of the old length outputs are what they were. (If the model leaves
             padding out, or the text has no padding: a model that sees padding sees more of it at its new length.)
tile         position table and position features repeat, and the decay is stretched over the new length: what the
             original code does, but for its first rows, which it leaves zero. Filters change on the old lags too.
interpolate  position table and filters stretched: what was at half of the old length is at half of the new one.

The result is a start for training at the new length (load_path and load_weights_only of a recipe, such as
yamls/pretrain/m2-base-2k-continue.yaml), and loads wherever MODEL does.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bert.checkpoint import Model, read_config, save_original
from bert.configuration import M2BertConfig
from bert.convert import WEIGHT_SUFFIXES, read_source
from bert.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from bert.errors import CheckpointError, RecipeError, exit_code
from bert.exact_loading import check_config_keys, load_exactly
from bert.export.folder import write_folder
from bert.safe_loading import load_checkpoint_file
from bert.trained import FINETUNED, LATEST_NAME, RECORD_NAME, has_record, load_trained
from monarch_mixer.filters import EXTENSION_MODES, extend_positions, extend_rows

POSITION_TABLE = "embeddings.position_embeddings.weight"
# By the name of the features: that of the times. Ours, then the original's, whose shapes have further axes of one.
FILTER_POSITIONS = {".position_features": ".times", ".pos_emb.z": ".pos_emb.t"}
POSITION_IDS = "embeddings.position_ids"  # of the original: 0, 1, ...
WEIGHTS = "model.pt"  # an original's checkpoint, extended

log = logging.getLogger(__name__)


def extend_state_dict(state: Mapping[str, Tensor], length: int, mode: str) -> dict[str, Tensor]:
    """Return a state dict, in our names or the original's, of the same model for `length` tokens.

    Args:
        state: the weights; not changed.
        length: the new length. Tables and filters that already have as many rows stay as they are.
        mode: see above.

    Raises:
        RecipeError: nothing is shorter than `length`, or a filter cannot be continued.
    """
    extended = dict(state)
    for name, value in state.items():
        if name.endswith(POSITION_TABLE) and len(value) < length:
            extended[name] = extend_rows(value, length, mode)
        elif name.endswith(POSITION_IDS) and value.numel() < length:
            extended[name] = torch.arange(length, dtype=value.dtype)[None]
        suffix = next((suffix for suffix in FILTER_POSITIONS if name.endswith(suffix)), None)
        if suffix is None or value.shape[-2] >= length:
            continue
        times_name = name.removesuffix(suffix) + FILTER_POSITIONS[suffix]
        if times_name not in state:
            raise CheckpointError(f"{name} has no {times_name} beside it: this is no whole M2-BERT")
        times = state[times_name]
        try:
            features, new_times = extend_positions(value.flatten(0, -2), times.flatten(), length, mode)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error
        extended[name] = features.view(*value.shape[:-2], length, -1)
        extended[times_name] = new_times.view([length if size == times.numel() else 1 for size in times.shape])
    if all(extended[name].shape == value.shape for name, value in state.items()):
        raise RecipeError(f"LENGTH: nothing in the model is shorter than {length}; it is made longer only")
    return extended


def extend(source: str | os.PathLike[str], length: int, mode: str, out: str | os.PathLike[str]) -> Path:
    """Extend a model and write it in the form it has, weights in fp32.

    Args:
        source: a checkpoint saved by main.py or its folder; an original checkpoint (.pt, .bin, .safetensors), with the
            config.json beside it where there is one; or a Hugging Face folder of an M2-BERT, exported or published.
        length: the new length in tokens.
        mode: see above.
        out: a new folder.

    Returns:
        What was written: OUT/latest-rank0.pt (of a run), OUT/model.pt (of an original) or OUT (Hugging Face).

    Raises:
        RecipeError: nothing of the model is shorter, it is of another kind, or `out` exists already.
        OSError: it cannot be written there.
    """
    path, folder = Path(source).expanduser(), Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"--out: {folder} exists already and is not empty: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        written = _extend_into(path, length, mode, temporary)
        temporary.chmod(0o755)  # mkdtemp's are private
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / written


def _extend_into(path: Path, length: int, mode: str, folder: Path) -> str:
    """Write the extended model into a folder; return the name of what is to be given to whoever loads it."""
    if path.is_dir() and not (path / LATEST_NAME).exists():
        _extend_folder(path, length, mode, folder)
        return ""
    file = path / LATEST_NAME if path.is_dir() else path
    content = load_checkpoint_file(file)
    if has_record(content):
        _extend_run(file, length, mode, folder / LATEST_NAME)
        return LATEST_NAME
    if isinstance(content, Mapping) and content.get("kind") == FINETUNED:
        raise CheckpointError(f"{file} is a fine-tuning job's: make a folder of it first (python -m bert.convert)")
    beside = file.with_name("config.json")
    source = read_source(file, beside if beside.is_file() else None)
    for note in source.notes:
        log.warning("%s", note)
    save_original(_longer_model(source.model, length, mode), folder / WEIGHTS)
    for name in TOKENIZER_FILES:
        if (file.parent / name).is_file():
            shutil.copy(file.parent / name, folder / name)
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.is_file():
        settings = read_config(tokenizer_config)
        longest = max(length, settings.get("model_max_length") or 0)
        tokenizer_config.write_text(json.dumps({**settings, "model_max_length": longest}, indent=2), encoding="utf-8")
    return WEIGHTS


def _longer_model(model: Model, length: int, mode: str) -> Model:
    config = copy.deepcopy(model.config)
    for field, value in _longer(config, length).items():
        setattr(config, field, value)
    state = extend_state_dict(model.state_dict(), length, mode)
    return load_exactly(lambda: type(model)(config), state, "the extended model")


def _extend_run(file: Path, length: int, mode: str, out: Path) -> None:
    """Write a run's weights and record for the new length, without optimizer and place in the data."""
    trained = load_trained(file)
    section = trained.record["model"]
    if section["name"] == "hf_bert":
        raise CheckpointError(f"{file} is a Hugging Face BERT: this command is for M2-BERT and its attention baseline")
    config = trained.model.model.config
    assert isinstance(config, M2BertConfig)
    record = {
        **trained.record,
        "model": {"name": section["name"], "config": {**section["config"], **_longer(config, length)}},
        "extended": {"from": file.parent.name, "length": length, "mode": mode},
    }
    state = {
        "model": extend_state_dict(trained.model.state_dict(), length, mode),
        "callbacks": {RECORD_NAME: {"record": json.dumps(record)}},
    }
    torch.save({"state": state, "rng": []}, out)


def _longer(config: M2BertConfig, length: int) -> dict[str, int]:
    names = ("max_position_embeddings", "long_conv_l_max")
    return {name: max(length, getattr(config, name)) for name in names}


def _extend_folder(path: Path, length: int, mode: str, folder: Path) -> None:
    """Write a Hugging Face folder's model for the new length as a conversion would, with all that belongs to it."""
    check_config_keys(path)
    source = read_source(path)
    origin = {**source.origin, "source": f"a Hugging Face folder, and extended to {length} tokens ({mode})"}
    tokenizer = None if source.tokenizer_name is None else load_tokenizer(source.tokenizer_name)
    model = _longer_model(source.model, length, mode)
    write_folder(folder, model, tokenizer, pooling=source.pooling, origin=origin)
    for file in path.iterdir():  # a licence, for one; weights were written anew
        other = file.suffix not in WEIGHT_SUFFIXES and not file.name.endswith(".index.json")
        if file.is_file() and other and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for a mistake in what was given, 4 for a full disk, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m bert.extend_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a checkpoint of main.py or its folder, an original M2's .pt, or a HF folder")
    parser.add_argument("length", type=int, help="tokens of the longest text; any number over the model's own")
    parser.add_argument("--mode", choices=EXTENSION_MODES, default="keep-taps", help="default: %(default)s")
    parser.add_argument("--out", required=True, help="a new folder for the extended model")
    arguments = parser.parse_args(argv)
    try:
        written = extend(arguments.model, arguments.length, arguments.mode, arguments.out)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing was written\n")
        return 130
    except (RecipeError, OSError, RuntimeError, MemoryError, SafetensorError) as error:
        # Torch has no class of its own for it on a CPU.
        if isinstance(error, MemoryError) or (type(error) is RuntimeError and "memory" in str(error)):
            error = RecipeError(f"LENGTH: a model for {arguments.length:,} tokens does not fit into memory")
        return exit_code(error, "nothing was written: make room and give the same command again")
    sys.stdout.write(f"{written}: up to {arguments.length} tokens ({arguments.mode})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
