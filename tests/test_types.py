"""Spaces and specs: JSON both ways, flat observations, scaled actions."""

import json
import tracemalloc
from collections import OrderedDict
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from diffagents.data.load import load_dataset
from diffagents.envs.make import make_env
from diffagents.types import Spec, space_from_json, space_to_json

third = np.float32(1) / np.float32(3)
BOXES = [
    spaces.Box(-np.inf, np.inf, (11,), np.float64),
    spaces.Box(-np.inf, np.inf, (3, 2), np.float32),
    spaces.Box(-1.0, 1.0, (6,), np.float32),
    spaces.Box(np.array([-third, -np.inf, -0.0], np.float32), np.array([third, 1e30, np.inf], np.float32)),
    spaces.Box(np.nextafter(-1.0, 0), 0.1, (2,), np.float64),
    spaces.Box(np.array([[0.1, 0.2]]), np.array([[0.3, np.inf]]), dtype=np.float64),
    spaces.Box(0, 255, (2,), np.uint8),
    spaces.Box(-(2**62) - 1, 2**62 + 1, (2,), np.int64),
    spaces.Box(0.0, 1.0, (), np.float32),
    spaces.Box(0.0, 1.0, (0,), np.float32),
    gym.make("Pendulum-v1").observation_space,
    gym.make("Pendulum-v1").action_space,
]


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_box_round_trip(box: spaces.Box) -> None:
    text = json.dumps(space_to_json(box), allow_nan=False)
    back = space_from_json(json.loads(text))
    assert back == box
    assert isinstance(back, spaces.Box)
    assert back.dtype == box.dtype
    assert back.low.tobytes() == box.low.tobytes()
    assert back.high.tobytes() == box.high.tobytes()
    assert np.array_equal(back.bounded_below, box.bounded_below)
    assert np.array_equal(back.bounded_above, box.bounded_above)


def test_uniform_bounds_are_one_number() -> None:
    assert space_to_json(BOXES[0]) == {"type": "Box", "low": "-inf", "high": "inf", "shape": [11], "dtype": "float64"}
    assert space_to_json(BOXES[2])["low"] == -1.0
    assert space_to_json(BOXES[3])["high"] == [float(third), float(np.float32(1e30)), "inf"]


def test_dict_round_trip_keeps_the_order() -> None:
    inner = spaces.Dict(OrderedDict(z=BOXES[2], a=BOXES[3]))
    space = spaces.Dict(OrderedDict(observation=BOXES[0], inner=inner, desired_goal=BOXES[1]))
    back = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert back == space
    assert isinstance(back, spaces.Dict)
    assert list(back.spaces) == ["observation", "inner", "desired_goal"]
    assert list(back["inner"].spaces) == ["z", "a"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(0, 1, (2,), np.bool_), spaces.Dict(a=spaces.Text(3))])
def test_other_spaces_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        space_to_json(space)


BOX = {"type": "Box", "low": -1.0, "high": 1.0, "shape": [2], "dtype": "float32"}


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        "Box",
        {},
        {"type": "Discrete", "n": 3},
        {"type": "Dict"},
        {"type": "Dict", "spaces": [1]},
        {key: value for key, value in BOX.items() if key != "low"},
        {**BOX, "shape": [-1]},
        {**BOX, "shape": 2},
        {**BOX, "shape": [2.0]},
        {**BOX, "shape": [True]},
        {**BOX, "shape": [1 << 40]},
        {**BOX, "shape": [1 << 20, 0]},
        {**BOX, "shape": [1] * 100},
        {**BOX, "low": [-1.0]},
        {**BOX, "low": [[-1.0, -1.0]]},
        {**BOX, "low": "low"},
        {**BOX, "low": "nan"},
        {**BOX, "low": None},
        {**BOX, "low": 2.0},
        {**BOX, "dtype": "object"},
        {**BOX, "low": 0, "dtype": "bool"},
        {**BOX, "shape": ["2"]},
        {**BOX, "dtype": "float32,float32"},
        {**BOX, "dtype": ["float32"]},
    ],
    ids=str,
)
def test_a_malformed_space_is_refused_with_its_place(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^config\['observation_space'\] is not a Box or Dict") as caught:
        space_from_json(bad, "config['observation_space']")
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match=r"^space\['goal'\] is not a Box or Dict"):
        space_from_json({"type": "Dict", "spaces": {"fine": BOX, "goal": bad}})


def test_spaces_nested_without_end_are_refused() -> None:
    deep: Any = BOX
    for _ in range(20_000):
        deep = {"type": "Dict", "spaces": {"x": deep}}
    with pytest.raises(ValueError, match="not a Box or Dict"):
        space_from_json(deep)


def test_boxes_are_counted_together_before_memory_is_taken() -> None:
    """8,000 Boxes of a megabyte's description would take 128 GB."""
    big = {"type": "Box", "low": -1, "high": 1, "shape": [1_000_000], "dtype": "float64"}
    assert space_from_json(big).shape == (1_000_000,)
    tracemalloc.start()
    for many in (
        {f"b{i}": big for i in range(8000)},
        {"inner": {"type": "Dict", "spaces": {"a": big, "b": BOX}}},
        {f"b{i}": {**BOX, "shape": [1000]} for i in range(1001)},
    ):
        with pytest.raises(ValueError, match="too large"):
            space_from_json({"type": "Dict", "spaces": many})
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_spec_round_trip() -> None:
    observation = spaces.Dict(OrderedDict(observation=BOXES[2], achieved_goal=BOXES[4], desired_goal=BOXES[4]))
    for spec in (Spec.from_spaces(observation, BOXES[2]), Spec(BOXES[1], BOXES[2])):
        assert Spec.from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False))) == spec


def test_actions_are_scaled_both_ways() -> None:
    spec = Spec(BOXES[2], spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)))
    action = np.array([[-2.0, 0.0], [2.0, 10.0], [0.0, 2.5]], np.float32)
    act = spec.scale_action(action)
    np.testing.assert_allclose(act, [[-1, -1], [1, 1], [0, -0.5]])
    np.testing.assert_allclose(spec.unscale_action(act), action)
    assert spec.unscale_action(np.array([[5.0, -5.0]])).tolist() == [[2.0, 0.0]]  # never outside the space
    assert spec.unscale_action(act).dtype == np.float32


def test_small_integers_do_not_wrap_around() -> None:
    """127 - (-128) is -1 in int8."""
    spec = Spec(BOXES[2], spaces.Box(-128, 127, (3,), np.int8))
    action = np.array([[-128, 127, 0]], np.int8)
    act = spec.scale_action(action)
    np.testing.assert_allclose(act, [[-1, 1, 1 / 255]], atol=1e-6)
    assert spec.unscale_action(act).tolist() == action.tolist()


def test_whole_actions_are_the_nearest_ones() -> None:
    """Each of 0 to 10 is taken over its part of [-1, 1]; truncation would take 10 at 1 only."""
    spec = Spec(spaces.Box(-1, 1, (2,)), spaces.Box(0, 10, (1,), np.int64))
    actions = spec.unscale_action(np.linspace(-1, 1, 2001, dtype=np.float32)[:, None])
    counts = np.bincount(actions.reshape(-1))
    assert actions.dtype == np.int64 and len(counts) == 11
    assert counts.min() == counts[0] == counts[10] == 100 and counts[1:10].max() <= 201


def test_a_vector_of_switches_is_no_image() -> None:
    """Tables of 0 and 1 come as uint8, as pictures do."""
    Spec(spaces.Box(0, 1, (6,), np.uint8), spaces.Box(-1, 1, (2,)))
    data = {
        "observations": np.eye(6, dtype=np.uint8)[np.arange(40) % 6],
        "actions": np.linspace(-1, 1, 80).reshape(40, 2),
        "rewards": np.arange(40.0),
        "terminations": np.zeros(40, bool),
        "truncations": np.arange(40) % 5 == 4,
    }
    assert load_dataset(data, cache=False).obs.shape == (32, 6)
    for shape in ((6, 6), (6, 6, 3)):
        with pytest.raises(ValueError, match="looks like an image"):
            Spec(spaces.Box(0, 255, shape, np.uint8), spaces.Box(-1, 1, (2,)))


def test_the_default_keys_know_the_place_in_a_maze() -> None:
    """AntMaze's `observation` is the ant without its position, which only the achieved goal gives."""
    env = make_env("AntMaze_UMaze-v5")
    obs, _ = env.reset(seed=0)
    env.close()
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    flat = spec.flatten_obs(obs)[0][0]
    assert flat[-4:].tolist() == np.float32([*obs["achieved_goal"], *obs["desired_goal"]]).tolist()
    nested = spaces.Dict(observation=BOXES[2], achieved_goal=spaces.Dict(a=BOXES[4]), desired_goal=BOXES[4])
    assert Spec.from_spaces(nested, BOXES[2]).obs_keys == ("observation", "desired_goal")


def test_dict_observations_are_concatenated_in_order() -> None:
    observation = spaces.Dict(
        {key: spaces.Box(-1, 1, (n,)) for key, n in (("observation", 2), ("achieved_goal", 1), ("desired_goal", 1))}
    )
    spec = Spec.from_spaces(observation, BOXES[2])
    obs = {"achieved_goal": [9.0], "desired_goal": [3.0], "observation": [1.0, 2.0]}
    flat, batched = spec.flatten_obs(obs)
    assert spec.obs_keys == ("observation", "achieved_goal", "desired_goal") and spec.obs_dim == 4
    assert flat.tolist() == [[1.0, 2.0, 9.0, 3.0]] and not batched
    assert Spec.from_spaces(observation, BOXES[2], ("desired_goal", "observation")).flatten_obs(obs)[0].tolist() == [
        [3.0, 1.0, 2.0]
    ]


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (torch.zeros(6, requires_grad=True), r"observation is a tensor that requires grad; call \.detach\(\) on it first"),
        (torch.zeros(6, device="meta"), r"observation is a tensor on meta; call \.cpu\(\) on it first"),
        ([torch.zeros((), requires_grad=True)] * 6, r"observation cannot be read as float32 numbers: .*requires grad"),
    ],
    ids=["requires grad", "not on the CPU", "list"],
)
def test_tensors_that_numpy_cannot_read_are_refused_in_one_line(obs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Spec(BOXES[2], BOXES[2]).flatten_obs(obs)
    assert "\n" not in str(caught.value)


def test_empty_batches_keep_their_width() -> None:
    action_space = spaces.Box(-2.0, 2.0, (2, 3), np.float32)
    obs, batched = Spec(BOXES[2], action_space).flatten_obs(np.zeros((0, 6)))
    assert obs.shape == (0, 6) and batched
    goals = spaces.Dict({"goal": BOXES[2], "observation": BOXES[1]})
    spec = Spec.from_spaces(goals, action_space)
    obs, batched = spec.flatten_obs({"goal": np.zeros((0, 6)), "observation": np.zeros((0, 3, 2))})
    assert obs.shape == (0, 12) and batched
    assert spec.scale_action(np.zeros((0, 2, 3))).shape == (0, 6)
    assert spec.unscale_action(np.zeros((0, 6))).shape == (0, 2, 3)


def test_keys_that_are_one_string_are_refused() -> None:
    space = spaces.Dict({key: BOXES[2] for key in ("observation", "o")})
    for make in (Spec, Spec.from_spaces):
        with pytest.raises(TypeError, match=r"^obs_keys='o' is a string, .*; pass obs_keys=\('o',\)$"):
            make(space, BOXES[2], "o")  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "dtype"), [(1e-45, np.float32), (1e-38, np.float32), (1e-300, np.float64)])
def test_action_bounds_that_cannot_be_divided_by_are_refused(width: float, dtype: Any) -> None:
    box = spaces.Box(np.zeros(2, dtype), np.array([1, width], dtype), dtype=dtype)
    with pytest.raises(ValueError, match=r"action space bounds .* are too close together for float32"):
        Spec(BOXES[2], box)


@pytest.mark.parametrize(
    "box",
    [spaces.Box(0.0, 2e-38, (2,), np.float32), spaces.Box(2**62, 2**62 + 1, (2,), np.int64), spaces.Box(0, 1, (1,), np.uint8)],
)
def test_narrow_action_bounds_are_accepted(box: spaces.Box) -> None:
    assert Spec(BOXES[2], box).act_dim == box.shape[0]
