"""A page that shows a model at work: what it computes from a text or an image, in one HTML file that needs no network.

`PANELS` says what is shown of a stack of layers and how to read it; `hub_cards/_look.html` draws it. All numbers are
the model's own, computed with eager attention in float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined
from transformers import PreTrainedModel

from .folders import find_templates
from .loading import fetch, load_model
from .stacks import FAMILIES, MAX_TOKENS, Request, Stack, open_image

TEMPLATE = "_look.html"
# What keeps a page small: weights of attention in a panel, above which layers and heads are left out; rows and columns
# of a heat map; likeliest tokens that are named.
MAX_WEIGHTS = 1_200_000
MAX_ROWS, MAX_COLUMNS = 72, 96
NAMED, NAMED_BY_LENS = 16, 5
ASKS = {"after": "Behind which token", "at": "In place of which token", "before": "Before which token"}


def _fixed_point(tensor: torch.Tensor, unit: float | None = None) -> dict:
    """Numbers as integers times a unit, four digits for the largest of them, which JSON keeps short.

    Raises:
        ValueError: for numbers that are not finite.
    """
    tensor = tensor.detach().double()
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            "the model computes numbers that are not finite. Its weights are spoiled: train or fetch it again."
        )
    if unit is None:
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        unit = 10.0 ** (math.ceil(math.log10(largest)) - 4) if largest else 1.0
    return {"unit": unit, "values": (tensor / unit).round().long().tolist()}


def _thinned(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / max(most - 1, 1)) for index in range(most)]


def _maps(named: dict[str, tuple[list[str], torch.Tensor]]) -> dict:
    """Heat maps of vectors (N, D), each with the labels of its rows."""
    maps = []
    for name, (labels, vectors) in named.items():
        step = math.ceil(vectors.shape[-1] / MAX_COLUMNS)
        rows = _thinned(len(vectors), MAX_ROWS)
        shown = {"name": name, "rows": [labels[row] for row in rows], "left": len(vectors) - len(rows), "step": step}
        maps.append({**shown, **_fixed_point(vectors[rows][:, ::step])})
    return {"maps": maps}


def _tables_panel(stack: Stack) -> dict | None:
    tables = {name: (labels or stack.tokens, vectors) for name, (labels, vectors) in stack.tables.items()}
    return _maps(tables) if tables else None


def _states_panel(stack: Stack) -> dict | None:
    names = ["embeddings", *(f"layer {number}" for number in range(1, len(stack.hidden_states)))]
    return (
        _maps({name: (stack.tokens, s) for name, s in zip(names, stack.hidden_states, strict=True)})
        if stack.hidden_states
        else None
    )


def _attention(weights, rows, columns, layers, picture, is_self: bool) -> dict | None:
    if not weights:
        return None
    weights = torch.stack(weights)  # (L, H, T, S)
    most = max(1, MAX_WEIGHTS // weights[0, 0].numel())
    # Of layers and heads the same share.
    share = min(1.0, math.sqrt(most / (weights.shape[0] * weights.shape[1])))
    heads = _thinned(weights.shape[1], max(1, int(weights.shape[1] * share)))
    kept = _thinned(len(weights), max(1, most // len(heads)))
    return {
        "rows": rows,
        "columns": columns,
        "layers": [layers[index] for index in kept],
        "heads": [head + 1 for head in heads],
        "left": len(weights) * weights.shape[1] - len(kept) * len(heads),
        "picture": picture and vars(picture),
        "is_self": is_self,
        **_fixed_point(weights[kept][:, heads], 1e-4),
    }


def _self_attention_panel(stack: Stack) -> dict | None:
    layers = list(range(1, len(stack.attentions) + 1))
    return _attention(stack.attentions, stack.tokens, stack.tokens, layers, stack.picture, True)


def _cross_attention_panel(stack: Stack) -> dict | None:
    layers = stack.cross_layers or list(range(1, len(stack.cross_attentions) + 1))
    rows = stack.tokens[: stack.cross_attentions[0].shape[-2]] if stack.cross_attentions else []
    return _attention(stack.cross_attentions, rows, stack.sources, layers, stack.cross_picture, False)


def _mask_panel(stack: Stack) -> dict | None:
    """Who may see whom: masked weights are exactly zero in every head of every layer."""
    if not stack.attentions or stack.picture is not None and not stack.ids:
        return None
    seen = torch.stack([weights.amax(0) for weights in stack.attentions]).amax(0) > 0
    return {"rows": stack.tokens, "columns": stack.tokens, "values": seen.long().tolist()}


def _tokens_panel(stack: Stack) -> dict | None:
    return {"tokens": stack.tokens[: len(stack.ids)], "ids": stack.ids} if stack.ids else None


def _lens_panel(stack: Stack) -> dict | None:
    """The likeliest tokens by each layer's state at each place, and their probabilities."""
    if stack.lens is None:
        return None
    count = min(NAMED_BY_LENS, stack.logits.shape[-1])
    layers = [stack.lens(states[: len(stack.logits)]).float() for states in stack.hidden_states[:-1]] + [stack.logits]
    best = [logits.softmax(-1).topk(count) for logits in layers]
    places = sorted(stack.places) if stack.places and stack.cross_attentions else list(range(len(stack.logits)))
    names = ["embeddings", *(f"layer {number}" for number in range(1, len(layers)))]
    # From the last layer down to the embeddings, as states rise.
    best.reverse()
    return {
        "columns": [stack.tokens[place] for place in places],
        "rows": names[::-1],
        "names": [[[stack.name(i) for i in found.indices[place].tolist()] for place in places] for found in best],
        **_fixed_point(torch.stack([found.values[places] for found in best]), 1e-4),
    }


def _next_panel(stack: Stack) -> dict | None:
    """All logits of some places, the largest first, for the page's own temperature, top-k and top-p."""
    if stack.logits is None or not stack.places:
        return None
    shown = []
    for place in sorted(stack.places):
        logits, order = stack.logits[place].sort(descending=True, stable=True)
        names = [stack.name(index) for index in order[:NAMED].tolist()]
        shown.append({"place": place, "names": names, "logits": [float(f"{logit:.6g}") for logit in logits.tolist()]})
    # A text goes on behind its last token; a mask is looked for from the front.
    first = len(shown) - 1 if stack.predicts == "after" else 0
    return {"tokens": stack.tokens, "places": shown, "first": first, "asks": ASKS[stack.predicts]}


def _bars_panel(stack: Stack) -> dict | None:
    charts = [{"name": name, "labels": labels, "values": values} for name, (labels, values) in stack.bars.items()]
    return {"charts": charts, "isChosen": False} if charts else None


def _grid_panel(stack: Stack) -> dict | None:
    for name, (labels, values) in stack.grids.items():
        rows = stack.tokens[: len(values)]
        return {"name": name, "rows": rows, "columns": labels, **_fixed_point(values, 1e-4)}
    return None


def _words_panel(stack: Stack) -> dict | None:
    charts = [
        {"name": word, "labels": [other for other, _ in near], "values": [value for _, value in near]}
        for word, near in stack.words.items()
    ]
    return {"charts": charts, "isChosen": True, "most": 1} if charts else None


@dataclass(frozen=True)
class Panel:
    """What can be shown of a stack: the page's function that draws it, a heading, how to read it, and its data.

    `read` gives `None` where the stack does not offer it.
    """

    kind: str
    title: str
    text: str
    read: Callable[[Stack], dict | None]


PANELS = (
    Panel(
        "picture",
        "Patches",
        "The image as the model sees it, resized and cut into patches. Each patch becomes one vector by a linear map, "
        "as a word becomes one by its table (Dosovitskiy et al. 2021, “ViT”, section 3.1).",
        lambda stack: stack.picture and vars(stack.picture),
    ),
    Panel(
        "tokens",
        "Tokens",
        "The text as the tokenizer cuts it, each piece with its number in the vocabulary; ␣ is a space, ↵ ends a line. "
        "Frequent words stay whole, rare ones fall into pieces (Sennrich et al. 2016, byte-pair encoding; Wu et al. "
        "2016, WordPiece).",
        _tokens_panel,
    ),
    Panel(
        "maps",
        "Embeddings",
        "A row is the vector that stands for one token or one place, looked up in a table of weights; their sum enters "
        "the first layer. Equal tokens have equal rows wherever they stand; positions tell them apart (Vaswani et al. "
        "2017, sections 3.4 and 3.5).",
        _tables_panel,
    ),
    Panel(
        "mask",
        "Mask",
        "Which tokens (columns) each token (row) may look at: filled is allowed. A causal mask leaves out what comes "
        "later, so that the next word cannot be read off; a padding mask leaves out the filling at the end (Vaswani et "
        "al. 2017, section 3.2.3).",
        _mask_panel,
    ),
    Panel(
        "attention",
        "Self-attention",
        "How much each token (row) takes from each other (column), by layer and head: softmax(QKᵀ/√d), a row sums to 1 "
        "(Vaswani et al. 2017, equation 1). Choose a head among the small maps, then point at a token to see where it "
        "looks; a map’s largest weight has the full colour. Weights say where a head looks, not why (Jain and Wallace "
        "2019).",
        _self_attention_panel,
    ),
    Panel(
        "attention",
        "Cross-attention",
        "The same between two sequences: how much each row takes from the states of what it reads, an image’s patches "
        "or a source text (Vaswani et al. 2017, section 3.2.3; Li et al. 2023, “BLIP-2”, section 3.1, for queries).",
        _cross_attention_panel,
    ),
    Panel(
        "maps",
        "Hidden states",
        "The vector of each token as it leaves each layer: what it was (embeddings), with what attention and the "
        "feed-forward layers have made of it. Choose a layer and see which rows change.",
        _states_panel,
    ),
    Panel(
        "lens",
        "Logit lens",
        "What each layer would predict, were it the last: the head reads its states early (nostalgebraist 2020, “the "
        "logit lens”). The likeliest token stands in the cell, the colour is its probability; point at a cell for the "
        "next best. The top row is the model’s own prediction.",
        _lens_panel,
    ),
    Panel(
        "next",
        "Predicted tokens",
        "The distribution that a token is drawn from. Temperature flattens or sharpens it, top-k keeps the k likeliest "
        "(Fan et al. 2018), top-p the fewest that together have probability p (Holtzman et al. 2020, nucleus "
        "sampling). The page computes them from all logits, as “generate” does; the pale bar is the untouched one.",
        _next_panel,
    ),
    Panel(
        "bars",
        "The head’s answer",
        "What the head makes of the states: a softmax over its classes, the similarity of two vectors, or the share of "
        "each layer in a mix of all (Peters et al. 2018, “ELMo”, equation 1).",
        _bars_panel,
    ),
    Panel(
        "grid",
        "The head’s answer, token by token",
        "What the head makes of each token’s last state: a probability for each class, or of being the answer’s end.",
        _grid_panel,
    ),
    Panel(
        "bars",
        "Neighbours",
        "The words whose vectors point most nearly the same way, by cosine similarity. Words that occur in the same "
        "company come to lie together (Mikolov et al. 2013, “Efficient Estimation of Word Representations”).",
        _words_panel,
    ),
    Panel(
        "plane",
        "Neighbourhood",
        "The same words in the plane in which they differ most (principal component analysis): what lies far apart is "
        "far apart, what lies together need not be near.",
        lambda stack: stack.plane,
    ),
)


def page_data(model: PreTrainedModel, request: Request) -> list[dict]:
    """What a page shows: of each stack its title, its notes and its panels with their data.

    Raises:
        ValueError: for input that the model does not read, or a family that no row of `FAMILIES` describes.
    """
    read = FAMILIES.get(model.config.model_type)
    if read is None:
        raise ValueError(
            f"`model_type` {model.config.model_type!r} has no page. The families are {', '.join(FAMILIES)}."
        )
    with torch.no_grad():
        stacks = read(model.eval(), request)
        return [
            {
                "title": stack.title,
                "panels": [
                    {"kind": panel.kind, "title": panel.title, "text": panel.text, "data": data}
                    for panel in PANELS
                    if (data := panel.read(stack)) is not None
                ],
                "notes": stack.notes,
            }
            for stack in stacks
        ]


def render_page(title: str, facts: list[str], stacks: list[dict], request: Request) -> str:
    """The page, with its data as JSON; whatever stands in names and tokens is text and never markup."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = environment.from_string((find_templates() / TEMPLATE).read_text(encoding="utf-8"))
    data = [panel["data"] for stack in stacks for panel in stack["panels"]]
    return template.render(title=title, facts=facts, texts=request.texts, stacks=stacks, data=data)


def look(
    name_or_folder: str | Path,
    out: str | Path,
    texts: list[str] | None = None,
    image: str | Path | None = None,
    *,
    revision: str | None = None,
    length: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the page of a model of the Hub or of a folder.

    Args:
        out: file to write, ending in .html; folders above it are made.
        texts: one text; a second is its pair (a question and its context, a sentence and the next, a source and its
            translation); for multiple choice a question and its answers.
        image: file of a picture, for a model that reads images.
        length: tokens to pad the text to, to see the mask of padding.
        overwrite: replace the file if it is there.

    Raises:
        OSError, ValueError: naming the option or the folder, and the remedy, before anything is written.
    """
    out = Path(out)
    if out.suffix != ".html":
        raise ValueError(f"`--out` is {out}, but a page's name ends in .html.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists. Name another file, or pass --overwrite to replace it.")
    if length is not None and not 1 <= length <= MAX_TOKENS:
        raise ValueError(f"`--length` is {length} but must be from 1 to {MAX_TOKENS}.")
    request = Request(list(texts or []), None if image is None else open_image(image), length)
    folder = fetch(name_or_folder, revision)
    model = load_model(folder, attn_implementation="eager", dtype=torch.float32)
    request.read_with(folder)
    name = Path(name_or_folder).name if Path(name_or_folder).is_dir() else str(name_or_folder)
    stacks = page_data(model, request)
    facts = [type(model).__name__, f"{model.num_parameters():,} parameters"]
    page = render_page(name or type(model).__name__, facts, stacks, request)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


__all__ = ["PANELS", "look", "page_data", "render_page"]
