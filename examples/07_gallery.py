"""Figures on the 2-D toys of bandits.py, like those of the papers.

  python examples/07_gallery.py --figure srpo                      # half an hour on one core; --tasks moons: five minutes
  python examples/07_gallery.py --figure all --scale 0.01          # everything, at a hundredth of the training

srpo    For each toy: data, samples of the learned behaviour model, and how SRPO's actions move as 1 / beta goes from 0 to 1.
        Each action starts at the best point a_tar of a quadratic Q(a) = -|a - a_tar|^2, a_tar on a grid, and climbs
        Q + (1 / beta) log mu by the behaviour model's score (arXiv:2310.07297, figures 3 and 7).
circle  The noisy circle of DiffCPS for six algorithms: 05_noisy_circle.py.
bdpo    BDPO's generation paths over its values: 06_bdpo_paths.py.

The papers train on a GPU for hundreds of thousands of updates. To resolve thin curves in minutes of a CPU the behaviour model
here differs in three ways from SRPO's: a small network, slower time features (T_FEATURES), and more training near t = 0
(`ToySRPO`). Trained models are stored in --out and reused.
"""

import argparse
import pathlib
import subprocess
import sys
import time

import bandits
import numpy as np
import torch

from diffagents import SRPO
from diffagents.diffusion.sde import vp_alpha_sigma
from diffagents.training.updates import Noise

HERE = pathlib.Path(__file__).resolve().parent
TASKS = [name for name in bandits.TASKS if name != "circle"]
LEVELS = np.linspace(0.0, 1.0, 11)  # of 1 / beta
T_FEATURES = 0.1  # factor on the frequencies of the score network's time features
T_SCORE = 0.01  # the score is evaluated near t = 0: the data are blurred by sigma = .045 of half the action range


class ToySRPO(SRPO):
    """SRPO with t = u^3 in its behaviour stage: a tenth of it lies below .001, where thin curves are resolved."""

    def draw_behavior(self, n: int, generator: torch.Generator) -> Noise:
        noise = super().draw_behavior(n, generator)
        return {**noise, "u": noise["u"] ** 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", choices=["srpo", "bdpo", "circle", "all"], default="srpo")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="toys of the srpo figure")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the gradient steps, e.g. 0.01")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def scaled(steps: int) -> int:
        return max(2, round(steps * args.scale))

    if args.figure in ("srpo", "all"):
        columns = []
        for name in args.tasks:
            kept = args.out / f"srpo-{name}-scale{args.scale:g}-seed{args.seed}.zip"
            columns.append(srpo_column(name, scaled, args.seed, kept))
        plot_srpo(columns, args.out / "srpo.png")
    seed = ["--seed", str(args.seed)]
    if args.figure in ("circle", "all"):
        run("05_noisy_circle.py", "--steps", str(max(3, scaled(6000))), "--out", str(args.out / "circle.png"), *seed)
    if args.figure in ("bdpo", "all"):
        steps = ["--behavior-steps", str(scaled(8000)), "--train-steps", str(scaled(8000))]
        run("06_bdpo_paths.py", *steps, "--out", str(args.out / "bdpo.png"), *seed)


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


# ---- SRPO: from greedy points to the data ------------------------------------------------------------------------------


def srpo_column(name: str, scaled, seed: int, kept: pathlib.Path) -> dict[str, object]:
    """Train a behaviour model on a toy task, or load `kept`, and shift a grid of greedy actions by its score."""
    start = time.perf_counter()
    if kept.exists():
        agent = ToySRPO.load(kept, verbose=0)
    else:
        agent = behavior_model(name, scaled, seed)
        agent.save(kept, include_trainer_state=False)
    samples = agent.behavior_policy(200).predict(np.zeros((2000, 1), np.float32))[0]
    side = np.linspace(-4.0, 4.0, 20, dtype=np.float32)
    target = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    path = shift(agent, target, bandits.bound(name), scaled(100))
    data = bandits.points(name, 5000, seed=1)[0]
    print(f"{name}, {time.perf_counter() - start:.0f} s")
    print(f"  samples of the behaviour model  {text(bandits.measure(samples, data))}")
    for level, actions in zip(LEVELS, path, strict=True):
        found = bandits.measure(actions, data)
        q = -np.square(actions - target).sum(-1).mean()
        print(f"  1/beta {level:.1f}  distance {found['distance']:.3f}  log_density {found['log_density']:7.2f}  Q {q:6.3f}")
    sys.stdout.flush()
    return {"name": name, "data": data[:2000], "samples": samples, "path": path}


def behavior_model(name: str, scaled, seed: int) -> ToySRPO:
    """The behaviour stage of SRPO, with a tenth of the learning rate in the last part."""
    agent = ToySRPO(
        "MlpPolicy",
        bandits.Bandit(name),
        preset=None,  # the paper's algorithm
        seed=seed,
        verbose=0,
        dropout=0.0,
        reward_transform="none",
        learning_rate=3e-3,
        behavior_batch_size=512,
        behavior_steps=scaled(15_000),
        policy_kwargs={"behavior_width": 32, "behavior_blocks": 3},
    )
    agent.behavior.net.frequencies.mul_(T_FEATURES)
    data = bandits.dataset(name, 100_000, seed)
    agent.learn(data, stages=("behavior",))
    tail = agent.clone(learning_rate=3e-4, behavior_steps=scaled(6000))
    return tail.learn(data, stages=("behavior",))


def shift(agent: SRPO, target: np.ndarray, bound: float, steps: int) -> np.ndarray:
    """(levels, n, 2): actions after gradient ascent on Q + (1 / beta) log mu, each level starting from the previous one.

    The gradient is that of SRPO's policy loss with weight alpha / sigma at T_SCORE, in the units of the task.
    """
    net, goal = agent.behavior.net, torch.from_numpy(target)
    generator = torch.Generator().manual_seed(0)
    t = torch.full((len(goal),), T_SCORE)
    alpha, sigma = (value[:, None] for value in vp_alpha_sigma(t))
    actions, path = goal.clone(), [target.copy()]
    for level in LEVELS[1:]:
        actions.requires_grad_()
        optimizer = torch.optim.Adam([actions], lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
        for _ in range(steps):
            with torch.no_grad():
                eps = torch.randn(goal.shape, generator=generator)
                eps_mu = net(alpha * actions / bound + sigma * eps, torch.zeros(len(goal), 1), t)
                actions.grad = 2.0 * (actions - goal) + float(level) * alpha / sigma * (eps_mu - eps) / bound
            optimizer.step()
            schedule.step()
        actions = actions.detach()
        path.append(actions.numpy().copy())
    return np.stack(path)


def text(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


def plot_srpo(columns: list[dict[str, object]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(columns), figsize=(2.1 * len(columns) + 1.0, 6.6), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal", xticks=[], yticks=[])
    for label, axis in zip(("data", "behaviour model", "SRPO"), axes[:, 0], strict=True):
        axis.set_ylabel(label, fontsize=9)
    for (top, middle, bottom), column in zip(axes.T, columns, strict=True):
        top.set_title(column["name"], fontsize=9)
        top.scatter(*column["data"].T, s=1, c="0.3", linewidths=0)
        middle.scatter(*column["samples"].T, s=1, c="tab:blue", linewidths=0)
        for level, actions in zip(LEVELS, column["path"], strict=True):
            color = np.full(len(actions), level)
            shown = bottom.scatter(*actions.T, s=2, c=color, cmap="plasma_r", vmin=0, vmax=1, linewidths=0)
    figure.colorbar(shown, ax=axes[2], label="1 / beta", shrink=0.9)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
