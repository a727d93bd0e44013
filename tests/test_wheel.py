"""The wheel and the source distribution: what is in them, and that the wheel alone runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from runs import save_pico, tiny_recipe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "steer2edit"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel that was built from the source distribution, as `make dist` builds both."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def bare(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel. It sees this one's packages, but not its editable steer2edit.

    A path in a .pth file is added as it is: the .pth files in that folder, of which the editable install is one, are
    not read.
    """
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    wheel = next(dist.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", str(commands / "python")]
    installed = subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], capture_output=True)
    assert installed.returncode == 0, installed.stderr
    packages = subprocess.run(
        [commands / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(packages, "dependencies.pth").write_text("\n".join(sorted(here)) + "\n", encoding="utf-8")
    return commands


def run(bare: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(bare / arguments[0]), *map(str, arguments[1:])]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    own = {f"steer2edit/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*") if path.is_file()}
    own = {name for name in own if "__pycache__" not in name}
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == own
    kinds = ("py.typed", "__init__.pyi", "recipes/demo.yaml", "data/safety_prompts.jsonl")
    assert {f"steer2edit/{name}" for name in kinds} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith("plotly-cartesian.min.js") for name in names)


def test_the_source_distribution_builds_and_explains_itself(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert {"src/steer2edit/py.typed", "src/steer2edit/recipes/demo.yaml"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert not tops & {"tests", "runs", ".venv", "site", ".ci", "dist"}


def test_the_command_of_the_wheel_answers(bare: Path, tmp_path: Path) -> None:
    where = run(bare, "python", "-c", "import steer2edit; print(steer2edit.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(bare.parent)), where.stdout + where.stderr
    helped = run(bare, "steer2edit", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert helped.stdout.startswith("Usage: steer2edit ")
    listed = run(bare, "steer2edit", "recipes", cwd=tmp_path)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == sorted(
        path.stem for path in (PACKAGE / "recipes").glob("*.yaml")
    )
    assert run(bare, "python", "-m", "steer2edit", "recipes", cwd=tmp_path).stdout == listed.stdout


def test_the_demo_runs_from_the_wheel(bare: Path, tmp_path: Path) -> None:
    """The demo's recipe, its prompts and its page come out of the wheel; the model is a tiny one."""
    model = save_pico(tmp_path / "model")
    tiny = tiny_recipe(model)
    overrides = [f"model.name={model}", "search.layers=[null]", "search.baselines=[]", "search.rho_attn=[0.2]"]
    overrides += ["search.steering=[0.1]", "search.limits={over_refusal: null, degenerate: null}"]
    overrides += [f"data.{split}={{harmful: 2, benign: 2, borderline: 2}}" for split in ("probe", "validation", "test")]
    overrides += [f"evaluation.{name}={value}" for name, value in tiny.evaluation.model_dump().items()]
    done = run(bare, "steer2edit", "demo", *overrides, "--quiet", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "plotly" in page
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
