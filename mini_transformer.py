"""mini_transformer: a GPT in one file. Read it, retype it, run it, take it apart.

    python mini_transformer.py                      # train on Shakespeare, write some
    python mini_transformer.py --prompt "ROMEO:"    # write from the saved checkpoint
    python mini_transformer.py --help               # every constant below is an option

It reads characters and predicts the next one. Loss: the mean of -ln p(next), in nats.
B batch   T positions   S visible positions (cached + T)   V vocabulary   L layers
C d_model   F d_ff   H heads   G key/value heads   D = C/H head size
x (B, T, C) is the residual stream: a block only adds to it, twice (if pre_norm).

ids (B, T) -> token_emb -> x --+----------------> + --+---------------> + -> x, L times
                               '-> norm -> attn --'   '-> norm -> ffn --'
x -> ln_final -> lm_head -> logits (B, T, V) -> softmax -> the next character
"""
import argparse
import copy
import hashlib
import inspect  # reads section 1's comments for --help
import math
import pickle
import re
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.adamw import adamw as fused_adamw

if sys.platform != "win32":
    import resource                                  # knows the peak memory

# ==== 1. Constants: edit them here, or pass them as --name value ======================
class Refused(ValueError):
    """A wrong constant, text or file; any other ValueError is a bug in the code."""

def require(condition, message):
    """Raise Refused(message) unless the condition holds."""
    if not condition:
        raise Refused(message)

def choose(constant, menu, name):
    """menu[name], or Refused with a list of the choices."""
    require(name in menu, f"{constant}={name!r}: choose from {', '.join(sorted(menu))}")
    return menu[name]

def at_least(limit, config, *names):
    """Raise Refused if one of these constants is smaller."""
    for name in names:
        value = getattr(config, name)
        enough = value is None or value >= limit
        require(enough, f"{name}={value}: must be at least {limit}")

@dataclass
class TransformerConfig:
    """The model. Raises ValueError for sizes below 1 or that do not fit each other."""
    vocab_size: int = 65           # V; train takes it from the text
    block_size: int = 128          # longest context, characters
    n_layers: int = 4              # L, blocks one after the other
    n_heads: int = 4               # H, attentions side by side
    d_model: int = 128             # C, width of the residual stream: 2 x H x something
    d_ff: int = 512                # F, width inside the feed-forward; swiglu: 2/3 of it
    dropout: float = 0.0           # share zeroed of what joins x, in training only
    bias: bool = False             # biases in the linear layers of the blocks
    positions: str = "rope"        # rope, learned, sinusoidal, none
    attention: str = "fused"       # fused, explicit: the fast one, or the equation
    n_kv_heads: int | None = None  # G; None = n_heads, fewer = grouped, 1 = multi-query
    causal: bool = True            # False: every position sees the future, and cheats
    ffn: str = "swiglu"            # relu, gelu, gelu_tanh (GPT-2's), relu2, swiglu
    norm: str = "layernorm"        # layernorm, rmsnorm
    qk_norm: bool = True           # queries and keys of one length: bounded scores
    pre_norm: bool = True          # norm before each part, or (False) after each sum
    tie_weights: bool = True       # one matrix reads characters and predicts them

    def __post_init__(self):
        at_least(1, self, "vocab_size", "block_size", "n_layers", "n_heads",
                 "n_kv_heads", "d_model", "d_ff")
        C, H, G = self.d_model, self.n_heads, self.n_kv_heads or self.n_heads
        require(C % (2 * H) == 0, f"d_model={C}: must be a multiple of 2 x n_heads={H}")
        require(H % G == 0, f"n_kv_heads={G}: must divide n_heads={H}")
        require(0 <= self.dropout < 1, f"dropout={self.dropout}: must be in [0, 1)")

# Two known designs in this file's sizes; with the published sizes and weights they give
# the published outputs. (The larger Llamas have tie_weights=False.)
GPT2_STYLE = TransformerConfig(positions="learned", ffn="gelu_tanh", qk_norm=False,
                               bias=True)
LLAMA_STYLE = TransformerConfig(norm="rmsnorm", n_kv_heads=2, qk_norm=False)

@dataclass
class TrainConfig:
    """The run, and the writing after it. Raises ValueError for what cannot be."""
    text_path: str = "input.txt"   # UTF-8; this one is downloaded if it is missing
    max_steps: int = 1800          # optimizer steps
    batch_size: int = 8            # B, windows
    accumulation_steps: int = 3    # batches per step: as one large one, in less memory
    optimizer: str = "muon"        # adamw, muon (hidden matrices; adamw for the rest)
    learning_rate: float = 6e-3    # peak, adamw
    muon_learning_rate: float = 0.02  # peak, muon
    warmup_steps: int = 100        # steps of linear rise to the peak
    decay_steps: int = 0           # step where the cosine reaches 0; 0 = max_steps
    weight_decay: float = 0.1      # matrices shrink by this x learning rate, each step
    grad_clip: float = 1.0         # a longer gradient is cut to this norm; 0 = never
    precision: str = "float32"     # float32, bfloat16 (autocast)
    device: str = "auto"           # auto (cuda if there is one, or cpu), cpu, cuda, mps
    threads: int = 0               # on the CPU; 0 = torch's choice
    compile: bool = False          # torch.compile: slow to start, then faster
    seed: int = 1337               # same seed, CPU and threads: same weights and text
    eval_interval: int = 600       # steps between evaluations, samples, checkpoints
    checkpoint_path: str = "checkpoint.pt"  # weights, optimizer state, vocabulary
    history_path: str = "history.csv"  # a row per evaluation
    resume: bool = False           # go on from the checkpoint
    prompt: str | None = None      # only write, from the checkpoint, what follows this
    sample_chars: int = 500        # characters to write
    temperature: float = 0.8       # 0 = the likeliest, 1 = as learned, more = wilder
    top_k: int | None = None       # draw from the k likeliest only
    top_p: float | None = None     # draw from the fewest that hold this probability

    def __post_init__(self):
        at_least(1, self, "batch_size", "accumulation_steps", "eval_interval")
        at_least(0, self, "max_steps", "learning_rate", "muon_learning_rate",
                 "weight_decay", "grad_clip", "threads", "sample_chars")

# ==== 2. Data =========================================================================
TEXT_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
            "tinyshakespeare/input.txt")
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def progress(line):
    """A line that the next one overwrites; on a terminal only: logs stay clean."""
    if sys.stdout.isatty():
        print(f"\r{line:<79}", end="\r", flush=True)

def write_file(path, save):
    """Call save(a temporary name), then rename: no failure damages what was there."""
    save(f"{path}.tmp")
    Path(f"{path}.tmp").replace(path)

def load_text(path):
    """A UTF-8 file as str; the default one is downloaded, or, offline, replaced by
    Python's documentation. Raises FileNotFoundError, or ValueError if not UTF-8."""
    if str(path) == "input.txt" and not Path(path).exists():
        import requests                              # here: later runs save its memory
        try:
            progress(f"downloading {path}")
            answer = requests.get(TEXT_URL, timeout=30)
            answer.raise_for_status()                # an error page is no corpus
            intact = hashlib.sha256(answer.content).hexdigest() == TEXT_SHA256
            require(intact, f"{len(answer.content):,} bytes that are not the text")
            write_file(path, lambda name: Path(name).write_bytes(answer.content))
        except (OSError, Refused) as error:          # OSError: those of requests, too
            print(f"No download ({error!r:.80}): training on Python's documentation.")
            from pydoc_data.topics import topics     # what help() prints
            return "\n".join(topics.values())
    return Path(path).read_text(encoding="utf-8")

class CharDataset:
    """A text as ids: ds[i] -> x, y, each (block_size,) int64, y one character ahead;
    for a column of starts (B, 1), each (B, block_size). Raises ValueError for a text
    no longer than block_size, or for a character outside the vocabulary."""
    def __init__(self, text, block_size):
        self.itos = sorted(set(text))                # sorted: the same ids on every run
        self.stoi = {char: i for i, char in enumerate(self.itos)}
        self.vocab_size, self.block_size = len(self.itos), block_size
        self.data = torch.tensor(self.encode(text))  # (N,)
        require(len(self) > 0, f"{len(text)} characters: too few for {block_size=}")

    def encode(self, text):
        unknown = sorted(set(text) - set(self.stoi))
        require(not unknown, f"{unknown}: not in the vocabulary {''.join(self.itos)!r}")
        return [self.stoi[char] for char in text]    # str -> list of ids

    def decode(self, ids):
        return "".join(self.itos[i] for i in ids)    # ids -> str

    def __len__(self):
        return len(self.data) - self.block_size

    def __getitem__(self, i):
        windows = self.data[i + torch.arange(self.block_size + 1)]  # (..., T + 1)
        return windows[..., :-1], windows[..., 1:]   # of "hello": "hell", "ello"

# ==== 3. Positions: without them, attention sees a bag of characters ==================
def angles(n, half):
    """(n, half) radians: position x frequency, 1 to 1/10000 (Vaswani 2017, 3.5)."""
    return torch.outer(torch.arange(n), 10000.0 ** -(torch.arange(half) / half))

def rotate(x, angle):
    """x (B, H, T, D), turned by angle (T, D/2): q_i . k_j then depends on the positions
    through i - j alone (Su 2021, 3.4)."""
    a, b = x.chunk(2, dim=-1)                        # pairs: d and d + D/2
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

def sinusoidal(n, C):
    """(n, C) waves (Vaswani 2017, 3.5), made as small as the embeddings they join."""
    waves = angles(n, C // 2).sin(), angles(n, C // 2).cos()
    return 0.02 * torch.stack(waves, dim=-1).flatten(1)

POSITIONS = {  # what makes (n, C), to be added to x, and what turns queries and keys
    "rope": (torch.zeros, rotate),                   # adds nothing
    "learned": (lambda n, C: nn.Parameter(0.02 * torch.randn(n, C)), lambda x, _: x),
    "sinusoidal": (sinusoidal, lambda x, _: x),      # turns nothing
    "none": (torch.zeros, lambda x, _: x),
}

# ==== 4. Attention: the only place where positions exchange information ===============
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}  # Ba 2016, Zhang 2019

def make_norm(config, size, gains=True):
    """(..., size) -> the same; mean square 1 (layernorm: mean 0), times the gains."""
    return choose("norm", NORMS, config.norm)(size, eps=1e-5, elementwise_affine=gains)

def linear(n_in, n_out, bias=False, scale=1.0):
    """(..., n_in) -> (..., n_out). Weights start with GPT-2's std, 0.02; those of
    the 2L layers that add to x with less, or x would grow with L (Radford 2019)."""
    layer = nn.Linear(n_in, n_out, bias)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.02 * scale if p.dim() == 2 else 0.0)  # biases: 0
    return layer

def explicit_attention(q, k, v, seen):
    """softmax(q k^T / sqrt(D)) v: (B, H, T, D), 2 x (B, H, S, D) -> (B, H, T, D); seen
    (T, S): True where a query may look. Vaswani 2017, Eq. 1. The variance of q.k is D:
    undivided, softmax would saturate."""
    scores = q @ k.mT / math.sqrt(q.size(-1))        # (B, H, T, S)
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)  # rows sum to 1
    return weights @ v                               # (B, H, T, D)

ATTENTIONS = {"fused": F.scaled_dot_product_attention, "explicit": explicit_attention}

class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C). past: [] or the keys and values so far; extended here."""
    def __init__(self, config):
        super().__init__()
        C, H, G = config.d_model, config.n_heads, config.n_kv_heads or config.n_heads
        self.heads = H, G
        n, D = config.block_size, C // H
        self.qkv_proj = linear(C, (H + 2 * G) * D, config.bias)
        self.out_proj = linear(C, C, config.bias, (2 * config.n_layers) ** -0.5)
        self.attend = choose("attention", ATTENTIONS, config.attention)
        # No gains: q.k / sqrt(D) cannot exceed sqrt(D) (Henry 2020).
        self.qk_norm = make_norm(config, D, False) if config.qk_norm else nn.Identity()
        self.turn = choose("positions", POSITIONS, config.positions)[1]
        self.angle = nn.Buffer(angles(n, D // 2), persistent=False)
        seen = torch.ones(n, n, dtype=torch.bool)    # row i: what position i may see
        seen = seen.tril() if config.causal else seen
        self.seen = nn.Buffer(seen, persistent=False)  # a constant: not in checkpoints

    def forward(self, x, past=None):
        (B, T, C), (H, G) = x.shape, self.heads
        past = [] if past is None else past          # not "or": [] is to be filled
        start = past[0].size(2) if past else 0       # how many came before
        qkv = self.qkv_proj(x).view(B, T, H + 2 * G, C // H).transpose(1, 2)
        qk, v = qkv.split([H + G, G], dim=1)         # (B, H + G, T, D), (B, G, T, D)
        qk = self.turn(self.qk_norm(qk), self.angle[start : start + T])
        q, k = qk.split([H, G], dim=1)               # (B, H, T, D), (B, G, T, D)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        past[:] = k, v                               # the caller's list; (B, G, S, D)
        k, v = (t.repeat_interleave(H // G, 1) if G < H else t for t in past)
        seen = self.seen[start : start + T, : start + T]  # (T, S)
        out = self.attend(q, k, v, seen)             # (B, H, T, D)
        return self.out_proj(out.transpose(1, 2).reshape(B, T, C))  # (B, T, C)

# ==== 5. Feed-forward: where each position thinks by itself ===========================
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,                # Hendrycks 2016
    "gelu_tanh": nn.GELU("tanh"),  # its approximation in GPT-2
    "relu2": lambda x: F.relu(x).square(),  # So 2021
    "swiglu": F.silu,
}

class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, C): widen to F, bend, narrow again."""
    def __init__(self, config, width=None):
        super().__init__()
        C, width = config.d_model, width or config.d_ff
        self.up_proj = linear(C, width, config.bias)
        self.down_proj = linear(width, C, config.bias, (2 * config.n_layers) ** -0.5)
        self.activation = choose("ffn", ACTIVATIONS, config.ffn)

    def forward(self, x):
        return self.down_proj(self.activation(self.up_proj(x)))

class SwiGLUFeedForward(FeedForward):
    """(B, T, C) -> (B, T, C): one path gates the other (Shazeer 2020)."""
    def __init__(self, config):
        super().__init__(config, 2 * config.d_ff // 3)  # 3 matrices, as large as 2
        self.gate_proj = linear(config.d_model, self.up_proj.out_features, config.bias)

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))

FEED_FORWARDS = dict.fromkeys(ACTIVATIONS, FeedForward) | {"swiglu": SwiGLUFeedForward}

# ==== 6. Block ========================================================================
class TransformerBlock(nn.Module):
    """(B, T, C) -> (B, T, C): attention, then feed-forward, added to the stream."""
    def __init__(self, config):
        super().__init__()
        self.pre_norm, C = config.pre_norm, config.d_model
        self.ln_attn, self.ln_ffn = make_norm(config, C), make_norm(config, C)
        self.attn, self.drop = CausalSelfAttention(config), nn.Dropout(config.dropout)
        self.ffn = choose("ffn", FEED_FORWARDS, config.ffn)(config)

    def forward(self, x, past=None):
        if self.pre_norm:          # the bare sum hands gradients on (Xiong 2020)
            x = x + self.drop(self.attn(self.ln_attn(x), past))
            return x + self.drop(self.ffn(self.ln_ffn(x)))
        x = self.ln_attn(x + self.drop(self.attn(x, past)))
        return self.ln_ffn(x + self.drop(self.ffn(x)))

# ==== 7. Model ========================================================================
def sample(logits, temperature=1.0, top_k=None, top_p=None):
    """logits (B, V) -> ids (B, 1). Raises ValueError for a setting out of range."""
    require(temperature >= 0, f"temperature={temperature}: must be at least 0")
    require(top_k is None or top_k >= 1, f"top_k={top_k}: must be at least 1")
    require(top_p is None or 0 < top_p <= 1, f"top_p={top_p}: must be in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)       # (B, 1)
    probs, ids = (logits / temperature).softmax(-1).sort(descending=True)  # (B, V)
    probs[:, top_k or probs.size(-1) :] = 0          # all but the k likeliest
    probs /= probs.sum(-1, keepdim=True)             # top_p is a share of what is left
    probs[probs.cumsum(-1) - probs >= (top_p or math.inf)] = 0  # nucleus: Holtzman 2020
    return ids.gather(-1, torch.multinomial(probs, 1))  # (B, 1)

class MiniTransformer(nn.Module):
    """ids (B, T) -> logits (B, T, V), and, for targets (B, T), the mean loss in nats.
    past: a list per block, empty at first; each call extends them. Raises ValueError
    for positions beyond block_size."""
    def __init__(self, config):
        super().__init__()
        self.config, V, C = config, config.vocab_size, config.d_model
        self.token_emb, self.lm_head = nn.Embedding(V, C), linear(C, V)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        if config.tie_weights:
            self.lm_head.weight = self.token_emb.weight  # (V, C): Press 2017
        added = choose("positions", POSITIONS, config.positions)[0]
        table = added(config.block_size, C)
        trained = isinstance(table, nn.Parameter)
        self.position_emb = table if trained else nn.Buffer(table, persistent=False)
        blocks = [TransformerBlock(config) for _ in range(config.n_layers)]
        self.blocks, self.drop = nn.ModuleList(blocks), nn.Dropout(config.dropout)
        # Without pre_norm, the last block has already normed x.
        self.ln_final = make_norm(config, C) if config.pre_norm else nn.Identity()

    def forward(self, idx, targets=None, past=None):
        past = past or [[] for _ in self.blocks]     # keys and values, per block
        start = past[0][0].size(2) if past[0] else 0
        end, limit = start + idx.size(1), self.config.block_size
        require(end <= limit, f"{end} positions: at most block_size={limit}")
        x = self.drop(self.token_emb(idx) + self.position_emb[start:end])  # (B, T, C)
        for block, keys_values in zip(self.blocks, past, strict=True):
            x = block(x, keys_values)                # (B, T, C)
        logits = self.lm_head(self.ln_final(x))      # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        """ids (B, T) -> (B, T + max_new_tokens). Raises ValueError if T is 0."""
        require(idx.size(1) > 0, "an empty prompt: give at least one character")
        mode, limit, past = self.training, self.config.block_size, None
        window = idx[:, -limit:]                     # what the model gets to see
        self.eval()                                  # no dropout while it writes
        try:
            for _ in range(max_new_tokens):
                if window.size(1) > limit:           # positions used up: keep half
                    window, past = window[:, -max(1, limit // 2) :], None
                if past is None or not self.config.causal:  # unmasked, old keys change
                    past, new = [[] for _ in self.blocks], window
                logits = self(new, past=past)[0][:, -1].cpu()  # (B, V); MPS drew wrong
                new = sample(logits, temperature, top_k, top_p).to(idx.device)  # (B, 1)
                window, idx = torch.cat([window, new], 1), torch.cat([idx, new], 1)
        finally:
            self.train(mode)                         # also after an error
        return idx

# ==== 8. Training =====================================================================
def orthogonalize(x):
    """(n, rows, cols) -> as it was, but all singular values near 1 (Jordan 2024)."""
    if x.size(-2) > x.size(-1):
        return orthogonalize(x.mT).mT                # x x^T: the smaller one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):             # an odd polynomial of x acts on its singular values
        gram = x @ x.mT            # (n, rows, rows)
        mix = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, mix, x, beta=3.4445)  # 3.4445 x + mix x
    return x

def muon(params, grads, state, lr, decay):
    """Momentum, orthogonalized: rare directions move as far as common ones. (Tall
    matrices go further.) torch.optim.Muon uses bfloat16, which laptops emulate."""
    grad = torch.stack(grads)                        # (n, rows, cols)
    if not state:
        state.append(torch.zeros_like(grad))
    state[0].lerp_(grad, 0.05)                       # a moving average
    updates = orthogonalize(grad.lerp(state[0], 0.95))  # Nesterov looks ahead
    updates *= lr * max(1, grad.size(1) / grad.size(2)) ** 0.5
    for p, step in zip(params, updates, strict=True):
        p.mul_(1 - lr * decay).sub_(step)

def adamw(params, grads, state, lr, decay):
    """A step of mean(g) / sqrt(mean(g^2)), both moving averages (Loshchilov 2019). This
    is torch.optim.AdamW without the class, which would load the compiler, too."""
    if not state:                  # means, squares, none for amsgrad, steps made
        zeros = [[torch.zeros_like(g) for g in grads] for _ in range(2)]
        state += [*zeros, [], [g.new_zeros(()) for g in grads]]
    fused_adamw(params, grads, *state, lr=lr, weight_decay=decay, beta1=0.9, beta2=0.95,
                eps=1e-8, amsgrad=False, maximize=False, fused=True)

OPTIMIZERS = {"adamw": adamw, "muon": muon}          # of the blocks' matrices

def make_groups(model, s):  # s: a TrainConfig, here and below
    """[(rule, parameters of one shape, its state)]; all but hidden matrices: adamw."""
    inside, groups = choose("optimizer", OPTIMIZERS, s.optimizer), {}
    for name, p in model.named_parameters():         # tied: once
        hidden = name.startswith("blocks.") and p.dim() == 2
        groups.setdefault((inside if hidden else adamw, p.shape), []).append(p)
    return [(rule, params, []) for (rule, _), params in groups.items()]

@torch.no_grad()
def update(groups, share, s):
    """A step down the gradients; share: of the peak learning rates."""
    for rule, params, state in groups:
        peak = s.learning_rate if rule is adamw else s.muon_learning_rate
        decay = s.weight_decay if params[0].dim() == 2 else 0.0  # not gains and biases
        rule(params, [p.grad for p in params], state, share * peak, decay)

def schedule(step, s):
    """Share of the peak learning rate: a line up to 1, then half a cosine down to 0."""
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps           # step 0 learns, too
    steps = max(1, (s.decay_steps or s.max_steps) - s.warmup_steps)  # of cosine
    return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - s.warmup_steps) / steps))

@torch.no_grad()
def evaluate(model, data):
    """Mean loss over ids (N,): each target once, block_size at a time, no dropout."""
    mode, total, T = model.training, 0.0, min(model.config.block_size, len(data) - 1)
    model.eval()
    windows = data.unfold(0, T + 1, T)               # (n, T + 1), overlapping by one
    rest = data[None, len(windows) * T :]            # (1, at most T): the shorter last
    for rows in (*windows.split(8), rest):           # few at a time: memory
        if rows.size(1) > 1:                         # a single id has no target
            loss = model(rows[:, :-1], rows[:, 1:])[1]
            total += loss.item() * rows[:, 1:].numel()
    model.train(mode)
    return total / (len(data) - 1)

def bigram_loss(train_data, val_data, V):
    """Mean loss on val_data of guessing by the pairs of characters in train_data."""
    counts = np.ones((V, V))                         # 1 each, or a new one has p = 0
    np.add.at(counts, (train_data[:-1], train_data[1:]), 1)  # row: first, column: next
    probs = counts / counts.sum(axis=1, keepdims=True)
    return -np.log(probs[val_data[:-1], val_data[1:]]).mean()

def write(model, dataset, prompt, n, s):
    """The prompt and n more characters."""
    idx = torch.LongTensor([dataset.encode(prompt)]).to(model.lm_head.weight.device)
    return dataset.decode(model.generate(idx, n, s.temperature, s.top_k, s.top_p)[0])

def read_checkpoint(path, device):
    """What train saved. Raises OSError, or ValueError for a file of another kind."""
    wrong = EOFError, LookupError, RuntimeError, TypeError, pickle.UnpicklingError
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        TransformerConfig(**saved["config"])         # raises if it is not ours
        return saved
    except wrong as error:
        raise Refused(f"{path}: not a checkpoint ({error!r:.60})") from None

def train(config=None, **settings):
    """-> the model with its best weights, the dataset; settings: fields of TrainConfig.
    Raises ValueError for wrong constants, a text too short, a loss not finite."""
    s, config = TrainConfig(**settings), config or TransformerConfig()
    devices = {"auto": "cpu", "cpu": "cpu"}
    if torch.backends.mps.is_available():
        devices["mps"] = "mps"     # by choice only: it has computed wrong numbers
    if torch.cuda.is_available():
        devices["auto"] = devices["cuda"] = "cuda"
    device = choose("device", devices, s.device)
    low = choose("precision", {"float32": False, "bfloat16": True}, s.precision)
    torch.set_num_threads(s.threads or torch.get_num_threads())
    torch.manual_seed(s.seed)  # of the weights
    T, rows = config.block_size, s.batch_size * s.accumulation_steps
    dataset = CharDataset(load_text(s.text_path), T)
    N, V, cut = len(dataset.data), dataset.vocab_size, len(dataset.data) * 9 // 10
    opening = dataset.itos[0]      # samples follow the first character, often a newline
    enough = cut > T and N - cut > 1                 # a window to train on, one target
    require(enough, f"{N} characters of text: too few for block_size={T}")
    train_data, val_data = dataset.data[:cut], dataset.data[cut:]  # contiguous: no leak
    model = MiniTransformer(replace(config, vocab_size=V)).to(device)
    groups = make_groups(model, s)
    run = {"config": vars(model.config), "vocabulary": "".join(dataset.itos),
           "optimizer": s.optimizer, "step": 0, "best_val": math.inf, "history": []}
    if s.resume:
        saved = read_checkpoint(s.checkpoint_path, device)
        same = [saved[key] == run[key] for key in ("config", "vocabulary", "optimizer")]
        require(all(same), f"{s.checkpoint_path}: of another model, text or optimizer")
        run = saved
        model.load_state_dict(run["weights"])
        for (_, _, state), old in zip(groups, run["averages"], strict=True):
            state += old
    print(f"{device}, {torch.get_num_threads()} threads, {s.precision}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"{N:,} characters, {V} distinct | {cut:,} to train on, {N - cut:,} held out")
    pairs = bigram_loss(train_data, val_data, V)
    print(f"blind guessing scores {math.log(V):.3f}, counting pairs {pairs:.3f}")
    first, began = run["step"], time.perf_counter()
    recent = []                    # loss, norm, clipped of each step since a report
    longest = s.grad_clip or math.inf
    advice = (f"try less than learning_rate={s.learning_rate}, "
              f"muon_learning_rate={s.muon_learning_rate}")

    def report():
        """Evaluate, print and save; changes nothing that is learned."""
        val, step = evaluate(model, val_data.to(device)), run["step"]
        seconds = time.perf_counter() - began
        require(math.isfinite(val), f"step {step}: validation loss {val}: {advice}")
        if val < run["best_val"]:
            run.update(best_val=val, best=copy.deepcopy(model.state_dict()))
        # nan, printed as -: no steps yet
        loss, norm, clipped = np.mean(recent or [[math.nan] * 3], axis=0).tolist()
        done, lr = step - first, s.learning_rate * schedule(step, s)
        left = (s.max_steps - step) * seconds / (done or math.nan)
        row = {"step": f"{step}", "train": f"{loss:.4f}", "val": f"{val:.4f}",
               "lr": f"{lr:.1e}", "norm": f"{norm:.2f}", "clipped": f"{clipped:.2f}",
               "chars/s": f"{done * rows * T / seconds:.0f}", "s": f"{seconds:.0f}"}
        run["history"].append(row)
        recent.clear()
        line = " | ".join(f"{name} {value}" for name, value in row.items())
        print(f"{line} | left {left:.0f}".replace("nan", "-"))
        run["averages"] = [state for _, _, state in groups]
        run["weights"] = model.state_dict()
        lines = [row.keys(), *(old.values() for old in run["history"])]
        table = "".join(",".join(line) + "\n" for line in lines)
        if done:                   # an untrained model must not replace a trained one
            write_file(s.history_path, lambda path: Path(path).write_text(table))
            write_file(s.checkpoint_path, lambda path: torch.save(run, path))
        print("    ", repr(write(model, dataset, opening, 70, s)), flush=True)
        return val

    forward = torch.compile(model) if s.compile else model  # same weights, same keys
    try:
        for step in range(first, s.max_steps):
            if step % s.eval_interval == 0 and not (s.resume and step == first):
                report()
            torch.manual_seed(hash((s.seed, step)))  # a seed a step: resume is exact
            loss, starts = 0.0, torch.randint(cut - T, (rows, 1))  # none held out
            for some in starts.split(s.batch_size):
                x, y = dataset[some]                 # 2 x (B, T)
                with torch.autocast(device, torch.bfloat16, enabled=low):
                    part = forward(x.to(device), y.to(device))[1] / s.accumulation_steps
                part.backward()    # adds to the gradients
                loss += part.item()
            norm = nn.utils.clip_grad_norm_(model.parameters(), longest).item()
            require(math.isfinite(loss + norm),
                    f"step {step}: loss {loss}, gradient norm {norm}: {advice}")
            update(groups, schedule(step, s), s)
            model.zero_grad(set_to_none=False)  # kept: less memory, in all
            run["step"] = step + 1
            recent.append((loss, norm, norm > longest))
            progress(f"step {step + 1} of {s.max_steps} | train {loss:.4f}")
    except KeyboardInterrupt:
        print(f"\nstopped at step {run['step']}: --resume True goes on from there")
    val, seconds = report(), time.perf_counter() - began
    chars = (run["step"] - first) * rows * T
    unit = {"linux": 2**10, "darwin": 2**20}.get(sys.platform)  # ru_maxrss per MB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit if unit else 0
    print(f"final | val {val:.4f} | perplexity {math.exp(min(val, 99)):.3f} | "
          f"chars {chars} | seconds {seconds:.1f} | chars/s {chars / seconds:.0f} | "
          f"peak MB {peak:.0f}")
    model.load_state_dict(run["best"])  # not the last: it may have learned by heart
    print(write(model, dataset, opening, s.sample_chars, s))
    if chars:
        best = f"{run['best_val']:.4f}"
        print(f"\nsaved {s.checkpoint_path}, {s.history_path} | best {best}")
    return model.eval(), dataset

def true_or_false(text):
    """The bool of its name, or ValueError; bool("False") is True."""
    return ["false", "true"].index(text.lower()) == 1

def main(argv=None):
    """The command line: an option per constant of the two dataclasses."""
    kinds = TransformerConfig, TrainConfig
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, formatter_class=style)
    for kind in kinds:  # the comments of section 1 are the help
        meaning = dict(re.findall(r"(\w+): .*?# (.*)", inspect.getsource(kind)))
        for f in fields(kind):
            read = getattr(f.type, "__args__", [f.type])[0]  # int | None: int
            read = true_or_false if read is bool else read
            parser.add_argument(f"--{f.name}", default=f.default, type=read,
                                help=meaning.get(f.name))
    try:
        values = vars(parser.parse_args(argv))
        chosen = [{f.name: values[f.name] for f in fields(kind)} for kind in kinds]
        config, s = TransformerConfig(**chosen[0]), TrainConfig(**chosen[1])
        if s.prompt is None:
            return train(config, **vars(s))
        saved = read_checkpoint(s.checkpoint_path, "cpu")
        model = MiniTransformer(TransformerConfig(**saved["config"]))
        model.load_state_dict(saved["best"])
        torch.manual_seed(s.seed)
        dataset = CharDataset(saved["vocabulary"], block_size=0)  # to encode and decode
        print(write(model, dataset, s.prompt, s.sample_chars, s))
    except (OSError, UnicodeError, Refused) as error:
        parser.error(str(error))

if __name__ == "__main__":
    main()
