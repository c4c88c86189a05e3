"""Translation as a contender: ours and the host's Marian model with the same weights, on pairs of real length."""

import json
from pathlib import Path

import torch
from transformers import MarianMTModel

from training.benchmarks.texts import collate
from training.benchmarks.workloads import Train
from training.run_translation import stock_config

# Parts of our layers by Marian's names.
MARIAN_NAMES = {".mlp.": ".", ".cross_attn.": ".encoder_attn.", ".cross_attn_layer_norm.": ".encoder_attn_layer_norm."}


def marian_of(model: torch.nn.Module) -> MarianMTModel:
    """The Marian model that computes what a `CustomTransformerForSeq2SeqLM` does, whose positions it is given: its own
    sinusoids have the sines before the cosines."""
    stock = MarianMTModel._from_config(stock_config(model.config), attn_implementation="sdpa")
    weights = {}
    for name, weight in model.state_dict().items():
        for ours, theirs in MARIAN_NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = weight
    for stack in ("encoder", "decoder"):
        weights[f"model.{stack}.embed_positions.weight"] = getattr(model.model, stack).embed_positions.table
    if model.config.share_encoder_decoder_embeddings:
        weights["model.shared.weight"] = weights["model.encoder.embed_tokens.weight"]
    weights["final_logits_bias"] = torch.zeros(1, model.config.decoder_vocab_size)
    stock.load_state_dict(weights, strict=True)
    return stock


class Translate(Train):
    """Training steps on pairs: a text, and another one for its translation."""

    def build(self):
        from hf_custom import CustomTransformerForSeq2SeqLM
        from hf_custom.presets import preset_config

        torch.manual_seed(0)
        dropout = self.setting["dropout"]
        fields = {} if dropout is None else {"dropout": dropout}
        model = CustomTransformerForSeq2SeqLM(preset_config(self.spec["preset"], label_smoothing=0.0, **fields))
        model = marian_of(model) if self.setting["library"] == "stock" else model
        self.model = model.to(self.device).train()
        if self.setting["compile"]:
            self.model.compile(dynamic=True)
        documents = json.loads(Path(self.spec["documents"]).read_text())
        pairs = list(zip(documents, documents[::-1], strict=True))
        if self.setting["group_by_length"]:
            pairs.sort(key=lambda pair: max(map(len, pair)), reverse=True)
        self.batches = []
        for start in range(0, len(pairs), self.spec["batch_size"]):
            sources, targets = zip(*pairs[start : start + self.spec["batch_size"]], strict=True)
            batch = {**collate(sources), "labels": collate(targets)["labels"]}
            self.batches.append({name: tensor.to(self.device) for name, tensor in batch.items()})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def targets(self, batch):
        return batch["labels"] != -100
