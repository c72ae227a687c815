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
    model: Annotated[str, typer.Option(help="folder or hub id every method starts from; warm-head makes an LM head")],
    train: Annotated[str, typer.Option(help=".csv, .tsv, .jsonl, .json, .parquet, or a saved datasets folder, with labels")],
    output_dir: Annotated[str, typer.Option(help="cells.jsonl, results.md, .csv and .png; a run goes on from what is there")],
    test: Annotated[str | None, typer.Option(help="texts to score, with the columns of --train")] = None,
    validation: Annotated[int, typer.Option(help="instead of --test: score so many of the train texts")] = _few("validation"),
    name: Annotated[str | None, typer.Option(help="in the tables; default: the file's, or of a train.* its folder's")] = None,
    label_column: Annotated[str, typer.Option(help="column of the classes")] = _few("label_column"),
    text_column: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="column of the second text of a pair")] = None,
    paraphrase_column: Annotated[str | None, typer.Option(help="column of each text's paraphrase, for cssl")] = None,
    methods: Annotated[str, typer.Option(help=f"names between commas: {', '.join(METHODS)}")] = ",".join(_few("methods")),
    shots: Annotated[str, typer.Option(help="labelled texts per class, between commas")] = ",".join(map(str, _few("shots"))),
    draws: Annotated[int, typer.Option(help="draws of the labelled texts")] = _few("draws"),
    baseline: Annotated[str, typer.Option(help="the method that the others are compared with")] = _few("baseline"),
    epochs: Annotated[float, _option("times through the texts", _POST)] = _few("epochs"),
    max_steps: Annotated[int, _option("optimizer steps; -1: whole epochs", _POST)] = _few("max_steps"),
    batch_size: Annotated[int, _option("sequences per step", _POST)] = _few("batch_size"),
    learning_rate: Annotated[float, _option("peak of the schedule", _POST)] = _few("learning_rate"),
    warmup: Annotated[float, _option("share of the steps, below 1, or their number", _POST)] = _few("warmup"),
    fine_tune_epochs: Annotated[float, _option("times through the labelled texts", _FINE)] = _few("fine_tune_epochs"),
    fine_tune_batch_size: Annotated[int, _option("texts per step", _FINE)] = _few("fine_tune_batch_size"),
    fine_tune_learning_rate: Annotated[float, _option("start of the linear decay", _FINE)] = _few("fine_tune_learning_rate"),
    max_length: Annotated[int | None, _option("most tokens of a sequence; default: 128, or the model's most", _OTHER)] = None,
    bf16: Annotated[bool | None, _option("bfloat16 autocast; default: where the hardware is fast in it", _OTHER)] = None,
    seed: Annotated[int, _option("of everything random; draw d takes seed + d", _OTHER)] = _few("seed"),
    cache_dir: Annotated[str | None, _option("where checkpoints are kept; default: in --output-dir", _OTHER)] = None,
    keep_models: Annotated[bool, _option("keep finished checkpoints", _OTHER, "--keep-models")] = _few("keep_models"),
    backend: Annotated[
        str | None, _option("kernels: auto, reference, cpp, cuda, triton; default: CMLM_FAST_BACKEND, or auto", _OTHER)
    ] = None,
) -> None:
    """Does post-training help? Post-train on unlabelled texts, fine-tune on a few labels, compare methods draw by draw.

    A method's objective is changed by name:field=value:…, for instance cmlm:sequence_weight=0.3. --epochs to --warmup are of
    the post-training, --fine-tune-… of the fine-tuning.
    """
    given = dict(locals())
    with one_line_errors("the same command goes on from the finished cells"):
        given["methods"] = tuple(part.strip() for part in methods.split(",") if part.strip())
        given["shots"] = _numbers("shots", shots)
        quiet()
        from .callbacks import StopOnSignal

        with StopOnSignal():
            FewShotExperiment(**given).run(lambda line: print(line, flush=True))
        print(Path(output_dir, "results.md").read_text(encoding="utf-8"))  # as it is: a wrapped row is no Markdown


def few_shot_table_command(
    output_dir: Annotated[Path, typer.Argument(help="folder with a cells.jsonl")],
    baseline: Annotated[str, typer.Option(help="the method that the others are compared with")] = "ft",
) -> None:
    """Write results.md, .csv and .png of all cells of a folder anew, for instance against another baseline."""
    with one_line_errors():
        from .fewshot.tables import markdown, tables_of

        print(markdown(tables_of(output_dir, baseline), baseline))


def warm_head_command(
    model: Annotated[str, typer.Option(help="folder or hub id of the encoder")],
    output_dir: Annotated[str, typer.Option(help="new or empty folder")],
    train_file: Annotated[str, typer.Option(help="general text; default: 25,000 IMDb reviews, of the extra demo")] = "",
    text_column: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    train_encoder: Annotated[bool, typer.Option("--train-encoder", help="train the whole masked LM")] = False,
    epochs: Annotated[float, typer.Option(help="times through the texts")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="optimizer steps; -1: whole epochs")] = -1,
    batch_size: Annotated[int, typer.Option(help="sequences per step and device")] = _default("batch_size"),
    learning_rate: Annotated[float | None, typer.Option(help="default: 1e-3, with --train-encoder 1e-4")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens per sequence; default: 128, or the model's most")] = None,
    eval_share: Annotated[float, typer.Option(help="share of texts held out for scores; 0: none")] = 0.005,
    bf16: Annotated[bool | None, typer.Option(help="bfloat16 autocast; default: where the hardware is fast in it")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = _default("seed"),
    save_steps: Annotated[int, typer.Option(help="steps between checkpoints; 0: at a signal")] = _default("save_steps"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin anew in a folder that is not empty")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --output-dir")] = False,
) -> None:
    """Train an LM head on general text, the encoder frozen; writes a plain checkpoint to start few-shot from."""
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
        raise ValueError(f"expected {argument} to be whole numbers between commas, got {text}") from None


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    methods = "\n\n".join(f"{name}: {method.says}" for name, method in METHODS.items())
    app.command("few-shot", epilog=f"Methods:\n\n{methods}")(few_shot_command)
    app.command("few-shot-table")(few_shot_table_command)
    app.command("warm-head")(warm_head_command)
