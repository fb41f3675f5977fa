"""Functions of networks, traced once and compiled, with every tensor that they use as an input.

The forward and the backward pass of an update become one graph, so that an activation needs one pass over memory instead of
two, and nothing is computed for networks that are frozen in the update. Optimiser steps stay outside, because they are fused
kernels already. Random numbers are inputs, so that the compiled function computes what the eager one does, to float tolerance.

torch.compile is not used, because checking its guards at each call takes longer than a small network. What replaces it, and
what happens in a version of torch without that, is described in diffagents/torch_internals.py.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffagents import torch_internals
from diffagents.training.updates import Gradients, Noise, Update
from diffagents.types import Batch, Metrics

NamedTensors = dict[str, Tensor]


class Networks(nn.Module):
    """Several networks as one module, so that `torch.func.functional_call` can replace their tensors while `function` runs.

    Args:
        networks: The networks by name; the names of their tensors begin with it.
        function: What a call of the module computes. It uses the networks, e.g. a method of their agent.
    """

    def __init__(self, networks: Mapping[str, nn.Module], function: Callable[..., Any]) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.function = function

    def forward(self, *args: Any) -> Any:
        """`function(*args)`."""
        return self.function(*args)

    def tensors(self) -> NamedTensors:
        """All parameters and buffers by name: detached, but sharing memory with the networks."""
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor.detach() for name, tensor in named.items()}


def gradient_program(
    update: Update, networks: Mapping[str, nn.Module]
) -> tuple[NamedTensors, Callable[[NamedTensors, Batch, Noise], tuple[Gradients, Metrics]]]:
    """`Update.gradients` as a function of the networks' tensors as well.

    Args:
        update: An update of these networks.
        networks: All networks of the agent, by name.

    Returns:
        The tensors of all networks; and the function (tensors, batch, noise) -> (gradients, metrics).
    """
    roof = Networks(networks, update.loss) if update.loss is not None else Networks({}, update.gradients)
    trained = trained_names(roof, update)

    def gradients(tensors: NamedTensors, batch: Batch, noise: Noise) -> tuple[Gradients, Metrics]:
        given = with_leaves(tensors, trained)
        loss, metrics = torch.func.functional_call(roof, given, (batch, noise))
        return gradients_of(loss if isinstance(loss, tuple) else (loss,), given, trained), metrics

    return roof.tensors(), gradients


def trained_names(roof: Networks, update: Update) -> list[list[str]]:
    """For each optimiser of the update, the names of its parameters in `roof`."""
    names = {id(parameter): name for name, parameter in roof.named_parameters()}
    return [[names[id(parameter)] for parameter in optimizer.parameters] for optimizer in update.optimizers]


def with_leaves(tensors: NamedTensors, trained: Sequence[Sequence[str]]) -> NamedTensors:
    """The same tensors, but those with a name in `trained` are new leaves of the autograd graph."""
    leaves = {name: tensors[name].detach().requires_grad_(True) for names in trained for name in names}
    return {**tensors, **leaves}


def gradients_of(losses: Sequence[Tensor], given: NamedTensors, trained: Sequence[Sequence[str]]) -> Gradients:
    """The gradients of each optimiser's loss.

    Args:
        losses: One scalar for each optimiser.
        given: What the losses were computed from, as `with_leaves` returned it.
        trained: For each optimiser, the names of its parameters.

    Returns:
        For each optimiser, one contiguous tensor for each of its parameters.
    """
    gradients = []
    for k, (loss, names) in enumerate(zip(losses, trained, strict=True)):
        some = torch.autograd.grad(loss, [given[name] for name in names], retain_graph=k < len(losses) - 1)
        gradients.append([gradient.contiguous() for gradient in some])  # as the parameters are
    return gradients


class Compiled:
    """A function of the networks' tensors, compiled at its first call for the shapes of that call.

    A call takes the arguments without the tensors, which are read again each time. If compilation fails, e.g. because there is
    no C++ compiler, it warns once, sets `failed` and calls `eager` from then on.

    Args:
        tensors: The tensors of the networks by name, sharing memory with the networks.
        program: The function (tensors, *args) -> nested tuples, lists and dicts of tensors, as the args are too.
        eager: The function (*args) that computes the same without compilation.
    """

    def __init__(self, tensors: NamedTensors, program: Callable[..., Any], eager: Callable[..., Any]) -> None:
        self.program, self.eager, self.failed = program, eager, False
        self._names, self._state = list(tensors), list(tensors.values())
        self._function: Callable[..., Sequence[Tensor]] | None = None

    def __call__(self, *args: Any) -> Any:
        """The output of `program` for the present values of the tensors, detached."""
        if not self.failed and self._function is None:
            try:
                self._compile(args)
            except Exception as error:  # a compiler may raise anything
                self.failed = True
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"compiling failed, so this runs eagerly ({type(error).__name__}: {reason})", stacklevel=2)
        if self._function is None:
            return self.eager(*args)
        with torch.no_grad():
            out = self._function(*self._state, *_leaves(args))
        return _rebuild(self._structure, iter(out))

    def _compile(self, args: tuple[Any, ...]) -> None:
        graph, inputs = self.trace(args)
        function = torch_internals.compile_graph(graph, inputs)
        with torch.no_grad():
            function(*inputs)  # parts of the compiler work lazily and are finished after this call
        self._function = function

    def trace(self, args: tuple[Any, ...]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
        """Trace the program.

        Args:
            args: As for a call; only their shapes matter.

        Returns:
            The program's tensor operations as a graph; and the graph's inputs: the tensors, then the tensors in `args`.
        """
        n = len(self._names)

        def flat(*given: Tensor) -> list[Tensor]:
            result = self.program(dict(zip(self._names, given[:n], strict=True)), *_rebuild(args, iter(given[n:])))
            out = [tensor.detach() for tensor in _leaves(result)]
            self._structure = _rebuild(result, iter([None] * len(out)))
            return out

        inputs = [*self._state, *_leaves(args)]
        return torch_internals.trace(flat, inputs), inputs


def _leaves(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if not isinstance(tree, tuple | list | dict):
        return [tree]
    return [leaf for branch in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(branch)]


def _rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """Nested tuples, lists and dicts like `tree`, with other leaves."""
    if isinstance(tree, dict):
        return {key: _rebuild(branch, leaves) for key, branch in tree.items()}
    if not isinstance(tree, tuple | list):
        return next(leaves)
    branches = [_rebuild(branch, leaves) for branch in tree]
    if isinstance(tree, list):
        return branches
    return tree._make(branches) if hasattr(tree, "_make") else tuple(branches)  # Batch is a NamedTuple


def compiled_gradients(
    update: Update, networks: Mapping[str, nn.Module]
) -> Callable[[Batch, Noise], tuple[Gradients, Metrics]]:
    """`update.gradients` as a compiled function; an update without a loss is returned unchanged.

    Args:
        update: An update of these networks.
        networks: All networks of the agent, by name.
    """
    return update.gradients if update.loss is None else Compiled(*gradient_program(update, networks), update.gradients)
