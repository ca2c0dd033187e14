"""rltoken works editable, as a wheel and without an install, from the repository's root and from elsewhere.

Each way of installing gets a virtual environment of its own that borrows the dependencies of the running one, and a
copy of the repository, so that neither the running environment's rltoken nor build left-overs can answer instead.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    ("editable", "root"),
    ("editable", "elsewhere"),
    ("wheel", "root"),
    ("wheel", "elsewhere"),
    ("checkout", "root"),
]
INSTALLED_FROM = {"rltoken": "rltoken", "rewards": "rltoken/rewards", "conf": "rltoken/conf"}
IMPORTS = """
import sys
import rltoken.rewards
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
with initialize_config_module("rltoken.conf", version_base="1.3"):
    assert "grpo" in GlobalHydra.instance().config_loader().get_group_options("exp")
assert not {"rewards", "conf"} & set(sys.modules), "imported under a second name"
print(rltoken.rewards.__file__)
"""


def run(command: list[str | Path], cwd: Path) -> str:
    """Run a command without the environment variables that change what Python imports; return its standard output."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the repository installs from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in INSTALLED_FROM:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, checkout]
    run([sys.executable, *build], cwd=folder)
    shutil.rmtree(checkout / "build")
    return next(folder.glob("rltoken-*.whl"))


@pytest.fixture(scope="module")
def pythons(checkout, wheel, tmp_path_factory) -> dict[str, Path]:
    """The Python of one virtual environment for each way of installing."""
    dependencies = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    sources = {"editable": ["--editable", checkout], "wheel": [wheel], "checkout": []}
    pythons = {}
    for how, source in sources.items():
        folder = tmp_path_factory.mktemp(how)
        venv.create(folder, symlinks=True, with_pip=False)
        python = folder / "bin" / "python"
        site_packages = next(folder.glob("lib/python*/site-packages"))
        # A path named in a .pth file comes after the environment's own, and its own .pth files (the editable installs
        # of the running environment) are not read.
        (site_packages / "dependencies.pth").write_text("\n".join(dependencies))
        if source:
            options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet"]
            run([sys.executable, "-m", "pip", "--python", python, "install", *options, *source], cwd=folder)
        pythons[how] = python
    return pythons


@pytest.fixture(params=PAIRS, ids="-".join)
def place(request, pythons, checkout, tmp_path) -> tuple[Path, Path, Path]:
    """(Python, working directory, folder that rltoken.rewards must come from) of one pair."""
    how, where = request.param
    python = pythons[how]
    comes_from = python.parents[1] if (how, where) == ("wheel", "elsewhere") else checkout / "rewards"
    return python, checkout if where == "root" else tmp_path, comes_from


def test_environments_are_isolated(pythons, tmp_path):
    """Without an install there is no rltoken elsewhere: the five pairs prove something."""
    found = run([pythons["checkout"], "-c", "import importlib.util as u; print(u.find_spec('rltoken'))"], tmp_path)
    assert found.strip() == "None"


def test_rewards_and_conf_are_found(place):
    python, cwd, comes_from = place
    file = run([python, "-c", IMPORTS], cwd).strip()
    assert Path(file).is_relative_to(comes_from)


def test_help(place):
    python, cwd, _ = place
    assert "exp" in run([python, "-m", "rltoken.train", "--help"], cwd)


@pytest.mark.slow
@pytest.mark.smoke
def test_two_steps(place, tmp_path):
    python, cwd, _ = place
    settings = ["+exp=grpo", "name=two-steps", f"runs_dir={tmp_path / 'runs'}", "trainer.max_steps=2"]
    settings += ["model.source.steps=2", f"model.source.cache_dir={tmp_path}", "eval.limit=4", "eval.samples=1"]
    run([python, "-m", "rltoken.train", *settings], cwd)
    assert (tmp_path / "runs" / "two-steps" / "metrics.jsonl").stat().st_size > 0


def test_wheel_is_complete(wheel):
    """Everything under rltoken/, rewards/ and conf/ is in the wheel, and no other top-level name."""
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in INSTALLED_FROM.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == sources, "a new sub-package or kind of data file must be listed in pyproject.toml"


def test_rewards_and_conf_have_one_name():
    """A bare `rewards` or `conf` would be a second module object, with a second grader pool."""
    bare = re.compile(r"^\s*(?:from|import)\s+(?:rewards|conf)\b|_target_:\s*(?:rewards|conf)\.", re.MULTILINE)
    folders = ("rltoken", "rewards", "conf", "scripts", "tests")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in {".py", ".yaml"}]
    assert [path for path in files if bare.search(path.read_text())] == []
