"""From a checked recipe to a finished training run."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from composer.core import Evaluator, Precision
from composer.devices import Device, DeviceCPU, DeviceGPU
from composer.utils import create_interval_scheduler, dist, get_device, reproducibility

from bert.composer_models import MaskedLanguageModel, count_parameters, padded_vocab_size
from bert.data.loader_config import LoaderConfig, check_metadata, load_metadata
from bert.data.metadata import DatasetMetadata
from bert.data.shared_memory import clean_stale_shared_memory
from bert.data.streaming_text import build_data_spec, end_workers
from bert.data.tokenizer import fingerprint, load_tokenizer
from bert.errors import DataError, RecipeError, storage_failure
from bert.files import write_text
from bert.provenance import versions
from bert.recipe import builders
from bert.recipe.callbacks import (
    GradientBuffers,
    RandomStateOnResume,
    RecipeRecord,
    SkipBatches,
    TrainingDivergedError,
    finite_only,
)
from bert.recipe.data_parallel import compiled_graphs, set_gradient_reduction
from bert.recipe.heartbeat import LOST_RANK_EXIT_CODE, Heartbeat, LostRankError
from bert.recipe.resume import alone_in, check_checkpoint, point_latest_to, run_folder, starting_point
from bert.recipe.schema import RECIPE_FOLDER, TrainConfig, load_config, to_yaml
from bert.recipe.stopping import StopOnSignal, TrainingStoppedError
from bert.recipe.trainer import Trainer
from bert.safe_loading import safe_loading
from monarch_mixer.kernels import use_kernels

if TYPE_CHECKING:
    from bert.embeddings.task import ContrastiveTask

log = logging.getLogger(__name__)

USAGE = """usage: composer [-n DEVICES] main.py RECIPE.yaml [key=value ...]

Pretrains the recipe, for example: composer -n 8 main.py yamls/pretrain/m2-base.yaml data_local=data/c4
(recipes in yamls/embeddings fine-tune a pretrained model for retrieval).
dry_run=true prints its size and an estimate of its time instead. `key=value` changes any key of the recipe, such as
optimizer.lr=4e-4 or algorithms.gradient_clipping=null. These are the keys:
"""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reached."""

    batches: int  # optimizer steps since the start of the run, earlier parts of a resumed one included
    train_loss: float | None  # nats, mean over the masked tokens of the last batch; None: it was already finished
    evaluation: dict[str, float]  # metric name -> value at the end; empty without an evaluation split
    unigram_entropy: float | None  # nats, of the evaluation split; None without one
    folder: Path  # of logs, curve and resolved recipe


def main(argv: Sequence[str]) -> int:
    """Run the command line `RECIPE.yaml [key=value ...]`.

    Returns:
        The exit code: 0, 2 for a mistake in the recipe or its data, 3 where training diverged, 4 for a full or failing
        disk, 5 where another rank was lost, 128 plus the signal's number (143 for SIGTERM, 138 for SIGUSR1, 130 for
        Ctrl-C) where one stopped it.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        print(USAGE, inspect.getsource(TrainConfig), sep="\n")  # noqa: T201
        return 0
    try:
        recipes = [argument for argument in argv if "=" not in argument and not argument.startswith("-")]
        if len(recipes) != 1:
            found = ", ".join(str(path) for path in sorted(RECIPE_FOLDER.glob("*.yaml")))
            raise RecipeError(f"give one recipe, not {len(recipes)}, and key=value overrides; recipes here: {found}")
        config = load_config(recipes[0], [argument for argument in argv if argument != recipes[0]])
        builders.check_config(config)
        if config.dry_run:
            from bert.recipe.dry_run import report

            print(report(config))  # noqa: T201
        else:
            train(config)
    except RecipeError as error:
        _say(error)
        return 2
    except TrainingDivergedError as error:
        _say(error)
        return 3
    except LostRankError as error:
        _say(error)
        sys.stderr.flush()
        os._exit(LOST_RANK_EXIT_CODE)  # the interpreter's own end would wait for the lost rank
    except TrainingStoppedError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return error.exit_code
    except (OSError, RuntimeError) as error:
        failure = storage_failure(error)
        if failure is None:
            raise
        hint = "checkpoints saved before are whole: make room and give the same command again, with autoresume=true"
        _say(f"{failure}; {hint}")
        return 4
    return 0


def _say(error: object) -> None:
    """Print an error, with its rank, and without the traceback that a loader's worker puts around its own."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition("Error: ")[2] or text
    rank = f"rank {dist.get_global_rank()}: " if dist.get_world_size() > 1 else ""
    print(f"error: {rank}{text}", file=sys.stderr)  # noqa: T201


def train(config: TrainConfig) -> TrainResult:
    """Train a recipe to its end, from its start or from a checkpoint.

    Raises:
        RecipeError: anything in the recipe, the data or the checkpoint that does not fit, before training starts.
        TrainingDivergedError: the loss or the weights are not finite.
        TrainingStoppedError: SIGTERM, SIGUSR1 or Ctrl-C; a checkpoint of the last batch is saved.
    """
    skipped: list[int] = []
    with use_kernels(config.kernels):
        while True:
            try:
                with contextlib.ExitStack() as held:
                    return _train(config, skipped, held)
            except TrainingDivergedError as error:
                if error.batch is None or error.checkpoint is None:
                    raise
                if len(skipped) >= config.rollbacks:
                    hint = "rollbacks=1 goes back to that checkpoint and passes over the batch"
                    if skipped:
                        hint = f"no rollback is left of {len(skipped)}"
                    raise TrainingDivergedError(f"{error}; {hint}", error.batch, error.checkpoint) from error
                log.warning("%s", error)
                log.warning("rollback %d of %d to %s", len(skipped) + 1, config.rollbacks, error.checkpoint)
                skipped.append(error.batch)
            gc.collect()  # the model and the loader of the run that is given up
            config = dataclasses.replace(config, autoresume=True)


def _train(config: TrainConfig, skipped: Sequence[int], held: contextlib.ExitStack) -> TrainResult:
    builders.check_config(config)
    _configure_logging(config)
    device = training_device(config.device)
    config = _for_device(config, device)
    world_size = dist.get_world_size()
    device_batch = _device_batch("global_train_batch_size", config.global_train_batch_size, world_size)
    eval_batch = _device_batch("global_eval_batch_size", _eval_batch_size(config), world_size)
    folder = run_folder(config)
    if world_size > 1:
        dist.initialize_dist(device, config.dist_timeout)
    if dist.get_global_rank() == 0:
        held.enter_context(alone_in(folder))
    dist.barrier()  # a job that is ending may still be saving the checkpoint to start from
    start = starting_point(config)
    clean_stale_shared_memory()

    reproducibility.seed_all(config.seed)
    task = builders.build("task", config.task, config=config)
    train_data, eval_data = None, None
    if task is None:
        model: Any = builders.build_model(config)
        train_data, eval_data = _check_data(config, model)
    else:
        from bert.embeddings.task import whole_batches

        model, config = task.model, whole_batches(config, device_batch)
    record = _record(config, train_data, task)
    if start is not None:
        check_checkpoint(start, record, model)
    if dist.get_local_rank() == 0:
        point_latest_to(start, config)
    dist.barrier()

    entropy = eval_data.unigram_entropy_nats if eval_data is not None else None
    callbacks = builders.build_callbacks(
        config,
        {
            "loss_curve": {"path": str(folder / "loss.png"), "unigram_entropy": entropy},
            "nan_guard": {"path": str(folder / "diverged.json")},
        },
    )
    loggers = builders.build_loggers(
        config,
        {
            "jsonl": {"path": str(folder / "metrics.jsonl")},
            "file": {"filename": str(folder / "log-rank{rank}.txt"), "overwrite": True},
            "tensorboard": {"log_dir": str(folder / "tensorboard")},
        },
    )
    log.info("%s: %s parameters, %d devices", config.run_name, f"{count_parameters(model):,}", world_size)
    optimizer = builders.build_optimizer(config, model)
    if dist.get_global_rank() == 0:
        _write_recipe(config, folder)
        if task is not None:
            task.save_tokenizer(folder)
    stop, heartbeat = StopOnSignal(), Heartbeat(config.heartbeat_timeout)
    callbacks += [RecipeRecord(record), RandomStateOnResume(), SkipBatches(skipped), heartbeat, stop]
    reduction = config.gradient_reduction if world_size > 1 and _reduces_at_once(config) else None
    if reduction is not None or _needs_gradient_buffers(config, device_batch):
        callbacks.append(GradientBuffers(reduction))
    with safe_loading():
        trainer = Trainer(
            model=_compiled(config, model),
            train_dataloader=_data_spec(config, config.train_loader, device_batch, task, train=True),
            optimizers=optimizer,
            schedulers=builders.build_scheduler(config),
            algorithms=builders.build_algorithms(config),
            callbacks=callbacks,
            loggers=loggers,
            # (Layer freezing would have each microbatch synchronised: DistributedDataParallel would need it.)
            ddp_sync_strategy=None if reduction is None else "single_auto_sync",
            **_evaluation_arguments(config, eval_batch, task),
            **_trainer_arguments(config, device, device_batch, stop),
        )
    try:
        if reduction is None:
            set_gradient_reduction(trainer.state.model, config.gradient_reduction)
        elapsed = trainer.state.get_elapsed_duration()
        if elapsed is None or elapsed.value < 1.0:
            graphs = compiled_graphs(cut=config.overlap_reduction) if config.compile else contextlib.nullcontext()
            with stop.listening(), heartbeat.watching(), graphs:
                trainer.fit()
        else:
            log.info("nothing to do: the checkpoint already is at max_duration %s", config.max_duration)
        result = _result(trainer, entropy, folder)
    except BaseException:
        trainer.engine.close()  # and not the trainer, which would wait for ranks that may be gone
        raise
    else:
        trainer.close()
    finally:
        for loader in (
            trainer.state.train_dataloader,
            *(each.dataloader.dataloader for each in trainer.state.evaluators),
        ):
            end_workers(loader)
    for name, value in result.evaluation.items():
        log.info("evaluation: %s %.4f", name, value)
    if entropy is not None:
        log.info("unigram entropy of the evaluation split: %.4f nats", entropy)
    return result


def _configure_logging(config: TrainConfig) -> None:
    logging.basicConfig(
        format=f"%(asctime)s rank{dist.get_global_rank()} %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("bert").setLevel(config.python_log_level.upper())


def training_device(name: str | None) -> Device:
    """The device of a recipe's `device` key; RecipeError for a GPU that is not there."""
    if name == "gpu" and not torch.cuda.is_available():
        raise RecipeError("device=gpu, but torch sees no CUDA device: use device=cpu, or install a CUDA build of torch")
    return get_device(name)


def precision_on(device: Device, precision: str) -> str:
    """The precision that training can have on this device, with a warning where it is another one."""
    if isinstance(device, DeviceCPU) and precision != Precision.FP32.value:
        log.warning("precision %s becomes fp32: Composer trains on a CPU in fp32 only", precision)
        return Precision.FP32.value
    return precision


def _for_device(config: TrainConfig, device: Device) -> TrainConfig:
    """The recipe as this device can run it, with a warning for what changes."""
    on_gpu = isinstance(device, DeviceGPU)
    compile_, reason = builders.resolved_compile(config, on_gpu=on_gpu)
    if reason:
        log.warning("compile auto becomes %s: %s", str(compile_).lower(), reason)
    config = dataclasses.replace(config, compile=compile_)
    if on_gpu:
        return config
    if config.parallelism_config:
        raise RecipeError("parallelism_config needs GPUs: Composer shards models there only; set it to null")
    config = dataclasses.replace(config, precision=precision_on(device, config.precision))
    if config.device_train_microbatch_size == builders.AUTO:
        micro = max(1, config.global_train_batch_size // dist.get_world_size())
        log.warning("device_train_microbatch_size auto becomes %d, the device's whole batch: auto needs a GPU", micro)
        config = dataclasses.replace(config, device_train_microbatch_size=micro)
    return config


def _device_batch(key: str, batch_size: int, world_size: int) -> int:
    if batch_size % world_size:
        raise RecipeError(
            f"{key} {batch_size} does not divide by the {world_size} devices; the nearest that does is "
            f"{max(1, round(batch_size / world_size)) * world_size}"
        )
    return batch_size // world_size


def _eval_batch_size(config: TrainConfig) -> int:
    return config.global_eval_batch_size or config.global_train_batch_size


def _check_data(config: TrainConfig, model: MaskedLanguageModel) -> tuple[DatasetMetadata, DatasetMetadata | None]:
    """Read what the splits say about themselves and compare it with the recipe."""
    expected = fingerprint(load_tokenizer(config.tokenizer_name)) if config.tokenizer_name is not None else None
    vocab_size = model.model.config.vocab_size
    found: list[DatasetMetadata | None] = []
    for name, loader in (("train_loader", config.train_loader), ("eval_loader", config.eval_loader)):
        if loader is None:
            found.append(None)
            continue
        if loader.pad_to_longest and not getattr(model.model.config, "leaves_padding_out", True):
            raise RecipeError(
                f"{name}.pad_to_longest wants a model that leaves padding out: set model.config.mask_padding to true"
            )
        try:
            metadata = load_metadata(loader.dataset, any_length=loader.pad_to_longest)
            check_metadata(
                metadata,
                max_seq_len=config.max_seq_len,
                vocab_size=vocab_size,
                tokenizer_fingerprint=expected,
                any_length=loader.pad_to_longest,
            )
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        expected = metadata.tokenizer_fingerprint  # of the training data, for the evaluation's
        found.append(metadata)
    train_data, eval_data = found
    assert train_data is not None
    if vocab_size > padded_vocab_size(train_data.vocab_size):
        log.warning(
            "the model has %d vocabulary entries, the data's tokenizer %d: the others cost time and are never used",
            vocab_size,
            train_data.vocab_size,
        )
    return train_data, eval_data


def _record(config: TrainConfig, metadata: DatasetMetadata | None, task: ContrastiveTask | None) -> dict[str, Any]:
    packages = ("monarch-mixer-bert", "torch", "mosaicml", "mosaicml-streaming", "transformers", "numpy")
    if task is not None:
        own = task.record()
    else:
        assert metadata is not None
        own = {
            "tokenizer_fingerprint": metadata.tokenizer_fingerprint,
            "tokenizer_name": metadata.tokenizer_name,
            "data": {
                "source": metadata.source,
                "documents": metadata.num_documents,
                "samples": metadata.num_samples,
                "tokens": metadata.num_tokens,
            },
        }
    return {
        "recipe": to_yaml(config),
        "model": {"name": config.model.name, "config": config.model.config},
        **own,
        "versions": {"python": platform.python_version(), **versions(packages)},
    }


def _data_spec(
    config: TrainConfig, loader: LoaderConfig, device_batch: int, task: ContrastiveTask | None, *, train: bool
) -> Any:
    if task is not None:
        return task.data_spec(loader, device_batch, train=train)
    return build_data_spec(
        loader, device_batch_size=device_batch, max_seq_len=config.max_seq_len, seed=config.seed, train=train
    )


def _evaluation_arguments(config: TrainConfig, device_batch: int, task: ContrastiveTask | None) -> dict[str, Any]:
    if config.eval_loader is None:
        return {}
    data = _data_spec(config, config.eval_loader, device_batch, task, train=False)
    evaluator = Evaluator(label="eval", dataloader=data)
    return {
        "eval_dataloader": evaluator,
        "eval_interval": config.eval_interval,
        "eval_subset_num_batches": config.eval_subset_num_batches,
    }


def _trainer_arguments(config: TrainConfig, device: Device, device_batch: int, stop: StopOnSignal) -> dict[str, Any]:
    micro = config.device_train_microbatch_size
    due = stop.saving_too(create_interval_scheduler(config.save_interval))
    guarded = "nan_guard" in builders.active(config.callbacks)
    return {
        "run_name": config.run_name,
        "max_duration": config.max_duration,
        "seed": config.seed,
        "device": device,
        "precision": config.precision,
        "device_train_microbatch_size": micro if isinstance(micro, str) else min(micro, device_batch),
        # The mean over the masked tokens of the global batch, however it is split: with masks drawn by chance,
        # microbatches and ranks have unequal numbers of them.
        "accumulate_train_batch_on_tokens": True,
        "progress_bar": config.progress_bar,
        "log_to_console": config.log_to_console,
        "console_log_interval": config.console_log_interval,
        "python_log_level": "warning" if config.python_log_level == "info" else config.python_log_level,
        "save_folder": config.save_folder,
        "save_interval": finite_only(due) if guarded else due,
        "save_num_checkpoints_to_keep": config.save_num_checkpoints_to_keep,
        # A run killed while it wrote a checkpoint leaves a torn one behind, which the resumed run writes again.
        "save_overwrite": config.save_overwrite or config.autoresume,
        "load_path": config.load_path,
        "load_weights_only": config.load_weights_only,
        "autoresume": config.autoresume,
        "compile_config": builders.compile_arguments(config) if config.parallelism_config else None,
        "parallelism_config": config.parallelism_config,
        "deterministic_mode": config.deterministic,
        "dist_timeout": config.dist_timeout,
    }


def _needs_gradient_buffers(config: TrainConfig, device_batch: int) -> bool:
    """Whether several microbatches add up what CUDA graphs make; sharded gradients are FSDP's own."""
    micro = config.device_train_microbatch_size
    several = isinstance(micro, int) and micro < device_batch  # (auto has no CUDA graphs)
    return several and builders.uses_cuda_graphs(config) and not config.parallelism_config


def _reduces_at_once(config: TrainConfig) -> bool:
    """Whether gradients all come at the end of the backward pass: a model compiled as a whole, not sharded."""
    whole = builders.compile_arguments(config) is not None and not config.overlap_reduction
    # (While Composer looks for a microbatch it begins the same one several times.)
    return whole and not config.parallelism_config and config.device_train_microbatch_size != builders.AUTO


def _compiled(config: TrainConfig, model: Any) -> Any:
    """The model, to be compiled as a whole, unless it is to be sharded.

    Composer would compile DistributedDataParallel around it, whose Python breaks the graph (`fullgraph: true` fails);
    a sharded model it compiles after it has been wrapped.
    """
    arguments = builders.compile_arguments(config)
    return model if arguments is None or config.parallelism_config else torch.compile(model, **arguments)


def _write_recipe(config: TrainConfig, folder: Path) -> None:
    write_text(folder / "recipe.yaml", to_yaml(config))


def _result(trainer: Trainer, entropy: float | None, folder: Path) -> TrainResult:
    metrics = trainer.state.eval_metrics.get("eval", {})
    evaluated = trainer.state.eval_timestamp.batch.value > 0
    return TrainResult(
        batches=trainer.state.timestamp.batch.value,
        train_loss=(trainer.state.total_loss_dict or {}).get("loss/train/total"),
        evaluation={name: float(metric.compute()) for name, metric in metrics.items()} if evaluated else {},
        unigram_entropy=entropy,
        folder=folder,
    )
