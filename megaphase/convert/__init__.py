"""From one form of a checkpoint to another: other layouts, Hugging Face, Megatron-LM."""
