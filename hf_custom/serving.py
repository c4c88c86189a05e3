"""A model of this package behind the OpenAI-compatible server of the host, `transformers serve`."""

import argparse
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import transformers
from huggingface_hub import constants
from transformers import AutoTokenizer, PreTrainedModel

from .loading import find_model_class, load_config
from .registry import FAMILIES

# What `transformers[serving]` brings; the host itself says only that something is missing. `rich` is the client's.
REQUIREMENTS = ("fastapi", "uvicorn", "openai", "pydantic", "rich")
# The messages, a line each, and an open line for the answer. GPT-2 has no chat format: it was trained on running text,
# so roles would be words that it continues. Jinja renders nothing else here.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '\n' }}{% endfor %}"


def expose_classes() -> None:
    """Set the model classes of this package as attributes of the module `transformers`.

    The server looks up the class that a configuration's `architectures` names there, and not in the Auto classes (its
    `ModelManager._load_model`), so that classes which are registered but live elsewhere are not found. Our names begin
    with `Custom`; a name that the host has of its own is left alone.
    """
    package = import_module(__package__)
    for name in package.__all__:
        found = getattr(package, name)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and not hasattr(transformers, name):
            setattr(transformers, name, found)


def check_requirements() -> None:
    """Raises:
    ImportError: naming the packages that the server needs and does not find, and the command that installs them.
    """
    missing = [name for name in REQUIREMENTS if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the server needs {', '.join(missing)}. Install what it needs: `pip install 'transformers[serving]'`."
        )


def _check_model(model: str) -> None:
    """Refuse what the server would refuse only when asked, or not understand."""
    if Path(model).is_dir() and "@" in model:
        raise ValueError(f"the server reads {model} as a name and, behind the @, a revision. Rename the folder.")
    name, _, revision = model.partition("@")
    config = load_config(name, revision or None)
    model_class = find_model_class(config)
    writers = {family.auto_classes.get("AutoModelForCausalLM", "").split(".")[-1] for family, _ in FAMILIES}
    if model_class.__name__ not in writers - {""}:
        raise ValueError(
            f"{model} is a {model_class.__name__}, which the server cannot run: it takes language models that write "
            f"text. Serve one of {', '.join(sorted(writers - {''}))}."
        )


def template_arguments(model: str, arguments: list[str]) -> list[str]:
    """The arguments with the plain template for a tokenizer that has none, unless they name one.

    The template goes through the host's option `--chat-template-kwargs`, whose contents reach the tokenizer's
    `apply_chat_template` with each request. The tokenizer and its files stay as they are, and a request may bring
    another template in its own `chat_template_kwargs`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--chat-template-kwargs", default="{}")
    known, others = parser.parse_known_args(arguments)
    try:
        options = json.loads(known.chat_template_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"`--chat-template-kwargs` is no JSON ({error}). Write it as '{{\"name\": value}}'.") from None
    if not isinstance(options, dict):
        raise ValueError("`--chat-template-kwargs` is no JSON object. Write it as '{\"name\": value}'.")
    name, _, revision = model.partition("@")
    if AutoTokenizer.from_pretrained(name, revision=revision or "main").chat_template is None:
        options = {"chat_template": PLAIN_TEMPLATE, **options}
    return [*others, *(["--chat-template-kwargs", json.dumps(options)] if options else [])]


def serve(model: str, arguments: list[str] | None = None):
    """Run the host's server with one model until it is interrupted.

    Args:
        model: a folder or a repository of the Hub, with `@revision` if wanted; clients name it by the same words, or
            leave it out. A stock checkpoint is served by its stock class. The list at `/v1/models` is that of the
            cache of the Hub and has no folders.
        arguments: options of `transformers serve`, as `["--port", "8000"]`.

    Returns:
        The host's `Serve`, running still with `--non-blocking` and ended by its `kill_server()`; `None` when
        interrupted.

    Raises:
        ImportError: without the packages of `transformers[serving]`.
        OSError, ValueError: for a model that is not there or writes no text, or an unknown option, before anything is
            loaded.
    """
    check_requirements()
    _check_model(model)
    expose_classes()
    arguments = template_arguments(model, list(arguments or []))
    # The list of models that clients ask for is that of the cache, which the host expects to be there.
    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    # Only here, because they need the packages.
    from click import Abort, UsageError
    from transformers.cli.transformers import app

    try:
        return app(["serve", model, *arguments], prog_name="hf-custom", standalone_mode=False)
    except Abort:
        return None  # interrupted, which is how a server ends
    except UsageError as error:
        cause = error.format_message().strip().splitlines()[0]
        raise ValueError(f"{cause} See `transformers serve --help` for the options.") from None


__all__ = ["check_requirements", "expose_classes", "serve"]
