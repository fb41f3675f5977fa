"""A trained policy as one file that runs without diffagents: ONNX for onnxruntime, or PyTorch's own `torch.export` format.

Input `obs`, float32 (B, S), raw, as the environment gives it (a Dict's entries side by side, in the order of `obs_keys`).
Output `action`, float32 (B, A), in the environment's units and within its bounds. B is free: 1 on a robot, many in simulation.
Inside are the normaliser, the sampler with its stored noise, the choice among candidates and the scaling of the action.
The file says what it holds: algorithm, observation, bounds (`metadata`).
"""

import builtins
import contextlib
import copy
import io
import json
import logging
import os
import pathlib
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffagents.config.hyperparameters import choose
from diffagents.functional import action_gradient
from diffagents.torch_internals import trace_without_autograd
from diffagents.training.provenance import package_version
from diffagents.training.state import Learner

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
"""Format -> the suffix that a path without one gets."""
METADATA_FILE = "metadata.json"
"""The name of the `torch.export` file's extra file with the metadata."""
_CHECK_ROWS = 64


def export(
    agent: Learner, path: str | os.PathLike[str], format: str = "onnx", deterministic: bool = True, **choice: Any
) -> pathlib.Path:
    """Write what `agent.predict(obs, deterministic=True, **choice)` computes as one file, all or nothing; return its path.

    format: "onnx" (needs `pip install "diffagents[export]"`) or "torch_export". A path without a suffix gets .onnx or .pt2.
    choice: as in `predict`, e.g. n_candidates=10; fixed in the file. Fewer candidates and solver steps make it smaller.
    It takes seconds, for QGPO and SfBC with many solver steps a minute or more. The agent is only read; it may be on a GPU.
    Run it with

        onnxruntime.InferenceSession("policy.onnx").run(["action"], {"obs": obs})[0]
        torch.export.load("policy.pt2").module()(obs)

    Raises, before any work: ValueError (unknown format, deterministic=False, a path with the other format's suffix), TypeError
    (a choice that the algorithm does not have), RuntimeError (no policy yet), FileNotFoundError or IsADirectoryError (path),
    ImportError (ONNX's packages are missing). Raises RuntimeError where the traced policy acts differently; then no file is
    written. Warns of a policy that was never trained.
    """
    target = _check(agent, path, format, deterministic)
    policy = ExportedPolicy(agent, choose(type(agent).__name__, agent.config, agent.CHOICE, choice))
    facts = metadata(agent, choice)
    with _quiet():
        program = _trace(policy)
        content = _onnx_bytes(program, facts) if format == "onnx" else _torch_bytes(program, facts)
    _write(target, content)
    return target


def metadata(agent: Learner, choice: dict[str, Any]) -> dict[str, Any]:
    """What the file says about itself, in JSON's types.

    algorithm; diffagents, its version; obs_dim = S; obs_keys and obs_sizes, the entries of a Dict observation and their lengths
    in `obs` (null and [S] otherwise); action_dim = A; action_shape, the environment's; action_low, action_high, A numbers each;
    choice, the knobs of acting that `predict` may set, as they are in the file.
    """
    spec = agent.require_spec()
    config = choose(type(agent).__name__, agent.config, agent.CHOICE, choice)
    return {
        "algorithm": type(agent).__name__,
        "diffagents": package_version("diffagents"),
        "obs_dim": spec.obs_dim,
        "obs_keys": None if spec.obs_keys is None else list(spec.obs_keys),
        "obs_sizes": [int(np.prod(leaf.shape or ())) for leaf in spec._leaves()],
        "action_dim": spec.act_dim,
        "action_shape": list(spec.action_space.shape),
        "action_low": spec.action_space.low.reshape(-1).tolist(),
        "action_high": spec.action_space.high.reshape(-1).tolist(),
        "choice": {name: getattr(config, name) for name in agent.CHOICE},
    }


class ExportedPolicy(nn.Module):
    """`Agent.predict(deterministic=True)` as a module: raw obs (B, S) -> action (B, A) in the environment's units.

    It acts with copies on the CPU, so that tracing leaves nothing behind in the agent.
    """

    low: Tensor
    high: Tensor

    def __init__(self, agent: Learner, config: Any) -> None:
        super().__init__()
        self.actor, self.config = copy.copy(agent), config
        self.actor.device = torch.device("cpu")
        for name in ("obs_normalizer", *agent.MODEL):
            network = copy.deepcopy(getattr(agent, name)).cpu().eval().requires_grad_(False)
            setattr(self.actor, name, network)
            self.add_module(name, network)
        assert agent.spec is not None
        space = agent.spec.action_space
        self.register_buffer("low", torch.from_numpy(space.low.reshape(-1).astype(np.float32)))
        self.register_buffer("high", torch.from_numpy(space.high.reshape(-1).astype(np.float32)))
        self.whole = np.issubdtype(space.dtype, np.integer)

    def forward(self, obs: Tensor) -> Tensor:
        """As `Spec.unscale_action` after `Agent.act`; whole numbers, as float32, where the space is of integers."""
        noise = self.actor.draw_act(1, True, self.config, self.actor.predict_generator)
        act = self.actor.act(self.actor.obs_normalizer(obs), noise, self.config).clamp(-1.0, 1.0)
        action = self.low + (act + 1.0) * 0.5 * (self.high - self.low)
        action = torch.minimum(torch.maximum(action, self.low), self.high)
        return action.trunc() if self.whole else action


# ---- tracing -------------------------------------------------------------------------------------------------------
def _trace(policy: ExportedPolicy) -> "ExportedProgram":
    """The policy's tensor operations with a free batch size, checked against the policy. Raises RuntimeError."""
    normalizer = policy.actor.obs_normalizer
    noise = torch.randn(_CHECK_ROWS, len(normalizer.mean), generator=torch.Generator().manual_seed(0))
    obs = normalizer.mean + normalizer.std * noise  # where the policy was trained
    example = obs[:5]
    # Gradients first: this also runs the policy once as it is, which fills what its networks may keep for later calls.
    gradients = _takes_gradients(policy, example)
    with torch.no_grad(), _free_batch_size():
        module: nn.Module = _without_autograd(policy, example) if gradients else policy
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine are nobody's business
    _compare(policy, program, obs)
    return program


class _GradientWatch(TorchFunctionMode):
    """Notices whether anything is computed with gradients on."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


def _takes_gradients(policy: nn.Module, obs: Tensor) -> bool:
    """Whether acting itself differentiates, as QGPO's guidance does."""
    with torch.no_grad(), _GradientWatch() as watch:
        policy(obs)
    return watch.seen


def _without_autograd(policy: nn.Module, obs: Tensor) -> nn.Module:
    """The same with its backward passes written out as ordinary operations.

    `torch.export` itself traces above autograd, where a gradient is no operation: it fails, or takes its value for a constant.
    """
    graph = trace_without_autograd(policy, obs)
    next(iter(graph.graph.nodes)).target = "obs"  # the name of the input
    graph.recompile()
    return graph


@contextlib.contextmanager
def _free_batch_size() -> Iterator[None]:
    """While it is traced, put aside what would fix the batch size in the file, in all of our modules.

    `len(tensor)`, which in Python must be a number and here may be a symbol; and `values.action_gradient`, whose
    `torch.func.grad` turns symbols into numbers, where `torch.autograd.grad` does not.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("diffagents.")]
    ours = {"len": _symbolic_len, "action_gradient": _autograd_gradient}
    before = [(module, name, vars(module).get(name)) for module in modules for name in ours]
    before = [entry for entry in before if entry[1] == "len" or entry[2] is action_gradient]
    for module, name, _ in before:
        setattr(module, name, ours[name])
    try:
        yield
    finally:
        for module, name, value in before:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


def _symbolic_len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) else builtins.len(value)


def _autograd_gradient(value: Callable[[Tensor], Tensor], act: Tensor) -> Tensor:
    leaf = act.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
    return gradient.detach()


def _compare(policy: ExportedPolicy, program: "ExportedProgram", obs: Tensor) -> None:
    """Raises RuntimeError where the program acts unlike the policy, on one observation or on all of obs (N, S).

    A tenth may differ: rounding decides between candidates that Q rates alike.
    """
    module, wrong = program.module(), 0
    with torch.no_grad():
        for n in (1, len(obs)):
            error = (module(obs[:n]) - policy(obs[:n])).abs() / (policy.high - policy.low)
            wrong += int((~(error.amax(-1) <= 1e-4)).sum())  # NaN is wrong too
    if wrong > len(obs) // 10:
        name, total = type(policy.actor).__name__, len(obs) + 1
        raise RuntimeError(
            f"the traced {name} acts unlike the agent on {wrong} of {total} observations, so nothing was written: please "
            f"report it, with the versions (torch {torch.__version__}); another version of torch may trace it well"
        )


# ---- files ---------------------------------------------------------------------------------------------------------
def _onnx_bytes(program: "ExportedProgram", facts: dict[str, Any]) -> bytes:
    """An ONNX model; `facts` are its metadata_props, strings as they are and all else in JSON."""
    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["obs"],
        output_names=["action"],
        dynamic_shapes=({0: "batch"},),
    )
    assert converted is not None
    model = converted.model
    for node in model.graph:
        node.metadata_props.clear()  # how PyTorch came to it: half of the file
    model.producer_name, model.producer_version = "diffagents", facts["diffagents"]
    for name, value in facts.items():
        model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    content: bytes = converted.model_proto.SerializeToString()
    return content


def _torch_bytes(program: "ExportedProgram", facts: dict[str, Any]) -> bytes:
    """A `torch.export` archive with `facts` in METADATA_FILE."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(facts)})
    return buffer.getvalue()


def _write(target: pathlib.Path, content: bytes) -> None:
    """All or nothing: a file of that name is replaced in one go."""
    real = pathlib.Path(os.path.realpath(target))  # what a link leads to is replaced, not the link
    temporary = real.parent / f".diffagents-{secrets.token_hex(6)}.tmp"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, real)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---- before any work -----------------------------------------------------------------------------------------------
def _check(agent: Learner, path: str | os.PathLike[str], format: str, deterministic: bool) -> pathlib.Path:
    """The file to write. Raises what `export` promises."""
    name = type(agent).__name__
    if format not in SUFFIXES:
        raise ValueError(f"format={format!r}; choose from {', '.join(map(repr, SUFFIXES))}")
    if deterministic is not True:
        raise ValueError(
            f"deterministic={deterministic!r}: a file has no random generator, so that only the deterministic policy can be "
            "exported; leave it out, or call agent.predict for random actions"
        )
    if agent.spec is None or agent.state.policy_missing:
        stages = f', stages=("{agent.POLICY_STAGE}",)' if agent.state.policy_missing else ""
        raise RuntimeError(f"this {name} has no policy to export yet: train it with learn(data{stages}), or load one")
    target = pathlib.Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: give the name of a file, e.g. {target / ('policy' + SUFFIXES[format])}")
    if target.suffix in set(SUFFIXES.values()) - {SUFFIXES[format]}:
        other = next(key for key, suffix in SUFFIXES.items() if suffix == target.suffix)
        raise ValueError(f"{target} has the suffix of the other format: pass format={other!r}, or a name in {SUFFIXES[format]}")
    if not target.suffix:
        target = target.with_name(target.name + SUFFIXES[format])
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist: make it first")
    missing = [package for package in ("onnx", "onnxscript") if format == "onnx" and find_spec(package) is None]
    if missing:
        raise ImportError(
            f'format="onnx" needs the packages onnx and onnxscript ({", ".join(missing)} not found): '
            'pip install "diffagents[export]"; or take format="torch_export", which needs neither'
        )
    if agent.state.pristine:
        warnings.warn(f"this {name} has not been trained: the file will hold a random policy", stacklevel=3)
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporters talk about themselves; what matters to a user is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
