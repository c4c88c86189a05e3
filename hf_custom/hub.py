"""What a trained model needs before others use it: a folder with code and card, and proof that it runs alone."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .registry import PROCESSORS

# Beside the package in a wheel, beside it one level up in a checkout.
_CARDS = next(
    (
        path
        for path in (Path(__file__).parent / "hub_cards", Path(__file__).parent.parent / "hub_cards")
        if path.is_dir()
    ),
    None,
)

# A card's task on the Hub by the kind of head.
TASKS = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "Blip2ForPreTraining": "feature-extraction",
    "ForPreTraining": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForVisualQuestionAnswering": "visual-question-answering",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
    "Blip2ForConditionalGeneration": "image-text-to-text",
}

# Runs where the package cannot be imported; prints nothing unless something is wrong.
_RELOAD = """
import sys
sys.modules["hf_custom"] = None  # from now on `import hf_custom` fails, installed or not
try:
    import hf_custom
except ImportError:
    pass
else:
    sys.exit("hf_custom can be imported")
import torch
import transformers
from safetensors.torch import load_file
folder, tensors, auto_class = sys.argv[1:]
saved = load_file(tensors)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(saved["input_ids"]).logits
difference = (logits - saved["logits"]).abs().max().item()
if not difference <= 1e-5 * max(1.0, saved["logits"].abs().max().item()):
    sys.exit(f"the reloaded model's logits differ by {difference}")
"""


def code_sha256(folder: str | Path) -> str:
    """One hash over the names and contents of the Python files of a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _auto_class_of(model: PreTrainedModel) -> str | None:
    """The Auto class that gives the model's own class, the most particular one where several do; `None` without any."""
    name = type(model).__name__
    found = [auto for auto, reference in model.config.auto_classes.items() if reference.endswith(f".{name}")]
    return found[-1] if found else None


def _reference_of(model: PreTrainedModel) -> str:
    """The model's class as `file.Class`, by which the host finds it in a folder with code."""
    return f"{type(model).__module__.split('.')[-1]}.{type(model).__name__}"


def render_card(
    model: PreTrainedModel,
    name: str,
    data: str,
    metrics: dict[str, dict[str, float]],
    training: dict[str, object],
    code_hash: str,
    curve: str | None = None,
    pictures: dict[str, str] | None = None,
    sample: str | None = None,
    license: str = "apache-2.0",
    language: str = "en",
) -> ModelCard:
    """The model card of a trained model, from measured values alone.

    Args:
        name: the model's name, and the card's title.
        data: what it was trained on, in words.
        metrics: a row of measured values by metric for each system, the model's own row under `name` first.
        training: training arguments to show.
        code_hash: `code_sha256` of the folder.
        curve: file name of the loss curve's picture, in the same folder.
        pictures: titles by file name, of more pictures in it.
        sample: text that the model wrote.
    """
    if name not in metrics or not metrics[name]:
        raise ValueError(f"`metrics` has no row for {name!r}. Evaluate the model before writing its card.")
    if _CARDS is None:
        raise FileNotFoundError("the folder hub_cards is missing from the installation. Install the package again.")
    class_name = type(model).__name__
    task = next((task for head, task in TASKS.items() if class_name.endswith(head)), "feature-extraction")
    family = model.config.model_type.removeprefix("custom_")
    card_data = ModelCardData(
        model_name=name,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["custom_code", family],
        eval_results=[
            EvalResult(
                task_type=task, dataset_type="held-out", dataset_name=data, metric_type=metric, metric_value=value
            )
            for metric, value in metrics[name].items()
        ],
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(_CARDS / "_template.md"),
        title=name,
        prose=(_CARDS / f"{family}.md").read_text(encoding="utf-8").strip(),
        auto_class=_auto_class_of(model),
        reader="AutoProcessor" if type(model.config) in PROCESSORS else "AutoTokenizer",
        reference=_reference_of(model),
        class_name=class_name,
        parameters=f"{model.num_parameters():,}",
        data_description=data,
        metric_names=list(metrics[name]),
        metric_rows=metrics,
        training=training,
        code_hash=code_hash,
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
        curve=curve,
        pictures=pictures or {},
        sample=sample,
    )


def save_model_folder(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pictures=(), **card_fields
) -> Path:
    """Write weights, code, tokenizer, pictures and card as one folder, which appears whole or not at all.

    Args:
        folder: replaced if it exists.
        pictures: files to copy beside the card.
        card_fields: arguments of `render_card`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for picture in pictures:
            shutil.copy(picture, partial)
        render_card(model, code_hash=code_sha256(partial), **card_fields).save(partial / "README.md")
        os.chmod(partial, 0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


@torch.no_grad()
def check_runs_alone(folder: str | Path, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Load the folder in a new process that has torch and transformers but cannot import this package, and compare.

    Raises:
        RuntimeError: when it does not load there or its logits are not those of `model`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tensors = Path(scratch) / "expected.safetensors"
        logits = model.eval()(input_ids).logits
        save_file({"input_ids": input_ids.cpu(), "logits": logits.cpu().contiguous()}, tensors)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": scratch,
            "HF_MODULES_CACHE": f"{scratch}/modules",
        }
        environment.pop("PYTHONPATH", None)
        result = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(Path(folder).resolve()), str(tensors), _auto_class_of(model)],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise RuntimeError(f"{folder} does not run alone: {result.stderr.strip()}")


__all__ = ["check_runs_alone", "code_sha256", "render_card", "save_model_folder"]
