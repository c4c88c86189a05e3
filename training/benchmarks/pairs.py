"""BLIP-2's two stages as contenders: pairs of an image and a text of real length, with the large parts frozen."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from training.benchmarks.texts import batches
from training.benchmarks.workloads import DROPOUTS, Train


def same_names(config, stock_class):
    """The fields of a configuration that stock has too."""
    known = set(stock_class().to_dict())
    return {name: value for name, value in config.to_dict().items() if name in known and name != "model_type"}


def stock_config(config) -> Blip2Config:
    """The stock configuration of the same model, with stock GPT-2."""
    return Blip2Config(
        vision_config=same_names(config.vision_config, Blip2Config.sub_configs["vision_config"]),
        qformer_config=same_names(config.qformer_config, Blip2Config.sub_configs["qformer_config"]),
        text_config={**config.text_config.to_dict(), "model_type": "gpt2"},
        num_query_tokens=config.num_query_tokens,
        image_text_hidden_size=config.image_text_hidden_size,
        image_token_index=config.image_token_index,
    )


class PlainStage1(nn.Module):
    """The three losses of the first stage in a plain loop over stock's modules: each pass by itself, padded, with all
    logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        config = model.config
        weights = model.state_dict()
        self.base = Blip2ForImageTextRetrieval(stock_config(config))
        self.base.load_state_dict({name: weights[name] for name in self.base.state_dict()})
        self.head = BertLMPredictionHead(BertConfig(**same_names(config.qformer_config, BertConfig)))
        prefix = "cls.predictions."
        self.head.load_state_dict({name: weights[prefix + name] for name in self.head.state_dict()})
        self.head.decoder.weight = self.base.embeddings.word_embeddings.weight
        self.head.decoder.bias = self.head.bias
        self.logit_scale = nn.Parameter(weights["logit_scale"].clone())
        self.write_token, self.smoothing = config.qformer_config.bos_token_id, config.label_smoothing

    @property
    def vision_model(self):
        return self.base.vision_model

    def forward(self, pixel_values, input_ids, attention_mask):
        from hf_custom.contrastive import draw_hard_negatives

        base, batch = self.base, len(input_ids)
        states = base.vision_model(pixel_values).last_hidden_state
        queries = base.query_tokens.expand(batch, -1, -1)
        count = queries.shape[1]

        def normalize(projection, hidden):
            return nn.functional.normalize(projection(hidden), dim=-1)

        image = normalize(base.vision_projection, base.qformer(queries, encoder_hidden_states=states)[0])
        text = base.qformer(base.embeddings(input_ids), query_length=0, attention_mask=attention_mask)[0]
        text = normalize(base.text_projection, text[:, 0])
        by_image = torch.einsum("bqe,ce->bcq", image, text).amax(-1) * self.logit_scale.exp()
        own = torch.arange(batch, device=by_image.device)
        contrast = sum(
            nn.functional.cross_entropy(logits, own, label_smoothing=self.smoothing)
            for logits in (by_image, by_image.t())
        )

        is_own = torch.eye(batch, dtype=torch.bool, device=by_image.device)
        wrong_images, wrong_texts = (draw_hard_negatives(logits, is_own)[0] for logits in (by_image.t(), by_image))
        ids = torch.cat((input_ids, input_ids, input_ids[wrong_texts]))
        mask = torch.cat((attention_mask, attention_mask, attention_mask[wrong_texts]))
        joint = base.qformer(
            base.embeddings(ids, query_embeds=base.query_tokens.expand(3 * batch, -1, -1)),
            query_length=count,
            attention_mask=nn.functional.pad(mask, (count, 0), value=1),
            encoder_hidden_states=torch.cat((states, states[wrong_images], states)),
        )[0]
        labels = torch.cat((torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)))
        matching = nn.functional.cross_entropy(base.itm_head(joint[:, :count]).mean(1), labels)

        written = input_ids.clone()
        written[:, 0] = self.write_token
        length = count + input_ids.shape[1]
        places = torch.arange(length, device=own.device)
        sees = (places[None] < count) | ((places[:, None] >= count) & (places[None] <= places[:, None]))
        sees = sees[None, None] & nn.functional.pad(attention_mask, (count, 0), value=1).bool()[:, None, None]
        spoken = base.qformer(
            base.embeddings(written, query_embeds=queries),
            query_length=count,
            attention_mask=sees,
            encoder_hidden_states=states,
        )[0][:, count:]
        targets = input_ids.masked_fill(attention_mask == 0, -100)
        logits = self.head(spoken[:, :-1]).float().flatten(0, 1)
        writing = nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), label_smoothing=self.smoothing)
        return contrast / 2 + matching + writing


class Stage(Train):
    """Training steps on pairs, a stage's frozen parts frozen in every contender."""

    def read(self):
        """The preset's configuration, with the dropout of the contender."""
        from hf_custom.presets import preset_config

        config = preset_config(self.spec["preset"], frozen_modules=["vision_model", "language_model"])
        if config.image_token_index is None:
            config.image_token_index = config.text_config.vocab_size - 1
        for part in (config.qformer_config, config.text_config):
            for name in DROPOUTS:
                if self.setting["dropout"] is not None and hasattr(part, name):
                    setattr(part, name, self.setting["dropout"])
        return config

    def pairs(self, config):
        """Batches of ids, and of random pixels that are the same for every contender."""
        documents = json.loads(Path(self.spec["documents"]).read_text())
        generator = torch.Generator().manual_seed(0)
        for batch in batches(documents, self.spec["batch_size"]):
            shape = (len(batch["input_ids"]), 3, *config.vision_config.image_shape)
            yield {**batch, "pixel_values": torch.randn(shape, generator=generator)}

    def start(self, model, batches):
        self.model = model.to(self.device).train()
        self.batches = [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches]
        if self.setting["cached_features"]:
            for batch in self.batches:
                with torch.no_grad(), self.autocast():
                    states = self.model.vision_model.eval()(batch.pop("pixel_values")).last_hidden_state
                batch["vision_hidden_states"] = states
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def loss(self, batch):
        with self.autocast():
            found = self.model(**batch)
        return found if isinstance(found, torch.Tensor) else found.loss

    def round(self):
        for batch in self.batches:
            self.loss(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def proof(self):
        """The first batch's loss, and the norm of its gradient by what is trained."""
        dropouts = [(module, module.p) for module in self.model.modules() if isinstance(module, nn.Dropout)]
        for module, _ in dropouts:
            module.p = 0.0
        loss = self.loss(self.batches[0])
        loss.backward()
        norm = torch.stack([weight.grad.norm() for weight in self.trained if weight.grad is not None]).norm()
        self.optimizer.zero_grad()
        for module, p in dropouts:
            module.p = p
        return {"loss": loss.detach().float(), "gradient norm": norm}


class Pretrain(Stage):
    """The first stage."""

    def build(self):
        from hf_custom import CustomBlip2ForPreTraining

        torch.manual_seed(0)
        model = CustomBlip2ForPreTraining._from_config(self.read())
        pairs = [{k: v for k, v in batch.items() if k != "labels"} for batch in self.pairs(model.config)]
        if self.setting["library"] == "stock":
            model = PlainStage1(model)
            model.vision_model.requires_grad_(False)
        self.start(model, pairs)


class Caption(Stage):
    """The second stage, writing a text behind an image."""

    def build(self):
        from hf_custom import CustomBlip2ForConditionalGeneration

        torch.manual_seed(0)
        model = CustomBlip2ForConditionalGeneration._from_config(self.read())
        config = model.config
        pairs = []
        for batch in self.pairs(config):
            places = len(batch["input_ids"]), config.num_query_tokens
            fills = {"input_ids": config.image_token_index, "attention_mask": 1, "labels": -100}
            for name, fill in fills.items():
                batch[name] = torch.cat((torch.full(places, fill), batch[name]), dim=1)
            pairs.append(batch)
        if self.setting["library"] == "stock":
            weights = model.state_dict()
            model = Blip2ForConditionalGeneration._from_config(stock_config(config))
            model.load_state_dict(weights)
            model.vision_model.requires_grad_(False)
            model.language_model.requires_grad_(False)
        self.start(model, pairs)
