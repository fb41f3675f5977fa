"""Adds to tests/data/format<N> a small agent of every algorithm as this version saves it, and its actions.

Run it for a new format or a new algorithm: `python tests/write_format_fixture.py`. Existing files are never changed: what was
published in a format must load for ever (tests/storage/test_format.py).
"""

import json
from pathlib import Path

import numpy as np
from small_agents import NAMES, small

from diffagents.storage.artifact import FORMAT

FOLDER = Path(__file__).parent / "data" / f"format{FORMAT}"
LARGE = ("SRPO", "BDPO", "QGPO", "SfBC", "IDQL")  # half a megabyte and more with their optimisers
OBS = np.linspace(-1.0, 1.0, 15, dtype=np.float32).reshape(5, 3)


def toy_data() -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    ends = np.arange(40) % 20 == 19
    actions = r.uniform(-2.0, 2.0, (40, 2)).astype(np.float32)
    actions[:2] = [[-2.0, -2.0], [2.0, 2.0]]
    return {
        "observations": r.normal(3.0, 2.0, (40, 3)).astype(np.float32),
        "actions": actions,
        "rewards": r.normal(size=40).astype(np.float32),
        "terminations": ends,
        "truncations": np.zeros(40, bool),
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = FOLDER / "actions.json"
    actions = json.loads(table.read_text()) if table.exists() else {}
    for name in NAMES:
        if name in actions:
            continue
        agent = small(name, preset=None, normalize_obs=True)
        agent.learn(toy_data())
        agent.save(FOLDER / f"{name}.zip", include_trainer_state=name not in LARGE)
        actions[name] = agent.predict(OBS, deterministic=True)[0].tolist()
    table.write_text(json.dumps(actions, indent=1) + "\n")
