"""What a recipe costs, without data, without a device and without training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from composer.callbacks.speed_monitor import GPU_AVAILABLE_FLOPS
from composer.core import Time, TimeUnit

from bert.errors import RecipeError, nearest
from bert.recipe.builders import build_model
from bert.recipe.schema import TrainConfig

TRAINING_OVER_FORWARD = 3  # a backward pass costs twice the forward pass: one product for inputs, one for weights
BYTES = {"fp32": 4, "bf16": 2}  # of a number


@dataclass(frozen=True)
class Estimate:
    """The size of a run. Operations are floating-point ones, a multiply-add counted as two."""

    parameters: int
    forward_flops_per_token: float
    tokens_per_step: int
    steps: int
    compute_s: float  # of a step, on each device
    reduction_bytes: float  # that each device sends in a step, to add up the gradients
    reduction_s: float  # of a step; taken as not overlapped with computation
    overhead_s: float  # of a step

    @property
    def seconds(self) -> float:
        """Of training alone: no evaluation, no checkpoints, no waiting for data."""
        return self.steps * (self.compute_s + self.reduction_s + self.overhead_s)

    @property
    def efficiency(self) -> float:
        """Share of a step's time that is computation."""
        return self.compute_s / (self.compute_s + self.reduction_s + self.overhead_s)

    @property
    def training_flops(self) -> float:
        """Of the whole run."""
        return TRAINING_OVER_FORWARD * self.forward_flops_per_token * self.tokens_per_step * self.steps


def estimate(config: TrainConfig) -> Estimate:
    """Build the model without memory (meta device) and do the arithmetic.

    Raises:
        RecipeError: an unknown device, or a duration that only the data could turn into steps.
    """
    from bert.composer_models import count_parameters, forward_flops_per_token

    if config.task != "masked_lm":
        raise RecipeError(f"a dry run knows what task masked_lm costs, not {config.task}")
    with torch.device("meta"):
        model = build_model(config)
    flops = forward_flops_per_token(model, config.max_seq_len)
    tokens_per_step = config.global_train_batch_size * config.max_seq_len
    steps = _steps(config)
    sustained = _peak_flops(config) * config.dry_run_mfu * config.dry_run_num_devices
    compute = TRAINING_OVER_FORWARD * flops * tokens_per_step / sustained
    parameters = count_parameters(model)
    sent = reduction_bytes(parameters, config.gradient_reduction, config.dry_run_num_devices)
    within = config.dry_run_num_devices <= config.dry_run_devices_per_node
    bandwidth = config.dry_run_node_bandwidth if within else config.dry_run_network_bandwidth
    reduction, overhead = sent / (bandwidth * 1e9), config.dry_run_overhead_ms / 1e3
    return Estimate(parameters, flops, tokens_per_step, steps, compute, sent, reduction, overhead)


def reduction_bytes(parameters: int, precision: str, devices: int) -> float:
    """Return what each device sends to add up the gradients: a ring's 2 (N - 1) / N of them, NCCL's bus bandwidth."""
    return BYTES[precision] * parameters * 2 * (devices - 1) / devices


def report(config: TrainConfig) -> str:
    """The estimate as text for people."""
    result = estimate(config)
    per_sample = result.forward_flops_per_token * config.max_seq_len
    rows = [
        ("model", f"{config.model.name}, {result.parameters:,} parameters"),
        ("forward pass", f"{result.forward_flops_per_token:.4g} FLOP a token, {per_sample:.4g} FLOP a sample"),
        ("optimizer step", f"{config.global_train_batch_size:,} samples, {result.tokens_per_step:,} tokens"),
        ("run", f"{result.steps:,} steps, {result.steps * result.tokens_per_step:.4g} tokens"),
        ("training", f"{result.training_flops:.4g} FLOP (forward x {TRAINING_OVER_FORWARD})"),
        (
            "estimated time",
            f"{_duration(result.seconds)} on {config.dry_run_num_devices} x {config.dry_run_device} at "
            f"{100 * config.dry_run_mfu:.3g}% of its {_peak_flops(config):.3g} FLOP/s ({config.precision})",
        ),
    ]
    if config.dry_run_num_devices > 1:
        step = result.compute_s + result.reduction_s + result.overhead_s
        rows.append(
            (
                "a step",
                f"{1e3 * step:.1f} ms: computation {1e3 * result.compute_s:.1f}, reduction of gradients "
                f"{1e3 * result.reduction_s:.1f} ({result.reduction_bytes / 1e6:,.0f} MB sent by each device, "
                f"{config.gradient_reduction}, not overlapped), overhead {1e3 * result.overhead_s:.1f}; "
                f"efficiency {result.efficiency:.0%}",
            )
        )
    if config.dry_run_price is not None:
        hours = result.seconds / 3600 * config.dry_run_num_devices
        rows.append(("price", f"{hours * config.dry_run_price:,.0f} for {hours:,.0f} device hours"))
    lines = [f"{config.run_name} (dry run: nothing is read, trained or written)"]
    return "\n".join(lines + [f"  {name:<15} {text}" for name, text in rows])


def _steps(config: TrainConfig) -> int:
    duration = Time.from_timestring(config.max_duration)
    if duration.unit == TimeUnit.BATCH:
        return duration.value
    per_step = {TimeUnit.SAMPLE: 1, TimeUnit.TOKEN: config.max_seq_len}.get(duration.unit)
    if per_step is None:
        raise RecipeError(
            f"max_duration {config.max_duration}: a dry run reads no data, so give the duration in batches (ba), "
            "samples (sp) or tokens (tok)"
        )
    return -(-duration.value // (per_step * config.global_train_batch_size))


def _peak_flops(config: TrainConfig) -> float:
    device = GPU_AVAILABLE_FLOPS.get(config.dry_run_device)
    if device is None:
        hint = nearest(config.dry_run_device, GPU_AVAILABLE_FLOPS)
        raise RecipeError(f"dry_run_device: unknown device '{config.dry_run_device}': {hint}")
    if config.precision not in device:
        raise RecipeError(
            f"precision {config.precision}: no peak speed is known for {config.dry_run_device}; "
            f"known there: {', '.join(device)}"
        )
    return device[config.precision]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 3 * 86400 else f"{seconds / 86400:.1f} days"
