"""Minutes that the papers' schedules take on a GPU: SRPO and Diffusion-QL, from straightforward PyTorch to CUDA graphs.

  python zoo/benchmarks/speed_gpu.py [--seconds 60] [--only SRPO] [--stages behavior] [--modes eager graph] [--out FILE.json]

Each stage runs for at least --seconds in each mode, after a warm-up, on random data of Hopper's sizes with batch 256 (SRPO's
behaviour stage: 2048). The minutes are the time per update times the number of updates in the paper; the warm-up with compiling
is reported separately. TF32 is on as in training, unless --no-tf32. Before that, 20 steps from the same state in both modes are
compared, with TF32 off. "straightforward" is plain eager PyTorch (straightforward.py), for at most 20 s. Requires torch, numpy,
safetensors and gymnasium only.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import torch
from speed_parts import (
    FIRST,
    cycle_length,
    machine,
    make_agent,
    plain_stepper,
    stage_sampler,
    stepper,
    synchronize,
    synthetic_data,
    warm_up,
)

import diffagents
from diffagents.data.transitions import Transitions
from diffagents.training import offline, session

BARS = {"SRPO": 20, "DiffusionQL": 25}  # minutes, for all of STAGE_SHARES
PAPER = {"SRPO": {"behavior_batch_size": 2048}, "DiffusionQL": {}}
MODES = ("straightforward", "eager", "compiled", "graph")
CHECKED = 20  # steps


def differences(name: str, position: int, mode: str, args: argparse.Namespace, data: Transitions) -> dict[str, float]:
    """The largest difference of any weight between `mode` and eager after CHECKED steps from the same state.

    Returns:
        "difference", and "moved": the largest change of any weight in these steps, for comparison.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for way in ("eager", mode):
        agent = make_agent(name, data, args.device, tf32=False, **PAPER[name])
        stage = agent.stages()[position]
        runner = offline.make_runner(agent, stage, stage_sampler(agent, stage, data), way)
        found["start"] = tensors_of(agent)
        for k in range(FIRST, FIRST + CHECKED):
            runner.step(k)
        synchronize()
        found[way] = tensors_of(agent)

    def largest(one: str, other: str) -> float:
        return max(float((found[one][key] - found[other][key]).abs().max()) for key in found[one])

    return {"difference": largest(mode, "eager"), "moved": largest("eager", "start")}


def tensors_of(agent: Any) -> dict[str, torch.Tensor]:
    """Copies of all tensors of all networks."""
    networks = agent.networks().items()
    return {f"{name}.{key}": t.detach().clone() for name, net in networks for key, t in net.state_dict().items()}


def steady(name: str, position: int, mode: str, args: argparse.Namespace, data: Transitions) -> dict[str, float]:
    """Seconds per update, measured over at least --seconds, and of the warm-up including compiling and capturing."""
    agent = make_agent(name, data, args.device, tf32=args.tf32, **PAPER[name])
    stage = agent.stages()[position]
    sampler, n = stage_sampler(agent, stage, data), cycle_length(stage)
    if mode == "straightforward":
        cycle = plain_stepper(name, stage, sampler, args.device, n)
    else:
        cycle = stepper(offline.make_runner(agent, stage, sampler, mode), n)
    needed = min(args.seconds, 20.0) if mode == "straightforward" else args.seconds
    with session.matmul_precision(agent):
        start = time.perf_counter()
        warm_up(cycle)
        synchronize()
        warmed = time.perf_counter() - start
        start, cycles, chunk = time.perf_counter(), 0, 1
        while (passed := time.perf_counter() - start) < needed:
            for _ in range(chunk):
                cycle()
            synchronize()
            cycles += chunk
            chunk = max(1, round(0.5 * cycles / (time.perf_counter() - start)))  # synchronises twice a second
    return {"seconds_per_update": passed / (n * cycles), "updates": n * cycles, "seconds": passed, "warm_up_seconds": warmed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--stages", nargs="+", help="only these stages; the totals are omitted then")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--no-tf32", dest="tf32", action="store_false")
    parser.add_argument("--out", type=pathlib.Path, help="also write the results as JSON")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device, so nothing was measured; --device cpu --seconds 2 tries the command without one")
        return
    modes = [mode for mode in args.modes if mode != "graph" or args.device == "cuda"]
    results: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "machine": machine(), "tf32": args.tf32, "runs": []}
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results["machine"].items()))
    print(f"TF32 {'on' if args.tf32 and args.device == 'cuda' else 'off'} while timing, off while comparing", flush=True)
    data = synthetic_data()
    for name in args.only:
        shares = getattr(diffagents, name).STAGE_SHARES
        chosen = [stage for stage in shares if args.stages is None or stage in args.stages]
        minutes = dict.fromkeys(modes, 0.0)
        for stage in chosen:
            position = list(shares).index(stage)
            for mode in [mode for mode in modes if mode in ("compiled", "graph")][-1:]:  # a graph holds compiled kernels
                check = differences(name, position, mode, args, data)
                results["runs"].append({"algorithm": name, "stage": stage, "mode": mode, "steps": CHECKED, **check})
                print(
                    f"{name} {stage}: {mode} and eager differ by {check['difference']:.1e} at most after {CHECKED} steps, "
                    f"which moved the networks by {check['moved']:.1e}",
                    flush=True,
                )
            for mode in modes:
                row = steady(name, position, mode, args, data)
                minutes[mode] += (taken := row["seconds_per_update"] * shares[stage] / 60)
                results["runs"].append({"algorithm": name, "stage": stage, "mode": mode, **row, "minutes": taken})
                print(
                    f"{name} {stage}, {mode:<15}: {1e6 * row['seconds_per_update']:9.1f} us per update ({row['updates']:,} in "
                    f"{row['seconds']:.1f} s, warm-up {row['warm_up_seconds']:.1f} s); {shares[stage]:,}: {taken:.1f} min",
                    flush=True,
                )
        if chosen == list(shares):
            results[name] = {"minutes": minutes, "bar": BARS[name]}
            line = ", ".join(f"{mode} {value:.1f}" for mode, value in minutes.items())
            print(f"{name}, the paper's schedule in minutes (bar: {BARS[name]}): {line}", flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
