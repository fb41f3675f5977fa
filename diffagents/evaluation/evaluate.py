"""Anything with SB3's `predict`, measured: returns, success, the D4RL scale, intervals, a video.

The raw return always comes first; a score on the D4RL scale stands beside it, never instead of it.
"""

import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from diffagents.environments import env_id_of, is_sb3, make_env, one_line
from diffagents.rollouts import SB3, Policy, Single, Vector, check_actions, check_spaces, play, stack

D4RL_REFERENCE: dict[str, tuple[float, float]] = {
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    "AntMaze": (0.0, 1.0),  # every size; see `d4rl_score`
    "AdroitHandPen": (96.262799, 3076.8331017826877),
    "AdroitHandDoor": (-56.512833, 2880.5693087298737),
    "AdroitHandHammer": (-274.856578, 12794.134825156867),
    "AdroitHandRelocate": (-6.425911, 4233.877797728884),
    "FrankaKitchen": (0.0, 4.0),
}
"""Return of a random and of an expert policy, by environment name without version: the figures of D4RL's `infos.py`
(Farama Foundation, Apache-2.0). They belong to D4RL's mujoco-py environments, whose dynamics and observations differ
from Gymnasium's: a familiar scale to read returns on, not a number to set beside published tables.
PointMaze has none here: its reward and its end of episode are not those of D4RL's maze2d."""


def d4rl_score(env_id: str | None, returns: Sequence[float]) -> float | None:
    """Mean of 100 (return - random) / (expert - random) with `D4RL_REFERENCE`, or None where there is no reference.

    `returns` are raw, undiscounted episode returns. An AntMaze episode counts 1 if its return is positive, else 0:
    D4RL's episode ended at the goal, Gymnasium-Robotics' may go on and collect more. Other reward kinds (`...Dense`,
    `...Sparse` ids) have no reference.
    """
    scores = _scores(env_id, returns)
    return None if scores is None else float(scores.mean())


def d4rl_score_of_mean(env_id: str | None, mean_return: float) -> float | None:
    """`d4rl_score` where only the mean of the returns is at hand; of AntMaze right where each is 0 or 1, as by its rules."""
    name = _reference_name(env_id)
    return None if name is None else float(_scaled(name, np.float64(mean_return)))


def _reference_name(env_id: str | None) -> str | None:
    name = (env_id or "").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    base, dash, version = name.rpartition("-v")
    name = base if dash and version.isdigit() else name
    if name.startswith("AntMaze") and not name.endswith("Dense"):
        return "AntMaze"
    return name if name in D4RL_REFERENCE else None


def _scores(env_id: str | None, returns: Sequence[float]) -> np.ndarray | None:
    name = _reference_name(env_id)
    if name is None:
        return None
    values = np.asarray(returns, np.float64)
    if name == "AntMaze":
        values = (values > 0).astype(np.float64)
    return _scaled(name, values)


def _scaled(name: str, values: Any) -> Any:
    low, high = D4RL_REFERENCE[name]
    return 100.0 * (values - low) / (high - low)


def bootstrap(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; the same values give the same interval."""
    array = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(array), (2000, len(array)))
    low, high = np.percentile(array[picks].mean(axis=1), (2.5, 97.5))
    return min(float(low), float(array.mean())), max(float(high), float(array.mean()))


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. `print` it for one line; `to_json` for a file.

    returns, lengths: raw return and number of steps of each episode. successes: whether it succeeded at any step, None
    if the environment never says. env_id: None where it has no id. deterministic: what `predict` was asked for.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    successes: tuple[bool, ...] | None = None
    env_id: str | None = None
    seed: int | None = 0
    deterministic: bool = True

    @property
    def mean_return(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """Spread over episodes (divided by n, as SB3's `evaluate_policy` gives it)."""
        return float(np.std(self.returns))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `mean_return`: of the episodes only; it knows nothing of other training seeds."""
        return bootstrap(self.returns)

    @property
    def mean_length(self) -> float:
        return float(np.mean(self.lengths))

    @property
    def success_rate(self) -> float | None:
        """Share of episodes in [0, 1] that succeeded at any step."""
        return None if self.successes is None else float(np.mean(self.successes))

    @property
    def score(self) -> float | None:
        """`d4rl_score` of the returns: 0 is D4RL's random policy, 100 its expert."""
        return d4rl_score(self.env_id, self.returns)

    @property
    def score_interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of `score`."""
        scores = _scores(self.env_id, self.returns)
        return None if scores is None else bootstrap(scores)

    @property
    def score_reference(self) -> tuple[str, float, float] | None:
        """The table and row behind `score`, its return at 0 and its return at 100."""
        name = _reference_name(self.env_id)
        return None if name is None else (f"D4RL {name} (mujoco-py)", *D4RL_REFERENCE[name])

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain JSON types."""
        derived = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        values = {"n_episodes": len(self.returns)} | {name: getattr(self, name) for name in derived} | vars(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __str__(self) -> str:
        low, high = self.interval
        n = len(self.returns)
        parts = [
            f"return {self.mean_return:.2f} ± {self.std_return:.2f} ({n} episode{'s' * (n != 1)}; "
            f"95 % interval of the mean {low:.2f} to {high:.2f})"
        ]
        if self.score is not None and self.score_interval is not None:
            parts.append(f"D4RL scale {self.score:.1f} [{self.score_interval[0]:.1f}, {self.score_interval[1]:.1f}]")
        if self.success_rate is not None:
            parts.append(f"success {100 * self.success_rate:.0f} %")
        return f"{self.env_id or 'environment'}: " + "; ".join(parts)


def evaluate(
    policy: Policy,
    env: Any,
    n_episodes: int = 10,
    *,
    seed: int | None = 0,
    deterministic: bool = True,
    n_envs: int = 1,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Plays `n_episodes` whole episodes and reports them.

    policy: has `predict(obs, state, episode_start, deterministic) -> (actions, state)` on batches of observations.
    env: what `make_env` takes; `n_envs` and `env_kwargs` are for an id or a stored spec. What was made here is closed
    here; an environment that was passed in stays open.

    *Which episodes.* Each of n sub-environments plays a number of episodes fixed beforehand (the numbers differ by one
    at most) and the rest is ignored: taking the first n to finish would favour short episodes. Results are ordered by
    round, then by sub-environment.
    *Seeds.* Made from an id, or a single Env: episode k is reset with seed + k, whatever n_envs. An SB3 VecEnv or a
    VectorEnv: sub-environment i is reset with seed + i at first, then goes on by itself. The same call gives the same
    numbers if the policy depends on nothing else; `deterministic=False` draws from the policy's own generator.
    *Return.* `info["episode"]["r"]` where a Monitor or RecordEpisodeStatistics put it (what wraps it may change the
    reward that is seen), VecNormalize's original reward, else the sum of rewards.
    *Success.* An episode succeeded if `info["is_success"]` or `info["success"]` was true at any of its steps; None if
    neither ever appears.

    Raises ValueError for n_episodes < 1, spaces other than the policy's, actions of a wrong shape or with NaN, rewards
    with NaN, an episode that does not end; and what `make_env` raises.
    """
    if n_episodes < 1 or n_envs < 1:
        raise ValueError(f"n_episodes and n_envs must be at least 1, not {n_episodes} and {n_envs}")
    if not callable(getattr(policy, "predict", None)):
        raise TypeError(f"the policy has no predict(obs, ...): got {type(policy).__name__}")
    by_name = isinstance(env, str | EnvSpec)
    if not by_name and n_envs != 1:
        raise ValueError(f"n_envs={n_envs} is for an environment id; make the environment passed with as many instead")
    with ExitStack() as cleanup:
        world: Single | Vector | SB3
        if by_name:
            envs = []
            for _ in range(min(n_envs, n_episodes)):
                envs.append(make_env(env, **(env_kwargs or {})))
                cleanup.callback(envs[-1].close)
            world = Single(envs)
        else:
            env = make_env(env, **(env_kwargs or {}))
            if is_sb3(env):
                world = SB3(env, cleanup)
            else:
                world = Vector(env) if isinstance(env, gym.vector.VectorEnv) else Single([env])
        check_spaces(policy, world.observation_space, world.action_space)
        episodes = play(policy, world, n_episodes, seed, deterministic)
        env_id = env_id_of(envs[0] if by_name else env)
    said = [success for _, _, success in episodes]
    return Evaluation(
        returns=tuple(ret for ret, _, _ in episodes),
        lengths=tuple(length for _, length, _ in episodes),
        successes=None if all(success is None for success in said) else tuple(map(bool, said)),
        env_id=env_id,
        seed=seed,
        deterministic=deterministic,
    )


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
