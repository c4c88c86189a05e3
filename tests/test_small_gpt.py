"""The preset `gpt2-notes` matrix by matrix: every step of its forward pass by plain torch from the weights, its
vocabulary as tiktoken reads it, and what it expects next."""

import json
import math

import pytest
import torch
import transformers
from reference import assert_near
from tiny import widen
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer
from transformers.masking_utils import eager_mask

from hf_custom import CustomGPT2ForCausalLM
from hf_custom.attention import eager_attention_forward
from hf_custom.conversion import convert_tiktoken
from hf_custom.presets import preset_config
from training import run_clm
from training.data import embedded_corpus, token_stream
from training.metrics import BigramModel
from training.next_token import next_token_probabilities, write_next_tokens
from training.tokenizer import END_OF_TEXT, main, tiktoken_ranks, to_tiktoken, train_tokenizer, write_tiktoken

BATCH, CONTEXT, WIDTH, HEADS, INNER, VOCAB = 4, 16, 64, 4, 256, 1024
HEAD_SIZE = WIDTH // HEADS
RECIPE = "training/recipes/clm_notes.yaml"


def build(attn_implementation="eager", **fields):
    config = preset_config("gpt2-notes", vocab_size=VOCAB, **fields)
    return CustomGPT2ForCausalLM._from_config(config, attn_implementation=attn_implementation).eval()


# --- The forward pass ---


def table_of_positions(length=CONTEXT, width=WIDTH):
    """sin(pos / 10000^(2i / D)) in coordinate 2i and the cosine in 2i + 1 (Vaswani et al. 2017, section 3.5)."""
    table = torch.zeros(length, width, dtype=torch.float64)
    for position in range(length):
        for i in range(width // 2):
            angle = position / 10_000 ** (2 * i / width)
            table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def normalized(x, weight, bias, eps=1e-5):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def steps_of(weights, ids, num_layers):
    """Every matrix between the ids (B, T) and the loss, by name, from the weights alone."""
    steps = {"ids": ids, "table": weights["transformer.wte.weight"]}
    steps["embedded"] = steps["table"][ids]
    steps["positions"] = table_of_positions().float()
    x = steps["embedded"] + steps["positions"]
    steps["x"] = x
    for layer in range(num_layers):
        own = {name.removeprefix(f"transformer.h.{layer}."): tensor for name, tensor in weights.items()}
        steps |= {f"{layer}.{name}": matrix for name, matrix in steps_of_block(own, x).items()}
        x = steps[f"{layer}.output"]
    steps["last"] = normalized(x, weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
    steps["logits"] = steps["last"] @ weights["lm_head.weight"].t()
    exponentials = steps["logits"].double().exp()
    steps["probabilities"] = exponentials / exponentials.sum(-1, keepdim=True)
    # Each token but the first is predicted from those before it.
    expected = steps["probabilities"][:, :-1].gather(-1, ids[:, 1:, None])
    steps["loss"] = -expected.log().mean()
    return steps


def steps_of_block(own, x):
    """The same of one block."""
    steps = {"norm": normalized(x, own["ln_1.weight"], own["ln_1.bias"])}
    steps["qkv"] = steps["norm"] @ own["attn.c_attn.weight"] + own["attn.c_attn.bias"]
    for name, part in zip("qkv", steps["qkv"].split(WIDTH, -1), strict=True):
        # Columns 16 h to 16 h + 15 are head h's.
        steps[name] = torch.stack([part[..., h * HEAD_SIZE : (h + 1) * HEAD_SIZE] for h in range(HEADS)], dim=1)
    steps["scores"] = steps["q"] @ steps["k"].transpose(-1, -2) / math.sqrt(HEAD_SIZE)
    future = torch.tensor([[key > query for key in range(CONTEXT)] for query in range(CONTEXT)])
    steps["masked"] = steps["scores"].masked_fill(future, float("-inf"))
    exponentials = steps["masked"].exp()
    steps["weights"] = exponentials / exponentials.sum(-1, keepdim=True)
    steps["heads"] = steps["weights"] @ steps["v"]
    steps["concat"] = torch.cat(steps["heads"].unbind(1), dim=-1)
    steps["attention"] = steps["concat"] @ own["attn.c_proj.weight"] + own["attn.c_proj.bias"]
    steps["middle"] = x + steps["attention"]
    steps["norm2"] = normalized(steps["middle"], own["ln_2.weight"], own["ln_2.bias"])
    steps["inner"] = steps["norm2"] @ own["mlp.c_fc.weight"] + own["mlp.c_fc.bias"]
    steps["relu"] = steps["inner"] * (steps["inner"] > 0)
    steps["feed_forward"] = steps["relu"] @ own["mlp.c_proj.weight"] + own["mlp.c_proj.bias"]
    steps["output"] = steps["middle"] + steps["feed_forward"]
    return steps


# Where a module gives a matrix, or takes it (with `<`), by the matrix's name.
MODULES = {"embedded": "transformer.wte", "x": "transformer.drop", "last": "transformer.ln_f", "logits": "lm_head"}
MODULES_OF_BLOCK = {
    "norm": "ln_1",
    "qkv": "attn.c_attn",
    "concat": "<attn.c_proj",
    "attention": "attn.c_proj",
    "middle": "<ln_2",
    "norm2": "ln_2",
    "inner": "mlp.c_fc",
    "relu": "mlp.act",
    "feed_forward": "mlp.c_proj",
    "output": "",
}
SHAPES = {
    "ids": (BATCH, CONTEXT),
    "table": (VOCAB, WIDTH),
    "embedded": (BATCH, CONTEXT, WIDTH),
    "positions": (CONTEXT, WIDTH),
    "x": (BATCH, CONTEXT, WIDTH),
    "last": (BATCH, CONTEXT, WIDTH),
    "logits": (BATCH, CONTEXT, VOCAB),
    "probabilities": (BATCH, CONTEXT, VOCAB),
    "loss": (),
}
SHAPES_OF_BLOCK = {
    "norm": (BATCH, CONTEXT, WIDTH),
    "qkv": (BATCH, CONTEXT, 3 * WIDTH),
    **dict.fromkeys("qkv", (BATCH, HEADS, CONTEXT, HEAD_SIZE)),
    **dict.fromkeys(("masked", "weights"), (BATCH, HEADS, CONTEXT, CONTEXT)),
    "heads": (BATCH, HEADS, CONTEXT, HEAD_SIZE),
    **dict.fromkeys(("concat", "attention", "middle", "norm2"), (BATCH, CONTEXT, WIDTH)),
    **dict.fromkeys(("inner", "relu"), (BATCH, CONTEXT, INNER)),
    **dict.fromkeys(("feed_forward", "output"), (BATCH, CONTEXT, WIDTH)),
}
LAYERS = 4
ALL_SHAPES = SHAPES | {f"{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES_OF_BLOCK.items()}


def recording(model, seen):
    """Let the model note what its modules give and take, under the names of the steps."""
    names = dict(MODULES)
    for i in range(LAYERS):
        for name, module in MODULES_OF_BLOCK.items():
            sign, module = module[:1] * module.startswith("<"), module.removeprefix("<")
            names[f"{i}.{name}"] = f"{sign}transformer.h.{i}" + f".{module}" * bool(module)
    for name, module in names.items():
        if module.startswith("<"):
            note = lambda module, args, name=name: seen.update({name: args[0]})  # noqa: E731
            model.get_submodule(module[1:]).register_forward_pre_hook(note)
        else:
            note = lambda module, args, output, name=name: seen.update({name: output})  # noqa: E731
            model.get_submodule(module).register_forward_hook(note)

    def attend(module, query, key, value, attention_mask, **kwargs):
        output, weights = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
        scores = query @ key.transpose(-1, -2) * module.scaling
        # The host hides by the lowest number there is, which the softmax cannot tell from -inf.
        hidden = attention_mask.expand(scores.shape) == torch.finfo(scores.dtype).min
        found = {"q": query, "k": key, "v": value, "weights": weights, "heads": output.transpose(1, 2)}
        found["masked"] = scores.masked_fill(hidden, float("-inf"))
        seen.update({f"{module.layer_idx}.{name}": matrix for name, matrix in found.items()})
        return output, weights

    AttentionInterface.register("recorded", attend)
    AttentionMaskInterface.register("recorded", eager_mask)
    model.set_attn_implementation("recorded")


@pytest.fixture(scope="module")
def walk():
    """What was computed by hand, and what the model computed."""
    transformers.set_seed(0)
    model, seen = widen(build()), {}
    ids = torch.randint(0, VOCAB, (BATCH, CONTEXT))
    with torch.no_grad():
        steps = steps_of(model.state_dict(), ids, LAYERS)
        recording(model, seen)
        outputs = model(ids, labels=ids)
    seen |= {"ids": ids, "table": model.get_input_embeddings().weight.detach(), "loss": outputs.loss}
    seen["positions"] = (seen["x"] - seen["embedded"])[0]
    seen["logits"], seen["probabilities"] = outputs.logits, outputs.logits.double().softmax(-1)
    return steps, seen


def test_preset_is_the_gpt_of_the_notes():
    config = preset_config("gpt2-notes")
    assert (config.n_embd, config.n_head, config.n_positions) == (WIDTH, HEADS, CONTEXT)
    assert (config.activation_function, config.position_embedding_type) == ("relu", "sinusoidal")
    assert config.n_inner is None and not config.tie_word_embeddings and config.n_layer == LAYERS
    per_block = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER + (3 * WIDTH + WIDTH + INNER + WIDTH) + 4 * WIDTH
    assert build().num_parameters() == 2 * VOCAB * WIDTH + LAYERS * per_block + 2 * WIDTH


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_step_has_its_shape_and_its_numbers(walk, name):
    steps, seen = walk
    assert steps[name].shape == seen[name].shape == ALL_SHAPES[name]
    is_finite = steps[name].isfinite() if name.endswith("masked") else torch.ones_like(steps[name], dtype=torch.bool)
    assert torch.equal(seen[name].isneginf(), ~is_finite)
    assert_near(seen[name][is_finite], steps[name][is_finite], name=name)


def test_position_table_is_that_of_the_paper(walk):
    """Sines in the even and cosines in the odd coordinates, next to each other."""
    found = walk[1]["positions"]
    assert_near(found, table_of_positions(), 1e-6)
    published = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.841471, (1, 1): 0.540302, (2, 0): 0.909297, (2, 1): -0.416147}
    published |= {(1, 2): math.sin(10_000 ** (-1 / 32)), (15, 62): math.sin(15 * 10_000 ** (-31 / 32))}
    for (position, column), value in published.items():
        assert abs(found[position, column].item() - value) < 2e-6


@pytest.mark.parametrize("layer", range(LAYERS))
def test_attention_sees_the_past_alone(walk, layer):
    seen = walk[1]
    masked, weights = seen[f"{layer}.masked"], seen[f"{layer}.weights"]
    above = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
    assert masked[..., above].isneginf().all() and masked[..., ~above].isfinite().all()
    assert (weights[..., above] == 0).all() and (weights[..., ~above] > 0).all()
    assert_near(weights.sum(-1), torch.ones(BATCH, HEADS, CONTEXT), 1e-6)
    # The first token sees itself alone.
    assert torch.equal(weights[..., 0, 0], torch.ones(BATCH, HEADS))


@pytest.mark.parametrize(
    "name", [f"{layer}.{norm}" for layer in range(LAYERS) for norm in ("norm", "norm2")] + ["last"]
)
def test_norms_have_mean_zero_and_variance_one(name):
    """Of a fresh model, whose norms do not scale and shift yet."""
    model, seen = build(), {}
    with torch.no_grad():
        recording(model, seen)
        model(torch.randint(0, VOCAB, (BATCH, CONTEXT)))
    zeros = torch.zeros(BATCH, CONTEXT)
    assert_near(seen[name].mean(-1), zeros, 1e-6)
    assert_near(seen[name].var(-1, unbiased=False), zeros + 1, 1e-3)


def test_fresh_model_guesses_evenly():
    """The loss is that of V equal chances and, to second order, half the variance of the logits."""
    ids = torch.randint(0, VOCAB, (64, CONTEXT))
    with torch.no_grad():
        outputs = build(initializer_range=0.005)(ids, labels=ids)
        assert abs(outputs.loss.item() - math.log(VOCAB)) < 0.01
        outputs = build()(ids, labels=ids)
    variance = outputs.logits.var(-1).mean().item()
    assert abs(variance - WIDTH * 0.125**2) < 0.05
    assert abs(outputs.loss.item() - math.log(VOCAB) - variance / 2) < 0.1


def test_decoding_takes_the_likeliest(walk):
    """The last row of the probabilities is the next token, as `generate` finds it."""
    steps, _ = walk
    model = build()
    model.load_state_dict(widened_weights())
    written = model.generate(steps["ids"], max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(written[:, -1], steps["probabilities"][:, -1].argmax(-1))


def widened_weights():
    transformers.set_seed(0)
    return widen(build()).state_dict()


# --- The vocabulary ---


@pytest.fixture(scope="module")
def texts():
    return embedded_corpus()["text"]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(iter(texts), "bpe", VOCAB)


STRANGE = "Grüße, I'LL we've 数学 🙂\n\n  two  spaces\tand\0zero 12345 !?\r\n x <|endoftext|> y  "


def test_tiktoken_gives_the_same_ids(texts, tokenizer):
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    encoding = to_tiktoken(tokenizer)
    assert encoding.n_vocab == len(tokenizer) == VOCAB
    for text in [*texts, STRANGE, ""]:
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert encoding.encode(text, allowed_special="all") == ids
        assert encoding.decode(ids) == text


def test_ranks_of_a_file_are_read_by_tiktoken_and_by_us(tmp_path, texts, tokenizer):
    load = pytest.importorskip("tiktoken.load", reason="tiktoken is not installed")
    file = tmp_path / "notes.tiktoken"
    write_tiktoken(tokenizer, file)
    assert load.load_tiktoken_bpe(str(file)) == tiktoken_ranks(tokenizer)
    convert_tiktoken(file, tmp_path / "again", special_tokens=tokenizer.get_added_vocab())
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in [*texts[:10], STRANGE]:
        assert again(text, verbose=False)["input_ids"] == tokenizer(text, verbose=False)["input_ids"]


def test_every_token_is_bytes_joined_by_earlier_ones(tokenizer):
    ranks = tiktoken_ranks(tokenizer)
    assert sorted(ranks.values()) == sorted(set(range(VOCAB)) - set(tokenizer.get_added_vocab().values()))
    assert {bytes([byte]) for byte in range(256)} <= ranks.keys()
    for token, rank in ranks.items():
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        assert not parts or any(ranks.get(a, rank) < rank and ranks.get(b, rank) < rank for a, b in parts)


def test_other_tokenizers_have_no_ranks(texts, tmp_path):
    with pytest.raises(ValueError, match="no token for each of them. Train one of kind 'bpe'"):
        tiktoken_ranks(train_tokenizer(iter(texts[:5]), "wordpiece", 400))
    (tmp_path / "text.txt").write_text("one two three\n" * 40, encoding="utf-8")
    arguments = ["--files", str(tmp_path / "text.txt"), "--vocab_size", "300", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="^error: tiktoken merges bytes"):
        main([*arguments, "--kind", "wordpiece", "--tiktoken", str(tmp_path / "x.tiktoken")])
    assert not (tmp_path / "out").exists() and not (tmp_path / "x.tiktoken").exists()
    main([*arguments, "--tiktoken", str(tmp_path / "x.tiktoken")])
    assert (
        len((tmp_path / "x.tiktoken").read_text().splitlines())
        == len(AutoTokenizer.from_pretrained(tmp_path / "out")) - 2
    )


# --- What comes next ---


def test_probabilities_are_of_the_whole_vocabulary(tokenizer):
    model, text = widen(build()), "The class of"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = next_token_probabilities(model, tokenizer, text)
    assert found.shape == (VOCAB,) and abs(found.sum().item() - 1) < 1e-12 and (found > 0).all()
    assert_near(found, model(ids).logits[0, -1].detach().double().softmax(-1), 1e-6)


def test_long_prompt_is_read_from_its_end_and_an_empty_one_begins_a_document(tokenizer, texts):
    model, ids = widen(build()), tokenizer(texts[0], verbose=False)["input_ids"]
    assert len(ids) > CONTEXT
    for text, read in ((texts[0], ids[-CONTEXT:]), ("", [tokenizer.eos_token_id])):
        expected = model(torch.tensor([read])).logits[0, -1].detach().double().softmax(-1)
        assert_near(next_token_probabilities(model, tokenizer, text), expected, 1e-6)


def read_table(file):
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    return head.split("\t"), [line.split("\t") for line in lines]


def test_table_has_every_token_once_in_order(tmp_path, tokenizer, capsys):
    model, prompts = widen(build()), ["The", 'a\t"list"\n']
    write_next_tokens(model, tokenizer, prompts, tmp_path / "next_tokens.tsv")
    head, rows = read_table(tmp_path / "next_tokens.tsv")
    assert head == ["prompt", "rank", "id", "token", "probability"] and len(rows) == 2 * VOCAB
    for number, prompt in enumerate(prompts):
        part = rows[number * VOCAB : (number + 1) * VOCAB]
        assert {json.loads(row[0]) for row in part} == {prompt}
        assert [int(row[1]) for row in part] == list(range(1, VOCAB + 1))
        assert sorted(int(row[2]) for row in part) == list(range(VOCAB))
        assert all(json.loads(row[3]) == tokenizer.decode([int(row[2])]) for row in part)
        values = [float(row[4]) for row in part]
        assert values == sorted(values, reverse=True) and abs(sum(values) - 1) < 1e-4
        expected = next_token_probabilities(model, tokenizer, prompt)
        assert all(abs(float(row[4]) - expected[int(row[2])].item()) < 1e-5 for row in part)
    assert capsys.readouterr().out.count("after ") == 2


def test_script_trains_it_and_shows_what_comes_next(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a list of a class of a list\n" * 300, encoding="utf-8")
    files = ["--files", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "out"), "--vocab_size", "300"]
    run_clm.main([RECIPE, *files, "--max_steps", "2", "--warmup_steps", "1", "--prompts", "a list of", "x"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is CustomGPT2ForCausalLM and model.config.n_positions == CONTEXT
    _, rows = read_table(tmp_path / "out" / "next_tokens.tsv")
    assert len(rows) == 2 * model.config.vocab_size
    expected = next_token_probabilities(model, tokenizer, "a list of")
    assert int(rows[0][2]) == expected.argmax() and abs(float(rows[0][4]) - expected.max().item()) < 1e-5
    assert "after 'a list of': " in capsys.readouterr().out and tokenizer.eos_token == END_OF_TEXT


@pytest.mark.slow
def test_recipe_learns_in_minutes(tmp_path):
    """Better than counting pairs of tokens, on text that it has not seen."""
    arguments = run_clm.parse_arguments(
        run_clm.ARGUMENTS, [RECIPE, "--output_dir", str(tmp_path)], "", **run_clm.DEFAULTS
    )
    run = run_clm.prepare(*arguments)
    result = run.trainer.train()
    score = run.score()
    bigram = BigramModel(token_stream(run.texts["train"], run.tokenizer, "text"), run.model.config.vocab_size)
    assert score.perplexity < bigram.score(run.held_out_ids, score.bytes).perplexity
    assert result.metrics["train_runtime"] < 180
