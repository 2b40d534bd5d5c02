"""Hugging Face's Llama with the shape of one of Megaphase's GPTs, and weights under its names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaphase.model.gpt import GPT
from megaphase.model.shape import GPTShape


def hugging_face_llama(shape: GPTShape) -> nn.Module:
    """Return a Llama of the same shape, in fp32, with attention by scaled_dot_product_attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_base},
        initializer_range=shape.init_std,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float()


def llama_weights(model: GPT, shape: GPTShape) -> dict[str, Tensor]:
    """Return the model's weights under Llama's names, with fused projections split."""
    state = model.state_dict()
    weights = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for i in range(shape.layers):
        block, layer = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = state[block + "attention.qkv.weight"].split(shape.qkv_segments)
        gate, up = state[block + "feed_forward.up.weight"].split(shape.ffn_segments)
        weights |= {
            layer + "input_layernorm.weight": state[block + "attention_norm.weight"],
            layer + "self_attn.q_proj.weight": q,
            layer + "self_attn.k_proj.weight": k,
            layer + "self_attn.v_proj.weight": v,
            layer + "self_attn.o_proj.weight": state[block + "attention.out.weight"],
            layer + "post_attention_layernorm.weight": state[block + "feed_forward_norm.weight"],
            layer + "mlp.gate_proj.weight": gate,
            layer + "mlp.up_proj.weight": up,
            layer + "mlp.down_proj.weight": state[block + "feed_forward.down.weight"],
        }
    return weights
