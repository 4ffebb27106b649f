"""How soon the command line answers what needs no model: seconds of whole processes, over those of `import torch`.

python benchmarks/startup.py --repeats 5
"""

import argparse
import statistics
import subprocess
import sys
import time

from vitreg import cli

LINES = ["--version", "--help", "evaluate --help", "diagnose --size", *(f"{name} --help" for name in cli.COMMANDS)]


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    runs = {"import torch": ["-c", "import torch"], **{line: ["-m", "vitreg", *line.split()] for line in LINES}}
    times: dict[str, list[float]] = {name: [] for name in runs}
    # The first round fills the caches of the file system.
    for number in range(repeats + 1):
        for name, command in runs.items():
            took = seconds(*command)
            if number:
                times[name].append(took)
    torch = statistics.median(times["import torch"])
    for name, taken in times.items():
        print(f"{name:32} {statistics.median(taken):6.3f} s   {statistics.median(taken) / torch:5.2f} of import torch")


if __name__ == "__main__":
    main()
