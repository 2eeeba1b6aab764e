"""Slurm by processes of this machine, as far as submitit needs it: sbatch, srun, squeue, sacct, scancel.

`fake_slurm.py <folder> <command> <arguments>`; the folder has a file for each job: its state, and its process.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def sbatch(folder, script):
    found = re.search(r"--array=0-(\d+)%(\d+)", Path(script).read_text())
    number = time.time_ns() // 10**6 % 10**9  # submitit remembers numbers, of other tests too
    jobs = [f"{number}_{n}" for n in range(int(found[1]) + 1)] if found else [f"{number}"]
    for job in jobs:
        (folder / job).write_text("PENDING")
    at_once = found[2] if found else "1"
    command = [sys.executable, "-S", __file__, str(folder), "control", script, at_once, *jobs]
    null = subprocess.DEVNULL
    subprocess.Popen(command, start_new_session=True, stdin=null, stdout=null, stderr=null)
    print(f"Submitted batch job {number}")


def control(folder, script, at_once, *jobs):
    waiting, running = [*jobs], {}
    while waiting or running:
        for job, process in [*running.items()]:
            if process.poll() is not None:
                del running[job]
                if (folder / job).read_text().startswith("RUNNING"):
                    (folder / job).write_text("FAILED" if process.returncode else "COMPLETED")
        while waiting and len(running) < int(at_once):
            job = waiting.pop(0)
            if (folder / job).read_text() == "PENDING":
                array, _, task = job.partition("_")
                told = {"JOB_ID": array, "NTASKS": "1", "PROCID": "0"}
                told |= {"ARRAY_JOB_ID": array, "ARRAY_TASK_ID": task} if task else {}
                environment = os.environ | {f"SLURM_{name}": value for name, value in told.items()}
                running[job] = subprocess.Popen(["bash", script], env=environment, start_new_session=True)
                (folder / job).write_text(f"RUNNING {running[job].pid}")
        time.sleep(0.05)


def srun(_, *words):
    job, array, task = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    for place, descriptor in (("--output", 1), ("--error", 2)):
        path = words[words.index(place) + 1]
        for mark, value in (("%A", array), ("%a", task), ("%j", job), ("%t", "0")):
            path = path.replace(mark, value)
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    command = words[words.index("--error") + 2 :]
    os.execvp(command[0], command)


def squeue(folder, *_):
    print(*(job.name for job in folder.iterdir() if job.read_text().startswith(("PENDING", "RUNNING"))), sep="\n")


def sacct(folder, *words):
    print("JobID|State|NodeList")
    for job in folder.iterdir():
        if job.name.partition("_")[0] in words:
            print(f"{job.name}|{job.read_text().split()[0]}|here")


def scancel(folder, job):
    state, *process = (folder / job).read_text().split()
    if state in ("PENDING", "RUNNING"):
        (folder / job).write_text("CANCELLED")
        for number in process:
            os.killpg(int(number), signal.SIGKILL)


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
