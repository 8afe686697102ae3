"""The tables of a sweep: to the terminal, as Markdown, CSV and JSON, and the leaderboard's files."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import statistics
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bert.files import write_json, write_text
from bert.glue.job import FILES, TEST
from bert.glue.metrics import AVERAGES, average, columns
from bert.glue.schema import GlueConfig
from bert.glue.state import DONE, Job, best_job, best_point
from bert.provenance import provenance
from bert.text_tables import Rows, markdown, print_table

log = logging.getLogger(__name__)

CONVENTIONS = {
    "paper": "8 tasks, MRPC by F1 (the paper's code)",
    "mosaicbert": "8 tasks, MRPC by the mean of accuracy and F1 (MosaicBERT)",
    "devlin": "9 columns, MNLI-m and -mm apart, QQP and MRPC by F1 (Devlin et al.)",
}


def summarise(config: GlueConfig, jobs: Sequence[Job], command: Sequence[str]) -> dict[str, Any]:
    """Gather what the sweep found: per task and grid point over seeds, and the averages of the best points."""
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(job.plan.name for job in jobs):
        own = [job for job in jobs if job.plan.name == name]
        best = best_point(own)
        points = [_point([job for job in own if job.point == index]) for index in range(len(own[0].plan.points))]
        tasks[name] = {"best": best, "points": points}
    best_metrics = {
        name: {metric: values["mean"] for metric, values in task["points"][task["best"]]["metrics"].items()}
        for name, task in tasks.items()
        if task["best"] is not None
    }
    averages = {}
    for convention in AVERAGES:
        found = columns(convention, best_metrics)
        averages[convention] = {
            "average": average(convention, best_metrics),
            "columns": found,
            "missing": [column for column in AVERAGES[convention] if column not in found],
        }
    results = [job.result for job in jobs if job.result is not None]
    days = sorted(result["date"][:10] for result in results)
    made = provenance(command)
    if days:  # when the figures were made, not when they were last printed
        made["date"] = " to ".join(dict.fromkeys((days[0], days[-1])))
    return {
        "kind": "glue",
        "run_name": config.run_name,
        **made,
        "model": {"name": config.model.name, "config": config.model.config},
        "checkpoint": None if config.checkpoint is None else Path(config.checkpoint).name,
        "protocol": config.protocol,
        "split": "validation",
        "tasks": tasks,
        "averages": averages,
        "warnings": sorted({f"{result['task']}, {text}" for result in results for text in result["warnings"]}),
        "failed": [
            {"job": job.name, "task": job.plan.name, "seed": job.seed, "state": job.state, "reason": job.reason}
            for job in jobs
            if job.state != DONE
        ],
    }


def _point(jobs: Sequence[Job]) -> dict[str, Any]:
    results = [job.result for job in jobs if job.result is not None]
    names = list(results[0]["metrics"]) if results else []
    return {
        "point": jobs[0].plan.points[jobs[0].point][0],
        "seeds": [result["seed"] for result in results],
        "num_seeds": len(jobs),
        "score": _statistics([result["score"] for result in results]) if results else None,
        "metrics": {name: _statistics([result["metrics"][name] for result in results]) for name in names},
        "jobs": [
            {
                key: result[key]
                for key in ("key", "seed", "start_key", "steps", "samples_per_second", "seconds", "device", "date")
            }
            for result in results
        ],
    }


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def score_table(summary: Mapping[str, Any]) -> Rows:
    """A header, and a line a task and grid point, the best marked; in hundredths, mean ± deviation over seeds."""
    rows = [["task", "grid point", "seeds", "score", "metrics"]]
    for name, task in summary["tasks"].items():
        for index, point in enumerate(task["points"]):
            label = ", ".join(f"{key}={value}" for key, value in point["point"].items()) or "-"
            if index == task["best"] and len(task["points"]) > 1:
                label += " (best)"
            metrics = "; ".join(f"{metric} {_hundredths(values)}" for metric, values in point["metrics"].items())
            score = _hundredths(point["score"]) if point["score"] else "none done"
            rows.append([name, label, f"{len(point['seeds'])} of {point['num_seeds']}", score, metrics])
    return rows


def average_table(summary: Mapping[str, Any]) -> Rows:
    """A line a convention: the average, or what is missing for it."""
    rows = [["GLUE average", "", "columns"]]
    if not any(found["columns"] for found in summary["averages"].values()):
        return rows
    for convention, found in summary["averages"].items():
        value = "not defined" if found["average"] is None else f"{100 * found['average']:.2f}"
        cells = ", ".join(f"{column} {100 * score:.1f}" for column, score in found["columns"].items())
        missing = f" (not run: {', '.join(found['missing'])})" if found["missing"] else ""
        rows.append([CONVENTIONS[convention], value, cells + missing])
    return rows


def failure_table(summary: Mapping[str, Any]) -> Rows:
    """A line a job that is not done, with the reason; only a header where all are."""
    return [["not done", "state", "reason"]] + [
        [failed["job"], failed["state"], " ".join(failed["reason"].split())] for failed in summary["failed"]
    ]


def _hundredths(values: Mapping[str, Any]) -> str:
    text = f"{100 * values['mean']:.2f}"
    return text if values["std"] is None else f"{text} ± {100 * values['std']:.2f}"


def write(folder: Path, config: GlueConfig, summary: dict[str, Any], jobs: Sequence[Job]) -> None:
    """Print the tables and write results.md, .csv and .json, and with `test` the submission."""
    tables = [score_table(summary), *([averages] if len(averages := average_table(summary)) > 1 else [])]
    if summary["failed"]:
        tables.append(failure_table(summary))
    if summary["warnings"]:
        tables.append([["data"], *([text] for text in summary["warnings"])])
    for table in tables:
        print_table(table)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"# {config.run_name}: dev scores, in hundredths\n\n"
    write_text(folder / "results.md", title + "\n".join(markdown(table) for table in tables), shared=True)
    write_text(folder / "results.csv", _csv(summary), shared=True)
    write_json(folder / "results.json", summary, shared=True)
    if config.output is not None:
        write_json(Path(config.output), summary, shared=True)
    if config.test:
        _write_submission(folder / "submission", jobs)


def _csv(summary: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["task", "point", "best", "metric", "mean", "std", "seeds"])
    for name, task in summary["tasks"].items():
        for index, point in enumerate(task["points"]):
            metrics = {"score": point["score"], **point["metrics"]} if point["score"] else {}
            for metric, values in metrics.items():
                row = [name, json.dumps(point["point"]), index == task["best"], metric, values["mean"], values["std"]]
                writer.writerow([*row, len(values["values"])])
    for convention, found in summary["averages"].items():
        writer.writerow(["average", convention, "", "score", found["average"], "", ""])
    return text.getvalue()


def _write_submission(folder: Path, jobs: Sequence[Job]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    for name in dict.fromkeys(job.plan.name for job in jobs):
        best = best_job([job for job in jobs if job.plan.name == name])
        if best is None or best.spec is None:
            log.warning("submission: %s has no finished job", name)
            continue
        content = json.loads((best.spec.folder / FILES[TEST]).read_text(encoding="utf-8"))
        for file_name, values in content["predictions"].items():
            lines = [f"{index}\t{value}\n" for index, value in enumerate(values)]
            texts[f"{file_name}.tsv"] = "index\tprediction\n" + "".join(lines)
    temporary = folder / f".submission.{os.getpid()}.tmp"
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for file_name, text in sorted(texts.items()):
            write_text(folder / file_name, text, shared=True)
            archive.writestr(file_name, text)
    os.replace(temporary, folder / "submission.zip")
