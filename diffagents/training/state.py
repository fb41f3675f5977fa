"""The state of a training: counters, plan, networks and optimisers as named tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffagents.errors import AGAIN, ArtifactError, short


def bare(key: str) -> str:
    """A state dict's key without what `torch.compile` puts before it."""
    return key.replace("_orig_mod.", "")


Tensors = dict[str, Tensor]
GENERATORS = ("generator", "predict_generator")


def training_tensors(agent: Any) -> Tensors:
    """Every tensor that training changes, live, under unique names."""
    return {**_named(agent, ("obs_normalizer", *agent.MODEL, *agent.LEARNER)), **_optimizer_side(agent)}


def load_training_tensors(agent: Any, tensors: Tensors) -> None:
    """Put `training_tensors` (cloned earlier) back."""
    names = ("obs_normalizer", *agent.MODEL, *agent.LEARNER)
    _load_named(agent, {k: v for k, v in tensors.items() if k.partition(".")[0] in names}, names, ())
    _load_optimizer_side(agent, {k: v for k, v in tensors.items() if k.partition(".")[0] in ("optimizer", *GENERATORS)}, ())


def _named(agent: Any, names: Sequence[str]) -> Tensors:
    return {f"{name}.{key}": value for name in names for key, value in getattr(agent, name).state_dict().items()}


def _load_named(agent: Any, tensors: Tensors, names: Sequence[str], fresh: Sequence[str]) -> None:
    stray = [key for key in tensors if key.partition(".")[0] not in names]
    if stray:
        raise ArtifactError(f"unexpected tensor {short(stray[0])!r}: the artifact belongs to another version or algorithm")
    for name in names:
        if name not in fresh:
            load_state(getattr(agent, name), tensors, f"{name}.")


def _optimizer_side(agent: Any) -> Tensors:
    tensors: Tensors = {}
    for name, optimizer in agent.optimizers.items():
        tensors |= optimizer_tensors(optimizer, f"optimizer.{name}")
    for name in GENERATORS:
        tensors[f"{name}.state"] = getattr(agent, name).get_state()
    return tensors


def _load_optimizer_side(agent: Any, tensors: Tensors, fresh: Sequence[str], generators: bool = True) -> None:
    for name, optimizer in agent.optimizers.items():
        if name not in fresh:
            load_optimizer(optimizer, tensors, f"optimizer.{name}")
    for name in GENERATORS if generators else ():
        state = tensors.get(f"{name}.state")
        if state is not None and len(state) == len(getattr(agent, name).get_state()):  # another device's state does not fit
            getattr(agent, name).set_state(state.cpu())


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy the tensors named `prefix` + parameter or buffer into the module, in place; other prefixes are left alone.

    Raises ArtifactError, before anything is copied, where names, shapes or dtypes are not exactly the module's.
    """
    own = {prefix + bare(key): value for key, value in module.state_dict().items()}
    given = {bare(key): value for key, value in tensors.items() if key.startswith(prefix)}
    for keys, what in ((own.keys() - given.keys(), "lacks"), (given.keys() - own.keys(), "has the unknown")):
        if keys:
            some = ", ".join(map(short, sorted(keys)[:3])) + (", ..." if len(keys) > 3 else "")
            raise ArtifactError(f"the artifact {what} {some} ({len(keys)} tensors): it is another network or version")
    for key, value in own.items():
        _check_like(given[key], value, key)
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(given[key])


def _check_like(given: Tensor, own: Tensor, name: str) -> None:
    if given.shape != own.shape or given.dtype != own.dtype:
        found, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (given, own))
        raise ArtifactError(f"{short(name)} is {found} in the artifact, {wanted} here: another network or space")


def optimizer_tensors(optimizer: Any, prefix: str) -> dict[str, Tensor]:
    """The state of an Adam or AdamW as `<prefix>.<i>.<key>`, i in parameter order; empty where it has not stepped.

    The tensors are the optimiser's own, not copies. Learning rates and other settings are the agent's to set.
    """
    states = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    return {f"{prefix}.{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}


def load_optimizer(optimizer: Any, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put what `optimizer_tensors` gave back into an optimiser over the same parameters; in place where it has stepped.

    Raises ArtifactError, before anything is changed, where names, shapes or dtypes do not fit the parameters.
    """
    given = {name: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
    places = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    states: list[dict[str, Tensor]] = []
    for i, (parameter, group) in enumerate(places):
        # Adam keeps the step beside the parameter only where a kernel reads it there.
        step = torch.zeros((), device=parameter.device if group["fused"] or group["capturable"] else "cpu")
        likes = {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}
        found = {key: given.pop(f"{prefix}.{i}.{key}") for key in likes if f"{prefix}.{i}.{key}" in given}
        if found and len(found) < len(likes):
            raise ArtifactError(f"the artifact has only {sorted(found)} of {prefix}.{i}, not {sorted(likes)}: {AGAIN}")
        for key, value in found.items():
            _check_like(value, likes[key], f"{prefix}.{i}.{key}")
            if key != "exp_avg" and bool((value < 0).any()):
                raise ArtifactError(f"the artifact's {prefix}.{i}.{key} holds negative numbers: {AGAIN}")
        states.append({key: torch.zeros_like(likes[key], requires_grad=False).copy_(found[key]) for key in found})
    if given:
        raise ArtifactError(f"the artifact has {short(min(given))}, this optimizer of {len(places)} tensors does not")
    for (parameter, _), state in zip(places, states, strict=True):
        old = optimizer.state.pop(parameter, {})
        if state:  # into the same memory where there is some, which a captured CUDA graph may hold
            optimizer.state[parameter] = {key: old[key].copy_(new) if key in old else new for key, new in state.items()}


def snapshot(agent: Any) -> dict[str, Any]:
    """The whole training state, cloned on the device: what a NaN or a timing run falls back to."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in training_tensors(agent).items()},
        "counts": (agent.num_timesteps, agent.n_env_steps, agent.n_updates, dict(agent.stage_steps)),
        "done": {} if agent.plan is None else dict(agent.plan.done),
        "online": 0 if agent.online is None else agent.online.n_updates,
        "steps": {name: optimizer.n_steps.clone() for name, optimizer in agent.optimizers.items()},
    }


def restore(agent: Any, snapshot: dict[str, Any]) -> None:
    """Put what `snapshot` gave back, in place."""
    load_training_tensors(agent, snapshot["tensors"])
    num_timesteps, n_env_steps, agent.n_updates, stage_steps = snapshot["counts"]
    agent.num_timesteps = num_timesteps + agent.n_env_steps - n_env_steps  # what was lived through stays, in the buffer too
    agent.stage_steps = dict(stage_steps)
    if agent.plan is not None:
        agent.plan.done = dict(snapshot["done"])
    if agent.online is not None:
        agent.online.n_updates = snapshot["online"]
    for name, step in snapshot["steps"].items():
        agent.optimizers[name].n_steps.copy_(step)
