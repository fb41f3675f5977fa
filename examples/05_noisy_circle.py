"""Six ways to imitate a noisy circle: which policies can be multimodal? (the bandit of the DiffCPS paper, arXiv:2310.05333)

  python examples/05_noisy_circle.py [--steps 6000] [--out out/circle.png]

The data are noisy points on a circle, all with reward 1, so every point of the ring is a good action. A Gaussian (AWR) puts its
mass in the middle, a deterministic policy (TD3+BC) on one point, and diffusion policies around the ring. In the output and the
titles `on` is the share of actions within 0.05 of a data point, and `around` the share of the ring's angles that they reach.
The chains have 20 steps here: with the 5 steps of the MuJoCo tasks the last step alone averages over a third of the ring, and
even plain cloning yields a disc (--diffusion-steps 5).
"""

import argparse
import pathlib
import time

import bandits
import numpy as np

import diffagents

ALGORITHMS = ["AWR", "TD3BC", "DiffusionQL", "SfBC", "DiffusionBC", "DiffCPS"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--steps", type=int, default=6000, help="gradient steps of each algorithm")
    parser.add_argument("--points", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--diffusion-steps", type=int, default=20, help="steps T of the discrete chains (SfBC has none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/circle.png"))
    args = parser.parse_args()

    data, (xy, _) = bandits.dataset("circle", args.points), bandits.points("circle", args.points)
    observations = np.zeros((args.samples, 1), np.float32)
    panels = [("data", xy[: args.samples], "")]
    for name in args.algorithms:
        settings = {"policy_kwargs": {"net_arch": [128, 128]}, "batch_size": 128, "learning_rate": 1e-3}
        if name in ("DiffusionQL", "DiffCPS", "DiffusionBC"):
            settings["n_diffusion_steps"] = args.diffusion_steps
        if name == "DiffCPS":
            settings["policy_freq"] = 1  # as many policy updates as the other algorithms
        if name == "SfBC":
            settings |= {"policy_kwargs": {"behavior_width": 128}, "n_support_states": 100, "learning_rate": 3e-4}
        start = time.perf_counter()
        settings |= {"preset": None, "seed": args.seed, "verbose": 0}  # the papers' algorithms
        agent = getattr(diffagents, name)("MlpPolicy", bandits.Bandit("circle"), **settings)
        agent.learn(data, total_timesteps=args.steps)
        actions = agent.predict(observations, deterministic=False)[0]
        found = bandits.measure(actions, xy)
        title = f"on {found['jaccard']:.2f}, around {found['coverage']:.2f}"
        radius = np.linalg.norm(actions, axis=1)
        seconds = time.perf_counter() - start
        print(f"{name:<12} {title}, radius {radius.mean():.3f} ± {radius.std():.3f}, {seconds:.0f} s", flush=True)
        panels.append((name, actions, title))
    plot(panels, args.out)


def plot(panels: list[tuple[str, np.ndarray, str]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(panels) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(10.4, 2.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, points, title) in zip(axes.flat, panels, strict=False):
        if name != "data":
            axis.scatter(*panels[0][1].T, s=1, c="0.85", linewidths=0)
        axis.scatter(*points.T, s=3, c="tab:blue", linewidths=0, alpha=0.6)
        axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        axis.set_title(f"{name}\n{title}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
