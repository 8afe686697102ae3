"""The classifier that is fine-tuned, and the checkpoints it can start from: whole, or an error."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from composer.models import ComposerModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from bert.checkpoint import load_original
from bert.composer_models import bert_fields, instantiate, model_config
from bert.configuration import M2BertConfig
from bert.data.tokenizer import TOKENIZER_FILES, fingerprint, load_tokenizer
from bert.errors import CheckpointError, DataError, RecipeError, nearest
from bert.exact_loading import check_config_keys
from bert.files import is_local
from bert.glue.data import file_hash
from bert.glue.metrics import DatasetMetric
from bert.modeling import M2BertForSequenceClassification
from bert.recipe import builders
from bert.recipe.callbacks import differences
from bert.safe_loading import check_folder, load_checkpoint_file
from bert.trained import FINETUNED, LATEST_NAME, TrainedModel, has_record, load_trained

log = logging.getLogger(__name__)

# A checkpoint's settings that a fine-tuning YAML may change: they are no part of what its weights mean.
FREE_FIELDS = {
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "pool_all",
    "mask_padding",
    "initialization",
    "initializer_range",
}
NEW_PARTS = ("bert.pooler.", "classifier.")  # of a classifier that starts from a masked language model
MLM_HEADS = ("head.", "cls.")


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SequenceClassifier(ComposerModel):
    """An encoder with a classifier (or, with one label, a regressor) for Composer."""

    def __init__(self, model: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.model = model
        self.num_labels = num_labels
        self.metric_names: list[str] = []
        taken = inspect.signature(model.forward).parameters
        self.inputs = [name for name in INPUTS if name in taken]  # not every model knows token types
        self.training_pass: Callable[[Mapping[str, Tensor]], Tensor] | None = None  # for `model`, in training

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs (batch, labels): logits, or the prediction of a regression."""
        if self.training_pass is not None and self.training and torch.is_grad_enabled():
            return self.training_pass(batch)
        return self.model(**{name: batch[name] for name in self.inputs}).logits

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Mean cross entropy in nats, or the mean squared error of a regression; in fp32."""
        if self.num_labels == 1:
            return F.mse_loss(outputs.float().squeeze(-1), batch["labels"])
        return F.cross_entropy(outputs.float(), batch["labels"])

    def eval_forward(self, batch: Any, outputs: Tensor | None = None) -> Tensor:
        """Return the outputs of an evaluation batch."""
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
        """Return new metrics by name; none in training, where their whole-split forms would keep all outputs."""
        return {} if is_train else {name: DatasetMetric(name) for name in self.metric_names}

    def update_metric(self, batch: Any, outputs: Tensor, metric: Any) -> None:
        """Add a batch's outputs to a metric."""
        metric.update(outputs, batch["labels"])

    @property
    def fixed_length(self) -> int | None:
        """Tokens that every text must be padded to; None for a model that leaves padding out.

        Without `mask_padding` the Monarch mixer processes padding like any token, so that it knows texts only at the
        length it was trained at.
        """
        config = self.model.config
        if isinstance(config, M2BertConfig) and not config.leaves_padding_out:
            return config.max_sequence_length
        return None

    @property
    def max_length(self) -> int | None:
        """The longest text in tokens; None where nothing limits it."""
        config = self.model.config
        if isinstance(config, M2BertConfig):
            return config.max_sequence_length
        return getattr(config, "max_position_embeddings", None)


def build_classifier(name: str, config: Mapping[str, Any], *, num_labels: int, pooling: str) -> SequenceClassifier:
    """Build the classifier that a `model` section describes, with weights drawn at random.

    Args:
        name: "m2_bert", "attention_bert" or "hf_bert".
        config: fields of the model's configuration.
        num_labels: outputs; 1 for a regression.
        pooling: "first" token or "mean" of all.

    Raises:
        RecipeError: the name or a field is unknown, or the model cannot pool so.
    """
    fields = model_config(name, config)
    fields.num_labels = num_labels
    if isinstance(fields, M2BertConfig):
        fields.pool_all = pooling == "mean"
        return SequenceClassifier(instantiate(M2BertForSequenceClassification, fields), num_labels)
    _check_pooling(pooling, name)
    return SequenceClassifier(instantiate(BertForSequenceClassification, fields), num_labels)


def _random(name: str, config: dict[str, Any], num_labels: int, pooling: str) -> SequenceClassifier:
    return builders.build("classifier", name, {}, config=config, num_labels=num_labels, pooling=pooling)


def _check_pooling(pooling: str, name: str) -> None:
    if pooling != "first":
        raise RecipeError(f"pooling: {name} classifies by its first token only; set pooling: first")


@dataclass(frozen=True)
class Start:
    """What classifiers start from: a `model` section and, unless the weights are drawn at random, a checkpoint."""

    name: str | None
    config: dict[str, Any]
    checkpoint: str | None = None
    trust_remote_code: bool = False

    def kind(self) -> str:
        """Return "random", "ours" (a run of main.py), "finetuned" (a job's), "original" (M2's) or "hugging_face"."""
        if self.checkpoint is None:
            return "random"
        path = Path(self.checkpoint).expanduser()
        if path.is_dir():
            if (path / LATEST_NAME).exists():
                return "ours"
            if (path / "config.json").is_file():
                return "hugging_face"
            raise CheckpointError(f"checkpoint: {path} holds neither {LATEST_NAME} of a run nor a config.json")
        if path.is_file():
            if path.suffix in (".pt", ".bin", ".safetensors"):
                content = load_checkpoint_file(path)
                if isinstance(content, dict) and content.get("kind") == FINETUNED:
                    return "finetuned"
                return "ours" if has_record(content) else "original"
            raise CheckpointError(f"checkpoint: {path} is none of .pt, .bin and .safetensors")
        name = self.checkpoint
        if path.suffix in (".pt", ".bin", ".safetensors") or is_local(name):
            raise CheckpointError(f"checkpoint: {name} does not exist here (the Hub was not asked)")
        return "hugging_face"

    def identity(self) -> dict[str, Any]:
        """What the starting weights follow from: the section, and the content of the checkpoint's files."""
        if self.checkpoint is None:
            return {"model": self.name, "config": self.config}
        path = Path(self.checkpoint).expanduser()
        if path.is_dir() and (path / LATEST_NAME).exists():
            path = path / LATEST_NAME
        if path.is_file():
            content: Any = file_hash(path)
        elif path.is_dir():
            weights = (file for file in sorted(path.iterdir()) if file.suffix in (".bin", ".safetensors", ".json"))
            content = {file.name: file_hash(file) for file in weights}
        else:
            content = self.checkpoint
        return {"model": self.name, "config": self.config, "checkpoint": content}

    def build(self, num_labels: int, pooling: str) -> SequenceClassifier:
        """Build a classifier of this start, in training mode.

        Raises:
            CheckpointError: the checkpoint cannot be read safely, or does not fit; the message lists the differences.
            RecipeError: a mistake in the model's section.
        """
        kind = self.kind()
        if kind == "hugging_face":
            return self._from_hugging_face(num_labels, pooling).train()
        if kind == "original":
            return self._from_original(num_labels, pooling).train()
        if kind == "ours":
            assert self.checkpoint is not None
            trained = load_trained(Path(self.checkpoint).expanduser())
            name, config = self._combined(trained.record["model"])
            model = _random(name, config, num_labels, pooling)
            load_encoder(model.model, trained.model.model.state_dict(), self.checkpoint, new=NEW_PARTS)
        elif kind == "finetuned":
            assert self.checkpoint is not None
            content = load_checkpoint_file(Path(self.checkpoint).expanduser())
            if content["model"]["name"] is None:
                hub = Start(None, {}, content["model"]["checkpoint"], self.trust_remote_code)
                model = hub.build(num_labels, pooling)
            else:
                name, config = self._combined(content["model"])
                model = _random(name, config, num_labels, pooling)
            load_encoder(model.model, content["weights"], self.checkpoint, new=("classifier.",))
        else:
            assert self.name is not None
            model = _random(self.name, self.config, num_labels, pooling)
        return model.train()

    def _combined(self, record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The checkpoint's model section with what this one may change in it."""
        name, config = record["name"], dict(record["config"])
        if self.name is not None and self.name != name:
            raise CheckpointError(f"checkpoint: {self.checkpoint} holds a model '{name}', not model.name '{self.name}'")
        # Compared as configurations, so that a field left out on one side has its default.
        before, after = model_config(name, config).to_dict(), model_config(name, {**config, **self.config}).to_dict()
        self._refuse_changes(before, after)
        return name, {**config, **self.config}

    def _refuse_changes(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Raise CheckpointError where model.config would make another model of the checkpoint's."""
        named = [key for key in self.config if key not in FREE_FIELDS]
        there, here = {key: before.get(key) for key in named}, {key: after.get(key) for key in named}
        changes = differences(there, here, "in the checkpoint", "in model.config")
        if changes:
            lines = "".join(f"\n  {change}" for change in changes)
            raise CheckpointError(f"checkpoint: {self.checkpoint} is another model:{lines}")

    def _from_original(self, num_labels: int, pooling: str) -> SequenceClassifier:
        assert self.checkpoint is not None
        values = {**self.config, "num_labels": num_labels, "pool_all": pooling == "mean"}
        if self.name == "hf_bert":
            raise CheckpointError(f"checkpoint: {self.checkpoint} is no Hugging Face BERT: give its folder")
        try:
            model = load_original(self.checkpoint, values, "classification", allow_new_head=True)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint: {self.checkpoint}: {error}") from error
        assert isinstance(model, M2BertForSequenceClassification)
        return SequenceClassifier(model, num_labels)

    def _from_hugging_face(self, num_labels: int, pooling: str) -> SequenceClassifier:
        assert self.checkpoint is not None
        shared = {"trust_remote_code": self.trust_remote_code}
        try:
            check_folder(self.checkpoint)
            check_config_keys(self.checkpoint)
            config = AutoConfig.from_pretrained(self.checkpoint, **shared)
            self._apply(config)
            config.num_labels = num_labels
            if isinstance(config, M2BertConfig):
                config.pool_all = pooling == "mean"
            else:
                _check_pooling(pooling, config.model_type)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.checkpoint, config=config, output_loading_info=True, **shared
            )
        except RecipeError:
            raise
        except Exception as error:  # whatever a damaged or missing file makes the library raise
            raise CheckpointError(f"checkpoint: {self.checkpoint} cannot be loaded: {error}") from error
        prefix = f"{model.base_model_prefix}."
        lost = [name for name in report["missing_keys"] if name.startswith(prefix) and ".pooler." not in name]
        extra = [name for name in report["unexpected_keys"] if name.startswith(prefix) and ".pooler." not in name]
        if lost or extra:
            raise CheckpointError(_misfit(self.checkpoint, lost, extra, []))
        return SequenceClassifier(model, num_labels)

    def _apply(self, config: PretrainedConfig) -> None:
        """Put model.config on top of a Hugging Face model's own configuration."""
        if (self.name in ("m2_bert", "attention_bert")) is not isinstance(
            config, M2BertConfig
        ) and self.name is not None:
            kind = config.model_type
            raise CheckpointError(f"checkpoint: {self.checkpoint} holds a model '{kind}', not model.name '{self.name}'")
        fields = config.to_dict()
        for key in self.config:
            if key not in fields:
                raise RecipeError(f"model.config has no '{key}': {nearest(key, fields)}")
        self._refuse_changes(fields, self.config)
        for key, value in self.config.items():
            setattr(config, key, value)

    def tokenizer_name(self, name: str | None) -> str:
        """The tokenizer to use: `name`, or the checkpoint's own where that is None.

        Raises:
            DataError: it is not the one that the checkpoint was trained with.
            RecipeError: there is none to be found.
        """
        kind = self.kind()
        if kind == "ours":
            assert self.checkpoint is not None
            trained: TrainedModel = load_trained(Path(self.checkpoint).expanduser())
            return name if name and trained.tokenizer(name) else trained.tokenizer_folder()
        if kind == "hugging_face":
            assert self.checkpoint is not None
            return self._tokenizer_of_hugging_face(self.checkpoint, name)
        if name is not None:
            return name
        raise RecipeError("tokenizer_name: the checkpoint does not bring one; name it, or the vocabulary's file")

    def _tokenizer_of_hugging_face(self, checkpoint: str, name: str | None) -> str:
        if name is None or name == checkpoint:
            return checkpoint
        folder = Path(checkpoint).expanduser()
        if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            return name
        try:
            own = load_tokenizer(str(folder) if folder.is_dir() else checkpoint)
        except DataError as error:
            if folder.is_dir():
                raise
            log.warning("checkpoint: %s: its own tokenizer is not known, %s is taken for it (%s)", folder, name, error)
            return name
        if fingerprint(load_tokenizer(name)) != fingerprint(own):
            raise DataError(
                f"tokenizer_name: '{name}' is not the tokenizer of the checkpoint {checkpoint}: set it to null to take "
                "the checkpoint's own"
            )
        return name


def save_finetuned(path: Path, model: SequenceClassifier, start: Start, metadata: Mapping[str, Any]) -> None:
    """Write a fine-tuned model for other jobs to start from (see `Start`); the caller moves it into its place."""
    config = model.model.config
    section: dict[str, Any] = {"name": None, "checkpoint": start.checkpoint}
    if isinstance(config, M2BertConfig):
        fields = {name: getattr(config, name) for name in M2BertConfig.field_names()}
        name = "m2_bert" if config.monarch_mixer_sequence_mixing else "attention_bert"
        section = {"name": name, "config": {key: value for key, value in fields.items() if key != "pool_all"}}
        section["pooling"] = "mean" if config.pool_all else "first"
    elif isinstance(config, BertConfig):
        section = {"name": "hf_bert", "config": {name: getattr(config, name) for name in bert_fields()}}
    content = {"kind": FINETUNED, "model": section, "weights": model.model.state_dict()}
    with path.open("wb") as file:
        torch.save({**content, "metadata": json.dumps(metadata)}, file)
        file.flush()
        os.fsync(file.fileno())


def load_finetuned(path: Path, start: Start, num_labels: int, pooling: str) -> SequenceClassifier:
    """Load what `save_finetuned` wrote of a model that began as `start`: with its head, to predict with."""
    model = dataclasses.replace(start, checkpoint=str(path)).build(num_labels, pooling)
    model.model.load_state_dict(load_checkpoint_file(path)["weights"])
    return model


def load_encoder(model: nn.Module, weights: Mapping[str, Tensor], source: str, new: tuple[str, ...]) -> None:
    """Copy `weights` into `model`: everything but the parts that begin with `new`, and those exactly by name and shape.

    Raises:
        CheckpointError: a name or shape differs; the message lists them, and nothing was copied.
    """
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith(new)}
    given = {name: value for name, value in weights.items() if not name.startswith((*MLM_HEADS, *new))}
    shapes = [
        f"{name}: {tuple(given[name].shape)} in the checkpoint, {tuple(value.shape)} in the model"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    lost, extra = [name for name in expected if name not in given], [name for name in given if name not in expected]
    if shapes or lost or extra:
        raise CheckpointError(_misfit(source, lost, extra, shapes))
    model.load_state_dict(given, strict=False)
    log.info("%s: %d tensors; drawn anew: %s", source, len(given), ", ".join(part.rstrip(".") for part in new))


def _misfit(source: str, lost: Iterable[str], extra: Iterable[str], shapes: Iterable[str]) -> str:
    lines = [f"missing     {name}" for name in lost] + [f"unexpected  {name}" for name in extra]
    lines += [f"shape       {line}" for line in shapes]
    shown = "\n  ".join(lines[:30]) + (f"\n  ... and {len(lines) - 30} more" if len(lines) > 30 else "")
    return f"checkpoint: {source} does not fit the model; nothing was loaded:\n  {shown}"


def check_fits(model: SequenceClassifier, max_seq_len: int, padding: str, tokenizer_name: str) -> str:
    """Check length, padding and vocabulary of a model before anything is trained.

    Returns:
        The fingerprint of the tokenizer.

    Raises:
        RecipeError: texts of this length or padding, or this tokenizer's tokens, do not fit the model.
    """
    fixed, limit = model.fixed_length, model.max_length
    if fixed is not None and fixed != max_seq_len:
        raise RecipeError(
            f"max_seq_len is {max_seq_len}, but this M2-BERT was made for {fixed}: its mixer takes padding for text, "
            f"so texts must be padded to that length; set max_seq_len={fixed} (or model.config.mask_padding=true)"
        )
    if fixed is not None and padding == "dynamic":
        raise RecipeError(
            "padding: dynamic changes the results of an M2-BERT whose mixer sees padding; set it to auto, or "
            "model.config.mask_padding to true"
        )
    if limit is not None and limit < max_seq_len:
        raise RecipeError(f"max_seq_len is {max_seq_len}, but the model takes {limit} tokens at most")
    tokenizer = load_tokenizer(tokenizer_name)
    embeddings: Any = cast(PreTrainedModel, model.model).get_input_embeddings()
    entries = embeddings.num_embeddings
    if len(tokenizer) > entries:
        raise RecipeError(
            f"tokenizer_name: '{tokenizer_name}' has {len(tokenizer)} tokens, the model {entries}: it is not its own"
        )
    return fingerprint(tokenizer)
