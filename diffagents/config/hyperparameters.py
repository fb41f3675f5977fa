"""Checks of what a user may set: an algorithm's knobs and `policy_kwargs`. Messages name the knob, the value and the rule."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

MOST = 10**7
"""The most of anything that is counted: a batch, critics, samples."""
N_FIXED = 256
"""How many fixed noises an artifact holds for deterministic actions: the most candidates there can be."""


def make_config(kind: type[Any], algorithm: str, knobs: dict[str, Any]) -> Any:
    """`kind(**knobs)` after the checks that follow from a knob's name and type. Raises TypeError (unknown knob) or ValueError.

    None is accepted where it is the default. Whole numbers come back as int.
    """
    types = {f.name: f.type for f in dataclasses.fields(kind)}
    optional = {f.name for f in dataclasses.fields(kind) if "None" in str(f.type)}
    knobs = dict(knobs)
    for name, value in knobs.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"{algorithm} has no knob {name!r}{hint} Valid: {', '.join(types)}")
        kinds = str(types[name])
        if value is None and name in optional:
            continue
        if types[name] is bool and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")
        if name == "gamma":
            check_number(name, value, "must lie in [0, 1)", lambda x: 0 <= x < 1)
        elif name in ("tau", "ema_tau"):
            check_number(name, value, "must lie in (0, 1]", lambda x: 0 < x <= 1)
        elif name.endswith(("learning_rate", "max_grad_norm", "temperature")):
            check_number(name, value, "must be positive", lambda x: x > 0)
        elif name == "online_noise":
            check_number(name, value, "must not be negative", lambda x: x >= 0)
        elif name == "online_halflife":
            knobs[name] = whole_number(name, value, 1, " of environment steps")
        elif name.startswith("n_") or name.endswith(("batch_size", "_freq", "_every")):
            knobs[name] = whole_number(name, value, 1)
            if value > MOST:
                raise ValueError(f"{name}={value!r} must be at most {MOST:,}")
            if name == "n_candidates" and value > N_FIXED:
                raise ValueError(f"{name}={value!r} must be at most {N_FIXED}, the fixed noises of a deterministic choice")
        elif "int" in kinds:
            knobs[name] = whole_number(name, value, 0)
        elif "float" in kinds:
            check_number(name, value, "", lambda x: True)
        if "float" in kinds and isinstance(knobs[name], int):
            knobs[name] = float(knobs[name])
    return kind(**knobs)


def whole_number(name: str, value: Any, least: int, unit: str = "") -> int:
    """`value` as an int (16.0 counts). Raises ValueError unless it is a whole number from `least` to 2**53."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not (real and abs(float(value)) <= 2**53 and int(value) == value and value >= least):
        kind = "a positive whole number" if least == 1 else "zero or a positive whole number"
        raise ValueError(f"{name}={str(value)[:40] if real else repr(value)} must be {kind}{unit}")
    return int(value)


def check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    """Raises ValueError, naming the knob and the rule, unless `value` is a finite number for which `holds` is true."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name}={value!r} must be a number")
    if not abs(float(value)) < 1e38:  # what float32 holds
        raise ValueError(f"{name}={str(value)[:20]} must be finite")
    if not holds(float(value)):
        raise ValueError(f"{name}={value!r} {rule}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError, listing the choices, unless `value` is one of them."""
    choices = list(choices)  # a list compares where a dict would hash
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose from {', '.join(map(repr, choices))}")


SOLVERS = ("ddpm", "ddim")
"""Samplers of a discrete chain: the chain itself, and its deterministic one, which may skip steps."""


def check_solver(solver: Any, solver_steps: int | None, n_diffusion_steps: int) -> None:
    """Raises ValueError where a chain of T steps cannot be sampled so."""
    if solver not in SOLVERS:
        raise ValueError(
            f"solver={solver!r}; choose from {', '.join(map(repr, SOLVERS))}: the network knows the chain's "
            f"{n_diffusion_steps} steps only, so a solver in continuous time (DPM-Solver, EDM) would ask what it never learnt"
        )
    if solver_steps is None:
        return
    whole_number("solver_steps", solver_steps, 1)
    if solver_steps > n_diffusion_steps:
        raise ValueError(f"solver_steps={solver_steps} is more than the chain's n_diffusion_steps={n_diffusion_steps}")
    if solver == "ddpm" and solver_steps < n_diffusion_steps:
        raise ValueError(
            f'solver_steps={solver_steps} skips some of the chain\'s {n_diffusion_steps} steps, which solver="ddpm" cannot: '
            'use solver="ddim"'
        )


def net_arch(
    policy_kwargs: dict[str, Any], default: dict[str, Sequence[int]], extra: dict[str, int] | None = None
) -> dict[str, Any]:
    """`policy_kwargs` -> hidden sizes for each part of `default` and the integers of `extra`, checked.

    `net_arch` may be a list (for all parts) or a dict by part, as in SB3; "vf" follows "qf" where only that is given.
    Raises TypeError for an unknown key.
    """
    parts, extra = list(default), extra or {}
    if not isinstance(policy_kwargs, dict):
        raise TypeError(f"policy_kwargs must be a dict, not {type(policy_kwargs).__name__}")
    unknown = set(policy_kwargs) - {"net_arch", *extra}
    if unknown:
        raise TypeError(f"policy_kwargs has no {sorted(unknown)[0]!r}; valid: {', '.join(['net_arch', *extra])}")
    arch = policy_kwargs.get("net_arch", dict(default))
    sizes_of = arch.values() if isinstance(arch, dict) else [arch]
    if not all(isinstance(sizes, (list, tuple)) for sizes in sizes_of):
        raise ValueError(f"net_arch={arch!r} must be a list of layer sizes, or a dict of such lists by part")
    by_part: dict[str, Any] = dict(arch) if isinstance(arch, dict) else dict.fromkeys(parts, arch)
    if set(by_part) - set(parts):
        raise TypeError(f"net_arch names {sorted(set(by_part) - set(parts))[0]!r}; its parts are {', '.join(parts)}")
    if "vf" in parts and "qf" in by_part:
        by_part.setdefault("vf", by_part["qf"])
    sizes: dict[str, Any] = {part: tuple(by_part.get(part, default[part])) for part in parts}
    sizes |= {name: policy_kwargs.get(name, value) for name, value in extra.items()}
    flat = [n for size in sizes.values() for n in (size if isinstance(size, tuple) else (size,))]
    if not all(isinstance(n, int) and n > 0 for n in flat):
        raise ValueError(f"policy_kwargs {policy_kwargs} must hold positive whole numbers")
    return sizes


def check_arguments(policy: Any, obs_keys: Any, policy_kwargs: Any) -> None:
    """Raises ValueError or TypeError for what no agent's constructor takes."""
    if policy not in ("MlpPolicy", "MultiInputPolicy"):
        raise ValueError(f'policy={policy!r}; the only policy is "MlpPolicy" (pass an environment as env=...)')
    if policy_kwargs is not None and not isinstance(policy_kwargs, dict):
        raise TypeError(f"policy_kwargs must be a dict, not {type(policy_kwargs).__name__}")
    if isinstance(obs_keys, str):
        raise TypeError(f"obs_keys={obs_keys!r} must be a sequence of names: obs_keys=({obs_keys!r},)")


def choose(agent: Any, choice: dict[str, Any]) -> Any:
    """The agent's configuration for one call of `predict`. Raises TypeError for what is no choice of its, ValueError."""
    name = type(agent).__name__
    for key in choice:
        if key not in agent.CHOICE:
            valid = f"; valid: {', '.join(agent.CHOICE)}" if agent.CHOICE else ": its policy leaves nothing to choose"
            raise TypeError(f"{name}.predict has no choice {key!r}{valid}")
    return make_config(agent.Config, name, {**dataclasses.asdict(agent.config), **choice})


def signature(init: Callable[..., None], config: type[Any]) -> inspect.Signature:
    """What `init(self, ..., **knobs)` takes, with the knobs of `config` by name: for `help()` and editors."""
    base = [p for p in inspect.signature(init).parameters.values() if p.name not in ("self", "knobs")]
    knobs = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(config)
    ]
    return inspect.Signature([*base, *knobs])


def find_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ValueError where the device cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'device={device!r} is not usable here: {str(error).splitlines()[0]}; try device="auto"') from None
    return found
