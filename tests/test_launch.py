"""The launchers of a cluster, run dry: what they would start is what the scripts understand, and 75 means "again"."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.run import parse_args

from training import preemption, run_clm
from training.args import parse_arguments
from training.launch import ray_train, torchrun
from training.sharding import PARTS

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "training" / "launch"
SLURM = LAUNCH / "slurm.sh"
RECIPE = "training/recipes/clm_mini.yaml"


def understood(words):
    """Launcher's and script's arguments of a command line, each read by its own parser; nothing is started."""
    assert words[:3] == ["python", "-m", "training.launch.torchrun"]
    launcher = parse_args(words[3:])
    assert launcher.module and launcher.training_script == "training.run_clm"
    argv = launcher.training_script_args
    return launcher, parse_arguments(run_clm.ARGUMENTS, [str(ROOT / argv[0]), *argv[1:], "--use_cpu"], "")[-1]


def test_exit_code_is_that_of_training():
    assert torchrun.PREEMPTED == preemption.PREEMPTED == ray_train.PREEMPTED == 75
    assert set(torchrun.PASSED_ON) <= set(preemption.SIGNALS)


# --- The launcher of a node ---

WORKER = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def save(number, frame):
    time.sleep(0.3)
    (folder / f"saved-{rank}").write_text(signal.Signals(number).name)
    # What torchrun sends to the others once the first has left.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.3)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
(folder / f"ready-{rank}").touch()
time.sleep(60)
"""


def test_launcher_passes_a_signal_on_and_exits_as_its_workers(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "training.launch.torchrun", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([*command, str(script), str(tmp_path)], cwd=ROOT, env=environment, text=True)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(timeout=30) == 75
    finally:
        launcher.kill()
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2


@pytest.mark.parametrize(("codes", "expected"), [((75,), 75), ((75, 1), 75), ((1, 75), 1), ((-9, 75), 137)])
def test_launcher_exits_as_the_first_that_failed(codes, expected, monkeypatch):
    failures = {}
    for rank, code in enumerate(codes):
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
        failures[rank].timestamp = 100 + rank
    installed = {}

    def fail(args):
        assert args.signals_to_handle == "SIGINT,SIGHUP,SIGQUIT"
        raise ChildFailedError("training", failures)

    monkeypatch.setattr(torchrun, "run", fail)
    monkeypatch.setattr(torchrun.signal, "signal", installed.__setitem__)
    with pytest.raises(SystemExit) as end:
        torchrun.main(["--standalone", "x.py"])
    assert end.value.code == expected
    assert installed == dict.fromkeys((signal.SIGTERM, signal.SIGUSR1), torchrun.tell_workers)


def test_launcher_without_workers_is_to_be_started_again(monkeypatch):
    monkeypatch.setattr(torchrun.psutil, "Process", lambda: SimpleNamespace(children=list))
    with pytest.raises(SystemExit) as end:
        torchrun.tell_workers(signal.SIGTERM, None)
    assert end.value.code == 75


def test_launcher_tells_the_rest_when_one_has_gone(monkeypatch):
    told = []

    def gone(number):
        raise psutil.NoSuchProcess(1)

    workers = [SimpleNamespace(send_signal=gone), SimpleNamespace(send_signal=told.append)]
    monkeypatch.setattr(torchrun.psutil, "Process", lambda: SimpleNamespace(children=lambda: workers))
    torchrun.tell_workers(signal.SIGTERM, None)
    assert told == [signal.SIGTERM]


# --- Slurm ---

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD/start-$(ls "$RECORD" | grep -c start-)"
# Slurm signals the tasks; the batch shell may hear it too, and has to outlive it.
if [ -n "${SIGNAL:-}" ]; then kill -s "$SIGNAL" $PPID; fi
exit "$(cat "$RECORD/code")"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> "$RECORD/asked"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """Run the batch script with commands of Slurm that record, where srun ends with `code`."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(*arguments, code=0, **variables):
        (tmp_path / "code").write_text(str(code))
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path)}
        environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
        environment |= {"SLURM_GPUS_ON_NODE": "4", **variables}
        return subprocess.run([bash(), SLURM, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)

    return start


def bash():
    return shutil.which("bash") or pytest.skip("bash is not installed")


def test_slurm_script_is_whole():
    subprocess.run([bash(), "-n", SLURM], check=True)
    options = [line.removeprefix("#SBATCH ") for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@120", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("name", ["", "TERM", "USR1"])
def test_slurm_asks_for_another_turn_when_preempted(slurm, tmp_path, name):
    arguments = ["training.run_clm", RECIPE, "--output_dir", "runs/a b"]
    preempted = slurm(*arguments, code=75, SIGNAL=name)
    assert preempted.returncode == 75 and (tmp_path / "asked").read_text() == "requeue 42\n"
    done = slurm(*arguments, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and (tmp_path / "asked").read_text() == "requeue 42\n"
    found = []
    for turn in (0, 1):
        words = (tmp_path / f"start-{turn}").read_text().splitlines()
        start = words.index("python")
        assert words[:start] == ["--kill-on-bad-exit=0", "--wait=300"]
        found.append(understood(words[start:]))
    launcher, training = found[0]
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.rdzv_backend) == ("2", "4", "c10d")
    assert launcher.rdzv_endpoint == "node7:29500"
    assert [launcher.rdzv_id for launcher, _ in found] == ["42-0", "42-1"]
    assert all(training.resume for _, training in found) and training.output_dir == "runs/a b"


def test_slurm_ends_with_a_failure_and_with_too_many_turns(slurm, tmp_path):
    assert slurm("training.run_clm", RECIPE, code=1).returncode == 1
    last = slurm("training.run_clm", RECIPE, code=75, SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert last.returncode == 75 and "MAX_REQUEUES" in last.stderr
    assert not (tmp_path / "asked").exists()


def test_slurm_names_what_is_missing(slurm, tmp_path):
    missing = slurm()
    assert missing.returncode == 2 and "usage: sbatch" in missing.stderr
    (tmp_path / "scontrol").write_text("#!/bin/bash\n")
    missing = slurm("training.run_clm")
    assert missing.returncode == 2 and "names no node" in missing.stderr and not list(tmp_path.glob("start-*"))


# --- Accelerate ---


def test_plan_of_fsdp2_reaches_accelerate_whole(monkeypatch):
    """The file through Accelerate's own launcher and plug-in, up to where processes would start."""
    file = ROOT / "training" / "accelerate" / "fsdp2.yaml"
    words = ["--config_file", str(file), "--fsdp_transformer_layer_cls_to_wrap", "CustomBertLayer", "-m", "x"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith("FSDP"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    # A flag goes before the file, as the plan of a BERT needs it.
    assert plugin.transformer_cls_names_to_wrap == ["CustomBertLayer"]
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.state_dict_type.name == PARTS


# --- Kubernetes ---


@pytest.fixture
def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_jobset_starts_what_the_scripts_understand(jobset):
    (nodes,) = jobset["spec"]["replicatedJobs"]
    job = nodes["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    launcher, training = understood(container["command"])
    assert training.resume and training.output_dir.startswith("/output/")
    assert "/output" in [mount["mountPath"] for mount in container["volumeMounts"]]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert int(launcher.nnodes) == job["parallelism"] == job["completions"]
    assert int(launcher.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    # JobSet's name of the first pod: set, job, index of the job, index of the pod; the set's name is the subdomain.
    host, port = launcher.rdzv_endpoint.split(":")
    assert host == f"{jobset['metadata']['name']}-{nodes['name']}-0-0.{jobset['metadata']['name']}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert jobset["spec"]["network"]["enableDNSHostnames"] and job["completionMode"] == "Indexed"


def test_jobset_starts_again_what_was_preempted(jobset):
    (nodes,) = jobset["spec"]["replicatedJobs"]
    job = nodes["template"]["spec"]
    pod = job["template"]["spec"]
    # The API refuses a pod failure policy with another restart policy.
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    on_code, on_condition = job["podFailurePolicy"]["rules"]
    assert on_code["action"] == on_condition["action"] == "FailJob"
    assert on_code["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"],
        "operator": "In",
        "values": [torchrun.PREEMPTED],
    }
    assert on_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


# --- Ray ---

STUB = {
    "__init__.py": "def init(**kwargs):\n    calls.append(kwargs)\n\n\ncalls = []\n",
    "train/__init__.py": """
class Config(dict):
    def __init__(self, **kwargs):
        super().__init__(kwargs)


class ScalingConfig(Config):
    pass


class RunConfig(Config):
    pass


class FailureConfig(Config):
    pass
""",
    "train/torch.py": """
class TorchTrainer:
    made = []

    def __init__(self, train_loop_per_worker, *, train_loop_config, scaling_config, run_config):
        self.run = lambda: train_loop_per_worker(train_loop_config)
        self.scaling, self.failures = scaling_config, run_config["failure_config"]

    def fit(self):
        self.made.append(self)
        for turn in range(1 + self.failures["max_failures"]):
            try:
                return self.run()
            except RuntimeError as error:
                self.error = error
""",
}


@pytest.fixture
def ray(tmp_path, monkeypatch):
    """A module that stands for Ray, which starts one worker here and starts it again when it fails."""
    for name, text in STUB.items():
        file = tmp_path / "ray" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: sys.modules["ray.train.torch"].TorchTrainer.made[-1]
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        del sys.modules[name]


def test_ray_starts_again_until_training_is_done(ray, monkeypatch, tmp_path):
    started, codes = [], [75, 1, None]

    def train(argv):
        started.append(argv)
        code = codes[len(started) - 1]
        if code is not None:
            sys.exit(code)

    monkeypatch.setattr(run_clm, "main", train)
    output = ["--output_dir", str(tmp_path / "out")]
    ray_train.main(["--workers", "3", "training.run_clm", str(ROOT / RECIPE), *output])
    assert len(started) == 3
    assert all(parse_arguments(run_clm.ARGUMENTS, [*argv, "--use_cpu"], "")[-1].resume for argv in started)
    trainer = ray()
    assert trainer.scaling == {"num_workers": 3, "use_gpu": True} and "ended with 1" in str(trainer.error)
    assert sys.modules["ray"].calls == [{"runtime_env": {"working_dir": "."}, "ignore_reinit_error": True}]
    monkeypatch.setattr(run_clm, "main", lambda argv: sys.exit(75))
    ray_train.main(["--use_cpu", "--max_failures", "0", "training.run_clm", *output])
    assert ray().scaling["use_gpu"] is False and "pre-empted" in str(ray().error)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--workers", "0", "training.run_clm"], "--workers is 0"),
        (["os"], "os is no script"),
        (["training.run_clm", "--output_dir", "runs/clm"], "absolute path"),
        (["training.run_clm", "--output_dir=runs/clm"], "absolute path"),
        (["training.run_clm", RECIPE], "absolute path"),
        (["training.run_clm", "--output_dir=/shared/clm"], "Ray Train cannot be imported"),
    ],
)
def test_ray_names_a_mistake_in_one_line(argv, named, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=named) as end:
        ray_train.main(argv)
    assert "\n" not in end.value.code
