"""Draw policies of the zoo in their environments: one row per policy, with frames of its first episode.

python zoo/tools/picture.py srpo-hopper-medium-replay-v0 diffusionql-halfcheetah-medium-expert-v0 ...  # docs/images/zoo.png
"""

import argparse
import pathlib
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import diffagents  # noqa: E402
from diffagents.envs.make import make_env, prefer_egl  # noqa: E402
from diffagents.storage import artifact  # noqa: E402

SIDE = 150  # pixels of a frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", metavar="NAME", help="Name of a folder in zoo/.")
    parser.add_argument("--frames", type=int, default=6, help="Frames per row. Default: 6.")
    parser.add_argument("--every", type=int, default=12, help="Steps between frames (locomotion: always 4, from step 60).")
    parser.add_argument("--seed", type=int, default=1000, help="Seed of the episode. Default: 1000.")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "images" / "zoo.png", help="Image file.")
    args = parser.parse_args()
    prefer_egl()
    rows = [row(cell, args) for cell in args.cells]
    picture = Image.new("RGB", (SIDE * args.frames, (SIDE + 16) * len(rows)), "white")
    for i, (cell, frames) in enumerate(zip(args.cells, rows, strict=True)):
        ImageDraw.Draw(picture).text((3, i * (SIDE + 16) + 2), f"zoo/{cell}", fill="black")
        for k, frame in enumerate(frames):
            picture.paste(Image.fromarray(frame).resize((SIDE, SIDE)), (SIDE * k, i * (SIDE + 16) + 16))
    picture.quantize(192).save(args.out, optimize=True)
    print(args.out)


def row(cell: str, args: argparse.Namespace) -> list[np.ndarray]:
    """The frames of one episode."""
    agent = diffagents.load(ROOT / "zoo" / cell, device="cpu", verbose=0)
    deterministic = artifact.read_json(ROOT / "zoo" / cell, "results.json")["is_deterministic"]  # as it was evaluated
    runs = any(name in cell for name in ("hopper", "halfcheetah", "walker2d"))  # which would leave the view of a fixed camera
    env = make_env(
        (agent.dataset_info or {})["env_spec"], render_mode="rgb_array", **({"camera_name": "track"} if runs else {})
    )
    obs, _ = env.reset(seed=args.seed)
    frames: list[Any] = []
    first, every = (60, 4) if runs else (0, args.every)
    for step in range(first + every * (args.frames - 1) + 1):
        if step >= first and (step - first) % every == 0:
            frames.append(np.asarray(env.render()))
        action, _ = agent.predict(obs, deterministic=deterministic)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    env.close()
    return frames


if __name__ == "__main__":
    main()
