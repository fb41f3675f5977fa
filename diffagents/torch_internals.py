"""The only module that touches parts of PyTorch that are private, undocumented or unstable.

Such a part may change or disappear in any release of torch. It is therefore looked up and tested on first use, never at
import, and replaced by a public equivalent if it is missing or has changed:

* `torch._fused_adam_` and `torch._fused_adamw_`, because the bookkeeping of `torch.optim` takes longer than the arithmetic, and
  its first optimiser imports `torch._dynamo`, which takes more than a second.
  Without them: `torch.optim.Adam` and `AdamW`. Slower; the same state, and the same numbers to float tolerance.
* `torch._foreach_add_`, `torch._foreach_lerp_` and `torch._foreach_zero_`, because one call serves all tensors of a network.
  Without them: a loop over the tensors.
* `torch._inductor.compile` and `torch.fx.experimental.proxy_tensor.make_fx`, because `torch.compile` checks guards at each
  call, which takes longer than a small network.
  Without them: compiling raises RuntimeError, upon which training/compiled.py warns and runs eagerly.
* `torch.utils._python_dispatch.TorchDispatchMode`, because it sees every tensor operation of a computation, backward passes
  included, from whose number the time of compiling is estimated.
  Without it: the number is unknown, and a usual one is assumed.
* `torch._decomp.decomposition_table` and `make_fx`, because `torch.export` cannot trace an algorithm that takes gradients while
  it acts, as QGPO does.
  Without them: exporting such an algorithm raises RuntimeError. The other algorithms do not need them.
* `Module._parameters` and `Module._buffers`, because looking up `module.weight` takes many times as long, and a call of
  `predict` that looks up several takes only microseconds.
  Without them: `getattr`.

This module imports nothing of diffagents.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.fx import GraphModule

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


# ---- Adam ------------------------------------------------------------------------------------------------------------
@functools.cache
def fused_adam(decoupled: bool, device: torch.device) -> Callable[..., Any] | None:
    """torch's fused kernel for a step of Adam.

    Args:
        decoupled: Return AdamW's kernel instead.
        device: The device of the parameters.

    Returns:
        The kernel; None if it is missing or does not take the right step with our arguments: use `adam_by_torch_optim`.
    """
    kernel: Any = getattr(torch, "_fused_adamw_" if decoupled else "_fused_adam_", None)
    numbers = torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0, 0.25], dtype=torch.float32, device=device)
    parameter, gradient, mean, square, step, lr = numbers.unbind()
    decay = 0.5 if decoupled else 0.0
    try:
        kernel(
            [parameter],
            [gradient],
            [mean],
            [square],
            [],
            [step],
            lr=lr,
            beta1=_BETA1,
            beta2=_BETA2,
            weight_decay=decay,
            eps=_EPS,
            amsgrad=False,
            maximize=False,
        )
        found = numbers.tolist()
    except Exception:  # there is no such function, its arguments have changed, or the device has no such kernel
        return None
    wanted = [1.0 - 0.25 * decay - 0.25, 2.0, 0.2, 0.004, 1.0, 0.25]  # the first step of Adam has the length lr
    return kernel if all(abs(a - b) < 1e-5 for a, b in zip(found, wanted, strict=True)) else None


def adam_by_torch_optim(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    weight_decay: float | None,
) -> None:
    """The same step on the same tensors by torch.optim, in place, so that the two implementations are interchangeable.

    Args:
        parameters: The N tensors to update, all on one device.
        gradients: One for each parameter.
        exp_avgs: The running means of the gradients.
        exp_avg_sqs: The running means of their squares.
        steps: The numbers of steps so far, 0-d tensors; increased by one here.
        lr: The learning rate, a 0-d tensor on the parameters' device.
        weight_decay: None for Adam, AdamW's decoupled weight decay otherwise.
    """
    on_device = lr.device.type == "cuda"  # no value may leave the device there: a CUDA graph can then hold the step
    settings: dict[str, Any] = {"lr": lr if on_device else lr.item(), "betas": (_BETA1, _BETA2), "eps": _EPS}
    settings["capturable"] = on_device
    optimizer: torch.optim.Optimizer
    if weight_decay is None:
        optimizer = torch.optim.Adam(parameters, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, **settings, weight_decay=weight_decay)
    for parameter, gradient, mean, square, step in zip(parameters, gradients, exp_avgs, exp_avg_sqs, steps, strict=True):
        parameter.grad = gradient
        optimizer.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    optimizer.step()


# ---- operations on lists of tensors ----------------------------------------------------------------------------------
@functools.cache
def for_each(operation: str) -> Callable[..., None]:
    """An in-place operation on lists of tensors: torch's function, or a loop if it is missing or behaves differently.

    Args:
        operation: "add_" (tensors, others), "lerp_" (tensors, others, weight) or "zero_" (tensors).
    """
    kernel: Any = getattr(torch, f"_foreach_{operation}", None)
    probe = torch.tensor([[1.0, 2.0], [1.0, 2.0], [4.0, 8.0]], device="cpu")  # "meta" may be the default now
    found, wanted, other = probe.unbind()
    scalars = [0.5] if operation == "lerp_" else []
    lists = [] if operation == "zero_" else [[other]]
    loop = functools.partial(_loop, operation)
    loop([wanted], *lists, *scalars)
    try:
        kernel([found], *lists, *scalars)
    except Exception:  # there is no such function, or its arguments have changed
        return loop
    chosen: Callable[..., None] = kernel if torch.equal(found, wanted) else loop
    return chosen


def _loop(operation: str, tensors: Sequence[Tensor], *arguments: Any) -> None:
    lists = [argument for argument in arguments if not isinstance(argument, float)]
    scalars = [argument for argument in arguments if isinstance(argument, float)]
    for tensor, *others in zip(tensors, *lists, strict=True):
        getattr(tensor, operation)(*others, *scalars)


# ---- tracing and compiling -------------------------------------------------------------------------------------------
def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> "GraphModule":
    """The tensor operations of `function(*inputs)`, backward passes included, as a graph for inputs of these shapes.

    Raises:
        RuntimeError: This version of torch lacks `make_fx`.
    """
    graph: GraphModule = _lookup(_PROXY_TENSOR, "make_fx")(function)(*inputs)
    return graph


def count_operations(call: Callable[[], Any]) -> int | None:
    """Call the function; the number of tensor operations that it ran, backward passes included, or None if it is unknown."""
    try:
        mode: Any = _lookup("torch.utils._python_dispatch", "TorchDispatchMode")
    except RuntimeError:
        return None

    class Counter(mode):  # type: ignore[misc]
        n = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += 1
            return function(*args, **(kwargs or {}))

    with Counter() as counter:
        call()
    return int(counter.n)


def compile_graph(graph: "GraphModule", inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A traced graph as compiled code for inputs of these shapes.

    Raises:
        RuntimeError: This version of torch lacks `torch._inductor.compile`. The compiler itself may raise anything.
    """
    compiled: Callable[..., Any] = _lookup("torch._inductor", "compile")(graph, [*inputs])
    return compiled


def trace_without_autograd(module: nn.Module, example: Tensor) -> "GraphModule":
    """`module(example)` as a graph for any batch size, with its backward passes written out as ordinary operations.

    Raises:
        RuntimeError: This version of torch lacks `make_fx` or `torch._decomp`.
    """
    try:
        make_fx, formulas = _lookup(_PROXY_TENSOR, "make_fx"), _lookup("torch._decomp", "decomposition_table")
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}, without which an algorithm that takes gradients while it acts cannot be exported: "
            "install another version of torch that diffagents allows"
        ) from error
    table = {operation: formula for operation, formula in formulas.items() if "_backward" in str(operation)}  # unknown to ONNX
    traced = make_fx(module, decomposition_table=table, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    graph: GraphModule = traced(example)
    return graph


_PROXY_TENSOR = "torch.fx.experimental.proxy_tensor"


def _lookup(module: str, name: str) -> Any:
    """`module.name`, imported here, because these modules take seconds to import."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"torch {torch.__version__} has no {module}.{name} ({error})") from error


# ---- modules ---------------------------------------------------------------------------------------------------------
def tensor_place(module: nn.Module, name: str) -> Mapping[str, Any]:
    """The mapping in which the module stores its parameter or buffer `name`, whose entry is always the present tensor."""
    for place in (getattr(module, "_parameters", None), getattr(module, "_buffers", None)):
        if isinstance(place, dict) and place.get(name) is not None:
            return place
    return _Attributes(module)


class _Attributes(Mapping[str, Any]):
    """The attributes of an object as a mapping."""

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Any:
        return getattr(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return iter(dir(self._owner))

    def __len__(self) -> int:
        return len(dir(self._owner))
