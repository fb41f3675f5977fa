"""Hyperparameters: one line of an algorithm's `Config` declares the default, the checks and the documentation of each.

    @dataclass(frozen=True)
    class SRPOConfig(Hyperparameters):
        beta: float = hyperparameter(0.05, "Weight of Q against the behaviour model: large is greedy.", above=0)

From this line come the default value, the checks whenever a `Config` is made, `help(SRPOConfig)` and `help(SRPO)`, the options
of `diffagents train SRPO --help`, and `describe(SRPOConfig)` for an API reference. Type checkers and editors see an ordinary
dataclass. The default that they show for an argument of `SRPOConfig(` is the call itself, hence with description and range;
"go to definition" on an attribute leads to the same line.
"""

import dataclasses
import difflib
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from diffagents.config.checks import check_choice, check_number, whole_number

T = TypeVar("T")
C = TypeVar("C", bound="Hyperparameters")
_OF_A_METHOD = {
    "buffer_size": "learn_online",
    "learning_starts": "learn_online",
    "utd": "learn_online",
    "offline_ratio": "learn_online",
    "calibrate": "learn_online",
    "total_timesteps": "learn",
    "stages": "learn",
    "dataset": "learn",
    "clip_actions": "load_dataset",
}
"""Arguments, some of them of SB3's constructors, that belong to a method or function here."""
OTHER_NAMES = {"lr": "learning_rate", "discount": "gamma", "polyak": "tau"}
"""Names of hyperparameters in other libraries, and ours."""
LENGTHS = ("steps", "n_steps", "num_steps", "max_steps", "n_train_steps", "epochs", "n_epochs", "num_epochs", "gradient_steps")
"""Names of the length of training in other libraries."""
KEY = "hyperparameter"
"""The key of a field's metadata under which its `Hyperparameter` is stored."""


@dataclass(frozen=True)
class Hyperparameter:
    """Metadata of a hyperparameter in addition to its name, type and default. See `hyperparameter`."""

    description: str
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.description.strip().endswith("."):
            raise TypeError(f"needs a description of whole sentences, not {self.description!r}")
        if None not in (self.above, self.at_least) or None not in (self.below, self.at_most):
            raise TypeError("has two limits on the same side: give above or at_least, below or at_most")
        low, high = self.limits
        if low is not None and high is not None and low >= high:
            raise TypeError(f"has an empty range: {self.range}")

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """The lower and the upper limit; None if there is none."""
        return self.at_least if self.above is None else self.above, self.at_most if self.below is None else self.below

    @property
    def range(self) -> str:
        """The allowed values in words: "above 0 and at most 1", 'one of "a", "b"'; empty if only the type restricts them."""
        if self.choices:
            return "one of " + ", ".join(map(json.dumps, self.choices))
        words = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{word} {limit:,}" for word, limit in words.items() if limit is not None)

    @property
    def rule(self) -> str:
        """The same as the end of an error message: "must be positive", "must lie in (0, 1]"."""
        low, high = self.limits
        if low == 0 and high is None:
            return "must be positive" if self.at_least is None else "must not be negative"
        if low is None or high is None:
            return f"must be {self.range}"
        if self.above is not None and self.below is not None:
            return f"must lie strictly between {low:,} and {high:,}"
        left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
        return f"must lie in {left}{low:,}, {high:,}{right}"

    def allows(self, value: float) -> bool:
        """Whether a number lies within the limits."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


def hyperparameter(
    default: T,
    description: str,
    *,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: Iterable[str] = (),
    unit: str = "",
) -> T:
    """Declare a hyperparameter as a field of a class derived from `Hyperparameters`.

    Its type comes from the annotation: float, int, bool, str or tuple[int, ...], each also `| None`, where None is allowed.

    Args:
        default: The default value, which must itself be allowed.
        description: Whole sentences, the first of which defines the hyperparameter; error messages repeat it.
        above: Values must be greater than this number.
        below: Values must be less than this number.
        at_least: Values must not be less than this number. Whole numbers need it: 0 or 1.
        at_most: Values must not be greater than this number.
        choices: The allowed strings. Every `str` needs them.
        unit: What a whole number counts, such as "environment steps".

    Returns:
        A `dataclasses.field` whose metadata hold a `Hyperparameter`; to type checkers, the default.

    Raises:
        TypeError: If the description is not a sentence or the limits contradict each other.
    """
    about = Hyperparameter(description, above, below, at_least, at_most, tuple(choices), unit)
    return dataclasses.field(default=default, metadata={KEY: about})


class Hyperparameters:
    """Base class of every algorithm's `Config`, a frozen dataclass of fields made by `hyperparameter`.

    Each value is checked and converted to its type when an instance is created: 16.0 becomes 16 for an int, 1 becomes 1.0 for a
    float. Where several fields depend on each other, a class extends `__post_init__`. Its docstring is completed by the list
    of its hyperparameters.

    Raises:
        TypeError: When a class is created whose declarations are incomplete or contradict each other.
        ValueError: When an instance is created with a value that is not allowed.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    _kinds: ClassVar[dict[str, tuple[Any, bool]]] = {}  # name -> its type without None, and whether None is allowed

    def __init_subclass__(cls) -> None:
        """Check the declarations and list them in the docstring; runs before `dataclass` turns them into fields."""
        fields, hints = dict(getattr(cls, "__dataclass_fields__", {})), typing.get_type_hints(cls)
        cls._kinds = dict(cls._kinds)
        for name in inspect.get_annotations(cls):
            field = cls.__dict__.get(name)
            if not isinstance(field, dataclasses.Field) or KEY not in field.metadata:
                raise TypeError(f"{cls.__name__}.{name} must be declared with hyperparameter(default, description, ...)")
            try:
                fields[name], cls._kinds[name] = field, _kind(hints[name])
                _check_declaration(*cls._kinds[name], field)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{cls.__name__}.{name}: {error}") from None
        about = [_describe(name, hints[name], field) for name, field in fields.items()]
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or cls.__name__)}\n\nArgs:\n{_listing(about)}\n"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checked(field.name, getattr(self, field.name), *self._kinds[field.name], field.metadata[KEY])
            object.__setattr__(self, field.name, value)  # the dataclass is frozen


class Description(NamedTuple):
    """A hyperparameter as text, for a table or a list; `range` is empty if the type is the only restriction."""

    name: str
    type: str
    default: str
    range: str
    description: str

    @property
    def summary(self) -> str:
        """Type, range and default on one line: "float, above 0, default 0.05"."""
        return ", ".join(part for part in (self.type, self.range, f"default {self.default}") if part)


def describe(config: type[Hyperparameters]) -> list[Description]:
    """Document a `Config` as data.

    Args:
        config: An algorithm's `Config`, for example `SRPO.Config`.

    Returns:
        Name, type, default, range and description of each hyperparameter, in the order of declaration.
    """
    hints = typing.get_type_hints(config)
    return [_describe(field.name, hints[field.name], field) for field in dataclasses.fields(config)]


def agent_doc(doc: str, config: type[Hyperparameters]) -> str:
    """The docstring of an algorithm's class: its own text, followed by its hyperparameters."""
    rest = "The other arguments are those of `diffagents.agent.Agent`."
    head = 'Hyperparameters, which are keyword arguments, with the defaults of preset=None; preset="fast" sets some of them:'
    return f"{inspect.cleandoc(doc)}\n\n{head}\n{_listing(describe(config))}\n\n{rest}\n"


def build_config(config: type[C], algorithm: str, values: dict[str, Any]) -> C:
    """Create a `Config` from keyword arguments.

    Args:
        config: An algorithm's `Config`.
        algorithm: Its name, for messages.
        values: Hyperparameter -> value.

    Returns:
        `config(**values)`.

    Raises:
        TypeError: If a hyperparameter is unknown; the message proposes the nearest name.
        ValueError: If a value is not allowed.
    """
    valid = config.__dataclass_fields__
    for name in values:
        if name not in valid:
            if name in _OF_A_METHOD:
                raise TypeError(f"{algorithm} has no hyperparameter {name!r}: it is an argument of {_OF_A_METHOD[name]}")
            if name in LENGTHS:
                others = ("n_diffusion_steps", "solver_steps", "warmup_steps")
                stages = ", ".join(own for own in valid if own.endswith("_steps") and own not in others)
                raise TypeError(
                    f"{algorithm} has no hyperparameter {name!r}: learn(data, total_timesteps) sets the number of gradient "
                    f"steps, or these set that of each stage: {stages}"
                )
            near = [OTHER_NAMES[name]] if OTHER_NAMES.get(name) in valid else difflib.get_close_matches(name, valid, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"{algorithm} has no hyperparameter {name!r}{hint} Valid: {', '.join(valid)}")
    return config(**values)


def choose(algorithm: str, config: C, allowed: tuple[str, ...], choice: dict[str, Any]) -> C:
    """The configuration for one call of `predict`.

    Args:
        algorithm: Name of the agent's class.
        config: The agent's configuration.
        allowed: The hyperparameters that the call may override (the class's CHOICE).
        choice: The values to override.

    Raises:
        TypeError: One of them cannot be overridden.
        ValueError: A value is out of its range.
    """
    for key in choice:
        if key not in allowed:
            valid = f"; valid: {', '.join(allowed)}" if allowed else ": it has no such choices"
            raise TypeError(f"{algorithm}.predict has no choice {key!r}{valid}")
    return dataclasses.replace(config, **choice)


def signature(init: Callable[..., None], config: type[Hyperparameters]) -> inspect.Signature:
    """The signature of `init(self, ..., **hyperparameters)` with those of `config` by name, for `help()` and editors."""
    own = [p for p in inspect.signature(init).parameters.values() if p.name != "self" and p.kind != p.VAR_KEYWORD]
    named = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(config)
    ]
    return inspect.Signature([*own, *named])


# ---- types and checks ----------------------------------------------------------------------------------------------
_TYPES = (float, int, bool, str, tuple[int, ...])


def _kind(hint: Any) -> tuple[Any, bool]:
    """An annotation's type without None, and whether None is allowed. Raises TypeError for any other type."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    args = typing.get_args(hint) if union else (hint,)
    kinds = [arg for arg in args if arg is not types.NoneType]
    if len(kinds) != 1 or kinds[0] not in _TYPES:
        raise TypeError(f"its type must be one of {', '.join(map(_type_text, _TYPES))}, or one of these | None")
    return kinds[0], len(kinds) < len(args)


def _check_declaration(kind: Any, optional: bool, field: dataclasses.Field[Any]) -> None:
    """Raises TypeError or ValueError if the limits do not suit the type, or the default is not allowed."""
    about = field.metadata[KEY]
    number = kind in (float, int, tuple[int, ...])
    if about.limits != (None, None) and not number:
        raise TypeError(f"limits are for numbers, not for {_type_text(kind)}")
    if bool(about.choices) != (kind is str):
        raise TypeError("choices are needed for str, and for str only")
    if number and kind is not float and (about.at_least not in (0, 1) or about.below is not None):
        raise TypeError("whole numbers need at_least=0 or at_least=1, and at_most for an upper limit")
    _checked("the default", field.default, kind, optional, about)


def _checked(name: str, value: Any, kind: Any, optional: bool, about: Hyperparameter) -> Any:
    """`value` in its type. Raises ValueError with name, value and rule, and the first sentence of the description."""
    if value is None and optional:
        return None
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be True or False")
            return value
        if kind is str:
            if not isinstance(value, str):
                raise ValueError(f"{name}={value!r} must be a string")
            check_choice(name, value, [*([None] if optional else []), *about.choices])
            return value
        if kind is float:
            check_number(name, value, about.rule, about.allows)
            return float(value)
        if kind is int:
            return _whole(name, value, about)
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name}={value!r} must be a tuple of whole numbers")
        return tuple(_whole(f"{name}[{i}]", one, about) for i, one in enumerate(value))
    except ValueError as error:
        raise ValueError(f"{error}. {about.description.partition('. ')[0].removesuffix('.')}.") from None


def _whole(name: str, value: Any, about: Hyperparameter) -> int:
    number = whole_number(name, value, int(about.at_least or 0), f" of {about.unit}" if about.unit else "")
    if about.at_most is not None:
        check_number(name, number, f"must be at most {about.at_most:,}", about.allows)
    return number


# ---- text ----------------------------------------------------------------------------------------------------------
def _type_text(hint: Any) -> str:
    return inspect.formatannotation(hint)


def _describe(name: str, hint: Any, field: dataclasses.Field[Any]) -> Description:
    about, default = field.metadata[KEY], field.default
    shown = json.dumps(default) if isinstance(default, str) else repr(default)
    limits = f"{about.range}, in {about.unit}" if about.unit else about.range
    return Description(name, _type_text(hint), shown, limits, " ".join(about.description.split()))


def _listing(about: Iterable[Description]) -> str:
    """A paragraph for each hyperparameter: its name and summary, and its description, indented."""
    lines = []
    for one in about:
        lines.append(f"    {one.name}: {one.summary}.")
        lines += textwrap.wrap(one.description, 108, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
