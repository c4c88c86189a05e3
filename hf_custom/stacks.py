"""A model at work, as a list of its stacks of layers: a decoder; a vision tower, a Q-Former and a language model; ...

Each has what its outputs offer: attention weights, hidden states, a head. `FAMILIES` says how a family is read.
"""

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers.decoders import ByteLevel
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .ops import rotary_positions, sinusoidal_positions

# What keeps a page small enough to open: tokens of a text, and logits in all.
MAX_TOKENS = 64
MAX_LOGITS = 200_000
NEIGHBOURS, MOST_POINTS = 12, 36
# Of the target's tokenizer, where it is not the source's.
TARGET_FOLDER = "target_tokenizer"
MAX_PIXELS = 100_000_000

# The symbols in which byte-level tokenizers write bytes (Radford et al. 2019, section 2.2), and characters that show
# nothing by themselves.
BYTES = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "▁": "␣"}

# What a model is asked to keep.
RECORD = {"output_attentions": True, "output_hidden_states": True, "return_dict": True}
# Where the last norm and the head stand, by which a state is read as a prediction. A post-norm model has no last norm.
LENSES: dict[str, tuple[str | None, str]] = {
    "custom_gpt2": ("transformer.ln_f", "lm_head"),
    "custom_bert": (None, "cls.predictions"),
    "custom_elmo": (None, "lm_head"),
    "gpt2": ("transformer.ln_f", "lm_head"),
    "opt": ("model.decoder.final_layer_norm", "lm_head"),
    "t5": ("decoder.final_layer_norm", "lm_head"),
    "custom_transformer": ("model.decoder.layer_norm", "lm_head"),
}
# Tables of vectors by the names that modules give them, and what looks a row up.
TABLES = (
    ("token embeddings", ("wte", "word_embeddings", "embed_tokens", "shared"), "ids"),
    ("segment embeddings", ("token_type_embeddings",), "segments"),
    ("position embeddings", ("wpe", "position_embeddings", "embed_positions"), "positions"),
)
# Classes without labels in the configuration, by the end of the model's name.
CLASS_NAMES = {
    "ForNextSentencePrediction": ("follows", "is another"),
    "ForPreTraining": ("follows", "is another"),
    "ForImageTextRetrieval": ("no match", "match"),
}


@dataclass
class Picture:
    """An image as the model sees it, cut into a grid of patches that are states from `start` on."""

    source: str
    rows: int
    columns: int
    start: int

    @property
    def labels(self) -> list[str]:
        """What stands at each state: whatever comes before the patches is a class token."""
        return ["[class]", *(f"patch {r + 1}, {c + 1}" for r in range(self.rows) for c in range(self.columns))]


@dataclass
class Stack:
    """A stack of layers at work on one sequence of T tokens; what it does not offer is empty.

    Attributes:
        tokens: (T,), readable.
        ids: (T,), where the tokens have numbers.
        sources: (S,), what cross-attention reads.
        tables: rows of embedding tables by name: their labels and the vectors (N, D).
        attentions, cross_attentions: of each layer that has them, (H, T, T) and (H, T, S).
        cross_layers: their numbers from 1, where not all have them.
        hidden_states: embeddings and each layer's output, (T, D).
        picture: the image whose patches are among the tokens, `cross_picture` among the sources.
        logits: (T', V), of the first T' tokens; `lens` makes them of any layer's states.
        places: tokens whose predictions are shown with all of their logits.
        predicts: the token `after` a state, `at` its place, or `before` it.
        name: of a vocabulary's entry.
        bars: values in (0, 1) or similarities by name, a chart each: labels and values.
        grids: probabilities (T', C) of tokens, by name, with labels of the columns.
        words: neighbours and their cosines by word; `plane` has all of these words as points.
        notes: what was left out, or must be known to read the page.
    """

    title: str
    tokens: list[str] = field(default_factory=list)
    ids: list[int] | None = None
    sources: list[str] = field(default_factory=list)
    tables: dict[str, tuple[list[str], torch.Tensor]] = field(default_factory=dict)
    attentions: tuple[torch.Tensor, ...] = ()
    cross_attentions: tuple[torch.Tensor, ...] = ()
    cross_layers: list[int] | None = None
    hidden_states: tuple[torch.Tensor, ...] = ()
    picture: Picture | None = None
    cross_picture: Picture | None = None
    logits: torch.Tensor | None = None
    lens: Callable[[torch.Tensor], torch.Tensor] | None = None
    places: list[int] = field(default_factory=list)
    name: Callable[[int], str] | None = None
    predicts: str = "after"
    bars: dict[str, tuple[list[str], list[float]]] = field(default_factory=dict)
    grids: dict[str, tuple[list[str], torch.Tensor]] = field(default_factory=dict)
    words: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    plane: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


# --- What comes in ---


def readable_token(token: str, is_byte_level: bool = False) -> str:
    """A token with its spaces and line ends visible, and bytes that are no character by themselves as `\\xe2`."""
    if is_byte_level and all(symbol in BYTES for symbol in token):
        token = bytes(BYTES[symbol] for symbol in token).decode("utf-8", errors="backslashreplace")
    shown = (VISIBLE.get(character, character) for character in token)
    return "".join(character if character.isprintable() else f"\\u{ord(character):04x}" for character in shown)


def _name(tokenizer, index: int) -> str:
    """An entry of a tokenizer's vocabulary; a model's own may be padded beyond it."""
    token = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
    is_byte_level = isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None), ByteLevel)
    return f"({index})" if token is None else readable_token(token, is_byte_level)


@dataclass
class Request:
    """The texts and the image that a page was asked for, and what reads them for the model.

    Attributes:
        length: tokens to pad the text to, so that the mask of padding can be seen; `None` for none.
    """

    texts: list[str]
    image: Image.Image | None
    length: int | None
    processor: Any = None
    tokenizer: Any = None
    image_processor: Any = None
    target_tokenizer: Any = None

    def read_with(self, folder: Path) -> None:
        """Find the processor, the tokenizer or the image processor that was saved beside the model."""
        if (folder / "processor_config.json").is_file():
            self.processor = AutoProcessor.from_pretrained(folder)
            self.tokenizer, self.image_processor = self.processor.tokenizer, self.processor.image_processor
            return
        if (folder / "tokenizer_config.json").is_file():
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if (folder / TARGET_FOLDER / "tokenizer_config.json").is_file():
            self.target_tokenizer = AutoTokenizer.from_pretrained(folder, subfolder=TARGET_FOLDER)
        if (folder / "preprocessor_config.json").is_file():
            self.image_processor = AutoImageProcessor.from_pretrained(folder)

    def check(
        self,
        name: str,
        fewest_texts: int,
        most_texts: float,
        reads_image: bool = False,
        needs_image: bool = False,
        has_padding: bool = True,
    ) -> None:
        """Refuse what the model of that name does not read, and ask for what it needs.

        Raises:
            ValueError: naming the option.
        """
        if self.texts and not most_texts:
            raise ValueError(f"{name} reads no text. Leave out `--text`.")
        if len(self.texts) < fewest_texts or (fewest_texts and not all(self.texts)):
            raise ValueError(f'{name} reads text, but `--text` is missing or empty. Add --text "some words".')
        if len(self.texts) > most_texts:
            raise ValueError(
                f"`--text` was given {len(self.texts)} times, but {name} reads {most_texts}. Leave out some."
            )
        if self.image is not None and not reads_image:
            raise ValueError(f"{name} has no vision part. Leave out `--image`.")
        if self.image is None and needs_image:
            raise ValueError(f"{name} reads an image, but `--image` is missing. Add --image FILE.")
        if self.length is not None and not has_padding:
            raise ValueError(f"`--length` asks for padding, which a page of {name} does not show. Leave it out.")
        for is_wanted, reader, what in (
            (most_texts, self.tokenizer, "tokenizer"),
            (self.image is not None, self.image_processor, "image processor"),
        ):
            if is_wanted and reader is None:
                raise ValueError(f"the folder of {name} has no {what}. Save it there by its `save_pretrained`.")

    def name(self, index: int) -> str:
        """An entry of the vocabulary, readable."""
        return _name(self.tokenizer, index)

    def target_name(self, index: int) -> str:
        """An entry of the vocabulary in which an encoder-decoder writes."""
        return _name(self.target_tokenizer or self.tokenizer, index)

    def encode(self, *texts, **options) -> dict[str, torch.Tensor]:
        """Ids, mask and what else the tokenizer gives, (1, T) or (B, T).

        Raises:
            ValueError: for a text without tokens, with more than a page shows, or a length that it exceeds.
        """
        padding = {}
        if self.length is not None:
            if self.tokenizer.pad_token is None:
                raise ValueError("the tokenizer has no padding token, but `--length` asks for padding. Leave it out.")
            padding = {"padding": "max_length", "max_length": self.length, "padding_side": "right"}
        inputs = dict(self.tokenizer(*(texts or self.texts[:2]), return_tensors="pt", **{**padding, **options}))
        self.check_length(inputs["attention_mask"].shape[-1])
        return inputs

    def check_length(self, length: int, is_target: bool = False) -> None:
        if length == 0:
            raise ValueError("`--text` has no token that the tokenizer knows. Write some words.")
        if length > MAX_TOKENS:
            raise ValueError(f"`--text` has {length} tokens, but a page shows at most {MAX_TOKENS}. Shorten the text.")
        if self.length is not None and length > self.length and not is_target:
            raise ValueError(f"`--text` has {length} tokens, more than `--length` {self.length}. Raise `--length`.")

    def pixels(self) -> torch.Tensor:
        """(1, 3, height, width)."""
        return self.image_processor(self.image, return_tensors="pt")["pixel_values"]

    def picture(self, pixels: torch.Tensor, grid: tuple[int, int], start: int) -> Picture:
        """The image as the model sees it, normalisation undone."""
        mean, std = (
            torch.tensor(getattr(self.image_processor, name, None) or default).view(-1, 1, 1)
            for name, default in (("image_mean", [0.0]), ("image_std", [1.0]))
        )
        colours = (pixels[0].float() * std + mean).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
        stream = io.BytesIO()
        Image.fromarray(colours.numpy()).save(stream, "png")
        return Picture(f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}", *grid, start)


def open_image(file: str | Path) -> Image.Image:
    """An image of any format that Pillow reads, as RGB.

    Raises:
        OSError, ValueError: when there is none, or too large a one.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"`--image` names {file}, which is no file. Name a picture.")
    try:
        with Image.open(file) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"`--image` has {math.prod(image.size):,} pixels. Make it smaller.")
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image ({error}). Save it as PNG or JPEG.") from None


# --- What a family computes ---


def _first(tensors) -> tuple[torch.Tensor, ...]:
    """The first row of a batch, of each tensor that is there."""
    return tuple(tensor[0].float() for tensor in tensors or () if tensor is not None)


def _find(module, path):
    """An attribute by its path with dots, or `None`."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _tables(module, config, ids, segments=None) -> dict[str, tuple[list[str], torch.Tensor]]:
    """Rows of the tables that a module looks its tokens (T,) up in, or of the fixed vectors that stand for one."""
    positions = torch.arange(len(ids))
    lookups = {"ids": ids, "segments": segments, "positions": positions}
    numbers = [str(position) for position in positions.tolist()]
    found = {}
    for title, names, lookup in TABLES:
        table = next((part for name in names if (part := getattr(module, name, None)) is not None), None)
        if table is not None and lookups[lookup] is not None:
            labels = [] if lookup != "positions" else numbers
            # Fixed vectors are a buffer; OPT's table begins with rows that no position has.
            rows = table.weight if isinstance(table, torch.nn.Embedding) else table.table
            found[title] = (labels, rows[lookups[lookup] + (getattr(table, "offset", 0) if labels else 0)])
    kind = getattr(config, "position_embedding_type", None)
    if kind == "sinusoidal":
        found["position vectors, sines and cosines"] = (numbers, sinusoidal_positions(positions, config.hidden_size))
    elif kind == "rope":
        cosines, _ = rotary_positions(
            positions[None], config.hidden_size // config.num_attention_heads, config.rope_theta
        )
        found["cosines of the rotary angles"] = (numbers, cosines[0, 0])
    return found


def _lens(model: PreTrainedModel, states: torch.Tensor, logits: torch.Tensor):
    """The head behind the last norm, as a function of a layer's states, where the model's own logits confirm it.

    The last of the hidden states is normed already in a pre-norm model, as the host gives them.
    """
    norm_path, head_path = LENSES.get(model.config.model_type, (None, ""))
    head = _find(model, head_path)
    if head is None or not torch.allclose(head(states[: len(logits)]), logits, atol=1e-3, rtol=1e-4):
        return None
    norm = _find(model, norm_path) if norm_path else None
    return head if norm is None else lambda early: head(norm(early))


def _add_predictions(stack: Stack, model: PreTrainedModel, logits: torch.Tensor, real: torch.Tensor, request: Request):
    """Logits (T', V) of a vocabulary: those of each place that fits in a page, or of the masked tokens."""
    stack.logits, stack.name = logits.float(), request.name
    stack.lens = _lens(model, stack.hidden_states[-1], stack.logits) if stack.hidden_states else None
    places = real[: len(logits)].nonzero().flatten().tolist()
    if stack.predicts == "at":
        mask_id = getattr(request.tokenizer, "mask_token_id", None)
        places = [place for place in places if stack.ids[place] == mask_id] or places
        if stack.ids[places[0]] != mask_id:
            stack.notes.append(
                "No token is masked, so the model predicts the tokens that it sees. "
                f"Write {getattr(request.tokenizer, 'mask_token', None) or 'a mask'} for a word to be guessed."
            )
    limit = max(1, MAX_LOGITS // logits.shape[-1])
    if len(places) > limit:
        stack.notes.append(f"Predictions are shown for {limit} of {len(places)} tokens, to keep the page small.")
    stack.places = places[-limit:] if stack.predicts == "after" else places[:limit]


def _add_classes(stack: Stack, model: PreTrainedModel, logits: torch.Tensor, names: list[str] | None = None):
    """Probabilities of the classes (C,) that a head gives to the whole, or a number where it regresses."""
    config, kind = model.config, type(model).__name__
    end = next((end for end in CLASS_NAMES if kind.endswith(end)), None)
    # One output is a number, as the host reads it; but of choices there may be one.
    is_number = names is None and len(logits) == 1
    if names is None:
        names = list(CLASS_NAMES[end]) if end else [config.id2label[index] for index in range(len(logits))]
    if is_number:
        stack.bars["value"] = (names, logits.tolist())
    elif config.problem_type == "multi_label_classification":
        stack.bars["probability of each class, by itself"] = (names, logits.sigmoid().tolist())
    else:
        stack.bars["probability of each class"] = (names, logits.softmax(-1).tolist())


def _add_head(stack: Stack, model: PreTrainedModel, outputs, real: torch.Tensor, request: Request, choices=None):
    """What the head says, by the outputs that it has."""
    logits = outputs.get("logits", outputs.get("prediction_logits"))
    has_vocabulary = model.get_output_embeddings() is not None
    if logits is not None and has_vocabulary:
        # Of a model with choices, the first of them.
        _add_predictions(stack, model, logits.view(-1, *logits.shape[-2:])[0], real, request)
    elif logits is not None and logits.ndim == 3:
        labels = [model.config.id2label[index] for index in range(logits.shape[-1])]
        stack.grids["probability of each class"] = (labels, logits[0].float().softmax(-1))
    elif logits is not None:
        _add_classes(stack, model, logits[0].float(), choices)
    if outputs.get("seq_relationship_logits") is not None:
        _add_classes(stack, model, outputs.seq_relationship_logits[0].float())
    if outputs.get("mc_logits") is not None:
        _add_classes(stack, model, outputs.mc_logits[0].float(), choices)
    if outputs.get("start_logits") is not None:
        ends = torch.stack((outputs.start_logits[0], outputs.end_logits[0]), dim=-1).float()
        stack.grids["probability that the answer starts or ends here"] = (["start", "end"], ends.softmax(0))


def _read_text_model(model: PreTrainedModel, request: Request) -> list[Stack]:
    """GPT-2 and BERT, with any head, BERT also with an image in the stream of its text."""
    config, kind = model.config, type(model).__name__
    has_vision = getattr(config, "vision_config", None) is not None
    needs_image = kind.endswith(("ForVisualQuestionAnswering", "ForImageTextRetrieval")) and has_vision
    has_choices = kind.endswith(("ForMultipleChoice", "DoubleHeadsModel"))
    request.check(kind, 1, math.inf if has_choices else 2, has_vision, needs_image)
    is_causal = config.is_decoder or config.model_type == "custom_gpt2"
    choices = None
    if has_choices:
        choices = request.texts[1:] if kind.endswith("ForMultipleChoice") and request.texts[1:] else request.texts
        pairs = ([request.texts[0]] * len(choices), choices) if choices is not request.texts else (choices,)
        padding = {"padding": True, "padding_side": "right"} if request.length is None and len(choices) > 1 else {}
        inputs = {name: batch.unsqueeze(0) for name, batch in request.encode(*pairs, **padding).items()}
    else:
        inputs = request.encode()
    rows = {name: batch.view(-1, batch.shape[-1])[0] for name, batch in inputs.items()}
    ids, real = rows["input_ids"], rows["attention_mask"].bool()
    stack = Stack(
        "The decoder" if is_causal else "The encoder",
        tokens=[request.name(index) for index in ids.tolist()],
        ids=ids.tolist(),
        predicts="after" if is_causal else "at",
    )
    if request.image is not None:
        inputs["pixel_values"] = request.pixels()
        stack.picture = request.picture(inputs["pixel_values"], config.vision_config.grid, 1 + len(ids))
        stack.tokens += stack.picture.labels
    outputs = model(**inputs, **RECORD)
    stack.attentions, stack.hidden_states = _first(outputs.attentions), _first(outputs.hidden_states)
    body = getattr(model, model.base_model_prefix, model)
    stack.tables = _tables(getattr(body, "embeddings", body), config, ids, rows.get("token_type_ids"))
    if choices is not None and len(choices) > 1:
        stack.notes.append("The stack reads the first choice; the others are read beside it.")
    _add_head(stack, model, outputs, real, request, choices)
    return [stack]


def _vision_stack(outputs, embeddings, picture: Picture) -> Stack:
    positions = embeddings.position_embedding[0]
    return Stack(
        "The vision tower",
        tokens=picture.labels,
        tables={"position embeddings": (picture.labels, positions)} if len(positions) == len(picture.labels) else {},
        attentions=_first(outputs.attentions),
        hidden_states=_first(outputs.hidden_states),
        picture=picture,
    )


def _read_vision(model: PreTrainedModel, request: Request) -> list[Stack]:
    """A vision tower, bare or with a classifier."""
    request.check(type(model).__name__, 0, 0, reads_image=True, needs_image=True, has_padding=False)
    pixels = request.pixels()
    outputs = model(pixel_values=pixels, **RECORD)
    body = getattr(model, model.base_model_prefix, model)
    stack = _vision_stack(outputs, body.embeddings, request.picture(pixels, model.config.grid, 1))
    if outputs.get("logits") is not None:
        _add_classes(stack, model, outputs.logits[0].float())
    return [stack]


def _qformer_stack(title, outputs, config, text: list[str], num_queries: int, picture: Picture | None) -> Stack:
    """A Q-Former that read an image, and a text behind its queries or none."""
    cross = _first(outputs.cross_attentions)
    return Stack(
        title,
        tokens=[*(f"query {number + 1}" for number in range(num_queries)), *text],
        sources=picture.labels if picture else [f"state {number + 1}" for number in range(cross[0].shape[-1])],
        attentions=_first(outputs.attentions),
        cross_attentions=cross,
        cross_layers=list(range(1, config.num_hidden_layers + 1, config.cross_attention_frequency)),
        hidden_states=_first(outputs.hidden_states),
        cross_picture=picture,
    )


def _read_qformer(model: PreTrainedModel, request: Request) -> list[Stack]:
    """A Q-Former by itself, whose queries and images are other models': both are drawn at random."""
    request.check(type(model).__name__, 0, 0, has_padding=False)
    config, generator = model.config, torch.Generator().manual_seed(0)
    queries = torch.randn(1, 8, config.hidden_size, generator=generator)
    states = torch.randn(1, 16, config.encoder_hidden_size, generator=generator)
    outputs = model(queries, encoder_hidden_states=states, **RECORD)
    stack = _qformer_stack("The Q-Former", outputs, config, [], 8, None)
    stack.notes.append(
        "A Q-Former by itself has neither queries nor images. Eight queries and sixteen states were drawn from a "
        "normal distribution, so the weights are not of an image. Look at the whole BLIP-2 for that."
    )
    return [stack]


def _read_blip2(model: PreTrainedModel, request: Request) -> list[Stack]:
    """BLIP-2: the vision tower, the Q-Former and, in the second stage, the language model."""
    is_first_stage = not hasattr(model, "language_model")
    request.check(
        type(model).__name__, int(is_first_stage), 1, reads_image=True, needs_image=True, has_padding=is_first_stage
    )
    config, pixels = model.config, request.pixels()
    picture = request.picture(pixels, config.vision_config.grid, 1)
    if is_first_stage:
        return _read_first_stage(model, request, pixels, picture)
    features = model.get_image_features(pixels, **RECORD)
    vision = _vision_stack(features.vision_outputs, model.vision_model.embeddings, picture)
    qformer = _qformer_stack(
        "The Q-Former", features.qformer_outputs, config.qformer_config, [], config.num_query_tokens, picture
    )
    qformer.tables = {"queries": ([], model.query_tokens[0])}
    if request.processor is None:
        raise ValueError(f"the folder of {type(model).__name__} has no processor, which places the image in the text.")
    text = request.texts[0] if request.texts else ""
    inputs = request.processor(images=request.image, text=text, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    request.check_length(inputs["input_ids"].shape[1])
    return [vision, qformer, *_language_stacks(model, request, inputs, features)]


def _language_stacks(model, request, inputs, features):
    """The language model of a BLIP-2 that reads the queries, or its encoder and decoder."""
    config, ids = model.config, inputs["input_ids"][0]
    num_queries = config.num_query_tokens
    tokens = [
        f"query {place + 1}" if place < num_queries else request.name(index) for place, index in enumerate(ids.tolist())
    ]
    if not config.use_decoder_only_language_model:
        start = torch.tensor([[config.text_config.decoder_start_token_id]])
        outputs = model(mm_encoder_outputs={"image": features}, **inputs, decoder_input_ids=start, **RECORD)
        written = (model.language_model, outputs.language_model_outputs, start[0])
        return _encoder_decoder_stacks(*written, tokens, request, "The language model’s ")
    outputs = model(mm_encoder_outputs={"image": features}, **inputs, use_cache=False, **RECORD)
    language = outputs.language_model_outputs
    stack = Stack(
        "The language model",
        tokens=tokens,
        ids=ids.tolist(),
        attentions=_first(language.attentions),
        hidden_states=_first(language.hidden_states),
    )
    body = model.language_model.get_decoder()
    stack.tables = _tables(body, config.text_config, ids)
    stack.tables["token embeddings"] = ([], _with_queries(stack.tables["token embeddings"][1], features, num_queries))
    _add_predictions(stack, model.language_model, outputs.logits[0], inputs["attention_mask"][0].bool(), request)
    return [stack]


def _with_queries(table, features, num_queries):
    """Embeddings (T, D) with what the projection made of the queries in the image's places."""
    return torch.cat((features.pooler_output[0].to(table), table[num_queries:]))


def _read_first_stage(model, request, pixels, picture) -> list[Stack]:
    """BLIP-2's first stage: contrast, matching and, where the model was trained for it, writing."""
    config = model.config
    vision_outputs = model.vision_model(pixels, **RECORD)
    states = vision_outputs.last_hidden_state
    inputs = request.encode(request.texts[0])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    text = [request.name(index) for index in ids[0].tolist()]
    options = (config.qformer_config, text, config.num_query_tokens, picture)
    record = {name: True for name in RECORD if name != "return_dict"}  # which the method sets
    logits, outputs = model._matching(ids, mask, encoder_hidden_states=states, **record)
    matching = _qformer_stack("The Q-Former, matching: image and text see each other", outputs, *options)
    matching.tables = {
        "queries": ([f"query {number + 1}" for number in range(config.num_query_tokens)], model.query_tokens[0]),
        **{name: (text, table[1]) for name, table in _tables(model.embeddings, config.qformer_config, ids[0]).items()},
    }
    matching.bars["probability that image and text belong together"] = (
        list(CLASS_NAMES["ForImageTextRetrieval"]),
        logits[0].float().softmax(-1).tolist(),
    )
    similarities = (model.get_image_features(pixels) @ model.get_text_features(ids, mask).transpose(0, 1))[0, :, 0]
    names = [f"query {number + 1}" for number in range(len(similarities))]
    matching.bars["similarity of each query with the text; the largest counts"] = (names, similarities.tolist())
    stacks = [_vision_stack(vision_outputs, model.vision_model.embeddings, picture), matching]
    if hasattr(model, "cls"):
        stacks.append(_writing_stack(model, request, ids, mask, states, options))
    return stacks


def _writing_stack(model, request, ids, mask, states, options) -> Stack:
    """The first stage's text generation: the text sees the queries and its own past (Li et al. 2023, figure 2)."""
    num_queries = model.config.num_query_tokens
    written = torch.cat((ids.new_tensor([[model.config.qformer_config.bos_token_id]]), ids[:, 1:]), dim=1)
    outputs = model.qformer(
        model.embeddings(written, query_embeds=model.query_tokens, attention_mask=mask),
        query_length=num_queries,
        attention_mask=torch.nn.functional.pad(mask, (num_queries, 0), value=1),
        encoder_hidden_states=states,
        attention_mode="multimodal_causal",
        **RECORD,
    )
    stack = _qformer_stack("The Q-Former, writing: the text sees the queries and its own past", outputs, *options)
    stack.tokens[num_queries:] = [request.name(index) for index in written[0].tolist()]
    # The queries predict nothing, so only the text's states are read by the head.
    head = model.cls.predictions
    stack.logits, stack.lens, stack.name = head(outputs.last_hidden_state[0]).float(), head, request.name
    stack.places = [num_queries + place for place in mask[0].nonzero().flatten().tolist()]
    return stack


def _encoder_decoder_stacks(model, outputs, written, source, request, whose="The ") -> list[Stack]:
    """The encoder that read a source and the decoder that reads what is written (T,)."""
    encoder = Stack(
        f"{whose}encoder",
        tokens=source,
        attentions=_first(outputs.encoder_attentions),
        hidden_states=_first(outputs.encoder_hidden_states),
    )
    decoder = Stack(
        f"{whose}decoder",
        tokens=[request.target_name(index) for index in written.tolist()],
        ids=written.tolist(),
        sources=source,
        attentions=_first(outputs.decoder_attentions),
        cross_attentions=_first(outputs.cross_attentions),
        hidden_states=_first(outputs.decoder_hidden_states),
    )
    decoder.tables = _tables(model.get_decoder(), model.config, written)
    if outputs.get("logits") is not None:
        _add_predictions(decoder, model, outputs.logits[0], torch.ones_like(written).bool(), request)
        decoder.name = request.target_name
    return [encoder, decoder]


def _read_transformer(model: PreTrainedModel, request: Request) -> list[Stack]:
    """The encoder-decoder: a source, and its target as it was given or as the model writes it."""
    config = model.config
    request.check(type(model).__name__, 1, 2)
    inputs = request.encode(request.texts[0])
    start, notes = torch.tensor([[config.decoder_start_token_id]]), []
    if len(request.texts) > 1:
        target = (request.target_tokenizer or request.tokenizer)(request.texts[1], return_tensors="pt")["input_ids"]
    elif hasattr(model, "lm_head"):
        target = model.generate(**inputs, max_new_tokens=MAX_TOKENS - 1, num_beams=1, do_sample=False)[:, 1:]
        notes = [
            "The model wrote the target itself, the likeliest token at each step. A second `--text` gives another."
        ]
    else:
        raise ValueError(f"{type(model).__name__} has no head to write a target. Add a second --text.")
    if target.shape[1] and target[0, -1] == config.eos_token_id:
        # Nothing is predicted behind the end.
        target = target[:, :-1]
    written = torch.cat((start, target), dim=1)
    request.check_length(written.shape[1], is_target=True)
    outputs = model(**inputs, decoder_input_ids=written, use_cache=False, **RECORD)
    source = [request.name(index) for index in inputs["input_ids"][0].tolist()]
    encoder, decoder = _encoder_decoder_stacks(model, outputs, written[0], source, request)
    encoder.ids = inputs["input_ids"][0].tolist()
    encoder.tables = _tables(model.get_encoder(), config, inputs["input_ids"][0])
    decoder.notes += notes
    return [encoder, decoder]


def _read_elmo(model: PreTrainedModel, request: Request) -> list[Stack]:
    """The language models of both directions, or their layers and what a task mixes of them."""
    config = model.config
    request.check(type(model).__name__, 1, 1)
    inputs = request.encode(request.texts[0])
    ids, real = inputs["input_ids"][0], inputs["attention_mask"][0].bool()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    outputs = model(**inputs, output_hidden_states=True, use_cache=False, return_dict=True)
    states = _first(outputs.hidden_states)
    stack = Stack("The layers, both directions beside each other", tokens=_words_of(request, ids), hidden_states=states)
    if ids.ndim == 1:
        stack.ids = ids.tolist()
    body = getattr(model, model.base_model_prefix, model)
    if body.scalar_mix is not None:
        shares = body.scalar_mix.weights.float().softmax(0).tolist()
        names = ["word vectors", *(f"layer {number}" for number in range(1, len(shares)))]
        stack.bars[f"share of each layer in the mix, γ = {body.scalar_mix.gamma.item():.4g}"] = (names, shares)
    if model.get_output_embeddings() is None:
        _add_head(stack, model, outputs, real, request)
        return [stack]
    stacks = []
    for title, name, predicts in (
        ("The forward language model", "logits", "after"),
        ("The backward language model", "backward_logits", "before"),
    ):
        if outputs.get(name) is not None:
            columns = slice(len(stacks) * config.direction_size, (len(stacks) + 1) * config.direction_size)
            own = Stack(title, stack.tokens, stack.ids, predicts=predicts)
            own.hidden_states = tuple(layer[:, columns] for layer in states)
            _add_predictions(own, model, outputs[name][0], real, request)
            stacks.append(own)
    return stacks


def _words_of(request, ids) -> list[str]:
    """The words of a text that is read by characters (T, C), or the tokens of ids (T,)."""
    if ids.ndim == 1:
        return [request.name(index) for index in ids.tolist()]
    tokenizer = request.tokenizer
    words = tokenizer.tokenize(request.texts[0])
    if tokenizer.bos_token is not None:
        words = [tokenizer.bos_token, *words]
    if tokenizer.eos_token is not None:
        words = [*words, tokenizer.eos_token]
    words += [str(tokenizer.pad_token)] * (len(ids) - len(words))
    return [readable_token(word) for word in words]


def _read_word2vec(model: PreTrainedModel, request: Request) -> list[Stack]:
    """The vectors of words, their neighbours, and all of these in a plane."""
    request.check(type(model).__name__, 1, 1, has_padding=False)
    table, text = getattr(model, model.base_model_prefix, model), request.texts[0]
    inputs = request.encode(text, return_offsets_mapping=True)
    found = list(zip(inputs["input_ids"][0].tolist(), inputs["offset_mapping"][0].tolist(), strict=True))
    known = list(dict.fromkeys(index for index, _ in found if index != model.config.unk_token_id))
    unknown = ", ".join(repr(text[slice(*place)]) for index, place in found if index == model.config.unk_token_id)
    if not known:
        raise ValueError(f"`--text` has no word of the vocabulary: {unknown}. Write words of the training text.")
    stack = Stack("The word vectors", [request.name(index) for index in known], known, name=request.name)
    if unknown:
        stack.notes.append(f"Words that are not in the vocabulary have no vector and are left out: {unknown}.")
    stack.tables["input vectors"] = ([], table.embeddings.weight[known])
    if model.get_output_embeddings() is not None:
        stack.tables["output vectors"] = ([], model.get_output_embeddings().weight[known])
    near = {index: table.most_similar(index, topn=NEIGHBOURS) for index in known}
    stack.words = {
        request.name(index): [(request.name(other), cosine) for other, cosine in found] for index, found in near.items()
    }
    count = max(1, MOST_POINTS // len(known) - 1)
    shown = list(dict.fromkeys([*known, *(other for found in near.values() for other, _ in found[:count])]))
    places, share = _principal_plane(table.unit_vectors()[shown])
    points = zip(shown, places.tolist(), strict=True)
    stack.plane = {
        "points": [{"x": x, "y": y, "word": request.name(index), "asked": index in near} for index, (x, y) in points],
        "share": share,
    }
    return [stack]


def _principal_plane(vectors: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Places (N, 2) from 0 to 1 in the plane of largest variance of vectors (N, D), and the share that it holds."""
    centred = vectors.double() - vectors.double().mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    # An axis has no sign of its own: its largest coordinate counts as positive.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    places = torch.nn.functional.pad(centred @ axes[:2].T, (0, max(0, 2 - len(axes))))
    span = (places.amax(0) - places.amin(0)).clamp(min=1e-12)
    share = (sizes[:2].square().sum() / sizes.square().sum().clamp(min=1e-12)).item()
    return (places - places.amin(0)) / span, share


FAMILIES: dict[str, Callable[[PreTrainedModel, Request], list[Stack]]] = {
    "custom_gpt2": _read_text_model,
    "custom_bert": _read_text_model,
    "custom_blip2_vision_model": _read_vision,
    "custom_blip2_qformer": _read_qformer,
    "custom_blip2": _read_blip2,
    "custom_transformer": _read_transformer,
    "custom_elmo": _read_elmo,
    "custom_word2vec": _read_word2vec,
}


__all__ = ["FAMILIES", "MAX_TOKENS", "Picture", "Request", "Stack", "open_image", "readable_token"]
