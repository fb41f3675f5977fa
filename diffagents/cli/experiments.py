"""Commands for whoever makes data, compares and chooses: bench, collect, tune, select."""

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffagents
from diffagents.cli.options import add_policy, env_arguments, environment, policy, say

if TYPE_CHECKING:
    from diffagents.experiments.grid import RunSpec

Command = Callable[[Any, str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    """Add them to the parser; `command` makes one of a function and an example."""
    one = command(bench, "diffagents bench zoo/grids/zoo.yml --only srpo-hopper --root runs/zoo")
    one.add_argument("grid", type=Path, metavar="GRID.yml", help="what to run: see zoo/grids and diffagents/sweep.py")
    one.add_argument("--root", type=Path, metavar="FOLDER", help="where runs and tables go; default: runs/NAME-OF-THE-GRID")
    one.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="runs whose name contains one of these")
    one.add_argument("--executor", choices=("serial", "ray"), default="serial", help="ray: side by side")
    one.add_argument("--cpus", type=float, default=1, metavar="N", help="of a run under ray; default: 1")
    one.add_argument("--gpus", type=float, metavar="N", help="of a run under ray; 0.25 puts four on a card; default: 1, if any")
    one.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster; --root must then be a shared folder")
    one.add_argument("--threads", type=int, default=1, metavar="N", help="of a run, on the CPU; default: 1")
    one.add_argument("--device", default="auto")
    one.add_argument("--status", action="store_true", help="show how far the runs are and leave")
    one.add_argument("--report", action="store_true", help="write the tables of what is finished and leave")

    one = command(collect, "diffagents collect me/srpo-hopper --steps 100000 --id me/hopper/srpo-v0 --noise gaussian:0.1")
    add_policy(one)
    one.add_argument("--id", required=True, metavar="DATASET_ID", help="the new Minari id, namespace/name-v0")
    one.add_argument("--steps", type=int, default=100_000, metavar="N", help="of the environment; default: 100000")
    one.add_argument("--noise", metavar="KIND:SIZE", help="gaussian:S, in the units of actions, or uniform:P, a probability")
    one.add_argument("--deterministic", action="store_true", help="default: the policy draws its actions")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--root", type=Path, metavar="FOLDER", help="of all datasets; default: $MINARI_DATASETS_PATH")

    one = command(select, "diffagents push $(diffagents select runs/zoo/*/policy --dataset mujoco/hopper/medium-v0) me/hopper")
    one.add_argument("policies", nargs="+", metavar="POLICY", help="folders, .zip files or Hub ids")
    one.add_argument("--dataset", required=True, metavar="DATASET", help="best the data that they were trained on")
    one.add_argument("--gamma", type=float, default=0.99, help="discount of the estimate; default: 0.99")
    one.add_argument("--fqe-steps", type=int, default=10_000, metavar="N", help="default: 10000")
    one.add_argument(
        "--n-seeds", type=int, default=2, metavar="N", help="fits for each policy; pessimistic from 2 on (default)"
    )
    one.add_argument("--max-transitions", type=int, default=20_000, metavar="N", help="of the data; default: 20000")
    one.add_argument(
        "--episodes",
        dest="n_episodes",
        type=int,
        default=0,
        metavar="N",
        help="also play N episodes with each of the --top best",
    )
    one.add_argument("--top", type=int, default=3, metavar="N", help="default: 3")
    one.add_argument("--env", metavar="ID", help="of the episodes; default: the dataset's own")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", default="auto")
    one.add_argument("--json", action="store_true", help="the whole report as one line of JSON")

    one = command(tune, "diffagents tune SRPO mujoco/hopper/medium-v0 --trials 8 --storage srpo.log --out runs/tuned")
    one.add_argument("algorithm", choices=diffagents.AGENTS, metavar="ALGORITHM")
    one.add_argument("dataset", metavar="DATASET", help="as for train")
    one.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the best policy; must be new")
    one.add_argument(
        "--trials", dest="n_trials", type=int, default=10, metavar="N", help="in all, those in --storage included; default: 10"
    )
    one.add_argument("--knob", help="default: the algorithm's main knob, on its published range")
    one.add_argument("--low", type=float, help="of the range")
    one.add_argument("--high", type=float, help="of the range")
    one.add_argument("--objective", choices=("fqe", "return"), default="fqe", help="fqe: no environment; return: play episodes")
    one.add_argument(
        "--episodes", dest="n_episodes", type=int, default=10, metavar="N", help="of each trial with --objective return"
    )
    one.add_argument("--steps", type=int, metavar="N", help="gradient steps of one agent")
    one.add_argument("--preset", help="as for train")
    one.add_argument("--env", metavar="ID", help="gives the true spaces, and the place of --objective return")
    one.add_argument("--storage", metavar="FILE", help="a file or sqlite:///URL; the same command goes on there")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", default="auto")


def bench(given: argparse.Namespace) -> None:
    """Make the runs of a grid, algorithm x dataset x seed, and their tables and curves; print the path of the table.

    Finished runs are not made again, cut ones go on. Start the same command in another shell, and both share the work.
    """
    from diffagents.experiments import grid, report
    from diffagents.training.provenance import plain

    specs = grid.read_grid(given.grid)
    chosen = [spec for spec in specs if not given.only or any(text in spec.name for text in given.only)]
    if not chosen:
        raise ValueError(f"no run of {given.grid} has {' or '.join(given.only)} in its name, e.g. {specs[0].name}")
    root = given.root or Path("runs") / given.grid.stem
    if given.status:
        print(_plain_table(chosen, root))
        return
    failed: list[str] = []
    if not given.report:
        failed = _make(given, chosen, root)
    wanted = {spec.name for spec in specs}
    finished = [run for run in report.read_runs(root) if run["name"] in wanted]
    if not finished:
        raise RuntimeError(f"no run of {given.grid} is finished in {root}" + "".join(f"; {text}" for text in failed[:1]))
    command = f"diffagents bench {shlex.quote(plain(str(given.grid)))} --root {shlex.quote(plain(str(root)))} --only CELL"
    print(report.write_report(finished, root, specs=specs, command=command, title=given.grid.stem))
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(chosen)} runs failed, the first: {failed[0]}")


def _make(given: argparse.Namespace, specs: "Sequence[RunSpec]", root: Path) -> list[str]:
    """Run them, showing how far they are; returns what failed and why."""
    from diffagents.errors import one_line
    from diffagents.experiments import executors, grid

    failed: list[str] = []
    started = time.monotonic()

    def done(spec: "RunSpec", error: BaseException | None) -> None:
        if error is None:
            now = grid.status(spec, root)
            text = f"return {now['last']:.2f}" + (f", D4RL scale {now['score']:.1f}" if now["score"] is not None else "")
        elif isinstance(error, grid.Busy):
            text = "left to another process, which is at it"
        else:
            failed.append(f"{spec.name}: {one_line(error)} ({root / spec.name / grid.ERROR})")
            text = f"failed: {one_line(error)}"
        say(f"{spec.name}: {text} ({(time.monotonic() - started) / 60:.1f} min)")

    how = {"device": given.device, "threads": given.threads}
    with _live(specs, root):
        if given.executor == "ray":
            executors.run_with_ray(specs, root, done, cpus=given.cpus, gpus=given.gpus, address=given.address, **how)
        else:
            executors.run_serially(specs, root, done, **how)
    return failed


def _rows(specs: "Sequence[RunSpec]", root: Path) -> list[tuple[str, ...]]:
    """(run, state, progress, stage, newest return) of each."""
    from diffagents.experiments import grid

    rows: list[tuple[str, ...]] = []
    for spec in specs:
        now = grid.status(spec, root)
        share = f"{100 * now['step'] / now['total']:.0f} %" if now.get("total") else ""
        last = now.get("last")
        newest = "" if last is None else f"{last:.2f}"
        if now.get("score") is not None:
            newest += f" ({now['score']:.1f})"
        rows.append((spec.name, now["state"], "100 %" if now["state"] == "done" else share, now.get("stage", ""), newest))
    return rows


def _plain_table(specs: "Sequence[RunSpec]", root: Path) -> str:
    rows = _rows(specs, root)
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


@contextlib.contextmanager
def _live(specs: "Sequence[RunSpec]", root: Path) -> Any:
    """A table on stderr that follows the runs, where stderr is a terminal; elsewhere each run's one line is all."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def draw() -> Table:
        table = Table("run", "state", "done", "stage", "return (D4RL scale)")
        rows = [(name.rpartition("-")[0], *rest) for name, *rest in _rows(specs, root)]  # without the hash
        order = ("running", "failed", "cut", "done", "waiting")
        console_rows = max(5, console.size.height - 6)
        for row in sorted(rows, key=lambda row: order.index(row[1]))[:console_rows]:
            table.add_row(*row)
        if len(rows) > console_rows:
            table.caption = f"and {len(rows) - console_rows} more"
        return table

    console = Console(stderr=True)
    with Live(get_renderable=draw, console=console, refresh_per_second=0.5, redirect_stdout=False):
        yield


def collect(given: argparse.Namespace) -> None:
    """Let a policy act and keep what happens as a Minari dataset, whose id is printed."""
    agent = policy(given)
    how = _handed_on(given, "seed", "noise", "deterministic", "root") | {"env_kwargs": env_arguments(given) or None}
    with contextlib.redirect_stdout(sys.stderr):
        diffagents.collect(agent, environment(given, agent), given.steps, given.id, verbose=1, **how)
    print(given.id)


def select(given: argparse.Namespace) -> None:
    """Order policies by what data say of them, without an environment; print the best (the table goes to stderr)."""
    how = _handed_on(given, "gamma", "fqe_steps", "n_seeds", "max_transitions", "n_episodes", "top", "env", "seed", "device")
    with contextlib.redirect_stdout(sys.stderr):
        found = diffagents.select(given.policies, given.dataset, **how)
        print(found)
    if not found[found.best].trusted:
        raise ValueError(
            "the data tell nothing reliable about any of these policies: play episodes (--episodes), or take other data"
        )
    print(json.dumps(found.to_json()) if given.json else found.best)


def tune(given: argparse.Namespace) -> None:
    """Search an algorithm's main knob, without an environment; write the best policy as a folder, whose path is printed."""
    if given.out.exists():
        raise FileExistsError(f"{given.out} exists: give another --out")
    search = _handed_on(given, "n_trials", "knob", "low", "high", "objective", "n_episodes", "storage")
    how = _handed_on(given, "steps", "env", "seed", "device", "preset")
    with contextlib.redirect_stdout(sys.stderr):
        report = diffagents.tune(given.algorithm, given.dataset, **search, **how)
        report.agent.save_pretrained(given.out, include_trainer_state=True)
        print(report)
    print(given.out)


def _handed_on(given: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that the library's call takes under the same name."""
    return {name: getattr(given, name) for name in names}
