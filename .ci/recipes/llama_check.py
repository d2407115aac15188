"""llama.py: the converted tensors, put through Llama written out here, give the lab's logits.
Where transformers is installed, the whole script runs too."""
import importlib.util
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

STYLES = {"tied": dict(n_kv_heads=2), "untied": dict(n_kv_heads=0, tie_weights=False, bias=True)}

def check(folder, python):
    said = python(Path(__file__).resolve())            # everything below
    print(said.strip())
    for name in STYLES if "and transformers" in said else ():
        said = python("llama.py", f"{name}.pt")
        ours, theirs = [line.split("writes")[1] for line in said.splitlines()[-2:]]
        assert "rounding" in said and ours == theirs, said
    try:
        python("llama.py", "checkpoint.pt")            # LayerNorm: not a Llama
    except AssertionError as error:
        assert "norm, qk_norm" in str(error) and "Traceback" not in str(error), error
    else:
        raise AssertionError("llama.py should have refused checkpoint.pt")

def forward(w, c, ids):                                # (T,) -> logits (T, V)
    H, G, eps = c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"]
    D = c["hidden_size"] // H
    def layer(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))
    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
    angle = torch.arange(len(ids))[:, None] / 10000 ** (torch.arange(D // 2) * 2 / D)
    turn = torch.polar(torch.ones_like(angle), angle)  # (T, D/2)
    def rotated(x):                                    # (T, D)
        z = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at, out = f"model.layers.{i}", []
        z = norm(x, f"{at}.input_layernorm")
        q, k, v = (layer(z, f"{at}.self_attn.{n}_proj").split(D, -1) for n in "qkv")
        for h in range(H):
            scores = rotated(q[h]) @ rotated(k[h * G // H]).T / math.sqrt(D)
            future = torch.ones(len(ids), len(ids)).triu(1) == 1
            out.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[h * G // H])
        x = x + layer(torch.cat(out, -1), f"{at}.self_attn.o_proj")
        z = norm(x, f"{at}.post_attention_layernorm")
        z = F.silu(layer(z, f"{at}.mlp.gate_proj")) * layer(z, f"{at}.mlp.up_proj")
        assert z.size(-1) == c["intermediate_size"]
        x = x + layer(z, f"{at}.mlp.down_proj")
    head = "model.embed_tokens" if c["tie_word_embeddings"] else "lm_head"
    return F.linear(norm(x, "model.norm"), w[f"{head}.weight"])

def main():
    import mini_transformer as lab
    import llama
    for name, style in STYLES.items():
        config = lab.TransformerConfig(vocab_size=12, block_size=9, n_layers=2, n_heads=4,
                                       d_model=32, d_ff=24, norm="rmsnorm", qk_norm=False, **style)
        model = lab.MiniTransformer(config)
        for i, (place, p) in enumerate(sorted(model.named_parameters())):
            n = torch.arange(p.numel(), dtype=torch.float64)
            gain = p.dim() == 1 and place.endswith("weight")
            p.data = (0.4 * torch.sin(n * n + i)).float().view_as(p) + gain
        weights = model.state_dict()
        torch.save(dict(config=vars(config), run={}, itos=list("\n abcdefghéü"), step=0,
                        reports={0: (None, 1.0)}, weights=weights, optimizer={}), f"{name}.pt")
        ids, sizes = torch.arange(9) ** 2 % 12, llama.sizes(weights, config)
        expected = forward(llama.convert(weights, config), sizes, ids)
        assert expected.std() > 1 and sizes["attention_bias"] == sizes["mlp_bias"] == config.bias
        torch.testing.assert_close(model(ids[None])[0][0], expected, rtol=1e-5, atol=1e-5)
    if importlib.util.find_spec("transformers"):
        print("llama.py: its formulas and transformers are compared")
    else:
        print("llama.py: transformers is not installed, so only its formulas were compared")

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
