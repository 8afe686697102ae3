"""Studies as a page: `python -m bert.report` makes docs/results.md and its pictures from the JSON files in results/."""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert import published
from bert.errors import DataError, RecipeError
from bert.files import read_json, save_figure, write_text
from bert.glue.metrics import columns
from bert.text_tables import Rows, markdown

log = logging.getLogger(__name__)

PAPER_DEVICES = 8
CONVENTION = "paper"  # of the columns of GLUE


@dataclass
class StudyResults:
    """The files of one study."""

    about: dict[str, Any]  # study.json
    folder: Path
    runs: list[dict[str, Any]] = field(default_factory=list)  # in the order of the study's jobs

    def of_kind(self, kind: str) -> Iterator[dict[str, Any]]:
        """Yield the results of a kind, those of searches apart."""
        for run in self.runs:
            if run["kind"] == kind and not (kind == "pretrain" and self._job(run).get("grid")):
                yield run

    def searches(self) -> dict[str, list[dict[str, Any]]]:
        """The runs of jobs with a grid, by job."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in self.runs:
            if run["kind"] == "pretrain" and self._job(run).get("grid"):
                found.setdefault(run["study"]["job"], []).append(run)
        return found

    def points(self, job: str) -> int:
        """The number of runs of a job with a grid."""
        config = self.about["jobs"][job]
        return math.prod(map(len, config["grid"].values())) * max(1, len(config.get("seeds") or []))

    def by_job(self) -> dict[str, list[dict[str, Any]]]:
        """The pretraining runs of each job that is no search: one for each seed."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in self.of_kind("pretrain"):
            found.setdefault(run["study"]["job"], []).append(run)
        return found

    def _job(self, run: Mapping[str, Any]) -> dict[str, Any]:
        return self.about["jobs"].get(run["study"]["job"], {})


def read_studies(results: Path) -> list[StudyResults]:
    """Read results/*/study.json and the results beside each.

    Raises:
        DataError: a file cannot be read, or is no result of a study.
    """
    studies = []
    for path in sorted(results.glob("*/study.json")):
        study = StudyResults(_read(path), path.parent)
        order = list(study.about["jobs"])
        found = []
        for file in sorted(path.parent.glob("*.json")):
            content = _read(file)
            if content.get("kind") == "study":
                continue
            if "study" not in content or "kind" not in content:
                raise DataError(f"{file} is no result of a study: it lacks 'kind' or 'study'")
            if content["study"]["job"] in order:
                found.append(content)
            else:
                log.warning("%s: the study has no job '%s' any more; left out", file, content["study"]["job"])
        study.runs = sorted(found, key=lambda run: (order.index(run["study"]["job"]), run["study"]["run"]))
        studies.append(study)
    return studies


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object")
    return content


def _spread(values: Sequence[float | None], form: str, factor: float = 1.0) -> str:
    known = [factor * value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):{form}}"
    return mean if len(known) < 2 else f"{mean} ± {statistics.stdev(known):{form}}"


def pretraining_table(study: StudyResults) -> Rows:
    """A header, and a line a job: mean ± standard deviation over its seeds."""
    head = ("run", "parameters", "learning rate", "seeds", "steps", "tokens", "loss", "accuracy", "tokens/s", "MFU")
    whole = f"the paper's {published.POSITIONS / 1e9:.1f} B tokens on {PAPER_DEVICES}"
    rows = [[*head, "minutes", whole]]
    by_outcome = [
        [run for run in runs if (run["study"]["outcome"] == "finished") is finished]
        for runs in study.by_job().values()
        for finished in (True, False)
    ]
    for runs in filter(None, by_outcome):  # what was cut off is no seed of what was not
        first = runs[0]
        job = first["study"]["job"]
        outcomes = {run["study"]["outcome"] for run in runs} - {"finished"}
        name = job + (f" ({', '.join(sorted(outcomes))})" if outcomes else "")
        speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
        hours = published.POSITIONS / (PAPER_DEVICES * statistics.fmean(speeds)) / 3600 if speeds else None
        on_gpu = any(run["mfu"] is not None for run in runs)
        rows.append(
            [
                name,
                f"{first['parameters']:,}",
                "" if first["lr"] is None else f"{float(first['lr']):g}",
                f"{len(runs)}",
                f"{first['steps']:,}",
                f"{first['tokens'] / 1e6:,.1f} M",
                _spread([run["evaluation_loss"] for run in runs], ".3f"),
                _spread([run["evaluation_accuracy"] for run in runs], ".1f", 100),
                _spread(speeds, ",.0f"),
                _spread([run["mfu"] for run in runs], ".1f", 100),
                _spread([run["minutes"] for run in runs], ".1f"),
                f"{hours:.1f} h" if hours is not None and on_gpu and first["max_seq_len"] == 128 else "",
            ]
        )
    return rows


def search_table(runs: Sequence[Mapping[str, Any]], points: int) -> Rows:
    """A header, and a line a grid point, the best marked; `points` is how many there are to be."""
    losses = [run["evaluation_loss"] for run in runs if run["study"]["outcome"] == "finished"]
    best = min((loss for loss in losses if loss is not None), default=None)
    rows = [["values", "steps", "evaluation loss"]]
    for run in runs:
        values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in run["study"]["point"].items())
        loss, outcome = run["evaluation_loss"], run["study"]["outcome"]
        text = "" if loss is None else f"{loss:.3f}"
        if outcome == "finished":
            if loss == best and points > 1:
                text += " (best)" if len(runs) >= points else " (best of those run)"
        else:
            text = outcome
        rows.append([values, f"{run['steps']:,}", text])
    return rows


def _published_form(run: Mapping[str, Any]) -> str:
    """The recipe of a pretraining run or, if that is one of ours, the published one of its form and nearest in size."""

    def distance(recipe: str) -> float:
        return abs((published.PARAMETERS[recipe].value or 0.0) - run["parameters"])

    recipe: str = run["study"]["recipe"]
    return min(published.SAME_FORM[recipe], key=distance) if recipe in published.SAME_FORM else recipe


def glue_table(study: StudyResults) -> Rows:
    """A header, a line a fine-tuning sweep, and under them the published figures of what they tuned, where known."""
    sweeps = list(study.of_kind("glue"))
    names = [*published.GLUE_COLUMNS["m2-base-960"]]
    rows = [["start", *names, "average of those run"]]
    for sweep in sweeps:
        points = {
            name: task["points"][task["best"]] for name, task in sweep["tasks"].items() if task["best"] is not None
        }
        means = {name: {m: v["mean"] for m, v in point["metrics"].items()} for name, point in points.items()}
        stds = {name: {m: v["std"] or 0.0 for m, v in point["metrics"].items()} for name, point in points.items()}
        found, spread = columns(CONVENTION, means), columns(CONVENTION, stds)
        cells = [f"{100 * found[name]:.1f} ± {100 * spread[name]:.1f}" if name in found else "" for name in names]
        average = f"{100 * statistics.fmean(found.values()):.1f} ({len(found)} of {len(names)})" if found else ""
        start, run = sweep["study"]["start"], sweep["study"]["run"]
        alone = sum(other["study"]["start"] == start for other in sweeps) == 1
        seed = sweep["study"].get("start_seed")
        label = (start if start and alone else run) + ("" if seed is None else f" (start's seed {seed})")
        rows.append([label, *cells, average])
    runs = study.by_job()
    recipes: list[str] = []
    for about in (sweep["study"] for sweep in sweeps):  # what a sweep was for, or the run that it started from
        recipes += [about["recipe"], *(_published_form(run) for run in runs.get(about["start"], ()))]
    for recipe in dict.fromkeys(recipes):
        if recipe not in published.GLUE_AVERAGE:
            continue
        convention, average_figure = published.GLUE_AVERAGE[recipe]
        known = published.GLUE_COLUMNS.get(recipe, {})
        cells = [
            "" if (figure := known.get(name)) is None or figure.value is None else f"{figure.value:.1f}"
            for name in names
        ]
        notes = [f"convention: {convention}"] if convention != CONVENTION else []
        notes += [] if all(figure.confirmed for figure in (average_figure, *known.values())) else ["second-hand"]
        label = f"published: {recipe}" + (f" ({', '.join(notes)})" if notes else "")
        rows.append([label, *cells, f"{average_figure.value} (8 of 8)"])
    return rows


def context_table(runs: Sequence[Mapping[str, Any]]) -> Rows:
    """A header, and a line a model: its loss by the context that it was given."""
    contexts = sorted({row["context"] for run in runs for row in run["rows"]})
    rows = [["start", *(f"{context:,} tokens" for context in contexts)]]
    for run in runs:
        for model in dict.fromkeys(row["model"] for row in run["rows"]):
            own = {row["context"]: row for row in run["rows"] if row["model"] == model}
            cells = [f"{own[c]['loss']:.3f} ± {own[c]['standard_error']:.3f}" if c in own else "" for c in contexts]
            rows.append([run["study"]["start"] or model, *cells])
    return rows


def fill_table(run: Mapping[str, Any]) -> Rows:
    """A header, and a line a sentence: the likeliest words."""
    rows = [["sentence", "likeliest"]]
    for entry in run["texts"]:
        masks = ["  ".join(f"{p['word']} {p['probability']:.2f}" for p in mask[:3]) for mask in entry["masks"]]
        rows.append([entry["text"], "; ".join(masks)])
    return rows


def draw_curves(study: StudyResults, path: Path) -> None:
    """Draw evaluation loss (training loss thin) against tokens, and against minutes at each run's median speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    colors: dict[str, Any] = {}
    for run in study.of_kind("pretrain"):
        job, speed = run["study"]["job"], run["tokens_per_second"]
        for axes, scale in ((by_tokens, 1e-6), (by_time, None if not speed else 1 / speed / 60)):
            if scale is None:
                continue
            curve, evaluation = run["train"], run["evaluation"]
            label = job if job not in colors or axes.get_legend_handles_labels()[1].count(job) == 0 else None
            (line,) = axes.plot(
                *([scale * t for t in evaluation["tokens"]], evaluation["loss"]),
                **{"marker": "o", "markersize": 3, "label": label, "color": colors.get(job)},
            )
            colors[job] = line.get_color()
            axes.plot(
                *([scale * t for t in curve["tokens"]], curve["loss"]), linewidth=0.5, alpha=0.35, color=colors[job]
            )
    by_tokens.set(xlabel="tokens (millions)", ylabel="cross entropy on masked tokens (nats)")
    by_time.set(xlabel="minutes of training at the run's median speed")
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.3)
    by_tokens.legend(title="evaluation (points); training (thin)")
    figure.suptitle(study.about["title"])
    save_figure(figure, path)


def _made_on(study: StudyResults) -> str:
    devices = sorted({run["device"] for run in study.runs if "device" in run})
    dates = sorted({run["date"] for run in study.runs if "date" in run})
    packages = [("torch", "torch"), ("mosaicml", "Composer"), ("transformers", "transformers")]
    found = []
    for package, name in packages:
        seen = sorted({run["versions"][package] for run in study.runs if run.get("versions", {}).get(package)})
        found += [f"{name} {' and '.join(seen)}"] if seen else []
    commits = sorted({run["study"]["commit"][:7] for run in study.runs if run["study"].get("commit")})
    parts = [", ".join(devices), " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "", ", ".join(found)]
    parts.append(f"commit {', '.join(commits)}" if commits else "")
    return "; ".join(part for part in parts if part)


def page_of(study: StudyResults, picture: str | None) -> str:
    """The section of one study, in Markdown."""
    parts = [f"## {study.about['title']}\n", f"Text: {study.about['data']}. {_made_on(study)}.\n"]
    reading = study.folder / "reading.md"
    if reading.exists():
        parts.append(reading.read_text(encoding="utf-8"))
    if study.by_job():
        note = (
            "Evaluation loss in nats on masked tokens, accuracy and MFU in percent; tokens/s is the median of the "
            "speed monitor's windows, minutes are those of training (compilation in them, evaluation not). Seeds: mean "
            "± standard deviation. The last column divides the paper's tokens by the speed of eight such GPUs, as if "
            "they scaled perfectly."
        )
        parts.append(f"### Pretraining\n\n{markdown(pretraining_table(study))}\n{note}\n")
    if picture is not None:
        parts.append(f"![loss curves]({picture})\n")
    for job, runs in study.searches().items():
        parts.append(f"### Search: {job}\n\n{markdown(search_table(runs, study.points(job)))}")
    if list(study.of_kind("glue")):
        note = (
            "Dev scores in hundredths, in the paper's convention: mean ± standard deviation over seeds at the best "
            "grid point; empty: not run here. The published models saw 36.7 B tokens of C4."
        )
        parts.append(f"### Fine-tuning\n\n{markdown(glue_table(study))}\n{note}\n")
    contexts = list(study.of_kind("context_loss"))
    if contexts:
        note = (
            "Loss (nats) on the same masked tokens, whatever context they were given; ± standard error over documents."
        )
        parts.append(f"### Context\n\n{markdown(context_table(contexts))}\n{note}\n")
    for run in study.of_kind("fill_mask"):
        parts.append(f"### Filled in by {run['study']['start'] or run['model']}\n\n{markdown(fill_table(run))}")
    commands = [
        ["run", "command"],
        *([run["study"]["run"], f"`{run['command']}`"] for run in study.runs if "command" in run),
    ]
    parts.append(
        f"### Commands\n\n`python -m bert.study yamls/studies/{study.about['name']}.yaml` makes all of it, "
        f"`--only JOB` a part. What it ran:\n\n{markdown(commands)}"
    )
    return "\n".join(parts)


def write_report(results: Path, out: Path) -> int:
    """Write the page and its pictures; return the number of studies on it."""
    studies = read_studies(results)
    head = "# Results on real text\n\nMade by `make report` from the files in `results/`.\n"
    pages = [head]
    for study in studies:
        picture = None
        if any(run["evaluation"]["loss"] for run in study.of_kind("pretrain")):
            picture = f"figures/{study.about['name']}_loss.png"
            draw_curves(study, out.parent / picture)
        pages.append(page_of(study, picture))
    if not studies:
        pages.append("No study has been run.\n")
    write_text(out, "\n".join(pages))
    return len(studies)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bert.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        number = write_report(arguments.results, arguments.out)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(f"{arguments.out}: {number} studies")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
