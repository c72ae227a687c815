"""How much memory and time a text file takes on its way to batches: `python -m benchmarks.stream --megabytes 1000`.

Writes a file of that size, each line three film reviews drawn at random, and has a separate process read, clean, split,
tokenise and batch it. Memory is the proportional set size of the process and its children, from /proc/*/smaps_rollup every
0.1 s: `anonymous` is what they must hold; the rest is mapped Arrow files, which the kernel drops when memory is short.
`over_time` holds its values at eight equal steps through a stage, which are flat if the stage streams. `floor` is the same with
1 MB. `--share` tokenises only the first texts, to save time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "streaming.json"


class Memory:
    """Anonymous and total memory over time, in MB, of this process and its children together."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            sums = [_memory(process) for process in (os.getpid(), *_children(os.getpid()))]
            self.seen.append((sum(pair[0] for pair in sums), sum(pair[1] for pair in sums)))
            if self._end.wait(0.1):
                return

    def summary(self) -> dict[str, Any]:
        anonymous, everything = zip(*self.seen, strict=True)
        steps = [anonymous[(len(anonymous) - 1) * i // 7] for i in range(8)]
        return {"anonymous_MB": round(max(anonymous)), "resident_MB": round(max(everything)),
                "anonymous_MB_over_time": [round(value) for value in steps]}  # fmt: skip


def _memory(process: int) -> tuple[float, float]:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # the process has ended
        return 0.0, 0.0
    values = {name: float(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return values["Pss_Anon"], values["Pss"]


def _children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += [int(child) for child in task.read_text().split()]
    return found


def write_text(path: Path, megabytes: float) -> None:
    from cmlm_fast.demo_assets import demo_texts

    reviews = list(demo_texts()["text"])
    draw = np.random.default_rng(0)
    size = int(megabytes * 1e6)
    with path.open("wb") as file:
        while file.tell() < size:
            rows = draw.integers(len(reviews), size=(2000, 3)).tolist()
            file.write("".join(" ".join(reviews[i] for i in row) + "\n" for row in rows).encode())


def measure(path: Path, processes: int | None, batches: int, share: float) -> dict[str, Any]:
    """Seconds of every stage and peaks over all of them, measured in this process."""
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    from cmlm_fast.data import CMLMDataCollator, clean_texts, load_texts, split_evaluation, tokenize_texts
    from cmlm_fast.data.collate import as_table_rows
    from cmlm_fast.demo_assets import demo_model_path

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    stages: dict[str, dict[str, Any]] = {}
    size = path.stat().st_size / 1e6

    def stage(name: str, action: Any, size: float = size) -> Any:
        with Memory() as memory:
            begin = time.perf_counter()
            result = action()
            seconds = time.perf_counter() - begin
        stages[name] = {"seconds": round(seconds, 2), "MB_per_second": round(size / seconds, 1),
                        **memory.summary()}  # fmt: skip
        print(name, stages[name], file=sys.stderr, flush=True)
        return result

    texts = stage("read", lambda: load_texts(path))
    clean, counts = stage("clean", lambda: clean_texts(texts))
    train, _ = stage("split", lambda: split_evaluation(clean, 0.01, 0))
    part = train.select(range(int(share * len(train))))
    rows = stage("tokenise", lambda: tokenize_texts(part, tokenizer, max_length=128, num_proc=processes), share * size)
    collate = CMLMDataCollator(tokenizer, packed=True)
    loader = DataLoader(as_table_rows(rows, collate), batch_size=32, shuffle=True, collate_fn=collate)  # as in training

    def draw() -> int:
        return sum(len(batch["lengths"]) for batch, _ in zip(loader, range(batches), strict=False))

    stage("batches", draw)
    stages["batches"].pop("MB_per_second")
    return {"megabytes": round(size, 1), "texts": counts._asdict(), "tokenised_share": share, "sequences": len(rows),
            "batches": min(batches, len(loader)), "stages": stages,
            "peak_anonymous_MB": max(found["anonymous_MB"] for found in stages.values()),
            "peak_resident_MB": max(found["resident_MB"] for found in stages.values())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--share", type=float, default=1.0, help="share of the texts to tokenise")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)  # the measured process
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.processes, options.batches, options.share)))
        return
    found = {}
    with tempfile.TemporaryDirectory(prefix="cmlm_fast_stream_") as folder:
        for name, megabytes in (("floor", 1.0), ("file", options.megabytes)):
            path = Path(folder) / f"{name}.txt"
            write_text(path, megabytes)
            command = [sys.executable, "-m", "benchmarks.stream", "--only", str(path), "--batches", str(options.batches),
                       "--processes", str(options.processes), "--share", str(options.share)]  # fmt: skip
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "false"}
            found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "processes": options.processes}
    options.out.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
