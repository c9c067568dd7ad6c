"""The import law: cli -> pipelines -> tec_cache; the making side and the training side know only the cache."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("tec_cache/**/*.py"), *ROOT.glob("pipelines/**/*.py"), ROOT / "cli.py"])

MAKING = ("tec_cache.data", "tec_cache.base")
TRAINING = ("tec_cache.loader", "tec_cache.student", "tec_cache.run", "tec_cache.finetune")
BOTH_ALLOWED = ("pipelines.train", "pipelines.target_sources", "pipelines.encoder_source")
"""The training program, whose online yardstick puts the base into the loop; and fine-tuning, which judges any base."""


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
    if name.startswith(MAKING):
        assert not training
    elif name.startswith(TRAINING):
        assert not making
    elif name.startswith("tec_cache"):
        assert not making, "what both sides share must not know the making side"
        assert not training, "what both sides share must not know the training side"
    elif name not in BOTH_ALLOWED:
        assert not (making and training)


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
