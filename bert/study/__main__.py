"""Run a study, or what is missing of it: python -m bert.study yamls/studies/wikipedia.yaml [key=value ...]."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from bert.errors import RecipeError
from bert.study.runner import DONE, Study
from bert.study.schema import load_study
from bert.text_tables import print_table

NOT_DONE = 75  # exit code: stopped before the end (EX_TEMPFAIL of sysexits.h)
DESCRIPTION = """Run the jobs of a study that have no result yet, one on each GPU at a time, and write a JSON for each
into results/NAME, from which `make report` makes docs/results.md. The same command goes on where it stopped. The exit
code is 0 where every job is done, 1 where one failed, 2 for a mistake in the study, 75 where the time was over or a
signal came: running jobs have then saved a checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bert.study", description=DESCRIPTION)
    parser.add_argument("study", help="YAML, for example yamls/studies/wikipedia.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the YAML: set.max_duration=100ba")
    parser.add_argument("--only", nargs="+", metavar="JOB", help="these jobs in this order, each after what it needs")
    parser.add_argument("--minutes", type=float, help="stop after so long, with checkpoints")
    parser.add_argument("--slots", type=int, help="runs at a time (default: one on each GPU, or one)")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--list", action="store_true", help="print the runs and their state, and stop")
    arguments = parser.parse_intermixed_args(argv)  # changes may follow --only
    if arguments.slots is not None and arguments.slots < 1:
        parser.error("--slots: at least 1")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bert").setLevel("INFO")
    try:
        config = load_study(arguments.study, arguments.overrides)
        study = Study(config, only=arguments.only, slots=arguments.slots, commit_hash=arguments.commit)
        stopped = False
        if not arguments.list:
            stopped = study.work(None if arguments.minutes is None else 60 * arguments.minutes)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print_table(study.table())
    if stopped:
        return NOT_DONE
    return 0 if arguments.list or all(p.state == DONE for p in study.runs.values() if p.wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
