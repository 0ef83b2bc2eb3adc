"""The files of the demo's Space agree with setup.py, which installs the same page elsewhere."""

import ast
import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
README = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")


def read_setup():
    """What the package needs, and what its extra `demo` adds."""
    nodes = list(ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))))
    (needed,) = (node.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "install_requires")
    (extra,) = (
        value
        for node in nodes
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "demo"
    )
    return ast.literal_eval(needed), [Requirement(line) for line in ast.literal_eval(extra)]


def test_requirements_are_the_packages():
    needed, _ = read_setup()
    assert (ROOT / "demo" / "requirements.txt").read_text(encoding="utf-8").splitlines() == needed


def test_settings_of_the_space():
    settings = yaml.safe_load(README.split("---")[1])
    assert settings["sdk"] == "gradio" and (ROOT / "demo" / settings["app_file"]).is_file()
    (gradio,) = (requirement for requirement in read_setup()[1] if requirement.name == "gradio")
    assert gradio.specifier.contains(settings["sdk_version"])
    python = re.search(r'python_requires="(.+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    assert Requirement(f"python{python}").specifier.contains(settings["python_version"])
    assert len(settings["short_description"]) <= 60


def test_the_files_that_the_space_is_filled_with():
    for source in re.findall(r"cp (?:-r )?([\w./-]+)(?:/\*)? ", README):
        assert (ROOT / source.removesuffix("/")).is_dir(), source
