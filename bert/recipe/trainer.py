"""Composer's trainer, with what is queued on a device before the host waits for it put in a better order."""

from __future__ import annotations

import composer


class Trainer(composer.Trainer):
    """A `composer.Trainer` that updates the weights before it reads the loss.

    Composer gives the whole step to the optimizer as a closure, whose loss it reads on the host before the optimizer
    starts: the device is idle from there until the update's kernels come. That is for optimizers that evaluate a loss
    several times, which no recipe has.
    """

    def _use_closures(self) -> bool:
        return False
