"""Llama and Mistral models: configuration, rotary embedding, forward pass, loading and saving."""
