"""Images and texts to what BLIP-2 reads."""

from transformers import AddedToken, BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

IMAGE_TOKEN = "<image>"


class CustomBlip2Processor(ProcessorMixin):
    """An image processor and a tokenizer, with the places of an image's queries in the text.

    A text begins with `num_query_tokens` image tokens, before the tokenizer's own first token, unless it says by
    `<image>` where its images stand.

    Args:
        image_processor: BLIP's, usually.
        tokenizer: a fast one, that of the language model or, in the first stage, of the Q-Former. Gets the image token.
        num_query_tokens: queries of an image, as in the model's configuration; `None` for a model whose texts hold no
            image tokens, as those of the first stage.
    """

    text_kwargs = {"return_token_type_ids": False}

    def __init__(self, image_processor, tokenizer, num_query_tokens: int | None = None, chat_template=None, **kwargs):
        tokenizer.return_token_type_ids = False
        self.image_token = getattr(tokenizer, "image_token", IMAGE_TOKEN)
        if num_query_tokens is not None and self.image_token not in tokenizer.get_vocab():
            token = AddedToken(IMAGE_TOKEN, normalized=False, special=True)
            tokenizer.add_tokens([token], special_tokens=True)
        self.num_query_tokens = num_query_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def image_token_id(self) -> int:
        """Of the places of an image, `image_token_index` of the model's configuration."""
        return self.tokenizer.convert_tokens_to_ids(str(self.image_token))

    def __call__(
        self, images=None, text: str | list[str] | None = None, **kwargs: Unpack[ProcessingKwargs]
    ) -> BatchFeature:
        """`pixel_values` (B, 3, height, width) of images, `input_ids` and `attention_mask` (B', T) of texts.

        Args:
            images: one or several, as the host's image processors take them.
            text: one or several. `max_length` counts the places of the images too.

        Raises:
            ValueError: for neither, and for texts that are no strings.
        """
        if images is None and text is None:
            raise ValueError("pass `images`, `text` or both.")
        kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = kwargs["text_kwargs"].pop("return_tensors", None)
        features = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if not texts or not all(isinstance(line, str) for line in texts):
                raise ValueError("`text` is a string or a list of strings. Leave it out for images alone.")
            has_places = images is not None and self.num_query_tokens is not None
            features.update(self._encode(texts, has_places, kwargs["text_kwargs"]))
        if images is not None:
            features.update(self.image_processor(images, **kwargs["images_kwargs"]))
        return BatchFeature(features, tensor_type=return_tensors)

    def _encode(self, texts, has_places, options):
        """Ids and mask of texts, with the places of their images."""
        if not has_places:
            return self.tokenizer(texts, **options)
        token, count = str(self.image_token), self.num_query_tokens
        # What is padded is the whole row, so that padding to the left comes before the image.
        padding = {name: options.pop(name, None) for name in ("padding", "pad_to_multiple_of", "padding_side")}
        ahead = [0 if token in line else count for line in texts]
        lines = [line.replace(token, token * count) for line in texts]
        max_length = options.pop("max_length", None)
        rows = []
        for line, places in zip(lines, ahead, strict=True):
            limit = {} if max_length is None else {"max_length": max_length - places}
            encoded = self.tokenizer(line, **options, **limit)
            rows.append({"input_ids": [self.image_token_id] * places + encoded["input_ids"]})
        if not padding["padding"]:
            return {
                "input_ids": [row["input_ids"] for row in rows],
                "attention_mask": [[1] * len(row["input_ids"]) for row in rows],
            }
        padding = {name: value for name, value in padding.items() if value is not None}
        return self.tokenizer.pad(rows, max_length=max_length, **padding)


__all__ = ["CustomBlip2Processor"]
