"""What can be served beside the original model: edit files and runs, each under a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..edits import Combination, Edit, Scores, load_any
from ..engines.plan import Model, refuse_remote_code
from ..errors import EditError, FileError, ModelError, RecipeError
from ..files.gallery import GALLERY, folder_of
from ..files.reading import read_json
from ..files.schema import parse
from ..method.site import layers_of
from ..models.embedded import EMBEDDED, HUB_NAMES
from ..recipe import load_recipe
from ..report.inspection import MANIFEST, changed_files

# Signs with a meaning in a model's name: a strength follows one, another edit the other.
STRENGTH, AND = "@", "+"
BASE = "base"


@dataclass(frozen=True, repr=False)
class Source:
    """An edit, and what a run knows beside it.

    Attributes:
        scores: for other ρ and α, and for steering; a run has them.
        gamma: the steering strength that the run chose, if it chose one.
        layers: those to which the run restricts its edit, as "8-20".
        model: the model section of the run's recipe.
    """

    name: str
    edit: Edit | Combination
    scores: Scores | None = None
    gamma: float | None = None
    layers: str | None = None
    model: Model | None = None

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {self.edit!r})"

    def with_budget(self, *, rho_attn: float | None, rho_mlp: float | None, alpha: float) -> Edit:
        """The edit at another (ρ, α), in the layers that the run edits and preserving what the run preserves.

        Raises:
            EditError: ρ ≤ 0 or α outside [0, 1), or the edit has no (ρ, α) to change.
        """
        edit = self.edit
        if not isinstance(edit, Edit):
            raise EditError("a combination has no (ρ, α) to change", got=edit.id, fix="Change its strength.")
        if edit.preserving and self.scores is not None:  # the file alone does not hold the evidence
            how = edit.preserving
            other = self.scores.edit(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha, layers=self.layers, **how)
            return other.with_strength(edit.strength)
        other = edit.with_budget(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha)
        return other if self.layers is None else other.only(layers_of(self.layers))

    @property
    def base(self) -> str | None:
        """The name of the model that the edit is of, as its file says."""
        names = {str(part.provenance.get("probe", {}).get("model", "")) for part in self.edit.parts} - {""}
        known = {hub: name for name, hub in HUB_NAMES.items()}
        return known.get(name := names.pop(), name) if len(names) == 1 else None


def open_source(text: str) -> Source:
    """Opens an edit file or a run directory.

    Args:
        text: its path, or `gallery:NAME`, or NAME=PATH. Without a name an edit file has that of the file, a run that of
            its folder.

    Raises:
        FileError: there is no edit. RecipeError: the name has a sign in it that means something.
    """
    name, equals, place = text.partition("=")
    path = Path(place if equals and not Path(text).exists() else text)
    if path == Path(text):
        name = path.resolve().name if path.is_dir() else path.stem.removeprefix(GALLERY)
    path = folder_of(path)
    if not name or name == BASE or any(sign in name for sign in (STRENGTH, AND)) or not name.isprintable():
        raise RecipeError(
            "an edit cannot be served under that name",
            got=name or "no name",
            fix=f"Give another as NAME={path}: without {STRENGTH} and {AND}, and not {BASE}.",
        )
    if not path.is_dir():
        return Source(name, load_any(path))
    if not (path / "edit.safetensors").is_file():
        raise FileError("there is no edit in the folder", got=path, fix="Give an edit file, or a finished run.")
    if (path / MANIFEST).is_file():
        _refuse_changed(path)
    edit, scores, gamma, layers, model = load_any(path / "edit.safetensors"), None, None, None, None
    if (path / "scores.safetensors").is_file():
        scores = Scores.load(path / "scores.safetensors")
    if (path / "choice.json").is_file():
        choice = read_json(path / "choice.json")
        gamma, layers = _config(choice, "steering").get("gamma"), _config(choice, "edit").get("layers")
    if (path / "recipe.yaml").is_file():
        model = load_recipe(path / "recipe.yaml").model
    return Source(name, edit, scores, gamma, layers, model)


def _refuse_changed(run: Path) -> None:
    """Raises FileError if what is served of a run is not as the run wrote it."""
    for name in changed_files(run):
        if name in ("edit.safetensors", "scores.safetensors", "choice.json"):
            raise FileError(
                f"{run / name} is not as the run wrote it",
                got="another checksum than its manifest has",
                fix=f"`steer2edit run {run}` makes it again.",
            )


def _config(choice: Any, kind: str) -> dict[str, Any]:
    """What a run's `choice.json` holds of a method; nothing if none was chosen."""
    brief = choice.get(kind) if isinstance(choice, dict) else None
    return dict((brief or {}).get("config", {}))


def open_sources(texts: Sequence[str]) -> list[Source]:
    """Opens several. Raises RecipeError if two have the same name."""
    sources = [open_source(text) for text in texts]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError("two edits have the same name", got=name, fix="Give one of them another, as NAME=PATH.")
    return sources


def section_of(
    model: str | None,
    sources: Sequence[Source],
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Model:
    """How the model is loaded: as a run's recipe says, under another name if one is given.

    Args:
        model: a Hub id, folder, `.gguf` file or `embedded:…`; None is the model of the first source.
        trust_remote_code: the model's own code may run. A run's recipe, which may be a stranger's, cannot allow it.

    Raises:
        ModelError: no model is named, or its code would have to run.
    """
    of_runs = [source.model for source in sources if source.model is not None]
    changes = {name: value for name, value in (("dtype", dtype), ("device", device)) if value != "auto"}
    if of_runs and (model is None or of_runs[0].name == model):
        section = parse(Model, of_runs[0].model_dump(mode="json") | changes)
        refuse_remote_code(section, trust_remote_code)
        return section
    name = model or next((source.base for source in sources if source.base), None)
    if name is None:
        raise ModelError("no model is named", got="an edit file that names none", fix=f"Give --model, like {EMBEDDED}.")
    return parse(Model, {"name": name, "trust_remote_code": trust_remote_code} | changes)
