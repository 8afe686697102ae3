"""The whole training step through the recipe's own command, against the bare step of the same model.

    python benchmarks/training_throughput.py --microbatch 512 --output results/training_throughput.json

Two processes, one after the other. The bare step: the recipe's model, compiled, one fixed batch on the device in the
recipe's microbatches, forward, backward and optimizer. The recipe: `composer -n 1 main.py RECIPE` on shards of random
tokens, with its loader, masking, clipping, metrics, callbacks and loggers; evaluation and checkpoints are off. The
first batches, which compile, do not count. The recipe must reach 0.85 of the bare step's tokens/s. MFU counts the
operations that a step needs (`forward_flops_per_token` x 3) against the vendor's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_common as common
import torch
from composer.callbacks.speed_monitor import GPU_AVAILABLE_FLOPS
from machine import device_name, write_figures
from synthetic_shards import SPECIAL_IDS, VOCABULARY, write_shards

from bert.composer_models import forward_flops_per_token
from bert.recipe import builders
from bert.recipe.callbacks import GradientBuffers
from bert.recipe.schema import TrainConfig, load_config
from monarch_mixer.kernels import use_kernels

BAR = 0.85
LENGTH = 128
SMALL_VOCABULARY = 128


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", choices=["m2-base", "bert-base", "hf-bert-base"], default="m2-base", help="recipe")
    parser.add_argument("--batch", type=int, default=4096, help="samples a step (default: %(default)s)")
    parser.add_argument("--microbatch", type=int, default=512, help="samples a forward pass (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps that count (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="both sides without torch.compile")
    parser.add_argument("--part", choices=["both", "bare", "recipe"], default="both")
    parser.add_argument("overrides", nargs="*", help="further key=value for the recipe, for both sides")
    parser.add_argument("--bare-step-of", type=Path, help=argparse.SUPPRESS)  # what this script runs in a process
    args = parser.parse_args()
    if args.bare_step_of is not None:
        bare_step(args)
        return
    if args.small:
        args.batch, args.microbatch, args.steps, args.warm_up = 8, 4, 2, 1
    print(
        f"{device_name()}, {args.model}, {args.batch:,} x {LENGTH} tokens a step in microbatches of {args.microbatch}"
    )
    rows: dict[str, dict[str, Any]] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="training_throughput_") as folder:
        parts = {"bare": run_bare, "recipe": run_recipe}
        for name in parts if args.part == "both" else [args.part]:
            try:
                rows[name] = parts[name](args, Path(folder))
            except RuntimeError as error:  # the other part's figures are worth keeping
                failed = True
                print(error)
    report(args, rows)
    if failed:
        raise SystemExit(1)


def overrides(args: argparse.Namespace) -> list[str]:
    """Return what both sides change in the recipe."""
    changes = [
        f"max_seq_len={LENGTH}",
        f"global_train_batch_size={args.batch}",
        f"device_train_microbatch_size={args.microbatch}",
        f"compile={compilation(args)}",
        f"device={'gpu' if args.device == 'cuda' else args.device}",
        f"max_duration={args.warm_up + args.steps}ba",
        "eval_loader=null",
        "save_folder=null",
        "autoresume=false",
        "callbacks.speed_monitor.window_size=1",  # one figure a batch
    ]
    if args.small:
        sizes = {**common.SMALL, "vocab_size": SMALL_VOCABULARY}
        changes += [f"model.config.{key}={value}" for key, value in sizes.items()]
        changes.append("train_loader.num_workers=0")
    return [*changes, *args.overrides]


def compilation(args: argparse.Namespace) -> str:
    """Return the recipe's `compile`: on a GPU what auto is there."""
    if args.no_compile:
        return "false"
    return json.dumps(builders.COMPILE_ON_GPU) if args.device == "cuda" else "true"


def recipe_path(args: argparse.Namespace) -> Path:
    """Return the recipe's file."""
    return common.REPOSITORY / "yamls" / "pretrain" / f"{args.model}.yaml"


def run(command: list[str], folder: Path, log: str) -> float:
    """Run a command of this Python in `folder`; return its seconds.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    # Absolute: the process starts in another folder.
    given = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    search = os.pathsep.join([str(common.REPOSITORY), str(common.REPOSITORY / "src"), *given])
    start = time.perf_counter()
    with (folder / log).open("w") as out:
        code = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": search},
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{(folder / log).read_text()[-4000:]}")
    return time.perf_counter() - start


def run_bare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the bare step in its own process."""
    output = folder / "bare.json"
    # The command line again, with what `main` decided; the last of an option counts.
    settings = [f"--batch={args.batch}", f"--microbatch={args.microbatch}", f"--steps={args.steps}"]
    settings += [f"--warm-up={args.warm_up}", f"--bare-step-of={output}"]
    seconds = run([str(Path(__file__).resolve()), *sys.argv[1:], *settings], folder, "bare.log")
    return {**json.loads(output.read_text()), "process_s": seconds}


def run_recipe(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the recipe's command."""
    start = time.perf_counter()
    vocabulary = SMALL_VOCABULARY if args.small else VOCABULARY
    samples = args.batch * (args.warm_up + args.steps)
    write_shards(folder / "data" / "train", samples, LENGTH, vocabulary=vocabulary)
    shards_s = time.perf_counter() - start
    command = ["-m", "composer.cli", "-n", "1", str(common.REPOSITORY / "main.py"), str(recipe_path(args))]
    changes = [f"data_local={folder / 'data'}", *overrides(args)]
    seconds = run([*command, *changes], folder, "recipe.log")
    metrics = read_metrics(folder / "runs" / args.model / "metrics.jsonl", args.batch, args.warm_up)
    return {**metrics, "shards_s": shards_s, "process_s": seconds}


def read_metrics(path: Path, batch: int, warm_up: int) -> dict[str, Any]:
    """Read what a run logged of its batches of `batch` samples; the first `warm_up` do not count.

    Returns:
        "batch_s" and "loader_wait_s" of each counted batch, "loss" of every batch, "peak_gb" of rank 0 (None on a
        CPU), and "composer_mfu" of the last batch.
    """
    lines = [
        line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if line["event"] == "train"
    ]
    # The speed monitor's first figure is of the second batch: the first has no time before it.
    counted = lines[max(1, warm_up) :]
    peaks = [line[key] for line in lines for key in ("memory/peak_allocated_mem",) if key in line]
    return {
        "batch_s": [batch * LENGTH / line["throughput/tokens_per_sec"] for line in counted],
        "loader_wait_s": [line["time/loader_wait"] for line in counted],  # of paper.yaml's loader_monitor
        "peak_gb": max(peaks, default=None),
        "composer_mfu": lines[-1].get("throughput/device/mfu"),
        "loss": [line["loss/train/total"] for line in lines],
    }


def bare_step(args: argparse.Namespace) -> None:
    """Time the bare step; the process that `run_bare` starts."""
    device = torch.device(args.device)
    config = load_config(recipe_path(args), overrides(args))
    torch.manual_seed(config.seed)
    with use_kernels(config.kernels):
        times, first, peak = time_steps(config, args, device)
    args.bare_step_of.write_text(json.dumps({"batch_s": times, "first_step_s": first, "peak_gb": peak}))


def time_steps(
    config: TrainConfig, args: argparse.Namespace, device: torch.device
) -> tuple[list[float], float, float | None]:
    """Return the seconds of each counted step, those of the first, and the peak memory in GB."""
    model = builders.build_model(config).to(device).train()
    optimizer = builders.build_optimizer(config, model)
    compile_arguments = builders.compile_arguments(config)
    compiled: Any = model if compile_arguments is None else torch.compile(model, **compile_arguments)
    ids = common.random_ids(device, args.microbatch * LENGTH, LENGTH, model.model.config.vocab_size)
    masked = torch.rand(ids.shape, device=device) < config.train_loader.dataset.mlm_probability
    batch = {
        "input_ids": torch.where(masked, SPECIAL_IDS["mask"], ids),
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(masked, ids, -100),
    }
    # On a CPU Composer trains in fp32, whatever the recipe says.
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda" and config.precision == "amp_bf16"
    )
    count = args.batch // args.microbatch
    buffers = GradientBuffers() if builders.uses_cuda_graphs(config) else None  # as the recipe does

    def step() -> None:
        for _ in range(count):
            if buffers is not None:
                buffers.provide(model)
            with autocast:
                loss = compiled(batch)["loss"]
            (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    first = common.once(step, device)
    for _ in range(args.warm_up):
        step()
    peak = common.peak_gb(step, device)
    return [common.once(step, device) for _ in range(args.steps)], first, peak


def training_flops(args: argparse.Namespace) -> float:
    """Return the operations of a training step, per token."""
    config = load_config(recipe_path(args), overrides(args))
    with torch.device("meta"):
        return 3 * forward_flops_per_token(builders.build_model(config), LENGTH)


def peak_flops() -> float | None:
    """Return the vendor's dense bf16 peak of this machine's GPU, in operations a second; None where it is not known."""
    name = device_name().lower()
    return next((GPU_AVAILABLE_FLOPS[f"{card}-sxm"]["amp_bf16"] for card in ("h100", "h200") if card in name), None)


def report(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Add what follows from the times; print and write all."""
    flops, peak_rate = training_flops(args), peak_flops()
    tokens = args.batch * LENGTH
    print(f"{'':<8} {'tokens/s':>10} {'least':>10} {'most':>10} {'MFU':>6} {'peak GB':>8} {'process s':>9}")
    for part, row in rows.items():
        row["tokens_per_s"] = tokens * len(row["batch_s"]) / sum(row["batch_s"])
        row["tokens_per_s_min"], row["tokens_per_s_max"] = tokens / max(row["batch_s"]), tokens / min(row["batch_s"])
        row["mfu"] = row["tokens_per_s"] * flops / peak_rate if peak_rate else None
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
        print(
            f"{part:<8} {row['tokens_per_s']:>10,.0f} {row['tokens_per_s_min']:>10,.0f} "
            f"{row['tokens_per_s_max']:>10,.0f} {mfu:>6} {peak:>8} {row['process_s']:>9.0f}"
        )
    ratio = None
    if len(rows) == 2:
        ratio = rows["recipe"]["tokens_per_s"] / rows["bare"]["tokens_per_s"]
        print(f"recipe / bare step: {ratio:.2f} (must: {BAR})")
    if args.output:
        figures = {"model": args.model, "batch": args.batch, "microbatch": args.microbatch, "length": LENGTH}
        figures |= {"training_flops_per_token": flops, "peak_flops_per_s": peak_rate, "ratio": ratio, "bar": BAR}
        write_figures(args.output, {**figures, "rows": rows})
    if args.plot:
        lines = {part: [(n, tokens / s) for n, s in enumerate(row["batch_s"], 1)] for part, row in rows.items()}
        title = f"{args.model}, training step, {device_name()}"
        common.draw_lines(args.plot, lines, title=title, x_label="counted step", y_label="tokens / s", log=False)


if __name__ == "__main__":
    main()
