"""The named models have exactly the parameters of the experiments they stand for."""

import dataclasses

import pytest
import torch

from muonlab.models import MODELS, SUMMARIES, ModelOptions, Transformer


def on_meta(options: ModelOptions) -> Transformer:
    with torch.device("meta"):
        return Transformer(options)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("dense-128", 6_685_312),
        ("moe-79m", 79_059_840),
        ("moe-107m", 107_371_392),
        ("qwen-385m", 385_283_072),
        ("gpt-124m", 162_220_800),
    ],
)
def test_total_parameters(name: str, total: int) -> None:
    assert sum(p.numel() for p in on_meta(MODELS[name]).parameters()) == total


def test_experts_of_the_79m_model_leave_36_592_512_parameters_active() -> None:
    model = on_meta(MODELS["moe-79m"])
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert sum(p.numel() for p in model.parameters()) - experts + experts * 2 // 8 == 36_592_512


def test_matrices_of_the_107m_model() -> None:
    model = on_meta(MODELS["moe-107m"])
    assert sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and n != "embedding.weight") == 88_492_032


def test_the_79m_model_has_the_matrices_of_its_experiment() -> None:
    shapes: dict[tuple[int, ...], int] = {}
    for name, parameter in on_meta(MODELS["moe-79m"]).named_parameters():
        if parameter.ndim > 1 and name != "embedding.weight":
            matrices = parameter.shape[0] if parameter.ndim == 3 else 1
            shapes[tuple(parameter.shape[-2:])] = shapes.get(tuple(parameter.shape[-2:]), 0) + matrices
    assert shapes == {(1536, 384): 48, (384, 1536): 48, (1152, 384): 6, (384, 384): 6, (8, 384): 6}


def test_micro_runs_with_any_vocabulary() -> None:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(MODELS["micro"], vocab_size=300))
    assert model(torch.randint(300, (2, 16))).hidden.shape == (2, 16, 128)


def test_every_model_has_a_summary_of_one_line() -> None:
    assert MODELS.keys() == SUMMARIES.keys()
    assert all(0 < len(summary) <= 100 and "\n" not in summary for summary in SUMMARIES.values())
