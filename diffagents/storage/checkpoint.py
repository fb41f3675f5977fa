"""An agent <-> what an artifact holds: config, named tensors, trainer state. The files themselves are artifact.py's.

model.safetensors      what `predict` needs, the observation normaliser included
learner.safetensors    every other network and target
optimizer.safetensors  optimiser moments and both random generators; with trainer_state.json, training goes on to the bit
"""

import dataclasses
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from diffagents.config.checks import whole_number
from diffagents.data.normalize import RewardTransform
from diffagents.errors import AGAIN, ArtifactError, short
from diffagents.storage.artifact import CONFIG, TENSOR_FILES, TRAINER_STATE, Artifact, read
from diffagents.training import provenance
from diffagents.training.plan import OnlineRun, Plan
from diffagents.training.state import Tensors, _load_named, _load_optimizer_side, _named, _optimizer_side
from diffagents.types import Spec

AGENT_OVERRIDES = ("seed", "verbose", "tensorboard_log", "compile", "tf32")


def pack(agent: Any, trainer_state: bool) -> tuple[dict[str, Any], dict[str, Tensors], dict[str, Any] | None]:
    """(config, {"model": ..., "learner": ..., "optimizer": ...}, trainer state or None) of a built agent."""
    agent._need_networks()
    if not agent.has_learner and agent.origin is not None:
        try:
            need_learner(agent)
        except OSError as error:
            warnings.warn(f"saving what acts only, without critics and behaviour model: {error}", stacklevel=3)
    spec: Spec = agent.spec
    config = {
        "library": "diffagents",
        "algorithm": type(agent).__name__,
        "knobs": dataclasses.asdict(agent.config),
        "explicit": sorted(agent._explicit),
        "policy_kwargs": agent.policy_kwargs,
        "preset": agent.preset,
        "seed": agent.seed,
        "spec": spec.to_json(),
        "reward_transform": agent.reward_transform.to_json() if agent.reward_transform is not None else None,
        "dataset": agent.dataset_info,
        "provenance": agent.provenance,
        "counters": {
            "num_timesteps": agent.num_timesteps,
            "n_env_steps": agent.n_env_steps,
            "n_updates": agent.n_updates,
            "stage_steps": agent.stage_steps,
            "policy_missing": agent._policy_missing,
            "pristine": agent._pristine,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("diffagents", "torch", "gymnasium")},
        },
    }
    tensors = {"model": _named(agent, ("obs_normalizer", *agent.MODEL))}
    if agent.has_learner:
        tensors["learner"] = _named(agent, agent.LEARNER)
    if not trainer_state:
        return config, tensors, None
    tensors["optimizer"] = _optimizer_side(agent)
    runs = {name: run.to_json() if run else None for name, run in (("plan", agent.plan), ("online", agent.online))}
    return config, tensors, {**runs, "history": agent.history}


def unpack(cls: type[Any], source: Artifact, device: Any, overrides: dict[str, Any]) -> Any:
    """The agent that was written to `source`, as an instance of `cls`. Raises ArtifactError if it is of another class."""
    algorithm = source.config.get("algorithm")
    if algorithm != cls.__name__:
        raise ArtifactError(
            f"{source.path} holds a {algorithm}, not a {cls.__name__}: use diffagents.load(path) or {algorithm}.load"
        )
    tensors = {name: source.tensors(name) for name in ("model", "learner", "optimizer") if source.has(name)}
    return restore(cls, source.config, tensors, source.trainer_state(), device, overrides, ())


def restore(
    cls: type[Any],
    config: dict[str, Any],
    tensors: dict[str, Tensors],
    state: dict[str, Any] | None,
    device: Any,
    overrides: dict[str, Any],
    fresh: Sequence[str],
) -> Any:
    """Build an agent from packed parts. `overrides` change knobs; networks in `fresh` stay newly built."""
    unknown = [name for name in fresh if name not in (*cls.MODEL, *cls.LEARNER)]
    if unknown:
        raise ValueError(f"fresh={tuple(fresh)} names {unknown[0]!r}; the networks are {[*cls.MODEL, *cls.LEARNER]}")
    for name in overrides:
        if name in ("policy_kwargs", "preset", "obs_keys", "device", "env"):
            raise TypeError(f"{name} belongs to the saved networks and cannot be changed here: make a new {cls.__name__}(...)")
    _check_overrides(cls, config, device, overrides)
    try:
        agent = _build(cls, config, tensors, device, overrides)
        plan = Plan.from_json(state["plan"], cls.STAGE_SHARES) if state and state.get("plan") else None
        online = OnlineRun.from_json(state["online"]) if state and state.get("online") else None
        history = provenance.checked_history(state["history"]) if state else []
    except ArtifactError:
        raise
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as error:
        reason = short(" ".join(str(error).split()))
        raise ArtifactError(f"config.json or trainer_state.json is not what this version writes ({reason}): {AGAIN}") from None
    _load_named(agent, tensors["model"], ("obs_normalizer", *agent.MODEL), fresh)
    agent.has_learner = "learner" in tensors
    if agent.has_learner:
        _load_named(agent, tensors["learner"], agent.LEARNER, fresh)
    if state is not None and "optimizer" in tensors and agent.has_learner:
        _load_optimizer_side(agent, tensors["optimizer"], fresh, generators="seed" not in overrides)
        agent.plan, agent.online, agent.history = plan, online, history
    if fresh:  # what trains a new network begins anew, and is no longer the run that the plan describes
        agent.plan = agent.online = None
        new = [agent.optimizers[name] for name in fresh if name in agent.optimizers]
        for stage in agent.stages():
            if any(optimizer in part.optimizers for part in stage.updates for optimizer in new):
                agent.stage_steps[stage.name] = 0
    return agent


def need_learner(agent: Any) -> None:
    """Get the critics and other networks of a policy that was pulled to act only, and its trainer state if there is one.

    Raises RuntimeError where it was not pulled from anywhere; HubError, ArtifactError. Then the agent is as it was.
    """
    if agent.has_learner:
        return
    if agent.origin is None:
        raise RuntimeError(
            f"this {type(agent).__name__} was loaded without {TENSOR_FILES['learner']}, its critics and behaviour model: it "
            "can act, not learn; load the whole artifact"
        )
    names = [*TENSOR_FILES.values(), TRAINER_STATE, CONFIG]
    source = read(agent.origin.fetch(names, needed=[TENSOR_FILES["learner"]]))
    whole = unpack(type(agent), source, agent.device, {})
    _load_named(agent, _named(whole, agent.LEARNER), agent.LEARNER, ())
    agent.has_learner = True
    if (whole.plan is not None or whole.online is not None) and agent.n_updates == whole.n_updates:
        _load_optimizer_side(agent, _optimizer_side(whole), (), generators=False)
        if agent.seed == whole.seed:  # `predict` has gone on with its own meanwhile
            agent.generator.set_state(whole.generator.get_state())
        agent.plan, agent.online, agent.history = whole.plan, whole.online, whole.history


def _check_overrides(cls: type[Any], config: dict[str, Any], device: Any, overrides: dict[str, Any]) -> None:
    """What the caller asks for is the caller's error, not the artifact's; a knob may be right only beside the saved ones."""
    try:
        cls(device=device, **overrides)
    except ValueError:
        stored = config.get("knobs")
        if not isinstance(stored, dict):
            raise
        cls(device=device, **{**stored, **overrides})


def _build(cls: type[Any], config: dict[str, Any], tensors: dict[str, Tensors], device: Any, overrides: dict[str, Any]) -> Any:
    """The agent that `config` describes, networks new. Raises KeyError, TypeError, ... where it is not as `pack` writes it."""
    spec = Spec.from_json(config["spec"])
    sizes = {n for some in tensors.values() for tensor in some.values() for n in tensor.shape}
    if "learner" not in tensors:  # the sizes of what is not there cannot be compared
        sizes |= set(range(4097))
    numbers = _numbers(config["policy_kwargs"])
    if len(numbers) > sum(map(len, tensors.values())):
        raise ValueError("policy_kwargs name more layers than there are tensors")
    named = set(numbers) - set(range(17))  # numbers of blocks are no tensor's size
    for name in cls.SIZES:
        if not {config["knobs"][name], config["knobs"][name] + 1} & sizes:
            raise ValueError(f"{name}={config['knobs'][name]!r} is a size that no tensor has")
    if len(tensors["model"]["obs_normalizer.mean"]) != spec.obs_dim or not named <= sizes:
        raise ValueError("spec or policy_kwargs name sizes that no tensor has")  # before any memory is taken for them
    settings = {"seed": config["seed"], **{k: v for k, v in overrides.items() if k in AGENT_OVERRIDES}}
    knobs = {**config["knobs"], **{k: v for k, v in overrides.items() if k not in AGENT_OVERRIDES}}
    agent = cls(preset=config["preset"], policy_kwargs=config["policy_kwargs"], device=device, **settings, **knobs)
    agent._explicit = {name: knobs[name] for name in {*config["explicit"], *overrides} if name in knobs}
    transform, counters = config["reward_transform"], config["counters"]
    if (transform is None) != (config["dataset"] is None):
        raise ValueError("a reward transform and the dataset that it was fitted on belong together")
    agent.reward_transform = RewardTransform.from_json(transform) if transform is not None else None
    if transform is not None:
        for name in ("reward_transform", "normalize_obs"):
            if name in overrides and overrides[name] != config["knobs"].get(name):
                raise ArtifactError(
                    f"{name} was fitted when the agent first learned: make a new {cls.__name__}({name}=...) instead"
                )
    agent.dataset_info = provenance.checked_dataset(config["dataset"])
    agent.provenance = provenance.checked(config.get("provenance", {}))
    agent.num_timesteps, agent.n_env_steps, agent.n_updates = (
        whole_number(name, counters[name], 0) for name in ("num_timesteps", "n_env_steps", "n_updates")
    )
    agent.stage_steps = {name: whole_number(name, counters["stage_steps"][name], 0) for name in cls.STAGE_SHARES}
    agent._set_up(spec)
    agent._policy_missing, agent._pristine = bool(counters["policy_missing"]), bool(counters["pristine"])
    return agent


def _numbers(value: Any) -> list[int]:
    """Every whole number in nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int) else []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
