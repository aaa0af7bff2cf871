"""Sources of models: folders, URLs, the Hugging Face Hub, GGUF files, the demo model."""
