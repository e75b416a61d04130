"""Make the demo model: a Qwen3 of 7.7 million parameters that has read the Python standard library.

    python train.py prepare --data data
    python train.py train   --data data --out runs/a --minutes 10
    python train.py plot    runs/a.csv --to loss.png
    python train.py export  --data data --checkpoint runs/a.safetensors --to model
    python train.py sample  --model model

`prepare` and `export` need no accelerator. README.md tells what came out.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
COPIES = {"library": 4, "functions": 4, "tests": 1, "lessons": 100, "validation": 1}
PROMPTS = [
    "def fibonacci(n):",
    "class Stack:",
    "import os\n\ndef ",
    "def read_config(path):",
    "# Write a function that counts the words in a file.\n",
    "class Server:\n    def __init__(self, host, port):",
]

# A conversation is a series of Python files: the user's words are the comment above the code.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message.content if message.content is string else message.content | map(attribute='text') | join -%}
{%- if message.role == 'assistant' -%}
{{- '\\n' + content.rstrip() + '\\n' + eos_token -}}
{%- else -%}
{%- if loop.previtem and loop.previtem.role != 'assistant' -%}{{- '\\n\\n' -}}{%- endif -%}
{{- '# ' + content.strip().replace('\\n', '\\n# ') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Settings:
    """What settings.json says."""

    vocab_size: int
    context: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    mixture: dict[str, float]
    seed: int
    batch_tokens: int
    windows: list[int]
    steps: int
    warmup_steps: int
    learning_rate: float
    final_learning_rate: float
    weight_decay: float
    dropout: float
    clip: float
    eval_every: int

    @classmethod
    def load(cls, changes: list[str]) -> "Settings":
        """Read settings.json, with changes such as "dropout=0.2"."""
        values = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
        for change in changes:
            name, _, value = change.partition("=")
            values[name] = json.loads(value)
        return cls(**values)

    def model_config(self) -> Qwen3Config:
        """Return the model's configuration in Transformers' words; the first special token ends a text."""
        return Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )


def prepare(args: argparse.Namespace) -> None:
    """Train the tokenizer and write every stream as a file of uint16 token ids."""
    import corpus

    settings = Settings.load(args.set)
    args.data.mkdir(parents=True, exist_ok=True)
    tokenizer = corpus.train_tokenizer(settings.vocab_size)
    tokenizer.save(str(args.data / "tokenizer.json"))
    for stream, copies in COPIES.items():
        ids = corpus.encode(tokenizer, stream, copies, settings.seed)
        ids.tofile(args.data / f"{stream}.bin")
        print(f"{stream:12} {len(ids):>12,} tokens, copies: {copies}")


class Batches:
    """Windows of tokens, drawn from the streams as the mixture says.

    The length of all windows of a batch is one of those in the settings: long ones teach the use of
    the context, short ones what follows a short prompt. Three windows in four begin where a prompt
    would: after a blank line or at the start of a document.
    """

    def __init__(self, data: Path, settings: Settings, device: str) -> None:
        vocab = Tokenizer.from_file(str(data / "tokenizer.json")).get_vocab()
        breaks = [i for token, i in vocab.items() if i == 0 or re.fullmatch("Ċ{2,}", token)]
        self.rng = np.random.default_rng(settings.seed)
        self.settings = settings
        self.starts: list[np.ndarray] = []  # where windows may begin in `tokens`, one array for each stream
        self.ranges: list[tuple[int, int]] = []
        streams, offset = [], 0
        for name in settings.mixture:
            ids = np.fromfile(data / f"{name}.bin", dtype=np.uint16)
            last = len(ids) - settings.context - 1
            self.starts.append(offset + np.flatnonzero(np.isin(ids[:last], breaks)) + 1)
            self.ranges.append((offset, offset + last))
            streams.append(ids)
            offset += len(ids)
        self.tokens = torch.from_numpy(np.concatenate(streams).astype(np.int32)).to(device)

    def next(self, window: int = 0) -> Tensor:
        """Return token ids, (batch, window + 1)."""
        weights = list(self.settings.mixture.values())
        window = window or int(self.rng.choice(self.settings.windows))
        begins = []
        for stream in self.rng.choice(len(weights), size=self.settings.batch_tokens // window, p=weights):
            begin = self.rng.integers(*self.ranges[stream])
            if self.rng.random() < 0.75:
                # The next start after a random place.
                starts = self.starts[stream]
                begin = starts[min(np.searchsorted(starts, begin), len(starts) - 1)]
            begins.append(begin)
        places = torch.tensor(begins)[:, None] + torch.arange(window + 1)
        return self.tokens[places.to(self.tokens.device)].long()


def loss_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token; ids is (batch, window + 1)."""
    # No mask at all: attention is then plainly causal, and the fused kernel serves it.
    logits = model(input_ids=ids[:, :-1], attention_mask={"full_attention": None}, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: torch.nn.Module, windows: Tensor) -> float:
    """Return the mean loss over the validation stream."""
    model.eval()
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        losses = [loss_of(model, part).item() * len(part) for part in windows.split(8)]
    model.train()
    return sum(losses) / len(windows)


def add_dropout(model: Qwen3ForCausalLM, p: float) -> None:
    """Drop parts of the embedding and of what each block adds to the residual stream."""
    outputs = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in (model.model.embed_tokens, *outputs):
        module.register_forward_hook(lambda module, _, output: F.dropout(output, p, module.training))


def save_weights(model: Qwen3ForCausalLM, path: Path) -> None:
    """Write the weights in bfloat16, all but the output layer, which is the embedding."""
    weights = {name: w.detach().to("cpu", torch.bfloat16) for name, w in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def train(args: argparse.Namespace) -> None:
    """Train until the steps or the minutes run out; keep the weights that validate best."""
    begin = time.monotonic()
    settings = Settings.load(args.set)
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    model = Qwen3ForCausalLM(settings.model_config()).to(args.device).train()
    add_dropout(model, settings.dropout)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    batches = Batches(args.data, settings, args.device)
    held_out = np.fromfile(args.data / "validation.bin", dtype=np.uint16).astype(np.int64)
    windows = torch.from_numpy(held_out).unfold(0, settings.context + 1, settings.context).to(args.device)
    compiled_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of

    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights_path, log_path = Path(f"{args.out}.safetensors"), Path(f"{args.out}.csv")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {settings}", flush=True)
    for window in settings.windows:  # compile for each, before the schedule begins
        with torch.autocast(args.device, dtype=torch.bfloat16):
            compiled_loss(model, batches.next(window)).backward()
    optimizer.zero_grad(set_to_none=True)
    compiled = time.monotonic() - begin
    print(f"compiled after {compiled:.1f} s", flush=True)
    best, losses = math.inf, []
    with log_path.open("w", newline="", encoding="utf-8") as file:
        log = csv.writer(file, lineterminator="\n")
        log.writerow(["step", "tokens", "seconds", "learning_rate", "train_loss", "validation_loss"])
        for step in range(1, settings.steps + 1):
            elapsed = time.monotonic() - begin
            done = max((step - 1) / settings.steps, (elapsed - compiled) / (args.minutes * 60 - compiled))
            low, high = settings.final_learning_rate, settings.learning_rate
            rate = low + (high - low) * (1 + math.cos(math.pi * min(done, 1))) / 2
            rate *= min(1, step / settings.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate

            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss = compiled_loss(model, batches.next())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if step % 10 == 0:
                loss.item()  # keeps the clock honest: at most ten steps are under way

            is_last = step == settings.steps or done >= 1
            if is_last or step % settings.eval_every == 0:
                value = validation_loss(model, windows)
                train_loss = torch.stack(losses).mean().item()
                losses.clear()
                seconds = time.monotonic() - begin
                tokens = step * settings.batch_tokens
                log.writerow([step, tokens, f"{seconds:.1f}", f"{rate:.3g}", f"{train_loss:.4f}", f"{value:.4f}"])
                file.flush()
                print(f"step {step:6} {seconds:6.1f} s train {train_loss:.4f} validation {value:.4f}", flush=True)
                if value < best:
                    best = value
                    save_weights(model, weights_path)
            if is_last:
                break
    print(f"best validation loss {best:.4f} in {weights_path.name}")


def plot(args: argparse.Namespace) -> None:
    """Draw the losses of one run or several."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, path in enumerate(args.logs):
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        tokens = [int(row["tokens"]) / 1e6 for row in rows]
        for name, style in (("train_loss", ":"), ("validation_loss", "-")):
            label = f"{path.stem}, {name.removesuffix('_loss')}"
            axes.plot(tokens, [float(row[name]) for row in rows], f"C{i}{style}", label=label)
    axes.set(xlabel="training tokens, millions", ylabel="cross entropy, nats per token", ylim=(0, 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.to, dpi=110)


def export(args: argparse.Namespace) -> None:
    """Write a folder that Transformers, or any engine that reads its format, can load."""
    settings = Settings.load(args.set)
    model = Qwen3ForCausalLM(settings.model_config())
    missing, unexpected = model.load_state_dict(load_file(args.checkpoint), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(args.to)

    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    tokenizer.save(str(args.to / "tokenizer.json"))
    end = tokenizer.id_to_token(0)
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": end,
        "pad_token": end,
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": settings.context,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(tokenizer_config, indent=2) + "\n"
    (args.to / "tokenizer_config.json").write_text(text, encoding="utf-8")


def sample(args: argparse.Namespace) -> None:
    """Print what the model makes of a few prompts."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    torch.manual_seed(0)
    options: dict[str, Any] = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    for prompt in args.prompt or PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=args.tokens, **options)
        print(f"{'-' * 72}\n{tokenizer.decode(output[0])}")


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(function: Any, *, data: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=function.__doc__)
        added.set_defaults(run=function)
        if data:
            added.add_argument("--data", type=Path, required=True, help="folder of the tokenizer and the streams")
            added.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change settings.json")
        return added

    command(prepare)
    added = command(train)
    added.add_argument("--out", type=Path, required=True, help="path of the .safetensors and .csv, without suffix")
    added.add_argument("--minutes", type=float, default=600.0, help="end the schedule after this time at the latest")
    added.add_argument("--device", default="cuda")
    added.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    added = command(plot, data=False)
    added.add_argument("logs", type=Path, nargs="+")
    added.add_argument("--to", type=Path, required=True)
    added = command(export)
    added.add_argument("--checkpoint", type=Path, required=True)
    added.add_argument("--to", type=Path, required=True)
    added = command(sample, data=False)
    added.add_argument("--model", type=Path, required=True)
    added.add_argument("--prompt", nargs="*")
    added.add_argument("--tokens", type=int, default=160)
    added.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
