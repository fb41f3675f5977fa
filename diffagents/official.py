"""The authors' own checkpoints -> our networks. Files are read with `weights_only=True`: tensors only, no code.

SRPO (thu-ml/SRPO) saves the behaviour as `diffusion_behavior.*`, the critic as `q0.*`, `q0_target.*`, `vf.v.*`, and never
the extracted policy. Layers appear by their place in an `nn.Sequential`, twins as `q1`, `q2`.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from diffagents.agents.srpo import SRPO
from diffagents.checkpoint import load_state
from diffagents.types import Spec

State = Mapping[str, Tensor]


def srpo_from_official(behavior: Any, critic: Any, policy: Any = None, *, env: Any = None, **kwargs: Any) -> SRPO:
    """An SRPO agent from official files (paths, or state dicts already read); see `SRPO.from_official`."""
    behavior_state = srpo_behavior_state(read_checkpoint(behavior, "behavior"))
    critic_state = srpo_critic_state(read_checkpoint(critic, "critic"))
    act_dim = len(behavior_state["net.output.bias"])
    v_layers = _linear_sizes(critic_state, "v")
    obs_dim = v_layers[0]
    q_hidden = [critic_state[f"q.weights.{i}"].shape[2] for i in range(len(v_layers) - 2)]
    arch: dict[str, Any] = {"qf": q_hidden, "vf": v_layers[1:-1]}
    policy_state = None
    if policy is not None:
        policy_state = srpo_policy_state(read_checkpoint(policy, "policy"))
        arch["pi"] = _linear_sizes(policy_state, "net")[1:-1]
    n_blocks = len([key for key in behavior_state if key.endswith("norm.weight")])
    asked = kwargs.pop("policy_kwargs", {}).get("net_arch", {})
    if policy_state is None and asked:  # the policy's size is the user's to choose, the others are the file's
        arch["pi"] = asked["pi"] if isinstance(asked, dict) else asked
    policy_kwargs = {
        "net_arch": arch,
        "behavior_width": len(behavior_state["net.input.bias"]),
        "behavior_blocks": n_blocks,
    }
    agent = SRPO(env=env, policy_kwargs=policy_kwargs, **kwargs)
    if agent.spec is None:  # the official tasks have unbounded observations and actions in [-1, 1]
        box = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        agent._set_up(Spec(box, spaces.Box(-1.0, 1.0, (act_dim,), np.float32)))
    agent._pristine = False
    noise = agent.behavior.noise  # ours: the official file has no such tensor
    load_state(agent.behavior, {**behavior_state, "noise": noise})
    load_state(agent.critic, critic_state)
    if policy_state is None:
        agent._policy_missing = True
    else:
        load_state(agent.policy, policy_state)
    return agent


def read_checkpoint(source: Any, what: str) -> dict[str, Tensor]:
    """A path or a state dict -> named tensors. Raises FileNotFoundError, or ValueError for what is not a state dict."""
    if isinstance(source, (str, pathlib.Path)):
        path = pathlib.Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no official {what} checkpoint at {path}")
        try:
            source = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several kinds for a bad file
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{path} is not a checkpoint of plain tensors ({reason}): export its state_dict() with torch.save"
            ) from None
    if not isinstance(source, Mapping) or not all(isinstance(value, Tensor) for value in source.values()):
        raise ValueError(f"the official {what} checkpoint must be a state dict of tensors, not {type(source).__name__}")
    return dict(source)


def srpo_behavior_state(official: State) -> dict[str, Tensor]:
    """Official `ScoreNet` names -> those of `Behavior` (without `noise`). The never-used `residual` layers are dropped."""
    rules = [
        (r"embed\.0\.W", "net.frequencies"),
        (r"cond_model\.(\d)\.(weight|bias)", r"net.time_mlp.\1.\2"),
        (r"main\.fc\.(weight|bias)", r"net.input.\1"),
        (r"main\.blocks\.(\d+)\.layer_norm\.(weight|bias)", r"net.blocks.\1.norm.\2"),
        (r"main\.blocks\.(\d+)\.fc1\.(weight|bias)", r"net.blocks.\1.expand.\2"),
        (r"main\.blocks\.(\d+)\.fc2\.(weight|bias)", r"net.blocks.\1.project.\2"),
        (r"main\.out_fc\.(weight|bias)", r"net.output.\1"),
    ]
    state: dict[str, Tensor] = {}
    for name, value in official.items():
        for pattern, ours in rules:
            match = re.fullmatch(rf"(?:.*\.)?{pattern}", name)
            if match:
                state[match.expand(ours)] = value.float()
    if "net.output.bias" not in state:
        raise ValueError(
            f"no SRPO behaviour network among the tensors {list(official)[:3]}...: expected diffusion_behavior.main.*"
        )
    return state


def srpo_critic_state(official: State) -> dict[str, Tensor]:
    """Official twin Q, its target and V -> names of `IQLCritic`; the twins are stacked, weights transposed to (E, in, out)."""
    state: dict[str, Tensor] = {}
    for theirs, ours in ((r"(?:.*\.)?(?:q0|q)", "q"), (r"(?:.*\.)?(?:q0_target|q_target)", "q_target")):
        for kind, place in (("weight", "weights"), ("bias", "biases")):
            twins: dict[int, dict[int, Tensor]] = {}
            for name, value in official.items():
                match = re.fullmatch(rf"{theirs}\.q([12])\.(\d+)\.{kind}", name)
                if match:
                    twins.setdefault(int(match[2]), {})[int(match[1])] = value.float()
            for i, (_, pair) in enumerate(sorted(twins.items())):
                if set(pair) != {1, 2}:
                    raise ValueError(f"the official critic has only one of the twins of {ours}, layer {i}")
                tensors = [pair[1], pair[2]]
                stacked = [t.T for t in tensors] if kind == "weight" else [t[None] for t in tensors]
                state[f"{ours}.{place}.{i}"] = torch.stack(stacked).contiguous()
    for name, value in official.items():
        match = re.fullmatch(r"(?:.*\.)?(?:vf|v)\.v\.(\d+)\.(weight|bias)", name)
        if match:
            state[f"v.{match[1]}.{match[2]}"] = value.float()
    if not {"q.biases.0", "q_target.biases.0", "v.0.bias"} <= set(state):
        raise ValueError(f"no SRPO critic among the tensors {list(official)[:3]}...: expected q0.*, q0_target.* and vf.v.*")
    return state


def srpo_policy_state(official: State) -> dict[str, Tensor]:
    """Official `Dirac_Policy` (`net.<i>.weight`, any prefix) -> names of `TanhPolicy`."""
    state = {}
    for name, value in official.items():
        match = re.fullmatch(r"(?:.*\.)?net\.(\d+)\.(weight|bias)", name)
        if match:
            state[f"net.{match[1]}.{match[2]}"] = value.float()
    if not state:
        raise ValueError(f"no SRPO policy among the tensors {list(official)[:3]}...: expected net.0.weight, ...")
    return state


def _linear_sizes(state: State, prefix: str) -> list[int]:
    """Widths [in, hidden..., out] of a Sequential of Linears named `<prefix>.<i>.weight`."""
    found = sorted(
        (int(m[1]), value) for name, value in state.items() if (m := re.fullmatch(rf"{prefix}\.(\d+)\.weight", name))
    )
    return [found[0][1].shape[1], *(value.shape[0] for _, value in found)]
