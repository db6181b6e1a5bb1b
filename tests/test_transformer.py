"""The transformer against transformers' Qwen2 with the same weights, and against itself with a cache."""
import json

import pytest
import torch

from ardm_course.audio import import_torchaudio
from ardm_course.core import CourseError
from ardm_course.transformer import KVCache, Transformer, TransformerConfig, load_qwen2, sample_token


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
