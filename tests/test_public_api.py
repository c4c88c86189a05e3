"""Names that users hold on to: the package's own, and stock's parameters, arguments and outputs."""

import inspect

import pytest
import transformers
from tiny import MODELS, name_of
from transformers import BertConfig, GPT2Config

import hf_custom

PUBLIC_NAMES = [
    "CustomBertConfig",
    "CustomBertForCausalLM",
    "CustomBertForImageTextRetrieval",
    "CustomBertForMaskedLM",
    "CustomBertForMultipleChoice",
    "CustomBertForNextSentencePrediction",
    "CustomBertForPreTraining",
    "CustomBertForQuestionAnswering",
    "CustomBertForSequenceClassification",
    "CustomBertForTokenClassification",
    "CustomBertForVisualQuestionAnswering",
    "CustomBertModel",
    "CustomBertPreTrainedModel",
    "CustomBlip2Config",
    "CustomBlip2ForConditionalGeneration",
    "CustomBlip2ForImageTextRetrieval",
    "CustomBlip2ForPreTraining",
    "CustomBlip2Model",
    "CustomBlip2PreTrainedModel",
    "CustomBlip2Processor",
    "CustomBlip2QFormerConfig",
    "CustomBlip2QFormerModel",
    "CustomBlip2QFormerPreTrainedModel",
    "CustomBlip2VisionConfig",
    "CustomBlip2VisionForImageClassification",
    "CustomBlip2VisionModel",
    "CustomBlip2VisionPreTrainedModel",
    "CustomElmoConfig",
    "CustomElmoForCausalLM",
    "CustomElmoForPreTraining",
    "CustomElmoForTokenClassification",
    "CustomElmoModel",
    "CustomElmoPreTrainedModel",
    "CustomElmoTokenizer",
    "CustomGPT2Config",
    "CustomGPT2DoubleHeadsModel",
    "CustomGPT2ForCausalLM",
    "CustomGPT2ForQuestionAnswering",
    "CustomGPT2ForSequenceClassification",
    "CustomGPT2ForTokenClassification",
    "CustomGPT2Model",
    "CustomGPT2PreTrainedModel",
    "CustomTransformerConfig",
    "CustomTransformerForSeq2SeqLM",
    "CustomTransformerModel",
    "CustomTransformerPreTrainedModel",
    "CustomWord2VecConfig",
    "CustomWord2VecForPreTraining",
    "CustomWord2VecModel",
    "CustomWord2VecPreTrainedModel",
    "export_to_stock",
    "load_model",
    "register",
]

# Stock class by row, and the configuration it takes.
STOCK = {
    "CustomGPT2Model": (transformers.GPT2Model, GPT2Config),
    "CustomGPT2ForCausalLM": (transformers.GPT2LMHeadModel, GPT2Config),
    "CustomGPT2ForSequenceClassification": (transformers.GPT2ForSequenceClassification, GPT2Config),
    "CustomGPT2ForTokenClassification": (transformers.GPT2ForTokenClassification, GPT2Config),
    "CustomGPT2ForQuestionAnswering": (transformers.GPT2ForQuestionAnswering, GPT2Config),
    "CustomGPT2DoubleHeadsModel": (transformers.GPT2DoubleHeadsModel, GPT2Config),
    "CustomBertModel": (transformers.BertModel, BertConfig),
    "CustomBertForCausalLM": (transformers.BertLMHeadModel, BertConfig),
    "CustomBertForPreTraining": (transformers.BertForPreTraining, BertConfig),
    "CustomBertForMaskedLM": (transformers.BertForMaskedLM, BertConfig),
    "CustomBertForNextSentencePrediction": (transformers.BertForNextSentencePrediction, BertConfig),
    "CustomBertForSequenceClassification": (transformers.BertForSequenceClassification, BertConfig),
    "CustomBertForMultipleChoice": (transformers.BertForMultipleChoice, BertConfig),
    "CustomBertForTokenClassification": (transformers.BertForTokenClassification, BertConfig),
    "CustomBertForQuestionAnswering": (transformers.BertForQuestionAnswering, BertConfig),
}
# Arguments that stock reads from its keywords or lacks.
OUR_ARGUMENTS = {
    "CustomGPT2Model": ["head_mask"],
    "CustomGPT2ForCausalLM": ["return_logits", "head_mask"],
    "CustomGPT2DoubleHeadsModel": ["return_logits", "head_mask"],
    "CustomGPT2ForSequenceClassification": ["num_items_in_batch"],
    "CustomBertModel": ["pixel_values", "interpolate_pos_encoding", "head_mask"],
    "CustomBertForPreTraining": ["pixel_values", "return_logits"],
    "CustomBertForMaskedLM": ["pixel_values", "return_logits"],
    "CustomBertForCausalLM": ["return_logits", "head_mask"],
    "CustomBertForNextSentencePrediction": ["num_items_in_batch"],
    "CustomBertForSequenceClassification": ["pixel_values", "num_items_in_batch"],
    "CustomBertForMultipleChoice": ["num_items_in_batch"],
}

each_model = pytest.mark.parametrize("row", MODELS, ids=name_of)
each_model_of_stock = pytest.mark.parametrize("row", [row for row in MODELS if row.name in STOCK], ids=name_of)


def stock_model(row, **overrides):
    stock_class, config_class = STOCK[row.name]
    if row.name == "CustomBertForQuestionAnswering":
        # Where an answer begins and where it ends.
        overrides["num_labels"] = 2
    return stock_class(config_class(**{**row.fields, **overrides})).eval()


def keys(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def arguments(model_class):
    return [name for name in inspect.signature(model_class.forward).parameters if name not in ("self", "kwargs")]


def test_public_names_are_frozen():
    assert hf_custom.__all__ == PUBLIC_NAMES
    visible = {
        name for name, value in vars(hf_custom).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert visible == set(PUBLIC_NAMES)


@each_model
def test_row_is_public(row):
    assert row.name in PUBLIC_NAMES and row.config_class.__name__ in PUBLIC_NAMES


@pytest.mark.parametrize(
    "option", [{}, {"is_decoder": True, "add_cross_attention": True}, {"tie_word_embeddings": False}], ids=name_of
)
@each_model_of_stock
def test_state_dict_has_stock_keys_and_shapes(row, option):
    ours = keys(row.build(**option))
    assert ours == keys(stock_model(row, **option))
    assert any(".crossattention." in name for name in ours) == bool(option.get("add_cross_attention"))


@pytest.mark.parametrize("position_embedding_type", ["sinusoidal", "rope"])
@each_model
def test_fixed_positions_drop_the_position_table_alone(row, position_embedding_type):
    dropped = keys(row.build()).keys() - keys(row.build(position_embedding_type=position_embedding_type)).keys()
    assert len(dropped) == 1 and dropped.pop().endswith(("wpe.weight", "embeddings.position_embeddings.weight"))


@each_model_of_stock
def test_arguments_are_those_of_stock_in_their_order(row):
    ours = arguments(row.model_class)
    extra = OUR_ARGUMENTS.get(row.name, [])
    assert [name for name in ours if name not in extra] == arguments(STOCK[row.name][0])
    assert ours[len(ours) - len(extra) :] == extra
    assert ours[0] == row.model_class.main_input_name


@each_model_of_stock
def test_outputs_have_the_names_of_stock(row):
    batch = {**row.inputs(), **row.draw_labels(3, 11), "output_hidden_states": True, "output_attentions": True}
    ours = row.build(attn_implementation="eager")(**batch)
    stock = stock_model(row)
    stock.set_attn_implementation("eager")
    # Stock BERT keeps no cache of a labelled call; ours keeps one with attention weights, as GPT-2 does.
    extra = ["past_key_values"] if row.name == "CustomBertForCausalLM" else []
    names = list(stock(**batch))
    assert [name for name in ours if name not in extra] == names and set(ours) == {*names, *extra}


@each_model_of_stock
def test_attributes_that_tools_read_are_those_of_stock(row):
    ours, stock = row.build(), stock_model(row)
    for name in ("base_model_prefix", "main_input_name", "supports_gradient_checkpointing", "_tied_weights_keys"):
        assert getattr(ours, name) == getattr(stock, name), name
    for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_attention_backend", "_can_compile_fullgraph"):
        assert getattr(ours, name) >= getattr(stock, name), name
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        parts = [getattr(model, getter)() for model in (ours, stock)]
        assert type(parts[0]) is type(parts[1])
    assert ours.num_parameters() == stock.num_parameters()
    convolutions = [
        {name for name, module in model.named_modules() if isinstance(module, transformers.Conv1D)}
        for model in (ours, stock)
    ]
    assert convolutions[0] == convolutions[1]
    assert bool(convolutions[0]) == (row.config_class is hf_custom.CustomGPT2Config)
