"""The cache changes nothing within the window, and reads each character once."""
CODE = """
import torch
import cache
lab = cache.lab
for changes in (dict(), dict(n_kv_heads=2, attention="fused"), dict(positions="none"),
                dict(positions="learned", pre_norm=False), dict(positions="sinusoidal"),
                dict(dropout=0.5, norm="rmsnorm", qk_norm=False)):
    torch.manual_seed(1)
    config = lab.TransformerConfig(block_size=16, n_layers=3, d_model=32, d_ff=64, **changes)
    model = lab.MiniTransformer(config)                # in training mode, as in a report
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    idx = torch.randint(65, (2, 40))
    reader, n_read = cache.Cached(model, 40), []
    added = config.positions in ("learned", "sinusoidal")
    reader.cached.token_emb.register_forward_hook(lambda m, x, y: n_read.append(x[0].size(1)))
    for n in range(3, 41):
        difference = (reader.logits(idx[:, :n]) - reader.without(idx[:, :n])).abs().max().item()
        assert n > 16 and not added or difference < 2e-4, (changes, n, difference)
    # Past the window, what has dropped out is still felt, with rope and with no positions.
    assert added or difference > 1e-2, (changes, difference)
    assert n_read == [3] + [1] * (13 if added else 37), (changes, n_read)
    greedy = cache.Cached(model, 19).generate(idx[:, :3], 13, 0)
    assert greedy.equal(model.generate(idx[:, :3], 13, 0)), changes
    # A prompt that is longer than the window: only its end is read.
    long = cache.Cached(model, 40)
    assert torch.allclose(long.logits(idx), long.without(idx), atol=1e-4), changes
    assert model.training
"""

def check(folder, python):
    python("-c", CODE)
    command = ["--prompt", "def ", "--sample_chars", "60", "--temperature", "1", "--seed", "5"]
    ours, theirs = python("cache.py", *command), python("mini_transformer.py", *command)
    assert ours == theirs, f"within the window the text must be the same: {ours!r} {theirs!r}"
    size = ["--n_layers", "1", "--block_size", "16", "--d_model", "32"]
    train = ["cache.py", "--checkpoint_path", "cache.pt", "--sample_chars", "40", "--max_steps"]
    python(*train, "1", *size)                         # writes past the window, too
    assert "resuming at step 1" in python(*train, "2", "--resume")
    table = python("-c", "import cache; cache.compare('cache.pt')")
    assert "characters 18 to 33: without" in table, table
