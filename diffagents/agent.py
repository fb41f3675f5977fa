"""Agent: the public methods of every agent (`learn`, `predict`, `save`, `load`, `push_to_hub`, ...), with SB3's names.

An algorithm's file defines `Config`, `build`, `stages`, `online_stage` and `act`, losses included. The methods here delegate to
the packages data, training, storage, deploy and evaluation.
"""

import copy
import functools
import io
import pathlib
import secrets
import types
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from diffagents.config import presets
from diffagents.config.checks import check_arguments, check_choice, find_device, n_cuda_devices, whole_number
from diffagents.config.hyperparameters import agent_doc, build_config, choose, signature
from diffagents.data.load import load_dataset
from diffagents.data.normalize import ObsNormalizer, RewardTransform
from diffagents.data.replay_buffer import Replay, previous_of
from diffagents.deploy.compiled_policy import compiled_act
from diffagents.deploy.numpy_policy import NumpyPath
from diffagents.envs.make import warn_of_another_env
from diffagents.envs.vec_env import as_vec_env, check_same_spaces, stub_env
from diffagents.evaluation.evaluate import Evaluation, evaluate
from diffagents.networks.mlp import TanhPolicy
from diffagents.storage import artifact, checkpoint, hub
from diffagents.training import offline, online, prepare
from diffagents.training.callbacks import make_callback, make_logger, with_history
from diffagents.training.compiled import Compiled
from diffagents.training.plan import MODES, OnlineSettings, Plan
from diffagents.training.state import HubCommit, TrainState, load_state
from diffagents.training.threads import check_threads
from diffagents.training.updates import Noise, Optimizer, Stage
from diffagents.types import Spec

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecEnv

    class_method = classmethod
else:

    class class_method(classmethod):
        """A class method that warns when it is called on an instance, where people throw its result away."""

        def __get__(self, instance: Any, owner: Any = None) -> Callable[..., Any]:
            method = super().__get__(instance, owner)
            if instance is None:
                return method

            @functools.wraps(method)
            def call(*args: Any, **kwargs: Any) -> Any:
                warnings.warn(
                    f"{method.__name__} returns a new agent and leaves this one as it is: "
                    f"write agent = {type(instance).__name__}.{method.__name__}(...)",
                    stacklevel=2,
                )
                return method(*args, **kwargs)

            return call


class Agent(ABC):
    """Base of all agents.

    Args:
        policy: "MlpPolicy", the only supported policy; "MultiInputPolicy" is accepted as the same for Dict observations.
        env: None, an environment id, a Gymnasium Env or an SB3 VecEnv. Defines the spaces and is used by callbacks.
        preset: "fast", a recipe for all datasets that takes minutes on a CPU (the block `fast` of zoo/<algorithm>.yml; an
            algorithm without such a file has none); None, the paper's algorithm as its Config declares it; "auto" (the paper's
            row for the dataset's id); "paper" (that row with the paper's budget); or a row's name.
        obs_keys: Which entries of a Dict observation to concatenate, in this order.
        policy_kwargs: `net_arch`, a list or a dict such as {"pi": [256, 256], "qf": [256, 256]}.
        tensorboard_log: Folder of TensorBoard logs.
        verbose: 0 silent, 1 one line per log step, 2 also SB3's tables.
        seed: None: drawn at random and stored in `agent.seed`.
        device: "auto": CUDA if it is available.
        compile: How updates run: "eager"; "compiled" (tens of seconds to compile, then faster); "graph", compiled and in a CUDA
            graph; "auto", whichever is expected to be fastest for the length of the run. All agree to float tolerance; a stage
            that cannot be compiled, or not within five minutes, runs eagerly.
        threads: The number of CPU threads for training. "auto": all that torch has in this process, but one for each stage of
            `learn` that runs faster with one when `learn` begins, as it does while other processes use the cores. Results of
            different numbers of threads are rounded differently: a fixed number, e.g. threads=1, makes runs of one seed equal
            to the bit, whatever else the machine does. A resumed run keeps the numbers of its plan unless `threads` is one.
        tf32: On a GPU, let matrix products use TF32 during training (about 1e-3 relative; faster).
        record_command: Whether the command line that trains the agent is stored with it and shown on its card, with `***` for
            every word that is not known to be harmless.
        hyperparameters: The algorithm's hyperparameters; `help(<Algorithm>)` lists them.

    Raises:
        TypeError: An unknown hyperparameter.
        ValueError: A value out of its range, an unknown preset, or an environment whose spaces are unsupported.
    """

    Config: ClassVar[type[Any]]
    """The frozen dataclass of the algorithm's hyperparameters."""
    STAGE_SHARES: ClassVar[dict[str, int]]
    """The stages in order, with gradient steps in the proportion of the paper's schedule."""
    POLICY_STAGE: ClassVar[str]
    """The stage that trains the policy."""
    MODEL: ClassVar[tuple[str, ...]]
    """Attributes with the networks that `predict` needs: model.safetensors."""
    TRAINING_NETWORKS: ClassVar[tuple[str, ...]]
    """Attributes with all other networks, which only training needs: learner.safetensors."""
    OFFLINE_RATIO: ClassVar[float | str] = 0.5
    """The default share of offline data in a batch of `learn_online`, or "uniform"."""
    CALIBRATES: ClassVar[bool] = False
    """Whether the critic bootstraps from the policy's actions, so that `calibrate=True` applies."""
    CHOICE: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that can be overridden in one call of `predict`."""
    HEALTHY: ClassVar[dict[str, str]] = {}
    """Metric -> a sentence about a healthy curve, where that of `evaluation.curves.HEALTHY` does not hold or is missing."""

    config: Any
    obs_dim: int
    act_dim: int
    policy: nn.Module
    optimizers: dict[str, Optimizer]

    def __init_subclass__(cls) -> None:
        """Show an algorithm's hyperparameters in `help()` and in editors, though they arrive as keyword arguments."""
        cls.__signature__ = signature(Agent.__init__, cls.Config)  # type: ignore[attr-defined]
        if cls.__dict__.get("__doc__"):
            cls.__doc__ = agent_doc(cls.__dict__["__doc__"], cls.Config)

    def __init__(
        self,
        policy: str = "MlpPolicy",
        env: Any = None,
        *,
        preset: str | None = presets.FAST,
        obs_keys: Sequence[str] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 1,
        seed: int | None = None,
        device: str | torch.device = "auto",
        compile: str = "auto",
        threads: int | str = "auto",
        tf32: bool = True,
        record_command: bool = False,
        **hyperparameters: Any,
    ) -> None:
        check_arguments(policy, obs_keys, policy_kwargs)
        check_choice("compile", compile, ("auto", *MODES))
        self.explicit = dict(hyperparameters)  # these take precedence over any preset
        if preset == presets.FAST and not presets.has_presets(self.presets_name()):
            preset = None  # an algorithm of the user's own
        values: dict[str, Any] = {}
        if preset is not None:  # raises for an unknown name at once
            resolved = presets.resolve_preset(self.presets_name(), preset, None)[1]
            values = resolved if preset == presets.FAST else values  # the others depend on the dataset
        self.preset, self.policy_kwargs = preset, {**values.pop("policy_kwargs", {}), **(policy_kwargs or {})}
        try:
            self.config = build_config(self.Config, type(self).__name__, {**values, **hyperparameters})
        except ValueError as error:
            try:
                build_config(self.Config, type(self).__name__, hyperparameters)
            except ValueError:  # they are wrong by themselves
                raise error from None
            raise ValueError(f"{error}; preset={preset!r} set the other value: pass your own, or preset=None") from None
        self.obs_keys = tuple(obs_keys) if obs_keys is not None else None
        self.tensorboard_log, self.verbose = tensorboard_log, verbose
        self.compile, self.threads, self.tf32, self.record_command = compile, check_threads(threads), tf32, record_command
        self.device = find_device(device)
        self.set_random_seed(seed)
        self.state = TrainState(stage_steps=dict.fromkeys(self.STAGE_SHARES, 0))
        self.spec: Spec | None = None
        self.replay_buffer: Replay | None = None
        self.origin: HubCommit | None = None  # the commit on the Hub that the agent was downloaded from
        self.has_training_networks = True  # False: loaded without learner.safetensors, to act only
        self.env: VecEnv | None = None
        self.sb3_logger: Logger | None = None
        self.ep_info_buffer: deque[dict[str, Any]] = deque(maxlen=100)  # of the last episodes of `learn_online`, as in SB3
        self.ep_success_buffer: deque[bool] = deque(maxlen=100)
        self._stub: VecEnv | None = None
        self._numpy_path = NumpyPath() if self.device.type == "cpu" else None
        self._compiled: dict[Any, Compiled] = {}  # by number of observations, deterministic, config
        if env is not None:
            self.env = as_vec_env(env)
            self.set_up(Spec.from_spaces(self.env.observation_space, self.env.action_space, self.obs_keys))

    # ---- implemented by the algorithms -----------------------------------------------------------------------------
    @abstractmethod
    def build(self) -> None:
        """Make the networks (the attributes named in MODEL and TRAINING_NETWORKS) and `optimizers` for `self.spec`."""

    @abstractmethod
    def stages(self, plan: Plan | None = None) -> list[Stage]:
        """The stages in the order in which they run, named as in STAGE_SHARES.

        Args:
            plan: The plan, if updates depend on the lengths of the stages; None: the current plan.

        Raises:
            ValueError: The algorithm cannot run this plan.
        """

    @abstractmethod
    def online_stage(self) -> Stage:
        """The stage that `learn_online` trains; its steps are the updates of the run."""

    @abstractmethod
    def act(self, obs: Tensor, noise: Noise, config: Any) -> Tensor:
        """Normalised observations (B, S) -> actions (B, A) in [-1, 1]; a pure function.

        Args:
            obs: Normalised observations (B, S).
            noise: From `draw_act`.
            config: The agent's configuration, with the overrides of this call of `predict` (CHOICE).
        """

    def draw_act(self, n: int, deterministic: bool, config: Any, generator: torch.Generator) -> Noise:
        """The noise of `act` for n observations; if deterministic, the stored noise, with batch size 1 to broadcast."""
        return {}

    def point_policy(self, deterministic: bool) -> TanhPolicy | None:
        """The policy network if it can be evaluated in numpy, else None."""
        return None

    # ---- learning --------------------------------------------------------------------------------------------------
    def learn(
        self,
        dataset: Any = None,
        total_timesteps: int | None = None,
        callback: Any = None,
        log_interval: int | None = None,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        stages: Sequence[str] | None = None,
    ) -> Self:
        """Train on a dataset.

        Args:
            dataset: Anything that `load_dataset` reads. It has a default for the sake of its error message only.
            total_timesteps: Total gradient steps, split over the stages in the paper's proportion. None: each stage's `*_steps`
                hyperparameter, else the preset.
            callback: An SB3 callback, a function of (locals, globals), or a list of them; called after each gradient step.
            log_interval: Gradient steps between log steps. None: a twentieth of the stage, at most 1000.
            tb_log_name: Name of the run in TensorBoard; the algorithm's by default.
            reset_num_timesteps: False resumes an interrupted run, which ends as if it had not been interrupted. If the plan is
                finished, total_timesteps or stages start a new one that continues the counters.
            progress_bar: Show SB3's progress bar.
            stages: Train only these stages, e.g. ("policy",), with the others as already trained.

        Returns:
            The agent itself.

        Raises:
            TypeError: `dataset` is missing or of a wrong kind.
            ValueError: Bad data or arguments; raised before any work; the agent is unchanged.
            TrainingDiverged: NaN, or Q has diverged; the agent is restored to its last good state.
            KeyboardInterrupt: After Ctrl-C, at the end of the current update. The agent can be saved and the run
                resumed later.
        """
        prepare.check_arguments(self, total_timesteps, stages, log_interval)
        checkpoint.fetch_training_networks(self)
        data = load_dataset(dataset, env=self.env, obs_keys=self.obs_keys, verbose=self.verbose)
        candidate = self.candidate()
        plan, data = prepare.accept(candidate, data, total_timesteps, reset_num_timesteps, stages)
        sb3_callback = make_callback(callback, progress_bar)
        self._become_and_init(candidate, sb3_callback)
        del candidate
        if plan is not None:
            offline.train(self, plan, data, sb3_callback, log_interval, tb_log_name, reset_num_timesteps)
        return self

    def learn_online(
        self,
        total_timesteps: int | None = None,
        env: Any = None,
        dataset: Any = None,
        callback: Any = None,
        log_interval: int | None = None,
        tb_log_name: str | None = None,
        progress_bar: bool = False,
        *,
        offline_ratio: float | str | None = None,
        learning_starts: int | None = None,
        utd: float = 1.0,
        buffer_size: int | None = None,
        calibrate: bool = False,
    ) -> Self:
        """Continue learning in an environment, from the present state of the agent.

        How each algorithm explores and relaxes its behaviour constraint is described at the top of its file and set by its
        `online_*` hyperparameters. Updates run as with compile="eager"; threads="auto" are all threads of
        this process.

        Args:
            total_timesteps: Environment steps to take, in addition to all earlier ones (with n environments rounded up to a
                multiple of n). None resumes an interrupted run on the same dataset, with the settings of that run; a loaded
                agent needs `load_replay_buffer` first.
            env: An id, a Gymnasium Env or an SB3 VecEnv. Default: the agent's own, else the one stored with its dataset.
            dataset: Offline data to mix in, in any form that `learn` takes. None: the agent learns only from newly collected
                transitions.
            callback: As in `learn`; called after each step of the environments.
            log_interval: Environment steps between log steps. None: a twentieth of the run, at most 1000. `train_return` is
                the return of the exploring policy; evaluate the agent itself with an EvalCallback.
            tb_log_name: As in `learn`.
            progress_bar: As in `learn`.
            offline_ratio: The dataset's share of each batch, in [0, 1], or "uniform" over dataset and replay buffer together.
                Default: that of the algorithm, which is one half, for IQL "uniform".
            learning_starts: Environment steps before the first update, minus the transitions already in the buffer. Default:
                1000 with a dataset, 5000 without, at most a fifth of the run. Only an agent that has never learned takes
                random actions during this phase.
            utd: Updates per step of one environment, in (0, 1000].
            buffer_size: Capacity of the replay buffer in transitions. Default: the current capacity, or 1,000,000.
            calibrate: Lower-bound the TD targets of offline transitions by the returns that followed them, in the spirit of
                Cal-QL (which bounds Q in its regulariser), so that an offline Q that is too low need not be unlearned first.
                Only for DiffusionQL, DiffCPS, BDPO and TD3BC; the other critics do not bootstrap from the policy's actions.

        Returns:
            The agent itself.

        Raises:
            ValueError: Bad arguments, data or environment; raised before any work; the agent is unchanged.
            RuntimeError: Critics or the replay buffer of a resumed run are missing.
            TrainingDiverged: As in `learn`.
            KeyboardInterrupt: As in `learn`.
        """
        settings = OnlineSettings(offline_ratio, learning_starts, utd, buffer_size, calibrate)
        settings = online.check_arguments(total_timesteps, log_interval, settings)
        checkpoint.fetch_training_networks(self)
        candidate = self.candidate()
        run, offline_data = online.accept(candidate, total_timesteps, env, dataset, settings)
        sb3_callback = make_callback(callback, progress_bar)
        self._become_and_init(candidate, sb3_callback)
        del candidate  # it still holds a replay buffer that the run may replace
        online.train(self, run, offline_data, sb3_callback, log_interval, tb_log_name)
        return self

    # ---- acting ----------------------------------------------------------------------------------------------------
    @property
    def acts_deterministically(self) -> bool:
        """How the policy is meant to act: the hyperparameter `deterministic`; True if the algorithm has none to choose."""
        return bool(getattr(self.config, "deterministic", True))

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool | None = None, **choice: Any
    ) -> tuple[np.ndarray, Any]:
        """The policy's action for one observation or a batch, with SB3's signature.

        As in SB3, an agent that knows its spaces can act before training, with its initial networks.

        Args:
            observation: As the environment returns it: an array or a dict of arrays, one observation or a batch.
            state: Returned unchanged.
            episode_start: Ignored.
            deterministic: True acts without randomness: the action depends on the observation only. False samples, if the
                policy can. None acts as the policy is meant to, by its hyperparameter `deterministic`.
            choice: Hyperparameters of CHOICE to override in this call, e.g. n_candidates=10.

        Returns:
            The action, in the environment's units and dtype, and `state`.

        Raises:
            ValueError: A wrong shape, or NaN.
            TypeError: An `(obs, info)` tuple.
            RuntimeError: There is no policy at all.
        """
        if self.spec is None or self.state.policy_missing:
            stages = f', stages=("{self.POLICY_STAGE}",)' if self.state.policy_missing else ""
            raise RuntimeError(f"this {type(self).__name__} has no policy yet: train it with learn(data{stages})")
        if deterministic is None:
            deterministic = self.acts_deterministically
        config = self.config if not choice else choose(type(self).__name__, self.config, self.CHOICE, choice)
        if not choice and type(observation) is np.ndarray and self._numpy_path is not None:
            policy = self.point_policy(deterministic)
            if policy is not None:
                action = self._numpy_path(observation, policy, self.obs_normalizer, self.spec)
                if action is not None:
                    return action, state

        def act(obs: Tensor) -> Tensor:
            noise = self.draw_act(len(obs), deterministic, config, self.predict_generator)
            compiled = self._compiled.get((len(obs), deterministic, config)) if self._compiled else None
            return compiled(obs, noise) if compiled is not None else self.act(obs, noise, config)

        return self.predict_with(act, observation), state

    def predict_with(self, act: Callable[[Tensor], Tensor], observation: Any) -> np.ndarray:
        """Run `act`, normalised observations (B, S) -> actions (B, A) in [-1, 1], on an observation of the environment.

        Returns:
            The action, in the environment's units and dtype.

        Raises:
            ValueError, TypeError: As in `predict`.
            RuntimeError: The action is not finite.
        """
        spec = self.require_spec()
        obs, batched = spec.flatten_obs(observation)
        with torch.no_grad():
            flat = act(self.obs_normalizer(torch.from_numpy(obs).to(self.device))).cpu().numpy()
        if not np.isfinite(flat).all():
            raise RuntimeError("the policy's actions contain NaN or infinity: load an earlier checkpoint")
        action = spec.unscale_action(flat)
        return action if batched else action[0]

    def compile_policy(self, n_obs: int = 1, deterministic: bool | None = None, **choice: Any) -> Self:
        """Compile `predict` for batches of n_obs observations, which takes tens of seconds.

        Later training and loading take effect. Other batch sizes run eagerly; if compilation fails, so does this one, with a
        warning.

        Args:
            n_obs: Observations in a call of `predict`.
            deterministic: None: both.
            choice: As in `predict`, for calls with the same choice.

        Returns:
            The agent itself.
        """
        self.require_spec()
        config = choose(type(self).__name__, self.config, self.CHOICE, choice) if choice else self.config
        for kind in (False, True) if deterministic is None else (deterministic,):
            self._compiled[n_obs, kind, config] = compiled_act(self, n_obs, kind, config)
        return self

    def forget_compiled(self) -> None:
        """Discard compiled policies after networks are reallocated."""
        self._compiled = {}

    def evaluate(self, env: Any = None, n_episodes: int = 10, *, choice: Any = None, **kwargs: Any) -> Evaluation:
        """Run the policy for some episodes and measure it; see `diffagents.evaluate`.

        Args:
            env: Default: the environment stored with the dataset, its kwargs included, else the agent's own. A different one
                triggers a warning.
            n_episodes: Number of episodes.
            choice: Passed to `predict` at every step, e.g. {"n_candidates": 10}.
            kwargs: As in `diffagents.evaluate`; by default the policy acts as it is meant to.

        Raises:
            ValueError: No environment is known, or `learn_online` is acting in it.
        """
        policy: Any = self
        if choice:
            policy = types.SimpleNamespace(
                predict=functools.partial(self.predict, **choice),
                acts_deterministically=self.acts_deterministically,
                dataset_info=self.dataset_info,
                choice=dict(choice),
            )
        stored = (self.dataset_info or {}).get("env_spec")
        if env is not None and stored is not None:
            warn_of_another_env(env, stored, kwargs.get("env_kwargs"))
        if self.state.exploring and (env is self.env or (env is None and stored is None)):
            raise ValueError("learn_online is acting in this environment: evaluate in another, env=...")
        if env is None and stored is None and self.env is None:
            raise ValueError("no environment is stored with this agent's dataset: pass env=, an id or an environment")
        return evaluate(policy, env if env is not None else (stored or self.env), n_episodes, **kwargs)

    def export(self, path: str | pathlib.Path, format: str = "onnx", **choice: Any) -> pathlib.Path:
        """Write the deterministic policy as one file that runs without diffagents; see `deploy.export.export`.

        A policy that is meant to sample its actions acts differently there, which causes a warning.

        Args:
            path: The file; without a suffix it gets .onnx or .pt2.
            format: "onnx" or "torch_export".
            choice: As in `predict`; baked into the file.

        Returns:
            The path of the file.
        """
        from diffagents.deploy.export import export  # torch's exporter takes seconds to import

        return export(self, path, format, **choice)

    # ---- files and the Hub -----------------------------------------------------------------------------------------
    def save(
        self,
        path: str | pathlib.Path,
        include_trainer_state: bool = True,
        *,
        replay_buffer: str | pathlib.Path | None = None,
    ) -> pathlib.Path:
        """Write a `.zip` (added if there is no suffix).

        Args:
            path: The file.
            include_trainer_state: Include optimisers, generators and plan, so that `learn` can be resumed bit for bit.
            replay_buffer: Also save the replay buffer, to this file. At every moment, also after a kill, what lies at the two
                places belongs together; two calls, of `save` and `save_replay_buffer`, cannot promise that.

        Returns:
            The path of the file.

        Raises:
            RuntimeError: There is no replay buffer.
            OSError: The disk is full, permission is denied, ...; what was there before is unchanged.
        """
        packed = checkpoint.pack(self, include_trainer_state)
        if replay_buffer is None:
            return artifact.write(path, *packed)
        if self.replay_buffer is None:
            raise RuntimeError("there is no replay buffer yet: learn_online creates one")
        before = checkpoint.counters_at(path)
        buffer = self.replay_buffer.save(replay_buffer, self._replay_fingerprint(), keep=before)
        written = artifact.write(path, *packed)
        previous_of(buffer).unlink(missing_ok=True)
        return written

    @class_method
    def load(
        cls,
        path: str | pathlib.Path,
        env: Any = None,
        device: str | torch.device = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        **overrides: Any,
    ) -> Self:
        """Load an agent that `save` or `save_pretrained` wrote. No environment, dataset or pickle is needed.

        Args:
            path: The file or folder.
            env: As in `set_env`.
            device: As in the constructor.
            custom_objects: Ignored; for SB3 compatibility.
            print_system_info: Ignored; for SB3 compatibility.
            overrides: Other hyperparameters (e.g. beta=0.1), `seed`, `verbose`, `tensorboard_log`, `compile`, `threads`,
                `tf32` or `record_command`.

        Raises:
            FileNotFoundError: There is nothing at `path`.
            ArtifactError: It is not a policy of this class, or it is damaged; the message says what to do.
        """
        return artifact.retried(lambda: checkpoint.unpack(cls, artifact.read(path), device, overrides, env))

    def clone(self, fresh: Sequence[str] = (), **hyperparameters: Any) -> Self:
        """A copy of the agent and its networks, with other hyperparameters.

        `base.clone(beta=0.2, fresh=("policy",)).learn(data, stages=("policy",))` trains another policy with the same critic
        and behaviour model.

        Args:
            fresh: Networks to reinitialise, optimiser state included.
            hyperparameters: As in `load`.
        """
        config, tensors, state = checkpoint.pack(self, True)
        kept = {name: getattr(self, name) for name in ("verbose", "compile", "threads", "tf32", "record_command")}
        overrides = {**kept, **hyperparameters}
        other = checkpoint.rebuild(type(self), config, tensors, state, self.device, overrides, fresh)
        other.env, other.state.online = self.env, None
        return other

    # ---- copies and processes --------------------------------------------------------------------------------------
    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = memo[id(self)] = object.__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as one block of bytes. Tensors that are sent to a process one by one share memory with it, which fails where
        several are views of the same, and would let one process change the agent of another."""
        block = io.BytesIO()
        torch.save(self.__dict__, block)
        return _unpickled, (type(self), block.getvalue())

    def save_replay_buffer(self, path: str | pathlib.Path) -> pathlib.Path:
        """Save the replay buffer as safetensors; together with `save`, this allows resuming `learn_online`.

        Args:
            path: The file; a `.pkl` suffix is replaced.

        Raises:
            RuntimeError: There is no replay buffer yet.
        """
        if self.replay_buffer is None:
            raise RuntimeError("there is no replay buffer yet: learn_online creates one")
        return self.replay_buffer.save(path, self._replay_fingerprint())

    def load_replay_buffer(self, path: str | pathlib.Path) -> None:
        """Load the replay buffer that was saved with this agent. Raises FileNotFoundError or ArtifactError."""
        self.replay_buffer = Replay.load(path, self.require_spec(), self.device, self._replay_fingerprint())

    def _replay_fingerprint(self) -> dict[str, int]:
        """Identifies the agent that a replay buffer belongs to, whose rows are normalised and reward-transformed."""
        units = [repr(self.reward_transform), *(x.tolist() for x in (self.obs_normalizer.mean, self.obs_normalizer.std))]
        identity = zlib.crc32(repr([self.seed, units]).encode())
        return {"environment steps": self.n_env_steps, "updates": self.n_updates, "units": identity}

    def save_pretrained(
        self,
        folder: str | pathlib.Path,
        include_trainer_state: bool = False,
        *,
        eval_env: Any = None,
        n_eval_episodes: int = 10,
        video: bool = False,
        license: str = "mit",
    ) -> pathlib.Path:
        """Write the folder that `push_to_hub` uploads: the artifact, README.md (the model card), results.json and pictures.

        Args:
            folder: The folder. A README.md in it that was written by hand is kept.
            include_trainer_state: As in `push_to_hub` (also the arguments below).
            eval_env: Evaluate in it first.
            n_eval_episodes: Number of episodes.
            video: Render an episode.
            license: Licence of the policy.

        Returns:
            The folder.
        """
        from diffagents.storage import publish

        return publish.save_pretrained(
            self,
            folder,
            include_trainer_state=include_trainer_state,
            eval_env=eval_env,
            n_eval_episodes=n_eval_episodes,
            video=video,
            license=license,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        eval_env: Any = None,
        n_eval_episodes: int = 10,
        video: bool = False,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        include_trainer_state: bool = False,
        license: str = "mit",
    ) -> "CommitInfo":
        """Publish the policy as a model repository of the Hugging Face Hub, in one commit.

        Files of an earlier push that the new one does not have are deleted.

        Args:
            repo_id: "organisation/name".
            eval_env: The environment to evaluate in first (an id, an environment, or True for the dataset's own), or an
                existing Evaluation; the score is put on the card.
            n_eval_episodes: Number of episodes.
            video: Render an episode; if that fails, there is a warning.
            private: Make a new repository private.
            revision: A branch, created if it does not exist.
            commit_message: Message of the commit.
            token: None: that of `hf auth login` or HF_TOKEN.
            include_trainer_state: Include what others need to resume training.
            license: Licence of the policy, as the Hub spells it.

        Returns:
            The commit.

        Raises:
            ValueError: Not a valid repository id.
            HubError: No access, no connection, or somebody else pushed meanwhile. In that case nothing changes on
                the Hub, except that a new repository stays empty; a folder with an evaluation is kept, and its path is named.
        """
        from diffagents.storage import publish

        return publish.push_to_hub(
            self,
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
            include_trainer_state=include_trainer_state,
            eval_env=eval_env,
            n_eval_episodes=n_eval_episodes,
            video=video,
            license=license,
        )

    @class_method
    def from_pretrained(
        cls,
        repo_id_or_folder: str | pathlib.Path,
        *,
        revision: str | None = None,
        env: Any = None,
        device: str | torch.device = "auto",
        token: str | bool | None = None,
        cache_dir: str | pathlib.Path | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """Load a policy from an existing folder or .zip, else from the Hub repository of that name, at one commit (`origin`).

        From the Hub only the files that acting needs are downloaded; the others follow when `learn` is called.

        Args:
            repo_id_or_folder: A folder or .zip that exists, else "organisation/name".
            revision: Branch, tag or commit.
            env: As in `load`.
            device: As in `load`.
            token: As in `push_to_hub`.
            cache_dir: The Hub's cache.
            local_files_only: Use only the cache, as with HF_HUB_OFFLINE=1.
            overrides: As in `load`.

        Raises:
            FileNotFoundError: There is nothing of that name.
            HubError: No such repository, no access or no connection.
            ArtifactError: Not a policy of this class, damaged, or from a newer version.
        """
        where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return artifact.retried(
            lambda: checkpoint.unpack(cls, hub.find_artifact(repo_id_or_folder, revision, **where), device, overrides, env)
        )

    # ---- networks --------------------------------------------------------------------------------------------------
    def networks(self) -> dict[str, nn.Module]:
        """Every network by attribute name, including the observation normaliser."""
        self.require_spec()
        return {name: getattr(self, name) for name in ("obs_normalizer", *self.MODEL, *self.TRAINING_NETWORKS)}

    def get_parameters(self) -> dict[str, dict[str, Tensor]]:
        """The state dict of each network by name; the tensors are not copies."""
        return {name: module.state_dict() for name, module in self.networks().items()}

    def set_parameters(self, parameters: dict[str, dict[str, Tensor]] | str | pathlib.Path, exact_match: bool = True) -> None:
        """Load state dicts as `get_parameters` returns them, or those of a saved agent of the same class.

        Args:
            parameters: Network name -> its state dict; or a path that `save` or `save_pretrained` wrote.
            exact_match: Whether every network must be present.

        Raises:
            FileNotFoundError: There is nothing at the path.
            ArtifactError: It is not a policy of this class, or it is damaged.
            ValueError: Unknown or missing names, or other shapes.
        """
        networks = self.networks()
        if isinstance(parameters, str | pathlib.Path):
            other = type(self).load(parameters, device=self.device, verbose=0)
            absent = () if other.has_training_networks else self.TRAINING_NETWORKS
            parameters = {name: tensors for name, tensors in other.get_parameters().items() if name not in absent}
        wrong = set(parameters) - set(networks) | (set(networks) - set(parameters) if exact_match else set())
        if wrong:
            raise ValueError(
                f"parameters has the keys {sorted(parameters)}, but the agent's networks are {sorted(networks)}; "
                "exact_match=False loads some of them only"
            )
        for name, tensors in parameters.items():
            load_state(networks[name], tensors)
        self.state.pristine = False
        if "policy" in parameters:
            self.state.policy_missing = False

    def set_up(self, spec: Spec) -> None:
        """Build the networks for these spaces from the seed; torch's global generator is not affected."""
        self.spec, self.obs_keys = spec, spec.obs_keys
        self.forget_compiled()
        self.obs_dim, self.act_dim = spec.obs_dim, spec.act_dim
        with torch.random.fork_rng(devices=list(range(n_cuda_devices()))):
            torch.manual_seed(self.seed)
            self.obs_normalizer = ObsNormalizer(self.obs_dim).to(self.device)
            self.build()

    def require_spec(self) -> Spec:
        """The spaces. Raises RuntimeError if they are not known yet."""
        if self.spec is None:
            raise RuntimeError(f"this {type(self).__name__} does not know its spaces yet: pass env=, or call learn(data) first")
        return self.spec

    def candidate(self) -> Self:
        """A copy that shares the networks; changes take effect on this agent only after `become`."""
        copied = copy.copy(self)
        copied.state = self.state.copy()
        return copied

    def become(self, candidate: Self) -> None:
        """Adopt every attribute of a `candidate` that has passed all checks.

        `state` stays the same object: a run that is going on, whose callback may call `learn`, holds it.
        """
        state = self.state
        vars(state).update(vars(candidate.state))
        self.__dict__.update({**candidate.__dict__, "state": state})

    def _become_and_init(self, candidate: Self, sb3_callback: "BaseCallback | None") -> None:
        """`become` the candidate and initialise the callback on it; if that raises, nothing has changed."""
        attributes, state = dict(self.__dict__), self.state.copy()
        self.become(candidate)
        try:
            if sb3_callback is not None:
                sb3_callback.init_callback(self)  # type: ignore[arg-type]
        except BaseException:
            self.__dict__ = attributes
            vars(self.state).update(vars(state))
            raise

    # ---- environment, logger, seed, counters: SB3's names ------------------------------------------------------------
    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Set the environment that the agent acts in.

        Args:
            env: An id, a Gymnasium Env or an SB3 VecEnv.
            force_reset: Ignored; for SB3 compatibility.

        Raises:
            ValueError: Its spaces differ from the agent's.
        """
        vec_env = as_vec_env(env)
        if self.spec is not None:
            check_same_spaces(self.spec, vec_env.observation_space, vec_env.action_space)
        self.env = vec_env
        if self.spec is None:
            self.set_up(Spec.from_spaces(vec_env.observation_space, vec_env.action_space, self.obs_keys))

    def get_env(self) -> "VecEnv":
        """The environment, else a stub with the right spaces, because SB3's callbacks require one."""
        if self.env is not None:
            return self.env
        spec = self.require_spec()
        if self._stub is None:
            self._stub = stub_env(spec)
        return self._stub

    def get_vec_normalize_env(self) -> Any:
        """SB3's VecNormalize around the environment; None if there is none."""
        from stable_baselines3.common.vec_env import unwrap_vec_normalize

        return None if self.env is None else unwrap_vec_normalize(self.env)

    @property
    def logger(self) -> "Logger":
        """SB3's logger, created on first access."""
        if self.sb3_logger is None:
            self.sb3_logger = make_logger(self, type(self).__name__, True)
        return self.sb3_logger

    def set_logger(self, logger: "Logger") -> None:
        """Use this SB3 logger (csv, json, tensorboard, ...) from now on."""
        self.sb3_logger, self.tensorboard_log = with_history(logger, self), None

    def dump_logs(self) -> None:
        """Flush the logger at the current timestep."""
        self.logger.dump(self.num_timesteps)

    def set_random_seed(self, seed: int | None = None) -> None:
        """Reseed both generators: one for training, the other for `predict`, so that evaluation never affects training."""
        self.seed = secrets.randbelow(2**31) if seed is None else whole_number("seed", seed, 0)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.predict_generator = torch.Generator(self.device).manual_seed(self.seed + 1)

    @property
    def observation_space(self) -> Any:
        """The environment's observation space. Raises RuntimeError if it is not known yet."""
        return self.require_spec().observation_space

    @property
    def action_space(self) -> Any:
        """The environment's action space. Raises RuntimeError if it is not known yet."""
        return self.require_spec().action_space

    @property
    def n_envs(self) -> int:
        """Number of parallel environments, 1 if there is none."""
        return 1 if self.env is None else self.env.num_envs

    @property
    def num_timesteps(self) -> int:
        """Offline gradient steps plus environment steps."""
        return self.state.num_timesteps

    @num_timesteps.setter
    def num_timesteps(self, value: int) -> None:
        self.state.num_timesteps = value

    @property
    def _total_timesteps(self) -> int:
        """Value of `num_timesteps` at the end of the running `learn` or `learn_online`. Callbacks of SB3 read it."""
        run, plan = self.state.online, self.state.plan
        if self.state.exploring and run is not None:
            return self.num_timesteps + run.total - run.done
        return self.num_timesteps + (0 if plan is None else plan.remaining)

    @property
    def _current_progress_remaining(self) -> float:
        """Share of the running `learn` that is left, from 1 to 0. Callbacks of SB3 read it."""
        return 1.0 - self.num_timesteps / max(1, self._total_timesteps)

    @property
    def _n_updates(self) -> int:
        return self.n_updates

    @property
    def _episode_num(self) -> int:
        return 0 if self.state.online is None else self.state.online.n_episodes

    def __getattr__(self, name: str) -> Any:
        """A hyperparameter, as SB3's models have them: `agent.gamma`, `agent.learning_rate`."""
        config = self.__dict__.get("config")
        if config is not None and name in type(config).__dataclass_fields__:
            return getattr(config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def n_env_steps(self) -> int:
        """Environment steps taken by `learn_online`."""
        return self.state.n_env_steps

    @property
    def n_updates(self) -> int:
        """Training iterations (batches drawn), offline and online."""
        return self.state.n_updates

    @property
    def stage_steps(self) -> dict[str, int]:
        """Total gradient steps, by stage."""
        return self.state.stage_steps

    @property
    def plan(self) -> Plan | None:
        """The plan of the last `learn`, with its progress."""
        return self.state.plan

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row for each log step: num_timesteps, stage, stage_step and the means of the metrics."""
        return self.state.history

    @property
    def reward_transform(self) -> RewardTransform | None:
        """The transform of rewards, fitted on the first dataset."""
        return self.state.reward_transform

    @property
    def dataset_info(self) -> dict[str, Any] | None:
        """Metadata of the first dataset: id, size, returns, environment, ..."""
        return self.state.dataset_info

    @property
    def provenance(self) -> dict[str, Any]:
        """How the policy was made: commands, machine, seconds, evaluations during training."""
        return self.state.provenance

    @classmethod
    def presets_name(cls) -> str:
        """The file of `zoo/` with the algorithm's presets, which has the name of its module; a subclass elsewhere shares it."""
        package = f"{__package__}.agents."
        modules = [base.__module__ for base in cls.__mro__ if base.__module__.startswith(package)]
        return (modules or [cls.__module__])[0].rpartition(".")[2]


def _unpickled(cls: type[Agent], block: bytes) -> Agent:
    """The agent whose `__reduce__` made `block`."""
    agent = object.__new__(cls)
    agent.__dict__.update(torch.load(io.BytesIO(block), weights_only=False))
    return agent
