"""Before a run starts: does its folder allow it, and is the checkpoint it starts from safe and its own?"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import format_name_with_dist, is_tar
from filelock import FileLock, Timeout
from torch import nn

from bert.errors import CheckpointError, RecipeError
from bert.files import is_remote
from bert.recipe.callbacks import RecipeRecord, check_record, differences
from bert.recipe.schema import TrainConfig, read_plain_yaml
from bert.safe_loading import check_sharded, is_torn, load_checkpoint_file

log = logging.getLogger(__name__)

LATEST = "latest-rank0.pt"  # the link that Composer moves after each checkpoint is written
_LOCK = ".lock"
_LOCK_SECONDS = 10.0  # for what is left of a job that is just being killed


def run_folder(config: TrainConfig) -> Path:
    """The local folder for logs, curves and the resolved recipe: save_folder, or runs/{run_name} where that is none."""
    folder = config.save_folder
    local = "runs/{run_name}" if folder is None or is_remote(folder) else folder
    return Path(format_name_with_dist(local, run_name=config.run_name))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep a run's folder to one job at a time, by a lock that ends with this process, however it ends.

    Raises:
        RecipeError: another job is training there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout:
        raise RecipeError(
            f"another process is training in {folder}: wait for it, stop it, or choose another run_name"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): do not start a second job there", folder, error)
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class StartingPoint:
    """A local checkpoint that a run starts from, and whether it takes over its weights only."""

    path: Path
    weights_only: bool


def starting_point(config: TrainConfig) -> StartingPoint | None:
    """What this run starts from; None for nothing, or for a checkpoint that Composer is going to download.

    Raises:
        RecipeError: load_path does not exist; the folder holds checkpoints and the recipe does not say whether to go
            on from them or to overwrite them.
    """
    start = None
    if config.load_path is not None and is_tar(config.load_path):
        raise CheckpointError(
            f"load_path: {config.load_path} is an archive, which Composer would unpack to wherever its names point: "
            "unpack it, and give the file"
        )
    if config.load_path is not None and not is_remote(config.load_path):
        path = Path(format_name_with_dist(config.load_path, run_name=config.run_name))
        if not path.exists():
            raise CheckpointError(f"load_path: {path} does not exist")
        start = StartingPoint(path.resolve(), config.load_weights_only)
    if config.save_folder is None or is_remote(config.save_folder):
        return start
    folder = run_folder(config)
    found = _checkpoints(folder)
    if config.autoresume:
        latest = folder / LATEST
        if latest.is_dir():  # sharded
            return StartingPoint(latest.resolve(), weights_only=False)
        whole = _newest_whole(latest, found)
        return StartingPoint(whole, weights_only=False) if whole else start
    if (
        found
        and not config.save_overwrite
        and (start is None or start.weights_only or start.path != found[-1].resolve())
    ):
        raise RecipeError(
            f"{folder} already holds checkpoints ({found[-1].name}): go on from the last with autoresume=true, start "
            "over with save_overwrite=true, or choose another run_name"
        )
    if found and (config.load_path is None or config.load_weights_only):
        log.warning("%s: starting over beside checkpoints (to %s); autoresume=true would go on", folder, found[-1].name)
    return start


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, by their batch."""
    return sorted(folder.glob("ep*-ba*-rank0.pt"), key=_batch)


def _batch(path: Path) -> int:
    return int(path.name.split("-")[1].removeprefix("ba"))


def _newest_whole(latest: Path, found: Sequence[Path]) -> Path | None:
    """Find the newest checkpoint that is not torn; None where there is none.

    Composer writes a checkpoint under its final name and moves its link afterwards, so a kill leaves a torn file, or a
    whole one that the link does not name yet. Newer than the link's is what is both further on and written later: a
    run that was started over (save_overwrite) may have left files that are further on, but older.
    """
    linked = latest.resolve() if latest.exists() else None
    candidates = sorted(found, key=lambda path: (path.stat().st_mtime_ns, _batch(path)))
    if linked is not None:
        newer = [path for path in candidates if _is_newer(path, linked)]
        older = [path for path in candidates if path not in newer and path.resolve() != linked]
        candidates = [*older, linked, *newer]
    torn = []
    for path in reversed(candidates):
        if is_torn(path):
            torn.append(path.name)
            continue
        if torn:
            log.warning("%s: torn by a kill, and skipped: %s; going on from %s", latest.parent, torn, path.name)
        return path.resolve()
    if torn:
        log.warning("%s holds no whole checkpoint, only torn ones (%s): starting over", latest.parent, torn)
    return None


def _is_newer(path: Path, linked: Path) -> bool:
    return (
        linked.name.startswith("ep")
        and path.stat().st_mtime_ns > linked.stat().st_mtime_ns
        and _batch(path) > _batch(linked)
    )


def point_latest_to(start: StartingPoint | None, config: TrainConfig) -> None:
    """Move Composer's link to the checkpoint that autoresume chose, where it names another or none.

    One rank a node calls it, before the trainer is built, which follows the link.
    """
    if not config.autoresume or config.save_folder is None or is_remote(config.save_folder):
        return
    latest = run_folder(config) / LATEST
    if latest.is_dir() or (start is not None and latest.exists() and latest.resolve() == start.path):
        return
    if start is None or start.path.parent != latest.parent.resolve():  # nothing here to go on from
        latest.unlink(missing_ok=True)
        return
    temporary = latest.with_name(f".{LATEST}.{os.getpid()}.tmp")
    temporary.symlink_to(start.path.name)
    os.replace(temporary, latest)


def check_checkpoint(start: StartingPoint, current: Mapping[str, Any], model: nn.Module | None = None) -> None:
    """Compare the record in a checkpoint with this run's, before Composer loads it; warn of other settings.

    Where only the weights are taken over, dropout and the like may differ; the tokenizer may not.

    Args:
        start: the checkpoint; of a folder (sharded FSDP) only what torch would unpickle is looked at.
        current: this run's record (see `RecipeRecord`).
        model: this run's; where only the weights are taken over, their shapes are compared with its own.

    Raises:
        CheckpointError: the file is unreadable, unsafe, or another model's or tokenizer's.
    """
    if start.path.is_dir():
        check_sharded(start.path)
        return
    content = load_checkpoint_file(start.path)
    try:
        stored = content["state"].get("callbacks", {}).get(RecipeRecord.__qualname__)
        if start.weights_only and model is not None:
            _check_shapes(start.path, content["state"].get("model") or {}, model)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{start.path} is not a Composer checkpoint: it has no training state") from error
    if stored is None:
        return
    try:
        record = json.loads(stored["record"])
        recipe = read_plain_yaml(record["recipe"])
        if not all(isinstance(part, dict) for part in (record.get("model"), record.get("data", {}), recipe)):
            raise ValueError("its model, its data or its recipe is no section")
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{start.path}: its record of what made it cannot be read ({error!r})") from error
    if start.weights_only:
        check_record({**record, "model": current["model"]}, current, str(start.path))
        return
    check_record(record, current, str(start.path))
    changes = differences(recipe, read_plain_yaml(current["recipe"]), "then", "now")
    if changes:
        log.warning(
            "going on from %s, which other settings made (the optimizer's own are kept as they were): %s",
            start.path,
            "; ".join(changes),
        )


def _check_shapes(path: Path, weights: Mapping[str, Any], model: nn.Module) -> None:
    """Raise CheckpointError where weights have other shapes than the model's; say what to do about another length."""
    own = {name: value.shape for name, value in model.state_dict().items()}
    given = {name.removeprefix("module."): value.shape for name, value in weights.items()}
    if lacking := sorted(own.keys() ^ given.keys()):
        where = [f"{name} ({'here' if name in own else 'there'} alone)" for name in lacking[:10]]
        raise CheckpointError(f"load_path: {path} holds another model:\n  " + "\n  ".join(where))
    differ = [name for name in own if given[name] != own[name]]
    if not differ:
        return
    tied = (".position_embeddings.weight", ".position_features", ".times")  # to the length: axis 0
    if all(name.endswith(tied) and given[name][1:] == own[name][1:] for name in differ):
        there, here = given[differ[0]][0], own[differ[0]][0]
        hint = (
            f"python -m bert.extend_context {path} {here} --out DIR makes it one" if there < here else "that is longer"
        )
        raise CheckpointError(
            f"load_path: {path} is a model for {there} tokens, the recipe's is for {here}: {hint}; or set "
            f"max_seq_len={there}"
        )
    shapes = "".join(f"\n  {name}: {tuple(given[name])} there, {tuple(own[name])} here" for name in differ[:10])
    raise CheckpointError(f"load_path: {path} holds another model:{shapes}")
