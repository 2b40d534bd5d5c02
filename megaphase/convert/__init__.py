"""Convert checkpoints: to other layouts, to and from Hugging Face and Megatron-LM."""
