"""A SLURM of one node, run by whoever runs the tests, from programs that `.ci/slurm` unpacks."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1] / ".slurm"
LIBRARIES = "usr/lib/x86_64-linux-gnu"

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PluginDir={plugins}
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=2
MinJobAge=2
InactiveLimit=0
NodeName={host} CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 OverSubscribe=FORCE:8 State=UP
"""


def missing():
    """Why there is no SLURM to test with; None if there is one."""
    return None if (ROOT / "unpacked").exists() else "needs SLURM's programs: run .ci/slurm"


@contextmanager
def slurm(folder):
    """The environment of a shell on the node, while it runs."""
    folder = Path(folder)
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    plugins = ROOT / LIBRARIES / "slurm-wlm"
    host, cpus = socket.gethostname(), len(os.sched_getaffinity(0))
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=host, cpus=cpus, ports=free_ports(2), user=os.environ.get("USER", "root"), folder=folder,
                      plugins=plugins)
    )  # fmt: skip
    libraries = os.pathsep.join([str(plugins), str(ROOT / LIBRARIES)])
    programs = folder / "bin"
    programs.mkdir()
    for program in (ROOT / "usr/bin").glob("s*"):
        # Jobs inherit the environment, and Python shall not see these libraries.
        (programs / program.name).write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {program} "$@"\n')
        (programs / program.name).chmod(0o755)
    environment = {
        **os.environ,
        "SLURM_CONF": str(config),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
    }
    daemons = {**environment, "LD_LIBRARY_PATH": libraries}
    stepd = folder / "slurmstepd"
    stepd.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {ROOT / "usr/sbin/slurmstepd-wlm"} "$@"\n')
    stepd.chmod(0o755)
    started = []
    try:
        for name, more in (("slurmctld", []), ("slurmd", ["-N", host, "-d", str(stepd)])):
            with open(folder / f"{name}.out", "wb") as out:
                command = [ROOT / "usr/sbin" / f"{name}-wlm", "-D", "-f", config, *more]
                started.append(subprocess.Popen(command, env=daemons, stdout=out, stderr=out, cwd=folder))
        end = time.monotonic() + 30
        while "idle" not in run(environment, "sinfo", "--noheader", "--format=%T"):
            if time.monotonic() > end:
                logs = {p.name: p.read_text(errors="replace")[-2000:] for p in folder.glob("slurm*.*o*")}
                raise RuntimeError(f"SLURM doesn't come up: {logs}")
            time.sleep(0.2)
        yield environment
    finally:
        run(environment, "scancel", "--user", os.environ.get("USER", "root"))
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder / "spool", ignore_errors=True)


def run(environment, *command):
    """What a command of SLURM prints."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30).stdout


def free_ports(count):
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
