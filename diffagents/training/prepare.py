"""Everything that `learn` checks and fits before the first update: preset, spaces, transforms, plan.

The functions that change a learner (`apply_preset`, `adopt`) are called on a candidate, a copy that replaces the
agent in `Agent.learn` only after every check has passed. So a rejected dataset leaves the agent unchanged.
"""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from diffagents.config.checks import whole_number
from diffagents.config.hyperparameters import build_config
from diffagents.config.presets import BLOCKS, FAST, resolve_preset
from diffagents.data.normalize import ObsNormalizer
from diffagents.data.sampler import Sampler
from diffagents.data.transitions import Transitions
from diffagents.envs.vec_env import check_same_spaces
from diffagents.errors import short
from diffagents.training import provenance
from diffagents.training.plan import Plan
from diffagents.training.state import Learner

MAX_DESCRIPTION_BYTES = (1 << 20) - (1 << 17)
"""The largest size of spaces and dataset in config.json. The rest of the limit of storage/artifact.py is for other entries."""


def check_arguments(learner: Learner, total: int | None, stages: Sequence[str] | None, log_interval: int | None) -> None:
    """Check the arguments of `learn` before any data is read.

    Raises:
        ValueError: An unknown stage, or a number of steps that is not a positive whole number.
    """
    known = list(learner.STAGE_SHARES)
    if stages is not None and not (isinstance(stages, (tuple, list)) and stages and set(stages) <= set(known)):
        raise ValueError(f"stages={stages!r} must be a tuple of some of {known}")
    if log_interval is not None:
        whole_number("log_interval", log_interval, 1, " of gradient steps")
    if total is not None:
        whole_number("total_timesteps", total, 1, " of gradient steps")


def apply_preset(learner: Learner, dataset_id: str | None) -> None:
    """Set the preset's values for this dataset, except for the hyperparameters that the user has set explicitly.

    Networks that have been trained or loaded keep their shape; untrained ones are rebuilt if they exist already. The values of
    "fast" depend on no dataset: the constructor has set them, and a loaded agent keeps the ones that it was saved with.
    """
    if learner.preset is None:
        return
    if learner.preset == FAST:
        if learner.verbose:
            print(f"preset {FAST!r} (see .config)")
        return
    applied, values = resolve_preset(learner.presets_name(), learner.preset, dataset_id)
    kwargs = values.pop("policy_kwargs", {})
    values = {name: value for name, value in values.items() if name not in learner.explicit}
    learner.config = build_config(learner.Config, type(learner).__name__, {**values, **learner.explicit})
    if learner.state.pristine:
        learner.policy_kwargs = {**kwargs, **learner.policy_kwargs}
        if learner.spec is not None:
            learner.set_up(learner.spec)
    if learner.verbose:
        row = "" if applied and applied[-1] not in BLOCKS else ", no row for this dataset"
        print(f"preset {learner.preset!r}: {', '.join(applied) or 'defaults'}{row}; {values} {learner.policy_kwargs or ''}")


def adopt(learner: Learner, data: Transitions) -> Transitions:
    """Adapt a learner to a dataset: for the first one, apply the preset, build the networks and fit the transforms.

    Later datasets are only checked against the learner's spaces; the transforms of the first one are kept.

    Returns:
        The dataset, with the learner's spaces.

    Raises:
        ValueError: Observations or actions do not fit the learner, the transform cannot be fitted, or the agent could not be
            saved.
    """
    state = learner.state
    first = state.reward_transform is None
    if first:
        apply_preset(learner, data.info["id"])
    if learner.spec is None:
        learner.set_up(data.spec)
    spec = learner.require_spec()
    if data.spec.act_dim != spec.act_dim:
        raise ValueError(f"the data's actions have {data.spec.act_dim} dimensions, but the agent's have {spec.act_dim}")
    check_same_spaces(spec, data.spec.observation_space, spec.action_space)
    extremes = torch.stack([data.action.amin(0), data.action.amax(0)]).numpy()
    reach = np.abs(spec.scale_action(extremes)).max()
    if reach > 1 + 1e-4:
        low, high = spec.action_space.low.min(), spec.action_space.high.max()
        raise ValueError(
            f"the data's actions leave the agent's bounds [{low:g}, {high:g}] by {50 * (reach - 1):.3g} % of their range: "
            "give the agent env= when it first learns, or clip them with load_dataset(..., clip_actions=True)"
        )
    if first:
        state.reward_transform = data.fit_reward_transform(learner.config.reward_transform)
        state.dataset_info = _description(data)
        if learner.config.normalize_obs:
            learner.obs_normalizer = ObsNormalizer(spec.obs_dim).fit(data.obs).to(learner.device)
    check_size(learner)
    return dataclasses.replace(data, spec=spec)


def _description(data: Transitions) -> dict[str, Any] | None:
    """The info of a dataset as it can be saved and read again. Raises ValueError if it is not that of a dataset."""
    try:
        return provenance.checked_dataset(data.info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the agent could not be saved, because the info of its dataset is not what load_dataset makes ({short(error)}): "
            "load the data with load_dataset"
        ) from None


def check_size(learner: Learner) -> None:
    """Raise ValueError if the spaces and the dataset of a learner are too large to be saved, before it is trained for hours."""
    described = {"spec": learner.require_spec().to_json(), "dataset": learner.state.dataset_info}
    n_bytes = len(json.dumps(described, indent=1, default=str))
    if n_bytes > MAX_DESCRIPTION_BYTES:
        raise ValueError(
            f"the agent could not be saved: its spaces and dataset take {n_bytes:,} bytes in config.json, more than "
            f"{MAX_DESCRIPTION_BYTES:,}; give all numbers of an observation the same bounds, or encode it as a shorter vector"
        )


def make_plan(learner: Learner, total: int | None, reset: bool, stages: Sequence[str] | None) -> Plan | None:
    """The plan of one call of `learn`.

    Args:
        learner: The learner that will run it.
        total: Total gradient steps; None for each stage's own length.
        reset: False continues an unfinished plan.
        stages: Run only these; None runs all.

    Returns:
        A new plan, or the learner's unfinished one; None if there is nothing to do because the plan is finished.

    Raises:
        ValueError: The arguments contradict the unfinished plan, or a stage builds on one that was never trained.
    """
    state = learner.state
    trained = any(state.stage_steps.values())
    if not reset and state.plan is None and trained:
        raise ValueError(
            "this agent was saved without its trainer state, so its run cannot be resumed where it stopped: start a new plan "
            "with learn(data), or save with include_trainer_state=True next time"
        )
    if not reset and state.plan is not None and (state.plan.remaining > 0 or (total is None and stages is None)):
        plan = state.plan
        if plan.remaining == 0:
            return None
        if (stages is not None and set(stages) != set(plan.lengths)) or (total is not None and int(total) != plan.total):
            raise ValueError(
                f"a plan of {plan.total:,} steps over {list(plan.lengths)} is unfinished: leave total_timesteps and stages "
                "out to finish it, or start a new one with reset_num_timesteps=True"
            )
        return plan
    shares = {name: share for name, share in learner.STAGE_SHARES.items() if stages is None or name in stages}
    if state.pristine or trained:  # otherwise the networks came from files
        known = list(learner.STAGE_SHARES)
        for name in shares:
            earlier = known[: known.index(name)]
            missing = [other for other in earlier if other not in shares and state.stage_steps[other] == 0]
            if missing and name != "behavior":  # the behaviour model is fitted to the data alone
                raise ValueError(
                    f"stages={tuple(shares)} leaves out {missing[0]!r}, which {name!r} builds on and which was never trained: "
                    f"add it, or run learn(data, stages=({missing[0]!r},)) first"
                )
    if total is not None:
        return Plan(Plan.split(int(total), shares))
    lengths = {name: getattr(learner.config, f"{name}_steps") for name in shares}
    if None in lengths.values():
        default = resolve_preset(learner.presets_name(), None, None)[1]
        lengths = {name: default[f"{name}_steps"] if steps is None else steps for name, steps in lengths.items()}
    if sum(lengths.values()) < 1:
        raise ValueError(f"the stage lengths {lengths} are all zero: give at least one stage a positive number of steps")
    return Plan({name: steps for name, steps in lengths.items() if steps > 0})


def make_sampler(learner: Learner, data: Transitions) -> Sampler:
    """The data as the learner sees them: normalised, transformed, and drawn as its `return_temperature` says."""
    sampler = data.sampler(learner.device, learner.state.reward_transform, learner.obs_normalizer)
    temperature: float | None = getattr(learner.config, "return_temperature", None)
    return sampler if temperature is None else sampler.prefer_returns(temperature)


def accept(
    learner: Learner, data: Transitions, total: int | None, reset: bool, stages: Sequence[str] | None
) -> tuple[Plan | None, Transitions]:
    """Adopt the data and make the plan of one call of `learn`, after every check on both.

    Returns:
        The plan, None if there is nothing to do, and the data with the learner's spaces.
    """
    data = adopt(learner, data)
    plan = make_plan(learner, total, reset, stages)
    if plan is None:
        if learner.verbose:
            print("nothing to do: the plan is finished; pass total_timesteps or stages for a new one")
        return None, data
    check_rewards(plan, data)
    learner.stages(plan)  # raises if the algorithm cannot run this plan
    return plan, data


def check_rewards(plan: Plan, data: Transitions) -> None:
    """Raise ValueError if the plan learns from rewards that make no action better than another."""
    if {"critic", "train"} & set(plan.lengths) and not data.done.any() and bool((data.rew == data.rew[0]).all()):
        raise ValueError(
            f"every reward is {float(data.rew[0]):g} and no episode terminates, so no action is better than another: add "
            "rewards, or imitate only, with BC or DiffusionBC"
        )


def begin(learner: Learner, plan: Plan, data: Transitions, reset: bool) -> None:
    """Set `plan` as the learner's plan. A new plan with `reset` starts the counters and the history at zero."""
    state = learner.state
    new = plan is not state.plan
    if data.info["sha256"] != state.data["sha256"]:
        kept = "transform and normaliser" if new else "unfinished plan, transform and normaliser"
        warnings.warn(f"the dataset differs from the first one ({state.data['id']}), whose {kept} are kept", stacklevel=4)
    if new and reset:
        state.num_timesteps, state.n_env_steps, state.online, state.history = 0, 0, None, []
    if new:
        state.provenance = provenance.begin(state.provenance, learner.device, reset, learner.record_command)
    state.plan = plan
