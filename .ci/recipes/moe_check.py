"""A position gets its two best experts, weighted; training, resuming and writing work."""
from resumed import check_resumed

CODE = """
import torch
import moe
lab = moe.lab
torch.manual_seed(1)
config = lab.TransformerConfig(n_layers=2, d_model=16, d_ff=24, block_size=8)
layer = moe.MixtureOfExperts(config)
with torch.no_grad():
    for p in layer.parameters():
        p.add_(0.5 * torch.randn_like(p))
x = torch.randn(3, 5, 16)
out = layer(x)
for b in range(3):
    for t in range(5):
        p = (x[b, t] @ layer.router.weight.T).softmax(dim=-1)
        i, j = p.argsort(descending=True)[:2].tolist()
        both = p[i] * layer.experts[i](x[b, t]) + p[j] * layer.experts[j](x[b, t])
        assert torch.allclose(out[b, t], both / (p[i] + p[j]), atol=1e-5), (b, t)
p = (x @ layer.router.weight.T).softmax(dim=-1).flatten(0, 1)
share = torch.zeros(8)
for row in p:
    share[row.argsort(descending=True)[:2]] += 1 / 30
assert torch.allclose(layer.share, share, atol=1e-6)
assert torch.allclose(layer.imbalance, 8 * (share * p.mean(dim=0)).sum(), atol=1e-5)

# The second loss reaches the routers in training; the loss that is told is the first alone.
lab.FeedForward = moe.MixtureOfExperts
x, y = torch.randint(65, (2, 4, 8))
gradients = []
for balance in (0.0, 1.0):
    torch.manual_seed(2)
    model = lab.MiniTransformer(config)
    loss, moe.BALANCE = model(x, y)[1].item(), balance
    told = moe.training_step(model, lab.make_optimizer(model, lab.TrainConfig()), x, y, 1e9)
    assert abs(loss - told) < 1e-6, (loss, told)
    gradients.append([block.ffn.router.weight.grad for block in model.blocks])
for without, with_balance in zip(*gradients):
    assert (without - with_balance).abs().max() > 1e-5
"""

def check(folder, python):
    python("-c", CODE)
    size = ["--n_layers", "2", "--block_size", "16", "--d_model", "32", "--d_ff", "32"]
    told = check_resumed(python, "moe.py", size)
    for block in "block 0:", "block 1:":
        shares = [float(share) for share in told.split(block)[1].split("\n")[0].split()]
        assert len(shares) == 8 and abs(sum(shares) - 1) < 0.005, told
