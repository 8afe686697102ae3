"""What only a GPU shows: no waiting for the device, one compiled graph, mixed precision. Run with `make test-gpu`."""

import pytest
import torch

from bert.checkpoint import load_original
from bert.composer_models import MODELS, build_masked_lm
from tests.bert.test_composer_models import FIELDS, RATES
from tests.bert.test_modeling import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_batch(length=20, batch=8, rate=0.3):
    ids = torch.randint(1, 50, (batch, length))
    labels = torch.where(torch.rand(ids.shape) < rate, ids, -100)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def to_device(batch):
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize(("case", "task"), [("tiny_a", "mlm"), ("tiny_b", "classification")])
def test_golden_logits(goldens, case, task):
    config, tensors, weights = goldens(case)
    model = load_original(weights, config, task).cuda()
    logits = model(tensors["in.input_ids"].cuda(), tensors["in.attention_mask"].cuda()).logits.cpu()
    assert (logits - tensors["logits"]).abs().max() / tensors["logits"].abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_cpu_and_never_waits_for_the_device(name):
    model = build_masked_lm(name, {**FIELDS[name], "attention_probs_dropout_prob": 0.0}, **RATES)
    batch = make_batch()
    expected = model(batch)
    expected["loss"].backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.cuda()
    on_device = to_device(batch)
    model(on_device)["loss"].backward()  # the first call loads libraries, which waits
    model.zero_grad()
    torch.cuda.set_sync_debug_mode("default" if name == "hf_bert" else "error")
    try:
        outputs = model(on_device)
        outputs["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outputs["num_masked"].item() == (batch["labels"] != -100).sum()
    torch.testing.assert_close(outputs["loss"].cpu(), expected["loss"], rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip([p for p in model.parameters() if p.grad is not None], gradients, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_one_compiled_graph_for_all_batches(name, dtype):
    fields = {**FIELDS[name], "attention_probs_dropout_prob": 0.0}
    if name != "hf_bert":  # FlexAttention wants heads of at least 16
        fields |= {"hidden_size": 64, "num_attention_heads": 4, "initializer_range": 0.1}
    model = build_masked_lm(name, fields, **RATES).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cuda", dtype, enabled=dtype is not None):
        for _ in range(3):
            batch = to_device(make_batch())
            outputs = compiled(batch)
            outputs["loss"].backward()
            tolerance = 1e-4 if dtype is None else 2e-2
            torch.testing.assert_close(outputs["loss"], model(batch)["loss"], rtol=tolerance, atol=tolerance)
            assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
            model.zero_grad()


def test_long_sequences_run_in_mixed_precision():
    length = 4096
    fields = {**SMALL, "max_position_embeddings": length, "long_conv_l_max": length, "initializer_range": 0.1}
    model = build_masked_lm("m2_bert", fields, **RATES).cuda()
    batch = to_device(make_batch(length, batch=2))
    expected = model(batch)["loss"]
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(batch)["loss"]
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("frozen", [True, False])
def test_cuda_graphs_in_evaluation(length, frozen):
    fields = {**SMALL, "max_position_embeddings": length, "long_conv_l_max": length, "initializer_range": 0.1}
    model = build_masked_lm("m2_bert", fields, **RATES).model.cuda().eval().requires_grad_(not frozen)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    ids = torch.randint(1, 50, (4, 3, length), device="cuda")
    graph_of_hand = torch.cuda.CUDAGraph()
    static = ids[0].clone()
    with torch.no_grad():
        for batch in ids:
            torch.compiler.cudagraph_mark_step_begin()
            expected = model(batch).logits
            torch.testing.assert_close(compiled(batch).logits, expected, rtol=1e-4, atol=1e-4)
        with torch.cuda.graph(graph_of_hand):
            logits = model(static).logits
        if not frozen:  # a weight that may be trained may change under a graph
            for name, parameter in model.named_parameters():
                if "filter" in name:
                    parameter.mul_(1.1)
        expected = model(ids[1]).logits
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(ids[1]).logits, expected, rtol=1e-4, atol=1e-4)
        static.copy_(ids[1])
        graph_of_hand.replay()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
