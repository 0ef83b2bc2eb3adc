"""docs/ keeps its word: its Python runs, its commands and settings parse, what it names, links to and shows is there.

The slow tests train on a folder of one's own as docs/train.md says, and build the pages with Sphinx.
"""

import ast
import builtins
import importlib
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from PIL import Image
from tiny import build_pipeline
from tiny_data import draw_picture
from written_commands import ROOT, check_command, list_blocks, list_commands, strip_launcher

import hf_dalle
from hf_dalle import DALLEPipeline, cli


DOCS = ROOT / "docs"
PAGES = sorted({*DOCS.glob("*.md"), *DOCS.glob("api/*.md")} - {DOCS / "dvae_study_template.md"})
GUIDES = [ROOT / "training/README.md", ROOT / "training/evaluation/README.md", ROOT / "conversion/README.md"]
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
SECTIONS = ["2", "2.1", "2.2", "2.3", "2.4", "2.5", "2.6", "3.1", "3.2", "3.3", "A.1", "A.2", "A.3"]
SECTIONS += ["B.1", "B.2", "C", "D", "E", "F"]


def list_with(language, paths=PAGES):
    """Parameters: the pages that hold blocks of a language."""
    found = [path for path in paths if list_blocks(path.read_text(), language)]
    return pytest.mark.parametrize("path", found, ids=lambda path: f"{path.parent.name}-{path.stem}")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder as the reader's: the checkpoint in its place, and pictures with names that tell what they show."""
    for name in ("checkpoints", "training", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    for index, colours in enumerate([("red", "blue"), ("green", "white"), ("blue", "orange"), ("white", "red")] * 3):
        picture = draw_picture(*colours).resize((96, 96))
        picture.save(tmp_path / "pictures" / "train" / f"{'_and_'.join(colours)}-{index:02}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------------- blocks


@list_with("python")
def test_the_python_runs(path, home):
    names = {"__name__": path.stem}
    for code in list_blocks(path.read_text(), "python"):
        exec(compile(code, str(path), "exec"), names)
    if path.stem == "quick_tour":
        assert [image.size for image in names["images"]] == [(96, 96)] * 2
        assert isinstance(names["completed"], Image.Image) and len(names["pictures"]) == 2
        assert names["tokens"].shape == (2, 12, 12)
        assert names["ids"].shape == (1, names["pipe"].prior.config.stream_length + 1)
    if path.stem == "train":
        lines = (home / "pictures" / "train" / "metadata.jsonl").read_text().splitlines()
        assert len(lines) == 12 and '"captions": "blue and orange"' in lines[0]


def resolve(node, known):
    """The object that an expression of names and attributes means; `None` where it is some value."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, known)
        if owner is not None:
            assert hasattr(owner, node.attr), f"{ast.unparse(node)} does not exist"
            return getattr(owner, node.attr)
    return None


def list_bound(tree):
    """Names that code gives a value to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg | ast.FunctionDef):
            yield node.arg if isinstance(node, ast.arg) else node.name


@list_with("py")
def test_what_is_not_run_compiles_and_names_what_there_is(path):
    text = path.read_text()
    trees = [ast.parse(code) for language in ("python", "py") for code in list_blocks(text, language)]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    known = dict(vars(builtins))
    exec(compile(ast.Module(imports, []), str(path), "exec"), known)
    known |= {name: None for tree in trees for name in list_bound(tree)}
    known["pipe"] = build_pipeline()  # whose methods and their keywords are looked up
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                assert node.id in known, f"{node.id} is not defined on the page"
            if isinstance(node, ast.Call):
                called = DALLEPipeline.__call__ if ast.unparse(node.func) == "pipe" else resolve(node.func, known)
                check_keywords(called, node)


def check_keywords(called, node):
    if not inspect.isfunction(called) and not inspect.ismethod(called):
        return
    parameters = inspect.signature(called).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(parameters), ast.unparse(node)


@list_with("bash", [*PAGES, *GUIDES])
def test_the_commands_parse(path, home):
    for code in list_blocks(path.read_text(), "bash"):
        for command in list_commands(code):
            if "FAMILY" not in command:  # a usage line
                check_command(command)


def test_the_steps_to_the_demos_checkpoint_fit_together(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    parse, precompute = (
        importlib.import_module(name).parse_arguments for name in ("arguments", "precompute_image_tokens")
    )
    (code,) = (code for code in list_blocks((DOCS / "train.md").read_text(), "bash") if "prepare_emoji" in code)
    scripts = [strip_launcher(command) for command in list_commands(code)]
    dvae, prior = (parse([str(ROOT / script[1]), *script[2:]]) for script in scripts if script[0].endswith("train.py"))
    (encoding,) = (precompute(script[1:]) for script in scripts if script[0].endswith("tokens.py"))
    (captions,) = (script for script in scripts if script[0].endswith("tokenizer.py"))
    assert encoding.dvae == prior.dvae == dvae.output_dir and encoding.output_dir == prior.train_data_dir
    assert encoding.train_data_dir == dvae.train_data_dir
    assert {*prior.train_split.split("+"), prior.validation_split} <= set(encoding.splits)
    assert captions[-2:] == ["--output_dir", prior.tokenizer]


def test_the_drawing_commands_run(home):
    """On a tiny checkpoint: what emoji-mini draws is the Python's above."""
    (home / "checkpoints").unlink()
    build_pipeline().save_pretrained(home / "checkpoints" / "emoji-mini")
    blocks = list_blocks((DOCS / "quick_tour.md").read_text(), "bash")
    commands = [command for code in blocks for command in list_commands(code)]
    draws = [command for command in commands if command[:2] == ["hf-dalle", "draw"] and "--help" not in command]
    assert len(draws) == 3
    assert [cli.main(["draw", command[2], *scale_rows(command[3:])]) for command in draws] == [0] * 3
    assert all((home / name).is_file() for name in ("apple.png", "apples/000.png", "other.png"))


def scale_rows(arguments):
    """Rows of the tiny grid, which has fewer."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return ["2" if before == "--num_prefix_rows" else word for before, word in pairs]


@list_with("yaml", [*PAGES, *GUIDES])
def test_the_settings_exist(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    arguments, run = importlib.import_module("arguments"), importlib.import_module("evaluation.run")
    known = {item.name for kind in (*arguments.STAGES.values(), run.EvaluationArguments) for item in fields(kind)}
    known |= {"evaluations"}  # of a card's facts.yaml
    for code in list_blocks(path.read_text(), "yaml"):
        values = yaml.safe_load(code)
        if "stage" in values:
            (tmp_path / "settings.yaml").write_text(code)
            parsed = arguments.parse_arguments([str(tmp_path / "settings.yaml")])
            hf_dalle.DalleDVAE(**parsed.model)  # a model can be made of it
        else:
            assert set(values) <= known, set(values) - known


# ------------------------------------------------------------------------------------------------ links and names


def make_anchor(heading):
    """GitHub's, and with `myst_heading_anchors` Sphinx's."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"`|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(" ", "-")


@each_page
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        place = (path.parent / target).resolve() if target else path
        assert place.exists(), f"{path.name}: {target}"
        if anchor:
            guide = re.search(r"^This page is \[.*\]\((.*)\)\.$", place.read_text(), flags=re.MULTILINE)
            content = ((place.parent / guide[1]) if guide else place).read_text()
            anchors = {make_anchor(heading) for heading in re.findall(r"^#+ (.*)$", content, flags=re.MULTILINE)}
            assert anchor in anchors, f"{path.name}: {target}#{anchor}"


def test_every_page_is_listed_and_nothing_else():
    trees = re.findall(r"```\{toctree\}\n(?::.*\n)*\n([^`]*)```", (DOCS / "index.md").read_text())
    names = {re.sub(r".*<(.*)>", r"\1", line) for tree in trees for line in tree.split("\n") if line}
    assert names | {"index"} == {str(path.relative_to(DOCS).with_suffix("")) for path in PAGES}


def test_the_file_tree_is_the_tree():
    (tree,) = list_blocks((DOCS / "what_is_where.md").read_text(), "")
    package = tree.split("\ntraining/")[0]
    named = set(re.findall(r"^  (\w+\.py)", package, flags=re.MULTILINE))
    assert named == {path.name for path in (ROOT / "src" / "hf_dalle").glob("*.py")} - {"__init__.py"}
    for folder, following in (("training", "conversion"), ("benchmarks", "docs")):
        part = tree.split(f"\n{folder}/")[1].split(f"\n{following}/")[0]
        assert set(re.findall(r"(\w+\.py)", part)) == {path.name for path in (ROOT / folder).glob("*.py")}


def test_the_papers_map_names_what_there_is():
    text, seen = (DOCS / "paper.md").read_text(), set()
    rows = [row.split("|")[1:-1] for row in text.splitlines() if re.match(r"\| [0-9A-F]", row)]
    for sections, _, code, tests in rows:
        seen |= {section.strip() for section in sections.split(",")}
        files = re.findall(r"\]\(\.\./([^)]+)\)", code)
        assert files and all((ROOT / name).is_file() for name in files), code
        for part in tests.split("; "):
            (place,) = re.findall(r"\]\(\.\./(tests/[^)]+)\)", part)
            statements = ast.parse((ROOT / place).read_text()).body
            defined = {node.name for node in statements if isinstance(node, ast.FunctionDef)}
            names = set(re.findall(r"`(test_\w+)`", part))
            assert names and names <= defined, f"{place}: {names - defined}"
    assert set(SECTIONS) <= seen, set(SECTIONS) - seen


def test_the_reference_holds_all_that_is_exported_and_nothing_that_is_not():
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"auto(?:class|function):: hf_dalle\.(\w+)$", text, flags=re.MULTILINE)
    assert sorted(documented) == sorted(hf_dalle.__all__)
    owner, directive = None, re.compile(r"^\s*(?:\.\. auto(\w+)::|:members:) (.+)$", flags=re.MULTILINE)
    for kind, name in directive.findall(text):
        if kind in ("class", "function", "module"):
            place, _, last = name.rpartition(".")
            owner = importlib.import_module(name if kind == "module" else place)
            owner = owner if kind == "module" else getattr(owner, last)
        else:
            assert all(hasattr(owner, member) for member in name.split(", ")), (owner, name)


# -------------------------------------------------------------------------------------------------------- figures


def test_figures_are_drawn_by_code_and_shown(tmp_path):
    figures = load_figures()
    drawn = {path.stem for path in (DOCS / "figures").iterdir()}
    shown = set(re.findall(r"\]\(figures/(\w+)\.png\)", "".join(path.read_text() for path in PAGES)))
    assert drawn == shown == set(figures.FIGURES)
    figures.main(["--only", "layout", "temperature", "--output_dir", str(tmp_path)])
    for path in tmp_path.iterdir():
        assert Image.open(path).size == Image.open(DOCS / "figures" / path.name).size


def load_figures():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_all_figures(tmp_path):
    load_figures().main(["--output_dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "figures").iterdir()}


# ----------------------------------------------------------------------------------------------------------- slow


SHRINK = "--max_train_steps 2 --checkpointing_steps 2 --train_batch_size 4 --report_to none --mixed_precision no"


def run_page(path, home, first):
    """Runs the commands of a page's blocks from the one that begins with `first`, trainings shrunk, as processes."""
    blocks = [code for code in list_blocks(path.read_text(), "bash") if code.startswith(first)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for command in list_commands(blocks[0]):
        program, *arguments = strip_launcher(command)
        words = [sys.executable, program, *arguments, *(SHRINK.split() if program.endswith("train.py") else ())]
        if program == "hf-dalle":
            words = [sys.executable, "-c", "import sys; from hf_dalle.cli import main; sys.exit(main())", *arguments]
        done = subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_training_on_ones_own_pictures(home):
    path = DOCS / "train.md"
    for code in list_blocks(path.read_text(), "python"):
        exec(compile(code, str(path), "exec"), {})
    run_page(path, home, "python training/train_tokenizer.py")
    assert DALLEPipeline.from_pretrained(home / "runs" / "mine").dvae.image_grid_size == 12
    assert (home / "fox.png").is_file()
    run_page(DOCS / "fine_tune.md", home, "accelerate launch")
    assert (home / "runs" / "mine-lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("myst_parser")
    options = ["-q", "-W", "--keep-going", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "html" / "api" / "pipeline.html").read_text()
    words = re.sub(r"<[^>]+>", "", page)
    assert "`" not in words and "[DALLEPipelineOutput]" not in words  # Markdown of docstrings is translated
    assert 'href="#hf_dalle.DALLEPipelineOutput"' in page
    how = (tmp_path / "html" / "how_it_works.html").read_text()
    assert "<math" in how and "$" not in re.sub(r"<[^>]+>", "", how)
    assert "What a run will take" in (tmp_path / "html" / "scale.html").read_text()  # of training/README.md
    for html in (tmp_path / "html").rglob("*.html"):  # nothing is asked of the network
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', html.read_text()), html
