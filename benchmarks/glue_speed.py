"""Samples a second in fine-tuning and evaluation, M2-BERT-base against HF BERT-base, through the real sweep.

Weights are drawn at random, which does not change the speed. M2 is padded to 128 tokens, as it must be; BERT is padded
to the longest text of a batch of like lengths, as it may be. A job's first step is not counted, nor its first
evaluation, in the middle of training: they also pay for what is made once. On a GPU the capture of CUDA graphs, one
for each shape of a batch, is counted: give it steps enough, or cuda_graphs=false.

    python benchmarks/glue_speed.py --data FOLDER_OF_GLUE_TSV --tokenizer vocab.txt --output results/glue_speed.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import write_figures

ROOT = Path(__file__).parents[1]
RECIPES = ("m2-base", "hf-bert-base")
TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of GLUE's TSV files")
    parser.add_argument("--tokenizer", default="bert-base-uncased", help="name or vocab.txt (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="default: the five smaller ones")
    parser.add_argument("--steps", type=int, default=100, help="training steps a task at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument(
        "overrides", nargs="*", help="key=value for both recipes, such as compile=true or precision=fp32"
    )
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        sweeps = {name: sweep(name, arguments, Path(folder)) for name in RECIPES}
    rows = [row(task, {name: found["tasks"][task] for name, (found, _) in sweeps.items()}) for task in arguments.tasks]
    heads = [f"{name}, {part}" for part in ("train", "eval") for name in (*RECIPES, "ratio")]
    print(f"{'samples/s':<10}" + "".join(f"{head:>22}" for head in heads))
    for line in rows:
        values = [line[part][name] for part in ("train", "eval") for name in (*RECIPES, "ratio")]
        print(f"{line['task']:<10}" + "".join(f"{value:>22.2f}" for value in values))
    for name, (_, seconds) in sweeps.items():
        outside = max(line["seconds_outside_steps"][name] for line in rows)
        print(f"{name}: {seconds:.0f} s in all; a job's time outside its steps: {outside:.1f} s at most")
    if arguments.output:
        (device,) = {line["device"] for line in rows}
        write_figures(
            arguments.output,
            {
                "device": device,
                "steps": arguments.steps,
                "overrides": arguments.overrides,
                "seconds_in_all": {name: seconds for name, (_, seconds) in sweeps.items()},
                "rows": rows,
            },
        )


def sweep(name: str, arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], float]:
    """Run glue.py; return its results.json and the seconds it took."""
    keys = [
        f"run_name={name}",
        f"folder={folder / name}",
        f"cache={folder / 'cache'}",
        f"data={arguments.data}",
        f"tokenizer_name={arguments.tokenizer}",
        f"only=[{','.join(arguments.tasks)}]",
        f"max_duration={arguments.steps}ba",
        f"eval_interval={max(1, arguments.steps // 2)}ba",
        "num_slots=1",
        "grid.optimizer.lr=null",
        *(f"tasks.{task}.seeds=[19]" for task in arguments.tasks),
        *(f"tasks.{task}.start_from=null" for task in arguments.tasks),
        *arguments.overrides,
    ]
    command = [sys.executable, str(ROOT / "glue.py"), str(ROOT / "yamls/finetune-glue" / f"{name}.yaml"), *keys]
    begin = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begin
    return json.loads((folder / name / "results.json").read_text(encoding="utf-8")), seconds


def row(task: str, found: dict[str, Any]) -> dict[str, Any]:
    jobs = {name: entry["points"][0]["jobs"][0] for name, entry in found.items()}
    line: dict[str, Any] = {"task": task, "device": jobs[RECIPES[0]]["device"]}
    for part in ("train", "eval"):
        speeds = {name: job["samples_per_second"][part] for name, job in jobs.items()}
        line[part] = {**speeds, "ratio": speeds[RECIPES[0]] / speeds[RECIPES[1]]}
    line["seconds_outside_steps"] = {
        name: job["seconds"]["total"] - job["seconds"]["training"] - job["seconds"]["evaluation"]
        for name, job in jobs.items()
    }
    line["steps"] = {name: job["steps"] for name, job in jobs.items()}
    return line


if __name__ == "__main__":
    main()
