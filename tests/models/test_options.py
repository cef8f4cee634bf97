"""Sizes that do not fit each other are refused with one line that says what would."""

import dataclasses

import pytest

from muonlab.errors import InputError
from muonlab.models import ModelOptions, Transformer


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"d_model": 130}, "d_model 130 is not divisible by n_heads 4"),
        ({"d_model": 12}, "even head width"),
        ({"n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
        ({"n_kv_heads": 0}, "n_kv_heads"),
        ({"n_experts": 4, "top_k": 5}, "top_k 5 must lie between 1 and n_experts 4"),
        ({"n_experts": 4, "top_k": 0}, "top_k 0"),
        ({"n_experts": -1}, "n_experts"),
        ({"activation": "swiglo"}, "did you mean 'swiglu'"),
        ({"dropout": 1.0}, "dropout must be in [0, 1)"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"seq_len": 0}, "seq_len"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"router_noise": -0.1}, "router_noise"),
        ({"load_balancing": -1.0}, "load_balancing"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"init_std": float("nan")}, "init_std"),
    ],
)
def test_bad_options_get_one_line(wrong: dict, says: str) -> None:
    with pytest.raises(InputError) as error:
        ModelOptions(**wrong)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_needs_the_vocabulary_resolved() -> None:
    with pytest.raises(InputError, match="vocab_size"):
        Transformer(ModelOptions())


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelOptions().d_model = 64  # type: ignore[misc]
