"""Looking at a running stage: its metrics, whether all is finite, and the state to fall back to where it is not."""

import math
import time
from typing import Any

import torch

from diffagents.errors import TrainingDiverged
from diffagents.training import state
from diffagents.training.state import restore, snapshot


class Monitor:
    """The looks at one stage of one agent, `length` steps of which `done` are behind it."""

    def __init__(self, agent: Any, stage: str, length: int, done: int) -> None:
        self.agent, self.stage, self.length = agent, stage, length
        self.good, self.good_at = snapshot(agent), done
        self.q_limit = math.inf
        self.start = (time.perf_counter(), done)

    def limit_q(self, sampler: Any) -> None:
        """No policy earns more than max|r| / (1 - gamma): a mean Q a hundred times beyond has run away."""
        self.q_limit = 100.0 * sampler.max_abs_reward / (1.0 - getattr(self.agent.config, "gamma", 0.0)) + 1.0

    def restart_clock(self) -> None:
        """Rates are of what is done from now on."""
        self.start = (time.perf_counter(), self.start[1])

    def log(self, done: int, means: dict[str, float], put_back: bool = True) -> None:
        """Wait for the device, see whether all is well, report, and keep the state to fall back to.

        Raises TrainingDiverged, after putting that state back (or leaving that to the caller).
        """
        agent, tensors = self.agent, state.training_tensors(self.agent).values()
        finite = bool(torch.stack([t.sum() for t in tensors if t.is_floating_point()]).isfinite().all())
        if not finite or not all(map(math.isfinite, means.values())) or abs(means.get("q", 0.0)) > self.q_limit:
            if put_back:
                restore(agent, self.good)
            raise TrainingDiverged(
                f"{self.stage} diverged between its steps {self.good_at} and {done} ({_numbers(means)}); the agent holds its "
                "state from before: try a lower learning_rate, another reward_transform or normalize_obs=True"
            )
        self.good, self.good_at = snapshot(agent), done
        if means:
            rate = (done - self.start[1]) / max(time.perf_counter() - self.start[0], 1e-9)
            _report(agent, self.stage, done, self.length, rate, means)


def _report(agent: Any, stage: str, done: int, length: int, rate: float, means: dict[str, float]) -> None:
    if len(agent.history) >= 10_000:  # a long run with short intervals: keep every other row, so that it can be saved
        agent.history = agent.history[::2]
    agent.history.append({"num_timesteps": agent.num_timesteps, "stage": stage, "stage_step": done, **means})
    if agent._logger is not None:
        for name, value in means.items():
            agent._logger.record(f"{stage}/{name}", value)
        agent._logger.record("time/fps" if stage == "online" else "time/updates_per_second", rate)
        agent._logger.record("train/n_updates", agent.n_updates, exclude="tensorboard")
        agent.dump_logs()
    if agent.verbose:
        left = clock((length - done) / max(rate, 1e-9))
        print(f"{stage:>8} {done:>9,}/{length:,}  {_numbers(means)}  {rate:,.0f}/s, {left} left", flush=True)


def _numbers(means: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in means.items())


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
