"""curve.py: every evaluation has a row and a bar; it knows when the held-out loss turned up."""
import re

MAKE = """
import torch
saved = torch.load("checkpoint.pt", weights_only=True)
for name, reports, step, planned in (
        ("falling", {0: (None, 4.0), 10: (3.0, 2.0), 20: (1.5, 1.0)}, 20, 20),
        ("turned", {0: (None, 4.0), 10: (3.0, 2.0), 20: (1.5, 1.0)}, 20, 90),
        ("resumed", {0: (None, 4.0), 20: (None, 1.0), 30: (1.5, 1.7), 40: (1.4, 1.6)}, 40, 40)):
    saved.update(reports=reports, step=step, run={**saved["run"], "max_steps": planned})
    torch.save(saved, name + ".pt")
"""

WRONG = """
import subprocess, sys
done = subprocess.run([sys.executable, "curve.py", "none.pt"], capture_output=True, text=True)
assert done.returncode and "Traceback" not in done.stderr, done.stderr
print(done.stderr)
"""

def check(folder, python):
    python("-c", MAKE)
    said = {name: python("curve.py", f"{name}.pt") for name in ("falling", "turned", "resumed")}
    rows = re.findall(r"^ +(\d+) +(.*?) +(#+)$", said["falling"], re.M)
    assert [(step, figures.split()) for step, figures, _ in rows] == [
        ("0", ["4.000"]), ("10", ["3.000", "2.000"]), ("20", ["1.500", "1.000"])], said
    a, b, c = (len(bar) for _, _, bar in rows)
    assert a == 2 * b == 4 * c > 20, "bars are as long as the losses"
    assert "has not turned up" in said["falling"].splitlines()[-1], said
    assert "has turned up" in said["turned"] and "step 90" in said["turned"], said
    assert "It was lower before" in said["resumed"] and "turned" not in said["resumed"], said
    assert "has not turned up" in python("curve.py"), "the default is checkpoint.pt"
    assert "none.pt" in python("-c", WRONG)
