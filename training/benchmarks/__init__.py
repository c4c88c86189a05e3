"""Speed and memory beside stock Transformers: `python -m training.benchmarks --help`."""
