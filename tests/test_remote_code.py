"""A saved model loads, runs and saves again where this package cannot be imported, through the code saved with it."""

import ast
import filecmp
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import BERT, GPT2, MODELS, SEQ2SEQ, VISION, widen

import hf_custom

PACKAGE = Path(hf_custom.__file__).parent

# Loads each case from one folder after another and saves it to the next; prints folder and name of those that load and
# give the recorded outputs and tokens.
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
from itertools import pairwise
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
    wrong = report["unexpected_keys" if case["inputs"] is None else "missing_keys"]
    assert all("pooler." in name for name in wrong), report
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for part in (config, model.config, model, model.base_model):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    assert type(model).__name__ == case["reference"].split(".")[1]
    if case["inputs"] is not None:
        # Some classes draw wrong partners.
        torch.manual_seed(0)
        outputs = model.eval()(**case["inputs"])
        for name, expected in case["outputs"].items():
            torch.testing.assert_close(outputs[name], expected)
    if case["tokens"] is not None:
        tokens = model.generate(**case["inputs"], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, case["tokens"])
    if type(model).__name__ == case["folder"]:
        model.save_pretrained(target)
        model.base_model.save_pretrained(target / "base")


cases, *folders = map(Path, sys.argv[1:])
for source, target in pairwise(folders):
    for name, case in torch.load(cases).items():
        try:
            run(case, source / case["folder"], target / case["folder"])
            print(source.name, name)
        except Exception:
            print(source.name, name, traceback.format_exc(), file=sys.stderr)
"""

QFORMER = {name: BERT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
QFORMER |= {"intermediate_size": 48, "bos_token_id": 97}
ROWS = MODELS + SEQ2SEQ
# The model without a head, the first of each family.
BASES = {row.config_class: row for row in reversed(ROWS)}
# Folders that the model without a head is loaded from too: of each family, of a decoder, and of one with images.
HEADS = ("GPT2ForCausalLM", "BertForMaskedLM", "BertForCausalLM", "BertForVisualQuestionAnswering", "Seq2SeqLM")
# (class to load, Auto class to load it by, class that was saved); no Auto class serves some classes.
CASES = {
    f"{row.name} by {auto_name} from {saved.name}": (row, auto_name, saved)
    for saved in ROWS
    for row in (saved, *([BASES[saved.config_class]] if saved.name.endswith(HEADS) else []))
    for auto_name in [name for name, named in row.config_class.auto_classes.items() if named.endswith(f".{row.name}")]
    or [None]
}
# Both stages of a BLIP-2 with our language model, and the Auto class of each.
WRITER, FIRST_STAGE = hf_custom.CustomBlip2ForConditionalGeneration, hf_custom.CustomBlip2ForPreTraining
BLIP2 = {WRITER: "AutoModelForImageTextToText", FIRST_STAGE: None}
# Folders without a head, a BERT and a tower, which every Auto class opens: its class, with a fresh head.
TOWER = hf_custom.CustomBlip2VisionModel
OTHERS = {
    f"{auto_name} from {folder.__name__}": {
        "folder": folder.__name__,
        "auto_name": auto_name,
        "reference": reference,
        "inputs": None,
        "tokens": None,
    }
    for folder in (hf_custom.CustomBertModel, TOWER)
    for auto_name, reference in folder.config_class.auto_classes.items()
    if auto_name != "AutoConfig"
}
each_blip2 = pytest.mark.parametrize("model_class", BLIP2, ids=lambda model_class: model_class.__name__)
each_class = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@cache
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
    return {
        "folder": saved.name,
        "auto_name": auto_name,
        "reference": f"{row.model_class.__module__.rpartition('.')[2]}.{row.name}",
        "inputs": inputs,
        "outputs": {name: value for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)},
        "tokens": model.generate(**inputs, max_new_tokens=4, do_sample=False) if row.is_generative else None,
    }


def build_blip2(model_class):
    config = hf_custom.CustomBlip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "use_qformer_text_input": model_class is FIRST_STAGE},
        text_config={**GPT2, "model_type": "custom_gpt2"},
        num_query_tokens=2,
        image_text_hidden_size=8,
        image_token_index=96 if model_class is WRITER else None,
    )
    return widen(model_class(config)).eval()


def blip2_case(model):
    inputs = {"pixel_values": torch.randn(2, 3, *VISION["image_size"]), "input_ids": torch.randint(2, 90, (2, 6))}
    if type(model) is WRITER:
        inputs["input_ids"][:, :2] = 96
    torch.manual_seed(0)
    return {
        "folder": type(model).__name__,
        "auto_name": BLIP2[type(model)],
        "reference": f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}",
        "inputs": inputs,
        "outputs": {name: value for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)},
        "tokens": model.generate(**inputs, max_new_tokens=4, do_sample=False) if type(model) is WRITER else None,
    }


def run_without_package(cases, *folders):
    """Folder and name of the cases that passed, and what the others said."""
    cache = cases.with_suffix(".cache")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    command = [sys.executable, "-I", "-c", SCRIPT, str(cases), *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cases.parent)
    return run.stdout.splitlines(), run.stderr


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """Models saved here, by a process without the package from these, and again from what it saved."""
    root = tmp_path_factory.mktemp("remote")
    folders = [root / name for name in ("first", "second", "third")]
    models = {row.name: row.build() for row in ROWS}
    models |= {model_class.__name__: build_blip2(model_class) for model_class in BLIP2}
    models[TOWER.__name__] = widen(TOWER(hf_custom.CustomBlip2VisionConfig(**VISION)))
    for name, model in models.items():
        model.save_pretrained(folders[0] / name)
    cases = {name: case_of(models[saved.name], row, auto, saved) for name, (row, auto, saved) in CASES.items()}
    cases |= {model_class.__name__: blip2_case(models[model_class.__name__]) for model_class in BLIP2}
    cases |= OTHERS
    torch.save(cases, root / "cases.pt")
    return folders, run_without_package(root / "cases.pt", *folders)


@pytest.mark.parametrize("generation", [0, 1])
@pytest.mark.parametrize("name", [*CASES, *(model_class.__name__ for model_class in BLIP2), *OTHERS])
def test_saved_model_runs_without_the_package(name, generation, generations):
    folders, (passed, errors) = generations
    assert f"{folders[generation].name} {name}" in passed, errors


@pytest.mark.parametrize("generation", [0, 1, 2])
@each_class
def test_folder_holds_the_weights_and_the_code_and_nothing_else(row, generation, generations):
    folder = generations[0][generation] / row.name
    assert {path.name for path in folder.iterdir() if path.is_file()} == files_of(row.model_class)
    code = sorted(code_of(row.model_class))
    assert filecmp.cmpfiles(PACKAGE, folder, code, shallow=False)[0] == code


@pytest.mark.parametrize("generation", [0, 1, 2])
@each_blip2
def test_folder_of_a_blip2_holds_the_code_of_both_stages(model_class, generation, generations):
    folder = generations[0][generation] / model_class.__name__
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == files_of(model_class)
    assert {f"{stage.__module__.rpartition('.')[2]}.py" for stage in BLIP2} <= files
    # What every Auto class needs of it, those of its parts included.
    references = {*model_class.config_class.auto_classes.values(), *hf_custom.CustomGPT2Config.auto_classes.values()}
    assert {f"{reference.split('.')[0]}.py" for reference in references} <= files
    code = sorted(code_of(model_class))
    assert filecmp.cmpfiles(PACKAGE, folder, code, shallow=False)[0] == code


@pytest.mark.parametrize("generation", [1, 2])
@each_class
def test_base_of_a_remote_model_is_saved_with_its_code(row, generation, generations):
    folder = generations[0][generation] / row.name / "base"
    assert {path.name for path in folder.iterdir()} == files_of(BASES[row.config_class].model_class)


def test_every_auto_class_is_tried():
    tried = {auto_name for _, auto_name, _ in CASES.values()}
    assert tried == {None} | {name for row in ROWS for name in row.config_class.auto_classes} - {"AutoConfig"}
