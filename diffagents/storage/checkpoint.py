"""Converts an agent to the content of an artifact and back: config, tensors, trainer state. artifact.py handles the files.

config.json            hyperparameters, spaces, seed, transforms, dataset, provenance and the counters of steps and updates
model.safetensors      the networks that `predict` needs, the observation normaliser included
learner.safetensors    all other networks, target networks included, which only training needs
optimizer.safetensors  the optimisers' moments and step counts, and both random generators
trainer_state.json     plan, online run and history

With the last two, training resumes bit for bit. `learn_online` also needs its replay buffer, which is a
separate file (`Agent.save_replay_buffer`). Learning rates and extras are recomputed from the plan and the data.
"""

import dataclasses
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffagents.config.checks import whole_number
from diffagents.config.presets import FAST
from diffagents.data.normalize import RewardTransform
from diffagents.errors import AGAIN, ArtifactError, short
from diffagents.storage.artifact import CONFIG, TENSOR_FILES, TRAINER_STATE, Artifact, read
from diffagents.training import provenance
from diffagents.training.plan import OnlineRun, Plan
from diffagents.training.state import (
    Learner,
    Tensors,
    TrainState,
    check_alike,
    load_network_tensors,
    load_optimizer_and_generator_tensors,
    network_tensors,
    networks_on_meta,
    optimizer_and_generator_tensors,
)
from diffagents.types import Spec

L = TypeVar("L", bound=Learner)
Packed = tuple[dict[str, Any], dict[str, Tensors], dict[str, Any] | None]
"""(config, {"model": ..., "learner": ..., "optimizer": ...}, trainer state or None)"""
AGENT_OVERRIDES = ("seed", "verbose", "tensorboard_log", "compile", "threads", "tf32", "record_command")
"""Arguments of the constructor that may be changed when an agent is loaded; all others are hyperparameters."""
MAX_NETWORK_BYTES = 1 << 32
"""The largest size of the networks that a file without learner.safetensors may describe."""
SMALLEST_STD = 1e-8
"""Far below what any algorithm stores: `ObsNormalizer.fit` adds 0.001, SfBC's critic has at least 0.1."""


def pack(learner: Learner, trainer_state: bool) -> Packed:
    """The content of an artifact of an agent with networks.

    Args:
        learner: The agent. If it was downloaded to act only, its other networks are downloaded now; offline they are left
            out.
        trainer_state: Whether to include optimisers, generators, plan and history.
    """
    spec, state = learner.require_spec(), learner.state
    if not learner.has_training_networks and learner.origin is not None:
        try:
            fetch_training_networks(learner)
        except OSError as error:
            warnings.warn(f"saving without critics and behaviour model, to act only: {error}", stacklevel=3)
    config = {
        "library": "diffagents",
        "algorithm": type(learner).__name__,
        "knobs": dataclasses.asdict(learner.config),  # the hyperparameters
        "explicit": sorted(learner.explicit),
        "policy_kwargs": learner.policy_kwargs,
        "preset": learner.preset,
        "seed": learner.seed,
        "spec": spec.to_json(),
        "reward_transform": state.reward_transform.to_json() if state.reward_transform is not None else None,
        "dataset": state.dataset_info,
        "provenance": state.provenance,
        "counters": {
            "num_timesteps": state.num_timesteps,
            "n_env_steps": state.n_env_steps,
            "n_updates": state.n_updates,
            "stage_steps": state.stage_steps,
            "policy_missing": state.policy_missing,
            "pristine": state.pristine,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: provenance.package_version(name) for name in ("diffagents", "torch", "gymnasium")},
        },
    }
    tensors = {"model": network_tensors(learner, ("obs_normalizer", *learner.MODEL))}
    if learner.has_training_networks:
        tensors["learner"] = network_tensors(learner, learner.TRAINING_NETWORKS)
    if not trainer_state:
        return config, tensors, None
    tensors["optimizer"] = optimizer_and_generator_tensors(learner)
    runs = {name: run.to_json() if run else None for name, run in (("plan", state.plan), ("online", state.online))}
    return config, tensors, {**runs, "history": state.history}


def counters_at(path: str | Path) -> dict[str, int] | None:
    """The counters of the agent at a path, as a replay buffer stores them; None if there is no agent."""
    try:
        counters = read(path).config["counters"]
        return {"environment steps": counters["n_env_steps"], "updates": counters["n_updates"]}
    except (OSError, ArtifactError, KeyError, TypeError):
        return None


def unpack(cls: type[L], source: Artifact, device: str | torch.device, overrides: dict[str, Any], env: Any = None) -> L:
    """The agent that was written to an artifact.

    Args:
        cls: Its class.
        source: The artifact.
        device: As in the constructor.
        overrides: Hyperparameters and AGENT_OVERRIDES to change.
        env: As in `Agent.set_env`; None: no environment.

    Raises:
        ArtifactError: It is of another class, or not what this version writes.
        TypeError, ValueError: `overrides` has an unknown name or a value out of its range, or the spaces of `env` differ.
    """
    algorithm = short(source.config.get("algorithm"))
    if algorithm != cls.__name__:
        raise ArtifactError(
            f"{source} contains an agent of {algorithm}, not of {cls.__name__}: use diffagents.load(path) or {algorithm}.load"
        )
    tensors = {name: source.tensors(name) for name in ("model", "learner", "optimizer") if source.has(name)}
    learner = rebuild(cls, source.config, tensors, source.trainer_state(), device, overrides, ())
    if env is not None:
        learner.set_env(env)
    if source.origin is not None:
        learner.origin = source.origin
        learner.state.provenance |= {"source": {"repo_id": source.origin.repo_id, "sha": source.origin.sha}}
    return learner


def rebuild(
    cls: type[L],
    config: dict[str, Any],
    tensors: dict[str, Tensors],
    trainer_state: dict[str, Any] | None,
    device: str | torch.device,
    overrides: dict[str, Any],
    fresh: Sequence[str],
) -> L:
    """Build an agent from the output of `pack`; `overrides` as in `unpack`, networks named in `fresh` are reinitialised."""
    unknown = [name for name in fresh if name not in (*cls.MODEL, *cls.TRAINING_NETWORKS)]
    if unknown:
        raise ValueError(f"fresh={tuple(fresh)} names {unknown[0]!r}; the networks are {[*cls.MODEL, *cls.TRAINING_NETWORKS]}")
    for name in overrides:
        if name in ("policy_kwargs", "preset", "obs_keys", "device", "env"):
            raise TypeError(
                f"{name} belongs to the saved networks and cannot be changed here: create a new {cls.__name__}(...)"
            )
    _check_overrides(cls, config, device, overrides)
    try:
        learner = _build(cls, config, tensors, device, overrides)
        plan = online = None
        history: list[dict[str, Any]] = []
        if trainer_state is not None:
            if trainer_state.get("plan"):
                plan = Plan.from_json(trainer_state["plan"], cls.STAGE_SHARES)
            if trainer_state.get("online"):
                online = OnlineRun.from_json(trainer_state["online"])
            history = provenance.checked_history(trainer_state["history"])
    except ArtifactError:
        raise
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = short(" ".join(str(error).split()))
        raise ArtifactError(f"config.json or trainer_state.json is not what this version writes ({reason}): {AGAIN}") from None
    load_network_tensors(learner, tensors["model"], ("obs_normalizer", *learner.MODEL), fresh)
    learner.has_training_networks = "learner" in tensors
    if learner.has_training_networks:
        load_network_tensors(learner, tensors["learner"], learner.TRAINING_NETWORKS, fresh)
    state = learner.state
    if trainer_state is not None and "optimizer" in tensors and learner.has_training_networks:
        load_optimizer_and_generator_tensors(learner, tensors["optimizer"], fresh, generators="seed" not in overrides)
        state.plan, state.online, state.history = plan, online, history
    if fresh:  # the stages that train a new network restart, so the saved plan no longer applies
        state.plan = state.online = None
        new = [learner.optimizers[name] for name in fresh if name in learner.optimizers]
        for stage in learner.stages(None):
            if any(optimizer in update.optimizers for update in stage.updates for optimizer in new):
                state.stage_steps[stage.name] = 0
    return learner


def fetch_training_networks(learner: Learner) -> None:
    """Download the critics and other networks of a policy that was loaded to act only, and its trainer state if there is one.

    Raises:
        RuntimeError: The agent was not downloaded from the Hub.
        HubError, ArtifactError: The download failed. The agent is unchanged.
    """
    if learner.has_training_networks:
        return
    if learner.origin is None:
        raise RuntimeError(
            f"this {type(learner).__name__} was loaded without {TENSOR_FILES['learner']}, its critics and behaviour model: it "
            "can act but not learn; load the whole artifact"
        )
    names = [*TENSOR_FILES.values(), TRAINER_STATE, CONFIG]
    source = read(learner.origin.fetch(names, needed=[TENSOR_FILES["learner"]]), learner.origin)
    whole = unpack(type(learner), source, learner.device, {})
    load_network_tensors(learner, network_tensors(whole, learner.TRAINING_NETWORKS), learner.TRAINING_NETWORKS)
    learner.has_training_networks = True
    state = learner.state
    if (whole.state.plan is not None or whole.state.online is not None) and state.n_updates == whole.state.n_updates:
        load_optimizer_and_generator_tensors(learner, optimizer_and_generator_tensors(whole), generators=False)
        if learner.seed == whole.seed:  # `predict` has used its own generator meanwhile
            learner.generator.set_state(whole.generator.get_state())
        state.plan, state.online, state.history = whole.state.plan, whole.state.online, whole.state.history


def _check_overrides(cls: type[L], config: dict[str, Any], device: str | torch.device, overrides: dict[str, Any]) -> None:
    """Report a wrong override as the caller's error, not the artifact's. Some are valid only with the saved values."""
    try:
        cls(preset=None, device=device, **overrides)
    except ValueError:
        stored = config.get("knobs")
        if not isinstance(stored, dict):
            raise
        cls(preset=None, device=device, **{**stored, **overrides})


def _build(
    cls: type[L], config: dict[str, Any], tensors: dict[str, Tensors], device: str | torch.device, overrides: dict[str, Any]
) -> L:
    """The agent that `config` describes, with new networks. Raises KeyError, TypeError, ... if `pack` did not write it."""
    spec = Spec.from_json(config["spec"])
    if len(_numbers(config["policy_kwargs"])) > sum(map(len, tensors.values())):
        raise ValueError("policy_kwargs name more layers than there are tensors")
    settings = {"seed": config["seed"], **{k: v for k, v in overrides.items() if k in AGENT_OVERRIDES}}
    values = {**config["knobs"], **{k: v for k, v in overrides.items() if k not in AGENT_OVERRIDES}}
    preset = config["preset"]  # "fast" has set the stored values already; any other is checked, and applied by `learn`
    settings |= {"preset": None if preset == FAST else preset, "policy_kwargs": config["policy_kwargs"], "device": device}
    learner = cls(**settings, **values)
    learner.preset = preset
    learner.explicit = {name: values[name] for name in {*config["explicit"], *overrides} if name in values}
    transform, counters = config["reward_transform"], config["counters"]
    if (transform is None) != (config["dataset"] is None):
        raise ValueError("a reward transform needs the dataset that it was fitted on, and vice versa")
    if transform is not None:
        for name in ("reward_transform", "normalize_obs"):
            if name in overrides and overrides[name] != config["knobs"].get(name):
                raise ArtifactError(
                    f"{name} was fitted when the agent first learned: create a new {cls.__name__}({name}=...) instead"
                )
    learner.state = TrainState(
        stage_steps={name: whole_number(name, counters["stage_steps"][name], 0) for name in cls.STAGE_SHARES},
        num_timesteps=whole_number("num_timesteps", counters["num_timesteps"], 0),
        n_env_steps=whole_number("n_env_steps", counters["n_env_steps"], 0),
        n_updates=whole_number("n_updates", counters["n_updates"], 0),
        reward_transform=RewardTransform.from_json(transform) if transform is not None else None,
        dataset_info=provenance.checked_dataset(config["dataset"]),
        provenance=provenance.checked(config.get("provenance", {})),
        pristine=bool(counters["pristine"]),
        policy_missing=bool(counters["policy_missing"]),
    )
    _check_networks(learner, spec, tensors)
    learner.set_up(spec)
    return learner


def _check_networks(learner: Learner, spec: Spec, tensors: dict[str, Tensors]) -> None:
    """Check names, shapes, dtypes and divisors of the networks before any memory is allocated. Raises ArtifactError."""
    expected = networks_on_meta(learner, spec)
    for part, names in (("model", ("obs_normalizer", *learner.MODEL)), ("learner", learner.TRAINING_NETWORKS)):
        if part in tensors:
            check_alike(tensors[part], {key: value for key, value in expected.items() if key.partition(".")[0] in names})
    for key, value in {**tensors["model"], **tensors.get("learner", {})}.items():
        if key.endswith(".std") and value.numel() and float(value.min()) < SMALLEST_STD:  # everything is divided by it
            raise ArtifactError(
                f"{key} contains {float(value.min()):g}, which is no standard deviation (at least {SMALLEST_STD:g}): {AGAIN}"
            )
    if "learner" not in tensors:  # nothing to compare with: only the size is limited
        n_bytes = sum(value.numel() * value.element_size() for value in expected.values())
        if n_bytes > MAX_NETWORK_BYTES:
            raise ArtifactError(
                f"config.json describes networks of {n_bytes:,} bytes, more than {MAX_NETWORK_BYTES:,}: {AGAIN}"
            )


def _numbers(value: Any, depth: int = provenance.MAX_DEPTH) -> list[int]:
    """Every whole number in nested dicts and lists. Raises ValueError if they are nested too deeply to be written again."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        if depth == 0:
            raise ValueError("policy_kwargs are nested too deeply")
        return [number for item in value for number in _numbers(item, depth - 1)]
    return [value] if isinstance(value, int) else []
