"""GPT-2 configuration: the stock fields with the stock defaults, then our own."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_base import SIZE_LIMITS, CustomConfig


@strict
class CustomGPT2Config(CustomConfig):
    """Configuration of the GPT-2 family (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    Defaults give GPT-2 124M. The JSON of any stock `gpt2` checkpoint loads here.

    Args:
        n_inner: width of the feed-forward layer; `None` means four times `n_embd`.
        activation_function: any activation of the host; `gelu_new` runs as one kernel.
        scale_attn_weights: divide the attention scores by the square root of the head size.
        scale_attn_by_inverse_layer_idx: divide them by the layer's number as well (1 for the first).
        reorder_and_upcast_attn: compute scores and softmax in float32 whatever the weights' type (Mistral project).
        add_cross_attention: give each block an attention over `encoder_hidden_states`.
        summary_type: what the multiple-choice head reads: `last`, `first`, `mean` or `cls_index`.
        position_embedding_type: `learned` (GPT-2), `sinusoidal` (Vaswani et al. 2017, section 3.5) or `rope`
            (Su et al. 2021, "RoFormer"). The last two have no parameters and no length limit.
        rope_theta: base of the rotary angles.
        classifier_dropout: dropout before the token classifier.
        loss_chunk_size: tokens whose logits are in memory together while the training loss is computed; `None` chooses
            by device. The loss is the same for all.
        projection_layout: how the blocks' projections hold their weights in memory: `conv1d` as stock's, (in, out), or
            `linear`, (out, in) in an `nn.Linear`, which tensor parallelism needs. Files are the same for both.
    """

    model_type = "custom_gpt2"
    # Read by the host's encoder-decoder models, which set it to True.
    is_decoder = False
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    stock_model_types: ClassVar = ("gpt2", "gpt-sw3")
    choices: ClassVar = {
        "position_embedding_type": ("learned", "sinusoidal", "rope"),
        "projection_layout": ("conv1d", "linear"),
        "summary_type": ("cls_index", "last", "first", "mean", "attn"),
    }
    probabilities: ClassVar = (
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "summary_first_dropout",
        "summary_last_dropout",
        "classifier_dropout",
    )
    positive: ClassVar = ("layer_norm_epsilon", "initializer_range", "rope_theta")
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_gpt2.CustomGPT2Config",
        "AutoModel": "modeling_gpt2.CustomGPT2Model",
        "AutoModelForPreTraining": "modeling_gpt2.CustomGPT2ForCausalLM",
        "AutoModelForCausalLM": "modeling_gpt2.CustomGPT2ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_gpt2.CustomGPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_gpt2.CustomGPT2ForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_gpt2.CustomGPT2ForQuestionAnswering",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float | int = 0.1
    summary_last_dropout: float | int = 0.0
    scale_attn_weights: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    position_embedding_type: str = "learned"
    rope_theta: float | int = 10000.0
    classifier_dropout: float | int = 0.1
    loss_chunk_size: int | None = None
    projection_layout: str = "conv1d"

    base_model_pp_plan = {
        "wte": (["input_ids"], ["inputs_embeds"]),
        "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """How tensor parallelism divides the blocks, where their layout allows it."""
        if self.projection_layout != "linear":
            return None
        plan = {"attn.c_attn": "fused_qkv_colwise", "attn.c_proj": "rowwise"}
        if self.add_cross_attention:
            plan |= {"crossattention.q_attn": "colwise", "crossattention.c_attn": "fused_kv_colwise"}
            plan |= {"crossattention.c_proj": "rowwise"}
        plan |= {"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"}
        return {f"h.*.{name}": style for name, style in plan.items()}

    def validate_architecture(self):
        super().validate_architecture()
        self._check_size("n_inner", self.n_inner, SIZE_LIMITS["intermediate_size"])
        self._check_size("loss_chunk_size", self.loss_chunk_size, SIZE_LIMITS["loss_chunk_size"])
        if self.position_embedding_type == "rope" and (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"rotary positions turn pairs of coordinates, so the head size n_embd / n_head must be even, but it is "
                f"{self.n_embd // self.n_head}. Change `n_head` or `n_embd`."
            )
        if self.position_embedding_type == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions pair sines with cosines, so `n_embd` ({self.n_embd}) must be even.")


__all__ = ["CustomGPT2Config"]
