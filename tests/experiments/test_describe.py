"""`describe` and `diffagents data`: every fact against data in which it is known, on every kind of source."""

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from toy import RandomEnv

import diffagents
from diffagents import DatasetReport, describe
from diffagents.cli import main

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "data"
REACHER = "diffagents/reacher/replay-v0"
Episode = dict[str, Any]


def walk(rng: np.random.Generator, n: int = 40, *, terminated: bool = False, reward: float = 1.0) -> Episode:
    """An episode of a smooth random walk in three dimensions, of which the third is constant; two actions within [-1, 1]."""
    obs = np.cumsum(rng.normal(size=(n + 1, 3)), 0)
    obs[:, 2] = 5.0
    flags = np.arange(n) == n - 1
    return {
        "observations": obs,
        "actions": rng.uniform(-0.9, 0.9, (n, 2)),
        "rewards": np.full(n, reward),
        "terminations": flags & terminated,
        "truncations": flags & (not terminated),
    }


def walks(n: int = 20) -> list[Episode]:
    rng = np.random.default_rng(0)
    return [walk(rng, 30 + i, terminated=i % 4 == 0, reward=float(i)) for i in range(n)]


def report_of(episodes: Any, **options: Any) -> DatasetReport:
    return describe(episodes, quick=True, **options)


def test_episodes_returns_and_rewards_are_counted() -> None:
    report = report_of(walks())
    facts = report.facts
    assert facts["data"]["n_steps"] == sum(30 + i for i in range(20)) and facts["data"]["n_episodes"] == 20
    assert (facts["episodes"]["n_terminated"], facts["episodes"]["n_truncated"]) == (5, 15)
    assert (facts["episodes"]["min"], facts["episodes"]["max"]) == (30, 49)
    returns = [i * (30 + i) for i in range(20)]
    assert facts["returns"]["mean"] == pytest.approx(np.mean(returns))
    assert facts["returns"]["best_tenth"] == pytest.approx(np.mean(returns[-2:]))
    assert facts["returns"]["best"][0] == {"episode": 19, "return": 19 * 49, "length": 49}
    assert facts["returns"]["worst"][0] == {"episode": 0, "return": 0, "length": 30}
    assert facts["rewards"]["share_zero"] == pytest.approx(30 / facts["data"]["n_steps"])
    assert facts["rewards"]["n_values"] == 20 and facts["rewards"]["commonest"] == 19


def test_dimensions_that_are_constant_saturated_dead_or_switches_are_named() -> None:
    episodes = walks()
    rng = np.random.default_rng(1)
    for episode in episodes:
        n = len(episode["actions"])
        saturated = np.where(rng.random(n) < 0.7, 1.0, episode["actions"][:, 0])
        switch = rng.integers(0, 2, n) * 2.0 - 1
        narrow = rng.uniform(-0.01, 0.01, n)
        episode["actions"] = np.stack([saturated, np.full(n, 0.3), switch, narrow, episode["actions"][:, 1]], 1)
    env = spaces_of(3, 5)
    report = report_of(episodes, env=env)
    assert [row["constant"] for row in report.facts["observations"]] == [False, False, True]
    assert [row["constant"] for row in report.facts["actions"]] == [False, True, False, False, False]
    assert report.facts["actions"][0]["at_high"] == pytest.approx(0.7, abs=0.05)
    assert report.facts["actions"][2]["n_values"] == 2
    text = "\n".join(report.findings)
    assert "observation dimensions that never change: 2" in text
    assert "action dimensions that never change: 1" in text
    assert "few values, between which a policy will also act: 2 (2 values)" in text
    assert "at their bounds in most rows: 0" in text
    assert "less than a tenth of their range: 3" in text


def spaces_of(obs_dim: int, act_dim: int) -> Any:
    """An environment of which only the spaces are used."""
    return RandomEnv(spaces.Box(-np.inf, np.inf, (obs_dim,)), spaces.Box(-1, 1, (act_dim,)))


def test_copies_are_found_exact_and_near_and_others_are_not() -> None:
    episodes = walks()
    assert (report_of(episodes).facts["duplicates"]["n_exact"], report_of(episodes).facts["duplicates"]["n_near"]) == (0, 0)
    noisy = {**episodes[7], "observations": episodes[7]["observations"] + [0.001, 0.002, 0.0]}
    relabelled = {**episodes[9], "rewards": -episodes[9]["rewards"]}  # other data, though the run is the same
    report = report_of([*episodes, episodes[3], noisy, relabelled])
    duplicates = report.facts["duplicates"]
    assert duplicates["exact"] == [[3, 20]] and duplicates["near"] == [[7, 21], [9, 22]] and duplicates["n_compared"] == 22
    assert "episodes that are exact copies of earlier ones: 1 (first: 20 of 3)" in report.findings
    assert any("nearly equal earlier ones: 2 of 22 compared (first: 21 and 7)" in finding for finding in report.findings)


def test_one_episode_that_ran_away_does_not_make_others_look_alike() -> None:
    episodes = walks()
    episodes[4]["observations"] *= 1e4
    for episode in episodes:
        episode["actions"][:] = 0.3
    assert report_of(episodes).facts["duplicates"]["n_near"] == 0


@pytest.mark.parametrize("fault", ["glitch", "join"])
def test_jumps_are_found_at_their_rows_and_smooth_data_have_none(fault: str) -> None:
    episodes = walks(60)
    for episode in episodes:  # smoother than a random walk
        steps = np.arange(len(episode["observations"]))[:, None]
        episode["observations"] = np.sin(steps / [40, 30, 25, 35, 45] + episode["rewards"][0])
    assert report_of(episodes).facts["jumps"]["n"] == 0
    if fault == "glitch":
        episodes[5]["observations"][12, 1] += 30.0
        expected = [(5, 11), (5, 12)]
    else:  # two episodes recorded as one
        episodes[5]["observations"][12:] -= 2.0
        expected = [(5, 11)]
    report = report_of(episodes)
    assert [(place["episode"], place["step"]) for place in report.facts["jumps"]["first"]] == expected
    assert any("transitions that jump" in finding and "episode 5, step 11, row 171" in finding for finding in report.findings)


def test_rows_of_jumps_are_those_of_the_recording() -> None:
    """Also where the last row of every episode is left out, because it has no next observation."""
    arrays = flat(walks())
    del arrays["next_observations"]
    rows = np.arange(len(arrays["rewards"]))
    arrays["observations"] = np.stack([np.sin(rows / 40), np.cos(rows / 30)], 1)
    arrays["observations"][300:] += 2.0
    place = report_of(arrays).facts["jumps"]["first"][0]
    assert place["row"] == 299


def test_what_happens_often_is_no_jump() -> None:
    """Sensors that are mostly still, rare switches, angles, and data in two regimes."""
    rng = np.random.default_rng(0)
    episodes = walks(60)
    start = 0.0
    for episode in episodes:
        n = len(episode["observations"])
        touch = np.where(rng.random(n) < 0.02, rng.exponential(5.0, n), 0.0)
        switch = (rng.random(n) < 0.004).astype(float)
        degrees = (start + 7.0 * np.arange(n)) % 360
        moving = np.cumsum(rng.normal(size=n) * (1e-4 if episode["rewards"][0] % 2 else 0.5))
        start = degrees[-1]
        episode["observations"] = np.stack([touch, switch, degrees, moving], 1)
    report = report_of(episodes)
    assert report.facts["jumps"]["n"] == 0
    assert [row["n_turns"] > 0 for row in report.facts["observations"]] == [False, False, True, False]


def test_an_episode_that_is_longer_than_most_is_named() -> None:
    rng = np.random.default_rng(0)
    assert not any("is an end missing" in finding for finding in report_of([walk(rng, 40) for _ in range(9)]).findings)
    report = report_of([*(walk(rng, 40) for _ in range(9)), walk(rng, 80)])
    assert any("episodes of more than 40 steps, which many have: 1" in finding for finding in report.findings)


def test_rewards_of_rows_that_cannot_be_used_are_missed() -> None:
    arrays = flat(walks())
    del arrays["next_observations"]
    ends = arrays["terminations"] | arrays["truncations"]
    arrays["terminations"] = np.zeros_like(ends)
    arrays["truncations"] = ends
    arrays["rewards"] = ends.astype(float)  # a goal at the end of each episode
    findings = "\n".join(report_of(arrays).findings)
    assert "every reward but 0 is in a row that cannot be used" in findings


@pytest.mark.parametrize("what", ["rewards", "actions"])
def test_one_wrong_number_among_rewards_or_actions_is_found(what: str) -> None:
    episodes = walks()
    rng = np.random.default_rng(0)
    for episode in episodes:
        episode["rewards"] = rng.normal(size=len(episode["rewards"]))
    episodes[2][what][5] = 1e6
    findings = "\n".join(report_of(episodes).findings)
    assert {"rewards": "rewards far outside of 98 %", "actions": "action dimensions with outliers"}[what] in findings


def test_dimensions_that_are_too_small_to_be_normalised_are_named() -> None:
    episodes = walks()
    for episode in episodes:
        episode["observations"][:, :2] *= 1e-8
    report = report_of(episodes)
    assert any("standard deviation is below 0.001" in finding and finding.endswith(": 0, 1") for finding in report.findings)


def test_outliers_are_counted_in_their_dimension() -> None:
    episodes = walks()
    for row in (3, 9):
        episodes[2]["observations"][row, 0] = 1e4
    counts = [row["n_outliers"] for row in report_of(episodes).facts["observations"]]
    assert counts == [2, 0, 0]


def test_angles_that_turn_are_named() -> None:
    episodes = walks()
    for episode in episodes:  # a wheel
        episode["observations"][:, 2] = 0.5 * np.arange(len(episode["observations"])) % (2 * np.pi)
    leaps = [np.diff(episode["observations"][:, 2]) < 0 for episode in episodes]
    # Where an episode terminated, the next observation does not count.
    turns = sum(int(leap.sum()) - int(leap[-1] & e["terminations"][-1]) for leap, e in zip(leaps, episodes, strict=True))
    report = report_of(episodes)
    assert [row["n_turns"] for row in report.facts["observations"]] == [0, 0, turns]
    assert report.facts["jumps"]["n"] == 0
    assert any(f"take sine and cosine): 2 ({turns} times)" in finding for finding in report.findings)


def test_the_clone_measures_the_share_of_noise() -> None:
    rng = np.random.default_rng(0)
    n = 20_000
    obs = rng.normal(size=(n, 4))
    signal, noise = 0.3 * np.tanh(obs[:, :2]), rng.normal(size=(n, 2))
    actions = signal + noise * signal.std(0) * np.sqrt(1 / 3)  # a quarter of the variance
    data = {
        "observations": obs,
        "actions": actions,
        "rewards": obs[:, 0],
        "terminations": np.zeros(n, bool),
        "truncations": np.arange(n) % 100 == 99,
    }
    torch.manual_seed(3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    report = describe(data)
    assert report.facts["clone"]["share_unexplained"] == pytest.approx(0.25, abs=0.05)
    assert report.facts["clone"]["n_episodes_held_out"] == 20
    assert set(report.facts["first_run"]) == {"BC", "SRPO"} and min(report.facts["first_run"].values()) > 1
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert "clone" not in report_of(data).facts and "first_run" not in report_of(data).facts
    json.dumps(report.to_json(), allow_nan=False)


def test_the_advice_follows_the_rewards() -> None:
    def topics(episodes: list[Episode], **options: Any) -> dict[str, str]:
        return dict(report_of(episodes, **options).advice)

    mixed = topics(walks())
    assert "Begin with SRPO" in mixed["algorithm"] and "bounds" in mixed
    assert "bounds" not in topics(walks(), env=spaces_of(3, 2))
    rng = np.random.default_rng(0)
    alike = [walk(rng) for _ in range(10)]
    for i, episode in enumerate(alike):
        episode["rewards"] = rng.normal(1, 0.01, 40) + 0.001 * i
    assert "Begin with BC" in topics(alike)["algorithm"]
    constant = [walk(rng) for _ in range(10)]
    assert "Only imitation" in topics(constant)["algorithm"] and "always 1" in topics(constant)["reward"]
    goal = [walk(rng, reward=0.0, terminated=True) for _ in range(10)]
    for episode in goal:
        episode["rewards"][-1] = 1.0
    assert "sparse goal" in topics(goal)["reward"]
    assert "steps, so there is something to prefer" in topics([*goal, *(cut(episode, 20) for episode in goal)])["algorithm"]
    assert "only one episode" in topics(walks(1))["algorithm"]
    copies = walks() + walks()
    assert "copies" in topics(copies) and "copies" not in topics(walks())


def cut(episode: Episode, n: int) -> Episode:
    """The last n steps."""
    return {name: value[-n - (name == "observations") :] for name, value in episode.items()}


def flat(episodes: list[Episode]) -> dict[str, Any]:
    joined = {name: np.concatenate([episode[name] for episode in episodes]) for name in ("actions", "rewards", "terminations")}
    joined["truncations"] = np.concatenate([episode["truncations"] for episode in episodes])
    joined["observations"] = np.concatenate([episode["observations"][:-1] for episode in episodes])
    joined["next_observations"] = np.concatenate([episode["observations"][1:] for episode in episodes])
    return joined


def rounded(value: Any) -> Any:
    """`value` with its numbers rounded to five significant digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@pytest.mark.parametrize("form", ["list", "dict", "npz", "hdf5", "transitions", "buffer"])
def test_every_source_gives_the_same_report(form: str, tmp_path: Path) -> None:
    episodes = walks()
    arrays = flat(episodes)
    source: Any = {"list": episodes, "dict": arrays}.get(form)
    if form == "npz":
        np.savez(source := tmp_path / "walks.npz", **arrays)
    elif form == "hdf5":
        with h5py.File(source := tmp_path / "walks.hdf5", "w") as file:
            for name, value in arrays.items():
                file[name] = value
    elif form == "transitions":
        source = diffagents.load_dataset(episodes)
    elif form == "buffer":
        env = spaces_of(3, 2)
        source = ReplayBuffer(len(arrays["rewards"]) + 10, env.observation_space, env.action_space, "cpu")
        for i in range(len(arrays["rewards"])):
            done = arrays["terminations"][i] | arrays["truncations"][i]
            rows = [arrays[name][i] for name in ("observations", "next_observations", "actions", "rewards")]
            source.add(*rows, np.array([done]), [{"TimeLimit.truncated": bool(arrays["truncations"][i])}])
    report, expected = report_of(source, cache=False), report_of(episodes)
    for part in ("episodes", "returns", "jumps", "coverage"):
        assert rounded(report.facts[part]) == rounded(expected.facts[part]), part


def test_refused_data_are_described_array_by_array(tmp_path: Path) -> None:
    arrays = flat(walks())
    arrays["observations"][17, 1] = np.nan
    arrays["observations"][40:43, 0] = np.inf
    del arrays["next_observations"]
    np.savez(tmp_path / "bad.npz", **arrays, extra=np.arange(3))
    for source in (arrays, tmp_path / "bad.npz"):
        report = describe(source)
        assert report.refused is not None and "observations contains NaN or infinity in 4 of" in report.refused
        rows = {row["name"]: row for row in report.facts["arrays"]}
        assert rows["observations"]["bad_columns"] == {0: 3, 1: 1} and rows["observations"]["first_bad_row"] == 17
        assert (rows["observations"]["n_nan"], rows["observations"]["n_infinite"]) == (1, 3)
        assert rows["rewards"]["n_nan"] == 0 and rows["rewards"]["max"] == 19
        assert "bad values in columns 0 (3), 1 (1); first in row 17" in str(report)
        assert "first in row 17" in report.to_html()
    bad = walks()
    bad[4]["rewards"][3] = np.nan
    rows = {row["name"]: row for row in describe(bad).facts["arrays"]}
    assert rows["rewards"]["first_bad_row"] == 30 + 31 + 32 + 33 + 3


@pytest.mark.parametrize("empty", ["dict", "list", "npz", "beside"])
def test_empty_arrays_do_not_hide_the_reason(empty: str, tmp_path: Path) -> None:
    arrays = flat(walks())
    source: Any = {name: value[:0] for name, value in arrays.items()}
    if empty == "list":
        source = [{name: value[: int(name == "observations")] for name, value in walks()[0].items()}]
    elif empty == "npz":
        np.savez(tmp_path / "x.npz", **source)
        source = tmp_path / "x.npz"
    elif empty == "beside":
        arrays["rewards"][3] = np.nan
        source = {**arrays, "empty": np.zeros((0, 3))}
    report = describe(source)
    assert report.refused is not None and ("empty" in report.refused or "NaN" in report.refused)
    assert len(str(report).splitlines()) > 4 and report.to_html()


def test_bad_arrays_come_first_and_unreadable_ones_are_left_out(tmp_path: Path) -> None:
    arrays = flat(walks())
    arrays["rewards"][3] = np.nan
    many = {f"a{i}": np.zeros(3) for i in range(40)}
    np.savez(tmp_path / "x.npz", **many, **arrays, infos=np.array([{}, None], dtype=object))
    report = describe(tmp_path / "x.npz")
    assert report.facts["arrays"][0]["name"] == "rewards" and "first in row 3" in str(report)
    assert "infos" not in {row["name"] for row in report.facts["arrays"]}


def test_a_replay_buffer_with_nan_is_described() -> None:
    env = spaces_of(3, 2)
    buffer = ReplayBuffer(30, env.observation_space, env.action_space, "cpu")
    for i in range(20):
        obs = np.full(3, np.nan if i == 11 else float(i), np.float32)
        buffer.add(obs, obs + 1, np.zeros(2, np.float32), np.array(1.0), np.array([i == 19]), [{}])
    report = describe(buffer)
    rows = {row["name"]: row for row in report.facts["arrays"]}
    assert rows["observations"]["first_bad_row"] == 11 and rows["observations"]["shape"][0] == 20


@pytest.mark.parametrize("options", [{"env": "Nope-v0"}, {"obs_keys": ("zz",)}, {"obs_keys": "b"}], ids=str)
def test_mistakes_of_the_call_are_not_blamed_on_the_data(options: dict[str, Any]) -> None:
    episodes = [{**episode, "observations": {"b": episode["observations"]}} for episode in walks()]
    with pytest.raises((ValueError, TypeError)):
        describe(episodes, **options)


def test_transitions_are_judged_like_their_source() -> None:
    rng = np.random.default_rng(0)
    episodes = [walk(rng, terminated=True) for _ in range(6)]
    assert any("all after exactly 40 steps" in finding for finding in describe(diffagents.load_dataset(episodes)).findings)


@pytest.mark.usefixtures("real_pictures")
@pytest.mark.parametrize("key", ["$^$", "a_$x^$y", r"$\frac{$", "\ud800", 1, "\u65e5\u672c", "\x07"], ids=ascii)
def test_any_name_can_be_drawn(key: Any, recwarn: pytest.WarningsRecorder) -> None:
    report = report_of(
        [
            {**episode, "observations": {key: episode["observations"], "q": np.ones((len(episode["rewards"]) + 1, 1))}}
            for episode in walks()
        ]
    )
    assert report.to_html().count("<img") == 7 and "[0]" in str(report)
    assert not list(recwarn)


@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e30])
@pytest.mark.parametrize("what", ["observations", "rewards", "actions"])
def test_large_and_small_numbers_give_valid_json_and_no_warnings(
    what: str, scale: float, recwarn: pytest.WarningsRecorder
) -> None:
    episodes = walks()
    for episode in episodes:
        episode[what] = episode[what] * scale
    report = describe(episodes, quick=scale != 1e18)
    json.dumps(report.to_json(), allow_nan=False)
    assert report.to_html() and not list(recwarn)


@pytest.mark.usefixtures("real_pictures")
def test_large_numbers_can_be_drawn() -> None:
    episodes = walks()
    for episode in episodes:
        episode.update({name: episode[name] * 1e30 for name in ("observations", "actions", "rewards")})
    assert report_of(episodes).to_html().count("<img") == 7


def test_rewards_that_add_up_to_infinity_are_refused() -> None:
    episodes = walks()
    for episode in episodes:
        episode["rewards"] = np.full_like(episode["rewards"], 1e38)
    assert "add up to 4.9e+39, more than float32 can hold" in (describe(episodes).refused or "")


def test_a_clone_of_constant_actions_says_nothing() -> None:
    rng = np.random.default_rng(0)
    episodes = [walk(rng) for _ in range(12)]
    for episode in episodes:
        episode["actions"][:] = 0.3
    report = describe(episodes)
    assert report.facts["clone"]["share_unexplained"] is None
    assert dict(report.advice)["algorithm"].startswith("Only imitation is possible: BC,")


def test_actions_outside_of_their_bounds_are_a_finding() -> None:
    episodes = walks()
    episodes[0]["actions"][5, 0] = 2.0
    report = report_of(episodes, env=spaces_of(3, 2))
    assert report.refused is None and "actions lie outside the action space in 1 of" in report.findings[0]


def test_what_holds_no_arrays_raises_as_load_dataset_does(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="the dataset is the number 3"):
        describe(3)
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="read it with pandas"):
        describe("table.parquet")


def test_warnings_of_loading_are_findings_and_are_not_issued(recwarn: pytest.WarningsRecorder) -> None:
    rng = np.random.default_rng(0)
    report = report_of([walk(rng, terminated=True) for _ in range(5)])
    assert any("5 episodes terminate, all after exactly 40 steps" in finding for finding in report.findings)
    assert not [warning for warning in recwarn if warning.category is UserWarning]


@pytest.mark.usefixtures("real_pictures")
def test_the_page_is_self_contained_and_names_cannot_break_it() -> None:
    evil = "<script>alert(1)</script>\x1b[31m"
    episodes = [{**episode, "observations": {evil: episode["observations"]}} for episode in walks()]
    report = report_of(episodes)
    page, text = report.to_html(), str(report)
    assert page.startswith("<!doctype html>") and page == report._repr_html_()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    assert page.count("<img") == 7 and all(title in page for title in ("Findings", "Advice", "Observations", "Actions"))
    assert "\x1b" not in text and "<script>" in text
    assert all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.usefixtures("real_pictures")
@pytest.mark.parametrize("obs_dim", [1, 300])
def test_one_dimension_and_hundreds_are_shown(obs_dim: int) -> None:
    rng = np.random.default_rng(0)
    episode = walk(rng)
    episode["observations"] = np.cumsum(rng.normal(size=(41, obs_dim)), 0)
    episode["actions"] = rng.uniform(-1, 1, (40, 20 if obs_dim > 1 else 1))
    report = describe([episode])
    assert report.facts["duplicates"]["n_near"] == 0
    assert ("and 276 more" in str(report)) == (obs_dim == 300)
    assert report.to_html().count("<img") == 7


def test_the_command_prints_writes_and_fails_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(SHIPPED))
    page = tmp_path / "pages" / "reacher.html"
    assert main.main(["data", REACHER, "--quick", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{REACHER} (minari)\n  15,000 steps in 300 episodes") and "environment Reacher-v5" in out
    assert f"<h1>{REACHER}</h1>" in page.read_text()
    assert main.main(["data", REACHER, "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["returns"]["mean"] == pytest.approx(-19.06, abs=0.01)
    assert main.main(["data", REACHER, "--quick", "--html", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "is a folder" in captured.err and not captured.out
    assert main.main(["data", "nowhere/nothing-v0", "--html", str(tmp_path / "none.html")]) == 1
    assert not (tmp_path / "none.html").exists()
    capsys.readouterr()
    arrays = flat(walks())
    arrays["rewards"][3] = np.nan
    np.savez(tmp_path / "bad.npz", **arrays)
    assert main.main(["data", str(tmp_path / "bad.npz")]) == 1
    captured = capsys.readouterr()
    assert "These data are refused: rewards contains NaN" in captured.out and "error: rewards contains NaN" in captured.err
