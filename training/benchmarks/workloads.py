"""What contenders do in a round, and what must agree between them."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from training.benchmarks.measure import memory_now
from training.benchmarks.texts import batches

# The fields by which configurations name what `Setting.dropout` sets.
DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")


class Workload:
    """A model and the batches that it works on; `spec` is described in `contenders.py`."""

    auto_class = AutoModelForCausalLM
    # Of a masked language model.
    mask_token_id = None

    def __init__(self, spec: dict):
        self.spec, self.device = spec, spec["device"]
        self.setting = spec["setting"]
        if self.setting["library"] == "ours":
            import hf_custom

            hf_custom.register(replace_stock=True)
        self.start_memory = memory_now(self.device)
        self.build()

    def build(self) -> None:
        config = AutoConfig.from_pretrained(self.spec["checkpoint"])
        if self.setting["dropout"] is not None:
            for name in DROPOUTS:
                if hasattr(config, name):
                    setattr(config, name, self.setting["dropout"])
        self.model = self.auto_class.from_pretrained(self.spec["checkpoint"], config=config).to(self.device)
        if self.setting["compile"]:
            self.model.compile(dynamic=True)
        documents = json.loads(Path(self.spec["documents"]).read_text())
        self.batches = [
            {name: tensor.to(self.device) for name, tensor in batch.items()}
            for batch in batches(
                documents, self.spec["batch_size"], self.setting["group_by_length"], self.mask_token_id
            )
        ]

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16) if self.setting["bf16"] else nullcontext()

    def round(self) -> None:
        raise NotImplementedError

    def proof(self) -> dict[str, torch.Tensor]:
        """What must agree between contenders."""
        raise NotImplementedError


class Train(Workload):
    """Training steps: forward, backward, AdamW."""

    def build(self):
        super().build()
        self.model.train()
        self.model.config.use_cache = False
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def round(self):
        for batch in self.batches:
            with self.autocast():
                loss = self.model(**batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def targets(self, batch):
        """Which labels the loss counts."""
        return batch["labels"][:, 1:] != -100

    def proof(self):
        """Mean loss over all tokens and the norm of its gradient, which no grouping of documents changes."""
        dropouts = [(module, module.p) for module in self.model.modules() if isinstance(module, nn.Dropout)]
        for module, _ in dropouts:
            module.p = 0.0
        counts = [int(self.targets(batch).sum()) for batch in self.batches]
        total = 0.0
        for batch, count in zip(self.batches, counts, strict=True):
            with self.autocast():
                loss = self.model(**batch).loss * (count / sum(counts))
            loss.backward()
            total += loss.detach()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.requires_grad]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        self.optimizer.zero_grad()
        for module, p in dropouts:
            module.p = p
        return {"loss": total.float(), "gradient norm": norm}


class TrainMasked(Train):
    """The same of a masked language model."""

    auto_class = AutoModelForMaskedLM
    # Of the tokenizers that are trained here.
    mask_token_id = 4

    def targets(self, batch):
        return batch["labels"] != -100


class Encode(Workload):
    """Hidden states of padded batches, without gradients."""

    auto_class = AutoModel

    def build(self):
        super().build()
        self.model.eval()
        for batch in self.batches:
            batch.pop("labels")

    @torch.no_grad()
    def states(self, batch):
        with self.autocast():
            return self.model(**batch, use_cache=False).last_hidden_state

    def round(self):
        for batch in self.batches:
            self.states(batch)

    def proof(self):
        states = [self.states(batch)[batch["attention_mask"].bool()] for batch in self.batches]
        return {"hidden states": torch.cat(states).float()}


class Decode(Workload):
    """Greedy generation after a prompt."""

    def build(self):
        super().build()
        self.model.eval()
        for batch in self.batches:
            batch.pop("labels")

    def round(self):
        length = self.spec["new_tokens"]
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        return [self.model.generate(**batch, **options, **self.setting["generate"]) for batch in self.batches]

    def proof(self):
        return {f"tokens {i}": tokens for i, tokens in enumerate(self.round())}


class Loss(Workload):
    """Projection to the vocabulary and cross-entropy, forward and backward, of random states.

    Its memory is what is needed beyond the inputs and the two gradients, which every contender holds in the end.
    """

    def build(self):
        import hf_custom.losses  # noqa: F401 - so that no contender's import counts as its memory

        torch.manual_seed(0)
        rows, width, vocab_size = self.spec["rows"], self.spec["width"], self.spec["vocab_size"]
        dtype = torch.bfloat16 if self.setting["bf16"] else torch.float32
        options = {"device": self.device, "dtype": dtype}
        self.head = nn.Linear(width, vocab_size, bias=False, **options)
        self.states = torch.randn(rows, width, **options).requires_grad_()
        self.labels = torch.randint(0, vocab_size, (rows,), device=self.device)
        self.start_memory = memory_now(self.device) + self.head.weight.nbytes + self.states.nbytes

    def loss(self):
        if self.setting["library"] == "ours":
            from hf_custom.losses import linear_cross_entropy

            return linear_cross_entropy(self.states, self.head, self.labels)
        if self.setting["library"] == "torch":
            options = torch.nn.LinearCrossEntropyOptions()
            return nn.functional.linear_cross_entropy(self.states, self.head.weight, self.labels, options=options)
        return nn.functional.cross_entropy(self.head(self.states).float(), self.labels)

    def round(self):
        self.head.weight.grad = self.states.grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def proof(self):
        loss = self.round()
        return {
            "loss": loss.float(),
            "states' gradient": self.states.grad.float(),
            "weight's gradient": self.head.weight.grad.float(),
        }
