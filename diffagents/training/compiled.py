"""Functions of networks, traced once and compiled, with every tensor that they use as an input.

The forward and the backward pass of an update become one graph, so that an activation needs one pass over memory instead of
two, and nothing is computed for networks that are frozen in the update. Optimiser steps stay outside, because they are fused
kernels already. Random numbers are inputs, so that the compiled function computes what the eager one does, to float tolerance.

torch.compile is not used, because checking its guards at each call takes longer than a small network. What replaces it, and
what happens in a version of torch without that, is described in diffagents/torch_internals.py.

Compiling runs in a thread of its own. The calling thread waits for it, so that it can print how long it has waited, notice
Ctrl-C, and give up.
"""

import atexit
import ctypes
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffagents import torch_internals
from diffagents.training.cuda_graph import GraphRunner
from diffagents.training.monitor import clock, say
from diffagents.training.updates import Gradients, Noise, Runner, Update
from diffagents.types import Batch, Metrics

NamedTensors = dict[str, Tensor]
COMPILE_LIMIT = 300.0
"""Seconds that compiling the updates of a stage, or a policy, may take; then they run eagerly."""
REPORT_EVERY = 5.0
"""Seconds between two lines about compiling."""


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


class Interrupted(Exception):
    """Ctrl-C ended the wait for a compiler."""


class TookTooLong(Exception):
    """A compiler was not ready within the limit."""


class _Abandoned(BaseException):
    """Raised inside a compilation that nobody waits for any more; compilers do not catch it, as they may an Exception."""


class Patience:
    """How long to wait for compilers, and what to print meanwhile.

    Args:
        limit: Seconds from now, for all compilations together. Default: COMPILE_LIMIT.
        report: Called every REPORT_EVERY seconds, by the waiting thread, with the seconds since the beginning. None: silence.
        interrupted: Ends the wait when it is set.
    """

    def __init__(
        self,
        limit: float | None = None,
        report: Callable[[float], None] | None = None,
        interrupted: threading.Event | None = None,
    ) -> None:
        self.limit = COMPILE_LIMIT if limit is None else limit
        self.report, self.interrupted = report, interrupted
        self.started = self._reported = time.monotonic()

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.started

    def wait_for(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, which runs in another thread, after all that were abandoned.

        Nothing else may run in this thread meanwhile, so `call` may read what the caller will change later. If the wait ends
        early, what `call` computes is discarded; it must not change anything.

        Raises:
            TookTooLong: The limit is over.
            Interrupted: `interrupted` was set.
        """
        results: list[Any] = []
        errors: list[BaseException] = []
        ended, grad_enabled = threading.Event(), torch.is_grad_enabled()

        def work() -> None:
            try:
                with _one_at_a_time, torch.set_grad_enabled(grad_enabled):
                    results.append(call())
            except BaseException as error:
                errors.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=work, name="diffagents-compile", daemon=True)
        thread.start()
        try:
            while not ended.wait(0.05):
                self.check()
        finally:  # also after KeyboardInterrupt
            if not ended.is_set():
                _abandon(thread)
        if errors:
            raise errors[0]
        return results[0]

    def check(self) -> None:
        """Print if it is time to. Raises what `wait_for` raises if the wait is over."""
        if self.interrupted is not None and self.interrupted.is_set():
            raise Interrupted
        if self.passed > self.limit:
            raise TookTooLong(f"it took longer than {clock(self.limit)}")
        if time.monotonic() - self._reported >= REPORT_EVERY:
            self.tell()

    def tell(self) -> None:
        """Call `report` now."""
        self._reported = time.monotonic()
        if self.report is not None:
            self.report(self.passed)


_one_at_a_time = threading.Lock()  # held by the thread that compiles, because compilers have global state
_abandoned: list[threading.Thread] = []


def _abandon(thread: threading.Thread) -> None:
    """End a thread as soon as it executes Python again, i.e. when its present call of a C++ compiler returns."""
    if not _abandoned:
        atexit.register(_join_abandoned)
    _abandoned[:] = [*(old for old in _abandoned if old.is_alive()), thread]
    if thread.ident is not None and hasattr(ctypes, "pythonapi"):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Abandoned))


def _join_abandoned() -> None:
    """Let abandoned threads end before the interpreter does, which may abort the process if one is inside C++."""
    end = time.monotonic() + 5.0
    for thread in _abandoned:
        thread.join(max(0.0, end - time.monotonic()))


class Compiled:
    """A function of the networks' tensors, compiled at its first call for the shapes of that call.

    A call takes the arguments without the tensors, which are read again each time. If compilation fails, e.g. because there is
    no C++ compiler, or takes longer than COMPILE_LIMIT, it warns once, sets `failed` and calls `eager` from then on.

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
            self.compile(args, Patience())
        if self._function is None:
            return self.eager(*args)
        with torch.no_grad():
            out = self._function(*self._state, *_leaves(args))
        return _rebuild(self._structure, iter(out))

    def compile(self, args: tuple[Any, ...], patience: Patience) -> None:
        """Compile before the first call.

        Args:
            args: As for a call; only their shapes matter.
            patience: How long this may take.

        Raises:
            Interrupted: By `patience`; it may be compiled again.
        """
        try:
            patience.check()
            graph, inputs = self.trace(args)  # here, because it replaces the tensors of the networks meanwhile
            self._function = patience.wait_for(lambda: _build(graph, inputs))
        except Interrupted:
            raise
        except TookTooLong as error:
            self.give_up()
            warnings.warn(f"compiling was given up, so this runs eagerly ({error})", stacklevel=3)
        except Exception as error:  # a compiler may raise anything
            self.give_up()
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"compiling failed, so this runs eagerly ({type(error).__name__}: {reason})", stacklevel=3)

    def give_up(self) -> None:
        """Call `eager` from now on."""
        self.failed, self._function = True, None

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


def _build(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The compiled code of a traced graph, complete."""
    function = torch_internals.compile_graph(graph, inputs)
    with torch.no_grad():
        function(*inputs)  # parts of the compiler work lazily and are finished after this call
    return function


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


def compile_ahead(
    runner: Runner | GraphRunner,
    stage: str,
    needed: Sequence[bool],
    interrupted: threading.Event,
    verbose: bool,
) -> None:
    """Compile the updates of a stage before its first step, so that a stop meanwhile leaves the agent as it is.

    If one fails or the limit is over, all of them run eagerly, so that a resumed run, whose plan then says "eager", computes
    what the uninterrupted one does, to the bit.

    Args:
        runner: It runs the stage.
        stage: Name of the stage.
        needed: For each update, whether any remaining step needs it.
        interrupted: Set by Ctrl-C, after which this returns without having compiled all.
        verbose: Print what is being done every few seconds.
    """
    inner = runner if isinstance(runner, Runner) else runner.runner
    compiled = {j: gradients for j, gradients in enumerate(inner.gradients) if isinstance(gradients, Compiled)}
    todo, n_begun = [j for j in compiled if needed[j]], 0

    def report(seconds: float) -> None:
        say(f"{stage}: compiling update {n_begun} of {len(todo)}, {clock(seconds)} so far")

    patience = Patience(report=report if verbose else None, interrupted=interrupted)
    if verbose and todo:
        say(f"{stage}: compiling {len(todo)} {'update' if len(todo) == 1 else 'updates'}, for at most {clock(patience.limit)}")
    for j in todo:
        n_begun += 1
        if n_begun > 1:  # tracing, which takes seconds, prints nothing
            patience.tell()
        try:
            compiled[j].compile(_arguments(inner, j), patience)
        except Interrupted:
            return
        if compiled[j].failed and patience.passed > patience.limit:
            break
    if inner.failed:
        for gradients in compiled.values():
            gradients.give_up()
        if verbose:
            say(f"{stage}: runs eagerly, after {clock(patience.passed)} of compiling")
    elif verbose and todo:
        say(f"{stage}: compiled in {clock(patience.passed)}")


def _arguments(runner: Runner, j: int) -> tuple[Batch, Noise]:
    """A batch and noise of the j-th update, of the right shapes; the random generators are left as they were."""
    states = [generator.get_state() for generator in runner.generators]
    try:
        return runner.draw_batch(runner.by_return[j]), runner.noise(j)
    finally:
        for generator, state in zip(runner.generators, states, strict=True):
            generator.set_state(state)
