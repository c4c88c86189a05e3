"""Train the language models of ELMo on your text, forward and backward (`--task bilm`), or an LSTM language model that
writes (`--task lm`).

Examples:
  # from nothing, on the embedded corpus
  python -m training.run_elmo --output_dir runs/elmo

  # on your own files, and on the words of tagged rows beside them
  python -m training.run_elmo --files my_texts/ --words_files train.jsonl --output_dir runs/mine

  # then a tagger of entities that goes on from it
  python -m training.run_token_classification --model_name_or_path runs/mine --files train.jsonl \\
    --task_fields classifier_lstm_size=128 --output_dir runs/tagger

  # an LSTM language model over byte pairs, from a recipe
  python -m training.run_elmo training/recipes/lstm_smoke.yaml
"""

import math
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForPreTraining, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from training import run_clm, runs
from training.args import DataArguments, ModelArguments, RunArguments, parse_arguments, user_errors
from training.data import load_table_files, load_text
from training.metrics import TextScore
from training.preflight import Quarantine, check_columns, check_examples, check_precision, check_run
from training.runs import (
    callbacks,
    choose_learning_rate,
    finish,
    input_type_of,
    is_sharded,
    prepare_config,
    prepare_model,
    prepare_tokenizer,
    train,
)
from training.trainer import CustomTrainer
from training.words import Lexicon, WordCollator, word_rows

TASKS = ("bilm", "lm")
# Where these differ from the host's own: a run from nothing should learn, log and be scored without a flag.
DEFAULTS = {
    **runs.DEFAULTS,
    "output_dir": "runs/elmo",
    "preset": None,
    "vocab_size": 4096,
    "block_size": 64,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "warmup_steps": 0.05,
    "num_train_epochs": 3,
    "eval_strategy": "epoch",
    "train_sampling_strategy": "group_by_length",
}
# Size of a model from nothing where none is named.
PRESETS = {"bilm": "elmo-mini", "lm": "lstm-mini"}


@dataclass
class ElmoArguments:
    """What to predict, and words to read beside the text."""

    task: str = field(
        default="bilm", metadata={"help": "bilm: the words before and after, for ELMo; lm: the next token, to write"}
    )
    words_files: list[str] | None = field(
        default=None, metadata={"help": "files of rows with a list of words each, to train on beside the text (bilm)"}
    )
    tokens_column: str = field(default="tokens", metadata={"help": "their column that holds the words"})

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"--task is {self.task!r} but must be one of {', '.join(TASKS)}.")
        if self.task == "lm" and self.words_files:
            raise ValueError("--words_files goes with --task bilm. Give --files to train an LSTM language model on.")


ARGUMENTS = (ModelArguments, DataArguments, ElmoArguments, RunArguments)


# --- Forward and backward language model of words ---


def check_reader(tokenizer: PreTrainedTokenizerBase, config) -> None:
    """Refuse a tokenizer that does not give what the model reads."""
    found = getattr(tokenizer, "input_type", None)
    if found != config.input_type:
        raise ValueError(
            f"the model reads {config.input_type} but the tokenizer {type(tokenizer).__name__} gives "
            f"{found or 'pieces of words'}. Name the model's own with --tokenizer_name."
        )
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"the vocabulary has {len(tokenizer)} words but the model's `vocab_size` is {config.vocab_size}. "
            "Use the tokenizer of the checkpoint."
        )


def load_words(elmo_args: ElmoArguments, quarantine: Quarantine) -> list[list[str]]:
    """The rows of `--words_files`."""
    if not elmo_args.words_files:
        return []
    column, origin = elmo_args.tokens_column, quarantine.origin("words", "the rows of words")
    rows = load_table_files(elmo_args.words_files, {column}, origin)
    rows = check_columns(rows, {"tokens_column": column}, origin)
    return [list(words) for words in rows[column]]


def prepare(
    model_args: ModelArguments, data_args: DataArguments, elmo_args: ElmoArguments, training_args: RunArguments
) -> CustomTrainer:
    """Load, check and split the text, and build tokenizer, model and trainer. Nothing is trained yet."""
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=2e-3)
    if data_args.streaming:
        raise ValueError("--streaming does not go with a vocabulary of all words. Leave it out.")
    quarantine = Quarantine(data_args.quarantine, training_args.process_index == 0)
    texts = load_text(
        dataset_name=data_args.dataset_name,
        dataset_config=data_args.dataset_config,
        files=data_args.files,
        validation_files=data_args.validation_files,
        column=data_args.text_column,
        validation_fraction=data_args.validation_fraction,
        seed=training_args.seed,
        quarantine=quarantine,
    )
    column = data_args.text_column
    if column not in texts["train"].column_names:
        raise ValueError(f"the data has no column `{column}`, and token ids have no characters. Give text.")
    extra = load_words(elmo_args, quarantine)
    quarantine.finish()

    def all_texts():
        yield from texts["train"][column]
        yield from (" ".join(words) for words in extra)

    kind = input_type_of(model_args)
    if kind is None and model_args.model_name_or_path is None:
        raise ValueError(f"--preset {model_args.preset} is no ELMo. Use {PRESETS['bilm']}, or leave it out.")
    tokenizer = prepare_tokenizer(model_args, training_args, all_texts, kind)
    config = prepare_config(model_args, tokenizer)
    check_reader(tokenizer, config)
    model = prepare_model(AutoModelForPreTraining, model_args, config)
    check_run(model, training_args)
    lexicon, rows = Lexicon(tokenizer), {}
    for split in ("train", "validation"):
        words = [
            *word_rows(texts[split][column], tokenizer, data_args.block_size),
            *(extra if split == "train" else []),
        ]
        rows[split] = Dataset.from_dict({"input_ids": [lexicon.index(row[: data_args.block_size]) for row in words]})
    for split, found in rows.items():
        check_examples(found, vocab_size=len(lexicon), max_length=data_args.block_size + 2, where=f"the {split} rows")
    # Words, not their characters.
    training_args.include_num_input_tokens_seen = "non_padding"
    return CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=WordCollator(lexicon, predicts_words=True),
        callbacks=callbacks(training_args),
    )


@torch.no_grad()
def measure(trainer: CustomTrainer) -> dict[str, float]:
    """Perplexity of the held-out text's words, the ends of rows included, in both directions and together."""
    model, args = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.args
    sums, count = {}, 0
    loader = DataLoader(trainer.eval_dataset, args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    for batch in tqdm(loader, desc="scoring", disable=not trainer.is_world_process_zero() or args.disable_tqdm):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        outputs = model(**batch, return_logits=False)
        for name in ("loss", "forward_loss", "backward_loss"):
            if outputs.get(name) is not None:
                sums[name] = sums.get(name, 0.0) + float(outputs[name]) * predicted
        count += predicted
    words = {"loss": "perplexity", "forward_loss": "forward perplexity", "backward_loss": "backward perplexity"}
    return {words[name]: math.exp(total / count) for name, total in sums.items()}


# --- Language model that writes ---


@torch.no_grad()
def score_stream(model: PreTrainedModel, token_ids: torch.Tensor, num_bytes: int, chunk: int) -> TextScore:
    """Score every token of a text but the first, each after all that stand before it: the state is carried on.

    Args:
        token_ids: (N,).
        num_bytes: length of the text in UTF-8 bytes.
        chunk: tokens to read at a time; the score is the same for all.
    """
    model.eval()
    state, nats = None, 0.0
    inputs, targets = token_ids[:-1].to(model.device), token_ids[1:].to(model.device)
    for part, expected in tqdm(list(zip(inputs.split(chunk), targets.split(chunk), strict=True)), desc="scoring"):
        outputs = model(part[None], past_key_values=state, use_cache=True)
        state = outputs.past_key_values
        nats += nn.functional.cross_entropy(outputs.logits[0].float(), expected, reduction="sum").item()
    return TextScore(nats, len(token_ids) - 1, num_bytes)


def measure_text(run: run_clm.Run) -> dict[str, float]:
    """Numbers of the held-out text, read from one end to the other."""
    has_text = run.data.text_column in run.texts["validation"].column_names
    if is_sharded(run.trainer) or run.data.streaming or not has_text or not run.model._is_stateful:
        return run_clm.measure(run)
    if not run.trainer.is_world_process_zero():
        return {}
    text = run.held_out_text
    score = score_stream(run.model, run.held_out_ids, len(text.encode()), run.data.block_size)
    return {
        "perplexity": score.perplexity,
        "word perplexity": math.exp(score.nats / len(text.split())),
        "bits per byte": score.bits_per_byte,
    }


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        model_args, data_args, elmo_args, training_args = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        model_args.preset = model_args.preset or PRESETS[elmo_args.task]
        if elmo_args.task == "bilm":
            trainer = prepare(model_args, data_args, elmo_args, training_args)
        else:
            # Its rows are of one length.
            training_args.train_sampling_strategy = "random"
            run = run_clm.prepare(model_args, data_args, training_args)
            trainer = run.trainer
    train(trainer)
    metrics = measure(trainer) if elmo_args.task == "bilm" else measure_text(run)
    finish(trainer, data_args.description, metrics, task=elmo_args.task, block_size=data_args.block_size)


if __name__ == "__main__":
    main()
