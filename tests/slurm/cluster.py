"""A real Slurm cluster on this one machine: slurmctld, and a slurmd for each node in a network namespace of its own.

    python -m tests.slurm.cluster install what it needs, from the distribution's packages, where root may
    python -m tests.slurm.cluster up      start it, print the environment that its commands need, leave it running
    python -m tests.slurm.cluster down

Needs root and Debian's slurmctld, slurmd, slurm-client, munge and iproute2. Why it is set up as it is:

- Namespaces: several slurmd on one address confuse c10d, which tells nodes apart by name and address. nsenter and not
  `ip netns exec`, which hides the cgroup mounts that slurmd looks for.
- `hosts: files`: with DNS every connection of c10d waits 10 s for a reverse look-up that nobody answers.
- `proctrack/linuxproc`: processes of a job die with it, without cgroups.
- `cred_expire=5`: also the wait before a requeued job may start again, by default 120 s.
- Process 1 of a container may not reap: whether a daemon lives is read from /proc/PID/status.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "ip", "nsenter", "unshare")
_BRIDGE, _HEAD = "slbr0", "10.99.0.1"
_CONTROLLER_PORT = 16817


def cannot_run() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster on one host needs root: daemons and network namespaces"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install {' '.join(PACKAGES)}"
    probe = subprocess.run(["ip", "netns", "add", "slurm-probe"], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"network namespaces cannot be made here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "slurm-probe"], check=False)
    return None


def run(*words: str, check: bool = True, **options) -> str:
    """stdout of a command; AssertionError with its words where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def wait_for(what: str, condition: Callable[[], object], timeout_s: float, interval_s: float = 0.2) -> object:
    """The first true value of `condition()`; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s:.0f} s still not: {what}")
        time.sleep(interval_s)


def is_alive(pid: int) -> bool:
    try:
        state = re.search(r"^State:\s*(\S)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return state is not None and state[1] not in "ZX"


class SlurmCluster:
    """Nodes node0, node1, ... Use as a context manager, or `up()` and `down()`."""

    def __init__(self, base: Path, num_nodes: int = 4) -> None:
        self.base, self.num_nodes = base, num_nodes
        self.conf = base / "etc" / "slurm.conf"

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(self.num_nodes)]

    def __enter__(self) -> SlurmCluster:
        self.down()  # what a killed test left
        self.up()
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    def up(self) -> None:
        for directory in ("etc", "state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.base / directory).mkdir(parents=True, exist_ok=True)
        os.environ["SLURM_CONF"] = str(self.conf)
        _start_munge()
        self._make_network()
        self._write_files()
        run("slurmctld", "-c", "-f", str(self.conf))
        for node in self.nodes:
            self.start_node(node)
        wait_for("all nodes idle", lambda: len(self.idle_nodes()) == self.num_nodes, 60)

    def down(self) -> None:
        os.environ["SLURM_CONF"] = str(self.conf)
        if self.conf.exists():
            subprocess.run(["timeout", "3", "scancel", "-u", "root"], capture_output=True)
        pids = [int(path.read_text()) for path in self.base.glob("*.pid") if path.read_text().strip()]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in pids:
            _kill(pid, signal.SIGKILL)
        for name in re.findall(r"^(node\d+)", run("ip", "netns", "list", check=False), re.MULTILINE):
            for pid in run("ip", "netns", "pids", name, check=False).split():
                _kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "link", "del", f"vs{name[4:]}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True)
        shutil.rmtree(self.base, ignore_errors=True)

    # ---- nodes, and what can happen to them ---------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        """Start a node's slurmd: own network, host name, /etc/hosts, /dev/shm."""
        etc = self.base / "etc"
        script = (
            f"mount --bind {etc}/hosts /etc/hosts; mount --bind {etc}/nsswitch.conf /etc/nsswitch.conf; "
            f"mount -t tmpfs tmpfs /dev/shm; hostname {node}; exec slurmd -N {node} -f {self.conf}"
        )
        run("nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "--mount", "sh", "-c", script)

    def slurmd_pid(self, node: str) -> int:
        return int((self.base / f"slurmd.{node}.pid").read_text())

    def in_node(self, node: str, *words: str) -> str:
        """Run a command in a node's namespaces."""
        return run("nsenter", "-t", str(self.slurmd_pid(node)), "--net", "--uts", "--mount", *words)

    def processes(self, node: str, pattern: str = "") -> list[int]:
        """Processes of a node whose command line matches; none of slurmd's own unless the pattern asks."""
        found = []
        for pid in map(int, run("ip", "netns", "pids", node).split()):
            try:
                command = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            if is_alive(pid) and re.search(pattern, command):
                found.append(pid)
        return found

    def ranks(self, node: str) -> list[int]:
        return self.processes(node, r"^\S*python\S* -m meditron_train train")

    def agents(self, node: str) -> list[int]:
        return self.processes(node, r"torchrun .*--rdzv-id")

    def kill(self, pids: list[int], number: int = signal.SIGKILL) -> None:
        assert pids, "there is nothing to kill"
        for pid in pids:
            _kill(pid, number)

    def lose_node(self, node: str) -> None:
        """Every process of the node dies at once, slurmd too: as if its power was cut."""
        self.kill(self.processes(node))

    def set_link(self, node: str, up: bool) -> None:
        run("ip", "link", "set", f"vs{node[4:]}", "up" if up else "down")

    def repair(self) -> None:
        """Links up, daemons running, all nodes idle."""
        for node in self.nodes:
            self.set_link(node, up=True)
            if not is_alive(self.slurmd_pid(node)):
                for pid in self.processes(node):
                    _kill(pid, signal.SIGKILL)
                self.start_node(node)
        run("scancel", "-u", "root", check=False)
        run("scontrol", "update", f"NodeName={','.join(self.nodes)}", "State=RESUME", check=False)
        wait_for("all nodes idle", lambda: len(self.idle_nodes()) == self.num_nodes, 90)

    def idle_nodes(self) -> set[str]:
        return set(run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())

    # ---- jobs ---------------------------------------------------------------------------------------------------

    @staticmethod
    def job(job_id: str) -> dict[str, str]:
        """What Slurm says of a job."""
        text = run("scontrol", "show", "job", job_id, check=False)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def state(self, job_id: str) -> str:
        return self.job(job_id).get("JobState", "GONE")

    # ---- construction -------------------------------------------------------------------------------------------

    def _make_network(self) -> None:
        run("ip", "link", "add", _BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{_HEAD}/24", "dev", _BRIDGE)
        run("ip", "link", "set", _BRIDGE, "up")
        for number, node in enumerate(self.nodes):
            run("ip", "netns", "add", node)
            run("ip", "link", "add", f"vs{number}", "type", "veth", "peer", "name", "eth0", "netns", node)
            run("ip", "link", "set", f"vs{number}", "master", _BRIDGE, "up")
            run("ip", "-n", node, "link", "set", "lo", "up")
            run("ip", "-n", node, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
            run("ip", "-n", node, "link", "set", "eth0", "up")
            run("ip", "-n", node, "route", "add", "default", "via", _HEAD)

    def _write_files(self) -> None:
        etc, head = self.base / "etc", socket.gethostname()
        hosts = ["127.0.0.1 localhost", f"{_HEAD} {head}"]
        hosts += [f"{_address(number)} {node}" for number, node in enumerate(self.nodes)]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        lines = [
            line
            for line in Path("/etc/nsswitch.conf").read_text().splitlines()
            if not line.startswith("hosts:")
        ]
        (etc / "nsswitch.conf").write_text("\n".join([*lines, "hosts: files"]) + "\n")
        (etc / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\n"
        )  # no detection, which fails without cgroup mounts
        node_lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr={_address(number)} Port=6818 CPUs=4 RealMemory=4000"
            for number, node in enumerate(self.nodes)
        ]
        self.conf.write_text(
            SLURM_CONF.format(
                base=self.base,
                head=head,
                address=_HEAD,
                port=_CONTROLLER_PORT,
                first_job=int(time.time()) % 100000 * 10,
            )
            + "\n".join(node_lines)
            + PARTITIONS
        )


SLURM_CONF = """ClusterName=test
SlurmctldHost={head}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
FirstJobId={first_job}
ReturnToService=2
SlurmctldTimeout=30
MessageTimeout=5
TCPTimeout=1
SlurmdTimeout=5
InactiveLimit=0
KillWait=15
MinJobAge=600
JobRequeue=1
WaitTime=0
"""
_PARTITION = "PartitionName={} Nodes=ALL State=UP OverSubscribe=NO"
PARTITIONS = "\n".join(
    (
        "",
        f"{_PARTITION.format('normal')} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20",
        f"{_PARTITION.format('urgent')} MaxTime=30 PriorityTier=10 PreemptMode=OFF",
        "",
    )
)


def _address(number: int) -> str:
    return f"10.99.0.{10 + number}"


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _start_munge() -> None:
    if _munge_answers():
        return
    for directory, mode in (("/run/munge", 0o755), ("/var/log/munge", 0o700)):
        Path(directory).mkdir(parents=True, exist_ok=True)
        shutil.chown(directory, "munge", "munge")
        os.chmod(directory, mode)
    key = Path("/etc/munge/munge.key")
    if not key.exists() or key.stat().st_size == 0:
        key.write_bytes(os.urandom(128))
        shutil.chown(key, "munge", "munge")
        key.chmod(0o400)
    run("setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups", "/usr/sbin/munged")
    wait_for("munged answers", _munge_answers, 10)


def _munge_answers() -> bool:
    return subprocess.run(["munge", "-n"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def install() -> str | None:
    """Install PACKAGES where they are missing; why that cannot be, or None."""
    if all(shutil.which(program) for program in _PROGRAMS):
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"Slurm is not installed, and only root can, with apt-get: {' '.join(PACKAGES)}"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-qq", *words], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            return f"apt-get {words[0]} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return None


def main() -> None:
    cluster = SlurmCluster(Path("/tmp/meditron-slurm"))
    if sys.argv[1:] == ["down"]:
        cluster.down()
    elif sys.argv[1:] == ["install"]:
        reason = install()
        print(f"no Slurm, its tests are skipped: {reason}" if reason else "Slurm is installed")
    elif sys.argv[1:] == ["up"]:
        reason = cannot_run()
        if reason:
            sys.exit(reason)
        cluster.down()
        cluster.up()
        print(f"export SLURM_CONF={cluster.conf}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
