"""How fast everything is, compared side by side: training, predict, batches, eight seeds as one, start-up, profile, log steps.

  python zoo/benchmarks/speed.py [--only training predict] [--algorithms SRPO DiffusionQL] [--threads 2] [--out FILE.json]

Networks have the papers' sizes for Hopper (S 11, A 3), with batch 256 and random data. Whatever is compared runs interleaved,
`--repeats` short bursts of each, so that a noisy machine disturbs all alike: times are medians of the bursts, +- is half their
range in percent, and a ratio is the median of the bursts' ratios. "straightforward" is the plain eager PyTorch of
straightforward.py. Compiling takes 10 to 100 s per update, once. --out is written after every section, with the machine and the
commit. For a GPU use speed_gpu.py. What `predict` adds to the bare network of a batch is measured with one thread:

  OMP_NUM_THREADS=1 python zoo/benchmarks/speed.py --only batches --threads 1 --repeats 20 --seconds 0.1
"""

import argparse
import io
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from typing import Any
from unittest import mock

import numpy as np
import straightforward
import torch
from speed_parts import (
    ACT_DIM,
    FIRST,
    HERE,
    OBS_DIM,
    Bursts,
    Call,
    cycle_length,
    fastest,
    interleave,
    latencies,
    machine,
    make_agent,
    milliseconds,
    numbers_of,
    plain_stepper,
    ratio,
    show,
    stage_sampler,
    stepper,
    synthetic_data,
)

import diffagents
from diffagents.data.transitions import Transitions
from diffagents.training import offline, session

MEMBERS = 8  # trained together


# ---- 1. training -----------------------------------------------------------------------------------------------------
def measure_training(args: argparse.Namespace, data: Transitions) -> list[dict[str, Any]]:
    """Milliseconds per update by stage and mode, and the share of the measured rate of matrix products.

    An update's arithmetic is that of its eager matrix products, forward and backward; the rates are those of a 256 x 256
    x 256 product and of a large one, interleaved with the updates.
    """
    from torch.utils.flop_counter import FlopCounterMode

    small, large = (torch.randn(n, n, device=args.device) for n in (256, 2048 if args.device == "cpu" else 8192))
    matmuls: dict[str, Call] = {"matmul 256": lambda: small @ small, "matmul large": lambda: large @ large}
    sizes = {"matmul 256": 256, "matmul large": len(large)}
    rows, modes = [], args.modes
    show("ms per update", "plain", *modes, *(f"x {mode}" for mode in modes), "updates/s", "of matmul 256", "of a large")
    for name in args.algorithms:
        agent = make_agent(name, data, args.device)
        for stage in agent.stages():
            sampler, n = stage_sampler(agent, stage, data), cycle_length(stage)
            calls = {"straightforward": plain_stepper(name, stage, sampler, args.device, n)}
            calls |= {mode: stepper(offline.make_runner(agent, stage, sampler, mode), n) for mode in modes}
            with FlopCounterMode(display=False) as counter:
                calls["eager"]()
            flops = counter.get_total_flops() / n
            with session.matmul_precision(agent):
                found = interleave(calls | matmuls, args)
            rate = {key: 2 * size**3 / statistics.median(found[key]) for key, size in sizes.items()}
            best = min(modes, key=lambda mode: statistics.median(found[mode]))
            updates = n / statistics.median(found[best])
            row: dict[str, Any] = {"algorithm": name, "stage": stage.name, "updates_in_a_cycle": n}
            row |= {mode: milliseconds(found[mode], n) for mode in calls}
            row["faster"] = {mode: ratio(found["straightforward"], found[mode]) for mode in modes}
            row |= {"best": best, "updates_per_second": updates, "flops": flops, "matmul_rates": rate}
            row["share"] = {key: flops * updates / rate[key] for key in rate}
            rows.append(row)
            cells = [f"{row[mode]['ms']:.2f} +-{row[mode]['spread_percent']:.0f}%" for mode in calls]
            cells += [f"{row['faster'][mode]:.2f}" for mode in modes] + [f"{updates:.0f}"]
            show(f"{name} {stage.name}", *cells, *(f"{100 * share:.0f}%" for share in row["share"].values()))
    return rows


# ---- 2. predict ------------------------------------------------------------------------------------------------------
def measure_predict(args: argparse.Namespace, data: Transitions) -> list[dict[str, Any]]:
    """Microseconds per call for 1 and 64 observations, compared with SB3's TD3, the bare network and plain Diffusion-QL."""
    from stable_baselines3 import TD3

    from diffagents.envs.vec_env import stub_env

    many = np.random.default_rng(1).standard_normal((64, OBS_DIM), np.float32)
    observations, tensor = {1: many[0], 64: many}, torch.from_numpy(many)
    td3 = TD3("MlpPolicy", stub_env(data.spec), policy_kwargs={"net_arch": [256, 256]}, buffer_size=1, device="cpu")
    bare, plain_ql = straightforward.PlainMLPPolicy(OBS_DIM, ACT_DIM), straightforward.PlainDiffusionQL(OBS_DIM, ACT_DIM)
    references: dict[str, Call] = {
        "SB3 TD3, 1": lambda: td3.predict(observations[1], deterministic=True),
        "SB3 TD3, 64": lambda: td3.predict(many, deterministic=True),
        "bare network, 1": lambda: bare.predict(tensor[:1]),
        "bare network, 64": lambda: bare.predict(tensor),
        "plain Diffusion-QL, 1": lambda: plain_ql.predict(observations[1]),
    }
    results = []
    show("microseconds of predict", "p50", "p99", "calls", "x SB3 TD3", "x bare network", "x plain QL")
    for name in args.algorithms:
        eager, fast = make_agent(name, data), make_agent(name, data)
        calls = dict(references)
        kinds = (
            {"random": False, "deterministic": True}
            if eager.draw_act(1, False, eager.config, eager.generator)
            else {"any": True}
        )
        for (kind, fixed), (size, obs) in itertools.product(kinds.items(), observations.items()):

            def predict(agent: Any, obs: np.ndarray = obs, fixed: bool = fixed) -> Call:
                return lambda: agent.predict(obs, deterministic=fixed)

            calls[f"eager {kind}, {size}"] = predict(eager)
            if (
                size == 1 and eager.point_policy(fixed) is None
            ) or name == "DiffusionQL":  # otherwise numpy runs it, which is faster
                print(f"  compiling {name}, {kind}, {size} ...", flush=True)
                fast.compile_policy(size, fixed)
                calls[f"compiled {kind}, {size}"] = predict(fast)
        found = latencies(calls, args)
        for key, row in found.items():
            size = key.rpartition(" ")[2]
            row["times_sb3"] = found[f"SB3 TD3, {size}"]["p50"] / row["p50"]
            row["times_bare"] = found[f"bare network, {size}"]["p50"] / row["p50"]
            ratios = [f"{row['times_sb3']:.3g}", f"{row['times_bare']:.3g}"]
            if size == "1":
                row["times_plain_ql"] = found["plain Diffusion-QL, 1"]["p50"] / row["p50"]
                ratios.append(f"{row['times_plain_ql']:.3g}")
            show(f"{name} {key}", f"{row['p50']:.1f}", f"{row['p99']:.1f}", row["n"], *ratios)
        results.append({"algorithm": name, "microseconds": found})
    return results


# ---- 3. predict of batches ---------------------------------------------------------------------------------------------
TASKS = {"hopper": (11, 3), "halfcheetah": (17, 6)}  # numbers of an observation and of an action


def bare_networks(policy: Any, obs: np.ndarray) -> dict[str, Call]:
    """The products, biases, ReLUs and tanh of a policy and nothing else, in torch and in the fastest numpy that we know."""
    layers = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in list(policy.net)[::2]]
    (last, last_bias), tensor = layers.pop(), torch.from_numpy(obs)
    hidden = [(weight, bias, np.zeros_like(bias)) for weight, bias in layers]

    def in_torch() -> torch.Tensor:
        with torch.inference_mode():
            return policy(tensor)

    def in_numpy() -> np.ndarray:
        h = obs
        for weight, bias, zeros in hidden:
            h = h.dot(weight)
            h += bias
            np.maximum(h, zeros, out=h)
        h = h.dot(last)
        h += last_bias
        return np.tanh(h, out=h)

    return {"torch": in_torch, "numpy": in_numpy}


def measure_batches(args: argparse.Namespace, data: Transitions) -> list[dict[str, Any]]:
    """Microseconds of `predict` for batches, compared with the bare network in torch or numpy, whichever is faster.

    Of the algorithms that act by one network, with a normaliser, for float64 observations as Gymnasium returns them. The bare
    network gets normalised float32 observations. The time of a burst is that of its fastest call, which no other process
    interrupts.
    """
    rows = []
    show("microseconds", "predict", "torch", "numpy", "ratio")
    for (task, sizes), name in itertools.product(TASKS.items(), args.algorithms):
        agent = make_agent(name, synthetic_data(1000, *sizes), normalize_obs=True)
        policy = agent.point_policy(True)
        if policy is None:
            continue
        for n in (8, 64, 256, 1024):
            obs = np.random.default_rng(1).standard_normal((n, sizes[0]))

            def predict(agent: Any = agent, obs: np.ndarray = obs) -> np.ndarray:
                return agent.predict(obs, deterministic=True)[0]

            found = fastest({"predict": predict, **bare_networks(policy, obs.astype(np.float32))}, args)
            micros = {key: 1e6 * statistics.median(times) for key, times in found.items()}
            share = ratio(found["predict"], found[min(("torch", "numpy"), key=micros.__getitem__)])
            rows.append({"task": task, "algorithm": name, "batch": n, "microseconds": micros, "ratio": share})
            cells = [f"{value:.1f}" for value in micros.values()]
            show(f"{name}, {task}, batch of {n}", *cells, f"{share:.3f}")
    return rows


# ---- 4. many seeds ---------------------------------------------------------------------------------------------------
def measure_many(args: argparse.Namespace, data: Transitions) -> list[dict[str, Any]]:
    """The time of one step of eight agents as one, relative to eight steps of a single agent in the same mode."""
    from diffagents.experiments.learn_many import make_many_runner, stacked
    from diffagents.training.cuda_graph import GraphRunner

    rows = []
    show("ms per step", *(f"{what} {mode}" for mode in args.modes for what in ("one", "many", "share")))
    for name in [name for name in args.algorithms if name in ("SRPO", "DiffusionQL") or args.chosen]:
        single, *agents = (make_agent(name, data, args.device, seed) for seed in range(MEMBERS + 1))
        with stacked(agents) as tensors:
            for position, stage in enumerate(single.stages()):
                stages, n = [agent.stages()[position] for agent in agents], cycle_length(stage)
                own, calls = [stage_sampler(agent, one, data) for agent, one in zip(agents, stages, strict=True)], {}
                samplers = own if stage.prepare else own[:1] * MEMBERS  # as learn_many shares them
                for mode in args.modes:
                    many = make_many_runner(agents, position, samplers, tensors, mode)
                    calls[f"one {mode}"] = stepper(offline.make_runner(single, stage, own[0], mode), n)
                    calls[f"many {mode}"] = stepper(GraphRunner(many) if mode == "graph" else many, n)
                with session.matmul_precision(single):
                    found = interleave(calls, args)
                row: dict[str, Any] = {"algorithm": name, "stage": stage.name, "members": MEMBERS}
                row |= {key: milliseconds(times, n) for key, times in found.items()}
                cells = []
                for mode in args.modes:
                    row[f"share {mode}"] = ratio(found[f"many {mode}"], found[f"one {mode}"]) / MEMBERS
                    cells += [f"{row[f'{one} {mode}']['ms']:.2f}" for one in ("one", "many")]
                    cells.append(f"{row[f'share {mode}']:.2f}")
                rows.append(row)
                show(f"{name} {stage.name}", *cells)
    return rows


# ---- 5. startup ------------------------------------------------------------------------------------------------------
IMPORT = """import time; start = time.perf_counter()
import torch, gymnasium; before = time.perf_counter()
{0}; print(before - start, time.perf_counter() - before)"""
LOAD = """import time; from diffagents import {0}; times = [time.perf_counter()]
for _ in range(2): {0}.load({1!r}); times.append(time.perf_counter())
print(times[2] - times[1], times[1] - times[0])"""
MEMORY = """import resource, sys; sys.path.insert(0, {1!r}); import torch, gymnasium
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_num_threads({2}); import speed_parts
speed_parts.make_agent({0!r}, data := speed_parts.synthetic_data()).learn(data, 100)
print(base / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"""


def measure_startup(args: argparse.Namespace, data: Transitions) -> dict[str, Any]:
    """Import and load times in new processes, interleaved; peak memory of a short eager training."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        imports = ("import diffagents", "from diffagents import SRPO", "from diffagents import SRPO, learn_many, load_dataset")
        codes = {what: IMPORT.format(what) for what in imports}
        for name in ("SRPO", "DiffusionQL"):
            path = make_agent(name, data).save(pathlib.Path(folder) / name)
            codes[f"load a saved {name}"] = LOAD.format(name, str(path))
        runs: dict[str, list[list[float]]] = {what: [] for what in codes}
        for what, code in [*codes.items()] * args.repeats:
            runs[what].append(numbers_of(code))
    show("seconds", "median", "compare")
    for what, found in runs.items():
        other = "a second load" if what.startswith("load") else "torch, gymnasium"
        values = {"seconds": statistics.median(one[1] for one in found), other: statistics.median(one[0] for one in found)}
        result[what] = values
        show(what, f"{values['seconds']:.3f}", f"{other} {values[other]:.3f}")
    show("peak MiB of training", "all", "torch, gymnasium")
    for name in ("SRPO", "DiffusionQL"):
        base, peak = numbers_of(MEMORY.format(name, str(HERE), torch.get_num_threads()))
        result[f"peak MiB of training {name}"] = {"all": peak, "torch_and_gymnasium": base}
        show(name, f"{peak:.0f}", f"{base:.0f}")
    return result


# ---- 6. where the time goes ------------------------------------------------------------------------------------------
KINDS = ("matmul", "elementwise", "optimiser", "sampling", "Python, rest")
MATMUL = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm", "aten::mv", "aten::addmv", "mkl")
BOOKKEEPING = (  # of tensors, without arithmetic
    *("alias", "as_strided", "detach", "empty", "expand", "lift", "linear", "matmul", "narrow", "permute", "reshape"),
    *("resolve", "select", "slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
)


def kind_of(operation: str) -> str:
    """The kind, one of KINDS, of an operation of the profiler."""
    if operation.startswith(MATMUL):
        return "matmul"
    name = operation.removeprefix("aten::").strip("_")
    if "cpp_fused" in name or (name != operation and name.split("_")[0] not in BOOKKEEPING and name not in BOOKKEEPING):
        return "elementwise"
    return "Python, rest"


def measure_profile(args: argparse.Namespace, data: Transitions) -> list[dict[str, Any]]:
    """Milliseconds per update by kind: phases are timed as they run, losses and gradients are split by torch.profiler."""
    from torch._inductor import config

    rows = []
    show("ms per update", *KINDS, "in all")
    for name, mode in itertools.product(args.algorithms, ("eager", "compiled")):
        agent = make_agent(name, data)
        for stage in agent.stages():
            with config.patch({"cpp.enable_kernel_profile": True}):  # names compiled kernels for the profiler
                runner, n = offline.make_runner(agent, stage, stage_sampler(agent, stage, data), mode), cycle_length(stage)
                stepper(runner, n)()
            profiled = profile_gradients(runner, n, args.repeats)
            within = sum(profiled.values())
            bursts, end = [], time.perf_counter() + args.seconds * args.repeats
            while not bursts or time.perf_counter() < end:
                bursts.append(phases_of(runner, n))
            phases = {phase: statistics.median(one[phase] for one in bursts) / n for phase in bursts[0]}
            split = {kind: phases["gradients"] * profiled[kind] / within for kind in KINDS}
            split |= {"optimiser": phases["optimiser"], "sampling": phases["sampling"]}
            split["Python, rest"] += phases["rest"]
            rows.append({"algorithm": name, "stage": stage.name, "mode": mode, "ms": {k: 1e3 * v for k, v in split.items()}})
            total = sum(split.values())
            cells = [f"{1e3 * seconds:.2f} {100 * seconds / total:>3.0f}%" for seconds in split.values()]
            show(f"{name} {stage.name}, {mode}", *cells, f"{1e3 * total:.2f}")
    return rows


def profile_gradients(runner: Any, n: int, repeats: int) -> dict[str, float]:
    """Microseconds of each of KINDS in the losses and gradients of n steps, repeated `repeats` times."""
    (generator,), due = runner.generators, [j for k in range(FIRST, FIRST + n) for j in runner.due(k)]
    batch = runner.sampler.sample(runner.batch_size, generator)
    jobs = [(runner.gradients[j], runner.updates[j].draw(runner.batch_size, generator)) for j in due]
    for rounds in (1, repeats):  # the first profile of a process is slow
        cpu, own = [torch.profiler.ProfilerActivity.CPU], torch.profiler.record_function("gradients")
        with torch.profiler.profile(activities=cpu) as profiler, own:  # the remainder in `own` is the time of Python
            for (gradients, noise), _ in itertools.product(jobs, range(rounds)):
                gradients(batch, noise)
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total
    return found


def phases_of(runner: Any, n: int) -> dict[str, float]:
    """Seconds of each phase of n steps, in the order of Runner.step."""
    seconds = dict.fromkeys(("sampling", "gradients", "optimiser", "rest"), 0.0)
    (generator,), marks = runner.generators, [time.perf_counter()]

    def mark(phase: str) -> None:
        marks.append(time.perf_counter())
        seconds[phase] += marks[-1] - marks[-2]

    for k in range(FIRST, FIRST + n):
        due = runner.due(k)
        mark("rest")
        batch = runner.sampler.sample(runner.batch_size, generator)
        mark("sampling")
        for j in due:
            noise = runner.updates[j].draw(runner.batch_size, generator)
            mark("sampling")
            gradients, metrics = runner.gradients[j](batch, noise)
            mark("gradients")
            runner.updates[j].apply(gradients)
            mark("optimiser")
            runner.sums[j].add(metrics)
            mark("rest")
    return seconds


# ---- 7. log steps --------------------------------------------------------------------------------------------------------
def measure_log_steps(args: argparse.Namespace, data: Transitions) -> dict[str, Any]:
    """The cost of logging, snapshots, counting and an empty callback, in percent of SRPO's critic updates.

    Measured as the time that the loop of `learn` spends outside the steps (precise), and relative to a bare loop (noisy).
    """
    from stable_baselines3.common.callbacks import BaseCallback

    class Nothing(BaseCallback):
        def _on_training_start(self) -> None:
            self.start = time.perf_counter()

        def _on_training_end(self) -> None:
            self.seconds = time.perf_counter() - self.start

        def _on_step(self) -> bool:
            return True

    def timed_runner(*args: Any) -> Any:
        runner = training_runner(*args)
        step = runner.step

        def timed(k: int) -> None:
            start = time.perf_counter()
            step(k)
            inside[-1] += time.perf_counter() - start

        runner.step = timed
        return runner

    agent, n, training_runner = make_agent("SRPO", data), args.look_steps, offline.make_runner
    agent.verbose = 1
    stage = agent.stages()[0]
    bare = stepper(training_runner(agent, stage, stage_sampler(agent, stage, data), "eager"), n)
    found: Bursts = {"bare": [], "every 1000": [], "every 20th of the stage": []}
    steps: Bursts = {key: [] for key in found}
    for _ in range(args.repeats):
        start = time.perf_counter()
        bare()
        found["bare"].append(time.perf_counter() - start)
        for key, interval in (("every 1000", 1000), ("every 20th of the stage", None)):
            callback, inside = Nothing(), steps[key]
            inside.append(0.0)
            with redirect_stdout(io.StringIO()), mock.patch.object(offline, "make_runner", timed_runner):
                agent.learn(data, n, callback, interval, stages=("critic",))
            found[key].append(callback.seconds)
    result = {key: milliseconds(times, n) for key, times in found.items()}
    show(f"{n:,} updates", "ms per update", "in the run", "to bare loop")
    for key, row in result.items():
        row["added_percent"] = 100 * (ratio(found[key], steps[key] or found[key]) - 1)
        row["added_percent_to_bare"] = 100 * (ratio(found[key], found["bare"]) - 1)
        cells = [f"{row['added_percent']:+.2f}%", f"{row['added_percent_to_bare']:+.1f}%"]
        show(key, f"{row['ms']:.3f} +-{row['spread_percent']:.0f}%", *cells)
    return result


SECTIONS = {
    "training": measure_training,
    "predict": measure_predict,
    "batches": measure_batches,
    "many": measure_many,
    "startup": measure_startup,
    "profile": measure_profile,
    "looks": measure_log_steps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--algorithms", nargs="+", choices=diffagents.AGENTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="bursts of each measurement")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds per burst")
    parser.add_argument("--look-steps", type=int, default=2000, help="updates in each burst of the section looks")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device of training and many; other sections use the CPU"
    )
    parser.add_argument("--out", type=pathlib.Path, help="default: zoo/results/speed-cpu.json, or -cuda")
    args = parser.parse_args()
    args.modes = ["eager", "compiled", *(["graph"] if args.device == "cuda" else [])]
    args.out = args.out or HERE.parent / "results" / f"speed-{args.device}.json"
    args.chosen, args.algorithms = bool(args.algorithms), args.algorithms or list(diffagents.AGENTS)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "machine": machine()}
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results["machine"].items()))
    data = synthetic_data()
    for name in args.only:
        print(f"\n{name}: {SECTIONS[name].__doc__.splitlines()[0]}", flush=True)
        results[name] = SECTIONS[name](args, data)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
