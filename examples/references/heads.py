"""EAGLE-3 and Medusa heads, with the names that vLLM's checkpoints have, unrolled over whole texts for training.

Both propose from a part of the target's vocabulary, `kept_ids`, since the output layer is what a small proposer costs.

Sources: EAGLE-3, Li et al. 2025 (arXiv 2503.01840), and `vllm/model_executor/models/llama_eagle3.py`; Medusa, Cai et
al. 2024 (arXiv 2401.10774), and `vllm/model_executor/models/medusa.py`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

UNROLLED = 4  # Steps that are trained; vLLM takes no more of Medusa's.


class Attention(nn.Module):
    """The attention of an EAGLE-3 layer, whose input is an embedding beside a hidden state."""

    def __init__(self, config: LlamaConfig) -> None:
        """Begin at random, in the sizes of the target."""
        super().__init__()
        self.heads, self.kv_heads, self.size = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], steps: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """One step of every chain at once.

        Args:
            x: `[batch, n, 2 * hidden]`; row `t` is the chain that begins at slot `t`.
            rotary: Cosines and sines of the positions.
            steps: Keys and values of the steps before; those of this one are added. A chain sees the keys of step 0
                up to its slot, as the verified tokens leave them, and its own later ones.
        """
        batch, n, _ = x.shape
        q, k, v = (
            layer(x).view(batch, n, -1, self.size).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        groups = self.heads // self.kv_heads
        steps.append((repeat_kv(k, groups), repeat_kv(v, groups)))
        (first_k, first_v), later = steps[0], steps[1:]
        scores = q @ first_k.transpose(2, 3)
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        own = [(q * k).sum(-1, keepdim=True) for k, _ in later]
        weights = torch.cat([scores, *own], -1).div(self.size**0.5).softmax(-1)
        out = weights[..., :n] @ first_v
        for j, (_, v) in enumerate(later):
            out = out + weights[..., n + j, None] * v
        return self.o_proj(out.transpose(1, 2).reshape(batch, n, -1))


class Layer(nn.Module):
    """EAGLE-3's only decoder layer."""

    def __init__(self, config: LlamaConfig) -> None:
        """Begin at random, in the sizes of the target."""
        super().__init__()
        self.self_attn, self.mlp = Attention(config), LlamaMLP(config)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3)
        )

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor, rotary: Any, steps: list[Any]) -> torch.Tensor:
        """The next hidden state, `[batch, n, hidden]`."""
        x = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], -1)
        hidden = hidden + self.self_attn(x, rotary, steps)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3(nn.Module):
    """An EAGLE-3 head that begins as a copy of the target's last layer and of its output layer's kept rows."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], kept_ids: torch.Tensor) -> None:
        """Begin from the weights of the target, whose ids `[kept]` the head can propose."""
        super().__init__()
        width = config.hidden_size
        self.fc = nn.Linear(3 * width, width, bias=False)
        self.midlayer = Layer(config)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, len(kept_ids), bias=False)
        self._rotary = [LlamaRotaryEmbedding(config)]  # In a list, so that it is no part of the checkpoint.
        last = f"model.layers.{config.num_hidden_layers - 1}."
        with torch.no_grad():
            self.fc.weight.normal_(std=0.002)[:, 2 * width :] += torch.eye(width)
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(self.midlayer.self_attn, name).weight
                weight[:, :width].normal_(std=0.01)
                weight[:, width:] = weights[f"{last}self_attn.{name}.weight"]
            self.midlayer.self_attn.o_proj.weight.copy_(weights[f"{last}self_attn.o_proj.weight"])
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(self.midlayer.mlp, name).weight.copy_(weights[f"{last}mlp.{name}.weight"])
            self.midlayer.hidden_norm.weight.copy_(weights[f"{last}input_layernorm.weight"])
            self.midlayer.post_attention_layernorm.weight.copy_(weights[f"{last}post_attention_layernorm.weight"])
            self.norm.weight.copy_(weights["model.norm.weight"])
            self.lm_head.weight.copy_(output_layer(weights)[kept_ids])

    def forward(self, states: torch.Tensor, embedded: torch.Tensor, used: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of each step of every chain.

        Args:
            states: `[batch, n, 4, hidden]`, from `features.py`, from the first token of the text on.
            embedded: `[batch, n + steps - 1, hidden]`; row `t` is the embedding of token `t + 1`.
            used: For each step, which of its logits are wanted, `[batch, n]` bool.

        Returns:
            For step `j`, `[wanted, kept]`; that of row `t` is the law of token `t + 2 + j`.
        """
        batch, n = states.shape[:2]
        hidden = self.fc(states[:, :, :3].reshape(batch, n, -1))
        steps: list[Any] = []
        found = []
        for j, wanted in enumerate(used):
            positions = torch.arange(j, n + j)[None]
            rotary = self._rotary[0](hidden, positions)
            hidden = self.midlayer(embedded[:, j : n + j], hidden, rotary, steps)
            found.append(self.lm_head(self.norm(hidden[wanted])))
        return found

    def save(self, folder: Path, config: LlamaConfig, kept_ids: torch.Tensor, read: tuple[int, ...]) -> None:
        """Write the folder that vLLM's `eagle3` loads; the embedding is the target's, so it is left out."""
        given = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        content = {
            **given, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1,
            "draft_vocab_size": len(kept_ids), "eagle_aux_hidden_state_layer_ids": list(read),
            "tie_word_embeddings": False, "dtype": "float32",
        }  # fmt: skip
        shift = {"d2t": kept_ids - torch.arange(len(kept_ids))} if len(kept_ids) < config.vocab_size else {}
        write(folder, content, {**self.state_dict(), **shift})


class ResidualBlock(nn.Module):
    """One of Medusa's heads, but for the output layer."""

    def __init__(self, width: int) -> None:
        """Begin as the identity."""
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False)])
        nn.init.zeros_(self.layers[0].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, n, hidden]` to the same."""
        return x + functional.silu(self.layers[0](x))


class Medusa(nn.Module):
    """Medusa heads with one output layer for all, which begins as the target's kept rows."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], kept_ids: torch.Tensor) -> None:
        """Begin from the weights of the target, whose ids `[kept]` the head can propose."""
        super().__init__()
        self.blocks = nn.ModuleList([ResidualBlock(config.hidden_size) for _ in range(UNROLLED)])
        self.lm_head = nn.Linear(config.hidden_size, len(kept_ids), bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(output_layer(weights)[kept_ids])

    def forward(self, states: torch.Tensor, embedded: torch.Tensor, used: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of each head; arguments and result as `Eagle3.forward` has them."""
        pairs = zip(self.blocks, used, strict=True)
        return [self.lm_head(block(states[:, :, 3][wanted])) for block, wanted in pairs]

    def save(self, folder: Path, config: LlamaConfig, kept_ids: torch.Tensor, read: tuple[int, ...]) -> None:
        """Write the folder that vLLM's `medusa` loads, once it takes a `token_map` (`benchmarks`)."""
        content = {
            "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size, "num_heads": len(self.blocks), "num_hidden_layers": 1,
            "truncated_vocab_size": len(kept_ids), "original_lm_head": True, "medusa_fc_bias": False,
            "dtype": "float32",
        }  # fmt: skip
        write(folder, content, {**self.state_dict(), "token_map": kept_ids})


def output_layer(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The target's output layer, `[vocabulary, hidden]`, which may be its embedding."""
    return weights.get("lm_head.weight", weights["model.embed_tokens.weight"])


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a model's folder: `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
