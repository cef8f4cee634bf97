"""Who updates what: decided by the module that owns a parameter, checked against tables written by hand."""

import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn

from muonlab import Muon
from muonlab.errors import InputError
from muonlab.optim import AdamWOptions, MuonOptions, Override, build_optimizer
from muonlab.optim.routing import route

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
LLAMA_LAYER = {
    f"model.layers.0.{name}.weight": "hidden matrix"
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
}
ATTENTION = {name: row for name, row in LLAMA_LAYER.items() if "self_attn" in name}
UNTIED = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}


def experts(router, gate_up="hidden split 0 (64, 64)", down="hidden matrix", block="mlp"):
    stacks = {
        f"model.layers.0.{block}.experts.gate_up_proj": gate_up,
        f"model.layers.0.{block}.experts.down_proj": down,
    }
    return {**stacks, f"model.layers.0.{block}.{router}.weight": "router"}


def bert_layer(prefix):
    names = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    return {f"{prefix}.{name}.weight": "hidden matrix" for name in (*names, "intermediate.dense", "output.dense")}


def whisper_layer(prefix, attentions):
    names = [f"{attention}.{part}" for attention in attentions for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return {f"{prefix}.{name}.weight": "hidden matrix" for name in (*names, "fc1", "fc2")}


def t5_layer(prefix, attentions, feed_forward):
    names = [f"layer.{i}.{name}.{part}" for i, name in enumerate(attentions) for part in "qkvo"]
    return {f"{prefix}.{name}.weight": "hidden matrix" for name in (*names, *feed_forward)}


# Every parameter with two or more axes; all others must be vectors.
FAMILIES = {
    "gpt2": (
        lambda t: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=64)),
        {
            "transformer.wte.weight": "embedding",
            "transformer.wpe.weight": "embedding",
            **{
                f"transformer.h.0.{name}.weight": "hidden transpose"
                for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            },
            "transformer.h.0.attn.c_attn.weight": "hidden transpose > split 0 (32, 32, 32)",
        },
    ),
    "llama": (lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)), {**UNTIED, **LLAMA_LAYER}),
    "llama classifier": (
        lambda t: t.LlamaForSequenceClassification(t.LlamaConfig(**SMALL, pad_token_id=0, num_labels=16)),
        {"model.embed_tokens.weight": "embedding", "score.weight": "head", **LLAMA_LAYER},
    ),
    "qwen2, tied, biased": (
        lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, tie_word_embeddings=True)),
        {"model.embed_tokens.weight": "embedding", **LLAMA_LAYER},
    ),
    "mixtral": (
        lambda t: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_local_experts=4)),
        {**UNTIED, **ATTENTION, **experts("gate")},
    ),
    "gpt-oss, experts transposed and biased": (
        lambda t: t.GptOssForCausalLM(t.GptOssConfig(**SMALL, num_local_experts=4, head_dim=8)),
        {
            **UNTIED,
            **ATTENTION,
            **experts("router", "hidden transpose > interleaved 2", "hidden transpose"),
            "model.layers.0.mlp.experts.gate_up_proj_bias": "vector",
            "model.layers.0.mlp.experts.down_proj_bias": "vector",
        },
    ),
    "llama4, experts transposed without saying so": (
        lambda t: t.Llama4ForCausalLM(
            t.Llama4TextConfig(
                **SMALL, num_local_experts=4, head_dim=8, intermediate_size_mlp=64, interleave_moe_layer_step=1
            )
        ),
        {
            **UNTIED,
            **ATTENTION,
            **experts("router", "hidden transpose > split 0 (64, 64)", "hidden transpose", "feed_forward"),
            **{
                f"model.layers.0.feed_forward.shared_expert.{part}_proj.weight": "hidden matrix"
                for part in ("gate", "up", "down")
            },
        },
    ),
    "phi3, fused projections": (
        lambda t: t.Phi3ForCausalLM(t.Phi3Config(**SMALL, pad_token_id=0)),
        {
            **UNTIED,
            "model.layers.0.self_attn.qkv_proj.weight": "hidden split 0 (32, 16, 16)",
            "model.layers.0.self_attn.o_proj.weight": "hidden matrix",
            "model.layers.0.mlp.gate_up_proj.weight": "hidden split 0 (64, 64)",
            "model.layers.0.mlp.down_proj.weight": "hidden matrix",
        },
    ),
    "modernbert, gated": (
        lambda t: t.ModernBertForMaskedLM(
            t.ModernBertConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                vocab_size=100,
                max_position_embeddings=64,
                pad_token_id=0,
            )
        ),
        {
            "model.embeddings.tok_embeddings.weight": "embedding",
            "model.layers.0.attn.Wqkv.weight": "hidden matrix",
            "model.layers.0.attn.Wo.weight": "hidden matrix",
            "model.layers.0.mlp.Wi.weight": "hidden split 0 (48, 48)",
            "model.layers.0.mlp.Wo.weight": "hidden matrix",
            "head.dense.weight": "hidden matrix",
        },
    ),
    "bert": (
        lambda t: t.BertForMaskedLM(
            t.BertConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=64,
                vocab_size=100,
                max_position_embeddings=64,
            )
        ),
        {
            **{f"bert.embeddings.{name}_embeddings.weight": "embedding" for name in ("word", "position", "token_type")},
            **bert_layer("bert.encoder.layer.0"),
            "cls.predictions.transform.dense.weight": "hidden matrix",
        },
    ),
    "t5": (
        lambda t: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100)
        ),
        {
            "shared.weight": "embedding",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding",
            **t5_layer("encoder.block.0", ["SelfAttention"], [f"layer.1.DenseReluDense.{w}" for w in ("wi", "wo")]),
            **t5_layer(
                "decoder.block.0",
                ["SelfAttention", "EncDecAttention"],
                [f"layer.2.DenseReluDense.{w}" for w in ("wi", "wo")],
            ),
        },
    ),
    "whisper": (
        lambda t: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                vocab_size=100,
                num_mel_bins=16,
                max_source_positions=32,
                max_target_positions=32,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        {
            "model.encoder.conv1.weight": "hidden conv 1",
            "model.encoder.conv2.weight": "hidden conv 1",
            "model.decoder.embed_tokens.weight": "embedding",
            "model.decoder.embed_positions.weight": "embedding",
            **whisper_layer("model.encoder.layers.0", ["self_attn"]),
            **whisper_layer("model.decoder.layers.0", ["self_attn", "encoder_attn"]),
        },
    ),
    "mamba": (
        lambda t: t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100, state_size=8)),
        {
            "backbone.embeddings.weight": "embedding",
            "backbone.layers.0.mixer.A_log": "vector unknown",
            "backbone.layers.0.mixer.conv1d.weight": "hidden small",  # depthwise: 64 matrices of 1 x 4
            "backbone.layers.0.mixer.dt_proj.weight": "hidden small",
            "backbone.layers.0.mixer.in_proj.weight": "hidden matrix",
            "backbone.layers.0.mixer.x_proj.weight": "hidden matrix",
            "backbone.layers.0.mixer.out_proj.weight": "hidden matrix",
        },
    ),
    "vit": (
        lambda t: t.ViTForImageClassification(
            t.ViTConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
                num_labels=10,
            )
        ),
        {
            "vit.embeddings.cls_token": "vector unknown",
            "vit.embeddings.position_embeddings": "vector unknown",
            "vit.embeddings.patch_embeddings.projection.weight": "hidden conv 1",
            **{
                f"vit.layers.0.{name}.weight": "hidden matrix"
                for name in (*(f"attention.{part}_proj" for part in "qkvo"), "mlp.fc1", "mlp.fc2")
            },
            "classifier.weight": "head",
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_families_are_routed_as_the_hand_written_table_says(family):
    build, expected = FAMILIES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(transformers)
        optimizer = Muon(model)
    wanted = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {row["name"] for row in optimizer.routing().rows} == wanted
    for row in optimizer.routing().rows:
        said = expected.get(row["name"], "vector").split(" ", 1)
        assert row["kind"] == said[0], row
        assert row["rule"] == ("muon" if said[0] == "hidden" and said[1] != "small" else "adamw"), row
        if row["rule"] == "muon":
            assert row["view"] == said[1], row
        assert (row["reason"] == "unknown") == (said[-1] == "unknown"), row
    assert set(expected) <= {row["name"] for row in optimizer.routing().rows}


def test_an_override_takes_the_place_of_the_split_that_was_found():
    build, _ = FAMILIES["gpt2"]
    overrides = (Override(name="*.c_attn.weight", split=(64, 32)), Override(name="*.mlp.c_fc.weight", head_dim=16))
    views = {
        row["name"].split(".", 3)[-1]: row["view"]
        for row in Muon(build(transformers), overrides=overrides).routing().rows
    }
    assert views["attn.c_attn.weight"] == "transpose > split 0 (64, 32)"
    assert views["mlp.c_fc.weight"] == "transpose > heads 0 16"


def test_a_stack_of_ones_own_says_how_its_rows_are_split():
    class Experts(nn.Module):
        is_expert_stack = True
        row_split: ClassVar = {"both": (24, 8)}

        def __init__(self):
            super().__init__()
            self.both = nn.Parameter(torch.randn(4, 32, 16))
            self.down = nn.Parameter(torch.randn(4, 16, 8))

    views = {row["name"]: row["view"] for row in Muon(Experts(), min_dim=1).routing().rows}
    assert views == {"both": "split 0 (24, 8)", "down": "matrix"}


def test_names_alone_split_nothing():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(32, 16)
            self.Wi, self.c_attn, self.qkv_proj = nn.Linear(16, 32), nn.Linear(16, 48), nn.Linear(16, 48)

    assert {row["view"] for row in Muon(Block()).routing().rows if row["rule"] == "muon"} == {"matrix"}


def test_a_weight_under_a_parametrization_is_the_weight_of_its_module():
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    model = nn.ModuleDict({"embedding": weight_norm(nn.Embedding(40, 16)), "a": weight_norm(nn.Linear(16, 24))})
    model["b"] = spectral_norm(nn.Linear(24, 16))
    rows = {row["name"]: (row["kind"], row["rule"]) for row in Muon(model, strict=True).routing().rows}
    assert rows == {
        "embedding.parametrizations.weight.original0": ("embedding", "adamw"),
        "embedding.parametrizations.weight.original1": ("embedding", "adamw"),
        "a.bias": ("vector", "adamw"),
        "a.parametrizations.weight.original0": ("vector", "adamw"),
        "a.parametrizations.weight.original1": ("hidden", "muon"),
        "b.bias": ("vector", "adamw"),
        "b.parametrizations.weight.original": ("hidden", "muon"),
    }


def bare(*shapes):
    return [nn.Parameter(torch.zeros(shape, device="meta")) for shape in shapes]


LAYER = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]


@pytest.mark.parametrize("table", [(50257, 1024), (32000, 4096), (128256, 8192)], ids=["gpt2", "llama2", "llama3"])
def test_an_embedding_among_bare_parameters_is_warned_of_in_one_line_that_says_what_to_do(table):
    groups = [{"params": bare(*LAYER, table), "weight_decay": 0.1}, {"params": bare(table, (1024,))}]
    with pytest.warns(
        UserWarning, match=r"looks like an embedding or a head.*Muon\(model, ...\).*use_muon=False"
    ) as seen:
        Muon(groups)
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


@pytest.mark.parametrize(
    "params",
    [
        lambda: bare(*LAYER * 2),
        lambda: bare((14336, 4096), (14336, 4096), (4096, 14336)),
        lambda: bare(*[(28672, 4096), (4096, 14336)] * 3),
        lambda: bare((64, 16384, 2048)),
        lambda: [{"params": bare((50257, 768)), "use_muon": False}, {"params": bare(*LAYER)}],
        lambda: [{"params": bare((50257, 768)), "use_muon": True}],
        lambda: nn.Linear(1024, 50257, device="meta"),
    ],
)
def test_layers_among_bare_parameters_raise_no_false_alarm(params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon(params())


def language_model(vocab=64, width=32, tied=False):
    model = nn.ModuleDict(
        {
            "wte": nn.Embedding(vocab, width),
            "body": nn.Linear(width, width),
            "weight": nn.Linear(width, vocab, bias=False),
        }
    )
    if tied:
        model["weight"].weight = model["wte"].weight
    return model


def kinds(model, **options):
    return {entry.name: entry.kind for entry in route(model, **options)}


def test_an_untied_head_is_found_by_its_shape_whatever_its_name():
    assert kinds(language_model())["weight.weight"] == "head"
    assert kinds(language_model(vocab=32))["body.weight"] == "hidden"  # same shape, but not the last


def test_a_wrapped_or_compiled_model_is_routed_as_it_is():
    plain = [row["rule"] for row in Muon(hugging_face_llama()).routing().rows]
    wrapped = nn.DataParallel(hugging_face_llama())
    assert [row["rule"] for row in Muon(wrapped).routing().rows] == plain
    assert [row["rule"] for row in Muon(torch.compile(hugging_face_llama())).routing().rows] == plain


def hugging_face_llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, "vocab_size": 32, "intermediate_size": 32})
    )


def test_attention_and_recurrent_layers_of_torch_are_split_into_their_projections_and_gates():
    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoderLayer(16, 2, 32),
            "cross": nn.MultiheadAttention(16, 2, kdim=8, vdim=8, bias=False),
            "lstm": nn.LSTM(16, 8, proj_size=0),
            "rnn": nn.RNN(16, 8),
        }
    )
    views = {row["name"]: row["view"] for row in Muon(model, strict=True).routing().rows if row["rule"] == "muon"}
    assert views == {
        "encoder.self_attn.in_proj_weight": "split 0 (16, 16, 16)",
        "encoder.self_attn.out_proj.weight": "matrix",
        "encoder.linear1.weight": "matrix",
        "encoder.linear2.weight": "matrix",
        "cross.q_proj_weight": "matrix",
        "cross.k_proj_weight": "matrix",
        "cross.v_proj_weight": "matrix",
        "cross.out_proj.weight": "matrix",
        "lstm.weight_ih_l0": "split 0 (8, 8, 8, 8)",
        "lstm.weight_hh_l0": "split 0 (8, 8, 8, 8)",
        "rnn.weight_ih_l0": "matrix",
        "rnn.weight_hh_l0": "matrix",
    }


def test_a_tied_weight_is_an_embedding_once():
    routed = kinds(language_model(tied=True))
    assert routed == {"wte.weight": "embedding", "body.weight": "hidden", "body.bias": "vector"}


def test_routers_beside_experts_are_found_by_structure_and_by_mark():
    class Stack(nn.Module):
        is_expert_stack = True

        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 24, 16))

    class Mixture(nn.Module):
        def __init__(self, experts, outputs=4):
            super().__init__()
            self.choose = nn.Linear(16, outputs, bias=False)
            self.experts = experts

    listed = Mixture(nn.ModuleList(nn.Linear(16, 16) for _ in range(4)))
    assert kinds(listed)["choose.weight"] == "router"
    assert kinds(listed)["experts.2.weight"] == "hidden"
    stacked = Mixture(Stack())
    assert kinds(stacked) == {"choose.weight": "router", "experts.up": "hidden"}
    marked = Mixture(nn.Identity(), outputs=9)
    marked.choose.is_router = True
    assert kinds(marked) == {"choose.weight": "router"}


def test_what_no_rule_knows_is_warned_of_once_and_refused_when_strict():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 8))
            self.gain = nn.Parameter(torch.randn(()))

    with pytest.warns(UserWarning, match=r"module of table \(1 parameters\)") as seen:
        optimizer = Muon(Odd())
    assert len(seen) == 1
    assert [row["reason"] for row in optimizer.routing().rows] == ["unknown", "fewer than two dimensions"]
    with pytest.raises(InputError, match="table"):
        Muon(Odd(), strict=True)
    (table, _) = Muon(Odd(), strict=True, overrides=(Override(name="table", kind="hidden"),)).routing().rows
    assert (table["rule"], table["reason"]) == ("muon", "override")


def test_overrides_apply_by_name_and_by_module_class_later_ones_over_earlier():
    overrides = (
        Override(module="Linear", lr=0.5),
        Override(name="body.*", lr=0.25, weight_decay=0.0),
        Override(name="wte.weight", kind="hidden"),
    )
    rows = {row["name"]: row for row in Muon(language_model(), overrides=overrides).routing().rows}
    assert rows["weight.weight"]["lr"] == 0.5
    assert (rows["body.weight"]["lr"], rows["body.weight"]["weight_decay"]) == (0.25, 0.0)
    assert rows["wte.weight"]["rule"] == "muon"
    adamw = build_optimizer(language_model(), AdamWOptions(overrides=overrides[:1]))
    assert {row["name"]: row["lr"] for row in adamw.routing().rows}["weight.weight"] == 0.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (Override(name="boddy.weight"), "matches no parameter"),
        (Override(name="body.bias", kind="hidden"), "not a matrix"),
        (Override(name="body.weight", split=(16, 8)), "parameter 'body.weight': split"),
        (Override(name="body.weight", head_dim=5), "parameter 'body.weight': 32 rows"),
    ],
)
def test_overrides_that_cannot_apply_are_refused(override, words):
    with pytest.raises(InputError) as error:
        Muon(language_model(), overrides=(override,))
    assert words in str(error.value)


def test_contradictory_and_misspelt_overrides_are_refused():
    with pytest.raises(InputError, match="larger than head_dim"):
        Override(head_dim=16, block_size=32)
    with pytest.raises(InputError, match=r"head_dim 16 of the override for 'q\*'"):
        MuonOptions(block_size=32, overrides=(Override(name="q*", head_dim=16),))
    MuonOptions(block_size=32, overrides=(Override(name="q*", head_dim=16, block_size=0),))
    with pytest.raises(InputError, match="did you mean 'hidden'"):
        Override(kind="hiden")


def test_parameters_that_want_no_gradient_are_left_out():
    model = language_model()
    model["wte"].requires_grad_(False)
    assert "wte.weight" not in {row["name"] for row in Muon(model).routing().rows}


def test_small_matrices_go_to_the_fallback():
    model = nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(32, 32, bias=False))
    assert [row["rule"] for row in Muon(model).routing().rows] == ["adamw", "muon"]
    assert [row["rule"] for row in Muon(model, min_dim=2).routing().rows] == ["muon"] * 2
    assert [row["rule"] for row in Muon(model, min_dim=33, fallback="lion").routing().rows] == ["lion"] * 2


def test_width_scaling_lowers_the_fallback_learning_rates_of_wide_models():
    rows = Muon(language_model(width=32), lr=1.0, width_scaling=True).routing().rows
    assert {row["rule"]: row["lr"] for row in rows} == {"adamw": pytest.approx((32 / 768) ** -0.5), "muon": 1.0}


def test_the_table_prints_a_line_for_every_parameter():
    text = str(Muon(language_model()).routing())
    assert len(text.splitlines()) == 5
    assert "moonlight" in text
    assert "output embeddings" in text


def test_constructing_for_a_billion_parameters_needs_no_memory_and_little_work():
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(64)])
    optimizer = Muon(model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 128
    assert not optimizer.state
