"""Trains a target and a draft model that share no vocabulary, from any text, for demonstrations and tests.

    python examples/train_pair.py --out DIR --text stories.txt code.txt.xz

The text is cut into documents at `<|endoftext|>`. Both are small Llama models in Hugging Face folders,
`DIR/target` and `DIR/draft`, that vLLM loads as they are. Their tokenizers are of the two great families, so
that the pair shows what real pairs do: the target's is a byte-level BPE that cuts text with a regular
expression, the draft's a SentencePiece-style BPE over characters that spells rare ones in bytes. Both give
back every text exactly, but for a literal U+2581 with the draft, which stands for the space there.
"""

import argparse
import json
import lzma
import math
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_STYLE_PIECES = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # A word, with a space or a sign in front of it.
        r"\p{N}",  # One digit.
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # White space but for the last, which belongs to the next word.
        r"\s+",
    ]
)
HEAD_SIZE = 64  # One of those that vLLM's attention on the CPU supports.
MAX_POSITIONS = 2048


@dataclass(frozen=True)
class Plan:
    """What to train: the size of one model, and for how long."""

    vocabulary: int
    layers: int
    width: int
    tokens: int
    learning_rate: float


def read_documents(paths: list[Path]) -> list[str]:
    """All documents of some `.txt` or `.txt.xz` files."""
    documents = []
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            documents += [document for document in file.read().split(SEPARATOR) if document.strip()]
    return documents


def train_target_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every token is a run of bytes, inside a piece that the regular expression cuts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_STYLE_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def train_draft_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A SentencePiece-style BPE over characters: a space is U+2581, rare characters are bytes."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    room = vocabulary - len(special) - len(byte_tokens)
    if room < 2:
        raise SystemExit(f"a draft vocabulary of {vocabulary} has no room beside its {vocabulary - room} fixed tokens")

    def with_rules(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[^▁\n]+|▁+|\n+"), behavior="isolated")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer

    learner = with_rules(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special + byte_tokens,
        limit_alphabet=min(200, room // 2),
        show_progress=False,
    )
    learner.train_from_iterator(documents, trainer)
    # The trainer takes the bytes for special tokens, which it would look for in the text: keep its vocabulary
    # and merges only.
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = with_rules(models.BPE(learnt["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, document: str) -> list[int]:
    """The ordinary tokens of a document, special ones excluded."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(document, add_special_tokens=False).ids
    return ids


def build_model(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> LlamaForCausalLM:
    """A freshly initialised Llama model, with grouped-query attention if it has more than two heads."""
    heads = plan.width // HEAD_SIZE
    eos = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=plan.width,
            intermediate_size=plan.width * 11 // 4,
            num_hidden_layers=plan.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads > 2 and heads % 2 == 0 else heads,
            head_dim=HEAD_SIZE,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
            eos_token_id=eos,
        )
    )


def batches(stream: torch.Tensor, bos: int | None, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Random windows of the text without end, int64 [batch, length], each beginning with `bos` if any."""
    while True:
        starts = torch.randint(len(stream) - length, (batch,))
        windows = torch.stack([stream[start : start + length] for start in starts])
        if bos is not None:
            windows[:, 0] = bos
        yield windows


def train(
    model: LlamaForCausalLM, windows: Iterator[torch.Tensor], steps: int, learning_rate: float, bf16: bool
) -> list[float]:
    """Trains with AdamW and a cosine schedule; returns the loss of every step, in nats per token."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, steps // 20)

    def schedule(step: int) -> float:
        return min((step + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        ids = next(windows).to(device)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(
                f"  step {step + 1:6}/{steps}  loss {losses[-1]:.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return losses


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> float:
    """Cross-entropy on the beginnings of documents; per byte, so that vocabularies can be compared."""
    model.eval()
    nats = size = 0.0
    for document in documents:
        beginning = document[:500]  # At most 4 tokens for each, which stays within the positions.
        ids = torch.tensor([[model.config.bos_token_id, *encode(tokenizer, beginning)]], device=model.device)
        nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size += len(beginning.encode())
    return nats / math.log(2) / size


def main(arguments: list[str] | None = None) -> dict[str, dict[str, object]]:
    """Trains both models; returns, for each, its plan, the losses of its steps, and bits per byte."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for `target` and `draft`")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt or .txt.xz files")
    for name, vocabulary, layers, width, tokens in (
        ("target", 8192, 4, 256, 10_000_000),
        ("draft", 3072, 2, 128, 20_000_000),
    ):
        parser.add_argument(f"--{name}-vocabulary", type=int, default=vocabulary, help="entries")
        parser.add_argument(f"--{name}-layers", type=int, default=layers, help="blocks")
        parser.add_argument(f"--{name}-width", type=int, default=width, help=f"a multiple of {HEAD_SIZE}")
        parser.add_argument(f"--{name}-tokens", type=int, default=tokens, help="to train on, in all")
        parser.add_argument(f"--{name}-learning-rate", type=float, default=0.512 / width, help="at its peak")
    parser.add_argument("--steps", type=int, help="for both, instead of the numbers of tokens")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--held-out", type=int, default=100, help="documents to measure on, not trained on")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    documents = read_documents(options.text)
    random.Random(options.seed).shuffle(documents)
    count = min(options.held_out, len(documents) // 10)
    if not count:
        raise SystemExit(f"only {len(documents)} documents; separate them by {SEPARATOR}")
    held_out, documents = documents[:count], documents[count:]
    results: dict[str, dict[str, object]] = {}
    for name, train_tokenizer in (("target", train_target_tokenizer), ("draft", train_draft_tokenizer)):
        sizes = {field: getattr(options, f"{name}_{field}") for field in Plan.__dataclass_fields__}
        plan = Plan(**sizes)
        print(f"{name}: tokenizer", flush=True)
        tokenizer = train_tokenizer(documents, plan.vocabulary)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        opening = [eos if bos is None else bos]
        ending = [] if bos is None else [eos]
        pieces = [torch.tensor(opening + encode(tokenizer, text) + ending) for text in documents]
        stream = torch.cat(pieces)
        if len(stream) <= options.length:
            raise SystemExit(f"{len(stream)} tokens of text do not fill a window of {options.length}")
        model = build_model(tokenizer, plan).to(options.device)
        steps = options.steps or max(1, plan.tokens // (options.batch * options.length))
        print(f"{name}: {model.num_parameters():,} parameters, {len(stream):,} tokens of text", flush=True)
        windows = batches(stream, bos, options.batch, options.length)
        losses = train(model, windows, steps, plan.learning_rate, options.bf16)
        model.to(torch.bfloat16).save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        # Measured as saved: with weights in bfloat16.
        score = bits_per_byte(model.float(), tokenizer, held_out)
        results[name] = {"plan": asdict(plan), "losses": losses, "bits_per_byte": score}
    for name, result in results.items():
        print(f"{name}: {result['bits_per_byte']:.3f} bits per byte on {len(held_out)} held-out documents")
    return results


if __name__ == "__main__":
    main()
