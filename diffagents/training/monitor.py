"""Log steps of a running stage: metrics, detection of divergence, and the snapshot to restore after it."""

import math
import time
from typing import Any

import torch

from diffagents.errors import TrainingDiverged
from diffagents.training.state import Learner, Snapshot, snapshot, training_tensors


class Monitor:
    """Logs one stage of one learner and keeps a snapshot of its last good state.

    Args:
        learner: The agent that is trained.
        stage: Name of the stage.
        length: Total steps of the stage.
        done: Steps already completed.
    """

    def __init__(self, learner: Learner, stage: str, length: int, done: int) -> None:
        self.learner, self.stage, self.length = learner, stage, length
        self.good: Snapshot = snapshot(learner)
        self.good_at = done
        self.q_limit = math.inf
        self.start = (time.perf_counter(), done)

    def limit_q(self, sampler: Any) -> None:
        """Set the limit of |Q|: no return exceeds max|r| / (1 - gamma), so a mean Q of a hundred times that has diverged."""
        gamma = getattr(self.learner.config, "gamma", 0.0)
        self.q_limit = 100.0 * sampler.max_abs_reward / (1.0 - gamma) + 1.0

    def restart_clock(self) -> None:
        """Measure rates from now on."""
        self.start = (time.perf_counter(), self.start[1])

    def log(self, done: int, means: dict[str, float]) -> None:
        """Wait for the device, check that everything is finite, report the metrics and take a snapshot.

        Args:
            done: Completed steps of the stage.
            means: The means of the metrics since the last log step.

        Raises:
            TrainingDiverged: A tensor or a metric is not finite, or Q has diverged. The caller restores `good`.
        """
        learner = self.learner
        sums = [tensor.sum() for tensor in training_tensors(learner).values() if tensor.is_floating_point()]
        finite = bool(torch.stack(sums).isfinite().all())
        if not finite or not all(map(math.isfinite, means.values())) or abs(means.get("q", 0.0)) > self.q_limit:
            raise TrainingDiverged(
                f"{self.stage} diverged between its steps {self.good_at} and {done} ({_numbers(means)}); the agent is "
                "restored to its state before that: try a lower learning_rate, another reward_transform or normalize_obs=True"
            )
        self.good, self.good_at = snapshot(learner), done
        if means:
            rate = (done - self.start[1]) / max(time.perf_counter() - self.start[0], 1e-9)
            _report(learner, self.stage, done, self.length, rate, means)


def _report(learner: Learner, stage: str, done: int, length: int, rate: float, means: dict[str, float]) -> None:
    """Add a row to the history, to SB3's logger if there is one, and to the terminal."""
    state, logger = learner.state, learner.sb3_logger
    if len(state.history) >= 10_000:  # a long run with short intervals: keep every other row, so that it can be saved
        state.history = state.history[::2]
    state.history.append({"num_timesteps": state.num_timesteps, "stage": stage, "stage_step": done, **means})
    if logger is not None:
        for name, value in means.items():
            logger.record(f"{stage}/{name}", value)
        logger.record("time/fps" if stage == "online" else "time/updates_per_second", rate)
        logger.record("train/n_updates", state.n_updates, exclude="tensorboard")
        learner.dump_logs()
    if learner.verbose:
        left = clock((length - done) / max(rate, 1e-9))
        print(f"{stage:>8} {done:>9,}/{length:,}  {_numbers(means)}  {rate:,.0f}/s, {left} left", flush=True)


def _numbers(means: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in means.items())


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
