"""Who competes, at what: settings of the two libraries, and the comparisons of each benchmark."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Setting:
    """How a contender runs: whose code, and with what switched on."""

    library: str  # stock, ours, or torch
    bf16: bool = False
    dropout: float | None = None  # None: as the configuration says
    compile: bool = False
    group_by_length: bool = False
    static_cache: bool = False
    cached_features: bool = False

    @property
    def name(self) -> str:
        words = [self.library]
        words += ["bf16"] if self.bf16 else []
        words += [f"dropout {self.dropout:g}"] if self.dropout is not None else []
        words += [
            word for word in ("compile", "group_by_length", "static_cache", "cached_features") if getattr(self, word)
        ]
        return ", ".join(words)

    def spec(self) -> dict:
        generate = {"cache_implementation": "static"} if self.static_cache else {}
        return {**asdict(self), "generate": generate}


STOCK, OURS = Setting("stock"), Setting("ours")


@dataclass(frozen=True)
class Comparison:
    """One row: ours against stock settings, the first of which is the plain one.

    Attributes:
        shape: what the workload needs: batch_size, batches and max_length (real lengths, of paragraphs or, as
            `sentences`, of those), length (all rows full), padding (share of a batch), new_tokens, or rows.
    """

    title: str
    ours: Setting
    stock: tuple[Setting, ...]
    shape: dict = field(default_factory=dict)


def _train(batch_size: int, max_length: int, length: int) -> list[Comparison]:
    real = {"batch_size": batch_size, "batches": 4, "max_length": max_length}
    full = {"batch_size": batch_size // 2, "batches": 1, "length": length}
    quiet, stock_quiet = Setting("ours", dropout=0.0), Setting("stock", dropout=0.0)
    best = {"bf16": True, "dropout": 0.0}
    return [
        Comparison("real lengths", OURS, (STOCK,), real),
        Comparison(
            "real lengths, best setting",
            Setting("ours", **best),
            (
                Setting("stock", **best),
                Setting("stock", **best, group_by_length=True),
                Setting("stock", **best, group_by_length=True, compile=True),
            ),
            real,
        ),
        Comparison(f"no padding, T = {length}, dropout 0", quiet, (stock_quiet,), full),
        Comparison(f"no padding, T = {length}, dropout 0.1", OURS, (STOCK,), full),
    ]


def comparisons(name: str, device: str) -> list[Comparison]:
    """The rows of the benchmark `name`, of a size that fits the device."""
    is_gpu = device == "cuda"
    if name in ("train", "mlm"):
        length = 1024 if name == "train" else 512
        rows = _train(64, length, length) if is_gpu else _train(8, 256, 512)
        return [row for row in rows if row.ours.bf16 or not is_gpu] + (_gpu_train(length) if is_gpu else [])
    if name == "sentences":
        return _encode(
            {"batch_size": 256 if is_gpu else 32, "batches": 4, "max_length": 128, "sentences": True}, is_gpu
        )
    if name in ("pretrain", "caption"):
        return _pairs(name, is_gpu)
    if name == "translate":
        return _translate(is_gpu)
    if name == "encode":
        length = 1024 if is_gpu else 256
        return _encode({"batch_size": 64 if is_gpu else 8, "batches": 4, "max_length": length}, is_gpu)
    if name == "decode":
        one = {"batch_size": 1, "batches": 1, "length": 16, "new_tokens": 128}
        several = {"batch_size": 4, "batches": 1, "length": 16, "new_tokens": 128}
        static = Setting("stock", static_cache=True)
        return [
            Comparison("128 tokens, batch 1", OURS, (STOCK, static), one),
            Comparison("128 tokens, batch 4", OURS, (STOCK,), several),
        ]
    rows = {"rows": 16384 if is_gpu else 2048, "width": 768}
    torchs = Setting("torch", bf16=is_gpu)
    return [
        Comparison(
            f"{rows['rows']} rows; memory beyond inputs and gradients",
            Setting("ours", bf16=is_gpu),
            (Setting("stock", bf16=is_gpu), torchs),
            rows,
        )
    ]


def _encode(shape: dict, is_gpu: bool) -> list[Comparison]:
    half = Setting("ours", bf16=True), (Setting("stock", bf16=True), Setting("stock", bf16=True, compile=True))
    rows = [] if is_gpu else [Comparison("real lengths", OURS, (STOCK,), shape)]
    return [*rows, Comparison("real lengths, bf16", *half, shape)]


def _pairs(name: str, is_gpu: bool) -> list[Comparison]:
    """A stage of BLIP-2 on images with texts of a sentence's length."""
    shape = {"batch_size": 128 if is_gpu else 8, "batches": 1, "max_length": 32, "sentences": True}
    quiet = {"bf16": is_gpu, "dropout": 0.0}
    ours, stock = Setting("ours", **quiet), Setting("stock", **quiet)
    rows = [
        Comparison("frozen tower and language model" if name == "caption" else "frozen tower", ours, (stock,), shape)
    ]
    if name == "pretrain":
        cached = Setting("ours", **quiet, cached_features=True)
        rows.append(Comparison("kept states of the tower", cached, (ours,), shape))
    return rows


def _translate(is_gpu: bool) -> list[Comparison]:
    """Sentences, and others for their translations."""
    shape = {"batch_size": 256 if is_gpu else 32, "batches": 4, "max_length": 128, "sentences": True}
    rows = []
    for title, bf16 in (("real lengths", False), ("real lengths, bf16", True)):
        options = {"bf16": bf16, "dropout": 0.0}
        stock = (Setting("stock", **options), Setting("stock", **options, group_by_length=True))
        rows.append(Comparison(title, Setting("ours", **options), stock, shape))
    return rows[1:] if is_gpu else rows


def _gpu_train(length: int) -> list[Comparison]:
    full = {"batch_size": 65536 // length, "batches": 1, "length": length}
    best = {"bf16": True, "dropout": 0.0}
    stock = (Setting("stock", **best), Setting("stock", **best, compile=True))
    return [
        Comparison(f"no padding, T = {length}, bf16, batch {full['batch_size']}", Setting("ours", **best), stock, full),
        Comparison("the same, compiled", Setting("ours", **best, compile=True), stock, full),
    ]


def sweeps(device: str) -> dict[str, list[Comparison]]:
    """Comparisons of training that differ in one thing, to be drawn: the share of padding, the length."""
    tokens, lengths = (65536, (256, 512, 1024)) if device == "cuda" else (1024, (128, 256, 512, 1024))
    bf16 = device == "cuda"
    pair = Setting("ours", dropout=0.0, bf16=bf16), (Setting("stock", dropout=0.0, bf16=bf16),)
    size = 256
    by_padding = [
        Comparison(
            f"{share:.0%}", *pair, {"batch_size": tokens // size, "batches": 1, "length": size, "padding": share}
        )
        for share in (0.0, 0.25, 0.5, 0.75)
    ]
    by_length = [
        Comparison(str(length), *pair, {"batch_size": tokens // length, "batches": 1, "length": length})
        for length in lengths
    ]
    return {"share of padding": by_padding, "sequence length": by_length}
