"""Checks for mini_transformer, in the order of its sections. Most bugs of a Transformer
do not stop it from training; each test says below its name which one it would catch.

    OMP_NUM_THREADS=1 pytest -x test_mini_transformer.py
    MODULE=my_transformer pytest -x                     # your own, half-typed or whole
"""
import dataclasses
import hashlib
import importlib
import inspect
import io
import math
import os
import re
import resource
import runpy
import subprocess
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from threading import Thread

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

NAME = os.environ.get("MODULE", "mini_transformer")
SECTIONS = {
    1: "require choose TransformerConfig GPT2_STYLE LLAMA_STYLE TrainConfig",
    2: "TEXT_URL TEXT_SHA256 progress write_file load_text CharDataset",
    3: "angles sinusoidal rotate POSITIONS",
    4: "linear explicit_attention ATTENTIONS CausalSelfAttention",
    5: "FeedForward SwiGLUFeedForward FEED_FORWARDS",
    6: "NORMS TransformerBlock",
    7: "sample MiniTransformer",
    8: "orthogonalize Muon make_optimizers schedule evaluate bigram_loss write train main",
}
TABLES = {"positions": "POSITIONS", "attention": "ATTENTIONS", "ffn": "FEED_FORWARDS",
          "norm": "NORMS"}
TEXT = "the cat sat on the mat and the dog sat on the log. " * 12
DEAD = "http://127.0.0.1:9/nobody-listens-here"

sys.path.insert(0, os.getcwd())
try:
    lab = importlib.import_module(NAME)
except Exception as error:
    pytest.exit(f"{NAME}.py cannot be imported yet: {type(error).__name__}: {error}", 1)

def not_written_yet(name):
    """Called by Python when lab.name is missing: name the section to type next."""
    for number, names in SECTIONS.items():
        for first in names.split():
            if first not in vars(lab) and name in " ".join(SECTIONS.values()).split():
                pytest.fail(f"section {number} is next: {first} is not written yet", False)
    raise AttributeError(name)

lab.__getattr__ = not_written_yet

def pytest_generate_tests(metafunc):
    """A test with an argument `ffn` runs for every entry of FEED_FORWARDS, and so on."""
    for argument, table in TABLES.items():
        if argument in metafunc.fixturenames:
            entries = vars(lab).get(table, [f"{table} is not written yet"])
            metafunc.parametrize(argument, list(entries))

@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder, a fixed seed, no network; the number of threads put back after."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    if "TEXT_URL" in vars(lab):
        monkeypatch.setattr(lab, "TEXT_URL", DEAD)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def refused(message):
    return pytest.raises(ValueError, match=message)

def shape(**changes):
    tiny = dict(vocab_size=11, block_size=8, n_layers=2, n_heads=2, d_model=16, d_ff=24)
    return lab.TransformerConfig(**(tiny | changes))

def loud(module):
    """Weights far from their tiny start, so that no wrong term hides in a tolerance."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module.eval()

def loud_model(**changes):
    return loud(lab.MiniTransformer(shape(**changes)))

def run(config=None, **settings):
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    tiny = dict(text_path="text.txt", max_steps=4, batch_size=4, eval_interval=2,
                sample_chars=5, warmup_steps=0, threads=1)
    return lab.train(config or shape(), **(tiny | settings))

def saved(path="checkpoint.pt"):
    return torch.load(path, weights_only=True)

def history():
    head, *rows = Path("history.csv").read_text().splitlines()
    return [dict(zip(head.split(","), map(float, r.split(",")), strict=True)) for r in rows]

# ==== 1. Constants ====================================================================
@pytest.mark.parametrize("changes, message", [
    *[({name: 0}, "a size of 0: each must be at least 1") for name in
      "vocab_size block_size n_layers n_heads d_model d_ff".split()],
    ({"n_kv_heads": -1}, "a size of -1: each must be at least 1"),
    ({"d_model": 12, "n_heads": 4}, "d_model=12: must be a multiple of 2 x n_heads=4"),
    ({"n_kv_heads": 3, "n_heads": 4}, "n_kv_heads=3: must divide n_heads=4"),
])
def test_sizes_that_cannot_be_are_refused_at_once(changes, message):
    """Bug: an odd head size or a lost head shows up later as a puzzling view error."""
    with refused(message):
        shape(**changes)

def test_a_model_may_be_as_small_as_one_of_everything():
    """Bug: a limit that is off by one."""
    ones = dict.fromkeys("vocab_size block_size n_layers n_heads n_kv_heads d_ff".split(), 1)
    assert shape(**ones, d_model=2).d_ff == 1

def test_the_published_shape_is_the_default():
    """Bug: a figure of the README measured with another model than the one you get."""
    c = lab.TransformerConfig()
    assert (c.vocab_size, c.block_size, c.n_layers) == (65, 128, 4)
    assert (c.n_heads, c.d_model, c.d_ff, c.bias, c.causal) == (4, 128, 512, False, True)

def test_an_unknown_name_lists_the_choices():
    """Bug: a KeyError that leaves the reader guessing what there is."""
    assert lab.choose("ffn", {"a": 1, "b": 2}, "b") == 2
    with refused("^ffn='swigl': choose from a, b$"):
        lab.choose("ffn", {"b": 2, "a": 1}, "swigl")

# ==== 2. Data =========================================================================
def test_decoding_undoes_encoding():
    """Bug: a vocabulary whose order depends on the text or on the run."""
    ds = lab.CharDataset("hello wörld\n", 4)
    assert ds.decode(ds.encode("röd wold\n")) == "röd wold\n"
    assert ds.itos == sorted("helo wörd\n") and ds.vocab_size == len(ds.stoi) == 10
    assert [ds.stoi[c] for c in ds.itos] == list(range(10))
    assert ds.encode("he") == [ds.itos.index("h"), ds.itos.index("e")]
    with refused(r"\['x', 'z'\]: not in the vocabulary '\\n dehlorwö'"):
        ds.encode("zox")

def test_targets_are_the_inputs_one_character_later():
    """Bug: unshifted targets (a loss far below ln V at once), or windows left out."""
    ds = lab.CharDataset("abcdefghij", 4)
    assert len(ds) == 6
    for i in range(6):
        x, y = ds[i]
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == [i, i + 1, i + 2, i + 3]
        assert y.tolist() == [i + 1, i + 2, i + 3, i + 4]
    with pytest.raises(IndexError):
        ds[6]
    x, y = ds[torch.tensor([[5], [0]])]
    assert x.tolist() == [[5, 6, 7, 8], [0, 1, 2, 3]] and y[0].tolist() == [6, 7, 8, 9]

def test_a_text_must_be_longer_than_a_window():
    """Bug: an endless loop or a crash far from its cause."""
    assert len(lab.CharDataset("abcde", 4)) == 1
    with refused("4 characters: block_size=4 needs more"):
        lab.CharDataset("abcd", 4)

@pytest.fixture
def site(monkeypatch):
    """A web server on this machine; the lab believes that its page is the corpus."""
    class Page(BaseHTTPRequestHandler):
        body, status, missing, hits = b"To be, \xc3\xb6r not to be. " * 9000, 200, 0, 0

        def do_GET(self):  # noqa: N802
            Page.hits += 1
            self.send_response(Page.status)
            self.send_header("Content-Length", str(len(Page.body) + Page.missing))
            self.end_headers()
            self.wfile.write(Page.body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr(lab, "TEXT_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(lab, "TEXT_SHA256", hashlib.sha256(Page.body).hexdigest())
    yield Page
    server.shutdown()
    server.server_close()

def test_the_text_is_downloaded_once_and_kept(site):
    """Bug: a download per run, or bytes changed on the way to the disk."""
    path = lab.TrainConfig.text_path
    for _ in range(2):
        assert lab.load_text(path) == site.body.decode()
    assert site.hits == 1 and Path(path).read_bytes() == site.body
    assert os.listdir() == [path]

@pytest.mark.parametrize("problem", ["404", "other text", "cut short", "offline"])
def test_a_page_that_is_not_the_text_is_never_kept(problem, site, monkeypatch, capsys):
    """Bug: an error page or half a file saved as the corpus for ever."""
    if problem == "404":
        site.status = 404
    elif problem == "other text":
        monkeypatch.setattr(lab, "TEXT_SHA256", "0" * 64)
    elif problem == "cut short":
        site.missing = 5
    else:
        monkeypatch.setattr(lab, "TEXT_URL", DEAD)
    assert lab.load_text(lab.TrainConfig.text_path) == "\n".join(topics.values())
    said = capsys.readouterr().out
    assert "No download" in said and "training on Python's documentation" in said
    assert ("bytes that are not" in said) == (problem == "other text")
    assert os.listdir() == []

def test_a_download_cannot_hang_for_ever(monkeypatch):
    """Bug: no timeout: the first run waits for a dead server without a word."""
    asked = []

    def get(url, **options):
        asked.append((url, options["timeout"]))
        raise OSError("no network")
    monkeypatch.setattr(lab.requests, "get", get)
    lab.load_text(lab.TrainConfig.text_path)
    assert asked[0][0] == DEAD and 1 <= asked[0][1] <= 120

def test_your_own_text_is_never_replaced_by_a_download(site):
    """Bug: a typing error in text_path that trains on Shakespeare instead."""
    with pytest.raises(FileNotFoundError):
        lab.load_text("mine.txt")
    Path("mine.txt").write_bytes("naïve – 日本\n".encode())
    assert lab.load_text("mine.txt") == "naïve – 日本\n" and site.hits == 0
    Path("mine.txt").write_bytes(b"\xff\xfe")
    with refused("utf-8"):
        lab.load_text("mine.txt")

def test_a_text_is_utf8_whatever_the_computer_prefers():
    """Bug: the platform's own encoding: Windows would read other characters."""
    Path("mine.txt").write_bytes("é".encode())
    code = f"import {NAME} as lab; print(ascii(lab.load_text('mine.txt')))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                        "PYTHONPATH": str(Path(lab.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.stdout.strip() == rb"'\xe9'", done.stderr

def test_a_failed_write_leaves_the_old_file_whole():
    """Bug: a full disk that destroys the checkpoint of the night."""
    lab.write_file("file", lambda name: Path(name).write_text("old"))
    assert Path("file").read_text() == "old" and os.listdir() == ["file"]

    def fails(name):
        Path(name).write_text("half of the n")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        lab.write_file("file", fails)
    assert Path("file").read_text() == "old"

def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    """Bug: a log file with thousands of overwritten lines, or letters left standing."""
    lab.progress("step 1")
    assert capsys.readouterr().out == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    lab.progress("step 1")
    assert re.fullmatch(r"\rstep 1 {60,}\r", terminal.getvalue())

# ==== 3. Positions ====================================================================
def test_angles_are_position_times_frequency():
    """Bug: the exponent off by a factor, or frequencies in the wrong order."""
    table = lab.angles(50, 4)
    expected = [[t / 10000 ** (d / 4) for d in range(4)] for t in range(50)]
    close(table, torch.tensor(expected))

def test_sinusoidal_positions_are_the_papers_table_made_small():
    """Bug: sine and cosine in halves instead of by turns; a table that drowns x."""
    expected = [[0.02 * [math.sin, math.cos][c % 2](t / 10000 ** (c // 2 * 2 / 6))
                 for c in range(6)] for t in range(30)]
    close(lab.sinusoidal(30, 6), torch.tensor(expected), 1e-6)

def test_rope_is_multiplication_by_a_complex_number():
    """Bug: a sign of the rotation, or neighbours paired instead of the two halves."""
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angle)
    close(lab.rotate(x, angle), torch.cat([turned.real, turned.imag], dim=-1))
    close(lab.rotate(x, torch.zeros(5, 4)), x, 0)

def test_rope_makes_the_dot_product_depend_on_distance_only():
    """Bug: rotating queries and keys by different tables, or only one of them."""
    q, k = (lab.rotate(torch.randn(1, 1, 1, 8).expand(1, 1, 20, 8), lab.angles(20, 4))
            for _ in range(2))
    score = (q @ k.mT)[0, 0]
    close(score[1:, 1:], score[:-1, :-1])
    assert (score[0, 1:] - score[0, :-1]).abs().min() > 1e-4
    assert (score - score.mT).abs().max() > 1e-2

def test_every_choice_of_positions_has_a_table_to_add_and_one_to_turn_by(positions):
    """Bug: a choice that adds or turns nothing at all, and trains nevertheless."""
    add, turn = (make(300, 64) for make in lab.POSITIONS[positions])
    assert add.shape == turn.shape == (300, 64)
    assert (turn != 0).any() == (positions == "rope") or positions not in KNOWN
    if positions == "rope":
        close(turn, lab.angles(300, 64), 0)
    if positions in ("rope", "none"):
        assert not add.any()
    if positions == "sinusoidal":
        close(add, lab.sinusoidal(300, 64), 0)
    if positions == "learned":
        assert isinstance(add, nn.Parameter) and 0.019 < add.std() < 0.021
    assert KNOWN <= set(lab.POSITIONS)

KNOWN = {"rope", "learned", "sinusoidal", "none"}

# ==== 4. Attention ====================================================================
def test_weights_start_small_and_biases_at_zero():
    """Bug: PyTorch's own start, too large for the residual stream."""
    layer = lab.linear(300, 400)
    assert layer.bias is None and layer.weight.shape == (400, 300)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    layer = lab.linear(300, 400, True, 0.25)
    assert layer.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert layer.bias.shape == (400,) and not layer.bias.any()

def test_attention_is_an_average_of_values_weighted_by_similarity(attention):
    """Bug: no 1/sqrt(D), softmax over the wrong axis, a mask inverted or ignored."""
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    seen = torch.ones(4, 6, dtype=torch.bool).tril(2)
    expected = torch.zeros(2, 3, 4, 8)
    for b, h, t in product(range(2), range(3), range(4)):
        weight = [math.exp(sum(q[b, h, t] * k[b, h, s]) / math.sqrt(8)) * seen[t, s]
                  for s in range(6)]
        for s in range(6):
            expected[b, h, t] += weight[s] / sum(weight) * v[b, h, s]
    close(lab.ATTENTIONS[attention](q, k, v, seen, 0.0), expected)
    assert {"fused", "explicit"} <= set(lab.ATTENTIONS)

def test_explicit_attention_equals_pytorchs_in_values_and_gradients():
    """Bug: the readable equation and the fast kernel drift apart."""
    seen, results = torch.rand(4, 6) > 0.4, []
    seen[:, 0] = True
    inputs = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (4, 6, 6)]
    for attend in lab.explicit_attention, F.scaled_dot_product_attention:
        out = attend(*inputs, seen)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    close(*results)

def test_attention_dropout_zeroes_weights_and_scales_up_the_rest(attention):
    """Bug: dropout on the scores (before softmax), or not scaled by 1 / (1 - p)."""
    q, k = torch.zeros(1, 1, 200, 8), torch.zeros(1, 1, 8, 8)
    seen = torch.ones(200, 8, dtype=torch.bool)
    weights = lab.ATTENTIONS[attention](q, k, torch.eye(8)[None, None], seen, 0.25)
    assert set(weights.unique().tolist()) == {0.0, pytest.approx(1 / 8 / 0.75)}
    assert 0.2 < (weights == 0).float().mean() < 0.3

def attention_by_hand(attn, x, c):
    """Head by head, query by query, key by key; a pair of numbers is a complex one."""
    (B, T, C), H, G = x.shape, c.n_heads, c.n_kv_heads or c.n_heads
    D = C // H
    heads, out = attn.qkv_proj(x).view(B, T, H + 2 * G, D), torch.zeros(B, T, H, D)

    def turned(head, t):
        z = heads[:, t, head]
        if c.qk_norm:
            z = z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        angle = t * 10000.0 ** (-torch.arange(D // 2) / (D // 2)) * (c.positions == "rope")
        z = torch.complex(z[:, : D // 2], z[:, D // 2 :]) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], dim=-1)

    for t, h in product(range(T), range(H)):
        keys, group = range(t + 1 if c.causal else T), h // (H // G)
        scores = [(turned(h, t) * turned(H + group, s)).sum(-1) / D ** 0.5 for s in keys]
        weights = torch.stack(scores).softmax(0)
        out[:, t, h] = sum(weights[s, :, None] * heads[:, s, H + G + group] for s in keys)
    return attn.out_proj(out.flatten(2))

@pytest.mark.parametrize("changes", [
    {}, {"positions": "none"}, {"qk_norm": False}, {"causal": False}, {"n_kv_heads": 2},
    {"n_kv_heads": 1, "bias": True}, {"positions": "learned", "qk_norm": False}])
def test_attention_layer_equals_attention_by_hand(attention, changes):
    """Bug: rope on the values, norm after rope, groups repeated in the wrong order."""
    c = shape(n_heads=4, d_model=32, attention=attention, **changes)
    attn, x = loud(lab.CausalSelfAttention(c)), torch.randn(2, 8, 32)
    close(attn(x), attention_by_hand(attn, x, c))
    attn.qkv_proj.weight.data *= 1e-2      # so small that the epsilon of qk_norm is seen
    close(attn(x), attention_by_hand(attn, x, c))

def test_grouped_queries_equal_full_heads_with_repeated_weights():
    """Bug: repeat (0 1 0 1) where repeat_interleave (0 0 1 1) is meant."""
    few, full = (loud(lab.CausalSelfAttention(shape(n_heads=4, n_kv_heads=g)))
                 for g in (2, None))
    q, k, v = few.qkv_proj.weight.data.view(8, 4, 16).split([4, 2, 2])
    full.qkv_proj.weight.data = torch.cat([q, k[[0, 0, 1, 1]], v[[0, 0, 1, 1]]]).flatten(0, 1)
    full.out_proj.weight.data = few.out_proj.weight.data
    x = torch.randn(2, 8, 16)
    close(few(x), full(x))

def test_shifting_all_positions_changes_nothing_for_rope():
    """Bug: positions that leak into the values or turn queries and keys differently."""
    attn, x = loud(lab.CausalSelfAttention(shape(positions="rope"))), torch.randn(2, 8, 16)
    before = attn(x)
    attn.angle.copy_(lab.angles(100, 4)[92:])
    close(attn(x), before)
    attn.angle.copy_(1.5 * attn.angle)     # and stretching them does change it
    assert (attn(x) - before).abs().max() > 1e-3

@pytest.mark.parametrize("causal", [True, False])
def test_a_query_sees_no_key_from_the_future(attention, causal):
    """Bug: a mask off by one or missing; without a mask the same check must fail."""
    attn = loud(lab.CausalSelfAttention(shape(attention=attention, causal=causal)))
    x = torch.randn(2, 8, 16, requires_grad=True)
    for t in range(8):
        grad, = torch.autograd.grad(attn(x)[0, t].sum(), x)
        sees = grad.abs().sum(-1)
        assert (sees[0, : t + 1] > 0).all() and not sees[1].any()
        assert (sees[0, t + 1 :] > 0).all() if not causal else not sees[0, t + 1 :].any()

def test_the_past_holds_one_key_and_value_per_group_and_position(attention):
    """Bug: a cache that forgets, repeats the heads, or rotates by the wrong offset."""
    attn = loud(lab.CausalSelfAttention(shape(n_kv_heads=1, attention=attention)))
    x, past = torch.randn(2, 8, 16), []
    parts = [attn(part, past) for part in x.split([3, 1, 2, 2], dim=1)]
    close(torch.cat(parts, 1), attn(x))
    assert [t.shape for t in past] == [(2, 1, 8, 8)] * 2

def test_attention_drops_in_training_only():
    """Bug: dropout active while evaluating, or never."""
    attn, given = lab.CausalSelfAttention(shape(dropout=0.3)), []
    attend, x = attn.attend, torch.randn(1, 4, 16)
    attn.attend = lambda *a: given.append(a[4]) or attend(*a)
    attn.train()(x), attn.eval()(x)
    assert given == [0.3, 0.0]

def test_the_writers_into_the_residual_stream_start_smaller():
    """Bug: a stream whose variance grows with the number of blocks."""
    c = shape(d_model=256, n_layers=8, n_kv_heads=1, bias=True, d_ff=300)
    attn = lab.CausalSelfAttention(c)
    assert attn.qkv_proj.weight.shape == (256 + 2 * 128, 256)
    assert attn.qkv_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert attn.out_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert not attn.qkv_proj.bias.any() and not attn.out_proj.bias.any()
    assert [attn.state_dict().keys()] == [dict(attn.named_parameters()).keys()]

# ==== 5. Feed-forward =================================================================
ACTIVATIONS = {
    "relu": lambda x: max(x, 0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu2": lambda x: max(x, 0) ** 2,
    "swiglu": lambda x: x / (1 + math.exp(-x)),
}

@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_equals_its_formula(ffn, bias):
    """Bug: the activation missing, on the wrong path, or a near relative of it."""
    layer, x = loud(lab.FEED_FORWARDS[ffn](shape(bias=bias))), torch.randn(2, 5, 16)
    assert layer(x).shape == x.shape and set(ACTIVATIONS) <= set(lab.FEED_FORWARDS)
    close(layer(x)[:, 2:3], layer(x[:, 2:3]))        # each position by itself
    if ffn in ACTIVATIONS:
        gate = layer.gate_proj(x) if ffn == "swiglu" else layer.up_proj(x)
        bent = gate.detach().clone().apply_(ACTIVATIONS[ffn])
        bent = bent * layer.up_proj(x) if ffn == "swiglu" else bent
        assert layer.up_proj.out_features == (16 if ffn == "swiglu" else 24)
        assert (layer.up_proj.bias is not None) == bias
        close(layer(x), F.linear(bent, layer.down_proj.weight, layer.down_proj.bias))

def test_feed_forward_starts_like_attention(ffn):
    """Bug: the scale of the residual writer on the wrong matrix, or forgotten."""
    layer = lab.FEED_FORWARDS[ffn](shape(d_model=256, d_ff=384, n_layers=8))
    for name, p in layer.named_parameters():
        std = 0.02 / 4 if name == "down_proj.weight" else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.02)

# ==== 6. Block ========================================================================
def test_norms_equal_their_formulas(norm):
    """Bug: the mean not removed, the epsilon outside the root or of another size."""
    layer, x = loud(lab.NORMS[norm](16, eps=1e-5)), torch.randn(4, 16) * 0.01
    y = x - x.mean(-1, keepdim=True) if norm == "layernorm" else x
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
    y = y + layer.bias if norm == "layernorm" else y
    assert layer(x).shape == x.shape and {"layernorm", "rmsnorm"} <= set(lab.NORMS)
    if norm in ("layernorm", "rmsnorm"):
        close(layer(x), y)
        block = lab.TransformerBlock(shape(norm=norm))
        assert type(block.ln_attn) is type(block.ln_ffn) is type(layer)
        assert block.ln_attn.eps == block.ln_ffn.eps == 1e-5

RENAMED = {"attn.qkv_proj.": "self_attn.in_proj_", "attn.out_proj": "self_attn.out_proj",
           "ffn.up_proj": "linear1", "ffn.down_proj": "linear2",
           "ln_attn": "norm1", "ln_ffn": "norm2"}

@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_block_equals_pytorchs_in_values_and_gradients(attention, pre_norm, activation):
    """Bug: a residual missing, norms in the wrong place, heads mixed: eight in one."""
    c = shape(bias=True, qk_norm=False, positions="none", norm="layernorm",
              attention=attention, pre_norm=pre_norm, ffn=activation)
    ours = loud(lab.TransformerBlock(c))
    theirs = nn.TransformerEncoderLayer(16, 2, 24, 0.0, activation, 1e-5, True, pre_norm)
    theirs.load_state_dict({rename(k): v for k, v in ours.state_dict().items()})
    x, probe = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    mask, results = nn.Transformer.generate_square_subsequent_mask(8), []
    for block, options in (ours, {}), (theirs, {"src_mask": mask}):
        start = x.clone().requires_grad_()
        out = block(start, **options)
        (out * probe).sum().backward()
        grads = {rename(name): p.grad for name, p in block.named_parameters()}
        results.append({"out": out, "x": start.grad} | grads)
    close(*results, 1e-4)

def rename(key):
    for ours, theirs in RENAMED.items():
        key = key.replace(ours, theirs) if key.startswith(ours) else key
    return key

@pytest.mark.parametrize("part", ["attn", "ffn"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_residual_dropout_hits_each_part_before_it_is_added(pre_norm, part):
    """Bug: dropout missing on one of the four sums, or on the stream itself."""
    block = loud(lab.TransformerBlock(shape(dropout=0.5, pre_norm=pre_norm)))
    block.ln_attn = block.ln_ffn = nn.Identity()
    block.attn.dropout, x = 0.0, torch.randn(9, 8, 16)
    silent = block.ffn.down_proj if part == "attn" else block.attn.out_proj
    nn.init.zeros_(silent.weight)
    added, dropped = block(x) - x, block.train()(x) - x
    kept = dropped.abs() > 1e-5
    close(dropped[kept], 2 * added[kept], 1e-4)
    assert 0.4 < kept.float().mean() < 0.6

# ==== 7. Model ========================================================================
def test_parameters_are_as_many_as_the_formula_says():
    """Bug: a matrix forgotten or doubled; weights not tied; a bias too many."""
    for positions, bias, G, tie, ffn in product(
            POS, [0, 1], [2, 4], [True, False], ["relu", "swiglu"]):
        c = shape(positions=positions, bias=bool(bias), n_heads=4, n_kv_heads=G,
                  tie_weights=tie, ffn=ffn)
        qkv, out = 16 * (16 + 2 * G * 4) + bias * (16 + 2 * G * 4), 16 * 16 + bias * 16
        mlp = (2 * (16 * 24 + bias * 24) if ffn == "relu" else 0) - bias * 8
        mlp = 2 * 16 * 24 + bias * (24 + 16) if ffn == "relu" else 3 * 16 * 16 + bias * 48
        total = (2 - tie) * 11 * 16 + 8 * 16 * (positions == "learned")
        total += 2 * (qkv + out + mlp + 4 * 16) + 2 * 16
        model = lab.MiniTransformer(c)
        assert sum(p.numel() for p in model.parameters()) == total
        assert (model.token_emb.weight is model.lm_head.weight) == tie
        assert set(model.state_dict()) >= {name for name, _ in model.named_parameters()}
        assert not {name for name, _ in model.named_buffers()} & set(model.state_dict())

POS = ["rope", "learned", "sinusoidal", "none"]

def test_an_untrained_model_guesses_blindly():
    """Bug: a start far from ln V: logits too large, or a target that is seen."""
    for tie in True, False:
        c = shape(vocab_size=500, d_model=64, positions="learned", tie_weights=tie)
        model, ids = lab.MiniTransformer(c), torch.randint(500, (16, 9))
        logits, loss = model(ids[:, :-1], ids[:, 1:])
        assert loss.item() == pytest.approx(math.log(500), abs=0.05)
        assert logits.shape == (16, 8, 500) and model(ids[:, :8])[1] is None
        logp = logits.log_softmax(-1)
        picked = [logp[b, t, ids[b, t + 1]] for b, t in product(range(16), range(8))]
        close(loss, -sum(picked) / 128)
        for weight in model.token_emb.weight, model.lm_head.weight, model.position_emb:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)

@pytest.mark.parametrize("field", ["positions", "attention", "ffn", "norm"])
def test_a_model_of_unknown_parts_names_the_parts_there_are(field):
    """Bug: a typing error that builds some other model."""
    with refused(f"{field}='x': choose from {', '.join(sorted(vars(lab)[TABLES[field]]))}"):
        lab.MiniTransformer(shape(**{field: "x"}))

def split_heads(t, heads):
    return t.view(*t.shape[:2], heads, -1).transpose(1, 2)

def softmax_attention(q, k, v):
    hidden = torch.ones(q.size(2), q.size(2)).triu(1).bool()
    scores = (q @ k.transpose(2, 3) * q.size(-1) ** -0.5).masked_fill(hidden, -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

def gpt2(w, ids, H, L):
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])
    def dense(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]
    x = w["token_emb.weight"][ids] + w["position_emb"][: ids.size(1)]
    for p in (f"blocks.{i}." for i in range(L)):
        qkv = dense(norm(x, p + "ln_attn"), p + "attn.qkv_proj").chunk(3, -1)
        x = x + dense(softmax_attention(*(split_heads(t, H) for t in qkv)), p + "attn.out_proj")
        wide = dense(norm(x, p + "ln_ffn"), p + "ffn.up_proj")
        x = x + dense(F.gelu(wide, approximate="tanh"), p + "ffn.down_proj")
    return norm(x, "ln_final") @ w["token_emb.weight"].T

def llama(w, ids, H, L, G=2):
    def norm(x, name):
        return x * (x.pow(2).mean(-1, True) + 1e-5).rsqrt() * w[name + ".weight"]
    def turned(t):                     # t * cos + (-second half, first half) * sin
        D = t.size(-1)
        angle = torch.arange(t.size(2))[:, None] / 1e4 ** (torch.arange(0, D, 2) / D).repeat(2)
        return t * angle.cos() + torch.cat([-t[..., D // 2 :], t[..., : D // 2]], -1) * angle.sin()
    x = w["token_emb.weight"][ids]
    C = x.size(-1)
    for p in (f"blocks.{i}." for i in range(L)):
        qkv = norm(x, p + "ln_attn") @ w[p + "attn.qkv_proj.weight"].T
        q, k, v = qkv.split([C, G * C // H, G * C // H], -1)
        k, v = (split_heads(t, G)[:, [h * G // H for h in range(H)]] for t in (k, v))
        out = softmax_attention(turned(split_heads(q, H)), turned(k), v)
        x = x + out @ w[p + "attn.out_proj.weight"].T
        y = norm(x, p + "ln_ffn")
        y = F.silu(y @ w[p + "ffn.gate_proj.weight"].T) * (y @ w[p + "ffn.up_proj.weight"].T)
        x = x + y @ w[p + "ffn.down_proj.weight"].T
    return norm(x, "ln_final") @ w["token_emb.weight"].T

@pytest.mark.parametrize("name, reference", [("GPT2_STYLE", gpt2), ("LLAMA_STYLE", llama)])
def test_a_famous_model_gives_the_numbers_of_the_original(name, reference):
    """Bug: a model that is like GPT-2 or Llama but could not run their weights."""
    c = dataclasses.replace(getattr(lab, name), vocab_size=19, block_size=8, n_layers=2,
                            n_heads=4, d_model=32, d_ff=48)
    model, ids = loud(lab.MiniTransformer(c)), torch.randint(19, (3, 8))
    for p in model.parameters():
        p.data *= 0.5
    close(model(ids)[0], reference(model.state_dict(), ids, 4, 2))

@pytest.mark.parametrize("causal", [True, False])
def test_a_prediction_depends_on_every_earlier_character_and_no_other(
        positions, attention, causal):
    """Bug: the future or another row leaks in; part of the past is never seen."""
    model = loud_model(positions=positions, attention=attention, causal=causal, dropout=0.2)
    model.token_emb.register_forward_hook(lambda *a: leaf.append(a[2]))
    leaf, ids = [], torch.randint(11, (2, 8))
    logits, probe = model(ids)[0], torch.randn(11)
    for t in range(8):
        grad, = torch.autograd.grad(logits[0, t] @ probe, leaf[0], retain_graph=True)
        sees = grad.abs().sum(-1)
        assert (sees[0, : t + 1] > 0).all() and not sees[1].any()
        assert (sees[0, t + 1 :] > 0).all() if not causal else not sees[0, t + 1 :].any()

def test_the_order_of_earlier_characters_is_seen(positions):
    """Bug: a bag of characters. Only with one block and no positions it is right."""
    for n_layers in 1, 2:
        model = loud_model(positions=positions, n_layers=n_layers)
        a, b = (model(torch.tensor([ids]))[0][0, -1] for ids in ([1, 2, 3, 4], [2, 1, 3, 4]))
        bag = positions == "none" and n_layers == 1
        assert ((a - b).abs().max() < 1e-5) == bag

def test_embedding_dropout_is_on_in_training_only():
    """Bug: no dropout on the sum of embedding and position, or dropout in use."""
    model, ids = loud_model(dropout=0.5, positions="learned"), torch.randint(11, (40, 8))
    for block in model.blocks:
        nn.init.zeros_(block.attn.out_proj.weight), nn.init.zeros_(block.ffn.down_proj.weight)
    model.ln_final, model.lm_head = nn.Identity(), nn.Identity()
    x, dropped = model(ids)[0], model.train()(ids)[0]
    close(x, model.token_emb(ids) + model.position_emb)
    kept = dropped != 0
    close(dropped[kept], 2 * x[kept])
    assert 0.45 < kept.float().mean() < 0.55

def test_the_past_changes_nothing_but_the_time(positions):
    """Bug: new positions counted from 0, a past of one block used by another."""
    model, ids, past = loud_model(positions=positions), torch.randint(11, (2, 8)), [[], []]
    parts = [model(part, past=past)[0] for part in ids.split([3, 1, 2, 2], dim=1)]
    close(torch.cat(parts, 1), model(ids)[0])
    for extra, before in (ids, past), (ids[:, [0, *range(8)]], None):
        with refused(r"(16|9) positions: at most block_size=8"):
            model(extra, past=before)

def write_by_hand(model, idx, n, choose):
    """No cache: the window is read anew for every character."""
    limit, heard = model.config.block_size, []
    window = idx[:, -limit:]
    for _ in range(n):
        if window.size(1) > limit:
            window = window[:, -max(1, limit // 2) :]
        heard.append(model(window)[0][:, -1])
        new = choose(heard[-1])
        window, idx = torch.cat([window, new], 1), torch.cat([idx, new], 1)
    return idx, heard

@pytest.mark.parametrize("block_size", [8, 5, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_cached_writing_equals_uncached_past_the_window(
        positions, causal, block_size, monkeypatch):
    """Bug: a stale past, a window that slides wrongly, a prompt cropped at its start."""
    model = loud_model(positions=positions, causal=causal, block_size=block_size)
    for length in 1, 3, block_size, 2 * block_size + 1:
        prompt, heard = torch.randint(11, (2, length)), []
        def greedy(logits, *_, heard=heard):
            heard.append(logits)
            return logits.argmax(-1, keepdim=True)
        monkeypatch.setattr(lab, "sample", greedy)
        written = model.generate(prompt, 3 * block_size + 2)
        expected, logits = write_by_hand(model, prompt, 3 * block_size + 2, greedy)
        assert written.equal(expected) and written[:, :length].equal(prompt)
        close(torch.stack(heard[: len(logits)]), torch.stack(logits), 1e-4)
    assert model.generate(prompt, 0).equal(prompt)

def test_writing_reads_each_new_character_once():
    """Bug: a cache that is built and never used; only the window's moves read more."""
    model, fed = loud_model(), []
    model.token_emb.register_forward_hook(lambda *a: fed.append(a[1][0].size(1)))
    model.generate(torch.zeros(1, 3, dtype=torch.long), 12)
    assert fed == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]

@pytest.mark.parametrize("training", [True, False])
def test_writing_leaves_the_model_as_it_was(training, monkeypatch):
    """Bug: dropout while writing, evaluation mode for ever after, autograd's memory."""
    model, prompt, heard = loud_model(dropout=0.9), torch.randint(11, (3, 4)), []
    expected, draw = model.generate(prompt, 9, temperature=0), lab.sample
    monkeypatch.setattr(lab, "sample", lambda *a: heard.append(a) or draw(*a))
    assert model.train(training).generate(prompt, 9, 0).equal(expected)
    assert model.training == model.blocks[0].drop.training == training
    assert not heard[0][0].requires_grad and torch.is_grad_enabled()
    for b in range(3):                     # a row is what it would be alone
        assert model.generate(prompt[b : b + 1], 9, 0).equal(expected[b : b + 1])
    model.generate(prompt, 1, 0.7, 5, 0.9)
    assert heard[-1][1:] == (0.7, 5, 0.9)
    with refused("an empty prompt: give at least one character"):
        model.generate(prompt[:, :0], 5)

P = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])

@pytest.mark.parametrize("settings, expected", [
    ({}, P), ({"top_k": 99}, P), ({"top_p": 1.0}, P), ({"top_k": 5}, P),
    ({"temperature": 0.5}, P**2), ({"temperature": 2}, P**0.5),
    ({"top_k": 1}, P * (P > 0.35)), ({"top_k": 3}, P * (P > 0.12)),
    ({"top_p": 0.75}, P * (P > 0.12)), ({"top_p": 0.65}, P * (P > 0.2)),
    ({"top_p": 0.01}, P * (P > 0.35)), ({"temperature": 0}, P * (P > 0.35)),
    ({"top_k": 2, "top_p": 0.5}, P * (P > 0.35)),      # 0.4 is 0.57 of the two
    ({"temperature": 0.5, "top_p": 0.55}, P * (P > 0.35))])
def test_characters_are_drawn_with_the_probabilities_asked_for(settings, expected):
    """Bug: temperature multiplied; one character too many or too few in top-k, top-p."""
    other = P.flip(0).log() - 7            # another row, another order, a shift
    ids = lab.sample(torch.stack([P.log(), other]).repeat_interleave(30000, 0), **settings)
    assert ids.shape == (60000, 1)
    if settings.get("temperature") == 0.5 and not settings.get("top_p"):
        expected = P**2
    for drawn, target in (ids[:30000], expected), (ids[30000:], expected.flip(0)):
        drawn = drawn.flatten().bincount(minlength=5) / 30000
        close(drawn, target / target.sum(), 0.015)
        assert ((drawn > 0) == (target > 0)).all()

def test_the_nucleus_stops_where_its_probability_is_reached():
    """Bug: > for >=: a character more than needed. Settings out of range are refused."""
    assert len(lab.sample(torch.zeros(999, 4), top_p=0.5).unique()) == 2
    for settings in {"temperature": -0.1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}:
        (name, value), = settings.items()
        with refused(f"{name}={value}: must be "):
            lab.sample(torch.zeros(1, 4), **settings)
