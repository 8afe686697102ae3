"""Parameter groups by name, and what Composer lacks: a fused optimizer, a learning-rate schedule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import composer.optim
import torch
from composer.core import State, Time, TimeUnit
from composer.optim import ComposerScheduler

from bert.errors import RecipeError, nearest

log = logging.getLogger(__name__)

GROUP_KEYS = ("pattern", "lr", "weight_decay")


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], groups: Iterable[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Put every trainable parameter into exactly one optimizer group.

    Without `groups` there is one group of all parameters, norms and biases included: what the original M2-BERT
    trains with, since its per-parameter settings never reach the optimizer. A group is a mapping with a regular
    expression `pattern` (searched for in the parameter's name) and the group's own `lr` and `weight_decay`; the first
    pattern that matches wins, and what no pattern matches stays in the default group, which comes first.

    Args:
        parameters: names and parameters, as `module.named_parameters()` gives them (tied ones once).
        groups: the groups in order of precedence; None for a single group.

    Returns:
        Groups for a torch optimizer, in an order that depends only on the arguments: a resumed run finds its own.

    Raises:
        RecipeError: an unknown key, a pattern that is no regular expression, or one that matches nothing.
    """
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    settings = check_groups(groups)
    members: list[list[tuple[str, torch.nn.Parameter]]] = [[] for _ in range(len(settings) + 1)]
    for name, parameter in named:
        matching = (index for index, group in enumerate(settings, 1) if group["pattern"].search(name))
        members[next(matching, 0)].append((name, parameter))
    result: list[dict[str, Any]] = []
    for index, owned in enumerate(members):
        pattern = settings[index - 1]["pattern"].pattern if index else None
        if pattern is not None and not owned:
            examples = ", ".join(name for name, _ in named[:3])
            raise RecipeError(
                f"optimizer.param_groups[{index - 1}]: the pattern '{pattern}' matches no parameter that is not "
                f"already in an earlier group (names look like: {examples})"
            )
        if not owned:
            continue
        own = {} if pattern is None else {k: v for k, v in settings[index - 1].items() if k != "pattern"}
        count = sum(parameter.numel() for _, parameter in owned)
        log.info(
            "parameter group %d (%s): %d tensors, %s parameters%s",
            len(result),
            "all others" if pattern is None and settings else pattern or "all",
            len(owned),
            f"{count:,}",
            "".join(f", {key} {value:g}" for key, value in own.items()),
        )
        result.append({"params": [parameter for _, parameter in owned], **own})
    return result


def check_groups(groups: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return the groups of `parameter_groups` with their patterns compiled; RecipeError where one is malformed."""
    return [_checked_group(group, index) for index, group in enumerate(groups or ())]


def _checked_group(group: Mapping[str, Any], index: int) -> dict[str, Any]:
    where = f"optimizer.param_groups[{index}]"
    if not isinstance(group, Mapping) or "pattern" not in group:
        raise RecipeError(f"{where} must be a section with a 'pattern' and its own {' or '.join(GROUP_KEYS[1:])}")
    for key, value in group.items():
        if key not in GROUP_KEYS:
            raise RecipeError(f"{where}: unknown key '{key}': {nearest(str(key), GROUP_KEYS)}")
        if key != "pattern" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RecipeError(f"{where}.{key} must be a number, not {value!r}")
    try:
        pattern = re.compile(group["pattern"])
    except (re.error, TypeError) as error:
        raise RecipeError(f"{where}.pattern: {group['pattern']!r} is not a regular expression: {error}") from error
    return {**group, "pattern": pattern}


class DecoupledAdamW(composer.optim.DecoupledAdamW):
    """Composer's DecoupledAdamW in PyTorch's fused kernels; arguments and checkpoints are the same.

    Composer 0.32 updates one parameter after the other and asks the device for the step count of each, so that every
    step waits for the device once for each of M2-BERT-base's 550 tensors. Its decay, weight_decay * lr / (first lr), is
    that of PyTorch's AdamW with weight_decay / (first lr). Where the first lr is 0, nothing decays.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)
        for group in self.param_groups:
            group["fused"] = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a state, also one that Composer's own DecoupledAdamW saved."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                if "step" in (own := self.state.get(parameter, {})):
                    own["step"] = own["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; returns what `closure` returns, None without one."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            first = group.setdefault("initial_lr", group["lr"])
            group["weight_decay"] = group["weight_decay"] / first if first else 0.0
        try:
            return torch.optim.AdamW.step(self, closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


class WarmupStableDecayScheduler(ComposerScheduler):
    """Linear warm-up, then the full learning rate, then a decay that ends with the run.

    Args:
        t_warmup: length of the warm-up: a share of the run (0.06dur) or a time in the unit of max_duration.
        t_decay: length of the decay, likewise; 0dur for none.
        alpha_f: what the learning rate is multiplied by at the end of the run.
        shape: of the decay: "linear", or "sqrt" for one minus the square root of the decay's elapsed share.
    """

    def __init__(
        self, t_warmup: str | Time, t_decay: str | Time = "0.1dur", alpha_f: float = 0.0, shape: str = "linear"
    ) -> None:
        if shape not in ("linear", "sqrt"):
            raise RecipeError(f"shape '{shape}': {nearest(shape, ('linear', 'sqrt'))}")
        self.t_warmup = Time.from_input(t_warmup)
        self.t_decay = Time.from_input(t_decay)
        self.alpha_f = alpha_f
        self.shape = shape

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """The multiplier of the learning rate at `state.timestamp`; `ssr` scales the run's duration."""
        assert state.max_duration is not None, "Composer calls schedulers during fit only"
        # A duration in epochs is followed batch by batch, like Composer's own schedulers do.
        if state.max_duration.unit == TimeUnit.EPOCH:
            if state.dataloader_len is None:
                raise RecipeError("warmup_stable_decay needs max_duration in batches, samples or tokens here")
            total, unit = state.max_duration.value * int(state.dataloader_len) * ssr, TimeUnit.BATCH
        else:
            total, unit = state.max_duration.value * ssr, state.max_duration.unit
        warmup, decay = (_in_unit(time, unit, total) for time in (self.t_warmup, self.t_decay))
        if warmup + decay > total:
            raise RecipeError(f"warm-up {self.t_warmup} and decay {self.t_decay} together are longer than the run")
        now = state.timestamp.get(unit).value
        if now < warmup:
            return now / warmup
        elapsed = min(1.0, max(0.0, now - (total - decay)) / decay) if decay else 0.0
        return 1.0 + (self.alpha_f - 1.0) * (math.sqrt(elapsed) if self.shape == "sqrt" else elapsed)


def _in_unit(time: Time, unit: TimeUnit, total: float) -> float:
    """`time` in `unit`, of which the run has `total`."""
    if time.unit == TimeUnit.DURATION:
        return time.value * total
    if time.unit != unit:
        raise RecipeError(f"scheduler: the time {time} must be a share of the run (dur) or in the run's unit ({unit})")
    return time.value
