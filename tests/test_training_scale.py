"""Scale on paper: against what LongLoRA's authors reported, and where it must say no."""

import json
import re
import shlex
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longreach.pipelines.cli import app
from longreach.training.scale import (
    GPUS,
    MODELS,
    RESERVED_GIB,
    _ranks_per_row,
    arms,
    compared,
    gpu_of,
    setting,
    shape_of,
    sweep,
    verdicts,
)

A100, H100 = GPUS["a100-80gb"], GPUS["h100-80gb"]
PAGE = Path(__file__).parent.parent / "docs/scale.md"


def points(model, gpu=A100, **choices):
    return list(sweep(MODELS[model], gpu, **{"row": 32768, "rows": 64, **choices}))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192)],
)
def test_the_models_have_their_published_sizes(model, parameters):
    assert MODELS[model].parameters == parameters


def test_hours_are_within_15_percent_of_those_reported():
    """The largest error is 10%, at 65k. One assumed share of the peak, 60%, for all of them."""
    for row, name, hours, reported, _, _ in compared():
        assert hours == pytest.approx(reported, rel=0.15), (row, name)


def test_memory_is_at_most_half_too_low_of_what_was_reported():
    """48 and 45% too low: their loss had whole rows of logits, 7.8 GiB a copy at 65k; ours has a chunk."""
    known = [(gib, gb) for *_, gib, gb in compared() if gb is not None]
    assert len(known) == 2
    for gib, gb in known:
        assert 0.5 * gb < gib < gb
        logits = 65536 * 32000 * 4 / 2**30
        assert gib + 3 * logits < gb < gib + 5 * logits


def test_a_collective_waits_for_every_gpu_of_its_ring():
    """NCCL's own reckoning of an all-reduce: 2 (n - 1) steps, of which 2 (nodes - 1) go between nodes."""
    for gpus, inside, outside in ((8, 14, 0), (64, 112, 14), (1024, 1792, 254)):
        assert A100.machine(gpus, 0.6).latency * 1e6 == pytest.approx(8.4 + inside * 3.4 + outside * 9.6)


@pytest.mark.parametrize(("model", "row"), [("llama-2-7b", 100000), ("llama-2-70b", 32768)])
def test_what_the_paper_fits_on_one_machine_fits_here(model, row):
    room = A100.memory_gib - RESERVED_GIB
    assert setting(MODELS[model], arms(row)["longlora"], A100, "3", row=row, rows=64, gpus=8).gib < room


def test_full_fine_tuning_of_70b_needs_the_hosts_memory_on_one_machine():
    first = points("llama-2-70b", counts=(8, 64))[0]
    assert (first.arm, first.gpus, first.best.way) == ("full", 8, "3+host")
    assert first.ways["3"].gib > A100.memory_gib
    assert first.best.host_gib == pytest.approx(18 * MODELS["llama-2-70b"].parameters / 2**30)


def test_short_rows_stop_scaling_and_the_verdict_says_where():
    found = points("llama-2-7b", H100, row=8192)
    full = {p.gpus: p.efficiency for p in found if p.arm == "full"}
    assert full[8] == 1
    assert full[256] > 0.5 > full[512] > full[1024]
    said = list(verdicts(found, H100))
    assert said[0].startswith("full: fits from 8 GPUs with ZeRO 1, 2, 3, 3+host; stops scaling at 512 GPUs (35%")


def test_gathering_70b_by_a_thousand_gpus_takes_longer_than_by_half_as_many():
    found = {p.gpus: p for p in points("llama-2-70b", rows=128) if p.arm == "longlora"}
    exchange_s = {gpus: point.best.cost.seconds["exchange"] for gpus, point in found.items()}
    assert exchange_s[64] < exchange_s[512] < exchange_s[1024]
    assert found[1024].best.step_s > 0.75 * found[512].best.step_s, "twice the GPUs save less than a quarter"


def test_it_says_where_the_batch_cannot_be_shared_out():
    (last,) = [p for p in points("llama-2-13b") if p.gpus == 1024 and p.arm == "full"]
    assert (last.ways, last.best) == ({}, None), "64 rows by 16 ranks, and 16 do not divide 40 heads"
    assert "the batch does not divide evenly over 1,024 GPUs" in next(verdicts(points("llama-2-13b"), A100))


def test_it_says_where_nothing_fits():
    small = replace(A100, memory_gib=8)
    said = list(verdicts(points("llama-2-70b", small, counts=(8,)), small))
    assert re.match(r"full: does not fit: it needs at least \d+ GiB per GPU, but only 4 GiB are free", said[0])


def test_more_gpus_have_less_work_each_and_never_need_more_memory():
    for model in MODELS:
        for name in arms(32768):
            own = [p for p in points(model) if p.arm == name and p.best]
            work = [p.best.cost.seconds["matrices"] + p.best.cost.seconds["attention"] for p in own]
            assert work == sorted(work, reverse=True)
            for few, many in pairwise(own):
                if few.best.ranks <= many.best.ranks:
                    assert all(many.ways[way].gib <= few.ways[way].gib for way in few.ways), (model, name, many.gpus)


def test_a_config_is_as_good_as_a_name(tmp_path):
    of = asdict(MODELS["llama-2-70b"])
    config = {
        "num_hidden_layers": of["layers"],
        "hidden_size": of["hidden"],
        "intermediate_size": of["intermediate"],
        "num_attention_heads": of["heads"],
        "num_key_value_heads": of["kv_heads"],
        "vocab_size": of["vocab"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path)) == MODELS["llama-2-70b"]
    del config["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no intermediate_size"):
        shape_of(str(tmp_path))
    with pytest.raises(ValueError, match="use one of llama-2-7b"):
        shape_of("llama-3")


def test_no_more_ranks_share_a_row_than_there_are_key_value_heads():
    """As attention/ulysses.py requires; Llama-2-70B has 64 query heads and 8 key/value heads."""
    assert _ranks_per_row(MODELS["llama-2-70b"], row=131_072, rows=128, gpus=512) == [4, 8]
    assert _ranks_per_row(MODELS["llama-2-7b"], row=131_072, rows=128, gpus=512) == [4, 8, 16, 32]


def test_a_gpu_may_differ_from_the_known_ones():
    assert gpu_of("h100-80gb,memory_gib=141,bytes=4.8e12") == replace(H100, memory_gib=141.0, bytes=4.8e12)
    for wrong in ("v100", "h100-80gb,memory=3", "h100-80gb,bytes=fast", "h100-80gb,bytes=-1"):
        with pytest.raises(ValueError, match="h100-80gb"):
            gpu_of(wrong)


def test_the_page_shows_what_the_commands_print():
    shown = re.findall(r"```console\n\$ longreach (scale.*)\n((?:.*\n)*?)```", PAGE.read_text(encoding="utf-8"))
    assert len(shown) > 2
    for command, output in shown:
        printed = CliRunner().invoke(app, shlex.split(command)).output.splitlines()
        lines = output.splitlines()
        starts = [n for n in range(len(printed)) if printed[n : n + len(lines)] == lines]
        assert starts, f"longreach {command} prints otherwise:\n" + "\n".join(printed)
