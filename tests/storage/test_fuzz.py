"""Mutated artifacts: each acts as the one it was made from, or is refused by our own error. No crash, code, hang or bloat.

A mutant is made from a stored agent (tests/data/format1) by `mutate(Random(f"{seed} {number}"), ...)`, so a case that fails
is made again from its number alone: `python tests/test_fuzz.py NUMBER` prints what it does.

What may change actions, and nothing else (`may_act_otherwise`): other values of tensors in model.safetensors, under the same
names, shapes and dtypes (a local folder has no checksum; the Hub's files are hashed); the action space; the knobs of which the
algorithm's `predict` takes a choice, and those in ACTING_KNOBS; `counters.policy_missing`, which says that there is no policy.
"""

import contextlib
import copy
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from small_agents import NAMES, agent_class
from write_format_fixture import FOLDER, LARGE, OBS, toy_data

import diffagents
from diffagents import ArtifactError
from diffagents.agent import Agent
from diffagents.storage import artifact, card
from diffagents.types import Spec

Files = dict[str, bytes]
CONFIG, STATE = artifact.CONFIG, artifact.TRAINER_STATE
SECONDS = 20  # a case may take, with all that is done to it
GROWTH = 500 << 20  # bytes that the process may grow by, and address space beyond what it has
ACTING_KNOBS = {"IDQL": ("expectile",), "DiffusionBC": ("ema_tau",)}
HOSTILE = (
    "<script>alert(1)</script>",
    "<!-- -->",
    "a | b |\n| c",
    "---\nlicense: evil\n---",
    "x\n```\n# y\n```",
    "\x1b[31m\x00\x07\r",
    "\ud800",
    "\u202ezyx\u2028\u0085",
    "../../x",
    "/etc/passwd",
    "[a](javascript:b)",
    "$\\frac{$",
    "ä" * 1000,
    "x" * 100_000,
    "{0.__class__}%s%n",
    "!!python/object/apply:os.system ['true']",
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 10**6, 10**9, 2**31, 2**63, 2**64, 10**400, -(10**30)),
    *(0.5, -0.0, 1e-308, 1e308, -1e308, 3e38, "inf", "-inf", "nan", "", "auto", "none", "float16", "uint8", "float64"),
    *([], {}, [[]], [1, [2]], [10**9], [10**6] * 3, {"a": 1}, {"": None}, "Box", "Dict", "arrays", *NAMES[:3], *HOSTILE),
)
# Sizes that would take all memory or time, put where a file may name them.
ABSURD: tuple[tuple[str, Any], ...] = (
    *((f"knobs.{knob}", size) for knob in ("n_critics", "n_candidates", "n_diffusion_steps") for size in (10**6, 10**9, 257)),
    *((f"knobs.{knob}", size) for knob in ("solver_steps", "average_top", "n_support") for size in (10**4, 10**6, 10**9)),
    *((f"knobs.{knob}", 10**9) for knob in ("batch_size", "behavior_batch_size", "n_support_states", "policy_freq")),
    *((f"knobs.{knob}", 1e300) for knob in ("temperature", "sampling_temperature", "guidance_scale", "beta", "max_action")),
    *((f"knobs.{knob}", 1e-300) for knob in ("temperature", "sampling_temperature", "guidance_scale", "beta")),
    *(("policy_kwargs.net_arch", arch) for arch in ([10**6] * 3, [16] * 10**5, {"pi": [10**9]}, [], [16.0, 16], [True] * 9)),
    *((f"policy_kwargs.behavior_{what}", size) for what in ("width", "blocks") for size in (10**9, 10**5, 17)),
    *((f"spec.{space}_space.shape", shape) for space in ("observation", "action") for shape in ([10**9], [1 << 40, 0], [-3])),
    *((f"spec.action_space.{end}", bound) for end in ("low", "high") for bound in (-3e38, 3e38, 1e-45, [-1, 1], [[-1, 1]])),
    *(("spec.action_space.dtype", dtype) for dtype in ("float16", "float64", "int8", "uint32", "int64", "complex64", "O")),
    *((f"counters.{name}", count) for name in ("num_timesteps", "n_updates") for count in (10**18, 10**400, 1.5)),
    *(("seed", seed) for seed in (2**64, 2**63, 10**30, 1.0, "0")),
)


# ---- what is mutated -------------------------------------------------------------------------------------------------


class Base(NamedTuple):
    """An unmutated artifact, its agent's class and actions, and files that fit elsewhere."""

    kind: str
    cls: type[Agent]
    files: Files
    others: dict[str, Files]  # by whose they are: the same class's with other weights, and another class's
    actions: np.ndarray


def unzipped(name: str) -> Files:
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as archive:
        return {member: archive.read(member) for member in archive.namelist()}


def told(files: Files) -> Files:
    """The same agent, with all that a card tells."""
    config = json.loads(files[CONFIG])
    evaluations = [{"num_timesteps": 12 * i, "mean_return": -3.0 + i} for i in range(4)]
    source = {"repo_id": "someone/policy", "sha": "0" * 40}
    config["provenance"] = {
        "commands": ["python train.py"],
        "machine": "2 CPU cores",
        "seconds": 2.5,
        "evaluations": evaluations,
    }
    config["provenance"]["source"] = source
    config["dataset"] |= {"env_spec": json.dumps({"id": "Pendulum-v1"}), "made": {"seed": "1", "policy": "random"}}
    return {**files, CONFIG: json.dumps(config, indent=1).encode(), "README.md": b"# ours", "results.json": b"{}"}


def by_keys(files: Files) -> Files:
    """The same agent on a Dict observation."""
    config = json.loads(files[CONFIG])
    box = config["spec"]["observation_space"]
    parts = {"observation": {**box, "shape": [2]}, "desired_goal": {**box, "shape": [1], "low": [-9.0], "high": [9.0]}}
    config["spec"] |= {"observation_space": {"type": "Dict", "spaces": parts}, "obs_keys": list(parts)}
    return {**files, CONFIG: json.dumps(config).encode()}


def bases(scratch: Path, full: bool) -> list[Base]:
    """Agents of every class; full: also with the trainer state of those that are stored without it."""
    stored = {name: unzipped(name) for name in NAMES}
    if full:
        for name in LARGE:
            agent = diffagents.load(FOLDER / f"{name}.zip", device="cpu", verbose=0)
            agent.learn(toy_data(), total_timesteps=6)
            place = agent.save_pretrained(scratch / name, include_trainer_state=True)
            stored[name] = {file: (place / file).read_bytes() for file in artifact.MAX_BYTES}
    found = []
    for i, (name, files) in enumerate(stored.items()):
        pairs = safetensors.torch.load(files["model.safetensors"])
        twin = {key: value * 0.75 if value.is_floating_point() else value for key, value in pairs.items()}
        others = {"twin": {**files, "model.safetensors": safetensors.torch.save(twin)}, "other": stored[NAMES[i - 1]]}
        kinds = {
            "whole": told(files),
            "keys": by_keys({file: data for file, data in files.items() if file not in ("optimizer.safetensors", STATE)}),
            "acting": {file: files[file] for file in (CONFIG, "model.safetensors")},
        }
        for kind, content in kinds.items():
            place = put(content, scratch / f"{name}-{kind}")
            agent = diffagents.load(place, device="cpu", verbose=0)
            assert agent.spec is not None
            actions = agent.predict(observation(agent.spec), deterministic=True)[0]
            found.append(Base(f"{name} {kind}", agent_class(name), content, others, actions))
    return found


def put(files: Files, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def observation(spec: Spec) -> Any:
    """The numbers of OBS in the form that `spec` wants."""
    if spec.obs_keys is None:
        return OBS.reshape(len(OBS), *spec.observation_space.shape)  # type: ignore[misc]
    found, at = {}, 0
    for key in spec.obs_keys:
        shape = spec.observation_space[key].shape  # type: ignore[index]
        size = int(np.prod(shape))
        found[key], at = OBS[:, at : at + size].reshape(len(OBS), *shape), at + size
    return found


# ---- mutations: of bytes, files, JSON and safetensors ----------------------------------------------------------------


def flip(r: Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(r.randint(1, 8) if data else 0):
        # half of the flips where the structure is
        flipped[r.randrange(min(len(data), 400) if r.random() < 0.5 else len(data))] ^= 1 << r.randrange(8)
    return bytes(flipped)


def cut(r: Random, data: bytes) -> bytes:
    return data[: r.randrange(len(data))] if data else data


def append(r: Random, data: bytes) -> bytes:
    return data + r.randbytes(r.choice((1, 8, 1000)))


def leave_out(r: Random, data: bytes) -> bytes:
    at = r.randrange(len(data)) if data else 0
    return data[:at] + data[at + r.randint(1, 40) :]


def repeat(r: Random, data: bytes) -> bytes:
    at = r.randrange(len(data)) if data else 0
    return data[: at + r.randint(1, 40)] + data[at:]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path inside nested dicts and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*path, key)
        yield from places(item, (*path, key))


def inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def pick(r: Random, value: Any) -> tuple[Any, Any]:
    """The holder and key of a place; all depths alike, so that a long history does not take all the picks."""
    found = list(places(value))
    top = r.choice([path for path in found if len(path) == 1])
    path = r.choice([path for path in found if path[0] == top[0]])
    return inside(value, path[:-1]), path[-1]


def near(r: Random, value: Any) -> Any:
    """A value of the same type that is not it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return r.choice((value * 1000, value + 1, -value, value / 2, value * 1e30, value + 0.5, float(value)))
    if isinstance(value, str):
        return r.choice((value.upper(), value[::-1], value + "x", value + "\u0000", *HOSTILE))
    if isinstance(value, list):
        return r.choice((value[:-1], value + value, value[::-1], [value], value * 1000))
    return r.choice(({}, {"x": value}, list(value) if isinstance(value, dict) else [value]))


def json_text(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def drop(r: Random, value: Any) -> bytes:
    holder, key = pick(r, value)
    del holder[key]
    return json_text(value)


def swap(r: Random, value: Any) -> bytes:
    (first, a), (second, b) = pick(r, value), pick(r, value)
    first[a], second[b] = copy.deepcopy(second[b]), copy.deepcopy(first[a])
    return json_text(value)


def replace(r: Random, value: Any) -> bytes:
    holder, key = pick(r, value)
    holder[key] = copy.deepcopy(r.choice(ODD))
    return json_text(value)


def alter(r: Random, value: Any) -> bytes:
    holder, key = pick(r, value)
    holder[key] = near(r, holder[key])
    return json_text(value)


def rename_key(r: Random, value: Any) -> bytes:
    holder, key = pick(r, value)
    if isinstance(holder, dict):
        holder[r.choice((*HOSTILE, str(key).upper(), "x"))] = holder.pop(key)
    return json_text(value)


def add_key(r: Random, value: Any) -> bytes:
    holder, _ = pick(r, value)
    if isinstance(holder, dict):
        holder[r.choice(HOSTILE)] = r.choice(ODD)
    else:
        holder.append(r.choice(ODD))
    return json_text(value)


def absurd(r: Random, value: Any) -> bytes:
    known = [(path.split("."), size) for path, size in ABSURD]
    path, size = r.choice(
        [(p, size) for p, size in known if p[0] in value and p[-1] in inside(value, tuple(p[:-1]))] or known[:1]
    )
    with contextlib.suppress(KeyError, TypeError):
        inside(value, tuple(path[:-1]))[path[-1]] = size
    return json_text(value)


def literal(r: Random, value: Any) -> bytes:
    """What json.dumps would not write: NaN, 1e999, deep nesting, thousands of digits, one key twice."""
    holder, key = pick(r, value)
    holder[key] = "@here@"
    deep = "[" * r.choice((100, 900, 100_000))
    text = r.choice(("NaN", "-Infinity", "1e999", "9" * 5000, deep + "1" + "]" * len(deep), '"\\ud800"', '"a\nb"', "1,", "01"))
    if isinstance(holder, dict) and r.random() < 0.3:
        text = f'1, {json.dumps(key)}: "again"'
    return json_text(value).replace(b'"@here@"', text.encode())


def take_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def header(r: Random, data: bytes) -> bytes:
    """A header that says something else of the same bytes."""
    found, body = take_header(data)
    names = [name for name in found if name != "__metadata__"]
    a, b = (r.choice(names) for _ in range(2))
    one, two = found[a], found[b]
    what = r.randrange(14)
    if what == 0:
        one["shape"] = one["shape"][::-1]
    elif what == 1:
        one["shape"] = r.choice(([], [0], [-1], [10**9], [2**63, 2], [1.5], "x", [*one["shape"], 1], [1, *one["shape"]], None))
    elif what == 2:
        one["dtype"] = r.choice(("F16", "BF16", "F64", "I32", "U32", "BOOL", "C64", "F8_E4M3", "x", 1, None))
    elif what == 3:
        one["data_offsets"] = r.choice(([0, 0], [0, 10**12], [8, 0], [-8, 0], two["data_offsets"], [0], None, [2**63, 2**64]))
    elif what == 4:  # two tensors exchange their bytes
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    elif what == 5:
        found[r.choice((*HOSTILE, a.upper(), a + "x", "policy." + a))] = found.pop(a)
    elif what == 6:
        del found[a]
    elif what == 7:
        found[r.choice(HOSTILE)] = dict(one)
    elif what == 8:
        found["x"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    elif what == 9:
        found["__metadata__"] = r.choice(({"format": "np"}, {"x": 1}, [], {HOSTILE[0]: HOSTILE[1]}, {"x": "y" * 10**6}))
    elif what == 10:
        return with_header(json.dumps(found)[:-1].encode() + f", {json.dumps(a)}: {json.dumps(two)}}}".encode(), body)
    elif what == 11:
        return struct.pack("<Q", r.choice((0, 1, 2**63, 10**8, len(data)))) + data[8:]
    elif what == 12:
        found[a], found[b] = two, one
    else:
        return with_header(r.choice((b"", b"[]", b"null", b"{" * 9999, b"{}", b'{"x":' * 999)), body)
    return with_header(found, body)


def values(r: Random, data: bytes) -> bytes:
    """A well-formed file with other tensors in it."""
    tensors = safetensors.torch.load(data)
    key = r.choice(list(tensors))
    tensor = tensors[key].clone()
    odd = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e15, -1.0, 0.0, 1e-40)
    what = r.randrange(8)
    if what < 4 and tensor.numel():
        tensor.view(-1)[r.randrange(tensor.numel())] = r.choice(odd) if tensor.is_floating_point() else r.randrange(100)
    elif what == 4 and tensor.is_floating_point():
        tensor.fill_(r.choice(odd))
    elif what == 5:
        tensor = tensor.t().contiguous() if tensor.ndim == 2 else tensor[None]
    elif what == 6:
        tensor = tensor.to(r.choice((torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint64)))
    else:
        tensor = r.choice((tensor[:0] if tensor.ndim else tensor[None], torch.zeros(10**6), torch.zeros(0, 10**9)))
    return safetensors.torch.save({**tensors, key: tensor})


BYTES = (flip, flip, cut, append, leave_out, repeat)
JSON = (drop, swap, replace, replace, alter, alter, rename_key, add_key, absurd, absurd, literal)
TENSORS = (header, header, values)


def one_of_the_files(r: Random, files: Files, others: dict[str, Files]) -> str:
    """Delete, copy or exchange whole files."""
    a, b = r.choice([*files, CONFIG]), r.choice([*files, "learner.safetensors", "optimizer.safetensors", STATE])
    what = r.randrange(5)
    if what == 0:
        files.pop(a, None)
        return f"without {a}"
    if what == 1:
        files[a], files[b] = files.get(b, b""), files.get(a, b"")
        return f"{a} <-> {b}"
    if what == 2:
        files[b] = files.get(a, b"")
        return f"{a} as {b}"
    if what == 3:
        files[r.choice(("README.md", "results.json", "curves.png", "evil.py", "model.pkl"))] = r.randbytes(50)
        return "garbage beside"
    whose = r.choice(list(others))
    name = r.choice(list(others[whose]))
    files[name] = others[whose][name]
    return f"{whose}'s {name}"


def mutate(r: Random, files: Files, others: dict[str, Files]) -> str:
    """Change `files` in place; what was done, in words."""
    how = r.choices(("bytes", "json", "tensors", "files"), (3, 8, 4, 2))[0]
    if how == "files":
        return one_of_the_files(r, files, others)
    jsons = [CONFIG] * 3 + [name for name in (STATE,) if name in files]
    tensors = [name for name in files if name.endswith(".safetensors")] or [CONFIG]
    name = r.choice({"bytes": sorted({*files, CONFIG}), "json": jsons, "tensors": sorted(tensors)}[how])
    change: Callable[[Random, Any], bytes] = r.choice({"bytes": BYTES, "json": JSON, "tensors": TENSORS}[how])
    try:
        files[name] = change(r, json.loads(files[name]) if how == "json" else files[name])
    except Exception:  # there is nothing in it to change, or an earlier mutation garbled it
        files[name], change = flip(r, files.get(name, b"")), flip
    return f"{change.__name__} {name}"


# ---- what must hold of a mutant --------------------------------------------------------------------------------------


def zip_of(files: Files) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return data.getvalue()


def content(place: Path) -> Files:
    """What an artifact holds, read by other means than ours; what cannot be read is left out."""
    if place.is_dir():
        return {path.name: path.read_bytes() for path in place.iterdir()}
    found = {}
    with contextlib.suppress(Exception), zipfile.ZipFile(place) as archive:
        for name in archive.namelist():
            with contextlib.suppress(Exception):
                found[name] = archive.read(name)
    return found


def leaves(config: Any) -> dict[str, str]:
    """Path -> JSON of every value that is no dict."""
    if not isinstance(config, dict) or not config:
        return {"": json.dumps(config)}
    return {f".{key}{path}": text for key, value in config.items() for path, text in leaves(value).items()}


def may_act_otherwise(base: Base, after: Files) -> bool:
    """Whether a difference of the files is one of those that may change actions."""
    try:
        old, new = (safetensors.torch.load(files["model.safetensors"]) for files in (base.files, after))
        if old.keys() == new.keys() and any(old[key].numpy().tobytes() != new[key].numpy().tobytes() for key in old):
            return all(old[key].shape == new[key].shape and old[key].dtype == new[key].dtype for key in old)
        before, now = (leaves(json.loads(files[CONFIG])) for files in (base.files, after))
    except Exception:
        return False
    changed = {path for path in before.keys() | now.keys() if before.get(path) != now.get(path)}
    knobs = "|".join((*base.cls.CHOICE, *ACTING_KNOBS.get(base.cls.__name__, ())))
    return any(re.match(rf"\.spec\.action_space\b|\.knobs\.({knobs})$|\.counters\.policy_missing$", path) for path in changed)


class Hang(BaseException):
    """No `except Exception` catches it."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """In a loop of cases: address space and growth are bounded, and a pickle that is opened is an error."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise CodeRun("a pickle was opened")

    def ring(number: int, frame: Any) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, ring)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((torch, "load"), (sys.modules["pickle"], "load"), (sys.modules["pickle"], "loads")):
            patch.setattr(module, name, never)
        resource.setrlimit(resource.RLIMIT_AS, (size + GROWTH, hard))
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class CodeRun(BaseException):
    """A file was about to be run."""


WATCHED = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
OURS = (sys.prefix, sys.base_prefix, str(Path(diffagents.__file__).parents[1]), "/proc/", "/dev/")
_watching: list[Path] = []  # the artifact that is being loaded


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Code that runs, or a file that is opened and is neither one of the artifact's four nor the library's own."""
    if not _watching:
        return
    bad = event in WATCHED or (event == "exec" and args[0].co_filename.startswith("<string"))
    if event == "open" and isinstance(args[0], str):
        path = Path(args[0])
        if path.is_relative_to(_watching[0]):
            bad = path != _watching[0] and path.name not in artifact.MAX_BYTES
        else:  # a module's text is read where torch notes down a stack
            bad = not args[0].startswith(OURS) and path.suffix != ".py"
    if bad:
        raise CodeRun(f"{event} {args[:1]}")


sys.addaudithook(_watch)


def peak() -> int:
    """The most bytes that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


REFUSALS = (
    *("truncated or damaged zip", "truncated or damaged", "nested too deep", "finite)", "not JSON", "not an object"),
    *(
        "what this version writes",
        "contains NaN or infinity",
        "which no agent of this library uses",
        "unexpected tensor",
        "has the unexpected",
    ),
    *(
        "another network or version",
        "another network or space",
        "contains negative numbers",
        "has only",
        "this optimiser has only",
    ),
    *(
        "not a diffagents artifact",
        "names the library",
        "has the format",
        "from a newer",
        "names no algorithm",
        "contains an agent of ",
    ),
    *(
        "has the algorithm",
        "has no model.safetensors",
        "is missing",
        "not a safetensors file",
        "neither a zip nor a folder",
    ),
    *("files, or the same name twice", "unsafe file name", "zip bomb", "bytes, more than"),
)
"""What the table counts refusals by."""


class Outcome(NamedTuple):
    kind: str  # "identical", "changed", "refused", "no policy" or a complaint
    detail: str = ""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_actions(agent: Agent, actions: np.ndarray, n: int) -> None:
    space = agent.action_space
    assert actions.shape == (n, *space.shape) and actions.dtype == space.dtype, f"{actions.shape} {actions.dtype}, not {space}"
    assert np.isfinite(actions).all(), f"actions that are not finite: {actions.ravel()[:4]}"
    assert (actions >= space.low).all() and (actions <= space.high).all(), f"outside {space}: {actions.ravel()[:4]}"


def check_card(text: str) -> None:
    """Front matter that YAML reads, tables of two columns, no HTML but ours."""
    parts = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    assert parts is not None
    front, body = parts.groups()
    meta = yaml.safe_load(front)
    assert meta["library_name"] == "diffagents" and meta["license"] == "mit", front[:200]
    body = body.replace(card.MARK, "")
    lines = re.sub(r"(?ms)^```python\n.*?^```$", "", body).splitlines()
    for line in lines:
        plain = re.sub(r"\\.", "", line)
        assert "<" not in plain and "`" not in plain, f"markup on the card: {line[:100]!a}"
        assert not plain.startswith("|") or plain.count("|") == 3, f"a broken table: {line[:100]!a}"
    assert sum(line.startswith("## ") for line in lines) == 3 and sum(line.startswith("# ") for line in lines) == 1


def outcome(base: Base, place: Path, deep: bool) -> Outcome:
    """What a mutant does. deep: learn and publish with it too. Raises what must not be."""
    before = peak()
    _watching.append(place)
    try:
        agent = diffagents.load(place, device="cpu", verbose=0)
    except (ArtifactError, FileNotFoundError) as error:
        text = str(error).replace(str(place), "")
        if isinstance(error, FileNotFoundError) and place.exists():
            raise
        assert len(text) < 500 and text.isprintable(), f"a message of {len(text)} signs: {text[:200]!a}"
        return Outcome("refused", next((kind for kind in REFUSALS if kind in text), text))
    finally:
        _watching.clear()
    assert agent.spec is not None
    obs = observation(agent.spec)
    allowed = may_act_otherwise(base, content(place))
    one = {key: value[0] for key, value in obs.items()} if isinstance(obs, dict) else obs[0]
    try:
        actions = agent.predict(obs, deterministic=True)[0]
        check_actions(agent, actions, len(OBS))
        check_actions(agent, agent.predict(obs)[0], len(OBS))
        check_actions(agent, agent.predict(one)[0][None], 1)
    except RuntimeError as error:
        if allowed and re.search("has no policy yet|NaN or infinity", one_line(error)):
            return Outcome("no policy")
        raise
    same = actions.shape == base.actions.shape and np.array_equal(actions, base.actions) and actions.dtype == base.actions.dtype
    assert same or allowed, f"other actions: {actions.ravel()[:3]} for {base.actions.ravel()[:3]}"
    assert peak() - before < GROWTH / 4, f"{(peak() - before) >> 20} MiB to load and act"
    if deep:
        try:
            published = agent.save_pretrained(place.parent / "published", include_trainer_state=True)
        except (ValueError, RuntimeError) as error:
            raise AssertionError(f"save_pretrained: {type(error).__name__}: {str(error)[:200]!a}") from error
        check_card((published / "README.md").read_text())
        again = diffagents.load(published, device="cpu", verbose=0).predict(obs, deterministic=True)[0]
        assert np.array_equal(again, actions), "published, it acts otherwise"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # bounds from the data
            try:
                agent.learn(toy_data(), total_timesteps=2 * len(agent.STAGE_SHARES))
            except (ValueError, RuntimeError) as error:  # TrainingDiverged is one
                if "\n" in str(error) or len(str(error)) > 1000:
                    raise
    return Outcome("identical" if same else "changed")


class Case(NamedTuple):
    number: int
    label: str
    outcome: Outcome
    seconds: float


def run_case(number: int, found: list[Base], scratch: Path, deep: Callable[[int], bool]) -> Case:
    r = Random(f"diffagents {number}")
    base = found[number % len(found)]
    files = dict(base.files)
    label = " and ".join(mutate(r, files, base.others) for _ in range(r.choice((1, 1, 1, 2))))
    shutil.rmtree(scratch / "published", ignore_errors=True)
    place = put(files, scratch / "mutant")
    if r.random() < 0.25:
        data = zip_of(files)
        place = scratch / "mutant.zip"
        shutil.rmtree(scratch / "mutant")
        place.write_bytes(flip(r, data[::-1])[::-1] if r.random() < 0.3 else data)  # its directory is at its end
        label += ", zipped"
    started = time.monotonic()
    signal.alarm(SECONDS)
    try:
        result = outcome(base, place, deep(number))
    except (Exception, CodeRun, Hang) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/diffagents/" in f.filename]
        at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        result = Outcome(type(error).__name__, f"{str(error)[:300]!a}{at}")
    finally:
        signal.alarm(0)
        (scratch / "mutant.zip").unlink(missing_ok=True)
    return Case(number, f"{base.kind}: {label}", result, time.monotonic() - started)


def fuzz(numbers: range, scratch: Path, full: bool, deep: Callable[[int], bool]) -> list[Case]:
    found = bases(scratch, full)
    for base in found[:: 3 if full else 33]:  # what is imported late is imported before memory is bounded
        outcome(base, put(base.files, scratch / "mutant"), True)
        shutil.rmtree(scratch / "published")
    with limits():
        return [run_case(number, found, scratch, deep) for number in numbers]


GOOD = ("identical", "changed", "refused", "no policy")


def complaints(cases: list[Case]) -> str:
    bad = [f"{c.number} ({c.label}): {c.outcome.kind} {c.outcome.detail}" for c in cases if c.outcome.kind not in GOOD]
    return "\n".join(bad)


def test_a_mutant_acts_the_same_or_is_refused(tmp_path: Path) -> None:
    cases = fuzz(range(204), tmp_path, False, lambda number: number % 12 == 0)
    assert not complaints(cases)
    kinds = Counter(case.outcome.kind for case in cases)
    assert kinds["refused"] > 60 and kinds["identical"] > 30


@pytest.mark.slow
def test_thousands_of_mutants(tmp_path: Path) -> None:
    first, last = (int(n) for n in os.environ.get("DIFFAGENTS_FUZZ", "0:2000").split(":"))
    cases = fuzz(range(first, last), tmp_path, True, lambda number: number % 2 == 0)
    print("\n" + table(cases))
    assert not complaints(cases)


def table(cases: list[Case]) -> str:
    kinds = Counter(case.outcome.kind for case in cases)
    why = Counter(case.outcome.detail for case in cases if case.outcome.kind == "refused")
    slow = sorted(cases, key=lambda case: -case.seconds)[:8]
    lines = [f"{n:6} {kind}" for kind, n in kinds.most_common()]
    lines += [f"{n:6} refused: {detail}" for detail, n in why.most_common()]
    return "\n".join(lines + [f"{c.seconds:6.1f} s {c.number} {c.label}" for c in slow])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for case in fuzz(range(int(sys.argv[1]), int(sys.argv[-1]) + 1), Path(folder), True, lambda number: True):
            print(*case)
