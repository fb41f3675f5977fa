"""The environments of `learn_online`: acting, storing each step, seeding episodes, replaying an unfinished episode."""

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffagents.training.plan import OnlineRun
from diffagents.training.state import Learner


class Rollout:
    """The environments that a learner acts in, stepped together, and their current observations.

    With a single environment every episode has its own seed. So the k-th episode of a seed is the same in every run, and a
    resumed run can replay its unfinished episode from its seed and its stored actions.

    Args:
        learner: The agent, with `env`, `spec`, `replay_buffer` and reward transform set.
        run: Counts the episodes.

    Attributes:
        finished: (return, length) of the episodes that have ended since the last log step.
        all_returns: The returns of all that have ended, in order.
        updating: Whether updates have begun; set by the training loop.
        n_before: How many of `all_returns` ended before that.
    """

    def __init__(self, learner: Learner, run: OnlineRun) -> None:
        env, replay, transform = learner.env, learner.replay_buffer, learner.state.reward_transform
        assert env is not None and replay is not None and transform is not None
        self.learner, self.run, self.env, self.spec = learner, run, env, learner.require_spec()
        self.n: int = env.num_envs
        self.replay, self.transform = replay, transform
        self.normalizer = copy.deepcopy(learner.obs_normalizer).cpu()
        self.returns, self.lengths = np.zeros(self.n), np.zeros(self.n, int)
        self.finished: list[tuple[float, int]] = []
        self.all_returns: list[float] = []
        self.updating, self.n_before = run.n_updates > 0, 0
        self.obs = self._begin()

    def _normalized(self, obs: Any) -> Tensor:
        flat, _ = self.spec.flatten_obs(obs)
        with torch.no_grad():
            out: Tensor = self.normalizer(torch.from_numpy(flat))
        return out

    def _reset(self) -> Any:
        words = np.random.SeedSequence([self.learner.seed, self.run.n_episodes]).generate_state(1)
        self.env.seed(int(words[0] % 2**31))
        try:
            return self.env.reset()
        except RuntimeError as error:
            if "reset" not in str(error):
                raise
            raise ValueError("episodes are seeded one by one, which needs Monitor(env, allow_early_resets=True)") from None

    def _begin(self) -> Tensor:
        actions, replay = list(self.replay.running) if self.n == 1 else [], self.replay
        if not actions:  # nothing to replay: several environments continue with new episodes
            replay.cut()
        obs, ended = self._reset(), False
        for action in actions:  # a resumed run
            obs, rew, dones, _ = self.env.step(action[None])
            ended = bool(dones[0])
            self.returns[0] += float(rew[0])
            self.lengths[0] += 1
            if ended:
                break
        now = self._normalized(obs)
        if actions and (ended or not torch.equal(now[0], replay.last_next_obs().cpu())):
            warnings.warn(
                "the environment did not return to the state in which the run stopped: it continues with a new episode",
                stacklevel=6,
            )
            self.returns[:], self.lengths[:] = 0.0, 0
            replay.cut()
            self.run.n_episodes += 1
            now = self._normalized(self._reset())
        return now

    def step(self, act: np.ndarray) -> dict[str, Any]:
        """Take one step of each environment and store it.

        Args:
            act: Actions (n, A) in [-1, 1].

        Returns:
            The local variables that SB3's callbacks read: new_obs, rewards, dones, infos, actions.

        Raises:
            ValueError: A reward is not finite, or the terminal observation of a time-out is missing.
        """
        action = self.spec.unscale_action(act)
        obs, rew, dones, infos = self.env.step(action)
        rew, dones = np.asarray(rew, np.float32), np.asarray(dones, bool)
        new_obs = self._normalized(obs)
        next_obs, terminated = new_obs.clone(), dones.copy()
        for i in np.flatnonzero(dones).tolist():
            terminated[i] = not infos[i].get("TimeLimit.truncated", False)  # a time-out is not a termination
            if infos[i].get("terminal_observation") is not None:
                next_obs[i] = self._normalized(infos[i]["terminal_observation"])[0]
            elif not terminated[i]:
                raise ValueError(
                    "the VecEnv provides no infos[i]['terminal_observation'] after a time-out: add it, as SB3's own do"
                )
        if not np.isfinite(rew).all():
            step = self.learner.state.n_env_steps + 1
            raise ValueError(f"the environment returned the rewards {rew} at step {step}: correct its reward function")
        self.replay.add(
            self.obs,
            torch.from_numpy(self.spec.scale_action(action)),
            self.transform(torch.from_numpy(rew)),
            torch.from_numpy(terminated.astype(np.float32)),
            next_obs,
            dones,
        )
        self.returns += rew
        self.lengths += 1
        for i in np.flatnonzero(dones).tolist():
            self.finished.append((float(self.returns[i]), int(self.lengths[i])))
            self.all_returns.append(float(self.returns[i]))
            self.n_before += not self.updating
            if "episode" in infos[i]:
                self.learner.ep_info_buffer.append(infos[i]["episode"])
            if "is_success" in infos[i]:
                self.learner.ep_success_buffer.append(infos[i]["is_success"])
            self.returns[i], self.lengths[i] = 0.0, 0
        self.run.n_episodes += int(dones.sum())
        if self.n == 1:
            self.replay.running.append(action[0].copy())
            if dones[0]:
                self.replay.running = []
                new_obs = self._normalized(self._reset())
        self.obs = new_obs
        return {"new_obs": obs, "rewards": rew, "dones": dones, "infos": infos, "actions": action}


def explore(learner: Learner, obs: Tensor, random: bool) -> np.ndarray:
    """Exploring actions: the stochastic policy, plus Gaussian noise of std `online_noise` if there is such a hyperparameter.

    All randomness comes from the generator for training, so that evaluation does not affect training.

    Args:
        learner: The agent that acts.
        obs: Normalised observations (n, S).
        random: Draw the actions uniformly instead.

    Returns:
        Actions (n, A) in [-1, 1].

    Raises:
        FloatingPointError: The policy's actions contain NaN or infinity.
    """
    shape, generator = (len(obs), learner.act_dim), learner.generator
    if random:
        act = 2.0 * torch.rand(shape, generator=generator, device=learner.device) - 1.0
    else:
        with torch.no_grad():
            noise = learner.draw_act(len(obs), False, learner.config, generator)
            act = learner.act(obs.to(learner.device), noise, learner.config)
            if std := getattr(learner.config, "online_noise", 0.0):
                act = act + std * torch.randn(shape, generator=generator, device=learner.device)
    out: np.ndarray = act.clamp(-1.0, 1.0).cpu().numpy()
    if not np.isfinite(out).all():
        raise FloatingPointError("the policy's actions contain NaN or infinity")
    return out
