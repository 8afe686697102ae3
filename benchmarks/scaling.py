"""Data-parallel scaling of pretraining on the GPUs of one host, through the recipe's own command.

    python benchmarks/scaling.py --gpus 1,2,4 --output results/scaling.json --plot docs/figures/scaling.png

For each model, number of GPUs N and mode, `composer -n N main.py RECIPE` on shards of random tokens: strong scaling
with --batch samples a step in all, weak scaling with --batch on each GPU. Tokens/s, MFU (against the vendor's dense
bf16 peak) and the wait for the loader are those that the recipe logs, over batches that follow the warm-up; efficiency
is tokens/s over N times those of one GPU. Evaluation and checkpoints are off.

Then, at the largest N, one process a GPU that trains the --variants one after the other (`scaling_variants.py` says
what each changes). Two of them say what the reduction of gradients costs. "no-sync" leaves it out: the difference to
"default" is what the step pays. "profile" records kernels on rank 0: NCCL's time includes waiting for the slowest rank,
and its exposed part is the time in which nothing but NCCL ran. The JSON is written after every process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_common as common
import torch
import training_throughput as single
from machine import device_name, write_figures
from scaling_variants import VARIANTS, Job, parts
from synthetic_shards import VOCABULARY, write_shards

MODES = ("strong", "weak")
PROFILE = "profile"
DEFAULT_VARIANTS = ("default", "no-sync", "ddp", PROFILE)
RECIPES = common.REPOSITORY / "yamls" / "pretrain"


@dataclass(frozen=True)
class Run:
    """One measured training."""

    session: str  # scaling: a process of its own; variants: one after the other in one process
    model: str
    mode: str
    gpus: int
    variant: str
    batch: int  # samples a step, all GPUs together
    warm_up: int  # steps that do not count
    steps: int  # that do

    @property
    def samples(self) -> int:
        """Read by the run."""
        return self.batch * (self.warm_up + self.steps)


def main() -> None:
    args = arguments()
    if args.draw:
        rows = [row for path in args.draw for row in json.loads(path.read_text())["rows"]]
        if not any(row["session"] == "scaling" for row in rows):
            raise SystemExit("error: --draw needs outputs of scaling: these are of variants alone")
        draw(args.plot, rows)
        return
    runs, rows = planned(args), []
    print(f"{device_name()}, {args.batch:,} x {single.LENGTH} tokens, microbatches of at most {args.microbatch}")
    with tempfile.TemporaryDirectory(prefix="scaling_") as name:
        folder = Path(name)
        vocabulary = single.SMALL_VOCABULARY if args.small else VOCABULARY
        samples = max(run.samples for session in runs for run in session)
        write_shards(folder / "data" / "train", samples, single.LENGTH, vocabulary=vocabulary)
        for session in runs:
            for row in measure(args, session, folder):
                rows.append(row)
                compare(rows)
                print_row(row, first=len(rows) == 1)
            write(args, rows)
    if all("error" in row for row in rows):
        raise SystemExit("every run failed: see the errors above")


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--gpus", type=common.integers, default=[1, 2, 4], help="numbers of GPUs (default: 1,2,4)")
    parser.add_argument(
        "--mode",
        type=mode_names,
        default=list(MODES),
        help="strong,weak, one of them, or none for variants alone (default: both)",
    )
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    parser.add_argument("--models", type=choices(names), default=["m2-base"], help="recipes (default: m2-base)")
    parser.add_argument(
        "--variants",
        type=variant_names,
        default=list(DEFAULT_VARIANTS),
        help=f"at the largest N; + joins several, none for none; of {', '.join(VARIANTS)} "
        f"(default: {','.join(DEFAULT_VARIANTS)})",
    )
    parser.add_argument("--variant-mode", choices=MODES, default="strong", help="of them (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4096, help="samples a step (default: %(default)s)")
    parser.add_argument("--microbatch", type=int, default=512, help="samples a forward pass (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=16,
        help="that count, for --batch samples a GPU; more for less (default: %(default)s)",
    )
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a process (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="keep what the processes wrote in this folder")
    parser.add_argument(
        "--draw",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="draw earlier outputs to --plot, and run nothing: other options do not count",
    )
    parser.add_argument("overrides", nargs="*", help="further key=value for the recipes")
    args = parser.parse_args()
    if args.small:
        args.batch, args.microbatch, args.steps, args.warm_up = 8, 4, 2, 1
    if args.draw and not args.plot:
        parser.error("--draw needs --plot")
    if not args.mode and not args.variants:
        parser.error("--mode none and --variants none leave nothing to do")
    for gpus in args.gpus:
        if args.batch % gpus:
            parser.error(f"--batch {args.batch} does not divide by {gpus} GPUs")
    if args.device == "cuda" and max(args.gpus) > torch.cuda.device_count():
        parser.error(f"--gpus {max(args.gpus)}, but there are {torch.cuda.device_count()}")
    return args


def choices(known: Sequence[str]) -> Any:
    """Return a reader of lists such as strong,weak."""

    def read(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return text.split(",")

    return read


def mode_names(text: str) -> list[str]:
    """Read a list such as strong,weak; none for an empty one."""
    return [] if text == "none" else choices(MODES)(text)


def variant_names(text: str) -> list[str]:
    """Read a list such as default,overlap+bf16-reduce; none for an empty one."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        try:
            parts(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return names


def planned(args: argparse.Namespace) -> list[list[Run]]:
    """Return the runs, those of one process together."""
    sessions = []
    for model in args.models:

        def run(session: str, mode: str, gpus: int, variant: str, model: str = model) -> Run:
            batch = args.batch * (gpus if mode == "weak" else 1)
            steps = args.steps * (gpus if mode == "strong" else 1)  # as long as those of one GPU
            return Run(session, model, mode, gpus, variant, batch, args.warm_up, steps)

        for gpus in sorted(args.gpus):
            # On one GPU both modes are the same.
            sessions += [[run("scaling", mode, gpus, "default")] for mode in (args.mode if gpus > 1 else args.mode[:1])]
        if args.variants:
            sessions.append([run("variants", args.variant_mode, max(args.gpus), variant) for variant in args.variants])
    return sessions


def recipe_arguments(args: argparse.Namespace, run: Run, folder: Path, name: str) -> list[str]:
    """Return what the recipe's command is given for a run."""
    local = argparse.Namespace(**vars(args))
    local.model, local.batch, local.steps = run.model, run.batch, run.steps
    local.microbatch = min(args.microbatch, run.batch // run.gpus)
    recipe = str(single.recipe_path(local))
    own = [f"data_local={folder / 'data'}", f"run_name={name}", "progress_bar=false", "dist_timeout=120"]
    return [recipe, *own, *single.overrides(local)]


def measure(args: argparse.Namespace, session: Sequence[Run], folder: Path) -> Iterator[dict[str, Any]]:
    """Run a session in one process a GPU; yield a row for each of its runs."""
    names = [f"{run.session}-{run.model}-{run.mode}-{run.gpus}-{n}-{run.variant}" for n, run in enumerate(session)]
    command = [sys.executable, "-m", "composer.cli", "-n", str(session[0].gpus)]
    alone = session[0].session == "scaling"
    if alone:
        command += [str(common.REPOSITORY / "main.py"), *recipe_arguments(args, session[0], folder, names[0])]
    else:
        plan = [
            Job(
                run.variant.replace(f"{PROFILE}+", ""),
                recipe_arguments(args, run, folder, name),
                str(folder / f"{name}.json"),
                run.warm_up if PROFILE in run.variant.split("+") else None,
            )
            for run, name in zip(session, names, strict=True)
        ]
        (folder / "plan.json").write_text(json.dumps([asdict(job) for job in plan]))
        command += [str(Path(__file__).with_name("scaling_variants.py")), str(folder / "plan.json")]
    start = time.perf_counter()
    log = folder / f"{names[0]}.log"
    error = launch(command, folder, log, args.timeout)
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, args.logs)
    for run, name in zip(session, names, strict=True):
        row = asdict(run)
        if alone:
            row["process_s"] = time.perf_counter() - start
            row |= {"error": error} if error else {}
        else:
            result = folder / f"{name}.json"
            row |= json.loads(result.read_text()) if result.exists() else {"error": error or "it left no result"}
        if "error" not in row:
            metrics = single.read_metrics(folder / "runs" / name / "metrics.jsonl", run.batch, run.warm_up)
            row |= figures(
                metrics, run, single.training_flops(argparse.Namespace(**{**vars(args), "model": run.model}))
            )
        yield row


def figures(metrics: dict[str, Any], run: Run, flops: float) -> dict[str, Any]:
    """Return what follows from a run's log."""
    seconds, tokens = metrics["batch_s"], run.batch * single.LENGTH
    speed, peak = tokens * len(seconds) / sum(seconds), single.peak_flops()
    return {
        "tokens_per_s": speed,
        "step_ms": 1e3 * statistics.mean(seconds),
        "step_ms_median": 1e3 * statistics.median(seconds),
        "mfu": speed * flops / run.gpus / peak if peak else None,
        "loader_wait_share": sum(metrics["loader_wait_s"]) / sum(seconds),
        "peak_gb": metrics["peak_gb"],
        "last_loss": metrics["loss"][-1],
        "batch_s": seconds,
    }


def launch(command: Sequence[str], folder: Path, log: Path, timeout: float) -> str | None:
    """Run a command in `folder`; return None, or in words why it failed, with the end of its log."""
    # Absolute: the process starts in another folder.
    given = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    search = os.pathsep.join([str(common.REPOSITORY), str(common.REPOSITORY / "src"), *given])
    with log.open("w") as out:
        # A session of its own, so that the launcher's processes can be ended with it.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": search},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"its time limit of {timeout:g} s"
        finally:
            for signum in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
                if process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
    return None if code == 0 else f"ended with {code}:\n{log.read_text(errors='replace')[-3000:]}"


def compare(rows: list[dict[str, Any]]) -> None:
    """Add what a row is worth beside another: efficiency against one GPU, or a step's length against the default's."""
    measured = [row for row in rows if "error" not in row]
    for row in measured:
        beside = [other for other in measured if other["model"] == row["model"] and other["session"] == row["session"]]
        if row["session"] == "scaling":
            one = next((other for other in beside if other["gpus"] == 1), None)
            row["efficiency"] = row["tokens_per_s"] / row["gpus"] / one["tokens_per_s"] if one else None
        else:
            default = next((other for other in beside if other["variant"] == "default"), None)
            row["step_over_default"] = row["step_ms"] / default["step_ms"] if default else None


def print_row(row: dict[str, Any], first: bool) -> None:
    """Print a row of the table, with its head before the first."""
    if first:
        print(
            f"{'model':<14} {'mode':<6} {'GPUs':>4} {'variant':<24} {'tokens/s':>11} {'step ms':>8} {'MFU':>6} "
            f"{'effic.':>7} {'/default':>8} {'loader':>6} {'peak GB':>7} {'process s':>9}"
        )
    label = f"{row['model']:<14} {row['mode']:<6} {row['gpus']:>4} {row['variant']:<24}"
    if "error" in row:
        print(f"{label} {row['error']}", flush=True)
        return

    def share(key: str, digits: int = 1) -> str:
        return "" if row.get(key) is None else f"{row[key]:.{digits}%}"

    peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
    print(
        f"{label} {row['tokens_per_s']:>11,.0f} {row['step_ms']:>8.1f} {share('mfu'):>6} {share('efficiency'):>7} "
        f"{share('step_over_default'):>8} {share('loader_wait_share'):>6} {peak:>7} {row['process_s']:>9.0f}",
        flush=True,
    )
    if kernels := row.get("kernels"):
        parts_of_step = ", ".join(
            f"{name.replace('_', ' ')} {kernels[name]:.2f} ({kernels[name] / kernels['wall']:.1%})"
            for name in ("compute", "nccl", "nccl_exposed", "idle")
        )
        print(f"    ms of a step of {kernels['wall']:.1f} on rank 0: {parts_of_step}", flush=True)


def write(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON and plot, where they are asked for."""
    if args.output:
        figures = {"batch": args.batch, "microbatch": args.microbatch, "length": single.LENGTH}
        figures |= {"gpus_of_machine": torch.cuda.device_count(), "peak_flops_per_s": single.peak_flops()}
        figures["variants"] = {name: variant.shows for name, variant in VARIANTS.items()}
        write_figures(args.output, {**figures, "rows": rows})
    if args.plot:
        draw(args.plot, rows)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw efficiency against the number of GPUs, each beside the one GPU of its own run."""
    measured = [row for row in rows if row["session"] == "scaling" and row.get("efficiency") is not None]
    points: dict[str, set[tuple[float, float]]] = {}
    for row in measured:
        # On one GPU both modes are the same: it begins the line of each that was run on more.
        several = {other["mode"] for other in measured if other["model"] == row["model"] and other["gpus"] > 1}
        for mode in several if several and row["gpus"] == 1 else {row["mode"]}:
            points.setdefault(f"{row['model']}, {mode}", set()).add((row["gpus"], row["efficiency"]))
    lines = {name: sorted(line) for name, line in sorted(points.items())}
    lines["one GPU's speed each"] = [(gpus, 1.0) for gpus in sorted({row["gpus"] for row in measured})]
    common.draw_lines(
        path,
        lines,
        title="data-parallel pretraining: efficiency, each beside one GPU of its machine",
        x_label="GPUs",
        y_label="tokens/s over GPUs x those of one",
        log=False,
        dashed=["one GPU's speed each"],
    )


if __name__ == "__main__":
    main()
