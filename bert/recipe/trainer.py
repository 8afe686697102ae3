"""Composer's trainer, with what is queued on a device before the host waits for it put in a better order."""

from __future__ import annotations

import logging
from typing import Any

import composer


class Trainer(composer.Trainer):
    """A `composer.Trainer` that updates the weights before it reads the loss.

    Composer gives the whole step to the optimizer as a closure, whose loss it reads on the host before the optimizer
    starts: the device is idle from there until the update's kernels come. That is for optimizers that evaluate a loss
    several times, which no recipe has.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        log = logging.getLogger("composer.trainer.trainer")
        log.addFilter(_is_news)
        try:
            super().__init__(*arguments, **named)
        finally:
            log.removeFilter(_is_news)

    def _use_closures(self) -> bool:
        return False


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning of Composer's is one: that the recipe's model comes compiled is how it should be."""
    return "is already compiled" not in record.getMessage()
