"""What a causal language model expects next: the probability of every entry of its vocabulary."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

# Of the probabilities, how many are printed; the file has all.
SHOWN = 10


@torch.no_grad()
def next_token_probabilities(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Probabilities (V,) of what follows `prompt`, of which the model reads as much of the end as it has positions.

    Before an empty prompt stands the token that closes the document before.
    """
    model.eval()
    ids = tokenizer(prompt, verbose=False)["input_ids"] or [tokenizer.eos_token_id]
    ids = ids[-model.config.max_position_embeddings :]
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
    return logits.double().softmax(-1).cpu()


def write_next_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], file: str | Path
) -> None:
    """A table of every token's probability after each prompt, likeliest first, and the first few printed.

    Columns apart by tabs: prompt, rank, id, token, probability; texts in the notation of JSON.
    """
    lines = ["prompt\trank\tid\ttoken\tprobability"]
    for prompt in prompts:
        probabilities = next_token_probabilities(model, tokenizer, prompt)
        order = probabilities.argsort(descending=True, stable=True).tolist()
        rows = []
        for rank, index in enumerate(order, start=1):
            # A row of the model without a token of the tokenizer decodes to nothing.
            token = json.dumps(tokenizer.decode([index]), ensure_ascii=False)
            rows.append((str(rank), str(index), token, f"{float(probabilities[index]):.6g}"))
        lines += ["\t".join((json.dumps(prompt, ensure_ascii=False), *row)) for row in rows]
        print(f"after {prompt!r}: " + ", ".join(f"{token} {value}" for _, _, token, value in rows[:SHOWN]))
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")
