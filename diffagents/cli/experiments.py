"""Commands for data and experiments: bench, collect, data, select and tune. Each is a thin layer over one call of the library.

Their docstrings are the texts of --help.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagents.cli.options import (
    DEVICE_HELP,
    add_how,
    add_policy,
    check_new_folder,
    env_arguments,
    environment,
    policy,
    preset,
    say,
    value,
)
from diffagents.errors import one_line, short
from diffagents.files import replacing
from diffagents.registry import AGENTS

if TYPE_CHECKING:
    from diffagents.experiments.grid import RunSpec

Command = Callable[[Any, str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    """Add the commands of this module to the parser.

    Args:
        command: adds the command of a function and returns its parser; the second argument is an example.
    """
    one = command(bench, "diffagents bench zoo/grids/zoo.yml --only srpo-hopper --root runs/zoo")
    one.add_argument(
        "grid", type=Path, metavar="GRID.yml", help="The runs; see zoo/grids and diffagents/experiments/grid.py for the format."
    )
    one.add_argument("--root", type=Path, metavar="FOLDER", help="Folder for runs and tables. Default: runs/NAME-OF-THE-GRID.")
    one.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="Select the runs whose name contains one of these texts."
    )
    one.add_argument("--executor", choices=("serial", "ray"), default="serial", help='"ray" makes runs in parallel.')
    one.add_argument("--cpus", type=float, default=1, metavar="N", help="CPUs reserved for each run under Ray. Default: 1.")
    one.add_argument(
        "--gpus",
        type=float,
        metavar="N",
        help="GPUs reserved for each run under Ray; 0.25 puts four runs on one GPU. Default: 1 if there is a GPU.",
    )
    one.add_argument("--address", metavar="HOST:PORT", help="Address of a Ray cluster; --root must be a shared folder then.")
    one.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of each run. Default: 1.")
    one.add_argument("--device", default="auto", help=DEVICE_HELP)
    one.add_argument("--status", action="store_true", help="Show the progress of the runs and exit.")
    one.add_argument("--report", action="store_true", help="Write the tables of the finished runs and exit.")

    one = command(collect, "diffagents collect me/srpo-hopper --steps 100000 --id me/hopper/srpo-v0 --noise gaussian:0.1")
    add_policy(one)
    one.add_argument("--id", required=True, metavar="DATASET_ID", help="Id of the new Minari dataset, namespace/name-v0.")
    one.add_argument("--steps", type=int, default=100_000, metavar="N", help="Environment steps. Default: 100000.")
    one.add_argument(
        "--noise",
        metavar="KIND:SIZE",
        help="Exploration noise: gaussian:S adds noise with standard deviation S, in units of the actions; "
        "uniform:P replaces an action by a random one with probability P.",
    )
    add_how(one)
    one.add_argument("--seed", type=int, default=0, help="Seed of the episodes and the noise. Default: 0.")
    one.add_argument("--root", type=Path, metavar="FOLDER", help="Folder of all datasets. Default: $MINARI_DATASETS_PATH.")

    one = command(data, "diffagents data mujoco/hopper/medium-v0 --html hopper.html")
    one.add_argument("dataset", metavar="DATASET", help="As for train.")
    one.add_argument("--env", metavar="ID", help="Environment that provides the exact spaces, for bare arrays.")
    one.add_argument("--obs-keys", nargs="+", metavar="KEY", help="Parts of a Dict observation. Default: as for train.")
    one.add_argument("--html", type=Path, metavar="FILE.html", help="Also write a page with pictures to this file.")
    one.add_argument("--json", action="store_true", help="Print the measurements as one line of JSON.")
    one.add_argument("--quick", action="store_true", help="Leave out the clone and the timing, which take some seconds.")

    one = command(select, "diffagents push $(diffagents select runs/zoo/*/policy --dataset mujoco/hopper/medium-v0) me/hopper")
    one.add_argument("policies", nargs="+", metavar="POLICY", help="Folders, .zip files or Hub ids.")
    one.add_argument("--dataset", required=True, metavar="DATASET", help="Dataset, ideally the one that they were trained on.")
    one.add_argument("--gamma", type=float, default=0.99, help="Discount factor of the estimate. Default: 0.99.")
    one.add_argument(
        "--rule",
        default="agreement",
        metavar="SIGNAL",
        help="What determines the order: agreement (default), gain, loss_on_best, off_data, bc_loss or fqe.",
    )
    one.add_argument("--fqe-steps", type=int, default=10_000, metavar="N", help="Gradient steps of --rule fqe. Default: 10000.")
    one.add_argument(
        "--n-seeds",
        type=int,
        default=2,
        metavar="N",
        help="Fits per policy; with 2 or more the estimate is pessimistic. Default: 2.",
    )
    one.add_argument("--max-transitions", type=int, default=20_000, metavar="N", help="Transitions used. Default: 20000.")
    one.add_argument(
        "--episodes",
        dest="n_episodes",
        type=int,
        default=0,
        metavar="N",
        help="Also play N episodes with each of the --top best policies. Default: 0.",
    )
    one.add_argument("--top", type=int, default=3, metavar="N", help="Number of policies that play. Default: 3.")
    one.add_argument("--env", metavar="ID", help="Environment of the episodes. Default: the one stored with the dataset.")
    one.add_argument("--seed", type=int, default=0, help="Seed of the estimate and the episodes. Default: 0.")
    one.add_argument("--device", default="auto", help=DEVICE_HELP)
    one.add_argument("--json", action="store_true", help="Print the whole report as one line of JSON.")

    one = command(tune, "diffagents tune SRPO mujoco/hopper/medium-v0 --trials 8 --storage srpo.log --out runs/tuned")
    one.add_argument("algorithm", choices=AGENTS, metavar="ALGORITHM", help="Name of the algorithm, see `diffagents list`.")
    one.add_argument("dataset", metavar="DATASET", help="As for train.")
    one.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="Folder for the best policy; must not exist.")
    one.add_argument(
        "--trials",
        dest="n_trials",
        type=int,
        default=10,
        metavar="N",
        help="Number of trials in all, including those in --storage. Default: 10.",
    )
    one.add_argument(
        "--hyperparameter",
        metavar="NAME",
        help="The hyperparameter to search. Default: the main one of the algorithm, over its published range or around the "
        "value that the preset sets.",
    )
    one.add_argument("--knob", help=argparse.SUPPRESS)  # the old name of --hyperparameter
    one.add_argument("--low", type=float, help="Lower end of the range.")
    one.add_argument("--high", type=float, help="Upper end of the range.")
    one.add_argument(
        "--objective",
        choices=("agreement", "fqe", "return"),
        default="agreement",
        help='"agreement" (default) and "fqe" are signals of `diffagents select`, from the data; "return" plays episodes.',
    )
    one.add_argument(
        "--episodes", dest="n_episodes", type=int, default=10, metavar="N", help="Episodes per trial for --objective return."
    )
    one.add_argument("--steps", type=int, metavar="N", help="Gradient steps of each agent.")
    one.add_argument("--preset", type=value, default=argparse.SUPPRESS, help="As for train.")
    one.add_argument(
        "--env", metavar="ID", help="Environment that provides the exact spaces and is used by --objective return."
    )
    one.add_argument("--storage", metavar="FILE", help="File or sqlite:///URL of the search; the same command continues it.")
    one.add_argument("--seed", type=int, default=0, help="Seed of the search and the agents. Default: 0.")
    one.add_argument("--device", default="auto", help=DEVICE_HELP)


def bench(args: argparse.Namespace) -> None:
    """Make the runs of a grid (algorithm x dataset x seed), tables and curves; print the path of the tables.

    Finished runs are not repeated and interrupted runs resume. The same command in a second shell shares the work.
    """
    from diffagents.experiments import grid, report

    specs = grid.read_grid(args.grid)
    chosen = [spec for spec in specs if not args.only or any(text in spec.name for text in args.only)]
    if not chosen:
        raise ValueError(f"no run of {args.grid} has {' or '.join(args.only)} in its name; the first run is {specs[0].name}")
    root = args.root or Path("runs") / args.grid.stem
    if args.status:
        print(_plain_table(chosen, root))
        return
    failed: list[str] = []
    if not args.report:
        if modules := grid.imports(chosen):
            say(f"environments of {args.grid} import {', '.join(modules)}")
        failed = _make(args, chosen, root)
    wanted = {spec.name for spec in specs}
    finished = [run for run in report.read_runs(root) if run["name"] in wanted]
    if not finished:
        raise RuntimeError(f"no run of {args.grid} is finished in {root}" + "".join(f"; {text}" for text in failed[:1]))
    places = [shlex.quote(place.name if place.is_absolute() else str(place)) for place in (args.grid, root)]
    command = f"diffagents bench {places[0]} --root {places[1]} --only CELL"
    print(report.write_report(finished, root, specs=specs, command=command, title=args.grid.stem))
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(chosen)} runs failed; the first: {failed[0]}")


def _make(args: argparse.Namespace, specs: "Sequence[RunSpec]", root: Path) -> list[str]:
    """Make the runs while showing their progress; returns one line for each that failed."""
    from diffagents.experiments import executors, grid

    failed: list[str] = []
    started = time.monotonic()

    def done(spec: "RunSpec", error: BaseException | None) -> None:
        now = grid.status(spec, root) if error is None else {}
        if now.get("state") == "done":
            text = f"return {now['last']:.2f}" + (f", D4RL scale {now['score']:.1f}" if now["score"] is not None else "")
        elif error is None:
            text = "made, but its results cannot be read"
        elif isinstance(error, grid.Busy):
            text = "skipped: another process is working on it"
        else:
            failed.append(f"{spec.name}: {one_line(error)} ({root / spec.name / grid.ERROR})")
            text = f"failed: {one_line(error)}"
        say(f"{spec.name}: {text} ({(time.monotonic() - started) / 60:.1f} min)")

    settings = {"device": args.device, "threads": args.threads, "grid_name": _public_name(args.grid)}
    with _live(specs, root):
        if args.executor == "ray":
            executors.run_with_ray(specs, root, done, cpus=args.cpus, gpus=args.gpus, address=args.address, **settings)
        else:
            executors.run_serially(specs, root, done, **settings)
    return failed


def _public_name(path: Path) -> str | None:
    """How the card of a policy names the grid: only one of this library's own, since any other name is the user's affair."""
    ours = Path(__file__).resolve().parents[2] / "zoo" / "grids"
    return f"zoo/grids/{path.name}" if path.expanduser().resolve().parent == ours else None


def _rows(specs: "Sequence[RunSpec]", root: Path) -> list[tuple[str, ...]]:
    """(run, state, progress, stage, newest return) of each run."""
    from diffagents.experiments import grid

    rows: list[tuple[str, ...]] = []
    for spec in specs:
        now = grid.status(spec, root)
        share = f"{100 * now['step'] / now['total']:.0f} %" if now.get("total") else ""
        last = now.get("last")
        newest = "" if last is None else f"{last:.2f}"
        if now.get("score") is not None:
            newest += f" ({now['score']:.1f})"
        rows.append(
            (spec.name, now["state"], "100 %" if now["state"] == "done" else share, short(now.get("stage", "")), newest)
        )
    return rows


def _plain_table(specs: "Sequence[RunSpec]", root: Path) -> str:
    """The progress of the runs as aligned text."""
    rows = _rows(specs, root)
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


@contextlib.contextmanager
def _live(specs: "Sequence[RunSpec]", root: Path) -> Any:
    """Show a live table of the runs on stderr if it is a terminal."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def draw() -> Table:
        table = Table("run", "state", "done", "stage", "return (D4RL scale)")
        rows = [(name.rpartition("-")[0], *rest) for name, *rest in _rows(specs, root)]  # without the hash
        order = ("running", "failed", "unreadable", "interrupted", "done", "waiting")
        console_rows = max(5, console.size.height - 6)
        for row in sorted(rows, key=lambda row: order.index(row[1]))[:console_rows]:
            table.add_row(*row)
        if len(rows) > console_rows:
            table.caption = f"and {len(rows) - console_rows} more"
        return table

    console = Console(stderr=True)
    with Live(get_renderable=draw, console=console, refresh_per_second=0.5, redirect_stdout=False):
        yield


def collect(args: argparse.Namespace) -> None:
    """Let a policy act in an environment, store the episodes as a Minari dataset and print its id."""
    from diffagents.data import collect as collecting

    agent = policy(args)
    settings = _options(args, "seed", "noise", "deterministic", "root") | {"env_kwargs": env_arguments(args) or None}
    with contextlib.redirect_stdout(sys.stderr):
        collecting.collect(agent, environment(args, agent), args.steps, args.id, verbose=1, **settings)
    print(args.id)


def data(args: argparse.Namespace) -> None:
    """Say what is in a dataset, what looks wrong in it, and how to begin with it.

    Data that cannot be used are described array by array; the exit code is 1 then.
    """
    from diffagents.experiments import describe as describing

    page = args.html.expanduser() if args.html is not None else None
    if page is not None:  # before any work
        if page.is_dir():
            raise IsADirectoryError(f"--html {page} is a folder: pass the name of a file in it")
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("--html needs matplotlib: pip install matplotlib")
        page.parent.mkdir(parents=True, exist_ok=True)
        existed = page.exists()
        page.open("a").close()
        if not existed:
            page.unlink()
    with contextlib.redirect_stdout(sys.stderr):
        report = describing.describe(args.dataset, **_options(args, "env", "obs_keys", "quick"))
    print(json.dumps(report.to_json(), allow_nan=False) if args.json else report, flush=True)
    if page is not None:
        with replacing(page, "the page") as part:
            part.write_text(report.to_html(), encoding="utf-8")
        say(f"wrote {args.html}")
    if report.refused is not None:
        raise ValueError(report.refused)


def select(args: argparse.Namespace) -> None:
    """Rank policies by what data say about them, without an environment; print the best one, and the table to stderr."""
    from diffagents.experiments import select as selecting

    names = ("rule", "gamma", "fqe_steps", "n_seeds", "max_transitions", "n_episodes", "top", "env", "seed", "device")
    with contextlib.redirect_stdout(sys.stderr):
        selection = selecting.select(args.policies, args.dataset, **_options(args, *names))
        print(selection)
    if not selection[selection.best].trusted:
        raise ValueError("no estimate can be trusted: play episodes with --episodes, or use other data")
    print(json.dumps(selection.to_json()) if args.json else selection.best)


def tune(args: argparse.Namespace) -> None:
    """Search the main hyperparameter of an algorithm, without an environment; save the best policy and print its folder."""
    from diffagents.experiments import tune as tuning

    if args.out.exists():
        raise FileExistsError(f"{args.out} exists: pass another --out")
    check_new_folder(args.out, storage=args.storage)
    search = _options(args, "n_trials", "hyperparameter", "low", "high", "objective", "n_episodes", "storage")
    if args.knob is not None:
        search["knob"] = args.knob
    settings = _options(args, "steps", "env", "seed", "device") | preset(args)
    with contextlib.redirect_stdout(sys.stderr):
        report = tuning.tune(args.algorithm, args.dataset, **search, **settings)
        report.agent.save_pretrained(args.out, include_trainer_state=True)
        print(report)
    print(args.out)


def _options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that the library's function takes under the same name."""
    return {name: getattr(args, name) for name in names}
