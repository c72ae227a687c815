"""The command `cmlm-fast`: post-train, demo, bench, doctor; the commands of the few-shot evaluation are in cli_fewshot.

Bad input gives one line on stderr, `error: …`, and exit code 2, before anything is computed or written. transformers and
datasets take seconds to import and are imported only when a command needs them.
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

# Below 100 columns the boxes would cut off the longest option names.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True,
                  rich_markup_mode="rich" if get_terminal_size().columns >= 100 else None,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="CMLM post-training of text encoders on unlabelled text (arXiv 2106.02327).")  # fmt: skip


class Preset(str, Enum):
    """The presets of CMLMConfig, each an objective."""

    balanced = "balanced"
    paper = "paper"
    tapt = "tapt"
    seq = "seq"
    simcse = "simcse"


_default = partial(getattr, PostTrainOptions)


def _option(text: str, *names: str, **extra: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=extra.pop("panel", "Training"), **extra)


_OBJECTIVE = "Objective (default: as in the preset)"


@app.command("post-train")
def post_train_command(
    model: Annotated[str, typer.Option(help="folder or hub id of the encoder")],
    train_file: Annotated[str, typer.Option(help="texts: .txt, .csv, .tsv, .jsonl, .json, .parquet or saved datasets folder")],
    output_dir: Annotated[str, typer.Option(help="new or empty folder, unless --overwrite or --resume is given")],
    text_column: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="column of the second text of a pair")] = None,
    preset: Annotated[Preset, typer.Option(help="preset of the objective")] = Preset.balanced,
    eval_share: Annotated[float, typer.Option(help="share of texts held out for scoring; 0: none")] = _default("eval_share"),
    max_length: Annotated[int | None, typer.Option(help="tokens per sequence; default: 128, or the model's maximum")] = None,
    whole_word: Annotated[bool, typer.Option("--whole-word", help="mask whole words")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start over in a folder that is not empty")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint in --output-dir")] = False,
    epochs: Annotated[float, _option("passes over the texts")] = _default("epochs"),
    max_steps: Annotated[int, _option("optimizer steps; -1: all of --epochs")] = _default("max_steps"),
    batch_size: Annotated[int, _option("sequences per batch on each device")] = _default("batch_size"),
    max_tokens: Annotated[int | None, _option("tokens per batch, instead of --batch-size")] = None,
    contrastive_batch_size: Annotated[
        int | None, _option("sequences contrasted together, a multiple of --batch-size; not with --max-tokens")
    ] = None,
    gradient_accumulation: Annotated[int, _option("batches per optimizer step")] = _default("gradient_accumulation"),
    learning_rate: Annotated[float, _option("peak learning rate")] = _default("learning_rate"),
    weight_decay: Annotated[float, _option("weight decay of AdamW")] = _default("weight_decay"),
    warmup: Annotated[float, _option("warm-up steps: a share below 1, or a number")] = _default("warmup"),
    scheduler: Annotated[
        str, _option("learning rate schedule: linear, cosine, constant_with_warmup, ...")
    ] = _default("scheduler"),
    bf16: Annotated[bool | None, _option("bfloat16 autocast; default: on if the hardware is fast at it")] = None,
    fp16: Annotated[bool, _option("float16 autocast (GPU only)", "--fp16")] = False,
    gradient_checkpointing: Annotated[bool, _option("less memory, more time", "--gradient-checkpointing")] = False,
    torch_compile: Annotated[bool, _option("compile the encoder layers; changes the dropout draws", "--torch-compile")] = False,
    low_precision_layer_norm: Annotated[
        bool, _option("16-bit layer norms (for large batches on a GPU)", "--low-precision-layer-norm")
    ] = False,
    seed: Annotated[int, _option("seed of masks, order, dropout and the held-out texts")] = _default("seed"),
    logging_steps: Annotated[int, _option("steps between log entries")] = _default("logging_steps"),
    save_steps: Annotated[
        int, _option("steps between checkpoints; 0: only on a signal")
    ] = _default("save_steps"),
    save_total_limit: Annotated[int, _option("checkpoints to keep")] = _default("save_total_limit"),
    report_to: Annotated[str, _option("log to none, tensorboard, wandb, ...")] = _default("report_to"),
    trust_remote_code: Annotated[bool, _option("run code that comes with the checkpoint", "--trust-remote-code")] = False,
    backend: Annotated[
        str | None, _option("kernels: auto, reference, cpp, cuda, triton; default: CMLM_FAST_BACKEND, or auto")
    ] = None,
    rate: Annotated[float | None, _option("share masked in view 1 (mlm_probability)", panel=_OBJECTIVE)] = None,
    complement_rate: Annotated[
        float | None, _option("share of the rest masked in view 2 (cl_probability)", panel=_OBJECTIVE)
    ] = None,
    complementary: Annotated[bool | None, _option("masks that never overlap, or independent ones", panel=_OBJECTIVE)] = None,
    sampling: Annotated[str | None, _option("mask sampling: exact or bernoulli", panel=_OBJECTIVE)] = None,
    mask_share: Annotated[
        float | None, _option("share of masked tokens replaced by the mask token (0.8)", panel=_OBJECTIVE)
    ] = None,
    random_share: Annotated[
        float | None, _option("share replaced by random tokens (0.1); the rest stay", panel=_OBJECTIVE)
    ] = None,
    mlm_weight: Annotated[float | None, _option("weight of MLM", panel=_OBJECTIVE)] = None,
    token_weight: Annotated[float | None, _option("weight of the token contrast", panel=_OBJECTIVE)] = None,
    sequence_weight: Annotated[float | None, _option("weight of the sequence contrast", panel=_OBJECTIVE)] = None,
    mlm_views: Annotated[str | None, _option("views with MLM: both or first", panel=_OBJECTIVE)] = None,
    token_temperature: Annotated[float | None, _option("τ of the token contrast", panel=_OBJECTIVE)] = None,
    sequence_temperature: Annotated[float | None, _option("τ of the sequence contrast", panel=_OBJECTIVE)] = None,
    learn_temperature: Annotated[bool | None, _option("learn both τ", panel=_OBJECTIVE)] = None,
    scope: Annotated[str | None, _option("token candidates: batch or sequence", panel=_OBJECTIVE)] = None,
    exclude_same_token: Annotated[bool | None, _option("the same token elsewhere is not a negative", panel=_OBJECTIVE)] = None,
    position_jitter: Annotated[int | None, _option("maximum position shift of view 2", panel=_OBJECTIVE)] = None,
    scheme: Annotated[str | None, _option("sequence contrast: cross or nt_xent", panel=_OBJECTIVE)] = None,
    pooling: Annotated[str | None, _option("sequence vector: mean or cls", panel=_OBJECTIVE)] = None,
    projection: Annotated[int | None, _option("width of a head on the sequence vector; 0: none", panel=_OBJECTIVE)] = None,
) -> None:
    """Post-train an encoder on unlabelled text and write a plain Hugging Face checkpoint.

    --rate and the options after it override parts of the preset's objective.
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
    output_dir: Annotated[Path, typer.Option(help="texts, model, table and picture go here; overwritten")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps of post-training")] = 150,
    draws: Annotated[int, typer.Option(min=1, help="draws of the labelled texts")] = 3,
    shots: Annotated[int, typer.Option(min=1, help="labelled texts per class")] = 16,
) -> None:
    """Post-train all-MiniLM-L6-v2 on film reviews, fine-tune it on a few labels and show what changed."""
    with one_line_errors():
        quiet()
        from .demo import run_demo

        run_demo(output_dir, steps=steps, draws=draws, shots=shots)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time the ops against other implementations; compare two commits; report. Needs the repository: bench --help."""
    with one_line_errors():
        benchmark_suite()(context.args, prog_name="cmlm-fast bench")


def benchmark_suite() -> Any:
    """The command line of `benchmarks/`, in the working directory or else in the repository that contains this package."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (folder / "benchmarks" / "registry.py").exists() and (folder / "cmlm_fast").is_dir():
            sys.path.insert(0, str(folder))
            return import_module("benchmarks.cli").app
    raise ModuleNotFoundError("cmlm-fast bench: expected the working directory to be a clone of the repository, which holds "
                              f"the suite (it times the package that is installed), got {Path.cwd()}")  # fmt: skip


@app.command()
def doctor() -> None:
    """Print versions, devices, and which kernels of each op run here, or why not."""
    from rich.console import Console

    from .doctor import print_report

    print_report(Console())


register(app)
for _command in app.registered_commands:  # plain help would show only the first words
    _command.short_help = (getdoc(_command.callback) or "").split("\n\n")[0].replace("\n", " ")


def main() -> None:
    """Console script. If several processes get the same wrong arguments, only one reports it."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a terminal without τ
    if ranks.is_main():
        app()
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            try:
                sys.exit(app(standalone_mode=False))
            except Exception as error:
                if code := getattr(error, "exit_code", None):  # wrong usage, which the main process reports
                    sys.exit(code)
                raise
