"""A saved model loads, runs and saves again where this package cannot be imported, through the code saved with it."""

import ast
import filecmp
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import MODELS, VISION, widen

import hf_custom

PACKAGE = Path(hf_custom.__file__).parent

# Prints the name of each case that loads, gives the recorded outputs and tokens, and is saved to `target`.
SCRIPT = """
import sys
sys.modules["hf_custom"] = None  # importing it fails from here on, installed or not
try:
    import hf_custom
except ImportError:
    pass
else:
    sys.exit("hf_custom can be imported")
import traceback
from pathlib import Path
import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def run(case, folder, target):
    if case["auto_name"] is None:
        auto_class = get_class_from_dynamic_module(case["reference"], folder)
    else:
        auto_class = getattr(transformers, case["auto_name"])
    model, report = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    # As in stock, some heads have no pooler.
    assert all(name.startswith("pooler.") for name in report["missing_keys"]), report
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for part in (config, model.config, model, model.base_model):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    assert type(model).__name__ == case["reference"].split(".")[1]
    outputs = model.eval()(**case["inputs"])
    for name, expected in case["outputs"].items():
        torch.testing.assert_close(outputs[name], expected)
    if case["tokens"] is not None:
        tokens = model.generate(**case["inputs"], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, case["tokens"])
    if type(model).__name__ == case["folder"]:
        model.save_pretrained(target)
        model.base_model.save_pretrained(target / "base")


cases, source, target = map(Path, sys.argv[1:])
for name, case in torch.load(cases).items():
    try:
        run(case, source / case["folder"], target / case["folder"])
        print(name)
    except Exception:
        print(name, traceback.format_exc(), file=sys.stderr)
"""

# The model without a head, the first of each family.
BASES = {row.config_class: row for row in reversed(MODELS)}
# (class to load, Auto class to load it by, class that was saved); no Auto class serves some classes.
CASES = {
    f"{row.name} by {auto_name} from {saved.name}": (row, auto_name, saved)
    for saved in MODELS
    for row in {row.name: row for row in (saved, BASES[saved.config_class])}.values()
    for auto_name in [name for name, named in row.config_class.auto_classes.items() if named.endswith(f".{row.name}")]
    or [None]
}
each_class = pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)


def code_of(model_class):
    """The file of a class and all that it imports from this package, directly or not."""
    needed, found = {model_class.__module__.rpartition(".")[2]}, set()
    while needed:
        module = needed.pop()
        found.add(module)
        nodes = ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text()))
        needed |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level} - found
    return {f"{module}.py" for module in found}


def files_of(model_class):
    generation = {"generation_config.json"} if model_class.can_generate() else set()
    return {"config.json", "model.safetensors"} | generation | code_of(model_class)


def case_of(model, row, auto_name, saved):
    """What to load and what it must give; computed by the class here."""
    model = model if row is saved else model.base_model
    inputs = saved.inputs() if saved.num_choices is None else {"input_ids": saved.inputs()["input_ids"]}
    if row is not saved and saved.num_choices is not None:
        inputs = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
    return {
        "folder": saved.name,
        "auto_name": auto_name,
        "reference": f"{row.model_class.__module__.rpartition('.')[2]}.{row.name}",
        "inputs": inputs,
        "outputs": {name: value for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)},
        "tokens": model.generate(**inputs, max_new_tokens=4, do_sample=False) if row.is_generative else None,
    }


def run_without_package(cases, source, target):
    """Names of the cases that passed, and what the others said."""
    cache = target.with_suffix(".cache")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    command = [sys.executable, "-I", "-c", SCRIPT, str(cases), str(source), str(target)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cases.parent)
    return run.stdout.splitlines(), run.stderr


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """Models saved here, by a process without the package from these, and by a second such process from the first's."""
    root = tmp_path_factory.mktemp("remote")
    folders = [root / name for name in ("first", "second", "third")]
    models = {row.name: row.build() for row in MODELS}
    for name, model in models.items():
        model.save_pretrained(folders[0] / name)
    cases = {name: case_of(models[saved.name], row, auto, saved) for name, (row, auto, saved) in CASES.items()}
    torch.save(cases, root / "cases.pt")
    runs = [run_without_package(root / "cases.pt", *folders[index : index + 2]) for index in range(2)]
    return folders, runs


@pytest.mark.parametrize("generation", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_saved_model_runs_without_the_package(name, generation, generations):
    passed, errors = generations[1][generation]
    assert name in passed, errors


@pytest.mark.parametrize("generation", [0, 1, 2])
@each_class
def test_folder_holds_the_weights_and_the_code_and_nothing_else(row, generation, generations):
    folder = generations[0][generation] / row.name
    assert {path.name for path in folder.iterdir() if path.is_file()} == files_of(row.model_class)
    code = sorted(code_of(row.model_class))
    assert filecmp.cmpfiles(PACKAGE, folder, code, shallow=False)[0] == code


@pytest.mark.parametrize("generation", [1, 2])
@each_class
def test_base_of_a_remote_model_is_saved_with_its_code(row, generation, generations):
    folder = generations[0][generation] / row.name / "base"
    assert {path.name for path in folder.iterdir()} == files_of(BASES[row.config_class].model_class)


def test_every_auto_class_is_tried():
    tried = {auto_name for _, auto_name, _ in CASES.values()}
    assert tried == {None} | {name for row in MODELS for name in row.config_class.auto_classes} - {"AutoConfig"}


# Opens the folder of a tower and of a BERT without a head, each under other Auto classes than it was saved under.
OTHER_CLASSES = """
import sys
sys.modules["hf_custom"] = None
import transformers
for folder, names in (("tower", ("AutoModel", "AutoModelForImageClassification")), ("bert", sys.argv[2:])):
    for name in names:
        model, report = getattr(transformers, name).from_pretrained(
            f"{sys.argv[1]}/{folder}", trust_remote_code=True, output_loading_info=True
        )
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert all("pooler." in name for name in report["unexpected_keys"]), report
        print(type(model).__name__)
"""


def test_folder_of_a_base_opens_under_every_auto_class(tmp_path):
    classes = hf_custom.CustomBertConfig.auto_classes
    names = [name for name in classes if name != "AutoConfig"]
    next(row for row in MODELS if row.name == "CustomBertModel").build().save_pretrained(tmp_path / "bert")
    tower = hf_custom.CustomBlip2VisionModel(hf_custom.CustomBlip2VisionConfig(**VISION))
    widen(tower).save_pretrained(tmp_path / "tower")
    assert (tmp_path / "bert" / "modeling_bert_heads.py").is_file()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-I", "-c", OTHER_CLASSES, str(tmp_path), *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    expected = ["CustomBlip2VisionModel", "CustomBlip2VisionForImageClassification"]
    assert run.stdout.split() == expected + [classes[name].split(".")[1] for name in names]
