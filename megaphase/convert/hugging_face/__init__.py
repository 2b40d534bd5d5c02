"""Models of Hugging Face transformers: Llama and GPT-2."""
