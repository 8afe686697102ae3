"""The one registry: which names a recipe may use, what each builds, and the check of its arguments."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from composer import algorithms, callbacks, loggers, optim
from composer.core import Algorithm, Callback, Precision, Time
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler
from composer.utils.parallelism import FSDP2Config, FSDPConfig, TPConfig

from bert.errors import RecipeError, nearest
from bert.recipe.callbacks import LoaderMonitor, LossCurve, LossSpike, NaNGuard
from bert.recipe.loggers import JsonlLogger
from bert.recipe.optim import DecoupledAdamW, WarmupStableDecayScheduler, check_groups, parameter_groups
from bert.recipe.schema import TrainConfig

if TYPE_CHECKING:
    from bert.composer_models import MaskedLanguageModel
    from bert.embeddings.task import ContrastiveTask
    from bert.glue.model import SequenceClassifier

DEVICES = (None, "cpu", "gpu", "mps")
GRADIENT_REDUCTIONS = ("fp32", "bf16")
LOG_LEVELS = ("debug", "info", "warning", "error")
AUTO = "auto"
COMPILE_ON_GPU = {"mode": "reduce-overhead"}  # what compile: auto is there


@dataclass(frozen=True)
class Entry:
    """What a name builds, and the packages that a plain installation of the recipe does not bring."""

    build: Callable[..., Any]
    modules: tuple[str, ...] = ()  # to be importable
    install: str = ""  # what to give `pip install` where they are not
    defaults: Mapping[str, Any] = field(default_factory=dict)  # arguments, where ours differ from its own


def _masked_lm(name: str) -> Entry:
    def build(config: dict[str, Any], train_mask_rate: float, eval_mask_rate: float) -> MaskedLanguageModel:
        # Imported when a model is built: it brings transformers along, which takes seconds.
        from bert.composer_models import build_masked_lm

        return build_masked_lm(name, config, train_mask_rate=train_mask_rate, eval_mask_rate=eval_mask_rate)

    return Entry(build)


def _classifier(name: str) -> Entry:
    def build(config: dict[str, Any], num_labels: int, pooling: str) -> SequenceClassifier:
        from bert.glue.model import build_classifier

        return build_classifier(name, config, num_labels=num_labels, pooling=pooling)

    return Entry(build)


def _contrastive(config: TrainConfig) -> ContrastiveTask:
    from bert.embeddings.task import ContrastiveTask

    return ContrastiveTask(config)


MODEL_NAMES = ("m2_bert", "attention_bert", "hf_bert")

# kind -> name -> what it builds. The kinds are the recipe's own section names.
REGISTRY: dict[str, dict[str, Entry]] = {
    # What replaces masked language modelling, which bert.recipe.train does itself.
    "task": {"masked_lm": Entry(lambda config: None), "contrastive": Entry(_contrastive)},
    "model": {name: _masked_lm(name) for name in MODEL_NAMES},
    "classifier": {name: _classifier(name) for name in MODEL_NAMES},  # fine-tuning's `model` section
    "optimizer": {
        "decoupled_adamw": Entry(DecoupledAdamW),
        "decoupled_sgdw": Entry(optim.DecoupledSGDW),
        "adamw": Entry(torch.optim.AdamW, defaults={"fused": True}),  # with foreach: true, set fused: false
        "adam": Entry(torch.optim.Adam),
        "sgd": Entry(torch.optim.SGD),
    },
    "scheduler": {
        "linear_decay_with_warmup": Entry(optim.LinearWithWarmupScheduler),
        "cosine_with_warmup": Entry(optim.CosineAnnealingWithWarmupScheduler),
        "constant_with_warmup": Entry(optim.ConstantWithWarmupScheduler),
        "polynomial_with_warmup": Entry(optim.PolynomialWithWarmupScheduler),
        "multistep_with_warmup": Entry(optim.MultiStepWithWarmupScheduler),
        "warmup_stable_decay": Entry(WarmupStableDecayScheduler),
    },
    "algorithms": {
        "gradient_clipping": Entry(algorithms.GradientClipping),
        "ema": Entry(algorithms.EMA),
        "layer_freezing": Entry(algorithms.LayerFreezing),
        "low_precision_layernorm": Entry(algorithms.LowPrecisionLayerNorm),
        "swa": Entry(algorithms.SWA),
    },
    "callbacks": {
        "activation_monitor": Entry(callbacks.ActivationMonitor),
        "early_stopper": Entry(callbacks.EarlyStopper),
        "loader_monitor": Entry(LoaderMonitor),
        "loss_curve": Entry(LossCurve),
        "loss_spike": Entry(LossSpike),
        "lr_monitor": Entry(callbacks.LRMonitor),
        "memory_monitor": Entry(callbacks.MemoryMonitor),
        "memory_snapshot": Entry(callbacks.MemorySnapshot),
        "nan_guard": Entry(NaNGuard),
        "oom_observer": Entry(callbacks.OOMObserver),
        "optimizer_monitor": Entry(callbacks.OptimizerMonitor),
        "runtime_estimator": Entry(callbacks.RuntimeEstimator),
        "speed_monitor": Entry(callbacks.SpeedMonitor),
        "system_metrics_monitor": Entry(callbacks.SystemMetricsMonitor, ("psutil",), "psutil"),
        "threshold_stopper": Entry(callbacks.ThresholdStopper),
    },
    "loggers": {
        "file": Entry(loggers.FileLogger),
        "jsonl": Entry(JsonlLogger),
        "mlflow": Entry(loggers.MLFlowLogger, ("mlflow",), "mlflow"),
        "tensorboard": Entry(loggers.TensorboardLogger, ("tensorboard",), "tensorboard"),
        "wandb": Entry(loggers.WandBLogger, ("wandb",), "wandb"),
    },
}


def check(kind: str, name: Any, arguments: Any, given: Iterable[str] = ()) -> Entry:
    """Raise RecipeError unless `name` exists, can be imported, and takes `arguments`; `given` are the caller's own."""
    entries = REGISTRY[kind]
    if not isinstance(name, str) or name not in entries:
        raise RecipeError(f"{kind}: unknown name '{name}': {nearest(str(name), entries)}")
    entry = entries[name]
    missing = [module for module in entry.modules if importlib.util.find_spec(module) is None]
    if missing:
        raise RecipeError(f"{kind}.{name} needs {', '.join(missing)}: pip install {entry.install}")
    check_arguments(f"{kind}.{name}", entry.build, arguments, given)
    return entry


def build(kind: str, name: str, arguments: Mapping[str, Any] | None = None, **given: Any) -> Any:
    """Build `name` of `kind` from the recipe's `arguments`, and what the caller gives.

    Raises:
        RecipeError: an unknown name or argument, a missing package, or a value that what is built refuses.
    """
    entry = check(kind, name, arguments, given)
    try:
        return entry.build(**given, **{**entry.defaults, **(arguments or {})})
    except RecipeError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"{kind}.{name}: {error}") from error


def check_arguments(where: str, function: Callable[..., Any], arguments: Any, given: Iterable[str] = ()) -> None:
    """Raise RecipeError unless the mapping `arguments` fits the signature of `function`, by name and plain type."""
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RecipeError(f"{where} must be a section with its arguments (or {{}} for none), not {arguments!r}")
    arguments, given = arguments or {}, set(given)
    # Of a class, look at __init__: a scheduler's own signature is hidden by typing.Protocol.
    parameters = dict(inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters)
    parameters.pop("self", None)
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - given
    hints = _hints(function)
    for name, value in arguments.items():
        if name not in known and not free:
            raise RecipeError(f"{where}: unknown key '{name}': {nearest(str(name), known) if known else 'it has none'}")
        accepted = _plain_types(hints.get(name))
        if accepted and not _is_one_of(value, accepted):
            names = " or ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in accepted))
            raise RecipeError(f"{where}.{name} must be {names}, not {value!r}")
    lacking = [name for name in known - arguments.keys() if parameters[name].default is inspect.Parameter.empty]
    if lacking:
        raise RecipeError(f"{where} needs {', '.join(sorted(lacking))}")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except NameError:  # annotations that exist for type checkers only
        return {}


def _plain_types(hint: Any) -> set[type]:
    """The types a hint allows where all of them are plain YAML ones; empty for anything else (not checked)."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return set(options) if all(option in (int, float, bool, str, type(None)) for option in options) else set()


def _is_one_of(value: Any, accepted: set[type]) -> bool:
    if isinstance(value, bool):  # Python's bool is an int; a recipe's is not
        return bool in accepted
    return isinstance(value, tuple(accepted)) or (isinstance(value, int) and float in accepted)


class Sections(Protocol):
    """What the builders read of any recipe: pretraining's and fine-tuning's have these sections in common."""

    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    algorithms: dict[str, Any]
    callbacks: dict[str, Any]
    loggers: dict[str, Any]
    precision: str
    compile: Any


def check_sections(config: Sections) -> None:
    """Check names, arguments and choices of the sections that all recipes have; RecipeError for the first mistake."""
    check("optimizer", *_name_and_arguments("optimizer", config.optimizer, drop="param_groups"), given=["params"])
    check_groups(config.optimizer.get("param_groups"))
    check("scheduler", *_name_and_arguments("scheduler", config.scheduler))
    for kind in ("algorithms", "callbacks", "loggers"):
        for name, arguments in active(getattr(config, kind)).items():
            check(kind, name, arguments)
    check_choice("precision", config.precision, [precision.value for precision in Precision])
    compile_arguments(config)


def check_time(key: str, value: str) -> None:
    """Raise RecipeError unless `value` is a time in Composer's notation."""
    try:
        Time.from_timestring(value)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}; write for example 100ba, 4096sp, 1e9tok, 2ep or 0.1dur") from error


def _check_warmup(config: TrainConfig) -> None:
    """Raise RecipeError for a warm-up that takes the whole run, which would never come to its learning rate."""
    given = config.scheduler.get("t_warmup")
    if given is None:
        return
    check_time("scheduler.t_warmup", str(given))
    warmup = Time.from_timestring(str(given))
    t_max = config.scheduler.get("t_max", "1dur")
    for key, limit in (("max_duration", config.max_duration), ("scheduler.t_max", t_max), ("the run", "1dur")):
        check_time(key, str(limit))
        end = Time.from_timestring(str(limit))
        if warmup.unit == end.unit and warmup.value >= end.value > 0:  # another unit: Composer's to compare
            raise RecipeError(f"scheduler.t_warmup: {given} is no less than {key}, {limit}")


def check_config(config: TrainConfig) -> None:
    """Check everything that can be checked without data, devices or building: names, arguments, times, choices.

    Raises:
        RecipeError: the first mistake, with its key.
    """
    check_model_name("model", config.model.name)
    resolved = dataclasses.replace(config, compile=resolved_compile(config, on_gpu=True)[0])
    check_sections(resolved)
    for key in ("max_duration", "eval_interval", "save_interval", "console_log_interval"):
        check_time(key, value := getattr(config, key))
        if Time.from_timestring(value).value <= 0 or (key == "max_duration" and value.endswith("dur")):
            raise RecipeError(f"{key}: {value} is no length of time; write for example 100ba, 1e9tok or 2ep")
    _check_warmup(config)
    check_choice("task", config.task, list(REGISTRY["task"]))
    check_choice("device", config.device, DEVICES)
    check_choice("python_log_level", config.python_log_level, LOG_LEVELS)
    check_choice("gradient_reduction", config.gradient_reduction, GRADIENT_REDUCTIONS)
    if isinstance(config.device_train_microbatch_size, str):
        check_choice("device_train_microbatch_size", config.device_train_microbatch_size, [AUTO])
        if uses_cuda_graphs(resolved):
            raise RecipeError("compile with CUDA graphs needs a number as device_train_microbatch_size, not auto")
    positive = ("max_seq_len", "global_train_batch_size", "global_eval_batch_size", "device_train_microbatch_size")
    assumed = ("num_devices", "mfu", "devices_per_node", "node_bandwidth", "network_bandwidth")
    for key in (*positive, *(f"dry_run_{name}" for name in assumed)):
        value = getattr(config, key)
        if isinstance(value, int | float) and value <= 0:
            raise RecipeError(f"{key} must be positive, not {value}")
    for key in ("mlm_probability", "eval_mlm_probability"):
        if not 0 < getattr(config, key) < 1:
            raise RecipeError(f"{key} must lie between 0 and 1, not {getattr(config, key)}")
    for key in ("max_position_embeddings", "long_conv_l_max"):
        length = config.model.config.get(key)
        if isinstance(length, int) and length < config.max_seq_len:
            raise RecipeError(f"model.config.{key} is {length}, shorter than max_seq_len {config.max_seq_len}")
    if config.autoresume and config.save_folder is None:
        raise RecipeError("autoresume=true needs a save_folder: it goes on from the latest checkpoint in it")
    if config.rollbacks and ("nan_guard" not in active(config.callbacks) or config.save_folder is None):
        raise RecipeError("rollbacks needs callbacks.nan_guard, which finds the batch, and a save_folder to go back to")
    _check_parallelism(config.parallelism_config)
    if config.parallelism_config and config.gradient_reduction != "fp32":
        raise RecipeError(
            f"gradient_reduction={config.gradient_reduction} is for data parallelism; sharded models have their own, "
            "parallelism_config.fsdp.mixed_precision"
        )


def active(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of algorithms, callbacks or loggers that are not switched off by null."""
    return {name: arguments for name, arguments in section.items() if arguments is not None}


def compile_arguments(config: Sections) -> dict[str, Any] | None:
    """The recipe's `compile` as arguments of torch.compile; None for no compilation."""
    if not config.compile:
        return None
    arguments = {} if config.compile is True else config.compile
    check_arguments("compile", torch.compile, arguments, given=["model"])
    return dict(arguments)


def resolved_compile(config: TrainConfig, *, on_gpu: bool) -> tuple[Any, str]:
    """What `compile` is where it says auto, and why a GPU does not get CUDA graphs; "" where it does."""
    if config.compile != AUTO:
        return config.compile, ""
    if not on_gpu:
        return False, ""
    if config.device_train_microbatch_size == AUTO:
        return False, "device_train_microbatch_size is auto: each size that Composer tries would be compiled"
    if config.parallelism_config:
        return False, "it is sharded"
    if config.task != "masked_lm" or config.train_loader.pad_to_longest:
        return False, "its batches differ in width: each would be compiled"
    if config.overlap_reduction:
        return True, "overlap_reduction cuts the graph"
    return dict(COMPILE_ON_GPU), ""


def uses_cuda_graphs(config: Sections) -> bool:
    """Whether the recipe's `compile` asks for CUDA graphs, in one of torch.compile's two ways."""
    arguments = compile_arguments(config) or {}
    options = arguments.get("options") or {}
    return arguments.get("mode") in ("reduce-overhead", "max-autotune") or bool(options.get("triton.cudagraphs"))


def build_model(config: TrainConfig) -> MaskedLanguageModel:
    """The masked language model with its loss and metrics, on the current default device."""
    return build(
        "model",
        config.model.name,
        {},
        config=dict(config.model.config),
        train_mask_rate=config.train_loader.dataset.mlm_probability,
        eval_mask_rate=(config.eval_loader or config.train_loader).dataset.mlm_probability,
    )


def build_optimizer(config: Sections, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the parameters of `model`, in one group or in the recipe's param_groups."""
    name, arguments = _name_and_arguments("optimizer", config.optimizer, drop="param_groups")
    groups = parameter_groups(model.named_parameters(), config.optimizer.get("param_groups"))
    return build("optimizer", name, arguments, params=groups)


def build_scheduler(config: Sections) -> ComposerScheduler:
    """The learning-rate schedule."""
    return build("scheduler", *_name_and_arguments("scheduler", config.scheduler))


def build_algorithms(config: Sections) -> list[Algorithm]:
    """Composer's algorithms, in the order of the recipe."""
    return [build("algorithms", name, arguments) for name, arguments in active(config.algorithms).items()]


def build_callbacks(config: Sections, defaults: Mapping[str, Mapping[str, Any]]) -> list[Callback]:
    """The recipe's callbacks; `defaults` has arguments by name that a recipe may leave to the run."""
    sections = active(config.callbacks)
    return [build("callbacks", name, {**defaults.get(name, {}), **own}) for name, own in sections.items()]


def build_loggers(config: Sections, defaults: Mapping[str, Mapping[str, Any]]) -> list[LoggerDestination]:
    """The recipe's loggers; `defaults` as in `build_callbacks`."""
    sections = active(config.loggers)
    return [build("loggers", name, {**defaults.get(name, {}), **own}) for name, own in sections.items()]


def _name_and_arguments(kind: str, section: Mapping[str, Any], drop: str = "") -> tuple[str, dict[str, Any]]:
    if "name" not in section:
        raise RecipeError(f"{kind}.name is missing; known: {', '.join(sorted(REGISTRY[kind]))}")
    # Null takes an inherited argument back, which another optimizer or scheduler may not have.
    arguments = {key: value for key, value in section.items() if key not in ("name", drop) and value is not None}
    return section["name"], arguments


def check_model_name(kind: str, name: str) -> None:
    """Raise RecipeError unless `name` is a model of `kind` ("model" or "classifier")."""
    if name not in REGISTRY[kind]:
        raise RecipeError(f"model.name: unknown name '{name}': {nearest(name, REGISTRY[kind])}")


def check_choice(key: str, value: str | None, choices: Sequence[Any]) -> None:
    """Raise RecipeError unless `value` is one of `choices`."""
    if value not in choices:
        raise RecipeError(f"{key} '{value}': {nearest(str(value), ['null' if c is None else c for c in choices])}")


def _check_parallelism(config: Mapping[str, Any] | None) -> None:
    """Composer takes any key here without a word, so look at them first."""
    known = {
        "fsdp": FSDPConfig.__dataclass_fields__.keys() | FSDP2Config.__dataclass_fields__.keys(),
        "tp": TPConfig.__dataclass_fields__.keys(),
    }
    for section, arguments in (config or {}).items():
        if section not in known:
            raise RecipeError(f"parallelism_config: unknown key '{section}': {nearest(section, known)}")
        for key in arguments or {}:
            if key not in known[section]:
                hint = nearest(key, (name for name in known[section] if not name.startswith("_")))
                raise RecipeError(f"parallelism_config.{section}: unknown key '{key}': {hint}")
