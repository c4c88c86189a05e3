"""Train BLIP-2: queries that read images (`--stage 1`), then a language model that goes on from them (`--stage 2`).

The first stage learns from pairs of image and text, by contrast, matching and writing the text; the second writes
captions (`--task caption`) or answers (`--task vqa`). A vision tower or a language model that is named is frozen; one
that starts from nothing is trained.

Examples:
  # both stages on handwritten digits and captions of them, from nothing
  python -m training.run_blip2 --stage 1 --output_dir runs/digits_1
  python -m training.run_blip2 --stage 2 --model_name_or_path runs/digits_1 --output_dir runs/digits_2

  # a folder of pictures whose metadata.csv has the columns file_name and caption
  python -m training.run_blip2 --stage 1 --files pictures/ --output_dir runs/mine_1

  # questions and answers; the tower is frozen, so its states are computed once and kept
  python -m training.run_blip2 --stage 2 --task vqa --model_name_or_path runs/mine_1 --files questions.tsv \\
    --images images.parquet --features_dir runs/features --output_dir runs/mine_2

  # with a language model that stays as it is
  python -m training.run_blip2 --stage 2 --model_name_or_path runs/digits_1 --language_model runs/quickstart/model
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

import hf_custom
from hf_custom.configuration_blip2 import TEXT_CONFIGS, CustomBlip2Config
from hf_custom.presets import preset_config
from hf_custom.processing_blip2 import CustomBlip2Processor
from training import runs
from training.args import ModelArguments, RunArguments, parse_arguments, user_errors
from training.blip2_rows import QUESTION_PROMPT, PairCollator, PromptCollator, PromptRows
from training.image_tables import ImageRows, ImageTableArguments, load_image_rows
from training.image_text import (
    ImageTextRows,
    decode_splits,
    embedded_digits,
    encode_texts,
    number_across,
    recall_of_texts,
)
from training.images import image_shape, prepare_image_processor
from training.plots import plot_image_grid
from training.preflight import Quarantine, check_precision, check_run
from training.qa_metrics import f1
from training.runs import callbacks, check_length, choose_learning_rate, finish, is_sharded, prepare_tokenizer, train
from training.trainer import CustomTrainer
from training.vision_features import vision_features

DEFAULTS = {
    **runs.FINE_TUNING_DEFAULTS,
    "preset": "blip2-mini",
    "output_dir": "runs/blip2",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "max_length": 32,
}
EMBEDDED = "the handwritten digits of scikit-learn (`load_digits`), with texts made by rule"
STAGES, TASKS = [1, 2], ["caption", "vqa"]
# Token that a text to be written begins with in the first stage.
WRITE_TOKEN = "[DEC]"
# Images whose texts are ranked, each against all texts of the others.
RANKED_IMAGES = 500
PICTURED_IMAGES = 12
# Characters of a text above a picture.
LONGEST_LINE = 100
# Tokens that an answer or a caption may have.
MOST_NEW_TOKENS = 32


@dataclass
class Blip2Arguments(ImageTableArguments):
    """Which stage, what to learn, where the data has it, and the parts that are ready."""

    stage: int = field(
        default=1, metadata={"help": "1: queries learn to read images; 2: to be read", "choices": STAGES}
    )
    task: str = field(default="caption", metadata={"help": "caption or vqa", "choices": TASKS})
    caption_column: str = field(default="caption", metadata={"help": "column that holds the caption"})
    question_column: str = field(default="question", metadata={"help": "column that holds the question"})
    answer_column: str = field(default="answer", metadata={"help": "column that holds its answer"})
    vision_model: str | None = field(
        default=None, metadata={"help": "folder whose vision tower to take, frozen: a tower, or a model that has one"}
    )
    language_model: str | None = field(
        default=None, metadata={"help": "language model of the second stage, frozen; else the preset's, from nothing"}
    )
    freeze: str | None = field(
        default=None,
        metadata={"help": "parts not to train, as `vision_model,language_model`, or `none`; else those that are named"},
    )
    features_dir: str | None = field(
        default=None, metadata={"help": "folder to keep the states of a frozen vision tower in, read instead of images"}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("stage", STAGES), ("task", TASKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} is {getattr(self, name)!r}. Use one of {', '.join(map(str, choices))}.")
        if self.stage == 1 and self.language_model is not None:
            raise ValueError("--language_model belongs to the second stage: the first has none. Use --stage 2.")

    def text_columns(self, rows) -> dict[str, str]:
        """The columns to train on, by the flag that names each."""
        if self.task == "vqa":
            return {"question_column": self.question_column, "answer_column": self.answer_column}
        return {"caption_column": self.caption_column}


@dataclass
class Run:
    """A prepared training run: the trainer and what its rows were made of."""

    trainer: CustomTrainer
    args: Blip2Arguments
    splits: dict[str, ImageRows]
    rows: dict
    texts: list[str]

    @property
    def model(self):
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def scored(self) -> str:
        """The split that the finished model is scored on."""
        return "test" if "test" in self.rows else "validation"


def columns_of(rows: ImageRows, args: Blip2Arguments) -> list[list[str]]:
    """Captions, or questions and answers."""
    return [[str(value) for value in rows.rows[name]] for name in args.text_columns(rows.rows).values()]


def pair_texts(rows: ImageRows, args: Blip2Arguments) -> list[str]:
    """The text that belongs to each row's image: the caption, or the question with its answer."""
    return [" ".join(parts) for parts in zip(*columns_of(rows, args), strict=True)]


def prompts_and_targets(rows: ImageRows, args: Blip2Arguments) -> tuple[list[str], list[str]]:
    """What the language model is given behind the image, and what it shall write."""
    *prompts, targets = columns_of(rows, args)
    return [QUESTION_PROMPT.format(line) for line in prompts[0]] if prompts else [""] * len(targets), targets


def read_config(path: str, replace_stock: bool = True) -> PreTrainedConfig:
    """The configuration of a checkpoint, ours for a stock one where we have it."""
    hf_custom.register(replace_stock=replace_stock)
    config = AutoConfig.from_pretrained(path)
    hf_custom.register(replace_stock=False)
    return config


def start_config(args: Blip2Arguments, model_args: ModelArguments) -> CustomBlip2Config:
    """The configuration of the checkpoint or of the preset, with the parts that are named and what is frozen."""
    checkpoint = model_args.model_name_or_path
    if checkpoint is None:
        config = preset_config(model_args.preset, **runs.parse_overrides(model_args.config_overrides))
    elif model_args.config_overrides:
        raise ValueError("--config_overrides changes a --preset, but a checkpoint was named. Leave one of them out.")
    else:
        config = read_config(checkpoint)
    if not isinstance(config, CustomBlip2Config):
        raise ValueError(f"{checkpoint or model_args.preset} is no BLIP-2. Use `blip2-mini`, say.")
    if args.vision_model is not None:
        vision = read_config(args.vision_model)
        config.vision_config = getattr(vision, "vision_config", vision)
        if not isinstance(config.vision_config, hf_custom.CustomBlip2VisionConfig):
            raise ValueError(f"--vision_model {args.vision_model} has no vision tower of this package.")
    if args.language_model is not None:
        if goes_on(args, model_args, config):
            raise ValueError(f"{checkpoint} has a language model already. Leave out --language_model.")
        config.text_config = language_config(args.language_model)
    config.frozen_modules = frozen_parts(args, model_args)
    config.validate_architecture()
    return config


def goes_on(args: Blip2Arguments, model_args: ModelArguments, config: CustomBlip2Config) -> bool:
    """Whether the checkpoint is one of the same stage, so that its tokenizer is the stage's."""
    return model_args.model_name_or_path is not None and config.qformer_config.use_qformer_text_input == (
        args.stage == 1
    )


def prepare_text(
    args: Blip2Arguments,
    model_args: ModelArguments,
    training_args: RunArguments,
    config: CustomBlip2Config,
    rows: ImageRows,
) -> PreTrainedTokenizerBase:
    """The tokenizer: that of the language model or of a checkpoint of the same stage, or a new one."""
    checkpoint = model_args.model_name_or_path if goes_on(args, model_args, config) else None
    named = ModelArguments(
        model_name_or_path=args.language_model or checkpoint,
        tokenizer_name=model_args.tokenizer_name,
        vocab_size=model_args.vocab_size,
    )
    if args.stage == 1:
        tokenizer = prepare_tokenizer(named, training_args, lambda: iter(pair_texts(rows, args)), "wordpiece")
        tokenizer.add_special_tokens({"bos_token": WRITE_TOKEN})
        return tokenizer

    def texts():
        for prompt, target in zip(*prompts_and_targets(rows, args), strict=True):
            yield f"{prompt} {target}".strip()

    tokenizer = prepare_tokenizer(named, training_args, texts, "bpe")
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no token that ends a text. Use that of a language model.")
    if tokenizer.pad_token is None:
        # Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def finish_config(
    config: CustomBlip2Config,
    args: Blip2Arguments,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
) -> CustomBlip2Config:
    """The same with what the tokenizer says."""
    fields = config.to_dict()
    text, qformer = fields["text_config"], fields["qformer_config"]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if args.stage == 1:
        own = {name: ids[name] for name in ("bos_token_id", "pad_token_id")}
        qformer |= {**own, "vocab_size": len(tokenizer), "use_qformer_text_input": True}
        fields["image_token_index"] = None
        return CustomBlip2Config.from_dict(fields)
    if args.language_model is None and not goes_on(args, model_args, config):
        text |= {**ids, "vocab_size": len(tokenizer)}
    # The image's token may be new.
    text["vocab_size"] = max(text["vocab_size"], len(tokenizer))
    qformer["use_qformer_text_input"] = False
    fields["image_token_index"] = image_token_id
    return CustomBlip2Config.from_dict(fields)


def language_config(path: str) -> PreTrainedConfig:
    """The configuration of a language model that BLIP-2 can have."""
    config = read_config(path, replace_stock=False)
    if config.model_type not in TEXT_CONFIGS:
        raise ValueError(
            f"--language_model {path} is of type {config.model_type!r}. Use one of {', '.join(TEXT_CONFIGS)}."
        )
    return config


def frozen_parts(args: Blip2Arguments, model_args: ModelArguments) -> list[str]:
    """The parts that are not trained: those that were named, and after the first stage its vision tower."""
    if args.freeze is not None:
        return [] if args.freeze == "none" else args.freeze.split(",")
    has_tower = args.vision_model is not None or model_args.model_name_or_path is not None
    return ["vision_model"] * has_tower + ["language_model"] * (args.language_model is not None)


def build_model(args: Blip2Arguments, model_args: ModelArguments, config: PreTrainedConfig):
    """The stage's model, with the weights of the checkpoint and of the parts that are named."""
    name = "CustomBlip2ForPreTraining" if args.stage == 1 else "CustomBlip2ForConditionalGeneration"
    model_class, attention = getattr(hf_custom, name), {"attn_implementation": model_args.attn_implementation}
    if model_args.model_name_or_path is None:
        model = model_class._from_config(config, **attention)
    else:
        model = model_class.from_pretrained(model_args.model_name_or_path, config=config, **attention)
    if args.vision_model is not None:
        model.vision_model.load_state_dict(read_tower(args.vision_model).state_dict())
    if args.language_model is not None:
        source = type(model.language_model).from_pretrained(args.language_model, dtype=model.dtype)
        if source.config.vocab_size != config.text_config.vocab_size:
            source.resize_token_embeddings(config.text_config.vocab_size)
        model.language_model.load_state_dict(source.state_dict())
    return model


def read_tower(path: str):
    """The vision tower of a folder that holds one, alone or as a part of a model."""
    config = read_config(path)
    if isinstance(config, hf_custom.CustomBlip2VisionConfig):
        return hf_custom.CustomBlip2VisionModel.from_pretrained(path)
    base = hf_custom.CustomBertModel if isinstance(config, hf_custom.CustomBertConfig) else hf_custom.CustomBlip2Model
    return base.from_pretrained(path, config=config).vision_model


def prepare(model_args: ModelArguments, args: Blip2Arguments, training_args: RunArguments) -> Run:
    """Load and check the data, decode the images, and build tokenizer, model and trainer. Nothing is trained yet."""
    if model_args.stock:
        raise ValueError("--stock: the host has no training of BLIP-2's first stage. Leave it out.")
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=1e-3)
    # The Trainer would take the number of an image for a column that no model reads.
    training_args.remove_unused_columns = False
    embedded = partial(embedded_digits, "matching" if args.task == "caption" else "vqa")
    quarantine = Quarantine(args.quarantine, training_args.process_index == 0)
    splits = load_image_rows(args, args.text_columns, embedded, training_args.seed, quarantine)
    quarantine.finish()
    config = start_config(args, model_args)
    tokenizer = prepare_text(args, model_args, training_args, config, splits["train"])
    image_processor = prepare_image_processor(args.vision_model or model_args.model_name_or_path, config)
    num_places = None if args.stage == 1 else config.num_query_tokens
    processor = CustomBlip2Processor(image_processor, tokenizer, num_places)
    config = finish_config(config, args, model_args, tokenizer, processor.image_token_id)
    pixels, images = decode_splits(splits, image_processor, image_shape(config))
    make = prepare_pairs if args.stage == 1 else prepare_prompts
    rows, texts, collator = make(splits, args, processor, images, pixels, config)
    model = build_model(args, model_args, config)
    check_run(model, training_args)
    if args.features_dir is not None:
        if any(weight.requires_grad for weight in model.vision_model.parameters()):
            raise ValueError(
                "--features_dir keeps what the vision tower computes, but the tower is trained. Freeze it."
            )
        with training_args.main_process_first(desc="vision features"):
            tower = model.vision_model.to(training_args.device)
            collator.features = vision_features(args.features_dir, tower, collator)
    # What the Trainer counts as input.
    model.main_input_name = "input_ids"
    if training_args.process_index == 0:
        processor.save_pretrained(training_args.output_dir)
    trainer = CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=processor,
        data_collator=collator,
        callbacks=callbacks(training_args),
    )
    return Run(trainer, args, splits, rows, texts)


def prepare_pairs(splits, args, processor, images, pixels, config):
    """Rows of the first stage by split, the distinct texts behind them, and what batches them."""
    check_length("max_length", args.max_length, config.qformer_config)
    by_row = {name: pair_texts(split, args) for name, split in splits.items()}
    texts, numbers = number_across(by_row)
    if len(set(by_row["train"])) < 2:
        raise ValueError("all rows have the same text, so there is nothing to tell apart. Name another column.")
    encoded = encode_texts(texts, processor.tokenizer, args.max_length)
    rows = {name: ImageTextRows(encoded, own, images[name], own) for name, own in numbers.items()}
    return rows, texts, PairCollator(processor.tokenizer, pixels, processor.image_processor, args.max_length)


def positions_of(config: CustomBlip2Config) -> int | None:
    """Tokens that the language model can read, the image's included; `None` for any number."""
    return getattr(config.text_config, "max_position_embeddings", None)


def prepare_prompts(splits, args, processor, images, pixels, config):
    """Rows of the second stage by split, their targets, and what batches them."""
    positions = positions_of(config)
    if positions is not None and args.max_length + config.num_query_tokens > positions:
        raise ValueError(
            f"--max_length {args.max_length} and {config.num_query_tokens} queries are more than the language model's "
            f"{positions} positions. Use a smaller --max_length."
        )
    rows = {
        name: PromptRows(*prompts_and_targets(split, args), images[name], processor.tokenizer, args.max_length)
        for name, split in splits.items()
    }
    collator = PromptCollator(
        processor.tokenizer,
        pixels,
        processor.image_processor,
        config.image_token_index,
        config.num_query_tokens,
        config.is_encoder_decoder,
    )
    return rows, rows["train"].targets, collator


def batches_of(rows: list, size: int, title: str):
    return (rows[start : start + size] for start in tqdm(range(0, len(rows), size), desc=title, unit="batch"))


@torch.no_grad()
def measure_retrieval(run: Run, picture: Path) -> dict[str, float]:
    """Texts ranked by image and images by text, on images of the scored split, by the vectors of the contrast."""
    rows, args, model = run.rows[run.scored], run.trainer.args, run.model.eval()
    rng = np.random.default_rng(args.seed)
    images = rng.permutation(np.unique(rows.images))[:RANKED_IMAGES]
    is_drawn = np.isin(rows.images, images)
    texts = np.unique(rows.texts[is_drawn])
    pairs = set(zip(rows.images[is_drawn], rows.texts[is_drawn], strict=True))
    belongs = np.array([[(image, text) in pairs for text in texts] for image in images])
    size, collator = args.per_device_eval_batch_size, run.trainer.data_collator
    image_embeds, text_embeds = [], []
    for some in batches_of(images.tolist(), size, "images"):
        batch = {name: values.to(args.device) for name, values in collator.read_images(some).items()}
        image_embeds.append(model.get_image_features(**batch))
    for some in batches_of(texts.tolist(), size, "texts"):
        batch = collator([rows.pair(text, int(images[0])) for text in some])
        ids, mask = batch["input_ids"].to(args.device), batch["attention_mask"].to(args.device)
        text_embeds.append(model.get_text_features(ids, mask))
    scores = torch.einsum("iqe,ce->icq", torch.cat(image_embeds), torch.cat(text_embeds)).amax(-1).float().cpu().numpy()
    best, shown = scores.argmax(1), images[:PICTURED_IMAGES]
    titles = [
        f"{run.texts[texts[best[i]]]}\n(true: {run.texts[texts[belongs[i].argmax()]]})" for i in range(len(shown))
    ]
    picture_images(run, shown, titles, belongs[np.arange(len(shown)), best[: len(shown)]], picture)
    metrics = {f"text {name}": value for name, value in recall_of_texts(scores, belongs, (1, 5, 10)).items()}
    by_text = recall_of_texts(scores.T, belongs.T, (1, 5, 10))
    return metrics | {f"image {name}": value for name, value in by_text.items()}


@torch.no_grad()
def measure_writing(run: Run, picture: Path) -> dict[str, float]:
    """Share of the scored split's rows for which the model writes exactly what the data has; of captions, the words
    that both share as well."""
    rows, args, model = run.rows[run.scored], run.trainer.args, run.model.eval()
    collator, tokenizer = run.trainer.data_collator, run.trainer.data_collator.tokenizer
    # Rows of one length together, so that there is little padding.
    order = sorted(range(len(rows)), key=lambda row: len(rows.prompt_ids[row]))
    longest = min(MOST_NEW_TOKENS, max(len(ids) for ids in rows.target_ids))
    written, positions = [""] * len(rows), positions_of(model.config)
    for some in batches_of(order, args.per_device_eval_batch_size, "generation"):
        batch = collator.prompts([rows[row] for row in some])
        batch = {name: values.to(args.device) for name, values in batch.items()}
        room = longest
        if positions is not None and not collator.is_encoder_decoder:
            room = min(longest, positions - batch["input_ids"].shape[1])
        new = model.generate(**batch, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        if not collator.is_encoder_decoder:
            new = new[:, batch["input_ids"].shape[1] :]
        for row, text in zip(some, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            written[row] = text.strip()
    is_right = np.array([text == target.strip() for text, target in zip(written, rows.targets, strict=True)])
    rng = np.random.default_rng(args.seed)
    shown = rng.permutation(len(rows))[:PICTURED_IMAGES]
    prompts, _ = prompts_and_targets(run.splits[run.scored], run.args)
    titles = [f"{prompts[row]}\n{written[row]}\n(true: {rows.targets[row]})".strip() for row in shown]
    picture_images(run, rows.images[shown], titles, is_right[shown], picture)
    if run.args.task == "vqa":
        return {"accuracy": float(is_right.mean())}
    shared = [f1(text, target) for text, target in zip(written, rows.targets, strict=True)]
    return {"exact match": float(is_right.mean()), "word f1": float(np.mean(shared))}


def picture_images(run: Run, images: np.ndarray, titles: list[str], is_correct: np.ndarray, path: Path) -> None:
    """Show some images with what the model said of each."""
    if run.trainer.is_world_process_zero():
        titles = ["\n".join(shorten(line, LONGEST_LINE) for line in title.splitlines()) for title in titles]
        plot_image_grid(run.trainer.data_collator.pixels[images].numpy(), titles, is_correct.tolist(), path)


ARGUMENTS = (ModelArguments, Blip2Arguments, RunArguments)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        arguments = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        run = prepare(*arguments)
    train(run.trainer)
    picture = Path(run.trainer.args.output_dir) / "predictions.png"
    metrics = {}
    if not is_sharded(run.trainer):
        metrics = (measure_retrieval if run.args.stage == 1 else measure_writing)(run, picture)
    pictures = {picture.name: f"What the model says of images of the {run.scored} data"} if picture.exists() else {}
    finish(run.trainer, run.args.description(EMBEDDED), metrics, pictures, stage=run.args.stage, task=run.args.task)


if __name__ == "__main__":
    main()
