"""Exports a trained policy as one file that runs without diffagents: ONNX for onnxruntime, or PyTorch's `torch.export` format.

Input `obs`: float32 (B, S), as the environment returns it, not normalised (the entries of a Dict concatenated in the order of
`obs_keys`). Output `action`: float32 (B, A), in the environment's units and within its bounds. The batch size B is free.
The file includes the observation normaliser, the sampler with its stored noise, the choice among candidates, the scaling of
the action, and a description of itself (`metadata`).
"""

import builtins
import contextlib
import copy
import io
import json
import logging
import os
import pathlib
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
from diffagents.files import replacing
from diffagents.functional import action_gradient
from diffagents.torch_internals import trace_without_autograd
from diffagents.training.provenance import package_version
from diffagents.training.state import Learner

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
"""Format -> the suffix that is added to a path without one."""
METADATA_FILE = "metadata.json"
"""Name of the extra file with the metadata in a `torch.export` file."""
_CHECK_ROWS = 64  # observations on which the exported program is compared with the agent


def export(
    learner: Learner, path: str | os.PathLike[str], format: str = "onnx", deterministic: bool = True, **choice: Any
) -> pathlib.Path:
    """Write what `learner.predict(obs, deterministic=True, **choice)` computes as one file, all or nothing.

    It acts differently from `learner.predict(obs)` if the policy is meant to sample its actions (`deterministic=False` in its
    configuration, as in the papers of diffusion policies); this causes a warning.

    It takes seconds; for QGPO and SfBC with many solver steps a minute or more. The file runs with

        onnxruntime.InferenceSession("policy.onnx").run(["action"], {"obs": obs})[0]
        torch.export.load("policy.pt2").module()(obs)

    Args:
        learner: The agent, on any device; it is not changed. An untrained one, or one that samples, causes a warning.
        path: The file; without a suffix it gets .onnx or .pt2.
        format: "onnx" (needs `pip install onnx onnxscript`) or "torch_export".
        deterministic: Only True: a file has no random generator.
        choice: As in `predict`, e.g. n_candidates=10; baked into the file. Fewer candidates and solver steps make it smaller.

    Returns:
        The path of the file.

    Raises:
        ValueError: Unknown format, deterministic=False, or a path with the suffix of the other format.
        TypeError: A choice that the algorithm does not have.
        FileNotFoundError, IsADirectoryError: The folder of `path` does not exist, or `path` is a folder.
        ImportError: The packages for ONNX are missing.
        RuntimeError: There is no policy yet, or the traced policy acts differently from the agent (then no file is written).
    """
    target = _check(learner, path, format, deterministic)
    policy = ExportedPolicy(learner, choose(type(learner).__name__, learner.config, learner.CHOICE, choice))
    facts = metadata(learner, choice)
    with _quiet():
        program = _trace(policy)
        content = _onnx_bytes(program, facts) if format == "onnx" else _torch_bytes(program, facts)
    with replacing(target, "the exported policy") as part:
        part.write_bytes(content)
    return target


def metadata(learner: Learner, choice: dict[str, Any]) -> dict[str, Any]:
    """The description that the file contains, in the types of JSON.

    Args:
        learner: The agent.
        choice: As in `export`.

    Returns:
        A dict with the keys `algorithm`, `diffagents` (the version of the library), `obs_dim` (S), `obs_keys` and `obs_sizes`
        (the entries of a Dict observation and their lengths in `obs`; None and [S] for other observations), `action_dim` (A),
        `action_shape` (in the environment), `action_low` and `action_high` (A numbers each), and `choice` (the
        hyperparameters that can be overridden in `predict`, with their values in the file).
    """
    spec = learner.require_spec()
    config = choose(type(learner).__name__, learner.config, learner.CHOICE, choice)
    return {
        "algorithm": type(learner).__name__,
        "diffagents": package_version("diffagents"),
        "obs_dim": spec.obs_dim,
        "obs_keys": None if spec.obs_keys is None else list(spec.obs_keys),
        "obs_sizes": [int(np.prod(leaf.shape or ())) for leaf in spec._leaves()],
        "action_dim": spec.act_dim,
        "action_shape": list(spec.action_space.shape),
        "action_low": spec.action_space.low.reshape(-1).tolist(),
        "action_high": spec.action_space.high.reshape(-1).tolist(),
        "choice": {name: getattr(config, name) for name in learner.CHOICE},
    }


class ExportedPolicy(nn.Module):
    """`Agent.predict(deterministic=True)` as a module: obs (B, S), not normalised -> action (B, A) in the environment's units.

    It uses copies of the networks on the CPU, so that tracing does not affect the agent.

    Args:
        learner: The agent.
        config: Its configuration, with the choice for this file.
    """

    low: Tensor
    high: Tensor

    def __init__(self, learner: Learner, config: Any) -> None:
        super().__init__()
        self.actor, self.config = copy.copy(learner), config
        self.actor.device = torch.device("cpu")
        for name in ("obs_normalizer", *learner.MODEL):
            network = copy.deepcopy(getattr(learner, name)).cpu().eval().requires_grad_(False)
            setattr(self.actor, name, network)
            self.add_module(name, network)
        assert learner.spec is not None
        space = learner.spec.action_space
        self.register_buffer("low", torch.from_numpy(space.low.reshape(-1).astype(np.float32)))
        self.register_buffer("high", torch.from_numpy(space.high.reshape(-1).astype(np.float32)))
        self.whole = np.issubdtype(space.dtype, np.integer)

    def forward(self, obs: Tensor) -> Tensor:
        """Act as `Agent.act` and scale as `Spec.unscale_action`; for a space of integers, whole numbers as float32."""
        noise = self.actor.draw_act(1, True, self.config, self.actor.predict_generator)
        act = self.actor.act(self.actor.obs_normalizer(obs), noise, self.config).clamp(-1.0, 1.0)
        action = self.low + (act + 1.0) * 0.5 * (self.high - self.low)
        action = torch.minimum(torch.maximum(action, self.low), self.high)
        return action.round() if self.whole else action


# ---- tracing -------------------------------------------------------------------------------------------------------
def _trace(policy: ExportedPolicy) -> "ExportedProgram":
    """Trace the policy with a free batch size. Raises RuntimeError if the program acts differently."""
    normalizer = policy.actor.obs_normalizer
    noise = torch.randn(_CHECK_ROWS, len(normalizer.mean), generator=torch.Generator().manual_seed(0))
    obs = normalizer.mean + normalizer.std * noise  # the distribution on which the policy was trained
    example = obs[:5]
    # This comes first because it also runs the policy once, which fills any caches of the networks before tracing.
    gradients = _takes_gradients(policy, example)
    with torch.no_grad(), _free_batch_size():
        module: nn.Module = _without_autograd(policy, example) if gradients else policy
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains private paths of this machine
    _compare(policy, program, obs)
    return program


class _GradientWatch(TorchFunctionMode):
    """Detects whether anything is computed with gradients enabled."""

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
    """The policy with its backward passes written out as ordinary operations.

    `torch.export` traces above autograd, where a gradient is not an operation: it fails, or stores its value as a constant.
    """
    graph = trace_without_autograd(policy, obs)
    next(iter(graph.graph.nodes)).target = "obs"  # the name of the input
    graph.recompile()
    return graph


@contextlib.contextmanager
def _free_batch_size() -> Iterator[None]:
    """While tracing, replace in all our modules the two functions that would fix the batch size in the file.

    `len(tensor)` must return a number in Python, while the batch size is a symbol here. `functional.action_gradient` uses
    `torch.func.grad`, which turns symbols into numbers; `torch.autograd.grad` does not.
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
    """`len` that keeps a symbolic batch size."""
    return value.shape[0] if isinstance(value, Tensor) else builtins.len(value)


def _autograd_gradient(value: Callable[[Tensor], Tensor], act: Tensor) -> Tensor:
    """`functional.action_gradient` through `torch.autograd.grad`."""
    leaf = act.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
    return gradient.detach()


def _compare(policy: ExportedPolicy, program: "ExportedProgram", obs: Tensor) -> None:
    """Raises RuntimeError if the program acts differently from the policy, on one observation or on all of obs (N, S).

    A tenth of the actions may differ: rounding decides between candidates of almost equal Q.
    """
    module, wrong = program.module(), 0
    with torch.no_grad():
        for n in (1, len(obs)):
            error = (module(obs[:n]) - policy(obs[:n])).abs() / (policy.high - policy.low)
            wrong += int((~(error.amax(-1) <= 1e-4)).sum())  # NaN is wrong too
    if wrong > len(obs) // 10:
        name, total = type(policy.actor).__name__, len(obs) + 1
        raise RuntimeError(
            f"the traced {name} acts differently from the agent on {wrong} of {total} observations, so nothing was written: "
            f"please report it with your versions (torch {torch.__version__}); another version of torch may trace it correctly"
        )


# ---- files ---------------------------------------------------------------------------------------------------------
def _onnx_bytes(program: "ExportedProgram", facts: dict[str, Any]) -> bytes:
    """An ONNX model with `facts` as its metadata_props: strings unchanged, everything else as JSON."""
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
        node.metadata_props.clear()  # how PyTorch derived the node: half of the file
    model.producer_name, model.producer_version = "diffagents", facts["diffagents"]
    for name, value in facts.items():
        model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    content: bytes = converted.model_proto.SerializeToString()
    return content


def _torch_bytes(program: "ExportedProgram", facts: dict[str, Any]) -> bytes:
    """A `torch.export` archive with `facts` as JSON in METADATA_FILE."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(facts)})
    return buffer.getvalue()


# ---- checks before any work -----------------------------------------------------------------------------------------------
def _check(learner: Learner, path: str | os.PathLike[str], format: str, deterministic: bool) -> pathlib.Path:
    """Check the arguments of `export`; returns the path of the file."""
    name = type(learner).__name__
    if format not in SUFFIXES:
        raise ValueError(f"format={format!r}; choose from {', '.join(map(repr, SUFFIXES))}")
    if deterministic is not True:
        raise ValueError(
            f"deterministic={deterministic!r}: a file has no random generator, so only the deterministic policy can be "
            "exported: leave the argument out, or call agent.predict for random actions"
        )
    if learner.spec is None or learner.state.policy_missing:
        stages = f', stages=("{learner.POLICY_STAGE}",)' if learner.state.policy_missing else ""
        raise RuntimeError(f"this {name} has no policy to export yet: train it with learn(data{stages}), or load one")
    target = pathlib.Path(path).expanduser()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: pass the name of a file, e.g. {target / ('policy' + SUFFIXES[format])}")
    if target.suffix in set(SUFFIXES.values()) - {SUFFIXES[format]}:
        other = next(key for key, suffix in SUFFIXES.items() if suffix == target.suffix)
        raise ValueError(
            f"{target} has the suffix of the other format: pass format={other!r}, or a name that ends in {SUFFIXES[format]}"
        )
    if not target.suffix:
        target = target.with_name(target.name + SUFFIXES[format])
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist: create it first")
    missing = [package for package in ("onnx", "onnxscript") if format == "onnx" and find_spec(package) is None]
    if missing:
        raise ImportError(
            f'format="onnx" needs the packages onnx and onnxscript ({", ".join(missing)} not found): '
            'pip install onnx onnxscript, or pass format="torch_export", which needs neither'
        )
    if learner.state.pristine:
        warnings.warn(f"this {name} has not been trained: the file will contain a random policy", stacklevel=3)
    if not learner.acts_deterministically:
        warnings.warn(
            f"this {name} is meant to sample its actions, but a file has no random generator: the exported policy acts as "
            "predict(obs, deterministic=True), which may score differently",
            stacklevel=3,
        )
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the logs and warnings of PyTorch's exporters; problems that concern the user raise errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
