"""The one Trainer subclass of the scripts: what stock lacks, and nothing else."""

import inspect
import time
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_custom.hub import code_sha256, render_card


class CustomTrainer(Trainer):
    """Trainer that logs tokens per second and the parts of a loss beside it and writes this project's model card.

    The rate is that of training alone, since the last line; evaluation does not count. Parts are what a model returns
    under a name that ends in `_loss`. The card is written from `card_fields`, arguments of `render_card`; until they
    are set, stock's is.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.card_fields: dict | None = None
        if getattr(self.args, "save_trained_only", False) and not hasattr(self.model, "trained_state_dict"):
            raise ValueError(f"--save_trained_only: {type(self.model).__name__} has no frozen parts. Leave it out.")
        if self.args.include_num_input_tokens_seen == "no":
            self.args.include_num_input_tokens_seen = "all"
        self._clock_start = None
        self._clock_tokens = 0
        self._loss_parts: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and isinstance(outputs, dict):
            for name, value in outputs.items():
                if name.endswith("_loss"):
                    self._loss_parts.setdefault(name, []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        if self._clock_start is None:
            self._clock_start = time.perf_counter()
            self._clock_tokens = self.state.num_input_tokens_seen
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        if self._clock_start is not None:
            self._clock_start += time.perf_counter() - start
        return metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Without the logits of an evaluation that reads the loss alone, where the model can leave them out."""
        accepts = "return_logits" in inspect.signature(self.accelerator.unwrap_model(model).forward).parameters
        if prediction_loss_only and accepts and "labels" in inputs:
            inputs = {**inputs, "return_logits": False}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._clock_start is not None:
            tokens = self.state.num_input_tokens_seen - self._clock_tokens
            logs["tokens_per_second"] = round(tokens / (time.perf_counter() - self._clock_start), 1)
            self._clock_start = None
            for name, values in self._loss_parts.items():
                logs[name] = round(self.accelerator.gather(torch.stack(values).mean()).mean().item(), 4)
            self._loss_parts = {}
        # Without `start_time`, which would add the mean rate since the start, evaluation included, to every line.
        super().log(logs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        is_checkpoint = output_dir is not None and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        if is_checkpoint and getattr(self.args, "save_trained_only", False):
            state_dict = self.accelerator.unwrap_model(self.model).trained_state_dict()
        super()._save(output_dir, state_dict)

    def create_model_card(self, *args, **kwargs) -> None:
        if self.card_fields is None:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            model = self.accelerator.unwrap_model(self.model)
            render_card(model, code_hash=code_sha256(folder), **self.card_fields).save(folder / "README.md")
