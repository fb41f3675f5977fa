"""Stable-Baselines3 callbacks and loggers on our agents."""

import importlib.util
from typing import TYPE_CHECKING, Any

from diffagents.training.provenance import note_evaluation

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger


def make_callback(agent: Any, callback: Any, progress_bar: bool) -> "BaseCallback | None":
    """A callback, a list of them, a function or None -> one initialised SB3 callback, or None when there is nothing to do."""
    if callback is None and not progress_bar:
        return None
    from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback

    def as_callback(one: Any) -> BaseCallback:
        if isinstance(one, BaseCallback):
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
            self.pbar.update(self.num_timesteps - self.counted)  # gradient steps; online a step for every environment
            self.counted = self.num_timesteps
            return True

    if progress_bar:
        callbacks.append(ProgressBar())
    whole = callbacks[0] if len(callbacks) == 1 else CallbackList(callbacks)
    whole.init_callback(agent)
    return whole


def make_logger(agent: Any, name: str, reset_num_timesteps: bool) -> "Logger":
    """SB3's Logger; its table goes to stdout from verbose=2 on, our own one-line report serves verbose=1."""
    from stable_baselines3.common.utils import configure_logger

    if agent.tensorboard_log is not None and importlib.util.find_spec("tensorboard") is None:
        raise ImportError('tensorboard_log needs tensorboard: pip install "diffagents[tensorboard]"')
    return with_history(configure_logger(int(agent.verbose >= 2), agent.tensorboard_log, name, reset_num_timesteps), agent)


def with_history(logger: "Logger", agent: Any) -> "Logger":
    """The logger, made to note what an EvalCallback finds: `agent.provenance["evaluations"]`, the curve on the card."""
    from stable_baselines3.common.logger import KVWriter

    class Evaluations(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            if "eval/mean_reward" in key_values:
                note_evaluation(agent.provenance, int(step), float(key_values["eval/mean_reward"]))

        def close(self) -> None:
            pass

    others = [form for form in logger.output_formats if type(form).__name__ != "Evaluations"]
    logger.output_formats = [*others, Evaluations()]
    return logger
