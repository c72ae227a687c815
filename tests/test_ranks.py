"""1, 2 and 3 gloo ranks, DDP and FSDP2: masks, losses, gradients and scores of one process on the joined batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cmlm_fast import ranks as launched
from cmlm_fast.data import RankShare


@pytest.fixture(scope="module")
def runs(script_folder):
    return script_folder("rank_runs")


def load(runs, name):
    return [torch.load(path) for path in sorted(runs.glob(f"{name}-[0-9].pt"))]


def assert_same_masks(one, ranks, first_step=0):
    joined = {}
    for rank in ranks:
        for key, views in rank["masks"].items():
            assert key not in joined and len(views) == 1, f"(step, sample) {key} was seen twice"
            joined[key] = views[0]
    wanted = {key: views[0] for key, views in one["masks"].items() if key[0] >= first_step}
    assert joined.keys() == wanted.keys()
    assert all(torch.equal(joined[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "name", ["ddp-2", "ddp-3", "fsdp-2", "cached-1", "cached-2", "cached-3", "uneven-3", "evaluated-2"]
)
def test_ranks_equal_one_process(name, runs):
    (one,), ranks = load(runs, "ddp-1"), load(runs, name)
    assert len(one["loss"]) == 4 and len(ranks) == int(name[-1])
    assert_same_masks(one, ranks)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert rank["sequence"] == pytest.approx(one["sequence"], rel=1e-4)
        for step, (a, b) in enumerate(zip(one["gradients"], rank["gradients"], strict=True)):
            for parameter in a:
                torch.testing.assert_close(a[parameter], b[parameter], rtol=1e-3, atol=2e-5,
                                           msg=lambda text, at=(step, parameter): f"{at}: {text}")  # fmt: skip
        for parameter, value in one["weights"].items():
            torch.testing.assert_close(value, rank["weights"][parameter], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["ddp-2", "ddp-3", "cached-2", "cached-3", "evaluated-2"])
def test_gradients_are_reduced_once_a_step(name, runs):
    for rank in load(runs, name):
        assert rank["reduced"] == [1] * 4


@pytest.mark.parametrize("name", ["ddp-2", "ddp-3", "fsdp-2"])
def test_held_out_scores_do_not_depend_on_the_ranks(name, runs):
    # 21 texts in batches of 8: the last of three is short, and 2 ranks need a fourth.
    (one,), ranks = load(runs, "ddp-1"), load(runs, name)
    names = ("eval_loss", "eval_mlm", "eval_token", "eval_sequence", "eval_masked_accuracy", "eval_sequence_retrieval")
    for rank in ranks:
        for score in names:
            assert rank["scores"][score] == pytest.approx(one["scores"][score], rel=1e-3, abs=1e-4), score
        assert rank["tested"]["test_mlm"] == pytest.approx(one["scores"]["eval_mlm"], rel=1e-5)  # the last rows weigh more


@pytest.mark.parametrize("name", ["ddp-1", "ddp-2", "ddp-3"])
def test_held_out_batches_are_all_seen_whatever_the_training_leaves_out(name, runs):
    # 33 rows make three full batches; 21 held-out rows, two full ones and a short one.
    assert [rank["batches"] for rank in load(runs, name)] == {"1": [(3, 3)], "2": [(1, 2)] * 2, "3": [(1, 1)] * 3}[name[-1]]


@pytest.mark.parametrize(("name", "unused"), [("headless-2", "lm.cls.predictions.transform"), ("flat-2", "projection")])
def test_what_an_objective_leaves_out_has_no_gradient(name, unused, runs):
    first, second = load(runs, name)
    assert first["reduced"] == second["reduced"] == [1, 1]
    assert not any(parameter.startswith(unused) for step in first["gradients"] for parameter in step)
    assert all(torch.equal(first["weights"][parameter], value) for parameter, value in second["weights"].items())


def test_the_training_loss_is_that_of_all_ranks_and_an_untied_head_trains(runs):
    (one,), ranks = load(runs, "untied-1"), load(runs, "untied-2")
    for rank in ranks:
        assert rank["training_loss"] == pytest.approx(one["training_loss"], rel=1e-4)
        for parameter, value in one["weights"].items():
            torch.testing.assert_close(value, rank["weights"][parameter], rtol=1e-3, atol=2e-5)


def test_a_full_disk_of_one_rank_ends_all_of_them(runs):
    # With a best checkpoint, for which the Trainer would wait.
    first, second = load(runs, "full-2")
    assert "No space left on device" in first and "another rank could not write" in second


def test_a_run_of_one_process_goes_on_with_two(runs):
    (one,), ranks = load(runs, "ddp-1"), load(runs, "one-to-two")
    assert_same_masks(one, ranks, first_step=2)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-4)
        for parameter, value in one["weights"].items():
            torch.testing.assert_close(value, rank["weights"][parameter], rtol=1e-3, atol=2e-5)


def test_fsdp2_saves_a_plain_model_and_resumes_to_the_same_bits(runs):
    from transformers import AutoModelForMaskedLM

    from cmlm_fast import checkpoints

    whole, resumed = load(runs, "fsdp-adam"), load(runs, "fsdp-adam-resumed")
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    (one,) = load(runs, "ddp-adam")
    assert whole[0]["loss"] == pytest.approx(one["loss"], rel=1e-3)
    folder = runs / "fsdp-adam" / "checkpoint-4"
    assert checkpoints.damage(folder) is None
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in model.named_parameters():
        assert torch.equal(value, whole[0]["weights"][f"lm.{name}"]), name


def test_fsdp2_in_bfloat16_keeps_losses_in_float32(runs):
    (one,), (first, second) = load(runs, "ddp-adam"), load(runs, "fsdp-bf16")
    assert first["loss"] == second["loss"] == pytest.approx(one["loss"][:2], rel=0.02)
    assert first["dtypes"] == second["dtypes"] == {torch.float32}


def test_fsdp2_goes_back_to_its_best_checkpoint(runs):
    for rank in load(runs, "fsdp-best"):  # from the first of two epochs, since here the larger loss counts as better
        assert rank["scores"]["eval_loss"] == pytest.approx(rank["best"], rel=1e-5)
        assert rank["best"] == max(rank["evaluated"]) > min(rank["evaluated"])


def test_fsdp2_keeps_a_learned_temperature_in_bounds(runs):
    for rank in load(runs, "fsdp-clamped"):  # as in test_a_learned_temperature_stays_in_bounds
        assert rank["temperature"][-1] == pytest.approx(0.01, rel=0.01)


def test_gradient_caching_of_a_temperature_that_fsdp_shards_is_refused(runs):
    for rank in load(runs, "fsdp-2"):
        refusal = "CMLMTrainer: expected contrastive_batch_size to be None if FSDP shards a learned temperature"
        assert rank["refused"].startswith(refusal) and rank["refused"].endswith(", got 8")


@pytest.mark.parametrize(("batches", "ranks"), [(7, 1), (7, 2), (7, 3), (6, 3), (1, 4)])
def test_shares_deal_every_batch_once(batches, ranks):
    sampler = [[2 * i, 2 * i + 1] for i in range(batches)]
    shares = [RankShare(sampler, rank, ranks) for rank in range(ranks)]
    dealt = [list(share) for share in shares]
    assert len({len(share) for share in (*shares, *dealt)}) == 1
    joined = [batch for group in zip(*dealt, strict=True) for batch in group]
    assert joined[:batches] == sampler and not any(joined[batches:])
    full = [list(RankShare(sampler, rank, ranks, drop_last=True)) for rank in range(ranks)]
    assert all(len(share) == batches // ranks and all(share) for share in full)


def test_a_fault_without_words_is_one_too(monkeypatch):
    def fail():
        raise OSError

    monkeypatch.setattr(launched, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda messages, mine, group: messages.__setitem__(0, mine))
    with pytest.raises(ValueError, match="OSError"):
        launched.in_turn(fail)
