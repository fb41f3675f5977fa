"""What a user is told while waiting: compiling ends and says so, and announced and remaining times are those that come."""

import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_agents import NAMES, shallow, small
from toy import line_data

from diffagents import load_dataset, torch_internals
from diffagents.agent import Agent
from diffagents.training import callbacks, compiled, monitor, offline, online
from diffagents.training.plan import Plan
from diffagents.training.rollout import Rollout
from diffagents.training.state import training_tensors

DATA = line_data()
pytestmark = pytest.mark.filterwarnings("ignore:action bounds")


def same_to_the_bit(a: Agent, b: Agent) -> bool:
    ours, theirs = training_tensors(a), training_tensors(b)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], list[int]]:
    """Replace the compiler: it calls a function with the number of the call, then returns the traced graph as it is."""
    import torch._inductor

    def replace(before: Callable[[int], None]) -> list[int]:
        calls: list[int] = []

        def compile(graph: Any, inputs: Any) -> Any:
            calls.append(len(calls))
            before(calls[-1])
            return graph

        monkeypatch.setattr(torch._inductor, "compile", compile)
        return calls

    return replace


def for_ever(_: int) -> None:
    while True:
        time.sleep(0.01)


def compiling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "diffagents-compile"]


# ---- compiling -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("verbose", [0, 1])
def test_compiling_says_what_it_does_and_gives_up(
    verbose: int, compiler: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "COMPILE_LIMIT", 0.6)
    monkeypatch.setattr(compiled, "REPORT_EVERY", 0.2)
    monkeypatch.setattr(torch_internals, "trace", lambda function, inputs: None)  # it may take seconds on a busy machine
    calls = compiler(for_ever)
    with pytest.warns(
        UserWarning, match=r"compiling was given up, so this runs eagerly \(it took longer than 0:01\)"
    ) as caught:
        run = shallow("TD3BC", compile="compiled", verbose=verbose).learn(DATA)
    assert len([one for one in caught if "given up" in str(one.message)]) == 1 and calls == [0], "the rest was tried too"
    assert run.plan is not None and run.plan.modes == {"train": "eager"}
    assert same_to_the_bit(run, shallow("TD3BC", compile="eager").learn(DATA))
    lines = capsys.readouterr().out.splitlines()
    assert verbose or not lines
    said = [k for k, line in enumerate(lines) if line.startswith("train: compiling update 1 of 4, 0:0")]
    steps = [k for k, line in enumerate(lines) if line.lstrip().startswith("train ")]
    assert not verbose or (1 <= len(said) <= 3 and max(said) < min(steps)), lines
    assert not verbose or "train: compiling 4 updates, for at most 0:01" in lines
    end = time.monotonic() + 5
    while compiling_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not compiling_threads(), "it goes on for ever beside the training"


def test_compiling_waits_for_one_that_was_abandoned(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers have global state."""
    monkeypatch.setattr(compiled, "COMPILE_LIMIT", 0.3)
    release, running, most = threading.Event(), [0], [0]

    def wait(_: int) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        release.wait(20)  # a call that no exception interrupts
        running[0] -= 1

    compiler(wait)
    for _ in range(2):
        with pytest.warns(UserWarning, match="given up"):
            shallow("BC", compile="compiled").learn(DATA)
    release.set()
    assert most == [1]


def test_a_limit_that_ends_between_two_updates(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled later, in the middle of the training."""
    monkeypatch.setattr(compiled, "COMPILE_LIMIT", 1e9)
    now, real = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + now[0])
    calls = compiler(lambda _: now.__setitem__(0, 2e9))
    monkeypatch.setattr(threading.Event, "wait", _patient_wait)
    with pytest.warns(UserWarning, match="given up"):
        run = shallow("TD3BC", compile="compiled").learn(DATA)
    assert calls == [0] and run.plan is not None and run.plan.modes == {"train": "eager"}
    assert same_to_the_bit(run, shallow("TD3BC", compile="eager").learn(DATA))


_wait = threading.Event.wait


def _patient_wait(self: threading.Event, timeout: float | None = None) -> bool:
    return _wait(self, None if timeout == 0.05 else timeout)


def test_one_update_that_fails_makes_the_whole_stage_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the plan tells the truth, and a resumed run is the uninterrupted one."""
    import torch._inductor

    calls: list[int] = []

    def compile(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no")
        return lambda *given: [0 * tensor for tensor in graph(*given)]  # it would be seen if it were used

    monkeypatch.setattr(torch._inductor, "compile", compile)
    with pytest.warns(UserWarning, match="compiling failed"):
        run = shallow("TD3BC", compile="compiled").learn(DATA)
    assert run.plan is not None and run.plan.modes == {"train": "eager"} and len(calls) == 4
    assert same_to_the_bit(run, shallow("TD3BC", compile="eager").learn(DATA))


def test_ctrl_c_ends_compiling_and_the_run_can_be_resumed(compiler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(call: int) -> None:
        if call == 1:
            os.kill(os.getpid(), signal.SIGINT)
            for_ever(call)

    compiler(lambda _: None)
    whole = shallow("TD3BC", compile="compiled").learn(DATA)
    compiler(interrupt)
    run, started = shallow("TD3BC", compile="compiled", verbose=1), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run.learn(DATA)
    assert time.monotonic() - started < 60 and run.num_timesteps == 0
    assert run.plan is not None and run.plan.modes == {"train": "compiled"}
    said = capsys.readouterr().out
    assert f"interrupted ({run.plan.progress}); the agent can be saved, and learn(data, reset_num_timesteps=False) fin" in said
    assert run.plan.progress.startswith("train 0/")
    calls = compiler(lambda _: None)
    run.learn(DATA, reset_num_timesteps=False)
    assert len(calls) == 4 and same_to_the_bit(run, whole)


def test_the_rate_does_not_count_compiling(compiler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    compiler(lambda _: time.sleep(2.0))
    shallow("BC", compile="compiled", verbose=1, behavior_steps=12).learn(DATA, log_interval=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("behavior  "))
    assert float(line.split("  ")[-1].split("/s")[0].replace(",", "")) > 0.5, line


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), reason="no C++ compiler on this machine"
)
@pytest.mark.slow
def test_a_real_compiler_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(compiled, "COMPILE_LIMIT", 0.5)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="given up"):
        run = shallow("TD3BC", compile="compiled").learn(DATA)
    assert same_to_the_bit(run, shallow("TD3BC", compile="eager").learn(DATA))
    for thread in compiling_threads():
        thread.join(60)
    assert not compiling_threads()


# ---- the announced time ----------------------------------------------------------------------------------------------
def announced(seconds: dict[str, float], compiling: dict[str, float] | None = None, **settings: Any) -> Any:
    """An agent with a plan of 100 steps for each of SRPO's stages, announced."""
    agent = small("SRPO", verbose=1, **settings).learn(DATA, callback=lambda *_: False)
    plan = Plan(dict.fromkeys(agent.STAGE_SHARES, 100))
    offline.choose_modes(agent, plan, seconds, compiling)
    offline.announce(agent, plan, seconds, compiling)
    return agent, plan


def test_compiling_and_training_are_announced_apart(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"critic": 100.0, "behavior": 100.0, "policy": 1000.0}
    _, plan = announced(seconds, {"critic": 50.0, "behavior": 50.0, "policy": 70.0})
    assert plan.modes == {"critic": "eager", "behavior": "eager", "policy": "compiled"}
    then = 200 + 1000 * offline.COMPILING["cpu"][1]
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith(
        f"about {monitor.clock(70 + then)}: 1:10 to compile policy, then {monitor.clock(then)} of training "
        "(without compiling: 20:00)"
    )


def test_what_runs_eagerly_is_announced_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    announced({"critic": 60.0, "behavior": 60.0, "policy": 1000.0}, compile="eager")
    assert capsys.readouterr().out.splitlines()[-1].endswith("; about 18:40")


def test_a_busy_machine_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Its load may end before the training does, and with it the estimate holds no longer."""
    agent, plan = announced({"policy": 600.0}, compile="eager")
    for slowness, told in (
        (1.4, "; about 10:00"),
        (4.0, "; about 10:00, as busy as this machine is now; 2:30 if no other program ran"),
    ):
        offline.announce(agent, plan, {"policy": 600.0}, None, slowness)
        assert capsys.readouterr().out.splitlines()[-1].endswith(told)


def test_auto_compiles_nothing_that_would_be_given_up() -> None:
    seconds = {"policy": 1e6}
    _, plan = announced(seconds, {"policy": compiled.COMPILE_LIMIT + 1})
    assert plan.modes["policy"] == "eager"
    assert announced(seconds, {"policy": compiled.COMPILE_LIMIT - 1})[1].modes["policy"] == "compiled"


@pytest.mark.parametrize(
    ("preset", "shorter"),
    [
        ("fast", "a total_timesteps (--steps) of less than 300 shortens all stages."),
        ("paper", "preset='fast' (--preset fast) has a plan of minutes for every dataset."),
        (None, "preset='fast' (--preset fast) has a plan of minutes for every dataset."),
    ],
)
def test_a_long_plan_names_the_shorter_way(preset: Any, shorter: str, capsys: pytest.CaptureFixture[str]) -> None:
    agent, plan = announced({"policy": 1801.0}, compile="eager", preset=preset)
    assert capsys.readouterr().out.splitlines()[-1] == f"That is more than 30 minutes on this machine; {shorter}"
    plan.done["policy"] = 1  # a resumed plan has its length
    offline.announce(agent, plan, {"policy": 1801.0})
    assert "minutes" not in capsys.readouterr().out
    announced({"policy": 1799.0}, compile="eager", preset=preset)
    assert "more than 30 minutes" not in capsys.readouterr().out


def test_the_time_of_compiling_follows_the_operations_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = small("SRPO", compile="eager").learn(DATA)
    agent.compile = "compiled"
    assert agent.reward_transform is not None
    sampler = load_dataset(DATA, verbose=0).sampler("cpu", agent.reward_transform, agent.obs_normalizer)
    plan = Plan(dict.fromkeys(agent.STAGE_SHARES, 100))
    before = {name: value.clone() for name, value in training_tensors(agent).items()}
    clock = {"wall": 0.0, "cpu": 0.0}

    def tick(name: str, by: float) -> float:
        clock[name] += by
        return clock[name]

    def seconds(slowness: float) -> dict[str, float]:
        monkeypatch.setattr(time, "thread_time", lambda: tick("cpu", 0.2))
        # As often as thread_time: by one step each in the whole call.
        monkeypatch.setattr(time, "perf_counter", lambda: slowness * clock["cpu"])
        return offline.estimate_compiling(agent, plan, sampler, {})

    quiet = seconds(1.0)
    assert all(torch.equal(value, training_tensors(agent)[name]) for name, value in before.items())
    assert quiet.keys() == set(agent.STAGE_SHARES)
    n_updates = 4
    assert offline.COMPILING_BEGINS + n_updates * 2 < sum(quiet.values()) < offline.COMPILING_BEGINS + n_updates * 30
    busy = seconds(3.0)
    assert sum(busy.values()) == pytest.approx(3 * sum(quiet.values()), rel=0.2)
    assert sum(seconds(1e6).values()) == pytest.approx(offline.SLOWEST * sum(quiet.values()), rel=0.01)
    agent.compile = "eager"
    assert seconds(1.0) == {}
    agent.compile = "auto"
    assert offline.estimate_compiling(agent, plan, sampler, {"policy": 1e4, "critic": 1.0}).keys() == {"policy"}


@pytest.mark.parametrize("name", NAMES)
def test_the_operations_of_every_algorithm_can_be_counted(name: str) -> None:
    agent = shallow(name, compile="eager").learn(DATA, callback=lambda *_: False)
    assert agent.reward_transform is not None
    sampler = load_dataset(DATA, verbose=0).sampler("cpu", agent.reward_transform, agent.obs_normalizer)
    plan, agent.compile = Plan(dict.fromkeys(agent.STAGE_SHARES, 100)), "compiled"
    found = offline.estimate_compiling(agent, plan, sampler, {})
    with_losses = [stage.name for stage in agent.stages(plan) if any(update.loss for update in stage.updates)]
    assert all(found[stage] > 20 * offline.COMPILING_OPERATION for stage in with_losses)


# ---- lines and the progress bar --------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = [
    "   train     1,500/1,500",
    "critic_loss 0.02247",
    "q -1.213",
    "policy_loss 0.02952",
    "bc_loss 0.02975",
    "132/s, 0:00 left",
]


def test_lines_fit_the_terminal_and_are_whole_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monitor.say(METRICS, "  ")
    monitor.say("plan: " + "word " * 40 + "end")
    lines = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 5 and max(map(len, lines)) <= 80
    assert lines[0] == "  ".join(METRICS[:4]) and lines[1] == " " * 11 + "  ".join(METRICS[4:])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monitor.say(METRICS, "  ")
    assert sys.stdout.getvalue() == "  ".join(METRICS) + "\n"  # type: ignore[attr-defined]


def test_the_time_left_is_that_of_the_present_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    left = callbacks.TimeLeft(1000)
    for _ in range(100):  # 100 a second
        now[0] += 0.01
        left.add(1, "random actions", False)
    assert str(left) == "-:--:--"
    for _ in range(20):  # 10 a second
        now[0] += 0.1
        left.add(1, "updates")
    assert left.seconds == pytest.approx((1000 - 118) * 0.1, rel=0.03) and str(left) in ("0:01:28", "0:01:29")
    for _ in range(400):  # 5 a second, for longer than the window
        now[0] += 0.2
        left.add(1, "updates")
    assert left.seconds == pytest.approx(480 * 0.2, rel=0.01)
    left.add(1, "the next stage")
    assert str(left) == "-:--:--"


def test_the_bar_promises_nothing_before_the_first_update_online(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, Any] = {}

    class Watched(callbacks.TimeLeft):
        def add(self, steps: int, phase: Any, is_representative: bool = True) -> None:
            super().add(steps, phase, is_representative)
            seen[self.done] = (phase, is_representative)

    monkeypatch.setattr(callbacks, "TimeLeft", Watched)
    small("TD3BC").learn_online(30, "Pendulum-v1", learning_starts=20, progress_bar=True)
    assert seen[20] == (False, False) and seen[22] == (True, True)
    small("TD3BC").learn(DATA, progress_bar=True)
    assert seen[12] == ("train", True)


# ---- online ----------------------------------------------------------------------------------------------------------
def test_online_lines_promise_nothing_before_the_first_update(capsys: pytest.CaptureFixture[str]) -> None:
    small("TD3BC", verbose=1).learn_online(450, "Pendulum-v1", learning_starts=410, log_interval=40)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  online")]
    unknown = ["time left unknown before the first update" in line for line in lines]
    assert unknown == [True] * (len(lines) - 2) + [False] * 2 and len(lines) > 3, lines
    assert all(line.endswith(" left") for line in lines[-2:])


def finished(returns: list[float], n_before: int, random: bool = False) -> str:
    rollout: Any = Rollout.__new__(Rollout)
    rollout.all_returns, rollout.n_before, rollout.run = (
        returns,
        n_before,
        online.OnlineRun(10, online.OnlineSettings(), 5, random),
    )
    return online.before_and_after(rollout)


def test_the_return_before_is_compared_with_that_after() -> None:
    returns = [1.0] * 5 + [3.0] * 5 + [100.0] * 30
    start = "online: mean return while exploring, before: "
    assert (
        finished(returns, 5)
        == f"{start}1.00 ± 0.00 (first 5 of 40 episodes, before any update); after: 100.00 ± 0.00 (last 10)"
    )
    assert "before: 2.00 ± 0.33 (first 10 of 40 episodes, with updates already)" in finished(returns, 0)
    assert "by random actions" in finished(returns, 12, True)
    assert "before: 1.00 (first 1 of 3 episodes, before any update); after: 5.00 (last 1)" in finished([1.0, 9.0, 5.0], 2)
    assert finished([1.0], 1).endswith(
        "1 finished episode(s) are too few to compare the return before the run with that after it"
    )


@pytest.mark.parametrize("verbose", [0, 1])
def test_a_run_ends_with_the_comparison(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    small("TD3BC", verbose=verbose).learn_online(830, "Pendulum-v1", learning_starts=800)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [] if not verbose else "(first 2 of 4 episodes, by random actions); after: -" in lines[-1], lines
