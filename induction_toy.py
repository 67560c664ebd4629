"""The paper's toy experiments: why one layer with KV shift does what a vanilla transformer needs two for.

    python induction_toy.py                          depth: vanilla models of 1, 2 and 4 layers against 1 layer with KV shift
    python induction_toy.py --experiment=landscape   or width, ngram, heads, hop; all makes a page of them: out/toy/report.md
    python induction_toy.py config/toy_quick.py      depth in seconds

Each experiment prints a table and leaves its figures and its picture in out/toy: <experiment>.jsonl and .png. The same
command again goes on where it was stopped, and where it is complete draws from the saved figures.
"""

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from config import UserError, end_with_parent, parse, run
from data import atomic_write, lock
from estimate import estimate_flops
from model import GPT, GPTConfig, rotate
from plot import save_figure, style, table
from train import choose_device


@dataclass
class ToyConfig:
    experiment: Literal["depth", "width", "ngram", "landscape", "heads", "hop", "all"] = "depth"  # which one; all: each in turn
    out_dir: str = "out/toy"  # tables, figures and pictures go here
    seeds: int = 3  # every model is trained with the seeds 1, 2, ... up to this
    resume: Literal["auto", "no"] = "auto"  # go on from what is in out_dir | start over
    plot_only: bool = False  # draw the saved figures again, train nothing
    workers: int = 0  # models trained at the same time, one to a CPU core; 0: as many as there are cores, on a GPU 1
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 where CUDA has it
    # training and model, where nothing below says otherwise
    width: int = 64  # n_embd
    n_head: int = 4  # heads
    max_steps: int = 400  # optimizer steps; depth and width stop before where a model stays at 100%
    batch_size: int = 32  # sequences a step
    micro_batch_size: int = 0  # sequences a forward pass; the gradients of several are added up; 0: all at once
    learning_rate: float = 2e-3  # constant after warm-up
    warmup_steps: int = 20  # the learning rate rises from zero
    eval_every: int = 20  # steps between evaluations
    eval_sequences: int = 256  # fresh sequences to evaluate on, the same for all models
    # depth, width and heads: the induction data
    vocab_size: int = 32  # tokens to draw from
    length: int = 32  # tokens in a sequence
    min_prefix: int = 8  # fewest distinct tokens before the first repeat
    max_prefix: int = 16  # most of them
    # width
    width_sizes: str = "8 16 32 64"  # widths to compare
    width_heads: int = 1  # heads, at every width
    width_steps: int = 1500  # optimizer steps
    width_learning_rate: float = 1e-2  # at width 8, and in proportion to 1 / width beyond: narrow models take larger steps
    # ngram
    ngram_sizes: str = "1x8 2x64 4x128"  # models to compare, layers x width
    ngram_pairs: int = 200  # pairs of tokens, each with a third token to memorise
    ngram_vocab_size: int = 20  # tokens to draw from; the fewer, the more pairs have a token in common
    ngram_steps: int = 600  # optimizer steps, each on the whole table
    # landscape
    landscape_sizes: str = "8 32 128"  # T, the distinct tokens in the sequence of Theorem 3
    # hop
    hop_depths: str = "2 3 4"  # layers of the models to compare
    hop_max: int = 4  # most hops
    hop_letters: int = 4  # letters in the alphabet
    hop_length: int = 50  # letters in a sequence
    hop_steps: int = 1000  # optimizer steps

    def __post_init__(self):
        for f in fields(self):
            least = 0 if f.name in ("workers", "warmup_steps", "micro_batch_size") else 1 if f.type is int else 1e-9
            if f.type in (int, float) and not least <= getattr(self, f.name) < 2**31:
                raise ValueError(f"{f.name}={getattr(self, f.name)} must be at least {least}")
        if not 3 <= self.min_prefix <= self.max_prefix <= min(self.vocab_size, self.length - 1):
            raise ValueError(f"min_prefix={self.min_prefix} must be at least 3, max_prefix={self.max_prefix} not below it, "
                             f"vocab_size={self.vocab_size} not below that, and length={self.length} above it")
        if self.ngram_pairs > self.ngram_vocab_size**2:
            raise ValueError(f"ngram_pairs={self.ngram_pairs} must be at most ngram_vocab_size^2 = {self.ngram_vocab_size**2}")
        if min(whole_numbers(self.landscape_sizes)) < 5:
            raise ValueError(f"landscape_sizes={self.landscape_sizes}: T must be at least 5")
        for experiment in ("depth", "width", "ngram", "hop"):
            models(self, experiment)  # a size that makes no model is an error now


def whole_numbers(text: str, separator: str | None = None, count: int = 0) -> list[int]:
    """"8 16 32" -> [8, 16, 32]"""
    parts = text.split(separator)
    if not parts or len(parts) != (count or len(parts)) or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{text!r} must be whole numbers above 0, such as '8 16 32' (ngram_sizes: such as '1x8 2x64')")
    return [int(part) for part in parts]


# --- data. Each generator is a function of (seed, step) and returns, all of them (B, T):
#       idx      what the model reads
#       targets  what it is trained to predict after each token, -1: nothing
#       asked    where a prediction counts in the evaluation

EVAL_SEED = 2**31  # seeds the sequences to evaluate on; no run trains with it


def induction_batch(config: ToyConfig, seed: int, step: int, size: int):
    """Random tokens such that whenever a token repeats, what follows it repeats too (the paper's Figure 1).

    n distinct tokens are drawn, then the sequence jumps back to a random one of them and goes on from there; where it
    comes to the end of the n it jumps to the same place again. With n = 5 and a jump to 2:

        position   0 1 2 3 4 5 6 7 8 9
        token      a b c d e c d e c d
        asked                x x x x x     from n on: this token has been here before, so what follows it is known

    As in language modelling, and so in the paper, the model is trained to predict every next token, those included that
    nobody can know; the evaluation asks only for those that can be known.
    """
    random = np.random.default_rng([seed, step])
    n = random.integers(config.min_prefix, config.max_prefix + 1, (size, 1))
    jump = random.integers(0, n - 1)  # 0 ... n - 2
    prefix = np.stack([random.choice(config.vocab_size, config.max_prefix, replace=False) for _ in range(size)])
    t = np.arange(config.length + 1)[None]
    source = np.where(t < n, t, jump + (t - n) % (n - jump))  # (B, T + 1): which of the n stands at t
    tokens = torch.from_numpy(np.take_along_axis(prefix, source, axis=1))
    return tokens[:, :-1], tokens[:, 1:], torch.from_numpy(t[:, :-1] >= n)


def induction_chance(config: ToyConfig) -> float:
    """How often a guess among the tokens seen is right at the first predictable position.

    There, n distinct tokens have been seen, and one of them has just come again. What follows it is one of the n - 1
    others; only their ORDER says which. A layer of attention without shift reads a weighted bag of tokens: it knows which
    tokens there were, but not which came after which. The tokens having been drawn at random, to whoever knows no more
    than that the n - 1 others are equally likely, and a guess is right with probability 1 / (n - 1): here its mean over n.
    """
    return float(np.mean([1 / (n - 1) for n in range(config.min_prefix, config.max_prefix + 1)]))


def ngram_batch(config: ToyConfig, seed: int, step: int, size: int):
    """Pairs (x1, x2) with a random x3 for each (Figure 3): the whole table at every step, whatever seed, step and size."""
    random = np.random.default_rng(0)
    pairs = random.choice(config.ngram_vocab_size**2, config.ngram_pairs, replace=False)
    idx = torch.from_numpy(np.stack(np.divmod(pairs, config.ngram_vocab_size), axis=1))  # (pairs, 2)
    targets = torch.full_like(idx, -1)
    targets[:, 1] = torch.from_numpy(random.integers(0, config.ngram_vocab_size, config.ngram_pairs))
    return idx, targets, targets >= 0


def hop_batch(config: ToyConfig, seed: int, step: int, size: int):
    """Multi-hop induction (Figure 9). X are random letters; find(i) = the largest j <= i with X[j-1] = X[i]; the answer at
    i is X[find(find(... i))], find being applied k times, or a blank where some find finds nothing.

    The first token says k. Ids: the letters, the blank (only an answer), then one for each k = 1 ... hop_max. The model
    is trained on all answers; those that are a letter are asked for, since blanks are easily told.
    """
    random = np.random.default_rng([seed, step])
    letters, blank = config.hop_letters, config.hop_letters
    k = torch.from_numpy(random.integers(1, config.hop_max + 1, (size, 1)))
    x = torch.from_numpy(random.integers(0, letters, (size, config.hop_length)))
    positions = torch.arange(config.hop_length)
    # for each letter the latest j <= i with X[j-1] that letter; 0, which is no such j, says that there is none
    latest = F.pad(F.one_hot(x[:, :-1], letters) * positions[1:, None], (0, 0, 1, 0)).cummax(dim=1).values  # (B, length, letters)
    find = latest.gather(2, x[..., None])[..., 0]  # (B, length), with find[0] = 0: from "none" it goes nowhere
    at = positions.expand(size, -1)
    for hop in range(config.hop_max):
        at = torch.where(hop < k, find.gather(1, at), at)
    targets = F.pad(torch.where(at > 0, x.gather(1, at), blank), (1, 0), value=-1)
    return torch.cat([blank + k, x], dim=1), targets, (targets >= 0) & (targets != blank)


# --- training


def models(config: ToyConfig, experiment: str) -> dict[str, GPTConfig]:
    """The models that an experiment compares, by the names they have in tables and pictures."""
    c, made = config, {}

    def add(kv_shift, n_layer, width, n_head, vocab_size, length, note=""):
        name = f"{n_layer} layer{'s' * (n_layer > 1)}, {note}{'KV shift' if kv_shift == 'kv' else 'vanilla'}"
        made[name] = GPTConfig(block_size=length, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=width,
                               tie_embeddings=False, kv_shift=kv_shift)

    if experiment == "heads":
        add("kv", 1, c.width, c.n_head, c.vocab_size, c.length)
    elif experiment == "depth":
        for kv_shift, n_layer in (("kv", 1), ("none", 1), ("none", 2), ("none", 4)):
            add(kv_shift, n_layer, c.width, c.n_head, c.vocab_size, c.length)
    elif experiment == "width":
        for width in whole_numbers(c.width_sizes):
            for kv_shift, n_layer in (("kv", 1), ("none", 2)):
                add(kv_shift, n_layer, width, c.width_heads, c.vocab_size, c.length, f"width {width}, ")
    elif experiment == "ngram":
        for n_layer, width in (whole_numbers(size, "x", 2) for size in c.ngram_sizes.split()):
            for kv_shift in ("kv", "none"):
                add(kv_shift, n_layer, width, c.n_head if width >= 64 else 1, c.ngram_vocab_size, 2, f"width {width}, ")
    elif experiment == "hop":
        for n_layer in whole_numbers(c.hop_depths):
            for kv_shift in ("none", "kv"):
                add(kv_shift, n_layer, c.width, c.n_head, c.hop_letters + 1 + c.hop_max, c.hop_length + 1)
    return made


def train(config: ToyConfig, experiment: str, name_and_seed: tuple[str, int]) -> list[dict]:
    """Trains one model: the figures of each evaluation. Once a minute it says and saves where it stands, to go on there."""
    name, seed = name_and_seed
    make_batch = partial({"ngram": ngram_batch, "hop": hop_batch}.get(experiment, induction_batch), config)
    last_step = getattr(config, f"{experiment}_steps", config.max_steps)
    device, dtype = choose_device(config.device, config.dtype)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    torch.manual_seed(seed)
    model = GPT(models(config, experiment)[name]).to(device)
    learning_rate = config.width_learning_rate * 8 / model.config.n_embd if experiment == "width" else config.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    figures, step, seconds = [], 0, 0.0  # seconds of training alone, without the evaluations
    checkpoint = checkpoint_path(config, experiment, name, seed)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else {"config": None}
    if goes_on := saved["config"] == what_matters(config, experiment):
        figures, step, seconds = saved["figures"], saved["step"], saved["seconds"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    started = last_saved = time.perf_counter()
    while True:
        if (step % config.eval_every == 0 or step == last_step) and not (goes_on and step == saved["step"]):
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - started
            with autocast:
                scores = evaluate(config, experiment, model, make_batch(EVAL_SEED, 0, config.eval_sequences), device)
            figures.append({"model": name, "seed": seed, "step": step, "seconds": round(seconds, 2)} | scores)
            solved = len(figures) >= 3 and min(f["accuracy"] for f in figures[-3:]) > 0.998
            if step == last_step or (solved and experiment in ("depth", "width")):
                break
            if time.perf_counter() - last_saved > 60:
                last_saved = time.perf_counter()
                print(f"{name}, seed {seed}: step {step} of {last_step}, accuracy {scores['accuracy']:.1%}", flush=True)
                with atomic_write(checkpoint) as f:
                    torch.save({"config": what_matters(config, experiment), "figures": figures, "step": step, "seconds": seconds,
                                "model": model.state_dict(), "optimizer": optimizer.state_dict()}, f)
            started = time.perf_counter()
        # one optimizer step
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))
        idx, targets, _ = make_batch(seed, step, config.batch_size)
        micro_batch_size = config.micro_batch_size or len(idx)
        for x, y in zip(idx.split(micro_batch_size), targets.split(micro_batch_size), strict=True):
            with autocast:
                loss = model(x.to(device), y.to(device), reduction="sum") / (targets >= 0).sum()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    figures[-1] |= {"done": True, "parameters": sum(p.numel() for p in model.parameters()), "device": str(device)}
    if experiment == "heads":
        figures[-1] |= inspect_heads(config, model)
    return figures


@torch.no_grad()
def evaluate(config: ToyConfig, experiment: str, model: GPT, exam, device) -> dict:
    """The figures of an exam (idx, targets, asked); of a one-layer KV-shift model the mixing scalars, too."""
    idx, targets, asked = exam
    right, loss = [], 0.0
    for x, y, a in zip(*(part.split(config.micro_batch_size or len(idx)) for part in exam), strict=True):
        logits = model(x.to(device)).float().cpu()  # (B, T, V)
        right.append(logits.argmax(dim=-1) == y)
        loss += F.cross_entropy(logits[a], y[a], reduction="sum").item()
    right = torch.cat(right)

    def share(where):
        return right[where].float().mean().item()

    figures = {"accuracy": share(asked), "loss": loss / asked.sum().item()}
    if experiment in ("depth", "width", "heads"):  # as in the paper
        figures |= {"accuracy": share(asked & (asked.cumsum(dim=1) == 1)), "accuracy_all": figures["accuracy"]}
    elif experiment == "hop":
        figures["error"] = [1 - share(asked & (idx[:, :1] == config.hop_letters + k)) for k in range(1, config.hop_max + 1)]
    shift = model.blocks[0].attn.shift
    if len(model.blocks) == 1 and shift is not None:
        figures |= {"alpha": shift.alpha.tolist(), "beta": shift.beta.tolist()}
    return figures


def what_matters(config: ToyConfig, experiment: str) -> dict:
    """The fields that make an experiment another if they differ. Those named after another experiment do not."""
    free = ("experiment", "out_dir", "seeds", "resume", "plot_only", "workers", "device", "dtype", "micro_batch_size")
    others = tuple(f"{other}_" for other in EXPERIMENTS if other != experiment)
    return {name: value for name, value in asdict(config).items() if name not in free and not name.startswith(others)}


def checkpoint_path(config: ToyConfig, experiment: str, name: str, seed: int) -> Path:
    return Path(config.out_dir) / f"{experiment}-{name.replace(',', '').replace(' ', '-')}-{seed}.pt"


def measure(config: ToyConfig, experiment: str):
    """Trains what is not in <experiment>.jsonl yet, `workers` models at a time, and adds each to it when it is done."""
    path = Path(config.out_dir) / f"{experiment}.jsonl"
    if experiment == "landscape":
        return save(path, config, landscape_descents(config))
    seeds = 1 if experiment == "heads" else config.seeds
    wanted = [(name, seed) for seed in range(1, seeds + 1) for name in models(config, experiment)]
    done = {}  # (name, seed) -> figures
    if path.exists() and config.resume == "auto":
        old, records = load(path)
        if what_matters(old, experiment) == what_matters(config, experiment):
            done = {key: rows for key in wanted if (rows := [r for r in records if (r["model"], r["seed"]) == key])}
    if path.exists() and not done:
        aside = next(p for n in range(1, sys.maxsize) if not (p := path.with_suffix(f".old-{n}")).exists())
        os.replace(path, aside)
        print(f"the figures of an earlier run are now {aside}")
    todo = [key for key in wanted if key not in done]
    if config.resume == "no":
        for key in todo:
            checkpoint_path(config, experiment, *key).unlink(missing_ok=True)

    # what a step costs: its operations, and beside them each layer's overhead, the larger part in models this small
    cost = {name: estimate_flops(model) * config.batch_size * model.block_size + 3e8 * model.n_layer
            for name, model in models(config, experiment).items()}
    left = total = sum(cost[name] for name, _ in todo)
    on_cpu = choose_device(config.device, config.dtype)[0].type == "cpu"
    workers = max(1, min(len(todo), config.workers or (torch.get_num_threads() if on_cpu else 1)))
    start = f"{experiment}: {len(todo)} models to train, {workers} at a time"
    print(start if todo else f"{path} is complete (--resume=no starts over)", flush=True)
    started = time.perf_counter()
    with closing(each_trained(partial(train, config, experiment), todo, workers)) as trained:
        for figures in trained:
            end = figures[-1]
            key = end["model"], end["seed"]
            done[key] = figures
            save(path, config, [row for key in wanted for row in done.get(key, [])])
            checkpoint_path(config, experiment, *key).unlink(missing_ok=True)
            left -= cost[end["model"]]
            minutes, seconds = divmod(round((time.perf_counter() - started) * left / (total - left)), 60)
            print(f"[{len(done)}/{len(wanted)}] {end['model']}, seed {end['seed']}: accuracy {end['accuracy']:.1%} after "
                  f"{end['step']} steps, {end['seconds']:.1f} s | about {minutes}:{seconds:02} left", flush=True)


def each_trained(train_one, todo: list, workers: int):
    """Yields train_one(key) of each key, as they come. A small model gains next to nothing from a second core, so each core
    trains one of its own."""
    if workers == 1:
        yield from map(train_one, todo)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            for future in as_completed([pool.submit(train_one, key) for key in todo]):
                yield future.result()
        except BrokenProcessPool:
            raise UserError("a process that trains has died (killed, or no memory left?): the same command goes on, with fewer "
                            "--workers in less memory") from None
        finally:
            for process in multiprocessing.active_children():
                process.terminate()  # else the pool would wait for what they have begun


def start_worker():
    torch.set_num_threads(1)
    end_with_parent()


def save(path: Path, config: ToyConfig, records: list[dict]):
    header = {"config": asdict(config), "torch": torch.__version__, "numpy": np.__version__}
    with atomic_write(path) as f:
        f.write("".join(json.dumps(line) + "\n" for line in [header, *records]).encode())


def load(path: Path) -> tuple[ToyConfig, list[dict]]:
    """The config and the figures of an experiment."""
    try:
        header, *records = map(json.loads, path.read_text().splitlines())
        return ToyConfig(**header["config"]), records
    except FileNotFoundError:
        raise UserError(f"no figures {path}: run the experiment first, without --plot_only") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version ({type(error).__name__}: {error})") from None


# --- heads: the induction head, seen in a trained model


@torch.no_grad()
def attention_weights(model: GPT, idx) -> torch.Tensor:
    """What each head of the first layer attends to, computed as model.py does: idx (B, T) -> (B, H, T, T), rows sum to 1."""
    block = model.blocks[0]
    attn, (B, T) = block.attn, idx.shape
    H, K, D = attn.n_head, attn.n_kv_head, attn.head_dim
    q, k, _ = attn.project(block.norm_attn(model.embed(idx)))
    q, k = (rotate(x.view(B, T, -1, D), model.cos[:T], model.sin[:T]).transpose(1, 2) for x in (q, k))  # (B, heads, T, D)
    scores = q @ k.repeat_interleave(H // K, dim=1).transpose(2, 3) / D**0.5  # (B, H, T, T)
    return scores.masked_fill(~torch.ones(T, T, dtype=torch.bool, device=idx.device).tril(), -torch.inf).softmax(dim=-1)


@torch.no_grad()
def inspect_heads(config: ToyConfig, model: GPT) -> dict:
    """The attention on one repeated sequence, and each head's induction score: the share of its attention that goes to
    tokens that followed an earlier copy of the current one, at the positions where there is such a token."""
    device = model.embed.weight.device
    idx, _, asked = (part.to(device) for part in induction_batch(config, EVAL_SEED, 1, 64))
    followed = F.pad(idx[:, None, :-1] == idx[:, :, None], (1, 0)).tril()  # (B, T, T): x[s-1] = x[t], s <= t
    score = (attention_weights(model, idx) * followed[:, None]).sum(-1).transpose(1, 2)[asked].mean(0)  # (H,)
    once = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(1))[: config.max_prefix]
    repeated = once.repeat(-(-config.length // config.max_prefix))[None, : config.length].to(device)
    weights = attention_weights(model, repeated)[0]  # (H, T, T)
    return {"induction_score": score.tolist(), "attention": np.round(weights.cpu().tolist(), 4).tolist()}


# --- landscape: Theorem 3


def closed_form_loss(alpha1, alpha2, beta1, beta2, T: int):
    """The loss of Theorem 3 (the paper's Appendix), numbers or arrays alike.

    One head with identity projections and no positions reads T distinct one-hot tokens and then token x_i (1 < i < T - 1)
    again; the logits, over the T tokens, are what it writes at the last place; the right answer is x_{i+1}. The last query
    x_i meets e^alpha1 at the two places where x_i stands, e^alpha2 at the place after the first, and 1 at the T - 2 others.
    In print, the logit of x_{i-1} and x_T has e^alpha2 instead: their value reaches the output as the shifted part of the
    values at x_i's two places, where attention is e^alpha1.
    """
    a1, a2 = np.exp(alpha1), np.exp(alpha2)
    S = 2 * a1 + a2 + (T - 2)
    current = (2 * beta1 * a1 + beta2 * a2) / S  # logit of x_i
    answer = (beta1 * a2 + beta2) / S  # of x_{i+1}
    before = (beta1 + beta2 * a1) / S  # of x_{i-1}, and of x_T
    other = (beta1 + beta2) / S  # of the T - 4 others
    return np.log(np.exp(current) + np.exp(answer) + 2 * np.exp(before) + (T - 4) * np.exp(other)) - answer


def attention_loss(alpha, beta, T: int, i: int) -> torch.Tensor:
    """The same loss from KV-shifting attention itself, on one-hot embeddings: alpha (2,), beta (2,) -> a scalar.
    Tokens count from 0 here, so 1 <= i <= T - 3."""
    x = torch.eye(T, dtype=alpha.dtype)[[*range(T), i]]  # (T + 1, T)
    before = F.pad(x, (0, 0, 1, 0))[:-1]
    k, v = alpha[0] * x + alpha[1] * before, beta[0] * x + beta[1] * before
    logits = (k @ x[-1]).softmax(dim=0) @ v
    return F.cross_entropy(logits, torch.tensor(i + 1))


def landscape_descents(config: ToyConfig) -> list[dict]:
    """Gradient descent through the attention itself (not the closed form) from several starts, with alpha2 = 1 - alpha1 and
    beta2 = 1 - beta1 as in the picture; a step that leaves the square goes to the nearest point of it."""
    records = []
    for T in whole_numbers(config.landscape_sizes):
        for start in ((0.5, 0.5), (0.9, 0.1), (0.9, 0.9), (0.5, 0.1), (0.15, 0.15)):
            p = torch.tensor(start, dtype=torch.float64, requires_grad=True)  # alpha1, beta1
            path = []
            while len(path) < 2 or path[-1] != path[-2]:  # until it stays where it is
                loss = attention_loss(torch.stack([p[0], 1 - p[0]]), torch.stack([p[1], 1 - p[1]]), T, i=1)
                path.append([round(x, 6) for x in (*p.tolist(), loss.item())])
                (grad,) = torch.autograd.grad(loss, p)
                with torch.no_grad():
                    p.sub_(0.02 * T * grad).clamp_(0, 1)  # the gradient shrinks as 1 / T
            records.append({"T": T, "path": path})
    return records


# --- tables and pictures: a `draw_` for each experiment fills a figure and returns the table

DOTS = dict(color="black", linewidth=1, linestyle=(0, (1, 1)))


def by_seed(records: list[dict], label: str) -> list[list[dict]]:
    """One model's figures: a list for each seed, evaluation by evaluation."""
    rows = [r for r in records if r["model"] == label]
    return [[r for r in rows if r["seed"] == seed] for seed in dict.fromkeys(r["seed"] for r in rows)]


def learning_table(records: list[dict], columns: dict[str, str]) -> str:
    """A row for each model: figures at the end, and when it was first at 99%, for one seed after the other."""
    rows = []
    for label in dict.fromkeys(r["model"] for r in records):
        seeds = by_seed(records, label)
        hits = [next((r for r in figures if r["accuracy"] >= 0.99), None) for figures in seeds]
        rows.append([label, f"{seeds[0][-1]['parameters']:,}"])
        rows[-1] += [" ".join(f"{figures[-1][key]:.3f}" for figures in seeds) for key in columns]
        for key, digits in (("step", 0), ("seconds", 1)):
            rows[-1].append(" ".join(f"{hit[key]:.{digits}f}" if hit else f">{figures[-1][key]:.0f}"
                                     for hit, figures in zip(hits, seeds, strict=True)))
    return table(["model", "parameters", *columns.values(), "steps to 99%", "seconds to 99%"], rows)


def band(ax, x, ys, i: int, label: str, **more):
    """The median of ys (seeds, points) over x, in a band from the lowest to the highest."""
    color, line, marker = style(i)
    ax.plot(x, np.median(ys, axis=0), line, color=color, marker=marker, markersize=5, label=label, **more)
    ax.fill_between(x, np.min(ys, axis=0), np.max(ys, axis=0), color=color, alpha=0.2, linewidth=0)
    ax.grid(alpha=0.3)


def draw_learning(ax, records: list[dict], labels: list[str], key: str):
    last = max(r["step"] for r in records)
    steps = np.linspace(0, last, 401)
    for i, label in enumerate(labels):  # a run that ended early stays where it was
        ys = [np.interp(steps, [r["step"] for r in figures], [r[key] for r in figures]) for figures in by_seed(records, label)]
        band(ax, steps, ys, i, label, markevery=(20 + 8 * i, 60))
    ax.set(xlabel="training steps", xlim=(0, last), ylim=(-0.02, 1.04))


def draw_depth(config: ToyConfig, records: list[dict], figure) -> str:
    labels, chance = list(dict.fromkeys(r["model"] for r in records)), induction_chance(config)
    first, every = figure.subplots(1, 2, sharey=True)
    draw_learning(first, records, labels, "accuracy")
    draw_learning(every, records, labels, "accuracy_all")
    first.axhline(chance, **DOTS, label=f"a guess among the tokens seen ({chance:.3f})")
    first.set(title="first predictable position", ylabel="accuracy")
    every.set(title="all predictable positions")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return (learning_table(records, {"accuracy": "first predictable", "accuracy_all": "all predictable"})
            + f"\n\nA guess among the tokens seen is right at the first predictable position in {chance:.3f} of cases.")


def draw_width(config: ToyConfig, records: list[dict], figure) -> str:
    ax, widths = figure.subplots(), whole_numbers(config.width_sizes)
    for n, kind, i in (("1 layer", "KV shift", 0), ("2 layers", "vanilla", 2)):
        of_width = [[figures[-1]["accuracy"] for figures in by_seed(records, f"{n}, width {width}, {kind}")] for width in widths]
        band(ax, widths, np.transpose(of_width), i, f"{n}, {kind}")
    ax.axhline(induction_chance(config), **DOTS, label="a guess among the tokens seen")
    ax.set_xscale("log", base=2)
    ax.set(xticks=widths, xticklabels=widths, xlabel="width", ylim=(-0.02, 1.04), title="first predictable position",
           ylabel=f"accuracy after {config.width_steps} steps")
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    return learning_table(records, {"accuracy": "first predictable", "accuracy_all": "all predictable"})


def draw_ngram(config: ToyConfig, records: list[dict], figure) -> str:
    labels = list(dict.fromkeys(r["model"] for r in records))
    axes = figure.subplots(1, len(labels) // 2, sharey=True, squeeze=False)[0]
    for ax, shift, vanilla in zip(axes, labels[::2], labels[1::2], strict=True):
        draw_learning(ax, records, [shift, vanilla], "accuracy")
        ax.set(title=shift.rsplit(", ", 1)[0])
    axes[0].set(ylabel="share of the table known")
    axes[0].legend(axes[0].lines, ["KV shift", "vanilla"])
    return learning_table(records, {"accuracy": "share of the table known", "loss": "loss at the end"})


def draw_hop(config: ToyConfig, records: list[dict], figure) -> str:
    axes = dict(zip(("vanilla", "KV shift"), figure.subplots(1, 2, sharey=True), strict=True))
    rows, hops = [], range(1, config.hop_max + 1)
    for i, name in enumerate(models(config, "hop")):
        ends = [figures[-1] for figures in by_seed(records, name)]
        errors = [end["error"] for end in ends]  # (seeds, hops)
        n_layers, kind = name.split(", ")
        band(axes[kind], hops, errors, i // 2, n_layers)
        rows.append([name, f"{ends[0]['parameters']:,}", *(f"{error:.3f}" for error in np.median(errors, axis=0))])
    for kind, ax in axes.items():
        ax.axhline(1 - 1 / config.hop_letters, **DOTS, label="a guess among the letters")
        ax.set(title=kind, xlabel="hops", xticks=hops, ylim=(-0.02, 0.82))
    axes["vanilla"].set(ylabel="error")
    axes["vanilla"].legend(loc="upper left", bbox_to_anchor=(0, 0.88))
    head = ["model", "parameters", *(f"{k} hop{'s' * (k > 1)}" for k in hops)]
    return table(head, rows) + "\n\nThe error after so many hops, the median over the seeds."


def draw_heads(config: ToyConfig, records: list[dict], figure) -> str:
    end, rows = records[-1], []
    H, K = len(end["induction_score"]), len(end["alpha"][0])
    maps, plane = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    axes = maps.subplots(-(-H // 2), 2, sharex=True, sharey=True, squeeze=False).flat
    for h in range(H):
        (a1, a2), (b1, b2) = ([row[h * K // H] for row in end[name]] for name in ("alpha", "beta"))
        score = end["induction_score"][h]
        axes[h].imshow(end["attention"][h], cmap="magma_r", vmin=0, vmax=1)
        axes[h].set_title(f"head {h + 1}, induction score {score:.2f}\n"
                          rf"$\alpha$ = {a1:.2f}, {a2:.2f}   $\beta$ = {b1:.2f}, {b2:.2f}", fontsize=9)
        rows.append([str(h + 1), *(f"{x:.2f}" for x in (a1, a2, b1, b2, score))])
    maps.supxlabel("position attended to", fontsize=10)
    maps.supylabel("position", fontsize=10)
    ax = plane.subplots()
    for k in range(K):
        color, line, marker = style(k)
        a, b = ([r[name][0][k] for r in records] for name in ("alpha", "beta"))
        ax.plot(a, b, line, color=color, label=f"head {k + 1}" if K == H else f"key/value head {k + 1}")
        ax.plot(a[0], b[0], marker, color=color, markerfacecolor="white")
        ax.plot(a[-1], b[-1], marker, color=color)
    ax.plot(0, 1, "*", color="black", markersize=14, linestyle="none", label="induction head")
    ax.set(xlabel=r"$\alpha_1$", ylabel=r"$\beta_1$", title="from the first step (white) to the last")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    return table(["head", "alpha1", "alpha2", "beta1", "beta2", "induction score"], rows)


def draw_landscape(config: ToyConfig, records: list[dict], figure) -> str:
    sizes, rows, side = whole_numbers(config.landscape_sizes), [], np.linspace(0, 1, 101)
    a, b = np.meshgrid(side, side)
    for ax, T in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True):
        loss = closed_form_loss(a, 1 - a, b, 1 - b, T)
        ax.contourf(a, b, loss, levels=14, cmap="Blues")
        down_b, down_a = np.gradient(-loss, side, side)
        ax.streamplot(side, side, down_a, down_b, color="#777777", density=0.5, linewidth=0.8)
        for path in (np.array(r["path"]) for r in records if r["T"] == T):
            ax.plot(path[:, 0], path[:, 1], color="#D55E00", linewidth=2.5, clip_on=False, label="gradient descent")
            ax.plot(*path[0, :2], "o", color="#D55E00", markerfacecolor="white", clip_on=False, zorder=3, label="its start")
            rows.append([str(T), "({:.2f}, {:.2f})".format(*path[0]), "({:.2f}, {:.2f})".format(*path[-1]), str(len(path) - 1),
                         f"{path[0, 2]:.4f}", f"{path[-1, 2]:.4f}"])
        ax.plot(0, 1, "*", color="black", markersize=16, clip_on=False, zorder=4, linestyle="none", label="induction head")
        ax.set(title=f"T = {T}", xlabel=r"$\alpha_1 = 1 - \alpha_2$", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure.axes[0].set(ylabel=r"$\beta_1 = 1 - \beta_2$")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, frameon=False,
                  title="background: the loss, lighter is lower; arrows: downhill")
    return table(["T", "start (alpha1, beta1)", "end", "steps", "loss at the start", "at the end"], rows)


# --- one experiment after the other: its title, its picture and that one's size in inches
EXPERIMENTS = {
    "depth": ("Induction, by depth", draw_depth, (8.5, 4)),
    "width": ("Induction, by width", draw_width, (6, 4)),
    "ngram": ("Memorising 3-grams", draw_ngram, (8.5, 3.2)),
    "landscape": ("The loss landscape of one induction head", draw_landscape, (8.5, 3.7)),
    "heads": ("The heads of a trained layer", draw_heads, (8.5, 4.4)),
    "hop": ("Multi-hop induction", draw_hop, (8.5, 3.6)),
}


def present(config: ToyConfig, experiment: str) -> str:
    """Measures, draws and prints one experiment: its part of the page."""
    from matplotlib.figure import Figure  # not pyplot: it needs no display

    title, draw, size = EXPERIMENTS[experiment]
    path = Path(config.out_dir) / experiment
    if not config.plot_only:
        descriptor = lock(config.out_dir)  # a second run would write over this one's figures
        try:
            measure(config, experiment)
        finally:
            os.close(descriptor)
    config, records = load(path.with_suffix(".jsonl"))
    figure = Figure(figsize=size, layout="constrained")
    text = draw(config, records, figure)
    save_figure(figure, path.with_suffix(".png"))
    print(f"\n{title}\n\n{text}\n\nthe picture: {path}.png, its figures: {path}.jsonl\n", flush=True)
    return f"## {title}\n\n![{title}]({experiment}.png)\n\n{text}\n"


def main():
    config = parse(ToyConfig, sys.argv[1:])
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    if config.experiment != "all":
        present(config, config.experiment)
        return
    page = ["# Induction with and without KV shift\n"] + [present(config, experiment) for experiment in EXPERIMENTS]
    with atomic_write(Path(config.out_dir) / "report.md") as f:
        f.write("\n".join(page).encode())
    print(f"one page of all: {config.out_dir}/report.md")


if __name__ == "__main__":
    run(main, less_memory="Lower --micro_batch_size or --workers")
