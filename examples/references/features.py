"""Keeps what EAGLE-3 and Medusa heads read of a target: its hidden states over the texts that it wrote.

    python examples/references/features.py --target DIR --texts texts.jsonl --out DIR

The states are the inputs of three layers, those that vLLM hands to an EAGLE-3 head unless told otherwise, and the last
normed state. A file in `--out` holds 128 texts; files that are there are not made again.
"""

import argparse
import time
from pathlib import Path

import torch
from training import WIDEST, read_texts
from transformers import AutoConfig, AutoModelForCausalLM

TEXTS_IN_FILE = 128


def layers_read(target: Path) -> tuple[int, int, int]:
    """The layers whose inputs an EAGLE-3 head reads (vLLM: `get_eagle3_default_aux_hidden_state_layers`)."""
    count = AutoConfig.from_pretrained(target).num_hidden_layers
    if not 2 < count // 2 < count - 3:
        raise SystemExit(f"{target} has {count} layers; an EAGLE-3 head reads three of at least 8.")
    return 2, count // 2, count - 3


def main() -> None:
    """Write the files that are not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="folder of the target")
    parser.add_argument("--texts", type=Path, required=True, help="what the target wrote, from write_texts.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the states")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32).model.eval()
    read = (*layers_read(options.target), -1)
    rows = read_texts(options.texts)
    started, tokens = time.process_time(), 0
    for first in range(0, len(rows), TEXTS_IN_FILE):
        file = options.out / f"{first:06}.pt"
        if file.exists():
            continue
        states = []
        for row in rows[first : first + TEXTS_IN_FILE]:
            target_ids = torch.tensor([(row["prompt"] + row["output"])[:WIDEST]])
            with torch.no_grad():
                hidden = model(target_ids, output_hidden_states=True, use_cache=False).hidden_states
            states.append(torch.stack([hidden[layer][0] for layer in read], 1).to(torch.float16))
            if not states[-1].isfinite().all():
                raise SystemExit(f"states of {options.target} are too large for float16")
            tokens += target_ids.shape[1]
        torch.save(states, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        spent = time.process_time() - started
        print(
            f"{first + len(states):,} of {len(rows):,} texts, {tokens / spent:.0f} tokens a processor second",
            flush=True,
        )


if __name__ == "__main__":
    main()
