"""Make all or some of the benchmark datasets; existing datasets are left alone.

  python zoo/recipes/make_datasets.py --root .data/minari --steps 100000 --only hopper,pointmaze
  export MINARI_DATASETS_PATH=.data/minari     # then: diffagents train SRPO diffagents/hopper/medium-v0

They follow D4RL's design (an intermediate policy = medium, a mixture of snapshots = medium-replay, a near-optimal policy =
expert, both one after the other = medium-expert), in the physics of Gymnasium's v5 environments and with published policies
(policies/README.md). They are not D4RL's data: its published tables give an orientation, not a target.

The same seed gives the same data on every x86-64 processor with FMA instructions (see `Portable` in behavior_policies.py). On
one thread, two at a time, 100,000 steps took 17 to 31 s in MuJoCo, about 20 s in PointMaze and 89 s in AntMaze.
Needs gymnasium-robotics: pip install gymnasium-robotics.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: the networks are small

import numpy as np
from behavior_policies import AntWaypoints, Network, Portable, Snapshots, Waypoints

from diffagents.data.collect import collect, summary, write_dataset
from diffagents.data.minari import read_episodes
from diffagents.envs.make import make_env

POLICIES = Path(__file__).parent / "policies"
NAMESPACE = "diffagents/"
CREDITS = {"author": "diffagents", "code_permalink": "zoo/recipes/make_datasets.py"}


class Recipe(NamedTuple):
    """How to collect a dataset.

    Attributes:
        env: Id of the environment.
        policy: A file in policies/, a pattern for several of them, or None. In mazes a planner leads it.
        noise: Noise in addition to the policy's own.
        share: Share of --steps.
    """

    env: str
    policy: str | None
    noise: str | None = None
    share: float = 1.0


RECIPES = {
    "hopper/medium-v0": Recipe("Hopper-v5", "hopper-sb3-sac"),
    "hopper/medium-replay-v0": Recipe("Hopper-v5", "hopper-trpo-*"),
    "hopper/expert-v0": Recipe("Hopper-v5", "hopper-sb3-tqc"),
    "halfcheetah/medium-v0": Recipe("HalfCheetah-v5", "halfcheetah-trpo-200"),
    "halfcheetah/medium-replay-v0": Recipe("HalfCheetah-v5", "halfcheetah-trpo-*"),
    "halfcheetah/expert-v0": Recipe("HalfCheetah-v5", "halfcheetah-sb3-tqc"),
    "walker2d/medium-v0": Recipe("Walker2d-v5", "walker2d-trpo-080"),
    "walker2d/medium-replay-v0": Recipe("Walker2d-v5", "walker2d-trpo-*"),
    "walker2d/expert-v0": Recipe("Walker2d-v5", "walker2d-sb3-tqc"),
    "pointmaze/umaze-v0": Recipe("PointMaze_UMaze-v3", None, "gaussian:0.5", 0.5),
    "pointmaze/medium-v0": Recipe("PointMaze_Medium-v3", None, "gaussian:0.5", 0.5),
    "antmaze/umaze-v0": Recipe("AntMaze_UMaze-v5", "ant-sb3-ars-best", "gaussian:0.2"),
    "door/expert-v0": Recipe("AdroitHandDoor-v1", "adroit-door-dapg", share=0.25),
}
COMBINED = {
    f"{robot}/medium-expert-v0": (f"{robot}/medium-v0", f"{robot}/expert-v0") for robot in ("hopper", "halfcheetah", "walker2d")
}


def make_policy(recipe: Recipe, env: Any, seed: int) -> Any:
    """The policy of a recipe.

    Args:
        recipe: The recipe.
        env: The environment in which it will act, for the map of a maze.
        seed: Seed of its noise.
    """
    rng = np.random.default_rng(seed)
    files = sorted(POLICIES.glob(f"{recipe.policy}.npz")) if recipe.policy else []
    networks = [Network(file, rng) for file in files]
    if "Maze" in recipe.env:
        maze = env.unwrapped.maze
        return AntWaypoints(maze, networks[0]) if networks else Waypoints(maze)
    return Snapshots(networks, rng) if "*" in str(recipe.policy) else networks[0]


def make(name: str, recipe: Recipe, n_steps: int, seed: int, root: Path) -> None:
    """Collect one dataset and print a summary."""
    # An episode ends at its goal, as in D4RL's antmaze.
    with closing(make_env(recipe.env, **({"continuing_task": False} if "Maze" in recipe.env else {}))) as env:
        who = recipe.policy or "shortest path and PD control"
        what = {"algorithm_name": who, "description": f"{who} of zoo/recipes in {recipe.env}"}
        policy = Portable(make_policy(recipe, env, seed))
        collect(policy, env, n_steps, NAMESPACE + name, seed=seed, noise=recipe.noise, root=root, verbose=1, **what, **CREDITS)


def combine(name: str, parts: tuple[str, ...], root: Path) -> None:
    """Concatenate the episodes of the datasets `parts` and print a summary."""
    folders = [root / NAMESPACE / part / "data" for part in parts]
    if missing := [part for part, folder in zip(parts, folders, strict=True) if not (folder / "metadata.json").is_file()]:
        print(f"{NAMESPACE}{name}: skipped: it needs {' and '.join(missing)}, which --only excludes")
        return
    facts = [json.loads((folder / "metadata.json").read_text()) for folder in folders]
    episodes = [
        e for folder, fact in zip(folders, facts, strict=True) for e in read_episodes(folder, range(fact["total_episodes"]))
    ]
    what = {"algorithm_name": " + ".join(parts), "description": f"the episodes of {' + '.join(parts)}"}
    write_dataset(episodes, facts[0]["env_spec"], NAMESPACE + name, root=root, **what, **CREDITS)
    n_steps, env_id = sum(fact["total_steps"] for fact in facts), json.loads(facts[0]["env_spec"])["id"]
    print(f"{NAMESPACE}{name}: {n_steps:,} steps, {len(episodes)} episodes; {summary(episodes, env_id)}")


def wanted(names: Any, only: str, root: Path) -> Iterator[str]:
    """The names that start with one of the texts in `only` and do not exist yet."""
    for name in names:
        there = (root / NAMESPACE / name / "data" / "metadata.json").is_file()
        if not there and name.startswith(tuple(only.split(","))):
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(".data/minari"), help="Folder of all datasets.")
    parser.add_argument(
        "--steps", type=int, default=100_000, help="Steps per dataset (a share of them for mazes and door). Default: 100000."
    )
    parser.add_argument("--only", default="", help="Beginnings of names, e.g. hopper,pointmaze/umaze.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    args = parser.parse_args()
    for name in wanted(RECIPES, args.only, args.root):
        make(name, RECIPES[name], int(args.steps * RECIPES[name].share), args.seed, args.root)
    for name in wanted(COMBINED, args.only, args.root):
        combine(name, COMBINED[name], args.root)


if __name__ == "__main__":
    main()
