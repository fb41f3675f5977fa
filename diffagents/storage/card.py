"""The model card: README.md of a published policy, made from its config.json and results.json alone.

Its front matter is what the Hub reads (library, task, model-index with the exact names of algorithm and environment);
its text is what somebody needs to decide whether to trust the policy, and to make it again.
"""

import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MARK = "<!-- made by diffagents: take this line out to keep your own changes from being overwritten -->"


def data_env(config: Mapping[str, Any]) -> str | None:
    """The id of the environment that is stored with the dataset."""
    spec = (config.get("dataset") or {}).get("env_spec")
    try:
        return str(json.loads(spec)["id"]) if spec else None
    except (ValueError, TypeError, KeyError):
        return None


def make_card(
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    *,
    name: str,
    license: str = "mit",
    pictures: Collection[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """The card of the agent that `config` describes.

    results: what results.json holds, None where nothing was evaluated. name: the Hub id, or the folder. license: of the
    policy, an identifier that the Hub knows. pictures: which of curves.png and replay.mp4 lie beside the card. notes: what
    could not be made.
    """
    import yaml

    algorithm = str(config["algorithm"])
    env = str(results["env_id"]) if results and results.get("env_id") else data_env(config)
    front = yaml.safe_dump(_metadata(config, results, algorithm, env, license), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n{MARK}\n",
        f"# {_plain(algorithm)}{f' on {_plain(env)}' if env else ''}\n",
        _score(results),
        _use(algorithm, name, env, env == data_env(config)),
        *(["![Curves of the training](curves.png)\n"] if "curves.png" in pictures else []),
        *(['<video src="replay.mp4" controls loop></video>\n'] if "replay.mp4" in pictures else []),
        _table("Data", _data_rows(config)),
        _table("Training", _training_rows(config)),
        _table("Hyperparameters", _knob_rows(config)),
        *(f"Note: {_plain(note)}\n" for note in notes),
    ]
    return "\n".join(parts)


def _metadata(
    config: Mapping[str, Any], results: Mapping[str, Any] | None, algorithm: str, env: str | None, license: str
) -> dict[str, Any]:
    tags = [env, "offline-rl", "diffusion", "reinforcement-learning", "deep-reinforcement-learning", algorithm]
    meta: dict[str, Any] = {
        "library_name": "diffagents",
        "pipeline_tag": "reinforcement-learning",
        "license": license,
        "tags": [tag for tag in tags if tag],
    }
    source = (config.get("provenance") or {}).get("source")
    if isinstance(source, dict):
        meta["base_model"] = str(source.get("repo_id"))
    if results is None or "mean_reward" not in results or env is None:
        return meta
    metrics = [
        {"type": "mean_reward", "value": f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}", "name": "mean_reward"}
    ]
    if results.get("normalized_score") is not None:
        score = round(results["normalized_score"], 2)
        metrics.append({"type": "d4rl_normalized_score", "value": score, "name": "D4RL normalized score"})
    if results.get("success_rate") is not None:
        metrics.append({"type": "success_rate", "value": round(results["success_rate"], 4), "name": "success rate"})
    dataset: dict[str, Any] = {"name": env, "type": env}
    if (config.get("dataset") or {}).get("id"):
        dataset["args"] = {"dataset": str(config["dataset"]["id"])}
    task = {"type": "reinforcement-learning", "name": "offline-rl"}
    meta["model-index"] = [{"name": algorithm, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return meta


def _score(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "It has not been evaluated.\n"
    lines = []
    if "mean_reward" in results:
        low, high = results["interval"]
        how = "deterministic actions" if results["is_deterministic"] else "sampled actions"
        lines.append(
            f"**Return {results['mean_reward']:.2f} ± {results['std_reward']:.2f}** of the last policy: "
            f"{results['n_eval_episodes']} episodes, {how}, environment seeds from {results['seed']}; 95 % bootstrap interval "
            f"of the mean over these episodes {low:.2f} to {high:.2f}. One training seed: it says nothing about other seeds."
        )
        if results.get("normalized_score") is not None:
            table, zero, hundred = results["score_reference"]
            s_low, s_high = results["score_interval"]
            lines.append(
                f"On D4RL's scale {results['normalized_score']:.1f} [{s_low:.1f}, {s_high:.1f}] "
                f"({_plain(table)}: 0 is a return of {zero:g}, 100 of {hundred:g})."
            )
        if results.get("success_rate") is not None:
            lines.append(f"Success in {100 * results['success_rate']:.0f} % of the episodes.")
    else:
        lines.append("The last policy has not been evaluated.")
    if best := results.get("best_in_training"):
        lines.append(
            f"\nBest score seen while training (picked by its score, so it flatters; not the policy in these files): "
            f"{best['mean_return']:.2f} after {best['num_timesteps']:,} steps."
        )
    return "\n".join(lines) + "\n"


def _use(algorithm: str, name: str, env: str | None, stored: bool) -> str:
    where = "" if env is not None and stored else f"{json.dumps(env) if env else 'env'}, "
    loop = f"print(agent.evaluate({where}n_episodes=10))"
    return f"""```python
from diffagents import {algorithm}  # pip install diffagents

agent = {algorithm}.from_pretrained({json.dumps(name)})
action, _ = agent.predict(obs, deterministic=True)  # one observation or a batch, as the environment gives it
{loop}
```

It holds JSON and safetensors only; no code is run to load it.
"""


def _data_rows(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    data = config.get("dataset") or {}
    made = data.get("made") or {}
    transform = config.get("reward_transform") or {}
    rows = [
        ("dataset", data.get("id")),
        ("kind", data.get("kind")),
        *((key.replace("_", " "), made[key]) for key in sorted(made)),
        ("steps, episodes", f"{data.get('n_steps')}, {data.get('n_episodes')}" if data.get("n_steps") else None),
        ("mean return of its episodes", _number(data.get("mean_return")) if data.get("n_steps") else None),
        ("sha256 of its arrays", data.get("sha256")),
        ("observation keys", ", ".join(data.get("obs_keys") or ())),
        ("rewards", f"{transform['name']}: {transform['scale']:.6g} r {transform['shift']:+.6g}" if transform else None),
    ]
    return [(name, value) for name, value in rows if value not in (None, "")]


def _training_rows(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    came, counters = config.get("provenance") or {}, config.get("counters") or {}
    steps = dict(counters.get("stage_steps") or {})
    if (online := counters.get("n_updates", 0) - sum(steps.values())) > 0 and counters.get("n_env_steps"):
        steps["online"] = online
    source, others = came.get("source"), came.get("trained_together")
    minutes = f"{came['seconds'] / 60:.1f} minutes" if isinstance(came.get("seconds"), float) else None
    rows = [
        ("gradient steps", ", ".join(f"{stage} {n:,}" for stage, n in steps.items())),
        ("environment steps", counters.get("n_env_steps") or None),
        ("seed", config.get("seed")),
        ("preset", config.get("preset")),
        ("time", f"{minutes}, {others} policies together" if minutes and others else minutes),
        ("machine", came.get("machine")),
        *(("command", command) for command in came.get("commands") or ()),
        ("started from", f"{source.get('repo_id')} at {source.get('sha')}" if isinstance(source, dict) else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in (config.get("versions") or {}).items())),
    ]
    return [(name, value) for name, value in rows if value not in (None, "")]


def _knob_rows(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    explicit = set(config.get("explicit") or ())
    rows = [(f"{name} (set)" if name in explicit else name, value) for name, value in (config.get("knobs") or {}).items()]
    return [*rows, *((f"policy_kwargs.{name}", value) for name, value in (config.get("policy_kwargs") or {}).items())]


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    body = "\n".join(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows)
    return f"## {title}\n\n| | |\n|---|---|\n{body}\n"


def _number(value: Any) -> str | None:
    return f"{value:.2f}" if isinstance(value, float) else None


def _plain(value: Any) -> str:
    """A value, perhaps a stranger's, as text that stays in its table cell and is no markup."""
    text = " ".join(str(value).split())[:500]
    return re.sub(r"([|<>`*\[\]\\])", r"\\\1", text)


def draw_curves(history: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG: scores while training, if there were any, and every mean that `history` has; None without points to draw.

    Raises ImportError without matplotlib.
    """
    panels: dict[str, list[tuple[float, float]]] = {}
    for row in evaluations:
        panels.setdefault("return in training's evaluations", []).append((row["num_timesteps"], row["mean_return"]))
    for row in history:
        for name, value in row.items():
            if name not in ("num_timesteps", "stage", "stage_step") and isinstance(value, float):
                panels.setdefault(f"{row.get('stage')}: {name}"[:60], []).append((row.get("num_timesteps", 0), value))
    panels = {name: points for name, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * lines), layout="constrained")
    for i, (name, points) in enumerate(panels.items()):
        axis = figure.add_subplot(lines, columns, i + 1)
        axis.plot(*zip(*points, strict=True))
        axis.set_title(name, fontsize=8, parse_math=False)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("steps", fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
