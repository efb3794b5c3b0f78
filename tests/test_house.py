"""The shape of the house: who imports whom, how long a file may get, what starts fast, what is declared and pinned."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "gptjax"
MODULES = sorted(PACKAGE.rglob("*.py"))
DOORS = sorted(
    p for p in PACKAGE.glob("*.py") if p.stem not in {"__init__", "errors", "config", "types", "allocator", "cli"}
)
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))

# An import runs only from a lower line to a higher one; what shares a line does not import each other.
HOUSE = [
    {"errors"},
    {"config"},
    {"types"},
    {"sharding"},
    {"data"},
    {"models"},
    {"training"},
    {"decoding"},
    {"tuning", "evals", "interop", "analysis"},
    {"allocator"},
    {"cli"},
    {door.stem for door in DOORS},
]
LINE = {name: line for line, names in enumerate(HOUSE) for name in names}

# Packages that are needed and imported by no line of ours.
SILENT = {
    "importlib-resources",  # tensorflow-datasets imports it and does not declare it
}


def imports(path: pathlib.Path) -> set[str]:
    """The dotted names that a file imports anywhere, in functions too: `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: pathlib.Path) -> str:
    """The part of the house that a module of gptjax belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def relative(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


# -- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_run_upward_only(path: pathlib.Path):
    mine = room(path)
    if mine == "__init__":
        assert not {name for name in imports(path) if name.startswith("gptjax")}
        return
    assert mine in LINE, f"{relative(path)}: give {mine} a line in HOUSE"
    for name in imports(path):
        if name.startswith("gptjax."):
            other = name.split(".")[1]
            if other == mine or other == "__version__":
                continue
            assert other in LINE, f"{relative(path)} imports {name}, which has no line in HOUSE"
            assert LINE[other] < LINE[mine], f"{relative(path)} must not import {name}: {other} stands below {mine}"


def test_the_rule_sees_every_form_of_import(tmp_path: pathlib.Path):
    file = tmp_path / "x.py"
    file.write_text("import a.b\nfrom c import d\ndef f():\n  import e\n  from g.h import i as j, k\n")
    assert imports(file) == {"a.b", "c.d", "e", "g.h.i", "g.h.k"}


def test_linen_stays_with_the_models():
    users = {relative(p) for p in MODULES if any(f"{n}.".startswith("flax.linen.") for n in imports(p))}
    strangers = {u for u in users if not u.startswith("gptjax/models/") and u != "gptjax/sharding/rules.py"}
    assert not strangers, f"{strangers} import flax.linen; everything but a model sees gptjax.types.Model"
    assert users, "no module imports flax.linen: this test looks for the wrong name"


@pytest.mark.parametrize("module", ["gptjax.config", "gptjax.cli", *(f"gptjax.{door.stem}" for door in DOORS)], ids=str)
def test_doors_open_before_jax_is_imported(module: str):
    slow = "{'jax', 'flax', 'optax', 'orbax', 'grain', 'tensorflow_datasets', 'matplotlib', 'tensorflow'}"
    program = f"import sys, {module}; print(*sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# -- size and form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_stay_short(path: pathlib.Path):
    limit = 120 if path in DOORS else 450
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= limit, f"{relative(path)} has {length} lines; over {limit} it wants to be two files"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=relative)
def test_experiments_tell_their_story(path: pathlib.Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree)
    assert doc is not None, f"{relative(path)} has no docstring"
    assert f"--config={relative(path)}" in doc, f"{relative(path)}: the docstring shows no command"
    assert "get_config" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def text_files() -> list[pathlib.Path]:
    folders = [PACKAGE, ROOT / "experiments", ROOT / "tests", ROOT / "launch", ROOT / ".ci"]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return sorted(
        files + [p for p in ROOT.iterdir() if p.is_file() and p.suffix in {".md", ".py", ".toml", ".lock", ""}]
    )


def test_nothing_names_a_place_on_one_machine():
    private = re.compile(r"(?<![\w.])/(?:work|root|home)/|\.\./shared")
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert not found, "\n".join(found)


# -- what is declared, and what is pinned -----------------------------------------------------------------------------


def setup_lists() -> tuple[list[str], dict[str, list[str]]]:
    """(install_requires, extras_require) as setup.py writes them."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    keywords = {k.arg: k.value for k in call.keywords}
    return ast.literal_eval(keywords["install_requires"]), ast.literal_eval(keywords["extras_require"])


def distributions(paths: list[pathlib.Path]) -> dict[str, str]:
    """{canonical name of a third-party package: a file of `paths` that imports it}."""
    by_module = importlib.metadata.packages_distributions()
    used: dict[str, str] = {}
    for path in paths:
        for name in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in {"gptjax", "tests", "experiments", "launch"}:
                continue
            # Several distributions can share a namespace, such as google; the imported one is whichever is declared.
            assert top in by_module, f"{relative(path)} imports {top}, which is not installed"
            for distribution in by_module[top]:
                used[canonicalize_name(distribution)] = relative(path)
    return used


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    core = {canonicalize_name(Requirement(r).name) for r in setup_lists()[0]}
    used = distributions([*MODULES, *EXPERIMENTS])
    assert not {f"{path} imports {name}" for name, path in used.items() if name not in core}, "not in install_requires"
    assert not core - set(used) - SILENT, "in install_requires, and nothing imports it"


def test_the_dev_extra_is_used():
    used = distributions(sorted((ROOT / "tests").rglob("*.py")))
    makefile = (ROOT / "Makefile").read_text()
    for requirement in setup_lists()[1]["dev"]:
        name = canonicalize_name(Requirement(requirement).name)
        program = {"pytest-xdist": "pytest -n"}.get(name, name)
        assert name in used or program in makefile, f"nothing uses {name}"


LOCK = (ROOT / "requirements.lock").read_text().splitlines()


def test_the_lock_holds_pins_and_nothing_else():
    for line in LOCK:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+!-]*( ; [^/]+)?", line), line


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_lock_fits_setup_py(python: str, platform: str):
    place = {
        **{"python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform},
        **{"platform_machine": "aarch64" if platform == "darwin" else "x86_64", "extra": ""},
    }
    pins: dict[str, str] = {}
    for pin in map(Requirement, LOCK):
        if pin.marker is None or pin.marker.evaluate(place):
            assert pin.name not in pins, f"two pins for {pin.name} on {python}"
            pins[pin.name] = str(next(iter(pin.specifier)).version)
    core, extras = setup_lists()
    for requirement in map(Requirement, [*core, *(r for extra in extras.values() for r in extra)]):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin for Python {python}; run make lock"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} breaks {requirement}; run make lock"
