"""What a pretraining recipe says: one dataclass field a YAML key, and how a YAML becomes a `TrainConfig`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bert.data.loader_config import LoaderConfig
from bert.embeddings.config import ContrastiveConfig
from bert.errors import RecipeError, nearest

RECIPE_FOLDER = Path("yamls/pretrain")

_MAXIMUM_NODES = 100_000  # keys and values of a YAML

Config = TypeVar("Config")


@dataclass
class ModelConfig:
    """Which model, and its own settings."""

    name: str = MISSING  # m2_bert, attention_bert or hf_bert
    config: dict[str, Any] = field(default_factory=dict)  # fields of that model's configuration class


@dataclass
class TrainConfig:
    """A pretraining run. Durations are Composer's: 100ba (batches), 1000sp (samples), 1e9tok, 2ep, 0.06dur."""

    # --- names and folders
    run_name: str = MISSING  # names the run in logs, and in every path that holds {run_name}
    seed: int = 17  # of initialisation, dropout, shuffling and masking
    task: str = "masked_lm"  # or contrastive: documents and queries of data_local/SPLIT.jsonl, see bert.data.pairs
    variables: dict[str, Any] = field(default_factory=dict)  # free: values for ${variables.x} elsewhere in the YAML

    # --- data
    data_local: str | None = None  # folder of prepared shards (with its splits); fills *_loader.dataset.local
    data_remote: str | None = None  # URI that the shards are fetched from; fills *_loader.dataset.remote; null: none
    max_seq_len: int = MISSING  # tokens in a sample; must be what the data was prepared with
    tokenizer_name: str | None = None  # null: the data's own; else checked against the data's fingerprint
    mlm_probability: float = 0.3  # share of tokens masked in training
    eval_mlm_probability: float = 0.15  # share of tokens masked in evaluation
    train_loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval_loader: LoaderConfig | None = None  # null: no evaluation

    # --- model and its optimisation
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)  # for that task
    model: ModelConfig = field(default_factory=ModelConfig)
    # name, and the arguments of what it names; null takes an inherited argument back
    optimizer: dict[str, Any] = MISSING  # with param_groups: see bert.recipe.optim.parameter_groups
    scheduler: dict[str, Any] = MISSING
    algorithms: dict[str, Any] = field(default_factory=dict)  # name -> arguments; null switches an inherited one off
    max_duration: str = MISSING  # the whole run, also after a resume
    global_train_batch_size: int = MISSING  # samples in an optimizer step, all devices together
    device_train_microbatch_size: int | str = "auto"  # samples in a forward pass on a device; auto: what fits a GPU

    # --- evaluation
    eval_interval: str = "1ep"  # time between evaluations; there is one at the end too
    eval_subset_num_batches: int = -1  # batches an evaluation reads; -1: all of the split
    global_eval_batch_size: int | None = None  # samples in an evaluation batch, all devices; null: as in training

    # --- what watches the run
    callbacks: dict[str, Any] = field(default_factory=dict)  # name -> arguments; null switches an inherited one off
    loggers: dict[str, Any] = field(default_factory=dict)  # name -> arguments; null switches an inherited one off
    progress_bar: bool = True
    log_to_console: bool = False  # print every metric, each console_log_interval
    console_log_interval: str = "100ba"
    python_log_level: str = "info"  # debug, info, warning or error

    # --- checkpoints
    save_folder: str | None = None  # local folder or URI; null: nothing is saved
    save_interval: str = "1000ba"  # time between checkpoints; there is one at the end too
    save_num_checkpoints_to_keep: int = -1  # of this run, on the local disk; -1: all
    save_overwrite: bool = False  # start over in a folder that holds checkpoints of another run
    load_path: str | None = None  # checkpoint to start from; null: none
    load_weights_only: bool = False  # take the model from load_path, not optimizer, step and data position
    rollbacks: int = 0  # times that a diverged run goes back to its last checkpoint, passing over the batch that did it
    autoresume: bool = False  # go on from the latest checkpoint in save_folder where there is one

    # --- machine
    device: str | None = None  # cpu, gpu or mps; null: a GPU where there is one
    precision: str = "amp_bf16"  # fp32, amp_bf16 or amp_fp16; on a CPU amp_* becomes fp32
    compile: Any = False  # true, arguments of torch.compile, or auto: on a GPU, with CUDA graphs (docs/performance.md)
    kernels: bool = True  # Triton kernels where the GPU supports them; false: plain PyTorch, to compare
    parallelism_config: dict[str, Any] | None = None  # Composer's: {fsdp: {...}}; null: data parallel
    # Data parallel on several devices: see docs/scaling.md.
    gradient_reduction: str = "fp32"  # fp32, or bf16: half the bytes, gradients rounded to 8 bits before they are added
    overlap_reduction: bool = False  # with compile: cut the graph, so that reduction starts within the backward pass
    deterministic: bool = False  # deterministic kernels only: slower
    dist_timeout: float = 600.0  # seconds until a collective that hangs is an error
    heartbeat_timeout: float = 20.0  # seconds without a sign of life of a rank until the job ends; 0: for ever

    # --- estimate, without data and without training
    dry_run: bool = False  # print parameters, operations, tokens, steps and time, and stop
    dry_run_device: str = "h200-sxm"  # a name in Composer's table of peak FLOP/s
    dry_run_num_devices: int = 1
    dry_run_mfu: float = 0.3  # assumed share of the peak FLOP/s that the run reaches on one device
    dry_run_devices_per_node: int = 8
    dry_run_node_bandwidth: float = 300.0  # assumed GB/s of an all-reduce within a node (NCCL's bus bandwidth)
    dry_run_network_bandwidth: float = 40.0  # the same between nodes, a device (a 400 Gb/s card for each)
    dry_run_overhead_ms: float = 0.0  # of a step, that more devices do not shorten
    dry_run_price: float | None = None  # of a device for an hour, in any currency


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, put `key=value` overrides on top, and check every key and type.

    A YAML may say `base: other.yaml` (relative to itself): it inherits that recipe and changes what it names.

    Raises:
        RecipeError: a missing or malformed file, an unknown key, a value of the wrong type; with file, key and hint.
    """
    return load_dataclass(TrainConfig, path, overrides, folder=RECIPE_FOLDER, complete=_fill_loaders)


def load_dataclass(
    cls: type[Config],
    path: str | Path,
    overrides: Sequence[str],
    *,
    folder: Path,
    complete: Callable[[dict[str, Any]], None] | None = None,
) -> Config:
    """Read a YAML into the dataclass `cls`, as `load_config` says.

    Args:
        cls: what a YAML of this kind says, a field a key.
        path: of the YAML.
        overrides: `key=value`, put on top.
        folder: where YAMLs of this kind are, for the hint when there is none at `path`.
        complete: fills in values that follow from others, before types are checked.

    Raises:
        RecipeError: as in `load_config`.
    """
    values = _read_yaml(Path(path), (), folder)
    try:
        merged = OmegaConf.merge(values, _dotlist(overrides))
        assert isinstance(merged, DictConfig)
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {_first_line(error)} (at '{error.full_key}')") from error
    plain = cast(dict[str, Any], OmegaConf.to_container(merged))
    check_keys(cls, plain, "", str(path))
    if complete is not None:
        complete(plain)
    return to_dataclass(cls, plain, str(path))


def to_dataclass(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """Make a `cls` of plain values whose keys were checked; RecipeError where a type is wrong."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        raise RecipeError(f"{where}: '{error.full_key}': {_first_line(error)}") from error
    except TypeError as error:  # a list where a section may stand; OmegaConf does not say where
        lists = ", ".join(key for key, value in values.items() if isinstance(value, list))
        raise RecipeError(f"{where}: a list stands where a section belongs ({lists}): {error}") from error
    assert isinstance(config, cls)
    return config


def to_yaml(config: TrainConfig) -> str:
    """The resolved recipe as YAML, every default included: `load_config` reads it back to an equal config."""
    return OmegaConf.to_yaml(dataclasses.asdict(config))


def _read_yaml(path: Path, readers: tuple[Path, ...], folder: Path) -> DictConfig:
    """Read one YAML and what it inherits; `readers` are the files whose `base` led here."""
    if path.resolve() in readers:
        raise RecipeError(f"{path}: inherits itself through 'base': {' -> '.join(p.name for p in readers)}")
    try:
        _check_expansion(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
        values = OmegaConf.load(path)
    except FileNotFoundError:
        found = {p.stem: p for place in (folder, path.parent) for p in place.glob("*.yaml")}
        asked = f"{readers[-1]}: its base " if readers else ""
        raise RecipeError(f"{asked}{path} does not exist: {nearest(path.stem, found, found)}") from None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise RecipeError(f"{path} must hold keys and values, not a {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    inherited = OmegaConf.merge(_read_yaml(path.parent / str(base), (*readers, path.resolve()), folder), values)
    assert isinstance(inherited, DictConfig)
    return inherited


def read_plain_yaml(text: str) -> Any:
    """Read YAML that nobody vouches for, into plain values.

    Raises:
        ValueError: it is no YAML, or its aliases multiply.
    """
    try:
        _check_expansion(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is no YAML: {error}") from error


def _check_expansion(root: yaml.Node | None) -> None:
    """Raise ValueError where aliases (*name) make more of a YAML than any recipe is: reading copies them."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAXIMUM_NODES + 1  # of a node within itself
            children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
            children = node.value if isinstance(node, yaml.SequenceNode) else children
            sizes[id(node)] = 1 + sum(size(child) for child in children)
        return sizes[id(node)]

    if root is not None and size(root) > _MAXIMUM_NODES:
        raise ValueError(f"its aliases expand to more than {_MAXIMUM_NODES} values")


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key or key.startswith("-"):
            raise RecipeError(f"'{override}' is not an override: write key=value, for example optimizer.lr=1e-3")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f"overrides {' '.join(overrides)}: {_first_line(error)}") from error


def check_keys(cls: type, values: dict[str, Any], prefix: str, path: str) -> None:
    """Raise for a key that `cls` or a dataclass below it does not have, and for a value where a section belongs."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        full_key = f"{prefix}{key}"
        if key not in hints:
            raise RecipeError(f"{path}: unknown key '{full_key}': {nearest(str(key), hints)}")
        if typing.get_origin(hints[key]) is dict and not isinstance(value, dict | None):
            raise RecipeError(f"{path}: '{full_key}' must be a section with keys, not {value!r}")
        for section, by_name in _dataclasses_of(hints[key]):
            items = (
                {f".{name}": item for name, item in value.items()}
                if by_name and isinstance(value, dict)
                else {"": value}
            )
            for suffix, item in items.items():
                if isinstance(item, dict):
                    check_keys(section, item, f"{full_key}{suffix}.", path)
                elif item is not None:
                    raise RecipeError(f"{path}: '{full_key}{suffix}' must be a section with keys, not {item!r}")


def _dataclasses_of(hint: Any) -> list[tuple[type, bool]]:
    """The dataclasses that a type hint names, each with whether they are the values of a dict."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [(hint, False)]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return [(cls, True) for cls, _ in _dataclasses_of(arguments[1])]
    if origin in (typing.Union, types.UnionType):
        return [pair for argument in arguments for pair in _dataclasses_of(argument)]
    return []


def _fill_loaders(values: dict[str, Any]) -> None:
    """Write the recipe-wide data settings into the loaders that do not set their own."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for loader, split, rate in (
        ("train_loader", "train", "mlm_probability"),
        ("eval_loader", "validation", "eval_mlm_probability"),
    ):
        if loader == "train_loader" and values.get(loader) is None:
            values[loader] = {}
        section = values.get(loader)
        if section is None:
            continue
        if section.get("dataset") is None:
            section["dataset"] = {}
        dataset = section["dataset"]
        dataset.setdefault("split", split)
        dataset.setdefault("mlm_probability", values.get(rate, defaults[rate]))
        if not dataset.get("streams"):
            dataset.setdefault("local", values.get("data_local"))
            dataset.setdefault("remote", values.get("data_remote"))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
