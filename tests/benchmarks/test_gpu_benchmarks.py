"""Each GPU benchmark in a tiny form on the CPU: it runs, and its JSON holds what the record needs. No timings here."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from monarch_mixer.kernels import support
from monarch_mixer.kernels.monarch_fft_tables import block_for

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

RATES = {"train_mask_rate": 0.3, "eval_mask_rate": 0.15}

Run = Callable[..., dict]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a function that runs a benchmark in this process, tiny, and gives its JSON."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("gpu_common"), "ROUNDS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run_benchmark(name: str, *options: str) -> dict:
        output, picture = tmp_path / "figures.json", tmp_path / "figures.png"
        common = ["--device", "cpu", "--small", "--output", str(output), "--plot", str(picture)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, *common])
        importlib.import_module(name).main()
        assert picture.read_bytes().startswith(b"\x89PNG")
        figures = json.loads(output.read_text())
        assert figures["command"].startswith(f"python {name}.py")
        assert figures["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert figures["device"] and figures["date"] and figures["machine"]["cores"]
        return figures

    yield run_benchmark
    torch.set_num_threads(threads)


def is_time(row: dict) -> bool:
    return 0 < row["ms_min"] <= row["ms_max"] and row["ms"] > 0


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_encoder(run: Run, mode: str) -> None:
    models = "m2-base,m2-base-masked,hf-bert-base,bert-base,m2-fft-reference"
    lengths = (16, 24) if mode == "forward" else (24,)
    options = ("--models", models, "--lengths", ",".join(map(str, lengths)), "--seconds", "0.01")
    figures = run("gpu_encoder", "--mode", mode, "--no-compile", *options)
    assert figures["mode"] == mode
    rows = {(row["length"], row["model"]): row for row in figures["rows"]}
    assert list(rows) == [(length, model) for length in lengths for model in models.split(",")]
    for (length, _), row in rows.items():
        assert is_time(row)
        tokens = 64 // length * length  # whole sequences
        assert row["tokens_per_ms"] == pytest.approx(tokens / row["ms"])
        assert row["ratio_to_hf"] == pytest.approx(row["tokens_per_ms"] / rows[length, "hf-bert-base"]["tokens_per_ms"])
        assert row["first_call_s"] > 0 and row["peak_gb"] is None


def test_a_model_that_fails_is_a_row_with_its_error(run: Run, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    common = importlib.import_module("gpu_common")
    build = common.build_encoder

    def fail_for_bert(name: str, *arguments: object, **named: object) -> object:
        if name == "hf-bert-base":
            raise torch.OutOfMemoryError("CUDA out of memory.\nand more lines")
        return build(name, *arguments, **named)

    monkeypatch.setattr(common, "build_encoder", fail_for_bert)
    figures = run(
        "gpu_encoder", "--no-compile", "--models", "m2-base,hf-bert-base", "--lengths", "16", "--seconds", "0"
    )
    ours, failed = figures["rows"]
    assert is_time(ours) and ours["ratio_to_hf"] is None
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory." and failed["ratio_to_hf"] is None
    assert "OutOfMemoryError: CUDA out of memory." in capsys.readouterr().out


def test_a_further_run_goes_beside_an_earlier_one(run: Run) -> None:
    options = ["--no-compile", "--models", "hf-bert-base", "--seconds", "0"]
    [first] = run("gpu_encoder", *options, "--lengths", "16")["rows"]
    rows = run("gpu_encoder", *options, "--lengths", "8,24", "--append")["rows"]
    assert [row["length"] for row in rows] == [8, 16, 24] and rows[1] == first
    with pytest.raises(SystemExit, match="its mode is forward, this run's training"):
        run("gpu_encoder", *options, "--mode", "training", "--lengths", "32", "--append")


def test_kernels_are_off_for_the_reference_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from bert.modeling import M2BertModel
    from monarch_mixer.kernels import kernels_enabled

    common = importlib.import_module("gpu_common")
    seen = []
    forward = common.Encoder.forward

    def watched(self: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        seen.append((isinstance(self.model, M2BertModel), kernels_enabled(), torch.is_autocast_enabled("cpu")))
        return forward(self, ids)

    monkeypatch.setattr(common.Encoder, "forward", watched)
    run("gpu_encoder", "--no-compile", "--models", "m2-fft-reference", "--lengths", "16", "--seconds", "0")
    assert set(seen) == {(True, False, True)}
    seen.clear()
    run("gpu_encoder", "--no-compile", "--models", "m2-base", "--lengths", "16", "--seconds", "0")
    assert set(seen) == {(True, True, True)}


def test_encoders_are_those_of_the_recipes(run: Run) -> None:
    common = importlib.import_module("gpu_common")
    with torch.device("meta"):
        for name, head in (("m2-base", 80_267_328), ("bert-base", 109_088_832), ("hf-bert-base", 109_514_298)):
            encoder = common.build_encoder(name, 128)
            config = encoder.model.config
            # The prediction head: a dense layer, a LayerNorm, a bias a word.
            size = config.hidden_size
            rest = size * size + size + 2 * size + config.vocab_size
            assert sum(p.numel() for p in encoder.parameters()) == head - rest
        longer = common.build_encoder("hf-bert-base", 8192, dropout=0.0).model.config
    assert longer.max_position_embeddings == 8192
    assert longer._attn_implementation == "sdpa"
    assert longer.hidden_dropout_prob == longer.attention_probs_dropout_prob == 0.0


def test_long_convolution(run: Run) -> None:
    figures = run("gpu_long_convolution", "--lengths", "16,31", "--seconds", "0.01")
    assert [row["length"] for row in figures["rows"]] == [16, 31]
    for row in figures["rows"]:
        assert is_time(row["ours"]) and is_time(row["fft"]) and is_time(row["copy"])
        assert 0 < row["error"] < 1e-2  # of bf16's rounding of the output
        assert row["first_call_s"] > 0


def test_latency(run: Run) -> None:
    figures = run("gpu_latency", "--modes", "eager", "--lengths", "16,32", "--seconds", "0.01")
    assert [(row["length"], row["model"]) for row in figures["best"]] == [
        (length, model) for length in (16, 32) for model in ("m2-base", "hf-bert-base")
    ]
    assert all(is_time(row) and row["ms_p95"] >= row["ms"] and row["mode"] == "eager" for row in figures["rows"])
    assert [row["hf_over_it"] for row in figures["best"] if row["model"] == "hf-bert-base"] == [1.0, 1.0]


def test_latency_takes_the_better_mode(run: Run) -> None:
    rows = [
        {"length": 8, "model": "m2-base", "mode": "default", "ms": 2.0},
        {"length": 8, "model": "m2-base", "mode": "reduce-overhead", "ms": 1.0},
        {"length": 8, "model": "hf-bert-base", "mode": "default", "ms": 3.0},
        {"length": 8, "model": "hf-bert-base", "mode": "reduce-overhead", "error": "it failed"},
    ]
    best = importlib.import_module("gpu_latency").best_rows(rows)
    assert [(row["model"], row["mode"], row["hf_over_it"]) for row in best] == [
        ("m2-base", "reduce-overhead", 3.0),
        ("hf-bert-base", "default", 1.0),
    ]


def test_loss_curves(run: Run) -> None:
    figures = run("kernels_loss_curve")
    assert list(figures["curves"]) == ["kernels, bf16", "PyTorch, bf16", "PyTorch, fp32"]
    assert all(len(curve) == figures["steps"] == 4 for curve in figures["curves"].values())
    assert all(abs(curve[0] - math.log(4096)) < 0.5 for curve in figures["curves"].values())
    # Without a GPU the kernels do not run, so the first two are one.
    assert figures["curves"]["kernels, bf16"] == figures["curves"]["PyTorch, bf16"]
    assert figures["curves"]["PyTorch, fp32"] != figures["curves"]["PyTorch, bf16"]
    assert figures["largest_difference"]["kernels, bf16 - PyTorch, bf16"]["nats"] == 0


def test_the_largest_difference_finds_a_nan(run: Run) -> None:
    largest_difference = importlib.import_module("kernels_loss_curve").largest_difference
    assert largest_difference([1.0, 2.0, 3.0], [1.0, 4.0, 2.5]) == (2.0, 2)
    difference, step = largest_difference([1.0, 9.0, math.nan], [1.0, 2.0, 3.0])
    assert math.isnan(difference) and step == 3


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_profile(run: Run, mode: str) -> None:
    figures = run("kernel_profile", "--mode", mode, "--no-compile", "--length", "32", "--calls", "1")
    assert figures["ceilings"]["copy_bytes_per_s"] > 0 and figures["ceilings"]["matmul_flops_per_s"] > 0
    parts = {part["name"]: part for part in figures["parts"]}
    passes = 3 if mode == "training" else 1
    tokens, width, layers = 64, 32, 2
    assert parts["input projection"]["flops"] == passes * layers * 2 * tokens * 3 * width**2
    assert parts["output projection"]["num_bytes"] == passes * layers * 2 * (2 * tokens * width + width**2)
    assert sum(row["share"] for row in figures["rows"]) == pytest.approx(1)
    product = next(
        row for row in figures["rows"] if row["name"] == f"aten::addmm {tokens}x{width} @ {width}x{3 * width}"
    )
    assert product["calls"] == layers and product["floor_ms"] > 0


def test_kernels_of_a_gpu_are_counted_once(run: Run) -> None:
    profile = importlib.import_module("kernel_profile")
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def on_cpu(name: str, kernels: dict[str, float], parent: object = None, shapes: object = ()) -> SimpleNamespace:
        started = [SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels.items()]
        return SimpleNamespace(name=name, device_type=cpu, kernels=started, cpu_parent=parent, input_shapes=shapes)

    def on_gpu(name: str, us: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=cuda, device_time=us, is_user_annotation=annotation)

    mlp = on_cpu("monarch_mixer::gated_mlp", {"_activate_kernel": 40.0})
    events = [
        on_cpu("aten::addmm", {"gemm": 70.0, "reduce": 30.0}, shapes=[[64], [64, 32], [32, 96], [], []]),
        on_cpu("aten::add", {"add": 5.0}),
        mlp,
        on_cpu("aten::bmm", {"gemm": 20.0}, parent=mlp, shapes=[[4, 64, 8], [4, 8, 16], [4, 64, 16]]),
        on_gpu("graph", 200.0, annotation=True),
        on_gpu("gemm", 70.0),
        on_gpu("reduce", 30.0),
        on_gpu("add", 5.0),
        on_gpu("_activate_kernel", 40.0),
        on_gpu("gemm", 20.0),
        on_gpu("gemm", 10.0),
    ]
    times = profile.kernel_times(events, torch.device("cuda"))
    product = "aten::addmm 64x32 @ 32x96"
    assert times == {
        ("gemm", product, ""): [100.0],
        ("_activate_kernel", "", "monarch_mixer::gated_mlp"): [40.0],
        ("gemm", "aten::bmm 4x64x8 @ 4x8x16", "monarch_mixer::gated_mlp"): [20.0],
        ("gemm", "", ""): [10.0],
        ("add", "", ""): [5.0],
    }
    ceilings = importlib.import_module("gpu_common").Ceilings(1e9, 1e9)
    floor = 1e3 * max(2 * (64 * 32 + 32 * 96 + 64 * 96) / 1e9, 2 * 64 * 32 * 96 / 1e9)
    assert profile.product_floor(product, ceilings) == pytest.approx(floor)
    rows = profile.kernel_rows(times, 1, ceilings)
    assert [(row["ms"], row["part"]) for row in rows[:3]] == [(0.1, None), (0.04, "gated MLP"), (0.02, "gated MLP")]
    assert rows[2]["name"] == "monarch_mixer::gated_mlp  aten::bmm 4x64x8 @ 4x8x16  gemm"
    [part] = profile.part_rows(rows, [profile.Part("gated MLP", 1.0, 1.0, "")], ceilings)
    assert part["ms"] == pytest.approx(0.06)


def test_floors_agree_with_the_count_of_operations(run: Run) -> None:
    from bert.composer_models import build_masked_lm, forward_flops_per_token

    common, profile = importlib.import_module("gpu_common"), importlib.import_module("kernel_profile")
    with torch.device("meta"):
        config = common.build_encoder("m2-base", 8192).model.config
        model = build_masked_lm("m2_bert", {"vocab_size": config.vocab_size}, **RATES)  # its defaults are M2-BERT-base
    parts = {part.name: part.flops for part in profile.model_parts(config, 1, 8192, "forward")}
    head = 2 * 768 * (768 + config.vocab_size)
    encoder = forward_flops_per_token(model, 8192) - RATES["train_mask_rate"] * head
    gates_and_norm = 12 * 768 * (3 + 8)  # which the other count leaves out
    assert sum(parts.values()) == pytest.approx(encoder + gates_and_norm)


@pytest.mark.slow
def test_training_throughput(run: Run) -> None:
    figures = run("training_throughput", "--no-compile", "--part", "recipe", "kernels=false")
    assert list(figures["rows"]) == ["recipe"] and figures["ratio"] is None
    row = figures["rows"]["recipe"]
    assert len(row["batch_s"]) == 2 and row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]
    assert all(3 < loss < 6 for loss in row["loss"])


def test_synthetic_shards_are_what_the_loader_reads(run: Run, tmp_path: Path) -> None:
    from bert.data.loader_config import DatasetConfig, LoaderConfig
    from bert.data.shared_memory import clean_stale_shared_memory
    from bert.data.streaming_text import build_data_spec

    importlib.import_module("synthetic_shards").write_shards(tmp_path / "train", 6, 16)
    clean_stale_shared_memory()
    config = LoaderConfig(DatasetConfig(local=str(tmp_path), split="train", mlm_probability=0.3), num_workers=0)
    spec = build_data_spec(config, device_batch_size=2, max_seq_len=16, seed=1, train=True)
    batches = list(spec.dataloader)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 16)] * 3
    assert all((batch["input_ids"][:, 0] == 101).all() for batch in batches)


def test_kernel_accuracy(run: Run) -> None:
    rows = run("kernel_accuracy", "--lengths", "16")["rows"]
    assert [(row["part"], row["precision"]) for row in rows] == [
        (part, precision)
        for part in ("sequence mixer", "dimension mixer")
        for precision in ("fp32", "tf32", "bf16", "fp16")
    ]
    for row in rows:
        half = row["precision"] in ("bf16", "fp16")
        assert 0 < row["gradient"] < (2e-2 if half else 1e-5)
        assert row["gradient"] == max(row["gradients"].values()) == row["gradients"][row["worst_gradient"]]


def test_padding_exactness(run: Run) -> None:
    rows = run("padding_exactness", "--models", "m2-base,hf-bert-base")["rows"]
    assert [(row["model"], row["length"]) for row in rows] == [
        (model, length) for length in (16, 80) for model in ("m2-base", "hf-bert-base")
    ]
    for row in rows:
        assert 0 < row["all"] < 1e-5 and 0 < row["gradient"] < 1e-5
        assert 0 <= row["output"] < 1e-5
        assert "." in row["of"]


def test_padding_exactness_by_the_blocks_of_the_transforms(run: Run) -> None:
    options = ("--lengths", "16", "--blocks", "512,2048", "--tokens", "32")
    rows = run("padding_exactness", "--models", "m2-base,bert-base", *options)["rows"]
    assert [(row["model"], row["block"]) for row in rows] == [("m2-base", 512), ("m2-base", 2048), ("bert-base", None)]
    benchmark = importlib.import_module("padding_exactness")
    for block in (256, 2048):
        with benchmark.largest_block(block):
            assert block_for(5000, torch.float32) == block
    assert block_for(5000, torch.float32) == support.LARGEST_EXACT_BLOCK == 1024
    with pytest.raises(SystemExit):
        run("padding_exactness", "--blocks", "4096")
    assert all(row["ms"] > 0 and row["ms_unmasked"] > 0 for row in rows)


def test_padding_exactness_sees_padding_that_is_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    common = importlib.import_module("gpu_common")
    build = common.build_encoder

    def as_published(*arguments: object, **options: object) -> object:
        encoder = build(*arguments, **options)
        encoder.model.config.mask_padding = False
        return encoder

    monkeypatch.setattr(common, "build_encoder", as_published)
    (row,) = run("padding_exactness", "--models", "m2-base", "--lengths", "16", "--checkpointing")["rows"]
    assert row["output"] > 1e-2
    assert row["all"] > 1e-2
