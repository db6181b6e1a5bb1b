"""The transformer against transformers' Qwen2 and Granite with the same weights, and against itself with a cache."""
import json
import math
from dataclasses import replace

import pytest
import torch

from ardm_course.audio import import_torchaudio
from ardm_course.core import CourseError
from ardm_course.transformer import Attention, KVCache, Transformer, TransformerConfig, load_minicpm, load_qwen2, rope_table, sample_token


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    import_torchaudio()  # transformers imports it where it is installed, and it may need our shim
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=112,
                                      vocab_size=97, rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=128)
    model = transformers.Qwen2ForCausalLM(config).eval()
    for name, weight in model.named_parameters():  # biases and norms start at trivial values; make them count
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.2)
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder)
    return model, folder


def test_states_equal_qwen2(qwen):
    peer, folder = qwen
    ours, embeddings = load_qwen2(folder)
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = peer.model(ids).last_hidden_state
        torch.testing.assert_close(ours(embeddings[ids]), theirs, atol=1e-4, rtol=1e-4)
        cache = KVCache(ours.config, 2, 64)
        steps = [ours(embeddings[ids[:, i:i + 1]], cache=cache) for i in range(33)]
        torch.testing.assert_close(torch.cat(steps, 1), theirs, atol=1e-4, rtol=1e-4)


def test_other_models_are_refused(qwen, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CourseError, match="llama"):
        load_qwen2(tmp_path)


def test_incomplete_weights_are_refused(qwen, tmp_path):
    (tmp_path / "config.json").write_text((qwen[1] / "config.json").read_text())
    with pytest.raises(CourseError, match="complete"):
        load_qwen2(tmp_path)


SHORT, LONG = [1 + 0.1 * k for k in range(8)], [2 + 0.7 * k for k in range(8)]


@pytest.fixture(scope="module", params=[None, 32, 256])
def minicpm(request, tmp_path_factory):
    "Weights in MiniCPM's layout, and a peer of the same arithmetic: Granite has the constants on embeddings and blocks, and LongRoPE."
    import_torchaudio()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    most = request.param or 64
    rope = {"rope_type": "default"} if request.param is None else {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32}
    config = transformers.GraniteConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=112, vocab_size=97, rms_norm_eps=1e-5,
                                        max_position_embeddings=most, embedding_multiplier=12.0, residual_multiplier=1.4 / math.sqrt(3), attention_multiplier=0.25,
                                        rope_parameters=rope | {"rope_theta": 1e4}, tie_word_embeddings=True)
    model = transformers.GraniteForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.2 if "norm" in name else 0.08)
    folder = tmp_path_factory.mktemp("minicpm")
    model.save_pretrained(folder)
    settings = {"model_type": "minicpm", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 112, "vocab_size": 97,
                "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": most, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
                "rope_scaling": None if request.param is None else rope}
    (folder / "config.json").write_text(json.dumps(settings))
    return model, folder


def test_states_equal_minicpm(minicpm):
    peer, folder = minicpm
    ours, embeddings = load_minicpm(folder)
    most = peer.config.max_position_embeddings
    assert ours.config.rope_factors == {64: (), 32: tuple(SHORT), 256: tuple(LONG)}[most]
    ids = torch.randint(0, 97, (2, 32 if most == 32 else 45), generator=torch.Generator().manual_seed(1))  # transformers takes long factors when the text is long
    with torch.no_grad():
        theirs = peer.model(ids).last_hidden_state
        torch.testing.assert_close(ours(embeddings[ids]), theirs, atol=1e-4, rtol=1e-4)
        cache = KVCache(ours.config, 2, 64)
        steps = [ours(embeddings[piece], cache=cache) for piece in ids.split([20] + [1] * (ids.shape[1] - 20), 1)]
        torch.testing.assert_close(torch.cat(steps, 1), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change, words", [({"model_type": "qwen2"}, "qwen2"), ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn")])
def test_other_kinds_of_minicpm_are_refused(minicpm, tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((minicpm[1] / "config.json").read_text()) | change))
    with pytest.raises(CourseError, match=words): load_minicpm(tmp_path)


def test_incomplete_minicpm_is_refused(minicpm, tmp_path):
    (tmp_path / "config.json").write_text((minicpm[1] / "config.json").read_text())
    with pytest.raises(CourseError, match="complete"): load_minicpm(tmp_path)


# ---- shapes and masks

def test_heads_may_be_larger_than_their_share_of_the_width():
    torch.manual_seed(0)
    config = TransformerConfig(48, 2, 4, 2, 96, head_dim=20)
    model, x = Transformer(config).eval(), torch.randn(2, 9, 48)
    attention = model.blocks[0].attention
    assert config.head_size == 20 and replace(config, head_dim=0).head_size == 12
    assert attention.qkv.weight.shape == (160, 48) and attention.out.weight.shape == (48, 80)
    cache = KVCache(config, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(piece, cache=cache) for piece in x.split([4, 1, 4], 1)], 1), model(x), atol=1e-5, rtol=1e-4)
        rope = rope_table(torch.arange(9), 20)
        q, k, v = (part.view(2, 9, -1, 20) for part in attention.qkv(x).split([80, 40, 40], -1))
        turn = lambda h: torch.cat([h[..., :10] * rope[0][:, None] - h[..., 10:] * rope[1][:, None], h[..., 10:] * rope[0][:, None] + h[..., :10] * rope[1][:, None]], -1)
        scores = torch.einsum("bihd,bjhd->bhij", turn(q), turn(k).repeat_interleave(2, 2)) / 20 ** 0.5
        by_hand = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1), v.repeat_interleave(2, 2))
        torch.testing.assert_close(attention(x, rope), attention.out(by_hand.flatten(2)), atol=1e-5, rtol=1e-4)


def test_nobody_looks_at_what_the_mask_hides():
    torch.manual_seed(0)
    attention, x, rope = Attention(TransformerConfig(32, 1, 4, 2, 64)), torch.randn(2, 9, 32), rope_table(torch.arange(9), 8)
    mask = (torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None]
    with torch.no_grad():
        hidden, free = attention(x, rope, causal=False, mask=mask), attention(x, rope, causal=False)
        torch.testing.assert_close(hidden[0], free[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(hidden[1:, :5], attention(x[1:, :5], tuple(part[:5] for part in rope), causal=False), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(hidden[1, :5], free[1, :5], atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cache_in_uneven_pieces(groups):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(64, 2, 4, groups, 128)).eval()
    x = torch.randn(2, 30, 64)
    with torch.no_grad():
        cache, pieces = KVCache(model.config, 2, 30), x.split([7, 1, 5, 1, 16], 1)
        torch.testing.assert_close(torch.cat([model(piece, cache=cache) for piece in pieces], 1), model(x), atol=1e-5, rtol=1e-4)


def test_full_cache_says_so():
    model = Transformer(TransformerConfig(64, 1, 4, 4, 128))
    with pytest.raises(CourseError, match="larger capacity"):
        model(torch.randn(1, 5, 64), cache=KVCache(model.config, capacity=4))


def test_top_p_keeps_the_best():
    logits = torch.tensor([[4.0, 3.0, 0.0, -2.0]]).expand(1000, -1)
    assert sample_token(logits, top_p=1e-9, generator=torch.Generator().manual_seed(0)).eq(0).all()
    assert sample_token(logits, temperature=0).eq(0).all()
    assert len(sample_token(logits, generator=torch.Generator().manual_seed(0)).unique()) > 1
