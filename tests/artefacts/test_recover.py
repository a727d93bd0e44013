"""An edit found again from two weights, against edits that were made by hand."""

from __future__ import annotations

import pytest
import torch

from steer2edit.artefacts.audit import _sites, recover
from steer2edit.method.site import Site


def site_of(n: int, width: int, d: int) -> Site:
    return Site(0, "mlp" if width == 1 else "attn", "m", "m.weight", d, n, width)


@pytest.mark.parametrize(("n", "width"), [(4, 6), (40, 1)], ids=["heads", "neurons"])
def test_the_sign_of_the_direction_that_is_found_does_not_matter(n: int, width: int) -> None:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(24, n * width, generator=draw)
    u = torch.nn.functional.normalize(torch.randn(24, generator=draw), dim=0)
    k = torch.nn.functional.normalize((u @ weight).view(n, width), dim=1)
    lam = torch.randn(n, generator=draw)
    edited = weight + torch.outer(u, (lam[:, None] * k).flatten())
    for mine, there in ((weight, edited), (-weight, -edited)):  # −W turns k̂ and ΔW around, and λ back
        found = recover(site_of(n, width, 24), mine, there, top=n)
        assert (found["rank"], found["verdict"], found["components"]) == (1, "rank-1 component edit", n)
        assert dict(found["largest"]) == pytest.approx(dict(enumerate(lam.tolist())), abs=1e-4)


def test_a_weight_of_a_gguf_file_is_read_upright_whatever_its_family_stores() -> None:
    """GPT-2 stores its weights transposed in safetensors, and no GGUF file does."""
    torch.manual_seed(0)
    W, u = torch.randn(16, 16), torch.nn.functional.normalize(torch.randn(16), dim=0)
    k = torch.nn.functional.normalize((u @ W).view(4, 4), dim=1)
    row = (torch.tensor([0.0, 0.0, 0.5, 0.0])[:, None] * k).flatten()
    upright_site = Site(0, "attn", "attn.c_proj", "attn.c_proj.weight", d=16, n=4, width=4, transposed=True)
    (found,) = _sites([upright_site], W, W + torch.outer(u, row), 5, gguf=True)
    assert (found["verdict"], found["components"]) == ("rank-1 component edit", 1)
    (stored,) = _sites([upright_site], W.T, (W + torch.outer(u, row)).T, 5, gguf=False)
    assert stored["largest"] == [(2, pytest.approx(found["largest"][0][1]))]


def test_only_signs_of_zeros_are_told_as_such() -> None:
    weight = torch.zeros(24, 40)
    assert recover(site_of(40, 1, 24), weight, -weight)["verdict"] == "only signs of zeros"


def test_a_change_below_the_rounding_is_lost_in_it() -> None:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 64, generator=draw).bfloat16()
    step = weight.view(torch.int16)
    up = torch.rand(64, 64, generator=draw) < 0.05  # the next number of bf16, here and there
    edited = (step + up.to(torch.int16)).view(torch.bfloat16)
    found = recover(site_of(64, 1, 64), weight, edited)
    assert found["verdict"] != "rank-1 component edit"
