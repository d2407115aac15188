"""page.py, as far as it can be checked without a browser; check_page.py does the rest."""
import base64
import json
import re

import torch

def check(folder, python):
    assert "page.html" in python("page.py", "checkpoint.pt")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "http" not in page and " src=" not in page  # nothing is loaded from elsewhere
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    data = json.loads(re.search(r"^const \{.*?\} = (\{.*\})$", page, re.MULTILINE)[1])
    assert data["config"] == saved["config"] and data["itos"] == saved["itos"]
    assert data["weights"].keys() == saved["weights"].keys()
    for name, (row, numbers) in data["weights"].items():
        values = torch.frombuffer(bytearray(base64.b64decode(numbers)), dtype=torch.float32)
        expected = saved["weights"][name]
        assert torch.equal(values, expected.flatten()), f"other numbers in {name}"
        assert row == (expected.size(1) if expected.dim() == 2 else 0), f"other rows in {name}"
    for name, column in ("training", 0), ("held_out", 1):
        losses = [both[column] for both in saved["reports"].values()]
        drawn = [loss for _, loss in data["curves"][name]]
        assert drawn == [loss for loss in losses if loss is not None], f"{name}: other losses"
