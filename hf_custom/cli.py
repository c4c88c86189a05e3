"""The command `hf-custom`: push, export, convert, card, inspect, look and serve. It parses and calls; no logic."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from transformers import AutoProcessor, AutoTokenizer

from .cards import render_card
from .conversion import ENCODINGS, convert, convert_tiktoken
from .export import export_to_stock
from .hub import CARD, SHARD_SIZE, publish
from .inspection import inspect
from .loading import fetch, load_model
from .look import look
from .serving import serve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _push(args: argparse.Namespace) -> None:
    result = publish(
        args.folder,
        args.repository,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        dry_run=args.dry_run,
        commit_message=args.message,
        with_card=not args.without_card,
        with_results=not args.without_results,
    )
    print(f"{result}\nnothing was sent" if args.dry_run else f"pushed: {result.commit_url}")


def _export(args: argparse.Namespace) -> None:
    folder = fetch(args.model, args.revision)
    reader = None
    if (folder / "processor_config.json").is_file():
        reader = AutoProcessor.from_pretrained(folder)
    elif (folder / "tokenizer_config.json").is_file():
        reader = AutoTokenizer.from_pretrained(folder)
    export_to_stock(
        load_model(folder), args.folder, reader, overwrite=args.overwrite, max_shard_size=args.max_shard_size
    )
    print(f"exported: {args.folder}")


def _convert(args: argparse.Namespace) -> None:
    if args.encoding is None:
        convert(args.source, args.folder, n_head=args.heads, tokenizer=args.tokenizer, overwrite=args.overwrite)
    else:
        convert_tiktoken(args.source, args.folder, encoding=args.encoding, overwrite=args.overwrite)
    print(f"converted: {args.folder}")


def _card(args: argparse.Namespace) -> None:
    card = render_card(args.folder, args.repository, args.revision, with_results=not args.without_results)
    if args.repository is None:
        card.save(Path(args.folder) / CARD)
        print(f"written: {Path(args.folder) / CARD}")
    else:
        print(card)


def _inspect(args: argparse.Namespace) -> None:
    print(
        inspect(
            args.model,
            args.revision,
            batch_size=args.batch_size,
            length=args.length,
            dtype=DTYPES[args.dtype],
            device=args.device,
        )
    )


def _look(args: argparse.Namespace) -> None:
    page = look(
        args.model,
        args.out,
        args.text,
        args.image,
        revision=args.revision,
        length=args.length,
        overwrite=args.overwrite,
    )
    print(f"written: {page}")


def _serve(args: argparse.Namespace) -> None:
    serve(args.model, args.options)


def _push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder that a model was saved to")
    parser.add_argument("repository", help="its name on the Hub, as me/my-gpt2; made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list what would leave, send nothing")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", help="message of the commit")
    parser.add_argument("--without-results", action="store_true", help="allow a card without numbers")
    parser.add_argument("--without-card", action="store_true", help="leave the card as it is in the folder")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or repository of the Hub")
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--revision", help="commit, tag or branch of the repository")
    parser.add_argument("--max-shard-size", default=SHARD_SIZE, help="bytes of a file of weights (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there")


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder or file to convert")
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--heads", type=int, help="attention heads, where the checkpoint does not say it")
    parser.add_argument("--tokenizer", help="to save beside the model: rank file, folder, or vocabulary of an ELMo")
    parser.add_argument("--encoding", choices=sorted(ENCODINGS), help="how a vocabulary of tiktoken splits text")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there")


def _card_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder that a model was saved to")
    parser.add_argument("--repository", help="its name on the Hub, for the snippet")
    parser.add_argument("--revision", help="commit that the snippet pins")
    parser.add_argument("--without-results", action="store_true", help="allow a card without numbers")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or repository of the Hub, ours or stock's")
    parser.add_argument("--revision", help="commit, tag or branch of the repository")
    parser.add_argument("--batch-size", type=int, default=1, help="rows (%(default)s)")
    parser.add_argument("--length", type=int, help="tokens a row; else as many as the model has positions")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of numbers (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it would run (%(default)s)")


def _look_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or repository of the Hub, ours or stock's")
    parser.add_argument("--text", action="append", help="what it reads; a second one is its pair or the target")
    parser.add_argument("--image", metavar="FILE", help="picture, for a model that reads images")
    parser.add_argument("--out", required=True, metavar="FILE", help="page to write, ending in .html")
    parser.add_argument("--length", type=int, help="tokens to pad the text to, to see the mask of padding")
    parser.add_argument("--revision", help="commit, tag or branch of the repository")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there")


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or repository of the Hub")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of `transformers serve`")


@dataclass(frozen=True)
class Command:
    """A sub-command: what runs, its options, what `--help` says, and examples of its arguments."""

    run: Callable[[argparse.Namespace], None]
    add_options: Callable[[argparse.ArgumentParser], None]
    description: str
    examples: tuple[str, ...]


COMMANDS = {
    "push": Command(
        _push,
        _push_options,
        "Push a saved model to the Hub, by allow-list, with its card. Run it again after an interruption.",
        ("runs/quickstart/model me/my-gpt2 --dry-run", "runs/quickstart/model me/my-gpt2 --private"),
    ),
    "export": Command(
        _export,
        _export_options,
        "Write a model as a stock GPT-2, BERT or BLIP-2 checkpoint. Any tool that reads those reads it.",
        ("runs/quickstart/model runs/stock-gpt2", "me/my-bert exported --revision 3f2a90c"),
    ),
    "convert": Command(
        _convert,
        _convert_options,
        "Convert OpenAI's GPT-2 release, nanoGPT's ckpt.pt, published weights of ELMo or a tiktoken vocabulary. The "
        "format is recognised.",
        (
            "models/124M runs/gpt2-124m",
            "out-shakespeare/ckpt.pt runs/shakespeare --tokenizer gpt2-tokenizer/",
            "cl100k_base.tiktoken runs/tokenizer",
            "elmo_2x4096_512 runs/elmo --tokenizer vocab.txt",
        ),
    ),
    "card": Command(
        _card,
        _card_options,
        "Render a model's card again, from its card.json. With a repository's name it is printed.",
        ("runs/quickstart/model", "runs/quickstart/model --repository me/my-gpt2 --revision 3f2a90c"),
    ),
    "inspect": Command(
        _inspect,
        _inspect_options,
        "Show configuration, parameters and the memory that inference and training need. No weight is loaded.",
        ("gpt2", "runs/quickstart/model --batch-size 8 --length 256 --dtype bfloat16"),
    ),
    "look": Command(
        _look,
        _look_options,
        "Show a model at work on a page: tokens, embeddings, attention, what each layer predicts. It needs no network.",
        (
            "runs/quickstart/model --text import --out page.html",
            "runs/blip2_digits_2 --image seven.png --text a --out page.html --overwrite",
        ),
    ),
    "serve": Command(
        _serve,
        _serve_options,
        "Serve a model over HTTP by `transformers serve`, whose options follow. `transformers chat` talks to it.",
        ("runs/quickstart/model", "me/my-gpt2 --port 9000 --device cuda"),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command and its sub-commands."""
    parser = argparse.ArgumentParser(prog="hf-custom", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        page = commands.add_parser(
            name,
            help=command.description.split(". ")[0].removesuffix("."),
            description=command.description,
            epilog="examples:\n" + "\n".join(f"  hf-custom {name} {example}" for example in command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        page.set_defaults(run=command.run)
        command.add_options(page)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; a mistake of the user's ends it with one line, `HF_CUSTOM_TRACEBACK=1` shows where."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError, HfHubHTTPError, StrictDataclassError) as error:
        if os.environ.get("HF_CUSTOM_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
