"""mini_transformer: a GPT in one file. Read it, retype it, run it, take it apart.

    python mini_transformer.py                    # train on Shakespeare, then sample
    python mini_transformer.py --prompt "ROMEO:"  # continue this with the saved model

Given the characters so far, the model predicts the next one. The loss is cross-entropy
in nats: the mean of -ln p(next character). A uniform guess among 65 characters gives
ln 65 = 4.17; a loss of 1.5 is like a guess among exp(1.5) = 4.5 (the perplexity).

Each position carries a vector of C numbers, the residual stream x. With pre_norm (the
default), a block overwrites nothing: it adds attention's output, then feed-forward's.

ids (B, T) -> token_emb -> x --+----------------> + --+---------------> + -> x (L times)
                               '-> norm -> attn --'   '-> norm -> ffn --'
x -> ln_final -> lm_head -> logits (B, T, V) -> softmax -> p(next character)

B batch size   T positions   V vocabulary size   L blocks   C d_model, size of x
H query heads   G key/value heads   D = C / H, head size   N characters in a text
"""
import math
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import requests
import torch                                    # 2.5 or later, for nn.Buffer
import torch.nn as nn
import torch.nn.functional as F

# ==== 1. Constants: edit them here, or pass --name value (a bool: --name or --no-name)
@dataclass
class TransformerConfig:
    """The model: its sizes first, then a choice for each of its parts."""
    vocab_size: int = 65       # V: distinct characters; train() sets it from the text
    block_size: int = 128      # maximum context length, in characters
    n_layers: int = 4          # L: blocks, one after another
    n_heads: int = 4           # H: attention heads, in parallel
    n_kv_heads: int = 0        # G: key/value heads, each for H/G query heads; 0: G = H
    d_model: int = 128         # C: width of the residual stream
    d_ff: int = 512            # hidden width of feed-forward; swiglu takes 2/3 of it
    dropout: float = 0.0       # probability of zeroing an activation during training
    bias: bool = False         # biases in the linear layers of the blocks
    positions: str = "rope"    # rope, learned, sinusoidal, none
    attention: str = "fused"   # fused (PyTorch's, faster), explicit (written out below)
    causal: bool = True        # False lets positions see the characters they predict
    ffn: str = "swiglu"        # relu, gelu, gelu_tanh (as in GPT-2), swiglu (Llama)
    norm: str = "layernorm"    # layernorm, rmsnorm
    qk_norm: bool = True       # normalize queries and keys
    pre_norm: bool = True      # normalize before attention and feed-forward, not after
    tie_weights: bool = True   # token_emb and lm_head share one matrix

@dataclass
class TrainConfig:
    """The training run, and how text is sampled from the model."""
    text_path: str = "input.txt"  # any UTF-8 file; input.txt is downloaded if missing
    max_steps: int = 3600      # optimizer steps
    batch_size: int = 12       # B: windows of block_size characters per step
    learning_rate: float = 2e-3  # at its peak, after the warm-up
    warmup_steps: int = 100    # steps over which the learning rate rises to its peak
    weight_decay: float = 0.4  # 0.1 is usual; a small text, seen many times, needs more
    grad_clip: float = 1.0     # maximum gradient norm; inf: no clipping
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # "mps": Apple's GPU
    seed: int = 1337           # same seed, CPU and number of threads: same model
    eval_interval: int = 400   # steps between evaluations
    checkpoint_path: str = "checkpoint.pt"  # the best model of this run
    resume: bool = False       # continue from checkpoint_path, up to max_steps
    sample_chars: int = 500    # number of characters to generate
    temperature: float = 0.8   # 0: always the likeliest; 1: as learned; >1: wilder
    top_k: int = 0             # sample from the k likeliest characters; 0: from all
    top_p: float = 1.0         # nucleus: smallest set with total probability >= top_p

# ==== 2. Data: a text is encoded as ids, and read in windows
TEXT_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
            "tinyshakespeare/input.txt")

def load_text(path):
    """Read a UTF-8 file; input.txt is downloaded first if it is missing."""
    if path == "input.txt" and not Path(path).exists():
        content = requests.get(TEXT_URL, timeout=30).content
        if len(content) != 1_115_394:           # its size in bytes: rejects error pages
            raise ValueError(f"did not receive the expected text from {TEXT_URL}")
        Path(path).write_bytes(content)
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # skips a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: please convert it") from error

class CharDataset:
    """A text as ids. dataset[i] -> x, y, both (T,) int64; y is x shifted by one:
        x  h e l l     every position is a training example:
        y  e l l o     h -> e,  he -> l,  hel -> l,  hell -> o"""
    def __init__(self, text, block_size, itos=None):
        self.itos = itos or sorted(set(text))   # int to string: id -> character
        self.stoi = {char: i for i, char in enumerate(self.itos)}  # character -> id
        self.vocab_size, self.block_size = len(self.itos), block_size
        self.data = torch.tensor(self.encode(text))  # (N,)

    def encode(self, text):                     # str -> list of ids
        unknown = set(text) - set(self.itos)
        if unknown:
            raise ValueError(f"characters not in the vocabulary: {sorted(unknown)}")
        return [self.stoi[char] for char in text]

    def decode(self, ids):                      # list of ids -> str
        return "".join(self.itos[i] for i in ids)

    def __len__(self):                          # number of windows
        return len(self.data) - self.block_size

    def __getitem__(self, i):
        windows = self.data.unfold(0, self.block_size + 1, 1)[i]  # i: an int, or (B,)
        return windows[..., :-1], windows[..., 1:]

# ==== 3. Positions: attention by itself ignores the order of what it reads
def cos_and_sin(n, n_frequencies):
    """(2, n, n_frequencies): cosines and sines of position times frequency, where the
    frequencies fall from 1 radian per position towards 1/10000 (Vaswani 2017, 3.5)."""
    frequencies = 10000.0 ** -(torch.arange(n_frequencies) / n_frequencies)
    angle = torch.outer(torch.arange(n), frequencies)  # (n, n_frequencies)
    return torch.stack([angle.cos(), angle.sin()])

def rotate(x, cos, sin):
    """RoPE (Su 2021), for q and k: x (..., T, D), cos and sin (T, D/2) -> (..., T, D).
    Entries d and d + D/2 form a pair, rotated by its frequency times the position. If q
    and k both move on by n positions, both rotate further by the same angle, and their
    dot product, the score, stays the same: only the distance between them counts."""
    a, b = x.chunk(2, dim=-1)                   # both (..., T, D/2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

def learned(n, C):
    """(n, C): a trained vector for each position, as in GPT-2."""
    return nn.Parameter(0.02 * torch.randn(n, C))

def sinusoidal(n, C):
    """(n, C): fixed sinusoids (Vaswani 2017, 3.5), scaled down to match token_emb."""
    cos, sin = cos_and_sin(n, C // 2)           # both (n, C/2)
    return nn.Buffer(0.02 * torch.cat([sin, cos], dim=-1))

POSITIONS = {"learned": learned, "sinusoidal": sinusoidal, "rope": None, "none": None}

# ==== 4. Attention: the only place where positions exchange information
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}  # Ba 2016, Zhang 2019

def make_norm(config, size):
    """A layer that scales vectors of this size to a root mean square of 1, then applies
    learned gains. LayerNorm also subtracts the mean first and adds a learned bias."""
    return NORMS[config.norm](size, eps=1e-5)

def linear(n_in, n_out, bias=False, n_summed=1):
    """Linear layer (..., n_in) -> (..., n_out), initialized as in GPT-2. n_summed: how
    many such layers add to the stream; smaller weights keep its variance down."""
    layer = nn.Linear(n_in, n_out, bias)
    nn.init.normal_(layer.weight, std=0.02 / math.sqrt(n_summed))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer

def explicit_attention(q, k, v, is_causal=False):
    """softmax(q k^T / sqrt(D)) v (Vaswani 2017, Eq. 1); q, k, v, output (B, H, T, D).
    Each output averages the values, weighted by how well their keys match the query.
        h  * . .     rows are queries, columns are keys:
        e  * * .     a position attends to itself and to earlier ones (*),
        l  * * *     never to later ones (.)"""
    # If q and k have independent entries of mean 0 and variance 1, their dot product
    # has variance D. Unscaled, it would saturate the softmax, making gradients vanish.
    scores = q @ k.mT / math.sqrt(q.size(-1))   # (B, H, T, T); k.mT is (B, H, D, T)
    if is_causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
        scores = scores.masked_fill(future, -math.inf)  # exp(-inf) = 0: no weight
    return scores.softmax(dim=-1) @ v           # (B, H, T, D)

ATTENTIONS = {"fused": F.scaled_dot_product_attention, "explicit": explicit_attention}

class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C). Each position compares its query with the keys at its own
    and earlier positions, and averages the values, weighted by how well the keys match.
    Each head has its own query projection, so heads can look for different things."""
    def __init__(self, config):
        super().__init__()
        C, H, G = config.d_model, config.n_heads, config.n_kv_heads or config.n_heads
        if min(C, H, G) < 1 or C % (2 * H) != 0 or H % G != 0:
            raise ValueError(f"{C=}, {H=}, {G=}: 2H must divide C, G divide H, all > 0")
        D = C // H                              # even, because rope rotates pairs
        self.n_heads, self.n_kv_heads, self.causal = H, G, config.causal
        self.qkv_proj = linear(C, (H + 2 * G) * D, config.bias)  # q, k and v at once
        self.out_proj = linear(C, C, config.bias, n_summed=2 * config.n_layers)
        self.attend = ATTENTIONS[config.attention]
        # Keep scores small, however large the weights of q and k grow (Dehghani 2023).
        self.q_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
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
            k = k.repeat_interleave(H // G, dim=1)  # (B, H, T, D): k0 k0 k1 k1
            v = v.repeat_interleave(H // G, dim=1)  # (B, H, T, D)
        out = self.attend(q, k, v, is_causal=self.causal)  # (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, T, C): concatenate the heads
        return self.out_proj(out)               # (B, T, C): mix what they found

# ==== 5. Feed-forward: attention mixes positions; this processes each one separately
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": nn.GELU("tanh"),
               "swiglu": F.silu}                # SiLU(x) = x * sigmoid(x), on the gate

class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, C): widen to d_ff, apply a nonlinearity, narrow again."""
    def __init__(self, config):
        super().__init__()
        C, width = config.d_model, config.d_ff
        self.activation = ACTIVATIONS[config.ffn]
        self.gate_proj = None
        if config.ffn == "swiglu":              # a gated linear unit (Shazeer 2020)
            # Three matrices of 2/3 the width have as many weights as two. The width is
            # rounded up to a multiple of 8, because such matrices multiply faster.
            width = (2 * width // 3 + 7) // 8 * 8
            self.gate_proj = linear(C, width, config.bias)
        self.up_proj = linear(C, width, config.bias)
        self.down_proj = linear(width, C, config.bias, n_summed=2 * config.n_layers)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))  # (B, T, C)
        gate = self.activation(self.gate_proj(x))  # (B, T, width)
        return self.down_proj(gate * self.up_proj(x))  # (B, T, C)

# ==== 6. Block
class TransformerBlock(nn.Module):
    """(B, T, C) -> (B, T, C): attention, then feed-forward; each adds to the stream."""
    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.ln_attn = make_norm(config, config.d_model)
        self.attn = CausalSelfAttention(config)
        self.ln_ffn = make_norm(config, config.d_model)
        self.ffn = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        if self.pre_norm:
            # The stream stays a plain sum: gradients flow freely along it (Xiong 2020).
            x = x + self.drop(self.attn(self.ln_attn(x)))
            return x + self.drop(self.ffn(self.ln_ffn(x)))
        x = self.ln_attn(x + self.drop(self.attn(x)))  # post-norm (Vaswani 2017)
        return self.ln_ffn(x + self.drop(self.ffn(x)))

# ==== 7. Sampling and the model
def sample(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B, V) -> ids (B, 1): draw one character for each row."""
    if temperature <= 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1): always the likeliest
    probs = (logits / temperature).softmax(dim=-1)  # (B, V)
    V = probs.size(-1)
    probs, ids = probs.topk(min(top_k or V, V))  # both (B, k), the likeliest first
    if top_p is not None and top_p < 1:         # nucleus sampling (Holtzman 2020)
        probs = probs / probs.sum(dim=-1, keepdim=True)  # for example 0.4 0.3 0.2 0.1
        before = probs.cumsum(dim=-1) - probs   # sum before each:     0.0 0.4 0.7 0.9
        probs[before >= max(top_p, 1e-9)] = 0   # 0.5 keeps 0.4 and 0.3; 0 keeps 0.4
    rank = torch.multinomial(probs, 1)          # (B, 1); probs need not sum to 1
    return ids.gather(-1, rank)                 # (B, 1): from rank back to id

class MiniTransformer(nn.Module):
    """ids (B, T) -> logits (B, T, V) and a loss: the mean cross-entropy in nats against
    targets (B, T), or None without them. ValueError if T is 0 or over block_size."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.d_model, config.n_layers
        self.token_emb = nn.Embedding(V, C)     # row i is the vector of id i
        nn.init.normal_(self.token_emb.weight, std=0.02)
        make_table = POSITIONS[config.positions]  # None for rope: it acts in attention
        self.position_emb = make_table(config.block_size, C) if make_table else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(L))
        # With pre-norm, the output of the last block has not been normalized yet.
        self.ln_final = make_norm(config, C) if config.pre_norm else nn.Identity()
        self.lm_head = linear(C, V)
        if config.tie_weights:
            # Each logit is then the dot product of ln_final(x) and a token embedding.
            self.lm_head.weight = self.token_emb.weight  # (V, C): Press 2017

    def forward(self, idx, targets=None):
        T, limit = idx.size(1), self.config.block_size
        if T < 1 or T > limit:
            raise ValueError(f"expected 1 to {limit} characters, got {T}")
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
        """ids (B, T) -> (B, T + max_new_tokens): predict, sample, append, repeat. Each
        step recomputes the whole window; a KV cache would keep the keys and values."""
        was_training = self.training
        self.eval()                             # no dropout during generation
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])  # (B, T, V)
            new = sample(logits[:, -1], temperature, top_k, top_p)  # (B, 1)
            idx = torch.cat([idx, new], dim=1)  # (B, T + 1)
        self.train(was_training)
        return idx

# ==== 8. Training
def make_optimizer(model, run):                 # run: a TrainConfig, here and below
    """AdamW (Loshchilov 2019) divides the running average of each gradient by its root
    mean square, so that all weights move at a similar pace. Weight decay multiplies the
    matrices by 1 - learning rate * weight_decay at each step, to limit overfitting."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # gains, biases: no decay
    groups = [{"params": matrices, "weight_decay": run.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    # betas: gradients averaged over ~10 steps, their squares over ~100. fused: faster.
    return torch.optim.AdamW(groups, run.learning_rate, betas=(0.9, 0.99), fused=True)

def schedule(step, run):
    """The learning rate at a given step: linear warm-up, then cosine decay to 0. It is
    low at first because AdamW's running averages are unreliable after so few steps, and
    low at the end so that the noise of single batches averages out."""
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    progress = (step - run.warmup_steps) / (run.max_steps - run.warmup_steps)  # 0 to 1
    return run.learning_rate * (1 + math.cos(math.pi * progress)) / 2

@torch.no_grad()
def evaluate(model, data):
    """The mean loss on data, ids (N,), cut into windows of block_size; no dropout."""
    T, was_training = model.config.block_size, model.training
    windows = data.unfold(0, T + 1, T)          # (n, T + 1): neighbours share one id
    model.eval()
    total = 0.0
    for batch in windows.split(16):             # a few at a time, to save memory
        _, loss = model(batch[:, :-1], batch[:, 1:])
        total += loss.item() * len(batch)       # the last batch may be smaller
    model.train(was_training)
    return total / len(windows)

def completion(model, dataset, prompt, n, run):
    """The prompt, at least one character, followed by n generated characters."""
    idx = torch.tensor([dataset.encode(prompt)], device=run.device)  # (1, T)
    idx = model.generate(idx, n, run.temperature, run.top_k, run.top_p)
    return dataset.decode(idx[0].tolist())

def train(config=None, **settings):
    """Train on the first 90% of a text, evaluate on the rest; settings are fields of
    TrainConfig. Sample from the model after the last step; return it and the dataset.
    Each new best model goes to checkpoint_path; an older run's file is kept as .old."""
    run = TrainConfig(**settings)
    path, tmp = Path(run.checkpoint_path), Path(f"{run.checkpoint_path}.tmp")
    saved = torch.load(path, run.device, weights_only=True) if run.resume else {}
    config = config or TransformerConfig(**saved.get("config", {}))
    text, T = load_text(run.text_path), config.block_size
    dataset = CharDataset(text, T, saved.get("itos"))
    config = replace(config, vocab_size=dataset.vocab_size)
    n_train = len(dataset.data) * 9 // 10
    val_data = dataset.data[n_train:].to(run.device)  # held out: never trained on
    if len(val_data) <= T:
        raise ValueError(f"{len(text)} characters are too few for block_size={T}")
    if min(run.batch_size, run.eval_interval, run.grad_clip) <= 0:
        raise ValueError("batch_size, eval_interval and grad_clip must be positive")

    torch.manual_seed(run.seed)
    model = MiniTransformer(config).to(run.device)
    optimizer = make_optimizer(model, run)
    step, last, losses = saved.get("step", 0), run.max_steps, []
    if run.resume:
        if asdict(config) != saved["config"] or step >= last:
            raise ValueError(f"resuming needs max_steps > {step} and {saved['config']}")
        model.load_state_dict(saved["weights"])
        groups = optimizer.state_dict()["param_groups"]  # keep this run's weight_decay
        optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
    best_val = evaluate(model, val_data)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {run.device}")
    print(f"step {step} | val {best_val:.4f}")
    print("   ", repr(completion(model, dataset, text[0], 70, run)), flush=True)
    tmp.touch()                                 # if we cannot write there, fail now
    if path.exists():
        Path(f"{path}.old").write_bytes(path.read_bytes())
    while step < last:
        try:
            torch.manual_seed(run.seed * 1_000_000 + step)  # same batches when resumed
            starts = torch.randint(n_train - T, (run.batch_size,))
            x, y = dataset[starts]              # both (B, T)
            _, loss = model(x.to(run.device), y.to(run.device))
            optimizer.zero_grad()
            loss.backward()
            # Clipping limits the harm of an outlier batch. NaN or inf raises an error.
            nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip,
                                     error_if_nonfinite=True)
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, run)
            optimizer.step()
            step += 1
            losses.append(loss.item())
            if sys.stdout.isatty():             # progress, in a terminal only
                print(f"step {step} of {last} | {losses[-1]:.4f}", end="\r")
        except KeyboardInterrupt:
            print("\nOne last evaluation, then this run ends.")
            last = step                         # evaluates below, then the loop ends
        if losses and (step == last or step % run.eval_interval == 0):  # once at most
            val = evaluate(model, val_data)
            if val < best_val:
                best_val = val
                torch.save(dict(config=asdict(config), itos=dataset.itos, step=step,
                                val=val, weights=model.state_dict(),
                                optimizer=optimizer.state_dict()), tmp)
                tmp.replace(path)               # a crash leaves the old file whole
            # train: mean since the last line; val: now. If only val rises: overfitting.
            print(f"step {step} | train {np.mean(losses):.4f} | val {val:.4f}")
            print("   ", repr(completion(model, dataset, text[0], 70, run)), flush=True)
            losses = []
    print(completion(model, dataset, text[0], run.sample_chars, run))
    return model.eval(), dataset

def main(argv=None):
    """The command line: one option for each constant in section 1, and --prompt."""
    if hasattr(sys.stdout, "reconfigure"):      # escape what the console cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = ArgumentParser(argument_default=SUPPRESS, allow_abbrev=False,
                            description="Section 1 of the file explains the options.")
    parser.add_argument("--prompt", help="text for the saved model to continue")
    for f in fields(TransformerConfig) + fields(TrainConfig):
        kind = {"action": BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", help=f"default: {f.default}", **kind)
    args = vars(parser.parse_args(argv))        # SUPPRESS: only what was typed
    prompt = args.pop("prompt", None)
    given = {name: args.pop(name) for name in vars(TransformerConfig()) if name in args}
    run, saved = TrainConfig(**args), {}        # args: what is left
    if run.resume or prompt is not None:        # the saved model, but for what is given
        saved = torch.load(run.checkpoint_path, run.device, weights_only=True)
    config = replace(TransformerConfig(**saved.get("config", {})), **given)
    if prompt is None:
        return train(config, **args)
    model = MiniTransformer(config).to(run.device)
    model.load_state_dict(saved["weights"])
    torch.manual_seed(run.seed)
    dataset = CharDataset("", 0, saved["itos"])  # no text: only to encode and decode
    print(completion(model, dataset, prompt, run.sample_chars, run))

if __name__ == "__main__":
    main()
