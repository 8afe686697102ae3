"""The paper's tables beside ours: `python -m bert.tables` prints them and writes Markdown, JSON and a picture."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert import published
from bert.errors import DataError, RecipeError
from bert.files import read_json, save_figure, write_json, write_text
from bert.glue.metrics import AVERAGES
from bert.glue.report import CONVENTIONS
from bert.provenance import provenance
from bert.published import Figure
from bert.recipe.dry_run import estimate
from bert.recipe.schema import RECIPE_FOLDER, load_config
from bert.text_tables import markdown, print_table

log = logging.getLogger(__name__)

MODELS = ("m2-base", "m2-base-960", "m2-large-260m", "m2-large-341m", "bert-base", "hf-bert-base")
IN_STUDY = " in study "  # between what was fine-tuned and the study that did
NO_FIGURE = Figure(None, "", confirmed=True)


@dataclass(frozen=True)
class Ours:
    """A figure of ours and what made it."""

    value: float
    command: str
    machine: str
    date: str


@dataclass(frozen=True)
class Line:
    """One figure: the paper's, ours and the difference."""

    row: str
    figure: str
    form: str  # how the value is written, a format specification
    paper: Figure
    ours: Ours | None
    relative: bool = True  # the difference as a share of the paper's figure

    @property
    def difference(self) -> str:
        """Ours less the paper's; empty where one is missing."""
        if self.ours is None or self.paper.value is None:
            return ""
        if self.relative:
            return f"{self.ours.value / self.paper.value - 1:+.1%}"
        return f"{self.ours.value - self.paper.value:+.2f}"

    def cells(self) -> list[str]:
        """The line as text."""
        paper = self.paper.source if self.paper.confirmed else "unconfirmed"
        if self.paper.value is not None:
            mark = "" if self.paper.confirmed else ", unconfirmed"
            paper = f"{self.paper.value:{self.form}} ({self.paper.source}{mark})"
        ours = self.ours
        text = "" if ours is None else f"{ours.value:{self.form}} (`{ours.command}`, {ours.machine}, {ours.date})"
        return [self.row, self.figure, paper, text, self.difference]

    def as_json(self) -> dict[str, Any]:
        """The line as plain values."""
        paper = {"value": self.paper.value, "source": self.paper.source, "confirmed": self.paper.confirmed}
        ours = None if self.ours is None else vars(self.ours)
        return {
            "row": self.row,
            "figure": self.figure,
            "paper": None if self.paper is NO_FIGURE else paper,
            "ours": ours,
            "difference": self.difference or None,
        }


@dataclass(frozen=True)
class PaperTable:
    """A table: its title, what to know before comparing, and its lines."""

    name: str
    title: str
    note: str
    lines: list[Line]


def models(here: Mapping[str, Any]) -> PaperTable:
    """Parameters and operations, computed exactly from the pretraining recipes."""
    lines = []
    for name in MODELS:
        size = estimate(load_config(RECIPE_FOLDER / f"{name}.yaml"))
        lines.append(Line(name, "parameters", ",.0f", published.PARAMETERS[name], _computed(size.parameters, here)))
        operations = _computed(size.forward_flops_per_token / 1e6, here)
        lines.append(Line(name, "forward pass, MFLOP a token", ",.1f", published.UNCONFIRMED, operations))
    note = (
        "At 128 tokens, a multiply-add counted as two, the head on masked tokens only. The published sizes are "
        "rounded; the model called 110M has 115.6M. `bert-base` is the paper's attention baseline (ALiBi)."
    )
    return PaperTable("models", "Parameters and operations", note, lines)


def glue(results: Path) -> PaperTable:
    """GLUE by task and average, each model in the convention that its published figure is in."""
    runs = _glue_runs(results)
    others = [name for name in runs if name not in published.GLUE_AVERAGE]
    lines = []
    for name in (*published.GLUE_AVERAGE, *others):
        study = runs[name].get("study") if name in runs else None
        # A study's sweep stands beside the published figures of the job that it starts from, where that is named as a
        # model of the paper's, else of its own recipe.
        known_as = (name,) if study is None else (study["start"], study["recipe"])
        recipe = next((known for known in known_as if known in published.GLUE_AVERAGE), name)
        convention, average = published.GLUE_AVERAGE.get(recipe, ("paper", NO_FIGURE))
        run = runs.get(name)
        found = run["averages"][convention] if run else {"average": None, "columns": {}}
        known = published.GLUE_COLUMNS.get(recipe, {})
        label = f"{name} ({convention})"
        for column in AVERAGES[convention]:
            paper = NO_FIGURE if recipe not in published.GLUE_AVERAGE else known.get(column, published.UNCONFIRMED)
            ours = _measured(run, found["columns"].get(column), 100)
            if name not in others or ours is not None:
                lines.append(Line(label, column, ".2f", paper, ours, relative=False))
        ours = _measured(run, found["average"], 100)
        if name not in others or ours is not None:
            lines.append(Line(label, "average", ".2f", average, ours, relative=False))
    note = (
        "Conventions: " + "; ".join(f"{name}: {text}" for name, text in CONVENTIONS.items()) + ". Ours are dev scores. "
        "Devlin's are test scores, so the paper's comparison of M2 (dev, 8 tasks) with BERT's 79.6 (test, 9 columns) "
        "is not of like with like."
    )
    return PaperTable("glue", "GLUE", note, lines)


def throughput(results: Path) -> PaperTable:
    """Tokens per millisecond of the forward pass by length."""
    path = results / "encoder_forward.json"
    measured = _speeds(path)
    lines = []
    for model in dict.fromkeys([*published.THROUGHPUT, *(model for model, _ in measured)]):
        known = published.THROUGHPUT.get(model, {})
        lengths = {*(length for other, length in measured if other == model), *(published.LENGTHS if known else ())}
        for length in sorted(lengths):
            paper = Figure(known[length], published.TOGETHER) if length in known else published.UNCONFIRMED
            if (model, length) == ("hf-bert-base", 8192):
                paper = published.OUT_OF_MEMORY
            if not known or length not in published.LENGTHS:
                paper = NO_FIGURE
            lines.append(Line(model, f"{length} tokens, tokens/ms", ",.1f", paper, measured.get((model, length))))
    note = (
        "The paper's were taken on an A100, of the encoder and the head for words, with a fused kernel that computes "
        "another network than the released one (another short filter, no backward pass); `bert-base` is there with "
        "FlashAttention. Ours are of embeddings and encoder, so that the difference is of devices and models too."
    )
    return PaperTable("throughput", "Throughput of the forward pass by length", note, lines)


def pretraining(results: Path, here: Mapping[str, Any]) -> PaperTable:
    """Steps and tokens by the recipes, and hours predicted from the measured speed of training."""
    speeds = _speeds(results / "training_step.json")
    lines = []
    for name in MODELS:
        config = load_config(RECIPE_FOLDER / f"{name}.yaml")
        size = estimate(config)
        tokens = size.tokens_per_step * size.steps
        lines.append(Line(name, "steps", ",.0f", published.STEPS, _computed(size.steps, here)))
        lines.append(Line(name, "tokens", ",.0f", published.TOKENS, _computed(tokens, here)))
        speed = speeds.get((name, config.max_seq_len))
        hours = None
        if speed is not None:
            seconds = tokens / (1000 * speed.value)
            hours = Ours(seconds / 3600, speed.command, f"predicted for one {speed.machine}", speed.date)
        paper = published.DEVICE_HOURS.get(name, published.UNCONFIRMED)
        lines.append(Line(name, "hours on one device", ",.1f", paper, hours))
    note = (
        "Hours are the tokens divided by the speed in `results/training_step.json`: the encoder forward and backward, "
        "without head, optimizer, evaluation, checkpoints and data, so a lower bound. The published number of tokens "
        "is of text, ours of positions in samples of 128."
    )
    return PaperTable("pretraining", "Cost of pretraining", note, lines)


def _computed(value: float, here: Mapping[str, Any]) -> Ours:
    return Ours(value, here["command"], "computed", here["date"])


def _measured(run: Mapping[str, Any] | None, value: float | None, factor: float) -> Ours | None:
    if run is None or value is None:
        return None
    devices = {job["device"] for task in run["tasks"].values() for point in task["points"] for job in point["jobs"]}
    machine = " and ".join(sorted(devices)) + (", jobs not done" if run["failed"] else "")
    return Ours(factor * value, run["command"], machine, run["date"])


def _glue_runs(results: Path) -> dict[str, dict[str, Any]]:
    """The sweeps' results by run_name; those of a study by what was fine-tuned: one recipe does that for all of it."""
    found: dict[Path, dict[str, Any]] = {}
    for path in sorted([*results.glob("glue*.json"), *results.glob("*/*.json")]):
        content = read_json(path)
        if isinstance(content, dict) and content.get("kind") == "glue":
            found[path] = content
    studies = [run["study"] for run in found.values() if run.get("study")]
    tuned = Counter((study["name"], study["start"] or study["recipe"]) for study in studies)
    runs: dict[str, dict[str, Any]] = {}
    for path, content in found.items():
        name, study = content["run_name"], content.get("study")
        if study is not None:
            start = study["start"] or study["recipe"]
            which = f" ({study['run']})" if tuned[study["name"], start] > 1 else ""
            name = f"{start}{which}{IN_STUDY}{study['name']}"
        if name in runs:
            raise DataError(f"{path}: another file here has the run_name '{name}' too: rename or remove one")
        runs[name] = content
    return runs


def _speeds(path: Path) -> dict[tuple[str, int], Ours]:
    """The rows of a benchmark of speed by model and length; none where it has not been run."""
    if not path.exists():
        log.warning("%s is not there: its column stays empty", path)
        return {}
    content = read_json(path)
    try:
        return {
            (row["model"], row["length"]): Ours(
                row["tokens_per_ms"], content["command"], content["device"], content["date"]
            )
            for row in content["rows"]
            if "error" not in row  # a model that ran out of memory, for one
        }
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no benchmark of speed: it lacks {error}") from error


def draw(table: PaperTable, path: Path) -> None:
    """Draw throughput against length, the paper's dashed."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 5), layout="constrained")
    axes = canvas.add_subplot(xlabel="tokens in a sequence", ylabel="tokens/ms", xscale="log", yscale="log")
    axes.set_title(table.title)
    for model in dict.fromkeys(line.row for line in table.lines):
        own = [(int(line.figure.split()[0]), line) for line in table.lines if line.row == model]
        paper = [(length, line.paper.value) for length, line in own if line.paper.value is not None]
        ours = [(length, line.ours.value) for length, line in own if line.ours is not None]
        color = None
        if ours:
            (drawn,) = axes.plot(*zip(*ours, strict=True), marker="o", label=f"{model}, ours")
            color = drawn.get_color()
        if paper:
            axes.plot(
                *zip(*paper, strict=True), marker="x", linestyle="--", color=color, label=f"{model}, published (A100)"
            )
    lengths = sorted({int(line.figure.split()[0]) for line in table.lines if line.paper.value or line.ours})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_yticks(ticks := [25, 50, 100, 200, 400, 800, 1600, 3200], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.autoscale()
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(canvas, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bert.tables", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder of results (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/tables"), help="folder to write (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    here = provenance(["-m", "bert.tables"])
    try:
        tables = [
            models(here),
            glue(arguments.results),
            throughput(arguments.results),
            pretraining(arguments.results, here),
        ]
        _write(arguments.out, tables, here)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _write(folder: Path, tables: Sequence[PaperTable], here: Mapping[str, Any]) -> None:
    text = ["# The published figures and ours\n\nMade by `make tables`.\n"]
    for table in tables:
        rows = [["", "figure", "published", "ours", "difference"], *(line.cells() for line in table.lines)]
        print(f"\n{table.title}\n{table.note}")  # noqa: T201
        print_table(rows)
        text.append(f"## {table.title}\n\n{table.note}\n\n{markdown(rows)}")
    content = {
        **here,
        "tables": {
            t.name: {"title": t.title, "note": t.note, "lines": [line.as_json() for line in t.lines]} for t in tables
        },
    }
    write_text(folder / "tables.md", "\n".join(text))
    write_json(folder / "tables.json", content)
    for table in tables:
        if table.name == "throughput":
            draw(table, folder / "throughput.png")
    print(f"\nwritten: {folder}/tables.md, tables.json, throughput.png")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
