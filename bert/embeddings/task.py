"""What `task: contrastive` puts in the place of masked language modelling: model, data, record."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from composer.core import DataSpec

from bert.composer_models import build_masked_lm
from bert.data.loader_config import LoaderConfig
from bert.data.tokenizer import fingerprint, load_tokenizer
from bert.embeddings.data import PairCollator, Pairs, build_pair_loader
from bert.embeddings.model import ContrastiveModel
from bert.errors import CheckpointError, RecipeError
from bert.inference import check_pooling, leaves_padding_out, longest_input
from bert.recipe.schema import TrainConfig
from bert.trained import open_model

log = logging.getLogger(__name__)


class ContrastiveTask:
    """Contrastive training as `bert.recipe.train` runs it."""

    def __init__(self, config: TrainConfig) -> None:
        """Load what the run starts from, and its tokenizer.

        Raises:
            RecipeError: settings that cannot work; a checkpoint or a tokenizer that is not there or does not fit.
        """
        settings = config.contrastive
        check_pooling(settings.pooling)
        if settings.temperature <= 0:
            raise RecipeError(f"contrastive.temperature must be positive, not {settings.temperature}")
        # Rates are of no use here: the head that they bound does not run.
        network = build_masked_lm(
            config.model.name, dict(config.model.config), train_mask_rate=1.0, eval_mask_rate=1.0
        ).model
        if not leaves_padding_out(network.config):
            raise RecipeError(
                "contrastive training pads documents to the batch's longest, which must not change their vectors: set "
                "model.config.mask_padding=true (a checkpoint trained without it can be started from)"
            )
        if max(config.max_seq_len, settings.query_length) > longest_input(network.config):
            raise RecipeError(f"max_seq_len and query_length: the model takes {longest_input(network.config)} tokens")
        if settings.checkpoint is None and config.tokenizer_name is None:
            raise RecipeError("contrastive.checkpoint is missing: the model to start from, such as runs/m2-base-2k")
        if settings.checkpoint is None:
            self.tokenizer = load_tokenizer(str(config.tokenizer_name))
        else:
            opened = open_model(settings.checkpoint, config.tokenizer_name)
            self.tokenizer = opened.tokenizer
            try:
                network.load_state_dict(opened.network.state_dict(), strict=True)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{settings.checkpoint} does not fit the recipe's model: {' '.join(str(error).split())[:400]}"
                ) from error
        self.model = ContrastiveModel(
            network,
            temperature=settings.temperature,
            pooling=settings.pooling,
            gather_negatives=settings.gather_negatives,
        )
        self.collator = PairCollator(self.tokenizer, settings.query_length, config.max_seq_len)
        self.pooling = settings.pooling
        self.tokenizer_name = str(config.tokenizer_name or settings.checkpoint)

    def record(self) -> dict[str, Any]:
        """What the checkpoint's record says of this task."""
        return {
            "tokenizer_fingerprint": fingerprint(self.tokenizer),
            "tokenizer_name": self.tokenizer_name,
            "pooling": self.pooling,
        }

    def data_spec(self, loader: LoaderConfig, device_batch: int, *, train: bool) -> DataSpec:
        """The loader of one split: `local`/`split`.jsonl."""
        path = Path(loader.dataset.local or "", f"{loader.dataset.split}.jsonl")
        return build_pair_loader(Pairs(path), loader, self.collator, device_batch_size=device_batch, train=train)

    def save_tokenizer(self, folder: Path) -> None:
        """Leave a copy of the tokenizer beside the checkpoints, in place of another one: of a run started over."""
        place = folder / "tokenizer"
        if place.exists():
            if fingerprint(load_tokenizer(str(place))) == fingerprint(self.tokenizer):
                return
            shutil.rmtree(place)
        temporary = folder / f".tokenizer-{os.getpid()}.tmp"
        self.tokenizer.save_pretrained(temporary)
        os.replace(temporary, place)


def whole_batches(config: TrainConfig, device_batch: int) -> TrainConfig:
    """The recipe with microbatches of the device's whole batch: smaller ones would take negatives away.

    Raises:
        RecipeError: it asks for smaller ones.
    """
    micro = config.device_train_microbatch_size
    if isinstance(micro, int) and micro < device_batch:
        raise RecipeError(
            f"device_train_microbatch_size {micro} would leave a query {micro - 1} negatives of the {device_batch - 1} "
            "of its batch: leave it at auto, and lower global_train_batch_size or max_seq_len where memory is short"
        )
    return dataclasses.replace(config, device_train_microbatch_size=device_batch)
