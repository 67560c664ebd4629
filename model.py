"""A Llama-style GPT with KV-shifting attention (arXiv 2411.19574) in one file.

RMSNorm before attention and MLP, SwiGLU, rotary positions, grouped-query attention, no biases.
`KVShift` is the new part: it mixes each key and value with the previous token's, by learned scalars
of each head, so that a single attention layer can be an induction head.

Shape comments: B sequences, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = C / H = head_dim,
V = vocab_size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int = 256  # context length in tokens
    vocab_size: int | None = None  # token ids; None: those of the corpus; GPUs like multiples of 64
    n_layer: int = 6  # blocks
    n_head: int = 6  # query heads per block
    n_kv_head: int | None = None  # key/value heads per block; None: n_head
    n_embd: int = 384  # width
    ffn_size: int | None = None  # hidden width of the SwiGLU; None: about 8/3 n_embd
    rope_base: float = 100_000.0  # base of the rotary frequencies; 0: no positions
    norm_eps: float = 1e-6  # epsilon of RMSNorm
    dropout: float = 0.0  # on the embeddings, the attention weights and each residual branch
    tie_embeddings: bool = True  # the output head shares the matrix of the token embedding
    kv_shift: Literal["none", "kv", "k", "v", "qkv"] = "kv"  # projections to shift; kv: the paper's
    shift_window: int = 2  # tokens in a mix, the current one included; 2: the paper's
    shift_at: Literal["attention", "block", "embedding"] = "attention"
    # block: the input of each attention layer; embedding: once. Both need kv_shift=none
    shift_weights: Literal["free", "gate", "clamp", "input"] = "free"
    # gate: softmax; clamp: to [0, 1]; input: a gate that depends on the token
    shift_per: Literal["head", "channel"] = "head"  # one set of weights per head | per channel
    shift_init: Literal["uniform", "identity", "induction"] = "uniform"
    # identity: as vanilla; induction: an induction head, with keys (0, 1) and values (1, 0)
    shift_learned: bool = True  # False: the weights of the shift keep their initial values

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd",
                     "ffn_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} is no multiple of 2 n_head={2 * self.n_head}")
        if self.n_head % (self.n_kv_head or self.n_head):
            raise ValueError(f"n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not (self.rope_base == 0 or 1 < self.rope_base < float("inf")):
            raise ValueError(f"rope_base={self.rope_base} must be 0 or finite and above 1")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps={self.norm_eps} must be in (0, 1)")
        if not 2 <= self.shift_window <= max(2, self.block_size):
            raise ValueError(f"shift_window={self.shift_window} must be in [2, block_size]")
        if self.shift_init != "uniform" and self.shift_weights in ("gate", "input"):
            raise ValueError(f"shift_init={self.shift_init} needs shift_weights=free or clamp: "
                             f"{self.shift_weights} cannot reach 0 and 1")
        if self.shift_at != "attention" and (
                self.kv_shift != "none" or self.shift_init == "induction"):
            raise ValueError(f"shift_at={self.shift_at} needs kv_shift=none, and cannot start with "
                             "shift_init=induction")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class KVShift(nn.Module):
    """Mixes each token's rows with those of the previous tokens, by learned weights per head:

        y_t = w_0 x_t + w_1 x_{t-1} + ... + w_{window-1} x_{t-window+1}

    For the keys, (w_0, w_1) are the paper's alpha_1 and alpha_2; for the values, beta_1 and beta_2
    (Eqs. 4-6). Rows before the first token are zero. With alpha = (0, 1) and beta = (1, 0), the key
    at position t is that of token t - 1 and the value is that of token t: a query for "A" finds the
    position after an earlier "A" and copies what stands there. That is an induction head.

    per: "head", one set of weights per head, or "channel", one per channel (a short convolution).
    weights: "free" scalars; "clamp" to [0, 1]; "gate", a softmax whose last logit is 0; "input", a
    gate whose logits depend on the token: a linear map of its row, zero at first, is added to them.
    init: "uniform", w_0, ..., w_{window-2} ~ U(0, 1) and the last one makes the sum 1; "identity",
    (1, 0, ..., 0); "previous", (0, 1, 0, ..., 0). For gates, "uniform" draws from the simplex.

    Parameters: weight (window, n_head, 1 or head_dim), without the last row for gates; "input" also
    has map (window - 1, n_head, head_dim).
    """

    def __init__(self, n_head, head_dim, window=2, per="head", weights="free", init="uniform"):
        super().__init__()
        assert per in ("head", "channel") and init in ("uniform", "identity", "previous")
        assert weights in ("free", "clamp", "gate", "input")
        assert init == "uniform" or weights in ("free", "clamp")
        self.n_head, self.head_dim, self.window = n_head, head_dim, window
        self.kind, self.init = weights, init
        rows = window - 1 if weights in ("gate", "input") else window
        self.weight = nn.Parameter(torch.empty(rows, n_head, head_dim if per == "channel" else 1))
        if weights == "input":
            self.map = nn.Parameter(torch.empty(rows, n_head, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        w = self.weight
        if self.init != "uniform":
            w.zero_()[0 if self.init == "identity" else 1] = 1.0
        elif self.kind in ("gate", "input"):
            e = w.new_empty(self.window, *w.shape[1:]).exponential_()
            w.copy_((e[:-1] / e[-1]).log())
            if self.kind == "input":
                self.map.zero_()
        else:
            w.uniform_()
            w[-1] = 1.0 - w[:-1].sum(dim=0)

    def weights(self, x):
        """The window weights (w_0, ..., w_{window-1}) for the rows x, each broadcastable to x."""
        w = self.weight
        if self.kind == "input":
            w = w[:, None, None] + torch.einsum("bthd,whd->wbth", x, self.map).unsqueeze(-1)
        if self.kind in ("gate", "input"):
            w = torch.cat([w, torch.zeros_like(w[:1])]).softmax(dim=0)
        elif self.kind == "clamp":  # straight-through: the gradient is that of the free scalar
            w = w + (w.clamp(0, 1) - w).detach()
        return w.unbind()

    def forward(self, x, past=None):
        """x: (B, T, n_head, head_dim). past: the window - 1 rows before x, unmixed; None: zeros."""
        n = self.window - 1
        rows = F.pad(x, (0, 0, 0, 0, n, 0)) if past is None else torch.cat([past, x], dim=1)
        weights = [w.to(x.dtype) for w in self.weights(x)]
        y = weights[0] * x
        for i in range(1, self.window):
            y = y + weights[i] * rows[:, n - i : rows.size(1) - i]  # x_{t-i}
        return y


def make_shift(c: GPTConfig, n_head: int, name: str = "") -> KVShift:
    """The shift that the options describe, of the rows "q", "k", "v" or of others (no name)."""
    init = c.shift_init
    if init == "induction":
        init = "previous" if name == "k" else "identity"
    return KVShift(n_head, c.head_dim, c.shift_window, c.shift_per, c.shift_weights, init)


def mix(shift: KVShift, x, cache=None):
    """shift(x) for x (B, T, n_head, head_dim) or (B, T, n_head * head_dim), after cached rows."""
    rows, past = x.view(*x.shape[:2], shift.n_head, shift.head_dim), None
    if cache:
        past = cache.past[shift]
        cache.past[shift] = torch.cat([past, rows], dim=1)[:, -past.size(1) :]
    return shift(rows, past).view_as(x)


class Cache:
    """What decoding keeps of the tokens read so far.

    Attention needs their mixed, rotated keys and their mixed values. A shift needs the last
    window - 1 rows as they were BEFORE the mix: with mixed rows only, the next token is wrong.
    """

    def __init__(self, model, batch_size, max_length):
        self.length, self.max_length = 0, max_length
        self.kv, self.past = {}, {}  # Attention -> keys and values, KVShift -> unmixed rows
        new_zeros = model.embed.weight.new_zeros
        for module in model.modules():
            if isinstance(module, Attention):
                shape = (batch_size, module.n_kv_head, max_length, module.head_dim)
                self.kv[module] = new_zeros(shape), new_zeros(shape)
            if isinstance(module, KVShift):
                shape = (batch_size, module.window - 1, module.n_head, module.head_dim)
                self.past[module] = new_zeros(shape)

    def append(self, module, k, v):
        """Adds k and v (B, K, T, D); returns the keys and values of all tokens so far."""
        end = self.length + k.size(2)
        for stored, new in zip(self.kv[module], (k, v), strict=True):
            stored[:, :, self.length : end] = new
        return [stored[:, :, :end] for stored in self.kv[module]]


def rotary(start, end, head_dim, base, device):
    """cos and sin (T, 1, D / 2) of the rotary angles of positions start to end - 1."""
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    frequencies = base**-exponents if base else torch.zeros_like(exponents)
    angles = torch.arange(start, end, device=device)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary position embedding: turns channels d and d + D/2 of x (B, T, heads, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head or c.n_head, c.head_dim
        self.dropout = c.dropout
        n_heads = {"q": self.n_head, "k": self.n_kv_head, "v": self.n_kv_head}
        self.q = nn.Linear(c.n_embd, self.n_head * c.head_dim, bias=False)
        self.k = nn.Linear(c.n_embd, self.n_kv_head * c.head_dim, bias=False)
        self.v = nn.Linear(c.n_embd, self.n_kv_head * c.head_dim, bias=False)
        self.out = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.shift = nn.ModuleDict({  # alpha is shift["k"], beta is shift["v"]
            name: make_shift(c, n_heads[name], name) for name in "qkv" if name in c.kv_shift})

    def forward(self, x, cos, sin, cache: Cache | None = None):
        B, T, C = x.shape
        rows = {name: getattr(self, name)(x).view(B, T, -1, self.head_dim) for name in "qkv"}
        for name, shift in self.shift.items():
            rows[name] = mix(shift, rows[name], cache)
        q = rotate(rows["q"], cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = rotate(rows["k"], cos, sin).transpose(1, 2)  # (B, K, T, D)
        v = rows["v"].transpose(1, 2)  # (B, K, T, D)

        mask = None  # is_causal does it, unless a chunk of several tokens follows cached ones
        if cache:
            k, v = cache.append(self, k, v)
            if 1 < T < k.size(2):
                mask = x.new_ones(T, k.size(2), dtype=torch.bool).tril(cache.length)
        with torch.autocast("cpu", enabled=False):  # bfloat16 attention trains slowly there
            y = F.scaled_dot_product_attention(
                q, k, v.to(q.dtype), attn_mask=mask, is_causal=mask is None and T > 1,
                dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=self.n_kv_head < self.n_head)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        hidden = c.ffn_size or -(-8 * c.n_embd // (3 * 32)) * 32
        self.gate = nn.Linear(c.n_embd, hidden, bias=False)
        self.up = nn.Linear(c.n_embd, hidden, bias=False)
        self.down = nn.Linear(hidden, c.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.norm_attn = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.shift = make_shift(c, c.n_head) if c.shift_at == "block" else None
        self.attn = Attention(c)
        self.norm_mlp = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.mlp = MLP(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, cos, sin, cache: Cache | None = None):
        y = self.norm_attn(x)
        if self.shift:
            y = mix(self.shift, y, cache)
        x = x + self.dropout(self.attn(y, cos, sin, cache))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set")
        self.config = c = config
        with torch.random.fork_rng(devices=[]):  # only init_weights uses up random numbers
            self.embed = nn.Embedding(c.vocab_size, c.n_embd)
            self.shift = make_shift(c, c.n_head) if c.shift_at == "embedding" else None
            self.dropout = nn.Dropout(c.dropout)
            self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
            self.norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
            if not c.tie_embeddings:
                self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.loss_options = None  # LinearCrossEntropyOptions(): never stores all logits
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices ~ N(0, 0.02^2), those that end a residual branch (out, down) scaled down by
        sqrt(2 n_layer) as in GPT-2; norms 1. Shifts are drawn last, by reset_parameters, so that
        a vanilla and a shifted model with the same seed share all other weights."""
        for name, p in self.named_parameters():
            if p.ndim == 2 and "shift." not in name:
                ends_branch = name.endswith(("out.weight", "down.weight"))
                p.normal_(std=0.02 / (2 * self.config.n_layer) ** 0.5 if ends_branch else 0.02)
        for module in self.modules():
            if isinstance(module, KVShift):
                module.reset_parameters()
                module.requires_grad_(self.config.shift_learned)

    def forward(self, idx, targets=None, cache: Cache | None = None, reduction="mean"):
        """Logits (B, T, V) for the token after each, or with targets the cross entropy in nats.

        idx: (B, T) token ids. targets: (B, T) ids, -1 to ignore. reduction: "mean" or "sum".
        cache: from new_cache; idx then continues the cached tokens, and is added to them.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x)
        losses = F.linear_cross_entropy(
            x.flatten(0, 1), self.head_weight(), targets.flatten(), ignore_index=-1,
            reduction="none", options=self.loss_options)  # (B T,)
        loss = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
        return loss if reduction == "sum" else loss / (targets != -1).sum().clamp(min=1)

    def hidden(self, idx, cache: Cache | None = None):
        """Token ids (B, T) -> the output of the last norm (B, T, C)."""
        c = self.config
        start, limit = (cache.length, cache.max_length) if cache else (0, c.block_size)
        end = start + idx.size(1)
        if end > limit:
            raise ValueError(f"{end} tokens do not fit: the model or its cache holds {limit}")
        x = self.embed(idx)
        if self.shift:
            x = mix(self.shift, x, cache)
        x = self.dropout(x)
        cos, sin = (t.to(x.dtype) for t in rotary(start, end, c.head_dim, c.rope_base, x.device))
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache:
            cache.length = end
        return self.norm(x)

    def head_weight(self):
        return (self.embed if self.config.tie_embeddings else self.head).weight  # (V, C)

    def logits(self, x):
        return F.linear(x, self.head_weight())

    def flops_per_token(self) -> int:
        """FLOPs to train on one token (PaLM, arXiv 2204.02311, Appendix B): 6 per weight of a
        matrix product and 12 n_layer C T for attention over a full context; the shift (below 0.1%)
        is left out."""
        c = self.config
        n = sum(p.numel() for block in self.blocks for p in block.parameters() if p.ndim == 2)
        return 6 * (n + c.vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size

    def new_cache(self, batch_size: int, max_length: int | None = None) -> Cache:
        """An empty cache for max_length tokens, at most block_size (None: block_size)."""
        block_size = self.config.block_size
        return Cache(self, batch_size, min(max_length or block_size, block_size))

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None,
               generator=None):
        """Yields the next token ids (B,) after idx (B, T), up to max_new_tokens times.

        temperature, top_k, top_p: see `sample`. stop_token: a sequence that has produced it repeats
        it, and generation ends when all have produced it.
        The model reads the last block_size tokens. When the cache is full, a new one begins with
        the last block_size // 2 tokens: from then on, each token follows at least that many.
        """
        block_size = self.config.block_size
        text = new = idx[:, -block_size:]
        cache = self.new_cache(idx.size(0), text.size(1) + max_new_tokens)
        stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache.length + new.size(1) > block_size:
                new = text[:, -max(1, block_size // 2) :]
                cache = self.new_cache(idx.size(0))
            logits = self.logits(self.hidden(new, cache)[:, -1])
            token = sample(logits, temperature, top_k, top_p, generator)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped |= token == stop_token
            yield token
            if stopped.all():
                return
            new = token[:, None]
            text = torch.cat([text, new], dim=1)[:, -block_size:]

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) followed by the tokens of `stream`: (B, T + at most max_new_tokens)."""
        new = [token[:, None] for token in self.stream(idx, max_new_tokens, **options)]
        return torch.cat([idx, *new], dim=1)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draws one token id per row of logits (B, V) -> (B,).

    temperature: 0 takes the most likely token. top_k: only the k most likely (0: all).
    top_p: only the most likely ones that together have this probability.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.max(dim=-1, keepdim=True).values  # safe at any temperature
    probs, ids = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_k:
        probs[:, top_k:] = 0.0
        probs /= probs.sum(dim=-1, keepdim=True)
    probs[probs.cumsum(dim=-1) - probs >= top_p] = 0.0  # the tokens before reach top_p already
    return ids.gather(-1, probs.multinomial(1, generator=generator))[:, 0]
