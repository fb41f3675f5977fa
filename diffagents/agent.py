"""Agent: the verbs (`learn`, `predict`, `save`, `load`, ...) and the loop behind them. No loss lives here.

An algorithm's file gives `Config`, `build`, `stages` and `act`; everything a user calls is here, with SB3's names.
"""

import functools
import pathlib
import secrets
import types
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from diffagents.config import presets
from diffagents.config.checks import check_arguments, check_choice, find_device, whole_number
from diffagents.config.hyperparameters import choose, make_config, signature
from diffagents.data.load import load_dataset
from diffagents.data.normalize import ObsNormalizer, RewardTransform
from diffagents.data.replay_buffer import Replay
from diffagents.deploy import compiled_policy
from diffagents.deploy.numpy_policy import NumpyPolicy, numpy_action
from diffagents.envs.make import warn_of_another_env
from diffagents.envs.vec_env import as_vec_env, check_same_spaces, stub_env
from diffagents.evaluation.evaluate import Evaluation, evaluate
from diffagents.networks.mlp import TanhPolicy
from diffagents.storage import artifact, checkpoint, hub
from diffagents.training import compiled, offline, online, prepare
from diffagents.training.callbacks import make_callback, make_logger, with_history
from diffagents.training.plan import MODES, OnlineRun, OnlineSettings, Plan
from diffagents.training.state import load_state
from diffagents.training.updates import Noise, Optimizer, Stage
from diffagents.types import Spec

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecEnv


class Agent(ABC):
    """Base of all agents. Knobs of the algorithm are keyword arguments, listed by `help(<Algorithm>Config)`.

    policy: "MlpPolicy" (the only kind; "MultiInputPolicy" is accepted for Dict observations).
    env: None, an environment id, a Gymnasium Env or an SB3 VecEnv; gives the spaces, and the place where callbacks act.
    preset: None, "auto" (row of zoo/<algorithm>.yml for the dataset's id), "paper", or a row's name. Explicit knobs win.
    obs_keys: which entries of a Dict observation to concatenate, in this order.
    policy_kwargs: `net_arch`, a list or a dict such as {"pi": [256, 256], "qf": [256, 256]}.
    compile: how updates run: "eager"; "compiled" (a minute first, then faster); "graph", compiled and in a CUDA graph; "auto"
    takes what is fastest in all for the length of the run. All agree to float tolerance; what fails falls back to eager.
    tf32: on a GPU, let matrix products round to TF32 while training (about 1e-3 relative; faster).
    verbose: 0 silent, 1 one line per look, 2 also SB3's tables. seed: None draws one and keeps it in `seed`.
    """

    Config: ClassVar[type[Any]]
    STAGE_SHARES: ClassVar[dict[str, int]]  # stages in order, in the proportion of the paper's schedule
    POLICY_STAGE: ClassVar[str]  # the stage without which `predict` is meaningless
    MODEL: ClassVar[tuple[str, ...]]  # attributes that `predict` needs: model.safetensors
    LEARNER: ClassVar[tuple[str, ...]]  # every other network: learner.safetensors
    OFFLINE_RATIO: ClassVar[float | str] = 0.5  # the share of old data in a batch of `learn_online`, or "uniform"
    CALIBRATES: ClassVar[bool] = False  # whether its critic bootstraps from the policy's actions, and so knows a floor
    CHOICE: ClassVar[tuple[str, ...]] = ()  # knobs that a call of `predict` may set for itself
    SIZES: ClassVar[tuple[str, ...]] = ()  # knobs that are sizes of tensors: a file's must agree with its tensors

    config: Any
    obs_dim: int
    act_dim: int
    policy: nn.Module
    optimizers: dict[str, Optimizer]

    def __init_subclass__(cls) -> None:
        """Show an algorithm's knobs in `help()` and in editors, though they arrive as **knobs."""
        cls.__signature__ = signature(Agent.__init__, cls.Config)  # type: ignore[attr-defined]

    def __init__(
        self,
        policy: str = "MlpPolicy",
        env: Any = None,
        *,
        preset: str | None = None,
        obs_keys: Sequence[str] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 1,
        seed: int | None = None,
        device: str | torch.device = "auto",
        compile: str = "auto",
        tf32: bool = True,
        **knobs: Any,
    ) -> None:
        check_arguments(policy, obs_keys, policy_kwargs)
        check_choice("compile", compile, ("auto", *MODES))
        self.config = make_config(self.Config, type(self).__name__, knobs)
        self._explicit = dict(knobs)  # what the user asked for wins over any preset
        if preset is not None:
            presets.resolve_preset(self.presets_name(), preset, None)  # a misspelt name is told at once
        self.preset, self.policy_kwargs = preset, dict(policy_kwargs or {})
        self.obs_keys = tuple(obs_keys) if obs_keys is not None else None
        self.tensorboard_log, self.verbose = tensorboard_log, verbose
        self.compile, self.tf32 = compile, tf32
        self.device = find_device(device)
        self.set_random_seed(seed)
        self.num_timesteps = self.n_env_steps = self.n_updates = 0
        self.stage_steps = dict.fromkeys(self.STAGE_SHARES, 0)  # gradient steps ever done, by stage
        self.plan: Plan | None = None
        self.online: OnlineRun | None = None  # the last run of `learn_online`
        self.replay_buffer: Replay | None = None
        self.constraint_relaxation = 1.0  # by how much the constraint to the data is weaker, while `learn_online` runs
        self.history: list[dict[str, Any]] = []  # one row per look: step, stage and the means of its metrics
        self.spec: Spec | None = None
        self.reward_transform: RewardTransform | None = None
        self.dataset_info: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}  # command, machine, seconds, evaluations: see provenance.py
        self.origin: hub.Origin | None = None  # the commit on the Hub that the agent was pulled from
        self.has_learner = True  # False: loaded without critics and behaviour model, to act only
        self._numpy_policy: NumpyPolicy | None = None
        self._compiled: dict[Any, compiled.Compiled] = {}  # by number of observations, deterministic, config
        self._pristine = True  # no weight has been trained or loaded yet
        self._exploring = False  # `learn_online` is running
        self._policy_missing = False  # an official checkpoint has no policy
        self._env: VecEnv | None = None
        self._stub: VecEnv | None = None
        self._logger: Logger | None = None
        if env is not None:
            self._env = as_vec_env(env)
            self._set_up(Spec.from_spaces(self._env.observation_space, self._env.action_space, self.obs_keys))

    # ---- what an algorithm gives -----------------------------------------------------------------------------------
    @abstractmethod
    def build(self) -> None:
        """Make the networks (attributes named in MODEL and LEARNER) and `optimizers` for `self.spec`."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The stages in the order in which they run, named as in STAGE_SHARES."""

    @abstractmethod
    def online_stage(self) -> Stage:
        """What an update of `learn_online` does; its steps count the updates of the run."""

    @abstractmethod
    def act(self, obs: Tensor, noise: Noise, config: Any) -> Tensor:
        """Normalised observations (B, S) -> actions (B, A) in [-1, 1]; `config` is the agent's, but for CHOICE. Pure."""

    def draw_act(self, n: int, deterministic: bool, config: Any, generator: torch.Generator) -> Noise:
        """The random numbers of `act` for n observations; deterministic: stored ones, the same for each (sizes of 1)."""
        return {}

    # ---- learning --------------------------------------------------------------------------------------------------
    def learn(
        self,
        dataset: Any,
        total_timesteps: int | None = None,
        callback: Any = None,
        log_interval: int | None = None,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        stages: Sequence[str] | None = None,
    ) -> Self:
        """Train on a dataset (anything `load_dataset` reads) and return self.

        total_timesteps: gradient steps in all, split over the stages in the paper's proportion; None takes each stage's own
        `*_steps` knob, else the preset. log_interval: gradient steps between looks (None: a twentieth of the stage, at most
        1000).
        reset_num_timesteps=False: finish an interrupted plan exactly as it would have gone; with total_timesteps or stages on a
        finished one, a new plan that counts on.
        stages: run only these, on the others' results, e.g. ("policy",).
        Raises ValueError (bad data or arguments) before any work, TrainingDiverged on NaN, KeyboardInterrupt after the
        running update; in all cases the agent can be saved, and a plan be finished later.
        """
        prepare.check_arguments(self, total_timesteps, stages, log_interval)
        data = load_dataset(dataset, env=self._env, obs_keys=self.obs_keys, verbose=self.verbose)
        with prepare.nothing_if_refused(self):
            plan, data = prepare.accept(self, data, total_timesteps, reset_num_timesteps, stages)
            if plan is None:
                return self
            tick = make_callback(self, callback, progress_bar)
        prepare.begin(self, plan, data, reset_num_timesteps)
        if self.tensorboard_log is not None:
            name = tb_log_name or type(self).__name__
            self._logger = make_logger(self, name, reset_num_timesteps)
        sampler = data.sampler(self.device, self.reward_transform, self.obs_normalizer)
        seconds = offline.estimate(self, plan, sampler) if self.verbose or self.compile == "auto" else {}
        offline.choose_modes(self, plan, seconds)
        if self.verbose:
            offline.announce(self, plan, seconds)
        offline.run(self, plan, sampler, tick, log_interval, tb_log_name)
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
        """Go on learning in a live environment, from where `learn` or `load` left the agent, and return self.

        total_timesteps: environment steps to take, in addition to all before (of n environments: rounded up to n). None
        finishes an interrupted run on the same dataset, by its own settings; saved agents need `load_replay_buffer` first.
        env: an id, a Gymnasium Env or an SB3 VecEnv; None: the agent's own, else the one stored with its dataset.
        dataset: old data to mix in, anything that `learn` takes; None: what happens from now on is all there is.
        offline_ratio: the dataset's share of each batch, in [0, 1], or "uniform" over dataset and replay buffer together; None:
        what the algorithm's file says: half, for IQL "uniform".
        learning_starts: steps before the first update, less what the buffer holds; None: 1000 with a dataset, 5000
        without, at most a fifth of the run. Only an agent that never learnt acts at random in them. utd: updates per step of
        one environment. buffer_size: how many transitions are kept, None: as many as so far, else a million.
        calibrate: no target of Q for the dataset's transitions is below the return that followed them there, as in Cal-QL: an
        offline Q that is too low is not unlearnt first. Only DiffusionQL, DiffCPS, BDPO and TD3BC; the others need it not.
        How each algorithm explores and loosens its constraint is told at the top of its file, and set by its `online_*` knobs.
        log_interval: environment steps between looks (None: a twentieth of the run, at most 1000). `train_return` is that of
        the exploring policy; evaluate the agent itself with an EvalCallback. Updates run as with compile="eager".
        Raises as `learn` does; RuntimeError where critics or a resumed run's replay buffer are missing.
        """
        how = OnlineSettings(offline_ratio, learning_starts, utd, buffer_size, calibrate)
        online.learn_online(self, total_timesteps, env, dataset, how, callback, log_interval, tb_log_name, progress_bar)
        return self

    # ---- acting ----------------------------------------------------------------------------------------------------
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False, **choice: Any
    ) -> tuple[np.ndarray, Any]:
        """One observation or a batch -> (action in the environment's units and dtype, `state` unchanged).

        choice: values of the knobs in CHOICE (how many candidates, how one is selected, ...) for this call only.
        Raises ValueError for a wrong shape or NaN, TypeError for an `(obs, info)` tuple, RuntimeError where there is no policy
        at all. As in SB3, an agent that knows its spaces acts before it is trained: at random.
        """
        if self.spec is None or self._policy_missing:
            stages = f', stages=("{self.POLICY_STAGE}",)' if self._policy_missing else ""
            raise RuntimeError(f"this {type(self).__name__} has no policy yet: train it with learn(data{stages})")
        config = self.config if not choice else choose(self, choice)
        if not choice and (action := numpy_action(self, observation, deterministic)) is not None:
            return action, state

        def act(obs: Tensor) -> Tensor:
            noise = self.draw_act(len(obs), deterministic, config, self.predict_generator)
            compiled = self._compiled.get((len(obs), deterministic, config)) if self._compiled else None
            return compiled(obs, noise) if compiled is not None else self.act(obs, noise, config)

        return self.predict_with(act, observation), state

    def compile_policy(self, n_obs: int = 1, deterministic: bool | None = None, **choice: Any) -> Self:
        """Compile `predict` for batches of n_obs observations, which takes tens of seconds, and return self.

        deterministic: None compiles both kinds. choice: as in `predict`, for calls with the same choice. What is trained or
        loaded later is acted on. Other calls stay as they are; where compiling fails, so do these, after a warning.
        """
        self._need_networks()
        config = choose(self, choice) if choice else self.config
        for kind in (False, True) if deterministic is None else (deterministic,):
            self._compiled[n_obs, kind, config] = compiled_policy.compiled_act(self, n_obs, kind, config)
        return self

    def point_policy(self, deterministic: bool) -> TanhPolicy | None:
        """The network that alone is the policy, so that numpy can run it for one observation; None where there is none."""
        return None

    def predict_with(self, act: Callable[[Tensor], Tensor], observation: Any) -> np.ndarray:
        """Run `act`, normalised observations (B, S) -> actions (B, A) in [-1, 1], on what an environment gave."""
        self._need_networks()
        assert self.spec is not None
        obs, batched = self.spec.flatten_obs(observation)
        with torch.no_grad():
            flat = act(self.obs_normalizer(torch.from_numpy(obs).to(self.device))).cpu().numpy()
        if not np.isfinite(flat).all():
            raise RuntimeError("the policy's actions are not finite numbers: go back to an earlier checkpoint")
        action = self.spec.unscale_action(flat)
        return action if batched else action[0]

    def evaluate(self, env: Any = None, n_episodes: int = 10, *, choice: Any = None, **kwargs: Any) -> Evaluation:
        """`diffagents.evaluate(self, ...)`; without `env`, in the environment stored with the dataset, kwargs included.

        choice: given to `predict` at every step, e.g. {"n_candidates": 10}. Warns when `env` is not the stored environment.
        """
        policy: Any = self
        if choice:
            policy = types.SimpleNamespace(predict=functools.partial(self.predict, **choice))
        stored = (self.dataset_info or {}).get("env_spec")
        if env is not None and stored is not None:
            warn_of_another_env(env, stored, kwargs.get("env_kwargs"))
        if self._exploring and (env is self._env or (env is None and stored is None)):
            raise ValueError("learn_online is acting in this environment: evaluate in another, env=...")
        if env is None and stored is None and self._env is None:
            raise ValueError("no environment is stored with this agent's dataset: pass env=, an id or an environment")
        return evaluate(policy, env if env is not None else (stored or self._env), n_episodes, **kwargs)

    def export(self, path: str | pathlib.Path, format: str = "onnx", **choice: Any) -> pathlib.Path:
        """Write the deterministic policy as one file that runs without diffagents, "onnx" or "torch_export" (`export.py`)."""
        from diffagents.deploy.export import export

        return export(self, path, format, **choice)

    # ---- files -----------------------------------------------------------------------------------------------------
    def save(self, path: str | pathlib.Path, include_trainer_state: bool = True) -> pathlib.Path:
        """Write a `.zip` (added when there is no suffix); with the trainer state, `learn` can go on to the bit."""
        return artifact.write(path, *checkpoint.pack(self, include_trainer_state))

    def save_replay_buffer(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write what `learn_online` has collected (safetensors; a `.pkl` suffix is replaced): with `save`, the whole run."""
        if self.replay_buffer is None:
            raise RuntimeError("there is no replay buffer yet: learn_online makes one")
        return self.replay_buffer.save(path, self._moment())

    def load_replay_buffer(self, path: str | pathlib.Path) -> None:
        """Read what `save_replay_buffer` wrote when this agent was saved. Raises FileNotFoundError, artifact.ArtifactError."""
        self._need_networks()
        assert self.spec is not None
        self.replay_buffer = Replay.load(path, self.spec, self.device, self._moment())

    def _moment(self) -> dict[str, int]:
        """What tells the agents apart whose buffer this could be: the rows are in the learner's units."""
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
        """Write a folder as `push_to_hub` uploads it: the artifact, README.md (the card), and what there is of results.json,
        curves.png and replay.mp4. A README.md written by hand stays. Arguments as there.
        """
        from diffagents.storage import publish

        how = publish.How(include_trainer_state, eval_env, n_eval_episodes, video, license)
        return publish.save_pretrained(self, folder, how)

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
        """Publish the policy as a model repository of the Hugging Face Hub, in one commit, and return that.

        eval_env: evaluate in it first (an id, an environment, or True for the dataset's own) and put the score on the card;
        or an Evaluation that was made before.
        video: render an episode; where that fails, a warning. revision: a branch, made where there is none. token: None takes
        the one of `hf auth login` or HF_TOKEN. include_trainer_state: so that others can resume the run itself. license: of
        this policy, as the Hub spells it. Files of an earlier push that the new one has not are deleted.
        Raises ValueError (no such id), HubError: no access, no connection, somebody else pushed meanwhile. Then nothing is
        changed on the Hub, but for a new repository staying empty, and a folder that was evaluated is kept and named.
        """
        from diffagents.storage import publish

        how = publish.How(include_trainer_state, eval_env, n_eval_episodes, video, license)
        return publish.push_to_hub(self, repo_id, how, private, revision, commit_message, token)

    @classmethod
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

        revision: branch, tag or commit. From the Hub only what acting needs is fetched; critics and the like follow when
        `learn` is called. HF_HUB_OFFLINE=1 or local_files_only=True: from the cache alone. The rest as in `load`.
        Raises FileNotFoundError, HubError (no such repository, no access, no connection), ArtifactError (not a policy of this
        class, damaged, from a newer version).
        """
        from diffagents.storage import publish

        how = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        load = {"env": env, "device": device, **overrides}
        agent: Any = publish.open_pretrained(lambda _: cls, repo_id_or_folder, revision, how, load)
        return agent

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        env: Any = None,
        device: str | torch.device = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        **overrides: Any,
    ) -> Self:
        """Read what `save` or `save_pretrained` wrote; no environment, dataset or pickle is involved.

        overrides: other knobs (e.g. beta=0.1), `seed`, `verbose` or `tensorboard_log`. custom_objects and print_system_info
        are SB3's, accepted and not needed. Raises FileNotFoundError, or artifact.ArtifactError with the cause and the cure.
        """
        agent: Self = checkpoint.unpack(cls, artifact.read(path), device, overrides)
        if env is not None:
            agent.set_env(env)
        return agent

    def clone(self, fresh: Sequence[str] = (), **knobs: Any) -> Self:
        """A copy with other knobs on copied networks; those named in `fresh` start from new weights and moments.

        `base.clone(beta=0.2, fresh=("policy",)).learn(data, stages=("policy",))` is another policy on the same critic and
        behaviour model.
        """
        config, tensors, state = checkpoint.pack(self, True)
        same = {"verbose": self.verbose, "compile": self.compile, "tf32": self.tf32}
        other: Self = checkpoint.restore(type(self), config, tensors, state, self.device, {**same, **knobs}, fresh)
        other._env, other.online = self._env, None
        return other

    def get_parameters(self) -> dict[str, dict[str, Tensor]]:
        """Network name -> its state dict (live tensors)."""
        return {name: module.state_dict() for name, module in self.networks().items()}

    def set_parameters(self, parameters: dict[str, dict[str, Tensor]], exact_match: bool = True) -> None:
        """Load state dicts as `get_parameters` gives them. Raises ValueError on unknown or missing names or shapes."""
        networks = self.networks()
        wrong = set(parameters) - set(networks) | (set(networks) - set(parameters) if exact_match else set())
        if wrong:
            raise ValueError(f"parameters name {sorted(parameters)}, the agent has {sorted(networks)}")
        for name, tensors in parameters.items():
            load_state(networks[name], tensors)
        self._pristine = False
        if "policy" in parameters:
            self._policy_missing = False

    def networks(self) -> dict[str, nn.Module]:
        """Every network by its attribute name, the observation normaliser included."""
        self._need_networks()
        return {name: getattr(self, name) for name in ("obs_normalizer", *self.MODEL, *self.LEARNER)}

    # ---- environment, logger, seed: SB3's names --------------------------------------------------------------------
    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Give the agent a live environment (id, Env or VecEnv). Raises ValueError when its spaces are others."""
        vec_env = as_vec_env(env)
        if self.spec is not None:
            check_same_spaces(self.spec, vec_env.observation_space, vec_env.action_space)
        self._env = vec_env
        if self.spec is None:
            self._set_up(Spec.from_spaces(vec_env.observation_space, vec_env.action_space, self.obs_keys))

    def get_env(self) -> "VecEnv":
        """The live environment, else a stand-in with the right spaces (SB3's callbacks insist on one)."""
        if self._env is not None:
            return self._env
        self._need_networks()
        if self._stub is None:
            assert self.spec is not None
            self._stub = stub_env(self.spec)
        return self._stub

    def get_vec_normalize_env(self) -> Any:
        """SB3's VecNormalize around the live environment, if there is one."""
        from stable_baselines3.common.vec_env import unwrap_vec_normalize

        return None if self._env is None else unwrap_vec_normalize(self._env)

    @property
    def logger(self) -> "Logger":
        if self._logger is None:
            self._logger = make_logger(self, type(self).__name__, True)
        return self._logger

    def set_logger(self, logger: "Logger") -> None:
        """Use this SB3 logger (csv, json, tensorboard, ...) from now on."""
        self._logger, self.tensorboard_log = with_history(logger, self), None

    def dump_logs(self) -> None:
        """Write what has been recorded, at the present step."""
        self.logger.dump(self.num_timesteps)

    def set_random_seed(self, seed: int | None = None) -> None:
        """Restart both generators: one for training, another for `predict`, so that evaluating never changes training."""
        self.seed = secrets.randbelow(2**31) if seed is None else whole_number("seed", seed, 0)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.predict_generator = torch.Generator(self.device).manual_seed(self.seed + 1)

    @property
    def observation_space(self) -> Any:
        self._need_networks()
        return self.spec.observation_space  # type: ignore[union-attr]

    @property
    def action_space(self) -> Any:
        self._need_networks()
        return self.spec.action_space  # type: ignore[union-attr]

    @property
    def n_envs(self) -> int:
        return 1 if self._env is None else self._env.num_envs

    @classmethod
    def presets_name(cls) -> str:
        """The file of `zoo/` with this algorithm's presets is named like the algorithm's module."""
        return cls.__module__.rpartition(".")[2]

    # ---- inside ----------------------------------------------------------------------------------------------------
    def _need_networks(self) -> None:
        if self.spec is None:
            raise RuntimeError(f"this {type(self).__name__} knows no spaces yet: give it env=, or learn(data) first")

    def _set_up(self, spec: Spec) -> None:
        """Build the networks from the seed, leaving the global generator alone."""
        self.spec, self.obs_keys = spec, spec.obs_keys
        self._compiled.clear()
        self.obs_dim, self.act_dim = spec.obs_dim, spec.act_dim
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            torch.manual_seed(self.seed)
            self.obs_normalizer = ObsNormalizer(self.obs_dim).to(self.device)
            self.build()
