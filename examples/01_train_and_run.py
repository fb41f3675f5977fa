"""Train SRPO on an offline dataset and run it in the dataset's own environment.

  python examples/01_train_and_run.py                                           # the small dataset next to this file
  python examples/01_train_and_run.py --dataset mujoco/hopper/medium-v0         # any Minari id, downloaded if necessary
  python examples/01_train_and_run.py --seeds 0 1 2                             # the table of the README

Writes into --out: the agent (a .zip without pickle), a picture of its returns and losses, and a video if rendering is possible.
"""

import argparse
import os
import pathlib
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
SHIPPED = "diffagents/reacher/replay-v0"
# The included dataset is small: half of the usual number of updates.
SHIPPED_STEPS = {"behavior_steps": 5_000, "critic_steps": 6_000, "policy_steps": 2_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=SHIPPED, help="a Minari id, or a .npz or .hdf5 file (default: %(default)s)")
    parser.add_argument("--env", default=None, help="environment id; needed only if the dataset names none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    parser.add_argument("--episodes", type=int, default=10, help="of each evaluation (default: %(default)s)")
    parser.add_argument(
        "--total-timesteps", type=int, default=None, help="total number of gradient steps, instead of the defaults"
    )
    parser.add_argument("--preset", default="fast", help='"fast" (default), "auto", "paper" or a row of zoo/srpo.yml')
    parser.add_argument(
        "--beta", type=float, default=None, help="main hyperparameter of SRPO: large is greedy, small stays near the data"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the results")
    args = parser.parse_args()
    if args.dataset == SHIPPED:
        os.environ["MINARI_DATASETS_PATH"] = str(HERE / "data")

    from diffagents import BC, SRPO, CurveCallback, evaluate, load_dataset, record_video

    settings = dict(SHIPPED_STEPS) if args.dataset == SHIPPED and args.preset == "fast" else {}
    if args.beta is not None:
        settings["beta"] = args.beta
    data = load_dataset(args.dataset, env=args.env, verbose=1)
    env = args.env or data.info["env_spec"]
    if env is None:
        parser.error(f"{args.dataset} names no environment: pass --env")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        start = time.perf_counter()
        # Now and then it plays three episodes, which takes a twentieth of the time at most, for the curve of returns.
        on_the_way = CurveCallback(env)
        agent = SRPO(seed=seed, preset=args.preset, **settings).learn(data, args.total_timesteps, callback=on_the_way)
        seconds = time.perf_counter() - start
        clone = BC(seed=seed, verbose=0, behavior_steps=agent.stage_steps["behavior"]).learn(data)
        # Both policies play the same episodes: same number, same seeds.
        cloned = evaluate(clone, env, args.episodes, n_envs=args.episodes)
        srpo = evaluate(agent, env, args.episodes, n_envs=args.episodes)
        rows.append((cloned.mean_return, srpo.mean_return))
        print(f"\nseed {seed}, trained in {seconds:.0f} s")
        print(f"  data                {data.info['mean_return']:10.2f}  mean return of its {data.info['n_episodes']} episodes")
        print(f"  behaviour cloning   {cloned}")
        print(f"  SRPO                {srpo}", flush=True)
        if seed == args.seeds[0]:
            print(f"  agent:  {agent.save(args.out / 'srpo.zip')}")
            print(f"  curves: {plot(agent, cloned.mean_return, args.out / 'curves.png')}")
            video = record_video(agent, env, args.out / "srpo.mp4")
            print(f"  video:  {video or 'none (see the warning above)'}")
    if len(rows) > 1:
        bc, srpo_returns = np.array(rows).T
        print(f"\n{len(rows)} seeds, mean ± std over seeds of the mean return over {args.episodes} episodes:")
        print(
            f"  data {data.info['mean_return']:.2f}   behaviour cloning {bc.mean():.2f} ± {bc.std():.2f}   "
            f"SRPO {srpo_returns.mean():.2f} ± {srpo_returns.std():.2f}"
        )


def plot(agent: object, clone_return: float, path: pathlib.Path) -> pathlib.Path | str:
    """The returns of the policy at the top, and below them the losses."""
    from diffagents import draw_curves

    try:
        picture = draw_curves(agent, clone_return=clone_return)
    except ImportError:
        return "none: pip install matplotlib"
    if picture is None:
        return "none: the training was too short"
    path.write_bytes(picture)
    return path


if __name__ == "__main__":
    main()
