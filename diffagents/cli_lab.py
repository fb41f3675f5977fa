"""Commands for whoever makes data, compares and chooses: bench, collect, tune, select."""

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffagents
from diffagents.cli_options import POLICY_HELP, add_hub, env_arguments, policy, say

if TYPE_CHECKING:
    from diffagents.sweep import RunSpec

Command = Callable[[Any, str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    """Add them to the parser; `command` makes one of a function and an example."""
    one = command(bench, "diffagents bench zoo/grids/zoo.yml --only srpo-hopper --root runs/zoo")
    one.add_argument("grid", type=Path, metavar="GRID.yml", help="what to run: see zoo/grids and diffagents/sweep.py")
    one.add_argument("--root", type=Path, metavar="FOLDER", help="where runs and tables go; default: runs/NAME-OF-THE-GRID")
    one.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="runs whose name contains one of these")
    one.add_argument("--executor", choices=("serial", "ray"), default="serial", help="ray: side by side")
    one.add_argument("--cpus", type=float, default=1, metavar="N", help="of a run under ray; default: 1")
    one.add_argument("--gpus", type=float, default=0, metavar="N", help="of a run under ray; 0.25 puts four on a card")
    one.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster; --root must then be a shared folder")
    one.add_argument("--threads", type=int, default=1, metavar="N", help="of a run, on the CPU; default: 1")
    one.add_argument("--device", default="auto")
    one.add_argument("--status", action="store_true", help="show how far the runs are and leave")
    one.add_argument("--report", action="store_true", help="write the tables of what is finished and leave")

    one = command(collect, "diffagents collect me/srpo-hopper --steps 100000 --id me/hopper/srpo-v0 --noise gaussian:0.1")
    one.add_argument("policy", metavar="POLICY", help=POLICY_HELP)
    one.add_argument("--id", required=True, metavar="DATASET_ID", help="the new Minari id, namespace/name-v0")
    one.add_argument("--steps", type=int, default=100_000, metavar="N", help="of the environment; default: 100000")
    one.add_argument("--env", metavar="ID", help="default: the environment stored with the dataset")
    one.add_argument(
        "--env-arg", action="append", default=[], metavar="NAME=VALUE", help="for the environment; may be repeated"
    )
    one.add_argument("--noise", metavar="KIND:SIZE", help="gaussian:S, in the units of actions, or uniform:P, a probability")
    one.add_argument("--deterministic", action="store_true", help="default: the policy draws its actions")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--root", type=Path, metavar="FOLDER", help="of all datasets; default: $MINARI_DATASETS_PATH")
    one.add_argument("--device", default="auto")
    add_hub(one)


def bench(given: argparse.Namespace) -> None:
    """Make the runs of a grid, algorithm x dataset x seed, and their tables and curves; print the path of the table.

    Finished runs are not made again, cut ones go on. Start the same command in another shell, and both share the work.
    """
    from diffagents import sweep, sweep_report

    specs = sweep.read_grid(given.grid)
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
    runs = sweep_report.read_runs(root)
    wanted = {spec.name for spec in specs}
    command = f"diffagents bench {shlex.quote(str(given.grid))} --only CELL"
    finished = [run for run in runs if run["name"] in wanted]
    if not finished:
        raise FileNotFoundError(f"no run of {given.grid} is finished in {root}" + "".join(f"; {text}" for text in failed[:1]))
    print(sweep_report.write_report(finished, root, specs=specs, command=command, title=given.grid.stem))
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(chosen)} runs failed, the first: {failed[0]}")


def _make(given: argparse.Namespace, specs: "Sequence[RunSpec]", root: Path) -> list[str]:
    """Run them, showing how far they are; returns what failed and why."""
    from diffagents import sweep
    from diffagents.environments import one_line

    failed: list[str] = []
    started = time.monotonic()

    def done(spec: "RunSpec", error: BaseException | None) -> None:
        if error is None:
            now = sweep.status(spec, root)
            text = f"return {now['last']:.2f}" + (f", D4RL scale {now['score']:.1f}" if now["score"] is not None else "")
        elif isinstance(error, sweep.Busy):
            text = "left to another process, which is at it"
        else:
            failed.append(f"{spec.name}: {one_line(error)} ({root / spec.name / sweep.ERROR})")
            text = f"failed: {one_line(error)}"
        say(f"{spec.name}: {text} ({(time.monotonic() - started) / 60:.1f} min)")

    how = {"device": given.device, "threads": given.threads}
    with _live(specs, root):
        if given.executor == "ray":
            sweep.run_with_ray(specs, root, done, cpus=given.cpus, gpus=given.gpus, address=given.address, **how)
        else:
            sweep.run_serially(specs, root, done, **how)
    return failed


def _rows(specs: "Sequence[RunSpec]", root: Path) -> list[tuple[str, ...]]:
    """(run, state, progress, stage, newest return) of each."""
    from diffagents import sweep

    rows: list[tuple[str, ...]] = []
    for spec in specs:
        now = sweep.status(spec, root)
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
        table = Table("run", "state", "done", "stage", "newest return (D4RL scale)")
        rows = _rows(specs, root)
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
    env = given.env or (agent.dataset_info or {}).get("env_spec")
    if env is None:
        raise ValueError("no environment is stored with this policy's dataset: give --env ID")
    settings: dict[str, Any] = {
        "seed": given.seed,
        "noise": given.noise,
        "deterministic": given.deterministic,
        "root": given.root,
    }
    with contextlib.redirect_stdout(sys.stderr):
        diffagents.collect(agent, env, given.steps, given.id, env_kwargs=env_arguments(given) or None, verbose=1, **settings)
    print(given.id)
