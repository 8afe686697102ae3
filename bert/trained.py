"""From a file or folder back to a model: checkpoints of our recipes, of the original code, Hugging Face folders."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers import BertConfig
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast
from yaml import YAMLError

from bert.checkpoint import load_any, load_original, read_config
from bert.composer_models import HuggingFaceBert, MaskedLanguageModel, build_masked_lm
from bert.configuration import M2BertConfig
from bert.data.tokenizer import TOKENIZER_FILES, fingerprint, load_tokenizer
from bert.errors import CheckpointError, DataError
from bert.exact_loading import LOADING_KEYS, check_counts, checked_weights, load_exactly
from bert.modeling import M2BertForMaskedLM, M2BertForSequenceClassification
from bert.safe_loading import load_checkpoint_file

log = logging.getLogger(__name__)

# The callback that carries the recipe in each checkpoint (bert.recipe.callbacks.RecipeRecord).
RECORD_NAME = "RecipeRecord"
LATEST_NAME = "latest-rank0.pt"
FINETUNED = "monarch-mixer-bert fine-tuned"  # kind of the file that a job of bert.glue keeps


@dataclass
class TrainedModel:
    """A trained model and the record of what made it."""

    model: MaskedLanguageModel
    record: dict[str, Any]  # recipe (YAML), model (name, config), tokenizer_name, tokenizer_fingerprint, versions
    file: Path = Path()  # of the checkpoint

    def tokenizer(self, name_or_path: str | None = None) -> PreTrainedTokenizerFast:
        """Return the tokenizer the model was trained with.

        Args:
            name_or_path: where it is; None for the copy beside the checkpoint or in the training data's folder.

        Raises:
            DataError: it is not there, or is another one (its fingerprint differs).
        """
        tokenizer = load_tokenizer(name_or_path or self.tokenizer_folder())
        found, expected = fingerprint(tokenizer), self.record.get("tokenizer_fingerprint")
        if expected is not None and found != expected:
            raise DataError(f"this is not the model's tokenizer: its fingerprint is {found}, the model's {expected}")
        return tokenizer

    def tokenizer_folder(self) -> str:
        """Return the copy beside the checkpoint, or in the training data's folder; DataError where there is none."""
        beside = self.file.resolve().parent / "tokenizer"
        if beside.is_dir():
            return str(beside)
        for folder in self._data_folders():
            if (folder / "tokenizer").is_dir():
                return str(folder / "tokenizer")
        raise DataError(
            f"the model's tokenizer ({self.record.get('tokenizer_name')}) is not where the training data was: name it, "
            f"or its folder, with --tokenizer"
        )

    def _data_folders(self) -> list[Path]:
        """The folders of the training splits, as the recipe names them; none where it names none."""
        try:
            dataset = OmegaConf.create(self.record["recipe"]).train_loader.dataset
            streams = (dataset, *(dataset.get("streams") or {}).values())
            return [
                Path(str(s.get("local") or dataset.get("local")), str(s.get("split") or dataset.get("split") or ""))
                for s in streams
            ]
        except (KeyError, TypeError, AttributeError, ValueError, OmegaConfBaseException, YAMLError):
            return []


def has_record(content: Any) -> bool:
    """Say whether the content of a checkpoint file was saved by a recipe of this project."""
    state = content.get("state") if isinstance(content, Mapping) else None
    callbacks = state.get("callbacks") if isinstance(state, Mapping) else None
    return isinstance(callbacks, Mapping) and RECORD_NAME in callbacks


def load_trained(path: str | os.PathLike[str]) -> TrainedModel:
    """Load a checkpoint that `main.py` saved, a file or its folder (then the latest one), in evaluation mode.

    Raises:
        CheckpointError: it cannot be read without running code, was not made by a recipe of this project, or does not
            fit the model that its record names.
    """
    file = Path(path)
    if file.is_dir():
        file = file / LATEST_NAME
    content = load_checkpoint_file(file)
    try:
        state: Mapping[str, Any] = content["state"]
        record = json.loads(state["callbacks"][RECORD_NAME]["record"])
        name, config = record["model"]["name"], dict(record["model"]["config"])
        weights = checked_weights(state["model"], str(file))
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise CheckpointError(f"{file} carries no record of a recipe: it was not saved by this project") from None
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    check_counts(config, weights, str(file))
    model = load_exactly(
        lambda: build_masked_lm(name, config, train_mask_rate=1.0, eval_mask_rate=1.0), weights, str(file)
    )
    return TrainedModel(model, record, file)


# Files of a Hugging Face folder that hold weights, in the order they are looked for.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SPARE_PARTS = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")  # of a Hugging Face BERT
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")  # may name code on the Hub


OWN_POOLING = "own"  # the sentence embedding that a model with `gather_sentence_embeddings` gives
Network = M2BertForMaskedLM | M2BertForSequenceClassification | HuggingFaceBert


@dataclass
class OpenedModel:
    """A network with its head, from wherever it came."""

    network: Network
    tokenizer: PreTrainedTokenizerFast
    record: dict[str, Any]  # of a recipe of this project; of other models what is known of it
    file: Path  # of the weights


def open_model(path: str | os.PathLike[str], tokenizer: str | None = None) -> OpenedModel:
    """Load any model that this project can read, in evaluation mode, on the CPU.

    Args:
        path: a run's folder or checkpoint; a checkpoint of the original code (with a config.json beside it where the
            weights alone do not show enough); a Hugging Face folder of an M2-BERT (exported, or as published) or of a
            BERT with its masked-token head. An M2-BERT may have a classifier in place of that head.
        tokenizer: name or path; None: the model's own copy.

    Raises:
        CheckpointError: there is nothing of the kind, it cannot be read without running code, or does not fit.
        DataError: the tokenizer is not there, is another one, or has more entries than the model.
    """
    place = Path(path)
    if place.is_dir() and not (place / LATEST_NAME).exists() and (place / "config.json").is_file():
        file = next((place / name for name in WEIGHT_FILES if (place / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{place} has a config.json, but none of {', '.join(WEIGHT_FILES)}")
        network = _from_folder(place, file)
        about = {"pooling": OWN_POOLING if gives_sentence_embeddings(network) else folder_pooling(place)}
        return OpenedModel(network, _tokenizer_of(tokenizer, place, network.config.vocab_size), about, file)
    file = place / LATEST_NAME if place.is_dir() else place
    if place.is_dir() and not file.exists():
        raise CheckpointError(f"{place} holds no model: neither {LATEST_NAME} (a run) nor config.json (Hugging Face)")
    if file.suffix == ".safetensors" or not has_record(load_checkpoint_file(file)):
        beside = file.with_name("config.json")
        original = load_original(file, read_config(beside) if beside.is_file() else {}, None)
        about = {"pooling": OWN_POOLING if gives_sentence_embeddings(original) else "mean"}
        return OpenedModel(original, _tokenizer_of(tokenizer, file.parent, original.config.vocab_size), about, file)
    trained = load_trained(file)
    found = trained.tokenizer(tokenizer)
    check_vocabulary(found, trained.model.model.config.vocab_size)
    return OpenedModel(trained.model.model.eval(), found, trained.record, file)


def gives_sentence_embeddings(network: Network) -> bool:
    """Say whether a model gives sentence embeddings itself."""
    return isinstance(network, M2BertForSequenceClassification) and network.config.gather_sentence_embeddings


def folder_pooling(folder: Path) -> str:
    """Return how a folder says that its vectors are pooled: the "first" token, or "mean", also where it is silent."""
    path = folder / "1_Pooling" / "config.json"
    settings = read_config(path) if path.is_file() else {}
    return "first" if settings.get("pooling_mode_cls_token") or settings.get("pooling_mode") == "cls" else "mean"


def _from_folder(folder: Path, file: Path) -> Network:
    config = read_config(folder / "config.json")
    model_type = config.get("model_type")
    is_monarch = "monarch_mixer_sequence_mixing" in config or "long_conv_l_max" in config
    if model_type == M2BertConfig.model_type or is_monarch:
        return load_any(file, config, None, str(folder))
    if model_type != "bert":
        raise CheckpointError(f"{folder}: models of type '{model_type}' cannot be read; m2_bert and bert can")
    return _hugging_face_bert(folder, file, config)


def _hugging_face_bert(folder: Path, file: Path, config: Mapping[str, Any]) -> HuggingFaceBert:
    """Build the network from the fields and load the weights that were checked: transformers looks for no file."""
    weights = checked_weights(load_checkpoint_file(file), str(file))
    check_counts(config, weights, str(folder))
    fields = {key: value for key, value in config.items() if key not in (*LOADING_KEYS, *ATTENTION_KEYS)}
    # The pooler and the next-sentence head of a pretrained BERT are of no use here; anything else must fit.
    weights = {_current_name(name): value for name, value in weights.items() if not name.startswith(SPARE_PARTS)}
    if fields.get("tie_word_embeddings", True):
        _complete_tie(weights, "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", file)
    _complete_tie(weights, "cls.predictions.bias", "cls.predictions.decoder.bias", file)
    return load_exactly(lambda: HuggingFaceBert(BertConfig(**fields)), weights, str(folder))


def _current_name(name: str) -> str:
    """The name of a weight in a folder converted from TensorFlow, such as bert-base-uncased, as it is called now."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _complete_tie(weights: dict[str, Tensor], first: str, second: str, file: Path) -> None:
    """Add the one of two names of a weight that a file leaves out; CheckpointError where it holds two weights."""
    if first in weights and second in weights and not torch.equal(weights[first], weights[second]):
        raise CheckpointError(f"{file}: {first} and {second} are one weight of the model and differ in the file")
    for name, other in ((first, second), (second, first)):
        if other in weights:
            weights.setdefault(name, weights[other])


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids a model has no embeddings for.

    Raises:
        DataError: it has more entries than the model's vocabulary (`vocab_size`).
    """
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer):,} entries, the model's vocab_size is "
            f"{vocab_size:,}: it is not the model's own; name that with --tokenizer"
        )


def _tokenizer_of(name_or_path: str | None, folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    if name_or_path is None:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise DataError(
                f"{folder} holds no tokenizer: name it with --tokenizer (the published models: bert-base-uncased)"
            )
        name_or_path = str(folder)
    tokenizer = load_tokenizer(name_or_path)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer
