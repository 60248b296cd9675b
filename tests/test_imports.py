"""Who may import whom, and what is loaded when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lynx_learn"
HEAVY = ("lightning", "datasets", "sklearn", "onnx", "onnxscript", "onnxruntime", "matplotlib")

# Module -> the modules of this package that it may import; each only ones that stand above it.
ALLOWED: dict[str, str] = {
    "errors": "",
    "config": "errors",
    "onnx_runtime": "errors config",
    "progress": "",
    "report": "",
    "figures": "",
    "matching": "",
    "features": "",
    "surrogates": "",
    "scorers": "features",
    "scoring": "errors",
    "families": "errors scoring",
    "hooks": "families",
    "corpus": "errors",
    "models": "errors",
    "traces": "errors",
    "expert_stats": "errors families traces",
    "policies": "families",
    "baselines": "errors families policies expert_stats",
    "kernels": "features scorers policies",
    "selector": "errors config features scorers surrogates families policies kernels",
    "oracle": "families policies selector",
    "methods": "errors families policies expert_stats baselines selector oracle",
    "card": "errors selector",
    "runtime": "errors families hooks models policies selector",
    "simulate": "families hooks policies runtime",
    "timing": "errors policies runtime",
    "inspection": "errors families models report",
    "collect": "errors progress families hooks corpus models traces",
    "training": "features scorers",
    "sensitivity": "families policies progress selector simulate",
    "tuning": "errors families policies progress selector simulate",
    "fit": "errors config progress features surrogates families models traces selector card training sensitivity tuning",
    "calibrate": "errors progress corpus families models selector card simulate",
    "coverage": "errors progress corpus families models traces selector card simulate calibrate",
    "export": "errors onnx_runtime features scorers traces policies selector",
    "store": "errors traces",
    "sweeps": "errors families models traces policies expert_stats selector methods simulate",
    "evaluate": "errors progress corpus figures matching models runtime selector methods card simulate store sweeps",
    "shapes": "errors config families selector",
    "bench": "errors progress families figures corpus models traces policies selector runtime timing shapes",
    "quickstart": "errors report corpus models selector runtime timing collect fit calibrate evaluate",
    "cli": "errors report selector",
    "__init__": "errors families models runtime selector",
}
# Library -> the only modules that may import it.
RESERVED = {
    "lightning": {"training"},
    "sklearn": {"training"},
    "datasets": {"corpus"},
    "rich": {"progress", "report"},
    "jsonargparse": {"cli"},
    "matplotlib": {"figures"},
    "onnx": {"export"},
    "onnxscript": {"export"},
    "onnxruntime": {"onnx_runtime"},
    "triton": {"kernels"},
}


def imported(module: str) -> tuple[set[str], set[str]]:
    """Modules of this package, and libraries, that a module imports anywhere in its text."""
    own: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(str(node.module).split(".")[0])
    return own, others


MODULES = sorted(file.stem for file in PACKAGE.glob("*.py"))


def test_the_table_names_every_module() -> None:
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module: str) -> None:
    own, others = imported(module)
    own -= {"__version__"}
    # What connects to engines stands below the table, and is only imported where one is asked for.
    own -= {"integrations"} if module == "collect" else set()
    above = list(ALLOWED)[: list(ALLOWED).index(module)]
    assert set(ALLOWED[module].split()) <= set(above)
    assert own <= set(ALLOWED[module].split())
    assert "lynx_learn" not in others  # by relative imports alone, so that the table sees them
    for library, users in RESERVED.items():
        assert library not in others or module in users


# Below the package's own modules: what connects to serving engines, and which of the package each may import.
INTEGRATIONS = {
    "vllm": "errors",
    "vllm_metrics": "",
    "vllm_wrapping": "",
    "vllm_layers": "",
    "vllm_record": "errors families",
    "vllm_engine": "errors families policies selector",
    "vllm_collect": "errors families models traces",
    "vllm_bench": "errors",
}


@pytest.mark.parametrize("module", INTEGRATIONS)
def test_integrations_import_what_serving_needs(module: str) -> None:
    files = {file.stem for file in (PACKAGE / "integrations").glob("*.py")} - {"__init__"}
    assert files == set(INTEGRATIONS)
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / "integrations" / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            found.add(str(node.module))
    assert found == set(INTEGRATIONS[module].split())


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


def test_folders_of_files_are_no_packages() -> None:
    """A root package `selectors` would shadow the standard library's module, and break subprocess with it."""
    for folder in ("selectors", "data", "train"):
        assert (ROOT / folder).is_dir()
        assert not list((ROOT / folder).rglob("__init__.py"))
    assert not set(MODULES) & set(sys.stdlib_module_names)
