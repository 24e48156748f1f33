"""The PyTorch reference of DeepSeek-V4: the model, its export to GGUF, and its parity with the engine."""
