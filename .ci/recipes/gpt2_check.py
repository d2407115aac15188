"""gpt2.py without GPT-2's files, which are too large for CI: a small model in a file of the
same format equals an independent forward; byte pairs equal those of an independent encoder,
cut at places that the library tokenizers 0.23.3 gave; a download leaves a whole file or none."""
import contextlib
import importlib
import io
import json
import math
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch

V, T, L, H, C, WIDTH = 266, 16, 2, 4, 24, 40           # heads of the size 6, not 64
MERGES = ["h e", "Ġ t", "Ġt he", "t he", "Ã ©", "e r", "the r", "Ġ 1", "Ġ Ġ"]
WORDS = {  # what tokenizers' ByteLevel makes of each text
    "The cat's 12 hats, I'LL say: we'll don't": ["The", " cat", "'s", " 12", " hats", ",", " I",
        "'", "LL", " say", ":", " we", "'ll", " don", "'t"],
    "a  b   1\n\n\tc \n": ["a", " ", " b", "  ", " 1", "\n\n", "\t", "c", " \n"],
    "x_1 = x² + ½Ⅷ٣; naïve é e\u0301": ["x", "_", "1", " =", " x", "²", " +", " ½Ⅷ٣", ";", " naïve",
        " é", " e", "\u0301"],
    "中文，日本語 😀👍🏽 ❤️!": ["中文", "，", "日本語", " 😀👍🏽", " ❤️!"],
    "the other thermometer, thé the  the": ["the", " other", " thermometer", ",", " thé", " the",
        " ", " the"]}

def check(folder, python):
    python(Path(__file__).resolve())                   # everything below; writes small/
    lab = (folder / "mini_transformer.py").read_bytes()
    (folder / "my_transformer.py").write_bytes(lab + b"\nprint('mine')\n")
    said = python("gpt2.py", "the thé", "--folder", "small", "--tokens", "9",
                  "--temperature", "0", MODULE="my_transformer")
    expected = "mine\n" + (folder / "small/expected.txt").read_text("utf-8")
    assert said.strip("\n") == expected, (said, expected)

# ==== GPT-2 in formulas, and a file in its format
def numbers(shape, i):
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.4 * torch.sin(n * n + i)).float().view(shape)

def gpt2_weights():
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(L):
        for name, sizes in {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
                            "mlp.c_fc": (C, WIDTH), "mlp.c_proj": (WIDTH, C),
                            "ln_1": (C,), "ln_2": (C,)}.items():
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = sizes, sizes[-1:]
    return {name: numbers(shape, i) + (re.search(r"ln_.*weight", name) is not None)
            for i, (name, shape) in enumerate(shapes.items())}

def forward(w, ids):                                   # (T,) -> logits (T, V)
    def layer(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]
    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]
    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for i in range(L):
        out, qkv = [], layer(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        for q, k, v in zip(*(part.split(C // H, -1) for part in qkv.split(C, -1))):
            scores = q @ k.T / math.sqrt(C // H)
            scores[torch.ones(len(ids), len(ids)).triu(1) == 1] = -math.inf
            out.append(scores.softmax(-1) @ v)
        x = x + layer(torch.cat(out, -1), f"h.{i}.attn.c_proj")
        z = layer(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        z = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        x = x + layer(z, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T

def write_file(path, tensors):
    table, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in sorted(tensors.items()):
        data = tensor.numpy().tobytes()
        table[name] = dict(dtype="F32", shape=[*tensor.shape],
                           data_offsets=[len(raw), len(raw) + len(data)])
        raw += data
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw)

def exits(call, *arguments):
    """What a call says as it ends the program."""
    try:
        call(*arguments)
    except SystemExit as end:
        return str(end)
    raise AssertionError("it should have ended with a sentence")

def small_model(gpt2):
    w, folder = gpt2_weights(), Path("small")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(
        vocab_size=V, n_positions=T, n_layer=L, n_head=H, n_embd=C, n_inner=WIDTH)))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), "utf-8")
    ids = (torch.arange(T) ** 2 * 7 + 3) % V
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, T, T).tril() for i in range(L)}
    prefixed = {"transformer." + name: tensor for name, tensor in w.items()}
    for tensors in {**w, **masks}, {**prefixed, "lm_head.weight": w["wte.weight"]}:
        write_file(folder / "model.safetensors", tensors)
        logits = gpt2.load(folder)(ids[None])[0][0]
        assert forward(w, ids).std() > 1
        torch.testing.assert_close(logits, forward(w, ids), rtol=1e-5, atol=1e-5)
    tokens = gpt2.BytePairs((folder / "merges.txt").read_text("utf-8"))
    ids = tokens.encode("the thé")
    for _ in range(9):
        ids.append(forward(w, torch.tensor(ids[-T:]))[-1].argmax().item())
    text = tokens.decode(ids)
    (folder / "expected.txt").write_text(text.strip("\n"), "utf-8")
    whole = (folder / "model.safetensors").read_bytes()
    broken = Path("broken")
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    for raw in whole[:-4], b"<!DOCTYPE html><p>not found", b"":
        (broken / "model.safetensors").write_bytes(raw)
        assert "damaged" in exits(gpt2.load, broken)

# ==== Byte pairs
def byte_pairs(gpt2):
    tokens = gpt2.BytePairs("\n".join(["#version: 0.2", *MERGES, ""]))
    assert len(tokens.itos) == len(tokens.stoi) == V and tokens.itos[:2] == ["!", '"']
    assert tokens.itos[220] == "Ġ" and tokens.itos[198] == "Ċ"  # as in GPT-2's own vocabulary
    for text, words in WORDS.items():
        assert gpt2.WORD.findall(text) == words, gpt2.WORD.findall(text)
        expected = []
        for word in words:                             # every merge in turn, all over the word
            shown = " ".join(tokens.char[byte] for byte in word.encode())
            for merge in MERGES:
                shown = re.sub(rf"(?<!\S){re.escape(merge)}(?!\S)", merge.replace(" ", ""), shown)
            expected += shown.split(" ")
        ids = tokens.encode(text)
        assert [tokens.itos[i] for i in ids] == expected, (text, expected)
        assert tokens.decode(ids) == text
        assert "".join(tokens.decode([i]) for i in ids) == text  # as it is streamed

# ==== The download
def download(gpt2):
    class Server(BaseHTTPRequestHandler):
        sent = b"7 bytes"
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "7")
            self.end_headers()
            self.wfile.write(self.sent)
        def log_message(self, *arguments):
            pass
    os.environ["NO_PROXY"] = "*"
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gpt2.URL, gpt2.BYTES = f"http://127.0.0.1:{server.server_port}/", {"merges.txt": 7}
    path = Path("fetched/merges.txt")
    with contextlib.redirect_stdout(io.StringIO()):
        for Server.sent in b"7 byt", b"":              # the connection breaks
            assert f"save {gpt2.URL}merges.txt" in exits(gpt2.get, path.parent, path.name)
            assert not path.exists()
        Server.sent = b"7 bytes"
        gpt2.BYTES["merges.txt"] = 8                   # a page that is not the file
        assert "could not" in exits(gpt2.get, path.parent, path.name) and not path.exists()
        gpt2.BYTES["merges.txt"] = 7
        assert gpt2.get(path.parent, path.name).read_bytes() == b"7 bytes"
        server.shutdown()
        server.server_close()
        assert gpt2.get(path.parent, path.name) == path  # no network needed any more
        assert "ConnectionError" in exits(gpt2.get, Path("nothing"), path.name)

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    recipe = importlib.import_module("gpt2")
    small_model(recipe)
    byte_pairs(recipe)
    download(recipe)
