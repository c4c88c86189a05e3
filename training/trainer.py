"""The one Trainer subclass of the scripts: what stock lacks, and nothing else."""

import inspect
import time
from pathlib import Path

from transformers import Trainer

from hf_custom.hub import code_sha256, render_card


class CustomTrainer(Trainer):
    """Trainer that logs tokens per second beside the loss and writes this project's model card.

    The rate is that of training alone, since the last line; evaluation does not count. The card is written from
    `card_fields`, arguments of `render_card`; until they are set, stock's is.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.card_fields: dict | None = None
        if self.args.include_num_input_tokens_seen == "no":
            self.args.include_num_input_tokens_seen = "all"
        self._clock_start = None
        self._clock_tokens = 0

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
        # Without `start_time`, which would add the mean rate since the start, evaluation included, to every line.
        super().log(logs)

    def create_model_card(self, *args, **kwargs) -> None:
        if self.card_fields is None:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            model = self.accelerator.unwrap_model(self.model)
            render_card(model, code_hash=code_sha256(folder), **self.card_fields).save(folder / "README.md")
