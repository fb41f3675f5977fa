"""Hyperparameters are declared once: defaults, checks, `help()`, and the documentation as data come from the same line."""

import dataclasses
import inspect
import pydoc
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from small_agents import NAMES, agent_class

from diffagents.agents.diffcps import DiffCPSConfig
from diffagents.agents.srpo import SRPO, SRPOConfig
from diffagents.config.checks import find_device, n_cuda_devices
from diffagents.config.hyperparameters import Hyperparameter, Hyperparameters, build_config, describe, hyperparameter
from diffagents.experiments.fqe import FQEConfig

CONFIGS = {name: agent_class(name).Config for name in NAMES} | {"FQE": FQEConfig}
every = pytest.mark.parametrize("name", CONFIGS)


@dataclass(frozen=True)
class Example(Hyperparameters):
    """An example with a field of every kind."""

    rate: float = hyperparameter(0.5, "Rate of something. It has a second sentence.", above=0, at_most=1)
    share: float = hyperparameter(0.5, "Share of something.", at_least=0, below=1)
    open: float = hyperparameter(0.5, "Something strictly inside.", above=0, below=1)
    scale: float | None = hyperparameter(None, "Scale of something. None: no scale.", at_least=0)
    free: float = hyperparameter(0.0, "Any finite number.")
    least: float = hyperparameter(3.0, "A number with a lower limit.", at_least=2.5)
    count: int = hyperparameter(4, "Number of things.", at_least=1, at_most=1000)
    steps: int | None = hyperparameter(None, "Steps of something. None: the default.", at_least=0, unit="environment steps")
    flag: bool = hyperparameter(True, "Whether something happens.")
    way: str = hyperparameter("one", "Way of doing it.", choices=("one", "two"))
    norm: str | None = hyperparameter(None, "Norm of it. None: as it is.", choices=("l1", "l2"))
    sizes: tuple[int, ...] = hyperparameter((8, 8), "Sizes of the layers.", at_least=1)


# ---- documentation as data -----------------------------------------------------------------------------------------
def test_the_documentation_is_data() -> None:
    fields = {field.name: field for field in dataclasses.fields(SRPOConfig)}
    about = fields["beta"].metadata["hyperparameter"]
    assert isinstance(about, Hyperparameter) and about.above == 0 and about.at_most is None
    assert about.description.startswith("Weight of Q against the behaviour model: large is greedy")
    assert fields["beta"].default == 0.05 and fields["beta"].type is float


def test_describe() -> None:
    rows = {one.name: one for one in describe(Example)}
    assert list(rows) == [field.name for field in dataclasses.fields(Example)]
    assert rows["rate"] == ("rate", "float", "0.5", "above 0 and at most 1", "Rate of something. It has a second sentence.")
    assert rows["scale"][1:4] == ("float | None", "None", "at least 0")
    assert rows["free"].range == "" and rows["free"].summary == "float, default 0.0"
    assert rows["count"].summary == "int, at least 1 and at most 1,000, default 4"
    assert rows["steps"].range == "at least 0, in environment steps"
    assert rows["flag"][1:4] == ("bool", "True", "")
    assert rows["way"][1:4] == ("str", '"one"', 'one of "one", "two"')
    assert rows["sizes"][1:3] == ("tuple[int, ...]", "(8, 8)")


@every
def test_each_hyperparameter_has_whole_sentences_and_its_limits(name: str) -> None:
    for one in describe(CONFIGS[name]):
        assert re.fullmatch(r"[A-Z].*\.", one.description) and len(one.description) > 10, one
        assert one.range or one.type == "bool", one
        assert "  " not in one.description, one


def test_shared_hyperparameters_share_their_sentence() -> None:
    shared = ("gamma", "solver", "select", "normalize_obs", "reward_transform", "policy_freq", "max_grad_norm")
    for name in (*shared, "expectile", "n_backup_samples", "ema_every", "ema_start", "online_noise", "online_learning_rate"):
        rows = [one for algorithm in NAMES for one in describe(CONFIGS[algorithm]) if one.name == name]
        first = {re.sub(r" \[\w+\]|, for .* separately", "", one.description.split(". ")[0].rstrip(".")) for one in rows}
        assert len(rows) > 1 and len(first) == 1, (name, first)


# ---- help() --------------------------------------------------------------------------------------------------------
def squeezed(text: str) -> str:
    return " ".join(text.replace("|", " ").split())


@every
def test_help_shows_sentence_range_and_default(name: str) -> None:
    shown = [squeezed(pydoc.plain(pydoc.render_doc(CONFIGS[name])))]
    if name in NAMES:
        shown.append(squeezed(inspect.getdoc(agent_class(name)) or ""))
    for one in describe(CONFIGS[name]):
        text = squeezed(f"{one.name}: {one.summary}. {one.description}")
        assert all(text in page for page in shown), text


def test_help_keeps_the_text_of_the_class() -> None:
    assert (SRPO.__doc__ or "").startswith("Score Regularized Policy Optimization: a fast deterministic policy")
    assert (SRPOConfig.__doc__ or "").startswith("Hyperparameters of SRPO.\n\nThe defaults are the paper's")
    assert "beta: float = 0.05" in str(inspect.signature(SRPOConfig)) and "beta: float = 0.05" in str(inspect.signature(SRPO))
    assert "hyperparameters" not in inspect.signature(SRPO).parameters


def test_a_subclass_shows_what_it_inherits() -> None:
    @dataclass(frozen=True)
    class More(Example):
        """More of it."""

        extra: float = hyperparameter(1.0, "Something extra.", above=0)

    assert [one.name for one in describe(More)] == [*(one.name for one in describe(Example)), "extra"]
    assert "rate: float, above 0 and at most 1, default 0.5." in (More.__doc__ or "")
    assert "extra" not in (Example.__doc__ or "")
    with pytest.raises(ValueError, match="rate=2 must lie in"):
        More(rate=2)
    with pytest.raises(ValueError, match="extra=0 must be positive"):
        More(extra=0)

    class Derived(SRPO):
        pass

    assert "beta: float, above 0, default 0.05." in (inspect.getdoc(Derived) or "")


# ---- checks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0}, "rate=0 must lie in (0, 1]. Rate of something."),
        ({"rate": 1.5}, "rate=1.5 must lie in (0, 1]"),
        ({"rate": "high"}, "rate='high' must be a number"),
        ({"rate": True}, "rate=True must be a number"),
        ({"rate": None}, "rate=None must be a number"),
        ({"rate": float("nan")}, "rate=nan must be finite"),
        ({"free": 1e38}, "free=1e+38 must be finite"),
        ({"free": -float("inf")}, "free=-inf must be finite"),
        ({"share": 1.0}, "share=1.0 must lie in [0, 1)"),
        ({"share": -0.1}, "share=-0.1 must lie in [0, 1)"),
        ({"open": 1}, "open=1 must lie strictly between 0 and 1"),
        ({"open": 0}, "open=0 must lie strictly between 0 and 1"),
        ({"scale": -1}, "scale=-1 must not be negative"),
        ({"least": 2}, "least=2 must be at least 2.5"),
        ({"count": 0}, "count=0 must be a positive whole number"),
        ({"count": 1001}, "count=1001 must be at most 1,000. Number of things."),
        ({"count": 1.5}, "count=1.5 must be a positive whole number"),
        ({"count": True}, "count=True must be a positive whole number"),
        ({"count": None}, "count=None must be a positive whole number"),
        ({"steps": -1}, "steps=-1 must be zero or a positive whole number of environment steps"),
        ({"flag": 1}, "flag=1 must be True or False"),
        ({"way": "three"}, "way='three'; choose from 'one', 'two'. Way of doing it."),
        ({"way": None}, "way=None must be a string"),
        ({"way": np.zeros(2)}, "must be a string"),
        ({"norm": "l3"}, "norm='l3'; choose from None, 'l1', 'l2'. Norm of it."),
        ({"sizes": (8, 0)}, "sizes[1]=0 must be a positive whole number"),
        ({"sizes": 8}, "sizes=8 must be a tuple of whole numbers"),
    ],
)
def test_a_bad_value_is_refused_at_construction(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Example(**values)
    assert "second sentence" not in str(caught.value) and str(caught.value).endswith(".")
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(Example(), **values)


def test_values_are_brought_to_their_type() -> None:
    made = Example(rate=1, free=np.float32(2), count=16.0, steps=np.int64(3), sizes=[4, 5.0], scale=None, norm="l1")  # type: ignore[arg-type]
    kinds = {field.name: type(getattr(made, field.name)) for field in dataclasses.fields(made)}
    assert kinds["rate"] is kinds["free"] is float and kinds["count"] is kinds["steps"] is int
    assert (made.rate, made.free, made.count, made.steps, made.sizes) == (1.0, 2.0, 16, 3, (4, 5))
    assert all(type(size) is int for size in made.sizes)
    assert made.scale is None and made.norm == "l1" and hash(made) == hash(dataclasses.replace(made))


def test_what_relates_several_fields_is_checked_after_each_of_them() -> None:
    with pytest.raises(ValueError, match="lambda_min='low' must be a number"):
        DiffCPSConfig(lambda_min="low")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lambda_init=0\.1 must lie in \[lambda_min, lambda_max\] = \[0\.3, 100\.0\]"):
        DiffCPSConfig(lambda_init=0.1, lambda_min=0.3)


@every
def test_every_config_checks_direct_construction(name: str) -> None:
    """Also where a class extends `__post_init__`."""
    for field in dataclasses.fields(CONFIGS[name]):
        with pytest.raises(ValueError, match=rf"^{field.name}="):
            CONFIGS[name](**{field.name: {"no": "value"}})


def test_an_unknown_name() -> None:
    with pytest.raises(
        TypeError, match=r"^Toy has no hyperparameter 'rat'; did you mean 'rate'\? Valid: rate, share, open, scale"
    ):
        build_config(Example, "Toy", {"rat": 1})
    with pytest.raises(TypeError, match=r"^Toy has no hyperparameter 'zzz'\. Valid: rate"):
        build_config(Example, "Toy", {"zzz": 1})
    assert build_config(Example, "Toy", {"count": 7}) == Example(count=7)


def test_names_of_other_libraries() -> None:
    with pytest.raises(TypeError, match=r"'lr'; did you mean 'learning_rate'\?"):
        build_config(CONFIGS["SRPO"], "SRPO", {"lr": 1e-3})
    with pytest.raises(
        TypeError, match=r"'n_epochs': learn\(data, total_timesteps\) .* of each stage: behavior_steps, train_steps$"
    ):
        build_config(CONFIGS["BDPO"], "BDPO", {"n_epochs": 3})


# ---- declarations --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hint", "default", "keywords", "message"),
    [
        (float, 1.0, {"description": ""}, "needs a description"),
        (float, 1.0, {"description": "no sentence"}, "needs a description"),
        (float, 1.0, {"above": 0, "at_least": 0}, "two limits on the same side"),
        (float, 1.0, {"below": 2, "at_most": 2}, "two limits on the same side"),
        (float, 1.0, {"above": 3, "below": 2}, "empty range"),
        (float, 0.0, {"above": 0}, r"Broken\.field: the default=0\.0 must be positive"),
        (float, None, {"above": 0}, "the default=None must be a number"),
        (int, 1, {}, "whole numbers need at_least=0 or at_least=1"),
        (int, 1, {"at_least": 1, "below": 5}, "at_most for an upper limit"),
        (int, 1.5, {"at_least": 0}, "the default=1.5 must be zero or a positive whole number"),
        (bool, True, {"above": 0}, "limits are for numbers"),
        (str, "one", {}, "choices are needed for str"),
        (str, "one", {"choices": ("two",)}, "the default='one'; choose from 'two'"),
        (float, 1.0, {"choices": ("two",)}, "for str only"),
        (list, (), {}, "its type must be one of float, int, bool, str"),
        (int | str, 1, {"at_least": 0}, "its type must be one of"),
    ],
)
def test_a_bad_declaration_fails_when_the_class_is_made(hint: Any, default: Any, keywords: Any, message: str) -> None:
    about = {"description": "A good sentence.", **keywords}

    def declare() -> None:
        type("Broken", (Hyperparameters,), {"__annotations__": {"field": hint}, "field": hyperparameter(default, **about)})

    with pytest.raises(TypeError, match=message):
        declare()


@pytest.mark.parametrize("field", [0.5, dataclasses.field(default=0.5), None])
def test_every_field_must_be_declared(field: Any) -> None:
    with pytest.raises(TypeError, match=r"Broken\.rate must be declared with hyperparameter"):
        type("Broken", (Hyperparameters,), {"__annotations__": {"rate": float}, **({} if field is None else {"rate": field})})


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Can't initialize NVML", None),
        ("CUDA initialization: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", None),
        (
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\nPlease update it. More",
            'torch cannot use the GPU (The NVIDIA driver on your system is too old (found version 11040)): device="auto" '
            "is the CPU",
        ),
    ],
)
def test_a_machine_without_a_gpu_hears_of_it_once_and_only_of_one_that_is_broken(
    said: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_available() -> bool:
        warnings.warn(said, stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    n_cuda_devices.cache_clear()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert [find_device("auto").type for _ in range(3)] == ["cpu"] * 3
        SRPO(env="Pendulum-v1", verbose=0)
    n_cuda_devices.cache_clear()
    assert [str(warning.message) for warning in heard] == ([told] if told else [])
