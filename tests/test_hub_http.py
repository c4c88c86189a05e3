"""Models go to a Hub and come back over real HTTP: pushed, trained, published, interrupted, refused.

One process with this package sends everything there is to send, a second one where it cannot be imported loads that;
the tests look at what the server got and at what the processes said.
"""

import hashlib
import json
import re
import shutil
import threading
import types
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hub_server import READ_TOKEN, TOKEN, USER, HubServer, Repository, mark, run_client
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, load_file, save_file
from tiny import BERT, GPT2, LABELS, MODELS, VARIANTS, VISION, VOCAB, tokenizer, widen

import hf_custom
from hf_custom.cards import CardRecord

SMOKE = str(Path(__file__).parent.parent / "training" / "recipes" / "clm_smoke.yaml")
ROWS = {row.name: row for row in (*MODELS, *VARIANTS)}
# What may leave a machine, by the end of a path; folders never do.
ALLOWED = re.compile(
    r"[^/]+\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json|tokenizer\.json|"
    r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|vocab\.txt|"
    r"chat_template\.jinja|processor_config\.json|preprocessor_config\.json|adapter_config\.json|card\.json|"
    r"metrics\.json|README\.md|[^/]+\.png|[^/]+\.py"
)
# First bytes of what `torch.save` and `pickle.dump` write.
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
WRONG_TOKEN = "hf_" + "WrongToken" * 3 + "abcd"
TEXT = "what is that?"
QUERIES = 2


# --- What the first process does ---


def attempt(step, function, *arguments, fail_after_puts=None, **keywords):
    """A section of the server's log; prints how the call ended."""
    mark(step, fail_after_puts)
    kinds, message = [], ""
    try:
        function(*arguments, **keywords)
    except Exception as error:  # whatever was raised is what the test wants to see
        kinds, message = [kind.__name__ for kind in type(error).__mro__], str(error)
    mark(f"after-{step}")
    print(json.dumps({"step": step, "kinds": kinds, "message": message}), flush=True)


def build_merged():
    """GPT-2 with the difference of a LoRA adapter added to its weights."""
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return get_peft_model(ROWS["CustomGPT2ForCausalLM"].build(), lora).merge_and_unload()


def build_blip2():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = hf_custom.CustomBlip2Config(
        vision_config=VISION,
        qformer_config={**small, "encoder_hidden_size": VISION["hidden_size"]},
        text_config={**GPT2, "model_type": "custom_gpt2", "vocab_size": VOCAB + 1, "eos_token_id": None},
        num_query_tokens=QUERIES,
        image_token_index=VOCAB,
    )
    return widen(hf_custom.CustomBlip2ForConditionalGeneration(config))


def build_classifier():
    config = hf_custom.CustomBlip2VisionConfig(**VISION, num_labels=LABELS)
    return widen(hf_custom.CustomBlip2VisionForImageClassification(config))


def build_qformer():
    fields = {name: BERT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = hf_custom.CustomBlip2QFormerConfig(**fields, intermediate_size=48, encoder_hidden_size=24)
    return widen(hf_custom.CustomBlip2QFormerModel(config))


def build_processor():
    height, width = VISION["image_size"]
    images = transformers.BlipImageProcessorPil(size={"height": height, "width": width})
    return hf_custom.CustomBlip2Processor(images, tokenizer(), num_query_tokens=QUERIES)


def text_inputs():
    return {"input_ids": torch.randint(0, VOCAB - 2, (2, 7))}


def image_inputs():
    return {"pixel_values": torch.randn(2, 3, *VISION["image_size"])}


def query_inputs():
    return {"query_embeds": torch.randn(2, QUERIES, 32), "encoder_hidden_states": torch.randn(2, 5, 24)}


def picture():
    return np.random.default_rng(0).integers(0, 256, (10, 13, 3), dtype=np.uint8)


def blip2_inputs():
    return dict(build_processor()(images=picture(), text=TEXT, return_tensors="pt"))


# Repository: how to build the model, its inputs, the class to load it by, what reads its text, arguments of the push.
FAMILIES = {
    "gpt2": (ROWS["CustomGPT2ForCausalLM"].build, text_inputs, "AutoModelForCausalLM", "AutoTokenizer", {}),
    "gpt2-sharded": (
        ROWS["CustomGPT2ForCausalLM"].build,
        text_inputs,
        "AutoModelForCausalLM",
        None,
        {"max_shard_size": "40KB"},
    ),
    "gpt2-lora": (build_merged, text_inputs, "AutoModelForCausalLM", None, {}),
    "bert": (
        ROWS["CustomBertForMaskedLM"].build,
        text_inputs,
        "AutoModelForMaskedLM",
        "AutoTokenizer",
        {"card": CardRecord("bert", "random ids", metrics={"bert": {"loss": 4.25}}), "tags": ["tiny"]},
    ),
    "bert-images": (
        ROWS["CustomBertForVisualQuestionAnswering"].build,
        lambda: text_inputs() | image_inputs(),
        "AutoModelForVisualQuestionAnswering",
        None,
        {},
    ),
    "blip2-vision": (build_classifier, image_inputs, "AutoModelForImageClassification", None, {}),
    "blip2-qformer": (build_qformer, query_inputs, "AutoModel", None, {}),
    "blip2": (build_blip2, blip2_inputs, "AutoModelForImageTextToText", "AutoProcessor", {}),
}


@torch.no_grad()
def expect(name, folder, model, inputs, auto_class, reader=None, reader_class=None):
    """Leave in `folder` what the second process must find in the present state of a repository, and how to load it."""
    outputs = model(**inputs).items()
    saved = {f"input.{key}": value for key, value in inputs.items()}
    saved |= {f"output.{key}": value.contiguous() for key, value in outputs if isinstance(value, torch.Tensor)}
    if model.can_generate():
        saved["tokens"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    if reader_class == "AutoProcessor":
        saved["image"] = torch.from_numpy(picture())
    if reader is not None:
        images = {"images": picture()} if "image" in saved else {}
        saved["ids"] = torch.tensor(reader(text=[TEXT], **images)["input_ids"])
    save_file(saved, folder / f"{name}.safetensors")
    case = {"auto_class": auto_class, "reader_class": reader_class, "text": TEXT}
    case["revision"] = huggingface_hub.HfApi().model_info(f"{USER}/{name}").sha
    (folder / f"{name}.json").write_text(json.dumps(case), encoding="utf-8")


def push_family(name, folder):
    build, draw, auto_class, reader_class, options = FAMILIES[name]
    model, reader = build().eval(), None
    model.push_to_hub(f"{USER}/{name}", **options)
    if reader_class is not None:
        reader = build_processor() if reader_class == "AutoProcessor" else tokenizer()
        reader.push_to_hub(f"{USER}/{name}")
    expect(name, folder, model, draw(), auto_class, reader, reader_class)


def break_main():
    """A later commit whose code must not run where an earlier one is named."""
    code = b"raise RuntimeError('code of another revision')\n"
    huggingface_hub.upload_file(path_or_fileobj=code, path_in_repo="modeling_gpt2.py", repo_id=f"{USER}/gpt2")


def train_and_push(folder):
    """Two checkpoints, each pushed, from a folder that also holds what is nobody else's business."""
    from training.trainer import CustomTrainer

    folder.mkdir()
    for name in (".env", "train.log", "notes.txt", "secrets.json"):
        (folder / name).write_text(f"HF_TOKEN={TOKEN}\n", encoding="utf-8")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id=f"{USER}/trained",
        hub_token=TOKEN,
        hub_strategy="every_save",
        hub_always_push=True,
    )
    ids = torch.randint(0, VOCAB - 2, (4, 9))
    model = ROWS["CustomGPT2ForCausalLM"].build()
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = CustomTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer())

    class Wait(transformers.TrainerCallback):
        """Steps of milliseconds would overtake the upload of the checkpoint before."""

        def on_save(self, *_, **__):
            trainer._finish_current_push()

    trainer.add_callback(Wait())
    trainer.train()
    trainer.push_to_hub()


def run_script(folder):
    """A script of the README, as a user runs it."""
    from training import run_clm

    run_clm.main([SMOKE, "--output_dir", str(folder), "--push_to_hub", "--hub_model_id", f"{USER}/script"])


def save_folder(folder, **options):
    """A model's folder as a user has it; gives the model."""
    model = ROWS["CustomGPT2ForCausalLM"].build()
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    card = {"name": "tiny", "data": "random ids", "metrics": {"tiny": {"loss": 4.5}}}
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return model


@contextmanager
def without_waiting():
    """The client tries a lost connection again after waits of seconds, which are left out here."""
    module = huggingface_hub.utils._http
    waiting, module.time = module.time, types.SimpleNamespace(**vars(module.time) | {"sleep": lambda seconds: None})
    try:
        yield
    finally:
        module.time = waiting


def publish(*arguments, **keywords):
    from hf_custom.hub import publish

    publish(*arguments, **keywords)


def publish_interrupted(folder):
    model = save_folder(folder, max_shard_size="20KB")
    with without_waiting():
        attempt("interrupted", publish, folder, f"{USER}/resumed", fail_after_puts=2)
    attempt("resumed", publish, folder, f"{USER}/resumed")
    attempt("unchanged", publish, folder, f"{USER}/resumed")
    expect("resumed", folder.parent, model, text_inputs(), "AutoModelForCausalLM", tokenizer(), "AutoTokenizer")


def publish_refused(folder):
    save_folder(folder)
    attempt("wrong-token", publish, folder, f"{USER}/refused", token=WRONG_TOKEN)
    attempt("read-token", publish, folder, f"{USER}/refused", token=READ_TOKEN)
    huggingface_hub.create_repo(f"{USER}/existing")
    attempt("read-token-there", publish, folder, f"{USER}/existing", token=READ_TOKEN)
    attempt("foreign", publish, folder, "nobody/refused")
    attempt("no-folder", publish, folder / "absent", f"{USER}/refused")
    attempt("dry-run", publish, folder, f"{USER}/refused", dry_run=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "note": TOKEN}), encoding="utf-8")
    attempt("secret", publish, folder, f"{USER}/refused")


def publish_littered(folder):
    save_folder(folder)
    torch.save({"token": TOKEN}, folder / "training_args.bin")
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}\n", encoding="utf-8")
    (folder / "train.log").write_text(f"private log {TOKEN}\n", encoding="utf-8")
    (folder / "checkpoint-1").mkdir()
    torch.save({"private": 1}, folder / "checkpoint-1" / "optimizer.pt")
    shutil.copy(folder / "config.json", folder / "checkpoint-1")
    attempt("littered", publish, folder, f"{USER}/littered", commit_message="Only what is meant")
    attempt("branch", publish, folder, f"{USER}/littered", revision="v1")
    attempt("private", publish, folder, f"{USER}/hidden", private=True)
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "vocab.txt").write_text("private words\n", encoding="utf-8")
    # Names that are allowed, of files that are not there.
    (folder / "vocab.txt").symlink_to(outside / "vocab.txt")
    (folder / "more").symlink_to(outside)
    attempt("linked", publish, folder, f"{USER}/linked")


def send_everything(folder):
    """All of the first process; each step says how it ended, so that one failure leaves the others."""
    transformers.set_seed(0)
    torch.set_num_threads(1)
    folder = Path(folder)
    for name in FAMILIES:
        attempt(f"push-{name}", push_family, name, folder)
    attempt("break", break_main)
    attempt("train", train_and_push, folder / "trained")
    attempt("script", run_script, folder / "script")
    for function in (publish_interrupted, publish_refused, publish_littered):
        attempt(function.__name__, function, folder / function.__name__)


# Repositories whose card has a snippet that pins a commit.
WITH_CARD = (*FAMILIES, "resumed", "trained", "script")

# Loads each case by name where the package cannot be imported, pushes it to a second repository and loads that.
LOAD = """
import sys
sys.modules["hf_custom"] = None  # importing it fails from here on, installed or not
try:
    import hf_custom
except ImportError:
    pass
else:
    sys.exit("hf_custom can be imported")
import json
import re
import traceback
from pathlib import Path
import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

user, folder = sys.argv[1], Path(sys.argv[2])


@torch.no_grad()
def load(case, saved, repo_id, revision):
    options = {"revision": revision, "trust_remote_code": True}
    model = getattr(transformers, case["auto_class"]).from_pretrained(repo_id, **options).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = {name.removeprefix("input."): value for name, value in saved.items() if name.startswith("input.")}
    found = model(**inputs)
    for name, expected in saved.items():
        if name.startswith("output."):
            torch.testing.assert_close(found[name.removeprefix("output.")], expected, rtol=1e-5, atol=1e-5)
    if "tokens" in saved:
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), saved["tokens"])
    if case["reader_class"] is None:
        return [model]
    reader = getattr(transformers, case["reader_class"]).from_pretrained(repo_id, **options)
    images = {"images": saved["image"].numpy()} if "image" in saved else {}
    assert reader(text=[case["text"]], **images)["input_ids"] == saved["ids"].tolist()
    return [model, reader]


def twice(name):
    case = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    saved = load_file(folder / f"{name}.safetensors")
    for part in load(case, saved, f"{user}/{name}", case["revision"]):
        part.push_to_hub(f"{user}/{name}-again")
    load(case, saved, f"{user}/{name}-again", "main")


def load_main():
    transformers.AutoModelForCausalLM.from_pretrained(f"{user}/gpt2", trust_remote_code=True)


def load_config(repo_id, **options):
    return lambda: transformers.AutoConfig.from_pretrained(f"{user}/{repo_id}", trust_remote_code=True, **options)


def run_snippet(name):
    # What the card says, as it stands there.
    card = Path(hf_hub_download(f"{user}/{name}", "README.md")).read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\\n(.*?)\\n```", card, re.DOTALL).group(1), names)
    print(json.dumps({"snippet": name, "model": type(names["model"]).__name__}), flush=True)


steps = {path.stem: lambda name=path.stem: twice(name) for path in sorted(folder.glob("*.json"))}
steps |= {f"snippet-{name}": lambda name=name: run_snippet(name) for name in sys.argv[3:]}
steps |= {
    "main": load_main,
    "missing": load_config("absent"),
    "no-revision": load_config("bert", revision="v9"),
    "hidden-without-token": load_config("secret", token=False),
    "hidden": load_config("secret"),
}
for name, step in steps.items():
    error, message = None, ""
    try:
        step()
    except Exception as found:
        error, message = found, traceback.format_exc()
    kinds = [] if error is None else [kind.__name__ for kind in type(error).__mro__]
    print(json.dumps({"step": name, "kinds": kinds, "message": str(error), "trace": message}), flush=True)
"""


# --- What the tests see ---


def ends_of(run):
    """How each step ended, by its name."""
    stdout, stderr, code = run
    assert code == 0, stderr
    found = [json.loads(line) for line in stdout.splitlines() if line.startswith('{"step"')]
    return {end["step"]: end for end in found}


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def sent(hub, root):
    """How the steps of the first process ended."""
    script = "import sys, test_hub_http; test_hub_http.send_everything(sys.argv[1])"
    return ends_of(run_client(hub, script, root, folder=root))


@pytest.fixture(scope="module")
def loaded(hub, root, sent):
    """How the steps of the second process ended."""
    folder = root / "second"
    folder.mkdir()
    secret = hub.repositories[f"{USER}/secret"] = Repository(private=True)
    secret.commit("main", hub.repositories[f"{USER}/bert"].files())
    return ends_of(run_client(hub, LOAD, USER, root, *WITH_CARD, folder=folder, has_package=False))


def assert_only_allowed(hub, *repo_ids):
    """Nothing but the files of a model left for these repositories, no pickle and no token among them."""
    found = [item for item in hub.received if item.repo_id in repo_ids]
    assert {item.route for item in found} >= {"sample", "file", "lfs"}
    refused = {(item.repo_id, item.path) for item in found if not ALLOWED.fullmatch(item.path or "")}
    assert not refused
    for item in found:
        is_text = not item.path.endswith((".safetensors", ".png"))
        assert not item.content.startswith(PICKLES if is_text else PICKLES[:1]), item.path
        assert TOKEN.encode() not in item.content, item.path


def assert_same_files(files, folder, names):
    """A repository has these files of a folder; the metadata of weights may say more there."""
    for name in names:
        if name.endswith(".safetensors"):
            expected = load_file(folder / name)
            assert all(torch.equal(tensor, expected.pop(key)) for key, tensor in load(files[name]).items()), name
            assert not expected
        else:
            assert files[name] == (folder / name).read_bytes(), name


def assert_ended(ends, step):
    assert ends[step]["kinds"] == [], ends[step].get("trace") or ends[step]["message"]


each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
def test_family_is_pushed_with_its_code(name, hub, root, sent):
    assert_ended(sent, f"push-{name}")
    revision = json.loads((root / f"{name}.json").read_text(encoding="utf-8"))["revision"]
    files = hub.repositories[f"{USER}/{name}"].files(revision)
    assert {"README.md", "config.json"} <= files.keys()
    references = json.loads(files["config.json"])["auto_map"].values()
    package = Path(hf_custom.__file__).parent
    code = {path for path in files if path.endswith(".py")}
    assert {f"{reference.split('.')[0]}.py" for reference in references} <= code
    assert all(files[path] == (package / path).read_bytes() for path in code)
    assert_only_allowed(hub, f"{USER}/{name}")


def test_sharded_model_is_pushed_in_parts(hub, sent):
    files = hub.repositories[f"{USER}/gpt2-sharded"].files()
    shards = {path for path in files if path.endswith(".safetensors")}
    assert len(shards) > 2
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == shards


@each_family
def test_family_loads_by_name_without_the_package_and_is_pushed_again(name, hub, loaded):
    """At the commit that is named, though a later one on `gpt2` has code that fails; the copy has the same code."""
    assert_ended(loaded, name)
    first, second = hub.repositories[f"{USER}/{name}"], hub.repositories[f"{USER}/{name}-again"].files()
    files = list(first.commits.values())[-2 if name == "gpt2" else -1]
    code = {path: content for path, content in files.items() if path.endswith(".py")}
    assert code and {path: content for path, content in second.items() if path.endswith(".py")} == code


def test_a_later_commit_runs_only_where_no_revision_is_named(loaded):
    assert loaded["main"]["kinds"][0] == "RuntimeError" and "code of another revision" in loaded["main"]["message"]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("missing", f"{USER}/absent.*hf auth login"),
        ("no-revision", f"v9.*{USER}/bert"),
        ("hidden-without-token", f"{USER}/secret.*hf auth login"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_a_remedy(step, words, loaded):
    assert "OSError" in loaded[step]["kinds"]
    assert re.search(words, loaded[step]["message"], re.DOTALL), loaded[step]["message"]


def test_hidden_repository_loads_with_a_token(loaded):
    assert_ended(loaded, "hidden")


def test_trainer_pushes_each_checkpoint_and_nothing_private(hub, root, sent):
    assert_ended(sent, "train")
    repo = hub.repositories[f"{USER}/trained"]
    files = repo.files()
    names = ("config.json", "model.safetensors", "modeling_gpt2.py", "tokenizer.json")
    assert_same_files(files, root / "trained", names)
    assert "README.md" in files
    # Two checkpoints, with different weights.
    assert len({files["model.safetensors"] for files in repo.commits.values() if "model.safetensors" in files}) == 2
    assert_only_allowed(hub, f"{USER}/trained")


def test_script_pushes_model_and_card_with_its_numbers(hub, root, sent):
    assert_ended(sent, "script")
    files = hub.repositories[f"{USER}/script"].files()
    metrics = json.loads((root / "script" / "metrics.json").read_text())
    results = huggingface_hub.ModelCard(files["README.md"].decode()).data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == metrics and "loss_curve.png" in files
    assert_only_allowed(hub, f"{USER}/script")


def test_pushed_model_has_the_card_that_was_given(hub, sent):
    assert_ended(sent, "push-bert")
    card = huggingface_hub.ModelCard(hub.repositories[f"{USER}/bert"].files()["README.md"].decode())
    assert [result.metric_value for result in card.data.eval_results] == [4.25] and "tiny" in card.data.tags
    other = hub.repositories[f"{USER}/gpt2"].files()["README.md"].decode()
    assert "No results on held-out data were recorded." in other


def test_no_token_is_in_the_body_of_any_request(hub, sent, loaded):
    bodies = [(request.path, request.body) for request in hub.log]
    bodies += [(item.path, item.content) for item in hub.received]
    tokens = [token.encode() for token in (TOKEN, READ_TOKEN, WRONG_TOKEN)]
    assert len(bodies) > 100 and not [path for path, body in bodies if any(token in body for token in tokens)]


# --- publish ---


def objects_put(hub, step, status):
    """Hashes of the LFS objects that were sent during a step and answered so."""
    return [request.path[-64:] for request in hub.section(step) if request.method == "PUT" and request.status == status]


def test_interrupted_upload_is_completed_without_sending_anything_twice(hub, root, sent):
    assert "OSError" in sent["interrupted"]["kinds"], sent["interrupted"]
    assert f"{USER}/resumed" in sent["interrupted"]["message"]
    folder = root / "publish_interrupted"
    names = {path.name for path in folder.iterdir()}
    files = hub.repositories[f"{USER}/resumed"].files()
    assert set(files) - names <= {".gitattributes", "README.md"}
    shards = {hashlib.sha256(files[name]).hexdigest() for name in names if name.endswith(".safetensors")}
    first, second = objects_put(hub, "interrupted", 200), objects_put(hub, "resumed", 200)
    assert len(first) == 2 < len(shards) and objects_put(hub, "interrupted", 0)
    assert_ended(sent, "resumed")
    assert sorted(first + second) == sorted(shards)
    assert_same_files(files, folder, names)
    assert_only_allowed(hub, f"{USER}/resumed")


def test_published_model_loads_by_name_without_the_package(loaded):
    assert_ended(loaded, "resumed")


@pytest.mark.parametrize("name", WITH_CARD)
def test_snippet_of_the_card_runs_at_the_commit_of_its_weights(name, hub, loaded):
    """On `gpt2` the code of a later commit fails."""
    assert_ended(loaded, f"snippet-{name}")
    repository = hub.repositories[f"{USER}/{name}"]
    card = repository.files()["README.md"].decode()
    pinned = set(re.findall(r'revision="(.*?)"', card))
    assert len(pinned) == 1 and pinned <= set(repository.commits)
    files = repository.files(pinned.pop())
    weights = [path for path in files if path.endswith(".safetensors")]
    assert weights and all(files[path] == repository.files()[path] for path in weights)
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.endswith(".py")):
        digest.update(path.encode() + b"\0" + files[path] + b"\0")
    assert f"sha256 `{digest.hexdigest()}`" in card


def test_half_an_upload_is_no_commit(hub, sent):
    """A commit has all of the weights or none, so that nobody loads a mixture."""
    assert_ended(sent, "resumed")
    states = hub.repositories[f"{USER}/resumed"].commits.values()
    weights = {frozenset(name for name in files if name.endswith(".safetensors")) for files in states}
    whole = set(json.loads(list(states)[-1]["model.safetensors.index.json"])["weight_map"].values())
    assert weights == {frozenset(), frozenset(whole)}
    assert all("config.json" in files for files in states if whole & files.keys())


def test_publishing_an_unchanged_folder_sends_no_content_and_makes_no_commit(hub, sent):
    assert_ended(sent, "unchanged")
    section = hub.section("unchanged")
    assert not [request for request in section if request.method == "PUT" or "/commit/" in request.path]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("wrong-token", "token.*hf auth login"),
        ("read-token", "token.*write"),
        ("foreign", "nobody"),
        ("no-folder", "absent"),
        ("secret", r"config\.json"),
    ],
)
def test_what_cannot_be_published_is_refused_by_name_and_sends_no_file(step, words, hub, sent):
    assert {"OSError", "ValueError"} & set(sent[step]["kinds"]), sent[step]
    assert re.search(words, sent[step]["message"], re.DOTALL), sent[step]["message"]
    # It never prints the secret that it found, nor the token that it was given.
    assert TOKEN not in sent[step]["message"] and WRONG_TOKEN not in sent[step]["message"]
    sent_files = r"/preupload/|/lfs/|/commit/|validate-yaml"
    assert not [request for request in hub.section(step) if re.search(sent_files, request.path)]


def test_token_that_may_not_write_stores_nothing_in_a_repository_that_is_there(hub, sent):
    """The client takes a refusal to make a repository that is there for a success, and would send samples of files."""
    assert "OSError" in sent["read-token-there"]["kinds"]
    assert re.search("token.*write", sent["read-token-there"]["message"])
    assert not [item for item in hub.received if item.repo_id == f"{USER}/existing"]
    assert len(hub.repositories[f"{USER}/existing"].commits) == 1


@pytest.mark.parametrize("step", ["secret", "no-folder", "dry-run"])
def test_a_refusal_of_the_folder_and_a_dry_run_send_nothing_at_all(step, hub, sent):
    if step == "dry-run":
        assert_ended(sent, step)
    else:
        assert sent[step]["kinds"]
    assert not [request for request in hub.section(step) if request.method != "GET" or request.body]


def test_refused_folder_left_no_repository_of_a_writer(hub, sent):
    assert sent["secret"]["kinds"] and f"{USER}/refused" not in hub.repositories


def test_litter_in_the_folder_stays_there(hub, root, sent):
    assert_ended(sent, "littered")
    assert_ended(sent, "branch")
    repo = hub.repositories[f"{USER}/littered"]
    folder = root / "publish_littered"
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    meant = names - {".env", "train.log", "training_args.bin"}
    assert set(repo.files()) - {".gitattributes", "README.md"} == meant - {"README.md"}
    assert_only_allowed(hub, f"{USER}/littered")
    assert "Only what is meant" in repo.messages.values()


def test_revision_is_a_branch_of_its_own(hub, sent):
    assert_ended(sent, "branch")
    repo = hub.repositories[f"{USER}/littered"]
    assert repo.files("v1").keys() >= {"config.json", "model.safetensors"} and set(repo.branches) == {"main", "v1"}


def test_private_repository_is_created_so(hub, sent):
    assert_ended(sent, "private")
    assert hub.repositories[f"{USER}/hidden"].private and not hub.repositories[f"{USER}/littered"].private


def test_link_out_of_the_folder_is_not_followed(hub, sent):
    """Whether the folder is refused or the link left out."""
    assert not sent["linked"]["kinds"] or "vocab.txt" in sent["linked"]["message"], sent["linked"]
    assert {"ImportError", "ModuleNotFoundError", "NameError"}.isdisjoint(sent["linked"]["kinds"])
    assert not [item.path for item in hub.received if b"private words" in item.content]


# --- The server itself ---


def ask(hub, method, path, body=None, token=TOKEN, **headers):
    """Status, headers and content."""
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(hub.url + path, data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_server_answers_as_the_hub_does_and_is_gone_at_the_end():
    threads = threading.active_count()
    with HubServer() as hub:
        repo = hub.repositories[f"{USER}/a"] = Repository()
        sha = repo.commit("main", {"b/c.txt": b"0123456789"})
        path = f"/{USER}/a/resolve/main/b/c.txt"
        status, headers, content = ask(hub, "GET", path, Range="bytes=2-4")
        assert (status, content, headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
        status, headers, content = ask(hub, "HEAD", path)
        assert (status, content, headers["Content-Length"], headers["X-Repo-Commit"]) == (200, b"", "10", sha)
        for path, code in {
            f"/api/models/{USER}/z": "RepoNotFound",
            f"/api/models/{USER}/a/revision/v9": "RevisionNotFound",
            f"/{USER}/a/resolve/main/z.txt": "EntryNotFound",
        }.items():
            status, headers, _ = ask(hub, "GET", path)
            assert (status, headers["X-Error-Code"]) == (404, code)
        assert ask(hub, "GET", "/api/whoami-v2", token=WRONG_TOKEN)[0] == 401
        assert ask(hub, "POST", f"/api/models/{USER}/a/branch/v1", b"{}", token=READ_TOKEN)[0] == 403
        digest = hashlib.sha256(b"weights").hexdigest()
        assert ask(hub, "PUT", f"/{USER}/a/lfs/7/{digest}", b"wrights")[0] == 400 and not repo.objects
        assert ask(hub, "PUT", f"/{USER}/a/lfs/7/{digest}", b"weights")[0] == 200 and repo.objects
        assert [request.status for request in hub.log] == [206, 200, 404, 404, 404, 401, 403, 400, 200]
        assert [item.content for item in hub.received] == [b"wrights", b"weights"]
    assert threading.active_count() == threads
