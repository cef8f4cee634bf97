"""Muon in transformers.Trainer: no network, a model of two layers from a configuration."""

import pytest
import torch

from muonlab import Muon

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

UPDATES = 12


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if request.param == "gpt2":
        config = transformers.GPT2Config(**tokens, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(**tokens, **sizes, max_position_embeddings=32)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def data() -> list[dict[str, torch.Tensor]]:
    ids = (torch.arange(24)[:, None] + torch.arange(16)) % 17 + 1
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **changes):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=UPDATES,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **{"save_strategy": "no", **changes},
    )


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def test_given_with_a_scheduler_it_trains_and_follows_the_schedule(model, data, tmp_path):
    optimizer = Muon(model, lr=5e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=UPDATES)
    trainer = transformers.Trainer(
        model=model, args=arguments(tmp_path), train_dataset=data, optimizers=(optimizer, scheduler)
    )
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0] - 0.5
    expected = [5e-3 * (1 - update / UPDATES) for update in range(UPDATES)]
    assert history(trainer, "learning_rate") == pytest.approx(expected, abs=1e-9)


def test_built_by_the_trainer_from_a_factory_it_sees_the_model_and_routes_it(model, data, tmp_path):
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, learning_rate=5e-3),
        train_dataset=data,
        optimizer_cls_and_kwargs=(lambda: Muon, {"lr": 5e-3, "weight_decay": 0.1}),
    )
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0] - 0.3
    kinds = {row["name"]: row["kind"] for row in trainer.optimizer.optimizer.routing().rows}
    assert kinds == {name: kind_of(name, parameter) for name, parameter in model.named_parameters()}


def kind_of(name: str, parameter: torch.Tensor) -> str:
    if parameter.ndim == 1:
        return "vector"
    if name == "lm_head.weight":
        return "head"
    return "embedding" if any(part in name for part in ("wte", "wpe", "embed_tokens")) else "hidden"


def test_a_run_that_is_resumed_from_a_checkpoint_ends_with_the_same_weights(model, data, tmp_path):
    initial = {name: value.clone() for name, value in model.state_dict().items()}

    def train(resume: bool) -> dict[str, torch.Tensor]:
        model.load_state_dict(initial)
        trainer = transformers.Trainer(
            model=model,
            args=arguments(tmp_path, save_strategy="steps", save_steps=UPDATES // 2, learning_rate=5e-3),
            train_dataset=data,
            optimizer_cls_and_kwargs=(lambda: Muon, {"lr": 5e-3, "weight_decay": 0.1}),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{UPDATES // 2}") if resume else None)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole, resumed = train(resume=False), train(resume=True)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
