"""A widened target has the function of the trained one, and nothing in it that could be skipped."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from benchmarks.speed.widen import widen, widened_config  # noqa: E402


def tiny(**changes):
    torch.manual_seed(1)
    shape = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-3,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **changes})).float().eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("hidden", "layers"), [(32, 2), (32, 5), (64, 2), (96, 4)])
def test_logits_are_those_of_the_original(hidden, layers, tied):
    model = tiny(tie_word_embeddings=tied)
    for norm in (model.model.norm, *(layer.input_layernorm for layer in model.model.layers)):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    wide = widen(model, hidden, layers)
    ids = torch.randint(50, (3, 17))
    with torch.no_grad():
        # The embeddings are small, so that `eps` is a good part of the mean.
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_model_has_the_asked_shape_and_is_the_same_every_time():
    first, second = (widen(tiny(), 64, 3) for _ in range(2))
    assert first.config.hidden_size == 64
    assert first.config.num_hidden_layers == 3
    assert first.config.num_attention_heads == 8
    assert first.config.head_dim == 8
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_what_writes_into_the_padding_and_the_added_layers_outputs_are_zero():
    wide = widen(tiny(), 64, 3)
    added = wide.model.layers[2]
    assert not added.self_attn.o_proj.weight.any()
    assert not added.mlp.down_proj.weight.any()
    for layer in wide.model.layers:
        for weight in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            assert (weight.weight != 0).all()


@pytest.mark.parametrize(("hidden", "layers"), [(48, 2), (16, 2), (32, 1)])
def test_a_shape_that_cannot_hold_the_model_is_refused(hidden, layers):
    with pytest.raises(SystemExit, match=r"--(hidden|layers) must be"):
        widened_config(tiny().config, hidden, layers)
