"""BLIP-2's two stages as a user trains them: kept states of the tower, rows and batches, the script, its refusals."""

import copy
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from reference import assert_near
from safetensors.torch import load_file
from tiny import BERT_WITH_IMAGES, VISION, tokenizer, widen
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, BlipImageProcessorPil

import hf_custom
from hf_custom import CustomBlip2Processor, CustomBlip2VisionConfig, CustomBlip2VisionModel
from tests.test_images import picture, write_pair
from training import run_blip2
from training import vision_features as features_module
from training.args import parse_arguments, read_recipe
from training.blip2_rows import PairCollator, PromptCollator, PromptRows
from training.images import ImageTextCollator
from training.run_blip2 import ARGUMENTS, DEFAULTS, prepare
from training.tokenizer import train_tokenizer
from training.vision_features import vision_features

SHAPE = VISION["image_size"]


@pytest.fixture(autouse=True)
def _stock_stays_stock():
    yield
    hf_custom.register(replace_stock=False)


# --- States of a frozen tower ---


def draw_pixels(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *SHAPE), dtype=torch.uint8, generator=generator)


def image_processor(**fields):
    return BlipImageProcessorPil(size=dict(zip(("height", "width"), SHAPE, strict=True)), **fields)


def collator_of(pixels=None, **fields):
    return ImageTextCollator(tokenizer(), draw_pixels() if pixels is None else pixels, image_processor(**fields))


def make_tower(**fields):
    torch.manual_seed(0)
    config = CustomBlip2VisionConfig(**{**VISION, "attention_dropout": 0.5, **fields})
    return widen(CustomBlip2VisionModel(config))


def test_features_are_the_states_of_the_tower(tmp_path):
    tower, collator = make_tower().train(), collator_of()
    found = vision_features(tmp_path / "kept", tower, collator, batch_size=2)
    assert isinstance(found, np.memmap) and found.dtype == np.float32 and tower.training
    expected = tower.eval()(collator.pixel_values(list(range(5)))).last_hidden_state
    assert_near(torch.from_numpy(np.array(found)), expected, 1e-6)


def test_features_are_computed_once(tmp_path, monkeypatch):
    tower = make_tower()
    found = vision_features(tmp_path / "kept", tower, collator_of())
    tower.save_pretrained(tmp_path / "tower")
    monkeypatch.setattr(features_module, "compute_states", lambda *args: pytest.fail("computed again"))
    # A tower that went through a folder is the same.
    loaded = CustomBlip2VisionModel.from_pretrained(tmp_path / "tower")
    np.testing.assert_array_equal(vision_features(tmp_path / "kept", loaded, collator_of()), found)


def other_weights():
    tower = make_tower()
    with torch.no_grad():
        tower.post_layernorm.bias[0] += 1e-3
    return tower, collator_of()


# What is not as it was, and how the message calls it.
STALE = {
    "weights": (other_weights, "weights of the vision tower"),
    "design": (lambda: (make_tower(hidden_act="relu"), collator_of()), "weights of the vision tower"),
    "preprocessing": (lambda: (make_tower(), collator_of(image_mean=[0.5, 0.5, 0.4])), "preprocessing"),
    "scale": (lambda: (make_tower(), collator_of(do_rescale=False, do_normalize=False)), "preprocessing"),
    "images": (lambda: (make_tower(), collator_of(draw_pixels().flip(0))), "images"),
    "fewer": (lambda: (make_tower(), collator_of(draw_pixels()[:4])), "images"),
    "both": (lambda: (other_weights()[0], collator_of(draw_pixels(seed=1))), "weights of the vision tower and images"),
}


def test_stale_features_are_refused(tmp_path):
    vision_features(tmp_path / "kept", make_tower(), collator_of())
    for kind, (change, words) in STALE.items():
        with pytest.raises(ValueError) as error:
            vision_features(tmp_path / "kept", *change())
        assert f"stale: they were computed from other {words}. " in str(error.value), kind
        assert "--features_dir" in str(error.value)


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="model is no folder of vision features.*--features_dir"):
        vision_features(tmp_path / "model", make_tower(), collator_of())
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_interrupted_features_leave_nothing_behind(tmp_path):
    tower, collator, calls = make_tower(), collator_of(), []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = tower.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        vision_features(tmp_path / "kept", tower, collator, batch_size=2)
    assert list(tmp_path.iterdir()) == []
    hook.remove()
    assert vision_features(tmp_path / "kept", tower, collator).shape[0] == 5
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"states.npy", "keys.json"}


# --- Rows and batches ---

IMAGE, QUERIES = 99, 3


def ids_of(text):
    return tokenizer()(text)["input_ids"]


def prompt_rows(prompts, targets, max_length=12, tokens=None):
    return PromptRows(prompts, targets, np.arange(len(prompts)), tokens or tokenizer(), max_length)


def test_row_holds_prompt_target_and_end():
    end = tokenizer().eos_token_id
    rows = prompt_rows(["ab", "", "a long question", "ab"], ["c", "c", "yes", "a long answer"])
    assert rows[0] == {"prompt": ids_of("ab"), "target": [*ids_of(" c"), end], "image": 0}
    assert rows[1] == {"prompt": [], "target": [*ids_of("c"), end], "image": 1}
    # The end of a prompt is kept, and the beginning of a target.
    assert rows[2] == {"prompt": ids_of("a long question")[-7:], "target": [*ids_of(" yes"), end], "image": 2}
    assert rows[3] == {"prompt": [], "target": [*ids_of(" a long answer")[:11], end], "image": 3}
    assert rows.targets[0] == "c" and len(rows) == 4


def batch_of(rows, **options):
    collator = PromptCollator(tokenizer(), draw_pixels(len(rows)), image_processor(), IMAGE, QUERIES, **options)
    return collator, collator([rows[row] for row in range(len(rows))])


def test_only_target_and_end_are_labelled():
    rows = prompt_rows(["ab", "abcd"], ["c", "d"])
    collator, batch = batch_of(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    for row in range(2):
        prompt, target = rows[row]["prompt"], rows[row]["target"]
        length = QUERIES + len(prompt) + len(target)
        missing = batch["input_ids"].shape[1] - length
        padding = [tokenizer().pad_token_id] * missing
        assert batch["input_ids"][row].tolist() == [IMAGE] * QUERIES + prompt + target + padding
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * missing
        assert batch["labels"][row].tolist() == [-100] * (length - len(target)) + target + [-100] * missing
    assert batch["attention_mask"][0, -1] == 0 == 1 - batch["attention_mask"][1, -1]
    assert torch.equal(batch["pixel_values"], collator.pixel_values([0, 1]))


def test_encoder_reads_the_prompt_and_decoder_writes_the_target():
    rows = prompt_rows(["ab", "abcd"], ["c d", "d"])
    collator, batch = batch_of(rows, is_encoder_decoder=True)
    width = QUERIES + 4
    assert batch["input_ids"][1].tolist() == [IMAGE] * QUERIES + ids_of("abcd")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["attention_mask"].sum(1).tolist() == [width - 2, width]
    longest = len(rows[0]["target"])
    assert batch["labels"][0].tolist() == rows[0]["target"]
    assert batch["labels"][1].tolist() == rows[1]["target"] + [-100] * (longest - len(rows[1]["target"]))


@pytest.mark.parametrize("begins", [False, True])
def test_prompts_are_those_of_the_processor(begins):
    """Whose texts begin with a token of their own where the tokenizer, as that of OPT, has one."""
    tokens = tokenizer()
    if begins:
        token = tokens.bos_token
        tokens._tokenizer.post_processor = TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, tokens.bos_token_id)]
        )
    processor = CustomBlip2Processor(image_processor(), tokens, QUERIES)
    prompts, pixels = ["ab", "abcd"], draw_pixels(2)
    rows = prompt_rows(prompts, ["c", "d"], tokens=processor.tokenizer)
    collator = PromptCollator(processor.tokenizer, pixels, image_processor(), processor.image_token_id, QUERIES)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    expected = processor(images=images, text=prompts, **options)
    found = collator.prompts([rows[0], rows[1]])
    assert found.keys() == expected.keys()
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(found[name], expected[name]), name
    assert_near(found["pixel_values"], expected["pixel_values"])
    # A target stands in the middle of a text and begins with none.
    assert rows[0]["target"] == [*ids_of(" c"), tokens.eos_token_id]


def test_texts_of_pairs_have_one_length():
    encoded = [{"input_ids": [5] * n, "attention_mask": [1] * n, "image": n - 2, "labels": 7} for n in (2, 4)]
    collator = PairCollator(tokenizer(), draw_pixels(3), image_processor(), 9)
    batch = collator(encoded)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert batch["input_ids"].shape == (2, 9) and batch["attention_mask"].sum(1).tolist() == [2, 4]
    assert torch.equal(batch["pixel_values"], collator.pixel_values([0, 2]))
    collator.features = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    batch = collator(encoded)
    assert "pixel_values" not in batch
    assert torch.equal(batch["vision_hidden_states"], torch.from_numpy(collator.features)[[0, 2]])


# --- The script ---

COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230), "green": (20, 200, 20)}
FLAGS = (
    "--use_cpu --max_steps 2 --per_device_train_batch_size 6 --logging_steps 1 --eval_strategy no --save_strategy no "
    "--report_to none --vocab_size 300 --max_length 12 --learning_rate 1e-3"
).split()
SIZES = "--config_overrides num_query_tokens=4,image_text_hidden_size=16".split()


def run(output, *flags):
    """What the script leaves in its folder: the weights and the numbers."""
    run_blip2.main([*FLAGS, *map(str, flags), "--output_dir", str(output)])
    return load_file(output / "model.safetensors"), json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of pictures with captions, and tables, good ones and others."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    rows = []
    for number in range(24):
        name = list(COLOURS)[number % 3]
        noise = np.random.default_rng(number).integers(-20, 20, (16, 16, 3))
        pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "caption": f"it is {name}" if number % 2 else name, "same": "it"})
    pd.DataFrame(rows).to_csv(folder / "pictures" / "metadata.csv", index=False)
    write_pair(folder, num_images=6)
    names = ["pictures/0.png", "nowhere.png", "pictures/2.png", "pictures/4.png"]
    pd.DataFrame({"file_name": names, "caption": list("abcd")}).to_csv(folder / "gone.csv", index=False)
    images = [picture(0), picture(1), picture(2)[:200], picture(3)]
    pd.DataFrame({"image": images, "caption": list("abcd")}).to_parquet(folder / "broken.parquet")
    return folder


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    """The folder that the first stage leaves."""
    folder = tmp_path_factory.mktemp("first") / "first"
    run(folder, "--stage", 1, "--files", data / "pictures", *SIZES)
    return folder


@pytest.fixture(scope="module")
def second(data, first, tmp_path_factory):
    """The folder that the second stage leaves, beside the states of the tower."""
    folder = tmp_path_factory.mktemp("second")
    flags = ["--features_dir", folder / "features", "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2]
    flags += ["--save_trained_only"]
    run(folder / "out", "--stage", 2, "--model_name_or_path", first, "--files", data / "pictures", *flags)
    return folder / "out"


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_first_stage_leaves_model_processor_numbers_and_picture(first):
    files = {file.name for file in first.iterdir()}
    code = {"modeling_blip2.py", "modeling_blip2_retrieval.py", "modeling_blip2_qformer.py", "processing_blip2.py"}
    assert {"model.safetensors", "tokenizer.json", "processor_config.json", "loss_curve.png"} | code <= files
    assert (first / "predictions.png").read_bytes().startswith(b"\x89PNG")
    card = (first / "README.md").read_text()
    assert "predictions.png" in card and "| stage | 1 |" in card and "AutoProcessor" in card
    metrics = json.loads((first / "metrics.json").read_text())
    kinds = [f"{kind} recall@{k}" for kind in ("text", "image") for k in (1, 5, 10)]
    assert list(metrics) == [name for kind in kinds for name in (kind, f"{kind} by chance")]
    assert all(0 <= value <= 1 for value in metrics.values())
    processor = AutoProcessor.from_pretrained(first)
    assert type(processor) is CustomBlip2Processor and processor.num_query_tokens is None
    model = hf_custom.CustomBlip2ForPreTraining.from_pretrained(first)
    assert model.config.qformer_config.bos_token_id == processor.tokenizer.convert_tokens_to_ids("[DEC]")
    assert model.config.qformer_config.vocab_size == len(processor.tokenizer)
    assert model.config.frozen_modules == []


def test_log_has_the_parts_of_the_loss(first, second):
    lines = [entry for entry in history(first) if "loss" in entry]
    assert len(lines) == 2
    for entry in lines:
        parts = [entry[f"{name}_loss"] for name in ("itc", "itm", "itg")]
        assert min(parts) > 0 and entry["loss"] == pytest.approx(sum(parts), abs=1e-3)
    assert not any(key.endswith("_loss") for entry in history(second) for key in entry if key != "train_loss")


def test_parts_of_the_loss_are_means_over_what_was_accumulated(data, tmp_path):
    """Two batches a step, and a line every two steps."""
    flags = "--gradient_accumulation_steps 2 --logging_steps 2 --per_device_train_batch_size 3".split()
    arguments = [*FLAGS, *SIZES, *flags, "--files", str(data / "pictures"), "--output_dir", str(tmp_path)]
    trainer = prepare(*parse_arguments(ARGUMENTS, arguments, "", **DEFAULTS)).trainer
    seen = []

    def keep(model, inputs, output):
        # A guard looks once more, in evaluation mode.
        if model.training:
            seen.append(output.itm_loss.item())

    trainer.model.register_forward_hook(keep)
    trainer.train()
    (line,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == 4 and line["itm_loss"] == pytest.approx(sum(seen) / 4, abs=1e-4)


def test_second_stage_leaves_model_processor_numbers_and_picture(second):
    files = {file.name for file in second.iterdir()}
    assert {"model.safetensors", "processor_config.json", "modeling_blip2.py", "predictions.png"} <= files
    assert list(json.loads((second / "metrics.json").read_text())) == ["exact match", "word f1"]
    assert "| stage | 2 |" in (second / "README.md").read_text()
    processor = AutoProcessor.from_pretrained(second)
    model = hf_custom.CustomBlip2ForConditionalGeneration.from_pretrained(second).eval()
    assert processor.num_query_tokens == 4 == model.config.num_query_tokens
    assert processor.image_token_id == model.config.image_token_index
    image = Image.open(io.BytesIO(picture(0)))
    inputs = processor(images=image, text="", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= 4 + 3


def test_frozen_tower_stays_and_the_rest_learns(first, second):
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    frozen = [key for key in before if key.startswith("vision_model.")]
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    for key in ("query_tokens", "qformer.encoder.layer.0.crossattention.attention.query.weight"):
        assert not torch.equal(before[key], after[key]), key
    assert "language_projection.weight" in after and "itm_head.weight" not in after


def test_resumed_run_equals_the_straight_one(data, first, second, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "compute_states", lambda *args: pytest.fail("computed again"))
    flags = ["--features_dir", second.parent / "features", "--max_steps", 4]
    flags += ["--resume_from_checkpoint", second / "checkpoint-2", "--files", data / "pictures"]
    resumed, _ = run(tmp_path / "out", "--stage", 2, "--model_name_or_path", first, *flags)
    straight = load_file(second / "model.safetensors")
    assert straight.keys() == resumed.keys()
    for key, weight in straight.items():
        assert torch.equal(weight, resumed[key]), key
    kept = load_file(second / "checkpoint-2" / "model.safetensors").keys()
    assert kept == {key for key in straight if not key.startswith("vision_model.")}


def prepared(output, *flags):
    arguments = [*FLAGS, *map(str, flags), "--output_dir", str(output)]
    return prepare(*parse_arguments(ARGUMENTS, arguments, "", **DEFAULTS))


def test_kept_states_give_the_loss_of_the_images(data, first, second, tmp_path):
    flags = ["--stage", 2, "--model_name_or_path", first, "--files", data / "pictures"]
    found = prepared(tmp_path / "out", *flags, "--features_dir", second.parent / "features")
    collator, rows = found.trainer.data_collator, [found.rows["train"][row] for row in range(5)]
    kept = collator(rows)
    collator.features = None
    read = collator(rows)
    assert "vision_hidden_states" in kept and "pixel_values" in read
    model = found.model.eval()
    assert_near(model(**kept).loss, model(**read).loss, 1e-6, scale_floor=0.0)


def test_second_stage_goes_on_from_a_second(data, second, tmp_path):
    """With its tokenizer and its language model."""
    flags = ["--stage", 2, "--task", "vqa", "--files", data / "train.tsv", "--images", data / "train_images.parquet"]
    weights, metrics = run(tmp_path / "out", *flags, "--model_name_or_path", second, "--learning_rate", "0")
    assert list(metrics) == ["accuracy"]
    before = load_file(second / "model.safetensors")
    assert before.keys() == weights.keys()
    assert all(torch.equal(before[key], weights[key]) for key in before)
    found, expected = (AutoProcessor.from_pretrained(folder).tokenizer for folder in (tmp_path / "out", second))
    assert found.get_vocab() == expected.get_vocab()
    config = hf_custom.CustomBlip2Config.from_pretrained(tmp_path / "out")
    assert config.text_config.vocab_size == len(expected) and config.frozen_modules == ["vision_model"]


def language_model(kind):
    """A stock one, and a tokenizer, without padding where stock has none."""
    tokens = train_tokenizer(iter(["it is red, blue or green"]), "bpe", 300)
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    if kind == "gpt2":
        tokens.pad_token = None
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=len(tokens), pad_token_id=None, **sizes, **ids)
        ), tokens
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ids |= {"pad_token_id": tokens.pad_token_id, "decoder_start_token_id": tokens.pad_token_id}
    # Room for more tokens than there are, as in the published ones.
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=len(tokens) + 5, **sizes, **ids)
    ), tokens


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_named_language_model_stays_as_it_is(kind, data, first, tmp_path):
    model, tokens = language_model(kind)
    model.save_pretrained(tmp_path / "lm")
    tokens.save_pretrained(tmp_path / "lm")
    flags = ["--stage", 2, "--language_model", tmp_path / "lm", "--files", data / "pictures"]
    weights, metrics = run(tmp_path / "out", *flags, "--model_name_or_path", first)
    assert list(metrics) == ["exact match", "word f1"]
    saved = hf_custom.CustomBlip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert type(saved.language_model) is type(model)
    loaded = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert loaded.pad_token == (loaded.eos_token if kind == "gpt2" else tokens.pad_token)
    assert saved.config.frozen_modules == ["vision_model", "language_model"]
    found = saved.language_model.state_dict()
    for key, weight in model.state_dict().items():
        # The image's token has a row of its own where there was no room.
        assert torch.equal(found[key][: len(weight)], weight), key
        assert len(found[key]) - len(weight) <= 1
    tower = {key: weight for key, weight in load_file(first / "model.safetensors").items() if "vision_model" in key}
    assert tower and all(torch.equal(weights[key], weight) for key, weight in tower.items())
    start = load_file(first / "model.safetensors")["query_tokens"]
    assert not torch.equal(weights["query_tokens"], start)


def test_tower_of_a_bert_is_taken_and_stays(data, tmp_path):
    bert = widen(hf_custom.CustomBertForMaskedLM(hf_custom.CustomBertConfig(**BERT_WITH_IMAGES)))
    bert.save_pretrained(tmp_path / "bert")
    found = prepared(
        tmp_path / "out", "--stage", 1, "--vision_model", tmp_path / "bert", "--files", data / "pictures"
    ).trainer
    expected = copy.deepcopy(bert.bert.vision_model.state_dict())
    found.train()
    weights = found.model.vision_model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert found.data_collator.pixels.shape[-2:] == SHAPE
    assert found.model.config.qformer_config.encoder_hidden_size == VISION["hidden_size"]


def test_embedded_digits_are_asked_about_and_described(tmp_path):
    for task, columns in (("vqa", ["question", "answer"]), ("caption", ["caption"])):
        found = prepared(tmp_path / task, "--stage", 2, "--task", task, "--max_train_rows", 20, *SIZES)
        assert len(found.rows["train"]) == 20
        assert found.splits["train"].rows.column_names == columns
    prompts, targets = run_blip2.prompts_and_targets(found.splits["train"], found.args)
    assert set(prompts) == {""} and all(target.startswith("a handwritten") for target in targets)


def test_writing_stops_where_the_positions_end(data, first, tmp_path):
    """A long answer of one row leaves no room behind the long question of another."""
    rows = [
        {"image_id": n, "question": "why " * 200 if n % 2 else "?", "answer": "so " * (1 if n % 2 else 30)}
        for n in range(6)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "long.tsv", sep="\t", index=False)
    flags = [
        "--stage",
        2,
        "--task",
        "vqa",
        "--files",
        tmp_path / "long.tsv",
        "--validation_files",
        tmp_path / "long.tsv",
    ]
    images = ["--images", data / "train_images.parquet", "--validation_images", data / "train_images.parquet"]
    length = 128 - 4
    _, metrics = run(tmp_path / "out", *flags, *images, "--model_name_or_path", first, "--max_length", length)
    assert list(metrics) == ["accuracy"]


# Arguments that cannot work ($ is the folder of data, $first that of the first stage), and words that the one line of
# refusal must hold.
PICTURES = "--files $/pictures"
MISTAKES = {
    "stage": ("--stage 3", ["stage", "3", "1, 2"]),
    "task": ("--task vqaa", ["task", "vqaa"]),
    "language model": ("--stage 1 --language_model $first", ["--language_model", "--stage 2"]),
    "no language model": (
        "--stage 2 --model_name_or_path $first --language_model $first " + PICTURES,
        ["--language_model", "custom_blip2", "custom_gpt2, gpt2, opt, t5"],
    ),
    "second language model": (
        "--stage 2 --model_name_or_path $second --language_model $first " + PICTURES,
        ["has a language model already", "--language_model"],
    ),
    "trained tower": (f"--features_dir $/features {PICTURES}", ["--features_dir", "tower is trained", "Freeze"]),
    "same captions": (f"{PICTURES} --caption_column same", ["same text", "Name another column"]),
    "no column": (f"{PICTURES} --caption_column words", ["no column `words`", "--caption_column"]),
    "missing image": ("--files $/gone.csv", ["row 1 of", "gone.csv", "cannot be read", "nowhere.png"]),
    "cut image": ("--files $/broken.parquet", ["row 2 of", "broken.parquet", "cannot be read"]),
    "length 1": (f"{PICTURES} --max_length 65", ["--max_length is 65", "64 positions"]),
    "length 2": (f"--stage 2 {PICTURES} --max_length 121", ["--max_length 121", "8 queries", "128 positions"]),
    "freeze": (f"{PICTURES} --freeze qformer,nose", ["'nose'", "qformer", "language_model"]),
    "preset": (f"{PICTURES} --preset bert-mini", ["bert-mini is no BLIP-2"]),
    "overrides": (f"--model_name_or_path $first {PICTURES} --config_overrides a=1", ["--config_overrides"]),
    "tower": ("--vision_model $lm " + PICTURES, ["--vision_model", "no vision tower"]),
    "stock": ("--stock", ["--stock"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_ends_in_one_line(kind, data, first, second, tmp_path, capsys):
    flags, words = MISTAKES[kind]
    if "$lm" in flags:
        language_model("gpt2")[0].save_pretrained(tmp_path / "lm")
    for name, folder in (("$first", first), ("$second", second), ("$lm", tmp_path / "lm"), ("$", data)):
        flags = flags.replace(name, str(folder))
    with pytest.raises(SystemExit) as exit_:
        run_blip2.main([*FLAGS, *flags.split(), "--output_dir", str(tmp_path / "out")])
    # The parser prints what is no choice of a flag by itself.
    message = str(exit_.value) if str(exit_.value) != "2" else capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in message and "\n" not in message
    for word in words:
        assert word in message, message
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (data / "features").exists()


def test_unknown_stage_of_a_recipe_is_refused(tmp_path):
    """Which the parser does not look at."""
    (tmp_path / "recipe.json").write_text('{"stage": 3}', encoding="utf-8")
    assert read_recipe(str(tmp_path / "recipe.json")) == {"stage": 3}
    with pytest.raises(SystemExit, match="^error: --stage is 3. Use one of 1, 2"):
        run_blip2.main([str(tmp_path / "recipe.json")])


@pytest.mark.parametrize("table", ["gone.csv", "broken.parquet"])
def test_rows_without_an_image_are_skipped_on_request(table, data, tmp_path, capsys):
    found = prepared(tmp_path, *SIZES, "--files", data / table, "--skip_missing_images", "--validation_fraction", "0.3")
    captions = [caption for rows in found.splits.values() for caption in rows.rows["caption"]]
    assert sorted(captions) == sorted(set("abcd") - {"b" if table == "gone.csv" else "c"})
    assert [line for line in capsys.readouterr().out.splitlines() if "skipped" in line] == [
        "1 of 4 rows skipped: their image is not there or cannot be read (--skip_missing_images)"
    ]


def test_help_shows_both_stages(capsys):
    with pytest.raises(SystemExit):
        run_blip2.main(["--help"])
    text = capsys.readouterr().out
    assert "--stage 1" in text and "--stage 2" in text and "--skip_missing_images" in text
