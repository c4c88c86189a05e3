"""Environment of every test: offline, one thread, seeded; the folder of real data for those marked `data`."""

import logging
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest  # noqa: E402 - the variables above are read at import
import torch  # noqa: E402
import transformers  # noqa: E402

import hf_custom  # noqa: E402 - registers the classes
from hf_custom import modeling_bert, modeling_gpt2, modeling_transformer  # noqa: E402
from hf_custom.packing import choose_packing  # noqa: E402

# One thread: the models are tiny, and threads that wait for each other cost more than they compute.
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
# What the host says reaches `caplog`.
transformers.logging.enable_propagation()


def pytest_addoption(parser):
    parser.addoption("--data", help="folder of real data for the tests marked `data`")


@pytest.fixture(autouse=True)
def _seed():
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def _stock_again():
    """Stock checkpoints give stock classes again, whatever the test (or a script that it ran) did."""
    yield
    hf_custom.register(replace_stock=False)


@pytest.fixture(autouse=True)
def _disk_that_keeps_what_it_is_given(monkeypatch):
    """Waiting for the disk, which other tests keep busy, would be most of the time that a run of seconds takes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def records():
    """What the host logs at warning or above while the test runs, Python's warnings being errors."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found
    logger.removeHandler(handler)


@pytest.fixture
def packings(monkeypatch):
    """What each call of a model chose."""
    chosen = []

    def spy(*args, **kwargs):
        found = choose_packing(*args, **kwargs)
        chosen.append(found[0])
        return found

    for module in (modeling_gpt2, modeling_bert, modeling_transformer):
        monkeypatch.setattr(module, "choose_packing", spy)
    return chosen


@pytest.fixture
def data_folder(request):
    """The folder given by --data."""
    folder = request.config.getoption("--data")
    if folder is None:
        pytest.skip("needs --data FOLDER")
    return folder
