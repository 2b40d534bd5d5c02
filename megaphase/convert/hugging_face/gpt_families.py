"""The families of Hugging Face models with layer norms and without gates: GPT-NeoX and GPT-2."""

from __future__ import annotations

from megaphase.convert.hugging_face.config_keys import Fixed, Option
from megaphase.convert.hugging_face.family import Family
from megaphase.convert.hugging_face.rope import Rope

GPT_NEOX = Family(
    title="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    options={
        "norm": "layernorm",
        "position": "rotary",
        "activation": "gelu_erf",
        "ffn_bias": True,
    },
    keys={
        "vocab_size": Option("vocab"),
        "max_position_embeddings": Option("seq_len", default=2048),
        "num_hidden_layers": Option("layers"),
        "hidden_size": Option("hidden"),
        "num_attention_heads": Option("heads"),
        "intermediate_size": Option("ffn"),
        "hidden_act": Fixed(("gelu",), "gelu"),
        "layer_norm_eps": Option("norm_eps", "number", 1e-5),
        "tie_word_embeddings": Option("tied_embeddings", "flag", False),
        "use_parallel_residual": Option("parallel_residual", "flag", True),
        "attention_bias": Option("bias", "flag", True),
        "rope_parameters": Rope(
            base_key="rotary_emb_base", part_key="rotary_pct", default_part=0.25
        ),
    },
    harmless={
        **dict.fromkeys(
            ("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
            "dropout of training; the run file has its own",
        ),
        "classifier_dropout": "of models that classify",
    },
    written={"attention_dropout": 0.0, "hidden_dropout": 0.0},
    prefix="gpt_neox.",
    blocks="layers",
    modules={
        "embedding": ("embed_in",),
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("attention.query_key_value",),
        "attention.out": ("attention.dense",),
        "feed_forward_norm": ("post_attention_layernorm",),
        "feed_forward.up": ("mlp.dense_h_to_4h",),
        "feed_forward.down": ("mlp.dense_4h_to_h",),
        "norm": ("final_layer_norm",),
    },
    interleaved=True,
    head="embed_out.weight",
)
GPT2 = Family(
    title="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    options={"norm": "layernorm", "position": "learned", "activation": "gelu"},
    keys={
        "vocab_size": Option("vocab"),
        "n_positions": Option("seq_len", default=1024),
        "n_layer": Option("layers"),
        "n_embd": Option("hidden"),
        "n_head": Option("heads"),
        "n_inner": Option("ffn", default=lambda c: 4 * c.size("n_embd")),
        "activation_function": Fixed(("gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
        "layer_norm_epsilon": Option("norm_eps", "number", 1e-5),
        "scale_attn_weights": Fixed((True,), True),
        "scale_attn_by_inverse_layer_idx": Fixed((False,), False),
        "tie_word_embeddings": Option("tied_embeddings", "flag", True),
    },
    harmless={
        **dict.fromkeys(
            ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
            "dropout of training; the run file has its own",
        ),
        **dict.fromkeys(
            (
                "summary_type",
                "summary_use_proj",
                "summary_activation",
                "summary_proj_to_labels",
                "summary_first_dropout",
            ),
            "of models that classify",
        ),
        "n_ctx": "n_positions in older files",
        **dict.fromkeys(
            ("n_special", "predict_special_tokens"), "of older versions; transformers reads neither"
        ),
        "reorder_and_upcast_attn": "in which precision attention is computed",
    },
    written={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    always_biased=True,
    prefix="transformer.",
    blocks="h",
    modules={
        "positions": ("wpe.weight",),
        "embedding": ("wte",),
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "feed_forward_norm": ("ln_2",),
        "feed_forward.up": ("mlp.c_fc",),
        "feed_forward.down": ("mlp.c_proj",),
        "norm": ("ln_f",),
    },
    transposed=frozenset(
        ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    ),
)
