"""vLLM's own OpenAI server, started and looked after: our configuration in, vLLM's arguments out."""
