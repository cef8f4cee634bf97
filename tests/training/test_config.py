"""Configurations: names, TOML and flags resolve to one frozen value; what is misspelt is named with its neighbour."""

import tomllib

import pytest
import tomli_w
import torch
from pydantic import ValidationError
from runs import tiny

from muonlab.errors import InputError
from muonlab.models import MODELS
from muonlab.optim.registry import OPTIMIZERS
from muonlab.training.config import from_dict, merge, read_toml, replace, resolve_machine
from muonlab.training.tracking import without_none


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - {"class"}))
def test_a_configuration_survives_the_way_through_plain_values(optimizer):
    config = from_dict({"optimizer": optimizer})
    assert from_dict(config.to_dict()) == config
    assert from_dict(without_none(config.to_dict())) == config


def test_nested_options_that_are_not_set_survive_the_file(tmp_path):
    config = tiny(optimizer={"overrides": [{"name": "*router*", "kind": "hidden"}]})
    text = tomli_w.dumps(without_none(config.to_dict()))
    assert from_dict(tomllib.loads(text)) == config


def test_a_preset_takes_overrides_and_an_explicit_table_needs_no_preset():
    assert from_dict({"model": {"preset": "micro", "n_layers": 2}}).model.n_layers == 2
    assert from_dict({"model": {"d_model": 64}}).model.d_model == 64
    assert from_dict({"model": "micro"}).model == MODELS["micro"]


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError):
        tiny().seed = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "mikro"}, "unknown model 'mikro'; did you mean 'micro'"),
        ({"optimizer": "moun"}, "unknown optimizer 'moun'; did you mean 'muon'"),
        ({"optimizer": {"name": "muon", "momentun": 0.9}}, "did you mean 'optimizer.momentum'"),
        ({"training": {"update": 3}}, "did you mean 'training.updates'"),
        ({"sead": 3}, "did you mean 'seed'"),
        ({"schedule": {"kind": "cosin"}}, "schedule"),
        ({"optimizer": {"name": "muon", "lr": -1.0}}, "lr"),
        ({"optimizer": {"name": "adamw", "lr": "fast"}}, "optimizer.lr is 'fast'"),
        ({"optimizer": {"name": "adamw", "lr": float("nan")}}, "lr"),
        ({"model": {"n_experts": 4, "top_k": 5}}, "top_k"),
        ({"model": {"d_model": 100, "n_heads": 3}}, "n_heads"),
        ({"training": {"updates": 0}}, "training.updates is 0; it must be at least 1"),
        ({"training": {"clip_norm": -1}}, "clip_norm"),
        ({"loss": {"label_smoothing": 1.5}}, "label_smoothing"),
    ],
)
def test_bad_values_are_one_line_that_names_the_key(values, message):
    with pytest.raises(InputError) as error:
        from_dict(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_configuration_file_is_one_line_that_names_it(tmp_path):
    file = tmp_path / "run.toml"
    with pytest.raises(InputError, match="no configuration file"):
        read_toml(file)
    file.write_text("[model\n")
    with pytest.raises(InputError, match="not valid TOML"):
        read_toml(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not valid TOML"):
        read_toml(file)


def test_merging_lays_nested_values_on_top_without_changing_either():
    base, over = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}}
    assert merge(base, over) == {"a": {"b": 5, "c": 2}, "d": 3}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert over == {"a": {"b": 5}}


def test_resolving_leaves_no_auto_and_changes_nothing_the_second_time():
    resolved = resolve_machine(tiny(training={"threads": 0}))
    assert "auto" not in (resolved.training.device, resolved.training.precision, resolved.training.program)
    assert resolved.training.threads > 0
    assert resolved.training.logit_chunk_bytes > 0
    assert resolve_machine(resolved) == resolved


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    training = {"device": "cuda", "precision": "auto", "program": "eager", "logit_chunk_bytes": 1 << 20}
    assert resolve_machine(replace(tiny(), training=training)).training.precision == "fp32"


def test_an_absent_device_is_one_line():
    with pytest.raises(InputError, match="known: auto, cpu"):
        resolve_machine(replace(tiny(), training={"device": "gpu"}))


def test_what_toml_cannot_say_is_always_the_default():
    """TOML has no null: a field that may be None must mean None when it is left out."""
    import dataclasses

    for options in [entry.options() for name, entry in OPTIMIZERS.items() if name != "class"] + [
        tiny().training,
        tiny().data,
    ]:
        for field in dataclasses.fields(options):
            if "None" in str(field.type):
                assert field.default is None, f"{type(options).__name__}.{field.name}"
