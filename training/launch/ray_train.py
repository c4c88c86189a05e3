"""Training on a Ray cluster by Ray Train (installed apart: pip install "ray[train]"), from the repository's folder.

Examples:
  python -m training.launch.ray_train --workers 8 training.run_clm training/recipes/clm_mini.yaml \\
    --output_dir SHARED/clm

First the module of a script, then its arguments. The output folder lies where all nodes see it and is an absolute path,
for workers run in a copy of this folder. Ray starts all workers again when one is lost, up to --max_failures times, and
--resume, which is always given, goes on from the newest verified checkpoint: save often (--save_steps), since Ray runs
the script in a thread, where no signal is heard.
"""

import argparse
import importlib
import sys
from pathlib import Path

from training.args import user_errors
from training.launch.torchrun import PREEMPTED


def work(config: dict) -> None:
    """What each worker runs, in the process group that Ray has made.

    Raises:
        RuntimeError: when the run was pre-empted or failed by an exit, which Ray must not take for its end.
    """
    try:
        importlib.import_module(config["module"]).main([*config["arguments"], "--resume"])
    except SystemExit as end:
        if end.code == PREEMPTED:
            raise RuntimeError("pre-empted and saved; to be started again") from None
        if end.code not in (None, 0):
            raise RuntimeError(f"{config['module']} ended with {end.code}") from None


def build_parser() -> argparse.ArgumentParser:
    """The parser of this script; what follows the module is the module's own."""
    parser = argparse.ArgumentParser(
        prog="python -m training.launch.ray_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, one a GPU (%(default)s)")
    parser.add_argument("--use_cpu", action="store_true", help="workers without GPUs; the script needs --use_cpu too")
    parser.add_argument("--max_failures", type=int, default=10, help="starts after the first (%(default)s)")
    parser.add_argument("module", help="of a script, as training.run_clm")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers} but must be at least 1.")
    if not args.module.startswith("training.run_"):
        raise ValueError(f"{args.module} is no script of this folder. Name one, as training.run_clm.")
    folders = [
        argument.partition("=")[2] if "=" in argument else following
        for argument, following in zip(args.arguments, [*args.arguments[1:], ""], strict=True)
        if argument.partition("=")[0] == "--output_dir"
    ]
    if not folders or not Path(folders[-1]).is_absolute():
        raise ValueError("--output_dir must be an absolute path that all nodes see. Give it behind the script's name.")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with user_errors():
        _check(args)
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        sys.exit(f'error: Ray Train cannot be imported ({error}). Install it: pip install "ray[train]".')
    ray.init(runtime_env={"working_dir": "."}, ignore_reinit_error=True)
    trainer = TorchTrainer(
        work,
        train_loop_config={"module": args.module, "arguments": args.arguments},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.use_cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=args.max_failures)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
