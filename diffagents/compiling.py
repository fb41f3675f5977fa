"""An update's loss and gradients as one compiled function: traced once, with every tensor it touches as an input.

The forward and the backward pass become a single graph, so that an activation's two passes over memory become one and
nothing is computed for networks that are frozen in the update. Optimiser steps stay outside: they are fused kernels already.
Random numbers come in as draws, so that the compiled function computes what the eager one does, to float tolerance.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffagents.engine import Draws, Gradients, Part
from diffagents.types import Batch, Metrics


class _Networks(nn.Module):
    """All networks under one roof, where `functional_call` can put other tensors in their parameters' places."""

    def __init__(self, networks: Mapping[str, nn.Module], part: Part) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.part = part

    def forward(self, batch: Batch, draws: Draws) -> tuple[tuple[Tensor, ...], Metrics]:
        assert self.part.loss is not None
        loss, metrics = self.part.loss(batch, draws)
        return (loss if isinstance(loss, tuple) else (loss,)), metrics


class CompiledGradients:
    """In the place of `Part.gradients`; compiled at its first call, for the shapes of that call.

    Where compiling fails (no C++ compiler, say) it warns, and goes on eagerly: `failed` tells.
    """

    def __init__(self, part: Part, networks: Mapping[str, nn.Module]) -> None:
        self.part, self.failed = part, False
        self._networks = _Networks(networks, part)
        self._function: Callable[..., Sequence[Tensor]] | None = None

    def __call__(self, batch: Batch, draws: Draws) -> tuple[Gradients, Metrics]:
        if self.failed or self.part.loss is None:
            return self.part.gradients(batch, draws)
        if self._function is None:
            try:
                self._compile(batch, draws)
            except Exception as error:  # whatever a compiler may say
                self.failed = True
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"compiling failed, training goes on eagerly ({type(error).__name__}: {reason})", stacklevel=2)
                return self.part.gradients(batch, draws)
        assert self._function is not None
        with torch.no_grad():
            out = self._function(*self._state, *pytree.tree_leaves((batch, draws)))
        found: tuple[Gradients, Metrics] = pytree.tree_unflatten(out, self._out)
        return found

    def _compile(self, batch: Batch, draws: Draws) -> None:
        from torch._inductor import compile as compile_graph

        graph, inputs = self.trace(batch, draws)
        function = compile_graph(graph, [*inputs])
        with torch.no_grad():
            function(*inputs)  # what is lazy in the compiler is over after this
        self._function = function

    def trace(self, batch: Batch, draws: Draws) -> tuple[torch.fx.GraphModule, list[Tensor]]:
        """The tensor operations of one update as a graph, and the tensors it takes: networks', batch's, draws'."""
        from torch.fx.experimental.proxy_tensor import make_fx

        trained = {id(p) for optimizer in self.part.optimizers for p in optimizer.parameters}
        named = {**dict(self._networks.named_parameters()), **dict(self._networks.named_buffers())}
        self._state = [tensor.detach() for tensor in named.values()]
        leaves, structure = pytree.tree_flatten((batch, draws))
        names = {id(tensor): name for name, tensor in named.items()}

        def update(*tensors: Tensor) -> list[Tensor]:
            given = dict(zip(named, tensors, strict=False))
            for name, tensor in named.items():
                if id(tensor) in trained:
                    given[name] = given[name].detach().requires_grad_(True)
            inside = pytree.tree_unflatten(tensors[len(named) :], structure)
            losses, metrics = torch.func.functional_call(self._networks, given, inside)
            found = [
                torch.autograd.grad(loss, [given[names[id(p)]] for p in optimizer.parameters], retain_graph=True)
                for loss, optimizer in zip(losses, self.part.optimizers, strict=True)
            ]
            out: list[Tensor]
            out, self._out = pytree.tree_flatten((found, metrics))
            return [tensor.detach() for tensor in out]

        inputs = [*self._state, *leaves]
        return make_fx(update)(*inputs), inputs


def gradient_functions(parts: Sequence[Part], networks: Mapping[str, nn.Module]) -> list[Any]:
    """A `CompiledGradients` for each part."""
    return [CompiledGradients(part, networks) for part in parts]
