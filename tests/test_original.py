"""Beside the original: the published shape, the name map, packed layers, the race, and equality where the original is installed."""
import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ardm_course import cli, original
from ardm_course.core import CourseError, cache_dir, count_parameters
from ardm_course.layout import Slot
from ardm_course.locdit import sample_patches, time_features
from ardm_course.original import (PAPER, PUBLISHED, TINY, PackedLinear, against_original, differences, empty, extra_parameters, load_original, original_python,
                                  original_settings, our_parts, our_patches, our_stack, our_weights, packed, race, random_inputs, ratios, summary)
from ardm_course.transformer import KVCache, Transformer, rope_table


def original_shapes(config):
    "Names and shapes of the original's weights, as its state dict lists them."
    language, head, found = config.backbone, config.head, {}
    H, W, F_, D = language.width, head.width, language.hidden, head.latent_dim
    keys = language.key_value_heads * (H // language.heads)
    def linear(name, out, inner, bias=True): found.update({f"{name}.weight": (out, inner), **({f"{name}.bias": (out,)} if bias else {})})
    for stack, layers in (("base_lm", language.layers), ("residual_lm", config.residual_layers), ("feat_encoder.encoder", config.encoder.layers), ("feat_decoder.estimator.decoder", head.layers)):
        found[f"{stack}.norm.weight"] = (H,)
        for layer in range(layers):
            at = f"{stack}.layers.{layer}"
            for name, out, inner in (("self_attn.q_proj", H, H), ("self_attn.k_proj", keys, H), ("self_attn.v_proj", keys, H), ("self_attn.o_proj", H, H),
                                     ("mlp.gate_proj", F_, H), ("mlp.up_proj", F_, H), ("mlp.down_proj", H, F_)): linear(f"{at}.{name}", out, inner, False)
            for name in ("input_layernorm", "post_attention_layernorm"): found[f"{at}.{name}.weight"] = (H,)
    found |= {"base_lm.embed_tokens.weight": (config.vocabulary, H), "feat_encoder.special_token": (1, 1, 1, W), "stop_head.weight": (2, H)}
    for name, out, inner in (("feat_encoder.in_proj", W, D), ("enc_to_lm_proj", H, W), ("lm_to_dit_proj", W, H), ("res_to_dit_proj", W, H), ("stop_proj", H, H),
                             ("fsq_layer.in_proj", config.grid, H), ("fsq_layer.out_proj", H, config.grid)): linear(name, out, inner)
    for name, out, inner in (("in_proj", W, D), ("cond_proj", W, D), ("out_proj", D, W), *((f"{kind}.{part}", W, W) for kind in ("time_mlp", "delta_time_mlp") for part in ("linear_1", "linear_2"))):
        linear(f"feat_decoder.estimator.{name}", out, inner)
    return found


@pytest.fixture(scope="module")
def weights():
    draw = torch.Generator().manual_seed(0)
    return {name: (1 + 0.1 * torch.randn(shape, generator=draw)) if "norm" in name else torch.randn(shape, generator=draw) / shape[-1] ** 0.5
            for name, shape in original_shapes(TINY).items()}


@pytest.fixture(scope="module")
def model(weights):
    return load_original(TINY, weights)


# ---- the shape

def test_the_published_shape_has_643_million_weights_in_blocks_and_embeddings():
    model = empty(PAPER)
    parts = [model.backbone.blocks, model.text, model.residual.blocks, model.aggregator.net.blocks, model.head.net.net.blocks]
    assert [round(count_parameters(part) / 1e6, 1) for part in parts] == [358.7, 75.2, 89.7, 59.8, 59.8]
    assert round(sum(map(count_parameters, parts)) / 1e6) == 643


@pytest.mark.parametrize("config", [PAPER, TINY], ids=["paper", "tiny"])
def test_every_weight_more_or_less_has_a_reason(config):
    theirs = sum(torch.Size(shape).numel() for shape in original_shapes(config).values())
    assert count_parameters(empty(config)) == theirs + sum(extra_parameters(config).values())
    assert config is TINY or theirs == 652_287_296


def test_settings_name_the_published_defaults():
    settings = original_settings(PAPER)
    assert (settings["scalar_quantization_latent_dim"], settings["scalar_quantization_scale"], settings["residual_lm_num_layers"]) == (256, 9, 6)
    assert settings["lm_config"]["rope_scaling"]["short_factor"] == [1.0] * 32 and settings["encoder_config"]["num_layers"] == 4
    assert original_settings(TINY)["lm_config"]["rope_scaling"]["short_factor"] == list(TINY.backbone.rope_factors)
    json.dumps(original_settings(TINY))


# ---- the map

def test_joined_projections_keep_their_order():
    state = {"n.norm.weight": torch.zeros(1), "n.layers.0.input_layernorm.weight": torch.zeros(1), "n.layers.0.post_attention_layernorm.weight": torch.ones(1)}
    for value, name in enumerate(("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")): state[f"n.layers.0.{name}_proj.weight"] = torch.full((1, 1), float(value))
    found = {name: weight.flatten().tolist() for name, weight in our_stack(state, "n", "o")}
    assert found["o.blocks.0.attention.qkv.weight"] == [0, 1, 2] and found["o.blocks.0.attention.out.weight"] == [3]
    assert found["o.blocks.0.feed_forward.gate_up.weight"] == [4, 5] and found["o.blocks.0.feed_forward.down.weight"] == [6]
    assert found["o.blocks.0.attention_norm.weight"] == [0] and found["o.blocks.0.feed_forward_norm.weight"] == [1] and len(found) == 7


def test_every_weight_of_the_original_is_read(weights):
    read = set()
    class Watched(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)
    our_weights(Watched(weights))
    assert read == set(weights)


def test_a_missing_or_misshapen_weight_is_noticed(weights):
    with pytest.raises(KeyError): our_weights({name: weight for name, weight in weights.items() if name != "stop_proj.bias"})
    with pytest.raises(RuntimeError): load_original(replace(TINY, grid=17), weights)


def test_folded_parts_compute_what_the_original_says(weights, model):
    mlp = lambda kind, x: F.linear(F.silu(F.linear(x, weights[f"feat_decoder.estimator.{kind}.linear_1.weight"], weights[f"feat_decoder.estimator.{kind}.linear_1.bias"])),
                                   weights[f"feat_decoder.estimator.{kind}.linear_2.weight"], weights[f"feat_decoder.estimator.{kind}.linear_2.bias"])
    def embedded(t):  # sines before cosines, the slowest frequency is 1 / 10000
        angle = 1000 * t[:, None] * 10000 ** (-torch.arange(32) / 31)
        return torch.cat([angle.sin(), angle.cos()], -1)
    t, state = torch.tensor([0.3, 0.9]), torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model.head.net.modulations(t, torch.zeros(2, 64))[0][:, 0], mlp("time_mlp", embedded(t)) + mlp("delta_time_mlp", embedded(0 * t)), atol=1e-5)
    two = [F.linear(part, weights[f"{name}.weight"], weights[f"{name}.bias"]) for name, part in zip(("lm_to_dit_proj", "res_to_dit_proj"), state.chunk(2, -1))]
    assert torch.allclose(model.head.net.cond(state), sum(two), atol=1e-5)
    pair = F.linear(F.silu(F.linear(state[:, :64], weights["stop_proj.weight"], weights["stop_proj.bias"])), weights["stop_head.weight"])
    assert torch.allclose(torch.sigmoid(model.stop_logit(state)), pair.softmax(-1)[:, 1], atol=1e-6)
    assert model.special.weight[Slot.TURN].equal(weights["base_lm.embed_tokens.weight"][101]) and not model.head.net.null.any()


# ---- what the parts needed

def test_rotary_factors_stretch_wavelengths_and_are_off_by_default():
    factors = (1.0, 2.0, 4.0, 8.0)
    for one, other in zip(rope_table(torch.arange(5), 8, 10000.0, factors), rope_table(torch.arange(5), 8)):
        assert one[:, 0].equal(other[:, 0]) and not one[1:, 1:].equal(other[1:, 1:])
        assert torch.allclose(one[4, 1], other[2, 1]) and torch.allclose(one[4, 2], other[1, 2])
    stretched, torch_x = replace(TINY.backbone, layers=1), torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    plain = Transformer(replace(stretched, rope_factors=()))
    other = Transformer(stretched)
    other.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(torch_x), other(torch_x)), "the transformer uses them"


def test_states_that_nobody_reads_are_not_computed_to_the_end():
    net, x = Transformer(TINY.backbone), torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    net.blocks[-1].feed_forward.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    assert torch.allclose(net(x, keep=2), net(x)[:, -2:], atol=1e-6) and seen == [2, 6]
    cache = KVCache(TINY.backbone, batch=2, capacity=8)
    assert net(x, cache=cache, keep=1).shape == (2, 1, 64) and cache.length == 6


def test_time_features_reach_another_base():
    t = torch.tensor([0.5])
    assert time_features(t, 64).equal(time_features(t, 64, 10000.0))
    assert torch.allclose(time_features(t, 64, 10000 ** (32 / 31))[0, 31], torch.tensor(0.05).cos())


def test_published_sampling_leaves_the_first_step_out(model):
    asked, net = [], model.head.net
    state, past = torch.ones(1, 128), torch.zeros(1, 2, 64)
    handle = net.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
    drawn = sample_patches(model.head, state, past, generator=torch.Generator().manual_seed(0), **PUBLISHED)
    handle.remove()
    assert asked == [2] * 9 and drawn.shape == (1, 2, 64)
    assert not torch.allclose(drawn, sample_patches(model.head, state, past, generator=torch.Generator().manual_seed(0)))


# ---- packing

def test_a_packed_layer_answers_the_same_for_any_number_of_rows():
    layer = nn.Linear(48, 80)
    for rows in (1, 10):
        fast = PackedLinear(layer, rows)
        with torch.inference_mode():
            for shape in ((48,), (1, 48), (7, 48), (2, 3, 48)): assert torch.allclose(fast(torch.ones(shape)), layer(torch.ones(shape)), atol=1e-5)
    with torch.inference_mode(): assert torch.allclose(PackedLinear(nn.Linear(8, 4, bias=False), 1)(torch.zeros(1, 8)), torch.zeros(1, 4))


def test_a_packed_model_answers_the_same(weights, model):
    given, fast = random_inputs(TINY, 8, 5, 3), packed(load_original(TINY, weights))
    assert not any(isinstance(module, nn.Linear) for module in fast.modules())
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == sum(isinstance(module, PackedLinear) for module in fast.modules())
    plain = our_parts(model, given) | {"whole model": our_patches(model, given)}
    found = differences(our_parts(fast, given) | {"whole model": our_patches(fast, given)}, plain)
    assert len(found) == 10 and all(part["difference"] < 2e-5 and part["largest"] > 1e-3 for part in found.values()), found
    assert plain["whole model"].shape == (3, 2, 64)


# ---- the race

def test_the_race_turns_and_forgets_the_first_round():
    asked = []
    def runner(name, seconds):
        def run(work):
            asked.append((name, work))
            return seconds, seconds / 2
        return run
    works = ["prefill", "decode step", "TSLM", "LocDiT"]
    runs = race({"original": runner("original", 4.0), "ours": runner("ours", 1.0), "ours, plain": runner("ours, plain", 2.0)}, works, 3)
    assert len(runs) == 3 and len(asked) == 4 * 4 * 3 and {asked[0][0], asked[12][0], asked[24][0]} == {"original", "ours", "ours, plain"}
    found = summary(runs, {"a": {"difference": 1e-6, "largest": 1.0}, "b": {"difference": 3e-6, "largest": 1.0}})
    assert found["decode_speedup"] == found["prefill_speedup"] == 4 and found["decode_speedup_without_packing"] == 2 and found["max_difference"] == 3e-6
    assert found["share_of_a_decode_step"]["ours"] == {"TSLM": 0.5, "LocDiT": 0.5} and found["median_s"]["processor"]["TSLM"]["ours"] == 0.5
    assert ratios(runs, "TSLM", "ours, plain", 1) == [2.0] * 3
    json.dumps(found)


def test_without_a_network_the_error_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path))
    monkeypatch.setattr(original.venv, "create", lambda folder, clear: None)
    run = lambda words, **_: SimpleNamespace(returncode="pip" in words, stdout=str(tmp_path), stderr="Trying.\nERROR: No matching distribution found\n")
    monkeypatch.setattr(original.subprocess, "run", run)
    with pytest.raises(CourseError, match="could not be installed: ERROR: No matching distribution found"): original_python()


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capsys):
    runs = [{work: {"original": (4.0, 4.0), "ours": (2.0, 2.0), "ours, plain": (4.0, 4.0)} for work in ("prefill", "decode step", "LocDiT")}]
    def fake(config, rounds):
        assert config is TINY and rounds == 2
        return {"threads": 1, **summary(runs, {"LocEnc": {"difference": 2e-6, "largest": 1.5}})}
    monkeypatch.setattr(original, "against_original", fake)
    assert cli.main(["bench", "original", "--tiny", "--repeats", "2", "--json", str(tmp_path / "o.json")]) == 0
    assert "decode speedup     2.00 [2.00, 2.00], without packed weights 1.00" in capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())
    assert {"decode_speedup", "prefill_speedup", "max_difference", "environment", "runs_s", "parts"} <= set(found) and found["bench"] == "original"


def test_equal_to_the_original():
    if not (cache_dir() / "original" / "ready").exists(): pytest.skip("`ardm-course bench original --tiny` installs the original")
    threads = torch.get_num_threads()
    found = against_original(TINY, rounds=1, threads=1)
    assert torch.get_num_threads() == threads and len(found["parts"]) == 10
    assert found["max_difference"] < 2e-5 and found["max_difference_without_packing"] < 2e-5, found["parts"]
    assert found["parameters"]["ours"] - found["parameters"]["original"] == sum(extra_parameters(TINY).values())
    assert found["decode_speedup"] > 0


def test_a_worker_that_dies_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(original, "original_python", lambda: __import__("sys").executable)
    monkeypatch.setattr(original, "original_settings", lambda config: {"no": "model"})
    with pytest.raises(CourseError, match="The original stopped: "):
        with original.original_process(TINY, random_inputs(TINY, 2, 1, 1), tmp_path, 1): pass
