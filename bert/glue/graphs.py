"""Training steps as CUDA graphs: the host starts one for the forward pass and one for the backward pass.

A step of fine-tuning is small: starting its kernels one by one takes longer than they do.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertForSequenceClassification

from bert.glue.schema import Settings
from bert.modeling import M2BertForSequenceClassification
from bert.recipe.builders import active

log = logging.getLogger(__name__)

EAGER_STEPS = 2  # of a shape before it is captured: one that comes so seldom is not worth it (an epoch's last batch)
MEMORY_MARGIN = 2  # times the gradients that a shape keeps, to be free for it
HARMLESS_ALGORITHMS = {"gradient_clipping"}  # others may replace weights, which a captured graph would not see

Pass = Callable[..., Tensor]  # the model's inputs to its logits


def graphs_apply(model: nn.Module, settings: Settings) -> bool:
    """Say whether a model's training steps on a GPU can be captured.

    Other models of Hugging Face's may ask the device something on the way. With several microbatches a step gradients
    would be added to what the next replay overwrites.
    """
    whole = settings.microbatch_size is None or settings.microbatch_size >= settings.batch_size
    plain = not settings.compile and set(active(settings.algorithms)) <= HARMLESS_ALGORITHMS
    hooked = "activation_monitor" in active(settings.callbacks)  # what it hooks into would run in a capture alone
    known = isinstance(model, M2BertForSequenceClassification | BertForSequenceClassification)
    return known and whole and plain and not hooked


class TrainingGraphs:
    """A classifier's forward pass in training, with its backward pass, captured once for each shape of a batch.

    Inputs are copied to where the graph reads them, dropout draws anew in every replay, and gradients are those of the
    kernels that were captured. Each shape keeps memory for a gradient of every parameter.

    Args:
        model: what is captured; its weights must stay where they are in memory.
        names: of the inputs that it is given.
        capture: how, or None where the memory is short; tests without a GPU have their own.

    Raises:
        RuntimeError: a capture failed.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        capture: Callable[[_Pass, tuple[Tensor, ...]], Pass | None] | None = None,
    ) -> None:
        self._pass = _Pass(model, names)
        self._names = list(names)
        self._capture = _Capture() if capture is None else capture
        self._seen: collections.Counter[tuple[torch.Size, ...]] = collections.Counter()
        self._graphs: dict[tuple[torch.Size, ...], Pass] = {}
        self._refused = False

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (batch, labels) of a batch, to go backward from before the next call."""
        inputs = tuple(batch[name] for name in self._names)
        shape = tuple(tensor.shape for tensor in inputs)
        if shape not in self._graphs and not self._refused:
            self._seen[shape] += 1
            if self._seen[shape] > EAGER_STEPS:
                self._add(shape, inputs)
        return self._graphs.get(shape, self._pass)(*inputs)

    def _add(self, shape: tuple[torch.Size, ...], inputs: tuple[Tensor, ...]) -> None:
        try:
            graph = self._capture(self._pass, inputs)
        except RuntimeError as error:
            # No falling back: PyTorch's generator may be left as if a capture went on, and dropout would fail.
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"a training step could not be captured, set cuda_graphs=false: {reason}") from error
        if graph is None:
            self._refused = True
            log.warning("further shapes are trained without CUDA graphs, which is slower: the GPU's memory is short")
        else:
            self._graphs[shape] = graph


class _Pass:
    """A model as a function of tensors alone, with its own weights or others in their place."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, names
        # Hugging Face's BERT looks on the host whether a mask of tokens has padding, and never into one of pairs.
        self.mask_pairs = isinstance(model, BertForSequenceClassification)

    def __call__(self, *inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        if self.mask_pairs and "attention_mask" in named:
            mask = named["attention_mask"]
            named["attention_mask"] = mask[:, None, :].expand(-1, mask.shape[1], -1)
        outputs = self.model(**named) if weights is None else functional_call(self.model, dict(weights), (), named)
        logits: Tensor = outputs.logits
        return logits


class _Capture:
    """Captures passes into one memory pool: one is over, with its backward pass, before the next begins.

    As `torch.cuda.make_graphed_callables`, but that gradients are taken of tensors of its own on the weights' memory:
    as long as an earlier step's outputs live (Composer keeps them), autograd keeps the weights' own accumulation nodes,
    which belong to the default stream, and a capture may not wait for that.
    """

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None

    def __call__(self, run: _Pass, inputs: tuple[Tensor, ...]) -> Pass | None:
        if not _fits(run.model):
            return None
        places = tuple(tensor.clone() for tensor in inputs)
        weights = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in weights.items()}
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        # Weights that autocast keeps in half precision would be the capture's for ever.
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):  # libraries make what they need at their first use
                outputs = run(*places, weights=leaves)
                torch.autograd.grad(outputs, [*leaves.values()], torch.zeros_like(outputs), allow_unused=True)
                del outputs
            torch.cuda.synchronize()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(forward, pool=self._pool):
                outputs = run(*places, weights=leaves)
            grad = torch.zeros_like(outputs)
            with torch.cuda.graph(backward, pool=self._pool):
                gradients = _distinct(torch.autograd.grad(outputs, [*leaves.values()], grad, allow_unused=True))
        return _replayed(forward, backward, places, outputs.detach(), grad, gradients, tuple(weights.values()))


def _distinct(gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Copy those that are another's memory, as of weights that are added: what scales one must not scale both."""
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for gradient in gradients:
        again = gradient is not None and gradient.data_ptr() in seen
        found.append(gradient.clone() if again and gradient is not None else gradient)
        if gradient is not None:
            seen.add(gradient.data_ptr())
    return tuple(found)


def _fits(model: nn.Module) -> bool:
    """Say whether one more shape's gradients fit into the GPU's memory; activations take what eager steps had."""
    free, _ = torch.cuda.mem_get_info()
    wanted = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return free > MEMORY_MARGIN * wanted


def _replayed(
    forward_graph: torch.cuda.CUDAGraph,
    backward_graph: torch.cuda.CUDAGraph,
    places: tuple[Tensor, ...],
    outputs: Tensor,
    grad: Tensor,
    gradients: tuple[Tensor | None, ...],
    weights: tuple[Tensor, ...],
) -> Pass:
    """Return the function that replays two graphs, the second one in the backward pass.

    Args:
        forward_graph: from `places` to `outputs`.
        backward_graph: from `grad`, that of the outputs, to `gradients`.
        places: of the inputs.
        outputs: where replays leave them.
        grad: in the outputs' shape.
        gradients: of the weights; None where the outputs do not depend on one.
        weights: what autograd is to see as the function's inputs.
    """

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Tensor) -> Tensor:
            for place, tensor in zip(places, given[: len(places)], strict=True):
                place.copy_(tensor)
            forward_graph.replay()
            return outputs.detach()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
            grad.copy_(given)
            backward_graph.replay()
            # New tensors on the same memory, which autograd takes for `.grad` without a copy.
            return (None,) * len(places) + tuple(None if each is None else each.detach() for each in gradients)

    def replay(*inputs: Tensor) -> Tensor:
        return cast(Tensor, Replay.apply(*inputs, *weights))

    return replay
