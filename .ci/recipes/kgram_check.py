"""kgram.py: its losses are those of an independent count; mistakes end in a sentence."""
import math
import re

def by_hand(text):
    cut, losses = len(text) * 9 // 10, []
    learned = text[:cut]
    def p(k, context, char):
        less = p(k - 1, context[1:], char) if k else 1 / len(set(text))
        runs = [learned[i : i + k + 1] for i in range(cut - k)]
        return (runs.count(context + char) + 4 * less) / (
            sum(run[:k] == context for run in runs) + 4)
    for k in range(6):
        total = sum(-math.log(p(k, text[i - k : i], text[i])) for i in range(cut, len(text)))
        losses.append(f"{total / (len(text) - cut):.3f}")
    return losses

WRONG = """
import subprocess, sys
for name in "none.txt", "empty.txt":
    done = subprocess.run([sys.executable, "kgram.py", name], capture_output=True, text=True)
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    print(done.stderr)
"""

def check(folder, python):
    text = (folder / "input.txt").read_text(encoding="utf-8")[:1500]
    (folder / "little.txt").write_text(text, encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    said = python("kgram.py", "little.txt")
    rows = re.findall(r"^ +(\d) +(\S+) +(\S+)$", said, re.M)
    assert [k for k, _, _ in rows] == list("012345"), said
    assert [loss for _, loss, _ in rows] == by_hand(text), (rows, by_hand(text))
    assert all(abs(math.exp(float(loss)) - float(p)) < 0.1 for _, loss, p in rows), rows
    best = min(rows, key=lambda row: float(row[1]))[0]
    assert f"Best: {best}." in said and f"{math.log(len(set(text))):.3f}" in said, said
    default = python("kgram.py")
    assert default != said and "Learns by counting" in default, default
    wrong = python("-c", WRONG)
    assert "none.txt" in wrong and "too short" in wrong, wrong
