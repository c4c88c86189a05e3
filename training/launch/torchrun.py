"""`torchrun` that lets training save when the machine is taken away, and says so.

`torchrun` ends its workers half a minute after a signal, whether or not they have saved, does not hear SIGUSR1, of
which it dies, and exits with 1 whatever its workers exited with. Here SIGTERM and SIGUSR1 go on to the workers, which
save and exit with 75, and so does this process. Everything else, and all options, are torchrun's:

  python -m training.launch.torchrun --nnodes 1 --nproc_per_node 8 -m training.run_clm RECIPE --resume
"""

import signal
import sys
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

# What a run exits with that was told to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again".
PREEMPTED = 75
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
# What torchrun goes on to handle itself: an interrupt from the keyboard reaches the workers without it.
LEFT_TO_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"


def tell_workers(number: int, frame: FrameType | None) -> None:
    """Handler of a signal: every worker gets it. Without any, nothing is there to be saved."""
    workers = psutil.Process().children()
    if not workers:
        sys.exit(PREEMPTED)
    for worker in workers:
        try:
            worker.send_signal(number)
        except psutil.NoSuchProcess:
            # It ended by itself meanwhile.
            continue


def exit_code_of(error: ChildFailedError) -> int:
    """That of the worker that failed first; 128 and the signal's number for one that a signal ended."""
    _, first = error.get_first_failure()
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def main(argv: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    args.signals_to_handle = LEFT_TO_TORCHRUN
    for number in PASSED_ON:
        signal.signal(number, tell_workers)
    try:
        run(args)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code_of(error))


if __name__ == "__main__":
    main()
