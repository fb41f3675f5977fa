"""Acting compiled, for a fixed number of observations."""

import functools
from typing import Any

import torch
from torch import Tensor

from diffagents.training.compiled import Compiled, NamedTensors, Networks
from diffagents.training.state import Learner
from diffagents.training.updates import Noise


def compiled_act(agent: Learner, n_obs: int, deterministic: bool, config: Any) -> Compiled:
    """`agent.act` at `config` for n_obs observations, compiled."""
    roof = Networks({name: getattr(agent, name) for name in agent.MODEL}, functools.partial(agent.act, config=config))

    def act(tensors: NamedTensors, obs: Tensor, noise: Noise) -> Tensor:
        action: Tensor = torch.func.functional_call(roof, tensors, (obs, noise))
        return action

    compiled = Compiled(roof.tensors(), act, functools.partial(agent.act, config=config))
    noise = agent.draw_act(n_obs, deterministic, config, torch.Generator(agent.device))
    with torch.no_grad():
        compiled(torch.zeros(n_obs, agent.obs_dim, device=agent.device), noise)
    return compiled
