"""Log steps of a running stage: metrics, detection of divergence, and the snapshot to restore after it."""

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from diffagents.errors import TrainingDiverged
from diffagents.training.state import Learner, Snapshot, snapshot, training_tensors

INDENT = 11
"""Columns by which the continuation of a line of metrics is indented, so that it begins below the number of steps."""


class Monitor:
    """Logs one stage of one learner and keeps a snapshot of its last good state.

    Args:
        learner: The agent that is trained.
        stage: Name of the stage.
        length: Total steps of the stage.
        done: Steps already completed.

    Attributes:
        no_time_left: What to print in place of the time left while that cannot be known; empty if it can be.
    """

    def __init__(self, learner: Learner, stage: str, length: int, done: int) -> None:
        self.learner, self.stage, self.length = learner, stage, length
        self.good: Snapshot = snapshot(learner)
        self.good_at = done
        self.q_limit = math.inf
        self.start = (time.perf_counter(), done)
        self.no_time_left = ""

    def limit_q(self, sampler: Any) -> None:
        """Set the limit of |Q|: no return exceeds max|r| / (1 - gamma), so a mean Q of a hundred times that has diverged."""
        gamma = getattr(self.learner.config, "gamma", 0.0)
        self.q_limit = 100.0 * sampler.max_abs_reward / (1.0 - gamma) + 1.0

    def restart_clock(self, done: int | None = None) -> None:
        """Measure rates from now on, at which `done` steps are completed. Default: as many as at the last start."""
        self.start = (time.perf_counter(), self.start[1] if done is None else done)

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
                f"{self.stage} diverged between its steps {self.good_at} and {done} ({'  '.join(_each(means))}); the agent is "
                "restored to its state before that: try a lower learning_rate, another reward_transform or normalize_obs=True"
            )
        self.good, self.good_at = snapshot(learner), done
        if means:
            rate = (done - self.start[1]) / max(time.perf_counter() - self.start[0], 1e-9)
            left = self.no_time_left or f"{clock((self.length - done) / max(rate, 1e-9))} left"
            _report(learner, self.stage, done, self.length, rate, left, means)


def _report(learner: Learner, stage: str, done: int, length: int, rate: float, left: str, means: dict[str, float]) -> None:
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
        say([f"{stage:>8} {done:>9,}/{length:,}", *_each(means), f"{rate:,.0f}/s, {left}"], "  ")


def _each(means: dict[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in means.items()]


def say(text: str | Sequence[str], separator: str = " ") -> None:
    """Print a line. On a terminal that is too narrow for it, it is continued on indented lines.

    The terminal itself, or a progress bar on it, would break the line anywhere, also inside a number.

    Args:
        text: The line, or the parts between which it may be broken.
        separator: What stands between two parts; a string is split there.
    """
    parts, indent = (text.split(separator), 2) if isinstance(text, str) else (text, INDENT)
    width, lines = _columns(), [parts[0]]
    for part in parts[1:]:
        if width is not None and len(lines[-1]) + len(separator) + len(part) > width:
            lines.append(" " * indent + part)
        else:
            lines[-1] += separator + part
    print("\n".join(lines), flush=True)


def _columns() -> int | None:
    """The width of the terminal that `print` writes to; None if it writes to none."""
    try:
        if not sys.stdout.isatty():
            return None
        return int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (AttributeError, OSError, ValueError):  # no ordinary stream, as in notebooks
        return None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
