"""BLIP-2's first stage: its three losses against naive loops, the draw of wrong partners, several processes as one."""

import math
import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from reference import assert_gradients_near, assert_near, gradients_of, smoothed_cross_entropy
from tiny import VISION, widen
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from hf_custom import CustomBlip2Config, CustomBlip2ForImageTextRetrieval, CustomBlip2ForPreTraining
from hf_custom.contrastive import contrastive_logits, contrastive_loss, draw_hard_negatives, same_text

VOCAB, BOS = 40, 39
QFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "use_qformer_text_input": True,
    "bos_token_id": BOS,
}
TEXT = {
    "model_type": "custom_gpt2",
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
LOSSES = ("itc_loss", "itm_loss", "itg_loss")
BATCH, QUERIES, SEED = 4, 3, 5


def make_config(**fields):
    parts = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": dict(TEXT)}
    fields = {"num_query_tokens": QUERIES, "image_text_hidden_size": 8, "frozen_modules": [], **fields}
    return CustomBlip2Config(**parts, **fields)


def build(attn_implementation="sdpa", **fields):
    """For training, with wide weights, in float64: a gradient of its norms is a small difference of large terms."""
    config = make_config(**fields)
    model = widen(CustomBlip2ForPreTraining._from_config(config, attn_implementation=attn_implementation)).double()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(6.0))
    return model.train()


# Real tokens of each row of six, and which row's text each repeats.
TEXTS = {
    "without padding": ([6, 6, 6, 6], [0, 1, 2, 3]),
    "right padding": ([6, 3, 5, 2], [0, 1, 2, 3]),
    "left padding": ([4, 6, 2, 5], [0, 1, 2, 3]),
    "repeated": ([4, 5, 4, 6], [0, 1, 0, 3]),
    "all the same": ([4, 4, 4, 4], [0, 0, 0, 0]),
}
each_text = pytest.mark.parametrize("kind", TEXTS)


def draw_pairs(kind="right padding", dtype=torch.float64):
    lengths, repeats = TEXTS[kind]
    ids, mask = torch.randint(1, VOCAB - 1, (BATCH, 6))[repeats], torch.zeros(BATCH, 6, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if kind == "left padding" else slice(0, length)] = 1
    # What stands at padding makes texts no different.
    ids = torch.where(mask == 1, ids, torch.arange(BATCH)[:, None])
    pixel_values = torch.randn(BATCH, 3, *VISION["image_size"], dtype=dtype)
    return {"pixel_values": pixel_values, "input_ids": ids, "attention_mask": mask}


def step(model, inputs, **kwargs):
    set_seed(SEED)
    return model(**inputs, **kwargs)


def all_gradients(model, objective):
    """Gradient by parameter, zero for one that `objective` leaves out."""
    found = gradients_of(model, objective)
    return {name: found.get(name, torch.zeros_like(weight)) for name, weight in model.named_parameters()}


# --- The losses, pair by pair (Li et al. 2023, section 3.2) ---


class Naive:
    """The losses by a model's parts, called for one image and one text without padding at a time."""

    def __init__(self, model, inputs):
        self.model, self.config = model, model.config
        self.smoothing = model.config.label_smoothing
        model.set_attn_implementation("eager")
        self.images = model.vision_model(inputs["pixel_values"]).last_hidden_state.split(1)
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        self.texts = [ids[mask == 1] for ids, mask in pairs]
        self.positive = [[torch.equal(one, other) for other in self.texts] for one in self.texts]

    def states(self, ids, image=None, mode="bidirectional"):
        """States (1, Q + T, D) of queries, if there is an image to read, and text."""
        queries = self.model.query_tokens if image is not None else None
        embeds = queries if ids is None else self.model.embeddings(ids[None], query_embeds=queries)
        num_queries = 0 if image is None else QUERIES
        return self.model.qformer(
            embeds, num_queries, encoder_hidden_states=image, attention_mode=mode
        ).last_hidden_state

    def similarities(self):
        """Rows of images, columns of texts: that of the best query, over the temperature."""
        project = self.model.vision_projection
        images = [project(self.states(None, image)[0]) for image in self.images]
        texts = [self.model.text_projection(self.states(ids)[0, 0]) for ids in self.texts]
        scale = min(self.model.logit_scale.exp()[0], torch.tensor(100.0, dtype=torch.float64))

        def of_pair(image, text):
            cosines = [query @ text / (query.norm() * text.norm()) for query in image]
            return scale * max(cosines, key=lambda cosine: cosine.item())

        return torch.stack([torch.stack([of_pair(image, text) for text in texts]) for image in images])

    def contrast(self):
        """Mean of an image's choice among texts and a text's among images."""
        logits = self.similarities()
        of_images, of_texts = (naive_contrast(rows, self.positive, self.smoothing) for rows in (logits, logits.t()))
        return (of_images + of_texts) / 2

    def matching(self):
        terms = self.matching_terms()
        return sum(terms) / len(terms)

    def matching_terms(self):
        """With the wrong partners that the model draws: an image for each text, then a text for each image."""
        logits, positive = self.similarities().detach(), torch.tensor(self.positive)
        set_seed(SEED)
        images, texts = draw_hard_negatives(logits.t(), positive)[0], draw_hard_negatives(logits, positive)[0]
        rows, terms = range(BATCH), []
        pairs = [(row, row, 1) for row in rows]
        pairs += [(int(images[row]), row, 0) for row in rows] + [(row, int(texts[row]), 0) for row in rows]
        for image, text, label in pairs:
            states = self.states(self.texts[text], self.images[image])[0, :QUERIES]
            scores = sum(self.model.itm_head(state) for state in states) / QUERIES
            if label or not self.positive[image][text]:
                terms.append(scores.exp().sum().log() - scores[label])
        return terms

    def generation(self):
        predictions, logits, labels = self.model.cls.predictions, [], []
        for image, ids in zip(self.images, self.texts, strict=True):
            written = torch.cat((torch.tensor([BOS]), ids[1:]))
            states = self.states(written, image, "multimodal_causal")[0, QUERIES:]
            for t in range(len(ids) - 1):
                row = predictions.transform(states[t])
                logits.append(self.model.embeddings.word_embeddings.weight @ row + predictions.bias)
                labels.append(ids[t + 1])
        return smoothed_cross_entropy(torch.stack(logits), torch.stack(labels), label_smoothing=self.smoothing)


def naive_contrast(logits, positive, smoothing):
    """Cross-entropy of each row with its positives sharing the target, of which a part is spread over all."""
    terms = []
    for row in range(len(logits)):
        count = sum(bool(is_positive) for is_positive in positive[row])
        partition = sum(logit.exp() for logit in logits[row]).log()
        for column, logit in enumerate(logits[row]):
            target = (1 - smoothing) * bool(positive[row][column]) / count + smoothing / len(logits[row])
            terms.append(target * (partition - logit))
    return sum(terms) / len(logits)


@each_text
def test_losses_match_naive_and_grad(kind):
    model, inputs = build(), draw_pairs(kind)
    outputs = step(model, inputs)
    found = {name: all_gradients(model, step(model, inputs)[name]) for name in LOSSES}
    naive = Naive(model, inputs)
    assert_near(outputs.loss, sum(outputs[name] for name in LOSSES), 1e-6)
    assert_near(outputs.logits_per_image, naive.similarities())
    assert_near(outputs.logits_per_text, naive.similarities().t())
    # Texts that are all the same have no wrong partner.
    assert len(naive.matching_terms()) == (BATCH if kind == "all the same" else 3 * BATCH)
    assert outputs.itm_logits.shape == (3 * BATCH, 2)
    for name, method in zip(LOSSES, (Naive.contrast, Naive.matching, Naive.generation), strict=True):
        expected = method(Naive(model, inputs))
        assert_near(outputs[name], expected, 1e-6, name, scale_floor=0.0)
        assert_gradients_near(found[name], all_gradients(model, expected))


def test_every_parameter_learns_and_gradients_are_finite():
    model = build()
    gradients = gradients_of(model, step(model, draw_pairs("repeated")).loss)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def test_scale_of_similarities_has_a_limit():
    model, inputs = build(), draw_pairs()
    plain = step(model, inputs).logits_per_image / model.logit_scale.exp()
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    outputs = step(model, inputs)
    assert_near(outputs.logits_per_image, 100 * plain)
    assert not gradients_of(model, outputs.itc_loss)["logit_scale"].any()


def test_temperature_of_a_fresh_model_is_that_of_the_configuration():
    model = CustomBlip2ForPreTraining(make_config(itc_temperature=0.2))
    assert_near(model.logit_scale.exp(), torch.tensor([1 / 0.2]), 1e-6)


@pytest.mark.parametrize("weights", [(2.0, 0.0, 0.5), (0, 3, 0), (0.0, 0.0, 1.0), (0.0, 0.25, 1.5)], ids=str)
def test_loss_of_weight_zero_is_left_out(weights):
    model, inputs = build(), draw_pairs("repeated")
    # Nothing else draws numbers, so that the wrong partners are the same.
    everything = step(model, inputs)
    for name, weight in zip(LOSSES, weights, strict=True):
        setattr(model.config, f"{name}_weight", weight)
    outputs = step(model, inputs)
    assert [name not in outputs for name in LOSSES] == [weight == 0 for weight in weights]
    expected = sum(weight * everything[name] for name, weight in zip(LOSSES, weights, strict=True))
    assert_near(outputs.loss, expected, 1e-6)


@pytest.mark.parametrize("length", [1, 6], ids=["alone", "before padding"])
def test_texts_of_one_token_have_nothing_to_write(length):
    model, inputs = build(), draw_pairs()
    inputs["input_ids"] = inputs["input_ids"][:, :length]
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["attention_mask"][:, 0] = 1
    outputs = step(model, inputs)
    assert outputs.itg_loss == 0 and outputs.itc_loss > 0 and outputs.itm_loss > 0
    assert_near(outputs.loss, outputs.itc_loss + outputs.itm_loss, 1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients_of(model, outputs.loss).values())


def test_no_loss_is_computed_unless_asked_for():
    model, inputs = build().eval(), draw_pairs()
    outputs, expected = step(model, inputs, return_loss=False), step(model, inputs)
    assert outputs.loss is outputs.itm_logits is None and not any(name in outputs for name in LOSSES)
    assert_near(outputs.logits_per_image, expected.logits_per_image)


def test_states_of_the_tower_stand_for_images_and_grad():
    model, inputs = build(frozen_modules=["vision_model"]), draw_pairs()
    images = inputs.pop("pixel_values")
    states = model.vision_model(images).last_hidden_state
    found = step(model, {**inputs, "vision_hidden_states": states})
    expected = step(model, {**inputs, "pixel_values": images})
    for name in (*LOSSES, "itm_logits", "image_embeds"):
        assert_near(found[name], expected[name], name=name)
    assert_gradients_near(gradients_of(model, found.loss), gradients_of(model, expected.loss))


@pytest.mark.parametrize("kind", ["right padding", "repeated"])
def test_checkpointing_changes_nothing_and_grad(kind):
    """Which keeps no queries, so that they are computed again with the text that they are written to."""
    model, inputs = build(), draw_pairs(kind)
    expected = step(model, inputs)
    expected_gradients = gradients_of(model, expected.loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs = step(model, inputs)
    for name in LOSSES:
        assert_near(outputs[name], expected[name], 1e-6, name)
    assert_gradients_near(gradients_of(model, outputs.loss), expected_gradients)


def test_trained_model_scores_pairs_as_it_was_trained(tmp_path):
    model, inputs = build().float().eval(), draw_pairs(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    scorer, report = CustomBlip2ForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    outputs = step(model, inputs)
    assert_near(6.0 * scorer(**inputs).logits_per_image, outputs.logits_per_image)
    scores = scorer(**inputs, use_image_text_matching_head=True).logits_per_image
    assert_near(scores, outputs.itm_logits[:BATCH])


# --- Contrast and wrong partners ---


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_contrastive_loss_matches_naive_and_grad(smoothing):
    logits = (3 * torch.randn(3, 6, dtype=torch.float64)).requires_grad_()
    positive = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    found, expected = contrastive_loss(logits, positive, smoothing), naive_contrast(logits, positive, smoothing)
    assert_near(found, expected, 1e-6, scale_floor=0.0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    assert_near(*gradients, 1e-6)


def test_best_query_counts():
    images, texts = torch.randn(3, 2, 5), torch.randn(4, 5)
    for i in range(3):
        for j in range(4):
            expected = max(float(query @ texts[j]) for query in images[i])
            assert float(contrastive_logits(images, texts)[i, j]) == pytest.approx(expected, abs=1e-6)


def test_same_text_compares_every_token():
    ids = torch.tensor([[1, 2, 3], [1, 2, -1], [1, 2, 3], [4, 2, 3]])
    expected = [[one == other for other in ids.tolist()] for one in ids[1:3].tolist()]
    assert same_text(ids[1:3], ids).tolist() == expected


def test_wrong_partners_are_drawn_by_their_similarity():
    """Ten thousand draws: each frequency within four standard deviations of the softmax over the wrong ones."""
    rows, count = 500, 10_000
    positive = torch.ones(rows, rows, dtype=torch.bool)
    positive[:, [0, 2, 3, 7]] = False
    logits = torch.full((rows, rows), 9.0)
    logits[:, [0, 2, 3, 7]] = torch.tensor([1.0, 0.0, -1.5, 2.0])
    drawn = [draw_hard_negatives(logits, positive) for _ in range(count // rows)]
    assert all(has_any.all() for _, has_any in drawn)
    found = Counter(torch.cat([columns for columns, _ in drawn]).tolist())
    assert found.keys() == {0, 2, 3, 7}
    chances = logits[0, [0, 2, 3, 7]].softmax(-1).tolist()
    for column, chance in zip((0, 2, 3, 7), chances, strict=True):
        assert abs(found[column] - count * chance) <= 4 * math.sqrt(count * chance * (1 - chance)), column


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["near", "far apart"])
def test_wrong_partner_is_never_a_right_one(scale):
    """However similar the right ones are, and a row of right ones alone says so."""
    positive = torch.eye(6, dtype=torch.bool)
    positive[1, 4] = positive[4, 1] = True
    positive[3] = True
    logits = scale * (torch.randn(6, 6) + 5.0 * positive)
    for _ in range(200):
        columns, has_any = draw_hard_negatives(logits, positive)
        assert has_any.tolist() == [True, True, True, False, True, True]
        assert not positive[torch.arange(6), columns][has_any].any()
        if scale > 1.0:
            assert torch.equal(columns[has_any], logits.masked_fill(positive, -math.inf).argmax(-1)[has_any])


def test_rows_and_calls_draw_for_themselves():
    positive, logits = torch.eye(40, dtype=torch.bool), torch.zeros(40, 40)
    draws = [draw_hard_negatives(logits, positive)[0] for _ in range(2)]
    assert not torch.equal(*draws) and len(draws[0].unique()) > 10


# --- How it runs ---


class WaitsOf(TorchDispatchMode):
    """Operations that read what an accelerator computes, by the file of the package that called them."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.NAMES or (name == "index" and any(self._is_mask(index) for index in args[1])):
            self.found[self._caller(), name] += 1
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _is_mask(index):
        return index is not None and index.dtype in (torch.bool, torch.uint8)

    @staticmethod
    def _caller():
        frame = sys._getframe(1)
        while frame is not None and Path(frame.f_code.co_filename).parent.name != "hf_custom":
            frame = frame.f_back
        return None if frame is None else Path(frame.f_code.co_filename).name


def test_losses_wait_for_no_accelerator():
    """But to leave out positions without a token to write; refusals of bad input run on the CPU alone."""
    model, inputs = build(), draw_pairs()
    with WaitsOf() as waits:
        step(model, inputs).loss.backward()
    of_losses = {key: count for key, count in waits.found.items() if key[0] != "checks.py"}
    assert waits.found != of_losses
    files = ("contrastive.py", "modeling_blip2_retrieval.py", "losses.py", "modeling_blip2.py")
    found = {key: count for key, count in of_losses.items() if key[0] in files}
    assert found == {("modeling_blip2_retrieval.py", "nonzero"): 1, ("losses.py", "nonzero"): 1}


def test_fresh_model_learns_pairs_with_the_tower_frozen():
    model = CustomBlip2ForPreTraining(make_config(frozen_modules=["vision_model", "language_model"])).train()
    ids, images = torch.randint(1, VOCAB - 1, (8, 6)), torch.randn(8, 3, *VISION["image_size"])
    tower = {name: weight.clone() for name, weight in model.vision_model.named_parameters()}
    assert not model.vision_model.training and model.qformer.training
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=3e-3)
    history = []
    for _ in range(30):
        outputs = model(images, ids)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        history.append([outputs[name].item() for name in ("loss", *LOSSES)])
    assert history[-1][0] < 0.75 * history[0][0], history
    assert all(last < first for first, last in zip(history[0], history[-1], strict=True)), history
    for name, weight in model.vision_model.named_parameters():
        assert weight.grad is None and torch.equal(weight, tower[name]), name


# --- Several processes ---


def two_cases():
    """Pairs that differ in length, of which some repeat those of the other process."""
    set_seed(3)
    return [draw_pairs(kind, torch.float32) for kind in ("right padding", "repeated")]


def losses_and_gradients(run, model, inputs):
    """Of a step of `model`, called by `run`; means over the processes if there are any."""
    model.zero_grad()
    outputs = step(run, inputs)
    outputs.loss.backward()
    losses = torch.stack([outputs[name].detach() for name in LOSSES])
    if distributed.is_initialized():
        distributed.all_reduce(losses)
        losses = losses / distributed.get_world_size()
    return losses, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def train_as_one_of_two(rank, folder):
    """What each process of the test below does: a step a case, of DDP, with its half of the pairs."""
    store, half = f"file://{folder}/store", BATCH // 2
    distributed.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    set_seed(0)
    model = build().float()
    run, found = DistributedDataParallel(model), []
    for inputs in two_cases():
        part = {name: tensor[rank * half : (rank + 1) * half] for name, tensor in inputs.items()}
        found.append(losses_and_gradients(run, model, part))
    if rank == 0:
        torch.save(found, folder / "found.pt")
    distributed.barrier()
    # Without taking the group apart, in which gloo may wait for a process that is gone.
    os._exit(0)


def test_two_processes_learn_as_one_with_the_joint_batch(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, rank], env=environment, stderr=subprocess.PIPE) for rank in ("0", "1")]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    found = torch.load(tmp_path / "found.pt")
    set_seed(0)
    model = build().float()
    for inputs, (losses, gradients) in zip(two_cases(), found, strict=True):
        expected_losses, expected_gradients = losses_and_gradients(model, model, inputs)
        assert_near(losses, expected_losses)
        assert_gradients_near(gradients, expected_gradients)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_as_one_of_two(int(sys.argv[2]), Path(sys.argv[1]))
