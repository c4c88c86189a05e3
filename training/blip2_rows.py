"""Rows of BLIP-2's two stages, and their batches: pairs of image and text, and prompts with what to write."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from training.images import ImageTextCollator

# The prompt of visual question answering (Li et al. 2023, section 4.2).
QUESTION_PROMPT = "Question: {} Answer:"


class PromptRows(torch.utils.data.Dataset):
    """Rows of a prompt, what to write behind it, and the number of an image. Equal texts are tokenized once.

    Args:
        prompts, targets: (N,) lists of texts.
        images: (N,), which image each row has.
        max_length: tokens of prompt, target and end together; longer prompts lose their beginning, then targets their
            end.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        images: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ):
        self.targets, self.images = list(targets), images
        end = [tokenizer.eos_token_id]
        # A word in the middle of a line begins with its space.
        self.target_ids = self._encode(
            [f" {target}" if prompt else target for prompt, target in zip(prompts, targets, strict=True)],
            partial(tokenizer, add_special_tokens=False),
            lambda ids: ids[: max_length - 1] + end,
        )
        # As the processor does it, with the tokens that some tokenizers put around a text.
        self.prompt_ids = self._encode(prompts, tokenizer, lambda ids: ids)
        self.max_length = max_length

    def _encode(self, texts, tokenizer, finish):
        distinct = list(dict.fromkeys(texts))
        encoded = tokenizer(distinct)["input_ids"]
        by_text = {text: finish(ids) for text, ids in zip(distinct, encoded, strict=True)}
        return [by_text[text] for text in texts]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict:
        target = self.target_ids[row]
        room = self.max_length - len(target)
        prompt = self.prompt_ids[row]
        return {
            "prompt": prompt[len(prompt) - min(room, len(prompt)) :],
            "target": target,
            "image": int(self.images[row]),
        }


class Blip2Collator(ImageTextCollator):
    """What both stages batch alike: images, or the vision tower's states of them.

    Attributes:
        features: (N, 1 + P, D), states of all images, read instead of them once they are set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pixels: torch.Tensor, image_processor: BaseImageProcessor):
        super().__init__(tokenizer, pixels, image_processor)
        self.tokenizer = tokenizer
        self.features: np.ndarray | None = None

    def read_images(self, images: list[int]) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, height, width) or `vision_hidden_states` (B, 1 + P, D)."""
        if self.features is None:
            return {"pixel_values": self.pixel_values(images)}
        return {"vision_hidden_states": torch.from_numpy(self.features[images])}


class PairCollator(Blip2Collator):
    """Pairs of image and text for the first stage, all texts of one length, which processes need to compare them."""

    def __init__(self, tokenizer, pixels, image_processor, max_length: int):
        super().__init__(tokenizer, pixels, image_processor)
        self.max_length = max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
        batch = self.tokenizer.pad(texts, padding="max_length", max_length=self.max_length, return_tensors="pt")
        return {**batch, **self.read_images([row["image"] for row in rows])}


class PromptCollator(Blip2Collator):
    """Prompts with what to write behind them, for a language model that goes on from an image.

    Args:
        num_query_tokens: places of an image, before the prompt of a decoder; in the encoder's text of an
            encoder-decoder, whose decoder writes the target.
    """

    def __init__(self, tokenizer, pixels, image_processor, image_token_id, num_query_tokens, is_encoder_decoder=False):
        super().__init__(tokenizer, pixels, image_processor)
        self.places = [image_token_id] * num_query_tokens
        self.is_encoder_decoder = is_encoder_decoder

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts, labels = [], []
        for row in rows:
            prompt = [*self.places, *row["prompt"]]
            ids = prompt if self.is_encoder_decoder else prompt + row["target"]
            texts.append(ids)
            labels.append(row["target"] if self.is_encoder_decoder else [-100] * len(prompt) + row["target"])
        batch = self._pad(texts, "right")
        width = max(len(row) for row in labels)
        batch["labels"] = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
        return {**batch, **self.read_images([row["image"] for row in rows])}

    def prompts(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The same without what to write, padded to the left, from which generation goes on."""
        batch = self._pad([[*self.places, *row["prompt"]] for row in rows], "left")
        return {**batch, **self.read_images([row["image"] for row in rows])}

    def _pad(self, texts, side):
        width, padding = max(len(ids) for ids in texts), self.tokenizer.pad_token_id
        filled = {"right": lambda ids, fill: ids + fill, "left": lambda ids, fill: fill + ids}[side]
        return {
            "input_ids": torch.tensor([filled(ids, [padding] * (width - len(ids))) for ids in texts]),
            "attention_mask": torch.tensor([filled([1] * len(ids), [0] * (width - len(ids))) for ids in texts]),
        }
