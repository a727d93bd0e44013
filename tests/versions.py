"""Runs the core's tests with other versions of the dependencies: `python tests/versions.py oldest`, or `newest`.

The oldest versions are the bounds in pyproject.toml, the newest those that the registry has within the bounds. They are
put into an environment of their own, in front of everything else of this one. torch stays as it is: its other versions
are builds for CUDA of several gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LEFT_OUT = frozenset(("torch",))
# Their other dependencies are installed by transformers, too.
NEED_TORCH = frozenset(("accelerate", "peft"))
# The mathematics, edits and their files, the probe, live models: what depends on other libraries most closely.
TESTS = ("tests/method", "tests/probing", "tests/artefacts", "tests/models", "tests/test_edit.py", "tests/test_cli.py")
MARKS = "not slow and not vllm and not llama_cpp and not browser"


def requirements(which: str) -> list[str]:
    """What to install, as pip takes it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [text for text in project["dependencies"] if Requirement(text).name not in LEFT_OUT]
    if which == "newest":
        return wanted
    return [exact for text in wanted if (exact := oldest(text)) is not None]


def oldest(requirement: str) -> str | None:
    """The oldest version that a requirement allows; None if it allows any.

    >>> oldest("peft>=0.18"), oldest("transformers<6,>=5.20"), oldest("tokenizers")
    ('peft==0.18', 'transformers==5.20', None)
    """
    parsed = Requirement(requirement)
    bounds = [one.version for one in parsed.specifier if one.operator == ">="]
    return f"{parsed.name}=={bounds[0]}" if bounds else None


def environment(which: str) -> Path:
    """The interpreter of an environment with these versions; everything else is this one's."""
    folder = ROOT / f".venv-{which}"
    venv.create(folder, with_pip=False, clear=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    wanted = requirements(which)
    need_torch = [text for text in wanted if Requirement(text).name in NEED_TORCH]
    subprocess.run([*pip, "install", "-q", *(text for text in wanted if text not in need_torch)], check=True)
    subprocess.run([*pip, "install", "-q", "--no-deps", *need_torch], check=True)
    subprocess.run([*pip, "list"], check=True)
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    behind = [str(ROOT / "src"), *sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})]
    Path(packages, "behind.pth").write_text("\n".join(behind) + "\n", encoding="utf-8")
    return python


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in ("oldest", "newest"):
        print("Say which versions: oldest or newest.", file=sys.stderr)
        return 2
    python = environment(arguments[0])
    settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-n", "2", "-m", MARKS, *TESTS]
    return subprocess.run(command, cwd=ROOT, env=settings, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
