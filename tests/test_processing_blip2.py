"""The processor of BLIP-2: beside stock's, where it differs, saved and loaded, and together with the model."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import GPT2, VISION, VOCAB, tokenizer, widen
from transformers import AutoProcessor, Blip2Processor, BlipImageProcessorPil, pipeline

from hf_custom import CustomBlip2Config, CustomBlip2ForConditionalGeneration, CustomBlip2Processor
from training.tokenizer import train_tokenizer

QUERIES = 5
TEXTS = ["what is it?", "a third, longer text"]
HEIGHT, WIDTH = VISION["image_size"]


WORDS = train_tokenizer(iter(TEXTS), "wordpiece", 300)


def word_tokenizer():
    """One that begins a text with a token of its own, and ends it with another."""
    return copy.deepcopy(WORDS)


def image_processor():
    return BlipImageProcessorPil(size={"height": HEIGHT, "width": WIDTH})


def make(processor_class=CustomBlip2Processor, make_tokenizer=tokenizer, num_query_tokens=QUERIES):
    return processor_class(image_processor(), make_tokenizer(), num_query_tokens=num_query_tokens)


def image(seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 13, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


# --- Beside stock's ---

OPTIONS = {
    "single": {},
    "longest": {"padding": True},
    "max_length": {"padding": "max_length", "max_length": 40},
    "truncation": {"truncation": True, "max_length": 12},
    "both": {"padding": "max_length", "truncation": True, "max_length": 18, "return_tensors": "pt"},
    "tensors": {"padding": True, "return_tensors": "pt"},
}


@pytest.mark.parametrize("make_tokenizer", [tokenizer, word_tokenizer])
@pytest.mark.parametrize("kind", OPTIONS)
def test_matches_stock(kind, make_tokenizer):
    options = OPTIONS[kind]
    ours, stock = make(make_tokenizer=make_tokenizer), make(Blip2Processor, make_tokenizer)
    texts, images = TEXTS, [image(0), image(1)]
    if kind == "single":
        texts, images = TEXTS[0], image(0)
    found, expected = ours(images=images, text=texts, **options), stock(images=images, text=texts, **options)
    if "return_tensors" not in options:
        # Rows of several lengths make no array.
        assert found["input_ids"] == expected["input_ids"]
        assert found["attention_mask"] == expected["attention_mask"]
        np.testing.assert_array_equal(found["pixel_values"], expected["pixel_values"])
    else:
        assert_same(found, expected)
    for row in found["input_ids"]:
        assert list(row[: QUERIES + 1]).count(ours.image_token_id) == QUERIES
    assert len(ours.tokenizer) == len(stock.tokenizer)


def test_text_alone_and_images_alone_match_stock():
    ours, stock = make(), make(Blip2Processor)
    options = {"padding": True, "return_tensors": "pt"}
    texts = ours(text=TEXTS, **options)
    assert list(texts) == ["input_ids", "attention_mask"] and ours.image_token_id not in texts["input_ids"]
    assert_same(texts, stock(text=TEXTS, **options))
    images = ours(images=[image(0), image(1)], return_tensors="pt")
    assert list(images) == ["pixel_values"] and images["pixel_values"].shape == (2, 3, HEIGHT, WIDTH)
    assert_same(images, stock(images=[image(0), image(1)], return_tensors="pt"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_image_of_any_kind_becomes_colour(mode):
    found = make()(images=image(mode=mode), text="a", return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, HEIGHT, WIDTH) and found.isfinite().all()
    expected = image_processor()(image(mode=mode).convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected)


# --- Where it differs ---


@pytest.mark.parametrize("how", ["argument", "tokenizer"])
def test_padding_to_the_left_comes_before_the_image(how):
    processor = make(make_tokenizer=word_tokenizer)
    options = {"padding_side": "left"}
    if how == "tokenizer":
        processor.tokenizer.padding_side, options = "left", {}
    found = processor(images=[image(0), image(1)], text=TEXTS, padding=True, **options)
    width = len(found["input_ids"][1])
    for text, ids, mask in zip(TEXTS, found["input_ids"], found["attention_mask"], strict=True):
        alone = processor(images=image(), text=text)["input_ids"][0]
        missing = width - len(alone)
        assert ids == [processor.tokenizer.pad_token_id] * missing + alone
        assert mask == [0] * missing + [1] * len(alone)
    assert found["attention_mask"][0][0] == 0


def test_length_counts_the_image():
    processor = make()
    found = processor(images=image(), text=TEXTS, padding=True, pad_to_multiple_of=16)
    assert [len(ids) for ids in found["input_ids"]] == [32, 32]
    cut = processor(images=image(), text=f"<image>{TEXTS[1]}", truncation=True, max_length=9)["input_ids"][0]
    ahead = processor(images=image(), text=TEXTS[1], truncation=True, max_length=9)["input_ids"][0]
    assert cut == ahead and len(cut) == 9


def test_place_in_the_text_is_expanded_where_it_stands():
    processor = make()
    before, between, behind = (processor(text=text)["input_ids"][0] for text in ("see ", " and ", "!"))
    places = [processor.image_token_id] * QUERIES
    images = [image(seed) for seed in range(4)]
    found = processor(images=images, text=["see <image>!", "see <image> and <image>!", "!"])
    # The image of a text without a place of its own stands first.
    rows = [before + places + behind, before + places + between + places + behind, places + behind]
    assert found["input_ids"] == rows and found["attention_mask"] == [[1] * len(row) for row in rows]
    assert len(found["pixel_values"]) == 4


def test_without_queries_texts_stay_as_they_are():
    """As the first stage reads them."""
    processor = make(make_tokenizer=word_tokenizer, num_query_tokens=None)
    plain = word_tokenizer()
    assert processor.tokenizer.get_vocab() == plain.get_vocab()
    found = processor(images=[image(0), image(1)], text=TEXTS)
    assert found["input_ids"] == plain(TEXTS)["input_ids"] and len(found["pixel_values"]) == 2


@pytest.mark.parametrize("text", [[], [1, 2], [["a"], ["b"]], ["a", None]], ids=str)
def test_text_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="`text` is a string or a list of strings"):
        make()(images=image(), text=text)


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="pass `images`, `text` or both"):
        make()()


# --- Saved and loaded ---


def small_model(num_query_tokens=QUERIES):
    processor = make()
    config = CustomBlip2Config(
        vision_config=VISION,
        qformer_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 40,
            "encoder_hidden_size": VISION["hidden_size"],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={"model_type": "custom_gpt2", **GPT2, "vocab_size": VOCAB + 1, "eos_token_id": None},
        num_query_tokens=num_query_tokens,
        image_token_index=processor.image_token_id,
    )
    return widen(CustomBlip2ForConditionalGeneration(config)).eval(), processor


def read(processor):
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return processor(images=[image(0), image(1)], text=TEXTS, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of a processor alone, and one of a model with its processor."""
    root = tmp_path_factory.mktemp("folders")
    model, processor = small_model()
    processor.save_pretrained(root / "alone")
    model.save_pretrained(root / "whole")
    processor.save_pretrained(root / "whole")
    return root


@pytest.mark.parametrize("name", ["alone", "whole"])
def test_saved_processor_loads_by_the_auto_class(name, folders):
    loaded = AutoProcessor.from_pretrained(folders / name)
    assert type(loaded) is CustomBlip2Processor and loaded.num_query_tokens == QUERIES
    assert_same(read(loaded), read(make()))
    assert (folders / name / "processing_blip2.py").is_file()


def test_configuration_of_the_model_says_which_processor(folders, tmp_path):
    """As for the folder of a stock checkpoint, whose processor has no code."""
    model, processor = small_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        fields = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        fields = {key: value for key, value in fields.items() if key not in ("auto_map", "processor_class")}
        (tmp_path / name).write_text(json.dumps(fields), encoding="utf-8")
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is CustomBlip2Processor
    assert_same(read(loaded), read(processor))


# Loads the processor of each folder and saves it anew, then loads that.
SCRIPT = """
import sys
sys.modules["hf_custom"] = None  # importing it fails from here on, installed or not
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

saved = torch.load(sys.argv[1], weights_only=False)
for folder in sys.argv[2:4]:
    for again in ("", "/again"):
        processor = AutoProcessor.from_pretrained(folder + again, trust_remote_code=True)
        assert type(processor).__module__.startswith("transformers_modules."), type(processor)
        found = processor(images=saved["images"], text=saved["texts"], **saved["options"])
        for name, expected in saved["expected"].items():
            assert torch.equal(found[name], expected), name
        processor.save_pretrained(folder + "/again")
        print(type(processor).__name__, processor.num_query_tokens)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
tokens = model.generate(**found, max_new_tokens=4, do_sample=False)
assert torch.equal(tokens, saved["tokens"])
"""


def test_saved_processor_loads_without_the_package(folders, tmp_path):
    model, processor = small_model()
    model = CustomBlip2ForConditionalGeneration.from_pretrained(folders / "whole").eval()
    saved = {
        "images": [image(0), image(1)],
        "texts": TEXTS,
        "options": {"padding": True, "padding_side": "left", "return_tensors": "pt"},
        "expected": dict(read(processor)),
        "tokens": model.generate(**read(processor), max_new_tokens=4, do_sample=False),
    }
    torch.save(saved, tmp_path / "saved.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-I", "-c", SCRIPT, *map(str, (tmp_path / "saved.pt", folders / "alone"))]
    run = subprocess.run(
        [*command, str(folders / "whole")], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["CustomBlip2Processor", str(QUERIES)] * 4


# --- Together with the model ---


def test_pipeline_writes_what_the_model_generates(folders):
    model, processor = small_model()
    writer = pipeline("image-text-to-text", model=model, processor=processor)
    (found,) = writer(images=image(), text="what is it?", max_new_tokens=6, generate_kwargs={"do_sample": False})
    inputs = processor(images=image(), text="what is it?", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert expected.shape == (1, inputs["input_ids"].shape[1] + 6)
    assert found["generated_text"] == processor.batch_decode(expected, skip_special_tokens=True)[0]
    from_folder = pipeline("image-text-to-text", model=str(folders / "whole"))
    assert type(from_folder.model) is CustomBlip2ForConditionalGeneration
    assert type(from_folder.processor) is CustomBlip2Processor


def test_texts_of_a_batch_are_continued_as_alone():
    model, processor = small_model()
    inputs = read(processor)
    width = inputs["input_ids"].shape[1]
    together = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, width:]
    for row, text in enumerate(TEXTS):
        alone = processor(images=image(row), text=text, return_tensors="pt")
        expected = model.generate(**alone, max_new_tokens=6, do_sample=False)
        assert torch.equal(together[row], expected[0, alone["input_ids"].shape[1] :])


def test_two_images_in_one_text_are_read_in_their_order():
    model, processor = small_model()
    text = "see <image> and <image>!"
    found = []
    for images in ([image(0), image(1)], [image(1), image(0)]):
        inputs = processor(images=images, text=text, return_tensors="pt")
        found.append(model(**inputs).logits)
        places = (inputs["input_ids"][0] == processor.image_token_id).nonzero()[:, 0]
        features = model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).clone()
        embeddings[0, places] = features
        expected = model.language_model(inputs_embeds=embeddings).logits
        torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*found)


def test_processor_of_another_model_is_refused():
    model, processor = small_model(num_query_tokens=QUERIES - 1)
    inputs = processor(images=image(), text="a", return_tensors="pt")
    with pytest.raises(ValueError, match=f"row 0 .* has {QUERIES} image tokens.*{QUERIES - 1} queries.*processor"):
        model(**inputs)
