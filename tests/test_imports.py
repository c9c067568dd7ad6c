"""The import law: cli -> pipelines -> tec_cache; the making side and the training side know only the cache."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("tec_cache/**/*.py"), *ROOT.glob("pipelines/**/*.py"), ROOT / "cli.py"])

MAKING = ("tec_cache.data", "tec_cache.base")
LABELLED = ("tec_cache.labelled",)
"""Photos with their labels, for tuning: a side of its own that reads photos, and knows neither base nor cache."""
TRAINING = ("tec_cache.loader", "tec_cache.student", "tec_cache.run", "tec_cache.tasks", "tec_cache.finetune",
            "tec_cache.segment")  # fmt: skip
BOTH_ALLOWED = (
    "pipelines.train",
    "pipelines.training.target_sources",
    "pipelines.training.warm_start",
    "pipelines.loading.encoder_source",
    "pipelines.judging.student_judge",
    "pipelines.finetune",
    "pipelines.segment",
    "pipelines.reporting.models",
    "pipelines.reporting.judged",
)
"""The training program, whose online yardstick puts the base into the loop, and which knows two models of one shape
apart as it does a base and a student; fine-tuning, which judges any base; what judges a student as if it were one; and
the report, which draws new models beside their base, and judges tuned ones on photos."""


TASKS = ("pretrain", "classify", "segment")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things come from"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def touches(names: set[str], packages: tuple[str, ...]) -> set[str]:
    return {n for n in names if any(n == p or n.startswith(p + ".") for p in packages)}


def test_every_file_is_looked_at() -> None:
    names = {module_name(path) for path in FILES}
    assert {"cli", "pipelines.extract", "tec_cache.loader", "tec_cache.base.model", "tec_cache.student.model"} <= names


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_import_law(path: Path) -> None:
    name, used = module_name(path), imports(path)
    if name != "cli":
        assert not touches(used, ("cli",))
    if name.startswith("tec_cache"):
        assert not touches(used, ("pipelines",))
    if name == "tec_cache":
        return  # the public face names both sides and imports neither until asked
    making, training = touches(used, MAKING), touches(used, TRAINING)
    if name.startswith("tec_cache") and not name.startswith(LABELLED):
        assert not touches(used, LABELLED), "only programs put the reader of labelled photos beside something else"
    if name.startswith(MAKING):
        assert not training
    elif name.startswith(TRAINING):
        assert not making
    elif name.startswith(LABELLED):
        assert not training
        assert not touches(used, ("tec_cache.base", "tec_cache.cache"))
    elif name.startswith("tec_cache"):
        assert not making, "what both sides share must not know the making side"
        assert not training, "what both sides share must not know the training side"
    elif name not in BOTH_ALLOWED:
        assert not (making and training)


def runs(node: ast.AST) -> Iterator[ast.AST]:
    """Give all nodes of a file but those that only a type checker looks at."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from runs(child)


def modules_used(source: str, known: set[str]) -> set[str]:
    """Those of the known modules that a file imports at any time: in a function, an import is late, and no less one."""
    found = set()
    for node in runs(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known or {str(node.module)}
            found |= {str(node.module)} if inner - known else set()
    return found & known


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return which modules each module imports, from its text."""
    return {name: modules_used(source, set(sources)) for name, source in sources.items()}


GRAPH = graph_of({module_name(path): path.read_text() for path in FILES})


def reachable(name: str, graph: dict[str, set[str]] = GRAPH) -> set[str]:
    seen, waiting = set[str](), [name]
    while waiting:
        for used in graph[waiting.pop()] - seen:
            seen.add(used)
            waiting.append(used)
    return seen


def in_circles(graph: dict[str, set[str]]) -> list[str]:
    return [name for name in sorted(graph) if name in reachable(name, graph)]


def breaches(graph: dict[str, set[str]]) -> list[str]:
    """List the modules of tec_cache that reach, through any number of imports, what the law keeps from them."""
    found = []
    for name in sorted(n for n in graph if n.startswith("tec_cache.")):
        beyond = reachable(name, graph)
        both = all(touches({name} | beyond, side) for side in (MAKING, TRAINING))
        if both or touches(beyond, ("pipelines", "cli")):
            found.append(name)
    return found


def test_no_circles() -> None:
    assert in_circles(GRAPH) == []


def test_the_law_holds_through_any_number_of_imports() -> None:
    assert breaches(GRAPH) == []


BREACH = {
    "tec_cache.data.walk": "from tec_cache.progress import Progress",
    "tec_cache.progress": "def bar():\n    import tec_cache.busy",
    "tec_cache.busy": "from tec_cache.run import loop",
    "tec_cache.run.loop": "from tec_cache import errors",
    "tec_cache.errors": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tec_cache import busy",
}
"""The making side reaches the training side through two modules that are neither's, one of them in a function."""


def test_a_breach_through_others_is_seen() -> None:
    assert breaches(graph_of(BREACH)) == ["tec_cache.data.walk"]
    for gone in ("tec_cache.progress", "tec_cache.busy"):
        assert breaches(graph_of(BREACH | {gone: ""})) == []
    upwards = {"tec_cache.rng": "import tec_cache.types", "tec_cache.types": "import cli", "cli": ""}
    assert breaches(graph_of(upwards)) == ["tec_cache.rng", "tec_cache.types"]


def test_a_circle_is_seen_though_an_import_is_late() -> None:
    assert in_circles(graph_of(BREACH)) == []  # what only a type checker imports closes none
    closed = graph_of(
        BREACH | {"tec_cache.run.loop": "class Loop:\n    def step(self):\n        import tec_cache.progress"}
    )
    assert in_circles(closed) == ["tec_cache.busy", "tec_cache.progress", "tec_cache.run.loop"]


def test_the_loop_knows_no_task_and_the_loader_no_mask() -> None:
    for name in GRAPH:
        if name.startswith("tec_cache.run"):
            assert touches(reachable(name), ("tec_cache.tasks",)) <= {"tec_cache.tasks", "tec_cache.tasks.task"}
        if name.startswith(("tec_cache.run", "tec_cache.loader")) and name != "tec_cache.run.export":
            assert not touches(reachable(name), ("tec_cache.student",)), name
        if name.startswith("tec_cache.tasks."):
            others = {n for n in GRAPH if n.startswith("tec_cache.tasks.") and n.endswith(TASKS)}
            assert not (reachable(name) & others) - {name}, "a task knows no other"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {name.split(".")[0] for name in out.split()}


@pytest.mark.parametrize("statement", ["import tec_cache", "import cli", "import tec_cache.config, tec_cache.recipes"])
def test_light_imports_load_no_torch(statement: str) -> None:
    assert not loaded_by(statement) & {"torch", "timm", "zarr", "numpy", "webdataset"}


def test_the_public_face_gives_what_it_names() -> None:
    import tec_cache

    for name in tec_cache.__all__:
        assert getattr(tec_cache, name) is not None
    with pytest.raises(AttributeError):
        _ = tec_cache.no_such_thing
