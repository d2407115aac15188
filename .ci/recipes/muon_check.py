"""Muon's step is right, and a resumed run goes on exactly as if it had not stopped."""
from resumed import check_resumed

CODE = """
import torch
import muon
torch.manual_seed(1)
for shape in (3, 24, 8), (1, 8, 24), (2, 16, 16):
    x = torch.randn(shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    found = u.mT @ muon.orthogonal(x) @ v.mT           # the same directions as x,
    values = found.diagonal(dim1=1, dim2=2)
    rest = (found - torch.diag_embed(values)).abs().max()
    assert rest < 1e-4, f"other directions: {rest}"
    normal = values[s > 0.2 * s.max()]                 # of nearly one length
    assert 0.6 < normal.min() and normal.max() < 1.25, f"lengths: {normal}"

config = muon.lab.TransformerConfig(n_layers=2, d_model=32, d_ff=48, block_size=8)
model, run = muon.lab.MiniTransformer(config), muon.lab.TrainConfig(learning_rate=0.01)
twin = muon.lab.MiniTransformer(config)
twin.load_state_dict(model.state_dict())
ours, adamw = muon.make_optimizer(model, run), muon.lab.make_optimizer(twin, run)
assert sum(len(group["params"]) for group in ours.param_groups) == len(list(model.parameters()))
start = {name: p.detach().clone() for name, p in model.named_parameters()}
means = {name: 0.0 for name in start}
for step in range(3):
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for net, optimizer in (model, ours), (twin, adamw):
        for name, p in net.named_parameters():
            p.grad = gradients[name].clone()
        optimizer.step()
    for name, p in model.named_parameters():
        if name.startswith("blocks") and p.dim() == 2:
            means[name] = 0.95 * means[name] + 0.05 * gradients[name]
            ahead = 0.05 * gradients[name] + 0.95 * means[name]
            size = 0.2 * 0.01 * max(p.shape) ** 0.5
            expected = before[name] * (1 - 0.01 * 0.4) - size * muon.orthogonal(ahead[None])[0]
            assert torch.allclose(p, expected, atol=1e-6), f"Muon, {name}"
        else:
            theirs = dict(twin.named_parameters())[name]
            assert torch.allclose(p, theirs, atol=1e-6), f"AdamW, {name}"
"""

def check(folder, python):
    python("-c", CODE)
    check_resumed(python, "muon.py", ["--n_layers", "1", "--block_size", "16", "--d_model", "32"])
