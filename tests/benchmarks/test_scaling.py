"""The scaling benchmark on the CPU, with the ranks' processes replaced by this one. No timings here."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--device", "cpu", "--small", "--no-compile"]


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("scaling")
    torch.set_num_threads(threads)


@pytest.fixture
def launches(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run in this process what one process a GPU would run; return the commands."""
    from bert.recipe.train import main as train_main

    variants = importlib.import_module("scaling_variants")
    commands: list[list[str]] = []

    def launch(command: Sequence[str], folder: Path, log: Path, timeout: float) -> str | None:
        commands.append(list(command))
        script, *arguments = command[5:]
        log.write_text("")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", [script, *arguments])
            if Path(script).name == "main.py":
                return None if train_main(arguments) == 0 else "ended with 2"
            variants.main()
        return None

    monkeypatch.setattr(scaling, "launch", launch)
    return commands


def run(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> dict:
    output, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    arguments = [*SMALL, *options, "--output", str(output), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    scaling.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(output.read_text())


def test_scaling_and_variants(
    scaling: ModuleType, launches: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ["default", "profile+composer-adamw+bf16-reduce"]
    figures = run(scaling, monkeypatch, tmp_path, "--gpus", "2,1", "--variants", ",".join(names))
    assert [[*command[3:5], Path(command[5]).name] for command in launches] == [
        ["-n", "1", "main.py"],
        ["-n", "2", "main.py"],
        ["-n", "2", "main.py"],
        ["-n", "2", "scaling_variants.py"],
    ]
    one, strong, weak, *variants = figures["rows"]
    assert not any("error" in row for row in figures["rows"])
    assert [(row["gpus"], row["batch"], row["steps"]) for row in (one, strong, weak)] == [
        (1, 8, 2),
        (2, 8, 4),
        (2, 16, 2),
    ]
    for row in figures["rows"]:
        assert len(row["batch_s"]) == row["steps"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 128 * row["steps"] / sum(row["batch_s"]))
        assert 0 < row["loader_wait_share"] < 1 and 3 < row["last_loss"] < 6
    for row in (one, strong, weak):
        assert row["efficiency"] == pytest.approx(row["tokens_per_s"] / row["gpus"] / one["tokens_per_s"])
    assert [row["variant"] for row in variants] == names
    default = variants[0]
    for row in variants:
        assert row["step_over_default"] == pytest.approx(row["step_ms"] / default["step_ms"])
        # The same training: what a variant changes is how, not what.
        assert row["last_loss"] == pytest.approx(default["last_loss"], abs=1e-4)
    assert figures["versions"]["torch"] and figures["date"] and figures["machine"]["cores"]


def test_what_failed_is_a_row_and_the_rest_goes_on(
    scaling: ModuleType, launches: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    from bert.recipe import builders

    variants = importlib.import_module("scaling_variants")

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(variants.VARIANTS, "overlap", variants.Variant("it fails", patches=fail))
    registry = dict(builders.REGISTRY["optimizer"])
    figures = run(scaling, monkeypatch, tmp_path, "--mode", "none", "--variants", "composer-adamw+overlap,default")
    failed, default = figures["rows"]
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory" and "tokens_per_s" not in failed
    assert "error" not in default and default["step_over_default"] == 1
    assert builders.REGISTRY["optimizer"] == registry  # nor does its patch stay
    assert "CUDA out of memory" in capsys.readouterr().out
    monkeypatch.setattr(scaling, "launch", lambda *_: "ended with its time limit of 1 s")
    with pytest.raises(SystemExit, match="every run failed"):
        run(scaling, monkeypatch, tmp_path, "--mode", "strong", "--gpus", "1", "--variants", "none")


def test_a_process_that_hangs_or_fails_is_ended(scaling: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    error = scaling.launch(["sh", "-c", "sleep 60 & echo $!; wait"], tmp_path, log, 1)
    assert error.startswith("ended with its time limit of 1 s")
    state = Path(f"/proc/{log.read_text().split()[0]}/stat")
    deadline = time.monotonic() + 20  # a killed process is there until the kernel comes to it
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert scaling.launch(["sh", "-c", "echo why; exit 4"], tmp_path, log, 60) == "ended with 4:\nwhy\n"
    assert scaling.launch(["true"], tmp_path, log, 60) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "defualt"], "'defualt' is none of default"),
        (["--variants", "default+nosuch"], "'nosuch' is none of"),
        (["--models", "m2"], "'m2' is none of"),
        (["--mode", "none", "--variants", "none"], "leave nothing to do"),
        (["--gpus", "3"], "does not divide by 3 GPUs"),
    ],
)
def test_mistakes_are_one_message(
    scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys, options: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", *SMALL, *options])
    with pytest.raises(SystemExit):
        scaling.arguments()
    assert message in capsys.readouterr().err


def test_the_time_of_kernels(scaling: ModuleType) -> None:
    variants = importlib.import_module("scaling_variants")
    cuda = torch.autograd.DeviceType.CUDA

    def event(name: str, start: float, end: float, device=cuda, annotation: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(start=1e3 * start, end=1e3 * end)
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotation)

    reduce = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    events = [
        event("gemm", 0, 4),
        event("add", 3, 6),  # on another stream
        event(reduce, 5, 9),  # 3 ms alone
        event("gemm", 10, 12),
        event(reduce, 11, 12),
        event("nccl:all_reduce", 5, 20, annotation=True),
        event("aten::mm", 0, 40, device=torch.autograd.DeviceType.CPU),
    ]
    kernels = variants.kernel_times(events, 14e-3, 2)
    assert (kernels.wall, kernels.compute, kernels.nccl) == pytest.approx((7, 4, 2.5))
    assert (kernels.nccl_exposed, kernels.idle) == pytest.approx((1.5, 1.5))
    assert kernels.by_name == {"ncclDevKernel_AllReduce_Sum_f32_RING_LL": pytest.approx([1, 2.5])}
    (gap,) = kernels.gaps  # from 9 to 10: what overlaps has none between
    assert (gap.ms, gap.at, gap.before) == (1, 9, "gemm")
    assert gap.after == "ncclDevKernel_AllReduce_Sum_f32_RING_LL"
    assert variants.kernel_times(events[-1:], 1.0, 1) is None
