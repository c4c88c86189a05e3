"""Measure word2vec beside gensim: words a second, similarities and analogies, on the same text with the same settings.

  python -m training.benchmarks.word2vec text8.txt --word_pairs wordsim353.tsv simlex999.tsv \\
    --analogies questions-words.txt

Each contender is a process of its own, with two threads that update the tables. They take turns, a round for each seed.
Time is that of training, without reading the text and counting its words; ours runs in the Trainer, logging and all.
The medians of words a second count; scores are means over the seeds, beside their lowest and highest. The command
fails when a score is more than 0.02 below gensim's, or words a second are fewer.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CONTENDERS = ("gensim", "ours")
OBJECTIVES = ("skip_gram", "cbow")
# Words of a sentence; the text is one line.
SENTENCE = 1000
SETTINGS = {
    "hidden_size": 100,
    "window_size": 5,
    "num_negatives": 5,
    "min_count": 5,
    "subsample_threshold": 1e-3,
    "learning_rate": 0.025,
    "last_learning_rate": 1e-4,
}
TOLERANCE = 0.02
RESTRICT_VOCAB = 30_000
SPEED = "words a second"


def timed(train) -> tuple[float, float]:
    """Seconds of `train()`, on the clock and of processors. The second tells more on a machine that has other work."""
    start, busy = time.perf_counter(), time.process_time()
    train()
    return time.perf_counter() - start, time.process_time() - busy


def train_gensim(args: argparse.Namespace, folder: Path) -> tuple[tuple[float, float], int]:
    """Seconds of training and words of the text; the model is left in `folder`, as ours."""
    from gensim.models import Word2Vec

    from training.word_pairs import UNKNOWN, make_tokenizer
    from training.word_vectors import import_vectors

    words = Path(args.text).read_text(encoding="utf-8").split()
    sentences = [words[start : start + SENTENCE] for start in range(0, len(words), SENTENCE)]
    model = Word2Vec(
        vector_size=SETTINGS["hidden_size"],
        window=SETTINGS["window_size"],
        negative=SETTINGS["num_negatives"],
        min_count=SETTINGS["min_count"],
        sample=SETTINGS["subsample_threshold"],
        alpha=SETTINGS["learning_rate"],
        min_alpha=SETTINGS["last_learning_rate"],
        sg=int(args.objective == "skip_gram"),
        hs=0,
        seed=args.seed,
        workers=args.threads,
        epochs=args.epochs,
    )
    model.build_vocab(sentences)
    seconds = timed(lambda: model.train(sentences, total_examples=model.corpus_count, epochs=args.epochs))
    model.wv.save_word2vec_format(str(folder / "vectors"), binary=True)
    imported, tokenizer = import_vectors(folder / "vectors", binary=True)
    assert len(tokenizer) == len(make_tokenizer(model.wv.index_to_key)) and UNKNOWN not in model.wv
    imported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return seconds, len(words)


def train_ours(args: argparse.Namespace, folder: Path) -> tuple[tuple[float, float], int]:
    """As `train_gensim`, by the script and its Trainer."""
    from training import run_word2vec
    from training.args import parse_arguments

    overrides = ("hidden_size", "window_size", "num_negatives", "subsample_threshold")
    flags = {
        "files": args.text,
        "preset": {"skip_gram": "word2vec-mini", "cbow": "cbow-mini"}[args.objective],
        "config_overrides": ",".join(f"{name}={SETTINGS[name]}" for name in overrides),
        "split": "whitespace",
        "lower_case": "false",
        "min_count": SETTINGS["min_count"],
        "max_sentence_length": SENTENCE,
        "validation_fraction": 0,
        "learning_rate": SETTINGS["learning_rate"],
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": json.dumps({"lr_end": SETTINGS["last_learning_rate"], "power": 1.0}),
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": 32,
        "update_threads": args.threads,
        "save_strategy": "no",
        "seed": args.seed,
        "output_dir": folder,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run = run_word2vec.prepare(*parse_arguments(run_word2vec.ARGUMENTS, words, "", **run_word2vec.DEFAULTS))
    seconds = timed(run.trainer.train)
    run.trainer.save_model()
    return seconds, run.chunks.corpus.num_words


def work(args: argparse.Namespace) -> dict[str, float]:
    """Train one contender and score it; both are scored by the same code."""
    from transformers import AutoModel, AutoTokenizer

    import hf_custom  # noqa: F401, for it registers
    from training.word_evaluation import evaluate

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (seconds, busy), words = {"gensim": train_gensim, "ours": train_ours}[args.contender](args, folder)
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        scores = evaluate(model, tokenizer, args.word_pairs, args.analogies, RESTRICT_VOCAB)
    return {
        SPEED: words * args.epochs / seconds,
        "seconds": seconds,
        "seconds of processors": busy,
        "vocabulary": len(tokenizer) - 1,
        **scores,
    }


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """Rows of every run, by objective and contender."""
    runs = {objective: {contender: [] for contender in CONTENDERS} for objective in args.objectives}
    for number in range(args.rounds):
        for objective in args.objectives:
            # Who comes first takes turns too.
            for contender in CONTENDERS[:: 1 if number % 2 == 0 else -1]:
                command = [sys.executable, "-m", "training.benchmarks.word2vec", args.text, "--contender", contender]
                for name in ("word_pairs", "analogies"):
                    command += [f"--{name}", *getattr(args, name)] if getattr(args, name) else []
                options = {"objective": objective, "seed": number + 1, "epochs": args.epochs, "threads": args.threads}
                command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"error: {contender} failed: {done.stderr.strip()[-2000:]}")
                row = json.loads(done.stdout.strip().splitlines()[-1])
                runs[objective][contender].append(row)
                print(f"{objective} {contender}, seed {number + 1}: {row[SPEED]:,.0f} words/s", flush=True)
    return runs


def is_score(name: str) -> bool:
    return name.endswith(("spearman", "accuracy"))


def summarise(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Of one objective: medians, means and spreads by contender, ratio and differences, and what falls short."""
    summary: dict[str, dict] = {}
    for contender, rows in runs.items():
        summary[contender] = {SPEED: statistics.median(row[SPEED] for row in rows)}
        for name in filter(is_score, rows[0]):
            values = [row[name] for row in rows]
            summary[contender][name] = {"mean": statistics.mean(values), "low": min(values), "high": max(values)}
    ours, theirs = summary["ours"], summary["gensim"]
    differences = {name: ours[name]["mean"] - theirs[name]["mean"] for name in ours if is_score(name)}
    ratio = ours[SPEED] / theirs[SPEED]
    short = [name for name, difference in differences.items() if difference < -TOLERANCE]
    return {
        **summary,
        "ratio": ratio,
        "differences": differences,
        "short": short + ([SPEED] if ratio < 1 else []),
    }


def show(objective: str, summary: dict) -> None:
    print(f"\n{objective}: ours has {summary['ratio']:.2f} times gensim's words a second")
    for contender in CONTENDERS:
        row = summary[contender]
        scores = ", ".join(
            f"{name} {value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
            for name, value in row.items()
            if name != SPEED
        )
        print(f"  {contender}: {row[SPEED]:,.0f} words/s, {scores}")
    if summary["short"]:
        print(f"  short of gensim: {', '.join(summary['short'])}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="file of text, words parted by spaces")
    parser.add_argument("--word_pairs", nargs="+", default=[], help="files of similarities")
    parser.add_argument("--analogies", nargs="+", default=[], help="files of questions")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender, a seed each (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="workers of each (%(default)s)")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--out", default=str(RESULTS / "word2vec-cpu.json"), help="where to write (%(default)s)")
    # Of the processes that this one starts.
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--objective", choices=OBJECTIVES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not Path(args.text).is_file():
        sys.exit(f"error: {args.text} does not exist. Check the path.")
    if args.contender is not None:
        print(json.dumps(work(args)))
        return 0
    try:
        import gensim
    except ImportError:
        sys.exit('error: gensim is not installed. Run `pip install ".[test]"`.')
    from training.benchmarks.measure import machine

    runs = measure(args)
    summaries = {objective: summarise(runs[objective]) for objective in args.objectives}
    for objective, summary in summaries.items():
        show(objective, summary)
    result = {
        "name": "word2vec",
        "settings": {**SETTINGS, "sentence": SENTENCE, "epochs": args.epochs, "threads": args.threads},
        "text": {"name": Path(args.text).name, "bytes": Path(args.text).stat().st_size},
        "machine": {**machine("cpu"), "gensim": gensim.__version__},
        "summary": summaries,
        "runs": runs,
    }
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(any(summary["short"] for summary in summaries.values()))


if __name__ == "__main__":
    sys.exit(main())
