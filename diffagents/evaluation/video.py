"""`record_video`: one episode of a policy as an mp4."""

import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from diffagents.envs.make import make_env
from diffagents.errors import one_line
from diffagents.evaluation.episodes import Policy, check_actions, check_spaces, is_meant_deterministic, stack
from diffagents.files import scratch_folder


def record_video(
    policy: Policy,
    env: Any,
    path: str | os.PathLike[str],
    *,
    seed: int | None = 0,
    max_steps: int = 1000,
    deterministic: bool | None = None,
    fps: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> pathlib.Path | None:
    """Record one episode as an mp4 (H.264, yuv420p).

    A failed video must not stop a program: whatever goes wrong (no renderer, no ffmpeg, ...) becomes one warning with its
    cause and remedy, and nothing is written. MuJoCo without a GPU needs up to half a second for a frame.

    Args:
        policy: As in `evaluate`.
        env: An id, a stored spec, or a single Env made with render_mode="rgb_array".
        path: The file to write; must end in .mp4. Missing folders are made, an existing file is replaced.
        seed: Seed of the reset.
        max_steps: Where to stop an episode that is longer.
        deterministic: As in `evaluate`: None acts as the policy is meant to.
        fps: Frames per second, one frame per step. Default: the speed of the simulation (`metadata["render_fps"]`) with about
            30 frames per second, for which steps are left out (of Hopper's 125 per second, every fourth is kept).
        env_kwargs: Keyword arguments of the environment; for an id or a stored spec only.

    Returns:
        The path, or None if there is no video.
    """
    path = pathlib.Path(path).expanduser()
    if deterministic is None:
        deterministic = is_meant_deterministic(policy)
    try:
        if path.suffix != ".mp4":
            raise ValueError(f"the file must end in .mp4, not {path.name!r}")
        with ExitStack() as cleanup:
            if isinstance(env, str | EnvSpec):
                single = make_env(env, **{**(env_kwargs or {}), "render_mode": "rgb_array"})
                cleanup.callback(single.close)
            else:
                single = make_env(env, **(env_kwargs or {}))
            if not isinstance(single, gym.Env) or single.render_mode != "rgb_array":
                raise ValueError('the environment must be a single one made with render_mode="rgb_array"')
            check_spaces(policy, single.observation_space, single.action_space)
            part = cleanup.enter_context(scratch_folder(path)) / "part.mp4"
            rate = fps or float(single.metadata.get("render_fps") or 30)
            every = 1 if fps else max(1, int(rate // 30))
            _write_mp4(part, _frames(policy, single, seed, max_steps, deterministic, every), rate / every)
            os.replace(part, path)
    except Exception as error:
        warnings.warn(f"no video at {path}: {one_line(error)} -- {_video_cure(error)}", stacklevel=2)
        return None
    return path


def _frames(
    policy: Policy, env: Any, seed: int | None, max_steps: int, deterministic: bool, every: int
) -> Iterator[np.ndarray]:
    """The frame after the reset, after each `every`-th step, and after the last step."""
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
    """Encode frames (height, width, 3) uint8 with ffmpeg."""
    import imageio_ffmpeg  # moviepy and imageio[ffmpeg] both depend on it

    writer = None
    try:
        for frame in frames:
            if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError("the environment's render() returned no uint8 image of shape (height, width, 3)")
            if writer is None:
                size = (frame.shape[1], frame.shape[0])
                # yuv420p needs even sides; an odd one is scaled up by a pixel.
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
    """What to do about an error of `record_video`."""
    text = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    if "imageio" in text or "ffmpeg" in text:
        return 'pip install "diffagents[video]"'
    if "opengl" in text or "egl" in text or "glfw" in text or "mujoco" in text:
        return "MuJoCo needs a renderer: on Linux without a screen, install libegl1 and PyOpenGL, then set MUJOCO_GL=egl"
    return "the evaluation itself is not affected"
