"""Evaluates a trained model.

    python eval.py out/x                     loss on the val split, and the induction score
    python eval.py out/x --text=FILE         loss on a text
    python eval.py out/x --jsonl=FILE        multiple choice, or the last word of each text
    python eval.py out/x --tasks=lambada_openai,hellaswag,arc_easy,winogrande,piqa

A line of the JSON Lines file is {"context": "...", "choices": ["...", ...], "answer": 0} or
{"text": "..."}. --tasks runs EleutherAI's harness: pip install lm-eval
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoint import choose_device, load_checkpoint, load_model
from config import UserError, need, parse_with_paths, run
from data import FOLDER, Corpus, check_length
from data.tokenizing import Tokenizer
from model import GPT

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


@dataclass
class EvalConfig:
    dataset: str = ""  # corpus whose val split to evaluate on; empty: that of the run
    tokens: int = 0  # tokens of the val split to evaluate on; 0: all
    text: str = ""  # evaluate on this UTF-8 file instead
    jsonl: str = ""  # score the lines of this file instead
    tasks: str = ""  # run these tasks of lm-eval instead, separated by commas
    include_path: str = ""  # folder of your own lm-eval tasks (YAML files)
    shots: int | None = None  # examples in the prompt of each task; None: the task's own number
    limit: int | None = None  # evaluate only the first examples of each task
    batch_size: int = 16  # sequences per forward pass
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: by device

    def __post_init__(self):
        if self.batch_size < 1 or self.tokens < 0:
            raise ValueError("batch_size must be at least 1, and tokens at least 0")


def main():
    config, paths = parse_with_paths(EvalConfig, "OUT_DIR")
    if len(paths) != 1:
        raise UserError("pass one run folder or checkpoint: python eval.py out/x")
    path = Path(paths[0])
    checkpoint = load_checkpoint(path / "best.pt" if path.is_dir() else path)
    tokenizer = Tokenizer(checkpoint["tokenizer"])
    model = load_model(checkpoint, *choose_device(config.device, config.dtype))
    if config.tasks:
        print(run_harness(model, tokenizer, config))
    elif config.jsonl:
        print_scores(model, tokenizer, config)
    elif config.text:
        raw = Path(config.text).read_bytes()
        ids = tokenizer.encode(raw).tolist()
        if not ids:
            raise UserError(f"{config.text} is empty")
        nats = -text_logprob(model, [tokenizer.start, *ids], config.batch_size)
        print_loss("text", nats, len(ids), len(raw))
    else:
        dataset = config.dataset or checkpoint["config"].get("dataset")
        if not dataset:
            raise UserError("an imported model has no corpus: pass --text=FILE or --dataset=NAME")
        corpus = Corpus(FOLDER / dataset)
        if corpus.tokenizer != checkpoint["tokenizer"]:
            raise UserError(f"{corpus.folder} has another tokenizer than {path}")
        T = model.config.block_size
        sets = evaluation_sets(corpus, T, config.tokens, 0, induction=T >= 4)
        losses = evaluate(model, sets, config.batch_size)
        ids = sets["val_loss"][1].flatten().tolist()
        n_bytes = len(tokenizer.decode_bytes(ids))
        print_loss("val split", losses["val_loss"] * len(ids), len(ids), n_bytes)
        if T >= 4:
            saved = losses["val_random"] - losses["val_induction"]
            print(f"random tokens: loss {losses['val_random']:.4f}, on their repetition "
                  f"{losses['val_induction']:.4f}: induction saves {saved:.4f} nats")


def print_loss(name: str, nats: float, n_tokens: int, n_bytes: int):
    loss = nats / n_tokens
    print(f"{name}: {n_tokens:,} tokens, loss {loss:.4f} nats per token, perplexity "
          f"{math.exp(loss):.4g}, {nats / math.log(2) / n_bytes:.4f} bits per byte")


# --- loss on the val split, also during training


def evaluation_sets(corpus: Corpus, block_size: int, tokens: int, start: int, induction: bool):
    """name -> inputs and targets (n, block_size), -1 where there is no target.

    val_loss: adjacent windows of the val split, `tokens` tokens (0: all) from `start` on. With
    induction also random tokens, block_size / 2 of them and then the same again: val_random has
    the first ones as targets, val_induction the repetition, which an induction head predicts.
    """
    T = block_size
    check_length(corpus, "val", T + start)
    n = (corpus.tokens["val"] - start - 1) // T
    n = max(1, min(n, tokens // T)) if tokens else n
    windows = torch.from_numpy(corpus.windows("val", start + T * np.arange(n), T))
    sets = {"val_loss": (windows[:, :-1], windows[:, 1:])}
    if induction:  # ids that occur in the windows, without a separator
        once = np.random.RandomState(0).choice(np.unique(windows), (64, T // 2))
        ids = F.pad(torch.from_numpy(once).repeat(1, 2), (0, 1 + T % 2), value=-1)  # (64, T + 1)
        position = torch.arange(1, T + 1)
        for name, mask in (("val_random", position < T // 2), ("val_induction", position > T // 2)):
            sets[name] = ids[:, :-1].clip(min=0), ids[:, 1:].where(mask, -1)
    return sets


@torch.no_grad()
def evaluate(model, eval_sets: dict, batch_size: int) -> dict[str, float]:
    """Mean loss in nats on each evaluation set; all processes share the work."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    model.eval()
    losses = {}
    for name, (inputs, targets) in eval_sets.items():
        n_targets = (targets != -1).sum().item()
        # pad to equal batches: one compiled shape, and equally many in each process
        padding = (0, 0, 0, -len(inputs) % (batch_size * world_size))
        inputs, targets = F.pad(inputs, padding), F.pad(targets, padding, value=-1)
        batches = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
        total = torch.zeros((), device=device)
        for x, y in batches[rank::world_size]:
            total += model(x.to(device), y.to(device), reduction="sum")
        if dist.is_initialized():
            dist.all_reduce(total)
        losses[name] = total.item() / n_targets
    model.train()
    return losses


# --- log-probabilities of continuations


@torch.inference_mode()
def score(model: GPT, pairs, batch_size: int) -> list[tuple[float, bool]]:
    """For each pair (context ids, continuation ids): the log-probability of the continuation in
    nats, and whether greedy decoding gives it. Contexts are cut at the left to block_size."""
    T, device = model.config.block_size, model.embed.weight.device
    rows = [torch.tensor([*context, *continuation][-(T + 1) :]) for context, continuation in pairs]
    scores = [None] * len(rows)
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(rows), batch_size):  # of similar lengths, padded at the right
        batch = longest_first[start : start + batch_size]
        idx = torch.nn.utils.rnn.pad_sequence([rows[i][:-1] for i in batch], batch_first=True)
        hidden = model.hidden(idx.to(device))
        for i, x in zip(batch, hidden, strict=True):
            end = len(rows[i]) - 1
            first = max(0, end - len(pairs[i][1]))
            logprobs = model.logits(x[first:end]).float().log_softmax(dim=-1).cpu()  # (n, V)
            targets = rows[i][first + 1 :]
            scores[i] = (logprobs.gather(1, targets[:, None]).sum().item(),
                         torch.equal(logprobs.argmax(dim=-1), targets))
    return scores


def text_logprob(model: GPT, ids: list[int], batch_size: int) -> float:
    """The log-probability of ids[1:] in nats. Each window predicts block_size ids; the last one
    predicts the rest, after a context that reaches back as far as it fits, as in lm-eval."""
    T = model.config.block_size
    pairs = [(ids[max(0, i - T) : i], ids[i : i + T]) for i in range(1, len(ids), T)]
    return sum(logprob for logprob, _ in score(model, pairs, batch_size))


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str):
    """Their ids. Spaces at the end of the context belong to the continuation, as in training."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer.encode(stripped + continuation).tolist()
    n = len(tokenizer.encode(stripped)) if stripped else 0
    return whole[:n] or [tokenizer.start], whole[n:]


def print_scores(model: GPT, tokenizer: Tokenizer, config: EvalConfig):
    """Scores a JSON Lines file: choices by the sum of their log-probabilities and by its mean per
    character; of a text, the last word."""
    try:
        lines = [json.loads(line) for line in Path(config.jsonl).read_text().splitlines()]
        questions = [line for line in lines if "text" not in line]
        texts = [line["text"].rstrip().rsplit(maxsplit=1) for line in lines if "text" in line]
        words = [encode_pair(tokenizer, context, " " + word) for context, word in texts]
        choices = [encode_pair(tokenizer, question["context"], " " + choice)
                   for question in questions for choice in question["choices"]]
        right = [range(len(question["choices"]))[question["answer"]] for question in questions]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{config.jsonl}: each line must have text, or context, choices and answer "
                        f"({type(error).__name__}: {error})") from None
    if words:
        logprobs, greedy = np.mean(score(model, words, config.batch_size), axis=0)
        print(f"last word: accuracy {greedy:.4f}, perplexity {math.exp(-logprobs):.4g} "
              f"({len(words)} texts)")
    if questions:
        scores, by_sum, by_mean = iter(score(model, choices, config.batch_size)), [], []
        for question in questions:
            logprobs = [next(scores)[0] for _ in question["choices"]]
            by_sum.append(np.argmax(logprobs))
            by_mean.append(np.argmax(np.divide(logprobs, [*map(len, question["choices"])])))
        print(f"choices: accuracy {np.mean(np.equal(by_sum, right)):.4f} by log-probability, "
              f"{np.mean(np.equal(by_mean, right)):.4f} by its mean per character "
              f"({len(questions)} lines)")


def run_harness(model: GPT, tokenizer: Tokenizer, config: EvalConfig) -> str:
    """Runs tasks of lm-evaluation-harness; returns its table."""
    need("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    class Harness(TemplateLM):
        eot_token_id = tokenizer.start  # the context of an empty prompt

        def tok_encode(self, string, **kwargs):
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests, **kwargs):
            return score(model, [pair for _, *pair in requests], config.batch_size)

        def loglikelihood_rolling(self, requests, **kwargs):
            texts = [[tokenizer.start, *self.tok_encode(request.args[0])] for request in requests]
            return [text_logprob(model, ids, config.batch_size) for ids in texts]

        def generate_until(self, requests, **kwargs):
            return [self.generate(*request.args) for request in requests]

        def generate(self, context: str, options: dict) -> str:
            ids = self.tok_encode(context) or [tokenizer.start]
            until = options.get("until", [])
            until = [until] if isinstance(until, str) else until
            new = []
            for token in model.stream(torch.tensor([ids], device=model.embed.weight.device),
                                      options.get("max_gen_toks", 256),
                                      options.get("temperature", 0.0)):
                if token.item() == tokenizer.end_of_text:
                    break
                new.append(token.item())
                text = tokenizer.decode(new)
                if ends := [text.index(stop) for stop in until if stop in text]:
                    return text[: min(ends)]
            return tokenizer.decode(new)

    tasks, manager = config.tasks.split(","), TaskManager(include_path=config.include_path or None)
    if unknown := {*tasks} - {*manager.all_tasks}:
        raise UserError(f"lm-eval has no task {min(unknown)}: lm-eval ls tasks lists all")
    results = simple_evaluate(Harness(), tasks=tasks, num_fewshot=config.shots,
                              limit=config.limit, task_manager=manager, bootstrap_iters=1000)
    return make_table(results)


if __name__ == "__main__":
    run(main)
