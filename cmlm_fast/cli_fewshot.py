"""The commands of the few-shot evaluation: few-shot, few-shot-table, warm-head."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_errors import one_line_errors, quiet
from .fewshot import FewShotExperiment
from .fewshot.methods import METHODS
from .options import PostTrainOptions


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


_default, _few = partial(getattr, PostTrainOptions), partial(getattr, FewShotExperiment)
_POST, _FINE, _OTHER = "Post-training", "Fine-tuning", "Other"


def few_shot_command(
    model: Annotated[str, typer.Option(help="folder or hub id to start from; should have an LM head (see warm-head)")],
    train: Annotated[str, typer.Option(help="labelled texts: .csv, .tsv, .jsonl, .json, .parquet or saved datasets folder")],
    output_dir: Annotated[str, typer.Option(help="gets cells.jsonl, results.md, .csv and .png; cells already there are kept")],
    test: Annotated[str | None, typer.Option(help="texts to score, with the same columns as --train")] = None,
    validation: Annotated[int, typer.Option(help="instead of --test: train texts to hold out and score")] = _few("validation"),
    name: Annotated[
        str | None, typer.Option(help="data set name in the tables; default: the file's, or for train.* its folder's")
    ] = None,
    label_column: Annotated[str, typer.Option(help="column of the classes")] = _few("label_column"),
    text_column: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="column of the second text of a pair")] = None,
    paraphrase_column: Annotated[str | None, typer.Option(help="column of each text's paraphrase, for cssl")] = None,
    methods: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(METHODS)}")] = ",".join(_few("methods")),
    shots: Annotated[str, typer.Option(help="labelled texts per class, comma-separated")] = ",".join(map(str, _few("shots"))),
    draws: Annotated[int, typer.Option(help="draws of the labelled texts")] = _few("draws"),
    baseline: Annotated[str, typer.Option(help="method that the others are compared with")] = _few("baseline"),
    epochs: Annotated[float, _option("passes over the texts", _POST)] = _few("epochs"),
    max_steps: Annotated[int, _option("optimizer steps; -1: all of --epochs", _POST)] = _few("max_steps"),
    batch_size: Annotated[int, _option("sequences per step", _POST)] = _few("batch_size"),
    learning_rate: Annotated[float, _option("peak learning rate", _POST)] = _few("learning_rate"),
    warmup: Annotated[float, _option("warm-up steps: a share below 1, or a number", _POST)] = _few("warmup"),
    fine_tune_epochs: Annotated[float, _option("passes over the labelled texts", _FINE)] = _few("fine_tune_epochs"),
    fine_tune_batch_size: Annotated[int, _option("texts per step", _FINE)] = _few("fine_tune_batch_size"),
    fine_tune_learning_rate: Annotated[
        float, _option("initial learning rate, decayed linearly", _FINE)
    ] = _few("fine_tune_learning_rate"),
    max_length: Annotated[int | None, _option("tokens per sequence; default: 128, or the model's maximum", _OTHER)] = None,
    bf16: Annotated[bool | None, _option("bfloat16 autocast; default: on if the hardware is fast at it", _OTHER)] = None,
    seed: Annotated[int, _option("random seed; draw d uses seed + d", _OTHER)] = _few("seed"),
    cache_dir: Annotated[str | None, _option("folder for checkpoints; default: models/ in --output-dir", _OTHER)] = None,
    keep_models: Annotated[bool, _option("keep the post-trained checkpoints", _OTHER, "--keep-models")] = _few("keep_models"),
    backend: Annotated[
        str | None, _option("kernels: auto, reference, cpp, cuda, triton; default: CMLM_FAST_BACKEND, or auto", _OTHER)
    ] = None,
) -> None:
    """Does post-training help? Post-train on unlabelled texts, fine-tune on a few labels, compare methods draw by draw.

    name:field=value:… changes a method's objective, for instance cmlm:sequence_weight=0.3.
    --epochs to --warmup apply to post-training, --fine-tune-… to fine-tuning.
    """
    given = dict(locals())
    with one_line_errors("the same command continues from the finished cells"):
        given["methods"] = tuple(part.strip() for part in methods.split(",") if part.strip())
        given["shots"] = _numbers("shots", shots)
        quiet()
        from .callbacks import StopOnSignal

        with StopOnSignal():
            FewShotExperiment(**given).run(lambda line: print(line, flush=True))
        print(Path(output_dir, "results.md").read_text(encoding="utf-8"))  # unwrapped: a wrapped row is not Markdown


def few_shot_table_command(
    output_dir: Annotated[Path, typer.Argument(help="folder with a cells.jsonl")],
    baseline: Annotated[str, typer.Option(help="method that the others are compared with")] = "ft",
) -> None:
    """Rewrite results.md, .csv and .png from all cells of a folder, for instance against another baseline."""
    with one_line_errors():
        from .fewshot.tables import markdown, tables_of

        print(markdown(tables_of(output_dir, baseline), baseline))


def warm_head_command(
    model: Annotated[str, typer.Option(help="folder or hub id of the encoder")],
    output_dir: Annotated[str, typer.Option(help="new or empty folder, unless --overwrite or --resume is given")],
    train_file: Annotated[str, typer.Option(help="general text; default: 25,000 IMDb reviews from the demo extra")] = "",
    text_column: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    train_encoder: Annotated[bool, typer.Option("--train-encoder", help="train the whole masked LM")] = False,
    epochs: Annotated[float, typer.Option(help="passes over the texts")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="optimizer steps; -1: all of --epochs")] = -1,
    batch_size: Annotated[int, typer.Option(help="sequences per batch on each device")] = _default("batch_size"),
    learning_rate: Annotated[
        float | None, typer.Option(help="peak learning rate; default: 1e-3, or 1e-4 with --train-encoder")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens per sequence; default: 128, or the model's maximum")] = None,
    eval_share: Annotated[float, typer.Option(help="share of texts held out for scoring; 0: none")] = 0.005,
    bf16: Annotated[bool | None, typer.Option(help="bfloat16 autocast; default: on if the hardware is fast at it")] = None,
    seed: Annotated[int, typer.Option(help="random seed")] = _default("seed"),
    save_steps: Annotated[int, typer.Option(help="steps between checkpoints; 0: only on a signal")] = _default("save_steps"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start over in a folder that is not empty")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint in --output-dir")] = False,
) -> None:
    """Train an LM head on general text with the encoder frozen; write a plain checkpoint that few-shot can start from."""
    given = dict(locals())
    train_encoder = given.pop("train_encoder")
    if learning_rate is None:
        given["learning_rate"] = 1e-4 if train_encoder else 1e-3
    with one_line_errors():
        quiet()
        from .report import print_summary
        from .warm_head import warm_head

        print_summary(warm_head(PostTrainOptions(**given), train_encoder))


def _numbers(argument: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"expected {argument} to be comma-separated whole numbers, got {text}") from None


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    methods = "\n\n".join(f"{name}: {method.description}" for name, method in METHODS.items())
    app.command("few-shot", epilog=f"Methods:\n\n{methods}")(few_shot_command)
    app.command("few-shot-table")(few_shot_table_command)
    app.command("warm-head")(warm_head_command)
