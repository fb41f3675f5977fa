"""Stable-Baselines3 callbacks and loggers for our agents.

SB3's callbacks do not require SB3's base class: they only read a few attributes. SB3 is imported where it is used, so that
training from arrays without a callback does not pay for the import.
"""

import importlib.util
import os
import time
import warnings
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from diffagents.envs.make import refuse_vec_normalize
from diffagents.training.provenance import note_evaluation
from diffagents.training.state import Learner

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger

WINDOW = 30.0
"""Seconds over which a progress bar measures the speed."""


def make_callback(callback: Any, progress_bar: bool) -> "BaseCallback | None":
    """Combine the callbacks into one SB3 callback, not initialised yet; None if there are none.

    Args:
        callback: An SB3 callback, a function of (locals, globals), a list of them, or None.
        progress_bar: Add SB3's progress bar.

    Raises:
        TypeError: `callback` is something else.
        ValueError: An EvalCallback's environment normalises observations.
    """
    if callback is None and not progress_bar:
        return None
    from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback

    def as_callback(one: Any) -> BaseCallback:
        if isinstance(one, BaseCallback):
            refuse_vec_normalize(getattr(one, "eval_env", None), rewards=False)
            return one
        if isinstance(one, (list, tuple)):
            return CallbackList([as_callback(item) for item in one])
        if callable(one):
            return ConvertCallback(one)
        raise TypeError(f"callback must be an SB3 callback, a function, or a list of them, not {type(one).__name__}")

    callbacks = [as_callback(callback)] if callback is not None else []

    class ProgressBar(ProgressBarCallback):
        def _on_training_start(self) -> None:
            self.counted = self.model.num_timesteps
            total = self.locals["total_timesteps"] - self.counted
            self.left = TimeLeft(total)
            self.pbar = _bar(total, self.left)

        def _on_step(self) -> bool:
            steps = self.num_timesteps - self.counted  # one gradient step, or online one step of each environment
            self.counted = self.num_timesteps
            self.left.add(steps, *_phase(self.locals["self"]))
            self.pbar.update(steps)
            return True

    if progress_bar:
        callbacks.append(ProgressBar())
    return callbacks[0] if len(callbacks) == 1 else CallbackList(callbacks)


class TimeLeft:
    """The time left of a run, from its speed in the present phase only, over the last WINDOW seconds.

    Args:
        total: Steps of the run.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.seconds: float | None = None
        self._phase: Any = None
        self._marks: deque[tuple[float, int]] = deque()  # (time, steps done), at least a quarter of a second apart

    def add(self, steps: int, phase: Any, is_representative: bool = True) -> None:
        """Note that some more steps are done.

        Args:
            steps: Their number.
            phase: Names the phase that they belong to.
            is_representative: Whether the rest of the run may be as fast as this phase.
        """
        now, self.done = time.perf_counter(), self.done + steps
        if phase != self._phase:
            self._phase, self.seconds = phase, None
            self._marks.clear()
        elif not is_representative or now - self._marks[-1][0] < 0.25:
            return
        self._marks.append((now, self.done))
        while now - self._marks[0][0] > WINDOW:
            self._marks.popleft()
        begun, before = self._marks[0]
        if self.done > before:
            self.seconds = (self.total - self.done) * (now - begun) / (self.done - before)

    def __str__(self) -> str:
        """As h:mm:ss, or a sign that it is unknown."""
        return "-:--:--" if self.seconds is None else str(timedelta(seconds=round(self.seconds)))


def _phase(learner: Learner) -> tuple[Any, bool]:
    """The phase of the training that is running, and whether the rest may be as fast as it is.

    The steps of an online run before the first update are far faster than the rest, whose speed they do not tell.
    """
    run, plan = learner.state.online, learner.state.plan
    if learner.state.exploring and run is not None:
        updates = run.n_updates > 0
        return updates, updates or run.starts >= run.total
    return None if plan is None else next(reversed(plan.done), None), True


def _bar(total: int, left: TimeLeft) -> Any:
    """A progress bar like SB3's, with `left` as its time left."""
    from rich.progress import BarColumn, ProgressColumn, Task, TimeElapsedColumn
    from rich.text import Text
    from tqdm import TqdmExperimentalWarning
    from tqdm.rich import FractionColumn, RateColumn, tqdm

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(str(left), style="progress.remaining")

    share = "[progress.percentage]{task.percentage:>4.0f}%"
    columns = (
        share,
        BarColumn(bar_width=None),
        FractionColumn(),
        "[",
        TimeElapsedColumn(),
        "<",
        Left(),
        ",",
        RateColumn("it"),
        "]",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)
        return tqdm(total=total, progress=columns)


def make_logger(learner: Learner, name: str, reset_num_timesteps: bool) -> "Logger":
    """SB3's Logger for `learner`. It prints SB3's tables only from verbose=2 on; verbose=1 prints one line per log step.

    Raises:
        ImportError: `tensorboard_log` is set but tensorboard is not installed.
    """
    from stable_baselines3.common.utils import configure_logger

    if learner.tensorboard_log is not None and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("tensorboard_log needs tensorboard: pip install tensorboard")
    folder = None if learner.tensorboard_log is None else os.path.expanduser(learner.tensorboard_log)
    logger = configure_logger(int(learner.verbose >= 2), folder, name, reset_num_timesteps)
    return with_history(logger, learner)


def with_history(logger: "Logger", learner: Learner) -> "Logger":
    """The logger, extended so that the scores of an EvalCallback are kept in the learner's provenance, for the model card."""
    from stable_baselines3.common.logger import KVWriter

    class Evaluations(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            if "eval/mean_reward" in key_values:
                note_evaluation(learner.state.provenance, int(step), float(key_values["eval/mean_reward"]))

        def close(self) -> None:
            pass

    others = [form for form in logger.output_formats if type(form).__name__ != "Evaluations"]
    logger.output_formats = [*others, Evaluations()]
    return logger
