"""The live environments while an agent learns in them: acting, what is kept of each step, seeded episodes, walking back."""

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffagents.data.normalize import RewardTransform
from diffagents.data.replay_buffer import Replay
from diffagents.training.plan import OnlineRun


class World:
    """The environments, and where they are: n of them stepped together. With one, episodes are seeded one by one.

    So the k-th episode of a seed is the same in every run, and a resumed run can walk its unfinished one again.
    """

    def __init__(self, agent: Any, run: OnlineRun) -> None:
        self.agent, self.run, self.env, self.spec = agent, run, agent._env, agent.spec
        self.n = self.env.num_envs
        self.replay: Replay = agent.replay_buffer
        self.normalizer = copy.deepcopy(agent.obs_normalizer).cpu()
        self.transform: RewardTransform = agent.reward_transform
        self.returns, self.lengths = np.zeros(self.n), np.zeros(self.n, int)
        self.finished: list[tuple[float, int]] = []  # (return, length) since the last look
        self.obs = self._begin()

    def _normalized(self, obs: Any) -> Tensor:
        flat, _ = self.spec.flatten_obs(obs)
        with torch.no_grad():
            out: Tensor = self.normalizer(torch.from_numpy(flat))
        return out

    def _reset(self) -> Any:
        words = np.random.SeedSequence([self.agent.seed, self.run.n_episodes]).generate_state(1)
        self.env.seed(int(words[0] % 2**31))
        try:
            return self.env.reset()
        except RuntimeError as error:
            if "reset" not in str(error):
                raise
            raise ValueError("episodes are seeded one by one, which needs Monitor(env, allow_early_resets=True)") from None

    def _begin(self) -> Tensor:
        actions, replay = list(self.replay.running) if self.n == 1 else [], self.replay
        if not actions:  # nothing to walk again: several environments go on with new episodes
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
                "the environment did not come back to where the run stopped: it goes on with a new episode", stacklevel=5
            )
            self.returns[:], self.lengths[:] = 0.0, 0
            replay.cut()
            self.run.n_episodes += 1
            now = self._normalized(self._reset())
        return now

    def step(self, act: np.ndarray) -> dict[str, Any]:
        """Take the actions (n, A) in [-1, 1] and keep what follows. Returns what callbacks may look at."""
        action = self.spec.unscale_action(act)
        obs, rew, dones, infos = self.env.step(action)
        rew, dones = np.asarray(rew, np.float32), np.asarray(dones, bool)
        new_obs = self._normalized(obs)
        next_obs, terminated = new_obs.clone(), dones.copy()
        for i in np.flatnonzero(dones).tolist():
            terminated[i] = not infos[i].get("TimeLimit.truncated", False)  # a time-out is not an end
            if infos[i].get("terminal_observation") is not None:
                next_obs[i] = self._normalized(infos[i]["terminal_observation"])[0]
            elif not terminated[i]:
                raise ValueError("the VecEnv gives no infos[i]['terminal_observation'] after a time-out, as SB3's own do")
        if not np.isfinite(rew).all():
            raise ValueError(f"the environment gave the rewards {rew} at step {self.agent.n_env_steps + 1}: mend it first")
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
            self.returns[i], self.lengths[i] = 0.0, 0
        self.run.n_episodes += int(dones.sum())
        if self.n == 1:
            self.replay.running.append(action[0].copy())
            if dones[0]:
                self.replay.running = []
                new_obs = self._normalized(self._reset())
        self.obs = new_obs
        return {"new_obs": obs, "rewards": rew, "dones": dones, "infos": infos, "actions": action}


def explore(agent: Any, obs: Tensor, random: bool) -> np.ndarray:
    """What the agent does to learn: its random policy, plus Gaussian noise of `online_noise` where it has that knob.

    obs (n, S) normalised -> (n, A) in [-1, 1]. All randomness is from the generator for training: evaluating changes nothing.
    """
    shape, generator = (len(obs), agent.act_dim), agent.generator
    if random:
        act = 2.0 * torch.rand(shape, generator=generator, device=agent.device) - 1.0
    else:
        with torch.no_grad():
            noise = agent.draw_act(len(obs), False, agent.config, generator)
            act = agent.act(obs.to(agent.device), noise, agent.config)
            if std := getattr(agent.config, "online_noise", 0.0):
                act = act + std * torch.randn(shape, generator=generator, device=agent.device)
    out: np.ndarray = act.clamp(-1.0, 1.0).cpu().numpy()
    if not np.isfinite(out).all():
        raise FloatingPointError("the policy's actions are not finite numbers")
    return out
