"""The one Trainer subclass of the scripts: what stock lacks, and nothing else."""

import inspect
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, has_length
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_custom.cards import CardRecord, hardware, render_card
from hf_custom.hub import CARD, publish, publish_later
from training.checkpointing import (
    SAVING,
    CheckpointError,
    NotSavedError,
    Sealer,
    check_same_run,
    clean,
    describe_run,
    newest_verified,
    put_in_place,
    read_manifest,
    rotate,
    seal,
    verify,
)
from training.guards import LostProcessError, attach_guards, is_in_doubt, lost_processes, settle_checkpoint
from training.length_groups import LengthGroups
from training.preemption import Preemption
from training.sharding import (
    PARTS,
    SAVE_ERRORS,
    check_same_kind,
    is_asked_for,
    kind_of_checkpoint,
    kind_of_run,
    of_own_class,
    sharded_on_processors,
    tied_names,
)
from training.streams import StreamPosition

logger = logging.get_logger(__name__)

# Training arguments that a model card shows.
SHOWN_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
)
# Of the numbers of an evaluation, those that say how long it took.
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class CustomTrainer(Trainer):
    """Trainer that logs tokens per second and the parts of a loss beside it, and pushes what is safe to push, with this
    project's model card.

    The rate is that of training alone, since the last line; evaluation does not count. Parts are what a model returns
    under a name that ends in `_loss`. The card is written from `card`; until that is set, from the last evaluation.

    Raises:
        ValueError: for a `hub_strategy` that uploads pickles, or checkpoints that are not whole.
    """

    def __init__(self, model=None, args=None, *rest, **kwargs):
        # Before the host makes a repository.
        _check_hub_strategy(args)
        super().__init__(model, args, *rest, **kwargs)
        if (self.args.fsdp or is_asked_for()) and not self.is_fsdp_enabled:
            raise ValueError(
                "--fsdp was asked for but would run as plain data parallelism here. Leave out --use_cpu, start it with "
                "training/accelerate/fsdp2.yaml on several GPUs, or on several processors without a GPU beside them, "
                "or leave out --fsdp."
            )
        self._is_stream = self.train_dataset is not None and not has_length(self.train_dataset)
        self.add_callback(Preemption())
        if self._is_stream:
            self.add_callback(StreamPosition())
        attach_guards(self, nonfinite=getattr(self.args, "on_nonfinite", "stop"))
        self.card: CardRecord | None = None
        self._sealer = Sealer()
        self._run: dict | None = None
        # While a checkpoint is written: the folder aside that stands for the output folder.
        self._saving: Path | None = None
        # Puts the last checkpoint in place, while that waits for the loss under its weights.
        self._place: Callable[[], None] | None = None
        if getattr(self.args, "save_trained_only", False) and not hasattr(self.model, "trained_state_dict"):
            raise ValueError(f"--save_trained_only: {type(self.model).__name__} has no frozen parts. Leave it out.")
        if self.args.include_num_input_tokens_seen == "no":
            self.args.include_num_input_tokens_seen = "all"
        self._clock_start = None
        self._clock_tokens = 0
        self._loss_parts: dict[str, list[torch.Tensor]] = {}

    def create_accelerator_and_postprocess(self) -> None:
        with sharded_on_processors():
            super().create_accelerator_and_postprocess()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and isinstance(outputs, dict):
            for name, value in outputs.items():
                if name.endswith("_loss"):
                    self._loss_parts.setdefault(name, []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        self._start_clock()
        return super().training_step(*args, **kwargs)

    def _start_clock(self) -> None:
        if self._clock_start is None:
            self._clock_start = time.perf_counter()
            self._clock_tokens = self.state.num_input_tokens_seen

    def evaluate(self, *args, **kwargs):
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        if self._clock_start is not None:
            self._clock_start += time.perf_counter() - start
        return metrics

    def _get_train_sampler(self, train_dataset=None):
        """Rows grouped by length in an order that no model's random numbers change."""
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not LengthGroupedSampler:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroups(sampler.batch_size, sampler.lengths, seed)

    def _get_eval_sampler(self, eval_dataset):
        """Rows in their order. Grouped by length, as the host would have them under that strategy of training,
        predictions would come back in another order than the rows they are of."""
        is_plain = eval_dataset is not None and has_length(eval_dataset) and self.args.world_size <= 1
        return SequentialSampler(eval_dataset) if is_plain else None

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

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; what is resumed is verified first.

        Args:
            resume_from_checkpoint: a checkpoint, or `True` for the newest whole one in the output folder, or, where
                there is none, the start.

        Raises:
            CheckpointError: for a checkpoint that is not whole, or of another run.
            NotSavedError: when there is no room for a checkpoint.
            LostProcessError: when another process is gone.
        """
        output_dir = Path(self.args.output_dir)
        self._run = describe_run(self.args, self.train_dataset)
        with self.args.main_process_first(desc="verifying checkpoints"):
            checkpoint, lines = self._choose_checkpoint(resume_from_checkpoint, output_dir)
        if len(seen := set(gather_object([checkpoint]))) > 1:
            raise CheckpointError(
                f"the processes would go on from different checkpoints, {' and '.join(sorted(map(str, seen)))}. Keep "
                "the output folder on a disk that all of them see, or name one with --resume_from_checkpoint."
            )
        if self.is_world_process_zero():
            clean(output_dir)
            for line in lines:
                print(line)
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except RuntimeError as error:
            if lost := lost_processes(self):
                raise LostProcessError(f"{lost}. Start the run again with --resume.") from error
            raise
        finally:
            self.end_workers()
            # What ended the run, if anything did, is no fault of the weights, unless the last losses say so.
            if is_in_doubt(self):
                self.drop_checkpoint()
            self.place_checkpoint()
            self.finish_saving()

    def end_workers(self) -> None:
        """End data workers that live on from epoch to epoch. Left to the garbage collector they take half a minute."""
        loaders = [self.callback_handler.train_dataloader, *getattr(self, "_eval_dataloaders", {}).values()]
        for loader in loaders:
            loader = getattr(loader, "base_dataloader", loader)
            if getattr(loader, "persistent_workers", False):
                loader._iterator = None

    def _choose_checkpoint(self, asked: str | bool | None, output_dir: Path) -> tuple[str | None, list[str]]:
        """The checkpoint to go on from, and what to say about it."""
        if not asked:
            return None, []
        if asked is True:
            folder, skipped = newest_verified(output_dir)
            lines = [f"--resume: {name} {reason}; it is left out" for name, reason in skipped]
            if folder is None:
                return None, [*lines, f"--resume: no checkpoint in {output_dir}, so training starts from the beginning"]
            manifest = read_manifest(folder)
            lines.append(f"--resume: going on from {folder}")
        else:
            folder, lines = Path(asked), []
            try:
                manifest = verify(folder)
            except CheckpointError as error:
                raise CheckpointError(f"{folder} {error}. Name another one, or let --resume choose.") from None
        try:
            check_same_kind(folder, self.accelerator)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if not getattr(self.args, "force_resume", False):
            check_same_run(folder, manifest, self._run)
        return str(folder), lines

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        """As the host; of a stream the pass in which the checkpoint was made, and its batches by then."""
        found = super()._init_training_state(*args, **kwargs)
        positions = [one for one in self.callback_handler.callbacks if isinstance(one, StreamPosition)]
        if not positions or self.args.ignore_data_skip:
            return found
        return positions[0].resume(self.state, self.args.gradient_accumulation_steps, found)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the host. What is left at the end of a stream and fills no accumulation is left out: the host would add
        its gradients to the first update of the next pass."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return ([], None) if self._is_stream and len(batches) < num_batches else (batches, num_items)

    def _run_epoch(self, *args, train_dataloader, **kwargs) -> None:
        """Nothing where a finished run is resumed in mid-epoch: the host would take one step more than it was to."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        if getattr(loader, "_iterator", None) is not None:
            # Workers get their seed from torch's generator when they start. Those that stay draw one for each epoch
            # all the same, for in a resumed run they start in a later one.
            torch.empty((), dtype=torch.int64).random_()
        super()._run_epoch(*args, train_dataloader=train_dataloader, **kwargs)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._saving is None else str(self._saving)

    def _save_checkpoint(self, model, trial) -> None:
        """As the host, but to a folder aside, which gets its name from `place_checkpoint`, when it is whole."""
        self.finish_saving()
        output_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            clean(output_dir)
        self.accelerator.wait_for_everyone()
        self._saving = output_dir / SAVING
        try:
            super()._save_checkpoint(model, trial)
        # As a full disk shows in Python, in safetensors and in torch.
        except (OSError, SafetensorError, RuntimeError) as error:
            raise NotSavedError(
                f"{output_dir / name} was not saved: {error}. What was saved before is whole; go on from it with "
                "--resume when there is room."
            ) from error
        finally:
            self._saving = None
        draft, final = output_dir / SAVING / name, output_dir / name
        self._name_best(output_dir, draft)
        # All processes have written their parts.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            step, best = self.state.global_step, self.state.best_model_checkpoint
            sealed = self._sealer.start(lambda: seal(draft, step, self._run or {}))

            def place() -> None:
                # Raises what kept it from being sealed.
                sealed.result()
                put_in_place(draft, final)
                draft.parent.rmdir()
                rotate(output_dir, self.args.save_total_limit, (best,))
                if self.args.push_to_hub:
                    self._push(final, step)

            self._place = place

    def place_checkpoint(self) -> None:
        """Let the checkpoint that waits, if one does, have its name. `DivergenceGuard` says when, and says it once."""
        place, self._place = self._place, None
        if place is not None:
            self._sealer.start(place)

    def drop_checkpoint(self) -> None:
        """Forget the checkpoint that waits; its folder goes with the next that is written, or with the next start."""
        self._place = None

    def finish_saving(self) -> None:
        """Wait until every checkpoint that is to have its name has it.

        Raises:
            OSError: when one could not be sealed or renamed.
        """
        self._sealer.wait()

    def _name_best(self, output_dir: Path, draft: Path) -> None:
        """The best checkpoint by the name that it will have, in the state of the Trainer and in that of the draft."""
        if self.state.best_global_step is None:
            return
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.exists() or best.name == draft.name:
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(draft / TRAINER_STATE_NAME))

    def _load_best_model(self) -> None:
        settle_checkpoint(self)
        self.finish_saving()
        self.accelerator.wait_for_everyone()
        if self.is_fsdp_enabled:
            # Its name comes from a checkpoint, and torch would run what stands in it.
            verify(self.state.best_model_checkpoint)
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the host, and of a model in parts the whole one, in safetensors; its checkpoints keep the parts alone."""
        is_checkpoint = output_dir is not None and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        if is_checkpoint or kind_of_run(self.accelerator) != PARTS:
            super().save_model(output_dir, _internal_call)
            return
        # Every process takes part; the first has the result, in the memory of its processor.
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        except SAVE_ERRORS as error:
            # Torch's own is no `Exception`, so that nothing would handle it.
            raise OSError(" ".join(str(error).split())) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = output_dir is not None and folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if is_checkpoint and getattr(self.args, "save_trained_only", False):
            state_dict = self.accelerator.unwrap_model(self.model).trained_state_dict()
        if state_dict and self.is_fsdp_enabled:
            # Gathered one by one, a weight with two names is two weights.
            second_names = tied_names(self.model, state_dict)
            state_dict = {name: value for name, value in state_dict.items() if name not in second_names}
        # The host pickles the arguments, the token among them. No token is ever written, and no pickle is kept.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            with of_own_class(self.model):
                super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def shown_arguments(self, **more) -> dict[str, object]:
        """The training arguments of the card, and what was measured on the way."""
        shown = {name: getattr(self.args, name) for name in SHOWN_ARGUMENTS}
        rates = [entry["tokens_per_second"] for entry in self.state.log_history if "tokens_per_second" in entry]
        return {
            **shown,
            "lr_scheduler_type": str(shown["lr_scheduler_type"].value),
            **more,
            "steps": self.state.global_step,
            "processes": self.args.world_size,
            "hardware": hardware(self.args.device.type),
            "tokens per second (median)": f"{sorted(rates)[len(rates) // 2]:,.0f}" if rates else "not measured",
        }

    def _card_of_last_evaluation(self, **fields) -> CardRecord:
        """For a script that sets no `card`: the arguments of the host's `create_model_card` and the last evaluation."""
        evaluations = [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)]
        metrics = {
            key.removeprefix("eval_"): value
            for key, value in (evaluations[-1] if evaluations else {}).items()
            if key.startswith("eval_") and key.removeprefix("eval_") not in TIMINGS
        }
        datasets, tags = (
            [value] if isinstance(value := fields.get(name) or [], str) else value for name in ("dataset", "tags")
        )
        name = fields.get("model_name") or Path(self.args.output_dir).name
        chosen = {name: fields[name] for name in ("language", "license") if fields.get(name)}
        return CardRecord(
            name,
            ", ".join(datasets) or "data that was not recorded",
            metrics={name: metrics} if metrics else {},
            training=self.shown_arguments(),
            datasets=datasets,
            tags=tags,
            base_model=fields.get("finetuned_from"),
            **chosen,
        )

    @property
    def _is_ours(self) -> bool:
        """Whether the model is one whose card this project writes; an adapter or a stock model gets the host's."""
        model = self.accelerator.unwrap_model(self.model)
        return isinstance(model, PreTrainedModel) and hasattr(model.config, "auto_classes")

    def create_model_card(self, *args, **kwargs) -> None:
        """The card of the model in the output folder; without `card`, the host's arguments say what it cannot know."""
        if not self._is_ours:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            record = self.card or self._card_of_last_evaluation(**kwargs)
            record.save(folder)
            render_card(folder, with_results=bool(record.metrics)).save(folder / CARD)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save and push what `hf_custom.hub.publish` lets pass, with the card; arguments and result are the host's."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = publish if blocking else publish_later
        return push(
            self.args.output_dir,
            self.hub_model_id,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            with_card=self._is_ours,
            with_results=False,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Only the event: a checkpoint is pushed when it stands, by `_push`."""
        if self.args.hub_strategy != HubStrategy.END:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)

    def _push(self, checkpoint: Path, step: int) -> None:
        """As the host, in the background, but what may leave alone, and without the card, which needs results."""
        # Of a model in parts the whole one is there at the end alone.
        if self.args.hub_strategy == HubStrategy.END or kind_of_checkpoint(checkpoint) == PARTS:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        job = publish_later(
            checkpoint,
            self.hub_model_id,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {step}",
            with_card=False,
        )
        if is_busy:
            self.push_in_progress.jobs.append(job)
        else:
            self._say_failed_pushes()
            self.push_in_progress = PushInProgress([job])

    def _finish_current_push(self) -> None:
        self.finish_saving()
        super()._finish_current_push()
        self._say_failed_pushes()

    def _say_failed_pushes(self) -> None:
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", []):
            if (error := job.exception()) is not None:
                logger.warning(f"A push while training failed: {error}")


def _check_hub_strategy(args) -> None:
    if args is None or not args.push_to_hub:
        return
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"--hub_strategy {args.hub_strategy.value} uploads the optimizer's state as a pickle, which never leaves "
            "here. Use every_save, or end."
        )
    if getattr(args, "save_trained_only", False) and args.hub_strategy == HubStrategy.EVERY_SAVE:
        raise ValueError(
            "--save_trained_only leaves weights out of the checkpoints, so none can be pushed. Use --hub_strategy end."
        )
