"""Every registered algorithm at a size that trains in a second: what the tests that hold for all of them start from."""

import dataclasses
import importlib
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

import diffagents
from diffagents.agent import Agent
from diffagents.training.updates import Noise
from diffagents.types import Batch, Metrics

NAMES = list(diffagents.AGENTS)
STEPS = 12  # of each stage
# Periods short enough to come round, and sizes small enough not to be waited for.
_SMALL: dict[str, Any] = {
    "ema_start": 3,
    "ema_every": 2,
    "warmup_steps": 3,
    "policy_freq": 2,
    "n_candidates": 4,
    "n_samples": 2,
    "n_diffusion_steps": 3,
    "n_critics": 3,
    "n_support": 3,
    "n_support_states": 50,
}

BRIEF: dict[str, Any] = {"preset": None, "batch_size": 16, "verbose": 0, "seed": 0, "device": "cpu"}
"""Arguments of an agent of the paper's algorithm, to which a test adds numbers of steps."""


def agent_class(name: str) -> type[Agent]:
    return getattr(importlib.import_module(diffagents.AGENTS[name]), name)  # type: ignore[no-any-return]


def fields(name: str) -> dict[str, Any]:
    """Knob -> default."""
    return {field.name: field.default for field in dataclasses.fields(agent_class(name).Config)}


def offline_knobs(name: str) -> set[str]:
    """The knobs that `learn` reads: all but those of `learn_online`."""
    return {knob for knob in fields(name) if "online" not in knob}


def assert_all_differ(results: Mapping[Any, np.ndarray]) -> None:
    """No two of the results, by the knob that was changed for each, are equal: every knob does something."""
    for (a, x), (b, y) in itertools.combinations(results.items(), 2):
        assert not np.array_equal(x, y), f"{a} and {b} give the same"


def small(name: str, **knobs: Any) -> Agent:
    cls, known = agent_class(name), fields(name)
    settings: dict[str, Any] = {knob: value for knob, value in _SMALL.items() if knob in known}
    if name in ("QGPO", "SfBC"):
        settings["solver_steps"] = 4
    settings |= {knob: 16 for knob in known if knob.endswith("batch_size")}
    settings |= {f"{stage}_steps": STEPS for stage in cls.STAGE_SHARES}
    kwargs: dict[str, Any] = {"net_arch": [16, 16]}
    if name in ("SRPO", "QGPO", "SfBC", "IDQL"):
        kwargs["behavior_width"] = 16
    if name in ("SRPO", "IDQL"):
        kwargs["behavior_blocks"] = 1
    arguments: dict[str, Any] = {"seed": 0, "verbose": 0, "device": "cpu", "policy_kwargs": kwargs}
    return cls(**{**arguments, **settings, **knobs})


def shallow(name: str, **knobs: Any) -> Agent:
    """`small` with short samplers and one layer: a test that traces or compiles takes the time of the operations it meets."""
    settings: dict[str, Any] = {knob: 2 for knob in ("n_diffusion_steps", "solver_steps") if fields(name).get(knob) is not None}
    kwargs: dict[str, Any] = {"net_arch": [8]}
    if name in ("SRPO", "QGPO", "SfBC", "IDQL"):
        kwargs["behavior_width"] = 8
    if name in ("SRPO", "IDQL"):
        kwargs["behavior_blocks"] = 1
    return small(name, **{**settings, "policy_kwargs": kwargs, **knobs})


def update(loss: Any, batch: Batch, noise: Noise) -> Metrics:
    """One update, eagerly, of the part whose loss is this method of an agent, e.g. `agent.critic_loss`."""
    stages = loss.__self__.stages()
    update = next(update for stage in reversed(stages) for update in stage.updates if update.loss == loss)
    return update.step(batch, noise)
