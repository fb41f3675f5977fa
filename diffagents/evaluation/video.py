"""A video of an episode."""

import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from diffagents.envs.make import make_env
from diffagents.errors import one_line
from diffagents.evaluation.episodes import Policy, check_actions, check_spaces, stack


def record_video(
    policy: Policy,
    env: Any,
    path: str | os.PathLike[str],
    *,
    seed: int | None = 0,
    max_steps: int = 1000,
    deterministic: bool = True,
    fps: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> pathlib.Path | None:
    """One episode, at most `max_steps` of it, as an mp4 (H.264, yuv420p) at `path`, which is returned.

    env: an id, a stored spec, or an Env made with render_mode="rgb_array". The video runs as fast as the simulation
    (`metadata["render_fps"]`) with about 30 pictures a second, so only every fourth of Hopper's 125; with `fps` it
    holds every step, `fps` of them a second. MuJoCo without a GPU needs up to half a second for a picture.

    A video is a nicety: whatever goes wrong (no renderer, no ffmpeg, ...) becomes one warning with cause and cure; then
    nothing is written and None returned.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix != ".mp4":
            raise ValueError(f"the file must end in .mp4, not {path.name!r}")
        with ExitStack() as cleanup:
            if isinstance(env, str | EnvSpec):
                world = make_env(env, **{**(env_kwargs or {}), "render_mode": "rgb_array"})
                cleanup.callback(world.close)
            else:
                world = make_env(env, **(env_kwargs or {}))
            if not isinstance(world, gym.Env) or world.render_mode != "rgb_array":
                raise ValueError('the environment must be a single one made with render_mode="rgb_array"')
            check_spaces(policy, world.observation_space, world.action_space)
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".video-"))
            part = pathlib.Path(folder) / "part.mp4"
            rate = fps or float(world.metadata.get("render_fps") or 30)
            every = 1 if fps else max(1, int(rate // 30))
            _write_mp4(part, _frames(policy, world, seed, max_steps, deterministic, every), rate / every)
            os.replace(part, path)
    except Exception as error:
        warnings.warn(f"no video at {path}: {one_line(error)} -- {_video_cure(error)}", stacklevel=2)
        return None
    return path


def _frames(
    policy: Policy, env: Any, seed: int | None, max_steps: int, deterministic: bool, every: int
) -> Iterator[np.ndarray]:
    """The picture after the reset, after every so many steps, and after the last one."""
    obs, state, first = env.reset(seed=seed)[0], None, True
    yield env.render()
    for t in range(1, max_steps + 1):
        actions, state = policy.predict(stack([obs]), state=state, episode_start=np.array([first]), deterministic=deterministic)
        obs, _, terminated, truncated, _ = env.step(check_actions(actions, 1, env.action_space)[0])
        first, over = False, terminated or truncated or t == max_steps
        if over or t % every == 0:
            yield env.render()
        if over:
            return


def _write_mp4(path: pathlib.Path, frames: Iterator[np.ndarray], fps: float) -> None:
    import imageio_ffmpeg  # moviepy and imageio[ffmpeg] both bring it

    writer = None
    try:
        for frame in frames:
            if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError("the environment's render() gave no uint8 picture of shape (height, width, 3)")
            if writer is None:
                size = (frame.shape[1], frame.shape[0])
                # yuv420p wants even sides: an odd one is scaled up by a pixel.
                options = {"codec": "libx264", "pix_fmt_out": "yuv420p", "macro_block_size": 2}
                writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, ffmpeg_log_level="error", **options)
                writer.send(None)
            writer.send(np.ascontiguousarray(frame))
    finally:
        if writer is not None:
            writer.close()
    if not path.is_file() or path.stat().st_size == 0:
        raise RuntimeError("ffmpeg wrote nothing")


def _video_cure(error: Exception) -> str:
    text = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    if "imageio" in text or "ffmpeg" in text:
        return 'pip install "diffagents[video]"'
    if "opengl" in text or "egl" in text or "glfw" in text or "mujoco" in text:
        return "MuJoCo needs a renderer: on Linux without a screen install libegl1 and PyOpenGL, then set MUJOCO_GL=egl"
    return "the evaluation itself is not touched"
