"""Configurations: each declared field survives JSON, is checked, and changes something that can be observed."""

import ast
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny import BERT, BY_CHARACTERS, ELMO, GPT2, TRANSFORMER, VISION, VOCAB, WORD2VEC, widen
from transformers import (
    AutoConfig,
    BertConfig,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GPT2Config,
    PreTrainedConfig,
    set_seed,
)

from hf_custom import (
    CustomBertConfig,
    CustomBertForCausalLM,
    CustomBertForMaskedLM,
    CustomBertForSequenceClassification,
    CustomBertModel,
    CustomBlip2Config,
    CustomBlip2ForConditionalGeneration,
    CustomBlip2ForImageTextRetrieval,
    CustomBlip2ForPreTraining,
    CustomBlip2QFormerConfig,
    CustomBlip2QFormerModel,
    CustomBlip2VisionConfig,
    CustomBlip2VisionModel,
    CustomElmoConfig,
    CustomElmoForCausalLM,
    CustomElmoForPreTraining,
    CustomElmoForTokenClassification,
    CustomElmoModel,
    CustomElmoTokenizer,
    CustomGPT2Config,
    CustomGPT2DoubleHeadsModel,
    CustomGPT2ForCausalLM,
    CustomGPT2ForSequenceClassification,
    CustomGPT2ForTokenClassification,
    CustomTransformerConfig,
    CustomTransformerForSeq2SeqLM,
    CustomWord2VecConfig,
    CustomWord2VecForPreTraining,
)
from hf_custom.modeling_word2vec import check_vocabulary
from hf_custom.presets import PRESETS, preset_config
from hf_custom.registry import FAMILIES
from training.word_pairs import Corpus
from training.word_trainer import Chunks, ChunkUpdates
from training.word_updates import Tables

IDS = torch.arange(24).view(2, 12) % 8
# A BLIP-2 whose texts go through the Q-Former too. `IMAGE_IDS` hold the image's two tokens twice, under two ids.
QFORMER = {
    **{name: BERT[name] for name in BERT.keys() & {item.name for item in fields(Blip2QFormerConfig)}},
    "encoder_hidden_size": VISION["hidden_size"],
    "use_qformer_text_input": True,
    "bos_token_id": 97,
}
BLIP2 = {
    "vision_config": VISION,
    "qformer_config": QFORMER,
    "text_config": GPT2,
    "num_query_tokens": 2,
    "image_token_index": 96,
    "frozen_modules": [],
}
IMAGE_IDS = torch.tensor([[96, 96, 95, 95, 1, 2, 3], [96, 96, 95, 95, 4, 5, 6]])


def shapes(config, model_class=CustomGPT2ForCausalLM):
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in model_class(config).named_parameters()}


def wide_model(config, model_class=CustomGPT2ForCausalLM):
    model = model_class(config)
    set_seed(0)
    return widen(model)


def logits(config, model_class=CustomGPT2ForCausalLM, dtype=torch.float32):
    """In training mode, so that dropout shows; it is zero in `GPT2` where it is not the field in question."""
    model = wide_model(config, model_class).train().to(dtype)
    set_seed(1)
    return model(IDS).logits.tolist()


def sequence_logits(config):
    return logits(config, CustomGPT2ForSequenceClassification)


def token_logits(config):
    return logits(config, CustomGPT2ForTokenClassification)


def half_logits(config):
    return logits(config, dtype=torch.bfloat16)


def choice_logits(config):
    model = wide_model(config, CustomGPT2DoubleHeadsModel).train()
    return model(IDS.view(2, 2, 6), mc_token_ids=torch.full((2, 2), 3)).mc_logits.tolist()


def choice_shapes(config):
    return shapes(config, CustomGPT2DoubleHeadsModel)


def largest_product(config):
    """Rows of the largest product with the output weight, while the training loss is computed."""
    rows = []
    model = wide_model(config).train()
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    model(IDS, labels=IDS).loss.backward()
    return max(rows)


def first_std(config):
    set_seed(0)
    return CustomGPT2ForCausalLM(config).transformer.wte.weight.std().item()


def has_cache(config):
    return wide_model(config)(IDS).past_key_values is not None


def tokens_from_nothing(config):
    return wide_model(config).eval().generate(max_new_tokens=2, do_sample=False).tolist()


def generated_length(config):
    return wide_model(config).eval().generate(IDS[:1], max_new_tokens=5, do_sample=False).shape[-1]


def bert_shapes(config):
    return shapes(config, CustomBertForMaskedLM)


def bert_logits(config):
    return logits(config, CustomBertForMaskedLM)


def bert_sequence_logits(config):
    return logits(config, CustomBertForSequenceClassification)


def bert_sequence_shapes(config):
    return shapes(config, CustomBertForSequenceClassification)


def bert_std(config):
    set_seed(0)
    return CustomBertModel(config).embeddings.position_embeddings.weight.std().item()


def bert_padding_row(config):
    """The word whose vector is zero at first and gets no gradient."""
    set_seed(0)
    return CustomBertModel(config).embeddings.word_embeddings.weight.square().sum(-1).argmin().item()


def bert_largest_product(config):
    """Rows of the largest product with the output weight, while the training loss is computed."""
    rows = []
    model = wide_model(config, CustomBertForMaskedLM).train()
    model.cls.predictions.decoder.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    model(IDS, labels=IDS).loss.backward()
    return max(rows)


def bert_has_cache(config):
    return wide_model(config, CustomBertForCausalLM)(IDS).past_key_values is not None


def bert_tokens_from_nothing(config):
    return wide_model(config, CustomBertForCausalLM).eval().generate(max_new_tokens=2, do_sample=False).tolist()


def bert_generated_length(config):
    model = wide_model(config, CustomBertForCausalLM).eval()
    return model.generate(IDS[:1], max_new_tokens=5, do_sample=False).shape[-1]


def tower_shapes(config):
    return shapes(config, CustomBlip2VisionModel)


def tower_states(config):
    """In training mode, so that dropout shows."""
    model = wide_model(config, CustomBlip2VisionModel).train()
    set_seed(1)
    return model(torch.randn(2, 3, *config.image_shape)).last_hidden_state.tolist()


def tower_std(config):
    set_seed(0)
    return CustomBlip2VisionModel(config).embeddings.position_embedding.std().item()


def qformer_shapes(config):
    return shapes(config, CustomBlip2QFormerModel)


def qformer_states(config):
    """In training mode, so that dropout shows."""
    model = wide_model(config, CustomBlip2QFormerModel).train()
    set_seed(1)
    image = torch.randn(2, 5, config.encoder_hidden_size)
    return model(torch.randn(2, 3, config.hidden_size), encoder_hidden_states=image).last_hidden_state.tolist()


def qformer_std(config):
    set_seed(0)
    return CustomBlip2QFormerModel(config).encoder.layer[0].attention.attention.query.weight.std().item()


def reader_of(config):
    return CustomBlip2Config(**{**BLIP2, "qformer_config": config.to_dict()})


def reader_shapes(config):
    """Of the texts' embeddings too, which the Q-Former leaves to the model around it."""
    return shapes(reader_of(config), CustomBlip2ForImageTextRetrieval)


def reader_padding_row(config):
    """The word whose vector is zero at first and gets no gradient."""
    set_seed(0)
    weight = CustomBlip2ForImageTextRetrieval(reader_of(config)).embeddings.word_embeddings.weight
    return weight.square().sum(-1).argmin().item()


def reader_loss(config):
    return first_stage_loss(reader_of(config))


def blip2_shapes(config):
    return shapes(config, CustomBlip2ForConditionalGeneration)


def blip2_logits(config):
    model = wide_model(config, CustomBlip2ForConditionalGeneration).train()
    set_seed(1)
    return model(torch.randn(2, 3, *config.vision_config.image_shape), IMAGE_IDS).logits.tolist()


def blip2_std(config):
    set_seed(0)
    return CustomBlip2ForConditionalGeneration(config).query_tokens.std().item()


def blip2_trained(config):
    model = CustomBlip2ForConditionalGeneration(config)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def blip2_largest_product(config):
    """Rows of the largest product with the output weight, while the training loss is computed."""
    rows = []
    model = wide_model(config, CustomBlip2ForConditionalGeneration).train()
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    images = torch.randn(2, 3, *config.vision_config.image_shape)
    model(images, IMAGE_IDS, labels=IMAGE_IDS).loss.backward()
    return max(rows)


def first_stage_shapes(config):
    return shapes(config, CustomBlip2ForPreTraining)


def first_stage_loss(config):
    model = wide_model(config, CustomBlip2ForPreTraining).train()
    set_seed(1)
    return model(torch.randn(2, 3, *config.vision_config.image_shape), IDS[:, :6]).loss.item()


def first_scale(config):
    return CustomBlip2ForPreTraining(config).logit_scale.item()


def elmo_shapes(config):
    return shapes(config, CustomElmoForTokenClassification)


def elmo_softmax_shapes(config):
    return shapes(config, CustomElmoForPreTraining)


def elmo_ids(config):
    """Words, or the ids of their characters: of a short word and of one that is cut."""
    if config.input_type == "words":
        return IDS
    reader = CustomElmoTokenizer(max_characters_per_token=config.max_characters_per_token)
    return reader(["ab abcdefghijkl c", "the cat sat"], return_tensors="pt")["input_ids"]


def elmo_logits(config):
    """In training mode, so that dropout shows."""
    model = wide_model(config, CustomElmoForTokenClassification).train()
    set_seed(1)
    return model(elmo_ids(config)).logits.tolist()


def elmo_pooled(config):
    return wide_model(config, CustomElmoModel)(elmo_ids(config)).pooler_output.tolist()


def elmo_trained(config):
    model = CustomElmoForTokenClassification(config)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def elmo_std(config):
    set_seed(0)
    return CustomElmoModel(config).embeddings.weight.std().item()


def lstm_writer(config):
    return wide_model(config, CustomElmoForCausalLM).eval()


def lstm_has_cache(config):
    return lstm_writer(config)(IDS).past_key_values is not None


def lstm_tokens_from_nothing(config):
    return lstm_writer(config).generate(max_new_tokens=2, do_sample=False).tolist()


def lstm_generated(config):
    """Of two rows, the first of which ends at once."""
    return lstm_writer(config).generate(IDS, max_new_tokens=5, do_sample=False).tolist()


def lstm_largest_product(config):
    """Rows of the largest product with the output weight, while the training loss is computed."""
    rows = []
    model = wide_model(config, CustomElmoForCausalLM).train()
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    model(IDS, labels=IDS).loss.backward()
    return max(rows)


def translator_shapes(config):
    return shapes(config, CustomTransformerForSeq2SeqLM)


def translator(config):
    return wide_model(config, CustomTransformerForSeq2SeqLM)


def translator_loss(config):
    """In training mode, so that dropout and smoothing show."""
    model = translator(config).train()
    set_seed(1)
    return model(IDS, labels=IDS.flip(-1)).loss.item()


def translator_table(config):
    return translator(config).model.encoder.embed_positions.table.shape


def translator_std(config):
    set_seed(0)
    return CustomTransformerForSeq2SeqLM(config).lm_head.weight.std().item()


def translator_has_cache(config):
    return translator(config)(IDS, decoder_input_ids=IDS).past_key_values is not None


def translator_pads(config):
    """Of a label that is ignored amid others, the token that stands for it."""
    labels = IDS.masked_fill(IDS == 3, -100)
    return translator(config)(IDS, labels=labels).loss.item()


def translation(config):
    """Of two rows, the first of which ends at once where every token but the first does."""
    return translator(config).eval().generate(IDS, max_new_tokens=5, do_sample=False).tolist()


def translator_largest_product(config):
    """Rows of the largest product with the output weight, while the training loss is computed."""
    rows = []
    model = translator(config).train()
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    model(IDS, labels=IDS).loss.backward()
    return max(rows)


def pair_shapes(config):
    return shapes(config, CustomWord2VecForPreTraining)


def highest_start(config):
    set_seed(0)
    return CustomWord2VecForPreTraining(config).word2vec.embeddings.weight.max().item()


def rows_of_zeros(config):
    return CustomWord2VecForPreTraining(config).word2vec.embeddings.weight.eq(0).all(1).tolist()


def updated_vectors(config):
    """Input vectors after the updates of a short text."""
    set_seed(0)
    inputs, outputs = torch.randn(2, config.vocab_size, config.hidden_size)
    inputs[-1] = outputs[-1] = 0
    ids = (torch.rand(200).square() * 40).int().numpy()
    chunks = Chunks(Corpus(ids, np.array([200]), 200), size=200)
    counts = np.bincount(ids, minlength=config.vocab_size)
    ChunkUpdates(config, chunks, counts, seed=0, learning_rate=0.1).run(Tables(inputs, outputs), 0, [0], 0.1)
    return inputs.tolist()


def accepts_vocabulary(config):
    try:
        check_vocabulary([str(number) for number in range(config.vocab_size)], config, "a list")
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Effect:
    """A value that is not the default, what it changes, and the other fields it needs to do so."""

    value: object
    observe: Callable
    beside: dict = field(default_factory=dict)


LSTM = {"bidirectional": False}
# One row a declared field.
EFFECTS = {
    CustomElmoConfig: {
        "vocab_size": Effect(VOCAB + 5, elmo_shapes),
        "input_type": Effect("words", elmo_shapes, {"input_type": "characters"}),
        "bidirectional": Effect(False, elmo_shapes),
        "num_hidden_layers": Effect(3, elmo_shapes),
        "cell_size": Effect(24, elmo_shapes),
        "projection_size": Effect(None, elmo_shapes),
        "use_skip_connections": Effect(False, elmo_logits),
        "cell_clip": Effect(0.3, elmo_logits),
        "proj_clip": Effect(0.2, elmo_logits),
        "max_characters_per_token": Effect(9, elmo_logits, BY_CHARACTERS),
        "character_embedding_size": Effect(6, elmo_shapes, BY_CHARACTERS),
        "filters": Effect([[2, 5], [3, 6]], elmo_shapes, BY_CHARACTERS),
        "num_highway_layers": Effect(1, elmo_shapes, BY_CHARACTERS),
        "char_cnn_activation": Effect("tanh", elmo_logits, BY_CHARACTERS),
        "lstm_dropout": Effect(0.5, elmo_logits),
        "do_layer_norm": Effect(True, elmo_logits),
        "pooling_type": Effect("max", elmo_pooled),
        "freeze_bilm": Effect(True, elmo_trained),
        "classifier_embeddings": Effect(True, elmo_shapes),
        "classifier_lstm_size": Effect(5, elmo_shapes),
        "classifier_dropout": Effect(0.4, elmo_logits),
        "initializer_range": Effect(0.5, elmo_std),
        "use_cache": Effect(False, lstm_has_cache, LSTM),
        "bos_token_id": Effect(5, lstm_tokens_from_nothing, LSTM),
        "eos_token_id": Effect(list(range(VOCAB)), lstm_generated, LSTM),
        "pad_token_id": Effect(7, lstm_generated, {**LSTM, "eos_token_id": list(range(0, VOCAB, 2))}),
        "tie_word_embeddings": Effect(True, elmo_softmax_shapes),
        "loss_chunk_size": Effect(4, lstm_largest_product, LSTM),
    },
    CustomTransformerConfig: {
        "vocab_size": Effect(VOCAB + 5, translator_shapes),
        "decoder_vocab_size": Effect(VOCAB + 7, translator_shapes, {"share_encoder_decoder_embeddings": False}),
        "share_encoder_decoder_embeddings": Effect(False, translator_shapes),
        "tie_word_embeddings": Effect(False, translator_shapes),
        "d_model": Effect(40, translator_shapes),
        "encoder_layers": Effect(1, translator_shapes),
        "encoder_attention_heads": Effect(2, translator_loss),
        "encoder_ffn_dim": Effect(44, translator_shapes),
        "decoder_layers": Effect(1, translator_shapes),
        "decoder_attention_heads": Effect(4, translator_loss),
        "decoder_ffn_dim": Effect(44, translator_shapes),
        "activation_function": Effect("gelu", translator_loss),
        "norm_first": Effect(True, translator_shapes),
        "dropout": Effect(0.5, translator_loss),
        "attention_dropout": Effect(0.5, translator_loss),
        "activation_dropout": Effect(0.5, translator_loss),
        "layer_norm_eps": Effect(0.1, translator_loss),
        "initializer_range": Effect(0.5, translator_std),
        "scale_embedding": Effect(False, translator_loss),
        "max_position_embeddings": Effect(48, translator_table),
        "label_smoothing": Effect(0.3, translator_loss),
        "loss_chunk_size": Effect(4, translator_largest_product),
        "use_cache": Effect(False, translator_has_cache),
        "bos_token_id": Effect(5, translation, {"decoder_start_token_id": None, "tie_word_embeddings": False}),
        "eos_token_id": Effect(list(range(VOCAB)), translation),
        "pad_token_id": Effect(7, translator_pads),
        "decoder_start_token_id": Effect(5, translator_loss),
    },
    CustomGPT2Config: {
        "vocab_size": Effect(VOCAB + 5, shapes),
        "n_positions": Effect(48, shapes),
        "n_embd": Effect(48, shapes),
        "n_layer": Effect(2, shapes),
        "n_head": Effect(2, logits),
        "n_inner": Effect(40, shapes),
        "activation_function": Effect("relu", logits),
        "resid_pdrop": Effect(0.5, logits),
        "embd_pdrop": Effect(0.4, logits),
        "attn_pdrop": Effect(0.3, logits),
        "layer_norm_epsilon": Effect(0.2, logits),
        "initializer_range": Effect(0.5, first_std),
        "summary_type": Effect("mean", choice_logits),
        "summary_use_proj": Effect(False, choice_shapes),
        "summary_activation": Effect("tanh", choice_logits),
        "summary_proj_to_labels": Effect(False, choice_shapes),
        "summary_first_dropout": Effect(0.5, choice_logits),
        "summary_last_dropout": Effect(0.5, choice_logits),
        "scale_attn_weights": Effect(False, logits),
        "use_cache": Effect(False, has_cache),
        "bos_token_id": Effect(5, tokens_from_nothing),
        "eos_token_id": Effect(list(range(VOCAB)), generated_length),
        "pad_token_id": Effect(7, sequence_logits),
        "scale_attn_by_inverse_layer_idx": Effect(True, logits),
        "reorder_and_upcast_attn": Effect(True, half_logits),
        "add_cross_attention": Effect(True, shapes),
        "tie_word_embeddings": Effect(False, shapes),
        "position_embedding_type": Effect("sinusoidal", shapes),
        "rope_theta": Effect(50.0, logits, {"position_embedding_type": "rope"}),
        "classifier_dropout": Effect(0.5, token_logits),
        "loss_chunk_size": Effect(4, largest_product),
        "projection_layout": Effect("linear", shapes),
    },
    CustomBertConfig: {
        "vocab_size": Effect(VOCAB + 5, bert_shapes),
        "hidden_size": Effect(48, bert_shapes),
        "num_hidden_layers": Effect(3, bert_shapes),
        "num_attention_heads": Effect(2, bert_logits),
        "intermediate_size": Effect(40, bert_shapes),
        "hidden_act": Effect("relu", bert_logits),
        "hidden_dropout_prob": Effect(0.5, bert_logits),
        "attention_probs_dropout_prob": Effect(0.3, bert_logits),
        "max_position_embeddings": Effect(48, bert_shapes),
        "type_vocab_size": Effect(5, bert_shapes),
        "initializer_range": Effect(0.5, bert_std),
        "layer_norm_eps": Effect(0.2, bert_logits),
        "pad_token_id": Effect(7, bert_padding_row),
        "use_cache": Effect(False, bert_has_cache, {"is_decoder": True}),
        "classifier_dropout": Effect(0.5, bert_sequence_logits),
        "is_decoder": Effect(True, bert_logits),
        "add_cross_attention": Effect(True, bert_shapes, {"is_decoder": True}),
        "bos_token_id": Effect(5, bert_tokens_from_nothing, {"is_decoder": True}),
        "eos_token_id": Effect(list(range(VOCAB)), bert_generated_length, {"is_decoder": True}),
        "tie_word_embeddings": Effect(False, bert_shapes),
        "position_embedding_type": Effect("relative_key", bert_shapes),
        "rope_theta": Effect(50.0, bert_logits, {"position_embedding_type": "rope"}),
        "classifier_hidden_size": Effect(24, bert_sequence_shapes),
        "loss_chunk_size": Effect(4, bert_largest_product),
        "vision_config": Effect(VISION, bert_shapes),
    },
    CustomBlip2VisionConfig: {
        "hidden_size": Effect(48, tower_shapes),
        "intermediate_size": Effect(56, tower_shapes),
        "num_hidden_layers": Effect(2, tower_shapes),
        "num_attention_heads": Effect(4, tower_states),
        "image_size": Effect([8, 16], tower_shapes),
        "patch_size": Effect(2, tower_shapes),
        "hidden_act": Effect("relu", tower_states),
        "layer_norm_eps": Effect(0.2, tower_states),
        "attention_dropout": Effect(0.3, tower_states),
        "initializer_range": Effect(0.5, tower_std),
        "qkv_bias": Effect(False, tower_shapes),
    },
    CustomBlip2QFormerConfig: {
        "vocab_size": Effect(VOCAB + 5, reader_shapes),
        "hidden_size": Effect(48, qformer_shapes),
        "num_hidden_layers": Effect(3, qformer_shapes),
        "num_attention_heads": Effect(2, qformer_states),
        "intermediate_size": Effect(40, qformer_shapes),
        "hidden_act": Effect("relu", qformer_states),
        "hidden_dropout_prob": Effect(0.5, qformer_states),
        "attention_probs_dropout_prob": Effect(0.3, qformer_states),
        "max_position_embeddings": Effect(48, reader_shapes),
        "initializer_range": Effect(0.5, qformer_std),
        "layer_norm_eps": Effect(0.2, qformer_states),
        "pad_token_id": Effect(7, reader_padding_row),
        "cross_attention_frequency": Effect(1, qformer_shapes),
        "encoder_hidden_size": Effect(56, qformer_shapes),
        "use_qformer_text_input": Effect(True, qformer_shapes, {"use_qformer_text_input": False}),
        "bos_token_id": Effect(8, reader_loss),
    },
    CustomBlip2Config: {
        "vision_config": Effect({**VISION, "num_hidden_layers": 2}, blip2_shapes),
        "qformer_config": Effect({**QFORMER, "num_hidden_layers": 3}, blip2_shapes),
        "text_config": Effect({**GPT2, "n_layer": 2}, blip2_shapes),
        "num_query_tokens": Effect(3, blip2_shapes),
        "image_text_hidden_size": Effect(24, first_stage_shapes),
        "image_token_index": Effect(95, blip2_logits),
        "initializer_range": Effect(0.5, blip2_std),
        "tie_word_embeddings": Effect(False, first_stage_shapes),
        "frozen_modules": Effect(["language_model"], blip2_trained),
        "itc_loss_weight": Effect(2.0, first_stage_loss),
        "itm_loss_weight": Effect(2.0, first_stage_loss),
        "itg_loss_weight": Effect(2.0, first_stage_loss),
        "itc_temperature": Effect(0.5, first_scale),
        "label_smoothing": Effect(0.3, first_stage_loss),
        "loss_chunk_size": Effect(4, blip2_largest_product),
    },
    CustomWord2VecConfig: {
        "vocab_size": Effect(46, pair_shapes),
        "hidden_size": Effect(16, pair_shapes),
        "objective": Effect("cbow", updated_vectors, {"objective": "skip_gram"}),
        "window_size": Effect(2, updated_vectors),
        "num_negatives": Effect(3, updated_vectors),
        "noise_exponent": Effect(0.5, updated_vectors),
        "subsample_threshold": Effect(0.01, updated_vectors),
        "whole_cbow_error": Effect(False, updated_vectors),
        "initializer_range": Effect(2.0, highest_start),
        "unk_token_id": Effect(0, rows_of_zeros),
        "vocabulary_sha256": Effect("of others", accepts_vocabulary),
    },
}
# Stock has it and reads it as little.
UNREAD = {CustomBlip2Config: {"initializer_factor"}}
PARTS = ("vision_config", "qformer_config", "text_config")
BASES = {
    CustomElmoConfig: ELMO,
    CustomGPT2Config: GPT2,
    CustomBertConfig: BERT,
    CustomBlip2VisionConfig: VISION,
    CustomBlip2QFormerConfig: QFORMER,
    CustomBlip2Config: BLIP2,
    CustomTransformerConfig: TRANSFORMER,
    CustomWord2VecConfig: WORD2VEC,
}
STOCK = {
    CustomGPT2Config: GPT2Config,
    CustomBertConfig: BertConfig,
    CustomBlip2VisionConfig: Blip2VisionConfig,
    CustomBlip2QFormerConfig: Blip2QFormerConfig,
    CustomBlip2Config: Blip2Config,
}
# Stock's is for loading and does not train.
OUR_DEFAULTS = {CustomBlip2VisionConfig: {"initializer_range": 0.02}}

each_field = pytest.mark.parametrize(
    ("config_class", "name"), [(config_class, name) for config_class, rows in EFFECTS.items() for name in rows]
)
each_class = pytest.mark.parametrize("config_class", EFFECTS)
each_stock = pytest.mark.parametrize("config_class", STOCK)


def test_every_declared_field_has_a_row():
    assert EFFECTS.keys() == {config_class for config_class, _ in FAMILIES}
    shared = {item.name for item in fields(PreTrainedConfig)}
    for config_class, rows in EFFECTS.items():
        assert rows.keys() == {item.name for item in fields(config_class)} - shared - UNREAD.get(config_class, set())


@each_field
def test_field_has_an_effect(config_class, name):
    effect = EFFECTS[config_class][name]
    base = {**BASES[config_class], **effect.beside}
    before = effect.observe(config_class(**base))
    assert effect.observe(config_class(**base)) == before
    assert effect.observe(config_class(**{**base, name: effect.value})) != before


def test_initializer_range_is_the_scale():
    assert first_std(CustomGPT2Config(**{**GPT2, "initializer_range": 0.5})) == pytest.approx(0.5, rel=0.1)


@each_class
def test_every_field_survives_json(config_class, tmp_path):
    # No decoder reads images; tests/test_image_text.py saves models that do.
    values = {name: effect.value for name, effect in EFFECTS[config_class].items() if name not in PARTS}
    default = config_class()
    assert all(value != getattr(default, name) for name, value in values.items())
    config = config_class(**values)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {name: stored[name] for name in values} == values
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is config_class
        assert {name: getattr(loaded, name) for name in values} == values
        assert loaded.to_json_string() == config.to_json_string()


@each_stock
def test_stock_fields_have_stock_types_and_defaults(config_class):
    stock = STOCK[config_class]
    ours = {item.name: (item.type, item.default) for item in fields(config_class)}
    changed = OUR_DEFAULTS.get(config_class, {})
    expected = {item.name: (item.type, changed.get(item.name, item.default)) for item in fields(stock)}
    assert expected.items() <= ours.items()
    assert config_class.attribute_map == stock.attribute_map


@each_stock
def test_default_and_stock_dictionary_load_in_silence(config_class, caplog):
    stored = {**STOCK[config_class]().to_dict(), **OUR_DEFAULTS.get(config_class, {})}
    if config_class is CustomBlip2Config:
        # Stock's language model is OPT, and its tower starts at another scale.
        stored |= {"text_config": {}, "vision_config": {}}
    config = config_class.from_dict(stored)
    assert config.model_type == config_class.model_type
    assert config.to_dict() == config_class().to_dict()
    assert not caplog.records


@pytest.mark.parametrize("model_type", CustomGPT2Config.stock_model_types)
def test_stock_folder_loads_in_silence(model_type, tmp_path, caplog):
    stored = {**GPT2Config(n_layer=3).to_dict(), "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = CustomGPT2Config.from_pretrained(tmp_path)
    assert (config.model_type, config.n_layer) == ("custom_gpt2", 3)
    assert not caplog.records


@pytest.mark.parametrize("name", PRESETS)
def test_preset_warns_of_nothing(name, caplog):
    preset_config(name)
    assert not caplog.records


def test_parts_survive_json(tmp_path):
    """Whatever the type of the language model, and as fields replaced at loading."""
    text = {"model_type": "opt", "hidden_size": 16, "num_attention_heads": 2}
    config = CustomBlip2Config(**{**BLIP2, "text_config": text})
    assert text["model_type"] == "opt"
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_json_string() == config.to_json_string()
    for part in PARTS:
        assert type(getattr(loaded, part)) is type(getattr(config, part))
    assert (loaded.text_config.model_type, loaded.text_config.hidden_size) == ("opt", 16)
    assert loaded.vision_config.image_shape == (8, 12)
    changed = CustomBlip2Config.from_pretrained(tmp_path, text_config={"model_type": "t5", "d_model": 24})
    assert (changed.text_config.model_type, changed.text_config.d_model) == ("t5", 24)
    assert changed.is_encoder_decoder and not changed.use_decoder_only_language_model
    assert not loaded.is_encoder_decoder and loaded.use_decoder_only_language_model


def test_width_of_the_image_is_that_of_the_tower():
    config = CustomBlip2Config(vision_config=VISION, qformer_config={"encoder_hidden_size": 7})
    assert config.qformer_config.encoder_hidden_size == VISION["hidden_size"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text_config": {"model_type": "bert"}}, ("`text_config`", "'bert'", "custom_gpt2, gpt2, opt, t5")),
        ({"frozen_modules": ["q_former"]}, ("`frozen_modules`", "'q_former'", "qformer")),
        ({"num_query_tokens": 0}, ("`num_query_tokens`", "0")),
        ({"itm_loss_weight": -1.0}, ("`itm_loss_weight`", "-1.0")),
        ({"itc_temperature": 0.0}, ("`itc_temperature`", "0.0")),
        ({"qformer_config": {"cross_attention_frequency": 0}}, ("`cross_attention_frequency`", "0")),
        ({"num_query_token": 3}, ("`num_query_token`", "did you mean `num_query_tokens`")),
    ],
    ids=str,
)
def test_bad_blip2_is_refused_by_name(fields, words):
    with pytest.raises(ValueError) as caught:
        CustomBlip2Config(**{**BLIP2, **fields})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layer", "3"),
        ("n_layer", 2.0),
        ("n_layer", True),
        ("n_embd", None),
        ("n_inner", 2.5),
        ("activation_function", 3),
        ("layer_norm_epsilon", 1),
        ("resid_pdrop", None),
        ("use_cache", "yes"),
        ("eos_token_id", [1, "2"]),
        ("tie_word_embeddings", 1),
        ("position_embedding_type", None),
        ("rope_theta", "10000"),
    ],
)
def test_wrong_type_is_refused_by_name(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        CustomGPT2Config(**{name: value})
    config = CustomGPT2Config()
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        setattr(config, name, value)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    {
        "n_heads": "n_head",
        "num_head": "n_head",
        "n_layers": "n_layer",
        "num_layers": "n_layer",
        "n_embed": "n_embd",
        "n_postions": "n_positions",
        "hiden_size": "hidden_size",
        "layer_norm_eps": "layer_norm_epsilon",
        "vocab_sizes": "vocab_size",
        "atn_pdrop": "attn_pdrop",
        "resid_dropout": "resid_pdrop",
        "position_embeding_type": "position_embedding_type",
        "rope_thet": "rope_theta",
        "activation_fn": "activation_function",
        "tie_word_embedding": "tie_word_embeddings",
        "add_cross_atention": "add_cross_attention",
        "pad_token": "pad_token_id",
        "num_label": "num_labels",
        "id2labels": "id2label",
        "problem_typ": "problem_type",
    }.items(),
)
def test_misspelt_field_is_refused_with_the_right_name(misspelt, meant):
    with pytest.raises(ValueError, match=rf"`{misspelt}`.*did you mean `{meant}`"):
        CustomGPT2Config(**{misspelt: 1})


# What published GPT-2 repositories hold beside the declared fields: old GPT-2 files, and the full dictionaries that
# Transformers 4 wrote for the decoder of an encoder-decoder.
KNOWN = {
    "_name_or_path": "gpt2",
    "_num_labels": 1,
    "apply_query_key_layer_scaling": True,
    "architectures": ["GPT2LMHeadModel"],
    "attn_implementation": "eager",
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cls_token_id": 3,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": 50256,
    "diversity_penalty": 0.0,
    "do_sample": True,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": True,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 50,
    "min_length": 0,
    "n_ctx": 1024,
    "n_special": 0,
    "no_repeat_ngram_size": 0,
    "normalize_attention_scores": True,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_labels": 3,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_past": True,
    "output_scores": False,
    "predict_special_tokens": True,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": "GPT2Tokenizer",
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": "float32",
    "torchscript": False,
    "transformers_version": "4.9.2",
    "typical_p": 1.0,
    "use_bfloat16": False,
    "use_cache": True,
}


@pytest.mark.parametrize("key", KNOWN)
def test_key_of_published_repositories_is_accepted(key):
    assert CustomGPT2Config.from_dict({"model_type": "gpt2", key: KNOWN[key]}).n_layer == 12


# A BLIP-2 has parts, an ELMo no attention.
@pytest.mark.parametrize("config_class", [one for one in EFFECTS if one not in (CustomBlip2Config, CustomElmoConfig)])
def test_standard_names_are_accepted(config_class):
    values = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "max_position_embeddings": 16}
    config = config_class(**values)
    for name, value in values.items():
        assert getattr(config, name) == getattr(config, config_class.attribute_map.get(name, name)) == value


@each_class
def test_configuration_imports_no_torch(config_class):
    for module in (inspect.getmodule(config_class), inspect.getmodule(config_class.__bases__[0])):
        imports = [node for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if hasattr(node, "names")]
        names = {name.name for node in imports if isinstance(node, ast.Import) for name in node.names}
        names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
        assert names and not any(name.split(".")[0] == "torch" for name in names)
