"""The comparison of keys and values in 16 bits and in 8, on a little text."""

import json

import pytest
import torch

from dev.bench import command as bench
from dev.bench import kv
from tests.model.reference import TINY, random_ids, random_model


def test_magnified_keys_change_no_logit() -> None:
    """A power of two rounds nothing."""
    model, ids = random_model(TINY), random_ids(TINY, 1, 12)
    with torch.inference_mode():
        expected = model(ids)
    keys = model.blocks[0].self_attn.qkv_proj.weight.detach().clone()
    kv.magnify(model, 16)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
    assert not torch.equal(model.blocks[0].self_attn.qkv_proj.weight, keys)


def test_large_channels_cost_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["kv", "--bytes", "1500", "--factors", "1", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    one, large = (found["by_factor"][factor] for factor in ("1", "256"))
    assert found["text_bytes"] == 1500
    assert one["16"]["perplexity"] == pytest.approx(large["16"]["perplexity"], rel=1e-4)
    assert abs(one["change"]) < 0.01 < large["change"]
