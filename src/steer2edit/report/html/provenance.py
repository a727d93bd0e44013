"""Where a run comes from: its recipe, stages, versions, and the commands that make it again."""

from __future__ import annotations

import shlex
from typing import Any

from .contents import REASONS, Contents


def provenance(contents: Contents) -> dict[str, Any]:
    manifest = contents.manifest
    versions = dict(manifest.get("versions", {}))
    own = manifest.get("steer2edit", "")
    folder = shlex.quote(f"runs/{contents.recipe.name}")
    stages = []
    for stage in contents.stages:
        files = [{"name": file, "sha256": digest} for file, digest in stage.entry.get("files", {}).items()]
        model = {**stage.entry.get("model", {}), "commit": stage.entry.get("commit")}
        stages.append(
            {
                "name": stage.name,
                "state": stage.state,
                "reason": REASONS[stage.state],
                "seconds": stage.entry.get("seconds"),
                "model": ", ".join(f"{key} {value}" for key, value in model.items() if value is not None),
                "files": files,
            }
        )
    versions = {"steer2edit": own, **versions}
    # A build's own name, like +cpu, is not on the package index.
    pins = [f"{package}=={version.partition('+')[0]}" for package, version in versions.items()]
    return {
        "recipe": contents.recipe.to_yaml(),
        "stages": stages,
        "versions": versions,
        "machine": dict(manifest.get("machine", {})),
        "commands": [
            shlex.join(["pip", "install", *pins]),
            f"steer2edit run recipe.yaml --out {folder}",
            f"steer2edit inspect {folder}",
        ],
    }
