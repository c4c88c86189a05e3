"""BLIP-2's first stage (Li et al. 2023, "BLIP-2", section 3.2): queries learn to read images from images with texts.

Three losses: contrast of images and texts (ITC), matching of a pair by a classifier that reads both (ITM), and writing
the text from the image (ITG). What they train also scores images and texts (`CustomBlip2ForImageTextRetrieval`), with
the parameter names and numbers of the stock class of that name; stock has no class for the training.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.blip_2.modeling_blip_2 import Blip2ImageTextMatchingModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_blip2 import CustomBlip2Config
from .contrastive import (
    contrastive_logits,
    contrastive_loss,
    draw_hard_negatives,
    gather_rows,
    mean_over_processes,
    same_text,
    world_size,
)
from .losses import linear_cross_entropy, next_token_labels
from .modeling_bert_heads import CustomBertLMPredictionHead, CustomBertPreTrainingHeads
from .modeling_blip2 import CustomBlip2PreTrainedModel
from .modeling_blip2_qformer import CustomBlip2TextEmbeddings
from .ops import first_attended
from .outputs import Blip2PreTrainingOutput

# The inverse of the smallest temperature of the contrast (Radford et al. 2021, "CLIP", section 2.5).
LARGEST_LOGIT_SCALE = 100.0


class CustomBlip2ForImageTextRetrieval(CustomBlip2PreTrainedModel):
    """Scores of images and texts: by the similarity of their vectors, or by a classifier that reads both."""

    _keys_to_ignore_on_load_unexpected = [r"^(language_projection|language_model|cls|logit_scale)"]

    def __init__(self, config: CustomBlip2Config):
        super().__init__(config)
        self._add_heads(config)
        self.post_init()
        self.freeze()

    def _add_heads(self, config):
        qformer_config = config.qformer_config
        if not qformer_config.use_qformer_text_input:
            raise ValueError(
                f"{type(self).__name__} reads texts by the Q-Former, but `use_qformer_text_input` is False. Set it in "
                "`qformer_config`."
            )
        width, size = qformer_config.hidden_size, config.image_text_hidden_size
        self.embeddings = CustomBlip2TextEmbeddings(qformer_config)
        self.vision_projection = nn.Linear(width, size)
        self.text_projection = nn.Linear(width, size)
        self.itm_head = nn.Linear(width, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.word_embeddings = value

    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        vision_hidden_states: torch.FloatTensor | None = None,
    ) -> torch.FloatTensor:
        """Vectors (B, Q, E) of length 1 to compare images with texts by."""
        outputs = self._vision_outputs(pixel_values, vision_hidden_states, interpolate_pos_encoding)
        return self._image_embeds(
            self.qformer(
                self._queries(len(outputs.last_hidden_state)),
                encoder_hidden_states=outputs.last_hidden_state,
                return_dict=True,
            )
        )

    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None
    ) -> torch.FloatTensor:
        """Vectors (B, E) of length 1 to compare texts with images by."""
        return self._text_embeds(input_ids, attention_mask)[0]

    def _image_embeds(self, query_outputs):
        states = query_outputs.last_hidden_state.to(self.vision_projection.weight.dtype)
        return nn.functional.normalize(self.vision_projection(states), dim=-1)

    def _text_embeds(self, input_ids, attention_mask):
        """The vectors (B, E) of the texts, of their first real tokens, and the Q-Former's output."""
        outputs = self.qformer(
            self.embeddings(input_ids, attention_mask=attention_mask),
            query_length=0,
            attention_mask=attention_mask,
            return_dict=True,
        )
        states = outputs.last_hidden_state.to(self.text_projection.weight.dtype)
        first = states[:, 0]
        if attention_mask is not None:
            first = states[torch.arange(len(states), device=states.device), first_attended(attention_mask)]
        return nn.functional.normalize(self.text_projection(first), dim=-1), outputs

    def _matching(self, input_ids, attention_mask, **image):
        """Logits (B, 2) of whether text and image belong together, and the Q-Former's output that read both."""
        queries = self._queries(len(input_ids))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        outputs = self.qformer(
            self.embeddings(input_ids, query_embeds=queries, attention_mask=attention_mask),
            query_length=queries.shape[1],
            attention_mask=nn.functional.pad(attention_mask, (queries.shape[1], 0), value=1),
            return_dict=True,
            **image,
        )
        states = outputs.last_hidden_state[:, : queries.shape[1]].to(self.itm_head.weight.dtype)
        return self.itm_head(states).mean(1), outputs

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        use_image_text_matching_head: bool = False,
        interpolate_pos_encoding: bool = False,
        vision_hidden_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Blip2ImageTextMatchingModelOutput:
        """Compute `logits_per_image`: similarities (B, B') of B images and B' texts, or with the matching head logits
        (B, 2) of each pair of image and text, no and yes.

        Args:
            input_ids: (B', T); behind `num_query_tokens` image tokens where the configuration has `image_token_index`,
                as the processor writes them.
            use_image_text_matching_head: read each pair by the classifier, more exact and much slower.
            vision_hidden_states: (B, 1 + P, D'), the vision tower's `last_hidden_state`, instead of the images.
        """
        if input_ids is None:
            raise ValueError("`input_ids` is missing: images are scored with texts. Pass the tokenizer's output.")
        vision_outputs = self._vision_outputs(pixel_values, vision_hidden_states, interpolate_pos_encoding, **kwargs)
        states = vision_outputs.last_hidden_state
        if use_image_text_matching_head and len(states) != len(input_ids):
            raise ValueError(
                f"there are {len(states)} images but {len(input_ids)} texts, and the matching head reads pairs. Pass "
                "one text an image."
            )
        if self.config.image_token_index is not None:
            input_ids = input_ids[:, self.config.num_query_tokens :]
            attention_mask = attention_mask if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        if use_image_text_matching_head:
            logits_per_image, text_outputs = self._matching(input_ids, attention_mask, encoder_hidden_states=states)
            image_embeds, text_embeds = states, text_outputs.last_hidden_state
        else:
            query_outputs = self.qformer(self._queries(len(states)), encoder_hidden_states=states, return_dict=True)
            image_embeds = self._image_embeds(query_outputs)
            text_embeds, text_outputs = self._text_embeds(input_ids, attention_mask)
            logits_per_image = contrastive_logits(image_embeds, text_embeds)
        return Blip2ImageTextMatchingModelOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )


class CustomBlip2ForPreTraining(CustomBlip2ForImageTextRetrieval):
    """The first stage: queries learn to read images by contrast with texts, matching, and writing the text."""

    # Losses that compare the pairs of a batch do not add up over micro-batches.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^(language_projection|language_model)"]
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def _add_heads(self, config):
        super()._add_heads(config)
        if config.qformer_config.bos_token_id is None:
            raise ValueError(
                "a text to be written begins with a token of its own, but `bos_token_id` is not set. Add a token to "
                "the tokenizer and set its id in `qformer_config`."
            )
        self.cls = CustomBertPreTrainingHeads(config.qformer_config, has_relationship=False)
        self.logit_scale = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CustomBertLMPredictionHead):
            init.zeros_(module.bias)
        elif isinstance(module, CustomBlip2ForPreTraining):
            init.constant_(module.logit_scale, -torch.tensor(self.config.itc_temperature).log().item())

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        vision_hidden_states: torch.FloatTensor | None = None,
        return_loss: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Blip2PreTrainingOutput:
        """Compute the three losses of B pairs and their weighted sum (Li et al. 2023, section 3.2).

        Pairs of other processes are gathered: the mean of the processes' losses is the loss of their joint batch. Texts
        that repeat each other are partners of each other's images.

        Args:
            input_ids: (B, T), beginning with the classifier's token; of one length for all processes.
            vision_hidden_states: (B, 1 + P, D'), the vision tower's `last_hidden_state`, instead of the images.
        """
        config = self.config
        if input_ids is None:
            raise ValueError("`input_ids` is missing: the losses are of pairs. Pass the tokenizer's output.")
        outputs = self._vision_outputs(pixel_values, vision_hidden_states, interpolate_pos_encoding, **kwargs)
        states = outputs.last_hidden_state
        if len(states) != len(input_ids):
            raise ValueError(f"there are {len(states)} images but {len(input_ids)} texts. Pass one text an image.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # Projected once for contrast and matching.
        image_key_values = self.qformer.image_key_values(states)
        query_outputs = self.qformer(
            self._queries(len(states)),
            image_key_values=image_key_values,
            use_cache=bool(config.itg_loss_weight) and not (self.qformer.gradient_checkpointing and self.training),
            return_dict=True,
        )
        image_embeds = self._image_embeds(query_outputs)
        text_embeds, _ = self._text_embeds(input_ids, attention_mask)
        scale = self.logit_scale.exp().clamp(max=LARGEST_LOGIT_SCALE)
        logits_per_image = scale * contrastive_logits(image_embeds, gather_rows(text_embeds))
        logits_per_text = scale * contrastive_logits(gather_rows(image_embeds), text_embeds).t()
        loss = itc_loss = itm_loss = itm_logits = itg_loss = None
        if return_loss:
            padded_ids = input_ids.masked_fill(attention_mask == 0, -1)
            is_positive = same_text(padded_ids, gather_rows(padded_ids))
            loss = 0.0
            if config.itc_loss_weight:
                options = (is_positive, config.label_smoothing)
                itc_loss = contrastive_loss(logits_per_image, *options) + contrastive_loss(logits_per_text, *options)
                itc_loss = itc_loss / 2
                loss = loss + config.itc_loss_weight * itc_loss
            if config.itm_loss_weight:
                similarities = (logits_per_image, logits_per_text)
                itm_loss, itm_logits = self._matching_loss(
                    input_ids, attention_mask, states, image_key_values, similarities, is_positive
                )
                loss = loss + config.itm_loss_weight * itm_loss
            if config.itg_loss_weight:
                cache = query_outputs.past_key_values
                itg_loss = self._generation_loss(input_ids, attention_mask, image_key_values, cache)
                loss = loss + config.itg_loss_weight * itg_loss
        return Blip2PreTrainingOutput(
            loss=loss,
            itc_loss=itc_loss,
            itm_loss=itm_loss,
            itg_loss=itg_loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            itm_logits=itm_logits,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )

    def _matching_loss(self, input_ids, attention_mask, states, image_key_values, similarities, is_positive):
        """Loss and logits (3B, 2) of telling pairs from texts with a hard wrong image and images with such a text."""
        images, has_wrong_image = draw_hard_negatives(similarities[1], is_positive)
        texts, has_wrong_text = draw_hard_negatives(similarities[0], is_positive)
        if world_size() == 1:
            wrong = {
                layer: tuple(part.index_select(0, images) for part in pair) for layer, pair in image_key_values.items()
            }
        else:
            wrong = self.qformer.image_key_values(gather_rows(states)[images])
        key_values = {
            layer: tuple(torch.cat((right, other, right)) for right, other in zip(pair, wrong[layer], strict=True))
            for layer, pair in image_key_values.items()
        }
        ids = torch.cat((input_ids, input_ids, gather_rows(input_ids)[texts]))
        mask = torch.cat((attention_mask, attention_mask, gather_rows(attention_mask)[texts]))
        logits, _ = self._matching(ids, mask, image_key_values=key_values)
        labels = torch.zeros(len(ids), dtype=torch.long, device=logits.device)
        labels[: len(input_ids)] = 1
        is_known = torch.cat((torch.ones_like(has_wrong_image), has_wrong_image, has_wrong_text))
        labels = labels.masked_fill(~is_known, -100)
        total = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        # As many in each process: a row is without a wrong partner only where all texts are equal.
        return total / is_known.sum(), logits

    def _generation_loss(self, input_ids, attention_mask, image_key_values, past_key_values):
        """Loss of writing the text (B, T) from the queries, each token from those before it."""
        predictions = self.cls.predictions
        is_first = torch.arange(input_ids.shape[1], device=input_ids.device) == first_attended(attention_mask)[:, None]
        written = input_ids.masked_fill(is_first, self.config.qformer_config.bos_token_id)
        options = {"attention_mode": "multimodal_causal", "return_dict": True}
        num_queries = self.query_tokens.shape[1]
        mask = nn.functional.pad(attention_mask, (num_queries, 0), value=1)
        if past_key_values is not None:
            # The queries see no text, so their keys and values are those of the contrast.
            embeds = self.embeddings(written, attention_mask=attention_mask)
            outputs = self.qformer(
                embeds, query_length=0, attention_mask=mask, past_key_values=past_key_values, **options
            )
            states = outputs.last_hidden_state
        else:
            # Checkpointing keeps none.
            queries = self._queries(len(input_ids))
            embeds = self.embeddings(written, query_embeds=queries, attention_mask=attention_mask)
            outputs = self.qformer(embeds, num_queries, mask, image_key_values=image_key_values, **options)
            states = outputs.last_hidden_state[:, num_queries:]
        labels = next_token_labels(input_ids.masked_fill(attention_mask == 0, -100), attention_mask).flatten()
        labelled = (labels != -100).nonzero().squeeze(-1)
        rows = predictions.transform(states.flatten(0, 1).index_select(0, labelled))
        return linear_cross_entropy(
            rows,
            predictions.decoder,
            labels[labelled],
            # Texts of one token have nothing to write.
            num_items_in_batch=mean_over_processes(torch.tensor(len(labelled), device=labels.device)).clamp(min=1),
            chunk_size=self.config.loss_chunk_size,
            label_smoothing=self.config.label_smoothing,
        )


__all__ = ["CustomBlip2ForImageTextRetrieval", "CustomBlip2ForPreTraining"]
