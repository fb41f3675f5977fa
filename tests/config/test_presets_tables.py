"""The presets of every algorithm but SRPO are the published tables, typed in here once more, and fit the algorithms' knobs."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import diffagents
from diffagents.config.presets import BLOCKS, find_preset, load_presets, resolve_preset

ZOO = Path(__file__).parents[2] / "zoo"
NO_KNOBS = ("aliases", "source", "paper")
WIDE = {  # what a table's last column stands for
    "-": {},
    "bdpo512": {"net_arch": {"pi": [512] * 4, "qf": [256] * 3, "vf": [256] * 3}},
    "sfbc512": {"net_arch": {"qf": [512, 256, 256]}},
}
# What a row leaves out: defaults of the algorithms' Config, for every column of the tables below.
DEFAULTS: dict[str, dict[str, Any]] = {
    "diffusion_ql": {
        "learning_rate": 3e-4,
        "eta": 1.0,
        "max_q_backup": False,
        "reward_transform": "none",
        "max_grad_norm": 5.0,
    },
    "diffcps": {
        "learning_rate": 3e-4,
        "target_kl": 0.05,
        "max_q_backup": False,
        "reward_transform": "none",
        "policy_freq": 2,
        "lambda_min": 0.0,
        "lambda_init": 1.0,
        "max_grad_norm": 5.0,
    },
    "bdpo": {
        "eta": 0.05,
        "rho": 0.5,
        "n_critics": 10,
        "gamma": 0.99,
        "max_q_backup": False,
        "q_layer_norm": False,
        "behavior_learning_rate": 3e-4,
        "select": "argmax",
        "reward_transform": "auto",
        "policy_kwargs": {},
    },
    "iql": {"expectile": 0.7, "beta": 3.0, "dropout": 0.0, "reward_transform": "auto"},
    "idql": {"expectile": 0.7, "n_candidates": 64, "reward_transform": "auto"},
    "td3_bc": {"alpha": 2.5, "normalize_obs": True, "reward_transform": "none"},
    "diffusion_bc": {"learning_rate": 3e-4},
    "awr": {},
    "qgpo": {
        "beta": 3.0,
        "beta_q": None,
        "guidance_scale": 1.0,
        "n_support": 16,
        "reward_transform": "auto",
    },
    "sfbc": {"alpha": 20.0, "n_candidates": 32, "average_top": 1, "reward_transform": "none", "policy_kwargs": {}},
}
# The published tables: a line per data set, a column per knob.
TABLES = {
    "diffusion_ql": """
        task                      learning_rate eta   max_q_backup reward_transform max_grad_norm
        halfcheetah-medium        3e-4          1.0   no           none             9
        hopper-medium             3e-4          1.0   no           none             9
        walker2d-medium           3e-4          1.0   no           none             1
        halfcheetah-medium-replay 3e-4          1.0   no           none             2
        hopper-medium-replay      3e-4          1.0   no           none             4
        walker2d-medium-replay    3e-4          1.0   no           none             4
        halfcheetah-medium-expert 3e-4          1.0   no           none             7
        hopper-medium-expert      3e-4          1.0   no           none             5
        walker2d-medium-expert    3e-4          1.0   no           none             5
        antmaze-umaze             3e-4          0.5   no           cql_antmaze      2
        antmaze-umaze-diverse     3e-4          2.0   yes          cql_antmaze      3
        antmaze-medium-play       1e-3          2.0   yes          cql_antmaze      2
        antmaze-medium-diverse    3e-4          3.0   yes          cql_antmaze      1
        antmaze-large-play        3e-4          4.5   yes          cql_antmaze      10
        antmaze-large-diverse     3e-4          3.5   yes          cql_antmaze      7
        pen-human                 3e-5          0.15  no           normalize        7
        pen-cloned                3e-5          0.1   no           normalize        8
        kitchen-complete          3e-4          0.005 no           none             9
        kitchen-partial           3e-4          0.005 no           none             10
        kitchen-mixed             3e-4          0.005 no           none             10
    """,
    "diffcps": """
        task                      learning_rate target_kl max_q_backup reward_transform policy_freq lambda_min lambda_init max_grad_norm
        halfcheetah-medium        3e-4          0.06      no           none             2           0          1           9
        hopper-medium             3e-4          0.05      no           none             2           0          1           9
        walker2d-medium           3e-4          0.03      no           none             2           0          1           1
        halfcheetah-medium-replay 3e-4          0.06      no           none             2           0          1           2
        hopper-medium-replay      3e-4          0.03      no           none             2           0          1           4
        walker2d-medium-replay    3e-4          0.03      no           none             2           0          1           4
        halfcheetah-medium-expert 3e-4          0.04      no           none             2           0          1           7
        hopper-medium-expert      3e-4          0.03      no           none             2           0          1           5
        walker2d-medium-expert    3e-4          0.04      no           none             2           0          1           5
        antmaze-umaze             3e-4          0.2       no           cql_antmaze      2           0.3        3           2
        antmaze-umaze-diverse     3e-4          0.09      yes          cql_antmaze      2           0.3        3           3
        antmaze-medium-play       1e-3          0.3       yes          cql_antmaze      2           0.3        1           2
        antmaze-medium-diverse    3e-4          0.2       yes          cql_antmaze      2           0.3        1           1
        antmaze-large-play        3e-4          0.2       yes          cql_antmaze      4           0.3        0.5         10
        antmaze-large-diverse     3e-4          0.2       yes          cql_antmaze      4           0.3        0.5         7
    """,  # noqa: E501
    "bdpo": """
        task eta rho n_critics gamma max_q_backup q_layer_norm behavior_learning_rate select reward_transform policy_kwargs
        halfcheetah-*         0.05 0.5 10 0.99  no  no  3e-4 argmax iql_locomotion -
        hopper-medium         0.2  2.0 20 0.99  no  no  3e-4 argmax iql_locomotion -
        hopper-medium-replay  0.2  2.0 10 0.99  no  no  3e-4 argmax iql_locomotion -
        hopper-medium-expert  0.2  2.0 10 0.99  no  no  3e-4 argmax iql_locomotion -
        walker2d-*            0.15 1.0 10 0.99  no  no  3e-4 argmax iql_locomotion -
        antmaze-umaze         0.5  0.8 10 0.995 yes yes 1e-4 argmax antmaze100     bdpo512
        antmaze-umaze-diverse 0.5  0.8 10 0.995 yes yes 1e-4 first  antmaze100     bdpo512
        antmaze-medium-*      0.2  0.8 10 0.995 yes yes 1e-4 argmax antmaze100     bdpo512
        antmaze-large-*       1.0  0.8 10 0.995 yes yes 1e-4 argmax antmaze100     bdpo512
    """,
    "iql": """
        task        expectile beta dropout reward_transform
        LOCOMOTION  0.7       3    0       iql_locomotion
        ANTMAZE     0.9       10   0       iql_antmaze
        ADROIT      0.7       0.5  0.1     none
        KITCHEN     0.7       0.5  0.1     none
    """,
    "idql": """
        task       expectile n_candidates reward_transform
        LOCOMOTION 0.7       64           iql_locomotion
        ANTMAZE    0.9       64           iql_antmaze
    """,
    "td3_bc": """
        task       alpha normalize_obs reward_transform
        LOCOMOTION 2.5   yes           none
        ANTMAZE    2.5   yes           iql_antmaze
    """,
    "diffusion_bc": """
        task                   learning_rate
        LOCOMOTION             3e-4
        antmaze-umaze          3e-4
        antmaze-umaze-diverse  3e-4
        antmaze-medium-play    1e-3
        antmaze-medium-diverse 3e-4
        antmaze-large-*        3e-4
        pen-*                  3e-5
        KITCHEN                3e-4
    """,
    "awr": "task",
    "qgpo": """
        task                      beta beta_q guidance_scale n_support reward_transform
        halfcheetah-medium-expert 10   1      3              16        iql_locomotion
        halfcheetah-medium        10   1      5              16        iql_locomotion
        halfcheetah-medium-replay 10   1      5              16        iql_locomotion
        hopper-medium             10   1      5              16        iql_locomotion
        hopper-medium-replay      10   1      4              16        iql_locomotion
        hopper-medium-expert      10   1      0.7            16        iql_locomotion
        walker2d-medium           10   1      3              16        iql_locomotion
        walker2d-medium-replay    10   1      3              16        iql_locomotion
        walker2d-medium-expert    10   1      5              16        iql_locomotion
        ANTMAZE                   3    null   1              32        iql_antmaze
    """,
    "sfbc": """
        task                  alpha n_candidates average_top reward_transform policy_kwargs
        LOCOMOTION            20    32           4           none             -
        antmaze-umaze         20    32           1           none             -
        antmaze-umaze-diverse 20    32           1           none             -
        antmaze-medium-*      20    32           1           none             -
        antmaze-large-*       20    32           1           none             sfbc512
    """,
}
STARS = {  # what a name with a star, or in capitals, stands for
    **{f"{env}-*": [f"{env}-medium{level}" for level in ("", "-replay", "-expert")] for env in ("halfcheetah", "walker2d")},
    **{f"antmaze-{size}-*": [f"antmaze-{size}-play", f"antmaze-{size}-diverse"] for size in ("medium", "large")},
    "pen-*": ["pen-human", "pen-cloned"],
    "ADROIT": [f"{task}-{kind}" for task in ("pen", "hammer", "door", "relocate") for kind in ("human", "cloned")],
    "KITCHEN": ["kitchen-complete", "kitchen-partial", "kitchen-mixed"],
}
STARS["LOCOMOTION"] = [f"hopper-medium{level}" for level in ("", "-replay", "-expert")]
STARS["LOCOMOTION"] += STARS["halfcheetah-*"] + STARS["walker2d-*"]
STARS["ANTMAZE"] = ["antmaze-umaze", "antmaze-umaze-diverse", *STARS["antmaze-medium-*"], *STARS["antmaze-large-*"]]

K, M = 1000, 1_000_000
BUDGETS: dict[str, dict[str, tuple[int, int]]] = {  # (default, paper)
    "diffusion_ql": {"train_steps": (60 * K, 2 * M)},
    "diffcps": {"train_steps": (60 * K, 2 * M)},
    "bdpo": {"behavior_steps": (30 * K, 2 * M), "train_steps": (30 * K, 2 * M)},
    "iql": {"train_steps": (100 * K, M)},
    "idql": {"critic_steps": (60 * K, 1500 * K), "behavior_steps": (40 * K, 3 * M)},
    "td3_bc": {"train_steps": (100 * K, M)},
    "diffusion_bc": {"behavior_steps": (60 * K, 2 * M)},
    "awr": {"critic_steps": (30 * K, 200 * K), "policy_steps": (60 * K, M)},
    "qgpo": {"behavior_steps": (30 * K, 600 * K), "critic_steps": (30 * K, 500 * K), "energy_steps": (20 * K, M)},
    "sfbc": {"behavior_steps": (30 * K, 586_200), "critic_steps": (10 * K, 24_500), "planning_steps": (10 * K, 24_500)},
}
PAPER_EXTRAS: dict[str, dict[str, int | None]] = {
    "qgpo": {"behavior_batch_size": 4096, "n_support_states": None},
    "sfbc": {"behavior_batch_size": 4096, "batch_size": 4096, "n_support_states": None},
}
OFFICIAL = {"idql": {"critic_steps": 3 * M}}


def published(module: str) -> dict[str, dict[str, Any]]:
    """Row name -> knob -> value, in full."""
    words = {"yes": True, "no": False, "null": None}
    (_, *knobs), *lines = (line.split() for line in TABLES[module].split("\n") if line.strip())
    rows: dict[str, dict[str, Any]] = {}
    for names, *cells in lines:
        values: dict[str, Any] = {}
        for knob, cell in zip(knobs, cells, strict=True):
            if knob == "policy_kwargs":
                values[knob] = WIDE[cell]
            else:
                values[knob] = words[cell] if cell in words else float(cell) if cell[0].isdigit() else cell
        rows |= {name: values for name in STARS.get(names, [names])}
    return rows


def knobs_of(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in NO_KNOBS}


def rows_of(module: str) -> dict[str, dict[str, Any]]:
    return {name: entries for name, entries in load_presets(module).items() if name not in BLOCKS}


@pytest.mark.parametrize("module", TABLES)
def test_rows_over_the_defaults_are_the_published_table(module: str) -> None:
    rows = rows_of(module)
    assert {name: {**DEFAULTS[module], **knobs_of(entries)} for name, entries in rows.items()} == published(module)
    for name, entries in rows.items():
        for knob, value in knobs_of(entries).items():
            assert value != DEFAULTS[module][knob], f"{module}, row {name}: {knob} is the default"


@pytest.mark.parametrize("module", TABLES)
def test_the_blocks_hold_budgets_and_named_extras_only(module: str) -> None:
    table = load_presets(module)
    assert knobs_of(table["default"]) == {steps: default for steps, (default, _) in BUDGETS[module].items()}
    paper = {steps: paper for steps, (_, paper) in BUDGETS[module].items()}
    assert knobs_of(table["paper"]) == paper | PAPER_EXTRAS.get(module, {})
    assert knobs_of(table.get("official_code", {})) == OFFICIAL.get(module, {})


def own_schedule(module: str, row: str) -> dict[str, Any]:
    """What a row has of its own in the paper's schedule."""
    family = row.split("-")[0]
    if module in ("diffusion_ql", "diffusion_bc") and family in ("antmaze", "pen", "kitchen"):
        steps = 250 * K if row == "kitchen-complete" else M
        return {"train_steps" if module == "diffusion_ql" else "behavior_steps": steps}
    if module == "diffcps" and family == "antmaze":
        return {"train_steps": M}
    if module == "sfbc" and family == "antmaze":
        return {"critic_steps": 49_000, "planning_steps": 49_000}
    if module == "qgpo" and family != "antmaze":  # the authors' own way, not the port's
        return {"beta": 3.0, "beta_q": None, "guidance_scale": 1.0}
    return {}


@pytest.mark.parametrize("module", TABLES)
def test_tasks_with_a_schedule_of_their_own_get_it_with_the_paper_preset_only(module: str) -> None:
    for row, entries in rows_of(module).items():
        own = own_schedule(module, row)
        assert entries.get("paper", {}) == own, row
        for preset in ("paper", "auto"):
            values = resolve_preset(module, preset, entries["aliases"][0])[1]
            for knob, value in own.items():
                assert (values.get(knob) == value) is (preset == "paper"), (row, preset, knob)


@pytest.mark.parametrize("module", TABLES)
def test_every_entry_names_its_source_and_every_row_its_data(module: str) -> None:
    table = load_presets(module)
    assert all(re.search(r"arXiv:\d{4}\.\d{5}|official code|a port, |by this project", row["source"]) for row in table.values())
    aliases = [alias for row in rows_of(module).values() for alias in row["aliases"]]
    assert len(aliases) == len(set(aliases))
    assert all(row["aliases"] for row in rows_of(module).values())


@pytest.mark.parametrize("module", TABLES)
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


@pytest.mark.parametrize("module", TABLES)
def test_the_file_holds_no_entry_twice(module: str) -> None:
    text = (ZOO / f"{module}.yml").read_text()
    names = re.findall(r"^([\w-]+):", text, re.M)
    assert sorted(names) == sorted(load_presets(module))  # YAML would drop the first of two without a word
    for entry in re.split(r"^\S.*$", text, flags=re.M):
        keys = re.findall(r"^  (\w+):", entry, re.M)
        assert len(keys) == len(set(keys))


def test_every_presets_file_is_checked() -> None:
    assert {path.stem for path in ZOO.glob("*.yml")} == {*TABLES, "srpo"}  # SRPO: test_presets.py


@pytest.mark.parametrize("algorithm", diffagents.AGENTS)
def test_presets_fit_the_knobs_of_the_algorithm(algorithm: str) -> None:
    path = diffagents.AGENTS[algorithm]
    module = path.rsplit(".", 1)[-1]
    cls = getattr(importlib.import_module(path), algorithm)
    fields = {field.name: field.default for field in dataclasses.fields(cls.Config)}
    table = load_presets(module)
    for name, entries in table.items():
        given = {knob: value for knob, value in knobs_of(entries).items() if knob != "policy_kwargs"}
        assert set(given) <= set(fields), f"{module}, {name}"
        cls.Config(**given)  # every value is within its knob's range
        own = entries.get("paper", {})
        assert set(own) <= set(fields)
        cls.Config(**{**given, **own})
    assert set(knobs_of(table["default"])) == {f"{stage}_steps" for stage in cls.STAGE_SHARES}
    for knob, value in DEFAULTS.get(module, {}).items():
        if knob != "policy_kwargs":
            assert fields[knob] == value, f"{knob}: the rows of {module}.yml were written for the default {value!r}"
