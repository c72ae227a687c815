"""The command `cmlm-fast`: post-train, demo, bench, doctor; the few-shot evaluation's commands are in cli_fewshot.

Every bad input is one line on stderr, `error: …`, and exit code 2, before anything is computed or written. transformers
and datasets, seconds to import, wait until a command needs them.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from enum import Enum
from functools import partial
from importlib import import_module
from inspect import getdoc
from io import TextIOWrapper
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from . import ranks
from .cli_errors import one_line_errors, quiet
from .cli_fewshot import register
from .options import PostTrainOptions

# Below 100 columns the boxes would cut the longest names of options.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True,
                  rich_markup_mode="rich" if get_terminal_size().columns >= 100 else None,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="CMLM post-training of text encoders on unlabelled text (arXiv 2106.02327).")  # fmt: skip


class Preset(str, Enum):
    """The presets of CMLMConfig: the objective."""

    balanced = "balanced"
    paper = "paper"
    tapt = "tapt"
    seq = "seq"
    simcse = "simcse"


_default = partial(getattr, PostTrainOptions)


def _option(text: str, *names: str, **extra: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=extra.pop("panel", "Training"), **extra)


_OBJECTIVE = "Objective (default: what the preset says)"


@app.command("post-train")
def post_train_command(
    model: Annotated[str, typer.Option(help="folder or hub id of the encoder")],
    train_file: Annotated[str, typer.Option(help=".txt, .csv, .tsv, .jsonl, .json, .parquet, or a saved datasets folder")],
    output_dir: Annotated[str, typer.Option(help="new or empty folder, or with --overwrite or --resume")],
    text_column: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="column of the second text of a pair")] = None,
    preset: Annotated[Preset, typer.Option(help="the objective")] = Preset.balanced,
    eval_share: Annotated[float, typer.Option(help="share of texts held out for scores; 0: none")] = _default("eval_share"),
    max_length: Annotated[int | None, typer.Option(help="tokens per sequence; default: 128, or the model's most")] = None,
    whole_word: Annotated[bool, typer.Option("--whole-word", help="mask whole words")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin anew in a folder that is not empty")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --output-dir")] = False,
    epochs: Annotated[float, _option("times through the texts")] = _default("epochs"),
    max_steps: Annotated[int, _option("optimizer steps; -1: whole epochs")] = _default("max_steps"),
    batch_size: Annotated[int, _option("sequences per step and device")] = _default("batch_size"),
    max_tokens: Annotated[int | None, _option("tokens per batch, in place of --batch-size")] = None,
    contrastive_batch_size: Annotated[
        int | None, _option("sequences contrasted together, a multiple of --batch-size; not with --max-tokens")
    ] = None,
    gradient_accumulation: Annotated[int, _option("batches per step")] = _default("gradient_accumulation"),
    learning_rate: Annotated[float, _option("peak of the schedule")] = _default("learning_rate"),
    weight_decay: Annotated[float, _option("of AdamW")] = _default("weight_decay"),
    warmup: Annotated[float, _option("share of the steps, below 1, or their number")] = _default("warmup"),
    scheduler: Annotated[str, _option("linear, cosine, constant_with_warmup, ...")] = _default("scheduler"),
    bf16: Annotated[bool | None, _option("bfloat16 autocast; default: where the hardware is fast in it")] = None,
    fp16: Annotated[bool, _option("float16 autocast (GPU)", "--fp16")] = False,
    gradient_checkpointing: Annotated[bool, _option("less memory, more time", "--gradient-checkpointing")] = False,
    torch_compile: Annotated[bool, _option("compile the layers; dropout draws other numbers", "--torch-compile")] = False,
    low_precision_layer_norm: Annotated[
        bool, _option("layer norms in 16 bits, too (large batches on a GPU)", "--low-precision-layer-norm")
    ] = False,
    seed: Annotated[int, _option("of masks, order, dropout and the held-out share")] = _default("seed"),
    logging_steps: Annotated[int, _option("steps from log entry to log entry")] = _default("logging_steps"),
    save_steps: Annotated[
        int, _option("steps from checkpoint to checkpoint; 0: only where a signal comes")
    ] = _default("save_steps"),
    save_total_limit: Annotated[int, _option("checkpoints kept")] = _default("save_total_limit"),
    report_to: Annotated[str, _option("none, tensorboard, wandb, ...")] = _default("report_to"),
    trust_remote_code: Annotated[bool, _option("run code that the checkpoint brings along", "--trust-remote-code")] = False,
    backend: Annotated[
        str | None, _option("kernels: auto, reference, cpp, cuda, triton; default: CMLM_FAST_BACKEND, or auto")
    ] = None,
    rate: Annotated[float | None, _option("share masked in view 1 (mlm_probability)", panel=_OBJECTIVE)] = None,
    complement_rate: Annotated[float | None, _option("of the rest in view 2 (cl_probability)", panel=_OBJECTIVE)] = None,
    complementary: Annotated[bool | None, _option("masks that never overlap, or drawn apart", panel=_OBJECTIVE)] = None,
    sampling: Annotated[str | None, _option("exact or bernoulli", panel=_OBJECTIVE)] = None,
    mask_share: Annotated[float | None, _option("share of masked tokens made the mask (0.8)", panel=_OBJECTIVE)] = None,
    random_share: Annotated[float | None, _option("share made random tokens (0.1); the rest stay", panel=_OBJECTIVE)] = None,
    mlm_weight: Annotated[float | None, _option("weight of MLM", panel=_OBJECTIVE)] = None,
    token_weight: Annotated[float | None, _option("weight of the token contrast", panel=_OBJECTIVE)] = None,
    sequence_weight: Annotated[float | None, _option("weight of the sequence contrast", panel=_OBJECTIVE)] = None,
    mlm_views: Annotated[str | None, _option("both or first", panel=_OBJECTIVE)] = None,
    token_temperature: Annotated[float | None, _option("τ of the token contrast", panel=_OBJECTIVE)] = None,
    sequence_temperature: Annotated[float | None, _option("τ of the sequence contrast", panel=_OBJECTIVE)] = None,
    learn_temperature: Annotated[bool | None, _option("learn both τ", panel=_OBJECTIVE)] = None,
    scope: Annotated[str | None, _option("candidates: batch or sequence", panel=_OBJECTIVE)] = None,
    exclude_same_token: Annotated[bool | None, _option("the same token elsewhere is no negative", panel=_OBJECTIVE)] = None,
    position_jitter: Annotated[int | None, _option("most positions that view 2 is shifted by", panel=_OBJECTIVE)] = None,
    scheme: Annotated[str | None, _option("cross or nt_xent", panel=_OBJECTIVE)] = None,
    pooling: Annotated[str | None, _option("mean or cls", panel=_OBJECTIVE)] = None,
    projection: Annotated[int | None, _option("width of a head on the sequence vector; 0: none", panel=_OBJECTIVE)] = None,
) -> None:
    """Post-train an encoder on unlabelled text; writes a plain Hugging Face checkpoint.

    --rate and the options behind it change parts of the preset's objective.
    """
    given = dict(locals())
    names = {field.name for field in fields(PostTrainOptions)}
    objective = {name: value for name, value in given.items() if name not in names and value is not None}
    plain = {name: value for name, value in given.items() if name in names}
    options = PostTrainOptions(**{**plain, "preset": preset.value, "objective": objective})
    with one_line_errors():
        quiet()
        from .post_train import prepare, run
        from .report import print_summary

        ranks.join()
        summary = run(ranks.in_turn(lambda: prepare(options)))
        if ranks.is_main():
            print_summary(summary)
        ranks.leave()


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="texts, model, table and picture go here; made anew")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps of the post-training")] = 150,
    draws: Annotated[int, typer.Option(min=1, help="few-shot draws")] = 3,
    shots: Annotated[int, typer.Option(min=1, help="labelled texts per class")] = 16,
) -> None:
    """Post-train all-MiniLM-L6-v2 on film reviews, fine-tune it on a few labels, show what changed."""
    with one_line_errors():
        quiet()
        from .demo import run_demo

        run_demo(output_dir, steps=steps, draws=draws, shots=shots)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time the ops beside what others offer; compare two commits; report. Needs the repository: bench --help."""
    with one_line_errors():
        benchmark_suite()(context.args, prog_name="cmlm-fast bench")


def benchmark_suite() -> Any:
    """The command line of `benchmarks/`, of the repository that is the working directory or holds this package."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (folder / "benchmarks" / "registry.py").exists() and (folder / "cmlm_fast").is_dir():
            sys.path.insert(0, str(folder))
            return import_module("benchmarks.cli").app
    raise ModuleNotFoundError("cmlm-fast bench: expected the working directory to be a clone of the repository, which holds "
                              f"the suite (it times the package that is installed), got {Path.cwd()}")  # fmt: skip


@app.command()
def doctor() -> None:
    """Print versions, devices, and which kernel of each op runs here, or why not."""
    from rich.console import Console

    from .doctor import print_report

    print_report(Console())


register(app)
for _command in app.registered_commands:  # of which plain help would show the first words
    _command.short_help = (getdoc(_command.callback) or "").split("\n\n")[0].replace("\n", " ")


def main() -> None:
    """The console script. Of several processes that get the same wrong arguments, one says so."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no τ
    if ranks.is_main():
        app()
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            try:
                sys.exit(app(standalone_mode=False))
            except Exception as error:
                if code := getattr(error, "exit_code", None):  # wrong usage, which the main process explains
                    sys.exit(code)
                raise
