"""Presets: every row loads, is what the paper's Table 2 says, and is found by the names people use for its data."""

import re
from pathlib import Path
from typing import Any

import pytest

from diffagents.config import presets
from diffagents.config.presets import find_preset, load_presets, resolve_preset

# fmt: off
KNOBS = {
    "beta", "expectile", "gamma", "tau", "learning_rate", "batch_size", "behavior_batch_size", "dropout",
    "weight", "subtract_noise", "q_grad_norm", "reward_transform", "normalize_obs",
    "policy_kwargs", "critic_steps", "behavior_steps", "policy_steps",
}
# fmt: on
TABLE_2 = {
    "halfcheetah-medium-expert": 0.01,
    "halfcheetah-medium": 0.2,
    "halfcheetah-medium-replay": 0.2,
    "hopper-medium-expert": 0.01,
    "hopper-medium": 0.05,
    "hopper-medium-replay": 0.2,
    "walker2d-medium-expert": 0.1,
    "walker2d-medium": 0.05,
    "walker2d-medium-replay": 0.5,
    "antmaze-umaze": 0.02,
    "antmaze-umaze-diverse": 0.04,
    "antmaze-medium-play": 0.08,
    "antmaze-medium-diverse": 0.05,
    "antmaze-large-play": 0.06,
    "antmaze-large-diverse": 0.05,
}
LOCOMOTION = {"expectile": 0.7, "reward_transform": "iql_locomotion"}
ANTMAZE = {
    "expectile": 0.9,
    "reward_transform": "iql_antmaze",
    "q_grad_norm": "rms",
    "policy_kwargs": {"net_arch": {"pi": [256] * 4, "qf": [256] * 2}},
}
STEPS = ("critic_steps", "behavior_steps", "policy_steps")
DEFAULT = {key: value for key, value in load_presets("srpo")["default"].items() if key != "source"}
PAPER = {**dict(zip(STEPS, (1_500_000, 2_000_000, 1_000_000), strict=True)), "behavior_batch_size": 2048}
OFFICIAL = {**PAPER, "subtract_noise": False}


def test_the_rows_are_those_of_table_2() -> None:
    assert set(load_presets("srpo")) - {"default", "paper", "official_code"} == set(TABLE_2)


@pytest.mark.parametrize("row", TABLE_2)
def test_row_holds_the_papers_values_and_known_knobs_only(row: str) -> None:
    found = find_preset("SRPO", row)
    assert found is not None
    assert found == (row, {"beta": TABLE_2[row], **(ANTMAZE if row.startswith("antmaze") else LOCOMOTION)})
    assert set(found[1]) <= KNOBS


def test_the_blocks_are_budgets_and_every_entry_says_its_source() -> None:
    table = load_presets("srpo")
    assert set(DEFAULT) == set(STEPS)
    assert all(isinstance(steps, int) and 0 < steps < PAPER[key] for key, steps in DEFAULT.items())
    assert {key: value for key, value in table["paper"].items() if key != "source"} == PAPER
    assert all(entries["source"] for entries in table.values())


def test_the_file_holds_no_row_twice() -> None:
    text = (Path(__file__).parents[2] / "zoo" / "srpo.yml").read_text()
    rows = re.findall(r"^([\w-]+):", text, re.M)
    assert sorted(rows) == sorted(load_presets("srpo"))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("hopper-medium", "hopper-medium"),
        ("hopper-medium-v2", "hopper-medium"),
        ("hopper-medium-v0", "hopper-medium"),
        ("mujoco/hopper/medium-v0", "hopper-medium"),
        ("diffagents/hopper/medium-v0", "hopper-medium"),
        ("diffagents/hopper/medium-v17", "hopper-medium"),
        ("diffagents/walker2d/medium-replay-v0", "walker2d-medium-replay"),
        ("diffagents/halfcheetah/medium-expert-v0", "halfcheetah-medium-expert"),
        ("antmaze-umaze-v2", "antmaze-umaze"),
        ("antmaze-umaze-v0", "antmaze-umaze"),
        ("D4RL/antmaze/umaze-v1", "antmaze-umaze"),
        ("D4RL/antmaze/umaze-v2", "antmaze-umaze"),
        ("D4RL/antmaze/large-diverse-v1", "antmaze-large-diverse"),
        ("diffagents/antmaze/umaze-v0", "antmaze-umaze"),
        ("hopper_medium-v2.hdf5", "hopper-medium"),  # the names of D4RL's files
        ("hopper_medium_replay-v2.hdf5", "hopper-medium-replay"),
        ("halfcheetah_medium_expert-v0.H5", "halfcheetah-medium-expert"),
        ("walker2d-medium.npz", "walker2d-medium"),
        ("hopper_expert-v2.hdf5", None),
        ("mujoco/hopper/expert-v0", None),  # levels the paper did not train on
        ("mujoco/hopper/simple-v0", None),
        ("hopper", None),
        ("default", None),
        ("paper", None),
        ("official_code", None),
        ("", None),
    ],
)
def test_find_by_name_alias_and_other_version(name: str, row: str | None) -> None:
    found = find_preset("srpo", name)
    assert (found and found[0]) == row


@pytest.mark.parametrize(
    ("preset", "dataset_id", "applied", "values"),
    [
        (None, None, [], DEFAULT),
        (None, "hopper-medium-v2", [], DEFAULT),
        ("auto", None, [], DEFAULT),
        ("auto", "me/unheard-of-v0", [], DEFAULT),
        ("auto", "diffagents/hopper/medium-v0", ["hopper-medium"], {**DEFAULT, "beta": 0.05, **LOCOMOTION}),
        ("paper", None, ["paper"], PAPER),
        ("paper", "me/unheard-of-v0", ["paper"], PAPER),
        ("paper", "D4RL/antmaze/umaze-v1", ["paper", "antmaze-umaze"], {**PAPER, "beta": 0.02, **ANTMAZE}),
        ("official_code", None, ["paper", "official_code"], OFFICIAL),
        (
            "official_code",
            "hopper_medium-v2.hdf5",
            ["paper", "official_code", "hopper-medium"],
            {**OFFICIAL, "beta": 0.05, **LOCOMOTION},
        ),
        ("walker2d-medium-replay", None, ["walker2d-medium-replay"], {**DEFAULT, "beta": 0.5, **LOCOMOTION}),
        ("hopper-medium-v2", "antmaze-umaze-v2", ["hopper-medium"], {**DEFAULT, "beta": 0.05, **LOCOMOTION}),
    ],
)
def test_resolve(preset: str | None, dataset_id: str | None, applied: list[str], values: dict[str, Any]) -> None:
    assert resolve_preset("SRPO", preset, dataset_id) == (applied, values)


def test_values_are_the_callers_own() -> None:
    resolve_preset("srpo", "antmaze-umaze", None)[1]["policy_kwargs"]["net_arch"]["pi"].clear()
    assert resolve_preset("srpo", "antmaze-umaze", None)[1]["policy_kwargs"] == ANTMAZE["policy_kwargs"]


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'hoper-medium' is unknown; did you mean 'hopper-medium'\?.*antmaze-umaze"):
        resolve_preset("srpo", "hoper-medium", None)
    with pytest.raises(ValueError, match=r"preset=7 is unknown; there are 'auto', 'paper', 'official_code' and halfcheetah"):
        resolve_preset("srpo", 7, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no presets for 'nosuch', only for .*srpo"):
        load_presets("nosuch")
    with pytest.raises(ValueError, match=r"no presets for '\.\./zoo/srpo'"):
        load_presets("../zoo/srpo")


GOOD = "default: {critic_steps: 1, source: us}\npaper: {critic_steps: 2, source: them}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "mapping with the blocks default and paper"),
        ("", "mapping with the blocks"),
        ("default: {source: us}", "mapping with the blocks"),
        (GOOD + "row: 3", "row 'row' must be a name with a mapping"),
        (GOOD + "7: {source: x}", "row 7 must be a name with a mapping"),
        (GOOD + "row: {1: 2, source: x}", "row 'row' must be a name with a mapping"),
        (GOOD + "row: {beta: 1}", "row 'row': source must say"),
        (GOOD + "row: {aliases: one, source: x}", "aliases must be a list"),
        (GOOD + "row: {aliases: [1], source: x}", "aliases must be a list"),
        (GOOD + "a: {aliases: [x-v0], source: x}\nb: {aliases: [x-v1], source: x}", "'x' also belongs to row 'a'"),
        (GOOD + "a: {source: x}\nb: {aliases: [a], source: x}", "'a' also belongs to row 'a'"),
        (GOOD + "a: {aliases: [paper], source: x}", "'paper' also belongs to row 'paper'"),
        (GOOD + "row: {learning_rate: 3e-4, source: x}", "learning_rate: 3e-4 as text"),
        (GOOD + "row: {beta: '0.1', source: x}", "beta: 0.1 as text"),
        (GOOD + "row: {beta: [}", "is not YAML"),
        (GOOD + "row: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_malformed_file_is_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "_FOLDERS", (tmp_path,))
    (tmp_path / "fine.yml").write_text(GOOD + "row: {learning_rate: 3.0e-4, source: x}")
    assert load_presets("fine")["row"]["learning_rate"] == 3e-4
    (tmp_path / "srpo.yml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_presets("srpo")
    assert "\n" not in str(caught.value)


def test_the_block_of_the_official_code_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "_FOLDERS", (tmp_path,))
    (tmp_path / "srpo.yml").write_text(GOOD + "row: {beta: 1, source: x}")
    assert resolve_preset("srpo", "paper", None) == (["paper"], {"critic_steps": 2})
    with pytest.raises(ValueError, match="'official_code' is unknown; there are 'auto', 'paper' and row"):
        resolve_preset("srpo", "official_code", None)


def test_the_installed_presets_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(presets.__file__).parents[1]
    assert list(presets._FOLDERS) == [package / "zoo", package.parent / "zoo"]
    for folder in ("installed", "checkout"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "srpo.yml").write_text(GOOD.replace("us", folder))
    monkeypatch.setattr(presets, "_FOLDERS", (tmp_path / "installed", tmp_path / "checkout"))
    assert load_presets("srpo")["default"]["source"] == "installed"
