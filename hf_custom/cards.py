"""Model cards, rendered from what a model's folder holds: configuration, weights, code and the numbers in `card.json`.

Nothing in a card is typed by hand but the prose of its family in `hub_cards/`. `card.json` is written when the model is
scored; a card can be rendered from it again at any time, and is, when the folder is pushed and its name is known.
"""

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .folders import TARGET_TOKENIZER, find_templates, read_json
from .loading import load_config, stored_tensors

RECORD = "card.json"
# By this line a card is known as one that may be rendered again; the host's own placeholder says the other.
MARK = "<!-- rendered from card.json by hf_custom -->"
HOST_MARK = "has been automatically generated"

_IMAGE = 'image = Image.new("RGB", (64, 64), "white")  # yours'
_NEIGHBOURS = "word = reader.convert_ids_to_tokens(0)  # yours\nprint(word, {}.most_similar(word, tokenizer=reader))"
_GENERATE = "ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)\nprint(reader.decode(ids[0]))"
# By the kind of head: task on the Hub, and what to do with `model` and `reader`. The first that fits counts.
TASKS: dict[str, tuple[str, str]] = {
    "GPT2ForCausalLM": ("text-generation", f'inputs = reader("It was", return_tensors="pt")\n{_GENERATE}'),
    "ElmoForCausalLM": ("text-generation", f'inputs = reader("It was", return_tensors="pt")\n{_GENERATE}'),
    "ElmoForPreTraining": ("feature-extraction", ""),
    "Word2VecForPreTraining": ("feature-extraction", _NEIGHBOURS.format("model.word2vec")),
    "Word2VecModel": ("feature-extraction", _NEIGHBOURS.format("model")),
    "Blip2ForConditionalGeneration": (
        "image-text-to-text",
        f'{_IMAGE}\ninputs = reader(images=image, text="", return_tensors="pt")\n{_GENERATE}',
    ),
    "Blip2ForPreTraining": ("feature-extraction", ""),
    "Blip2ForImageTextRetrieval": ("feature-extraction", ""),
    "ForVisualQuestionAnswering": ("visual-question-answering", ""),
    "ForImageTextRetrieval": ("feature-extraction", ""),
    "ForImageClassification": (
        "image-classification",
        f'{_IMAGE}\nlogits = model(**reader(image, return_tensors="pt")).logits\n'
        "print(model.config.id2label[logits.argmax().item()])",
    ),
    "ForSeq2SeqLM": (
        "translation",
        'inputs = reader("It was good.", return_tensors="pt")\n'
        "ids = model.generate(**inputs, max_new_tokens=20)\nprint(writer.decode(ids[0], skip_special_tokens=True))",
    ),
    "ForMultipleChoice": ("multiple-choice", ""),
    "ForSequenceClassification": (
        "text-classification",
        'logits = model(**reader("It was good.", return_tensors="pt")).logits\n'
        "print(model.config.id2label[logits.argmax().item()])",
    ),
    "ForTokenClassification": (
        "token-classification",
        'logits = model(**reader("It was good.", return_tensors="pt")).logits\n'
        "print([model.config.id2label[label] for label in logits[0].argmax(-1).tolist()])",
    ),
    "ForQuestionAnswering": (
        "question-answering",
        'inputs = reader("What was good?", "The soup was good.", return_tensors="pt")\n'
        "scores = model(**inputs)\n"
        "start, end = scores.start_logits.argmax().item(), scores.end_logits.argmax().item()\n"
        'print(reader.decode(inputs["input_ids"][0, start : end + 1]))',
    ),
    "ForMaskedLM": (
        "fill-mask",
        'inputs = reader(f"It was {reader.mask_token}.", return_tensors="pt")\n'
        "ids = model(**inputs).logits.argmax(-1)\n"
        "print(reader.decode(ids[inputs['input_ids'] == reader.mask_token_id]))",
    ),
    "ForPreTraining": ("fill-mask", ""),
    "Blip2VisionModel": ("image-feature-extraction", ""),
    "Blip2Model": ("feature-extraction", ""),
    "QFormerModel": ("feature-extraction", ""),
    "Model": (
        "feature-extraction",
        'print(model(**reader("It was good.", return_tensors="pt")).last_hidden_state.shape)',
    ),
    "": ("feature-extraction", ""),
}


@dataclass
class CardRecord:
    """What a card says that neither configuration, weights nor code know; kept as `card.json` beside them.

    Attributes:
        name: the model's name, and the card's title.
        data: what it was trained on, in words.
        metrics: a row of measured values by metric for each system, the model's own row under `name` first.
        training: training arguments and measured rates to show.
        curve: file name of the loss curve's picture, in the same folder.
        pictures: titles by file name, of more pictures in it.
        sample: text that the model wrote.
        datasets: of the Hub, by name.
        tags: of the card, besides the family's.
        base_model: of the Hub, by name, that it was fine-tuned from.
    """

    name: str
    data: str
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, object] = field(default_factory=dict)
    curve: str | None = None
    pictures: dict[str, str] = field(default_factory=dict)
    sample: str | None = None
    datasets: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    base_model: str | None = None
    license: str = "apache-2.0"
    language: str = "en"
    source: str = field(default_factory=lambda: source_version())
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in ("transformers", "torch", "tokenizers")}
    )

    def save(self, folder: str | Path) -> None:
        """Write `card.json`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str)
        (Path(folder) / RECORD).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "CardRecord":
        """Read `card.json`.

        Raises:
            OSError, ValueError: when it is missing, broken, or has a field that no card has.
        """
        if not (Path(folder) / RECORD).is_file():
            raise FileNotFoundError(
                f"{folder} has no {RECORD}, from which its card is rendered. Train or score the model with a script of "
                "this project, or save a `CardRecord` there."
            )
        content = read_json(Path(folder) / RECORD)
        unknown = sorted(set(content) - {item.name for item in fields(cls)})
        absent = sorted({"name", "data"} - set(content))
        if unknown or absent:
            wrong = f"has an unknown field {unknown[0]!r}" if unknown else f"lacks the field {absent[0]!r}"
            raise ValueError(f"{Path(folder) / RECORD} {wrong}. Train or score the model again to have it written.")
        return cls(**content)


def source_version() -> str:
    """The commit of this package's checkout, or its version where it was installed."""
    root = Path(__file__).parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return f"commit {result.stdout.strip()}"
    return f"hf_custom {version('hf_custom')}"


def processor() -> str:
    """The processor's name as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: str) -> str:
    """The name of the machine's accelerator or processor, and how much of it."""
    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor()}, {torch.get_num_threads()} threads" if device == "cpu" else device


def code_sha256(folder: str | Path) -> str:
    """One hash over the names and contents of the Python files of a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _reader_of(folder: Path) -> str | None:
    """The Auto class that makes inputs for the model, by the files that are there."""
    for file, reader in (
        ("processor_config.json", "AutoProcessor"),
        ("tokenizer_config.json", "AutoTokenizer"),
        ("preprocessor_config.json", "AutoImageProcessor"),
    ):
        if (folder / file).is_file():
            return reader
    return None


def snippet(folder: str | Path, repository: str | None = None, revision: str | None = None) -> str:
    """Python that loads a folder's model, where this package is not installed, and uses it.

    Args:
        repository: its name on the Hub; else its own folder is the working directory.
        revision: commit to pin.
    """
    folder = Path(folder)
    config = load_config(folder)
    class_name = config.architectures[0]
    # The most particular one comes last.
    autos = [auto for auto, name in config.auto_classes.items() if name.endswith(f".{class_name}")]
    reader = _reader_of(folder)
    use = next(use for head, (_, use) in TASKS.items() if class_name.endswith(head)) if reader else ""
    where = f'"{repository}"' if repository else '"."'
    pin = f', revision="{revision}"' if revision else ""
    names = [*([autos[-1]] if autos else []), *([reader] if reader else [])]
    lines = [f"from transformers import {', '.join(sorted(names))}"] if names else []
    if not autos:
        lines.append("from transformers.dynamic_module_utils import get_class_from_dynamic_module")
    if "Image.new" in use:
        lines.insert(0, "from PIL import Image")
    lines.append("")
    if reader:
        lines.append(f"reader = {reader}.from_pretrained({where}{pin}, trust_remote_code=True)")
    if "writer." in use and (folder / TARGET_TOKENIZER).is_dir():
        lines.append(f'writer = AutoTokenizer.from_pretrained({where}{pin}, subfolder="{TARGET_TOKENIZER}")')
    else:
        use = use.replace("writer.", "reader.")
    if autos:
        lines.append(f"model = {autos[-1]}.from_pretrained({where}{pin}, trust_remote_code=True)")
    else:
        files = sorted(folder.glob("modeling_*.py"))
        file = next((path.stem for path in files if f"class {class_name}(" in path.read_text("utf-8")), None)
        if file is None:
            raise ValueError(f"{folder} has no code of {class_name}. Save the model again by `save_pretrained`.")
        lines.append(f'model_class = get_class_from_dynamic_module("{file}.{class_name}", {where}{pin})')
        lines.append(f"model = model_class.from_pretrained({where}{pin})")
    return "\n".join([*lines, *(["", use] if use else [])])


def _check_results(record: CardRecord, folder: Path) -> None:
    if not record.metrics.get(record.name):
        raise ValueError(
            f"{folder / RECORD} has no `metrics` of {record.name!r}. Evaluate the model before writing its card, or "
            "ask for a card without results."
        )
    for system, row in record.metrics.items():
        for metric, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(f"`metrics` in {folder / RECORD} says {metric} of {system!r} is {value!r}, no number.")


def render_card(
    folder: str | Path, repository: str | None = None, revision: str | None = None, with_results: bool = True
) -> ModelCard:
    """The card of a saved model, from its folder.

    Args:
        folder: of the model, with its `card.json`.
        repository: the name on the Hub under which it will stand.
        revision: commit that its snippet pins.
        with_results: `False` allows a record without metrics.

    Raises:
        OSError, ValueError: when there is no model, no record, or no metrics.
    """
    templates = find_templates()
    folder = Path(folder)
    config = load_config(folder)
    record = CardRecord.load(folder)
    if with_results or record.metrics:
        _check_results(record, folder)
    class_name = config.architectures[0]
    task = next(task for head, (task, _) in TASKS.items() if class_name.endswith(head))
    family = config.model_type.removeprefix("custom_")
    own = record.metrics.get(record.name, {})
    for picture in [*([record.curve] if record.curve else []), *record.pictures]:
        if not (folder / picture).is_file():
            raise FileNotFoundError(f"{folder / RECORD} shows {picture}, which is not there. Draw it, or leave it out.")
    data = ModelCardData(
        model_name=record.name,
        language=record.language,
        license=record.license,
        library_name="transformers",
        pipeline_tag=task,
        base_model=record.base_model,
        datasets=record.datasets or None,
        tags=list(dict.fromkeys(["custom_code", family, *record.tags])),
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=(record.datasets or ["held-out"])[0],
                dataset_name=record.data,
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in own.items()
        ]
        or None,
    )
    shapes = [torch.Size(shape) for shape, _ in stored_tensors(folder).values()]
    return ModelCard.from_template(
        data,
        template_path=str(templates / "_template.md"),
        mark=MARK,
        record=record,
        prose=(templates / f"{family}.md").read_text(encoding="utf-8").strip(),
        class_name=class_name,
        parameters=f"{sum(shape.numel() for shape in shapes):,}",
        metric_names=list(dict.fromkeys(metric for row in record.metrics.values() for metric in row)),
        code_hash=code_sha256(folder) if any(folder.glob("*.py")) else None,
        snippet=snippet(folder, repository, revision),
        is_pinned=revision is not None,
    )


__all__ = ["CardRecord", "code_sha256", "hardware", "render_card", "snippet", "source_version"]
