"""Pushing a model to the Hub: what may leave this machine, what it is checked for, and proof that it runs alone.

A folder is pushed by allow-list. Each file is what its name says, none holds a token, no pickle leaves; weights go
first and one by one, so that a push that was interrupted goes on where it stopped; the card comes last, because it
names the commit that it pins.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .cards import HOST_MARK, MARK, RECORD, CardRecord, render_card
from .folders import TARGET_TOKENIZER, read_json, whole_folder
from .loading import check_safetensors, weight_files

logger = logging.get_logger(__name__)

# What leaves, by name, and what it is. All else stays.
ALLOWED = {
    "*.safetensors": "weights",
    "model.safetensors.index.json": "weights",
    "config.json": "configuration",
    "generation_config.json": "configuration",
    "adapter_config.json": "configuration",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "vocab.json": "tokenizer",
    "merges.txt": "tokenizer",
    "vocab.txt": "tokenizer",
    "chat_template.jinja": "tokenizer",
    "processor_config.json": "processor",
    "preprocessor_config.json": "processor",
    "*.py": "code",
    "README.md": "card",
    RECORD: "card",
    "metrics.json": "card",
    "*.png": "card",
}
CARD = "README.md"
SHARD_SIZE = "5GB"
# The Hub takes no larger file.
MAX_FILE_BYTES = 50 * 10**9
# What a secret looks like, and whose it is.
SECRETS = {
    "a Hugging Face token": rb"hf_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}",
    "an OpenAI or Anthropic key": rb"sk-[A-Za-z0-9_-]{32,}",
    "an AWS key": rb"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "a Google key": rb"AIza[A-Za-z0-9_-]{35}",
    "a Slack token": rb"xox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_SECRET = {owner: re.compile(rb"(?<![A-Za-z0-9_])(?:" + pattern + rb")") for owner, pattern in SECRETS.items()}
_PNG = b"\x89PNG\r\n\x1a\n"

# Runs where the package cannot be imported; prints nothing unless something is wrong.
_RELOAD = """
import sys
sys.modules["hf_custom"] = None  # from now on `import hf_custom` fails, installed or not
try:
    import hf_custom
except ImportError:
    pass
else:
    sys.exit("hf_custom can be imported")
import torch
import transformers
from safetensors.torch import load_file
folder, tensors, auto_class = sys.argv[1:]
saved = load_file(tensors)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(saved["input_ids"]).logits
difference = (logits - saved["logits"]).abs().max().item()
if not difference <= 1e-5 * max(1.0, saved["logits"].abs().max().item()):
    sys.exit(f"the reloaded model's logits differ by {difference}")
"""


@dataclass
class UploadPlan:
    """What of a folder would leave, and what would stay.

    Attributes:
        files: (name, kind, bytes) of each that leaves.
        left_out: names of those that stay, folders with a slash behind.
    """

    folder: Path
    files: list[tuple[str, str, int]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(size for _, _, size in self.files)

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.files)
        lines = [f"{name:{width}}  {kind:13}  {size:>15,} bytes" for name, kind, size in self.files]
        lines.append(f"{len(self.files)} files, {self.size:,} bytes")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


def _kind(name: str) -> str | None:
    return next((kind for pattern, kind in ALLOWED.items() if fnmatch.fnmatchcase(name, pattern)), None)


def find_secret(content: bytes, tokens: tuple[str, ...] = ()) -> str | None:
    """Whose secret a file holds, in words, or `None`.

    Args:
        tokens: known ones, to be found whatever they look like.
    """
    if any(token.encode() in content for token in tokens if len(token) >= 8):
        return "your own token"
    return next((owner for owner, pattern in _SECRET.items() if pattern.search(content)), None)


def _text_to_scan(file: Path) -> bytes:
    """What of a file may hold text: all but the numbers of a safetensors file."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def _check_content(file: Path) -> None:
    """Refuse a file that is not what its name says."""
    if file.suffix == ".safetensors":
        check_safetensors(file)
    elif file.suffix == ".json":
        read_json(file)
    elif file.suffix == ".png" and not file.read_bytes().startswith(_PNG):
        raise ValueError(f"{file} is no PNG. Draw it again, or remove it.")
    elif file.suffix in (".py", ".md", ".txt", ".jinja"):
        try:
            compile(file.read_text("utf-8"), file.name, "exec") if file.suffix == ".py" else file.read_text("utf-8")
        except (UnicodeDecodeError, SyntaxError) as error:
            raise ValueError(f"{file} cannot be read as {file.suffix[1:]}: {error}. Save the model again.") from None


def plan_upload(folder: str | Path, tokens: tuple[str, ...] = ()) -> UploadPlan:
    """Sort a model's folder by the allow-list and check everything that would leave.

    Args:
        tokens: known secrets to look for, besides what looks like one.

    Raises:
        OSError, ValueError: when weights are missing, broken or pickles alone, a file is not what its name says, is too
            large, lies elsewhere behind a link, or holds a secret.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Name one that a model was saved to.")
    weights = {file.name for file in weight_files(folder)} if not (folder / "adapter_config.json").is_file() else None
    read_json(folder / ("config.json" if weights is not None else "adapter_config.json"))
    plan = UploadPlan(folder)
    for file in sorted((*folder.iterdir(), *folder.glob(f"{TARGET_TOKENIZER}/*"))):
        if file.is_dir() and file.name == TARGET_TOKENIZER:
            continue
        name, kind = file.relative_to(folder).as_posix(), None if file.is_dir() else _kind(file.name)
        if file.parent != folder and kind != "tokenizer":
            kind = None
        # Shards that no index names are leftovers of another save.
        is_leftover = file.suffix == ".safetensors" and weights is not None and file.name not in weights
        if kind is None or is_leftover:
            plan.left_out.append(f"{name}/" if file.is_dir() else name)
            continue
        if file.resolve().parent != folder.resolve() / Path(name).parent:
            raise ValueError(f"{file} is a link to {file.resolve()}, outside the folder. Copy the file, or remove it.")
        _check_content(file)
        if (owner := find_secret(_text_to_scan(file), tokens)) is not None:
            raise ValueError(f"{file} holds what looks like {owner}. Remove it, and revoke it if it was ever pushed.")
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(f"{file} has {size:,} bytes, but the Hub takes 50 GB a file. Save with `max_shard_size`.")
        plan.files.append((name, kind, size))
    return plan


def stamp_weights(source: Path, target: Path) -> None:
    """Copy a safetensors file, with the format and the versions that wrote it in its metadata."""
    with source.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        header["__metadata__"] = {"format": "pt", **versions, **header.get("__metadata__", {})}
        text = json.dumps(header, separators=(",", ":")).encode()
        # The numbers behind it stay aligned, as the format's own writer has them.
        text += b" " * (-len(text) % 8)
        with target.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(stream, out, 2**24)


def _explain(error: Exception, repo_id: str) -> OSError:
    """What the Hub or the connection to it said, as cause and remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    causes = {
        401: "the token is missing or wrong. Log in with `hf auth login`, or pass `token=`",
        403: "the token may not write there. Make one with write access, or name a repository of your own",
        404: "there is no such repository or revision. Check the name, and that your token may see it",
    }
    said = " ".join(str(error).split()) or type(error).__name__
    cause = causes.get(status, f"{said} Push again; what arrived is not sent twice")
    return (PermissionError if status in (401, 403) else OSError)(f"{repo_id} was not pushed: {cause}.")


def _check_may_write(api: HfApi, repo_id: str) -> None:
    """Refuse a token that can only read, before the first bytes of a file leave with the question how to send it."""
    access = api.whoami().get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise PermissionError(
            f"{repo_id} was not pushed: the token may only read. Make one with write access, and log in with "
            "`hf auth login`, or pass `token=`."
        )


def _publish_card(
    api: HfApi, folder: Path, repo_id: str, revision: str | None, commit: CommitInfo, is_new: bool, with_results: bool
) -> None:
    """The card, which pins the commit of the weights; where that is no new one, the pin stays. One that was written by
    hand stays too."""
    try:
        text = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text("utf-8")
    except EntryNotFoundError:
        text = ""
    if text and MARK not in text and HOST_MARK not in text:
        logger.warning(f"The card of {repo_id} was written by hand, so it stays as it is.")
        return
    pinned = re.search(r'revision="([0-9a-f]{40})"', text)
    card = render_card(folder, repo_id, pinned[1] if pinned and not is_new else commit.oid, with_results)
    operation = CommitOperationAdd(CARD, str(card).encode())
    api.create_commit(repo_id, [operation], commit_message="Card of the model", revision=revision)


def _upload(
    api: HfApi, files: dict[str, Path], repo_id: str, revision: str | None, message: str, create_pr: bool
) -> CommitInfo:
    """Weights one by one, then all other files in one commit; weights that were replaced go."""
    with tempfile.TemporaryDirectory() as scratch:
        operations = []
        for name, file in files.items():
            if file.suffix == ".safetensors":
                stamp_weights(file, file := Path(scratch) / name)
            operation = CommitOperationAdd(name, str(file))
            if file.suffix == ".safetensors":
                # What the Hub has already, of an earlier push that was cut off, is not sent again.
                api.preupload_lfs_files(repo_id, [operation], revision=revision, create_pr=create_pr)
                if operation.path_or_fileobj == b"":  # it is there, so the copy is not needed
                    file.unlink()
            operations.append(operation)
        stale = [
            name
            for name in api.list_repo_files(repo_id, revision=None if create_pr else revision)
            if _kind(name) == "weights" and name not in files
        ]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    commit_message: str | None = None,
    with_card: bool = True,
    with_results: bool = True,
) -> CommitInfo | UploadPlan:
    """Push a saved model's folder to the Hub. Called again after an interruption it goes on where it stopped.

    Args:
        repo_id: made if it is not there.
        token: with the right to write; else the one of `hf auth login`.
        private: of a repository that is made.
        revision: branch to push to, made if it is not there.
        create_pr: open a pull request instead.
        dry_run: check everything, send nothing, and return what would leave.
        with_card: write the card, from `card.json`; else a README.md that is there goes as it is.
        with_results: `False` allows a card without metrics.

    Returns:
        The commit that holds the weights, which the card's snippet pins.

    Raises:
        OSError, ValueError: for what `plan_upload` and `render_card` refuse, before anything is sent; and with the
            Hub's reason and the remedy.
    """
    folder = Path(folder)
    plan = plan_upload(folder, tuple(filter(None, (token, get_token()))))
    card = render_card(folder, repo_id, with_results=with_results) if with_card else None
    if dry_run:
        return plan
    api = HfApi(token=token, library_name="hf_custom")
    files = {name: folder / name for name, _, _ in plan.files if not (with_card and name == CARD)}
    try:
        _check_may_write(api, repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if card is not None:
            card.validate()
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision).sha
        commit = _upload(api, files, repo_id, revision, commit_message or "Upload model", create_pr)
        if with_card:
            branch = commit.pr_revision if create_pr else revision
            _publish_card(api, folder, repo_id, branch, commit, commit.oid != head, with_results)
    # The client says in a RuntimeError that a large file did not arrive.
    except (HTTPError, RuntimeError) as error:
        raise _explain(error, repo_id) from error
    return commit


def publish_later(folder: str | Path, repo_id: str, **kwargs) -> Future:
    """`publish` in the background, of the folder as it is now: it may change or go meanwhile.

    Raises:
        OSError, ValueError: at once, for what `plan_upload` refuses.
    """
    folder = Path(folder)
    plan = plan_upload(folder)
    frozen = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for name, _, _ in plan.files:
        # A second name of the same content, where the disk has that.
        try:
            os.link(folder / name, frozen / name)
        except OSError:
            shutil.copyfile(folder / name, frozen / name)

    def send() -> CommitInfo:
        try:
            return publish(frozen, repo_id, **kwargs)
        finally:
            shutil.rmtree(frozen)

    return HfApi().run_as_future(send)


def push_to_hub(
    self: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = SHARD_SIZE,
    tags: list[str] | None = None,
    card: CardRecord | None = None,
) -> CommitInfo:
    """`push_to_hub` of this package's models: the host's arguments, with code, checks and card.

    Args:
        card: what was measured, for the card; without it the card has no results.

    Raises:
        OSError, ValueError: as `publish`.
    """
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, max_shard_size=max_shard_size)
        record = card or CardRecord(repo_id.split("/")[-1], "data that was not recorded")
        replace(record, tags=[*record.tags, *(self.model_tags or []), *(tags or [])]).save(folder)
        return publish(
            folder,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message="\n\n".join(filter(None, (commit_message or "Upload model", commit_description))),
            with_results=card is not None,
        )


def save_model_folder(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: CardRecord,
    pictures: tuple[str | Path, ...] = (),
) -> Path:
    """Write weights, code, tokenizer, pictures and card as one folder, which appears whole or not at all.

    Args:
        folder: replaced if it exists.
        pictures: files to copy beside the card.
    """
    with whole_folder(folder, overwrite=True) as draft:
        model.save_pretrained(draft, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(draft)
        for picture in pictures:
            shutil.copy(picture, draft)
        record.save(draft)
        render_card(draft).save(draft / CARD)
    return Path(folder)


@torch.no_grad()
def check_runs_alone(folder: str | Path, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Load the folder in a new process that has torch and transformers but cannot import this package, and compare.

    Raises:
        RuntimeError: when it does not load there or its logits are not those of `model`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tensors = Path(scratch) / "expected.safetensors"
        logits = model.eval()(input_ids).logits
        save_file({"input_ids": input_ids.cpu(), "logits": logits.cpu().contiguous()}, tensors)
        auto_class = [
            auto for auto, name in model.config.auto_classes.items() if name.endswith(f".{type(model).__name__}")
        ][-1]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": scratch,
            "HF_MODULES_CACHE": f"{scratch}/modules",
        }
        environment.pop("PYTHONPATH", None)
        result = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(Path(folder).resolve()), str(tensors), auto_class],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise RuntimeError(f"{folder} does not run alone: {result.stderr.strip()}")


__all__ = [
    "UploadPlan",
    "check_runs_alone",
    "plan_upload",
    "publish",
    "publish_later",
    "push_to_hub",
    "save_model_folder",
]
