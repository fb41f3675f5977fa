"""Checks of what a user may set: an algorithm's knobs and `policy_kwargs`. Messages name the knob, the value and the rule."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from diffagents.config.checks import MOST, N_FIXED, check_number, whole_number


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


def choose(algorithm: str, config: Any, allowed: tuple[str, ...], choice: dict[str, Any]) -> Any:
    """The configuration for one call of `predict`.

    Args:
        algorithm: Name of the agent's class.
        config: The agent's configuration.
        allowed: The hyperparameters that the call may set (the class's CHOICE).
        choice: Those that it sets.

    Raises:
        TypeError: One of them may not be set.
        ValueError: A value is out of its range.
    """
    for key in choice:
        if key not in allowed:
            valid = f"; valid: {', '.join(allowed)}" if allowed else ": its policy leaves nothing to choose"
            raise TypeError(f"{algorithm}.predict has no choice {key!r}{valid}")
    return make_config(type(config), algorithm, {**dataclasses.asdict(config), **choice})


def signature(init: Callable[..., None], config: type[Any]) -> inspect.Signature:
    """What `init(self, ..., **knobs)` takes, with the knobs of `config` by name: for `help()` and editors."""
    base = [p for p in inspect.signature(init).parameters.values() if p.name != "self" and p.kind != p.VAR_KEYWORD]
    knobs = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(config)
    ]
    return inspect.Signature([*base, *knobs])
