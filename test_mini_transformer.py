"""Checks for mini_transformer, in the order of its sections. A wrong Transformer, too,
trains, and its loss falls: below each name stands a bug that would show here.

    pytest                                     # all of them, in seconds
    MODULE=my_transformer pytest -x            # your own file, half typed or whole
"""
import copy
import dataclasses
import importlib
import math
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

TEXT = "the cat sat on the mat and the dog sat on the log. " * 12
TABLES = dict(positions="POSITIONS", attention="ATTENTIONS", norm="NORMS",
              ffn="ACTIVATIONS")

sys.path.insert(0, os.getcwd())
lab = importlib.import_module(os.environ.get("MODULE", "mini_transformer"))

def not_written_yet(name):
    """Python asks this function for what the lab does not have."""
    if name.startswith("__"):
        raise AttributeError(name)
    pytest.fail(f"next: {name} is not written yet", pytrace=False)

lab.__getattr__ = not_written_yet

def pytest_generate_tests(metafunc):
    """A test with the argument ffn runs for each entry of ACTIVATIONS; and so on."""
    for argument in set(TABLES) & set(metafunc.fixturenames):
        table = vars(lab).get(TABLES[argument], ["not written yet"])
        metafunc.parametrize(argument, list(table))

@pytest.fixture(autouse=True)
def an_empty_folder_and_a_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def tiny(**changes):
    """A small model. All constants stand here: edit the lab's defaults as you like."""
    sizes = dict(vocab_size=11, block_size=8, n_layers=2, n_heads=4, n_kv_heads=2,
                 d_model=32, d_ff=24, dropout=0.0, bias=False, causal=True)
    parts = dict(positions="rope", attention="explicit", ffn="swiglu", qk_norm=True,
                 norm="layernorm", pre_norm=True, tie_weights=True)
    return lab.TransformerConfig(**{**sizes, **parts, **changes})

def loud(module):
    """Weights far larger than at the start: no wrong term hides in a tolerance."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.eval()

def loud_model(**changes):
    return loud(lab.MiniTransformer(tiny(**changes)))

# ==== 1. Constants
def test_every_constant_is_a_plain_value_of_its_type():
    """Bug: None for 'off', which no command line can give; 3 where 3.0 is meant."""
    for config in lab.TransformerConfig(), lab.TrainConfig():
        for f in dataclasses.fields(config):
            assert type(getattr(config, f.name)) is f.type, f.name

# ==== 2. Data
def test_decoding_undoes_encoding_and_an_unknown_character_is_named():
    """Bug: ids that depend on the run; a KeyError for a character of a prompt."""
    text = "hello wörld\n" + "".join(map(chr, range(1000, 1300)))
    ds = lab.CharDataset(text, 4)
    assert ds.decode(ds.encode("röd\n")) == "röd\n" and ds.vocab_size == 310
    assert ds.itos == sorted(set(text)) and ds.decode(ds.data.tolist()) == text
    assert ds.encode(ds.itos) == [ds.stoi[c] for c in ds.itos] == list(range(310))
    with pytest.raises(ValueError, match="'x'.*'z'"):
        ds.encode("zoxe")

def test_targets_are_the_inputs_one_character_later():
    """Bug: targets that are not shifted: the loss falls far below ln V at once."""
    ds = lab.CharDataset("abcdefghij", 4)
    for i in range(6):
        x, y = ds[i]
        assert len(ds) == 6 and x.dtype == y.dtype == torch.int64
        assert x.tolist() == [i, i + 1, i + 2, i + 3]
        assert y.tolist() == [i + 1, i + 2, i + 3, i + 4]

# ==== 3. Positions
def test_angles_are_position_times_frequency():
    """Bug: frequencies that are off by a factor, or that fall too slowly."""
    expected = [[t / 10000 ** (d / 4) for d in range(4)] for t in range(300)]
    close(lab.angles(300, 4), torch.tensor(expected))

def test_rope_turns_a_pair_by_the_angle_of_its_position():
    """Bug: a wrong sign: a stretch, or a turn the other way; neighbours paired."""
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angle)
    close(lab.rotate(x, angle), torch.cat([z.real, z.imag], dim=-1))

def test_after_rope_a_score_depends_on_the_distance_only():
    """Bug: positions that enter as such; distances that all look alike."""
    angle, (q, k) = lab.angles(20, 4), torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 20, 8)
    score = (lab.rotate(q, angle) @ lab.rotate(k, angle).mT)[0, 0]
    close(score[1:, 1:], score[:-1, :-1])              # of (i, j) and (i - 1, j - 1)
    assert score[5].std() > 0.01

# ==== 4. Attention
def normed(x, kind):
    """Ba 2016, or, without the mean, Zhang 2019."""
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)

def norms(layer, x, c):
    x = normed(x, c.norm) * layer.weight
    return x + layer.bias if c.norm == "layernorm" else x

@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_equal_their_formulas(kind):
    """Bug: the mean is not removed; the epsilon is another, or outside the root."""
    c, x = tiny(norm=kind), torch.randn(4, 16) * 0.003
    layer = loud(lab.make_norm(c, 16))
    close(layer(x), norms(layer, x, c))

@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_an_average_of_values_weighted_by_similarity(attention, is_causal):
    """Bug: no 1/sqrt(D); softmax over the wrong axis; a mask that is off by one."""
    q, k, v = torch.randn(3, 2, 6, 8).split(1)
    out = lab.ATTENTIONS[attention](q, k, v, is_causal=is_causal)
    for h in range(2):
        for t in range(6):
            seen = range(t + 1) if is_causal else range(6)
            weights = [math.exp(q[0, h, t] @ k[0, h, s] / 8**0.5) for s in seen]
            mean = sum(weights[s] * v[0, h, s] for s in seen) / sum(weights)
            close(out[0, h, t], mean)

def turned(x):
    """Rope on (B, T, heads, D): numbers d and d + D/2 are a complex one, turned."""
    T, half = x.size(1), x.size(-1) // 2
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle[:, None])
    return torch.cat([z.real, z.imag], dim=-1)

def attends(attn, x, c):
    """Head by head; heads of one group share a key and a value."""
    (B, T, C), H, G = x.shape, c.n_heads, c.n_kv_heads or c.n_heads
    heads = attn.qkv_proj(x).view(B, T, H + 2 * G, C // H)
    q, k, v = heads.split([H, G, G], dim=2)
    if c.qk_norm:
        q, k = norms(attn.q_norm, q, c), norms(attn.k_norm, k, c)
    if c.positions == "rope":
        q, k = turned(q), turned(k)
    out = []
    for h in range(H):
        group = h // (H // G)                          # neighbours share
        scores = q[:, :, h] @ k[:, :, group].mT / math.sqrt(C // H)
        if c.causal:
            scores = scores + torch.full((T, T), -math.inf).triu(1)
        out.append(scores.softmax(dim=-1) @ v[:, :, group])
    return attn.out_proj(torch.cat(out, dim=-1))

@pytest.mark.parametrize("changes", [
    {}, {"attention": "fused"}, {"qk_norm": False}, {"causal": False}, {"bias": True},
    {"positions": "none"}, {"n_kv_heads": 0}, {"n_kv_heads": 1}, {"norm": "rmsnorm"},
    {"causal": False, "attention": "fused"}, {"n_heads": 8, "n_kv_heads": 2}])
def test_the_attention_layer_equals_attention_by_hand(changes):
    """Bug: rope on the values; groups in the wrong order; heads mixed at the end."""
    c, x = tiny(**changes), torch.randn(2, 8, 32)
    attn = loud(lab.CausalSelfAttention(c))
    close(attn(x), attends(attn, x, c), 1e-4)
    close(attn(x[:, :5]), attends(attn, x[:, :5], c), 1e-4)
    attn.qkv_proj.weight.data *= 0.01                  # the epsilon of qk_norm shows
    close(attn(x), attends(attn, x, c), 1e-4)

@pytest.mark.parametrize("changes", [
    {"n_heads": 3}, {"n_heads": 32}, {"n_kv_heads": 3}, {"n_kv_heads": 8}])
def test_heads_that_do_not_fit_are_refused(changes):
    """Bug: an odd head, or a group of 1 1/3 heads, shows up later as a puzzle."""
    with pytest.raises(ValueError, match=r"\b%d\b" % (*changes.values(),)):
        lab.CausalSelfAttention(tiny(**changes))

# ==== 5. Feed-forward
BENT = {"relu": lambda x: x * (x > 0), "swiglu": lambda x: x / (1 + torch.exp(-x)),
        "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * torch.sigmoid(1.5957691 * (x + 0.044715 * x**3))}

def feeds(layer, x, c):
    if c.ffn == "swiglu":
        return layer.down_proj(BENT["swiglu"](layer.gate_proj(x)) * layer.up_proj(x))
    return layer.down_proj(BENT[c.ffn](layer.up_proj(x)))

@pytest.mark.parametrize("kind", BENT)
def test_feed_forward_equals_its_formula(kind):
    """Bug: an activation missing, on the wrong path, or a near relative of it."""
    c, x = tiny(ffn=kind, bias=True), torch.randn(2, 5, 32)
    layer = loud(lab.FeedForward(c))
    close(layer(x), feeds(layer, x, c), 1e-4)
    assert layer.up_proj.out_features == (16 if kind == "swiglu" else 24)

# ==== 6. Block
def test_a_part_that_you_add_to_a_table_is_there(ffn, norm):
    """Bug: a choice that is listed, but built nowhere."""
    block = lab.TransformerBlock(tiny(ffn=ffn, norm=norm))
    assert block(torch.randn(2, 5, 32)).shape == (2, 5, 32)

@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_block_equals_pytorchs(attention, pre_norm):
    """Bug: a residual is missing, a norm is in the wrong place: eight bugs in one."""
    ours = loud(lab.TransformerBlock(tiny(
        n_kv_heads=0, bias=True, qk_norm=False, positions="none", ffn="gelu",
        attention=attention, pre_norm=pre_norm)))
    theirs = nn.TransformerEncoderLayer(32, 4, 24, 0.0, "gelu", batch_first=True,
                                        norm_first=pre_norm)
    pairs = [(ours.ffn.up_proj, theirs.linear1), (ours.ffn.down_proj, theirs.linear2),
             (ours.ln_attn, theirs.norm1), (ours.ln_ffn, theirs.norm2),
             (ours.attn.out_proj, theirs.self_attn.out_proj)]
    for source, target in pairs:
        target.load_state_dict(source.state_dict())
    theirs.self_attn.in_proj_weight.data = ours.attn.qkv_proj.weight.data.clone()
    theirs.self_attn.in_proj_bias.data = ours.attn.qkv_proj.bias.data.clone()
    x, mask = torch.randn(3, 8, 32), torch.full((8, 8), -math.inf).triu(1)
    close(ours(x), theirs(x, mask), 1e-4)

# ==== 7. Model
@pytest.mark.parametrize("changes, count", [
    ({}, 797056), ({"tie_weights": False}, 805376), ({"n_kv_heads": 1}, 698752),
    ({"positions": "learned"}, 813440), ({"ffn": "relu"}, 797568),
    ({"pre_norm": False}, 796800), ({"norm": "rmsnorm"}, 795648),
    ({"bias": True, "ffn": "gelu"}, 802176), ({"bias": True}, 802344)])
def test_the_number_of_parameters_is_known(changes, count):
    """Bug: a matrix too many, tied weights that are not, a table that should learn."""
    sizes = dict(vocab_size=65, block_size=128, n_layers=4, d_model=128, d_ff=512)
    model = lab.MiniTransformer(tiny(**{**sizes, "n_kv_heads": 0, **changes}))
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.lm_head.weight is model.token_emb.weight) == model.config.tie_weights

def test_an_untrained_model_guesses_blindly():
    """Bug: a start so large that it is sure of what it cannot know; a summed loss."""
    model = lab.MiniTransformer(tiny(vocab_size=300, block_size=40))
    ids = torch.randint(300, (16, 41))
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    assert logits.shape == (16, 40, 300) and model(ids[:, :8])[1] is None
    close(loss, -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)

def test_what_adds_to_the_stream_starts_smaller_than_the_rest():
    """Bug: the scaled start (Radford 2019) is missing, or on the wrong matrices."""
    c = tiny(vocab_size=200, block_size=64, d_model=128, d_ff=384, n_layers=8,
             bias=True, positions="learned", tie_weights=False)
    for name, p in lab.MiniTransformer(c).named_parameters():
        if p.dim() == 2:
            adds = name.endswith(("out_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * 8) if adds else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        elif name.endswith("proj.bias"):
            assert not p.any(), name

def model_by_hand(model, ids, c):
    x = model.token_emb.weight[ids]
    if c.positions == "learned":
        x = x + model.position_emb[: ids.size(1)]
    for block in model.blocks:
        if c.pre_norm:
            x = x + attends(block.attn, norms(block.ln_attn, x, c), c)
            x = x + feeds(block.ffn, norms(block.ln_ffn, x, c), c)
        else:
            x = norms(block.ln_attn, x + attends(block.attn, x, c), c)
            x = norms(block.ln_ffn, x + feeds(block.ffn, x, c), c)
    return (norms(model.ln_final, x, c) if c.pre_norm else x) @ model.lm_head.weight.T

@pytest.mark.parametrize("style", [
    {},                                     # ours; below GPT-2, Llama, post-norm
    dict(positions="learned", ffn="gelu_tanh", bias=True, qk_norm=False, n_kv_heads=0),
    dict(norm="rmsnorm", qk_norm=False, tie_weights=False),
    dict(pre_norm=False, positions="none", ffn="relu", attention="fused")])
def test_a_model_gives_the_numbers_and_gradients_of_its_formulas(style):
    """Bug: nearly GPT-2, or nearly Llama; a part that is used, but does not learn."""
    model, ids = loud_model(**style), torch.randint(11, (3, 8))
    for T in 8, 5:
        both = model(ids[:, :T])[0], model_by_hand(model, ids[:, :T], tiny(**style))
        close(*both, 1e-4)
        wanted = list(model.parameters())
        close(*[torch.autograd.grad(y.square().mean(), wanted) for y in both], 1e-3)

@pytest.mark.parametrize("causal", [True, False])
def test_a_prediction_depends_on_every_earlier_character_and_no_other(
        positions, attention, causal):
    """Bug: a mask that leaks; rows that mix. Without a mask this check must fail."""
    model = loud_model(positions=positions, attention=attention, causal=causal)
    ids = torch.randint(11, (2, 8))
    before = model(ids)[0]
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 11
        moved = (model(changed)[0] - before).abs().amax(-1)    # (2, 8)
        assert (moved[0, t:] > 1e-4).all() and not moved[1].any()
        assert (moved[0, :t] > 1e-4).all() if not causal else not moved[0, :t].any()

def test_the_order_is_seen_and_there_are_no_positions_beyond_the_block(positions):
    """Bug: a bag of characters (right in one block without positions); no refusal."""
    model = loud_model(positions=positions, n_layers=1)
    a, b = model(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[0][:, -1]
    assert torch.allclose(a, b, atol=1e-5) == (positions == "none")
    with pytest.raises(ValueError, match="9.*8|8.*9"):
        model(torch.zeros(1, 9).long())

@pytest.mark.parametrize("option", TABLES)
def test_an_unknown_name_lists_the_choices(option):
    """Bug: a typing error that builds some other model, or helps with a KeyError."""
    with pytest.raises(ValueError) as error:
        lab.MiniTransformer(tiny(**{option: "swigl"}))
    for name in "swigl", *getattr(lab, TABLES[option]):
        assert name in str(error.value)

@pytest.mark.parametrize("length", [1, 5, 8, 19])
def test_writing_looks_at_the_last_block_of_characters(positions, length):
    """Bug: the wrong end of the prompt; a window that stops sliding; rows that mix."""
    model, ids = loud_model(positions=positions), torch.randint(11, (2, length))
    written = model.generate(ids, 12, temperature=0).clone()  # of inference_mode, too
    assert written.shape == (2, length + 12) and written[:, :length].equal(ids)
    for t in range(length, length + 12):
        logits = model(written[:, max(0, t - 8) : t])[0][:, -1]
        assert logits.argmax(-1).equal(written[:, t])

@pytest.mark.parametrize("training", [True, False])
def test_writing_uses_no_dropout_and_leaves_the_mode_as_it_was(training):
    """Bug: dropout while it writes; a training run that loses it after a sample."""
    model, ids = loud_model(dropout=0.9).train(training), torch.randint(11, (2, 3))
    written = [model.generate(ids, 12, temperature=0) for _ in range(2)]
    assert written[0].equal(written[1]) and model.training == training

@pytest.mark.parametrize("pre_norm", [True, False])
def test_dropout_zeroes_what_joins_the_stream_in_training_only(pre_norm):
    """Bug: dropout in evaluation, on the stream itself, or in some places only."""
    c = tiny(dropout=1 - 1e-7, pre_norm=pre_norm, positions="learned")   # drops it all
    model, ids = loud(lab.MiniTransformer(c)), torch.randint(11, (2, 8))
    close(model(ids)[0], model_by_hand(model, ids, c), 1e-4)
    block, x = model.blocks[0], torch.randn(2, 8, 32)
    stream = x if pre_norm else norms(block.ln_ffn, norms(block.ln_attn, x, c), c)
    close(block.train()(x), stream)
    model.blocks = nn.ModuleList()                     # the embeddings are left
    logits = model.train()(ids)[0]
    close(logits, logits[:1, :1].expand_as(logits))

def test_a_model_moves_as_a_whole(positions, attention):
    """Bug: a mask or a table of angles that stays on the CPU."""
    model = loud_model(positions=positions, attention=attention)
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    assert model.to("meta")(ids)[0].device.type == "meta"

P = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
@pytest.mark.parametrize("settings, expected", [
    ({}, P), ({"top_k": 99}, P), ({"top_p": 1.0}, P), ({"temperature": 0.5}, P**2),
    ({"temperature": 2}, P**0.5), ({"temperature": 0}, [0, 1, 0, 0, 0]),
    ({"top_k": 1}, [0, 1, 0, 0, 0]), ({"top_k": 3}, [0, 0.4, 0, 0.3, 0.15]),
    ({"top_p": 0.65}, [0, 0.4, 0, 0.3, 0]), ({"top_p": 0.75}, [0, 0.4, 0, 0.3, 0.15]),
    ({"top_p": 0.01}, [0, 1, 0, 0, 0]), ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
    ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),     # 0.4 is 0.57 of the two
    ({"top_p": 0.57, "temperature": 2}, [0, 0.4**0.5, 0, 0.3**0.5, 0.15**0.5])])
def test_characters_are_drawn_with_the_probabilities_asked_for(settings, expected):
    """Bug: temperature multiplied; one character too many or too few may be drawn."""
    both = torch.stack([P.log(), P.flip(0).log() - 7])  # rows may differ
    ids = lab.sample(both.repeat_interleave(20000, dim=0), **settings)
    expected = torch.as_tensor(expected) / sum(expected)
    for drawn, target in (ids[:20000], expected), (ids[20000:], expected.flip(0)):
        fraction = drawn.flatten().bincount(minlength=5) / 20000
        assert ((fraction > 0) == (target > 0)).all()
        close(fraction, target, 0.02)

def test_the_nucleus_stops_where_its_probability_is_reached():
    """Bug: > where >= is meant."""
    assert len(lab.sample(torch.zeros(999, 4), top_p=0.5).unique()) == 2

# ==== 8. Training
@pytest.mark.parametrize("warmup, table", [
    (4, {0: 0.5, 1: 1, 3: 2, 4: 2, 6: 1.707107, 8: 1, 12: 0}),
    (0, {0: 2, 6: 1, 12: 0}), (12, {0: 1 / 6, 5: 1, 11: 2})])
def test_the_rate_rises_in_a_line_and_falls_in_a_cosine(warmup, table):
    """Bug: a first step of 0; a division by 0; a cosine that ends elsewhere."""
    run = lab.TrainConfig(learning_rate=2.0, warmup_steps=warmup, max_steps=12)
    rates = [lab.schedule(step, run) for step in table]
    close(rates, [float(rate) for rate in table.values()])

def test_the_optimizer_is_adamw_and_decays_matrices_only():
    """Bug: norms and biases that decay to 0; Adam with the decay in the gradient."""
    run = lab.TrainConfig(learning_rate=0.1, weight_decay=0.5)
    model = loud_model(bias=True, positions="learned")
    optimizer, twin = lab.make_optimizer(model, run), copy.deepcopy(model)
    groups = [{"params": [p], "weight_decay": 0.5 if p.dim() == 2 else 0.0}
              for p in twin.parameters()]
    adamw = torch.optim.AdamW(groups, 0.1, betas=(0.9, 0.99))
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    close(list(model.parameters()), list(twin.parameters()))

def test_evaluation_is_the_mean_loss_of_whole_windows_without_dropout():
    """Bug: batches of unequal size averaged alike; another mode afterwards."""
    model, data = loud_model(dropout=0.5), torch.randint(11, (8 * 19 + 5,))
    losses = [model(data[None, i : i + 8], data[None, i + 1 : i + 9])[1].item()
              for i in range(0, 8 * 19, 8)]
    for training in True, False:
        value = lab.evaluate(model.train(training), data)
        assert value == pytest.approx(sum(losses) / 19, rel=1e-4)
        assert model.training == training

def train(config=None, text=TEXT, **settings):
    """A run of four steps on 612 characters, 550 of them to train on."""
    Path("text.txt").write_text(text)
    plan = dict(text_path="text.txt", max_steps=4, batch_size=4, eval_interval=2,
                seed=1, learning_rate=0.01, warmup_steps=0, weight_decay=0.1,
                grad_clip=1.0, device="cpu", sample_chars=5, temperature=0.8)
    return lab.train(config or tiny(), **{**plan, **settings})

def weights(path="checkpoint.pt"):
    """The model's weights in a checkpoint, whatever else is in it."""
    for part in torch.load(path, weights_only=True).values():
        if isinstance(part, dict) and "token_emb.weight" in part:
            return dict(part)

@pytest.fixture
def batches(monkeypatch):
    """The (inputs, targets) of each training step."""
    seen, forward = [], lab.MiniTransformer.forward
    def spy(self, idx, targets=None):
        seen.extend([(idx, targets)] if self.training else [])
        return forward(self, idx, targets)
    monkeypatch.setattr(lab.MiniTransformer, "forward", spy)
    return seen

def test_training_equals_the_loop_that_everyone_writes(batches):
    """Bug: gradients that add up, a clip or a rate that is off, a step left out."""
    plan = dict(warmup_steps=2, max_steps=6, learning_rate=0.02, grad_clip=2.1)
    start, _ = train(**{**plan, "max_steps": 0})       # weights before the first step
    model, _ = train(**plan)
    optimizer = lab.make_optimizer(start.train(), lab.TrainConfig(weight_decay=0.1))
    norms = []
    for step, (x, y) in enumerate(batches[:6]):
        optimizer.zero_grad()
        start(x, y)[1].backward()
        norms.append(nn.utils.clip_grad_norm_(start.parameters(), 2.1).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * [0.5, 1, 1, 0.853553, 0.5, 0.146447][step]
        optimizer.step()
    close(dict(model.state_dict()), dict(start.state_dict()), 1e-4)
    assert min(norms) < 2.1 < max(norms)               # clipped in some steps only

def test_training_draws_all_of_the_first_nine_tenths_and_nothing_held_out(batches):
    """Bug: validation text that is trained on; windows that never come; one batch."""
    alphabet = "".join(map(chr, range(65, 185)))
    train(text=alphabet, max_steps=40, batch_size=40, eval_interval=40)
    starts = [tuple(x[:, 0].tolist()) for x, _ in batches]
    assert set(sum(starts, ())) == set(range(108 - 8))     # the last target is 107
    assert len(set(starts)) == 40

def test_a_model_can_learn_one_batch_by_heart():
    """Bug: an optimizer that goes uphill, or nowhere."""
    model, run = lab.MiniTransformer(tiny()), lab.TrainConfig(learning_rate=0.01)
    ids, optimizer = torch.arange(18).view(2, 9) % 11, lab.make_optimizer(model, run)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        optimizer.step()
    assert loss < 0.1

def test_the_seed_decides_the_weights_and_the_windows(batches):
    """Bug: figures that nobody gets again; seeds that draw the same, a step later."""
    w = [train(max_steps=0, seed=seed)[0].token_emb.weight for seed in (1, 1, 2)]
    assert w[0].equal(w[1]) and not w[0].equal(w[2])
    for seed in 1, 1, 2:
        train(seed=seed)
    starts = [x.tolist() for x, _ in batches]
    assert starts[:4] == starts[4:8] and not any(x in starts[:4] for x in starts[8:])

@pytest.mark.parametrize("name, call", [("schedule", 5), ("evaluate", 1), ("write", 2)])
def test_a_run_goes_on_after_ctrl_c_as_if_there_had_been_none(
        name, call, monkeypatch, capsys):
    """Bug: Ctrl-C loses the run; averages, rate, model or constants are forgotten."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # off in background jobs
    config, plan = tiny(dropout=0.2), dict(seed=5, max_steps=6, learning_rate=1.0)
    whole, _ = train(config, checkpoint_path="whole.pt", **plan)
    work, calls = getattr(lab, name), []
    def interrupted(*args, **named):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return work(*args, **named)
    monkeypatch.setattr(lab, name, interrupted)
    train(config, **plan, sample_chars=40)
    assert len(capsys.readouterr().out.splitlines()[-1]) == 41       # it still writes
    monkeypatch.setattr(lab, name, work)
    model, _ = lab.main(["--resume", "--device=cpu"])
    close(dict(model.state_dict()), dict(whole.state_dict()))
    with pytest.raises(ValueError):                    # nothing is left to do
        lab.train(resume=True, text_path="text.txt")
    with pytest.raises(ValueError):                    # another text
        train(resume=True, text=TEXT[::-1], max_steps=9)

def test_the_best_model_is_saved_and_a_worse_run_spares_it(monkeypatch):
    """Bug: the last weights though earlier ones were better; yesterday's lost."""
    scores, seen = [3.0, 1.0, 2.0, 1.5, 1.2, 0.9, 4.0], []
    def evaluate(model, data):
        seen.append({name: p.clone() for name, p in model.state_dict().items()})
        assert data.equal(lab.CharDataset(TEXT, 8).data[-62:])  # the held-out tenth
        return scores[len(seen) - 1]
    monkeypatch.setattr(lab, "evaluate", evaluate)
    for n_layers, steps, best in (2, 6, 1), (2, 4, 1), (2, 2, 5), (1, 2, 6):
        train(tiny(n_layers=n_layers), max_steps=steps)    # the last: another model
        close(weights(), seen[best], 0)

# ==== The command line, files, the network
def test_a_run_that_fails_spares_the_checkpoint(monkeypatch):
    """Bug: a full disk destroys the good model; NaN is saved as the best loss."""
    train(eval_interval=1, temperature=0.0)
    save, paths = torch.save, []
    def full_disk(checkpoint, path):                   # full at two of the files
        paths.append(path)
        if len(paths) in (1, 3):
            Path(getattr(path, "name", path)).write_bytes(b"half")
            raise OSError("no space left on device")
        save(checkpoint, path)
    monkeypatch.setattr(torch, "save", full_disk)
    for _ in range(2):
        with pytest.raises(OSError):                   # the second run finds .last
            lab.train(resume=True, max_steps=6)
    before = weights()
    with pytest.raises((RuntimeError, ValueError)):    # it diverges
        lab.train(resume=True, max_steps=9, weight_decay=1e40)
    close(weights(), before, 0)

@pytest.mark.parametrize("body", [b"a" * 1_115_394, b"<html>Sign in</html>", None])
def test_the_text_is_downloaded_and_an_error_page_is_never_kept(
        body, monkeypatch, capsys):
    """Bug: an error page as the corpus for ever; no network, no run."""
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)
    server = HTTPServer(("127.0.0.1", 0), Page)
    port = server.server_port if body else 9           # nobody listens at 9
    monkeypatch.setattr(lab, "TEXT_URL", f"http://127.0.0.1:{port}/")
    Thread(target=server.handle_request, daemon=True).start()  # one request only
    text, good = lab.load_text("input.txt"), body == b"a" * 1_115_394
    server.server_close()
    assert (text == "a" * 1_115_394) == good == Path("input.txt").exists()
    assert len(text) > 99_999 and ("No download" in capsys.readouterr().out) != good
    assert not good or lab.load_text("input.txt") == text    # the server is gone

def test_your_own_text_is_utf8_and_never_replaced():
    """Bug: a typing error that trains on Shakespeare; the encoding of the computer."""
    with pytest.raises(FileNotFoundError):
        lab.load_text("mine.txt")
    for path in "mine.txt", "input.txt":
        Path(path).write_bytes("é日".encode())
        assert lab.load_text(path) == "é日"
    with pytest.raises(ValueError, match=r"\b80\b"):     # a tenth: no window and target
        train(text="ab" * 40)
    train(text="ab" * 45)

def test_help_lists_every_constant_with_its_default(capsys):
    """Bug: a constant that can be set in the file only."""
    with pytest.raises(SystemExit):
        lab.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    constants = {**vars(lab.TransformerConfig()), **vars(lab.TrainConfig())}
    for name, value in constants.items():
        assert f"--{name}" in said and f"default: {value}" in said

def test_options_reach_the_run_and_a_prompt_is_continued(capsys):
    """Bug: an option that nobody reads; a prompt for a model of another shape."""
    Path("t.txt").write_text(TEXT)
    options = "--device cpu --sample_chars 40 --checkpoint_path".split()
    small = "--text_path t.txt --n_layers 1 --block_size 8 --bias --no-qk_norm"
    model, ds = lab.main([*options, "m.pt", *small.split(), "--max_steps=2"])
    names = str(weights("m.pt").keys())
    assert "blocks.0.ffn.up_proj.bias" in names and "blocks.1" not in names
    likeliest = model.generate(torch.tensor([ds.encode("the")]), 40, temperature=0)
    Path("m.pt").rename("best.pt")
    for how in "seed=5", "seed=5", "seed=6", "temperature=0", "top_k=1", "top_p=0.01":
        lab.main([*options, "best.pt", "--prompt", "the", f"--{how}"])
    drawn, again, other, *said = capsys.readouterr().out.splitlines()[-6:]
    assert drawn == again != other and set(said) == {ds.decode(likeliest[0].tolist())}
    with pytest.raises(ValueError, match="'Z'"):
        lab.main([*options, "best.pt", "--prompt", "Z"])
    later = [lab.__file__, *options, "m.pt", "--resume", "--max_steps=3"]
    assert subprocess.check_output([sys.executable, *later])   # another process
