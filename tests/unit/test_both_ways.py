"""Which bases read in both directions when they are told to, found without their weights."""

import pytest
import tiny
from transformers import GPTNeoConfig, MixtralConfig

from flipkd_dist.both_ways import check_both_ways
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_bases_that_read_both_ways(family, attention):
    both = StudentConfig(mode="alone", bidirectional=True, attn_implementation=attention)
    config = tiny.CAUSAL[family](100)
    check_both_ways(config, both)
    assert getattr(config, "is_causal", True)  # the caller's stays as it is


def test_experts_read_both_ways():
    both = StudentConfig(mode="alone", bidirectional=True)
    check_both_ways(MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=3, **tiny.SHAPE), both)


def test_a_base_that_reads_causally_whatever_it_is_told():
    neo = GPTNeoConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]])
    settings = {"model_name_or_path": "tiny", "mode": "alone", "attn_implementation": "eager"}
    with pytest.raises(UserError, match=r"^student\.bidirectional: tiny \(gpt_neo\) reads causally whatever") as error:
        check_both_ways(neo, StudentConfig(**settings, bidirectional=True))
    assert "\n" not in str(error.value)
    check_both_ways(neo, StudentConfig(**settings))
