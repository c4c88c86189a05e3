"""Train word2vec: a vector for each word of your text, by skip-gram or CBOW with negative sampling.

Examples:
  # from nothing, on the embedded corpus
  python -m training.run_word2vec --output_dir runs/word2vec

  # your own text, on two cores, scored with similarities and analogies
  python -m training.run_word2vec --files texts/ --output_dir runs/mine --num_train_epochs 5 --update_threads 2 \\
    --word_pairs wordsim353.tsv simlex999.tsv --analogies questions-words.txt

  # CBOW, from a recipe, with one value changed
  python -m training.run_word2vec training/recipes/word2vec_text8.yaml --files text8.txt --preset cbow-mini

  # other sizes
  python -m training.run_word2vec --config_overrides hidden_size=300,window_size=10,num_negatives=15

  # then, for other tools
  python -m training.word_vectors export runs/word2vec vectors.bin --binary
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from transformers import AutoModelForPreTraining, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hf_custom.configuration_word2vec import CustomWord2VecConfig
from hf_custom.modeling_word2vec import CustomWord2VecForPreTraining, vocabulary_digest, words_of_tokenizer
from training import runs
from training.args import ModelArguments, RunArguments, parse_arguments, user_errors
from training.data import check_column, embedded_corpus, load_files
from training.preflight import Quarantine, check_precision, check_run
from training.runs import callbacks, finish, prepare_config, prepare_model, train
from training.word_evaluation import evaluate
from training.word_pairs import SPLITS, choose_vocabulary, count_words, make_tokenizer, read_corpus
from training.word_trainer import Chunks, Word2VecTrainer

DEFAULTS = {
    **runs.DEFAULTS,
    "output_dir": "runs/word2vec",
    "preset": "word2vec-mini",
    # As many words as there are; see --min_count.
    "vocab_size": 1_000_000,
    "learning_rate": 0.025,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 10,
    # Chunks of text.
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "use_cpu": True,
    # Of a batch, the Trainer would drop what no argument of the model's forward is called.
    "remove_unused_columns": False,
}
# Words whose neighbours the card shows.
SHOWN_WORDS, SHOWN_NEIGHBOURS = 8, 5


@dataclass
class CorpusArguments:
    """What to train on. With nothing named: Python's language reference, which needs no network."""

    dataset_name: str | None = field(default=None, metadata={"help": "data set of the Hub"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    files: list[str] | None = field(
        default=None, metadata={"help": "local files or folders: txt, md, csv, tsv, json, jsonl or parquet"}
    )
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    split_lines: bool = field(default=False, metadata={"help": "each line is a sentence, which windows end at"})
    split: str = field(default="words", metadata={"help": f"how text is cut into words: {' or '.join(SPLITS)}"})
    lower_case: bool = field(default=True, metadata={"help": "make all letters small"})
    min_count: int = field(default=5, metadata={"help": "leave out words that stand less often in the text"})
    max_sentence_length: int = field(default=1000, metadata={"help": "words after which longer sentences are cut"})
    chunk_words: int = field(default=10_000, metadata={"help": "words that are drawn together, about"})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "share of the text, at its end, to hold out for the loss; 0 for none"}
    )
    update_threads: int = field(
        default=1,
        metadata={"help": "threads that update the tables without locks; with 1 a run is the same each time"},
    )
    word_pairs: list[str] = field(
        default_factory=list, metadata={"help": "files of two words and their similarity a line, to correlate with"}
    )
    analogies: list[str] = field(
        default_factory=list, metadata={"help": "files of questions of four words a line, with sections"}
    )
    restrict_vocab: int = field(default=30_000, metadata={"help": "analogies among that many of the first words"})
    quarantine: str | None = field(
        default=None, metadata={"help": "file for bad rows, which are then left out and counted; else one is refused"}
    )

    def __post_init__(self):
        for name in ("min_count", "max_sentence_length", "chunk_words", "update_threads", "restrict_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)} but must be at least 1.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"--validation_fraction is {self.validation_fraction} but a share to hold out is from 0 to below 1."
            )
        if self.split not in SPLITS:
            raise ValueError(f"--split is {self.split!r} but must be {' or '.join(SPLITS)}.")
        for file in (*self.word_pairs, *self.analogies):
            if not Path(file).is_file():
                raise ValueError(f"{file} does not exist. Check the path in --word_pairs or --analogies.")

    @property
    def description(self) -> str:
        """The data in words, for the model card."""
        if self.dataset_name:
            return f"the data set `{self.dataset_name}`" + (f" ({self.dataset_config})" if self.dataset_config else "")
        if self.files:
            return "local text: " + ", ".join(f"`{Path(file).name}`" for file in self.files)
        return "Python's language reference (`pydoc_data.topics`), each paragraph once"


@dataclass
class Run:
    """A prepared training run."""

    trainer: Word2VecTrainer
    tokenizer: PreTrainedTokenizerBase
    chunks: Chunks
    data: CorpusArguments

    @property
    def model(self) -> CustomWord2VecForPreTraining:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)


def load_rows(data_args: CorpusArguments, quarantine: Quarantine) -> Dataset:
    """The rows of text that the arguments name; the embedded corpus when none do."""
    origin, column = quarantine.origin("train", "the data"), data_args.text_column
    if data_args.dataset_name is not None:
        found = load_dataset(data_args.dataset_name, data_args.dataset_config)
        if "train" not in found:
            raise ValueError(f"data set {data_args.dataset_name} has no split `train`; it has {', '.join(found)}.")
        rows = found["train"]
        origin.files = [(f"{data_args.dataset_name}, train", len(rows))]
    elif data_args.files:
        rows = load_files(data_args.files, False, (column,), origin)
    else:
        rows = embedded_corpus()
    if column not in rows.column_names:
        raise ValueError(
            f"the data has no column `{column}`; its columns are {', '.join(rows.column_names)}. "
            "Name the one that holds the text with --text_column."
        )
    return check_column(rows, column, origin)


def sentences(rows: Dataset, data_args: CorpusArguments) -> Callable[[], Iterator[str]]:
    """Gives the sentences of the rows, again at each call: rows, or their lines."""

    def read() -> Iterator[str]:
        for batch in rows.select_columns(data_args.text_column).iter(100):
            for text in batch[data_args.text_column]:
                if data_args.split_lines:
                    yield from text.splitlines()
                else:
                    yield text

    return read


def prepare_words(
    model_args: ModelArguments, data_args: CorpusArguments, texts: Callable[[], Iterator[str]]
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, or one of the words of the text."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    empty = make_tokenizer([], data_args.split, data_args.lower_case)
    counts = count_words(texts(), empty.backend_tokenizer)
    words = choose_vocabulary(counts, data_args.min_count, model_args.vocab_size - 1)
    return make_tokenizer(words, data_args.split, data_args.lower_case)


def prepare(model_args: ModelArguments, data_args: CorpusArguments, training_args: RunArguments) -> Run:
    """Load and check the data, and build tokenizer, model and trainer. Nothing is trained yet."""
    set_seed(training_args.seed)
    check_precision(training_args)
    quarantine = Quarantine(data_args.quarantine, training_args.process_index == 0)
    texts = sentences(load_rows(data_args, quarantine), data_args)
    quarantine.finish()
    tokenizer = prepare_words(model_args, data_args, texts)
    words = words_of_tokenizer(tokenizer)
    config = prepare_config(model_args, tokenizer, unk_token_id=tokenizer.unk_token_id)
    if not isinstance(config, CustomWord2VecConfig):
        raise ValueError(f"a {config.model_type} is no word2vec. Name a word2vec checkpoint or --preset word2vec-mini.")
    if model_args.model_name_or_path is None:
        config.vocabulary_sha256 = vocabulary_digest(words)
    corpus = read_corpus(texts(), tokenizer, data_args.max_sentence_length)
    counts = np.bincount(corpus.ids, minlength=config.vocab_size)
    if np.count_nonzero(counts) < 2:
        raise ValueError(
            "the corpus has one word of the vocabulary alone, and nothing to tell it from. Give more text."
        )
    model = prepare_model(AutoModelForPreTraining, model_args, config)
    check_run(model, training_args)
    chunks = Chunks(corpus, data_args.chunk_words, data_args.validation_fraction)
    if training_args.process_index == 0:
        print(f"{corpus.num_words:,} words, {len(corpus.ids):,} of them of the {len(words) - 1:,} of the vocabulary")
    trainer = Word2VecTrainer(
        model=model,
        args=training_args,
        chunks=chunks,
        counts=counts,
        update_threads=data_args.update_threads,
        processing_class=tokenizer,
        callbacks=callbacks(training_args),
    )
    return Run(trainer, tokenizer, chunks, data_args)


def measure(run: Run) -> dict[str, float]:
    """Numbers of the held-out text, and of similarities and analogies."""
    updates, data = run.trainer.updates, run.data
    metrics = {}
    if run.chunks.held_out:
        metrics["loss"] = updates.loss(run.trainer.tables, list(run.chunks.held_out))
    metrics |= evaluate(run.model.word2vec, run.tokenizer, data.word_pairs, data.analogies, data.restrict_vocab)
    return metrics


def neighbours(run: Run) -> str:
    """Words of the text and those nearest to them, a line each, for the card."""
    words, model = words_of_tokenizer(run.tokenizer), run.model.word2vec
    # The most frequent ones are of every text.
    spelt = [index for index, word in enumerate(words[:-1]) if len(word) > 3 and word.isalpha()]
    lines = []
    for index in spelt[:: max(1, min(len(spelt), 400) // SHOWN_WORDS)][:SHOWN_WORDS]:
        near = [words[found] for found, _ in model.most_similar(index, topn=SHOWN_NEIGHBOURS, restrict_vocab=10_000)]
        lines.append(f"{words[index]}: {', '.join(near)}")
    return "\n".join(lines)


ARGUMENTS = (ModelArguments, CorpusArguments, RunArguments)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        arguments = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        run = prepare(*arguments)
    train(run.trainer)
    metrics = measure(run)
    config = run.model.config
    finish(
        run.trainer,
        run.data.description,
        metrics,
        sample=neighbours(run) or None,
        objective=config.objective,
        window_size=config.window_size,
        num_negatives=config.num_negatives,
        update_threads=run.data.update_threads,
    )


if __name__ == "__main__":
    main()
