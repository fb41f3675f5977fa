"""Writes the model card, the README.md of a published policy, from its config.json and results.json alone.

The front matter is for the Hub: library, task, datasets of the Hub, and a model-index with the exact names of algorithm and
environment. The text is for people who want to judge the policy or train it again.
"""

import html
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from diffagents.errors import printable
from diffagents.evaluation.statistics import mean_interval, success_interval

MARK = "<!-- made by diffagents: take this line out to keep your own changes from being overwritten -->"
"""The line by which a generated card is recognised; cards without it are never overwritten."""
MINARI_ON_HUB = {
    "D4RL": ("antmaze", "door", "hammer", "kitchen", "pen", "pointmaze", "relocate"),
    "mujoco": (
        *("ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverteddoublependulum", "invertedpendulum"),
        *("pusher", "reacher", "swimmer", "walker2d"),
    ),
}
"""The namespaces of Minari's sets with continuous actions, and their groups. Minari keeps a namespace in one dataset repository
of its organisation on the Hub, `farama-minari/<namespace>`."""


class Paper(NamedTuple):
    """The paper of an algorithm.

    Attributes:
        title: Its title.
        source: Authors, venue and year, short.
        link: Its address.
        role: What the algorithm is to the paper: the beginning of the sentence that ends with the title.
    """

    title: str
    source: str
    link: str
    role: str = "is the algorithm of"


_DIFFUSION_QL = Paper(
    "Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning",
    "Wang, Hunt and Zhou, ICLR 2023",
    "https://arxiv.org/abs/2208.06193",
)
PAPERS = {
    "SRPO": Paper(
        "Score Regularized Policy Optimization through Diffusion Behavior",
        "Chen et al., ICLR 2024",
        "https://arxiv.org/abs/2310.07297",
    ),
    "DiffusionQL": _DIFFUSION_QL,
    "DiffCPS": Paper(
        "DiffCPS: Diffusion Model based Constrained Policy Search for Offline Reinforcement Learning",
        "He et al. 2023",
        "https://arxiv.org/abs/2310.05333",
    ),
    "BDPO": Paper(
        "Behavior-Regularized Diffusion Policy Optimization for Offline Reinforcement Learning",
        "Gao et al., ICML 2025",
        "https://arxiv.org/abs/2502.04778",
    ),
    "QGPO": Paper(
        "Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling in Offline Reinforcement Learning",
        "Lu et al., ICML 2023",
        "https://arxiv.org/abs/2304.12824",
    ),
    "SfBC": Paper(
        "Offline Reinforcement Learning via High-Fidelity Generative Behavior Modeling",
        "Chen et al., ICLR 2023",
        "https://arxiv.org/abs/2209.14548",
    ),
    "DiffusionBC": _DIFFUSION_QL._replace(role="is a baseline of"),
    "BC": Paper(
        "ALVINN: An Autonomous Land Vehicle in a Neural Network",
        "Pomerleau, NIPS 1988",
        "https://proceedings.neurips.cc/paper/1988/hash/812b4ba287f5ee0bc9d43bbf5bbe87fb-Abstract.html",
        role="is behaviour cloning, as in",
    ),
    "IDQL": Paper(
        "IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies",
        "Hansen-Estruch et al. 2023",
        "https://arxiv.org/abs/2304.10573",
    ),
    "IQL": Paper(
        "Offline Reinforcement Learning with Implicit Q-Learning",
        "Kostrikov, Nair and Levine, ICLR 2022",
        "https://arxiv.org/abs/2110.06169",
    ),
    "TD3BC": Paper(
        "A Minimalist Approach to Offline Reinforcement Learning",
        "Fujimoto and Gu, NeurIPS 2021",
        "https://arxiv.org/abs/2106.06860",
    ),
    "AWR": Paper(
        "Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement Learning",
        "Peng et al. 2019",
        "https://arxiv.org/abs/1910.00177",
    ),
}
"""Algorithm name -> its paper. From a link to arXiv the Hub makes a tag and a link on the paper's page."""
_LINK = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp):|:(?=//)")
_WWW = re.compile(r"(?i)\bwww\.")


def data_env(config: Mapping[str, Any]) -> str | None:
    """The id of the environment in a config's dataset; None if there is none."""
    fields = _env_spec(config)
    return _word(fields["id"]) if fields else None


def _env_spec(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The spec of the environment in a config's dataset; None if there is none, or it makes no sense."""
    data = config.get("dataset")
    try:
        fields = json.loads(data["env_spec"]) if isinstance(data, Mapping) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("id"), str) else None


def stored_env(config: Mapping[str, Any]) -> str | None:
    """The environment in a config's dataset with all that is stored of it, in words; None if there is none."""
    env, spec = data_env(config), _env_spec(config)
    if env is None or spec is None:
        return None
    kwargs = spec.get("kwargs") or {}
    kwargs = {
        **(kwargs if isinstance(kwargs, dict) else {"kwargs": kwargs}),
        "max_episode_steps": spec.get("max_episode_steps"),
    }
    try:
        words = ", ".join(f"{_word(name)}={_word(repr(value))}" for name, value in kwargs.items() if value is not None)
    except RecursionError:
        words = "nested arguments"
    return f"{env} with {words}" if words else env


ACTS_ONLY = "the networks that only training needs are not in this folder: the policy acts, and cannot be trained further"
"""The note of a card whose folder has no learner.safetensors."""


def make_card(
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    *,
    name: str,
    license: str = "mit",
    pictures: Collection[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Write the model card of the agent that `config` describes.

    Args:
        config: The content of config.json.
        results: The content of results.json; None if nothing was evaluated.
        name: The name by which others load the policy: a repository id or the name of a folder.
        license: Licence of the policy, as the Hub spells it.
        pictures: Which of curves.png and replay.mp4 are in the same folder as the card.
        notes: Sentences to add at the end, e.g. about pictures that could not be made.

    Returns:
        The text of README.md.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, ArithmeticError: `config` or `results` was not written by this library.
    """
    try:
        return _make_card(config, results, name, license, pictures, notes)
    except RecursionError:
        raise ValueError("something in it is nested too deeply") from None


def _make_card(
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    name: str,
    license: str,
    pictures: Collection[str],
    notes: Sequence[str],
) -> str:
    """`make_card`, which may also raise RecursionError."""
    import yaml

    algorithm = str(config["algorithm"])
    if not (algorithm.isascii() and algorithm.isidentifier()):  # it becomes part of a program
        raise ValueError("the algorithm has no name of letters and digits")
    env = _word(results["env_id"]) if results and results.get("env_id") else data_env(config)
    front = yaml.safe_dump(_metadata(config, results, algorithm, env, license), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n{MARK}\n",
        f"# {plain(algorithm)}{f' on {plain(env)}' if env else ''}\n",
        *_against_data(config, results),
        _score(results),
        *_paper(algorithm),
        _use(config, results, algorithm, name, env),
        *(["![Curves of the training](curves.png)\n"] if "curves.png" in pictures else []),
        *(['<video src="replay.mp4" controls loop></video>\n'] if "replay.mp4" in pictures else []),
        _table("Data", _data_rows(config)),
        _table("Training", _training_rows(config)),
        _table("Hyperparameters", _hyperparameter_rows(config)),
        *(f"Note: {plain(note)}\n" for note in notes),
    ]
    return "\n".join(parts)


def _metadata(
    config: Mapping[str, Any], results: Mapping[str, Any] | None, algorithm: str, env: str | None, license: str
) -> dict[str, Any]:
    """The front matter."""
    tags = [env, "offline-rl", "diffusion", "reinforcement-learning", "deep-reinforcement-learning", algorithm]
    meta: dict[str, Any] = {
        "library_name": "diffagents",
        "pipeline_tag": "reinforcement-learning",
        "license": _word(license),
        "tags": [tag for tag in tags if tag],
    }
    if datasets := _datasets(config):
        meta["datasets"] = datasets
    source = (config.get("provenance") or {}).get("source")
    if isinstance(source, dict):
        meta["base_model"] = _word(source.get("repo_id"))
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
        dataset["args"] = {"dataset": _word(config["dataset"]["id"])}
    task = {"type": "reinforcement-learning", "name": "offline-rl"}
    meta["model-index"] = [{"name": algorithm, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return meta


def _datasets(config: Mapping[str, Any]) -> list[str]:
    """The repositories of the Hub that hold the dataset; empty if none is known to.

    The Hub expects ids of its own dataset repositories here, and the id of a dataset in `load_dataset` is none. Only sets that
    Minari publishes are named, because an id that does not exist, or that belongs to somebody else, would be a false statement.
    """
    data = config.get("dataset")
    if not isinstance(data, Mapping) or data.get("kind") != "minari":
        return []
    namespace, *rest = str(data.get("id")).split("/")
    published = len(rest) == 2 and rest[0] in MINARI_ON_HUB.get(namespace, ())
    return [f"farama-minari/{namespace}"] if published else []


def _paper(algorithm: str) -> list[str]:
    """The sentence that links the paper of an algorithm; empty for an algorithm of the user's own."""
    paper = PAPERS.get(algorithm)
    return [f"{algorithm} {paper.role} [{paper.title}]({paper.link}) ({paper.source}).\n"] if paper else []


def _against_data(config: Mapping[str, Any], results: Mapping[str, Any] | None) -> list[str]:
    """The sentences that compare the policy with the episodes of its dataset; empty if the two cannot be compared.

    They can if the policy was evaluated in the environment of the dataset, for more than one episode, and if the dataset has
    rewards. They cannot if successes are counted apart from the return, unless there is a score: a success often ends an
    episode, as in PushT, and failing for longer earns a higher return. The comparison is called open if the 95 % interval of
    the policy's mean contains the mean of the data.
    """
    data = config.get("dataset")
    if results is None or not results.get("returns") or not isinstance(data, Mapping) or not data.get("n_episodes"):
        return []
    ours, theirs, interval = results["mean_reward"], data.get("mean_return"), mean_interval(results["returns"])
    if interval is None or type(theirs) is not float or not math.isfinite(theirs):
        return []
    if theirs == 0 and not data.get("std_return"):  # no rewards were recorded
        return []
    if results.get("env_id") is None or results["env_id"] != data_env(config):  # two unknown ones may differ, too
        return []
    if results.get("normalized_score") is not None:
        _, zero, hundred = results["score_reference"]
        scores = (100 * (value - zero) / (hundred - zero) for value in (ours, theirs))
        numbers = "{:.1f} against {:.1f} on the D4RL scale".format(*scores)
    elif _counts_successes(results, theirs):
        numbers = f"{100 * ours:.0f} % against {100 * theirs:.0f} % of the episodes succeed"
    elif results.get("success_rate") is not None:
        return []
    else:
        numbers = f"a mean return of {ours:.2f} against {theirs:.2f}"
    if interval[0] <= theirs <= interval[1]:
        verdict = "It is neither clearly better nor clearly worse than its data"
        remark = "The 95 % interval of the first number contains the second, the mean of the episodes in the dataset."
    else:
        verdict = "It beats its data" if ours > theirs else "It stays below its data"
        remark = "The second number is the mean of the episodes in the dataset."
    return [f"**{verdict}: {numbers}.** {remark}\n"]


def _counts_successes(results: Mapping[str, Any], data_return: float) -> bool:
    """Whether the return is 1 for a success and 0 otherwise, in the evaluation and in the data."""
    rate = results.get("success_rate")
    return rate is not None and abs(results["mean_reward"] - rate) < 1e-6 and 0.0 <= data_return <= 1.0


def _score(results: Mapping[str, Any] | None) -> str:
    """The paragraph about the policy's score and its uncertainty."""
    if results is None:
        return "This policy has not been evaluated.\n"
    lines = []
    if "mean_reward" in results:
        interval = mean_interval(results["returns"]) if results.get("returns") else None  # others' tools may leave them out
        mean = "" if interval is None else "; 95 % interval of the mean over these episodes {:.2f} to {:.2f}".format(*interval)
        how = "deterministic actions" if results["is_deterministic"] else "sampled actions"
        episodes, seed = plain(results["n_eval_episodes"]), plain(results["seed"])
        lines.append(
            f"**Return {results['mean_reward']:.2f} ± {results['std_reward']:.2f}** of the last policy: "
            f"{episodes} episodes, {how}, environment seeds from {seed}{mean}. "
            "This is one training seed; others may score differently."
        )
        if results.get("normalized_score") is not None:
            table, zero, hundred = results["score_reference"]
            ends = [] if interval is None else [100 * (end - zero) / (hundred - zero) for end in interval]
            scaled = " [{:.1f}, {:.1f}]".format(*ends) if ends else ""
            lines.append(
                f"D4RL normalized score: {results['normalized_score']:.1f}{scaled} "
                f"({plain(table)}: 0 is a return of {zero:g}, 100 a return of {hundred:g})."
            )
        if results.get("success_rate") is not None:
            rate = f"Success rate: {100 * results['success_rate']:.0f} % of the episodes"
            if results.get("successes"):
                rate += " (95 % interval {:.0f} to {:.0f} %)".format(
                    *(100 * end for end in success_interval(results["successes"]))
                )
            lines.append(f"{rate}.")
    else:
        lines.append("The last policy has not been evaluated.")
    if best := results.get("best_in_training"):
        lines.append(
            f"\nBest score seen while training (biased upwards, as the maximum of several; not the policy in these files): "
            f"{best['mean_return']:.2f} after {best['num_timesteps']:,} steps."
        )
    return "\n".join(lines) + "\n"


def _how(config: Mapping[str, Any], results: Mapping[str, Any] | None) -> tuple[str, str]:
    """The arguments of `predict` and of `evaluate` with which the policy acts as in its evaluation; empty if it is meant to."""
    meant = (config.get("knobs") or {}).get("deterministic")  # absent if the algorithm leaves no choice
    evaluated = (results or {}).get("is_deterministic", meant)
    how = "" if meant is None or evaluated == meant else f", deterministic={bool(evaluated)}"
    choice = _literals((results or {}).get("choice") or {})
    if not choice:
        return how, how
    one_by_one = "".join(f", {name}={value}" for name, value in choice.items())
    together = ", ".join(f"{json.dumps(name)}: {value}" for name, value in choice.items())
    return how + one_by_one, f"{how}, choice={{{together}}}"


def _literals(choice: Mapping[str, Any]) -> dict[str, str]:
    """Hyperparameters as literals of Python. They become part of a program, and may come from a stranger's file."""
    for name, value in choice.items():
        word = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", value)
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) or not (word or type(value) in (int, float, bool)):
            raise ValueError("results has a choice that is not a number or a word with the name of a hyperparameter")
    return {name: json.dumps(value) if isinstance(value, str) else repr(value) for name, value in choice.items()}


def _episodes(results: Mapping[str, Any] | None) -> str:
    """The arguments of `evaluate` that repeat the episodes of the card; ten episodes if it has none."""
    if results is None or type(results.get("n_eval_episodes")) is not int:
        return "n_episodes=10"
    seed = results.get("seed", 0)
    return f"n_episodes={results['n_eval_episodes']}" + (f", seed={seed}" if type(seed) is int and seed != 0 else "")


def _use(config: Mapping[str, Any], results: Mapping[str, Any] | None, algorithm: str, name: str, env: str | None) -> str:
    """How to load the policy and to repeat the evaluation of the card: a program that runs as it is."""
    to_predict, to_evaluate = _how(config, results)
    where = "" if env == data_env(config) else f"{json.dumps(env)}, "  # `evaluate` finds the environment of the dataset
    at_once = ", n_envs=10" if env else ""  # an environment of the user's own is a single one
    call = f"print(agent.evaluate({where if env else 'env, '}{_episodes(results)}{at_once}{to_evaluate}))"
    if env is None:
        call = f"# {call}  # env: your environment, or its id"
    elif results is not None and "mean_reward" in results:
        call += "  # the episodes of this card"
    return f"""```python
from diffagents import {algorithm}

agent = {algorithm}.from_pretrained({json.dumps(name)})
{call}

obs = agent.observation_space.sample()  # in your program what the environment returns: one observation, or a batch
action, _ = agent.predict(obs{to_predict})
```

The files contain only JSON and safetensors: loading them runs no code.
"""


def _data_rows(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Metadata of the dataset."""
    data = config.get("dataset") or {}
    made = data.get("made") or {}
    transform = config.get("reward_transform") or {}
    rows = [
        ("dataset", data.get("id")),
        ("kind", data.get("kind")),
        ("environment", stored_env(config)),
        *((key.replace("_", " "), made[key]) for key in sorted(made)),
        ("steps, episodes", f"{data.get('n_steps')}, {data.get('n_episodes')}" if data.get("n_steps") else None),
        ("mean return of the episodes", _number(data.get("mean_return")) if data.get("n_steps") else None),
        ("sha256 of the arrays", data.get("sha256")),
        ("observation keys", ", ".join(data.get("obs_keys") or ())),
        ("rewards", f"{transform['name']}: {transform['scale']:.6g} r {transform['shift']:+.6g}" if transform else None),
    ]
    return [(name, value) for name, value in rows if value not in (None, "")]


def _training_rows(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """How the policy was trained."""
    provenance, counters = config.get("provenance") or {}, config.get("counters") or {}
    steps = dict(counters.get("stage_steps") or {})
    if (online := counters.get("n_updates", 0) - sum(steps.values())) > 0 and counters.get("n_env_steps"):
        steps["online"] = online
    source, others = provenance.get("source"), provenance.get("trained_together")
    minutes = f"{provenance['seconds'] / 60:.1f} minutes" if isinstance(provenance.get("seconds"), float) else None
    rows = [
        ("gradient steps", ", ".join(f"{stage} {n:,}" for stage, n in steps.items())),
        ("environment steps", counters.get("n_env_steps") or None),
        ("seed", config.get("seed")),
        ("preset", config.get("preset")),
        ("time", f"{minutes} for {others} policies trained together" if minutes and others else minutes),
        ("machine", provenance.get("machine")),
        *(("command", command) for command in provenance.get("commands") or ()),
        ("started from", f"{source.get('repo_id')} at {source.get('sha')}" if isinstance(source, dict) else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in (config.get("versions") or {}).items())),
    ]
    return [(name, value) for name, value in rows if value not in (None, "")]


def _hyperparameter_rows(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All hyperparameters; those that the user set are marked."""
    explicit = set(config.get("explicit") or ())
    rows = [(f"{name} (set)" if name in explicit else name, value) for name, value in (config.get("knobs") or {}).items()]
    return [*rows, *((f"policy_kwargs.{name}", value) for name, value in (config.get("policy_kwargs") or {}).items())]


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    """A section with a table of two columns."""
    body = "\n".join(f"| {plain(name)} | {plain(value)} |" for name, value in rows)
    return f"## {title}\n\n| | |\n|---|---|\n{body}\n"


def _number(value: Any) -> str | None:
    """A float with two decimals; None for anything else."""
    return f"{value:.2f}" if isinstance(value, float) else None


def plain(value: Any) -> str:
    """A value as text without markup that fits in a table cell: it may come from a stranger's file."""
    text = html.escape(re.sub(r"([|`*\[\]\\!])", r"\\\1", _word(value)), quote=False)
    text = _WWW.sub(lambda match: match[0][:-1] + "&#46;", _LINK.sub(lambda match: match[0][:-1] + "&#58;", text))
    return text.replace("@", "&#64;")  # otherwise links and mentions are made of bare addresses and names


def _word(value: Any) -> str:
    """A value as one line of at most 500 characters that can be shown."""
    return printable(" ".join(str(value).split())[:500])
