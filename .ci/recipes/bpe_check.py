"""The tokens follow from the checkpoint alone, any text comes back, and writing is clean."""
CODE = r"""
import collections
import io
import sys
import torch
import bpe
lab = bpe.lab
assert bpe.learn("ab ab ab ab", 300)[256:] == ["ab", " ab"]
assert bpe.learn("x", 300) == bpe.BYTES                # no pair stands there twice

text = open("input.txt", encoding="utf-8").read()
cut = len(text) * 9 // 10
dataset = bpe.BytePairs(text[:cut] + "\u20acZQ" * 500, 8)  # what is new stands at the end
assert len(dataset.itos) == len(set(dataset.itos)) == dataset.vocab_size == 512
assert "ZQ" not in dataset.itos and " the" in dataset.itos, "from the first 90 % alone"
n_bytes = len((text[:cut] + "\u20acZQ" * 500).encode())
assert len(dataset.data) < 0.7 * n_bytes
# Each token is two earlier ones; the same text gives the same ones; the first was the best.
for i in range(256, 512):
    token, earlier = dataset.itos[i], set(dataset.itos[:i])
    assert any(token[:n] in earlier and token[n:] in earlier for n in range(1, len(token)))
pairs = collections.Counter()
for word in bpe.words_of(text[:cut]):
    pairs.update(map("".join, zip(word, word[1:])))
assert pairs[dataset.itos[256]] == max(pairs.values())

# A second object that gets nothing but the tokens encodes alike, and any text comes back.
again = bpe.BytePairs("", 8, dataset.itos)
odd = " na\u00efve"
odd += "\u4e2d\u6587\u3000\U0001f600\U0001f44d\U0001f3fd e\u0301 a\r\n\tb\x00\x1b[31m  "
odd += "ab" * 99 + "\n" * 99
for some in odd, text[cut:], "", " ", "x":
    ids = dataset.encode(some)
    assert again.encode(some) == ids and dataset.decode(ids) == some, some
# encode merges the earliest token first, wherever it stands.
def by_hand(word):
    parts = list(word)
    while True:
        joined = map("".join, zip(parts, parts[1:]))
        ranks = [(dataset.stoi.get(pair, 999), i) for i, pair in enumerate(joined)]
        rank, i = min(ranks, default=(999, 0))
        if rank == 999:
            return [dataset.stoi[part] for part in parts]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
for word in sorted(set(bpe.words_of(text)))[::7]:
    assert again.encode(word.encode("latin-1").decode()) == by_hand(word), word

# Writing: what the model draws are the bytes of these, one token after another.
class Model:
    def generate(self, idx, n, *how):
        return torch.cat([idx, torch.tensor([[self.ids.pop(0)]])], dim=1)

fake, screen = Model(), io.StringIO()
fake.ids = list("caf\u00e9 \u4e2d\x1b[2J\x07\u009b\n\tb".encode())
sys.stdout, terminal = screen, sys.stdout
bpe.write(fake, dataset, "a ", len(fake.ids), lab.TrainConfig(device="cpu"))
sys.stdout = terminal
expected = "a caf\u00e9 \u4e2d\ufffd[2J\ufffd\ufffd\n\tb\n"
assert screen.getvalue() == expected, ascii(screen.getvalue())
print(hash("text"), ascii(dataset.itos))
"""
STATE = """
import math
import sys
import torch
import torch.nn.functional as F
import bpe
whole, half, other = [torch.load(path, weights_only=True) for path in sys.argv[1:4]]
assert whole["itos"] == half["itos"] == other["itos"], "tokens come from the checkpoint"
assert whole["itos"][:256] == bpe.BYTES and len(whole["itos"]) == 512
for name, w in whole["weights"].items():
    assert torch.allclose(w, half["weights"][name], rtol=0, atol=1e-6), name
bpe.lab.CharDataset = bpe.BytePairs
saved, model, dataset = bpe.lab.load(sys.argv[1])
ids = torch.tensor(dataset.encode(open("input.txt", encoding="utf-8").read()))
ids = ids[len(ids) * 9 // 10:]
windows = ids.unfold(0, 17, 16)
with torch.no_grad():
    loss = F.cross_entropy(model(windows[:, :-1])[0].mT, windows[:, 1:]).item()
print(loss / math.log(2) * len(ids) / len(dataset.decode(ids.tolist())))
"""
SAID = """
import subprocess
import sys
done = subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True)
print(done.returncode, done.stdout, done.stderr)
"""

def check(folder, python):
    tokens = {python("-c", CODE, PYTHONHASHSEED=seed).split(" ", 1)[1] for seed in "12"}
    assert len(tokens) == 1, "each run must find the same tokens"
    size = ["--n_layers", "1", "--block_size", "16", "--d_model", "32"]
    rest = ["--warmup_steps", "100", "--sample_chars", "30"]
    told = python("bpe.py", *size, *rest, "--max_steps", "8", "--checkpoint_path", "whole.pt")
    half = ["bpe.py", "--checkpoint_path", "half.pt"]
    python(*half, *size, *rest, "--max_steps", "4")
    resumed = python(*half, *rest, "--max_steps", "8", "--resume")
    assert "resuming at step 4" in resumed, resumed
    (folder / "other.txt").write_text("Quite \u00e4nother text. " * 300, encoding="utf-8")
    (folder / "other.pt").write_bytes((folder / "half.pt").read_bytes())
    other = python("bpe.py", *rest, "--max_steps", "9", "--resume", "--text_path", "other.txt",
                   "--checkpoint_path", "other.pt", "--learning_rate", "1e-2")
    assert "the model of step 9" in other, other
    bits = float(python("-c", STATE, "whole.pt", "half.pt", "other.pt"))
    assert f"{bits:.3f} bits per character" in told, (bits, told)
    text = python(*half, "--prompt", "def ", "--sample_chars", "9")
    assert "\ndef " in text, text
    said = python("-c", SAID, "bpe.py", "--prompt", "x")  # a checkpoint of characters
    assert said.startswith("1") and "mini_transformer.py" in said and "Traceback" not in said
