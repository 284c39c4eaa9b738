"""A Slurm cluster of one node with counted GPUs, on loopback, for as long as a test needs it.

Everything lies in one folder: configuration, keys, sockets, state, logs. ``/etc/slurm`` is neither read nor written.
The GPUs are twins of ``/dev/null``: Slurm counts them, hands them out and tells each job which it has, as it does with
real ones; nothing can be computed on them. Memory is counted but not enforced, time limits are enforced.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "setpriv")

SLURM_CONF = """\
ClusterName=dmirtest
SlurmctldHost={node}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/bin/task_begins
TaskEpilog={folder}/bin/task_ends
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
# jobs that have ended stay in the list: what was asked of them is read there
MinJobAge=86400
GresTypes=gpu
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=cpu Nodes={node} Default=YES MaxTime=7-0 State=UP
PartitionName=gpu Nodes={node} MaxTime=7-0 State=UP
"""

# Snakemake's step inside a job starts srun without SLURM_CONF; a cluster in use has its configuration in /etc/slurm
SRUN = """\
#!/bin/sh
SLURM_CONF={folder}/slurm.conf exec {srun} "$@"
"""

# one line a submission: the job's identifier and the arguments up to the wrapped command
SBATCH = """\
#!/bin/sh
answer=$({sbatch} "$@") || exit $?
options=$(printf '%s ' "$@" | tr '\\n' ' ' | sed 's/ --wrap=.* --array=/ --array=/; s/ --wrap=.*//')
printf '%s %s\\n' "$answer" "$options" >> {folder}/submitted.log
printf '%s\\n' "$answer"
"""

# one line each time that a process of a job begins or ends: when, what, the job, the cards that it sees
TASK = """\
#!/bin/sh
job=$SLURM_JOB_ID
[ -z "$SLURM_ARRAY_JOB_ID" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
echo "$(date +%s.%N) {event} $job ${{CUDA_VISIBLE_DEVICES:-none}}" >> {folder}/tasks.log
"""


@dataclass(frozen=True)
class Submission:
    """One call of sbatch."""

    job: str
    rule: str  # or "group_" and the group's name
    wildcards: str
    partition: str
    gpus: int
    memory_mb: int
    minutes: int
    tasks: int  # how many jobs of an array; 1 without


@dataclass(frozen=True)
class Held:
    """The cards that one job held, and from when to when (seconds since 1970; infinite while it runs)."""

    job: str
    cards: frozenset[str]
    begin: float
    end: float


@dataclass(frozen=True)
class Cluster:
    """A running cluster; ``environment`` is what its clients need."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
        return result.stdout

    def running(self, partition: str) -> list[str]:
        """Return the jobs that run in a partition now."""
        return self.call("squeue", "-h", "-r", "-t", "RUNNING", "-p", partition, "-o", "%A").split()

    def state(self, job: str) -> str:
        """Return the state of a job, whether it runs or has ended."""
        return re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))[1]

    def submissions(self) -> list[Submission]:
        """Return every call of sbatch so far, in order."""
        log = self.folder / "submitted.log"
        return [_submission(line) for line in log.read_text().splitlines()] if log.exists() else []

    def cards(self) -> list[Held]:
        """Return which cards each job that had any held, and for how long.

        The processes of a job see the same cards; a job holds them from its first process's begin to its last's end.
        """
        held: dict[str, Held] = {}
        for line in (self.folder / "tasks.log").read_text().splitlines():
            moment, event, job, cards = line.split()
            if cards == "none":
                continue
            seen = frozenset(cards.split(","))
            before = held.get(job, Held(job, seen, float(moment), float("inf")))
            held[job] = Held(job, before.cards | seen, before.begin, float(moment) if event == "ends" else float("inf"))
        return list(held.values())


def _submission(line: str) -> Submission:
    job, call = line.split(" ", 1)
    comment = re.search(r"--comment (\S+)", call)[1]
    rule, _, wildcards = comment.removeprefix("rule_").partition("_wildcards_")
    gpus = re.search(r"--gpus=(?:\w+:)?(\d+)", call)
    array = re.search(r"--array=(\d+)-(\d+)", call)
    return Submission(
        job=job,
        rule=rule,
        wildcards=wildcards,
        partition=re.search(r" -p (\S+)", call)[1],
        gpus=int(gpus[1]) if gpus else 0,
        memory_mb=int(re.search(r"--mem (\d+)", call)[1]),
        minutes=int(re.search(r" -t (\d+)", call)[1]),
        tasks=int(array[2]) - int(array[1]) + 1 if array else 1,
    )


def why_not() -> str | None:
    """Return why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "a Slurm of one node is started by root only"
    missing = [name for name in (*DAEMONS, *CLIENTS) if _find(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: on Debian `apt-get install slurm-wlm munge`"
    return None


def _find(name: str) -> str | None:
    # daemons are in folders that a user's PATH may lack
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


@contextlib.contextmanager
def slurm_cluster(folder: Path, gpus: int = 2, cpus: int = 8, memory_mb: int = 64000) -> Iterator[Cluster]:
    """Start a cluster and stop it, with all its jobs, however the block ends.

    Parameters
    ----------
    folder
        An empty folder for all its files; its path must be short, as it holds a socket.
    gpus, cpus, memory_mb
        What the node claims to have; more CPUs and memory than the machine has are allowed.

    Raises
    ------
    RuntimeError
        The node does not become idle; with the ends of the logs.
    """
    cluster = _configure(folder, gpus, cpus, memory_mb)
    processes: list[subprocess.Popen] = []
    try:
        munge = ["--key-file", "munge.key", "--pid-file", "munge.pid", "--seed-file", "munge.seed"]
        socket_path = ["--socket", str(folder / "munge.socket"), "--log-file", "munge.log"]
        processes.append(_start(cluster, "munged", "--foreground", "--force", *munge, *socket_path))
        _wait(lambda: (folder / "munge.socket").exists(), cluster, processes)
        processes.append(_start(cluster, "slurmctld", "-D", "-c"))
        processes.append(_start(cluster, "slurmd", "-D", "-N", _node()))
        _wait(lambda: _is_idle(cluster), cluster, processes)
        yield cluster
    finally:
        _stop(cluster, processes)


def _node() -> str:
    return socket.gethostname().split(".")[0]


def _configure(folder: Path, gpus: int, cpus: int, memory_mb: int) -> Cluster:
    folder.chmod(0o755)
    for name in ("bin", "state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(1024))
    for number in range(gpus):
        # Slurm sets CUDA_VISIBLE_DEVICES for character devices only, to the digits that end their names
        os.mknod(folder / f"nvidia{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    values = {"folder": folder, "node": _node(), "cpus": cpus, "memory_mb": memory_mb, "gpus": gpus}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(ports=_free_ports(2), **values))
    cards = f"{folder}/nvidia[0-{gpus - 1}]"
    (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={_node()} Name=gpu File={cards}\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    scripts = {
        "srun": SRUN.format(folder=folder, srun=_find("srun")),
        "sbatch": SBATCH.format(folder=folder, sbatch=_find("sbatch")),
        "task_begins": TASK.format(folder=folder, event="begins"),
        "task_ends": TASK.format(folder=folder, event="ends"),
    }
    for name, text in scripts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "CUDA_VISIBLE"))}
    path = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return Cluster(folder, {**outside, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path})


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start(cluster: Cluster, daemon: str, *arguments: str) -> subprocess.Popen:
    # the kernel ends the daemon should this process be killed before it can do so itself
    command = [_find("setpriv"), "--pdeathsig", "TERM", "--", _find(daemon), *arguments]
    with (cluster.folder / f"{daemon}.out").open("wb") as out:
        return subprocess.Popen(command, env=cluster.environment, cwd=cluster.folder, stdout=out, stderr=out)


def _is_idle(cluster: Cluster) -> bool:
    command = ["sinfo", "-h", "-p", "cpu", "-o", "%T"]
    answer = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=60)
    return answer.stdout.strip() == "idle"


def _wait(condition, cluster: Cluster, processes: list[subprocess.Popen], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or any(process.poll() is not None for process in processes):
            logs = [*sorted(cluster.folder.glob("*.log")), *sorted(cluster.folder.glob("*.out"))]
            ends = "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
            raise RuntimeError(f"the Slurm of one node did not start\n{ends}")
        time.sleep(0.1)


def _stop(cluster: Cluster, processes: list[subprocess.Popen]) -> None:
    """Cancel all jobs, then end the daemons, the last started first."""
    with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
        if len(processes) == len(DAEMONS):
            cluster.call("scancel", "--user", "root")
            end = time.monotonic() + 20
            while cluster.call("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.2)
    for process in reversed(processes):
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
