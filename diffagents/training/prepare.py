"""Everything that `learn` checks and fits before the first update."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from diffagents.config.checks import whole_number
from diffagents.config.hyperparameters import make_config
from diffagents.config.presets import BLOCKS, resolve_preset
from diffagents.data.normalize import ObsNormalizer
from diffagents.data.transitions import Transitions
from diffagents.envs.vec_env import check_same_spaces
from diffagents.storage import checkpoint
from diffagents.training import provenance
from diffagents.training.plan import Plan


def apply_preset(agent: Any, dataset_id: str | None) -> None:
    """Put the values of the agent's preset under the explicit knobs; done again on data whose id may name a row."""
    if agent.preset is None:
        return
    applied, values = resolve_preset(agent.presets_name(), agent.preset, dataset_id)
    kwargs = values.pop("policy_kwargs", {})
    values = {name: value for name, value in values.items() if name not in agent._explicit}
    agent.config = make_config(agent.Config, type(agent).__name__, {**values, **agent._explicit})
    if agent._pristine:  # networks that hold something keep their shape
        agent.policy_kwargs = {**kwargs, **agent.policy_kwargs}
        if agent.spec is not None:
            agent._set_up(agent.spec)
    if agent.verbose:
        row = "" if applied and applied[-1] not in BLOCKS else ", no row for this dataset"
        print(f"preset {agent.preset!r}: {', '.join(applied) or 'defaults'}{row}; {values} {agent.policy_kwargs or ''}")


def check_arguments(agent: Any, total: Any, stages: Any, log_interval: Any) -> None:
    """Raises ValueError for what `learn` cannot mean, before any data is read."""
    known = list(agent.STAGE_SHARES)
    if stages is not None and not (isinstance(stages, (tuple, list)) and stages and set(stages) <= set(known)):
        raise ValueError(f"stages={stages!r}; give a tuple of some of {known}")
    if log_interval is not None:
        whole_number("log_interval", log_interval, 1, " of gradient steps")
    if total is not None:
        whole_number("total_timesteps", total, 1, " of gradient steps")
    checkpoint.need_learner(agent)


@contextmanager
def nothing_if_refused(agent: Any) -> Iterator[None]:
    """Leave the agent as it was when what follows raises: a refused dataset must not leave its transform behind."""
    before = dict(agent.__dict__)
    try:
        yield
    except BaseException:
        agent.__dict__.clear()
        agent.__dict__.update(before)
        raise


def adopt(agent: Any, data: Transitions) -> Transitions:
    """The first data: resolve the preset, build, fit the transforms. Later data: check that they fit the agent."""
    first = agent.reward_transform is None
    if first:
        apply_preset(agent, data.info["id"])
    if agent.spec is None:
        agent._set_up(data.spec)
    spec = agent.spec
    if data.spec.act_dim != spec.act_dim:
        raise ValueError(f"the data's actions have {data.spec.act_dim} dimensions, the agent's {spec.act_dim}")
    check_same_spaces(spec, data.spec.observation_space, spec.action_space)
    reach = np.abs(spec.scale_action(torch.stack([data.action.amin(0), data.action.amax(0)]).numpy())).max()
    if reach > 1 + 1e-4:
        low, high = spec.action_space.low.min(), spec.action_space.high.max()
        raise ValueError(
            f"the data's actions leave the agent's bounds [{low:g}, {high:g}] by {50 * (reach - 1):.3g} % of their range: "
            "give the agent env= when it first learns, or clip them with load_dataset(..., clip_actions=True)"
        )
    if first:  # fitted once: later data and online rewards use the same numbers
        agent.reward_transform = data.fit_reward_transform(agent.config.reward_transform)
        agent.dataset_info = dict(data.info)
        if agent.config.normalize_obs:
            agent.obs_normalizer = ObsNormalizer(spec.obs_dim).fit(data.obs).to(agent.device)
    return dataclasses.replace(data, spec=spec)


def make_plan(agent: Any, total: int | None, reset: bool, stages: Sequence[str] | None) -> Plan | None:
    """The stage lengths of one `learn` call; with reset=False an unfinished plan goes on. None: a finished one, nothing to do.

    Raises ValueError where what is asked for is not what the unfinished plan would do.
    """
    if not reset and agent.plan is None and any(agent.stage_steps.values()):
        raise ValueError(
            "this agent was saved without its trainer state, so its run cannot go on where it stopped: start a new plan "
            "with learn(data), or save with include_trainer_state=True next time"
        )
    if not reset and agent.plan is not None and (agent.plan.remaining > 0 or (total is None and stages is None)):
        plan: Plan = agent.plan
        if plan.remaining == 0:
            return None
        if (stages is not None and set(stages) != set(plan.lengths)) or (total is not None and int(total) != plan.total):
            raise ValueError(
                f"a plan of {plan.total:,} steps over {list(plan.lengths)} is unfinished: leave total_timesteps and stages "
                "out to finish it, or start another with reset_num_timesteps=True"
            )
        return plan
    shares = {name: share for name, share in agent.STAGE_SHARES.items() if stages is None or name in stages}
    if agent._pristine or any(agent.stage_steps.values()):  # else its networks came from files
        known = list(agent.STAGE_SHARES)
        for name in shares:  # `behavior` is fitted to the data alone
            missing = [e for e in known[: known.index(name)] if e not in shares and agent.stage_steps[e] == 0]
            if missing and name != "behavior":
                raise ValueError(
                    f"stages={tuple(shares)} leaves out {missing[0]!r}, which {name!r} builds on and which was never trained: "
                    f"add it, or run learn(data, stages=({missing[0]!r},)) first"
                )
    if total is not None:
        return Plan(Plan.split(int(total), shares))
    lengths = {name: getattr(agent.config, f"{name}_steps") for name in shares}
    if None in lengths.values():
        default = resolve_preset(agent.presets_name(), None, None)[1]
        lengths = {name: default[f"{name}_steps"] if steps is None else steps for name, steps in lengths.items()}
    if sum(lengths.values()) < 1:
        raise ValueError(f"the stage lengths {lengths} are all zero: give one of them steps")
    return Plan({name: steps for name, steps in lengths.items() if steps > 0})


def accept(
    agent: Any, data: Transitions, total: int | None, reset: bool, stages: Sequence[str] | None
) -> tuple[Plan | None, Transitions]:
    """The plan of one `learn` call (None: nothing to do) and the data in the agent's spaces, after every check on both."""
    data = adopt(agent, data)
    plan = make_plan(agent, total, reset, stages)
    if plan is None:
        if agent.verbose:
            print("nothing to do: the plan is finished; give total_timesteps or stages for a new one")
        return None, data
    check_rewards(plan, data)
    before, agent.plan = agent.plan, plan
    agent.stages()  # an algorithm may refuse its part of the plan
    agent.plan = before
    return plan, data


def begin(agent: Any, plan: Plan, data: Transitions, reset: bool) -> None:
    """Make `plan` the agent's; a new one starts the counts and the history anew."""
    new = plan is not agent.plan
    if data.info["sha256"] != agent.dataset_info["sha256"]:
        kept = "transform and normaliser" if new else "unfinished plan, transform and normaliser"
        warnings.warn(f"these are other data than {agent.dataset_info['id']}, whose {kept} are kept", stacklevel=3)
    if new and reset:
        agent.num_timesteps, agent.n_env_steps, agent.online, agent.history = 0, 0, None, []
    if new:
        agent.provenance = provenance.begin(agent.provenance, agent.device, reset)
    agent.plan = plan


def check_rewards(plan: Plan, data: Transitions) -> None:
    """Raises ValueError where something is to be learnt from rewards that prefer nothing."""
    if {"critic", "train"} & set(plan.lengths) and not data.done.any() and bool((data.rew == data.rew[0]).all()):
        raise ValueError(
            f"every reward is {float(data.rew[0]):g} and no episode terminates: there is nothing to prefer; add rewards, "
            "or imitate only, with DiffusionBC"
        )
