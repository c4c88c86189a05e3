"""Images as a model reads them: decoded once each, kept as bytes, and normalised a batch at a time."""

import io

import torch
from PIL import Image, ImageOps
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    BlipImageProcessorPil,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

# An image as it is stored: its encoded bytes, or the path of its file.
Source = bytes | str
# Pixels that an image may have: a small file can claim more than the memory holds.
MOST_PIXELS = 100_000_000
# Images that are decoded and resized together; whole photographs of more would fill the memory.
DECODED_AT_ONCE = 64


def decode_image(source: Source, place: str) -> Image.Image:
    """The image in 8 bits a channel, upright.

    Raises:
        ValueError: for one that cannot be read or is too large, saying where it was found.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            is_small = image.width * image.height <= MOST_PIXELS
            if is_small:
                image.load()
                image = ImageOps.exif_transpose(image)
    except Exception as error:  # a decoder of a broken file may raise anything
        reason = " ".join(str(error).split()) if isinstance(source, str) else type(error).__name__
        raise ValueError(f"the image in {place} cannot be read ({reason}). Replace it or remove its rows.") from error
    if not is_small:
        raise ValueError(
            f"the image in {place} has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}. Resize it or "
            "remove its rows."
        )
    # Conversion to RGB would cut such values off at 255, so that nearly all is white.
    if image.mode[0] in "IF":
        raise ValueError(f"the image in {place} has more than 8 bits (mode {image.mode}). Convert it to 8 bits.")
    return image


def decode_images(
    sources: list[Source], places: dict[Source, str], image_processor: BaseImageProcessor, shape: tuple[int, int]
) -> torch.Tensor:
    """All of `sources` in RGB and in the model's size, as (N, 3, height, width) of bytes.

    Args:
        shape: height and width that the model reads.
    """
    pixels = torch.empty(len(sources), 3, *shape, dtype=torch.uint8)
    for start in range(0, len(sources), DECODED_AT_ONCE):
        images = [decode_image(source, places[source]) for source in sources[start : start + DECODED_AT_ONCE]]
        batch = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        if batch.shape[1:] != pixels.shape[1:]:
            raise ValueError(
                f"the image processor gives {tuple(batch.shape[1:])} but the model reads {tuple(pixels.shape[1:])}. "
                "Use the image processor of the checkpoint, or correct its `size`."
            )
        pixels[start : start + len(batch)] = batch
    return pixels


def image_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of the images that the model reads."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise ValueError("the model reads text alone: its configuration has no `vision_config`. Use another.")
    return vision.image_shape


def prepare_image_processor(checkpoint: str | None, config: PreTrainedConfig) -> BaseImageProcessor:
    """The image processor of the checkpoint, or one that resizes to what the model reads."""
    if checkpoint is not None:
        try:
            return AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        except OSError:
            pass  # a checkpoint of text, or a Trainer's between two epochs
    height, width = image_shape(config)
    return BlipImageProcessorPil(size={"height": height, "width": width})


class ImageTextCollator:
    """Rows to a batch: texts padded to the longest, `pixel_values` (B, 3, height, width) from the decoded images.

    Args:
        pixels: (N, 3, height, width) of bytes, which the rows' `image` counts.
        image_processor: says how bytes become the numbers that the model reads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pixels: torch.Tensor, image_processor: BaseImageProcessor):
        self.pad = DataCollatorWithPadding(tokenizer)
        self.pixels = pixels
        scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        mean, std = (0.0, 1.0)
        if image_processor.do_normalize:
            mean, std = (
                torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
                for values in (image_processor.image_mean, image_processor.image_std)
            )
        self.factor = torch.as_tensor(scale / std, dtype=torch.float32)
        self.offset = torch.as_tensor(mean / std, dtype=torch.float32)

    def pixel_values(self, images: list[int]) -> torch.Tensor:
        return self.pixels[torch.as_tensor(images)].float().mul_(self.factor).sub_(self.offset)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.pad([{key: value for key, value in row.items() if key != "image"} for row in rows])
        return {**batch, "pixel_values": self.pixel_values([row["image"] for row in rows])}
