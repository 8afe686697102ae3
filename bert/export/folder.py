"""A Hugging Face folder of an M2-BERT: weights, configuration, modelling file, tokenizer and model card."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from bert.checkpoint import Model, fields_of
from bert.configuration import M2BertConfig
from bert.data.tokenizer import ROLES
from bert.errors import CheckpointError
from bert.export.card import model_card
from bert.export.sources import modeling_source

MODELING_FILE = "modeling_m2_bert"
AUTO_CLASSES = {
    "AutoConfig": "M2BertConfig",
    "AutoModel": "M2BertModel",
    "AutoModelForMaskedLM": "M2BertForMaskedLM",
    "AutoModelForSequenceClassification": "M2BertForSequenceClassification",
}
# Reads tokenizer.json as it is, in every version of transformers.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
POOLING_FOLDER = "1_Pooling"


def write_folder(
    folder: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    pooling: str,
    origin: Mapping[str, Any],
) -> None:
    """Write a folder that `from_pretrained(folder, trust_remote_code=True)` and sentence-transformers read.

    Args:
        folder: an empty folder.
        model: the model; its weights are written in their own dtype.
        tokenizer: its tokenizer; None: the folder has none, and its card says so.
        pooling: "mean" or "first", of sentence-transformers' vectors; a model that has sentence embeddings of its own
            gives those.
        origin: what is known of where the model comes from, for the card (see `model_card`).
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / f"{MODELING_FILE}.py").write_text(modeling_source(), encoding="utf-8")
    shutil.copymode(folder / f"{MODELING_FILE}.py", folder / "model.safetensors")  # which is its owner's alone
    _write_json(folder / "config.json", config_json(model, tokenizer is not None))
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer, model.config.max_sequence_length)
        _write_sentence_transformer(folder, model, pooling)
    (folder / "README.md").write_text(model_card(model, tokenizer is not None, origin), encoding="utf-8")


def config_json(model: Model, has_tokenizer: bool) -> dict[str, Any]:
    """Return the content of config.json: every field, by the names of the published checkpoints, and the classes."""
    # Pipelines of transformers 4 look for a tokenizer of a model that they do not know only where this says so.
    tokenizer = {"tokenizer_class": TOKENIZER_CLASS} if has_tokenizer else {}
    return {
        "architectures": [type(model).__name__],
        "auto_map": {auto: f"{MODELING_FILE}.{name}" for auto, name in AUTO_CLASSES.items()},
        "model_type": M2BertConfig.model_type,
        **tokenizer,
        **fields_of(model.config),
    }


def load_exported(folder: Path, kind: str) -> Any:
    """Load a folder that `write_folder` wrote as somebody does who has its modelling file only.

    The modelling file is compared with what this version generates first, so that no code but our own is run: a folder
    whose file is stale (an older version wrote it, or somebody changed it) is refused. Its weights are not: `python -m
    bert.convert` reads them by their names, never runs the file, and writes the current one.

    Args:
        folder: the folder.
        kind: the class, such as "M2BertForMaskedLM".

    Raises:
        CheckpointError: the modelling file is another one.
    """
    path = folder / f"{MODELING_FILE}.py"
    if path.read_text(encoding="utf-8") != modeling_source():
        raise CheckpointError(f"{path} is not the file that this version writes: it is not run")
    name = f"_exported_{MODELING_FILE}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
        return getattr(module, kind).from_pretrained(folder).eval()
    finally:
        del sys.modules[name]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _portable(tokenizer: PreTrainedTokenizerFast, limit: int | None) -> PreTrainedTokenizerFast:
    """The same tokenizer as the class that every version of transformers reads from tokenizer.json alone."""
    named = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ROLES}
    lengths = {} if limit is None else {"model_max_length": limit}
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named, **lengths)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, limit: int | None) -> None:
    _portable(tokenizer, limit).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # Version 5 gives no token types unless told to, and pairs need them.
    _write_json(path, {**settings, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]})


def _write_sentence_transformer(folder: Path, model: Model, pooling: str) -> None:
    """Write what sentence-transformers looks for: the encoder, its pooling, and what may come after."""
    config = model.config
    own = config.gather_sentence_embeddings
    if own:
        pooling = "mean" if config.pool_all and not config.use_cls_token else "first"
    modules = [("", "Transformer"), (POOLING_FOLDER, "Pooling")]
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": config.max_sequence_length, "do_lower_case": False}
    )
    modes = {"cls_token": pooling == "first", "mean_tokens": pooling == "mean"}
    (folder / POOLING_FOLDER).mkdir()
    _write_json(
        folder / POOLING_FOLDER / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            **{f"pooling_mode_{name}": chosen for name, chosen in modes.items()},
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    if own and not config.use_cls_token:
        modules.append(("2_Dense", "Dense"))
        _write_pooler(folder / "2_Dense", model)
    if own and config.use_normalized_embeddings:
        modules.append(("3_Normalize", "Normalize"))
        (folder / "3_Normalize").mkdir()
    _write_json(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
    )


def _write_pooler(folder: Path, model: Model) -> None:
    """Write the pooler's layer as a module of sentence-transformers."""
    assert model.bert.pooler is not None
    size = model.config.hidden_size
    settings = {"in_features": size, "out_features": size, "bias": True}
    folder.mkdir()
    _write_json(folder / "config.json", {**settings, "activation_function": "torch.nn.modules.activation.Tanh"})
    state = model.bert.pooler.dense.state_dict()
    save_file({f"linear.{name}": value.cpu() for name, value in state.items()}, folder / "model.safetensors")


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value where that is over 1; NaN counts as it."""
    scale = max(1.0, expected.abs().max().item())
    return ((found.to(torch.float64) - expected.to(torch.float64)).abs().max() / scale).item()
