"""Tests for mini_transformer, in the order of its sections. A wrong Transformer also
trains, and its loss also falls. So under each test stands a bug that it would catch.

    pytest                                     # all of them, in seconds
    MODULE=my_transformer pytest -x            # your own file, finished or half typed
"""
import copy
import dataclasses
import importlib
import math
import os
import pickle
import signal
import subprocess
import sys
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.nn as nn

TEXT = "the cat sat on the mat and the dog sat on the log. " * 12
TABLES = dict(positions="POSITIONS", attention="ATTENTIONS", norm="NORMS",
              ffn="ACTIVATIONS")

sys.path.insert(0, os.getcwd())
lab = importlib.import_module(os.environ.get("MODULE", "mini_transformer"))
torch.set_num_threads(1)                               # so small, more are slower

def not_written_yet(name):
    """Python calls this when a test asks for something that the lab does not have."""
    if name.startswith("__"):
        raise AttributeError(name)
    pytest.fail(f"next: {name} is not written yet", pytrace=False)
lab.__getattr__ = not_written_yet

def pytest_generate_tests(metafunc):
    """A test with the argument ffn runs once for each entry of ACTIVATIONS, etc."""
    for argument in set(TABLES) & set(metafunc.fixturenames):
        metafunc.parametrize(argument, list(vars(lab).get(TABLES[argument], ["?"])))

@pytest.fixture(autouse=True)
def an_empty_folder_and_a_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def tiny(**changes):
    """A small model. It sets every constant, so you can edit the lab's defaults."""
    sizes = dict(vocab_size=11, block_size=8, n_layers=2, n_heads=4, n_kv_heads=2,
                 d_model=32, d_ff=24, dropout=0.0, bias=False, causal=True)
    parts = dict(positions="rope", attention="explicit", ffn="swiglu", qk_norm=True,
                 norm="layernorm", pre_norm=True, tie_weights=True)
    return lab.TransformerConfig(**{**sizes, **parts, **changes})

def loud(module):
    """Make all weights large, so that no wrong term hides within a tolerance."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.eval()

def loud_model(**changes):
    return loud(lab.MiniTransformer(tiny(**changes)))

# ==== 1. Constants
def test_every_constant_is_a_plain_value_of_its_type():
    """Bug: None means 'off', but no command line can say None; 3 instead of 3.0."""
    for config in lab.TransformerConfig(), lab.TrainConfig():
        for f in dataclasses.fields(config):
            assert type(getattr(config, f.name)) is f.type, f.name

# ==== 2. Data
def test_decoding_undoes_encoding_and_an_unknown_character_is_named():
    """Bug: ids that change from run to run; a bare KeyError for an unknown one."""
    text = "hello wörld\n" + "".join(map(chr, range(1000, 1300)))
    ds = lab.CharDataset(text, 4)
    assert ds.decode(ds.encode("röd\n")) == "röd\n" and ds.vocab_size == 310
    assert [*ds.itos] == sorted(set(text)) and ds.decode(ds.data.tolist()) == text
    assert ds.encode(ds.itos) == [ds.stoi[c] for c in ds.itos] == list(range(310))
    with pytest.raises(ValueError, match="x.*z"):
        ds.encode("zoxe")

def test_targets_are_the_inputs_one_character_later():
    """Bug: the target is the input itself, so that the loss soon falls to almost 0."""
    ds = lab.CharDataset("abcdefghij", 4)
    for i in range(6):
        x, y = ds[i]
        assert len(ds) == 6 and x.dtype == y.dtype == torch.int64
        assert [*x] == [i, i + 1, i + 2, i + 3] and [*y] == [i + 1, i + 2, i + 3, i + 4]

# ==== 3. Positions
def rotated(x):
    """RoPE for (B, T, heads, D), with numbers d and d + D/2 as one complex number."""
    T, half = x.size(1), x.size(-1) // 2
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle[:, None])
    return torch.cat([z.real, z.imag], dim=-1)

def test_rope_rotates_each_pair_by_position_times_frequency():
    """Bug: a wrong sign, so that it stretches or turns the other way; wrong pairs."""
    x, (cos, sin) = torch.randn(2, 99, 3, 8), lab.cos_and_sin(99, 4)
    close(lab.rotate(x.transpose(1, 2), cos, sin).transpose(1, 2), rotated(x))

def test_with_rope_the_position_enters_a_score_only_as_a_distance():
    """Bug: absolute positions leak into the scores; all distances look alike."""
    cos, sin = lab.cos_and_sin(20, 4)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 20, 8)
    score = (lab.rotate(q, cos, sin) @ lab.rotate(k, cos, sin).mT)[0, 0]
    close(score[1:, 1:], score[:-1, :-1])              # (i, j) against (i - 1, j - 1)
    assert score[5].std() > 0.01

def test_sinusoidal_positions_are_those_of_the_paper():
    """Bug: a wave is missing or has another length (Vaswani 2017; in any order)."""
    expected = [[f(t / 10000 ** (d / 32)) for d in range(0, 32, 2)
                 for f in (math.sin, math.cos)] for t in range(50)]
    table = lab.sinusoidal(50, 32)
    close((table / table.max()).sort(dim=1)[0], torch.tensor(expected).sort(dim=1)[0])
    assert table.max() < 0.1                           # no louder than token_emb

# ==== 4. Attention
def norms(layer, x, c):
    """LayerNorm (Ba 2016); without subtracting the mean, RMSNorm (Zhang 2019)."""
    if c.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * layer.weight
    return x + layer.bias if c.norm == "layernorm" else x

@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_an_average_of_values_weighted_by_similarity(attention, is_causal):
    """Bug: no 1/sqrt(D); softmax along the wrong axis; a mask that is off by one."""
    q, k, v = torch.randn(3, 2, 6, 8).split(1)
    out = lab.ATTENTIONS[attention](q, k, v, is_causal=is_causal)
    for h in range(2):
        for t in range(6):
            seen = range(t + 1) if is_causal else range(6)
            weights = [math.exp(q[0, h, t] @ k[0, h, s] / 8**0.5) for s in seen]
            mean = sum(weights[s] * v[0, h, s] for s in seen) / sum(weights)
            close(out[0, h, t], mean)

def attends(attn, x, c):
    """The attention layer, head by head. Heads of one group share keys and values."""
    (B, T, C), H, G = x.shape, c.n_heads, c.n_kv_heads or c.n_heads
    heads = attn.qkv_proj(x).view(B, T, H + 2 * G, C // H)
    q, k, v = heads.split([H, G, G], dim=2)
    if c.qk_norm:
        q, k = norms(attn.q_norm, q, c), norms(attn.k_norm, k, c)
    if c.positions == "rope":
        q, k = rotated(q), rotated(k)
    out = []
    for h in range(H):
        group = h // (H // G)                          # neighbouring heads share
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
    attn.qkv_proj.weight.data *= 0.01                  # shows the epsilon of qk_norm
    close(attn(x), attends(attn, x, c), 1e-4)

def test_positions_survive_a_model_in_half_precision():
    """Bug: bfloat16 rounds the angles: 1,023 radians become 1,024."""
    c, x = tiny(block_size=1024), torch.randn(1, 1024, 32)
    attn = loud(lab.CausalSelfAttention(c))
    for p in attn.parameters():
        p.data = p.bfloat16().float()                  # round the weights of both
    close(copy.deepcopy(attn).bfloat16().float()(x), attn(x), 0.05)

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
    """Bug: the activation is missing, on the wrong path, or a near relative."""
    c, x = tiny(ffn=kind, bias=True), torch.randn(2, 5, 32)
    layer = loud(lab.FeedForward(c))
    close(layer(x), feeds(layer, x, c), 1e-4)
    assert layer.up_proj.out_features == (16 if kind == "swiglu" else 24)

# ==== 6. Block
@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_block_equals_pytorchs(attention, pre_norm):
    """Bug: a residual is missing, a norm is in the wrong place, and six others."""
    ours = loud(lab.TransformerBlock(tiny(
        n_kv_heads=0, bias=True, qk_norm=False, positions="none", ffn="gelu",
        attention=attention, pre_norm=pre_norm)))
    theirs = nn.TransformerEncoderLayer(32, 4, 24, 0.0, "gelu", batch_first=True,
                                        norm_first=pre_norm)
    parts = nn.ModuleList([ours.attn.qkv_proj, ours.attn.out_proj, ours.ffn.up_proj,
                           ours.ffn.down_proj, ours.ln_attn, ours.ln_ffn])
    for source, target in zip(parts.parameters(), theirs.parameters(), strict=True):
        target.data = source.data
    x, mask = torch.randn(3, 8, 32), torch.full((8, 8), -math.inf).triu(1)
    close(ours(x), theirs(x, mask), 1e-4)

# ==== 7. Model
@pytest.mark.parametrize("changes, count", [
    ({}, 801664), ({"tie_weights": False}, 809984), ({"n_kv_heads": 1}, 703360),
    ({"positions": "learned"}, 818048), ({"positions": "sinusoidal"}, 801664),
    ({"ffn": "relu"}, 797568), ({"pre_norm": False}, 801408), ({"bias": True}, 806976),
    ({"norm": "rmsnorm"}, 800256), ({"bias": True, "ffn": "gelu"}, 802176)])
def test_the_number_of_parameters_is_known(changes, count):
    """Bug: a matrix too many; tied weights that are two; a table that never learns."""
    sizes = dict(vocab_size=65, block_size=128, n_layers=4, d_model=128, d_ff=512)
    model = lab.MiniTransformer(tiny(**{**sizes, "n_kv_heads": 0, **changes}))
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.lm_head.weight is model.token_emb.weight) == model.config.tie_weights

def test_an_untrained_model_is_as_unsure_as_a_uniform_guess():
    """Bug: initial weights so large that it is sure without knowing; a summed loss."""
    model = lab.MiniTransformer(tiny(vocab_size=300, block_size=40))
    ids = torch.randint(300, (16, 41))
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    assert logits.shape == (16, 40, 300) and model(ids[:, :8])[1] is None
    close(loss, -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)

def test_layers_that_add_to_the_stream_start_with_smaller_weights():
    """Bug: this initialization (Radford 2019) is missing, or on the wrong matrices."""
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
    if c.positions in ("learned", "sinusoidal"):
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
    {},                                     # ours; then GPT-2, Llama, and 2017
    dict(positions="learned", ffn="gelu_tanh", bias=True, qk_norm=False, n_kv_heads=0),
    dict(norm="rmsnorm", qk_norm=False, tie_weights=False),
    dict(pre_norm=False, positions="sinusoidal", ffn="relu", attention="fused")])
def test_a_model_gives_the_numbers_and_gradients_of_its_formulas(style):
    """Bug: almost GPT-2, or almost Llama; a part that is used, but never learns."""
    model, ids = loud_model(**style), torch.randint(11, (3, 8))
    for T in 8, 5:
        both = model(ids[:, :T])[0], model_by_hand(model, ids[:, :T], tiny(**style))
        close(*both, 1e-4)
        wanted = list(model.parameters())
        close(*[torch.autograd.grad(y.square().mean(), wanted) for y in both], 1e-3)

@pytest.mark.parametrize("causal", [True, False])
def test_a_prediction_depends_on_exactly_the_past(positions, attention, causal):
    """Bug: a mask that leaks; texts that mix in a batch. Without one, all must."""
    model = loud_model(positions=positions, attention=attention, causal=causal)
    ids = torch.randint(11, (2, 8))
    before = model(ids)[0]
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 11
        moved = (model(changed)[0] - before).abs().amax(-1)    # (2, 8)
        assert (moved[0, t:] > 1e-4).all() and not moved[1].any()
        assert (moved[0, :t] > 1e-4).all() if not causal else not moved[0, :t].any()

def test_the_order_of_characters_matters_and_the_length_is_limited(positions):
    """Bug: a bag of characters (without positions, one block is one); no limit."""
    model = loud_model(positions=positions, n_layers=1)
    a, b = model(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[0][:, -1]
    assert torch.allclose(a, b, atol=1e-5) == (positions == "none")
    for length in 0, 9:                                # nothing to read, and too much
        with pytest.raises(ValueError, match=f"8.*{length}|{length}.*8"):
            model(torch.zeros(1, length).long())

@pytest.mark.parametrize("length", [1, 5, 8, 19])
def test_generating_looks_at_the_last_block_of_characters(positions, length):
    """Bug: the wrong end of the prompt; a window that stops sliding; dropout is on."""
    ids = torch.randint(11, (2, length))
    model = loud_model(dropout=0.5, positions=positions)
    written = model.train(length > 4).generate(ids, 12, temperature=0).clone()
    assert written.shape == (2, length + 12) and written[:, :length].equal(ids)
    assert model.training == (length > 4)
    for t in range(length, length + 12):
        logits = model.eval()(written[:, max(0, t - 8) : t])[0][:, -1]
        assert logits.argmax(-1).equal(written[:, t])

def test_dropout_acts_on_what_joins_the_stream_and_in_training_only():
    """Bug: dropout in evaluation, on the stream itself, or not everywhere."""
    c, x = tiny(dropout=1 - 1e-7, positions="learned"), torch.randn(2, 8, 32)
    model, ids = loud(lab.MiniTransformer(c)), torch.randint(11, (2, 8))
    close(model(ids)[0], model_by_hand(model, ids, c), 1e-4)
    close(model.blocks[0].train()(x), x)
    post = loud(lab.TransformerBlock(tiny(dropout=1 - 1e-7, pre_norm=False))).train()
    close(post(x), post.ln_ffn(post.ln_attn(x)))
    model.blocks = nn.ModuleList()                     # only the embeddings are left
    logits = model.train()(ids)[0]
    close(logits, logits[:1, :1].expand_as(logits))

def test_every_choice_can_be_built_and_moved(positions, attention, ffn, norm):
    """Bug: a choice that is built nowhere; a mask that stays on the CPU."""
    c = tiny(positions=positions, attention=attention, ffn=ffn, norm=norm)
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    assert lab.MiniTransformer(c).to("meta")(ids)[0].device.type == "meta"

P = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
@pytest.mark.parametrize("settings, expected", [
    ({}, P), ({"top_k": None, "top_p": None}, P), ({"top_k": 99, "top_p": 1.0}, P),
    ({"temperature": 0.5}, P**2), ({"temperature": 2}, P**0.5),
    ({"temperature": 0}, P * (P > 0.3)), ({"top_k": 1}, P * (P > 0.3)),
    ({"top_k": 3}, P * (P > 0.1)), ({"top_p": 0.65}, P * (P > 0.2)),
    ({"top_p": 0.75}, P * (P > 0.1)), ({"top_p": 0.0}, P * (P > 0.3)),
    ({"top_k": 2, "top_p": 0.5}, P * (P > 0.3)),       # 0.4 is 0.57 of the two
    ({"top_p": 0.57, "temperature": 2}, P**0.5 * (P > 0.1))])
def test_characters_are_drawn_with_the_probabilities_asked_for(settings, expected):
    """Bug: logits multiplied by the temperature; one candidate too many or too few."""
    both = torch.stack([P.log(), P.flip(0).log() - 7])  # each row has its own order
    ids = lab.sample(both.repeat_interleave(20000, dim=0), **settings)
    expected = expected / expected.sum()
    for drawn, target in (ids[:20000], expected), (ids[20000:], expected.flip(0)):
        fraction = drawn.flatten().bincount(minlength=5) / 20000
        assert ((fraction > 0) == (target > 0)).all()
        close(fraction, target, 0.02)
    assert len(lab.sample(torch.zeros(999, 4), top_p=0.5).unique()) == 2  # of 4

# ==== 8. Training
@pytest.mark.parametrize("warmup, table", [
    (4, {0: 0.5, 1: 1, 3: 2, 4: 2, 6: 1.707107, 8: 1, 12: 0}),
    (0, {0: 2, 6: 1, 12: 0}), (12, {0: 1 / 6, 5: 1, 11: 2})])
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(warmup, table):
    """Bug: a first step of 0; a division by 0; a cosine that ends elsewhere."""
    run = lab.TrainConfig(learning_rate=2.0, warmup_steps=warmup, max_steps=12)
    close([lab.schedule(s, run) for s in table], [float(r) for r in table.values()])

def test_the_optimizer_is_adamw_and_decays_matrices_only():
    """Bug: gains and biases decay to 0; the decay is added to the gradient (Adam)."""
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
    """Bug: a smaller last batch counts as much as the others; the mode is changed."""
    model, data = loud_model(dropout=0.5), torch.randint(11, (8 * 19 + 5,))
    losses = [model(data[None, i : i + 8], data[None, i + 1 : i + 9])[1].item()
              for i in range(0, 8 * 19, 8)]
    for training in True, False:
        close(lab.evaluate(model.train(training), data), sum(losses) / 19)
        assert model.training == training

def train(config=None, text=TEXT, **settings):
    """Four steps on 612 characters, of which the first 550 are the training text."""
    Path("text.txt").write_text(text, encoding="utf-8")
    plan = dict(text_path="text.txt", max_steps=4, batch_size=4, eval_interval=2,
                seed=1, learning_rate=0.01, warmup_steps=0, weight_decay=0.1,
                grad_clip=1.0, device="cpu", sample_chars=5, temperature=0.8)
    config = config or (None if "resume" in settings else tiny())
    return lab.train(config, **{**plan, **settings})

def weights(path="checkpoint.pt"):
    return dict(torch.load(path, weights_only=True)["weights"])
@pytest.fixture
def batches(monkeypatch):
    """The (inputs, targets) of each training step, in a list that grows."""
    seen, forward = [], lab.MiniTransformer.forward
    def spy(self, idx, targets=None):
        seen.extend([(idx, targets)] if self.training else [])
        return forward(self, idx, targets)
    monkeypatch.setattr(lab.MiniTransformer, "forward", spy)
    return seen

def test_training_equals_the_loop_that_everyone_writes(batches, capsys):
    """Bug: gradients that add up; clipping or a rate that is off; a wrong report."""
    plan = dict(warmup_steps=2, max_steps=6, learning_rate=0.02, grad_clip=2.1)
    start, _ = train(**{**plan, "max_steps": 0})       # weights before the first step
    model, _ = train(**plan)
    optimizer = lab.make_optimizer(start.train(), lab.TrainConfig(weight_decay=0.1))
    norms, losses = [], []
    for step, (x, y) in enumerate(batches[:6]):
        optimizer.zero_grad()
        losses.append(start(x, y)[1])
        losses[-1].backward()
        norms.append(nn.utils.clip_grad_norm_(start.parameters(), 2.1).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * [0.5, 1, 1, 0.853553, 0.5, 0.146447][step]
        optimizer.step()
    close(dict(model.state_dict()), dict(start.state_dict()), 1e-4)
    assert min(norms) < 2.1 < max(norms)               # clipped in some steps only
    last_two = f"train {sum(losses[-2:]).item() / 2:.4f}"
    assert last_two in capsys.readouterr().out and not model.training

def test_training_draws_from_all_of_the_training_text_and_from_nothing_else(batches):
    """Bug: held-out text is trained on; some windows never come; always one batch."""
    alphabet = "".join(map(chr, range(65, 185)))
    train(text=alphabet, max_steps=40, batch_size=40, eval_interval=40)
    starts = [tuple(x[:, 0].tolist()) for x, _ in batches]
    assert set(sum(starts, ())) == set(range(108 - 8))     # the last target is 107
    assert len(set(starts)) == 40

def test_the_seed_decides_the_weights_and_the_windows(batches):
    """Bug: results that nobody can repeat; two seeds that draw the same windows."""
    w = [train(max_steps=0, seed=seed)[0].token_emb.weight for seed in (1, 1, 2)]
    assert w[0].equal(w[1]) and not w[0].equal(w[2])
    for seed in 1, 1, 2:
        train(seed=seed)
    starts = [x.tolist() for x, _ in batches]
    assert starts[:4] == starts[4:8] and not any(x in starts[:4] for x in starts[8:])

def test_the_best_model_is_saved_and_an_earlier_run_is_kept(batches, monkeypatch):
    """Bug: the last weights are saved, not the best; yesterday's model is destroyed."""
    scores, seen = {0: 9.0, 2: 3.0, 4: 1.0, 6: 2.0, 8: 1.8, 10: 1.5, 12: 2.5}, {}
    def evaluate(model, data):
        assert data.equal(lab.CharDataset(TEXT, 8).data[-62:])  # the held-out tenth
        seen[len(batches)] = {name: p.clone() for name, p in model.state_dict().items()}
        return scores[len(batches)]
    monkeypatch.setattr(lab, "evaluate", evaluate)
    train(max_steps=6)
    close(weights(), seen[4], 0)
    train(tiny(n_layers=1))                            # saves 1.8, then 1.5
    close(weights(), seen[10], 0)
    close(weights("checkpoint.pt.old"), seen[4], 0)
    train(resume=True, max_steps=6)                    # from 1.5 to 2.5
    close(weights(), seen[10], 0)

@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_stopped_and_resumed_run_equals_a_whole_one(step, monkeypatch, capsys):
    """Bug: Ctrl-C loses the run, or an earlier one; AdamW's averages are forgotten."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # off in background jobs
    config, plan = tiny(dropout=0.2), dict(seed=5, max_steps=6, warmup_steps=1)
    train()
    earlier, schedule = weights(), lab.schedule
    def ctrl_c(now, run):
        if now == step:
            signal.raise_signal(signal.SIGINT)
        return schedule(now, run)
    with monkeypatch.context() as patch:
        patch.setattr(lab, "schedule", ctrl_c)
        train(config, **plan, sample_chars=40)
    assert len(capsys.readouterr().out.splitlines()[-1]) == 41       # it still writes
    if step == 0:
        return close(weights(), earlier, 0)
    assert torch.load("checkpoint.pt")["step"] == step
    resumed, _ = train(resume=True, **plan)
    whole, _ = train(config, **plan)
    close(dict(resumed.state_dict()), dict(whole.state_dict()))

def test_resuming_keeps_the_model_and_takes_the_constants_given_now(batches):
    """Bug: a new weight decay is ignored; so is a model option that does not fit."""
    before, _ = train()
    after, _ = train(resume=True, max_steps=6, weight_decay=50.0)
    assert after.lm_head.weight.norm() < 0.9 * before.lm_head.weight.norm()
    for wrong in dict(config=tiny(n_heads=8)), dict(text=TEXT + "!"), dict(max_steps=6):
        with pytest.raises(ValueError):
            train(resume=True, **{"max_steps": 9, **wrong})
    _, ds = train(text="the cat " * 99, resume=True, max_steps=9)  # fine-tuning
    assert ds.itos == sorted(set(TEXT)) and len(batches) == 4 + 2 + 3
    assert torch.load("checkpoint.pt")["itos"] == ds.itos

# ==== Files, the command line, the network
@pytest.mark.parametrize("model, settings", [
    (dict(n_heads=0), {}), (dict(n_heads=3), {}), (dict(n_kv_heads=3), {}),
    (dict(n_heads=32), {}), ({}, dict(batch_size=0)), ({}, dict(eval_interval=0)),
    ({}, dict(temperature=math.nan)), ({}, dict(top_k=-3)), ({}, dict(prompt="the")),
    ({}, dict(grad_clip=0.0)), (dict(block_size=0), {}), ({}, dict(text_path="no.txt")),
    *[({}, dict(checkpoint_path=path)) for path in ("", ".", "no_such_folder/x.pt")]])
def test_what_cannot_work_is_found_before_the_first_step(model, settings, batches):
    """Bug: ten minutes of training, and then an error."""
    Path("checkpoint.pt").touch()
    with pytest.raises((ValueError, OSError, RuntimeError, TypeError)):
        train(tiny(**model), **settings)
    assert not batches and not Path("checkpoint.pt.old").exists()

def test_what_was_learned_is_saved_before_anything_is_printed(batches, monkeypatch):
    """Bug: a closed pipe, or a sample that cannot be printed, loses the model."""
    class Console:
        encoding, isatty, flush = "utf-8", lambda self: False, lambda self: None
        def write(self, text):
            if batches:
                raise BrokenPipeError
    monkeypatch.setattr(sys, "stdout", Console())
    with pytest.raises(BrokenPipeError):
        train()
    assert weights() and len(batches) == 2

def test_a_run_that_fails_spares_the_checkpoint(monkeypatch):
    """Bug: a full disk destroys the good model; NaN is saved as the best loss."""
    train()
    before = weights()
    with pytest.raises((RuntimeError, ValueError)):    # it diverges
        train(resume=True, max_steps=9, weight_decay=1e40, eval_interval=1)
    close(weights(), before, 0)
    def full_disk(checkpoint, path):
        Path(getattr(path, "name", path)).write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        train(resume=True, max_steps=6)
    close(weights(), before, 0)

@pytest.mark.parametrize("arguments", [["--resume"], ["--prompt", "the"]])
def test_a_checkpoint_that_contains_code_is_refused(arguments):
    """Bug: torch.load without weights_only=True runs what a stranger put in a file."""
    torch.save({"config": os.system}, "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        lab.main(["--device=cpu", *arguments])

def test_the_text_is_downloaded_once_and_an_error_page_is_never_kept(monkeypatch):
    """Bug: an error page becomes the text, and stays it for ever."""
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)  # of this folder
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(lab, "TEXT_URL", f"http://127.0.0.1:{server.server_port}/page")
    Path("page").write_text("<html>Sign in</html>")
    with pytest.raises((ValueError, OSError)):
        lab.load_text("input.txt")
    Path("page").write_text("a" * 1_115_394)
    assert lab.load_text("input.txt") == "a" * 1_115_394
    server.shutdown()
    assert lab.load_text("input.txt") == "a" * 1_115_394  # this time from the file

def test_your_own_text_is_utf8_and_never_replaced():
    """Bug: a mistyped path trains on Shakespeare; a byte-order mark is learned."""
    with pytest.raises(FileNotFoundError):
        lab.load_text("mine.txt")
    for path, mark in ("mine.txt", b""), ("input.txt", b"\xef\xbb\xbf"):
        Path(path).write_bytes(mark + "é\r\n日".encode())
        assert lab.load_text(path) == "é\n日"
    Path("mine.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="mine.txt"):
        lab.load_text("mine.txt")
    train(text="ab" * 45)
    with pytest.raises(ValueError, match=r"\b80\b"):
        train(text="ab" * 40)                          # a tenth must exceed a window

def test_help_lists_every_constant_with_its_default(capsys):
    """Bug: a constant that can be set in the file only."""
    for argument in "--f=1", "--help":                 # --f is no abbreviation of --ffn
        with pytest.raises(SystemExit):
            lab.main([argument])
    said = " ".join(capsys.readouterr().out.split())
    constants = {**vars(lab.TransformerConfig()), **vars(lab.TrainConfig())}
    for name, value in constants.items():
        assert f"--{name}" in said and str(value) in said

def test_options_reach_the_run_and_a_prompt_is_continued(capsys):
    """Bug: an option without effect; a prompt that is continued by another model."""
    Path("t.txt").write_text(TEXT)
    options = "--device cpu --sample_chars 40 --checkpoint_path".split()
    small = "--text_path t.txt --n_layers 1 --block_size 8 --bias --no-qk_norm".split()
    model, ds = lab.main([*options, "m.pt", *small, "--max_steps=2"])
    assert len(model.blocks) == 1 and "blocks.0.ffn.up_proj.bias" in weights("m.pt")
    likeliest = model.generate(torch.tensor([ds.encode("the")]), 40, temperature=0)
    for how in "seed=5", "seed=5", "seed=6", "temperature=0", "top_k=1", "top_p=0.01":
        lab.main([*options, "m.pt", "--prompt", "the", f"--{how}"])
    drawn, again, other, *said = capsys.readouterr().out.splitlines()[-6:]
    assert drawn == again != other and set(said) == {ds.decode(likeliest[0].tolist())}
    resume = [*small[:2], "--resume", "--max_steps=4"]
    for wrong in ["--prompt", ""], ["--prompt", "Z"], [*resume, "--qk_norm"]:
        with pytest.raises((ValueError, SystemExit)):
            lab.main([*options, "m.pt", *wrong])
    lab.main([*options, "m.pt", *resume, "--bias"])

def test_the_file_is_a_script_that_any_console_can_show():
    """Bug: a character that the console lacks ends the run (cp1252 on Windows)."""
    Path("input.txt").write_text("日本 → é " * 99, encoding="utf-8")
    command = [sys.executable, lab.__file__, "--device=cpu", "--block_size=8"]
    for more in ["--max_steps=2"], ["--prompt=日"]:
        subprocess.run([*command, *more], check=True, capture_output=True,
                       env={**os.environ, "PYTHONIOENCODING": "ascii"})
