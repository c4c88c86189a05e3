"""Tables of images: joined, split by image, decoded once and normalised as the host's processor does it."""

import io
import json
import struct
import zlib

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFile
from transformers import AutoImageProcessor, BlipImageProcessorPil

from training.image_tables import (
    ImageRows,
    ImageTableArguments,
    find_tables,
    load_image_rows,
    places_of,
    split_by_image,
)
from training.images import ImageTextCollator, decode_image, decode_images, prepare_image_processor
from training.tokenizer import train_tokenizer

COLUMNS = {"question_column": "question", "answer_column": "answer"}


def picture(seed, mode="RGB", size=(20, 12), kind="png"):
    """The encoded bytes of an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def write_pair(folder, name="train", num_images=4, first=0):
    """A table of questions, two an image, and the table of the images they name."""
    ids = range(first, first + num_images)
    images = datasets.Dataset.from_dict(
        {"image_id": list(ids), "image": [{"bytes": picture(i), "path": None} for i in ids]},
        features=datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image()}),
    )
    images.to_parquet(folder / f"{name}_images.parquet")
    rows = [{"image_id": i, "question": f"{q}?", "answer": f"{i}{q}"} for i in ids for q in "ab"]
    pd.DataFrame(rows).to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    return str(folder / f"{name}.tsv"), str(folder / f"{name}_images.parquet")


def load(seed=0, **arguments):
    return load_image_rows(ImageTableArguments(**arguments), lambda rows: COLUMNS, lambda: None, seed)


def test_questions_join_the_images_they_name(tmp_path):
    files, images = write_pair(tmp_path)
    test_files, test_images = write_pair(tmp_path, "test", 2, first=2)
    splits = load(files=[files], images=[images], test_files=[test_files], test_images=[test_images])
    assert list(splits) == ["train", "test", "validation"]
    for rows in splits.values():
        assert rows.rows.column_names == ["question", "answer"]
        # The answer begins with the id that the image was made of.
        assert rows.sources == [picture(int(answer[0])) for answer in rows.rows["answer"]]
    assert len(splits["train"]) + len(splits["validation"]) == 8 and len(splits["test"]) == 4


def test_drawn_split_shares_no_image(tmp_path):
    files, images = write_pair(tmp_path, num_images=20)
    splits = load(files=[files], images=[images], validation_fraction=0.25)
    train, validation = (set(splits[name].sources) for name in ("train", "validation"))
    assert not train & validation and (len(train), len(validation)) == (15, 5)
    assert set(load(files=[files], images=[images], validation_fraction=0.25)["validation"].sources) == validation
    other = load(seed=1, files=[files], images=[images], validation_fraction=0.25)
    assert set(other["validation"].sources) != validation
    assert len(load(files=[files], images=[images], max_train_rows=7)["train"]) == 7


def test_few_images_leave_one_on_each_side():
    rows = datasets.Dataset.from_dict({"text": list("abc")})
    parts = split_by_image(ImageRows(rows, ["x", "y", "x"], {}), 0.01, 0)
    assert sorted(len(part) for part in parts) == [1, 2]
    with pytest.raises(ValueError, match="share one image"):
        split_by_image(ImageRows(rows, ["x", "x", "x"], {}), 0.5, 0)


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_folder_with_metadata_gives_paths(tmp_path, table):
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    (folder / "notes.txt").write_text("not a table", encoding="utf-8")
    rows = []
    for number, name in enumerate(["a.png", "inner/b.png"]):
        (folder / name).write_bytes(picture(number))
        rows.append({"file_name": name, "question": "?", "answer": name})
    if table.endswith("csv"):
        pd.DataFrame(rows).to_csv(folder / table, index=False)
    else:
        (folder / table).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    splits = load(files=[str(folder)], validation_fraction=0.5)
    found = {
        row["answer"]: source for part in splits.values() for row, source in zip(part.rows, part.sources, strict=True)
    }
    assert found == {name: str(folder / name) for name in ("a.png", "inner/b.png")}


def test_folder_with_a_table_for_each_split_is_refused(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.csv").write_text("file_name\nx\n", encoding="utf-8")
    with pytest.raises(ValueError, match="several metadata files.*test and .*train"):
        find_tables([str(tmp_path)])


def test_image_in_a_column_counts_once(tmp_path):
    frame = pd.DataFrame(
        {"image": [picture(0), picture(1), picture(0)], "question": list("abc"), "answer": list("xyz")}
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    splits = load(files=[str(tmp_path / "rows.parquet")], validation_fraction=0.5)
    assert sorted(len(part) for part in splits.values()) == [1, 2]
    assert all(len(set(part.sources)) == 1 for part in splits.values())


def rewrite(path, change):
    frame = pd.read_parquet(path) if path.endswith("parquet") else pd.read_csv(path, sep="\t")
    frame = change(frame)
    if path.endswith("parquet"):
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t", index=False)


# What is done to the questions or the images, and words of the refusal.
MISTAKES = {
    "unknown image": ("tsv", lambda f: f.assign(image_id=f.image_id + 1), ["row 6 of", "train.tsv", "image 4"]),
    "no id": ("tsv", lambda f: f.rename(columns={"image_id": "id"}), ["no column `image_id`", "--image_id_column"]),
    "no answer column": ("tsv", lambda f: f.drop(columns="answer"), ["no column `answer`", "--answer_column"]),
    "empty answer": ("tsv", lambda f: f.assign(answer=["x", " "] * 4), ["row 1 of", "train.tsv", "`answer`"]),
    "no image column": ("parquet", lambda f: f.rename(columns={"image": "pixels"}), ["`image`", "--image_column"]),
    "no image": ("parquet", lambda f: f.assign(image=[f.image[0], None, *f.image[2:]]), ["row 1 of", "has no image"]),
    "twice": ("parquet", lambda f: f.assign(image_id=[0, 1, 1, 3]), ["row 2 of", "image 1 a second time"]),
    "numbers": ("parquet", lambda f: f.assign(image=[1, 2, 3, 4]), ["holds int", "--image_column"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_in_a_table_is_named(kind, tmp_path):
    ending, change, words = MISTAKES[kind]
    files, images = write_pair(tmp_path)
    rewrite(files if ending == "tsv" else images, change)
    with pytest.raises(ValueError) as error:
        load(files=[files], images=[images])
    for word in words:
        assert word in str(error.value)


def test_images_without_rows_are_refused():
    with pytest.raises(ValueError, match="--test_images .* --test_files"):
        ImageTableArguments(files=["a"], test_images=["b"])


def processor(size=16):
    return BlipImageProcessorPil(size={"height": size, "width": size})


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
def test_pixels_are_those_of_the_processor(mode):
    """Bytes decoded once and normalised by the batch equal the host's own way, image by image."""
    sources = [picture(seed, mode) for seed in range(3)]
    images = [Image.open(io.BytesIO(source)) for source in sources]
    expected = processor()(images, return_tensors="pt")["pixel_values"]
    pixels = decode_images(sources, places_of(sources, "t"), processor(), (16, 16))
    assert pixels.dtype == torch.uint8
    collator = ImageTextCollator(train_tokenizer(iter(["a b"]), "wordpiece", 300), pixels, processor())
    torch.testing.assert_close(collator.pixel_values([0, 1, 2]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(collator.pixel_values([2, 0, 2]), expected[[2, 0, 2]], rtol=0, atol=1e-5)


def test_more_images_than_are_decoded_at_once_keep_their_order():
    sources = [picture(seed, size=(16, 16)) for seed in range(70)]
    pixels = decode_images(sources, places_of(sources, "t"), processor(), (16, 16))
    for source, image in zip(sources, pixels, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(source))))


def test_photograph_is_turned_upright():
    image = Image.fromarray(np.zeros((4, 8, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    stream = io.BytesIO()
    image.save(stream, "jpeg", exif=exif)
    assert decode_image(stream.getvalue(), "").size == (4, 8)


def deep():
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"no image", ["row 0 of t.parquet cannot be read", "UnidentifiedImageError"]),
        (picture(0)[:200], ["row 0 of t.parquet cannot be read"]),
        ("nowhere/x.png", ["row 0 of t.parquet cannot be read", "nowhere/x.png"]),
        (deep(), ["row 0 of t.parquet", "more than 8 bits"]),
    ],
    ids=["text", "cut off", "missing", "16 bits"],
)
def test_unreadable_image_is_named(source, words):
    with pytest.raises(ValueError) as error:
        decode_image(source, places_of([source], "t.parquet")[source])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_file_that_was_cut_off_is_named(tmp_path):
    content = picture(0, size=(200, 120), kind="jpeg")
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"row 7 of t\.csv cannot be read \(.*truncated"):
        decode_image(str(tmp_path / "x.jpg"), "row 7 of t.csv")


def claiming(width, height):
    """A small file that says it holds an image of this size."""
    content = bytearray(picture(0))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "words"),
    [((20_000, 5_001), "20000 x 5001 pixels, more than 100,000,000"), ((60_000, 60_000), "DecompressionBombError")],
)
def test_image_that_would_fill_the_memory_is_refused(size, words, monkeypatch):
    """Before it is decoded."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=f"the image in row 0 of t .*{words}"):
        decode_image(claiming(*size), "row 0 of t")


def test_largest_image_is_read(monkeypatch):
    monkeypatch.setattr("training.images.MOST_PIXELS", 20 * 12)
    assert decode_image(picture(0), "row 0 of t").size == (20, 12)
    with pytest.raises(ValueError, match="row 1 of t has 21 x 12 pixels, more than 240"):
        decode_image(picture(0, size=(21, 12)), "row 1 of t")


def test_rows_without_an_image_are_skipped_on_request(tmp_path, capsys):
    """Rows that share one are skipped together; all splits are counted in one line."""
    files, images = write_pair(tmp_path)
    test_files, test_images = write_pair(tmp_path, "test", 2)
    sources = [picture(0), b"no image", picture(2), picture(3)[:200]]
    rewrite(images, lambda f: f.assign(image=[{"bytes": source, "path": None} for source in sources]))
    rewrite(test_images, lambda f: f.assign(image=[{"bytes": None, "path": "nowhere.png"}, f.image[1]]))
    tables = {"files": [files], "images": [images], "test_files": [test_files], "test_images": [test_images]}
    assert [len(rows) for rows in load(**tables).values()] == [6, 4, 2]
    assert "skipped" not in capsys.readouterr().out
    splits = load(**tables, skip_missing_images=True)
    found = {name: rows.rows["answer"] for name, rows in splits.items()}
    assert sorted([*found["train"], *found["validation"]]) == ["0a", "0b", "2a", "2b"]
    assert list(found["test"]) == ["1a", "1b"]
    for rows in splits.values():
        assert rows.sources == [picture(int(answer[0])) for answer in rows.rows["answer"]]
    assert [line for line in capsys.readouterr().out.splitlines() if "skipped" in line] == [
        "6 of 12 rows skipped: their image is not there or cannot be read (--skip_missing_images)"
    ]


def test_nothing_left_to_read_is_refused(tmp_path):
    files, images = write_pair(tmp_path)
    rewrite(images, lambda f: f.assign(image=[{"bytes": None, "path": f"{n}.png"} for n in range(4)]))
    with pytest.raises(ValueError, match="no image of the train rows can be read"):
        load(files=[files], images=[images], skip_missing_images=True)


def test_processor_of_another_size_is_refused():
    sources = [picture(0)]
    with pytest.raises(ValueError, match=r"gives \(3, 8, 8\) but the model reads \(3, 16, 16\)"):
        decode_images(sources, places_of(sources, "t"), processor(8), (16, 16))


def test_batch_is_padded_to_its_longest():
    tokenizer = train_tokenizer(iter(["a b"]), "wordpiece", 300)
    pixels = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    plain = BlipImageProcessorPil(do_rescale=False, do_normalize=False)
    texts = tokenizer(["a", "a b a b"])
    rows = [{name: values[i] for name, values in texts.items()} | {"image": 1 - i, "labels": i} for i in range(2)]
    batch = ImageTextCollator(tokenizer, pixels, plain)(rows)
    assert batch["input_ids"].shape == (2, 6) and batch["attention_mask"].sum(1).tolist() == [3, 6]
    assert batch["labels"].tolist() == [0, 1]
    assert torch.equal(batch["pixel_values"], pixels.flip(0).float())


def test_processor_of_a_checkpoint_is_used(tmp_path):
    processor(24).save_pretrained(tmp_path)
    found = prepare_image_processor(str(tmp_path), None)
    assert (found.size["height"], type(found)) == (24, BlipImageProcessorPil)
    assert AutoImageProcessor.from_pretrained(tmp_path).size["width"] == 24
