"""Train SB3's SAC for a while and store all its transitions as a Minari dataset ("replay": from random to half-trained).

  python zoo/recipes/replay_dataset.py --env Reacher-v5 --steps 30000 --id diffagents/reacher/replay-v0 --root .data/minari

The same arguments give the same data on the same machine. Stored are observations (T+1 per episode), actions in the
environment's units, rewards, terminations and truncations as float32 and bool, and the specification of the environment.
Needs gymnasium[mujoco] for the MuJoCo environments.
"""

import argparse
import os
from typing import Any

import gymnasium
import numpy as np


class Recorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Records every episode that is played in the environment."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episodes: list[dict[str, list[Any]]] = []

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        self.episodes.append({"observations": [obs], "actions": [], "rewards": [], "terminations": [], "truncations": []})
        return obs, info

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        values = (obs, action, reward, terminated, truncated)
        for column, value in zip(self.episodes[-1].values(), values, strict=True):
            column.append(np.copy(value))
        return obs, reward, terminated, truncated, info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="Id of the environment.")
    parser.add_argument("--steps", type=int, default=30_000, help="Environment steps. Default: 30000.")
    parser.add_argument("--id", required=True, help="Id of the new dataset, e.g. diffagents/reacher/replay-v0.")
    parser.add_argument("--root", default=".data/minari", help="Folder of all datasets.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    args = parser.parse_args()
    os.environ["MINARI_DATASETS_PATH"] = os.path.abspath(args.root)
    os.makedirs(args.root, exist_ok=True)

    if os.path.exists(os.path.join(args.root, args.id)):
        parser.error(f"{args.id} exists: choose another --id or --root, or delete its folder")

    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from stable_baselines3 import SAC

    env = Recorder(gymnasium.make(args.env))
    SAC("MlpPolicy", env, seed=args.seed, learning_starts=1000).learn(args.steps, progress_bar=False)
    buffers = []
    for episode in env.episodes:
        arrays = {
            key: np.array(column, bool if key.endswith("ations") and key[0] == "t" else np.float32)
            for key, column in episode.items()
        }
        if len(arrays["rewards"]) == 0:
            continue
        if not (arrays["terminations"][-1] or arrays["truncations"][-1]):
            arrays["truncations"][-1] = True  # the step budget cut the last episode
        buffers.append(EpisodeBuffer(id=len(buffers), infos={}, **arrays))
    returns = np.array([buffer.rewards.sum() for buffer in buffers])
    box = env.observation_space
    minari.create_dataset_from_buffers(
        args.id,
        buffers,
        env=gymnasium.spec(args.env),
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, box.shape, np.float32),
        action_space=env.action_space,
        algorithm_name="SAC (stable-baselines3), replay",
        author="diffagents contributors",
        author_email="none",
        code_permalink="zoo/recipes/replay_dataset.py",
        description=f"everything SAC did in its first {args.steps} steps, seed {args.seed}",
    )
    print(
        f"{args.id}: {sum(len(b.rewards) for b in buffers)} steps, {len(buffers)} episodes, mean return {returns.mean():.1f}, "
        f"last ten episodes {returns[-10:].mean():.1f}, best {returns.max():.1f}"
    )


if __name__ == "__main__":
    main()
