"""Time of quick answers of the command line over that of importing torch and pytorch-lightning."""

import statistics
import subprocess
import sys
import time

ANSWERS = {
    "--help": ["--help"],
    "--cfg job": ["--cfg", "job"],
    "unknown option": ["optimizer.lrr=1"],
    "misspelled group": ["modle=unet"],
    "misspelled choice": ["model=unetv3"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - started


def main() -> None:
    commands = {"import torch, pytorch_lightning": [sys.executable, "-c", "import torch, pytorch_lightning"]}
    commands |= {name: [sys.executable, "-m", "medvision.train", *words] for name, words in ANSWERS.items()}
    rounds = [{name: seconds(command) for name, command in commands.items()} for _ in range(4)][1:]
    medians = {name: statistics.median(r[name] for r in rounds) for name in commands}
    base, *_ = medians.values()
    for name, value in medians.items():
        print(f"{name:32} {value:6.2f} s   {value / base:.2f}")


if __name__ == "__main__":
    main()
