"""mini_transformer: a GPT in one file. Read it, retype it, run it, take it apart.

    python mini_transformer.py                    # train on Shakespeare: 6-10 minutes
    python mini_transformer.py --prompt "ROMEO:"  # let the trained model continue this
    MODULE=my_transformer pytest -x               # test your own my_transformer.py

The model reads a text and gives each character that may come next a score, its logit.
Softmax makes the scores probabilities: p = exp(score) / the sum of all exp(score). The
loss, cross-entropy, is the mean of -ln p(the character that really came), in nats, the
unit of ln. A uniform guess among 65 characters gives ln 65 = 4.17. On unseen text, the
model ends near 1.5: as unsure as a guess among exp(1.5) = 4.5 (the perplexity).

Each position has a vector x of C numbers; together they are the residual stream. A
block is attention (attn), which gathers information from other positions, then
feed-forward (ffn), which works on it at each position. Both add their result to x:

ids (B, T) -> token_emb -> x --.----------------> + --.---------------> + -> x (L times)
                               '-> norm -> attn --'   '-> norm -> ffn --'
x -> norm -> lm_head -> logits (B, T, V) -> softmax -> p(next character)

B batch size   T positions   V vocabulary size   L blocks   C d_model, size of x
H query heads   G key/value heads   D = C / H, head size   N characters in a text
"""
import io
import math
import pickle
import re
import shutil
import sys
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import requests
import torch                                    # 2.6 or later
import torch.nn as nn
import torch.nn.functional as F

# ==== 1. Constants: edit them here, or pass --name value (a bool: --name or --no-name)
@dataclass
class TransformerConfig:
    """The model: sizes, then a choice for each part. Later sections explain them."""
    vocab_size: int = 65       # V: distinct characters; train() sets it from the text
    block_size: int = 128      # maximum context length, in characters
    n_layers: int = 4          # L: blocks, one after another
    n_heads: int = 4           # H: attention heads, side by side
    n_kv_heads: int = 0        # G: key/value heads, each shared by H/G heads; 0: G = H
    d_model: int = 128         # C: width of the residual stream
    d_ff: int = 512            # hidden width of feed-forward; swiglu: 2/3 (section 5)
    dropout: float = 0.0       # probability of zeroing an activation during training
    bias: bool = False         # in the blocks' linear layers; LayerNorm always has one
    positions: str = "rope"    # rope, learned, sinusoidal, none
    attention: str = "explicit"  # explicit (section 4), fused (PyTorch's own function)
    causal: bool = True        # False lets positions see the characters they predict
    ffn: str = "swiglu"        # relu, gelu (smooth), gelu_tanh (GPT-2), swiglu (Llama)
    norm: str = "layernorm"    # layernorm, rmsnorm
    qk_norm: bool = True       # normalize queries and keys
    pre_norm: bool = True      # norm before attn and ffn; False: after each addition
    tie_weights: bool = True   # token_emb and lm_head share one matrix

@dataclass
class TrainConfig:
    """The training run, and how text is sampled from the model."""
    text_path: str = "input.txt"  # any UTF-8 file; input.txt is downloaded if missing
    max_steps: int = 3800      # optimizer steps
    batch_size: int = 12       # B: windows of block_size characters per step
    learning_rate: float = 2e-3  # at its peak, after the warm-up
    warmup_steps: int = 100    # steps over which the learning rate rises to its peak
    weight_decay: float = 0.4  # 0.1 is usual; more helps: the text is read 6 times
    grad_clip: float = 1.0     # maximum length of the gradient; inf: no clipping
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # or mps: Apple's GPU
    seed: int = 1337           # same seed, CPU, threads, PyTorch version: same model
    eval_interval: int = 400   # steps between evaluations
    checkpoint_path: str = "checkpoint.pt"  # the best model of this run
    resume: bool = False       # go on from checkpoint_path, up to max_steps
    sample_chars: int = 500    # number of characters to generate
    temperature: float = 0.8   # 0: the likeliest; <1: safer; 1: as learned; >1: wilder
    top_k: int = 0             # sample from the k likeliest characters; 0: from all
    top_p: float = 1.0         # nucleus: smallest set with total probability >= top_p

class UserError(ValueError):
    """What the user can put right: main() prints it without a traceback."""

class Menu(dict):
    """The choices for one part of the model: add an entry, and it can be chosen."""
    def __missing__(self, name):                # Python calls it for an unknown name
        raise UserError(f"{name!r} is not one of the choices: {', '.join(self)}")

# ==== 2. Data: a text becomes ids, an integer for each character, read in windows
TEXT_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
            "tinyshakespeare/input.txt")

def load_text(path):
    """Read a UTF-8 file. If input.txt is missing, it is downloaded; if that fails, the
    language manual that comes with Python takes its place for this run."""
    if path == "input.txt" and not Path(path).exists():
        try:
            content = requests.get(TEXT_URL, timeout=30).content
            if len(content) != 1_115_394:       # its size in bytes: rejects error pages
                raise OSError("these are not the bytes of the text")
        except OSError as error:                # requests' errors are OSErrors, too
            print(f"{type(error).__name__}: no Shakespeare, so this run learns from "
                  f"Python's manual.\nLater, save {TEXT_URL} as {path}.", flush=True)
            from pydoc_data.topics import topics
            return "\n".join(topics.values())
        part = Path(f"input-{time.time()}.tmp")  # unique: two runs may start at once
        part.write_bytes(content)
        part.replace(path)                      # so a crash leaves no half-written file
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # skips a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text_path: cannot read {path} as UTF-8: {error}") from error

class CharDataset:
    """A text as ids. dataset[i] -> x, y, both (T,) int64; y is x shifted by one:
        x  h e l l     every position is a training example:
        y  e l l o     h -> e,  he -> l,  hel -> l,  hell -> o"""
    def __init__(self, text, block_size, itos=None):
        self.itos = itos or sorted(set(text))   # int to string; sorted: same every run
        self.stoi = {char: i for i, char in enumerate(self.itos)}  # string to int
        self.vocab_size, self.block_size = len(self.itos), block_size
        self.data = torch.tensor(self.encode(text))  # (N,)

    def encode(self, text):                     # str -> list of ids
        unknown = set(text) - set(self.itos)
        if unknown:
            raise UserError(f"the model does not know {sorted(unknown)[:20]}")
        return [self.stoi[char] for char in text]

    def decode(self, ids):                      # list of ids -> str
        return "".join(self.itos[i] for i in ids)

    def __len__(self):                          # number of windows of T + 1 ids
        return len(self.data) - self.block_size

    def __getitem__(self, i):                   # i: an int, or a tensor (B,) of them
        # unfold: all windows of T + 1 ids, each starting 1 later; a view, not a copy
        windows = self.data.unfold(0, self.block_size + 1, 1)  # (N - T, T + 1)
        return windows[i][..., :-1], windows[i][..., 1:]  # both (T,), or (B, T)

# ==== 3. Positions: by itself, a layer of attention does not know the order
# Attention (section 4) makes three vectors from each x: a query (what do I look for?),
# a key (how can I be found?) and a value (what do I say?). The dot product of a query
# and a key says how well they match. It ignores where the two stand in the text. So
# either a position vector is added to x (learned, sinusoidal), or queries and keys are
# rotated by angles that grow with the position (rope).
def cos_and_sin(n, n_frequencies):
    """Cosines and sines of position times frequency, (2, n, n_frequencies). The fastest
    wave, 1 radian per position, tells neighbours apart, but repeats after 6 positions;
    slower ones, down to nearly 1/10000, tell distant ones apart (Vaswani 2017)."""
    frequencies = 10000.0 ** -(torch.arange(n_frequencies) / n_frequencies)
    angle = torch.outer(torch.arange(n), frequencies)  # (n, n_frequencies)
    return torch.stack([angle.cos(), angle.sin()])

def rotate(x, cos, sin):
    """RoPE (rotary embedding, Su 2021), for queries or keys: x (..., T, D), cos and sin
    (T, D/2) -> (..., T, D). Entries d and d + D/2 are a point in a plane, turned by
    position times f; each such pair has its own f. A dot product feels only the
    difference of two turns: 8f - 5f = 3f for a query at position 8 and a key at 5, as
    at 108 and 105. So it now also depends on how far apart the two stand."""
    a, b = x.chunk(2, dim=-1)                   # both (..., T, D/2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

def sinusoidal(n, C):
    """(n, C): fixed sinusoids, small like token_emb. A Buffer is not trained."""
    cos, sin = cos_and_sin(n, C // 2)           # both (n, C/2)
    return nn.Buffer(0.02 * torch.cat([sin, cos], dim=-1))

POSITIONS = Menu(learned=lambda n, C: nn.Parameter(0.02 * torch.randn(n, C)),  # GPT-2
                 sinusoidal=sinusoidal, rope=lambda n, C: None, none=lambda n, C: None)

# ==== 4. Attention: the only place where positions exchange information
# A norm brings every vector to one scale, whatever the layers before it did, and keeps
# training stable. RMSNorm (Zhang 2019) divides a vector by its root mean square, then
# multiplies each entry by a learned gain. LayerNorm (Ba 2016) also subtracts the mean
# first, and adds a learned bias at the end.
NORMS = Menu(layernorm=nn.LayerNorm, rmsnorm=lambda size: nn.RMSNorm(size, eps=1e-5))

def linear(n_in, n_out, bias=False, n_summed=1):
    """Linear layer (..., n_in) -> (..., n_out), initialized as in GPT-2. n_summed: if
    its output is added to the stream, how many are (2 a block). The sum of n random
    terms is about sqrt(n) times as large as one, so each starts smaller by that."""
    layer = nn.Linear(n_in, n_out, bias)
    nn.init.normal_(layer.weight, std=0.02 / math.sqrt(n_summed))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer

def explicit_attention(q, k, v, is_causal=False):
    """softmax(q k^T / sqrt(D)) v (Vaswani 2017, Eq. 1); q, k, v, output (B, H, T, D).
    Each output averages the values, weighted by how well their keys match the query.
        h  * . .     rows are queries, columns are keys. If is_causal,
        e  * * .     a position attends to itself and to earlier ones (*),
        l  * * *     never to later ones (.), which hold what it must predict."""
    # If q and k have independent entries of mean 0 and variance 1, their dot product
    # has variance D. Unscaled, softmax would give nearly all the weight to one key.
    # Small changes of q and k would then change nothing: the gradients would vanish.
    scores = q @ k.mT / math.sqrt(q.size(-1))   # (B, H, T, T); k.mT is (B, H, D, T)
    if is_causal:
        minus_inf = scores.new_full(scores.shape[-2:], -math.inf)  # (T, T)
        scores = scores + minus_inf.triu(diagonal=1)  # 0 up to the diagonal, then -inf
    return scores.softmax(dim=-1) @ v           # (B, H, T, D); exp(-inf) = 0

ATTENTIONS = Menu(explicit=explicit_attention, fused=F.scaled_dot_product_attention)

class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C). A head is one attention as above, with its own q, k and
    v for each x. H heads work side by side, so each can look for something different.
    If G < H, H/G heads share k and v, which makes fewer weights. Each head has T x T
    scores: for a text of twice the length, four times as many."""
    def __init__(self, config):
        super().__init__()
        C, H, G = config.d_model, config.n_heads, config.n_kv_heads or config.n_heads
        if C % (2 * H) != 0 or H % G != 0:      # 2: rope rotates pairs, so D is even
            raise UserError(f"2 * n_heads (2 * {H}) must divide d_model ({C}), and "
                            f"n_kv_heads ({G}) must divide n_heads")
        D = C // H
        self.n_heads, self.n_kv_heads, self.causal = H, G, config.causal
        self.qkv_proj = linear(C, (H + 2 * G) * D, config.bias)  # q, k and v at once
        self.out_proj = linear(C, C, config.bias, n_summed=2 * config.n_layers)
        self.attend = ATTENTIONS[config.attention]
        # Without norms, q and k can grow until softmax picks one key (Dehghani 2023).
        self.q_norm = NORMS[config.norm](D) if config.qk_norm else nn.Identity()
        self.k_norm = NORMS[config.norm](D) if config.qk_norm else nn.Identity()
        self.rope = config.positions == "rope"
        table = cos_and_sin(config.block_size, D // 2)  # (2, block_size, D/2)
        self.cos_sin = nn.Buffer(table, persistent=False)  # moved by .to(), not saved

    def forward(self, x):
        B, T, C = x.shape
        H, G = self.n_heads, self.n_kv_heads
        qkv = self.qkv_proj(x)                  # (B, T, (H + 2G) * D)
        qkv = qkv.view(B, T, H + 2 * G, C // H).transpose(1, 2)  # (B, H + 2G, T, D)
        q, k, v = qkv.split([H, G, G], dim=1)   # q (B, H, T, D); k, v (B, G, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            cos, sin = self.cos_sin[:, :T]      # both (T, D/2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if G < H:                               # grouped-query attention (Ainslie 2023)
            # both (B, H, T, D): heads of one group stand side by side, k0 k0 k1 k1
            k, v = [z.repeat_interleave(H // G, dim=1) for z in (k, v)]
        out = self.attend(q, k, v, is_causal=self.causal)  # (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, T, C): heads side by side
        return self.out_proj(out)               # (B, T, C): mix what they found

# ==== 5. Feed-forward: attention mixes positions; this works on each one by itself
ACTIVATIONS = Menu(relu=F.relu, gelu=F.gelu, gelu_tanh=nn.GELU("tanh"),
                   swiglu=F.silu)               # SiLU(x) = x * sigmoid(x), on the gate

class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, C): widen, for room to detect many patterns in x; apply a
    nonlinearity, without which two linear layers would act as one; narrow again."""
    def __init__(self, config):
        super().__init__()
        C, width = config.d_model, config.d_ff
        self.activation = ACTIVATIONS[config.ffn]
        self.gate_proj = None
        if config.ffn == "swiglu":              # a gated linear unit (Shazeer 2020)
            # Three matrices of 2/3 the width have as many weights as two.
            width = (2 * width // 3 + 7) // 8 * 8  # a multiple of 8: faster on GPUs
            self.gate_proj = linear(C, width, config.bias)
        self.up_proj = linear(C, width, config.bias)
        self.down_proj = linear(width, C, config.bias, n_summed=2 * config.n_layers)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))  # (B, T, C)
        gate = self.activation(self.gate_proj(x))  # (B, T, width): one factor per entry
        return self.down_proj(gate * self.up_proj(x))  # (B, T, C)

# ==== 6. Block: first gather from other positions, then work on what was gathered
class TransformerBlock(nn.Module):
    """(B, T, C) -> (B, T, C): attention, then feed-forward; each adds to the stream."""
    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.ln_attn = NORMS[config.norm](config.d_model)
        self.attn = CausalSelfAttention(config)
        self.ln_ffn = NORMS[config.norm](config.d_model)
        self.ffn = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        if self.pre_norm:
            # No norm changes x itself, or the gradient on its way back (Xiong 2020).
            x = x + self.drop(self.attn(self.ln_attn(x)))
            return x + self.drop(self.ffn(self.ln_ffn(x)))
        x = self.ln_attn(x + self.drop(self.attn(x)))  # post-norm (Vaswani 2017)
        return self.ln_ffn(x + self.drop(self.ffn(x)))

# ==== 7. The model: embed, apply the blocks, score and sample the next character
def sample(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B, V) -> ids (B, 1): draw one character for each row."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1): always the likeliest
    probs = (logits / temperature).softmax(dim=-1)  # (B, V)
    V = probs.size(-1)
    probs, ids = probs.topk(min(top_k or V, V))  # both (B, k), the likeliest first
    if top_p is not None and top_p < 1:         # nucleus sampling (Holtzman 2020)
        probs = probs / probs.sum(dim=-1, keepdim=True)  # for example 0.4 0.3 0.2 0.1
        before = probs.cumsum(dim=-1) - probs   # sum before each:     0.0 0.4 0.7 0.9
        probs[before >= max(top_p, 1e-9)] = 0   # top_p 0.5 keeps 0.4, 0.3; 0 keeps 0.4
    rank = torch.multinomial(probs, 1)          # (B, 1); probs need not sum to 1
    return ids.gather(-1, rank)                 # (B, 1): from rank back to id

class MiniTransformer(nn.Module):
    """ids (B, T) -> logits (B, T, V) and a loss: the mean cross-entropy in nats against
    targets (B, T), or None without them. UserError if T is 0 or over block_size."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.d_model, config.n_layers
        self.token_emb = nn.Embedding(V, C)     # row i is the vector of id i
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.position_emb = POSITIONS[config.positions](config.block_size, C)  # or None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(L))
        # With pre-norm, the output of the last block has not been normalized yet.
        self.ln_final = NORMS[config.norm](C) if config.pre_norm else nn.Identity()
        self.lm_head = linear(C, V)             # one score (logit) for each character
        if config.tie_weights:
            # The vector that stands for a character when it is read also scores it when
            # it is predicted: fewer weights, each learning from both uses (Press 2017).
            self.lm_head.weight = self.token_emb.weight  # (V, C)

    def forward(self, idx, targets=None):
        T, limit = idx.size(1), self.config.block_size
        if T < 1 or T > limit:
            raise UserError(f"expected 1 to {limit} characters, got {T}")
        x = self.token_emb(idx)                 # (B, T, C)
        if self.position_emb is not None:
            x = x + self.position_emb[:T]       # (B, T, C) + (T, C)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)                        # (B, T, C)
        logits = self.lm_head(self.ln_final(x))  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy expects classes in dimension 1: (B*T, V) logits, (B*T,) targets.
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0):
        """ids (B, T) -> (B, T + max_new_tokens): predict, sample, append, repeat."""
        was_training = self.training
        self.eval()                             # no dropout while generating
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])  # (B, T or fewer, V)
            new = sample(logits[:, -1], temperature, top_k, top_p)  # (B, 1)
            idx = torch.cat([idx, new], dim=1)  # (B, T + 1)
        self.train(was_training)
        return idx

# ==== 8. Training: predict, measure the error, move every weight a little to reduce it
def make_optimizer(model, run):                 # run: a TrainConfig, here and below
    """Adam (Kingma 2015) averages each weight's gradient over recent steps, and divides
    it by its usual size (its root mean square over recent steps), so that all weights
    move at a similar pace. AdamW (Loshchilov 2019) also shrinks each weight of a matrix
    by the fraction learning rate * weight_decay, to limit overfitting."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # gains, biases: no decay
    groups = [{"params": matrices, "weight_decay": run.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    # A beta averages over ~1 / (1 - beta) steps: 10; for squares 100. fused: faster.
    return torch.optim.AdamW(groups, run.learning_rate, betas=(0.9, 0.99), fused=True)

def schedule(step, run):
    """The learning rate at a given step: linear warm-up, then cosine decay to 0. It is
    low at first, because Adam's averages rest on few gradients then (Liu 2020), and low
    at the end, so that the noise of single batches averages out."""
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    progress = (step - run.warmup_steps) / (run.max_steps - run.warmup_steps)  # 0 to 1
    return run.learning_rate * (1 + math.cos(math.pi * progress)) / 2

def training_step(model, optimizer, x, y, max_norm):
    """One step on a batch, x and y (B, T); -> the loss before the step, in nats."""
    _, loss = model(x, y)                       # predict, and compare with what came
    optimizer.zero_grad()                       # forget the gradient of the last step
    loss.backward()                             # p.grad: how loss changes with weight p
    # Scale the whole gradient down if its length, over all weights, exceeds max_norm:
    # this limits the harm of an outlier batch.
    length = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if not length.isfinite():                   # NaN or inf would spoil every weight
        raise UserError("training has diverged: try a lower learning_rate")
    optimizer.step()                            # move each weight against its gradient
    return loss.item()

@torch.no_grad()
def evaluate(model, data):
    """The mean loss on data (N,), in windows of T predictions, without dropout."""
    T, was_training = model.config.block_size, model.training
    windows = data.unfold(0, T + 1, T)          # (n, T + 1): neighbours share one id
    model.eval()
    total = 0.0
    for batch in windows.split(16):             # a few at a time, to save memory
        _, loss = model(batch[:, :-1], batch[:, 1:])
        total += loss.item() * len(batch)       # the last batch may be smaller
    model.train(was_training)
    return total / len(windows)

def write(model, dataset, prompt, n, run):
    """Print the prompt (at least one character), then n more, each as it is drawn."""
    idx = torch.tensor([dataset.encode(prompt)], device=run.device)  # (1, T)
    print(prompt, end="", flush=True)
    for _ in range(n):
        idx = model.generate(idx, 1, run.temperature, run.top_k, run.top_p)  # (1, T+1)
        print(dataset.decode(idx[0, -1:].tolist()), end="", flush=True)
    print()

def load(path, device="cpu", **changes):
    """-> what was saved (a dict), its model, and a dataset to encode and decode with.
    changes: constants of the model to override, if the saved weights still fit."""
    try:
        saved = torch.load(path, device, weights_only=True)  # runs no code in the file
        config = {**saved["config"], **changes, "vocab_size": len(saved["itos"])}
        model = MiniTransformer(check(TransformerConfig(**config)))
        model.load_state_dict(saved["weights"])
        names = [name for name, _ in model.named_parameters()]
        if saved.get("trained", names) != names:  # e.g. another tie_weights
            raise RuntimeError("other weights were trained")
    except FileNotFoundError as error:
        raise UserError(f"checkpoint_path: no {path} here, so train first") from error
    except (OSError, EOFError, RuntimeError, LookupError, TypeError,
            pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} is damaged, not a checkpoint of this file, or does "
                        f"not fit {changes or 'this version'}: {reason}") from error
    return saved, model.to(device).eval(), CharDataset("", 0, saved["itos"])

def check(config):
    """Convert each constant to its type, and refuse values that cannot work."""
    positive = "block_size n_heads d_model batch_size eval_interval grad_clip".split()
    for f in fields(config):
        given = getattr(config, f.name)
        most = {"dropout": 1, "top_p": 1, "seed": 10**12}.get(f.name, math.inf)
        try:
            value = f.type(given)               # int(20.5) is 20, which is not 20.5
            fine = f.type is str or (value == given and 0 <= value <= most)
            torch.empty(0, device=value if f.name == "device" else "cpu")
        except (TypeError, ValueError, RuntimeError, AssertionError):
            fine = False                        # int("ten"); a device that is missing
        if not fine or (f.name in positive and value == 0):
            raise UserError(f"{f.name} cannot be {given!r}: bad type, range or device")
        setattr(config, f.name, value)
    return config

def train(config=None, **settings):
    """Train on the first 90% of a text, validate on the rest; settings are fields of
    TrainConfig. The best model so far goes to checkpoint_path; a file that was there
    before is copied to .old. Returns the last model, not the best, and the dataset."""
    run, saved = check(TrainConfig(**settings)), {}
    path, tmp = Path(run.checkpoint_path), Path(f"{run.checkpoint_path}.tmp")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"checkpoint_path: {path} is a folder, or lacks its folder")
    if run.resume:
        saved, model, _ = load(path, run.device, **(asdict(config) if config else {}))
        config = model.config
    config = check(config or TransformerConfig())
    first, T = saved.get("step", 0), config.block_size
    text = load_text(run.text_path)
    dataset = CharDataset(text, T, saved.get("itos"))
    n_train = len(dataset.data) * 9 // 10
    val_data = dataset.data[n_train:].to(run.device)  # held out: never trained on
    if len(val_data) <= T:
        raise UserError(f"text_path: {len(dataset.data)} characters are too few; "
                        f"block_size {T} needs {10 * T + 1}")
    if saved and first >= run.max_steps:
        raise UserError(f"max_steps: {path} has done {first} already, so set it higher")
    torch.manual_seed(run.seed)
    config = replace(config, vocab_size=dataset.vocab_size)
    model = MiniTransformer(config).to(run.device)  # when resumed, it is filled below
    optimizer = make_optimizer(model, run)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {run.device}")
    step, losses = first, []                    # losses: since the last report
    start = since = time.time()                 # since: the end of the last report
    best_val, best_step = math.inf, first       # still first: nothing saved yet
    reports = saved.get("reports", {})          # step: (training loss, held-out loss)
    trained = [name for name, _ in model.named_parameters()]  # a tied one: once
    if saved:
        model.load_state_dict(saved["weights"])
        groups = optimizer.state_dict()["param_groups"]  # this run's rate and decay
        optimizer.load_state_dict(dict(state=saved["optimizer"], param_groups=groups))
        best_val = evaluate(model, val_data)
        before = {**saved, **saved["config"], **saved["run"]}
        now = {**asdict(config), **asdict(run), "characters": len(text)}
        changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now
                   if name != "resume" and before.get(name) != now[name]]
        print(f"resuming at step {first}; changed:", ", ".join(changed) or "nothing")

    def report():
        """Evaluate, save the model if it is the best so far, and only then print."""
        nonlocal losses, since, best_val, best_step
        val, note = evaluate(model, val_data), ""
        mean = float(np.mean(losses)) if losses else None
        reports.setdefault(step, (mean, val))   # an older entry stays
        if losses and val < best_val:
            content = io.BytesIO()
            torch.save(dict(config=asdict(config), run=asdict(run), step=step,
                            reports=reports, itos=dataset.itos, trained=trained,
                            characters=len(text), weights=model.state_dict(),
                            optimizer=optimizer.state_dict()["state"]), content)
            tmp.write_bytes(content.getvalue())  # fails if the disk is full
            if best_step == first and path.exists():  # this run's first save
                shutil.copyfile(path, f"{path}.old")
                note = f" | the earlier {path} is now {path}.old"
            best_step = step                    # now, or Ctrl-C may redo .old
            tmp.replace(path)                   # so a crash leaves no half-written file
            best_val = val
        before = f"train {mean:.4f} | " if losses else ""
        seconds = time.time() - start
        print(f"step {step} | {before}val {val:.4f} | {seconds:.0f} s{note}")
        write(model, dataset, text[0], 70, run)
        losses, since = [], time.time()

    try:
        while step < run.max_steps:
            if step == first or step % run.eval_interval == 0:
                report()
            torch.manual_seed(run.seed * 1_000_000 + step)  # same windows when resumed
            x, y = dataset[torch.randint(n_train - T, (run.batch_size,))]  # both (B, T)
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, run)
            losses.append(training_step(model, optimizer, x.to(run.device),
                                        y.to(run.device), run.grad_clip))
            step += 1
            if sys.stdout.isatty():             # progress, in a terminal only
                left = (time.time() - since) / len(losses) * (run.max_steps - step)
                print(f"step {step} | {losses[-1]:.4f} | {left:.0f} s left ", end="\r")
    except KeyboardInterrupt:
        pass                                    # Ctrl-C: what follows is still done
    report()
    write(model, dataset, text[0], run.sample_chars, run)
    print(f"saved in {path}: the model of step {best_step}, val {best_val:.4f}"
          if best_step > first else "this run saved nothing: val did not improve")
    return model.eval(), dataset

def main(argv=None):
    """The command line: one option for each constant in section 1, and --prompt."""
    if hasattr(sys.stdout, "reconfigure"):      # escape what the console cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = ArgumentParser(usage="%(prog)s [--help] [--name X]", allow_abbrev=False,
                            argument_default=SUPPRESS)
    parser.add_argument("--prompt", help="text for the saved model to continue")
    source = Path(__file__).read_text(encoding="utf-8")  # --help: section 1's comments
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)", source, re.M))
    for f in fields(TransformerConfig) + fields(TrainConfig):
        kind = {"action": BooleanOptionalAction} if f.type is bool else {"type": f.type}
        kind["help"] = f"{comments.get(f.name)} [{f.default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", **kind)
    given = vars(parser.parse_args(argv))       # SUPPRESS: only what was typed
    prompt, names = given.pop("prompt", None), vars(TransformerConfig())
    changes = {name: given.pop(name) for name in names if name in given}  # of the model
    try:
        run = check(TrainConfig(**given))       # what is left
        if prompt is None and not run.resume:
            return train(TransformerConfig(**changes), **given)
        saved, model, dataset = load(run.checkpoint_path, run.device, **changes)
        if prompt is None:
            return train(model.config, **given)
        val = saved["reports"][saved["step"]][1]
        print(f"{run.checkpoint_path}: step {saved['step']}, val {val:.4f}")
        torch.manual_seed(run.seed)
        write(model, dataset, prompt, run.sample_chars, run)
    except (UserError, OSError) as error:
        sys.exit(f"mini_transformer: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. A checkpoint saved before, if any, is intact.")

if __name__ == "__main__":
    main()
