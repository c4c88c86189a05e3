"""Faults injected into real runs of the scripts, and what became of each run: `python -m tests.faults`.

`table.py` lists the faults; `processes.py` starts runs and breaks them from within; `lab.py` holds the data, the runs
that others start from, and what counts as survived; the other files inject one kind of fault each.
"""

import os

# Read by the libraries when they are imported, so before anything else of this folder is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
