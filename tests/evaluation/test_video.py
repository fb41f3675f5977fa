"""Videos: the camera follows the robot, short episodes are followed by more, and rendering shows its progress."""

import ctypes.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import diffagents
from diffagents.evaluation import video
from diffagents.evaluation.video import following_the_robot, record_video, tracking_camera

ROOT = Path(__file__).resolve().parents[2]
BODIES = '<body><geom size="1"/>{}</body><body pos="3 0 0"><geom size="1"/>{}</body>'


class Clip(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of 8 steps, at 5 per second. A frame shows the seed of its reset and the step in its brightness."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012
    observation_space, action_space = spaces.Box(-1.0, 1.0, (1,)), spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, render_mode: str = "rgb_array") -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.seeded, self.t = seed or 0, 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.t += 1
        return np.zeros(1, np.float32), 0.0, self.t == 8, False, {}

    def render(self) -> Any:
        return np.full((20, 20, 3), min(80 * self.seeded + 8 * self.t, 255), np.uint8)


gym.register("diffagents/Clip-v0", entry_point=Clip, max_episode_steps=8, disable_env_checker=True)


class Still:
    def predict(self, obs: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        return np.zeros((1, 1), np.float32), None


def frames_of(path: Path | None) -> list[np.ndarray]:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg (the video extra) is not installed")
    assert path is not None
    reader = ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


# ---- which camera, without rendering ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_the_world", "of_the_first", "of_the_second", "expected"),
    [
        ("", "", "", None),
        ('<camera name="track"/>', '<camera mode="fixed"/>', "", None),  # a name says nothing, nor does it move by itself
        ("<camera/>", "", '<camera name="any" mode="trackcom"/>', 1),
        ("<camera/>", "<camera/>", '<camera mode="track"/>', 2),
        ('<camera mode="targetbody" target="b"/>', '<camera mode="track"/>', "", 1),  # one that only turns comes second
        ('<camera/><camera mode="targetbodycom" target="b"/>', "", "", 1),
    ],
)
def test_the_model_says_which_camera_follows(
    of_the_world: str, of_the_first: str, of_the_second: str, expected: int | None
) -> None:
    mujoco = pytest.importorskip("mujoco", reason="MuJoCo (the mujoco extra) is not installed")
    bodies = BODIES.format(of_the_first, of_the_second).replace("<body>", '<body name="b">', 1)
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{of_the_world}{bodies}</worldbody></mujoco>")
    assert tracking_camera(model) == expected


@pytest.mark.parametrize("name", ["Hopper", "HalfCheetah", "Walker2d", "Ant", "Reacher", "InvertedPendulum"])
def test_locomotion_is_followed_and_what_stays_in_its_place_is_not(name: str) -> None:
    pytest.importorskip("mujoco", reason="MuJoCo (the mujoco extra) is not installed")
    env = gym.make(f"{name}-v5")
    renderer = env.unwrapped.mujoco_renderer  # type: ignore[attr-defined]
    renderer.camera_id = -1  # older Gymnasium finds some cameras itself
    with following_the_robot(env):
        shown = renderer.camera_id
    assert (shown >= 0) == (name not in ("Reacher", "InvertedPendulum")) and renderer.camera_id == -1
    if shown >= 0:
        assert "TRACK" in str(_mode(renderer.model.cam_mode[shown]))
    env.close()


def _mode(number: int) -> Any:
    import mujoco

    return mujoco.mjtCamLight(int(number))


@pytest.mark.parametrize("chosen", [{"camera_name": "track"}, {"camera_id": -1}, {"default_camera_config": {"distance": 9.0}}])
def test_a_camera_that_was_chosen_stays(chosen: dict[str, Any]) -> None:
    pytest.importorskip("mujoco", reason="MuJoCo (the mujoco extra) is not installed")
    env = gym.make("Hopper-v5", **chosen)
    before = env.unwrapped.mujoco_renderer.camera_id  # type: ignore[attr-defined]
    with following_the_robot(env):
        assert env.unwrapped.mujoco_renderer.camera_id == before  # type: ignore[attr-defined]
    env.close()


def test_an_ant_in_a_maze_is_followed_and_other_environments_are_left_alone() -> None:
    with following_the_robot(Clip()):
        pass
    robotics = pytest.importorskip("gymnasium_robotics", reason="Gymnasium-Robotics (the robotics extra) is not installed")
    gym.register_envs(robotics)
    env = gym.make("AntMaze_UMaze-v5")
    renderer = env.unwrapped.ant_env.mujoco_renderer  # type: ignore[attr-defined]
    with following_the_robot(env):
        assert renderer.camera_id == tracking_camera(renderer.model) != -1
    env.close()


# ---- what is seen ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the renderer of this test is EGL, on Linux")
def test_the_robot_is_in_the_last_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cheetah of the zoo after 60 steps: it is far beyond what the fixed camera shows. It is orange; the floor is not."""
    for package in ("mujoco", "imageio_ffmpeg", "OpenGL"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    if os.environ.get("MUJOCO_GL") != "egl" or not ctypes.util.find_library("EGL"):
        pytest.skip("MuJoCo cannot render here: there is no libEGL, or MUJOCO_GL names something else")
    agent = diffagents.load(ROOT / "zoo" / "td3bc-halfcheetah-medium-expert-v0", device="cpu", verbose=0)

    env = gym.make("HalfCheetah-v5", render_mode="rgb_array", width=96, height=96)
    env.metadata = env.metadata | {"render_fps": 6000}  # of the steps one in 200 is rendered

    def orange(name: str) -> float:
        """The share of orange in the last frame."""
        frames = frames_of(record_video(agent, env, tmp_path / name, max_steps=60, min_seconds=0.0))
        assert len(frames) == 2 and env.unwrapped.data.qpos[0] > 10.0  # type: ignore[attr-defined]
        last = frames[-1].astype(int)
        return float((last[..., 0] > last[..., 2] + 40).mean())

    assert orange("followed.mp4") > 0.005
    monkeypatch.setattr(video, "tracking_camera", lambda model: None)
    assert orange("fixed.mp4") < 0.001
    env.close()


def test_a_short_episode_is_followed_by_others(tmp_path: Path) -> None:
    """Each from its own seed, until the video has played for three seconds; max_steps limits them all."""
    seen = frames_of(record_video(Still(), Clip(), tmp_path / "a.mp4", seed=1))
    assert len(seen) == 2 * 9  # 15 frames are three seconds
    brightness = [round(float(frame.mean())) for frame in seen]
    expected = [80 * seed + 8 * t for seed in (1, 2) for t in range(9)]
    assert max(abs(found - meant) for found, meant in zip(brightness, expected, strict=True)) <= 6
    assert len(frames_of(record_video(Still(), Clip(), tmp_path / "b.mp4", min_seconds=0.0))) == 9
    assert len(frames_of(record_video(Still(), Clip(), tmp_path / "c.mp4", max_steps=10))) == 9 + 3
    fast = Clip()
    fast.metadata = {"render_fps": 50}
    assert len(frames_of(record_video(Still(), fast, tmp_path / "d.mp4"))) == 15 * 5  # every other step, 25 per second


def test_progress_is_shown_unless_the_policy_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg (the video extra) is not installed")
    silent, loud = Still(), Still()
    silent.verbose, loud.verbose = 0, 1  # type: ignore[attr-defined]
    for policy, asked, shown in (
        (Still(), None, True),
        (loud, None, True),
        (silent, None, False),
        (silent, 1, True),
        (loud, 0, 0),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            record_video(policy, "diffagents/Clip-v0", tmp_path / "a.mp4", verbose=asked)
        captured = capsys.readouterr()
        assert ("rendering" in captured.err and "/18" in captured.err) == shown and not captured.out
