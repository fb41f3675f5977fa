"""Presets: every row fits its algorithm, says its source, and is found by the names people use for its data.

The published numbers live once, in zoo/*.yml, each beside its source; nothing here types them again.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from small_agents import NAMES, agent_class

from diffagents.config import presets
from diffagents.config.presets import BLOCKS, find_preset, load_presets, resolve_preset

ZOO = Path(__file__).parents[2] / "zoo"
MODULES = {name: agent_class(name).presets_name() for name in NAMES}
# Defaults that the rows build on without naming them. Who changes one of these writes it into the rows of that algorithm.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "DiffusionQL": {"learning_rate": 3e-4, "eta": 1.0, "max_q_backup": False, "reward_transform": "none", "max_grad_norm": 5.0},
    "DiffCPS": {"learning_rate": 3e-4, "target_kl": 0.05, "max_q_backup": False, "reward_transform": "none", "policy_freq": 2}
    | {"lambda_min": 0.0, "lambda_init": 1.0, "max_grad_norm": 5.0},
    "BDPO": {"eta": 0.05, "rho": 0.5, "n_critics": 10, "gamma": 0.99, "max_q_backup": False, "q_layer_norm": False}
    | {"behavior_learning_rate": 3e-4, "select": "argmax", "reward_transform": "auto"},
    "IQL": {"expectile": 0.7, "beta": 3.0, "dropout": 0.0, "reward_transform": "auto"},
    "IDQL": {"expectile": 0.7, "n_candidates": 64, "reward_transform": "auto"},
    "TD3BC": {"alpha": 2.5, "normalize_obs": True, "reward_transform": "none"},
    "DiffusionBC": {"learning_rate": 3e-4},
    "QGPO": {"beta": 3.0, "beta_q": None, "guidance_scale": 1.0, "n_support": 16, "reward_transform": "auto"},
    "SfBC": {"alpha": 20.0, "n_candidates": 32, "average_top": 1, "reward_transform": "none"},
}


def values(entries: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters and budgets of a row or block."""
    return {key: value for key, value in entries.items() if key not in ("aliases", "source", "paper")}


def rows_of(module: str) -> dict[str, dict[str, Any]]:
    return {name: entries for name, entries in load_presets(module).items() if name not in BLOCKS}


def srpo(*names: str) -> dict[str, Any]:
    """The values of these blocks and rows of SRPO's file, a later one over an earlier one."""
    table = load_presets("srpo")
    return {key: value for name in names for key, value in values(table[name]).items()}


# ---- the files -------------------------------------------------------------------------------------------------------
def test_every_algorithm_has_its_file_and_every_file_its_algorithm() -> None:
    assert sorted(path.stem for path in ZOO.glob("*.yml")) == sorted(MODULES.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_fits_the_algorithm(name: str) -> None:
    """Names and ranges, with the paper's own schedule of a row too; `default` sizes every stage, `paper` in full length."""
    cls, table = agent_class(name), load_presets(MODULES[name])
    defaults = {field.name: field.default for field in dataclasses.fields(cls.Config)}
    for row, entries in table.items():
        own = {key: value for key, value in values(entries).items() if key != "policy_kwargs"}
        assert {*own, *entries.get("paper", {})} <= set(defaults), row
        cls.Config(**own)
        cls.Config(**{**own, **entries.get("paper", {})})
    steps = {f"{stage}_steps" for stage in cls.STAGE_SHARES}
    assert set(values(table["default"])) == steps <= set(table["paper"])
    assert all(0 < table["default"][key] < table["paper"][key] for key in steps)
    assert {key: defaults[key] for key in LEFT_OUT.get(name, {})} == LEFT_OUT.get(name, {})


@pytest.mark.parametrize("module", MODULES.values())
def test_every_entry_names_its_source_and_every_row_its_data(module: str) -> None:
    for row, entries in load_presets(module).items():
        assert re.search(r"arXiv:\d{4}\.\d{5}|official code|a port, |(by|of) this project", entries["source"]), row
    aliases = [alias for row in rows_of(module).values() for alias in row["aliases"]]
    assert len(aliases) == len(set(aliases))
    assert all(row["aliases"] for row in rows_of(module).values())


@pytest.mark.parametrize("module", MODULES.values())
def test_the_file_holds_no_entry_and_no_key_twice(module: str) -> None:
    """YAML would drop the first of two without a word."""
    text = (ZOO / f"{module}.yml").read_text()
    assert sorted(re.findall(r"^([\w-]+):", text, re.M)) == sorted(load_presets(module))
    for entry in re.split(r"^\S.*$", text, flags=re.M):
        keys = re.findall(r"^  (\w+):", entry, re.M)
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("module", MODULES.values())
def test_rows_are_found_by_the_ids_of_d4rl_minari_and_this_project(module: str) -> None:
    for name in rows_of(module):
        family, level = name.split("-", 1)
        ids = [f"{name}-v0", f"{name}-v2", f"{name.replace('-', '_')}-v2.hdf5"]
        if family in ("halfcheetah", "hopper", "walker2d"):
            ids += [f"diffagents/{family}/{level}-v0"]
            ids += [f"mujoco/{family}/medium-v0"] if level == "medium" else []
        else:
            ids += [f"D4RL/{family}/{level}-v2"]
        for wanted in ids:
            found = find_preset(module, wanted)
            assert found is not None and found[0] == name, wanted


@pytest.mark.parametrize("module", MODULES.values())
def test_a_rows_own_schedule_comes_with_the_paper_preset_only(module: str) -> None:
    for row, entries in rows_of(module).items():
        with_paper, auto = (resolve_preset(module, preset, entries["aliases"][0])[1] for preset in ("paper", "auto"))
        for key, value in entries.get("paper", {}).items():
            assert with_paper[key] == value and auto.get(key) != value, (row, key)


# ---- finding and resolving -------------------------------------------------------------------------------------------
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
        ("fast", None),
        ("paper", None),
        ("official_code", None),
        ("", None),
    ],
)
def test_find_by_name_alias_and_other_version(name: str, row: str | None) -> None:
    found = find_preset("srpo", name)
    assert (found and found[0]) == row


HOPPER, ANTMAZE = "hopper-medium", "antmaze-umaze"


@pytest.mark.parametrize(
    ("preset", "dataset_id", "applied", "merged"),
    [
        (None, None, [], ["default"]),
        (None, "hopper-medium-v2", [], ["default"]),
        ("fast", None, ["fast"], ["default", "fast"]),
        ("fast", "hopper-medium-v2", ["fast"], ["default", "fast"]),  # one setting for all datasets
        ("auto", None, [], ["default"]),
        ("auto", "me/unheard-of-v0", [], ["default"]),
        ("auto", "diffagents/hopper/medium-v0", [HOPPER], ["default", HOPPER]),
        ("paper", None, ["paper"], ["paper"]),
        ("paper", "me/unheard-of-v0", ["paper"], ["paper"]),
        ("paper", "D4RL/antmaze/umaze-v1", ["paper", ANTMAZE], ["paper", ANTMAZE]),
        ("official_code", None, ["paper", "official_code"], ["paper", "official_code"]),
        ("official_code", "hopper_medium-v2.hdf5", ["paper", "official_code", HOPPER], ["paper", "official_code", HOPPER]),
        ("walker2d-medium-replay", None, ["walker2d-medium-replay"], ["default", "walker2d-medium-replay"]),
        ("hopper-medium-v2", "antmaze-umaze-v2", [HOPPER], ["default", HOPPER]),
    ],
)
def test_resolve(preset: str | None, dataset_id: str | None, applied: list[str], merged: list[str]) -> None:
    assert resolve_preset("SRPO", preset, dataset_id) == (applied, srpo(*merged))


def test_values_of_a_row() -> None:
    """A few numbers to see that the right ones arrive: Table 2 of SRPO's paper, and its network for AntMaze."""
    found = resolve_preset("SRPO", "auto", "hopper-medium-v2")[1]
    assert (found["beta"], found["reward_transform"]) == (0.05, "iql_locomotion")
    found = resolve_preset("srpo", "antmaze-umaze", None)[1]
    assert (found["beta"], found["policy_kwargs"]["net_arch"]["pi"]) == (0.02, [256] * 4)


def test_values_are_the_callers_own() -> None:
    resolve_preset("srpo", ANTMAZE, None)[1]["policy_kwargs"]["net_arch"]["pi"].clear()
    assert resolve_preset("srpo", ANTMAZE, None)[1]["policy_kwargs"]["net_arch"]["pi"]


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'hoper-medium' is unknown; did you mean 'hopper-medium'\?.*antmaze-umaze"):
        resolve_preset("srpo", "hoper-medium", None)
    general = "'fast', 'auto', 'paper', 'official_code' and halfcheetah"
    with pytest.raises(ValueError, match=f"preset=7 is unknown; there are {general}"):
        resolve_preset("srpo", 7, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no presets for 'nosuch', only for .*srpo"):
        load_presets("nosuch")
    with pytest.raises(ValueError, match=r"no presets for '\.\./zoo/srpo'"):
        load_presets("../zoo/srpo")


GOOD = (
    "default: {critic_steps: 1, source: us}\nfast: {critic_steps: 3, source: us too}\npaper: {critic_steps: 2, source: them}\n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "mapping with the blocks default, fast and paper"),
        ("", "mapping with the blocks"),
        ("default: {source: us}", "mapping with the blocks"),
        ("default: {source: us}\npaper: {source: them}", "mapping with the blocks"),
        (GOOD + "row: 3", "row 'row' must be a name with a mapping"),
        (GOOD + "7: {source: x}", "row 7 must be a name with a mapping"),
        (GOOD + "row: {1: 2, source: x}", "row 'row' must be a name with a mapping"),
        (GOOD + "row: {beta: 1}", "row 'row': source must say"),
        (GOOD + "row: {aliases: one, source: x}", "aliases must be a list"),
        (GOOD + "row: {aliases: [1], source: x}", "aliases must be a list"),
        (GOOD + "a: {aliases: [x-v0], source: x}\nb: {aliases: [x-v1], source: x}", "'x' also belongs to row 'a'"),
        (GOOD + "a: {source: x}\nb: {aliases: [a], source: x}", "'a' also belongs to row 'a'"),
        (GOOD + "a: {aliases: [paper], source: x}", "'paper' also belongs to row 'paper'"),
        (GOOD + "a: {aliases: [fast], source: x}", "'fast' also belongs to row 'fast'"),
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
    with pytest.raises(ValueError, match="'official_code' is unknown; there are 'fast', 'auto', 'paper' and row"):
        resolve_preset("srpo", "official_code", None)


def test_the_installed_presets_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(presets.__file__).parents[1]
    assert list(presets._FOLDERS) == [package / "zoo", package.parent / "zoo"]
    for folder in ("installed", "checkout"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "srpo.yml").write_text(GOOD.replace("us}", f"{folder}}}", 1))
    monkeypatch.setattr(presets, "_FOLDERS", (tmp_path / "installed", tmp_path / "checkout"))
    assert load_presets("srpo")["default"]["source"] == "installed"
