"""What was published in an older format loads and acts as it did, for ever."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_agents import NAMES
from write_format_fixture import OBS, toy_data

import diffagents
from diffagents.storage import artifact

FORMATS = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", range(1, artifact.FORMAT + 1))
def test_every_format_loads_acts_and_learns_on(version: int, name: str) -> None:
    folder = FORMATS / f"format{version}"
    agent = diffagents.load(folder / f"{name}.zip", device="cpu", verbose=0)
    expected = json.loads((folder / "actions.json").read_text())[name]
    np.testing.assert_allclose(agent.predict(OBS, deterministic=True)[0], expected, rtol=1e-5, atol=1e-5)
    stored = artifact.read(folder / f"{name}.zip").config
    for one in (agent, agent.clone(), agent.learn(toy_data(), stages=(agent.POLICY_STAGE,))):  # no preset is mixed in
        assert (one.preset, one.policy_kwargs) == (stored["preset"], stored["policy_kwargs"]) == (None, one.policy_kwargs)
        assert one.config == type(agent).Config(**stored["knobs"])


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_say_how_it_is_meant_to_act_samples_if_it_can(name: str) -> None:
    """As its `predict(obs)` did when the hyperparameter `deterministic` did not exist."""
    path = FORMATS / "format1" / f"{name}.zip"
    assert "deterministic" not in json.loads(zipfile.ZipFile(path).read(artifact.CONFIG))["knobs"]
    agent, other = (diffagents.load(path, device="cpu", verbose=0) for _ in range(2))
    np.testing.assert_array_equal(agent.predict(OBS)[0], other.predict(OBS, deterministic=False)[0])
    samples = hasattr(agent.config, "deterministic")
    assert agent.acts_deterministically != samples
    if samples:
        assert type(agent).load(path, deterministic=True, device="cpu", verbose=0).acts_deterministically


def test_every_older_format_has_a_migration_and_a_fixture() -> None:
    assert sorted(artifact.MIGRATIONS) == list(range(1, artifact.FORMAT))
    assert sorted(path.name for path in FORMATS.glob("format*")) == [f"format{n}" for n in range(1, artifact.FORMAT + 1)]
