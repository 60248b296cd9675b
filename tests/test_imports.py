"""Who may import whom, and what is loaded when."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lynx_learn.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lynx_learn"
HEAVY = ("lightning", "datasets", "sklearn", "onnx", "onnxscript", "onnxruntime", "matplotlib")

# The rooms in the order of the flow: a module imports from its own room and from those on earlier lines.
FLOW = (
    "errors files parts show",
    "moe",
    "checkpoint traces selector",
    "decode rules graph",
    "fit offload",
    "measure hardware",
    "options quickstart inspection plan cli __init__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOW) for room in rooms.split()}
# What connects to serving engines needs what serving needs, and nothing of the flow behind it.
FOR_ENGINES = {"errors", "files", "moe", "selector", "traces", "integrations"}
MOST_FILES = 9
# Library -> the only modules that may import it.
RESERVED = {
    "lightning": {"fit.trainer"},
    "sklearn": {"fit.scorer"},
    "datasets": {"traces.documents"},
    "rich": {"show.progress", "show.tables"},
    "jsonargparse": {"options", "show.help"},
    "jinja2": {"show.card"},
    "joblib": {"parts"},
    "ray": {"parts"},
    "dask": {"parts"},
    "distributed": {"parts"},
    "shtab": {"cli"},
    "prometheus_client": {"integrations.client", "integrations.vllm.metrics"},
    "matplotlib": {"show.figures"},
    "onnx": {"graph.export", "graph.graph"},
    "onnxscript": {"graph.export"},
    "onnxruntime": {"graph.onnx_runtime"},
    "triton": {"moe.kernels.grouping", *(f"selector.kernels.{name}" for name in ("answers", "in_place", "triton"))},
    "numba": {"selector.kernels.cpu", "moe.kernels.arithmetic", "moe.kernels.gated"},
}


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


FILES = {dotted(file): file for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in FILES if not name.endswith(".__init__")]


def imported(module: str) -> tuple[set[str], set[str]]:
    """Modules of this package, and libraries, that a module imports anywhere in its text, inside functions too."""
    own: set[str] = set()
    others: set[str] = set()
    folder = module.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else [])]
            own |= set(_named(base, node))
        elif isinstance(node, ast.ImportFrom):
            others.add(str(node.module).split(".")[0])
    return own, others


def _named(base: list[str], node: ast.ImportFrom) -> Iterator[str]:
    """The modules that `from base import names` reads: base itself, or modules in the folder that it is."""
    for alias in node.names:
        inside = ".".join([*base, alias.name])
        yield inside if inside in FILES else ".".join(base) or "__init__"


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} == {*FLOOR, "integrations"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_with_the_flow(module: str) -> None:
    own, others = imported(module)
    assert own <= set(FILES), "a module that is not there"
    for other in own - {"__init__"}:
        if room(module) == "integrations":
            assert room(other) in FOR_ENGINES, other
        else:
            assert room(other) != "integrations" or FLOOR[room(module)] == len(FLOW) - 1, other
            if room(other) == "integrations":
                continue
            beside = room(other) == room(module) or FLOOR[room(module)] in (0, len(FLOW) - 1)
            assert FLOOR[room(other)] < FLOOR[room(module)] or beside, other
    assert "lynx_learn" not in others  # by relative imports only, so that this test sees them
    for library, users in RESERVED.items():
        assert library not in others or module in users, library


def test_there_are_no_circles() -> None:
    # The package itself names its public modules for type checkers, and loads them on first use.
    edges = {module: imported(module)[0] - {"__init__"} for module in MODULES if module != "__init__"}
    TopologicalSorter(edges).prepare()


def test_no_import_is_hidden_in_a_name() -> None:
    """Only the top of the flow loads modules by name; everywhere else the text shows what is imported, however late."""
    named = {name for name, file in FILES.items() if "import_module" in file.read_text()}
    assert named == {"__init__", "cli"}


def test_no_folder_is_a_corridor() -> None:
    for folder in {file.parent for file in FILES.values()}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def test_the_plugin_is_light_until_it_is_called() -> None:
    """vLLM calls a plugin that cannot be imported a warning, and serves without it."""
    loaded = loaded_by("from lynx_learn.integrations.vllm.plugin import register")
    assert loaded.isdisjoint({*HEAVY, "torch", "vllm", "numpy"})


def loaded_by(code: str) -> set[str]:
    """Libraries that a fresh interpreter has loaded after `code`."""
    program = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import lynx_learn", "import lynx_learn.cli", "from lynx_learn import LynxError"])
def test_the_package_itself_is_light(code: str) -> None:
    loaded = loaded_by(code)
    assert "lynx_learn" in loaded
    assert loaded.isdisjoint({*HEAVY, "torch", "transformers", "numpy"})


def test_an_exported_graph_is_served_without_torch() -> None:
    loaded = loaded_by("from lynx_learn.graph.onnx_runtime import OnnxSelector")
    assert "numpy" in loaded
    assert loaded.isdisjoint({*HEAVY, "torch", "transformers"})


def test_what_serves_a_selector_loads_nothing_that_trains_one() -> None:
    code = "from lynx_learn import LynxSelector, skip_experts\nimport lynx_learn.measure.calibrate, lynx_learn.measure.evaluate, lynx_learn.graph.export"
    loaded = loaded_by(code)
    assert "torch" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_public_names_are_there() -> None:
    import lynx_learn

    assert all(getattr(lynx_learn, name) is not None for name in lynx_learn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'skip_all'"):
        lynx_learn.skip_all  # noqa: B018
    # What the pages import from the package is public, and so are the function and options of every command.
    pages = " ".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = {
        name
        for line in re.findall(r"from lynx_learn import (.+)", pages)
        for name in re.findall(r"\w+", line.partition("#")[0])
    }
    steps = {name for c in COMMANDS.values() for name in (c.options, c.function) if c.module.partition(".")[2]}
    steps -= {"ServerOptions", "bench_server"}
    assert len(named) > 5
    assert named | steps <= set(lynx_learn.__all__)


def test_folders_of_files_are_no_packages() -> None:
    """A root package `selectors` would shadow the standard library's module, and break subprocess with it."""
    for folder in ("selectors", "data", "train"):
        assert (ROOT / folder).is_dir()
        assert not list((ROOT / folder).rglob("__init__.py"))
    assert not set(MODULES) & set(sys.stdlib_module_names)
