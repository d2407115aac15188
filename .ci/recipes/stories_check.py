"""Chunks make the step of the whole batch; byte pairs, resuming and writing work with it."""
CODE = """
import math
import torch
import stories
lab, run = stories.lab, stories.lab.TrainConfig(learning_rate=0.01)
assert stories.BytePairs.n_tokens == 8000 and stories.HALF == torch.cuda.is_available()
config = lab.TransformerConfig(n_layers=2, d_model=32, d_ff=48, block_size=8)
x, y = torch.randint(65, (2, 11, 8))                   # chunks of 4, 4 and 3
def trained(step, half=False, max_norm=0.5):
    torch.manual_seed(1)
    model, stories.HALF, sizes = lab.MiniTransformer(config), half, []
    model.token_emb.register_forward_hook(lambda m, x, y: sizes.append(len(x[0])))
    optimizer = lab.make_optimizer(model, run)
    losses = [step(model, optimizer, x, y, max_norm) for _ in range(3)]
    state = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    return losses, state, sizes, list(model.parameters())

losses, averages, _, weights = trained(lab.training_step)
mine, my_averages, sizes, my_weights = trained(stories.training_step)
assert max(sizes) <= stories.CHUNK == 4 and sum(sizes) == 33, sizes
assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(losses, mine)), (losses, mine)
for a, b in zip(averages, my_averages):
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
for a, b in zip(weights, my_weights):
    assert torch.allclose(a, b, rtol=0, atol=1e-4), (a - b).abs().max()
half, _, _, half_weights = trained(stories.training_step, half=True)
assert half != mine and all(abs(a - b) < 0.05 for a, b in zip(mine, half)), (mine, half)
assert all(p.dtype == torch.float32 for p in half_weights)
"""
EQUAL = """
import sys
import torch
a, b = [torch.load(path, weights_only=True) for path in sys.argv[1:]]
assert a["step"] == b["step"] and a["itos"] == b["itos"] and len(a["itos"]) > 512
for name, w in a["weights"].items():
    assert torch.allclose(w, b["weights"][name], rtol=0, atol=1e-6), name
"""

def check(folder, python):
    python("-c", CODE)
    size = ["--n_layers", "1", "--block_size", "16", "--d_model", "32"]
    rest = ["--warmup_steps", "100", "--sample_chars", "30", "--batch_size", "6"]
    told = python("stories.py", *size, *rest, "--max_steps", "6", "--checkpoint_path", "1.pt")
    assert "perplexity" in told, told
    half = ["stories.py", "--checkpoint_path", "half.pt"]
    python(*half, *size, *rest, "--max_steps", "3")
    resumed = python(*half, *rest, "--max_steps", "6", "--resume")
    assert "resuming at step 3" in resumed, resumed
    python("-c", EQUAL, "1.pt", "half.pt")
    text = python(*half, "--prompt", "Once upon", "--sample_chars", "9")
    assert "\nOnce upon" in text, text
