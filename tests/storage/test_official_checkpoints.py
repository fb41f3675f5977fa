"""Files that only pretend to be the authors' checkpoints are refused with one ValueError, before they take memory."""

import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffagents import SRPO, DiffusionQL
from diffagents.storage import official_checkpoints

z = torch.zeros
CRITIC: dict[str, Tensor] = {
    f"q{j}_model.{i}.{kind}": value
    for j in (1, 2)
    for i, layer in enumerate([(z(8, 5), z(8)), (z(1, 8), z(1))])
    for kind, value in zip(("weight", "bias"), layer, strict=True)
}
ACTOR: dict[str, Tensor] = {
    "time_mlp.1.weight": z(32, 16),
    "time_mlp.1.bias": z(32),
    "time_mlp.3.weight": z(16, 32),
    "time_mlp.3.bias": z(16),
    "mid_layer.0.weight": z(8, 21),
    "mid_layer.0.bias": z(8),
    "final_layer.weight": z(2, 8),
    "final_layer.bias": z(2),
}
WIDE = z(100_000, 1)
BAD: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {
    "no first layer": ({k: v for k, v in ACTOR.items() if k != "mid_layer.0.weight"}, CRITIC),
    "critic without dimensions": (ACTOR, {**CRITIC, "q1_model.0.weight": z(()), "q2_model.0.weight": z(())}),
    "betas without dimensions": ({**ACTOR, "betas": torch.tensor(1.0)}, CRITIC),
    "no betas": ({**ACTOR, "betas": z(0)}, CRITIC),
    "a number as a name": ({1: z(1)}, CRITIC),
    "twins differ": (ACTOR, {**CRITIC, "q2_model.0.weight": z(9, 5)}),
    "expanded": ({**ACTOR, "mid_layer.0.weight": z(1).expand(10**6, 10**6)}, CRITIC),
    "expanded in every way": ({**ACTOR, **{f"x.{i}": WIDE[:] for i in range(50)}}, CRITIC),
    "sparse": ({**ACTOR, "mid_layer.0.weight": z(8, 21).to_sparse()}, CRITIC),
    "meta": ({**ACTOR, "mid_layer.0.weight": torch.empty(8, 21, device="meta")}, CRITIC),
    "layers that do not fit": ({**ACTOR, "mid_layer.0.weight": WIDE, "mid_layer.2.weight": WIDE}, CRITIC),
}


@pytest.mark.parametrize("name", BAD)
def test_no_checkpoint_is_a_value_error(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_checkpoints, "_networks", lambda *_: pytest.fail("it takes memory already"))
    actor, critic = BAD[name]
    with pytest.raises(ValueError, match=r"checkpoint|networks of this algorithm") as caught:
        DiffusionQL.from_official(actor, critic, device="cpu")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    if name in ("sparse", "meta"):
        return
    torch.save(actor, tmp_path / "actor.pt")
    torch.save(critic, tmp_path / "critic.pt")
    with pytest.raises(ValueError, match=r"checkpoint|networks of this algorithm"):
        DiffusionQL.from_official(tmp_path / "actor.pt", tmp_path / "critic.pt", device="cpu")


def test_the_unchanged_one_loads() -> None:
    with pytest.warns(UserWarning, match="start as copies"):
        assert DiffusionQL.from_official(ACTOR, CRITIC, device="cpu", verbose=0).act_dim == 2


def test_srpo_of_single_tensors() -> None:
    names = ("q0.q1.0.bias", "q0.q2.0.bias", "q0_target.q1.0.bias", "q0_target.q2.0.bias", "vf.v.0.bias")
    with pytest.raises(ValueError, match="the state dicts do not contain the networks"):
        SRPO.from_official({"main.out_fc.bias": z(2)}, {name: z(8) for name in names}, device="cpu")


def write_escapes(path: pathlib.Path) -> None:
    path.write_bytes(b"\x80\x02c\x1b[2J\x1b]0;pwned\x07\nx\n.")


def write_compressed(path: pathlib.Path) -> None:
    torch.save({"x": z(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("write", [write_escapes, write_compressed])
def test_a_file_that_is_no_checkpoint_is_named(write: Callable[[pathlib.Path], None], tmp_path: pathlib.Path) -> None:
    write(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt is not a checkpoint of plain tensors \(.+\): save its") as caught:
        DiffusionQL.from_official(tmp_path / "x.pt", CRITIC)
    assert str(caught.value).isprintable()
