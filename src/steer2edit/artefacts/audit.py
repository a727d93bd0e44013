"""What was changed in a checkpoint.

`verify` compares it with the base and the edit, bit by bit; `diff` recovers the edit from base and checkpoint alone.
Neither loads weights into a model or holds more than a few tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.reading import sha256
from ..files.shards import Stored
from ..method.change import Changes, patched
from ..method.site import Site
from ..method.theorems import input_direction
from ..models.embedded import checkpoint_folder
from ..models.sites import find_sites
from ..parallel import in_parallel
from .audit_packed import both_dequantised, same_bytes, same_kind, same_metadata, tensor_reader, verify_packed
from .bases import open_base
from .checkpoint import JOURNAL, MANIFEST, OTHER_WEIGHTS, checkpoint_files
from .few_bits import WRITTEN
from .pieces import PackedPiece, Piece, pieces_of
from .places import upright

# Files that an export adds, the one that only lists where tensors are, and the one for people (the model card).
_OURS = {MANIFEST, JOURNAL, "model.safetensors.index.json", "README.md"}


def verify(base: str | Path, edit: Changes, edited: str | Path) -> dict[str, Any]:
    """Whether a checkpoint is the base with the edit in it, and nothing else.

    Returns:
        tensors: name → "equal", "edited as expected", "foreign" (with other content), "missing" or "extra".
        files: the same for all files that hold no tensors. counts: how many tensors of each kind.
        as_expected: whether every tensor and file is equal or edited as expected, and a tensor is edited.

    Raises:
        FileError: a folder is not a `safetensors` checkpoint, or a file not a GGUF file; or one of each is given.
        ModelError: the edit is another model's.

    >>> out = s2e.export_checkpoint(base, edit, f"{folder}/verified")
    >>> audit = s2e.verify(base, edit, out)
    >>> audit["as_expected"], audit["tensors"]["model.layers.0.self_attn.o_proj.weight"]
    (True, 'edited as expected')
    >>> s2e.verify(base, edit.with_strength(0.5), out)["as_expected"]
    False
    """
    base, edited = checkpoint_folder(base), Path(edited)
    opened, other_opened = open_base(base), open_base(edited)
    same_kind(opened, other_opened)
    base_tensors, edited_tensors = _by_name(opened.shards), _by_name(other_opened.shards)
    pieces: dict[str, list[Piece]] = {}
    packed: list[PackedPiece] = []
    for some in pieces_of(edit, opened).values():
        for piece in some:
            if isinstance(piece, PackedPiece):
                packed += [piece] if piece.reports else []
            else:
                pieces.setdefault(piece.tensor, []).append(piece)
    read, read_edited = tensor_reader(opened), tensor_reader(other_opened)
    rounded = verify_packed(packed, opened, other_opened)

    def one(name: str) -> str:
        if name not in edited_tensors:
            return "missing"
        a, b = base_tensors[name], edited_tensors[name]
        if (a.shape, a.dtype_name) != (b.shape, b.dtype_name):
            return "foreign"
        if name in rounded:
            return rounded[name]
        mine, other = read(name), read_edited(name)
        changed = [p for p in pieces.get(name, []) if p.change]
        if not changed:
            return "equal" if same_bytes(mine, other) else "foreign"
        return (
            "edited as expected"
            if all(_as_expected(p, mine, other) for p in changed) and _rest(changed, mine, other)
            else "foreign"
        )

    tensors = dict(zip(base_tensors, in_parallel(one, base_tensors), strict=True))
    tensors |= dict.fromkeys(edited_tensors.keys() - base_tensors.keys(), "extra")
    if opened.architecture:
        files = {"metadata": "equal" if same_metadata(opened, other_opened) else "foreign"}
    else:
        files = _files(base, edited, set(opened.shards), set(other_opened.shards))
    bad = {"foreign", "missing", "extra"}
    expected = not bad & {*tensors.values(), *files.values()} and "edited as expected" in tensors.values()
    return {
        "kind": "verify",
        "edit": edit.id,
        "tensors": tensors,
        "files": files,
        "counts": {word: list(tensors.values()).count(word) for word in dict.fromkeys(tensors.values())},
        "as_expected": expected,
        "as_told": expected,  # its name in version 0.1.0
    }


def _by_name(shards: Mapping[str, Mapping[str, Stored]]) -> dict[str, Stored]:
    return {name: stored for held in shards.values() for name, stored in held.items()}


def _part(piece: Piece, tensor: Tensor) -> Tensor:
    """The site's weight [d, n·c] in the tensor that holds it."""
    part = tensor[piece.site.expert] if tensor.dim() == 3 else tensor
    return part.T if piece.turned else part


def _as_expected(piece: Piece, mine: Tensor, other: Tensor) -> bool:
    assert piece.change is not None
    columns = piece.change.columns()
    a, b = _part(piece, mine), _part(piece, other)
    for start in range(0, len(a), 256):
        expected = a[start : start + 256].clone()
        rows = slice(start, start + len(expected))
        expected[:, columns] = patched(expected[:, columns], piece.change, columns, rows)
        if not same_bytes(expected, b[rows]):
            return False
    return True


def _rest(changed: Iterable[Piece], mine: Tensor, other: Tensor) -> bool:
    """Whether the experts that the edit leaves alone are the base's, in a tensor that holds several."""
    if mine.dim() != 3:
        return True
    edited = {piece.site.expert for piece in changed}
    return all(same_bytes(mine[i], other[i]) for i in range(len(mine)) if i not in edited)


def _files(base: Path, edited: Path, base_shards: set[str], edited_shards: set[str]) -> dict[str, str]:
    """What is not a tensor. Each side's own shards are left out: a file of the other's names would not be compared."""
    base_names = set(checkpoint_files(base)) - base_shards - _OURS
    edited_names = set(checkpoint_files(edited)) - edited_shards - _OURS
    words = dict.fromkeys(sorted(edited_names - base_names), "extra")
    for name in sorted(base_names):
        if name not in edited_names:
            words[name] = "missing"
        else:
            words[name] = "equal" if sha256(base / name) == sha256(edited / name) else "foreign"
    # An export leaves out weights in other formats, and lists them in its manifest.
    left_out = _left_out(edited)
    return {name: word for name, word in words.items() if word != "missing" or name not in left_out}


def _left_out(edited: Path) -> set[str]:
    from ..files.reading import read_json

    if not (edited / MANIFEST).is_file():
        return set()
    manifest = read_json(edited / MANIFEST)
    names = manifest.get("left_out") if isinstance(manifest, dict) else None
    names = names if isinstance(names, list) else []
    return {name for name in names if isinstance(name, str) and Path(name).suffix in OTHER_WEIGHTS}


def diff(base: str | Path, edited: str | Path, top: int = 5) -> dict[str, Any]:
    """What differs between two checkpoints of one shape, and whether it is a component edit of rank 1.

    For a weight that differs, D = W' − W is compared with u aᵀ, its best approximation of rank 1. The rest is compared
    with the rounding that the files' dtype explains. λ_i = a_i·k̂_i with k̂_i = W_iᵀu/‖W_iᵀu‖, whatever u's sign. A
    neuron (c = 1) has k̂_i = ±1, so any rank-1 change of an MLP's weight is aligned, and only heads are evidence.

    Returns:
        sites: for each site whose weight differs: its key and tensor, `rank` (how many singular values exceed the
            rounding), `share` of ‖D‖² in the first, `rounding` (the share of ‖D‖² that rounding explains), `aligned`
            (mean |cos(a_i, k̂_i)|, weighted by ‖a_i‖²), how many `components` changed, the `largest` λ, the verdict.
        others: names of other tensors that differ. verdict: whether all that differs is a component edit of rank 1.

    Raises:
        FileError: a folder is not a `safetensors` checkpoint. ModelError: the model is not supported.

    >>> out = s2e.export_checkpoint(base, edit, f"{folder}/compared")
    >>> differences = s2e.diff(base, out)
    >>> differences["sites"][0]["site"], differences["sites"][0]["verdict"], differences["others"]
    ('0.attn', 'rank-1 component edit', [])
    """
    from ..models.load import empty_model, load_config

    base, edited = Path(base), Path(edited)
    opened, other_opened = open_base(base), open_base(edited)
    same_kind(opened, other_opened)
    base_tensors, edited_tensors = _by_name(opened.shards), _by_name(other_opened.shards)
    read, read_edited = tensor_reader(opened), tensor_reader(other_opened)
    sites: dict[str, list[Site]] = {}
    packed: dict[str, list[Site]] = {}
    belonging: set[str] = set()
    base_sites = find_sites(empty_model(load_config(base)))
    for site in base_sites:
        stored = opened.packed(site)
        if stored is not None:
            packed.setdefault(stored.parts[0].tensor, []).append(site)
            belonging |= {part.tensor for part in stored.parts[1:] if part.role in WRITTEN}
            continue
        name = next((n for n in opened.names(site) if n in base_tensors), None)
        if name is not None:
            sites.setdefault(name, []).append(site)

    def one(name: str) -> list[dict[str, Any]] | str | None:
        a, b = base_tensors[name], edited_tensors.get(name)
        if b is None or (a.shape, a.dtype_name) != (b.shape, b.dtype_name):
            return name
        if name in belonging:
            return None  # the scales of a weight, which is compared as a whole
        if name in packed:
            rows = []
            for site in packed[name]:
                weights = both_dequantised(site, opened, other_opened)
                if weights is None:
                    return name
                mine, other, spacing = weights
                if not same_bytes(mine, other):
                    rows.append({"site": site.key, "tensor": name} | recover(site, mine, other, top, spacing))
            return rows
        mine, other = read(name), read_edited(name)
        if same_bytes(mine, other):
            return None
        if name not in sites or a.dtype is None:
            return name
        return list(_sites(sites[name], mine, other, top, opened.architecture != ""))

    rows: list[dict[str, Any]] = []
    others = sorted(edited_tensors.keys() - base_tensors.keys())
    for result in in_parallel(one, base_tensors):
        if isinstance(result, str):
            others.append(result)
        elif result:
            rows += result
    order = {site.key: i for i, site in enumerate(base_sites)}
    rows.sort(key=lambda row: order[row["site"]])
    return {
        "kind": "diff",
        "sites": rows,
        "others": others,
        "verdict": bool(rows) and not others and all(row["verdict"] == "rank-1 component edit" for row in rows),
    }


def _sites(sites: Iterable[Site], mine: Tensor, other: Tensor, top: int, gguf: bool) -> Iterator[dict[str, Any]]:
    for site in sites:
        fused = mine.dim() == 3 and site.expert is not None
        a, b = (tensor[site.expert] if fused else tensor for tensor in (mine, other))
        if not gguf:  # which stores every weight upright
            a, b = upright(site, a, fused), upright(site, b, fused)
        if not same_bytes(a, b):
            yield {"site": site.key, "tensor": site.tensor} | recover(site, a, b, top)


def recover(site: Site, W: Tensor, edited: Tensor, top: int = 5, spacing: Tensor | None = None) -> dict[str, Any]:
    """The rank-1 edit between two weights [d, n·c]: see `diff`.

    Args:
        spacing: the distance between the numbers that the edited weight's format can say, if it has few bits.
    """
    w = W.float()
    D = edited.float() - w
    power = float(D.double().square().sum())
    if not 0 < power < float("inf"):
        nothing = {"rank": 0, "share": 0.0, "rounding": 0.0, "aligned": 0.0, "components": 0, "largest": []}
        return nothing | {"verdict": "not finite" if power else "only signs of zeros"}
    # Rounding to the nearest moves a number by up to half a step, evenly: a variance of step²/12.
    changed = (D != 0).any(dim=0)
    spread = torch.zeros(1, 1)
    if spacing is not None:
        spread = spacing.double()[:, changed].square() / 12
    elif edited.dtype is not torch.float32:
        steps = 2.0 ** torch.frexp(edited.float()).exponent.double() * torch.finfo(edited.dtype).eps / 2
        spread = steps[:, changed].square() / 12
    noise = float(spread.sum()) + 1e-12 * power
    u, s, v = torch.svd_lowrank(D, q=min(6, *D.shape), niter=4)
    u, a = u[:, 0], s[0] * v[:, 0]
    left = max(0.0, power - float(s[0]) ** 2)
    # The largest singular value of noise alone is at most about the root of its strongest row and column.
    strongest = sum(float(spread.sum(dim=dim).max()) ** 0.5 for dim in (0, 1))
    floor = 3**0.5 * strongest + 1e-5 * float(s[0])
    along = (u @ w).view(site.n, site.width)
    k, _ = input_direction(along)
    rows = a.view(site.n, site.width)
    lam = (rows * k).sum(dim=1)  # [n]
    sizes = rows.square().sum(dim=1)
    cosines = lam.abs() / rows.norm(dim=1).clamp_min(1e-30)
    aligned = float((cosines * sizes).sum() / sizes.sum())
    touched = changed.view(site.n, site.width).any(dim=1)
    # The rest is at most a few times what rounding explains, and rounding does not explain the whole change.
    is_one = left <= 3 * noise + 1e-6 * power and float(s[0]) ** 2 > noise
    if not is_one:
        verdict = "no edit of rank 1" if power > 4 * noise else "lost in rounding"
    else:
        verdict = "rank-1 component edit" if aligned > 0.9 else "rank 1, not along what drives the components"
    largest = [(int(i), float(lam[i])) for i in lam.abs().topk(min(top, site.n)).indices if touched[i]]
    return {
        "rank": int((s > floor).sum()),
        "share": float(s[0]) ** 2 / power,
        "rounding": min(1.0, noise / power),
        "aligned": aligned,
        "components": int(touched.sum()),
        "largest": largest,
        "verdict": verdict,
    }
