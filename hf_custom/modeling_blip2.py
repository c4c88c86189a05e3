"""BLIP-2 (Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large
Language Models"): a vision tower, a Q-Former whose queries read its states, a language model that reads the queries.

This is the whole model, trained in the paper's second stage; the classes of the first, which trains the queries on
pairs of image and text, are in `modeling_blip2_retrieval.py`. Parameter names, arguments and numbers are those of the
stock `blip-2`, whose checkpoints load here.

Where it differs from stock: the large parts are frozen unless told otherwise; states of the vision tower may be passed
instead of images; the training loss holds no logits; padding is not computed; one `get_image_features` serves all;
queries start so that they train; bad input is refused by name.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import (
    BaseModelOutputWithVisionQformerOutputs,
    Blip2ForConditionalGenerationModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .checks import OwnShardsOnly, check_attention_mask, check_ids, check_image_tokens, check_labels, input_shape
from .configuration_blip2 import CustomBlip2Config
from .losses import linear_cross_entropy, next_token_labels
from .modeling_blip2_qformer import CustomBlip2QFormerModel
from .modeling_blip2_vision import CustomBlip2VisionModel
from .modeling_gpt2 import CustomGPT2ForCausalLM
from .ops import positions_from_mask
from .parallel import Divisible

if TYPE_CHECKING:
    # Never run: the host ships the files that it reads here, and a model on the Hub should bring both stages.
    from .modeling_blip2_retrieval import CustomBlip2ForPreTraining  # noqa: F401


def make_language_model(config) -> PreTrainedModel:
    """The language model of a configuration of `TEXT_CONFIGS`."""
    if config.model_type == CustomGPT2ForCausalLM.config_class.model_type:
        return CustomGPT2ForCausalLM(config)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_config(config)


class CustomBlip2PreTrainedModel(Divisible, OwnShardsOnly, PreTrainedModel):
    """What every BLIP-2 class declares to the host, how weights start, what is frozen, and how images are read."""

    config: CustomBlip2Config
    base_model_prefix = "blip"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "CustomBlip2VisionEmbeddings",
        "CustomBlip2VisionLayer",
        "CustomBlip2TextEmbeddings",
        "CustomBlip2QFormerLayer",
        "CustomGPT2Block",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    # The Q-Former stays in float32, where half precision gives infinities.
    _keep_in_fp32_modules = ["query_tokens", "qformer"]
    _supports_flash_attn = False
    _supports_flex_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _auto_class = "AutoModel"

    def __init__(self, config: CustomBlip2Config, *inputs, **kwargs):
        if config.model_type in CustomBlip2Config.stock_model_types:
            raise TypeError(
                f"{type(self).__name__} needs a CustomBlip2Config but got a stock {type(config).__name__}. "
                "Convert it: `CustomBlip2Config.from_dict(config.to_dict())`."
            )
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)
        self.vision_model = CustomBlip2VisionModel(config.vision_config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = CustomBlip2QFormerModel(config.qformer_config)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        # The host makes every parameter that it loads a trainable one.
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def freeze(self):
        """Take `config.frozen_modules` out of training."""
        for name in self.config.frozen_modules:
            part = getattr(self, name, None)
            if part is not None:
                part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for name in self.config.frozen_modules:
            part = getattr(self, name, None)
            # Adapters that were added to a frozen part train, with its dropout.
            if isinstance(part, nn.Module) and not any(weight.requires_grad for weight in part.parameters()):
                part.eval()
        return self

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that training changes: all but those of frozen parts. `save_pretrained` takes it as `state_dict`.

        A model built with the frozen parts' own weights reads it by `load_state_dict(..., strict=False)`.
        """
        frozen = {name for name, weight in self.named_parameters(remove_duplicate=False) if not weight.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CustomBlip2PreTrainedModel):
            init.normal_(module.query_tokens, mean=0.0, std=self.config.initializer_range)

    def _vision_outputs(self, pixel_values, vision_hidden_states, interpolate_pos_encoding, **kwargs):
        """The vision tower's output, or its states (B, S, D') as they were kept."""
        if (pixel_values is None) == (vision_hidden_states is None):
            raise ValueError("pass exactly one of `pixel_values` and `vision_hidden_states`.")
        if vision_hidden_states is None:
            return self.vision_model(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
            )
        width = self.config.vision_config.hidden_size
        if vision_hidden_states.ndim != 3 or vision_hidden_states.shape[-1] != width:
            raise ValueError(
                f"`vision_hidden_states` has shape {tuple(vision_hidden_states.shape)} but (batch, 1 + patches, "
                f"{width}) is needed: the `last_hidden_state` of this model's vision tower."
            )
        vision_hidden_states = vision_hidden_states.to(self.vision_model.post_layernorm.weight.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=vision_hidden_states)

    def _queries(self, batch: int) -> torch.Tensor:
        """The queries of each image, (B, Q, D)."""
        return self.query_tokens.expand(batch, -1, -1)


class CustomBlip2Model(CustomBlip2PreTrainedModel):
    """The three parts and the projection between the last two."""

    def __init__(self, config: CustomBlip2Config):
        super().__init__(config)
        # The class name of the bare model matches no loss of the host's.
        self.loss_type = "ForCausalLM"
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = make_language_model(config.text_config)
        self.post_init()
        self.freeze()

    # What the first stage alone has.
    _keys_to_ignore_on_load_unexpected = [
        r"^(embeddings|vision_projection|text_projection|itm_head|cls|logit_scale)",
        r"^qformer\.encoder\.layer\.\d+\.(intermediate|output)\.",
    ]

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.language_model.get_encoder() if modality is None else super().get_encoder(modality=modality)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        vision_hidden_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithVisionQformerOutputs:
        """Compute what the language model reads of an image: `pooler_output` (B, Q, D) of Q queries.

        `last_hidden_state` (B, 1 + P, D') is the vision tower's, whose output and the Q-Former's come with it.

        Args:
            pixel_values: (B, 3, height, width), normalised by the image processor.
            vision_hidden_states: (B, 1 + P, D'), the vision tower's `last_hidden_state`, instead of the images.
        """
        vision_outputs = self._vision_outputs(pixel_values, vision_hidden_states, interpolate_pos_encoding, **kwargs)
        states = vision_outputs.last_hidden_state
        qformer_outputs = self.qformer(
            self._queries(len(states)), encoder_hidden_states=states, return_dict=True, **kwargs
        )
        features = self.language_projection(qformer_outputs.last_hidden_state.to(states.dtype))
        return BaseModelOutputWithVisionQformerOutputs(
            last_hidden_state=states,
            pooler_output=features,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
            vision_outputs=vision_outputs,
            qformer_outputs=qformer_outputs,
        )

    def get_qformer_features(
        self, pixel_values: torch.FloatTensor, interpolate_pos_encoding: bool = False
    ) -> torch.FloatTensor:
        """The states (B, Q, D) of the queries after the Q-Former."""
        outputs = self.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True)
        return outputs.qformer_outputs.last_hidden_state

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        mm_encoder_outputs: dict | None = None,
        vision_hidden_states: torch.FloatTensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Blip2ForConditionalGenerationModelOutput:
        """Compute logits (B, T, V) and, given `labels`, the loss of the text.

        Args:
            pixel_values: (B, 3, height, width), the images in the order of their tokens in `input_ids`.
            input_ids: (B, T), with `config.image_token_index` Q times for an image of Q queries.
            decoder_input_ids, decoder_attention_mask: (B, U), for an encoder-decoder language model.
            inputs_embeds: (B, T, D), instead of `input_ids`, with the embeddings of the image's token at its places.
            labels: (B, T), or (B, L) of the last L tokens; shifted inside. (B, U) for an encoder-decoder.
            mm_encoder_outputs: `image` from `get_image_features`, instead of images.
            vision_hidden_states: (B, 1 + P, D'), the vision tower's `last_hidden_state`, instead of images.
            return_logits: compute logits at all. Training with labels does not unless told to: the loss needs none.
            kwargs: reach the language model; `head_mask` one of ours.
        """
        shape = input_shape(input_ids, inputs_embeds)
        if kwargs.get("head_mask") is not None and not isinstance(self.language_model, CustomGPT2ForCausalLM):
            raise ValueError(
                f"`head_mask` is for the language model, but {type(self.language_model).__name__} would not read it. "
                "Leave it out, or use a language model of type 'custom_gpt2'."
            )
        features = (mm_encoder_outputs or {}).get("image")
        if features is None:
            features = self.get_image_features(
                pixel_values, interpolate_pos_encoding, vision_hidden_states, return_dict=True
            )
        elif pixel_values is not None or vision_hidden_states is not None:
            raise ValueError("`mm_encoder_outputs` holds the image already. Leave out the images.")
        inputs_embeds = self._insert_image(features.pooler_output, input_ids, inputs_embeds)
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.long, device=inputs_embeds.device)
        check_attention_mask(attention_mask, *shape)
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **kwargs, "return_dict": True}
        if self.config.use_decoder_only_language_model:
            loss, logits, outputs = self._decode(inputs, labels, return_logits)
        else:
            inputs |= {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
            loss, logits, outputs = self._encode_and_decode(inputs, labels)
        return Blip2ForConditionalGenerationModelOutput(
            loss=loss,
            logits=logits,
            vision_outputs=features.vision_outputs,
            qformer_outputs=features.qformer_outputs,
            language_model_outputs=outputs,
        )

    def _image_token(self):
        """The id of an image's places."""
        if self.config.image_token_index is None:
            raise ValueError(
                "the configuration has no `image_token_index`, so nothing says where in the text an image stands. Set "
                "it to the id of the processor's image token."
            )
        return self.config.image_token_index

    def _insert_image(self, features, input_ids, inputs_embeds):
        """Embeddings (B, T, D) of a text with the features of the images in the places of their tokens."""
        image_token = self._image_token()
        embeddings = self.get_input_embeddings()
        if inputs_embeds is None:
            check_ids(input_ids, embeddings.num_embeddings, "input_ids")
            is_image = input_ids == image_token
            inputs_embeds = embeddings(input_ids)
        else:
            token = torch.tensor(image_token, device=inputs_embeds.device)
            is_image = (inputs_embeds == embeddings(token)).all(-1)
        check_image_tokens(is_image, *features.shape[:2])
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features)

    def _decode(self, inputs, labels, return_logits):
        """Loss, logits and output of a language model that reads image and text in one stream."""
        if return_logits is None:
            return_logits = labels is None or not self.training
        inputs = self._with_positions(inputs)
        items = {name: inputs.pop(name, None) for name in ("num_items_in_batch", "shift_labels")}
        if labels is None:
            outputs = self.language_model(**inputs)
            return None, outputs.logits, outputs
        shape, vocab_size = tuple(inputs["attention_mask"].shape), self.config.text_config.vocab_size
        labels = _behind(labels, shape)
        check_labels(labels, shape, vocab_size, "labels", "vocab_size")
        # The configuration's default is meant for generation.
        inputs.setdefault("use_cache", False)
        targets = next_token_labels(labels, inputs["attention_mask"], items["shift_labels"])
        num_items = items["num_items_in_batch"]
        if return_logits or hasattr(self, "_loss_function"):
            # A loss that the user has set reads logits.
            outputs = self.language_model(**inputs)
            options = {"vocab_size": vocab_size, "shift_labels": targets, "num_items_in_batch": num_items}
            return self.loss_function(outputs.logits, labels, **options), outputs.logits, outputs
        outputs = self.language_model.get_decoder()(**inputs)
        rows, chunk_size = outputs.last_hidden_state.flatten(0, 1), self.config.loss_chunk_size
        loss = linear_cross_entropy(rows, self.get_output_embeddings(), targets.flatten(), num_items, chunk_size)
        return loss, None, outputs

    def _encode_and_decode(self, inputs, labels):
        """Loss, logits and output of a language model whose decoder answers what its encoder read."""
        items = inputs.pop("num_items_in_batch", None)
        if labels is not None:
            check_labels(labels, tuple(labels.shape), self.config.text_config.vocab_size, "labels", "vocab_size")
        outputs = self.language_model(**inputs, labels=labels)
        loss = outputs.loss
        if loss is not None and items is not None:
            loss = loss * (labels != -100).sum() / torch.as_tensor(items, device=loss.device)
        return loss, outputs.logits, outputs

    def _with_positions(self, inputs):
        """Positions counted from the first real token, which a stock GPT-2 does not do itself."""
        if self.config.text_config.model_type != "gpt2" or "position_ids" in inputs:
            return inputs
        return {**inputs, "position_ids": positions_from_mask(inputs["attention_mask"])}


def _behind(labels, shape):
    """Labels (B, L) of the last L tokens as (B, T)."""
    missing = shape[1] - labels.shape[-1]
    if missing <= 0:
        return labels
    labels = labels.clone()
    # Nothing among the labelled tokens predicts the first of them.
    labels[:, 0] = -100
    return nn.functional.pad(labels, (missing, 0), value=-100)


class CustomBlip2ForConditionalGeneration(CustomBlip2Model, GenerationMixin):
    """Writes about an image: captions, or answers to a question (the paper's second stage)."""

    _can_compile_fullgraph = True

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        vision_hidden_states: torch.FloatTensor | None = None,
        **generate_kwargs,
    ) -> torch.LongTensor:
        """Generate by the language model from images and prompts: (B, T + new tokens), the prompt's ids first, or
        (B, new tokens) from `inputs_embeds` and from an encoder-decoder.

        Args:
            input_ids: (B, T), with the image's tokens; the image and the token that begins a text when not given.
            generate_kwargs: of the language model's `generate`.
        """
        features = self.get_image_features(
            pixel_values, interpolate_pos_encoding, vision_hidden_states, return_dict=True
        ).pooler_output
        if input_ids is None and inputs_embeds is None:
            self._image_token()
            prompt = [self.config.image_token_index] * features.shape[1] + [self.config.text_config.bos_token_id]
            input_ids = torch.tensor([prompt], device=features.device).repeat(len(features), 1)
        embeds = self._insert_image(features, input_ids if inputs_embeds is None else None, inputs_embeds)
        if attention_mask is None:
            attention_mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        inputs = {"inputs_embeds": embeds, "attention_mask": attention_mask}
        if input_ids is not None and self.config.use_decoder_only_language_model:
            inputs["input_ids"] = input_ids
        return self.language_model.generate(**inputs, **generate_kwargs)


__all__ = ["CustomBlip2ForConditionalGeneration", "CustomBlip2Model", "CustomBlip2PreTrainedModel"]
