"""Lets a target write what its references are trained on.

    python examples/references/write_texts.py --target DIR --out texts.jsonl --minutes 30

Half of the texts are answers to questions of ours (`questions.py`); for the other half the target writes the user's
turn too, after nothing but its chat template (as Magpie does, Xu et al. 2024). Most answers are greedy, the others
sampled. A run that finds its file adds to it, with other questions.

Each line of the file is `{"kind", "prompt", "output", "laws", "temperature", "finished"}`. Prompt and output are target
ids; `laws` has for each token of the output the target's likeliest tokens there, as `[target_ids, probabilities]` at
temperature 1, whatever the output was sampled at.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

from questions import questions
from training import LAW, read_texts

TEMPERATURES = (0.0, 0.0, 0.0, 0.0, 0.7, 1.0)  # Of answers, one by chance.
USER_TOKENS = 64  # At most, of a user's turn that the target writes.
LEAST = 0.004  # Tokens of a law that are less likely are not kept.
MARK = "\x00"  # Stands for a message in a chat template, to find what surrounds it.


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The target ids before a user's message, and those between it and the answer, as the chat template has them."""
    message = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, after = text.split(MARK)
    return tuple(tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))


def law(logprobs: dict[int, Any]) -> list[list[Any]]:
    """The likeliest target ids of one position, and their probabilities, from vLLM's logprobs."""
    likely = sorted(((math.exp(found.logprob), i) for i, found in logprobs.items()), reverse=True)[:LAW]
    kept = [(round(p, 4), i) for p, i in likely if p >= LEAST]
    return [[i for _, i in kept], [p for p, _ in kept]]


def main() -> None:
    """Write rounds of texts until the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--target", type=Path, required=True, help="folder of a target with a chat template")
    parser.add_argument("--out", type=Path, required=True, help="file to write, or to add to")
    parser.add_argument(
        "--minutes", type=float, default=30, help="of processor time; the round that it ends in is kept"
    )
    parser.add_argument("--round", type=int, default=256, help="requests between two writes")
    parser.add_argument("--batch", type=int, default=64, help="requests at once")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument(
        "--dtype", default="float32", help="of the target; on processors without bfloat16, float32 is fast"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # Processor time is that of this process.
    from vllm import LLM, SamplingParams, TokensPrompt

    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = read_texts(options.out) if options.out.exists() else []
    llm = LLM(
        model=str(options.target),
        dtype=options.dtype,
        max_num_seqs=options.batch,
        max_model_len=1024,
        enforce_eager=True,
        seed=options.seed + len(known),  # Or a run that adds to a file would write the same turns again.
    )
    tokenizer = llm.get_tokenizer()
    before, after = surroundings(tokenizer)
    ends = tokenizer.eos_token_id
    rng = random.Random(f"{options.seed} {len(known)}")
    texts = [tokenizer.decode(row["output"], skip_special_tokens=True) for row in known]
    ours = questions(texts, rng)
    turns: list[list[int]] = []  # Prompts whose user's turn the target wrote in the round before.
    written = {tuple(row["output"]) for row in known}
    tokens, started = 0, time.process_time()
    while time.process_time() - started < 60 * options.minutes:
        asked = [("chat", prompt) for prompt in turns]
        while len(asked) < options.round // 2:
            kind, text = next(ours)
            asked.append((kind, before + tokenizer(text, add_special_tokens=False).input_ids + after))
        sampling = [
            SamplingParams(temperature=rng.choice(TEMPERATURES), max_tokens=options.tokens, logprobs=LAW) for _ in asked
        ]
        user = SamplingParams(temperature=1.0, max_tokens=USER_TOKENS)
        count = options.round - len(asked)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in [ids for _, ids in asked] + [before] * count]
        outputs = [output.outputs[0] for output in llm.generate(prompts, sampling + [user] * count, use_tqdm=False)]
        with options.out.open("a") as file:
            for (kind, prompt), parameters, output in zip(asked, sampling, outputs, strict=False):
                answer = list(output.token_ids)
                if tuple(answer) in written:
                    continue  # A copy in the held-out part would be no measure.
                written.add(tuple(answer))
                texts.append(tokenizer.decode(answer, skip_special_tokens=True))
                tokens += len(answer)
                row = {
                    "kind": kind, "prompt": prompt, "output": answer, "laws": [law(found) for found in output.logprobs],
                    "temperature": parameters.temperature, "finished": output.finish_reason == "stop",
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
        done = [list(output.token_ids) for output in outputs[len(asked) :] if output.finish_reason == "stop"]
        turns = [before + [i for i in turn if i != ends] + after for turn in done if len(turn) > 4]
        spent = time.process_time() - started
        print(
            f"{len(written):,} texts, {tokens / spent:.0f} tokens a processor second, {spent / 60:.0f} minutes",
            flush=True,
        )


if __name__ == "__main__":
    main()
