"""Calculates memory and communication of a step on W GPUs; `python -m benchmarks.scale` rewrites the table of docs/scale.md.

Nothing here was measured. tests/test_docs.py recomputes the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"
GPUS = (1, 2, 8, 64, 256, 1024)


@dataclass(frozen=True)
class Model:
    """BERT-base: parameters in total and in one encoder layer; layers; width of a sequence's vector; sequences per GPU."""

    parameters: int = 109_514_298
    layer: int = 7_087_872
    layers: int = 12
    width: int = 768
    sequences: int = 32

    @property
    def root(self) -> int:
        """Parameters outside the layers: embeddings and LM head, which form one FSDP group."""
        return self.parameters - self.layers * self.layer


def step(gpus: int, model: Model | None = None) -> dict[str, float]:
    """Bytes per GPU for one step in bfloat16 autocast with AdamW, and operations of the sequence contrast.

    ring = (W - 1) / W: the share of a tensor that a GPU sends when a ring gathers or scatters it.
    """
    model = model or Model()
    ring = (gpus - 1) / gpus
    gathered = gpus * model.sequences * model.width  # elements of one view's vectors, from all ranks
    state = 16 * model.parameters  # float32 weight, gradient and two moments
    # CUDA's kernels on [b, W·b] scores take three products per direction; with few scores, tiles compute the scores twice.
    products = 6 if gpus * model.sequences**2 > 128**2 else 8
    whole = 2 * (model.root + 2 * model.layer)  # bfloat16: the root group, the layer in use and the one being fetched
    return {
        "ddp_memory": state,
        "fsdp_memory": state / gpus + (whole + 2 * model.root if gpus > 1 else 0),  # and the root group's gradient
        "ddp_sent": 2 * ring * 4 * model.parameters,  # all-reduce of float32 gradients
        "fsdp_sent": ring * 2 * (model.root + 2 * model.layers * model.layer) + ring * 2 * model.parameters,
        "contrast_memory": 2 * gathered * (2 + 4) if gpus > 1 else 0,  # vectors in bfloat16, their gradients in float32
        "contrast_sent": 2 * (ring * gathered * 2 + 2 * ring * gathered * 4),
        "contrast_operations": 2 * products * model.sequences * gathered,
    }


def table() -> str:
    lines = ["| GPUs | state, DDP | state, FSDP2 | sent for gradients, DDP | sent, FSDP2 | gathered vectors | sent for them "
             "| contrast, operations |\n", "|---:|---:|---:|---:|---:|---:|---:|---:|\n"]  # fmt: skip
    for gpus in GPUS:
        found = step(gpus)
        sizes = [f"{found[name] / 1e6:,.1f} MB" for name in ("ddp_memory", "fsdp_memory", "ddp_sent", "fsdp_sent",
                 "contrast_memory", "contrast_sent")]  # fmt: skip
        lines.append(f"| {gpus:,} | " + " | ".join([*sizes, f"{found['contrast_operations'] / 1e9:,.2f} G"]) + " |\n")
    return "".join(lines)


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
