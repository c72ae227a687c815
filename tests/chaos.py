"""The kill loop: a training is killed by SIGKILL at random moments and resumed, until it ends as if nothing had happened.

    python tests/chaos.py --kills 12 --steps 60 --seed 0

Runs of `cmlm-fast post-train` are forked from a process that has imported everything, so that most of their life is training.
Dropout, learned temperatures, a projection, accumulation and a checkpoint every other step are on. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import make_lm, make_sentences, make_tokenizer
from forks import fork, wait
from safetensors.torch import load_file

from cmlm_fast import checkpoints
from cmlm_fast.cli import app


def prepare(folder: Path) -> tuple[str, ...]:
    """A tiny encoder with dropout and a file of sentences; the arguments of the run."""
    import transformers.trainer  # noqa: F401 - imported once, before the forks

    import cmlm_fast.post_train
    import cmlm_fast.trainer  # noqa: F401

    make_lm(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).save_pretrained(folder / "start")
    make_tokenizer().save_pretrained(folder / "start")
    (folder / "texts.txt").write_text("\n".join(make_sentences()) + "\n", encoding="utf-8")
    return ("post-train", "--model", str(folder / "start"), "--train-file", str(folder / "texts.txt"), "--batch-size", "8",
            "--gradient-accumulation", "2", "--learn-temperature", "--projection", "16", "--save-steps", "2",
            "--save-total-limit", "1", "--logging-steps", "3", "--max-length", "32", "--no-bf16")  # fmt: skip


def start(arguments: tuple[str, ...], output: Path, log: Path, *more: str) -> int:
    """Fork one run; returns its process id."""
    return fork(lambda: app([*arguments, "--output-dir", str(output), *more]), log)


def newest_step(output: Path) -> int:
    return max((checkpoints.step_of(path) for path in checkpoints.checkpoints(output)), default=0)


def kill_loop(folder: Path, kills: int, steps: int, seed: int) -> dict[str, object]:
    """Run once whole and once with `kills` kills; compare what the two leave."""
    arguments = (*prepare(folder), "--max-steps", str(steps))
    whole, cut, log = folder / "whole", folder / "cut", folder / "log"
    begin = time.monotonic()
    assert wait(start(arguments, whole, log)) == 0, log.read_text()
    span = time.monotonic() - begin
    draw = random.Random(seed)
    done = writing = before_training = runs = 0
    seen: list[int] = []
    equal = True
    while True:
        flag = ("--resume",) if checkpoints.checkpoints(cut) else ("--overwrite",)
        process = start(arguments, cut, log, *flag)
        runs += 1
        if done < kills:
            # Most kills come soon after the next checkpoint, so that the run advances and each stage of it is hit.
            target, patience = newest_step(cut) + 1, time.monotonic() + draw.choice((0.3, 3, 3, 3)) * span
            while newest_step(cut) < target and time.monotonic() < patience:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 2 * span / steps))
            os.kill(process, signal.SIGKILL)
        code = wait(process)
        if code == 0:  # the end, or a run faster than the kill: its result counts, and the next one starts over
            equal = equal and same(whole, cut)
            if done == kills:
                break
            shutil.rmtree(cut)
            continue
        assert code == -signal.SIGKILL, log.read_text()[-3000:]
        done += 1
        writing += any(cut.glob(f"{checkpoints.STAGING}*"))
        before_training += not checkpoints.checkpoints(cut)
        seen.append(newest_step(cut))
        for path in checkpoints.checkpoints(cut):
            problem = checkpoints.damage(path)
            assert problem is None, f"{path} after a kill: {problem}"
    left = sorted(path.name for path in cut.glob(f"{checkpoints.STAGING}*"))
    return {"kills": done, "while_writing": writing, "before_the_first_checkpoint": before_training, "newest_step": seen,
            "equal": equal, "left_over": left, "runs": runs, "whole_run_seconds": round(span, 2)}  # fmt: skip


def same(whole: Path, cut: Path) -> bool:
    """Whether two runs left the same weights, bit for bit, and logged the same losses, each once."""
    names = ("model.safetensors", "contrast.safetensors")
    pairs = [[load_file(folder / name) for folder in (whole, cut)] for name in names]
    logged = [[(entry["step"], entry["loss"]) for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
               if "loss" in entry] for folder in (whole, cut)]  # fmt: skip
    return logged[0] == logged[1] and all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=None, help="seed of the moments; default: a new one each time")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="cmlm_fast_chaos_") as folder:
        result = {"seed": seed, **kill_loop(Path(folder), options.kills, options.steps, seed)}
    print(json.dumps(result))
    sys.exit(not result["equal"])


if __name__ == "__main__":
    main()
