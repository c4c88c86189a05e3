"""The layers of the package, what each may import, and the size of its files, read from the source."""

import ast
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "hf_custom").glob("*.py"))
SCRIPTS = sorted((ROOT / "training").rglob("*.py"))

# From the bottom up; a file imports only from levels below its own.
LEVELS = [
    ("ops", "outputs"),
    ("checks", "dropout", "matmul"),
    ("contrastive", "packing", "layers", "losses", "parallel"),
    ("attention", "lstm"),
    ("configuration_*",),
    ("modeling_*", "processing_*", "tokenization_*"),
    ("folders", "presets"),
    ("elmo_weights", "tensor_bundle"),
    ("conversion", "export"),
    ("registry",),
    ("loading", "stacks"),
    ("cards", "inspection", "look", "serving"),
    ("hub",),
    ("cli",),
]
CONFIGURATION, MODELING = 4, 5
# Imports allowed within a level: (importer, imported).
SIBLINGS = [
    ("configuration_*", "configuration_base"),
    ("configuration_bert", "configuration_blip2"),
    # The language model of a BLIP-2 is one of ours.
    ("configuration_blip2", "configuration_gpt2"),
    ("modeling_*", "modeling_*"),
    ("processing_*", "processing_*"),
]
# What may stand in a folder on the Hub; a configuration is read where torch is not installed.
SHIPPED_REQUIREMENTS = {"torch", "transformers", "huggingface_hub"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 800, 90

TEXT_FOLDERS = ("hf_custom", "training", "tests", "hub_cards", ".ci")
TEXT_SUFFIXES = {"", ".cfg", ".json", ".jsonl", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}


def name_of(path):
    return str(path.relative_to(ROOT))


each_module = pytest.mark.parametrize("path", [path for path in PACKAGE if path.stem != "__init__"], ids=name_of)
each_source = pytest.mark.parametrize("path", PACKAGE + SCRIPTS, ids=name_of)


def level_of(stem):
    levels = [level for level, names in enumerate(LEVELS) if any(fnmatch(stem, name) for name in names)]
    assert len(levels) == 1, f"{stem}.py belongs to {len(levels)} levels"
    return levels[0]


def imports_of(path):
    """(number of dots, module) of every import, those inside functions and under conditions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


def absolute_imports(path):
    return {module.split(".")[0] for dots, module in imports_of(path) if dots == 0}


def relative_imports(path):
    return {module for dots, module in imports_of(path) if dots}


@each_module
def test_file_imports_only_from_lower_levels(path):
    level = level_of(path.stem)
    for module in relative_imports(path):
        is_sibling = any(fnmatch(path.stem, importer) and fnmatch(module, imported) for importer, imported in SIBLINGS)
        assert level_of(module) < level or is_sibling, f"{path.stem} imports {module}"
        assert level != CONFIGURATION or is_sibling, f"{path.stem} imports {module}"


@each_source
def test_relative_imports_have_one_dot_and_a_module(path):
    """The host's scan for the files to ship follows `from .x import y` and nothing else."""
    for dots, module in imports_of(path):
        assert dots == 0 or (dots == 1 and module and "." not in module), f"{'.' * dots}{module}"


@each_module
def test_host_ships_every_file_that_is_imported(path):
    assert set(get_relative_imports(path)) == relative_imports(path)
    assert all((path.parent / f"{module}.py").is_file() for module in relative_imports(path))


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_package_imports_neither_itself_by_name_nor_the_scripts(path):
    assert not absolute_imports(path) & {"hf_custom", "training", "tests"}


@each_module
def test_shipped_file_needs_only_the_host(path):
    level = level_of(path.stem)
    allowed = SHIPPED_REQUIREMENTS - ({"torch"} if level == CONFIGURATION else set())
    if level <= MODELING:
        assert absolute_imports(path) - set(sys.stdlib_module_names) <= allowed


@each_module
def test_modeling_file_keeps_its_annotations(path):
    """The host reads them as types: `from __future__ import annotations` makes strings of them."""
    assert not path.stem.startswith("modeling_") or "__future__" not in absolute_imports(path)


@each_source
def test_file_and_its_functions_are_short(path):
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


@each_source
def test_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_path_of_a_machine_is_in_the_tree():
    folders = "|".join(("tmp", "work", "root", "home"))
    pattern = re.compile(rf"(?<![\w.~-])/(?:{folders})/\w")
    files = [path for path in ROOT.glob("*") if path.is_file()]
    files += [path for folder in TEXT_FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = [path for path in files if path.suffix in TEXT_SUFFIXES and not path.name.startswith(".")]
    assert Path(__file__) in texts and ROOT / "pyproject.toml" in texts
    found = {name_of(path): match.group() for path in texts if (match := pattern.search(path.read_text()))}
    assert not found
