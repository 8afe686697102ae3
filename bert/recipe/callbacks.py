"""Callbacks of the recipe: they stop a diverged run, draw its loss, record what made it, and make resuming exact."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist, reproducibility
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bert.data.masking import IGNORED_LABEL
from bert.errors import CheckpointError
from bert.files import save_figure, write_json
from bert.recipe.data_parallel import average_over_ranks

log = logging.getLogger(__name__)

_IDS_SHOWN = 8  # sample ids in a message


class TrainingDivergedError(RuntimeError):
    """Loss, gradients or weights are not finite; the message says since when, and what to go back to.

    Attributes:
        batch: whose step did it, counted from 1; None where only the damage was found.
        checkpoint: the last one, which is sound; None where there is none.
    """

    def __init__(self, message: str, batch: int | None = None, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.batch = batch
        self.checkpoint = checkpoint


class NaNGuard(Callback):
    """Stop the run at the first loss or gradient that is not finite, and write down which samples it came from.

    Composer has already brought the loss of the global batch to the host when a batch ends, so looking at it costs
    nothing; the gradients' norm is computed before the optimizer's step and looked at after it, with the loss. Every
    rank stops together, before a checkpoint of that batch is written.

    Args:
        path: of a JSON file with the batch's sample ids by rank; may hold {run_name}.
    """

    def __init__(self, path: str = "runs/{run_name}/diverged.json") -> None:
        self.path = path
        self._sample_ids: torch.Tensor | None = None
        self._gradients_are_bad: torch.Tensor | None = None

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Keep the ids: when the batch ends, Composer has only its last microbatch."""
        self._sample_ids = state.batch.get("sample_ids") if isinstance(state.batch, Mapping) else None

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Ask, without waiting for the answer, whether the gradients are finite."""
        self._gradients_are_bad = None
        if state.scaler is not None and state.scaler.is_enabled():
            return  # with fp16, infinite gradients are the scaler's daily business
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self._gradients_are_bad = (~torch.isfinite(norm)).to(torch.uint8).reshape(1)
            dist.all_reduce(self._gradients_are_bad, reduce_operation="MAX")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the losses and gradients of the batch that just ended."""
        # Composer keeps no losses where fp16 gradient scaling skipped the batch.
        bad = [
            f"{name} is {value}" for name, value in (state.total_loss_dict or {}).items() if not math.isfinite(value)
        ]
        if not bad and self._gradients_are_bad is not None and int(self._gradients_are_bad):
            bad = ["the gradients are not finite"]
        if bad:
            raise _diverged(state, bad[0], state.timestamp.batch.value, self._written_ids(state, bad[0]))

    def _written_ids(self, state: State, what: str) -> str:
        """Write the sample ids of the batch to a file, and say which they are."""
        if self._sample_ids is None:
            return ""
        by_rank: list[list[int]] = dist.all_gather_object(self._sample_ids.tolist())
        path = Path(format_name_with_dist(self.path, run_name=state.run_name))
        if dist.get_global_rank() == 0:
            write_json(path, {"batch": state.timestamp.batch.value, "reason": what, "sample_ids": by_rank})
        ids = [number for rank in by_rank for number in rank]
        shown = ", ".join(map(str, ids[:_IDS_SHOWN])) + (", ..." if len(ids) > _IDS_SHOWN else "")
        return f"; its {len(ids)} samples are {shown} ({path})"


class LossSpike(Callback):
    """Warn of a loss far above those of the batches before it.

    Args:
        window: batches that it is compared with.
        deviations: standard deviations above their mean that are a spike ...
        least: ... and nats above it.
    """

    def __init__(self, window: int = 100, deviations: float = 6.0, least: float = 0.5) -> None:
        if window < 2:
            raise ValueError(f"window must be at least 2 batches, not {window}")
        self.window = window
        self.deviations = deviations
        self.least = least
        self._losses: deque[float] = deque(maxlen=window)
        self._sample_ids: torch.Tensor | None = None

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Keep the ids of the batch."""
        self._sample_ids = state.batch.get("sample_ids") if isinstance(state.batch, Mapping) else None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Compare the loss of the batch that just ended."""
        loss = (state.total_loss_dict or {}).get("loss/train/total")
        if loss is None:
            return
        if len(self._losses) == self.window:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + max(self.least, self.deviations * deviation):
                ids = [] if self._sample_ids is None else self._sample_ids.tolist()[:_IDS_SHOWN]
                log.warning(
                    "batch %d: the loss is %.3f, and was %.3f ± %.3f in the %d batches before; samples of this rank: "
                    "%s ...",
                    state.timestamp.batch.value,
                    loss,
                    mean,
                    deviation,
                    self.window,
                    ", ".join(map(str, ids)),
                )
        self._losses.append(loss)


class SkipBatches(Callback):
    """Pass over batches without a step: after a rollback, those that ruined the run.

    The batch is read and counted, and the schedule moves on; its loss is 0, of no token, and the optimizer is not
    given a gradient.
    """

    def __init__(self, batches: Collection[int]) -> None:
        self.batches = batches
        self._skipping = False

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Take the labels away, where this is one of the batches."""
        self._skipping = state.timestamp.batch.value + 1 in self.batches
        if self._skipping:
            state.batch = {**state.batch, "labels": torch.full_like(state.batch["labels"], IGNORED_LABEL)}
            log.warning("batch %d is passed over", state.timestamp.batch.value + 1)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Take the gradients away."""
        if self._skipping:
            for parameter in state.model.parameters():
                parameter.grad = None


def finite_only(due: Callable[[State, Event], bool]) -> Callable[[State, Event], bool]:
    """Return `due` (whether to save a checkpoint now), but refusing to save weights that are not finite.

    A step can ruin the weights while its own loss is still finite. Weights are looked at only when a checkpoint is
    due, so the last one on disk is always one to go back to.

    Raises:
        TrainingDivergedError: from the returned function, on all ranks.
    """

    def save_now(state: State, event: Event) -> bool:
        if not due(state, event):
            return False
        bad = [name for name, p in state.model.named_parameters() if not torch.isfinite(p.detach()).all()]
        flag = state.device.tensor_to_device(torch.tensor([len(bad)]))
        dist.all_reduce(flag, reduce_operation="MAX")
        if int(flag):
            where = f"in {len(bad)} parameters, the first is {bad[0]}" if bad else "on another rank"
            raise _diverged(state, f"weights are not finite ({where})")
        return True

    return save_now


def _diverged(state: State, what: str, batch: int | None = None, samples: str = "") -> TrainingDivergedError:
    saved = [
        path
        for saver in state.callbacks
        if isinstance(saver, CheckpointSaver)
        for path in saver.all_saved_checkpoints_to_timestamp
    ]
    back = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
    message = (
        f"training stopped at batch {state.timestamp.batch.value}: {what}{samples}; {back}. A lower learning rate, a "
        "longer warm-up or gradient clipping may help"
    )
    return TrainingDivergedError(message, batch, saved[-1] if saved else None)


class LoaderMonitor(Callback):
    """Log the seconds that each training batch was waited for, until the last rank had its own: "time/loader_wait".

    Where they are more than a few percent of a batch's time, the loader is too slow: give it more workers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Look at the clock when a batch is asked for."""
        self._start = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Log how long it took to come."""
        logger.log_metrics({"time/loader_wait": time.perf_counter() - self._start})


class LossCurve(Callback):
    """Draw training and evaluation loss against steps into a PNG, at every evaluation and at the end.

    Args:
        path: of the PNG; may hold {run_name}.
        unigram_entropy: nats, drawn as a line: what a model without context can reach on the evaluation text;
            None: that of the evaluation split's metadata.json, where there is one.
        max_points: of the training curve that is kept; older ones are thinned out, evenly.
    """

    def __init__(
        self, path: str = "runs/{run_name}/loss.png", unigram_entropy: float | None = None, max_points: int = 2000
    ) -> None:
        self.path = path
        self.unigram_entropy = unigram_entropy
        self.max_points = max_points
        self._train: list[tuple[int, float]] = []
        self._evaluation: list[tuple[int, float]] = []
        self._stride = 1

    def batch_end(self, state: State, logger: Logger) -> None:
        """Keep the loss of this batch, where it is one of those that are kept."""
        batch = state.timestamp.batch.value
        if batch % self._stride == 0 and state.total_loss_dict:
            self._train.append((batch, state.total_loss_dict["loss/train/total"]))
        if len(self._train) > self.max_points:
            self._stride *= 2
            self._train = [point for point in self._train if point[0] % self._stride == 0]

    def eval_end(self, state: State, logger: Logger) -> None:
        """Keep the cross entropy of this evaluation and draw."""
        for metrics in state.eval_metrics.values():
            for name, metric in metrics.items():
                if "CrossEntropy" in name:
                    self._evaluation.append((state.timestamp.batch.value, float(metric.compute())))
        self._draw(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Draw the whole run."""
        self._draw(state)

    def state_dict(self) -> dict[str, Any]:
        """The points so far: a resumed run draws one curve."""
        # One string: a sharded checkpoint would give every number of a list its own entry.
        points = {"train": self._train, "evaluation": self._evaluation, "stride": self._stride}
        return {"points": json.dumps(points)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the points of the run that is resumed."""
        points = json.loads(state["points"])
        self._train = [(batch, loss) for batch, loss in points["train"]]
        self._evaluation = [(batch, loss) for batch, loss in points["evaluation"]]
        self._stride = points["stride"]

    def _draw(self, state: State) -> None:
        if dist.get_global_rank() != 0 or not (self._train or self._evaluation):
            return
        # Imported where it is used: it takes a second, and the Figure class needs no display and no global state.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="optimizer steps", ylabel="cross entropy on masked tokens (nats)")
        axes.set_title(state.run_name)
        if self._train:
            axes.plot(*zip(*self._train, strict=True), linewidth=0.8, alpha=0.7, label="training")
        if self._evaluation:
            axes.plot(*zip(*self._evaluation, strict=True), marker="o", markersize=3, label="evaluation")
        if self.unigram_entropy is not None:
            axes.axhline(
                self.unigram_entropy, color="grey", linestyle="--", label="unigram entropy of the evaluation text"
            )
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, Path(format_name_with_dist(self.path, run_name=state.run_name)))


class RecipeRecord(Callback):
    """Carry what made a run in its checkpoints, and refuse a checkpoint that another model or tokenizer made.

    Args:
        record: "recipe" (resolved), "model" (name and config), "tokenizer_fingerprint" (None: unknown), "versions",
            "data" (of the training data: source, counts); plain values, which travel as one JSON string.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = dict(record)

    def state_dict(self) -> dict[str, Any]:
        """The record, for the checkpoint."""
        return {"record": json.dumps(self.record)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the checkpoint's record.

        Raises:
            CheckpointError: the checkpoint belongs to another model or tokenizer, or was saved with more training
                data; the message lists the differences.
        """
        stored = json.loads(state["record"])
        check_record(stored, self.record, "the checkpoint")
        _check_data(stored, self.record)


def check_record(stored: Mapping[str, Any], current: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError where the `stored` record's model or tokenizer is not the `current` one."""
    old, new = stored.get("tokenizer_fingerprint"), current.get("tokenizer_fingerprint")
    if old is not None and new is not None and old != new:
        raise CheckpointError(
            f"{source} was trained with another tokenizer (fingerprint {old}, the data's is {new}): its token ids "
            "mean other words. Use data prepared with its tokenizer"
        )
    changes = differences(stored.get("model", {}), current.get("model", {}), "there", "here")
    if changes:
        lines = "".join(f"\n  model.{change}" for change in changes)
        raise CheckpointError(f"{source} holds another model:{lines}\nUse the recipe that made it, or drop load_path")


_COUNTS = ("samples", "documents", "tokens")


def _check_data(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Warn where the training data's counts are not those that a run began with; CheckpointError for fewer samples.

    The place in an epoch and its order are made of sample numbers, which fewer samples do not have.
    """
    then: dict[str, Any] = {key: (stored.get("data") or {}).get(key) for key in _COUNTS}
    now: dict[str, Any] = {key: (current.get("data") or {}).get(key) for key in _COUNTS}
    if not all(isinstance(count, int) for count in (*then.values(), *now.values())):
        return  # of an older version, or of a task that reads other data
    if now["samples"] < then["samples"]:
        raise CheckpointError(
            f"the checkpoint was saved with {then['samples']:,} training samples, and there are {now['samples']:,} "
            "now: give back the data that the run began with, or begin a run from its weights (load_path with "
            "load_weights_only=true, and another run_name)"
        )
    if changes := differences(then, now, "then", "now"):
        order = ": samples come in another order from here on" if now["samples"] > then["samples"] else ""
        log.warning("going on in other training data (%s)%s", "; ".join(changes), order)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], then: str, now: str) -> list[str]:
    """Say which values of two nested mappings differ, as "key: old {then}, new {now}", sorted by key."""
    old, new = flat(before), flat(after)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)} {then}, {new.get(key)} {now}" for key in changed]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return result


class RandomStateOnResume(Callback):
    """Make a resumed run draw the dropout that a run without the stop would have drawn.

    Composer 0.32 puts the random state back at the start of an epoch only: in the middle of one, a streaming loader
    resumes itself and Composer's own restoration is skipped. The state is put back after the first batch was read,
    because making a loader's iterator draws from the same generator, which the run without a stop did long before.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The random state of every rank."""
        return {"rng": reproducibility.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until the first batch (or epoch) of the resumed run begins."""
        self._pending = state["rng"]

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Put the state back where the checkpoint lies between two epochs."""
        self._restore()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Put the state back where the checkpoint lies within an epoch."""
        self._restore()

    def _restore(self) -> None:
        if self._pending is not None:
            reproducibility.load_rng_state(self._pending)
            self._pending = None


class GradientBuffers(Callback):
    """Keep gradients in memory of their own, so that CUDA graphs work with several microbatches a step.

    A compiled backward pass that is a CUDA graph writes its gradients to the same addresses each time. The first
    microbatch's would become `.grad` without a copy, and the next one's replay would write over them (PyTorch refuses).
    Where `.grad` is there already, autograd adds to it. One buffer holds all of a kind: zeroing it is one kernel, and
    adding it up over the ranks one collective. A parameter that gets no gradient has zeros, not None: an optimizer then
    decays it, and DistributedDataParallel would have refused it.
    """

    _ALIGNMENT = 64  # elements: each gradient begins where the widest loads may

    def __init__(self, reduction: str | None = None) -> None:
        """Keep them, and exchange them.

        Args:
            reduction: "fp32" or "bf16": average the buffers over the ranks when a step's last backward pass ends, in
                place of DistributedDataParallel. That copies each gradient into a bucket and back, parameter by
                parameter, to start within the backward pass; a whole graph hands over all of them at its end. None:
                leave it to DistributedDataParallel.
        """
        self._reduction = reduction
        self._taken_over: DistributedDataParallel | None = None  # in a step's last microbatch
        self._parameters: list[torch.nn.Parameter] = []
        self._buffers: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []  # a view for each parameter

    def before_forward(self, state: State, logger: Logger) -> None:
        """Before a batch's first microbatch: Composer has taken the gradients away."""
        self.provide(state.model)
        if self._reduction is None:
            return
        model = state.model
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(f"gradients are to be exchanged, but the model, {type(model).__name__}, is one rank's")
        if self._taken_over is not None:  # by a microbatch that an error ended
            self._taken_over.require_backward_grad_sync = True
        # (In all microbatches but the last one Composer has it off, by `no_sync`.)
        self._taken_over = model if model.require_backward_grad_sync else None
        model.require_backward_grad_sync = False

    def after_backward(self, state: State, logger: Logger) -> None:
        """After the last microbatch: average over the ranks, before anything clips or uses the gradients."""
        if self._taken_over is not None and self._reduction is not None:
            self._taken_over.require_backward_grad_sync = True
            self._taken_over = None
            if not self._hold_all():
                raise RuntimeError("gradients were replaced within a step: they are not where the ranks exchange them")
            for buffer in self._buffers:
                average_over_ranks(buffer, self._reduction)

    def provide(self, model: torch.nn.Module) -> None:
        """Give every parameter of `model`, the same one each time, a gradient of zeros, unless they have theirs."""
        if not self._buffers:
            self._allocate(model)
        if self._hold_all():
            return
        for buffer in self._buffers:
            buffer.zero_()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.requires_grad:
                parameter.grad = gradient

    def _hold_all(self) -> bool:
        # Of all, not of the first: one that is frozen in training keeps the gradient that it has, or has none.
        pairs = zip(self._parameters, self._gradients, strict=True)
        return all(parameter.grad is gradient for parameter, gradient in pairs if parameter.requires_grad)

    def _allocate(self, model: torch.nn.Module) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[torch.nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), parameters in kinds.items():
            sizes = [math.ceil(p.numel() / self._ALIGNMENT) * self._ALIGNMENT for p in parameters]
            buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
            self._buffers.append(buffer)
            self._parameters += parameters
            self._gradients += [
                part[: parameter.numel()].view(parameter.shape)
                for part, parameter in zip(buffer.split(sizes), parameters, strict=True)
            ]
