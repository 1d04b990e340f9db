"""The pair that `examples/train_pair.py` makes is what the rest of the project expects of one."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_pair.py"
MIXED_SCRIPTS = (
    "Plain words,  two spaces, three   spaces.\n\n\tdef f(x):\r\n        return {'a': [1, 23]}\n",
    "Где мы? — Дома. 世界人权宣言。 Ελληνικά, العربية, हिन्दी, naïve, cafe\u0301",
    " 🌱👩‍🌾🏳️‍🌈 ends with spaces  ",
    "\x00\u200b\ufeff\uffff\U0001d518\n",
    " leading space, and <0x41> in letters",
)


def write_text(path: Path) -> None:
    """Writes a hundred documents of a made-up, predictable language in two scripts."""
    rng = random.Random(0)
    words = [
        "river",
        "stone",
        "bridge",
        "night",
        "and",
        "then",
        "мост",
        "река",
        "ночь",
        "value = 1\n",
        "水",
        "夜",
    ]
    documents = [" ".join(rng.choices(words, k=rng.randint(20, 80))) for _ in range(100)]
    path.write_text("<|endoftext|>".join(documents), encoding="utf-8")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of a tiny trained pair, and what the training reported."""
    spec = importlib.util.spec_from_file_location("train_pair", SCRIPT)
    train_pair = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_pair)
    folder = tmp_path_factory.mktemp("pair")
    write_text(folder / "text.txt")
    tiny = "--target-vocabulary 320 --target-width 64 --target-layers 1 --draft-vocabulary 300 --draft-width 64"
    tiny += " --draft-layers 1 --steps 30 --batch 4 --length 64 --device cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Matrices this small wait for the other threads longer than they compute.
    try:
        yield (
            folder,
            train_pair.main(["--out", str(folder), "--text", str(folder / "text.txt"), *tiny.split()]),
        )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("side", ["target", "draft"])
def test_training_lowers_the_loss(pair, side):
    losses = pair[1][side]["losses"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert pair[1][side]["bits_per_byte"] < 8


@pytest.mark.parametrize("side", ["target", "draft"])
@pytest.mark.parametrize("text", MIXED_SCRIPTS)
def test_tokenizers_give_back_every_text(pair, side, text):
    tokenizer = AutoTokenizer.from_pretrained(pair[0] / side)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("side", ["target", "draft"])
def test_saved_model_loads_and_generates(pair, side):
    tokenizer = AutoTokenizer.from_pretrained(pair[0] / side)
    model = AutoModelForCausalLM.from_pretrained(pair[0] / side)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.head_dim == 64
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer("river and", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4


def test_vocabularies_differ(pair):
    target, draft = (set(AutoTokenizer.from_pretrained(pair[0] / side).get_vocab()) for side in ("target", "draft"))
    assert target - draft and draft - target


def test_target_has_a_chat_template(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair[0] / "target")
    messages = [{"role": "user", "content": "river?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nriver?<|im_end|>\n<|im_start|>assistant\n"
