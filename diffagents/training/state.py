"""The mutable training state: counters, plan and transforms (`TrainState`), and the tensors of networks and optimisers.

`Learner` is the interface through which training, storage, export and experiments access an agent; they use no other
attribute.
"""

import copy
import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffagents.data.normalize import ObsNormalizer, RewardTransform
from diffagents.data.replay_buffer import Replay
from diffagents.errors import AGAIN, ArtifactError, short
from diffagents.training.plan import OnlineRun, Plan
from diffagents.training.updates import Noise, Optimizer, Stage
from diffagents.types import Spec

if TYPE_CHECKING:
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecEnv

Tensors = dict[str, Tensor]
GENERATORS = ("generator", "predict_generator")
"""The attributes of an agent that hold its two random generators."""
MAX_TENSORS = 10_000
"""The most parameters that the networks of a file may have, so that a small file cannot make loading take long."""


@dataclass
class TrainState:
    """The state of an agent's training, apart from the tensors of its networks and optimisers.

    Args:
        stage_steps: Total gradient steps, by stage.
        num_timesteps: Offline gradient steps plus environment steps, as SB3 counts for its callbacks.
        n_env_steps: Environment steps taken by `learn_online`.
        n_updates: Training iterations (batches drawn), offline and online.
        plan: The stages of the last `learn` and their progress; None before the first.
        online: The last run of `learn_online`; None before the first.
        history: One row for each log step: `num_timesteps`, stage, step of the stage and the means of the metrics.
        reward_transform: Fitted on the first dataset and kept from then on; None before.
        dataset_info: Metadata of the first dataset (`Transitions.info`); None before it.
        provenance: Commands, machine, seconds, evaluations: see provenance.py.
        pristine: Whether no weight has been trained or loaded yet.
        policy_missing: Whether the networks came from an official checkpoint without a policy.
        exploring: Whether `learn_online` is running.
        constraint_relaxation: Factor, at least 1, by which the behaviour constraint is weakened during `learn_online`.
    """

    stage_steps: dict[str, int]
    num_timesteps: int = 0
    n_env_steps: int = 0
    n_updates: int = 0
    plan: Plan | None = None
    online: OnlineRun | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    reward_transform: RewardTransform | None = None
    dataset_info: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    pristine: bool = True
    policy_missing: bool = False
    exploring: bool = False
    constraint_relaxation: float = 1.0

    def copy(self) -> "TrainState":
        """A state whose fields can be assigned without changing this one; what they hold is shared."""
        return dataclasses.replace(self)

    @property
    def data(self) -> dict[str, Any]:
        """`dataset_info`, once there is a dataset. Raises RuntimeError before that."""
        if self.dataset_info is None:
            raise RuntimeError("this agent has not learned from a dataset yet: call learn(data) first")
        return self.dataset_info


class HubCommit(Protocol):
    """The commit on the Hub that an agent was downloaded from; `storage.hub.Origin` implements it."""

    @property
    def repo_id(self) -> str: ...
    @property
    def sha(self) -> str: ...
    def fetch(self, names: Sequence[str], needed: Sequence[str] = ...) -> Path: ...


class Learner(Protocol):
    """An agent as training, storage and deployment see it; `diffagents.agent.Agent` documents each member."""

    Config: ClassVar[type[Any]]
    STAGE_SHARES: ClassVar[dict[str, int]]
    POLICY_STAGE: ClassVar[str]
    MODEL: ClassVar[tuple[str, ...]]
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]]
    OFFLINE_RATIO: ClassVar[float | str]
    CALIBRATES: ClassVar[bool]
    CHOICE: ClassVar[tuple[str, ...]]
    HEALTHY: ClassVar[dict[str, str]]

    config: Any
    explicit: dict[str, Any]
    preset: str | None
    policy_kwargs: dict[str, Any]
    obs_keys: tuple[str, ...] | None
    seed: int
    device: torch.device
    compile: str
    threads: int | str
    tf32: bool
    record_command: bool
    verbose: int
    tensorboard_log: str | None

    spec: Spec | None
    obs_dim: int
    act_dim: int
    obs_normalizer: ObsNormalizer
    optimizers: dict[str, Optimizer]
    generator: torch.Generator
    predict_generator: torch.Generator
    state: TrainState
    has_training_networks: bool
    origin: HubCommit | None
    replay_buffer: Replay | None
    env: "VecEnv | None"
    sb3_logger: "Logger | None"
    ep_info_buffer: deque[dict[str, Any]]
    ep_success_buffer: deque[bool]

    def __init__(self, policy: str = ..., env: Any = ..., **settings: Any) -> None: ...
    @classmethod
    def presets_name(cls) -> str: ...
    @property
    def n_envs(self) -> int: ...
    def build(self) -> None: ...
    def set_up(self, spec: Spec) -> None: ...
    @property
    def acts_deterministically(self) -> bool: ...
    def require_spec(self) -> Spec: ...
    def networks(self) -> dict[str, nn.Module]: ...
    def stages(self, plan: Plan | None) -> list[Stage]: ...
    def online_stage(self) -> Stage: ...
    def act(self, obs: Tensor, noise: Noise, config: Any) -> Tensor: ...
    def draw_act(self, n: int, deterministic: bool, config: Any, generator: torch.Generator) -> Noise: ...
    def predict(
        self, observation: Any, state: Any = ..., episode_start: Any = ..., deterministic: bool | None = ..., **choice: Any
    ) -> tuple[np.ndarray, Any]: ...
    def evaluate(self, env: Any = ..., n_episodes: int = ..., *, choice: Any = ..., **kwargs: Any) -> Any: ...
    def set_env(self, env: Any, force_reset: bool = ...) -> None: ...
    def get_vec_normalize_env(self) -> Any: ...
    def dump_logs(self) -> None: ...


# ---- the tensors of a learner ----------------------------------------------------------------------------------------
def network_tensors(learner: Learner, names: Sequence[str]) -> Tensors:
    """The tensors (not copies) of the networks listed in `names`, as `<network>.<key of its state dict>`."""
    return {f"{name}.{key}": value for name in names for key, value in getattr(learner, name).state_dict().items()}


def load_network_tensors(learner: Learner, tensors: Tensors, names: Sequence[str], fresh: Sequence[str] = ()) -> None:
    """Load the output of `network_tensors` in place, except for the networks named in `fresh`.

    Raises:
        ArtifactError: A tensor belongs to no network of `names`, or names, shapes or dtypes differ.
    """
    stray = [key for key in tensors if key.partition(".")[0] not in names]
    if stray:
        raise ArtifactError(f"unexpected tensor {short(stray[0])!r}: the artifact belongs to another version or algorithm")
    for name in names:
        if name not in fresh:
            load_state(getattr(learner, name), tensors, f"{name}.")


def optimizer_and_generator_tensors(learner: Learner) -> Tensors:
    """The moments of every optimiser (not copies) and the states of both generators, under unique names."""
    tensors: Tensors = {}
    for name, optimizer in learner.optimizers.items():
        tensors |= optimizer_tensors(optimizer, f"optimizer.{name}")
    for name in GENERATORS:
        tensors[f"{name}.state"] = getattr(learner, name).get_state()
    return tensors


def load_optimizer_and_generator_tensors(
    learner: Learner, tensors: Tensors, fresh: Sequence[str] = (), generators: bool = True
) -> None:
    """Load the output of `optimizer_and_generator_tensors` in place, except for the optimisers named in `fresh`.

    A generator's state is skipped if it was saved on another type of device.
    """
    for name, optimizer in learner.optimizers.items():
        if name not in fresh:
            load_optimizer(optimizer, tensors, f"optimizer.{name}")
    for name in GENERATORS if generators else ():
        state = tensors.get(f"{name}.state")
        if state is not None and len(state) == len(getattr(learner, name).get_state()):
            getattr(learner, name).set_state(state.cpu())


def training_tensors(learner: Learner) -> Tensors:
    """Every tensor that training changes (not copies), under unique names."""
    names = ("obs_normalizer", *learner.MODEL, *learner.TRAINING_NETWORKS)
    return {**network_tensors(learner, names), **optimizer_and_generator_tensors(learner)}


def load_training_tensors(learner: Learner, tensors: Tensors) -> None:
    """Load clones of the output of `training_tensors` in place."""
    names = ("obs_normalizer", *learner.MODEL, *learner.TRAINING_NETWORKS)
    load_network_tensors(learner, {k: v for k, v in tensors.items() if k.partition(".")[0] in names}, names)
    others = {k: v for k, v in tensors.items() if k.partition(".")[0] in ("optimizer", *GENERATORS)}
    load_optimizer_and_generator_tensors(learner, others)


def networks_on_meta(learner: Learner, spec: Spec) -> Tensors:
    """Names, shapes and dtypes of the networks' tensors for `spec`, on the meta device, which allocates no memory.

    Raises:
        ArtifactError: The networks cannot be built, or have more than MAX_TENSORS parameters.
    """
    trial = copy.copy(learner)
    trial.device, trial.spec = torch.device("meta"), spec
    trial.obs_dim, trial.act_dim = spec.obs_dim, spec.act_dim
    n_parameters = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal n_parameters
        n_parameters += 1
        if n_parameters > MAX_TENSORS:  # a module takes memory even if its tensors take none
            raise RuntimeError(f"they have more than {MAX_TENSORS:,} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            trial.obs_normalizer = ObsNormalizer(spec.obs_dim)
            trial.build()
    except RuntimeError as error:  # torch has limits of its own
        raise ArtifactError(f"config.json describes networks that cannot be built ({short(error)}): {AGAIN}") from None
    finally:
        handle.remove()
    return network_tensors(trial, ("obs_normalizer", *learner.MODEL, *learner.TRAINING_NETWORKS))


def bare(key: str) -> str:
    """Strip `torch.compile`'s prefix `_orig_mod.` from a key of a state dict."""
    return key.replace("_orig_mod.", "")


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy the tensors named `prefix` + parameter or buffer into the module, in place; other prefixes are ignored.

    Raises:
        ArtifactError: Names, shapes or dtypes are not exactly the module's. In that case nothing is copied.
    """
    expected = {prefix + bare(key): value for key, value in module.state_dict().items()}
    given = {bare(key): value for key, value in tensors.items() if key.startswith(prefix)}
    check_alike(given, expected)
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(given[key])


def check_alike(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ArtifactError unless both have the same names, each with the same shape and dtype."""
    for keys, what in ((expected.keys() - given.keys(), "lacks"), (given.keys() - expected.keys(), "has the unexpected")):
        if keys:
            some = ", ".join(map(short, sorted(keys)[:3])) + (", ..." if len(keys) > 3 else "")
            raise ArtifactError(f"the artifact {what} {some} ({len(keys)} tensors): it belongs to another network or version")
    for key, value in expected.items():
        _check_like(given[key], value, key)


def _check_like(given: Tensor, expected: Tensor, name: str) -> None:
    if given.shape != expected.shape or given.dtype != expected.dtype:
        found, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (given, expected))
        raise ArtifactError(
            f"{short(name)} is {found} in the artifact but {wanted} here: it belongs to another network or space"
        )


def optimizer_tensors(optimizer: Any, prefix: str) -> dict[str, Tensor]:
    """The moments of an Adam or AdamW as `<prefix>.<i>.<key>`, i in the order of its parameters; empty before its first step.

    The tensors are not copies. Learning rates and other settings are not included: the agent sets them.
    """
    states = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    return {f"{prefix}.{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}


def load_optimizer(optimizer: Any, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Load the output of `optimizer_tensors` into an optimiser over the same parameters, in place if it has taken a step.

    Raises:
        ArtifactError: Names, shapes or dtypes do not fit the parameters. In that case nothing is changed.
    """
    given = {name: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
    places = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    states: list[dict[str, Tensor]] = []
    for i, (parameter, group) in enumerate(places):
        # Adam keeps the step count on the parameter's device only if fused or capturable.
        step = torch.zeros((), device=parameter.device if group["fused"] or group["capturable"] else "cpu")
        likes = {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}
        found = {key: given.pop(f"{prefix}.{i}.{key}") for key in likes if f"{prefix}.{i}.{key}" in given}
        if found and len(found) < len(likes):
            raise ArtifactError(f"the artifact has only {sorted(found)} of {prefix}.{i}, not {sorted(likes)}: {AGAIN}")
        for key, value in found.items():
            _check_like(value, likes[key], f"{prefix}.{i}.{key}")
            if key != "exp_avg" and bool((value < 0).any()):
                raise ArtifactError(f"the artifact's {prefix}.{i}.{key} contains negative numbers: {AGAIN}")
        states.append({key: torch.zeros_like(likes[key], requires_grad=False).copy_(found[key]) for key in found})
    if given:
        raise ArtifactError(f"the artifact has {short(min(given))}, but this optimiser has only {len(places)} parameters")
    for (parameter, _), state in zip(places, states, strict=True):
        old = optimizer.state.pop(parameter, {})
        if state:  # reuse existing memory, which a captured CUDA graph may reference
            optimizer.state[parameter] = {key: old[key].copy_(new) if key in old else new for key, new in state.items()}


# ---- snapshots -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Snapshot:
    """A copy of the whole training state, on its device, to be restored after divergence or timing."""

    tensors: Tensors
    num_timesteps: int
    n_env_steps: int
    n_updates: int
    stage_steps: dict[str, int]
    plan_done: dict[str, int]
    online_updates: int
    schedule_steps: Tensors


def snapshot(learner: Learner) -> Snapshot:
    """Clone the training state of `learner`."""
    state = learner.state
    return Snapshot(
        tensors={name: tensor.clone() for name, tensor in training_tensors(learner).items()},
        num_timesteps=state.num_timesteps,
        n_env_steps=state.n_env_steps,
        n_updates=state.n_updates,
        stage_steps=dict(state.stage_steps),
        plan_done={} if state.plan is None else dict(state.plan.done),
        online_updates=0 if state.online is None else state.online.n_updates,
        schedule_steps={name: optimizer.n_steps.clone() for name, optimizer in learner.optimizers.items()},
    )


def restore(learner: Learner, good: Snapshot) -> None:
    """Restore a snapshot in place. `n_env_steps` is not rolled back, because the replay buffer keeps those transitions."""
    load_training_tensors(learner, good.tensors)
    state = learner.state
    state.num_timesteps = good.num_timesteps + state.n_env_steps - good.n_env_steps
    state.n_updates, state.stage_steps = good.n_updates, dict(good.stage_steps)
    if state.plan is not None:
        state.plan.done = dict(good.plan_done)
    if state.online is not None:
        state.online.n_updates = good.online_updates
    for name, step in good.schedule_steps.items():
        learner.optimizers[name].n_steps.copy_(step)
