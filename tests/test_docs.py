"""What the docs show runs: the README's Python, with a tiny encoder instead of the hub's, and the docstrings' examples."""

from __future__ import annotations

import doctest
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, CMLMTrainingArguments
from cmlm_fast.data import tokenize_texts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ("arguments", "backends", "config", "data.budget", "data.share", "losses", "report",
           "fewshot.draws", "fewshot.methods", "fewshot.tables",
           "ops.complementary_mask", "ops.info_nce", "ops.mlm_cross_entropy", "ops.token_contrastive", "ops.token_similarity",
           "ops.varlen_attention")  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = import_module(f"cmlm_fast.{name}")
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {**vars(module), "torch": torch}
    found = [test for test in finder.find(module, globs=names) if test.examples]
    runner = doctest.DocTestRunner(verbose=False)
    for test in found:
        if "out/model" not in test.docstring:  # an example that needs a trained model
            runner.run(test)
    assert found and runner.tries > 0 and runner.failures == 0


def test_readme_python_runs(tiny_checkpoint, sentence_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 4
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (20, 50))
    key_token = torch.randint(0, 9, (50,), generator=generator)
    target = torch.randperm(50, generator=generator)[:20]
    names = {"torch": torch, "F": F, "query": query, "key": key, "target": target, "key_token": key_token,
             "query_token": key_token[target]}  # fmt: skip
    losses = []
    for block in sorted(blocks, key=lambda text: "from_pretrained(\"post-trained\"" in text):
        code = block.replace("bert-base-uncased", tiny_checkpoint).replace("reviews.txt", sentence_file)
        code = code.replace("num_train_epochs=3", "max_steps=2, use_cpu=True, report_to='none', dataloader_pin_memory=False")
        exec(compile(code, "README.md", "exec"), names)
        losses.append(names.get("loss"))
    values = [loss.item() for loss in losses if loss is not None]
    assert values[0] == pytest.approx(values[1], rel=1e-5)  # before and after


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_the_loop_of_the_docs_computes_what_the_model_does(scope, tiny_checkpoint, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ops.md").read_text(encoding="utf-8"), re.S)
    if scope == "sequence":  # as the page's first hint says
        for at in ("at1", "at2"):
            bounds = f"key_start=({at} // L * L).int(), key_end=({at} // L * L + L).int(), "
            code = code.replace(f"query_token=name[{at}]", f"{bounds}query_token=name[{at}]")
        code = code.replace("    can = ", "    L = ids.shape[1]\n    can = ")
    names = {}
    exec(compile(code.replace("bert-base-uncased", tiny_checkpoint), "ops.md", "exec"), names)

    lm = AutoModelForMaskedLM.from_pretrained(tiny_checkpoint)
    trainer = CMLMTrainer(CMLMModel(lm, CMLMConfig(scope=scope)),
                          CMLMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", mask_seed=42),
                          train_dataset=tokenize_texts(names["texts"], names["tokenizer"], max_length=128),
                          processing_class=names["tokenizer"])  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    output = trainer.model(**trainer.mask(batch, 0))
    parts = (output.sums / output.counts).tolist()
    assert [names[part].item() for part in ("mlm", "contrast", "sequence")] == pytest.approx(parts, rel=1e-4)
    assert names["loss"].item() == pytest.approx(output.loss.item(), rel=1e-4) and names["loss"].item() > 1
    output.loss.backward()
    ours = dict(names["lm"].named_parameters())
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_commands_and_link_to_headings_that_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make\s([a-z-]+)", text, re.M)) <= targets
    for path, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not heading or heading in headings(target), f"{path}#{heading}"


def headings(page):
    """The page's headings, as GitHub names them in links."""
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("mark", "folder"), [("few-shot", "fewshot"), ("few-shot mlm", "fewshot-mlm")])
def test_few_shot_tables_are_those_of_the_cells(mark, folder):
    from cmlm_fast.fewshot.cells import read_cells
    from cmlm_fast.fewshot.tables import rows_of, summary

    page = (ROOT / "docs" / "few-shot.md").read_text(encoding="utf-8")
    shown = page.partition(f"<!-- {mark} -->\n")[2].partition(f"\n<!-- /{mark} -->")[0]
    methods = [cell.strip() for cell in shown.splitlines()[0].split("|")[3:-1]]
    assert shown == summary(rows_of(read_cells(ROOT / "benchmarks" / "results" / folder / "cells.jsonl")), "ft", methods)


def test_scale_table_is_what_its_formulas_give():
    from transformers import AutoModelForMaskedLM, BertConfig

    from benchmarks import scale

    assert f"{scale.BEGIN}{scale.table()}{scale.END}" in scale.PAGE.read_text(encoding="utf-8")
    with torch.device("meta"):
        lm = AutoModelForMaskedLM.from_config(BertConfig())
    layer = sum(p.numel() for p in lm.bert.encoder.layer[0].parameters())
    sizes = scale.Model()
    assert (sizes.parameters, sizes.layer) == (sum(p.numel() for p in lm.parameters()), layer)
    one, many = scale.step(1), scale.step(1024)
    assert one["ddp_sent"] == one["fsdp_sent"] == one["contrast_sent"] == 0
    assert many["ddp_sent"] == pytest.approx(8 * sizes.parameters, rel=1e-2)
    assert many["contrast_memory"] == 2 * 1024 * 32 * 768 * 6


def table(page, head):
    """The rows, as lists of cells, of the table whose first line begins with `head`."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"\n{head}")[2].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_steps_on_cpus_are_those_of_the_results():
    rows, path = table("speed.md", "| 2 cores | step"), None
    for name, *cells in rows:
        path = re.findall(r"\]\((.*?)\)", name)[0] if "](" in name else path
        (found,) = (row for row in json.loads((ROOT / "docs" / path).read_text())["rows"] if row["case"].split()[-1] in name)
        ms, times = found["ms"]["ours"], found["speedup"]
        assert cells == [f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1e3:.2f} s", f"{times['naive']:.1f} ×",
                         f"{times['strong']:.2f} ×", f"{times['strong kept']:.2f} ×",
                         f"{found['share of floor'] * 100:.0f} %"]  # fmt: skip
    files = {path.name for path in (ROOT / "benchmarks" / "results").glob("train*.json")}
    assert files == set(re.findall(r"results/(train.*?\.json)", str(rows)))


def test_steps_on_a_gpu_are_those_of_the_results():
    rows = table("tuning.md", "| | naive | strong |")
    found = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3.json").read_text())["train"]
    order = ("naive", "strong", "strong compiled", "ours", "ours compiled", "ours compiled low")
    for (name, *cells), row in zip(rows, found, strict=True):
        case, size = row["case"].split()[:2]
        assert f"{int(size):,}" in name and (case in name) == (size == "512")
        assert cells[:6] == [f"{row['ms'][p]:#.3g} ms".replace(". ", " ") if p in row["ms"] else "" for p in order]
        others = [f"{row['speedup'][p]:.2f}" if p in row["speedup"] else "–" for p in order[:3]]
        assert cells[6] == ("" if set(others) == {"–"} else ", ".join(others))
        assert cells[7] in (f"{row['MFU'] * 100:.0f} %", f"{row['MFU'] * 100:.1f} %")
