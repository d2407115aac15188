"""copying.py: its text, its commands, and its table, compared with loops and with weights
that are set to 0 by hand."""
import hashlib
import re
import shlex

# Heads whose attention is made by hand: 0 looks at the character before, 1 at what followed
# the last earlier occurrence of the current one, 2 evenly at all, 3 at itself.
MADE_BY_HAND = """
import sys
import torch
import mini_transformer as lab
forward, current = lab.MiniTransformer.forward, []

def remember(self, idx, targets=None):
    current[:] = [idx]
    return forward(self, idx, targets)

def by_hand(q, k, v, is_causal=False):
    idx = current[0].tolist()
    B, T = len(idx), len(idx[0])
    w = torch.zeros(B, 4, T, T)
    for b in range(B):
        for t in range(T):
            w[b, 0, t, max(t - 1, 0)] = 1
            earlier = [j for j in range(t) if idx[b][j] == idx[b][t]]
            w[b, 1, t, earlier[-1] + 1 if earlier else t] = 1
            w[b, 2, t, : t + 1] = 1 / (t + 1)
            w[b, 3, t, t] = 1
    return w @ v

lab.MiniTransformer.forward, lab.explicit_attention = remember, by_hand
sys.argv = ["copying.py", "checkpoint.pt"]
text = lab.load_text("input.txt")
n = len(text)
lab.load_text = lambda path: text[: n // 2] + text[-n // 20 :]  # few windows: loops are slow
exec(open("copying.py", encoding="utf-8").read())
"""
SILENCED = """
import torch
import mini_transformer as lab
_, model, dataset = lab.load("checkpoint.pt")
text, T, D = lab.load_text("input.txt"), 64, 32
held_out = torch.tensor(dataset.encode(text[len(text) * 9 // 10 :]))
n = min(100, (len(held_out) - 1) // T)
x = torch.stack([held_out[i * T : i * T + T] for i in range(n)])
y = torch.stack([held_out[i * T + 1 : i * T + T + 1] for i in range(n)])
with torch.no_grad():
    print(model(x, y)[1].item())
    for block in model.blocks:
        for head in range(4):
            kept = block.attn.out_proj.weight.clone()
            block.attn.out_proj.weight[:, head * D : head * D + D] = 0
            print(model(x, y)[1].item())
            block.attn.out_proj.weight[:] = kept
"""

def table(said):
    """-> the row 'if even', then those of the heads: [character before, followed, loss]."""
    rows = [line for line in said.splitlines() if re.match(r"if even|\s+\d+\s+\d+\s", line)]
    return [[float(number) for number in re.findall(r"\d+\.\d+", row)] for row in rows]

def check(folder, python_with):
    def python(*words):
        return python_with(*words, OMP_NUM_THREADS="1")

    said = python("copying.py")
    text = (folder / "copies.txt").read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest.startswith("ddb787e4"), "not the text that the README's figures are from"
    lines = text.splitlines()
    passages = [line[: len(line) // 4] for line in lines]
    assert len(lines) == 5000 and all(line == 4 * p for line, p in zip(lines, passages))
    assert {len(passage) for passage in passages} == set(range(5, 13))
    assert len(set("".join(passages))) == 16 and len(set(passages)) > 4900

    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("python ")]
    assert [command[1] for command in commands] == 2 * ["mini_transformer.py"], said
    one, two = commands
    few = ["--max_steps", "1", "--sample_chars", "1"]
    assert "step 1 |" in python(*two[1:], *few)
    same = " ".join(two).replace("--n_layers 2", "--n_layers 1").replace("copies2", "copies1")
    assert same == " ".join(one), "the commands differ in more than the layers"

    even, *heads = table(python("-c", MADE_BY_HAND))
    assert len(heads) == 8, heads
    for i in 0, 4:                              # both blocks
        before, last, evenly, itself = heads[i : i + 4]
        assert before[0] == 1 and last[1] == 1 and itself[0] == 0, heads
        assert before[1] < 1 and last[0] < 1 and itself[1] < 1, heads
        assert evenly[:2] == even[:2] and 0 < even[0] < 0.5, (evenly, even)

    even, *heads = table(python("copying.py", "checkpoint.pt"))
    wanted = [float(line) for line in python("-c", SILENCED).split()]
    got = [even[2], *(head[2] for head in heads)]
    assert len(got) == 9 and all(abs(a - b) < 1e-3 for a, b in zip(got, wanted)), (got, wanted)
