"""An OpenAI-compatible HTTP server on Hugging Face Transformers: the traditional way to serve a model."""
