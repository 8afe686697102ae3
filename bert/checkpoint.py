"""Checkpoints of the original M2 code: the one map between its parameter names and ours, and strict loading."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert.configuration import FOREIGN_FIELDS, M2BertConfig
from bert.errors import CheckpointError, nearest
from bert.exact_loading import LOADING_KEYS, blueprint, check_counts, checked_weights, listed, load_exactly
from bert.modeling import M2BertForMaskedLM, M2BertForSequenceClassification
from bert.safe_loading import load_checkpoint_file

log = logging.getLogger(__name__)

Model = M2BertForMaskedLM | M2BertForSequenceClassification

TASKS: dict[str, type[M2BertForMaskedLM] | type[M2BertForSequenceClassification]] = {
    "mlm": M2BertForMaskedLM,
    "classification": M2BertForSequenceClassification,
}
# Composer prefixes a wrapped model's names with "model.", DistributedDataParallel with "module.".
WRAPPER_PREFIXES = ("module.", "model.")
FILTER_NAMES = (
    ("skip", "bias"),
    ("position_features", "pos_emb.z"),
    ("times", "pos_emb.t"),
    ("decay_rates", "modulation.deltas"),
)
FILTER_NETWORKS = (("forward_network", "implicit_filter"), ("backward_network", "implicit_filter_rev"))
# The original lists the one frequency of a filter under each of its sines.
FREQUENCY_POSITIONS = (1, 3, 5)
LAYER_NAMES: tuple[tuple[str, str], ...] = (
    ("sequence_mixer.norm.weight", "attention.layernorm.weight"),
    ("sequence_mixer.norm.bias", "attention.layernorm.bias"),
    ("sequence_mixer.input_projection.weight", "attention.in_linear.weight"),
    ("sequence_mixer.input_projection.bias", "attention.in_linear.bias"),
    ("sequence_mixer.short_weight", "attention.short_filter.weight"),
    ("sequence_mixer.short_bias", "attention.short_filter.bias"),
    ("sequence_mixer.output_projection.weight", "attention.out_linear.weight"),
    ("sequence_mixer.output_projection.bias", "attention.out_linear.bias"),
    ("dimension_mixer.input.weight", "mlp.gated_layers.weight"),
    ("dimension_mixer.output.weight", "mlp.wo.weight"),
    ("dimension_mixer.output.bias", "mlp.wo.bias"),
    ("dimension_mixer.norm.weight", "mlp.layernorm.weight"),
    ("dimension_mixer.norm.bias", "mlp.layernorm.bias"),
)
ATTENTION_NAMES: tuple[tuple[str, str], ...] = (
    ("sequence_mixer.qkv_projection.weight", "attention.self.Wqkv.weight"),
    ("sequence_mixer.qkv_projection.bias", "attention.self.Wqkv.bias"),
    ("sequence_mixer.output_projection.weight", "attention.output.dense.weight"),
    ("sequence_mixer.output_projection.bias", "attention.output.dense.bias"),
    ("sequence_mixer.norm.weight", "attention.output.LayerNorm.weight"),
    ("sequence_mixer.norm.bias", "attention.output.LayerNorm.bias"),
)
OUTER_NAMES = (
    ("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"),
    ("bert.embeddings.token_type_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"),
    ("bert.embeddings.position_embeddings.weight", "bert.embeddings.position_embeddings.weight"),
    ("bert.embeddings.norm.weight", "bert.embeddings.LayerNorm.weight"),
    ("bert.embeddings.norm.bias", "bert.embeddings.LayerNorm.bias"),
    ("bert.pooler.dense.weight", "bert.pooler.dense.weight"),
    ("bert.pooler.dense.bias", "bert.pooler.dense.bias"),
    ("classifier.weight", "classifier.weight"),
    ("classifier.bias", "classifier.bias"),
    ("head.dense.weight", "cls.predictions.transform.dense.weight"),
    ("head.dense.bias", "cls.predictions.transform.dense.bias"),
    ("head.norm.weight", "cls.predictions.transform.LayerNorm.weight"),
    ("head.norm.bias", "cls.predictions.transform.LayerNorm.bias"),
    ("head.bias", "cls.predictions.decoder.bias"),
)
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"  # the word embeddings again
POSITION_IDS = "bert.embeddings.position_ids"  # 0, 1, ...: nothing to store
# Where an MLM and a classification checkpoint differ, in the original's names.
MLM_HEAD_PREFIX = "cls."
CLASSIFICATION_HEAD_PREFIXES = ("bert.pooler.", "classifier.")
OUR_LAYERS = "bert.encoder.layers."  # the original's are bert.encoder.layer.
# Where Composer's Hugging Face wrapper puts a model's configuration in a checkpoint.
RECORDED_FIELDS = ("state", "integrations", "huggingface", "model", "config", "content")


def load_original(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: Mapping[str, Any],
    task: str | None,
    *,
    allow_new_head: bool = False,
) -> Model:
    """Load a checkpoint of the original M2 code into our model, wholly or not at all.

    Args:
        source: a Composer checkpoint (.pt with `state/model/model.*`), a file with a plain state dict (.pt, .bin or
            .safetensors), or such a dict.
        config: the model's configuration in the original's field names; what it leaves out is read from the weights
            (mixers, sizes, lengths), or else from the configuration that a Composer checkpoint may hold.
        task: "mlm" or "classification"; None: what the weights show.
        allow_new_head: with task "classification", whether a masked-LM checkpoint may be loaded, with a pooler and a
            classifier drawn anew (said in the log).

    Returns:
        The model, in fp32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file cannot be read without running code, names or shapes do not match (the message lists
            the differences), or `config` is of a model that the original code has not.
    """
    content, name = _opened(source)
    return _load_original(content, name, config, task, allow_new_head)


def _load_original(
    content: Any, name: str, config: Mapping[str, Any], task: str | None, allow_new_head: bool = False
) -> Model:
    if task is not None and task not in TASKS:
        raise CheckpointError(f"no task '{task}': {nearest(task, TASKS)}")
    original = _state_dict(content, name)
    fields = config_of({**_recorded_fields(content), **_fields_shown_by(original), **config}, original, name)
    kind = TASKS[task or _task_shown_by(original)]

    def build() -> Model:
        return kind(fields)

    expected = to_original(blueprint(build, name))  # every name and shape the original model of this configuration has
    given, new = dict(original), set()
    if allow_new_head and kind is M2BertForSequenceClassification:
        new = {key for key in expected if key.startswith(CLASSIFICATION_HEAD_PREFIXES) and key not in given}
        given = {key: value for key, value in given.items() if not key.startswith(MLM_HEAD_PREFIX)}
    if new:
        log.warning("drawn anew, since the checkpoint lacks them: %s", ", ".join(sorted(new)))
    if problems := _differences(expected, given, new) or _check_ties(given):
        raise CheckpointError(f"{name} does not fit the model; nothing was loaded:\n  {listed(problems)}")
    model = build()
    state = model.state_dict()
    with torch.no_grad():
        for ours, original_names in _names(fields).items():
            if ours in state and original_names[0] not in new:
                state[ours].copy_(given[original_names[0]].reshape(state[ours].shape))
    return model.eval()


def load_any(
    source: str | os.PathLike[str] | Mapping[str, Any], config: Mapping[str, Any], task: str | None, name: str
) -> Model:
    """Load weights by our names or the original's, as the names show; `config` describes the model.

    Args:
        source: as in `load_original`.
        config: the content of a config.json.
        task: as in `load_original`.
        name: of the source, for messages.

    Raises:
        CheckpointError: as in `load_original`.
    """
    content, _ = _opened(source)
    state = _state_dict(content, name)
    if not is_ours(state):
        return _load_original(content, name, config, task)
    fields = config_of(config, state, name)
    kind = TASKS[task or _task_shown_by(state)]
    return load_exactly(lambda: kind(fields), state, name)


def is_ours(names: Iterable[str]) -> bool:
    """Say whether a state dict has our names, not the original's."""
    return any(name.startswith(OUR_LAYERS) for name in names)


def config_of(values: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> M2BertConfig:
    """Make the configuration that a config.json describes, without what it says of other code.

    Args:
        values: its content.
        weights: those of the model, which bound it (see `check_counts`).
        source: for messages.

    Raises:
        CheckpointError: it describes no model, or a larger one than the weights'.
    """
    check_counts(values, weights, source)
    values = {key: value for key, value in values.items() if key not in (*FOREIGN_FIELDS, *LOADING_KEYS)}
    for key in values:
        known = getattr(M2BertConfig, key, None)
        if callable(known) or (isinstance(known, property) and known.fset is None):
            raise CheckpointError(f"{source}: the configuration has an impossible field '{key}'")
    try:
        return M2BertConfig(**values)
    except Exception as error:  # whatever strange values make transformers raise
        raise CheckpointError(f"{source}: the configuration does not describe a model: {error}") from error


def fields_of(config: M2BertConfig) -> dict[str, Any]:
    """Return every field of the model's own, and those of the others that are not as Hugging Face has them anyway."""
    own = {name: getattr(config, name) for name in config.field_names()}
    others = config.to_diff_dict()
    return {**own, **{name: value for name, value in others.items() if name not in FOREIGN_FIELDS}}


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        CheckpointError: it is not there, or holds no fields.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {file}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a model's configuration")
    return values


def to_original(model: Model) -> dict[str, Tensor]:
    """Return the model's state dict with every name the original code expects, and in its shapes.

    The tensors are detached and share memory with the model, and with each other where the original tied them.

    Raises:
        CheckpointError: the original code has no such model, though it has one of these names and shapes.
    """
    if model.config.monarch_mixer_sequence_mixing and model.config.short_conv_centered:
        raise CheckpointError(
            "short_conv_centered is this project's own: the original code's short convolution is causal, and with the "
            "same weights would compute something else"
        )
    state = model.state_dict()
    original: dict[str, Tensor] = {}
    for ours, names in _names(model.config).items():
        if ours not in state:
            continue
        for name in names:
            original[name] = _to_original_shape(name, state[ours])
    if model.config.use_positional_encodings:
        device = original[WORD_EMBEDDINGS].device
        original[POSITION_IDS] = torch.arange(model.config.max_position_embeddings, device=device)[None]
    if isinstance(model, M2BertForMaskedLM):
        original[DECODER] = original[WORD_EMBEDDINGS]
    return original


def save_original(model: Model, path: Path) -> None:
    """Write a Composer checkpoint of the original code, with the configuration where Composer would put it.

    One file, so that weights and configuration cannot part.

    Raises:
        CheckpointError: as in `to_original`.
    """
    fields = fields_of(model.config)
    state = {f"model.{name}": value for name, value in to_original(model).items()}
    record = {"huggingface": {"model": {"config": {"file_extension": ".json", "content": fields}}}}
    torch.save({"state": {"model": state, "integrations": record}}, path)


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a flat state dict from a file or a dict, without Composer's nesting and prefixes.

    Raises:
        CheckpointError: there is no such file, it cannot be read without running code, or holds no state dict.
    """
    return _state_dict(*_opened(source))


def _opened(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Any, str]:
    if isinstance(source, Mapping):
        return source, "the given dict"
    return load_checkpoint_file(source), str(source)


def _state_dict(content: Any, name: str) -> dict[str, Tensor]:
    for key in ("state", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state = checked_weights(content, name)
    while prefix := next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _recorded_fields(content: Any) -> dict[str, Any]:
    """Return the configuration that a Composer checkpoint holds; empty where there is none."""
    for key in RECORDED_FIELDS:
        content = content.get(key) if isinstance(content, Mapping) else None
    return {key: content[key] for key in content if isinstance(key, str)} if isinstance(content, Mapping) else {}


def _task_shown_by(state: Mapping[str, Tensor]) -> str:
    return "classification" if "classifier.weight" in state else "mlm"


def _names(config: M2BertConfig) -> dict[str, tuple[str, ...]]:
    """Return, for each name of ours that a model of this configuration may have, the original's names of it."""
    names: dict[str, tuple[str, ...]] = {ours: (original,) for ours, original in OUTER_NAMES}
    if config.monarch_mixer_sequence_mixing:
        layer_names = LAYER_NAMES
    else:
        layer_names = ATTENTION_NAMES + tuple(pair for pair in LAYER_NAMES if pair[0].startswith("dimension_mixer."))
    for layer in range(config.num_hidden_layers):
        ours_prefix, original_prefix = f"bert.encoder.layers.{layer}.", f"bert.encoder.layer.{layer}."
        for ours, original in layer_names:
            names[ours_prefix + ours] = (original_prefix + original,)
        for ours, original in (("filter", "filter_fn"), ("residual_filter", "filter_fn2")):
            _add_filter_names(
                names, f"{ours_prefix}sequence_mixer.{ours}.", f"{original_prefix}attention.{original}.", config
            )
    return names


def _add_filter_names(names: dict[str, tuple[str, ...]], ours: str, original: str, config: M2BertConfig) -> None:
    networks = FILTER_NETWORKS if config.bidirectional else FILTER_NETWORKS[:1]
    for our_name, original_name in FILTER_NAMES:
        names[ours + our_name] = (original + original_name,)
    names[ours + "frequency"] = tuple(
        f"{original}{network}.{position}.freq" for _, network in networks for position in FREQUENCY_POSITIONS
    )
    for our_network, network in networks:
        for depth in range(4):
            for part in ("weight", "bias"):
                names[f"{ours}{our_network}.layers.{depth}.{part}"] = (f"{original}{network}.{2 * depth}.{part}",)


def _to_original_shape(name: str, value: Tensor) -> Tensor:
    if name.endswith(".pos_emb.z") or name.endswith(".freq"):
        return value[None]
    if name.endswith(".pos_emb.t"):
        return value[None, :, None]
    if name.endswith(".modulation.deltas"):
        return value[None, None]
    return value


def _differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], new: set[str]) -> list[str]:
    """Say which of the original's names and shapes a checkpoint differs in, a line each."""
    problems = [
        f"missing     {name} {tuple(value.shape)}"
        for name, value in expected.items()
        # Newer versions of the transformers library no longer store the positions 0, 1, ...
        if name not in given and name not in new and name != POSITION_IDS
    ]
    problems += [f"unexpected  {name} {tuple(value.shape)}" for name, value in given.items() if name not in expected]
    return problems + [
        f"shape       {name}: checkpoint {tuple(given[name].shape)}, model {tuple(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]


def _check_ties(given: dict[str, Tensor]) -> list[str]:
    """Find tensors that the original holds once but the checkpoint holds in different versions."""
    problems = []
    for first in (name for name in given if name.endswith("implicit_filter.1.freq")):
        base = first[: -len("implicit_filter.1.freq")]
        copies = [name for name in given if re.fullmatch(re.escape(base) + r"implicit_filter(_rev)?\.\d\.freq", name)]
        problems += [
            f"differs     {name} from {first}" for name in copies if not torch.equal(given[name], given[first])
        ]
    if DECODER in given and not torch.equal(given[DECODER], given[WORD_EMBEDDINGS]):
        problems.append(f"differs     {DECODER} from {WORD_EMBEDDINGS}")
    positions = given.get(POSITION_IDS)
    if positions is not None and not torch.equal(positions.cpu().flatten(), torch.arange(positions.numel())):
        problems.append(f"differs     {POSITION_IDS} from 0, 1, ...")
    return problems


def _fields_shown_by(original: dict[str, Tensor]) -> dict[str, Any]:
    """Return the configuration fields that a state dict itself shows, by the original's names."""
    layer = "bert.encoder.layer.0."
    fields: dict[str, Any] = {
        "monarch_mixer_sequence_mixing": f"{layer}attention.in_linear.weight" in original,
        "use_positional_encodings": "bert.embeddings.position_embeddings.weight" in original,
        "residual_long_conv": f"{layer}attention.filter_fn2.bias" in original,
        "bidirectional": f"{layer}attention.filter_fn.implicit_filter_rev.0.weight" in original,
        "hyena_training_additions": f"{layer}attention.layernorm.weight" in original,
        "num_hidden_layers": 1 + max(_layer_numbers(original), default=0),
    }

    def read(field: str, name: str, size: Callable[[tuple[int, ...]], Any]) -> None:
        if name in original:
            shape = tuple(original[name].shape)
            try:
                fields[field] = size(shape)
            except IndexError:
                raise CheckpointError(f"{name} has the shape {shape}, which is not this parameter's") from None

    read("vocab_size", WORD_EMBEDDINGS, lambda shape: shape[0])
    read("hidden_size", WORD_EMBEDDINGS, lambda shape: shape[-1])
    read("type_vocab_size", "bert.embeddings.token_type_embeddings.weight", lambda shape: shape[0])
    read("max_position_embeddings", "bert.embeddings.position_embeddings.weight", lambda shape: shape[0])
    read("long_conv_l_max", f"{layer}attention.filter_fn.pos_emb.z", lambda shape: shape[1])
    read("hyena_emb_dim", f"{layer}attention.filter_fn.pos_emb.z", lambda shape: shape[2])
    read("hyena_filter_order", f"{layer}attention.filter_fn.implicit_filter.0.weight", lambda shape: shape[0])
    read("num_labels", "classifier.weight", lambda shape: shape[0])
    read("use_monarch_mlp", f"{layer}mlp.wo.weight", lambda shape: len(shape) == 3)
    if fields.get("use_monarch_mlp"):
        read("monarch_mlp_nblocks", f"{layer}mlp.wo.weight", lambda shape: shape[0])
        read("intermediate_size", f"{layer}mlp.wo.weight", lambda shape: shape[0] * shape[2])
    elif "use_monarch_mlp" in fields:
        read("intermediate_size", f"{layer}mlp.wo.weight", lambda shape: shape[1])
    return fields


def _layer_numbers(names: Iterable[str]) -> list[int]:
    matches = (re.match(r"bert\.encoder\.layer\.(\d{1,9})\.", name) for name in names)
    return [int(match[1]) for match in matches if match]
