"""One side of `compare`: reads requests, one JSON list per line, and answers each with a JSON object.

["make", op, shape] builds and warms the automatic choice's call → repeats per sample; ["sample", repeats] → seconds.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from .ops import OPS
from .timing import repeats_of, sample


def main() -> None:
    """Serve until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    device = torch.device(sys.argv[1])
    state: dict[str, Any] = {}
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            if command == "make":
                value = make(state, device, *arguments)
            else:
                state["call"]()  # wakes the threads
                value = sample(state["call"], *arguments, device)
            answer = {"value": value}
        except Exception as error:  # an older ref may lack what the shape needs
            answer = {"reason": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def make(state: dict[str, Any], device: torch.device, name: str, label: str) -> int:
    """Build the shape's problem and warm its call."""
    op = next(op for op in OPS if op.name == name)
    shape = next(shape for shape in op.shapes if shape.label == label)
    state.clear()
    torch.manual_seed(0)
    problem = op.build(device, **shape.sizes)
    state["call"] = op.auto(problem)
    state["call"]()
    return repeats_of(state["call"], device)


if __name__ == "__main__":
    main()
