"""Train or fine-tune an encoder-decoder that translates, and score it by BLEU and chrF.

Examples:
  # from nothing: numbers in digits to numbers in words
  python -m training.run_translation --output_dir runs/numbers

  # two columns of a table, with held-out pairs in files of their own
  python -m training.run_translation --files train.tsv --validation_files val.tsv --test_files test.tsv \\
    --source_column en --target_column fr --output_dir runs/en-fr

  # parallel text, a line a sentence, and a vocabulary for each language
  python -m training.run_translation --files train.en --target_files train.de --separate_vocabularies \\
    --vocab_size 8000 --output_dir runs/en-de

  # fine-tune a checkpoint
  python -m training.run_translation --model_name_or_path runs/en-fr --files more.tsv --source_column en \\
    --target_column fr --output_dir runs/more

  # from a recipe; then the host's MarianMTModel of the same size on the same batches, to compare
  python -m training.run_translation training/recipes/translation_tatoeba.yaml --files train.tsv \\
    --validation_files val.tsv --test_files test.tsv
  python -m training.run_translation training/recipes/translation_tatoeba.yaml --files train.tsv \\
    --validation_files val.tsv --test_files test.tsv --stock --output_dir runs/marian

Vocabularies: byte pairs of both sides together by default, so that names and numbers are the same tokens on both, and
one matrix can serve source, target and output. With --separate_vocabularies the source's tokenizer stands in the output
folder, where every tool looks for it, and the target's in its sub-folder `target_tokenizer`: two ordinary tokenizers,
which need no class and no code of their own. Read the target's with
`AutoTokenizer.from_pretrained(folder, subfolder="target_tokenizer")`. A checkpoint's tokenizer that has both modes
itself, as Marian's, is asked for targets by `text_target`.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import DatasetDict
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_custom.folders import TARGET_TOKENIZER
from training import runs
from training.args import ModelArguments, RunArguments, TableArguments, parse_arguments, user_errors
from training.preflight import (
    Quarantine,
    check_examples,
    check_precision,
    check_run,
    prepare_padding,
    prepare_padding_of,
)
from training.runs import (
    callbacks,
    check_length,
    choose_learning_rate,
    finish,
    is_sharded,
    prepare_config,
    prepare_model,
    prepare_tokenizer,
    train,
)
from training.trainer import CustomTrainer
from training.translation import (
    SOURCE,
    TARGET,
    PairArguments,
    encode_pairs,
    import_sacrebleu,
    load_pairs,
    score_translations,
    translate,
)

# The optimizer, its schedule and the smoothing of Vaswani et al. 2017, sections 5.3 and 5.4.
DEFAULTS = {
    **runs.DEFAULTS,
    "output_dir": "runs/translation",
    "preset": "transformer-mini",
    "lr_scheduler_type": "inverse_sqrt",
    "warmup_steps": 400,
    "adam_beta2": 0.98,
    "label_smoothing_factor": 0.1,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "eval_strategy": "epoch",
}
EMBEDDED = "numbers below a million, in digits and in English words"
SAMPLES = 5


@dataclass
class TranslationArguments(PairArguments):
    """What to translate, and how."""

    separate_vocabularies: bool = field(
        default=False,
        metadata={"help": "a vocabulary of --vocab_size for each side instead of one of both"},
    )
    num_beams: int = field(default=4, metadata={"help": "hypotheses that the search keeps"})
    length_penalty: float = field(
        default=0.6, metadata={"help": "power of the length by which the score of a hypothesis is divided"}
    )

    def __post_init__(self):
        if self.num_beams < 1:
            raise ValueError(f"--num_beams is {self.num_beams} but at least 1 hypothesis is kept.")

    @property
    def decoding(self) -> dict[str, object]:
        """Options of `generate`."""
        penalty = {"length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        return {"num_beams": self.num_beams, "do_sample": False, **penalty}


ARGUMENTS = (ModelArguments, TableArguments, TranslationArguments, RunArguments)


@dataclass
class Run:
    """A prepared training run."""

    trainer: CustomTrainer
    pairs: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    target_tokenizer: PreTrainedTokenizerBase | None
    args: TranslationArguments
    max_length: int
    smoothing: float


def prepare_tokenizers(
    model_args: ModelArguments, args: TranslationArguments, training_args: RunArguments, pairs: DatasetDict
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    """The tokenizer of both sides, or that of the source and that of the target.

    Raises:
        ValueError: when two vocabularies are asked of a tokenizer that has one.
    """
    rows, name = pairs["train"], model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        has_own = (Path(name) / TARGET_TOKENIZER).is_dir()
        if args.separate_vocabularies and not has_own:
            raise ValueError(
                f"--separate_vocabularies was asked for, but {name} has no sub-folder {TARGET_TOKENIZER} with the "
                "target's tokenizer. Leave the flag out, or name a folder that this script made with it."
            )
        target = AutoTokenizer.from_pretrained(name, subfolder=TARGET_TOKENIZER) if has_own else None
        if target is not None and training_args.process_index == 0:
            target.save_pretrained(Path(training_args.output_dir) / TARGET_TOKENIZER)
        return tokenizer, target
    sides = (SOURCE,) if args.separate_vocabularies else (SOURCE, TARGET)
    tokenizer = prepare_tokenizer(
        model_args, training_args, lambda: (text for side in sides for text in rows[side]), "ended-bpe"
    )
    if not args.separate_vocabularies:
        return tokenizer, None
    folder = str(Path(training_args.output_dir) / TARGET_TOKENIZER)
    target = prepare_tokenizer(model_args, training_args, lambda: iter(rows[TARGET]), "ended-bpe", folder)
    return tokenizer, target


def stock_config(config: PreTrainedConfig) -> MarianConfig:
    """The configuration of the host's Marian model with the size, the dropout and the scale of weights of ours.

    Raises:
        ValueError: for what Marian does not have.
    """
    if config.norm_first:
        raise ValueError("--stock trains Marian, which normalises sums alone. Leave out `norm_first=true`.")
    known = set(MarianConfig().to_dict()) - {"model_type", "transformers_version", "architectures", "dtype"}
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    return MarianConfig(**fields, init_std=config.initializer_range, forced_eos_token_id=None)


def prepare_translator(
    model_args: ModelArguments,
    args: TranslationArguments,
    training_args: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedModel:
    """The checkpoint, or a model from nothing: ours or, as --stock, the host's Marian model of that size.

    Smoothing becomes a matter of the model, where it is one of ours: its loss needs no logits.
    """
    target = target_tokenizer or tokenizer
    if model_args.model_name_or_path is not None:
        config = prepare_config(model_args, tokenizer)
    else:
        # The special tokens are those of the text that is written.
        fields = {f"{name}_token_id": getattr(target, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        fields |= {
            "decoder_vocab_size": len(target),
            "share_encoder_decoder_embeddings": target_tokenizer is None,
            "decoder_start_token_id": target.bos_token_id,
        }
        is_stock, model_args = model_args.stock, replace(model_args, stock=False)
        config = prepare_config(model_args, tokenizer, **fields)
        if not hasattr(config, "decoder_start_token_id") or not config.is_encoder_decoder:
            raise ValueError(f"preset {model_args.preset!r} is no encoder-decoder. Use transformer-mini, say.")
        if is_stock:
            config = stock_config(config)
    if len(target) > (getattr(config, "decoder_vocab_size", None) or config.vocab_size):
        raise ValueError(
            f"the target's tokenizer has {len(target)} entries but the model's `decoder_vocab_size` is "
            f"{config.decoder_vocab_size}. Use the tokenizer of the checkpoint."
        )
    prepare_padding_of(config, target)
    if hasattr(config, "label_smoothing"):
        config.label_smoothing, training_args.label_smoothing_factor = training_args.label_smoothing_factor, 0.0
    model_class = MarianMTModel if isinstance(config, MarianConfig) else AutoModelForSeq2SeqLM
    model = prepare_model(model_class, model_args, config)
    # What the checkpoint had may not go with it, as a penalty with a search of one beam.
    for name, value in {"length_penalty": None, **args.decoding}.items():
        setattr(model.generation_config, name, value)
    return model


def prepare(
    model_args: ModelArguments, data_args: TableArguments, args: TranslationArguments, training_args: RunArguments
) -> Run:
    """Load, check and tokenize the data, and build tokenizers, model and trainer. Nothing is trained yet."""
    import_sacrebleu()
    set_seed(training_args.seed)
    check_precision(training_args)
    choose_learning_rate(model_args, training_args, from_nothing=1e-3)
    quarantine = Quarantine(data_args.quarantine, training_args.process_index == 0)
    pairs = load_pairs(data_args, args, training_args.seed, quarantine)
    quarantine.finish()
    tokenizer, target_tokenizer = prepare_tokenizers(model_args, args, training_args, pairs)
    for each in filter(None, (tokenizer, target_tokenizer)):
        prepare_padding(each)
    smoothing = training_args.label_smoothing_factor
    model = prepare_translator(model_args, args, training_args, tokenizer, target_tokenizer)
    check_length("max_length", data_args.max_length, model.config)
    check_run(model, training_args)
    encoded = {}
    for split in ("train", "validation"):
        with training_args.main_process_first(desc="tokenizing"):
            encoded[split], count = encode_pairs(
                pairs[split], tokenizer, target_tokenizer, data_args.max_length, is_cut=split != "train"
            )
        looked_at = encoded[split].select_columns(["input_ids"])
        check_examples(looked_at, vocab_size=model.config.vocab_size, max_length=data_args.max_length, where=split)
        if count and training_args.process_index == 0:
            print(f"pairs of {split} with more than {data_args.max_length} tokens on a side, left out: {count}")
    training_args.length_column_name = "length"
    # The host's smoothing takes the labels away before the model could shift them.
    shifter = model if training_args.label_smoothing_factor else None
    trainer = CustomTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=shifter),
        callbacks=callbacks(training_args),
    )
    return Run(trainer, pairs, tokenizer, target_tokenizer, args, data_args.max_length, smoothing)


def measure(run: Run) -> tuple[dict[str, float], str | None, dict[str, object]]:
    """BLEU and chrF of the validation pairs and of the test pairs, translations to show, and what else the card shows.

    One process translates; the translations stand beside the model, in `translations.json` and
    `test_translations.json`.
    """
    trainer, metrics, sample, shown = run.trainer, {}, None, {}
    if is_sharded(trainer) or not trainer.is_world_process_zero():
        # No process holds the whole model, or it is not this one.
        return metrics, sample, shown
    model = trainer.accelerator.unwrap_model(trainer.model)
    for split, prefix in (("validation", ""), ("test", "test ")):
        if split not in run.pairs:
            continue
        rows = run.pairs[split]
        sources, references = list(rows[SOURCE]), list(rows[TARGET])
        translations = translate(
            model,
            run.tokenizer,
            sources,
            run.max_length,
            run.target_tokenizer,
            trainer.args.per_device_eval_batch_size,
            desc=f"translating {split}",
            **run.args.decoding,
        )
        scores, shown["BLEU signature"] = score_translations(translations, references)
        metrics |= {f"{prefix}{name}": value for name, value in scores.items()}
        triples = list(zip(sources, translations, references, strict=True))
        sample = "\n\n".join(f"{source}\n→ {found}\n= {wanted}" for source, found, wanted in triples[:SAMPLES])
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip((SOURCE, "translation", TARGET), each, strict=True)) for each in triples]
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        (folder / f"{prefix.replace(' ', '_')}translations.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{sample}\n")
    return metrics, sample, shown


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        model_args, data_args, args, training_args = parse_arguments(ARGUMENTS, argv, __doc__, **DEFAULTS)
        run = prepare(model_args, data_args, args, training_args)
    train(run.trainer)
    metrics, sample, shown = measure(run)
    shown |= {"max_length": run.max_length, "label_smoothing": run.smoothing, **args.decoding}
    finish(run.trainer, data_args.description(EMBEDDED), metrics, sample=sample, **shown)


if __name__ == "__main__":
    main()
