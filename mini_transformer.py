"""mini_transformer: a GPT in one file. Read it, retype it, run it, take it apart.

    python mini_transformer.py                    # train on Shakespeare, write some
    python mini_transformer.py --prompt "ROMEO:"  # write from the saved checkpoint

It reads characters and predicts the next one. Loss: the mean of -ln p(next), in nats.
Each position owns C numbers, its part of the residual stream x. Blocks add to them.

ids (B, T) -> token_emb -> x --+----------------> + --+---------------> + -> x, L times
                               '-> norm -> attn --'   '-> norm -> ffn --'
x -> ln_final -> lm_head -> logits (B, T, V) -> softmax -> the next character
B batch   T positions   V vocabulary   L layers   C d_model   F d_ff
H heads   G heads of keys and values   D = C / H, size of a head
"""
import argparse
import math
import os
import zlib
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F

# ==== 1. Constants: edit, or pass --name value (bool: --name, --no-name) ====
@dataclass
class TransformerConfig:
    """The model: its sizes, then the choices between known designs."""
    vocab_size: int = 65       # V; train takes it from the text
    block_size: int = 128      # longest context, in characters
    n_layers: int = 4          # L, blocks one after the other
    n_heads: int = 4           # H, attentions side by side
    n_kv_heads: int = 0        # G, shared key/value heads; 0: n_heads
    d_model: int = 128         # C, width of the residual stream
    d_ff: int = 512            # F, width of the feed-forward; swiglu: 2F/3
    dropout: float = 0.0       # fraction zeroed of what joins x, while training
    bias: bool = False         # in the blocks' linear layers; layernorms have theirs
    positions: str = "rope"    # rope, learned, none
    attention: str = "fused"   # fused, explicit: PyTorch's kernel or the equation
    causal: bool = True        # False: each sees the future, and cheats
    ffn: str = "swiglu"        # relu, gelu, gelu_tanh (GPT-2's), swiglu
    norm: str = "layernorm"    # layernorm, rmsnorm
    qk_norm: bool = True       # norm queries and keys: tame scores
    pre_norm: bool = True      # norm before attn and ffn; False: after
    tie_weights: bool = True   # token_emb and lm_head are one matrix

@dataclass
class TrainConfig:
    """The run, and the writing after it."""
    text_path: str = "input.txt"  # UTF-8; this one is downloaded if missing
    max_steps: int = 3600      # steps of the optimizer
    batch_size: int = 12       # B, windows of block_size characters
    learning_rate: float = 2e-3  # its peak
    warmup_steps: int = 100    # steps of linear rise to the peak
    weight_decay: float = 0.6  # each step: matrices *= 1 - rate * this
    grad_clip: float = 1.0     # the gradient's length, at most
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # or mps
    seed: int = 1337           # same seed and CPU: same text
    eval_interval: int = 900   # steps between evaluations
    checkpoint_path: str = "checkpoint.pt"  # this model's best; replaces another's
    resume: bool = False       # continue the model of checkpoint_path + ".last"
    prompt: str = ""           # no training: the checkpoint continues it
    sample_chars: int = 500    # characters to write
    temperature: float = 0.8   # 0: the likeliest, 1: as learned, more: wilder
    top_k: int = 0             # draw from the k likeliest; 0: from all
    top_p: float = 1.0         # draw from the likeliest that sum to this

def choose(menu, option, name):
    """menu[name], or a ValueError that lists the choices."""
    if name not in menu:
        raise ValueError(f"{option}={name!r}: choose from {', '.join(menu)}")
    return menu[name]

# ==== 2. Data: a text, as windows of ids ====
TEXT_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
            "tinyshakespeare/input.txt")

def load_text(path):
    """A UTF-8 file as str; input.txt is downloaded first, if it is missing."""
    if path == "input.txt" and not os.path.exists(path):
        try:
            response = requests.get(TEXT_URL, timeout=30)
            if len(response.content) != 1_115_394:  # an error page
                raise requests.RequestException("another size")
        except requests.RequestException as error:
            print(f"No download ({error!r:.50}): reading Python's manual instead")
            from pydoc_data.topics import topics
            return "\n".join(topics.values())
        with open(path, "wb") as file:
            file.write(response.content)
    with open(path, encoding="utf-8") as file:
        return file.read()

class CharDataset:
    """A text as ids. dataset[i] -> x, y, each (T,) int64: y is x one character later.
        x  h e l l     each position is an example: after h comes e,
        y  e l l o     after he comes l, after hel comes l, after hell comes o"""
    def __init__(self, text, block_size):
        self.itos = sorted(set(text))           # id -> character, in a fixed order
        self.stoi = {char: i for i, char in enumerate(self.itos)}  # character -> id
        self.vocab_size = len(self.itos)
        self.block_size = block_size
        self.data = torch.tensor(self.encode(text))  # (N,)

    def encode(self, text):                     # str -> list of ids
        unknown = set(text) - set(self.itos)
        if unknown:
            raise ValueError(f"not in the text learned from: {sorted(unknown)}")
        return [self.stoi[char] for char in text]

    def decode(self, ids):                      # list of ids -> str
        return "".join(self.itos[i] for i in ids)

    def __len__(self):
        return len(self.data) - self.block_size

    def __getitem__(self, i):
        # Batch, T = 2: i is [[0], [9]]; + [0, 1, 2] = [[0, 1, 2], [9, 10, 11]]
        windows = self.data[i + torch.arange(self.block_size + 1)]
        return windows[..., :-1], windows[..., 1:]

# ==== 3. Positions: without them, block 1 sees a bag of characters ====
def angles(n, n_frequencies):
    """(n, n_frequencies) radians: position times frequency (Vaswani 2017, 3.5)."""
    frequencies = 10000.0 ** -(torch.arange(n_frequencies) / n_frequencies)
    return torch.outer(torch.arange(n), frequencies)  # column 0: 1 radian a position

def rotate(x, angle):
    """Rope (Su 2021, paired as in GPT-NeoX): x (..., T, D), angle (T, D/2) -> as x.
    Numbers d and d + D/2 of a position are the tip (a, b) of clock hand d; at position
    t it is turned by angle[t, d]. Turned alike, two keep their dot product: q at i and
    k at j match by i - j only. Fast hands tell near places apart, slow ones far."""
    a, b = x.chunk(2, dim=-1)                   # 2 of (..., T, D/2)
    cos, sin = angle.cos(), angle.sin()         # 2 of (T, D/2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

def learned(n, C):
    """(n, C): a trained vector for each position, as in GPT-2."""
    return nn.Parameter(0.02 * torch.randn(n, C))

POSITIONS = {"rope": None, "learned": learned, "none": None}  # rope turns q, k

# ==== 4. Attention: the only place where positions exchange information ====
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}  # Ba 2016, Zhang 2019

def make_norm(config, size):
    """A layer (..., size) -> (..., size): mean square 1, times trained gains."""
    norm = choose(NORMS, "norm", config.norm)
    return norm(size, eps=1e-5)                 # layernorm: also mean 0, and biases

def linear(n_in, n_out, bias=False, std=0.02):
    """A layer (..., n_in) -> (..., n_out); its weights start as noise, as GPT-2's."""
    layer = nn.Linear(n_in, n_out, bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer

def explicit_attention(q, k, v, is_causal=True):
    """softmax(q k^T / sqrt(D)) v (Vaswani 2017, Eq. 1): 3 of (B, H, T, D) -> 1.
    Each query averages the values it may see, by how well their keys match it.
        h  * . .     row: query, column: key
        e  * * .     *: a weight
        l  * * *     .: the future, so 0"""
    scores = q @ k.mT / math.sqrt(q.size(-1))   # (B, H, T, T); q.k spreads as sqrt(D)
    if is_causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
        scores = scores.masked_fill(future, -math.inf)  # exp(-inf) = 0
    return scores.softmax(dim=-1) @ v           # (B, H, T, D); weights sum to 1

ATTENTIONS = {"fused": F.scaled_dot_product_attention, "explicit": explicit_attention}

class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C). Each position asks (query), weighs itself and those
    before it by how they match (keys), and averages what they hand out (values)."""
    def __init__(self, config):
        super().__init__()
        C, H = config.d_model, config.n_heads
        G = config.n_kv_heads if config.n_kv_heads > 0 else H
        if C % (2 * H) != 0 or H % G != 0:      # D is even: rope turns pairs
            raise ValueError(f"d_model={C}, n_heads={H}, n_kv_heads={G} do not fit")
        D = C // H
        self.n_heads, self.n_kv_heads = H, G
        self.causal = config.causal
        self.qkv_proj = linear(C, (H + 2 * G) * D, config.bias)
        std = 0.02 / math.sqrt(2 * config.n_layers)  # x sums 2L outputs (GPT-2)
        self.out_proj = linear(C, C, config.bias, std)
        self.attend = choose(ATTENTIONS, "attention", config.attention)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:                      # scores stay bounded (Henry 2020)
            self.q_norm, self.k_norm = make_norm(config, D), make_norm(config, D)
        self.use_rope = config.positions == "rope"
        angle = angles(config.block_size, D // 2)
        self.angle = nn.Buffer(angle, persistent=False)  # to(device) moves it

    def forward(self, x):
        B, T, C = x.shape
        H, G, D = self.n_heads, self.n_kv_heads, C // self.n_heads
        qkv = self.qkv_proj(x).view(B, T, H + 2 * G, D)
        qkv = qkv.transpose(1, 2)               # (B, H + 2G, T, D); for H = 4, G = 2:
        q, k, v = qkv.split([H, G, G], dim=1)   # q0 q1 q2 q3 | k0 k1 | v0 v1
        q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rope:
            q, k = rotate(q, self.angle[:T]), rotate(k, self.angle[:T])
        if G < H:                               # k0 k0 k1 k1, H heads (Ainslie 2023)
            k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        out = self.attend(q, k, v, is_causal=self.causal)  # (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.out_proj(out)               # (B, T, C)

# ==== 5. Feed-forward: where each position thinks by itself ====
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": nn.GELU("tanh"),
               "swiglu": F.silu}                # on gate_proj (Shazeer 2020)

class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, C): widen, bend, narrow again."""
    def __init__(self, config):
        super().__init__()
        C, width = config.d_model, config.d_ff
        self.activation = choose(ACTIVATIONS, "ffn", config.ffn)
        self.gate_proj = None
        if config.ffn == "swiglu":
            width = 2 * width // 3              # 3 matrices weigh as 2 of F
            self.gate_proj = linear(C, width, config.bias)
        self.up_proj = linear(C, width, config.bias)
        std = 0.02 / math.sqrt(2 * config.n_layers)  # as for out_proj
        self.down_proj = linear(width, C, config.bias, std)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        gate = self.activation(self.gate_proj(x))  # near 0, it lets nothing pass
        return self.down_proj(gate * self.up_proj(x))  # (B, T, C)

# ==== 6. Block ====
class TransformerBlock(nn.Module):
    """(B, T, C) -> (B, T, C): attention, then feed-forward, added to the stream."""
    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.ln_attn = make_norm(config, config.d_model)
        self.attn = CausalSelfAttention(config)
        self.ln_ffn = make_norm(config, config.d_model)
        self.ffn = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        if self.pre_norm:       # no norm on x's own way: gradients pass unchanged
            x = x + self.drop(self.attn(self.ln_attn(x)))  # (Xiong 2020)
            return x + self.drop(self.ffn(self.ln_ffn(x)))
        x = self.ln_attn(x + self.drop(self.attn(x)))  # (Vaswani 2017)
        return self.ln_ffn(x + self.drop(self.ffn(x)))

# ==== 7. Model ====
def sample(logits, temperature=1.0, top_k=None, top_p=None):
    """logits (B, V) -> ids (B, 1): one character drawn for each row."""
    if temperature <= 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    probs = (logits / temperature).softmax(dim=-1)  # (B, V)
    probs, ids = probs.sort(descending=True)    # probs:  0.4 0.3 0.2 0.1
    if top_k:
        probs[:, top_k:] = 0                    # all but the k likeliest
        probs /= probs.sum(dim=-1, keepdim=True)  # sum to 1 again, for top_p
    if top_p is not None and top_p < 1:         # as 0.5 below (Holtzman 2020)
        before = probs.cumsum(dim=-1) - probs   # before: 0.0 0.4 0.7 0.9: two stay
        probs[(before >= top_p) & (before > 0)] = 0  # place 0 stays
    place = torch.multinomial(probs, 1)         # (B, 1); it divides by the sum
    return ids.gather(-1, place)                # (B, 1): the id at that place

class MiniTransformer(nn.Module):
    """ids, targets (B, T) -> logits (B, T, V), mean loss (no targets: None).
    Raises ValueError for more than block_size positions."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.d_model
        self.token_emb = nn.Embedding(V, C)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        make_table = choose(POSITIONS, "positions", config.positions)
        self.position_emb = make_table(config.block_size, C) if make_table else None
        self.drop = nn.Dropout(config.dropout)
        blocks = [TransformerBlock(config) for _ in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = make_norm(config, C) if config.pre_norm else nn.Identity()
        self.lm_head = linear(C, V)
        if config.tie_weights:
            self.lm_head.weight = self.token_emb.weight  # (V, C): Press 2017

    def forward(self, idx, targets=None):
        T, limit = idx.size(1), self.config.block_size
        if T > limit:
            raise ValueError(f"{T} positions: at most block_size={limit}")
        x = self.token_emb(idx)                 # (B, T, C)
        if self.position_emb is not None:
            x = x + self.position_emb[:T]       # (B, T, C) + (T, C)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)                        # (B, T, C)
        logits = self.lm_head(self.ln_final(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        """ids (B, T) -> (B, T + max_new_tokens): predict, draw, append, again."""
        was_training = self.training
        self.eval()                             # no dropout while it writes
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])  # (B, T, V)
            new = sample(logits[:, -1], temperature, top_k, top_p)  # (B, 1)
            idx = torch.cat([idx, new], dim=1)  # (B, T + 1)
        self.train(was_training)
        return idx

# ==== 8. Training ====
def make_optimizer(model, run):  # run: a TrainConfig, here and below
    """AdamW (Loshchilov 2019). Gains and biases, the vectors, do not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": run.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, run.learning_rate, betas=(0.9, 0.99), fused=True)

def schedule(step, run):
    """The learning rate: a line up to its peak, then half a cosine down to 0."""
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps  # step 0 learns, too
    done = (step - run.warmup_steps) / (run.max_steps - run.warmup_steps)
    return run.learning_rate * (1 + math.cos(math.pi * done)) / 2

@torch.no_grad()
def evaluate(model, data):
    """Mean loss over ids (N,), in windows of block_size; the rest is left out."""
    T, was_training = model.config.block_size, model.training
    windows = data.unfold(0, T + 1, T)          # (n, T + 1): 0..T, T..2T
    model.eval()                                # no dropout
    total = 0.0
    for batch in windows.split(8):              # 8 or fewer: memory
        _, loss = model(batch[:, :-1], batch[:, 1:])
        total += loss.item() * len(batch)
    model.train(was_training)
    return total / len(windows)

def write(model, dataset, prompt, n, run):
    """The prompt and n more characters."""
    idx = torch.tensor([dataset.encode(prompt)], device=run.device)  # (1, T)
    idx = model.generate(idx, n, run.temperature, run.top_k, run.top_p)
    return dataset.decode(idx[0].tolist())

def save(checkpoint, path):
    """Write beside, then rename: if stopped midway, the old file survives."""
    torch.save(checkpoint, path + ".tmp")
    os.replace(path + ".tmp", path)

def train(config=None, **settings):
    """-> the model as last trained, the dataset. settings: fields of TrainConfig.
    ValueError: too short a text; to resume: another text, or no step left."""
    run, config = TrainConfig(**settings), config or TransformerConfig()
    path = run.checkpoint_path
    if run.resume:               # config and run as saved; settings win
        saved = torch.load(path + ".last", run.device, weights_only=True)
        config = TransformerConfig(**saved["config"])
        run = TrainConfig(**{**saved["run"], "device": run.device, **settings})
    text, T = load_text(run.text_path), config.block_size
    dataset = CharDataset(text, T)
    cut = len(dataset.data) * 9 // 10           # training windows end before it
    if len(dataset.data) - cut <= T:
        raise ValueError(f"{len(text)} characters: too few for block_size={T}")
    val_data = dataset.data[cut:].to(run.device)
    config = replace(config, vocab_size=dataset.vocab_size)
    torch.manual_seed(run.seed)
    model = MiniTransformer(config).to(run.device)
    optimizer = make_optimizer(model, run)
    identity = zlib.crc32(f"{config} {text}".encode())  # same model and text?
    step, losses = 0, []
    if run.resume:
        step = saved["step"]
        if saved["identity"] != identity or step >= run.max_steps:
            raise ValueError(f"other text, or no step left: {step=}, {run.max_steps=}")
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = run.weight_decay  # load reset it
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {run.device}, "
          f"blind guessing: {math.log(dataset.vocab_size):.4f}")

    def report():                               # reads step, losses when called
        val = evaluate(model, val_data)
        train_loss = np.mean(losses[-run.eval_interval:])
        print(f"step {step} | train {train_loss:.4f} | val {val:.4f}")
        print("    ", repr(write(model, dataset, text[0], 70, run)), flush=True)
        checkpoint = dict(config=asdict(config), run=asdict(run), step=step,
                          val=val, identity=identity, itos=dataset.itos,
                          weights=model.state_dict(), optimizer=optimizer.state_dict())
        save(checkpoint, path + ".last")
        old = torch.load(path, "cpu", weights_only=True) if os.path.exists(path) else {}
        if old.get("identity") != identity or old["val"] > val:
            save(checkpoint, path)              # old: none, another's or worse

    try:
        while step < run.max_steps:
            torch.manual_seed(run.seed * 1_000_000 + step)  # resumed: same draws
            x, y = dataset[torch.randint(cut - T, (run.batch_size, 1))]  # both (B, T)
            _, loss = model(x.to(run.device), y.to(run.device))
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip,
                                     error_if_nonfinite=True)  # NaN, inf: raises
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, run)
            optimizer.step()
            step += 1
            if os.isatty(1):                    # stdout is a terminal
                print(f"step {step} of {run.max_steps} | {losses[-1]:.4f}", end="\r")
            if step % run.eval_interval == 0 or step == run.max_steps:
                report()
    except KeyboardInterrupt:
        print(f"\nstopped at step {step}")
        if losses:
            report()
    print(write(model, dataset, text[0], run.sample_chars, run))  # from 1 character
    return model.eval(), dataset

def main(argv=None):
    """The command line: an option for each constant."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS,
                                     usage="%(prog)s [--name value ...]")
    for f in fields(TransformerConfig) + fields(TrainConfig):
        kind = {"type": f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}  # --bias, --no-bias
        parser.add_argument(f"--{f.name}", help=f"default: {f.default}", **kind)
    given = vars(parser.parse_args(argv))       # only what was typed
    names = [f.name for f in fields(TransformerConfig) if f.name in given]
    config = TransformerConfig(**{name: given.pop(name) for name in names})
    run = TrainConfig(**given)
    if not run.prompt:
        return train(config, **given)
    saved = torch.load(run.checkpoint_path, run.device, weights_only=True)
    model = MiniTransformer(TransformerConfig(**saved["config"])).to(run.device)
    model.load_state_dict(saved["weights"])
    dataset = CharDataset("".join(saved["itos"]), 0)  # to encode, decode
    torch.manual_seed(run.seed)
    print(write(model, dataset, run.prompt, run.sample_chars, run))

if __name__ == "__main__":
    main()
