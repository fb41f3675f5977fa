"""Fine-tune an offline policy in the live environment, and plot the returns before and after.

  python examples/03_finetune_online.py                                  # first trains SRPO on the included data
  python examples/03_finetune_online.py --policy me/srpo-hopper-medium --dataset diffagents/hopper/medium-v0

--policy is a Hub id, a folder or a .zip, of any algorithm. Half of each batch is old data, half is new; without --dataset a
downloaded policy learns from new data only. Evaluations use the deterministic policy and the same episodes each time; the
training return is that of the exploring policy. Writes finetuned.zip, its replay buffer and finetune.png into --out.
"""

import argparse
import os
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import diffagents

SHIPPED = "diffagents/reacher/replay-v0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="a Hub id, a folder or a .zip (default: SRPO, trained on the included data)")
    parser.add_argument("--dataset", help="old data to mix in (default: the included dataset for the policy trained here)")
    parser.add_argument("--offline-steps", type=int, default=12_000, help="gradient steps of the policy trained here")
    parser.add_argument("--steps", type=int, default=5_000, help="environment steps")
    parser.add_argument("--points", type=int, default=5, help="number of evaluations")
    parser.add_argument("--episodes", type=int, default=20, help="episodes per evaluation")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    dataset: Any = args.dataset
    if args.policy is not None:
        agent = diffagents.load(args.policy)
    else:
        if dataset is None:
            os.environ["MINARI_DATASETS_PATH"] = str(pathlib.Path(__file__).resolve().parent / "data")
        dataset = diffagents.load_dataset(dataset or SHIPPED)
        agent = diffagents.SRPO(seed=0).learn(dataset, args.offline_steps)

    scores: list[tuple[int, float]] = []

    def log() -> None:
        result = agent.evaluate(n_episodes=args.episodes, n_envs=args.episodes, deterministic=True)
        scores.append((agent.n_env_steps, result.mean_return))
        print(f"after {agent.n_env_steps:,} environment steps: {result}", flush=True)

    every = max(1, args.steps // args.points)

    def evaluate(local: dict[str, Any], _: Any) -> bool:
        if agent.n_env_steps % every == 0:
            log()
        return True

    log()
    agent.learn_online(args.steps, dataset=dataset, callback=evaluate)
    agent.save(args.out / "finetuned.zip")
    agent.save_replay_buffer(args.out / "finetuned_buffer")

    trained = [(row["num_timesteps"], row["train_return"]) for row in agent.history if "train_return" in row]
    first = agent.num_timesteps - agent.n_env_steps
    plt.plot(*zip(*scores, strict=True), "o-", label="evaluation, deterministic policy")
    plt.plot([at - first for at, _ in trained], [value for _, value in trained], alpha=0.5, label="training, exploring policy")
    plt.axhline(scores[0][1], linestyle="--", color="gray", label="offline policy")
    plt.xlabel("environment steps")
    plt.ylabel("return")
    plt.legend()
    plt.savefig(args.out / "finetune.png", dpi=110)
    print(f"\noffline {scores[0][1]:.2f}, fine-tuned {scores[-1][1]:.2f}: {args.out / 'finetune.png'}")


if __name__ == "__main__":
    main()
