"""Stable-Baselines3 callbacks and loggers for our agents.

SB3's callbacks do not require SB3's base class: they only read a few attributes. SB3 is imported where it is used, so that
training from arrays without a callback does not pay for the import.
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from diffagents.envs.make import refuse_vec_normalize
from diffagents.training.provenance import note_evaluation
from diffagents.training.state import Learner

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger


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
            super()._on_training_start()
            self.counted = self.model.num_timesteps

        def _on_step(self) -> bool:
            self.pbar.update(self.num_timesteps - self.counted)  # one gradient step, or online one step of each environment
            self.counted = self.num_timesteps
            return True

    if progress_bar:
        callbacks.append(ProgressBar())
    return callbacks[0] if len(callbacks) == 1 else CallbackList(callbacks)


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
