"""`cmlm-fast demo`: post-train a real encoder on real text, fine-tune it on a few labels, compare."""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from .demo_assets import demo_model_path, demo_texts
from .fewshot import draw, fine_tune
from .machine import fast_in_bf16
from .options import PostTrainOptions
from .output import disk_errors, open_output
from .post_train import prepare, run
from .report import plot_demo, print_summary, print_table

#: Fine-tuning settings, chosen on texts that are neither trained nor tested on here.
_FINE_TUNING: dict[str, Any] = {"learning_rate": 2e-4, "epochs": 10}


def run_demo(folder: Path, *, steps: int, draws: int, shots: int, test_texts: int = 1000) -> dict[str, Any]:
    """Post-train on the non-test sentences, fine-tune with and without that, print and plot; returns the result.

    Writes folder/texts.txt, folder/model (a plain checkpoint), folder/demo.png and folder/result.json.

    Raises:
        ModuleNotFoundError: the extra `demo` is not installed.
        ValueError: a class has fewer than `shots` texts.
        DiskError: a write failed.
    """
    console = Console()
    start, texts = demo_model_path(), demo_texts()
    order = np.random.default_rng(0).permutation(len(texts))
    test, train = texts.select(order[:test_texts]), texts.select(order[test_texts:])
    labels = list(train["label"])
    chosen = [draw(labels, shots, seed) for seed in range(draws)]  # if this raises, it does so before anything is written
    with open_output(folder, 1 << 20, fresh=False), disk_errors(folder):
        (folder / "texts.txt").write_text("\n".join(train["text"]) + "\n", encoding="utf-8")
    options = PostTrainOptions(
        model=str(start), train_file=str(folder / "texts.txt"), output_dir=str(folder / "model"), max_steps=steps,
        learning_rate=5e-5, save_steps=0, overwrite=True,
    )  # fmt: skip
    console.print(f"Post-training all-MiniLM-L6-v2 on {len(train):,} unlabelled sentences")
    prepared = prepare(options)
    with TemporaryDirectory() as before:  # the start without its pooler, as a masked LM has none: fine-tuning adds one to both
        prepared.model.save_pretrained(before)
        prepared.tokenizer.save_pretrained(before)
        summary = run(prepared)
        print_summary(summary)
        console.print(f"Fine-tuning on {shots} labels per class, {draws} draws, tested on {len(test):,} other sentences")
        accuracy = _few_shot(Path(before), folder / "model", train, test, chosen)
    result = {"shots": shots, "draws": draws, "few_shot": accuracy}
    result["held_out_before_after"] = summary["held_out_before_after"]
    _print(console, result)
    console.print(f"{draws} draws cannot show a difference below a few points; cmlm-fast few-shot compares methods properly")
    with disk_errors(folder):
        plot_demo(summary, result, folder / "demo.png")
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(Text(f"Model: {folder / 'model'}   picture: {folder / 'demo.png'}"))
    return result


def _few_shot(start: Path, post_trained: Path, train: Any, test: Any, draws: list[list[int]]) -> dict[str, Any]:
    scores: dict[str, list[float]] = {"as it came": [], "post-trained": []}
    begin = time.perf_counter()
    texts, labels = list(train["text"]), list(train["label"])
    for seed, chosen in enumerate(draws):
        few = [texts[i] for i in chosen], [labels[i] for i in chosen]
        for name, model in zip(scores, (start, post_trained), strict=True):
            score = fine_tune(model, *few, list(test["text"]), list(test["label"]), seed=seed, bf16=fast_in_bf16(),
                              **_FINE_TUNING)  # fmt: skip
            scores[name].append(score.accuracy)
    return {"accuracy": scores, "seconds": round(time.perf_counter() - begin, 1)}


def _print(console: Console, result: dict[str, Any]) -> None:
    names = {"perplexity": "MLM perplexity", "token_retrieval": "masked-token retrieval",
             "sequence_retrieval": "sequence retrieval"}  # fmt: skip
    scores = result["held_out_before_after"]
    rows: dict[str, object] = {text: tuple(scores[name]) for name, text in names.items()}
    accuracy = result["few_shot"]["accuracy"].values()
    spread = [f"{np.mean(values):.3f} ± {np.std(values, ddof=1 if len(values) > 1 else 0):.3f}" for values in accuracy]
    rows[f"few-shot accuracy ({result['shots']} per class)"] = tuple(spread)
    print_table(console, "What post-training changed", rows, ("on held-out text", "before", "after"))
