"""Checks for mini_transformer, in the order of its sections. A wrong Transformer, too,
trains, and its loss falls: each test says below its name which bugs it would catch.

    pytest                                     # OMP_NUM_THREADS=1 if others work here
    MODULE=my_transformer pytest -x            # your own, half-typed or whole
"""
import copy
import dataclasses
import hashlib
import importlib
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from threading import Thread
from types import SimpleNamespace

import pytest
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F

pytest_plugins = "pytester"                    # runs pytest inside a test
NAME = os.environ.get("MODULE", "mini_transformer")
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
TEXT = "the cat sat on the mat and the dog sat on the log. " * 12
TABLES = dict(positions="POSITIONS", attention="ATTENTIONS", ffn="FEED_FORWARDS",
              norm="NORMS")
SECTIONS = {name: number for number, names in enumerate([
    "Refused require choose at_least TransformerConfig GPT2_STYLE LLAMA_STYLE "
    "TrainConfig",
    "TEXT_URL TEXT_SHA256 progress write_file load_text CharDataset",
    "angles rotate sinusoidal POSITIONS",
    "NORMS make_norm linear explicit_attention ATTENTIONS CausalSelfAttention",
    "ACTIVATIONS FeedForward SwiGLUFeedForward FEED_FORWARDS", "TransformerBlock",
    "sample MiniTransformer", "orthogonalize muon adamw OPTIMIZERS make_groups update "
    "schedule evaluate bigram_loss write read_checkpoint train true_or_false main"], 1)
    for name in names.split()}

sys.path.insert(0, os.getcwd())
lab, problem = None, None
try:
    lab = importlib.import_module(NAME)
except Exception as error:
    problem = f"{NAME}.py cannot be imported yet: {type(error).__name__}: {error}"
if problem:
    pytest.fail(problem, pytrace=False)
URL = vars(lab).get("TEXT_URL")

def not_written_yet(name):
    """Python calls this when lab.name is missing: say which section to type next."""
    if name in SECTIONS:
        first = next(n for n in SECTIONS if n not in vars(lab))
        pytest.fail(f"section {SECTIONS[first]} is next: {first} is not written yet",
                    pytrace=False)
    raise AttributeError(name)

lab.__getattr__ = not_written_yet

def pytest_generate_tests(metafunc):
    """A test with the argument ffn runs for every entry of FEED_FORWARDS; and so on."""
    for argument in set(TABLES) & set(metafunc.fixturenames):
        entries = vars(lab).get(TABLES[argument], ["not written yet"])
        metafunc.parametrize(argument, list(entries))

@pytest.fixture(autouse=True)
def patch(tmp_path, monkeypatch):
    """An empty folder, a fixed seed, no network. patch(object, name, value) ends with
    the test."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(lab, "TEXT_URL", "http://127.0.0.1:9/nobody", raising=False)
    torch.manual_seed(0)
    yield monkeypatch.setattr
    torch.set_num_threads(threads)

def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def refused(message):
    return pytest.raises(ValueError, match="^" + message)

def shape(**changes):
    tiny = dict(vocab_size=11, block_size=8, n_layers=2, n_heads=2, d_model=16, d_ff=24)
    return lab.TransformerConfig(**(tiny | changes))

def loud(module):
    """Weights far from their tiny start, so that no wrong term hides in a tolerance."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.eval()

def loud_model(**changes):
    return loud(lab.MiniTransformer(shape(**changes)))

# ==== 1. Constants ====================================================================
@pytest.mark.parametrize("changes, message", [
    *[({name: n}, f"{name}={n}: must be at least 1") for n in (0, -1) for name in
      "vocab_size block_size n_layers n_heads n_kv_heads d_model d_ff".split()],
    ({"d_model": 12, "n_heads": 4}, "d_model=12: must be a multiple of 2 x n_heads=4"),
    *[({"n_kv_heads": n, "n_heads": 4}, f"n_kv_heads={n}: must divide n_heads=4")
      for n in (3, 8)],
    *[({"dropout": p}, rf"dropout={p}: must be in \[0, 1\)") for p in (-0.1, 1.0)]])
def test_sizes_that_cannot_be_are_refused_at_once(changes, message):
    """Bug: an odd head size shows up later, as a puzzle; a limit is off by one."""
    with refused(message):
        shape(**changes)
    names = "vocab_size block_size n_layers n_heads n_kv_heads d_ff".split()
    assert shape(**dict.fromkeys(names, 1), d_model=2).d_ff == 1

def test_an_unknown_name_lists_the_choices():
    """Bug: a KeyError that leaves the reader guessing what there is."""
    assert lab.choose("ffn", {"a": 1, "b": 2}, "b") == 2
    with refused("ffn='swigl': choose from a, b$"):
        lab.choose("ffn", {"b": 2, "a": 1}, "swigl")

def test_the_defaults_are_those_of_the_readmes_figures():
    """Bug: a constant left at an experiment's value; nobody gets the figures again."""
    config, like = lab.TransformerConfig(), lab.TransformerConfig
    assert vars(config) == dict(
        vocab_size=65, block_size=128, n_layers=4, n_heads=4, d_model=128, d_ff=512,
        dropout=0.0, bias=False, positions="rope", attention="fused", n_kv_heads=None,
        causal=True, ffn="swiglu", norm="layernorm", qk_norm=True, pre_norm=True,
        tie_weights=True)
    assert vars(lab.TrainConfig()) == dict(
        text_path="input.txt", max_steps=1800, batch_size=8, accumulation_steps=3,
        optimizer="muon", learning_rate=6e-3, muon_learning_rate=0.02, warmup_steps=100,
        decay_steps=0, weight_decay=0.1, grad_clip=1.0, precision="float32",
        device="auto", threads=0, compile=False, seed=1337, eval_interval=600,
        checkpoint_path="checkpoint.pt", history_path="history.csv", resume=False,
        prompt=None, sample_chars=500, temperature=0.8, top_k=None, top_p=None)
    assert lab.LLAMA_STYLE == like(norm="rmsnorm", n_kv_heads=2, qk_norm=False)
    assert lab.GPT2_STYLE == like(positions="learned", ffn="gelu_tanh", qk_norm=False,
                                  bias=True)

# ==== 2. Data =========================================================================
def test_decoding_undoes_encoding():
    """Bug: ids that depend on the run, or fit only 256; a KeyError for a character."""
    ds = lab.CharDataset("hello wörld\n", 4)
    assert ds.decode(ds.encode("röd wold\n")) == "röd wold\n"
    assert ds.itos == sorted("helo wörd\n") and ds.vocab_size == 10
    assert [ds.stoi[c] for c in ds.itos] == ds.encode(ds.itos) == list(range(10))
    with refused(r"\['x', 'z'\]: not in the vocabulary '\\n dehlorwö'"):
        ds.encode("zox")
    many = "".join(map(chr, range(1000, 1300)))
    assert lab.CharDataset(many, 4).decode(lab.CharDataset(many, 4).data) == many

def test_targets_are_the_inputs_one_character_later():
    """Bug: unshifted targets (a loss far below ln V at once), or windows left out."""
    ds = lab.CharDataset("abcdefghij", 4)
    for i in range(6):
        x, y = ds[i]
        assert x.dtype == y.dtype == torch.int64 and len(ds) == 6
        assert x.tolist() == list(range(i, i + 4)) and y.tolist() == (x + 1).tolist()
    with pytest.raises(IndexError):
        ds[6]
    x, y = ds[torch.tensor([[5], [0]])]
    assert x.tolist() == [[5, 6, 7, 8], [0, 1, 2, 3]] and y[0].tolist() == [6, 7, 8, 9]
    assert len(lab.CharDataset("abcde", 4)) == 1
    with refused("4 characters: .*block_size=4"):
        lab.CharDataset("abcd", 4)

@pytest.fixture
def site(patch):
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
    patch(lab, "TEXT_URL", f"http://127.0.0.1:{server.server_port}/")
    patch(lab, "TEXT_SHA256", hashlib.sha256(Page.body).hexdigest())
    yield Page
    server.shutdown()
    server.server_close()

def test_the_text_is_downloaded_once_and_kept(site, patch):
    """Bug: a download per run; bytes changed on the way; a dead server waited for."""
    path, get, asked, said = lab.TrainConfig.text_path, requests.get, [], []
    patch(lab, "progress", said.append)
    patch(requests, "get", lambda *a, **k: asked.append(k) or get(*a, **k))
    for kind in Path, str:
        assert lab.load_text(kind(path)) == site.body.decode()
    assert Path(path).read_bytes() == site.body and os.listdir() == [path]
    assert site.hits == len(asked) == 1 <= asked[0]["timeout"] <= 120
    assert said == ["downloading input.txt"]
    patch(requests, "get", lambda *a, **k: 1 / 0)
    Path(path).unlink()
    with pytest.raises(ZeroDivisionError):     # a bug of ours is no absent network
        lab.load_text(path)

@pytest.mark.parametrize("problem", ["404", "other text", "cut short", "offline"])
def test_a_page_that_is_not_the_text_is_never_kept(problem, site, patch, capsys):
    """Bug: an error page or half a file saved as the corpus for ever."""
    site.status = 404 if problem == "404" else 200
    site.missing = 5 if problem == "cut short" else 0
    if problem == "other text":
        patch(lab, "TEXT_SHA256", "0" * 64)
    if problem == "offline":
        patch(lab, "TEXT_URL", "http://127.0.0.1:9/nobody")
    assert lab.load_text(lab.TrainConfig.text_path) == "\n".join(topics.values())
    said = capsys.readouterr().out
    assert "No download" in said and "training on Python's documentation" in said
    assert ("bytes that are not" in said) == (problem == "other text")
    assert os.listdir() == []

def test_your_own_text_is_utf8_and_never_replaced_by_a_download(site, patch):
    """Bug: a typing error that trains on Shakespeare; the encoding of the computer."""
    patch(lab.TrainConfig, "text_path", "mine.txt")      # also as the default
    with pytest.raises(FileNotFoundError):
        lab.load_text("mine.txt")
    Path("mine.txt").write_bytes("é日".encode())
    read, asked = Path.read_text, []
    patch(Path, "read_text", lambda *a, **k: asked.extend([*a[1:], *k.values()]) or
          read(*a, **k))
    assert lab.load_text("mine.txt") == "é日" and asked[0].lower() == "utf-8"
    Path("mine.txt").write_bytes(b"\xff\xfe")
    with refused("'utf-8' codec"):
        lab.load_text("mine.txt")
    assert site.hits == 0

def test_the_known_text_is_tiny_shakespeare():
    """Bug: one wrong letter or digit, and every download is refused."""
    assert URL == ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
    assert lab.TEXT_SHA256 == (
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")

def test_a_failed_write_leaves_the_old_file_whole(patch):
    """Bug: a full disk that destroys the checkpoint of the night."""
    patch(Path, "rename", None)                # on Windows it does not replace a file
    names = []
    lab.write_file("file", lambda name: Path(name).write_text("old"))
    with pytest.raises(ZeroDivisionError):
        lab.write_file("file", lambda name: Path(name).write_text("half of th") / 0)
    assert Path("file").read_text() == "old"
    lab.write_file("file", lambda name: Path(name).write_text("new"))
    assert Path("file").read_text() == "new" and os.listdir() == ["file"]
    Path("other_disk").mkdir()
    lab.write_file("other_disk/file", lambda name: Path(name).touch() or names.append(
        Path(name).parent))
    assert names == [Path("other_disk")]       # only there is a renaming possible

def test_progress_is_shown_on_a_terminal_only(patch, capsys):
    """Bug: a log file with thousands of overwritten lines, or letters left standing."""
    lab.progress("step 1")
    assert capsys.readouterr().out == ""
    patch(sys.stdout, "isatty", lambda: True, raising=False)
    lab.progress("step 1")
    assert re.fullmatch(r"\rstep 1 {60,}\r", capsys.readouterr().out)

# ==== 3. Positions ====================================================================
def test_angles_and_sinusoids_equal_the_papers_table():
    """Bug: the exponent off by a factor; positions in half precision, where 257 is
    256; sines and cosines in halves, not by turns."""
    expected = [[t / 10000 ** (d / 4) for d in range(4)] for t in range(300)]
    close(lab.angles(300, 4), torch.tensor(expected))
    expected = [[0.02 * [math.sin, math.cos][c % 2](t / 10000 ** (c // 2 * 2 / 6))
                 for c in range(6)] for t in range(30)]
    close(lab.sinusoidal(30, 6), torch.tensor(expected), 1e-6)

def test_rope_is_multiplication_by_a_complex_number():
    """Bug: a sign of the rotation, or neighbours paired instead of the two halves."""
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angle)
    close(lab.rotate(x, angle), torch.cat([turned.real, turned.imag], dim=-1))
    far = 2 * math.pi * torch.arange(200, 205)[:, None]  # whole turns, also in bfloat16
    close(lab.rotate(x.bfloat16(), angle + far).float(), lab.rotate(x, angle), 0.05)

def test_rope_makes_the_dot_product_depend_on_distance_only():
    """Bug: a stretch beside the turn; distances that all look alike."""
    q, k = (lab.rotate(torch.randn(1, 1, 1, 8).expand(1, 1, 20, 8), lab.angles(20, 4))
            for _ in range(2))
    score = (q @ k.mT)[0, 0]
    close(score[1:, 1:], score[:-1, :-1])
    assert (score[0, 1:] - score[0, :-1]).abs().min() > 1e-4

# ==== 4. Attention ====================================================================
def test_attention_is_an_average_of_values_weighted_by_similarity(attention):
    """Bug: no 1/sqrt(D), softmax over the wrong axis, a mask inverted or ignored."""
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (4, 6, 6))
    seen, rows = torch.ones(4, 6, dtype=torch.bool).tril(2), []
    for b, h, t in product(range(2), range(3), range(4)):
        weight = [(q[b, h, t] @ k[b, h, s] / 8**0.5).exp() for s in range(t + 3)]
        rows.append(sum(w / sum(weight) * v[b, h, s] for s, w in enumerate(weight)))
    results = []
    for out in (torch.stack(rows).view_as(q), lab.ATTENTIONS[attention](q, k, v, seen),
                F.scaled_dot_product_attention(q, k, v, seen)):
        results.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v])))
    close(results[0], results[1])
    close(results[1], results[2])
    assert {"fused", "explicit"} <= set(lab.ATTENTIONS)

def normed(x, kind):
    """Ba 2016; without the mean: Zhang 2019."""
    x = x - x.mean(-1, keepdim=True) * (kind == "layernorm")
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

def attention_by_hand(attn, x, c):
    """Head by head, query by query, key by key; a pair of numbers is a complex one."""
    (B, T, C), H, G = x.shape, c.n_heads, c.n_kv_heads or c.n_heads
    D = C // H
    heads, out = attn.qkv_proj(x).view(B, T, H + 2 * G, D), torch.zeros(B, T, H, D)
    def turned(head, t):
        z = normed(heads[:, t, head], c.norm) if c.qk_norm else heads[:, t, head]
        angle = t * 1e4 ** (-torch.arange(D // 2) / (D // 2)) * (c.positions == "rope")
        z = torch.complex(z[:, : D // 2], z[:, D // 2 :]) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], dim=-1)
    for t, h in product(range(T), range(H)):
        keys, group = range(t + 1 if c.causal else T), h // (H // G)
        scores = [(turned(h, t) * turned(H + group, s)).sum(-1) / D**0.5 for s in keys]
        weights = torch.stack(scores).softmax(0)
        v = heads[:, :, H + G + group]
        out[:, t, h] = sum(weights[s, :, None] * v[:, s] for s in keys)
    return attn.out_proj(out.flatten(2))

@pytest.mark.parametrize("changes", [
    {}, {"positions": "none"}, {"qk_norm": False}, {"causal": False}, {"n_kv_heads": 2},
    {"n_kv_heads": 1, "bias": True}, {"positions": "learned", "qk_norm": False},
    {"norm": "rmsnorm"}])
def test_attention_layer_equals_attention_by_hand(attention, changes):
    """Bug: rope on the values, norm after rope, groups repeated in the wrong order."""
    c = shape(n_heads=4, d_model=32, attention=attention, **changes)
    attn, x = loud(lab.CausalSelfAttention(c)), torch.randn(2, 8, 32)
    close(attn(x), attention_by_hand(attn, x, c))
    attn.qkv_proj.weight.data *= 1e-2          # small: the epsilon of qk_norm is seen
    close(attn(x), attention_by_hand(attn, x, c))

def test_grouped_queries_equal_full_heads_with_repeated_weights():
    """Bug: repeat (0 1 0 1) where repeat_interleave (0 0 1 1) is meant."""
    few, full = (loud(lab.CausalSelfAttention(shape(n_heads=4, n_kv_heads=g)))
                 for g in (2, None))
    q, k, v = few.qkv_proj.weight.data.view(8, 4, 16).split([4, 2, 2])
    twice, x = [0, 0, 1, 1], torch.randn(2, 8, 16)
    full.qkv_proj.weight.data = torch.cat([q, k[twice], v[twice]]).flatten(0, 1)
    full.out_proj.weight.data = few.out_proj.weight.data
    close(few(x), full(x))

def test_shifting_all_positions_changes_nothing_for_rope():
    """Bug: positions that leak into the values or turn queries and keys differently."""
    attn, x = loud(lab.CausalSelfAttention(shape())), torch.randn(2, 8, 16)
    before = attn(x)
    attn.angle.copy_(lab.angles(100, 4)[92:])
    close(attn(x), before)
    attn.angle.copy_(1.5 * attn.angle)         # stretching them does change it
    assert (attn(x) - before).abs().max() > 1e-3

def test_the_past_holds_one_key_and_value_per_group_and_position(attention):
    """Bug: a cache that forgets, repeats the heads, or rotates by the wrong offset."""
    attn = loud(lab.CausalSelfAttention(shape(n_kv_heads=1, attention=attention)))
    x, past = torch.randn(2, 8, 16), []
    parts = [attn(part, past) for part in x.split([3, 1, 2, 2], dim=1)]
    close(torch.cat(parts, 1), attn(x))
    assert [t.shape for t in past] == [(2, 1, 8, 8)] * 2

# ==== 5. Feed-forward =================================================================
ACTIVATIONS = {
    "relu": lambda x: max(x, 0), "relu2": lambda x: max(x, 0) ** 2,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / (1 + math.exp(-1.5957691216 * (x + 0.044715 * x**3))),
    "swiglu": lambda x: x / (1 + math.exp(-x))}

def feed_by_hand(layer, x, ffn):
    up = layer.up_proj(x)
    gate = layer.gate_proj(x) if ffn == "swiglu" else up
    bent = gate.detach().clone().apply_(ACTIVATIONS[ffn])
    return layer.down_proj(bent * up if ffn == "swiglu" else bent)

@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_equals_its_formula(ffn, bias):
    """Bug: an activation missing, on the wrong path, or a near relative of it."""
    layer = loud(lab.FEED_FORWARDS[ffn](shape(ffn=ffn, bias=bias, d_ff=25 + bias)))
    x = torch.randn(2, 5, 16)
    assert layer(x).shape == x.shape and set(ACTIVATIONS) <= set(lab.FEED_FORWARDS)
    close(layer(x)[:, 2:3], layer(x[:, 2:3]))            # each position by itself
    if ffn in ACTIVATIONS:
        close(layer(x), feed_by_hand(layer, x, ffn))
        width = (2 * (25 + bias) // 3) if ffn == "swiglu" else 25 + bias
        assert layer.up_proj.out_features == width
        names = {name for name, _ in layer.named_parameters() if "bias" in name}
        assert names == {f"{part}_proj.bias" for part in
                         ["up", "down", "gate"][: 2 + (ffn == "swiglu")] * bias}
    with refused("ffn='x': choose from "):
        lab.FeedForward(shape(ffn="x"))

# ==== 6. Block ========================================================================
def norm_by_hand(layer, x, kind):
    x = normed(x, kind) * layer.weight
    return x + layer.bias if kind == "layernorm" else x

def test_norms_equal_their_formulas(norm):
    """Bug: the mean not removed, the epsilon outside the root or of another size."""
    assert {"layernorm", "rmsnorm"} <= set(lab.NORMS)
    layer, x = loud(lab.make_norm(shape(norm=norm), 16)), torch.randn(4, 16) * 0.003
    assert layer(x).shape == x.shape
    if norm in ("layernorm", "rmsnorm"):
        close(layer(x), norm_by_hand(layer, x, norm))

def renamed(items):
    """Our names of a block's parts -> PyTorch's."""
    names = {"attn.qkv_proj.": "self_attn.in_proj_", "ffn.up_proj": "linear1",
             "attn.out_proj": "self_attn.out_proj", "ffn.down_proj": "linear2",
             "ln_attn": "norm1", "ln_ffn": "norm2"}
    ours = re.compile("^(" + "|".join(names) + ")")
    return {ours.sub(lambda m: names[m[1]], name): value for name, value in items}

@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_block_equals_pytorchs_in_values_and_gradients(
        attention, pre_norm, activation):
    """Bug: a residual missing, norms in the wrong place, heads mixed: eight in one."""
    ours = loud(lab.TransformerBlock(shape(
        bias=True, qk_norm=False, positions="none", norm="layernorm", ffn=activation,
        attention=attention, pre_norm=pre_norm)))
    theirs = nn.TransformerEncoderLayer(
        16, 2, 24, 0.0, activation, batch_first=True, norm_first=pre_norm)
    theirs.load_state_dict(renamed(ours.state_dict().items()))
    x, probe = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    mask, results = nn.Transformer.generate_square_subsequent_mask(8), []
    for block, options in (ours, {}), (theirs, {"src_mask": mask}):
        start = x.clone().requires_grad_()
        out = block(start, **options)
        (out * probe).sum().backward()
        grads = renamed((name, p.grad) for name, p in block.named_parameters())
        results.append({"out": out, "x": start.grad} | grads)
    close(*results, 1e-4)

# ==== 7. Model ========================================================================
def sizes(c):
    """Parameters by formula: attention, two or three matrices, norms, embedding."""
    C, D, gated, b = c.d_model, c.d_model // c.n_heads, c.ffn == "swiglu", c.bias
    width = 2 * c.d_ff // 3 if gated else c.d_ff
    qkv = C + 2 * D * (c.n_kv_heads or c.n_heads)
    block = (C + b) * (qkv + C) + 4 * C
    block += (1 + gated) * (C + b) * width + (width + b) * C
    tables = (2 - c.tie_weights) * c.vocab_size * C + (c.positions == "learned") * 8 * C
    return c.n_layers * block + 2 * C + tables

@pytest.mark.parametrize("changes", [
    {}, {"positions": "learned", "bias": True}, {"n_kv_heads": 1}, {"n_layers": 2},
    {"tie_weights": False},
    {"ffn": "relu", "bias": True, "positions": "none"}, {"positions": "sinusoidal"}])
def test_an_untrained_model_has_the_right_size_and_guesses_blindly(changes):
    """Bug: a matrix too many; weights not tied; a start too large or misplaced."""
    c = shape(**dict(vocab_size=300, d_model=128, d_ff=96, n_layers=8) | changes)
    model, ids = lab.MiniTransformer(c), torch.randint(300, (16, 9))
    params = dict(model.named_parameters())
    assert sum(p.numel() for p in params.values()) == sizes(c)
    assert set(model.state_dict()) | {"lm_head.weight"} == {*params, "lm_head.weight"}
    assert (model.lm_head.weight is model.token_emb.weight) == c.tie_weights
    for name, p in params.items():
        writer = name.endswith(("out_proj.weight", "down_proj.weight"))
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * c.n_layers) if writer else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.08), name
        elif "proj" in name:
            assert not p.any()
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)
    picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    close(loss, -picked.sum() / 128)
    assert logits.shape == (16, 8, 300) and model(ids[:, :8])[1] is None

def test_a_model_moves_as_a_whole_and_its_stream_stays_float32(positions, patch):
    """Bug: a mask or a table left on the CPU; bfloat16 where the sums are made."""
    model, seen, ids = loud_model(positions=positions), [], torch.zeros(1, 4).long()
    model.ln_final.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert seen == [torch.float32]
    assert model.to("meta")(ids.to("meta"))[0].device.type == "meta"
    patch(lab, "fused_adamw", lambda params, grads, *state, **_: averages.extend(state))
    averages, grads = [], [torch.zeros(2, device="meta")]
    lab.adamw(grads, grads, [], 0.1, 0.1)
    assert {x.device.type for part in averages for x in part} == {"meta"}

@pytest.mark.parametrize("field", list(TABLES))
def test_a_model_of_unknown_parts_names_the_parts_there_are(field):
    """Bug: a typing error that builds some other model."""
    known = sorted(getattr(lab, TABLES[field]))
    for build in lab.MiniTransformer, lab.TransformerBlock:
        with refused(f"{field}='x': choose from {', '.join(known)}"):
            build(shape(**{field: "x"}))

def model_by_hand(model, ids, c, kept=1):
    """The whole model from its weights; dropout multiplies by kept."""
    def attend(block, x):
        return kept * attention_by_hand(block.attn, x, c)
    def feed(block, x):
        return kept * feed_by_hand(block.ffn, x, c.ffn)
    def norm(layer, x):
        return norm_by_hand(layer, x, c.norm)
    added = {"learned": model.position_emb, "sinusoidal": lab.sinusoidal(8, c.d_model)}
    x = kept * (model.token_emb.weight[ids] + added.get(c.positions, 0))
    for block in model.blocks:
        if c.pre_norm:
            x = x + attend(block, norm(block.ln_attn, x))
            x = x + feed(block, norm(block.ln_ffn, x))
        else:
            x = norm(block.ln_attn, x + attend(block, x))
            x = norm(block.ln_ffn, x + feed(block, x))
    return (norm(model.ln_final, x) if c.pre_norm else x) @ model.lm_head.weight.T

@pytest.mark.parametrize("style", [
    "GPT2_STYLE", "LLAMA_STYLE", {}, {"positions": "none", "tie_weights": False},
    {"pre_norm": False, "positions": "sinusoidal", "ffn": "relu2", "bias": True}])
@torch.no_grad()
def test_a_model_gives_the_numbers_of_its_formulas(style):
    """Bug: a model that is like GPT-2 or Llama but could not run their weights;
    dropout on the stream instead of on what joins it, or while writing."""
    style = getattr(lab, style) if isinstance(style, str) else shape(**style)
    c = dataclasses.replace(style, vocab_size=19, block_size=8, n_layers=2, n_heads=4,
                            d_model=32, d_ff=48, dropout=0.25)
    model, ids = loud(lab.MiniTransformer(c)), torch.randint(19, (3, 8))
    close(model(ids)[0], model_by_hand(model, ids, c))
    for small in (model.token_emb, *(layer for block in model.blocks for layer in
                                     (block.attn.out_proj, block.ffn.down_proj))):
        small.weight.data *= 1e-3              # so small that every epsilon is seen
    close(1e3 * model(ids)[0], 1e3 * model_by_hand(model, ids, c), 1e-4)
    assert (model.train()(ids)[0] - model(ids)[0]).any()
    drops = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert {drop.p for drop in drops} == {0.25}
    for drop in drops:
        drop.forward = lambda x: 2 * x
    close(1e3 * model(ids)[0], 1e3 * model_by_hand(model, ids, c, 2), 1e-4)

@pytest.mark.parametrize("causal", [True, False])
def test_a_prediction_depends_on_every_earlier_character_and_no_other(
        positions, attention, causal):
    """Bug: a mask off by one; rows mixed. Without a mask this very check must fail."""
    model = loud_model(positions=positions, attention=attention, causal=causal)
    leaf = []
    model.token_emb.register_forward_hook(lambda *a: leaf.append(a[2]))
    logits, probe = model(torch.randint(11, (2, 8)))[0], torch.randn(11)
    for t in range(8):
        grad, = torch.autograd.grad(logits[0, t] @ probe, leaf[0], retain_graph=True)
        sees = grad.abs().sum(-1)
        assert (sees[0, : t + 1] > 0).all() and not sees[1].any()
        assert not sees[0, t + 1 :].any() if causal else (sees[0, t + 1 :] > 0).all()

def test_the_order_of_earlier_characters_is_seen(positions):
    """Bug: a bag of characters. Only with one block and no positions it is right."""
    assert {"rope", "learned", "sinusoidal", "none"} <= set(lab.POSITIONS)
    for n_layers in 1, 2:
        model = loud_model(positions=positions, n_layers=n_layers)
        a, b = (model(torch.tensor([ids]))[0][0, -1] for ids in
                ([1, 2, 3, 4], [2, 1, 3, 4]))
        assert ((a - b).abs().max() < 1e-5) == (positions == "none" and n_layers == 1)

@pytest.mark.parametrize("pre_norm", [True, False])
def test_the_past_changes_nothing_but_the_time(positions, pre_norm):
    """Bug: new positions counted from 0; the past of one block used by another."""
    model = loud_model(positions=positions, pre_norm=pre_norm)
    ids = torch.randint(11, (2, 8))
    past = [[], []]
    parts = [model(part, past=past)[0] for part in ids.split([3, 1, 2, 2], dim=1)]
    close(torch.cat(parts, 1), model(ids)[0])
    assert loud_model(n_layers=1).generate(ids[:, :2], 3).shape == (2, 5)
    for extra, before in (ids, past), (ids[:, [0, *range(8)]], None):
        with refused(r"(16|9) positions: at most block_size=8"):
            model(extra, past=before)

@pytest.mark.parametrize("block_size", [8, 5, 1, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_cached_writing_equals_uncached_past_the_window(
        positions, causal, block_size, patch):
    """Bug: a stale past; a window that slides wrongly; the wrong end of the prompt."""
    model = loud_model(positions=positions, causal=causal, block_size=block_size)
    for length in 1, block_size, 2 * block_size + 1:     # 40: half of it is much
        heard, idx = [], torch.randint(11, (2, length))
        patch(lab, "sample", lambda logits, *_, heard=heard: (
            heard.append(logits) or logits.argmax(-1, keepdim=True)))
        written, window = model.generate(idx, 20), idx[:, -block_size:]
        for t in range(20):
            if window.size(1) > block_size:
                window = window[:, -max(1, block_size // 2) :]
            close(heard[t], model(window)[0][:, -1], 1e-4)
            window = torch.cat([window, written[:, length + t, None]], 1)
        assert written.equal(torch.cat([idx, *(h.argmax(-1, True) for h in heard)], 1))

@pytest.mark.parametrize("training", [True, False])
def test_writing_leaves_the_model_as_it_was(training, patch):
    """Bug: dropout or autograd while writing; a cache that is built and never used."""
    model, prompt, heard = loud_model(dropout=0.9), torch.randint(11, (3, 3)), []
    expected, draw, fed = model.generate(prompt, 12, temperature=0), lab.sample, []
    model.token_emb.register_forward_hook(lambda *a: fed.append(a[1][0].size(1)))
    patch(lab, "sample", lambda *a: heard.append(a) or draw(*a))
    assert model.train(training).generate(prompt, 12, 0).equal(expected)
    assert fed == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]     # once, and two new starts
    assert model.training == model.blocks[0].drop.training == training
    assert not heard[0][0].requires_grad and torch.is_grad_enabled()
    for b in range(3):                         # a row is what it would be alone
        assert model.generate(prompt[b : b + 1], 12, 0).equal(expected[b : b + 1])
    assert model.generate(prompt, 0).equal(prompt)
    model.generate(prompt, 1, 0.7, 5, 0.9)
    assert heard[-1][1:] == (0.7, 5, 0.9)
    model.generate(prompt, 1)
    assert heard[-1][1:] == (1.0, None, None)
    for wrong, setting, message in [(prompt, -1, "temperature=-1: must be at least"), (
            prompt[:, :0], 1, "an empty prompt: give at least one character")]:
        with refused(message):
            model.train(training).generate(wrong, 5, setting)
        assert model.training == training

P = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])

@pytest.mark.parametrize("settings, expected", [
    ({}, P), ({"top_k": 99}, P), ({"top_p": 1.0}, P), ({"top_k": 5}, P),
    ({"temperature": 0.5}, P**2), ({"temperature": 2}, P**0.5),
    ({"top_k": 1}, P * (P > 0.35)), ({"top_k": 3}, P * (P > 0.12)),
    ({"top_p": 0.75}, P * (P > 0.12)), ({"top_p": 0.65}, P * (P > 0.2)),
    ({"top_p": 0.01}, P * (P > 0.35)), ({"temperature": 0}, P * (P > 0.35)),
    ({"top_p": 0.57, "temperature": 2}, P**0.5 * (P > 0.12)),
    ({"top_k": 2, "top_p": 0.5}, P * (P > 0.35))])       # 0.4 is 0.57 of the two
def test_characters_are_drawn_with_the_probabilities_asked_for(settings, expected):
    """Bug: temperature multiplied; one character too many or too few may be drawn."""
    rows = torch.stack([P.log(), P.flip(0).log() - 7]).repeat_interleave(30000, 0)
    ids = lab.sample(rows, **settings)
    assert ids.shape == (60000, 1)
    for drawn, target in (ids[:30000], expected), (ids[30000:], expected.flip(0)):
        drawn = drawn.flatten().bincount(minlength=5) / 30000
        close(drawn, target / target.sum(), 0.015)
        assert ((drawn > 0) == (target > 0)).all()

def test_the_nucleus_stops_where_its_probability_is_reached():
    """Bug: > for >=; low temperatures taken for 0; settings out of range."""
    alike = torch.zeros(999, 4)
    assert len(lab.sample(alike, top_p=0.5).unique()) == 2
    assert len(lab.sample(alike, 0.01).unique()) == 4
    for name, value in [("temperature", -0.1), ("top_k", 0), ("top_k", -1),
                        ("top_p", 0.0), ("top_p", -0.5), ("top_p", 1.1)]:
        with refused(f"{name}={value}: must be "):
            lab.sample(alike, **{name: value})

# ==== 8. Training =====================================================================
@pytest.mark.parametrize("settings, table", [
    (dict(warmup_steps=4, max_steps=12), {0: 0.25, 1: 0.5, 3: 1, 4: 1, 6: 0.853553,
                                          8: 0.5, 10: 0.146447, 12: 0, 99: 0}),
    (dict(warmup_steps=0, max_steps=4), {0: 1, 1: 0.853553, 2: 0.5, 4: 0}),
    (dict(warmup_steps=5, max_steps=5), {0: 0.2, 4: 1, 5: 1}),
    (dict(warmup_steps=2, max_steps=3), {0: 0.5, 2: 1, 3: 0}),
    (dict(warmup_steps=2, max_steps=3, decay_steps=6), {0: 0.5, 2: 1, 4: 0.5, 6: 0})])
def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine(settings, table):
    """Bug: a first step of 0, a division by 0, a cosine that ends elsewhere."""
    s = lab.TrainConfig(**settings)
    close([lab.schedule(step, s) for step in table], [float(v) for v in table.values()])

@pytest.mark.parametrize("size", [(16, 16), (8, 24), (24, 8)])
def test_muon_equals_its_formula_and_nearly_pytorchs_in_bfloat16(size):
    """Bug: a coefficient, momentum or Nesterov wrong; decay; tall matrices slow."""
    def turned(x):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        s /= s.norm() + 1e-7
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return u @ s.diag() @ vt
    stack = torch.randn(4, *size) * torch.tensor([0, 1e-8, 1, 9])[:, None, None]
    close(lab.orthogonalize(stack), torch.stack([turned(x) for x in stack]), 1e-4)
    ours, theirs, hand = torch.randn(size).expand(3, *size).clone()
    mean, start, options = torch.zeros(size), ours.clone(), dict(lr=.02, weight_decay=2)
    other = ours.clone()                       # of the same shape, so in the same stack
    muon, state = torch.optim.Muon([theirs], **options), []
    for _ in range(4):
        theirs.grad = grad = torch.randn(size)
        lab.muon([other, ours], [torch.randn(size), grad], state, 0.02, 2)
        muon.step()
        mean = 0.95 * mean + 0.05 * grad
        far = max(1, size[0] / size[1]) ** 0.5
        hand = hand * (1 - 0.02 * 2) - 0.02 * far * turned(0.05 * grad + 0.95 * mean)
    close(ours, hand, 1e-4)
    assert (ours - theirs).norm() < 0.05 * (ours - start).norm()

@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_is_learned_once_and_only_matrices_decay(optimizer, tie_weights):
    """Bug: decay on gains or biases; Muon on embeddings; a tied weight taken twice."""
    model = lab.MiniTransformer(shape(
        bias=True, positions="learned", tie_weights=tie_weights))
    s = lab.TrainConfig(optimizer=optimizer, learning_rate=0.25, muon_learning_rate=0.5,
                        weight_decay=0.3)
    groups, twin = lab.make_groups(model, s), copy.deepcopy(model)
    assert all(p.requires_grad for p in model.parameters())
    hidden = {p: [] for p in twin.blocks.parameters()
              if optimizer == "muon" and p.dim() == 2}
    rest = [p for p in twin.parameters() if p not in hidden]
    adamw = torch.optim.AdamW([
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.3},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0}],
        betas=(0.9, 0.95), eps=1e-8)
    for share in 1.0, 0.5, 0.1:
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad = torch.randn_like(p) * 1e-7     # small enough to see eps
        lab.update(groups, share, s)
        for group in adamw.param_groups:
            group["lr"] = 0.25 * share
        adamw.step()
        with torch.no_grad():
            for p, state in hidden.items():
                lab.muon([p], [p.grad], state, 0.5 * share, 0.3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p, q)

@pytest.mark.parametrize("size, training", [
    (31, True), (31, False), (33, True), (5, False), (2, True), (540, False)])
def test_evaluation_counts_every_target_once(size, training):
    """Bug: the short last window left out or counted in full; dropout; autograd; the
    whole text at once, for gigabytes."""
    model, data = loud_model(dropout=0.5).train(training), torch.randint(11, (size,))
    seen, losses = [], []
    hook = model.register_forward_hook(lambda _, args, out: seen.append(
        (len(args[0]), torch.is_grad_enabled())))
    value = lab.evaluate(model, data)
    hook.remove()
    assert model.training == training and max(seen)[0] <= 8
    assert not any(grad for _, grad in seen)
    for i in range(size - 1):
        logits = model.eval()(data[None, i // 8 * 8 : i + 1])[0][0, -1]
        losses.append(-logits.log_softmax(-1)[data[i + 1]].item())
    assert value == pytest.approx(sum(losses) / (size - 1), rel=1e-5)

def test_counting_pairs_is_scored_on_text_not_counted():
    """Bug: a baseline that has seen the answers, or divides by the wrong sum."""
    a, b = torch.arange(60) ** 2 % 5, torch.arange(30) % 4
    pairs, scores = list(zip(a[:-1].tolist(), a[1:].tolist(), strict=True)), []
    for i, j in zip(b[:-1].tolist(), b[1:].tolist(), strict=True):
        begun = sum(first == i for first, _ in pairs)
        scores.append(-math.log((pairs.count((i, j)) + 1) / (begun + 5)))
    assert lab.bigram_loss(a, b, 5) == pytest.approx(sum(scores) / 29)

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_can_learn_one_batch_by_heart(optimizer):
    """Bug: gradients that do not arrive. (Nearly blind: a missing mask passes.)"""
    model = lab.MiniTransformer(shape())
    ids = torch.tensor([[8, 1, 2, 3, 4], [9, 4, 3, 2, 1]])
    s = lab.TrainConfig(optimizer=optimizer, learning_rate=0.02)
    groups = lab.make_groups(model, s)
    for _ in range(100):
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        lab.update(groups, 1.0, s)
        model.zero_grad()
    assert model(ids[:, :-1], ids[:, 1:])[1] < 0.1

def run(config=None, text=TEXT, **settings):
    """A run of four steps on a text of 612 characters, 550 of them to train on."""
    Path("text.txt").write_text(text)
    tiny = dict(text_path="text.txt", max_steps=4, batch_size=4, accumulation_steps=1,
                eval_interval=2, sample_chars=5, warmup_steps=0, threads=1)
    return lab.train(config or shape(), **(tiny | settings))

def saved(path="checkpoint.pt"):
    return torch.load(path, weights_only=True)

def history():
    head, *rows = Path("history.csv").read_text().splitlines()
    rows = [map(float, row.split(",")) for row in rows]
    return [dict(zip(head.split(","), row, strict=True)) for row in rows]

@pytest.fixture
def watched(patch):
    """Each training batch (inputs, targets, loss, logits), each step (norm, share)."""
    forward, seen = lab.MiniTransformer.forward, SimpleNamespace(
        batches=[], steps=[], late=[], places=set())
    update = lab.update
    def spy(self, idx, targets=None, past=None):
        logits, loss = forward(self, idx, targets, past)
        if self.training:
            seen.batches.append((idx, targets, loss, logits))
            grad = self.token_emb.weight.grad
            seen.late.append(grad is not None and bool(grad.any()))
            seen.places |= set() if grad is None else {grad.data_ptr()}
        return logits, loss
    patch(lab.MiniTransformer, "forward", spy)
    def spy_update(groups, share, s):
        grads = [p.grad.flatten() for _, params, _ in groups for p in params]
        seen.steps.append((torch.cat(grads).norm().item(), share))
        update(groups, share, s)
    patch(lab, "update", spy_update)
    return seen

@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "adamw"}, {"precision": "bfloat16"}])
def test_training_lowers_the_loss_by_reading_the_input(settings, watched):
    """Bug: steps uphill, or a model that learns frequencies and ignores its input."""
    model, ds = run(max_steps=40, eval_interval=40, learning_rate=0.02, **settings)
    first, last = history()
    assert first["val"] == pytest.approx(math.log(ds.vocab_size), abs=0.2)
    assert last["val"] < first["val"] - 0.8 and math.isnan(first["train"])
    kind = torch.bfloat16 if settings.get("precision") else torch.float32
    assert [logits.dtype for *_, logits in watched.batches[:40]] == [kind] * 40
    x, y = (t[None] for t in ds[len(ds) - 9])
    assert model(torch.zeros_like(x), y)[1] > model(x, y)[1] + 0.5
    assert not model.training                  # returned ready for use
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert last["val"] == pytest.approx(lab.evaluate(model, ds.data[550:]), abs=6e-5)

def test_training_and_evaluation_share_no_window(watched, patch):
    """Bug: held-out text in training; the first or last window never drawn; the same
    windows at each step or for each seed; other ones tomorrow (hash of a string)."""
    evaluated, starts, evaluate = [], [], lab.evaluate
    patch(lab, "hash", lambda x: hash(tuple(map(int.__index__, x))), raising=False)
    patch(lab, "evaluate", lambda m, d: evaluated.append(d) or evaluate(m, d))
    for seed in 1, 2:
        run(text="".join(map(chr, range(65, 125))), max_steps=12, batch_size=40,
            seed=seed)
    for idx, targets, *_ in watched.batches:
        assert idx.shape == (40, 8) and idx[:, 1:].equal(targets[:, :-1])
        starts.append(tuple(idx[:, 0].tolist()))
    assert set(sum(starts, ())) == set(range(46)) and len(set(starts)) == 24
    assert all(data.tolist() == list(range(54, 60)) for data in evaluated)

def test_the_same_seed_gives_the_same_model_and_text_and_another_does_not(capsys):
    """Bug: a result that nobody can repeat, or a seed that is ignored."""
    runs = []
    for seed in 5, 5, 6:
        weights = run(max_steps=0, seed=seed, sample_chars=60)[0].state_dict()
        lines = capsys.readouterr().out.splitlines()
        text = [line for line in lines if "|" not in line]
        runs.append((text, weights["token_emb.weight"].tolist()))
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0] and runs[0][1] != runs[2][1]

def test_a_resumed_run_equals_an_uninterrupted_one(patch, capsys):
    """Bug: optimizer state, step, random numbers, rate or rows of the history lost;
    speed counted over steps not made; work lost on Ctrl-C."""
    c, plan = shape(dropout=0.2), dict(max_steps=6, decay_steps=8, warmup_steps=2)
    run(c, checkpoint_path="whole.pt", **plan)
    run(c, **plan | {"max_steps": 3})
    patch(lab, "time", SimpleNamespace(perf_counter=iter(range(0, 999, 10)).__next__))
    said = []
    patch(lab, "progress", said.append)
    capsys.readouterr()
    run(c, resume=True, **plan)
    assert "step 4 of 6 " in said[0]
    row = re.search(r"step 4 .* s (\d+) \| left (\d+)", capsys.readouterr().out)
    assert int(row[2]) == 2 * int(row[1]) > 0  # one step made, two to go
    assert [row["step"] for row in history()] == [0, 2, 3, 4, 6]
    assert history()[-1]["chars/s"] == pytest.approx(3 * 4 * 8 / 20, abs=0.5)
    clip, calls = nn.utils.clip_grad_norm_, iter([0, 0, 0])
    def until_ctrl_c(*a):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return clip(*a)
    patch(nn.utils, "clip_grad_norm_", until_ctrl_c)
    run(c, checkpoint_path="stopped.pt", **plan)
    said = capsys.readouterr().out
    assert "stopped at step 3" in said and said.count("final | val") == 1
    held = saved("stopped.pt")
    assert held["step"] == int(held["history"][-1]["step"]) == 3
    patch(nn.utils, "clip_grad_norm_", clip)
    run(c, checkpoint_path="stopped.pt", resume=True, **plan)
    assert "chars 96 " in capsys.readouterr().out        # 3 steps of 4 x 8
    for path in "checkpoint.pt", "stopped.pt":
        for part in "weights", "averages":
            close(saved(path)[part], saved("whole.pt")[part], 0)
    for other, text, optimizer in [(shape(d_ff=12), TEXT, "muon"), (c, TEXT, "adamw"),
                                   (c, TEXT.replace("c", "!"), "muon")]:
        with refused("checkpoint.pt: of another model, text or optimizer"):
            run(other, text, resume=True, optimizer=optimizer)
    run(c, resume=True, max_steps=7, learning_rate=0.0, muon_learning_rate=0.0)
    close(saved()["weights"], saved("whole.pt")["weights"], 0)  # a new rate holds
    assert [row["step"] for row in history()] == [0, 2, 3, 4, 6, 7]

@pytest.mark.parametrize("grad_clip", [0.0, 0.1, 9.0])
def test_a_step_follows_the_mean_gradient_cut_to_length_at_the_planned_rate(
        grad_clip, watched):
    """Bug: small batches summed or clipped one by one; old gradients kept; clipping by
    0; an optimizer left at its peak, or without it after resuming."""
    plan = dict(grad_clip=grad_clip, decay_steps=4, eval_interval=1, optimizer="adamw",
                learning_rate=0.01, warmup_steps=2, max_steps=2)
    run(batch_size=8, **plan)
    run(batch_size=8, resume=True, **plan | {"max_steps": 4})
    run(batch_size=2, **plan | {"max_steps": 4, "accumulation_steps": 4})
    rows, norms = history(), [norm for norm, _ in watched.steps]
    close(norms[:4], norms[4:], 2e-3)
    true = [row["norm"] for row in rows[1:]]
    assert min(true) > 0.15 and max(true) < 9
    close(norms[4:], [0.1 if grad_clip == 0.1 else n for n in true], 0.01)
    assert {row["clipped"] for row in rows[1:]} == {float(grad_clip == 0.1)}
    close([share for _, share in watched.steps], [0.5, 1.0, 1.0, 0.5] * 2)
    close([row["lr"] for row in rows], [0.005, 0.01, 0.01, 0.005, 0.0])

def test_the_best_weights_are_returned_and_not_the_last(patch, capsys):
    """Bug: the last weights kept, a reference instead of a copy."""
    scores, states, used = [3, 1, 1, 4, 999, 5, 5], [], []
    def evaluate(model, data):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return float(scores[len(states) - 1])
    patch(lab, "evaluate", evaluate)
    patch(lab, "write", lambda m, *_: used.append(m.state_dict()) or "a\nb")
    model, _ = run(eval_interval=1)
    said = capsys.readouterr().out
    assert said.endswith("| best 1.0000\n") and "     'a\\nb'\n" in said
    close(saved()["weights"], states[4], 0)
    for weights in model.state_dict(), saved()["best"], used[-1]:
        close(weights, states[1], 0)
    assert not states[1]["lm_head.weight"].equal(states[4]["lm_head.weight"])
    rows = Path("history.csv").read_text()
    close(run(resume=True)[0].state_dict(), states[1], 0)   # nor forgotten by resuming
    close(states[5], states[4], 0)             # which went on from the last
    assert Path("history.csv").read_text() == rows
    assert "saved" not in capsys.readouterr().out

@pytest.mark.parametrize("broken", [
    "step 3: loss nan", "step 3: .*gradient norm inf", "step 4: validation loss nan",
    "step 4: validation loss inf"])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
        broken, patch):
    """Bug: hours spent on NaN, saved over the last good weights."""
    clip, cross_entropy, calls = nn.utils.clip_grad_norm_, F.cross_entropy, []
    def bad_norm(*a):
        calls.append(a)
        return clip(*a) + (math.inf if "norm" in broken and len(calls) == 4 else 0)
    def bad_loss(*a):
        training = torch.is_grad_enabled()
        late = training and len(calls) == 3 and "3: loss" in broken
        late = late or not training and len(calls) == 4 and "validation" in broken
        return cross_entropy(*a) * (float(broken[-3:]) if late else 1)
    patch(nn.utils, "clip_grad_norm_", bad_norm)
    patch(F, "cross_entropy", bad_loss)
    with refused(rf"{broken}.*: try less than learning_rate=0\.01, muon_l\w+=0\.02$"):
        run(max_steps=6, learning_rate=0.01)
    assert saved()["step"] == 2
    assert all(p.isfinite().all() for p in saved()["weights"].values())

def test_a_checkpoint_holds_all_that_is_needed_and_is_not_lost(patch, capsys):
    """Bug: a vocabulary left out; a full disk, or a run that has not learned anything
    yet, that takes the old checkpoint with it; a traceback for a wrong file."""
    config, save, write, safely = shape(ffn="relu"), torch.save, lab.write_file, set()
    patch(lab, "write_file", lambda path, save: safely.add(path) or write(path, save))
    model, ds = run(config)
    held = saved()
    assert safely == {"checkpoint.pt", "history.csv"}
    assert lab.TransformerConfig(**held["config"]) == model.config
    assert model.config == shape(ffn="relu", vocab_size=ds.vocab_size)
    assert config == shape(ffn="relu")         # the caller's own is left alone
    assert held["vocabulary"] == "".join(ds.itos) and held["step"] == 4
    capsys.readouterr()
    run(max_steps=0, seed=9)
    assert "saved" not in capsys.readouterr().out and history()[-1]["step"] == 4
    patch(torch, "save", lambda _, path: Path(path).write_text("half") / 0)
    with pytest.raises(ZeroDivisionError):
        run(shape(ffn="relu"), seed=1)
    close(saved()["best"], held["best"], 0)
    cut_short = Path("checkpoint.pt").read_bytes()[:999]
    patch(torch, "save", save)
    torch.save([1], "other.pt")                # and files of someone else's
    torch.save({"config": {"n_layer": 4}}, "nano.pt")
    for content in (b"", b".", b"First Citizen:", b"hello world", cut_short,
                    Path("other.pt").read_bytes(), Path("nano.pt").read_bytes()):
        Path("checkpoint.pt").write_bytes(content)
        with refused("checkpoint.pt: not a checkpoint"):
            lab.read_checkpoint("checkpoint.pt", "cpu")

def test_a_run_reports_what_it_did(watched, capsys, patch):
    """Bug: figures that are not what they are called; a missing or a silent row; a log
    that stays empty for minutes; a KeyError on Windows after hours of training."""
    threads, clock, flushed = [], [100], []
    evaluate, write = lab.evaluate, lab.write
    def takes(seconds, result):
        clock[0] += seconds
        return result
    patch(lab, "evaluate", lambda *a: takes(10, evaluate(*a)))
    patch(lab, "write", lambda *a: takes(1, write(*a)))
    patch(torch, "set_num_threads", threads.append)
    patch(torch, "get_num_threads", lambda: 5)
    patch(lab, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    patch(lab, "print", lambda *a, flush=False, **k: (
        flushed.append(flush) or print(*a, **k)), raising=False)
    model, ds = run(max_steps=5, batch_size=3, accumulation_steps=2, threads=7,
                    eval_interval=3)
    out, rows = capsys.readouterr().out, history()
    V, n = ds.vocab_size, sum(p.numel() for p in model.parameters())
    pairs = lab.bigram_loss(ds.data[:550], ds.data[550:], V)
    for words in ("cpu, 5 threads, float32", f"{n:,} parameters", "550 to train",
                  f"612 characters, {V} distinct", " 62 held out",
                  f"guessing scores {math.log(V):.3f}, counting pairs {pairs:.3f}"):
        assert words in out
    losses = [loss.item() for _, _, loss, _ in watched.batches]
    parts = [[math.nan], losses[:6], losses[6:]]
    assert watched.late == [False, True] * 5   # backward at once: memory for one batch
    assert len(watched.places) == 1            # and gradients that stay where they are
    for row, part, step, s in zip(rows, parts, [0, 3, 5], [10, 21, 32], strict=True):
        assert row["step"] == step and row["s"] == s
        mean = sum(part) / len(part)
        assert row["train"] == pytest.approx(mean, abs=1e-4, nan_ok=True)
        assert row["chars/s"] == pytest.approx(step * 48 / s, abs=0.5)
        left = f"{(5 - step) * s / step:.0f}" if step else "-"
        form = (rf"^step {step} \|.* val .* lr \d\.\de[-+]\d\d \| norm (\d\.\d\d|-) "
                rf"\| clipped ([01]\.\d\d|-) .*\| left {left}$")
        assert re.search(form, out, re.MULTILINE)
    val = evaluate(model, ds.data[550:])
    final = re.search(r"final \| val (\S+) \| perplexity (\S+) \| chars (\d+) \| s\w+ "
                      r"33.0 \| chars/s 7 \| peak MB (\d+)", out)
    assert [rows[-1]["val"], float(final[1]), math.log(float(final[2]))] == (
        pytest.approx([val] * 3, abs=2e-3)) and final[3] == "240"
    if sys.platform == "linux":
        known = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert int(final[4]) == pytest.approx(int(known[1]) / 1024, rel=0.01)
    assert "\r" not in out and "nan" not in out
    assert re.search(rf"^{ds.itos[0]}.{{5}}$", out, re.MULTILINE)
    samples = re.findall(r"^ +'(.*)'$", out, re.MULTILINE)
    assert [len(sample) for sample in samples] == [71] * 3 and sum(flushed) == 3
    assert sorted(os.listdir()) == ["checkpoint.pt", "history.csv", "text.txt"]
    patch(sys.stdout, "isatty", lambda: True, raising=False)
    patch(lab, "sys", SimpleNamespace(platform="win32", stdout=sys.stdout))
    patch(lab, "time", SimpleNamespace(perf_counter=iter(range(99)).__next__))
    run(max_steps=1, threads=0, history_path="b.csv", checkpoint_path="b.pt")
    out = capsys.readouterr().out
    assert "\rstep 1 of 1 | train 2." in out and "peak MB 0" in out
    assert threads == [7, 5] and {"b.csv", "b.pt"} <= set(os.listdir())
    assert sum(flushed) == 6                   # the rewritten line, too

def test_a_run_does_without_the_compiler_and_the_network():
    """Bug: a class of torch.optim, whose import takes 72 MB and most of a second."""
    Path("text.txt").write_text(TEXT)
    code = (f"import sys; sys.path.insert(0, {str(Path(lab.__file__).parent)!r})\n"
            f"import {NAME} as lab\nlab.train(lab.TransformerConfig(block_size=8), "
            "text_path='text.txt', max_steps=1)\n"
            "print({'torch._dynamo', 'requests'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("\nset()\n"), done.stderr

@pytest.mark.parametrize("settings, message", [
    ({"optimizer": "sgd"}, "optimizer='sgd': choose from adamw, muon"),
    ({"precision": "int8"}, "precision='int8': choose from bfloat16, float32"),
    *[({name: 0}, f"{name}=0: must be at least 1") for name in
      "batch_size accumulation_steps eval_interval".split()],
    *[({name: -1}, f"{name}=-1: must be at least 0") for name in "max_steps threads "
      "learning_rate muon_learning_rate weight_decay grad_clip sample_chars".split()],
    ({"config": 18}, "20 characters of text: too few for block_size=18")])
def test_settings_that_cannot_be_are_refused_before_training(
        settings, message, patch):
    """Bug: a typing error noticed after an hour; a window longer than the split."""
    with refused(message):
        run(shape(block_size=settings.pop("config", 17)), "ab" * 10, **settings)
    run(shape(block_size=17), "ab" * 10)
    patch(lab, "MiniTransformer", lambda config: built.append(config) or 1 / 0)
    built = []
    Path("text.txt").write_text(TEXT)
    with pytest.raises(ZeroDivisionError):     # without a config: the default one
        lab.train(text_path="text.txt")
    assert built == [lab.TransformerConfig(vocab_size=len(set(TEXT)))]
    with refused("10 characters of text: too few for block_size=2"):
        run(shape(block_size=2), "ab" * 5)     # one held out: nothing to predict

def test_a_gpu_is_used_if_it_is_there_and_that_of_a_mac_by_choice(
        patch, monkeypatch, capsys):
    """Bug: a default that assumes a GPU, or takes one that computed wrong numbers;
    data left on the CPU; a checkpoint that runs what strangers wrote into it."""
    moved, to, drawn, cpu, compiled = [], torch.Tensor.to, [], torch.Tensor.cpu, []
    patch(torch.Tensor, "to", lambda x, *a, **k: (
        moved.append((x.dtype, *x.shape)) or to(x, *a, **k)))
    patch(torch.Tensor, "cpu", lambda x: drawn.append(x.shape) or cpu(x))
    patch(torch, "compile", lambda m: lambda *a: compiled.append(m) or m(*a))
    patch(torch.cuda, "is_available", lambda: False)
    patch(torch.backends.mps, "is_available", lambda: True)
    model, _ = run(max_steps=1)
    moves = [moved.count((torch.int64, *size)) for size in [(62,), (4, 8), (1, 1)]]
    draws = 70 + 70 + 5                        # on the CPU, and moved back
    assert len(drawn) == draws and not compiled
    assert moves == [2, 2, draws + 3]          # evaluations; inputs, targets; prompts
    assert "cpu, " in capsys.readouterr().out
    assert [run(max_steps=1, compile=True)[0]] == compiled
    with refused("device='tpu': choose from auto, cpu, mps$"):
        run(device="tpu")
    patch(torch.cuda, "is_available", lambda: True)
    load, autocast, asked = torch.load, torch.autocast, []
    with monkeypatch.context() as stand_in:    # a GPU that is a CPU
        stand_in.setattr(torch.Tensor, "to", lambda x, *a: x)
        stand_in.setattr(nn.Module, "to", lambda module, *a: module)
        stand_in.setattr(torch, "autocast", lambda kind, *a, **k: (
            asked.append(kind) or autocast("cpu", *a, **k)))
        stand_in.setattr(torch, "load", lambda path, map_location, **k: (
            asked.append(map_location) or load(path, **k)))
        run(max_steps=2, device="cuda", resume=True)
    assert asked == ["cuda", "cuda"]
    patch(lab.MiniTransformer, "to", lambda self, where: {}[where])
    for device, where in ("auto", "cuda"), ("mps", "mps"), ("cpu", "cpu"):
        with pytest.raises(KeyError, match=where):
            run(device=device)
    patch(torch, "load", lambda *_, **options: {"config": {}} | options)
    asked = lab.read_checkpoint("checkpoint.pt", "cpu")
    assert asked == {"config": {}, "map_location": "cpu", "weights_only": True}

def command(capsys, *argv):
    """Exit code (None: none), stdout, stderr of the command line."""
    try:
        code = lab.main(list(argv)) and None
    except SystemExit as done:
        code = done.code
    return code, *capsys.readouterr()

def test_help_lists_every_constant_with_its_meaning_and_default(
        patch, monkeypatch, capsys):
    """Bug: a constant that can be set in the file only, or is not explained."""
    monkeypatch.setenv("COLUMNS", "300")
    patch(sys, "argv", [NAME, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(lab.__file__, run_name="__main__")        # as a script
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    source = Path(lab.__file__).read_text(encoding="utf-8")
    for kind in lab.TransformerConfig, lab.TrainConfig:
        for f in dataclasses.fields(kind):
            about = re.search(rf"\n    {f.name}: .*?# (.*)", source)[1]
            assert f"--{f.name} {f.name.upper()} {about} (default: {f.default})" in out

def test_every_constant_can_be_set_on_the_command_line(patch, capsys):
    """Bug: an option that is read as text, or never reaches the run."""
    seen, argv, expected = [], [], {}
    for f in [f for kind in (lab.TransformerConfig, lab.TrainConfig)
              for f in dataclasses.fields(kind)]:
        kind = getattr(f.type, "__args__", [f.type])[0]
        kind = kind if f.default is None else type(f.default)
        value = kind(f.default or 1)
        expected[f.name] = value / 2 if kind is float else value * 2
        expected[f.name] = not f.default if kind is bool else expected[f.name]
        argv += [f"--{f.name}", str(expected[f.name])] * (f.name != "prompt")
    patch(lab, "train", lambda c=None, **s: seen.append(vars(c) | s))
    argv = [word.lower() if word == "True" else word for word in argv]
    assert command(capsys, *argv) == (None, "", "")
    typed = [{k: repr(v) for k, v in d.items()} for d in (seen[0], expected)]
    assert typed[0] == typed[1] | {"prompt": "None"}         # 4, not 4.0

@pytest.mark.parametrize("argv, message", [
    ("--n_heads 3", "d_model=128: must be a multiple of 2 x n_heads=3"),
    ("--n_heads x", "argument --n_heads: invalid int value: 'x'"),
    ("--causal maybe", "argument --causal: invalid true_or_false value: 'maybe'"),
    ("--text_path mine.txt", "No such file or directory: 'mine.txt'"),
    ("--text_path latin.txt", "'utf-8' codec can't decode byte 0xff"),
    ("--prompt a", "No such file or directory: 'checkpoint.pt'")])
def test_a_bad_value_gets_one_line_and_no_traceback(argv, message, patch, capsys):
    """Bug: thirty lines of traceback for a typing error; exit code 0 in a script; one
    line where a bug in the code needs its traceback."""
    Path("latin.txt").write_bytes(b"\xff\xfe")
    code, out, err = command(capsys, *shlex.split(argv))
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1
    patch(lab, "load_text", lambda path: 1 + path.index("?"))
    with pytest.raises(ValueError, match="substring"):
        lab.main(["--n_layers", "1"])

def test_a_prompt_is_continued_from_the_checkpoint_without_training(patch, capsys):
    """Bug: the last weights, another vocabulary, or a training run in place of text."""
    evaluate, scores = lab.evaluate, iter([3.0, 1.0, 2.0])
    patch(lab, "evaluate", lambda *_: next(scores))
    model, ds = run(muon_learning_rate=1.0, checkpoint_path="mine.pt")
    patch(lab, "train", evaluate)
    capsys.readouterr()
    torch.manual_seed(7)
    ids = model.generate(torch.tensor([ds.encode("the")]), 40, 0.9, 5, 0.6)
    options = "--checkpoint_path mine.pt --sample_chars 40 --seed 7 --temperature .9 "
    options = f"{options} --top_k 5 --top_p .6 --prompt".split()
    said = command(capsys, *options, "the")
    assert said == (None, ds.decode(ids[0]) + "\n", "")
    assert command(capsys, *options, "the", "--seed=8") != said
    for prompt, message in ("", "an empty prompt"), ("Z", "['Z']: not in the vocab"):
        code, _, err = command(capsys, *options, prompt)
        assert code == 2 and message in err

# ==== The README, as it stands ========================================================
def readme(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)

@pytest.mark.parametrize("block", readme("python"))
def test_the_readmes_python_runs_as_it_stands(block, monkeypatch, capsys):
    """Bug: a recipe that was true before the last renaming."""
    monkeypatch.setitem(sys.modules, "mini_transformer", lab)
    for name in "my_text.txt", "input.txt":
        Path(name).write_text(TEXT * 2)
    run()                                      # leaves a checkpoint
    capsys.readouterr()
    exec(block, {})
    said = capsys.readouterr().out
    assert re.search(r"the |5 characters at a time: 0\.\d+|4 to 8: \d\.\d+", said)

@pytest.mark.parametrize("line", [
    line for block in readme("bash") for line in block.splitlines()
    if line.startswith("python mini_transformer.py")])
def test_the_readmes_commands_are_understood(line, patch, capsys):
    """Bug: a documented option, choice or size that the lab refuses."""
    built, written = [], []
    def train(config=None, **settings):
        model = lab.MiniTransformer(config)
        built.append(lab.make_groups(model, lab.TrainConfig(**settings)))
    def read_checkpoint(path, device):
        config = shape(vocab_size=len(set(TEXT)))
        best = lab.MiniTransformer(config).state_dict()
        return {"config": vars(config), "best": best, "vocabulary": "".join(set(TEXT))}
    patch(lab, "train", train)
    patch(lab, "read_checkpoint", read_checkpoint)
    patch(lab, "write", lambda model, dataset, prompt, *_: written.append(prompt))
    code, _, err = command(capsys, *shlex.split(line)[2:])
    assert (code, err) == (None, "") and bool(written) == ("--prompt" in line)
    assert bool(built) != bool(written)

@pytest.mark.parametrize("find, write, name", re.findall(
    r"^\|.*\| `(.+)` \| `(.+)` \| `(test_\w+)` \|$", README, re.M))
def test_each_bug_of_break_it_turns_its_test_red(
        find, write, name, pytester, monkeypatch):
    """Bug: a 'Break it' that does not break, or whose test has been blind since."""
    source = Path(__file__).with_name("mini_transformer.py").read_text(encoding="utf-8")
    assert source.count(find) == 1
    Path("broken.py").write_text(source.replace(find, write), encoding="utf-8")
    monkeypatch.setenv("MODULE", "broken")
    monkeypatch.delitem(sys.modules, __name__)           # imported anew, for broken
    result = pytester.inline_run("-x", "--assert=plain", f"{__file__}::{name}")
    assert result.countoutcomes()[2] == 1
    assert name in result.getfailures()[0].nodeid
