"""Train the demo checkpoint: a small Mixtral on the standard library's source, with the network of `model/`.

    python -m dev.demo.train OUT --minutes 100

OUT gets the HF layout of a Mixtral (`config.json`, `model.safetensors` in bfloat16, `tokenizer.model`). The
state of training is saved in `OUT/training.pt` every few minutes, and the same command goes on from there. It
prints loss, speed, how evenly the experts are used, and the held-out bits per byte.
"""

import dataclasses
import io
import os
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor as Processor
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn

from dev.demo.balance import Balance
from dev.demo.corpus import Corpus, standard_library
from dev.demo.held_out import judge
from model.checkpoint import save_hf
from model.config import ModelConfig
from model.mixtral import Mixtral
from runtime.planning.device import pick_device
from runtime.shell.arguments import new_parser

DEMO = ModelConfig(
    vocab=2048, hidden=256, layers=8, heads=4, kv_heads=2, head_dim=64, ffn=128,
    experts=8, experts_per_token=2, context=1024, rope_theta=10000.0, norm_eps=1e-5,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. Lengths and rates depend on the share of `minutes` that is over, so that every machine is
    done in time."""

    minutes: float = 100.0
    seed: int = 0
    tokens_per_step: int = 8192
    tokens_per_pass: int = 4096
    lengths: tuple[tuple[float, int], ...] = (
        (0.5, 256),
        (0.85, 512),
        (1.0, 1024),
    )  # (until, tokens per sequence)
    matrix_rate: float = 0.02  # Muon, for the matrices of the layers
    other_rate: float = 3e-3  # AdamW, for embeddings, head, gates and norms
    warmup: float = 0.01
    decay_from: float = 0.4  # constant until here, then linearly to zero
    snippets: float = 0.3  # share of top-level functions and classes that begin a text of their own
    loose_words: float = 0.06  # share of words to part from the space before them
    loose_second_word: float = 0.5  # the same for a text's second word, where most prompts end
    balance: float = 0.02  # weight of the router balancing loss
    evaluate_every: float = 600.0  # seconds
    save_every: float = 300.0  # seconds

    def length(self, progress: float) -> int:
        return next(length for until, length in self.lengths if progress < until)

    def rate(self, progress: float) -> float:
        return min(progress / self.warmup, (1 - progress) / (1 - self.decay_from), 1.0)


def train_tokenizer(texts: list[str], vocab: int) -> bytes:
    """A sentencepiece BPE with Mixtral's settings: byte fallback, dummy prefix, split digits, spaces kept."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        add_dummy_prefix=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def cut_snippets(texts: list[str], share: float, chance: random.Random) -> list[str]:
    """Cut files before some of their top-level functions and classes, where prompts begin.

    >>> cut_snippets(["import os\\n\\ndef f():\\n    pass\\n"], 1.0, random.Random(0))
    ['import os\\n\\n', 'def f():\\n    pass\\n']
    """
    snippets = []
    for text in texts:
        begin = 0
        for match in re.finditer(r"^(?=def |class )", text, re.MULTILINE):
            if match.start() > begin and chance.random() < share:
                snippets.append(text[begin : match.start()])
                begin = match.start()
        snippets.append(text[begin:])
    return snippets


def encode_corpus(texts: list[str], tokenizer: Processor, recipe: Recipe) -> Tensor:  # -> [tokens]
    """Ids of files and snippets between begin and end ids, with a few words parted from the space before
    them.

    The tokenizer joins a space to the next word. So a text that ends in a space ends in a token that no word
    follows, and a model trained only on whole words would be lost after the prompt "def ".
    """
    space, marker = tokenizer.piece_to_id("▁"), len(tokenizer.encode("\n"))
    loose = {}  # id of "▁word" -> ids of "▁", "word"
    for i in range(tokenizer.vocab_size()):
        piece = tokenizer.id_to_piece(i)
        if piece.startswith("▁") and piece.strip("▁") and not piece.startswith("▁▁"):
            loose[i] = [space, *tokenizer.encode("\n" + piece[1:])[marker:]]
    chance = random.Random(recipe.seed)
    ids: list[int] = []
    for text in cut_snippets(texts, recipe.snippets, chance):
        ids.append(DEMO.bos_id)
        for place, i in enumerate(tokenizer.encode(text)):
            share = recipe.loose_second_word if place == 1 else recipe.loose_words
            if i in loose and chance.random() < share:
                ids += loose[i]
            else:
                ids.append(i)
        ids.append(DEMO.eos_ids[0])
    return torch.tensor(ids)


def initialize(model: Mixtral) -> None:
    """Set weights to random numbers of deviation 1 / sqrt(inputs), or 0.02 for embeddings, and the last
    matrix of each residual branch to zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        elif name.endswith(("o_proj.weight", "w2.weight")):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)


def optimizers(model: Mixtral, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest. Each group keeps its full rate as `peak`."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = name.startswith("layers.") and parameter.dim() == 2 and not name.endswith("gate.weight")
        (matrices if inner else others).append(parameter)
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


class Batches:
    """Batches from shuffled places of the corpus, with every token once in a pass over it."""

    def __init__(self, tokens: Tensor, tokens_per_step: int, seed: int) -> None:
        self.tokens = tokens
        self.tokens_per_step = tokens_per_step
        self.generator = torch.Generator().manual_seed(seed)
        self.length = 0
        self.pending: list[Tensor] = []  # where the sequences of each batch to come begin

    def take(self, T: int) -> Tensor:  # -> [B, T + 1]
        """The next batch: sequences of T tokens and the token after them."""
        if self.length != T or not self.pending:
            offset = int(torch.randint(T, (1,), generator=self.generator))
            starts = torch.arange(offset, len(self.tokens) - T - 1, T)
            starts = starts[torch.randperm(len(starts), generator=self.generator)]
            self.length, self.pending = T, list(starts.split(self.tokens_per_step // T))[::-1]
        return torch.stack([self.tokens[start : start + T + 1] for start in self.pending.pop().tolist()])


@dataclasses.dataclass
class Training:
    """The state of training, which can be saved and restored."""

    model: Mixtral
    optimizers: list[torch.optim.Optimizer]
    elapsed: float = 0.0  # seconds
    step: int = 0
    tokens: int = 0

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        counts = {"elapsed": self.elapsed, "step": self.step, "tokens": self.tokens}
        torch.save(state | counts, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.model.embed_tokens.weight.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.elapsed, self.step, self.tokens = state["elapsed"], state["step"], state["tokens"]


def take_step(training: Training, ids: Tensor, balance: Balance, recipe: Recipe) -> float:
    """One step on ids [B, T + 1]. Returns the loss in nats per token."""
    rate = recipe.rate(training.elapsed / (recipe.minutes * 60))
    loss = 0.0
    parts = ids.split(recipe.tokens_per_pass // (ids.shape[1] - 1))
    for part in parts:  # gradients add up over forwards small enough for the processor's caches
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = training.model(part[:, :-1])
        part_loss = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
        share = len(part) / len(ids)
        ((part_loss + recipe.balance * balance.loss()) * share).backward()
        loss += part_loss.item() * share
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad()
    training.step += 1
    training.tokens += ids[:, 1:].numel()
    return loss


class Every:
    """True once in every `seconds`."""

    def __init__(self, seconds: float, now: float) -> None:
        self.seconds = seconds
        self.last = now

    def __call__(self, now: float) -> bool:
        due = now - self.last >= self.seconds
        if due:
            self.last = now
        return due


def train(out: Path, recipe: Recipe, corpus: Corpus) -> None:
    torch.manual_seed(recipe.seed)
    device = pick_device(None)
    if not (out / "tokenizer.model").exists():
        (out / "tokenizer.model").write_bytes(train_tokenizer(corpus.train, DEMO.vocab))
    tokenizer = Processor(model_file=str(out / "tokenizer.model"))
    tokens = encode_corpus(corpus.train, tokenizer, recipe)
    print(f"{len(tokens):,} tokens to train on, {len(corpus.held_out_bytes):,} bytes held out", flush=True)

    model = Mixtral(DEMO, torch.float32, device)
    initialize(model)
    training = Training(model, optimizers(model, recipe))
    state = out / "training.pt"
    if state.exists():
        training.restore(state)
        print(f"going on from step {training.step}, {training.elapsed / 60:.1f} minutes", flush=True)
    balance = Balance(model)
    batches = Batches(tokens, recipe.tokens_per_step, recipe.seed + training.step)
    reporting, evaluating, saving = (
        Every(seconds, training.elapsed) for seconds in (20, recipe.evaluate_every, recipe.save_every)
    )
    while training.elapsed < recipe.minutes * 60:
        began = time.monotonic()
        ids = batches.take(recipe.length(training.elapsed / (recipe.minutes * 60))).to(device)
        loss = take_step(training, ids, balance, recipe)
        seconds = time.monotonic() - began
        training.elapsed += seconds
        if reporting(training.elapsed):
            print(
                f"{training.elapsed / 60:6.1f} min  step {training.step:5d}  "
                f"{training.tokens / 1e6:6.2f} M tokens  T {ids.shape[1] - 1:4d}  loss {loss:.3f}  "
                f"busiest {balance.busiest():.2f}  {ids[:, 1:].numel() / seconds:,.0f} tokens/s",
                flush=True,
            )
        if evaluating(training.elapsed):
            sample = corpus.held_out[::4]
            print(f"a quarter of the held-out: {judge(model, balance, tokenizer, sample)}", flush=True)
        if saving(training.elapsed):
            training.save(state)
            save_hf(model, out)

    save_hf(model, out)
    model.to(torch.bfloat16).float()  # judge what was written
    print(f"held out: {judge(model, balance, tokenizer, corpus.held_out)}", flush=True)
    state.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("dev.demo.train", __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, Recipe(minutes=args.minutes, seed=args.seed), standard_library())
    return 0


if __name__ == "__main__":
    sys.exit(main())
