"""Back to stock: a model of this package as the checkpoint of the stock class with the same parameters.

What is written holds no code and no field of ours, so that any tool that reads stock `gpt2`, `bert` and `blip-2` reads
it: inference engines, converters, quantizers, other versions of the host. What stock cannot express is refused by name.

The numbers are those of the model here at real tokens, with one thing to know: stock counts positions from the first
column. A caller who pads to the left passes `position_ids` to stock's `forward` (its `generate` does so itself), and
what stock pools of a BERT, or compares of a BLIP-2's texts, is padding where they are padded to the left.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import (
    BertConfig,
    Blip2Config,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .folders import whole_folder

# The stock class of each class here.
STOCK_CLASSES = {
    "CustomGPT2Model": "GPT2Model",
    "CustomGPT2ForCausalLM": "GPT2LMHeadModel",
    "CustomGPT2DoubleHeadsModel": "GPT2DoubleHeadsModel",
    "CustomGPT2ForSequenceClassification": "GPT2ForSequenceClassification",
    "CustomGPT2ForTokenClassification": "GPT2ForTokenClassification",
    "CustomGPT2ForQuestionAnswering": "GPT2ForQuestionAnswering",
    "CustomBertModel": "BertModel",
    "CustomBertForPreTraining": "BertForPreTraining",
    "CustomBertForMaskedLM": "BertForMaskedLM",
    "CustomBertForCausalLM": "BertLMHeadModel",
    "CustomBertForNextSentencePrediction": "BertForNextSentencePrediction",
    "CustomBertForSequenceClassification": "BertForSequenceClassification",
    "CustomBertForMultipleChoice": "BertForMultipleChoice",
    "CustomBertForTokenClassification": "BertForTokenClassification",
    "CustomBertForQuestionAnswering": "BertForQuestionAnswering",
    "CustomBlip2VisionModel": "Blip2VisionModel",
    "CustomBlip2QFormerModel": "Blip2QFormerModel",
    "CustomBlip2Model": "Blip2Model",
    "CustomBlip2ForConditionalGeneration": "Blip2ForConditionalGeneration",
    "CustomBlip2ForImageTextRetrieval": "Blip2ForImageTextRetrieval",
}

_WITH_CODE = "Save it with its code by `save_pretrained`"
_AS_VECTORS = f"{_WITH_CODE}, or write its vectors in word2vec's formats with `python -m training.word_vectors export`."
# What to do with the classes that stock has none for.
WITHOUT_STOCK = {
    "CustomBertForVisualQuestionAnswering": f"{_WITH_CODE}.",
    "CustomBertForImageTextRetrieval": f"{_WITH_CODE}.",
    "CustomBlip2VisionForImageClassification": f"{_WITH_CODE}, or export its tower, `model.vision_model`.",
    "CustomTransformerModel": f"{_WITH_CODE}.",
    "CustomTransformerForSeq2SeqLM": f"{_WITH_CODE}.",
    "CustomElmoModel": f"{_WITH_CODE}.",
    "CustomElmoForPreTraining": f"{_WITH_CODE}.",
    "CustomElmoForCausalLM": f"{_WITH_CODE}.",
    "CustomElmoForTokenClassification": f"{_WITH_CODE}.",
    "CustomWord2VecModel": _AS_VECTORS,
    "CustomWord2VecForPreTraining": _AS_VECTORS,
    "CustomBlip2ForPreTraining": (
        f"{_WITH_CODE}, then load that folder as CustomBlip2ForImageTextRetrieval, which has a stock class and leaves "
        "out the head that writes."
    ),
}


@dataclass(frozen=True)
class StockFamily:
    """What becomes of the fields that a configuration here has and its stock one does not declare.

    Attributes:
        config_class: the stock configuration.
        only: fields that change the model, with the one value that stock can express.
        dropped: fields that change neither parameters nor outputs, or do so only together with a value that `only`
            refuses: how a loss is computed or weighed, what is trained, where a text of the first stage begins.
        undeclared: fields that stock reads without declaring them, or that tools read, with the value that stock takes
            when there is none; they are written where they say something else.
    """

    config_class: type[PreTrainedConfig]
    only: dict[str, object] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    undeclared: dict[str, object] = field(default_factory=dict)


# By the model type here.
FAMILIES = {
    "custom_gpt2": StockFamily(
        GPT2Config,
        only={"position_embedding_type": "learned"},
        dropped=("position_embedding_type", "rope_theta", "loss_chunk_size", "projection_layout"),
        undeclared={"classifier_dropout": 0.1, "summary_last_dropout": 0.0},
    ),
    "custom_bert": StockFamily(
        BertConfig,
        only={"position_embedding_type": "absolute", "classifier_hidden_size": None, "vision_config": None},
        dropped=("rope_theta", "classifier_hidden_size", "loss_chunk_size", "vision_config"),
        # A field of stock until its version 5, of which all published checkpoints have it and CTranslate2 needs it.
        undeclared={"position_embedding_type": None},
    ),
    "custom_blip2_vision_model": StockFamily(Blip2VisionConfig),
    "custom_blip2_qformer": StockFamily(Blip2QFormerConfig, dropped=("bos_token_id",)),
    "custom_blip2": StockFamily(
        Blip2Config,
        dropped=(
            "frozen_modules",
            "itc_loss_weight",
            "itm_loss_weight",
            "itg_loss_weight",
            "itc_temperature",
            "label_smoothing",
            "loss_chunk_size",
        ),
        # Of the whole; what is tied in the language model its own configuration says.
        undeclared={"tie_word_embeddings": True},
    ),
}

# Stock fields that a stock class reads otherwise than the class here, with the one value that both read alike. Stock's
# `reorder_and_upcast_attn` is not among them: eager attention computes in float32 there too, and the other kernels,
# which do not look at it, keep scores in float32 by themselves.
ONLY_OF_CLASS = {
    # Its other types take the axis of choices for that of tokens.
    "CustomGPT2DoubleHeadsModel": {"summary_type": "cls_index"},
    # It has a score for each label, of which an answer needs two.
    "CustomBertForQuestionAnswering": {"num_labels": 2},
}


def export_to_stock(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model as the stock checkpoint with the same numbers: configuration, weights, generation configuration.

    The folder appears whole or not at all; the model stays as it is, and its weights are not copied.

    Args:
        model: of one of this package's classes; adapters of PEFT merged.
        tokenizer: to write beside it; a processor of this package becomes stock's.
        overwrite: replace what stands at `folder`.
        max_shard_size: bytes, or a string such as `"5GB"`, from which on the weights are split over several files.

    Returns:
        The folder.

    Raises:
        ValueError: for what stock cannot express: a class, a value of the configuration, a weight; before anything is
            written.
        FileExistsError: when something stands at `folder` and `overwrite` is false.
    """
    _refuse_wrapped(model)
    name = type(model).__name__
    if name not in STOCK_CLASSES:
        remedy = WITHOUT_STOCK.get(name, f"The classes that can be exported are {', '.join(STOCK_CLASSES)}.")
        raise ValueError(f"{name} has no stock counterpart. {remedy}")
    for option, value in ONLY_OF_CLASS.get(name, {}).items():
        _check_only(getattr(model.config, option), value, option, name)
    stock_class = getattr(transformers, STOCK_CLASSES[name])
    tokenizer = None if tokenizer is None else _stock_reader(tokenizer)
    stock = _with_weights_of(model, stock_class, stock_config(model.config))
    with whole_folder(folder, overwrite) as draft:
        stock.save_pretrained(draft, max_shard_size=max_shard_size)
        # The host writes the type of the first weight, which in a BLIP-2 of half precision is one kept in float32.
        stock.config.dtype = str(_dtype_of(stock)).removeprefix("torch.")
        stock.config.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
    return Path(folder)


def stock_config(config: PreTrainedConfig, path: str = "") -> PreTrainedConfig:
    """The stock configuration of one here, parts included; a copy of one that is not of this package.

    Args:
        path: where in the whole the configuration stands, such as `text_config.`, for errors.

    Raises:
        ValueError: for a value that stock cannot express, naming its field.
    """
    family = FAMILIES.get(type(config).model_type)
    if family is None:
        return copy.deepcopy(config)
    for name, value in family.only.items():
        _check_only(getattr(config, name), value, path + name, family.config_class.__name__)
    fields = config.to_dict()
    for name, value in family.undeclared.items():
        if fields.get(name) == value:
            fields.pop(name, None)
    for name in ("auto_map", "model_type", "transformers_version", *family.dropped):
        fields.pop(name, None)
    for name in {"image_size", "patch_size"} & fields.keys():
        fields[name] = _square(fields[name], path + name)
    # As objects: a type that goes by its name is ours again, once the package is registered in place of stock.
    for name in family.config_class.sub_configs_defaults:
        fields[name] = stock_config(getattr(config, name), f"{path}{name}.")
    if fields.get("architectures"):
        fields["architectures"] = [STOCK_CLASSES.get(name, name) for name in fields["architectures"]]
    return family.config_class.from_dict(fields)


def _check_only(value, allowed, name, stock_name):
    if value != allowed:
        raise ValueError(
            f"`{name}` is {value!r}, which stock cannot express: for {stock_name} it has to be {allowed!r}. Train a "
            f"model with that value, or save this one with its code by `save_pretrained`."
        )


def _square(size, name):
    """A size as the one number that stock takes."""
    sizes = {size} if isinstance(size, int) else set(size)
    if len(sizes) > 1:
        raise ValueError(
            f"`{name}` is {size!r}, but stock's images and patches are square. {_WITH_CODE}, or train a model of "
            "square ones."
        )
    return sizes.pop()


def _refuse_wrapped(model):
    """Refuse what is no model of this package itself, or whose weights are not its own numbers."""
    is_peft = type(model).__module__.split(".")[0] == "peft"
    if is_peft or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError(
            "the model carries adapters of PEFT, which no stock checkpoint holds. Merge them first: `model = "
            "peft_model.merge_and_unload()`."
        )
    if isinstance(getattr(model, "module", None), PreTrainedModel):
        raise ValueError(f"{type(model).__name__} wraps the model. Pass what it wraps: `model.module`.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantized. Export the model that was quantized, or `model.dequantize()` first.")


def _with_weights_of(model, stock_class, config):
    """A stock model in which the tensors of `model` stand, not copies of them."""
    with torch.device("meta"):
        stock = stock_class(config)
    weights, expected = model.state_dict(), stock.state_dict()
    for names, problem in (
        (expected.keys() - weights.keys(), "the model has no weight {}, so stock would start it at random"),
        (weights.keys() - expected.keys(), "stock has no weight {}, so it would be lost"),
    ):
        if names:
            raise ValueError(
                f"{problem.format(', '.join(f'`{name}`' for name in sorted(names)))}. Export a model as its class "
                "builds it."
            )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"weight `{name}` has shape {tuple(tensor.shape)}, but by the configuration stock's has shape "
                f"{tuple(expected[name].shape)}. Correct the configuration."
            )
        if tensor.is_meta:
            raise ValueError(f"weight `{name}` is not in memory. Load the model without offloading to a disk.")
    _check_ties(stock.all_tied_weights_keys, weights)
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    if stock.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock


def _dtype_of(model):
    """The type of the weights: of two, the one that is not float32, in which the host keeps some of half a model."""
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    return (dtypes - {torch.float32} or {torch.float32}).pop()


def _check_ties(ties, weights):
    """Refuse weights that stock would take for one, by its configuration, but that differ."""
    for target, source in ties.items():
        one, other = weights[target], weights[source]
        if one.data_ptr() != other.data_ptr() and not torch.equal(one, other):
            raise ValueError(
                f"`tie_word_embeddings` is True, but the weights `{target}` and `{source}` differ. Set it to False in "
                "the configuration, or tie them by `model.tie_weights()`."
            )


def _stock_reader(reader):
    """A tokenizer or processor as stock has it, whose folder holds no code."""
    for part in (getattr(reader, name, None) for name in ("tokenizer", "image_processor")):
        if part is not None:
            _refuse_own_code(part)
    if type(reader).__name__ == "CustomBlip2Processor":
        # A copy, because stock adds its token to the tokenizer that it is given.
        stock = Blip2Processor(
            reader.image_processor, copy.deepcopy(reader.tokenizer), num_query_tokens=reader.num_query_tokens
        )
        stock.chat_template = reader.chat_template
        return stock
    _refuse_own_code(reader)
    return reader


def _refuse_own_code(reader):
    if type(reader).__module__.split(".")[0] != "transformers":
        raise ValueError(
            f"{type(reader).__name__} is no class of stock, so other tools could not load it. Pass a stock tokenizer "
            "or leave it out."
        )


__all__ = ["FAMILIES", "ONLY_OF_CLASS", "STOCK_CLASSES", "WITHOUT_STOCK", "export_to_stock", "stock_config"]
