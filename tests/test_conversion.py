"""Published formats: TensorFlow's own numbers, a nanoGPT and tiktoken are met exactly; damaged files are refused.

`fixtures/openai_gpt2` was written by TensorFlow (see `make_fixture.py` there), with the tensors as TensorFlow read them
back in `expected.safetensors`.
"""

import base64
import json
import math
import pydoc_data.topics
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_custom import CustomGPT2ForCausalLM
from hf_custom.conversion import (
    ENCODINGS,
    convert,
    convert_nanogpt,
    convert_openai,
    convert_tiktoken,
    openai_tokenizer,
    tiktoken_tokenizer,
)
from hf_custom.tensor_bundle import TensorBundle, crc32c

RELEASE = Path(__file__).parent / "fixtures" / "openai_gpt2"
END = "<|endoftext|>"
IDS = torch.tensor([[5, 299, 17, 256, 80, 3, 270, 41]])
TEXT = "the cat and the other  dog\n\nGrüße, 数学 🙂 it's 1234567 don't\t \n" + END + " again   "


@pytest.fixture
def folder(tmp_path):
    """Where to write; whatever a test does, no draft may lie beside it."""
    yield tmp_path / "out" / "model"
    assert not (tmp_path / "out").exists() or {path.name for path in (tmp_path / "out").iterdir()} <= {"model"}


@pytest.fixture
def release(tmp_path):
    """A copy of the release, to be damaged."""
    return Path(shutil.copytree(RELEASE, tmp_path / "release"))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# OpenAI's release


def test_checksums_are_those_of_the_standard():
    """The examples of RFC 3720, appendix B.4, and data of more than one row and of odd length."""
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(b"123456789") == 0xE3069283
    data, register = random.Random(0).randbytes(70_001), 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    assert crc32c(data) == register ^ 0xFFFFFFFF


def test_checksum_of_several_chunks_is_that_of_one(monkeypatch):
    data = random.Random(0).randbytes(9_999)
    whole = crc32c(data)
    monkeypatch.setattr("hf_custom.tensor_bundle._CRC_CHUNK", 4_096)
    assert crc32c(data) == whole and crc32c(b"") == 0


def test_bundle_holds_what_tensorflow_read():
    bundle, expected = TensorBundle(RELEASE / "model.ckpt"), load_file(RELEASE / "expected.safetensors")
    assert bundle.entries.keys() == expected.keys() and len(expected) == 28
    for name, tensor in expected.items():
        assert bundle.read(name).dtype == tensor.dtype and torch.equal(bundle.read(name), tensor)


def stock_from_tensorflow():
    """Stock GPT-2 filled from the TensorFlow names by a rule of its own, without the package's table."""
    sizes = json.loads((RELEASE / "hparams.json").read_text())
    config = GPT2Config(
        vocab_size=sizes["n_vocab"],
        n_positions=sizes["n_ctx"],
        n_embd=sizes["n_embd"],
        n_head=sizes["n_head"],
        n_layer=sizes["n_layer"],
        bos_token_id=299,
        eos_token_id=299,
    )
    state = {}
    for name, tensor in load_file(RELEASE / "expected.safetensors").items():
        name = re.sub(r"^model/h(\d+)/", r"h/\1/", name.replace("model/w", "w").replace("model/ln_f", "ln_f"))
        name = re.sub(r"(wte|wpe|/w|/g)$", lambda match: match.group().strip("/wg") + "/weight", name)
        name = re.sub(r"/b$", "/bias", name).replace("//", "/").replace("/", ".")
        state[{"te.weight": "wte.weight", "pe.weight": "wpe.weight"}.get(name, name)] = tensor
    model = GPT2LMHeadModel(config).eval()
    wanted = model.transformer.state_dict()
    model.transformer.load_state_dict({name: state[name].reshape(wanted[name].shape) for name in wanted})
    return model


@torch.no_grad()
def test_openai_release_gives_the_logits_and_tokens_of_stock(folder):
    stock = stock_from_tensorflow()
    assert convert(RELEASE, folder) == folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is CustomGPT2ForCausalLM and model.config.n_head == 2
    assert_close(model(IDS).logits, stock(IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 299}
    assert torch.equal(model.generate(IDS, **options), stock.generate(IDS, **options))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "configuration_gpt2.py" in {path.name for path in folder.iterdir()}


def test_openai_tokenizer_encodes_as_tiktoken_does(folder, monkeypatch):
    load = pytest.importorskip("tiktoken.load", reason="tiktoken is not installed")
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = load.data_gym_to_mergeable_bpe_ranks(str(RELEASE / "vocab.bpe"), str(RELEASE / "encoder.json"))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 299})
    convert(RELEASE, folder)
    ours = AutoTokenizer.from_pretrained(folder)
    assert type(ours) is GPT2Tokenizer and ours.model_max_length == 16
    assert ours.eos_token_id == ours.bos_token_id == 299
    assert ours(TEXT).input_ids == theirs.encode(TEXT, allowed_special="all")
    assert ours.decode(ours(TEXT).input_ids) == TEXT


def test_without_hparams_the_tensors_and_n_head_say_the_sizes(release, folder):
    (release / "hparams.json").unlink()
    (release / "checkpoint").unlink()
    with pytest.raises(OSError, match=r"hparams\.json.*`n_head`"):
        convert(release, folder)
    config = AutoModelForCausalLM.from_pretrained(convert(release, folder, n_head=2)).config
    assert (config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head) == (300, 16, 8, 2, 2)


def test_checkpoint_moved_from_another_machine_is_found(release, folder):
    (release / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt"\n')
    assert convert(release, folder) == folder


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe", "model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_missing_file_is_named(release, folder, name):
    (release / name).unlink()
    with pytest.raises(OSError, match=re.escape(name)):
        convert(release, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"n_embd": 16}, r"model/wte .*\(300, 8\).*\(300, 16\)"),
        ({"n_vocab": 301}, r"model/wte .*\(300, 8\).*\(301, 8\)"),
        ({"n_ctx": 8}, r"model/wpe .*\(16, 8\).*\(8, 8\)"),
        ({"n_layer": 3}, "no tensor model/h2/ln_1/g"),
        ({"n_layer": 1}, "a tensor model/h1/"),
        ({"n_head": 3}, "n_head"),
        ({"n_layer": 10**9}, "n_layer"),
        ({"n_vocab": 10**12}, "vocab_size"),
        ({"n_embd": -8}, "n_embd"),
        ({"n_embd": "8"}, "'n_embd'.*must be an integer"),
        ({"n_ctx": True}, "'n_ctx'.*must be an integer"),
    ],
)
def test_hparams_that_contradict_are_refused(release, folder, sizes, said):
    hparams = json.loads((release / "hparams.json").read_text())
    (release / "hparams.json").write_text(json.dumps({**hparams, **sizes}))
    with pytest.raises(ValueError, match=said):
        convert(release, folder)
    assert not folder.exists()


def rewrite(name, change):
    """A damage: the text of a file changed."""

    def damage(release):
        (release / name).write_text(change((release / name).read_text()))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rewrite("hparams.json", lambda text: text[:-5]), "no JSON"),
        (rewrite("hparams.json", lambda text: "[1]"), "no JSON object"),
        (rewrite("hparams.json", lambda text: "[" * 100_000), "no JSON"),
        (rewrite("hparams.json", lambda text: '{"n_vocab": 300}'), "no 'n_ctx'"),
        (rewrite("encoder.json", lambda text: text.replace('"A"', '"AA"')), "no number for 'A'"),
        (rewrite("encoder.json", lambda text: text.replace(END, "<end>")), r"no number for '<\|endoftext"),
        (rewrite("encoder.json", lambda text: text.replace(": 256,", ": 255,")), "have one number"),
        (rewrite("encoder.json", lambda text: text.replace(": 256,", ": 1e3,")), "1000.0"),
        (rewrite("encoder.json", lambda text: text.replace(": 299", ": 300")), "up to 300 but the model has 300"),
        (rewrite("vocab.bpe", lambda text: text + "q z\n"), r"line 45 of .*vocab\.bpe"),
        (rewrite("checkpoint", lambda text: "nothing"), "names no `model_checkpoint_path`"),
        (rewrite("checkpoint", lambda text: text.replace("model.ckpt", "other")), r"other\.index does not exist"),
    ],
)  # fmt: skip
def test_damaged_texts_are_refused(release, folder, damage, said):
    damage(release)
    with pytest.raises((ValueError, OSError), match=said):
        convert(release, folder)
    assert not folder.exists()


def test_changed_byte_of_a_checkpoint_is_found(release, folder):
    """Every byte of the index, and some of the data."""
    index, data = release / "model.ckpt.index", release / "model.ckpt.data-00000-of-00001"
    whole, expected = index.read_bytes(), TensorBundle(RELEASE / "model.ckpt").entries
    accepted = []
    for position in range(len(whole)):
        index.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            assert TensorBundle(release / "model.ckpt").entries == expected
        except ValueError:
            continue
        accepted.append(position)
    # Nothing reads the block of other tables, empty with its trailer, its address and what fills up the two addresses.
    assert len(accepted) <= 8 + 5 + 40 and min(accepted) > len(whole) - 130
    index.write_bytes(whole)
    content = bytearray(data.read_bytes())
    content[12_345] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match="does not have the checksum"):
        convert(release, folder)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_cut_checkpoint_is_refused(release, folder, name):
    content = (release / name).read_bytes()
    for length in (0, 7, 60, len(content) // 2, len(content) - 1):
        (release / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=re.escape(name)):
            convert(release, folder)
    assert not folder.exists()


# Bundles as TensorFlow would not write them, with valid checksums


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def message(*fields):
    """A protocol buffer of (number, integer or bytes), and of (number, "fixed", integer)."""
    parts = []
    for number, *value in fields:
        if value[0] == "fixed":
            parts.append(varint(number << 3 | 5) + struct.pack("<I", value[1]))
        elif isinstance(value[0], bytes):
            parts.append(varint(number << 3 | 2) + varint(len(value[0])) + value[0])
        else:
            parts.append(varint(number << 3) + varint(value[0]))
    return b"".join(parts)


def masked(data):
    checksum = crc32c(data)
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def entry(content=b"\0\0\x80?", shape=(1,), dtype=1, shard=0, offset=0, size=None, extra=()):
    axes = message(*((2, message((1, axis))) for axis in shape))
    size = len(content) if size is None else size
    return message((1, dtype), (2, axes), (3, shard), (4, offset), (5, size), (6, "fixed", masked(content)), *extra)


def write_table(path, blocks, compression=0, repeats=1):
    """An index of blocks, each a list of keys and values, whose address is given `repeats` times."""
    data, addresses = b"", []

    def add(items):
        nonlocal data
        body = b"".join(varint(0) + varint(len(name)) + varint(len(value)) + name + value for name, value in items)
        body += struct.pack("<II", 0, 1)
        address = varint(len(data)) + varint(len(body))
        data += body + bytes([compression]) + struct.pack("<I", masked(body + bytes([compression])))
        return address

    for items in blocks:
        address = add(items)
        addresses += [(items[-1][0] + b"z" * index, address) for index in range(repeats)]
    footer = varint(0) + varint(0) + add(addresses)
    path.write_bytes(data + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))


HEADER = (b"", message((1, 1)))


def write_bundle(tmp_path, *items, header=HEADER, content=b"\0\0\x80?", **options):
    write_table(tmp_path / "b.index", [[header, *items]], **options)
    (tmp_path / "b.data-00000-of-00001").write_bytes(content)
    return TensorBundle(tmp_path / "b")


def test_bundle_of_several_blocks_files_and_types(tmp_path):
    half = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    content = bytes(half.view(torch.uint8).flatten().tolist())
    first, second = (b"a", entry()), (b"b", entry(content, (1, 2), dtype=14, shard=1, offset=3))
    empty = (b"c", entry(b"", (0, 4)))
    write_table(tmp_path / "b.index", [[(b"", message((1, 2))), first], [second, empty]])
    (tmp_path / "b.data-00000-of-00002").write_bytes(b"\0\0\x80?")
    (tmp_path / "b.data-00001-of-00002").write_bytes(b"odd" + content)
    bundle = TensorBundle(tmp_path / "b")
    assert list(bundle.entries) == ["a", "b", "c"]
    assert torch.equal(bundle.read("a"), torch.ones(1)) and torch.equal(bundle.read("b"), half)
    assert bundle.read("c").shape == (0, 4)


@pytest.mark.parametrize(
    ("items", "options", "said"),
    [
        ([(b"a", entry(extra=[(7, b"")]))], {}, "a in .* is partitioned"),
        ([(b"a", entry(dtype=7))], {}, "type 7"),
        ([(b"a", entry(shape=(2**62, 4)))], {}, "shape .* do not agree"),
        ([(b"a", entry(shape=(2**40,), size=2**42))], {}, "a ends at byte"),
        ([(b"a", entry(offset=1))], {}, "a ends at byte 5"),
        ([(b"a", entry(offset=2**63))], {}, "a ends at byte"),
        ([(b"a", entry(shard=1))], {}, "file 1 of 1"),
        ([(b"a", entry()), (b"b", entry())], {}, "overlap"),
        ([(b"b", entry()), (b"a", entry())], {}, "not in order"),
        ([(b"a", entry()), (b"a", entry())], {}, "not in order"),
        ([(b"\xff", entry())], {}, "a name is not text"),
        ([(b"a" * 2000, entry())], {}, "longer than its block"),
        ([(b"a", b"\x08")], {}, "does not end"),
        ([(b"a", b"\x12\x7f")], {}, "longer than its message"),
        ([(b"a", message((1, 1), (2, 5)))], {}, "a message in it is a number"),
        ([(b"a", message((1, 1), (4, b"x")))], {}, "fields of another type"),
        ([(b"a", entry())], {"header": (b"", message((1, 1), (2, 1)))}, "big endian"),
        ([(b"a", entry())], {"header": (b"", message((1, 2**40)))}, "no header"),
        ([(b"a", entry())], {"header": (b"\0", b"")}, "no header"),
        ([(b"a", entry())], {"compression": 1}, "compressed blocks"),
        ([(b"a", entry())], {"content": b""}, "a ends at byte 4"),
    ],
)  # fmt: skip
def test_bundle_that_is_not_sound_is_refused(tmp_path, items, options, said):
    with pytest.raises(ValueError, match=said):
        write_bundle(tmp_path, *items, **options).entries  # noqa: B018 - reading it parses the index


def test_index_that_repeats_a_block_is_refused(tmp_path):
    """Otherwise a small file could describe any number of tensors."""
    bundle = write_bundle(tmp_path, (b"a", entry()), repeats=3)
    with pytest.raises(ValueError, match="not in order"):
        bundle.entries  # noqa: B018


# nanoGPT


class NanoNorm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoGPT(nn.Module):
    """A plain decoder under nanoGPT's names: linear layers, exact GELU, biases or none."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, bias, dropout=0.0):
        super().__init__()
        self.n_head = n_head
        blocks = [
            nn.ModuleDict({
                "ln_1": NanoNorm(n_embd, bias),
                "attn": nn.ModuleDict({
                    "c_attn": nn.Linear(n_embd, 3 * n_embd, bias), "c_proj": nn.Linear(n_embd, n_embd, bias)
                }),
                "ln_2": NanoNorm(n_embd, bias),
                "mlp": nn.ModuleDict({
                    "c_fc": nn.Linear(n_embd, 4 * n_embd, bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias)
                }),
            })
            for _ in range(n_layer)
        ]  # fmt: skip
        tables = {"wte": nn.Embedding(vocab_size, n_embd), "wpe": nn.Embedding(block_size, n_embd)}
        self.transformer = nn.ModuleDict({**tables, "h": nn.ModuleList(blocks), "ln_f": NanoNorm(n_embd, bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids):
        net, steps = self.transformer, ids.shape[1]
        x = net.wte(ids) + net.wpe.weight[:steps]
        mask = torch.full((steps, steps), -math.inf).triu(1)
        for block in net.h:
            query, key, value = (
                part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            )
            weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + mask).softmax(-1)
            x = x + block.attn.c_proj((weights @ value).transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(net.ln_f(x))


NANO = {"vocab_size": 320, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, "bias": True, "dropout": 0.1}


def build_nano(**changes):
    model = NanoGPT(**{**NANO, **changes})
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(".ln_" in name and name.endswith("weight")), std=0.2)
    return model


def nano_checkpoint(model, prefix="", arguments=None, **changes):
    """What train.py of nanoGPT saves."""
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": {**NANO, **changes} if arguments is None else arguments,
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "dtype": "float16", "compile": True},
    }


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_gives_the_same_logits(tmp_path, folder, bias, prefix):
    nano = build_nano(bias=bias)
    checkpoint = nano_checkpoint(nano, prefix, bias=bias)
    if prefix:
        # As the versions before PyTorch 2 had them.
        checkpoint["model"][f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    model = AutoModelForCausalLM.from_pretrained(convert(tmp_path if prefix else tmp_path / "ckpt.pt", folder))
    ids = torch.randint(0, NANO["vocab_size"], (2, 16))
    assert_close(model(ids).logits, nano(ids))
    assert (nano(ids)[0, 0] - nano(ids)[1, 0]).abs().max() > 1
    config = model.config
    assert (config.activation_function, config.tie_word_embeddings, config.resid_pdrop) == ("gelu", True, 0.1)
    assert config.eos_token_id is None and config.vocab_size == 320


@torch.no_grad()
def test_untied_nanogpt_stays_untied(tmp_path, folder):
    nano = build_nano()
    nano.lm_head.weight = nn.Parameter(torch.randn(320, 32))
    torch.save(nano_checkpoint(nano), tmp_path / "ckpt.pt")
    model = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "ckpt.pt", folder))
    assert_close(model(IDS).logits, nano(IDS))


@torch.no_grad()
def test_old_nanogpt_has_the_activation_named(tmp_path, folder):
    nano = build_nano()
    torch.save(nano_checkpoint(nano), tmp_path / "ckpt.pt")
    convert_nanogpt(tmp_path / "ckpt.pt", folder, activation_function="gelu_new")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.activation_function == "gelu_new" and 1e-4 < (model(IDS).logits - nano(IDS)).abs().max() < 0.1


def test_padded_vocabulary_ends_texts_as_gpt2_does(tmp_path, folder):
    changes = {"vocab_size": 50304, "n_embd": 4, "n_layer": 1, "n_head": 1}
    torch.save(nano_checkpoint(build_nano(**changes), **changes), tmp_path / "ckpt.pt")
    config = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "ckpt.pt", folder)).config
    assert (config.vocab_size, config.eos_token_id) == (50304, 50256)


def test_model_args_may_lack_the_heads(tmp_path, folder):
    nano = build_nano()
    torch.save(nano_checkpoint(nano, arguments={}), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="Give it as `n_head`"):
        convert(tmp_path / "ckpt.pt", folder)
    assert AutoModelForCausalLM.from_pretrained(convert(tmp_path / "ckpt.pt", folder, n_head=4)).config.n_head == 4


def spoil(**tensors):
    """A checkpoint with tensors of the state dict replaced, or taken out where `None`."""
    checkpoint = nano_checkpoint(build_nano())
    for name, tensor in tensors.items():
        name = "transformer." + name.replace("__", ".")
        checkpoint["model"].pop(name, None)
        if tensor is not None:
            checkpoint["model"][name] = tensor
    return checkpoint


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: spoil(h__1__ln_1__bias=None), r"no tensor transformer\.h\.1\.ln_1\.bias"),
        (lambda: spoil(wte__weight=None), r"wte\.weight is missing"),
        (lambda: spoil(h__0__attn__q_proj__weight=torch.ones(2)), r"a tensor transformer\.h\.0\.attn\.q_proj\.weight"),
        (lambda: spoil(h__0__mlp__c_fc__weight=torch.ones(32, 128)), r"c_fc\.weight .*\(32, 128\).*\(128, 32\)"),
        (lambda: spoil(h__0__ln_1__weight=torch.ones(32).long()), "ln_1.weight .* not a dense tensor"),
        (lambda: spoil(h__0__ln_1__weight=torch.ones(32).to_sparse()), "ln_1.weight .* not a dense tensor"),
        (lambda: spoil(wte__weight=torch.ones(1).expand(320, 32)), "larger than its memory"),
        (lambda: nano_checkpoint(build_nano(), n_embd=64), r"wte\.weight .*\(320, 32\).*\(320, 64\)"),
        (lambda: nano_checkpoint(build_nano(), n_layer=10**9), "n_layer"),
        (lambda: nano_checkpoint(build_nano(), n_head=5), "n_head"),
        (lambda: nano_checkpoint(build_nano(), n_head=4.0), "'n_head'.*must be an integer"),
        (lambda: nano_checkpoint(build_nano(), dropout=3.0), "resid_pdrop"),
        (lambda: nano_checkpoint(build_nano(), dropout="high"), "`dropout`.*'high'"),
        (lambda: spoil(h__0__ln_1__weight=torch.ones(32).half()), "ln_1.weight .*float16.*float32"),
        (lambda: nano_checkpoint(build_nano(), bias=False), "a tensor transformer.*bias"),
        (lambda: nano_checkpoint(build_nano(bias=False)), r"no tensor .*bias"),
        (lambda: {"model": {"a": 1}}, "'a' .* is not a tensor"),
        (lambda: {"model": {}, "model_args": 3}, "`model_args`.*no dictionary"),
        (lambda: {"weights": {}}, "no state dict under `model`"),
        (lambda: torch.ones(2), "no state dict under `model`"),
    ],
)  # fmt: skip
def test_nanogpt_that_is_not_sound_is_refused(tmp_path, folder, make, said):
    torch.save(make(), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "ckpt.pt", folder)
    assert not folder.exists()


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("has_zip", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, folder, has_zip):
    checkpoint = {**nano_checkpoint(build_nano()), "config": Touch(tmp_path / "touched")}
    torch.save(checkpoint, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=has_zip)
    with pytest.raises(ValueError, match="so it was not read" if has_zip else "not a file of `torch.save`|not read"):
        convert_nanogpt(tmp_path / "ckpt.pt", folder)
    assert not (tmp_path / "touched").exists() and not folder.exists()


def test_damaged_zip_is_refused(tmp_path, folder):
    torch.save(nano_checkpoint(build_nano()), tmp_path / "ckpt.pt")
    content = (tmp_path / "ckpt.pt").read_bytes()
    for length in (4, 1000, len(content) - 10):
        (tmp_path / "ckpt.pt").write_bytes(content[:length])
        with pytest.raises(ValueError, match="is damaged"):
            convert(tmp_path / "ckpt.pt", folder)


# tiktoken


@pytest.fixture(scope="module")
def ranks():
    """Bytes by rank, of a small byte-level BPE trained on Python's own help."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = list(pydoc_data.topics.topics.values())[:6]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    bytes_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    vocab = {bytes(bytes_of[symbol] for symbol in token): rank for token, rank in tokenizer.get_vocab().items()}
    # One across what only some patterns keep together, and one that no pair of others gives.
    return {**vocab, b"\n/": 700, "数学".encode(): 701}


def write_ranks(file, ranks):
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return file


def texts():
    """Varied by hand, then at random from what patterns tell apart."""
    yield from (
        "",
        " ",
        "a",
        TEXT,
        "a\n\n  ",
        "\n \n x",
        "  lead",
        "I'LL WE'Re 'ſ it'S",
        "12 1234 ٣٤",
        "é e\u0301 ǅ ʰ ª",
    )
    yield from (
        "数学",
        END * 2,
        "x<|fim_prefix|>y <|endofprompt|>",
        "HelloWorld camelCase ABCdef's",
        "a://b/\n/c !!!\r\n\r\n\tx",
    )
    yield "the statement is a class\tdef f(x):\n    return x ** 2  # 👩\u200d👩\u200d👧 \x00\x85\u3000\ufeff"
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\x1c"]
    pieces = [
        "a",
        "the",
        "THE",
        "'s",
        "'LL",
        "7",
        "123",
        "!",
        "/",
        "é",
        "ß",
        "数",
        "🙂",
        "\u0301",
        "_",
        "ſ",
        END,
        *spaces,
    ]
    chooser = random.Random(0)
    yield from ("".join(chooser.choices(pieces, k=12)) for _ in range(400))


@pytest.mark.parametrize("name", ENCODINGS)
def test_rank_file_encodes_as_tiktoken_does(tmp_path, folder, ranks, name, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    from tiktoken_ext import openai_public

    # Pattern and special tokens as the package has them, on our ranks.
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    published = getattr(openai_public, name)()
    published.pop("explicit_n_vocab", None)
    theirs = tiktoken.Encoding(**published)
    special_tokens = ENCODINGS[name].special_tokens
    assert special_tokens == published["special_tokens"]
    file = write_ranks(tmp_path / "small.tiktoken", ranks)
    convert_tiktoken(file, folder, encoding=name, special_tokens=special_tokens)
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == ours.bos_token_id == special_tokens[END]
    for text in texts():
        expected = theirs.encode(text, allowed_special="all")
        assert ours(text).input_ids == expected, text
        assert ours.decode(expected) == text


def test_special_tokens_follow_the_last_rank_of_another_vocabulary(tmp_path, ranks):
    file = write_ranks(tmp_path / "small.tiktoken", ranks)
    assert tiktoken_tokenizer(file).get_added_vocab() == {END: 702}
    names = list(ENCODINGS["cl100k_base"].special_tokens)
    expected = {name: 702 + index for index, name in enumerate(names)}
    assert tiktoken_tokenizer(file, "cl100k_base").get_added_vocab() == expected
    assert tiktoken_tokenizer(file, special_tokens={"<|x|>": 900}).eos_token_id is None


def test_name_of_the_file_chooses_the_encoding(tmp_path, ranks):
    """A complete file of each name, its further ranks made up."""
    full = dict(ranks)
    while len(full) < ENCODINGS["cl100k_base"].num_ranks:
        full[b"\xff" + len(full).to_bytes(4)] = len(full)
    tokenizer = tiktoken_tokenizer(write_ranks(tmp_path / "cl100k_base.tiktoken", full))
    assert tokenizer.get_added_vocab() == ENCODINGS["cl100k_base"].special_tokens
    # Digits by threes, which GPT-2's pattern leaves together.
    assert "\\p{N}{1,3}" in tokenizer.backend_tokenizer.to_str().replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: ["not base64 at all", *lines], "line 1 of"),
        (lambda lines: [*lines, "YWJj"], "line 703 of"),
        (lambda lines: [*lines, "YWJjZA== x"], "line 703 of"),
        (lambda lines: [*lines, "YWJjZ 900"], "line 703 of"),
        (lambda lines: [*lines, lines[0].split()[0] + " 900"], "line 703 of"),
        (lambda lines: [*lines, "YWJjZGVmZ2g= 5"], "have one number"),
        (lambda lines: [*lines, "YWJjZGVmZ2g= 99999999"], "number 99999999"),
        (lambda lines: [*lines, base64.b64encode(b"x" * 2000).decode() + " 900"], "line 703 of"),
        (lambda lines: [line for line in lines if not line.startswith("QQ== ")], "no rank for the byte 65"),
    ],
)  # fmt: skip
def test_damaged_rank_file_is_refused(tmp_path, folder, ranks, change, said):
    file = write_ranks(tmp_path / "small.tiktoken", ranks)
    file.write_text("\n".join(change(file.read_text().splitlines())))
    with pytest.raises(ValueError, match=said):
        convert_tiktoken(file, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("o200k_base.tiktoken", {}, "702 ranks but o200k_base has 199998"),
        ("small.tiktoken", {"encoding": "cl100k"}, "must be one of 'r50k_base'"),
        ("small.tiktoken", {"special_tokens": {"<|x|>": 5}}, "have one number"),
        ("small.tiktoken", {"special_tokens": {"<|x|>": "5"}}, "number '5'"),
        ("small.tiktoken", {"special_tokens": {"": 900}}, "a name that is empty"),
        ("small.tiktoken", {"special_tokens": {"the": 900}}, "'the' stands for a rank already"),
    ],
)
def test_arguments_that_do_not_fit_a_rank_file_are_refused(tmp_path, folder, ranks, name, options, said):
    with pytest.raises(ValueError, match=said):
        convert_tiktoken(write_ranks(tmp_path / name, ranks), folder, **options)
    assert not folder.exists()


# What is recognised, and where it goes


def test_vocabularies_alone_become_tokenizers(tmp_path, folder, ranks):
    (tmp_path / "vocabulary").mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(RELEASE / name, tmp_path / "vocabulary")
    convert(tmp_path / "vocabulary", folder)
    assert type(AutoTokenizer.from_pretrained(folder)) is GPT2Tokenizer
    convert(write_ranks(tmp_path / "any-name", ranks), folder, overwrite=True)
    assert AutoTokenizer.from_pretrained(folder)("the").input_ids == [ranks[b"the"]]
    with pytest.raises(ValueError, match="Leave `n_head` and `tokenizer` out"):
        convert(tmp_path / "any-name", folder, n_head=2, overwrite=True)


def test_tokenizer_is_saved_beside_a_nanogpt(tmp_path, folder, ranks):
    changes = {"vocab_size": 768}
    torch.save(nano_checkpoint(build_nano(**changes), **changes), tmp_path / "ckpt.pt")
    file = write_ranks(tmp_path / "small.tiktoken", ranks)
    convert(tmp_path / "ckpt.pt", folder, tokenizer=file)
    expected = tiktoken_tokenizer(file)(TEXT).input_ids
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == expected
    assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id == 702
    # And from folders: the host's, then OpenAI's.
    shutil.copytree(folder, tmp_path / "text")
    convert(tmp_path / "ckpt.pt", folder, tokenizer=tmp_path / "text", overwrite=True)
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == expected
    convert(tmp_path / "ckpt.pt", folder, tokenizer=RELEASE, overwrite=True)
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == openai_tokenizer(RELEASE)(TEXT).input_ids


def test_tokenizer_that_does_not_fit_is_refused(tmp_path, folder, ranks):
    torch.save(nano_checkpoint(build_nano()), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="up to 702 but the model has 320"):
        convert(tmp_path / "ckpt.pt", folder, tokenizer=write_ranks(tmp_path / "small.tiktoken", ranks))
    with pytest.raises(OSError, match="`tokenizer` is .*nowhere"):
        convert(tmp_path / "ckpt.pt", folder, tokenizer=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="which holds none"):
        convert(tmp_path / "ckpt.pt", folder, tokenizer=tmp_path / "empty")
    assert not folder.exists()


def test_unknown_source_is_told_what_was_looked_for(tmp_path, folder):
    with pytest.raises(OSError, match="does not exist"):
        convert(tmp_path / "nowhere", folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("something else")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02}q\x00.")
    for name in ("empty", "file", "old.pt"):
        with pytest.raises(ValueError, match=r"`checkpoint`.*`ckpt\.pt`.*`encoder\.json`.*base64"):
            convert(tmp_path / name, folder)


def test_source_is_never_replaced(release):
    for folder in (release, release.parent):
        with pytest.raises(ValueError, match="would replace the source"):
            convert(release, folder, overwrite=True)
    with pytest.raises(ValueError, match="would replace the source"):
        convert_openai(release, release, overwrite=True)
    assert (release / "model.ckpt.index").is_file()


def test_folder_that_exists_is_kept_unless_told(folder):
    folder.mkdir(parents=True)
    (folder / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        convert(RELEASE, folder)
    assert [path.name for path in folder.iterdir()] == ["mine"]
    convert(RELEASE, folder, overwrite=True)
    assert not (folder / "mine").exists() and (folder / "model.safetensors").is_file()


def test_nothing_is_taken_away_when_a_conversion_fails(release, folder):
    convert(RELEASE, folder)
    data = bytearray((release / "model.ckpt.data-00000-of-00001").read_bytes())
    data[0] ^= 1
    (release / "model.ckpt.data-00000-of-00001").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        convert(release, folder, overwrite=True)
    assert (folder / "model.safetensors").is_file()
