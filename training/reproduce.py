"""Train what the project claims, ours and stock alike, and record the scores that cards and README show.

Each row is a script, a recipe and its data; with a stock counterpart it runs twice, with the same seed, rows, steps and
rate. The data is that of `--data`; what is missing there is said and left out.

Examples:
  python -m training.reproduce --data FOLDER --checkpoint all-MiniLM-L6-v2
  python -m training.reproduce --data FOLDER --checkpoint all-MiniLM-L6-v2 --only sst2
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean

from training.args import read_recipe, user_errors

RECIPES = Path(__file__).parent / "recipes"
METRICS = Path(__file__).parent.parent / "hub_cards" / "metrics"


@dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
        script: module of `training`.
        recipe: file of `training/recipes`.
        files: by flag, relative to the data folder; several with blanks between them.
        metric: of the script's metrics.json, the one to show.
        has_stock: whether stock has a class for it, which then runs as well.
        literature: what others report, and who.
        after: row that must have run before, whose model this one goes on from.
        is_from_nothing: whether stock starts without a checkpoint as well, from the recipe's sizes.
        seeds: of the runs of each contender, whose mean counts; without, there is one run with the recipe's.
    """

    title: str
    script: str
    recipe: str
    files: dict[str, str]
    metric: str
    has_stock: bool = True
    literature: str = ""
    flags: tuple[str, ...] = ()
    after: str | None = None
    is_from_nothing: bool = False
    seeds: tuple[int, ...] = ()


# Ours computes no padding; stock, which does, is spared most of it.
BY_LENGTH = ("--train_sampling_strategy", "group_by_length")

VQA_FILES = {
    "files": "vl/easy_vqa_questions_train.tsv",
    "images": "vl/easy_vqa_images_train.parquet",
    "test_files": "vl/easy_vqa_questions_test.tsv",
    "test_images": "vl/easy_vqa_images_test.parquet",
}
EMOJI_FILES = {
    "files": "vl/emoji_captions_train.parquet",
    "validation_files": "vl/emoji_captions_val.parquet",
    "test_files": "vl/emoji_captions_test.parquet",
}

WNUT17_FILES = {
    "files": "nlp/ner_wnut17_train.jsonl",
    "validation_files": "nlp/ner_wnut17_dev.jsonl",
    "test_files": "nlp/ner_wnut17_test.jsonl",
}
WIKITEXT2_FILES = {
    "files": "lm/wikitext2_test.txt lm/wiki_articles.txt lm/books",
    "validation_files": "lm/wikitext2_valid.txt",
}

ROWS = {
    "sst2": Row(
        "SST-2, sentences alone",
        "run_classification",
        "classification_sst2.yaml",
        {
            "files": "sentiment/sst2_train.tsv",
            "validation_files": "sentiment/sst2_dev.tsv",
            "test_files": "sentiment/sst2_test.tsv",
        },
        "accuracy",
        literature="0.912 with BERT-base (Munikar et al. 2019); 0.897 with BERT-small, 29M, and all phrases (Turc "
        "et al. 2019)",
        flags=BY_LENGTH,
    ),
    "sst5": Row(
        "SST-5, sentences alone",
        "run_classification",
        "classification_sst5.yaml",
        {
            "files": "sentiment/sst5_train.tsv",
            "validation_files": "sentiment/sst5_dev.tsv",
            "test_files": "sentiment/sst5_test.tsv",
        },
        "accuracy",
        literature="0.532 with BERT-base (Munikar et al. 2019)",
        flags=BY_LENGTH,
    ),
    "wnut17": Row(
        "WNUT-17 entities",
        "run_token_classification",
        "token_classification_wnut17.yaml",
        WNUT17_FILES,
        "test f1",
        flags=BY_LENGTH,
    ),
    "elmo_wnut17_1": Row(
        "Wikipedia articles and the words of WNUT-17, ELMo from nothing",
        "run_elmo",
        "elmo_wnut17_1.yaml",
        {"files": "lm/wiki_articles.txt", "words_files": "nlp/ner_wnut17_train.jsonl"},
        "perplexity",
        has_stock=False,
    ),
    "elmo_wnut17_2": Row(
        "WNUT-17 entities, tagger with this ELMo beside word vectors of its own",
        "run_token_classification",
        "token_classification_elmo.yaml",
        WNUT17_FILES,
        "test f1",
        has_stock=False,
        after="elmo_wnut17_1",
        seeds=(42, 1, 2),
    ),
    "elmo_wnut17_without": Row(
        "WNUT-17 entities, the same tagger without ELMo",
        "run_token_classification",
        "token_classification_without_elmo.yaml",
        WNUT17_FILES,
        "test f1",
        has_stock=False,
        seeds=(42, 1, 2),
    ),
    "lstm_wikitext2": Row(
        "WikiText-2's validation text, LSTM of 3.0M weights; trained on other text, its own being absent",
        "run_elmo",
        "lstm_wikitext2.yaml",
        WIKITEXT2_FILES,
        "perplexity",
        has_stock=False,
        literature="a token of 4,096 byte pairs",
    ),
    "clm_wikitext2": Row(
        "the same, GPT-2 of 3.1M weights, for as long",
        "run_clm",
        "clm_wikitext2.yaml",
        WIKITEXT2_FILES,
        "perplexity",
        has_stock=False,
        literature="a token of 4,096 byte pairs",
    ),
    "squad2": Row(
        "SQuAD 2, 16 articles of its dev set, split by paragraph",
        "run_qa",
        "qa_squad2.yaml",
        {"files": "nlp/qa_squad2_train.parquet"},
        "f1",
        literature="in percent; 54.7 by never answering",
        flags=(*BY_LENGTH, "--bf16", "true", "--use_cpu", "true"),
    ),
    "tatoeba": Row(
        "Tatoeba, English to French, 30,000 pairs, from nothing; stock is Marian",
        "run_translation",
        "translation_tatoeba.yaml",
        {
            "files": "mt/tatoeba_en_fr_train.tsv",
            "validation_files": "mt/tatoeba_en_fr_val.tsv",
            "test_files": "mt/tatoeba_en_fr_test.tsv",
        },
        "test BLEU",
        literature="in percent",
        flags=("--bf16", "true", "--use_cpu", "true"),
        is_from_nothing=True,
        seeds=(42, 1, 2, 3, 4),
    ),
    "easy_vqa": Row(
        "easy-VQA, from nothing",
        "run_image_text",
        "vqa_easy.yaml",
        VQA_FILES,
        "accuracy",
        has_stock=False,
    ),
    "blip2_digits_1": Row(
        "digits, BLIP-2's first stage, from nothing",
        "run_blip2",
        "blip2_digits_1.yaml",
        {},
        "text recall@1",
        has_stock=False,
        literature="chance 0.100",
    ),
    "blip2_digits_2": Row(
        "digits, BLIP-2's second stage",
        "run_blip2",
        "blip2_digits_2.yaml",
        {},
        "exact match",
        has_stock=False,
        after="blip2_digits_1",
    ),
    "blip2_vqa_1": Row(
        "easy-VQA, BLIP-2's first stage, from nothing",
        "run_blip2",
        "blip2_vqa_1.yaml",
        VQA_FILES,
        "text recall@1",
        has_stock=False,
        literature="chance 0.036",
    ),
    "blip2_vqa_2": Row(
        "easy-VQA, BLIP-2's second stage",
        "run_blip2",
        "blip2_vqa_2.yaml",
        VQA_FILES,
        "accuracy",
        has_stock=False,
        after="blip2_vqa_1",
    ),
    "blip2_emoji_1": Row(
        "emoji of unseen names, BLIP-2's first stage",
        "run_blip2",
        "blip2_emoji_1.yaml",
        EMOJI_FILES,
        "text recall@1",
        has_stock=False,
        literature="chance 0.005",
    ),
    "blip2_emoji_2": Row(
        "emoji of unseen names, BLIP-2's second stage",
        "run_blip2",
        "blip2_emoji_2.yaml",
        EMOJI_FILES,
        "word f1",
        has_stock=False,
        after="blip2_emoji_1",
    ),
}


def run(name: str, row: Row, data: Path, checkpoint: str, output: Path, is_stock: bool) -> dict:
    """Train one contender, with each seed in a process of its own; its metrics, their means if several, and command."""
    options = (name, row, data, checkpoint, output, is_stock)
    if not row.seeds:
        return run_once(*options)
    runs = {seed: run_once(*options, seed) for seed in row.seeds}
    scores = {seed: found["metrics"] for seed, found in runs.items()}
    first, *_ = runs.values()
    means = {metric: mean(each[metric] for each in scores.values()) for metric in first["metrics"]}
    return {"command": first["command"], "metrics": means, "seeds": scores}


def run_once(
    name: str, row: Row, data: Path, checkpoint: str, output: Path, is_stock: bool, seed: int | None = None
) -> dict:
    """One run of a contender."""
    folder = output / (f"{name}-{'stock' if is_stock else 'ours'}" + ("" if seed is None else f"-seed{seed}"))
    arguments = [f"training.{row.script}", f"training/recipes/{row.recipe}"]
    shown = list(arguments)
    for flag, files in row.files.items():
        arguments += [f"--{flag}", *(str(data / file) for file in files.split())]
        shown += [f"--{flag}", *(f"DATA/{file}" for file in files.split())]
    if row.has_stock and not row.is_from_nothing:
        arguments += ["--model_name_or_path", checkpoint]
        shown += ["--model_name_or_path", Path(checkpoint).name]
    elif row.after is not None:
        arguments += ["--model_name_or_path", str(output / f"{row.after}-ours")]
        shown += ["--model_name_or_path", f"runs/reproduce/{row.after}-ours"]
    tail = [*row.flags, *(["--stock"] if is_stock else []), *([] if seed is None else ["--seed", str(seed)])]
    subprocess.run([sys.executable, "-m", *arguments, *tail, "--output_dir", str(folder)], check=True)
    return {
        "command": " ".join(["python", "-m", *shown, *tail]),
        "metrics": json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
    }


def reproduce(name: str, row: Row, data: Path, checkpoint: str, output: Path) -> dict:
    """Both contenders of a row."""
    result = {
        "title": row.title,
        "metric": row.metric,
        "literature": row.literature,
        "seed": read_recipe(str(RECIPES / row.recipe)).get("seed", 42),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "ours": run(name, row, data, checkpoint, output, is_stock=False),
    }
    if row.has_stock:
        result["stock"] = run(name, row, data, checkpoint, output, is_stock=True)
    return result


def table(folder: Path | None = None) -> str:
    """The recorded scores as a Markdown table, in the order of `ROWS`."""
    lines = ["| data | metric | ours | stock | reported by others |", "| --- | --- | --- | --- | --- |"]
    for name in ROWS:
        path = (folder or METRICS) / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            metric = result["metric"]
            scores = [
                f"{result[system]['metrics'][metric]:.3f}" if system in result else "" for system in ("ours", "stock")
            ]
            seeds = result["ours"].get("seeds", ())
            remarks = [result["literature"], f"means of {len(seeds)} seeds" if seeds else ""]
            lines.append(
                f"| {result['title']} | {metric} | {' | '.join(scores)} | {'; '.join(filter(None, remarks))} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, help="folder that holds the files of the rows")
    parser.add_argument(
        "--checkpoint", required=True, help="stock BERT checkpoint to fine-tune, a folder or of the Hub"
    )
    parser.add_argument("--only", choices=list(ROWS), nargs="+", help="rows to run; all when not given")
    parser.add_argument("--output_dir", default="runs/reproduce", help="folder for the runs")
    args = parser.parse_args(argv)
    with user_errors():
        data = Path(args.data)
        if not data.is_dir():
            raise ValueError(f"--data {data} is no folder. Name one that holds the files of the rows.")
    METRICS.mkdir(exist_ok=True)
    for name in args.only or ROWS:
        row = ROWS[name]
        missing = [file for files in row.files.values() for file in files.split() if not (data / file).exists()]
        if missing:
            print(f"{name}: left out, because {data} has no {missing[0]}")
            continue
        result = reproduce(name, row, data, args.checkpoint, Path(args.output_dir))
        draft = METRICS / f".{name}.json"
        draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draft.replace(METRICS / f"{name}.json")
    print(table())


if __name__ == "__main__":
    main()
