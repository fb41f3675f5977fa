"""Make Minari datasets from two sets of human demonstrations; existing datasets are left alone.

  python zoo/recipes/human.py --root .data/minari [--only pusht]

diffagents/pusht/human-v0: a T-shaped block pushed to its place with a mouse, 206 demonstrations in gym_pusht/PushT-v0
(pip install gym-pusht). The recording has no rewards and ends before the last action takes effect: both are computed with the
environment, which reproduces each recorded state from the one before to a hundredth of a pixel; this is checked for each.
diffagents/door/human-v0: an Adroit hand opens a door, 25 demonstrations with a glove, the source of D4RL's door-human, in
AdroitHandDoor-v1 (pip install gymnasium-robotics). Actions beyond the bounds are clipped. The state after the last
action was not recorded, so the last step of each demonstration is left out.

Origin and licences: data/README.md.
"""

import argparse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from diffagents.data.collect import write_dataset
from diffagents.envs.make import make_env

DATA = Path(__file__).parent / "data"
SETTLED = 10  # steps after which the initial speed of the block, which was not recorded, no longer matters
TOLERANCE = 1e-2  # largest difference between a recorded state and the simulated one, in pixels or radians
CREDITS = {"author": "diffagents", "code_permalink": "zoo/recipes/human.py"}


def demonstrations(file: str) -> Iterator[dict[str, np.ndarray]]:
    """The rows of each demonstration in data/`file`: name -> (T, ...)."""
    with np.load(DATA / file) as arrays:
        rows = {name: arrays[name] for name in arrays.files if len(arrays[name]) == arrays["episode_ends"][-1]}
        starts = [0, *arrays["episode_ends"][:-1]]
        for start, end in zip(starts, arrays["episode_ends"], strict=True):
            yield {name: column[start:end] for name, column in rows.items()}


def pusht_episodes(env: Any) -> Iterator[dict[str, np.ndarray]]:
    """Recorded states and actions, completed by the rewards of the states and the state after the last action.

    Raises:
        RuntimeError: If the environment deviates from the recording.
    """
    world = env.unwrapped
    for number, demonstration in enumerate(demonstrations("pusht_lowdim.npz")):
        states, actions = demonstration["state"].astype(np.float64), demonstration["action"].astype(np.float64)
        env.reset(seed=0)
        world.agent.position = states[0, :2].tolist()
        coverages, ahead = [], []
        for state, action in zip(states, actions, strict=True):
            # Before every step, so that rounding errors cannot grow in a collision. The angle comes first: the block rotates
            # about its centre of gravity, so it moves. reset(options=...) would set the angle last.
            world.block.angle += (state[4] - world.block.angle + np.pi) % (2 * np.pi) - np.pi
            world.block.position = state[2:4].tolist()
            coverages.append(world._get_coverage())
            ahead.append(world.step(action)[0])
        coverages.append(world._get_coverage())
        off = np.abs(np.array(ahead[SETTLED:-1]) - states[SETTLED + 1 :])
        off[:, 4] = np.minimum(off[:, 4], 2 * np.pi - off[:, 4])
        if off.max() > TOLERANCE:
            raise RuntimeError(
                f"demonstration {number} leaves the environment by {off.max():.3g}: another gym-pusht or pymunk?"
            )
        covered = np.array(coverages[1:])
        yield {
            "observations": np.concatenate([states, ahead[-1:]]),
            "actions": actions,
            "rewards": np.clip(covered / world.success_threshold, 0, 1),
            "terminations": covered > world.success_threshold,
            "truncations": np.zeros(len(actions), bool),
        }


def door_episodes(env: Any) -> Iterator[dict[str, np.ndarray]]:
    """All steps of which the next state is known, actions clipped to the bounds."""
    for demonstration in demonstrations("door_human.npz"):
        n = len(demonstration["actions"]) - 1
        yield {
            "observations": demonstration["observations"],
            "actions": np.clip(demonstration["actions"][:n], env.action_space.low, env.action_space.high),
            "rewards": demonstration["rewards"][:n],
            "terminations": np.zeros(n, bool),
            "truncations": np.zeros(n, bool),
        }


SETS = {
    "pusht": (
        "gym_pusht/PushT-v0",
        pusht_episodes,
        "206 human demonstrations of PushT (pusht_cchi_v7 of Diffusion Policy, MIT licence). Rewards (coverage of the target "
        "/ 0.95) and the last state of each are from gym_pusht, which goes through the recorded states",
    ),
    "door": (
        "AdroitHandDoor-v1",
        door_episodes,
        "25 human demonstrations of Adroit door (hand_dapg, Apache-2.0 licence), the source of D4RL's door-human. Actions are "
        "clipped to [-1, 1] (recorded: -1.28 to 1.37); the last step of each is left out, as its next state is unknown. "
        "Rewards are as recorded, in an older version of the environment",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(".data/minari"), help="Folder of all datasets.")
    parser.add_argument("--only", choices=list(SETS), help="Make only this dataset.")
    args = parser.parse_args()
    for name in [args.only] if args.only else SETS:
        env_id, read, description = SETS[name]
        dataset_id = f"diffagents/{name}/human-v0"
        if (args.root / dataset_id / "data" / "metadata.json").is_file():
            continue
        if name == "pusht":
            import gym_pusht  # noqa: F401  (registers the environment)
        with closing(make_env(env_id)) as env:
            episodes = list(read(env))
        write_dataset(episodes, env_id, dataset_id, root=args.root, algorithm_name="human", description=description, **CREDITS)
        returns = [episode["rewards"].sum() for episode in episodes]
        n_steps = sum(len(episode["rewards"]) for episode in episodes)
        print(f"{dataset_id}: {n_steps:,} steps, {len(episodes)} episodes, mean return {np.mean(returns):.2f}")


if __name__ == "__main__":
    main()
