"""`record_video`: a policy in its environment as an mp4, with the robot in the picture."""

import itertools
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
    min_seconds: float = 3.0,
    deterministic: bool | None = None,
    fps: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    verbose: int | None = None,
) -> pathlib.Path | None:
    """Record an episode as an mp4 (H.264, yuv420p), and if it is short, more episodes after it.

    A failed video must not stop a program: whatever goes wrong (no renderer, no ffmpeg, ...) becomes one warning with its
    cause and remedy, and nothing is written. MuJoCo without a GPU needs up to half a second for a frame.

    A MuJoCo environment is shown by the camera of its model that follows the robot (`tracking_camera`), if there is one and
    no camera was chosen, by `camera_name`, `camera_id` or `default_camera_config`, when the environment was made.

    Args:
        policy: As in `evaluate`.
        env: An id, a stored spec, or a single Env made with render_mode="rgb_array".
        path: The file to write; must end in .mp4. Missing folders are made, an existing file is replaced.
        seed: Seed of the first reset; the next ones have seed + 1, ... None: no seeds.
        max_steps: Where to stop, in steps of all episodes together.
        min_seconds: How long the video plays at least, unless it reaches `max_steps`: episodes are added until then.
        deterministic: As in `evaluate`: None acts as the policy is meant to.
        fps: Frames per second, one frame per step. Default: the speed of the simulation (`metadata["render_fps"]`) with about
            30 frames per second, for which steps are left out (of Hopper's 125 per second, every fourth is kept).
        env_kwargs: Keyword arguments of the environment; for an id or a stored spec only.
        verbose: 1 shows a progress bar while frames are rendered, 0 does not. None: the attribute `verbose` of the policy, 1
            if it has none.

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
            every = 1 if fps else max(1, round(rate / 30))
            least = math.ceil(min_seconds * rate / every)
            cleanup.enter_context(following_the_robot(single))
            frames = _frames(policy, single, seed, max_steps, least, deterministic, every)
            if verbose or (verbose is None and getattr(policy, "verbose", 1)):
                frames = _with_progress(frames, _expected_frames(single, max_steps, least, every))
            _write_mp4(part, frames, rate / every)
            os.replace(part, path)
    except Exception as error:
        warnings.warn(f"no video at {path}: {one_line(error)} -- {_video_cure(error)}", stacklevel=2)
        return None
    return path


def tracking_camera(model: Any) -> int | None:
    """The camera that keeps a robot in the picture.

    Args:
        model: An MjModel.

    Returns:
        The number of the model's first camera that moves with a body, else of the first one that turns towards a body; None if
        all its cameras stand still.
    """
    import mujoco

    modes, mode = [int(number) for number in model.cam_mode], mujoco.mjtCamLight
    moves = (mode.mjCAMLIGHT_TRACK, mode.mjCAMLIGHT_TRACKCOM)
    turns = (mode.mjCAMLIGHT_TARGETBODY, mode.mjCAMLIGHT_TARGETBODYCOM)
    for kinds in (moves, turns):
        for camera, number in enumerate(modes):
            if number in [int(kind) for kind in kinds]:
                return camera
    return None


@contextmanager
def following_the_robot(env: Any) -> Iterator[None]:
    """Let a MuJoCo environment render by its `tracking_camera`, if it has one and no other camera was chosen for it.

    Args:
        env: Any environment; others than MuJoCo's stay as they are.
    """
    base = env.unwrapped
    inner = [base, *(value for value in vars(base).values() if isinstance(value, gym.Env))]  # in a maze, the ant's
    owner = next((each for each in inner if getattr(each, "mujoco_renderer", None) is not None), None)
    chosen = getattr(env.spec, "kwargs", {}).keys() & {"camera_name", "camera_id", "default_camera_config"}
    renderer = None if owner is None or chosen else owner.mujoco_renderer
    before = getattr(renderer, "camera_id", None)
    camera = tracking_camera(renderer.model) if renderer is not None and before == -1 else None
    if renderer is None or camera is None:
        yield
        return
    renderer.camera_id = camera
    try:
        yield
    finally:
        renderer.camera_id = before


def _frames(
    policy: Policy, env: Any, seed: int | None, max_steps: int, least: int, deterministic: bool, every: int
) -> Iterator[np.ndarray]:
    """At least `least` frames, of whole episodes: after each reset, after each `every`-th step, and after the last step."""
    steps = count = 0
    for episode in itertools.count():
        obs, state, first = env.reset(seed=None if seed is None else seed + episode)[0], None, True
        yield env.render()
        count, over = count + 1, False
        for t in itertools.count(1):
            batch, start = stack([obs]), np.array([first])
            actions, state = policy.predict(batch, state=state, episode_start=start, deterministic=deterministic)
            obs, _, terminated, truncated, _ = env.step(check_actions(actions, 1, env.action_space)[0])
            steps, first = steps + 1, False
            over = terminated or truncated or steps >= max_steps
            if over or t % every == 0:
                yield env.render()
                count += 1
            if over:
                break
        if steps >= max_steps or count >= least:
            return


def _expected_frames(env: Any, max_steps: int, least: int, every: int) -> int | None:
    """How many frames `_frames` makes if no episode ends before its time limit; None if there is no limit."""
    limit = getattr(env.spec, "max_episode_steps", None)
    if limit is None:
        return None
    limit = min(limit, max_steps)
    of_one = 1 + math.ceil(limit / every)
    episodes = max(1, min(math.ceil(least / of_one), math.ceil(max_steps / limit)))
    return episodes * of_one


def _with_progress(frames: Iterator[np.ndarray], expected: int | None) -> Iterator[np.ndarray]:
    """The same frames, with a progress bar on stderr; in a log file, a line every ten seconds."""
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 10.0
    yield from tqdm(frames, "rendering", expected, leave=False, file=sys.stderr, mininterval=pause, unit=" frames")


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
        return "pip install moviepy imageio-ffmpeg"
    if "opengl" in text or "egl" in text or "glfw" in text or "mujoco" in text:
        return "MuJoCo needs a renderer: on Linux without a screen, install libegl1 and PyOpenGL, then set MUJOCO_GL=egl"
    return "the evaluation itself is not affected"
