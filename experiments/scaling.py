"""How time and memory grow: a training step over the context and the batch, a corpus over its text.

    python experiments/scaling.py FILE     a text to repeat; ten minutes on 2 CPU cores

Each training step runs in a process of its own, eagerly; memory is the peak above what the process
had after its imports. Corpora are of bytes, and removed afterwards.
"""

import multiprocessing
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import UserError, parse_with_paths, run
from experiments.bench import BenchConfig, run_script, time_steps
from model import GPT
from plot import table

import torch

ROOT = Path(__file__).parents[1]
SHAPES = [*((8192 // context, context) for context in (256, 512, 1024, 2048, 4096, 8192)),
          *((batch, 256) for batch in (1, 2, 4, 8, 16, 32, 64))]  # batch size, context
MEGABYTES = [10, 100, 1000]


@dataclass
class ScalingConfig:
    steps: int = 5  # timed steps of each shape; the table has their median
    n_layer: int = 4  # of the model
    n_embd: int = 256  # of the model


def main():
    config, paths = parse_with_paths(ScalingConfig, "FILE")
    if len(paths) != 1:
        raise UserError("pass a text file: python experiments/scaling.py FILE")
    text, rows = Path(paths[0]).read_bytes(), []
    for batch_size, context in SHAPES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            speed, n_bytes = pool.apply(measure_step, (config, batch_size, context))
        rows.append([str(context), str(batch_size), f"{batch_size * context / speed:.3f} s",
                     f"{1e6 / speed:.1f} µs", f"{n_bytes / 1e6:,.0f} MB"])
        print(" ".join(rows[-1]), flush=True)
    print("\n" + table(["context", "batch", "step", "per token", "memory"], rows) + "\n")
    rows = []
    for megabytes in MEGABYTES:
        for workers in (1, 2):
            seconds = measure_corpus(text, megabytes, workers)
            rows.append([f"{megabytes:,} MB", str(workers), f"{seconds:.1f} s",
                         f"{megabytes / seconds:.1f} MB/s"])
            print(" ".join(rows[-1]), flush=True)
    print("\n" + table(["text", "workers", "preparation", "speed"], rows))


def measure_step(config: ScalingConfig, batch_size: int, context: int) -> tuple[float, int]:
    """Median tokens/s of training steps with KV shift, and the peak memory in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = BenchConfig(context, 256, config.n_layer, 4, n_embd=config.n_embd,
                         batch_size=batch_size, rounds=config.steps, seconds=0)
    speeds = time_steps({"kv": GPT(config)}, config, torch.device("cpu"), torch.float32, False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return median(speeds["kv"]), peak * (1 if sys.platform == "darwin" else 1024)


def measure_corpus(text: bytes, megabytes: int, workers: int) -> float:
    """Seconds to prepare a corpus of so many MB, start to end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        with open(path, "wb") as f:
            for start in range(0, megabytes * 10**6, len(text)):
                f.write(text[: megabytes * 10**6 - start])
        return run_script(ROOT / "data/text/prepare.py", path, f"--name={folder}/out",
                          f"--workers={workers}")


if __name__ == "__main__":
    run(main)
