"""look.py: what it prints is what happens, before clipping, and watching changes nothing."""
import re

OPTIONS = ("--max_steps 3 --n_layers 2 --block_size 16 --d_model 32 --d_ff 32 --batch_size 4 "
           "--seed 2 --warmup_steps 0 --sample_chars 1 --device cpu "
           "--checkpoint_path look.pt").split()

# By hand, with the first weights: the gradient of each block, its output, its largest score,
# for the batches of steps 1 and 3. With seed 2, larger scores stand behind the mask.
BY_HAND = """
import torch, mini_transformer as lab
text = lab.load_text("input.txt")
dataset = lab.CharDataset(text, 16)
torch.manual_seed(2)
model = lab.MiniTransformer(lab.TransformerConfig(
    vocab_size=dataset.vocab_size, n_layers=2, block_size=16, d_model=32, d_ff=32))
for step in 0, 2:
    torch.manual_seed(2_000_000 + step)
    x, y = dataset[torch.randint(len(dataset.data) * 9 // 10 - 16, (4,))]
    model.zero_grad()
    model(x, y)[1].backward()
    h = model.token_emb(x)
    for block in model.blocks:
        g = torch.cat([p.grad.flatten() for p in block.parameters()]).norm()
        a = block.attn
        q, k, v = a.qkv_proj(block.ln_attn(h)).view(4, 16, 12, 8).transpose(1, 2).split(4, 1)
        q, k = lab.rotate(a.q_norm(q), *a.cos_sin), lab.rotate(a.k_norm(k), *a.cos_sin)
        largest = max((q[..., i, :] * k[..., j, :]).sum(dim=-1).abs().max().item() / 8 ** 0.5
                      for i in range(16) for j in range(i + 1))
        h = block(h)
        print(f"{g:.4f} {h.std():.4f} {largest:.2f}")
    print(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
"""

def check(folder, python):
    def runs(*more):
        said = python("look.py", *OPTIONS, *more)
        rows = [row.split()[1:] for row in re.findall(r"^ +\d +\d.*", said, re.M)]
        assert len(rows) == 4, said             # two blocks; first and last step
        deciles = [float(x) for x in re.findall(r"\d+\.\d\d", said.splitlines()[-1])]
        share = re.search(r"(\d+)% of the steps were clipped", said)[1]
        return rows, deciles, share, re.search(r"step 3 .* val (\S+)", said)[1]

    hand = [[float(x) for x in line.split()] for line in python("-c", BY_HAND).splitlines()]
    rows, deciles, share, val = runs("--learning_rate", "0")  # the first weights, to the end
    for row, line in zip(rows, hand[:2] + hand[3:5]):
        assert all(abs(float(a) - b) < tolerance for a, b, tolerance in
                   zip(row, line, (2e-3, 6e-4, 0.06))), (row, line)
    assert len(deciles) == 11 and deciles == sorted(deciles), deciles
    for [whole] in hand[2], hand[5]:
        assert deciles[0] - 0.01 < whole < deciles[-1] + 0.01, (deciles, whole)
    rows, deciles, share, val = runs()
    plain = python("mini_transformer.py", *OPTIONS)
    assert val == re.search(r"step 3 .* val (\S+)", plain)[1], "watching changes the training"
    tiny, free = runs("--grad_clip", "1e-6"), runs("--grad_clip", "inf")
    assert tiny[2] == "100" and free[2] == "0", (tiny[2], free[2])
    assert tiny[0][:2] == free[0][:2] == rows[:2], "gradients are shown before clipping"
