"""For the checks of recipes that train: a run that was stopped and resumed equals a whole one."""
EQUAL = """
import sys
import torch
a, b = [torch.load(path, weights_only=True) for path in sys.argv[1:]]
assert a["step"] == b["step"], (a["step"], b["step"])
for name, w in a["weights"].items():
    assert torch.allclose(w, b["weights"][name], rtol=0, atol=1e-6), name
"""

def check_resumed(python, script, size):
    """Train 8 steps at once, and 4 and 4; let the model write. -> what the whole run said."""
    rest = ["--warmup_steps", "100", "--sample_chars", "30"]
    told = python(script, *size, *rest, "--max_steps", "8", "--checkpoint_path", "whole.pt")
    half = [script, "--checkpoint_path", "half.pt"]
    python(*half, *size, *rest, "--max_steps", "4")
    resumed = python(*half, *rest, "--max_steps", "8", "--resume")
    assert "resuming at step 4" in resumed, resumed
    python("-c", EQUAL, "whole.pt", "half.pt")
    text = python(*half, "--prompt", "def ", "--sample_chars", "9")
    assert "\ndef " in text, text
    return told
