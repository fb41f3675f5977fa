"""Train on transitions that you recorded yourself, save the agent, load it and act.

  python examples/02_your_own_data.py [--episodes 60] [--total-timesteps 15000]

The data are episodes of an unreliable controller on Pendulum-v1; replace `record()` by your own arrays. You need observations,
actions, rewards and, for each row, whether the episode terminated (a true end) or was truncated (a time limit).
"""

import argparse
import tempfile

import gymnasium
import numpy as np

from diffagents import SRPO, evaluate, load


def record(n_episodes: int) -> dict[str, np.ndarray]:
    """Episodes of a swing-up controller that acts at random half of the time, like the log of a poor system."""
    env, rng = gymnasium.make("Pendulum-v1"), np.random.default_rng(0)
    rows: dict[str, list] = {"observations": [], "actions": [], "rewards": [], "terminations": [], "truncations": []}
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=episode)
        over = False
        while not over:
            cos, sin, speed = obs
            energy = 0.5 * speed**2 / 3 + 5 * (cos - 1)
            torque = -10 * sin - 2 * speed if cos > 0.9 else 2 * np.sign(speed) * (energy < 0)
            if rng.random() < 0.5:
                torque = rng.uniform(-2, 2)
            action = np.clip([torque], -2, 2).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            for column, value in zip(rows.values(), (obs, action, reward, terminated, truncated), strict=True):
                column.append(value)
            obs, over = next_obs, terminated or truncated
    return {name: np.array(column) for name, column in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--total-timesteps", type=int, default=15_000)
    args = parser.parse_args()

    data = record(args.episodes)
    agent = SRPO("MlpPolicy", "Pendulum-v1", seed=0)
    agent.learn(data, total_timesteps=args.total_timesteps)

    with tempfile.TemporaryDirectory() as folder:
        loaded = load(agent.save(f"{folder}/my_policy"))  # no environment, no dataset, no pickle needed
    assert agent.dataset_info is not None
    print(f"data: mean return {agent.dataset_info['mean_return']:.0f}")
    print(f"SRPO: {evaluate(loaded, 'Pendulum-v1', n_episodes=10)}")


if __name__ == "__main__":
    main()
