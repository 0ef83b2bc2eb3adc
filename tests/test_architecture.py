"""
Holds the plan of the house by reading the source, without importing it: floors, sizes, and calls that are not made.

Where a rule has an exception, the exception stands here.
"""

import ast
import functools
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "hf_dalle"

# A module imports from lower floors only, never sideways, never up. `__init__` stands above all of them.
FLOORS = [
    {
        *("decode_attention", "image_attention", "bordered_attention", "linear_dalle", "logit_laplace"),
        *("row_order", "tar_shards", "web_door", "image_tower"),
    },
    {"configuration_dalle_prior"},
    {"configuration_family_prior"},
    {"autoencoder_dalle", "cache_dalle", "losses", "sparse_attention", "grid_rotary"},
    {"generation_dalle_prior", "training_cost", "token_shift"},
    {
        "modeling_dalle_prior",
        "autoencoder_dalle_discrete_vae",
        "autoencoder_dalle_dvae",
        "autoencoder_dalle_vqgan",
        "image_processing_dalle",
        "tokenization_dalle",
    },
    {"modeling_family_prior"},
    {
        *("candidates", "processing_dalle", "lora_dalle", "publishing", "sampling", "reranking", "metrics"),
        *("gradient_scaling", "optimization", "power_sgd", "distribution_metrics", "safety_checker"),
    },
    {"drawing", "evidence_lower_bound", "model_card", "provenance"},
    {"data", "pipeline_dalle"},
    {"hub", "streams", "drawing_service"},
    {"gradio_app"},
    {"cli"},
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# The roof: scripts, which only tests (and their neighbours in the same room) import.
SCRIPT_ROOMS = ["training", "conversion", "benchmarks", "demo", "docs"]
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60  # without the signature and the docstring


def list_sources(*rooms):
    """The files of these folders; what `make docs` copies into its pages is no source."""
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in files if ROOT / "docs" / "_build" not in path.parents]


SOURCES = list_sources("src", *SCRIPT_ROOMS)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
each_module = pytest.mark.parametrize("path", list_sources("src"), ids=lambda path: path.stem)


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------ the rules


def list_import_faults(tree, module):
    """Imports of the package's own modules that are not one-dot imports from a lower floor."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            if node.level > 1 or node.module is None or "." in node.module:
                yield f"line {node.lineno}: write `from .module import name`"
            elif module != "__init__" and FLOOR_OF.get(node.module, len(FLOORS)) >= FLOOR_OF[module]:
                yield f"line {node.lineno}: {node.module} is not on a lower floor than {module}"
            continue
        else:
            continue
        if any(name.split(".")[0] == "hf_dalle" for name in names):
            yield f"line {node.lineno}: inside the package write `from .module import name`"


def list_import_time_faults(tree, module):
    """Module-level statements that do more than define."""
    statements = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    for node in statements:
        is_definition = isinstance(
            node,
            ast.Import
            | ast.ImportFrom
            | ast.FunctionDef
            | ast.AsyncFunctionDef
            | ast.ClassDef
            | ast.Assign
            | ast.AnnAssign,
        )
        guards = ("TYPE_CHECKING", "__name__ == '__main__'")
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) in guards and not node.orelse
        is_registration = module == "__init__" and ast.unparse(node) == "register_classes()"
        if not (is_definition or is_guard or is_registration):
            yield f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}"


def list_long_functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            num_lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if num_lines > MAX_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {num_lines} lines"


def list_forbidden_calls(tree):
    """Calls that load weights half or unsafely, hide an error, reseed everyone's random numbers, or run a shell."""
    global_seeds = r"torch\.(random\.|cuda\.)?(manual_seed|manual_seed_all|seed|seed_all)|(np|numpy)\.random\.seed"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: bare except"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords}
        forbidden = keywords & {"weights_only=False", "shell=True"}
        if name != "zip":
            forbidden |= keywords & {"strict=False"}
        if re.fullmatch(rf"{global_seeds}|random\.seed|os\.system|eval|exec", name):
            forbidden.add(name)
        for what in sorted(forbidden):
            yield f"line {node.lineno}: {what}"


# ----------------------------------------------------------------------------------------- the rules on the source


def test_package_is_flat_and_every_module_has_its_floor():
    assert PACKAGE.is_dir() and len(SOURCES) > len(list_sources("src")) > 0
    modules = {path.stem for path in list_sources("src")} - {"__init__"}
    assert {path.parent for path in list_sources("src")} == {PACKAGE}
    assert modules <= set(FLOOR_OF), "give the new module a floor in this file"
    assert len(FLOOR_OF) == sum(map(len, FLOORS))


@each_module
def test_imports_go_down_one_dot_at_a_time(path):
    assert list(list_import_faults(parse(path), path.stem)) == []


@each_source
def test_only_tests_import_scripts(path):
    own_room = path.relative_to(ROOT).parts[0]
    scripts = {
        name
        for room in SCRIPT_ROOMS
        if room != own_room
        for name in [room, *(script.stem for script in (ROOT / room).glob("*.py"))]
    }
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        assert not {name.split(".")[0] for name in names} & scripts, f"line {node.lineno} imports a script"


@each_source
def test_nothing_happens_at_import_time_but_definitions(path):
    assert list(list_import_time_faults(parse(path), path.stem)) == []


@each_source
def test_size_name_and_opening_docstring(path):
    assert ast.get_docstring(parse(path)), "open the file with a docstring: what lives here, what does not"
    assert path.stem not in {"utils", "helpers", "common"}, "name the file after its subject"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    assert list(list_long_functions(parse(path))) == []


@each_source
def test_forbidden_calls_and_words(path):
    assert list(list_forbidden_calls(parse(path))) == []
    assert not re.findall(r"\b(?:TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", list_sources("tests"), ids=lambda path: path.stem)
def test_tests_open_with_a_docstring(path):
    assert ast.get_docstring(parse(path))


# ------------------------------------------------------------------------------------- the rules catch what they must


@pytest.mark.parametrize(
    "source",
    [
        "from .data import x",
        "from .sampling import x",
        "from .metrics import x",
        "def f():\n    from .pipeline_dalle import x",
        "from .unknown import x",
        "from . import losses",
        "from ..hf_dalle import losses",
        "from .losses.more import x",
        "import hf_dalle.losses",
        "from hf_dalle.losses import x",
    ],
)
def test_import_rule_catches(source):
    assert len(list(list_import_faults(ast.parse(source), "sampling"))) == 1


@pytest.mark.parametrize("source", ["from .losses import x", "import torch.nn", "from .cache_dalle import a, b"])
def test_import_rule_allows(source):
    assert list(list_import_faults(ast.parse(source), "sampling")) == []


@pytest.mark.parametrize(
    "source", ["print()", "for i in x: pass", "if a: b = 1", "try: import a\nexcept ImportError: a = 0", "f()"]
)
def test_import_time_rule_catches(source):
    assert len(list(list_import_time_faults(ast.parse(source), "hub"))) == 1


def test_import_time_rule_allows_definitions_and_the_one_registration():
    source = "'''Words.'''\nimport a\nX = a.b()\nif TYPE_CHECKING:\n    import c\ndef f(): pass\nclass C: pass\n"
    assert list(list_import_time_faults(ast.parse(source), "hub")) == []
    assert list(list_import_time_faults(ast.parse("register_classes()"), "__init__")) == []
    assert len(list(list_import_time_faults(ast.parse("register_classes()"), "hub"))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.load_state_dict(weights, strict=False)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(command, shell=True)",
        "torch.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "np.random.seed(0)",
        "random.seed(0)",
        "try:\n    a\nexcept:\n    b",
    ],
)
def test_forbidden_rule_catches(source):
    assert len(list(list_forbidden_calls(ast.parse(source)))) == 1


def test_forbidden_rule_allows_a_generator_of_ones_own():
    source = "torch.Generator().manual_seed(0)\nzip(a, b, strict=False)\nload(weights, strict=True)"
    assert list(list_forbidden_calls(ast.parse(source))) == []


def test_length_rule_counts_the_body_without_its_docstring():
    def make(num_lines):
        return ast.parse('def f():\n    """\n    Words.\n    """\n' + "    a\n" * num_lines)

    assert list(list_long_functions(make(MAX_FUNCTION_LINES))) == []
    assert len(list(list_long_functions(make(MAX_FUNCTION_LINES + 1)))) == 1
