"""A function of networks as one compiled function: traced once, with every tensor it touches as an input.

An update's forward and backward pass become a single graph, so that an activation's two passes over memory become one and
nothing is computed for networks that are frozen in the update. Optimiser steps stay outside: they are fused kernels already.
Random numbers come in as draws, so that the compiled function computes what the eager one does, to float tolerance.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffagents.training.updates import Gradients, Noise, Update
from diffagents.types import Batch, Metrics

NamedTensors = dict[str, Tensor]


class Networks(nn.Module):
    """Networks under one roof, where `functional_call` can put other tensors in the places of theirs while `function` runs."""

    def __init__(self, networks: Mapping[str, nn.Module], function: Callable[..., Any]) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)

    def tensors(self) -> NamedTensors:
        """All parameters and buffers, live, without gradients."""
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor.detach() for name, tensor in named.items()}


def gradient_program(
    update: Update, networks: Mapping[str, nn.Module]
) -> tuple[NamedTensors, Callable[[NamedTensors, Batch, Noise], tuple[Gradients, Metrics]]]:
    """`Update.gradients` as a function of the tensors of all networks too; and those tensors."""
    roof = Networks(networks, update.loss) if update.loss is not None else Networks({}, update.gradients)
    trained = trained_names(roof, update)

    def gradients(tensors: NamedTensors, batch: Batch, noise: Noise) -> tuple[Gradients, Metrics]:
        given = with_leaves(tensors, trained)
        loss, metrics = torch.func.functional_call(roof, given, (batch, noise))
        return gradients_of(loss if isinstance(loss, tuple) else (loss,), given, trained), metrics

    return roof.tensors(), gradients


def trained_names(roof: Networks, update: Update) -> list[list[str]]:
    """For each optimiser of the part, the names of its parameters under the roof."""
    names = {id(parameter): name for name, parameter in roof.named_parameters()}
    return [[names[id(parameter)] for parameter in optimizer.parameters] for optimizer in update.optimizers]


def with_leaves(tensors: NamedTensors, trained: Sequence[Sequence[str]]) -> NamedTensors:
    """The same tensors, those that are trained as new leaves of the autograd graph."""
    leaves = {name: tensors[name].detach().requires_grad_(True) for names in trained for name in names}
    return {**tensors, **leaves}


def gradients_of(losses: Sequence[Tensor], given: NamedTensors, trained: Sequence[Sequence[str]]) -> Gradients:
    """The gradient of each loss in the parameters of its optimiser."""
    found = []
    for k, (loss, names) in enumerate(zip(losses, trained, strict=True)):
        some = torch.autograd.grad(loss, [given[name] for name in names], retain_graph=k < len(losses) - 1)
        found.append([gradient.contiguous() for gradient in some])  # as the parameters are
    return found


class Compiled:
    """`program(tensors, *args)` compiled at its first call, for the shapes of that call; called with the args alone.

    tensors: live, read anew at each call. eager(*args) takes the program's place where compiling fails (no C++ compiler,
    say), after one warning: `failed` tells.
    """

    def __init__(self, tensors: NamedTensors, program: Callable[..., Any], eager: Callable[..., Any]) -> None:
        self.program, self.eager, self.failed = program, eager, False
        self._names, self._state = list(tensors), list(tensors.values())
        self._function: Callable[..., Sequence[Tensor]] | None = None

    def __call__(self, *args: Any) -> Any:
        if not self.failed and self._function is None:
            try:
                self._compile(args)
            except Exception as error:  # whatever a compiler may say
                self.failed = True
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"compiling failed, so this runs eagerly ({type(error).__name__}: {reason})", stacklevel=2)
        if self._function is None:
            return self.eager(*args)
        with torch.no_grad():
            out = self._function(*self._state, *pytree.tree_leaves(args))
        return pytree.tree_unflatten(out, self._structure)

    def _compile(self, args: tuple[Any, ...]) -> None:
        from torch._inductor import compile as compile_graph

        graph, inputs = self.trace(args)
        function = compile_graph(graph, [*inputs])
        with torch.no_grad():
            function(*inputs)  # what is lazy in the compiler is over after this
        self._function = function

    def trace(self, args: tuple[Any, ...]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
        """The program's tensor operations as a graph; and its inputs, the tensors and the leaves of `args`."""
        from torch.fx.experimental.proxy_tensor import make_fx

        leaves, structure = pytree.tree_flatten(args)

        def flat(*given: Tensor) -> list[Tensor]:
            n = len(self._names)
            result = self.program(dict(zip(self._names, given[:n], strict=True)), *pytree.tree_unflatten(given[n:], structure))
            out: list[Tensor]
            out, self._structure = pytree.tree_flatten(result)
            return [tensor.detach() for tensor in out]

        inputs = [*self._state, *leaves]
        return make_fx(flat)(*inputs), inputs


def compiled_gradients(
    update: Update, networks: Mapping[str, nn.Module]
) -> Callable[[Batch, Noise], tuple[Gradients, Metrics]]:
    """What takes the place of `part.gradients`."""
    return update.gradients if update.loss is None else Compiled(*gradient_program(update, networks), update.gradients)
