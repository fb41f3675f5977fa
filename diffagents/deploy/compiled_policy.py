"""The policy compiled for a fixed number of observations, for `Agent.compile_policy`."""

import functools
from typing import Any

import torch
from torch import Tensor

from diffagents.training.compiled import Compiled, NamedTensors, Networks
from diffagents.training.state import Learner
from diffagents.training.updates import Noise


def compiled_act(learner: Learner, n_obs: int, deterministic: bool, config: Any) -> Compiled:
    """Compile `learner.act`, by running it once; this takes tens of seconds.

    The compiled function reads the networks' tensors at each call, so that later training takes effect.

    Args:
        learner: The agent.
        n_obs: Number of observations in a call, at least 1.
        deterministic: Which noise of `draw_act` the calls are for.
        config: As in `Agent.act`.

    Returns:
        A function of normalised observations (n_obs, S) and noise that returns actions (n_obs, A) in [-1, 1].
    """
    networks = Networks({name: getattr(learner, name) for name in learner.MODEL}, functools.partial(learner.act, config=config))

    def act(tensors: NamedTensors, obs: Tensor, noise: Noise) -> Tensor:
        action: Tensor = torch.func.functional_call(networks, tensors, (obs, noise))
        return action

    compiled = Compiled(networks.tensors(), act, functools.partial(learner.act, config=config))
    noise = learner.draw_act(n_obs, deterministic, config, torch.Generator(learner.device))
    with torch.no_grad():
        compiled(torch.zeros(n_obs, learner.obs_dim, device=learner.device), noise)
    return compiled
