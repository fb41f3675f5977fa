"""OGBench's data: their three layouts hold the same transitions, and their masks terminate where a task is solved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffagents.data.load import load_dataset
from diffagents.data.ogbench import is_ogbench

LENGTHS, SOLVED = (6, 4, 5), {3: 1, 4: 1, 9: 1}  # steps of the trajectories; rows at which the task is solved


def layouts() -> dict[str, dict[str, Any]]:
    """Three trajectories; the task is solved twice in the first (rows 3 and 4) and at the last step of the second (row 9)."""
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(n + 1, 3)) for n in LENGTHS]
    actions = [rng.uniform(-1, 1, (n + 1, 2)) for n in LENGTHS]  # the last one leads nowhere
    solved = np.zeros(sum(LENGTHS))
    solved[list(SOLVED)] = 1.0
    per_trajectory = np.split(solved, np.cumsum(LENGTHS)[:-1])
    ends = [np.eye(1, n, n - 1)[0] for n in LENGTHS]

    def joined(parts: list[Any]) -> np.ndarray:
        return np.concatenate(parts)

    padded = joined([np.append(part, 0.0) for part in per_trajectory])
    last = joined([np.eye(1, n + 1, n)[0] for n in LENGTHS])
    with_last = {"observations": joined(states), "actions": joined(actions), "rewards": padded - 1, "masks": 1 - padded}
    return {
        "regular": {
            "observations": joined([s[:-1] for s in states]),
            "next_observations": joined([s[1:] for s in states]),
            "actions": joined([a[:-1] for a in actions]),
            "terminals": joined(ends),
            "rewards": solved - 1,
            "masks": 1 - solved,
        },
        "compact": {**with_last, "terminals": np.minimum(last + np.append(last[1:], 1), 1), "valids": 1 - last},
        "file": {**with_last, "terminals": last, "qpos": np.ones((len(last), 7))},
    }


@pytest.mark.parametrize("layout", ["regular", "compact", "file"])
@pytest.mark.parametrize("as_file", [False, True])
def test_the_layouts_hold_the_same_transitions(layout: str, as_file: bool, tmp_path: Path) -> None:
    arrays = layouts()[layout]
    if as_file:
        np.savez(tmp_path / "maze-navigate-v0.npz", **arrays)
    data = load_dataset(tmp_path / "maze-navigate-v0.npz" if as_file else arrays)
    expected = layouts()["regular"]
    assert len(data) == 15
    for ours, theirs in (("obs", "observations"), ("next_obs", "next_observations"), ("action", "actions"), ("rew", "rewards")):
        np.testing.assert_allclose(getattr(data, ours).numpy(), expected[theirs], rtol=1e-6)
    assert data.done.nonzero()[:, 0].tolist() == [3, 4, 9]
    assert data.episode_ends.tolist() == [4, 5, 6, 10, 15]
    assert data.episode_returns.tolist() == [-3, 0, -1, -3, -5]
    assert data.episode_whole.all()
    assert data.info["made"]["layout"] == "OGBench"
    assert data.info["id"] == ("maze-navigate-v0.npz" if as_file else "arrays")


def test_rows_after_the_last_end_are_an_unfinished_trajectory() -> None:
    arrays = {name: value[:-2] for name, value in layouts()["regular"].items()}
    data = load_dataset(arrays)
    assert data.episode_ends.tolist() == [4, 5, 6, 10, 13]
    assert data.episode_whole.tolist() == [True, True, True, True, False]
    arrays = {name: value[:-2] for name, value in layouts()["file"].items()}
    with pytest.raises(ValueError, match="ends within a trajectory"):
        load_dataset(arrays)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    arrays = layouts()["file"]
    with pytest.raises(ValueError, match=r"disagree in length .*rewards 17"):
        load_dataset({**arrays, "rewards": arrays["rewards"][:-1]})
    with pytest.raises(ValueError, match=r"masks is 0.5 at row 2"):
        load_dataset({**arrays, "masks": np.where(np.arange(18) == 2, 0.5, 1.0)})
    np.savez(path := tmp_path / "cube-play-v0.npz", **{k: v for k, v in arrays.items() if k not in ("rewards", "masks")})
    with pytest.raises(ValueError, match=r"cube-play-v0.npz has the layout of OGBench, without rewards and masks"):
        load_dataset(path)
    imitation = {**arrays, "rewards": np.zeros(18), "masks": np.ones(18)}  # what the message suggests
    assert len(load_dataset(imitation)) == 15


def test_d4rls_data_with_a_state_are_not_taken_for_it() -> None:
    arrays = layouts()["regular"]
    d4rl = {name: arrays[name] for name in ("observations", "next_observations", "actions", "rewards", "terminals")}
    data = load_dataset({**d4rl, "timeouts": np.zeros(15), "qpos": np.ones((15, 7))})
    assert data.done.nonzero()[:, 0].tolist() == [5, 9, 14]


@pytest.mark.parametrize("name", ["truncated", "terminated", "timeouts", "truncations", "terminations", "episode_ends"])
def test_another_flag_of_ends_tells_that_it_is_not_ogbenchs(name: str) -> None:
    assert is_ogbench(("observations", "terminals", "masks"))
    assert not is_ogbench(("observations", "terminals", "masks", name))


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("layout", ["regular", "compact", "file"])
def test_data_without_a_step_are_empty(layout: str, rows: int) -> None:
    arrays = {name: value[:rows] for name, value in layouts()[layout].items()}
    if layout == "regular":
        arrays = {name: value[:0] for name, value in arrays.items()}
    elif layout == "compact":
        arrays["valids"] = np.zeros(rows)
    else:
        arrays["terminals"] = np.ones(rows)
    with pytest.raises(ValueError, match=r"is empty \(0 steps\)"):
        load_dataset(arrays)


def test_a_file_with_other_names_says_which_it_has(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", obs=np.ones((3, 2)), act=np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"lacks observations, actions, rewards.*; it has obs, act"):
        load_dataset(tmp_path / "x.npz")
