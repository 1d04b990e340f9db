"""Makes, from a trained Llama model, one with the same function and the cost of a larger one.

    python -m benchmarks.speed.widen --target DIR --out DIR --hidden 512 --layers 12
    python -m benchmarks.speed.widen --target DIR --out DIR --ratio 20 --draft DIR

What speculative decoding gains depends on what a target pass costs in draft passes, which a small trained target cannot
show. So it is widened: the text stays that of the small model, and every pass costs what its new shape costs.

**Widths.** The residual stream is padded with zeros. What would write into the padding (embedding, output projections)
is zero there; what reads from it is random, since it reads zeros. New heads and new columns of the MLP are random, and
the columns of the output projections that read them are zero. **Layers.** New layers are random, and their output
projections are zero, so the residual stream passes them unchanged. Nothing else is zero: nothing can be skipped.

**Norms.** RMSNorm divides by `sqrt(mean + eps)`, and the padded mean is `old / new` times as large. With `eps` scaled
by the same ratio and the weights by its root, the result is the old one.

In both cases greedy tokens of the result are compared with the original's, in float32 through transformers, and the
script fails if one differs. The ratio is measured (`pass_times.py`), so its shape depends on the machine; a shape gives
the same weights on every processor.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.common.provenance import provenance

PROMPTS = (
    "Once upon a time there was",
    "def read(self, size):\n    ",
    "Жил был маленький мальчик",
    "Question: There are 20 students",
    "All human beings are born free and equal in dignity and rights. They are endowed with reason",
)
CHECKED_TOKENS = 64


def widened_config(config: LlamaConfig, hidden: int, layers: int) -> dict[str, Any]:
    """What changes in the configuration.

    Args:
        config: Of the trained model.
        hidden: New width; a multiple of the old one, and so are heads and MLP.
        layers: New number of layers, the old ones included.

    Returns:
        Keys of the configuration and their new values.
    """
    if hidden % config.hidden_size or hidden < config.hidden_size:
        raise SystemExit(f"--hidden must be a multiple of {config.hidden_size}, not {hidden}.")
    if layers < config.num_hidden_layers:
        raise SystemExit(f"--layers must be at least {config.num_hidden_layers}, not {layers}.")
    times = hidden // config.hidden_size
    return {
        "hidden_size": hidden,
        "intermediate_size": config.intermediate_size * times,
        "num_attention_heads": config.num_attention_heads * times,
        "num_key_value_heads": config.num_key_value_heads * times,
        "num_hidden_layers": layers,
        "rms_norm_eps": config.rms_norm_eps / times,
    }


@torch.no_grad()
def widen(model: LlamaForCausalLM, hidden: int, layers: int) -> LlamaForCausalLM:
    """A model with the same function and another shape.

    Args:
        model: The trained one, in float32.
        hidden: Its new width.
        layers: Its new number of layers; the new ones come last.

    Returns:
        A new model, in float32, on the same device.
    """
    old = model.config
    if old.attention_bias or old.mlp_bias:
        raise SystemExit("A model with biases cannot be widened.")
    config = LlamaConfig(**{**old.to_dict(), **widened_config(old, hidden, layers), "dtype": "float32"})
    with model.device:
        wide = LlamaForCausalLM(config).float()
    generator = torch.Generator(model.device).manual_seed(0)
    for parameter in wide.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    scale = (old.hidden_size / hidden) ** 0.5

    def put(into: Any, given: Any, *, zero_rows: bool = False, zero_columns: bool = False) -> None:
        """Write a weight into the corner of a larger one, and zeros beside or below it."""
        rows, columns = given.weight.shape
        if zero_columns:
            into.weight[:, columns:] = 0
        if zero_rows:
            into.weight[rows:] = 0
        into.weight[:rows, :columns] = given.weight

    def put_norm(into: Any, given: Any) -> None:
        into.weight[: len(given.weight)] = given.weight * scale

    put(wide.model.embed_tokens, model.model.embed_tokens, zero_columns=True)
    if not old.tie_word_embeddings:
        put(wide.lm_head, model.lm_head)
    put_norm(wide.model.norm, model.model.norm)
    for into, given in zip(wide.model.layers, model.model.layers, strict=False):
        put_norm(into.input_layernorm, given.input_layernorm)
        put_norm(into.post_attention_layernorm, given.post_attention_layernorm)
        for name in ("q_proj", "k_proj", "v_proj"):
            put(getattr(into.self_attn, name), getattr(given.self_attn, name))
        put(into.self_attn.o_proj, given.self_attn.o_proj, zero_rows=True, zero_columns=True)
        for name in ("gate_proj", "up_proj"):
            put(getattr(into.mlp, name), getattr(given.mlp, name))
        put(into.mlp.down_proj, given.mlp.down_proj, zero_rows=True, zero_columns=True)
    for added in wide.model.layers[old.num_hidden_layers :]:
        added.self_attn.o_proj.weight.zero_()
        added.mlp.down_proj.weight.zero_()
    return wide.eval()


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, tokenizer: Any, prompt: str) -> list[int]:
    """The ids that a model writes after a prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=CHECKED_TOKENS,
        max_new_tokens=CHECKED_TOKENS,
    )
    return list(written[0, ids.shape[1] :].tolist())


def check(target: Path, widened: Path, device: str) -> None:
    """Fail unless a saved model writes what the original writes."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).to(device).eval() for p in (target, widened)]
    for prompt in PROMPTS:
        old, new = (greedy(model, tokenizer, prompt) for model in models)
        if old != new:
            place = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
            raise SystemExit(f"The widened model differs from the original after {prompt!r}, at token {place}.")


def widen_folder(
    target: Path, out: Path, hidden: int, layers: int, reason: dict[str, Any] | None = None, *,
    device: str = "cpu", dtype: str = "float32",
) -> None:  # fmt: skip
    """Widen a saved model, check the result, and write beside it how it was made.

    Args:
        target: Folder of the trained model.
        out: Folder of the new one.
        hidden: New width.
        layers: New number of layers.
        reason: What the shape was chosen by.
        device: Where it is made; billions of parameters want an accelerator.
        dtype: Of the saved weights.
    """
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(device)
    wide = widen(model, hidden, layers)
    wide.to(getattr(torch, dtype)).save_pretrained(out)
    AutoTokenizer.from_pretrained(target).save_pretrained(out)
    check(target, out, device)
    shape = {
        "hidden": hidden,
        "layers": layers,
        "parameters": wide.num_parameters(),
        "original_parameters": model.num_parameters(),
    }
    (out / "widened.json").write_text(
        json.dumps({**shape, "chosen_by": reason, "provenance": provenance()}, indent=1) + "\n"
    )
    print(f"{out}: {wide.num_parameters():,} parameters, {layers} layers, {hidden} wide; same greedy tokens")


def main() -> None:
    """Widen one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, help="new width")
    parser.add_argument("--layers", type=int, help="new number of layers")
    parser.add_argument("--ratio", type=float, help="cost of a target pass in draft passes, instead of a shape")
    parser.add_argument("--draft", type=Path, help="for --ratio")
    parser.add_argument("--device", default="cpu", help="where it is made")
    parser.add_argument("--dtype", default="float32", help="of the saved weights")
    options = parser.parse_args()
    if options.ratio:
        from benchmarks.speed.pass_times import shape_for_ratio

        if options.draft is None:
            parser.error("--ratio needs --draft")
        hidden, layers, reason = shape_for_ratio(options.target, options.draft, options.ratio, {})
    elif options.hidden and options.layers:
        hidden, layers, reason = options.hidden, options.layers, None
    else:
        parser.error("give --hidden and --layers, or --ratio and --draft")
    widen_folder(options.target, options.out, hidden, layers, reason, device=options.device, dtype=options.dtype)


if __name__ == "__main__":
    main()
