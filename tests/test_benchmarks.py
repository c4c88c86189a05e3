"""The benchmarks: what they compare is equal or no ratio is shown, and their texts have the padding they claim."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from training.benchmarks import __main__ as benchmarks
from training.benchmarks import trainer
from training.benchmarks.contenders import OURS, STOCK, Comparison, Setting, comparisons, sweeps
from training.benchmarks.report import flops_per_token, plot_sweeps, summary, table, write
from training.benchmarks.texts import batches, draw_documents, full_documents, shorten
from training.benchmarks.worker import WORKLOADS, answer

MACHINE = {
    "device": "a processor",
    "threads": 2,
    "torch": "2",
    "transformers": "5",
    "matrix_flops": {"float32": 1e12, "bfloat16": 2e12},
    "bandwidth": 1e10,
}
CONFIG = {"n_layer": 2, "n_embd": 32, "vocab_size": 99, "n_positions": 64}


def checkpoint_for(name, folder):
    """A small stock checkpoint of the family that the benchmark measures."""
    torch.manual_seed(0)
    if benchmarks.NAMES[name] == "gpt2":
        config = GPT2Config(**CONFIG, n_head=4, bos_token_id=1, eos_token_id=1, initializer_range=0.2)
        model = GPT2LMHeadModel(config)
    else:
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        model = BertForMaskedLM(BertConfig(**sizes, vocab_size=99, initializer_range=0.2))
    model.save_pretrained(folder / "model")
    return str(folder / "model")


def spec_of(setting, checkpoint, folder, **shape):
    documents = [torch.randint(2, 99, (length,)).tolist() for length in (30, 7, 12, 1)]
    (folder / "documents.json").write_text(json.dumps(documents))
    return {
        "setting": setting.spec(),
        "device": "cpu",
        "checkpoint": checkpoint,
        "documents": str(folder / "documents.json"),
        "proofs": str(folder / setting.name),
        "batch_size": 2,
        **shape,
    }


@pytest.mark.parametrize("name", ["train", "mlm", "encode", "sentences", "decode"])
def test_contenders_compute_the_same(name, tmp_path):
    checkpoint, proofs = checkpoint_for(name, tmp_path), []
    for setting in (STOCK, Setting("stock", group_by_length=True), OURS):
        if name not in ("train", "mlm") and setting.group_by_length:
            continue
        torch.manual_seed(1)
        spec = spec_of(setting, checkpoint, tmp_path, new_tokens=5)
        workload = WORKLOADS[name](spec)
        proofs.append(answer(workload, "proof", spec)["path"])
        assert answer(workload, "round", spec)["seconds"] > 0
        assert answer(workload, "memory", spec)["process"] > 0
        is_ours = type(workload.model).__name__.startswith("Custom")
        assert is_ours == (setting.library == "ours")
    for path in proofs[:-1]:
        assert benchmarks.disagreement(path, proofs[-1], 1e-5) is None


@pytest.mark.parametrize("name", ["pretrain", "caption"])
def test_stages_compute_the_same(name, tmp_path):
    """Of a plain loop over stock's modules, of ours, and of ours from kept states of the tower."""
    proofs, norms = [], []
    for setting in (STOCK, Setting("ours", cached_features=True), OURS):
        torch.manual_seed(1)
        spec = spec_of(setting, "", tmp_path, preset="blip2-mini", batch_size=4)
        workload = WORKLOADS[name](spec)
        assert type(workload.model).__name__.startswith("Custom") == (setting.library == "ours")
        assert ("vision_hidden_states" in workload.batches[0]) == setting.cached_features
        frozen = {part for part, weight in workload.model.named_parameters() if not weight.requires_grad}
        assert frozen and all("vision_model" in part or "language_model" in part for part in frozen)
        # By which the wrong partners are drawn.
        torch.manual_seed(2)
        proofs.append(answer(workload, "proof", spec)["path"])
        assert answer(workload, "round", spec)["seconds"] > 0
        norms.append(torch.load(proofs[-1])["gradient norm"])
    for path in proofs[:-1]:
        assert benchmarks.disagreement(path, proofs[-1], 1e-5) is None
    assert norms[-1] > 0


@pytest.mark.parametrize("name", ["train", "mlm", "pretrain", "caption"])
def test_dropout_is_set_in_every_family(name, tmp_path):
    checkpoint = "" if name in ("pretrain", "caption") else checkpoint_for(name, tmp_path)
    spec = spec_of(Setting("stock", dropout=0.3), checkpoint, tmp_path, preset="blip2-mini")
    found = {module.p for module in WORKLOADS[name](spec).model.modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {0.3}


def test_translators_compute_the_same(tmp_path):
    """Marian with our weights and positions, and ours; grouped by length as well."""
    proofs = []
    for setting in (STOCK, Setting("stock", group_by_length=True), OURS):
        setting = replace(setting, dropout=0.0)
        torch.manual_seed(1)
        spec = spec_of(setting, "", tmp_path, preset="transformer-mini")
        workload = WORKLOADS["translate"](spec)
        assert type(workload.model).__name__.startswith("Custom") == (setting.library == "ours")
        proofs.append(answer(workload, "proof", spec)["path"])
        assert answer(workload, "round", spec)["seconds"] > 0
    for path in proofs[:-1]:
        assert benchmarks.disagreement(path, proofs[-1], 1e-5) is None


def test_every_benchmark_is_compared():
    compared = {"train", "mlm", "encode", "sentences", "decode", "loss", "pretrain", "caption", "translate"}
    assert compared == set(benchmarks.NAMES) == set(WORKLOADS)


def test_losses_compute_the_same(tmp_path):
    proofs = []
    for library in ("stock", "torch", "ours"):
        setting = Setting(library)
        spec = spec_of(setting, "", tmp_path, rows=40, width=16, vocab_size=99)
        proofs.append(answer(WORKLOADS["loss"](spec), "proof", spec)["path"])
    for path in proofs[:-1]:
        assert benchmarks.disagreement(path, proofs[-1], 1e-5) is None


@pytest.mark.parametrize(
    "other, reason",
    [
        ({"loss": torch.tensor(1.01)}, "loss off by 1.0e-02, allowed 1e-04"),
        ({"loss": torch.tensor(float("nan"))}, "loss off by nan"),
        ({"loss": torch.ones(2)}, r"loss: \(2,\) is not \(\)"),
    ],
    ids=["value", "nan", "shape"],
)
def test_difference_is_named(other, reason, tmp_path):
    torch.save({"loss": torch.tensor(1.0)}, tmp_path / "a.pt")
    torch.save(other, tmp_path / "b.pt")
    with pytest.raises(AssertionError, match=reason):
        assert benchmarks.disagreement(tmp_path / "b.pt", tmp_path / "a.pt", 1e-4) is None


def test_first_different_token_is_named(tmp_path):
    torch.save({"tokens": torch.tensor([[1, 2, 3]])}, tmp_path / "a.pt")
    torch.save({"tokens": torch.tensor([[1, 2, 4]])}, tmp_path / "b.pt")
    assert benchmarks.disagreement(tmp_path / "b.pt", tmp_path / "a.pt", 1.0) == "tokens differ from place 2 on"


def contender(name, seconds, disagreement=None):
    return {
        "name": name,
        "bf16": False,
        "disagreement": disagreement,
        "seconds": seconds,
        "spread": 0.1,
        "tokens_per_second": 100 / seconds,
        "peak_memory": 10**9 * seconds,
    }


def result_of(*contenders, group="", title="real lengths"):
    row = {"group": group, "title": title, "tokens": 100, "padding": 0.5, "batch": [[4, 50]], "shape": {}}
    return {
        "name": "train",
        "preset": "tiny",
        "texts": "books",
        "machine": MACHINE,
        "config": CONFIG,
        "rows": [{**row, "contenders": list(contenders)}],
    }


def test_ratio_is_shown_of_equal_outputs_alone():
    text = table(result_of(contender("stock", 3.0), contender("stock, bf16", 2.0, "loss off"), contender("ours", 1.5)))
    rows = {cells[1].strip(): cells for line in text.splitlines() if len(cells := line.split("|")) > 3}
    assert rows["stock"][7].strip() == "2.00 x as fast" and rows["stock"][8].strip() == "0.50 of it"
    assert rows["stock, bf16"][7].strip() == "no ratio: loss off" and not rows["stock, bf16"][8].strip()
    assert "50% padding" in text


def test_no_share_of_the_machine_is_claimed_of_pairs():
    text = table({**result_of(contender("stock", 3.0), contender("ours", 1.5)), "name": "pretrain"})
    cells = next(line.split("|") for line in text.splitlines() if line.startswith("| stock"))
    assert not cells[5].strip() and cells[7].strip() == "2.00 x as fast"


def test_flops_are_six_a_weight_and_token():
    weights = 12 * 2 * 32**2 + 99 * 32
    assert flops_per_token(CONFIG, 0) == 6 * weights
    # Scores and mixed values, 2 products of 2 T D / 2 operations a token when causal, three times with the gradient.
    assert flops_per_token(CONFIG, 50) - flops_per_token(CONFIG, 0) == 3 * 2 * 2 * (2 * 32 * 50 / 2)


def test_flops_of_masked_tokens_and_of_states():
    blocks, head = 12 * 2 * 32**2, 0.15 * (99 * 32 + 32**2)
    assert flops_per_token(CONFIG, 0, is_masked=True) == pytest.approx(6 * (blocks + head))
    # Both ways: twice the pairs.
    pairs = flops_per_token(CONFIG, 50) - flops_per_token(CONFIG, 0)
    assert flops_per_token(CONFIG, 50, is_masked=True, has_head=False) == 6 * blocks + 2 * pairs


def test_masks_are_those_of_the_document():
    documents = [torch.randint(5, 99, (length,)).tolist() for length in (40, 1, 12)]
    (batch,) = batches(documents, 3, mask_token_id=4)
    hidden = batch["labels"] != -100
    assert hidden.sum(-1).tolist() == [6, 1, 2] and (batch["input_ids"][hidden] == 4).all()
    alone = [batches([ids], 1, mask_token_id=4)[0]["labels"][0].tolist() for ids in documents]
    assert [row[: len(ids)].tolist() for row, ids in zip(batch["labels"], documents, strict=True)] == alone


def test_sentences_are_shorter_than_paragraphs():
    lengths = [
        [len(ids) for ids in draw_documents(None, 2000, 40, 512, kind="wordpiece", are_sentences=are_sentences)]
        for are_sentences in (False, True)
    ]
    assert sum(lengths[1]) < 0.7 * sum(lengths[0])


def test_results_are_written_whole(tmp_path):
    result = result_of(contender("stock", 3.0), contender("ours", 1.0), group="share of padding")
    write(result, tmp_path, "train-tiny")
    plot_sweeps(result, tmp_path / "train-tiny.png")
    assert json.loads((tmp_path / "train-tiny.json").read_text()) == result
    assert "Lengths and ids from books." in (tmp_path / "train-tiny.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-tiny.json", "train-tiny.md", "train-tiny.png"]


def test_documents_are_real_and_seeded():
    documents = draw_documents(None, 50257, 40, 64)
    assert documents == draw_documents(None, 50257, 40, 64) != draw_documents(None, 50257, 40, 64, seed=1)
    assert len(documents) == 40 and len({len(ids) for ids in documents}) > 10 and max(map(len, documents)) <= 64
    assert [len(ids) for ids in full_documents(None, 50257, 3, 50)] == [50] * 3


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75])
def test_documents_are_shortened_to_share_of_padding(share):
    documents = shorten([[1] * 200] * 8, share)
    padding = 1 - sum(map(len, documents)) / (8 * 200)
    assert len(documents[0]) == 200 and abs(padding - share) < 0.05


def test_grouping_leaves_less_padding():
    documents = draw_documents(None, 50257, 64, 256)
    padding = [sum(int((b["attention_mask"] == 0).sum()) for b in batches(documents, 8, group)) for group in (0, 1)]
    assert padding[1] < 0.5 * padding[0]
    batch = batches(documents, 8)[0]
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_benchmark_has_rows(device):
    rows = [row for name in benchmarks.NAMES for row in comparisons(name, device)]
    rows += [row for members in sweeps(device).values() for row in members]
    # What kept states of the tower save is said beside ours without them.
    kept = [row for row in rows if row.ours.cached_features]
    assert len(kept) == 1 and kept[0].stock == (replace(kept[0].ours, cached_features=False),)
    others = [row for row in rows if row not in kept]
    assert all(row.ours.library == "ours" and row.stock[0].library == "stock" for row in others)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "--rounds", "4"], "--rounds is 4"),
        (["train", "--preset", "gpt3"], "--preset 'gpt3' is unknown to train"),
        (["mlm", "--preset", "gpt2"], "--preset 'gpt2' is unknown to mlm"),
        (["decode", "--sweep"], "--sweep draws training"),
        (["loss", "--only", "nothing"], "no row's title contains 'nothing'"),
    ],
    ids=" ".join,
)
def test_mistake_is_one_line(argv, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        benchmarks.main(argv)


def test_command_measures_and_writes(tmp_path, monkeypatch, capsys):
    small = Comparison("a few rows", OURS, (STOCK,), {"rows": 64, "width": 32})
    monkeypatch.setattr(benchmarks, "machine", lambda device: MACHINE)
    monkeypatch.setattr(benchmarks, "comparisons", lambda name, device: [small])
    benchmarks.main(["loss", "--preset", "gpt2-mini", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "loss-gpt2-mini-cpu.json").read_text())
    contenders = result["rows"][0]["contenders"]
    assert [row["name"] for row in contenders] == ["stock", "ours"]
    assert all(row["disagreement"] is None and len(row["rounds"]) == 5 for row in contenders)
    assert "x as fast" in capsys.readouterr().out


def test_readme_shows_the_results_that_are_kept():
    root = Path(__file__).parent.parent
    shown = summary(root / "training" / "benchmarks" / "results", "cpu")
    assert shown in (root / "README.md").read_text()
    assert len(shown.splitlines()) > 8


def test_trainer_is_measured_beside_stock_where_both_train_alike(tmp_path, capsys):
    flags = "--preset gpt2-mini --rounds 1 --steps 6 --batch_size 1 --length 16 --output".split()
    trainer.main([*flags, str(tmp_path)])
    result = json.loads(
        (tmp_path / f"trainer-gpt2-mini-{'cuda' if torch.cuda.is_available() else 'cpu'}.json").read_text()
    )
    seconds = result["seconds"]
    counts = {"steps": 2, "steps_beside_sealing": 1, "saves": 2}
    assert [{kind: len(seconds[name][kind]) for kind in counts} for name in ("stock", "ours")] == [counts, counts]
    # The save in the middle is judged by the next step's loss.
    assert [len(seconds["ours"][kind]) for kind in ("seals", "looks")] == [2, 1]
    assert "overhead: step" in capsys.readouterr().out
