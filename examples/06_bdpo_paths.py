"""How BDPO's policy turns noise into actions: generation paths over its values V_n (the figures of arXiv:2502.04778).

  python examples/06_bdpo_paths.py --task 8gaussians [--behavior-steps 8000 --train-steps 8000] [--out out/bdpo.png]

Top: the data, coloured by reward; the target, which is the data resampled by exp(reward / eta); samples of the learned policy.
Bottom: paths of the policy (its denoising ODE, DDIM) in five windows of time, over a heat map of V_n at the end of the window:
the value of a partly denoised action makes the paths turn towards better modes. The trained agent is stored next to the figure
and reused.
"""

import argparse
import pathlib

import bandits
import numpy as np
import torch

from diffagents import BDPO

WINDOWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="8gaussians", choices=list(bandits.TASKS))
    parser.add_argument("--eta", type=float, default=0.06)
    parser.add_argument("--behavior-steps", type=int, default=8000)
    parser.add_argument("--train-steps", type=int, default=8000)
    parser.add_argument("--diffusion-steps", type=int, default=50)
    parser.add_argument("--points", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bdpo.png"))
    args = parser.parse_args()

    xy, reward = bandits.points(args.task, args.points)
    kept = args.out.with_suffix(".zip")
    if kept.exists():
        agent = BDPO.load(kept)
    else:
        agent = BDPO(
            "MlpPolicy",
            bandits.Bandit(args.task),
            preset=None,  # the paper's algorithm
            seed=args.seed,
            eta=args.eta,
            gamma=0.0,  # episodes have one step
            rho=0.0,
            n_critics=2,
            n_samples=4,
            tau=0.02,
            clip_x0=False,
            n_diffusion_steps=args.diffusion_steps,
            reward_transform="none",
            policy_freq=2,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            behavior_learning_rate=1e-3,
            batch_size=128,
            policy_kwargs={"net_arch": [128, 128, 128]},
            behavior_steps=args.behavior_steps,
            train_steps=args.train_steps,
        ).learn(bandits.dataset(args.task, args.points))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        agent.save(kept, include_trainer_state=False)
    target = bandits.resample(xy, reward, 1.0 / args.eta, 2000)
    learned = agent.predict(np.zeros((2000, 1), np.float32), select="first")[0]
    for name, points in (("data", xy[:2000]), ("target", target), ("BDPO", learned)):
        print(f"{name:<7} mean reward {bandits.energy(args.task, points).mean():.3f}")
    plot(agent, args.task, xy, reward, target, learned, args.out)


@torch.no_grad()
def ddim_paths(agent: BDPO, n: int) -> torch.Tensor:
    """(T + 1, n, 2): the noise, and the states after each step of the deterministic sampler of the same network."""
    chain, obs = agent.policy_ema.chain, torch.zeros(n, 1)
    x, eps_fn = torch.randn(n, 2, generator=torch.Generator().manual_seed(1)), agent.policy_ema.on_states(obs)
    path = [x]
    for i in reversed(range(chain.n_steps)):
        eps = eps_fn(x, i)
        x0 = (x - chain.noise[i] * eps) / chain.signal[i]
        x = x0 if i == 0 else chain.signal[i - 1] * x0 + chain.noise[i - 1] * eps
        path.append(x)
    return torch.stack(path)


@torch.no_grad()
def value_map(agent: BDPO, n: int, side: torch.Tensor) -> torch.Tensor:
    """V_n on a grid of partly denoised actions; Q if n = 0."""
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 2)
    obs = torch.zeros(len(grid), 1)
    if n == 0:
        values = agent.critic_target(torch.cat([obs, grid], -1))
    else:
        values = agent.value_target(obs, grid, torch.full((len(grid),), n - 1))
    return values.mean(0).reshape(len(side), len(side))


def plot(
    agent: BDPO, task: str, xy: np.ndarray, reward: np.ndarray, target: np.ndarray, learned: np.ndarray, path: pathlib.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bound, steps = bandits.bound(task), agent.config.n_diffusion_steps
    figure, axes = plt.subplots(2, WINDOWS, figsize=(2.5 * WINDOWS, 5.6))
    some = slice(0, 2000)
    for axis, points, color, title in (
        (axes[0, 0], xy[some], reward[some], "data, by reward"),
        (axes[0, 1], target, bandits.energy(task, target), "target"),
        (axes[0, 2], learned, bandits.energy(task, learned), "BDPO"),
    ):
        axis.scatter(*points.T, c=color, s=3, linewidths=0, cmap="viridis", vmin=0, vmax=1)
        axis.set(xlim=(-bound, bound), ylim=(-bound, bound), aspect="equal", title=title)
    for axis in axes.flat:
        axis.axis("off")
    paths, side = ddim_paths(agent, 100), torch.linspace(-2.0, 2.0, 80)
    ends = [round(steps * (WINDOWS - k) / WINDOWS) for k in range(WINDOWS + 1)]  # n at the borders of the windows
    for axis, first, last in zip(axes[1], ends[:-1], ends[1:], strict=True):
        axis.pcolormesh(side, side, value_map(agent, last, side), cmap="magma", shading="auto", rasterized=True)
        part = paths[steps - first : steps - last + 1]
        axis.plot(part[:, :, 0], part[:, :, 1], c="white", lw=0.4, alpha=0.7)
        axis.scatter(*part[-1].T, s=4, c="cyan", linewidths=0)
        title = f"n = {first} to {last}, {f'V_{last}' if last else 'Q'}"
        axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
