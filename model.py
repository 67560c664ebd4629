"""A GPT with KV-shifting attention, in one file.

The architecture is Llama's, as in the paper (arXiv 2411.19574): RMSNorm before each block, SwiGLU, rotary positions,
grouped-query attention, no biases. What is new is `KVShift`, a page below: keys and values are mixed with the previous
token's by one learned scalar per head, so that one layer of attention can be an induction head.

Letters in the shape comments: B sequences in a batch, T tokens in a sequence, C = n_embd, H = n_head, K = n_kv_head,
D = C / H dimensions in a head, W = shift_window, V = vocab_size.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 256  # context: the most tokens that the model sees at once
    vocab_size: int = 0  # token ids; 0: as many as the corpus has (train.py)
    n_layer: int = 6  # blocks
    n_head: int = 6  # query heads in a block
    n_kv_head: int = 0  # key/value heads, each shared by n_head / n_kv_head query heads; 0: n_head
    n_embd: int = 384  # width
    ffn_size: int = 0  # hidden width of the SwiGLU; 0: 8/3 n_embd, rounded up to a multiple of 32
    rope_base: float = 100_000.0  # base of the rotary frequencies (100,000 in the paper)
    dropout: float = 0.0  # on the embeddings, the attention weights and what each half-block adds
    tie_embeddings: bool = True  # one matrix for reading and for predicting tokens
    kv_shift: Literal["none", "kv", "k", "v", "qkv"] = "kv"  # projections mixed with earlier tokens; kv is the paper's
    shift_window: int = 2  # how many tokens a mix reaches over, its own included (2 in the paper)
    shift_weights: Literal["free", "gate", "clamp"] = "free"  # free scalars | softmax over the window | held in [0, 1]
    shift_per: Literal["head", "channel"] = "head"  # a scalar for each head | for each channel, a short depthwise convolution

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.ffn_size = self.ffn_size or -(-8 * self.n_embd // (3 * 32)) * 32
        for name in ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size={self.vocab_size} must not be negative")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} must be divisible by 2 * n_head={2 * self.n_head}: "
                             "rotary positions turn pairs of each head's dimensions")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be divisible by n_kv_head={self.n_kv_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not 1 < self.rope_base < float("inf"):
            raise ValueError(f"rope_base={self.rope_base} must be above 1, and finite")
        if not 2 <= self.shift_window <= max(2, self.block_size):
            raise ValueError(f"shift_window={self.shift_window} must be at least 2 and at most block_size={self.block_size}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: tensor cores want a multiple of 64 where there are many. The added rows are never
        predicted."""
        return self.vocab_size if self.vocab_size < 1024 else -(-self.vocab_size // 64) * 64


class KVShift(nn.Module):
    """Mixes each token's keys and values with those of the W - 1 tokens before it, head by head (the paper's Eqs 4-6):

        K^_t = alpha_1 K_t + alpha_2 K_{t-1}        V^_t = beta_1 V_t + beta_2 V_{t-1}        (W = 2)

    What lies before the first token is zero. The weights are scalars, one set for each key/value head: alpha for the
    keys and beta for the values, both (W, K), row i for the token i places back; gamma (W, H) for the queries if
    kv_shift is "qkv". With alpha = (0, 1) and beta = (1, 0) the key at t is that of token t-1 and the value that of
    token t: a query for "A" finds the place whose PREVIOUS token was "A" and reads what followed it.

    shift_weights: "free" uses the scalars as they are; "clamp" holds them in [0, 1] when used; "gate" makes them a
    softmax over the window, the last token's logit being 0 and not stored: (sigmoid(a), 1 - sigmoid(a)) for W = 2.
    shift_per: "channel" has a weight for each of a head's D channels, alpha and beta being (W, K D). Not in the paper.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        self.kind, self.window = config.shift_weights, config.shift_window
        self.channels = D if config.shift_per == "head" else 1  # that share a weight
        rows = self.window - 1 if self.kind == "gate" else self.window
        H, K = H * D // self.channels, K * D // self.channels
        self.gamma = nn.Parameter(torch.empty(rows, H)) if config.kv_shift == "qkv" else None
        self.alpha = nn.Parameter(torch.empty(rows, K)) if "k" in config.kv_shift else None
        self.beta = nn.Parameter(torch.empty(rows, K)) if "v" in config.kv_shift else None

    def weights(self, stored: torch.Tensor) -> torch.Tensor:
        """alpha, beta or gamma as it is used, with W rows."""
        if self.kind == "gate":
            return F.pad(stored, (0, 0, 0, 1)).softmax(dim=0)
        return stored.clamp(0, 1) if self.kind == "clamp" else stored

    def taps(self) -> list[torch.Tensor | None]:
        """The weight of each channel of the queries, the keys and the values, (W, channels); None: these are not mixed."""
        return [None if stored is None else self.weights(stored).repeat_interleave(self.channels, dim=1)
                for stored in (self.gamma, self.alpha, self.beta)]

    def forward(self, q, k, v):
        """q (B, T, H D), k and v (B, T, K D), before rotation -> the same, mixed."""
        return [x if w is None else mix(x, F.pad(x, (0, 0, self.window - 1, 0)), w)
                for x, w in zip((q, k, v), self.taps(), strict=True)]


def mix(x, rows, w):
    """The sum of w_i x_{t-i}, (B, T, channels): rows (B, W - 1 + T, channels) are x and what lies before it, w (W, channels)."""
    w, W, T = w.to(x.dtype), len(w), x.size(1)
    y = w[0] * x
    for i in range(1, W):
        y.addcmul_(w[i], rows[:, W - 1 - i : W - 1 - i + T])  # in place: y is still in the processor's cache
    return y


@dataclass
class Cache:
    """What decoding keeps of the tokens read so far: made by `GPT.new_cache`, passed to `GPT.forward`, moved on by it.

    Keys and values are kept as attention uses them, mixed and rotated. The next token's mix also needs the RAW rows
    before it, of the last W - 1 tokens: a cache of mixed rows alone would make the next token wrong.
    """

    # a tensor for each layer: torch.compile would copy the whole of one that has them all
    k: list[torch.Tensor]  # (B, K, max_length, D), mixed and rotated
    v: list[torch.Tensor]  # (B, K, max_length, D), mixed
    raw: list[torch.Tensor]  # (B, W - 1, (H + 2K) D), q, k and v side by side; zeros before the first token
    taps: list[torch.Tensor]  # (W, (H + 2K) D), the shift's weights for each of their channels, (1, 0, ...) where it has none
    length: int = 0  # tokens read so far

    def clear(self):
        self.length = 0
        for rows in self.raw:
            rows.zero_()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: turns dimensions d and d + D/2 of x (B, T, heads, D) by the angles of cos, sin (T, 1, D)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat([second, first], dim=-1), sin)


def rotary_tables(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (block_size, 1, D) for `rotate`, the sine of the first half of D with its sign."""
    frequencies = config.rope_base ** -(torch.arange(config.head_dim // 2) * 2.0 / config.head_dim)
    angles = torch.arange(config.block_size)[:, None, None] * frequencies
    return torch.cat([angles.cos(), angles.cos()], dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.widths = [heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]  # of q, k and v
        self.qkv = nn.Linear(config.n_embd, sum(self.widths), bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.shift = KVShift(config) if config.kv_shift != "none" else None

    def forward(self, x, cos, sin, cache: Cache | None = None, at: torch.Tensor | None = None):
        B, T, C = x.shape
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        q, k, v = self.project(x, cache)
        q = rotate(q.view(B, T, H, D), cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = rotate(k.view(B, T, K, D), cos, sin).transpose(1, 2)
        v = v.view(B, T, K, D).transpose(1, 2)
        # The first of T new tokens sees the past and itself, the last one everything. `is_causal` says so where there is
        # no past; a single token needs no mask.
        mask, is_causal = None, T > 1
        if at is not None:  # `GPT.step`: one token, the place of which is known to the device alone
            k, v = cache.k[self.layer].index_copy_(2, at, k), cache.v[self.layer].index_copy_(2, at, v)
            mask = torch.arange(k.size(2), device=x.device)[None] <= at  # (1, max_length)
        elif cache is not None:
            past, end = cache.length, cache.length + T
            cache.k[self.layer][:, :, past:end] = k
            cache.v[self.layer][:, :, past:end] = v
            k, v = cache.k[self.layer][:, :, :end], cache.v[self.layer][:, :, :end]
            if past and T > 1:
                mask, is_causal = torch.ones(T, end, dtype=torch.bool, device=x.device).tril(past), False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=K < H,
                                           dropout_p=self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def project(self, x, cache: Cache | None = None):
        """x (B, T, C) -> q (B, T, H D), k and v (B, T, K D), mixed with earlier tokens and not yet rotated."""
        qkv = self.qkv(x)  # (B, T, (H + 2K) D)
        if cache is not None and self.shift is not None:
            rows = torch.cat([cache.raw[self.layer], qkv], dim=1)  # (B, W - 1 + T, (H + 2K) D)
            cache.raw[self.layer].copy_(rows[:, x.size(1) :])
            return mix(qkv, rows, cache.taps[self.layer]).split(self.widths, dim=-1)
        q, k, v = qkv.split(self.widths, dim=-1)
        return (q, k, v) if self.shift is None else self.shift(q, k, v)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.up = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm_attn = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attn = Attention(config, layer)
        self.norm_mlp = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, cos, sin, cache: Cache | None = None, at: torch.Tensor | None = None):
        x = x + self.dropout(self.attn(self.norm_attn(x), cos, sin, cache, at))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size must be at least 1")
        self.config = config
        self.recompute = False  # keep no activations inside a block, compute them again in the backward pass
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
            self.register_buffer(name, table, persistent=False)
        if not self.head.weight.is_meta:  # on the meta device there is nothing to fill yet
            self.init_weights()

    def materialize(self, device):
        """Gives a model that was made on the meta device its memory on `device`, and its initial weights."""
        self.to_empty(device=device)
        self.leave_meta()
        self.init_weights()

    def leave_meta(self):
        """For a model that was made on the meta device, when its parameters have got memory: makes one of the two matrices
        that are tied, and the rotary tables."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.cos, self.sin = (table.to(self.embed.weight.device) for table in rotary_tables(self.config))

    @torch.no_grad()
    def init_weights(self):
        """Fills all parameters, from torch's default generator. Works shard by shard under FSDP, too.

        | parameter                     | distribution                                       |
        |-------------------------------|----------------------------------------------------|
        | embed, head, qkv, gate, up    | N(0, 0.02^2)                                       |
        | out, down (end a half-block)  | N(0, 0.02^2 / (2 n_layer)), as in GPT-2            |
        | norms                         | 1                                                  |
        | alpha, beta, gamma            | U(0, 1), the last of a window 1 - sum of the others |

        The mixing scalars come last, so that a vanilla and a shifted model of one seed share every other weight. For
        "gate" the scalars are spread evenly over all that sum to 1, which is the same U(0, 1) for a window of 2.
        """
        c = self.config
        for name, p in sorted(self.named_parameters(), key=lambda item: ".shift." in item[0]):  # a stable sort
            w = torch.empty(p.shape)  # whole and on the CPU, where a seed gives the same numbers on every machine
            if ".shift." in name and c.shift_weights == "gate":
                e = torch.empty(c.shift_window, p.size(1)).exponential_()
                w.copy_((e[:-1] / e[-1]).log())
            elif ".shift." in name:
                w.uniform_()
                w[-1] = 1.0 - w[:-1].sum(0)
            elif p.ndim == 1:
                w.fill_(1.0)
            else:
                ends_half_block = name.endswith(("out.weight", "down.weight"))
                w.normal_(std=0.02 / (2 * c.n_layer) ** 0.5 if ends_half_block else 0.02)
            if isinstance(p, DTensor):  # FSDP: this process keeps its shard
                w = distribute_tensor(w.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(w)

    def forward(self, idx, targets=None, cache: Cache | None = None, reduction: str = "mean"):
        """Logits for the token after each, or with `targets` their cross entropy.

        idx: (B, T) token ids, T <= block_size together with what `cache` has read already.
        targets: (B, T) ids, -1 where nothing is to be predicted. reduction: "mean" or "sum" over the others.
        cache: from `new_cache`; idx then goes on where it stands, and it is moved on by T. A text gives the same logits
            in one go, in chunks and token by token. All B sequences are of one length: there is no padding.
        Returns the logits (B, T, V), or the loss in nats, a scalar.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()
        if not (self.recompute and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return self.loss(x, targets, reduction)  # compiled, it keeps no more than the logits
        # the logits of 1024 tokens at a time, computed again in the backward pass: all of them, and their softmax and
        # gradient, would take 12 bytes each
        total = sum(checkpoint(self.loss, x_part, targets_part, "sum", use_reentrant=False)
                    for x_part, targets_part in zip(x.split(1024), targets.split(1024), strict=True))
        return total / (targets != -1).sum() if reduction == "mean" else total

    def logits(self, x):
        """What `hidden` gives, (..., C) -> (..., V)."""
        return self.head(x)[..., : self.config.vocab_size]

    def loss(self, x, targets, reduction):
        return F.cross_entropy(self.logits(x), targets, ignore_index=-1, reduction=reduction)

    def hidden(self, idx, cache: Cache | None = None):
        """(B, T) token ids -> (B, T, C), what the head reads."""
        past = cache.length if cache is not None else 0
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size={self.config.block_size}")
        x = self.dropout(self.embed(idx))
        cos, sin = self.cos[past:end].to(x.dtype), self.sin[past:end].to(x.dtype)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    @torch.no_grad()
    def new_cache(self, batch_size: int, max_length: int | None = None) -> Cache:
        """An empty cache for `batch_size` sequences of up to `max_length` (block_size) tokens."""
        c, w = self.config, self.head.weight
        kv = (batch_size, c.n_kv_head, max_length or c.block_size, c.head_dim)
        cache = Cache([], [], [], [])
        for block in self.blocks:
            widths, shift = block.attn.widths, block.attn.shift
            taps = w.new_zeros(c.shift_window, sum(widths))
            taps[0] = 1.0
            for part, used in zip(taps.split(widths, dim=-1), shift.taps() if shift else [None] * 3, strict=True):
                if used is not None:
                    part.copy_(used)
            cache.k.append(w.new_zeros(kv))
            cache.v.append(w.new_zeros(kv))
            cache.raw.append(w.new_zeros(batch_size, c.shift_window - 1, sum(widths)))
            cache.taps.append(taps)
        return cache

    def step(self, token, cache: Cache, at: torch.Tensor):
        """Logits (B, V) for what follows token (B, 1), read into the cache at place `at`, a tensor (1,). Unlike `forward` with
        a cache it does the same for every token, over the whole cache, so that it can be one CUDA graph."""
        x, cos, sin = self.embed(token), self.cos[at], self.sin[at]
        for block in self.blocks:
            x = block(x, cos.to(x.dtype), sin.to(x.dtype), cache, at)
        return self.logits(self.norm(x)[:, 0])

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
               stop_token: int | None = None, generator: torch.Generator | None = None, compile: bool = False):
        """Yields (B,) token ids, one step after another, that go on from idx (B, T), T >= 1.

        temperature: 0 always takes the most likely token. top_k: only the k likeliest (0: all). top_p: only the
        likeliest that together have this probability. stop_token: a sequence that has made it repeats it, and
        generation ends soon after all have. compile: torch.compile for the steps of one token, which on CUDA become one
        graph; it takes a minute and pays for long texts.

        Beyond block_size the window moves: of a long prompt the last block_size tokens are read; when the cache is
        full, the newest half of it is read again as a text of its own, and generation goes on from there. So every
        token sees between block_size / 2 and block_size tokens, and reading again costs less than one token's work a
        token.
        """
        B, block_size = idx.size(0), self.config.block_size
        recent = deque(idx[:, -block_size:].unbind(1), maxlen=block_size)  # the last tokens, (B,) each
        new = torch.stack(list(recent), dim=1)  # what the model reads next
        cache = self.new_cache(B, min(block_size, len(recent) + max_new_tokens))
        if compile:
            step = torch.compile(self.step, mode="reduce-overhead" if idx.device.type == "cuda" else None)
            for memory in (*cache.k, *cache.v, *cache.raw, *cache.taps):  # a CUDA graph may write to what stays where it is
                torch._dynamo.mark_static_address(memory)
        stopped = torch.zeros(B, dtype=torch.bool, device=idx.device)
        for i in range(max_new_tokens):
            if cache.length + new.size(1) > block_size:
                new = torch.stack(list(recent)[-max(1, block_size // 2) :], dim=1)
                cache.clear()
            if compile and new.size(1) == 1:
                logits = step(new, cache, torch.full((1,), cache.length, device=idx.device))
                cache.length += 1
            else:
                logits = self.logits(self.hidden(new, cache)[:, -1])
            token = sample(logits, temperature, top_k, top_p, generator)  # (B,)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped |= token == stop_token
            yield token
            # to ask a GPU is to wait for it, so not for every token
            if stop_token is not None and (i % 16 == 15 or idx.device.type == "cpu") and stopped.all():
                return
            recent.append(token)
            new = token[:, None]

    def generate(self, idx, max_new_tokens: int, **options) -> torch.Tensor:
        """idx (B, T) and what `stream` adds to it, (B, T + up to max_new_tokens)."""
        return torch.cat([idx] + [token[:, None] for token in self.stream(idx, max_new_tokens, **options)], dim=1)


def sample(logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator=None):
    """Draws one id from each row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature  # at most 0: no temperature is too low
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # what comes before it is enough; the likeliest always stays
        probs = ordered.masked_fill(beyond, 0.0).gather(-1, order.argsort(dim=-1))
    # A draw in proportion to probs: the smallest of exponential waiting times. Unlike torch.multinomial it does not
    # make the host wait for the GPU.
    waiting = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / waiting).argmax(dim=-1)
