"""What pages and docstrings promise exists: files, links, commands, flags, config fields, variants, make targets."""

import pathlib
import re

import pytest

from gptjax import cli
from gptjax.config import Config, flatten, validate

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("*.md"))
SOURCES = sorted([*PAGES, *(ROOT / "gptjax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
FIELDS = flatten(Config())
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def relative(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def each(pattern: str, paths: list[pathlib.Path]) -> list[tuple[str, re.Match]]:
    """(file, match) for every match of `pattern` in `paths`."""
    return [(relative(p), m) for p in paths for m in re.finditer(pattern, p.read_text(encoding="utf-8"), re.M)]


def test_links_lead_somewhere():
    links = each(r"\]\(([^)#\s]+)\)", PAGES)
    assert links
    missing = [(page, m[1]) for page, m in links if "://" not in m[1] and not (ROOT / m[1]).exists()]
    assert not missing


def test_named_files_exist():
    """A path in backquotes, `gptjax/training/loop.py`, is a promise; a bare `loop.py` or `config.json` is not."""
    named = each(r"`((?:gptjax|experiments|tests|docs)/[\w./]*)`", PAGES)
    assert named
    templates = {"experiments/yours.py"}
    missing = [(page, m[1]) for page, m in named if not (ROOT / m[1]).exists() and m[1] not in templates]
    assert not missing


def test_commands_exist_and_know_their_flags():
    commands = each(r"python -m gptjax\.(\w+)((?:[ \\\n]+--?[\w.]+(?:=(?:\"[^\"]*\"|\S+))?)*)", SOURCES)
    assert len(commands) > 10
    for page, command in commands:
        module = ROOT / "gptjax" / f"{command[1]}.py"
        assert module.exists(), f"{page}: {command[0]}"
        known = {"config", "help", *re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", module.read_text())}
        for flag in re.findall(r"--(\w+)(?![\w.])", command[2]):
            assert flag in known, f"{page}: {command[0]}: no flag --{flag}"


def test_config_fields_exist():
    for page, m in each(r"--config\.(\w+\.\w+)\b", SOURCES):
        assert m[1] in FIELDS or m[1] == "section.field", f"{page}: {m[0]}"
    sections = "|".join({name.split(".")[0] for name in FIELDS})
    for page, m in each(rf"`((?:{sections})\.[a-z]\w*)(?:=[^`]*)?`", PAGES):
        assert m[1] in FIELDS or m[1].endswith(".py"), f"{page}: {m[0]}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    variables = set(re.findall(r"^([A-Z]+) \?=", makefile, re.M))
    for page, m in each(r"^ *`?make ([a-z-]+)((?: [A-Z]+=\S+)*)|`make ([a-z-]+)((?: [A-Z]+=\S+)*)", PAGES):
        assert (m[1] or m[3]) in targets, f"{page}: {m[0]}"
        assert set(re.findall(r"([A-Z]+)=", m[2] or m[4] or "")) <= variables, f"{page}: {m[0]}"


def test_every_experiment_is_in_the_readme():
    table = (ROOT / "README.md").read_text()
    assert not [p.name for p in EXPERIMENTS if f"(experiments/{p.name})" not in table]


def variants() -> list[str]:
    """Each experiment, and each FILE:arg that a page or a docstring shows or lists as `:arg`."""
    found = {relative(p) for p in EXPERIMENTS} | {m[1] for _, m in each(r"(experiments/\w+\.py:[\w.]+\w)", SOURCES)}
    for path in EXPERIMENTS:
        listed = re.findall(r"`((?::[\w.]+\w[ ,]*)+)`", path.read_text().split('"""')[1])
        found |= {f"{relative(path)}:{arg}" for group in listed for arg in re.findall(r":([\w.]+)", group)}
    return sorted(found - {"experiments/yours.py:arg"})


@pytest.mark.parametrize("spec", variants())
def test_every_variant_is_a_valid_config(spec: str):
    validate(cli.load_config(spec, []))
